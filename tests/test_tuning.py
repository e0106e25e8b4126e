"""Tuned grids and solvers: what is known of them exactly, and that they are what they say."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from problems import F64, correlated, gaussian, mixture, ring, start
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import VP, Exponential, grids, sample, solve, tune_grid, tune_solver
from sde_gen.cli import main
from sde_gen.networks import MLP
from sde_gen.sampling import default_solver
from sde_gen.solvers import deis
from sde_gen.training.checkpoints import CONFIG, CheckpointError
from sde_gen.tuning import Choice, Tuned, Warped
from sde_gen.tuning.moments import score_moments
from sde_gen.tuning.numbers import least_squares
from sde_gen.tuning.polish import Walk, _move, _update, polished
from sde_gen.tuning.search import Search, _judged, bent, evaluations
from sde_gen.tuning.trials import (
    affordable,
    base_solver,
    by_chance,
    checked,
    trials,
    typical_error,
)
from sde_gen.tuning.tuned import combination, correct, directions

SDE = VP()
END = 1e-3


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    """A ring, tuned for 6 and 10 steps to t = END."""
    return tune_solver(ring(SDE), steps=(6, 10), n=64, end=END)


def endpoint_errors(
    model: sg.Score, x: Tensor, exact: Tensor, times: Tensor, solver: Any
) -> Tensor:
    y = solve(SDE.probability_flow(model), x, times, solver)
    return (y - exact).square().mean(1).sqrt()


# --- grids of a few numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("to_zero", [False, True])
def test_even_shares_are_the_default_grid(to_zero: bool) -> None:
    even = tuple((np.arange(1, 12) / 12).tolist())
    for k in (6, 12):  # a number of steps of its own, and another
        times = Warped(even, 0.4)(SDE, k + to_zero, end=END, to_zero=to_zero)
        usual = grids.default(SDE, k + to_zero, end=END, data_std=0.4, to_zero=to_zero)
        torch.testing.assert_close(times, usual, rtol=1e-12, atol=0)
    assert bent((0.0, 0.0), 12) == pytest.approx(even, abs=1e-12)


def test_shares_say_which_of_the_default_grid_is_done() -> None:
    """The default grid of eight steps is even in sqrt(time^(2 / 2.35)) of a unit that it scales:
    halves and quarters of its steps are nodes of grids of two and four without a longer start."""
    fine = grids.default(SDE, 8, start=0.3, end=END)  # no start from pure noise, so no first step
    times = Warped((0.25, 0.5, 0.625))(SDE, 4, start=0.3, end=END)
    torch.testing.assert_close(times, fine[[0, 2, 4, 5, 8]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("bend", [(1.5,), (0.4, -0.7, 0.2, 0.5), (-300.0,)])
def test_nodes_have_the_density_that_the_numbers_say(bend: tuple[float, ...]) -> None:
    """Shares u at 1 / 50, 2 / 50 ... of the distribution function int exp(sum c P)."""
    shares = torch.tensor(bent(bend, 50), dtype=F64)
    assert bool((shares.diff() > 0).all())
    assert 0 < float(shares[0]) < float(shares[-1]) < 1
    if max(map(abs, bend)) > 10:  # bounded: nothing to compare, but a grid all the same
        return
    fine = torch.linspace(0, 1, 200_001, dtype=F64)
    z = 2 * fine - 1
    legendre = [z, (3 * z**2 - 1) / 2, (5 * z**3 - 3 * z) / 2, (35 * z**4 - 30 * z**2 + 3) / 8]
    density = torch.exp(sum(c * p for c, p in zip(bend, legendre, strict=False)))  # type: ignore[arg-type]
    done = torch.cumulative_trapezoid(density, fine)
    done = torch.cat([done.new_zeros(1), done]) / done[-1]
    at = done[(shares * 200_000).round().long()]
    # 50 nodes against a table of 400 points: within a hundredth of a step.
    torch.testing.assert_close(50 * at, torch.arange(1, 50, dtype=F64), rtol=0, atol=0.01)


# --- numbers of a step --------------------------------------------------------------------------


def test_a_combination_is_the_sum_over_directions() -> None:
    x, *memory = torch.randn(4, 5, 3, dtype=F64)
    numbers, alpha = (0.3, -1.2, 0.7), 0.4
    moved = x + alpha * torch.einsum("k,kbd->bd", torch.tensor(numbers, dtype=F64),
                                     directions(x / alpha, tuple(memory)))  # fmt: skip
    torch.testing.assert_close(correct(x, tuple(memory), combination(numbers, alpha)), moved)


def test_least_squares_against_an_independent_solution() -> None:
    """The normal equations against lstsq of the weighted rows, with the ridge as more rows."""
    d, missed = torch.randn(3, 40, 6, dtype=F64), torch.randn(40, 6, dtype=F64)
    missed += 0.5 * d[0] - 2 * d[2]
    r = missed.norm(dim=1)
    w = 1 / (r + 0.3 * r.median())
    root = (w / w.sum()).sqrt()[:, None]
    a, b = (root * d).flatten(1).T, (root * missed).flatten()
    for ridge in (1e-3, 0.5):
        more = torch.diag(a.norm(dim=0)) * math.sqrt(ridge)
        exact = torch.linalg.lstsq(torch.cat([a, more]), torch.cat([b, b.new_zeros(3)])).solution
        found = torch.tensor(least_squares(d, missed, ridge), dtype=F64)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_numbers_make_the_wrong_reference_exact() -> None:
    """Gaussian data of one variance v, DDIM-like steps that assume another: Q is then linear in
    the state, so one number a step makes the flow exact, and the fit finds it."""
    model = sg.Gaussian(SDE, torch.zeros(2, dtype=F64), 0.5)
    found = tune_solver(model, Exponential(2, 1.0), steps=4, n=32, end=END)
    assert found.name == "grid and numbers"
    x = start(model, 200, SDE.T, seed=3)
    v = lambda t: 0.25 * SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2  # noqa: E731
    exact = x * torch.sqrt(v(torch.tensor(END)) / v(torch.tensor(SDE.T)))
    error = endpoint_errors(model, x, exact, found.grid(SDE, 4, end=END), found)
    plain = endpoint_errors(
        model, x, exact, grids.default(SDE, 4, end=END, data_std=0.5), Exponential(2, 1.0)
    )
    # What the least ridge (1e-3) leaves of the error, and the reference's own.
    assert float(error.mean()) < 2e-3 * float(plain.mean())


# --- the choice is honest -----------------------------------------------------------------------


def test_chance_is_counted_over_all_signs() -> None:
    """The share of the 2^n signs of the same sizes whose positive ranks sum to no more."""
    gain = torch.tensor([-0.9, 0.2, -0.4, -1.3, 0.05, -0.6, 0.7], dtype=F64)
    ranks = gain.abs().argsort().argsort() + 1
    signs = torch.tensor(list(itertools.product((0, 1), repeat=len(gain))))
    sums, mine = signs @ ranks, ranks[gain > 0].sum()
    assert by_chance(gain) == pytest.approx(float((sums <= mine).double().mean()), rel=1e-12)
    assert by_chance(torch.zeros(9, dtype=F64)) == 1.0


def test_the_typical_error_is_between_two_means() -> None:
    """Of 1, 1 and 25 the arithmetic mean is 9, the geometric one 25^(1/3)."""
    exact = (math.log(9) + math.log(25) / 3) / 2
    assert typical_error(torch.tensor([1.0, 1.0, 25.0], dtype=F64).log()) == pytest.approx(exact)


def test_it_wins_on_trajectories_of_its_own_problem(tuned: Tuned) -> None:
    model = ring(SDE)
    x = start(model, 256, SDE.T, seed=11)
    fine = grids.default(SDE, 400, end=END, data_std=model.facts.std)
    exact = solve(SDE.probability_flow(model), x, fine, Exponential(4, 0.5, corrector=True))
    for k in (6, 10):
        assert tuned.choice(k).name != "default"
        mine = endpoint_errors(model, x, exact, tuned.grid(SDE, k, end=END), tuned)
        usual = grids.default(SDE, k, end=END, data_std=model.facts.std)
        theirs = endpoint_errors(model, x, exact, usual, default_solver(model))
        gain = torch.log(mine / theirs)
        assert by_chance(gain) < 0.05
        # What was promised, within three standard errors of either set.
        spread = 3 * float(gain.std()) * math.sqrt(1 / (3 * 64) + 1 / 256)
        assert abs(float(gain.mean()) - math.log(tuned.choice(k).ratio)) < spread


def test_what_cannot_be_better_is_not_returned() -> None:
    """A Gaussian whose covariance the solver knows: the default has no error to lower."""
    model = correlated(SDE)
    assert model.facts.moments is not None
    for tune in (tune_grid, tune_solver):
        found = tune(model, steps=(4, 8), n=16, end=END)
        assert (found.name, found.ratio) == ("default", 1.0)
        usual = grids.default(SDE, 8, end=END, data_std=model.facts.std)
        assert torch.equal(found.grid(SDE, 8, end=END), usual)


def test_the_path_leads_through_exact_states() -> None:
    """Between its nodes too: of a Gaussian the flow is known in closed form, z is constant up to
    the ratio of two variances."""
    law = sg.Gaussian(SDE, torch.zeros(3, dtype=F64), torch.tensor([0.2, 1.0, 3.0], dtype=F64))
    [fit, *others] = trials(law, END, 8, 0, 20, path=True)
    assert fit.path is not None
    assert all(other.path is None for other in others)
    times = torch.tensor([0.9, 0.4321, 0.2, 0.05, 0.01], dtype=F64)

    def spread(t: Tensor) -> Tensor:
        return torch.sqrt(SDE.alpha(t)[:, None] ** 2 * law.variance + SDE.sigma(t)[:, None] ** 2)

    exact = fit.x * (spread(times) / spread(torch.tensor([SDE.T], dtype=F64)))[:, None]
    # The reference of 80 steps, cubics of its nodes and single precision.
    torch.testing.assert_close(
        torch.stack(fit.path.at(times)).double(), exact, rtol=1e-4, atol=1e-5
    )


def test_what_loses_on_the_last_set_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was fitted: where it loses on the judge's trajectories the default comes back."""
    search = importlib.import_module("sde_gen.tuning.search")
    made = search.trials

    def spoiled(*args: Any, path: bool) -> list[Any]:
        fit, choose, judge = made(*args, path=path)
        model, x = args[0], judge.x
        usual = grids.default(SDE, 8, end=END, data_std=model.facts.std)
        answer = solve(judge.flow, x, usual, default_solver(model))
        return [fit, choose, replace(judge, exact=answer)]  # the default is now without error

    monkeypatch.setattr(search, "trials", spoiled)
    found = tune_solver(mixture(SDE), steps=8, n=32, end=END)
    assert found.name == "default"
    assert found.p_value == 1.0


