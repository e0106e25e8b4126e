"""Noise between the steps: churn before a step of the flow, Langevin dynamics after a step.

In the law of x_t a sampler may do two things for nothing: noise the state to a higher time t' by
the forward kernel, which turns the law of t into that of t', and run Langevin dynamics at the
frozen time t, which keeps the law of t. Both wash out what earlier steps did wrong. Either, on top
of the probability flow, at a rate of eta^2 in lambda = log(alpha / sigma), becomes in fine
steps the reversal of noise level eta (the splitting of its drift into flow and Langevin part).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..moments import Coefficient, Moments, isotropic
from ..noise import Noise
from ..ops import check_count, check_kind, check_number, match
from ..sdes import SDE, LinearSDE, Reverse
from .base import Memory, Solver, Step, describe, reversal
from .runge_kutta import Heun

_MOST = math.sqrt(2) - 1


def _require_one_step(outer: str, solver: Solver, name: str) -> None:
    check_kind(solver, Solver, name, "a Solver, such as Heun()")
    if solver.multistep:
        raise TypeError(
            f"{outer} needs a one-step solver (Heun(), RungeKutta(), Exponential(1)), got"
            f" {type(solver).__name__}: the past values of a multistep method do not belong to a"
            " state that noise has moved"
        )


def _falling(solver: Solver, times: Tensor) -> None:
    if times[0] < times[-1]:
        raise ValueError(f"{type(solver).__name__} adds noise: times must fall")


@dataclass(frozen=True, slots=True)
class _Kick:
    """x -> scale x + std z from t to a higher time; then a step of the flow from there."""

    scale: float
    std: float
    flow: Step


class Churn(Solver):
    """Noise the state exactly to a higher time, then step the probability flow from there.

        s' = (1 + gamma) s,      s = sigma / alpha (at most that of T),
        x' = (alpha' / alpha) x + alpha' sqrt(s'^2 - s^2) z,      x_next = flow(x', t', t_next).

    Algorithm 2 of Karras et al. 2022 on any linear process. Noising turns the law of t exactly
    into that of t', and the flow that of t' into that of t_next, so a run that *starts in the
    law of its time* (p_T) ends in the law of its last to the order of ``solver``, which is the
    ``weak`` that this solver states: 4 with ``RungeKutta(4)``. The steps are those of the
    reversal, from one state to the next, to order 1 only: so is the law that a run has when it
    starts elsewhere, from a point for example.

    Args:
        solver: a one-step ODE solver.
        amount: their S_churn: on a probability flow, gamma = min(S_churn / steps, sqrt(2) - 1).
            None: as much noise as the process asks for, 1 + gamma = (s_t / s_next)^(eta^2), so
            that fine steps are the reversal of noise level eta.
        low, high: with ``amount``, churn only where low <= sigma / alpha <= high (S_tmin, S_tmax).
        inflate: their S_noise, a factor of z; any other value than 1 bends the law.

    Raises:
        TypeError: a multistep solver; a process that is no reversal of a linear one; with
            ``amount``, one that is no probability flow.
        ValueError: a negative amount; rising times.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, solver=sg.Churn(sg.Heun()), seed=0).shape
    torch.Size([8, 2])
    """

    def __init__(
        self,
        solver: Solver | None = None,
        amount: float | None = None,
        low: float = 0.0,
        high: float = math.inf,
        inflate: float = 1.0,
    ) -> None:
        self.solver = Heun() if solver is None else solver
        _require_one_step("Churn", self.solver, "solver")
        self.amount = None if amount is None else check_number(amount, "amount", least=0)
        self.low = check_number(low, "low", least=0)
        self.high = check_number(high, "high", above=self.low, infinite=True)
        self.inflate = check_number(inflate, "inflate", above=0)
        self.order = self.weak = self.solver.order
        self.calls, self.evaluates_end = self.solver.calls, self.solver.evaluates_end
        self.reaches_zero = self.solver.reaches_zero
        self.draws = self.solver.draws

    def check(self, process: SDE) -> None:
        """Reversals of linear processes; with an amount, their flows alone."""
        reversal(self, process)
        if self.amount is not None and process.direction != 0:
            raise TypeError(
                "Churn with an amount steps a probability flow; leave the amount out to follow"
                f" the eta of {describe(process)}"
            )
        self.solver.check(_flow(process))

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """Of each step: how far up it is noised, and the step of the flow from there."""
        reverse, sde = reversal(self, process)
        _falling(self, times)
        steps, flow = [], _flow(process)
        gains = self._gains(sde, reverse.eta, times)
        for step, gain in zip(super().plan(process, times), gains, strict=True):
            up, kick = step.t, (1.0, 0.0)
            if gain > 0:
                up = float(sde.time_at(sde.log_snr(step.t) - 2 * gain))
                up = min(max(up, step.t), sde.T)
                kick = _kernel(sde, step.t, up)
            (inner,) = self.solver.plan(flow, torch.tensor([up, step.s], dtype=torch.float64))
            steps.append(Step(step.t, step.s, _Kick(kick[0], kick[1] * self.inflate, inner)))
        return steps

    def _gains(self, sde: LinearSDE, eta: float, times: Tensor) -> list[float]:
        """log(1 + gamma) of each step."""
        log_ratio = -sde.log_snr(times) / 2
        if self.amount is None:
            # A step to t = 0 is infinitely long in lambda; what counts is where it starts.
            fall = -log_ratio.diff()
            return [eta**2 * v if math.isfinite(v) else 0.0 for v in fall.tolist()]
        gain = math.log1p(min(self.amount / (len(times) - 1), _MOST))
        ratio = log_ratio[:-1].exp()
        inside = (self.low <= ratio) & (ratio <= self.high)
        return [gain if v else 0.0 for v in inside.tolist()]

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Fresh noise, then the flow."""
        k: _Kick = step.numbers
        if k.std:
            x = (x * k.scale).add(noise(x, step.t, step.s), alpha=k.std)
        x, _ = self.solver.step(_flow(process), x, k.flow, noise, ())
        return x, ()


