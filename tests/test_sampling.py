"""Running a solver: dtype, rank, batch, seeds, gradients, trajectories, and the one call."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from problems import F64, correlated, gaussian, gaussian_flow, grid25, mixture, ring, start
from torch import Tensor

from sde_gen import (
    EDM,
    SRA,
    VE,
    VP,
    BrownianPath,
    Churn,
    Empirical,
    EulerMaruyama,
    Exponential,
    Facts,
    Gaussian,
    GaussianMixture,
    Heun,
    Impulses,
    LinearSDE,
    Noise,
    OrnsteinUhlenbeck,
    PredictorCorrector,
    Reverse,
    RungeKutta,
    SciPy,
    Score,
    Solver,
    Streams,
    SubVP,
    TorchSDE,
    default_solver,
    grids,
    sample,
    solve,
)
from sde_gen.moments import isotropic
from sde_gen.ops import Time, as_time
from sde_gen.schedules import Cosine, Linear, Tabulated
from sde_gen.solvers import Leap, Spectral

STOCHASTIC: list[Solver] = [
    EulerMaruyama(),
    Heun(),
    Exponential(1),
    Exponential(3),
    Exponential(2, reference=0.5),
    TorchSDE("euler"),
    TorchSDE("midpoint"),
    TorchSDE("srk", 2),
]
DETERMINISTIC: list[Solver] = [RungeKutta(), SciPy("RK45")]
EVERY = [(s, 1.0) for s in STOCHASTIC] + [(s, 0.0) for s in [*STOCHASTIC, *DETERMINISTIC]]


def label(value: object) -> str:
    if isinstance(value, Solver):
        return f"{type(value).__name__}-{getattr(value, 'method', value.order)}"
    return getattr(value, "__name__", str(value))


every_solver = pytest.mark.parametrize(("solver", "eta"), EVERY, ids=label)


def setting(eta: float) -> tuple[Reverse, Tensor, Tensor]:
    sde = VP()
    score = mixture(sde)
    x = start(score, 7, 1.0)
    return sde.reverse(score, eta), x, grids.quadratic(sde, 12, end=0.01)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_keeps_its_dtype(solver: Solver, eta: float, dtype: torch.dtype) -> None:
    process, x, times = setting(eta)
    exact = solve(process, x, times, solver, 1)
    y = solve(process, x.to(dtype), times, solver, 1)
    assert exact.dtype == F64
    assert y.dtype == dtype
    # Rounding of a step is eps times the state; the flow of this mixture stretches it.
    assert float((y.double() - exact).abs().median()) < 50 * torch.finfo(dtype).eps


@every_solver
@pytest.mark.filterwarnings("ignore:the steps are too long")
def test_rank_does_not_matter(solver: Solver, eta: float) -> None:
    """(B, 12) and (B, 3, 2, 2) are the same problem."""
    sde = VP()
    means = torch.randn(3, 12, dtype=F64, generator=torch.Generator().manual_seed(0))
    flat = GaussianMixture(sde, torch.ones(3), means, 0.4)
    image = GaussianMixture(sde, torch.ones(3), means.reshape(3, 3, 2, 2), 0.4)
    x, times = torch.randn(4, 12, dtype=F64), grids.quadratic(sde, 8)
    y = solve(sde.reverse(flat, eta), x, times, solver, 2)
    z = solve(sde.reverse(image, eta), x.reshape(4, 3, 2, 2), times, solver, 2)
    assert z.shape == (4, 3, 2, 2)
    torch.testing.assert_close(z.flatten(1), y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("solver", "eta", "kind"),
    [
        *((solver, eta, Streams) for solver, eta in EVERY if not isinstance(solver, SciPy)),
        (EulerMaruyama(), 1.0, BrownianPath),
        (TorchSDE("heun", 2), 1.0, BrownianPath),
    ],
    ids=label,
)
def test_a_sample_does_not_depend_on_its_batch(
    solver: Solver, eta: float, kind: type[Streams | BrownianPath]
) -> None:
    process, x, times = setting(eta)
    whole = solve(process, x, times, solver, kind(3))
    # In chunks of any size, alone under its number, and among others in another order.
    for chunk in (1, 3, 7, 100):
        parts = solve(process, x, times, solver, kind(3), chunk=chunk)
        torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)
    alone = solve(process, x[4:5], times, solver, kind(3, samples=4))
    torch.testing.assert_close(alone, whole[4:5], rtol=1e-11, atol=1e-11)
    order = torch.tensor([6, 2, 2, 0])
    mixed = solve(process, x[order], times, solver, kind(3, samples=order))
    torch.testing.assert_close(mixed, whole[order], rtol=1e-11, atol=1e-11)


def test_neighbours_do_not_change_a_sample() -> None:
    """Not even one that is a thousand times larger (one step size a batch would)."""
    process, x, times = setting(1.0)
    wild = x.clone()
    wild[1:] *= 1000
    for solver in STOCHASTIC:
        calm = solve(process, x, times, solver, 0)[0]
        torch.testing.assert_close(
            solve(process, wild, times, solver, 0)[0], calm, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("trajectory", [False, True])
def test_chunks_of_a_trajectory(trajectory: bool) -> None:
    process, x, times = setting(1.0)
    whole = solve(process, x, times, Exponential(2), 5, trajectory=trajectory)
    parts = solve(process, x, times, Exponential(2), 5, trajectory=trajectory, chunk=2)
    assert parts.shape == whole.shape == ((13, 7, 2) if trajectory else (7, 2))
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)


@every_solver
def test_a_trajectory_is_every_state(solver: Solver, eta: float) -> None:
    process, x, times = setting(eta)
    path = solve(process, x, times, solver, 4, trajectory=True)
    assert path.shape == (len(times), *x.shape)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], solve(process, x, times, solver, 4))
    # Multistep solvers remember the same past either way.
    half = solve(process, x, times[:7], solver, 4)
    assert torch.equal(path[6], half)


@every_solver
def test_seeds(solver: Solver, eta: float) -> None:
    process, x, times = setting(eta)
    before = torch.get_rng_state()
    one, two, other = (solve(process, x, times, solver, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert torch.equal(one, solve(process, x, times, solver, Streams(1)))
    assert torch.equal(one, other) == (eta == 0)


def test_no_seed_draws_one_from_torch() -> None:
    process, x, times = setting(1.0)
    torch.manual_seed(5)
    one = solve(process, x, times, EulerMaruyama())
    other = solve(process, x, times, EulerMaruyama())
    torch.manual_seed(5)
    again = solve(process, x, times, EulerMaruyama())
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("solver", "eta"), [case for case in EVERY if not isinstance(case[0], SciPy)], ids=label
)
def test_gradients_flow_if_x_requires_them(solver: Solver, eta: float) -> None:
    sde = VP()
    score = gaussian(sde)
    process, times = sde.reverse(score, eta), grids.quadratic(sde, 6, end=0.05)
    x = start(score, 3, 1.0)
    net_weight = torch.ones((), dtype=F64, requires_grad=True)
    learned = sde.reverse(lambda x, t: net_weight * score(x, t), eta)
    assert not solve(learned, x, times, solver, 0).requires_grad
    y = solve(process, x.requires_grad_(), times, solver, 0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    # Gaussian data: the solver is affine, so a difference quotient is its derivative.
    with torch.no_grad():
        rise = solve(process, x + 1, times, solver, 0) - solve(process, x - 1, times, solver, 0)
        assert not solve(process, x, times, solver, 0).requires_grad
    torch.testing.assert_close(gradient, rise / 2, rtol=1e-9, atol=1e-9)


def test_forward_simulation_and_encoding() -> None:
    """Rising time: the forward SDE has its own law at the end, and the flow encodes."""
    sde, n = OrnsteinUhlenbeck(), 20_000
    x = torch.full((n, 1), 2.0, dtype=F64)
    y = solve(sde, x, torch.linspace(0, 1, 51, dtype=F64), Heun(), 1)
    # Heun's bias at h = 1 / 50 is O(h^2) = 4e-4 of the value.
    spread = float(sde.sigma(1.0))
    assert abs(float(y.mean()) - 2 * math.exp(-1)) < 4 * spread / math.sqrt(n) + 1e-3
    assert float(y.std()) == pytest.approx(spread, rel=4 * math.sqrt(0.5 / n) + 1e-3)
    score = correlated(sde)
    data = score.sample(5, torch.Generator().manual_seed(0))
    up = torch.linspace(0, 5, 201, dtype=F64)
    flow = sde.probability_flow(score)
    code = solve(flow, data, up, RungeKutta())
    torch.testing.assert_close(gaussian_flow(score, code, 5.0, 0.0), data, rtol=0, atol=1e-5)
    back = solve(flow, code, up.flip(0), RungeKutta())
    torch.testing.assert_close(back, data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [list, tuple, torch.tensor])
def test_a_grid_may_be_any_sequence(source: type) -> None:
    x = torch.ones(2, 1, dtype=F64)
    y = solve(OrnsteinUhlenbeck(), x, source([0.0, 0.5, 1.0]), EulerMaruyama(), 0)
    single = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(y, solve(OrnsteinUhlenbeck(), x, single, EulerMaruyama(), 0))


@pytest.mark.parametrize(("solver", "eta"), [*EVERY, (SRA(), 1.0), (SRA(), 0.0)], ids=label)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_named_at_once(
    solver: Solver, eta: float, value: float
) -> None:
    """Never as a step that is too large, and without another step."""
    process, x, times = setting(eta)
    seen = list[float]()

    def broken(x: Tensor, t: Time) -> Tensor:
        seen.append(float(as_time(t)))
        # Between two times of the grid, so that some solvers see it in the middle of a step.
        return process.score(x, as_time(t)) if seen[-1] > 0.4 else torch.full_like(x, value)

    with pytest.raises(FloatingPointError, match=r"the score is not finite at t = 0\."):
        solve(process.sde.reverse(broken, eta), x, times, solver, 1)
    # The step is made to its end, and once more until what is broken is found.
    broken_calls = len([t for t in seen if t <= 0.4])
    assert broken_calls <= (1 if solver.own_steps else solver.calls + 1)


@pytest.mark.parametrize("solver", [Heun(), RungeKutta(), TorchSDE("heun")], ids=label)
def test_a_score_that_is_nan_at_zero_is_named_there(solver: Solver) -> None:
    flow = VP().probability_flow(lambda x, t: -x / t * t)
    with pytest.raises(FloatingPointError, match="the score is not finite at t = 0, first in row"):
        solve(flow, torch.ones(3, 2), [1.0, 0.5, 0.0], solver)

    # A forward process has no score.
    class Steep(OrnsteinUhlenbeck):
        def drift(self, x: Tensor, t: Time) -> Tensor:
            return x / (as_time(t) - 0.5).float()

    with pytest.raises(FloatingPointError, match=r"the drift is not finite at t = 0\.5"):
        solve(Steep(), torch.ones(3, 2), [0.0, 0.5, 1.0], Heun(), 0)


def test_steps_that_are_too_large_are_named_so() -> None:
    """A state that grows beyond bounds, or a score that does because the state has grown."""
    for score, message in (
        (
            lambda x, t: -1.7e307 + 0 * x,
            r"Euler.* found NaN or infinite .* from 0\.\d+ .* too large",
        ),
        (lambda x, t: -1e100 * x, r"score is not finite at t = 0\.\d+, .* at most \d.*e\+\d\d\d"),
    ):
        with pytest.raises(FloatingPointError, match=message):
            solve(
                VP().probability_flow(score),
                torch.ones(3, 2, dtype=F64),
                torch.linspace(1, 0.1, 9),
                EulerMaruyama(),
            )


def test_the_progress_bar_shows_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    process, x, times = setting(1.0)
    plain = solve(process, x, times, EulerMaruyama(), 0)
    assert capsys.readouterr().err == ""
    assert torch.equal(solve(process, x, times, EulerMaruyama(), 0, progress=True), plain)
    shown = capsys.readouterr().err
    assert "sampling" in shown
    assert re.search(r"\d+/12", shown)


class InSeconds(Streams):
    """The draws of a process whose second is this long."""

    def __init__(self, second: float) -> None:
        super().__init__(1)
        self.second = second

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        return super().__call__(x, t / self.second, s / self.second, k)


UNITS = [*EVERY, (SRA(), 1.0), (Churn(), 1.0), (PredictorCorrector(reference=0.4), 1.0)]


@pytest.mark.parametrize(("solver", "eta"), UNITS, ids=label)
@pytest.mark.parametrize("second", [2.0**-20, 2.0**20])
def test_the_unit_of_time_is_free(solver: Solver, eta: float, second: float) -> None:
    """VP that ends at T = 1e-6 (a power of two, so that no time is rounded), the same draws."""
    plain, sde = VP(), VP(Linear(0.1 / second, 20 / second, T=second))
    x = start(mixture(plain), 7, 1.0)
    times = grids.default(plain, 12, end=0.01)
    torch.testing.assert_close(grids.default(sde, 12, end=0.01 * second), times * second)
    y = solve(plain.reverse(mixture(plain), eta), x, times, solver, InSeconds(1.0))
    z = solve(sde.reverse(mixture(sde), eta), x, times * second, solver, InSeconds(second))
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("second", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("solver", [EulerMaruyama(), TorchSDE("heun")], ids=label)
def test_a_brownian_path_has_no_unit_of_time(solver: Solver, second: float) -> None:
    """The reversal of N(0, 1/4), 40 steps of which are right to some percent."""
    sde, n = VP(Linear(0.1 / second, 20 / second, T=second)), 4000
    score = Gaussian(sde, torch.zeros(1, dtype=F64), 0.5)
    times = second * torch.linspace(1, 0.002, 41, dtype=F64).square()
    x = float(sde.sigma(second)) * torch.randn(n, 1, dtype=F64)
    y = solve(sde.reverse(score), x, times, solver, BrownianPath(3))
    # The spread of a standard deviation of n is sqrt(1 / 2n) of it.
    assert float(y.std()) == pytest.approx(0.5, rel=4 * math.sqrt(0.5 / n) + 0.05)


# The one call.


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("sde", [VP(), VP(Cosine()), SubVP(), VE(), EDM()], ids=repr)
@pytest.mark.parametrize("make", [mixture, ring, grid25], ids=lambda f: f.__name__)
def test_sample_draws_the_data(sde: LinearSDE, eta: float, make: type) -> None:
    """By default, with no choice made: mean and covariance of the data, to sampling error.

    Both are known in closed form; the spread of a sample covariance is that of the products
    (x_i - m_i) (x_j - m_j), from 200,000 exact draws.
    """
    score, n = make(sde), 4000
    x = sample(score, n, steps=50, seed=1, eta=eta)
    assert x.shape == (n, *score.shape)
    assert x.dtype == torch.float32
    pi = score.log_weights.exp()
    mean = pi @ score.means
    away = score.means - mean
    within = score.variance.expand_as(score.means)
    covariance = (pi[:, None] * away).T @ away + torch.diag(pi @ within)
    exact = score.sample(200_000, torch.Generator().manual_seed(0)).double()
    y, e = x.double() - mean, exact - mean
    # 30 settings of 2 means and 3 moments: 4.5 deviations are exceeded once in a thousand runs.
    most = 4.5 / math.sqrt(n)
    assert bool((y.mean(0).abs() < most * covariance.diagonal().sqrt()).all())
    spread = (e[:, :, None] * e[:, None, :]).std(0)
    assert bool(((y.T @ y / n - covariance).abs() < most * spread).all())
    # And no sample far from all components.
    log_p = score.log_prob(x.double())
    typical = score.log_prob(exact).quantile(0.0005)
    assert float((log_p < typical - 3).double().mean()) < 0.01


def test_sample_i_is_a_function_of_the_seed_and_i() -> None:
    score = mixture(VP())
    whole = sample(score, 9, seed=3, eta=1.0)
    before = torch.get_rng_state()
    torch.testing.assert_close(sample(score, 4, seed=3, eta=1.0), whole[:4], rtol=0, atol=1e-5)
    chunked = sample(score, 9, seed=3, eta=1.0, chunk=2)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(sample(score, 9, seed=4, eta=1.0), whole)
    assert torch.equal(torch.get_rng_state(), before)
    precise = sample(score, 9, seed=3, eta=0.0, dtype=F64)
    single = sample(score, 9, seed=3, eta=0.0)
    assert precise.dtype == F64
    torch.testing.assert_close(single.double(), precise, rtol=0, atol=1e-3)
    torch.manual_seed(1)
    one = sample(score, 3)
    assert not torch.equal(sample(score, 3), one)
    torch.manual_seed(1)
    assert torch.equal(sample(score, 3), one)


def test_sample_makes_as_many_calls_as_steps() -> None:
    calls: list[float] = []

    class Counting(Score):
        def __init__(self) -> None:
            self.inner = mixture(VP())
            self.sde, self.facts = self.inner.sde, self.inner.facts

        def __call__(self, x: Tensor, t: Time) -> Tensor:
            calls.append(float(as_time(t)))
            return self.inner(x, t)

    for solver, steps in ((None, 10), (Exponential(1), 10), (EulerMaruyama(), 10)):
        calls.clear()
        sample(Counting(), 2, steps=steps, seed=0, solver=solver)
        assert len(calls) == steps
        assert calls[0] == 1.0 or (solver is None and calls[0] < 1.0)
        assert min(calls) > 0
    calls.clear()
    sample(Counting(), 2, seed=0, times=torch.tensor([0.9, 0.5, 0.1]), solver=Heun())
    assert calls == pytest.approx([0.9, 0.5, 0.5, 0.1])
    assert not sample(Counting(), 2, seed=0).requires_grad


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("known", [False, True], ids=["a number", "moments"])
def test_sample_is_the_solver_and_the_grid_that_its_docstring_says(
    known: bool, eta: float
) -> None:
    """Written out: default grid, start, order, reference, corrector, weights."""
    sde = VP()
    score = correlated(sde)
    moments = score.facts.moments
    assert moments is not None
    kept = moments if known else None
    score = score.with_facts(replace(score.facts, moments=kept, std=0.7))
    reference = moments if known else isotropic(0.49)
    weights = Spectral(moments.variance if known else 0.49, 2) if eta == 0 else None
    kind, order = (Exponential, 2) if eta else (Leap, 4)
    solver = kind(order, reference, corrector=True, weights=weights)
    times = grids.default(sde, 9, data_std=0.7, to_zero=True)
    z = Streams(5).start(torch.empty(6, 2, dtype=F64))
    alpha, sigma = float(sde.alpha(1.0)), float(sde.sigma(1.0))
    x = sigma * z
    if known:
        root = torch.linalg.eigh(
            alpha**2 * torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
            + sigma**2 * torch.eye(2, dtype=F64)
        )
        x = z @ (root.eigenvectors * root.eigenvalues.sqrt()) @ root.eigenvectors.T
        x = x + alpha * torch.tensor([0.4, -0.7], dtype=F64)
    expected = solve(sde.reverse(score, eta), x, times, solver, Streams(5))
    found = sample(score, 6, 9, seed=5, eta=eta, dtype=F64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_sample_from_what_has_no_density() -> None:
    """A finite data set: the last step to t = 0 lands on the points, but for noise that it keeps.

    From a ratio w^(1/2) = 0.005 of noise to signal the Gaussian end at eta = 1 gives D plus noise
    of variance C w / (C + w) < w; of 360 samples in the plane one lies farther than r with
    probability 360 exp(-r^2 / (2 w)).
    """
    far = 0.005 * math.sqrt(2 * math.log(360 / 1e-6))
    data = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    for sde in (VP(), EDM(), VP(Tabulated(torch.linspace(1e-4, 0.02, 1000)))):
        for eta in (0.0, 1.0):
            x = sample(Empirical(sde, data), 60, steps=60, seed=0, eta=eta)
            nearest = torch.cdist(x, data).min(1)
            assert float(nearest.values.max()) < far
            assert len(nearest.indices.unique()) == 6
    point = torch.tensor([0.7, -0.2])
    for eta in (0.0, 1.0):
        x = sample(Gaussian(VP(), point, 0.0), 3, steps=5, seed=0, eta=eta)
        torch.testing.assert_close(x, point.expand(3, 2), rtol=0, atol=1e-6)


def test_sample_of_labels() -> None:
    """Bound labels reach the score, in chunks too."""

    class Labelled(Score):
        def __init__(self) -> None:
            self.sde, self.facts = EDM(), Facts((1,))

        def __call__(self, x: Tensor, t: Time, y: Tensor | None = None) -> Tensor:
            assert y is not None
            # One point for each label.
            return (y.unsqueeze(1).to(x) - x) / float(t) ** 2

    y = torch.arange(5.0)
    for chunk in (None, 2):
        model = Labelled().given(y=y)
        x = sample(model, 5, steps=5, seed=0, solver=Exponential(2), chunk=chunk)
        torch.testing.assert_close(x.flatten(), y, rtol=0, atol=1e-4)


def test_a_noise_of_ones_own() -> None:
    """Anything with the three methods drives a solver."""

    class Zero(Noise):
        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            return torch.zeros_like(x)

        def start(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

        def rows(self, index: slice | Tensor) -> Zero:
            return self

    process, x, times = setting(1.0)
    one = solve(process, x, times, EulerMaruyama(), Zero())
    assert torch.equal(solve(process, x, times, EulerMaruyama(), Zero(), chunk=2), one)


@pytest.mark.gpu
@pytest.mark.parametrize(("solver", "eta"), EVERY, ids=label)
def test_a_seed_gives_the_same_sample_on_a_gpu(solver: Solver, eta: float) -> None:
    process, x, times = setting(eta)
    assert isinstance(process.sde, LinearSDE)
    here = solve(process, x, times, solver, 1)
    score = mixture(process.sde)
    there = GaussianMixture(
        process.sde,
        score.log_weights.exp().cuda(),
        score.means.cuda(),
        score.variance.sqrt().cuda(),
    )
    y = solve(process.sde.reverse(there, eta), x.cuda(), times, solver, 1)
    assert y.device.type == "cuda"
    # The normals are made in float32 from the same bits; sine and cosine may differ in the last.
    torch.testing.assert_close(y.cpu(), here, rtol=1e-4, atol=1e-5)
    assert sample(there, 3, seed=0).device.type == "cuda"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_default_knows_more_than_the_published_first_order(eta: float) -> None:
    """Exact variances by unit impulses: anisotropic data, of which only one number is told."""
    sde = VP()
    std = torch.tensor([0.3, 0.6], dtype=F64)
    score = Gaussian(sde, torch.zeros(2, dtype=F64), std)
    score = score.with_facts(Facts((*score.shape,), float(std.square().mean().sqrt())))
    times = grids.default(sde, 12, data_std=score.facts.std)

    def spread(t: torch.Tensor) -> Tensor:
        return (sde.alpha(t) * std) ** 2 + sde.sigma(t) ** 2

    wrong = []
    for solver in (default_solver(score, eta), Exponential(1)):
        x = torch.zeros(13, 2, dtype=F64)
        x[-1] = spread(times[0]).sqrt()
        y = solve(sde.reverse(score, eta), x, times, solver, Impulses())
        wrong.append(float((y.square().sum(0) / spread(times[-1]) - 1).abs().max()))
    assert wrong[0] < 0.2 * wrong[1], wrong
