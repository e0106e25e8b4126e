"""Stills: one matplotlib ``Figure`` each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..ops import check_count
from .given import array, as_times, density, finite, heading, limits, plane_paths, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
QUIET = "#5f6b76"
Extent = tuple[float, float, float, float]
"""The part of the plane that is shown: (left, right, bottom, top)."""


@runtime_checkable
class Clock(Protocol):
    """What ``noise_schedule`` reads: any ``LinearSDE``.

    >>> isinstance(sg.VP(), Clock)
    True
    """

    @property
    def T(self) -> float:
        """Where time ends."""

    def alpha(self, t: Tensor, /) -> Tensor:
        """Signal level."""

    def sigma(self, t: Tensor, /) -> Tensor:
        """Noise level."""

    def log_snr(self, t: Tensor, /) -> Tensor:
        """log(alpha^2 / sigma^2)."""


def trajectories_1d(
    times: Tensor | ArrayLike, paths: Tensor | ArrayLike, title: str = ""
) -> Figure:
    """Paths of one coordinate over time, with the law of their values at both ends.

    Time runs from left to right in the order of ``times``, so a generation goes from T to 0. The
    colour of a path is its last value. A path that is not finite is left out, and counted.

    Args:
        times: (N,).
        paths: (N, B) or (N, B, 1), as ``solve(..., trajectory=True)`` gives them.
        title: above the plot.

    Raises:
        ValueError: shapes that do not fit, or no path that is finite.

    >>> figure = trajectories_1d([0.0, 0.5, 1.0], torch.randn(3, 8, 1))
    """
    t, x = as_times(times), array(paths, "paths")
    x = x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x
    if x.ndim != 2 or t.shape != x.shape[:1]:
        raise ValueError(f"expected times (N,) and paths (N, B), got {t.shape} and {x.shape}")
    x, lost = finite(x, 1, "paths")
    from matplotlib.collections import LineCollection

    figure = _figure(8.5, 4)
    left, ax, right = figure.subplots(1, 3, sharey=True, width_ratios=[1, 6, 1])
    lines = np.stack([np.broadcast_to(t[:, None], x.shape), x], axis=-1).swapaxes(0, 1)
    alpha = min(0.9, max(0.15, 20 / x.shape[1]))
    ax.add_collection(
        LineCollection(list(lines), array=x[-1], cmap=_viridis(), alpha=alpha, lw=0.8)
    )
    _titled(ax, title, lost)
    ax.set(xlabel="time $t$", xlim=(t[0], t[-1]))
    for side, ends, time in ((left, x[0], t[0]), (right, x[-1], t[-1])):
        bins = min(60, max(10, math.isqrt(len(ends))))
        side.hist(ends, bins, density=True, orientation="horizontal", color=QUIET, alpha=0.7)
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
    times: Tensor | ArrayLike,
    paths: Tensor | ArrayLike | None = None,
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
        paths: (N, B) or (N, B, 1) to lay over it, one state a time; one that is not finite is left
            out, and counted.
        extent: the part of the line that is shown.
        shown: how many paths to trace.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: an extent without length, a callable that does not return (M,), or paths that
            do not fit the times.

    >>> law, times = sg.Gaussian(sg.VP(), torch.zeros(1)), torch.linspace(0.01, 1, 50)
    >>> figure = density_over_time(law.log_prob, times)
    """
    t = as_times(times)
    low, high = limits(extent, "(low, high)")
    x = (torch.arange(300) + 0.5).unsqueeze(1) / 300 * (high - low) + low
    columns = np.linspace(t[0], t[-1], 240)
    logs = [values(log_density, "log_density", (300,), x, torch.tensor(u)) for u in columns]
    root = density(np.stack(logs, 1) / 2)
    lost = ""
    if paths is not None:
        lines = array(paths, "paths")
        if lines.ndim < 2 or len(lines) != len(t):
            raise ValueError(f"paths must have one state a time, {len(t)}, got {lines.shape}")
        lines, lost = finite(lines.reshape(len(lines), -1), 1, "paths")
    ax = _axes(ax, 8, 3.8)
    ax.imshow(
        root,
        origin="lower",
        aspect="auto",
        extent=(t[0], t[-1], low, high),
        cmap="magma",
        vmin=0,
        vmax=1.5 * float(np.quantile(np.nan_to_num(root).max(0), 0.5)),
    )
    if paths is not None:
        shown = check_count(shown, "shown", 0)
        ax.plot(t, lines[:, :shown], color="white", lw=0.6, alpha=0.6)
    ax.set(xlabel="time $t$", ylabel="state $x$", xlim=(t[0], t[-1]), ylim=(low, high))
    return _titled(ax, title, lost)


