"""A first step that makes its call where a call tells something.

At the start of the probability flow the score says hardly more than the data's mean: the state
is noise. A call made there is nearly lost, and of five calls one is a fifth. The start is left
without a call instead, and the score read at a time t* inside the first step: with Q constant
from T to t* (as it is for Gaussian data of covariance C, see ``exponential``),

    y* = a y_T + (1 - a) Q,     a^2 = (C + w*) / (C + w_T),

where Q is read at a y_T + (1 - a) m, with m the mean where it is known, or else 0. Of Gaussian
data Q is the mean wherever it is read, so y* is exact, whether m is known or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..moments import Coefficient, Moments
from ..noise import Noise
from ..sdes import SDE, LinearSDE, Reverse
from .base import Memory, Step, reversal
from .exponential import Combination, Exponential

_NOISE = 30.0
"""Where the noise is so many times as wide as the data a state tells nothing of them."""
_SEEN = 4.0
"""Where it is so many times as wide, or less, no step goes without having asked."""


@dataclass(frozen=True, slots=True)
class Landing:
    """What leads from T to t*, and the step from there.

    Q = x / alpha + read s at t*; there the state is keep x_T + gain Q, and the score that has this
    Q is score_q Q - score_x x_T. The mean adds ``mean`` to what is read at.
    """

    t: float
    reference: Moments
    alpha: float
    keep: Coefficient
    gain: Coefficient
    read: Coefficient
    score_q: Coefficient
    score_x: Coefficient
    then: Combination

    def guess(self, x: Tensor) -> Tensor:
        """The state at t* if Q is the mean."""
        y = self.reference.apply((self.keep,), (x,))
        if self.reference.mean is None:
            return y
        mean = self.reference.mean.to(x).reshape(x.shape[1:]).expand_as(x)
        return y + self.reference.apply((self.gain,), (mean,))

    def __call__(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Memory]:
        """The step's end from x at T and the score s of y, the guess."""
        c = self.reference
        q = c.apply((1 / self.alpha, self.read), (y, s))
        y = c.apply((self.keep, self.gain), (x, q))
        return self.then(y, c.apply((self.score_q, self.score_x), (q, x)), (), None)


class Leap(Exponential):
    """``Exponential``, whose first step from pure noise reads the score where it says something.

    Where a flow starts in noise 30 times as wide as the data, its score is read not at T but at
    t*, before the end of the first of N >= 4 steps about as far as that of the second is behind,

        lambda* = lambda_1 - (1 - 0.3 q) (lambda_2 - lambda_1),    lambda = log(alpha / sigma),

    with q = (5 / N)^4, or 1 for N < 5; or where the noise is 4 times as wide as the data, if that
    is earlier. As steps become short t* comes to T by the square of their length, so the order is
    that of ``Exponential``. Everywhere else (a start in the middle of the path, a first step that
    is no longer than that, eta > 0, a ``reference`` of variance 0, which knows no width of the
    data) it is ``Exponential``.
    The 0.3 and the 5 were chosen with the default grid.

    Args: as ``Exponential``.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 10, seed=0, solver=sg.solvers.Leap(3)).shape
    torch.Size([8, 2])
    """

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """The steps from t* on, and before them the way there."""
        reverse, sde = reversal(self, process)
        t = self.asked_at(sde, times) if reverse.eta == 0 else None
        if t is None:
            return list(super().plan(process, times))
        first, *rest = self.maps(process, torch.cat([times.new_tensor([t]), times[1:]]))
        start = self._start(sde, float(times[0]), t, first.numbers)
        return [Step(float(times[0]), first.s, start), *rest]

    def asked_at(self, sde: LinearSDE, times: Tensor) -> float | None:
        """t* of a grid of falling times, or None where its first call is made at its start."""
        std = math.sqrt(self.reference.variance)
        n = len(times) - 1
        if n < 4 or not 0 < std < math.inf:
            return None
        alpha, sigma = float(sde.alpha(times[0])), float(sde.sigma(times[0]))
        start, one, two = (0.5 * sde.log_snr(times[:3])).tolist()
        if sigma < _NOISE * alpha * std or not start < one < two < math.inf:
            return None
        at = one - (1 - 0.3 * min(1.0, (5 / n) ** 4)) * (two - one)
        at = min(at, -math.log(_SEEN * std))
        return float(sde.time_at(2 * at)) if start < at < one else None

    def _start(self, sde: LinearSDE, t: float, at: float, then: Combination) -> Landing:
        c: np.ndarray = self.reference.values.numpy()
        f = self.reference.coefficient
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        alpha_s, sigma_s = float(sde.alpha(at)), float(sde.sigma(at))
        b = np.sqrt((c + (sigma_s / alpha_s) ** 2) / (c * alpha**2 + sigma**2))
        spread = c * alpha_s + sigma_s**2 / alpha_s
        return Landing(
            t=at,
            reference=self.reference,
            alpha=alpha_s,
            keep=f(alpha_s * b),
            gain=f(alpha_s * (1 - alpha * b)),
            read=f(spread),
            score_q=f(alpha * b / spread),
            score_x=f(-b / spread),
            then=then,
        )

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One evaluation of the score, at the start or at t*, and the map."""
        k = step.numbers
        if not isinstance(k, Landing):
            return super().step(process, x, step, noise, memory)
        assert isinstance(process, Reverse)
        guess = k.guess(x)
        return k(x, guess, process.evaluate(guess, k.t).score)
