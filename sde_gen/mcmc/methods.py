"""One step of a chain: unadjusted, adjusted, and underdamped Langevin dynamics.

A method keeps no state of its own; what a chain carries from step to step is a ``State``. Every
method calls the score once a step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise
from ..ops import match, sum_rest
from .targets import Target


@dataclass
class State:
    """Where all chains are: x (C, *D), step sizes h, and what the method carries along."""

    target: Target
    x: Tensor
    h: Tensor
    v: Tensor | None = None
    score: Tensor | None = None
    log_p: Tensor | None = None
    accept: Tensor | None = None
    """Acceptance probability of the last step, (C,)."""
    accepts: Tensor | None = None
    """Their sum since the end of the warm-up, (C,)."""
    log_h: Tensor | None = None


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, Python's or numpy's."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _rows(c: Tensor, x: Tensor) -> Tensor:
    """One value a chain (C,), in the rank of x."""
    return c.reshape(-1, *(1,) * (x.ndim - 1))


class Method(ABC):
    """How a chain steps.

    Attributes:
        normals: standard normals of the shape of the state in a step.
        decides: whether a step draws one number more for each chain.
        needs_density: whether a score is not enough.

    >>> isinstance(sg.ULA(), sg.mcmc.Method)
    True
    """

    normals: int = 1
    decides: bool = False
    needs_density: bool = False

    def start(self, target: Target, x: Tensor, h: float, noise: Noise) -> State:
        """The state of chains at x (C, *D)."""
        # Half precision counts no further than 256 or 2048 steps.
        dtype = torch.promote_types(x.dtype, torch.float32)
        return State(target, x, torch.full((len(x),), h, dtype=dtype, device=x.device))

    @abstractmethod
    def step(self, state: State, h: float, z: Sequence[Tensor]) -> None:
        """Step all chains in place; ``h`` is the step size that was asked for."""

    def adapt(self, state: State, k: int, warmup: int) -> None:  # noqa: B027 (few adapt)
        """After step k of a warm-up of ``warmup`` steps: mend the step size."""


@dataclass(frozen=True)
class ULA(Method):
    """Unadjusted Langevin: x <- x + h s(x) + sqrt(2 h) z.

    Euler-Maruyama on the Langevin process; on N(0, v) its law at rest is N(0, v / (1 - h / 2v)),
    and it is stable for h < 2 v only (Roberts & Tweedie 1996).

    >>> law, x = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.zeros(4, 2)
    >>> sg.langevin(law, x, 10, 0.1, sg.ULA(), noise=0).samples.shape
    torch.Size([10, 4, 2])
    """

    def step(self, state: State, h: float, z: Sequence[Tensor]) -> None:
        """x + h s(x) + sqrt(2 h) z."""
        s = state.target.score(state.x)
        state.x.add_(s, alpha=h).add_(z[0], alpha=math.sqrt(2 * h))


@dataclass(frozen=True)
class MALA(Method):
    """Metropolis-adjusted Langevin: a step of ULA is taken with probability

        min(1, p(y) q(x | y) / (p(x) q(y | x))),      q(y | x) = N(x + h s(x), 2 h),

    so that the law at rest is p itself (Besag 1994; Roberts & Tweedie 1996). In the warm-up each
    chain adapts its step to ``acceptance`` (0.574 is optimal for products of many coordinates,
    Roberts & Rosenthal 1998) by Robbins-Monro on log h, and keeps the mean of log h over the
    second half of the warm-up from then on; without a warm-up h stays.

    >>> sg.langevin(lambda x: -0.5 * (x**2).sum(1), torch.zeros(4, 2), 10, 0.1, sg.MALA()).h.shape
    torch.Size([4])
    """

    acceptance: float = 0.574
    decides = True
    needs_density = True

    def __post_init__(self) -> None:
        if not (is_number(self.acceptance) and 0 < self.acceptance < 1):
            raise ValueError(f"acceptance must lie between 0 and 1, got {self.acceptance!r}")

    def start(self, target: Target, x: Tensor, h: float, noise: Noise) -> State:
        """Log density and score of the first state."""
        state = super().start(target, x, h, noise)
        state.log_p, state.score = target.evaluate(x)
        state.accepts = torch.zeros_like(state.h)
        bad = ~torch.isfinite(state.log_p)
        if bool(bad.any()):
            rows = bad.nonzero().flatten().tolist()[:5]
            raise ValueError(f"chains must start where the density is positive; not so: {rows}")
        return state

    def step(self, state: State, h: float, z: Sequence[Tensor]) -> None:
        """Langevin's proposal, accepted by the rule of Metropolis and Hastings."""
        x, s, log_p = state.x, state.score, state.log_p
        assert s is not None
        assert log_p is not None
        assert state.accepts is not None
        step = match(state.h, x)
        y = x + step * s + torch.sqrt(2 * step) * z[0]
        log_p_y, s_y = state.target.evaluate(y)
        total = s + s_y
        # The |z|^2 of both directions cancels: what is left is small with h.
        moved = sum_rest(torch.sqrt(step / 2) * z[0] * total + step / 4 * total**2)
        ratio = log_p_y - log_p - moved
        # log Phi(z) is the logarithm of a uniform number.
        taken = torch.special.log_ndtr(z[1].to(state.h)) < ratio
        # Where there is density but no score, a refusal would keep the chain away in silence.
        lost = (log_p_y > -math.inf) & ~(ratio < math.inf)
        state.accept = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0).to(state.h)
        state.accepts += state.accept
        taken, y = taken | lost, torch.where(_rows(lost, x), math.nan, y)
        state.x, state.score = (torch.where(_rows(taken, x), *new) for new in ((y, x), (s_y, s)))
        state.log_p = torch.where(taken, log_p_y, log_p)

    def adapt(self, state: State, k: int, warmup: int) -> None:
        """Move log h towards the acceptance that is wanted; at the end take its mean."""
        assert state.accept is not None
        assert state.accepts is not None
        current = torch.log(state.h)
        half = warmup // 2
        if k >= half:
            mean = current if state.log_h is None else state.log_h
            state.log_h = mean + (current - mean) / (k - half + 1)
        state.h = torch.exp(current + 2 * (k + 1) ** -0.6 * (state.accept - self.acceptance))
        if k == warmup - 1 and state.log_h is not None:
            state.h = torch.exp(state.log_h)
            state.accepts.zero_()


