"""Guidance: score terms that add.

By Bayes' rule grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x): an unconditional score
plus the gradient of a classifier of *noisy* data is exactly the conditional score. Scaling the
second term by 1 + gamma sharpens the condition; the sum is then no longer the score of any
noised law, and what comes out is neither p(x | y) nor proportional to p(x) p(y | x)^(1 + gamma).

- ``score + (1 + gamma) * Classifier(net, y, sde)``: Dhariwal & Nichol 2021, algorithm 1.
- ``ClassifierFree(score, y, weight)``: Ho & Salimans 2022, one batched call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .ops import Time, as_labels, as_time, full_precision, user_precision
from .scores import Given, Score
from .scores.base import Weight, as_weight, check_batch, cut, inherit, scale
from .scores.network import network_input
from .sdes import KernelSDE
from .sdes.evaluation import at_rest, read

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
        data_std: standard deviation of the data, as in ``ScoreNetwork``.

    Raises:
        ValueError: labels of a wrong number or out of range.
    """

    singular = True
    sde: KernelSDE

    def __init__(self, net: nn.Module, y: Labels, sde: KernelSDE, data_std: float = 1.0) -> None:
        self.net, self.sde, self.data_std = net, sde, data_std
        self.y = as_labels(y)
        self.batch = len(self.y) if self.y.ndim else None
        known = getattr(net, "shape", None)
        self.shape = None if known is None else tuple(known)
        if (self.y < 0).any():
            raise ValueError(f"labels must be >= 0, got {int(self.y.min())}")

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters(), torch.empty(0)).device

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        """log p(y | x_t) in nats, (B, *D) -> (B,)."""
        with at_rest(self.net):
            logits = self.net(*network_input(self.sde, self.data_std, x, t))
        y = _labels(self.y, x, logits.shape[1])
        return torch.log_softmax(logits.to(x.dtype), 1).gather(1, y.unsqueeze(1)).squeeze(1)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        return torch.func.grad(lambda x: self.log_prob(x, t).sum())(x)

    def given(self, **context: Any) -> Score:
        """``y=`` takes the place of its labels."""
        other = Classifier(self.net, context.pop("y", self.y), self.sde, self.data_std)
        return Given(other, context) if context else other

    def rows(self, index: slice | Tensor) -> Classifier:
        return Classifier(self.net, cut(self.y, index), self.sde, self.data_std)


def classifier_loss(
    net: nn.Module,
    sde: KernelSDE,
    x: Tensor,
    y: Tensor,
    t: Tensor,
    data_std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross-entropy of the labels given noisy data, (B,) nats, one time a sample.

    Args:
        net: ``net(x, c_noise)`` -> logits (B, classes).
        sde: a linear process.
        x, y: clean data (B, *D) and labels (B,).
        t: times (B,), positive.
    """
    half = user_precision(x.device.type)
    with full_precision(x.device.type):
        x_t = sde.perturb(x, t, generator).x
        seen = network_input(sde, data_std, x_t, t)
        with half:
            logits = net(*seen)
        y = _labels(as_labels(y), x, logits.shape[1])
        return cross_entropy(logits.to(x.dtype), y, reduction="none")


class ClassifierFree(Score):
    """(1 + weight) s(x, t | y) - weight s(x, t), in one batched call of a conditional network.

    weight = 0 is the conditional score. Ho & Salimans 2022, equation 6 (their w); a guidance
    scale w' of other libraries that multiplies the difference is 1 + weight.

    Args:
        score: a score that takes ``y=`` labels, with -1 for no label (trained by label dropout).
        y: labels, a number or (B,): a tensor, array or list of integers.
        weight: a number, one for each sample (B,), or a function of t; where it is the number 0
            only the conditional score is evaluated.

    Raises:
        TypeError, ValueError: labels that are no integers, out of range, or for another number of
            samples than the weights or what else is bound to the score.
    """

    def __init__(self, score: Score, y: Labels, weight: Weight = 1.0) -> None:
        self.score, self.weight = score, as_weight(weight)
        self.y = as_labels(y)
        inherit(self, [score], {"y": self.y, "weight": self.weight})
        classes: Any = getattr(score, "classes", None)
        _check_range(self.y, classes)

    @property
    def device(self) -> torch.device:
        return self.score.device

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        check_batch(self, x, "a label or weight")
        t = as_time(t)
        y = _labels(self.y, x, None)
        w = self.weight(t) if callable(self.weight) else self.weight
        if not isinstance(w, Tensor) and w == 0:
            return read(self.score.given(y=y), x, t)
        both = torch.cat([y, torch.full_like(y, -1)])
        times = torch.cat([t, t]) if t.ndim else t
        # Whatever else is bound per sample is needed twice as well.
        score = self.score.rows(torch.arange(len(x)).repeat(2)).given(y=both)
        given, free = read(score, torch.cat([x, x]), times).chunk(2)
        return given + scale(w, given - free)

    def given(self, **context: Any) -> ClassifierFree:
        """``y=`` takes the place of its labels."""
        y = context.pop("y", self.y)
        score = self.score.given(**context) if context else self.score
        return ClassifierFree(score, y, self.weight)

    def rows(self, index: slice | Tensor) -> ClassifierFree:
        return ClassifierFree(self.score.rows(index), cut(self.y, index), cut(self.weight, index))


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
