"""Powers, products and mixtures of laws, several conditions and weights by the noise level."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import F64, correlated, draw, gaussian, mixture
from torch import Tensor

import sde_gen as sg
from sde_gen import EDM, VP, ClassifierFree, Facts, Gaussian, GaussianMixture, Score, solve
from sde_gen.guidance import AtLevel, Composed, Interval, Mixture, Product, Tempered, autoguidance
from sde_gen.networks import MLP
from sde_gen.noise import Impulses
from sde_gen.ops import Time, as_time
from sde_gen.sdes import LinearSDE, Reverse

pytestmark = pytest.mark.filterwarnings("ignore:the steps are too long")

ONE = torch.ones(1, dtype=F64)


def normal(sde: LinearSDE, mean: float, variance: float) -> Gaussian:
    return Gaussian(sde, mean * ONE, math.sqrt(variance))


def law(
    process: Reverse, times: Tensor, solver: sg.Solver, start: float, mean: float = 0.0
) -> tuple[float, float]:
    """Mean and variance of what a sampler makes of N(mean, start), by its impulses: no chance."""
    n = len(times) - 1 if process.eta else 0
    x = torch.zeros(n + 2, 1, dtype=F64)
    x[n] = 1.0
    y = solve(process, x, times, solver, Impulses())
    gains = (y[:-1] - y[-1]).flatten()
    variance = gains[:-1].square().sum() + gains[-1] ** 2 * start
    return float(y[-1] + gains[-1] * mean), float(variance)


# ---- powers ----


@pytest.mark.parametrize("sde", [VP(), EDM(20.0)], ids=repr)
@pytest.mark.parametrize(("eta", "a"), [(0.2, 3.0), (1.0, 0.5), (1.0, 4.0), (2.0, 2.0)])
def test_a_tempered_gaussian_is_exact_at_every_noise_level(
    sde: LinearSDE, eta: float, a: float
) -> None:
    """In nine steps, by the exponential integrator that knows its variance."""
    v = 0.3
    cold = Tempered(normal(sde, 0.0, v), a)
    times = sg.grids.log_snr(sde, 9, end=1e-3)
    start = (float(sde.alpha(sde.T)) ** 2 * v + float(sde.sigma(sde.T)) ** 2) / a
    alpha, sigma = float(sde.alpha(1e-3)), float(sde.sigma(1e-3))
    for solver in (sg.Exponential(1, v), sg.Exponential(1, v, corrector=True)):
        mean, variance = law(sde.reverse(cold, eta), times, solver, start)
        assert mean == 0
        assert variance == pytest.approx((alpha**2 * v + sigma**2) / a, rel=1e-9)


def test_naive_scaling_has_another_law_in_closed_form() -> None:
    """eta^2 v / ((1 + eta^2) a - 1) with noise; by the flow (v / w_T)^(a - 1) v."""
    sde, v, a, w_T = EDM(80.0), 0.3, 2.0, 80.0**2
    naive = a * normal(sde, 0.0, v)
    times = sg.grids.log_snr(sde, 400, end=1e-3)
    for eta in (0.7, 1.0):
        _, variance = law(sde.reverse(naive, eta), times, sg.Exponential(2, v), w_T)
        assert variance == pytest.approx(eta**2 * v / ((1 + eta**2) * a - 1), rel=3e-3)
        assert abs(variance / (v / a) - 1) > 0.3
    _, variance = law(sde.probability_flow(naive), times, sg.RungeKutta(), w_T)
    assert variance == pytest.approx((v / (v + w_T)) ** a * w_T, rel=1e-3)


def test_a_tempered_reversal_scales_its_langevin_part_alone() -> None:
    """Euler-Maruyama written out: dX = [b - (1 + a eta^2) / 2 g^2 s] dt + eta g dW."""
    sde, eta, a = VP(), 0.8, 3.0
    score, noise = mixture(sde), sg.Streams(4)
    times = sg.grids.log_snr(sde, 30, end=1e-2)
    x = y = draw(5, 2, seed=1)
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        g = float(sde.diffusion(t))
        drift = sde.drift(y, t) - (1 + a * eta**2) / 2 * g**2 * score(y, t)
        y = y + (s - t) * drift + eta * g * math.sqrt(t - s) * noise(y, t, s)
    cold = Tempered(score, a)
    found = solve(sde.reverse(cold, eta), x, times, sg.EulerMaruyama(), noise)
    torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-10)
    factor = (1 + a * eta**2) / (1 + eta**2)
    for reversal in (sde.reverse(cold, eta), sde.reverse(cold.rows(slice(0, 5)), eta)):
        drift = sde.drift(x, 0.4) - (1 + eta**2) / 2 * sde.diffusion(0.4) ** 2 * factor * score(
            x, 0.4
        )
        torch.testing.assert_close(reversal.drift(x, 0.4), drift)


def test_what_a_tempered_score_is_added_to_or_bound_in_knows_the_noise_level() -> None:
    sde, eta, a, x = VP(), 0.5, 3.0, draw(4, 2)
    p, q = mixture(sde), correlated(sde)
    s = (1 + a * eta**2) / (1 + eta**2) * p(x, 0.3)
    for made, wanted in (
        (Tempered(p, a) + 0.5 * q, s + 0.5 * q(x, 0.3)),
        (Tempered(Tempered(p, 1.5), 2.0), s),
        (Product([(Tempered(p, a), 1.0)]), s),
        (autoguidance(Tempered(p, a), q, 0.5), 1.5 * s - 0.5 * q(x, 0.3)),
    ):
        score: Any = sde.reverse(made, eta).score
        torch.testing.assert_close(score(x, 0.3), wanted)
        assert made.temperature == pytest.approx(1 / a)
    with pytest.raises(ValueError, match=r"eta must be positive; for the flow .* Product"):
        sde.probability_flow(Tempered(p, a) + q)
    with pytest.raises(ValueError, match="eta must be positive"):
        sg.sample(Tempered(p, a), 2, 3, eta=0.0)
    with pytest.raises(ValueError, match="a must be"):
        Tempered(p, 0.0)


def test_a_tempered_law_starts_as_cold() -> None:
    p = mixture(VP())
    warm = sg.sample(p, 3, 4, seed=0, eta=1.0, trajectory=True, dtype=F64)
    cold = sg.sample(Tempered(p, 4.0), 3, 4, seed=0, trajectory=True, dtype=F64)
    torch.testing.assert_close(cold[0], warm[0] / 2)
    assert float((cold[-1] - warm[-1]).abs().max()) > 0.1


# ---- products ----


def multiplied(terms: list[tuple[Gaussian, float]]) -> Gaussian:
    """The Gaussian prod_i N(m_i, C_i)^a_i, by dense algebra."""
    precision, lean = 0.0, 0.0
    for g, a in terms:
        m = g.facts.moments
        c = m.apply((m.coefficient(m.values.numpy()),), (torch.eye(len(g.mean), dtype=F64),))
        precision = precision + a * torch.linalg.inv(c)
        lean = lean + a * torch.linalg.solve(c, g.mean)
    c = torch.linalg.inv(precision)
    return Gaussian(terms[0][0].sde, c @ lean, covariance=(c + c.T) / 2)


def pairs(sde: LinearSDE, kind: str) -> list[tuple[Gaussian, float]]:
    if kind == "isotropic":
        return [(Gaussian(sde, draw(3, seed=1), 0.6), 2.5), (Gaussian(sde, draw(3), 1.1), -1.5)]
    if kind == "diagonal":
        return [(gaussian(sde), 1.0), (Gaussian(sde, draw(3), 0.7), 0.5)]
    other = Gaussian(sde, draw(2), torch.tensor([0.4, 1.3], dtype=F64))
    return [(correlated(sde), 1.0), (other, 1.5), (Gaussian(sde, draw(2, seed=3), 2.0), -0.5)]


@pytest.mark.parametrize("sde", [VP(), EDM(20.0), sg.RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_a_product_of_gaussians_is_the_score_of_their_product(sde: LinearSDE, kind: str) -> None:
    terms = pairs(sde, kind)
    product, exact = Product(terms), multiplied(terms)
    x = draw(4, *exact.shape, seed=5)
    for t in (0.0, 0.02, 0.5 * sde.T, 0.99 * sde.T, sde.T * torch.tensor([0.1, 0.3, 0.7, 0.9])):
        torch.testing.assert_close(product(x, t), exact(x, t), rtol=1e-8, atol=1e-9)
    later = 0.4 * sde.T
    torch.testing.assert_close(product.denoise(x, later), exact.denoise(x, later))
    half = product(x.float(), later)
    torch.testing.assert_close(half, exact(x, later).float(), rtol=1e-4, atol=1e-4)
    assert float((sum(a * s(x, later) for s, a in terms) - exact(x, later)).abs().max()) > 1e-2


def test_a_product_knows_the_data_where_no_signal_is_left() -> None:
    sde = sg.RectifiedFlow()
    for kind in ("isotropic", "full"):
        terms = pairs(sde, kind)
        exact = multiplied(terms)
        x = draw(3, *exact.shape)
        mean = exact.mean.expand_as(x)
        torch.testing.assert_close(Product(terms).denoise(x, 1.0), mean, rtol=1e-7, atol=1e-8)
    drawn = sg.sample(Product(pairs(sde, "isotropic")), 4, 12, seed=0, dtype=F64)
    assert drawn.isfinite().all()


def test_guidance_overshoots_gaussians_by_what_is_known_and_a_product_does_not() -> None:
    """Class N(1, 0.3), all data N(0, 1), weight 1.5: the flow of the sum ends in a mean of 1.53
    and a variance of 0.049; the product that is meant has 1.22 and 0.146."""
    sde, mu, v_c, v_u, g, w_T = EDM(80.0), 1.0, 0.3, 1.0, 1.5, 80.0**2
    c, u = normal(sde, mu, v_c), normal(sde, 0.0, v_u)
    guided, product = (1 + g) * c - g * u, Product([(c, 1 + g), (u, -g)])
    # d(m / G) / dw = -(1 + g) mu / 2 (v_c + w)^-1 / G, with the gain G of the linear flow.
    log_w = torch.linspace(math.log(1e-9), math.log(w_T), 40_001, dtype=F64)
    w = log_w.exp()
    gain = (v_c / (v_c + w)) ** ((1 + g) / 2) * (v_u / (v_u + w)) ** (-g / 2)
    mean = float(torch.trapezoid(0.5 * (1 + g) * mu / (v_c + w) * gain * w, log_w))
    variance = float(gain[-1]) ** 2 * w_T
    times = sg.grids.log_snr(sde, 300, end=1e-4)
    found = law(sde.probability_flow(guided), times, sg.RungeKutta(), w_T)
    assert found == pytest.approx((mean, variance), rel=1e-4)
    assert found == pytest.approx((1.53, 0.049), abs=5e-3)
    precision = (1 + g) / v_c - g / v_u
    meant = ((1 + g) * mu / v_c / precision, 1 / precision)
    for eta in (0.0, 1.0):
        start = w_T + 1 / precision
        solver = sg.Exponential(1, 1 / precision) if eta else sg.RungeKutta()
        found = law(sde.reverse(product, eta), times, solver, start, meant[0])
        assert found == pytest.approx(meant, rel=1e-3)


def test_a_product_of_one_covariance_is_the_sum() -> None:
    """As in classifier-free guidance: powers that sum to 1, and nothing is known apart."""
    sde, x = VP(), draw(5, 2)
    p, q = mixture(sde), mixture(sde).with_facts(mixture(sde).facts)
    q = q.with_facts(p.facts)
    for t in (0.01, 0.4, 1.0):
        torch.testing.assert_close(
            Product([(p, 2.5), (q, -1.5)])(x, t), 2.5 * p(x, t) - 1.5 * q(x, t)
        )


def test_products_that_are_no_densities_are_refused() -> None:
    sde = VP()
    narrow, wide = normal(sde, 0.0, 0.1), normal(sde, 0.0, 1.0)
    with pytest.raises(ValueError, match="make no density"):
        Product([(wide, 2.0), (narrow, -1.0)])
    with pytest.raises(ValueError, match="invertible"):
        Product([(Gaussian(sde, ONE, 0.0), 1.0)])
    with pytest.raises(TypeError, match="know their process"):
        Product([(Score(), 1.0)])
    for kind in (Product, Mixture):
        with pytest.raises(TypeError, match=r"needs \[\(score, number\)"):
            kind([])
        with pytest.raises(ValueError, match="one process"):
            kind([(wide, 1.0), (normal(EDM(), 0.0, 1.0), 1.0)])
        with pytest.raises(TypeError, match=r"needs \[\(score, number\)"):
            kind([wide])  # type: ignore[list-item]


def test_a_classifier_is_no_law_to_take_powers_of() -> None:
    """It would start as cold, and ``corrected`` would count it as a law."""
    term = sg.Classifier(MLP((1,), 8, 1, outputs=2), 1, VP())
    p = normal(VP(), 0.0, 1.0)
    assert [w for w, _ in (p + 2.0 * term).factors(ONE[None].float(), 0.5)] == [-1.0, 2.0]
    for build in (
        lambda: Tempered(term, 2.0),
        lambda: Product([(p, 1.0), (2.0 * term, 1.0)]),
        lambda: Mixture([(p, 1.0), (term, 1.0)]),
    ):
        with pytest.raises(ValueError, match="not classifiers alone"):
            build()


# ---- mixtures ----


@pytest.mark.parametrize("sde", [VP(), EDM(20.0)], ids=repr)
def test_a_mixture_of_experts_is_the_score_of_their_mixture(sde: LinearSDE) -> None:
    exact, x = mixture(sde), draw(6, 2, seed=2)
    weights, stds = exact.log_weights.exp(), exact.variance.sqrt()
    first = GaussianMixture(sde, weights[:2], exact.means[:2], stds[:2])
    last = Gaussian(sde, exact.means[2], stds[2])
    made = Mixture([(first, float(3 * weights[:2].sum())), (last, float(3 * weights[2]))])
    for t in (0.0, 0.3, torch.linspace(0.05, 0.9, 6, dtype=F64)):
        torch.testing.assert_close(made(x, t), exact(x, t), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(made.log_prob(x, t), exact.log_prob(x, t))
    torch.testing.assert_close(made.denoise(x, 0.3), exact.denoise(x, 0.3))
    with pytest.raises(TypeError, match="log_prob"):
        Mixture([(first, 1.0), (1.0 * last, 1.0)])
    with pytest.raises(ValueError, match="weight of an expert"):
        Mixture([(first, 1.0), (last, 0.0)])


# ---- a weaker model, and weights by the noise level ----


class Counted(Score):
    """Another score; counts its calls."""

    def __init__(self, score: Score) -> None:
        self.score, self.sde, self.facts, self.calls = score, score.sde, score.facts, 0

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.calls += 1
        return self.score(x, t)


def test_autoguidance_is_the_formula_with_one_call_each() -> None:
    sde, x, t = VP(), draw(4, 2), 0.4
    good, weak = Counted(mixture(sde)), Counted(correlated(sde))
    for w in (0.7, torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=F64), lambda t: 0.7):
        e = autoguidance(good, weak, w).evaluate(x, t)
        number = torch.as_tensor(0.7 if callable(w) else w, dtype=F64).reshape(-1, 1)
        d, d_weak = good.score.denoise(x, t), weak.score.denoise(x, t)
        torch.testing.assert_close(e.denoised, d + number * (d - d_weak))
    assert (good.calls, weak.calls) == (3, 3)
    inside = autoguidance(good, weak, Interval(sde, 0.1, 1.0, 2.0))
    torch.testing.assert_close(inside(x, 1.0), good.score(x, 1.0))
    assert (good.calls, weak.calls) == (4, 3)


def test_two_models_guide_where_no_signal_is_left() -> None:
    """Weights that sum to 1 combine denoised states: no division by alpha = 0."""
    sde = sg.RectifiedFlow()
    p, q, x = mixture(sde), correlated(sde), draw(3, 2)
    found = autoguidance(p, q, 0.5).denoise(x, 1.0)
    torch.testing.assert_close(found, 1.5 * p.denoise(x, 1.0) - 0.5 * q.denoise(x, 1.0))
    with pytest.raises(ValueError, match="alpha = 0"):
        (p + 0.5 * q).denoise(x, 1.0)


def test_weights_by_the_noise_level_are_the_same_on_every_clock() -> None:
    levels = torch.tensor([0.05, 0.2, 0.21, 1.0, 2.9, 3.0001, 20.0], dtype=F64)
    for sde in (VP(), sg.VE(sg.schedules.Geometric(0.01, 50.0)), EDM(80.0), sg.RectifiedFlow()):
        t = sde.time_at(-2 * levels.log())
        bell = AtLevel(sde, lambda level: 1 / (1 + level))
        torch.testing.assert_close(torch.as_tensor(bell(t)), 1 / (1 + levels))
        middle = Interval(sde, 0.205, 3.0, 1.5)
        wanted = [0.0, 0.0, 1.5, 1.5, 1.5, 0.0, 0.0]
        assert torch.as_tensor(middle(t)).tolist() == wanted
        assert [middle(u) for u in t] == wanted
        low, high = middle.times
        for time, edge in ((low, 0.205), (high, 3.0)):
            assert float(sde.sigma(time) / sde.alpha(time)) == pytest.approx(edge, rel=1e-6)
        assert Interval(sde).times == (0.0, sde.T)
        assert Interval(sde)(sde.T) == 1.0
        ramp = AtLevel(sde, lambda level: 2 * level / (1 + level))
        assert 1.8 < float(ramp(sde.T)) <= 2  # also where alpha = 0
    with pytest.raises(ValueError, match="high must be"):
        Interval(VP(), 1.0, 1.0)
    with pytest.raises(TypeError, match="sde must be"):
        Interval(0.2, 3.0)  # type: ignore[arg-type]


# ---- several conditions ----


class Labelled(Score):
    """Components of a mixture by label, all of it for -1; counts its calls."""

    classes = 3

    def __init__(self, sde: LinearSDE) -> None:
        self.sde, self.facts, self.calls = sde, Facts((2,)), 0
        whole = mixture(sde)
        stds = whole.variance.sqrt()
        self.table: dict[int, Score] = {
            k: Gaussian(sde, whole.means[k], stds[k]) for k in range(3)
        }
        self.table[-1] = whole

    def __call__(self, x: Tensor, t: Time, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        assert y is not None
        s, t = torch.empty_like(x), as_time(t).expand(len(x))
        for k in y.unique():
            s[y == k] = self.table[int(k)](x[y == k], t[y == k])
        return s


def test_conditions_compose_with_weights_and_negation_in_one_call() -> None:
    score, x, t = Labelled(VP()), draw(4, 2), torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=F64)
    y = torch.tensor([0, 2, 1, 0])
    made = Composed(score, [(1.5, {"y": y}), (-0.5, {"y": 1})])
    found = made(x, t)
    assert score.calls == 1
    free = score.table[-1](x, t)
    wanted = free + 1.5 * (score(x, t, y) - free) - 0.5 * (score.table[1](x, t) - free)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(made.rows(slice(1, 3))(x[1:3], t[1:3]), wanted[1:3])
    d = made.evaluate(x, t).denoised
    torch.testing.assert_close(d, VP().tweedie(x, t, wanted))
    one = Composed(score, [(3.0, {"y": y})])
    torch.testing.assert_close(one(x, t), ClassifierFree(score, 2.0, y=y)(x, t))
    rows = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=F64)
    each = Composed(score, [(rows, {"y": y}), (lambda t: 0.5, {"y": 2})])
    gap = rows.unsqueeze(1) * (score(x, t, y) - free) + 0.5 * (score.table[2](x, t) - free)
    torch.testing.assert_close(each(x, t), free + gap)


def test_in_each_term_what_others_bind_is_absent() -> None:
    torch.manual_seed(0)
    net = MLP((2,), 16, 1, classes=3, context={"theta": (2,)})
    for p in net.parameters():
        p.data = 0.3 * torch.randn_like(p)
    model, x, theta = sg.ScoreNetwork(net, VP()), draw(3, 2).float(), draw(3, 2, seed=1).float()
    made = Composed(model, [(2.0, {"y": 1}), (0.5, {"theta": theta})])
    free, by_y = model(x, 0.4), model.given(y=1)(x, 0.4)
    wanted = free + 2 * (by_y - free) + 0.5 * (model.given(theta=theta)(x, 0.4) - free)
    torch.testing.assert_close(made(x, 0.4), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'y' guides here"):
        made.given(y=2)
    with pytest.raises(TypeError, match="nothing to guide by"):
        Composed(model, [(1.0, {})])
    with pytest.raises(ValueError, match=r"0 .. 2, got 3"):
        Composed(model, [(1.0, {"y": 3})])
    with pytest.raises(ValueError, match="one batch size"):
        Composed(model, [(1.0, {"y": [0, 1]}), (1.0, {"theta": theta})])
    with pytest.raises(ValueError, match="does not say how it knows that 'text'"):
        Composed(model, [(1.0, {"text": theta})])
