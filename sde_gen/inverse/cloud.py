"""The weights of many systems of particles: resampling, evidence, effective numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..moments import handed
from ..noise import Streams
from ..ops import as_integer, on_host


class Draws:
    """Normals for each particle, and a uniform number for each system's resampling."""

    def __init__(self, seed: int | None, systems: int) -> None:
        number = int(torch.randint(1 << 62, ())) if seed is None else as_integer(seed)
        if number is None:
            raise TypeError(f"seed must be an integer or None, got {seed!r}")
        self.streams, self.systems = Streams(number), systems

    def uniform(self, t: float, device: torch.device) -> Tensor:
        """(R, 1), a function of (seed, system, t)."""
        z = self.streams(torch.empty(self.systems, 1, dtype=torch.float64), t, t, 2)
        return handed(torch.special.ndtr(z), device)


class Cloud:
    """The weights of R systems of N particles, and the evidence that they make."""

    def __init__(self, systems: int, count: int, device: torch.device) -> None:
        self.log_w = torch.zeros(systems, count, dtype=torch.float64, device=device)
        self.log_z = self.log_w.new_zeros(systems)
        self.variance = self.log_w.new_zeros(systems)
        self.ess: list[Tensor] = []

    def weigh(self, log_factor: Tensor) -> None:
        """Multiply the weights by factors that are told as logarithms (R N,)."""
        self.log_w = self.log_w + log_factor.reshape(self.log_w.shape)

    def resample(self, noise: Draws, t: float) -> Tensor | None:
        """Who goes on, (R N,), where the weights have become uneven; None where nowhere."""
        self.ess.append(effective(self.log_w))
        n = self.log_w.shape[1]
        uneven = self.ess[-1] < n / 2
        # A GPU is not asked: it would be waited for, and takes all steps alike.
        if on_host(uneven.device) and not bool(uneven.any()):
            return None
        self._settle(uneven)
        chosen = systematic(self.log_w, noise.uniform(t, self.log_w.device), n)
        own = torch.arange(n, device=chosen.device)
        chosen = torch.where(uneven.unsqueeze(1), chosen, own)
        self.log_w = torch.where(uneven.unsqueeze(1), 0.0, self.log_w)
        return (
            chosen + n * torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
        ).flatten()

    def _settle(self, which: Tensor) -> None:
        """Take the mean weight into the evidence; its relative variance is 1 / ESS - 1 / N."""
        n = self.log_w.shape[1]
        mean = self.log_w.logsumexp(1) - math.log(n)
        self.log_z = self.log_z + torch.where(which, mean, 0.0)
        part = 1 / effective(self.log_w) - 1 / n
        self.variance = self.variance + torch.where(which, part, 0.0)

    def finish(self) -> None:
        """Settle what is left; afterwards the weights are normalised."""
        self.ess.append(effective(self.log_w))
        self._settle(torch.ones_like(self.log_z, dtype=torch.bool))
        self.log_w = self.log_w - self.log_w.logsumexp(1, keepdim=True)

    @property
    def standard_error(self) -> Tensor:
        """Of the log evidence, (R,)."""
        return self.variance.clamp_min(0).sqrt()


def effective(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the last axis."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp()


def systematic(log_w: Tensor, u: Tensor, n: int) -> Tensor:
    """Indices (R, n) of those that (k + u) / n meets on the line of the weights (R, N).

    Each is taken floor(n w) or ceil(n w) times, n w on average over u (R, 1) uniform.
    """
    edges = torch.softmax(log_w, 1).cumsum(1)
    at = (torch.arange(n, device=u.device) + u) / n * edges[:, -1:]
    return torch.searchsorted(edges, at).clamp_max(log_w.shape[1] - 1)
