"""The score of a posterior: exact for Gaussian data, its known errors, published updates."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from problems import F64, correlated, draw, gaussian, mixture
from torch import Tensor, nn

from sde_gen import (
    EDM,
    VP,
    Adaptive,
    ClassifierFree,
    CriticallyDamped,
    EulerMaruyama,
    Exponential,
    Facts,
    Gaussian,
    GaussianMixture,
    Heun,
    Impulses,
    LinearSDE,
    Moments,
    RectifiedFlow,
    Reverse,
    Score,
    ScoreNetwork,
    Solver,
    Streams,
    SubVP,
    grids,
    sample,
    solve,
)
from sde_gen.facts import Units
from sde_gen.inverse import (
    Covariance,
    DataCovariance,
    Isotropic,
    Mask,
    Matrix,
    Nonlinear,
    Observation,
    Point,
    Posterior,
    Tweedie,
    TweedieDiagonal,
    dps,
    exact_posterior,
    mmps,
    pigdm,
    tmpd,
)
from sde_gen.solvers import ddpm

SDE = VP()
RULES: list[Covariance] = [
    DataCovariance(),
    DataCovariance(jacobian=True),
    Isotropic(),
    Tweedie(),
    TweedieDiagonal(),
    Point(),
]
EXACT: list[Covariance] = [DataCovariance(), DataCovariance(jacobian=True), Tweedie(8, 0.0)]


def full(sde: LinearSDE, n: int = 4) -> Gaussian:
    root = draw(n, n, seed=1) / 2
    return Gaussian(sde, draw(n, seed=2), covariance=root @ root.T + 0.02 * torch.eye(n))


def observed(n: int = 4) -> list[Observation]:
    """Two, one with correlated noise and one with a deviation of its own a number."""
    root = draw(2, 2, seed=3) / 4 + 0.1 * torch.eye(2, dtype=F64)
    first = Observation(Matrix(draw(2, n, seed=4)), draw(2, seed=5), covariance=root @ root.T)
    noise = torch.tensor([0.05, 0.4])
    return [first, Observation(Matrix(draw(2, n, seed=6)), draw(2, seed=7), noise)]


# ---- exact for Gaussian data ----


@pytest.mark.parametrize("rule", EXACT, ids=repr)
@pytest.mark.parametrize("sde", [VP(), EDM(10.0), SubVP()], ids=lambda s: type(s).__name__)
def test_the_score_is_exact_for_gaussian_data(rule: Covariance, sde: LinearSDE) -> None:
    for prior, seen in (
        (full(sde), observed()),
        (gaussian(sde), observed(3)),
        (correlated(sde), observed(2)[:1]),
        (Gaussian(sde, draw(5), 0.7), observed(5)),
    ):
        exact, x = exact_posterior(prior, seen), draw(3, *prior.shape, seed=8)
        for t in (0.0, 1e-4 * sde.T, 0.3 * sde.T, sde.T):
            e = Posterior(prior, seen, rule).evaluate(x, t)
            torch.testing.assert_close(e.score, exact(x, t), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(e.denoised, exact.denoise(x, t), rtol=1e-9, atol=1e-9)
        t = torch.tensor([0.1, 0.5, 0.9], dtype=F64) * sde.T
        s = Posterior(prior, seen, rule)(x, t)
        torch.testing.assert_close(s, exact(x, t), rtol=1e-9, atol=1e-9)


def law(score: Score, start: Gaussian, solver: Solver, times: Tensor, eta: float) -> list[Tensor]:
    """Mean and covariance of what a linear sampler draws, from unit impulses, started from the
    law of ``start`` at times[0]."""
    n, steps = math.prod(start.shape), len(times) - 1
    alpha, sigma = (float(c(times[0])) for c in (start.sde.alpha, start.sde.sigma))
    c = start.facts.moments.apply(
        (start.facts.moments.coefficient(start.facts.moments.values.numpy()),),
        (torch.eye(n, dtype=F64),),
    )
    root = torch.linalg.cholesky(alpha**2 * c + sigma**2 * torch.eye(n, dtype=F64))
    x = alpha * start.mean.expand(steps * n + n + 1, n).clone()
    x[steps * n : -1] += root.T

    class Each(Impulses):
        """One row a number of a draw."""

        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            z = torch.zeros_like(x)
            z[self.draws * n : (self.draws + 1) * n] = torch.eye(n, dtype=F64)
            self.draws += 1
            return z

    out = solve(start.sde.reverse(score, eta), x, times, solver, Each())
    away = out[:-1] - out[-1]
    return [out[-1], away.T @ away]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", EXACT, ids=repr)
def test_the_law_that_is_sampled_is_the_exact_posterior(rule: Covariance, eta: float) -> None:
    prior, seen = correlated(SDE), observed(2)[:1]
    exact, posterior = exact_posterior(prior, seen), Posterior(prior, seen, rule)
    assert isinstance(exact, Gaussian)
    moments = exact.facts.moments
    c = moments.apply((moments.coefficient(moments.values.numpy()),), (torch.eye(2, dtype=F64),))
    solver, error = Exponential(2, prior.facts.moments, corrector=True), []
    for n in (20, 160):
        times = grids.default(SDE, n, data_std=prior.facts.std)
        mean, covariance = law(posterior, exact, solver, times, eta)
        alpha, sigma = SDE.alpha(times[-1]), SDE.sigma(times[-1])
        at_end = alpha**2 * c + sigma**2 * torch.eye(2, dtype=F64)
        away = (mean - alpha * exact.mean).abs().max() + (covariance - at_end).abs().max()
        error.append(float(away))
    assert error[-1] < 1e-6, error
    assert error[-1] < error[0] / 8, error


# ---- closed-form errors for others ----


def scalar(rule: str, eta: float, v: float, noise: float) -> float:
    """Variance drawn for x ~ N(0, v) and o = x + N(0, noise^2), by quadrature of the linear SDE.

    In y = x / alpha, dw falling: dy = kappa / 2 (y - D_total) / w dw; the term's slope is
    -g^2 / (r2 + noise^2) with g = v / (v + w).
    """
    import numpy as np
    from scipy.integrate import solve_ivp

    def slope(w: float) -> float:
        g, r2 = v / (v + w), {"pigdm": w / (1 + w), "point": 0.0}[rule]
        return 1 / (v + w) + g**2 / (r2 + noise**2)

    s2 = noise**2
    post = v * s2 / (v + s2)

    def f(u: float, q: np.ndarray) -> np.ndarray:
        # w = exp(u), u falling: dP/du = kappa w slope P - eta^2 w.
        w = math.exp(u)
        return (1 + eta**2) * w * slope(w) * q - eta**2 * w

    w_T = float((SDE.sigma(1.0) / SDE.alpha(1.0)) ** 2)
    ends = (math.log(w_T), math.log(1e-9))
    out = solve_ivp(f, ends, [post + w_T], rtol=1e-9, atol=1e-14, method="LSODA")
    return float(out.y[0, -1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("v", "noise"), [(0.25, 0.05), (4.0, 0.5)])
@pytest.mark.parametrize("name", ["pigdm", "point"])
def test_published_terms_have_their_closed_form_errors(
    name: str, v: float, noise: float, eta: float
) -> None:
    prior = Gaussian(SDE, torch.zeros(1, dtype=F64), math.sqrt(v))
    seen = Observation(Matrix(torch.ones(1, 1, dtype=F64)), torch.zeros(1, dtype=F64), noise)
    rule = pigdm() if name == "pigdm" else Point()
    posterior, exact = Posterior(prior, seen, rule), exact_posterior(prior, seen)
    # At w = v the term of DPS has the rate v / 4 noise^2 = 25 a unit of lambda.
    times = grids.log_snr(SDE, 400 if name == "pigdm" else 1200, end=1e-7)
    solver = Exponential(2, float(exact.variance), corrector=True)
    _, found = law(posterior, exact, solver, times, eta)
    assert float(found) == pytest.approx(scalar(name, eta, v, noise), rel=2e-3, abs=1e-6)
    # As the first of these was measured by others in the same setting.
    if (name, v, eta) == ("pigdm", 0.25, 0.0):
        assert float(found / exact.variance) == pytest.approx(2.00, abs=0.01)
    if (name, v, eta) == ("pigdm", 4.0, 1.0):
        assert float(found / exact.variance) == pytest.approx(0.84, abs=0.01)


# ---- published updates, written out ----


class Curved(nn.Module):
    """A smooth network that counts its calls and backward passes; takes labels."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n, 16), nn.Tanh(), nn.Linear(16, n)).to(F64)
        self.classes, self.shape = 5, (n,)
        self.calls = self.passes = self.rows = 0

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls, self.rows = self.calls + 1, len(x)

        def count(grad: Tensor) -> Tensor:
            self.passes += 1
            return grad

        out = self.net(x) * torch.cos(c) if y is None else self.net(x) + y.unsqueeze(1) / 5
        return _Counted.apply(out, self)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, owner: Curved) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.owner = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.owner.passes += 1
        return grad, None


