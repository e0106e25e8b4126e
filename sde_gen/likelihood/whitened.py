"""The probability flow around Gaussian data, in fixed multistep steps.

With y = x / alpha, w = (sigma / alpha)^2, and m, C the mean and covariance that are known of the
data (or 0 and their mean variance), the flow and its log density are

    dy = -1/2 s_y dw,      dl = -1/2 tr grad s_y dw,      s_y = alpha s(x),

l being the integral of the divergence. For Gaussian data z = (C + w)^(-1/2) (y - m) stands still.
So the state is stepped by ``Exponential`` with reference C, which is exact there, and of l only

    -1/2 int tr [grad s_y + (C + w)^-1] dw

is left to find: the rest is 1/2 log det (C + w), in closed form. The integrand is 0 for Gaussian
data, for every probe: random probes estimate the difference to a Gaussian law alone, which is a
control variate. They are taken in the coordinates of y, in which the Jacobian is symmetric and
their variance least.

The nodes are even in u = log(1 + w / V)^(1/8), V the mean variance: flows of images are rough in
w and in log w, and smooth in u. They depend on the process and their number alone, so a value does
not depend on the batch, and neither probes nor divergence choose a step. A node costs one call,
which serves the state, by the multistep formula, and the integral, by the polynomial of degree 5
through the six nodes nearest to each interval.

How far the steps are off is read from the same nodes. Along *any* path z(u) the density of a flow
z' = h obeys d log p / du = -div h + (z' - h) . grad log p, so a path that misses the flow is off

    int grad log p . (h - dz/du) du,

for which the score stands: the polynomials through the nodes have dz/du, and the nodes h. For
exact scores that is the error but for that of the quadrature; added to the value it would leave a
tenth to a thousandth of it. The score of a network is no gradient of its flow's density: there
it corrects nothing, and tells a size alone.

A flow whose score is finite at t = 0 starts at w_1 = 1e-8 V all the same. By the heat equation
dp/dw = 1/2 lap p the density at 0 is that at w_1 less w_1 / 2 (|s_y|^2 + tr grad s_y), to order
w_1^2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..moments import Coefficient, Moments, isotropic
from ..ops import sum_rest
from ..scores import Score
from ..sdes import LinearSDE, Reverse
from ..solvers import Exponential, Spectral
from ..solvers.base import Memory
from ..solvers.weights import lagrange
from .probes import forms, trace
from .watch import Watch

_POWER = 8
_LEAST, _MOST = 1e-8, 1e10
"""w / V where a flow from t = 0 starts, and where nothing is left of the data: z stands still."""
_DEGREE, _SETTLED = 5, 4
"""Of the polynomials; and the node whose score stands for those before it in the error bar."""


def reference(model: Score) -> Moments:
    """The Gaussian law that the flow is taken around: any will do, that of the data is best."""
    facts = model.facts
    moments = isotropic(facts.variance) if facts.moments is None else facts.moments
    values = moments.values
    if bool((values > 0).all()):
        return moments
    # A direction of no variance cannot be whitened: it takes the least that there is.
    some = values[values > 0]
    least = some.min() if len(some) else torch.ones((), dtype=values.dtype)
    return Moments(torch.where(values > 0, values, least), moments.mean, moments.basis)


def weights_of(u: np.ndarray, degree: int = _DEGREE) -> np.ndarray:
    """Weights q of the nodes u (N + 1,): sum_i q_i f(u_i) ~ the integral of f over them.

    Over each interval that of the polynomial of that degree through the nodes nearest to it, as
    many as there are.
    """
    n, size = len(u), min(degree + 1, len(u))
    nodes, gauss = np.polynomial.legendre.leggauss(_DEGREE)
    q = np.zeros(n)
    for i in range(n - 1):
        first = min(max(i + 1 - size // 2, 0), n - size)
        h = (u[i + 1] - u[i]) / 2
        near = slice(first, first + size)
        q[near] += lagrange(u[near], u[i] + h * (nodes + 1)) @ gauss * h
    return q


def slopes_of(u: np.ndarray) -> np.ndarray:
    """D (N + 1, N + 1) of the nodes u: sum_j D_ij f(u_j) ~ f'(u_i), by the polynomial through the
    seven nodes nearest to it, as many on either side."""
    n, size, tiny = len(u), min(_DEGREE + 2, len(u)), 1e-30
    d = np.zeros((n, n))
    for i in range(n):
        first = min(max(i - size // 2, 0), n - size)
        near = slice(first, first + size)
        # f(u + i h) = f(u) + i h f'(u): no difference, so no digit is lost.
        d[i, near] = lagrange(u[near], u[i : i + 1] + 1j * tiny)[:, 0].imag / tiny
    return d


class End(NamedTuple):
    """The state at a time as x = alpha m + spread z, and log |det dx/dz|."""

    alpha: float
    spread: Coefficient
    whiten: Coefficient
    log_det: float


class Run(NamedTuple):
    """z at T, log p_0 less log p_T(x_T) by each probe (B, K), and how far it may be off, (B,)."""

    z: Tensor
    gained: Tensor
    bias: Tensor


class Node(NamedTuple):
    """What is known at a node: z, the score of z, dz/du and the mean of the traces, (B,)."""

    z: Tensor
    score: Tensor
    speed: Tensor
    traced: Tensor


class _Kept(Exponential):
    """A correction keeps D: from the data on that has two thirds of the error where steps are few
    (mixture, 24: 0.0047 nats for 0.0072; ring, 96: 0.00015 for 0.00011)."""

    def _slope(self, w: float, h: float) -> np.ndarray:
        c: np.ndarray = self.reference.values.numpy()
        return -c / w


class Whitened:
    """The flow between the time ``start`` of the data and T.

    Args:
        flow: the probability flow of a linear process.
        moments: m and C > 0.
        n: number of coordinates.
        start: the first time.
        order: how many values a step interpolates: 3 gains more by more steps, but with too few
            it may be far off where 2 is not.
    """

    def __init__(
        self, flow: Reverse, moments: Moments, n: int, start: float, order: int = 3
    ) -> None:
        assert isinstance(flow.sde, LinearSDE)
        self.flow, self.sde, self.moments, self.start = flow, flow.sde, moments, start
        self.n, self.variance, self._values = n, moments.variance, moments.values.double()
        self._count = torch.ones(len(self._values), dtype=torch.float64)
        if moments.basis is not None or len(self._values) == 1:
            self._count[0] = n - len(self._values) + 1
        # Whitened data are nearly Gaussian, and nothing here is followed through noise to a mode.
        rule = Spectral(self.variance, n, ridge=0.02, power=0.4)
        self.solver = _Kept(order, moments, True, rule)
        low = self._share(start) if start else _LEAST
        high = self._share(self.sde.T)
        self.span = math.log1p(low) ** (1 / _POWER), math.log1p(high) ** (1 / _POWER)

    @property
    def alpha(self) -> float:
        """That of the first node."""
        return float(self.sde.alpha(self.nodes(1)[1][0]))

    def _share(self, t: float) -> float:
        """w / V at a time t > 0."""
        log_share = -float(self.sde.log_snr(t)) - math.log(self.variance)
        return math.exp(min(log_share, math.log(_MOST)))

    def _number(self, f: Tensor) -> Coefficient:
        return self.moments.coefficient(f.numpy())

    def _sum(self, f: Tensor) -> float:
        """sum over all directions; a floor that no direction is left for does not count."""
        return float((self._count * f)[self._count > 0].sum())

    def end(self, t: float) -> End:
        """Between x and z at the time t."""
        alpha, sigma = float(self.sde.alpha(t)), float(self.sde.sigma(t))
        total = alpha**2 * self._values + sigma**2
        half = self._sum(total.log()) / 2
        return End(alpha, self._number(total.sqrt()), self._number(total.rsqrt()), half)

    def white(self, x: Tensor, end: End) -> Tensor:
        """z of a state x."""
        moved = x if self.moments.mean is None else x - end.alpha * self._mean(x)
        return self.moments.apply((end.whiten,), (moved,))

    def state(self, z: Tensor, end: End) -> Tensor:
        """The state x of z."""
        x = self.moments.apply((end.spread,), (z,))
        return x if self.moments.mean is None else x + end.alpha * self._mean(x)

    def _mean(self, x: Tensor) -> Tensor:
        assert self.moments.mean is not None
        return self.moments.mean.to(x).reshape(x.shape[1:])

    def nodes(self, steps: int) -> tuple[np.ndarray, Tensor]:
        """u, rising, and the times there, (steps + 1,) each."""
        u = np.linspace(self.span[0], self.span[1], steps + 1)
        log_w = math.log(self.variance) + torch.from_numpy(np.log(np.expm1(u**_POWER)))
        times = self.sde.time_at(-log_w).clamp(0.0, self.sde.T)
        if self.start:
            times[0] = self.start
        if self._share(self.sde.T) < _MOST:
            times[-1] = self.sde.T
        return u, times

    def move(self, x: Tensor, steps: int, back: bool = False) -> Tensor:
        """The state alone: x at T from x at the first node, or with ``back`` the other way."""
        _, times = self.nodes(steps)
        times = times.flip(0) if back else times
        if back:
            x = self.state(self.white(x, self.end(self.sde.T)), self.end(float(times[0])))
        memory: Memory = ()
        for step in self.solver.maps(self.flow, times):
            x, memory = step.numbers(x, self.flow.evaluate(x, step.t).score, memory, None)
        if back:
            return x
        return self.state(self.white(x, self.end(float(times[-1]))), self.end(self.sde.T))

    def run(self, x: Tensor, steps: int, probes: Tensor | None, watch: Watch) -> Run:
        """From data to T, with the divergence: steps + 1 calls.

        Args:
            x: alpha times the data (B, *D), alpha that of ``start``.
            steps: how many.
            probes: signs (K, B, *D); None for the exact trace.
            watch: is told of every call.
        """
        u, times = self.nodes(steps)
        plan, memory = self.solver.maps(self.flow, times), tuple[Tensor, ...]()
        rates = -0.5 * self.variance * np.exp(u**_POWER) * _POWER * u ** (_POWER - 1)
        q, first, path = weights_of(u), self.end(float(times[0])), list[Node]()
        x = x * (first.alpha / float(self.sde.alpha(self.start)))
        total = x.new_zeros(())
        for i, t in enumerate(times.tolist()):
            w = self.variance * math.expm1(u[i] ** _POWER)
            s, traced = self.read(x, t, w, probes)
            watch.tick()
            total = total + q[i] * rates[i] * traced
            path.append(self._node(x.detach(), s.detach(), traced.detach(), t, rates[i], w))
            if not i and not self.start:
                size = first.alpha**2 * sum_rest(s.square()).unsqueeze(1)
                total = total - w / 2 * (size + traced - self._sum(1 / (self._values + w)))
            if i < steps:
                x, memory = plan[i].numbers(x, s, memory, None)
        z, last = self.white(x, self.end(t)), self.end(self.sde.T)
        volume = last.log_det - first.log_det + self.n * math.log(first.alpha)
        return Run(z, total + volume, off(u, rates, path))

    def _node(self, x: Tensor, s: Tensor, traced: Tensor, t: float, rate: float, w: float) -> Node:
        """z, s_z = (C + w)^(1/2) s_y, and z' = -1/2 (C + w)^-1 (z + s_z) dw/du."""
        end = self.end(t)
        z, s_z = self.white(x, end), self.moments.apply((end.spread,), (s,))
        f = self._number(rate / (self._values + w))
        return Node(z, s_z, self.moments.apply((f,), (z + s_z,)), traced.mean(1))

    def read(self, x: Tensor, t: float, w: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """The score (B, *D), and tr [grad s_y + (C + w)^-1] by each probe, (B, K)."""
        s, pull = torch.func.vjp(lambda x: self.flow.evaluate(x, t).score, x)  # type: ignore[misc]
        square, inverse = float(self.sde.alpha(t)) ** 2, 1 / (self._values + w)
        if probes is None:
            traced = square * trace(pull, x).unsqueeze(1) + self._sum(inverse)
        else:
            f = self._number(inverse)
            rest = [sum_rest(e * self.moments.apply((f,), (e,))) for e in probes.to(x)]
            traced = square * forms(pull, probes, x.dtype) + torch.stack(rest, 1)
        check_read(x, s, traced)
        return s, traced if x.device.type == "mps" else traced.double()


def off(u: np.ndarray, rates: np.ndarray, path: list[Node]) -> Tensor:
    """How far log p may be off (B,): twice what the path misses of the flow, times the score, and
    what the integral of the trace is off from one by polynomials of degree 3.

    A network's score is worst where noise is least, and steps of a multistep formula
    are worst where it starts: at the first nodes the score of a later one stands for theirs.
    """
    q, d, settled = weights_of(u), slopes_of(u), min(_SETTLED, len(u) - 1)
    less = (q - weights_of(u, 3)) * rates
    missed = change = path[0].z.new_zeros(())
    for i, (_, _, speed, traced) in enumerate(path):
        near = d[i].nonzero()[0]
        moved = sum(float(d[i, j]) * path[j].z for j in near)
        score = path[max(i, settled)].score
        missed = missed + q[i] * sum_rest(score * (speed - moved))
        change = change + less[i] * traced
    return 2 * missed.abs() + change.abs()


def check_read(x: Tensor, s: Tensor, traced: Tensor) -> None:
    """Raise ``FloatingPointError`` where a finite state has a score or divergence that is not."""
    sound = torch.isfinite(s.flatten(1)).all(1) & torch.isfinite(traced).all(1)
    bad = torch.isfinite(x.flatten(1)).all(1) & ~sound
    if bool(bad.any()):
        raise FloatingPointError(
            f"the score or its divergence is NaN or infinite for {int(bad.sum())} of {len(x)}"
            " states, which are finite"
        )
