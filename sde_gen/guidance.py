"""Guidance: score terms that add.

By Bayes' rule grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x): an unconditional score
plus the gradient of a classifier of *noisy* data is exactly the conditional score. Scaling the
second term by 1 + gamma sharpens the condition; the sum is then no longer the score of any
noised law, and what comes out is neither p(x | y) nor proportional to p(x) p(y | x)^(1 + gamma).

- ``score + (1 + gamma) * Classifier(net, y, sde)``: Dhariwal & Nichol 2021, algorithm 1.
- ``ClassifierFree(score, weight, y=labels, theta=vectors)``: Ho & Salimans 2022, one batched call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .facts import Facts
from .noise import Source
from .ops import (
    Time,
    as_labels,
    as_time,
    check_callable,
    check_kind,
    check_number,
    check_state,
    full_precision,
    user_precision,
)
from .scores import Given, Score
from .scores.base import Weight, as_weight, inherit, scale
from .scores.bound import bound, check_batch, cut, rows_of
from .scores.network import fitted, network_input, shaped
from .sdes import Evaluation, KernelSDE, at_rest

__all__ = ["Classifier", "ClassifierFree", "classifier_loss"]

Labels = int | Sequence[int] | np.ndarray | Tensor


class Classifier(Score):
    """grad_x log p(y | x_t) of a classifier of noisy data.

    The gradient goes through ``torch.func.grad``, so it works under ``no_grad`` and can itself
    be differentiated (a guided model still has a likelihood).

    Args:
        net: ``net(x, c_noise)`` -> logits (B, classes), trained by ``classifier_loss``; whatever
            mode it is in, it is read in evaluation mode.
        y: labels, a number or (B,): a tensor, array or list of integers.
        sde: the linear process that noised the data.
        facts: what is known of the data, as in ``ScoreNetwork``.

    Raises:
        ValueError: labels of a wrong number or out of range.

    >>> term = sg.Classifier(sg.networks.MLP((2,), 8, 1, outputs=3), 1, sg.VP())
    >>> (sg.Gaussian(sg.VP(), torch.zeros(2)) + 2 * term)(torch.zeros(8, 2), 0.5).shape
    torch.Size([8, 2])
    """

    singular = True
    sde: KernelSDE

    def __init__(
        self, net: nn.Module, y: Labels, sde: KernelSDE, facts: Facts | None = None
    ) -> None:
        check_kind(facts, (Facts, type(None)), "facts", "Facts")
        self.net, self.sde = net, sde
        self.y = as_labels(y)
        self.batch = len(self.y) if self.y.ndim else None
        self.facts = shaped(Facts() if facts is None else facts, getattr(net, "shape", None))
        if (self.y < 0).any():
            raise ValueError(f"labels must be >= 0, got {int(self.y.min())}")

    @property
    def device(self) -> torch.device:
        """Where the classifier is."""
        return next(self.net.parameters(), torch.empty(0)).device

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        """log p(y | x_t) in nats, (B, *D) -> (B,)."""
        with at_rest(self.net):
            seen = network_input(self.sde, self.facts.std, x, t)
            logits = self.net(*fitted(self.net, *seen))
        y = _labels(self.y, x, logits.shape[1])
        return torch.log_softmax(logits.to(x.dtype), 1).gather(1, y.unsqueeze(1)).squeeze(1)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """The gradient by x of ``log_prob``, (B, *D)."""
        check_state(x)
        return torch.func.grad(lambda x: self.log_prob(x, t).sum())(x)

    def given(self, **context: Any) -> Score:
        """``y=`` takes the place of its labels."""
        other = Classifier(self.net, context.pop("y", self.y), self.sde, self.facts)
        return Given(other, context) if context else other

    def rows(self, index: slice | Tensor) -> Classifier:
        """The same with the labels of these rows."""
        return Classifier(self.net, cut(self.y, index), self.sde, self.facts)


def classifier_loss(
    net: nn.Module,
    sde: KernelSDE,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    data_std: float = 1.0,
    noise: Source = None,
) -> Tensor:
    """Cross-entropy of the labels given noisy data, (B,) nats, one time a sample.

    Args:
        net: ``net(x, c_noise)`` -> logits (B, classes).
        sde: a linear process.
        x, y: clean data (B, *D) and labels (B,).
        t: times (B,), positive.
        noise: of the noisy data, as in ``sde.perturb``.

    >>> net, y, t = sg.networks.MLP((2,), 8, 1, outputs=3), torch.tensor([0, 1]), torch.ones(2)
    >>> sg.guidance.classifier_loss(net, sg.VP(), torch.zeros(2, 2), y, t).shape
    torch.Size([2])
    """
    check_callable(net, "net", "net(x, c_noise)")
    check_kind(sde, KernelSDE, "sde", "a LinearSDE, such as VP()")
    check_state(x)
    data_std = check_number(data_std, "data_std", above=0)
    half = user_precision(x.device.type)
    with full_precision(x.device.type):
        x_t = sde.perturb(x, t, noise).x
        seen = fitted(net, *network_input(sde, data_std, x_t, t))
        with half:
            logits = net(*seen)
        y = _labels(as_labels(y), x, logits.shape[1])
        return cross_entropy(logits.to(x.dtype), y, reduction="none")


class ClassifierFree(Score):
    """(1 + weight) s(x, t | context) - weight s(x, t), in one batched call of a network.

    weight = 0 is the conditional score. Ho & Salimans 2022, equation 6 (their w); a guidance
    scale w' of other libraries that multiplies the difference is 1 + weight.

    What is bound here is what guides; what ``score.given`` has bound before stands in both terms.
    In the second one labels are -1, and vectors, images and sequences NaN: what a network that
    was trained with dropout of its conditions knows as nothing.

    Args:
        score: a score that takes the conditions.
        weight: a number, one for each sample (B,), or a function of t; where it is the number 0
            only the conditional score is evaluated.
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
        self.score, self.weight = score, as_weight(weight)
        self.context, self.nothing = bound(score, context), dict(nothing or {})
        for name in self.context.keys() - {"y"} - self.nothing.keys() - score.takes.keys():
            raise ValueError(
                f"the score does not say how it knows that {name!r} is absent: its network should"
                f" declare it, context={{{name!r}: shape}}, or nothing={{{name!r}: ...}} tell it"
            )
        if "y" in self.context and "y" not in self.nothing:
            self.context["y"] = as_labels(self.context["y"])
            _check_range(self.context["y"], score.classes)
        inherit(self, [score], {**self.context, "weight": self.weight})

    @property
    def device(self) -> torch.device:
        """That of the score."""
        return self.score.device

    @property
    def takes(self) -> Mapping[str, tuple[int | None, ...]]:
        """Those of the score."""
        return self.score.takes

    @property
    def classes(self) -> int | None:
        """Those of the score."""
        return self.score.classes

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """(1 + weight) s(x, t | context) - weight s(x, t), (B, *D)."""
        return self.evaluate(x, t).score

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """One call of the score, on twice the batch; its denoised states combine as scores do."""
        score = self.given(**context) if context else self
        check_batch(score, x, f"{', '.join(score.context)} or weight")
        t, rows = as_time(t), rows_of(score, x)
        w = score.weight(t) if callable(score.weight) else score.weight
        if not isinstance(w, Tensor) and w == 0:
            return score.score.given(**rows).evaluate(x, t)
        both = {name: torch.cat([v, score._absent(name, v)]) for name, v in rows.items()}
        times = torch.cat([t, t]) if t.ndim else t
        # Whatever else is bound per sample is needed twice as well.
        twice = score.score.rows(torch.arange(len(x)).repeat(2)).given(**both)
        e = twice.evaluate(torch.cat([x, x]), times)

        def guided(both: Tensor) -> Tensor:
            given, free = both.chunk(2)
            return given + scale(w, given - free)

        head = None if e.head is None else e.head[: len(x)]
        return Evaluation(guided(e.score), lambda: guided(e.denoised), head)

    def _absent(self, name: str, given: Tensor) -> Tensor:
        """Rows for as many samples of which this condition is not known."""
        if name not in self.nothing:
            return torch.full_like(given, torch.nan if given.is_floating_point() else -1)
        return torch.as_tensor(self.nothing[name]).to(given).expand_as(given)

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


def _labels(y: Labels, x: Tensor, classes: int | None) -> Tensor:
    """Labels as (B,) int64 on the device of x, checked."""
    y = as_labels(y)
    _check_range(y, classes)
    if y.ndim == 0:
        return y.to(x.device).expand(len(x))
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels must be a number or ({len(x)},), got {tuple(y.shape)}")
    return y.to(x.device)


def _check_range(y: Tensor, classes: int | None) -> None:
    # Only where the check costs no synchronisation with a device.
    if classes is not None and y.device.type == "cpu" and ((y < 0) | (y >= classes)).any():
        bad = int(y[(y < 0) | (y >= classes)].flatten()[0])
        raise ValueError(f"labels must lie in 0 .. {classes - 1}, got {bad}")
