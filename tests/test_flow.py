"""Flow matching is the same house: straight paths, their flow as a prediction, its objective."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from laws import law_error
from problems import F64, correlated, draw, gaussian, mixture
from scipy.stats import norm
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import grids
from sde_gen.ops import Time
from sde_gen.schedules import Tabulated
from sde_gen.scores.network import Prediction
from sde_gen.sdes import LinearSDE
from sde_gen.training import Denoising, LogNormalTimes, flow_weight

SDE = sg.RectifiedFlow()
NO_SIGNAL = sg.VP(Tabulated([0.05, 0.2, 0.3, 0.5, 0.7, 1.0], T=2.0))


def test_the_probability_flow_is_the_mean_rate_of_the_paths() -> None:
    law, x = mixture(SDE), draw(7, 2, seed=1)
    flow = SDE.probability_flow(law)
    for t in (0.01, 0.3, 0.9, 0.999):
        denoised = law.denoise(x, t)
        noise = -t * law(x, t)
        torch.testing.assert_close(flow.drift(x, t), noise - denoised, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(flow.drift(x, t), (x - denoised) / t, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0, 1.5])
def test_every_eta_has_the_same_marginals(eta: float) -> None:
    """Mean and variance that Heun's steps end with; of twice as many the error is a quarter."""
    law = gaussian(SDE)
    errors = [
        float(law_error(law, sg.Heun(), grids.uniform(SDE, n, 0.9, 0.2), eta, n).abs().max())
        for n in (32, 64)
    ]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_grids_start_where_no_signal_is_left() -> None:
    for make in (grids.default, grids.log_snr, grids.karras, grids.quadratic, grids.information):
        times = make(SDE, 12, to_zero=True)
        assert (float(times[0]), float(times[-1])) == (1.0, 0.0)
        assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("sde", [SDE, NO_SIGNAL], ids=["straight", "chain"])
