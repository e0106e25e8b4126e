"""What is known of the data, and law 19: rescaling the data changes samples by exactly that map,
log densities by its log determinant, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import F64, mixture
from torch import Tensor, nn

import sde_gen as sg
from sde_gen.facts import Facts, Units
from sde_gen.guidance import Composed, Product, Tempered, autoguidance
from sde_gen.inverse import (
    Matrix,
    Observation,
    Point,
    Posterior,
    Tweedie,
    exact_posterior,
    log_evidence,
)
from sde_gen.networks import MLP

CLD = sg.CriticallyDamped()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- units by their values ------------------------------------------------------------------

TABLE = torch.tensor([[0.0, 100.0], [2.0, 300.0]], dtype=F64)
IMAGES = torch.tensor([[[0.0, 2.0], [10.0, 10.0]], [[4.0, 6.0], [30.0, 30.0]]], dtype=F64)


def test_units_of_everything_together() -> None:
    u = Units.of(TABLE)
    assert u.shift.shape == u.scale.shape == ()
    assert float(u.shift) == 402 / 4
    # E[x^2] - E[x]^2 with sums 0 + 4 + 10^4 + 9 10^4.
    assert float(u.scale) == pytest.approx(math.sqrt(100_004 / 4 - 100.5**2), rel=1e-14)


def test_units_of_columns_and_channels() -> None:
    u = Units.of(TABLE, "column")
    assert (u.shift.tolist(), u.scale.tolist()) == ([1.0, 200.0], [1.0, 100.0])
    u = Units.of(IMAGES, "channel")  # (2, 2 channels, 2)
    assert u.shift.shape == u.scale.shape == (2, 1)
    assert u.shift.flatten().tolist() == [3.0, 20.0]
    # Deviations -3, -1, 1, 3 and -10, -10, 10, 10.
    assert torch.allclose(u.scale.flatten(), torch.tensor([math.sqrt(5), 10.0], dtype=F64))


def test_a_map_is_written_out() -> None:
    u = Units(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]))
    z = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
    assert u.decode(z).tolist() == [[4.0, -1.0], [1.0, -4.0]]
    assert u.encode(u.decode(z)).tolist() == z.tolist()
    assert u.decode(z).dtype == torch.float32
    assert u.decode(z.double()).dtype == F64
    assert (u.shift.dtype, u.scale.dtype) == (F64, F64)


MIX = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=F64)


def test_a_mix_is_written_out() -> None:
    u = Units(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), MIX)
    z = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
    # mix z = (4, 1) and (-4, -2).
    assert u.decode(z).tolist() == [[13.0, -1.5], [-11.0, -3.0]]
    assert u.linear(z).tolist() == [[12.0, 0.5], [-12.0, -1.0]]
    torch.testing.assert_close(u.encode(u.decode(z)), z)
    x = drawn(7, 2)
    torch.testing.assert_close(u.decode(u.encode(x)), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        (u.linear(x) * z[:1].double()).sum(1), u.adjoint(z.double())[0] @ x.T
    )
    assert u.log_volume((2,)) == pytest.approx(math.log(3.0 * 0.5 * 1.0), abs=1e-15)
    plain = Units(u.shift, u.scale)
    assert u.agrees(Units(u.shift, u.scale, MIX.clone()))
    for other in (plain, Units(u.shift, u.scale, 2 * MIX)):
        assert not u.agrees(other)
        assert not other.agrees(u)
    u.check((2,))
    for shape in ((3,), (2, 2), ()):
        with pytest.raises(ValueError, match="is not of samples"):
            u.check(shape)
    for wrong in (MIX[:1], MIX[0], torch.ones(2, 2), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="mix"):
            Units(u.shift, u.scale, wrong)


def test_a_mix_moves_samples_densities_and_posteriors_by_its_map() -> None:
    """N(0, C) in the units of the process is N(shift, L C L^T), L = scale mix, in the data's."""
    u = Units(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), MIX)
    c = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=F64)
    law = sg.CorrelatedMixture(
        sg.VP(), torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), c[None]
    )
    inside = sg.sample(law, 5, seed=0, dtype=F64)
    law.facts = replace(law.facts, units=u)
    torch.testing.assert_close(sg.sample(law, 5, seed=0, dtype=F64), u.decode(inside))
    linear = torch.diag(u.scale) @ MIX
    cov = linear @ c @ linear.T
    x = u.decode(drawn(6, 2))
    exact = torch.distributions.MultivariateNormal(u.shift, cov).log_prob(x)
    torch.testing.assert_close(sg.log_prob(law, x).value, exact, rtol=0, atol=1e-4)
    h, y, noise = torch.tensor([[1.0, 1.0]], dtype=F64), torch.tensor([0.7], dtype=F64), 0.3
    seen = Observation(Matrix(h), y, noise)
    gain = cov @ h.T / (h @ cov @ h.T + noise**2)
    mean = u.shift + (gain * (y - h @ u.shift)).flatten()
    found = sg.sample(Posterior(law, seen), 4000, steps=40, seed=1, dtype=F64)
    left = (torch.eye(2) - gain @ h) @ cov
    assert bool(((found.mean(0) - mean).abs() < 5 * (left.diag() / 4000).sqrt() + 1e-3).all())
    torch.testing.assert_close(found.T.cov(), left, rtol=0.02 + 5 * math.sqrt(2 / 4000), atol=0.05)


