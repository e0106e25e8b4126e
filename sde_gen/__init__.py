"""sde_gen: score-based generative modelling with stochastic differential equations.

A forward ``SDE`` turns data into noise, its ``Score`` turns noise back into data, and everything
else is a choice of how to step: a ``Solver`` on a grid of times, driven by a ``Noise``.
"""

from __future__ import annotations

from . import gaussians, grids, guidance, metrics, networks, schedules, sdes, solvers
from .budget import error_budget
from .chain import Chain, bound
from .facts import Facts
from .guidance import Classifier, ClassifierFree
from .likelihood import Estimate, bits_per_dim, log_prob
from .mcmc import BAOAB, MALA, OBABO, ULA, annealed_langevin, langevin
from .moments import Moments, data_moments
from .noise import BrownianPath, Impulses, Noise, Streams
from .sampling import default_solver, sample, solve
from .scores import (
    CorrelatedMixture,
    Empirical,
    Gaussian,
    GaussianMixture,
    Lifted,
    Score,
    ScoreNetwork,
    shared,
)
from .sdes import (
    EDM,
    SDE,
    VE,
    VP,
    CriticallyDamped,
    Langevin,
    LinearSDE,
    MatrixOrnsteinUhlenbeck,
    MatrixSDE,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    Reverse,
    SubVP,
    Wiener,
)
from .solvers import (
    SRA,
    Adaptive,
    Churn,
    EulerMaruyama,
    Exponential,
    Heun,
    PredictorCorrector,
    Propagator,
    RungeKutta,
    SciPy,
    Solver,
    TorchSDE,
)
from .training import Recipe, Trainer, dsm_loss, load, save, train
from .tuning import tune_grid, tune_solver

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "BAOAB",
    "BrownianPath",
    "Chain",
    "Churn",
    "Classifier",
    "ClassifierFree",
    "CorrelatedMixture",
    "CriticallyDamped",
    "EDM",
    "Empirical",
    "Estimate",
    "EulerMaruyama",
    "Exponential",
    "Facts",
    "Gaussian",
    "GaussianMixture",
    "Heun",
    "Impulses",
    "Langevin",
    "Lifted",
    "LinearSDE",
    "MALA",
    "MatrixOrnsteinUhlenbeck",
    "MatrixSDE",
    "Moments",
    "Noise",
    "OBABO",
    "OrnsteinUhlenbeck",
    "PredictorCorrector",
    "Propagator",
    "Recipe",
    "RectifiedFlow",
    "Reverse",
    "RungeKutta",
    "SDE",
    "SRA",
    "SciPy",
    "Score",
    "ScoreNetwork",
    "Solver",
    "Streams",
    "SubVP",
    "TorchSDE",
    "ULA",
    "Trainer",
    "VE",
    "VP",
    "Wiener",
    "annealed_langevin",
    "bits_per_dim",
    "bound",
    "data_moments",
    "default_solver",
    "dsm_loss",
    "error_budget",
    "gaussians",
    "grids",
    "guidance",
    "langevin",
    "load",
    "log_prob",
    "metrics",
    "networks",
    "sample",
    "save",
    "schedules",
    "sdes",
    "shared",
    "solve",
    "solvers",
    "train",
    "tune_grid",
    "tune_solver",
]
