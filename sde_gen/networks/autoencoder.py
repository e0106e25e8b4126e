"""An autoencoder: convolutions for signals, images and volumes, a perceptron for vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import gaussians
from ..ops import check_count, check_number, sum_rest
from .blocks import Space, convolution, group_norm, zeroed
from .codec import Codec

_NARROW, _WIDE = -6.0, 2.0
"""Bounds of the logarithms of deviations: e^-6 is a third of a cell of 256 levels."""
_SMALLEST = 8
"""The largest side at which images become flat latents."""


class Residual(nn.Module):
    """h + f_2(silu(norm(f_1(silu(norm(h)))))), f_2 zero at first; f convolutions or matrices."""

    def __init__(self, width: int, space: Space | None, dropout: float) -> None:
        super().__init__()
        make = _maker(space)
        self.norm_1, self.norm_2 = _norm(width, space), _norm(width, space)
        self.map_1, self.map_2 = make(width, width), zeroed(make(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        """(B, width, *places) -> the same."""
        u = self.map_1(F.silu(self.norm_1(h)))
        return h + cast(Tensor, self.map_2(self.dropout(F.silu(self.norm_2(u)))))


def _maker(space: Space | None) -> Callable[[int, int], nn.Module]:
    return nn.Linear if space is None else lambda n, m: convolution(space, n, m)


def _norm(width: int, space: Space | None) -> nn.Module:
    return nn.LayerNorm(width) if space is None else group_norm(width)


class Ladder(NamedTuple):
    """Widths and places of the levels, fine to coarse; how many blocks each has; no places, and
    one level, for vectors. A place of the finest level is a patch of the data."""

    widths: list[int]
    places: list[tuple[int, ...]]
    blocks: int
    dropout: float
    patch: int = 1

    @property
    def space(self) -> Space | None:
        """Of the convolutions."""
        return Space(len(self.places[0])) if self.places[0] else None

    def level(self, width: int) -> list[nn.Module]:
        """The blocks of a level."""
        return [Residual(width, self.space, self.dropout) for _ in range(self.blocks)]

    def down(self, n_in: int, n_out: int, flat: bool) -> nn.Sequential:
        """(B, n_in, *S) -> (B, n_out, *S'), or (B, n_out) where the latent is flat."""
        n = self.widths[0]
        layers: list[nn.Module] = []
        if self.patch > 1:
            layers.append(_by_patch(self.space, n_in, n, self.patch))
        else:
            layers.append(_maker(self.space)(n_in, n))
        for i, width in enumerate(self.widths):
            if i and self.space:
                layers.append(convolution(self.space, n, width, stride=2))
            layers += self.level(n := width)
        layers += [_norm(n, self.space), nn.SiLU()]
        if flat and self.space:
            layers += [nn.Flatten(), nn.Linear(n * math.prod(self.places[-1]), n_out)]
        else:
            layers.append(_maker(self.space)(n, n_out))
        return nn.Sequential(*layers)

    def up(self, n_in: int, n_out: int, flat: bool) -> nn.Sequential:
        """The way back: each level is enlarged to the places that it had on the way down."""
        n = self.widths[-1]
        layers: list[nn.Module] = []
        if flat and self.space:
            layers += [nn.Linear(n_in, n * math.prod(self.places[-1]))]
            layers.append(nn.Unflatten(1, (n, *self.places[-1])))
        else:
            layers.append(_maker(self.space)(n_in, n))
        for i, width in reversed([*enumerate(self.widths)]):
            if i < len(self.widths) - 1 and self.space:
                layers += [nn.Upsample(self.places[i]), convolution(self.space, n, width)]
            layers += self.level(n := width)
        layers += [_norm(n, self.space), nn.SiLU()]
        if self.patch > 1:
            layers.append(_by_patch(self.space, n, n_out, self.patch, back=True))
        else:
            layers.append(_maker(self.space)(n, n_out))
        return nn.Sequential(*layers)


def _by_patch(
    space: Space | None, n_in: int, n_out: int, patch: int, back: bool = False
) -> nn.Module:
    """A linear map of each patch to a place, or back."""
    assert space is not None
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    to = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kind = kinds[space.rank - 1] if back else to[space.rank - 1]
    return cast(nn.Module, kind(n_in, n_out, patch, patch))


class Autoencoder(Codec):
    """A VAE of data (B, *shape), latents (B, *latent): convolutional for (C, *S), dense for (n,).

    p(x | z) is a mixture of K normal laws in each coordinate, all 3 K numbers by the decoder; or
    one normal law with a deviation that all coordinates share and that is learned as a parameter
    (Rybkin et al. 2021, sigma-VAE). Of quantised data it is read on the cells of the levels, the
    outer of which reach to infinity, so that the probabilities sum to 1.

    Args:
        shape: of one datum: (n,), or (C, *S) with one to three sizes.
        latent: of one latent: (d,), or (c, *S') with S' the sizes S / patch halved, rounding up,
            any number of times: the shape says how many levels there are.
        width: features of the finest level, twice as many on coarser levels; of a dense network
            in every layer.
        blocks: residual blocks a level.
        std: the deviation of the encoder's noise, one number; None learns s(x).
        levels: L of quantised data on [-1, 1]; None takes p(x | z) for a density.
        components: K; None is one normal law with a common deviation. Of data without levels take
            that: a deviation of each coordinate falls to nothing where one is constant.
        dropout: probability of dropout inside each residual block.
        patch: side of the patches of which each is a place of the finest level: full resolution
            is what costs most, and 2 leaves it out.

    Raises:
        ValueError: sizes that do not fit together, saying which.

    >>> net = Autoencoder((1, 8, 8), latent=(4, 2, 2), width=8, levels=17, components=2)
    >>> cost = net.cost(torch.zeros(3, 1, 8, 8, dtype=torch.int64))
    >>> cost.rate.shape, cost.distortion.shape, net.decode(torch.zeros(3, 4, 2, 2)).shape
    (torch.Size([3]), torch.Size([3]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: Sequence[int],
        width: int = 32,
        blocks: int = 1,
        std: float | None = None,
        levels: int | None = None,
        components: int | None = None,
        dropout: float = 0.0,
        patch: int = 1,
    ) -> None:
        super().__init__(shape, latent, levels, std)
        self.config = {
            "shape": list(self.shape),
            "latent": list(self.latent),
            "width": (width := check_count(width, "width")),
            "blocks": (blocks := check_count(blocks, "blocks")),
            "std": self.std,
            "levels": self.levels,
            "components": None if components is None else check_count(components, "components"),
            "dropout": (dropout := check_number(dropout, "dropout", least=0, most=1)),
            "patch": (patch := check_count(patch, "patch")),
        }
        places = _places(self.shape, self.latent, patch)
        widths = [width, *[2 * width] * (len(places) - 1)]
        ladder = Ladder(widths, places, blocks, dropout, patch)
        flat = len(self.latent) == 1
        self.components = components or 1
        first, n = self.latent[0], self.shape[0]
        self.encoder = ladder.down(n, first * (1 + (std is None)), flat)
        self.decoder = ladder.up(first, n * (1 if components is None else 3 * components), flat)
        self.log_std = nn.Parameter(torch.tensor(-1.0)) if components is None else None
        ends = torch.linspace(-1, 1, self.components) if self.components > 1 else torch.zeros(1)
        self.register_buffer("start", ends.reshape(-1, *(1,) * len(self.shape)))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """c and s of q(z | x), (B, *latent) each."""
        out = self.encoder(self.seen(x).to(next(self.parameters()).dtype))
        if self.std is not None:
            return out, torch.full_like(out, self.std)
        c, log_s = out.chunk(2, 1)
        return c, torch.exp(log_s.clamp(_NARROW, _WIDE))

    def law(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, means and deviations of p(x | z), (B, K, *shape) each."""
        out = self.decoder(z)
        if self.log_std is not None:
            mean = out.unsqueeze(1)
            std = torch.exp(self.log_std.clamp(_NARROW, _WIDE)).expand_as(mean)
            return torch.zeros_like(mean), mean, std
        parts = out.unflatten(1, (3, self.components, self.shape[0]))
        weight, mean, log_std = parts.unbind(1)
        std = torch.exp((log_std - 1).clamp(_NARROW, _WIDE))
        return torch.log_softmax(weight, 1), mean + self.start, std

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], (B, *shape); of quantised data the mean of the law cut off at -1 and 1."""
        weight, mean, std = self.law(z.to(next(self.parameters()).dtype))
        if self.levels is not None:
            mean = gaussians.clipped_mean(mean, std)
        return (weight.exp() * mean).sum(1).to(z.dtype)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) in nats, (B,)."""
        weight, mean, std = self.law(z)
        if self.levels is None:
            y = ((x.unsqueeze(1) - mean) / std) ** 2
            each = -0.5 * (y + math.log(2 * math.pi)) - torch.log(std)
        else:
            k = self.level_of(x).unsqueeze(1).expand_as(mean)
            each = gaussians.discretised(k, mean, std, self.levels)
        return sum_rest(torch.logsumexp(weight + each, 1))


