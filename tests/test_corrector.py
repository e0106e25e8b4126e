"""Churn and Langevin corrections: what they do to the law, and at what order."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from laws import law_error
from problems import (
    F64,
    correlated,
    gaussian,
    gaussian_reversal,
    grid25,
    line,
    quantile_flow,
    rms,
    slopes,
    start,
)
from torch import Tensor

from sde_gen import (
    EDM,
    SDE,
    VE,
    VP,
    Churn,
    EulerMaruyama,
    Exponential,
    Gaussian,
    GaussianMixture,
    Heun,
    Impulses,
    Langevin,
    LinearSDE,
    Noise,
    PredictorCorrector,
    Propagator,
    Reverse,
    RungeKutta,
    Solver,
    Streams,
    SubVP,
    grids,
    solve,
)
from sde_gen.ops import Time
from sde_gen.schedules import Geometric
from sde_gen.solvers import Step
from sde_gen.solvers.base import Memory
from sde_gen.tuning import Choice, Tuned


def marginal(score: Gaussian, t: float) -> tuple[Tensor, Tensor]:
    """Mean and variance at time t, in the score's eigenbasis."""
    alpha, sigma = score.sde.alpha(t), score.sde.sigma(t)
    return alpha * score.mean, alpha**2 * score.variance + sigma**2


def law_slopes(
    score: Gaussian,
    solver: Solver,
    eta: float,
    draws: int,
    steps: tuple[int, ...],
    point: float | None = None,
) -> list[float]:
    """Weak orders; ``draws`` a step. From the law of t = 0.6, or from a point there."""
    grid = [grids.uniform(score.sde, n, 0.6, 0.1) for n in steps]
    return slopes(
        [float(law_error(score, solver, t, eta, draws * (len(t) - 1), point).norm()) for t in grid]
    )


# Churn


@pytest.mark.parametrize(
    ("inner", "steps"),
    [
        (EulerMaruyama(), (64, 128, 256)),
        (Heun(), (32, 64, 128)),
        (RungeKutta(4), (16, 32, 64)),
        (RungeKutta(5), (64, 128)),
    ],
    ids=["Euler", "Heun", "RK4", "RK5"],
)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_weak_order_of_churn_is_the_order_of_its_flow(
    inner: Solver, steps: tuple[int, ...], eta: float
) -> None:
    solver = Churn(inner)
    assert solver.order == solver.weak == inner.order
    for slope in law_slopes(gaussian(VP()), solver, eta, 1, steps):
        assert slope == pytest.approx(inner.order, abs=0.2)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("inner", [Heun(), RungeKutta(4)], ids=["Heun", "RK4"])
def test_from_a_point_the_weak_order_of_churn_is_1(inner: Solver, eta: float) -> None:
    """Noising and the flow keep the law of t: of another one they do not make the reversal."""
    for slope in law_slopes(gaussian(VP()), Churn(inner), eta, 1, (64, 128, 256), point=0.7):
        assert slope == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(Geometric(0.02, 8.0)), EDM(8.0)], ids=repr)
def test_churn_with_an_exact_flow_has_the_exact_law(sde: LinearSDE) -> None:
    """Noising is exact on every process, and at the top of the clock it stops."""
    score = correlated(sde)
    times = sde.T * torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=F64)
    solver = Churn(Exponential(1, score.facts.moments))
    n, eta = 3, 1.0
    zero = torch.zeros(n + 1, 2, dtype=F64)
    process = sde.reverse(score, eta)
    base = solve(process, zero, times, solver, Impulses())
    draw = base[:-1] - base[-1]
    gain = solve(process, zero + torch.eye(2, dtype=F64)[0], times, solver, Impulses()) - base
    other = solve(process, zero + torch.eye(2, dtype=F64)[1], times, solver, Impulses()) - base
    assert score.basis is not None
    basis = score.basis
    a = torch.stack([gain[-1], other[-1]], 1)
    _, v_t = marginal(score, float(times[0]))
    _, v_s = marginal(score, float(times[-1]))
    # One number drives each draw, for all coordinates alike: in the eigenbasis the map is
    # diagonal, so the draw's response to the vector of ones is its spread times that vector.
    response = (draw @ basis) / basis.sum(0)
    spread = (torch.diag(basis.T @ a @ basis) ** 2) * v_t + response.square().sum(0)
    torch.testing.assert_close(spread, v_s, rtol=1e-10, atol=0)
    # The first of three steps starts at the top: two draws only.
    assert (draw.abs().amax(1) > 0).tolist() == [True, True, False]


