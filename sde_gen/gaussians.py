"""Closed forms of Gaussian laws: divergences between them, and Gaussians read on cells.

What the chain's bound, the likelihoods, the rivals and the tests have in common.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .ops import sum_rest


def divergence(ratio: Tensor, away: Tensor) -> Tensor:
    """1/2 [ratio - 1 - log ratio + away]: the divergence in one direction, elementwise, in nats.

    ``ratio`` = var_q / var_p, ``away`` = (mean_q - mean_p)^2 / var_p.

    >>> sg.gaussians.divergence(torch.tensor(1.0), torch.tensor(2.0))
    tensor(1.)
    """
    return 0.5 * (ratio - 1 - torch.log(ratio) + away)


def kl(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> Tensor:
    """KL(N(mean_q, diag var_q) || N(mean_p, diag var_p)) in nats, (B, *D) -> (B,).

        1/2 sum [log(var_p / var_q) - 1 + var_q / var_p + (mean_q - mean_p)^2 / var_p].

    Everything broadcasts with ``mean_q``, which has the batch.

    >>> z = torch.zeros(1, 2)
    >>> float(kl(z, z + 1, z + 3, z + 1))
    9.0
    """
    each = divergence(var_q / var_p, (mean_q - mean_p) ** 2 / var_p)
    return sum_rest(each.expand_as(mean_q))


def kl_matrix(mean_q: Tensor, cov_q: Tensor, mean_p: Tensor, cov_p: Tensor) -> Tensor:
    """The same for full covariances (n, n) and means (n,): a scalar, in nats.

    >>> zero, one = torch.zeros(2), torch.eye(2)
    >>> sg.gaussians.kl_matrix(zero, one, torch.tensor([2.0, 0.0]), one)
    tensor(2.)
    """
    low = torch.linalg.cholesky(cov_p)
    white = torch.linalg.solve_triangular(low, torch.linalg.cholesky(cov_q), upper=False)
    away = torch.linalg.solve_triangular(low, (mean_q - mean_p).unsqueeze(-1), upper=False)
    volume = 2 * white.diagonal().log().sum()
    return 0.5 * (white.square().sum() + away.square().sum() - len(low) - volume)


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, diag std^2) in nats, (B, *D) -> (B,).

    >>> x, mean, std = torch.zeros(1, 2), torch.zeros(2), torch.ones(2)
    >>> 2 * torch.pi * sg.gaussians.log_density(x, mean, std).exp()
    tensor([1.0000])
    """
    z = (x - mean) / std
    each = -0.5 * z**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return sum_rest(each.expand_as(x))


def log_difference(low: Tensor, high: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)) for low < high, to rounding in both tails; +-inf are open ends.

    On the side where both are negative it is log Phi(high) + log(1 - Phi(low) / Phi(high)), of
    log Phi alone, and the other side is its mirror image. A narrow cell of width h around m is
    phi(m) h (1 + (m^2 - 1) h^2 / 24 + (m^4 - 6 m^2 + 3) h^4 / 1920 + ...): nothing cancels, at no
    width and at no distance.

    >>> round(float(log_difference(torch.tensor(40.0).double(), torch.tensor(41.0).double())), 3)
    -804.608
    """
    found: Tensor = _LogDifference.apply(*torch.broadcast_tensors(low, high))
    return found


class _LogDifference(torch.autograd.Function):
    """The slopes are phi / P at either end: the formula has far more parts than they."""

    generate_vmap_rule = True

    @staticmethod
    def forward(low: Tensor, high: Tensor) -> Tensor:
        return _log_difference(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        low, high, log_p = ctx.saved_tensors
        over = log_p + 0.5 * math.log(2 * math.pi)
        below, above = (torch.exp(-0.5 * end**2 - over) for end in (low, high))
        return -slope * below, slope * above


def _log_difference(low: Tensor, high: Tensor) -> Tensor:
    flip = low + high > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top, bottom = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    d = (top - bottom).clamp_min(torch.finfo(top.dtype).tiny)
    wide = top + torch.where(
        d < math.log(2), torch.log(-torch.expm1(-d)), torch.log1p(-torch.exp(-d))
    )
    h, m = high - low, torch.where(torch.isfinite(high - low), (low + high) / 2, 0.0)
    is_narrow = h * (1 + m.abs()) < 1e-2
    h = torch.where(is_narrow, h, 1.0)
    narrow = -0.5 * (m**2 + math.log(2 * math.pi)) + torch.log(h)
    curved = (m**2 - 1) * h**2 / 24 + (m**4 - 6 * m**2 + 3) * h**4 / 1920
    narrow = narrow + torch.log1p(curved.clamp_min(-0.5))
    return torch.where(is_narrow, narrow, wide)


def discretised(k: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    """log P(k) of the level k when N(mean, std^2) is read on L cells of [-1, 1], elementwise.

    Level k = 0 .. L - 1 owns the cell [2 k / L - 1, 2 (k + 1) / L - 1], the first and the last
    cell reach to infinity: the probabilities sum to 1 (Ho et al. 2020, equation 13, with the
    normal distribution function itself).

    Args:
        k: integers, any shape; mean, std: floating, broadcasting with it.

    >>> k, mean = torch.tensor([0, 1]), torch.zeros(2)
    >>> sg.gaussians.discretised(k, mean, torch.tensor(1.0), 2).exp()
    tensor([0.5000, 0.5000])
    """
    mean, std = torch.broadcast_tensors(mean, std)
    edge = 2 * k.to(mean.dtype) / levels - 1
    low, high = (edge - mean) / std, (edge + 2 / levels - mean) / std
    low = torch.where(k == 0, -math.inf, low)
    high = torch.where(k == levels - 1, math.inf, high)
    return log_difference(low, high)


def clipped_mean(mean: Tensor, std: Tensor) -> Tensor:
    """E[min(1, max(-1, x))] for x ~ N(mean, std^2), elementwise.

    With a = (-1 - mean) / std and b = (1 - mean) / std it is
    1 - Phi(b) - Phi(a) + mean [Phi(b) - Phi(a)] + std [phi(a) - phi(b)].

    >>> clipped_mean(torch.tensor([0.0, 9.0]), torch.tensor([1.0, 0.1]))
    tensor([0., 1.])
    """
    a, b = (-1 - mean) / std, (1 - mean) / std
    below, inside = torch.special.ndtr(a), torch.special.ndtr(b)
    slope = (torch.exp(-0.5 * a**2) - torch.exp(-0.5 * b**2)) / math.sqrt(2 * math.pi)
    return (1 - inside) - below + mean * (inside - below) + std * slope
