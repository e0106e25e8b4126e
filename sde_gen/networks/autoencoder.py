"""Autoencoders: an encoder with noise, a decoder with a likelihood, and what both cost in nats.

With q(z | x) = N(c(x), diag s(x)^2) and any law p(z) of the latents

    -log p(x) <= E_q[-log p(x | z)] + KL(q(z | x) || p(z)) = distortion + rate

(Kingma & Welling 2014). Both are in nats of one and the same message, so no weight stands between
them: the decoder has a likelihood with a deviation that is learned, and the distortion of levels is
minus the log of probabilities that sum to 1. Under p(z) = N(0, I) the rate has a closed form, and
this is the VAE. With s a fixed number (``std``) the encoder is deterministic, and it is the noise
that says how many bits a latent holds.

    ``Autoencoder``  convolutions for (C, *S), a perceptron for (n,)
    ``Pair``         an encoder and a decoder from elsewhere
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import gaussians
from ..levels import centre, quantise
from ..noise import Source, normal_like
from ..ops import batch_of, check_count, check_number, check_tensor, sum_rest
from .base import sizes
from .blocks import Space, convolution, group_norm, zeroed

_NARROW, _WIDE = -6.0, 2.0
"""Bounds of the logarithms of deviations: e^-6 is a third of a cell of 256 levels."""
_SMALLEST = 8
"""The largest side at which images become flat latents."""


class Cost(NamedTuple):
    """What a message costs: rate (B,) and distortion (B,), of n ``dimensions``.

    >>> cost = Cost(torch.tensor([math.log(2)]), torch.tensor([3 * math.log(2)]), 2)
    >>> cost.bits_per_dim.total
    tensor([2.])
    """

    rate: Tensor
    distortion: Tensor
    dimensions: int

    @property
    def total(self) -> Tensor:
        """Rate and distortion, a bound on -log p(x)."""
        return self.rate + self.distortion

    @property
    def bits_per_dim(self) -> Cost:
        """Both in bits a dimension of the data, where they were in nats."""
        unit = self.dimensions * math.log(2)
        return Cost(self.rate / unit, self.distortion / unit, self.dimensions)


class Codec(nn.Module, ABC):
    """An encoder q(z | x) = N(c(x), diag s(x)^2) and a decoder p(x | z).

    Attributes:
        shape, latent: of one datum and of one latent.
        levels: the number of levels of quantised data on [-1, 1]; None where p(x | z) is a density.
        std: the deviation of the encoder's noise where it is one number; None where it is s(x).

    A subclass defines ``posterior``, ``decode`` and ``log_likelihood``.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: Sequence[int],
        levels: int | None = None,
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.latent = tuple(sizes(shape, "shape")), tuple(sizes(latent, "latent"))
        if not self.shape or not self.latent:
            raise ValueError("shape and latent must hold one or more sizes, got none")
        self.levels = None if levels is None else check_count(levels, "levels", 2)
        self.std = None if std is None else check_number(std, "std", above=0)

    @abstractmethod
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean c and deviation s > 0 of q(z | x), (B, *shape) -> (B, *latent) each."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], (B, *latent) -> (B, *shape)."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) in nats, (B,): of levels a probability, else a density."""

    def encode(self, x: Tensor) -> Tensor:
        """c(x), the mean of q(z | x): (B, *shape) -> (B, *latent)."""
        return self.posterior(x)[0]

    def draw(self, x: Tensor, noise: Source = None) -> Tensor:
        """z ~ q(z | x), (B, *latent): c + s e, e drawn from ``noise``, through which gradients go
        to both."""
        c, s = self.posterior(x)
        return c + s * normal_like(c, noise, "encoder")

    def cost(self, x: Tensor, noise: Source = None) -> Cost:
        """Rate under p(z) = N(0, I), exact, and distortion at one draw of z, in nats.

        Args:
            x: data (B, *shape), floats; of quantised data also levels, integers 0 .. L - 1.
            noise: what z is drawn by: a generator, numbered streams, or torch's own generator.

        Raises:
            TypeError, ValueError: data of another shape, or integers where no levels are known.
        """
        self.check(x)
        c, s = self.posterior(x)
        zero = torch.zeros_like(c)
        rate = gaussians.kl(c, s**2, zero, zero + 1)
        z = c + s * normal_like(c, noise, "encoder")
        return Cost(rate, -self.log_likelihood(x, z), math.prod(self.shape))

    def check(self, x: Tensor) -> None:
        """Raise unless x is (B, *shape), floats, or levels where there are such."""
        check_tensor(x, "x")
        if x.is_complex() or not (x.is_floating_point() or self.levels):
            raise TypeError(f"x must be floating, got {x.dtype}: levels need Autoencoder(levels=)")
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must be {batch_of(self.shape)}, got {tuple(x.shape)}")

    def seen(self, x: Tensor) -> Tensor:
        """Data as the encoder sees them: levels at the centres of their cells."""
        if x.is_floating_point() or self.levels is None:
            return x
        return centre(x, self.levels)

    def level_of(self, x: Tensor) -> Tensor:
        """The levels of data, int64."""
        assert self.levels is not None
        return quantise(x, self.levels) if x.is_floating_point() else x.long()


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
    one level, for vectors."""

    widths: list[int]
    places: list[tuple[int, ...]]
    blocks: int
    dropout: float

    @property
    def space(self) -> Space | None:
        """Of the convolutions."""
        return Space(len(self.places[0])) if self.places[0] else None

    def level(self, width: int) -> list[nn.Module]:
        """The blocks of a level."""
        return [Residual(width, self.space, self.dropout) for _ in range(self.blocks)]

    def down(self, n_in: int, n_out: int, flat: bool) -> nn.Sequential:
        """(B, n_in, *S) -> (B, n_out, *S'), or (B, n_out) where the latent is flat."""
        layers: list[nn.Module] = [_maker(self.space)(n_in, n := self.widths[0])]
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
        n, layers = self.widths[-1], []
        if flat and self.space:
            layers += [nn.Linear(n_in, n * math.prod(self.places[-1]))]
            layers.append(nn.Unflatten(1, (n, *self.places[-1])))
        else:
            layers.append(_maker(self.space)(n_in, n))
        for i, width in reversed([*enumerate(self.widths)]):
            if i < len(self.widths) - 1 and self.space:
                layers += [nn.Upsample(self.places[i]), convolution(self.space, n, width)]
            layers += self.level(n := width)
        layers += [_norm(n, self.space), nn.SiLU(), _maker(self.space)(n, n_out)]
        return nn.Sequential(*layers)


