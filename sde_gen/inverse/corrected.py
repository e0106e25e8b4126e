"""Draws from a product of powers of laws, where the sum of their scores draws from another.

Let p_i,t be noised laws of one process, s_i their scores, and q_t proportional to
prod_i p_i,t^a_i, with score S = sum_i a_i s_i and A = sum_i a_i. A reversal by S does not follow
q_t. What it gets wrong is known without any density (Skreta et al. 2025): each p_i,t obeys its
Fokker-Planck equation, so what that of q_t lacks can be written with scores alone, and is made
good by weights on particles. Here the steps have a Langevin part of temperature 1 / A,

    dx = [b - (1 + A eta^2) / 2 g^2 S / A] dt + eta g dW,      time running from T to 0,

under which the logarithm of the weight of a particle grows, in lambda = log(alpha / sigma), by

    d log w = sigma^2 [ |S|^2 / A - sum_i a_i |s_i|^2 + (1 / A - 1) div S ] dlambda,

for every eta. (The first two terms are -1 / 2A sum_ij a_i a_j |s_i - s_j|^2: how far the experts
differ.) If all experts are Gaussians of one covariance and one mean, all weights are equal, for
every A. For A = 1, as in guidance, no divergence is asked for; else it is read from random signs
(Hutchinson 1990), exactly where there are as many as numbers in a sample.

The steps are those of ``Exponential(2, corrector=True)``, the weights' integral is the
trapezoidal rule, and particles are resampled where the weights have become uneven. So the law, and
the integral of prod_i p_i^a_i, are exact as the particles and the steps grow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..likelihood.probes import forms, hadamard_size, orthogonal_signs
from ..moments import isotropic
from ..noise import Streams
from ..ops import all_finite, check_count, check_number, full_precision, sum_rest, user_precision
from ..scores import Score
from ..sdes import LinearSDE
from ..solvers import Exponential
from ..solvers.exponential import Combination
from .cloud import Cloud, Draws
from .particles import Particles, falling, repeated, warn
from .whitened import check_prior

_NOISE = 1e3
"""How much wider than the data the noise is at the start of a process that leaves nothing of
them."""


def corrected(
    score: Score,
    count: int = 600,
    steps: int = 100,
    seed: int | None = None,
    *,
    eta: float = 1.0,
    probes: int = 2,
    times: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Particles:
    """Draw from the law that a guided score means: prod_i p_i^a_i / Z, with log Z.

    What is meant is read from the score: a sum of scores times numbers is the product of their
    laws to these powers; ``Classifier`` and ``ClassifierFree``, a law times p(y | x) to a power;
    ``Tempered`` and ``Product`` say it themselves.

    Args:
        score: what guides. Where it is bound for R rows of labels, there are R systems of
            particles, as in ``particles``.
        count: N, particles a system.
        steps: evaluations of the score a particle.
        seed: particle i of system r is a function of (seed, r N + i) and of the others of r; None
            draws a seed from torch.
        eta: noise level of the steps, > 0: particles that were copied must part.
        probes: random signs a divergence, for powers that do not sum to 1; each is a
            backward pass.
        times, dtype, chunk: as in ``particles``.

    Returns:
        Weighted particles; ``log_evidence`` is log Z, the integral of prod_i p_i^a_i, up to the
        square of what is left of the data at T (of latents, the integral over these).

    Raises:
        TypeError, ValueError: a score of no linear process; weights that are no numbers (intervals
            change the law that is meant); powers whose sum is not positive; a count below 2.
        FloatingPointError: weights that are not finite.

    Warns:
        RuntimeWarning: where the effective number of particles fell below 10.

    >>> from sde_gen import EDM, Gaussian
    >>> a, b = (Gaussian(EDM(), torch.tensor([m]).double(), 1.0) for m in (-1.0, 1.0))
    >>> found = corrected(a + b, 2000, 40, seed=0)
    >>> bool(abs(found.mean) < 0.06), bool(abs(found.std - 0.5**0.5) < 0.05)
    (True, True)
    >>> exact = -0.5 * math.log(4 * math.pi) - 1.0  # of N(m_a - m_b; 0, 2)
    >>> bool(abs(found.log_evidence - exact) < 0.1)
    True
    """
    check_prior(score, "corrected")
    if score.factor:
        raise ValueError("classifiers alone are the score of no law: add that of the data")
    shape = score.inside
    if shape is None:
        raise TypeError("corrected needs a score that knows the shape of its data (facts.shape)")
    count, eta = check_count(count, "count", 2), check_number(eta, "eta", above=0)
    probes, systems = check_count(probes, "probes"), score.batch or 1
    assert isinstance(score.sde, LinearSDE)
    grid = _from_signal(score.sde, falling(score.sde, score, steps, times), score.facts.variance)
    bound = score.batch is not None
    score = repeated(score, systems, count)
    run = _Run(score, probes, chunk)
    noise, cloud = Draws(seed, systems), Cloud(systems, count, score.device)
    blank = torch.empty(systems * count, *shape, dtype=dtype, device=score.device)
    with torch.no_grad(), full_precision(score.device.type):
        x = run.walk(blank, grid, eta, noise, cloud)
    cloud.finish()
    if not all_finite(cloud.log_z):
        raise FloatingPointError("the weights of the particles are not finite: is the score?")
    units = score.facts.units
    volume = 0.0 if units is None or not units.affine else units.log_volume(shape)
    log_z = cloud.log_z + run.log_start + (1 - run.total) * volume
    x = score.facts.decode(x).unflatten(0, (systems, count))
    ess = torch.stack(cloud.ess, 1)
    warn(ess, count)
    found = (x, cloud.log_w, log_z, cloud.standard_error, ess)
    x, log_w, log_z, error, ess = found if bound else (part[0] for part in found)
    return Particles(x, log_w, log_z, error, ess, count * (len(grid) - 1))


class _Run:
    """Reading S and the rate of the weights along a run.

    Attributes:
        total: A, the sum of the powers.
        log_start: log of the integral of prod_i p_i,T^a_i in x / alpha, all experts taken for
            Gaussians of the data's deviation.
    """

    total: float = 1.0
    log_start: float = 0.0

    def __init__(self, score: Score, probes: int, chunk: int | None) -> None:
        self.score, self.probes, self.chunk = score, probes, chunk

    def walk(self, x: Tensor, grid: Tensor, eta: float, noise: Draws, cloud: Cloud) -> Tensor:
        """From T to 0: the particles at the end; their weights are in the cloud."""
        sde, v, streams = self.score.sde, self.score.facts.variance, noise.streams
        assert isinstance(sde, LinearSDE)
        self._start(x, float(grid[0]))
        root = math.sqrt(self.total)
        spread = (float(sde.alpha(grid[0])) ** 2 * v + float(sde.sigma(grid[0])) ** 2) ** 0.5
        x = spread / root * streams.start(x)
        # Steps for S / A at noise level sqrt(A) eta, whose normals are divided by sqrt(A).
        solver = Exponential(2, isotropic(v), corrector=True)
        plan = solver.plan(sde.reverse(_plain, root * eta), grid)
        memory: tuple[Tensor, ...] = ()
        for i, (step, length) in enumerate(zip(plan, _trapezoid(sde, grid), strict=True)):
            s, rate = self._read(x, step.t, Streams(streams.seed + 1 + i))
            cloud.weigh(length * rate)
            chosen = cloud.resample(noise, step.t)
            if chosen is not None:
                x, s, memory = x[chosen], s[chosen], tuple(q[chosen] for q in memory)
            z = streams(x, step.t, step.s) / root
            assert isinstance(step.numbers, Combination)
            x, memory = step.numbers(x, s / self.total, memory, z)
        return x

    def _start(self, x: Tensor, t: float) -> None:
        """What the powers are, from one look at a few states."""
        sde, n = self.score.sde, x[0].numel()
        assert isinstance(sde, LinearSDE)
        few = slice(0, min(len(x), 2))
        some = float(sde.sigma(t)) * Streams(0).start(x[few])
        a = self.total = sum(w for w, _ in self.score.rows(few).factors(some, t))
        if not a > 0:
            raise ValueError(f"the powers sum to {a:g}: the product has no density at large noise")
        w = self.score.facts.variance + float((sde.sigma(t) / sde.alpha(t)) ** 2)
        self.log_start = 0.5 * n * ((1 - a) * math.log(2 * math.pi * w) - math.log(a))

    def _read(self, x: Tensor, t: float, signs: Streams) -> tuple[Tensor, Tensor]:
        """S (B, *D) and the rate (B,) of log w in lambda."""
        size = len(x) if self.chunk is None else self.chunk
        parts = [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]
        found = [self._part(x[part], t, part, signs) for part in parts]
        s, rate = (torch.cat(each) for each in zip(*found, strict=True))
        assert isinstance(self.score.sde, LinearSDE)
        return s, float(self.score.sde.sigma(t)) ** 2 * rate

    def _part(self, x: Tensor, t: float, part: slice, signs: Streams) -> tuple[Tensor, Tensor]:
        score, a = self.score.rows(part), self.total

        def total(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            with user_precision(x.device.type):
                each = score.factors(x, t)
            s = sum((w * s for w, s in each[1:]), each[0][0] * each[0][1])
            squares = sum(w * sum_rest(s.double().square()) for w, s in each)
            return s, (s, sum_rest(s.double().square()) / a - squares)

        if abs(a - 1) < 1e-9:
            return total(x)[1]
        _, pull, (s, rate) = torch.func.vjp(total, x, has_aux=True)  # type: ignore[misc]
        probes = min(self.probes, hadamard_size(x[0].numel()))
        e = orthogonal_signs(x, probes, signs.rows(part))
        divergence = forms(pull, e, x.dtype).double().mean(1)
        return s, rate + (1 / a - 1) * divergence


def _plain(x: Tensor, t: Tensor) -> Tensor:
    raise NotImplementedError  # a plan asks for no score


def _from_signal(sde: LinearSDE, grid: Tensor, v: float) -> Tensor:
    """The grid, begun where something is left of the data: the weights are an integral over
    lambda, and a product of powers has one where alpha > 0."""
    if float(sde.alpha(grid[0])) > 0:
        return grid
    least = min(-0.5 * math.log(v) - math.log(_NOISE), float(sde.log_snr(grid[1])) / 2 - 1)
    return torch.cat([sde.time_at(2 * least).reshape(1).to(grid), grid[1:]])


def _trapezoid(sde: LinearSDE, grid: Tensor) -> list[float]:
    """What each node counts for in an integral over lambda; from the last on, where the rate falls
    as w = exp(-2 lambda), its half."""
    lam = sde.log_snr(grid[:-1]) / 2
    half = torch.cat([lam.new_zeros(1), lam.diff() / 2, lam.new_zeros(1)])
    lengths = half[:-1] + half[1:]
    lengths[-1] += 0.5
    return [float(h) for h in lengths]
