"""Calibration: a right sampler passes as often as is said, and wrong ones are found."""

from __future__ import annotations

import pytest
import torch
from problems import F64, correlated
from scipy import stats
from torch import Tensor

from sde_gen import VP, Gaussian
from sde_gen.inverse import (
    Calibration,
    Matrix,
    Observation,
    calibrate,
    exact_posterior,
    kernel_stein,
)
from sde_gen.inverse.calibration import stein_matrix

SDE = VP()
A = torch.tensor([[1.0, 0.4]], dtype=F64)
NOISE = 0.3


def posterior(truths: Tensor, y: Tensor, draws: int, noise: float, seed: int) -> Tensor:
    """Draws of the exact posterior of each, under a noise that may be wrong, (R, S, 2)."""
    prior = correlated(SDE)
    one = exact_posterior(prior, Observation(Matrix(A), torch.zeros(1, dtype=F64), noise))
    assert isinstance(one, Gaussian)
    moments = one.facts.moments
    c = moments.apply((moments.coefficient(moments.values.numpy()),), (torch.eye(2, dtype=F64),))
    gain = c @ A.T / noise**2
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(len(y), draws, 2, generator=g, dtype=F64) @ torch.linalg.cholesky(c).T
    return (one.mean + y @ gain.T).unsqueeze(1) + z


def run(seed: int, r: int = 300, draws: int = 40, noise: float = NOISE) -> Calibration:
    g = torch.Generator().manual_seed(1000 + seed)
    truths = correlated(SDE).sample(r, g)
    y = truths @ A.T + NOISE * torch.randn(r, 1, generator=g, dtype=F64)
    x = posterior(truths, y, draws, noise, seed)
    return calibrate(truths, x, Observation(Matrix(A), y, NOISE), projections=8, seed=seed)


def test_a_right_sampler_passes_as_often_as_is_said() -> None:
    """p-values of 200 runs: uniform for KS, TARP and chi-square; and few that fail."""
    runs = [run(seed, 100, 11) for seed in range(200)]
    for name in ("TARP", "chi-square, KS"):
        p = [c.p for r in runs for c in r.checks if c.name == name]
        assert stats.kstest(p, "uniform").pvalue > 1e-3, name
    # Holm's is conservative for projections that depend on each other.
    p = [c.p for r in runs for c in r.checks if c.name.startswith("ranks")]
    assert sum(v < 0.05 for v in p) <= stats.binom.ppf(0.999, 200, 0.05)
    # 11 lines each of which fails in at most 1e-3 of cases.
    assert sum(not r.passed for r in runs) <= stats.binom.ppf(0.999, 200, 11e-3)


def test_noise_that_is_wrong_by_a_fifth_is_found() -> None:
    for factor in (0.8, 1.2):
        found = run(0, 2000, 60, NOISE * factor)
        assert not found.passed
        assert "chi-square, KS" in found.failed
        assert any("interval" in name or "ranks" in name for name in found.failed)
        assert "NOT calibrated" in str(found)
        assert "<-" in str(found)
    right = run(0, 2000, 60)
    assert right.passed, str(right)
    assert str(right).startswith("calibrated: 2000 observations, 8 projections")


def test_a_shift_and_a_lost_spread_are_found() -> None:
    g = torch.Generator().manual_seed(0)
    truths = torch.randn(500, 3, generator=g, dtype=F64)
    draws = torch.randn(500, 30, 3, generator=g, dtype=F64)
    assert calibrate(truths, draws).passed
    assert "ranks, KS (Holm)" in calibrate(truths, draws + 0.3).failed
    narrow = calibrate(truths, 0.7 * draws)
    assert "TARP" in narrow.failed
    assert {"90% interval, least", "50% interval, least"} <= set(narrow.failed)
    wide = calibrate(truths, 1.5 * draws)
    assert "90% interval, most" in wide.failed


def test_coverage_is_counted_in_exact_binomial_bounds() -> None:
    found = run(3, 400)
    (line,) = [c for c in found.checks if c.name == "90% interval, least"]
    share = ((found.ranks - 0.5).abs() <= 0.45).double().mean(0).min()
    assert line.value == pytest.approx(float(share))
    # All but 1e-3 / 8 of binomial counts lie within, by the distribution itself.
    outside = stats.binom.cdf(line.low * 400 - 1, 400, 0.9) + stats.binom.sf(
        line.high * 400, 400, 0.9
    )
    assert outside <= 1e-3 / 8
    inside = stats.binom.cdf(line.low * 400, 400, 0.9)
    assert inside >= 1e-3 / 16


def test_draws_that_repeat_keep_ranks_even() -> None:
    """Resampled particles repeat; where all draws are the truth itself ranks are still even."""
    truths = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    ranks = calibrate(truths, truths.unsqueeze(1).expand(-1, 5, -1), projections=1).ranks
    assert stats.kstest(ranks.flatten().numpy(), "uniform").pvalue > 1e-3


def test_the_curve_is_that_of_tarp() -> None:
    found = run(1)
    levels, share = found.curve(11)
    assert (float(share[0]), float(share[-1])) == (0, 1)
    assert float((share - levels).abs().max()) <= found.checks[1].value + 1e-9


# ---- Stein ----


def test_the_stein_kernel_is_its_definition() -> None:
    """By automatic differentiation of the kernel, and mean 0 under the law."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    s = -x + 0.1 * x**2
    width = float(torch.pdist(x).square().median())

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (1 + (a - b).square().sum() / width) ** -0.5

    for i, j in ((0, 1), (2, 5), (3, 3)):
        a, b = x[i], x[j]
        by_a, by_b = (torch.func.grad(k, n)(a, b) for n in (0, 1))
        mixed = torch.func.jacrev(torch.func.grad(k, 0), 1)(a, b).trace()
        wanted = k(a, b) * s[i] @ s[j] + s[i] @ by_b + s[j] @ by_a + mixed
        torch.testing.assert_close(stein_matrix(x, s)[i, j], wanted, rtol=1e-9, atol=1e-9)


def test_stein_tells_right_draws_from_wrong() -> None:
    prior = correlated(SDE)
    exact = exact_posterior(prior, Observation(Matrix(A), torch.ones(1, dtype=F64), NOISE))
    p = []
    for seed in range(40):
        x = exact.sample(100, torch.Generator().manual_seed(seed))
        p.append(kernel_stein(x, exact(x, 0.0), 400, seed).p)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    x = exact.sample(300, torch.Generator().manual_seed(0))
    assert kernel_stein(x + 0.3, exact(x + 0.3, 0.0)).p < 0.005
    wide = exact.mean + 1.4 * (x - exact.mean)
    found = kernel_stein(wide, exact(wide, 0.0))
    assert found.p < 0.005
    assert found.value > 0


def test_what_does_not_fit_is_refused() -> None:
    x, y = torch.zeros(30, 2), torch.zeros(30, 5, 2)
    with pytest.raises(ValueError, match=r"draws must be \(R, S, \*D\)"):
        calibrate(x, torch.zeros(30, 5, 3))
    with pytest.raises(ValueError, match="S >= 3 draws for each of R >= 20 truths"):
        calibrate(x[:10], y[:10])
    with pytest.raises(ValueError, match="y has rows for 3 samples, there are 30 truths"):
        calibrate(x, y, Observation(Matrix(torch.ones(1, 2)), torch.zeros(3, 1), 0.1))
    with pytest.raises(ValueError, match="truths has 60 NaN"):
        calibrate(x * float("nan"), y)
    with pytest.raises(ValueError, match="N >= 10"):
        kernel_stein(x[:5], x[:5])
