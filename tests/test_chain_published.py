"""Nichol & Dhariwal's schedules (2021): their numbers where a closed form exists.

The chains of the paper are tables of betas. Everything here is written from the formulas of the
papers, with alpha-bar_t = prod (1 - beta_s), and compared with what ``Chain`` makes of the table.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import F64
from torch import Tensor

from sde_gen import VP, Chain, Gaussian, bound
from sde_gen.moments import isotropic
from sde_gen.schedules import Cosine, Linear, Tabulated

V = 0.25
"""Variance of the Gaussian data: the digits and photographs on [-1, 1] have about as much."""


def linear_betas(n: int) -> Tensor:
    """Ho et al. (2020), 1e-4 to 0.02 at N = 1000; at other N times 1000 / N."""
    return torch.linspace(0.1 / n, 20 / n, n, dtype=F64)


def cosine_abar(n: int) -> Tensor:
    """(N + 1,): f(t) / f(0), f(t) = cos^2((t / N + 0.008) / 1.008 pi / 2) (equation 17)."""
    angle = (torch.arange(n + 1, dtype=F64) / n + 0.008) / 1.008 * math.pi / 2
    return (angle.cos() / angle[0].cos()) ** 2


def cosine_betas(n: int) -> Tensor:
    """1 - abar_t / abar_(t-1), clipped at 0.999."""
    abar = cosine_abar(n)
    return (1 - abar[1:] / abar[:-1]).clamp_max(0.999)


def table(name: str, n: int) -> Chain:
    return Chain(VP(Tabulated({"linear": linear_betas, "cosine": cosine_betas}[name](n))))


def abar_of(name: str, n: int) -> np.ndarray:
    """alpha-bar_1 .. alpha-bar_N in closed form.

    prod_s (c - d s), betas on a line, is d^t Gamma(c / d + 1) / Gamma(c / d + 1 - t).
    """
    if name == "cosine":
        abar = cosine_abar(n)[1:].numpy()
        abar[-1] = abar[-2] * 1e-3  # the last step alone is clipped
        return abar
    t = np.arange(1, n + 1)
    d, c = 19.9 / n / (n - 1), 1 - 0.1 / n
    gamma = np.vectorize(math.lgamma)
    return np.exp(t * math.log(d) + math.lgamma(c / d + 1) - gamma(c / d + 1 - t))


BOTH = pytest.mark.parametrize("name", ["linear", "cosine"])
SIZES = pytest.mark.parametrize("n", [100, 1000, 4000])


@BOTH
@SIZES
def test_alpha_bar(name: str, n: int) -> None:
    found = table(name, n).nodes.alpha[1:].square().numpy()
    # The logarithms of Gamma are some 1e7, so that their difference has 1e-9 at the best.
    np.testing.assert_allclose(found, abar_of(name, n), rtol=3e-8, atol=1e-15)


def test_half_way_the_linear_schedule_has_lost_what_the_cosine_keeps() -> None:
    """Figure 5: exp(-(0.05 + 19.9 / 8)) against cos^2 of half the angle."""
    linear, cosine = (float(table(k, 4000).nodes.alpha[2000]) ** 2 for k in ("linear", "cosine"))
    assert linear == pytest.approx(math.exp(-0.05 - 19.9 / 8), rel=5e-3)
    assert linear == pytest.approx(0.0789, abs=1e-4)
    assert cosine == pytest.approx(0.4939, abs=1e-4)


def test_the_linear_chain_tends_to_the_linear_clock() -> None:
    """log alpha-bar_N = -sum beta - sum beta^2 / 2 - ..., and the sum is B(1) = 10.05 at any N."""
    B = float(Linear().integral(1.0))
    second = (0.1**2 + 0.1 * 20 + 20**2) / 3 / 2  # int beta(t)^2 dt / 2
    off = []
    for n in (1000, 2000, 4000):
        log_abar = 2 * float(table("linear", n).nodes.alpha[-1].log())
        off.append((-B - log_abar) * n)
        assert float(table("linear", n).betas.sum()) == pytest.approx(B, rel=1e-12)
    assert off[-1] == pytest.approx(second, rel=0.01)
    gaps = [value - second for value in off]
    assert [a / b for a, b in pairwise(gaps)] == pytest.approx([2, 2], rel=0.02)
    # And the cosine chain to the cosine clock, wherever both are far from the clipped end.
    clock, t = Cosine(total=30.0), torch.linspace(0.1, 0.9, 5, dtype=F64)
    at = (4000 * t).round().long()
    mine = clock.integral(t * (1 + 1e-9)).neg().exp()
    torch.testing.assert_close(mine, cosine_abar(4000)[at], rtol=1e-4, atol=1e-6)


@BOTH
@SIZES
def test_the_ratio_of_the_variances(name: str, n: int) -> None:
    """Figure 1: beta~_t / beta_t = (1 - abar_(t-1)) / (1 - abar_t), from about 1/2 to 1."""
    chain, abar = table(name, n), abar_of(name, n)
    t = torch.arange(2, n + 1)
    small, large = (chain.variance(t, t - 1, k).flatten() for k in ("small", "large"))
    ratio = (small / large).numpy()
    # 1 - abar of the closed form has some 1e-8 of abar, of which 1e-4 are left at t = 1.
    np.testing.assert_allclose(ratio, (1 - abar[:-1]) / (1 - abar[1:]), rtol=1e-3)
    np.testing.assert_allclose(large, chain.betas[1:], rtol=1e-12)
    betas = chain.betas.numpy()
    assert ratio[0] == pytest.approx(betas[0] / (betas[0] + betas[1] - betas[0] * betas[1]))
    assert bool((np.diff(ratio) > 0).all())
    # Of more steps a smaller part has different variances.
    assert 1 - ratio[n // 2] < 4 / n


@BOTH
def test_the_terms_of_gaussian_data(name: str) -> None:
    """L_(t-1) from the betas alone: E|x_0 - D|^2 / n = v (1 - abar) / (1 - abar + abar v)."""
    n = 1000
    chain, known = table(name, n), isotropic(V)
    beta = {"linear": linear_betas, "cosine": cosine_betas}[name](n).numpy()
    abar = np.cumprod(1 - beta)
    a, b, s = abar[1:], beta[1:], abar[:-1]
    exact = b * (1 - s) / (1 - a)
    miss = (np.sqrt(s) * b / (1 - a)) ** 2 * V * (1 - a) / (1 - a + a * V)
    best = exact + miss
    for variance, v in (("small", exact), ("large", b), (known, best)):
        terms = 0.5 * (np.log(v / exact) - 1 + exact / v) + miss / (2 * v)
        found = chain.expected(known, variance)
        np.testing.assert_allclose(found, terms, rtol=1e-6, atol=1e-13)
    # At the right variance the terms telescope: each is what its step learns of the data.
    learnt = 0.5 * np.log1p(V * abar / (1 - abar))
    np.testing.assert_allclose(
        chain.expected(known, known), learnt[:-1] - learnt[1:], rtol=1e-6, atol=1e-12
    )


def test_no_number_of_steps_makes_up_for_the_small_variance() -> None:
    """From t = 1 / N the k-th step has 1 + 1 / k times the noise of the one before, and loses
    1/2 [1/k - log(1 + 1/k)] while v is far above it: in the limit half of Euler's constant."""
    known, lost = isotropic(V), {}
    for n in (1000, 10_000, 100_000):
        chain = Chain(VP(Linear(1.0, 1.0)), torch.arange(1, n + 1) / n)
        lost[n] = float((chain.expected(known, "small") - chain.expected(known, known)).sum())
    limit = 0.5 * 0.5772156649015329
    away = [value - limit for value in lost.values()]
    assert away[-1] == pytest.approx(0, abs=2e-4)
    assert all(6 < a / b < 10 for a, b in pairwise(away))  # as log(N) / N


