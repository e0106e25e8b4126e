"""Normals and uniform numbers of numbered samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TypeVar, Union

import torch
from torch import Tensor

from ..ops import as_device, as_integer, check_count, check_kind, check_state, on_host, shown
from .philox import hashed, name_of, philox_normal, philox_words, signed, size_of

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / phi, phi the golden ratio."""

Self = TypeVar("Self", bound="Noise")
Source = Union[torch.Generator, "Streams", None]
"""Where random numbers come from: a generator, numbered streams, or torch's own generator."""


def normal_like(x: Tensor, source: Source, name: str) -> Tensor:
    """Standard normals of the shape, dtype and device of x; streams draw them by ``name``.

    >>> sg.noise.normal_like(torch.zeros(8, 2), sg.Streams(0), "noise").shape
    torch.Size([8, 2])
    """
    if isinstance(source, Streams):
        return source.normal(x, name)
    if source is not None:
        check_kind(source, torch.Generator, "noise", "a torch.Generator, Streams or None")
    return torch.randn(x.shape, generator=source, dtype=x.dtype, device=x.device)


class Noise(ABC):
    """Standard normal increments, as a function of the sample and of the interval.

    ``batch``: the number of samples that it is for, None where any will do.

    >>> x = torch.zeros(8, 2)
    >>> torch.equal(sg.Streams(0)(x, 1.0, 0.5)[3:5], sg.Streams(0, 3)(x[:2], 1.0, 0.5))
    True
    """

    batch: int | None = None

    @abstractmethod
    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        """The normal that drives the step from t to s, shaped like x; ``k`` numbers the draws
        of one step, for solvers that need several."""

    @abstractmethod
    def start(self, x: Tensor) -> Tensor:
        """The normal that the starting state is made of, shaped like x."""

    @abstractmethod
    def rows(self: Self, index: slice | Tensor) -> Self:
        """The same noise for a selection of the batch."""


class Numbered(Noise):
    """Noise of samples that are numbered: row b of the state is sample ``samples[b]``."""

    def __init__(self, seed: int = 0, samples: Tensor | int = 0) -> None:
        """Sample numbers, or the number of the first sample of the batch."""
        number = as_integer(seed)
        if number is None:
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.seed, self.samples = number, _numbers(samples)

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        """As many as there are sample numbers, None where they count on from the first."""
        return len(self.samples) if isinstance(self.samples, Tensor) else None

    def numbers(self, x: Tensor) -> Tensor | range:
        """The number of each sample of the state x (B, *D)."""
        if isinstance(self.samples, Tensor):
            if len(self.samples) != len(x):
                raise ValueError(f"noise for {len(self.samples)} samples, state of {len(x)}")
            return self.samples.to(x.device)
        if on_host(x.device):
            return range(self.samples, self.samples + len(x))
        return torch.arange(self.samples, self.samples + len(x), device=x.device)

    def _normal(self, x: Tensor, *name: float) -> Tensor:
        check_state(x)
        z = philox_normal(self.seed, self.numbers(x), name_of(*name), x[0].numel())
        return z.reshape(x.shape).to(x.dtype)

    def start(self, x: Tensor) -> Tensor:
        """Normals of a name of their own, like x."""
        return self._normal(x, math.inf)

    def rows(self: _N, index: slice | Tensor) -> _N:
        """The same samples, by their numbers."""
        if isinstance(self.samples, Tensor):
            return type(self)(self.seed, self.samples[index])
        if isinstance(index, Tensor):
            numbers = index.nonzero().flatten() if index.dtype == torch.bool else index
            return type(self)(self.seed, self.samples + numbers)
        if index.step not in (None, 1) or (index.start or 0) < 0:
            raise ValueError(f"rows must be a forward slice of step 1 or a tensor, got {index}")
        return type(self)(self.seed, self.samples + (index.start or 0))


_N = TypeVar("_N", bound="Numbered")


def _numbers(samples: Tensor | int) -> Tensor | int:
    if isinstance(samples, Tensor) and samples.ndim == 1:
        if samples.is_floating_point() or samples.is_complex() or samples.dtype == torch.bool:
            raise TypeError(f"samples must be integers, got {samples.dtype}")
        return samples
    number = as_integer(samples)
    if number is None:
        raise TypeError(f"samples must be an integer, or (B,) of them, got {shown(samples)}")
    return number


