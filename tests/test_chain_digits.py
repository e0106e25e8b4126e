"""The chain on a trained network: held-out digits given their class, bits a pixel."""

from __future__ import annotations

import math

import pytest
import torch

import sde_gen as sg
from sde_gen import data, grids
from sde_gen.chain import Hybrid, NodeTimes
from sde_gen.data import Dequantise, quantise
from sde_gen.networks import UNet
from sde_gen.training import KarrasWeight

LEVELS = 17


def chain(sde: sg.LinearSDE, end: float, variance: float) -> sg.Chain:
    stop = float(sde.time_at(-2 * math.log(end)))
    times = grids.information(sde, 100, end=stop, reference=variance, to_zero=True)
    return sg.Chain(sde, times)


@pytest.mark.slow
def test_learned_variances_on_trained_digits() -> None:
    """At most 1.88 bits a pixel with 100 steps, after two thirds of the demo's training; a fixed
    variance costs more with ten times the steps; ten times fewer draws of t than in log SNR."""
    pytest.importorskip("sklearn")
    train, test, sde = data.digits("train"), data.digits("test"), sg.VP()
    facts = sg.Facts.of(train.x, levels=LEVELS)
    torch.manual_seed(0)
    model = sg.ScoreNetwork(UNet.digits(head=True), sde, facts=facts)
    objective = Hybrid(
        NodeTimes.of(chain(sde, 0.01, facts.variance)),
        weighting=KarrasWeight(facts.std),
        dropout=0.0,
        n_levels=LEVELS,
    )
    recipe = sg.Recipe(steps=450, lr=4e-3)
    model = sg.train(
        model,
        *train,
        recipe,
        objective=objective,
        transform=Dequantise(LEVELS),
        device="cpu",
        progress=False,
    )
    given, k = model.given(y=test.y), quantise(test.x, LEVELS)
    ours = chain(sde, 0.05, facts.variance)
    found = sg.bound(given, k, ours, variance="learned")
    bits = found.bits_per_dim.mean()
    assert float(bits) + 2 * float(bits.standard_error) < 1.88
    last = float(ours.times[1])
    even = sg.Chain(sde, grids.uniform(sde, 1000, end=last, to_zero=True))
    assert (len(ours), len(even)) == (100, 1000)
    small = sg.bound(given, k, even, variance="small", terms=16).bits_per_dim.mean()
    assert float(small) > float(bits) + 0.1
    # Two draws a, b of x_t in each step: a b has the mean of E[L]^2.
    half = found.steps.standard_error**2
    product = found.steps.value**2 - half
    whole = float((found.steps.value.sum(1) ** 2 - half.sum(1)).mean())
    spread = {}
    expected = ours.expected(ours.errors(given, test.x), "learned")
    for name, w in (("measured", expected), ("log SNR", -ours.nodes.log_snr[1:].diff())):
        p = 0.95 * w / w.sum() + 0.05 / len(w)
        spread[name] = float((product / p).sum(1).mean()) - whole
    assert spread["log SNR"] > 10 * spread["measured"]
