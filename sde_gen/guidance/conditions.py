"""Guidance by a network that takes conditions, in one batched call.

- ``ClassifierFree(score, weight, y=labels, theta=vectors)``: Ho & Salimans 2022.
- ``Composed(score, [(2.0, {"y": 3}), (-1.0, {"y": 5})])``: several conditions, each with its own
  weight, negative where it is to be avoided: Liu et al. 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import Time, as_labels, as_time, check_kind
from ..scores import Score
from ..scores.base import Around, inherit
from ..scores.bound import bound, check_batch, cut, expanded
from ..scores.weights import Weight, as_weight, power, scale
from ..sdes import Evaluation
from .classifier import check_range

Part = tuple[Tensor | float, dict[str, Any]]
"""A coefficient, and the conditions of the score that it multiplies, one row a sample."""


class _Conditional(Around):
    """A linear combination of one score under several conditions; the coefficients sum to 1."""

    nothing: dict[str, Any]

    def _bind(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Conditions as they are kept, each one of whose absence something is known."""
        score, kept = self.score, bound(self.score, context)
        for name in kept.keys() - {"y"} - self.nothing.keys() - score.takes.keys():
            raise ValueError(
                f"the score does not say how it knows that {name!r} is absent: its network should"
                f" declare it, context={{{name!r}: shape}}, or nothing={{{name!r}: ...}} tell it"
            )
        if "y" in kept and "y" not in self.nothing:
            kept["y"] = as_labels(kept["y"])
            check_range(kept["y"], score.classes)
        return kept

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """The combination of the scores, (B, *D)."""
        return self.evaluate(x, t).score

    def _parts(self, x: Tensor, t: Tensor) -> list[Part]:
        """Coefficients and conditions at this time; those that are the number 0 are left out."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """One call of the score, on as many times the batch as there are parts; its denoised
        states combine as scores do."""
        guided = self.given(**context) if context else self
        assert isinstance(guided, _Conditional)
        weights, e = guided._read(x, t)
        if len(weights) == 1 and not isinstance(weights[0], Tensor) and weights[0] == 1:
            return e

        def combined(parts: Tensor) -> Tensor:
            each = [scale(w, s) for w, s in zip(weights, parts.chunk(len(weights)), strict=True)]
            return sum(each[1:], each[0])

        head = None if e.head is None else e.head[: len(x)]
        return Evaluation(combined(e.score), lambda: combined(e.denoised), head)

    def factors(self, x: Tensor, t: Time) -> list[tuple[float, Tensor]]:
        """Each part with its power."""
        weights, e = self._read(x, t)
        scores = e.score.chunk(len(weights))
        return [(power(w), s) for w, s in zip(weights, scores, strict=True)]

    def _read(self, x: Tensor, t: Time) -> tuple[list[Tensor | float], Evaluation]:
        """The coefficients, and one evaluation of all parts below each other."""
        check_batch(self, x, "a condition or weight")
        t = as_time(t)
        parts = [(w, c) for w, c in self._parts(x, t) if isinstance(w, Tensor) or w != 0]
        n, weights = len(parts), [w for w, _ in parts]
        if n == 1:
            return weights, self.score.given(**parts[0][1]).evaluate(x, t)
        rows = {name: torch.cat([c[name] for _, c in parts]) for name in parts[0][1]}
        # Whatever else is bound per sample is needed as often.
        often = self.score.rows(torch.arange(len(x)).repeat(n)).given(**rows)
        return weights, often.evaluate(torch.cat([x] * n), t.repeat(n) if t.ndim else t)

    def _absent(self, name: str, given: Tensor) -> Tensor:
        """Rows for as many samples of which this condition is not known."""
        if name not in self.nothing:
            return torch.full_like(given, torch.nan if given.is_floating_point() else -1)
        return torch.as_tensor(self.nothing[name]).to(given).expand_as(given)

    def at_eta(self, eta: float) -> Score:
        """Of the score at that noise level."""
        other = copy.copy(self)
        other.score = self.score.at_eta(eta)
        return self if other.score is self.score else other


class ClassifierFree(_Conditional):
    """(1 + weight) s(x, t | context) - weight s(x, t), in one batched call of a network.

    weight = 0 is the conditional score. Ho & Salimans 2022, equation 6 (their w); a guidance
    scale w' of other libraries that multiplies the difference is 1 + weight.

    What is bound here is what guides; what ``score.given`` has bound before stands in both terms.
    In the second one labels are -1, and vectors, images and sequences NaN: what a network that
    was trained with dropout of its conditions knows as nothing.

    Args:
        score: a score that takes the conditions.
        weight: a number, one for each sample (B,), or a function of t (``Interval``,
            ``AtLevel``); where it is the number 0 only the conditional score is evaluated.
        nothing: what else stands for the absence of a condition, by its name: for networks from
            elsewhere, ``{"encoder_hidden_states": encoding_of_no_text}``; one for all.
        context: conditions as in ``given``: ``y=labels``, ``theta=vectors``.

    Raises:
        TypeError, ValueError: no condition, or one of whose absence nothing is known; labels that
            are no integers, out of range, or for another number of samples than the weights or
            what else is bound to the score.

    >>> model = sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1, classes=3), sg.VP())
    >>> sg.sample(sg.ClassifierFree(model, 2.0, y=1), 8, steps=3, seed=0).shape
    torch.Size([8, 2])
    """

    def __init__(
        self,
        score: Score,
        weight: Weight = 1.0,
        *,
        nothing: Mapping[str, Any] | None = None,
        **context: Any,
    ) -> None:
        check_kind(score, Score, "score", "a Score that takes conditions")
        if not context:
            raise TypeError("nothing to guide by: ClassifierFree(score, weight, y=labels)")
        self.score, self.weight, self.nothing = score, as_weight(weight), dict(nothing or {})
        self.context = self._bind(context)
        inherit(self, [score], {**self.context, "weight": self.weight})

    def _parts(self, x: Tensor, t: Tensor) -> list[Part]:
        w = self.weight(t) if callable(self.weight) else self.weight
        rows = expanded(self.context, len(x))
        return [(1 + w, rows), (-w, {name: self._absent(name, v) for name, v in rows.items()})]

    def given(self, **context: Any) -> ClassifierFree:
        """What guides takes the place of what did; all else is bound to the score."""
        mine = {name: context.pop(name, value) for name, value in self.context.items()}
        score = self.score.given(**context) if context else self.score
        return ClassifierFree(score, self.weight, nothing=self.nothing, **mine)

    def rows(self, index: slice | Tensor) -> ClassifierFree:
        """The same with the conditions and weights of these rows."""
        context = {name: cut(value, index) for name, value in self.context.items()}
        score, weight = self.score.rows(index), cut(self.weight, index)
        return ClassifierFree(score, weight, nothing=self.nothing, **context)


class Composed(_Conditional):
    """s(x, t) + sum_i w_i (s(x, t | c_i) - s(x, t)), in one batched call of a network.

    Conditions that are independent given x, all at once (Liu et al. 2022); one with
    w_i < 0 is kept away from (their negation). A condition with weight 1 + w alone is
    ``ClassifierFree`` with weight w. In each term what other conditions bind is absent.

    Args:
        score: a score that takes the conditions.
        conditions: pairs of a weight, as in ``ClassifierFree``, and a mapping of conditions as in
            ``given``.
        nothing: as in ``ClassifierFree``.

    Raises:
        TypeError, ValueError: as ``ClassifierFree``; no condition; by ``given``, for what guides.

    >>> from sde_gen import VP, ScoreNetwork
    >>> from sde_gen.networks import MLP
    >>> model = ScoreNetwork(MLP((2,), classes=9), VP())
    >>> score = Composed(model, [(2.0, {"y": 3}), (-0.5, {"y": 5})])
    >>> score(torch.zeros(4, 2), 0.5).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        score: Score,
        conditions: Sequence[tuple[Weight, Mapping[str, Any]]],
        *,
        nothing: Mapping[str, Any] | None = None,
    ) -> None:
        check_kind(score, Score, "score", "a Score that takes conditions")
        self.score, self.nothing = score, dict(nothing or {})
        wanted = "nothing to guide by: Composed(score, [(weight, {'y': label}), ...])"
        check_pairs(conditions, wanted)
        if not all(isinstance(context, Mapping) and context for _, context in conditions):
            raise TypeError(wanted)
        self.conditions = [(as_weight(w), self._bind(context)) for w, context in conditions]
        told = {f"weight {i}": w for i, (w, _) in enumerate(self.conditions)}
        for i, (_, context) in enumerate(self.conditions):
            told |= {f"{name} {i}": value for name, value in context.items()}
        inherit(self, [score], told)

    def _parts(self, x: Tensor, t: Tensor) -> list[Part]:
        each = [expanded(context, len(x)) for _, context in self.conditions]
        nothing = {n: self._absent(n, v) for rows in each for n, v in rows.items()}
        weights = [w(t) if callable(w) else w for w, _ in self.conditions]
        free = (1 - sum(weights), nothing)
        return [*((w, {**nothing, **rows}) for w, rows in zip(weights, each, strict=True)), free]

    def given(self, **context: Any) -> Composed:
        """All is bound to the score: what guides is told by its place and stays."""
        for name in context.keys() & {name for _, c in self.conditions for name in c}:
            raise ValueError(f"{name!r} guides here, in several terms maybe: compose anew")
        return Composed(self.score.given(**context), self.conditions, nothing=self.nothing)

    def rows(self, index: slice | Tensor) -> Composed:
        """The same with the conditions and weights of these rows."""
        conditions = [
            (cut(w, index), {name: cut(v, index) for name, v in context.items()})
            for w, context in self.conditions
        ]
        return Composed(self.score.rows(index), conditions, nothing=self.nothing)


def check_pairs(pairs: object, message: str) -> None:
    """Raise ``TypeError`` unless it is one pair or more."""
    given = pairs if isinstance(pairs, Sequence) else ()
    if not given or not all(isinstance(p, tuple | list) and len(p) == 2 for p in given):
        raise TypeError(message)
