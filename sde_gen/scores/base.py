"""The algebra of scores.

Densities multiply, so scores add: a product p^a q^b has the score a s_p + b s_q. Guidance,
tempering, products of experts and observations are all such sums. At t = 0 a sum is the exact
score of the product; at t > 0 it is exact only when the factor is the density of something given
x_t (a classifier of noisy data), because noising does not commute with multiplication.

A score is read in three ways: ``score(x, t)`` is its value, ``score.evaluate(x, t)`` all that one
call tells (value, denoised state, a network's second output), ``score.linearise(x, t)`` the same
with the pullback of the denoised state. A score of your own defines the first; the rest follows.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..facts import Facts, Units
from ..noise import Source
from ..ops import Time, as_time
from ..sdes import SDE, Evaluation, KernelSDE, ScoreFunction, evaluate, read, resting
from .bound import bound, check_batch, cut, rows_of
from .weights import Weight, as_weight, power, total

if TYPE_CHECKING:
    from ..sampling import Pace
    from ..tuning import Tuned

_S = TypeVar("_S", bound="Score")
_T = TypeVar("_T")


class Score:
    """A function (x, t) -> grad_x log p_t(x): x (B, *D), t () or (B,), result (B, *D).

    Attributes:
        sde: the process whose marginals p_t are, where known.
        facts: what is known of the data: shape, deviation, moments, units, classes, levels.
        singular: whether the score is infinite or undefined at t = 0.
        device: where its states live.
        batch: number of samples that labels, observations or weights were bound for, None where
            it serves any batch.
        eta: the noise level that ``sample`` takes where none is asked for.
        end: the time at which its data are met, if later than where grids end by default.
        temperature: of the law that it stands for: ``sample`` starts sqrt(temperature) times as
            wide as the process does.
        factor: whether it is the score of p(o | x_t), which multiplies a density, and not of one.
        tuned: a solver fitted to this score (``tune_solver``), which ``sample`` then takes.
        pace: of a network, how many samples ``sample`` gives it at once and in which layout
            (``sampling.timed``); None until that has been chosen.

    >>> p = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> (p + 2 * p)(torch.ones(1, 2), 0.5)
    tensor([[-3., -3.]])
    """

    sde: KernelSDE | None = None
    facts: Facts = Facts()
    singular: bool = False
    batch: int | None = None
    eta: float = 0.0
    end: float | None = None
    temperature: float = 1.0
    factor: bool = False
    tuned: Tuned | None = None
    pace: Pace | None = None
    __array_ufunc__ = None  # numpy's numbers and arrays leave their product with it to __rmul__

    @property
    def device(self) -> torch.device:
        """Where its states live."""
        return torch.device("cpu")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """*D of the data, as its facts tell; on a matrix process a state may hold more."""
        return self.facts.shape

    @property
    def inside(self) -> tuple[int, ...] | None:
        """The shape of one sample in the units of the process: *D, but for latents."""
        shape, units = self.shape, self.facts.units
        return shape if shape is None or units is None else units.inside(shape)

    def clean(self, x: Tensor, noise: Source = None) -> Tensor:
        """What noise is added to where it is trained: data x (B, *D) in the units of the process;
        what is random in it is drawn from ``noise``."""
        return self.facts.encode(x)

    @property
    def classes(self) -> int | None:
        """Number of classes that it can be given, None where it takes no labels."""
        return None

    @property
    def takes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The shapes of the conditions that it can be given beside labels, by name, as its network
        declares them (``net.context``): what it declares it knows to be absent where it is NaN."""
        return {}

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """s(x, t), of the shape of x (B, *state), for a time () or (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x, t)")

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """What one call tells: the score, the denoised state, a network's second output.

        Networks are in evaluation mode meanwhile.
        """
        t = as_time(t)
        with resting():
            s = read(self, x, t, **context)
        return Evaluation(s, lambda: self._tweedie(x, t, s))

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """D = E[x_0 | x_t = x] by Tweedie's formula, (B, *state) -> (B, *D)."""
        return self.evaluate(x, t).denoised

    def linearise(self, x: Tensor, t: Time) -> Evaluation:
        """``evaluate`` with ``pull``: u (B, *D) -> J^T u for the Jacobian J = dD / dx, each by
        one backward pass through the one call that is made."""

        def parts(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            e = self.evaluate(x, t)
            return e.denoised, (e.score,) if e.head is None else (e.score, e.head)

        denoised, pull, (s, *head) = torch.func.vjp(parts, x, has_aux=True)  # type: ignore[misc]
        return Evaluation(s, denoised, head[0] if head else None, lambda u: pull(u)[0])

    def _tweedie(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if self.sde is None:
            raise TypeError(f"{type(self).__name__} knows no process (.sde) to denoise by")
        return self.sde.tweedie(x, t, s)

    def given(self, **context: Any) -> Score:
        """The score with arguments bound: ``score.given(y=labels, theta=rows)``.

        A tensor (an array, a list) has one row a sample; a number, ``shared(tensor)``, or what has
        the shape of one condition that the network declares, is for all samples.
        """
        return Given(self, context)

    def at_eta(self, eta: float) -> Score:
        """The score as a reversal of this noise level reads it: itself, unless something in it
        acts through the noise (``guidance.Tempered``)."""
        return self

    @property
    def power_of(self) -> tuple[float, Score]:
        """A power a and a score of p, where a reversal by this one is that of p^a; (1, itself)."""
        return 1.0, self

    def factors(self, x: Tensor, t: Time) -> list[tuple[float, Tensor]]:
        """Powers w_i and scores s_i (B, *D) of noised laws p_i, of which the law that is meant at
        t = 0 is proportional to prod_i p_i^w_i: itself alone, unless it combines others."""
        return [(1.0, self.evaluate(x, t).score)]

    def fingerprint(self) -> str | None:
        """A name for the weights of the network inside, the same on every device; None where
        there is none."""
        return None

    def rows(self, index: slice | Tensor) -> Score:
        """The same score for a selection of the batch: whatever is bound per sample follows."""
        return self

    def with_facts(self: _S, facts: Facts) -> _S:
        """The same score, of whose data this is known; a network is shared, not copied."""
        other = copy.copy(self)
        other.facts = facts
        return other

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


class Around(Score):
    """A score made of one other: it lives where that does, and takes what that takes."""

    score: Score

    @property
    def around(self) -> Score:
        """The other."""
        return self.score

    @property
    def device(self) -> torch.device:
        """That of the other."""
        return self.around.device

    @property
    def classes(self) -> int | None:
        """Those of the other."""
        return self.around.classes

    @property
    def takes(self) -> Mapping[str, tuple[int | None, ...]]:
        """Those of the other."""
        return self.around.takes

    def fingerprint(self) -> str | None:
        """That of the other."""
        return self.around.fingerprint()


class Given(Around):
    """A score with context bound: ``score(x, t, **context)``.

    Tensors, and arrays and lists of numbers, hold one row a sample and follow the rows of the
    batch; a number and what is ``shared`` are for all, and reach the score as one row a sample.
    Whatever else there is passes as it is.

    Raises:
        ValueError: rows for different numbers of samples, here or when called.

    >>> sg.Gaussian(sg.VP(), torch.zeros(2)).given(y=3).context
    {'y': tensor(3)}
    """

    def __init__(self, score: Score, context: Mapping[str, Any]) -> None:
        self.score = score
        self.context = bound(score, context)
        self.tuned, self.factor = score.tuned, score.factor
        inherit(self, [score], self.context)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """score(x, t, **context), the context one row a sample."""
        score: Any = self.score
        return score(x, t, **rows_of(self, x))

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """The score's evaluation, given the context."""
        return self.score.evaluate(x, t, **{**rows_of(self, x), **context})

    def given(self, **context: Any) -> Score:
        """More context; what is bound again takes the new value."""
        return Given(self.score, {**self.context, **context})

    def at_eta(self, eta: float) -> Score:
        """That of the score, given the same."""
        score = self.score.at_eta(eta)
        return self if score is self.score else Given(score, self.context)

    def rows(self, index: slice | Tensor) -> Score:
        """The score and its context for these rows."""
        context = {name: cut(value, index) for name, value in self.context.items()}
        return Given(self.score.rows(index), context)


class Sum(Score):
    """sum_i w_i(t) s_i(x, t). A term whose weight is the number 0 at t is not evaluated.

    Raises:
        TypeError: terms that cannot be called, weights that are neither numbers nor functions;
            when called: a term that returns no tensor.
        ValueError: terms of different processes, shapes, devices or batches; when called: a term
            of another shape than the state.

    >>> p = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> type(p + p).__name__
    'Sum'
    """

    def __init__(self, terms: Sequence[tuple[ScoreFunction, Weight]]) -> None:
        for score, _ in terms:
            if not callable(score):
                raise TypeError(f"a term must be callable as score(x, t), got {score!r}")
        self.terms = [(score, as_weight(weight)) for score, weight in terms]
        weights = {f"weight {i}": weight for i, (_, weight) in enumerate(self.terms)}
        inherit(self, [score for score, _ in terms], weights)
        self.factor = all(getattr(score, "factor", False) for score, _ in terms)

    @property
    def device(self) -> torch.device:
        """That of the first term that has one."""
        return _home(self) or super().device

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """sum_i w_i(t) s_i(x, t)."""
        return self.evaluate(x, t).score

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """One evaluation of each term. Denoised states combine as scores do where the weights are
        numbers of sum 1; else Tweedie's formula reads the sum."""
        check_batch(self, x, "a term or weight")
        score = self.given(**context) if context else self
        assert isinstance(score, Sum)
        t = as_time(t)
        parts = [(w, evaluate(term, x, t, self._tweedie)) for term, w in score._at(t)]
        if not parts:
            s = x.new_zeros(x.shape)
            return Evaluation(s, lambda: self._tweedie(x, t, s))
        s = total([(w, e.score) for w, e in parts])
        head = next((e.head for _, e in parts if e.head is not None), None)
        numbers = [w for w, _ in parts if not isinstance(w, Tensor)]
        if len(numbers) == len(parts) and abs(sum(numbers) - 1) < 1e-9:
            return Evaluation(s, lambda: total([(w, e.denoised) for w, e in parts]), head)
        return Evaluation(s, lambda: self._tweedie(x, t, s), head)

    def _at(self, t: Tensor) -> list[tuple[ScoreFunction, Tensor | float]]:
        """The terms and their weights at t, without those that are the number 0."""
        here = [(s, w(t) if callable(w) else w) for s, w in self.terms]
        return [(s, w) for s, w in here if isinstance(w, Tensor) or w != 0]

    def factors(self, x: Tensor, t: Time) -> list[tuple[float, Tensor]]:
        """Those of the terms, to the powers of the weights.

        A term that is a ``factor`` p(o | x_t) to the power v multiplies the first density p:
        p^w p(o | x_t)^v = p^(w - v) (p p(o | x_t))^v, where p p(o | x_t) is a noised law.
        """
        found, conditions = list[tuple[float, Tensor]](), list[tuple[float, Tensor]]()
        for term, weight in self.terms:
            if (w := power(weight)) != 0:
                each = _factors(term, x, as_time(t), self._tweedie)
                into = conditions if getattr(term, "factor", False) else found
                into += [(w * v, s) for v, s in each]
        if not conditions or not found:
            return found + conditions
        w, s = found[0]
        found[0] = (w - sum(v for v, _ in conditions), s)
        return found + [(v, s + g) for v, g in conditions]

    def at_eta(self, eta: float) -> Score:
        """Of each term."""
        terms = [(s.at_eta(eta) if isinstance(s, Score) else s, w) for s, w in self.terms]
        same = all(a is b for (a, _), (b, _) in zip(terms, self.terms, strict=True))
        return self if same else Sum(terms)

    def rows(self, index: slice | Tensor) -> Score:
        """Each term and weight for these rows."""
        return Sum(
            [
                (s.rows(index) if isinstance(s, Score) else s, cut(weight, index))
                for s, weight in self.terms
            ]
        )

    def given(self, **context: Any) -> Score:
        """The context bound to each term."""
        return Sum([(s.given(**context) if isinstance(s, Score) else s, w) for s, w in self.terms])


def inherit(
    child: Score, parents: Sequence[ScoreFunction], bound: Mapping[str, object] | None = None
) -> None:
    """What is known of a score made of others, and of what is bound to it.

    The facts are those of the first that tells units, or else a shape, without the moments: a
    sum, or a score given its label, is the score of another law. All must agree on process, shape,
    units, device and batch. A tuned solver is passed on to a score given its label alone: that is
    what it was tuned for.

    Raises:
        ValueError: what two of them know differs.
    """
    known = [(type(s).__name__, s) for s in parents if isinstance(s, Score)]
    rows = [(n, len(v)) for n, v in (bound or {}).items() if isinstance(v, Tensor) and v.ndim]
    child.sde = _shared("process", [(n, s.sde) for n, s in known], _same_process)
    shape = _shared("shape", [(n, s.facts.shape) for n, s in known])
    _shared("system of units", [(n, s.facts.units) for n, s in known], Units.agrees)
    child.batch = _shared("batch size", [*((n, s.batch) for n, s in known), *rows])
    _shared("device", [(n, _home(s)) for n, s in known])
    child.singular = any(s.singular for _, s in known)
    child.eta = max((s.eta for _, s in known), default=0.0)
    child.end = max((s.end for _, s in known if s.end is not None), default=None)
    child.temperature = next((s.temperature for _, s in known if s.temperature != 1), 1.0)
    facts = [s.facts for _, s in known]
    told = min(facts, key=lambda f: (f.units is None, f.shape is None), default=Facts())
    child.facts = replace(told.of_another_law(), shape=shape)


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


def _factors(
    score: ScoreFunction, x: Tensor, t: Tensor, tweedie: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[tuple[float, Tensor]]:
    if isinstance(score, Score):
        return score.factors(x, t)
    return [(1.0, evaluate(score, x, t, tweedie).score)]
