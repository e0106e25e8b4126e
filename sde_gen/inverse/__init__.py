"""Inverse problems y = A(x) + noise: what was observed, and what is known exactly about x."""

from __future__ import annotations

from .exact import exact_posterior, log_evidence
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

__all__ = [
    "Blur",
    "Callables",
    "Downsample",
    "Fourier",
    "Linearization",
    "Mask",
    "Matrix",
    "Nonlinear",
    "Observation",
    "Operator",
    "Radon",
    "Stack",
    "exact_posterior",
    "from_deepinv",
    "from_linear_operator",
    "joint",
    "log_evidence",
]
