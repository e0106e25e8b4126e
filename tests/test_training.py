"""Training: losses against closed forms, the loop against what it promises."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import F64
from torch import nn
from trained import weights

from sde_gen import (
    EDM,
    SDE,
    VE,
    VP,
    CriticallyDamped,
    Facts,
    Gaussian,
    Langevin,
    OrnsteinUhlenbeck,
    ScoreNetwork,
    SubVP,
    Wiener,
    sample,
)
from sde_gen.guidance import classifier_loss
from sde_gen.networks import MLP
from sde_gen.noise import Streams
from sde_gen.ops import as_time
from sde_gen.training import (
    CheckpointError,
    Classification,
    Denoising,
    KarrasWeight,
    LogNormalTimes,
    MinSNRWeight,
    Recipe,
    Trainer,
    TrainingError,
    dsm_loss,
    likelihood_weight,
    load,
    pick_device,
    train,
    uniform_times,
    uniform_weight,
)
from sde_gen.training.losses import drop
from sde_gen.training.recipe import learning_rate, power_of_width

SDES = [VP(), SubVP(), VE(), EDM(80.0), OrnsteinUhlenbeck(), Wiener()]
C = 0.7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def name(value) -> str:
    return type(value).__name__


# --- the loss -------------------------------------------------------------------------------

# Each weighting as published: the weight of |s - target|^2 in sigma, alpha and g.
PUBLISHED = [
    (uniform_weight, lambda a, s, g: s**2),
    (likelihood_weight, lambda a, s, g: g**2),
    # (r^2 + c^2) / (r c)^2 on |D - x_0|^2 = (sigma^2 / alpha)^2 |s - target|^2
    (
        KarrasWeight(C),
        lambda a, s, g: ((s / a) ** 2 + C**2) / ((s / a) ** 2 * C**2) * (s**2 / a) ** 2,
    ),
    (MinSNRWeight(5.0), lambda a, s, g: torch.clamp((a / s) ** 2, max=5.0) * (s**2 / a) ** 2),
]


@pytest.mark.parametrize(("weighting", "published"), PUBLISHED, ids=["noise", "g2", "edm", "snr"])
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_weighting_is_the_published_one(sde, weighting, published):
    t = sde.T * torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=F64)
    x = torch.randn(4, 5, dtype=F64)
    score = Gaussian(sde, torch.zeros(5, dtype=F64), 1.3)
    loss = dsm_loss(score, sde, x, t, weighting, seeded())
    p = sde.perturb(x, t, seeded())
    weight = published(sde.alpha(t), sde.sigma(t), sde.diffusion(t))
    expected = weight * (score(p.x, t) - p.score).square().mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_loss_of_the_exact_score_is_known(sde):
    # Given x_t the noise has the variance alpha^2 v / (alpha^2 v + sigma^2).
    n, d, v = 4000, 8, 0.6**2
    score = Gaussian(sde, torch.full((d,), 0.5, dtype=F64), math.sqrt(v))
    t = sde.T * torch.tensor([0.02, 0.2, 0.7], dtype=F64).repeat_interleave(n)
    loss = dsm_loss(score, sde, score.sample(len(t), seeded(1)), t, noise=seeded(2))
    a2, s2 = sde.alpha(t) ** 2, sde.sigma(t) ** 2
    ratio = (loss * (a2 * v + s2) / (a2 * v)).reshape(3, n).mean(1)
    spread = math.sqrt(2 / (n * d))
    torch.testing.assert_close(ratio, torch.ones(3, dtype=F64), rtol=0, atol=4.5 * spread)


@pytest.mark.parametrize("sde", [VP(), EDM(80.0)], ids=name)
def test_karras_loss_of_a_gaussian_is_one_at_every_level(sde):
    n, d = 4000, 8
    score = Gaussian(sde, torch.zeros(d, dtype=F64), C)
    t = LogNormalTimes()(sde, Streams(0).spread(n))
    loss = dsm_loss(score, sde, score.sample(n, seeded(1)), t, KarrasWeight(C), seeded(2))
    assert abs(float(loss.mean()) - 1) < 4.5 * math.sqrt(2 / (n * d))


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_the_exact_score_is_the_minimum(sde):
    # E loss(s + e) - E loss(s) = w sigma^2 |e|^2 for every error e: here constant and linear in x.
    n, v = 40_000, 0.6**2
    score = Gaussian(sde, torch.zeros(1, dtype=F64), math.sqrt(v))
    x, t = score.sample(n, seeded(1)), torch.tensor(0.3 * sde.T, dtype=F64)
    s2 = float(sde.sigma(t) ** 2)
    total = float(sde.alpha(t) ** 2) * v + s2
    best = dsm_loss(score, sde, x, t, noise=seeded(2))
    for error, size in [
        (lambda x, t: torch.full_like(x, 0.3 / math.sqrt(s2)), 0.3**2 / s2),
        (lambda x, t: 0.2 * x / math.sqrt(s2 * total), 0.2**2 / s2),
    ]:
        rise = dsm_loss(score + error, sde, x, t, noise=seeded(2)) - best
        spread = float(rise.std()) / math.sqrt(n)
        assert abs(float(rise.mean()) - s2 * size) < 4.5 * spread
        assert spread < 0.1 * s2 * size


def test_loss_of_a_process_without_a_kernel():
    # Langevin towards N(0, 1), simulated in k steps: x_t = (1 - h/2)^k x_0 + ..., all Gaussian.
    target = Gaussian(VP(), torch.zeros(1, dtype=F64), 1.0)
    sde = Langevin(target)
    n, t = 100_000, 0.5
    h = t / sde.steps
    variance = 1.0
    for _ in range(sde.steps):
        variance = (1 - h / 2) ** 2 * variance + h
    x = target.sample(n, seeded(1))
    loss = dsm_loss(lambda x, t: -x, sde, x, torch.tensor(t), noise=seeded(2))
    # residual = z - sqrt(h) x_t, and the last step gives E x_t z = sqrt(h)
    expected = 1 - 2 * h + h * variance
    assert abs(float(loss.mean()) - expected) < 4.5 * math.sqrt(2 / n)
    for weighting in (likelihood_weight, KarrasWeight(), MinSNRWeight()):
        with pytest.raises(TypeError, match="LinearSDE"):
            dsm_loss(target, sde, x[:2], torch.tensor(t), weighting)


def test_nothing_is_lost_in_float32():
    sde = VP()
    t = torch.logspace(-6, 0, 200, dtype=F64)
    score = Gaussian(sde, torch.zeros(64, dtype=F64), C)
    x = score.sample(200, seeded())
    exact = dsm_loss(score, sde, x, t, KarrasWeight(C), seeded(1))
    z = (sde.perturb(x, t, seeded(1)).noise).float()

    class Same(VP):
        def perturb(self, x, t, noise=None):
            p = super().perturb(x, t, seeded())
            return p._replace(x=p.mean + p.std * z, noise=z)

    single = dsm_loss(score, Same(), x.float(), t, KarrasWeight(C))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-4, atol=0)


class Mixing(SDE):
    """A process without a kernel whose drift multiplies matrices with states."""

    T, steps = 1.0, 3

    def drift(self, x, t):
        return x @ torch.tensor([[-1.0, 0.3], [0.7, -2.0]])

    def diffusion(self, t):
        return torch.ones_like(as_time(t))


def in_half(function):
    def call(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    return call


@pytest.mark.parametrize("sde", [VP(), CriticallyDamped(), Mixing()], ids=name)
def test_only_the_network_of_a_loss_runs_in_half_precision(sde):
    n = 64
    x = torch.randn(n, *(1, 2) if isinstance(sde, CriticallyDamped) else (2,))
    t = torch.linspace(0.1, 1, n)
    torch.manual_seed(1)
    linear = nn.Linear(2, 2)

    def network(x, t):
        return linear(x)

    def loss(score):
        return dsm_loss(score, sde, x, t, noise=seeded(3))

    # A score without matrices has no rounding of its own: nothing at all may change.
    found = in_half(loss)(lambda x, t: -x)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(lambda x, t: -x))
    # Of a network, its own rounding is all.
    assert torch.equal(in_half(loss)(network), loss(in_half(network)))
    assert not torch.equal(loss(in_half(network)), loss(network))


class Turning(VP):
    """Multiplies matrices with states where it perturbs them."""

    def perturb(self, x, t, generator=None):
        p = super().perturb(x, t, generator)
        return p._replace(x=p.x @ torch.tensor([[0.8, 0.6], [-0.6, 0.8]]))


@pytest.mark.parametrize("sde", [CriticallyDamped(), Turning()], ids=name)
def test_only_the_network_of_a_classifier_runs_in_half_precision(sde):
    n = 64
    x, y = torch.randn(n, 1, 2), torch.arange(n) % 3
    t = torch.linspace(0.1, 1, n)
    torch.manual_seed(1)
    linear = nn.Linear(2, 3)

    def network(x, c):
        return linear(x.reshape(n, 2))

    def loss(net):
        return classifier_loss(net, sde, x, y, t, noise=seeded(3))

    found = in_half(loss)(network)
    assert found.dtype == torch.float32
    logits = in_half(network)
    assert torch.equal(found, loss(lambda x, c: logits(x, c).float()))
    assert not torch.equal(found, loss(network))


@pytest.mark.parametrize("kind", ["score", "classifier"])
def test_times_of_a_batch_are_spread_evenly(kind):
    # u_m = u_0 + m / phi mod 1: no two times of a batch are far apart or near, see Streams.
    n, sde, seen = 16, VP(), []

    def times(sde, u):
        seen.append(u)
        return uniform_times(sde, u)

    def watch(x, c, **_):
        seen.append(c)
        return x

    x = torch.randn(n, 2)
    if kind == "score":
        model = ScoreNetwork(nn.Identity(), sde)
        model.net.forward = watch
        Denoising(times=times)(model, x, None, Streams(5, 32))
    else:
        Classification(sde, times=times)(watch, x, torch.arange(n) % 2, Streams(5, 32))
    u, c = seen
    turns = (u - u[0]) % 1
    expected = torch.arange(n, dtype=F64) * (math.sqrt(5) - 1) / 2 % 1
    torch.testing.assert_close(turns, expected, rtol=0, atol=1e-12)
    t = uniform_times(sde, u)
    # the noise level that the network sees is that of its own time, a sample at a time
    level = 0.25 * (sde.sigma(t) / sde.alpha(t)).log()
    torch.testing.assert_close(c.double(), level, rtol=1e-6, atol=1e-6)
    assert len(set(c.tolist())) == n


def test_loss_refuses():
    sde, x = VP(), torch.zeros(4, 3)
    with pytest.raises(TypeError, match="floating"):
        dsm_loss(lambda x, t: x, sde, x.long(), torch.full((4,), 0.5))
    with pytest.raises(ValueError, match=r"shape \(4, 1\)"):
        dsm_loss(lambda x, t: x[:, :1], sde, x, torch.full((4,), 0.5))
    with pytest.raises(TypeError, match=r"the score's result.*NoneType"):
        dsm_loss(lambda x, t: None, sde, x, torch.full((4,), 0.5))


# --- the times ------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM(80.0)], ids=name)
def test_log_normal_times_have_the_truncated_density(sde):
    from scipy.stats import truncnorm

    mean, std = -1.0, 1.5
    u = (torch.arange(50, dtype=F64) + 0.5) / 50
    got = -0.5 * sde.log_snr(LogNormalTimes(mean, std)(sde, u))
    low, high = (math.log(0.005) - mean) / std, (-0.5 * float(sde.log_snr(sde.T)) - mean) / std
    expected = torch.from_numpy(truncnorm(low, high, loc=mean, scale=std).ppf(u.numpy()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_times_stay_where_the_score_is_regular():
    u = torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=F64)
    for sde in SDES:
        for times in (LogNormalTimes(), LogNormalTimes(20.0, 0.5), uniform_times):
            t = times(sde, u)
            assert ((t > 0) & (t <= sde.T)).all()
            assert torch.isfinite(sde.sigma(t)).all()


def test_labels_are_dropped_at_their_rate():
    y = torch.arange(10).repeat(1000)
    dropped = drop({"y": y}, 0.2, Streams(0))["y"]
    gone = dropped == -1
    assert torch.equal(dropped[~gone], y[~gone])
    assert abs(float(gone.double().mean()) - 0.2) < 4.5 * math.sqrt(0.16 / 10_000)


# --- the recipe -----------------------------------------------------------------------------


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(p / 1000, 0.1) for p in range(1001)]
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(1)
    assert rates[550] == pytest.approx(0.5)
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_average_has_the_width_that_was_asked_for(width):
    # A weight that equals the time (and one its square) gives the profile's mean and spread.
    class Clock(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(2, dtype=F64))

    n, model = 3000, Clock()
    trainer = Trainer(model, torch.zeros(1, 1), recipe=Recipe(steps=1, ema=width), device="cpu")
    for k in range(1, n + 1):
        model.p.data = torch.tensor([k / n, (k / n) ** 2], dtype=F64)
        trainer.average.update_parameters(model)
    mean, square = trainer.average.module.p.tolist()
    gamma = power_of_width(width)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=2 / n)
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=0.02)


def test_average_of_half_precision_is_not_in_half_precision():
    # Values 1 for k < m and 1 + h from there on: the average keeps
    # prod_{k = m..n} (1 - 1/k)^(gamma + 1) = ((m - 1) / n)^(gamma + 1) of the first. A new value
    # moves it by less than bfloat16 can tell as soon as k > gamma + 1.
    m, n, h = 2001, 4000, 2.0**-7
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    trainer = Trainer(model, torch.zeros(1, 1), recipe=Recipe(steps=1, ema=0.28), device="cpu")
    for k in range(1, n + 1):
        model.weight.data.fill_(1.0 if k < m else 1 + h)
        trainer.average.update_parameters(model)
    found = trainer.average.module.weight.detach()
    assert found.dtype == torch.float32
    expected = 1 + h - h * ((m - 1) / n) ** (power_of_width(0.28) + 1)
    assert float(found) == pytest.approx(expected, abs=h / 1000)


def test_a_model_in_half_precision_is_averaged_finer(tmp_path):
    model = small().to(torch.bfloat16)
    recipe = Recipe(steps=3, batch=16)
    average = train(model, DATA, recipe=recipe, folder=tmp_path, progress=False, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in average.parameters()} == {torch.float32}
    double = small().double()
    average = train(double, DATA.double(), recipe=recipe, progress=False, device="cpu")
    assert {p.dtype for p in average.parameters()} == {torch.float64}


def test_recipe_has_an_end():
    assert Recipe().steps == 10_000
    assert Recipe(minutes=1.0).steps is None


def test_recipe_takes_the_numbers_of_numpy():
    integers = {"steps": 7, "batch": 5, "every": 3, "seed": -2}
    numbers = {"minutes": 0.5, "lr": 0.25, "clip": 2.0, "save_every": 4.0, "warmup": 0.125}
    given = {k: np.int32(v) for k, v in integers.items()}
    given |= {k: np.float32(v) for k, v in numbers.items()}
    recipe = Recipe(**given)
    assert recipe == Recipe(**integers, **numbers)
    assert repr(recipe) == repr(Recipe(**integers, **numbers))
    assert Recipe(batch=torch.tensor(5)).batch == 5


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": math.inf}, "steps must be an integer >= 1, got inf"),
        ({"steps": "ten"}, "steps must be an integer >= 1, got 'ten'"),
        ({"batch": None}, "batch must be an integer >= 1, got None"),
        ({"every": True}, "every"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"minutes": -1.0}, "minutes"),
        ({"batch": 0}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"ema": 0.3}, "ema"),
        ({"warmup": 1.0}, "warmup"),
    ],
    ids=str,
)
def test_recipe_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        Recipe(**options)


@pytest.mark.parametrize("name", ["minutes", "lr", "warmup", "clip", "ema", "save_every"])
@pytest.mark.parametrize("value", ["1", True, 1j, [0.1]])
def test_recipe_takes_numbers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, got "):
        Recipe(**{name: value})


# --- the loop -------------------------------------------------------------------------------


def small(dropout: float = 0.0, classes: int | None = None) -> ScoreNetwork:
    torch.manual_seed(0)
    net = MLP((2,), width=32, depth=2, dropout=dropout, classes=classes)
    return ScoreNetwork(net, VP(), facts=Facts(std=0.6))


DATA = torch.randn(500, 2, generator=seeded(7)) * torch.tensor([0.8, 0.3]) + 0.2
LABELS = torch.arange(500) % 3


def test_learns_the_score_of_a_gaussian():
    exact = Gaussian(VP(), torch.tensor([0.2, 0.2]), torch.tensor([0.8, 0.3]))
    recipe = Recipe(steps=600, batch=256, lr=5e-3)

    def fresh(x, noise):
        z = noise.normal(x, "fresh")
        return z * torch.tensor([0.8, 0.3]) + 0.2

    model = train(small(), DATA, recipe=recipe, transform=fresh, progress=False, device="cpu")
    x = exact.sample(2000, seeded(3)).float()
    for t, most in ((0.05, 0.15), (0.2, 0.06), (0.5, 0.01)):
        t = torch.tensor(t)
        x_t = VP().perturb(x, t, seeded(4)).x
        error = model(x_t, t) - exact(x_t, t)
        relative = (error.square().mean() / exact(x_t, t).square().mean()).sqrt()
        assert relative < most
    drawn = sample(model, 2000, seed=0)
    torch.testing.assert_close(drawn.std(0), torch.tensor([0.8, 0.3]), rtol=0.1, atol=0)


def test_run_depends_on_its_seed_alone():
    results = []
    for outside, seed in ((1, 0), (2, 0), (2, 1)):
        model = small(dropout=0.2)
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        recipe = Recipe(steps=15, batch=32, seed=seed)
        average = train(
            model,
            DATA,
            recipe=recipe,
            transform=lambda x, g: x + 0.01 * torch.randn_like(x),
            progress=False,
            device="cpu",
        )
        assert torch.equal(torch.get_rng_state(), before)
        results.append(weights(average))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_learning_rate_of_a_step_is_that_of_its_middle():
    rates = []

    def watch(model, x, y, generator):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return Denoising()(model, x, y, generator)

    recipe = Recipe(steps=4, batch=8, lr=0.01, warmup=0.5, every=3)
    trainer = Trainer(small(), DATA, recipe=recipe, objective=watch, device="cpu")
    trainer.run(progress=False)
    # progress 1/8, 3/8, 5/8, 7/8: half and half of the way up, then of the cosine
    expected = [0.25, 0.75, (1 + math.cos(math.pi / 4)) / 2, (1 + math.cos(3 * math.pi / 4)) / 2]
    assert rates == pytest.approx([0.01 * r for r in expected])


class Clock:
    """Stands in for the module ``time``; each batch that is drawn takes some seconds."""

    def __init__(self, monkeypatch, seconds: float) -> None:
        self.now, self.seconds = 100.0, seconds
        monkeypatch.setattr("sde_gen.training.clock.time", self)

    def perf_counter(self) -> float:
        return self.now

    def __call__(self, x, generator):
        self.now += self.seconds
        return x


@pytest.mark.parametrize(("seconds", "steps"), [(30.0, 1), (6.0, 1), (2.5, 3), (0.5, 12)])
def test_the_clock_is_read_every_step(seconds, steps, monkeypatch):
    recipe = Recipe(minutes=0.1, batch=16)
    clock = Clock(monkeypatch, seconds)
    trainer = Trainer(small(), DATA, recipe=recipe, transform=clock, device="cpu")
    trainer.run(progress=False)
    assert trainer.step == steps
    assert trainer.elapsed == pytest.approx(seconds * steps)


def test_the_rate_follows_the_clock(monkeypatch):
    rates = []

    def watch(model, x, y, generator):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return Denoising()(model, x, y, generator)

    recipe = Recipe(minutes=4 / 60, batch=8, lr=0.01, warmup=0.5)
    clock = Clock(monkeypatch, 1.0)
    trainer = Trainer(small(), DATA, recipe=recipe, objective=watch, transform=clock, device="cpu")
    trainer.run(progress=False)
    # as above, but for the first step: nothing is known of the clock's speed yet
    expected = [0, 0.75, (1 + math.cos(math.pi / 4)) / 2, (1 + math.cos(3 * math.pi / 4)) / 2]
    assert rates == pytest.approx([0.01 * r for r in expected])


def test_the_bar_moves_with_slow_steps(monkeypatch):
    class Bar:
        n, shown = 0.0, []

        def set_postfix_str(self, text, refresh):
            assert text.startswith("loss ")

        def update(self, more):
            self.n += more
            self.shown.append(self.n)

    clock = Clock(monkeypatch, 30.0)
    recipe = Recipe(minutes=2.0, batch=16)
    trainer = Trainer(small(), DATA, recipe=recipe, transform=clock, device="cpu")
    bar = contextlib.nullcontext(Bar())
    monkeypatch.setattr("sde_gen.training.trainer.bar_of", lambda show: bar)
    trainer.run()
    assert Bar.shown == [25, 50, 75, 100]
    assert len(trainer.history) == 4


@pytest.mark.parametrize("rows", [1, 2, 500])
def test_a_transform_may_write_into_what_it_is_given(rows):
    data = DATA[:rows].clone()
    recipe = Recipe(steps=3, batch=8)

    def double(x, generator):
        return x.mul_(2)

    found = train(small(), data, recipe=recipe, transform=double, progress=False, device="cpu")
    assert torch.equal(data, DATA[:rows])
    same = train(
        small(), data, recipe=recipe, transform=lambda x, g: 2 * x, progress=False, device="cpu"
    )
    assert torch.equal(weights(found), weights(same))


def test_every_sample_of_a_run_draws_for_itself_whoever_computes_it():
    drawn: dict[tuple[int, int], list] = {}

    def watch(model, x, y, noise):
        u = noise.uniform(x, "mine")
        drawn[trainer._rank, trainer.step] = [x, y, u, noise.spread(len(x)), torch.rand(4)]
        return Denoising()(model, x, y, noise)

    def run(rank: int, processes: int) -> None:
        nonlocal trainer
        recipe = Recipe(steps=3, batch=64, seed=4)
        trainer = Trainer(small(classes=3), DATA, LABELS, recipe, objective=watch, device="cpu")
        trainer.processes = processes
        if rank:
            trainer.accelerator = SimpleNamespace(process_index=rank)
        for trainer.step in (0, 1):
            trainer._step(trainer.model)

    trainer = None
    run(0, 1)
    whole = dict(drawn)
    drawn.clear()
    run(0, 2)
    run(1, 2)
    for step in (0, 1):
        parts = zip(drawn[0, step], drawn[1, step], strict=True)
        # Items, labels, draws and times are those of one process; dropout is each one's own.
        *together, dropout = [torch.cat(pair) for pair in parts]
        for found, alone in zip(together, whole[0, step], strict=False):
            assert torch.equal(found, alone)
        assert len(torch.unique(dropout)) == 8
    assert not torch.isin(whole[0, 0][2], whole[0, 1][2]).all()


class Stops:
    """A transform that fails at a given step, once."""

    def __init__(self, step: int) -> None:
        self.left = step + 1  # the check of the data makes one call

    def __call__(self, x, generator):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return x


def test_resumed_run_is_the_run(tmp_path):
    recipe = Recipe(steps=45, batch=32, save_every=1e-9)
    options = {"progress": False, "device": "cpu", "transform": lambda x, g: x}
    straight = train(small(0.2, 3), DATA, LABELS, recipe, **options)
    stopped = options | {"transform": Stops(27), "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        train(small(0.2, 3), DATA, LABELS, recipe, **stopped)
    other = small(0.2, 3)
    for p in other.parameters():
        nn.init.zeros_(p)
    resumed = train(other, DATA, LABELS, recipe, folder=tmp_path, resume=True, **options)
    assert torch.equal(weights(resumed), weights(straight))
    assert torch.equal(weights(load(tmp_path)), weights(straight))


def test_resume_refuses(tmp_path):
    recipe = Recipe(steps=5, batch=32)
    train(small(), DATA, recipe=recipe, folder=tmp_path, progress=False, device="cpu")
    wider = ScoreNetwork(MLP((2,), width=48, depth=2), VP())
    with pytest.raises(CheckpointError, match="not of this model"):
        Trainer(wider, DATA, recipe=recipe, folder=tmp_path, device="cpu").resume()
    state = tmp_path / "training.pt"
    (tmp_path / "training.before.pt").unlink()
    state.write_bytes(state.read_bytes()[:1000])
    trainer = Trainer(small(), DATA, recipe=recipe, folder=tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="truncated or cannot be read"):
        trainer.resume()
    state.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        trainer.resume()


def test_gradients_are_clipped():
    def steep(model, x, y, generator):
        return 1e6 * sum(p.sum() for p in model.parameters()) * torch.ones(len(x))

    trainer = Trainer(
        small(), DATA, recipe=Recipe(steps=1, clip=0.5), objective=steep, device="cpu"
    )
    trainer.run(progress=False)
    first = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.model.parameters()]
    norm = math.sqrt(sum(float(m.square().sum()) for m in first))
    assert norm == pytest.approx((1 - 0.9) * 0.5, rel=1e-4)
    second = [trainer.optimizer.state[p]["exp_avg_sq"] for p in trainer.model.parameters()]
    total = sum(float(v.sum()) for v in second)
    assert total == pytest.approx((1 - 0.99) * 0.5**2, rel=1e-4)


def test_time_ends_a_run():
    recipe = Recipe(minutes=0.5 / 60, batch=16, every=2)
    trainer = Trainer(small(), DATA, recipe=recipe, device="cpu")
    trainer.run(progress=False)
    assert trainer.step > 2
    assert 0.5 <= trainer.elapsed < 20
    assert trainer.optimizer.param_groups[0]["lr"] < 0.5 * recipe.lr


def test_bar_shows_the_loss(capsys):
    train(small(), DATA, recipe=Recipe(steps=20, batch=16), device="cpu")
    shown = capsys.readouterr().err
    assert "loss" in shown
    assert "100 %" in shown


class Breaks(nn.Module):
    """A network that goes wrong at its n-th call."""

    shape = (2,)

    def __init__(self, call: int, how: str) -> None:
        super().__init__()
        self.inner, self.left, self.how = MLP((2,), width=16, depth=1), call, how

    def forward(self, x, c, y=None):
        self.left -= 1
        out = self.inner(x, c)
        if self.left >= 0:
            return out
        return out[:, :1] if self.how == "shape" else out * math.nan


@pytest.mark.parametrize("how", ["shape", "nan"])
def test_failure_keeps_the_last_good_weights(how, tmp_path):
    model = ScoreNetwork(Breaks(17, how), VP())
    seen = []

    def watch(model, x, y, generator):
        seen.append(weights(model))
        return Denoising()(model, x, y, generator)

    trainer = Trainer(
        model, DATA, recipe=Recipe(steps=100, batch=16), objective=watch, device="cpu"
    )
    with pytest.raises(TrainingError, match="step 17") as info:
        trainer.run(progress=False)
    assert (info.value.step, info.value.kept) == (17, 10)
    assert trainer.step == trainer.average.steps == 10
    assert ("shape" if how == "shape" else "nan") in str(info.value)
    assert torch.equal(weights(model), seen[10])
    assert torch.isfinite(weights(trainer.average)).all()


def test_a_broken_gradient_is_seen_at_its_step():
    # The loss stays finite, and the step is the last of its window.
    def sharp(model, x, y, generator):
        sharp.calls = getattr(sharp, "calls", 0) + 1
        loss = Denoising()(model, x, y, generator)
        broken = (0 * next(model.parameters())).abs().sqrt().sum()
        return loss + broken if sharp.calls == 10 else loss

    model = small()
    trainer = Trainer(
        model, DATA, recipe=Recipe(steps=50, batch=16), objective=sharp, device="cpu"
    )
    with pytest.raises(TrainingError, match="step 9: the gradient's norm is nan"):
        trainer.run(progress=False)
    assert torch.isfinite(weights(model)).all()


def test_failure_leaves_a_checkpoint(tmp_path):
    def late(model, x, y, generator):
        late.calls = getattr(late, "calls", 0) + 1
        loss = Denoising()(model, x, y, generator)
        return loss * math.inf if late.calls > 25 else loss

    recipe = Recipe(steps=100, batch=16)
    with pytest.raises(TrainingError, match="step 25: the loss is inf"):
        train(
            small(),
            DATA,
            recipe=recipe,
            objective=late,
            folder=tmp_path,
            progress=False,
            device="cpu",
        )
    assert torch.isfinite(weights(load(tmp_path))).all()


def broken(i: int, value: float) -> torch.Tensor:
    x = DATA.clone()
    x[i, 1] = value
    return x


BAD_DATA = [
    (DATA.numpy(), None, TypeError, "torch.Tensor"),
    ((255 * DATA).to(torch.uint8), None, TypeError, "floating point"),
    (broken(3, math.nan), None, ValueError, r"NaN or infinite.*\(3, 1\)"),
    (broken(5, math.inf), None, ValueError, r"NaN or infinite.*\(5, 1\)"),
    (DATA.repeat(1, 2), None, ValueError, r"\(N, 2\), got \(500, 4\)"),
    (DATA[:0], None, ValueError, "N >= 1"),
    (DATA, LABELS, ValueError, "no classes"),
    (DATA, LABELS.tolist(), ValueError, "no classes"),
]


@pytest.mark.parametrize(("data", "labels", "error", "words"), BAD_DATA)
def test_bad_data_are_refused_before_work(data, labels, error, words):
    with pytest.raises(error, match=words):
        train(small(), data, labels, device="cpu")


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (None, ValueError, "3 classes"),
        (LABELS + 1, ValueError, r"0 \.\. 2, got 3 at index 2"),
        (LABELS - 1, ValueError, "got -1 at index 0"),
        (LABELS.float(), TypeError, "int64"),
        (LABELS.numpy(), TypeError, r"labels must be a torch\.Tensor of int64, got ndarray"),
        (LABELS.int(), TypeError, r"int64, got torch\.int32"),
        (LABELS[:10], ValueError, r"\(500,\)"),
    ],
)
def test_bad_labels_are_refused_before_work(labels, error, words):
    with pytest.raises(error, match=words):
        train(small(classes=3), DATA, labels, device="cpu")


def test_transform_may_take_integers():
    levels = (100 + 20 * DATA).to(torch.uint8)

    def scale(x, generator):
        return x.float() / 100 - 1

    recipe = Recipe(steps=3, batch=8)
    train(small(), levels, recipe=recipe, transform=scale, progress=False, device="cpu")
    with pytest.raises(TypeError, match=r"transform\(data\)"):
        train(small(), levels, recipe=recipe, transform=lambda x, g: x, device="cpu")


def test_a_model_that_cannot_be_saved_is_refused_before_work(tmp_path):
    class Own(VP):
        pass

    model = ScoreNetwork(MLP((2,)), Own())
    with pytest.raises(TypeError, match="Own"):
        train(model, DATA, device="cpu", folder=tmp_path)


def test_classifier_learns_from_noisy_data():
    # Two classes at +-1 with spread 0.2: p(y | x_t) is a logistic function known exactly.
    y = torch.arange(1000) % 2
    x = (2.0 * y - 1).unsqueeze(1) + 0.2 * torch.randn(1000, 1, generator=seeded(1))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2))

        def forward(self, x, c):
            return self.body(torch.cat([x, c.reshape(-1, 1).expand(len(x), 1)], 1))

    torch.manual_seed(0)
    sde, recipe = VP(), Recipe(steps=500, batch=256, lr=1e-2)
    net = train(
        Logits(), x, y, recipe, objective=Classification(sde), progress=False, device="cpu"
    )
    from sde_gen import Classifier

    t = torch.tensor(0.3)
    a, s2 = float(sde.alpha(t)), float(sde.sigma(t)) ** 2
    v = a**2 * 0.2**2 + s2
    points = torch.linspace(-1, 1, 9).unsqueeze(1)
    exact = torch.sigmoid(2 * a * points / v).squeeze(1)
    got = Classifier(net, 1, sde).log_prob(points, t)
    torch.testing.assert_close(got.exp(), exact, rtol=0, atol=0.08)


def test_device_that_is_not_there_is_named():
    if not torch.cuda.is_available():
        assert pick_device().type in ("cpu", "mps")
        with pytest.raises(RuntimeError, match="sees 0 CUDA devices"):
            train(small(), DATA, device="cuda")
    with pytest.raises(RuntimeError, match="cuda:99"):
        pick_device("cuda:99")
    with pytest.raises(ValueError, match="no device"):
        pick_device("gpu")


def test_missing_accelerate_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'sde-gen\[train\]'"):
        train(small(), DATA, device="cpu")


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch):
    accelerate = SimpleNamespace(
        Accelerator=lambda cpu: SimpleNamespace(num_processes=1, device="cpu" if cpu else "mps")
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", accelerate)
    with pytest.raises(RuntimeError, match="2 processes were launched, but accelerate joins 1"):
        train(small(), DATA, device="cpu")


TWO = """
import sys, torch
from sde_gen import VP, ScoreNetwork
from sde_gen.networks import MLP
from sde_gen.training import Recipe, Trainer
data = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
model = ScoreNetwork(MLP((2,), width=16, depth=1), VP())
folder, steps, minutes, slow = sys.argv[1], *(float(a) if a else None for a in sys.argv[2:5])
seen = []

