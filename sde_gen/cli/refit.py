"""``sde-gen train --refit``: a run finds how far to go, and another goes as far with all data."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .reading import Data, say

if TYPE_CHECKING:
    from ..training import Recipe
    from ..training.validation import Validation

FIRST = "first"
"""The folder, in that of a run, of the one that found how long it is to be."""


def is_refitted(options: argparse.Namespace, recipe: Recipe, data: Data) -> bool:
    """Whether all data are trained on anew once a run has found its end: if asked for, or for a
    table whose run has no other end."""
    if options.refit is None:
        length = (options.steps, options.minutes, options.epochs)
        return bool(data.table and recipe.patience and length == (None, None, None))
    if options.refit and not recipe.holdout:
        raise ValueError("--refit trains on what is held out too, and nothing is: give --holdout")
    return bool(options.refit)


def again(options: argparse.Namespace, recipe: Recipe, found: Validation, n: int) -> Recipe:
    """The recipe of a run on all n data that goes as far as the one that was found; said."""
    steps = _as_far(recipe, found.step)
    say(
        f"the loss on what is held out was least after {found.step} steps (that model:"
        f" {Path(options.out) / FIRST}); now all {n} data, for {steps} steps (--no-refit: not)"
    )
    return replace(recipe, steps=steps, epochs=None, holdout=0.0, patience=None)


def _as_far(recipe: Recipe, step: int) -> int:
    """The steps of a whole run whose learning rates add up to those of this one so far.

    How far a network has come is the time of the gradient flow, the sum of its rates, and not the
    number of steps: the best step of a long run may lie where the rate still rises. Over a whole
    run its mean is half the peak. Where time alone ends the run it is the same number of steps.
    """
    from ..training.recipe import learning_rate

    if recipe.steps is None:
        return step
    rates = (learning_rate((i + 0.5) / recipe.steps, recipe.warmup) for i in range(step))
    return max(1, round(2 * sum(rates)))
