"""All numbers of a solver at once, by Gauss and Newton, for the error at the end.

Fitted step by step, numbers undo the error of each step; fitted together they let one step mend
another's, and the nodes move with them. Unknown are the log lengths of the steps (in shares of
the default grid) and the numbers of each. The derivatives of the ends x by them are differences
of runs; a number of step i asks only the steps after i. They are taken at part of the
trajectories, 32 numbers of their ends for each unknown, and carried along two further moves by
Broyden's update (1965). A move of Levenberg (1944) and Marquardt (1963) counts if the typical
error of all trajectories falls (``typical_error``); its slope gives the weights,

    d error = sum_b w_b e_b . de_b,    w_b = (1 / (n r_b^2) + 1 / (r_b sum r)) / 2,    r = |e|,

softened by 0.3 of the median r, so that neither those without error nor those that end in another
mode decide. A trajectory between two modes, which is flung from one to the other, has little
weight as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .. import grids
from ..noise import Streams
from ..sdes import LinearSDE, Reverse
from ..solvers import Step
from ..solvers.base import Memory
from .trials import Trial, typical_error
from .tuned import Choice, Numbers, combination, correct

MOVES, CARRIED, DAMPING = 9, 2, 1e-2
"""Moves at most, and how often derivatives are carried along instead of taken anew."""
_SHIFT, _LONGEST = 0.03, 0.7
"""Of a difference, and of a log length in one move."""
_ENOUGH, _MOST = 32, 2**25
"""Numbers of the ends for each unknown, and derivatives in all."""

Stop = tuple[Tensor, Memory]
"""A state as the solver left it, before its numbers, and the memory there."""


def polished(trial: Trial, choice: Choice, times: Tensor, std: float) -> Iterator[Choice]:
    """Better and better choices for a trial, from one with shares; std is the default grid's.

    One whenever the derivatives are spent, and the last.
    """
    walk = Walk(choice, float(times[0]), float(times[-1]), std)
    theta, n = walk.start(), len(trial.x)
    e = walk.missed(trial, theta)
    error, damping, age, slopes = _typical(e), DAMPING, 0, None
    part = trial.part(_rows(n, len(theta), e.shape[1]))
    for _ in range(MOVES):
        if slopes is None:
            slopes, age = walk.slopes(part, theta, e[: len(part.x)]), 0
            damping = min(damping, DAMPING)
        for _ in range(4):
            move = _move(slopes, e, damping, choice.steps)
            moved = walk.missed(trial, theta + move)
            found = _typical(moved)
            if found < error:
                break
            damping *= 6
        else:
            if age == 0:
                break
            slopes = None
            yield walk.choice(trial, theta)
            continue
        _update(slopes, move, (moved - e)[: len(part.x)])
        theta, e, damping, gain, error = theta + move, moved, damping / 6, error - found, found
        if gain < 0.01 and age == 0:
            break
        age += 1
        if age > CARRIED or gain < 0.01:
            slopes = None
            yield walk.choice(trial, theta)
    yield walk.choice(trial, theta)


def calls(steps: int, share: float, numbers: bool) -> float:
    """Evaluations for each trajectory, of which a ``share`` is used for derivatives."""
    each = steps**2 + (2 * steps * (steps - 1) if numbers else 0)
    return steps * (MOVES + 3) + share * each * MOVES / (CARRIED + 1)


def _rows(n: int, unknown: int, numbers: int) -> int:
    """How many of n trajectories derivatives are taken at, with so many numbers each."""
    enough = max(n // 4, math.ceil(_ENOUGH * unknown / numbers))
    return max(1, min(n, enough, _MOST // (unknown * numbers)))


def _typical(e: Tensor) -> float:
    """log of the typical error; infinite where the solver leaves the numbers."""
    r = e.norm(dim=1).clamp_min(torch.finfo(e.dtype).tiny)
    error = typical_error(r.log().cpu().double())
    return error if math.isfinite(error) else math.inf


def _move(slopes: Tensor, e: Tensor, damping: float, steps: int) -> np.ndarray:
    """The move of all unknowns, from derivatives (P, m, n) and ends missed by e (N, n)."""
    r, m = e.norm(dim=1), slopes.shape[1]
    soft = 0.3 * r.median()
    mine = r[:m]
    w = 1 / (mine**2 + soft**2) / m + 1 / ((mine + soft) * r.mean() * m)
    reach = slopes.square().sum((0, 2)).sqrt()
    w = w / (2 * (1 + (reach / (5 * reach.median())) ** 2))
    square = torch.einsum("pbn,b,qbn->pq", slopes, w, slopes).cpu().double()
    slope = torch.einsum("pbn,b,bn->p", slopes, w, e[:m]).cpu().double()
    held = damping * square.diagonal() + 1e-3
    move: np.ndarray = torch.linalg.solve(square + torch.diag(held), -slope).numpy()
    move[:steps] = move[:steps].clip(-_LONGEST, _LONGEST)
    return move


def _update(slopes: Tensor, move: np.ndarray, change: Tensor) -> None:
    """Broyden's, in place: the least that makes derivatives say the change (m, n) of a move."""
    step = torch.from_numpy(move).to(slopes)
    missed = change - torch.einsum("p,pbn->bn", step, slopes)
    for slope, share in zip(slopes, (step / (step @ step)).unbind(), strict=True):
        slope += share * missed


