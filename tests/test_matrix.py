"""Linear processes with matrix coefficients: kernels, reversal, solvers, scores, training."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import F64, mixture, slopes
from scipy.linalg import expm, solve_continuous_lyapunov
from test_sra import Nested
from torch import Tensor

from sde_gen import (
    EDM,
    SDE,
    SRA,
    VE,
    VP,
    Adaptive,
    BrownianPath,
    Churn,
    Classifier,
    ClassifierFree,
    CorrelatedMixture,
    CriticallyDamped,
    EulerMaruyama,
    Exponential,
    Facts,
    Gaussian,
    GaussianMixture,
    Heun,
    Lifted,
    LinearSDE,
    MatrixOrnsteinUhlenbeck,
    MatrixSDE,
    Noise,
    OrnsteinUhlenbeck,
    PredictorCorrector,
    Propagator,
    Recipe,
    RungeKutta,
    SciPy,
    Score,
    ScoreNetwork,
    Solver,
    TorchSDE,
    bits_per_dim,
    default_solver,
    dsm_loss,
    grids,
    load,
    log_prob,
    sample,
    save,
    solve,
    train,
)
from sde_gen.guidance import classifier_loss
from sde_gen.metrics import energy_distance
from sde_gen.networks import MLP
from sde_gen.ops import Time, act, as_time, cholesky, integrate
from sde_gen.schedules import Geometric, Linear, Power
from sde_gen.training import KarrasWeight

A = ((-1.0, 2.0, 0.3), (-1.5, -0.5, 0.1), (0.2, 0.4, -0.8))
G = ((0.6, 0.0, 0.2), (0.1, 0.9, 0.0), (0.0, -0.3, 0.4))
PLANE = MatrixOrnsteinUhlenbeck(((-0.8, 1.5), (-0.6, -0.5)), ((0.9, 0.2), (0.0, 0.7)))
SOLID = MatrixOrnsteinUhlenbeck(A, G, Power(2.0, T=1.5))
CLD = CriticallyDamped()
CLOCKED = MatrixOrnsteinUhlenbeck(PLANE.a, PLANE.g, Power(3.0, T=1.3))
HEAVY = CriticallyDamped(Geometric(0.1, 2.0), mass=0.7, start=0.3)


class Turning(MatrixSDE):
    """A(t) that does not commute with itself at other times, G(t) that is not square-symmetric."""

    T = 2.0

    def rate(self, t: Time) -> Tensor:
        t = as_time(t)[..., None, None]
        a, b = torch.tensor([[[-1.0, 0.5], [0.0, -0.3]], [[0.2, -2.0], [1.0, -0.4]]], dtype=F64)
        return a + t * b

    def diffusion(self, t: Time) -> Tensor:
        t = as_time(t)[..., None, None]
        a, b = torch.tensor([[[0.5, 0.1], [-0.2, 0.8]], [[0.3, 0.0], [0.4, 0.1]]], dtype=F64)
        return a + torch.sin(t) * b


class Scalar(MatrixSDE):
    """A scalar process as a matrix one, A = f I and G = g I, by the base's own moments."""

    def __init__(self, sde: LinearSDE, k: int = 2) -> None:
        self.sde, self.T, self.k = sde, sde.T, k

    def rate(self, t: Time) -> Tensor:
        return self.sde.rate(t)[..., None, None] * torch.eye(self.k, dtype=F64)

    def diffusion(self, t: Time) -> Tensor:
        return self.sde.diffusion(t)[..., None, None] * torch.eye(self.k, dtype=F64)


class Plain(MatrixSDE):
    """Another process's A and G, and nothing else."""

    def __init__(self, sde: MatrixSDE) -> None:
        self.sde, self.T, self.added, self.driven = sde, sde.T, sde.added, sde.driven

    def rate(self, t: Time) -> Tensor:
        return self.sde.rate(t)

    def diffusion(self, t: Time) -> Tensor:
        return self.sde.diffusion(t)


MATRIX = [PLANE, SOLID, CLD, HEAVY, Turning()]
every_matrix = pytest.mark.parametrize("sde", MATRIX, ids=lambda s: type(s).__name__)


def inside(sde: MatrixSDE) -> Tensor:
    return sde.T * torch.tensor([1e-3, 0.01, 0.1, 0.3, 0.6, 1.0], dtype=F64)


# Kernels.


def test_a_matrix_acts_on_the_second_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    one, each = (torch.randn(*b, 4, 3, generator=generator, dtype=F64) for b in ((), (5,)))
    for rest in ((), (2,), (2, 3, 2)):
        x = torch.randn(5, 3, *rest, generator=generator, dtype=F64)
        torch.testing.assert_close(act(one, x), torch.einsum("ij,bj...->bi...", one, x))
        torch.testing.assert_close(act(each, x), torch.einsum("bij,bj...->bi...", each, x))
    assert act(one, x.float()).dtype == torch.float32
    for wrong in (torch.zeros(3, 4), torch.zeros(4, 3, 3)):
        with pytest.raises(ValueError, match="matrix must be"):
            act(wrong, x)


def test_a_singular_covariance_has_a_root() -> None:
    low = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [-1.0, 0.5, 3.0]], dtype=F64)
    root = cholesky(low @ low.T)
    torch.testing.assert_close(root @ root.T, low @ low.T)
    full = low + torch.eye(3, dtype=F64)
    torch.testing.assert_close(cholesky(full @ full.T), torch.linalg.cholesky(full @ full.T))


