"""Time grids: 1-D float64 tensors of times, falling from the noise to the data.

A grid is measured in the noise-to-signal ratio sigma / alpha, which every linear process has
(with matrices it is that of the data's statistic), so the same grid serves every clock. Grids
start at T, or earlier where long before it nothing is left of the data (``default_start``); they
stop at a small positive time (``end``, by default where sigma / alpha = 0.005) and, with
``to_zero=True``, take one last step from there to t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .moments import Moments, isotropic
from .ops import as_real, bisect, check_count, check_finite, check_kind, check_number
from .sdes import SDE, KernelSDE

__all__ = [
    "Density",
    "default",
    "default_end",
    "default_start",
    "from_table",
    "information",
    "karras",
    "log_snr",
    "quadratic",
    "uniform",
]

_END_RATIO = 0.005
_SIGNAL = 1e-4
_NO_SIGNAL = 1e3
"""The ratio that a grid is spaced from where the process starts with none of the data left."""
_NOISE = 30.0
"""Where the noise is so many times as wide as the data a state tells nothing of them."""
_POWER = 2.35
"""Of the default grid."""


def as_times(times: Tensor | Sequence[float]) -> Tensor:
    """A grid as float64 (N + 1,) on the CPU; raises for what is no grid, or not finite."""
    grid = as_real(times, "times").cpu()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"times must be a 1-D grid of two or more, got shape {(*grid.shape,)}")
    check_finite(grid, "times")
    return grid


def default_end(sde: SDE) -> float:
    """Where a grid stops by default: sigma / alpha = 0.005, or T / 1000 without a kernel.

    >>> round(sg.grids.default_end(sg.EDM()), 4)
    0.005
    """
    check_kind(sde, SDE, "sde", "an SDE, such as VP()")
    if isinstance(sde, KernelSDE):
        return float(sde.time_at(-2 * math.log(_END_RATIO)))
    return sde.T / 1000


def default_start(sde: SDE) -> float:
    """Where a grid starts by default: T, or the time when a process that has come to rest, with
    1e-4 of the noise left as signal, did so (there are clocks that go on to 1e-500).

    >>> sg.grids.default_start(sg.VP())
    1.0
    """
    if not isinstance(sde, KernelSDE) or float(sde.log_snr(sde.T)) > 2 * math.log(_SIGNAL):
        return sde.T
    t = float(sde.time_at(2 * math.log(_SIGNAL)))
    now, then = sde.sigma(t), sde.sigma(sde.T)
    return t if torch.allclose(now, then, rtol=1e-6, atol=1e-6 * float(then.max())) else sde.T


def _limits(
    sde: SDE, steps: int, start: float | None, end: float | None, to_zero: bool
) -> tuple[float, float, int]:
    steps = check_count(steps, "steps", 1 + to_zero)
    check_kind(sde, SDE, "sde", "an SDE, such as VP()")
    start = default_start(sde) if start is None else start
    start = check_number(start, "start", above=0, most=sde.T)
    end = check_number(default_end(sde) if end is None else end, "end", least=0, below=start)
    return start, end, steps - to_zero


def _finish(times: Tensor, start: float, end: float, to_zero: bool) -> Tensor:
    # The ends exactly as asked: a round trip through the clock may be off by a rounding error.
    times[0], times[-1] = start, end
    return torch.cat([times, times.new_zeros(1)]) if to_zero else times


def _ratio(sde: SDE, t: float) -> float:
    if not isinstance(sde, KernelSDE):
        raise TypeError(
            f"sde must be a LinearSDE or MatrixSDE here, which has a noise level, got {sde!r}"
        )
    if t <= 0:
        raise ValueError("this grid cannot end at t = 0, where the log noise level is infinite")
    # Ratios that float64 cannot hold are beyond all that a grid resolves.
    return math.exp(min(-0.5 * float(sde.log_snr(t)), 300.0))


def uniform(
    sde: SDE,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    power: float = 1.0,
    to_zero: bool = False,
) -> Tensor:
    """Even in t^(1 / power): steps + 1 times from ``start`` (T) to ``end``.

    >>> from sde_gen.sdes import Wiener
    >>> uniform(Wiener(), 4, end=0.0)
    tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    start, end, n = _limits(sde, steps, start, end, to_zero)
    power = check_number(power, "power", above=0)
    u = torch.linspace(start ** (1 / power), end ** (1 / power), n + 1, dtype=torch.float64)
    return _finish(u**power, start, end, to_zero)


def _even(
    sde: KernelSDE,
    steps: int,
    start: float | None,
    end: float | None,
    to_zero: bool,
    forward: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
) -> Tensor:
    """Even in ``forward`` of the noise-to-signal ratio; ``inverse`` leads back to ratios."""
    start, end, n = _limits(sde, steps, start, end, to_zero)
    a, b = forward(_ends(sde, start, end)).tolist()
    ratios = inverse(torch.linspace(a, b, n + 1, dtype=torch.float64))
    return _finish(sde.time_at(-2 * torch.log(ratios)), start, end, to_zero)


