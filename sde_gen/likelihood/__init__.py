"""Likelihoods with error bars, and what else the probability flow does exactly.

``log_prob`` and ``bits_per_dim`` return an ``Estimate``: a value with its standard error, which
counts the probes of the divergence, the dequantisation, the data and the steps of the solver.
``encode`` and ``decode`` follow the same flow there and back; ``interpolate``, ``relabel`` and
``redraw`` edit data between the two. ``log_prob_of_rows`` is that of tables with categories.
"""

from __future__ import annotations

from .density import log_prob
from .dequantiser import LogisticDequantiser
from .editing import between, decode, encode, interpolate, redraw, relabel
from .estimate import Estimate
from .quantised import bits_per_dim, importance_bounds
from .tables import log_prob_of_rows

__all__ = [
    "Estimate",
    "LogisticDequantiser",
    "between",
    "bits_per_dim",
    "decode",
    "encode",
    "importance_bounds",
    "interpolate",
    "log_prob",
    "log_prob_of_rows",
    "redraw",
    "relabel",
]
