"""Is a sampler of posteriors calibrated? Tests that need pairs of a truth and its observation.

If x* ~ p(x) and o ~ p(o | x*), then x* is one more draw from p(x | o): it is exchangeable with
the draws of a right sampler (Talts et al. 2018). So for any function f the rank of f(x*) among the
f of S draws is uniform on 0 .. S, exactly, for any S and any number of observations:

- *ranks*, f a random projection: Kolmogorov-Smirnov for each, and Holm's bound over all;
- *TARP*, f the distance from a random reference point (Lemos et al. 2023);
- *coverage* of central intervals of the projections, inside exact binomial bounds;
- *chi-square*, |o - A x|^2 in units of the noise for one draw each, which is chi-square of m
  degrees: x and o have the joint law of x* and o.

Where no truth is known, ``kernel_stein`` compares draws with a score alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..ops import check_count, check_finite, check_state
from .observation import Observation, joint

LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Check:
    """One line of the table: a statistic, what it must stay within, and its p-value.

    >>> from sde_gen import inverse
    >>> inverse.Check("ranks", 0.03, 0.0, 0.053, 0.4).value
    0.03
    """

    name: str
    value: float
    low: float
    high: float
    p: float

    @property
    def passed(self) -> bool:
        """Whether the value lies between low and high."""
        return self.low <= self.value <= self.high


@dataclass(frozen=True, eq=False)
class Calibration:
    """What ``calibrate`` found: a table when printed.

    Attributes:
        checks: the lines of the table.
        ranks: (R, P), in (0, 1), of each truth in each projection: even in each column.
        tarp: (R,), in (0, 1), the credibility at which the region around a reference point meets
            the truth: even.
        size: the chance that a right sampler fails any one line.

    >>> from sde_gen import inverse
    >>> truths = torch.randn(20, 2)
    >>> report = inverse.calibrate(truths, torch.randn(20, 15, 2))
    """

    checks: tuple[Check, ...]
    ranks: Tensor
    tarp: Tensor
    size: float

    @property
    def passed(self) -> bool:
        """Whether all lines passed."""
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the lines that failed."""
        return tuple(check.name for check in self.checks if not check.passed)

    def __str__(self) -> str:
        r, p = self.ranks.shape
        verdict = "calibrated" if self.passed else "NOT calibrated"
        lines = [
            f"{verdict}: {r} observations, {p} projections; a right sampler fails a line in"
            f" {self.size:.2g} of cases",
            f"{'':22s}{'found':>10s}{'bounds':>20s}{'p':>10s}",
        ]
        for c in self.checks:
            bounds = f"{c.low:.3f} .. {c.high:.3f}"
            mark = "" if c.passed else "  <-"
            lines.append(f"{c.name:22s}{c.value:10.3f}{bounds:>20s}{c.p:10.2g}{mark}")
        return "\n".join(lines)

    def curve(self, points: int = 101) -> tuple[Tensor, Tensor]:
        """For a picture: levels, and the share of truths within the TARP region of each."""
        levels = torch.linspace(0, 1, points, dtype=torch.float64)
        return levels, (self.tarp.unsqueeze(1) <= levels).double().mean(0)


