"""Adaptive steps: errors, calls, paths and laws; and that no sample feels another."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from problems import (
    F64,
    correlated,
    gaussian,
    gaussian_flow,
    grid25,
    line,
    mixture,
    quantile_flow,
    rms,
    start,
)
from torch import Tensor

from sde_gen import (
    EDM,
    SDE,
    VE,
    VP,
    Adaptive,
    BrownianPath,
    Facts,
    Gaussian,
    GaussianMixture,
    Heun,
    Impulses,
    Langevin,
    LinearSDE,
    OrnsteinUhlenbeck,
    SciPy,
    Score,
    Streams,
    SubVP,
    grids,
    sample,
    solve,
)
from sde_gen.ops import Time, as_time, match
from sde_gen.schedules import Geometric, Linear, Power
from sde_gen.solvers.adaptive import Standard
from sde_gen.solvers.base import check_drift


def slopes(x: list[float], y: list[float]) -> list[float]:
    """Log-log slopes of y over x, with the sign of an order."""
    points = list(zip(x, y, strict=True))
    return [math.log(b / d) / math.log(c / a) for (a, b), (c, d) in pairwise(points)]


class Counting(Score):
    """A score that counts the samples it was asked for, and remembers the times."""

    def __init__(self, score: Gaussian | GaussianMixture) -> None:
        self.score, self.count, self.times = score, 0, list[float]()
        self.sde, self.facts, self.singular = score.sde, score.facts, score.singular

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.count += len(x)
        self.times += as_time(t).reshape(-1).tolist()
        return self.score(x, t)


# One path, read at a time for each sample


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_sample_reads_the_same_path_at_its_own_time(dtype: torch.dtype) -> None:
    x = torch.zeros(7, 3, 2, dtype=dtype)
    path = BrownianPath(5, samples=3)
    times = torch.tensor([0.0, 0.1, 0.31, 1.0, 64.0, 80.123, 128.0], dtype=F64)
    w = path.at(x, times)
    # To rounding: the square root of a number and of a tensor may differ in the last bit.
    few = 8 * torch.finfo(dtype).eps * float(w.abs().max())
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(path.at(x, t)[i], w[i], rtol=0, atol=few)
    chosen = torch.tensor([4, 0, 2])
    part = path.rows(chosen).at(x[:3], times[chosen])
    torch.testing.assert_close(part, w[chosen], rtol=0, atol=few)


@pytest.mark.parametrize("t", [-0.1, 1e39, math.nan])
def test_a_path_has_ends_for_each_sample(t: float) -> None:
    with pytest.raises(ValueError, match="path lives on"):
        BrownianPath(0).at(torch.zeros(2, 1), torch.tensor([0.5, t], dtype=F64))


def test_paths_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, times = torch.zeros(4, 5), torch.rand(4, dtype=F64)
    whole = BrownianPath(1).at(x, times)
    monkeypatch.setattr("sde_gen.noise.path._BUDGET", 50)
    assert torch.equal(BrownianPath(1).at(x, times), whole)


# ODEs


def run(
    score: GaussianMixture, x: Tensor, t: float, s: float, rtol: float
) -> tuple[Tensor, float]:
    counted = Counting(score)
    y = solve(score.sde.probability_flow(counted), x, [t, s], Adaptive(rtol, rtol))
    return y, counted.count / len(x)


@pytest.mark.parametrize(
    "sde", [VP(), SubVP(), VE(Geometric(0.02, 20.0)), EDM(40.0), OrnsteinUhlenbeck()], ids=repr
)
def test_the_error_follows_the_tolerance(sde: LinearSDE) -> None:
    """It is a small multiple of it, on every process and back again; order 5 in the calls."""
    t, s = 0.95 * sde.T, float(sde.time_at(2 * math.log(20.0)))
    score = line(sde)
    x = start(score, 24, t)
    exact, flow = quantile_flow(score, x, t, s), sde.probability_flow(score)
    for rtol in (1e-4, 1e-7):
        assert 0.01 * rtol < rms(run(score, x, t, s, rtol)[0] - exact) < 5 * rtol
        # The flow back stretches errors as it stretches the state.
        back = solve(flow, exact, [s, t], Adaptive(rtol, rtol))
        assert rms(back - x) < 5 * rtol * max(1.0, rms(x) / rms(exact))
    (y_1, n_1), (y_2, n_2) = (run(score, x, t, s, rtol) for rtol in (1e-10, 1e-12))
    (order,) = slopes([n_1 - 1, n_2 - 1], [rms(y_1 - exact), rms(y_2 - exact)])
    # From above: at these tolerances the controller still gains on the rule h^5 = tolerance.
    assert Adaptive.order - 0.3 < order < Adaptive.order + 0.8


@pytest.mark.parametrize("make", [line, grid25], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sde", [VP(), EDM(80.0)], ids=repr)
def test_no_more_calls_than_scipy_for_the_same_error(sde: LinearSDE, make: type) -> None:
    """RK45 with one step size for the batch; here calls are those of the mean sample."""
    t, s = sde.T, float(sde.time_at(2 * math.log(100.0)))
    score: GaussianMixture = make(sde)
    x = start(score, 96, t)
    exact = quantile_flow(score, x, t, s)
    for rtol in (1e-3, 1e-4, 1e-5):
        counted = Counting(score)
        y = solve(sde.probability_flow(counted), x, [t, s], SciPy("RK45", rtol, rtol))
        theirs, error = counted.count / len(x), rms(y - exact)
        ours = [run(score, x, t, s, rtol * 10 ** (-k / 3)) for k in range(-3, 7)]
        assert min(n for y, n in ours if rms(y - exact) <= error) <= theirs


def test_every_call_is_of_use() -> None:
    """One call at the start and six a trial; where the flow rests, two trials at most a step."""
    sde = VP()
    score = Counting(Gaussian(sde, torch.zeros(2, dtype=F64), 0.5))
    x = start(Gaussian(sde, torch.zeros(2, dtype=F64), 0.5), 5, 1.0)
    y = solve(sde.probability_flow(score), x, [1.0, 0.01], Adaptive(1e-6, 1e-6))
    assert (score.count - 5) % 6 == 0
    assert score.count / 5 <= 1 + 6 * 8
    exact = gaussian_flow(score.score, x, 1.0, 0.01)  # type: ignore[arg-type]
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-12)
    assert min(score.times) == pytest.approx(0.01, abs=1e-12)
    assert max(score.times) <= 1.0


def test_a_trajectory_is_met_at_its_times() -> None:
    sde, times = VP(), torch.tensor([1.0, 0.7, 0.4, 0.39, 0.1, 0.01], dtype=F64)
    score = line(sde)
    x = start(score, 16, 1.0)
    counted = Counting(score)
    flow = sde.probability_flow(counted)
    states = solve(flow, x, times, Adaptive(1e-7, 1e-7), trajectory=True)
    for state, t in zip(states, times.tolist(), strict=True):
        exact = quantile_flow(score, x, 1.0, t)
        torch.testing.assert_close(state, exact, rtol=0, atol=1e-4)
    # The drift at an end is the next one's start: six calls a trial and one in all.
    assert (counted.count - 16) % 6 == 0


def test_a_smooth_flow_may_end_at_zero() -> None:
    sde = EDM(80.0)
    score = correlated(sde)
    x = start(score, 8, 80.0)
    y = solve(sde.probability_flow(score), x, [80.0, 0.0], Adaptive(1e-8, 1e-8))
    torch.testing.assert_close(y, gaussian_flow(score, x, 80.0, 0.0), rtol=0, atol=1e-6)
    back = solve(sde.probability_flow(score), y, [0.0, 80.0], Adaptive(1e-8, 1e-8))
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_sample_leaves_the_steps_to_it() -> None:
    """Not 25 intervals: from the start to the end, the same as solving between these two."""
    model = Counting(line(VP()))
    model = model.with_facts(Facts((1,)))
    end = grids.default_end(VP())
    y = sample(model, 40, seed=3, solver=Adaptive(1e-3, 1e-3), dtype=F64)
    calls = model.count / 40
    x = VP().sigma(1.0) * Streams(3).start(torch.empty(40, 1, dtype=F64))
    exact = quantile_flow(line(VP()), x, 1.0, end)
    assert rms(y - exact) < 0.02
    assert calls < 60


class Bare(LinearSDE):
    """Nothing but a rate and a diffusion: time_at is a search, so t itself is stepped."""

    T = 1.0

    def rate(self, t: Time) -> Tensor:
        return -2.0 - as_time(t)

    def diffusion(self, t: Time) -> Tensor:
        return torch.sqrt(3 + 2 * as_time(t))


def test_a_process_without_closed_forms_is_stepped_in_its_own_time() -> None:
    sde = Bare()
    score = gaussian(sde)
    x = start(score, 16, 1.0)
    y = solve(sde.probability_flow(score), x, [1.0, 0.05], Adaptive(1e-8, 1e-8))
    torch.testing.assert_close(y, gaussian_flow(score, x, 1.0, 0.05), rtol=0, atol=1e-6)


# SDEs: one path, whatever is rejected


def langevin() -> tuple[SDE, Tensor, float, float]:
    score = line(VP())
    return Langevin(score, Power(2.0, T=2.0), at=0.05), start(score, 60, 0.05), 0.2, 1.2


def reversal() -> tuple[SDE, Tensor, float, float]:
    sde = Bare()
    return sde.reverse(line(sde)), start(line(sde), 60, 0.8), 0.8, 0.2


@pytest.mark.parametrize("make", [langevin, reversal], ids=lambda f: f.__name__)
def test_it_converges_to_the_path_that_fixed_steps_converge_to(make: type) -> None:
    """Rising and falling: rejected pieces of the path are read again, not drawn again."""
    process, x, t, s = make()
    fine = torch.linspace(t, s, 1025, dtype=F64)
    exact = solve(process, x, fine, Heun(), BrownianPath(1))
    near, far = (
        rms(solve(process, x, [t, s], Adaptive(rtol, rtol), BrownianPath(1)) - exact)
        for rtol in (5e-3, 1e-1)
    )
    # The tolerance bounds a local error of order 3/2 in the step; the error is of order 1.
    assert math.log(far / near) / math.log(20) == pytest.approx(2 / 3, abs=0.2)
    assert near < 0.03


@pytest.mark.parametrize(("t", "s"), [(0.3, 1.2), (1.2, 0.3)])
def test_without_drift_one_step_has_the_exact_spread(t: float, s: float) -> None:
    """int g dW with g^2 = 4 t^3: the increment of the path times the root of the mean of g^2."""
    process = Langevin(lambda x, t: 0 * x, Power(4.0, T=1.5), at=0.1)
    process = process if s > t else process.reverse(lambda x, t: 0 * x)
    x, path = torch.zeros(5, 2, dtype=F64), BrownianPath(9)
    y = solve(process, x, [t, s], Adaptive(), path)
    exact = math.sqrt(abs(s**4 - t**4)) * path(x, t, s)
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)


def test_the_strong_order_is_that_of_the_mean_number_of_steps() -> None:
    sde, t, s = VP(), 0.8, 0.1
    score = line(sde)
    x = start(score, 150, t)
    exact = solve(sde.reverse(score), x, [t, s], Adaptive(1e-3, 1e-3), BrownianPath(4))
    errors, calls = [], []
    for rtol in (0.15, 0.015):
        counted = Counting(score)
        y = solve(sde.reverse(counted), x, [t, s], Adaptive(rtol, rtol), BrownianPath(4))
        errors.append(rms(y - exact))
        calls.append(counted.count / len(x))
    assert slopes(calls, errors)[0] == pytest.approx(Adaptive.strong, abs=0.2)


def test_steps_are_rejected_in_these_tests() -> None:
    """After a rejection the drift is asked for at the same time again."""
    sde, again = VP(), 0
    x = start(line(sde), 1, 0.8)
    for seed in range(4):
        counted = Counting(line(sde))
        solve(sde.reverse(counted), x, [0.8, 0.1], Adaptive(0.03, 0.03), BrownianPath(seed))
        starts = counted.times[::2]
        again += len(starts) - len(set(starts))
    assert again >= 3


def test_the_law_of_a_mixture() -> None:
    """Kolmogorov-Smirnov at a loose tolerance: exceeded once in a thousand times."""
    sde, t, s, n = VP(), 0.8, 0.1, 4000
    score = line(sde)
    x = start(score, n, t, seed=7)
    y = solve(sde.reverse(score), x, [t, s], Adaptive(0.05, 0.05), 11)
    std = torch.sqrt(sde.alpha(s) ** 2 * score.variance[:, 0] + sde.sigma(s) ** 2)
    z = (y.flatten().sort().values.unsqueeze(1) - sde.alpha(s) * score.means[:, 0]) / std
    cdf = torch.special.ndtr(z) @ score.log_weights.exp()
    gap = torch.maximum(torch.arange(1, n + 1) / n - cdf, cdf - torch.arange(n) / n)
    assert float(gap.max()) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(
    "sde", [VP(), SubVP(), VE(Geometric(0.02, 8.0)), EDM(8.0), OrnsteinUhlenbeck()], ids=repr
)
def test_the_process_that_is_stepped_has_the_right_law(sde: LinearSDE, eta: float) -> None:
    """z on the clock u, by Heun's method at its weak order 2 and impulse response."""
    t, s = 0.9 * sde.T, float(sde.time_at(2 * math.log(4.0)))
    score = gaussian(sde)
    process = Standard(sde.reverse(score, eta), 0.4, t, s)
    process.T = 9.0

    def spread(time: float) -> Tensor:
        return sde.alpha(time) ** 2 * score.variance + sde.sigma(time) ** 2

    errors = []
    for n in (100, 200):
        times = torch.linspace(process.clock(t), process.clock(s), n + 1, dtype=F64)

        def end(value: float, times: Tensor = times, n: int = n) -> Tensor:
            x = torch.full((n + 1, 3), value / process.scale(t), dtype=F64)
            return process.scale(s) * solve(process, x, times, Heun(), Impulses())

        zero, one = end(0.0), end(1.0)
        gain, draw = (one - zero)[-1], zero[:-1] - zero[-1]
        mean = zero[-1] + gain * sde.alpha(t) * score.mean - sde.alpha(s) * score.mean
        variance = gain**2 * spread(t) + draw.square().sum(0) - spread(s)
        errors.append(float(torch.cat([mean, variance]).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)
    assert errors[1] < 2e-3


# No sample feels another


class Labelled(Score):
    """Data at 0 or at a place of its own for each label."""

    def __init__(self, sde: LinearSDE) -> None:
        self.sde, self.facts = sde, Facts((2,))
        self.parts = [mixture(sde), grid25(sde), correlated(sde)]

    def __call__(self, x: Tensor, t: Time, y: Tensor | None = None) -> Tensor:
        assert y is not None
        assert len(y) == len(x)
        scores = torch.stack([part(x, t) for part in self.parts], 1)
        return scores[torch.arange(len(x)), y]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("sde", [VP(), Bare()], ids=["standard", "own time"])
def test_a_sample_does_not_depend_on_its_neighbours(sde: LinearSDE, eta: float) -> None:
    """To rounding, in another batch, at another place, and cut in chunks; labels follow."""
    n, t, s = 11, 0.9, 0.2
    labels = torch.arange(n) % 3
    score = Labelled(sde)
    x = sde.sigma(t) * torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    rtol = 1e-5 if eta == 0 else 0.05
    solver = Adaptive(rtol, rtol)

    def solved(index: Tensor, chunk: int | None = None) -> Tensor:
        process = sde.reverse(score.given(y=labels[index]), eta)
        return solve(process, x[index], [t, s], solver, Streams(3, index), chunk=chunk)

    whole = solved(torch.arange(n))
    for index in ([4], [10, 0, 7]):
        part = solved(torch.tensor(index))
        torch.testing.assert_close(part, whole[index], rtol=0, atol=1e-10)
    torch.testing.assert_close(solved(torch.arange(n), chunk=4), whole, rtol=0, atol=1e-10)
    # They do step differently: samples arrive at different times.
    assert len({len(set(calls)) for calls in per_sample(sde, score, labels, x, t, s, eta)}) > 1


def per_sample(
    sde: LinearSDE, score: Score, labels: Tensor, x: Tensor, t: float, s: float, eta: float
) -> list[list[float]]:
    """The times at which each sample, alone, asks for its score."""
    asked = []
    for i in range(3):
        times = list[float]()

        def watched(y: Tensor, u: Time, i: int = i, times: list[float] = times) -> Tensor:
            times.append(float(u))
            return score.given(y=labels[i : i + 1])(y, u)

        solver = Adaptive(1e-5, 1e-5) if eta == 0 else Adaptive(0.05, 0.05)
        solve(sde.reverse(watched, eta), x[i : i + 1], [t, s], solver, Streams(3, i))
        asked.append(times)
    return asked


def test_samples_that_have_arrived_are_not_evaluated() -> None:
    """An easy and a hard sample: the batch costs what they cost alone."""
    sde = VP()
    score = grid25(sde)
    x = torch.tensor([[0.0, 0.0], [0.25, -0.24], [9.0, 9.0]], dtype=F64)

    def cost(x: Tensor) -> int:
        counted = Counting(score)
        solve(sde.probability_flow(counted), x, [0.8, 0.001], Adaptive(1e-5, 1e-5))
        return counted.count

    alone = [cost(x[i : i + 1]) for i in range(3)]
    assert len(set(alone)) > 1
    assert cost(x) == sum(alone)


def test_it_keeps_no_state() -> None:
    sde, solver = VP(), Adaptive(1e-4, 1e-4)
    score = line(sde)
    x = start(score, 5, 0.9)
    first = solve(sde.probability_flow(score), x, [0.9, 0.1], solver)
    solve(sde.reverse(score), start(score, 3, 0.5), [0.5, 0.45], solver, 1)
    assert torch.equal(solve(sde.probability_flow(score), x, [0.9, 0.1], solver), first)
    assert vars(solver) == vars(Adaptive(1e-4, 1e-4))


# States, gradients, errors


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_any_shape_and_float32(eta: float) -> None:
    sde = VP()
    x = torch.randn(4, 6)
    process = sde.reverse(lambda x, t: -x / 1.3, eta)
    solver = Adaptive(0.01, 0.01)
    flat = solve(process, x, [0.9, 0.1], solver, 1)
    assert flat.dtype == torch.float32
    image = solve(process, x.reshape(4, 1, 2, 3), [0.9, 0.1], solver, 1)
    torch.testing.assert_close(image.reshape(4, 6), flat)
    scalar = solve(process, x[:, 0].clone(), [0.9, 0.1], solver, 1)
    assert scalar.shape == (4,)


def test_gradients_flow() -> None:
    """d x_s / d x_t of Gaussian data is the same number for every sample."""
    sde = VP()
    score = Gaussian(sde, torch.zeros(1, dtype=F64), 0.4)
    x = start(score, 3, 0.9).requires_grad_()
    y = solve(sde.probability_flow(score), x, [0.9, 0.1], Adaptive(1e-8, 1e-8))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    one = torch.ones(1, 1, dtype=F64)
    gain = gaussian_flow(score, one, 0.9, 0.1) - gaussian_flow(score, 0 * one, 0.9, 0.1)
    torch.testing.assert_close(gradient, gain.expand(3, 1), rtol=1e-6, atol=0)


class Refusing(Streams):
    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        raise AssertionError("noise was drawn")


def test_an_ode_draws_nothing() -> None:
    sde = VP()
    x = torch.ones(2, 3, dtype=F64)
    solve(sde.probability_flow(gaussian(sde)), x, [0.9, 0.1], Adaptive(), Refusing(0))


def test_too_many_steps_name_the_last_sample() -> None:
    sde = VP()
    score = grid25(sde)
    x = start(score, 6, 1.0)
    with pytest.raises(RuntimeError, match=r"6 of 6 samples have not arrived after max_steps = 3"):
        solve(sde.probability_flow(score), x, [1.0, 0.001], Adaptive(1e-6, 1e-6, max_steps=3))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_score_is_named(eta: float, value: float) -> None:
    """At the first value that is not finite, with no further call."""
    sde = VP()
    sound, seen = gaussian(sde), list[bool]()

    def broken(x: Tensor, t: Time) -> Tensor:
        bad = (as_time(t) < 0.5) & (x[:, 0].double() > 0)
        s = torch.where(match(bad.double().expand(len(x)), x) > 0, value, sound(x, t))
        seen.append(bool(torch.isfinite(s).all()))
        return s

    x = torch.tensor([[-1.0, 0, 0], [5.0, 0, 0]], dtype=F64)
    with pytest.raises(FloatingPointError, match=r"score is not finite at t = 0\.[34]"):
        solve(sde.reverse(broken, eta), x, [0.9, 0.1], Adaptive(0.01, 0.01), 1)
    assert seen == [True] * (len(seen) - 1) + [False]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("sde", [VP(), Bare()], ids=["standard", "own time"])
def test_a_score_that_is_nan_is_asked_once(sde: LinearSDE, eta: float) -> None:
    calls = list[float]()

    def broken(x: Tensor, t: Time) -> Tensor:
        calls.append(float(as_time(t)[0]))
        return x * math.nan

    with pytest.raises(FloatingPointError, match="the score is not finite at t = "):
        solve(sde.reverse(broken, eta), torch.ones(2, 3), [0.9, 0.1], Adaptive(), 1)
    assert calls == pytest.approx([0.9])


def test_only_the_drift_of_a_finite_state_is_to_blame() -> None:
    """A trial that has gone to infinity is rejected; what is broken where states are is named."""
    x = torch.tensor([[1.0, 2.0], [math.inf, 0.0], [3.0, 4.0]])
    b, times = torch.zeros_like(x), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    b[1, 1] = math.nan
    check_drift(Bare(), b, x, times)
    b[2, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"drift is not finite at t = 0\.3.* in row 2"):
        check_drift(Bare(), b, x, times)


class Slow(Bare):
    """``Bare`` in other units: what it does in a second takes ``second`` here."""

    def __init__(self, second: float) -> None:
        self.T = second

    def rate(self, t: Time) -> Tensor:
        return super().rate(as_time(t) / self.T) / self.T

    def diffusion(self, t: Time) -> Tensor:
        return super().diffusion(as_time(t) / self.T) / math.sqrt(self.T)


@pytest.mark.parametrize("forth", [False, True])
def test_the_unit_of_time_is_free_on_an_ode(forth: bool) -> None:
    """A power of two only moves the exponent: the same steps, and the same bits."""
    runs = []
    for sde in (Bare(), Slow(2.0**-20)):
        t, s = (u * sde.T for u in ((0.0, 0.9) if forth else (0.9, 0.0)))
        counted = Counting(gaussian(sde))
        x = start(gaussian(Bare()), 8, 0.0 if forth else 0.9)
        y = solve(sde.probability_flow(counted), x, [t, s], Adaptive(1e-5, 1e-5))
        runs.append((y, [u / sde.T for u in counted.times]))
    (y, times), (other, others) = runs
    torch.testing.assert_close(other, y, rtol=1e-12, atol=1e-12)
    assert others == pytest.approx(times, rel=1e-9)


@pytest.mark.parametrize("second", [2.0**-20, 2.0**20])
def test_the_unit_of_time_is_free_on_an_sde(second: float) -> None:
    """VP that ends at T = 1e-6: its clock u has no unit, so the same path is read."""
    sde = VP(Linear(0.1 / second, 20.0 / second, T=second))
    x = start(gaussian(VP()), 400, 0.9)
    process, solver = sde.reverse(gaussian(sde)), Adaptive(0.05, 0.05)
    y = solve(process, x, [0.9 * second, 0.05 * second], solver, 1)
    plain = solve(VP().reverse(gaussian(VP())), x, [0.9, 0.05], solver, 1)
    torch.testing.assert_close(y, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("second", [1e-6, 1e9])
def test_a_process_stepped_in_its_own_time_has_its_law_in_every_unit(second: float) -> None:
    """Forth from a point, where the path is read in the units of the process itself."""
    n, sde = 1000, Slow(second)
    y = solve(sde, torch.zeros(n, 1, dtype=F64), [0.0, second], Adaptive(0.02, 0.02), 3)
    # The spread of a sample variance is sqrt(2 / n); the tolerance may add its 2 percent.
    exact = float(Bare().sigma(1.0)) ** 2
    assert float(y.var()) == pytest.approx(exact, rel=4 * math.sqrt(2 / n) + 0.02)


def test_an_interval_shorter_than_the_path_resolves_is_refused() -> None:
    process = Langevin(lambda x, t: -x, Power(1.0, T=2.0))
    with pytest.raises(ValueError, match="cannot be read in steps as short as"):
        solve(process, torch.zeros(2, 1), [1.0, 1.0 + 1e-9], Adaptive(), 1)


def test_noise_without_a_path_is_refused() -> None:
    sde = VP()
    x = torch.zeros(2, 3, dtype=F64)
    with pytest.raises(TypeError, match="reads a Brownian path between any two times"):
        solve(sde.reverse(gaussian(sde)), x, [0.9, 0.1], Adaptive(), Impulses())


@pytest.mark.parametrize("value", [0.0, -1e-3, math.inf, math.nan])
def test_tolerances_are_positive(value: float) -> None:
    with pytest.raises(ValueError, match="rtol must be"):
        Adaptive(rtol=value)
    with pytest.raises(ValueError, match="atol must be"):
        Adaptive(atol=value)


@pytest.mark.parametrize("steps", [0, 2.5, True])
def test_max_steps_is_a_count(steps: object) -> None:
    with pytest.raises(ValueError, match="max_steps must be"):
        Adaptive(max_steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_misshapen_score_is_refused(eta: float) -> None:
    process = VP().reverse(lambda x, t: -x[:, :1], eta)
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\) for a state \(2, 3\)"):
        solve(process, torch.ones(2, 3), [0.9, 0.1], Adaptive(), 1)
