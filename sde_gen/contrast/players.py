"""The two players of a GAN: convolutional for images (C, H, W), dense for all else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..networks.blocks import group_norm, zeroed
from .base import perceptron

LEAST = 4
"""Pixels a side, below which an image is taken for a vector."""


def is_image(shape: Sequence[int]) -> bool:
    """Whether data of this shape get convolutions."""
    return len(shape) == 3 and min(shape[1:]) >= LEAST


class Generator(nn.Module):
    """Noise z (B, k) and labels told (B, classes) -> samples (B, *shape).

    Of images: a quarter of the size with 2 ``width`` channels, enlarged twice by transposed
    convolutions (Radford et al. 2016), tanh at the end; what is too large is cut off.
    """

    def __init__(self, n_in: int, shape: Sequence[int], width: int, depth: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if not is_image(shape):
            self.body = perceptron(n_in, math.prod(shape), width, depth)
            return
        channels, *places = shape
        small = [-(-n // 4) for n in places]
        self.body = nn.Sequential(
            nn.Linear(n_in, 2 * width * math.prod(small)),
            nn.Unflatten(1, (2 * width, *small)),
            group_norm(2 * width),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            group_norm(width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, told: Tensor) -> Tensor:
        """(B, k), (B, classes) -> (B, *shape)."""
        x: Tensor = self.body(torch.cat([z, told], 1))
        if not is_image(self.shape):
            return x.reshape(-1, *self.shape)
        return x[..., : self.shape[1], : self.shape[2]]


class Discriminator(nn.Module):
    """Samples (B, *shape) and labels told (B, classes) -> the logit of 'these are data', (B,).

    Of features f it is w . f + b + v(y) . f, v(y) a vector for each class, 0 at the start.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int, depth: int) -> None:
        super().__init__()
        size = math.prod(shape)
        self.body: nn.Module = nn.Flatten()
        if is_image(shape):
            self.body = nn.Sequential(
                nn.Conv2d(shape[0], width, 4, 2, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 2 * width, 4, 2, 1),
                nn.LeakyReLU(0.2),
                nn.Flatten(),
            )
            size = 2 * width * math.prod(n // 2 // 2 for n in shape[1:])
        elif depth:
            self.body = nn.Sequential(
                nn.Flatten(), perceptron(size, width, width, depth - 1), nn.SiLU()
            )
            size = width
        self.last = nn.Linear(size, 1)
        self.of_class = zeroed(nn.Linear(classes, size, bias=False)) if classes else None

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """(B, *shape), (B, classes) -> (B,)."""
        f = self.body(x)
        logit: Tensor = self.last(f).squeeze(1)
        return logit if self.of_class is None else logit + (self.of_class(told) * f).sum(1)
