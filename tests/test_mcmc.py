"""Langevin dynamics against closed forms.

On a Gaussian every unadjusted method is an affine map of its normals, so unit impulses give the
exact law of its output without sampling. What is random is compared within its own error.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import pytest
import torch
from problems import F64, correlated, line, mixture
from torch import Tensor

from sde_gen import (
    BAOAB,
    EDM,
    MALA,
    OBABO,
    ULA,
    VP,
    Empirical,
    EulerMaruyama,
    Facts,
    Gaussian,
    GaussianMixture,
    Impulses,
    Langevin,
    Noise,
    Score,
    ScoreNetwork,
    Streams,
    annealed_langevin,
    langevin,
    solve,
)
from sde_gen.mcmc import ABOBA, Chains, Method, Splitting
from sde_gen.mcmc.targets import AtTime, Mixture, as_target
from sde_gen.networks import MLP
from sde_gen.ops import Time
from sde_gen.schedules import Power

ALL: list[Method] = [ULA(), MALA(), BAOAB(1.0), OBABO(0.7), ABOBA(1.3)]


def harmonic(x: Tensor) -> Tensor:
    """log N(x; 0, I) up to its constant."""
    return -0.5 * x.flatten(1).square().sum(1)


class Units(Noise):
    """Row j has a 1 in coordinate j % n of draw j // n, and no other noise."""

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        z = torch.zeros(x.shape, dtype=x.dtype)
        n = x.shape[1]
        z[self.draws * n : (self.draws + 1) * n] = torch.eye(n, dtype=x.dtype)
        self.draws += 1
        return z

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def rows(self, index: slice | Tensor) -> Units:
        raise NotImplementedError


def covariance(rows: Tensor) -> Tensor:
    """Of an affine map of normals with the coefficients ``rows`` (draws, n)."""
    return rows.T @ rows


# --- exact laws on a Gaussian -----------------------------------------------------------------


@pytest.mark.parametrize(("v", "h"), [(1.0, 0.1), (0.3, 0.4), (2.0, 3.5)])
def test_ula_has_its_variance_after_every_step(v: float, h: float) -> None:
    n = 200
    target = Gaussian(EDM(), torch.zeros(1, dtype=F64), math.sqrt(v))
    run = langevin(target, torch.zeros(n, 1, dtype=F64), n, h, noise=Impulses())
    got = run.samples.square().sum((1, 2))
    k = torch.arange(1, n + 1, dtype=F64)
    at_rest = v / (1 - h / (2 * v))
    torch.testing.assert_close(got, at_rest * (1 - (1 - h / v) ** (2 * k)), rtol=1e-11, atol=0)


def test_ula_is_euler_maruyama_on_the_langevin_process() -> None:
    score, n, h = correlated(VP()), 40, 0.05
    x = torch.full((n + 1, 2), 0.3, dtype=F64)
    ours = langevin(score, x, n, h, noise=Impulses(), at=0.2).samples[-1]
    process = Langevin(score, Power(1.0, T=2 * h * n), at=0.2)
    times = torch.linspace(0, process.T, n + 1, dtype=F64)
    theirs = solve(process, x, times, EulerMaruyama(), Impulses())
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("friction", [0.4, 2.0])
@pytest.mark.parametrize(
    ("kind", "position", "velocity"),
    [
        (BAOAB, lambda h: 1.0, lambda h: 1 - h**2 / 4),
        (OBABO, lambda h: 1 / (1 - h**2 / 4), lambda h: 1.0),
        (ABOBA, lambda h: 1.0, lambda h: 1 / (1 - h**2 / 4)),
    ],
)
def test_splittings_have_their_variances_on_the_harmonic(
    kind: Callable[[float], Splitting],
    position: Callable[[float], float],
    velocity: Callable[[float], float],
    friction: float,
) -> None:
    n, h, method = 150, 0.8, kind(friction)
    x = torch.zeros(n * method.normals, 1, dtype=F64)
    run = langevin(harmonic, x, n, h, method, noise=Impulses(), thin=n)
    assert run.velocity is not None
    assert float(run.samples[-1].square().sum()) == pytest.approx(position(h), rel=1e-9)
    assert float(run.velocity.square().sum()) == pytest.approx(velocity(h), rel=1e-9)


def test_a_preconditioner_makes_all_directions_equal() -> None:
    target, h, n = correlated(EDM()), 0.3, 150
    c = (target.basis * target.variance) @ target.basis.T
    start = target.mean.expand(2 * n, 2).clone()
    run = langevin(target, start, n, h, noise=Units(), preconditioner=c, thin=n)
    got = covariance(run.samples[-1] - target.mean)
    torch.testing.assert_close(got, c / (1 - h / 2), rtol=1e-10, atol=1e-12)