def _places(shape: tuple[int, ...], latent: tuple[int, ...], patch: int) -> list[tuple[int, ...]]:
    """The sizes of each level, fine to coarse, the finest S / patch; [()] for vectors."""
    _, *rest = shape
    if patch > 1 and (not rest or any(size % patch for size in rest)):
        raise ValueError(f"each of the sizes {tuple(rest)} must be a multiple of patch = {patch}")
    places = [tuple(size // patch for size in rest)]
    if not rest:
        if len(latent) != 1:
            raise ValueError(f"latents of vectors {shape} must be (d,), got {latent}")
        return places
    if len(rest) > 3 or len(latent) not in (1, len(shape)):
        raise ValueError(
            f"shape must be (C, *S) with 1 to 3 sizes and latent (c, *S') or (d,); got {shape} and"
            f" {latent}"
        )
    flat, wanted = len(latent) == 1, latent[1:]

    def coarser() -> bool:
        return max(places[-1]) > _SMALLEST if flat else places[-1] != wanted

    while coarser():
        if not flat and any(s < w for s, w in zip(places[-1], wanted, strict=True)):
            halved = ", ".join(map(str, places[:-1]))
            raise ValueError(
                f"latent places {wanted} are none of {halved}, those of {shape} halved"
            )
        places.append(tuple(-(-s // 2) for s in places[-1]))
        if places[-1] == places[-2]:
            raise ValueError(f"latent places {wanted} are not those of {shape} halved")
    return places
