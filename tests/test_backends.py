"""Whole libraries behind a step: scipy's accuracy, and the traps of torchsde 0.2.6."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchsde
from problems import F64, gaussian, gaussian_flow, line, quantile_flow, start
from torch import Tensor

from sde_gen import (
    EDM,
    VP,
    BrownianPath,
    EulerMaruyama,
    Gaussian,
    Heun,
    Noise,
    OrnsteinUhlenbeck,
    SciPy,
    Streams,
    TorchSDE,
    grids,
    solve,
)

METHODS = ["euler", "euler_heun", "midpoint", "heun", "srk"]
every_method = pytest.mark.parametrize("method", METHODS)


class Refusing(Noise):
    """A noise that must not be asked."""

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        raise AssertionError("an ODE drew noise")

    def start(self, x: Tensor) -> Tensor:
        raise AssertionError("a solver drew a start")

    def rows(self, index: slice | Tensor) -> Refusing:
        return self


class Recording(Streams):
    """Streams that remembers the intervals it was asked for."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[tuple[float, float, int]] = []

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        self.asked.append((t, s, k))
        return super().__call__(x, t, s, k)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
@pytest.mark.parametrize("method", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
def test_scipy_follows_the_exact_flow_of_a_gaussian(method: str, rtol: float) -> None:
    sde = VP()
    score = Gaussian(sde, torch.tensor([0.6], dtype=F64), 0.5)
    x = start(score, 16, 1.0)
    exact = gaussian_flow(score, x, 1.0, 1e-3)
    y = solve(sde.probability_flow(score), x, [1.0, 1e-3], SciPy(method, rtol, rtol / 10))
    # Tolerances bound the error of a step; some hundred steps add up.
    assert float((y - exact).abs().max()) < 100 * rtol


def test_scipy_runs_both_ways_and_on_any_shape() -> None:
    sde = VP()
    score = Gaussian(sde, torch.full((3, 2, 2), 0.4, dtype=F64), 0.5)
    x = start(score, 4, 1.0)
    flow, solver = sde.probability_flow(score), SciPy("DOP853", 1e-9, 1e-9)
    data = solve(flow, x, [1.0, 0.3, 1e-2], solver)
    assert data.shape == x.shape
    torch.testing.assert_close(data, gaussian_flow(score, x, 1.0, 1e-2), rtol=0, atol=1e-7)
    torch.testing.assert_close(solve(flow, data, [1e-2, 1.0], solver), x, rtol=0, atol=1e-6)
    single = solve(flow, x.float(), [1.0, 1e-2], solver)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), data, rtol=0, atol=1e-4)


def test_scipy_refuses_to_cut_a_gradient() -> None:
    sde = VP()
    x = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    with pytest.raises(TypeError, match="SciPy does not record gradients"):
        solve(sde.probability_flow(gaussian(sde)), x, [1.0, 0.1], SciPy())


@pytest.mark.filterwarnings("ignore")
def test_scipy_says_when_it_gives_up() -> None:
    # The drift grows beyond bounds towards t = 0.7, where no step is short enough.
    flow = VP().probability_flow(lambda x, t: x.new_ones(x.shape) / (t - 0.7) ** 2)
    with pytest.raises(RuntimeError, match=r"scipy's RK45 stopped at t = .*step size"):
        solve(flow, torch.ones(1, 1, dtype=F64), [1.0, 0.5], SciPy())


@pytest.mark.parametrize("method", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("since", [2.0, 0.8])
def test_scipy_stops_at_the_first_value_that_is_not_finite(
    method: str, value: float, since: float
) -> None:
    """With no further call, where it would halve its step for ever."""
    seen = list[bool]()

    def broken(x: Tensor, t: Tensor) -> Tensor:
        seen.append(bool(float(t) > since))
        return -x if seen[-1] else torch.full_like(x, value)

    flow = VP().probability_flow(lambda x, t: broken(x, t))
    with pytest.raises(FloatingPointError, match="the score is not finite at t = "):
        solve(flow, torch.ones(3, 2), [1.0, 0.5], SciPy(method))
    assert seen == [True] * (len(seen) - 1) + [False]


# The traps of torchsde, one test each.


@every_method
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)], ids=str)
def test_trap_the_state_may_have_any_rank(method: str, shape: tuple[int, ...]) -> None:
    sde, n = OrnsteinUhlenbeck(), math.prod(shape)
    flat, grid = torch.ones(4, n, dtype=F64), [0.0, 0.5, 1.0]
    expected = solve(sde, flat, grid, TorchSDE(method), 1)
    y = solve(sde, flat.reshape(4, *shape), grid, TorchSDE(method), 1)
    assert y.shape == (4, *shape)
    assert torch.equal(y.reshape(4, n), expected)


