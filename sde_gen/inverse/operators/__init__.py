"""The maps A of an observation y = A(x) + noise, each with its adjoint."""

from __future__ import annotations

from .arrays import Blur, Downsample, Fourier, Mask, Matrix
from .base import Composed, Linearization, Operator, Stack
from .callables import Callables, Nonlinear, from_deepinv, from_linear_operator
from .radon import Radon

__all__ = [
    "Blur",
    "Callables",
    "Composed",
    "Downsample",
    "Fourier",
    "Linearization",
    "Mask",
    "Matrix",
    "Nonlinear",
    "Operator",
    "Radon",
    "Stack",
    "from_deepinv",
    "from_linear_operator",
]
