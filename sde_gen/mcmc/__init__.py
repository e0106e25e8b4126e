"""Sampling a law by Langevin dynamics, from its score or its density.

The process dX = s(X) dt + sqrt(2) dW with s = grad log p leaves p where it is. A computer takes
steps of it: ``langevin`` runs many chains as one batch by a ``Method``. ``ULA`` takes Euler steps
and is biased by them, ``MALA`` corrects each step and is not, ``BAOAB`` and its kin give the
state a velocity. ``annealed_langevin`` walks down the noise levels of a score; ``modes`` climbs
there, without noise.
"""

from __future__ import annotations

from .chains import Chains
from .methods import ABOBA, BAOAB, MALA, OBABO, ULA, Method, Splitting
from .modes import modes
from .run import annealed_langevin, langevin

__all__ = [
    "ABOBA",
    "BAOAB",
    "MALA",
    "OBABO",
    "ULA",
    "Chains",
    "Method",
    "Splitting",
    "annealed_langevin",
    "langevin",
    "modes",
]
