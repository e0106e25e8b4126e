"""Adaptive steps: every sample has its own, and accepts or rejects it alone.

A pair of methods of different order, which share their calls, gives with each trial an estimate of
its local error. Its root mean square over the numbers of *one* sample decides on that sample, so
what a sample becomes does not depend on its neighbours; samples that have arrived leave the batch.

The reversals of linear processes are stepped where they are tame. With y = x / alpha,
w = (sigma / alpha)^2 and C the variance of the data,

    z = y / sqrt(C + w),      u = log(1 + w / C)^(1/4),
    dz = -2 u^3 [z + (1 + eta^2) sqrt(C + w) alpha s(x)] du + 2 eta u^(3/2) dW,

s being the score. For Gaussian data of mean 0 that is z' = 2 eta^2 u^3 z with unit variance: a
stationary Ornstein-Uhlenbeck process, and for eta = 0 a point at rest. Errors in z count alike at
all times, and the clock u spreads the work evenly: it is the square root of VP's time.

An SDE reads one Brownian path per sample that is fixed before the first step. A rejected trial
has seen a piece of the path; the next one sees the same piece, bridged at a finer time. So
rejection cannot bend the law, and tightening the tolerance converges to the same paths.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..facts import facts_of
from ..noise import BrownianPath, Noise, Streams
from ..ops import Time, act, as_time, check_count, check_number, match, on_host
from ..sdes import SDE, LinearSDE, Reverse
from .base import Memory, Solver, Step, check_drift, drift
from .runge_kutta import DORMAND_PRINCE, slope

_MOST = math.log(1e14)
"""log(w / C) that stands for infinity: z stands still where no signal is left."""


class Standard(SDE):
    """The reversal of a linear process in z and u (see above), from time t to time s."""

    def __init__(self, process: Reverse, variance: float, t: float, s: float) -> None:
        assert isinstance(process.sde, LinearSDE)
        self.process, self.sde, self.variance, self.ends = process, process.sde, variance, (t, s)
        self.direction = process.direction

    def clock(self, t: float) -> float:
        """u at the time t, from 0 at t = 0."""
        log_share = -float(self.sde.log_snr(t)) - math.log(self.variance) if t else -math.inf
        return float(np.logaddexp(0, _MOST if log_share == math.inf else log_share)) ** 0.25

    def scale(self, t: float) -> float:
        """x = scale z."""
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        return math.sqrt(alpha**2 * self.variance + sigma**2)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """dz/du, (B, *D), in the new variables."""
        u = as_time(t)
        # w = C (exp(u^4) - 1) overflows where hardly any signal is left.
        log_w = math.log(self.variance) + u**4 + torch.log(-torch.expm1(-(u**4)))
        time = self.sde.time_at(-log_w).clamp(min(self.ends), max(self.ends))
        scale = torch.sqrt(self.sde.alpha(time) ** 2 * self.variance + self.sde.sigma(time) ** 2)
        state = match(scale, x) * x
        score = self.process.evaluate(state, time).score
        if on_host(x.device):
            check_drift(self.process, score, state, time)
        kappa = 1 + self.process.eta**2
        return match(-2 * u**3, x) * (x + match(kappa * scale, x) * score)

    def diffusion(self, t: Time) -> Tensor:
        """dz/dW, the root of the variance that z gains per unit of u."""
        return 2 * self.process.eta * as_time(t) ** 1.5

    def rows(self, index: slice | Tensor) -> Standard:
        """The same of these rows."""
        return Standard(self.process.rows(index), self.variance, *self.ends)


class _Trial(NamedTuple):
    """A step tried: the state, the estimate of its error, and what the next step needs."""

    x: Tensor
    error: Tensor
    carry: Tensor


class _Pair(Protocol):
    """Two methods that share their calls; the local error of the lower falls like h^rate.

    ``gains``: exponents of the controller, times rate, and the most that a step may grow.
    """

    rate: float
    gains: tuple[float, float, float]

    def start(self, process: SDE, x: Tensor, t: Tensor, path: Noise) -> Tensor:
        """What a step needs beside the state, (B, *D): the drift, or the path."""

    def speed(self, carry: Tensor) -> Tensor:
        """How fast the state moves at the start (B,), as far as it is known for nothing."""

    def trial(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, carry: Tensor, path: Noise
    ) -> _Trial:
        """A step from t (B,) to s (B,)."""


class _DormandPrince:
    """Order 5 with an error estimate of order 4; six calls, as the last is the next's first."""

    rate, gains = 5.0, (0.7, 0.4, 3.0)

    def start(self, process: SDE, x: Tensor, t: Tensor, path: Noise) -> Tensor:
        return drift(process, x, t)

    def speed(self, carry: Tensor) -> Tensor:
        return _rms(carry)[0]

    def trial(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, carry: Tensor, path: Noise
    ) -> _Trial:
        table, k, h = DORMAND_PRINCE, [carry], match(s - t, x)
        for c, row in zip((*table.c[1:], 1.0), table.a[1:], strict=True):
            x_s = x + h * slope(row, k)
            k.append(drift(process, x_s, s if c == 1 else t + c * (s - t)))
        return _Trial(x_s, h * slope(table.error, k), k[-1])


