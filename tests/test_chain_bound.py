"""The chain's bound: exact where the data are Gaussian, unbiased where it is drawn, a bound."""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import F64, draw, gaussian, line, mixture
from scipy import stats
from torch import Tensor, nn

from sde_gen import (
    EDM,
    VE,
    VP,
    Chain,
    Facts,
    Gaussian,
    Moments,
    OrnsteinUhlenbeck,
    ScoreNetwork,
    SubVP,
    bound,
    gaussians,
    grids,
)
from sde_gen.chain import Bound, bayes
from sde_gen.facts import Units
from sde_gen.likelihood import Estimate
from sde_gen.moments import isotropic
from sde_gen.networks import MLP
from sde_gen.schedules import Cosine
from sde_gen.training import InformationTimes, LogNormalTimes, likelihood_weight

V = 0.25
LAW = Gaussian(VP(), torch.zeros(1, dtype=F64), math.sqrt(V))


def sigma_points(n: int) -> Tensor:
    """+-sqrt(n) along each axis: their mean of a quadratic is its mean under N(0, I)."""
    one = math.sqrt(n) * torch.eye(n, dtype=F64)
    return torch.cat([one, -one])


def exact_bound(law: Gaussian, chain: Chain, x: Tensor, prior: Moments | None) -> float:
    """The bound of one x at the right variances, every mean taken without drawing."""
    n, moments = law.mean.numel(), law.facts.moments
    z = sigma_points(n)
    rows = x.expand(len(z), n)
    total = float(bound(law, x, chain, variance=moments, prior=prior).prior.value)
    for t in range(2, len(chain) + 1):
        x_t = chain.forward(rows, t).sample(z)
        e = law.evaluate(x_t, chain.times[t])
        total += float(chain.divergence(e, rows, x_t, t, moments).mean())
    x_1 = chain.forward(rows, 1).sample(z)
    return total - float(chain.step(law, x_1, 1, 0, moments).log_density(rows).mean())


@pytest.mark.parametrize(
    ("sde", "steps", "grid"),
    [
        (VP(), 1, grids.log_snr),
        (VP(), 3, grids.uniform),
        (VP(), 40, grids.uniform),
        (VP(Cosine()), 10, grids.karras),
        (SubVP(), 7, grids.quadratic),
        (VE(), 10, grids.log_snr),
        (EDM(), 10, grids.karras),
        (OrnsteinUhlenbeck(), 5, grids.information),
    ],
)
def test_the_bound_of_gaussian_data_is_the_truth(sde, steps, grid) -> None:
    """In the mean over x the bound loses nothing at the right variance, for any N and clock."""
    law, chain = gaussian(sde), Chain(sde, grid(sde, steps))
    n, v = 3, law.variance
    points = law.mean + sigma_points(n) * v.sqrt()
    entropy = float(0.5 * torch.log(2 * math.pi * math.e * v).sum())
    found = [exact_bound(law, chain, x[None], law.facts.moments) for x in points]
    assert sum(found) / len(found) == pytest.approx(entropy, abs=3e-10)
    # Point by point too: the posterior of Gaussian data is what the model's steps are made of.
    for x, value in zip(points, found, strict=True):
        assert value == pytest.approx(-float(law.log_prob(x[None])), abs=3e-10)
    # Started from N(0, 1) it loses what that prior is away from p_T, and nothing else.
    lost = [exact_bound(law, chain, x[None], isotropic(0.0)) for x in points]
    a, s = sde.alpha(sde.T), sde.sigma(sde.T)
    zero = torch.zeros(1, n, dtype=F64)
    kl = gaussians.kl(a * law.mean[None], a**2 * v + s**2, zero, s**2)
    assert (sum(lost) - sum(found)) / len(found) == pytest.approx(float(kl), rel=1e-6, abs=1e-10)


TABLE = {
    10: (361, 6.38, 1.97, 0.094),
    100: (9.06, 0.342, 0.153, 0.0108),
    1000: (0.4427, 0.0324, 0.0150, 0.0011),
}


