"""The search that ``tune_grid`` and ``tune_solver`` are: fit, choose and judge.

For each number of steps N, by trial on trajectories whose exact ends are known (each trial is one
run with N calls, so that nothing is assumed of the score, the solver or how small a step is):

1. The reference: the standard deviation of the data or their covariance (``informed``), which is
   better on the default grid.
2. Four numbers that bend the density of its nodes, and the strength of the ridge where steps get
   numbers, by the simplex of Nelder and Mead (1965).
3. All lengths of steps and all numbers at once (``polish``).

What came of 2 and of every move of 3 is tried on other trajectories, and the best of it judged on
a third set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..ops import batch_of, check_finite, check_number, check_state
from ..scores import Score
from ..sdes import LinearSDE
from ..solvers import Exponential
from .moments import LEVELS, informed
from .numbers import fit
from .polish import MOVES, calls, polished
from .trials import (
    FINE,
    ROWS,
    Trial,
    affordable,
    base_solver,
    by_chance,
    checked,
    states,
    trials,
    typical_error,
)
from .tuned import Choice, Tuned, Warped

BENDS = 4
FIRST, NEXT = 40, 20
"""Grids that the simplex tries, for the first number of steps and for each other."""
RIDGE, RIDGES = 0.1, (0.03, 1.0, math.inf)
"""How strongly numbers are held at none where they are fitted step by step: in the simplex, and
on the grids where polish may start."""
LEVEL = 0.05


def tune(
    model: Score,
    solver: Exponential | None,
    steps: int | Sequence[int],
    n: int,
    end: float | None,
    data: Tensor | None,
    seed: int,
    minutes: float | None,
    numbers: bool,
) -> Tuned:
    """Fit, choose and judge for each number of steps; ``numbers``: each step has some."""
    wanted = checked(model, solver, steps, n)
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
    counts = [k - (end is None) for k in wanted]
    with torch.no_grad():
        if minutes is not None:
            minutes = check_number(minutes, "minutes", above=0)
            n = affordable(model, n, minutes, evaluations(counts, numbers))
            if getattr(model, "batch", None) is not None:
                model = model.rows(slice(0, ROWS * n))
        sets = trials(model, last, n, seed, counts[-1], path=numbers)
        solvers = [default] if solver is not None else _references(model, sets[0], data, last)
        search = Search(sets[0], sde, last, model.facts.std, numbers)
        choices = []
        for k, rivals in zip(counts, search(solvers, counts), strict=True):
            choices.append(_judged(sets, search, Choice(k, default), rivals))
    ratio = float(sde.sigma(last) / sde.alpha(last))
    return Tuned(choices, model.facts.std, None if end is None else ratio, model.fingerprint())


def _references(model: Score, trial: Trial, data: Tensor | None, end: float) -> list[Exponential]:
    """The default solver, by what the model knows, and the one by what it does not."""
    default = base_solver(model)
    if model.facts.moments is not None and data is None:
        return [default, base_solver(model.with_facts(replace(model.facts, moments=None)))]
    assert model.sde is not None
    x = trial.exact / float(model.sde.alpha(end)) if data is None else data
    here = model.rows(slice(0, len(trial.x)))
    return [default, base_solver(informed(here, x, known=data is not None))]


@dataclass(frozen=True)
class Search:
    """What is tried, and on what: the first set, down to ``end``; std is of the default grid."""

    trial: Trial
    sde: LinearSDE
    end: float
    std: float
    numbers: bool

    def __call__(
        self, solvers: Sequence[Exponential], counts: Sequence[int]
    ) -> Iterator[list[Choice]]:
        """For each number of steps what fits it, better and better."""
        bend, size, most = np.zeros(BENDS), 0.5, FIRST
        ridges = RIDGES if self.numbers else RIDGES[-1:]
        for k in counts:
            plain = bent((), k)
            starts = [self._fitted(k, s, plain, r) for s in solvers for r in ridges]
            solver = min(starts, key=lambda start: start[0])[1].solver
            bend = self._simplex(k, solver, bend, size, most)
            starts += [self._fitted(k, solver, bent(bend.tolist(), k), r) for r in ridges]
            found = min(starts, key=lambda start: start[0])[1]
            yield [found, *polished(self.trial, found, self.times(found), self.std)]
            size, most = 0.25, NEXT

    def times(self, choice: Choice) -> Tensor:
        """The grid of a choice."""
        grid = partial(grids.default, data_std=self.std)
        made = grid if choice.shares is None else Warped(choice.shares, self.std)
        return made(self.sde, choice.steps, end=self.end)

    def errors(self, choice: Choice, trial: Trial) -> Tensor:
        """log of the error of each trajectory, (n,)."""
        tuned = Tuned([choice], self.std)
        return trial.errors(states(trial.flow, trial.x, self.times(choice), tuned)[-1])

    def _simplex(
        self, k: int, solver: Exponential, start: np.ndarray, size: float, most: int
    ) -> np.ndarray:
        """The best of so many bends of the default grid (``bent``)."""
        from scipy.optimize import minimize

        def error(bend: np.ndarray) -> float:
            return self._fitted(k, solver, bent(bend.tolist(), k), RIDGE)[0]

        corners = start + np.vstack([np.zeros(BENDS), size * np.eye(BENDS)])
        options = {"maxfev": most, "initial_simplex": corners}
        found: np.ndarray = minimize(error, start, method="Nelder-Mead", options=options).x
        return found

    def _fitted(
        self, k: int, solver: Exponential, shares: tuple[float, ...], ridge: float
    ) -> tuple[float, Choice]:
        """The error of a solver on a grid, and the choice; an infinite ridge keeps numbers 0."""
        choice = Choice(k, solver, shares)
        if not self.numbers:
            return _typical(self.errors(choice, self.trial)), choice
        times = self.times(choice)
        choice = replace(choice, levels=tuple((-0.5 * self.sde.log_snr(times)).tolist()))
        if ridge < math.inf:
            numbers, x = fit(self.trial, solver, times, ridge)
            return _typical(self.trial.errors(x)), replace(choice, numbers=numbers)
        most = solver.nodes - 1 + solver.corrector
        choice = replace(choice, numbers=tuple((0.0,) * min(i + 1, most) for i in range(k)))
        return _typical(self.errors(choice, self.trial)), choice


def evaluations(counts: Sequence[int], numbers: bool, share: float = 0.25) -> int:
    """How often the score is evaluated, over n: for references, moments, starts, simplex, polish
    (a ``share`` of n is differentiated), to choose and to judge."""
    starts = (FIRST - NEXT) * counts[0] + NEXT * sum(counts)
    starts += 3 * (len(RIDGES) if numbers else 1) * sum(counts)
    polish = sum(calls(k, share, numbers) for k in counts)
    judged = sum(counts) * (MOVES // 3 + 9)
    return round(ROWS * max(FINE, 4 * max(counts)) + LEVELS + starts + polish + judged)


def bent(bend: Sequence[float], steps: int) -> tuple[float, ...]:
    """Shares of the default grid's steps, (steps - 1,), with nodes of the density

        exp(sum_k bend_k P_k(2 u - 1)),  k = 1, 2, ...,

    at the share u (0 to 1), P_k the Legendre polynomials."""
    u = np.linspace(0, 1, 401)
    log_density = np.polynomial.legendre.legval(2 * u - 1, [0, *bend])
    # Bounded, so that no share is out of reach of the interpolation.
    density = np.exp(np.clip(log_density - log_density.max(), -16, 0))
    done = np.concatenate([[0], (density[1:] + density[:-1]).cumsum()])
    shares: list[float] = np.interp(np.arange(1, steps) / steps, done / done[-1], u).tolist()
    return tuple(shares)


def _typical(errors: Tensor) -> float:
    """log of the typical error; a grid too rough for its solver is no better than any."""
    error = typical_error(errors)
    return error if math.isfinite(error) else 1e3


def _judged(
    sets: Sequence[Trial], search: Search, default: Choice, rivals: Sequence[Choice]
) -> Choice:
    """The best rival of the second set, if it beats the default on the third."""
    _, choose, judge = sets
    tried = [_typical(search.errors(r, choose)) for r in rivals]
    best = rivals[int(np.argmin(tried))]
    gain = search.errors(best, judge) - search.errors(default, judge)
    ratio, p = math.exp(float(gain.mean())), by_chance(gain)
    better = min(tried) < _typical(search.errors(default, choose))
    if better and ratio < 1 and p < LEVEL:
        return replace(best, ratio=ratio, p_value=p)
    return replace(default, p_value=p)
