"""What `train` chooses where the command line leaves it open, and the line that says so."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from torch import nn

_WORK = 64 * 32**2 * 32**2
"""Samples x places x channels^2 of a step that two CPU cores take in three quarters of a second
(counted in operations, from a U-Net on 28 x 28 that took 0.56 s)."""


def choose_size(options: argparse.Namespace, shape: Sequence[int], device: str) -> None:
    """Fill in ``options.channels`` and ``options.batch`` where they are None, for data of a shape.

    On a GPU a U-Net has 64 channels and a batch 256 samples. A CPU gets what two cores do at least
    once a second: 32 channels, or 16 where a batch would fall below 32 samples.
    """
    places = math.prod(shape[1:]) * 3 ** max(0, len(shape) - 3)  # a kernel of 27 places, not of 9
    if len(shape) == 1 or tuple(shape) == (1, 8, 8) or device != "cpu":
        batch = 256
    else:
        few = _power_of_two(_WORK / (places * 32**2)) < 32
        options.channels = options.channels or (16 if few else 32)
        batch = min(256, max(8, _power_of_two(_WORK / (places * options.channels**2))))
    options.batch = options.batch or batch


def _power_of_two(x: float) -> int:
    """The largest that is not above x; 0 for x below 1."""
    return 1 << (int(x).bit_length() - 1) if x >= 1 else 0


def chosen(net: nn.Module, batch: int, device: str) -> str:
    """The first line of a run: network, batch and device, and what changes them."""
    size = sum(p.numel() for p in net.parameters())
    kind = {"UNet": "a U-Net", "MLP": "a perceptron", "PrincipalMLP": "a perceptron"}.get(
        type(net).__name__, "a network"
    )
    sizes = f"{size:,} parameters (--channels), {batch} samples a step (--batch)"
    return f"{kind} of {sizes}, on {device} (--device)"