def test_any_preconditioner_gives_the_law_of_its_lyapunov_equation() -> None:
    target, h, n = correlated(EDM()), 0.1, 600
    c = (target.basis * target.variance) @ target.basis.T
    p = torch.tensor([[0.6, -0.2], [-0.2, 0.3]], dtype=F64)
    m = torch.eye(2, dtype=F64) - h * p @ torch.linalg.inv(c)
    at_rest = torch.linalg.solve(torch.eye(4, dtype=F64) - torch.kron(m, m), 2 * h * p.flatten())
    start = target.mean.expand(2 * n, 2).clone()
    run = langevin(target, start, n, h, noise=Units(), preconditioner=p, thin=n)
    got = covariance(run.samples[-1] - target.mean)
    torch.testing.assert_close(got, at_rest.reshape(2, 2), rtol=1e-10, atol=1e-12)


def test_baoab_keeps_the_covariance_exact_for_any_mass() -> None:
    target, n = correlated(EDM()), 300
    c = (target.basis * target.variance) @ target.basis.T
    p = torch.tensor([[0.6, -0.2], [-0.2, 0.3]], dtype=F64)
    start = target.mean.expand(2 * n, 2).clone()
    run = langevin(target, start, n, 0.5, BAOAB(1.5), noise=Units(), preconditioner=p, thin=n)
    got = covariance(run.samples[-1] - target.mean)
    torch.testing.assert_close(got, c, rtol=1e-9, atol=1e-11)


