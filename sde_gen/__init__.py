"""sde_gen: score-based generative modelling with stochastic differential equations.

A forward ``SDE`` turns data into noise, its ``Score`` turns noise back into data, and everything
else is a choice of how to step: a ``Solver`` on a grid of times, driven by a ``Noise``.
"""

from __future__ import annotations

from . import grids
from .budget import Budget, error_budget
from .guidance import Classifier, ClassifierFree, classifier_loss
from .likelihood import bits_per_dim, log_prob
from .mcmc import BAOAB, MALA, OBABO, ULA, Chains, annealed_langevin, langevin
from .moments import Moments, data_moments
from .noise import BrownianPath, Impulses, Noise, Streams
from .sampling import default_solver, sample, solve
from .schedules import Cosine, Geometric, Linear, Power, Quadratic, Schedule, Sigmoid, Tabulated
from .scores import (
    CorrelatedMixture,
    Empirical,
    Gaussian,
    GaussianMixture,
    Lifted,
    Score,
    ScoreNetwork,
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
from .tuning import Tuned, tune_grid, tune_solver

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "BAOAB",
    "BrownianPath",
    "Budget",
    "Chains",
    "Churn",
    "Classifier",
    "ClassifierFree",
    "CorrelatedMixture",
    "Cosine",
    "CriticallyDamped",
    "EDM",
    "Empirical",
    "EulerMaruyama",
    "Exponential",
    "Gaussian",
    "GaussianMixture",
    "Geometric",
    "Heun",
    "Impulses",
    "Langevin",
    "Lifted",
    "Linear",
    "LinearSDE",
    "MALA",
    "MatrixOrnsteinUhlenbeck",
    "MatrixSDE",
    "Moments",
    "Noise",
    "OBABO",
    "OrnsteinUhlenbeck",
    "Power",
    "PredictorCorrector",
    "Propagator",
    "Quadratic",
    "Recipe",
    "Reverse",
    "RungeKutta",
    "SDE",
    "SRA",
    "Schedule",
    "SciPy",
    "Score",
    "ScoreNetwork",
    "Sigmoid",
    "Solver",
    "Streams",
    "SubVP",
    "Tabulated",
    "TorchSDE",
    "ULA",
    "Trainer",
    "Tuned",
    "VE",
    "VP",
    "Wiener",
    "annealed_langevin",
    "bits_per_dim",
    "classifier_loss",
    "data_moments",
    "default_solver",
    "dsm_loss",
    "error_budget",
    "grids",
    "langevin",
    "load",
    "log_prob",
    "sample",
    "save",
    "solve",
    "train",
    "tune_grid",
    "tune_solver",
]
