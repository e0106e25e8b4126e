"""How a run goes: its length, its learning rate, and the width of its average.

The learning rate rises linearly and falls as a cosine of the *progress*, the part of the step or
of the time budget that is used, whichever is larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import as_integer, check_count, check_kind, set_number
from .layout import Layout


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, how smoothly.

    Args:
        steps: the most steps to take; 10,000 where no other end is given.
        minutes: the most minutes to take, saving included; a run that it ends depends on the
            machine's speed.
        epochs: the most times to see each item; the last step may see some once more.
        batch: samples in a step, in all processes together.
        accumulate: the parts of a batch that a process computes one after the other, for less
            memory; the step is the same.
        lr: peak learning rate of Adam, betas (0.9, 0.99); an optimiser of your own has its own.
        warmup: the part of the run in which the rate rises.
        clip: the largest norm of a gradient.
        ema: width of the average relative to the run (a standard deviation), in (0, 0.28).
        every: the most steps between two looks at the loss, for which the device is waited for.
        save_every: minutes between checkpoints, where there is a folder.
        snapshots: how often in the run two averages are stored, of width ``ema`` and half of it,
            from which ``average_of`` makes one of another width; 0 for never.
        layout: how the network computes; None for the fastest, which a few steps find.
        holdout: the share of the data that is not trained on, and on which the loss of the average
            is watched, on fixed times and noise.
        patience: end when that loss has not fallen for so many times the steps that it took to
            fall, with the weights that had the least; 1 ends a run whose best was at step k at
            step 2 k. None never does.
        seed: of batches, noise, times and dropout, and of what is held out.

    Raises:
        TypeError: no number.
        ValueError: a number out of its range, a count that is none.

    >>> sg.Recipe(steps=1000, batch=128, lr=1e-3, holdout=0.1).batch
    128
    """

    steps: int | None = None
    minutes: float | None = None
    epochs: float | None = None
    batch: int = 256
    accumulate: int = 1
    lr: float = 2e-3
    warmup: float = 0.05
    clip: float = 1.0
    ema: float = 0.1
    every: int = 10
    save_every: float = 5.0
    snapshots: int = 0
    layout: Layout | None = None
    holdout: float = 0.0
    patience: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None and self.epochs is None:
            object.__setattr__(self, "steps", 10_000)
        for name in ("steps", "batch", "accumulate", "every", "snapshots"):
            if name != "steps" or self.steps is not None:
                least = 0 if name == "snapshots" else 1
                object.__setattr__(self, name, check_count(getattr(self, name), name, least))
        check_kind(self.layout, (Layout, type(None)), "layout", "a Layout or None")
        seed = as_integer(self.seed)
        if seed is None:
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        object.__setattr__(self, "seed", seed)
        for name in ("minutes", "epochs", "patience", "lr", "clip", "save_every"):
            if getattr(self, name) is not None or name in ("lr", "clip", "save_every"):
                set_number(self, name, above=0)
        set_number(self, "holdout", least=0, below=1)
        if self.patience is not None and not self.holdout:
            raise ValueError("patience watches the loss of what is held out: give holdout too")
        set_number(self, "warmup", least=0, below=1)
        set_number(self, "ema", above=0)
        power_of_width(self.ema)

    def for_items(self, n: int) -> Recipe:
        """The recipe with its epochs of n items as steps."""
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * n / self.batch)
        return replace(self, steps=min(steps, self.steps or steps), epochs=None)

    def steps_for(self, seconds: float) -> float:
        """How many steps the run has where each part of a batch takes so many seconds."""
        each = seconds * self.accumulate
        return min(self.steps or math.inf, 60 * self.minutes / each if self.minutes else math.inf)


def adam(lr: float, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimiser where none is given."""
    fused = bool(parameters) and parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.Adam(parameters, lr, (0.9, 0.99), fused=fused)


def power_of_width(width: float) -> float:
    """The exponent gamma of a power-law average whose relative standard deviation is ``width``.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, section 3.1).

    >>> round(power_of_width(0.1), 2)
    6.94
    """
    widest = math.sqrt(1 / 12)
    if not 0 < width < widest:
        raise ValueError(f"ema must lie in (0, {widest:.3f}), got {width}")
    low, high = 0.0, 1 / width + 2
    for _ in range(60):
        gamma = (low + high) / 2
        wide = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > width**2
        low, high = (gamma, high) if wide else (low, gamma)
    return (low + high) / 2


def learning_rate(progress: float, warmup: float) -> float:
    """The rate relative to its peak: a line up, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
