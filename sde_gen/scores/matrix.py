"""Exact scores of processes with matrix coefficients.

``Lifted`` takes a score of the data under a scalar process to a state that holds more than the
data: the state is a noisy measurement of them, and its score a function of the score of one
statistic (see ``sdes.matrix``). ``CorrelatedMixture`` is the mixture of Gaussians of full
covariance, which any linear process keeps a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..facts import Facts
from ..ops import (
    Time,
    as_real,
    as_time,
    batch_of,
    check_finite,
    check_state,
    check_time,
    match,
)
from ..sdes import KernelSDE, LinearSDE, MatrixSDE, read
from .base import Score
from .network import check_one_component


class Lifted(Score):
    """A score of scalar-noised data as the score of a matrix process, s = pick^T s_y - rest x.

    y is the statistic of the state, x_0 + sqrt(W) z, and s_y is read off ``score`` at the time
    when its own process has that noise: s_y(y) = alpha s(alpha y). So exact mixtures, networks
    trained under VP or EDM, and any guided sum of these serve a process with velocities as well.

    Args:
        score: knows its linear process, which must reach the noise level of ``sde`` at T.
        sde: a matrix process whose data are one component.

    Raises:
        TypeError: a score or a process of another kind.
        ValueError: the process of the score ends before the noise of ``sde`` does.

    >>> score = sg.Gaussian(sg.EDM(1000.0), torch.zeros(3))
    >>> sg.Lifted(score, sg.CriticallyDamped())(torch.zeros(8, 2, 3), 0.5).shape
    torch.Size([8, 2, 3])
    """

    sde: MatrixSDE

    def __init__(self, score: Score, sde: MatrixSDE) -> None:
        check_one_component(sde)
        inner = getattr(score, "sde", None)
        if not isinstance(sde, MatrixSDE) or not isinstance(inner, LinearSDE):
            raise TypeError(
                "Lifted needs a score that knows its LinearSDE (.sde) and a MatrixSDE, got"
                f" {score!r} with sde = {inner!r}, and {sde!r}"
            )
        most, asked = (float(torch.exp(-0.5 * s.log_snr(s.T))) for s in (inner, sde))
        if most < asked * (1 - 1e-9):
            raise ValueError(
                f"the score's process {inner!r} reaches noise / signal = {most:.4g}, {sde!r} goes"
                f" to {asked:.4g}: give it a score under a longer process, EDM({asked + 1:.0f})"
            )
        self.score, self.inner, self.sde = score, inner, sde
        self.facts, self.singular = score.facts.of_another_law(), score.singular
        self.batch, self.eta = score.batch, score.eta

    @property
    def device(self) -> torch.device:
        """That of the score."""
        return self.score.device

    def _at(self, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The time at which the score's own process has that noise, and alpha there."""
        level = -torch.log(noise[..., 0, 0])
        time = torch.where(t > 0, self.inner.time_at(level), 0.0).clamp_max(self.inner.T)
        return time, self.inner.alpha(time)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """pick^T s_y(y) - rest x, (B, k, *rest)."""
        t = as_time(t)
        c = self.sde.channel(t)
        time, alpha = self._at(t, c.noise)
        y = self.sde.statistic(x, c)
        alpha = match(alpha, y)
        return self.sde.state_score(x, alpha * read(self.score, alpha * y, time), c)

    @property
    def log_prob(self) -> Callable[..., Tensor]:
        """(x, t = 0) -> log p_t of the state in nats, (B, k, *rest) -> (B,).

        log p_t(x) = log p(y) - 1/2 x . rest x - n/2 [log det Sigma - log W + (k - 1) log 2 pi].

        Raises:
            AttributeError: the lifted score has no ``log_prob``, so neither has this.
        """
        return partial(self._log_prob, self.score.log_prob)  # type: ignore[attr-defined]

    def _log_prob(self, known: Callable[..., Tensor], x: Tensor, t: Time = 0.0) -> Tensor:
        t = as_time(t)
        c = self.sde.channel(t)
        time, alpha = self._at(t, c.noise)
        y = self.sde.statistic(x, c).double()
        start = math.prod(self.sde.added)
        low = self.sde.sigma(t).diagonal(dim1=-2, dim2=-1).prod(-1)
        beside = torch.where(t > 0, low**2 / c.noise[..., 0, 0], start)
        n, k = y[0].numel(), self.sde.size
        inner = known(match(alpha, y) * y, time) + n * torch.log(alpha)
        flat = x.reshape(len(x), k, -1).double()
        square = (flat * (c.rest @ flat)).sum((1, 2))
        volume = torch.log(beside) + (k - 1) * math.log(2 * math.pi)
        return inner - 0.5 * square - 0.5 * n * volume

    def given(self, **context: Any) -> Score:
        """The context bound to the score inside."""
        return Lifted(self.score.given(**context), self.sde)

    def rows(self, index: slice | Tensor) -> Score:
        """The score inside for these rows."""
        return Lifted(self.score.rows(index), self.sde)