def network(n: int = 3, std: float = 0.8) -> ScoreNetwork:
    torch.manual_seed(3)
    return ScoreNetwork(Curved(n), SDE, "data", Facts((n,), std))


A = draw(2, 3, seed=11)
O = draw(2, seed=12)  # noqa: E741 (the symbol of the formulas)
X = draw(4, 3, seed=13)


def jacobians(model: Score, x: Tensor, t: float) -> Tensor:
    """dD / dx (B, n, n), by reverse-mode differentiation, one row of D at a time."""
    x = x.clone().requires_grad_()
    d = model.denoise(x, t)
    columns = [torch.autograd.grad(d[:, i].sum(), x, retain_graph=True)[0] for i in range(3)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("t", [0.05, 0.6])
def test_published_names_are_the_published_updates(t: float) -> None:
    model, noise = network(), 0.2
    seen = Observation(Matrix(A), O, noise)
    alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
    w = (sigma / alpha) ** 2
    d, jac, s = model.denoise(X, t).detach(), jacobians(model, X, t), model(X, t).detach()
    r, eye = (O - d @ A.T).unsqueeze(-1), torch.eye(2, dtype=F64)

    def check(rule: Covariance, k: Tensor) -> None:
        guide = (jac.mT @ A.T @ torch.linalg.inv(k) @ r).squeeze(-1)
        found = Posterior(model, seen, rule).evaluate(X, t)
        torch.testing.assert_close(found.score, s + guide, rtol=1e-9, atol=1e-11)
        tweedie = SDE.tweedie(X, t, s + guide)
        torch.testing.assert_close(found.denoised, tweedie, rtol=1e-9, atol=1e-9)

    # Song et al. 2023: r_t^2 = sigma^2 / (1 + sigma^2) in the variance-exploding clock.
    check(pigdm(), w / (1 + w) * A @ A.T + noise**2 * eye)
    v = model.facts.std**2
    check(Isotropic(), v * w / (v + w) * A @ A.T + noise**2 * eye)
    check(Point(), noise**2 * eye)
    # Boys et al. 2024: the vector A Cov A^T 1 on the diagonal.
    rows = (A @ (sigma**2 / alpha * jac.mT) @ A.T).sum(-1).clamp_min(0)
    check(tmpd(), torch.diag_embed(rows) + noise**2 * eye)
    # The prior's own Jacobian in the update, the data's covariance in the matrix.
    check(DataCovariance(jacobian=True), v * w / (v + w) * A @ A.T + noise**2 * eye)
    guide = v / (v + w) / alpha * A.T @ torch.linalg.inv(check_k(v * w / (v + w), noise)) @ r
    found = Posterior(model, seen).evaluate(X, t).score
    torch.testing.assert_close(found, s + guide.squeeze(-1), rtol=1e-9, atol=1e-11)


def check_k(r2: float, noise: float) -> Tensor:
    return r2 * A @ A.T + noise**2 * torch.eye(2, dtype=F64)


@pytest.mark.parametrize("iterations", [1, 2])
def test_mmps_is_so_many_conjugate_gradients(iterations: int) -> None:
    # Of an exact score, whose Jacobian is symmetric: gradients that conjugate need that.
    model, noise, t = GaussianMixture(SDE, torch.ones(3), draw(3, 3, seed=9), 0.5), 0.2, 0.3
    alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
    d, jac = model.denoise(X, t).detach(), jacobians(model, X, t)
    k = sigma**2 / alpha * A @ jac.mT @ A.T + noise**2 * torch.eye(2, dtype=F64)
    r = O - d @ A.T
    u, p, rho = torch.zeros_like(r), r.clone(), r.square().sum(1)
    for _ in range(iterations):
        q = torch.einsum("bij,bj->bi", k, p)
        step = rho / (p * q).sum(1)
        u, r = u + step[:, None] * p, r - step[:, None] * q
        rho, before = r.square().sum(1), rho
        p = r + (rho / before)[:, None] * p
    s = model(X, t).detach() + torch.einsum("bij,jk,bk->bi", jac.mT, A.T, u)
    found = Posterior(model, Observation(Matrix(A), O, noise), mmps(iterations))(X, t)
    torch.testing.assert_close(found, s, rtol=1e-9, atol=1e-11)


def test_dps_is_the_published_step() -> None:
    model, zeta, times = network(), 0.7, grids.log_snr(SDE, 6)
    posterior = Posterior(model, Observation(Matrix(A), O, 0.2), dps(SDE, times, zeta))
    found = solve(SDE.reverse(posterior, 1.0), X, times, ddpm(), Streams(5))
    x, noise = X, Streams(5)
    for t, s in pairwise(times.tolist()):
        alpha, alpha_s = float(SDE.alpha(t)), float(SDE.alpha(s))
        sigma, sigma_s = float(SDE.sigma(t)), float(SDE.sigma(s))
        a = (sigma_s / alpha_s * alpha / sigma) ** 2
        x = x.clone().requires_grad_()
        d = model.denoise(x, t)
        (grad,) = torch.autograd.grad((O - d @ A.T).norm(dim=1).sum(), x)
        mean = a * alpha_s / alpha * x + alpha_s * (1 - a) * d
        x = (mean + sigma_s * math.sqrt(1 - a) * noise(x, t, s) - zeta * grad).detach()
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="steps of another grid"):
        posterior(X, 0.123)


