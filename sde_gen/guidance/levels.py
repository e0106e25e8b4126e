"""Weights that are functions of the noise level sigma / alpha.

What guidance does depends on how noisy a state is, not on what a process calls that time: far from
the data it moves the mean past what is meant, near them it changes little (Kynkaanniemi et al.
2024). A weight told by the level is the same for every process, clock and grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Time, as_time, check_callable, check_kind, on_host, set_number
from ..sdes import KernelSDE


@dataclass(frozen=True)
class AtLevel:
    """t -> f(sigma / alpha): a weight for ``Sum``, ``ClassifierFree`` and the rest.

    Args:
        sde: the process whose times are asked for.
        weight: f, from levels () or (B,) to a number or tensor; where alpha = 0 the level is 1e18,
            so that a quotient of levels is a number there.

    >>> from sde_gen import EDM
    >>> ramp = AtLevel(EDM(), lambda level: 2 * level / (1 + level))
    >>> float(ramp(1.0))
    1.0
    """

    sde: KernelSDE
    weight: Callable[[Tensor], Tensor | float]

    def __post_init__(self) -> None:
        check_kind(self.sde, KernelSDE, "sde", "a LinearSDE, such as VP()")
        check_callable(self.weight, "weight", "weight(level)")

    def __call__(self, t: Time) -> Tensor | float:
        """f of the level at t, () or (B,)."""
        return self.weight(level(self.sde, t).clamp_max(1e18))


@dataclass(frozen=True)
class Interval:
    """``weight`` where low < sigma / alpha <= high, and 0 elsewhere (Kynkaanniemi et al. 2024).

    Where all of a batch has one time, it is there the number 0, and what it multiplies is not
    evaluated. A solver of high order loses its order at the two ends, where its past values are
    those of another score.

    Args:
        sde: the process whose times are asked for.
        low, high: levels; infinity is no end.
        weight: a number.

    Raises:
        ValueError: not 0 <= low < high.

    >>> from sde_gen import VP
    >>> middle = Interval(VP(), 0.2, 3.0, weight=1.5)
    >>> [middle(t) for t in (0.02, 0.3, 0.9)]
    [0.0, 1.5, 0.0]
    >>> float(VP().time_at(-2 * math.log(3.0))) == middle.times[1]
    True
    """

    sde: KernelSDE
    low: float = 0.0
    high: float = math.inf
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_kind(self.sde, KernelSDE, "sde", "a LinearSDE, such as VP()")
        set_number(self, "low", least=0)
        set_number(self, "high", above=self.low, infinite=True)
        set_number(self, "weight")

    def __call__(self, t: Time) -> Tensor | float:
        """The weight at t: a number for one time on the host, else of the shape of t."""
        s = level(self.sde, t)
        inside = (self.low < s) & (s <= self.high)
        if s.ndim == 0 and on_host(s.device):
            return self.weight if bool(inside) else 0.0
        return self.weight * inside

    @property
    def times(self) -> tuple[float, float]:
        """Where it begins and ends: to cut a run there, or to put nodes of a grid."""
        low, high = (self._time(level) for level in (self.low, self.high))
        return low, high

    def _time(self, level: float) -> float:
        if not 0 < level < math.inf:
            return 0.0 if level == 0 else self.sde.T
        return float(self.sde.time_at(-2 * math.log(level)))


def level(sde: KernelSDE, t: Time) -> Tensor:
    """sigma / alpha at t, of its shape; for a matrix process exp(-log_snr / 2)."""
    return torch.exp(-0.5 * sde.log_snr(as_time(t)))
