"""Where Gaussian increments come from.

A ``Noise`` answers one question: which standard normal drives sample i between the times t and s?
The answer is a pure function of (seed, sample, interval), computed by a counter-based generator
(Philox4x32-10, Salmon et al. 2011) in integer tensor operations. Hence a sample does not depend on
its batch, on chunks, on the device or on who asked first, and no global generator is touched.

- ``Streams``: independent increments, one stream a sample.
- ``BrownianPath``: one Brownian path a sample, the same path however finely it is read.
- ``Impulses``: unit impulses, which turn a linear sampler into its exact transfer coefficients.
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_BLOCK = 1 << 15
"""Counters worked on at once on a CPU: the working set stays in the cache."""

Self = TypeVar("Self", bound="Noise")


def philox(counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Philox4x32: four 32-bit words of counter to four of output, as int64 tensors.

    Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(word)) for word in philox((zero,) * 4, (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # Products of 32-bit words fill 64 bits; only the low half of c1 and c3 is ever used,
        # so they are masked once, when they return to c0 and c2.
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = ((p1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1 & _MASK, c2, c3 & _MASK]


def philox_normal(seed: int, samples: Tensor, stream: int, size: int) -> Tensor:
    """Standard normals (len(samples), size), float32, a function of (seed, sample, stream).

    Box-Muller on 32-bit uniforms: no value lies beyond 6.7 standard deviations.

    Args:
        seed: 64-bit key.
        samples: int64 (B,), the samples' numbers.
        stream: 64-bit name of the draw.
        size: how many numbers for each sample.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    blocks = -(-size // 4)
    rows = max(1, _BLOCK // blocks) if samples.device.type == "cpu" else len(samples)
    index = torch.arange(blocks, device=samples.device)
    out = torch.empty(len(samples), 4, blocks, device=samples.device)
    for part, z in zip(samples.split(rows), out.split(rows), strict=True):
        c1 = part.unsqueeze(1) & _MASK
        c2, c3 = (torch.full_like(c1, w) for w in (stream & _MASK, (stream >> 32) & _MASK))
        w0, w1, w2, w3 = philox((index.unsqueeze(0), c1, c2, c3), key)
        z[:, 0], z[:, 1] = _box_muller(w0, w1)
        z[:, 2], z[:, 3] = _box_muller(w2, w3)
    return out.flatten(1)[:, :size]


def _box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    # u in (0, 1]: the logarithm stays finite. 2^-33 centres each uniform in its cell.
    radius = w0.float().mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    angle = w1.float().mul_(2 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _name(*parts: float) -> int:
    """A 64-bit name for a tuple of numbers, the same on every machine."""
    packed = struct.pack(f"<{len(parts)}d", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class Noise(ABC):
    """Standard normal increments, as a function of the sample and of the interval."""

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


class _Numbered(Noise):
    """Noise of samples that are numbered: row b of the state is sample ``samples[b]``."""

    def __init__(self, seed: int = 0, samples: Tensor | int = 0) -> None:
        """Sample numbers, or the number of the first sample of the batch."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {seed!r}")
        self.seed, self.samples = seed, samples

    def _numbers(self, x: Tensor) -> Tensor:
        if isinstance(self.samples, int):
            return torch.arange(self.samples, self.samples + len(x), device=x.device)
        if len(self.samples) != len(x):
            raise ValueError(f"noise for {len(self.samples)} samples, state of {len(x)}")
        return self.samples.to(x.device)

    def _normal(self, x: Tensor, *name: float) -> Tensor:
        z = philox_normal(self.seed, self._numbers(x), _name(*name), x[0].numel())
        return z.reshape(x.shape).to(x.dtype)

    def start(self, x: Tensor) -> Tensor:
        return self._normal(x, math.inf)

    def rows(self: _N, index: slice | Tensor) -> _N:
        if isinstance(self.samples, Tensor):
            return type(self)(self.seed, self.samples[index])
        if isinstance(index, Tensor):
            numbers = index.nonzero().flatten() if index.dtype == torch.bool else index
            return type(self)(self.seed, self.samples + numbers)
        if index.step not in (None, 1) or (index.start or 0) < 0:
            raise ValueError(f"rows must be a forward slice of step 1 or a tensor, got {index}")
        return type(self)(self.seed, self.samples + (index.start or 0))


_N = TypeVar("_N", bound="_Numbered")


class Streams(_Numbered):
    """Independent normals, named by (seed, sample, t, s, k).

    >>> z = Streams(seed=1)(torch.zeros(4, 3), 1.0, 0.5)
    >>> alone = Streams(seed=1, samples=2)(torch.zeros(1, 3), 1.0, 0.5)
    >>> bool((z[2] == alone[0]).all())
    True
    """

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        return self._normal(x, t, s, float(k))


class BrownianPath(_Numbered):
    """A Brownian path W on the line, read through its normalised increments.

    (W(s) - W(t)) / sqrt|s - t|. A virtual Brownian tree: W at a dyadic time is drawn from the
    bridge between its two neighbours, and W anywhere from the bridge in its leaf, always from
    the same named normals. So refining a grid refines the *same* path, whatever the order of the
    questions (Li et al. 2020, appendix E; here every leaf is an exact bridge).

    The path lives on [0, horizon]; times outside are an error. Times closer than
    horizon / 2^depth share a leaf and are bridged independently of each other.
    """

    horizon: float = 128.0
    depth: int = 24

    def __init__(self, seed: int = 0, samples: Tensor | int = 0) -> None:
        super().__init__(seed, samples)
        self._path: list[tuple[float, float, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        if k:
            raise ValueError("a Brownian path drives one increment an interval (k = 0)")
        return (self.at(x, s) - self.at(x, t)) / math.copysign(math.sqrt(abs(s - t)), s - t)

    def at(self, x: Tensor, t: float) -> Tensor:
        """W(t), shaped like x, with W(0) = 0."""
        if not 0 <= t <= self.horizon:
            raise ValueError(f"the path lives on [0, {self.horizon}], asked at {t}")
        path = self._descend(x, t)
        a, b, w_a, w_b = path[-1]
        if t in (a, b):
            return w_a if t == a else w_b
        return self._bridge(x, a, b, w_a, w_b, t)

    def _bridge(self, x: Tensor, a: float, b: float, w_a: Tensor, w_b: Tensor, t: float) -> Tensor:
        u = (t - a) / (b - a)
        return torch.lerp(w_a, w_b, u) + math.sqrt((t - a) * (1 - u)) * self._normal(x, t)

    def _descend(self, x: Tensor, t: float) -> list[tuple[float, float, Tensor, Tensor]]:
        """The nested dyadic intervals around t; those of the last question are used again."""
        path = [c for c in self._path if c[0] <= t <= c[1] and c[2].shape == x.shape]
        if not path or path[0][2].dtype != x.dtype or path[0][2].device != x.device:
            end = math.sqrt(self.horizon) * self._normal(x, self.horizon)
            path = [(0.0, self.horizon, torch.zeros_like(x), end)]
        while len(path) <= self.depth:
            a, b, w_a, w_b = path[-1]
            if t in (a, b):
                break
            m = (a + b) / 2
            w_m = self._bridge(x, a, b, w_a, w_b, m)
            path.append((a, m, w_a, w_m) if t <= m else (m, b, w_m, w_b))
        self._path = path
        return path


class Impulses(Noise):
    """Unit impulses: row j of the batch gets z = 1 in draw j and 0 in all others.

    Every solver is an affine map of its draws when drift is affine in x. Started from zeros with
    one row a draw (and one row more, which gets none), one deterministic solve gives the
    coefficient of each draw, hence the exact mean and variance of the output.
    """

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        if self.draws >= len(x):
            raise ValueError(f"more draws than rows: {len(x)} rows were given")
        z = torch.zeros_like(x)
        z[self.draws] = 1.0
        self.draws += 1
        return z

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def rows(self, index: slice | Tensor) -> Impulses:
        raise TypeError("impulses number the draws by the rows of one batch; do not chunk it")
