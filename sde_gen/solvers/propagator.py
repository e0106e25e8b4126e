"""Exponential integrators for reversed processes with matrix coefficients.

The state is a noisy measurement of the data, and y = x_0 + noise of covariance W the statistic of
it that says what there is to say (``sdes.matrix``). Were the data N(m, C), the score would be
that of a Gaussian law of covariance V = alpha C alpha^T + Sigma, and

    Q = y + (C + W) s_y(y)

would be m. So the reversal of noise level eta (kappa = 1 + eta^2) is written around that law,

    dx = [M x + F Q] dt + eta G dW,
    M = A + kappa / 2 G G^T V^-1,      F = -kappa / 2 G G^T pick^T (C + W)^-1,

its linear part is solved, and Q alone is interpolated, through its last p values, in the log
signal-to-noise ratio: ``Exponential`` with matrices, and with its bound of eta in long steps.
Propagator, weights and covariance of a step depend on the grid alone and come from Magnus'
fourth-order integrator (Blanes et al. 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import act, check_count, check_number, cholesky
from ..sdes import SDE, MatrixSDE, Reverse
from .base import Memory, Step, describe
from .multistep import Multistep, bounded

_PARTS = 64
"""Parts of a step, a power of two, to each of which Magnus' integrator is applied."""


@dataclass(frozen=True, slots=True)
class MatrixStep:
    """Q = read_score s + read_state x; the next x is a x + sum_j b_j Q_j + root z."""

    read_score: Tensor
    read_state: Tensor
    a: Tensor
    b: tuple[Tensor, ...]
    root: Tensor | None
    kept: int
    reads_data: bool = False

    @property
    def noisy(self) -> bool:
        """Whether a normal is drawn."""
        return self.root is not None

    def __call__(
        self, x: Tensor, s: Tensor, past: tuple[Tensor, ...], z: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """Q here, then the next state."""
        values = (act(self.read_score, s) + act(self.read_state, x), *past[: self.kept])
        x_s = act(self.a, x)
        for weight, value in zip(self.b, values, strict=False):
            x_s = x_s + act(weight, value)
        if self.root is not None and z is not None:
            x_s = x_s + act(self.root, z)
        return x_s, values


class Propagator(Multistep):
    """Multistep exponential integrator for the reversal of a matrix process, at any eta.

    Exact, to the 1e-7 of its weights, for Gaussian data of covariance ``reference`` times 1,
    whatever their mean; a grid may end at t = 0. One call a step.

    Args:
        order: how many values of Q a step interpolates, 1 to 4: the order of convergence on the
            probability flow, once past values are there; weak order min(order, 2), strong 1.
        reference: variance C of the data that every step is exact for.

    Raises:
        ValueError: an order that is not 1 .. 4, a reference that is not positive; a start at 0.
        TypeError: no reversal of a ``MatrixSDE``; one whose noise does not enter as many
            components as the data have, so that their score does not determine Q.

    >>> score = sg.Lifted(sg.Gaussian(sg.EDM(1000.0), torch.zeros(2)), sg.CriticallyDamped())
    >>> sg.sample(score, 8, 10, seed=0, solver=sg.Propagator(2)).shape
    torch.Size([8, 2])
    """

    def __init__(self, order: int = 3, reference: float = 1.0) -> None:
        self.order = order = check_count(order, "order", 1, 4)
        self.reference = check_number(reference, "reference", above=0)
        self.weak, self.multistep = min(order, 2), order > 1

    def check(self, process: SDE) -> None:
        """The reversal of a ``MatrixSDE`` whose score determines Q."""
        if not (isinstance(process, Reverse) and isinstance(process.sde, MatrixSDE)):
            raise TypeError(
                "Propagator needs the reversal of a MatrixSDE, sde.reverse(score, eta) or"
                f" sde.probability_flow(score); got {describe(process)}: take Exponential for a"
                " LinearSDE"
            )
        pick = process.sde.channel(process.T).pick
        driven = pick[:, process.sde.driven].shape[-1]
        if driven != len(pick):
            raise TypeError(
                f"noise enters {driven} components of {describe(process)}, its data have"
                f" {len(pick)}: take Heun or SRA"
            )

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """Propagators, weights and roots of each step, in float64."""
        assert isinstance(process, Reverse)
        assert isinstance(process.sde, MatrixSDE)
        if times[0] == 0:
            raise ValueError("Propagator cannot start at t = 0, where nothing is known of Q")
        sde, lam = process.sde, process.sde.log_snr(times) / 2
        eta = torch.tensor([bounded(process.eta, h) for h in lam.diff().tolist()]).to(lam)
        q_score, q_state = _Law(sde, eta, self.reference).q(times[:-1])
        # A step to t = 0 is infinitely long in the log signal-to-noise ratio: one value there.
        counts = [min(self.order, i + 1) if s else 1 for i, s in enumerate(times[1:].tolist())]
        found: dict[int, tuple[Tensor, tuple[Tensor, ...], Tensor]] = {}
        for count in set(counts):
            rows = [i for i, c in enumerate(counts) if c == count]
            t, s = times[rows], times[[i + 1 for i in rows]]
            nodes = torch.stack([lam[i + 1 - count : i + 1].flip(0) for i in rows])
            a, b, v = _Law(sde, eta[rows], self.reference).steps(t, s, nodes)
            roots = _roots(v, sde.diffusion(t))
            for k, i in enumerate(rows):
                found[i] = a[k], tuple(w[k] for w in b), roots[k]
        steps = []
        for i, step in enumerate(super().plan(process, times)):
            one, weights, root = found[i]
            noise = root if process.eta else None
            steps.append(
                Step(
                    step.t,
                    step.s,
                    MatrixStep(q_score[i], q_state[i], one, weights, noise, self.order - 1),
                )
            )
        return steps


class _Law:
    """The reversal of noise level eta (N,) around the law N(0, V): its coefficients, and what they
    do in N steps."""

    def __init__(self, sde: MatrixSDE, eta: Tensor, reference: float) -> None:
        self.sde, self.reference = sde, reference
        self.square = eta.square().reshape(-1, 1, 1, 1)

    def _precision(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pick, C + W, and V^-1 = rest + pick^T (C + W)^-1 pick."""
        c = self.sde.channel(t)
        one = torch.eye(c.noise.shape[-1], dtype=t.dtype)
        total = self.reference * one + c.noise
        return c.pick, total, c.rest + c.pick.mT @ torch.linalg.solve(total, c.pick)

    def q(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Q = first s + second x, from the driven components of the score."""
        pick, total, precision = self._precision(t)
        driven = self.sde.driven
        first = torch.zeros_like(pick)
        first[..., driven] = total @ torch.linalg.inv(pick.mT[..., driven, :])
        return first, first @ precision

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M, F and eta^2 G G^T."""
        pick, total, precision = self._precision(t)
        g = self.sde.diffusion(t)
        q, half = g @ g.mT, (1 + self.square) / 2
        force = -half * q @ torch.linalg.solve(total, pick).mT
        return self.sde.rate(t) + half * q @ precision, force, self.square * q

    def steps(self, t: Tensor, s: Tensor, nodes: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """N steps from t to s (N,): propagators (N, k, k), for each of the p log levels ``nodes``
        (N, p) the weights (N, k, m) of the Q there, and the covariances of the noise (N, k, k).
        """
        edges = _edges(t, s)
        h, gauss = edges.diff(), math.sqrt(3) / 6
        moves, kernels = [], []
        for c in (0.5 - gauss, 0.5 + gauss):
            u = edges[:, :-1] + c * h
            m, force, q = self._coefficients(u)
            basis = _lagrange(nodes, self.sde.log_snr(u) / 2)
            forces = (force.unsqueeze(2) * basis[..., None, None]).movedim(2, -2).flatten(-2)
            moves.append(_block(m, forces, torch.zeros_like(forces[..., :0, :])))
            # Time falls where there is noise: the covariance grows against it.
            kernels.append(_block(m, -q, -m.mT))
        k, h = self.sde.size, h[..., None, None]
        phi, spread = (_magnus(a, b, h) for a, b in (moves, kernels))
        v = spread[..., :k, k:] @ phi[..., :k, :k].mT
        while phi.shape[1] > 1:
            first, then = phi[:, ::2], phi[:, 1::2]
            turn = then[..., :k, :k]
            v = turn @ v[:, ::2] @ turn.mT + v[:, 1::2]
            phi = then @ first
        total, v = phi[:, 0], v[:, 0]
        weights = total[:, :k, k:].chunk(nodes.shape[1], -1)
        return total[:, :k, :k], list(weights), (v + v.mT) / 2


def _edges(t: Tensor, s: Tensor) -> Tensor:
    """Where the parts of steps from t to s (N,) meet, (N, parts + 1): finer towards the data,
    where a law that starts at t = 0 is young and changes fast."""
    share = torch.linspace(0, 1, _PARTS + 1, dtype=torch.float64) ** 2
    t, s = t.unsqueeze(1), s.unsqueeze(1)
    low, high = torch.minimum(t, s), torch.maximum(t, s)
    rising = low + (high - low) * share
    return torch.where(t < s, rising, rising.flip(1))


def _block(m: Tensor, right: Tensor, below: Tensor) -> Tensor:
    """[[m, right], [0, below]], square: what stands below ``right`` is 0 where not given."""
    n, k = m.shape[-1] + right.shape[-1], m.shape[-1]
    block = m.new_zeros(*m.shape[:-2], n, n)
    block[..., :k, :k], block[..., :k, k:] = m, right
    block[..., k : k + below.shape[-2], k:] = below
    return block


def _magnus(a_1: Tensor, a_2: Tensor, h: Tensor) -> Tensor:
    """exp of Magnus' series to order 4, from the generators at the two Gauss nodes."""
    commutator = a_2 @ a_1 - a_1 @ a_2
    return torch.linalg.matrix_exp(h / 2 * (a_1 + a_2) + math.sqrt(3) / 12 * h**2 * commutator)


def _lagrange(nodes: Tensor, x: Tensor) -> Tensor:
    """The Lagrange basis of the nodes (N, p) at x (N, n): (N, n, p)."""
    x, columns = x.unsqueeze(-1), []
    for j in range(nodes.shape[1]):
        rest = torch.cat([nodes[:, :j], nodes[:, j + 1 :]], 1).unsqueeze(1)
        columns.append(((x - rest) / (nodes[:, None, j : j + 1] - rest)).prod(-1))
    return torch.stack(columns, -1)


def _roots(v: Tensor, g: Tensor) -> Tensor:
    """The roots of v nearest to multiples of g: a path drives them as it drives g."""
    low = cholesky(v)
    left, _, right = torch.linalg.svd(low.mT @ g)
    return low @ left @ right
