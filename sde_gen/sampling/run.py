"""``solve``: a solver run along a grid, whatever the process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import grids
from ..facts import facts_of
from ..noise import Noise, Streams
from ..ops import (
    Time,
    all_finite,
    as_integer,
    check_count,
    check_finite,
    check_kind,
    check_state,
    lasting,
    on_host,
    shown,
)
from ..sdes import SDE, Reverse
from ..solvers import Solver, Step
from ..solvers.base import check_drift, describe
from ..solvers.published import call_for
from ..solvers.stability import too_long

Callback = Callable[[Tensor, float], object]
"""(state after a step, its time) -> anything."""


def solve(
    process: SDE,
    x: Tensor,
    times: Tensor | Sequence[float],
    solver: Solver,
    noise: Noise | int | None = None,
    *,
    trajectory: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Step a process from ``times[0]`` to ``times[-1]``.

    Gradients are recorded if, and only if, ``x`` requires them.

    Args:
        process: a forward SDE (rising times), a reversal (falling) or an ODE (either).
        x: state (B, *D) at ``times[0]``, floating point and finite.
        times: a strictly monotone grid of two or more times in [0, T].
        solver: what makes the steps.
        noise: a ``Noise``, or a seed for ``Streams``; None draws the seed from torch's global
            generator.
        trajectory: return the state at every time, (len(times), B, *D), in place of the last.
        callback: is called as callback(x, t) with the state after each step (of each chunk).
        progress: show a progress bar.
        chunk: run the batch in parts of this size; the result does not depend on it.

    Raises:
        TypeError: an integer state; not a process or solver; a solver that cannot step it.
        ValueError: a state that is not finite; labels or noise for another number of samples; a
            grid that is not monotone, leaves [0, T], runs the wrong way for the process, or makes
            the solver read a score where it is singular.
        FloatingPointError: a score or state is not finite; at once on the CPU, at the end on
            other devices, which are not asked before.

    Warns:
        UserWarning: before the first step, that the steps are too long for the eta of a reversal
            (``solvers.stability``): the run would explode.

    >>> flow = sg.VP().probability_flow(sg.Gaussian(sg.VP(), torch.zeros(2)))
    >>> sg.solve(flow, torch.ones(8, 2), [1.0, 0.5, 0.1], sg.Heun()).shape
    torch.Size([8, 2])
    """
    if not isinstance(process, SDE):
        raise TypeError(f"process must be an SDE, such as sde.reverse(score), got {process!r}")
    check_solver(solver)
    check_state(x)
    check_finite(x)
    grid = _check_grid(process, times, solver)
    solver.check(process)
    _check_diffusion(process, grid, solver)
    noise = as_noise(noise)
    if isinstance(process, Reverse) and not solver.own_steps:
        process, noise = process.warmed(noise)
    _check_batch(process, noise, len(x))
    parts = [slice(0, len(x))] if chunk is None else _parts(len(x), chunk)
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        plan = _planned(process, solver, grid, x)
        with _bar(len(parts) * len(plan), progress) as tick:
            runs = [
                _run(
                    process.rows(part) if len(parts) > 1 else process,
                    x[part],
                    plan,
                    solver,
                    noise.rows(part) if len(parts) > 1 else noise,
                    trajectory,
                    callback,
                    tick,
                )
                for part in parts
            ]
    result = runs[0] if len(runs) == 1 else torch.cat(runs, dim=1 if trajectory else 0)
    if not all_finite(result):
        raise FloatingPointError(
            f"{type(solver).__name__} ended with NaN or infinite values on a grid of"
            f" {len(grid) - 1} steps: the step is too large for the solver, or the score is"
            " not finite"
        )
    return result


def check_solver(solver: object) -> None:
    """Raise ``TypeError`` unless it is a solver; for a name it says what to write."""
    if isinstance(solver, str):
        raise TypeError(f"solver must be a Solver, got {shown(solver)}: {call_for(solver)}")
    check_kind(solver, Solver, "solver", "a Solver, such as EulerMaruyama()")


_plans: WeakKeyDictionary[Solver, tuple[list[object], list[Step[Any]], str]] = WeakKeyDictionary()
"""The last plan of each solver, what it was made for, and what there is to warn of."""


def _planned(process: SDE, solver: Solver, grid: Tensor, x: Tensor) -> list[Step[Any]]:
    """The plan of a reversal, made and tried once for as long as all that it rests on is the
    same: a grid is mostly run again and again."""
    if not isinstance(process, Reverse) or type(solver).__hash__ is None:
        return solver.plan(process, grid)
    made_for: list[object] = [process.sde, process.eta, facts_of(process.score).std]
    made_for += [grid.numpy().tobytes(), *vars(solver).values()]
    known, plan, warning = _plans.get(solver, ([], [], ""))
    same = len(known) == len(made_for) and all(
        a is b or (isinstance(a, bytes | float | tuple) and a == b)
        for a, b in zip(known, made_for, strict=True)
    )
    if not same:
        with lasting():
            plan = solver.plan(process, grid)
            warning = too_long(process, solver, plan, x)
        _plans[solver] = made_for, plan, warning
    if warning:
        warnings.warn(warning, stacklevel=3)
    return plan


