"""Fixed-step Runge-Kutta methods: their tableaux, orders and calls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, gaussian, line, quantile_flow, rms, slopes, start
from scipy.integrate import RK45
from torch import Tensor

from sde_gen import EDM, VE, VP, LinearSDE, RungeKutta, SubVP, grids, solve
from sde_gen.ops import Time
from sde_gen.schedules import Geometric
from sde_gen.solvers.runge_kutta import CLASSICAL, DORMAND_PRINCE, Tableau

both = pytest.mark.parametrize("order", [4, 5])


def padded(table: Tableau) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(table.c)
    a = np.array([[*row, *[0.0] * (n - len(row))] for row in table.a[:-1]])
    return a, np.array(table.a[-1]), np.array(table.c)


@pytest.mark.parametrize(("table", "order"), [(CLASSICAL, 4), (DORMAND_PRINCE, 5)], ids=str)
def test_order_conditions(table: Tableau, order: int) -> None:
    """Butcher's conditions for all rooted trees of up to five nodes."""
    a, b, c = padded(table)
    one = np.ones_like(c)
    np.testing.assert_allclose(a.sum(1), c, atol=1e-14)
    # (nodes, elementary weight, 1 / density) of each tree
    trees = [
        (1, one, 1),
        (2, c, 1 / 2),
        (3, c**2, 1 / 3),
        (3, a @ c, 1 / 6),
        (4, c**3, 1 / 4),
        (4, c * (a @ c), 1 / 8),
        (4, a @ c**2, 1 / 12),
        (4, a @ a @ c, 1 / 24),
        (5, c**4, 1 / 5),
        (5, c**2 * (a @ c), 1 / 10),
        (5, (a @ c) ** 2, 1 / 20),
        (5, c * (a @ c**2), 1 / 15),
        (5, c * (a @ a @ c), 1 / 30),
        (5, a @ c**3, 1 / 20),
        (5, a @ (c * (a @ c)), 1 / 40),
        (5, a @ a @ c**2, 1 / 60),
        (5, a @ a @ a @ c, 1 / 120),
    ]
    for nodes, weight, density in trees:
        if nodes <= order:
            assert b @ weight == pytest.approx(density, abs=1e-14)


def test_dormand_prince_is_that_of_scipy() -> None:
    a, b, c = padded(DORMAND_PRINCE)
    np.testing.assert_allclose(a[:, :5], RK45.A, rtol=0, atol=1e-15)
    np.testing.assert_allclose(b, RK45.B, rtol=0, atol=1e-15)
    np.testing.assert_allclose(c, RK45.C, rtol=0, atol=1e-15)
    # scipy writes the difference to the embedded method with the other sign.
    np.testing.assert_allclose(np.abs(DORMAND_PRINCE.error), np.abs(RK45.E), atol=1e-15)


@both
def test_order_on_an_ode(order: int) -> None:
    sde, t, s = VP(), 0.6, 0.1
    score = line(sde)
    x = start(score, 64, t)
    exact = quantile_flow(score, x, t, s)
    flow = sde.probability_flow(score)
    errors = [
        rms(solve(flow, x, grids.uniform(sde, n, t, s), RungeKutta(order)) - exact)
        for n in (16, 32, 64)
    ]
    for slope in slopes(errors):
        assert slope == pytest.approx(order, abs=0.2)


@both
@pytest.mark.parametrize("sde", [SubVP(), VE(Geometric(0.02, 20.0)), EDM(20.0)], ids=repr)
def test_order_on_every_process_both_ways(sde: LinearSDE, order: int) -> None:
    """From noise to data against the exact flow, and back: encoding inverts."""
    t, s = float(sde.time_at(2 * math.log(1.5))), float(sde.time_at(2 * math.log(8.0)))
    score = line(sde)
    x = start(score, 32, t)
    exact = quantile_flow(score, x, t, s)
    flow, errors, returns = sde.probability_flow(score), [], []
    for n in (32, 64):
        times = grids.log_snr(sde, n, t, s)
        errors.append(rms(solve(flow, x, times, RungeKutta(order)) - exact))
        returns.append(rms(solve(flow, exact, times.flip(0), RungeKutta(order)) - x))
    for slope in slopes(errors) + slopes(returns):
        assert slope == pytest.approx(order, abs=0.2)


class Counting:
    def __init__(self, sde: LinearSDE) -> None:
        self.score, self.times = gaussian(sde), list[float]()

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.times.append(float(t))
        return self.score(x, t)


@both
def test_calls(order: int) -> None:
    sde = VP()
    score, grid = Counting(sde), grids.karras(sde, 5)
    solver = RungeKutta(order)
    solve(sde.probability_flow(score), torch.zeros(2, 3, dtype=F64), grid, solver)
    assert len(score.times) == 5 * solver.calls == 5 * {4: 4, 5: 6}[order]
    # The grid's own times to the last bit, so that a table of times is met exactly.
    assert set(grid.tolist()) <= set(score.times)
    assert solver.evaluates_end


@both
def test_dtype_and_rank(order: int) -> None:
    sde = VP()
    x = torch.randn(4, 3)
    times = grids.uniform(sde, 4, 0.9, 0.1)
    flow, solver = sde.probability_flow(lambda x, t: -x), RungeKutta(order)
    flat = solve(flow, x, times, solver)
    assert flat.dtype == torch.float32
    assert torch.equal(solve(flow, x.reshape(4, 1, 3, 1), times, solver).reshape(4, 3), flat)


@both
def test_an_sde_is_refused(order: int) -> None:
    sde = VP()
    with pytest.raises(TypeError, match="RungeKutta solves ODEs"):
        solve(sde.reverse(gaussian(sde)), torch.zeros(2, 3), [0.9, 0.1], RungeKutta(order))


@pytest.mark.parametrize("order", [3, 6, "4", None])
def test_an_unknown_order_is_refused(order: object) -> None:
    with pytest.raises(ValueError, match=r"order must be an integer in 4 \.\. 5"):
        RungeKutta(order)  # type: ignore[arg-type]
