"""Images on a grid, every pixel of each of them shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..ops import check_count
from .given import array, heading, left_out, listed, words
from .stills import QUIET, _titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

DPI, SIDE, WIDEST = 150, 90, 1800
"""Pixels an inch; of an image that is small, and of a grid of small ones, at most."""
CLOSE = 0.05
"""What lies so little outside [-1, 1] is not told."""
TITLE, SMALL = 12.0, 8.33
"""Points."""


def image_grid(
    x: Tensor | ArrayLike | Sequence[Tensor],
    rows: int | None = None,
    labels: Iterable[object] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Images on a grid, filled row by row; in a figure of its own each at its full resolution,
    small ones enlarged by a whole number.

    Args:
        x: (N, 1, H, W) grey or (N, 3, H, W) colour, in [-1, 1], or integers 0 .. 255 as uint8; or
            a list of such tensors, one for each row. What lies outside is clipped, and its share
            told below the grid. The place of an image that is not finite stays white.
        rows: how many rows; None makes the grid about square.
        labels: one for each row, written on its left, or one for each image, below it.
        title: above the grid.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: x of another shape, rows outside 1 .. N, or labels that are neither one a row
            nor one an image.

    >>> figure = image_grid(torch.rand(6, 3, 8, 8) * 2 - 1, rows=2)
    """
    images, empty, rows = _images(x, rows)
    n, _, height, width = images.shape
    columns = -(-n // rows)
    words_of = None if labels is None else listed(labels, "labels")
    each = words_of is not None and len(words_of) == n != rows
    if words_of is not None and not each:
        words(words_of, "labels", rows, "rows")
    bad = ~np.isfinite(images).all((1, 2, 3)) & ~empty
    note = _outside(images[~bad & ~empty])
    images = np.where((bad | empty)[:, None, None, None], 1.0, images)
    side = min(SIDE, WIDEST / max(rows, columns))
    zoom = max(1, round(side / max(height, width)))
    foot = math.ceil(1.9 * SMALL * DPI / 72 / zoom) if each else 0
    tiled, gap = _tile(images, rows, columns, foot)
    names = None if each else words_of
    above = heading(title, left_out(bad[~empty], "images"))
    if ax is None:
        ax = _exact_axes(tiled.shape[1] * zoom, tiled.shape[0] * zoom, above, names or [], note)
    figure = _drawn(ax, tiled, above)
    _name_rows(ax, names, (tiled.shape[0] - gap) / rows, gap, foot)
    for i, word in enumerate(words_of if each and words_of else []):
        left = gap + (i % columns) * (width + gap) + width / 2 - 0.5
        top = gap + (i // columns) * (height + gap + foot) + height + 6 / zoom
        ax.text(left, top, word, ha="center", va="top", fontsize=SMALL, color=QUIET)
    ax.set_xlabel(note, fontsize=SMALL, color=QUIET)
    return figure


def _images(x: object, rows: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Images in [-1, 1], which of them are places that stay empty, and the number of rows."""
    parts: list[object] = [x]
    if isinstance(x, list | tuple) and x and all(getattr(p, "ndim", 0) == 4 for p in x):
        if rows is not None:
            raise ValueError(f"a list of rows has {len(x)} of them: leave rows away")
        parts, rows = list(x), len(x)
    found = [_scaled(part) for part in parts]
    for part in found:
        one = part.ndim == 4 and part.shape[1] in (1, 3) and part.shape[1:] == found[0].shape[1:]
        if not one or max(map(len, found)) == 0 or 0 in part.shape[1:]:
            raise ValueError(f"x must be (N, 1, H, W) or (N, 3, H, W), got {part.shape}")
    longest = max(map(len, found))
    empty = np.concatenate([np.arange(longest) >= len(part) for part in found])
    blank = np.zeros((longest, *found[0].shape[1:]), np.float32)
    images = np.concatenate([np.concatenate([p, blank[len(p) :]]) for p in found])
    n = len(images)
    rows = math.isqrt(n) if rows is None else check_count(rows, "rows")
    if rows > n:
        raise ValueError(f"rows must lie in 1 .. {n}, got {rows}")
    return images, empty, rows


def _scaled(x: object) -> np.ndarray:
    """Values of which -1 is black and 1 white."""
    kind = str(getattr(x, "dtype", ""))
    values = array(x, "x").astype(np.float32)
    return values / 127.5 - 1 if kind.endswith("uint8") else values


def _outside(images: np.ndarray) -> str:
    """A word on values that are clipped."""
    out = np.abs(images) > 1 + CLOSE
    if not out.any():
        return ""
    return f"{out.mean():.2g} of the values lie outside [-1, 1], up to {np.abs(images).max():.3g}"


def _exact_axes(width: int, height: int, title: str, names: list[str], note: str) -> Axes:
    """Axes of so many pixels, in a figure with room for what is written around them."""
    from matplotlib.figure import Figure

    pad, lines = 12, title.count("\n") + 1 if title else 0
    left = pad + (round(max(_width(name, SMALL) for name in names)) + 10 if names else 0)
    top = pad + round(lines * 1.6 * TITLE * DPI / 72)
    bottom = pad + (round(2 * SMALL * DPI / 72) if note else 0)
    wide = max(left + width + pad, round(max(_width(title, TITLE), _width(note, SMALL))) + 2 * pad)
    tall = top + height + bottom
    left += max(0, (wide - left - width - pad) // 2)
    figure = Figure(figsize=(wide / DPI, tall / DPI), dpi=DPI)
    return figure.add_axes((left / wide, bottom / tall, width / wide, height / tall))


def _width(text: str, points: float) -> float:
    """Pixels."""
    from matplotlib.textpath import TextPath

    lines = [line for line in text.split("\n") if line.strip()]
    return max((TextPath((0, 0), s, size=points).get_extents().x1 for s in lines), default=0) * (
        DPI / 72
    )


def _drawn(ax: Axes, tiled: np.ndarray, title: str) -> Figure:
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be an Axes of matplotlib or None, got {ax!r}")
    ax.imshow(tiled, interpolation="nearest")
    ax.set_xticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return _titled(ax, title)


def _name_rows(ax: Axes, names: list[str] | None, step: float, gap: int, foot: int) -> None:
    n = len(names or [])
    ax.set_yticks(gap + step * np.arange(n) + (step - gap - foot) / 2 - 0.5 if names else [])
    if names:
        ax.set_yticklabels(names)
    ax.tick_params(length=0, labelcolor=QUIET)


def _tile(images: np.ndarray, rows: int, columns: int, foot: int) -> tuple[np.ndarray, int]:
    """One picture (height, width, 3) in [0, 1] with a white gap around each image, and below it a
    foot for its name, and the gap."""
    n, _, height, width = images.shape
    gap = max(1, round(min(height, width) / 16))
    images = np.broadcast_to((images + 1) / 2, (n, 3, height, width)).clip(0, 1)
    tall, wide = height + gap + foot, width + gap
    padded = np.ones((rows * columns, 3, tall, wide), np.float32)
    padded[:n, :, :height, :width] = images
    tiled = padded.reshape(rows, columns, 3, tall, wide).transpose(0, 3, 1, 4, 2)
    tiled = tiled.reshape(rows * tall, columns * wide, 3)
    return np.pad(tiled, ((gap, 0), (gap, 0), (0, 0)), constant_values=1), gap