@pytest.mark.parametrize(("losses", "taken"), [(2, True), (3, False)])
def test_the_judge_weighs_trajectories(losses: int, taken: bool) -> None:
    """Losses of the ranks 1 and 2 of 8 are forgiven: no more have 5 of the 256 signs. Three of
    the largest are not, however much is won."""
    default, rival = Choice(4, Exponential(2)), Choice(4, Exponential(2), (0.2, 0.5, 0.8))
    size = torch.arange(1, 9, dtype=F64)
    gain = -size
    gain[: 2 if taken else 0] *= -1
    gain[8 - (0 if taken else losses) :] *= -1

    class Told(Search):
        def errors(self, choice: Choice, trial: Any) -> Tensor:
            return gain if choice is rival else 0 * gain

    told = Told(cast(Any, None), SDE, END, 1.0, False)
    found = _judged(cast(Any, [None] * 3), told, default, [rival])
    p = by_chance(gain)
    assert (p == pytest.approx(5 / 256)) if taken else p > 0.05
    assert found.name == ("grid" if taken else "default")
    if taken:
        assert found.ratio == pytest.approx(math.exp(float(gain.mean())))


def test_the_score_is_asked_as_often_as_the_docstring_says() -> None:
    rows = 0

    class Counted(sg.GaussianMixture):
        def __call__(self, x: Tensor, t: Any) -> Tensor:
            nonlocal rows
            rows += len(x)
            return super().__call__(x, t)

    known = mixture(SDE)
    model = Counted(SDE, known.log_weights.exp(), known.means, known.variance.sqrt())
    n, steps = 16, (4, 6)
    for tune, numbers in ((tune_grid, False), (tune_solver, True)):
        rows = 0
        tune(model, steps=steps, n=n, end=END)
        each = evaluations(steps, numbers, share=1.0)  # in a plane all are differentiated
        # The simplex may end a trial or two past its number (it finishes the move that it makes),
        # or sooner, and so does polish: what is said is the most, and not much more than it took.
        assert 0.4 * n * each < rows <= n * (each + 4 * sum(steps))