def test_autocorrelation_of_ula_is_that_of_its_ornstein_uhlenbeck_chain() -> None:
    n, h = 400, 0.1
    run = langevin(harmonic, torch.zeros(n, 1, dtype=F64), n, h, noise=Impulses())
    c = run.samples[..., 0]
    lagged = (c[-100:] * c[-1]).sum(1).flip(0)
    rho = lagged / lagged[0]
    torch.testing.assert_close(rho, (1 - h) ** torch.arange(100, dtype=F64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("sde", [EDM(3.0), VP()], ids=["EDM", "VP"])
def test_annealed_langevin_has_the_law_of_its_recursion(sde: EDM | VP) -> None:
    c, steps, eps = 0.5, 7, 0.02
    target = Gaussian(sde, torch.zeros(1, dtype=F64), c)
    times = torch.tensor([1.0, 0.6, 0.3, 0.15], dtype=F64)
    rows = torch.zeros(4 * steps, 1, dtype=F64)
    got = annealed_langevin(target, rows, times, steps, eps, noise=Impulses(), trajectory=True)
    variance, alpha_before, exact = 0.0, 1.0, []
    sigma_end = float(sde.sigma(0.15))
    for t in times.tolist():
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        variance *= (alpha / alpha_before) ** 2 if exact else 1.0
        size = eps * sigma**2 / sigma_end**2
        for _ in range(steps):
            gain = 1 - size / 2 / (alpha**2 * c**2 + sigma**2)
            variance = gain**2 * variance + size
        alpha_before = alpha
        exact.append(variance)
    torch.testing.assert_close(got.square().sum((1, 2)), torch.tensor(exact, dtype=F64))


def test_annealed_langevin_finds_the_weights_of_far_modes() -> None:
    means = torch.tensor([[-4.0], [4.0]], dtype=F64)
    target = GaussianMixture(EDM(20.0), torch.tensor([0.2, 0.8]), means, 0.3)
    times = torch.logspace(math.log10(20.0), math.log10(0.1), 12, dtype=F64)
    z = 20 * torch.randn(2000, 1, dtype=F64)
    x = annealed_langevin(target, z, times, 60, 0.1 * 0.1**2, noise=3)
    # Five standard errors, and the bias of finitely many steps at a level: measured 0.01.
    assert abs(float((x > 0).double().mean()) - 0.8) < 5 * math.sqrt(0.16 / 2000) + 0.01


# --- Metropolis-Hastings ----------------------------------------------------------------------


def test_acceptance_is_the_ratio_of_metropolis_and_hastings() -> None:
    score, h = mixture(VP()), 0.03
    x = 0.7 * torch.randn(64, 2, dtype=F64)
    z = torch.randn(64, 2, dtype=F64)
    law = as_target(score, x, 0.1)
    state = MALA().start(law, law.enter(x), h, Streams(0))
    level = torch.full((64,), 9.0, dtype=F64)
    MALA().step(state, h, [z, level])

    def log_q(y: Tensor, x: Tensor) -> Tensor:
        kernel = torch.distributions.Normal(x + h * score(x, 0.1), math.sqrt(2 * h))
        return kernel.log_prob(y).sum(1)

    y = x + h * score(x, 0.1) + math.sqrt(2 * h) * z
    ratio = score.log_prob(y, 0.1) + log_q(x, y) - score.log_prob(x, 0.1) - log_q(y, x)
    exact = ratio.exp().clamp(max=1)
    assert float(exact.min()) < 0.7
    torch.testing.assert_close(state.accept, exact, rtol=1e-10, atol=1e-12)
    moved = (state.x != x).any(1)
    assert bool((moved == (ratio > 0)).all())


def test_chains_move_as_often_as_they_accept() -> None:
    run = langevin(harmonic, torch.randn(500, 5), 100, 0.5, MALA(), noise=1)
    assert run.acceptance is not None
    assert 0.2 < float(run.acceptance.mean()) < 0.9
    moved = (run.samples.diff(dim=0) != 0).any(2).float().mean()
    # The difference of a Bernoulli and its own probability: variance at most 1/4 a step.
    tolerance = 5 * 0.5 / math.sqrt(500 * 99)
    assert abs(float(moved - run.acceptance.mean())) < tolerance + 1 / 99


def distance(x: Tensor, target: GaussianMixture) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n) of independent x (n, 1)."""
    v = target.variance[:, 0].sqrt()
    x = x.flatten().double().sort().values
    cdf = torch.special.ndtr((x.unsqueeze(1) - target.means[:, 0]) / v) @ target.log_weights.exp()
    n = len(x)
    grid = torch.arange(n + 1, dtype=F64) / n
    gap = torch.maximum(grid[1:] - cdf, cdf - grid[:-1]).max()
    return float(gap) * math.sqrt(n)


# The statistic exceeds 1.95 with probability 2 exp(-2 * 1.95^2) = 1e-3.
KOLMOGOROV = 1.95


@pytest.mark.parametrize(
    ("method", "h", "keeps"),
    [
        (MALA(), 0.08, True),
        (ULA(), 0.08, False),
        (ULA(), 2e-4, True),
        (BAOAB(2.0), 0.1, True),
        (OBABO(2.0), 0.05, True),
        (OBABO(2.0), 0.4, False),
    ],
    ids=lambda v: str(v),
)
def test_a_mixture_stays(method: Method, h: float, keeps: bool) -> None:
    target = line(EDM())
    x = target.sample(6000, torch.Generator().manual_seed(5))
    run = langevin(target, x, 60, h, method, noise=7, thin=60)
    got = distance(run.samples[-1], target)
    assert got < KOLMOGOROV if keeps else got > 2 * KOLMOGOROV


@pytest.fixture
def arviz() -> ModuleType:
    """ArviZ, which on the first import of a day announces its next version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def test_mala_from_afar_reaches_the_moments_within_its_effective_size(arviz: ModuleType) -> None:
    target = line(EDM())
    x = torch.full((20, 1), 2.5, dtype=F64)
    run = langevin(target, x, 2000, 0.1, MALA(), warmup=300, noise=2)
    data = run.to_arviz("y")
    assert float(arviz.rhat(data)["y"].max()) < 1.01
    pi, m, v = target.log_weights.exp(), target.means[:, 0], target.variance[:, 0]
    exact = [float(pi @ m), float(pi @ (m**2 + v))]
    for f, answer in zip((lambda y: y, torch.square), exact, strict=True):
        values = f(run.samples[..., 0])
        size = float(arviz.ess(values.T.numpy()))
        assert 1000 < size < values.numel()
        assert abs(float(values.mean()) - answer) < 4 * float(values.std()) / math.sqrt(size)


@pytest.mark.parametrize("d", [50, 200, 1000])
def test_mala_accepts_0574_at_the_optimal_scale(d: int) -> None:
    steps, chains = 40, 200 if d < 1000 else 100
    ell = 1.6503
    h = ell**2 * d ** (-1 / 3) / 2
    run = langevin(harmonic, torch.randn(chains, d), steps, h, MALA(), noise=d)
    assert run.acceptance is not None
    exact = 2 * float(torch.special.ndtr(torch.tensor(-(ell**3) / 8)))
    assert exact == pytest.approx(0.5742, abs=1e-4)
    # Chains are independent; the limit of many dimensions is met from above, within 0.01.
    error = float(run.acceptance.std()) / math.sqrt(chains)
    assert -4 * error < float(run.acceptance.mean()) - exact < 0.01 + 4 * error


def test_0574_is_where_mala_moves_the_farthest() -> None:
    d, chains = 200, 200
    x = torch.randn(chains, d, dtype=F64)
    jumps = []
    for ell in (0.75 * 1.6503, 1.6503, 1.3 * 1.6503):
        run = langevin(harmonic, x, 30, ell**2 * d ** (-1 / 3) / 2, MALA(), noise=1)
        jumps.append(float(run.samples.diff(dim=0).square().sum(2).mean()))
    # In the limit 2 l^2 Phi(-l^3 / 8): 1.24, 1.56 and 1.00 to each other.
    assert jumps[1] > 1.1 * max(jumps[0], jumps[2])


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_warm_up_finds_the_optimal_step(factor: float) -> None:
    d, chains = 100, 40
    best = 1.6503**2 * d ** (-1 / 3) / 2
    x = torch.randn(chains, d)
    run = langevin(harmonic, x, 150, factor * best, MALA(), warmup=500, noise=4)
    assert run.acceptance is not None
    assert abs(float(run.acceptance.mean()) - 0.574) < 0.015
    # Each chain finds its own step: the mean of log h spreads by 0.045, the last one by 0.085.
    assert float((run.h / best).std()) < 0.062
    assert abs(float(run.h.mean()) / best - 1) < 0.06
    fixed = langevin(harmonic, x, 10, best, MALA(), noise=4)
    assert bool((fixed.h == best).all())


def test_preconditioned_mala_is_mala_in_whitened_coordinates() -> None:
    target = correlated(EDM())
    c = (target.basis * target.variance) @ target.basis.T
    factor = torch.linalg.cholesky(c)
    u = torch.randn(8, 2, dtype=F64)
    x = u @ factor.T + target.mean
    white = langevin(harmonic, u, 50, 0.6, MALA(), noise=3)
    run = langevin(target, x, 50, 0.6, MALA(), noise=3, preconditioner=c)
    torch.testing.assert_close(run.samples, white.samples @ factor.T + target.mean)
    torch.testing.assert_close(run.acceptance, white.acceptance)


# --- targets ----------------------------------------------------------------------------------


def laws() -> dict[str, GaussianMixture]:
    g = torch.Generator().manual_seed(1)
    m = torch.randn(6, 2, generator=g, dtype=F64)
    pi = 0.2 + torch.rand(6, generator=g)
    std = 0.1 + torch.rand(6, 2, generator=g, dtype=F64)
    return {
        "one std": GaussianMixture(VP(), pi, m, 0.3),
        "a std each": GaussianMixture(VP(), pi, m, std[:, 0]),
        "a std each coordinate": GaussianMixture(VP(), pi, m, std),
        "shared, by coordinate": GaussianMixture(VP(), pi, m, std[:1].expand(6, 2)),
        "data": Empirical(EDM(), torch.randn(30, 1, 2, 3, generator=g)),
    }


@pytest.mark.parametrize("name", laws())
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-4), (F64, 1e-9)])
def test_a_mixture_by_columns_is_its_exact_score(
    name: str, dtype: torch.dtype, rtol: float
) -> None:
    law = laws()[name]
    x = 3 * torch.randn(50, *law.shape, dtype=dtype)
    fast, slow = as_target(law, x, 0.4), AtTime(law, torch.tensor(0.4, dtype=F64), nullcontext())
    assert isinstance(fast, Mixture)
    u = fast.enter(x)
    assert bool((fast.leave(u) == x).all())
    log_p, s = fast.evaluate(u)
    log_p_slow, s_slow = slow.evaluate(x)
    torch.testing.assert_close(s, s_slow, rtol=rtol, atol=rtol)
    torch.testing.assert_close(fast.score(u), s_slow, rtol=rtol, atol=rtol)
    torch.testing.assert_close(log_p.double(), log_p_slow, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("d", "m", "gap"), [(1, 30.0, 0.4), (64, 1.64, 0.02)], ids=["1-d", "64-d"]
)
def test_a_narrow_mixture_in_float32_is_computed_in_float64(d: int, m: float, gap: float) -> None:
    means = torch.tensor([0.0, m, m + gap]).unsqueeze(1).expand(3, d)
    law = GaussianMixture(EDM(), torch.ones(3), means, 0.1)
    x = (torch.linspace(-0.5, 1.5, 20).unsqueeze(1) * gap + m).expand(20, d)
    fast = as_target(law, x)
    torch.testing.assert_close(fast.score(fast.enter(x)), law(x, 0.0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("d", "m", "gap"), [(1, 1e6, 0.4), (64, 1e6, 0.2), (1, 30.0, 0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_narrow_mixture_keeps_its_score_far_from_0(
    d: int, m: float, gap: float, dtype: torch.dtype
) -> None:
    means = torch.tensor([[m] * d, [m + gap] * d], dtype=dtype)
    law = GaussianMixture(EDM(), torch.ones(2), means, 0.1)
    x = (torch.linspace(-0.5, 1.5, 20, dtype=dtype).unsqueeze(1) * gap + m).expand(20, d)
    fast = as_target(law, x)
    torch.testing.assert_close(fast.score(fast.enter(x)), law(x, 0.0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_a_density_and_its_score_walk_alike(method: Method) -> None:
    score = mixture(EDM())
    m, v = score.means, score.variance

    def log_p(x: Tensor) -> Tensor:
        z = (x.unsqueeze(1) - m) ** 2 / v + torch.log(2 * math.pi * v)
        return torch.logsumexp(score.log_weights - 0.5 * z.sum(2), 1)

    x = score.sample(12, torch.Generator().manual_seed(0))
    a = langevin(score, x, 30, 0.01, method, noise=5)
    b = langevin(log_p, x, 30, 0.01, method, noise=5)
    torch.testing.assert_close(a.samples, b.samples, rtol=1e-8, atol=1e-10)


def network() -> ScoreNetwork:
    return ScoreNetwork(MLP((2,), width=16), VP(), facts=Facts((2,)))


def test_a_network_is_read_at_a_fixed_noise_level() -> None:
    model, x, h = network(), torch.randn(3, 2), 0.01
    run = langevin(model, x, 1, h, noise=4, at=0.3)
    z = torch.as_tensor((run.samples[0] - x - h * model(x, 0.3)) / math.sqrt(2 * h)).detach()
    other = langevin(harmonic, x, 1, h, noise=4).samples[0]
    torch.testing.assert_close(z, (other - x + h * x) / math.sqrt(2 * h), atol=1e-4, rtol=1e-4)
    assert not run.samples.requires_grad


# --- streams, thinning, chains ----------------------------------------------------------------


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_a_chain_does_not_depend_on_the_others(method: Method) -> None:
    target, x = line(EDM()), torch.randn(9, 1, dtype=F64)
    all_of_them = langevin(target, x, 40, 0.03, method, warmup=30, noise=Streams(8))
    alone = langevin(target, x[6:7], 40, 0.03, method, warmup=30, noise=Streams(8, 6))
    torch.testing.assert_close(alone.samples[:, 0], all_of_them.samples[:, 6])


@pytest.mark.parametrize("shape", [(2,), (1, 3, 5), (70,), ()], ids=str)
@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_steps_thinning_and_warm_up_read_one_path(method: Method, shape: tuple[int, ...]) -> None:
    x = torch.randn(4, *shape)

    def log_p(x: Tensor) -> Tensor:
        return -0.5 * x.reshape(len(x), -1).square().sum(1)

    run = langevin(log_p, x, 67, 0.02, method, noise=1)
    assert run.samples.shape == (67, 4, *shape)
    assert run.samples.dtype == torch.float32
    short = langevin(log_p, x, 31, 0.02, method, noise=1)
    assert bool((short.samples == run.samples[:31]).all())
    thinned = langevin(log_p, x, 67, 0.02, method, thin=5, noise=1)
    assert bool((thinned.samples == run.samples[4::5]).all())
    if not isinstance(method, MALA):
        later = langevin(log_p, x, 47, 0.02, method, warmup=20, noise=1)
        assert bool((later.samples == run.samples[20:]).all())


def test_noise_of_different_steps_and_draws_is_independent() -> None:
    x = torch.zeros(400, 3)
    run = langevin(lambda x: 0 * x.sum(1), x, 100, 0.5, noise=2)
    z = torch.cat([run.samples[:1], run.samples.diff(dim=0)]).flatten(1)
    together = torch.corrcoef(z) - torch.eye(100)
    # 4950 correlations of 1200 numbers: none beyond 5.5 standard errors.
    assert float(together.abs().max()) < 5.5 / math.sqrt(1200)
    assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / z.numel()))


def test_a_seed_fixes_the_run() -> None:
    x = torch.zeros(3, 2)
    a, b, c = (langevin(harmonic, x, 5, 0.1, noise=s).samples for s in (1, 1, 2))
    assert bool((a == b).all())
    assert not bool((a == c).any())
    assert bool((x == 0).all())


def test_effective_size_is_that_of_the_ornstein_uhlenbeck_chain(arviz: ModuleType) -> None:
    h, chains, draws = 0.2, 8, 4000
    run = langevin(harmonic, torch.randn(chains, 1), draws, h, noise=1)
    data = run.to_arviz()
    assert data.posterior["x"].shape == (chains, draws, 1)
    exact = chains * draws * h / (2 - h)
    assert arviz.ess(data, method="mean")["x"].item() == pytest.approx(exact, rel=0.15)


def test_progress_is_shown_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(2, 2)
    shown = langevin(harmonic, x, 50, 0.1, noise=0, progress=True)
    assert "chains" in capsys.readouterr().err
    assert bool((shown.samples == langevin(harmonic, x, 50, 0.1, noise=0).samples).all())
    assert repr(shown) == "Chains(50 draws of 2 chains in (2,), 0 diverged)"


# --- precision and kinds of numbers -----------------------------------------------------------


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_chains_keep_their_precision_under_autocast(method: Method) -> None:
    p = torch.tensor([[0.6, -0.2], [-0.2, 0.3]])
    x = torch.randn(6, 2)
    runs: dict[str, Callable[[], Tensor]] = {
        "mixture": lambda: langevin(mixture(VP()), x, 9, 0.02, method, noise=0, at=0.3).samples,
        "Gaussian": lambda: langevin(correlated(VP()), x, 9, 0.02, method, noise=0).samples,
        "whitened": lambda: (
            langevin(harmonic, x, 9, 0.02, method, noise=0, preconditioner=p).samples
        ),
        "annealed": lambda: annealed_langevin(mixture(EDM()), x, [1.0, 0.3], 5, 0.02, noise=0),
    }
    for name, run in runs.items():
        outside = run()
        with torch.autocast("cpu", torch.bfloat16):
            inside = run()
        assert inside.dtype == torch.float32
        assert torch.equal(inside, outside), name


def test_a_network_runs_in_the_precision_of_the_caller() -> None:
    seen: list[torch.dtype] = []
    model = network()
    model.register_forward_hook(lambda *_: seen.append((x @ x.T).dtype))
    x = torch.randn(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        run = langevin(model, x, 2, 0.01, noise=4, at=0.3)
        langevin(lambda y: seen.append((x @ x.T).dtype) or harmonic(y), x, 2, 0.01, noise=4)
    assert len(seen) == 6
    assert set(seen) == {torch.bfloat16}
    assert run.samples.dtype == torch.float32


def test_a_network_in_training_is_read_without_dropout() -> None:
    net = MLP((2,), width=16, dropout=0.5)
    for p in net.parameters():
        p.data += 0.1
    model, x = ScoreNetwork(net, VP(), shape=(2,)), torch.randn(4, 2)
    exact = langevin(model.eval(), x, 3, 0.01, noise=0, at=0.3)
    run = langevin(model.train(), x, 3, 0.01, noise=0, at=0.3)
    assert torch.equal(run.samples, exact.samples)
    assert net.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_acceptance_is_counted_beyond_what_half_precision_counts(dtype: torch.dtype) -> None:
    # A sum of ones ends at 256 in bfloat16, at 2048 in float16.
    x, steps = torch.randn(20, 1), 400
    run = langevin(harmonic, x.to(dtype), steps, 0.2, MALA(), noise=0, thin=steps)
    same = langevin(harmonic, x, steps, 0.2, MALA(), noise=0, thin=steps)
    assert run.samples.dtype == dtype
    assert run.acceptance is not None
    assert same.acceptance is not None
    # An acceptance is the mean of steps numbers that half precision rounds by 2^-8 at most.
    assert abs(float(run.acceptance.mean() - same.acceptance.mean())) < 2**-8


def test_a_score_may_be_of_another_precision_than_the_chain() -> None:
    class Wide(Score):
        def __call__(self, x: Tensor, t: Time) -> Tensor:
            assert x.dtype == torch.float32
            return -x.double()

        def log_prob(self, x: Tensor, t: Time) -> Tensor:
            return harmonic(x.double())

    for method in ALL:
        run = langevin(Wide(), torch.zeros(3, 2), 5, 0.1, method, noise=0)
        same = langevin(harmonic, torch.zeros(3, 2), 5, 0.1, method, noise=0)
        torch.testing.assert_close(run.samples, same.samples)


def test_a_run_without_gradients_leaves_its_target_differentiable() -> None:
    target, x = correlated(VP()), torch.randn(4, 2)
    with torch.inference_mode():
        langevin(target, x, 3, 0.01, noise=0, at=0.3)
    y = x.clone().requires_grad_()
    target(y, 0.3).square().sum().backward()
    assert y.grad is not None
    precision = torch.linalg.inv(
        float(VP().alpha(0.3)) ** 2 * (target.basis * target.variance) @ target.basis.T
        + float(VP().sigma(0.3)) ** 2 * torch.eye(2, dtype=F64)
    ).float()
    exact = -2 * target(x, 0.3) @ precision
    torch.testing.assert_close(y.grad, exact, rtol=1e-4, atol=1e-5)


def test_numbers_of_numpy_are_numbers() -> None:
    x, p = torch.randn(3, 2), [[0.5, 0.1], [0.1, 0.25]]
    steps, h, warmup, thin = np.int64(8), np.float64(0.1), np.uint8(3), np.int32(2)
    at, method = np.float64(0.25), BAOAB(np.float64(0.5))
    target = mixture(VP())
    exact = langevin(
        target, x, 8, 0.1, BAOAB(0.5), at=0.25, warmup=3, thin=2, noise=1,
        preconditioner=torch.tensor(p),
    )  # fmt: skip
    for matrix in (p, np.array(p)):
        run = langevin(
            target, x, steps, h, method, at=at, warmup=warmup, thin=thin, noise=np.int64(1),
            preconditioner=matrix,
        )  # fmt: skip
        assert torch.equal(run.samples, exact.samples)
    times = np.array([1.0, 0.1])
    run = annealed_langevin(target, x, times, np.int64(3), np.float64(0.01), noise=np.int32(1))
    assert torch.equal(run, annealed_langevin(target, x, [1.0, 0.1], 3, 0.01, noise=1))


# --- what goes wrong --------------------------------------------------------------------------


def quartic(x: Tensor) -> Tensor:
    return -0.25 * x.pow(4).sum(1)


def test_chains_that_diverge_are_reported_and_not_returned_as_numbers() -> None:
    x = torch.tensor([[0.0], [40.0], [0.5]])
    with pytest.warns(RuntimeWarning, match=r"1 of 3 chains diverged and are NaN.*\[1\]"):
        run = langevin(quartic, x, 60, 0.01, noise=0)
    assert run.diverged.tolist() == [False, True, False]
    assert bool(run.samples[:, 1].isnan().all())
    assert bool(run.samples[:, [0, 2]].isfinite().all())
    assert "1 diverged" in repr(run)
    assert run.to_arviz().posterior["x"].shape == (2, 60, 1)


def test_a_chain_that_is_huge_but_finite_has_diverged() -> None:
    with pytest.raises(FloatingPointError, match=r"every chain diverged within .* h = 2\.5"):
        langevin(harmonic, torch.ones(3, 1, dtype=F64), 64, 2.5, noise=0)


def test_mala_does_not_diverge() -> None:
    x = torch.tensor([[0.0], [40.0], [0.5]])
    run = langevin(quartic, x, 200, 0.01, MALA(), noise=0, warmup=300)
    assert not bool(run.diverged.any())
    assert float(run.samples.abs().max()) < 5


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_chains_start_where_the_score_is_finite(method: Method) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    with pytest.raises(
        FloatingPointError, match=r"score is NaN or infinite .* first are \[1, 3\]"
    ):
        langevin(lambda x: -x.square().sum(1).sqrt(), x, 2000, 0.1, method, warmup=200)


@pytest.mark.parametrize("outside", [-math.inf, math.nan])
def test_mala_refuses_what_has_no_density_and_keeps_its_law(outside: float) -> None:
    """Exp(1): mean and variance 1, fourth central moment 9."""
    n = 4000
    x = -torch.rand(n, 1).log()
    run = langevin(
        lambda x: torch.where(x > 0, -x, outside).sum(1), x, 50, 0.1, MALA(), noise=0, thin=50
    )
    last = run.samples[-1, :, 0]
    assert bool((last > 0).all())
    assert not bool(run.diverged.any())
    # Five standard errors.
    assert abs(float(last.mean()) - 1) < 5 * math.sqrt(1 / n)
    assert abs(float(last.var()) - 1) < 5 * math.sqrt(8 / n)


def hole(x: Tensor) -> Tensor:
    """The harmonic, whose score is NaN above 1."""
    return harmonic(x) + 0 * ((1 - x) * (x < 1)).sqrt().sum(1)


def test_mala_tells_where_there_is_density_but_no_score() -> None:
    assert hole(torch.tensor([[3.0]])).tolist() == [-4.5]
    with pytest.raises(FloatingPointError, match=r"every chain diverged within .* MALA"):
        langevin(hole, torch.zeros(5, 1), 2000, 0.1, MALA(), noise=0)
    far = torch.tensor([[0.0], [-1e3]], dtype=F64)
    with pytest.warns(RuntimeWarning, match=r"1 of 2 chains diverged and are NaN.*\[0\]"):
        run = langevin(hole, far, 500, 0.01, MALA(), noise=0)
    assert run.diverged.tolist() == [True, False]
    assert bool(run.samples[:, 0].isnan().all())


def test_chains_that_stand_still_or_creep_are_told() -> None:
    x = torch.tensor([[0.0], [40.0], [0.5]])
    with pytest.warns(RuntimeWarning, match=r"1 of 3 chains hardly ever move.*\[1\].*too large"):
        run = langevin(quartic, x, 200, 0.2, MALA(), noise=0)
    assert bool((run.samples[:, 1] == 40).all())
    with pytest.warns(RuntimeWarning, match=r"3 of 3 chains creep.*\[0, 1, 2\].*too small"):
        run = langevin(harmonic, x / 40, 200, 1e-9, MALA(), noise=0)
    assert float((run.samples - x / 40).abs().max()) < 0.01


def test_diagnostics_of_chains_that_stand_still_are_told() -> None:
    samples = torch.randn(50, 4, 2)
    ones, none = torch.ones(4), torch.zeros(4, dtype=torch.bool)
    data = Chains(samples.bfloat16(), ones, none).to_arviz().posterior["x"]
    assert data.shape == (4, 50, 2)
    torch.testing.assert_close(
        torch.from_numpy(data.values), samples.transpose(0, 1), rtol=2**-8, atol=0
    )
    samples[:, 1:3, 0] = torch.tensor([3.0, 4.0])
    with pytest.warns(RuntimeWarning, match="2 of 4 chains never move .* R-hat"):
        Chains(samples, ones, none).to_arviz()


def test_annealed_langevin_raises_when_a_chain_diverges() -> None:
    target = Gaussian(EDM(), torch.zeros(1), 0.01)
    with pytest.raises(FloatingPointError, match="diverged"):
        annealed_langevin(target, torch.ones(2, 1), [1.0, 0.1], 100, 1.0, noise=0)


def test_without_arviz_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    run = Chains(torch.zeros(2, 1, 1), torch.ones(1), torch.zeros(1, dtype=torch.bool))
    with pytest.raises(ImportError, match=r"pip install 'sde-gen\[mcmc\]'"):
        run.to_arviz()


class Returns(Score):
    """A score that answers what f does."""

    def __init__(self, f: Callable[[Tensor], object]) -> None:
        self.f = f

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        return self.f(x)


X = torch.zeros(3, 2)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "integers": (lambda: langevin(harmonic, X.long(), 5, 0.1), TypeError, "floating point"),
    "nan": (lambda: langevin(harmonic, X / 0, 5, 0.1), ValueError, "NaN"),
    "target": (lambda: langevin(3, X, 5, 0.1), TypeError, "Score or a function"),
    "per row": (lambda: langevin(lambda x: x.sum(), X, 5, 0.1), ValueError, "one number a chain"),
    "method": (lambda: langevin(harmonic, X, 5, 0.1, "ULA"), TypeError, "must be a Method"),
    "steps": (lambda: langevin(harmonic, X, 0, 0.1), ValueError, "steps must be an integer >= 1"),
    "warmup": (lambda: langevin(harmonic, X, 5, 0.1, warmup=-1), ValueError, "warmup must"),
    "thin": (lambda: langevin(harmonic, X, 5, 0.1, thin=6), ValueError, "keeps none"),
    "h": (lambda: langevin(harmonic, X, 5, -0.1), ValueError, "h must be a positive"),
    "shape": (lambda: langevin(line(EDM()), X, 5, 0.1), ValueError, "must have shape"),
    "singular": (lambda: langevin(network(), X, 5, 0.1), ValueError, "singular at t = 0"),
    "at": (lambda: langevin(line(EDM(1.0)), X[:, :1], 5, 0.1, at=2.0), ValueError, "times must"),
    "no density": (
        lambda: langevin(network(), X, 5, 0.1, MALA(), at=0.1),
        TypeError,
        "MALA needs a density, and ScoreNetwork gives only its gradient",
    ),
    "a density of integers": (
        lambda: langevin(lambda x: harmonic(x).long(), X, 5, 0.1),
        ValueError,
        r"one number a chain, \(3,\) and real; got shape \(3,\) of torch.int64",
    ),
    "a complex density": (
        lambda: langevin(lambda x: 1j * harmonic(x), X, 5, 0.1),
        ValueError,
        "and real; got .* torch.complex64",
    ),
    "a density cut off": (
        lambda: langevin(lambda x: harmonic(x.detach()), X, 5, 0.1),
        ValueError,
        "detached from x",
    ),
    "no score": (
        lambda: langevin(Returns(lambda x: None), X, 5, 0.1),
        TypeError,
        r"the score returned NoneType .* \(Returns\)",
    ),
    "a complex score": (
        lambda: langevin(Returns(lambda x: 1j * x), X, 5, 0.1),
        TypeError,
        "the score returned torch.complex64",
    ),
    "a score that would broadcast": (
        lambda: langevin(Returns(lambda x: x[:, :1]), X, 5, 0.1),
        ValueError,
        r"the score returned shape \(3, 1\) for a state \(3, 2\)",
    ),
    "no chains": (lambda: langevin(harmonic, X[:0], 5, 0.1), ValueError, "x is an empty batch"),
    "no coordinates": (
        lambda: langevin(harmonic, X[:, :0], 5, 0.1),
        ValueError,
        r"x is an empty batch: its shape is \(3, 0\)",
    ),
    "complex": (lambda: langevin(harmonic, 1j * X, 5, 0.1), TypeError, r"x must be .*complex64"),
    "complex at": (
        lambda: langevin(line(EDM()), X[:, :1], 5, 0.1, at=1j),
        TypeError,
        "at must be real, got torch.complex128",
    ),
    "complex preconditioner": (
        lambda: langevin(harmonic, X, 5, 0.1, preconditioner=1j * np.eye(2)),
        TypeError,
        "preconditioner must be real, got torch.complex128",
    ),
    "complex times": (
        lambda: annealed_langevin(line(EDM()), X[:, :1], torch.tensor([1j, 0.5]), 5, 0.1),
        TypeError,
        "times must be real, got torch.complex64",
    ),
    "words": (
        lambda: annealed_langevin(line(EDM()), X[:, :1], "now", 5, 0.1),
        TypeError,
        "times must be real numbers, got 'now'",
    ),
    "half a step": (lambda: langevin(harmonic, X, 5.5, 0.1), ValueError, "steps must .* got 5.5"),
    "h = True": (lambda: langevin(harmonic, X, 5, True), ValueError, "h must be a positive"),
    "density 0": (
        lambda: langevin(lambda x: torch.log(x[:, 0]), X, 5, 0.1, MALA()),
        ValueError,
        "where the density is positive",
    ),
    "preconditioner": (
        lambda: langevin(harmonic, X, 5, 0.1, preconditioner=torch.eye(3)),
        ValueError,
        r"symmetric matrix \(2, 2\)",
    ),
    "indefinite": (
        lambda: langevin(harmonic, X, 5, 0.1, preconditioner=torch.diag(torch.tensor([1.0, -1]))),
        ValueError,
        "positive definite",
    ),
    "word": (lambda: Splitting("BAAOB"), ValueError, "made of A, B and O"),
    "no word": (lambda: Splitting(3), ValueError, "made of A, B and O, .*: 3"),
    "friction": (lambda: BAOAB(-1.0), ValueError, "friction"),
    "friction in words": (lambda: BAOAB("1"), ValueError, "friction must be .* got '1'"),
    "acceptance": (lambda: MALA(1.0), ValueError, "between 0 and 1"),
    "acceptance in words": (lambda: MALA("1"), ValueError, "acceptance must lie .* got '1'"),
    "levels": (
        lambda: annealed_langevin(line(EDM()), X[:, :1], [0.1, 1.0], 5, 0.1),
        ValueError,
        "must fall",
    ),
    "level 0": (
        lambda: annealed_langevin(line(EDM()), X[:, :1], [1.0, 0.0], 5, 0.1),
        ValueError,
        "must fall within",
    ),
    "no process": (
        lambda: annealed_langevin(harmonic, X, [1.0], 5, 0.1),
        TypeError,
        "knows its linear process",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused(case: str) -> None:
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call()
