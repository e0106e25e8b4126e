"""Scores s(x, t) = grad_x log p_t(x): exact, learned, and sums of both."""

from __future__ import annotations

from .base import Given, Score, Shared, Sum, shared
from .exact import Empirical, Gaussian, GaussianMixture
from .matrix import CorrelatedMixture, Lifted
from .network import Prediction, ScoreNetwork

__all__ = [
    "CorrelatedMixture",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Given",
    "Lifted",
    "Prediction",
    "Score",
    "ScoreNetwork",
    "Shared",
    "Sum",
    "shared",
]
