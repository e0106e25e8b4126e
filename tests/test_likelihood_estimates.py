"""Error bars against exact answers: what is drawn spreads a value as it says, and no more."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import problems
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import sde_gen as sg
from sde_gen.likelihood import (
    Estimate,
    LogisticDequantiser,
    bits_per_dim,
    importance_bounds,
    log_prob,
)
from sde_gen.likelihood.probes import hadamard_size, orthogonal_signs, spread_of
from sde_gen.likelihood.watch import Watch
from sde_gen.likelihood.whitened import slopes_of, weights_of
from sde_gen.noise import Streams

F64 = torch.float64
VP = sg.VP()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def estimate(value: list[float], spread: list[float], bias: list[float]) -> Estimate:
    return Estimate(*(torch.tensor(v, dtype=F64) for v in (value, spread, bias)), 5, "by hand")


# --- arithmetic -----------------------------------------------------------------------------


def test_arithmetic_keeps_the_error_bar() -> None:
    a = estimate([1.0, 2.0], [0.3, 0.0], [0.0, 0.4])
    b = estimate([10.0, 20.0], [0.4, 0.3], [0.1, 0.0])
    for found, value, spread, bias in (
        (a + b, [11, 22], [0.5, 0.3], [0.1, 0.4]),
        (a - b, [-9, -18], [0.5, 0.3], [0.1, 0.4]),
        (3 - 2 * a, [1, -1], [0.6, 0.0], [0.0, 0.8]),
        (-a / 2 + torch.tensor([1.0, 0.0]), [0.5, -1], [0.15, 0.0], [0.0, 0.2]),
        (a * torch.tensor([2.0, -1.0]), [2, -2], [0.6, 0.0], [0.0, 0.4]),
    ):
        for got, wanted in zip(
            (found.value, found.spread, found.bias), (value, spread, bias), strict=True
        ):
            torch.testing.assert_close(got, torch.tensor(wanted, dtype=F64))
    assert (a + b).calls == 10
    assert (a + b).method == "by hand"
    torch.testing.assert_close(
        b.standard_error, torch.tensor([math.hypot(0.4, 0.1), 0.3], dtype=F64)
    )
    low, high = (a + b).interval(2.0)
    torch.testing.assert_close(high - low, torch.tensor([2.2, 2.0], dtype=F64))


def test_means_count_the_data_or_not() -> None:
    a = estimate([1.0, 2.0, 6.0], [0.3, 0.0, 0.4], [0.1, 0.2, 0.0])
    mean, fixed = a.mean(), a.mean(fixed=True)
    assert float(mean) == float(fixed) == 3.0
    assert float(mean.spread) == pytest.approx(math.sqrt(7 / 3))
    assert float(fixed.spread) == pytest.approx(0.5 / 3)
    assert float(mean.bias) == float(fixed.bias) == pytest.approx(0.1)
    assert float(a[:1].mean().spread) == pytest.approx(0.3)
    assert [float(one) for one in a] == [1, 2, 6]
    assert len(a) == 3


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.012, "1.235 +- 0.012"),
        (1.23456, 0.25, "1.23 +- 0.25"),
        (1234.5, 30.0, "1234 +- 30"),
        (1.5, 0.0, "1.5 +- 0"),
        (1.5, 1e-17, "1.5 +- 0"),
        (1.5, math.nan, "1.5 +- unknown"),
    ],
)
def test_an_estimate_shows_its_error(value: float, error: float, text: str) -> None:
    assert str(estimate([value], [error], [0.0])[0]) == text
    assert str(estimate([value], [0.0], [error])) == f"[{text}]"


def test_numbers_of_numpy_on_the_left_are_numbers() -> None:
    e = Estimate(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2]), torch.zeros(2))
    for found in (np.float64(2) * e, np.float32(2) * e):
        assert isinstance(found, Estimate)
        assert torch.equal(found.spread, 2 * e.spread)
    assert torch.equal((np.float64(3) - e).value, 3 - e.value)


def test_an_estimate_refuses_what_is_no_number() -> None:
    a = estimate([1.0], [0.1], [0.0])
    for f in (lambda: a + "1", lambda: a * "1", lambda: a / "1", lambda: a * a):
        with pytest.raises(TypeError):
            f()


# --- probes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12])
def test_all_orthogonal_probes_together_are_exact(n: int) -> None:
    x, size = torch.zeros(5, n, dtype=F64), hadamard_size(n)
    e = orthogonal_signs(x, size, Streams(3))
    assert e.shape == (size, 5, n)
    assert bool((e.abs() == 1).all())
    torch.testing.assert_close(
        torch.einsum("kbi,kbj->bij", e, e), size * torch.eye(n, dtype=F64).expand(5, n, n)
    )
    # A sample's probes are its own, and do not depend on the batch.
    torch.testing.assert_close(orthogonal_signs(x[:2], size, Streams(3)), e[:, :2])
    if n > 3:
        assert float((e[0, 0] - e[0, 1]).abs().max()) > 0


def test_the_spread_of_probes_is_unbiased() -> None:
    """Of quadratic forms with a known matrix: mean, variance and their estimate."""
    n, rows, k = 8, 20_000, 3
    a = torch.randn(n, n, generator=seeded(), dtype=F64)
    a = a + a.T
    e = orthogonal_signs(torch.zeros(rows, n, dtype=F64), k, Streams(0))
    parts = torch.einsum("kbi,ij,kbj->bk", e, a, e)
    # One probe: 2 sum_(i != j) a_ij^2 (Hutchinson 1990).
    one = 2 * float(a.square().sum() - a.diagonal().square().sum())
    # 20,000 draws: means to 4 / 141 standard deviations, variances to 4 sqrt(2 .. 3 / 20,000).
    assert float(parts[:, 0].var()) == pytest.approx(one, rel=0.05)
    assert float(parts.mean() - a.trace()) == pytest.approx(0, abs=4 * math.sqrt(one / k / rows))
    variance = float(parts.mean(1).var())
    assert float(spread_of(parts, n).square().mean()) == pytest.approx(variance, rel=0.05)
    # Orthogonal to one another: better than independent ones by (1 - K / N) / (1 - 1 / N).
    assert variance == pytest.approx(one / k * (1 - k / n) / (1 - 1 / n), rel=0.05)
    assert bool(spread_of(parts[:, :1], n).isnan().all())
    assert float(spread_of(torch.ones(2, 8), 8).abs().max()) == 0


@pytest.mark.parametrize(
    "sde", [sg.VP(), sg.EDM(80.0), sg.SubVP()], ids=lambda s: type(s).__name__
)
def test_one_probe_is_exact_on_gaussian_data(sde: sg.LinearSDE) -> None:
    """For any covariance, with the moments of the model for control: no variance at all."""
    root = torch.randn(6, 6, generator=seeded(), dtype=F64)
    law = sg.Gaussian(
        sde, torch.arange(6, dtype=F64), covariance=root @ root.T + 0.1 * torch.eye(6)
    )
    x = law.sample(4, seeded())
    for seed in range(5):
        found = log_prob(law, x, probes=1, seed=seed, steps=4)
        torch.testing.assert_close(found.value, law.log_prob(x), rtol=0, atol=1e-9)
        assert float(found.bias.max()) < 1e-9
    assert float(log_prob(law, x, probes=2).standard_error.max()) < 1e-9


def test_without_control_the_spread_is_that_of_the_log_of_the_covariance() -> None:
    """The flow's Jacobian adds up to A = 1/2 log (C + w) from 0 to T: a probe's variance is
    2 sum_(i != j) A_ij^2. A solver of one's own has no control; by default nothing is left."""
    n, rows = 16, 1500
    root = torch.randn(n, n, generator=seeded(), dtype=F64) / 2
    c = root @ root.T + 0.05 * torch.eye(n, dtype=F64)
    law = sg.Gaussian(sg.EDM(80.0), torch.zeros(n, dtype=F64), covariance=c)
    x = law.sample(1, seeded()).expand(rows, n)
    values, vectors = torch.linalg.eigh(c)
    half = vectors @ torch.diag(0.5 * torch.log((values + 80.0**2) / values)) @ vectors.T
    wanted = math.sqrt(2 * float(half.square().sum() - half.diagonal().square().sum()))
    assert wanted > 2
    free = log_prob(law, x, probes=1, solver=sg.Adaptive(1e-3, 1e-3)).value.std()
    assert float(free) == pytest.approx(wanted, rel=4 / math.sqrt(2 * rows) + 0.02)
    assert float(log_prob(law, x, probes=1, steps=4).value.std()) < 1e-9


