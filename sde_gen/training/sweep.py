"""Which learning rates serve: one short run in which the rate rises (Smith 2017)."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import check_count, check_number
from .layout import Layout
from .recipe import Recipe
from .trainer import Trainer, TrainingError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .trainer import Options

_SPREAD = 4.0
"""A mean of losses that is so many times the least has diverged."""


@dataclass(frozen=True)
class RateTest:
    """What ``learning_rate_test`` saw.

    Attributes:
        rates, losses: (n,) float64, the rate of each step and the loss of the next batch; fewer
            than were asked for where it diverged.
        smooth: the losses as means over a tenth of the steps.
        best: the rate where the smooth loss falls fastest as the rate grows.
        largest: the rate past which it no longer falls.

    >>> rates, losses = torch.tensor([1e-4, 1e-3, 1e-2]), torch.tensor([1.0, 0.9, 0.5])
    >>> sg.training.RateTest(rates, losses).losses.min()
    tensor(0.5000)
    """

    rates: Tensor
    losses: Tensor

    @property
    def smooth(self) -> Tensor:
        """Means of the losses, weighted by a triangle over a tenth of all steps on either side."""
        n = len(self.losses)
        i = torch.arange(n, dtype=torch.float64)
        w = (1 - (i - i[:, None]).abs() / max(n / 10, 1)).clamp_min(0)
        return (w @ self.losses) / w.sum(1)

    @property
    def largest(self) -> float:
        """The rate with the least smooth loss: a step beyond it costs more than it gains."""
        return float(self.rates[self.smooth.argmin()])

    @property
    def best(self) -> float:
        """The rate of the steepest fall before ``largest``: a peak rate to begin with."""
        fall = self.smooth.diff()[: max(1, int(self.smooth.argmin()))]
        return float(self.rates[fall.argmin()])


def learning_rate_test(
    model: nn.Module,
    data: object,
    labels: Tensor | None = None,
    recipe: Recipe | None = None,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 200,
    **options: Unpack[Options],
) -> RateTest:
    """Take steps of a copy of the model while the rate grows from ``low`` to ``high``.

    It grows by the same factor each step (Smith 2017, "Cyclical learning rates", section 3.3,
    with a line there), and the run ends early where the loss diverges. The model stays as it is.

    Args:
        model, data, labels, recipe, options: as in ``train``; length, rate and folder are not
            used.
        low, high: the range of rates, 0 < low < high.
        steps: how many.

    Raises:
        ValueError: a range that is none, a model that diverges before it has taken three steps.

    >>> model = sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1), sg.VP(), facts=sg.Facts((2,)))
    >>> test = sg.training.learning_rate_test(model, torch.randn(64, 2), steps=20, device="cpu")
    >>> test.best < test.largest
    True
    """
    low, high = (check_number(v, n, above=0) for v, n in ((low, "low"), (high, "high")))
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    steps = check_count(steps, "steps", 3) + 1
    recipe = Recipe() if recipe is None else recipe
    recipe = replace(recipe, steps=steps, minutes=None, every=1, lr=high, snapshots=0)
    recipe = replace(recipe, layout=recipe.layout or Layout())
    options = {**options, "folder": None, "overwrite": False}
    sweep = _Sweep(copy.deepcopy(model), data, labels, recipe, **options)
    sweep.lowest, sweep.callbacks = low / high, [_stop]
    sweep._peaks = [high * peak / max(sweep._peaks) for peak in sweep._peaks]
    with suppress(TrainingError, _Diverged):
        sweep.run(progress=False)
    losses = torch.tensor([loss for _, loss in sweep.history[1:]], dtype=torch.float64)
    if len(losses) < 3:
        raise ValueError(f"the loss diverges at once: take low below {low}")
    part = torch.arange(len(losses), dtype=torch.float64) / (steps - 2)
    return RateTest(low * (high / low) ** part, losses)


class _Diverged(Exception):
    pass


class _Sweep(Trainer[Any]):
    lowest: float = 1.0

    def _rate(self, ahead: float = 0.0) -> float:
        """The geometric sequence from the lowest rate to 1."""
        last = max(1, (self.recipe.steps or 0) - 2)
        return self.lowest ** (1 - self.step / last)


def _stop(trainer: Trainer[Any], step: int, loss: float) -> None:
    losses = [loss for _, loss in trainer.history]
    means = [sum(losses[i : i + 5]) / 5 for i in range(len(losses) - 4)]
    if not math.isfinite(loss) or (means and means[-1] > _SPREAD * abs(min(means))):
        raise _Diverged
