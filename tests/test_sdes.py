from __future__ import annotations

import math

import pytest
import torch
from problems import F64, gaussian, line, mixture, start
from scipy.stats import kstest
from torch import Tensor

from sde_gen import (
    EDM,
    SDE,
    VE,
    VP,
    EulerMaruyama,
    Gaussian,
    Heun,
    Impulses,
    Langevin,
    LinearSDE,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    Reverse,
    ScoreNetwork,
    Streams,
    SubVP,
    Wiener,
    log_prob,
    sample,
    solve,
)
from sde_gen.networks import MLP
from sde_gen.ops import Time, as_time, integrate, match
from sde_gen.schedules import Cosine, Geometric, Linear, Power, Quadratic, Sigmoid, Tabulated

LINEAR = [
    VP(),
    VP(Quadratic()),
    VP(Sigmoid(T=2.0)),
    VP(Cosine(total=8.0)),
    VP(Linear(1e-4, 0.02, T=1000.0)),
    SubVP(),
    SubVP(Cosine(total=8.0)),
    VE(),
    VE(Geometric(0.002, 80.0, T=3.0)),
    EDM(),
    EDM(5.0),
    Wiener(),
    Wiener(4.0),
    OrnsteinUhlenbeck(),
    OrnsteinUhlenbeck(a=-0.2, g=0.7, end=3.0),
    RectifiedFlow(),
]
every_linear = pytest.mark.parametrize("sde", LINEAR, ids=repr)


class Derived(LinearSDE):
    """Another process's two functions, and nothing else: all the rest is the base's quadrature."""

    def __init__(self, sde: LinearSDE) -> None:
        self.sde, self.T = sde, sde.T

    def rate(self, t: Time) -> Tensor:
        return self.sde.rate(t)

    def diffusion(self, t: Time) -> Tensor:
        return self.sde.diffusion(t)


class Drifting(SDE):
    """Ornstein-Uhlenbeck as a process without a kernel: x = -x dt + g dW."""

    T = 2.0
    g = 0.7

    def drift(self, x: Tensor, t: Time) -> Tensor:
        return -x

    def diffusion(self, t: Time) -> Tensor:
        return torch.full_like(as_time(t), self.g)


def inside(sde: LinearSDE) -> Tensor:
    return sde.T * torch.tensor([1e-4, 0.01, 0.1, 0.25, 0.5, 0.8, 0.95], dtype=F64)


@every_linear
def test_closed_forms_are_the_quadrature(sde: LinearSDE) -> None:
    t, derived = inside(sde), Derived(sde)
    for name in ("log_alpha", "alpha", "sigma", "log_snr"):
        closed, base = getattr(sde, name)(t), getattr(derived, name)(t)
        torch.testing.assert_close(closed, base, rtol=1e-9, atol=1e-12)
    level = sde.log_snr(t)
    torch.testing.assert_close(sde.time_at(level), derived.time_at(level), rtol=1e-8, atol=0)


@every_linear
def test_moments_obey_their_equations(sde: LinearSDE) -> None:
    t = inside(sde).requires_grad_()
    (d_alpha,) = torch.autograd.grad(sde.log_alpha(t).sum() + 0 * t.sum(), t)
    variance = sde.sigma(t) ** 2
    (d_variance,) = torch.autograd.grad(variance.sum(), t)
    t = t.detach()
    f, g2 = sde.rate(t), sde.diffusion(t) ** 2
    torch.testing.assert_close(d_alpha, f, rtol=1e-9, atol=1e-12)
    right = 2 * f * variance.detach() + g2
    # Two terms of the size of g^2 may cancel near the end: there the error is relative to them.
    torch.testing.assert_close(d_variance, right, rtol=1e-8, atol=1e-9 * float(g2.max()))


@every_linear
def test_two_steps_are_one(sde: LinearSDE) -> None:
    """Chapman-Kolmogorov: the kernel from 0 to t is that to s followed by that from s to t."""
    s, t = 0.3 * sde.T, 0.9 * sde.T
    fraction = torch.exp(integrate(sde.rate, s, t))

    def added(u: Tensor) -> Tensor:
        decay = torch.exp(2 * integrate(sde.rate, u, t))
        return decay * sde.diffusion(u) ** 2

    variance = fraction**2 * sde.sigma(s) ** 2 + integrate(added, s, t)
    assert float(sde.alpha(t)) == pytest.approx(float(sde.alpha(s) * fraction), rel=1e-10)
    assert float(sde.sigma(t) ** 2) == pytest.approx(float(variance), rel=1e-10)


