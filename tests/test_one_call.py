"""One call of a score tells its value, the denoised state, a second output and the pullback."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import grids
from sde_gen.scores.network import Prediction
from sde_gen.sdes import LinearSDE

F64 = torch.float64
MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]], dtype=F64)


class Counted(nn.Module):
    """A smooth network that counts its calls and backward passes."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=F64)
        self.calls = self.rows = self.backward = 0
        self.twice = twice

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls, self.rows = self.calls + 1, len(x)
        f = torch.tanh(self.linear(x))
        return torch.cat([f, 3 * f], 1) if self.twice else f


def mixture(sde: LinearSDE) -> sg.GaussianMixture:
    return sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.3)


def points(n: int = 6) -> Tensor:
    return torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "prediction", ["noise", "data", "velocity", "flow", "score", "preconditioned"]
)
@pytest.mark.parametrize("sde", [sg.VP(), sg.EDM(20.0), sg.SubVP(), sg.RectifiedFlow()], ids=repr)
def test_a_network_denoises_as_tweedie_says(prediction: Prediction, sde: LinearSDE) -> None:
    torch.manual_seed(0)
    model = sg.ScoreNetwork(Counted(), sde, prediction, sg.Facts(std=0.7))
    x, t = points(), 0.4 * sde.T
    with torch.no_grad():
        e = model.evaluate(x, t)
    assert model.net.calls == 1
    tweedie = (x + sde.sigma(t) ** 2 * e.score) / sde.alpha(t)
    torch.testing.assert_close(e.denoised, tweedie, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x, t), e.score, rtol=0, atol=0)
    torch.testing.assert_close(model.denoise(x, t), e.denoised, rtol=0, atol=0)


def test_a_pullback_is_the_jacobian_and_costs_no_call() -> None:
    torch.manual_seed(0)
    model = sg.ScoreNetwork(Counted(), sg.VP(), "data")
    x, t = points(), 0.4
    model.net.calls = 0
    with torch.no_grad():
        e = model.linearise(x, t)
    assert e.pull is not None
    u = points().flip(0)
    pulled = [e.pull(u), e.pull(2 * u)]
    assert model.net.calls == 1
    wanted = torch.autograd.functional.vjp(lambda x: model.denoise(x, t), x, u)[1]
    torch.testing.assert_close(pulled[0], wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pulled[1], 2 * wanted, rtol=1e-10, atol=1e-12)


def test_the_jacobian_of_an_exact_score_is_the_posterior_covariance() -> None:
    sde = sg.VP()
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    prior = sg.Gaussian(sde, MEANS[0], covariance=covariance)
    t = 0.3
    w = float((sde.sigma(t) / sde.alpha(t)) ** 2)
    e = prior.linearise(points(), t)
    assert e.pull is not None
    rows = [e.pull(torch.eye(2, dtype=F64)[i].expand(6, 2))[0] for i in range(2)]
    # Cov[x_0 | x_t] = sigma^2 / alpha dD/dx = (C^-1 + 1 / w)^-1.
    found = float(sde.sigma(t) ** 2 / sde.alpha(t)) * torch.stack(rows)
    exact = torch.linalg.inv(torch.linalg.inv(covariance) + torch.eye(2, dtype=F64) / w)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_a_second_output_is_the_head_and_passes_through_guidance() -> None:
    torch.manual_seed(0)
    model = sg.ScoreNetwork(Counted(twice=True), sg.VP(), "data")
    plain = sg.ScoreNetwork(Counted(), sg.VP(), "data")
    plain.net.load_state_dict(model.net.state_dict())
    x, t = points(), 0.4
    e = model.evaluate(x, t)
    torch.testing.assert_close(e.score, plain(x, t), rtol=0, atol=0)
    torch.testing.assert_close(e.head, 3 * plain.denoise(x, t), rtol=1e-12, atol=0)
    for score in (model.given(y=1), model + 0 * plain, sg.ClassifierFree(model, 2.0, y=1)):
        torch.testing.assert_close(score.evaluate(x, t).head, e.head, rtol=0, atol=0)
        assert score.evaluate(x, t).score.shape == x.shape
    assert model.linearise(x, t).head is not None


