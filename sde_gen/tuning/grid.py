"""Fitting a time grid to one score."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..scores import Score
from ..solvers import Exponential
from .search import tune
from .tuned import Tuned


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

    Lengths of all steps, for each number of steps, such that the error at the end is least: by
    trial (``search``), then by Gauss and Newton (``polish``). Three disjoint sets of n, n and 3 n
    trajectories: one to fit, one to choose between what was found on the way, one to judge. What
    does not beat the default on the last, trajectory by trajectory (one-sided signed-rank test at
    5 % for each number of steps), is dropped for the default: ``print`` the result to see.

    The solver knows the data's standard deviation or their covariance, whichever is better on
    the first set; what ``data`` and ``model.facts.moments`` do not tell is read off the score.

    Costs at most n (5 max(64, 4 max(steps)) + 20 steps[0] + 50 sum(steps) + sum(steps^2))
    evaluations of the score: 0.3 million by default, two minutes for the U-Net of the demo on one
    CPU core. In few dimensions sum(steps^2) counts up to three times.

    Args:
        model: a score that knows its linear process and shape. Where labels are bound per
            sample, bind 5 n of them: n, n and 3 n for the sets.
        solver: the solver that will use the grid; by default the default one.
        steps: the numbers of calls that will be made. For others the nearest serves.
        n: trajectories that are fitted to, and a fifth of all.
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
    return tune(model, solver, steps, n, end, data, seed, minutes, numbers=False)