@every_linear
def test_time_at_inverts_the_signal_to_noise_ratio(sde: LinearSDE) -> None:
    t = torch.cat([inside(sde), torch.tensor([1e-6 * sde.T, sde.T], dtype=F64)])
    torch.testing.assert_close(sde.time_at(sde.log_snr(t)), t, rtol=1e-9, atol=0)
    assert bool((sde.log_snr(t.sort().values).diff() < 0).all())


@every_linear
def test_data_are_at_time_0(sde: LinearSDE) -> None:
    assert float(sde.alpha(0.0)) == 1
    assert float(sde.sigma(0.0)) == 0
    assert float(sde.log_snr(0.0)) == math.inf


@every_linear
@pytest.mark.parametrize("shape", [(), (3,)])
def test_coefficients_are_float64_in_the_shape_of_t(sde: LinearSDE, shape: tuple) -> None:
    t = torch.rand(shape) * sde.T
    for f in (sde.rate, sde.diffusion, sde.alpha, sde.sigma, sde.log_snr):
        assert f(t).dtype == F64
        assert f(t).shape == shape


def test_published_kernels() -> None:
    t = torch.tensor([0.2, 0.6, 1.0], dtype=F64)
    b = 0.1 * t + 19.9 * t**2 / 2
    torch.testing.assert_close(VP().alpha(t), torch.exp(-b / 2))
    torch.testing.assert_close(VP().sigma(t) ** 2, 1 - torch.exp(-b))
    torch.testing.assert_close(SubVP().sigma(t), 1 - torch.exp(-b))
    torch.testing.assert_close(EDM().sigma(t), t)
    torch.testing.assert_close(EDM().diffusion(t), torch.sqrt(2 * t))
    torch.testing.assert_close(Wiener().sigma(t), torch.sqrt(t))
    ou = OrnsteinUhlenbeck(a=-0.7, g=0.4)
    torch.testing.assert_close(ou.alpha(t), torch.exp(-0.7 * t))
    torch.testing.assert_close(ou.sigma(t) ** 2, 0.16 * (1 - torch.exp(-1.4 * t)) / 1.4)
    assert bool((SubVP().sigma(t) < VP().sigma(t)).all())


def test_the_chain_is_a_process() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    sde, i = VP(Tabulated(betas)), torch.arange(1, 1001, dtype=F64)
    chain = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(sde.alpha(i / 1000) ** 2, chain, rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.sigma(i / 1000) ** 2, 1 - chain, rtol=1e-10, atol=0)


@every_linear
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_perturb_draws_from_the_kernel(sde: LinearSDE, share: float) -> None:
    t, n = share * sde.T, 4000
    generator = torch.Generator().manual_seed(1)
    p = sde.perturb(torch.full((n, 1), 1.7, dtype=F64), t, generator)
    z = (p.x - sde.alpha(t) * 1.7) / sde.sigma(t)
    # The Kolmogorov-Smirnov distance of n draws exceeds 1.95 / sqrt(n) once in a thousand times.
    assert kstest(z.flatten().numpy(), "norm").statistic < 1.95 / math.sqrt(n)


def test_perturb_says_what_it_drew() -> None:
    sde, x = VP(), torch.randn(6, 3, 2, 2, dtype=F64)
    t = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
    p = sde.perturb(x, t)
    torch.testing.assert_close(p.x, p.mean + p.std * p.noise, rtol=0, atol=0)
    for i in range(6):
        a, s = float(sde.alpha(t[i])), float(sde.sigma(t[i]))
        torch.testing.assert_close(p.mean[i], a * x[i])
        torch.testing.assert_close(p.std[i], torch.full((1, 1, 1), s, dtype=F64))
    y = p.x.clone().requires_grad_()
    law = torch.distributions.Normal(p.mean, p.std)
    (exact,) = torch.autograd.grad(law.log_prob(y).sum(), y)
    torch.testing.assert_close(p.score, exact)


