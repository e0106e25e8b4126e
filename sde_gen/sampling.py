"""Running a solver along a grid.

``solve`` runs any process with any solver on any grid; ``sample`` is the one call that chooses
all three well. A sampler is no class: it is a process, a solver and a grid.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from . import grids
from .facts import facts_of
from .moments import Moments, isotropic
from .noise import Noise, Streams
from .ops import (
    Time,
    act,
    all_finite,
    as_device,
    as_integer,
    check_count,
    check_finite,
    check_kind,
    check_number,
    check_state,
    lasting,
    on_host,
)
from .scores import Score
from .sdes import SDE, KernelSDE, MatrixSDE, Reverse
from .solvers import Exponential, Propagator, Solver, Spectral, Step
from .solvers.base import check_drift, describe
from .solvers.stability import too_long

_T = TypeVar("_T")

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
    """
    if not isinstance(process, SDE):
        raise TypeError(f"process must be an SDE, such as sde.reverse(score), got {process!r}")
    check_kind(solver, Solver, "solver", "a Solver, such as EulerMaruyama()")
    check_state(x)
    check_finite(x)
    grid = _check_grid(process, times, solver)
    solver.check(process)
    _check_diffusion(process, grid, solver)
    noise = as_noise(noise)
    _check_batch(process, noise, len(x))
    parts = [slice(0, len(x))] if chunk is None else _parts(len(x), chunk)
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        plan = _planned(process, solver, grid, x)
        runs = [
            _run(
                process.rows(part) if len(parts) > 1 else process,
                x[part],
                plan,
                solver,
                noise.rows(part) if len(parts) > 1 else noise,
                trajectory,
                callback,
                progress,
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
    progress: bool,
) -> Tensor:
    states = [x]
    memory: tuple[Tensor, ...] = ()
    host = on_host(x.device)
    for step in _bar(plan, progress):
        before, remembered = x, memory
        x, memory = solver.step(process, x, step, noise, memory)
        if host and not all_finite(x):
            _blame(process, before, step, solver, noise, remembered)
        if trajectory:
            states.append(x)
        if callback is not None:
            callback(x, step.s)
    return torch.stack(states) if trajectory else x


def sample(
    model: Score,
    n: int,
    steps: int = 25,
    seed: int | None = None,
    *,
    eta: float | None = None,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
    first: int = 0,
    start: Tensor | None = None,
    trajectory: bool = False,
    callback: Callback | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Draw n samples from a model, in the units of its data: the one call for who does not want
    to choose.

    Args:
        model: any score that knows its process and the shape of its data, exact or learned; bind
            labels first, ``model.given(y=labels)``.
        n: how many.
        steps: network calls, where the solver makes one a step; a solver that chooses its
            steps itself (``Adaptive``, ``SciPy``) goes to the end in one.
        seed: sample i is a function of the seed and i alone; None draws a seed from torch.
        eta: noise level: 0 is the probability flow, 1 the reverse-time SDE. None takes what the
            model prefers, ``model.eta``: 0 for all but posteriors.
        solver: by default that which the model was tuned to (``tune_solver``; eta = 0 only),
            otherwise ``default_solver(model, eta)``.
        times: by default the grid that the solver brings, otherwise ``grids.default`` inside the
            times that the model was trained on (``model.span``), with a last step to t = 0.
        first: draw the samples first .. first + n - 1 of the sequence that the seed stands for.
        start: the states at the first time (n, *state), in the units of the data, in place of
            draws from the prior: a noised picture to edit, the end of another run.
        trajectory: return the data at every time, (len(times), n, *D).
        callback: is called as callback(x, t) after each step, x in the units of the data.
        dtype, device: of the state; the device is the model's own by default.
        progress, chunk: as in ``solve``.

    Returns:
        (n, *D): of a state with more than the data in it, the data.

    Raises:
        TypeError, ValueError: the model does not know its process or shape, n < 1, a dtype that
            is not floating point, and whatever ``solve`` raises (and warns of).
    """
    sde, shape = known(model, "sample")
    n, first = check_count(n, "n"), check_count(first, "first", 0)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(f"dtype must be floating point, such as torch.float32, got {dtype!r}")
    eta = check_number(model.eta if eta is None else eta, "eta", least=0)
    if solver is None:
        tuned = tuned_to(model) if eta == 0 and times is None else None
        solver = default_solver(model, eta) if tuned is None else tuned
    check_kind(solver, Solver, "solver", "a Solver, such as EulerMaruyama()")
    if times is None:
        far, near = grids.inside(sde, model.span)
        default = partial(grids.default, start=far, end=near, data_std=model.facts.std)
        grid = solver.grid or default
        to_zero = not solver.evaluates_end
        times = grid(sde, 1 if solver.own_steps else steps, to_zero=to_zero)
    times = grids.as_times(times)
    if not float(times[0]) > float(times[-1]):
        raise ValueError(f"times must fall from the noise to the data, got {times.tolist()}")
    noise = as_noise(seed, "seed", first)
    device = as_device(model.device if device is None else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no CUDA device")
    blank = torch.empty(n, *sde.state_shape(shape), dtype=dtype, device=device)
    if start is None:
        x = starting(sde, model.facts.moments, float(times[0]), noise.start(blank))
    else:
        x = _started(model, start, blank)

    def leave(x: Tensor) -> Tensor:
        return model.facts.decode(sde.data(x))

    with torch.no_grad():
        x = solve(
            sde.reverse(model, eta),
            x,
            times,
            solver,
            noise,
            trajectory=trajectory,
            callback=None if callback is None else lambda x, t: callback(leave(x), t),
            progress=progress,
            chunk=chunk,
        )
        return torch.stack([leave(y) for y in x]) if trajectory else leave(x)


def known(model: object, verb: str) -> tuple[KernelSDE, tuple[int, ...]]:
    """The process of a model and the shape of its data.

    Raises:
        TypeError: it does not know them.
    """
    sde, shape = getattr(model, "sde", None), getattr(model, "shape", None)
    if not isinstance(sde, KernelSDE) or shape is None:
        raise TypeError(
            f"{verb} needs a score that knows its linear process (.sde) and the shape of its data"
            f" (.facts.shape); {type(model).__name__} has sde = {sde!r}, shape = {shape!r}"
        )
    return sde, shape


def enter(model: Score, x: Tensor) -> Tensor:
    """A state, or data, in the units of the process; in what a process adds to the data nothing
    changes."""
    sde, facts = model.sde, model.facts
    if isinstance(sde, MatrixSDE) and sde.added and facts.units is not None:
        return torch.cat([facts.encode(x[:, 0]).unsqueeze(1), x[:, 1:]], 1)
    return facts.encode(x)


def tuned_to(model: Score) -> Solver | None:
    """What the model was tuned to, if its weights are still those."""
    tuned = model.tuned
    if tuned is None or tuned.weights in (None, model.fingerprint()):
        return tuned
    warnings.warn(
        "the model was tuned with other weights: its tuning is not used; tune it again",
        stacklevel=3,
    )
    return None


def _started(model: Score, start: Tensor, blank: Tensor) -> Tensor:
    check_state(start, "start")
    check_finite(start, "start")
    if start.shape != blank.shape:
        raise ValueError(f"start must have shape {tuple(blank.shape)}, got {tuple(start.shape)}")
    return enter(model, start).to(blank)


def default_solver(model: Score, eta: float = 0.0) -> Solver:
    """The solver that ``sample`` takes, from what the model knows of its data.

    An exponential integrator that is exact for Gaussian data of the covariance that the model
    knows (``moments``), or of its standard deviation in every direction, with corrector: on the
    probability flow of order 4 with ``Spectral`` weights, on an SDE (eta > 0) of order 2. On a
    matrix process ``Propagator``, of order 3 or 2.
    """
    check_kind(model, Score, "model", "a Score")
    facts, eta = model.facts, check_number(eta, "eta", least=0)
    if isinstance(model.sde, MatrixSDE):
        return Propagator(3 if eta == 0 else 2, facts.std**2)
    reference = isotropic(facts.variance) if facts.moments is None else facts.moments
    if eta > 0:
        return Exponential(2, reference, corrector=True)
    v = facts.variance
    weights = Spectral(v, math.prod(facts.shape or (1,))) if v > 0 else None
    return Exponential(4, reference, corrector=True, weights=weights)


def starting(sde: KernelSDE, moments: Moments | None, t: float, z: Tensor) -> Tensor:
    """x_t from N(0, sigma^2), or from N(alpha m, alpha^2 C + sigma^2) where moments are known."""
    if isinstance(sde, MatrixSDE):
        return act(sde.sigma(t), z)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    if moments is None:
        return sigma * z
    spread = moments.coefficient(np.sqrt(alpha**2 * moments.values.numpy() + sigma**2))
    x = moments.apply((spread,), (z,))
    if moments.mean is None:
        return x
    return x + alpha * moments.mean.to(x).reshape(x.shape[1:])


def as_noise(noise: Noise | int | None, name: str = "noise", first: int = 0) -> Noise:
    """Streams of a seed from sample ``first`` on, or the noise itself; None draws a seed.

    Raises:
        TypeError: what is neither, under ``name``. ValueError: ``first`` of a noise.
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


def _bar(items: list[_T], progress: bool) -> Iterable[_T]:
    if not progress:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc="sampling", unit="step", leave=False)
