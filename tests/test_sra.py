"""SRA: strong order 1.5 on a nested path, weak order 2 by impulse response."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from laws import law_error
from problems import F64, gaussian, line, quantile_flow, rms, slopes, start
from torch import Tensor

from sde_gen import (
    SDE,
    SRA,
    VE,
    VP,
    BrownianPath,
    Langevin,
    LinearSDE,
    Noise,
    OrnsteinUhlenbeck,
    Streams,
    SubVP,
    TorchSDE,
    grids,
    solve,
)
from sde_gen.ops import Time
from sde_gen.schedules import Geometric, Power


class Nested(Noise):
    """One path on a fine grid, walked from times[0]: I_1 = int dW and I_10 = int (W_u - W_t) du.

    Over joined intervals the increments add, and to the integral of each part comes its length
    times where the path stood when the part began: exact sums, not an approximation.
    """

    def __init__(self, times: Tensor, x: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.times = times.tolist()
        self.parts: list[tuple[float, Tensor, Tensor]] = []
        for a, b in pairwise(self.times):
            h = abs(b - a)
            z, y = torch.randn(2, *x.shape, generator=generator, dtype=F64)
            w = math.sqrt(h) * z
            self.parts.append((h, w, h * w / 2 + math.sqrt(h**3 / 12) * y))

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        h, w, area = 0.0, torch.zeros_like(x), torch.zeros_like(x)
        for length, dw, i_10 in self.parts[self.times.index(t) : self.times.index(s)]:
            area = area + i_10 + length * w
            h, w = h + length, w + dw
        return w / math.sqrt(h) if k == 0 else (area - h * w / 2) / math.sqrt(h**3 / 12)

    def start(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def rows(self, index: slice | Tensor) -> Nested:
        raise NotImplementedError


def test_the_nested_path_has_the_law_of_a_path() -> None:
    """Normalised, a joined increment and area are independent standard normals."""
    n, times = 20_000, torch.tensor([0.9, 0.7, 0.65, 0.2], dtype=F64)
    x = torch.zeros(n, 1, dtype=F64)
    noise = Nested(times, x)
    z = torch.cat([noise(x, 0.9, 0.2, k) for k in (0, 1)], 1)
    assert float((z.T @ z / n - torch.eye(2, dtype=F64)).abs().max()) < 4 * math.sqrt(2 / n)


def problem(name: str) -> tuple[SDE, Tensor, float, float]:
    """A nonlinear process with time-dependent noise, 100 starts, and two times."""
    vp = VP()
    if name == "reversal":
        return vp.reverse(line(vp)), start(line(vp), 100, 0.6), 0.6, 0.1
    if name == "half noise":
        return vp.reverse(line(vp), 0.5), start(line(vp), 100, 0.6), 0.6, 0.1
    # Time rises: Langevin dynamics on a clock whose rate is 4 t^3.
    process = Langevin(line(vp), Power(4.0, T=1.5), at=0.05)
    return process, start(line(vp), 100, 0.05), 0.5, 1.2


@pytest.mark.parametrize("name", ["reversal", "half noise", "forward"])
def test_strong_order(name: str) -> None:
    process, x, t, s = problem(name)
    times = torch.linspace(t, s, 1025, dtype=F64)
    noise = Nested(times, x, seed=1)
    reference = solve(process, x, times, SRA(), noise)
    errors = [
        rms(solve(process, x, times[:: 1024 // n], SRA(), noise) - reference)
        for n in (32, 64, 128)
    ]
    # 100 paths: one ratio is known to some percent, the mean of two better.
    assert sum(slopes(errors)) / 2 == pytest.approx(SRA.strong, abs=0.2)


def test_without_the_area_the_strong_order_is_1() -> None:
    """The test above sees the second normal: a wrong one costs half an order."""

    class Deaf(Nested):
        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            return super().__call__(x, t, s) if k == 0 else torch.zeros_like(x)

    process, x, t, s = problem("reversal")
    times = torch.linspace(t, s, 1025, dtype=F64)
    reference = solve(process, x, times, SRA(), Nested(times, x, seed=1))
    noise = Deaf(times, x, seed=1)
    errors = [rms(solve(process, x, times[::k], SRA(), noise) - reference) for k in (32, 16, 8)]
    assert sum(slopes(errors)) / 2 == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(Geometric(0.1, 8.0))], ids=repr)
def test_steps_are_those_of_torchsde(sde: LinearSDE, eta: float) -> None:
    """torchsde's srk in its additive form is an independent implementation of SRA1."""
    process, x = sde.reverse(line(sde), eta), start(line(sde), 8, 0.9)
    times = grids.quadratic(sde, 6, 0.9, 0.2)
    one = solve(process, x, times, SRA(), Streams(3))
    other = solve(process, x, times, TorchSDE("srk"), Streams(3))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("sde", [VP(), OrnsteinUhlenbeck(end=1.0)], ids=repr)
@pytest.mark.parametrize("point", [None, 0.7], ids=["law", "point"])
def test_weak_order_by_impulse_response(sde: LinearSDE, eta: float, point: float | None) -> None:
    errors = [
        float(law_error(gaussian(sde), SRA(), times, eta, 2 * n, point).norm())
        for n in (32, 64, 128)
        for times in [grids.uniform(sde, n, 0.6, 0.1)]
    ]
    for slope in slopes(errors):
        assert slope == pytest.approx(SRA.weak, abs=0.2)


class Refusing(Streams):
    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        raise AssertionError("noise was drawn")


def test_on_an_ode_the_order_is_2_and_nothing_is_drawn() -> None:
    sde, t, s = VP(), 0.6, 0.1
    score = line(sde)
    x = start(score, 64, t)
    exact, flow = quantile_flow(score, x, t, s), sde.probability_flow(score)
    errors = [
        rms(solve(flow, x, grids.uniform(sde, n, t, s), SRA(), Refusing(0)) - exact)
        for n in (32, 64, 128)
    ]
    for slope in slopes(errors):
        assert slope == pytest.approx(SRA.order, abs=0.2)


def test_calls_and_times() -> None:
    sde, grid, times = VP(), grids.uniform(VP(), 5, 0.9, 0.2), list[float]()
    score = gaussian(sde)

    def counted(x: Tensor, t: Time) -> Tensor:
        times.append(float(t))
        return score(x, t)

    solve(sde.reverse(counted), torch.zeros(2, 3, dtype=F64), grid, SRA(), 0)
    assert len(times) == 5 * SRA.calls
    assert set(grid[:-1].tolist()) <= set(times)
    assert float(grid[-1]) not in times
    assert not SRA.evaluates_end


def test_a_path_without_areas_is_refused() -> None:
    sde = VP()
    with pytest.raises(ValueError, match="one increment an interval"):
        solve(sde.reverse(gaussian(sde)), torch.zeros(2, 3), [0.9, 0.8], SRA(), BrownianPath(0))
