"""log p_0(x) by the probability flow, with its error bar.

Along the flow dx/dt = v(x, t) the log density changes by minus the divergence of v, so

    log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt

(Chen et al. 2018; Song et al. 2021, appendix D.2). Linear processes are followed in the variables
of ``whitened``, in which Gaussian data stand still; any solver may be given in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import Streams
from ..ops import check_count, check_kind
from ..sampling import enter, solve
from ..scores import Score
from ..sdes import KernelSDE, LinearSDE, MatrixSDE
from ..solvers import Adaptive, Solver
from .estimate import Estimate
from .flow import Augmented, carry, check_model, flow_grid, stepped
from .probes import orthogonal_signs, spread_of
from .watch import Watch
from .whitened import Whitened, reference

_EXACT, _PROBES, _FIXED = 64, 16, 56
"""Up to so many coordinates the trace is exact by default; beyond it has so many probes."""


class Found(NamedTuple):
    """log p_0 by each probe (B, K), the solver's error (B,) if known, and the calls a sample."""

    logs: Tensor
    error: Tensor | None
    calls: int


def log_prob(
    model: Score,
    x: Tensor,
    *,
    probes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    first: int = 0,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Estimate:
    """log p_0(x) in nats, for x in the units of the data: (B, *D) -> an ``Estimate`` (B,).

    Its spread is that of the probes (0 for the exact trace), its bias what the solver may be off,
    by a second run that is ten times as coarse with adaptive steps, and from what the path of
    fixed steps misses of the flow, times the score, which costs no call (``whitened``). Gradients
    are recorded if x requires them.

    A flow that starts at a time t > 0, as one must whose score is singular at 0, starts from
    alpha x, and the volume of that scaling is counted: the density is that of x_t / alpha, data
    blurred by sigma / alpha. Of a process that adds to the data x is the whole state and log p_0
    its joint density; ``sde.begin`` turns that into a bound for the data.

    Args:
        model: a score that knows its process; the flow of that is followed.
        x: data (B, *D), finite and floating point.
        probes: number K of orthogonal sign probes, drawn once a sample from ``seed`` and the
            sample's number, a backward pass each a call; from K = n on, as many as there are
            coordinates, the trace is exact. None is the exact trace up to n = 64, 16 probes
            beyond. A single probe does not tell its spread.
        steps: fixed steps of a linear process around Gaussian data (``likelihood.whitened``),
            one call each. None is 56 of them with probes, whose spread is the larger error, and
            ``Adaptive`` steps with the exact trace and on matrix processes, every sample by
            itself: right for rough laws too.
        first: the number of the first sample: a part of the data gets the probes that it has in
            the whole.
        solver: an ODE solver in place of all this, for state and divergence together. Its
            bias is then yours to judge: it is not in the error bar.
        times: a rising grid that ends at T, where the law is known; two times by default. Without
            a solver only its first counts.
        progress, chunk: as in ``solve``; a value does not depend on chunks or batch, but for
            rounding (under ``SciPy``, which chooses one step for the whole batch, it does).

    Returns:
        The density of the terminal state is taken from ``model.log_prob(x, T)`` where the model
        has one (exact scores) and from ``sde.prior_log_prob`` otherwise.

    Raises:
        TypeError, ValueError: bad input, as in ``solve``; x that is not (B, *D); a score bound
            for another number of samples; ``probes`` < 1; times that do not rise to T; steps
            beside a solver or of a matrix process.
        FloatingPointError: score or divergence are NaN or infinite.

    >>> sg.log_prob(sg.Gaussian(sg.VP(), torch.zeros(2)), torch.zeros(1, 2)).value
    tensor([-1.8379])
    """
    sde = check_model(model, x)
    fixed = _FIXED if steps is None else check_count(steps, "steps", 2)
    grid = flow_grid(sde, model, times)
    signs, method = _tracer(x, probes, seed, first)
    if solver is not None:
        check_kind(solver, Solver, "solver", "a Solver, such as Adaptive()")
    if steps is not None and not (solver is None and isinstance(sde, LinearSDE)):
        raise ValueError(
            "steps are those of the default on a linear process: a solver takes its own from"
            " times, a matrix process is followed by Adaptive"
        )
    # Units are those of the data alone, not of what a process adds to them.
    data = x[:, 0] if isinstance(sde, MatrixSDE) and sde.added else x
    volume, moved = model.facts.log_volume(data.shape[1:]), enter(model, x)
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        around = steps is not None or signs is not None
        if solver is None and isinstance(sde, LinearSDE) and around:
            found = _whitened(model, moved, float(grid[0]), fixed, signs, progress, chunk)
            method = f"fixed steps ({fixed}), {method}"
        else:
            found = _solved(model, moved, grid, solver, signs, progress, chunk)
            own = "" if solver is None else ", bias not estimated"
            method = f"{'Adaptive' if solver is None else type(solver).__name__}, {method}{own}"
        value = found.logs.mean(1) - volume
    parts = found.logs.detach()
    bias = torch.zeros_like(parts[:, 0]) if found.error is None else found.error
    spread = bias.new_zeros(len(x)) if signs is None else spread_of(parts, x[0].numel())
    value, spread, bias = (v.to(x.dtype) for v in (value, spread, bias))
    return Estimate(value, spread, bias, found.calls, method)


def _tracer(x: Tensor, probes: int | None, seed: int, first: int) -> tuple[Tensor | None, str]:
    """The probes (K, B, *D), None for the exact trace, and either in words."""
    n = x[0].numel()
    if probes is None:
        probes = n if n <= _EXACT else _PROBES
    probes = check_count(probes, "probes")
    streams = Streams(
        seed, check_count(first, "first", 0)
    )  # refuses what is no seed, whether or not it is needed
    if probes >= n:
        return None, "exact trace"
    signs = orthogonal_signs(x, probes, streams)
    return signs, f"{probes} orthogonal probe{'s' * (probes > 1)}"


def _whitened(
    model: Score,
    x: Tensor,
    start: float,
    steps: int,
    signs: Tensor | None,
    progress: bool,
    chunk: int | None,
) -> Found:
    """In fixed steps."""
    sde = model.sde
    assert isinstance(sde, LinearSDE)
    flow, n = sde.probability_flow(model), x[0].numel()
    if not start and flow.singular:
        raise ValueError(
            "the flow reads the score at t = 0, where it is singular: start times at a small"
            " positive time"
        )
    moments = reference(model)
    size = len(x) if chunk is None else check_count(chunk, "chunk")
    parts = [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]
    watch, logs, biases = Watch((steps + 1) * len(parts), progress), [], []
    for part in parts:
        own = flow.rows(part) if len(parts) > 1 else flow
        path = Whitened(own, moments, n, start, 2)
        probes = None if signs is None else signs[:, part]
        run = path.run(float(sde.alpha(start)) * x[part], steps, probes, watch)
        terminal = _terminal(model, path.state(run.z, path.end(sde.T)))
        logs.append(terminal.to(run.gained).unsqueeze(1) + run.gained)
        biases.append(run.bias)
    watch.close()
    return Found(torch.cat(logs), torch.cat(biases), steps + 1)


def _apart(fine: Tensor, coarse: Tensor) -> Tensor:
    """|fine - coarse| of the means over probes, (B,)."""
    return (fine - coarse).detach().mean(1).abs()


def _terminal(model: Score, x: Tensor) -> Tensor:
    """log p_T, of the model where it knows it, of the prior otherwise."""
    sde, known = model.sde, getattr(model, "log_prob", None)
    assert isinstance(sde, KernelSDE)
    found: Tensor = known(x, sde.T) if known else sde.prior_log_prob(x)
    return found


def _solved(
    model: Score,
    x: Tensor,
    grid: Tensor,
    solver: Solver | None,
    signs: Tensor | None,
    progress: bool,
    chunk: int | None,
) -> Found:
    """By a solver of state and divergence; by default ``Adaptive``, and its error by a
    run that is ten times coarser."""
    tolerance = 1e-5 if signs is None else 1e-4
    solvers = (
        (solver,)
        if solver is not None
        else tuple(Adaptive(k * tolerance, k * tolerance) for k in (1, 10))
    )
    logs, calls = list[Tensor](), 0
    for i, one in enumerate(solvers):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == 0):
            found, seen = _follow(model, x, grid, one, signs, progress, chunk)
        logs.append(found)
        calls += seen
    error = _apart(*logs) if len(logs) > 1 else None
    return Found(logs[0], error, calls)


def _follow(
    model: Score,
    x: Tensor,
    grid: Tensor,
    solver: Solver,
    signs: Tensor | None,
    progress: bool,
    chunk: int | None,
) -> tuple[Tensor, int]:
    """log p_0 by each probe (B, K), and evaluations of the score a sample."""
    sde, n = model.sde, x[0].numel()
    assert isinstance(sde, KernelSDE)
    reverse = sde.probability_flow(model)
    way = stepped(reverse, grid, solver, signs is not None)
    moved, volume = carry(sde, x, grid[0])
    joint = Augmented(way, tuple(x.shape[1:]), signs, reverse.singular)
    count = 1 if signs is None else len(signs)
    state = torch.cat([(moved / way.first).flatten(1), x.new_zeros(len(x), count)], 1)
    end = solve(joint, state, way.times, solver, 0, progress=progress, chunk=chunk)
    x_end = way.last * end[:, :n].reshape(x.shape)
    volume += n * math.log(way.last / way.first)
    logs = _terminal(model, x_end).to(x.dtype).unsqueeze(1) + way.unit * end[:, n:] + volume
    return logs, math.ceil(joint.seen[0] / len(x))
