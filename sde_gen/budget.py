"""Where the error of a sampler comes from.

Between what a sampler draws and the data lie three errors, each of which can be taken away while
the others stay:

- *discretisation*: few steps where the flow of the model's score asks for many. Same model, same
  start, against that flow solved finely.
- *score*: the model's score is not that of the data. Same start, both flows solved finely.
- *prior*: runs start from N(0, sigma_T^2) or what ``sample`` takes, not from the law p_T of noised
  data. Same score, both starts.

Where the exact score is known the errors are distances between paths from one start. Where only
data are at hand, a flow cannot be compared path by path; then samples are compared with real ones
by a distance between laws, and each error is what the distance rises by when it is let in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from . import grids
from .likelihood import Estimate
from .metrics import energy_distance
from .moments import Moments, data_moments
from .noise import Streams
from .ops import as_numbers, as_real, check_count, check_finite, check_state
from .sampling import default_solver, solve, starting
from .scores import Score
from .sdes import KernelSDE, LinearSDE, ScoreFunction
from .solvers import Exponential, Solver

_BLOCKS = 10
"""Parts of the samples that are left out in turn, for the error bars of a distance."""

__all__ = ["Budget", "error_budget"]


@dataclass(frozen=True)
class Budget:
    """The error of a sampler and its parts: ``discretisation``, ``score`` and ``prior``, as the
    module says, and what they come to.

    Attributes:
        total: of the sampler as it is used: at most the sum of the three where paths are
            compared; floor + score + prior + discretisation where laws are.
        floor: the distance of as many real samples, where laws are compared; None otherwise.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.error_budget(law, law, steps=5, n=16, fine=32).score.value.shape
    torch.Size([])
    """

    discretisation: Estimate
    score: Estimate
    prior: Estimate
    total: Estimate
    floor: Estimate | None = None

    def __str__(self) -> str:
        parts = ("discretisation", "score", "prior", "floor", "total")
        terms = [(name, getattr(self, name)) for name in parts]
        return "\n".join(f"{name:15}{term}" for name, term in terms if term is not None)


def error_budget(
    model: Score,
    law: Score | Tensor | ArrayLike,
    steps: int = 25,
    *,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
    n: int = 512,
    seed: int = 0,
    fine: int = 256,
    real: Tensor | ArrayLike | None = None,
    distance: Callable[[Tensor, Tensor], float] = energy_distance,
) -> Budget:
    """Tell the errors of steps, score and prior apart, for the probability flow of a model.

    Compared is x / alpha at the last positive time of the grid: what ``sample`` has before its
    last step to t = 0.

    With an exact score, terms are root mean squares over trajectories and coordinates, in the
    units of the data. The prior's is that of the starts that match mean and covariance of p_T
    against those taken, with the same normal numbers and under the exact flow: for Gaussian data
    the Wasserstein-2 distance that it leaves; higher moments of p_T are not counted (they shrink
    like (alpha / sigma)^3).

    With data, terms are rises of ``distance`` to ``real``: from noised data along the model's
    flow solved finely, from the sampler's start, with the sampler's steps. An unbiased distance
    may fall. Standard errors are those over drawn samples (jackknife over 10 blocks), not over
    ``real``.

    Args:
        model: a score that knows its linear process and shape; bind labels for n samples.
        law: the exact score of the same process, or data (n, *D) in the order of the labels, a
            tensor, an array or lists.
        steps: calls of ``sample(model, n, steps)``.
        solver, times: those of ``sample`` by default; a last time of 0 is left away.
        n: trajectories; with data there are as many as data.
        seed: of the starts, and of a solver's noise.
        fine: steps of the flows that are solved finely (order 4).
        real: real samples (M, *D) to compare with, others than ``law``; needed with data.
        distance: (x, y) -> float, with data.

    Raises:
        TypeError: a score that does not know its process or shape, an exact score that knows
            neither its moments nor how to sample, or data that are not floating point.
        ValueError: a law of another process or shape, or data without ``real``.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> budget = sg.error_budget(law, law, steps=5, n=16, fine=32)
    """
    sde, shape = getattr(model, "sde", None), getattr(model, "shape", None)
    if not isinstance(sde, LinearSDE) or shape is None:
        raise TypeError("error_budget needs a score that knows its linear process and data shape")
    if not isinstance(law, Score):
        law = as_numbers(law, "law (an exact score, or data)")
    if solver is None:
        tuned = model.tuned if times is None else None
        solver = default_solver(model) if tuned is None else tuned
    if times is None:
        grid = solver.grid or partial(grids.default, data_std=model.facts.std)
        times = grid(sde, 1 if solver.own_steps else steps, to_zero=not solver.evaluates_end)
    times = as_real(times, "times")
    runs = _Runs(sde, model, times[times > 0], check_count(fine, "fine"), Streams(seed))
    if isinstance(law, Tensor):
        others = None if real is None else as_numbers(real, "real")
        return _between_laws(runs, law, others, distance, solver)
    return _along_paths(runs, law, solver, runs.normal(check_count(n, "n"), shape))


@dataclass(frozen=True)
class _Runs:
    """Flows from times[0] to times[-1], as x / alpha there."""

    sde: LinearSDE
    model: Score
    times: Tensor
    fine: int
    noise: Streams

    def normal(self, n: int, shape: tuple[int, ...]) -> Tensor:
        device = self.model.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return self.noise.start(torch.empty(n, *shape, dtype=dtype, device=device))

    def start(self, moments: Moments | None, z: Tensor) -> Tensor:
        return starting(self.sde, moments, float(self.times[0]), z)

    def steps(self, x: Tensor, solver: Solver) -> Tensor:
        return self._solve(self.model, x, self.times, solver)

    def exact(self, score: ScoreFunction, x: Tensor) -> Tensor:
        """Solved finely; the variance only makes it converge sooner."""
        first, last = float(self.times[0]), float(self.times[-1])
        std = self.model.facts.std
        times = grids.default(self.sde, self.fine, first, last, data_std=std)
        return self._solve(score, x, times, Exponential(3, std**2, corrector=True))

    def _solve(self, score: ScoreFunction, x: Tensor, times: Tensor, solver: Solver) -> Tensor:
        with torch.no_grad():
            y = solve(self.sde.probability_flow(score), x, times, solver, self.noise)
        return y / float(self.sde.alpha(times[-1]))


def _along_paths(runs: _Runs, law: Score, solver: Solver, z: Tensor) -> Budget:
    same = isinstance(law.sde, KernelSDE) and runs.sde.agrees(law.sde)
    if not same or law.shape != runs.model.shape:
        raise ValueError(
            f"the exact score must be that of {runs.sde!r} in shape {runs.model.shape},"
            f" got {law.sde!r} in {law.shape}"
        )
    taken = runs.start(runs.model.facts.moments, z)
    sampled, model = runs.steps(taken, solver), runs.exact(runs.model, taken)
    exact, true = runs.exact(law, taken), runs.exact(law, runs.start(_moments(law), z))
    return Budget(
        discretisation=_rms(sampled - model),
        score=_rms(model - exact),
        prior=_rms(exact - true),
        total=_rms(sampled - true),
    )


def _moments(law: Score) -> Moments:
    if law.facts.moments is not None:
        return law.facts.moments
    draw = getattr(law, "sample", None)
    if draw is None:
        raise TypeError(f"{type(law).__name__} knows neither its moments nor how to sample")
    return data_moments(draw(20_000, torch.Generator().manual_seed(0)))


def _rms(difference: Tensor) -> Estimate:
    """Root mean square over all entries, and its standard error by the delta method."""
    square = Estimate.of(difference.flatten(1).square().mean(1).cpu().double())
    rms = square.value.sqrt()
    spread = square.spread / (2 * rms) if rms > 0 else torch.zeros_like(rms)
    return Estimate(rms, spread, torch.zeros_like(rms))


def _between_laws(
    runs: _Runs,
    data: Tensor,
    real: Tensor | None,
    distance: Callable[[Tensor, Tensor], float],
    solver: Solver,
) -> Budget:
    check_state(data, "law (data)")
    check_finite(data, "law (data)")
    model = runs.model
    if real is None or real.shape[1:] != data.shape[1:] or data.shape[1:] != model.shape:
        raise ValueError(
            f"data and real samples must both have shape (N, *{model.shape}), got"
            f" {tuple(data.shape)} and {None if real is None else tuple(real.shape)}"
        )
    z = runs.normal(len(data), tuple(data.shape[1:]))
    alpha, sigma = (float(f(runs.times[0])) for f in (runs.sde.alpha, runs.sde.sigma))
    x = data.to(z)
    taken = runs.start(model.facts.moments, z)
    # The noise of the noised data is that of the start: what differs is the data in it.
    rungs = [
        x,
        runs.exact(model, alpha * x + sigma * z),
        runs.exact(model, taken),
        runs.steps(taken, solver),
    ]
    against = real.to(z)

    def distances(keep: Tensor) -> Tensor:
        return torch.tensor([distance(r[keep], against) for r in rungs], dtype=torch.float64)

    parts = torch.arange(len(x)) % min(_BLOCKS, len(x))
    whole = distances(parts >= 0)
    less = torch.stack([distances(parts != k) for k in range(int(parts.max()) + 1)])
    rises, rises_less = whole.diff(), less.diff(dim=1)
    return Budget(
        discretisation=_jackknife(rises[2], rises_less[:, 2]),
        score=_jackknife(rises[0], rises_less[:, 0]),
        prior=_jackknife(rises[1], rises_less[:, 1]),
        total=_jackknife(whole[3], less[:, 3]),
        floor=_jackknife(whole[0], less[:, 0]),
    )


def _jackknife(whole: Tensor, less: Tensor) -> Estimate:
    """A statistic and its standard error from those without one block each (Quenouille, Tukey)."""
    k = len(less)
    variance = (k - 1) / k * (less - less.mean()).square().sum()
    return Estimate(whole, variance.sqrt(), torch.zeros_like(whole))
