"""What a chain walks on: a score at a fixed time, or a log-density and its gradient.

Three things may be given: any ``Score``, which is read at one time; any function that returns
log-densities, whose gradient torch.func takes; a mixture, for which the score is two matrix
products. A preconditioner P = L L^T changes the coordinates, x = L u, and nothing else: the
plain dynamics of u are dX = P s dt + sqrt(2 P) dW.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from ..ops import Time, as_real, check_time, user_precision
from ..scores import GaussianMixture, Score
from ..sdes import evaluate

LogDensity = Callable[[Tensor], Tensor]
"""x (B, *D) -> log p(x) (B,), up to a constant; row b depends on x[b] alone."""

_LARGEST = 1 << 24
"""Posterior weights (components x chains) that the path for mixtures may hold."""
_ROUNDING = 1e-3
"""Rounding error of a log weight, above which a mixture is computed in float64."""


def _got(value: object) -> str:
    """What was given, for a message: shape and dtype of a tensor, else the type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"shape {tuple(value.shape)} of {value.dtype}"


class Target(ABC):
    """A law in the coordinates of the run: x (C, *D) to its score, and to its log-density."""

    has_density: bool = True
    by_columns: bool = False
    """Whether states are best kept with the chains last in memory."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """grad log p(x), (C, *D)."""

    @abstractmethod
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x) (C,) up to a constant, and the score, in one pass."""

    def enter(self, x: Tensor) -> Tensor:
        """The caller's coordinates to those of the run; the state is a copy."""
        rows = torch.contiguous_format
        if not self.by_columns:
            return x.clone(memory_format=rows)
        return x.flatten(1).T.clone(memory_format=rows).T.unflatten(1, x.shape[1:])

    def leave(self, u: Tensor) -> Tensor:
        """The coordinates of the run to the caller's."""
        return u


class AtTime(Target):
    """A score s(x, t) at one time; its density is ``log_prob(x, t)`` where it has one."""

    def __init__(self, score: Score, t: Tensor, autocast: AbstractContextManager[object]) -> None:
        self.of, self.t, self.autocast = score, t, autocast
        self.has_density = hasattr(score, "log_prob")

    def score(self, x: Tensor) -> Tensor:
        with self.autocast:
            return evaluate(self.of, x, self.t)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast:
            log_p = self.of.log_prob(x, self.t)  # type: ignore[attr-defined]
        return log_p, self.score(x)


class Density(Target):
    """A function x -> log p(x) and its gradient."""

    def __init__(self, log_p: LogDensity, autocast: AbstractContextManager[object]) -> None:
        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            with autocast:
                p = log_p(x)
            if not isinstance(p, Tensor) or p.shape != x.shape[:1] or not p.is_floating_point():
                raise ValueError(
                    f"a log-density must map {tuple(x.shape)} to one number a chain,"
                    f" ({len(x)},) and real; got {_got(p)}"
                )
            if not p.requires_grad:
                raise ValueError(
                    "a log-density must depend on x by operations that torch differentiates:"
                    " this one is constant, detached from x or computed without gradients"
                )
            return p.sum(), p.detach()

        self._gradient = torch.func.grad(total, has_aux=True)

    def score(self, x: Tensor) -> Tensor:
        return self._gradient(x)[0]

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, p = self._gradient(x)
        return p, s