@pytest.mark.parametrize("process", [VP(), Drifting()], ids=["linear", "simulated"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_perturb_keeps_dtype_and_draws_from_its_generator(
    process: SDE, dtype: torch.dtype
) -> None:
    x, before = torch.ones(5, 2, dtype=dtype), torch.get_rng_state()
    one, two = (process.perturb(x, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.x.dtype == one.score.dtype == dtype
    assert torch.equal(one.x, two.x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(process.perturb(x, 0.5).x, process.perturb(x, 0.5).x)


class Breathing(SDE):
    """dX = (1 + t) X dt + t^2 dW, whose Euler-Maruyama steps have closed forms."""

    T, steps = 2.0, 10

    def drift(self, x: Tensor, t: Time) -> Tensor:
        return match(1 + as_time(t), x) * x

    def diffusion(self, t: Time) -> Tensor:
        return as_time(t) ** 2


def test_simulated_perturbation_reads_each_step_at_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all normals 0 or 1 the end is a product and a sum over t_k = k h, k = 0 .. 9."""
    x, t = torch.tensor([[2.0], [2.0]], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    for z in (0.0, 1.0):
        monkeypatch.setattr(
            "sde_gen.sdes.base.normal_like", lambda x, g, name, z=z: torch.full_like(x, z)
        )
        p = Breathing().perturb(x, t)
        for i, h in enumerate((t / 10).tolist()):
            exact = 2.0
            for k in range(10):
                mean = exact * (1 + h * (1 + k * h))
                exact = mean + (k * h) ** 2 * math.sqrt(h) * z
            assert float(p.x[i]) == pytest.approx(exact, rel=1e-13)
            assert float(p.mean[i]) == pytest.approx(mean, rel=1e-13)
            assert float(p.std[i]) == pytest.approx((9 * h) ** 2 * math.sqrt(h), rel=1e-13)


# Clocks that go on long after the signal is gone: exp(-2500) is no float64.

LONG = [
    VP(Geometric()),
    VP(Linear(beta_max=1e4)),
    VP(Cosine(total=1300.0)),
    VP(Tabulated([0.9] * 2000)),
    SubVP(Geometric()),
    OrnsteinUhlenbeck(a=-200.0),
    OrnsteinUhlenbeck(a=-200.0, g=20.0),
    OrnsteinUhlenbeck(end=2000.0),
]


@pytest.mark.parametrize("sde", LONG, ids=repr)
def test_times_are_found_where_no_signal_is_left(sde: LinearSDE) -> None:
    t = sde.T * torch.tensor([1e-6, 0.01, 0.3, 0.8, 1.0], dtype=F64)
    torch.testing.assert_close(sde.time_at(sde.log_snr(t)), t, rtol=1e-9, atol=0)
    assert float(sde.log_snr(sde.T)) < -1200
    assert float(sde.time_at(math.inf)) == 0


@pytest.mark.parametrize("sde", LONG, ids=repr)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_long_clocks_sample_the_law(sde: LinearSDE, eta: float) -> None:
    """The affine map of a Gaussian's sampler is known: exact in one solve for its own moments."""
    mean = torch.tensor([0.7, -0.3], dtype=F64)
    law, n = Gaussian(sde, mean, 0.5), 4000
    x = sample(law, n, 12, seed=0, eta=eta, dtype=F64)
    # Four deviations of a mean and of a standard deviation.
    assert float((x.mean(0) - mean).abs().max()) < 4 * 0.5 / math.sqrt(n)
    assert float((x.std(0) - 0.5).abs().max()) < 4 * 0.5 / math.sqrt(2 * n)
    if eta == 0:
        score = mixture(sde)
        found = sample(score, 500, 40, seed=0, dtype=F64, solver=Heun())
        wanted = sample(mixture(VP()), 500, 40, seed=0, dtype=F64, solver=Heun())
        # The flow ends where that of any other clock does: for all but the few points that lie
        # between two modes.
        assert float((found - wanted).abs().median()) < 0.01


@pytest.mark.parametrize("sde", LONG, ids=repr)
def test_long_clocks_have_likelihoods_and_networks(sde: LinearSDE) -> None:
    score, x = gaussian(sde), start(gaussian(sde), 3, 0.0)
    if not isinstance(getattr(sde, "schedule", None), Cosine):  # it ends at a pole of 1e280
        exact = score.log_prob(x)
        torch.testing.assert_close(log_prob(score, x).value, exact, rtol=0, atol=2e-4)
    model = ScoreNetwork(MLP((3,), 8, 1), sde)
    # At T there is nothing but noise: its score is -x / sigma^2.
    torch.testing.assert_close(model(x, sde.T), -x / sde.sigma(sde.T) ** 2)


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.5, 1.5]).repeat(20_000)], ids=["one", "each"])
def test_simulated_perturbation_has_the_law_of_its_process(t: Time) -> None:
    n, process = 40_000, Drifting()
    p = process.perturb(torch.full((n, 1), 2.0, dtype=F64), t, torch.Generator().manual_seed(2))
    for time in torch.as_tensor(t, dtype=F64).unique():
        x = p.x.flatten()[(torch.as_tensor(t) == time).expand(n)]
        h = time / process.steps
        # Euler's own mean is known; it differs from the process's by its weak error, O(h).
        euler = 2 * (1 - h) ** process.steps
        mean, variance = 2 * math.exp(-time), 0.49 * (1 - math.exp(-2 * time)) / 2
        assert abs(euler - mean) < h
        sampling = 4 * math.sqrt(variance / len(x))
        assert abs(x.mean() - euler) < sampling
        assert abs(x.var() / variance - 1) < 4 * math.sqrt(2 / len(x)) + 2 * h
    # Whatever the marginal law p of x is, E[score . x] = -1: the target is unbiased.
    product = (p.score * p.x).flatten()
    assert abs(product.mean() + 1) < 4 * product.std() / math.sqrt(n)


def test_prior_is_the_limit_law() -> None:
    for sde in (VP(), EDM(), OrnsteinUhlenbeck()):
        x = sde.prior(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
        assert float(x.std() / sde.sigma(sde.T)) == pytest.approx(1, abs=4 / math.sqrt(80_000))
        law = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), sde.sigma(sde.T))
        torch.testing.assert_close(sde.prior_log_prob(x), law.log_prob(x).sum(1))
    image = sde.prior(3, 1, 4, 4)
    assert image.dtype == torch.float32
    assert sde.prior_log_prob(image).shape == (3,)


