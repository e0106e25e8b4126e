"""Guidance by a classifier of noisy data.

By Bayes' rule grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x): an unconditional score
plus the gradient of a classifier of *noisy* data is exactly the conditional score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..facts import Facts
from ..noise import Source
from ..ops import (
    Time,
    as_labels,
    check_callable,
    check_kind,
    check_number,
    check_state,
    full_precision,
    user_precision,
)
from ..scores import Given, Score
from ..scores.bound import cut
from ..scores.network import fitted, network_input, shaped
from ..sdes import KernelSDE, at_rest

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
    factor = True
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


def _labels(y: Labels, x: Tensor, classes: int | None) -> Tensor:
    """Labels as (B,) int64 on the device of x, checked."""
    y = as_labels(y)
    check_range(y, classes)
    if y.ndim == 0:
        return y.to(x.device).expand(len(x))
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels must be a number or ({len(x)},), got {tuple(y.shape)}")
    return y.to(x.device)


def check_range(y: Tensor, classes: int | None) -> None:
    """Raise ``ValueError`` for a label that is no class."""
    # Only where the check costs no synchronisation with a device.
    if classes is not None and y.device.type == "cpu" and ((y < 0) | (y >= classes)).any():
        bad = int(y[(y < 0) | (y >= classes)].flatten()[0])
        raise ValueError(f"labels must lie in 0 .. {classes - 1}, got {bad}")