@pytest.mark.parametrize("steps", TABLE)
def test_what_fixed_variances_lose(steps: int) -> None:
    """Nats a dimension over the truth, VP from t = 1e-3: against the closed form, and as printed.

    With 1 + u = w_t (v + w_s) / (w_s (v + w_t)) a step loses 1/2 [u - log(1 + u)] at the small
    variance and 1/2 [log k - 1 + (1 + u) / k - log(1 + u)] at k times it.
    """
    sde, known = VP(), isotropic(V)
    grid = {
        "uniform": grids.uniform(sde, steps, end=1e-3),
        "log_snr": grids.log_snr(sde, steps, end=1e-3),
        "information": grids.information(sde, steps, end=1e-3, reference=V),
    }
    lost = []
    for name, variance in (("uniform", "small"), ("log_snr", "small"), ("information", "small"),
                           ("uniform", "large")):  # fmt: skip
        chain = Chain(sde, grid[name])
        found = chain.expected(known, variance) - chain.expected(known, known)  # type: ignore[arg-type]
        w_t, w_s = (
            torch.exp(-sde.log_snr(chain.times[i])) for i in (slice(2, None), slice(1, -1))
        )
        u = V * (w_t - w_s) / (w_s * (V + w_t))
        k = torch.ones(steps).double()
        if variance == "large":
            k = (sde.sigma(chain.times[2:]) / sde.sigma(chain.times[1:-1])) ** 2
        formula = 0.5 * (k.log() - 1 + (1 + u) / k - torch.log1p(u))
        torch.testing.assert_close(found, formula, rtol=1e-6, atol=1e-12)
        lost.append(float(found.sum()))
        assert float(chain.expected(known, "learned").sum() + found.sum()) == pytest.approx(
            float(chain.expected(known, variance).sum())  # type: ignore[arg-type]
        )
    for value, printed in zip(lost, TABLE[steps], strict=True):
        digits = len(str(printed).split(".")[1]) if "." in str(printed) else 0
        assert round(value, digits) == printed
    # Data of unit variance lose nothing at the large one.
    one, chain = isotropic(1.0), Chain(sde, grid["uniform"])
    best = chain.expected(one, one)
    torch.testing.assert_close(chain.expected(one, "large"), best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reference", [0.25, Moments(torch.tensor([0.04, 1.0, 0.3]).double())])
def test_the_information_grid_loses_least_at_first_order(reference) -> None:
    """N times the loss tends to L^2 / 4 (a dimension), L the information between the ends."""
    sde = VP()
    known = isotropic(reference) if isinstance(reference, float) else reference
    left = []
    for steps in (200, 400, 800):
        chain = Chain(sde, grids.information(sde, steps, end=1e-3, reference=reference))
        gap = chain.expected(known) - chain.expected(known, known)
        left.append(float(gap.sum()) * steps)
    if isinstance(reference, float):
        w = torch.exp(-sde.log_snr(torch.tensor([1e-3, 1.0])))
        limit = float(torch.log((1 + V / w[0]) / (1 + V / w[1]))) ** 2 / 4
        off = [value / limit - 1 for value in left]
        assert off[-1] < 0.01
        assert [a / b for a, b in pairwise(off)] == pytest.approx([2, 2], rel=0.05)
        for other in (grids.log_snr, grids.uniform, grids.karras):
            chain = Chain(sde, other(sde, 800, end=1e-3))
            gap = chain.expected(known) - chain.expected(known, known)
            assert float(gap.sum()) * 800 > left[-1]
    assert left[1] == pytest.approx(left[2], rel=0.02)


# ---- the limit of many steps ----


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), OrnsteinUhlenbeck()])
def test_the_steps_tend_to_the_continuous_bound(sde) -> None:
    """sum L_(t-1) -> 1/2 int g^2 E|s - target|^2 dt, the likelihood-weighted loss, as 1 / N."""
    law = Gaussian(sde, torch.zeros(1, dtype=F64), math.sqrt(V))
    end, points = grids.default_end(sde), sigma_points(1)

    def slope(t: Tensor) -> Tensor:
        """1/2 g^2 / sigma^2 E|sigma s + z|^2, by two points of x_0 and two of z."""
        x_0, z = (math.sqrt(V) * points).repeat_interleave(2, 0), points.repeat(2, 1)
        loss = torch.zeros_like(t)
        for i in range(4):
            a, s = sde.alpha(t).reshape(-1, 1), sde.sigma(t).reshape(-1, 1)
            loss += (s * law(a * x_0[i] + s * z[i], t) + z[i]).square().mean(1) / 4
        return 0.5 * likelihood_weight(sde, t) * loss

    t = sde.time_at(
        torch.linspace(float(sde.log_snr(end)), float(sde.log_snr(sde.T)), 40001).double()
    )
    t[0], t[-1] = end, sde.T
    limit = float(torch.trapezoid(slope(t), t))
    away = []
    for steps in (100, 200, 400):
        chain = Chain(sde, grids.log_snr(sde, steps))
        away.append(float(chain.expected(isotropic(V)).sum()) - limit)
    rates = [math.log2(a / b) for a, b in pairwise(away)]
    assert rates == pytest.approx([1, 1], abs=0.1)


