"""Fitting a time grid to one score.

A grid for N steps is N - 1 numbers, but a good one is smooth: its density of nodes is that of a
grid that serves most data, bent by four numbers (``Warped``). Their best values are found by
trial: each trial is one run of the solver with N calls on a set of trajectories whose exact ends
are known, and Nelder and Mead's simplex (1965) needs some 40 of them for the first number of
steps and 20 for each further one, which starts where the last one ended. What a trial measures is
the error itself at that number of steps, so nothing is assumed of the score, the solver or how
small a step is; and since so few numbers are fitted, trajectories that were not seen are served
as well. They are asked all the same: see ``tune_grid``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..ops import batch_of, check_finite, check_number, check_state
from ..scores import Score
from ..sdes import LinearSDE
from ..solvers import Exponential
from .trials import (
    FIRST,
    NEXT,
    Trial,
    affordable,
    base_solver,
    checked,
    evaluations,
    informed,
    sign_test,
    states,
    trials,
    typical_error,
)
from .tuned import Choice, Tuned, Warped

BENDS = 4
LEVEL = 0.05

Made = tuple[Choice, Tensor]
"""A choice, and the times of its grid."""
Fit = Callable[[Trial, Choice, Tensor, float], tuple[Choice, Tensor]]
"""Numbers for the steps of a grid: the choice with them, and where it ends, of (the set to fit,
choice, times, ridge)."""
RIDGES = (1e-2, 1e-3, 1e-1)
"""How strongly numbers are held at none; the first while a grid is sought."""


def tune_grid(
    model: Score,
    solver: Exponential | None = None,
    *,
    steps: int | Sequence[int] = (5, 10, 20),
    n: int = 128,
    end: float | None = None,
    data: Tensor | None = None,
    seed: int = 0,
    minutes: float | None = None,
) -> Tuned:
    """Fit time grids to a score, for the probability flow.

    Three disjoint sets of n trajectories: one to fit four numbers of the density of nodes for
    each number of steps, one to choose between the result and the default, one to judge. What
    does not beat the default on the last, trajectory by trajectory (one-sided sign test at 5 %
    for each number of steps), is dropped for the default: ``print`` the result to see.

    The default solver is made to know the data's covariance, from whatever tells it: ``data``,
    ``model.facts.moments``, or else the ends of the trajectories of the first set.

    Costs 3 n max(64, 4 max(steps)) evaluations of the score, n (40 steps[0] + 20 sum(steps[1:]))
    to fit and 5 n sum(steps) to choose and judge: 0.16 million by default, half a minute for the
    U-Net of the demo on one CPU core.

    Args:
        model: a score that knows its linear process and shape. Where labels are bound per
            sample, bind 3 n of them, a third for each set.
        solver: the solver that will use the grid; by default the default one.
        steps: the numbers of calls that will be made. For others the nearest serves.
        n: trajectories in each set.
        end: last time of the grids. By default that of ``sample``, whose last call goes on from
            there to t = 0.
        data: samples (N, *D) to take mean and covariance from.
        seed: of the trajectories.
        minutes: take as many trajectories as this time pays for, 8 to n, by the time of a call.

    Returns:
        A solver with grids: ``sample(model, n, 10, solver=tuned)``.

    Raises:
        TypeError: the model does not know its process or shape, or the solver is not an
            ``Exponential``.
        ValueError: steps that are no integers >= 2, n < 8, minutes that are not positive.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 5, seed=0, solver=sg.tune_grid(law, steps=5, n=8)).shape
    torch.Size([8, 2])
    """
    return tune(model, solver, steps, n, end, data, seed, minutes, None)


def tune(
    model: Score,
    solver: Exponential | None,
    steps: int | Sequence[int],
    n: int,
    end: float | None,
    data: Tensor | None,
    seed: int,
    minutes: float | None,
    fit: Fit | None,
) -> Tuned:
    """Fit, choose and judge for each number of steps."""
    calls = checked(model, solver, steps, n)
    sde, shape = model.sde, model.inside
    assert isinstance(sde, LinearSDE)
    assert shape is not None
    last = grids.default_end(sde) if end is None else check_number(end, "end", above=0)
    if data is not None:
        check_state(data, "data")
        check_finite(data, "data")
        if tuple(data.shape[1:]) != shape:
            raise ValueError(f"data must be {batch_of(shape, 'N')}, got {tuple(data.shape)}")
    default = base_solver(model) if solver is None else solver
    # The last of ``sample``'s calls leads from the end of the grid to t = 0.
    counts = [k - (end is None) for k in calls]
    with torch.no_grad():
        if minutes is not None:
            minutes = check_number(minutes, "minutes", above=0)
            n = affordable(model, n, minutes, evaluations(counts, fit is not None))
            model = model if getattr(model, "batch", None) is None else model.rows(slice(0, 3 * n))
        sets = trials(model, last, n, seed, counts[-1], path=fit is not None)
        if solver is None:
            ends = sets[0].exact / float(sde.alpha(last)) if data is None else data
            known = data is None and model.facts.moments is not None
            solver = base_solver(model if known else informed(model, ends))
        plain = partial(grids.default, data_std=model.facts.std)
        choices = []
        for rivals in _searched(sets[0], sde, solver, counts, last, fit):
            k = rivals[0][0].steps
            usual = Choice(k, default), plain(sde, k, end=last)
            choices.append(_judged(sets, usual, rivals))
    ratio = float(sde.sigma(last) / sde.alpha(last))
    return Tuned(choices, model.facts.std, None if end is None else ratio, model.fingerprint())


def _searched(
    trial: Trial,
    sde: LinearSDE,
    solver: Exponential,
    counts: Sequence[int],
    end: float,
    fit: Fit | None,
) -> Iterator[list[Made]]:
    """For each number of steps what fits it: the best grid, and that of steps with numbers."""
    bare, full, sizes, most = np.zeros(BENDS), np.zeros(BENDS), np.full(BENDS, 0.5), FIRST
    for k in counts:

        def made(p: np.ndarray, k: int = k) -> Made:
            bend = tuple(p.tolist())
            times = Warped(bend)(sde, k, end=end)
            levels = (-0.5 * sde.log_snr(times)).tolist()
            return Choice(k, solver, bend, tuple(levels)), times

        def tried(p: np.ndarray, made: Callable[[np.ndarray], Made] = made) -> float:
            return _error(trial, *made(p))

        def fitted(p: np.ndarray, made: Callable[[np.ndarray], Made] = made) -> float:
            assert fit is not None
            return _typical(trial.errors(fit(trial, *made(p), RIDGES[0])[1]))

        bare = _simplex(tried, bare, sizes, most)
        rivals = [made(bare)]
        if fit is not None:
            full = _simplex(fitted, bare if k == counts[0] else full, sizes, most)
            for choice, times in (made(bare), made(full)):
                rivals += [(fit(trial, choice, times, ridge)[0], times) for ridge in RIDGES]
        yield rivals
        sizes, most = np.full(BENDS, 0.25), NEXT


def _simplex(
    f: Callable[[np.ndarray], float], start: np.ndarray, sizes: np.ndarray, most: int
) -> np.ndarray:
    from scipy.optimize import minimize

    corners = np.vstack([start, start + np.diag(sizes)])
    options = {"maxfev": most, "initial_simplex": corners}
    found: np.ndarray = minimize(f, start, method="Nelder-Mead", options=options).x
    return found


def _error(trial: Trial, choice: Choice, times: Tensor) -> float:
    return _typical(_errors(trial, choice, times))


def _typical(errors: Tensor) -> float:
    """log of the typical error; a grid too rough for its solver is no better than any."""
    error = typical_error(errors)
    return error if math.isfinite(error) else 1e3


def _errors(trial: Trial, choice: Choice, times: Tensor) -> Tensor:
    return trial.errors(states(trial.flow, trial.x, times, Tuned([choice]))[-1])


def _judged(sets: Sequence[Trial], default: Made, rivals: Sequence[Made]) -> Choice:
    """The best rival of the second set, if it beats the default on the third."""
    _, choose, judge = sets
    best = min(rivals, key=lambda r: _error(choose, *r))
    gain = _errors(judge, *best) - _errors(judge, *default)
    ratio, p = math.exp(float(gain.mean())), sign_test(int((gain < 0).sum()), len(gain))
    better = _error(choose, *best) < _error(choose, *default)
    if better and ratio < 1 and p < LEVEL:
        return replace(best[0], ratio=ratio, p_value=p)
    return replace(default[0], p_value=p)
