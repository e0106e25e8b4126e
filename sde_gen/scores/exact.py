"""Scores in closed form: the oracles of the tests and the targets of the pictures.

Under a linear process Gaussian data stay Gaussian and mixtures stay mixtures, with the same
responsibilities algebra at every time:

    p_t = sum_k pi_k N(alpha m_k, v_k),      v_k = alpha^2 c_k^2 + sigma^2,
    s(x, t) = sum_k r_k(x) (alpha m_k - x) / v_k,      r_k the posterior weight of component k.

Everything is computed in float64 (float32 loses the posterior weights to the cancellation in
|x|^2 - 2 x.m + |m|^2), from the mean of the data (far from 0 float64 loses them too), and returned
in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from ..facts import Facts
from ..moments import Moments
from ..ops import (
    Time,
    as_real,
    as_time,
    batch_of,
    check_finite,
    check_state,
    check_time,
    full_precision,
)
from ..sdes import LinearSDE
from .base import Score

_BUDGET = 1 << 22
"""Numbers that one chunk of components may take: 32 MiB in float64."""

_Pull = Callable[[Tensor], Tensor]
_R = TypeVar("_R")


def _sheltered(method: Callable[..., _R]) -> Callable[..., _R]:
    """In the precision that it asks for, whatever the caller's autocast."""

    @wraps(method)
    def run(self: _Exact, x: Tensor, t: Time = 0.0) -> _R:
        check_state(x)
        with full_precision(x.device.type):
            return method(self, x, t)

    return run


