"""Noise level and label as one vector.

A scalar is hard for a network to read finely; waves of it at many frequencies are easy (Vaswani
et al. 2017; Tancik et al. 2020). Here the scalar is ``c = 1/4 log(sigma / alpha)``, in about
[-2.5, 1.2]: a wave of omega radians per unit of c tells apart levels that differ by some 4/omega
nats in log(sigma / alpha).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_choice


class Sinusoidal(nn.Module):
    """cos(omega_k c) and sin(omega_k c), omega_k geometric from 1/2 to 64.

    c (N,) -> (N, features). The slowest wave is monotone over the whole range of c, the fastest
    resolves 0.06 nats.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        omega = torch.linspace(-1, 6, features // 2).exp2_()
        self.register_buffer("omega", omega, persistent=False)
        self.omega: Tensor

    def forward(self, c: Tensor) -> Tensor:
        """Sines and cosines of c (B,), (B, features)."""
        phase = c[:, None] * self.omega.to(c)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class Fourier(nn.Module):
    """sqrt(2) cos(2 pi (omega_k c + phi_k)), omega_k ~ N(0, 1), phi_k ~ U[0, 1).

    c (N,) -> (N, features). The random features of Karras et al. (2024), drawn once
    from a generator of their own and saved with the network.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("omega", torch.empty(features).normal_(generator=generator))
        self.register_buffer("phi", torch.rand(features, generator=generator))
        self.omega: Tensor
        self.phi: Tensor

    def forward(self, c: Tensor) -> Tensor:
        """Sines and cosines of c (B,) at random frequencies, (B, features)."""
        phase = c[:, None] * self.omega.to(c) + self.phi.to(c)
        return math.sqrt(2) * (2 * math.pi * phase).cos()


WAVES: dict[str, type[Sinusoidal] | type[Fourier]] = {"sinusoidal": Sinusoidal, "fourier": Fourier}


class Embedding(nn.Module):
    """W_2 silu(W_1 waves(c)) plus one learned vector for each label.

    c (N,), y (N,) or None -> (N, width). Label -1, or y None, is 'no label' and has a vector of
    its own, as classifier-free guidance asks (Ho and Salimans 2022). c may be (1,), for a level
    that the whole batch shares.
    """

    def __init__(self, kind: str, features: int, width: int, classes: int | None) -> None:
        super().__init__()
        check_choice(kind, WAVES, "embedding")
        features += features % 2
        self.waves = WAVES[kind](features)
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)
        self.label = None if classes is None else nn.Embedding(classes + 1, width)

    def forward(self, c: Tensor, y: Tensor | None) -> Tensor:
        """Noise level c (B,) and label y (B,) or None as features (B, width)."""
        waves = self.waves(c).to(self.linear_1.weight.dtype)
        h = self.linear_2(F.silu(self.linear_1(waves)))
        if self.label is None:
            return h
        return h + (self.label.weight[:1] if y is None else self.label(y + 1))
