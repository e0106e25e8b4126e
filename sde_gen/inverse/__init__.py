"""Inverse problems y = A(x) + noise: what was observed, and what is known exactly about x."""

from __future__ import annotations

from .calibration import Calibration, Check, Discrepancy, calibrate, kernel_stein
from .corrected import corrected
from .covariance import (
    Covariance,
    DataCovariance,
    Isotropic,
    Point,
    Tweedie,
    TweedieDiagonal,
    dps,
    mmps,
    pigdm,
    tmpd,
)
from .exact import exact_posterior, log_evidence
from .gibbs import gibbs
from .observation import Observation, joint
from .operators import (
    Blur,
    Callables,
    Downsample,
    Fourier,
    Linearization,
    Mask,
    Matrix,
    Nonlinear,
    Operator,
    Radon,
    Stack,
    from_deepinv,
    from_linear_operator,
)
from .particles import Particles, particles, steer
from .posterior import Posterior

__all__ = [
    "Blur",
    "Calibration",
    "Callables",
    "Check",
    "Covariance",
    "DataCovariance",
    "Discrepancy",
    "Downsample",
    "Fourier",
    "Isotropic",
    "Linearization",
    "Mask",
    "Matrix",
    "Nonlinear",
    "Observation",
    "Operator",
    "Particles",
    "Point",
    "Posterior",
    "Radon",
    "Stack",
    "Tweedie",
    "TweedieDiagonal",
    "calibrate",
    "corrected",
    "dps",
    "exact_posterior",
    "from_deepinv",
    "from_linear_operator",
    "gibbs",
    "joint",
    "kernel_stein",
    "log_evidence",
    "mmps",
    "particles",
    "pigdm",
    "steer",
    "tmpd",
]
