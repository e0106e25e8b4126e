"""Signals: what has channels and one axis of places or times."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..ops import check_count
from .given import array, finite, heading, listed, words
from .stills import COLOURS, QUIET, _figure, _plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def signals(
    x: Tensor | ArrayLike,
    at: Tensor | ArrayLike | None = None,
    rows: int | None = None,
    labels: Iterable[object] | None = None,
    channels: Iterable[object] | None = None,
    title: str = "",
) -> Figure:
    """Signals on a grid, filled row by row: a panel each, a colour a channel, one scale for all.

    A signal that is not finite is left out, and counted.

    Args:
        x: (N, C, L), or (N, L) of one channel.
        at: the places or times of the values, (L,); None numbers them.
        rows: how many rows; None makes the grid about square.
        labels: one for each row, written on its left, or one for each signal, above it.
        channels: the names of the channels, for a legend.
        title: above the grid.

    Raises:
        ValueError: x of another shape or none that is finite, places that do not fit, rows outside
            1 .. N, labels that are neither one a row nor one a signal.

    >>> import torch
    >>> t = torch.linspace(0, 1, 50)
    >>> waves = torch.sin(6.28 * torch.arange(1, 7).unsqueeze(1) * t)
    >>> figure = signals(waves, t, rows=2, labels=["low", "high"])
    """
    y = array(x, "x")
    y = y[:, None] if y.ndim == 2 else y
    if y.ndim != 3 or y.size == 0:
        raise ValueError(f"x must be (N, C, L) or (N, L), got {y.shape}")
    n, count, length = y.shape
    t = np.arange(length, dtype=float) if at is None else array(at, "at")
    if t.shape != (length,) or not np.isfinite(t).all():
        raise ValueError(f"at must be ({length},) beside this x, finite, got {t.shape}")
    rows = math.isqrt(n) if rows is None else check_count(rows, "rows")
    if rows > n:
        raise ValueError(f"rows must lie in 1 .. {n}, got {rows}")
    named = None if labels is None else listed(labels, "labels")
    each = named is not None and len(named) == n != rows
    names = words(named, "labels", n if each else rows, "rows") if named is not None else []
    legend = [] if channels is None else words(channels, "channels", count, "channels")
    _, lost = finite(y, 0, "signals")
    above = heading(title, lost)
    columns = -(-n // rows)
    figure = _figure(max(3.2, min(12.0, 2.4 * columns)), max(2.0, 1.2 * rows + 0.5))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, ax in enumerate(panels.flat):
        if i >= n:
            ax.set_visible(False)
            panels.flat[i - columns].tick_params(labelbottom=True)
            continue
        for c in range(count if np.isfinite(y[i]).all() else 0):
            colour = COLOURS[c % len(COLOURS)]
            ax.plot(t, y[i, c], color=colour, lw=1, label=legend[c] if legend else None)
        _plain(ax)
        ax.tick_params(colors=QUIET, labelsize="x-small")
        if each:
            ax.set_title(names[i], fontsize="small", color=QUIET)
        elif names and i % columns == 0:
            ax.set_ylabel(names[i // columns], rotation=0, ha="right", va="center", color=QUIET)
    if legend:
        handles, said = next(h for ax in panels.flat if (h := ax.get_legend_handles_labels())[0])
        figure.legend(handles, said, loc="outside lower center", ncols=count, frameon=False)
    if above:
        figure.suptitle(above, fontsize="medium")
    return figure
