"""Exact likelihoods by the probability flow.

Along the flow dx/dt = v(x, t) the log density changes by minus the divergence of v, so

    log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt

(Chen et al. 2018; Song et al. 2021, appendix D.2). The state and the integral are solved together
as one ODE of n + 1 coordinates, by whatever solver is given. The divergence is the exact trace of
the Jacobian (n products with its rows, batched), or Hutchinson's unbiased estimate
mean_k e_k . J e_k with random signs e_k (Grathwohl et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import grids
from .noise import Streams
from .ops import Time, act, as_time, check_finite, check_state, sum_rest
from .sampling import solve
from .scores import Score
from .sdes import SDE, KernelSDE, MatrixSDE, Reverse, ScoreFunction
from .solvers import SciPy, Solver

_VMAP_BUDGET = 1 << 22
"""Numbers of the state that are differentiated at once for an exact trace."""


class _Augmented(SDE):
    """The flow of (x, l) with dl/dt = div v(x, t), as one process on (B, n + 1)."""

    direction = 0

    def __init__(self, flow: Reverse, shape: tuple[int, ...], signs: Tensor | None) -> None:
        self.flow, self.shape, self.signs, self.T = flow, shape, signs, flow.T

    def diffusion(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def drift(self, x: Tensor, t: Time) -> Tensor:
        state = x[:, :-1].reshape(-1, *self.shape)
        v, pull, *_ = torch.func.vjp(lambda y: self.flow.drift(y, t), state)
        if self.signs is None:
            div = _trace(pull, state)
        else:
            rows = torch.func.vmap(lambda e: sum_rest(pull(e)[0] * e))(self.signs.to(x.dtype))
            div = rows.mean(0)
        return torch.cat([v.flatten(1), div.unsqueeze(1)], 1)

    def rows(self, index: slice | Tensor) -> _Augmented:
        signs = None if self.signs is None else self.signs[:, index]
        return _Augmented(self.flow.rows(index), self.shape, signs)


def _trace(pull: Callable[[Tensor], tuple[Tensor, ...]], state: Tensor) -> Tensor:
    """sum_i dv_i / dx_i for each sample: row i of the Jacobian for unit vector i."""
    n = state[0].numel()
    index = torch.arange(n, device=state.device)

    def entry(i: Tensor) -> Tensor:
        e = (index == i).to(state.dtype).reshape(1, *state.shape[1:]).expand_as(state)
        return pull(e)[0].flatten(1).mul(e.flatten(1)).sum(1)

    size = max(1, _VMAP_BUDGET // state.numel())
    return torch.func.vmap(entry, chunk_size=size)(index).sum(0)


def log_prob(
    sde: KernelSDE,
    score: ScoreFunction,
    x: Tensor,
    *,
    probes: int | None = None,
    seed: int = 0,
    solver: Solver | None = None,
    times: Tensor | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """log p_0(x) in nats, (B, *D) -> (B,).

    Under a score that is singular at t = 0 the flow starts at the small time ``times[0]`` from
    alpha x, and the volume of that scaling is counted. Of a process that adds to the data x is the
    whole state and log p_0 its joint density; ``sde.begin`` turns that into a bound for the data.

    Args:
        sde, score: the process and the score whose flow is followed.
        x: data (B, *D), finite and floating point.
        probes: None for the exact trace (n backward passes a call); else the number of
            Hutchinson probes, drawn once a sample from ``seed`` and the sample's number.
        solver: an ODE solver; ``SciPy("RK45", 1e-5, 1e-5)`` by default.
        times: a rising grid to T; two times by default.
        progress, chunk: as in ``solve``.

    Returns:
        (B,), with the density of the terminal state taken from ``score.log_prob(x, T)`` where
        the score has one (exact scores) and from ``sde.prior_log_prob`` otherwise.

    Raises:
        TypeError, ValueError: bad input, as in ``solve``; ``probes`` < 1.
    """
    if not isinstance(sde, KernelSDE):
        raise TypeError(
            f"log_prob(sde, score, x): sde must be a LinearSDE or MatrixSDE, got {sde!r}"
        )
    check_state(x)
    check_finite(x)
    if probes is not None and (isinstance(probes, bool) or probes < 1):
        raise ValueError(f"probes must be None (exact) or an integer >= 1, got {probes!r}")
    if times is None:
        start = _default_start(sde) if getattr(score, "singular", True) else 0.0
        times = torch.tensor([start, sde.T], dtype=torch.float64)
    signs = None if probes is None else _signs(x, probes, seed)
    flow = _Augmented(sde.probability_flow(score), tuple(x.shape[1:]), signs)
    moved, volume = _carry(sde, x, times[0])
    state = torch.cat([moved.flatten(1), x.new_zeros(len(x), 1)], 1)
    if solver is None:
        solver = SciPy("RK45", 1e-5, 1e-5)
    end = solve(flow, state, times, solver, 0, progress=progress, chunk=chunk)
    x_end, change = end[:, :-1].reshape(x.shape), end[:, -1]
    known = getattr(score, "log_prob", None)
    terminal = known(x_end, times[-1]) if known else sde.prior_log_prob(x_end)
    return terminal.to(x.dtype) + change + volume


def _default_start(sde: KernelSDE) -> float:
    """Where a flow starts whose score is singular at 0."""
    if isinstance(sde, MatrixSDE) and sde.added:
        # What is added starts from a narrow law, which noise widens long before it meets the data.
        return sde.T / 10_000
    return grids.default_end(sde)


def _carry(sde: KernelSDE, x: Tensor, t: Tensor) -> tuple[Tensor, float]:
    """The mean of x_t given the whole state x at t = 0, and the log volume of that map."""
    if isinstance(sde, MatrixSDE):
        phi = sde.transition(t)
        return act(phi, x), x[0].numel() / sde.size * float(torch.logdet(phi))
    alpha = float(sde.alpha(t))
    return alpha * x, x[0].numel() * math.log(alpha)


def _signs(x: Tensor, probes: int, seed: int) -> Tensor:
    """Random signs (probes, B, *D): a function of the seed and the sample's number."""
    streams = Streams(seed)
    return torch.stack([torch.sign(streams(x.float(), 0.0, 0.0, k)) for k in range(probes)])


