"""Stills: one matplotlib ``Figure`` each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
QUIET = "#5f6b76"
Extent = tuple[float, float, float, float]
"""The part of the plane that is shown: (left, right, bottom, top)."""


class Clock(Protocol):
    """What ``noise_schedule`` reads: any ``LinearSDE``."""

    @property
    def T(self) -> float: ...
    def alpha(self, t: Tensor, /) -> Tensor: ...
    def sigma(self, t: Tensor, /) -> Tensor: ...
    def log_snr(self, t: Tensor, /) -> Tensor: ...


def image_grid(
    x: Tensor,
    rows: int | None = None,
    labels: Sequence[object] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Images on a grid, filled row by row.

    Args:
        x: (N, 1, H, W) grey or (N, 3, H, W) colour, in [-1, 1]; what lies outside is clipped.
        rows: how many rows; None makes the grid about square.
        labels: one for each row, written on its left.
        title: above the grid.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: x of another shape, rows outside 1 .. N, or labels that are not one a row.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ValueError(f"x must be (N, 1, H, W) or (N, 3, H, W), got {tuple(x.shape)}")
    rows = math.isqrt(len(x)) if rows is None else rows
    if not 1 <= rows <= len(x):
        raise ValueError(f"rows must lie in 1 .. {len(x)}, got {rows}")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"labels must be one for each of {rows} rows, got {len(labels)}")
    columns = -(-len(x) // rows)
    tiled, gap = _tile(_array(x), rows, columns)
    height, width = tiled.shape[:2]
    if ax is None:
        scale = min(0.6, 12 / max(rows, columns))
        ax = _axes(max(2.5, scale * columns + 0.3), scale * columns * height / width + 0.3)
    ax.imshow(tiled, interpolation="nearest")
    ax.set_xticks([])
    step = (height - gap) / rows
    ax.set_yticks(gap + step * np.arange(rows) + (step - gap) / 2 - 0.5 if labels else [])
    if labels:
        ax.set_yticklabels([str(label) for label in labels])
    ax.tick_params(length=0, labelcolor=QUIET)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return _titled(ax, title)


def trajectories_1d(times: Tensor | Sequence[float], paths: Tensor, title: str = "") -> Figure:
    """Paths of one coordinate over time, with the law of their values at both ends.

    Time runs from left to right in the order of ``times``, so a generation goes from T to 0. The
    colour of a path is its last value.

    Args:
        times: (N,).
        paths: (N, B) or (N, B, 1), as ``solve(..., trajectory=True)`` gives them.
        title: above the plot.

    Raises:
        ValueError: shapes that do not fit.
    """
    t, x = _array(torch.as_tensor(times)), _array(paths)
    x = x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x
    if x.ndim != 2 or t.shape != x.shape[:1]:
        raise ValueError(f"expected (N,) and (N, B), got {t.shape} and {tuple(paths.shape)}")
    from matplotlib.collections import LineCollection

    figure = _figure(8.5, 4)
    left, ax, right = figure.subplots(1, 3, sharey=True, width_ratios=[1, 6, 1])
    lines = np.stack([np.broadcast_to(t[:, None], x.shape), x], axis=-1).swapaxes(0, 1)
    alpha = min(0.9, max(0.15, 20 / x.shape[1]))
    ax.add_collection(
        LineCollection(list(lines), array=x[-1], cmap=_viridis(), alpha=alpha, lw=0.8)
    )
    ax.set_title(title, fontsize="medium")
    ax.set(xlabel="time $t$", xlim=(t[0], t[-1]))
    for side, values, time in ((left, x[0], t[0]), (right, x[-1], t[-1])):
        bins = min(60, max(10, math.isqrt(len(values))))
        side.hist(values, bins, density=True, orientation="horizontal", color=QUIET, alpha=0.7)
        side.set_title(f"$t = {time:.3g}$", fontsize="small", color=QUIET)
        side.set_xticks([])
        _plain(side)
    left.invert_xaxis()
    left.set_ylabel("state $x$")
    margin = 0.04 * float(np.ptp(x)) or 1.0
    ax.set_ylim(x.min() - margin, x.max() + margin)
    _plain(ax)
    return figure


def density_over_time(
    log_density: Callable[[Tensor, Tensor], Tensor],
    times: Tensor | Sequence[float],
    paths: Tensor | None = None,
    extent: tuple[float, float] = (-3, 3),
    shown: int = 40,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """The law of one coordinate over time as an image, with paths on it.

    Time runs from left to right in the order of ``times``. Brightness is the square root of the
    density, so that tails show, and saturates where the law is narrow.

    Args:
        log_density: (x (M, 1) float32, t) -> (M,), in nats: the ``log_prob`` of an exact score.
        times: (N,), monotone.
        paths: (N, B) or (N, B, 1) to lay over it, one state a time.
        extent: the part of the line that is shown.
        shown: how many paths to trace.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: an extent without length, or paths that do not fit the times.
    """
    t = _array(torch.as_tensor(times))
    low, high = extent
    if not low < high:
        raise ValueError(f"extent must be (low, high), rising, got {extent}")
    x = (torch.arange(300) + 0.5).unsqueeze(1) / 300 * (high - low) + low
    columns = np.linspace(t[0], t[-1], 240)
    with torch.no_grad():
        p = np.stack([_array(log_density(x, torch.tensor(u)).exp()) for u in columns], 1)
    ax = ax or _axes(8, 3.8)
    root = np.sqrt(p)
    ax.imshow(
        root,
        origin="lower",
        aspect="auto",
        extent=(t[0], t[-1], low, high),
        cmap="magma",
        vmin=0,
        vmax=1.5 * float(np.quantile(root.max(0), 0.5)),
    )
    if paths is not None:
        lines = _array(paths.reshape(paths.shape[0], -1)[:, :shown])
        if len(lines) != len(t):
            raise ValueError(f"paths must have one state a time, {len(t)}, got {len(lines)}")
        ax.plot(t, lines, color="white", lw=0.6, alpha=0.6)
    ax.set(xlabel="time $t$", ylabel="state $x$", xlim=(t[0], t[-1]), ylim=extent)
    return _titled(ax, title)


def trajectories_2d(
    paths: Tensor, shown: int = 200, title: str = "", ax: Axes | None = None
) -> Figure:
    """Paths in the plane: where they start (grey), where they end (blue), and how they get there.

    Args:
        paths: (N, B, 2), as ``solve(..., trajectory=True)`` gives them.
        shown: how many paths to trace; the ends of all are drawn.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: paths of another shape.
    """
    x = _array(paths)
    if x.ndim != 3 or x.shape[2] != 2:
        raise ValueError(f"paths must be (N, B, 2), got {x.shape}")
    from matplotlib.collections import LineCollection

    ax = ax or _axes(5.6, 5.2)
    lines = x[:, :shown].swapaxes(0, 1)
    alpha = min(0.8, max(0.2, 60 / len(lines)))
    ax.add_collection(LineCollection(list(lines), color=COLOURS[4], alpha=alpha, lw=0.7))
    for ends, colour, label in ((x[0], QUIET, "start"), (x[-1], COLOURS[0], "end")):
        u, v = ends.T
        ax.scatter(u, v, s=5, color=colour, alpha=0.7, lw=0, label=label, zorder=3)
    ax.legend(frameon=False, markerscale=3, loc="upper right")
    ax.set_aspect("equal")
    ax.autoscale_view()
    _plain(ax)
    return _titled(ax, title)


def density_2d(
    log_density: Callable[[Tensor], Tensor],
    extent: Extent = (-2, 2, -2, 2),
    points: Tensor | None = None,
    resolution: int = 200,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A density in the plane.

    Args:
        log_density: (M, 2) float32 -> (M,), in nats.
        extent: the part of the plane.
        points: samples (N, 2) to lay over it.
        resolution: pixels along a side.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: an extent without area, or a callable that does not return (M,).
    """
    grid = _mesh(extent, resolution)
    with torch.no_grad():
        p = _array(log_density(grid).double().exp())
    if p.shape != (len(grid),):
        raise ValueError(f"log_density must return ({len(grid)},), got {p.shape}")
    ax = ax or _axes(5.8, 4.8)
    image = ax.imshow(
        p.reshape(resolution, resolution), origin="lower", extent=extent, cmap="magma", vmin=0
    )
    _colour_bar(ax, image, "density")
    if points is not None:
        u, v = _array(points).T
        ax.scatter(u, v, s=4, color="white", alpha=0.6, lw=0)
        ax.set(xlim=extent[:2], ylim=extent[2:])
    return _titled(ax, title)


