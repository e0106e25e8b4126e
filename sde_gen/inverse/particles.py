"""Particles: draws from the posterior that become exact as their number grows, and p(o).

Sequential Monte Carlo (Wu et al. 2023; Del Moral 2004) on the reverse chain of the prior, here in
y = x / alpha with w = (sigma / alpha)^2. Its step from w_t to w_s, r = w_s / w_t,

    k(y_s | y_t) = N(r y_t + (1 - r) D, w_s (1 - r) I + (1 - r)^2 C_t),

C_t = (C^-1 + I / w_t)^-1, is ``Exponential(1, C)`` at eta = 1, exact for Gaussian data of
covariance C. It says x_0 ~ N(D, C_t), whence a *twist* psi_t(y) = N(o; A D, A C_t A^T + S), what
is expected of the observation. Under that Gaussian law of (x_0, y_s, o) the step is drawn given o,

    p(y_s | y_t, o) = k(y_s | y_t) phi(y_s) / psi_t(y_t),   phi(y_s) = N(o; A D', A C_s A^T + S),

with D' = E[x_0 | y_s] of the same law (the score there is not asked). So the weight of the step is

    psi_s(y_s) k / (psi_t(y_t) p(y_s | y_t, o)) = psi_s(y_s) / phi(y_s):

by how much the observation is expected otherwise than was foretold. Both have one covariance, and
for Gaussian data D' = D: the weights are constant, and the draws and the evidence exact for any
number of particles. For others they correct what the step and the twist got wrong.

All is linear algebra of the measurements' size, and one call of the denoiser a step: no Jacobian.
A nonlinear A is linearised at D; then the two covariances differ and the last weight is the true
likelihood's: still exact in the number of particles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .. import grids
from ..moments import Moments, alike
from ..ops import all_finite, check_count, full_precision, user_precision
from ..scores import Score
from ..sdes import LinearSDE
from .cloud import Cloud, Draws, systematic
from .covariance import Covariance, DataCovariance, Known, Tweedie
from .observation import Observation
from .twists import GaussianTwist, Level, Steered, TweedieTwist, Twist
from .whitened import MOST, Whitened, check_prior

FEW = 10
"""An effective number of particles below which they have collapsed."""


@dataclass(frozen=True, eq=False)
class Particles:
    """Weighted draws from a posterior; with R observations each tensor begins with an axis R.

    Attributes:
        x: (N, *D), in the units of the data.
        log_weights: (N,), normalised.
        log_evidence: log p(o) in nats.
        standard_error: of the log evidence, from the spread of the weights between resamplings.
        ess: effective number of particles at each step, (steps + 1,), before any resampling.
        calls: evaluations of the denoiser an observation.

    >>> from sde_gen import inverse
    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> seen = inverse.Observation(inverse.Matrix(torch.ones(1, 2)), torch.ones(1), 0.5)
    >>> inverse.particles(law, seen, 50, 10, seed=0).draw(16).shape
    torch.Size([16, 2])
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    calls: int

    def __str__(self) -> str:
        n = self.log_weights.shape[-1]
        low, end = self.ess.amin(-1).flatten(), self.ess[..., -1].flatten()
        lines = [
            f"log evidence {float(z):.3f} +- {float(e):.3f} nats, effective particles of {n}:"
            f" {float(b):.0f} at the end, {float(a):.0f} at least"
            for z, e, a, b in zip(
                self.log_evidence.flatten(), self.standard_error.flatten(), low, end, strict=True
            )
        ]
        return "\n".join(lines)

    @property
    def mean(self) -> Tensor:
        """E[x | o], (*D)."""
        return self._average(self.x)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each coordinate given o, (*D)."""
        return self._average((self.x - self.mean.unsqueeze(self._axis)) ** 2).sqrt()

    def draw(self, n: int, seed: int = 0) -> Tensor:
        """n draws of equal weight, (n, *D): particles, as often as they weigh.

        In random order: any of them is a draw.
        """
        log_w = self.log_weights.reshape(-1, self.log_weights.shape[-1])
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(len(log_w), 1, generator=generator, dtype=torch.float64)
        chosen = systematic(log_w, u.to(log_w.device), check_count(n, "n"))
        order = torch.rand(chosen.shape, generator=generator).argsort(1).to(chosen.device)
        chosen = chosen.gather(1, order)
        x = self.x.reshape(*log_w.shape, *self.x.shape[self._axis + 1 :])
        x = x[torch.arange(len(x), device=x.device).unsqueeze(1), chosen]
        return x if self._axis else x[0]

    @property
    def _axis(self) -> int:
        return self.log_weights.ndim - 1

    def _average(self, x: Tensor) -> Tensor:
        weights = self.log_weights.exp().to(x)
        return (weights.reshape(*weights.shape, *(1,) * (x.ndim - weights.ndim)) * x).sum(
            self._axis
        )


def particles(
    prior: Score,
    observations: Observation | Sequence[Observation],
    count: int = 600,
    steps: int = 100,
    seed: int | None = None,
    *,
    covariance: Covariance | None = None,
    times: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Particles:
    """Draw from the posterior by twisted sequential Monte Carlo, with the evidence.

    Args:
        prior: a score that knows its ``LinearSDE``. C is that of its ``facts.moments``, or V I
            with V of ``facts.std`` where it has none: the better C, the fewer particles.
        observations: one, or a list that holds jointly. Where y has a row for each of R, there
            are R systems of particles, run as one batch.
        count: N, particles an observation.
        steps: calls of the denoiser a particle.
        seed: particle i of observation r is a function of (seed, r N + i) and of the others of r;
            None draws a seed from torch.
        covariance: what the twist takes for Cov[x_0 | x_t]: ``DataCovariance()``, the default, or
            another rule that is known beforehand (``Isotropic``); or ``Tweedie()``, which is right
            for all data, costs a backward pass for each measurement in each step, and takes a
            linear A.
        times: a falling grid that ends at 0; by default that of ``sample``.
        dtype: of the states.
        chunk: how many states the denoiser is given at once; None gives it all.

    Raises:
        TypeError, ValueError: as ``Posterior``; another rule; fewer than two particles; a
            grid that does not end at 0; more than 2,048 measurements.

        FloatingPointError: weights that are not finite.

    Warns:
        RuntimeWarning: where the effective number of particles fell below 10: take more steps,
            more particles, or a better covariance.

    >>> from sde_gen import VP, Gaussian
    >>> from sde_gen.inverse import Matrix, log_evidence
    >>> prior = Gaussian(VP(), torch.zeros(2).double(), 0.5)
    >>> seen = Observation(Matrix(torch.tensor([[1.0, 1.0]])), torch.ones(1), 0.1)
    >>> found = particles(prior, seen, 50, 10, seed=0)
    >>> float(found.log_evidence), float(log_evidence(prior, seen))  # exact for Gaussian data
    (-1.5627, -1.5627)
    """
    seen = Whitened(prior, observations, "particles")
    if seen.observation.operator.linear and not seen.is_dense:
        raise ValueError(
            f"particles take up to {MOST} measurements, and a matrix A that fits into memory; got"
            f" {seen.observation.operator}"
        )
    twist = _twist(prior, seen, count, DataCovariance() if covariance is None else covariance)
    shape = seen.observation.operator.shape
    return _run(prior, twist, shape, seen.batch, count, steps, seed, times, dtype, chunk)


def steer(
    prior: Score,
    log_likelihood: Callable[[Tensor], Tensor],
    count: int = 600,
    steps: int = 100,
    seed: int | None = None,
    *,
    times: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Particles:
    """Draw from p(x) exp(l(x)) / Z for any l, of which no gradient is taken, with log Z.

    Feynman-Kac steering (Singhal et al. 2025): the prior's own steps, weighted by exp l(D). Exact
    in the number of particles, and needs more of them than ``particles`` the more l tells.

    Args:
        log_likelihood: l, of states in the units of the data: (B, *D) -> (B,), nats.

    The others, and what is raised, as in ``particles``.

    >>> from sde_gen import inverse
    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> inverse.steer(law, lambda x: x[:, 0], 50, 10, seed=0).x.shape
    torch.Size([50, 2])
    """
    if not callable(log_likelihood):
        raise TypeError(f"log_likelihood must be a function of x (B, *D), got {log_likelihood!r}")
    check_prior(prior, "steer")
    if (shape := prior.inside) is None:
        raise TypeError("steer needs a prior that knows the shape of its data (facts.shape)")

    def of_state(x: Tensor) -> Tensor:
        found = log_likelihood(prior.facts.decode(x))
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"log_likelihood must return ({len(x)},) for x, got {got}")
        return found.double()

    twist = Steered(of_state, _moments(prior, DataCovariance()))
    return _run(prior, twist, shape, None, count, steps, seed, times, dtype, chunk)


def _twist(prior: Score, seen: Whitened, count: int, rule: Covariance) -> Twist:
    if isinstance(rule, Known):
        return GaussianTwist(seen, count, _moments(prior, rule))
    if not isinstance(rule, Tweedie):
        raise TypeError(f"covariance must be DataCovariance() or Tweedie() here, got {rule!r}")
    if not seen.observation.operator.linear:
        raise TypeError(
            f"Tweedie() takes a linear A, not {seen.observation.operator}; DataCovariance() takes"
            " any, linearised at D"
        )
    return TweedieTwist(seen, count, _moments(prior, DataCovariance()))


# ---- the run ----


def _run(
    prior: Score,
    twist: Twist,
    shape: tuple[int, ...],
    batch: int | None,
    count: int,
    steps: int,
    seed: int | None,
    times: Tensor | None,
    dtype: torch.dtype,
    chunk: int | None,
) -> Particles:
    count, sde = check_count(count, "count", 2), prior.sde
    assert isinstance(sde, LinearSDE)
    grid = falling(sde, prior, steps, times)
    systems = batch or 1
    noise = Draws(seed, systems)
    prior = repeated(prior, systems, count)
    device = prior.device
    alpha = sde.alpha(grid).tolist()
    w = ((sde.sigma(grid) / sde.alpha(grid)) ** 2).tolist()
    cloud, network = Cloud(systems, count, device), user_precision(device.type)
    with torch.no_grad(), full_precision(device.type):
        y = torch.zeros(systems * count, *shape, dtype=dtype, device=device)
        d = y if twist.moments.mean is None else y + alike(twist.moments.mean, y).reshape(shape)
        here = twist.at(d, math.inf)
        cloud.weigh(here.log_psi)
        first = Level(math.inf, float(grid[0]), math.inf, w[0])
        y, owed = twist.move(here, y, d, first, noise.streams)
        for i, (t, s) in enumerate(pairwise(grid.tolist())):
            with network:
                d, seen = _denoise(prior, alpha[i] * y, t, chunk, twist.pulled)
            seen = None if seen is None else alpha[i] * seen
            here = twist.at(d, w[i], seen)
            cloud.weigh(here.log_psi - owed)
            chosen = cloud.resample(noise, t)
            if chosen is not None:
                y, d, here = y[chosen], d[chosen], here.rows(chosen)
            y, owed = twist.move(here, y, d, Level(t, s, w[i], w[i + 1]), noise.streams)
        cloud.weigh(twist.end(y) - owed)
    cloud.finish()
    if not all_finite(cloud.log_z):
        raise FloatingPointError(
            "the weights of the particles are not finite: the score is not, or the observation"
            " lies beyond all that numbers can tell of its noise"
        )
    x = prior.facts.decode(y).unflatten(0, (systems, count))
    ess = torch.stack(cloud.ess, 1)
    warn(ess, count)
    found = (x, cloud.log_w, cloud.log_z, cloud.standard_error, ess)
    x, log_w, log_z, error, ess = found if batch is not None else (part[0] for part in found)
    return Particles(x, log_w, log_z, error, ess, count * (len(grid) - 1))


def warn(ess: Tensor, count: int) -> None:
    """``RuntimeWarning`` where the effective numbers (R, steps + 1) fell below ``FEW``."""
    low = float(ess.min())
    if low < FEW:
        where = int((ess < FEW).any(1).sum())
        warnings.warn(
            f"the particles have collapsed to {low:.1f} effective ones of {count} in {where} of"
            f" {len(ess)} systems: the draws are few and the evidence is a guess; take more steps,"
            " more particles or better moments",
            RuntimeWarning,
            stacklevel=4,
        )


def _denoise(
    prior: Score, x: Tensor, t: float, chunk: int | None, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """D (B, *D) and, for matrices b (1 or R, m, n) of what is observed, b dD / dx (B, m, n)."""
    size = len(x) if chunk is None else chunk
    parts = [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]
    chosen = [prior if len(parts) == 1 else prior.rows(part) for part in parts]
    if b is None:
        found = [p.evaluate(x[part], t).denoised for p, part in zip(chosen, parts, strict=True)]
        return torch.cat(found) if len(found) > 1 else found[0], None
    whose = torch.arange(len(x), device=x.device) * len(b) // len(x)
    d, seen = [], []
    for p, part in zip(chosen, parts, strict=True):
        e = p.linearise(x[part], t)
        assert e.pull is not None
        rows = b[whose[part]].to(x).unbind(1)
        d.append(e.denoised)
        seen.append(torch.stack([e.pull(u.reshape(x[part].shape)).flatten(1) for u in rows], 1))
    return torch.cat(d), torch.cat(seen)


def repeated(prior: Score, systems: int, count: int) -> Score:
    """The prior for each particle, where it is bound for each observation."""
    if prior.batch is None:
        return prior
    if prior.batch != systems:
        raise ValueError(
            f"the prior is bound for {prior.batch} samples, there are {systems} observations"
        )
    return prior.rows(torch.arange(systems).repeat_interleave(count))


def falling(sde: LinearSDE, prior: Score, steps: int, times: Tensor | None) -> Tensor:
    """The grid that is asked for, falling to 0; by default that of ``sample``."""
    if times is None:
        return grids.default(sde, steps, to_zero=True, data_std=prior.facts.std)
    grid = torch.as_tensor(times, dtype=torch.float64)
    is_grid = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() < 0).all())
    if not is_grid or float(grid[-1]) != 0 or float(grid[0]) > sde.T:
        raise ValueError(f"times must fall from at most T = {sde.T} to 0, got {grid.tolist()}")
    return grid


def _moments(prior: Score, rule: Known) -> Moments:
    """Those of the data, on the device of the prior: a step then waits for no copy."""
    moments, device = rule.moments(prior.facts), prior.device
    return replace(moments, values=moments.values.to(device))