def test_the_bar_of_probes_is_their_spread() -> None:
    """On a mixture in 8 dimensions: 600 runs of one point, two probes of eight."""
    means = torch.randn(3, 8, generator=seeded(), dtype=F64)
    law = sg.GaussianMixture(VP, torch.ones(3), means, 0.4)
    x = law.sample(1, seeded()).expand(600, 8)
    found = log_prob(law, x, probes=2, steps=32)
    spread = float(found.value.std())
    assert spread > 0.1
    assert float(found.spread.square().mean().sqrt()) == pytest.approx(spread, rel=0.15)
    exact = float(law.log_prob(x[:1])[0])
    assert abs(float(found.value.mean()) - exact) < 4 * spread / math.sqrt(600) + float(
        found.bias.mean()
    )


def test_by_default_the_trace_is_exact_where_that_is_cheap() -> None:
    small, large = (sg.Gaussian(VP, torch.zeros(n), 0.5) for n in (64, 65))
    assert "exact trace" in log_prob(small, torch.zeros(1, 64), steps=2).method
    assert "16 orthogonal probes" in log_prob(large, torch.zeros(1, 65), steps=2).method
    assert "exact trace" in log_prob(large, torch.zeros(1, 65), steps=2, probes=65).method


# --- the solver's part ----------------------------------------------------------------------


