"""One-step Runge-Kutta methods on the drift."""

from __future__ import annotations

from torch import Tensor

from ..noise import Noise
from ..sdes import SDE
from .base import Memory, Solver, Step, require_ode
from .euler import trapezoid_noise


class Heun(Solver):
    """The trapezoid rule with an Euler-Maruyama predictor, for ODEs and SDEs.

        x' = x + h b(x, t) + S z,      x_s = x + h / 2 [b(x, t) + b(x', s)] + S z,
        S^2 = |h| (g_t^2 + g_s^2) / 2.

    ODE order 2, weak order 2 for additive noise (Kloeden & Platen 1992, section 14.4 with noise
    that does not depend on the state); strong order 1; two calls a step, one at its end.
    """

    order = 2
    weak = 2
    strong = 1.0
    calls = 2
    evaluates_end = True

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        scale = trapezoid_noise(process, times)
        steps = super().plan(process, times)
        return [Step(k.t, k.s, g) for k, g in zip(steps, scale, strict=True)]

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        if step.numbers:
            jump = noise(x, step.t, step.s) * step.numbers
        b_t = process.drift(x, step.t)
        end = x.add(b_t, alpha=step.h)
        b_s = process.drift(end + jump if step.numbers else end, step.s)
        x_s = end.add(b_s - b_t, alpha=step.h / 2)
        return (x_s + jump if step.numbers else x_s), ()


class RungeKutta(Solver):
    """The classical Runge-Kutta method (Kutta 1901): ODE order 4, four calls a step."""

    order = 4
    calls = 4
    evaluates_end = True

    def check(self, process: SDE) -> None:
        require_ode(self, process)

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        t, s, h = step.t, step.s, step.h
        m = (t + s) / 2
        k_1 = process.drift(x, t)
        k_2 = process.drift(x.add(k_1, alpha=h / 2), m)
        k_3 = process.drift(x.add(k_2, alpha=h / 2), m)
        k_4 = process.drift(x.add(k_3, alpha=h), s)
        return x.add(k_1 + 2 * (k_2 + k_3) + k_4, alpha=h / 6), ()