# ---- drawn terms ----

CHAIN = Chain(VP(), grids.log_snr(VP(), 12))


@pytest.mark.parametrize("variance", ["small", "large", "best"])
def test_every_term_is_what_it_is_expected_to_be(variance: str) -> None:
    law = gaussian(VP())
    known = law.facts.moments
    x = law.sample(4000, torch.Generator().manual_seed(0))
    chosen = known if variance == "best" else variance
    found = bound(law, x, CHAIN, variance=chosen, draws=1).mean()
    assert found.calls == 13
    away = found.steps.value - 3 * CHAIN.expected(known, chosen)
    assert bool((away.abs() < 4.5 * found.steps.standard_error).all())
    assert found.steps.value.shape == (12,)


def test_the_bound_of_a_mixture_is_one() -> None:
    law = line(VP())
    x = law.sample(3000, torch.Generator().manual_seed(0))
    errors = CHAIN.errors(law, law.sample(3000, torch.Generator().manual_seed(1)))
    truth = -float(law.log_prob(x).mean())
    best = bound(law, x, CHAIN, variance=errors).mean()
    worse = bound(law, x, CHAIN).mean()
    assert truth < float(best.total.value) < float(worse.total.value)
    # Many steps leave little but what the last step and the prior lose.
    fine = Chain(VP(), grids.information(VP(), 300, reference=0.6))
    errors = fine.errors(law, x[:500])
    close = bound(law, x, fine, variance=errors, draws=1).mean()
    assert abs(float(close.total.value) - truth) < 0.02 + 4 * float(close.total.standard_error)
    assert found_bits(close) == pytest.approx(float(close.total.value) / math.log(2), rel=1e-12)


def found_bits(b: Bound) -> float:
    return float(b.bits_per_dim.value)


def test_the_parts_make_the_whole() -> None:
    law = gaussian(VP())
    x = law.sample(5, torch.Generator().manual_seed(0))
    b = bound(law, x, CHAIN, draws=3)
    whole = b.prior.value + b.steps.value.sum(1) + b.reconstruction.value
    torch.testing.assert_close(b.total.value, whole)
    square = b.steps.standard_error.square().sum(1) + b.reconstruction.standard_error.square()
    torch.testing.assert_close(b.total.standard_error, square.sqrt())
    assert bool((b.prior.standard_error == 0).all())
    assert b.calls == 3 * 13
    torch.testing.assert_close(
        b.bits_per_dim.standard_error, b.total.standard_error / (3 * math.log(2))
    )
    # One draw says nothing of its error; the mean over samples does.
    once = bound(law, x, CHAIN, draws=1)
    assert bool(once.steps.standard_error.isnan().all())
    assert bool(torch.isfinite(once.mean().total.standard_error))
    # A sample does not depend on its batch.
    alone = bound(law, x[:2], CHAIN, draws=3)
    torch.testing.assert_close(alone.total.value, b.total.value[:2], rtol=1e-12, atol=0)
    few, kept = (bound(law, y, CHAIN, terms=4) for y in (x[:2], x))
    torch.testing.assert_close(few.total.value, kept.total.value[:2], rtol=1e-12, atol=0)
    assert few.calls == 6