class CorrelatedMixture(Score):
    """Data sum_j pi_j N(m_j, C_j) with full covariances, under any process with a kernel.

    p_t = sum_j pi_j N(alpha m_j, alpha C_j alpha^T + sigma sigma^T), in float64. Each call solves
    with a matrix for each component (and each time): for few components in few dimensions.

    Args:
        sde: a linear process, scalar or matrix.
        weights: pi (K,), positive; normalised to sum 1.
        means: (K, *D).
        covariances: (K, n, n) or (n, n), n = prod(D): symmetric, positive semi-definite.

    Raises:
        TypeError: a process without a kernel.
        ValueError: wrong shapes; weights that are not positive; a matrix that is not symmetric or
            has a negative eigenvalue; when called: a time outside [0, T], a state of the wrong
            shape, or t = 0 where a covariance is singular.

    >>> one = torch.ones(1)
    >>> score = sg.CorrelatedMixture(sg.VP(), one, torch.zeros(1, 2), torch.eye(2)[None])
    >>> score(torch.ones(8, 2), 0.5)[0]
    tensor([-1., -1.])
    """

    sde: KernelSDE
    _shape: tuple[int, ...]

    def __init__(
        self, sde: KernelSDE, weights: Tensor, means: Tensor, covariances: Tensor
    ) -> None:
        if not isinstance(sde, KernelSDE):
            raise TypeError(f"sde must be a LinearSDE or MatrixSDE, got {type(sde).__name__}")
        check_state(means, "means")
        check_finite(means, "means")
        self.sde, self._shape = sde, tuple(means.shape[1:])
        weights = as_real(weights, "weights", means.device)
        if weights.shape != (len(means),) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {len(means)} positive numbers, as many as means")
        self.log_weights = torch.log(weights / weights.sum())
        self.means = means.double().flatten(1)
        k, n = self.means.shape
        covariances = as_real(covariances, "covariances", means.device)
        if covariances.shape not in ((n, n), (k, n, n)):
            raise ValueError(f"covariances must be {(n, n)} or {(k, n, n)}: {covariances.shape}")
        self.covariances = covariances.expand(k, n, n)
        values, vectors = torch.linalg.eigh(self.covariances)
        if not torch.allclose(self.covariances, self.covariances.mT) or bool(
            (values < -1e-9).any()
        ):
            raise ValueError("covariances must be symmetric with eigenvalues >= 0")
        self._root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        self.singular = bool((values <= 1e-12 * values.max()).any())
        pi = self.log_weights.exp()
        away = self.means - pi @ self.means
        spread = self.covariances.diagonal(dim1=1, dim2=2) + away**2
        self.facts = Facts(self._shape, math.sqrt(float((pi @ spread).mean())))

    @property
    def device(self) -> torch.device:
        """Where its means are."""
        return self.means.device

    @property
    def shape(self) -> tuple[int, ...]:
        """*D of the data."""
        return self._shape

    def _components(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """log of the joint density of x and each component (B, K), and its score (B, K, N)."""
        check_state(x)
        t, wanted = as_time(t), self.sde.state_shape(self._shape)
        check_time(t, self.sde.T)
        if x.shape[1:] != wanted:
            raise ValueError(f"x must have shape {batch_of(wanted)}, got {tuple(x.shape)}")
        if self.singular and bool((t == 0).any()):
            raise ValueError("a covariance is singular: at t = 0 the score is not defined")
        size = self.means.shape[1]
        alpha = _blocks(self.sde.alpha(t).to(x.device), size).unsqueeze(1)
        sigma = _blocks(self.sde.sigma(t).to(x.device), math.prod(wanted)).unsqueeze(1)
        law = alpha @ self.covariances @ alpha.mT + sigma @ sigma.mT
        low = torch.linalg.cholesky(law)
        away = x.double().flatten(1).unsqueeze(1) - (alpha @ self.means.unsqueeze(-1)).squeeze(-1)
        z = torch.linalg.solve_triangular(low, away.unsqueeze(-1), upper=False)
        volume = low.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * x[0].numel() * math.log(2 * math.pi)
        log_p = self.log_weights - 0.5 * z.square().sum((-2, -1)) - volume - constant
        score = -torch.linalg.solve_triangular(low.mT, z, upper=True).squeeze(-1)
        return log_p, score

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """sum_j r_j V_j^-1 (alpha m_j - x)."""
        log_p, scores = self._components(x, t)
        s = (torch.softmax(log_p, 1).unsqueeze(-1) * scores).sum(1)
        return s.reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, t: Time = 0.0) -> Tensor:
        """log p_t of the state in nats, (B,), float64."""
        return torch.logsumexp(self._components(x, t)[0], 1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n data points (t = 0), float64 (n, *D)."""
        weights = self.log_weights.exp().cpu()
        j = torch.multinomial(weights, n, replacement=True, generator=generator).to(self.device)
        z = torch.randn(n, self.means.shape[1], 1, generator=generator, dtype=torch.float64)
        z = z.to(self.device)
        return (self.means[j] + (self._root[j] @ z).squeeze(-1)).reshape(n, *self._shape)


def _blocks(c: Tensor, n: int) -> Tensor:
    """A coefficient, () or (b,) or a matrix, as matrices (b, i, n) on flat states: c x 1."""
    c = c.reshape(-1, 1, 1) if c.ndim < 2 else c.reshape(-1, *c.shape[-2:])
    r = n // c.shape[-1]
    one = torch.eye(r, dtype=c.dtype, device=c.device)
    return torch.einsum("bij,rs->birjs", c, one).reshape(len(c), -1, n)
