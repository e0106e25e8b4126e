"""Exact likelihoods by the probability flow.

Along the flow dx/dt = v(x, t) the log density changes by minus the divergence of v, so

    log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt

(Chen et al. 2018; Song et al. 2021, appendix D.2). The state and the integral are solved together
as one ODE of n + 1 coordinates, by whatever solver is given. The divergence is the exact trace of
the Jacobian (n products with its rows, batched), or Hutchinson's unbiased estimate
mean_k e_k . J e_k with random signs e_k (Grathwohl et al. 2019).

By default every sample is stepped by its own error, in the variables in which ``Adaptive`` finds
the flow tame: a sample's likelihood does not depend on its neighbours, and a point of low density
costs what it must. Probes must not choose the steps, or the estimate would be biased: what they
add up to is carried in a unit in which no estimate of an error sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from . import grids
from .levels import check_levels, place
from .noise import Streams
from .ops import (
    Time,
    act,
    as_time,
    batch_of,
    check_count,
    check_finite,
    check_kind,
    check_state,
    shown,
    sum_rest,
)
from .sampling import enter, solve
from .scores import Score
from .sdes import SDE, KernelSDE, MatrixSDE, Reverse, ScoreFunction
from .solvers import Adaptive, Solver
from .solvers.adaptive import standard
from .solvers.base import Step

_VMAP_BUDGET = 1 << 22
"""Numbers of the state that are differentiated at once for an exact trace."""

_UNIT = 2.0**40
"""Nats that a divergence which must not choose the steps is counted in; powers of 2 are exact."""

_PARTS = 8
"""Steps that are made at least where the state alone chooses them: it may be at rest."""


class _Stepped(NamedTuple):
    """A flow and its grid in the variables in which a solver steps it.

    x is ``first`` times the state at the start of the grid, ``last`` times that at its end; the
    divergence is counted in ``unit``.
    """

    flow: SDE
    times: Tensor
    first: float = 1.0
    last: float = 1.0
    unit: float = 1.0


class _Augmented(SDE):
    """The flow of (x, l / unit) with dl/dt = div v(x, t), as one process on (B, n + 1)."""

    direction = 0

    def __init__(
        self, way: _Stepped, shape: tuple[int, ...], signs: Tensor | None, singular: bool
    ) -> None:
        self.way, self.shape, self.signs, self.singular = way, shape, signs, singular
        self.T = float(way.times[-1])

    def diffusion(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def drift(self, x: Tensor, t: Time) -> Tensor:
        state = x[:, :-1].reshape(-1, *self.shape)
        v, pull, *_ = torch.func.vjp(lambda y: self.way.flow.drift(y, t), state)
        if self.signs is None:
            div = _trace(pull, state)
        else:
            rows = torch.func.vmap(lambda e: sum_rest(pull(e)[0] * e))(self.signs.to(x.dtype))
            div = rows.mean(0)
        slope = torch.cat([v.flatten(1), div.unsqueeze(1) / self.way.unit], 1)
        bad = torch.isfinite(x).all(1) & ~torch.isfinite(slope).all(1)
        if bool(bad.any()):
            raise FloatingPointError(
                f"the score or its divergence is NaN or infinite for {int(bad.sum())} of {len(x)}"
                " states, which are finite"
            )
        return slope

    def rows(self, index: slice | Tensor) -> _Augmented:
        signs = None if self.signs is None else self.signs[:, index]
        way = self.way._replace(flow=self.way.flow.rows(index))
        return _Augmented(way, self.shape, signs, self.singular)


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
    model: Score,
    x: Tensor,
    *,
    probes: int | None = None,
    seed: int = 0,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """log p_0(x) in nats, for x in the units of the data: (B, *D) -> (B,).

    A flow that starts at a time t > 0, as one must whose score is singular at 0, starts from
    alpha x, and the volume of that scaling is counted: the density is that of x_t / alpha, data
    blurred by sigma / alpha. Of a process that adds to the data x is the whole state and log p_0
    its joint density; ``sde.begin`` turns that into a bound for the data.

    Args:
        model: a score that knows its process; the flow of that is followed.
        x: data (B, *D), finite and floating point.
        probes: None for the exact trace (n backward passes a call); else the number of
            Hutchinson probes, drawn once a sample from ``seed`` and the sample's number.
        solver: an ODE solver; by default ``Adaptive`` to 1e-5, with probes to 1e-4, which is
            far below their own spread. Under it, and in fixed steps, a sample does not depend on
            its batch (but for rounding, which may turn a step at the edge of the tolerance);
            ``SciPy`` chooses one step for the whole batch and its probes, and what it returns
            depends, within its tolerance, on the batch and on ``chunk``.
        times: a rising grid that ends at T, where the law is known; two times by default.
        progress, chunk: as in ``solve``.

    Returns:
        (B,), with the density of the terminal state taken from ``model.log_prob(x, T)`` where
        the model has one (exact scores) and from ``sde.prior_log_prob`` otherwise.

    Raises:
        TypeError, ValueError: bad input, as in ``solve``; x that is not (B, *D); a score bound
            for another number of samples; ``probes`` < 1; times that do not rise to T.
        FloatingPointError: score or divergence are NaN or infinite.
    """
    sde = _check(model, x)
    grid = _grid(sde, model, times)
    signs = None if probes is None else _signs(x, check_count(probes, "probes"), seed)
    if solver is None:
        solver = Adaptive(1e-5, 1e-5) if signs is None else Adaptive(1e-4, 1e-4)
    check_kind(solver, Solver, "solver", "a Solver, such as Adaptive()")
    reverse = sde.probability_flow(model)
    way = _stepped(reverse, grid, solver, signs is not None)
    moved, volume = _carry(sde, enter(model, x), grid[0])
    # Units are those of the data alone, not of what a process adds to them.
    data = x[:, 0] if isinstance(sde, MatrixSDE) and sde.added else x
    volume -= model.facts.log_volume(data.shape[1:])
    joint = _Augmented(way, tuple(x.shape[1:]), signs, reverse.singular)
    state = torch.cat([(moved / way.first).flatten(1), x.new_zeros(len(x), 1)], 1)
    end = solve(joint, state, way.times, solver, 0, progress=progress, chunk=chunk)
    x_end = way.last * end[:, :-1].reshape(x.shape)
    volume += x[0].numel() * math.log(way.last / way.first)
    known = getattr(model, "log_prob", None)
    terminal = known(x_end, grid[-1]) if known else sde.prior_log_prob(x_end)
    return terminal.to(x.dtype) + way.unit * end[:, -1] + volume


def _check(model: Score, x: Tensor) -> KernelSDE:
    sde = getattr(model, "sde", None)
    if not isinstance(sde, KernelSDE):
        raise TypeError(
            f"log_prob(model, x) needs a score that knows its process (.sde), got {model!r}"
        )
    check_state(x)
    check_finite(x)
    shape = model.shape
    if x.ndim < 2 or (shape is not None and x.shape[1:] != sde.state_shape(shape)):
        wanted = "(B, *D)" if shape is None else batch_of(sde.state_shape(shape))
        raise ValueError(f"x must have shape {wanted}, a row a sample, got {tuple(x.shape)}")
    if model.batch not in (None, len(x)):
        raise ValueError(f"the score is bound for {model.batch} samples, x has {len(x)}")
    return sde


def _grid(sde: KernelSDE, score: ScoreFunction, times: Tensor | Sequence[float] | None) -> Tensor:
    """The times of the flow, from the data to T."""
    if times is None:
        start = _default_start(sde) if getattr(score, "singular", True) else 0.0
        times = [start, sde.T]
    grid = grids.as_times(times)
    rises = grid[0] >= 0 and bool((grid.diff() > 0).all())
    if not (rises and abs(float(grid[-1]) - sde.T) <= 1e-9 * sde.T):
        raise ValueError(
            f"times must rise from the data to T = {sde.T}, where the law is known, got"
            f" {grid.tolist()}"
        )
    return grid


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


def _stepped(flow: Reverse, grid: Tensor, solver: Solver, probed: bool) -> _Stepped:
    if not isinstance(solver, Adaptive):
        return _Stepped(flow, grid)
    start, end = float(grid[0]), float(grid[-1])
    tame, way = standard(flow, Step(start, end, None)), _Stepped(flow, grid)
    if tame is not None:
        clock = torch.tensor([tame.clock(t) for t in grid.tolist()], dtype=torch.float64)
        way = _Stepped(tame, clock, tame.scale(start), tame.scale(end))
    if not probed:
        return way
    if len(grid) == 2:
        even = torch.linspace(0, 1, _PARTS + 1, dtype=torch.float64)
        share = even**2 if tame is None else even
        way = way._replace(times=torch.lerp(way.times[0], way.times[-1], share))
    return way._replace(unit=_UNIT)


def _signs(x: Tensor, probes: int, seed: int) -> Tensor:
    """Random signs (probes, B, *D): a function of the seed and the sample's number."""
    streams = Streams(seed)
    return torch.stack([1 - 2 * (streams(x, 0.0, 0.0, k) < 0).to(x.dtype) for k in range(probes)])


