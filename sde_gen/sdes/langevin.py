"""Langevin dynamics: a process that leaves its target where it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ops import Time, as_time, check_callable, match, set_number
from ..schedules import Power, Schedule
from .base import Clocked, rows_of
from .evaluation import ScoreFunction, read, resting


@dataclass(frozen=True)
class Langevin(Clocked):
    """dX = 1/2 beta s(X) dt + sqrt(beta) dW for the score s of a target law.

    Started at its target it does not move in law: its reversal is itself and its probability
    flow stands still. VP is the Langevin process of N(0, I).

    Args:
        score: any score; it is read at the fixed time ``at`` (0: the data's own score; a small
            positive time for a network, whose score is singular at 0).
        schedule: the clock.

    Raises:
        ValueError: ``at`` is 0 where the score says that it is singular.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.Langevin(law, at=0.1).drift(torch.ones(8, 2), 0.0).shape
    torch.Size([8, 2])
    """

    score: ScoreFunction
    schedule: Schedule = field(default_factory=Power)
    at: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_callable(self.score, "score", "score(x, t)")
        set_number(self, "at", least=0)
        if self.at == 0 and getattr(self.score, "singular", False):
            raise ValueError(
                "the score is singular at t = 0: give Langevin a small positive time, at=..."
            )

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        """What the score is bound for."""
        return getattr(self.score, "batch", None)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """beta / 2 s(x)."""
        with resting():
            s = read(self.score, x, as_time(self.at))
        return match(0.5 * self.schedule.beta(t), x) * s

    def diffusion(self, t: Time) -> Tensor:
        """sqrt(beta)."""
        return torch.sqrt(self.schedule.beta(t))

    def rows(self, index: slice | Tensor) -> Langevin:
        """The same for these rows of its score."""
        return replace(self, score=rows_of(self.score, index))
