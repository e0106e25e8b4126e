"""Gaussians with as many variances as there are kinds of directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import gaussians


@dataclass(frozen=True, eq=False)
class Normal:
    """N(mean, V): mean (B, *D), and V diagonal where ``basis`` says.

    Args:
        mean: (B, *D).
        variance: (1 or B, m): one for all coordinates (m = 1), one for each (m = n), or with a
            basis a floor and one for each of its columns (m = r + 1), as in ``Moments``.
        basis: orthonormal columns (n, r), or None.

    >>> sg.chain.Normal(torch.zeros(8, 2), torch.ones(8, 2)).mean.shape
    torch.Size([8, 2])
    """

    mean: Tensor
    variance: Tensor
    basis: Tensor | None = None

    def _parts(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|d|^2 in each kind of direction (B, m), how many coordinates each has (m,), and their
        variances (1 or B, m)."""
        d, m = d.flatten(1), self.variance.shape[1]
        counts = torch.ones(m, dtype=d.dtype, device=d.device)
        if self.basis is not None:
            inner = d @ self.basis
            counts[0] = d.shape[1] + 1 - m
            rest = (d - inner @ self.basis.mT).square().sum(1, keepdim=True)
            # A floor that no direction has may be 0.
            variance = torch.where(counts > 0, self.variance, 1.0)
            return torch.cat([rest, inner.square()], 1) * (counts > 0), counts, variance
        if m == 1:
            return d.square().sum(1, keepdim=True), counts * d.shape[1], self.variance
        return d.square(), counts, self.variance

    @property
    def std(self) -> Tensor:
        """The standard deviation of each coordinate, broadcasting with the mean."""
        v = self.variance
        if self.basis is not None:
            v = v[:, :1] + (v[:, 1:] - v[:, :1]) @ self.basis.square().mT
        shape = (1,) * (self.mean.ndim - 1) if v.shape[1] == 1 else self.mean.shape[1:]
        return v.sqrt().reshape(len(v), *shape)

    def sample(self, z: Tensor) -> Tensor:
        """mean + V^(1/2) z for normals z (B, *D)."""
        if self.basis is None:
            return self.mean + self.std * z
        root, flat = self.variance.sqrt(), z.flatten(1)
        inner = (root[:, 1:] - root[:, :1]) * (flat @ self.basis)
        return self.mean + (root[:, :1] * flat + inner @ self.basis.mT).reshape(z.shape)

    def log_density(self, x: Tensor) -> Tensor:
        """log N(x; mean, V) in nats, (B, *D) -> (B,)."""
        away, counts, variance = self._parts(x - self.mean)
        volume = counts * torch.log(2 * math.pi * variance)
        return -0.5 * (away / variance + volume).sum(1)

    def kl(self, other: Normal) -> Tensor:
        """KL(self || other) in nats, (B,), for a self of one variance."""
        away, counts, variance = other._parts(self.mean - other.mean)
        each = gaussians.divergence(self.variance / variance, torch.zeros_like(away))
        return (counts * each + 0.5 * away / variance).sum(1)