class _HeunEuler:
    """Heun's method (weak order 2) with Euler-Maruyama inside it, on a Brownian path; two calls.

    int g dW is read as sqrt(mean of g^2) times the increment, the mean by Simpson's rule; where g
    is a matrix, as its own mean times the increment.
    """

    # The estimate is as random as the noise: a controller that follows it closely is often wrong.
    rate, gains = 1.5, (0.3, 0.0, 1.5)

    def start(self, process: SDE, x: Tensor, t: Tensor, path: Noise) -> Tensor:
        assert isinstance(path, BrownianPath)
        return path.at(x, t)

    def speed(self, carry: Tensor) -> Tensor:
        return torch.zeros(len(carry), dtype=torch.float64)

    def trial(
        self, process: SDE, x: Tensor, t: Tensor, s: Tensor, carry: Tensor, path: Noise
    ) -> _Trial:
        assert isinstance(path, BrownianPath)
        w_s, h = path.at(x, s), match(s - t, x)
        # A path is walked back as it is walked forth: time that falls takes W(t) - W(s).
        jump = act(_mean_noise(process, t, s), match(torch.sign(s - t), x) * (w_s - carry))
        b_t = drift(process, x, t)
        end = x + h * b_t + jump
        half = h / 2 * (drift(process, end, s) - b_t)
        return _Trial(end + half, half, w_s)


def _mean_noise(process: SDE, t: Tensor, s: Tensor) -> Tensor:
    """The root of the mean of g^2 over [t, s] by Simpson's rule; of a matrix its mean."""
    a, b, c = (process.diffusion(v) for v in (t, (t + s) / 2, s))
    if a.ndim > 1:
        return (a + 4 * b + c) / 6
    return torch.sqrt((a**2 + 4 * b**2 + c**2) / 6)


def _rms(*states: Tensor) -> Tensor:
    """Root mean square of each sample of k states: float64 (k, B) on the CPU, in one transfer."""
    flat = [y.detach().reshape(len(y), -1) for y in states]
    norms = torch.stack([torch.linalg.vector_norm(y, dim=1) for y in flat])
    return norms.cpu().double() / math.sqrt(flat[0].shape[1])


class _Samples(NamedTuple):
    """The samples under way, a row each: number in the batch, state, time, the step to try, the
    last error accepted, and what the pair carries."""

    number: Tensor
    x: Tensor
    t: Tensor
    h: Tensor
    error: Tensor
    carry: Tensor

    def rows(self, index: Tensor) -> _Samples:
        return _Samples(*(v[index] for v in self))


