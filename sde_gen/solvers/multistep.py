"""What the exponential integrators share: one quantity Q of state and score, interpolated.

A step reads the score once. What is known then, the state x, the score s and past values of Q,
gives the next state and the value of Q here by one linear map, whose coefficients (numbers for
``Exponential``, matrices for ``Propagator``) depend on the grid alone.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..noise import Noise
from ..ops import as_time
from ..sdes import SDE
from .base import Memory, Solver, Step, read_score


class Linear(Protocol):
    """One step as a linear map of what is known."""

    @property
    def noisy(self) -> bool:
        """Whether a normal z is drawn."""

    def __call__(
        self, x: Tensor, s: Tensor, past: tuple[Tensor, ...], z: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """The next state, and the values of Q to remember, latest first.

        Args:
            x, s: state and score (B, *D).
            past: Q_1, Q_2, ... of the steps before, latest first.
            z: the normal, where the step is ``noisy``.
        """


class Multistep(Solver):
    """Steps that are linear in state, score and the past values of Q; one call each."""

    strong = 1.0

    def step(
        self, process: SDE, x: Tensor, step: Step[Linear], noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        s = read_score(process, x, as_time(step.t))
        z = noise(x, step.t, step.s) if step.numbers.noisy else None
        return step.numbers(x, s, memory, z)