@pytest.mark.parametrize("how", [{}, {"steps": 64}, {"steps": 64, "probes": 1}], ids=str)
def test_likelihoods_run_to_where_no_signal_is_left(sde: LinearSDE, how: dict[str, int]) -> None:
    law = gaussian(sde)
    x = law.sample(5, torch.Generator().manual_seed(0))
    found = sg.log_prob(law, x, **how).value  # type: ignore[arg-type]
    torch.testing.assert_close(found, law.log_prob(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sde", [SDE, NO_SIGNAL], ids=["straight", "chain"])
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("corrector", [False, True])
def test_data_are_encoded_to_where_no_signal_is_left(
    sde: LinearSDE, order: int, corrector: bool
) -> None:
    """With the data's variance the step to pure noise is exact, and so is the way back."""
    law, x = sg.Gaussian(sde, torch.tensor([0.8, -0.5], dtype=F64), 0.4), draw(5, 2, seed=2)
    flow, solver = sde.probability_flow(law), sg.Exponential(order, 0.16, corrector)
    for times in ([0.1, 0.4, 0.7, sde.T], [0.1, sde.T]):
        z = sg.solve(flow, x, times, solver)
        a, s = sde.alpha(0.1), sde.sigma(0.1)
        torch.testing.assert_close(z, (x - a * law.mean) / torch.sqrt(a**2 * 0.16 + s**2))
        torch.testing.assert_close(sg.solve(flow, z, times[::-1], solver), x)
    with pytest.raises(ValueError, match="can neither end at t = 0 nor start or end where alpha"):
        sg.solve(flow, x, [0.1, sde.T], sg.solvers.dpm_solver(2))


def test_the_end_without_signal_is_the_limit_of_ends_before_it() -> None:
    law, x = mixture(SDE), draw(5, 2, seed=2)
    flow, solver = SDE.probability_flow(law), sg.Exponential(1)
    z = sg.solve(flow, x, [0.1, 0.5, 1.0], solver)
    near = sg.solve(flow, x, [0.1, 0.5, 1 - 1e-6], solver)
    torch.testing.assert_close(near, z, rtol=0, atol=1e-5)


def test_the_likelihood_of_a_mixture() -> None:
    law = mixture(SDE)
    x = law.sample(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sg.log_prob(law, x).value, law.log_prob(x), atol=1e-3, rtol=0)


def test_sampling_in_one_call_draws_the_data() -> None:
    law = correlated(SDE)
    for eta in (0.0, 1.0):
        x = sg.sample(law, 4000, 20, seed=0, eta=eta, dtype=F64)
        # Means and covariances of 4,000 samples: four standard errors.
        spread = torch.tensor([0.5, 0.4], dtype=F64).sqrt()
        assert bool(((x.mean(0) - law.mean).abs() < 4 * spread / math.sqrt(4000)).all())
        expected = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
        torch.testing.assert_close(torch.cov(x.T), expected, rtol=0, atol=4 * 0.5 * 0.0224)


def test_tuning_and_budgets_start_where_no_signal_is_left() -> None:
    law = mixture(SDE)
    tuned = sg.tune_solver(law, steps=4, n=16)
    assert bool(sg.sample(law, 3, 4, seed=0, solver=tuned).isfinite().all())
    budget = sg.error_budget(law, law, 6, n=16, fine=64)
    assert float(budget.score.value) < 1e-6
    assert 1e-4 < float(budget.discretisation.value) < 0.5


# The objective.


class Smooth(nn.Module):
    """Some function of state and noise level, which keeps what it was asked and returned."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.value = torch.sin(2 * x) + c.reshape(-1, 1)
        return self.value


@pytest.mark.parametrize("sde", [SDE, sg.VP(), sg.EDM(20.0)], ids=repr)
def test_the_loss_is_that_of_flow_matching(sde: LinearSDE) -> None:
    """|F - (z - x_0)|^2 (Lipman et al. 2023, equation 14), whatever the process."""
    net, x = Smooth(), draw(6, 3, seed=2)
    model = sg.ScoreNetwork(net, sde, "flow")
    t = sde.T * torch.tensor([0.01, 0.1, 0.3, 0.5, 0.9, 0.99], dtype=F64)
    loss = sg.dsm_loss(model, sde, x, t, flow_weight, torch.Generator().manual_seed(3))
    z = sde.perturb(x, t, torch.Generator().manual_seed(3)).noise
    expected = (net.value - (z - x)).square().mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6)])
def test_log_normal_times_are_logit_normal_on_straight_paths(mean: float, std: float) -> None:
    """Esser et al. 2024, equation 19: logit t ~ N(m, s^2)."""
    u = torch.linspace(0.05, 0.95, 19, dtype=F64)
    t = LogNormalTimes(mean, std)(SDE, u)
    expected = torch.sigmoid(mean + std * torch.from_numpy(norm.ppf(u.numpy())))
    # The cut where grids end, sigma / alpha = 0.005, takes P(N < (log 0.005 - m) / s) < 1e-7.
    torch.testing.assert_close(t, expected, rtol=1e-5, atol=0)


def test_a_flow_is_learned_saved_and_loaded(tmp_path: Path) -> None:
    law = sg.Gaussian(SDE, torch.tensor([0.8, -0.5]), 0.4)
    x = law.sample(2000, torch.Generator().manual_seed(0)).float()
    torch.manual_seed(0)
    net = sg.networks.MLP((2,), width=32, depth=1)
    model = sg.ScoreNetwork(net, SDE, "flow", sg.Facts.of(x))
    objective = Denoising(flow_weight, LogNormalTimes(0.0, 1.0))
    model = sg.train(
        model, x, objective=objective, recipe=sg.Recipe(steps=300, batch=256, lr=5e-3)
    )
    for t in (0.3, 0.6, 0.9):
        y = SDE.perturb(x[:200], t, torch.Generator().manual_seed(1)).x
        missed = (model.denoise(y, t) - law.denoise(y, t)).detach()
        assert float(missed.square().mean()) < 0.05 * 0.4**2
    sg.save(model, tmp_path / "model")
    again = sg.load(tmp_path / "model")
    assert again.sde == SDE
    assert again.prediction == "flow"
    assert torch.equal(again(y, 0.5), model(y, 0.5))


# One network, five readings.


class Reads(nn.Module):
    """What a network would return under each reading, from the flow that it has learned."""

    def __init__(self, flow: nn.Module, prediction: Prediction, sde: LinearSDE) -> None:
        super().__init__()
        self.flow, self.prediction, self.sde = flow, prediction, sde

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        u = self.flow(x, c)
        t = self.sde.time_at(-8 * c)
        a, s = (f(t).reshape(-1, 1) for f in (self.sde.alpha, self.sde.sigma))
        x = x * torch.sqrt(a**2 + s**2)  # as the network sees it: of unit variance
        data, noise = (x - s * u) / (a + s), (x + a * u) / (a + s)
        return {
            "noise": noise,
            "data": data,
            "velocity": (a * noise - s * data) / torch.hypot(a, s),
            "flow": u,
            "score": -noise / s,
        }[self.prediction]


@pytest.mark.parametrize("sde", [SDE, sg.VP(), sg.EDM(20.0)], ids=repr)
def test_five_readings_of_one_network(sde: LinearSDE) -> None:
    net, x = Smooth(), draw(6, 3, seed=2)
    flow = sg.ScoreNetwork(net, sde, "flow")
    kinds: tuple[Prediction, ...] = ("noise", "data", "velocity", "score")
    for t in (0.02 * sde.T, 0.5 * sde.T, 0.95 * sde.T):
        for kind in kinds:
            e = sg.ScoreNetwork(Reads(net, kind, sde), sde, kind).evaluate(x, t)
            torch.testing.assert_close(e.score, flow(x, t), rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(e.denoised, flow.denoise(x, t), rtol=1e-8, atol=1e-8)


def test_a_learned_flow_starts_where_no_signal_is_left() -> None:
    model = sg.ScoreNetwork(Smooth(), SDE, "flow", sg.Facts((3,)))
    e = model.evaluate(draw(4, 3, seed=1), 1.0)
    assert bool(e.score.isfinite().all())
    assert bool(e.denoised.isfinite().all())
    noise = sg.ScoreNetwork(Smooth(), SDE, "noise", sg.Facts((3,)))
    with pytest.raises(ValueError, match="predicts the noise says nothing of the data"):
        sg.sample(noise, 2, 5, seed=0, solver=sg.Exponential(3))
    # The default makes no call there.
    assert bool(sg.sample(noise, 2, 5, seed=0).isfinite().all())

    class Late(sg.Score):
        sde = SDE

        def __call__(self, x: Tensor, t: Time) -> Tensor:
            return -x

    with pytest.raises(ValueError, match="where alpha = 0 a score says nothing of the data"):
        sg.solve(SDE.probability_flow(Late()), draw(2, 3), [1.0, 0.5], sg.Exponential(2))
