"""Networks in the conventions of others: exact ones give the exact score, and every sampler of
theirs, written out from its paper, gives the numbers that ``solve`` gives."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import F64, draw
from torch import Tensor, nn

import sde_gen as sg
from sde_gen.schedules import Tabulated
from sde_gen.scores import (
    Foreign,
    Steps,
    from_denoiser,
    from_diffusers,
    from_noise,
    from_velocity,
    to_diffusers,
)
from sde_gen.scores.network import Prediction
from sde_gen.sdes import LinearSDE
from sde_gen.solvers import ddim, ddpm, dpm_solver_pp
from sde_gen.training import save

N = 100
BETAS = torch.linspace(1e-3, 0.15, N, dtype=F64)
ABAR = torch.cumprod(1 - BETAS, 0)
MEAN, STD = torch.tensor([0.8, -0.5, 0.1], dtype=F64), torch.tensor([0.3, 0.7, 1.4], dtype=F64)


def scheduler(prediction: str = "epsilon", abar: Tensor = ABAR) -> Any:
    """What a scheduler of diffusers says of its noise levels."""
    config = SimpleNamespace(prediction_type=prediction, num_train_timesteps=len(abar))
    return SimpleNamespace(config=config, alphas_cumprod=abar)


def without_signal(abar: Tensor = ABAR) -> Tensor:
    """Zero terminal signal: the roots shifted and scaled (Lin et al. 2024, algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def exact(x: Tensor, alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """E[z | x], E[x_0 | x] and what is made of them, of the Gaussian N(MEAN, STD^2)."""
    alpha, sigma = (c.reshape(-1, 1).to(x) for c in (alpha, sigma))
    v = alpha**2 * STD.to(x) ** 2 + sigma**2
    z = sigma * (x - alpha * MEAN.to(x)) / v
    data = MEAN.to(x) + alpha * STD.to(x) ** 2 * (x - alpha * MEAN.to(x)) / v
    return {
        "epsilon": z,
        "sample": data,
        "v_prediction": alpha * z - sigma * data,
        "flow": z - data,
    }


def at_step(k: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at step k, its log SNR linear between whole numbers."""
    k = k.double()
    low = k.floor().clamp(0, len(abar) - 2).long()
    here, there, u = abar[low], abar[low + 1], k - low
    # Where the next node has no signal, alpha^2 is linear.
    between = torch.sigmoid(torch.lerp(torch.logit(here), torch.logit(there), u))
    signal = torch.where(there == 0, torch.lerp(here, there, u), between)
    return signal.sqrt(), (1 - signal).sqrt()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


X = 1.5 * draw(6, 3, seed=5)
KNOWN = sg.Facts((3,))


# An exact network gives the exact score.


def check_exact(model: Foreign, times: Tensor, tolerance: float = 1e-6) -> None:
    law = sg.Gaussian(model.sde, MEAN, STD)
    for t in times:
        x = float(model.sde.alpha(t)) * X + float(model.sde.sigma(t)) * draw(6, 3, seed=6)
        e = model.evaluate(x, t)
        assert relative(e.score, law(x, t)) < tolerance, float(t)
        assert relative(e.denoised, law.denoise(x, t)) < tolerance, float(t)
    # A time for each sample.
    t = times[torch.arange(6) % len(times)]
    x = model.sde.alpha(t)[:, None] * X
    torch.testing.assert_close(
        model(x, t), law(x, t), rtol=tolerance, atol=tolerance * float(law(x, t).abs().max())
    )


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("abar", [ABAR, without_signal()], ids=["signal", "none left"])
def test_a_network_of_step_numbers(prediction: str, abar: Tensor) -> None:
    def unet(x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (exact(x, *at_step(timestep, abar))[prediction],)

    model = from_diffusers(unet, scheduler(prediction, abar), facts=KNOWN)
    assert model.sde.T == N
    assert model.span == (1.0, N)
    assert model.singular
    check_exact(model, torch.tensor([1.0, 2.0, 17.0, 63.0, 99.0], dtype=F64))
    # Between the steps, which a log SNR that is linear there would leave.
    check_exact(model, torch.tensor([1.3, 40.5, 98.9], dtype=F64))


def test_the_table_of_a_scheduler_is_taken_as_it_is_rounded() -> None:
    """Cumulative products in float32 are what a network was trained with, and samplers use."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    model = from_diffusers(lambda x, timestep: x, scheduler("sample", abar))
    t = torch.arange(1, 1001, dtype=F64)
    torch.testing.assert_close(model.sde.alpha(t) ** 2, abar.double(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("sde", [sg.EDM(), sg.VP(), sg.RectifiedFlow()], ids=repr)
def test_a_denoiser_serves_every_process(sde: LinearSDE) -> None:
    def net(y: Tensor, sigma: Tensor) -> Tensor:
        return exact(y, torch.ones_like(sigma), sigma)["sample"]

    model = from_denoiser(net, sde, facts=KNOWN)
    check_exact(model, sde.T * torch.tensor([0.01, 0.3, 0.9], dtype=F64))


@pytest.mark.parametrize("data_at", [0, 1])
def test_a_velocity_in_either_direction_of_time(data_at: int) -> None:
    def u(x: Tensor, time: Tensor) -> Tensor:
        t = time if data_at == 0 else 1 - time
        rate = exact(x, 1 - t, t)["flow"]
        return rate if data_at == 0 else -rate

    model = from_velocity(u, data_at=data_at, facts=KNOWN)  # type: ignore[arg-type]
    check_exact(model, torch.tensor([0.01, 0.3, 0.9, 1.0], dtype=F64))


def test_noise_at_any_index() -> None:
    def eps(x: Tensor, index: Tensor) -> Tensor:
        t = index / 999
        return exact(x, sg.VP().alpha(t), sg.VP().sigma(t))["epsilon"]

    model = from_noise(eps, sg.VP(), index=lambda t: 999 * t, facts=KNOWN)
    check_exact(model, torch.tensor([0.01, 0.3, 0.9, 1.0], dtype=F64))


@pytest.mark.parametrize(
    "other", [sg.VP(), sg.EDM(50.0), sg.SubVP(), sg.RectifiedFlow()], ids=repr
)
def test_a_foreign_network_serves_under_another_process(other: LinearSDE) -> None:
    def unet(x: Tensor, timestep: Tensor) -> Tensor:
        return exact(x, *at_step(timestep, ABAR))["v_prediction"]

    def net(y: Tensor, sigma: Tensor) -> Tensor:
        return exact(y, torch.ones_like(sigma), sigma)["sample"]

    for model in (
        from_diffusers(unet, scheduler("v_prediction"), facts=KNOWN),
        from_denoiser(net, facts=KNOWN),
        from_velocity(lambda x, t: exact(x, 1 - t, t)["flow"], data_at=0, facts=KNOWN),
    ):
        moved = model.under(other)
        low, high = moved.span
        # Of the denoiser all times are known.
        low, high = max(low, 1e-3 * other.T), min(high, 0.99 * other.T)
        check_exact(moved, torch.linspace(low, high, 4, dtype=F64))
        assert moved.under(model.sde).sde is model.sde
    with pytest.raises(TypeError, match="must be a LinearSDE"):
        model.under(sg.CriticallyDamped())  # type: ignore[arg-type]


# Step numbers.


@pytest.mark.parametrize("abar", [ABAR, without_signal()], ids=["signal", "none left"])
def test_nodes_are_whole_steps(abar: Tensor) -> None:
    before = torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    sde = sg.VP(Tabulated(1 - abar / before, T=2.0))
    t = torch.arange(1, N + 1, dtype=F64) * (2.0 / N)
    k = torch.arange(N, dtype=F64)
    torch.testing.assert_close(Steps(sde)(t), k, rtol=0, atol=1e-9)
    assert torch.equal(Steps(sde, rounded=True)(t), k.long())
    level = sde.log_snr(t)
    share = torch.tensor([0.2, 0.7], dtype=F64)
    between = sde.time_at(torch.lerp(level[4:5], level[5:6], share))
    torch.testing.assert_close(Steps(sde)(between), 4 + share, rtol=0, atol=1e-9)
    assert Steps(sde, rounded=True)(between).tolist() == [4, 5]
    # Outside the nodes the nearest.
    assert Steps(sde)(torch.tensor([1e-6, 2.0], dtype=F64)).tolist() == [0, N - 1]


def test_where_the_signal_ends_steps_are_linear_in_the_signal() -> None:
    sde = sg.VP(Tabulated([0.1, 0.5, 1.0], T=3.0))
    t = torch.tensor([2.0, 2.25, 2.5, 3.0], dtype=F64)
    torch.testing.assert_close(Steps(sde)(t), t - 1)
    assert Steps(sg.VP(Tabulated([0.3])))(0.4).tolist() == 0


def test_rounded_steps_reach_the_network_as_integers() -> None:
    seen: list[Tensor] = []

    def unet(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep)
        return x

    rounded = from_diffusers(unet, scheduler("sample"), rounded=True)
    rounded(X, 40.2)
    from_diffusers(unet, scheduler("sample"))(X.float(), 40.2)
    assert seen[0].dtype == torch.int64
    assert seen[0].tolist() == [39] * 6
    assert seen[1].dtype == torch.float32
    assert bool(((seen[1] > 39) & (seen[1] < 40)).all())


# Beyond the levels that a network was trained on.


def test_levels_are_clamped_and_said_so_once() -> None:
    seen: list[float] = []

    def net(y: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma[0]))
        return exact(y, torch.ones_like(sigma), sigma)["sample"]

    sde = sg.EDM(200.0)
    model = from_denoiser(net, sde, facts=KNOWN, span=(0.01, 100.0))
    law = sg.Gaussian(sde, MEAN, STD)
    with pytest.warns(UserWarning, match=r"trained for times 0.01 .. 100 .* asked at 0.001"):
        early = model.evaluate(X, 0.001)
    assert seen[-1] == pytest.approx(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late = model.evaluate(150 * X, 150.0)
    assert seen[-1] == pytest.approx(100.0)
    # The score has a limit at the data, the denoised state one where no signal is left: of these
    # data both are off by the square of the clamped ratio, (0.01 / 0.3)^2 and (1.4 / 100)^2.
    assert relative(early.score, law(X, 0.001)) < 2e-3
    assert relative(early.denoised, law.denoise(X, 0.001)) < 1e-6
    assert relative(late.denoised, law.denoise(150 * X, 150.0)) < 2e-2
    assert relative(late.score, law(150 * X, 150.0)) < 1e-3
    # A time for each sample: each its own.
    t = torch.tensor([0.001, 0.01, 1.0, 100.0, 150.0, 150.0], dtype=F64)
    x = torch.stack([X[0], X[1], X[2], 90 * X[3], 150 * X[4], 150 * X[5]])
    each = torch.stack([model(x[i : i + 1], t[i])[0] for i in range(6)])
    torch.testing.assert_close(model(x, t), each, rtol=1e-10, atol=0)
    inside = [i for i in range(6) if 0.01 <= float(t[i]) <= 100]
    torch.testing.assert_close(model(x, t)[inside], law(x, t)[inside], rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:the network was trained")
def test_what_is_held_is_a_function_of_the_noised_data() -> None:
    """Early the score of y = x / alpha, late the denoised state at the same normal."""
    sde = sg.VP()
    model = from_noise(Rough(0.3, F64), sde, facts=KNOWN, span=(0.4, 0.6))
    scale = sde.alpha(0.4) / sde.alpha(0.1)
    torch.testing.assert_close(model(X, 0.1), scale * model(scale * X, 0.4))
    torch.testing.assert_close(
        model.denoise(X, 0.1), sde.tweedie(X, torch.tensor(0.1, dtype=F64), model(X, 0.1))
    )
    scale = sde.sigma(0.6) / sde.sigma(0.9)
    torch.testing.assert_close(model.denoise(X, 0.9), model.denoise(scale * X, 0.6))
    tweedie = sde.tweedie(X, torch.tensor(0.9, dtype=F64), model(X, 0.9))
    torch.testing.assert_close(tweedie, model.denoise(X, 0.9))


def test_the_default_grid_stays_inside_what_was_trained_on() -> None:
    asked: list[float] = []

    def net(y: Tensor, sigma: Tensor) -> Tensor:
        asked.append(float(sigma[0]))
        return exact(y, torch.ones_like(sigma), sigma)["sample"]

    model = from_denoiser(net, sg.EDM(), facts=KNOWN, span=(0.02, 80.0))
    bound = [model, model.given(), model + 0.5 * model.given()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [sg.sample(score, 400, 12, seed=0, dtype=F64) for score in bound]
    assert min(asked) == pytest.approx(0.02)
    assert ((drawn[0].mean(0) - MEAN).abs() < 5 * STD / 20).all()
    narrow = from_denoiser(net, sg.EDM(), facts=KNOWN, span=(0.1, 80.0))
    assert (model + narrow).end == 0.1


def test_what_is_elsewhere_is_saved_elsewhere(tmp_path) -> None:
    model = from_noise(Rough(), sg.VP(), facts=KNOWN)
    with pytest.raises(TypeError, match="saved by the library that it is from"):
        save(model, tmp_path / "m")
    with pytest.raises(TypeError, match="wrap it as it was wrapped"):
        sg.train(model, X.float(), recipe=sg.Recipe(steps=1), folder=tmp_path / "m", device="cpu")
    assert not (tmp_path / "m").exists()


def test_clamping_is_continuous_at_the_ends() -> None:
    def unet(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x + timestep[:, None] / N)

    model = from_diffusers(unet, scheduler(), facts=KNOWN)
    at, near = model.evaluate(X, 1.0), None
    with pytest.warns(UserWarning, match="said once"):
        near = model.evaluate(X, 1.0 - 1e-9)
    torch.testing.assert_close(near.score, at.score, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(near.denoised, at.denoised, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="singular at t = 0"):
        model(X, 0.0)


# The samplers of others, from their papers.


class Rough(nn.Module):
    """A smooth network of state and noise level that is the score of nothing."""

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.scale = scale
        self.mix = nn.Parameter(torch.randn(3, 3, generator=generator).to(dtype))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        level = (self.scale * timestep).reshape(-1, 1).to(x.dtype)
        return torch.tanh(x @ self.mix + level) + 0.1 * x


START = draw(5, 3, seed=9).float()
STEPS = [95, 80, 62, 41, 20, 9, 3, 0]  # of a chain
TIMES = [*(float(k + 1) for k in STEPS), 0.0]


class Given(sg.Noise):
    """Normals that were drawn before, one a step."""

    def __init__(self, draws: Tensor) -> None:
        self.draws = iter(draws)

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        return next(self.draws)

    def start(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def rows(self, index: slice | Tensor) -> Given:
        return self


def reading(name: str, f: Tensor, x: Tensor, a: float, s: float) -> tuple[Tensor, Tensor]:
    """E[z], E[x_0] of a network's output."""
    if name == "epsilon":
        return f, (x - s * f) / a
    if name == "sample":
        return (x - a * f) / s, f
    return s * x + a * f, a * x - s * f


@pytest.mark.parametrize("name", ["epsilon", "sample", "v_prediction"])
def test_ddim(name: str) -> None:
    """Song, Meng & Ermon 2021, equation 12 with sigma_t = 0."""
    net = Rough(1 / N)
    model = from_diffusers(net, scheduler(name), facts=KNOWN)
    ours = sg.solve(model.sde.probability_flow(model), START, TIMES, ddim())
    x = START
    with torch.no_grad():
        for k, j in pairwise([*STEPS, -1]):
            a, s = math.sqrt(ABAR[k]), math.sqrt(1 - ABAR[k])
            z, data = reading(name, net(x, torch.full((5,), float(k))), x, a, s)
            b = ABAR[j] if j >= 0 else torch.ones(())
            x = math.sqrt(b) * data + math.sqrt(1 - b) * z
    assert relative(ours, x) < 1e-5


def test_ddpm() -> None:
    """Ho et al. 2020, equations 6 and 7, of a chain thinned out to some of its steps."""
    net = Rough(1 / N)
    model = from_diffusers(net, scheduler(), facts=KNOWN)
    draws = draw(len(STEPS), 5, 3, seed=4).float()
    ours = sg.solve(model.sde.reverse(model), START, TIMES, ddpm(), Given(draws))
    x = START
    with torch.no_grad():
        for i, (k, j) in enumerate(pairwise([*STEPS, -1])):
            abar, before = float(ABAR[k]), float(ABAR[j]) if j >= 0 else 1.0
            beta = 1 - abar / before
            f = net(x, torch.full((5,), float(k)))
            data = (x - math.sqrt(1 - abar) * f) / math.sqrt(abar)
            x = (
                math.sqrt(before) * beta / (1 - abar) * data
                + math.sqrt(abar / before) * (1 - before) / (1 - abar) * x
                + math.sqrt((1 - before) / (1 - abar) * beta) * draws[i]
            )
    assert relative(ours, x) < 1e-5


def test_dpm_solver_pp_2m() -> None:
    """Lu et al. 2022, algorithm 2."""
    net = Rough(1 / N)
    model = from_diffusers(net, scheduler("v_prediction"), facts=KNOWN)
    ours = sg.solve(model.sde.probability_flow(model), START, TIMES[:-1], dpm_solver_pp())
    alpha, sigma = (c[STEPS].tolist() for c in (ABAR.sqrt(), (1 - ABAR).sqrt()))
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    x, before, h = START, None, [b - a for a, b in pairwise(lam)]
    with torch.no_grad():
        for i, k in enumerate(STEPS[:-1]):
            f = net(x, torch.full((5,), float(k)))
            now = data = alpha[i] * x - sigma[i] * f
            if before is not None:
                data = now + h[i] / h[i - 1] / 2 * (now - before)
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h[i]) * data
            before = now
    assert relative(ours, x) < 1e-5


def karras(n: int = 9) -> Tensor:
    """Karras et al. 2022, equation 5, with their numbers, and 0."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    i = torch.arange(n, dtype=F64) / (n - 1)
    return torch.cat([(high + i * (low - high)) ** 7, torch.zeros(1)])


def heun(net: nn.Module, x: Tensor, t: float, s: float) -> Tensor:
    """A step of Karras et al. 2022 in sigma: Euler's where it ends at 0."""
    d = (x - net(x, torch.full((5,), t))) / t
    end = x + (s - t) * d
    if s:
        d = (d + (end - net(end, torch.full((5,), s))) / s) / 2
        end = x + (s - t) * d
    return end


def test_edm_algorithm_1_is_one_call() -> None:
    """Karras et al. 2022, algorithm 1: Heun's steps, and Euler's to sigma = 0."""
    net = Rough(0.1)
    model = from_denoiser(net, facts=KNOWN)
    sigmas = karras()
    ours = sg.solve(model.sde.probability_flow(model), 80 * START, sigmas, sg.Heun())
    x = 80 * START
    with torch.no_grad():
        for t, s in pairwise(sigmas.tolist()):
            x = heun(net, x, t, s)
    assert relative(ours, x) < 1e-5


def test_edm_algorithm_2_is_one_call() -> None:
    """Karras et al. 2022, algorithm 2: the same after noise is added (S_noise = 1)."""
    net = Rough(0.1)
    model = from_denoiser(net, sg.EDM(200.0), facts=KNOWN)
    sigmas = karras()
    draws = draw(len(sigmas), 5, 3, seed=4).float()
    solver = sg.Churn(sg.Heun(), amount=3.0, low=0.05, high=50.0)
    ours = sg.solve(model.sde.probability_flow(model), 80 * START, sigmas, solver, Given(draws))
    x, used = 80 * START, iter(draws)
    with torch.no_grad():
        for t, s in pairwise(sigmas.tolist()):
            gamma = min(3.0 / (len(sigmas) - 1), math.sqrt(2) - 1) if 0.05 <= t <= 50 else 0.0
            up = t * (1 + gamma)
            if gamma:
                x = x + math.sqrt(up**2 - t**2) * next(used)
            x = heun(net, x, up, s)
    assert relative(ours, x) < 1e-5


@pytest.mark.parametrize("name", ["euler", "heun", "2m"])
def test_samplers_of_k_diffusion(name: str) -> None:
    """In sigma, with d = (x - D) / sigma; 2M in -log sigma. All end at sigma = 0."""
    net = Rough(0.1)
    model = from_denoiser(net, facts=KNOWN)
    sigmas = karras()
    # Euler's step in sigma is DDIM's.
    solver = {"euler": sg.EulerMaruyama(), "heun": sg.Heun(), "2m": dpm_solver_pp()}[name]
    ours = sg.solve(model.sde.probability_flow(model), 80 * START, sigmas, solver)
    x, before, last = 80 * START, None, 0.0
    with torch.no_grad():
        for t, s in pairwise(sigmas.tolist()):
            data = net(x, torch.full((5,), t))
            if name == "2m":
                h, mixed = (math.log(t / s) if s else math.inf), data
                if before is not None and s:
                    r = last / h
                    mixed = (1 + 1 / (2 * r)) * data - before / (2 * r)
                x = s / t * x - math.expm1(-h) * mixed
                before, last = data, h
                continue
            d = (x - data) / t
            end = x + (s - t) * d
            if name == "heun" and s:
                end = x + (s - t) / 2 * (d + (end - net(end, torch.full((5,), s))) / s)
            x = end
    assert relative(ours, x) < 1e-5


@pytest.mark.parametrize("data_at", [0, 1])
def test_euler_of_flow_matching(data_at: int) -> None:
    """x <- x + (s - t) u(x, t), from pure noise: where alpha = 0 the exponential family reads the
    denoised state, and its first order is Euler's method."""
    net = Rough()
    model = from_velocity(net, data_at=data_at, facts=KNOWN)  # type: ignore[arg-type]
    times = torch.linspace(1, 0, 9, dtype=F64)
    ours = sg.solve(model.sde.probability_flow(model), START, times, sg.Exponential(1))
    x = START
    with torch.no_grad():
        for t, s in pairwise((times if data_at == 0 else 1 - times).tolist()):
            x = x + (s - t) * net(x, torch.full((5,), t))
    assert relative(ours, x) < 1e-5


def test_heun_of_flow_matching_starts_a_little_later() -> None:
    net = Rough()
    model = from_velocity(net, data_at=0, facts=KNOWN)
    flow, times = model.sde.probability_flow(model), torch.linspace(0.95, 0, 9, dtype=F64)
    with pytest.raises(ValueError, match="infinite at t = 1, where alpha = 0: take Exponential"):
        sg.solve(flow, START, [1.0, 0.5], sg.Heun())
    ours = sg.solve(flow, START, times, sg.Heun())
    x = START
    with torch.no_grad():
        for t, s in pairwise(times.tolist()):
            d = net(x, torch.full((5,), t))
            end = x + (s - t) * d
            if s:
                end = x + (s - t) / 2 * (d + net(end, torch.full((5,), s)))
            x = end
    assert relative(ours, x) < 1e-5


# Where no signal is left.


@pytest.mark.parametrize("name", ["sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_chain_without_signal_is_sampled_from_its_end(name: str, eta: float) -> None:
    """DDIM and DDPM with zero terminal signal (Lin et al. 2024), from the last step."""
    abar, net = without_signal(), Rough(1 / N)
    model = from_diffusers(net, scheduler(name, abar), facts=KNOWN)
    steps = [N - 1, 80, 41, 9, 0]
    draws = draw(len(steps), 5, 3, seed=4).float()
    ours = sg.solve(
        model.sde.reverse(model, eta),
        START,
        [*(k + 1.0 for k in steps), 0.0],
        sg.Exponential(1),
        Given(draws),
    )
    x = START
    with torch.no_grad():
        for i, (k, j) in enumerate(pairwise([*steps, -1])):
            a, s = math.sqrt(abar[k]), math.sqrt(1 - abar[k])
            f = net(x, torch.full((5,), float(k)))
            data = f if name == "sample" else a * x - s * f
            b = float(abar[j]) if j >= 0 else 1.0
            # Equation 12 of DDIM with its eta: the spread of the posterior.
            spread = eta * math.sqrt((1 - b) / (1 - abar[k]) * (1 - abar[k] / b))
            z = (x - a * data) / s
            x = math.sqrt(b) * data + math.sqrt(max(1 - b - spread**2, 0)) * z + spread * draws[i]
    assert relative(ours, x) < 1e-5


def test_predicted_noise_says_nothing_where_no_signal_is_left() -> None:
    model = from_diffusers(Rough(1 / N), scheduler(abar=without_signal()), facts=KNOWN)
    flow = model.sde.probability_flow(model)
    with pytest.raises(ValueError, match="predicts the noise says nothing of the data where alph"):
        sg.solve(flow, START, [float(N), 50.0, 1.0], sg.Exponential(2))
    for solver in (sg.Heun(), sg.EulerMaruyama(), sg.RungeKutta(), sg.SRA()):
        with pytest.raises(ValueError, match="infinite at t = 100, where alpha = 0"):
            sg.solve(flow, START, [float(N), 50.0, 1.0], solver)


def test_the_start_without_signal_is_the_limit_of_starts_before_it() -> None:
    abar = without_signal()

    def unet(x: Tensor, timestep: Tensor) -> Tensor:
        return exact(x, *at_step(timestep, abar))["v_prediction"]

    model = from_diffusers(unet, scheduler("v_prediction", abar), facts=KNOWN)
    flow = model.sde.probability_flow(model)

    def run(gap: float) -> Tensor:
        times = [N - gap, 70.0, 40.0, 20.0, 5.0, 1.0]
        return sg.solve(flow, X, times, sg.Exponential(1, float(STD.square().mean())))

    far = [relative(run(gap), run(0.0)) for gap in (1e-2, 1e-4, 1e-6)]
    # What the start forgets is the signal alpha = sqrt(gap abar[-2]).
    assert far[1] < 0.2 * far[0]
    assert far[2] < 1e-3
    # And the law is right: data of their own reference are exact, step by step.
    law = sg.Gaussian(model.sde, MEAN, STD)
    x = sg.solve(flow, X, [float(N), 50.0, 1.0], sg.Exponential(1, law.facts.moments))
    a, v = model.sde.alpha(1.0), model.sde.alpha(1.0) ** 2 * STD**2 + model.sde.sigma(1.0) ** 2
    torch.testing.assert_close(x, a * MEAN + v.sqrt() * X, rtol=1e-6, atol=1e-6)


# What a score knows, and what it refuses.


def test_what_networks_tell_of_themselves() -> None:
    class EDMLike(nn.Module):
        img_resolution, img_channels, sigma_data = 4, 2, 0.5
        sigma_min, sigma_max = 0.002, 60.0

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return x

    model = from_denoiser(EDMLike())
    assert model.shape == (2, 4, 4)
    assert model.facts.std == 0.5
    assert model.sde == sg.EDM(60.0)
    assert model.span == pytest.approx((0.002, 60.0))
    unbounded = from_denoiser(lambda x, sigma: x)
    assert unbounded.sde == sg.EDM()
    assert unbounded.span == (0.0, 80.0)

    class Unet(nn.Module):
        config = SimpleNamespace(sample_size=(4, 6), in_channels=3)

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.w * x

    chain = from_diffusers(SimpleNamespace(unet=Unet(), scheduler=scheduler()))
    assert chain.shape == (3, 4, 6)
    assert sg.sample(chain, 2, 3, seed=0, times=[100.0, 50.0, 1.0]).shape == (2, 3, 4, 6)
    assert from_velocity(Unet(), data_at=1).shape == (3, 4, 6)
    # What is given goes before what is read: not every network is one of square images.
    assert from_diffusers(Unet(), scheduler(), facts=sg.Facts((3, 9))).shape == (3, 9)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, 4, 6\)"):
        chain(torch.ones(2, 3, 4, 4), 3.0)


def test_labels_and_encodings_keep_their_names() -> None:
    seen: dict[str, Tensor] = {}

    def unet(
        x: Tensor, timestep: Tensor, class_labels: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        seen.update(y=class_labels, e=encoder_hidden_states)
        return x * class_labels[:, None]

    model = from_diffusers(unet, scheduler("sample"), facts=KNOWN)
    e = draw(7, 2, seed=1)
    score = model.given(class_labels=torch.arange(6)).given(encoder_hidden_states=sg.shared(e))
    score(X, 20.0)
    assert torch.equal(seen["y"], torch.arange(6))
    assert torch.equal(seen["e"], e.expand(6, 7, 2))
    torch.testing.assert_close(score.rows(slice(2, 4))(X[2:4], 20.0), score(X, 20.0)[2:4])
    # Guidance: what is added is a score.
    three = model.given(encoder_hidden_states=sg.shared(e)).given(class_labels=3)
    none = model.given(encoder_hidden_states=sg.shared(e)).given(class_labels=0)
    guided = 2.0 * three - 1.0 * none
    a, s2 = model.sde.alpha(20.0), model.sde.sigma(20.0) ** 2
    torch.testing.assert_close(guided(X, 20.0), (6 * a - 1) * X / s2)


def test_a_learned_variance_is_the_head() -> None:
    def unet(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([x, 7 + x], 1)

    e = from_diffusers(unet, scheduler("sample"), facts=KNOWN).evaluate(X, 20.0)
    torch.testing.assert_close(e.denoised, X)
    assert e.head is not None
    torch.testing.assert_close(e.head, 7 + X)


def test_a_flow_matching_scheduler() -> None:
    class FlowMatchEulerDiscreteScheduler:
        config = SimpleNamespace(num_train_timesteps=1000, shift=3.0)

    def u(x: Tensor, timestep: Tensor) -> Tensor:
        t = timestep / 1000
        return exact(x, 1 - t, t)["flow"]

    model = from_diffusers(u, FlowMatchEulerDiscreteScheduler(), facts=KNOWN)
    check_exact(model, torch.tensor([0.02, 0.5, 1.0], dtype=F64))


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a scheduler of another kind": (
        lambda: from_diffusers(Rough(), SimpleNamespace(config=SimpleNamespace(sigma_data=0.5))),
        ValueError,
        "SimpleNamespace with prediction_type None is not known here",
    ),
    "another prediction": (
        lambda: from_diffusers(Rough(), scheduler("score")),
        ValueError,
        "prediction_type 'score' is not known",
    ),
    "no scheduler": (lambda: from_diffusers(Rough()), TypeError, "a pipeline is needed"),
    "no network": (lambda: from_denoiser(3), TypeError, r"must be callable as net\(x, index\)"),  # type: ignore[arg-type]
    "time of the data": (
        lambda: from_velocity(Rough(), data_at=2),  # type: ignore[arg-type]
        ValueError,
        "data_at must be 0 or 1",
    ),
    "a process without numbers": (
        lambda: from_noise(Rough(), sg.CriticallyDamped()),  # type: ignore[arg-type]
        TypeError,
        "sde must be a LinearSDE",
    ),
    "a span that is none": (
        lambda: from_noise(Rough(), sg.VP(), span=(0.5, 0.4)),
        ValueError,
        "the last time of span must be",
    ),
    "steps of no chain": (lambda: Steps(sg.VP()), TypeError, "steps are those of VP"),
    "the way back without a shape": (
        lambda: to_diffusers(sg.ScoreNetwork(Rough(), sg.VP()), scheduler()),
        TypeError,
        "knows its linear process and data shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals(case: tuple[Callable[[], object], type[Exception], str]) -> None:
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


def test_a_folder_asks_for_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="read by diffusers: pip install diffusers"):
        from_diffusers("somewhere")


# The dtype of the weights.


class Strict(nn.Module):
    """A network that works in the dtype of its weights alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = nn.Linear(2, 2).to(dtype), dtype

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        assert x.dtype == self.dtype
        assert c.dtype == torch.promote_types(self.dtype, torch.float32)
        return 0.1 * torch.tanh(self.inner(x)) * torch.sigmoid(c).to(x).reshape(-1, 1)


def strict(kind: str, dtype: torch.dtype) -> sg.Score:
    torch.manual_seed(0)
    facts = sg.Facts((2,))
    if kind == "own":
        return sg.ScoreNetwork(Strict(dtype), sg.VP(), facts=facts)
    if kind == "velocity":
        return from_velocity(Strict(dtype), data_at=1, facts=facts)
    return from_denoiser(Strict(dtype), facts=facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["own", "denoiser", "velocity"])
def test_a_network_is_fed_in_the_dtype_of_its_weights(kind: str, dtype: torch.dtype) -> None:
    model = strict(kind, dtype)
    x = draw(4, 2, seed=1)
    for state in (torch.float32, torch.float64):
        assert model(x.to(state), 0.5).dtype == state
        assert model.denoise(x.to(state), 0.5).dtype == state
        assert sg.sample(model, 3, 6, seed=0, dtype=state).dtype == state


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("own", torch.float32),
        ("own", torch.float64),
        ("velocity", torch.float32),
    ],
)
def test_tuning_budget_and_likelihood_feed_it_nothing_else(kind: str, dtype: torch.dtype) -> None:
    model = strict(kind, dtype)
    x, levels = draw(8, 2, seed=1), torch.arange(16).reshape(8, 2)
    sg.tune_solver(model, steps=4, n=8)
    assert isinstance(model.sde, LinearSDE)
    budget = sg.error_budget(model, sg.Gaussian(model.sde, torch.zeros(2)), 5, n=8, fine=16)
    assert float(budget.total.value) > 0
    for state in (torch.float32, torch.float64):
        for how in ({"steps": 8}, {"steps": 8, "probes": 1}, {"solver": sg.Adaptive(0.1, 0.1)}):
            found = sg.log_prob(model, x.to(state), **how)  # type: ignore[arg-type]
            assert found.value.dtype == state
            assert bool(found.value.isfinite().all())
    assert bool(sg.bits_per_dim(model, levels, 16, steps=8).value.isfinite().all())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:the network was trained")
def test_networks_on_a_gpu() -> None:
    x = draw(4, 2, seed=1)
    for kind in ("own", "denoiser", "velocity"):
        here, there = strict(kind, torch.float64), strict(kind, torch.float64)
        assert isinstance(there, sg.ScoreNetwork)
        there.cuda()
        assert there.device.type == "cuda"
        for t in (torch.tensor(0.5), torch.tensor([0.1, 0.2, 0.5, 0.9])):
            for at in (t, t.cuda()):
                torch.testing.assert_close(there(x.cuda(), at).cpu(), here(x, t))
        # Normals are made in float32 from the same bits.
        ours, theirs = (sg.sample(m, 4, 6, seed=0, dtype=F64).cpu() for m in (here, there))
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    net = Rough(1 / N, torch.float64)
    here = from_diffusers(net, scheduler(), facts=KNOWN)
    there = from_diffusers(Rough(1 / N, torch.float64).cuda(), scheduler(), facts=KNOWN)
    for t in (torch.tensor(0.5), torch.tensor(33.3), torch.tensor([0.5, 1.0, 20.5, 33, 99, 100])):
        for at in (t, t.cuda()):
            torch.testing.assert_close(there(X.cuda(), at).cpu(), here(X, t))
    back = to_diffusers(there, scheduler())(X.cuda(), torch.tensor(33, device="cuda")).sample
    torch.testing.assert_close(back.cpu(), to_diffusers(here, scheduler())(X, 33).sample)


# The way back.


def trained(sde: LinearSDE, prediction: Prediction = "preconditioned") -> sg.ScoreNetwork:
    torch.manual_seed(0)
    return sg.ScoreNetwork(Net(), sde, prediction, sg.Facts((3,), std=0.8))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        bias = 0.0 if y is None else 0.1 * y[:, None].to(x)
        return torch.tanh(self.inner(x) + c.reshape(-1, 1)) + bias


@pytest.mark.parametrize("sde", [sg.VP(), sg.EDM(), sg.SubVP(), sg.RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("name", ["epsilon", "sample", "v_prediction"])
def test_a_network_of_ours_in_a_loop_of_theirs(sde: LinearSDE, name: str) -> None:
    """DDIM's loop on what ``to_diffusers`` returns is ``solve`` on the same noise levels."""
    model = trained(sde)
    unet = to_diffusers(model, scheduler(name))
    assert (unet.config.in_channels, unet.dtype, unet.device.type) == (3, torch.float32, "cpu")
    levels = torch.logit(ABAR[STEPS])
    times = torch.cat([sde.time_at(levels), torch.zeros(1, dtype=F64)])
    scale = sde.sigma(times[:1]).float() / math.sqrt(1 - ABAR[STEPS[0]])
    ours = sg.solve(sde.probability_flow(model), scale * START, times, ddim())
    x = START
    with torch.no_grad():
        for k, j in pairwise([*STEPS, -1]):
            a, s = math.sqrt(ABAR[k]), math.sqrt(1 - ABAR[k])
            z, data = reading(name, unet(x, torch.tensor(k)).sample, x, a, s)
            b = ABAR[j] if j >= 0 else torch.ones(())
            x = math.sqrt(b) * data + math.sqrt(1 - b) * z
    assert relative(ours, x) < 1e-5


def test_there_and_back() -> None:
    sde, theirs = sg.VP(), scheduler("v_prediction")
    model = trained(sde)
    back = from_diffusers(to_diffusers(model, theirs), theirs)
    for k in (1.0, 20.0, 77.0):
        t = sde.time_at(back.sde.log_snr(k))
        torch.testing.assert_close(back(X, k), model(X, t), rtol=1e-5, atol=1e-5)
        ours = model.given(y=2)(X, t)
        torch.testing.assert_close(back.given(y=2)(X, k), ours, rtol=1e-5, atol=1e-5)
    assert to_diffusers(model, theirs)(X, 3, return_dict=False)[0].shape == X.shape


# torch.export.


def test_a_score_is_exported() -> None:
    torch.manual_seed(0)
    net = sg.networks.MLP((2,), width=8, depth=1)
    model = sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts((2,))).eval()
    check_export(model, 2)


def test_a_foreign_network_is_exported() -> None:
    check_export(from_diffusers(Rough(1 / N), scheduler(), facts=KNOWN).eval(), 3, late=90.0)


@pytest.mark.slow
def test_a_network_of_images_is_exported() -> None:
    torch.manual_seed(0)
    net = sg.networks.UNet((1, 4, 4), width=8)
    model = sg.ScoreNetwork(net, sg.RectifiedFlow(), "flow", sg.Facts((1, 4, 4)))
    check_export(model.eval(), 1, 4, 4)


def check_export(model: nn.Module, *shape: int, late: float = 0.7) -> None:
    x = draw(4, *shape, seed=2).float()
    t = torch.tensor([0.5, late, 0.3, late], dtype=F64)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x, t), dynamic_shapes=({0: batch}, {0: batch}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a level that the network was not trained on
        for n in (4, 3):
            torch.testing.assert_close(program.module()(x[:n], t[:n]), model(x[:n], t[:n]))
