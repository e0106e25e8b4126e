"""Where Gaussian increments come from.

A ``Noise`` answers one question: which standard normal drives sample i between the times t and s?
The answer is a pure function of (seed, sample, interval), computed by a counter-based generator
(Philox4x64-10, Salmon et al. 2011). Hence a sample does not depend on its batch, on chunks, on
the device or on who asked first, and no global generator is touched.

- ``Streams``: independent increments, one stream a sample.
- ``BrownianPath``: one Brownian path a sample, the same path however finely it is read.
- ``Impulses``: unit impulses, which turn a linear sampler into its exact transfer coefficients.
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .ops import as_integer, match

_LOW = 0xFFFFFFFF
_WORD = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_BUDGET = 1 << 22
"""Numbers that are drawn at once for a path."""
_HORIZON, _LOWEST = 2.0**127, -128
"""The end of a path, and the exponent below that of its first octave."""
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

Self = TypeVar("Self", bound="Noise")


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of the unsigned product of int64 tensors a and a constant m."""
    a_low, a_high = a & _LOW, (a >> 32) & _LOW
    m_low, m_high = m & _LOW, m >> 32
    low, mid, cross = a_low * m_low, a_high * m_low, a_low * m_high
    carry = ((low >> 32) & _LOW) + (mid & _LOW) + (cross & _LOW)
    high = a_high * m_high + ((mid >> 32) & _LOW) + ((cross >> 32) & _LOW) + (carry >> 32)
    return high, a * _signed(m)