def score_field(
    score: Callable[[Tensor], Tensor],
    extent: Extent = (-2, 2, -2, 2),
    log_density: Callable[[Tensor], Tensor] | None = None,
    arrows: int = 25,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A vector field in the plane: arrows of one length for direction, colour for magnitude.

    Args:
        score: (M, 2) float32 -> (M, 2); for a score at time t, ``lambda x: score(x, t)``.
        extent: the part of the plane.
        log_density: (M, 2) -> (M,), whose contours are drawn below.
        arrows: how many along a side.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: an extent without area, or a callable that returns another shape.
    """
    grid = _mesh(extent, arrows)
    with torch.no_grad():
        s = _array(score(grid))
    if s.shape != (len(grid), 2):
        raise ValueError(f"score must return ({len(grid)}, 2), got {s.shape}")
    from matplotlib.colors import LogNorm

    ax = ax or _axes(5.8, 4.8)
    if log_density is not None:
        _contours(ax, log_density, extent)
    size = np.linalg.norm(s, axis=1)
    least = max(float(np.quantile(size, 0.02)), float(size.max()) * 1e-3, 1e-12)
    unit = s / np.maximum(size, 1e-2 * least)[:, None]
    field = ax.quiver(
        *_array(grid).T,
        *unit.T,
        size.clip(least),
        norm=LogNorm(least, max(float(size.max()), 2 * least)),
        cmap=_viridis(),
        pivot="mid",
        scale=1.25 * arrows,
    )
    _colour_bar(ax, field, r"$\|s(x)\|$")
    ax.set(aspect="equal", xlim=extent[:2], ylim=extent[2:])
    return _titled(ax, title)


def noise_schedule(sdes: Clock | Mapping[str, Clock], n: int = 400) -> Figure:
    """alpha, sigma and log-SNR over time, of one linear SDE or of several by name.

    Time is shown as t / T, from T / n to T. sigma is logarithmic where it exceeds 10.

    Args:
        sdes: one, or several by name.
        n: points of each curve.
    """
    named: Mapping[str, Clock] = sdes if isinstance(sdes, Mapping) else {"": sdes}
    figure = _figure(9.5, 3.2)
    panels = figure.subplots(1, 3)
    titles = (r"signal $\alpha(t)$", r"noise $\sigma(t)$", r"log-SNR $\log\,\alpha^2/\sigma^2$")
    u = torch.arange(1, n + 1, dtype=torch.float64) / n
    curves: list[list[np.ndarray]] = [[], [], []]
    for i, (name, sde) in enumerate(named.items()):
        t = u * sde.T
        style = {"color": COLOURS[i % len(COLOURS)], "ls": ("-", "--", "-.", ":")[i % 4]}
        for ax, values, kept in zip(
            panels, (sde.alpha(t), sde.sigma(t), sde.log_snr(t)), curves, strict=True
        ):
            kept.append(_array(values))
            ax.plot(_array(u), kept[-1], lw=1.8, label=name, **style)
    for ax, title, kept in zip(panels, titles, curves, strict=True):
        ax.set_title(title, fontsize="medium")
        ax.set(xlabel="$t / T$", xlim=(0, 1))
        ax.grid(alpha=0.25, lw=0.6)
        if ax is panels[1] and max(k.max() for k in kept) > 10:
            ax.set_yscale("log")
        _plain(ax)
    if len(named) > 1:
        panels[0].legend(frameon=False, fontsize="small")
    return figure


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _axes(width: float, height: float) -> Axes:
    return _figure(width, height).subplots()


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize="small")


def _titled(ax: Axes, title: str) -> Figure:
    ax.set_title(title, fontsize="medium")
    ax.tick_params(labelsize="small")
    return cast("Figure", ax.figure)


def _viridis() -> Colormap:
    """viridis without its brightest end, which a line on white needs."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.85, 256)))


def _colour_bar(ax: Axes, drawn: Any, label: str) -> None:
    bar = ax.figure.colorbar(drawn, ax=ax, label=label, shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", labelsize="small")


def _tile(images: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """One picture (height, width, 3) in [0, 1] with a white gap around each image, and the gap."""
    n, _, height, width = images.shape
    gap = max(1, round(min(height, width) / 16))
    images = np.broadcast_to((images + 1) / 2, (n, 3, height, width)).clip(0, 1)
    padded = np.ones((rows * columns, 3, height + gap, width + gap))
    padded[:n, :, :height, :width] = images
    tiled = padded.reshape(rows, columns, 3, height + gap, width + gap).transpose(0, 3, 1, 4, 2)
    tiled = tiled.reshape(rows * (height + gap), columns * (width + gap), 3)
    return np.pad(tiled, ((gap, 0), (gap, 0), (0, 0)), constant_values=1), gap


def _mesh(extent: Extent, n: int) -> Tensor:
    """The centres of n x n pixels, (n^2, 2) float32, row by row from below."""
    left, right, bottom, top = extent
    if not (left < right and bottom < top):
        raise ValueError(f"extent must be (left, right, bottom, top), rising, got {extent}")
    u = (torch.arange(n) + 0.5) / n
    y, x = torch.meshgrid(bottom + (top - bottom) * u, left + (right - left) * u, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def _contours(ax: Axes, log_density: Callable[[Tensor], Tensor], extent: Extent) -> None:
    n = 150
    grid = _mesh(extent, n)
    with torch.no_grad():
        p = _array(log_density(grid).double())
    x, y = _array(grid).T.reshape(2, n, n)
    levels = p.max() - np.array([8.0, 5.0, 3.0, 2.0, 1.0, 0.3])
    z = p.reshape(n, n)
    ax.contour(x, y, z, levels, colors=QUIET, linewidths=0.7, linestyles="solid", alpha=0.5)
