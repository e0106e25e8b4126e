"""Numbers of each step, by least squares, while the solver walks its grid.

After each step the states y are moved along the directions that the solver's memory spans
(``directions``) to where the exact flow is (``Path``), as well as one set of numbers for all
trajectories can:

    min over c   sum_b w_b ( |y_b + sum_k c_k d_(k, b) - y*_b|^2 + r sum_k c_k^2 |d_(k, b)|^2 ).

The next step is fitted to the states that this leaves. Weights w = 1 / (residual + 0.3 median)
keep the few trajectories that end in another mode from deciding; the ridge r draws the solver
back to the one that it was, which c = 0 is. A fit costs no more evaluations than a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import Streams
from ..ops import full_precision
from ..solvers import Exponential
from .trials import Trial
from .tuned import Numbers, combination, correct, directions


def fit(trial: Trial, solver: Exponential, times: Tensor, ridge: float) -> tuple[Numbers, Tensor]:
    """Numbers for every step, and where the walk comes to."""
    x, noise, found = trial.x, Streams(0), []
    memory: tuple[Tensor, ...] = ()
    assert trial.path is not None
    targets = [*trial.path.at(times[1:-1]), trial.exact]
    scales = trial.sde.alpha(times[1:]).tolist()
    for step, alpha, target in zip(solver.plan(trial.flow, times), scales, targets, strict=True):
        x, memory = solver.step(trial.flow, x, step, noise, memory)
        numbers = least_squares(directions(x / alpha, memory), (target - x) / alpha, ridge)
        x = correct(x, memory, combination(numbers, alpha))
        found.append(numbers)
    return tuple(found), x


def least_squares(d: Tensor, missed: Tensor, ridge: float) -> tuple[float, ...]:
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