def calibrate(
    truths: Tensor,
    draws: Tensor,
    observations: Observation | Sequence[Observation] | None = None,
    projections: int = 32,
    size: float = 1e-3,
    seed: int = 0,
) -> Calibration:
    """Test a sampler by what it drew for observations whose truths are known.

    Args:
        truths: x* (R, *D), independent draws from the prior.
        draws: (R, S, *D), S draws of equal weight for each observation, in no order
            (``Particles.draw``).
        observations: what was observed, with a row for each truth, for the chi-square.
        projections: random directions, of the coordinates in units of their spread.
        size: the chance that a right sampler fails one line.
        seed: of the directions, the reference points and the ties.

    Raises:
        TypeError, ValueError: shapes that do not fit, fewer than 20 truths or 3 draws, NaN.

    >>> g = torch.Generator().manual_seed(0)
    >>> truths, draws = (torch.randn(200, *s, 2, generator=g) for s in ((), (50,)))
    >>> print(calibrate(truths, draws, projections=4))
    calibrated: 200 observations, 4 projections; a right sampler fails a line in 0.001 of cases
                               found              bounds         p
    ranks, KS (Holm)           ...
    >>> calibrate(truths, 1.5 * draws).failed
    ('ranks, KS (Holm)', ...)
    """
    x, y = _flat(truths, draws)
    generator = torch.Generator().manual_seed(seed)
    check_count(projections, "projections")
    spread = x.std(0)
    x, y = x / torch.where(spread > 0, spread, 1.0), y / torch.where(spread > 0, spread, 1.0)
    theta = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    theta = theta / theta.norm(dim=0)
    ranks = _ranks(x @ theta, y @ theta, generator)
    # A reference that knows nothing of its own truth: another truth.
    reference = x.roll(1, 0)
    near = [(z - reference.unsqueeze(1)).norm(dim=-1) for z in (x.unsqueeze(1), y)]
    tarp = _ranks(near[0], near[1].unsqueeze(-1), generator).squeeze(-1)
    checks = [_holm(ranks, size), _uniform("TARP", tarp, size)]
    checks += [line for level in LEVELS for line in _coverage(ranks, level, size)]
    if observations is not None:
        checks.append(_chi_square(draws, joint(observations), generator, size))
    return Calibration(tuple(checks), ranks, tarp, size)


