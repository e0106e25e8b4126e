"""Grids and solvers fitted to one score, and judged on trajectories that they have not seen."""

from __future__ import annotations

from .grid import Tuned, tune_grid

__all__ = ["Tuned", "tune_grid"]
