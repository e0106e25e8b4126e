"""What runs on a device runs without asking it: no step reads a value back.

Tensors on ``meta`` have shapes and no values, so whatever waits for one (``item``, ``if x > 0``, a
copy to the CPU) raises there. The loop of a solver that passes can queue its work on a GPU.
"""

from __future__ import annotations

import pytest
import torch

import sde_gen as sg
from sde_gen.networks import UNet

SDE = sg.VP()
DIRECTIONS = sg.data_moments(torch.randn(80, 64, generator=torch.Generator().manual_seed(0)))


def model(guided: bool = False) -> sg.Score:
    net = UNet((1, 8, 8), 16, (1, 1), blocks=1, width=32, classes=3).to("meta")
    score = sg.ScoreNetwork(net, SDE, facts=sg.Facts(std=0.5)).eval()
    label = torch.zeros(4, dtype=torch.int64, device="meta")
    return sg.ClassifierFree(score, 1.0, y=label) if guided else score


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("solver", "eta"),
    [
        (None, 0.0),
        (None, 1.0),
        (sg.EulerMaruyama(), 1.0),
        (sg.Heun(), 0.0),
        (sg.Heun(), 1.0),
        (sg.RungeKutta(), 0.0),
        (sg.SRA(), 1.0),
        (sg.Exponential(3, DIRECTIONS, corrector=True), 0.0),
        (sg.Churn(), 1.0),
        (sg.PredictorCorrector(), 1.0),
        (sg.PredictorCorrector(reference=0.3), 1.0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, sg.Solver) else str(v),
)
def test_no_step_waits_for_the_device(solver: sg.Solver | None, eta: float, guided: bool) -> None:
    score = model(guided)
    solver = sg.default_solver(score, eta) if solver is None else solver
    process, noise = SDE.reverse(score, eta), sg.Streams(0)
    x, memory = torch.empty(4, 1, 8, 8, device="meta"), ()
    with torch.no_grad():
        for step in solver.plan(process, sg.grids.default(SDE, 6)):
            x, memory = solver.step(process, x, step, noise, memory)
    assert x.device.type == "meta"
    assert x.shape == (4, 1, 8, 8)
    assert x.dtype == torch.float32


def test_what_waits_is_caught() -> None:
    class Clipped(sg.Score):
        def __call__(self, x: torch.Tensor, t: sg.ops.Time) -> torch.Tensor:
            return -x if float(x.abs().max()) < 3 else x

    with pytest.raises(RuntimeError, match="meta"):
        Clipped()(torch.empty(2, 2, device="meta"), 0.5)