def bits_per_dim(
    model: Score,
    levels: Tensor | ArrayLike,
    n_levels: int | None = None,
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
    with it, and their density divided out. It is a bound in the mean over these draws and over
    probes; the noise of a sample is a function of the seed and the sample's number.

    Args:
        model: a score that knows its ``sde``, of data scaled to [-1, 1].
        levels: integers 0 .. n_levels - 1, a tensor, an array or lists.
        n_levels: L; by default what the model knows (``facts.levels``), or 256.
        draws: dequantisations a sample; more than one need ``probes=None``.
        probes, solver, chunk: as in ``log_prob``.

    Raises:
        TypeError: levels are not integers, or the model does not know its process.
        ValueError: levels out of range; several draws with probes, whose spread inside the mean
            over draws would make its logarithm too large, so that nothing is bounded.
    """
    sde, draws = getattr(model, "sde", None), check_count(draws, "draws")
    if not isinstance(sde, KernelSDE):
        raise TypeError(
            f"model must be a score that knows its linear process (.sde), got {shown(model)}"
        )
    if draws > 1 and probes is not None:
        raise ValueError(
            f"draws = {draws} with probes = {probes} is no bound: the spread of the probes would"
            " pass for likelihood; take draws=1, or the exact divergence, probes=None"
        )
    known = model.facts.levels or 256
    k, n_levels = check_levels(levels, known if n_levels is None else n_levels)
    if k.ndim < 2 or k.numel() == 0:
        raise ValueError(f"levels must be (B, *D), a row a sample, got shape {tuple(k.shape)}")
    k = k if isinstance(levels, Tensor) else k.to(model.device)
    streams, logs = Streams(seed), []
    for draw in range(draws):
        u = torch.special.ndtr(streams(torch.empty(k.shape, device=k.device), 1.0, 0.0, draw))
        state, log_q = _begin(sde, place(k, u, n_levels), streams, draw)
        log_p = log_prob(model, state, probes=probes, seed=seed, solver=solver, chunk=chunk)
        logs.append(log_p - log_q)
    bound = torch.logsumexp(torch.stack(logs), 0) - math.log(draws)
    return -bound / (k[0].numel() * math.log(2)) + math.log2(n_levels / 2)


def _begin(sde: KernelSDE, x: Tensor, streams: Streams, draw: int) -> tuple[Tensor, Tensor]:
    """The state at t = 0 of data x, and the log density of what was added to it."""
    if not isinstance(sde, MatrixSDE):
        return x, x.new_zeros(len(x))
    return sde.begin(x, normals=[streams(x, 2.0, float(j), draw) for j in range(len(sde.added))])
