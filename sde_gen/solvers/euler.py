"""Euler-Maruyama: the solver that takes every process (Maruyama 1955)."""

from __future__ import annotations

import math

from torch import Tensor

from ..noise import Noise
from ..sdes import SDE
from .base import Memory, Solver, Step


class EulerMaruyama(Solver):
    """x_s = x_t + (s - t) b(x_t, t) + g(t) sqrt|s - t| z.

    ODE order 1, weak order 1, strong order 1 for additive noise; one call a step.
    """

    order = 1
    weak = 1
    strong = 1.0

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        scale = process.diffusion(times[:-1]) * times.diff().abs().sqrt()
        steps = super().plan(process, times)
        return [Step(k.t, k.s, g) for k, g in zip(steps, scale.tolist(), strict=True)]

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        x_s = x.add(process.drift(x, step.t), alpha=step.h)
        if step.numbers:
            x_s = x_s.add(noise(x, step.t, step.s), alpha=step.numbers)
        return x_s, ()


def trapezoid_noise(process: SDE, times: Tensor) -> list[float]:
    """sqrt(|s - t| (g_t^2 + g_s^2) / 2): the spread of int g dW to the third order in s - t."""
    g2 = process.diffusion(times) ** 2
    return [
        math.sqrt(h * (a + b) / 2)
        for h, a, b in zip(
            times.diff().abs().tolist(), g2[:-1].tolist(), g2[1:].tolist(), strict=True
        )
    ]
