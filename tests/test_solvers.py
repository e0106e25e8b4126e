"""Every solver at its declared order, against exact answers."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from laws import law_error, moment_error
from problems import (
    F64,
    correlated,
    gaussian,
    gaussian_flow,
    gaussian_reversal,
    line,
    quantile_flow,
    rms,
    slopes,
    start,
)
from torch import Tensor

from sde_gen import (
    EDM,
    SRA,
    VE,
    VP,
    BrownianPath,
    Churn,
    EulerMaruyama,
    Exponential,
    Gaussian,
    Heun,
    Langevin,
    LinearSDE,
    Noise,
    OrnsteinUhlenbeck,
    PredictorCorrector,
    Reverse,
    RungeKutta,
    Solver,
    Streams,
    SubVP,
    TorchSDE,
    grids,
    solve,
)
from sde_gen.ops import Time
from sde_gen.schedules import Geometric, Power
from sde_gen.solvers import Midpoint


def name(value: object) -> str:
    if isinstance(value, TorchSDE):
        return f"TorchSDE {value.method} {value.substeps}"
    if isinstance(value, Exponential):
        c, rule = float(value.reference.values[0]), type(value.weights).__name__
        return f"Exponential {value.nodes} C={c} {rule}"
    return type(value).__name__ if isinstance(value, Solver) else str(value)


TORCHSDE = [TorchSDE(method) for method in ("euler", "euler_heun", "midpoint", "heun", "srk")]
RUNGE_KUTTA: list[Solver] = [EulerMaruyama(), Heun(), RungeKutta(), *TORCHSDE, TorchSDE("heun", 3)]
EXPONENTIAL = [
    *(Exponential(p) for p in (1, 2, 3, 4)),
    *(Exponential(p, reference=0.5) for p in (1, 2, 3, 4)),
    Exponential(2, weights=Midpoint()),
]


@pytest.mark.parametrize("solver", RUNGE_KUTTA, ids=name)
def test_order_on_an_ode(solver: Solver) -> None:
    sde, t, s = VP(), 0.6, 0.1
    score = line(sde)
    x = start(score, 64, t)
    exact = quantile_flow(score, x, t, s)
    runs = [
        solve(sde.probability_flow(score), x, grids.uniform(sde, n, t, s), solver)
        for n in (20, 40, 80)
    ]
    for slope in slopes([rms(y - exact) for y in runs]):
        assert slope == pytest.approx(solver.order, abs=0.2)


@pytest.mark.parametrize("solver", EXPONENTIAL, ids=name)
def test_order_of_exponential_solvers(solver: Exponential) -> None:
    # A multistep method starts at order 1. Where the noise is 200 times the data the denoised
    # state hardly moves, so that start costs less than the order in the steps that follow.
    sde, t, s = EDM(200.0), 200.0, 0.05
    score = line(sde)
    x = start(score, 64, t)
    exact = quantile_flow(score, x, t, s)
    runs = [
        solve(sde.probability_flow(score), x, grids.log_snr(sde, n, t, s), solver)
        for n in (80, 160, 320)
    ]
    for slope in slopes([rms(y - exact) for y in runs]):
        assert slope == pytest.approx(solver.order, abs=0.2)


@pytest.mark.parametrize(
    "solver", [Heun(), RungeKutta(), Exponential(2), Exponential(3)], ids=name
)
@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(Geometric(0.02, 20.0))], ids=repr)
def test_order_does_not_depend_on_the_process(sde: LinearSDE, solver: Solver) -> None:
    """The same, from noise to data, for every process, and back: encoding inverts."""
    t, s = float(sde.time_at(2 * math.log(1.5))), float(sde.time_at(2 * math.log(8.0)))
    score = line(sde)
    x = start(score, 32, t)
    exact = quantile_flow(score, x, t, s)
    flow, errors, returns = sde.probability_flow(score), [], []
    for n in (40, 80):
        times = grids.log_snr(sde, n, t, s)
        errors.append(rms(solve(flow, x, times, solver) - exact))
        returns.append(rms(solve(flow, exact, times.flip(0), solver) - x))
    assert slopes(errors)[0] > solver.order - 0.2
    assert slopes(returns)[0] > solver.order - 0.2
    assert errors[-1] < 2e-3


STOCHASTIC: list[tuple[Solver, int]] = [
    (EulerMaruyama(), 1),
    (Heun(), 1),
    (Exponential(1), 1),
    (Exponential(2), 1),
    (Exponential(3), 1),
    (Exponential(2, weights=Midpoint()), 1),
    (Exponential(1, reference=0.5), 1),
    (Exponential(2, reference=0.5), 1),
    (Exponential(1, reference=math.inf), 1),
    (Exponential(2, reference=math.inf), 1),
    *((solver, 2 if solver.method == "srk" else 1) for solver in TORCHSDE),
]


@pytest.mark.parametrize(("eta", "point"), [(0.5, None), (1.0, None), (0.7, 0.7)])
@pytest.mark.parametrize(("solver", "draws"), STOCHASTIC, ids=name)
def test_weak_order_by_impulse_response(
    solver: Solver, draws: int, eta: float, point: float | None
) -> None:
    """From the law of t, and from a point: what joins two times and not the marginals alone."""
    sde, errors = VP(), []
    for n in (64, 128, 256) if point is None else (64, 128):
        times = grids.uniform(sde, n, 0.6, 0.1)
        errors.append(float(law_error(gaussian(sde), solver, times, eta, draws * n, point).norm()))
    assert solver.weak is not None
    # The midpoint rule is of weak order 2 where the drift is linear, and there alone.
    weak = 2 if getattr(solver, "method", "") == "midpoint" else solver.weak
    # Order 3 meets its weak order 2 from above.
    high = 0.5 if isinstance(solver, Exponential) and solver.order > 2 else 0.2
    for slope in slopes(errors):
        assert weak - 0.2 < slope < weak + high


ONE_STEP: list[tuple[Solver, int]] = [
    *((solver, draws) for solver, draws in STOCHASTIC if not solver.multistep),
    (SRA(), 2),
    (Churn(), 1),
    (Churn(RungeKutta()), 1),
    (PredictorCorrector(reference=0.3), 2),
]


@pytest.mark.parametrize(("solver", "draws"), ONE_STEP, ids=name)
def test_weak_order_on_a_mixture(solver: Solver, draws: int) -> None:
    """Four moments at eta = 1: on Gaussian data every function of the drift is linear."""
    sde = VP()
    errors = [
        float(moment_error(line(sde), solver, grids.uniform(sde, n, 0.6, 0.1), 1.0, draws).norm())
        for n in ((16, 32) if solver.order > 2 else (32, 64))
    ]
    assert slopes(errors)[0] == pytest.approx(solver.weak, abs=0.25)


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun()], ids=name)
@pytest.mark.parametrize(("t", "s"), [(0.3, 1.2), (1.2, 0.3)])
def test_without_drift_a_step_has_the_spread_of_its_formula(
    solver: Solver, t: float, s: float
) -> None:
    """g^2 = 4 t^3: that of the start for Euler and Maruyama, the mean of two for Heun."""
    process = Langevin(lambda x, t: 0 * x, Power(4.0, T=1.5), at=0.1)
    process = process if s > t else process.reverse(lambda x, t: 0 * x)
    x, noise = torch.zeros(5, 2, dtype=F64), Streams(9)
    y = solve(process, x, [t, s], solver, noise)
    square = 4 * t**3 if isinstance(solver, EulerMaruyama) else (4 * t**3 + 4 * s**3) / 2
    exact = math.sqrt(square * abs(s - t)) * noise(x, t, s)
    torch.testing.assert_close(y, exact, rtol=1e-13, atol=1e-13)


PROCESSES = [VP(), SubVP(), VE(Geometric(0.02, 8.0)), OrnsteinUhlenbeck()]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun(), Exponential(2)], ids=name)
@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_every_eta_has_the_same_marginals(sde: LinearSDE, solver: Solver, eta: float) -> None:
    t, s = 0.9 * sde.T, float(sde.time_at(2 * math.log(4.0)))
    score = gaussian(sde)
    errors = []
    for n in (100, 200):
        error = law_error(score, solver, grids.quadratic(sde, n, t, s), eta, n)
        exact = sde.alpha(s) ** 2 * score.variance + sde.sigma(s) ** 2
        errors.append(float((error / torch.cat([exact, exact])).abs().max()))
    # The limit is the exact law: the error is small and vanishes at least like the step.
    assert errors[1] < (0.2 if isinstance(solver, EulerMaruyama) else 0.03)
    assert errors[1] < errors[0] * 0.5**0.75


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("end", [0.1, 0.0])
@pytest.mark.parametrize(
    "solver",
    [Exponential(1, 0.36), Exponential(3, 0.36), Exponential(2, 0.36, corrector=True)],
    ids=["1", "3", "2c"],
)
@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_a_matched_reference_is_exact(
    sde: LinearSDE, eta: float, end: float, solver: Exponential
) -> None:
    """C = the variance of Gaussian data: three long steps have the law, even to t = 0.

    From a point too, up to eta = 1: above it steps as long as these carry less noise.
    """
    score = Gaussian(sde, torch.tensor([0.8, -0.3], dtype=F64), 0.6)
    times = sde.T * torch.tensor([1.0, 0.6, 0.2, end], dtype=F64)
    for point in (None, 0.7) if eta <= 1 else (None,):
        assert float(law_error(score, solver, times, eta, 3, point).abs().max()) < 1e-12
    x = start(score, 4, sde.T)
    if eta == 0:
        y = solve(sde.probability_flow(score), x, times, solver)
        exact = gaussian_flow(score, x, sde.T, float(times[-1]))
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [Exponential(2), Exponential(1, 0.3, corrector=True)], ids=name)
def test_above_eta_1_fine_steps_carry_all_the_noise(solver: Exponential) -> None:
    """From a point at eta = 2, on grids whose steps are so short that nothing is taken off."""
    sde, errors = VP(), []
    for n in (64, 128):
        times = grids.log_snr(sde, n, 0.6, 0.1)
        assert 4 * math.tanh(float(sde.log_snr(times).diff().max()) / 2) < 1
        errors.append(float(law_error(gaussian(sde), solver, times, 2.0, n, 0.7).norm()))
    assert 1.8 < slopes(errors)[0] < 2.5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_one_step_is_exact_for_one_point(eta: float, steps: int) -> None:
    """With C = 0 the denoised state of a point is the point: DDIM and DDPM make no error."""
    sde, point = VP(), torch.tensor([0.8, -0.3], dtype=F64)
    score = Gaussian(sde, point, 0.0)
    x = start(score, 5, 1.0)
    y = solve(sde.reverse(score, eta), x, grids.uniform(sde, steps, end=0.0), Exponential(3), 1)
    torch.testing.assert_close(y, point.expand(5, 2), rtol=0, atol=1e-12)


def test_the_exact_reversal_of_the_oracle_keeps_the_law() -> None:
    """The closed form that the tests use keeps N(mean, v), and two steps of it are one."""
    for sde in PROCESSES:
        score, t, m, s = correlated(sde), 0.9 * sde.T, 0.5 * sde.T, 0.2 * sde.T
        v_t, v_s = (sde.alpha(u) ** 2 * score.variance + sde.sigma(u) ** 2 for u in (t, s))
        for eta in (0.0, 0.7, 1.0):
            g_1, *_, d_1 = gaussian_reversal(score, t, m, eta)
            g_2, *_, d_2 = gaussian_reversal(score, m, s, eta)
            g, *_, d = gaussian_reversal(score, t, s, eta)
            torch.testing.assert_close(g**2 * v_t + d**2, v_s)
            torch.testing.assert_close(g, g_1 * g_2)
            torch.testing.assert_close(d**2, g_2**2 * d_1**2 + d_2**2, rtol=1e-9, atol=1e-12)


class Area(Noise):
    """One path with its space-time area: W and int W du over joined intervals of a fine grid."""

    def __init__(self, times: Tensor, x: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = len(times) - 1
        w, a = torch.randn(2, n, *x.shape, generator=generator, dtype=F64)
        self.times, self.h = times.tolist(), times.diff().abs().reshape(n, *(1,) * x.ndim)
        self.w = self.h.sqrt() * w
        self.u = self.h * (self.w / 2 + torch.sqrt(self.h / 12) * a)

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        part = slice(self.times.index(t), self.times.index(s))
        h, w, u = self.h[part], self.w[part], self.u[part]
        total, length = w.sum(0), h.sum(0)
        if k == 0:
            return total / length.sqrt()
        # int W over the whole: each part's own, plus where W stood when the part began.
        area = (u + h * (w.cumsum(0) - w)).sum(0)
        return (area / length - total / 2) / torch.sqrt(length / 12)

    def start(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def rows(self, index: slice | Tensor) -> Area:
        raise NotImplementedError


@lru_cache
def fine_run() -> tuple[Tensor, Tensor, Area, Tensor, Tensor]:
    """Start, grid, paths and end of a run whose own error in four moments is known exactly."""
    score, times = line(VP()), grids.uniform(VP(), 128, 0.6, 0.1)
    x = start(score, 20_000, 0.6)
    noise = Area(times, x, seed=2)
    end = solve(VP().reverse(score), x, times, SRA(), noise)
    return x, times, noise, end, moment_error(score, SRA(), times[::4], 1.0, 2) / 16


@pytest.mark.parametrize(
    "solver", [Exponential(2), Exponential(3), Exponential(2, 0.5, corrector=True)], ids=name
)
def test_weak_order_of_multistep_solvers_on_a_mixture(solver: Solver) -> None:
    """The same moments beside those of a fine run on the same paths."""
    x, times, noise, end, known = fine_run()
    errors = []
    for n in (16, 32):
        y = solve(VP().reverse(line(VP())), x, times[:: 128 // n], solver, noise)
        apart = torch.cat([y**k - end**k for k in (1, 2, 3, 4)], 1)
        errors.append(float((apart.mean(0) + known).norm()))
        # What 20,000 paths do not tell is small beside it.
        assert float(apart.std(0).norm()) / math.sqrt(len(x)) < 0.4 * errors[-1]
    assert solver.weak == 2
    assert slopes(errors)[0] > 1.75


STRONG: list[Solver] = [EulerMaruyama(), Heun(), Exponential(1), Exponential(2), *TORCHSDE]


@lru_cache
def shared_path() -> tuple[Reverse, Tensor, Tensor, Area, Tensor]:
    """A reversal, its start, a fine grid, a path on it and the solution along that path."""
    sde = VP()
    process, times = sde.reverse(line(sde)), grids.uniform(sde, 2048, 0.6, 0.1)
    x = start(line(sde), 200, 0.6)
    noise = Area(times, x, seed=1)
    return process, x, times, noise, solve(process, x, times, TorchSDE("srk"), noise)


@pytest.mark.parametrize("solver", STRONG, ids=name)
def test_strong_order_on_a_shared_path(solver: Solver) -> None:
    process, x, times, noise, reference = shared_path()
    errors = [
        rms(solve(process, x, times[:: 2048 // m], solver, noise) - reference)
        for m in (64, 128, 256)
    ]
    assert solver.strong is not None
    # A mean over 200 paths: each ratio is known to some percent, the whole range better.
    assert math.log2(errors[0] / errors[-1]) / 2 == pytest.approx(solver.strong, abs=0.2)


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun()], ids=name)
def test_strong_order_on_a_brownian_path(solver: Solver) -> None:
    """The library's own path, refined: gaussian data, so that no path flips between modes."""
    sde, t, s, n = VP(), 0.6, 0.1, 256
    score = gaussian(sde)
    x = start(score, 100, t)
    process, times = sde.reverse(score), grids.uniform(sde, n, t, s)
    reference = solve(process, x, times, Heun(), BrownianPath(5))
    errors = [
        rms(solve(process, x, times[:: n // m], solver, BrownianPath(5)) - reference)
        for m in (16, 32, 64)
    ]
    assert math.log2(errors[0] / errors[-1]) / 2 == pytest.approx(1, abs=0.25)


# What a solver says of itself.


class Counting:
    """A score that remembers when it was asked."""

    def __init__(self, sde: LinearSDE) -> None:
        self.score, self.times = gaussian(sde), list[float]()

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.times.append(float(t))
        return self.score(x, t)


class Refusing(Streams):
    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        raise AssertionError(f"noise was drawn for the step from {t} to {s}")


ALL: list[Solver] = [EulerMaruyama(), Heun(), RungeKutta(), Exponential(3), *TORCHSDE]


@pytest.mark.parametrize("solver", [*ALL, TorchSDE("srk", 2), TorchSDE("heun", 3)], ids=name)
def test_calls_and_times_are_as_declared(solver: Solver) -> None:
    sde, n = VP(), 7
    score = Counting(sde)
    grid = grids.karras(sde, n)
    solve(sde.probability_flow(score), torch.zeros(2, 3, dtype=F64), grid, solver)
    assert len(score.times) == n * solver.calls
    # The score and the solver agree on the time to the last bit; none is asked twice in vain.
    assert set(grid[:-1].tolist()) <= set(score.times)
    assert (float(grid[-1]) in score.times) == solver.evaluates_end


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_no_noise_is_drawn_where_it_counts_for_nothing(solver: Solver) -> None:
    sde, x = VP(), torch.ones(2, 3, dtype=F64)
    solve(sde.probability_flow(gaussian(sde)), x, grids.uniform(sde, 5), solver, Refusing(0))


def test_the_last_step_to_the_data_draws_nothing() -> None:
    sde, x = VP(), torch.ones(2, 3, dtype=F64)
    solve(sde.reverse(gaussian(sde)), x, [0.5, 0.0], Exponential(2), Refusing(0))
