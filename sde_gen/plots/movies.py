"""Movies: an animated GIF each."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .given import array, limits, plane_paths, words
from .stills import COLOURS, QUIET, Extent, _contours, _plain, _titled

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Movie:
    """An animated GIF: shown where it is a notebook cell's last value, or saved.

    >>> movie = movie_2d(torch.zeros(3, 8, 2))
    """

    gif: bytes = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_bytes(self.gif)

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.gif).decode()
        return f'<img alt="animation" src="data:image/gif;base64,{data}" />'


def movie_2d(
    paths: Tensor | ArrayLike,
    extent: Extent = (-2, 2, -2, 2),
    log_density: Callable[[Tensor], Tensor] | None = None,
    captions: Iterable[object] | None = None,
    groups: Tensor | ArrayLike | None = None,
    fps: float = 12,
) -> Movie:
    """A cloud of points in motion; the last frame is held for a second.

    A path that is not finite is left out, and counted.

    Args:
        paths: (N, B, 2), as ``solve(..., trajectory=True)`` gives them, a frame each.
        extent: the part of the plane.
        log_density: (M, 2) -> (M,), whose contours are drawn below.
        captions: one for each frame.
        groups: (B,) integers that colour the points.
        fps: frames a second.

    Raises:
        ValueError: paths of another shape or none that is finite, captions that are not one a
            frame, groups that are not one a path, or fps out of range.

    >>> movie = movie_2d(torch.zeros(3, 8, 2), fps=12)
    """
    whole = array(paths, "paths")
    x, lost = plane_paths(whole)
    titles = [""] * len(x) if captions is None else words(captions, "captions", len(x), "frames")
    index = np.zeros(whole.shape[1]) if groups is None else array(groups, "groups")
    whole_numbers = np.isfinite(index).all() and not (index % 1).any()
    if index.shape != whole.shape[1:2] or not whole_numbers:
        raise ValueError(f"groups must be ({whole.shape[1]},) integers, got {index.shape}")
    index = index[np.isfinite(whole).all((0, 2))].astype(int)
    left, right, bottom, top = limits(extent, "(left, right, bottom, top)")
    rate = array(fps, "fps")
    if rate.shape or not 0.01 <= rate <= 1000:
        raise ValueError(f"fps must be a number in 0.01 .. 1000, got {fps!r}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(4.4, 4.4), layout="constrained", dpi=72)
    canvas, ax = FigureCanvasAgg(figure), figure.subplots()
    if log_density is not None:
        _contours(ax, log_density, extent)
    colours = [COLOURS[i % len(COLOURS)] for i in index]
    u, v = x[0].T
    cloud = ax.scatter(u, v, s=6, c=colours, lw=0, alpha=0.8)
    ax.set(aspect="equal", xlim=(left, right), ylim=(bottom, top))
    _plain(ax)
    palette = Image.new("P", (1, 1))
    palette.putpalette(_shades())
    frames: list[Image.Image] = []
    for state, title in zip(x, titles, strict=True):
        cloud.set_offsets(state)
        _titled(ax, title, lost)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        frames.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    file = io.BytesIO()
    duration = [round(1000 / float(rate))] * (len(frames) - 1) + [1000]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return Movie(file.getvalue())


def _shades() -> list[int]:
    """Every colour, and a quiet grey, in ten shades towards white, then white: r, g, b, r, ..."""
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (*COLOURS, QUIET)])
    shades = 255 + np.linspace(0.1, 1, 10)[:, None, None] * (colours - 255)
    return [*shades.round().astype(int).flatten().tolist(), 255, 255, 255]
