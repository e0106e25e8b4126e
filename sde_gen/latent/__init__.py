"""Latents: a score in the units of an autoencoder.

``LatentModel(autoencoder, score)`` is a ``Score`` that every verb takes as any other; ``bound``
and ``log_prob`` say what data cost under it; ``Elbo`` trains the autoencoder, ``Joint`` the whole;
``Through`` guides by what is asked of the data.
"""

from __future__ import annotations

from .bound import bound, log_prob
from .guidance import Through
from .model import LatentModel, Latents
from .training import Elbo, Joint

__all__ = ["Elbo", "Joint", "LatentModel", "Latents", "Through", "bound", "log_prob"]
