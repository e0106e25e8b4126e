"""Forward processes and their time reversal."""

from __future__ import annotations

from .base import SDE, KernelSDE, Perturbed, Reverse
from .damped import CriticallyDamped
from .evaluation import ScoreFunction, evaluate
from .langevin import Langevin
from .linear import EDM, VE, VP, LinearSDE, OrnsteinUhlenbeck, SubVP, Wiener
from .matrix import Channel, Correlated, MatrixOrnsteinUhlenbeck, MatrixSDE

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Channel",
    "Correlated",
    "CriticallyDamped",
    "KernelSDE",
    "Langevin",
    "LinearSDE",
    "MatrixOrnsteinUhlenbeck",
    "MatrixSDE",
    "OrnsteinUhlenbeck",
    "Perturbed",
    "Reverse",
    "ScoreFunction",
    "SubVP",
    "Wiener",
    "evaluate",
]
