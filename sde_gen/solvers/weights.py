"""How a multistep exponential integrator turns past values of Q into one step.

The step needs int K(lambda) Q(lambda) dlambda with a known kernel K, and knows Q at the nodes.
Each rule returns weights W_j with int K Q ~ sum_j W_j Q_j, exact for constant Q. They depend on
the grid alone, are computed once in float64, and come as (p, m) for m reference variances.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

_NODES, _GAUSS = np.polynomial.legendre.leggauss(24)


def quadrature(start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre points in [start, end] and their weights, (24,) each."""
    h = (end - start) / 2
    return start + h * (_NODES + 1), h * _GAUSS


def kernel(lam: np.ndarray, end: float, c: np.ndarray, kappa: float) -> np.ndarray:
    """K(lambda) = kappa w / (C + w) ((C + w_end) / (C + w))^(kappa/2), (m, n).

    For C = infinity Q stands for the noise eps, and K = -kappa sqrt(w).
    """
    w = np.exp(-2 * lam)
    if np.isinf(c).any():
        return -kappa * np.sqrt(w)[None]
    c = c[:, None]
    return kappa * w / (c + w) * ((c + math.exp(-2 * end)) / (c + w)) ** (kappa / 2)


def lagrange(nodes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The Lagrange basis through ``nodes`` (p,) at the points u (n,): (p, n)."""
    rows = []
    for j, a in enumerate(nodes):
        others = np.delete(nodes, j)
        rows.append(np.prod((u[:, None] - others) / (a - others), axis=1))
    return np.stack(rows)


class Weights(ABC):
    """A rule that turns nodes into weights."""

    @abstractmethod
    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        """Weights (p, m) for the step from ``start`` to ``end`` (in lambda).

        Args:
            nodes: lambda (p,) where Q is known, latest first.
            c: reference variances (m,).
            kappa: 1 + eta^2.
        """


class Polynomial(Weights):
    """Q is the polynomial through its p values: W_j = int K l_j.

    By quadrature, so that the smallest steps lose no digits (closed forms cancel).

    Args:
        variable: what the polynomial is a polynomial in, as a function of lambda; lambda itself
            by default, exp(-lambda) for the rho-AB weights of DEIS (Zhang & Chen 2023).
    """

    def __init__(self, variable: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self.variable = variable

    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        lam, weight = quadrature(start, end)
        basis = (
            lagrange(nodes, lam)
            if self.variable is None
            else lagrange(self.variable(nodes), self.variable(lam))
        )
        return basis @ (kernel(lam, end, c, kappa) * weight).T


class Midpoint(Weights):
    """Q is frozen at the value of its polynomial half way through the step.

    With two values and C = 0 this is the published DPM-Solver++(2M) (Lu et al. 2022, algorithm
    2) and its SDE variant.
    """

    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        lam, weight = quadrature(start, end)
        total = kernel(lam, end, c, kappa) @ weight
        return lagrange(nodes, np.array([(start + end) / 2])) * total


class Spectral(Weights):
    """The weights that are best for Gaussian data whose variances nobody told us.

    Along the probability flow a direction of variance v has Q - m proportional to
    (v - C) / sqrt(v + w): known in closed form but for v. Over a broad law of v (density v^0.3
    in log v, from 1e-5 to 100 times ``variance``) the weights minimise the mean square of the
    error that the step leaves at the end of the flow,

        E_v [ v / (v + w_end) (int K q_v - sum_j W_j q_v(lambda_j))^2 ],   sum_j W_j = int K.

    For small steps the q_v look like polynomials and the rule has the order p of ``Polynomial``;
    for large steps it knows how score functions bend, which a polynomial does not. It is a linear
    least-squares problem of p - 1 unknowns, solved by QR in float64.

    Args:
        variance: mean variance of the data over coordinates.
    """

    def __init__(self, variance: float) -> None:
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"variance must be positive, got {variance}")
        self.variance = variance
        self._relative = np.geomspace(1e-5, 100.0, 48)

    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        lam, weight = quadrature(start, end)
        k = kernel(lam, end, c, kappa) * weight
        total = k.sum(1)
        if len(nodes) == 1:
            return total[None]
        v = self._relative * self.variance
        importance = self._relative**0.15 * np.sqrt(v / (v + math.exp(-2 * end)))
        out = np.empty((len(nodes), len(c)))
        for i, c_i in enumerate(c):
            q = self._shape(v, c_i, nodes)
            target = self._shape(v, c_i, lam) @ k[i] - total[i] * q[:, 0]
            columns = (q[:, 1:] - q[:, :1]) * importance[:, None]
            scale = np.linalg.norm(columns, axis=0)
            solution = np.linalg.lstsq(columns / scale, target * importance, rcond=1e-13)[0]
            out[1:, i] = solution / scale
            out[0, i] = total[i] - out[1:, i].sum()
        return out

    @staticmethod
    def _shape(v: np.ndarray, c: float, lam: np.ndarray) -> np.ndarray:
        return (v[:, None] - c) / np.sqrt(v[:, None] + np.exp(-2 * lam))