def test_quadrature_has_order_six() -> None:
    errors = []
    for n in (12, 24, 48):
        u = np.linspace(0.3, 2.0, n + 1)
        exact = (math.cos(1.5) - math.cos(10.0)) / 5
        errors.append(abs(float(weights_of(u) @ np.sin(5 * u)) - exact))
    assert all(s > 5.5 for s in problems.slopes(errors)), errors
    for n in (1, 2, 3):
        u = np.linspace(0.0, 1.0, n + 1)
        assert weights_of(u) @ u**n == pytest.approx(1 / (n + 1))


def test_slopes_have_order_six() -> None:
    errors = []
    for n in (12, 24, 48):
        u = np.linspace(0.3, 2.0, n + 1)
        errors.append(float(np.abs(slopes_of(u) @ np.sin(5 * u) - 5 * np.cos(5 * u)).max()))
    assert all(s > 5.5 for s in problems.slopes(errors)), errors
    u = np.linspace(0.0, 1.0, 3)
    assert slopes_of(u) @ u**2 == pytest.approx(2 * u)


@pytest.mark.parametrize("make", [problems.mixture, problems.line, problems.ring])
@pytest.mark.parametrize("steps", [16, 32, 64])
def test_the_bias_covers_the_error(make: object, steps: int) -> None:
    law = make(VP)  # type: ignore[operator]
    x = law.sample(200, seeded())
    found = log_prob(law, x, steps=steps)
    error = found.value - law.log_prob(x)
    assert found.calls == steps + 1
    assert float(error.mean().abs()) <= float(found.mean().bias)
    # Where signs change along the path, what it misses may add up to nothing.
    assert float((error.abs() <= found.bias).double().mean()) > 0.75
    if steps == 64:
        # Where steps are short the bar is twice the error, and no more.
        size = [problems.rms(v) for v in (error, found.bias)]
        assert 1.5 * size[0] < size[1] < 2.5 * size[0]


def test_more_steps_converge_at_order_three() -> None:
    law = problems.line(VP)
    x = law.sample(100, seeded())
    errors = [
        problems.rms(log_prob(law, x, steps=n).value - law.log_prob(x)) for n in (48, 96, 192)
    ]
    assert all(s > 2.6 for s in problems.slopes(errors)), errors


def test_gradients_are_the_score() -> None:
    law = problems.mixture(VP)
    x = law.sample(5, seeded()).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(law, x, steps=48).value.sum(), x)
    torch.testing.assert_close(gradient, law(x.detach(), 0.0), rtol=1e-2, atol=1e-2)
    assert log_prob(law, x.detach()).value.grad_fn is None
    wide = sg.GaussianMixture(VP, torch.ones(2), torch.eye(2, 4, dtype=F64), 0.5)
    y = wide.sample(2, seeded()).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(wide, y, probes=2, steps=8).value.sum(), y)
    h = 1e-5 * torch.randn(2, 4, generator=seeded(1), dtype=F64)
    with torch.no_grad():
        up, down = (log_prob(wide, y + s * h, probes=2, steps=8).value.sum() for s in (1, -1))
    assert float((gradient * h).sum()) == pytest.approx(float(up - down) / 2, rel=1e-6)