def test_classifier_free_guidance_is_one_call_on_twice_the_batch() -> None:
    torch.manual_seed(0)
    model = sg.ScoreNetwork(Counted(), sg.VP(), "data")
    guided = sg.ClassifierFree(model, 1.5, y=[0, 1, 2, 3, 4, 5])
    with torch.no_grad():
        e = guided.evaluate(points(), 0.3)
    assert (model.net.calls, model.net.rows) == (1, 12)
    tweedie = sg.VP().tweedie(points(), 0.3, e.score)
    torch.testing.assert_close(e.denoised, tweedie, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [sg.Exponential(1), sg.Exponential(3, 0.3, corrector=True)])
def test_a_step_is_one_call(solver: sg.Solver) -> None:
    torch.manual_seed(0)
    sde = sg.VP()
    model = sg.ScoreNetwork(Counted(), sde, facts=sg.Facts((2,)))
    sg.sample(model, 4, 10, seed=0, solver=solver, dtype=F64)
    assert model.net.calls == 10


def test_what_is_shared_reaches_the_network_as_a_row_a_sample() -> None:
    seen: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, x: Tensor, c: Tensor, obs: Tensor, y: Tensor) -> Tensor:
            seen.append(obs), seen.append(y)
            return x * obs[:, :1]

    model = sg.ScoreNetwork(Net(), sg.VP())
    row = torch.tensor([2.0, 5.0, 7.0])
    score = model.given(obs=sg.shared(row), y=3)
    x = points(7)
    score(x, 0.5)
    assert torch.equal(seen[0], row.expand(7, 3))
    assert torch.equal(seen[1], torch.full((7,), 3))
    # Rows, chunks and double batches follow.
    assert score.batch is None
    torch.testing.assert_close(score.rows(slice(2, 4))(x[2:4], 0.5), score(x, 0.5)[2:4])
    both = model.given(obs=sg.shared(row)).given(y=torch.arange(7))
    assert both.batch == 7
    both.rows(torch.tensor([6, 1]))(x[:2], 0.5)
    assert torch.equal(seen[-1], torch.tensor([6, 1]))
    assert torch.equal(seen[-2], row.expand(2, 3))
    with pytest.raises(ValueError, match="given for 3 samples, the state has 7"):
        model.given(obs=row, y=0)(x, 0.5)


# Where no signal is left.


class Exact(nn.Module):
    """The exact denoiser of a mixture as a network that predicts the data."""

    def __init__(self, score: sg.GaussianMixture) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        ratio = torch.exp(4 * c)
        alpha = 1 / torch.sqrt(1 + ratio**2)  # x is scaled to unit variance, c = 1
        t = ratio / (1 + ratio)
        return self.score.denoise(x * ((1 - t) / alpha), t)


def test_exact_scores_denoise_where_no_signal_is_left() -> None:
    sde = sg.RectifiedFlow()
    x = points()
    mean = torch.tensor([0.2, 0.3, 0.5], dtype=F64) @ MEANS
    torch.testing.assert_close(mixture(sde).denoise(x, 1.0), mean.expand(6, 2))
    torch.testing.assert_close(
        sg.Gaussian(sde, MEANS[1], 0.2).denoise(x, 1.0), MEANS[1:2].expand(6, 2)
    )
    with pytest.raises(ValueError, match="where alpha = 0 a score says nothing of the data"):
        (2.0 * mixture(sde)).denoise(x, 1.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [False, True])
