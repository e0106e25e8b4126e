"""Inverse problems on a GPU: an observation on the host, a prior on the device, the same draws."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from problems import F64, draw
from torch import Tensor, nn

from sde_gen import VP, Facts, ScoreNetwork, sample
from sde_gen.inverse import (
    Covariance,
    DataCovariance,
    Isotropic,
    Mask,
    Matrix,
    Nonlinear,
    Observation,
    Point,
    Posterior,
    Tweedie,
    TweedieDiagonal,
    gibbs,
    particles,
    steer,
)
from sde_gen.networks import MLP

pytestmark = pytest.mark.gpu
DATA = draw(200, 4, seed=3).cumsum(1)
SEEN = {
    "matrix": Observation(Matrix(draw(2, 4)), draw(2, seed=1), 0.3),
    "rows": Observation(Matrix(draw(2, 4)), draw(3, 2, seed=1), 0.3),
    "correlated": Observation(
        Mask(torch.tensor([1, 0, 1, 1]).bool()),
        draw(3, seed=1),
        covariance=torch.tensor([[1, 0.3, 0], [0.3, 1, 0], [0, 0, 2]], dtype=F64),
    ),
    "bent": Observation(Nonlinear(torch.tanh, (4,)), draw(4, seed=1), 0.5),
}


def model(rank: int | None = 2, units: bool = False) -> ScoreNetwork:
    """A network with weights that it was not trained to, in float64."""
    torch.manual_seed(0)
    net = MLP((4,), 16, 1).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    facts = Facts.of(DATA, rank=rank, units="column") if units else Facts.of(DATA, rank=rank)
    return ScoreNetwork(net, VP(), facts=facts)


def near(here: Tensor, there: Tensor) -> None:
    assert there.is_cuda
    # Normals are made in float32 from the same bits.
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("name", SEEN)
def test_particles(name: str, units: bool) -> None:
    here, there = (
        particles(model(units=units).to(device), SEEN[name], 64, 6, seed=0, dtype=F64)
        for device in ("cpu", "cuda")
    )
    near(here.log_evidence, there.log_evidence)
    near(here.ess[..., :3], there.ess[..., :3])
    assert there.draw(5).is_cuda


RULES = [
    Point(),
    Isotropic(),
    DataCovariance(),
    DataCovariance(jacobian=True),
    Tweedie(2),
    TweedieDiagonal(),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", SEEN)
def test_posteriors(name: str, rule: Covariance) -> None:
    here, there = (
        sample(Posterior(model().to(device), SEEN[name], rule), 3, 6, seed=0, eta=1.0, dtype=F64)
        for device in ("cpu", "cuda")
    )
    near(here, there)


@pytest.mark.parametrize("name", ["matrix", "rows", "correlated"])
def test_gibbs(name: str) -> None:
    start = DATA[:3]
    here, there = (
        gibbs(model().to(d), SEEN[name], start.to(d), 2, seed=0) for d in ("cpu", "cuda")
    )
    near(here, there)


def test_steering() -> None:
    here, there = (
        steer(model().to(d), lambda x: -0.1 * x.square().sum(1), 32, 5, seed=0, dtype=F64)
        for d in ("cpu", "cuda")
    )
    near(here.log_evidence, there.log_evidence)


def test_no_step_waits_for_the_device() -> None:
    """Sampling, by terms and particles: only the start and the end look at the device."""
    prior = model().to("cuda")
    runs = {
        "default": lambda n: sample(prior, 8, n, seed=0),
        "eta 1": lambda n: sample(prior, 8, n, seed=0, eta=1.0),
        "term": lambda n: sample(Posterior(prior, SEEN["matrix"]), 8, n, seed=0, eta=1.0),
        "particles": lambda n: particles(prior, SEEN["matrix"], 64, n, seed=0),
    }
    for name, run in runs.items():
        counts = [_waits(lambda run=run, n=n: run(n)) for n in (10, 20)]
        assert counts[0] == counts[1], (name, counts[1] - counts[0])


def _waits(run: Callable[[], object]) -> Counter[str]:
    run()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(w.filename + f":{w.lineno}" for w in caught if "operation" in str(w.message))