def van_loan(a: np.ndarray, q: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Phi and the covariance by one block exponential (Van Loan 1978)."""
    k = len(a)
    m = expm(np.block([[-a, q], [np.zeros((k, k)), a.T]]) * t)
    return m[k:, k:].T, m[k:, k:].T @ m[:k, k:]


@pytest.mark.parametrize("sde", [PLANE, SOLID, CLD, HEAVY], ids=lambda s: type(s).__name__)
def test_constant_coefficients_against_van_loan(sde: MatrixOrnsteinUhlenbeck) -> None:
    a, g = np.array(sde.a), np.array(sde.g)
    for t in (1e-8, 1e-4, 0.05, 0.3):
        b = float(sde.schedule.integral(t))
        phi, v = van_loan(a, g @ g.T, b)
        # To 1e-12 of each entry: at 1e-8 that of the position of CLD is of the order of 1e-24.
        np.testing.assert_allclose(sde.transition(t), phi, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(sde.spread(t), v, rtol=1e-12)


@pytest.mark.parametrize("sde", [CLD, HEAVY])
def test_critically_damped_closed_forms_are_the_general_ones(sde: CriticallyDamped) -> None:
    general = MatrixOrnsteinUhlenbeck(sde.a, sde.g, sde.schedule)
    t = sde.T * torch.tensor([1e-8, 1e-5, 1e-3, 0.1, 0.5, 1.0], dtype=F64)
    # Near rest x and v are independent: their covariance is rounding beside the variances.
    torch.testing.assert_close(sde.transition(t), general.transition(t), rtol=1e-11, atol=0)
    torch.testing.assert_close(sde.spread(t), general.spread(t), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(sde.spread(t[:3]), general.spread(t[:3]), rtol=1e-12, atol=0)


def test_published_critically_damped_covariance() -> None:
    """As Dockhorn et al. 2022 write it, with their numbers: v_0 ~ N(0, gamma M)."""
    t, gamma, m, big = 0.23, 0.04, 0.25, 1.0
    b = 4 * t
    e = math.exp(4 * b / big)
    # They start from a variance of x too, here 0.
    xx = e - 1 - 4 * b / big - 8 * b**2 / big**2 + 16 * b**2 / big**4 * gamma * m
    xv = 4 * b**2 / big + gamma * m * (4 * b / big**2 - 8 * b**2 / big**3)
    vv = big**2 / 4 * (e - 1) + b * big - 2 * b**2 + gamma * m * (1 - 2 * b / big) ** 2
    exact = torch.tensor([[xx, xv], [xv, vv]], dtype=F64) / e
    torch.testing.assert_close(CLD.covariance(t), exact, rtol=1e-12, atol=0)
    assert CLD.mass == m
    assert CLD.friction == big
    rest = torch.diag(torch.tensor([1.0, 0.7], dtype=F64))
    torch.testing.assert_close(
        CriticallyDamped(Power(1.0, T=40.0), mass=0.7).covariance(40.0), rest, rtol=0, atol=1e-9
    )


@every_matrix
def test_moments_obey_their_equations(sde: MatrixSDE) -> None:
    h = 1e-4 * sde.T
    t = inside(sde)[1:-1]
    a, q = sde.rate(t), sde.diffusion(t) @ sde.diffusion(t).mT
    nodes = [(-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12)]
    for value, right in (
        (sde.transition, a @ sde.transition(t)),
        (sde.covariance, a @ sde.covariance(t) + sde.covariance(t) @ a.mT + q),
    ):
        slope = sum(c * value(t + k * h) for k, c in nodes) / h
        # Fourth differences of values good to 1e-11, divided by h.
        torch.testing.assert_close(slope, right, rtol=1e-6, atol=2e-7)


def test_a_drift_that_turns_against_composed_exponentials() -> None:
    sde, t, n = Turning(), 1.3, 4000
    phi, v, h = np.eye(2), np.zeros((2, 2)), 1.3 / 4000
    for i in range(n):
        u = (i + 0.5) * h
        a, g = sde.rate(u).numpy(), sde.diffusion(u).numpy()
        step, more = van_loan(a, g @ g.T, h)
        phi, v = step @ phi, step @ v @ step.T + more
    # The midpoint rule's error is h^2 times derivatives of the order of 10.
    np.testing.assert_allclose(sde.transition(t), phi, rtol=0, atol=10 * h**2)
    np.testing.assert_allclose(sde.spread(t), v, rtol=0, atol=10 * h**2)
    assert not np.allclose(phi, expm(integrate_rate(sde, t)), atol=1e-2)


def integrate_rate(sde: MatrixSDE, t: float) -> np.ndarray:
    """int A, whose exponential is Phi only where A commutes with itself."""
    entry = [[integrate(lambda u: sde.rate(u)[..., i, j], 0.0, t) for j in (0, 1)] for i in (0, 1)]  # noqa: B023
    return np.array(entry)


@pytest.mark.parametrize("sde", [PLANE, SOLID, CLD, HEAVY], ids=lambda s: type(s).__name__)
def test_two_steps_are_one(sde: MatrixOrnsteinUhlenbeck) -> None:
    """Chapman-Kolmogorov, on the clock: B = B_1 + B_2."""
    s, t = 0.3 * sde.T, 0.8 * sde.T
    later = float(sde.schedule.integral(t) - sde.schedule.integral(s))
    again = sde.schedule.time_at(later)
    phi = sde.transition(again)
    torch.testing.assert_close(phi @ sde.transition(s), sde.transition(t), rtol=1e-10, atol=1e-14)
    v = phi @ sde.spread(s) @ phi.mT + sde.spread(again)
    torch.testing.assert_close(v, sde.spread(t), rtol=1e-10, atol=1e-14)


@every_matrix
def test_the_base_derives_what_is_overridden(sde: MatrixSDE) -> None:
    t, plain = inside(sde), Plain(sde)
    for name in ("transition", "spread", "covariance", "alpha", "sigma", "log_snr"):
        closed, base = getattr(sde, name)(t), getattr(plain, name)(t)
        torch.testing.assert_close(closed, base, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sde", [VP(), VE(Geometric(0.02, 8.0)), OrnsteinUhlenbeck(), CLD])
def test_time_at_inverts_the_signal_to_noise_ratio(sde: LinearSDE | MatrixSDE) -> None:
    if isinstance(sde, LinearSDE):
        matrix: MatrixSDE = Scalar(sde)
        t = sde.T * torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=F64)
        torch.testing.assert_close(matrix.log_snr(t), sde.log_snr(t), rtol=0, atol=1e-6)
    else:
        matrix = sde
        t = sde.T * torch.tensor([1e-6, 0.01, 0.1, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(matrix.time_at(matrix.log_snr(t)), t, rtol=1e-7, atol=0)
    levels = matrix.log_snr(sde.T * torch.linspace(1e-3, 1, 200, dtype=F64))
    assert bool((levels.diff() < 0).all())


@pytest.mark.parametrize("sde", [VP(), VE(Geometric(0.02, 8.0)), OrnsteinUhlenbeck()], ids=repr)
def test_the_scalar_process_is_the_special_case(sde: LinearSDE) -> None:
    matrix, t = Scalar(sde), sde.T * torch.tensor([0.05, 0.3, 1.0], dtype=F64)
    one = torch.eye(2, dtype=F64)
    for name in ("alpha", "sigma"):
        scalar = getattr(sde, name)(t)[:, None, None] * one
        torch.testing.assert_close(getattr(matrix, name)(t), scalar, rtol=1e-8, atol=1e-10)
    x = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    a, b = (s.perturb(x, t, g) for s, g in zip((sde, matrix), generators, strict=True))
    for name in ("x", "mean", "score"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-7, atol=1e-9)
    s = a.score + 0.1
    torch.testing.assert_close(a.residual(s), b.residual(s), rtol=1e-7, atol=1e-9)

    def score(x: Tensor, t: Time) -> Tensor:
        return -x / 2

    torch.testing.assert_close(
        sde.tweedie(x, t, score(x, t)), matrix.tweedie(x, t, score(x, t)), rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(sde.prior_log_prob(x), matrix.prior_log_prob(x), rtol=1e-7, atol=0)
    for eta in (0.0, 0.7):
        p, q = sde.reverse(score, eta), matrix.reverse(score, eta)
        torch.testing.assert_close(p.drift(x, 0.4), q.drift(x, 0.4))
        torch.testing.assert_close(p.diffusion(0.4) * one, q.diffusion(0.4))


def test_at_rest_the_covariance_solves_lyapunov() -> None:
    sde = MatrixOrnsteinUhlenbeck(A, G, Power(1.0, T=200.0))
    a, g = np.array(A), np.array(G)
    exact = solve_continuous_lyapunov(a, -g @ g.T)
    np.testing.assert_allclose(sde.covariance(200.0), exact, rtol=1e-9, atol=1e-12)


@every_matrix
def test_perturb_draws_from_the_kernel(sde: MatrixSDE) -> None:
    n, t = 20_000, 0.4 * sde.T
    generator = torch.Generator().manual_seed(3)
    one = torch.tensor([0.7] if sde.added else [0.7, -0.4, 0.2][: sde.size], dtype=F64)
    x = one.squeeze().expand(n) if sde.added else one.expand(n, -1)
    p = sde.perturb(x, t, generator)
    assert p.x.shape == (n, *sde.state_shape(x.shape[1:]))
    z = (p.x - sde.alpha(t) @ one) @ torch.linalg.inv(sde.sigma(t)).T
    k = sde.size
    assert float(z.mean(0).abs().max()) < 4 / math.sqrt(n)
    assert float((z.T @ z / n - torch.eye(k, dtype=F64)).abs().max()) < 4 * math.sqrt(2 / n)
    y = p.x[:5].clone().requires_grad_()
    law = torch.distributions.MultivariateNormal(p.mean[:5], scale_tril=p.std)
    (exact,) = torch.autograd.grad(law.log_prob(y).sum(), y)
    torch.testing.assert_close(p.score[:5], exact)


def test_perturb_takes_a_time_for_each_sample_and_any_shape() -> None:
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.01, 0.4, 1.0])
    p = CLD.perturb(x, t, torch.Generator().manual_seed(1))
    assert p.x.shape == (4, 2, 3, 2)
    assert p.x.dtype == torch.float32
    torch.testing.assert_close(CLD.data(p.x)[0], x[0])
    for i in range(4):
        low = CLD.sigma(t[i]).float()
        part = torch.einsum("ij,j...->i...", low, p.noise[i])
        torch.testing.assert_close(p.x[i] - p.mean[i], part, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sde", [PLANE, SOLID, CLD], ids=lambda s: type(s).__name__)
def test_the_prior_has_its_density(sde: MatrixSDE) -> None:
    x = sde.prior(5000, sde.size, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    law = torch.distributions.MultivariateNormal(
        torch.zeros(sde.size, dtype=F64), sde.covariance(sde.T)
    )
    exact = law.log_prob(x.movedim(1, -1)).sum(1)
    torch.testing.assert_close(sde.prior_log_prob(x), exact)
    v = torch.einsum("bir,bjr->ij", x, x) / 10_000
    scale = sde.covariance(sde.T).diagonal().sqrt()
    assert float(((v - sde.covariance(sde.T)) / torch.outer(scale, scale)).abs().max()) < 0.06


def test_what_cannot_be_a_matrix_process_is_refused() -> None:
    one = ((1.0, 0.0), (0.0, 1.0))
    with pytest.raises(ValueError, match="stable"):
        MatrixOrnsteinUhlenbeck(one, one)
    with pytest.raises(ValueError, match="square"):
        MatrixOrnsteinUhlenbeck(((-1.0, 0.0),), one)
    with pytest.raises(ValueError, match="of size"):
        MatrixOrnsteinUhlenbeck(((-1.0,),), one)
    with pytest.raises(TypeError, match="schedule"):
        MatrixOrnsteinUhlenbeck(((-1.0,),), ((1.0,),), 5.0)  # type: ignore[arg-type]
    flat = ((1.0, 0.0), (0.0, 0.0))
    for g in (flat, ((1.0, 1.0), (1.0, 1.0)), ((0.0, 0.0), (0.0, 0.0))):
        with pytest.raises(ValueError, match="g is singular, and a does not carry its noise"):
            MatrixOrnsteinUhlenbeck(((-1.0, 0.0), (0.0, -1.0)), g)
    # The first component drives the second: a singular g is enough.
    chain = MatrixOrnsteinUhlenbeck(((-1.0, 0.0), (1.0, -1.0)), flat)
    assert float(torch.linalg.eigvalsh(chain.covariance(1.0))[0]) > 0
    with pytest.raises(TypeError, match="a must be real"):
        MatrixOrnsteinUhlenbeck(((-1j,),), ((1.0,),))  # type: ignore[arg-type]
    for mass, start, name in ((0.0, 0.1, "mass"), (1.0, 0.0, "start")):
        with pytest.raises(ValueError, match=f"{name} must be a number > 0, got 0"):
            CriticallyDamped(mass=mass, start=start)
    assert MatrixOrnsteinUhlenbeck(torch.tensor(A, dtype=F64), G) == MatrixOrnsteinUhlenbeck(A, G)  # type: ignore[arg-type]
    assert hash(CLD) == hash(CriticallyDamped())


@pytest.mark.parametrize(
    "sde",
    [
        MatrixOrnsteinUhlenbeck(((-200.0, 10.0), (0.0, -150.0)), ((1.0, 0.0), (0.0, 1.0))),
        CriticallyDamped(Linear(4.0, 4000.0)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_matrix_clock_may_run_on_when_no_signal_is_left(sde: MatrixSDE) -> None:
    """exp(-1000) underflows; times, grids and samples are those of the part that counts."""
    t = sde.T * torch.tensor([1e-3, 0.01, 0.05], dtype=F64)
    torch.testing.assert_close(sde.time_at(sde.log_snr(t)), t, rtol=1e-8, atol=0)
    assert float(sde.log_snr(sde.T)) < -600
    assert float(grids.default_start(sde)) < 0.3 * sde.T
    law, n = blob(sde), 4000
    pi = law.log_weights.exp()
    mean = pi @ law.means
    spread = law.covariances.diagonal(dim1=1, dim2=2) + (law.means - mean) ** 2
    x, std = sample(law, n, 40, seed=0, dtype=F64), (pi @ spread).sqrt()
    # Four deviations of a mean, and of the standard deviation of two broad modes (kurtosis < 3).
    assert float(((x.mean(0) - mean) / std).abs().max()) < 4 / math.sqrt(n)
    assert float((x.std(0) / std - 1).abs().max()) < 4 / math.sqrt(2 * n)


# Exact scores.


def blob(sde: MatrixSDE | LinearSDE) -> CorrelatedMixture:
    """Two components with full covariances in the plane."""
    means = torch.tensor([[0.8, -0.5], [-0.6, 0.9]], dtype=F64)
    covariances = torch.tensor(
        [[[0.30, 0.12], [0.12, 0.20]], [[0.15, -0.05], [-0.05, 0.40]]], dtype=F64
    )
    return CorrelatedMixture(sde, torch.tensor([0.3, 0.7]), means, covariances)


def normal(sde: MatrixSDE) -> CorrelatedMixture:
    """One Gaussian, (d,) data for a process that mixes them or a point in the plane for CLD."""
    d = 2 if sde.added else sde.size
    low = torch.eye(d, dtype=F64) * 0.6 + torch.tril(torch.full((d, d), 0.2, dtype=F64))
    mean = torch.linspace(0.7, -0.4, d, dtype=F64)
    return CorrelatedMixture(sde, torch.ones(1), mean[None], low @ low.T)


def joint(score: CorrelatedMixture, t: float) -> torch.distributions.Distribution:
    """The law of the flat state at t, from Phi and Sigma alone, by torch's own distributions."""
    sde = score.sde
    assert isinstance(sde, MatrixSDE)
    r = 2 if sde.added else 1
    a = torch.kron(sde.alpha(t), torch.eye(r, dtype=F64))
    v = torch.kron(sde.covariance(t), torch.eye(r, dtype=F64))
    law = torch.distributions.MultivariateNormal(
        score.means @ a.T, a @ score.covariances @ a.T + v
    )
    mix = torch.distributions.Categorical(logits=score.log_weights)
    return torch.distributions.MixtureSameFamily(mix, law)


def states(score: CorrelatedMixture, n: int, t: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return score.sde.perturb(score.sample(n, generator), t, generator).x


@pytest.mark.parametrize("sde", [PLANE, CLD, HEAVY, Turning()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_the_correlated_mixture_is_exact(sde: MatrixSDE, share: float) -> None:
    score, t = blob(sde), share * sde.T
    x = states(score, 20, 0.3 * sde.T).requires_grad_()
    exact = joint(score, t).log_prob(x.flatten(1))
    (gradient,) = torch.autograd.grad(exact.sum(), x)
    torch.testing.assert_close(score.log_prob(x, t), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(score(x.detach(), t), gradient, rtol=1e-8, atol=1e-8)


def test_each_sample_may_have_its_time() -> None:
    for score in (blob(CLD), Lifted(mixture(VE(Geometric(0.01, 400.0))), CLD)):
        x, t = states(blob(CLD), 5, 0.4), torch.tensor([0.0, 1e-3, 0.1, 0.5, 1.0], dtype=F64)
        for f in (score, score.log_prob):
            each = torch.cat([f(x[i : i + 1], t[i]) for i in range(5)])
            torch.testing.assert_close(f(x, t), each, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", [EDM(400.0), VP(Linear(0.1, 30.0))], ids=repr)
@pytest.mark.parametrize("sde", [CLD, HEAVY])
@pytest.mark.parametrize("t", [0.0, 1e-6, 1e-3, 0.2, 1.0])
def test_a_lifted_score_is_that_of_the_state(
    sde: CriticallyDamped, inner: LinearSDE, t: float
) -> None:
    """The score of a scalar process, read off the statistic, is the score of (x, v)."""
    exact, lifted = blob(sde), Lifted(blob(inner), sde)
    x = states(exact, 50, max(t, 1e-3))
    # At 1e-6 the precision of v given x is known to 1e-16 / 1e-6 of itself.
    torch.testing.assert_close(lifted(x, t), exact(x, t), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(lifted.log_prob(x, t), exact.log_prob(x, t), rtol=1e-7, atol=1e-6)


def test_a_lifted_score_serves_any_shape_and_keeps_what_is_bound() -> None:
    inner = GaussianMixture(
        EDM(400.0), torch.ones(3), torch.randn(3, 1, 2, 2, generator=torch.Generator()), 0.3
    )

    class Labelled(Score):
        sde, shape = inner.sde, inner.shape

        def __call__(self, x: Tensor, t: Time, y: Tensor | None = None) -> Tensor:
            return inner(x, t) + (0 if y is None else y.reshape(-1, 1, 1, 1))

    model, y = Lifted(Labelled(), CLD), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    x = torch.randn(4, 2, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    s = model.given(y=y)(x, 0.3)
    assert s.shape == x.shape
    torch.testing.assert_close(model.given(y=y).rows(slice(1, 3))(x[1:3], 0.3), s[1:3])
    assert not torch.allclose(s, model(x, 0.3))
    assert model(x.float(), 0.3).dtype == torch.float32


@pytest.mark.parametrize("sde", MATRIX, ids=lambda s: type(s).__name__)
def test_tweedie_is_the_posterior_mean(sde: MatrixSDE) -> None:
    score, t = normal(sde), 0.4 * sde.T
    x = states(score, 7, t)
    n, r = score.means.shape[1], 2 if sde.added else 1
    a = torch.kron(sde.alpha(t), torch.eye(r, dtype=F64))
    v = torch.kron(sde.covariance(t), torch.eye(r, dtype=F64))
    c, m = score.covariances[0], score.means[0]
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + v)
    exact = m + (x.flatten(1) - m @ a.T) @ gain.T
    assert exact.shape == (7, n)
    torch.testing.assert_close(score.denoise(x, t), exact, rtol=1e-7, atol=1e-9)


def test_what_a_lift_needs() -> None:
    with pytest.raises(ValueError, match="EDM"):
        Lifted(blob(VP()), CLD)
    with pytest.raises(TypeError, match="components of the data"):
        Lifted(blob(EDM(400.0)), PLANE)
    with pytest.raises(TypeError, match="LinearSDE"):
        Lifted(blob(CLD), CLD)
    with pytest.raises(ValueError, match="covariances"):
        CorrelatedMixture(CLD, torch.ones(1), torch.zeros(1, 2), torch.eye(3))
    with pytest.raises(ValueError, match="symmetric"):
        CorrelatedMixture(CLD, torch.ones(1), torch.zeros(1, 2), torch.tensor([[1.0, 2], [0, 1]]))
    with pytest.raises(ValueError, match="shape"):
        blob(CLD)(torch.zeros(3, 2), 0.5)


# Reversal and solvers.


class Unit(Noise):
    """Row j d + i of those after the first ``rows`` gets z = 1 in component i of draw j alone."""

    def __init__(self, first: int) -> None:
        self.first, self.draws = first, 0

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        d = x[0].numel()
        z, at = torch.zeros(len(x), d, dtype=x.dtype), self.first + self.draws * d
        z[at : at + d] = torch.eye(d, dtype=x.dtype)
        self.draws += 1
        return z.reshape(x.shape)

    def start(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def rows(self, index: slice | Tensor) -> Unit:
        raise NotImplementedError


def output_law(
    score: CorrelatedMixture, solver: Solver, times: Tensor, eta: float, draws: int
) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance of a sampler's output for Gaussian data, from an exact start.

    The drift is affine in the state: one run reads off what becomes of the start and of each draw.
    """
    sde = score.sde
    shape = sde.state_shape(score.shape)
    d = math.prod(shape)
    total = draws if eta else 0
    x = torch.zeros(1 + d + total * d, *shape, dtype=F64)
    x[1 : d + 1] = torch.eye(d, dtype=F64).reshape(d, *shape)
    noise = Unit(d + 1)
    y = solve(sde.reverse(score, eta), x, times, solver, noise).flatten(1)
    assert noise.draws == total
    offset, response = y[0], (y[1:] - y[0]).T
    law = joint(score, float(times[0])).component_distribution
    start = response[:, :d]
    mean = offset + start @ law.mean[0]
    added = response[:, d:] @ response[:, d:].T
    return mean, start @ law.covariance_matrix[0] @ start.T + added


def law_error(score: CorrelatedMixture, law: tuple[Tensor, Tensor], t: float) -> float:
    exact = joint(score, t).component_distribution
    away = [law[0] - exact.mean[0], (law[1] - exact.covariance_matrix[0]).flatten()]
    return float(torch.cat(away).norm())


def name(value: object) -> str:
    if isinstance(value, TorchSDE):
        return f"TorchSDE {value.method}"
    if isinstance(value, Propagator):
        return f"Propagator {value.order}"
    return type(value).__name__


EVERY = [PLANE, SOLID, CLD, HEAVY, Turning()]
SOLVERS: list[tuple[Solver, int]] = [
    (EulerMaruyama(), 1),
    (Heun(), 1),
    (SRA(), 2),
    (Propagator(1, 0.5), 1),
    (Propagator(2, 0.5), 1),
    (TorchSDE("euler"), 1),
    (TorchSDE("heun"), 1),
    (TorchSDE("srk"), 2),
]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sde", EVERY, ids=name)
def test_every_eta_has_the_same_marginals(sde: MatrixSDE, eta: float) -> None:
    """The limit of fine steps is the law of the forward process, for every noise level."""
    score = normal(sde)
    t, s, errors = 0.8 * sde.T, 0.2 * sde.T, []
    for n in (40, 80) if eta else (100, 200):
        times = torch.linspace(t, s, n + 1, dtype=F64)
        errors.append(law_error(score, output_law(score, Heun(), times, eta, n), s))
    assert errors[1] < 4e-3
    # The limit is the exact law; the order of the approach is tested below.
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize(("solver", "draws"), SOLVERS, ids=name)
@pytest.mark.parametrize("sde", [CLD, PLANE], ids=name)
def test_weak_order_by_impulse_response(sde: MatrixSDE, solver: Solver, draws: int) -> None:
    score = normal(sde)
    t, s, errors = 0.6 * sde.T, 0.3 * sde.T, []
    for n in (48, 96):
        times = torch.linspace(t, s, n + 1, dtype=F64)
        errors.append(law_error(score, output_law(score, solver, times, 1.0, draws * n), s))
    assert slopes(errors)[0] == pytest.approx(solver.weak, abs=0.25)


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun(), SRA(), RungeKutta()], ids=name)
@pytest.mark.parametrize("sde", [CLD], ids=name)
def test_order_on_the_flow(sde: MatrixSDE, solver: Solver) -> None:
    score, t, s = normal(sde), 0.5 * sde.T, 0.3 * sde.T
    x, flow, errors = states(score, 16, t), sde.probability_flow(score), []
    exact = solve(flow, x, [t, s], SciPy("DOP853", 1e-12, 1e-13))
    for n in (64, 128):
        y = solve(flow, x, torch.linspace(t, s, n + 1, dtype=F64), solver)
        errors.append(float((y - exact).norm()))
    assert slopes(errors)[0] == pytest.approx(solver.order, abs=0.25)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.0])
@pytest.mark.parametrize("sde", [CLD, HEAVY, PLANE, SOLID], ids=name)
def test_a_propagator_of_the_data_s_variance_is_exact(
    sde: MatrixSDE, share: float, eta: float
) -> None:
    """Three long steps have the law of Gaussian data, even to t = 0, whatever their mean."""
    d = 2 if sde.added else sde.size
    mean = torch.linspace(0.7, -0.4, d, dtype=F64)
    score = CorrelatedMixture(sde, torch.ones(1), mean[None], 0.5 * torch.eye(d, dtype=F64))
    times = sde.T * torch.tensor([1.0, 0.6, 0.3, share], dtype=F64)
    for order in (1, 3):
        law = output_law(score, Propagator(order, 0.5), times, eta, 3)
        assert law_error(score, law, float(times[-1])) < 3e-6


@pytest.mark.parametrize(
    ("sde", "order"), [(CLD, 1), (CLD, 2), (CLD, 3), (CLD, 4), (PLANE, 2)], ids=name
)
def test_order_of_the_propagator_on_a_mixture(sde: MatrixSDE, order: int) -> None:
    score, t, s = blob(sde), 0.5 * sde.T, 0.15 * sde.T
    x = states(score, 32, t)
    flow = sde.probability_flow(score)
    exact = solve(flow, x, [t, s], SciPy("DOP853", 1e-12, 1e-13))
    errors = []
    for n in (32, 64):
        y = solve(flow, x, torch.linspace(t, s, n + 1, dtype=F64), Propagator(order, 0.5))
        errors.append(float((y - exact).norm()))
    # The first steps are of lower order: what they leave behind falls like h^2.
    least = min(order, 2)
    assert slopes(errors)[-1] > least - 0.2
    if order < 3:
        assert slopes(errors)[-1] < order + 0.3
    back = solve(flow, exact, torch.linspace(s, t, 65, dtype=F64), Propagator(order, 0.5))
    assert float((back - x).norm()) < (2.0 if order == 1 else 0.3)


STRONG: list[Solver] = [EulerMaruyama(), Heun(), SRA(), Propagator(2, 0.5), TorchSDE("srk")]


@lru_cache
def shared_path(sde: MatrixSDE) -> tuple[SDE, Tensor, Tensor, Noise, Tensor]:
    """A reversal of Gaussian data (no path flips between modes), its start, a grid, a path on it
    and where the path goes."""
    score, times = normal(sde), torch.linspace(0.8 * sde.T, 0.5 * sde.T, 513, dtype=F64)
    x = states(score, 60, 0.8 * sde.T)
    process, noise = sde.reverse(score), Nested(times, x, seed=1)
    return process, x, times, noise, solve(process, x, times, SRA(), noise)


@pytest.mark.parametrize("solver", STRONG, ids=name)
@pytest.mark.parametrize("sde", [HEAVY, CLOCKED], ids=name)
def test_strong_order_on_a_nested_path(sde: MatrixSDE, solver: Solver) -> None:
    """On clocks that are not uniform, as noise that does not change is kinder to SRA."""
    process, x, times, noise, reference = shared_path(sde)
    errors = [
        float((solve(process, x, times[:: 512 // n], solver, noise) - reference).norm())
        for n in (16, 32, 64)
    ]
    assert solver.strong is not None
    # At least: errors of the next order still count on these grids.
    assert solver.strong - 0.2 < sum(slopes(errors)) / 2 < solver.strong + 0.7


@pytest.mark.parametrize("sde", [CLD, PLANE], ids=name)
def test_adaptive_steps_and_scipy_follow_the_flow(sde: MatrixSDE) -> None:
    score, t, s = blob(sde), 0.8 * sde.T, 0.1 * sde.T
    x, flow = states(score, 6, t), sde.probability_flow(score)
    exact = solve(flow, x, [t, s], SciPy("DOP853", 1e-9, 1e-10))
    for solver in (Adaptive(1e-6, 1e-6), SciPy("RK45", 1e-6, 1e-7)):
        torch.testing.assert_close(solve(flow, x, [t, s], solver), exact, rtol=0, atol=1e-4)
    fixed = solve(flow, x, torch.linspace(t, s, 81, dtype=F64), RungeKutta())
    torch.testing.assert_close(fixed, exact, rtol=0, atol=1e-4)
    alone = solve(flow, x[3:4], [t, s], Adaptive(1e-6, 1e-6))
    torch.testing.assert_close(alone, solve(flow, x, [t, s], Adaptive(1e-6, 1e-6))[3:4])


def test_adaptive_steps_of_an_sde_follow_the_path() -> None:
    score, path = blob(CLD), BrownianPath(3)
    x, process = states(score, 4, 0.6), CLD.reverse(score)
    fine = solve(process, x, torch.linspace(0.6, 0.2, 513, dtype=F64), Heun(), path)
    errors = [
        float((solve(process, x, [0.6, 0.2], Adaptive(tol, tol), path) - fine).abs().max())
        for tol in (3e-2, 3e-3)
    ]
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 0.04


def test_the_forward_process_has_its_kernel() -> None:
    """Run forward from one point by Heun: the exact affine recursion gives Phi and Sigma."""
    for sde in (CLD, PLANE, Turning()):
        n, k = 200, sde.size
        times = torch.linspace(0, 0.4 * sde.T, n + 1, dtype=F64)
        x = torch.zeros(1 + k + n * k, k, 1, dtype=F64)
        x[1 : k + 1] = torch.eye(k, dtype=F64)[..., None]
        y = solve(sde, x, times, Heun(), Unit(k + 1))[..., 0]
        end = float(times[-1])
        torch.testing.assert_close(y[1 : k + 1].T, sde.transition(end), rtol=0, atol=2e-3)
        v = y[k + 1 :].T @ y[k + 1 :]
        torch.testing.assert_close(v, sde.spread(end), rtol=0, atol=2e-3)


def test_what_a_matrix_process_is_not() -> None:
    score, x = blob(CLD), torch.zeros(3, 2, 2, dtype=F64)
    for solver in (Exponential(2), Churn(), PredictorCorrector()):
        with pytest.raises(TypeError, match="Propagator"):
            solve(CLD.reverse(score), x, [0.5, 0.2], solver)
    with pytest.raises(TypeError, match="MatrixSDE"):
        solve(VP().reverse(blob(VP())), x[:, 0], [0.5, 0.2], Propagator())
    with pytest.raises(ValueError, match="start at t = 0"):
        solve(CLD.probability_flow(score), x, [0.0, 0.2], Propagator())
    for order, reference in ((0, 1.0), (5, 1.0), (2, 0.0), (2, math.inf)):
        with pytest.raises(ValueError, match="must be"):
            Propagator(order, reference)

    class Half(Turning):
        driven = slice(1, None)

    with pytest.raises(TypeError, match="noise enters 1"):
        solve(Half().reverse(lambda x, t: -x), x[:, 0], [0.5, 0.2], Propagator())
    with pytest.raises(TypeError, match="driven"):
        Half().tweedie(x[:, 0], 0.5, -x[:, 0])


def test_a_simulated_kernel_refuses_matrix_noise() -> None:
    class Own(SDE):
        T = 1.0

        def drift(self, x: Tensor, t: Time) -> Tensor:
            return -(x**3)

        def diffusion(self, t: Time) -> Tensor:
            return PLANE.diffusion(t)

    with pytest.raises(TypeError, match="MatrixSDE"):
        Own().perturb(torch.zeros(2, 2), 0.5)
    y = solve(Own(), torch.zeros(2, 2, dtype=F64), [0.0, 0.5, 1.0], EulerMaruyama(), 0)
    assert bool(y.any())


# Sampling, likelihood, training.


def energy(x: Tensor, score: Score, n: int, seed: int) -> tuple[float, float]:
    """Energy distance of x to fresh data, and of other fresh data to these."""
    assert isinstance(score, GaussianMixture | CorrelatedMixture)
    a, b = (score.sample(n, torch.Generator().manual_seed(s)) for s in (seed, seed + 1))
    return energy_distance(x.double(), a.double()), energy_distance(b.double(), a.double())


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("sde", [CLD, HEAVY, PLANE], ids=name)
def test_sample_draws_the_data(sde: MatrixSDE, eta: float) -> None:
    x = sample(blob(sde), 2000, 30, seed=1, eta=eta)
    assert x.shape == (2000, 2)
    found, _ = energy(x, blob(sde), 2000, 5)
    # Sets of 2000 draws of one law are that far apart: 0.0001 with a deviation of 0.001.
    floors = torch.tensor([energy(x, blob(sde), 2000, 7 + 2 * k)[1] for k in range(8)])
    assert found < float(floors.mean() + 4 * floors.std())
    few = sample(blob(sde), 5, 30, seed=1, eta=eta)
    torch.testing.assert_close(few, x[:5], rtol=1e-4, atol=1e-5)


def test_sample_takes_any_solver_and_grid() -> None:
    exact = sample(blob(CLD), 20, seed=1, solver=SciPy("RK45", 1e-8, 1e-8), dtype=F64)
    for solver, steps in (
        (RungeKutta(), 200),
        (Adaptive(1e-5, 1e-5), 1),
        (Propagator(3, 0.4), 200),
    ):
        times = grids.default(CLD, steps, data_std=blob(CLD).facts.std)
        y = sample(blob(CLD), 20, seed=1, solver=solver, times=times, dtype=F64)
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-3)
    for make in (grids.uniform, grids.log_snr, grids.karras, grids.quadratic, grids.default):
        times = make(CLD, 12)
        assert len(times) == 13
        assert bool((times.diff() < 0).all())
        assert float(CLD.log_snr(times[-1])) == pytest.approx(-2 * math.log(0.005))


@pytest.mark.parametrize("sde", [CLD, PLANE], ids=name)
def test_log_likelihood_is_exact(sde: MatrixSDE) -> None:
    score = blob(sde)
    x = score.sample(8, torch.Generator().manual_seed(0))
    state, drawn = sde.begin(x, torch.Generator().manual_seed(1))
    assert state.shape == (8, *sde.state_shape((2,)))
    exact = score.log_prob(state, 0.0)
    torch.testing.assert_close(
        log_prob(score, state, solver=SciPy("DOP853", 1e-6, 1e-6)).value, exact, rtol=0, atol=1e-4
    )
    # With the exact score the bound for the data is their log density, whatever was drawn.
    data = joint(blob(sde), 0.0).log_prob(x) if sde is PLANE else blob(VP()).log_prob(x, 0.0)
    torch.testing.assert_close(exact - drawn, data, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sde", [CLD, PLANE], ids=name)
def test_a_flow_that_starts_late_counts_the_volume(sde: MatrixSDE) -> None:
    """From t > 0 the density is that of the point that the mean has moved to, times its volume."""
    score, t = blob(sde), 0.1 * sde.T
    x = states(score, 5, 0.01)
    phi = sde.transition(t)
    volume = x[0].numel() / sde.size * float(torch.linalg.det(phi).log())
    assert abs(volume) > 0.1
    times = torch.tensor([t, sde.T], dtype=F64)
    found = log_prob(score, x, times=times, solver=SciPy("DOP853", 1e-6, 1e-6)).value
    torch.testing.assert_close(found, score.log_prob(act(phi, x), t) + volume, rtol=0, atol=1e-4)


def test_bits_of_quantised_data_count_the_velocity_out() -> None:
    """Cells of 2^-20 are so small that it does not matter where in them the noise lies."""
    score = CorrelatedMixture(CLD, torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2))
    n_levels = 1 << 20
    levels = torch.tensor([[10, 200], [128, 90]]) << 12
    tight = SciPy("RK45", 1e-7, 1e-7)
    bits = bits_per_dim(score, levels, n_levels, probes=None, seed=3, solver=tight).value
    density = Gaussian(VP(), torch.zeros(2), math.sqrt(0.3)).log_prob(levels * (2 / n_levels) - 1)
    exact = -density / (2 * math.log(2)) + math.log2(n_levels / 2)
    torch.testing.assert_close(bits.double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sde", [CLD, HEAVY, PLANE], ids=name)
def test_the_loss_is_least_at_the_exact_score(sde: MatrixSDE) -> None:
    """Its value there is 1 - (V^-1)_vv / (Sigma^-1)_vv, for Gaussian data."""
    n, t = 40_000, 0.3 * sde.T
    score = CorrelatedMixture(sde, torch.ones(1), torch.zeros(1, 2), 0.4 * torch.eye(2))
    x = score.sample(n, torch.Generator().manual_seed(0))

    def loss(s: Score) -> Tensor:
        return dsm_loss(s, sde, x, torch.tensor(t), noise=torch.Generator().manual_seed(1))

    best = loss(score)
    alpha, v = sde.alpha(t), sde.covariance(t)
    whole = 0.4 * alpha @ alpha.T + v
    low = sde.sigma(t)
    # E |L^T s + z|^2 = E |z|^2 - E |L^T s|^2 in the components that noise enters.
    left = (low.T @ torch.linalg.inv(whole) @ low).diagonal()[sde.driven]
    exact = float((1 - left).mean())
    assert abs(float(best.mean()) - exact) < 4 * float(best.std()) / math.sqrt(n)

    class Off(Score):
        def __init__(self, gain: float, still: float) -> None:
            self.gain, self.still = gain, still

        def __call__(self, x: Tensor, t: Time) -> Tensor:
            s = score(x, t) * self.gain
            if sde.added:
                s[:, 0] += self.still
            return s

    for gain in (0.9, 1.1):
        worse = loss(Off(gain, 0.0)) - best
        assert float(worse.mean()) > 4 * float(worse.std()) / math.sqrt(n)
    # What is not read does not count.
    torch.testing.assert_close(loss(Off(1.0, 7.0)), best)


@pytest.mark.parametrize("sde", [CLD, HEAVY, PLANE], ids=name)
def test_karras_weight_makes_the_gaussian_loss_1(sde: MatrixSDE) -> None:
    t = sde.T * torch.tensor([1e-3, 0.05, 0.3, 1.0], dtype=F64)
    if not sde.added:
        assert torch.equal(sde.visibility(t), torch.ones(4, dtype=F64))
        return
    alpha, v = sde.alpha(t), sde.covariance(t)
    whole = 0.49 * alpha @ alpha.mT + v
    share = torch.linalg.inv(whole)[:, 1, 1] / torch.linalg.inv(v)[:, 1, 1]
    weight = KarrasWeight(0.7)(sde, t)
    torch.testing.assert_close(weight * (1 - share), torch.ones(4, dtype=F64), rtol=1e-7, atol=0)


def test_a_network_s_score_is_the_lifted_score_of_the_scalar_network() -> None:
    torch.manual_seed(0)
    net = MLP((2,), width=16, depth=1).double()
    with torch.no_grad():
        net.output.weight.normal_()
    x = states(blob(CLD), 6, 0.3)
    for t in (1e-3, 0.2, torch.tensor([0.1, 0.2, 0.3, 0.5, 0.9, 1.0], dtype=F64)):
        for prediction in ("noise", "data", "velocity", "flow", "preconditioned"):
            own = ScoreNetwork(net, CLD, prediction, facts=Facts(std=0.7))
            lifted = Lifted(ScoreNetwork(net, EDM(400.0), prediction, facts=Facts(std=0.7)), CLD)
            torch.testing.assert_close(own(x, t), lifted(x, t), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        own(x[:, 0], 0.3)
    with pytest.raises(ValueError, match="singular"):
        own(x, 0.0)
    with pytest.raises(TypeError, match="components of the data"):
        ScoreNetwork(net, PLANE)


def test_guidance_serves_a_process_with_velocities() -> None:
    torch.manual_seed(0)
    net = MLP((2,), width=16, depth=1, classes=3)
    with torch.no_grad():
        net.output.weight.normal_()
    model = ScoreNetwork(net, CLD)
    x = states(blob(CLD), 6, 0.3).float()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    free, given = model(x, 0.3, y=torch.full((6,), -1)), model(x, 0.3, y=y)
    torch.testing.assert_close(
        ClassifierFree(model, 0.5, y=y)(x, 0.3), given + 0.5 * (given - free)
    )
    logits = MLP((2,), width=16, depth=1, outputs=3)
    with torch.no_grad():
        logits.output.weight.normal_()
    term = Classifier(logits, y, CLD)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term.log_prob(z, 0.3).sum(), z)
    torch.testing.assert_close(term(x, 0.3), gradient)
    losses = classifier_loss(logits, CLD, x[:, 0], y, torch.full((6,), 0.4))
    assert losses.shape == (6,)


def test_a_model_on_disk_comes_back_with_its_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), width=8, depth=1), HEAVY, facts=Facts(std=0.6))
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.sde == HEAVY
    x = states(blob(HEAVY), 3, 0.3).float()
    torch.testing.assert_close(again(x, 0.4), model.eval()(x, 0.4))


@pytest.mark.slow
def test_a_network_learns_a_law_through_its_velocity() -> None:
    """Trained by the loss on (x, v), judged by the energy distance of its samples."""
    law = mixture(VE())
    data = law.sample(20_000, torch.Generator().manual_seed(0)).float()
    torch.manual_seed(0)
    model = ScoreNetwork(MLP((2,), width=64, depth=2), CLD, facts=Facts(std=float(data.std())))
    model = train(model, data, recipe=Recipe(steps=500, lr=4e-3), progress=False)
    for eta in (0.0, 1.0):
        x = sample(model, 2000, 25, seed=1, eta=eta)
        found, floor = energy(x, law, 2000, 7)
        normal = data.std() * torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
        far, _ = energy(normal, law, 2000, 7)
        assert found < max(0.15 * far, 5 * floor)


@pytest.mark.parametrize(("eta", "order"), [(0.0, 3), (0.5, 2), (1.0, 2)])
def test_the_default_solver_is_of_order_three_on_the_flow_and_two_with_noise(
    eta: float, order: int
) -> None:
    solver = default_solver(blob(CLD), eta)
    assert isinstance(solver, Propagator)
    assert solver.order == order
