"""Whether numbers that should be even in (0, 1) are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ops import check_number
from .given import array
from .stills import COLOURS, QUIET, _axes, _plain, _titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def rank_curves(
    ranks: Mapping[str, Any], size: float = 1e-3, title: str = "", ax: Axes | None = None
) -> Figure:
    """F(u) - u for the share F of ranks up to u, which is near 0 where they are even.

    A grey band has the bounds that all curves keep in all but ``size`` of cases (Kolmogorov's,
    for as many curves as are drawn). A sampler with too little spread rises above it on the left
    and falls below on the right, one with too much the other way round; a shift is an arch.

    Args:
        ranks: by name, (R,) or (R, P) with a curve for each column, in [0, 1]: those of a
            ``Calibration``, ``{"ranks": found.ranks, "TARP": found.tarp}``.
        size: the chance that right ranks leave the band.
        title: above the plot.
        ax: where to draw.

    Raises:
        TypeError, ValueError: no mapping; ranks that are not in [0, 1], or of several numbers.

    >>> figure = rank_curves({"ranks": torch.rand(100)})
    """
    from scipy.stats import kstwo

    named = _named(ranks)
    size = check_number(size, "size", above=0, below=1)
    ax = _axes(ax, 5.2, 3.4)
    n = len(next(iter(named.values())))
    curves = sum(u.shape[1] for u in named.values())
    bound = float(kstwo.ppf(1 - size / curves, n))
    ax.axhspan(-bound, bound, color="0.92", zorder=0)
    ax.axhline(0, color=QUIET, lw=0.8)
    share = np.arange(n + 1) / n
    for i, (name, u) in enumerate(named.items()):
        level = np.vstack([np.zeros(u.shape[1]), np.sort(u, 0)])
        thin: dict[str, Any] = {"lw": 0.8, "alpha": 0.5} if u.shape[1] > 3 else {"lw": 1.8}
        drawn = ax.step(level, share[:, None] - level, where="post", color=COLOURS[i % 7], **thin)
        drawn[0].set_label(name)
    ax.set(xlim=(0, 1), xlabel="$u$", ylabel="share of ranks up to $u$, less $u$")
    ax.legend(frameon=False, fontsize="small")
    _plain(ax)
    return _titled(ax, title)


def _named(ranks: object) -> dict[str, np.ndarray]:
    if not isinstance(ranks, Mapping) or not ranks:
        raise TypeError(f"ranks must be given by name, as in {{'TARP': u}}, got {ranks!r:.60}")
    named = {}
    for name, given in ranks.items():
        u = array(given, f"ranks[{name!r}]")
        if u.ndim not in (1, 2) or u.size == 0 or not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"ranks[{name!r}] must be (R,) or (R, P) in [0, 1], got {u.shape}")
        named[str(name)] = u.reshape(len(u), -1)
    if len({len(u) for u in named.values()}) > 1:
        raise ValueError(f"ranks must be of one number R, got {[len(u) for u in named.values()]}")
    return named
