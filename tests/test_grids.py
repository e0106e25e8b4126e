from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import F64

from sde_gen import (
    EDM,
    VE,
    VP,
    CriticallyDamped,
    Exponential,
    Langevin,
    LinearSDE,
    OrnsteinUhlenbeck,
    SubVP,
    Wiener,
    grids,
    solve,
)
from sde_gen.schedules import Cosine, Geometric, Linear, Tabulated

PROCESSES = [VP(), VP(Cosine()), SubVP(), VE(), EDM(), Wiener(3.0), OrnsteinUhlenbeck()]
KINDS: list[Callable[..., Any]] = [
    grids.uniform,
    grids.log_snr,
    grids.karras,
    grids.quadratic,
    grids.default,
]
every_process = pytest.mark.parametrize("sde", PROCESSES, ids=repr)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)


def ratio(sde: LinearSDE, t: torch.Tensor) -> torch.Tensor:
    return sde.sigma(t) / sde.alpha(t)


@every_process
@every_kind
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_a_grid_falls_from_start_to_end(
    sde: LinearSDE, kind: Callable[..., Any], steps: int
) -> None:
    times = kind(sde, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == F64
    assert bool((times.diff() < 0).all())
    assert float(times[0]) == sde.T
    assert float(ratio(sde, times[-1])) == pytest.approx(0.005, rel=1e-6)
    part = kind(sde, steps, start=0.8 * sde.T, end=0.1 * sde.T)
    # The ends exactly as asked, to the last bit.
    assert float(part[0]) == 0.8 * sde.T
    assert float(part[-1]) == 0.1 * sde.T
    if steps > 1:
        down = kind(sde, steps, to_zero=True)
        assert down.shape == (steps + 1,)
        assert float(down[-1]) == 0
        torch.testing.assert_close(down[:-1], kind(sde, steps - 1), rtol=0, atol=0)


@every_process
def test_spacings_are_even_in_their_own_measure(sde: LinearSDE) -> None:
    def even(values: torch.Tensor) -> bool:
        gaps = values.diff()
        return bool(torch.allclose(gaps, gaps.mean().expand_as(gaps), rtol=1e-6, atol=1e-12))

    assert even(grids.uniform(sde, 10))
    assert even(torch.sqrt(grids.uniform(sde, 10, power=2.0)))
    assert even(sde.log_snr(grids.log_snr(sde, 10)))
    for rho in (1.0, 3.0, 7.0):
        assert even(ratio(sde, grids.karras(sde, 10, rho=rho)) ** (1 / rho))
    longer = {3: 1.5, 8: 1.5, 12: 1.5, 24: 1.03125}
    middle = float(sde.time_at(-2 * math.log(5 * 0.3)))
    for steps, start in itertools.product(longer, (None, middle)):
        times = grids.default(sde, steps, start=start, data_std=0.3)
        r = ratio(sde, times) * math.sqrt(0.35 / 0.3)
        gaps = (VP().time_at(-2 * torch.log(r)) ** (1 / 2.35)).diff()
        # Out of noise 30 times as wide as the data the first step is longer.
        gaps[0] /= longer[steps] if float(ratio(sde, times)[0]) >= 30 * 0.3 else 1
        torch.testing.assert_close(gaps, gaps[1:].mean().expand_as(gaps), rtol=1e-3, atol=0)
    # The same ratio under standard VP is reached at a time whose root is even.
    vp_times = VP().time_at(-2 * torch.log(ratio(sde, grids.quadratic(sde, 10))))
    assert even(torch.sqrt(vp_times))


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda f: f.__name__)
def test_a_grid_serves_every_clock(kind: Callable[..., Any]) -> None:
    """Between the same ratios the ratios are the same, whatever the process."""
    top, low = 3.0, 0.01
    tables = []
    for sde in (VP(), VP(Cosine()), SubVP(), VE(), EDM(), OrnsteinUhlenbeck()):
        start, end = (float(sde.time_at(-2 * math.log(r))) for r in (top, low))
        tables.append(ratio(sde, kind(sde, 12, start=start, end=end)))
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=1e-8, atol=0)


