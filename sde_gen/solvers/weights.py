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

from ..ops import check_count, check_number

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
    own = np.eye(len(nodes), dtype=bool)
    above = np.where(own[..., None], 1.0, u - nodes[:, None]).prod(1)
    return above / np.where(own, 1.0, nodes[:, None] - nodes).prod(1)[:, None]


class Weights(ABC):
    """A rule that turns nodes into weights.

    >>> isinstance(sg.solvers.Midpoint(), sg.solvers.Weights)
    True
    """

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

    >>> sg.Exponential(3, weights=sg.solvers.Polynomial()).order
    3
    """

    def __init__(self, variable: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self.variable = variable

    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        """int K l_j by quadrature."""
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

    >>> sg.Exponential(2, weights=sg.solvers.Midpoint()).order
    2
    """

    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        """l_j half way, times int K."""
        lam, weight = quadrature(start, end)
        total = kernel(lam, end, c, kappa) @ weight
        return lagrange(nodes, np.array([(start + end) / 2])) * total


class Spectral(Weights):
    """The weights that are best for Gaussian data whose covariance nobody told us.

    Along the probability flow a direction of variance v has Q - m proportional to
    (v - C) / sqrt(v + w): known in closed form but for v. Over a broad law of v the weights
    minimise the mean square of the error that the step leaves at the end of the flow,

        E_v [ v / (v + w_end) (int K q_v - sum_j W_j q_v(lambda_j))^2 ],   sum_j W_j = int K.

    Data are not Gaussian: a ridge of 0.7 sqrt(w / (w + v)), v the mean variance and w = w_end,
    holds the weights at those of ``Polynomial`` where the q_v, which look alike, do not decide,
    and more where there is more noise: there a state belongs to many modes still, and what bends
    its score is how it comes to one. Near the data, inside one mode, the q_v are how scores bend,
    which a polynomial does not know. For small steps the rule has the order of ``Polynomial``.

    The law of v has density v^power in log v, from 1/1000 of the mean variance to (n + 1) / 2
    times it: n coordinates share n times the mean variance, and one direction may hold most of it.

    Args:
        variance: mean variance of the data over coordinates.
        dimensions: number n of coordinates.
        ridge: one for all levels of noise instead, for data that are nearly Gaussian.
        power: of the density of v.

    Raises:
        ValueError: a variance, a number of dimensions or a ridge that is not positive, a power
            below 0.

    >>> sg.Exponential(3, 0.4, corrector=True, weights=sg.solvers.Spectral(0.4, 2)).order
    4
    """

    def __init__(
        self,
        variance: float,
        dimensions: int,
        ridge: float | None = None,
        power: float = 0.2,
    ) -> None:
        variance = check_number(variance, "variance", above=0)
        dimensions = check_count(dimensions, "dimensions")
        self.variance, self.dimensions = variance, dimensions
        self.power = power = check_number(power, "power", least=0)
        self.ridge = None if ridge is None else check_number(ridge, "ridge", above=0)
        self._relative = np.geomspace(1e-3, (dimensions + 1) / 2, 48)
        self._v, self._weight = variance * self._relative, self._relative ** (power / 2)

    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        """``Polynomial``'s weights, moved towards the least mean square of the module's text."""
        lam, weight = quadrature(start, end)
        k = kernel(lam, end, c, kappa) * weight
        plain = lagrange(nodes, lam) @ k.T
        if len(nodes) == 1:
            return plain
        q = self._shape(c, nodes)
        importance = self._weight * np.sqrt(self._v / (self._v + math.exp(-2 * end)))
        missed = (self._shape(c, lam) @ k[..., None])[..., 0] - (q @ plain.T[..., None])[..., 0]
        columns = (q[..., 1:] - q[..., :1]) * importance[:, None]
        # A direction whose variance is C has nothing to interpolate: any scale will do.
        scale = np.maximum(np.linalg.norm(columns, axis=1, keepdims=True), 1e-300)
        columns, target = columns / scale, (missed * importance)[..., None]
        rows = columns.swapaxes(1, 2)
        w = math.exp(-2 * end)
        noise = 0.7 * math.sqrt(w / (w + self.variance))
        ridge = noise if self.ridge is None else self.ridge
        square = rows @ columns + ridge**2 * np.eye(len(nodes) - 1)
        change = np.linalg.solve(square, rows @ target)[..., 0] / scale[:, 0]
        return plain + np.concatenate([-change.sum(1, keepdims=True), change], axis=1).T

    def _shape(self, c: np.ndarray, lam: np.ndarray) -> np.ndarray:
        """q_v (m, 48, n) up to a factor: rows are variances v, columns points lambda."""
        root = np.sqrt(self._v[:, None] + np.exp(-2 * lam))
        if np.isinf(c).any():
            return (np.exp(-lam) / root)[None]
        return (self._v[:, None] - c[:, None, None]) / root