def trajectories_2d(
    paths: Tensor | ArrayLike, shown: int = 200, title: str = "", ax: Axes | None = None
) -> Figure:
    """Paths in the plane: where they start (grey), where they end (blue), and how they get there.

    A path that is not finite is left out, and counted.

    Args:
        paths: (N, B, 2), as ``solve(..., trajectory=True)`` gives them.
        shown: how many paths to trace; the ends of all are drawn.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: paths of another shape, or none that is finite.

    >>> figure = trajectories_2d(torch.randn(3, 8, 2), shown=8)
    """
    x, lost = plane_paths(paths)
    from matplotlib.collections import LineCollection

    lines = x[:, : check_count(shown, "shown", 0)].swapaxes(0, 1)
    ax = _axes(ax, 5.6, 5.2)
    alpha = min(0.8, max(0.2, 60 / max(1, len(lines))))
    ax.add_collection(LineCollection(list(lines), color=COLOURS[4], alpha=alpha, lw=0.7))
    for ends, colour, label in ((x[0], QUIET, "start"), (x[-1], COLOURS[0], "end")):
        u, v = ends.T
        ax.scatter(u, v, s=5, color=colour, alpha=0.7, lw=0, label=label, zorder=3)
    ax.legend(frameon=False, markerscale=3, loc="upper right")
    ax.set_aspect("equal")
    ax.autoscale_view()
    _plain(ax)
    return _titled(ax, title, lost)