def log_snr(
    sde: KernelSDE,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    to_zero: bool = False,
) -> Tensor:
    """Even in the log signal-to-noise ratio (Lu et al. 2022).

    >>> sg.grids.log_snr(sg.EDM(), 2, start=10.0, end=0.1)
    tensor([10.0000,  1.0000,  0.1000], dtype=torch.float64)
    """
    return _even(sde, steps, start, end, to_zero, torch.log, torch.exp)


def karras(
    sde: KernelSDE,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    rho: float = 7.0,
    to_zero: bool = False,
) -> Tensor:
    """Even in (sigma / alpha)^(1 / rho) (Karras et al. 2022, equation 5).

    >>> sg.grids.karras(sg.EDM(), 2, start=80.0, end=0.002, to_zero=True).tolist()[-1]
    0.0
    """
    rho = check_number(rho, "rho", above=0)
    return _even(sde, steps, start, end, to_zero, lambda r: r ** (1 / rho), lambda u: u**rho)


def information(
    sde: KernelSDE,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    reference: float | Moments = 1.0,
    to_zero: bool = False,
) -> Tensor:
    """Even in log det(I + C / w), w = (sigma / alpha)^2: each step learns as much of the data.

    Of all grids of N steps this one makes the bound of a chain of fixed variance tightest on
    Gaussian data of covariance C = ``reference``, as N grows: a step whose information rises by
    log(1 + u) / 2 loses (u - log(1 + u)) / 2, a convex function of what it learns.

    >>> sg.grids.information(sg.VP(), 10, reference=0.25).shape
    torch.Size([11])
    """
    known = as_moments(reference)
    return _even(
        sde,
        steps,
        start,
        end,
        to_zero,
        lambda r: known.information(r**2),
        lambda i: torch.sqrt(noise_of(known, i)),
    )


def as_moments(reference: float | Moments) -> Moments:
    """A covariance: itself, or a variance > 0 in every direction."""
    if isinstance(reference, Moments):
        return reference
    return isotropic(check_number(reference, "reference", above=0))


def noise_of(known: Moments, information: Tensor) -> Tensor:
    """The noise variance w at which ``known.information(w)`` has these values."""
    if len(known.values) == 1:
        return known.values.to(information) / torch.expm1(2 * information)
    return torch.exp(bisect(lambda u: -known.information(u.exp()), -information, -700.0, 700.0))


_VP_LOW, _VP_SLOPE = 0.1, 19.9


def _vp_time(ratio: Tensor) -> Tensor:
    """The time that standard VP (linear beta 0.1 .. 20) needs to reach a noise-to-signal ratio."""
    b = torch.log1p(ratio**2)
    return 2 * b / (_VP_LOW + torch.sqrt(_VP_LOW**2 + 2 * _VP_SLOPE * b))


def _vp_ratio(u: Tensor) -> Tensor:
    return torch.sqrt(torch.expm1(_VP_LOW * u + _VP_SLOPE / 2 * u**2))


def _ends(sde: SDE, start: float, end: float) -> Tensor:
    """The ratios at both ends; where no signal is left, one so high that none is seen."""
    ratios = torch.tensor([_ratio(sde, start), _ratio(sde, end)], dtype=torch.float64)
    return torch.where(ratios > 1e100, _NO_SIGNAL, ratios)


def quadratic(
    sde: KernelSDE,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    to_zero: bool = False,
) -> Tensor:
    """Even in sqrt(u), with u the time that standard VP (linear beta 0.1 .. 20) needs to reach
    the same noise-to-signal ratio.

    >>> sg.grids.quadratic(sg.VP(), 10).shape
    torch.Size([11])
    """
    return _even(
        sde,
        steps,
        start,
        end,
        to_zero,
        lambda r: _vp_time(r).sqrt(),
        lambda v: _vp_ratio(v**2),
    )


def default(
    sde: KernelSDE,
    steps: int,
    start: float | None = None,
    end: float | None = None,
    data_std: float = 1.0,
    to_zero: bool = False,
) -> Tensor:
    """The default for n steps: even in u^(1 / 2.35), u standard VP's time to sqrt(0.35 / data_std)
    times the ratio of noise to signal, but for a first step as long as 1 + f others,

        f = 0.5 min(1, (12 / n)^4) from noise 30 times as wide as the data on, otherwise 0.

    Out of pure noise the first of few steps may be longer, as little happens there; where steps
    are many the smooth start is what they resolve. data_std enters by its root, because data of
    twice the spread are rarely twice as rough.

    >>> sg.grids.default(sg.VP(), 10).shape
    torch.Size([11])
    """
    start, end, n = _limits(sde, steps, start, end, to_zero)
    share = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    return _finish(default_at(sde, share, start, end, data_std), start, end, to_zero)