def by_hand(score: Gaussian, x: Tensor, times: Tensor, amount: float, z: list[Tensor]) -> Tensor:
    """Algorithm 2 of Karras et al. 2022, written for sigma(t) = t, with the sigma_max cap."""
    sigma = times.tolist()
    gamma = min(amount / (len(sigma) - 1), math.sqrt(2) - 1)
    for i, (t, s) in enumerate(pairwise(sigma)):
        g = gamma if 0.3 <= t <= 50 else 0.0
        up = t + g * t
        x = x + math.sqrt(up**2 - t**2) * 1.01 * z[i]
        d = -up * score(x, torch.tensor(up, dtype=F64))
        euler = x + (s - up) * d
        d_s = -s * score(euler, torch.tensor(s, dtype=F64))
        x = x + (s - up) * (d + d_s) / 2
    return x


def test_churn_is_the_published_algorithm() -> None:
    sde = EDM(80.0)
    score = gaussian(sde)
    times = grids.karras(sde, 9, 40.0, 0.01)
    x = start(score, 5, 40.0)
    z = [Streams(4)(x, t, s) for t, s in pairwise(times.tolist())]
    solver = Churn(Heun(), amount=2.0, low=0.3, high=50.0, inflate=1.01)
    y = solve(sde.probability_flow(score), x, times, solver, Streams(4))
    torch.testing.assert_close(y, by_hand(score, x, times, 2.0, z), rtol=1e-10, atol=1e-10)


def test_the_amount_of_churn_is_bounded_by_the_steps() -> None:
    """gamma = min(S_churn / N, sqrt(2) - 1), and weak order 2 once N is large."""
    score = gaussian(VP())
    rates = law_slopes(score, Churn(amount=4.0), 0.0, 1, (64, 128, 256))
    for slope in rates:
        assert slope == pytest.approx(2, abs=0.2)
    x, times = start(score, 3, 0.6), grids.uniform(VP(), 4, 0.6, 0.1)
    flow = VP().probability_flow(score)
    most = solve(flow, x, times, Churn(amount=4 * (math.sqrt(2) - 1)), 3)
    assert torch.equal(solve(flow, x, times, Churn(amount=1e9), 3), most)


def test_churn_samples_a_mixture() -> None:
    """The law on the line by Monte Carlo: distribution function against the exact one."""
    sde, t, s, n = VP(), 0.8, 0.05, 8000
    score = line(sde)
    x = start(score, n, t, seed=3)
    y = solve(sde.reverse(score), x, grids.quadratic(sde, 30, t, s), Churn(RungeKutta(4)), 5)
    # Kolmogorov-Smirnov: exceeded once in a thousand times.
    assert ks(score, y, s) < 1.95 / math.sqrt(n)


def ks(score: GaussianMixture, x: Tensor, t: float) -> float:
    alpha, sigma = score.sde.alpha(t), score.sde.sigma(t)
    std = torch.sqrt(alpha**2 * score.variance[:, 0] + sigma**2)
    y = x.flatten().sort().values.unsqueeze(1)
    cdf = torch.special.ndtr((y - alpha * score.means[:, 0]) / std) @ score.log_weights.exp()
    n = len(y)
    above, below = torch.arange(1, n + 1) / n - cdf, cdf - torch.arange(n) / n
    return float(torch.maximum(above, below).max())


def test_what_churn_refuses() -> None:
    sde, score = VP(), gaussian(VP())
    x, falling = torch.zeros(2, 3, dtype=F64), [0.9, 0.1]
    with pytest.raises(TypeError, match="one-step solver"):
        Churn(Exponential(3))
    with pytest.raises(TypeError, match="one-step solver"):
        Churn(Exponential(1, 0.3, corrector=True))
    with pytest.raises(TypeError, match=r"solver must be a Solver, such as Heun\(\), got 'heun'"):
        Churn("heun")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"one-step solver.* got Tuned: the past"):
        Churn(Tuned([Choice(4, Exponential(2))]))
    with pytest.raises(ValueError, match="amount must be"):
        Churn(amount=-1.0)
    with pytest.raises(ValueError, match="high must be a number > 2, got 1"):
        Churn(amount=1.0, low=2.0, high=1.0)
    with pytest.raises(TypeError, match="leave the amount out"):
        solve(sde.reverse(score), x, falling, Churn(amount=1.0))
    with pytest.raises(TypeError, match="reversal of a LinearSDE"):
        solve(Langevin(score), x, [0.1, 0.9], Churn())
    with pytest.raises(ValueError, match="times must fall"):
        solve(sde.probability_flow(score), x, [0.1, 0.9], Churn(amount=1.0))


