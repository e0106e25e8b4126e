"""The bar of a run: how far it is, what a step takes, and how many fit."""

from __future__ import annotations

import math
from typing import Any

from .history import Look
from .recipe import Recipe


def bar_of(show: bool) -> Any:
    """A bar of hundredths of the budget."""
    if show:
        from tqdm.auto import tqdm
    else:  # tqdm.auto looks for a notebook and may warn that it found none
        from tqdm import tqdm

    form = "{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}{postfix}"
    return tqdm(total=100, desc="training", bar_format=form, disable=not show, leave=True)


def tell(bar: Any, look: Look, progress: float, recipe: Recipe, note: str = "") -> None:
    """Move the bar to the look, after this part of the budget; the note follows the loss."""
    steps = math.ceil(look.step / progress - 1e-6)
    fit = str(steps) if recipe.minutes is None else f"about {steps}"
    each = f"{recipe.batch / look.samples:.2g} s each"
    told = f"loss {look.loss:.4f}{note}, step {look.step} of {fit}, {each}"
    bar.set_postfix_str(told, refresh=False)
    bar.update(round(100 * progress, 1) - bar.n)