@dataclass(frozen=True)
class Walk:
    """A choice's solver as a function of its unknowns: log lengths (steps,), then its numbers."""

    first: Choice
    begin: float
    end: float
    std: float

    def start(self) -> np.ndarray:
        """The unknowns of the choice itself."""
        assert self.first.shares is not None
        lengths = np.diff([0.0, *self.first.shares, 1.0])
        numbers = [c for row in self.first.numbers or () for c in row]
        return np.concatenate([np.log(lengths), numbers])

    def choice(self, trial: Trial, theta: np.ndarray) -> Choice:
        """The choice with these unknowns."""
        shares, numbers = self._read(theta)
        sde = trial.sde
        levels = tuple((-0.5 * sde.log_snr(self._times(sde, shares))).tolist())
        moved = replace(self.first, shares=tuple(shares[1:-1].tolist()), levels=levels)
        return moved if self.first.numbers is None else replace(moved, numbers=numbers)

    def missed(self, trial: Trial, theta: np.ndarray) -> Tensor:
        """Ends less the exact ones, (N, n)."""
        shares, numbers = self._read(theta)
        plan = self._plan(trial, shares)
        x = self._go_on(trial.flow, plan, numbers, -1, trial.x, ())
        return (x - trial.exact).flatten(1)

    def slopes(self, trial: Trial, theta: np.ndarray, e: Tensor) -> Tensor:
        """Derivatives of the ends by the unknowns, (P, N, n), where they miss by e."""
        found = []
        for j in range(self.first.steps):
            moved = theta.copy()
            moved[j] += _SHIFT
            found.append((self.missed(trial, moved) - e) / _SHIFT)
        if self.first.numbers is not None:
            found += self._slopes_by_numbers(trial, theta, e)
        return torch.stack(found)

    def _slopes_by_numbers(self, trial: Trial, theta: np.ndarray, e: Tensor) -> list[Tensor]:
        """All numbers of a step in one batch, from what the step left."""
        shares, numbers = self._read(theta)
        plan, m, found = self._plan(trial, shares), len(trial.x), []
        stops: list[Stop] = []
        self._go_on(trial.flow, plan, numbers, -1, trial.x, (), stops)
        for i, (row, (y, memory)) in enumerate(zip(numbers, stops, strict=True)):
            alpha = float(trial.sde.alpha(plan[i].s))
            moved = [
                correct(y, memory, combination(shifted, alpha))
                for shifted in (row + _SHIFT * np.eye(len(row))).tolist()
            ]
            many = torch.arange(m, device=y.device).repeat(len(row))
            flow = trial.flow.rows(many)
            x = self._go_on(
                flow, plan, numbers, i, torch.cat(moved), tuple(q[many] for q in memory)
            )
            ends = x.unflatten(0, (len(row), m))
            found += [((x - trial.exact).flatten(1) - e) / _SHIFT for x in ends]
        return found

    def _read(self, theta: np.ndarray) -> tuple[np.ndarray, Numbers]:
        """Shares (steps + 1,) and numbers."""
        k = self.first.steps
        lengths = np.exp(theta[:k] - theta[:k].max())
        shares = np.concatenate([[0.0], lengths.cumsum() / lengths.sum()])
        shares[-1] = 1.0
        rest = iter(theta[k:].tolist())
        return shares, tuple(tuple(next(rest) for _ in row) for row in self.first.numbers or ())

    def _times(self, sde: LinearSDE, shares: np.ndarray) -> Tensor:
        times = grids.default_at(sde, torch.from_numpy(shares), self.begin, self.end, self.std)
        times[0], times[-1] = self.begin, self.end
        return times

    def _plan(self, trial: Trial, shares: np.ndarray) -> list[Step]:
        return self.first.solver.plan(trial.flow, self._times(trial.sde, shares))

    def _go_on(
        self,
        flow: Reverse,
        plan: list[Step],
        numbers: Numbers,
        i: int,
        x: Tensor,
        memory: Memory,
        stops: list[Stop] | None = None,
    ) -> Tensor:
        """To the end, with all steps after i (-1: the start), which left x and the memory; into
        ``stops`` what each leaves, before its numbers."""
        sde, noise = flow.sde, Streams(0)
        assert isinstance(sde, LinearSDE)
        for j in range(i + 1, len(plan)):
            x, memory = self.first.solver.step(flow, x, plan[j], noise, memory)
            if stops is not None:
                stops.append((x, memory))
            if numbers:
                x = correct(x, memory, combination(numbers[j], float(sde.alpha(plan[j].s))))
        return x