@pytest.mark.parametrize("eta", [0.5, 1.5])
@pytest.mark.parametrize(
    ("kind", "corrections"), [("churn", 1), ("corrector", 1), ("corrector", 3)]
)
def test_fine_steps_are_the_reversal_of_that_noise_level(
    kind: str, corrections: int, eta: float
) -> None:
    """Not the law at one time alone but what joins two: the gain from x_t to x_s."""
    draws = corrections
    sde, t, s = VP(), 0.6, 0.2
    score = gaussian(sde)
    if kind == "churn":
        solver, process = Churn(RungeKutta(4)), sde.reverse(score, eta)
    else:
        solver = PredictorCorrector(RungeKutta(4), eta, corrections, score.facts.moments)
        process = sde.probability_flow(score)
    exact, *_ = gaussian_reversal(score, t, s, eta)
    errors = []
    for n in (50, 100, 200):
        times = grids.log_snr(sde, n, t, s)
        runs = [
            solve(
                process, torch.full((draws * n + 1, 3), v, dtype=F64), times, solver, Impulses()
            )[-1]
            for v in (0.0, 1.0)
        ]
        errors.append(float((runs[1] - runs[0] - exact).norm()))
    # A splitting of the drift into two parts that do not commute: order 1.
    for slope in slopes(errors):
        assert slope == pytest.approx(1, abs=0.2)


# Langevin corrections


