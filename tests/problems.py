"""Exact problems: data laws whose score, flow and reversal are known in closed form.

Shared by the tests, the benchmarks and the notebooks. Each law is a function of a linear process
that returns a ``Score``; each answer is written here without the library's solvers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sde_gen import Gaussian, GaussianMixture, LinearSDE

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal numbers, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def gaussian(sde: LinearSDE) -> Gaussian:
    """Three independent coordinates, away from 0 and of different spread."""
    mean = torch.tensor([0.8, -0.5, 0.3], dtype=F64)
    return Gaussian(sde, mean, torch.tensor([0.3, 0.6, 1.2], dtype=F64))


def correlated(sde: LinearSDE) -> Gaussian:
    """A Gaussian in the plane with a full covariance."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
    return Gaussian(sde, torch.tensor([0.4, -0.7], dtype=F64), covariance=covariance)


def mixture(sde: LinearSDE) -> GaussianMixture:
    """Three unequal components in the plane, each with its own spread in each coordinate."""
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.7], [0.1, -1.1]], dtype=F64)
    std = torch.tensor([[0.2, 0.5], [0.4, 0.3], [0.6, 0.25]], dtype=F64)
    return GaussianMixture(sde, torch.tensor([0.5, 0.2, 0.3]), means, std)


def line(sde: LinearSDE) -> GaussianMixture:
    """Three unequal components on the line: its probability flow is ``quantile_flow``."""
    means = torch.tensor([[-1.0], [0.2], [0.9]], dtype=F64)
    std = torch.tensor([0.25, 0.4, 0.3], dtype=F64)
    return GaussianMixture(sde, torch.tensor([0.35, 0.4, 0.25]), means, std)


def ring(sde: LinearSDE) -> GaussianMixture:
    """Eight equal components of spread 0.1 on the unit circle."""
    angle = torch.arange(8, dtype=F64) * math.pi / 4
    means = torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(sde, torch.ones(8), means, 0.1)


def grid25(sde: LinearSDE) -> GaussianMixture:
    """25 equal components of spread 0.03 on a 5 x 5 grid in [-1, 1]^2."""
    a = torch.linspace(-1, 1, 5, dtype=F64)
    return GaussianMixture(sde, torch.ones(25), torch.cartesian_prod(a, a), 0.03)


def powerlaw(sde: LinearSDE, dimensions: int = 256) -> Gaussian:
    """A randomly rotated Gaussian, eigenvalues k^-2 scaled to mean 0.25."""
    k = torch.arange(1, dimensions + 1, dtype=F64)
    spectrum = k**-2 * 0.25 * dimensions / (k**-2).sum()
    generator = torch.Generator().manual_seed(12345)
    square = torch.randn(dimensions, dimensions, generator=generator, dtype=F64)
    basis = torch.linalg.qr(square).Q
    covariance = basis * spectrum @ basis.T
    return Gaussian(sde, torch.zeros(dimensions, dtype=F64), covariance=covariance)


def digits(sde: LinearSDE, images: int = 1500) -> GaussianMixture:
    """64-D: a component of spread 0.05 around each of scikit-learn's first digits / 8 - 1."""
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().data[:images]) / 8 - 1
    return GaussianMixture(sde, torch.ones(images), data, 0.05)


def start(score: Gaussian | GaussianMixture, n: int, t: float, seed: int = 0) -> Tensor:
    """n states (n, *D) drawn from the score's own marginal law at time t, float64."""
    generator = torch.Generator().manual_seed(seed)
    return score.sde.perturb(score.sample(n, generator), t, generator).x


def quantile_flow(score: GaussianMixture, x: Tensor, t: float, s: float) -> Tensor:
    """Probability flow of a product of equal 1-D mixtures, coordinate by coordinate.

    On the line the flow keeps each quantile: F_s(x_s) = F_t(x_t). ``grid25`` is such a product,
    and every mixture on the line is one. x is (B, D).
    """
    means, inverse = torch.unique(score.means[:, 0], return_inverse=True)
    weights = torch.zeros_like(means).index_add(0, inverse, score.log_weights.exp())
    variance = torch.zeros_like(means).index_copy(
        0, inverse, score.variance[:, 0].expand(len(inverse))
    )

    def cdf(x: Tensor, time: float) -> Tensor:
        alpha, sigma = score.sde.alpha(time), score.sde.sigma(time)
        std = torch.sqrt(alpha**2 * variance + sigma**2)
        return torch.special.ndtr((x.unsqueeze(-1) - alpha * means) / std) @ weights

    level = cdf(x, t)
    low, high = torch.full_like(x, -50.0), torch.full_like(x, 50.0)
    for _ in range(70):
        middle = (low + high) / 2
        below = cdf(middle, s) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def gaussian_flow(score: Gaussian, x: Tensor, t: float, s: float) -> Tensor:
    """Probability flow of Gaussian data: (x_s - alpha_s m) / spread_s keeps its value."""
    gain, mean_t, mean_s, _ = gaussian_reversal(score, t, s, eta=0.0)
    z = x.flatten(1) - mean_t
    z = z if score.basis is None else z @ score.basis
    z = gain * z
    z = z if score.basis is None else z @ score.basis.T
    return (mean_s + z).reshape(x.shape)


def gaussian_reversal(
    score: Gaussian, t: float, s: float, eta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reversal from t to s < t of Gaussian data, for any eta, in the score's eigenbasis.

    The drift of the reversal is linear, so x_s - mean_s = gain (x_t - mean_t) + spread z. With
    v = alpha^2 c^2 + sigma^2 and rho the ratio of v / alpha^2 at s and t,
    gain = (alpha_s / alpha_t) rho^((1 + eta^2) / 2), spread^2 = v_s (1 - rho^(eta^2)).

    Returns:
        gain, mean_t, mean_s, spread: (n,) each; the means in the basis of the data.
    """
    a_t, a_s = float(score.sde.alpha(t)), float(score.sde.alpha(s))
    v_t, v_s = (a**2 * score.variance + score.sde.sigma(u) ** 2 for a, u in ((a_t, t), (a_s, s)))
    rho = v_s / v_t * (a_t / a_s) ** 2
    gain = a_s / a_t * rho ** ((1 + eta**2) / 2)
    spread = torch.sqrt(v_s * -torch.expm1(eta**2 * torch.log(rho)))
    return gain, a_t * score.mean, a_s * score.mean, spread


def slopes(errors: Sequence[float]) -> list[float]:
    """Orders between neighbours of a sequence in which the step halves."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


def rms(x: Tensor) -> float:
    """Root mean square over everything."""
    return float(x.pow(2).mean().sqrt())
