from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from scipy.integrate import quad

from sde_gen import VP
from sde_gen.schedules import (
    Cosine,
    Geometric,
    Linear,
    Power,
    Quadratic,
    Schedule,
    Sigmoid,
    Tabulated,
)

F64 = torch.float64
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)

SMOOTH = [
    Linear(),
    Linear(0.3, 0.3),
    Linear(1e-4, 0.02, T=1000.0),
    Quadratic(),
    Quadratic(2.0, 2.0, T=3.0),
    Quadratic(0.00085, 0.012, T=1000.0),
    Sigmoid(),
    Sigmoid(steepness=30.0, T=2.0),
    Sigmoid(steepness=0.2, T=0.1),
    Cosine(),
    Cosine(offset=0.0, total=8.0, T=2.0),
    Geometric(),
    Geometric(0.002, 80.0, T=10.0),
    Power(),
    Power(2.0, T=80.0),
    Power(3.5),
]
CLOCKS = [*SMOOTH, Tabulated(BETAS), Tabulated([0.1, 0.5, 0.05], T=6.0)]
every_clock = pytest.mark.parametrize("clock", CLOCKS, ids=lambda c: repr(c)[:40])
smooth_clock = pytest.mark.parametrize("clock", SMOOTH, ids=repr)


def inside(clock: Schedule, n: int = 41) -> torch.Tensor:
    """Times in (0, T], close to 0 as well."""
    even = torch.linspace(0, 1, n, dtype=F64)[1:]
    return clock.T * torch.cat([torch.logspace(-5, -2, 4, dtype=F64), even])


@smooth_clock
def test_integral_is_the_quadrature_of_the_rate(clock: Schedule) -> None:
    # The cosine clock ends beside its pole: there only the adaptive quadrature of scipy counts.
    t = inside(clock)[:-1]
    derived = Schedule.integral(clock, t)
    torch.testing.assert_close(clock.integral(t), derived, rtol=1e-10, atol=0)
    for end in (0.3 * clock.T, clock.T):
        adaptive = quad(lambda u: float(clock.beta(u)), 0, end, epsabs=0, epsrel=1e-11, limit=200)
        assert float(clock.integral(end)) == pytest.approx(adaptive[0], rel=1e-10)


@smooth_clock
def test_rate_is_the_derivative_of_the_integral(clock: Schedule) -> None:
    t = inside(clock).requires_grad_()
    (rate,) = torch.autograd.grad(clock.integral(t).sum(), t)
    torch.testing.assert_close(rate, clock.beta(t.detach()), rtol=1e-11, atol=0)


@every_clock
def test_time_at_inverts_the_integral(clock: Schedule) -> None:
    t = inside(clock)
    torch.testing.assert_close(clock.time_at(clock.integral(t)), t, rtol=1e-10, atol=0)
    b = clock.integral(clock.T) * torch.linspace(0.01, 1, 7, dtype=F64)
    torch.testing.assert_close(clock.time_at(b), Schedule.time_at(clock, b), rtol=1e-12, atol=0)


@every_clock
def test_a_clock_starts_at_zero_and_never_stops(clock: Schedule) -> None:
    t = torch.cat([torch.zeros(1, dtype=F64), inside(clock).sort().values])
    assert float(clock.integral(0.0)) == 0
    assert bool((clock.integral(t).diff() > 0).all())
    assert bool((clock.beta(t[1:]) > 0).all())
    assert float(clock.time_at(0.0)) == pytest.approx(0, abs=1e-14 * clock.T)


