"""Stochastic Runge-Kutta for additive noise, of strong order 1.5 (Roessler 2010).

Where the noise does not depend on the state, order 1.5 needs beside the increment
I_1 = int dW only its time integral I_10 = int (W_u - W_t) du: two normals a step.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..noise import Noise
from ..sdes import SDE
from .base import Memory, Solver, Step, kick


class SRA(Solver):
    """The method SRA1 of Roessler 2010: strong order 1.5, two calls a step.

        x' = x + 3/4 h b(x, t) + 3/2 g_s J,
        x_s = x + h / 3 [b(x, t) + 2 b(x', t + 3/4 h)] + g_s I_1 + (g_t - g_s) J,
        I_1 = sqrt|h| z_0,      J = I_10 / |h| = I_1 / 2 + sqrt(|h| / 12) z_1.

    ODE order 2, weak order 2. The normals are the draws k = 0 and k = 1 of the step, so a noise
    that gives one draw an interval (``BrownianPath``) is refused. Where nothing is drawn (an
    ODE) it is Ralston's method.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 10, seed=0, eta=1, solver=sg.SRA()).shape
    torch.Size([8, 2])
    """

    order = 2
    weak = 2
    strong = 1.5
    calls = 2

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """g at both ends of each step."""
        c = process.diffusion(times)
        g = c.tolist() if c.ndim == 1 else list(c)
        silent = (c.reshape(len(c), -1) == 0).all(1)
        none = (silent[:-1] & silent[1:]).tolist()
        return [
            Step(k.t, k.s, None if none[i] else (g[i], g[i + 1]))
            for i, k in enumerate(super().plan(process, times))
        ]

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Two stages and two normals."""
        t, s, h = step.t, step.s, step.h
        b_t = process.drift(x, t)
        middle, end = x.add(b_t, alpha=3 / 4 * h), x.add(b_t, alpha=h / 3)
        if step.numbers is not None:
            g_t, g_s = step.numbers
            w = noise(x, t, s) * math.sqrt(abs(h))
            j = (w / 2).add(noise(x, t, s, 1), alpha=math.sqrt(abs(h) / 12))
            middle = kick(middle, j, 3 / 2 * g_s)
            end = kick(kick(end, w, g_s), j, g_t - g_s)
        return end.add(process.drift(middle, t + 3 / 4 * h), alpha=2 / 3 * h), ()