@pytest.mark.parametrize("each", ["all", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30, 16_777_217.0])
def test_what_does_not_vary_keeps_its_scale(each: Any, dtype: torch.dtype, value: float) -> None:
    x = torch.full((1001, 2), value, dtype=dtype)
    u = Units.of(x, each)
    assert torch.equal(u.scale, torch.ones_like(u.scale))
    # Means of equal numbers: rounding of 1001 terms at most.
    assert bool((u.encode(x).abs() <= 1e-12 * abs(value)).all())


def test_one_constant_column_beside_one_that_varies() -> None:
    x = torch.cat([torch.full((100, 1), 0.3), drawn(100, 1, dtype=torch.float32)], 1)
    u = Units.of(x, "column")
    assert float(u.scale[0]) == 1.0
    spread = float(x[:, 1].double().std(correction=0))
    assert float(u.scale[1]) == pytest.approx(spread, rel=1e-12)


def test_a_large_offset_costs_no_digits_of_float32_data() -> None:
    # Seconds since 1970, to the 128 that float32 holds there: whole multiples are exact.
    ticks = torch.tensor([-3.0, -1.0, 0.0, 0.0, 1.0, 3.0])
    x = (1_700_000_000 // 128 * 128 + 128 * ticks).unsqueeze(1)
    assert x.dtype == torch.float32
    facts = Facts.of(x, "column")
    deviation = math.sqrt(20 / 6)
    assert facts.units is not None
    assert float(facts.units.scale) == pytest.approx(128 * deviation, rel=1e-12)
    torch.testing.assert_close(
        facts.encode(x), ticks.unsqueeze(1) / deviation, rtol=1e-6, atol=1e-9
    )
    assert torch.equal(facts.decode(facts.encode(x)), x)
    assert facts.std == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("each", "shape", "wanted"),
    [
        ("all", (5,), 5 * math.log(2.0)),
        ("column", (3,), math.log(0.5) + math.log(3.0) + math.log(7.0)),
        ("channel", (2, 4, 5), 20 * (math.log(0.1) + math.log(4.0))),
    ],
)
def test_log_volume_is_the_log_determinant(
    each: str, shape: tuple[int, ...], wanted: float
) -> None:
    scales = {
        "all": torch.tensor(2.0),
        "column": torch.tensor([0.5, 3.0, 7.0]),
        "channel": torch.tensor([0.1, 4.0], dtype=F64).reshape(2, 1, 1),
    }
    u = Units(torch.zeros_like(scales[each]), scales[each])
    assert u.log_volume(shape) == pytest.approx(wanted, rel=1e-14)
    z = drawn(*shape)
    jacobian = torch.autograd.functional.jacobian(lambda z: u.decode(z[None])[0].flatten(), z)
    matrix = jacobian.reshape(z.numel(), z.numel())
    assert u.log_volume(shape) == pytest.approx(float(torch.linalg.slogdet(matrix)[1]), rel=1e-12)
    assert Facts(shape, units=u).log_volume(shape) == u.log_volume(shape)
    assert Facts(shape).log_volume(shape) == 0.0