@pytest.mark.parametrize("sde", [VP(), SubVP(), EDM(3.0), OrnsteinUhlenbeck()], ids=repr)
def test_denoise_is_the_posterior_mean(sde: LinearSDE) -> None:
    """Tweedie against the normal-normal posterior, written from its precision."""
    score, t = gaussian(sde), torch.tensor([0.1, 0.4, 0.8]) * sde.T
    x = torch.randn(3, 3, dtype=F64)
    a, s = (c(t).unsqueeze(1) for c in (sde.alpha, sde.sigma))
    precision = 1 / score.variance + (a / s) ** 2
    exact = (score.mean / score.variance + a * x / s**2) / precision
    torch.testing.assert_close(score.denoise(x, t), exact)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_a_reversal_is_the_formula(eta: float) -> None:
    sde, t = VP(), torch.tensor([0.3, 0.6], dtype=F64)
    score = mixture(sde)
    x = torch.randn(2, 2, dtype=F64)
    process = sde.reverse(score, eta)
    beta = (0.1 + 19.9 * t).unsqueeze(1)
    exact = -beta / 2 * x - (1 + eta**2) / 2 * beta * score(x, t)
    torch.testing.assert_close(process.drift(x, t), exact)
    torch.testing.assert_close(process.diffusion(t), eta * torch.sqrt(0.1 + 19.9 * t))
    assert process.T == sde.T
    # The reversal still knows its forward process, kernel and all.
    assert process.sde is sde
    assert isinstance(process, Reverse)
    assert (eta == 0) == (process == sde.probability_flow(score))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(Geometric(0.01, 3.0))], ids=repr)
