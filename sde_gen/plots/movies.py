"""Movies: an animated GIF each."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from .stills import COLOURS, QUIET, Extent, _array, _contours, _plain


@dataclass(frozen=True)
class Movie:
    """An animated GIF: shown where it is a notebook cell's last value, or saved."""

    gif: bytes = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_bytes(self.gif)

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.gif).decode()
        return f'<img alt="animation" src="data:image/gif;base64,{data}" />'


def movie_2d(
    paths: Tensor,
    extent: Extent = (-2, 2, -2, 2),
    log_density: Callable[[Tensor], Tensor] | None = None,
    captions: Sequence[str] | None = None,
    groups: Tensor | None = None,
    fps: float = 12,
) -> Movie:
    """A cloud of points in motion; the last frame is held for a second.

    Args:
        paths: (N, B, 2), as ``solve(..., trajectory=True)`` gives them, a frame each.
        extent: the part of the plane.
        log_density: (M, 2) -> (M,), whose contours are drawn below.
        captions: one for each frame.
        groups: (B,) integers that colour the points.
        fps: frames a second.

    Raises:
        ValueError: paths of another shape, or captions that are not one a frame.
    """
    x = _array(paths)
    if x.ndim != 3 or x.shape[2] != 2:
        raise ValueError(f"paths must be (N, B, 2), got {x.shape}")
    if captions is not None and len(captions) != len(x):
        raise ValueError(f"captions must be one for each of {len(x)} frames, got {len(captions)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(4.4, 4.4), layout="constrained", dpi=72)
    canvas, ax = FigureCanvasAgg(figure), figure.subplots()
    if log_density is not None:
        _contours(ax, log_density, extent)
    index = np.zeros(x.shape[1], int) if groups is None else groups.cpu().numpy()
    colours = [COLOURS[i % len(COLOURS)] for i in index]
    u, v = x[0].T
    cloud = ax.scatter(u, v, s=6, c=colours, lw=0, alpha=0.8)
    ax.set(aspect="equal", xlim=extent[:2], ylim=extent[2:])
    _plain(ax)
    palette = Image.new("P", (1, 1))
    palette.putpalette(_shades())
    frames: list[Image.Image] = []
    for i, state in enumerate(x):
        cloud.set_offsets(state)
        ax.set_title(captions[i] if captions else "", fontsize="medium")
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        frames.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    file = io.BytesIO()
    duration = [round(1000 / fps)] * (len(frames) - 1) + [1000]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return Movie(file.getvalue())


def _shades() -> list[int]:
    """Every colour, and a quiet grey, in ten shades towards white, then white: r, g, b, r, ..."""
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (*COLOURS, QUIET)])
    shades = 255 + np.linspace(0.1, 1, 10)[:, None, None] * (colours - 255)
    return [*shades.round().astype(int).flatten().tolist(), 255, 255, 255]
