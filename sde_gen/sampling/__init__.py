"""Running a solver along a grid.

``solve`` runs any process with any solver on any grid; ``sample`` is the one call that chooses
all three well. A sampler is no class: it is a process, a solver and a grid.
"""

from __future__ import annotations

from .draw import default_solver, enter, known, sample, starting, tuned_to
from .pace import Pace, settled, timed
from .run import Callback, as_noise, solve

__all__ = [
    "Callback",
    "Pace",
    "as_noise",
    "default_solver",
    "enter",
    "known",
    "sample",
    "settled",
    "solve",
    "starting",
    "timed",
    "tuned_to",
]