def _ranks(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Ranks of x (R, P) among y (R, S, P), spread evenly over (0, 1); ties are broken at random.

    rank = below + (ties + 1) u is uniform on (0, S + 1) for any ties.
    """
    below = (y < x.unsqueeze(1)).sum(1)
    ties = (y == x.unsqueeze(1)).sum(1)
    u = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    return (below + (ties + 1) * u) / (y.shape[1] + 1)


def _distance(u: Tensor) -> float:
    """sup |F_n - F| against the uniform law."""
    s, n = u.sort().values, len(u)
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - s
    return float(torch.maximum(above, 1 / n - above).max())


@lru_cache
def _limit(size: float, n: int) -> float:
    """What the distance of n uniform numbers exceeds with the chance ``size``."""
    from scipy.stats import kstwo

    return float(kstwo.ppf(1 - size, n))


def _chance(d: float, n: int) -> float:
    from scipy.stats import kstwo

    return float(kstwo.sf(d, n))


def _uniform(name: str, u: Tensor, size: float) -> Check:
    d, n = _distance(u), len(u)
    return Check(name, d, 0.0, _limit(size, n), _chance(d, n))


def _holm(ranks: Tensor, size: float) -> Check:
    """The farthest projection: Holm rejects any at all exactly where he rejects that one."""
    n, k = ranks.shape
    d = max(_distance(u) for u in ranks.T)
    return Check("ranks, KS (Holm)", d, 0.0, _limit(size / k, n), min(1.0, k * _chance(d, n)))


def _coverage(ranks: Tensor, level: float, size: float) -> list[Check]:
    """The projections that are covered least and most often, in exact binomial bounds."""
    from scipy.stats import binom

    n, k = ranks.shape
    inside = ((ranks - 0.5).abs() <= level / 2).double().sum(0)
    low, high = (float(v) / n for v in binom.ppf([size / k / 2, 1 - size / k / 2], n, level))
    lines = []
    for name, count in (("least", inside.min()), ("most", inside.max())):
        c = float(count)
        tail = min(binom.cdf(c, n, level), binom.sf(c - 1, n, level))
        p = min(1.0, 2 * k * float(tail))
        lines.append(Check(f"{level:.0%} interval, {name}", c / n, low, high, p))
    return lines


def _chi_square(
    draws: Tensor, seen: Observation, generator: torch.Generator, size: float
) -> Check:
    if seen.batch not in (None, len(draws)):
        raise ValueError(f"y has rows for {seen.batch} samples, there are {len(draws)} truths")
    one = torch.randint(draws.shape[1], (len(draws),), generator=generator)
    x = draws[torch.arange(len(draws), device=draws.device), one.to(draws.device)]
    z = seen.whiten(seen.residual(x.double())).flatten(1)
    half = torch.tensor(z.shape[1] / 2, dtype=torch.float64)
    u = torch.special.gammainc(half, z.square().sum(1).cpu() / 2)
    return _uniform("chi-square, KS", u, size)


@dataclass(frozen=True)
class Discrepancy:
    """A kernel Stein discrepancy: its U-statistic, and the chance of one as large by draws.

    >>> from sde_gen import inverse
    >>> x = torch.randn(50, 2)
    >>> inverse.kernel_stein(x, -x).p > 0.001
    True
    """

    value: float
    p: float


def kernel_stein(x: Tensor, score: Tensor, resamples: int = 1000, seed: int = 0) -> Discrepancy:
    """How far draws are from a law of which the score is known, and no normalisation.

    E k_p(x, x') of Liu et al. (2016) with the kernel (1 + |x - x'|^2 / h^2)^(-1/2) of Gorham and
    Mackey (2017), h the median distance. For a posterior at the least noise: the model's score
    plus A^T S^-1 (o - A x). It sees shapes, not the weights of modes far from each other.

    Args:
        x: independent draws (N, *D).
        score: grad log p at each, (N, *D).
        resamples: signs drawn for the p-value, by the wild bootstrap.
        seed: of the signs.

    Raises:
        ValueError: shapes that differ, fewer than 10 draws, NaN.

    >>> from sde_gen import inverse
    >>> x = torch.randn(50, 2)
    >>> inverse.kernel_stein(x, -x).p > 0.001
    True
    """
    check_state(x)
    if score.shape != x.shape or len(x) < 10:
        raise ValueError(
            f"x and score must be (N, *D), N >= 10; got {tuple(x.shape)}, {tuple(score.shape)}"
        )
    check_finite(x)
    check_finite(score, "score")
    x, s = x.flatten(1).double(), score.flatten(1).double()
    x = x - x.mean(0)
    h = stein_matrix(x, s)
    n = len(x)
    h.fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (resamples, n), generator=generator, dtype=torch.float64) * 2 - 1
    random = ((signs @ h) * signs).sum(1)
    value = float(h.sum())
    larger = (int((random >= value).sum()) + 1) / (resamples + 1)
    return Discrepancy(value / (n * (n - 1)), larger)


def stein_matrix(x: Tensor, s: Tensor) -> Tensor:
    """k_p(x_i, x_j) (N, N) for points and scores (N, n).

    For k = f(r^2), r = |x - x'|, with h^2 the median of r^2,
    k_p = f s.s' - 2 f' (s - s').(x - x') - 2 n f' - 4 f'' r^2.
    """
    n = x.shape[1]
    square = torch.cdist(x, x) ** 2
    pairs = square[torch.triu_indices(len(x), len(x), 1).unbind()]
    width = float(pairs.median())
    width = width if width > 0 else 1.0
    u = 1 + square / width
    k, k_1, k_2 = u**-0.5, -0.5 / width * u**-1.5, 0.75 / width**2 * u**-2.5
    cross = (s * x).sum(1).unsqueeze(1) - s @ x.T  # s.(x - x')
    return k * (s @ s.T) - 2 * k_1 * (cross + cross.T) - 2 * n * k_1 - 4 * k_2 * square


def _flat(truths: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("truths", truths), ("draws", draws)):
        check_state(x, name)
        check_finite(x, name)
    if draws.ndim != truths.ndim + 1 or draws.shape[2:] != truths.shape[1:]:
        raise ValueError(
            f"draws must be (R, S, *D) for truths (R, *D) = {tuple(truths.shape)},"
            f" got {tuple(draws.shape)}"
        )
    if len(draws) != len(truths) or len(truths) < 20 or draws.shape[1] < 3:
        raise ValueError(
            "calibration needs S >= 3 draws for each of R >= 20 truths, got"
            f" {tuple(draws.shape)} for {len(truths)} truths"
        )
    r, s = draws.shape[:2]
    return truths.reshape(r, -1).double().cpu(), draws.reshape(r, s, -1).double().cpu()
