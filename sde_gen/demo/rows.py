"""The table: every sampler with every guidance, the same digits from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import grids
from ..guidance import Classifier, ClassifierFree
from ..ops import Time
from ..sampling import sample
from ..scores import Score
from ..sdes import Evaluation, KernelSDE
from ..solvers import EulerMaruyama, Exponential, SciPy, Solver, TorchSDE
from .judge import Judge
from .models import Trained

WEIGHT = 0.5
"""Of both kinds of guidance: they aim at p(x | y) p(y | x)^(1/2)."""


@dataclass(frozen=True)
class Sampler:
    """A process (eta), a solver and a grid, by name."""

    name: str
    eta: float
    solver: Solver
    times: Callable[[KernelSDE], Tensor]


FLOW = Sampler(
    "probability flow, Exponential(3)",
    0.0,
    Exponential(3),
    lambda sde: grids.quadratic(sde, 20, to_zero=True),
)
SAMPLERS = [
    Sampler(
        "reverse SDE, Euler-Maruyama", 1.0, EulerMaruyama(), lambda sde: grids.uniform(sde, 100)
    ),
    Sampler(
        "reverse SDE, torchsde midpoint",
        1.0,
        TorchSDE("midpoint"),
        lambda sde: grids.quadratic(sde, 30),
    ),
    Sampler(
        "ancestral, Exponential(1)",
        1.0,
        Exponential(1),
        lambda sde: grids.quadratic(sde, 50, to_zero=True),
    ),
    FLOW,
    Sampler(
        "probability flow, scipy RK45",
        0.0,
        SciPy("RK45", 1e-3, 1e-3),
        lambda sde: grids.quadratic(sde, 1),
    ),
]


class Counted(Score):
    """A score that counts how often it is called."""

    def __init__(self, score: Score) -> None:
        self.score, self.calls = score, 0
        self.sde, self.facts, self.singular = score.sde, score.facts, score.singular

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """The score's evaluation, counted."""
        self.calls += 1
        return self.score.evaluate(x, t, **context)


def guided(trained: Trained, y: Tensor) -> dict[str, Score]:
    """The class-conditional score, alone and with each kind of guidance.

    The classifier is a network of its own (Dhariwal & Nichol 2021); classifier-free guidance
    takes the difference of the conditional and the unconditional score for its gradient.
    """
    given = trained.score.given(y=y)
    term = Classifier(trained.classifier, y, trained.score.sde, trained.score.facts)
    return {
        "none": given,
        "classifier": given + WEIGHT * term,
        "classifier-free": ClassifierFree(trained.score, WEIGHT, y=y),
    }


def rows(
    trained: Trained, judge: Judge, y: Tensor, seed: int = 0
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """One record for each sampler and guidance, with its samples (len(y), 1, 8, 8)."""
    for sampler in SAMPLERS:
        times = sampler.times(trained.score.sde)
        for guidance, score in guided(trained, y).items():
            model = Counted(score)
            start = time.perf_counter()
            x = sample(
                model,
                len(y),
                seed=seed,
                eta=sampler.eta,
                solver=sampler.solver,
                times=times,
                chunk=len(y),  # so that calls count
            )
            seconds = time.perf_counter() - start
            record = {"sampler": sampler.name, "guidance": guidance, "calls": model.calls}
            yield {**record, "seconds": seconds, **judge.grade(x, y)}, x
