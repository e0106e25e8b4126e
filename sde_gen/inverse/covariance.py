"""What a posterior's score takes for C_t = Cov[x_0 | x_t]: one small object each.

The term is grad_x log N(o; A D, A C_t A^T + S) = J^T A^T (A C_t A^T + S)^-1 (o - A D) with
J = dD / dx. Exactly, C_t = sigma^2 / alpha J, which a backward pass a product tells (``Tweedie``);
if the data were Gaussian with covariance C, C_t = (C^-1 + I / w)^-1, w = (sigma / alpha)^2
(``DataCovariance``). Both are exact for Gaussian data and for no others; so are the published
rules for none, or for data of variance 1 in every direction. ``sde_gen.inverse.particles`` has no
such bias.

| rule | C_t | backward passes a call |
|---|---|---|
| ``DataCovariance()`` | (C^-1 + I / w)^-1, and C_t / w for J | 0 |
| ``DataCovariance(jacobian=True)`` | (C^-1 + I / w)^-1 | 1 |
| ``Isotropic()`` | V w / (V + w) I | 1 |
| ``Tweedie(iterations=k)`` | w J | up to k |
| ``TweedieDiagonal()`` | w J's row sums | 2 |
| ``Point()`` | 0 | 1 |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..facts import Facts
from ..moments import Moments, alike, handed, isotropic
from ..ops import check_count, match
from ..sdes import LinearSDE
from .whitened import Local, Whitened, apply, conjugate_gradients


class Here(NamedTuple):
    """What is known at one state of a run."""

    seen: Whitened
    local: Local
    """The observation linearised at D."""
    pull: Callable[[Tensor], Tensor] | None
    """u -> (dD / dx)^T u, by a backward pass, for a rule that asks for it."""
    sde: LinearSDE
    t: Tensor
    w: Tensor
    """(sigma / alpha)^2, () or (B,), in the precision of the residual."""
    facts: Facts
    like: Tensor
    """The state: its dtype is that of what goes through the network."""

    def back(self, u: Tensor) -> Tensor:
        """alpha (dD / dx)^T u = (dD / dy)^T u, y = x / alpha."""
        assert self.pull is not None
        alpha = match(handed(self.sde.alpha(self.t), self.like.device), self.like)
        return alpha * self.pull(u.to(self.like))


class Covariance:
    """A rule for Cov[x_0 | x_t].

    Attributes:
        jacobian: whether the prior is to be linearised.
        passes: the most backward passes through the prior that one call makes.

    >>> from sde_gen import inverse
    >>> isinstance(inverse.DataCovariance(), inverse.Covariance)
    True
    """

    jacobian: bool = True
    passes: int = 1

    def term(self, here: Here) -> Tensor:
        """(dD / dy)^T B^T K^-1 r, (B, *D): alpha times the likelihood's score."""
        raise NotImplementedError


class Known(Covariance):
    """C_t = (C^-1 + I / w)^-1 for a C that is known beforehand."""

    def moments(self, facts: Facts) -> Moments:
        """C, by what is known of the data."""
        raise NotImplementedError

    def term(self, here: Here) -> Tensor:
        """(dD / dy)^T B^T K^-1 r, (B, *D)."""
        moments = self.moments(here.facts)
        ratio = ratios(moments, here.w)
        g = self.solved(here, moments, here.w.reshape(-1, 1) * ratio)
        return here.back(g) if self.jacobian else apply(moments, ratio, g)

    def solved(self, here: Here, moments: Moments, c: Tensor) -> Tensor:
        """B^T (B f(C) B^T + I)^-1 r for values c of f."""
        local = here.local
        if here.seen.is_dense:
            return local.pull(here.seen.solve(moments, c, local.r).to(local.r))

        def product(v: Tensor) -> tuple[Tensor, Tensor]:
            g = local.pull(v)
            return v + local.push(apply(moments, c, g)), g

        return conjugate_gradients(product, local.r, 1e-7, min(local.r.shape[1], 1000))


@dataclass(frozen=True)
class DataCovariance(Known):
    """C_t = (C^-1 + I / w)^-1, with C the covariance of the data (``prior.facts.moments``).

    Where no moments are known C = V I with V of ``prior.facts.std``. Exact for Gaussian data. No
    solve with C_t is dearer than a Cholesky factor of the measurements' size.

    Args:
        jacobian: take dD / dx of the prior, by one backward pass, in place of C_t / w.

    >>> from sde_gen import inverse
    >>> inverse.DataCovariance(jacobian=True)
    DataCovariance(jacobian=True)
    """

    jacobian: bool = False

    @property
    def passes(self) -> int:  # type: ignore[override]
        """1 with ``jacobian``, else 0."""
        return int(self.jacobian)

    def moments(self, facts: Facts) -> Moments:
        """Those of the data, or their variance in all directions."""
        return isotropic(facts.std**2) if facts.moments is None else facts.moments


@dataclass(frozen=True)
class Isotropic(Known):
    """C_t = V w / (V + w) I, as if the data were N(m, V I).

    Args:
        variance: V, in the units of the process; None takes ``prior.facts.std`` squared. 1 is the
            w / (1 + w) of Song et al. (2023), whatever the data are.

    Raises:
        ValueError: a variance that is not positive.

    >>> from sde_gen import inverse
    >>> inverse.Isotropic(0.25)
    Isotropic(variance=0.25)
    """

    variance: float | None = None

    def __post_init__(self) -> None:
        if self.variance is not None and not (math.isfinite(self.variance) and self.variance > 0):
            raise ValueError(f"variance must be a positive number or None, got {self.variance}")

    def moments(self, facts: Facts) -> Moments:
        """V in all directions."""
        return isotropic(facts.std**2 if self.variance is None else self.variance)