WRONG = {
    "zero": (lambda: Units(torch.zeros(2), torch.tensor([1.0, 0.0])), r"scale must be positive"),
    "negative": (lambda: Units(torch.zeros(()), torch.tensor(-1.0)), r"positive, got \[-1.0\]"),
    "NaN": (lambda: Units(torch.tensor(math.nan), torch.ones(())), "shift"),
    "infinite": (lambda: Units(torch.zeros(()), torch.tensor(math.inf)), "scale"),
    "each": (lambda: Units.of(TABLE, "row"), "'all', 'column', 'channel'.*'row'"),  # type: ignore[arg-type]
    "no table": (lambda: Units.of(IMAGES, "column"), r"a table \(N, D\), got \(2, 2, 2\)"),
    "no channels": (lambda: Units.of(drawn(5), "channel"), r"axis 1 of .*got \(5,\)"),
    "columns of others": (
        lambda: Facts((4,), units=Units(torch.zeros(3), torch.ones(3))),
        r"units of shapes \(3,\) and \(3,\) are not those of samples \(4,\)",
    ),
    "more axes": (
        lambda: Facts((3,), units=Units(torch.zeros(2, 3), torch.ones(()))),
        r"units of shapes \(2, 3\) and \(\) are not those of samples \(3,\)",
    ),
    "std 0": (lambda: Facts(std=0.0), "std must be a number > 0, got 0"),
    "std infinite": (lambda: Facts(std=math.inf), "std must be a number > 0, got inf"),
    "std NaN": (lambda: Facts(std=math.nan), "std must be a number > 0, got nan"),
    "levels": (lambda: Facts(levels=1), "levels must be an integer >= 2, got 1"),
    "half a level": (lambda: Facts(levels=2.5), "levels must be an integer >= 2, got 2.5"),
    "data": (lambda: Facts.of(torch.tensor([1.0, math.nan])), "x"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_is_named(how: str) -> None:
    make, message = WRONG[how]
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="x must be floating point"):
        Facts.of(torch.arange(6).reshape(3, 2))


# --- facts, fitted and passed on ------------------------------------------------------------


def test_facts_of_data() -> None:
    x = torch.tensor([[0.0, 10.0], [2.0, 30.0], [4.0, 20.0]], dtype=F64)
    plain = Facts.of(x)
    assert plain.shape == (2,)
    assert plain.std == pytest.approx(math.sqrt((20 + 1400) / 6 - 11.0**2), rel=1e-14)
    assert (plain.moments, plain.units, plain.classes, plain.levels) == (None,) * 4
    full = Facts.of(x, "column", 2, ["a", "b"], 16)
    assert (full.classes, full.levels) == (("a", "b"), 16)
    assert full.std == pytest.approx(1.0, rel=1e-14)
    # In the units of the process the covariance is the correlation, 1/2: C (1, 1) is 3/2.
    assert full.moments is not None
    assert full.moments.mean is not None
    torch.testing.assert_close(full.moments.mean, torch.zeros(2, dtype=F64), rtol=0, atol=1e-14)
    top = full.moments.apply((full.moments.values,), (torch.ones(1, 2, dtype=F64),))
    torch.testing.assert_close(top, torch.full((1, 2), 1.5, dtype=F64), rtol=1e-9, atol=0)


def test_data_that_do_not_vary_have_deviation_one() -> None:
    assert Facts.of(torch.full((4, 2), 3.0)).std == 1.0


@pytest.mark.parametrize("known", [None, sg.Moments(torch.tensor([2.0, 4.0], dtype=F64))])
def test_the_variance_is_that_of_the_moments(known: sg.Moments | None) -> None:
    assert Facts((2,), 0.5, known).variance == (0.25 if known is None else 3.0)


def told(**more: Any) -> Facts:
    units = Units(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    moments = sg.Moments(torch.ones(1, dtype=F64))
    return replace(Facts((2,), 0.7, moments, units, ("a", "b", "c"), 16), **more)


class Labelled(nn.Module):
    shape, classes = (2,), 3

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        return x if y is None else x * (y.unsqueeze(1) + 2)


NET = sg.ScoreNetwork(Labelled(), sg.EDM(250.0), facts=told())
MADE = {
    "given": lambda: NET.given(y=1),
    "sum": lambda: NET + NET,
    "scaled": lambda: 2.0 * NET,
    "difference": lambda: NET - (lambda x, t: x),
    "function first": lambda: (lambda x, t: x) + NET,
    "classifier-free": lambda: sg.ClassifierFree(NET, 2.0, y=1),
    "composed": lambda: Composed(NET, [(2.0, {"y": 1}), (-1.0, {"y": 2})]),
    "autoguidance": lambda: autoguidance(NET, NET.given(y=1), 0.5),
    "tempered": lambda: Tempered(NET, 2.0),
    "product": lambda: Product([(NET, 1.0), (NET.given(y=1), 0.5)]),
    "lifted": lambda: sg.Lifted(NET, CLD),
    "of a sum": lambda: sg.ClassifierFree(NET, 2.0, y=1) + NET.given(y=2),
    "rows": lambda: NET.given(y=torch.arange(3)).rows(slice(1, 2)),
    "what knows less first": lambda: sg.Classifier(Labelled(), 1, NET.sde) + NET,
    "what knows nothing first": lambda: sg.ScoreNetwork(nn.Identity(), NET.sde) + NET,
}


@pytest.mark.parametrize("how", MADE)
def test_what_is_made_of_scores_keeps_everything_but_the_moments(how: str) -> None:
    score = MADE[how]()
    assert isinstance(score, sg.Score)
    kept = told()
    assert score.facts.moments is None
    assert score.facts.units is NET.facts.units
    for name in ("shape", "std", "classes", "levels"):
        assert getattr(score.facts, name) == getattr(kept, name), name
    assert score.shape == (2,)


def test_two_systems_of_units_do_not_add() -> None:
    other = NET.with_facts(told(units=Units(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]))))
    with pytest.raises(ValueError, match="combined must have one system of units"):
        NET + other
    again = told(units=Units(NET.facts.units.shift.clone(), NET.facts.units.scale.clone()))
    assert (NET + NET.with_facts(again)).facts.units is NET.facts.units


