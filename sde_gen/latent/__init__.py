"""Latents: a score in the units of an autoencoder."""

from __future__ import annotations

from .training import Elbo

__all__ = ["Elbo"]