@pytest.mark.parametrize("make", [gaussian, correlated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sde", [VP(), EDM(8.0)], ids=repr)
@pytest.mark.parametrize("corrections", [1, 3])
def test_corrections_keep_the_law_of_gaussian_data_exactly(
    sde: LinearSDE, make: type, corrections: int
) -> None:
    """After an exact predictor one long step has the exact covariance: C may be a matrix."""
    score: Gaussian = make(sde)
    t, s = 0.8 * sde.T, 0.2 * sde.T
    flow = Exponential(1, score.facts.moments)
    solver = PredictorCorrector(flow, 1.0, corrections, score.facts.moments)
    process = sde.probability_flow(score)
    n = score.mean.numel()
    times = torch.tensor([t, s], dtype=F64)
    zero = torch.zeros(corrections + 1, n, dtype=F64)
    base = solve(process, zero, times, solver, Impulses())
    columns = [
        (solve(process, zero + e, times, solver, Impulses()) - base)[-1]
        for e in torch.eye(n, dtype=F64)
    ]
    basis = torch.eye(n, dtype=F64) if score.basis is None else score.basis
    gain = torch.diag(basis.T @ torch.stack(columns, 1) @ basis)
    draw = ((base[:-1] - base[-1]) @ basis) / basis.sum(0)
    _, v_t = marginal(score, t)
    m_s, v_s = marginal(score, s)
    torch.testing.assert_close(gain**2 * v_t + draw.square().sum(0), v_s, rtol=1e-10, atol=0)
    mean = base[-1] + torch.stack(columns, 1) @ marginal(score, t)[0]
    torch.testing.assert_close(mean, m_s, rtol=1e-10, atol=1e-12)
    # They do something: without them nothing is drawn.
    assert float(draw.abs().min()) > 0.05


@pytest.mark.parametrize(
    "nest",
    [
        lambda flow, c: PredictorCorrector(PredictorCorrector(flow, 1.0, 2, c), 1.5, 1, c),
        lambda flow, c: PredictorCorrector(Churn(PredictorCorrector(flow, 1.0, 1, c)), 1.0, 2, c),
    ],
    ids=["corrector in corrector", "corrector in churn in corrector"],
)
def test_nested_corrections_draw_their_own_numbers(nest: Callable[..., Solver]) -> None:
    """The exact law again, by Monte Carlo; a normal that is used twice adds up to twice itself."""
    score, n = gaussian(VP()), 20_000
    solver = nest(Exponential(1, score.facts.moments), score.facts.moments)
    drawn = list[tuple[float, float, int]]()

    class Noting(Streams):
        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            drawn.append((t, s, k))
            return super().__call__(x, t, s, k)

    x = start(score, n, 0.6)
    y = solve(VP().probability_flow(score), x, [0.6, 0.4, 0.2], solver, Noting(3))
    assert len(drawn) == len(set(drawn)) == 6
    _, exact = marginal(score, 0.2)
    assert float((y.var(0) / exact - 1).abs().max()) < 4 * math.sqrt(2 / n)


class Still(Solver):
    """A predictor that leaves the state where it is: the corrector alone."""

    order = 1

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        return x, ()


def correct(score: GaussianMixture, x: Tensor, z: float, eta: float, own: bool) -> Tensor:
    """The corrector alone at t = 0.3: its state from x and one value z of its normal."""

    class Constant(Streams):
        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            return torch.full_like(x, z)

    solver = PredictorCorrector(Still(), eta, reference=None if own else 0.4)
    return solve(score.sde.probability_flow(score), x, [0.4, 0.3], solver, Constant(0))


@pytest.mark.parametrize("own", [False, True], ids=["reference", "each its own"])
def test_one_correction_changes_the_law_of_a_mixture_by_the_square_of_its_length(
    own: bool,
) -> None:
    """Moments after one correction by quadrature over state and normal: no Monte Carlo."""
    sde, t = VP(), 0.3
    score = line(sde)
    x = torch.linspace(-9, 9, 3001, dtype=F64).unsqueeze(1)
    p = torch.exp(score.log_prob(x, t))
    p = p / p.sum()

    def moments(eta: float) -> Tensor:
        # Affine in the normal: y = a + b z, so that E y^k needs the moments of z alone.
        a = correct(score, x, 0.0, eta, own).flatten()
        b = correct(score, x, 1.0, eta, own).flatten() - a
        first = [a, a**2 + b**2, a**3 + 3 * a * b**2, a**4 + 6 * a**2 * b**2 + 3 * b**4]
        return torch.stack([(m * p).sum() for m in first])

    exact = torch.stack([(x.flatten() ** k * p).sum() for k in (1, 2, 3, 4)])
    errors = [float((moments(eta) - exact).norm()) for eta in (0.2, 0.1, 0.05)]
    # The length of a correction is eta^2: its square is four halvings for one of eta.
    for slope in slopes(errors):
        assert slope == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("reference", [0.2, None], ids=["reference", "each its own"])
def test_corrections_sample_a_mixture(reference: float | None) -> None:
    """The law on the line by Monte Carlo, from a start that is wrong by a tenth of a spread.

    One corrected step changes the distribution function by at most (1 - c)^2 / 2 or so; what 60
    of them leave is far below the resolution of 8000 samples.
    """
    sde, t, s, n = VP(), 0.8, 0.05, 8000
    score = line(sde)
    x = start(score, n, t, seed=3)
    solver = PredictorCorrector(Heun(), 0.5, reference=reference)
    flow = sde.probability_flow(score)
    y = solve(flow, x, grids.quadratic(sde, 60, t, s), solver, 5)
    assert ks(score, y, s) < 1.95 / math.sqrt(n)
    assert rms(y - quantile_flow(score, x, t, s)) > 0.05


@pytest.mark.parametrize(
    ("predictor", "eta", "draws", "order"),
    [(Heun(), 0.0, 1, 2), (Heun(), 1.0, 2, 2), (EulerMaruyama(), 0.0, 1, 1)],
    ids=["Heun flow", "Heun SDE", "Euler flow"],
)
def test_with_the_right_covariance_the_weak_order_is_that_of_the_predictor(
    predictor: Solver, eta: float, draws: int, order: int
) -> None:
    score = gaussian(VP())
    solver = PredictorCorrector(predictor, reference=score.facts.moments)
    for slope in law_slopes(score, solver, eta, draws, (64, 128, 256)):
        assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("reference", [0.0, 0.5])
def test_with_another_covariance_the_weak_order_is_1(reference: float) -> None:
    solver = PredictorCorrector(Heun(), reference=reference)
    for slope in law_slopes(gaussian(VP()), solver, 0.0, 1, (64, 128, 256)):
        assert slope == pytest.approx(PredictorCorrector.weak, abs=0.2)


def test_a_step_of_its_own_is_that_of_song_for_one_sample() -> None:
    """1 - c = 2 r^2 in the limit of short steps: epsilon = 2 (r |z| / |s|)^2 with |z|^2 = n."""
    sde, s = EDM(8.0), 0.7
    score = grid25(sde)
    x = start(score, 6, s)
    noise, eta = Streams(2), 1e-3
    solver = PredictorCorrector(Exponential(1), eta)
    times = torch.tensor([0.70001, s], dtype=F64)
    flow = sde.probability_flow(score)
    plain = solve(flow, x, times, Exponential(1))
    y = solve(flow, x, times, solver, noise)
    g = score(plain, torch.tensor(s, dtype=F64))
    v = 2 / g.square().sum(1, keepdim=True)
    r2 = eta**2 * s**2 * math.log(0.70001 / s) / v / 2
    epsilon = 2 * r2 * v
    z = noise(x, 0.70001, s, 8)
    song = epsilon * g + torch.sqrt(2 * epsilon) * z
    torch.testing.assert_close(y - plain, song, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [Churn(), Churn(RungeKutta(4)), PredictorCorrector(), PredictorCorrector(reference=0.3)],
    ids=["churn", "churn RK4", "own", "reference"],
)
def test_a_sample_does_not_depend_on_its_neighbours(solver: Solver) -> None:
    sde = VP()
    score = grid25(sde)
    x = start(score, 9, 1.0)
    process, times = sde.reverse(score), grids.quadratic(sde, 7, end=0.01)
    whole = solve(process, x, times, solver, 3)
    chosen = torch.tensor([8, 0, 5])
    part = solve(process, x[chosen], times, solver, Streams(3).rows(chosen))
    torch.testing.assert_close(part, whole[chosen], rtol=0, atol=1e-12)
    one_more = torch.cat([x, 100 * x[:3]])
    beside = solve(process, one_more, times, solver, 3)[:9]
    torch.testing.assert_close(beside, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        solve(process, x, times, solver, 3, chunk=4), whole, atol=1e-12, rtol=0
    )


class Counting:
    def __init__(self, score: Gaussian) -> None:
        self.score, self.times = score, list[float]()

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.times.append(float(t))
        return self.score(x, t)


@pytest.mark.parametrize(
    ("solver", "calls"),
    [
        (Churn(), 2),
        (Churn(EulerMaruyama()), 1),
        (Churn(RungeKutta(5)), 6),
        (PredictorCorrector(), 3),
        (PredictorCorrector(Exponential(1), corrections=2, reference=0.1), 3),
    ],
)
def test_calls(solver: Solver, calls: int) -> None:
    sde = VP()
    score = Counting(gaussian(sde))
    grid = grids.uniform(sde, 6, 0.9, 0.1)
    solve(sde.reverse(score), torch.zeros(2, 3, dtype=F64), grid, solver, 0)
    assert solver.calls == calls
    assert len(score.times) == 6 * calls
    assert (float(grid[-1]) in score.times) == solver.evaluates_end


def test_a_smooth_score_may_be_followed_to_zero() -> None:
    """There is no noise level at t = 0, so nothing to correct."""
    score = gaussian(VP())
    x = start(score, 4, 0.5)
    solver = PredictorCorrector(Exponential(1, score.facts.moments), reference=score.facts.moments)
    flow = Reverse(score.sde, score, 0.0)
    y = solve(flow, x, [0.5, 0.0], solver, 3)
    torch.testing.assert_close(y, solve(flow, x, [0.5, 0.0], Exponential(1, score.facts.moments)))
    z = solve(flow, x, [0.5, 0.3, 0.0], Churn(Exponential(1, score.facts.moments)), 3)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-10)


def test_a_vanishing_score_is_no_division_by_zero() -> None:
    sde = VP()
    x = torch.zeros(3, 2)
    y = solve(sde.probability_flow(lambda x, t: 0 * x), x, [0.9, 0.5], PredictorCorrector(), 1)
    assert bool(y.isfinite().all())


def test_what_the_corrector_refuses() -> None:
    sde, score = VP(), gaussian(VP())
    x = torch.zeros(2, 3, dtype=F64)
    with pytest.raises(TypeError, match="one-step solver"):
        PredictorCorrector(Exponential(2))
    with pytest.raises(TypeError, match=r"one-step solver.* got Tuned: the past"):
        PredictorCorrector(Tuned([Choice(4, Exponential(2))]))
    with pytest.raises(TypeError, match=r"one-step solver.* got Propagator"):
        PredictorCorrector(Propagator(2))
    for eta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eta must be"):
            PredictorCorrector(eta=eta)
    with pytest.raises(ValueError, match="corrections must be"):
        PredictorCorrector(corrections=0)
    with pytest.raises(ValueError, match="reference must be"):
        PredictorCorrector(reference=-0.1)
    with pytest.raises(TypeError, match="reversal of a LinearSDE"):
        solve(Langevin(score), x, [0.1, 0.9], PredictorCorrector())
    with pytest.raises(ValueError, match="times must fall"):
        solve(sde.probability_flow(score), x, [0.1, 0.9], PredictorCorrector())
    with pytest.raises(TypeError, match="RungeKutta solves ODEs"):
        solve(sde.reverse(score), x, [0.9, 0.1], PredictorCorrector(RungeKutta()))
    flow = sde.probability_flow(lambda x, t: -x[:, :1])
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\) for a state \(2, 3\)"):
        solve(flow, x, [0.9, 0.1], PredictorCorrector(Still()))
