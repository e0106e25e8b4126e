"""Exponential integrators for reversed linear processes: one class for the whole family.

In y = x / alpha, w = (sigma / alpha)^2 and lambda = -1/2 log w, every reversal of every linear
process is one equation (kappa = 1 + eta^2, D = E[x_0 | x] the denoised state):

    dy = -kappa (y - D) dlambda + sqrt(2) eta sqrt(w) dW.

Suppose the data were Gaussian with covariance C. Then Q = D + C (D - y) / w would be constant
(the data's mean), so the linear part is solved exactly and only Q is interpolated:

    dy = -kappa w / (C + w) (y - Q) dlambda + sqrt(2) eta sqrt(w) dW,
    y_s = rho^(kappa/2) y_t + sum_j W_j Q_j + sqrt((C + w_s) (1 - rho^(eta^2))) z,
    rho = (C + w_s) / (C + w_t),
    W_j = kappa int w / (C + w) ((C + w_s) / (C + w))^(kappa/2) l_j(lambda) dlambda,

with l_j the Lagrange basis through the last p values of Q (or another rule: ``weights``). A
corrector does the same once more with the value at the new point, which the next step needs
anyway: it costs no call (Zhao et al. 2023). With C = 0 (data prediction) order 1
is DDIM (eta = 0; Song et al. 2021) and DDPM's ancestral sampler (eta = 1; Ho et al. 2020), higher
orders are the multistep DPM-Solver++ and SDE-DPM-Solver++ (Lu et al. 2022) and SA-Solver (Xue et
al. 2023). With C the variance of the data every step is exact for Gaussian data, at every eta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..moments import Coefficient, Moments, isotropic
from ..noise import Noise
from ..ops import as_time, check_order
from ..sdes import SDE, LinearSDE, Reverse
from .base import Memory, Solver, Step, read_score, require_scalar_reversal
from .weights import Polynomial, Weights


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Coefficients of one step: everything is linear in the state x, the score s at it and the
    past values of Q, latest first.

    x, q: the next state and the value of Q here, from (x, s, Q_1, Q_2 ...); std: of the normal z.
    """

    x: tuple[Coefficient, ...]
    q: tuple[Coefficient, ...]
    std: Coefficient | None


class _Prediction(NamedTuple):
    """One step in y: the factor of y, the weights of Q (p, m), the spread of z; 1 + eta^2."""

    a: np.ndarray
    b: np.ndarray
    spread: np.ndarray
    kappa: float


