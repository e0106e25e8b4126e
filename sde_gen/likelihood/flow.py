"""The flow of state and log density as one ODE, for any solver, and what a flow starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import grids
from ..ops import Time, act, as_time, batch_of, check_finite, check_state
from ..scores import Score
from ..sdes import SDE, KernelSDE, MatrixSDE, Reverse, ScoreFunction
from ..solvers import Adaptive, Solver
from ..solvers.adaptive import standard
from ..solvers.base import Step
from .probes import forms, trace
from .whitened import check_read

_UNIT = 2.0**40
"""Nats that a divergence which must not choose the steps is counted in; powers of 2 are exact."""

_PARTS = 8
"""Steps that are made at least where the state alone chooses them: it may be at rest."""


class Stepped(NamedTuple):
    """A flow and its grid in the variables in which a solver steps it.

    x is ``first`` times the state at the start of the grid, ``last`` times that at its end; the
    divergence is counted in ``unit``.
    """

    flow: SDE
    times: Tensor
    first: float = 1.0
    last: float = 1.0
    unit: float = 1.0


class Augmented(SDE):
    """The flow of (x, l / unit), dl_k/dt = the estimate of div v(x, t) by probe k, on (B, n + K);
    the exact divergence counts as one."""

    direction = 0

    def __init__(
        self, way: Stepped, shape: tuple[int, ...], signs: Tensor | None, singular: bool
    ) -> None:
        self.way, self.shape, self.signs, self.singular = way, shape, signs, singular
        self.T = float(way.times[-1])
        self.seen = [0]

    def diffusion(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(as_time(t))

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """(v, div v / unit)."""
        n = math.prod(self.shape)
        self.seen[0] += len(x)
        state = x[:, :n].reshape(-1, *self.shape)
        v, pull, *_ = torch.func.vjp(lambda y: self.way.flow.drift(y, t), state)
        if self.signs is None:
            div = trace(pull, state).unsqueeze(1)
        else:
            div = forms(pull, self.signs, x.dtype)
        check_read(x, v, div)
        return torch.cat([v.flatten(1), div / self.way.unit], 1)

    def rows(self, index: slice | Tensor) -> Augmented:
        """The flow of these rows; evaluations are counted together."""
        signs = None if self.signs is None else self.signs[:, index]
        way = self.way._replace(flow=self.way.flow.rows(index))
        part = Augmented(way, self.shape, signs, self.singular)
        part.seen = self.seen
        return part


def check_model(model: Score, x: Tensor, latent: bool = False) -> KernelSDE:
    """The process of the model, after a look at both; of x in the units of the process where it
    is a ``latent``."""
    sde = getattr(model, "sde", None)
    if not isinstance(sde, KernelSDE):
        raise TypeError(
            f"log_prob(model, x) needs a score that knows its process (.sde), got {model!r}"
        )
    check_state(x)
    check_finite(x)
    shape = model.inside if latent else model.shape
    if x.ndim < 2 or (shape is not None and x.shape[1:] != sde.state_shape(shape)):
        wanted = "(B, *D)" if shape is None else batch_of(sde.state_shape(shape))
        raise ValueError(f"x must have shape {wanted}, a row a sample, got {tuple(x.shape)}")
    if model.batch not in (None, len(x)):
        raise ValueError(f"the score is bound for {model.batch} samples, x has {len(x)}")
    return sde


def flow_grid(
    sde: KernelSDE, score: ScoreFunction, times: Tensor | Sequence[float] | None
) -> Tensor:
    """The times of the flow, from the data to T."""
    if times is None:
        start = _default_start(sde) if getattr(score, "singular", True) else 0.0
        start = getattr(score, "end", None) or start
        times = [start, sde.T]
    grid = grids.as_times(times)
    rises = grid[0] >= 0 and bool((grid.diff() > 0).all())
    if not (rises and abs(float(grid[-1]) - sde.T) <= 1e-9 * sde.T):
        raise ValueError(
            f"times must rise from the data to T = {sde.T}, where the law is known, got"
            f" {grid.tolist()}"
        )
    return grid


def _default_start(sde: KernelSDE) -> float:
    """Where a flow starts whose score is singular at 0."""
    if isinstance(sde, MatrixSDE) and sde.added:
        # What is added starts from a narrow law, which noise widens long before it meets the data.
        return sde.T / 10_000
    return grids.default_end(sde)


def carry(sde: KernelSDE, x: Tensor, t: Tensor) -> tuple[Tensor, float]:
    """The mean of x_t given the whole state x at t = 0, and the log volume of that map."""
    if isinstance(sde, MatrixSDE):
        phi = sde.transition(t)
        return act(phi, x), x[0].numel() / sde.size * float(torch.logdet(phi))
    alpha = float(sde.alpha(t))
    return alpha * x, x[0].numel() * math.log(alpha)


def stepped(flow: Reverse, grid: Tensor, solver: Solver, probed: bool) -> Stepped:
    """The variables and times in which a solver steps the flow."""
    if not isinstance(solver, Adaptive):
        return Stepped(flow, grid)
    start, end = float(grid[0]), float(grid[-1])
    tame, way = standard(flow, Step(start, end, None)), Stepped(flow, grid)
    if tame is not None:
        clock = torch.tensor([tame.clock(t) for t in grid.tolist()], dtype=torch.float64)
        way = Stepped(tame, clock, tame.scale(start), tame.scale(end))
    if not probed:
        return way
    if len(grid) == 2:
        even = torch.linspace(0, 1, _PARTS + 1, dtype=torch.float64)
        share = even**2 if tame is None else even
        way = way._replace(times=torch.lerp(way.times[0], way.times[-1], share))
    return way._replace(unit=_UNIT)