def philox(
    counter: Tensor, key: tuple[int, int], rounds: int = 10, second: Tensor | None = None
) -> Tensor:
    """Philox4x64 on counters (n,) int64 -> words (n, 4) int64.

    ``counter`` is the low word of the counter, ``second`` (n,) the next; the others are 0.

    Integer tensor operations only: the same bits on every device, and one kernel under
    ``torch.compile``. Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as
    easy as 1, 2, 3".
    """
    c_0, c_2 = counter, torch.zeros_like(counter)
    c_1, c_3 = c_2 if second is None else second, c_2
    for r in range(rounds):
        k_0, k_1 = (_signed(k + r * w) for k, w in zip(key, _WEYL, strict=True))
        high_0, low_0 = _multiply(c_0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(c_2, _MULTIPLIERS[1])
        c_0, c_1, c_2, c_3 = high_1 ^ c_1 ^ k_0, low_1, high_0 ^ c_3 ^ k_1, low_0
    return torch.stack([c_0, c_1, c_2, c_3], -1)


def _philox_host(start: int, count: int, key: tuple[int, int], second: int = 0) -> Tensor:
    """The same words for the counters start .. start + count - 1, by numpy's C implementation."""
    # numpy advances the counter before it draws.
    before = (start - 1 + ((second & _WORD) << 64)) % (1 << 256)
    words = np.random.Philox(counter=before, key=key[0] | key[1] << 64).random_raw(4 * count)
    return torch.from_numpy(words.view(np.int64)).reshape(count, 4)


def philox_normal(
    seed: int, samples: Tensor | range, stream: int, size: int, name: int | Tensor = 0
) -> Tensor:
    """Standard normals (len(samples), size), float32, a function of (seed, sample, stream, name).

    Box-Muller on 31-bit uniforms: no value lies beyond 6.7 standard deviations. On a CPU a run of
    consecutive samples is one call of numpy's Philox; elsewhere tensors make the same bits.

    Args:
        seed, stream: the two 64-bit words of the key.
        samples: the samples' numbers, a range (CPU) or int64 (B,).
        size: how many numbers for each sample.
        name: the second word of the counter, for all samples or int64 (B,), one for each.
    """
    key = (seed & _WORD, stream & _WORD)
    blocks = -(-size // 8)
    if isinstance(name, int) and isinstance(samples, range):
        words = _philox_host(samples.start * blocks, len(samples) * blocks, key, name)
    elif isinstance(samples, range):
        raise TypeError("a name for each sample needs the samples as a tensor")
    elif isinstance(name, int) and on_host(samples.device):
        runs = [_philox_host(i * blocks, blocks, key, name) for i in samples.tolist()]
        words = torch.cat(runs) if runs else torch.empty(0, 4, dtype=torch.int64)
    else:
        counter = _counters(samples, blocks)
        second = torch.as_tensor(name, device=samples.device).expand(len(samples))
        words = philox(counter, key, second=second.repeat_interleave(blocks))
    halves = words.view(torch.int32).reshape(len(samples), 2, 4 * blocks)
    return _box_muller(halves[:, 0], halves[:, 1]).flatten(1)[:, :size]


def on_host(device: torch.device) -> bool:
    """Whether a question to a tensor costs no synchronisation, and no break of a graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


@torch.library.custom_op("sde_gen::counters", mutates_args=())
def _counters(samples: Tensor, blocks: int) -> Tensor:
    """The counters of the samples' blocks, (B,) -> (B * blocks,), as numbers in memory.

    Compilers keep such counts as a formula, which every round of Philox would write out twice
    again, 2^10 times in all. They do not look into this.
    """
    return (samples[:, None] * blocks + torch.arange(blocks, device=samples.device)).flatten()


@_counters.register_fake
def _(samples: Tensor, blocks: int) -> Tensor:
    return samples.new_empty(len(samples) * blocks)


def _box_muller(radius: Tensor, angle: Tensor) -> Tensor:
    """Two normals for each pair of 32-bit words: (B, n), (B, n) -> (B, 2, n)."""
    # Centred in their cells, the 31-bit uniforms stay positive: the logarithm is finite.
    u = (radius & 0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32)
    r = u.log_().mul_(-2.0).sqrt_()
    a = angle.float().mul_(2 * math.pi * 2.0**-32)
    return torch.stack([a.cos(), a.sin_()], 1).mul_(r.unsqueeze(1))


def _name(*parts: float) -> int:
    """A 64-bit name for a tuple of numbers, the same on every machine."""
    packed = struct.pack(f"<{len(parts)}d", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


# What torch.compiler.assume_constant_result sets; the decorator itself would import the compiler.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


_PATH = _name(0.0)
"""The stream of a path's normals, a name that no draw of ``Streams`` has."""


class Noise(ABC):
    """Standard normal increments, as a function of the sample and of the interval.

    ``batch``: the number of samples that it is for, None where any will do.
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


class _Numbered(Noise):
    """Noise of samples that are numbered: row b of the state is sample ``samples[b]``."""

    def __init__(self, seed: int = 0, samples: Tensor | int = 0) -> None:
        """Sample numbers, or the number of the first sample of the batch."""
        number = as_integer(seed)
        if number is None:
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.seed, self.samples = number, samples

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return len(self.samples) if isinstance(self.samples, Tensor) else None

    def _numbers(self, x: Tensor) -> Tensor | range:
        if isinstance(self.samples, Tensor):
            if len(self.samples) != len(x):
                raise ValueError(f"noise for {len(self.samples)} samples, state of {len(x)}")
            return self.samples.to(x.device)
        if on_host(x.device):
            return range(self.samples, self.samples + len(x))
        return torch.arange(self.samples, self.samples + len(x), device=x.device)

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
    """A Brownian path W on the half-line, read through its normalised increments.

    (W(s) - W(t)) / sqrt|s - t|. A virtual Brownian tree: W at a node is drawn from the bridge
    between its two neighbours, and W anywhere from the bridge in its leaf, always from the same
    normals, named by their time. So refining a grid refines the *same* path, whatever the order
    of the questions (Li et al. 2020, appendix E; here every leaf is an exact bridge).

    Intervals are cut at powers of two until they are one octave, then in half: no unit of time
    is preferred to another. A leaf is at most 2^-depth as long as its time is late. Times that
    share one are bridged independently of each other, so a step inside a leaf is refused, as are
    times outside [0, 2^127].
    """

    depth: int = 20

    def __init__(self, seed: int = 0, samples: Tensor | int = 0) -> None:
        super().__init__(seed, samples)
        self._path: list[tuple[float, float, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        if k:
            raise ValueError("a Brownian path drives one increment an interval (k = 0)")
        self.check_step(t, s)
        return (self.at(x, s) - self.at(x, t)) / math.copysign(math.sqrt(abs(s - t)), s - t)

    @property
    def resolution(self) -> float:
        """What is longer than every leaf, relative to the time."""
        return 2.0 ** (1 - self.depth)

    def check_step(self, t: float, s: float) -> None:
        """Raise ``ValueError`` for a step that may lie inside of a leaf."""
        if abs(s - t) < self.resolution * max(t, s):
            raise ValueError(
                f"a Brownian path cannot be read in steps as short as from {t} to {s}: it"
                f" resolves {self.resolution:.1g} of the time"
            )

    def at(self, x: Tensor, t: float | Tensor) -> Tensor:
        """W(t), shaped like x, with W(0) = 0; t a number, or float64 (B,), a time a sample."""
        y = x.float() if x.dtype.itemsize < 4 else x
        return (self._at_each(y, t) if isinstance(t, Tensor) else self._at(y, t)).to(x.dtype)

    def _at(self, x: Tensor, t: float) -> Tensor:
        self._check(t, t)
        a, b, w_a, w_b = self._descend(x, t)[-1]
        if t in (a, b):
            return w_a if t == a else w_b
        return _bridge(a, b, w_a, w_b, t, self._node(x, t))

    def _check(self, low: float, high: float) -> None:
        if not 0 <= low <= high <= _HORIZON:
            raise ValueError(f"the path lives on [0, 2^127], asked at {low} .. {high}")

    def _node(self, x: Tensor, t: float) -> Tensor:
        name = int.from_bytes(struct.pack("<d", t), "little", signed=True)
        z = philox_normal(self.seed, self._numbers(x), _PATH, x[0].numel(), name)
        return z.reshape(x.shape).to(x.dtype)

    def _descend(self, x: Tensor, t: float) -> list[tuple[float, float, Tensor, Tensor]]:
        """The nested intervals around t; those of the last question are used again."""
        path = [c for c in self._path if c[0] <= t <= c[1] and c[2].shape == x.shape]
        if not path or path[0][2].dtype != x.dtype or path[0][2].device != x.device:
            end = math.sqrt(_HORIZON) * self._node(x, _HORIZON)
            path = [(0.0, _HORIZON, torch.zeros_like(x), end)]
        a, b, w_a, w_b = path[-1]
        while t not in (a, b) and b - a > b * 2.0**-self.depth:
            m = _middle(a, b)
            w_m = _bridge(a, b, w_a, w_b, m, self._node(x, m))
            a, b, w_a, w_b = (a, m, w_a, w_m) if t <= m else (m, b, w_m, w_b)
            path.append((a, b, w_a, w_b))
        self._path = path
        return path

    def _at_each(self, x: Tensor, t: Tensor) -> Tensor:
        """The same path at a time for each sample: all descend together, level by level."""
        self._check(float(t.min()), float(t.max()))
        start = torch.zeros_like(t), torch.full_like(t, _HORIZON)
        (a, b), times = start, [start[1]]
        while bool((open_ := (t > a) & (t < b) & (b - a > b * 2.0**-self.depth)).any()):
            # Where there is nothing left to cut, the right end is drawn again.
            times.append(torch.where(open_, _middle_each(a, b), b))
            a, b = _half(a, b, times[-1], t)
        normals = self._nodes(x, torch.stack([*times, t]))
        (a, b), w_a = start, torch.zeros_like(x)
        w_b = math.sqrt(_HORIZON) * next(normals)
        for m in times[1:]:
            w_m = _bridge(a, b, w_a, w_b, m, next(normals))
            a, b = _half(a, b, m, t)
            mask = (t <= m).to(x.device).reshape(-1, *(1,) * (x.ndim - 1))
            w_a, w_b = torch.where(mask, w_a, w_m), torch.where(mask, w_m, w_b)
        return _bridge(a, b, w_a, w_b, t, next(normals))

    def _nodes(self, x: Tensor, times: Tensor) -> Iterator[Tensor]:
        """The normals of nodes at the times (L, B), one row after the other."""
        samples, n = torch.as_tensor(self._numbers(x)).to(x.device), x[0].numel()
        for part in times.split(max(1, _BUDGET // x.numel())):
            names = part.view(torch.int64).flatten().to(x.device)
            z = philox_normal(self.seed, samples.repeat(len(part)), _PATH, n, names)
            yield from z.reshape(len(part), *x.shape).to(x.dtype)


def _middle(a: float, b: float) -> float:
    """Where [a, b] is cut: half way between its octaves, or in half where it is one."""
    first = math.frexp(a)[1] if a else _LOWEST
    apart = math.frexp(b)[1] - first
    return math.ldexp(0.5, first + apart // 2) if apart > 1 else (a + b) / 2


def _middle_each(a: Tensor, b: Tensor) -> Tensor:
    """The same for intervals (B,)."""
    first = torch.where(a > 0, torch.frexp(a).exponent, _LOWEST)
    apart = torch.frexp(b).exponent - first
    octave = torch.ldexp(torch.full_like(a, 0.5), first + apart // 2)
    return torch.where(apart > 1, octave, (a + b) / 2)


def _half(a: Tensor, b: Tensor, m: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    left = t <= m
    return torch.where(left, a, m), torch.where(left, m, b)


_T = TypeVar("_T", float, Tensor)


def _bridge(a: _T, b: _T, w_a: Tensor, w_b: Tensor, t: _T, z: Tensor) -> Tensor:
    """W(t) between W(a) and W(b) from the normal z; times are numbers or (B,)."""
    u = (t - a) / (b - a)
    spread = (t - a) * (1 - u)
    if isinstance(u, Tensor) and isinstance(spread, Tensor):
        return torch.lerp(w_a, w_b, match(u, z)) + match(spread.sqrt(), z) * z
    return torch.lerp(w_a, w_b, u) + math.sqrt(spread) * z


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
