"""What is expected of an observation while its particles are on their way, and their next step.

The formulas are those of ``sde_gen.inverse.particles``; matrices are of the measurements' size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..moments import Moments, alike
from ..noise import Noise
from .whitened import Local, Whitened, apply, cholesky_plus_one


class Level(NamedTuple):
    """A step's start and end, t and s, and their w; at the start of a run t and w are infinite."""

    t: float
    s: float
    w_t: float
    w_s: float

    @property
    def r(self) -> float:
        """w_s / w_t, 0 where the step starts without signal."""
        return 0.0 if math.isinf(self.w_t) else self.w_s / self.w_t


class Twist(Protocol):
    """What is expected of the observation."""

    moments: Moments
    pulled: Tensor | None
    """What D is to be pulled back by, (G, m, n): G = 1 or R; None where no Jacobian is read."""

    def at(self, d: Tensor, w: float, seen: Tensor | None = None) -> Expected:
        """psi at states whose denoised states are d, (B, *D); ``seen`` (B, m, n) is what
        ``pulled`` came to, times dD / dy."""

    def move(
        self, here: Expected, y: Tensor, d: Tensor, level: Level, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The next states, and log phi there (B,)."""

    def end(self, x: Tensor) -> Tensor:
        """log of the true likelihood, (B,)."""


class Expected(NamedTuple):
    """psi (B,) as its log, and what a step given o needs: G = 1, R or B of each matrix."""

    log_psi: Tensor
    r: Tensor
    """W (o - A D), (B, m)."""
    b: Tensor
    """B = W A, (G, m, n)."""
    low: Tensor
    """The lower Cholesky factor of B C_t B^T + I, (G, m, m), float64."""

    def rows(self, index: Tensor) -> Expected:
        """The same of these states; what is one for all stays."""
        n = len(index)
        return Expected(*(x[index] if len(x) == n else x for x in self))


class GaussianTwist:
    """psi = N(o; A D, A C_t A^T + S)."""

    pulled: Tensor | None = None

    def __init__(self, seen: Whitened, count: int, moments: Moments) -> None:
        self.moments, self.whitened = moments, seen
        self.seen = seen
        if seen.batch is not None:
            self.seen = seen.rows(torch.arange(seen.batch).repeat_interleave(count))
        self.volume = self.seen.observation.log_volume
        self._last: tuple[float, Tensor] | None = None

    def at(self, d: Tensor, w: float, seen: Tensor | None = None) -> Expected:
        """psi at states whose denoised states are d, (B, *D)."""
        local = self.seen.at(d)
        b = self.whitened.b if self.seen.observation.operator.linear else _jacobian(local)
        low = self._low(b, w)
        return Expected(self._log_normal(low, local.r), local.r, b, low)

    def _log_normal(self, low: Tensor, r: Tensor) -> Tensor:
        """log N of whitened residuals r (B, m) under L L^T, as a density of o: (B,)."""
        z = _solve(low, r.double())
        return -0.5 * z.square().sum(1) - _log_det(low, len(r)) - alike(self.volume, z)

    def move(
        self, here: Expected, y: Tensor, d: Tensor, level: Level, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The next states, drawn given o, and log phi there (B,)."""
        c, r = self.moments.values, level.r
        c_t = c if math.isinf(level.w_t) else c * level.w_t / (c + level.w_t)
        jitter, mean, z = self._drawn(y, d, here.r.shape[1], level, noise)
        b, low_t = here.b, here.low
        low_s = self._low(b, level.w_s)
        # How the observation is foretold after the step: B D' = B D + B C_s / w_s jitter.
        j_s = torch.where(c + level.w_s > 0, c / (c + level.w_s), 1.0)
        seen = _rows(self.moments, j_s, b)
        foretold = here.r - _times(seen, jitter.flatten(1))
        z = z.to(here.r)
        off = foretold - _times(low_s, z)
        gain = (1 - r) * torch.cholesky_solve(_rows(self.moments, c_t, b), low_t).mT
        y = mean + jitter + _times(gain, off).reshape(y.shape)
        u = torch.cholesky_solve(low_s, low_t).mT
        z = (z + _times(u, off)).double()
        return y, -0.5 * z.square().sum(1) - _log_det(low_s, len(z)) - alike(self.volume, z)

    def _drawn(
        self, y: Tensor, d: Tensor, m: int, level: Level, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prior's step, its random part and its mean, and a normal (B, m) for o.

        One draw for both: on a GPU numbered noise costs its launches, not its numbers.
        """
        n = y[0].numel()
        drawn = noise(y.new_empty(len(y), n + m), level.t, level.s)
        jitter, mean = _prior_step(self.moments, y, d, level, drawn[:, :n].reshape(y.shape))
        return jitter, mean, drawn[:, n:]

    def _low(self, b: Tensor, w: float) -> Tensor:
        """The factor at w; the end of a step of a linear A is the start of the next."""
        if not self.seen.observation.operator.linear:
            return _factor(self.moments, b, w)
        if self._last is None or self._last[0] != w:
            self._last = w, _factor(self.moments, b, w)
        return self._last[1]

    def end(self, x: Tensor) -> Tensor:
        """log N(o; A x, S), (B,)."""
        z = self.seen.at(x.double()).r
        return -0.5 * z.square().sum(1) - alike(self.volume, z)


class TweedieTwist(GaussianTwist):
    """psi = N(o; A D, w A J A^T + S), J = dD / dy at each particle (Rozet et al. 2024).

    w J is the covariance of x_0 given the state, whatever the data are. The prior's step keeps its
    own, V = w_s (1 - r) I + (1 - r)^2 C_t; o is foretold from y_s by A J_s with

        A J_s = ((1 - r) H + r)^-1 A J,   H = A J A^T (A A^T)^-1,

    which is right where J maps what A sees into itself, and to first order in 1 - r otherwise.
    What is not right is weighed.
    """

    def __init__(self, seen: Whitened, count: int, moments: Moments) -> None:
        super().__init__(seen, count, moments)
        self.pulled = b = seen.b
        self._inverse = torch.linalg.pinv(b @ b.mT, hermitian=True)

    def _each(self, a: Tensor, n: int) -> Tensor:
        """Matrices (G, i, j), one for each of n particles where there are several."""
        return a if len(a) == 1 else a.repeat_interleave(n // len(a), 0)

    def at(self, d: Tensor, w: float, seen: Tensor | None = None) -> Expected:
        """psi at states whose denoised states are d, (B, *D)."""
        if seen is None:
            return super().at(d, w)
        r, p = self.seen.at(d).r, seen.double()
        low = _factor_of(w * p @ self._each(self.whitened.b, len(d)).mT)
        return Expected(self._log_normal(low, r), r, p, low)

    def move(
        self, here: Expected, y: Tensor, d: Tensor, level: Level, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The next states, drawn given o, and log phi there + log psi - log psi foretold (B,)."""
        if math.isinf(level.w_t):
            return super().move(here, y, d, level, noise)
        r, p, n = level.r, here.b, len(y)
        jitter, mean, z = self._drawn(y, d, here.r.shape[1], level, noise)
        b, inverse = self._each(self.whitened.b, n), self._each(self._inverse, n)
        h = p @ b.mT @ inverse
        one = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
        seen = torch.linalg.solve((1 - r) * h + r * one, p)
        low_s = _factor_of(level.w_s * seen @ b.mT)
        rows = _rows(self.moments, _spread(self.moments, level) ** 2, seen)
        low = torch.linalg.cholesky_ex(rows @ seen.mT + low_s @ low_s.mT).L
        foretold = here.r - _times(seen, jitter.flatten(1))
        off = foretold - _times(low_s, z.to(here.r))
        moved = _times(torch.cholesky_solve(rows, low).mT, off)
        left = self._log_normal(low_s, foretold - _times(seen, moved))
        y = mean + jitter + moved.to(y).reshape(y.shape)
        return y, left - self._log_normal(low, here.r) + here.log_psi


class Steered:
    """psi = exp l(D), and the prior's own steps."""

    pulled: Tensor | None = None

    def __init__(self, log_likelihood: Callable[[Tensor], Tensor], moments: Moments) -> None:
        self.end, self.moments = log_likelihood, moments

    def at(self, d: Tensor, w: float, seen: Tensor | None = None) -> Expected:
        """psi = exp l(d)."""
        log_psi = self.end(d)
        return Expected(log_psi, log_psi, log_psi, log_psi)

    def move(
        self, here: Expected, y: Tensor, d: Tensor, level: Level, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The prior's own step; log phi is the log psi that it starts with."""
        z = noise(y, level.t, level.s)
        jitter, mean = _prior_step(self.moments, y, d, level, z)
        return mean + jitter, here.log_psi


def _prior_step(
    moments: Moments, y: Tensor, d: Tensor, level: Level, z: Tensor
) -> tuple[Tensor, Tensor]:
    """The random part and the mean of a step of ``Exponential(1, C)`` at eta = 1."""
    jitter = apply(moments, _spread(moments, level).reshape(1, -1), z)
    return jitter, torch.lerp(d, y, level.r)


def _spread(moments: Moments, level: Level) -> Tensor:
    """Standard deviations of the step, (w_s (1 - r) + (1 - r)^2 C_t)^(1/2), as values."""
    c, r = moments.values, level.r
    c_t = c if math.isinf(level.w_t) else c * level.w_t / (c + level.w_t)
    return (level.w_s * (1 - r) + (1 - r) ** 2 * c_t).sqrt()


def _factor_of(k: Tensor) -> Tensor:
    """The factor of K + I for what should be a covariance K (B, m, m): a network's Jacobian is
    neither symmetric nor positive, so the part of it that is."""
    values, vectors = torch.linalg.eigh((k + k.mT) / 2)
    return cholesky_plus_one((vectors * values.clamp_min(0).unsqueeze(-2)) @ vectors.mT)


def _factor(moments: Moments, b: Tensor, w: float) -> Tensor:
    """The Cholesky factor of B C_w B^T + I, C_w = C w / (C + w)."""
    c = moments.values
    c = c if math.isinf(w) else torch.where(c > 0, c * w / (c + w).clamp_min(1e-300), 0.0)
    k = _rows(moments, c, b) @ b.mT
    return cholesky_plus_one(k)


def _rows(moments: Moments, f: Tensor, b: Tensor) -> Tensor:
    """B f(C) for B (G, m, n)."""
    return apply(moments, f.reshape(1, -1), b.flatten(0, 1)).reshape(b.shape)


def _times(a: Tensor, v: Tensor) -> Tensor:
    """a v for matrices a (G, i, j) and v (B, j), G a divisor of B: (B, i), in the dtype of v."""
    return (v.reshape(len(a), -1, v.shape[1]) @ a.to(v).mT).reshape(len(v), -1)


def _solve(low: Tensor, v: Tensor) -> Tensor:
    """L^-1 v for (G, m, m) and (B, m)."""
    columns = v.reshape(len(low), -1, v.shape[1]).mT
    return torch.linalg.solve_triangular(low, columns, upper=False).mT.reshape(v.shape)


def _log_det(low: Tensor, n: int) -> Tensor:
    """log det L for each of n rows."""
    return low.diagonal(dim1=-2, dim2=-1).log().sum(-1).repeat_interleave(n // len(low))


def _jacobian(local: Local) -> Tensor:
    """B of each row, (B, m, n), float64: a backward pass of A for each measurement."""
    one = torch.eye(local.r.shape[1], dtype=local.r.dtype, device=local.r.device)
    rows = [local.pull(e.expand_as(local.r)).flatten(1) for e in one]
    return torch.stack(rows, 1).double()
