"""Forward processes and their time reversal."""

from __future__ import annotations

from .base import SDE, Perturbed, Reverse, ScoreFunction
from .langevin import Langevin
from .linear import EDM, VE, VP, LinearSDE, OrnsteinUhlenbeck, SubVP, Wiener

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Langevin",
    "LinearSDE",
    "OrnsteinUhlenbeck",
    "Perturbed",
    "Reverse",
    "ScoreFunction",
    "SubVP",
    "Wiener",
]
