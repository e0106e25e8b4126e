"""Networks: functions (x, c, y) -> F of a noisy state, its noise level and its label.

``MLP`` for vectors, ``PrincipalMLP`` for tables, ``UNet`` for signals, images and volumes; any
other ``torch.nn.Module`` with the same call serves as well.
"""

from __future__ import annotations

from .base import Network
from .mlp import MLP
from .principal import PrincipalMLP
from .unet import UNet

__all__ = ["MLP", "Network", "PrincipalMLP", "UNet"]