def _flow(process: SDE) -> Reverse:
    assert isinstance(process, Reverse)
    return Reverse(process.sde, process.score, 0.0)


def _kernel(sde: LinearSDE, t: float, up: float) -> tuple[float, float]:
    """x_up given x_t: the factor of x_t and the spread of the noise."""
    a = float(sde.alpha(up)) / float(sde.alpha(t))
    return a, math.sqrt(max(float(sde.sigma(up)) ** 2 - (a * float(sde.sigma(t))) ** 2, 0.0))


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a step keeps for its corrections: the predictor's step; a = eta^2 sigma^2 dlambda."""

    predictor: Step
    a: float
    sigma: float
    score: Coefficient = 0.0
    noise: Coefficient = 0.0


class PredictorCorrector(Solver):
    """A step of any one-step solver, then Langevin dynamics at the frozen time s.

        x <- x + (1 - c) v score(x, s) + sqrt(v (1 - c^2)) z,
        c = exp(-eta^2 (sigma^2 / v) dlambda),      v = alpha^2 C + sigma^2,

    the Ornstein-Uhlenbeck step that is exact, at any length, where p_s = N(alpha m, v): Gaussian
    data of covariance C keep their law exactly. On other data one correction changes the law by
    O((1 - c)^2), which makes fine grids converge at weak order 1. The corrector of Song et al.
    2021 (algorithms 4 and 5) is its Euler form with 1 - c = 2 r^2, r their signal-to-noise ratio.

    Args:
        predictor: a one-step solver of the process; ``Heun()`` by default.
        eta: noise level of the corrections alone; on a probability flow, that of the whole.
        corrections: how many a step, each one call and an equal part of the length.
        reference: the covariance C. None: each sample has its own v = n / |score|^2 (n numbers in
            a sample), where Song et al. average over the batch; for n > 100 or so.

    Raises:
        TypeError: a multistep predictor; a process that is no reversal of a linear one.
        ValueError: eta not positive, corrections < 1, a negative reference; rising times.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 10, seed=0, eta=1, solver=sg.PredictorCorrector()).shape
    torch.Size([8, 2])
    """

    weak = 1
    evaluates_end = True

    def __init__(
        self,
        predictor: Solver | None = None,
        eta: float = 1.0,
        corrections: int = 1,
        reference: float | Moments | None = None,
    ) -> None:
        self.predictor = Heun() if predictor is None else predictor
        _require_one_step("PredictorCorrector", self.predictor, "predictor")
        eta = check_number(eta, "eta", above=0)
        corrections = check_count(corrections, "corrections")
        if reference is not None and not isinstance(reference, Moments):
            reference = isotropic(check_number(reference, "reference", least=0))
        self.eta, self.corrections, self.reference = eta, corrections, reference
        self.order = self.predictor.order
        self.calls = self.predictor.calls + corrections
        self.draws = self.predictor.draws + corrections

    def check(self, process: SDE) -> None:
        """Reversals that the predictor steps."""
        reversal(self, process)
        self.predictor.check(process)

    def plan(self, process: SDE, times: Tensor) -> list[Step]:
        """The predictor's steps, and the numbers of the corrections at their ends."""
        _, sde = reversal(self, process)
        _falling(self, times)
        alpha, sigma = sde.alpha(times).tolist(), sde.sigma(times).tolist()
        length = (sde.log_snr(times).diff() / 2).tolist()
        steps = []
        for i, step in enumerate(self.predictor.plan(process, times)):
            s = sigma[i + 1]
            a = self.eta**2 * s**2 * length[i] / self.corrections if s else 0.0
            kept = _Kept(step, a, s)
            if self.reference is not None:
                f, c = self.reference.coefficient, self.reference.values.numpy()
                v = alpha[i + 1] ** 2 * c + s**2
                gain, spread = -v * np.expm1(-a / v), np.sqrt(-v * np.expm1(-2 * a / v))
                kept = _Kept(step, a, s, f(gain), f(spread))
            steps.append(Step(step.t, step.s, kept))
        return steps

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """The predictor's step, then the corrections at its end."""
        assert isinstance(process, Reverse)
        k: _Kept = step.numbers
        x, _ = self.predictor.step(process, x, k.predictor, noise, ())
        if k.a == 0:
            return x, ()
        for j in range(self.corrections):
            score = process.evaluate(x, step.s).score
            z = noise(x, step.t, step.s, self.predictor.draws + j)
            if self.reference is not None:
                x = self.reference.apply((1.0, k.score, k.noise), (x, score, z))
            else:
                gain, spread = _own_step(score, k)
                x = x + gain * score + spread * z
        return x, ()


def _own_step(score: Tensor, k: _Kept) -> tuple[Tensor, Tensor]:
    """(1 - c) v and sqrt(v (1 - c^2)) for the variance v = n / |score|^2 of each sample."""
    square = score.flatten(1).square().mean(1) if score.ndim > 1 else score.square()
    # Bounded, so that a vanishing score is a long but plain Langevin step.
    v = 1 / square.clamp_min(1e-6 / k.sigma**2)
    gain, spread = -v * torch.expm1(-k.a / v), torch.sqrt(-v * torch.expm1(-2 * k.a / v))
    return match(gain, score), match(spread, score)