def test_a_long_run_says_so_beforehand(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr("sde_gen.likelihood.watch.time.perf_counter", lambda: next(now))
    watch = Watch(100)
    with caplog.at_level(logging.WARNING, logger="sde_gen.likelihood"):
        for _ in range(3):
            watch.tick()
    assert caplog.text.count("100 calls will take about 5 minutes") == 1


def test_a_run_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    law = problems.gaussian(VP)
    log_prob(law, law.sample(4, seeded()), steps=4, progress=True, chunk=2)
    assert "likelihood" in capsys.readouterr().err


# --- coverage -------------------------------------------------------------------------------


def is_covering(low: Tensor, high: Tensor, truth: float) -> bool:
    """Whether 95 % intervals hold the truth as often as they should, at the level of 0.1 %."""
    hits, n = int(((low <= truth) & (truth <= high)).sum()), len(low)
    least, most = binom.ppf([0.0005, 0.9995], n, 0.95)
    return bool(least <= hits <= most)


def judge(found: Estimate, repeats: int, truth: float) -> None:
    means = [part.mean() for part in (found[i::repeats] for i in range(repeats))]
    value, half = (
        torch.stack(v)
        for v in zip(*((m.value, 1.96 * m.spread + m.bias) for m in means), strict=True)
    )
    assert is_covering(value - half, value + half, truth)
    assert not is_covering(value - 0.8 * half, value + 0.8 * half, truth)


def entropy(law: sg.GaussianMixture) -> float:
    """E log p in the plane by the trapezoid rule, which converges faster than any power."""
    side = torch.linspace(-6, 6, 601, dtype=F64)
    log_p = law.log_prob(torch.cartesian_prod(side, side))
    return float((log_p.exp() * log_p).sum()) * (12 / 600) ** 2


def test_intervals_of_the_mean_log_density_cover() -> None:
    """2,000 data sets of 60 points: data, one probe a point, and the solver."""
    law, repeats = problems.mixture(VP), 2000
    x = law.sample(60 * repeats, seeded(1))
    judge(log_prob(law, x, probes=1, steps=32), repeats, entropy(law))


def test_intervals_of_bits_per_dimension_cover() -> None:
    """2,000 data sets of 60 rows of three numbers, on five levels, dequantised once."""
    std, levels, n, repeats = 0.4, 5, 3, 2000
    law = sg.Gaussian(VP, torch.zeros(n), std)
    edges = torch.linspace(-1, 1, levels + 1, dtype=F64)
    mass = torch.special.ndtr(edges / std).diff()
    mass = mass / mass.sum()
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(40))
    x = edges[:-1, None] + (nodes + 1) / levels
    log_p = (-0.5 * (x / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))) @ (weights / 2)
    truth = -float(mass @ log_p) / math.log(2) + math.log2(levels / 2)
    k = torch.multinomial(mass, 60 * repeats * n, True, generator=seeded(2)).reshape(-1, n)
    judge(bits_per_dim(law, k, levels, steps=2, seed=3), repeats, truth)


# --- dequantisation -------------------------------------------------------------------------


