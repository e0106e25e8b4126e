"""Published samplers, written again from their papers, against the solvers that contain them."""

from __future__ import annotations

import ast
import math
import re
from itertools import pairwise

import pytest
import torch
from problems import F64
from torch import Tensor

from sde_gen import (
    EDM,
    VP,
    Exponential,
    Gaussian,
    Heun,
    LinearSDE,
    Noise,
    ScoreNetwork,
    Streams,
    grids,
    sample,
    solve,
    solvers,
)
from sde_gen.ops import Time, match
from sde_gen.schedules import Tabulated
from sde_gen.solvers import Midpoint

N = 1000
BETAS = torch.linspace(1e-4, 0.02, N, dtype=F64)
ABAR = torch.cat([torch.ones(1, dtype=F64), torch.cumprod(1 - BETAS, 0)])
SEED = 11


def eps(x: Tensor, t: Time) -> Tensor:
    """Any network: a smooth function of the state that is the score of nothing."""
    t = torch.as_tensor(t, dtype=F64)
    u = x / (1 + t)  # so that large noise does not make large slopes
    return torch.tanh(u.flip(1) + 2 * t) - 0.3 * torch.cos(3 * u) + 0.1 * u


class NoisePrediction:
    """The score -eps / sigma."""

    def __init__(self, sde: LinearSDE) -> None:
        self.sde = sde

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        return -eps(x, t) / self.sde.sigma(t)


def chain(nodes: Tensor) -> Tensor:
    """Times of the chain's nodes, falling."""
    return nodes.to(F64) / N


def begin() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=F64)


def test_ddpm_is_exponential_1_at_eta_1() -> None:
    """Ho et al. 2020, equations 6, 7 and 11: all 1000 steps, the small variance beta tilde."""
    sde, x = VP(Tabulated(BETAS)), begin()
    times = chain(torch.arange(N, -1, -1))
    process, noise = sde.reverse(NoisePrediction(sde)), Streams(SEED)
    ours = solve(process, x, times, Exponential(1), noise, trajectory=True)
    alpha = 1 - BETAS
    for i in range(N, 0, -1):
        a, b = alpha[i - 1], BETAS[i - 1]
        mean = (x - b / torch.sqrt(1 - ABAR[i]) * eps(x, i / N)) / torch.sqrt(a)
        tilde = (1 - ABAR[i - 1]) / (1 - ABAR[i]) * b
        z = noise(x, i / N, (i - 1) / N) if i > 1 else torch.zeros_like(x)
        x = mean + torch.sqrt(tilde) * z
        torch.testing.assert_close(ours[N - i + 1], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [10, 7, 999], ids=lambda n: f"{n} of 1000")
def test_ddim_is_exponential_1_at_eta_0(steps: int) -> None:
    """Song et al. 2021, equation 12 with sigma = 0, on node numbers that need not divide N."""
    sde, x = VP(Tabulated(BETAS)), begin()
    nodes = torch.linspace(N, 0, steps + 1).round().long()
    flow = sde.probability_flow(NoisePrediction(sde))
    ours = solve(flow, x, chain(nodes), Exponential(1), trajectory=True)
    for k, (i, j) in enumerate(pairwise(nodes.tolist())):
        e = eps(x, i / N)
        x_0 = (x - torch.sqrt(1 - ABAR[i]) * e) / torch.sqrt(ABAR[i])
        x = torch.sqrt(ABAR[j]) * x_0 + torch.sqrt(1 - ABAR[j]) * e
        torch.testing.assert_close(ours[k + 1], x, rtol=1e-12, atol=1e-12)


