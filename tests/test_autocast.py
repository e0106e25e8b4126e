"""Under ``torch.autocast`` a network may run in half precision, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import correlated, mixture, powerlaw
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import grids
from sde_gen.tuning import Choice
from sde_gen.tuning.numbers import least_squares

SDE = sg.VP()
CLD = sg.CriticallyDamped()
LIFTED = sg.Lifted(mixture(sg.EDM(250.0)), CLD)
DATA = correlated(SDE)
"""Its moments hold a matrix, which every step of the default solver multiplies with."""
TUNED = sg.tuning.Tuned([Choice(6, sg.Exponential(3, DATA.facts.moments, corrector=True))])

SOLVERS: list[tuple[sg.Solver, float]] = [
    *(
        (solver, eta)
        for eta in (0.0, 1.0)
        for solver in (
            sg.EulerMaruyama(),
            sg.Heun(),
            sg.SRA(),
            sg.Exponential(2, DATA.facts.moments),
            sg.Exponential(3, DATA.facts.moments, corrector=True),
            sg.Adaptive(0.05, 0.05),
            sg.Churn(sg.Exponential(1, DATA.facts.moments)),
            sg.PredictorCorrector(reference=DATA.facts.moments),
            sg.PredictorCorrector(),
            *(sg.TorchSDE(method) for method in ("euler", "midpoint", "heun", "srk")),
        )
    ),
    (sg.RungeKutta(), 0.0),
    (sg.SciPy(), 0.0),
    (TUNED, 0.0),
]
MATRIX: list[sg.Solver] = [
    sg.Propagator(2),
    sg.EulerMaruyama(),
    sg.Heun(),
    sg.SRA(),
    sg.Adaptive(0.1, 0.1),
    sg.TorchSDE("euler"),
    sg.TorchSDE("srk"),
]


def twice(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        return plain, run()


def name(solver: object) -> str:
    return f"{type(solver).__name__}-{getattr(solver, 'method', '')}"


@pytest.mark.parametrize(("solver", "eta"), SOLVERS, ids=lambda v: name(v))
def test_solvers_compute_the_same_bits(solver: sg.Solver, eta: float) -> None:
    """float32 states, exact scores: not one of them may meet a half-precision product."""
    x, times = torch.randn(5, 2), grids.quadratic(SDE, 6, end=0.05)
    plain, half = twice(lambda: sg.solve(SDE.reverse(DATA, eta), x, times, solver, 1))
    assert half.dtype == torch.float32
    assert torch.equal(half, plain)


@pytest.mark.parametrize("solver", MATRIX, ids=name)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_matrix_processes_compute_the_same_bits(solver: sg.Solver, eta: float) -> None:
    process = CLD.reverse(LIFTED, eta)
    x, times = torch.randn(4, 2, 2), grids.quadratic(CLD, 8, end=0.05)
    plain, half = twice(lambda: sg.solve(process, x, times, solver, 1))
    assert half.dtype == torch.float32
    assert torch.equal(half, plain)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [powerlaw(SDE, 32), LIFTED], ids=["moments", "damped"])
def test_sample_computes_the_same_bits(model: sg.Score, eta: float, dtype: torch.dtype) -> None:
    plain, half = twice(lambda: sg.sample(model, 3, 8, seed=0, eta=eta, dtype=dtype))
    assert half.dtype == dtype
    assert torch.equal(half, plain)


class Recording(nn.Module):
    """A linear network that remembers in which dtype it was multiplied."""

    facts = sg.Facts((2,))

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        y = self.linear(x)
        self.seen.add(y.dtype)
        return y


@pytest.mark.parametrize(("solver", "eta"), SOLVERS, ids=lambda v: name(v))
def test_the_network_runs_in_the_precision_that_was_asked_for(
    solver: sg.Solver, eta: float
) -> None:
    net = Recording()
    process = SDE.reverse(sg.ScoreNetwork(net, SDE), eta)
    x, times = torch.randn(5, 2), grids.quadratic(SDE, 6, end=0.05)
    assert sg.solve(process, x, times, solver, 1).dtype == torch.float32
    assert net.seen == {torch.float32}
    net.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert sg.solve(process, x, times, solver, 1).dtype == torch.float32
    assert net.seen == {torch.bfloat16}


def test_a_damped_network_too() -> None:
    net = Recording()
    with torch.autocast("cpu", torch.bfloat16):
        x = sg.sample(sg.ScoreNetwork(net, CLD, facts=sg.Facts((2,))), 3, 6, seed=0, eta=1.0)
    assert x.dtype == torch.float32
    assert net.seen == {torch.bfloat16}


def test_tuning_fits_in_full_precision() -> None:
    """Trajectories are float32 where the device has no float64."""
    d, missed = torch.randn(3, 20, 4), torch.randn(20, 4)
    plain, half = twice(lambda: torch.tensor(least_squares(d, missed, 1e-3)))
    assert torch.equal(half, plain)