def test_the_best_dequantiser_leaves_nothing_to_bound() -> None:
    """q(u | k) = p on the cell: the bound is the probability of the level, without variance."""
    std, levels = 0.4, 4
    law = sg.Gaussian(VP, torch.zeros(2, dtype=F64), std)
    edges = torch.linspace(-1, 1, levels + 1, dtype=F64)

    def best(k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (torch.special.ndtr(edges[k + i] / std) for i in (0, 1))
        x = std * torch.special.ndtri(low + (high - low) * u.double())
        log_q = sg.gaussians.log_density(x, torch.zeros_like(x), torch.full_like(x, std))
        v = (x - edges[k]) * levels / 2
        return v.clamp(0, 1), log_q - torch.log(high - low).sum(1) + 2 * math.log(2 / levels)

    k = torch.tensor([[0, 1], [2, 3], [1, 1]])
    found = bits_per_dim(law, k, levels, dequantiser=best).value
    exact = -torch.log2(torch.special.ndtr(edges / std).diff()[k]).mean(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    assert float(bits_per_dim(law, k, levels).value.sub(exact).abs().max()) > 1e-2
    for bad, message in (
        (lambda k, u: (u + 1, u.sum(1)), "u in"),
        (lambda k, u: (u, u), "must return u"),
        (lambda k, u: (u, u.sum(1) * torch.nan), "log q of the dequantiser has 3 NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_dim(law, k, levels, dequantiser=bad)


def test_a_trained_dequantiser_lies_between_uniform_and_the_truth() -> None:
    """On levels of a correlated Gaussian in the plane; the truth by quadrature on each cell."""
    levels = 4
    c = torch.tensor([[0.09, 0.06], [0.06, 0.09]], dtype=F64)
    law = sg.Gaussian(VP, torch.tensor([0.1, -0.1], dtype=F64), covariance=c)
    x = law.sample(4000, seeded())
    k = sg.levels.quantise(x.clamp(-0.999, 0.999), levels)
    q = LogisticDequantiser((2,), levels, 32).double()
    first, trained = k[:2000], k[2000:]
    before = bits_per_dim(law, first, levels, dequantiser=q, steps=2).value
    uniform = bits_per_dim(law, first, levels, steps=2).value
    torch.testing.assert_close(before, uniform.double(), rtol=0, atol=1e-3)
    after = bits_per_dim(law, first, levels, dequantiser=q.fit(law, trained), steps=2).value
    assert not after.requires_grad
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(30))
    cell = (2 * first[:, None, None] + 1 + torch.cartesian_prod(nodes, nodes)) / levels - 1
    p = law.log_prob(cell.reshape(-1, 2)).exp().reshape(len(first), -1)
    exact = -torch.log2(p @ torch.outer(weights, weights).flatten() / levels**2) / 2
    gains = uniform - after
    assert float(gains.mean()) > 4 * float(gains.std()) / math.sqrt(2000)
    # Of the gap that uniform noise leaves more than half is closed, and the bound stays one.
    left, whole = (float((v - exact).mean()) for v in (after, uniform))
    assert -4 * float((after - exact).std()) / math.sqrt(2000) < left < whole / 2


def test_a_dequantiser_is_a_density_on_the_cell() -> None:
    q = LogisticDequantiser((1,), 3, 8).double()
    with torch.no_grad():
        for v in q.parameters():
            v.copy_(torch.randn(v.shape, generator=seeded(), dtype=F64) / 2)
    v = torch.linspace(0, 1, 40_001, dtype=F64)[1:-1, None]
    for level in range(3):
        u, log_q = q(torch.full((len(v), 1), level), v)
        assert float(torch.trapezoid(log_q.exp(), u[:, 0])) == pytest.approx(1, abs=2e-3)
        assert bool((u.diff(dim=0) > 0).all())
    turning = sg.MatrixOrnsteinUhlenbeck(((-1.0,),), ((1.0,),))
    score = sg.CorrelatedMixture(turning, torch.ones(1), torch.zeros(1, 1), torch.eye(1))
    with pytest.raises(TypeError, match="LinearSDE"):
        q.fit(score, torch.zeros(2, 1, dtype=torch.int64))


def test_more_draws_tighten_the_bound() -> None:
    std, levels = 0.15, 3
    law = sg.Gaussian(VP, torch.zeros(2), std)
    k = torch.ones(400, 2, dtype=torch.int64)
    bounds = importance_bounds(law, k, levels, draws=16, steps=2)
    assert list(bounds) == [1, 2, 4, 8, 16]
    values = [float(b) for b in bounds.values()]
    assert values == sorted(values, reverse=True)
    exact = -math.log2(math.erf(1 / 3 / std / math.sqrt(2)))
    # Of 400 samples; the gap left at K = 16 is var(p) / (2 K p^2), about 0.02 bits a dimension.
    assert exact - 4 * float(bounds[16].spread) < values[-1] < exact + 0.05
    assert values[0] > exact + 0.2
    with pytest.raises(ValueError, match="power of two"):
        importance_bounds(law, k, levels, draws=3)


def test_several_draws_tell_their_spread() -> None:
    law = sg.Gaussian(VP, torch.zeros(2), 0.3)
    k = torch.ones(2000, 2, dtype=torch.int64)
    found = bits_per_dim(law, k, 4, draws=32, steps=2)
    # All rows are the same: they differ by what was drawn.
    rms = float(found.spread.square().mean().sqrt())
    assert rms == pytest.approx(float(found.value.std()), rel=0.1)


def test_what_is_known_of_the_data_need_not_be() -> None:
    """Without moments, or with those of another law, only cost and spread change."""
    law = problems.correlated(VP)
    x = law.sample(6, seeded())
    for moments in (None, sg.Moments(torch.tensor([0.1, 3.0], dtype=F64)), sg.data_moments(x)):
        other = law.with_facts(replace(law.facts, moments=moments))
        found = log_prob(other, x, steps=64)
        torch.testing.assert_close(found.value, law.log_prob(x), rtol=0, atol=2e-3)
    flat = torch.cat([x, torch.ones(6, 1)], 1)
    own = sg.Moments.of(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64)))
    wide = sg.Gaussian(VP, torch.zeros(3, dtype=F64), 0.5)
    other = wide.with_facts(replace(wide.facts, moments=own))
    torch.testing.assert_close(
        log_prob(other, flat, steps=64).value, wide.log_prob(flat), rtol=0, atol=2e-3
    )
