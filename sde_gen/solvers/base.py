"""What a solver is.

A solver knows how to make one step. What depends on the grid alone it computes once, before the
loop, in ``plan``; ``step`` then does the arithmetic that depends on the state. It keeps no state
of its own: the memory of a multistep method goes in and comes out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..noise import Noise
from ..ops import Time, act, as_time, on_host
from ..sdes import SDE, KernelSDE, LinearSDE, Reverse

N = TypeVar("N", covariant=True)
Memory = tuple[Tensor, ...]

Gain = float | Tensor
"""What a normal is multiplied by in one step: a number, or a matrix (k, k)."""


@dataclass(frozen=True, slots=True)
class Step(Generic[N]):
    """One interval of the grid, from t to s, with the solver's numbers for it.

    >>> sg.solvers.Step(1.0, 0.75, ()).h
    -0.25
    """

    t: float
    s: float
    numbers: N

    @property
    def h(self) -> float:
        """s - t: negative when time falls."""
        return self.s - self.t


class Solver(ABC):
    """One step of a process from t to s.

    Attributes:
        order: order of convergence on an ODE, in the step of the grid.
        weak: order of convergence in law on an SDE, None where it takes ODEs only.
        strong: order of convergence of paths on an SDE with additive noise.
        calls: evaluations of the score in a step.
        start_calls: evaluations more in the first step of a flow that starts inside (0, T).
        draws: how many normals a step may draw: k = 0 .. draws - 1. What draws more on top of
            another solver's step numbers its own from there.
        multistep: whether a step reads what earlier steps have left in the memory.
        evaluates_end: whether a step evaluates the score at its end s.
        reaches_zero: whether it does not at t = 0, where the score cannot be read there.
        own_steps: whether it cuts an interval of the grid into steps by itself, so that a grid
            is only the times at which states are wanted.
        takes_infinite: whether it steps from where alpha = 0 and the coefficients are infinite.
        grid: the grid that it was made for, called as those of ``grids``; None where any serves.

    >>> sg.Heun().calls, sg.Heun().order
    (2, 2)
    """

    order: int
    weak: int | None = None
    strong: float | None = None
    calls: int = 1
    start_calls: int = 0
    draws: int = 8
    multistep: bool = False
    evaluates_end: bool = False
    reaches_zero: bool = False
    own_steps: bool = False
    takes_infinite: bool = False
    grid: Callable[..., Tensor] | None = None

    def check(self, process: SDE) -> None:  # noqa: B027 (most solvers take every process)
        """Raise TypeError unless the solver can step this process."""

    def plan(self, process: SDE, times: Tensor) -> list[Step[Any]]:
        """The steps of a grid, with whatever depends on the grid alone."""
        return [Step(t, s, None) for t, s in pairwise(times.tolist())]

    @abstractmethod
    def step(
        self, process: SDE, x: Tensor, step: Step[Any], noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """The state at ``step.s`` from the state x (B, *D) at ``step.t``.

        The first step of a run gets an empty memory.
        """


def gains(c: Tensor) -> list[Gain | None]:
    """A coefficient for each step, (N,) or (N, k, k), from a plan; None where it is zero."""
    if c.ndim == 1:
        return [g or None for g in c.tolist()]
    return [g if bool(g.any()) else None for g in c]


def times_each(c: Tensor, h: Tensor) -> Tensor:
    """c h, a number of h (N,) for each coefficient of c, (N,) or (N, k, k)."""
    return c * h.reshape(-1, *(1,) * (c.ndim - 1))


def kick(x: Tensor, z: Tensor, g: Gain) -> Tensor:
    """x + g z."""
    return x + act(g, z) if isinstance(g, Tensor) else x.add(z, alpha=g)


def require_ode(solver: Solver, process: SDE) -> None:
    """Raise TypeError unless the process is an ODE (a probability flow)."""
    if process.direction != 0:
        raise TypeError(
            f"{type(solver).__name__} solves ODEs: it needs a probability flow"
            f" (Reverse with eta = 0), got {describe(process)}"
        )


def reversal(solver: Solver, process: SDE) -> tuple[Reverse, LinearSDE]:
    """The process as the reversal of a ``LinearSDE``, and that.

    Raises:
        TypeError: it is none.
    """
    if isinstance(process, Reverse) and isinstance(process.sde, LinearSDE):
        return process, process.sde
    matrix = isinstance(getattr(process, "sde", None), KernelSDE)
    raise TypeError(
        f"{type(solver).__name__} needs the reversal of a LinearSDE, sde.reverse(score, eta) or"
        f" sde.probability_flow(score); got {describe(process)}"
        + (", whose coefficients are matrices: take Propagator, Heun or SRA" if matrix else "")
    )


def drift(process: SDE, x: Tensor, t: Tensor) -> Tensor:
    """b(x, t), checked where that costs no synchronisation with a device."""
    b = process.drift(x, t)
    if on_host(x.device):
        check_drift(process, b, x, t)
    return b


def check_drift(process: SDE, b: Tensor, x: Tensor, t: Time) -> None:
    """Raise ``FloatingPointError`` where b is not finite and x is: no shorter step would help."""
    if bool(torch.isfinite(b).all()):
        return
    sound, known = (torch.isfinite(v).reshape(len(x), -1).all(1) for v in (b, x))
    if bool((rows := known & ~sound).any()):
        i = int(rows.nonzero()[0])
        time = as_time(t)
        raise FloatingPointError(
            f"the {'score' if hasattr(process, 'score') else 'drift'} is not finite at"
            f" t = {float(time[i] if time.ndim else time):.6g}, first in row {i} of the state,"
            f" whose numbers are at most {float(x[i].detach().abs().max()):.3g}"
        )


def describe(process: SDE) -> str:
    """A short name of a process for messages."""
    eta = f" with eta = {process.eta}" if hasattr(process, "eta") else ""
    inner = f" of {type(process.sde).__name__}" if hasattr(process, "sde") else ""
    return f"{type(process).__name__}{inner}{eta}"