def test_facts_are_given_to_a_copy_that_shares_the_network() -> None:
    other = NET.with_facts(told(std=0.2))
    assert (other.facts.std, NET.facts.std) == (0.2, 0.7)
    assert other.net is NET.net


def test_eta_is_passed_on() -> None:
    model = mixture(sg.EDM(250.0))
    model.eta = 0.4
    for made in (
        2.0 * model,
        model + mixture(sg.EDM(250.0)),
        model.given(),
        sg.Lifted(model, CLD),
    ):
        assert made.eta == 0.4


# --- law 19: exact models -------------------------------------------------------------------

SHIFT, SCALE = torch.tensor([300.0, -0.02], dtype=F64), torch.tensor([0.37, 2.9e4], dtype=F64)
UNITS = Units(SHIFT, SCALE)
PLAIN = mixture(sg.VP())
MODEL = PLAIN.with_facts(replace(PLAIN.facts, units=UNITS))


def mapped(z: Tensor) -> Tensor:
    """The map, written out; in the dtype of the samples."""
    return (SHIFT + SCALE * z.double()).to(z.dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "flow": {},
    "noise": {"eta": 1.0},
    "chunks": {"chunk": 3},
    "solver": {"solver": sg.Heun()},
    "times": {"times": [1.0, 0.5, 0.1]},
    "first": {"first": 11},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("trajectory", [False, True])
def test_samples_are_mapped_and_nothing_else(how: str, trajectory: bool) -> None:
    options = {"seed": 1, "dtype": F64, "trajectory": trajectory} | OPTIONS[how]
    z = sg.sample(PLAIN, 7, 6, **options)
    x = sg.sample(MODEL, 7, 6, **options)
    assert x.shape == z.shape
    assert torch.equal(x, mapped(z))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_start_and_what_is_shown_are_in_the_units_of_the_data(eta: float) -> None:
    z = drawn(5, 2)
    seen: list[tuple[Tensor, float]] = []
    plain: list[tuple[Tensor, float]] = []
    options: dict[str, Any] = {"seed": 3, "eta": eta, "dtype": F64, "times": [0.6, 0.3, 0.1, 0.0]}
    at_z = sg.sample(
        PLAIN, 5, start=z, callback=lambda x, t: plain.append((x, t)), trajectory=True, **options
    )
    at_x = sg.sample(
        MODEL,
        5,
        start=mapped(z),
        callback=lambda x, t: seen.append((x, t)),
        trajectory=True,
        **options,
    )
    torch.testing.assert_close(at_z[0], z, rtol=0, atol=0)
    # Into the units and back: 16 digits of a number that is 800 times its spread.
    torch.testing.assert_close(at_x, mapped(at_z), rtol=1e-12, atol=1e-10)
    assert [t for _, t in seen] == [t for _, t in plain] == [0.3, 0.1, 0.0]
    for (x, _), state in zip(seen, at_x[1:], strict=True):
        assert torch.equal(x, state)


def test_log_prob_loses_the_log_determinant() -> None:
    z = drawn(6, 2)
    exact = PLAIN.log_prob(z) - SCALE.log().sum()
    # 96 steps of order 3 leave some 1e-5.
    found = sg.log_prob(MODEL, mapped(z), steps=96).value
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    probes: dict[str, Any] = {"probes": 2, "seed": 5}
    probes |= {"solver": sg.Heun(), "times": torch.linspace(0, 1, 20)}
    torch.testing.assert_close(
        sg.log_prob(MODEL, mapped(z), **probes).value,
        sg.log_prob(PLAIN, z, **probes).value - SCALE.log().sum(),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("facts", [Facts(units=UNITS), Facts((2,), units=UNITS)])
def test_the_determinant_is_counted_whatever_else_is_known(facts: Facts) -> None:
    """A score that does not know its shape has units none the less."""

    class Own(sg.Score):
        sde = PLAIN.sde

        def __call__(self, x: Tensor, t: sg.ops.Time) -> Tensor:
            return PLAIN(x, t)

    z = drawn(3, 2)
    exact = PLAIN.log_prob(z) - SCALE.log().sum()
    # The prior stands for the law at T: it is off by alpha_T^2 = 4e-5 relative to unit variance.
    found = sg.log_prob(Own().with_facts(facts), mapped(z)).value
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-2)


def test_each_channel_of_an_image_has_units() -> None:
    mean, std = drawn(2, 2, 3), 0.2 + drawn(2, 2, 3, seed=1).abs()
    shift = torch.tensor([5.0, -1.0], dtype=F64).reshape(2, 1, 1)
    scale = torch.tensor([0.1, 20.0], dtype=F64).reshape(2, 1, 1)
    plain = sg.Gaussian(sg.VP(), mean, std)
    model = plain.with_facts(replace(plain.facts, units=Units(shift, scale)))
    z = drawn(4, 2, 2, 3, seed=2)
    x = shift + scale * z
    normal = torch.distributions.Normal(shift + scale * mean, scale * std)
    exact = normal.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(sg.log_prob(model, x).value, exact, rtol=1e-4, atol=1e-3)
    drawn_z, drawn_x = (sg.sample(m, 3, 5, seed=0, dtype=F64) for m in (plain, model))
    assert torch.equal(drawn_x, shift + scale * drawn_z)


def test_bits_per_dim_of_the_same_law_in_two_systems_of_units() -> None:
    # x on [-1, 1] is either the process's own, or x = shift + scale z with z about standard.
    sde, shift, scale = sg.VP(), torch.tensor([0.1, -0.2], dtype=F64), 0.25
    means, std = torch.tensor([[0.3, 0.2], [-0.4, -0.1]], dtype=F64), 0.2
    own = sg.GaussianMixture(sde, [0.5, 0.5], means, std)
    standard = sg.GaussianMixture(sde, [0.5, 0.5], (means - shift) / scale, std / scale)
    units = Units(shift, torch.tensor(scale))
    model = standard.with_facts(replace(standard.facts, units=units, levels=16))
    k = torch.randint(0, 16, (6, 2), generator=torch.Generator().manual_seed(0))
    found = sg.bits_per_dim(model, k, steps=96).value
    # Two flows of some 1e-5 nats each.
    torch.testing.assert_close(
        found.double(), sg.bits_per_dim(own, k, 16, steps=96).value.double(), rtol=0, atol=1e-4
    )


def test_units_are_of_the_data_and_not_of_what_a_process_adds() -> None:
    plain = sg.Lifted(mixture(sg.EDM(250.0)), CLD)
    model = plain.with_facts(replace(plain.facts, units=UNITS))
    options: dict[str, Any] = {"seed": 0, "dtype": F64}
    z, x = (sg.sample(m, 4, 5, trajectory=True, **options) for m in (plain, model))
    assert torch.equal(x, mapped(z))
    state = drawn(4, 2, 2)  # position and velocity
    moved = torch.stack([mapped(state[:, 0]), state[:, 1]], 1)
    a = sg.sample(plain, 4, start=state, times=[0.5, 0.2, 0.0], **options)
    b = sg.sample(model, 4, start=moved, times=[0.5, 0.2, 0.0], **options)
    torch.testing.assert_close(b, mapped(a), rtol=1e-12, atol=1e-10)
    flow: dict[str, Any] = {"solver": sg.Heun(), "times": torch.linspace(0, CLD.T, 20)}
    torch.testing.assert_close(
        sg.log_prob(model, moved, **flow).value,
        sg.log_prob(plain, state, **flow).value - SCALE.log().sum(),
        rtol=1e-9,
        atol=1e-9,
    )


def test_guided_samples_are_mapped_too() -> None:
    guide = sg.Gaussian(PLAIN.sde, torch.tensor([0.0, 1.0], dtype=F64), 0.5)
    z, x = (sg.sample(m + 0.5 * guide, 5, 6, seed=2, dtype=F64) for m in (PLAIN, MODEL))
    assert torch.equal(x, mapped(z))
    assert torch.equal(sg.sample(0.5 * guide + MODEL, 5, 6, seed=2, dtype=F64), mapped(z))


def seen_of(x: Tensor, factor: Tensor | float = 1.0) -> Observation:
    """A x, noise 0.3, with A the sum of both columns in units of ``factor``."""
    a = torch.ones(1, 2, dtype=F64) / factor
    return Observation(Matrix(a), a @ x, 0.3)


POSTERIORS: dict[str, dict[str, Any]] = {
    "default": {},
    "Tweedie": {"covariance": Tweedie()},
    "DPS": {"covariance": Point()},
}


@pytest.mark.parametrize("how", POSTERIORS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_posteriors_observe_in_the_units_of_the_data(how: str, chunk: int | None) -> None:
    z = torch.tensor([0.4, -0.3], dtype=F64)
    at_z = Posterior(PLAIN, seen_of(z), **POSTERIORS[how])
    at_x = Posterior(MODEL, seen_of(mapped(z), SCALE), **POSTERIORS[how])
    assert at_x.facts.units is UNITS
    options: dict[str, Any] = {"seed": 3, "dtype": F64, "chunk": chunk}
    found = sg.sample(at_x, 5, 6, **options)
    # y loses the digits that the shift of 300 has: 1e-13 of a noise of 0.3.
    torch.testing.assert_close(
        found, mapped(sg.sample(at_z, 5, 6, **options)), rtol=1e-8, atol=1e-8
    )


def test_the_exact_posterior_of_a_prior_with_units() -> None:
    z = torch.tensor([0.4, -0.3], dtype=F64)
    plain = exact_posterior(PLAIN, seen_of(z))
    posterior = exact_posterior(MODEL, seen_of(mapped(z), SCALE))
    x, wanted = (sg.sample(m, 5, 6, seed=0, dtype=F64) for m in (posterior, plain))
    torch.testing.assert_close(x, mapped(wanted), rtol=1e-8, atol=1e-8)
    # The density of y is in the units of y, whatever those of x.
    told_z, told_x = (
        log_evidence(PLAIN, seen_of(z)),
        log_evidence(MODEL, seen_of(mapped(z), SCALE)),
    )
    torch.testing.assert_close(told_x, told_z, rtol=1e-9, atol=1e-9)
    points = sg.Empirical(sg.VP(), drawn(4, 2))
    both = (points, points.with_facts(replace(points.facts, units=UNITS)))
    a, b = (
        exact_posterior(p, o)
        for p, o in zip(both, (seen_of(z), seen_of(mapped(z), SCALE)), strict=True)
    )
    torch.testing.assert_close(b.log_weights, a.log_weights, rtol=1e-8, atol=1e-8)
    assert b.facts.units is UNITS


# --- law 19: learned models -----------------------------------------------------------------


def trained(x: Tensor, each: Any) -> tuple[sg.ScoreNetwork, list[tuple[int, float]]]:
    torch.manual_seed(0)
    net = MLP((2,), width=8, depth=1).to(x.dtype)
    model = sg.ScoreNetwork(net, sg.VP(), facts=Facts.of(x, each))
    trainer = sg.Trainer(model, x, recipe=sg.Recipe(steps=12, batch=16, every=1), device="cpu")
    return trainer.run(progress=False), trainer.history


DATA = drawn(64, 2, dtype=torch.float32) * torch.tensor([1.0, 3.0]) + torch.tensor([0.0, 2.0])


@pytest.mark.parametrize("each", ["all", "column"])
def test_powers_of_two_change_not_one_bit_of_a_training(each: Any) -> None:
    factor = torch.tensor([2.0**10, 2.0**-7] if each == "column" else [2.0**5, 2.0**5])
    (a, losses), (b, others) = trained(DATA, each), trained(DATA * factor, each)
    assert losses == others
    assert len(losses) == 12
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(sg.sample(b, 5, 4, seed=0), factor * sg.sample(a, 5, 4, seed=0))
    x = DATA[:3]
    change = torch.log(factor.double()).sum()
    torch.testing.assert_close(
        sg.log_prob(b, x * factor).value.double(),
        sg.log_prob(a, x).value.double() - change,
        rtol=0,
        atol=1e-4,
    )


def test_any_factor_and_shift_change_a_training_by_rounding_alone() -> None:
    x = DATA.double()
    shift, factor = torch.tensor([273.15, -1e3], dtype=F64), torch.tensor([0.3, 7e4], dtype=F64)
    (a, losses), (b, others) = trained(x, "column"), trained(shift + factor * x, "column")
    # 1e-16 of a number that is a thousand times its spread, through 12 steps of Adam.
    torch.testing.assert_close([v for _, v in losses], [v for _, v in others], rtol=1e-8, atol=0)
    z, moved = (sg.sample(m, 5, 4, seed=0, dtype=F64) for m in (a, b))
    torch.testing.assert_close(moved, shift + factor * z, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        sg.log_prob(b, shift + factor * x[:3]).value,
        sg.log_prob(a, x[:3]).value - factor.log().sum(),
        rtol=0,
        atol=1e-4,
    )


# --- the new arguments of sample ------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("first", [0, 3, 5])
def test_samples_have_numbers(eta: float, chunk: int | None, first: int) -> None:
    options: dict[str, Any] = {"seed": 9, "eta": eta, "dtype": F64}
    whole = sg.sample(PLAIN, 8, 6, **options)
    part = sg.sample(PLAIN, 3, 6, first=first, chunk=chunk, **options)
    # Sums of three terms may run in another order in another batch.
    torch.testing.assert_close(part, whole[first : first + 3], rtol=1e-12, atol=1e-12)


def test_numbers_are_those_of_one_infinite_sequence() -> None:
    far = 2**40
    a = sg.sample(PLAIN, 4, 5, seed=9, eta=1.0, first=far, dtype=F64)
    b = sg.sample(PLAIN, 2, 5, seed=9, eta=1.0, first=far + 2, dtype=F64)
    torch.testing.assert_close(b, a[2:], rtol=1e-12, atol=1e-12)
    near = sg.sample(PLAIN, 4, 5, seed=9, eta=1.0, dtype=F64)
    assert not bool(torch.isclose(a, near).any())


def test_a_start_takes_the_place_of_the_prior() -> None:
    sde, times = PLAIN.sde, [0.7, 0.4, 0.2, 0.0]
    x = drawn(4, 2)
    found = sg.sample(PLAIN, 4, seed=2, eta=1.0, start=x, times=times, dtype=F64)
    process, solver = sde.reverse(PLAIN, 1.0), sg.default_solver(PLAIN, 1.0)
    assert torch.equal(found, sg.solve(process, x, times, solver, 2))


def test_a_trajectory_is_all_that_a_callback_sees() -> None:
    seen: list[Tensor] = []
    times: list[float] = []
    path = sg.sample(
        MODEL,
        4,
        6,
        seed=0,
        trajectory=True,
        callback=lambda x, t: (seen.append(x), times.append(t)),
    )
    assert path.shape == (7, 4, 2)
    assert torch.equal(path[1:], torch.stack(seen))
    assert torch.equal(path[-1], sg.sample(MODEL, 4, 6, seed=0))
    assert times[-1] == 0.0
    assert sorted(times, reverse=True) == times


def test_eta_is_what_the_model_prefers() -> None:
    model = mixture(sg.VP())
    flow = sg.sample(model, 3, 5, seed=0)
    model.eta = 1.0
    noisy = sg.sample(model, 3, 5, seed=0)
    assert torch.equal(noisy, sg.sample(model, 3, 5, seed=0, eta=1.0))
    assert not torch.equal(noisy, flow)
    assert torch.equal(flow, sg.sample(model, 3, 5, seed=0, eta=0.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"first": -1}, ValueError, "first must be an integer >= 0, got -1"),
        ({"first": 1.5}, ValueError, "first must be an integer >= 0, got 1.5"),
        ({"first": 2, "seed": sg.Streams(0)}, ValueError, "a Noise has its own numbers"),
        ({"start": torch.zeros(3, 2)}, ValueError, r"start must have shape \(4, 2\), got \(3, 2"),
        ({"start": torch.full((4, 2), math.nan)}, ValueError, "start"),
        ({"start": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "start must be floating"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sg.sample(PLAIN, 4, 5, **({"seed": 0} | options))