@dataclass(frozen=True)
class Splitting(Method):
    """Underdamped Langevin, dx = v dt, dv = s(x) dt - friction v dt + sqrt(2 friction) dW.

    Each part of it has an exact solution, and a step is a word of them: A moves x by v, B moves
    v by s, O is the Ornstein-Uhlenbeck process of v. A letter that stands n times in the word
    runs for h / n each time. The law at rest of v is N(0, I), from which chains draw theirs
    (Leimkuhler & Matthews 2013). A palindrome has weak order 2.

    Raises:
        ValueError: a word without one of A, B and O, or with another letter; friction < 0.

    >>> law, x = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.zeros(4, 2)
    >>> sg.langevin(law, x, 10, 0.1, sg.mcmc.Splitting("BAOAB"), noise=0).samples.shape
    torch.Size([10, 4, 2])
    """

    word: str
    friction: float = 1.0

    def __post_init__(self) -> None:
        letters = [letter for letter, _ in groupby(str(self.word))]
        if set(letters) != set("ABO") or "".join(letters) != self.word:
            raise ValueError(
                f"a word is made of A, B and O, no letter twice in a row: {self.word!r}"
            )
        if not (is_number(self.friction) and self.friction >= 0):
            raise ValueError(f"friction must be a finite number >= 0, got {self.friction!r}")

    @property
    def normals(self) -> int:  # type: ignore[override]
        """One for each O of the word."""
        return self.word.count("O")

    def start(self, target: Target, x: Tensor, h: float, noise: Noise) -> State:
        """The state with a velocity from N(0, I)."""
        state = super().start(target, x, h, noise)
        # copied, so that it lies in memory as x does
        state.v = torch.empty_like(x).copy_(noise.start(x))
        return state

    def step(self, state: State, h: float, z: Sequence[Tensor]) -> None:
        """The letters of the word, in order."""
        x, v, draws = state.x, state.v, iter(z)
        assert v is not None
        for letter in self.word:
            part = h / self.word.count(letter)
            if letter == "A":
                x.add_(v, alpha=part)
                state.score = None
            elif letter == "B":
                if state.score is None:
                    state.score = state.target.score(x)
                v.add_(state.score, alpha=part)
            else:
                fade = math.exp(-self.friction * part)
                spread = math.sqrt(-math.expm1(-2 * self.friction * part))
                v.mul_(fade).add_(next(draws), alpha=spread)


@dataclass(frozen=True)
class BAOAB(Splitting):
    """Half kick, half drift, O, half drift, half kick: exact variance of x on a Gaussian.

    On the harmonic x -> -x, at any friction: var x = 1, var v = 1 - h^2 / 4 (Leimkuhler &
    Matthews 2013). Stable for h < 2 times the smallest standard deviation.

    >>> law, x = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.zeros(4, 2)
    >>> sg.langevin(law, x, 10, 0.1, sg.BAOAB(), noise=0).samples.shape
    torch.Size([10, 4, 2])
    """

    word: str = field(init=False, repr=False, default="BAOAB")


@dataclass(frozen=True)
class OBABO(Splitting):
    """Half O, velocity Verlet, half O (Bussi & Parrinello 2007).

    On the harmonic: var x = 1 / (1 - h^2 / 4), var v = 1.

    >>> law, x = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.zeros(4, 2)
    >>> sg.langevin(law, x, 10, 0.1, sg.OBABO(), noise=0).samples.shape
    torch.Size([10, 4, 2])
    """

    word: str = field(init=False, repr=False, default="OBABO")


@dataclass(frozen=True)
class ABOBA(Splitting):
    """Half drift, half kick, O, half kick, half drift.

    On the harmonic: var x = 1, var v = 1 / (1 - h^2 / 4).

    >>> law, x = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.zeros(4, 2)
    >>> sg.langevin(law, x, 10, 0.1, sg.mcmc.ABOBA(), noise=0).samples.shape
    torch.Size([10, 4, 2])
    """

    word: str = field(init=False, repr=False, default="ABOBA")
