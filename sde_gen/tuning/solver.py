"""Fitting a solver to one score: a few numbers a step, by least squares.

On a fitted grid each step gets numbers of its own. The student (the solver as it will be
used) walks its grid; after each step its states y are moved along the directions that its memory
spans (``directions``) to where the exact flow is (``Path``), as well as one set of numbers for all
trajectories can:

    min over c   sum_b w_b ( |y_b + sum_k c_k d_(k, b) - y*_b|^2 + r sum_k c_k^2 |d_(k, b)|^2 ).

The next step is fitted to the states that this leaves. Weights w = 1 / (residual + 0.3 median)
keep the few trajectories that end in another mode from deciding; the ridge r draws the solver
back to the one that it was, which c = 0 is. A fit costs no more evaluations than a run, so the
grid is sought with its numbers as well as without: steps with numbers want another. Several r are
fitted on either grid, and trajectories that none has seen choose between them and the solver
without numbers (as in ``tune_grid``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..noise import Streams
from ..ops import full_precision
from ..scores import Score
from ..sdes import LinearSDE
from ..solvers import Exponential
from .grid import tune
from .trials import Trial
from .tuned import Choice, Numbers, Tuned, combination, correct, directions


def tune_solver(
    model: Score,
    solver: Exponential | None = None,
    *,
    steps: int | Sequence[int] = (5, 10, 20),
    n: int = 256,
    end: float | None = None,
    data: Tensor | None = None,
    seed: int = 0,
    minutes: float | None = None,
) -> Tuned:
    """Fit grids and solvers to a score, for the probability flow.

    Does what ``tune_grid`` does, and fits as many numbers as the solver remembers values (four,
    for the default one) to each step, for each number of calls in ``steps``: on that grid, and on
    one sought for steps that have their numbers, which each of its trials fits. Three
    disjoint sets of trajectories fit, choose (also the strength of the ridge, and whether numbers
    are worth it) and judge; what does not beat the default on the last (one-sided sign test at
    5 %) is not returned. ``print`` the result to see what was taken and what it gains. Numbers
    serve the number of calls and the grid that they were fitted on: for others the nearest grid
    is taken, and the solver without numbers.

    Costs the evaluations of ``tune_grid``, its trials once more and 12 n sum(steps): 0.6 million
    by default, a minute for the U-Net of the demo on one CPU core. Memory: n max(64, 4 max(steps))
    states in single precision, and 8 n more.

    Args:
        model: a score that knows its linear process and shape. Where labels are bound per
            sample, bind 3 n of them, a third for each set.
        solver: to start from, with a finite reference and a memory (order >= 2 or corrector); by
            default the default one.
        steps: the numbers of calls that will be made.
        n: trajectories in each set; fewer than 256 fit the few that are rare.
        end, data, seed, minutes: as in ``tune_grid``.

    Returns:
        A solver with grids: ``sample(model, n, 10, solver=tuned)``.

    Raises:
        TypeError: the model does not know its process or shape, or the solver is not an
            ``Exponential``.
        ValueError: steps that are no integers >= 2, n < 8, minutes, or a solver of order 1 without
            corrector or with an infinite reference.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> law.tuned = sg.tune_solver(law, steps=5, n=8)
    """
    if isinstance(solver, Exponential):
        if solver.nodes == 1 and not solver.corrector:
            raise ValueError("a solver of order 1 without corrector keeps nothing to be fitted to")
        if bool(solver.reference.values.isinf().any()):
            raise ValueError("a solver with an infinite reference has no values to be fitted to")

    def fit(trial: Trial, choice: Choice, times: Tensor, ridge: float) -> tuple[Choice, Tensor]:
        numbers, x = _fit(trial, choice.solver, times, ridge)
        return replace(choice, numbers=numbers), x

    return tune(model, solver, steps, n, end, data, seed, minutes, fit)


def _fit(trial: Trial, solver: Exponential, times: Tensor, ridge: float) -> tuple[Numbers, Tensor]:
    """Numbers for every step, fitted while the student walks, and where it comes to."""
    x, noise, found = trial.x, Streams(0), []
    memory: tuple[Tensor, ...] = ()
    assert isinstance(trial.flow.sde, LinearSDE)
    assert trial.path is not None
    targets = [*trial.path.at(times[1:-1]), trial.exact]
    scales = trial.flow.sde.alpha(times[1:]).tolist()
    for step, alpha, target in zip(solver.plan(trial.flow, times), scales, targets, strict=True):
        x, memory = solver.step(trial.flow, x, step, noise, memory)
        numbers = _least_squares(directions(x / alpha, memory), (target - x) / alpha, ridge)
        x = correct(x, memory, combination(numbers, alpha))
        found.append(numbers)
    return tuple(found), x


def _least_squares(d: Tensor, missed: Tensor, ridge: float) -> tuple[float, ...]:
    """Numbers (k,) for directions (k, B, *D) and what is missed (B, *D)."""
    d, missed = d.flatten(2), missed.flatten(1)
    residual = missed.norm(dim=1)
    w = 1 / (residual + 0.3 * residual.median() + torch.finfo(residual.dtype).tiny)
    weighted = d * (w / w.sum())[:, None]
    with full_precision(d.device.type):
        square = torch.einsum("kbd,lbd->kl", weighted, d).cpu().double()
        moment = torch.einsum("kbd,bd->k", weighted, missed).cpu().double()
    size = square.diagonal().clamp_min(1e-300).sqrt()
    square = square / (size[:, None] * size) + ridge * torch.eye(len(size), dtype=torch.float64)
    return tuple((torch.linalg.solve(square, moment / size) / size).tolist())