def default_at(sde: KernelSDE, share: Tensor, start: float, end: float, data_std: float) -> Tensor:
    """Times at which these shares (n + 1,), 0 to 1, of the default grid of n steps are done."""
    data_std = check_number(data_std, "data_std", above=0)
    ends, n = _ends(sde, start, end), len(share) - 1
    f = 0.5 * min(1.0, (12 / n) ** 4) if float(ends[0]) >= _NOISE * data_std else 0.0
    unit = math.sqrt(0.35 / data_std)
    a, b = (_vp_time(ends * unit) ** (1 / _POWER)).tolist()
    ratios = _vp_ratio((a + (b - a) * (n * share + f) / (n + f)) ** _POWER) / unit
    return sde.time_at(-2 * torch.log(ratios))


@dataclass(frozen=True, eq=False)
class Density:
    """A grid for every number of steps: times where a rising curve reaches 0, 1/n, ..., 1.

    Args:
        log_ratios: log(sigma / alpha), falling, float64 (m,).
        share: what part of the steps is done when that level is reached, rising (m,).

    Outside the levels that it knows the curve goes on at its mean slope.

    Raises:
        ValueError: curves that do not fall and rise, or of different lengths.

    >>> sg.grids.Density(torch.tensor([4.0, -4.0]), torch.tensor([0.0, 1.0]))(sg.VP(), 4).shape
    torch.Size([5])
    """

    log_ratios: Tensor
    share: Tensor

    def __post_init__(self) -> None:
        falls, rises = self.log_ratios.diff() < 0, self.share.diff() > 0
        if self.log_ratios.shape != self.share.shape or not bool((falls & rises).all()):
            raise ValueError("log_ratios must fall and share must rise, strictly, hand in hand")

    def __call__(
        self,
        sde: KernelSDE,
        steps: int,
        start: float | None = None,
        end: float | None = None,
        to_zero: bool = False,
    ) -> Tensor:
        """steps + 1 falling times from ``start`` (T) to ``end``, then 0 if asked."""
        start, end, n = _limits(sde, steps, start, end, to_zero)
        log_r, share = -self.log_ratios.numpy(), self.share.numpy()
        slope = (share[-1] - share[0]) / (log_r[-1] - log_r[0])
        log_r = np.concatenate([[log_r[0] - 50], log_r, [log_r[-1] + 50]])
        share = np.concatenate([[share[0] - 50 * slope], share, [share[-1] + 50 * slope]])
        low, high = np.interp(-torch.log(_ends(sde, start, end)).numpy(), log_r, share)
        at = np.interp(np.linspace(low, high, n + 1), share, log_r)
        return _finish(sde.time_at(2 * torch.from_numpy(at)), start, end, to_zero)


def from_table(
    sde: KernelSDE, ratios: Sequence[float] | Tensor, steps: int | None = None
) -> Tensor:
    """A grid through given noise-to-signal ratios sigma / alpha, largest first.

    A last ratio of 0 becomes t = 0. With ``steps`` the table is read as a curve and resampled,
    linearly in the logarithm of the positive ratios (Sabour et al. 2024).

    Raises:
        ValueError: ratios that do not fall strictly, are negative, or lie above that of T.

    >>> sg.grids.from_table(sg.EDM(), [10.0, 1.0, 0.1])
    tensor([10.0000,  1.0000,  0.1000], dtype=torch.float64)
    """
    r = as_real(ratios, "ratios").cpu()
    if r.ndim != 1 or len(r) < 2 or not bool((r.diff() < 0).all()) or float(r[-1]) < 0:
        raise ValueError(f"ratios must be two or more numbers >= 0 that fall strictly: {r}")
    check_kind(sde, KernelSDE, "sde", "a LinearSDE or MatrixSDE")
    top = _ratio(sde, sde.T)
    if float(r[0]) > top * (1 + 1e-9):
        raise ValueError(f"the process reaches sigma / alpha = {top:.6g}, asked {float(r[0]):.6g}")
    to_zero = float(r[-1]) == 0
    logs = torch.log(r[:-1] if to_zero else r)
    if steps is not None:
        logs = _resample(logs, check_count(steps, "steps", 1 + to_zero) - to_zero)
    times = sde.time_at(-2 * logs).clamp_max(sde.T)
    return torch.cat([times, times.new_zeros(1)]) if to_zero else times


def _resample(values: Tensor, steps: int) -> Tensor:
    u = torch.linspace(0, len(values) - 1, steps + 1, dtype=torch.float64)
    i = u.long().clamp_max(len(values) - 2)
    return torch.lerp(values[i], values[i + 1], u - i)
