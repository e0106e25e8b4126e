"""The loss on data that are held out, and the end that it may put to a run.

It is the loss of the *average*, which is what a run returns, at set steps and on the same items,
times and noise every time: its changes are those of the weights alone. A network that has begun to
learn its data by heart has a falling loss on them and a rising one here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Reader
from .recipe import Recipe

SAMPLES = 1024
"""How many samples a look takes: the items in turn, over again with other noise where they are
fewer, the first of them where they are more."""
LEAST = 100
"""Steps without a lower loss that are waited for in any case."""


class Validation:
    """Looks at the loss on what is held out, after 10, 20, ..., 100 steps and from then on
    whenever the number of steps has grown by a tenth: as the average spans the same part of a run
    however long it is, so do two looks.

    Attributes:
        losses: (step, loss), one for each look.
        best: the weights of the average that had the least, where the recipe has a ``patience``.
    """

    def __init__(self, reader: Reader, objective: Any, recipe: Recipe) -> None:
        self._reader, self._objective, self._recipe = reader, objective, recipe
        self.losses: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Whether there is a look after this step."""
        if not self._recipe.holdout or step < 10:
            return False
        look = 10
        while look < step:
            look += max(10, look // 10)
        return look == step

    @torch.no_grad()
    def loss(self, model: nn.Module) -> Tensor:
        """The mean loss of a model on what is held out, without dropout."""
        n, was_training = self._recipe.batch, model.training
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        total = torch.zeros((), dtype=torch.float64)
        model.eval()
        for first in range(0, SAMPLES, n):
            x, y, noise = self._reader.held(first, min(n, SAMPLES - first), place)
            total += self._objective(model, x, y, noise).sum().double().cpu()
        model.train(was_training)
        return total / SAMPLES

    def take(self, step: int, loss: float, average: nn.Module) -> None:
        """Note the loss after a step, and the weights if they are the best so far."""
        is_best = loss < min((found for _, found in self.losses), default=math.inf)
        self.losses.append((step, loss))
        if self._recipe.patience is not None and is_best:
            self.best = {name: value.clone() for name, value in average.state_dict().items()}

    def give_best(self, average: nn.Module) -> None:
        """Give the average the weights that had the least loss, where they are kept."""
        if self.best:
            average.load_state_dict(self.best)

    @contextmanager
    def best_of(self, average: nn.Module) -> Iterator[None]:
        """The average with the weights that had the least loss, while this lasts."""
        now = {name: value.clone() for name, value in average.state_dict().items()}
        self.give_best(average)
        try:
            yield
        finally:
            if self.best:
                average.load_state_dict(now)

    @property
    def is_over(self) -> bool:
        """Whether the patience with the loss is at its end."""
        if self._recipe.patience is None or not self.losses:
            return False
        return self.losses[-1][0] >= self.step + max(LEAST, self._recipe.patience * self.step)

    @property
    def step(self) -> int:
        """After how many steps the loss was least; looks there must be."""
        return min(self.losses, key=lambda look: look[1])[0]

    @property
    def note(self) -> str:
        """What a bar shows of it."""
        return f", held out {self.losses[-1][1]:.4f}" if self.losses else ""
