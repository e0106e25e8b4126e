"""Trajectories to fit, to choose and to judge by, and their exact ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..noise import Streams
from ..ops import as_integer, check_count
from ..sampling import default_solver, solve
from ..scores import Score
from ..sdes import LinearSDE, Reverse
from ..solvers import Exponential, Solver
from ..solvers.base import Memory
from ..solvers.weights import lagrange

FINE = 64
"""Steps of a reference, at least: four times the largest number that is tuned for."""
ROWS = 5
"""Trajectories in all sets, over n."""


@dataclass(frozen=True)
class Path:
    """Exact states between T and the end, at any time: cubics through the nearest of many nodes.

    Kept in single precision as z = x / sqrt(alpha^2 v + sigma^2), v the variance of the data,
    which is of order one all along, and a smooth function of lambda = log(alpha / sigma).
    """

    sde: LinearSDE
    v: float
    lam: Tensor
    z: Tensor

    @classmethod
    def through(cls, sde: LinearSDE, v: float, times: Tensor, states: Sequence[Tensor]) -> Path:
        """Through the states (n, *D) at these falling times."""
        made = cls(sde, v, 0.5 * sde.log_snr(times), torch.empty(0))
        z = torch.stack([x.float() / r for x, r in zip(states, made.size(times), strict=True)])
        finite = made.lam.isfinite()
        return cls(sde, v, made.lam[finite], z[finite.to(z.device)])

    def size(self, times: Tensor) -> list[float]:
        """sqrt(alpha^2 v + sigma^2)."""
        alpha, sigma = self.sde.alpha(times), self.sde.sigma(times)
        size: list[float] = torch.sqrt(alpha**2 * self.v + sigma**2).tolist()
        return size

    def at(self, times: Tensor) -> list[Tensor]:
        """The states at some times, (n, *D) each."""
        lam, found = 0.5 * self.sde.log_snr(times), []
        first = (torch.searchsorted(self.lam, lam) - 2).clamp(0, len(self.lam) - 4)
        for i, u, size in zip(first.tolist(), lam.tolist(), self.size(times), strict=True):
            weights = lagrange(self.lam[i : i + 4].numpy(), np.array([u]))[:, 0]
            near = zip(weights.tolist(), self.z[i : i + 4], strict=True)
            found.append(sum((w * size * z for w, z in near), torch.zeros_like(self.z[0])))
        return found


@dataclass(frozen=True)
class Trial:
    """Starting points (n, *D) at T, the flow that moves them, where it takes them, and how."""

    flow: Reverse
    x: Tensor
    exact: Tensor
    path: Path | None = None

    @property
    def sde(self) -> LinearSDE:
        """The process of the flow."""
        sde = self.flow.sde
        assert isinstance(sde, LinearSDE)
        return sde

    def part(self, m: int) -> Trial:
        """The first m of the trajectories, without a path."""
        rows = slice(0, m)
        return Trial(self.flow.rows(rows), self.x[rows], self.exact[rows])

    def errors(self, y: Tensor) -> Tensor:
        """log RMSE of each trajectory, float64 (n,) on the CPU; no less than the exact ends are
        known to, so that of two solvers without error neither wins."""
        floor = torch.finfo(y.dtype).eps ** (2 / 3) * float(self.exact.square().mean().sqrt())
        rms = (y - self.exact).flatten(1).square().mean(1).sqrt().cpu().double()
        return torch.log(rms.clamp_min(floor))


def typical_error(logs: Tensor) -> float:
    """log of an error of one run: half way between the geometric and the arithmetic mean.

    The mean square would be decided by the few trajectories that end in another mode, of which a
    set has too few to fit anything to; the geometric mean would hardly see them.
    """
    mean = float(torch.logsumexp(logs, 0)) - math.log(len(logs))
    return (mean + float(logs.mean())) / 2


def by_chance(gain: Tensor) -> float:
    """P(as low a sum of signed ranks) if the gains, of log errors, were as often above 0 as below
    by as much (Wilcoxon 1945)."""
    from scipy.stats import wilcoxon

    values = gain.numpy()
    return float(wilcoxon(values, alternative="less").pvalue) if values.any() else 1.0


def checked(model: Score, solver: object, steps: int | Sequence[int], n: int) -> tuple[int, ...]:
    """The numbers of steps in order; raises as ``tune_grid`` says."""
    if not isinstance(getattr(model, "sde", None), LinearSDE) or model.shape is None:
        raise TypeError("model must be a score that knows its linear process and data shape")
    if solver is not None and not isinstance(solver, Exponential):
        raise TypeError(f"solver must be an Exponential, got {type(solver).__name__}")
    check_count(n, "n", 8)  # The signed-rank test needs them.
    bound = getattr(model, "batch", None)
    if bound not in (None, ROWS * n):
        raise ValueError(f"bind {ROWS * n} rows to the model, {ROWS} n; got {bound}")
    wanted = [check_count(k, "steps", 2) for k in _each(steps)]
    if not wanted:
        raise ValueError("steps must be one or more integers >= 2, got none")
    return tuple(sorted(set(wanted)))


def _each(steps: object) -> tuple[object, ...]:
    many = isinstance(steps, Iterable) and as_integer(steps) is None
    many = many and not isinstance(steps, str | bytes)
    return tuple(steps) if many else (steps,)  # type: ignore[arg-type]


def affordable(model: Score, n: int, minutes: float, each: int) -> int:
    """n, or as many trajectories (8 or more) as ``minutes`` pay for, each of so many
    evaluations: by the time of a call on 8 rows."""
    sde, rows = model.sde, 8
    assert isinstance(sde, LinearSDE)
    assert model.shape is not None
    blank = torch.empty(rows, *model.shape, dtype=as_trial(model), device=model.device)
    flow = sde.probability_flow(model.rows(slice(0, rows)))
    x, t = Streams(0).start(blank), torch.as_tensor(sde.T / 2)
    seconds = []
    for _ in range(3):  # the first warms up
        began = perf_counter()
        float(flow.evaluate(x, t).score.sum())  # which waits for a device
        seconds.append(perf_counter() - began)
    return max(8, min(n, int(60 * minutes / (min(seconds) / rows * each))))


def as_trial(model: Score) -> torch.dtype:
    """What trajectories are kept in."""
    return torch.float32 if model.device.type == "mps" else torch.float64


def trials(
    model: Score, end: float, n: int, seed: int, most: int, path: bool = False
) -> list[Trial]:
    """Disjoint sets of n, n and 3 n trajectories from T to ``end``, the last cheap to use and so
    the larger; of the first also the ``path``."""
    sde, shape = model.sde, model.inside
    assert isinstance(sde, LinearSDE)
    assert shape is not None
    blank = torch.empty(ROWS * n, *shape, dtype=as_trial(model), device=model.device)
    x = float(sde.sigma(sde.T)) * Streams(seed).start(blank)
    times = grids.default(sde, max(FINE, 4 * most), end=end, data_std=model.facts.std)
    made = []
    for i, j in pairwise((0, n, 2 * n, ROWS * n)):
        part = slice(i, j)
        flow = sde.probability_flow(model.rows(part))
        if path and i == 0:
            there = [x[part], *states(flow, x[part], times, reference(model), every=1)]
            known = Path.through(sde, model.facts.std**2 or 1.0, times, there)
            made.append(Trial(flow, x[part], there[-1], known))
            continue
        made.append(Trial(flow, x[part], solve(flow, x[part], times, reference(model), 0)))
    return made


def reference(model: Score) -> Exponential:
    """What solves the flow to a fraction of the error that any tuned solver leaves."""
    known = model.facts.std**2 if model.facts.moments is None else model.facts.moments
    return Exponential(3, known, corrector=True)


def states(
    flow: Reverse, x: Tensor, times: Tensor, solver: Solver, every: int | None = None
) -> list[Tensor]:
    """The state after every so many steps of a run (after all of them, by default)."""
    plan, noise, kept = solver.plan(flow, times), Streams(0), []
    memory: Memory = ()
    for i, step in enumerate(plan, 1):
        x, memory = solver.step(flow, x, step, noise, memory)
        if i % (every or len(plan)) == 0:
            kept.append(x)
    return kept


def base_solver(model: Score) -> Exponential:
    """The default solver of a flow, before any tuning."""
    solver = default_solver(model)
    assert isinstance(solver, Exponential)
    return solver
