"""A first step that asks where the score says something: exact where that is possible, of its
order elsewhere, and ``Exponential`` where there is nothing to leap over."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import (
    F64,
    correlated,
    draw,
    gaussian_flow,
    line,
    powerlaw,
    quantile_flow,
    rms,
    slopes,
    start,
)
from torch import Tensor

import sde_gen as sg
from sde_gen import EDM, VP, Exponential, Gaussian, RectifiedFlow, default_solver, grids, solve
from sde_gen.moments import isotropic
from sde_gen.ops import Time, as_time
from sde_gen.solvers import Leap

SDES = {"vp": (VP(), 1e-3), "edm": (EDM(80.0), 0.002)}
MEAN = torch.tensor([0.8, -0.5, 0.3], dtype=F64)


class Asked(sg.Score):
    """A score that keeps the times and states that it was asked at."""

    def __init__(self, inner: sg.Score) -> None:
        self.inner, self.sde, self.facts = inner, inner.sde, inner.facts
        self.at: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.at.append(float(as_time(t)))
        self.states.append(x)
        return self.inner(x, t)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("steps", [4, 5, 12])
def test_gaussian_data_are_exact_whether_their_mean_is_known_or_not(name: str, steps: int) -> None:
    sde, end = SDES[name]
    law = Gaussian(sde, MEAN, torch.full((3,), 0.6, dtype=F64))
    x = start(law, 40, sde.T)
    times = grids.default(sde, steps, end=end, data_std=0.6)
    exact = gaussian_flow(law, x, sde.T, end)
    for mean in (None, MEAN):
        solver = Leap(3, replace(isotropic(0.36), mean=mean), corrector=True)
        assert solver.asked_at(sde, times) is not None
        y = solve(sde.probability_flow(law), x, times, solver)
        torch.testing.assert_close(y, exact, rtol=0, atol=1e-12)


def test_gaussian_data_of_a_known_covariance_are_exact() -> None:
    sde, end = SDES["vp"]
    law = correlated(sde)
    assert law.facts.moments is not None
    x, times = start(law, 40, 1.0), grids.default(sde, 5, end=end, data_std=law.facts.std)
    for known in (law.facts.moments, replace(law.facts.moments, mean=None)):
        y = solve(sde.probability_flow(law), x, times, Leap(4, known, corrector=True))
        torch.testing.assert_close(y, gaussian_flow(law, x, 1.0, end), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mean", [None, torch.tensor([0.4], dtype=F64)])
def test_one_call_a_step_where_and_of_what_the_text_says(mean: Tensor | None) -> None:
    """t*, the guess, Q and the state at t*, written out; from there ``Exponential``."""
    sde, c = EDM(80.0), 0.5
    law = Asked(line(sde))
    x = 80 * draw(30, 1)
    times = grids.default(sde, 6, end=0.01)
    reference = replace(isotropic(c), mean=mean)
    found = solve(sde.probability_flow(law), x, times, Leap(3, reference, corrector=True))
    s = times.tolist()  # EDM: sigma is the time, alpha is 1
    at = s[1] * (s[1] / s[2]) ** (1 - 0.3 * (5 / 6) ** 4)
    assert law.at == pytest.approx([at, *s[1:-1]], rel=1e-12)
    a = math.sqrt((c + at**2) / (c + 80**2))
    m = 0.0 if mean is None else mean
    guess = a * x + (1 - a) * m
    torch.testing.assert_close(law.states[0], guess)
    q = guess + (c + at**2) * law.inner(guess, at)
    y = a * x + (1 - a) * q

    class First(sg.Score):
        """The score, but at t* that which has this Q in the state there."""

        def __init__(self) -> None:
            self.sde, self.facts = sde, law.facts

        def __call__(self, z: Tensor, t: Time) -> Tensor:
            return (q - z) / (c + at**2) if float(as_time(t)) == at else law.inner(z, t)

    rest = torch.tensor([at, *s[1:]], dtype=F64)
    solver = Exponential(3, c, corrector=True)
    expected = solve(sde.probability_flow(First()), y, rest, solver)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SDES)
def test_the_order_is_that_of_exponential(name: str) -> None:
    sde, end = SDES[name]
    law = line(sde)
    x = start(law, 200, sde.T)
    exact = quantile_flow(law, x, sde.T, end)
    errors = []
    for n in (24, 48, 96):
        times = grids.default(sde, n, end=end, data_std=0.8)
        solver = Leap(3, 0.64, corrector=True)
        assert solver.asked_at(sde, times) is not None
        errors.append(rms(solve(sde.probability_flow(law), x, times, solver) - exact))
    assert min(slopes(errors)) > 3.3


@pytest.mark.parametrize("name", SDES)
def test_a_leap_is_worth_a_call_of_five(name: str) -> None:
    """On Gaussian data of many scales: five calls with it leave less than six without."""
    sde, end = SDES[name]
    law = powerlaw(sde)
    x, v = start(law, 100, sde.T), law.facts.std**2
    exact = gaussian_flow(law, x, sde.T, end)
    errors = []
    for kind, steps in ((Leap, 5), (Exponential, 6)):
        times = grids.default(sde, steps, end=end, data_std=law.facts.std)
        y = solve(sde.probability_flow(law), x, times, kind(4, v, corrector=True))
        errors.append(rms(y - exact))
    assert errors[0] < errors[1]


def test_it_starts_where_no_signal_is_left() -> None:
    sde = RectifiedFlow()
    law = Asked(Gaussian(sde, MEAN, torch.full((3,), 0.6, dtype=F64)))
    z = draw(20, 3)
    times = grids.default(sde, 6, end=0.01, data_std=0.6)
    y = solve(sde.probability_flow(law), z, times, Leap(3, 0.36, corrector=True))
    root = torch.sqrt(torch.tensor(0.99**2 * 0.36 + 0.01**2, dtype=F64))
    torch.testing.assert_close(y, 0.99 * MEAN + root * z, rtol=0, atol=1e-12)
    assert law.at[0] < 1


def times_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


ELSEWHERE: dict[str, tuple[float, Tensor]] = {
    "with noise": (1.0, grids.default(VP(), 6)),
    "from the middle": (0.0, grids.default(VP(), 6, start=0.6)),
    "three steps": (0.0, grids.default(VP(), 3)),
    "a first step no longer than the second": (0.0, times_of(1.0, 0.99, 0.6, 0.3, 0.1)),
    "upwards": (0.0, grids.default(VP(), 6).flip(0)),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_elsewhere_it_is_exponential(name: str) -> None:
    eta, times = ELSEWHERE[name]
    sde = VP()
    process, x = sde.reverse(line(sde), eta), draw(20, 1)
    found, expected = (
        solve(process, x, times, kind(2, 0.5, corrector=True), 3) for kind in (Leap, Exponential)
    )
    assert torch.equal(found, expected)


def test_data_as_wide_as_the_noise_are_asked_at_the_start() -> None:
    sde = EDM(80.0)
    times = grids.default(sde, 6, data_std=3.0)
    assert Leap(3, 9.0).asked_at(sde, times) is None
    assert Leap(3, 1.0).asked_at(sde, times) is not None
    assert Leap(3, math.inf).asked_at(sde, times) is None
    # Not without having asked down to where the data show: four times their spread.
    steep = times_of(80.0, 2.0, 1.9, 1.0, 0.1)
    assert Leap(3, 1.0).asked_at(sde, steep) == pytest.approx(4.0)


def test_without_a_width_of_the_data_it_starts_as_exponential() -> None:
    law = sg.Gaussian(sg.VP(), torch.zeros(2), 0.5)
    found, plain = (sg.sample(law, 5, 5, seed=0, solver=s) for s in (Leap(3), sg.Exponential(3)))
    assert torch.equal(found, plain)


def test_it_is_the_default_of_a_flow() -> None:
    score = line(VP())
    assert type(default_solver(score)) is Leap
    assert type(default_solver(score, 1.0)) is Exponential
