"""Posteriors in closed form: what every method of this room is measured against.

Under data sum_k pi_k N(m_k, C_k) and an observation y = A x + n, n ~ N(0, S), the posterior is
again a mixture: with G_k = A C_k A^T + S and the gain K_k = C_k A^T G_k^-1,

    m_k' = m_k + K_k (y - A m_k),    C_k' = (I - K_k A) C_k (I - K_k A)^T + K_k S K_k^T,
    pi_k' = pi_k N(y; A m_k, G_k) / p(y),    p(y) = sum_k pi_k N(y; A m_k, G_k).

The covariance is in Joseph's form, a sum of squares, which keeps its digits however small the
noise is. Everything is computed for the whitened observation W y = W A x + N(0, I), in float64:
then G >= I, and its Cholesky factor exists. The posterior is a law of data like the prior, so its
score is exact at every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..scores import CorrelatedMixture, Gaussian, GaussianMixture
from .observation import Observation, joint
from .whitened import of_state

Prior = Gaussian | GaussianMixture | CorrelatedMixture
Observations = Observation | Sequence[Observation]


def exact_posterior(prior: Prior, observations: Observations) -> Prior:
    """The law of x given y: a score under the prior's process, with ``sample`` and ``log_prob``.

    Args:
        prior: ``Gaussian`` (gives a ``Gaussian``), ``GaussianMixture`` or ``CorrelatedMixture``
            (give a ``CorrelatedMixture``), or points: an ``Empirical`` or a mixture of std 0
            (gives points, under any operator, linear or not). A component whose weight is below
            1e-300 is left out.
        observations: one, or a list of them that hold jointly, with the same y for all samples;
            of x in the units of the prior's data.

    Raises:
        TypeError: another prior, or an operator that is not linear.
        ValueError: an operator of another shape than the prior's, or a y of several samples.

    >>> from sde_gen import VP
    >>> from sde_gen.inverse import Matrix
    >>> prior = Gaussian(VP(), torch.zeros(1))
    >>> y = Observation(Matrix(torch.ones(1, 1)), torch.ones(1), 1.0)
    >>> posterior = exact_posterior(prior, y)
    >>> float(posterior.mean), float(posterior.variance)
    (0.5, 0.5)
    """
    observation = _checked(prior, observations)
    if observation.batch is not None:
        raise ValueError(
            f"y has a row for each of {observation.batch} samples, which have a posterior each:"
            " take that of one, observation.rows(i)"
        )
    law = _law(prior, observation)
    # What is known of the data holds for the posterior, but for their law.
    return law.with_facts(replace(prior.facts, std=law.facts.std, moments=law.facts.moments))


def _law(prior: Prior, observation: Observation) -> Prior:
    if _are_points(prior):
        log_w = prior.log_weights + observation.log_likelihood(_states(prior))
        log_w, means = _kept(log_w, prior.means)
        return GaussianMixture(prior.sde, log_w.exp(), means.reshape(-1, *prior.shape), 0.0)
    log_w, means, covariances = _components(prior)
    a, gain, away, log_p = _innovation(observation, means, covariances)
    means = means + (gain @ away).squeeze(-1)
    rest = torch.eye(means.shape[1]).to(means) - gain @ a
    covariances = rest @ covariances @ rest.mT + gain @ gain.mT
    if isinstance(prior, Gaussian):
        return Gaussian(prior.sde, means.reshape(prior.shape), covariance=covariances[0])
    covariances = covariances.expand(len(means), -1, -1)
    log_w, means, covariances = _kept(log_w + log_p[0], means, covariances)
    means = means.reshape(-1, *prior.shape)
    return CorrelatedMixture(prior.sde, log_w.exp(), means, covariances)


def log_evidence(prior: Prior, observations: Observations) -> Tensor:
    """log p(y) in nats, float64: (), or (R,) where y has a row for each of R samples.

    Arguments and errors are those of ``exact_posterior``, but that y may have rows.

    >>> from sde_gen import VP
    >>> from sde_gen.inverse import Matrix
    >>> prior = Gaussian(VP(), torch.zeros(1))
    >>> y = Observation(Matrix(torch.ones(1, 1)), torch.zeros(1), 1.0)
    >>> log_evidence(prior, y)  # log N(0; 0, 2)
    tensor(-1.2655, dtype=torch.float64)
    """
    observation = _checked(prior, observations)
    noise_per_row = observation.log_volume.ndim > 0
    if observation.batch is not None and (noise_per_row or _are_points(prior)):
        each = range(observation.batch)
        return torch.stack([log_evidence(prior, observation.rows(i)) for i in each])
    if _are_points(prior):
        log_p = prior.log_weights + observation.log_likelihood(_states(prior))
        return log_p.logsumexp(0)
    log_w, means, covariances = _components(prior)
    log_p = (log_w + _innovation(observation, means, covariances).log_density).logsumexp(1)
    return log_p[0] if observation.batch is None else log_p


class _Innovation(NamedTuple):
    """For K Gaussian components, k = 1 or K covariances, R rows of y and its whitened operator."""

    a: Tensor
    """W A (m, n)."""
    gain: Tensor
    """(k, n, m)."""
    away: Tensor
    """W (y - A m_k), (K, m, R)."""
    log_density: Tensor
    """log N(y; A m_k, G_k), (R, K)."""


def _innovation(observation: Observation, means: Tensor, covariances: Tensor) -> _Innovation:
    dense = observation.operator.dense().to(means)
    a = observation.whiten(dense.T.reshape(-1, *observation.operator.measured)).flatten(1).T
    y = observation.y.to(means)
    y = observation.whiten(y.unsqueeze(0) if observation.batch is None else y).flatten(1)
    away = y.T - (means @ a.T).unsqueeze(-1)
    cross = covariances @ a.T
    low = torch.linalg.cholesky(a @ cross + torch.eye(len(a)).to(a))
    gain = torch.cholesky_solve(cross.mT, low).mT
    z = torch.linalg.solve_triangular(low, away, upper=False)
    volume = low.diagonal(dim1=-2, dim2=-1).log().sum(-1) + observation.log_volume.to(low)
    return _Innovation(a, gain, away, -0.5 * z.square().sum(1).T - volume)


def _components(prior: Prior) -> tuple[Tensor, Tensor, Tensor]:
    """log weights (K,), means (K, n) and covariances (1 or K, n, n), float64."""
    if isinstance(prior, CorrelatedMixture):
        return prior.log_weights, prior.means, prior.covariances
    if isinstance(prior, GaussianMixture):
        means = prior.means.double()
        variance = prior.variance.expand(-1, means.shape[1])
        return prior.log_weights, means, torch.diag_embed(variance)
    c = torch.diag_embed(prior.variance.expand(prior.mean.shape))
    c = c if prior.basis is None else prior.basis @ c @ prior.basis.T
    return prior.mean.new_zeros(1), prior.mean.unsqueeze(0), c.unsqueeze(0)


def _are_points(prior: Prior) -> TypeGuard[GaussianMixture]:
    return isinstance(prior, GaussianMixture) and not bool(prior.variance.any())


def _states(prior: GaussianMixture) -> Tensor:
    return prior.means.double().reshape(-1, *prior.shape)


def _kept(log_w: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Normalised log weights and their components, without those of weight 0."""
    log_w = log_w - log_w.logsumexp(0)
    keep = log_w > math.log(1e-300)
    return log_w[keep], *(part[keep] for part in parts)


def _checked(prior: Prior, observations: Observations) -> Observation:
    if not isinstance(prior, Gaussian | GaussianMixture | CorrelatedMixture):
        raise TypeError(
            "prior must be a Gaussian, GaussianMixture, Empirical or CorrelatedMixture, of which"
            f" the posterior is known; got {type(prior).__name__}"
        )
    observation = joint(observations)
    operator = observation.operator
    if operator.shape != prior.shape:
        raise ValueError(f"the prior is of x {prior.shape}, {operator} of x {operator.shape}")
    if not operator.linear and not _are_points(prior):
        raise TypeError(f"{operator} is not linear: the posterior has no closed form")
    return of_state(observation, prior.facts)