class Mixture(Target):
    """sum_k pi_k N(alpha m_k, V_k), V_k diagonal, with the chains last: everything is (., C).

    With precisions q_k = 1 / V_k, a_k = alpha m_k q_k and q those that all share (or 0):

        l_k = b_k + a_k . x - 1/2 (q_k - q) . x^2,      r = softmax(l),
        s = sum_k r_k a_k - x sum_k r_k q_k,
        log p = logsumexp(l) - 1/2 q . x^2.

    Exponents are kept in units of log 2: the power of two is the fastest exponential.
    """

    by_columns = True

    def __init__(self, mixture: GaussianMixture, t: Tensor, dtype: torch.dtype) -> None:
        sde, where = mixture.sde, mixture.device
        alpha, sigma = (float(c(t)) for c in (sde.alpha, sde.sigma))
        m = alpha * mixture.means.double()
        q = (1 / (alpha**2 * mixture.variance + sigma**2)).expand(m.shape)

        def rounding(m: Tensor) -> float:
            return torch.finfo(dtype).eps * float((m.square() * q).sum(1).max())

        # Far from 0 the exponents are small differences of large numbers.
        self.centre = m.mean(0) if rounding(m) >= _ROUNDING else None
        m = m if self.centre is None else m - self.centre
        self.dtype = dtype if rounding(m) < _ROUNDING else torch.float64
        a = m * q
        b = mixture.log_weights + 0.5 * (torch.log(q / (2 * math.pi)) - a * m).sum(1)
        self.shared = bool((q == q[:1]).all())
        ones = torch.ones(len(m), 1, dtype=q.dtype, device=where)
        sums = [a, ones] if self.shared else [a, q, ones]
        bits = 1 / math.log(2)
        self.linear, self.constant = self._keep(bits * a), self._keep(bits * b.unsqueeze(1))
        self.square, self.q = self._keep(-0.5 * bits * q), self._keep(q[:1].T)
        self.sums = self._keep(torch.cat(sums, 1).T)
        self.work = self.linear.new_empty(0)

    def _keep(self, c: Tensor) -> Tensor:
        return c.to(self.dtype).contiguous()

    def _columns(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return (y if self.centre is None else y.double() - self.centre).T.to(self.dtype)

    def _sums(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """max_k l_k / log 2 (1, C), and sum_k r_k (a_k, q_k unless shared, 1), not normalised."""
        if self.work.shape[1:] != y.shape[1:]:
            self.work = self.linear.new_empty(len(self.linear), y.shape[1])
        r = torch.addmm(self.constant, self.linear, y, out=self.work)
        if not self.shared:
            r.addmm_(self.square, y * y)
        top = r.amax(0, keepdim=True)
        # Exponentials are several times slower where their result is subnormal.
        r.sub_(top).clamp_(min=-115.0).exp2_()
        return top, self.sums @ r

    def _score(self, y: Tensor, sums: Tensor, like: Tensor) -> Tensor:
        n = len(y)
        s = sums[:-1] / sums[-1]
        if self.shared:
            s.addcmul_(y, self.q, value=-1)
        else:
            s = s[:n] - y * s[n:]
        return s.to(like.dtype).T.unflatten(1, like.shape[1:])

    def score(self, x: Tensor) -> Tensor:
        y = self._columns(x)
        return self._score(y, self._sums(y)[1], x)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self._columns(x)
        top, sums = self._sums(y)
        log_p = math.log(2) * top[0] + torch.log(sums[-1])
        if self.shared:
            log_p = log_p - 0.5 * (self.q[:, 0] @ (y * y))
        return log_p, self._score(y, sums, x)


class Whitened(Target):
    """The law of u = L^-1 x: score L^T s(L u), the same density up to a constant."""

    def __init__(self, inner: Target, factor: Tensor) -> None:
        self.inner, self.factor = inner, factor
        self.has_density = inner.has_density

    def score(self, u: Tensor) -> Tensor:
        return self._pull(self.inner.score(self.leave(u)))

    def evaluate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        log_p, s = self.inner.evaluate(self.leave(u))
        return log_p, self._pull(s)

    def _pull(self, s: Tensor) -> Tensor:
        return (s.reshape(len(s), -1) @ self.factor).reshape(s.shape)

    def enter(self, x: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1).T
        return torch.linalg.solve_triangular(self.factor, flat, upper=False).T.reshape(x.shape)

    def leave(self, u: Tensor) -> Tensor:
        return (u.reshape(len(u), -1) @ self.factor.T).reshape(u.shape)


def as_target(
    target: Score | LogDensity,
    x: Tensor,
    at: Time = 0.0,
    preconditioner: Tensor | np.ndarray | None = None,
) -> Target:
    """The law that was meant, in the coordinates of the run.

    Raises:
        TypeError: neither a Score nor callable; numbers that are not real.
        ValueError: a score that is singular at ``at``; a shape that is not that of x; a
            preconditioner that is not symmetric positive definite.
    """
    law = _law(target, x, as_real(at, "at"))
    return law if preconditioner is None else Whitened(law, _factor(preconditioner, x))


def _law(target: Score | LogDensity, x: Tensor, t: Tensor) -> Target:
    if not isinstance(target, Score):
        if not callable(target):
            raise TypeError(
                "target must be a Score or a function x -> log p(x), one number a chain; got"
                f" {type(target).__name__}"
            )
        return Density(target, user_precision(x.device.type))
    if t.ndim:
        raise ValueError(f"at must be one time for all chains, got shape {tuple(t.shape)}")
    if target.sde is not None:
        check_time(t, target.sde.T)
    if target.singular and float(t) == 0:
        raise ValueError(
            f"{type(target).__name__} is singular at t = 0: give a small positive time, at=..."
        )
    if target.shape is not None and x.shape[1:] != target.shape:
        raise ValueError(f"x must have shape (chains, *{target.shape}), got {tuple(x.shape)}")
    if (
        isinstance(target, GaussianMixture)
        and type(target).__call__ is GaussianMixture.__call__
        and len(target.means) * len(x) <= _LARGEST
        and x.device.type != "mps"
    ):
        return Mixture(target, t, x.dtype)
    return AtTime(target, t, user_precision(x.device.type))


def _factor(preconditioner: Tensor | np.ndarray, x: Tensor) -> Tensor:
    n = x[0].numel()
    p = as_real(preconditioner, "preconditioner").to(x)
    if p.shape != (n, n) or not torch.allclose(p, p.T):
        raise ValueError(
            f"preconditioner must be a symmetric matrix {(n, n)}, got {tuple(p.shape)}"
            f"{', not symmetric' if p.shape == (n, n) else ''}"
        )
    factor, failed = torch.linalg.cholesky_ex(p)
    if int(failed):
        raise ValueError("preconditioner must be positive definite: it has no Cholesky factor")
    return factor
