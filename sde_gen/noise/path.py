"""One Brownian path a sample, the same path however finely it is read."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..ops import match
from .philox import name_of, philox_normal
from .streams import Numbered

_BUDGET = 1 << 22
"""Numbers that are drawn at once for a path."""
_HORIZON, _LOWEST = 2.0**127, -128
"""The end of a path, and the exponent below that of its first octave."""
_PATH = name_of(0.0)
"""The stream of a path's normals, a name that no draw of ``Streams`` has."""


class BrownianPath(Numbered):
    """A Brownian path W on the half-line, read through its normalised increments.

    (W(s) - W(t)) / sqrt|s - t|. A virtual Brownian tree: W at a node is drawn from the bridge
    between its two neighbours, and W anywhere from the bridge in its leaf, always from the same
    normals, named by their time. So refining a grid refines the *same* path, whatever the order
    of the questions (Li et al. 2020, appendix E; here every leaf is an exact bridge).

    Intervals are cut at powers of two until they are one octave, then in half: no unit of time
    is preferred to another. A leaf is at most 2^-depth as long as its time is late. Times that
    share one are bridged independently of each other, so a step inside a leaf is refused, as are
    times outside [0, 2^127].

    >>> path, x = sg.BrownianPath(0), torch.zeros(8, 2)
    >>> path(x, 0.0, 1.0).shape
    torch.Size([8, 2])
    """

    depth: int = 20

    def __init__(self, seed: int = 0, samples: Tensor | int = 0) -> None:
        super().__init__(seed, samples)
        self._path: list[tuple[float, float, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        """(W_s - W_t) / sqrt(|s - t|), with the sign of s - t; k is 0."""
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
        z = philox_normal(self.seed, self.numbers(x), _PATH, x[0].numel(), name)
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
        samples, n = torch.as_tensor(self.numbers(x)).to(x.device), x[0].numel()
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
