"""Weights of scores: a number, one for each sample, or a function of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from ..ops import as_real, match

Weight = float | Tensor | Callable[[Tensor], Tensor | float]
"""A number, one for each sample (B,), or a function of time (a guidance interval)."""


def as_weight(weight: Any) -> Weight:
    """A weight as it is kept: a number, a tensor () or (B,), or a function of t."""
    if hasattr(weight, "denoise"):
        raise TypeError(
            "scores add, as densities multiply: a weight is a number, or a function of t"
        )
    if isinstance(weight, Tensor | np.ndarray | list | tuple):
        rows = as_real(weight, "a weight")
        if rows.ndim > 1:
            raise ValueError(f"a weight must be a number or (B,), got shape {tuple(rows.shape)}")
        return rows
    if isinstance(weight, Real):
        return float(weight)
    if not callable(weight):
        raise TypeError(f"a weight must be a number or a function of t, got {weight!r}")
    return weight


def power(weight: Weight) -> float:
    """A weight as the power of a density, one number for all.

    Raises:
        TypeError: a function of t, or numbers of their own for samples.
    """
    if isinstance(weight, Tensor) and weight.ndim == 0:
        return float(weight)
    if callable(weight) or isinstance(weight, Tensor):
        raise TypeError(f"a power of a density is one number, got the weight {weight!r}")
    return weight


def total(parts: Sequence[tuple[Tensor | float, Tensor]]) -> Tensor:
    """sum_i w_i s_i."""
    each = [scale(w, s) for w, s in parts]
    return sum(each[1:], each[0])


def scale(w: Tensor | float, s: Tensor) -> Tensor:
    """w s for a weight at its time, a number, () or (B,)."""
    if isinstance(w, Tensor):
        return match(w, s) * s
    return s if w == 1 else w * s
