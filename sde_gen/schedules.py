"""Clocks: how fast a process runs.

A schedule is a rate beta(t) >= 0 on [0, T] and its integral B(t) = int_0^t beta(u) du. Variance
preserving diffusion is an Ornstein-Uhlenbeck process run on the clock B, variance exploding
diffusion is Brownian motion run on it: a change of schedule is a change of time, nothing else.

Every clock gives ``beta``; the base derives ``integral`` by quadrature and ``time_at`` (the
inverse of the integral) by bisection. Subclasses override both in closed form for speed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .ops import (
    Time,
    as_real,
    as_time,
    bisect,
    check_number,
    integrate,
    lasting,
    set_number,
    shown,
)


class Schedule(ABC):
    """A clock on [0, T]: the rate beta(t) and its integral B(t).

    Times have any shape; results are float64 of the same shape.

    >>> sg.VP(sg.schedules.Cosine()).schedule.T
    1.0
    """

    T: float

    @abstractmethod
    def beta(self, t: Time) -> Tensor:
        """Rate beta(t), in 1 / time."""

    def integral(self, t: Time) -> Tensor:
        """B(t) = int_0^t beta(u) du."""
        return integrate(self.beta, 0.0, t)

    def time_at(self, integral: Time) -> Tensor:
        """The time t at which B(t) equals ``integral``."""
        return bisect(self.integral, as_time(integral, "integral"), 0.0, self.T)


@dataclass(frozen=True)
class Linear(Schedule):
    """beta(t) = beta_min + (beta_max - beta_min) t / T (Ho et al. 2020; Song et al. 2021).

    >>> float(sg.schedules.Linear(0.1, 20.0).beta(1.0))
    20.0
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0

    def __post_init__(self) -> None:
        _check_rates(self)

    def beta(self, t: Time) -> Tensor:
        """beta_min + (beta_max - beta_min) t / T."""
        return self.beta_min + (self.beta_max - self.beta_min) / self.T * as_time(t)

    def integral(self, t: Time) -> Tensor:
        """beta_min t + (beta_max - beta_min) t^2 / (2 T)."""
        t = as_time(t)
        return t * (self.beta_min + (self.beta_max - self.beta_min) / (2 * self.T) * t)

    def time_at(self, integral: Time) -> Tensor:
        """The root of the quadratic, without cancellation."""
        b = as_time(integral, "integral")
        slope = (self.beta_max - self.beta_min) / self.T
        # The root of the quadratic that does not cancel for small b.
        return 2 * b / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * b))


@dataclass(frozen=True)
class Quadratic(Schedule):
    """sqrt(beta) linear in t ("scaled linear", latent diffusion, Rombach et al. 2022).

    >>> float(sg.schedules.Quadratic(1.0, 16.0).beta(1.0))
    16.0
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0

    def __post_init__(self) -> None:
        _check_rates(self)

    def _root(self, t: Time) -> Tensor:
        a, b = math.sqrt(self.beta_min), math.sqrt(self.beta_max)
        return a + (b - a) / self.T * as_time(t)

    def beta(self, t: Time) -> Tensor:
        """The square of a line between the roots of beta_min and beta_max."""
        return self._root(t) ** 2

    def integral(self, t: Time) -> Tensor:
        """A cubic: the difference of the cubes of the roots, over three times their slope."""
        # (r^3 - a^3) / (3 slope) with the difference of cubes factored: no cancellation.
        a, r = math.sqrt(self.beta_min), self._root(t)
        return as_time(t) * (r * r + r * a + a * a) / 3

    def time_at(self, integral: Time) -> Tensor:
        """The cubic inverted, without cancellation."""
        a, b = math.sqrt(self.beta_min), math.sqrt(self.beta_max)
        if a == b:
            return as_time(integral, "integral") / self.beta_min
        c = 3 * (b - a) / self.T * as_time(integral, "integral")
        r = (a**3 + c) ** (1 / 3)
        return as_time(integral, "integral") * 3 / (r * r + r * a + a * a)


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """beta(t) = beta_min + (beta_max - beta_min) S(k (2 t / T - 1)), S the logistic function.

    Slow at both ends, fast in the middle; k is ``steepness`` (Xu et al. 2022, GeoDiff, k = 6).

    >>> float(sg.schedules.Sigmoid(1.0, 21.0).beta(0.5))
    11.0
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    steepness: float = 6.0
    T: float = 1.0

    def __post_init__(self) -> None:
        _check_rates(self)
        set_number(self, "steepness", above=0)

    def beta(self, t: Time) -> Tensor:
        """beta_min + (beta_max - beta_min) S(k (2 t / T - 1))."""
        u = self.steepness * (2 * as_time(t) / self.T - 1)
        return self.beta_min + (self.beta_max - self.beta_min) * torch.sigmoid(u)

    def integral(self, t: Time) -> Tensor:
        """beta_min t and a difference of two softplus functions."""
        t, k = as_time(t), self.steepness
        # logaddexp(0, u) is softplus without torch's cut to the identity at u = 20.
        u = k * (2 * t / self.T - 1)
        rise = torch.logaddexp(u, torch.zeros_like(u)) - math.log1p(math.exp(-k))
        return self.beta_min * t + (self.beta_max - self.beta_min) * self.T / (2 * k) * rise


