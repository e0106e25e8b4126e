"""Whether steps are short enough for the noise of a process, tried on Gaussian data.

A reversal of noise level eta pulls a state to the data (1 + eta^2) times as fast as the flow does.
A step that is long beside that throws it to the other side, farther out than it was, and a run of
such steps explodes. ``Exponential`` and ``Propagator`` bound their noise, the others are tried: on
data N(0, v) every step is affine and the right result is known, so the steps of a plan are made on
such data first, whose score costs nothing: on data as wide as those at hand, and as narrow as
modes in them may be.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..facts import facts_of
from ..noise import Noise
from ..ops import Time, act, as_time, cholesky, square
from ..sdes import SDE, Evaluation, KernelSDE, Reverse
from .base import Memory, Solver, Step
from .multistep import Multistep

_WIDTHS = (1 / 20, 1 / 5, 1.0)
"""Spreads of modes, relative to that of the data."""
_MOST = 2.0
"""What a run may end with, in spreads of the data; the exact law has 1 or less."""
_NUMBERS = 256


class _Normals(Noise):
    """Normals of a generator, in the order of the questions."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    def start(self, x: Tensor) -> Tensor:
        return self(x, 0.0, 0.0)

    def rows(self, index: slice | Tensor) -> _Normals:
        return self


def too_long(process: SDE, solver: Solver, plan: list[Step[Any]], x: Tensor) -> str:
    """What to warn of where the steps of a plan explode on Gaussian data, if noise is added to
    states like x; "" where nothing is wrong.

    Nothing is known of a process that is no reversal of a linear one, nor is anything asked of a
    solver that chooses its own steps.
    """
    if solver.own_steps or not (
        isinstance(process, Reverse) and isinstance(process.sde, KernelSDE)
    ):
        return ""
    eta = max(process.eta, getattr(solver, "eta", 0.0))
    if eta == 0 or (ratio := spread(process, solver, plan, x)) <= _MOST:
        return ""
    return (
        f"the steps are too long for eta = {eta:g}: in these {len(plan)} steps"
        f" {type(solver).__name__} spreads Gaussian data {ratio:.3g} times as far as they lie;"
        " take more steps, a smaller eta or Exponential(1), for which no step is too long"
    )


def spread(process: Reverse, solver: Solver, plan: list[Step], x: Tensor) -> float:
    """The root mean square that Gaussian data end with, in units of the spread of the data."""
    assert isinstance(process.sde, KernelSDE)
    sde: KernelSDE = process.sde
    std = facts_of(process.score).std
    each = -(-_NUMBERS // x[0].numel())

    def law(t: Time) -> Tensor:
        """Covariances at time t for data of each width, (3,) or (3, k, k)."""
        a, s = square(sde.alpha(t)), square(sde.sigma(t))
        return torch.stack([v**2 * a + s for v in (r * std for r in _WIDTHS)])

    class Trial:
        """The score of all, and what it takes the data for."""

        def __call__(self, y: Tensor, t: Time) -> Tensor:
            c = law(as_time(t))
            inverse = 1 / c if c.ndim == 1 else torch.linalg.inv(c)
            return act(-inverse.repeat_interleave(each, 0), y)

        def evaluate(self, y: Tensor, t: Time) -> Evaluation:
            def denoised() -> Tensor:  # asked for where coefficients are numbers
                v = law(0.0) * sde.alpha(t) / law(as_time(t))
                return act(v.repeat_interleave(each, 0), y)

            return Evaluation(self(y, t), denoised)

    if isinstance(solver, Multistep) and solver.spread is not None:
        # What it reads off a network no trial can tell: the spread that the grid gives is tried.
        solver = copy(solver)
        solver.spread = None
    trial, noise = Reverse(sde, Trial(), process.eta), _Normals()
    with torch.no_grad():
        # On the host, wherever x is: so few numbers would only keep a GPU waiting.
        y = noise.start(torch.empty(len(_WIDTHS) * each, *x.shape[1:], dtype=torch.float64))
        y = act(_root(law(plan[0].t)).repeat_interleave(each, 0), y)
        memory: Memory = ()
        for step in plan:
            y, memory = solver.step(trial, y, step, noise, memory)
        end = _root(law(plan[-1].s)[-1])
        z = act(1 / end if end.ndim == 0 else torch.linalg.inv(end), y)
    return float(z.reshape(len(_WIDTHS), -1).square().mean(1).max().sqrt())


def _root(c: Tensor) -> Tensor:
    return c.sqrt() if c.ndim < 2 else cholesky(c)
