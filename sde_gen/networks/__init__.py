"""Networks: functions (x, c, y, **context) -> F of a noisy state, its noise level, its label and
whatever else it is told.

``MLP`` for vectors, ``PrincipalMLP`` for tables, ``UNet`` and ``DiT`` for signals, images and
volumes; any other ``torch.nn.Module`` with the same call serves as well. ``Autoencoder``, and a
``Pair`` of an encoder and a decoder from elsewhere, are no scores: they say what data cost.
"""

from __future__ import annotations

from .autoencoder import Autoencoder
from .base import Network
from .codec import Codec, Cost, Pair
from .dit import DiT
from .mlp import MLP
from .principal import PrincipalMLP
from .unet import UNet

__all__ = [
    "MLP",
    "Autoencoder",
    "Codec",
    "Cost",
    "DiT",
    "Network",
    "Pair",
    "PrincipalMLP",
    "UNet",
]
