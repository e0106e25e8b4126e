"""The error budget against closed forms: Gaussian data, where every flow is affine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import F64, gaussian, mixture, ring
from torch import Tensor

import sde_gen as sg
from sde_gen import VP, Exponential, Gaussian, error_budget, grids
from sde_gen.budget import Budget, _jackknife, _rms
from sde_gen.likelihood import Estimate
from sde_gen.metrics import energy_distance

SDE = VP(sg.schedules.Linear(0.1, 4.0))  # alpha(T) = 0.36: a prior that is visibly wrong
END = 0.01
V, M = 0.5, 0.3  # variance and mean of the data
N = 4000


def data_law() -> Gaussian:
    return Gaussian(SDE, torch.full((2,), M, dtype=F64), math.sqrt(V))


def blind(score: sg.Score) -> sg.Score:
    """The score without the moments: runs start from N(0, sigma^2)."""
    given = score.given()
    return given.with_facts(replace(given.facts, moments=None, std=math.sqrt(V)))


def level(t: float) -> tuple[float, float]:
    """alpha and w = (sigma / alpha)^2."""
    alpha = float(SDE.alpha(t))
    return alpha, (float(SDE.sigma(t)) / alpha) ** 2


def flow(v: float, m: float) -> tuple[float, float]:
    """y_end = a y_T + b along the flow of N(m, v), in y = x / alpha."""
    (_, w), (_, w_end) = level(SDE.T), level(END)
    a = math.sqrt((v + w_end) / (v + w))
    return a, (1 - a) * m


def ddim(times: Tensor, v: float, m: float) -> tuple[float, float]:
    """The same for DDIM's steps: y -> D + (s' / s) (y - D), D = m + v / (v + w) (y - m)."""
    a = 1.0
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        (_, w), (_, w_s) = level(t), level(s)
        r = math.sqrt(w_s / w)
        a *= r + (1 - r) * v / (v + w)
    return a, (1 - a) * m


def distance(f: tuple[float, float], g: tuple[float, float], std: float) -> float:
    """RMS of f(std z) - g(std z) over z ~ N(0, 1)."""
    return math.hypot((f[0] - g[0]) * std, f[1] - g[1])


def numbers(budget: Budget) -> list[tuple[float, float] | None]:
    """All that it holds, to the bit."""
    terms = (getattr(budget, f.name) for f in fields(budget))
    return [t if t is None else (float(t.value), float(t.standard_error)) for t in terms]


def close(term: Estimate, exact: float) -> None:
    # Four standard errors, of which each term must have one that is no larger than 4 / sqrt(N).
    assert abs(term.value - exact) < 4 * term.standard_error + 1e-7
    assert term.standard_error < 4 * exact / math.sqrt(N) + 1e-9


def test_every_term_along_paths_is_its_closed_form() -> None:
    v_model, m_model = 0.4, 0.45
    wrong = Gaussian(SDE, torch.full((2,), m_model, dtype=F64), math.sqrt(v_model))
    times = grids.log_snr(SDE, 6, end=END)
    found = error_budget(blind(wrong), data_law(), solver=Exponential(1), times=times, n=N)
    _, w = level(SDE.T)
    std = math.sqrt(w)  # of y_T
    student, model, exact = ddim(times, v_model, m_model), flow(v_model, m_model), flow(V, M)
    # From the matched start y_T = m + sqrt(V + w) z the exact flow ends at the data's own law.
    true = (math.sqrt(V + level(END)[1]) / std, M)
    close(found.discretisation, distance(student, model, std))
    close(found.score, distance(model, exact, std))
    close(found.prior, distance(exact, true, std))
    close(found.total, distance(student, true, std))
    parts = (found.discretisation, found.score, found.prior)
    assert found.total.value <= sum(p.value for p in parts) + 1e-12
    assert found.floor is None


def test_each_error_is_alone_where_the_others_are_taken_away() -> None:
    law = data_law()
    # The law itself: it knows its moments, so start and steps are exact.
    clean = error_budget(law, law, 4, n=64)
    for term in (clean.discretisation, clean.score, clean.prior, clean.total):
        assert term.value < 1e-8
    # A start that does not know them: the prior's error only.
    started = error_budget(blind(law), law, 4, n=64, solver=Exponential(2, V))
    assert max(started.discretisation.value, started.score.value) < 1e-8
    assert float(started.prior) == pytest.approx(float(started.total), rel=1e-9)
    assert started.total.value > 1e-3
    # Rough steps: the discretisation only.
    rough = error_budget(law, law, 4, n=64, solver=Exponential(1))
    assert max(rough.score.value, rough.prior.value) < 1e-8
    assert float(rough.discretisation) == pytest.approx(float(rough.total), rel=1e-6)
    assert rough.total.value > 1e-3


def test_the_grid_is_that_of_sample_up_to_its_last_step() -> None:
    """Runs as ``sample`` takes them are compared where its last call begins."""
    law, calls = mixture(SDE), 0

    class Counted(sg.Score):
        sde, facts = law.sde, law.facts

        def __call__(self, x: Tensor, t: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return law(x, t)

    error_budget(Counted(), law, 9, n=8, fine=20)
    assert calls == 8 + 20
    model = ring(sg.VP())
    model.tuned = sg.tune_grid(model, steps=5, n=32)
    tuned, other = (error_budget(m, model, 5, n=64) for m in (model, ring(sg.VP())))
    assert tuned.discretisation.value < other.discretisation.value


def test_moments_of_a_law_that_does_not_say_them() -> None:
    """A mixture is sampled for its moments: its own start, but for what 20,000 samples leave."""
    law = mixture(SDE)
    p = law.log_weights.exp()
    mean = p @ law.means
    centred = law.means - mean
    covariance = (centred.T * p) @ centred + torch.diag(p @ law.variance)
    told = mixture(SDE)
    told = told.with_facts(replace(told.facts, moments=sg.Moments.of(covariance, mean)))
    a, b = (float(error_budget(mixture(SDE), m, 5, n=200).prior) for m in (law, told))
    # Mean and deviations are known to 1 / sqrt(20,000), of unit-sized data scaled by alpha_T.
    assert a == pytest.approx(b, abs=5 / math.sqrt(20_000))


def normal_energy(shift: float, a: float, b: float) -> float:
    """Energy distance of N(0, a^2) and N(shift, b^2) on the line, by E|N(m, s^2)|."""

    def mean(m: float, s: float) -> float:
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(
            m / (s * math.sqrt(2))
        )

    return (
        2 * mean(shift, math.hypot(a, b)) - mean(0, a * math.sqrt(2)) - mean(0, b * math.sqrt(2))
    )


@pytest.mark.parametrize("solver", [None, Exponential(1)], ids=["default", "DDIM"])
def test_every_term_between_laws_is_its_closed_form(solver: Exponential | None) -> None:
    generator = torch.Generator().manual_seed(5)
    data, real = (
        M + math.sqrt(V) * torch.randn(n, 1, generator=generator, dtype=F64) for n in (500, 2000)
    )
    v, m = 0.9, -0.2
    model = blind(Gaussian(SDE, torch.full((1,), m, dtype=F64), math.sqrt(v)))
    times = grids.log_snr(SDE, 3, end=END)
    found = error_budget(model, data, times=times, solver=solver or Exponential(3, v), real=real)
    _, w = level(SDE.T)
    a, b = flow(v, m)
    c, d = flow(v, m) if solver is None else ddim(times, v, m)
    # Means and standard deviations at the end: from noised data, from the prior, by few steps.
    laws = [(M, math.sqrt(V)), (a * M + b, a * math.sqrt(V + w)), (b, a * math.sqrt(w)),
            (d, c * math.sqrt(w))]  # fmt: skip
    energies = [normal_energy(mean - M, math.sqrt(V), std) for mean, std in laws]
    terms = [found.score, found.prior, found.discretisation]
    # 2000 real samples add half of what 500 drawn ones do: 5 standard errors in place of 4.
    for term, low, high in zip(terms, energies, energies[1:], strict=False):
        assert abs(term.value - (high - low)) < 5 * term.standard_error + 1e-4
    assert found.floor is not None
    assert abs(found.floor.value) < 5 * found.floor.standard_error
    rises = sum(float(t) for t in (*terms, found.floor))
    assert float(found.total) == pytest.approx(rises, abs=1e-12)
    if solver is None:
        assert abs(found.discretisation.value) < 1e-6


def test_error_bars_cover() -> None:
    """Standard errors against the spread of the statistic over sets."""
    torch.manual_seed(1)
    roots = [_rms(torch.randn(100, 3, dtype=F64)) for _ in range(400)]
    spread = float(torch.stack([r.value for r in roots]).std())
    # A standard deviation of 400 numbers is known to 1 / sqrt(800): three times that.
    assert sum(float(r.standard_error) for r in roots) / 400 == pytest.approx(spread, rel=0.11)
    x = torch.randn(2000, 100, dtype=F64)
    parts = torch.arange(100) % 10
    less = torch.stack([x[:, parts != k].mean(1) for k in range(10)], 1)
    squares = [_jackknife(z.mean(), a).standard_error ** 2 for z, a in zip(x, less, strict=True)]
    # Of a mean the jackknife's variance is unbiased; 2000 of 9 degrees of freedom: 1 %.
    assert sum(squares) / 2000 == pytest.approx(0.01, rel=0.04)


def test_labels_follow_the_data() -> None:
    net = sg.networks.MLP((1,), width=8, depth=1, classes=2)
    model = sg.ScoreNetwork(net, sg.VP()).eval()
    y = torch.arange(12) % 2
    data = torch.randn(12, 1)
    found = error_budget(model.given(y=y), data, 4, real=torch.randn(30, 1), fine=16)
    assert isinstance(found, Budget)
    assert "discretisation" in str(found)
    with pytest.raises(ValueError, match="is for 12 samples, the state has 5"):
        error_budget(model.given(y=y), data[:5], 4, real=data)


def test_what_is_given_is_named_where_it_is_wrong() -> None:
    data, law = torch.zeros(9, 2), data_law()
    with pytest.raises(TypeError, match=r"law .* must be real, got torch\.complex64"):
        error_budget(law, data * 1j)
    with pytest.raises(TypeError, match=r"real must be real, got torch\.complex64"):
        error_budget(law, data, real=data * 1j)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        error_budget(law, law, 4, n=0)
    with pytest.raises(ValueError, match="fine must be an integer >= 1, got 0"):
        error_budget(law, law, 4, fine=0)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "bare": (lambda: error_budget(sg.Score(), data_law()), TypeError, "knows its linear process"),
    "process": (
        lambda: error_budget(data_law(), gaussian(sg.VP())), ValueError, "must be that of"),
    "silent": (
        lambda: error_budget(data_law(), blind(data_law()), 4, n=8), TypeError, "its moments"),
    "no real": (lambda: error_budget(data_law(), torch.zeros(9, 2)), ValueError, "real samples"),
    "integers": (
        lambda: error_budget(data_law(), torch.zeros(9, 2, dtype=torch.int64)), TypeError, "fl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_raises(name: str) -> None:
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        make()


def test_a_distance_of_ones_own() -> None:
    seen = []

    def counted(x: Tensor, y: Tensor) -> float:
        seen.append(len(x))
        return energy_distance(x, y)

    data = torch.randn(40, 2)
    error_budget(blind(data_law()), data, 4, real=torch.randn(50, 2), distance=counted, fine=16)
    assert set(seen) == {40, 36}


def test_arrays_and_numpys_integers_are_taken_and_no_global_generator_is_read() -> None:
    generator = torch.Generator().manual_seed(0)
    data, real = (torch.randn(n, 2, generator=generator) for n in (20, 30))
    model, before = blind(data_law()), torch.get_rng_state()
    expected = error_budget(model, data, 4, real=real, fine=16, seed=3)
    four, fine, seed, n = np.int64(4), np.int32(16), np.int64(3), np.int64(20)
    found = error_budget(model, data.numpy(), four, real=real.numpy(), fine=fine, seed=seed)  # type: ignore[arg-type]
    assert numbers(found) == numbers(expected)
    exact = error_budget(model, data_law(), 4, n=n, fine=16)  # type: ignore[arg-type]
    assert numbers(exact) == numbers(error_budget(model, data_law(), 4, n=20, fine=16))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_solver_that_draws_noise_draws_it_from_the_seed() -> None:
    runs = [
        error_budget(data_law(), data_law(), 6, n=20, fine=16, seed=s, solver=sg.Churn(sg.Heun()))
        for s in (1, 1, 2)
    ]
    first, again, other = map(numbers, runs)
    assert first == again != other