def part(chain: Chain, steps: int) -> float:
    """What part of sum L_(t-1), at the right variance, the first so many of the terms have."""
    terms = chain.expected(isotropic(V), isotropic(V))
    return float(terms[:steps].sum() / terms.sum())


def test_the_first_steps_have_most_of_the_bound() -> None:
    """Figure 2, 4000 steps: in closed form the part of the first k is a ratio of logarithms."""
    first = {}
    for name in ("linear", "cosine"):
        abar = abar_of(name, 4000)
        learnt = 0.5 * np.log1p(V * abar / (1 - abar))
        for k in (10, 100, 1000):
            first[name, k] = part(table(name, 4000), k)
            wanted = (learnt[0] - learnt[k]) / (learnt[0] - learnt[-1])
            assert first[name, k] == pytest.approx(wanted, rel=1e-3)
    assert first["linear", 100] > 0.5
    assert first["cosine", 100] > 0.35
    # The cosine schedule asks for less of what the first steps alone can give.
    assert all(first["linear", k] > first["cosine", k] for k in (10, 100, 1000))


@pytest.mark.parametrize(("name", "bits"), [("linear", 1.0e-5), ("cosine", 0.0)])
def test_nothing_of_the_data_is_left_at_the_end(name: str, bits: float) -> None:
    """L_T = KL(N(sqrt(abar) x, 1 - abar) || N(0, 1)), about 1e-5 bits (Ho et al., section 4)."""
    chain = table(name, 1000)
    x = torch.full((1, 64), 0.6, dtype=F64)
    law = Gaussian(chain.sde, torch.zeros(64, dtype=F64), math.sqrt(V))
    found = float(bound(law, x, chain.strided(2), prior=isotropic(1.0)).prior.value)
    a = float(chain.nodes.alpha[-1]) ** 2
    exact = 0.5 * (a * 0.6**2 - a - math.log1p(-a)) * 64
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-12)
    assert found / 64 / math.log(2) == pytest.approx(bits, rel=0.1, abs=1e-8)


def test_the_last_step_of_the_cosine_schedule_is_clipped_and_no_other() -> None:
    for n in (100, 1000, 4000):
        betas = table("cosine", n).betas
        assert float(betas[-1]) == pytest.approx(0.999)
        assert float(betas[-2]) < 0.8


def test_fewer_steps_have_the_betas_of_their_own_alpha_bar() -> None:
    """Section 4: beta_S = 1 - abar_S / abar_(S-1), of 4000 steps a subset of 50."""
    chain = table("cosine", 4000)
    few = chain.strided(50)
    abar = cosine_abar(4000)
    abar[-1] = abar[-2] * 1e-3
    at = torch.cat([torch.zeros(1), torch.linspace(1, 4000, 50, dtype=F64).round()]).long()
    torch.testing.assert_close(few.betas, 1 - abar[at[1:]] / abar[at[:-1]], rtol=1e-9, atol=1e-12)
    # Neither schedule loses anything by it at the right variance.
    known = isotropic(V)
    assert float(few.expected(known, known).sum()) == pytest.approx(
        float(chain.expected(known, known).sum()), rel=1e-9
    )
