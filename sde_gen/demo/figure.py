"""The picture of the demo: real digits, new digits, and how one of them comes out of noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .. import plots
from ..data import Labelled
from ..noise import Streams
from ..sampling import solve
from ..scores import ScoreNetwork
from .judge import to_levels
from .rows import FLOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

COLUMNS, LABEL = 10, 5


def by_class(x: Tensor, y: Tensor, each: int) -> Tensor:
    """The first images of each class, class after class."""
    return torch.cat([x[y == c][:each] for c in range(10)])


def from_noise(score: ScoreNetwork, label: int, sample: int, seed: int) -> tuple[Tensor, Tensor]:
    """One probability flow: its states and, after them, what the network takes each for.

    Returns:
        Images (2 N, 1, 8, 8) for N times, and the times (N,).
    """
    sde, times = score.sde, FLOW.times(score.sde)
    given, noise = score.given(y=torch.tensor([label])), Streams(seed, sample)
    x = float(sde.sigma(sde.T)) * noise.start(torch.empty(1, 1, 8, 8))
    path = solve(sde.probability_flow(given), x, times, FLOW.solver, noise, trajectory=True)
    with torch.no_grad():
        denoised = [given.denoise(x, t) for x, t in zip(path, times[:-1], strict=False)]
    return torch.cat([*path[:-1], *denoised]), times[:-1]


def digits_figure(
    score: ScoreNetwork, train: Labelled, samples: dict[str, Tensor], y: Tensor, seed: int
) -> Figure:
    """Classes in rows: real, and samples of each kind; below, one path from noise to a digit.

    Args:
        score: the trained score.
        train: the real images.
        samples: titles and the samples under them, each with the labels y.
        y: labels of the samples.
        seed: of the path.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    wide, each = 1 + len(samples), min(COLUMNS, len(y) // 10)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.05)
    figure = Figure(figsize=(3.4 * wide, 5.6), layout=layout, dpi=120)
    parts = figure.subfigures(2, 1, height_ratios=[3.6, 1.9])

    top, bottom = cast("list[SubFigure]", parts)
    panels = {"real digits": by_class(train.x, train.y, each)}
    panels |= {title: by_class(to_levels(x), y, each) for title, x in samples.items()}
    axes = top.subplots(1, wide)
    for i, (title, x) in enumerate(panels.items()):
        plots.image_grid(x, 10, list(range(10)) if i == 0 else None, title, axes[i])
    states, times = from_noise(score, LABEL, int((y == LABEL).nonzero()[0]), seed)
    ax = bottom.subplots()
    title = f"from noise to a {LABEL} along the probability flow: state and expected digit"
    plots.image_grid(states, 2, ["$x_t$", r"$E[x_0|x_t]$"], title, ax)
    ax.set_xticks(ax.get_xlim()[1] * (torch.arange(len(times)) + 0.5).numpy() / len(times))
    ax.set_xticklabels([f"{t:.2g}" for t in times.tolist()])
    ax.set_xlabel("time $t$", color=plots.QUIET)
    return figure
