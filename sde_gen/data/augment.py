"""Changes of images that leave what they show as likely as it was, drawn sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import Streams


@dataclass(frozen=True)
class Flip:
    """Mirror each image left to right with a probability of 1/2: (x (B, C, H, W), noise) -> x.

    >>> sg.data.Flip()(torch.zeros(8, 1, 4, 4), sg.Streams(0)).shape
    torch.Size([8, 1, 4, 4])
    """

    def __call__(self, x: Tensor, noise: Streams) -> Tensor:
        """x, some of them mirrored; which ones is a function of (seed, sample)."""
        if x.ndim != 4:
            raise ValueError(f"Flip is for images (B, C, H, W), got {tuple(x.shape)}")
        u = noise.uniform(torch.empty(len(x), device=x.device), "flip")
        return torch.where((u < 0.5).reshape(-1, 1, 1, 1), x.flip(-1), x)
