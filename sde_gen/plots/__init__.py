"""Pictures of samples, paths, fields and clocks: each a matplotlib ``Figure`` or a ``Movie``.

The figures belong to nobody's global state: save one with ``figure.savefig("name.png")``, or name
it in the last line of a notebook's cell after ``%matplotlib inline``. A plot of one panel also
draws into an ``ax`` of yours, and then returns that one's figure. Colours are perceptually uniform
(magma, viridis) or safe for colour-blind readers (Okabe and Ito 2008).
"""

from __future__ import annotations

from .images import image_grid
from .movies import Movie, movie_2d
from .progress import loss_curve
from .ranks import rank_curves
from .signals import signals
from .stills import (
    COLOURS,
    QUIET,
    Clock,
    Extent,
    density_2d,
    density_over_time,
    noise_schedule,
    score_field,
    trajectories_1d,
    trajectories_2d,
)

__all__ = [
    "COLOURS",
    "QUIET",
    "Clock",
    "Extent",
    "Movie",
    "density_2d",
    "density_over_time",
    "image_grid",
    "loss_curve",
    "movie_2d",
    "noise_schedule",
    "rank_curves",
    "score_field",
    "signals",
    "trajectories_1d",
    "trajectories_2d",
]
