"""Forward processes and their time reversal."""

from __future__ import annotations

from .base import SDE, KernelSDE, Perturbed, Reverse
from .damped import CriticallyDamped
from .evaluation import Evaluation, ScoreFunction, at_rest, evaluate, evaluating, read, resting
from .langevin import Langevin
from .linear import EDM, VE, VP, LinearSDE, OrnsteinUhlenbeck, RectifiedFlow, SubVP, Wiener
from .matrix import Channel, Correlated, MatrixOrnsteinUhlenbeck, MatrixSDE

__all__ = [
    "EDM",
    "SDE",
    "Evaluation",
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
    "RectifiedFlow",
    "Reverse",
    "ScoreFunction",
    "SubVP",
    "Wiener",
    "at_rest",
    "evaluate",
    "evaluating",
    "read",
    "resting",
]
