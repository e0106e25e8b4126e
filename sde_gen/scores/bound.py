"""What is bound to a score: labels, observations, conditions, one row a sample or one for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..networks.context import is_of
from ..ops import as_labels, shown


@dataclass(frozen=True, eq=False)
class Shared:
    """A value that is one for all samples, made by ``shared``.

    >>> type(sg.shared(torch.zeros(3))).__name__
    'Shared'
    """

    value: Tensor


def shared(value: Tensor | np.ndarray | Sequence[float]) -> Shared:
    """Mark what is bound to a score as the same for all samples: ``score.given(y=shared(row))``.

    The network gets it as one row a sample, (B, *value.shape), like everything else.

    >>> sg.Gaussian(sg.VP(), torch.zeros(2)).given(y=sg.shared(torch.zeros(3))).batch is None
    True
    """
    return Shared(torch.as_tensor(value))


def check_batch(score: Any, x: Tensor, what: str) -> None:
    """Raise ``ValueError`` unless the score is bound for as many samples as the state has."""
    if score.batch not in (None, len(x)):
        raise ValueError(f"{what} was given for {score.batch} samples, the state has {len(x)}")


def cut(value: Any, index: slice | Tensor) -> Any:
    """The rows of a tensor that has one a sample; whatever else is for all samples stays.

    Raises:
        ValueError: rows that are not there.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    n = len(value)
    if isinstance(index, slice):
        bad = max(index.start or 0, index.stop or 0) > n
    elif index.dtype == torch.bool:
        bad = len(index) != n
    else:
        index = index.to(value.device)
        # Only where the check costs no synchronisation with a device.
        bad = index.device.type == "cpu" and bool((index >= n).any())
    if bad:
        raise ValueError(f"rows {index} were asked of what was given for {n} samples")
    return value[index]


def rows_of(score: Any, x: Tensor) -> dict[str, Any]:
    """What is bound to a score (``.context``), one row a sample of x."""
    check_batch(score, x, ", ".join(score.context))
    return expanded(score.context, len(x))


def expanded(context: Mapping[str, Any], n: int) -> dict[str, Any]:
    """What is bound, one row for each of n samples."""
    return {name: _repeat(value, n) for name, value in context.items()}


def bound(score: Any, context: Mapping[str, Any]) -> dict[str, Any]:
    """Context as a score keeps it: numbers, arrays and lists of numbers are tensors on its device,
    labels are int64, and what has the shape of one condition is ``Shared``.

    Raises:
        TypeError: labels that are no integers. ValueError: a shape that is not the condition's.
    """
    kept = {}
    for name, value in context.items():
        value = _bound(value, score.device)
        if name == "y" and score.classes is not None and isinstance(value, Tensor):
            value = as_labels(value)
        if (shape := score.takes.get(name)) is not None and not isinstance(value, Shared):
            value = _told(name, value, shape)
        kept[name] = value
    return kept


def _told(name: str, value: Any, shape: tuple[int | None, ...]) -> Tensor | Shared:
    """A condition of a known shape: one for all, or rows (N, *shape)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be numbers, got {shown(value)}")
    value = value if value.is_floating_point() else value.float()
    if shape == (1,) and value.ndim < 2 and value.shape != (1,):
        value = value[..., None]  # a number, or one a sample
    if is_of(value.shape, shape):
        return Shared(value)
    if value.ndim and is_of(value.shape[1:], shape):
        return value
    wanted = ", ".join("L" if n is None else str(n) for n in shape)
    raise ValueError(f"{name} must be ({wanted}) or (N, {wanted}), got {tuple(value.shape)}")


def _repeat(value: Any, n: int) -> Any:
    """What is for all samples as n rows."""
    if isinstance(value, Shared):
        return value.value.expand(n, *value.value.shape)
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.expand(n)
    return value


def _bound(value: Any, device: torch.device) -> Any:
    """Context as it is kept: numbers, arrays and lists of numbers are tensors."""
    if isinstance(value, Shared):
        return Shared(value.value.to(device))
    if isinstance(value, int | float | np.generic) and not isinstance(value, bool):
        return torch.as_tensor(value, device=device)
    if not isinstance(value, np.ndarray | list | tuple):
        return value
    try:
        array = np.array(value)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths, or no numbers
        return value
    return torch.as_tensor(array, device=device) if array.dtype.kind in "biufc" else value
