"""Fitting a solver to one score: its grid, and a few numbers a step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..scores import Score
from ..solvers import Exponential
from .search import tune
from .tuned import Tuned


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

    Does what ``tune_grid`` does, and gives each step as many numbers as the solver remembers
    values (four, for the default one), for each number of calls in ``steps``: first step by step,
    by least squares (``numbers``), then all of them and the grid together, for the error at the
    end (``polish``). Three disjoint sets of n, n and 3 n trajectories fit, choose (how far to go)
    and judge; what does not beat the default on the last (one-sided signed-rank test at 5 %) is
    not returned. ``print`` the result to see what was taken and what it gains. Numbers serve the
    number of calls and the grid that they were fitted on: for others the nearest grid is taken,
    and the solver without numbers.

    Costs the evaluations of ``tune_grid`` and some 2 n sum(steps^2) more, in few dimensions up to
    8 n: 0.8 million by default, some four minutes for the U-Net of the demo on one CPU core;
    ``minutes`` takes fewer trajectories. Memory: n max(64, 4 max(steps)) states in single
    precision, and derivatives of a quarter of the ends by 5 max(steps) numbers, or of as many as
    fit in a quarter of a gigabyte, three times over.

    Args:
        model: a score that knows its linear process and shape. Where labels are bound per
            sample, bind 5 n of them: n, n and 3 n for the sets.
        solver: to start from, with a finite reference and a memory (order >= 2 or corrector); by
            default the default one.
        steps: the numbers of calls that will be made.
        n: trajectories that are fitted to; fewer than 256 fit the few that are rare.
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

    return tune(model, solver, steps, n, end, data, seed, minutes, numbers=True)