class Streams(Numbered):
    """Independent normals, named by (seed, sample, t, s, k).

    >>> z = Streams(seed=1)(torch.zeros(4, 3), 1.0, 0.5)
    >>> alone = Streams(seed=1, samples=2)(torch.zeros(1, 3), 1.0, 0.5)
    >>> bool((z[2] == alone[0]).all())
    True
    """

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        """A normal for (seed, sample, t, s, k), shaped like x."""
        return self._normal(x, t, s, k)

    def normal(self, x: Tensor, name: str) -> Tensor:
        """Normals shaped like x, a function of (seed, sample, name)."""
        z = philox_normal(self.seed, self.numbers(x), hashed(name.encode()), size_of(x))
        return z.reshape(x.shape).to(x.dtype)

    def uniform(self, x: Tensor, name: str) -> Tensor:
        """Uniform numbers in [0, 1) shaped like x (B, *D), a function of (seed, sample, name);
        float32 on a grid of 2^-24 unless x is float64, whose grid is 2^-53."""
        size, wide = size_of(x), x.dtype == torch.float64
        words = philox_words(self.seed, self.numbers(x), hashed(name.encode()), size)
        u = (words >> (11 if wide else 40)) & (2 ** (53 if wide else 24) - 1)
        u = u.to(torch.float64 if wide else torch.float32) * 2.0 ** (-53 if wide else -24)
        return u.reshape(x.shape)

    def spread(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """One uniform number u_m in [0, 1) for each of n samples, float64 (n,), spread evenly.

        u_m = (u + m / phi) mod 1 with the golden ratio phi and one u of the seed. Each is
        uniform, and those of any n consecutive samples cut [0, 1) into parts of at most three
        lengths (Steinhaus): a batch is stratified, whatever its size, its place in the run and
        the number of processes that share it.

        >>> u = Streams(3, 1000).spread(8).sort().values
        >>> bool((u.diff() < 0.25).all())
        True
        """
        blank = torch.empty(check_count(n, "n"), device=as_device(device))
        m = torch.as_tensor(self.numbers(blank))
        u = philox_words(self.seed, range(1), hashed(b"spread"), 1)
        # In integers modulo 2^64: no digit is lost, however long the run.
        turns = m * signed(_GOLDEN) + u.to(m.device).flatten()
        # MPS has no float64: there the clock runs on the host.
        turns = turns.cpu() if turns.device.type == "mps" else turns
        return ((turns >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


class Scaled(Noise):
    """Another noise times a number: what drives a reversal at another temperature.

    >>> x, noise = torch.zeros(8, 2), sg.Streams(0)
    >>> torch.equal(sg.noise.Scaled(noise, 2.0)(x, 1.0, 0.5), 2 * noise(x, 1.0, 0.5))
    True
    """

    def __init__(self, noise: Noise, factor: float) -> None:
        self.noise, self.factor, self.batch = noise, factor, noise.batch

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        """factor times that of the noise."""
        return self.factor * self.noise(x, t, s, k)

    def start(self, x: Tensor) -> Tensor:
        """factor times that of the noise."""
        return self.factor * self.noise.start(x)

    def rows(self, index: slice | Tensor) -> Scaled:
        """The same for a selection of the batch."""
        return Scaled(self.noise.rows(index), self.factor)


class Impulses(Noise):
    """Unit impulses: row j of the batch gets z = 1 in draw j and 0 in all others.

    Every solver is an affine map of its draws when drift is affine in x. Started from zeros with
    one row a draw (and one row more, which gets none), one deterministic solve gives the
    coefficient of each draw, hence the exact mean and variance of the output.

    >>> sg.Impulses()(torch.zeros(3, 1), 1.0, 0.5).flatten()
    tensor([1., 0., 0.])
    """

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        """1 in the next row, 0 in the others."""
        if self.draws >= len(x):
            raise ValueError(f"more draws than rows: {len(x)} rows were given")
        z = torch.zeros_like(x)
        z[self.draws] = 1.0
        self.draws += 1
        return z

    def start(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)

    def rows(self, index: slice | Tensor) -> Impulses:
        """Refused: TypeError."""
        raise TypeError("impulses number the draws by the rows of one batch; do not chunk it")
