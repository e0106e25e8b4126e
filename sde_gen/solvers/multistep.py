"""What the exponential integrators share: one quantity Q of state and score, interpolated.

A step reads the score once. What is known then, the state x, the score s and past values of Q,
gives the next state and the value of Q here by one linear map, whose coefficients (numbers for
``Exponential``, matrices for ``Propagator``) depend on the grid alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..noise import Noise
from ..sdes import SDE, Evaluation, Reverse
from .base import Memory, Solver, Step


class Linear(Protocol):
    """One step as a linear map of what is known."""

    @property
    def noisy(self) -> bool:
        """Whether a normal z is drawn."""

    @property
    def reads_data(self) -> bool:
        """Whether s stands for the denoised state: where alpha = 0 the score tells nothing."""

    def __call__(
        self, x: Tensor, s: Tensor, past: tuple[Tensor, ...], z: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """The next state, and the values of Q to remember, latest first.

        Args:
            x, s: state and score (B, *D).
            past: Q_1, Q_2, ... of the steps before, latest first.
            z: the normal, where the step is ``noisy``.
        """


Spread = Callable[[Evaluation, float, float], Tensor]
"""(evaluation at t, t, s) -> standard deviations (B, *state) of the noise in the step to s."""


def bounded(eta: float, h: float) -> float:
    """min(eta, coth(h)^(1/2)): the most noise that a step of length h in lambda can carry.

    A step shrinks y - D by kappa (1 - e^(-2h)) / 2, kappa = 1 + eta^2, or by less (where the data
    are narrow beside the reference by that): beyond 1, which this is, it overshoots.
    """
    return eta if eta**2 * math.tanh(h) <= 1 else math.tanh(h) ** -0.5


class Multistep(Solver):
    """Steps that are linear in state, score and the past values of Q; one call each.

    Attributes:
        spread: how far the noise of a step spreads, where that depends on the state (a learned
            variance, read off ``evaluation.head``); None is the spread that the grid gives.
    """

    strong = 1.0
    spread: Spread | None = None

    def step(
        self, process: SDE, x: Tensor, step: Step[Linear], noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One evaluation of the score, then the map."""
        assert isinstance(process, Reverse)
        k, e = step.numbers, process.evaluate(x, step.t)
        z = noise(x, step.t, step.s) if k.noisy else None
        value = e.denoised if k.reads_data else e.score
        if z is None or self.spread is None:
            return k(x, value, memory, z)
        x_s, memory = k(x, value, memory, None)
        return x_s + self.spread(e, step.t, step.s).to(x.dtype) * z, memory
