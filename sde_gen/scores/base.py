"""The algebra of scores.

Densities multiply, so scores add: a product p^a q^b has the score a s_p + b s_q. Guidance,
tempering, products of experts and observations are all such sums. At t = 0 a sum is the exact
score of the product; at t > 0 it is exact only when the factor is the density of something given
x_t (a classifier of noisy data), because noising does not commute with multiplication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..moments import Moments
from ..ops import Time, as_time, match

if TYPE_CHECKING:
    from ..sdes import KernelSDE, ScoreFunction
    from ..solvers import Solver

Weight = float | Callable[[Tensor], Tensor | float]
"""A number, or a function of time (a guidance interval, a schedule of strength)."""


class Score:
    """A function (x, t) -> grad_x log p_t(x): x (B, *D), t () or (B,), result (B, *D).

    Attributes:
        sde: the process whose marginals p_t are, where known.
        shape: *D of the data, where known; on a matrix process a state may hold more.
        singular: whether the score is infinite or undefined at t = 0.
        device: where its states live.
        batch: number of samples that labels, observations or weights were bound for, None where
            it serves any batch.
        moments: mean and covariance of the data, where known.
        data_std: standard deviation of the data over all coordinates.
        tuned: a solver fitted to this score (``tune_solver``), which ``sample`` then takes.
    """

    sde: KernelSDE | None = None
    shape: tuple[int, ...] | None = None
    singular: bool = False
    batch: int | None = None
    moments: Moments | None = None
    data_std: float = 1.0
    tuned: Solver | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x, t)")

    def given(self, **context: Any) -> Score:
        """The score with arguments bound, for example labels: ``score.given(y=labels)``."""
        return Given(self, context)

    def rows(self, index: slice | Tensor) -> Score:
        """The same score for a selection of the batch: whatever is bound per sample follows."""
        return self

    def __add__(self, other: ScoreFunction) -> Score:
        return Sum([(self, 1.0), (other, 1.0)])

    __radd__ = __add__

    def __sub__(self, other: ScoreFunction) -> Score:
        return Sum([(self, 1.0), (other, -1.0)])

    def __mul__(self, weight: Weight) -> Score:
        return Sum([(self, weight)])

    __rmul__ = __mul__

    def __neg__(self) -> Score:
        return Sum([(self, -1.0)])


class Given(Score):
    """A score with context bound. Tensors of one row a sample follow the rows of the batch."""

    def __init__(self, score: Score, context: dict[str, Any]) -> None:
        self.score, self.context = score, context
        self.tuned = score.tuned
        inherit(self, [score])

    @property
    def device(self) -> torch.device:
        return self.score.device

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        for name, value in self.context.items():
            if isinstance(value, Tensor) and value.ndim and len(value) != len(x):
                raise ValueError(
                    f"{name} was given for {len(value)} samples, the state has {len(x)}"
                )
        score: Any = self.score
        return score(x, t, **self.context)

    def given(self, **context: Any) -> Score:
        return Given(self.score, {**self.context, **context})

    def rows(self, index: slice | Tensor) -> Score:
        context = {
            name: value[index] if isinstance(value, Tensor) and value.ndim else value
            for name, value in self.context.items()
        }
        return Given(self.score.rows(index), context)


class Sum(Score):
    """sum_i w_i(t) s_i(x, t). A term whose weight is the number 0 at t is not evaluated."""

    def __init__(self, terms: list[tuple[ScoreFunction, Weight]]) -> None:
        self.terms = terms
        for score, weight in terms:
            if not callable(score):
                raise TypeError(f"a term must be callable as score(x, t), got {score!r}")
            if isinstance(weight, Score):
                raise TypeError(
                    "scores add, as densities multiply: a weight is a number, or a function of t"
                )
            if not (callable(weight) or isinstance(weight, float | int | Tensor)):
                raise TypeError(f"a weight must be a number or a function of t, got {weight!r}")
        inherit(self, [score for score, _ in terms])

    @property
    def device(self) -> torch.device:
        return next((s.device for s, _ in self.terms if isinstance(s, Score)), super().device)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        t = as_time(t)
        total: Tensor | None = None
        for score, weight in self.terms:
            w = weight(t) if callable(weight) else weight
            if not isinstance(w, Tensor) and w == 0:
                continue
            s = score(x, t)
            s = s if isinstance(w, float | int) and w == 1 else _scale(w, s)
            total = s if total is None else total + s
        return x.new_zeros(x.shape) if total is None else total

    def rows(self, index: slice | Tensor) -> Score:
        return Sum(
            [(s.rows(index) if isinstance(s, Score) else s, weight) for s, weight in self.terms]
        )

    def given(self, **context: Any) -> Score:
        return Sum([(s.given(**context) if isinstance(s, Score) else s, w) for s, w in self.terms])


def inherit(child: Score, parents: Sequence[ScoreFunction]) -> None:
    """What is known of a score made of others: the first that knows it says it.

    Moments are not passed on: a sum, or a score given its label, is the score of another law. Nor
    is a tuned solver, but to a score given its label: that is what it was tuned for.
    """
    known = [s for s in parents if isinstance(s, Score)]
    for name in ("sde", "shape"):
        setattr(child, name, next((v for s in known if (v := getattr(s, name)) is not None), None))
    child.singular = any(s.singular for s in known)
    if known:
        child.data_std = known[0].data_std


def _scale(w: Tensor | float, s: Tensor) -> Tensor:
    return (match(w, s) if isinstance(w, Tensor) else w) * s