@pytest.mark.parametrize(("minutes", "n"), [(2.0, 60), (100.0, 256), (1e-3, 8)])
def test_minutes_pay_for_trajectories(
    monkeypatch: pytest.MonkeyPatch, minutes: float, n: int
) -> None:
    """A clock by which a call on 8 rows takes 16 hundredths of a second: 3,000 a minute."""
    clock = iter(0.16 * k for k in range(6))
    monkeypatch.setattr("sde_gen.tuning.trials.perf_counter", lambda: next(clock))
    assert affordable(ring(SDE), 256, minutes, 100) == n


def test_tuning_within_minutes_takes_the_rows_that_are_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that stands for a slow network: 8 trajectories of 32, and the first 40 rows."""
    monkeypatch.setattr("sde_gen.tuning.trials.perf_counter", iter(range(9)).__next__)
    torch.manual_seed(0)
    net = MLP((3,), width=16, depth=1, classes=3)
    bound = sg.ScoreNetwork(net, SDE, facts=sg.Facts(std=0.5)).given(y=torch.arange(160) % 3)
    found = tune_grid(bound, steps=4, n=32, minutes=1.0)
    expected = tune_grid(bound.rows(slice(0, 40)), steps=4, n=8)
    assert found.choices[0].shares == expected.choices[0].shares
    assert found.choices[0].p_value == expected.choices[0].p_value


# --- how it is used -----------------------------------------------------------------------------


def test_sample_takes_its_grid_and_numbers() -> None:
    model = ring(SDE)
    found = tune_solver(model, steps=7, n=48)
    times = found.grid(SDE, 7, to_zero=True)
    assert (len(times), float(times[-1])) == (8, 0)
    by_hand = sample(model, 20, 7, seed=1, solver=found, times=times)
    assert torch.equal(sample(model, 20, 7, seed=1, solver=found), by_hand)
    choice = found.choice(6)
    assert choice.numbers is not None
    plain = Tuned([replace(choice, numbers=None)])
    assert not torch.equal(sample(model, 20, 7, seed=1, solver=plain), by_hand)
    model.tuned = found
    assert torch.equal(sample(model, 20, 7, seed=1), by_hand)
    # Noise and a grid of one's own are not what it was tuned for.
    usual = ring(SDE)
    for options in ({"eta": 1.0}, {"times": grids.karras(SDE, 7)}):
        a, b = (sample(m, 20, 7, seed=1, **options) for m in (model, usual))
        assert torch.equal(a, b)


def test_numbers_serve_their_own_grid_only(tuned: Tuned) -> None:
    flow = SDE.probability_flow(ring(SDE))
    x = start(ring(SDE), 8, SDE.T)
    choice = tuned.choice(10)
    for times in (grids.quadratic(SDE, 10, end=END), tuned.grid(SDE, 9, end=END)):
        assert torch.equal(solve(flow, x, times, tuned), solve(flow, x, times, choice.solver))
    # The same levels under another clock are the same grid.
    other = VP(sg.schedules.Cosine())
    levels = torch.tensor(choice.levels, dtype=F64)
    assert choice.fits(other, other.time_at(-2 * levels))


def test_numbers_fit_levels_to_a_hundred_thousandth() -> None:
    times = grids.quadratic(SDE, 4, end=END)
    levels = tuple((-0.5 * SDE.log_snr(times)).tolist())
    choice = Choice(4, Exponential(2), levels=levels, numbers=((0.0,),) * 4)
    assert choice.fits(SDE, times)
    for moved, fits in ((3e-6, True), (3e-5, False)):
        near = SDE.time_at(-2 * torch.tensor([v + moved for v in levels], dtype=F64))
        assert choice.fits(SDE, near) == fits
    assert not choice.fits(SDE, times[1:])


def test_the_nearest_serves_other_numbers_of_steps(tuned: Tuned) -> None:
    assert [tuned.choice(k).steps for k in (1, 6, 7, 8, 10, 500)] == [6, 6, 6, 10, 10, 10]
    for k in (1, 2, 30):
        times = tuned.grid(SDE, k, end=END)
        assert len(times) == k + 1
        assert bool(torch.isfinite(sample(ring(SDE), 5, k + 1, seed=0, solver=tuned)).all())
    assert float(tuned.grid(SDE, 6)[-1]) == pytest.approx(END, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_keeps_its_dtype_and_its_batch(tuned: Tuned, dtype: torch.dtype) -> None:
    model, times = ring(SDE), tuned.grid(SDE, 10, end=END)
    x = start(model, 9, SDE.T).to(dtype)
    y = solve(SDE.probability_flow(model), x, times, tuned)
    assert y.dtype == dtype
    part = solve(SDE.probability_flow(model), x[4:], times, tuned)
    torch.testing.assert_close(y[4:], part, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_images_and_labels() -> None:
    """Any shape, labels bound per sample: each set is tuned on its own labels."""
    torch.manual_seed(0)
    net = MLP((1, 2, 2), width=16, depth=1, classes=3)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    model = sg.ScoreNetwork(net, SDE, facts=sg.Facts(std=0.5)).eval()
    y = torch.arange(5 * 16) % 3
    found = tune_solver(model.given(y=y), steps=5, n=16)
    model.tuned = found
    labels = torch.tensor([0, 1, 2, 0])
    a = sample(model.given(y=labels), 4, 5, seed=0)
    assert (a.shape, a.dtype) == ((4, 1, 2, 2), torch.float32)
    assert torch.equal(a, sample(model.given(y=labels), 4, 5, seed=0, solver=found))
    # A guided score is not what was tuned.
    assert (model + model).tuned is None
    with pytest.raises(ValueError, match="bind 85 rows to the model"):
        tune_grid(model.given(y=y), steps=5, n=17)


def test_the_score_tells_the_covariance() -> None:
    """With nothing but the score, Gaussian data are known: only rounding is left of the error."""
    model = gaussian(SDE)
    model = model.with_facts(replace(model.facts, moments=None))
    found = tune_grid(model, steps=5, n=16, end=END)
    assert found.ratio < 1e-4
    c = dense(found.choices[0].solver.reference)
    torch.testing.assert_close(c, torch.diag(torch.tensor([0.3, 0.6, 1.2], dtype=F64) ** 2))
    # Samples show it to a root of 2 / 5000.
    given = torch.randn(5000, 3, dtype=F64) * torch.tensor([0.3, 0.6, 1.2])
    told = tune_grid(model, steps=5, n=16, end=END, data=given)
    assert found.ratio < told.ratio < 0.2


def dense(known: sg.Moments) -> Tensor:
    """The covariance as a matrix."""
    assert known.basis is not None
    floor, values = known.values[0], known.values[1:]
    return known.basis * (values - floor) @ known.basis.T + floor * torch.eye(len(known.basis))


def test_moments_read_off_a_score() -> None:
    """Of a mixture the third cumulant is left, which noise of 30 to 300 times the variance hides
    by as much; samples would show each entry to a tenth."""
    law = mixture(SDE)
    p, means = law.log_weights.exp(), law.means
    m = p @ means
    inside = p @ law.variance.expand(means.shape)
    exact = ((means - m).T * p) @ (means - m) + torch.diag(inside)
    x = law.sample(64, torch.Generator().manual_seed(1)).double()
    found = score_moments(law, x)
    assert float((dense(found) - exact).norm()) < 0.05 * float(exact.norm())
    assert found.mean is not None
    assert float((found.mean - m).norm()) < 0.05 * float(exact.diagonal().sum().sqrt())


def test_moments_of_more_coordinates_than_samples() -> None:
    """Five wide directions of 80: eight samples read at eight levels show sixteen directions, and
    those five and their variances to the share of them that the others have, 1e-4 / 1."""
    basis = torch.linalg.qr(torch.randn(80, 5, dtype=F64)).Q
    values = torch.tensor([2.0, 1.5, 1.2, 1.1, 1.0], dtype=F64)
    covariance = basis * values @ basis.T + 1e-4 * torch.eye(80, dtype=F64)
    law = sg.Gaussian(SDE, torch.zeros(80, dtype=F64), covariance=covariance)
    found = score_moments(law, law.sample(8, torch.Generator().manual_seed(0)).double())
    assert found.basis is not None
    assert found.basis.shape == (80, 16)
    wide = found.values[1:].sort(descending=True).values[:5]
    torch.testing.assert_close(wide, values + 1e-4, rtol=0.01, atol=0)
    got = dense(found)
    torch.testing.assert_close(basis.T @ got @ basis, torch.diag(values + 1e-4), rtol=0, atol=0.02)


# --- all numbers at once ------------------------------------------------------------------------


def walk(numbers: bool = True) -> tuple[Any, Walk]:
    """Six steps on a mixture, with numbers that are not 0."""
    model = mixture(SDE)
    [trial, _, _] = trials(model, END, 16, 0, 6)
    rows = tuple((0.02 * (i + 1),) * min(i + 1, 4) for i in range(6)) if numbers else None
    shares = (0.2, 0.35, 0.5, 0.7, 0.9)
    levels = tuple((-0.5 * SDE.log_snr(Warped(shares, 0.8)(SDE, 6, end=END))).tolist())
    choice = Choice(6, base_solver(model), shares, levels if numbers else (), rows)
    return trial, Walk(choice, SDE.T, END, 0.8)


def test_a_walk_is_the_tuned_solver() -> None:
    """It ends where ``solve`` with the choice ends, and reads back what it was made of."""
    trial, made = walk()
    again = made.choice(trial, made.start())
    assert again.shares == pytest.approx(made.first.shares, abs=1e-12)
    assert again.numbers is not None
    assert made.first.numbers is not None
    for a, b in zip(again.numbers, made.first.numbers, strict=True):
        assert a == pytest.approx(b)
    tuned = Tuned([made.first], 0.8)
    x = solve(trial.flow, trial.x, tuned.grid(SDE, 6, end=END), tuned)
    missed = made.missed(trial, made.start())
    torch.testing.assert_close(missed, x - trial.exact, rtol=1e-9, atol=1e-12)


def test_derivatives_of_the_ends_by_all_unknowns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against central differences of whole runs; the shift is small here, as they need."""
    monkeypatch.setattr("sde_gen.tuning.polish._SHIFT", 1e-6)
    trial, made = walk()
    theta = made.start()
    found = made.slopes(trial, theta, made.missed(trial, theta))
    assert found.shape == (6 + 1 + 2 + 3 + 4 + 4 + 4, 16, 2)
    for j, slope in enumerate(found):
        h = 1e-5 * np.eye(len(theta))[j]
        central = (made.missed(trial, theta + h) - made.missed(trial, theta - h)) / 2e-5
        torch.testing.assert_close(slope, central, rtol=1e-3, atol=1e-5)


