"""Solvers: one step of a process from time t to time s, in either direction."""

from __future__ import annotations

from .adaptive import Adaptive
from .backends import SciPy, TorchSDE
from .base import Solver, Step
from .corrector import Churn, PredictorCorrector
from .euler import EulerMaruyama
from .exponential import Exponential
from .leap import Leap
from .propagator import Propagator
from .published import ddim, ddpm, deis, dpm_solver, dpm_solver_pp, sa_solver, unipc
from .runge_kutta import Heun, RungeKutta
from .sra import SRA
from .weights import Midpoint, Polynomial, Spectral, Weights

__all__ = [
    "Adaptive",
    "Churn",
    "EulerMaruyama",
    "Exponential",
    "Heun",
    "Leap",
    "Midpoint",
    "Polynomial",
    "PredictorCorrector",
    "Propagator",
    "RungeKutta",
    "SRA",
    "SciPy",
    "Solver",
    "Spectral",
    "Step",
    "TorchSDE",
    "Weights",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpm_solver_pp",
    "sa_solver",
    "unipc",
]