@dataclass(frozen=True)
class Cosine(Schedule):
    """exp(-B(t)) = (cos a(t) / cos a(0))^2, the angle a linear in t (Nichol & Dhariwal 2021).

    The published clock runs to a = pi / 2, where beta is infinite and the chain clips it. Here
    the angle stops where B(T) = ``total``, so the formula holds on all of [0, T].

    >>> sg.VP(sg.schedules.Cosine())
    VP(schedule=Cosine(offset=0.008, total=12.0, T=1.0))
    """

    offset: float = 0.008
    total: float = 12.0
    T: float = 1.0

    def __post_init__(self) -> None:
        set_number(self, "offset", least=0, below=1)
        set_number(self, "total", above=0, most=1380)  # at exp(-total / 2) = 1e-300 float64 ends
        set_number(self, "T", above=0)

    @cached_property
    def _angles(self) -> tuple[float, float, float]:
        """The angle at t = 0, its speed, and how far from pi / 2 it ends: the pole of beta."""
        start = self.offset / (1 + self.offset) * math.pi / 2
        left = math.asin(math.cos(start) * math.exp(-self.total / 2))
        return start, (math.pi / 2 - left - start) / self.T, left

    def beta(self, t: Time) -> Tensor:
        """2 a' tan a(t), with a' the speed of the angle."""
        start, slope, left = self._angles
        t = as_time(t)
        near = torch.tan(left + slope * (self.T - t))
        return 2 * slope * torch.where(near < 1, 1 / near, torch.tan(start + slope * t))

    def integral(self, t: Time) -> Tensor:
        """-2 log(cos a(t) / cos a(0))."""
        start, slope, left = self._angles
        t = as_time(t)
        a = slope * t
        # cos(start + a) / cos(start), far from the pole less 1 and near it by the angle that is
        # left: neither is a difference of near-equal numbers.
        drop = -2 * torch.sin(a / 2) ** 2 - math.tan(start) * torch.sin(a)
        ratio = torch.sin(left + slope * (self.T - t)) / math.cos(start)
        return -2 * torch.where(drop > -0.5, torch.log1p(drop.clamp_min(-0.5)), torch.log(ratio))

    def time_at(self, integral: Time) -> Tensor:
        """By the inverse of the cosine, from whichever end keeps its digits."""
        start, slope, left = self._angles
        b = as_time(integral, "integral")
        # The difference of the two tangents factored, so that small times do not cancel.
        rise = torch.expm1(b.clamp_max(1.0)) / math.cos(start) ** 2
        low = math.tan(start)
        high = torch.sqrt(rise + low**2)
        angle = torch.atan(rise / (high + low).clamp_min(1e-300) / (1 + high * low))
        rest = torch.asin(math.cos(start) * torch.exp(-b / 2).clamp_max(1.0)) - left
        return torch.where(b < 1, angle / slope, self.T - rest / slope)