def test_a_move_against_an_independent_solution() -> None:
    """The damped normal equations against lstsq of the weighted rows, damping and ridge as rows;
    and an update makes the derivatives say what the move changed."""
    slopes, e = torch.randn(4, 30, 3, dtype=F64), torch.randn(40, 3, dtype=F64)
    slopes *= 1e-2 * torch.tensor([1.0, 2.0, 5.0, 3.0], dtype=F64)[:, None, None]
    r = e.norm(dim=1)
    soft = 0.3 * r.median()
    w = 1 / (r[:30] ** 2 + soft**2) / 30 + 1 / ((r[:30] + soft) * r.mean() * 30)
    reach = slopes.square().sum((0, 2)).sqrt()
    w = w / 2 / (1 + (reach / (5 * reach.median())) ** 2)
    root = w.sqrt()[:, None]
    a, b = (root * slopes).flatten(1).T, -(root * e[:30]).flatten()
    held = torch.diag(torch.sqrt(0.3 * a.square().sum(0) + 1e-3))
    exact = torch.linalg.lstsq(torch.cat([a, held]), torch.cat([b, b.new_zeros(4)])).solution
    exact[:2] = exact[:2].clamp(-0.7, 0.7)
    move = _move(slopes, e, 0.3, 2)
    torch.testing.assert_close(torch.from_numpy(move), exact, rtol=1e-9, atol=1e-12)
    change = torch.randn(30, 3, dtype=F64)
    _update(slopes, move, change)
    torch.testing.assert_close(torch.einsum("p,pbn->bn", torch.from_numpy(move), slopes), change)