# ---- what a call costs ----


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_step_is_one_call_and_the_declared_passes(rule: Covariance) -> None:
    model = network()
    posterior = Posterior(model, Observation(Matrix(A), O, 0.2), rule)
    with torch.no_grad():
        posterior.evaluate(X, 0.3)
    net = model.net
    assert net.calls == 1
    assert net.passes == min(rule.passes, 2)  # conjugate gradients end with two measurements
    sample(posterior, 3, 7, seed=0, eta=1.0, dtype=F64, solver=Exponential(1))
    assert net.calls == 8


# ---- together with everything else ----


def test_observations_are_solved_for_jointly_in_any_order() -> None:
    prior, seen, x = full(SDE), observed(), draw(3, 4, seed=8)
    both = Posterior(prior, seen)(x, 0.3)
    exact = exact_posterior(prior, seen)(x, 0.3)
    torch.testing.assert_close(Posterior(prior, seen[::-1])(x, 0.3), both, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(both, exact, rtol=1e-9, atol=1e-9)
    added = Posterior(prior, seen[0]) + Posterior(prior, seen[1]) - prior
    assert float((added(x, 0.3) - exact).abs().max()) > 0.1


@pytest.mark.parametrize("rule", [*RULES[:3], RULES[-1]], ids=repr)
def test_conjugate_gradients_agree_with_factors(
    rule: Covariance, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, seen = full(SDE), observed()
    prior = prior if rule == RULES[0] else prior.with_facts(Facts((4,), 0.7))
    x = draw(3, 4, seed=8)
    dense = Posterior(prior, seen, rule)(x, 0.3)
    monkeypatch.setattr("sde_gen.inverse.whitened.MOST", 0)
    torch.testing.assert_close(Posterior(prior, seen, rule)(x, 0.3), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rows_and_chunks_follow(rule: Covariance) -> None:
    model = network()
    y, noise = draw(6, 2, seed=20), draw(6, 2, seed=21).abs() + 0.1
    each = Posterior(model.given(y=torch.arange(6) % 5), Observation(Matrix(A), y, noise), rule)
    assert each.batch == 6
    x = draw(6, 3, seed=22)
    whole = each(x, 0.4)
    one = Posterior(model.given(y=3), Observation(Matrix(A), y[3], noise[3]), rule)
    torch.testing.assert_close(one(x[3:4], 0.4), whole[3:4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(each.rows(slice(2, 5))(x[2:5], 0.4), whole[2:5])
    torch.testing.assert_close(each.rows(torch.tensor([4, 0]))(x[[4, 0]], 0.4), whole[[4, 0]])
    options = {"n": 6, "steps": 5, "seed": 1, "eta": 1.0, "dtype": F64}
    torch.testing.assert_close(sample(each, chunk=4, **options), sample(each, **options))
    with pytest.raises(ValueError, match="was given for 6 samples, the state has 2"):
        each(x[:2], 0.4)


def test_labels_and_guidance_go_inside() -> None:
    model = network()
    seen = Observation(Matrix(A), O, 0.2)
    labels = torch.tensor([0, 1, 2, 3])
    bound = Posterior(model, seen).given(y=labels)
    torch.testing.assert_close(bound(X, 0.3), Posterior(model.given(y=labels), seen)(X, 0.3))
    torch.testing.assert_close(
        Posterior(model, seen).evaluate(X, 0.3, y=labels).score, bound(X, 0.3)
    )
    model.net.calls = 0
    guided = Posterior(ClassifierFree(model, 1.5, y=labels), seen, DataCovariance(jacobian=True))
    guided(X, 0.3)
    assert (model.net.calls, model.net.rows) == (1, 8)
    # Moments are not forgotten where a label is bound.
    told = model.with_facts(Facts((3,), 0.8, Moments(torch.tensor([0.1, 0.5, 2.0]).double())))
    plain = Posterior(told, seen).given(y=2)(X, 0.3)
    assert not torch.allclose(plain, Posterior(model, seen).given(y=2)(X, 0.3))


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun(), Exponential(2, 0.3), Adaptive(0.3)])
def test_every_solver_takes_it(solver: Solver) -> None:
    prior, seen = mixture(SDE), observed(2)[0]
    for eta in (0.0, 0.6) if solver.weak else (0.0,):
        process = Reverse(SDE, Posterior(prior, seen, Tweedie(2)), eta)
        times = grids.default(SDE, 12)
        out = solve(process, draw(5, 2), times, solver, 0)
        assert bool(torch.isfinite(out).all())


def test_units_are_those_of_the_observation() -> None:
    """x = shift + scale z: the posterior of z under A x is that of z under A scale z."""
    prior, shift, scale = full(SDE), draw(4, seed=30), draw(4, seed=31).abs() + 0.5
    told = prior.with_facts(Facts((4,), prior.facts.std, prior.facts.moments, Units(shift, scale)))
    seen = observed()
    same = [
        Observation(Matrix(o.operator.matrix * scale), o.y - o.operator.matrix @ shift, noise)
        for o, noise in zip(seen, (0.1, 0.3), strict=True)
    ]
    seen = [Observation(o.operator, o.y, n) for o, n in zip(seen, (0.1, 0.3), strict=True)]
    x, exact = draw(3, 4, seed=8), exact_posterior(prior, same)
    for rule in EXACT:
        s = Posterior(told, seen, rule)(x, 0.2)
        torch.testing.assert_close(s, exact(x, 0.2), rtol=1e-9, atol=1e-9)
    square = Observation(Nonlinear(lambda x: x**2, (4,)), torch.ones(4, dtype=F64), 0.3)
    inner = Observation(
        Nonlinear(lambda z: (shift + scale * z) ** 2, (4,)), torch.ones(4, dtype=F64), 0.3
    )
    found, wanted = Posterior(told, square)(x, 0.2), Posterior(prior, inner)(x, 0.2)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_nonlinear_observation_is_linearised_at_the_denoised_state(rule: Covariance) -> None:
    model = network()

    def f(x: Tensor) -> Tensor:
        return torch.sin(x @ A.T) + x[:, :2] ** 2

    def at(d: Tensor) -> Observation:
        jac = torch.autograd.functional.jacobian(lambda d: f(d.unsqueeze(0))[0], d)
        return Observation(Matrix(jac), O - f(d.unsqueeze(0))[0] + jac @ d, 0.3)

    curved = Posterior(model, Observation(Nonlinear(f, (3,), dtype=F64), O, 0.3), rule)(X, 0.3)
    for i, d in enumerate(model.denoise(X, 0.3).detach()):
        linear = Posterior(model, at(d), rule)(X[i : i + 1], 0.3)
        torch.testing.assert_close(curved[i : i + 1], linear, rtol=1e-6, atol=1e-8)


def test_arithmetic_is_sheltered_from_autocast() -> None:
    prior, seen = full(SDE), observed()
    x = draw(3, 4, seed=8).float()
    for rule in RULES:
        posterior = Posterior(prior, seen, rule)
        plain = posterior(x, 0.3)
        assert plain.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(posterior(x, 0.3), plain, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_observation_flow_where_asked_for() -> None:
    posterior = Posterior(network(), Observation(Matrix(A), O, 0.2), DataCovariance(jacobian=True))
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: posterior(x, 0.3), x)
    e = posterior.linearise(X, 0.3)
    assert e.pull is not None
    assert bool(torch.isfinite(e.pull(X)).all())


def test_where_no_signal_is_left_the_denoised_state_is_the_posterior_mean() -> None:
    prior = full(RectifiedFlow())
    exact = exact_posterior(prior, observed())
    x = draw(3, 4, seed=8)
    for rule in RULES:
        d = Posterior(prior, observed(), rule).evaluate(x, 1.0).denoised
        torch.testing.assert_close(d, exact.denoise(x, 1.0), rtol=1e-9, atol=1e-9)


def test_it_prefers_noise() -> None:
    assert Posterior(full(SDE), observed()).eta == 1.0


def test_what_does_not_fit_is_refused() -> None:
    prior, seen = full(SDE), observed()
    with pytest.raises(ValueError, match=r"the prior is of x \(4,\), Matrix\(\(3,\)"):
        Posterior(prior, Observation(Matrix(A), O, 0.2))
    with pytest.raises(TypeError, match="needs a prior score that knows its LinearSDE"):
        Posterior(lambda x, t: x, seen)  # type: ignore[arg-type]
    damped = ScoreNetwork(Curved(4), CriticallyDamped(), facts=Facts((4,)))
    with pytest.raises(TypeError, match="Lifted takes a posterior"):
        Posterior(damped, seen)
    with pytest.raises(TypeError, match="covariance must be a rule"):
        Posterior(prior, seen, 0.3)  # type: ignore[arg-type]
    bound, rows = network().given(y=torch.arange(3)), Observation(Matrix(A), draw(2, 2), 0.2)
    with pytest.raises(ValueError, match="bound for 3 samples, y has rows for 2"):
        Posterior(bound, rows)
    with pytest.raises(ValueError, match="variance must be a positive number or None, got 0"):
        Isotropic(0)
    with pytest.raises(ValueError, match="iterations must be an integer >= 1, got 0"):
        Tweedie(0)
    with pytest.raises(ValueError, match=r"tolerance must lie in \[0, 1\)"):
        Tweedie(2, 1.0)
    with pytest.raises(ValueError, match="noise must be positive"):
        Observation(Mask(torch.tensor([True, False])), torch.ones(1), 0.0)


def test_a_mixture_is_biased_as_expected() -> None:
    """No term is exact beyond Gaussian data: the test that the others are not vacuous."""
    prior, seen = mixture(SDE), observed(2)[0]
    assert isinstance(prior, GaussianMixture)
    exact = exact_posterior(prior, seen)
    x = draw(64, 2, seed=8)
    for rule in RULES:
        gap = Posterior(prior, seen, rule)(x, 0.3) - exact(x, 0.3)
        assert float(gap.abs().max()) > 1e-2