@dataclass(frozen=True)
class Tweedie(Covariance):
    """C_t = w dD / dy, the exact covariance, by conjugate gradients (Rozet et al. 2024).

    Each product is one backward pass, and the gradient comes out of the same passes. One pass is
    exact for one measurement, m passes for m.

    Args:
        iterations: the most passes.
        tolerance: stop where the residual is so small relative to that at the start.

    Raises:
        ValueError: fewer than one iteration, a tolerance outside [0, 1).

    >>> from sde_gen import inverse
    >>> inverse.Tweedie(iterations=1)
    Tweedie(iterations=1, tolerance=0.001)
    """

    iterations: int = 3
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        check_count(self.iterations, "iterations")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {self.tolerance}")

    @property
    def passes(self) -> int:  # type: ignore[override]
        """One for each iteration of the conjugate gradients."""
        return self.iterations

    def term(self, here: Here) -> Tensor:
        """J^T B^T K^-1 r with K = B C_t B^T + I and C_t = w J, by conjugate gradients."""
        local = here.local

        def product(v: Tensor) -> tuple[Tensor, Tensor]:
            g = here.back(local.pull(v)).to(local.r)
            return v + local.push(match(here.w, g) * g), g

        return conjugate_gradients(product, local.r, self.tolerance, self.iterations)


@dataclass(frozen=True)
class TweedieDiagonal(Covariance):
    """A C_t A^T made diagonal, by the sums of its rows (Boys et al. 2024).

    Of measurements whitened by their noise. Sums that come out negative are taken as 0.

    >>> from sde_gen import inverse
    >>> inverse.TweedieDiagonal()
    TweedieDiagonal()
    """

    passes = 2

    def term(self, here: Here) -> Tensor:
        """J^T B^T (r / k), k the sums of the rows of B C_t B^T + I."""
        local = here.local
        g = here.back(local.pull(torch.ones_like(local.r))).to(local.r)
        rows = local.push(match(here.w, g) * g).clamp_min(0)
        return here.back(local.pull(local.r / (rows + 1)))


@dataclass(frozen=True)
class Point(Covariance):
    """C_t = 0, as if D were x_0: DPS with the scale of the likelihood itself.

    >>> from sde_gen import inverse
    >>> inverse.Point()
    Point()
    """

    def term(self, here: Here) -> Tensor:
        """J^T B^T r: with C_t = 0 K is I."""
        return here.back(here.local.pull(here.local.r))


@dataclass(frozen=True, eq=False)
class Stepwise(Covariance):
    """-zeta grad_x |o - A D| added to each ancestral step: no likelihood, made by ``dps``."""

    zeta: float
    sde: LinearSDE
    times: Tensor

    def term(self, here: Here) -> Tensor:
        """-zeta grad_x |o - A D| over what the ancestral step from t multiplies a score by."""
        step = (handed(self.times, here.t.device) - here.t).abs()
        i = int(step.argmin())
        if here.t.ndim or i == len(self.times) - 1 or float(step[i]) > 1e-9:
            raise ValueError(f"dps(...) was made for the steps of another grid: t = {here.t}")
        t, s = self.times[i], self.times[i + 1]
        a = torch.exp(here.sde.log_snr(t) - here.sde.log_snr(s))
        # What the ancestral step multiplies a score by.
        gain = here.sde.alpha(s) * (1 - a) * here.sde.sigma(t) ** 2 / here.sde.alpha(t)
        r = here.local.residual
        size = r.flatten(1).norm(dim=1).clamp_min(torch.finfo(r.dtype).tiny)
        return float(self.zeta / gain) * here.back(here.local.map.vjp(r / match(size, r)))


def ratios(moments: Moments, w: Tensor) -> Tensor:
    """C_t / w = C / (C + w) as values (1 or B, k), for w () or (B,): 1 where w = 0."""
    c, w = alike(moments.values, w), w.reshape(-1, 1)
    return torch.where(w > 0, c / (c + torch.where(w > 0, w, 1.0)), 1.0)


def pigdm() -> Isotropic:
    """Pseudo-inverse guidance: r_t^2 = w / (1 + w) (Song et al. 2023, equation 7).

    >>> from sde_gen import inverse
    >>> inverse.pigdm()
    Isotropic(variance=1.0)
    """
    return Isotropic(1.0)


def mmps(iterations: int = 1) -> Tweedie:
    """Moment matching: w dD / dy by so many conjugate gradients (Rozet et al. 2024).

    >>> from sde_gen import inverse
    >>> inverse.mmps()
    Tweedie(iterations=1, tolerance=0.0)
    """
    return Tweedie(iterations, 0.0)


def tmpd() -> TweedieDiagonal:
    """Tweedie moment projected diffusion (Boys et al. 2024).

    >>> from sde_gen import inverse
    >>> inverse.tmpd()
    TweedieDiagonal()
    """
    return TweedieDiagonal()


def dps(sde: LinearSDE, times: Tensor, zeta: float = 1.0) -> Stepwise:
    """Diffusion posterior sampling as published (Chung et al. 2023, algorithm 1).

    x_s = ancestral(x_t) - zeta grad_x |o - A D|: the scale belongs to the steps of one grid, run
    by ``ddpm()`` with eta = 1, and to no likelihood. ``Point`` has that of the likelihood and any
    grid. This is the zeta of the authors' code, twice that of their paper.

    Args:
        sde: the process that runs.
        times: the falling grid.
        zeta: the scale of the gradient of the norm.

    >>> from sde_gen import inverse
    >>> rule = inverse.dps(sg.VP(), sg.grids.log_snr(sg.VP(), 50))
    """
    return Stepwise(zeta, sde, torch.as_tensor(times, dtype=torch.float64))