def dpm_solver_pp_2m(x: Tensor, lam: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2."""

    def denoised(x: Tensor, i: int) -> Tensor:
        return (x - sigma[i] * eps(x, t[i])) / alpha[i]

    h = lam.diff()
    previous = denoised(x, 0)
    x = sigma[1] / sigma[0] * x - alpha[1] * torch.expm1(-h[0]) * previous
    for i in range(2, len(t)):
        r = h[i - 2] / h[i - 1]
        current = denoised(x, i - 1)
        mixed = (1 + 1 / (2 * r)) * current - 1 / (2 * r) * previous
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * torch.expm1(-h[i - 1]) * mixed
        previous = current
    return x


@pytest.mark.parametrize("grid", [grids.log_snr, grids.karras, grids.uniform])
@pytest.mark.parametrize("sde", [VP(), EDM()], ids=repr)
def test_dpm_solver_pp_2m_is_exponential_2_midpoint(sde: LinearSDE, grid: object) -> None:
    assert callable(grid)
    times: Tensor = grid(sde, 15, end=0.01 * sde.T)
    x = sde.sigma(sde.T) * begin()
    alpha, sigma, lam = sde.alpha(times), sde.sigma(times), sde.log_snr(times) / 2
    expected = dpm_solver_pp_2m(x, lam, alpha, sigma, times)
    flow = sde.probability_flow(NoisePrediction(sde))
    y = solve(flow, x, times, Exponential(2, weights=Midpoint()))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


def test_sde_dpm_solver_pp_2m_is_exponential_2_midpoint_at_eta_1() -> None:
    """Lu et al. 2022, appendix: the SDE variant, x_t = sigma_t / sigma_s e^-h x_s + ..."""
    sde, noise = VP(), Streams(SEED)
    times = grids.log_snr(sde, 12, end=0.01)
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    h = (sde.log_snr(times) / 2).diff()
    x, previous = begin(), torch.zeros(0)
    ours = solve(
        sde.reverse(NoisePrediction(sde)), x, times, Exponential(2, weights=Midpoint()), noise
    )
    for i in range(1, len(times)):
        current = (x - sigma[i - 1] * eps(x, times[i - 1])) / alpha[i - 1]
        mixed = current
        if i > 1:
            r = h[i - 2] / h[i - 1]
            mixed = current + (current - previous) / (2 * r)
        z = noise(x, float(times[i - 1]), float(times[i]))
        x = (
            sigma[i] / sigma[i - 1] * torch.exp(-h[i - 1]) * x
            - alpha[i] * torch.expm1(-2 * h[i - 1]) * mixed
            + sigma[i] * torch.sqrt(-torch.expm1(-2 * h[i - 1])) * z
        )
        previous = current
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)


def test_edm_sampler_is_heun() -> None:
    """Karras et al. 2022, algorithm 1, without its last Euler step to 0."""
    sde = EDM()
    times = grids.karras(sde, 18, end=0.002)
    # Their equation 5 with rho = 7.
    i = torch.arange(19, dtype=F64) / 18
    exact = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(times, exact, rtol=1e-12, atol=0)
    score, x = NoisePrediction(sde), 80 * begin()
    y = solve(sde.probability_flow(score), x, times, Heun())
    for t, s in pairwise(times):
        d = (x - (x - t * eps(x, t))) / t
        end = x + (s - t) * d
        d_s = (end - (end - s * eps(end, s))) / s
        x = x + (s - t) * (d + d_s) / 2
    torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


def test_a_network_goes_through_the_published_step() -> None:
    """DDIM with a ScoreNetwork that predicts the noise: what a user of the library runs."""
    sde, x = VP(Tabulated(BETAS)), begin()
    net = torch.nn.Linear(3, 3).double()

    class Timed(torch.nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return net(x) * c_noise.exp()

    score = ScoreNetwork(Timed(), sde, "noise")
    nodes = torch.tensor([1000, 600, 123, 1])
    with torch.no_grad():
        ours = solve(sde.probability_flow(score), x, chain(nodes), Exponential(1))
        for i, j in pairwise(nodes.tolist()):
            a, b = ABAR[i], ABAR[j]
            # Unit-variance data under VP: the network sees x itself.
            e = net(x) * ((1 - a) / a) ** (1 / 8)
            x = torch.sqrt(b) * (x - torch.sqrt(1 - a) * e) / torch.sqrt(a) + torch.sqrt(1 - b) * e
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


class DrawnBefore(Noise):
    """Given normals, one a step."""

    def __init__(self, draws: Tensor) -> None:
        self.draws = iter(draws)

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        return next(self.draws)

    def start(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def rows(self, index: slice | Tensor) -> Noise:
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
def test_diffusers_multistep_scheduler(kind: str) -> None:
    """The same sampler in diffusers, whose clock is float32: equal to single precision."""
    diffusers = pytest.importorskip("diffusers", reason="comes with the extra 'bench'")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=N,
        trained_betas=BETAS.numpy(),
        algorithm_type=kind,
        solver_order=2,
        lower_order_final=False,
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(12)
    # diffusers numbers the nodes from 0, and ends at the first of them.
    nodes = torch.cat([scheduler.timesteps + 1, torch.ones(1, dtype=torch.int64)])
    ratios = torch.sqrt((1 - ABAR[nodes]) / ABAR[nodes])
    torch.testing.assert_close(scheduler.sigmas.double(), ratios, rtol=1e-4, atol=0)
    sde, x = VP(Tabulated(BETAS)), begin()
    generator = torch.Generator().manual_seed(2)
    draws = torch.randn(12, *x.shape, generator=generator, dtype=F64)
    eta = 0.0 if kind == "dpmsolver++" else 1.0
    process = sde.reverse(NoisePrediction(sde), eta)
    ours = solve(process, x, chain(nodes), Exponential(2, weights=Midpoint()), DrawnBefore(draws))
    for i, t in enumerate(scheduler.timesteps):
        output = eps(x, (int(t) + 1) / N)
        x = scheduler.step(output, t, x, variance_noise=draws[i]).prev_sample
    single = 2e-5 * float(ours.abs().max())
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=single)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("h", [1.0, 1e-2, 1e-5])
def test_weights_integrate_their_polynomials(order: int, eta: float, h: float) -> None:
    """A denoised state that is a polynomial in lambda of degree order - 1 is integrated exactly.

    With D = lambda^k the master equation has the solution
    y = e^-kappa(lambda - mu) y_0 + kappa int e^-kappa(lambda - u) u^k du, here by moments. Steps
    down to 1e-5, where weights in closed form would cancel (and in float32 did, elsewhere).
    """
    sde, kappa, degree = EDM(50.0), 1 + eta**2, order - 1
    lam = torch.cat([-1.0 + h * torch.tensor([-1.3, -0.7, -0.2, 0.0]), torch.tensor([-1.0 + h])])
    lam = lam.to(F64)
    times = torch.exp(-lam)

    def score(x: Tensor, t: Time) -> Tensor:
        # D - x over sigma^2, with D = ((lambda + 1) / h)^degree.
        u = (-torch.log(torch.as_tensor(t, dtype=F64)) + 1) / h
        return (match(u**degree, x) - x) / torch.as_tensor(t, dtype=F64) ** 2

    process, solver = sde.reverse(score, eta), Exponential(order)
    plan = solver.plan(process, times)
    memory: tuple[Tensor, ...] = ()
    x, noise = torch.ones(1, 1, dtype=F64), DrawnBefore(torch.zeros(5, 1, 1, dtype=F64))
    for step in plan[:-1]:
        # Fill the memory with exact values; the state itself may be anything.
        _, memory = solver.step(process, x, step, noise, memory)
    y, _ = solver.step(process, x, plan[-1], noise, memory)
    moment = -math.expm1(-kappa * h)
    for k in range(1, degree + 1):
        moment = 1 - k / (kappa * h) * moment if kappa * h > 0.5 else _series(k, kappa * h)
    assert float(y) == pytest.approx(math.exp(-kappa * h) + moment, rel=1e-9)
    assert float(y - 1) == pytest.approx(math.expm1(-kappa * h) + moment, rel=1e-9 / h, abs=1e-13)


def _series(k: int, a: float) -> float:
    """a int_0^1 e^(-a (1 - u)) u^k du for small a, by its power series."""
    terms = (
        a ** (j + 1) * (-1) ** j * math.factorial(k) / math.factorial(k + j + 1) for j in range(25)
    )
    return sum(terms)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddim", type(solvers.ddim())),
        ("DDPM", solvers.Exponential),
        ("DPM-Solver++(2M)", solvers.Exponential),
        ("unipc3", solvers.Exponential),
        ("dpm_solver", solvers.Exponential),
        ("Euler", solvers.EulerMaruyama),
        ("heun", solvers.Heun),
        ("rk45", solvers.SciPy),
    ],
)
def test_a_name_is_answered_with_the_call_to_write(name: str, kind: type) -> None:
    law = Gaussian(VP(), torch.zeros(2), 0.5)
    with pytest.raises(TypeError, match="solver must be a Solver, got") as caught:
        sample(law, 3, solver=name)  # type: ignore[arg-type]
    call = str(caught.value).partition("write solver=sde_gen.")[2].removesuffix(", eta=1")
    written = re.fullmatch(r"solvers\.(\w+)\((.*)\)", call)
    assert written is not None
    arguments = [ast.literal_eval(written[2])] if written[2] else []
    assert type(getattr(solvers, written[1])(*arguments)) is kind


def test_a_name_that_is_not_known_is_answered_with_all() -> None:
    law = Gaussian(VP(), torch.zeros(2), 0.5)
    with pytest.raises(TypeError, match=r"ddpm\(\), eta=1, ddim\(\), .*, SciPy"):
        sample(law, 3, solver="plms")  # type: ignore[arg-type]
    orders = {"DPM-Solver++(3M)": "dpm_solver_pp(3)", "unipc-2": "unipc(2)"}
    for name, call in orders.items():
        with pytest.raises(TypeError) as caught:
            sample(law, 3, solver=name)  # type: ignore[arg-type]
        assert str(caught.value).endswith(f"write solver=sde_gen.solvers.{call}")
