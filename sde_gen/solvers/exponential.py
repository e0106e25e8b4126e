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

with l_j the Lagrange basis through the last p values of Q. With C = 0 (data prediction) order 1
is DDIM (eta = 0; Song et al. 2021) and DDPM's ancestral sampler (eta = 1; Ho et al. 2020), higher
orders are the multistep DPM-Solver++ and SDE-DPM-Solver++ (Lu et al. 2022) and SA-Solver (Xue et
al. 2023). With C the variance of the data every step is exact for Gaussian data, at every eta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..noise import Noise
from ..sdes import SDE, LinearSDE, Reverse
from .base import Memory, Solver, Step, describe

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Coefficients of one step, in terms of x: what meets the state is Python floats."""

    q_x: float
    q_s: float
    a: float
    b: tuple[float, ...]
    std: float


class Exponential(Solver):
    """Multistep exponential integrator of order 1 to 4 for the reversal of a linear process.

    Args:
        order: how many values of Q are interpolated; the order of convergence for eta = 0.
        reference: the variance C of the data that each step is exact for; 0 is data prediction.
        midpoint: freeze Q at the value that its interpolant has half way through the step (in
            lambda) in place of integrating it. With order 2 this is the published
            DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) and its SDE variant.

    The first steps of a run have fewer past values and a lower order. A grid may end at t = 0:
    the last step then takes order 1, which for C = 0 is Tweedie's denoising and for C > 0 the
    exact end of a Gaussian. Weak order min(order, 2) for eta > 0, strong order 1; one call a step.
    """

    strong = 1.0

    def __init__(self, order: int = 3, reference: float = 0.0, midpoint: bool = False) -> None:
        if order not in (1, 2, 3, 4):
            raise ValueError(f"order must be 1, 2, 3 or 4, got {order}")
        if not (math.isfinite(reference) and reference >= 0):
            raise ValueError(f"reference must be a finite variance >= 0, got {reference}")
        self.order, self.reference, self.midpoint = order, float(reference), midpoint
        self.weak = min(order, 2)

    def check(self, process: SDE) -> None:
        if not (isinstance(process, Reverse) and isinstance(process.sde, LinearSDE)):
            raise TypeError(
                "Exponential needs the reversal of a LinearSDE, sde.reverse(score, eta) or"
                f" sde.probability_flow(score); got {describe(process)}"
            )

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        assert isinstance(process, Reverse)
        assert isinstance(process.sde, LinearSDE)
        alpha = process.sde.alpha(times).numpy()
        sigma = process.sde.sigma(times).numpy()
        if sigma[0] == 0:
            raise ValueError("Exponential cannot start at t = 0, where the noise level is 0")
        w, c, eta = (sigma / alpha) ** 2, self.reference, process.eta
        with np.errstate(divide="ignore"):
            lam = -0.5 * np.log(w)
        steps = []
        for i, step in enumerate(super().plan(process, times)):
            p = 1 if w[i + 1] == 0 else min(self.order, i + 1)
            nodes = lam[i - p + 1 : i + 1][::-1]
            rho = (c + w[i + 1]) / (c + w[i])
            kappa = 1 + eta**2
            if p == 1 or self.midpoint:
                m = (lam[i] + lam[i + 1]) / 2 if p > 1 else lam[i]
                b = -_powm1(rho, kappa / 2) * _lagrange(nodes, np.array([m]))[:, 0]
            else:
                b = _weights(nodes, lam[i], lam[i + 1], c, kappa)
            numbers = _Numbers(
                q_x=1 / alpha[i],
                q_s=(c + w[i]) * alpha[i],
                a=alpha[i + 1] / alpha[i] * rho ** (kappa / 2),
                b=tuple((alpha[i + 1] * b).tolist()),
                std=alpha[i + 1] * math.sqrt((c + w[i + 1]) * -_powm1(rho, eta**2)),
            )
            steps.append(Step(step.t, step.s, numbers))
        return steps

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        assert isinstance(process, Reverse)
        k: _Numbers = step.numbers
        # Q = D + C (D - y) / w = y + (C + w) alpha s: no cancellation.
        q = (x * k.q_x).add(process.score(x, step.t), alpha=k.q_s)
        memory = (q, *memory)[: self.order]
        x = x * k.a
        for b_j, q_j in zip(k.b, memory, strict=False):
            x = x.add(q_j, alpha=b_j)
        if k.std:
            x = x.add(noise(x, step.t, step.s), alpha=k.std)
        return x, memory


def _powm1(rho: float, power: float) -> float:
    """rho^power - 1 without cancellation, for rho in [0, 1]."""
    if rho == 0:
        return -1.0 if power > 0 else 0.0
    return math.expm1(power * math.log(rho))


def _lagrange(nodes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The Lagrange basis through ``nodes`` (p,) at the points u (n,): (p, n)."""
    rows = []
    for j, a in enumerate(nodes):
        others = np.delete(nodes, j)
        rows.append(np.prod((u[:, None] - others) / (a - others), axis=1))
    return np.stack(rows)


def _weights(nodes: np.ndarray, start: float, end: float, c: float, kappa: float) -> np.ndarray:
    """W_j by Gauss-Legendre quadrature: exact to rounding, and stable for the smallest steps."""
    lam = start + (end - start) * (_NODES + 1) / 2
    w = np.exp(-2 * lam)
    decay = (c + math.exp(-2 * end)) / (c + w)
    f = kappa * w / (c + w) * decay ** (kappa / 2)
    return _lagrange(nodes, lam) @ (f * _WEIGHTS * (end - start) / 2)