class Autoencoder(Codec):
    """A VAE of data (B, *shape), latents (B, *latent): convolutional for (C, *S), dense for (n,).

    p(x | z) is a mixture of K normal laws in each coordinate, all 3 K numbers by the decoder; or
    one normal law with a deviation that all coordinates share and that is learned as a parameter
    (Rybkin et al. 2021, sigma-VAE). Of quantised data it is read on the cells of the levels, the
    outer of which reach to infinity, so that the probabilities sum to 1.

    Args:
        shape: of one datum: (n,), or (C, *S) with one to three sizes.
        latent: of one latent: (d,), or (c, *S') with S' the sizes S halved, rounding up, once or
            more: the shape says how many levels there are.
        width: features at full resolution, twice as many on coarser levels; of a dense network
            in every layer.
        blocks: residual blocks a level.
        std: the deviation of the encoder's noise, one number; None learns s(x).
        levels: L of quantised data on [-1, 1]; None takes p(x | z) for a density.
        components: K; None is one normal law with a common deviation. Of data without levels take
            that: a deviation of each coordinate falls to nothing where one is constant.
        dropout: probability of dropout inside each residual block.

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
        }
        places = _places(self.shape, self.latent)
        widths = [width, *[2 * width] * (len(places) - 1)]
        ladder, flat = Ladder(widths, places, blocks, dropout), len(self.latent) == 1
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


def _places(shape: tuple[int, ...], latent: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes S of each level, fine to coarse; [()] for vectors."""
    _, *rest = shape
    places = [tuple(rest)]
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


class Pair(Codec):
    """An encoder and a decoder from elsewhere, as a ``Codec``.

    p(x | z) = N(decode(z), r^2 I), r one number that is learned (``log_std``), read on cells where
    the data have levels.

    Args:
        encoder: x (B, *shape) -> c (B, *latent), or (c, s); or a module whose ``encode`` does so,
            or gives a ``latent_dist`` with ``mean`` and ``std`` (diffusers' ``AutoencoderKL``).
        decoder: z -> x, or what has a ``sample`` of that; None asks ``encoder.decode``.
        shape, latent, levels: as in ``Codec``.
        std: of the noise that is added to c; None takes the encoder's s, which it then must give.

    Raises:
        TypeError: neither functions nor modules with ``encode`` and ``decode``.
        ValueError: when called: a result of another shape; no s and no ``std``.

    >>> half = Pair(lambda x: x[:, :1], lambda z: z.repeat(1, 2), (2,), (1,), std=0.1)
    >>> half.decode(half.encode(torch.ones(1, 2)))
    tensor([[1., 1.]])
    """

    def __init__(
        self,
        encoder: nn.Module | Callable[..., Any],
        decoder: nn.Module | Callable[..., Any] | None = None,
        shape: Sequence[int] = (),
        latent: Sequence[int] = (),
        std: float | None = None,
        levels: int | None = None,
    ) -> None:
        super().__init__(shape, latent, levels, std)
        back = encoder if decoder is None else decoder
        self._to, self._back = getattr(encoder, "encode", encoder), getattr(back, "decode", back)
        if not (callable(self._to) and callable(self._back)):
            raise TypeError(
                "encoder and decoder must be functions, or modules with encode and decode; got"
                f" {type(encoder).__name__} and {type(back).__name__}"
            )
        # Modules are registered, so that they move, train and are saved with this one.
        self.encoder, self.decoder = encoder, decoder
        self.log_std = nn.Parameter(torch.tensor(-1.0))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """c and s of q(z | x), (B, *latent) each."""
        found = self._to(self.seen(x))
        if hasattr(found, "latent_dist"):
            found = (found.latent_dist.mean, found.latent_dist.std)
        c, s = found if isinstance(found, tuple) else (found, None)
        if self.std is not None:
            s = torch.full_like(c, self.std)
        if s is None:
            raise ValueError("the encoder gives no deviation of its own: Pair(..., std=0.1)")
        if tuple(c.shape[1:]) != self.latent or s.shape != c.shape:
            raise ValueError(
                f"the encoder must return {batch_of(self.latent)}, got {tuple(c.shape)} and"
                f" {tuple(s.shape)}"
            )
        return c, s

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], (B, *shape)."""
        x = self._back(z)
        x = getattr(x, "sample", x) if not isinstance(x, Tensor) else x
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"the decoder must return {batch_of(self.shape)}, got {tuple(x.shape)}"
            )
        return cast(Tensor, x)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) in nats, (B,)."""
        mean = self.decode(z)
        std = torch.exp(self.log_std).to(mean).expand_as(mean)
        if self.levels is None:
            return gaussians.log_density(x, mean, std)
        return sum_rest(gaussians.discretised(self.level_of(x), mean, std, self.levels))