def test_every_reversal_has_the_same_marginals(sde: LinearSDE, eta: float) -> None:
    """The Fokker-Planck equation of the reversal holds for p_t, for every eta.

    d/dt p = -div(b p) + g^2 / 2 lap p forward in time; the reversal's, read backwards, is
    d/dt p = -div(b_r p) - (eta g)^2 / 2 lap p. Divided by p, on the line, by autograd.
    """
    score = line(sde)
    x = torch.linspace(-1.5, 1.5, 9, dtype=F64).unsqueeze(1).requires_grad_()
    t = torch.full((9,), 0.4 * sde.T, dtype=F64, requires_grad=True)
    log_p = score.log_prob(x, t)
    d_x, d_t = torch.autograd.grad(log_p.sum(), (x, t), create_graph=True)
    (d_xx,) = torch.autograd.grad(d_x.sum(), x, retain_graph=True)
    process = sde.reverse(score, eta)
    drift = process.drift(x, t)
    (div,) = torch.autograd.grad(drift.sum(), x)
    g2 = process.diffusion(t) ** 2
    right = -div - drift * d_x - 0.5 * g2.unsqueeze(1) * (d_xx + d_x**2)
    torch.testing.assert_close(d_t.detach(), right.detach().flatten(), rtol=1e-8, atol=1e-8)


def frozen(x: Tensor, t: Time) -> Tensor:
    """The score of the data of ``mixture``, at every time."""
    return mixture(VP())(x, 0.0)


def test_langevin_is_its_own_reversal() -> None:
    process = Langevin(frozen, Linear())
    x, t = torch.randn(8, 2, dtype=F64), torch.tensor(0.4, dtype=F64)
    back = process.reverse(frozen)
    # In falling time the increment is -drift dt: the same as forward.
    torch.testing.assert_close(-back.drift(x, t), process.drift(x, t))
    torch.testing.assert_close(back.diffusion(t), process.diffusion(t))
    flow = process.probability_flow(frozen)
    torch.testing.assert_close(flow.drift(x, t), torch.zeros_like(x), rtol=0, atol=1e-14)


def test_langevin_keeps_its_target_in_law() -> None:
    """Reversed from a draw of the target it stays there; the flow returns every point."""
    score = mixture(VP())
    process = Langevin(frozen)
    x = start(score, 10, 0.0)
    times = torch.linspace(1, 0, 51, dtype=F64)
    still = solve(process.probability_flow(frozen), x, times, EulerMaruyama())
    torch.testing.assert_close(still, x, rtol=0, atol=1e-12)
    n = 20_000
    x = start(score, n, 0.0, seed=1)
    for run in (process.reverse(frozen), process):
        grid = times if run is not process else times.flip(0)
        y = solve(run, x, grid, EulerMaruyama(), Streams(4))
        # Euler's bias at this step (h = 0.02, variance about 0.1 to 0.5) is below 3 percent.
        assert float((y.mean(0) - x.mean(0)).abs().max()) < 4 * math.sqrt(2 * 0.8 / n)
        assert float((y.var(0) / x.var(0) - 1).abs().max()) < 0.03 + 4 * math.sqrt(2 / n)


def test_langevin_on_a_gaussian_has_the_closed_form_bias() -> None:
    """x + h/2 s(x) + sqrt(h) z on N(0, v) rests at the variance v / (1 - h / (4 v))."""
    v, h, n = 0.7, 0.1, 400
    process = Langevin(lambda x, t: -x / v, Power(T=n * h))
    x = torch.zeros(n + 1, 1, dtype=F64)
    times = h * torch.arange(n + 1, dtype=F64)
    coefficients = solve(process, x, times, EulerMaruyama(), Impulses()).flatten()
    exact = v / (1 - h / (4 * v))
    assert float((coefficients**2).sum()) == pytest.approx(exact, rel=1e-12)


def test_vp_is_langevin_of_the_standard_normal() -> None:
    process, vp = Langevin(lambda x, t: -x, Linear()), VP(Linear())
    x, t = torch.randn(4, 3, dtype=F64), torch.rand(4, dtype=F64)
    torch.testing.assert_close(process.drift(x, t), vp.drift(x, t), rtol=1e-14, atol=0)
    torch.testing.assert_close(process.diffusion(t), vp.diffusion(t), rtol=0, atol=0)


def test_langevin_reads_its_score_at_a_fixed_time() -> None:
    asked: list[float] = []

    def score(x: Tensor, t: Time) -> Tensor:
        asked.append(float(t))
        return -x

    process = Langevin(score, at=0.03)
    solve(process, torch.zeros(2, 1), [0.0, 0.5, 1.0], EulerMaruyama(), 0)
    assert asked == [0.03, 0.03]