@pytest.mark.parametrize("numbers", [False, True])
def test_polish_only_lowers_the_error(numbers: bool) -> None:
    """By at least a third with numbers, on the trajectories that it sees, choice by choice."""
    trial, made = walk(numbers)
    search = Search(trial, SDE, END, 0.8, numbers)
    first = replace(made.first, numbers=tuple((0.0,) * min(i + 1, 4) for i in range(6))) if (
        numbers) else made.first  # fmt: skip
    found = [first, *polished(trial, first, search.times(first), 0.8)]
    errors = [typical_error(search.errors(c, trial)) for c in found]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0] - (math.log(1.5) if numbers else 0.0)


# --- what cannot work ---------------------------------------------------------------------------

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a bare score": (lambda: tune_grid(sg.Score()), TypeError, "knows its linear process"),
    "another solver": (
        lambda: tune_grid(ring(SDE), cast(Any, sg.Heun())), TypeError, "got Heun"),
    "no steps": (lambda: tune_grid(ring(SDE), steps=()), ValueError, "integers >= 2"),
    "one step": (lambda: tune_solver(ring(SDE), steps=(5, 1)), ValueError, ">= 2, got 1"),
    "half a step": (lambda: tune_grid(ring(SDE), steps=2.5), ValueError, ">= 2, got 2.5"),  # type: ignore[arg-type]
    "a NaN score": (
        lambda: tune_grid(Bound(40), n=8), FloatingPointError, "score is not finite at t = 1,"),
    "30 labels": (
        lambda: tune_grid(Bound(30), n=8), ValueError, "bind 40 rows .*; got 30"),
    "other data": (
        lambda: tune_grid(ring(SDE), data=torch.zeros(9, 3)), ValueError,
        r"data must be \(N, 2\), got \(9, 3\)"),
    "few": (lambda: tune_solver(ring(SDE), n=4), ValueError, "n must be an integer >= 8"),
    "no memory": (
        lambda: tune_solver(ring(SDE), Exponential(1)), ValueError, "order 1 without corrector"),
    "noise prediction": (lambda: tune_solver(ring(SDE), deis(3)), ValueError, "infinite"),
    "no choices": (lambda: Tuned([]), ValueError, "at least one"),
    "noise": (
        lambda: sample(ring(SDE), 4, 5, eta=1.0, solver=Tuned([Choice(4, Exponential(2))])),
        TypeError, "solves ODEs"),
}  # fmt: skip


