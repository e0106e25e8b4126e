"""Euler-Maruyama: the solver that takes every process (Maruyama 1955)."""

from __future__ import annotations

from torch import Tensor

from ..noise import Noise
from ..sdes import SDE
from .base import Gain, Memory, Solver, Step, gains, kick, times_each


class EulerMaruyama(Solver):
    """x_s = x_t + (s - t) b(x_t, t) + g(t) sqrt|s - t| z.

    ODE order 1, weak order 1, strong order 1 for additive noise; one call a step.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 100, seed=0, eta=1, solver=sg.EulerMaruyama()).shape
    torch.Size([8, 2])
    """

    order = 1
    weak = 1
    strong = 1.0

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """g sqrt|h| of each step."""
        scale = times_each(process.diffusion(times[:-1]), times.diff().abs().sqrt())
        steps = super().plan(process, times)
        return [Step(k.t, k.s, g) for k, g in zip(steps, gains(scale), strict=True)]

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """x + h b(x, t) + g sqrt|h| z."""
        x_s = x.add(process.drift(x, step.t), alpha=step.h)
        if step.numbers is not None:
            x_s = kick(x_s, noise(x, step.t, step.s), step.numbers)
        return x_s, ()


def trapezoid_noise(process: SDE, times: Tensor) -> list[Gain | None]:
    """The spread of int g dW to the third order in s - t: sqrt(|s - t| (g_t^2 + g_s^2) / 2).

    Of a matrix sqrt|s - t| (g_t + g_s) / 2, which drives a path as g does.
    """
    g, root = process.diffusion(times), times.diff().abs().sqrt()
    mean = (g[:-1] + g[1:]) / 2 if g.ndim > 1 else ((g[:-1] ** 2 + g[1:] ** 2) / 2).sqrt()
    return gains(times_each(mean, root))
