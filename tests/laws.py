"""What a solver makes of a law, exactly: no Monte Carlo."""

from __future__ import annotations

import numpy as np
import torch
from problems import F64, gaussian_reversal
from scipy.interpolate import CubicSpline
from torch import Tensor

from sde_gen import SDE, Gaussian, GaussianMixture, Impulses, Noise, Solver, solve


def affine_run(process: SDE, solver: Solver, times: Tensor, draws: int, n: int) -> list[Tensor]:
    """offset, gain and variance (n,) of a run x_s = offset + gain x_t + N(0, variance).

    The drift of the reversal of Gaussian data is affine in x, so a run is affine in its start and
    in each draw: unit impulses read its coefficients off, exactly and without Monte Carlo.
    """

    def run(value: float) -> Tensor:
        x = torch.full((draws + 1, n), value, dtype=F64)
        return solve(process, x, times, solver, Impulses())

    zero, one = run(0.0), run(1.0)
    return [zero[-1], (one - zero)[-1], (zero[:-1] - zero[-1]).square().sum(0)]


def law_error(
    score: Gaussian,
    solver: Solver,
    times: Tensor,
    eta: float,
    draws: int,
    point: float | None = None,
) -> Tensor:
    """Mean and variance that a run ends with, less the exact ones, (2 n,).

    It starts in the law of its time, or from one point in all coordinates.
    """
    t, s = float(times[0]), float(times[-1])
    process = score.sde.reverse(score, eta)
    offset, gain, variance = affine_run(process, solver, times, draws, score.mean.numel())
    exact_gain, m_t, m_s, spread = gaussian_reversal(score, t, s, eta)
    if point is not None:
        mean = offset + gain * point - m_s - exact_gain * (point - m_t)
        return torch.cat([mean, variance - spread**2])
    v_t, v_s = (score.sde.alpha(u) ** 2 * score.variance + score.sde.sigma(u) ** 2 for u in (t, s))
    return torch.cat([offset + gain * m_t - m_s, gain**2 * v_t + variance - v_s])


class _Nodes(Noise):
    """Given values for the first draw of a step and for the second."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.values = first, second

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        return self.values[k > 0].reshape(x.shape)

    def start(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def rows(self, index: slice | Tensor) -> _Nodes:
        raise NotImplementedError


def moment_error(
    score: GaussianMixture, solver: Solver, times: Tensor, eta: float, draws: int = 1
) -> Tensor:
    """E x^k, k = 1 .. 4, of a one-step solver's run on the line from p_t to s, less those of p_s.

    The functions u_i(x) = E[x_s^k | x_i = x] are carried back through the steps: the expectation
    over a step's one or two normals by Gauss-Hermite, u between its 401 points by cubic splines.
    """
    process, x = score.sde.reverse(score, eta), torch.linspace(-7, 7, 401, dtype=F64)
    (z, v), (y, w) = (np.polynomial.hermite_e.hermegauss(k) for k in (9, 5 if draws > 1 else 1))
    first, second = (torch.from_numpy(m.ravel()) for m in np.meshgrid(z, y))
    weight = torch.from_numpy(np.outer(w, v).ravel() / (w.sum() * v.sum()))
    n = len(weight)
    noise = _Nodes(first.repeat(len(x)), second.repeat(len(x)))

    def mean(t: float, u: Tensor) -> Tensor:
        p = torch.exp(score.log_prob(x.unsqueeze(1), t))
        return (p[:, None] * u).sum(0) / p.sum()

    powers = x[:, None] ** torch.arange(1, 5)
    u = powers
    for step in reversed(solver.plan(process, times)):
        there, _ = solver.step(process, x.repeat_interleave(n).unsqueeze(1), step, noise, ())
        values = torch.from_numpy(CubicSpline(x.numpy(), u.numpy())(there.flatten().numpy()))
        u = (values.reshape(len(x), n, -1) * weight[:, None]).sum(1)
    return mean(float(times[0]), u) - mean(float(times[-1]), powers)
