"""A time grid fitted to one score.

A step of a method of order q leaves an error c(lambda) h^(q + 1), where c is the size of the q-th
derivative of what the method interpolates, times what the rest of the flow makes of it. For a
given number of steps the sum of c h^q is least when nodes have density c^(1 / (q + 1))
(equidistribution, de Boor 1974). One pilot run shows c; one density then serves every number of
steps. What the theory proposes is judged on trajectories that it has not seen, and is returned
only if it wins there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import grids
from ..grids import Density
from ..noise import Streams
from ..ops import Time
from ..sampling import default_solver, solve
from ..scores import Score
from ..sdes import LinearSDE
from ..solvers import Exponential

Grid = Callable[..., Tensor]


@dataclass(frozen=True)
class Tuned:
    """What ``tune_grid`` found.

    Attributes:
        grid: ``grid(sde, steps, start, end, to_zero=...)``, as in ``grids``.
        name: which candidate it is; ``"mixed"`` is the default.
        ratio: its error / the default's on the trajectories of the last set (geometric mean).
        p_value: of the sign test that it is no better than the default there.
    """

    grid: Grid
    name: str
    ratio: float
    p_value: float


class _Recorder(Score):
    """A score that remembers the states it was asked at and its answers."""

    def __init__(self, score: Score) -> None:
        self.score, self.sde = score, score.sde
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        s = self.score(x, t)
        self.seen.append((x, s))
        return s


def tune_grid(
    model: Score,
    solver: Exponential | None = None,
    *,
    steps: tuple[int, ...] = (8, 16),
    n: int = 64,
    end: float | None = None,
    seed: int = 0,
) -> Tuned:
    """Fit a time grid to a score, for the probability flow.

    Three disjoint sets of n trajectories: one to fit the density of the local error, one to
    choose between candidates, one to judge the choice against the default grid. A choice that
    does not win there (one-sided sign test at 5 %) is dropped for the default, and ``name`` says
    so. Costs about 3 n x 128 evaluations of the score for the references, and as many again.

    Args:
        model: a score that knows its linear process and shape; float64 states.
        solver: the solver that will use the grid; ``default_solver(model)`` by default.
        steps: numbers of steps that candidates are compared at.
        n: trajectories in each set.
        end: last time of the grids; the default of ``grids``.
        seed: of the trajectories.

    Raises:
        TypeError: the model does not know its process or shape, or the solver is not an
            ``Exponential``.
    """
    sde, shape = model.sde, model.shape
    if not isinstance(sde, LinearSDE) or shape is None:
        raise TypeError("tune_grid needs a score that knows its linear process and data shape")
    solver = default_solver(model) if solver is None else solver  # type: ignore[assignment]
    if not isinstance(solver, Exponential):
        raise TypeError(f"tune_grid fits Exponential solvers, got {type(solver).__name__}")
    end = grids.default_end(sde) if end is None else end
    dtype = torch.float32 if model.device.type == "mps" else torch.float64
    blank = torch.empty(3 * n, *shape, dtype=dtype, device=model.device)
    x = float(sde.sigma(sde.T)) * Streams(seed).start(blank)
    with torch.no_grad():
        return _tune(model, sde, solver, steps, end, list(x.split(n)))


def _tune(
    model: Score,
    sde: LinearSDE,
    solver: Exponential,
    steps: tuple[int, ...],
    end: float,
    sets: list[Tensor],
) -> Tuned:
    default = partial(grids.mixed, data_std=model.data_std)
    flow = sde.probability_flow(model)
    fit, choose, judge = sets
    candidates: dict[str, Grid] = {"log_snr": grids.log_snr, "quadratic": grids.quadratic}
    for q in (2, 3):
        density = _density(model, sde, solver, q, end, fit)
        candidates[f"density, order {q}"] = density
        candidates[f"density, order {q}, and mixed"] = _average(density, default, sde, end)

    def errors(grid: Grid, x: Tensor, exact: Tensor) -> Tensor:
        """log RMSE of each trajectory, mean over ``steps``."""
        runs = [solve(flow, x, grid(sde, k, end=end), solver) - exact for k in steps]
        rms = torch.stack([r.flatten(1).square().mean(1).sqrt() for r in runs])
        return torch.log(rms.clamp_min(1e-12)).mean(0)

    fine = Exponential(3, solver.reference, corrector=True)
    exact = [solve(flow, x, default(sde, 128, end=end), fine) for x in (choose, judge)]
    base = errors(default, choose, exact[0])
    scores = {name: _robust(errors(g, choose, exact[0]) - base) for name, g in candidates.items()}
    name = min(scores, key=lambda k: scores[k])
    gain = errors(candidates[name], judge, exact[1]) - errors(default, judge, exact[1])
    ratio, p = math.exp(float(gain.mean())), _sign_test(int((gain < 0).sum()), len(gain))
    if scores[name] < 0 and ratio < 1 and p < 0.05:
        return Tuned(candidates[name], name, ratio, p)
    return Tuned(default, "mixed", 1.0, p)


def _robust(change: Tensor) -> float:
    """Mean and median together: one trajectory that flips its mode must not decide."""
    return float(change.mean() + change.median()) / 2


def _sign_test(wins: int, n: int) -> float:
    """P(at least this many wins of n fair coins)."""
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


def _density(
    model: Score, sde: LinearSDE, solver: Exponential, q: int, end: float, x: Tensor
) -> Density:
    """Nodes of density c^(1 / (q + 1)), from a pilot of 64 steps even in lambda."""
    times = grids.log_snr(sde, 64, end=end)
    recorder = _Recorder(model)
    solve(sde.probability_flow(recorder), x, times, Exponential(3, solver.reference))
    lam, w = sde.log_snr(times[:-1]) / 2, torch.exp(-sde.log_snr(times[:-1]))
    alpha, ref = sde.alpha(times[:-1]), solver.reference
    c, v = ref.values.numpy(), model.data_std**2
    f = ref.coefficient
    values = [
        ref.apply((f(0 * c + 1 / float(a)), f((c + float(w_i)) * float(a))), (x_i, s_i))
        for a, w_i, (x_i, s_i) in zip(alpha, w, recorder.seen, strict=True)
    ]
    rough = torch.stack(
        [(d**2).flatten(1).sum(1).mean() for d in torch.stack(values).diff(n=q, dim=0)]
    )
    size = torch.nn.functional.pad(
        rough.sqrt().cpu().double()[None], (q // 2, q - q // 2), "replicate"
    )[0]
    # What a unit of error in Q does to y, and the rest of the flow to it, for Gaussian data.
    size = size * w / (v + w) * torch.sqrt(v / (v + w))
    smooth = torch.nn.functional.avg_pool1d(
        torch.nn.functional.pad(size[None], (2, 2), "replicate"), 5, 1
    )[0]
    rho = smooth ** (1 / (q + 1))
    rho = rho + 0.02 * rho.max()
    edge = torch.cat([lam, lam[-1:] + (lam[1] - lam[0])])
    share = torch.cat([rho.new_zeros(1), rho.cumsum(0)])
    return Density(-edge, share / share[-1])


def _average(a: Grid, b: Grid, sde: LinearSDE, end: float) -> Density:
    """Half the steps of one grid and half of the other: the nodes of both, in order."""
    logs = [-0.5 * sde.log_snr(g(sde, 2000, end=end)) for g in (a, b)]
    both = torch.cat(logs).sort(descending=True).values
    keep = torch.cat([both.diff() < -1e-9, torch.tensor([True])])
    return Density(both[keep], torch.linspace(0, 1, len(both), dtype=torch.float64)[keep])
