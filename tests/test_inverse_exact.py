"""Closed-form posteriors against Bayes' rule, quadrature, importance sampling and limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import F64, correlated, draw, gaussian, line, mixture
from torch import Tensor

from sde_gen import (
    VE,
    VP,
    CorrelatedMixture,
    Empirical,
    Gaussian,
    GaussianMixture,
    MatrixOrnsteinUhlenbeck,
    sample,
)
from sde_gen.inverse import (
    Downsample,
    Fourier,
    Mask,
    Matrix,
    Nonlinear,
    Observation,
    exact_posterior,
    log_evidence,
)
from sde_gen.inverse.exact import Prior

SDE = VP()


def full_mixture() -> CorrelatedMixture:
    roots = draw(3, 4, 4, seed=1) / 2
    covariances = roots @ roots.mT + 0.05 * torch.eye(4, dtype=F64)
    return CorrelatedMixture(SDE, torch.tensor([0.5, 0.2, 0.3]), draw(3, 2, 2), covariances)


def images() -> GaussianMixture:
    std = torch.tensor([0.3, 0.6, 0.2, 0.4, 0.5])
    return GaussianMixture(SDE, torch.ones(5), draw(5, 4, 4, seed=2), std)


def observed(shape: tuple[int, ...]) -> list[Observation]:
    """Two observations of x, one with correlated noise."""
    n = math.prod(shape)
    root = draw(2, 2, seed=3) / 4 + 0.3 * torch.eye(2, dtype=F64)
    first = Observation(Matrix(draw(2, n, seed=4), shape), draw(2, seed=5), 0.3)
    second = Matrix(draw(2, n, seed=6), shape)
    return [first, Observation(second, draw(2, seed=7), covariance=root @ root.T)]


PRIORS: dict[str, Callable[[], Prior]] = {
    "gaussian": lambda: gaussian(SDE),
    "one std": lambda: Gaussian(SDE, draw(2, 3), 0.7),
    "correlated": lambda: correlated(SDE),
    "diagonal": lambda: mixture(SDE),
    "isotropic": images,
    "full": full_mixture,
    "shared": lambda: CorrelatedMixture(
        VE(), torch.ones(2), draw(2, 3), torch.tensor([[0.5, 0.3, 0], [0.3, 0.4, 0], [0, 0, 1.0]])
    ),
    "matrix process": lambda: CorrelatedMixture(
        MatrixOrnsteinUhlenbeck(((-0.8, 1.5), (-0.6, -0.5)), ((0.9, 0.2), (0.0, 0.7))),
        torch.ones(3),
        draw(3, 2),
        0.3 * torch.eye(2),
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_bayes_rule_holds_everywhere(name: str) -> None:
    """log p(x | y) = log p(x) + log p(y | x) - log p(y) at any x: both sides are normalised."""
    prior = PRIORS[name]()
    observations = observed(prior.shape)
    posterior = exact_posterior(prior, observations)
    assert posterior.sde is prior.sde
    assert posterior.shape == prior.shape
    x = 2 * draw(50, *prior.shape, seed=8)
    likelihood = torch.stack([o.log_likelihood(x) for o in observations]).sum(0)
    evidence = log_evidence(prior, observations)
    wanted = prior.log_prob(x) + likelihood - evidence
    assert torch.allclose(posterior.log_prob(x), wanted, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("name", ["gaussian", "diagonal", "full"])
def test_one_after_the_other_is_both_at_once(name: str) -> None:
    prior = PRIORS[name]()
    first, second = observed(prior.shape)
    between = exact_posterior(prior, first)
    x = draw(20, *prior.shape, seed=8)
    at_once = exact_posterior(prior, [first, second])
    for t in (0.0, 0.3):
        one = exact_posterior(between, second)
        assert torch.allclose(one.log_prob(x, t), at_once.log_prob(x, t), rtol=1e-10)
        assert torch.allclose(one(x, t), at_once(x, t), rtol=1e-9)
    total = log_evidence(prior, first) + log_evidence(between, second)
    assert torch.allclose(total, log_evidence(prior, [first, second]), rtol=1e-12)


def normal(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
    return torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))


def test_on_the_line_everything_is_a_quadrature() -> None:
    # The trapezoidal rule, which converges exponentially for what vanishes at both ends, of
    # densities written out here; steps are a thirtieth of the narrowest.
    prior = line(SDE)
    a, y, s = 1.7, 0.6, 0.4
    o = Observation(Matrix(torch.tensor([[a]], dtype=F64)), torch.tensor([y], dtype=F64), s)
    posterior = exact_posterior(prior, o)
    x = torch.linspace(-6, 6, 12001, dtype=F64)
    weights = prior.log_weights.exp()  # given in float32
    parts = zip(weights, (-1.0, 0.2, 0.9), (0.25, 0.4, 0.3), strict=True)
    joint = sum(w * normal(x, m, c) for w, m, c in parts) * normal(a * x, y, s) * 1e-3
    evidence = joint.sum()
    assert torch.allclose(log_evidence(prior, o), evidence.log(), rtol=0, atol=1e-12)
    for t in (0.01, 0.3, 1.0):
        alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
        for z in (-1.2, 0.1, 0.8):
            noised = joint * normal(alpha * x, z, sigma)
            mean = (noised * x).sum() / noised.sum()
            state = torch.tensor([[z]], dtype=F64)
            log_p = (noised.sum() / evidence).log()
            assert torch.allclose(posterior.log_prob(state, t), log_p, rtol=0, atol=1e-10)
            wanted = (alpha * mean - z) / sigma**2
            assert torch.allclose(posterior(state, t), wanted, rtol=1e-10, atol=1e-10)


def test_in_the_plane_the_evidence_is_a_quadrature() -> None:
    prior = mixture(SDE)
    observations = observed((2,))
    grid = torch.linspace(-6, 6, 601, dtype=F64)
    x = torch.cartesian_prod(grid, grid)
    log_p = prior.log_prob(x) + sum(o.log_likelihood(x) for o in observations)
    step = float(grid[1] - grid[0])
    evidence = log_p.logsumexp(0) + 2 * math.log(step)
    assert math.isclose(float(log_evidence(prior, observations)), float(evidence), abs_tol=1e-10)
    mean = (log_p - evidence).exp() @ x * step**2
    posterior = exact_posterior(prior, observations)
    assert isinstance(posterior, CorrelatedMixture)
    assert torch.allclose(posterior.log_weights.exp() @ posterior.means, mean, atol=1e-10)


def test_weighted_draws_of_the_prior_agree() -> None:
    prior = images()
    observations = [
        Observation(Downsample(2, (4, 4)), draw(2, 2, seed=9) / 2, 0.5),
        Observation(Mask(torch.eye(4) > 0), draw(4, seed=10) / 2, 0.7),
    ]
    n = 200_000
    x = prior.sample(n, torch.Generator().manual_seed(0))
    log_w = sum(o.log_likelihood(x) for o in observations)
    w = torch.softmax(log_w, 0)
    effective = float(1 / w.square().sum())
    assert effective > 1000
    posterior = exact_posterior(prior, observations)
    assert isinstance(posterior, CorrelatedMixture)
    mean = posterior.log_weights.exp() @ posterior.means
    flat = x.flatten(1)
    spread = (w @ (flat - mean) ** 2).sqrt()
    # 4.5 standard errors: 16 coordinates, a false alarm once in 10^4.
    assert ((w @ flat - mean).abs() < 4.5 * spread / math.sqrt(effective)).all()
    evidence = torch.logsumexp(log_w, 0) - math.log(n)
    assert abs(float(evidence - log_evidence(prior, observations))) < 4.5 / math.sqrt(effective)
    drawn = posterior.sample(50_000, torch.Generator().manual_seed(1)).flatten(1)
    assert ((drawn.mean(0) - mean).abs() < 4.5 * spread / math.sqrt(50_000)).all()


def test_a_tiny_noise_keeps_its_digits() -> None:
    # x_1 ~ N(0, 1e8) seen to 1e-4: variance 1 / (1e8 + 1e-8) of what is seen, all digits of it.
    c = torch.diag(torch.tensor([1e8, 1.0], dtype=F64))
    prior = Gaussian(SDE, torch.zeros(2, dtype=F64), covariance=c)
    o = Observation(Matrix(torch.tensor([[1.0, 0.0]])), torch.tensor([3.0]), 1e-4)
    posterior = exact_posterior(prior, o)
    assert isinstance(posterior, Gaussian)
    assert torch.allclose(posterior.mean, torch.tensor([3.0, 0.0], dtype=F64), rtol=1e-12)
    assert math.isclose(float(posterior.variance.min()), 1 / (1e8 + 1e-8), rel_tol=1e-12)
    assert math.isclose(float(posterior.variance.max()), 1.0, rel_tol=1e-12)


def test_useless_data_leave_the_prior_and_perfect_data_leave_themselves() -> None:
    prior = images()
    every = Mask(torch.ones(4, 4, dtype=torch.bool))
    x = draw(10, 4, 4, seed=11)
    blind = exact_posterior(prior, Observation(every, torch.zeros(16), 1e9))
    assert torch.allclose(blind.log_prob(x), prior.log_prob(x), rtol=1e-10)
    sharp = exact_posterior(prior, Observation(every, draw(16), 1e-4))
    assert isinstance(sharp, CorrelatedMixture)
    mean = sharp.log_weights.exp() @ sharp.means
    assert torch.allclose(mean, draw(16), rtol=0, atol=1e-6)


def test_directions_without_variance_stay_where_they_are() -> None:
    flat = Gaussian(SDE, torch.ones(2), covariance=torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    o = Observation(Matrix(torch.tensor([[1.0, 0.0]])), torch.tensor([3.0]), 1.0)
    posterior = exact_posterior(flat, o)
    assert isinstance(posterior, Gaussian)
    # x = 1 + z (1, 1) with z ~ N(0, 1): the mean of z is (3 - 1) / 2, its variance 1/2.
    assert torch.allclose(posterior.mean, torch.full((2,), 2.0, dtype=F64))
    assert torch.allclose(posterior.variance, torch.tensor([0.0, 1.0], dtype=F64), atol=1e-12)


@pytest.mark.parametrize("linear", [True, False])
def test_points_are_weighed_by_their_likelihood(linear: bool) -> None:
    data = draw(200, 3, 4)
    prior = Empirical(SDE, data)
    a = Downsample((1, 2), (3, 4)) if linear else Nonlinear(torch.square, (3, 4))
    o = Observation(a, a.forward(data[:1])[0], 0.5)
    posterior = exact_posterior(prior, o)
    assert isinstance(posterior, GaussianMixture)
    w = np.exp(o.log_likelihood(data).numpy())
    kept = posterior.log_weights.exp().numpy()
    assert np.allclose(kept, w / w.sum(), rtol=1e-12, atol=0)
    assert math.isclose(float(log_evidence(prior, o)), math.log(w.mean()), rel_tol=1e-12)
    x, t = draw(5, 3, 4, seed=1), 0.4
    weighted = GaussianMixture(SDE, torch.from_numpy(w), data, 0.0)
    assert torch.allclose(posterior(x, t), weighted(x, t), rtol=1e-12)
    # A point so unlikely that its weight underflows leaves the posterior, and no NaN.
    sharp = exact_posterior(prior, Observation(a, a.forward(data[:1])[0], 1e-3))
    assert isinstance(sharp, GaussianMixture)
    assert torch.equal(sharp.means, data[:1].flatten(1))


@pytest.mark.parametrize("name", ["gaussian", "diagonal", "full", "points"])
def test_evidence_of_many_samples_is_that_of_each(name: str) -> None:
    prior = Empirical(SDE, draw(20, 3)) if name == "points" else PRIORS[name]()
    a = Matrix(draw(2, math.prod(prior.shape), seed=4), prior.shape)
    y, s = draw(6, 2, seed=5), draw(6, 2, seed=6).abs() + 0.1
    for noise in (0.3, s[0], s):
        o = Observation(a, y, noise)
        each = [log_evidence(prior, o.rows(i)) for i in range(6)]
        assert each[0].shape == ()
        assert torch.allclose(log_evidence(prior, o), torch.stack(each), rtol=1e-12)


def test_the_posterior_is_a_score_like_any_other() -> None:
    # 4,000 draws, exact solver noise aside: 5 standard errors of the mean and of the covariance.
    prior = mixture(SDE)
    posterior = exact_posterior(prior, observed((2,))[0])
    assert isinstance(posterior, CorrelatedMixture)
    n = 4000
    x = sample(posterior, n, steps=60, dtype=F64)
    pi = posterior.log_weights.exp()
    mean = pi @ posterior.means
    away = posterior.means - mean
    wanted = torch.einsum("k,kij->ij", pi, posterior.covariances) + (away.T * pi) @ away
    spread = wanted.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * spread / math.sqrt(n)).all()
    assert ((x.T.cov() - wanted).abs() < 5 * math.sqrt(2 / n) * spread.outer(spread)).all()


def test_fourier_data_of_a_white_prior_are_known() -> None:
    # Where a frequency is its own negative its variance is v, elsewhere v / 2 in each part, and
    # the negative's coefficient says the same again.
    v, s = 0.8**2, 0.3
    prior = Gaussian(SDE, torch.zeros(4), 0.8)
    o = Observation(Fourier(torch.tensor([True, True, False, True])), draw(3, 2), s)
    posterior = exact_posterior(prior, o)
    assert isinstance(posterior, Gaussian)
    own = 1 / (1 / v + 1 / s**2)
    # Two measured copies of each part of variance v / 2.
    part = 1 / (2 / v + 2 / s**2) * 2
    wanted = torch.tensor(sorted([own, part, part, v]), dtype=F64)
    assert torch.allclose(posterior.variance.sort().values, wanted, rtol=1e-12)


ONE = Matrix(torch.ones(1, 2))
SEEN = Observation(ONE, torch.ones(1), 0.1)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: exact_posterior(2 * mixture(SDE), SEEN),  # type: ignore[arg-type]
        TypeError,
        "prior must be a Gaussian.*got Sum",
    ),
    (lambda: log_evidence(gaussian(SDE), SEEN), ValueError, r"prior is of x \(3,\).*x \(2,\)"),
    (
        lambda: exact_posterior(mixture(SDE), Observation(ONE, torch.ones(5, 1), 0.1)),
        ValueError,
        r"each of 5 samples.*rows\(i\)",
    ),
    (
        lambda: exact_posterior(
            mixture(SDE), Observation(Nonlinear(torch.square, (2,)), torch.ones(2), 0.1)
        ),
        TypeError,
        "Nonlinear.* is not linear: the posterior has no closed form",
    ),
    (lambda: exact_posterior(mixture(SDE), []), TypeError, "one Observation or a list of them"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_what_has_no_closed_form_is_refused(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