def _blame(
    process: SDE, x: Tensor, step: Step, solver: Solver, noise: Noise, memory: tuple[Tensor, ...]
) -> NoReturn:
    """Raise ``FloatingPointError``: the score is not finite in this step, or the step too long.

    The step is made once more, by a process whose score (or drift) is looked at.
    """
    name, watched = "score" if isinstance(process, Reverse) else "drift", copy(process)

    def checked(y: Tensor, t: Time) -> Tensor:
        value: Tensor = getattr(process, name)(y, t)
        check_drift(process, value, y, t)
        return value

    object.__setattr__(watched, name, checked)  # which is frozen
    solver.step(watched, x, step, noise, memory)
    raise FloatingPointError(
        f"{type(solver).__name__} found NaN or infinite values in its step from {step.t:.6g} to"
        f" {step.s:.6g}: the step is too large for the solver"
    )


def _run(
    process: SDE,
    x: Tensor,
    plan: list[Step],
    solver: Solver,
    noise: Noise,
    trajectory: bool,
    callback: Callback | None,
    tick: Callable[[], object],
) -> Tensor:
    states = [x]
    memory: tuple[Tensor, ...] = ()
    host = on_host(x.device)
    for step in plan:
        before, remembered = x, memory
        x, memory = solver.step(process, x, step, noise, memory)
        if host and not all_finite(x):
            _blame(process, before, step, solver, noise, remembered)
        if trajectory:
            states.append(x)
        if callback is not None:
            callback(x, step.s)
        tick()
    return torch.stack(states) if trajectory else x


def as_noise(noise: Noise | int | None, name: str = "noise", first: int = 0) -> Noise:
    """Streams of a seed from sample ``first`` on, or the noise itself; None draws a seed.

    Raises:
        TypeError: what is neither, under ``name``. ValueError: ``first`` of a noise.

    >>> sg.sampling.as_noise(7, first=2)(torch.zeros(1, 2), 1.0, 0.5).shape
    torch.Size([1, 2])
    """
    if isinstance(noise, Noise):
        if first:
            raise ValueError("first numbers the samples of a seed; a Noise has its own numbers")
        return noise
    if noise is None:
        return Streams(int(torch.randint(1 << 62, ())), first)
    number = as_integer(noise)
    if number is None:
        raise TypeError(f"{name} must be a Noise, an integer seed or None, got {noise!r}")
    return Streams(number, first)


def _check_batch(process: SDE, noise: Noise, n: int) -> None:
    """Raise unless what is bound per sample is bound for n of them: chunks would hide it."""
    for what, bound in (("what is bound to the process", process.batch), ("noise", noise.batch)):
        if bound not in (None, n):
            raise ValueError(f"{what} is for {bound} samples, the state has {n}")


def _check_diffusion(process: SDE, times: Tensor, solver: Solver) -> None:
    """Raise unless a process gives a finite diffusion for each of several times."""
    g = process.diffusion(times)
    if process.direction != 0 and (not isinstance(g, Tensor) or g.shape[:1] != times.shape):
        kind = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise TypeError(
            f"diffusion(t) of {describe(process)} must return a tensor of the shape of t,"
            f" {tuple(times.shape)}, such as torch.ones_like(t); got {kind}"
        )
    bad = ~torch.isfinite(torch.as_tensor(g).reshape(len(times), -1)).all(1)
    if not solver.takes_infinite and bool(bad.any()):
        raise ValueError(
            f"the coefficients of {describe(process)} are infinite at t ="
            f" {float(times[bad][0]):.6g}, where alpha = 0: take Exponential, which reads the"
            " denoised state there, or start the grid a little before"
        )


def _check_grid(process: SDE, times: Tensor | Sequence[float], solver: Solver) -> Tensor:
    grid = grids.as_times(times)
    steps = grid.diff()
    if not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError(f"times must rise or fall strictly, got {grid.tolist()}")
    if float(grid.min()) < 0 or float(grid.max()) > process.T * (1 + 1e-12):
        raise ValueError(f"times must lie in [0, T] = [0, {process.T}], got {grid.tolist()}")
    sign = 1 if grid[-1] > grid[0] else -1
    if process.direction == -sign:
        way = "fall" if sign > 0 else "rise"
        raise ValueError(
            f"times must {way} for {describe(process)}; only an ODE (a probability flow, eta = 0)"
            " runs both ways"
        )
    reads_end = solver.evaluates_end and not solver.reaches_zero
    reads_zero = float(grid[0]) == 0 or (float(grid[-1]) == 0 and reads_end)
    if reads_zero and process.singular:
        raise ValueError(
            f"{type(solver).__name__} on this grid reads the score at t = 0, where it is"
            " singular: start or end the grid at a small positive time"
        )
    return grid


def _parts(n: int, size: int) -> list[slice]:
    size = check_count(size, "chunk")
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[], object]]:
    """What is called after each of all the steps."""
    if not progress:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="sampling", unit="step", leave=False) as bar:
        yield bar.update
