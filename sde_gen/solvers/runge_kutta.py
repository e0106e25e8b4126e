"""One-step Runge-Kutta methods on the drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..noise import Noise
from ..ops import act, check_count
from ..sdes import SDE
from .base import Memory, Solver, Step, require_ode
from .euler import trapezoid_noise


class Heun(Solver):
    """The trapezoid rule with an Euler-Maruyama predictor, for ODEs and SDEs.

        x' = x + h b(x, t) + S z,      x_s = x + h / 2 [b(x, t) + b(x', s)] + S z,
        S^2 = |h| (g_t^2 + g_s^2) / 2.

    ODE order 2, weak order 2 for additive noise (Kloeden & Platen 1992, section 14.4 with noise
    that does not depend on the state); strong order 1; two calls a step, one at its end.

    A last step to t = 0, where a learned score cannot be read, is Euler's: on ``EDM`` this is
    algorithm 1 of Karras et al. 2022.

    >>> sg.sample(sg.Gaussian(sg.VP(), torch.zeros(2)), 8, 10, seed=0, solver=sg.Heun()).shape
    torch.Size([8, 2])
    """

    order = 2
    weak = 2
    strong = 1.0
    calls = 2
    evaluates_end = True
    reaches_zero = True

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """S of each step, and whether its end can be read."""
        scale = trapezoid_noise(process, times)
        steps = super().plan(process, times)
        return [
            Step(k.t, k.s, (g, k.s > 0 or not process.singular))
            for k, g in zip(steps, scale, strict=True)
        ]

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Euler-Maruyama, then the mean of both drifts."""
        g, reads_end = step.numbers
        if g is not None:
            z = noise(x, step.t, step.s)
            jump = act(g, z) if isinstance(g, Tensor) else z * g
        b_t = process.drift(x, step.t)
        end = x.add(b_t, alpha=step.h)
        if not reads_end:
            return (end if g is None else end + jump), ()
        b_s = process.drift(end if g is None else end + jump, step.s)
        x_s = end.add(b_s - b_t, alpha=step.h / 2)
        return (x_s if g is None else x_s + jump), ()


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit method (Butcher 1964), b being the last row of ``a``.

        k_i = b(x + h sum_j a_ij k_j, t + c_i h),      x_s = x + h sum_j b_j k_j.

    ``error``: weights of the difference to an embedded method of one order less.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    error: tuple[float, ...] = ()


CLASSICAL = Tableau(
    c=(0, 1 / 2, 1 / 2, 1),
    a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
)
"""Kutta 1901."""

DORMAND_PRINCE = Tableau(
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
"""Dormand & Prince 1980, 5(4): the error takes the drift at the end as a seventh value."""


def slope(row: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    """sum_j row_j k_j, without the terms that are zero."""
    (a, first), *rest = [(a, v) for a, v in zip(row, k, strict=True) if a]
    total = first * a
    for a, v in rest:
        total = total.add(v, alpha=a)
    return total


class RungeKutta(Solver):
    """Explicit Runge-Kutta methods for ODEs, in fixed steps.

    Order 4 is the classical method (Kutta 1901), four calls a step; order 5 that of Dormand &
    Prince (1980), six calls. ``Adaptive`` steps the latter by its own error.

    Raises:
        ValueError: an order that is not 4 or 5.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 10, seed=0, solver=sg.RungeKutta(4)).shape
    torch.Size([8, 2])
    """

    evaluates_end = True

    def __init__(self, order: int = 4) -> None:
        self.order = check_count(order, "order", 4, 5)
        self.calls = len(self._table.c)

    @property
    def _table(self) -> Tableau:
        return CLASSICAL if self.order == 4 else DORMAND_PRINCE

    def check(self, process: SDE) -> None:
        """An ODE."""
        require_ode(self, process)

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """The stages of the tableau."""
        table, h = self._table, step.h
        k = [process.drift(x, step.t)]
        for c, row in zip(table.c[1:], table.a[1:], strict=False):
            t = step.s if c == 1 else step.t + c * h
            k.append(process.drift(x.add(slope(row, k), alpha=h), t))
        return x.add(slope(table.a[-1], k), alpha=h), ()
