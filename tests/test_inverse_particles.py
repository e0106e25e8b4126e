"""Particles against exact posteriors: law, evidence, and the faults that must be seen."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from problems import F64, correlated, draw, gaussian, mixture
from torch import Tensor, nn

from sde_gen import (
    EDM,
    VP,
    Exponential,
    Facts,
    Gaussian,
    GaussianMixture,
    LinearSDE,
    Moments,
    Score,
    ScoreNetwork,
    Streams,
    grids,
    solve,
)
from sde_gen.facts import Units
from sde_gen.inverse import (
    Covariance,
    DataCovariance,
    Downsample,
    Matrix,
    Nonlinear,
    Observation,
    Particles,
    Tweedie,
    TweedieDiagonal,
    exact_posterior,
    log_evidence,
    particles,
    steer,
)
from sde_gen.inverse import cloud as weights
from sde_gen.metrics import sliced_wasserstein
from sde_gen.sdes import Evaluation

SDE = VP()
# The function of that name hides the module.
inner = sys.modules[particles.__module__]


def told(prior: GaussianMixture) -> Score:
    """The mixture with its moments."""
    pi, m = prior.log_weights.exp(), prior.means
    mean = pi @ m
    c = torch.diag((pi.unsqueeze(1) * prior.variance).sum(0).expand(m.shape[1]))
    c = c + ((m - mean).T * pi) @ (m - mean)
    return prior.with_facts(Facts(prior.shape, prior.facts.std, Moments.of(c, mean)))


def observed(n: int, m: int = 2) -> list[Observation]:
    root = draw(m, m, seed=3) / 4 + 0.2 * torch.eye(m, dtype=F64)
    first = Observation(Matrix(draw(m, n, seed=4)), draw(m, seed=5), covariance=root @ root.T)
    return [first, Observation(Matrix(draw(1, n, seed=6)), draw(1, seed=7), 0.4)]


# ---- Gaussian data: exact for any number of particles ----


@pytest.mark.parametrize("sde", [VP(), EDM(20.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [2, 9])
def test_gaussian_data_have_constant_weights_and_the_exact_evidence(
    sde: LinearSDE, steps: int
) -> None:
    for prior in (correlated(sde), gaussian(sde), Gaussian(sde, draw(5), 0.6)):
        seen = observed(*prior.shape)
        found = particles(prior, seen, 3, steps, seed=0, dtype=F64, times=None)
        assert float(found.log_evidence) == pytest.approx(
            float(log_evidence(prior, seen)), abs=1e-8
        )
        assert float(found.standard_error) < 1e-6
        torch.testing.assert_close(found.ess, torch.full_like(found.ess, 3.0))


pytestmark = pytest.mark.filterwarnings("ignore:the particles have collapsed")


def test_gaussian_draws_have_the_exact_law() -> None:
    prior, seen, n = correlated(SDE), observed(2), 20_000
    exact = exact_posterior(prior, seen)
    assert isinstance(exact, Gaussian)
    for steps in (2, 6):
        x = particles(prior, seen, n, steps, seed=steps, dtype=F64).x
        z = torch.linalg.solve_triangular(
            torch.linalg.cholesky(cov(exact)), (x - exact.mean).T, upper=False
        )
        # Independent normals: 4.5 standard errors of means and second moments.
        assert float(z.mean(1).abs().max()) < 4.5 / math.sqrt(n)
        second = z @ z.T / n - torch.eye(2, dtype=F64)
        assert float(second.abs().max()) < 4.5 * math.sqrt(2 / n)


def cov(g: Gaussian) -> Tensor:
    m = g.facts.moments
    return m.apply((m.coefficient(m.values.numpy()),), (torch.eye(len(g.mean), dtype=F64),))


def test_the_prior_step_is_the_exponential_integrator() -> None:
    prior, n = told(mixture(SDE)), 50
    moments = prior.facts.moments
    times = grids.default(SDE, 12, to_zero=True, data_std=prior.facts.std)
    noise = Streams(4)
    alpha, sigma = float(SDE.alpha(1.0)), float(SDE.sigma(1.0))
    z = noise(torch.empty(n, 2, dtype=F64), math.inf, 1.0)
    spread = moments.coefficient((alpha**2 * moments.values + sigma**2).sqrt().numpy())
    x = alpha * moments.mean + moments.apply((spread,), (z,))
    wanted = solve(SDE.reverse(prior, 1.0), x, times, Exponential(1, moments), noise)
    found = steer(prior, lambda x: torch.zeros(len(x)), n, 12, seed=4, dtype=F64)
    torch.testing.assert_close(found.x, wanted, rtol=1e-9, atol=1e-9)
    assert float(found.log_evidence) == pytest.approx(0, abs=1e-12)


# ---- weights: unbiased evidence, and planted faults ----

# For Gaussian data the prior's steps are exact on any grid, so that all that a weighted run can
# be off by is its weights: the mean of Z, and of Z times a mean, over many systems.
PRIOR = Gaussian(SDE, torch.tensor([0.2], dtype=F64), 0.8)
SYSTEMS, N, STEPS = 2000, 50, 8
TIMES = grids.log_snr(SDE, STEPS, end=0.15)


def bent(x: Tensor) -> Tensor:
    return x + 0.4 * torch.sin(2 * x)


def seen_bent(noise: float) -> Observation:
    y = torch.full((SYSTEMS, 1), 0.9, dtype=F64)
    return Observation(Nonlinear(bent, (1,), dtype=F64), y, noise)


def twisted(noise: float) -> Particles:
    return particles(PRIOR, seen_bent(noise), N, seed=0, dtype=F64, times=to_zero())


def steered(noise: float) -> Particles:
    one = seen_bent(noise).rows(0)
    twist = inner.Steered(one.log_likelihood, PRIOR.facts.moments)
    options = (N, STEPS, 0, to_zero(), F64, None)
    return inner._run(PRIOR, twist, (1,), SYSTEMS, *options)


def to_zero() -> Tensor:
    return torch.cat([TIMES, torch.zeros(1, dtype=F64)])


def off(found: Particles) -> float:
    """The standard errors that Z and Z E[x | o] are off by, the larger of the two."""
    x = torch.linspace(-6, 6, 24_001, dtype=F64).unsqueeze(1)
    log_p = PRIOR.log_prob(x) + seen_bent(0.5).rows(0).log_likelihood(x)
    z = log_p.exp().sum() * 12 / 24_000
    mean = torch.softmax(log_p, 0) @ x.flatten()
    ratio = found.log_evidence.exp() / z
    errors = [ratio - 1, ratio * (found.mean.flatten() - mean)]
    return max(float(e.mean().abs() / e.std() * SYSTEMS**0.5) for e in errors)


FAULTS = ["none", "noise", "last weight", "weights lost", "no evidence at resampling"]


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """A fault in the code of the weights; the factor of the noise that is told."""
    cloud = weights.Cloud
    if fault == "last weight":  # computed and not used: the fault of a public sampler
        monkeypatch.setattr(cloud, "finish", _without_last(cloud.finish))
        monkeypatch.setattr(cloud, "weigh", _remembering(cloud.weigh))
    if fault == "weights lost":  # where nothing is resampled: the fault of a public steering
        monkeypatch.setattr(cloud, "resample", _forgetful(cloud.resample))
    if fault == "no evidence at resampling":
        monkeypatch.setattr(cloud, "_settle", _once(cloud._settle))
    return 1.2 if fault == "noise" else 1.0


def _remembering(weigh):
    def run(self, log_factor):
        self.before = self.log_w
        weigh(self, log_factor)

    return run


def _without_last(finish):
    def run(self):
        self.log_w = self.before
        finish(self)

    return run


def _forgetful(resample):
    def run(self, noise, t):
        chosen = resample(self, noise, t)
        self.log_w = torch.zeros_like(self.log_w)
        return chosen

    return run


def _once(settle):
    def run(self, which):
        if len(self.ess) > STEPS + 1:
            settle(self, which)

    return run


@pytest.mark.parametrize(
    ("run", "fault"),
    # Twisted weights are so even that hardly a system is resampled.
    [*((steered, fault) for fault in FAULTS), *((twisted, fault) for fault in FAULTS[:-1])],
)
def test_evidence_is_unbiased_and_faults_are_seen(
    run: Callable[[float], Particles], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(0.5 * plant(fault, monkeypatch))
    if fault == "none":
        assert off(found) < 3.5
        # The standard error that one run tells is that between runs, within a factor of 2.
        told_error = float(found.standard_error.square().mean().sqrt())
        assert 0.5 < told_error / float(found.log_evidence.std()) < 2
    else:
        assert off(found) > 5


RULES = [DataCovariance(), Tweedie()]


@pytest.mark.parametrize("rule", RULES)
def test_the_evidence_of_a_mixture_is_unbiased(rule: Covariance) -> None:
    prior, noise = told(mixture(SDE)), 0.1
    a, y = Matrix(draw(1, 2, seed=40)), draw(1, seed=41)
    exact = log_evidence(mixture(SDE), Observation(a, y, noise))
    rows = Observation(a, y.expand(100, 1), noise)
    found = particles(prior, rows, 30, 150, seed=0, dtype=F64, covariance=rule)
    ratio = (found.log_evidence - exact).exp()
    # 1 % is granted to the steps.
    assert abs(float(ratio.mean()) - 1) < 0.01 + 3.5 * float(ratio.std() / 100**0.5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mixture_is_sampled_within_twice_the_floor(seed: int, rule: Covariance) -> None:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(6, 4, generator=g, dtype=F64)
    prior = GaussianMixture(SDE, torch.ones(6), means, 0.25)
    x = prior.sample(3, g)
    a = torch.randn(2, 4, generator=g, dtype=F64) / 2
    y = x @ a.T + 0.1 * torch.randn(3, 2, generator=g, dtype=F64)
    seen = Observation(Matrix(a), y, 0.1)
    found = particles(told(prior), seen, 400, 60, seed=0, dtype=F64, covariance=rule)
    ratios = []
    for i in range(3):
        exact = exact_posterior(prior, Observation(Matrix(a), y[i], 0.1))
        reference = exact.sample(4000, g)
        floor = [sliced_wasserstein(exact.sample(400, g), reference, 64) for _ in range(4)]
        drawn = sliced_wasserstein(found.draw(400)[i], reference, 64)
        ratios.append(drawn / (sum(floor) / 4))
    assert sum(ratios) / 3 < 2, ratios


# ---- the Tweedie twist ----


@pytest.mark.parametrize("noise", [0.3, torch.tensor([[0.3, 0.3], [0.5, 0.2]])])
def test_the_tweedie_twist_knows_the_covariance_of_round_gaussian_data(noise: Tensor) -> None:
    # Where J is a number all that it foretells is right: weights are constant.
    prior = Gaussian(SDE, torch.zeros(3, dtype=F64), 0.8)
    seen = Observation(Matrix(draw(2, 3, seed=4)), draw(2, 2, seed=5), noise)
    found = particles(prior, seen, 5, 4, seed=0, dtype=F64, covariance=Tweedie())
    torch.testing.assert_close(found.log_evidence, log_evidence(prior, seen))
    torch.testing.assert_close(found.ess, torch.full_like(found.ess, 5.0))
    # Whatever the prior is told: its own step then spreads too far, which costs some weight.
    prior = prior.with_facts(Facts((3,), 1.0))
    known, read = (
        particles(prior, seen, 500, 40, seed=0, dtype=F64, covariance=rule).ess.amin(1)
        for rule in RULES
    )
    assert bool((read > known).all())


def test_the_tweedie_twist_makes_the_evidence_surer() -> None:
    g = torch.Generator().manual_seed(0)
    prior = GaussianMixture(SDE, torch.ones(6), torch.randn(6, 4, generator=g, dtype=F64), 0.25)
    a = torch.randn(2, 4, generator=g, dtype=F64) / 2
    y = prior.sample(120, g) @ a.T + 0.1 * torch.randn(120, 2, generator=g, dtype=F64)
    seen = Observation(Matrix(a), y.repeat(3, 1), 0.1)
    exact = log_evidence(prior, seen)
    off = []
    for rule in RULES:
        found = particles(told(prior), seen, 60, 40, seed=0, dtype=F64, covariance=rule)
        off.append((found.log_evidence - exact).square().mean())
    # F(360, 360) lies below 1.28 in 99 of 100 cases; over ten seeds of 120 the mean is 1.9, and
    # one of 120 alone is between 1.1 and 3.5.
    assert float(off[0] / off[1]) > 1.28, off


def test_the_tweedie_twist_pulls_once_a_measurement() -> None:
    prior, pulls = told(mixture(SDE)), 0
    linearise = prior.linearise

    def counted(x: Tensor, t: Tensor) -> Evaluation:
        e = linearise(x, t)

        def pull(u: Tensor) -> Tensor:
            nonlocal pulls
            pulls += 1
            return e.pull(u)

        return Evaluation(e.score, e.denoised, None, pull)

    prior.linearise = counted
    seen = observed(2)[0]
    whole = particles(prior, seen, 8, 5, seed=0, dtype=F64, covariance=Tweedie())
    assert pulls == 2 * 5
    parts = particles(prior, seen, 8, 5, seed=0, dtype=F64, covariance=Tweedie(), chunk=3)
    assert pulls == 2 * 5 * 4
    torch.testing.assert_close(parts.x, whole.x)


def test_the_tweedie_twist_takes_no_bent_map() -> None:
    with pytest.raises(TypeError, match=r"Tweedie\(\) takes a linear A, not Nonlinear"):
        particles(PRIOR, seen_bent(0.3), covariance=Tweedie())
    with pytest.raises(
        TypeError, match=r"covariance must be DataCovariance.* got TweedieDiagonal"
    ):
        particles(PRIOR, seen_bent(0.3), covariance=TweedieDiagonal())


# ---- everything else ----


def test_systems_do_not_know_of_each_other() -> None:
    prior, a = told(mixture(SDE)), Matrix(draw(1, 2, seed=40))
    y, noise = draw(3, 1, seed=41), torch.tensor([[0.1], [0.2], [0.3]], dtype=F64)
    together = particles(prior, Observation(a, y, noise), 30, 20, seed=0, dtype=F64)
    assert together.x.shape == (3, 30, 2)
    assert together.log_evidence.shape == (3,)
    assert together.ess.shape == (3, 21)
    alone = particles(prior, Observation(a, y[0], 0.1), 30, 20, seed=0, dtype=F64)
    torch.testing.assert_close(alone.x, together.x[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone.log_evidence, together.log_evidence[0])
    part = particles(prior, Observation(a, y, noise), 30, 20, seed=0, dtype=F64, chunk=7)
    torch.testing.assert_close(part.x, together.x, rtol=1e-9, atol=1e-9)
    assert str(together).count("log evidence") == 3


class Net(nn.Module):
    """The posterior mean of N(label, 1 / 4), as a network that predicts the data."""

    classes, shape = 3, (2,)
    calls = rows = 0

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return 0.3 * x + y.unsqueeze(1)


def test_labels_follow_their_observation_and_a_step_is_one_call() -> None:
    net = Net()
    model = ScoreNetwork(net, SDE, "data", Facts((2,), 0.5))
    a, y = Matrix(torch.eye(2)), torch.zeros(3, 2)
    labels = torch.tensor([0, 1, 2])
    found = particles(model.given(y=labels), Observation(a, y, 10.0), 20, 7, seed=0)
    assert (net.calls, net.rows) == (7, 7 * 60)
    assert found.calls == 140
    assert found.x.dtype == torch.float32
    spread = found.x.mean((1, 2))
    assert bool((spread.diff() > 0.5).all())
    with torch.autocast("cpu", torch.bfloat16):
        again = particles(model.given(y=labels), Observation(a, y, 10.0), 20, 7, seed=0)
    torch.testing.assert_close(again.x, found.x, rtol=1e-6, atol=1e-6)


def test_units_are_those_of_the_data() -> None:
    prior, shift, scale = correlated(SDE), draw(2, seed=30), draw(2, seed=31).abs() + 0.5
    units = Units(shift, scale)
    known = prior.with_facts(Facts((2,), prior.facts.std, prior.facts.moments, units))
    a, y = draw(1, 2, seed=4), draw(1, seed=5)
    found = particles(known, Observation(Matrix(a), y, 0.2), 40, 5, seed=0, dtype=F64)
    inner = Observation(Matrix(a * scale), y - a @ shift, 0.2)
    same = particles(prior, inner, 40, 5, seed=0, dtype=F64)
    torch.testing.assert_close(found.x, units.decode(same.x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.log_evidence, same.log_evidence)
    steered = steer(known, lambda x: -x[:, 0], 40, 5, seed=0, dtype=F64)
    again = steer(prior, lambda z: -units.decode(z)[:, 0], 40, 5, seed=0, dtype=F64)
    torch.testing.assert_close(steered.x, units.decode(again.x), rtol=1e-9, atol=1e-9)


def test_systematic_draws_take_each_as_often_as_it_weighs() -> None:
    w = torch.rand(4, 50, generator=torch.Generator().manual_seed(0), dtype=F64) ** 4
    u = torch.rand(4, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    share = 50 * w / w.sum(1, keepdim=True)
    found = torch.zeros(4, 50, dtype=F64)
    for row, chosen in zip(found, weights.systematic(w.log(), u, 50), strict=True):
        row.index_add_(0, chosen, torch.ones(50, dtype=F64))
    assert bool(((found - share).abs() < 1).all())
    # On average over u exactly: 2,000 even ones.
    u = (torch.arange(2000, dtype=F64) + 0.5).reshape(-1, 1) / 2000
    chosen = weights.systematic(w[:1].log().expand(2000, -1), u, 50)
    mean = torch.bincount(chosen.flatten(), minlength=50) / 2000
    torch.testing.assert_close(mean.double(), share[0], rtol=0, atol=2e-3)
    assert float(weights.effective(torch.zeros(1, 7))) == pytest.approx(7)


def test_weighted_means_and_draws() -> None:
    x = torch.arange(4.0).reshape(4, 1).double()
    w = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    zero = torch.zeros(())
    cloud = Particles(x, w.log(), zero, zero, torch.full((2,), 4.0), 4)
    assert float(cloud.mean) == pytest.approx(2.0)
    assert float(cloud.std) == pytest.approx(1.0)
    drawn = cloud.draw(1000, seed=3)
    assert drawn.shape == (1000, 1)
    share = torch.bincount(drawn.flatten().long()) / 1000
    torch.testing.assert_close(share.double(), w, rtol=0, atol=1.1e-3)
    # In random order: the first hundred are a sample as well.
    first = torch.bincount(drawn[:100].flatten().long(), minlength=4) / 100
    torch.testing.assert_close(first.double(), w, rtol=0, atol=0.15)


@pytest.mark.parametrize(("y", "noise"), [(1e300, 0.1), (1.0, 1e-300)])
@pytest.mark.filterwarnings("ignore:the particles have collapsed")
def test_weights_that_are_not_finite_are_told(y: float, noise: float) -> None:
    seen = Observation(Matrix(torch.eye(1, dtype=F64)), torch.tensor([y], dtype=F64), noise)
    with pytest.raises(FloatingPointError, match="weights of the particles are not finite"):
        particles(PRIOR, seen, 20, 5, seed=0)


def test_collapse_is_told() -> None:
    prior = mixture(SDE)
    seen = Observation(Matrix(torch.eye(2)), torch.tensor([4.0, 4.0]), 0.001)
    with pytest.warns(RuntimeWarning, match="collapsed to .* effective ones of 20 in 1 of 1"):
        particles(prior, seen, 20, 5, seed=0, dtype=F64)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, seen = mixture(SDE), observed(2)
    with pytest.raises(ValueError, match="count must be an integer >= 2, got 1"):
        particles(prior, seen, 1)
    with pytest.raises(ValueError, match=r"times must fall from at most T = 1.0 to 0"):
        particles(prior, seen, 10, times=torch.tensor([1.0, 0.5]))
    with pytest.raises(TypeError, match="seed must be an integer or None, got 'a'"):
        particles(prior, seen, 10, seed="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="particles needs a prior score"):
        particles(lambda x, t: x, seen)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="log_likelihood must be a function"):
        steer(prior, 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"log_likelihood must return \(10,\) for x, got \(10, 2"):
        steer(prior, lambda x: x, 10, 3)
    bound = ScoreNetwork(Net(), SDE, "data", Facts((2,))).given(y=torch.arange(3))
    with pytest.raises(ValueError, match="bound for 3 samples, there are 1 observations"):
        particles(bound, seen, 10)
    monkeypatch.setattr("sde_gen.inverse.whitened.MOST", 2)
    with pytest.raises(ValueError, match="particles take up to"):
        particles(prior, seen, 10)


@pytest.mark.gpu
def test_an_observation_on_the_host_serves_a_prior_on_the_device() -> None:
    """Operators without tensors of their own, and y, need not be moved."""
    seen = Observation(Downsample(2, (4,)), torch.tensor([0.3, -0.2]), 0.1)
    mean = torch.tensor([0.5, 0.0, -0.5, 1.0], dtype=F64)
    there, here = (
        particles(Gaussian(SDE, m, 0.5), seen, 40, 6, seed=0, dtype=F64)
        for m in (mean.cuda(), mean)
    )
    assert there.x.is_cuda
    # Normals are made in float32 from the same bits.
    assert torch.allclose(there.x.cpu(), here.x, rtol=1e-5, atol=1e-5)
    assert torch.allclose(there.log_evidence.cpu(), here.log_evidence, rtol=1e-5, atol=1e-5)