class Exponential(Solver):
    """Multistep exponential integrator for the reversal of a linear process, at any eta.

    Args:
        order: how many values of Q the step interpolates, 1 to 4.
        reference: covariance C of the data that every step is exact for: a variance, or
            ``Moments``. 0 is data prediction, infinity noise prediction (Q is then the noise).
        corrector: correct each state with the score at it, at no extra call; one order more.
        weights: the rule of interpolation; ``Polynomial()`` by default.

    ``order`` (the attribute) is the measured order of convergence for eta = 0: that of the
    interpolation, and one more with the corrector. The first steps of a run have fewer past
    values: where Q still changes there, a run without corrector is of order 2 at most, and one
    with it of order 3. Weak order min(order, 2) for eta > 0, strong order 1; one call a step.

    A grid may end at t = 0. The last step then takes order 1: for C = 0 Tweedie's denoising, for
    C > 0 the exact end of Gaussian data (about half of Tweedie's correction on smooth data).

    Raises:
        ValueError: an order that is not 1 .. 4, or a negative reference.
    """

    strong = 1.0

    def __init__(
        self,
        order: int = 3,
        reference: float | Moments = 0.0,
        corrector: bool = False,
        weights: Weights | None = None,
    ) -> None:
        order = check_order(order, 1, 4)
        if not isinstance(reference, Moments) and not reference >= 0:
            raise ValueError(f"reference must be a variance >= 0 or Moments, got {reference}")
        self.nodes, self.corrector = order, corrector
        self.reference = reference if isinstance(reference, Moments) else isotropic(reference)
        self.weights = Polynomial() if weights is None else weights
        self.order = order + corrector
        self.weak = min(self.order, 2)
        self.multistep = order > 1 or corrector
        self._last: tuple[tuple[object, ...], list[Step]] = ((), [])

    def check(self, process: SDE) -> None:
        require_scalar_reversal(self, process)

    def noise_level(self, process: Reverse, start: float, end: float) -> float:
        """eta of the step from lambda = start to end: that of the process."""
        return process.eta

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        assert isinstance(process, Reverse)
        assert isinstance(process.sde, LinearSDE)
        alpha = process.sde.alpha(times).numpy()
        sigma = process.sde.sigma(times).numpy()
        if sigma[0] == 0:
            raise ValueError("Exponential cannot start at t = 0, where the noise level is 0")
        with np.errstate(divide="ignore"):
            lam = np.log(alpha) - np.log(sigma)
        # A grid is mostly run again and again: its plan is kept.
        own = (self.nodes, self.corrector, self.reference, self.weights, process.eta)
        key = (*own, times.numpy().tobytes(), alpha.tobytes(), sigma.tobytes())
        if key != self._last[0]:
            table = [self._predict(process, lam, i) for i in range(len(lam) - 1)]
            steps = [
                Step(step.t, step.s, self._numbers(i, alpha, sigma, lam, table))
                for i, step in enumerate(super().plan(process, times))
            ]
            self._last = key, steps
        return list(self._last[1])

    def _predict(self, process: Reverse, lam: np.ndarray, i: int) -> _Prediction:
        c: np.ndarray = self.reference.values.numpy()
        w, w_s = np.exp(-2 * lam[i : i + 2])
        eta = self.noise_level(process, lam[i], lam[i + 1])
        kappa = 1 + eta**2
        if np.isinf(c).any():
            if w_s == 0:
                raise ValueError("noise prediction (reference = infinity) cannot end at t = 0")
            a, spread = np.ones(1), np.array([eta * math.sqrt(abs(w - w_s))])
        else:
            with np.errstate(divide="ignore"):
                log_rho = np.log((c + w_s) / (c + w))
            a = np.exp(kappa / 2 * log_rho)
            fade = -np.expm1(eta**2 * log_rho) if eta else np.zeros_like(c)
            spread = np.sqrt((c + w_s) * fade)
        if w_s == 0:
            return _Prediction(a, (1 - a)[None], spread, kappa)
        nodes = lam[max(0, i + 1 - self.nodes) : i + 1][::-1]
        b = self.weights(nodes, lam[i], lam[i + 1], c, kappa)
        return _Prediction(a, b, spread, kappa)

    def _numbers(
        self,
        i: int,
        alpha: np.ndarray,
        sigma: np.ndarray,
        lam: np.ndarray,
        table: list[_Prediction],
    ) -> _Numbers:
        c = self.reference.values.numpy()
        a, b, spread, _ = table[i]
        past = min(i, self._kept)
        x, score, *older = np.eye(2 + past)[:, :, None] * np.ones(len(c))
        if np.isinf(c).any():
            q, linear = -sigma[i] * score, np.zeros(1)
        else:
            # Q = D + C (D - y) / w = y + (C + w) alpha s: nothing cancels.
            w = (sigma[i] / alpha[i]) ** 2
            q, linear = x / alpha[i] + (c + w) * alpha[i] * score, -c / (w * alpha[i])
        if self.corrector and i > 0:
            new = alpha[i] * self._correct(lam, i, table[i - 1], c)
            change = sum(n * v for n, v in zip(new, (q, *older), strict=True))
            # The denoised state is kept as evaluated; what of Q is linear in x is new.
            x, q = x + change, q + linear * change
        values = (q, *older)[: len(b)]
        x = alpha[i + 1] * (a / alpha[i] * x + sum(n * v for n, v in zip(b, values, strict=True)))
        f = self.reference.coefficient
        return _Numbers(
            x=tuple(f(row) for row in x),
            q=tuple(f(row) for row in q),
            std=f(alpha[i + 1] * spread) if spread.any() else None,
        )

    @property
    def _kept(self) -> int:
        """How many past values of Q a step reads."""
        return self.nodes if self.corrector else self.nodes - 1

    def _correct(self, lam: np.ndarray, i: int, last: _Prediction, c: np.ndarray) -> np.ndarray:
        """How y at node i changes when Q there is known: weights of Q_i, Q_(i-1), ..."""
        nodes = lam[i - len(last.b) : i + 1][::-1]
        new = self.weights(nodes, lam[i - 1], lam[i], c, last.kappa)
        new[1:] -= last.b
        return new

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        assert isinstance(process, Reverse)
        k: _Numbers = step.numbers
        known = (x, read_score(process, x, as_time(step.t)), *memory)
        if self._kept:
            memory = (self.reference.apply(k.q, known), *memory[: self._kept - 1])
        if k.std is None:
            return self.reference.apply(k.x, known), memory
        return self.reference.apply((*k.x, k.std), (*known, noise(x, step.t, step.s))), memory