@every_method
def test_trap_time_falls_here_and_rises_there(method: str) -> None:
    """The forward process on a rising grid, and the same problem written with falling time."""

    class Mirrored(OrnsteinUhlenbeck):
        direction = -1

        def drift(self, x: Tensor, t: Any) -> Tensor:
            return -super().drift(x, t)

    grid = torch.linspace(0, 2, 9, dtype=F64)
    x = torch.ones(3, 2, dtype=F64)
    path = Streams(4)

    class Mirror(Streams):
        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            return path(x, 2 - t, 2 - s, k)

    sde = OrnsteinUhlenbeck(end=2.0)
    rising = solve(sde, x, grid, TorchSDE(method), path)
    falling = solve(Mirrored(end=2.0), x, grid.flip(0), TorchSDE(method), Mirror())
    torch.testing.assert_close(rising, falling, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(
    ("method", "ours", "eta"),
    [("euler", EulerMaruyama(), 0.0), ("euler", EulerMaruyama(), 1.0), ("heun", Heun(), 0.0)],
)
def test_trap_noise_is_broadcast_and_ours(
    method: str, ours: Any, eta: float, dtype: torch.dtype
) -> None:
    """euler is our Euler-Maruyama to rounding, and heun our Heun: same steps, same draws.

    On an SDE the two Heuns differ: one takes the mean of two diffusions, ours their mean square.
    """
    sde = VP()
    process = sde.reverse(gaussian(sde), eta)
    x = start(gaussian(sde), 5, 1.0).to(dtype)
    grid = grids.uniform(sde, 20, end=0.1)
    expected = solve(process, x, grid, ours, 3)
    y = solve(process, x, grid, TorchSDE(method), 3)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=300 * torch.finfo(dtype).eps)


@every_method
@pytest.mark.parametrize("substeps", [1, 3, 7])
def test_trap_no_rounding_step_and_no_tree(
    method: str, substeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly ``substeps`` steps an interval, in float32 too, and no Brownian tree is built."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torchsde built its own Brownian motion")

    monkeypatch.setattr(torchsde, "BrownianInterval", refuse)
    monkeypatch.setattr(torchsde._core.sdeint, "BrownianInterval", refuse)
    # 0.03 + (0.29 - 0.03) is not 0.29 in floating point: our noise is named by exact ends.
    noise, grid = Recording(), torch.tensor([0.0, 0.03, 0.29, 0.29 + 1e-9, 1.0], dtype=F64)
    x = torch.ones(2, 2, dtype=torch.float32)
    solve(OrnsteinUhlenbeck(), x, grid, TorchSDE(method, substeps), noise)
    steps = [(t, s) for t, s, k in noise.asked if k == 0]
    assert len(steps) == 4 * substeps
    assert [t for t, _ in steps][::substeps] == grid[:-1].tolist()
    assert [s for _, s in steps][substeps - 1 :: substeps] == grid[1:].tolist()
    for (_, s), (t, _) in pairwise(steps):
        assert t == s
    assert {k for *_, k in noise.asked} == ({0, 1} if method == "srk" else {0})


@every_method
def test_trap_the_seed_is_ours(method: str) -> None:
    sde, x = OrnsteinUhlenbeck(), torch.ones(3, 2, dtype=F64)
    runs, before = [], torch.get_rng_state()
    for seed in (1, 1, 2):
        runs.append(solve(sde, x, [0.0, 0.5, 1.0], TorchSDE(method), seed))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(seed + 10)
        before = torch.get_rng_state()
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@every_method
def test_trap_outputs_between_steps_keep_their_variance(method: str) -> None:
    """A grid finer than any step asked of torchsde: interpolation would shrink the variance."""
    sde, n = OrnsteinUhlenbeck(), 20_000
    grid = torch.linspace(0, 1, 41, dtype=F64)
    path = solve(sde, torch.zeros(n, 1, dtype=F64), grid, TorchSDE(method), 2, trajectory=True)
    ratio = path[1:, :, 0].var(1) / sde.sigma(grid[1:]) ** 2
    # Euler's weak error at h = 1 / 40 is below 3 percent; interpolation halfway loses a half.
    assert float((ratio - 1).abs().max()) < 0.03 + 4 * math.sqrt(2 / n)


@every_method
def test_no_noise_is_drawn_for_an_ode(method: str) -> None:
    sde = VP()
    flow, x = sde.probability_flow(line(sde)), start(line(sde), 32, 0.6)
    y = solve(flow, x, grids.uniform(sde, 40, 0.6, 0.1), TorchSDE(method), Refusing())
    exact = quantile_flow(line(sde), x, 0.6, 0.1)
    assert float((y - exact).abs().max()) < 0.05


@every_method
def test_gradients_pass_through(method: str) -> None:
    sde = EDM(10.0)
    process, grid = sde.reverse(gaussian(sde)), torch.tensor([4.0, 2.0, 1.0], dtype=F64)
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    y = solve(process, x, grid, TorchSDE(method), 0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    step = torch.full_like(x, 1e-3)
    x_0 = x.detach()
    up, down = (solve(process, x_0 + d, grid, TorchSDE(method), 0) for d in (step, -step))
    # Gaussian data: the solver is affine in x, so the difference quotient is exact.
    torch.testing.assert_close(gradient, (up - down) / 2e-3, rtol=1e-8, atol=1e-8)


def test_srk_needs_more_than_increments() -> None:
    with pytest.raises(ValueError, match="one increment an interval"):
        solve(OrnsteinUhlenbeck(), torch.zeros(1, 1), [0.0, 1.0], TorchSDE("srk"), BrownianPath())