def watch(x, generator):
    seen.append(x)
    if slow:
        print("step", flush=True)
        torch.rand(()).sum(), __import__("time").sleep(slow)
    return x

recipe = Recipe(steps=steps and int(steps), minutes=minutes, batch=32)
trainer = Trainer(model, data, recipe=recipe, transform=watch, folder=folder)
if "resume" in sys.argv:
    trainer.resume()
average = trainer.run(progress=False)
assert trainer.processes == 2 and len(seen[-1]) == 16, trainer.processes

def both(x):
    return trainer.accelerator.gather(x.unsqueeze(0))

flat = torch.cat([p.flatten() for p in average.parameters()])
a, b = both(flat)
assert torch.equal(a, b)
a, b = both(torch.stack(seen[1:]))
assert not torch.isin(a, b).all(2).all(), "both ranks saw the same rows"
a, b = both(torch.tensor([trainer.elapsed, trainer.step], dtype=torch.float64))
assert torch.equal(a, b)
assert trainer.step == (steps or trainer.step) > 0
print("agree" if trainer.is_main else "")
"""


def launch(folder, *arguments: object) -> subprocess.Popen[str]:
    """Two processes on CPUs, as torchrun starts them: nothing tells accelerate of them."""
    script = folder / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    return subprocess.Popen(
        [*command, str(script), str(folder / "run"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_processes_agree_and_resume(tmp_path):
    step = 0
    for arguments in (("", 0.02), (20, "")):
        steps = step + arguments[0] if arguments[0] else ""
        process = launch(tmp_path, steps, arguments[1], "", *["resume"] * bool(step))
        out, error = process.communicate(timeout=180)
        assert "agree" in out, error
        found = torch.load(tmp_path / "run" / "training.pt", weights_only=True)["step"]
        assert found == steps or not step
        step = found
    load(tmp_path / "run")


@pytest.mark.slow
def test_processes_stop_together_and_save(tmp_path):
    process = launch(tmp_path, 10_000, "", 0.2)
    for _ in range(8):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    state = torch.load(tmp_path / "run" / "training.pt", weights_only=True)
    # two lines for the checks of the data, then two a step
    assert 2 <= state["step"] <= 10
    assert not (tmp_path / "run" / "training.lock").exists()
    process = launch(tmp_path, state["step"] + 5, "", "", "resume")
    out, error = process.communicate(timeout=180)
    assert "agree" in out, error


def test_copies_of_a_model_do_not_share_weights():
    model = small()
    start = copy.deepcopy(model)
    average = train(model, DATA, recipe=Recipe(steps=20, batch=16), progress=False, device="cpu")
    assert not average.training
    assert all(p.requires_grad for p in average.parameters())
    assert not torch.equal(weights(model), weights(start))
    assert not torch.equal(weights(average), weights(model))


@pytest.mark.parametrize("expected", [0.02, 1.0, 50.0])
@pytest.mark.parametrize(("ratio", "warned"), [(0.09, 1), (0.11, 0), (9.0, 0), (11.0, 1)])
def test_data_of_another_scale_are_warned_of(expected: float, ratio: float, warned: int) -> None:
    data = torch.tensor([[-1.0], [1.0]]) * ratio * expected
    model = ScoreNetwork(MLP((1,), 8, 1), VP(), facts=Facts((1,), expected))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(model, data, recipe=Recipe(steps=1, batch=2))
    assert sum("the model expects" in str(w.message) for w in caught) == warned
