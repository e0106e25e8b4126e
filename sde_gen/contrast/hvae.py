"""The hierarchical VAE: the chain of the diffusion model, short, with an encoder that is learned.

The model goes down p(z_L) p(z_(L-1) | z_L) ... p(z_1 | z_2) p(x | z_1), all but the last normal
laws, p(z_L) = N(0, I). The encoder goes up once, x -> (c_1, s_1) -> ... -> (c_L, s_L), and then
down with the model: q(z_L | x) = N(c_L, s_L^2), and

    q(z_l | z_(l+1), x)  is  proportional to  exp[(1 + 1 / s_l^2) c_l z_l - z_l^2 / (2 s_l^2)]
                                              p(z_l | z_(l+1)),

a normal message of precision 1 / s_l^2 times what the model expects, as in the chain
q(x_(t-1) | x_t, x_0) is to q(x_t | x_(t-1)) q(x_(t-1) | x_0) (Sonderby et al. 2016, equations 8 to
12). Under N(0, I) its mean is c_l whatever s_l is: that of a message N(c_l, s_l^2) would be
c_l / (1 + s_l^2), where c_l is not felt once s_l is large, so that a latent that has fallen silent
stays silent. So all but one of the terms of

    -log p(x) <= E[-log p(x | z_1)] + sum_(l < L) E KL(q(z_l | z_(l+1), x) || p(z_l | z_(l+1)))
                 + KL(q(z_L | x) || N(0, I))

have closed forms, as L_0, L_(t-1) and L_T of the chain. What differs: here the encoder is learned,
each level has networks of its own, and there are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .. import gaussians
from ..networks import Codec
from ..networks.base import sizes
from ..networks.blocks import zeroed
from ..noise import Streams
from ..ops import check_count, check_kind, check_number
from ..training import register
from .base import Rival, perceptron

NARROW, WIDE = -5.0, 2.0
"""Bounds of the logarithms of the deviations of the levels."""


@register
class HVAE(Rival):
    """A codec, its latent z_1, and further levels z_2 .. z_L above it.

    Args:
        codec: between x and z_1: an ``Autoencoder`` whose encoder learns its deviation.
        above: numbers of z_2 .. z_L; two to four levels in all are usual.
        width, depth: hidden features and layers of the networks between the levels.
        classes: labels that p(z_l | z_(l+1), y) is told, l < L, or None.
        free: nats that each level may spend unpaid in training (Kingma et al. 2016, free bits; of
            the mean over a batch). The loss is the bound where it is 0.

    Raises:
        TypeError, ValueError: no codec; no level above it; sizes that are no counts; free < 0.

    >>> from sde_gen.networks import Autoencoder
    >>> hvae = HVAE(Autoencoder((2,), (4,), width=16), above=(4, 2), width=16)
    >>> rates, distortion = hvae.terms(torch.zeros(5, 2), noise=Streams(0))
    >>> rates.shape, distortion.shape, hvae.sample(3, seed=0).shape
    (torch.Size([5, 3]), torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        codec: Codec,
        above: Sequence[int] = (16, 8),
        width: int = 128,
        depth: int = 2,
        classes: int | None = None,
        free: float = 0.0,
    ) -> None:
        check_kind(codec, Codec, "codec", "a Codec, such as Autoencoder((1, 8, 8), (16,))")
        above = sizes(above, "above")
        config = {
            "codec": codec,
            "above": above,
            "width": check_count(width, "width"),
            "depth": check_count(depth, "depth", 0),
            "classes": classes,
            "free": (free := check_number(free, "free", least=0)),
        }
        if not above:
            raise ValueError("above must hold a size or more, such as (8,); without it is a VAE")
        super().__init__(codec.shape, classes, config)
        self.codec, self.free, self.calls = codec, free, 1 + len(above)
        self.sizes = [math.prod(codec.latent), *above]
        told, pairs = self.classes or 0, list(pairwise(self.sizes))
        self.up = nn.ModuleList(perceptron(n, 2 * m, width, depth) for n, m in pairs)
        down = [perceptron(m + told, 2 * n, width, depth) for n, m in pairs]
        for net in down:  # at first every p(z_l | z_(l+1)) is N(0, I)
            zeroed(net[-1])
        self.down = nn.ModuleList(down)

    def draw(self, told: Tensor, noise: Streams) -> Tensor:
        """Down the levels, then E[x | z_1]."""
        z = self._normal(told, noise, len(self.sizes))
        for level in range(len(self.down), 0, -1):
            m, s = _split(self.down[level - 1](torch.cat([z, told], 1)))
            z = m + s * self._normal(told, noise, level)
        return self.codec.decode(z.reshape(-1, *self.codec.latent))

    def loss(self, x: Tensor, told: Tensor, noise: Streams) -> Tensor:
        """The bound, nats a dimension; a level below ``free`` costs that, and nothing more."""
        rates, distortion = self._terms(x, told, noise)
        rates = torch.where(rates.mean(0) > self.free, rates, self.free)
        return (rates.sum(1) + distortion) / math.prod(self.shape)

    def terms(
        self, x: Tensor, y: Tensor | None = None, *, noise: Streams
    ) -> tuple[Tensor, Tensor]:
        """The bound on -log p(x | y) by its terms, at one draw of the latents: nats.

        Returns:
            The rates of z_1 .. z_L (B, L), each a KL, and the distortion -log p(x | z_1) (B,).

        Raises:
            TypeError, ValueError: data or labels that are not the model's, noise that is none.
        """
        self.codec.check(x)
        check_kind(noise, Streams, "noise", "Streams(seed)")
        return self._terms(x, self.told(y, len(x)), noise)

    def _terms(self, x: Tensor, told: Tensor, noise: Streams) -> tuple[Tensor, Tensor]:
        seen = [tuple(v.flatten(1) for v in self.codec.posterior(x))]
        for net in self.up:
            seen.append(_split(net(seen[-1][0])))
        z = seen[-1][0]
        m, s, rates = torch.zeros_like(z), torch.ones_like(z), []
        for level in range(len(seen), 0, -1):
            c, r = seen[level - 1]
            if level < len(seen):
                m, s = _split(self.down[level - 1](torch.cat([z, told], 1)))
                c, r = _product(c, r, m, s)
            rates.append(gaussians.kl(c, r**2, m, s**2))
            z = c + r * self._normal(told, noise, level)
        distortion = -self.codec.log_likelihood(x, z.reshape(-1, *self.codec.latent))
        return torch.stack(rates[::-1], 1), distortion

    def _normal(self, told: Tensor, noise: Streams, level: int) -> Tensor:
        blank = told.new_empty(len(told), self.sizes[level - 1])
        return noise.normal(blank, f"level {level}")


def _product(c: Tensor, r: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of N(m, s^2) times the message of mean c under N(0, I) and precision
    1 / r^2."""
    v = 1 / (1 / r**2 + 1 / s**2)
    return v * ((1 + 1 / r**2) * c + m / s**2), v.sqrt()


def _split(out: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations."""
    m, log_s = out.chunk(2, 1)
    return m, torch.exp(log_s.clamp(NARROW, WIDE))
