"""Running chains: the loop, its noise, and what becomes of a chain that diverges.

Chain i is a function of the seed and i alone, whatever the number of chains and of steps: its
normals are named by step numbers, and MALA adapts the step of each chain on its own. They are
drawn for many steps at once, a number of steps that depends on the shape of the state alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noise import Noise, Streams
from ..ops import Time, as_real, check_count, check_finite, check_state, full_precision
from ..sampling import as_noise
from ..scores import Score
from ..sdes import LinearSDE
from .chains import Chains
from .methods import ULA, Method, State, is_number
from .targets import LogDensity, as_target

_RUN = 64
"""Numbers that a chain draws at once."""
_STUCK, _CREEPING, _ENOUGH = 1e-3, 1 - 1e-5, 30
"""Acceptance below the first number, or its mean above the second, is told after so many steps."""
_HUGE = 1e6
"""A chain has diverged when it is this much larger than any chain was at the start (or than 1)."""


def langevin(
    target: Score | LogDensity,
    x: Tensor,
    steps: int,
    h: float,
    method: Method | None = None,
    *,
    at: Time = 0.0,
    warmup: int = 0,
    thin: int = 1,
    noise: Noise | int | None = None,
    preconditioner: Tensor | np.ndarray | None = None,
    progress: bool = False,
) -> Chains:
    """Run Langevin chains of a law, all as one batch.

    >>> import torch
    >>> chains = langevin(lambda x: -0.5 * (x**2).sum(1), torch.zeros(4, 2), 100, 0.1, noise=0)
    >>> chains.samples.shape
    torch.Size([100, 4, 2])

    Args:
        target: a ``Score``, exact or learned, or a function x -> log p(x), (chains, *D) ->
            (chains,), whose gradient torch.func takes. A process's ``Langevin(score)`` with
            rate beta = 2 is what ULA steps.
        x: where the chains start (chains, *D), floating point and finite.
        steps: steps after the warm-up.
        h: step size; for ULA and MALA the variance of a step is 2 h, for the splittings h is the
            time of a step.
        method: ``ULA()`` by default; ``MALA()`` needs a density.
        at: the time at which a Score is read; a network needs one above 0.
        warmup: steps before, which are not kept and in which MALA adapts its step size.
        thin: keep every thin-th state.
        noise: a ``Noise``, or a seed for ``Streams``; None draws the seed from torch's global
            generator.
        preconditioner: P (n, n), n = prod(D), symmetric positive definite: the dynamics become
            dX = P s dt + sqrt(2 P) dW; the covariance of the law is a good one. For the
            underdamped methods it is the inverse of the mass.
        progress: show a progress bar.

    Returns:
        ``Chains`` with steps // thin draws. Warnings tell of chains that diverged, and of those
        of MALA that took none or nearly all of their proposals.

    Raises:
        TypeError: wrong kinds of arguments; MALA on a target that has no density.
        ValueError: numbers out of range; a start that is not finite or has density 0; a score
            that is singular at ``at`` or of the wrong shape; a density that is not real or that
            torch cannot differentiate.
        FloatingPointError: the score is not finite where a chain starts; every chain diverged.
    """
    check_state(x)
    check_finite(x)
    method = ULA() if method is None else method
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method, such as MALA(), got {method!r}")
    steps, thin = check_count(steps, "steps"), check_count(thin, "thin")
    warmup = check_count(warmup, "warmup", 0)
    if thin > steps:
        raise ValueError(f"thin = {thin} keeps none of {steps} steps")
    _check_size("h", h)
    with torch.no_grad():
        law = as_target(target, x, at, preconditioner)
        if method.needs_density and not law.has_density:
            raise TypeError(
                f"{type(method).__name__} needs a density, and {type(target).__name__} gives only"
                " its gradient: give a function x -> log p(x), or use ULA() or BAOAB()"
            )
        source = as_noise(noise)
        with full_precision(x.device.type), _bar(warmup + steps, progress) as bar:
            state = method.start(law, law.enter(x), float(h), source)
            _check_score(state)
            run = _Run(method, state, float(h), source, _HUGE * max(1.0, float(x.abs().max())))
            samples = run.walk(steps, warmup, thin, bar)
        return run.result(samples, steps)


def annealed_langevin(
    score: Score,
    x: Tensor,
    times: Tensor | Sequence[float],
    steps: int,
    eps: float,
    *,
    noise: Noise | int | None = None,
    trajectory: bool = False,
    progress: bool = False,
) -> Tensor:
    """Walk down the noise levels of a score, ``steps`` steps of ULA at each.

    At the i-th of L times, with sigma_i the noise level of the score's process,

        x <- x + alpha_i / 2 s(x, t_i) + sqrt(alpha_i) z,      alpha_i = eps sigma_i^2 / sigma_L^2

    (Song & Ermon 2019, algorithm 1). Between levels x scales with the signal level of the
    process, which is 1 for the VE processes of the paper.

    Args:
        score: any Score that knows its linear process, exact or learned.
        x: where the chains start (chains, *D), for example ``sde.prior(...)``.
        times: L falling times in (0, T].
        steps: steps at each level.
        eps: step size alpha_L at the last level; stable for eps < 4 sigma_L^2.
        noise: a ``Noise``, or a seed for ``Streams``; None draws a seed.
        trajectory: return the states after each level, (L, chains, *D), in place of the last.
        progress: show a progress bar.

    Raises:
        TypeError: a score that does not know its linear process.
        ValueError: times that do not fall or leave (0, T]; numbers out of range.
        FloatingPointError: a chain diverged.

    >>> law, times = sg.Gaussian(sg.VP(), torch.zeros(2)), sg.grids.log_snr(sg.VP(), 5)
    >>> sg.annealed_langevin(law, torch.randn(8, 2), times, 3, 1e-5, noise=0).shape
    torch.Size([8, 2])
    """
    check_state(x)
    check_finite(x)
    sde = linear_process(score)
    steps = check_count(steps, "steps")
    _check_size("eps", eps)
    levels = check_levels(times, sde.T)
    source = as_noise(noise)
    alpha, sigma = sde.alpha(levels), sde.sigma(levels)
    sizes = eps / 2 * (sigma / sigma[-1]) ** 2
    gains = torch.cat([alpha.new_ones(1), alpha[1:] / alpha[:-1]])
    states = []
    bound = _HUGE * max(1.0, float(x.abs().max()))
    with torch.no_grad(), _bar(steps * len(levels), progress) as bar:
        for i, (t, h, gain) in enumerate(zip(levels, sizes.tolist(), gains.tolist(), strict=True)):
            law = as_target(score, x, t)
            with full_precision(x.device.type):
                state = ULA().start(law, law.enter(gain * x), h, source)
                run = _Run(ULA(), state, h, source, bound, first=i * steps)
                x = run.walk(steps, 0, steps, bar)[0]
            if bool(run.diverged.any()):
                raise FloatingPointError(
                    f"{int(run.diverged.sum())} of {len(x)} chains diverged at level {i} (t ="
                    f" {float(t):.4g}): eps = {eps} is too large, or the score is not finite"
                )
            states.append(x)
    return torch.stack(states) if trajectory else x


class _Run:
    """The loop over the steps of one run."""

    def __init__(
        self,
        method: Method,
        state: State,
        h: float,
        noise: Noise,
        bound: float,
        first: int = 0,
    ) -> None:
        self.method, self.state, self.h, self.noise = method, state, h, noise
        self.bound, self.first = bound, first
        self.diverged = torch.zeros_like(state.h, dtype=torch.bool)
        # Only streams are the same however many steps are asked for together.
        n = state.x[0].numel()
        self.length = max(1, _RUN // n) if type(noise) is Streams else 1

    def walk(self, steps: int, warmup: int, thin: int, bar: Any) -> Tensor:
        """Take all steps and return what is kept, (steps // thin, chains, *D)."""
        state, method, h = self.state, self.method, self.h
        samples = _like(state.x, steps // thin)
        total = warmup + steps
        for k in range(0, total, self.length):
            size = min(self.length, total - k)
            for j, z in enumerate(zip(*self._normals(k), strict=True)):
                if j == size:
                    break
                method.step(state, h, z)
                done = k + j + 1 - warmup
                if done <= 0:
                    method.adapt(state, done + warmup - 1, warmup)
                elif done % thin == 0:
                    samples[done // thin - 1] = state.target.leave(state.x)
            self._watch(k + size)
            bar.update(size)
        return samples

    def _normals(self, k: int) -> list[Tensor]:
        """The draws of ``length`` steps from step k on, (length, C, *D) each."""
        x, method = self.state.x, self.method
        shapes = [x.shape[1:]] * method.normals + [torch.Size()] * method.decides
        return [self._draw(k, i, shape) for i, shape in enumerate(shapes)]

    def _draw(self, k: int, name: int, shape: torch.Size) -> Tensor:
        start, chains = float(self.first + k), len(self.state.x)
        one = self.state.x.new_empty(1)
        if self.length == 1:
            return self.noise(one.expand(chains, *shape), start, start + 1, name).unsqueeze(0)
        many = one.expand(chains, self.length, *shape)
        z = self.noise(many, start, start + self.length, name).transpose(0, 1)
        if not shape or not self.state.target.by_columns:
            return z.contiguous()
        return z.flatten(2).mT.contiguous().mT.unflatten(2, shape)

    def _watch(self, k: int) -> None:
        """Note which chains have diverged; raise when all have."""
        size = self.state.target.leave(self.state.x).abs()
        size = size.flatten(1).amax(1) if size.ndim > 1 else size
        self.diverged |= ~(size <= self.bound)
        if bool(self.diverged.all()):
            raise FloatingPointError(
                f"every chain diverged within {k} steps of {type(self.method).__name__} with"
                f" h = {self.h}: the step is too large, or the score is not finite"
            )

    def result(self, samples: Tensor, steps: int) -> Chains:
        """The chains as they are given back; those that diverged become NaN."""
        state, bad = self.state, self.diverged
        _tell(
            bad,
            "diverged and are NaN",
            f"the step h = {self.h} is too large there, or the score not finite",
        )
        samples[:, bad] = math.nan
        rate = None if state.accepts is None else state.accepts / steps
        if rate is not None and steps >= _ENOUGH:
            cure = "there; a (longer) warm-up finds its own"
            _tell(
                ~bad & (rate < _STUCK),
                f"hardly ever move (acceptance < {_STUCK})",
                f"h is too large {cure}",
            )
            # One chain may accept all by chance, or where the density is linear; not all of them.
            _tell(
                ~bad & (rate[~bad].mean() > _CREEPING),
                f"creep (mean acceptance > {_CREEPING})",
                f"h is too small {cure}",
            )
        return Chains(samples, state.h, bad, rate, state.v)


def _tell(these: Tensor, what: str, why: str) -> None:
    """Warn the caller of ``langevin`` of some of the chains."""
    if bool(these.any()):
        warnings.warn(
            f"{int(these.sum())} of {len(these)} chains {what}, the first are {_first(these)}:"
            f" {why}",
            RuntimeWarning,
            stacklevel=4,
        )


def _first(these: Tensor) -> list[int]:
    return these.nonzero().flatten().tolist()[:5]


def _like(x: Tensor, draws: int) -> Tensor:
    """Room for draws of x (C, *D), each laid out in memory as x is."""
    if x.is_contiguous() or x.ndim < 2:
        return x.new_empty(draws, *x.shape)
    room = x.new_empty(draws, x[0].numel(), len(x))
    return room.mT.unflatten(2, x.shape[1:])


def _bar(total: int, progress: bool) -> AbstractContextManager[Any]:
    if not progress:
        return nullcontext(_Silent())
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="chains", unit="step", leave=False)


class _Silent:
    def update(self, n: int) -> None:
        pass


def _check_size(name: str, value: float) -> None:
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_score(state: State) -> None:
    """Before the run, so that no chain starts where it cannot move."""
    s = state.target.score(state.x) if state.score is None else state.score
    bad = ~torch.isfinite(s)
    if bool(bad.any()):
        rows = _first(bad.reshape(len(bad), -1).any(1))
        raise FloatingPointError(
            f"the score is NaN or infinite where chains start, the first are {rows}: start"
            " elsewhere (x), or mend the target"
        )


def linear_process(score: object) -> LinearSDE:
    """The process of a score, which has noise levels.

    Raises:
        TypeError: it is no Score, or knows no linear process.
    """
    sde = score.sde if isinstance(score, Score) else None
    if not isinstance(sde, LinearSDE):
        raise TypeError(
            f"score must be a Score that knows its linear process (.sde), got {score!r}"
        )
    return sde


def check_levels(times: Tensor | Sequence[float], T: float) -> Tensor:
    """Falling times in (0, T], on the host."""
    levels = as_real(times, "times").cpu()
    if levels.ndim != 1 or len(levels) == 0:
        raise ValueError(f"times must be a 1-D grid of levels, got shape {tuple(levels.shape)}")
    check_finite(levels, "times")
    falls = bool((levels.diff() < 0).all())
    if not falls or float(levels[-1]) <= 0 or float(levels[0]) > T * (1 + 1e-12):
        raise ValueError(f"times must fall within (0, T] = (0, {T}], got {levels.tolist()}")
    return levels