def density_2d(
    log_density: Callable[[Tensor], Tensor],
    extent: Extent = (-2, 2, -2, 2),
    points: Tensor | ArrayLike | None = None,
    resolution: int = 200,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A density in the plane.

    Args:
        log_density: (M, 2) float32 -> (M,), in nats.
        extent: the part of the plane.
        points: samples (N, 2) to lay over it; one that is not finite is left out, and counted.
        resolution: pixels along a side.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: an extent without area, a callable that does not return (M,), or points of
            another shape.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> figure = density_2d(lambda x: law.log_prob(x, 0.1))
    """
    resolution = check_count(resolution, "resolution")
    extent, grid = _mesh(extent, resolution)
    p = density(values(log_density, "log_density", (len(grid),), grid))
    lost = ""
    if points is not None:
        u = array(points, "points")
        if u.ndim != 2 or u.shape[1] != 2:
            raise ValueError(f"points must be (N, 2), got {u.shape}")
        u, lost = finite(u, 0, "points")
    ax = _axes(ax, 5.8, 4.8)
    image = ax.imshow(
        p.reshape(resolution, resolution), origin="lower", extent=extent, cmap="magma", vmin=0
    )
    _colour_bar(ax, image, "density")
    if points is not None:
        ax.scatter(u[:, 0], u[:, 1], s=4, color="white", alpha=0.6, lw=0)
        ax.set(xlim=extent[:2], ylim=extent[2:])
    return _titled(ax, title, lost)


def score_field(
    score: Callable[[Tensor], Tensor],
    extent: Extent = (-2, 2, -2, 2),
    log_density: Callable[[Tensor], Tensor] | None = None,
    arrows: int = 25,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A vector field in the plane: arrows of one length for direction, colour for magnitude.

    Where it is not finite there is no arrow; these places are counted.

    Args:
        score: (M, 2) float32 -> (M, 2); for a score at time t, ``lambda x: score(x, t)``.
        extent: the part of the plane.
        log_density: (M, 2) -> (M,), whose contours are drawn below.
        arrows: how many along a side.
        title: above the plot.
        ax: where to draw; None makes a figure.

    Raises:
        ValueError: an extent without area, or a callable that returns another shape or is finite
            nowhere.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> figure = score_field(lambda x: law(x, 0.1))
    """
    extent, grid = _mesh(extent, check_count(arrows, "arrows"))
    s = values(score, "score", (len(grid), 2), grid)
    both, lost = finite(np.stack([array(grid), s], 1), 0, "scores")
    at, s = both.swapaxes(0, 1)
    from matplotlib.colors import LogNorm

    ax = _axes(ax, 5.8, 4.8)
    if log_density is not None:
        _contours(ax, log_density, extent)
    size = np.linalg.norm(s, axis=1)
    least = max(float(np.quantile(size, 0.02)), float(size.max()) * 1e-3, 1e-12)
    unit = s / np.maximum(size, 1e-2 * least)[:, None]
    field = ax.quiver(
        *at.T,
        *unit.T,
        size.clip(least),
        norm=LogNorm(least, max(float(size.max()), 2 * least)),
        cmap=_viridis(),
        pivot="mid",
        scale=1.25 * arrows,
    )
    _colour_bar(ax, field, r"$\|s(x)\|$")
    ax.set(aspect="equal", xlim=extent[:2], ylim=extent[2:])
    return _titled(ax, title, lost)


def noise_schedule(sdes: Clock | Mapping[str, Clock], n: int = 400) -> Figure:
    """alpha, sigma and log-SNR over time, of one linear SDE or of several by name.

    Time is shown as t / T, from T / n to T. sigma is logarithmic where it exceeds 10.

    Args:
        sdes: one, or several by name.
        n: points of each curve.

    >>> figure = noise_schedule({"VP": sg.VP(), "sub-VP": sg.SubVP()})
    """
    named: Mapping[str, Clock] = sdes if isinstance(sdes, Mapping) else {"": sdes}
    if not named or not all(isinstance(sde, Clock) for sde in named.values()):
        raise TypeError(f"sdes must be a LinearSDE, or several by name, got {sdes!r}")
    n = check_count(n, "n")
    figure = _figure(9.5, 3.2)
    panels = figure.subplots(1, 3)
    titles = (r"signal $\alpha(t)$", r"noise $\sigma(t)$", r"log-SNR $\log\,\alpha^2/\sigma^2$")
    u = torch.arange(1, n + 1, dtype=torch.float64) / n
    curves: list[list[np.ndarray]] = [[], [], []]
    for i, (name, sde) in enumerate(named.items()):
        t = u * sde.T
        style = {"color": COLOURS[i % len(COLOURS)], "ls": ("-", "--", "-.", ":")[i % 4]}
        for ax, f, kept in zip(panels, (sde.alpha, sde.sigma, sde.log_snr), curves, strict=True):
            kept.append(values(f, f"{type(sde).__name__}.{f.__name__}", (n,), t))
            ax.plot(array(u), kept[-1], lw=1.8, label=name, **style)
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


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    from matplotlib.axes import Axes

    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(f"ax must be an Axes of matplotlib or None, got {ax!r}")
    return _figure(width, height).subplots() if ax is None else ax


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize="small")


def _titled(ax: Axes, title: str, note: str = "") -> Figure:
    ax.set_title(heading(title, note), fontsize="medium")
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


def _mesh(extent: Extent, n: int) -> tuple[Extent, Tensor]:
    """The extent as numbers, and the centres of n x n pixels (n^2, 2) float32, from below."""
    left, right, bottom, top = limits(extent, "(left, right, bottom, top)")
    u = (torch.arange(n) + 0.5) / n
    y, x = torch.meshgrid(bottom + (top - bottom) * u, left + (right - left) * u, indexing="ij")
    return (left, right, bottom, top), torch.stack([x, y], dim=-1).reshape(-1, 2)


def _contours(ax: Axes, log_density: Callable[[Tensor], Tensor], extent: Extent) -> None:
    n = 150
    _, grid = _mesh(extent, n)
    p = values(log_density, "log_density", (len(grid),), grid)
    p = np.where(np.isfinite(p), p, np.nan)
    if np.isnan(p).all():
        raise ValueError("log_density is finite nowhere in the extent")
    x, y = array(grid).T.reshape(2, n, n)
    levels = np.nanmax(p) - np.array([8.0, 5.0, 3.0, 2.0, 1.0, 0.3])
    z = p.reshape(n, n)
    ax.contour(x, y, z, levels, colors=QUIET, linewidths=0.7, linestyles="solid", alpha=0.5)