@dataclass(frozen=True)
class Geometric(Schedule):
    """B(t) = sigma_min^2 (r^(2 t / T) - 1), r = sigma_max / sigma_min: the clock of VE.

    The noise level of VE then rises geometrically (Song et al. 2021, appendix C) from exactly 0.

    >>> round(float(sg.VE(sg.schedules.Geometric(0.01, 50.0)).sigma(1.0)), 3)
    50.0
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    T: float = 1.0

    def __post_init__(self) -> None:
        set_number(self, "sigma_min", above=0)
        set_number(self, "sigma_max", above=self.sigma_min)
        set_number(self, "T", above=0)

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min) / self.T

    def beta(self, t: Time) -> Tensor:
        """dB / dt = 2 log(r) / T sigma_min^2 r^(2 t / T)."""
        return self.sigma_min**2 * self._rate * torch.exp(self._rate * as_time(t))

    def integral(self, t: Time) -> Tensor:
        """sigma_min^2 (r^(2 t / T) - 1)."""
        return self.sigma_min**2 * torch.expm1(self._rate * as_time(t))

    def time_at(self, integral: Time) -> Tensor:
        """By a logarithm."""
        return torch.log1p(as_time(integral, "integral") / self.sigma_min**2) / self._rate


@dataclass(frozen=True)
class Power(Schedule):
    """B(t) = t^p: p = 1 is the clock on the wall, p = 2 makes sigma(t) = t for VE.

    >>> float(sg.VE(sg.schedules.Power(2.0)).sigma(0.3))
    0.3
    """

    p: float = 1.0
    T: float = 1.0

    def __post_init__(self) -> None:
        set_number(self, "p", least=1)
        set_number(self, "T", above=0)

    def beta(self, t: Time) -> Tensor:
        """p t^(p - 1)."""
        return self.p * as_time(t) ** (self.p - 1)

    def integral(self, t: Time) -> Tensor:
        """t^p."""
        return as_time(t) ** self.p

    def time_at(self, integral: Time) -> Tensor:
        """B^(1 / p)."""
        return as_time(integral, "integral") ** (1 / self.p)


@dataclass(frozen=True)
class Tabulated(Schedule):
    """The clock of a discrete chain beta_1 .. beta_N, with node i at t = i T / N.

    B is piecewise linear through -sum log(1 - beta_i), so that alpha^2 = exp(-B) at the nodes is
    exactly the chain's cumulative product of 1 - beta_i (Ho et al. 2020, equation 4).

    The last beta may be 1: zero terminal signal (Lin et al. 2024). B(T) is infinite then, and in
    the last part exp(-B), not B, falls linearly.

    >>> float(sg.VP(sg.schedules.Tabulated([0.1, 0.2], T=2)).alpha(2.0)) ** 2
    0.72
    """

    betas: tuple[float, ...]
    T: float = 1.0
    _table: Tensor = field(init=False, repr=False, compare=False)

    def __init__(self, betas: Sequence[float] | Tensor, T: float = 1.0) -> None:
        values = as_real(betas, "betas").cpu()
        inside = (values > 0) & (values < 1)
        if values.ndim != 1 or not bool(inside[:-1].all() and (inside | (values == 1))[-1:].any()):
            raise ValueError(
                f"betas must be one or more numbers in (0, 1), the last at most 1, got"
                f" {shown(betas)}"
            )
        object.__setattr__(self, "betas", tuple(values.tolist()))
        object.__setattr__(self, "T", check_number(T, "T", above=0))
        with lasting():  # now, and not in a graph that is traced
            steps = -torch.log1p(-torch.tensor(self.betas, dtype=torch.float64, device="cpu"))
            object.__setattr__(self, "_table", torch.cat([steps.new_zeros(1), steps.cumsum(0)]))

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self.betas)
        u = t / self.T * n
        i = u.floor().clamp(0, n - 1).long().to(self._table.device)
        return u.to(self._table.device) - i, self._table[i], self._table[i + 1]

    def beta(self, t: Time) -> Tensor:
        """-N / T log(1 - beta_i) in the i-th of N equal parts of [0, T]."""
        t = as_time(t)
        u, low, high = self._cell(t)
        last = high.isinf()
        rate = torch.where(last, 1 / (1 - u * last).clamp_min(0), high - low)
        return (rate * len(self.betas) / self.T).to(t.device)

    def integral(self, t: Time) -> Tensor:
        """Linear between the nodes -sum log(1 - beta_i)."""
        t = as_time(t)
        u, low, high = self._cell(t)
        last = high.isinf()
        rise = (high - low).masked_fill(last, 0.0)
        return (low + torch.where(last, -torch.log1p(-u * last), u * rise)).to(t.device)

    def time_at(self, integral: Time) -> Tensor:
        """The interpolation inverted."""
        b = as_time(integral, "integral")
        n, table = len(self.betas), self._table.to(b.device)
        i = (torch.searchsorted(table, b.contiguous(), right=True) - 1).clamp(0, n - 1)
        rise, gap = b - table[i], table[i + 1] - table[i]
        u = torch.where(gap.isinf(), -torch.expm1(-rise), rise / gap)
        return (i + u) * self.T / n


def _check_rates(clock: Linear | Quadratic | Sigmoid) -> None:
    set_number(clock, "beta_min", above=0)
    set_number(clock, "beta_max", least=clock.beta_min)
    set_number(clock, "T", above=0)