def test_one_exponential_step_from_no_signal_is_exact_on_gaussian_data(
    eta: float, order: int, corrector: bool
) -> None:
    sde, std = sg.RectifiedFlow(), 0.4
    score = sg.Gaussian(sde, MEANS[0], std)
    times = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=F64)
    solver = sg.Exponential(order, std**2, corrector)
    n = len(times) - 1
    x = torch.zeros(n + 2, 2, dtype=F64)
    x[n + 1] = 1.0
    out = sg.solve(sde.reverse(score, eta), x, times, solver, sg.Impulses())
    # Row n gets no draw and no start: the mean; the others each one unit of one of them.
    mean = out[n]
    torch.testing.assert_close(mean, MEANS[0], rtol=1e-9, atol=1e-9)
    variance = (out[:n] - mean).square().sum(0) + (out[n + 1] - mean).square()
    torch.testing.assert_close(variance, torch.full((2,), std**2, dtype=F64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("order", [1, 3])
def test_the_start_at_no_signal_is_the_limit_of_starts_before_it(order: int) -> None:
    sde = sg.RectifiedFlow()
    score, x = mixture(sde), points()
    solver = sg.Exponential(order, 0.5, corrector=order > 1)
    rest = torch.tensor([0.7, 0.4, 0.1], dtype=F64)

    def run(start: float) -> Tensor:
        times = torch.cat([torch.tensor([start], dtype=F64), rest])
        return sg.solve(sde.probability_flow(score), x, times, solver)

    far = [float((run(1 - gap) - run(1.0)).abs().max()) for gap in (1e-3, 1e-6)]
    # The value at the start loses its part in later steps like 1 / lambda where a polynomial
    # goes through it, and like the signal where none does.
    assert far[1] < (2e-5 if order == 1 else far[0] * 0.6)
    assert far[1] < 0.02


def test_sampling_a_network_from_no_signal_draws_the_data() -> None:
    sde = sg.RectifiedFlow()
    exact = mixture(sde)
    model = sg.ScoreNetwork(Exact(exact), sde, "data", sg.Facts((2,)))
    x = sg.sample(model, 2000, 30, seed=0, dtype=F64)
    assert bool(torch.isfinite(x).all())
    law = exact.sample(200_000, torch.Generator().manual_seed(1))
    spread = law.std(0)
    # Means of 2,000 samples: three standard errors; the steps' own error is below 1e-3.
    assert bool(((x.mean(0) - law.mean(0)).abs() < 3.5 * spread / math.sqrt(2000)).all())
    with pytest.raises(ValueError, match="infinite at t = 1, where alpha = 0"):
        sg.sample(model, 4, 30, seed=0, solver=sg.Heun())
    assert float(grids.default(sde, 10)[0]) == 1.0


def test_a_step_may_read_a_spread_that_depends_on_the_state() -> None:
    sde, x = sg.VP(), points()
    process = sde.reverse(mixture(sde), 1.0)
    t, s = 0.5, 0.3
    mean = sg.solve(process, x, [t, s], sg.Exponential(1, spread=lambda e, t, s: 0 * e.score), 3)
    z = sg.Streams(3)(x, t, s)
    # The posterior's own spread: sigma_s^2 (1 - w_s / w_t), as DDPM's small variance.
    w_t, w_s = ((sde.sigma(u) / sde.alpha(u)) ** 2 for u in (t, s))
    std = sde.sigma(s) * torch.sqrt(1 - w_s / w_t)
    usual = sg.solve(process, x, [t, s], sg.Exponential(1), 3)
    torch.testing.assert_close(usual, mean + std * z, rtol=1e-12, atol=1e-12)

    def spread(e: sg.sdes.Evaluation, t: float, s: float) -> Tensor:
        return std * (1 + e.denoised.abs())

    own = sg.solve(process, x, [t, s], sg.Exponential(1, spread=spread), 3)
    wide = std * (1 + mixture(sde).denoise(x, t).abs())
    torch.testing.assert_close(own, mean + wide * z, rtol=1e-12, atol=1e-12)


def test_a_compiled_score_is_called_and_not_gone_around() -> None:
    torch.manual_seed(0)
    model = sg.ScoreNetwork(Counted(), sg.VP(), facts=sg.Facts((2,)))
    seen = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    x = points()
    with torch.no_grad():
        s = sg.VP().reverse(compiled).evaluate(x, 0.4).score
    assert seen
    torch.testing.assert_close(s, model(x, 0.4))
