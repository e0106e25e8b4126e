"""What tuning finds: for each number of steps a grid, a solver, and perhaps numbers of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..moments import isotropic
from ..noise import Noise
from ..sdes import SDE, LinearSDE
from ..solvers import Exponential, Solver, Step
from ..solvers.base import Memory, require_ode, reversal

Numbers = tuple[tuple[float, ...], ...]
"""Fitted coefficients: a row a step, a number for each direction of ``directions``."""


@dataclass(frozen=True)
class Warped:
    """The default grid for so many steps with its nodes moved.

    Node i of the grid lies where the share shares[i - 1] of the default grid's steps is done. For
    another number of steps the shares are read as a curve, straight between the nodes. Called as
    the functions of ``grids``.

    Args:
        shares: of the inner nodes, rising between 0 and 1.
        data_std: of the default grid.

    >>> sg.tuning.Warped((0.4, 0.7))(sg.VP(), 3).shape
    torch.Size([4])
    """

    shares: tuple[float, ...]
    data_std: float = 1.0

    def __call__(
        self,
        sde: LinearSDE,
        steps: int,
        start: float | None = None,
        end: float | None = None,
        to_zero: bool = False,
    ) -> Tensor:
        """steps + 1 falling times, as the functions of ``grids``."""
        times = grids.default(sde, steps, start, end, self.data_std, to_zero)
        n = len(times) - 1 - to_zero
        nodes = torch.tensor([0.0, *self.shares_of(n), 1.0], dtype=torch.float64)
        first, last = float(times[0]), float(times[n])
        times[1:n] = grids.default_at(sde, nodes, first, last, self.data_std)[1:-1]
        return times

    def shares_of(self, steps: int) -> tuple[float, ...]:
        """The shares for so many steps, (steps - 1,)."""
        known = np.array([0.0, *self.shares, 1.0])
        nodes = np.linspace(0, len(known) - 1, steps + 1)[1:-1]
        found: list[float] = np.interp(nodes, np.arange(len(known)), known).tolist()
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Choice:
    """What serves one number of steps.

    Attributes:
        steps: from the noise to the last positive time.
        solver: whose steps they are.
        shares: of the ``Warped`` grid, (steps - 1,); None is the default grid.
        levels: log(sigma / alpha) at the nodes that ``numbers`` were fitted on, (steps + 1,).
        numbers: coefficients of each step; None is the solver as it is.
        ratio: error / the default's on trajectories that nothing was fitted to or chosen by
            (geometric mean over them); 1 where this is the default.
        p_value: of the signed-rank test that the default is as good there.

    Raises:
        ValueError: steps or a ratio that are not positive, shares or numbers that are not those
            of so many steps, nor of what the solver remembers at each.

    >>> sg.tuning.Choice(10, sg.Exponential(3)).steps
    10
    """

    steps: int
    solver: Exponential
    shares: tuple[float, ...] | None = None
    levels: tuple[float, ...] = ()
    numbers: Numbers | None = None
    ratio: float = 1.0
    p_value: float = 1.0

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and self.ratio > 0):
            raise ValueError(f"need steps >= 1 and ratio > 0, got {self.steps} and {self.ratio}")
        if self.shares is not None:
            nodes = (0.0, *self.shares, 1.0)
            if len(nodes) != self.steps + 1 or any(b <= a for a, b in pairwise(nodes)):
                raise ValueError(
                    f"shares of {self.steps} steps are {self.steps - 1} numbers that rise between"
                    f" 0 and 1, got {self.shares}"
                )
        if self.numbers is None:
            return
        if not len(self.numbers) == len(self.levels) - 1 == self.steps:
            raise ValueError(
                f"{self.steps} steps have as many numbers and a level more, got"
                f" {len(self.numbers)} and {len(self.levels)}"
            )
        most = self.solver.nodes - 1 + self.solver.corrector
        for i, row in enumerate(self.numbers):
            if len(row) > min(i + 1, most):
                raise ValueError(
                    f"numbers[{i}] are {len(row)}, with {min(i + 1, most)} directions"
                )

    @property
    def name(self) -> str:
        """What was taken: ``"default"``, ``"grid"`` or ``"grid and numbers"``."""
        if self.shares is None:
            return "default"
        return "grid" if self.numbers is None else "grid and numbers"

    def fits(self, sde: LinearSDE, times: Tensor) -> bool:
        """Whether ``numbers`` were fitted on these positive times."""
        if self.numbers is None or len(times) != len(self.levels):
            return False
        levels = torch.tensor(self.levels, dtype=torch.float64)
        return bool(torch.allclose(-0.5 * sde.log_snr(times), levels, rtol=0, atol=1e-5))


class Tuned(Solver):
    """A solver that was fitted to one score, and brings its own grid.

    Give it to ``sample(model, n, steps, solver=tuned)``, or keep it with the model,
    ``model.tuned = tuned``: then ``sample(model, n, steps)`` takes it, and ``save`` stores it. For
    a number of steps that it was not tuned for it takes the grid and the solver of the nearest
    that it was, as it does, without their numbers, on any grid that is not its own.

    Args:
        choices: one for each number of steps.
        data_std: of the default grid.
        end: sigma / alpha where its grids stop; None is where those of ``sample`` do.
        weights: the fingerprint of the network that it was tuned to.

    Attributes:
        name, ratio, p_value: of all choices together: their names, the geometric mean, the
            largest.

    Raises:
        ValueError: no choices. When solved: TypeError, a process that is no probability flow of
            a linear process.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 5, seed=0, solver=sg.tune_grid(law, steps=5, n=8)).shape
    torch.Size([8, 2])
    """

    takes_infinite = True
    multistep = True

    def __init__(
        self,
        choices: Sequence[Choice],
        data_std: float = 1.0,
        end: float | None = None,
        weights: str | None = None,
    ) -> None:
        if not choices:
            raise ValueError("a tuned solver needs a choice for at least one number of steps")
        self.choices = tuple(sorted(choices, key=lambda c: c.steps))
        self.data_std, self.end, self.weights = data_std, end, weights
        self.order = min(c.solver.order for c in self.choices)

    @property
    def name(self) -> str:
        """What was taken, for all choices."""
        return ", ".join(dict.fromkeys(c.name for c in self.choices))

    @property
    def ratio(self) -> float:
        """Error over the default's, geometric mean over the choices."""
        return math.exp(sum(math.log(c.ratio) for c in self.choices) / len(self.choices))

    @property
    def p_value(self) -> float:
        """The largest of the choices."""
        return max(c.p_value for c in self.choices)

    def __repr__(self) -> str:
        rows = [
            f"  {c.steps:3d} steps: {c.name}, error / default {c.ratio:.2f} (p = {c.p_value:.1g})"
            for c in self.choices
        ]
        return "\n".join(["Tuned, by steps to the last positive time:", *rows])

    def choice(self, steps: int) -> Choice:
        """What serves this number of steps: the nearest, by ratio."""
        return min(self.choices, key=lambda c: abs(math.log(c.steps / steps)))

    def grid(
        self,
        sde: LinearSDE,
        steps: int,
        start: float | None = None,
        end: float | None = None,
        to_zero: bool = False,
    ) -> Tensor:
        """The times of so many steps, as the functions of ``grids``; ``end``: its own."""
        if end is None and self.end is not None:
            end = float(sde.time_at(-2 * math.log(self.end)))
        choice = self.choice(max(1, steps - to_zero))
        if choice.shares is None:
            return grids.default(sde, steps, start, end, self.data_std, to_zero)
        return Warped(choice.shares, self.data_std)(sde, steps, start, end, to_zero)

    def check(self, process: SDE) -> None:
        """A probability flow of a linear process."""
        require_ode(self, process)
        self.choices[0].solver.check(process)

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """The nearest choice's steps, with its numbers where they were fitted on these times."""
        _, sde = reversal(self, process)
        positive = times[times > 0] if float(times[-1]) == 0 else times
        choice = self.choice(len(positive) - 1) if len(positive) > 1 else self.choices[0]
        steps = choice.solver.plan(process, times)
        rows: Numbers = ()
        if choice.numbers is not None and choice.fits(sde, positive):
            rows = choice.numbers
        scales = sde.alpha(times[1:]).tolist()
        mixes = [combination(row, alpha) for row, alpha in zip(rows, scales, strict=False)]
        mixes += [()] * (len(steps) - len(rows))
        return [
            Step(s.t, s.s, (choice.solver, s, mix)) for s, mix in zip(steps, mixes, strict=True)
        ]

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """The solver's step, then its numbers."""
        solver, inner, numbers = step.numbers
        x, memory = solver.step(process, x, inner, noise, memory)
        return correct(x, memory, numbers), memory


def directions(y: Tensor, memory: Memory) -> Tensor:
    """What a step's result y may be moved along, (k, B, *D).

    y - Q_1, Q_1 - Q_2, Q_2 - Q_3, ... with the values Q that the step has used, latest first:
    differences, so that where nothing changes nothing is changed. Their span holds every
    multistep rule with the same values, the corrector's and the predictor's weights included.
    """
    values = [y, *memory]
    return torch.stack([a - b for a, b in pairwise(values)])


def combination(numbers: Sequence[float], alpha: float) -> tuple[float, ...]:
    """Coefficients of x, Q_1, Q_2, ... in x + alpha sum_k numbers_k directions_k (x = alpha y)."""
    n = [*numbers, 0.0]
    return (1 + n[0], *(alpha * (b - a) for a, b in pairwise(n)))


def correct(x: Tensor, memory: Memory, numbers: tuple[float, ...]) -> Tensor:
    """The state of a step and its memory, combined."""
    if not numbers:
        return x
    return isotropic(0.0).apply(numbers, (x, *memory[: len(numbers) - 1]))
