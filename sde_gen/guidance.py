"""Guidance: score terms that add.

By Bayes' rule grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x): an unconditional score
plus the gradient of a classifier of *noisy* data is exactly the conditional score. Scaling the
second term by 1 + gamma sharpens the condition; the sum is then no longer the score of any
noised law, and what comes out is neither p(x | y) nor proportional to p(x) p(y | x)^(1 + gamma).

- ``score + (1 + gamma) * Classifier(net, y, sde)``: Dhariwal & Nichol 2021, algorithm 1.
- ``ClassifierFree(score, y, weight)``: Ho & Salimans 2022, one batched call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .ops import Time, as_time, full_precision, match, user_precision
from .scores import Score
from .scores.base import Weight, inherit
from .scores.network import network_input
from .sdes import KernelSDE


class Classifier(Score):
    """grad_x log p(y | x_t) of a classifier of noisy data.

    The gradient goes through ``torch.func.grad``, so it works under ``no_grad`` and can itself
    be differentiated (a guided model still has a likelihood).

    Args:
        net: ``net(x, c_noise)`` -> logits (B, classes), trained by ``classifier_loss``.
        y: labels, a number or (B,) int64.
        sde: the linear process that noised the data.
        data_std: standard deviation of the data, as in ``ScoreNetwork``.

    Raises:
        ValueError: labels of a wrong number or out of range.
    """

    singular = True
    sde: KernelSDE

    def __init__(
        self, net: nn.Module, y: int | Tensor, sde: KernelSDE, data_std: float = 1.0
    ) -> None:
        self.net, self.sde, self.data_std = net, sde, data_std
        self.y = _integers(y)
        self.shape = getattr(net, "shape", None)
        if (self.y < 0).any():
            raise ValueError(f"labels must be >= 0, got {int(self.y.min())}")

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters(), torch.empty(0)).device

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        """log p(y | x_t) in nats, (B, *D) -> (B,)."""
        logits = self.net(*network_input(self.sde, self.data_std, x, t))
        y = _labels(self.y, x, logits.shape[1])
        return torch.log_softmax(logits.to(x.dtype), 1).gather(1, y.unsqueeze(1)).squeeze(1)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        return torch.func.grad(lambda x: self.log_prob(x, t).sum())(x)

    def rows(self, index: slice | Tensor) -> Classifier:
        y = self.y[index] if self.y.ndim else self.y
        return Classifier(self.net, y, self.sde, self.data_std)


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
        y = _labels(y, x, logits.shape[1])
        return cross_entropy(logits.to(x.dtype), y, reduction="none")


class ClassifierFree(Score):
    """(1 + weight) s(x, t | y) - weight s(x, t), in one batched call of a conditional network.

    weight = 0 is the conditional score. Ho & Salimans 2022, equation 6 (their w); a guidance
    scale w' of other libraries that multiplies the difference is 1 + weight.

    Args:
        score: a score that takes ``y=`` labels, with -1 for no label (trained by label dropout).
        y: labels, a number or (B,) int64.
        weight: a number, or a function of t; where it is the number 0 only the conditional
            score is evaluated.
    """

    def __init__(self, score: Score, y: int | Tensor, weight: Weight = 1.0) -> None:
        self.score, self.weight = score, weight
        self.y = _integers(y)
        inherit(self, [score])
        classes: Any = getattr(score, "classes", None)
        _check_range(self.y, classes)

    @property
    def device(self) -> torch.device:
        return self.score.device

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        t = as_time(t)
        y = _labels(self.y, x, None)
        w = self.weight(t) if callable(self.weight) else self.weight
        if not isinstance(w, Tensor) and w == 0:
            return self.score.given(y=y)(x, t)
        both = torch.cat([y, torch.full_like(y, -1)])
        times = torch.cat([t, t]) if t.ndim else t
        # Whatever else is bound per sample is needed twice as well.
        score = self.score.rows(torch.arange(len(x)).repeat(2)).given(y=both)
        given, free = score(torch.cat([x, x]), times).chunk(2)
        w = match(w, x) if isinstance(w, Tensor) else w
        return given + w * (given - free)

    def given(self, **context: Any) -> ClassifierFree:
        return ClassifierFree(self.score.given(**context), self.y, self.weight)

    def rows(self, index: slice | Tensor) -> ClassifierFree:
        y = self.y[index] if self.y.ndim else self.y
        return ClassifierFree(self.score.rows(index), y, self.weight)


def _integers(y: int | Tensor) -> Tensor:
    labels = torch.as_tensor(y)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    return labels.to(torch.int64)


def _labels(y: Tensor, x: Tensor, classes: int | None) -> Tensor:
    """Labels as (B,) int64 on the device of x, checked."""
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
