"""Scores s(x, t) = grad_x log p_t(x): exact, learned, and sums of both."""

from __future__ import annotations

from .base import Given, Score, Sum
from .bound import Shared, shared
from .diffusers import from_diffusers, to_diffusers
from .exact import Empirical, Gaussian, GaussianMixture
from .foreign import Foreign, Steps, from_denoiser, from_noise, from_velocity
from .matrix import CorrelatedMixture, Lifted
from .network import Learned, Prediction, ScoreNetwork

__all__ = [
    "CorrelatedMixture",
    "Empirical",
    "Foreign",
    "Gaussian",
    "GaussianMixture",
    "Given",
    "Learned",
    "Lifted",
    "Prediction",
    "Score",
    "ScoreNetwork",
    "Shared",
    "Steps",
    "Sum",
    "from_denoiser",
    "from_diffusers",
    "from_noise",
    "from_velocity",
    "shared",
    "to_diffusers",
]