class Bound(sg.Score):
    """A score that knows how many samples it was bound for."""

    def __init__(self, batch: int) -> None:
        self.batch, self.sde, self.facts = batch, SDE, sg.Facts((2,))

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        return x * math.nan

    def rows(self, index: slice | Tensor) -> sg.Score:
        return Bound(len(torch.arange(self.batch)[index]))


@pytest.mark.parametrize("steps", [5, np.int64(5), (5,), [np.int64(5), 5], np.array([5])])
def test_steps_and_sizes_are_any_integers(steps: Any) -> None:
    assert checked(Bound(40), None, steps, cast(int, np.int32(8))) == (5,)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_raises(name: str) -> None:
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        make()


# --- on disk ------------------------------------------------------------------------------------


def network() -> sg.ScoreNetwork:
    torch.manual_seed(0)
    net = MLP((3,), width=16, depth=1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return sg.ScoreNetwork(net, SDE, facts=sg.Facts(std=0.5)).eval()


@pytest.fixture(scope="module")
def trained() -> sg.ScoreNetwork:
    torch.manual_seed(0)
    model = network()
    found = tune_solver(model, steps=(5, 8), n=24)
    first, second = found.choices
    assert first.numbers is not None
    # Whatever was taken for the second: a covariance that both share.
    second = replace(second, solver=first.solver, shares=(0.1, 0.3, 0.5, 0.6, 0.7, 0.9))
    model.tuned = Tuned([first, second], found.data_std, found.end, found.weights)
    return model


def test_a_tuned_model_comes_back(trained: sg.ScoreNetwork, tmp_path: Path) -> None:
    sg.save(trained, tmp_path)
    found = sg.load(tmp_path)
    assert isinstance(found.tuned, Tuned)
    assert repr(found.tuned) == repr(trained.tuned)
    for steps in (5, 6, 8, 20):
        a, b = (sample(m, 6, steps, seed=2) for m in (trained, found))
        assert torch.equal(a, b)
    # What many choices share is kept once.
    first, *others = (c.solver.reference for c in found.tuned.choices)
    assert all(other.basis is first.basis for other in others if other.basis is not None)
    # One that is not tuned leaves nothing of it behind.
    sg.save(network(), tmp_path)
    assert sg.load(tmp_path).tuned is None


WRONG: dict[str, tuple[object, str]] = {
    "solver.order": ("three", r"solver.order must be an integer, got 'three'"),
    "solver.corrector": (1, r"solver.corrector must be true or false"),
    "solver.weights.class": ("Trapezoid", r"solver.weights must be .*Spectral.*'Trapezoid'"),
    "solver.weights.dimensions": (0, r"solver.weights is no Spectral: dimensions"),
    "solver.class": ("Heun", r"solver must be Exponential or Leap, got .*'Heun'"),
    "solver.reference.values.tensor": ("x", r"solver.reference.values names 'x'"),
    "steps": (0, r"is no Choice: need steps >= 1"),
    "ratio": (-1.0, r"is no Choice: need .*ratio > 0"),
    "levels": ([1.0], r"is no Choice: 4 steps have as many numbers and a level more"),
    "numbers": ([[0.0] * 4] * 4, r"is no Choice: numbers\[0\] are 4, with 1 directions"),
    "shares": ([0.1, "1", 0.9], r"shares\[1\] must be a finite number"),
    "shares ": ([0.1, 0.9, 0.5], r"is no Choice: shares of 4 steps are 3 numbers that rise"),
}


@pytest.mark.parametrize("where", WRONG)
def test_what_is_wrong_is_named(trained: sg.ScoreNetwork, tmp_path: Path, where: str) -> None:
    sg.save(trained, tmp_path)
    value, message = WRONG[where]
    config = json.loads((tmp_path / CONFIG).read_text())
    node = config["tuned"]["choices"][0]
    assert node["numbers"] is not None
    *path, last = where.split(".")
    for key in path:
        node = node[key]
    node[last.strip()] = value
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config.json: tuned.choices\[0\].?{message}"):
        sg.load(tmp_path)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = network()
    kinds = (sg.Heun(), Tuned([Choice(4, deis(2))]), Tuned([Choice(4, sg.solvers.ddim(0.5))]))
    for solver in kinds:
        model.tuned = solver
        with pytest.raises(TypeError, match=r"can be saved|cannot be saved"):
            sg.save(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_the_command_line_tunes_and_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    sg.save(network(), folder)
    assert main(["tune", str(folder), "--steps", "5", "--n", "16"]) == 0
    assert "4 steps" in capsys.readouterr().out
    assert isinstance(sg.load(folder).tuned, Tuned)
    out = str(tmp_path / "x.npz")
    assert main(["sample", str(folder), "--out", out, "--steps", "5"]) == 0
    assert "tuned to this model" in capsys.readouterr().out


def test_weights_with_options_come_back(tmp_path: Path) -> None:
    model = network()
    weights = sg.solvers.Spectral(0.3, 3, ridge=0.02, power=0.4)
    model.tuned = Tuned([Choice(4, Exponential(3, 0.3, corrector=True, weights=weights))])
    sg.save(model, tmp_path)
    found = sg.load(tmp_path).tuned
    assert isinstance(found, Tuned)
    same = found.choices[0].solver.weights
    assert isinstance(same, sg.solvers.Spectral)
    assert (same.ridge, same.power) == (0.02, 0.4)
    a, b = (sample(model, 6, 5, seed=2, solver=t) for t in (model.tuned, found))
    assert torch.equal(a, b)
