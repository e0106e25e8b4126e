"""A whole step compiles into one graph and computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sde_gen as sg
from sde_gen.networks import MLP
from sde_gen.solvers import Spectral

SOLVERS = [
    sg.EulerMaruyama(),
    sg.Heun(),
    sg.Exponential(2),
    sg.Exponential(4, 0.5, corrector=True, weights=Spectral(0.25, 3)),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__} {s.order}")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_compile_into_one_graph(solver: sg.Solver, eta: float) -> None:
    sde = sg.VP()
    torch.manual_seed(0)
    model = sg.ScoreNetwork(MLP((3,), width=16, depth=1), sde).eval()
    process = sde.reverse(model, eta)
    times = sg.grids.default(sde, 4)
    plan = solver.plan(process, times)
    noise = sg.Streams(1)

    def run(x: Tensor) -> Tensor:
        memory: tuple[Tensor, ...] = ()
        for step in plan:
            x, memory = solver.step(process, x, step, noise, memory)
        return x

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fast = torch.compile(run, fullgraph=True)(x)
        torch.testing.assert_close(fast, run(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [3, 50])
def test_compiled_noise_is_the_same_noise(size: int) -> None:
    """One block of random words a sample, and several."""

    def draw(x: Tensor) -> Tensor:
        return sg.Streams(1)(x, 1.0, 0.9)

    x = torch.zeros(8, size)
    torch.testing.assert_close(torch.compile(draw, fullgraph=True)(x), draw(x), rtol=0, atol=1e-6)
