"""Solvers: one step of a process from time t to time s, in either direction."""

from __future__ import annotations

from .backends import SciPy, TorchSDE
from .base import Solver, Step
from .euler import EulerMaruyama
from .exponential import Exponential
from .runge_kutta import Heun, RungeKutta

__all__ = [
    "EulerMaruyama",
    "Exponential",
    "Heun",
    "RungeKutta",
    "SciPy",
    "Solver",
    "Step",
    "TorchSDE",
]
