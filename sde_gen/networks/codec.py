"""What an autoencoder is to others: noise on a latent, a likelihood of the data, and what both
cost.

With q(z | x) = N(c(x), diag s(x)^2) and any law p(z) of the latents

    -log p(x) <= E_q[-log p(x | z)] + KL(q(z | x) || p(z)) = distortion + rate

(Kingma & Welling 2014). Both are in nats of one and the same message, so no weight stands between
them: the decoder has a likelihood with a deviation that is learned, and the distortion of levels
is minus the log of probabilities that sum to 1. Under p(z) = N(0, I) the rate has a closed form,
and this is the VAE. With s a fixed number (``std``) the encoder is deterministic, and it is the
noise that says how many bits a latent holds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import gaussians
from ..facts import Facts
from ..levels import centre, quantise
from ..noise import Source, normal_like
from ..ops import batch_of, check_count, check_number, check_tensor, sum_rest
from .base import sizes

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Cost(Generic[V]):
    """What messages cost: rate and distortion, (B,) each, of n ``dimensions``.

    Tensors, or estimates with error bars. ``total``, a bound on -log p(x), is their sum.

    >>> cost = Cost(torch.tensor([math.log(2)]), torch.tensor([3 * math.log(2)]), 2)
    >>> cost.bits_per_dim.total
    tensor([2.])
    """

    rate: V
    distortion: V
    dimensions: int
    total: V = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.total is None:
            object.__setattr__(self, "total", cast(Any, self.rate) + self.distortion)

    def map(self, f: Callable[[V], V]) -> Cost[V]:
        """f of each."""
        return Cost(f(self.rate), f(self.distortion), self.dimensions, f(self.total))

    @property
    def bits_per_dim(self) -> Cost[V]:
        """Each in bits a dimension of the data, where it was in nats."""
        unit = self.dimensions * math.log(2)
        return self.map(lambda nats: cast(V, cast(Any, nats) / unit))

    def mean(self) -> Cost[V]:
        """The means over the samples; of estimates with the error bar that the data add."""
        return self.map(lambda each: cast(V, cast(Any, each).mean()))


class Codec(nn.Module, ABC):
    """An encoder q(z | x) = N(c(x), diag s(x)^2) and a decoder p(x | z).

    Attributes:
        shape, latent: of one datum and of one latent.
        levels: how many levels quantised data on [-1, 1] have; None where p(x | z) is a density.
        std: the deviation of the encoder's noise where it is one number; None where it is s(x).

    A subclass defines ``posterior``, ``decode`` and ``log_likelihood``.

    >>> net: sg.networks.Codec = sg.networks.Autoencoder((1, 8, 8), (4, 2, 2), width=8)
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

    @property
    def facts(self) -> Facts:
        """Shape and levels of the data, for whoever reads them (the trainer)."""
        return Facts(self.shape, levels=self.levels)

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

    def cost(self, x: Tensor, noise: Source = None) -> Cost[Tensor]:
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
        if not len(x):
            raise ValueError(f"x is an empty batch: its shape is {tuple(x.shape)}")
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
        found = self._to(_as_weights(self.encoder, self.seen(x)))
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
        x = self._back(_as_weights(self.encoder if self.decoder is None else self.decoder, z))
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


def _as_weights(net: object, x: Tensor) -> Tensor:
    """In the dtype of the weights of a module; for a function as it is."""
    weight = next(net.parameters(), x) if isinstance(net, nn.Module) else x
    return x.to(weight.dtype) if x.is_floating_point() else x