def _precise(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


class _Exact(Score):
    sde: LinearSDE
    _shape: tuple[int, ...]
    _where: Tensor
    _centre: Tensor

    def _know(self, sde: LinearSDE, shape: tuple[int, ...]) -> None:
        if not isinstance(sde, LinearSDE):
            raise TypeError(f"sde must be a LinearSDE, got {type(sde).__name__}")
        self.sde, self._shape = sde, tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def _tweedie(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.sde.tweedie(x, t, s, self._centre.reshape(self._shape))

    @property
    def device(self) -> torch.device:
        return self._where.device

    def _levels(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """alpha and sigma as (1, 1) or (B, 1), after checking x (B, *shape) and t."""
        if x.shape[1:] != self._shape:
            raise ValueError(f"x must have shape {batch_of(self._shape)}, got {tuple(x.shape)}")
        t = as_time(t)
        if t.ndim and t.shape != x.shape[:1]:
            raise ValueError(f"t must be a number or ({len(x)},), got {tuple(t.shape)}")
        check_time(t, self.sde.T)
        if self.singular and t.device.type == "cpu" and bool((t == 0).any()):
            raise ValueError("the data have no density (std 0): at t = 0 their score is singular")
        levels = (c(t).to(x.device) for c in (self.sde.alpha, self.sde.sigma))
        alpha, sigma = (_precise(c).reshape(-1, 1) for c in levels)
        return alpha, sigma


class Gaussian(_Exact):
    """Data N(mean, C): p_t = N(alpha mean, alpha^2 C + sigma^2 I).

    Args:
        sde: a linear process.
        mean: (*D); gives the shape of the data.
        std: a number or a tensor (*D), the standard deviation of each coordinate; ignored when
            ``covariance`` is given.
        covariance: a symmetric positive semi-definite matrix (n, n), n = prod(D).

    Raises:
        TypeError: ``sde`` is not linear.
        ValueError: negative std, wrong shapes, NaN, a covariance that is not symmetric or has a
            negative eigenvalue; when called: a time outside [0, T], or t = 0 where std is 0.

    >>> sg.Gaussian(sg.VP(), torch.zeros(2))(torch.ones(1, 2), 0.5)
    tensor([[-1., -1.]])
    """

    def __init__(
        self,
        sde: LinearSDE,
        mean: Tensor,
        std: float | Tensor = 1.0,
        covariance: Tensor | None = None,
    ) -> None:
        check_state(mean, "mean")
        check_finite(mean, "mean")
        self._know(sde, mean.shape)
        self.mean = self._where = _precise(mean).flatten()
        if covariance is not None:
            n, covariance = self.mean.numel(), as_real(covariance, "covariance")
            if covariance.shape != (n, n):
                raise ValueError(f"covariance must be {(n, n)}, got {(*covariance.shape,)}")
            moments = Moments.of(covariance, self.mean)
            self.variance = moments.values[1:].to(self.mean)
        else:
            scale = as_real(std, "std", self.mean.device)
            _check_std(scale)
            if scale.ndim and scale.shape != self._shape:
                raise ValueError(f"std must be a number or {self._shape}, got {(*scale.shape,)}")
            self.variance = scale.expand(self._shape).flatten() ** 2
            values = self.variance if scale.ndim else self.variance[:1]
            moments = Moments(values.cpu(), self.mean)
        self.basis, self._centre = moments.basis, self.mean
        self.singular = bool((self.variance == 0).any())
        std = math.sqrt(max(float(self.variance.mean()), 1e-12))
        self.facts = Facts(self._shape, std, moments)

    def _whiten(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """x_t - alpha mean in the eigenbasis (B, n), and the variances there (1 or B, n)."""
        alpha, sigma = self._levels(x, t)
        z = _precise(x).flatten(1) - alpha * self.mean
        z = z if self.basis is None else z @ self.basis
        return z, alpha**2 * self.variance + sigma**2

    @_sheltered
    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """-(alpha^2 C + sigma^2)^-1 (x - alpha m)."""
        z, v = self._whiten(x, t)
        s = -z / v
        if self.basis is not None:
            s = s @ self.basis.T
        return s.reshape(x.shape).to(x.dtype)

    @_sheltered
    def log_prob(self, x: Tensor, t: Time = 0.0) -> Tensor:
        """log p_t(x) in nats, (B, *D) -> (B,), float64."""
        z, v = self._whiten(x, t)
        return -0.5 * (z**2 / v + torch.log(2 * math.pi * v)).sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n data points (t = 0), float64 (n, *D)."""
        z = torch.randn(n, self.mean.numel(), generator=generator, dtype=self.mean.dtype)
        x = z.to(self.mean.device) * self.variance.sqrt()
        x = x if self.basis is None else x @ self.basis.T
        return (x + self.mean).reshape(n, *self._shape)


class GaussianMixture(_Exact):
    """Data sum_k pi_k N(m_k, c_k^2 I or diag).

    Args:
        sde: a linear process.
        weights: pi (K,), positive; normalised to sum 1.
        means: (K, *D).
        std: a number, (K,), or (K, *D).

    Raises:
        TypeError: ``sde`` is not linear.
        ValueError: weights that are not positive or not K of them; negative or misshapen std;
            when called: a time outside [0, T], or t = 0 where a std is 0.

    >>> law = sg.GaussianMixture(sg.VP(), [0.5, 0.5], torch.tensor([[-1.0], [1.0]]), 0.3)
    >>> law(torch.zeros(1, 1), 0.5)
    tensor([[0.]])
    """

    def __init__(
        self, sde: LinearSDE, weights: Tensor, means: Tensor, std: float | Tensor = 0.0
    ) -> None:
        check_state(means, "means")
        check_finite(means, "means")
        if means.ndim < 2:
            raise ValueError(f"means must be (K, *D), one row a component, got {(*means.shape,)}")
        self._know(sde, means.shape[1:])
        weights = as_real(weights, "weights", means.device)
        if weights.shape != (len(means),) or not (weights > 0).all():
            raise ValueError(f"weights must be {len(means)} positive numbers, as many as means")
        self.log_weights = torch.log(weights / weights.sum())
        self.means = self._where = means.flatten(1)
        scale = as_real(std, "std", means.device)
        if scale.ndim > 1 and scale.shape == means.shape:
            scale = scale.flatten(1)
        elif scale.shape not in ((), means.shape[:1]):
            raise ValueError(
                f"std must be a number, ({len(means)},) or {(*means.shape,)}; for one value a"
                f" coordinate repeat it for each mean; got {tuple(scale.shape)}"
            )
        _check_std(scale)
        # (K, 1) or (K, D); a number stays one row, so that 50,000 means cost no memory.
        self.variance = scale.reshape(-1, 1) ** 2 if scale.ndim < 2 else scale**2
        self.singular = bool((self.variance == 0).any())
        self._centre = torch.zeros_like(self.means[0], dtype=scale.dtype)
        self._centre = torch.stack([w.exp() @ m for w, m, _ in self._chunks(1)]).sum(0)
        # Between and within components, in the mean over coordinates.
        spread = sum(float(w.exp() @ (m.square() + v).mean(1)) for w, m, v in self._chunks(1))
        self.facts = Facts(self._shape, math.sqrt(max(spread, 1e-12)))

    def _chunks(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Log weights, means less the mean of the data, and variances, a part of the components
        at a time, in float64."""
        k = len(self.means)
        size = max(1, _BUDGET // (self.means.shape[1] + batch))
        if self.variance.shape[1] > 1:
            size = max(1, size // batch)
        for i in range(0, k, size):
            v = self.variance if len(self.variance) == 1 else self.variance[i : i + size]
            m = _precise(self.means[i : i + size]) - self._centre
            yield self.log_weights[i : i + size], m, v

    def _each(self, x: Tensor, t: Time) -> Iterator[tuple[Tensor, _Pull]]:
        """For each chunk: log joint densities (b, n, K), and the map from weights to scores.

        States are (1, B, D) under one time and (B, 1, D) under a time each, so that both are
        batched matrix products.
        """
        alpha, sigma = self._levels(x, t)
        y = _precise(x).flatten(1) - alpha * self._centre
        alpha, sigma = alpha.unsqueeze(-1), sigma.unsqueeze(-1)
        y = y.unsqueeze(0) if len(alpha) == 1 else y.unsqueeze(1)
        for log_w, m, c in self._chunks(len(x)):
            component = _isotropic if c.shape[-1] == 1 else _diagonal
            p, pull = component(y, alpha, m, alpha**2 * c + sigma**2)
            yield log_w + p, pull

    @_sheltered
    def _evaluate(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """log p_t (B,) and score (B, D) in one pass: a running soft maximum over the chunks."""
        chunks = self._each(x, t)
        p, pull = next(chunks)
        top = p.amax(-1, keepdim=True)
        r = torch.exp(p - top)
        mass, total = r.sum(-1, keepdim=True), pull(r)
        for p, pull in chunks:
            new = torch.maximum(top, p.amax(-1, keepdim=True))
            r, shrink = torch.exp(p - new), torch.exp(top - new)
            mass, total = shrink * mass + r.sum(-1, keepdim=True), shrink * total + pull(r)
            top = new
        log_p = top + torch.log(mass) - 0.5 * self.means.shape[1] * math.log(2 * math.pi)
        return log_p.flatten(), (total / mass).reshape(len(x), -1)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """sum_k r_k (alpha m_k - x) / v_k."""
        return self._evaluate(x, t)[1].reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, t: Time = 0.0) -> Tensor:
        """log p_t(x) in nats, (B, *D) -> (B,), float64; needs std > 0 or t > 0."""
        return self._evaluate(x, t)[0]

    @_sheltered
    def posterior(self, x: Tensor, t: Time = 0.0) -> Tensor:
        """Posterior weight of each component given x_t = x: (B, *D) -> (B, K)."""
        p = torch.cat([p for p, _ in self._each(x, t)], -1)
        return torch.softmax(p.reshape(len(x), -1), 1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n data points (t = 0), (n, *D), in the dtype of the means."""
        k = torch.multinomial(
            self.log_weights.exp().cpu(), n, replacement=True, generator=generator
        ).to(self.means.device)
        m = self.means[k]
        c = self.variance.sqrt().to(m.dtype)
        c = c if len(c) == 1 else c[k]
        z = torch.randn(m.shape, generator=generator, dtype=m.dtype).to(m.device)
        return (m + c * z).reshape(n, *self._shape)


def _isotropic(y: Tensor, alpha: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, _Pull]:
    """y (b, n, D), alpha (b, 1, 1), m (K, D), v (b, K or 1, 1): log N(y; alpha m, v) (b, n, K)
    up to its constant, and the map r -> sum_k r_k (alpha m_k - y) / v_k."""
    s = 1 / v.mT
    square = (y * y).sum(-1, keepdim=True) + alpha**2 * torch.linalg.vecdot(m, m)
    p = -0.5 * (square - 2 * alpha * (y @ m.mT)) * s + 0.5 * y.shape[-1] * torch.log(s)

    def pull(r: Tensor) -> Tensor:
        r = r * s
        return alpha * (r @ m) - r.sum(-1, keepdim=True) * y

    return p, pull


def _diagonal(y: Tensor, alpha: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, _Pull]:
    """The same for a variance in each coordinate, v (b, K or 1, D)."""
    s = (1 / v).expand(-1, len(m), -1)
    n = alpha * m * s
    square = (y * y) @ s.mT + (alpha * m * n).sum(-1).unsqueeze(-2)
    p = -0.5 * (square - 2 * y @ n.mT) + 0.5 * torch.log(s).sum(-1).unsqueeze(-2)
    return p, lambda r: r @ n - (r @ s) * y


def _check_std(std: Tensor) -> None:
    if not bool((std >= 0).all()):
        raise ValueError("std must not be negative or NaN")


class Empirical(GaussianMixture):
    """The law of a finite data set, noised: its score remembers every point.

    s(x, t) = (alpha E[x_0 | x] - x) / sigma^2 with the posterior mean over all N points. Chunked
    over the data, so memory does not grow with N; no generative model that fits this score
    exactly can make anything new.

    Args:
        sde: a linear process.
        data: (N, *D), kept in its own dtype and device.

    >>> score = sg.Empirical(sg.VP(), torch.tensor([[0.25, 0.5]]))
    >>> score.denoise(torch.ones(8, 2), 0.5)[0]
    tensor([0.2500, 0.5000])
    """

    def __init__(self, sde: LinearSDE, data: Tensor) -> None:
        check_state(data, "data")
        check_finite(data, "data")
        weights = torch.ones(len(data), dtype=torch.float64, device=data.device)
        super().__init__(sde, weights, data, 0.0)
