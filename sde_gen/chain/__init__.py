"""The discrete chain: a process seen at N times, its steps, its bound, its training."""

from __future__ import annotations

from .normal import Normal
from .steps import Chain, Variance
from .terms import Bound, Decoder, bayes, bound
from .training import Hybrid, NodeTimes

__all__ = [
    "Bound",
    "Chain",
    "Decoder",
    "Hybrid",
    "NodeTimes",
    "Normal",
    "Variance",
    "bayes",
    "bound",
]
