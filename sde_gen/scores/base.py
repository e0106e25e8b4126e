"""The algebra of scores.

Densities multiply, so scores add: a product p^a q^b has the score a s_p + b s_q. Guidance,
tempering, products of experts and observations are all such sums. At t = 0 a sum is the exact
score of the product; at t > 0 it is exact only when the factor is the density of something given
x_t (a classifier of noisy data), because noising does not commute with multiplication.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..moments import Moments
from ..ops import Time, as_real, as_time, match
from ..sdes import SDE, KernelSDE, ScoreFunction
from ..sdes.evaluation import read

if TYPE_CHECKING:
    from ..solvers import Solver

_T = TypeVar("_T")

Weight = float | Tensor | Callable[[Tensor], Tensor | float]
"""A number, one for each sample (B,), or a function of time (a guidance interval)."""


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
    __array_ufunc__ = None  # numpy's numbers and arrays leave their product with it to __rmul__

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
    """A score with context bound: ``score(x, t, **context)``.

    Tensors, and arrays and lists of numbers, hold one row a sample and follow the rows of the
    batch; numbers and whatever else there is are for all.

    Raises:
        ValueError: rows for different numbers of samples, here or when called.
    """

    def __init__(self, score: Score, context: Mapping[str, Any]) -> None:
        self.score = score
        self.context = {name: _bound(value, score.device) for name, value in context.items()}
        self.tuned = score.tuned
        inherit(self, [score], self.context)

    @property
    def device(self) -> torch.device:
        return self.score.device

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        check_batch(self, x, ", ".join(self.context))
        score: Any = self.score
        return score(x, t, **self.context)

    def given(self, **context: Any) -> Score:
        return Given(self.score, {**self.context, **context})

    def rows(self, index: slice | Tensor) -> Score:
        context = {name: cut(value, index) for name, value in self.context.items()}
        return Given(self.score.rows(index), context)


class Sum(Score):
    """sum_i w_i(t) s_i(x, t). A term whose weight is the number 0 at t is not evaluated.

    Raises:
        TypeError: terms that cannot be called, weights that are neither numbers nor functions;
            when called: a term that returns no tensor.
        ValueError: terms of different processes, shapes, devices or batches; when called: a term
            of another shape than the state.
    """

    def __init__(self, terms: Sequence[tuple[ScoreFunction, Weight]]) -> None:
        for score, _ in terms:
            if not callable(score):
                raise TypeError(f"a term must be callable as score(x, t), got {score!r}")
        self.terms = [(score, as_weight(weight)) for score, weight in terms]
        weights = {f"weight {i}": weight for i, (_, weight) in enumerate(self.terms)}
        inherit(self, [score for score, _ in terms], weights)

    @property
    def device(self) -> torch.device:
        return _home(self) or super().device

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        check_batch(self, x, "a term or weight")
        t = as_time(t)
        total: Tensor | None = None
        for score, weight in self.terms:
            w = weight(t) if callable(weight) else weight
            if not isinstance(w, Tensor) and w == 0:
                continue
            s = scale(w, read(score, x, t))
            total = s if total is None else total + s
        return x.new_zeros(x.shape) if total is None else total

    def rows(self, index: slice | Tensor) -> Score:
        return Sum(
            [
                (s.rows(index) if isinstance(s, Score) else s, cut(weight, index))
                for s, weight in self.terms
            ]
        )

    def given(self, **context: Any) -> Score:
        return Sum([(s.given(**context) if isinstance(s, Score) else s, w) for s, w in self.terms])


def inherit(
    child: Score, parents: Sequence[ScoreFunction], bound: Mapping[str, object] | None = None
) -> None:
    """What is known of a score made of others, and of what is bound to it.

    Moments are not passed on: a sum, or a score given its label, is the score of another law. Nor
    is a tuned solver, but to a score given its label: that is what it was tuned for.

    Raises:
        ValueError: what two of them know differs.
    """
    known = [(type(s).__name__, s) for s in parents if isinstance(s, Score)]
    rows = [(n, len(v)) for n, v in (bound or {}).items() if isinstance(v, Tensor) and v.ndim]
    child.sde = _shared("process", [(n, s.sde) for n, s in known], _same_process)
    child.shape = _shared("shape", [(n, s.shape) for n, s in known])
    child.batch = _shared("batch size", [*((n, s.batch) for n, s in known), *rows])
    _shared("device", [(n, _home(s)) for n, s in known])
    child.singular = any(s.singular for _, s in known)
    if known:
        child.data_std = known[0][1].data_std


def _shared(
    what: str,
    known: Sequence[tuple[str, _T | None]],
    same: Callable[[_T, _T], bool] = operator.eq,
) -> _T | None:
    """What all that know it agree on; None where nobody does."""
    told = [(name, value) for name, value in known if value is not None]
    if not told:
        return None
    (name, first), *rest = told
    for other, value in rest:
        if not same(first, value):
            raise ValueError(
                f"scores that are combined must have one {what}: {name} has {first!r},"
                f" {other} has {value!r}"
            )
    return first


def _same_process(a: SDE, b: SDE) -> bool:
    if isinstance(a, KernelSDE) and isinstance(b, KernelSDE):
        return a.agrees(b) and b.agrees(a)
    return a is b or a == b


def _home(score: object) -> torch.device | None:
    """Where the tensors of a score live; None where it does not say."""
    if isinstance(score, Sum):
        return next((d for s, _ in score.terms if (d := _home(s)) is not None), None)
    inner = getattr(score, "score", None)
    if isinstance(inner, Score):
        return _home(inner)
    if not isinstance(score, Score) or type(score).device is Score.device:
        return None
    return score.device


def check_batch(score: Score, x: Tensor, what: str) -> None:
    """Raise ``ValueError`` unless the score is bound for as many samples as the state has."""
    if score.batch not in (None, len(x)):
        raise ValueError(f"{what} was given for {score.batch} samples, the state has {len(x)}")


def cut(value: Any, index: slice | Tensor) -> Any:
    """The rows of a tensor that has one a sample; whatever else is for all samples stays.

    Raises:
        ValueError: rows that are not there.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    n = len(value)
    if isinstance(index, slice):
        bad = max(index.start or 0, index.stop or 0) > n
    elif index.dtype == torch.bool:
        bad = len(index) != n
    else:
        index = index.to(value.device)
        # Only where the check costs no synchronisation with a device.
        bad = index.device.type == "cpu" and bool((index >= n).any())
    if bad:
        raise ValueError(f"rows {index} were asked of what was given for {n} samples")
    return value[index]


def _bound(value: Any, device: torch.device) -> Any:
    """Context as it is kept: arrays and lists of numbers are tensors, numpy's numbers Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray | list | tuple):
        return value
    try:
        array = np.array(value)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths, or no numbers
        return value
    return torch.as_tensor(array, device=device) if array.dtype.kind in "biufc" else value


def as_weight(weight: Any) -> Weight:
    """A weight as it is kept: a number, a tensor () or (B,), or a function of t."""
    if isinstance(weight, Score):
        raise TypeError(
            "scores add, as densities multiply: a weight is a number, or a function of t"
        )
    if isinstance(weight, Tensor | np.ndarray | list | tuple):
        rows = as_real(weight, "a weight")
        if rows.ndim > 1:
            raise ValueError(f"a weight must be a number or (B,), got shape {tuple(rows.shape)}")
        return rows
    if isinstance(weight, Real):
        return float(weight)
    if not callable(weight):
        raise TypeError(f"a weight must be a number or a function of t, got {weight!r}")
    return weight


def scale(w: Tensor | float, s: Tensor) -> Tensor:
    """w s for a weight at its time, a number, () or (B,)."""
    if isinstance(w, Tensor):
        return match(w, s) * s
    return s if w == 1 else w * s
