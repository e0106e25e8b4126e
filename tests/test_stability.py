"""A warning where a run would explode, and none where it is sane."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from laws import affine_run
from problems import F64
from torch import Tensor

import sde_gen as sg
from sde_gen import Exponential, Solver, grids
from sde_gen.solvers import stability
from sde_gen.solvers.stability import spread

SDE = sg.VP()
MODES = sg.GaussianMixture(SDE, [0.5, 0.5], torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.3)
WIDTH = float(MODES.sample(100_000, torch.Generator().manual_seed(0)).square().mean().sqrt())

WILD: list[tuple[Solver | None, float, int]] = [
    (Exponential(3), 2.0, 10),
    (Exponential(4, corrector=True), 1.0, 10),
    (sg.EulerMaruyama(), 3.0, 10),
    (sg.EulerMaruyama(), 1.5, 5),
    (sg.Heun(), 2.0, 10),
    (sg.SRA(), 3.0, 25),
    (sg.TorchSDE("heun"), 3.0, 10),
    (sg.PredictorCorrector(sg.EulerMaruyama(), reference=0.6), 3.0, 10),
    (sg.PredictorCorrector(), 3.0, 10),
]
SANE: list[tuple[Solver | None, float, int]] = [
    *((None, eta, 25) for eta in (0.0, 1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 7.0, 100.0)),
    *((None, eta, steps) for eta in (1.0, 3.0, 4.0, 20.0) for steps in (3, 5, 10, 100)),
    *((Exponential(3, 0.6, corrector=True), eta, 10) for eta in (1.0, 2.0, 10.0)),
    (Exponential(2), 10.0, 25),
    (Exponential(2, 0.6), 5.0, 10),
    (Exponential(1, 0.6), 5.0, 10),
    *((Exponential(1), eta, steps) for eta in (1.0, 3.0, 10.0) for steps in (2, 10)),
    (Exponential(2), 2.0, 25),
    (Exponential(3), 1.5, 25),
    (sg.EulerMaruyama(), 1.5, 25),
    (sg.Heun(), 2.0, 25),
    (sg.SRA(), 2.0, 25),
    (sg.TorchSDE("heun"), 1.0, 25),
    (sg.Churn(), 1.5, 25),
    (sg.PredictorCorrector(reference=0.6), 1.0, 25),
]


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, Solver) else str(value)


def width(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) / WIDTH


@pytest.mark.parametrize(("solver", "eta", "steps"), WILD, ids=name)
def test_it_warns_and_the_run_explodes(solver: Solver | None, eta: float, steps: int) -> None:
    message = rf"the steps are too long for eta = {eta:g}: in these {steps} steps .* spreads"
    with pytest.warns(UserWarning, match=message) as caught:
        x = sg.sample(MODES, 2000, steps, seed=0, eta=eta, solver=solver)
    assert "\n" not in str(caught[0].message)
    assert len(caught) == 1
    assert width(x) > 1.5


@pytest.mark.parametrize(("solver", "eta", "steps"), SANE, ids=name)
def test_it_is_silent_and_the_run_is_sane(solver: Solver | None, eta: float, steps: int) -> None:
    x = sg.sample(MODES, 2000, steps, seed=0, eta=eta, solver=solver)
    assert width(x) < 1.3


def test_a_solver_that_chooses_its_steps_is_not_asked() -> None:
    assert sg.sample(MODES, 4, 2, seed=0, eta=3.0, solver=sg.Adaptive(0.3, 0.3)).shape == (4, 2)


def test_solve_warns_of_a_score_of_ones_own_and_of_noise_that_the_solver_adds() -> None:
    x, times = 152 * torch.randn(100, 2), grids.default(SDE, 10)
    with pytest.warns(UserWarning, match="too long for eta = 3: in these 10 steps Exponential"):
        sg.solve(SDE.reverse(lambda x, t: MODES(x, t), 3.0), x, times, Exponential(4), 0)
    solver = sg.PredictorCorrector(eta=6.0, reference=0.6)
    with pytest.warns(UserWarning, match="too long for eta = 6: in these 10 steps PredictorCorr"):
        sg.solve(SDE.probability_flow(MODES), x / 152, times, solver, 0)


def test_it_warns_before_the_first_call() -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the score was called")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="too long"):
            sg.solve(
                SDE.reverse(score, 3.0), torch.zeros(2, 2), grids.default(SDE, 10), sg.Heun(), 0
            )


@pytest.mark.filterwarnings("ignore:the steps are too long")
@pytest.mark.parametrize("sde", [SDE, sg.EDM(), sg.VE(), sg.SubVP()], ids=repr)
@pytest.mark.parametrize(
    "solver", [sg.EulerMaruyama(), Exponential(2), Exponential(2, 0.5)], ids=name
)
def test_the_spread_is_that_of_the_exact_run(sde: sg.LinearSDE, solver: Solver) -> None:
    """By unit impulses: 256 draws tell a spread to 1 / sqrt(512)."""
    eta, times, exact = 2.0, grids.default(sde, 12), []
    for v in (1 / 400, 1 / 25, 1.0):
        data = sg.Gaussian(sde, torch.zeros(1, dtype=F64), math.sqrt(v))
        _, gain, noise = affine_run(sde.reverse(data, eta), solver, times, 12, 1)
        start = sde.alpha(times[0]) ** 2 * v + sde.sigma(times[0]) ** 2
        exact.append(float(gain**2 * start + noise))
    scale = float(sde.alpha(times[-1]) ** 2 + sde.sigma(times[-1]) ** 2)
    process = sde.reverse(lambda x, t: x, eta)
    found = spread(process, solver, solver.plan(process, times), torch.zeros(3, 2))
    assert found == pytest.approx(math.sqrt(max(exact) / scale), rel=4 / math.sqrt(512))


def test_the_scale_of_the_data_is_free() -> None:
    """Noise, data and reference ten times as large: the same run, ten times as large."""
    found = []
    for scale in (1.0, 10.0):
        sde, model = sg.EDM(80 * scale), sg.Score()
        model.facts = sg.Facts(std=scale)
        process, solver = sde.reverse(model, 2.0), Exponential(2, (0.5 * scale) ** 2)
        times = scale * grids.karras(sg.EDM(), 12)
        found.append(spread(process, solver, solver.plan(process, times), torch.zeros(3, 2)))
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_matrix_processes_too() -> None:
    """Exact steps have the exact law of wide data, and long ones explode."""
    sde = sg.CriticallyDamped()
    x = torch.zeros(2, 2, 3)

    def found(solver: Solver, eta: float, steps: int) -> float:
        process, times = sde.reverse(lambda x, t: x, eta), grids.default(sde, steps)
        return spread(process, solver, solver.plan(process, times), x)

    # Three components and two kinds of state in 256 numbers or more.
    assert found(sg.Propagator(2), 1.0, 12) == pytest.approx(1, abs=4 / math.sqrt(512))
    assert found(sg.Heun(), 1.0, 60) == pytest.approx(1, abs=4 / math.sqrt(512) + 0.05)
    # Its noise is bounded in long steps, that of Heun is not.
    assert found(sg.Propagator(2), 10.0, 25) == pytest.approx(1, abs=4 / math.sqrt(512))
    assert found(sg.Heun(), 3.0, 10) > 100
    model = sg.Lifted(
        sg.GaussianMixture(sg.EDM(250.0), [1.0, 1.0], torch.tensor([[-1.0], [1.0]]), 0.3), sde
    )
    with pytest.warns(UserWarning, match="too long for eta = 3"):
        sg.sample(model, 10, 10, seed=0, eta=3.0, solver=sg.Heun())


@pytest.mark.parametrize(("ratio", "warned"), [(1.9, False), (2.0, False), (2.0001, True)])
def test_twice_the_spread_of_the_data_is_still_no_explosion(
    ratio: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stability, "spread", lambda *_: ratio)
    process, times = SDE.reverse(MODES, 1.0), grids.log_snr(SDE, 5)
    solver = sg.EulerMaruyama()
    said = stability.too_long(process, solver, solver.plan(process, times), torch.zeros(1, 2))
    assert bool(said) is warned
