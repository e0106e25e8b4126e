"""The rivals of the diffusion model, for comparison: VAE, hierarchical VAE, GAN.

Each is small, trained by the library's trainer, ``train(rival, x, y, Recipe(minutes=1))``, drawn
from by ``rival.sample(n, seed=0)`` (with ``y=labels`` where it knows classes), saved and loaded as
every model is, and judged by the same judge.
"""

from __future__ import annotations

from .base import Rival
from .gan import GAN
from .hvae import HVAE
from .minimax import MinimaxGAN, game_value, jensen_shannon
from .training import train
from .vae import VAE

__all__ = ["GAN", "HVAE", "VAE", "MinimaxGAN", "Rival", "game_value", "jensen_shannon", "train"]
