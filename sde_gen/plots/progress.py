"""How a run goes: its loss over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .stills import COLOURS, QUIET, _axes, _plain, _titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTH = 50
"""Into so many stretches the steps are cut for the smooth line."""


def loss_curve(
    history: Iterable[tuple[int, float]],
    validation: Iterable[tuple[int, float]] = (),
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """The loss over the steps of a run: each look, and of many the means of fiftieths.

    Args:
        history: (step, loss) pairs, ``Trainer.history``.
        validation: such pairs of the loss on held-out data.
        title: above the axes.
        ax: draw there.

    Raises:
        ValueError: no finite loss.

    >>> figure = loss_curve([(1, 1.0), (100, 0.5), (200, 0.4)])
    """
    from matplotlib.ticker import MaxNLocator

    steps, losses = _finite(history)
    if len(steps) == 0:
        raise ValueError("history must hold one finite loss or more, got none")
    ax = _axes(ax, 6.0, 3.6)
    if len(steps) < 2 * _SMOOTH:
        ax.plot(steps, losses, color=COLOURS[0], lw=1.8, label="loss")
    else:
        ax.plot(steps, losses, color=QUIET, lw=0.7, alpha=0.45, label="loss")
        parts = np.array_split(np.arange(len(steps)), _SMOOTH)
        means = [(steps[part].mean(), losses[part].mean()) for part in parts]
        ax.plot(*zip(*means, strict=True), color=COLOURS[0], lw=1.8, label="its mean")
    held = _finite(validation)
    if len(held[0]):
        ax.plot(*held, color=COLOURS[1], lw=1.8, label="validation")
    low, high = np.quantile(np.concatenate([losses, held[1]]), [0.0, 0.98])
    if low > 0 and high > 3 * low:
        ax.set_yscale("log")
    elif high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.legend(frameon=False)
    _plain(ax)
    return _titled(ax, title)


def _finite(pairs: Iterable[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array([[float(a), float(b)] for a, b in pairs]).reshape(-1, 2)
    table = table[np.isfinite(table).all(1)]
    return table[:, 0], table[:, 1]