@pytest.mark.parametrize("terms", [None, 3])
def test_neither_chunks_nor_a_bar_change_a_value(
    terms, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = ScoreNetwork(
        MLP((3,), 16, 1, classes=4, head=True), VP(), facts=Facts((3,), levels=8)
    ).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    k = torch.randint(0, 8, (7, 3), generator=torch.Generator().manual_seed(0))
    model = network.given(y=torch.arange(7) % 4)
    whole = bound(model, k, CHAIN, variance="learned", terms=terms)
    assert "likelihood" not in capsys.readouterr().err
    parts = bound(model, k, CHAIN, variance="learned", terms=terms, chunk=3, progress=True)
    assert "likelihood" in capsys.readouterr().err
    listed = bound(model, k.tolist(), CHAIN, variance="learned", terms=terms, chunk=np.int64(2))
    for name in ("prior", "steps", "reconstruction", "total"):
        one, *others = (getattr(b, name) for b in (whole, parts, listed))
        for other in others:
            torch.testing.assert_close(other.value, one.value, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(
                other.standard_error, one.standard_error, rtol=1e-6, atol=1e-9
            )
    assert whole.calls == parts.calls == (2 * 13 if terms is None else 2 + terms)
    with pytest.raises(ValueError, match="bound for 7 samples, x has 6"):
        bound(model, k[:6], CHAIN, chunk=3)


def test_a_long_bound_says_so_beforehand(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 calls a draw, 26 in all, in each of two chunks; each takes ten seconds."""
    now = iter(10.0 * i for i in range(100))
    monkeypatch.setattr("sde_gen.likelihood.watch.time.perf_counter", lambda: next(now))
    with caplog.at_level(logging.WARNING, logger="sde_gen.likelihood"):
        bound(gaussian(VP()), draw(4, 3), CHAIN, chunk=2)
    assert caplog.text.count("52 calls will take about 9 minutes") == 1


@pytest.mark.parametrize("importance", ["moments", "errors", "wrong"])
def test_a_few_drawn_steps_have_the_right_mean(importance: str) -> None:
    law = mixture(VP())
    x = law.sample(1, torch.Generator().manual_seed(2)).expand(20_000, 2).contiguous()
    told = {
        "moments": isotropic(0.5),
        "errors": CHAIN.errors(law, law.sample(500, torch.Generator().manual_seed(1))),
        "wrong": isotropic(25.0),
    }[importance]
    all_terms = bound(law, x, CHAIN, draws=1).mean()
    drawn = bound(law, x, CHAIN, terms=2, draws=1, importance=told, seed=7).mean()
    error = math.hypot(*(float(b.total.standard_error) for b in (all_terms, drawn)))
    assert abs(float(drawn.total.value - all_terms.total.value)) < 4.5 * error
    away = (drawn.steps.value - all_terms.steps.value).abs()
    both = (drawn.steps.standard_error**2 + all_terms.steps.standard_error**2).sqrt()
    assert bool((away < 4.5 * both).all())


REPEATS, LEVEL = 2000, 1e-3


def test_the_intervals_cover_what_they_say() -> None:
    """2,000 intervals of 95 % for the bound of a mixture, from 4 drawn steps of 60 data each; the
    truth is all terms of a great many samples."""
    law = mixture(VP())
    x = law.sample(60 * REPEATS, torch.Generator().manual_seed(11))
    drawn = bound(law, x, CHAIN, terms=4, draws=1, variance="large").total.value
    truth = bound(law, x[:60_000], CHAIN, draws=1, variance="large", seed=1).mean().total.value
    each = Estimate.of(drawn.reshape(REPEATS, 60).T)
    half = stats.t.ppf(0.975, 59) * each.standard_error
    low, high = stats.binom.ppf([LEVEL / 2, 1 - LEVEL / 2], REPEATS, 0.95)
    away = (each.value - truth).abs()
    assert low <= int((away < half).sum()) <= high
    # The same test tells intervals that are too narrow by a fifth.
    assert int((away < 0.8 * half).sum()) < low


# ---- one draw of t ----


class Uniform:
    """Uniform in t, or in lambda, from 1e-4."""

    def __init__(self, in_lambda: bool) -> None:
        self.in_lambda = in_lambda

    def __call__(self, sde, u: Tensor) -> Tensor:
        if not self.in_lambda:
            return 1e-4 + (1 - 1e-4) * u
        a, b = (float(sde.log_snr(t)) for t in (1e-4, 1.0))
        return sde.time_at(a + (b - a) * u)


class LogNormal(LogNormalTimes):
    """Karras's, cut where the others are."""

    def __call__(self, sde, u: Tensor) -> Tensor:
        low, high = (
            float(torch.special.ndtr((-0.5 * sde.log_snr(t) - self.log_mean) / self.log_std))
            for t in (1e-4, 1.0)
        )
        z = torch.special.ndtri(low + (high - low) * u)
        return sde.time_at(-2 * (self.log_mean + self.log_std * z))


def deviation(times, n: int) -> float:
    """Relative standard deviation of |x_0 - D|^2 / w dlambda/du: |x_0 - D|^2 is chi^2 with n
    degrees of freedom times C / (1 + C / w)."""
    sde, h = VP(), 1e-7
    u = (torch.arange(400_000, dtype=F64) + 0.5) / 400_000
    lam = [0.5 * sde.log_snr(times(sde, v)) for v in (u - h, u, u + h)]
    w = torch.exp(-2 * lam[1])
    draws = (lam[0] - lam[2]).abs() / (2 * h) * V / (1 + V / w) / w
    square = (1 + 2 / n) * float(draws.square().mean()) / float(draws.mean()) ** 2
    return math.sqrt(square - 1)


@pytest.mark.parametrize(
    ("times", "printed"),
    [
        (Uniform(False), ("10.5", "10.3")),
        (LogNormal(-1.2, 1.2), ("7.4", "7.3")),
        (LogNormal(-1.2, 1.8), ("1.7", "1.7")),
        (Uniform(True), ("0.99", "0.96")),
        (InformationTimes(V, end=1e-4), ("0.177", "0.026")),
    ],
    ids=["uniform", "edm", "wider", "lambda", "information"],
)
def test_how_much_one_draw_of_a_time_tells(times, printed) -> None:
    for n, wanted in zip((64, 3072), printed, strict=True):
        digits = len(wanted.split(".")[1])
        assert f"{deviation(times, n):.{digits}f}" == wanted
    if isinstance(times, InformationTimes):
        assert deviation(times, 64) == pytest.approx(math.sqrt(2 / 64), rel=1e-4)


# ---- levels ----

LEVELS = 16


@pytest.mark.parametrize("decoder", ["discretised", "bayes"])
def test_l_0_is_a_law_of_the_levels(decoder: str) -> None:
    """One coordinate: exp(-L_0) at one x_1 sums to 1 over all levels."""
    from sde_gen.chain.terms import decoder_of

    law = Gaussian(VP(), torch.zeros(1, dtype=F64), 0.5)
    facts = Facts((1,), 0.5, units=Units(torch.tensor(0.1), torch.tensor(1.7)))
    chain = Chain(VP(), [0.05, 1.0])
    k = torch.arange(LEVELS).unsqueeze(1)
    for place in (0.0, 0.37, -1.4, 9.0):
        x_1 = torch.full((LEVELS, 1), place, dtype=F64)
        _, decode = decoder_of(facts, chain, k, decoder, LEVELS)  # type: ignore[arg-type]
        mass = torch.exp(-decode(x_1, chain.step(law, x_1, 1, 0)))
        assert float(mass.sum()) == pytest.approx(1, abs=1e-12)


def tanh_decoder(k: int, mean: float, std: float) -> float:
    """-log of the mass of a cell as public code has it: Phi by tanh, a clamp at 1e-12."""

    def phi(x: float) -> float:
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    low, high = ((2 * (k + i) / LEVELS - 1 - mean) / std for i in (0, 1))
    return -math.log(max(phi(high) - phi(low), 1e-12))


def test_l_0_counts_what_is_forty_sigma_away() -> None:
    # The cell of level 9 begins 9.3 deviations above the mean and ends 18.6 above it.
    mean, std = 2 * 9 / LEVELS - 1 - 2 / LEVELS, 2 / LEVELS / 9.3
    wide = [torch.tensor(v, dtype=F64) for v in (mean, std)]
    found = -float(gaussians.discretised(torch.tensor(9), *wide, LEVELS))
    assert found == pytest.approx(-stats.norm.logsf(9.3), rel=1e-9)
    # The clamp is no bound: it says less than the truth.
    assert tanh_decoder(9, mean, std) == pytest.approx(27.63, abs=0.01)
    assert found > 46
    # Through the bound: a model that is sure of the wrong picture pays all of it.
    sure = Gaussian(VP(), torch.ones(1, dtype=F64), 1e-6)
    for first in (1e-4, 4e-3):
        chain = Chain(VP(), [first, 1.0])
        std = math.sqrt(float(chain.variance(1, 0, "large")))
        b = bound(sure, torch.zeros(3, 1).long(), chain, n_levels=LEVELS, variance="large")
        away = (2 - 2 / LEVELS) / std
        assert away > 40
        value = float(b.reconstruction.value.mean())
        assert value == pytest.approx(-stats.norm.logsf(away), rel=1e-4)


def test_the_bayes_decoder_is_bayes_rule() -> None:
    y, std = draw(6, 3), torch.tensor(0.2, dtype=F64)
    k = torch.tensor([[0, 5, 15]]).expand(6, 3)
    centres = (2 * torch.arange(LEVELS).double() + 1) / LEVELS - 1
    joint = torch.exp(-0.5 * ((y.unsqueeze(-1) - centres) / std) ** 2)
    exact = (joint / joint.sum(-1, keepdim=True)).gather(-1, k.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(bayes(k, y, std, LEVELS).exp(), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decoder", ["discretised", "bayes"])
def test_the_bound_of_levels_is_above_their_entropy(decoder: str) -> None:
    """A law of four levels on the line, each a point: its entropy is known."""
    from sde_gen import GaussianMixture

    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    centres = (2 * torch.arange(4).double() + 1) / 4 - 1
    law = GaussianMixture(VP(), p, centres.unsqueeze(1), 0.0)
    k = torch.multinomial(p, 3000, replacement=True, generator=torch.Generator().manual_seed(0))
    chain = Chain(VP(), grids.log_snr(VP(), 400, end=float(VP().time_at(2 * math.log(20)))))
    errors = chain.errors(law, centres[k[:500]].unsqueeze(1))
    found = bound(
        law, k.unsqueeze(1), chain, variance=errors, decoder=decoder, n_levels=4, draws=1
    )  # type: ignore[arg-type]
    mean = found.mean().total
    entropy = -float(p.log()[k].mean())
    above = float(mean.value) - entropy
    assert -4 * float(mean.standard_error) < above < 0.1 + 4 * float(mean.standard_error)


# ---- units ----


def test_units_change_the_bound_by_their_volume() -> None:
    law = gaussian(VP())
    units = Units(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, 0.5, 10.0]))
    scaled = law.with_facts(Facts((3,), law.facts.std, law.facts.moments, units))
    z = law.sample(6, torch.Generator().manual_seed(0))
    plain, moved = bound(law, z, CHAIN), bound(scaled, units.decode(z), CHAIN)
    torch.testing.assert_close(
        moved.total.value, plain.total.value + math.log(15), rtol=1e-9, atol=1e-9
    )
    assert torch.allclose(moved.steps.value, plain.steps.value)


@pytest.mark.parametrize("decoder", ["discretised", "bayes"])
def test_levels_are_the_same_bits_in_every_unit(decoder: str) -> None:
    """The process sees z = (x - shift) / scale: a law of z with that much other moments."""
    k = torch.randint(0, LEVELS, (5, 2), generator=torch.Generator().manual_seed(0))
    wide = Gaussian(EDM(), torch.zeros(2, dtype=F64), 1.0)
    half = wide.with_facts(
        Facts((2,), 1.0, wide.facts.moments, Units(torch.tensor(0.0), torch.tensor(0.5)))
    )
    narrow = Gaussian(EDM(), torch.zeros(2, dtype=F64), 0.5)
    options = {"decoder": decoder, "n_levels": LEVELS, "variance": "large"}
    grid = grids.karras(EDM(), 10)
    one = bound(half, k, Chain(EDM(), grid), **options)  # type: ignore[arg-type]
    other = bound(narrow, k, Chain(EDM(), grid[1:] / 2), **options)  # type: ignore[arg-type]
    half_chain = bound(half, k, Chain(EDM(), grid[1:]), **options)  # type: ignore[arg-type]
    assert one.dimensions == other.dimensions == 2
    mean = abs(float(half_chain.mean().total.value - other.mean().total.value))
    error = math.hypot(
        *(float(b.total.standard_error.square().mean().sqrt()) for b in (half_chain, other))
    )
    assert mean < 4 * error / math.sqrt(5)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, list, torch.uint8])
@pytest.mark.parametrize("decoder", ["discretised", "bayes"])
def test_levels_come_in_every_kind_of_integer(kind, decoder: str) -> None:
    law, k = gaussian(VP()), torch.tensor([[3, 0, 16], [7, 9, 2]])
    options = {"decoder": decoder, "n_levels": 17, "draws": 1}
    same = (
        k.tolist()
        if kind is list
        else k.to(kind)
        if kind is torch.uint8
        else k.numpy().astype(kind)
    )
    found, wanted = (bound(law, v, CHAIN, **options).total.value for v in (same, k))
    assert torch.equal(found, wanted)


def test_data_come_as_arrays_and_lists() -> None:
    law, x = gaussian(VP()), draw(2, 3)
    wanted = bound(law, x, CHAIN, draws=1).total.value
    for same in (x.numpy(), x.tolist()):
        assert torch.equal(bound(law, same, CHAIN, draws=1).total.value, wanted)


def test_a_mean_knows_what_it_cost_and_that_of_one_sample_its_error() -> None:
    law, x = gaussian(VP()), draw(2, 3)
    both, one = bound(law, x, CHAIN), bound(law, x[:1], CHAIN)
    assert both.mean().total.calls == both.total.calls == both.calls
    assert both.mean().total.method == "chain"
    for name in ("prior", "steps", "reconstruction", "total"):
        mean, own = getattr(one.mean(), name), getattr(one, name)
        assert torch.equal(mean.value, own.value[0])
        assert torch.equal(mean.spread, own.spread[0])


def test_what_cannot_be_bounded_says_so() -> None:
    law, x = gaussian(VP()), draw(2, 3)
    with pytest.raises(ValueError, match="the chain is of"):
        bound(law, x, Chain(VE(), [0.5, 1.0]))
    with pytest.raises(TypeError, match="chain must be"):
        bound(law, x, [0.5, 1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is of levels, integers"):
        bound(law, x, CHAIN, decoder="bayes")
    with pytest.raises(ValueError, match="decoder must be one of"):
        bound(law, torch.zeros(2, 3).long(), CHAIN, decoder="gaussian")
    with pytest.raises(ValueError, match="levels must lie in"):
        bound(law, torch.full((2, 3), 300), CHAIN)
    with pytest.raises(ValueError, match="x must have shape"):
        bound(law, draw(2, 4), CHAIN)
    for k in (torch.zeros(0, 3).long(), torch.zeros(3).long()):
        with pytest.raises(ValueError, match=r"levels must be \(B, \*D\)"):
            bound(law, k, CHAIN)
    for known in ({"prior": Moments(torch.ones(5))}, {"variance": Moments(torch.ones(5))}):
        with pytest.raises(ValueError, match="moments of 5 coordinates, the data have 3"):
            bound(law, x, CHAIN, **known)
    with pytest.raises(ValueError, match="errors must be"):
        bound(law, x, CHAIN, terms=2, importance=torch.ones(4))
    with pytest.raises(ValueError, match="leave terms out"):
        bound(law, x, Chain(VP(), [1.0]), terms=2)
    with pytest.raises(ValueError, match="draws must"):
        bound(law, x, CHAIN, draws=0)
    assert np.isfinite(float(bound(law, x, Chain(VP(), [1.0])).mean().total.value))