@every_clock
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_shape_in_float64(clock: Schedule, shape: tuple[int, ...]) -> None:
    t = torch.rand(shape) * clock.T
    methods: list[Callable[[torch.Tensor], torch.Tensor]] = [clock.beta, clock.integral]
    for f in [*methods, lambda t: clock.time_at(clock.integral(t))]:
        assert f(t).shape == shape
        assert f(t).dtype == F64


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(0.0, 1.0),
        lambda: Linear(2.0, 1.9),
        lambda: Linear(T=0.0),
        lambda: Quadratic(0.0, 1.0),
        lambda: Quadratic(2.0, 1.9),
        lambda: Quadratic(T=0.0),
        lambda: Sigmoid(0.0, 1.0),
        lambda: Sigmoid(steepness=0.0),
        lambda: Sigmoid(T=0.0),
        lambda: Cosine(offset=-0.01),
        lambda: Cosine(offset=1.0),
        lambda: Cosine(total=0.0),
        lambda: Cosine(T=0.0),
        lambda: Geometric(0.0, 1.0),
        lambda: Geometric(1.0, 1.0),
        lambda: Geometric(T=0.0),
        lambda: Power(0.99),
        lambda: Power(T=0.0),
        lambda: Tabulated([]),
        lambda: Tabulated([0.1, 0.0]),
        lambda: Tabulated([1.0, 0.1]),
        lambda: Tabulated([0.1], T=0.0),
    ],
)
def test_no_clock_at_the_edge_of_its_parameters(make: Callable[[], Schedule]) -> None:
    with pytest.raises(ValueError, match=r"need |must be "):
        make()


def test_published_formulas() -> None:
    t = torch.tensor(0.37, dtype=F64)
    # Nichol & Dhariwal 2021, equation 17, with the offset s.
    f = torch.cos((t * 1.0 + 0.008) / 1.008 * math.pi / 2) ** 2
    f_0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    full = Cosine(total=60.0)  # the whole quarter turn, but for exp(-60)
    torch.testing.assert_close(torch.exp(-full.integral(t)), f / f_0, rtol=1e-9, atol=0)
    # Song et al. 2021, appendix C: sigma(t)^2 = sigma_min^2 (r^2t - 1).
    sigma = torch.sqrt(Geometric(0.01, 50.0).integral(t))
    assert float(sigma) == pytest.approx(0.01 * math.sqrt(5000 ** (2 * 0.37) - 1), rel=1e-12)
    # Song et al. 2021, appendix C: beta linear from 0.1 to 20; scaled linear: its root is.
    assert float(Linear().beta(t)) == pytest.approx(0.1 + 19.9 * 0.37, rel=1e-14)
    root = 0.63 * math.sqrt(0.1) + 0.37 * math.sqrt(20)
    assert float(Quadratic().beta(t)) == pytest.approx(root**2, rel=1e-13)
    logistic = 1 / (1 + math.exp(-6 * (2 * 0.37 - 1)))
    assert float(Sigmoid().beta(t)) == pytest.approx(0.1 + 19.9 * logistic, rel=1e-13)
    assert float(Cosine(total=9.0, T=4.0).integral(4.0)) == pytest.approx(9, rel=1e-12)