class Adaptive(Solver):
    """Steps of a size of its own for each sample, from an estimate of the local error.

    ODEs: Dormand & Prince 1980, 5(4), six calls a trial and one at the start. SDEs: Heun's method
    with Euler-Maruyama, two calls a trial, on a ``BrownianPath`` (made of the seed where the noise
    is ``Streams``). A trial is accepted where

        rms(error) <= atol + rtol max(rms(x_t), rms(x_s)),

    the root mean squares running over one sample; a PI controller (Gustafsson 1991) sets the
    next step. Errors are those of z (see the module's text) where the process is the reversal of
    a linear one that knows ``time_at`` in closed form, of x for every other process; there a
    typical size of x other than 1 calls for its own atol.

    The grid gives the times at which all samples are to arrive: two for the end alone, more for
    a trajectory. ``order``, ``weak`` and ``strong`` are in the mean number of steps; ``calls``
    are those of one trial on an ODE. On an SDE the tolerance bounds the error of a *path*: 0.05 is
    enough for the law of most data, and a tenth of it takes five times the calls.

    Args:
        rtol, atol: relative and absolute tolerance of one step.
        max_steps: how many trials an interval of the grid may take.

    Raises:
        ValueError: a tolerance that is not positive, max_steps < 1.
        TypeError: on an SDE, a noise that has no path (``Impulses``).
        RuntimeError: some samples have not arrived after max_steps trials.
        FloatingPointError: drift or error are not finite, however short the step.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, solver=sg.Adaptive(1e-4, 1e-4), seed=0).shape
    torch.Size([8, 2])
    """

    order = 5
    weak = 1
    strong = 1.0
    calls = 6
    evaluates_end = True
    own_steps = True

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-3, max_steps: int = 10_000) -> None:
        self.rtol = check_number(rtol, "rtol", above=0)
        self.atol = check_number(atol, "atol", above=0)
        self.max_steps = check_count(max_steps, "max_steps")

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """From t to s in as many steps as each sample needs."""
        tame = standard(process, step)
        if tame is None:
            return self._run(process, x, step.t, step.s, noise, memory)
        z = x / tame.scale(step.t)
        t, s = tame.clock(step.t), tame.clock(step.s)
        z, memory = self._run(tame, z, t, s, noise, memory)
        return z * tame.scale(step.s), memory

    def _run(
        self, process: SDE, x: Tensor, t: float, s: float, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """From time t to time s, all samples."""
        pair: _Pair = _DormandPrince()
        path = noise
        if process.direction != 0:
            pair, path = _HeunEuler(), _path(noise)
            path.check_step(t, s)
        way, arrived = self._start(pair, process, x, t, s, path, memory), list[_Samples]()
        for _ in range(self.max_steps):
            way, there = self._try(pair, process, way, s, path)
            if bool(there.any()):
                arrived.append(way.rows(there.nonzero().flatten()))
                left = (~there).nonzero().flatten()
                way, process, path = way.rows(left), process.rows(left), path.rows(left)
            if not len(way.number):
                order = torch.cat([v.number for v in arrived]).argsort()
                _, x, _, *memory_ = (torch.cat(v)[order] for v in zip(*arrived, strict=True))
                return x, tuple(memory_)
        last = int(way.number[((way.t - s).abs()).argmax()])
        raise RuntimeError(
            f"{len(way.number)} of {len(x)} samples have not arrived after max_steps ="
            f" {self.max_steps} trials, the last of them sample {last}: raise rtol and atol, or"
            " max_steps"
        )

    def _start(
        self,
        pair: _Pair,
        process: SDE,
        x: Tensor,
        t: float,
        s: float,
        path: Noise,
        memory: Memory,
    ) -> _Samples:
        n = len(x)
        times = torch.full((n,), t, dtype=torch.float64)
        number = torch.arange(n)
        if memory:
            h, error, carry = memory
            return _Samples(number, x, times, h, error, carry)
        carry = pair.start(process, x, times, path)
        (size,) = _rms(x)
        speed = pair.speed(carry)
        if not bool(torch.isfinite(speed).all()):
            raise FloatingPointError(f"the drift is not finite at t = {t:.6g}")
        scale = (self.atol + self.rtol * size) / (self.atol + size)
        length = torch.minimum(
            torch.tensor(abs(s - t)), (self.atol + size) / speed.clamp_min(1e-300)
        )
        h = scale ** (1 / pair.rate) * length
        return _Samples(number, x, times, h, torch.ones_like(h), carry)

    def _try(
        self, pair: _Pair, process: SDE, way: _Samples, s: float, path: Noise
    ) -> tuple[_Samples, Tensor]:
        """One trial of every sample; the samples after it, and which of them have arrived."""
        rest = s - way.t
        least = 1e-12 * torch.maximum(way.t, rest.abs())
        if isinstance(path, BrownianPath) and process.direction != 0:
            least = torch.maximum(least, 2 * path.resolution * way.t.clamp_min(s))
        # What is left is cut into equal steps, so that none is a sliver.
        parts = (rest.abs() / torch.maximum(way.h, least) - 0.05).ceil().clamp_min(1)
        t_s = torch.where(parts == 1, s, way.t + rest / parts)
        h = (t_s - way.t).abs()
        trial = pair.trial(process, way.x, way.t, t_s, way.carry, path)
        before, after, error = _rms(way.x, trial.x, trial.error)
        size = torch.maximum(before, after)
        error = error / (self.atol + self.rtol * size)
        error = error.where(torch.isfinite(error) & torch.isfinite(size), math.inf)
        accepted = error <= 1
        self._check(way, error, h <= 1.05 * least)
        mask = accepted.to(way.x.device).reshape(-1, *(1,) * (way.x.ndim - 1))
        way = _Samples(
            way.number,
            torch.where(mask, trial.x, way.x),
            torch.where(accepted, t_s, way.t),
            h * _factor(pair, error, way.error, accepted),
            torch.where(accepted, error.clamp_min(1e-4), way.error),
            torch.where(mask, trial.carry, way.carry),
        )
        return way, accepted & (parts == 1)

    def _check(self, way: _Samples, error: Tensor, shortest: Tensor) -> None:
        """Raise where a step is rejected that can hardly be shorter."""
        stuck = (error > 1) & shortest
        if bool(stuck.any()):
            i = int(stuck.nonzero()[0])
            what = "is still too large" if math.isfinite(float(error[i])) else "is not finite"
            raise FloatingPointError(
                f"the error of sample {int(way.number[i])} {what} in the shortest step from"
                f" {float(way.t[i]):.6g}: the drift is NaN, infinite or not smooth there, or the"
                f" tolerance too small for the precision of {way.x.dtype}"
            )


def _factor(pair: _Pair, error: Tensor, last: Tensor, accepted: Tensor) -> Tensor:
    """How much longer the next step is: by this error and the last when accepted."""
    k_i, k_p, most = pair.gains
    forth = 0.9 * error ** (-k_i / pair.rate) * last ** (k_p / pair.rate)
    back = 0.9 * error ** (-1 / pair.rate)
    return torch.where(accepted, forth.clamp(0.2, most), back.clamp(0.1, 0.9))


def standard(process: SDE, step: Step) -> Standard | None:
    """The process in z and u where that is possible and cheap."""
    if not (isinstance(process, Reverse) and isinstance(process.sde, LinearSDE)):
        return None
    if type(process.sde).time_at is LinearSDE.time_at:
        return None
    std = facts_of(process.score).std
    return Standard(process, std**2 if std > 0 else 1.0, step.t, step.s)


def _path(noise: Noise) -> BrownianPath:
    if isinstance(noise, BrownianPath):
        return noise
    if isinstance(noise, Streams):
        return BrownianPath(noise.seed, noise.samples)
    raise TypeError(
        "Adaptive reads a Brownian path between any two times: give a seed, Streams or"
        f" BrownianPath, got {type(noise).__name__}"
    )