def test_karras_is_the_published_grid() -> None:
    """Karras et al. 2022, equation 5: 18 steps, sigma 80 to 0.002, rho 7."""
    i = torch.arange(18, dtype=F64)
    exact = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = grids.karras(EDM(), 18, end=0.002, to_zero=True)
    torch.testing.assert_close(times[:-1], exact, rtol=1e-12, atol=0)


def test_a_table_is_hit_exactly() -> None:
    ratios = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]
    for sde in (VP(), EDM(), SubVP(), VP(Tabulated(torch.linspace(1e-4, 0.02, 1000)))):
        times = grids.from_table(sde, ratios)
        torch.testing.assert_close(ratio(sde, times[:-1]), torch.tensor(ratios[:-1], dtype=F64))
        assert float(times[-1]) == 0
    whole = grids.from_table(EDM(), torch.tensor(ratios[:-1]))
    assert len(whole) == 10
    top = grids.from_table(EDM(), [80.0, 1.0])
    assert float(top[0]) == pytest.approx(80, rel=1e-14)
    assert float(top[0]) <= 80


def test_a_table_is_read_as_a_curve() -> None:
    """Resampled linearly in the logarithm: the same number gives the table, twice halves it."""
    ratios, sde = torch.tensor([20.0, 5.0, 1.0, 0.1], dtype=F64), EDM()
    torch.testing.assert_close(grids.from_table(sde, ratios, steps=3), ratios)
    double = grids.from_table(sde, ratios, steps=6)
    torch.testing.assert_close(double[::2], ratios)
    torch.testing.assert_close(double[1::2], torch.sqrt(ratios[:-1] * ratios[1:]))
    to_zero = grids.from_table(sde, [*ratios.tolist(), 0.0], steps=7)
    torch.testing.assert_close(to_zero[:-1], double)
    assert float(to_zero[-1]) == 0


def test_a_process_without_a_kernel_has_a_uniform_grid() -> None:
    process = Langevin(lambda x, t: -x)
    times = grids.uniform(process, 4)
    assert float(times[0]) == 1
    assert float(times[-1]) == 0.001
    assert grids.uniform(process, 4, end=0.0).flip(0).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_grids_start_where_a_process_has_come_to_rest() -> None:
    """By default: at T, or where 1e-4 of the noise is left as signal, if nothing changes after."""
    for sde in (*PROCESSES, VE(Geometric(0.01, 1e9)), EDM(1e9), CriticallyDamped()):
        assert grids.default_start(sde) == sde.T
    # alpha / sigma = 1e-4: exp(-B) / (1 - exp(-B)) = 1e-8.
    b = math.log1p(1e8)
    assert grids.default_start(VP(Linear(beta_max=1e4))) == pytest.approx(
        float(Linear(beta_max=1e4).time_at(b)), rel=1e-12
    )
    assert grids.default_start(OrnsteinUhlenbeck(end=50.0)) == pytest.approx(b / 2, rel=1e-12)
    long = VP(Linear(beta_max=1e4))
    for kind in KINDS:
        times = kind(long, 9)
        assert float(times[0]) == grids.default_start(long)
        assert bool((times.diff() < 0).all())
        # Asked to, a grid starts at T: at the ratio exp(1250), that no float64 holds.
        times = kind(long, 9, start=1.0)
        assert float(times[0]) == 1.0
        assert bool((times.diff() < 0).all())
    with pytest.raises(ValueError, match=r"nothing is left of the data .* grids\.default_start"):
        solve(
            long.probability_flow(lambda x, t: -x),
            torch.zeros(1, 1),
            grids.uniform(long, 5, start=1.0),
            Exponential(),
        )