@pytest.mark.parametrize("T", [1.0, 1000.0, 0.7])
def test_a_table_is_the_chain_at_its_nodes(T: float) -> None:
    clock = Tabulated(BETAS, T)
    nodes = torch.arange(1, 1001, dtype=F64) * T / 1000
    chain = torch.cumprod(1 - BETAS, 0)
    torch.testing.assert_close(torch.exp(-clock.integral(nodes)), chain, rtol=1e-12, atol=0)
    # Between the nodes the rate is constant: -log(1 - beta_i) over a cell of length T / N.
    middle = nodes - T / 2000
    rate = -torch.log1p(-BETAS) * 1000 / T
    torch.testing.assert_close(clock.beta(middle), rate, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_a_stretched_clock_reads_the_same(scale: float) -> None:
    u = torch.linspace(0, 1, 9, dtype=F64)
    for one, stretched in [
        (Cosine(), Cosine(T=scale)),
        (Geometric(), Geometric(T=scale)),
        (Linear(0.1, 20.0), Linear(0.1 / scale, 20.0 / scale, T=scale)),
        (Sigmoid(0.1, 20.0), Sigmoid(0.1 / scale, 20.0 / scale, T=scale)),
        (Tabulated([0.1, 0.3]), Tabulated([0.1, 0.3], T=scale)),
    ]:
        torch.testing.assert_close(
            one.integral(u), stretched.integral(scale * u), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("total", [0.5, 12.0, 100.0, 1300.0])
@pytest.mark.parametrize("offset", [0.0, 0.008])
def test_the_cosine_clock_runs_to_its_end(total: float, offset: float) -> None:
    """exp(-B / 2) is a cosine, here as the sine of the angle that is left: in 400 digits."""
    clock = Cosine(offset, total, T=2.0)
    assert float(clock.integral(2.0)) == pytest.approx(total, rel=1e-14)
    mpmath.mp.dps = 400
    start = mpmath.mpf(offset) / (1 + mpmath.mpf(offset)) * mpmath.pi / 2
    left = mpmath.asin(mpmath.cos(start) * mpmath.exp(-mpmath.mpf(total) / 2))
    slope = (mpmath.pi / 2 - left - start) / 2
    for t in (1e-7, 0.1, 0.7, 1.0, 1.5, 1.99, 2 - 1e-9, 2.0):
        angle = start + slope * mpmath.mpf(t)
        exact = -2 * mpmath.log(mpmath.cos(angle) / mpmath.cos(start))
        rate = 2 * slope * mpmath.tan(angle)
        # 2 - t is known to 1e-16 of 2, and at 2 - 1e-9 that is 1e-7 of the rate.
        assert float(clock.integral(t)) == pytest.approx(float(exact), rel=1e-9)
        assert float(clock.beta(t)) == pytest.approx(float(rate), rel=1e-6)
        assert float(clock.time_at(float(exact))) == pytest.approx(t, rel=1e-12)
    u = torch.tensor([0.2, 1.0, 1.9], dtype=F64, requires_grad=True)
    (slope_found,) = torch.autograd.grad(clock.integral(u).sum(), u)
    torch.testing.assert_close(slope_found, clock.beta(u.detach()), rtol=1e-10, atol=0)


# A chain that ends without signal.

SHORT = torch.tensor([0.1, 0.4, 0.3, 1.0], dtype=F64)


def test_a_chain_may_end_without_signal() -> None:
    clock = Tabulated(SHORT, T=2.0)
    nodes = torch.arange(5, dtype=F64) / 2
    abar = torch.cat([torch.ones(1, dtype=F64), torch.cumprod(1 - SHORT, 0)])
    torch.testing.assert_close(torch.exp(-clock.integral(nodes)), abar, rtol=1e-13, atol=0)
    # In the last part exp(-B) falls linearly, at the rate that beta says.
    t = 1.5 + torch.tensor([0.0, 0.1, 0.3, 0.499], dtype=F64)
    signal = abar[3] * (2.0 - t) / 0.5
    torch.testing.assert_close(torch.exp(-clock.integral(t)), signal, rtol=1e-12, atol=0)
    t.requires_grad_()
    (rate,) = torch.autograd.grad(clock.integral(t).sum(), t)
    torch.testing.assert_close(rate, clock.beta(t).detach(), rtol=1e-12, atol=0)
    assert math.isinf(float(clock.integral(2.0)))
    assert math.isinf(float(clock.beta(2.0)))


def test_time_is_found_again_where_the_signal_ends() -> None:
    clock = Tabulated(SHORT, T=2.0)
    t = torch.tensor([0.0, 0.3, 0.5, 1.2, 1.5, 1.7, 1.99, 2.0], dtype=F64)
    torch.testing.assert_close(clock.time_at(clock.integral(t)), t, rtol=1e-12, atol=1e-15)
    sde = VP(clock)
    torch.testing.assert_close(sde.time_at(sde.log_snr(t)), t, rtol=1e-12, atol=1e-15)
    assert float(sde.alpha(2.0)) == 0
    assert float(sde.sigma(2.0)) == 1