def bits_per_dim(
    model: Score,
    levels: Tensor,
    n_levels: int = 256,
    *,
    draws: int = 1,
    probes: int | None = 1,
    seed: int = 0,
    solver: Solver | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Bits per dimension of quantised data, (B, *D) -> (B,): an upper bound on -log2 P(k) / n.

    Level k of L is read as a density on the cell [2 k / L - 1, 2 (k + 1) / L - 1]; uniform noise
    u fills the cell (Theis et al. 2016), and with K ``draws`` of it the bound is the tighter
    -log2 mean_K p(x) (Burda et al. 2016). Velocities that a process adds to the data are drawn
    with it, and their density divided out.

    Args:
        model: a score that knows its ``sde``, of data scaled to [-1, 1].
        levels: integers 0 .. n_levels - 1.
        draws: dequantisations a sample.
        probes, solver, chunk: as in ``log_prob``.

    Raises:
        TypeError: levels are not integers, or the model does not know its process.
        ValueError: levels out of range.
    """
    if levels.is_floating_point() or levels.dtype == torch.bool:
        raise TypeError(f"levels must be integers 0 .. {n_levels - 1}, got {levels.dtype}")
    if int(levels.min()) < 0 or int(levels.max()) >= n_levels:
        raise ValueError(
            f"levels must lie in 0 .. {n_levels - 1},"
            f" got {int(levels.min())} .. {int(levels.max())}"
        )
    if not isinstance(model.sde, KernelSDE):
        raise TypeError("bits_per_dim needs a score that knows its linear process (.sde)")
    generator = torch.Generator().manual_seed(seed)
    logs = []
    for k in range(draws):
        u = torch.rand(levels.shape, generator=generator).to(levels.device)
        x = (levels + u) * (2 / n_levels) - 1
        drawn: Tensor | float = 0.0
        if isinstance(model.sde, MatrixSDE):
            x, drawn = model.sde.begin(x, generator)
        state = log_prob(
            model.sde, model, x, probes=probes, seed=seed + k, solver=solver, chunk=chunk
        )
        logs.append(state - drawn)
    bound = torch.logsumexp(torch.stack(logs), 0) - math.log(draws)
    return -bound / (levels[0].numel() * math.log(2)) + math.log2(n_levels / 2)
