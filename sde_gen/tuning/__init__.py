"""Grids and solvers fitted to one score, and judged on trajectories that they have not seen."""

from __future__ import annotations

from .grid import tune_grid
from .solver import tune_solver
from .trials import ROWS
from .tuned import Choice, Tuned, Warped

__all__ = ["ROWS", "Choice", "Tuned", "Warped", "tune_grid", "tune_solver"]
