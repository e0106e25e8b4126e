"""The exponential family: exact on Gaussians, of its order elsewhere, equal to the published."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import sde_gen as sg
from sde_gen import grids
from sde_gen.moments import Moments, data_moments, isotropic
from sde_gen.solvers import (
    Exponential,
    Midpoint,
    Polynomial,
    Spectral,
    Weights,
    ddim,
    deis,
    dpm_solver,
    unipc,
)
from sde_gen.solvers.weights import kernel, quadrature

F64 = torch.float64
MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]], dtype=F64)


def random_covariance(n: int, seed: int = 0) -> Tensor:
    a = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / n + 0.01 * torch.eye(n, dtype=F64)


def affine_law(process: sg.Reverse, times: Tensor, solver: sg.Solver, start: Tensor, n: int):
    """Mean map and covariance of the output for x_T ~ N(0, start), by unit impulses.

    Every draw of every coordinate gets a row of its own: exact, without Monte Carlo.
    """
    steps = len(times) - 1

    class Unit(sg.Impulses):
        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            z = torch.zeros_like(x)
            rows = slice(1 + n + self.draws * n, 1 + n + (self.draws + 1) * n)
            z[rows] = torch.eye(n, dtype=x.dtype)
            self.draws += 1
            return z

    x = torch.zeros(1 + n + steps * n, n, dtype=F64)
    x[1 : 1 + n] = torch.linalg.cholesky(start).T
    y = sg.solve(process, x, times, solver, Unit())
    return y[0], (y[1:] - y[0]).T @ (y[1:] - y[0])


GAUSSIANS = {
    "number": (0.3 * torch.eye(3, dtype=F64), lambda c: isotropic(0.3)),
    "diagonal": (
        torch.diag(torch.tensor([0.1, 0.5, 2.0], dtype=F64)),
        lambda c: Moments(c.diag()),
    ),
    "low rank": (
        0.2 * torch.eye(3, dtype=F64) + 1.3 * torch.ones(3, 3, dtype=F64) / 3,
        lambda c: Moments(
            torch.tensor([0.2, 1.5], dtype=F64), None, torch.full((3, 1), 3**-0.5, dtype=F64)
        ),
    ),
    "full": (
        random_covariance(3),
        Moments.of,
    ),
}


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("name", GAUSSIANS)
@pytest.mark.parametrize("sde", [sg.VP(), sg.EDM(20.0)], ids=["VP", "EDM"])
def test_gaussian_data_of_covariance_c_keep_their_law_in_one_step(
    sde: sg.LinearSDE, name: str, eta: float
) -> None:
    covariance, reference = GAUSSIANS[name]
    mean = torch.tensor([0.3, -0.2, 0.1], dtype=F64)
    score = sg.Gaussian(sde, mean, covariance=covariance)
    t, s = sde.T, 0.05 * sde.T
    for times in ([t, s], [t, 0.5 * t, s], [t, s, 0.0]):
        grid = torch.tensor(times, dtype=F64)
        solver = Exponential(1, reference(covariance))
        eye = torch.eye(3, dtype=F64)
        start = sde.alpha(t) ** 2 * covariance + sde.sigma(t) ** 2 * eye
        process = sde.reverse(score, eta)
        # Start at the true mean: the affine map then keeps alpha m.
        _, spread = affine_law(process, grid, solver, start, 3)
        x = (sde.alpha(t) * mean)[None]
        zero = sg.solve(sde.probability_flow(score), x, grid, solver)[0]
        end = grid[-1]
        law = sde.alpha(end) ** 2 * covariance + sde.sigma(end) ** 2 * eye
        torch.testing.assert_close(spread, law, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(zero, sde.alpha(end) * mean, rtol=1e-9, atol=1e-10)


def flow_errors(solver: sg.Solver, start: float, counts: list[int], end: float = 0.01):
    sde = sg.VP()
    score = sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)
    flow = sde.probability_flow(score)
    z = torch.randn(48, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = float(sde.alpha(start)) * score.sample(48, torch.Generator().manual_seed(1))
    x = x + float(sde.sigma(start)) * z
    exact = sg.solve(flow, x, [start, end], sg.SciPy("DOP853", 1e-12, 1e-13))

    def grid(n: int) -> Tensor:
        times = grids.quadratic(sde, n, max(start, end), min(start, end))
        return times if start > end else times.flip(0)

    return [float((sg.solve(flow, x, grid(n), solver) - exact).norm()) for n in counts]


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (Exponential(1, 0.4, corrector=True), 0.2),
        (Exponential(2, 0.4, corrector=True), 0.2),
        (Exponential(2, data_moments(MEANS.repeat(9, 1)), corrector=True), 0.2),
        (dpm_solver(2), 0.2),
        (dpm_solver(3), 0.2),
        (deis(3), 0.2),
        (unipc(2), 0.2),
    ],
    ids=["1c", "2c", "2c moments", "dpm 2", "dpm 3", "deis 3", "unipc 2"],
)
def test_measured_order_is_the_declared_one(solver: Exponential, tolerance: float) -> None:
    errors = flow_errors(solver, 1.0, [160, 320, 640])
    slope = math.log2(errors[-2] / errors[-1])
    assert abs(slope - solver.order) < tolerance, (errors, solver.order)


@pytest.mark.parametrize(
    "solver",
    [
        Exponential(4),
        Exponential(3, 0.4, corrector=True),
        Exponential(3, 0.8, corrector=True, weights=Spectral(0.4, 2)),
        unipc(3),
    ],
    ids=["4", "3c", "3c spectral", "unipc 3"],
)
def test_order_four(solver: Exponential) -> None:
    # Trajectories between the modes bend sharply, so the asymptote comes late; without corrector
    # the first step's error of order 2 shows only after that.
    errors = flow_errors(solver, 1.0, [640, 1280] if solver.corrector else [160, 320])
    slope = math.log2(errors[0] / errors[1])
    assert solver.order == 4
    assert abs(slope - 4) < 0.2, (slope, errors)


@pytest.mark.parametrize(("start", "end"), [(0.4, 0.01), (0.05, 0.6)])
@pytest.mark.parametrize(
    "solver",
    [
        Exponential(3),
        Exponential(4),
        Exponential(2, corrector=True),
        Exponential(3, 0.4, corrector=True),
        Exponential(4, 0.4, corrector=True, weights=Spectral(0.4, 2)),
        deis(3),
        unipc(3),
    ],
    ids=["3", "4", "2c", "3c", "4c", "deis 3", "unipc 3"],
)
def test_the_order_holds_from_any_start(solver: Exponential, start: float, end: float) -> None:
    # In the middle, where Q changes from the first step on; there and back.
    errors = flow_errors(solver, start, [160, 320], end)
    assert math.log2(errors[0] / errors[1]) > solver.order - 0.2


def test_one_long_first_step_caps_the_order() -> None:
    solver = Exponential(3)
    solver.start_calls = 0
    errors = flow_errors(solver, 0.4, [160, 320])
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.3


@pytest.mark.parametrize(
    ("solver", "start", "eta", "steps", "more"),
    [
        (Exponential(3), 0.4, 0.0, 50, 1),
        (Exponential(4, corrector=True), 0.4, 0.0, 50, 2),
        (Exponential(2, corrector=True), 0.4, 0.0, 50, 0),
        (Exponential(4), 0.4, 0.0, 8, 0),
        (Exponential(4), 0.4, 0.5, 50, 0),
        (Exponential(4), 1.0, 0.0, 200, 0),
        (Exponential(4), 0.99, 0.0, 200, 0),
    ],
    ids=["3", "4c", "2c", "few steps", "noise", "from T", "no signal"],
)
def test_a_start_calls_as_often_as_is_declared(
    solver: Exponential, start: float, eta: float, steps: int, more: int
) -> None:
    sde, times = sg.VP(), list[float]()
    law = sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)

    def score(x: Tensor, t: float) -> Tensor:
        times.append(float(t))
        return law(x, t)

    grid = grids.quadratic(sde, steps, start, 0.01)
    ends = []
    sg.solve(
        sde.reverse(score, eta), X, grid, solver, 0, callback=lambda x, t: ends.append(float(t))
    )
    assert len(times) == steps + more
    assert more in (0, solver.start_calls)
    assert ends == grid[1:].tolist()
    assert times == sorted(times, reverse=True)
    assert set(grid[:-1].tolist()) <= set(times)


@pytest.mark.parametrize(
    ("order", "corrector", "weak"), [(1, False, 1), (1, True, 2), (2, False, 2)]
)
def test_weak_order_at_eta_1(order: int, corrector: bool, weak: int) -> None:
    sde = sg.VP()
    covariance = torch.tensor([[0.25]], dtype=F64)
    score = sg.Gaussian(sde, torch.zeros(1, dtype=F64), covariance=covariance)
    process = sde.reverse(score)
    errors = []
    for n in (80, 160, 320):
        times = grids.log_snr(sde, n, end=0.01)
        start = sde.alpha(1.0) ** 2 * covariance + sde.sigma(1.0) ** 2
        solver = Exponential(order, corrector=corrector)
        _, v = affine_law(process, times, solver, start.reshape(1, 1), 1)
        exact = sde.alpha(0.01) ** 2 * 0.25 + sde.sigma(0.01) ** 2
        errors.append(abs(float(v[0, 0] - exact)))
    slope = math.log2(errors[-2] / errors[-1])
    assert abs(slope - weak) < 0.2, errors


@pytest.mark.parametrize("rule", [Polynomial(), Midpoint(), Spectral(0.4, 2)], ids=["p", "m", "s"])
@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.1, 2.0])
def test_weights_integrate_a_constant_exactly(rule: Weights, h: float) -> None:
    nodes = np.array([0.3, 0.3 - h, 0.3 - 2.5 * h])
    c = np.array([0.0, 0.4, 3.0])
    for kappa in (1.0, 2.0):
        lam, weight = quadrature(0.3, 0.3 + h)
        total = kernel(lam, 0.3 + h, c, kappa) @ weight
        w_t, w_s = math.exp(-0.6), math.exp(-0.6 - 2 * h)
        exact = -np.expm1(kappa / 2 * np.log((c + w_s) / (c + w_t)))
        # The nodes themselves are known to one rounding: 1e-16 / h of the step.
        np.testing.assert_allclose(total, exact, rtol=1e-12 + 1e-15 / h)
        np.testing.assert_allclose(
            rule(nodes, 0.3, 0.3 + h, c, kappa).sum(0), exact, rtol=1e-12 + 1e-14 / h
        )


def test_polynomial_weights_match_closed_forms_for_tiny_and_large_steps() -> None:
    # C = 0: int_0^h kappa e^(-kappa (h - u)) u du = h - (1 - e^(-kappa h)) / kappa, by series.
    for h in (1e-9, 1e-4, 0.5, 3.0):
        for kappa in (1.0, 2.0):
            r = 0.7
            weights = Polynomial()(np.array([0.0, -r * h]), 0.0, h, np.zeros(1), kappa)[:, 0]
            x = kappa * h
            series = sum((-x) ** k / math.factorial(k) for k in range(2, 60)) / kappa
            np.testing.assert_allclose(weights[1], -series / (r * h), rtol=1e-9)


def test_spectral_weights_tend_to_polynomial_ones_for_small_steps() -> None:
    gaps = []
    for h in (0.2, 0.1):
        nodes = np.array([0.5, 0.5 - h, 0.5 - 2 * h])
        c = np.array([0.8])
        p = Polynomial()(nodes, 0.5, 0.5 + h, c, 1.0)
        s = Spectral(0.4, 2)(nodes, 0.5, 0.5 + h, c, 1.0)
        gaps.append(np.abs(s - p).max() / np.abs(p).max())
    assert gaps[1] < 0.6 * gaps[0] < 0.06


@pytest.mark.parametrize("dimensions", [1, 2, 40])
@pytest.mark.parametrize("c", [0.0, 0.3, math.inf])
@pytest.mark.parametrize("options", [{}, {"ridge": 0.02, "power": 0.4}])
def test_spectral_weights_minimise_what_they_say(
    dimensions: int, c: float, options: dict[str, float]
) -> None:
    """The sum over a law of v as one least-squares system, with rows of the ridge below."""
    variance, kappa, start, end, nodes = 0.4, 1.0, 0.2, 1.1, np.array([0.2, -0.5, -1.4])
    # v^power in log v, from a thousandth of the mean variance to (n + 1) / 2 of it; 48 points.
    log_v = np.linspace(math.log(1e-3), math.log((dimensions + 1) / 2), 48)
    v, weight = variance * np.exp(log_v), np.exp(options.get("power", 0.2) * log_v)
    lam, gauss = quadrature(start, end)
    k = kernel(lam, end, np.array([c]), kappa)[0] * gauss

    def q(lam: np.ndarray) -> np.ndarray:
        top = np.exp(-lam)[None] if math.isinf(c) else (v - c)[:, None]
        return top / np.sqrt(v[:, None] + np.exp(-2 * lam))

    plain = Polynomial()(nodes, start, end, np.array([c]), kappa)[:, 0]
    scale = np.sqrt(weight * v / (v + math.exp(-2 * end)))
    target = scale * (q(lam) @ k - q(nodes) @ plain)
    # The weights sum to int K: what the others change, the first takes back.
    columns = scale[:, None] * (q(nodes)[:, 1:] - q(nodes)[:, :1])
    noise = math.exp(-2 * end)
    r = options.get("ridge", 0.7 * math.sqrt(noise / (noise + variance)))
    ridge = r * np.diag(np.linalg.norm(columns, axis=0))
    rows, right = np.vstack([columns, ridge]), np.concatenate([target, np.zeros(2)])
    change = np.linalg.lstsq(rows, right, rcond=None)[0]
    rule = Spectral(variance, dimensions, **options)
    found = rule(nodes, start, end, np.array([c]), kappa)[:, 0]
    np.testing.assert_allclose(found[1:], plain[1:] + change, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.sum(), plain.sum(), rtol=1e-10)


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
def test_spectral_weights_beat_polynomials_at_few_calls(power: float) -> None:
    # Gaussians of spectra that the rule was not fitted to: k^-power in 40 dimensions.
    sde = sg.VP()
    v = torch.arange(1, 41, dtype=F64) ** -power
    score = sg.Gaussian(sde, torch.zeros(40, dtype=F64), (0.4 * v / v.mean()).sqrt())
    x = torch.randn(64, 40, dtype=F64, generator=torch.Generator().manual_seed(0))
    flow = sde.probability_flow(score)
    end = 1e-3
    ratio = torch.sqrt(sde.alpha(end) ** 2 * score.variance + sde.sigma(end) ** 2)
    ratio = ratio / torch.sqrt(sde.alpha(1.0) ** 2 * score.variance + sde.sigma(1.0) ** 2)
    logs = []
    for n in (6, 8, 10, 12, 16):
        times = grids.default(sde, n, end=end)
        errors = []
        for rule in (Polynomial(), Spectral(0.4, 40)):
            y = sg.solve(flow, x, times, Exponential(4, 0.4, True, rule))
            errors.append(float((y - ratio * x).norm()))
        logs.append(math.log(errors[1] / errors[0]))
    assert math.exp(sum(logs) / len(logs)) < 0.8, logs


def test_what_is_kept_after_a_short_step_is_the_state_and_one_multiple_of_its_score() -> None:
    """One pass over memory; after a long step the correction moves it, by all that is known."""
    sde = sg.VP()
    process, solver = sde.reverse(sg.Gaussian(sde, X[0]), 0), Exponential(3, 0.3, corrector=True)
    times = grids.log_snr(sde, 40)
    rows = [step.numbers.q for step in solver.plan(process, times)]
    h, alpha, sigma = (f(times[:-1]) for f in (sde.log_snr, sde.alpha, sde.sigma))
    assert 0.0 < float(h.diff().max() / 2) < 0.3
    for row, a, s in zip(rows, alpha.tolist(), sigma.tolist(), strict=True):
        assert row[0] == 1
        assert row[1] == pytest.approx(0.3 * a**2 + s**2, rel=1e-12)
        assert not any(row[2:])
    long = [step.numbers.q for step in solver.plan(process, grids.log_snr(sde, 8))]
    assert all(all(row) for row in long)


@pytest.mark.parametrize("c", [0.0, 0.3])
@pytest.mark.parametrize(("eta", "back"), [(0.0, True), (0.0, False), (1.0, True)])
def test_the_corrector_moves_q_as_half_a_gaussian_would(c: float, eta: float, back: bool) -> None:
    """Predictor, corrector and memory written out: Q = D + C (D - y) / w, and its move with y,
    d (dD/dy (1 + C / w) - C / w) where dD/dy = C w / (C + w)^2; in a flow after steps of 0.3 to
    0.6 in lambda, either way.

    Weights by a fine trapezoid rule over each step.
    """
    sde, kappa, times = sg.VP(), 1 + eta**2, TIMES if back else TIMES.flip(0)
    a, s = sde.alpha(times).numpy(), sde.sigma(times).numpy()
    w, lam, noise = (s / a) ** 2, np.log(a / s), sg.Streams(2)

    def weights(i: int, at: list[int]) -> list[float]:
        u = np.linspace(lam[i], lam[i + 1], 20_001)
        r = np.exp(-2 * u)
        k = kappa * r / (c + r) * ((c + w[i + 1]) / (c + r)) ** (kappa / 2)
        basis = [
            np.prod([(u - lam[m]) / (lam[j] - lam[m]) for m in at if m != j], axis=0) + 0 * u
            for j in at
        ]
        return [float(np.trapezoid(k * b, u)) for b in basis]

    y, denoised_at, q = X / a[0], dict[int, Tensor](), dict[int, Tensor]()
    plain = y
    for i, (t, s_) in enumerate(pairwise(times.tolist())):
        d = denoised(a[i] * y, t) if i == 0 else denoised(a[i] * plain, t)
        denoised_at[i] = d
        if i > 0:
            # The step that led here, once more with the value found here.
            q[i] = d + c * (d - plain) / w[i]
            at = [i, *range(i - 1, max(-1, i - 3), -1)]
            before = dict(zip(at[1:], weights(i - 1, at[1:]), strict=True))
            y = plain + sum(
                (v - before.get(j, 0.0)) * q[j]
                for j, v in zip(at, weights(i - 1, at), strict=True)
            )
        q[i] = d + c * (d - plain) / w[i]
        if i > 0:
            slope = c * w[i] / (c + w[i]) ** 2 * (1 + c / w[i]) - c / w[i]
            share = min(max(abs(lam[i] - lam[i - 1]) / 0.3 - 1, 0), 1) if eta == 0 else 1
            q[i] = q[i] + share * slope * (y - plain)
        rho = (c + w[i + 1]) / (c + w[i])
        at = list(range(i, max(-1, i - 2), -1))
        spread = math.sqrt((c + w[i + 1]) * (1 - rho ** (eta**2)))
        plain = rho ** (kappa / 2) * y + spread * noise(X, t, s_)
        plain = plain + sum(v * q[j] for j, v in zip(at, weights(i, at), strict=True))
    process = sde.reverse(sg.GaussianMixture(sde, [0.2, 0.3, 0.5], MEANS, 0.2), eta)
    ours = sg.solve(process, X, times, Exponential(2, c, corrector=True), noise)
    torch.testing.assert_close(ours, a[-1] * plain, rtol=1e-6, atol=1e-6)


# --- what is published ---------------------------------------------------------------------


def deterministic(solver: Exponential, times: Tensor, x: Tensor) -> tuple[list, list, Tensor]:
    """alpha, sigma of the grid, and our endpoint, on a mixture."""
    sde = sg.VP()
    score = sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)
    y = sg.solve(sde.probability_flow(score), x, times, solver)
    return sde.alpha(times).tolist(), sde.sigma(times).tolist(), y


def denoised(x: Tensor, t: float) -> Tensor:
    sde = sg.VP()
    score = sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)
    return score.denoise(x, t)


X = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(5))
TIMES = grids.quadratic(sg.VP(), 9, end=0.01)


def test_unipc_is_the_published_algorithm() -> None:
    # Zhao et al. 2023, algorithms 5 to 8, data prediction, B(h) = e^(-h) - 1 with h < 0 there;
    # its coefficients from the linear systems R a = b, and 1/2 where there is one.
    a, s, ours = deterministic(unipc(3), TIMES, X)
    lam = [math.log(p / q) for p, q in zip(a, s, strict=True)]
    t = TIMES.tolist()

    def solve_system(r: list[float], hh: float, b_h: float) -> np.ndarray:
        if len(r) == 1:
            return np.array([0.5])
        rows, rhs = [], []
        phi, factorial = math.expm1(hh) / hh - 1, 1
        for k in range(1, len(r) + 1):
            rows.append(np.array(r) ** (k - 1))
            rhs.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        return np.linalg.solve(np.array(rows), np.array(rhs))

    x, model = X, [denoised(X, t[0])]
    for i in range(1, len(t)):
        order = min(3, i)
        h = lam[i] - lam[i - 1]
        hh = -h
        b_h = math.expm1(hh)
        base = s[i] / s[i - 1] * x - a[i] * b_h * model[-1]
        r = [(lam[i - k - 1] - lam[i - 1]) / h for k in range(1, order)]
        d = [(model[-k - 1] - model[-1]) / r_k for k, r_k in enumerate(r, 1)]
        rho = solve_system(r, hh, b_h) if r else []
        predicted = base - a[i] * b_h * sum((p * q for p, q in zip(rho, d, strict=True)), 0 * x)
        if i == len(t) - 1:
            x = predicted
            break
        new = denoised(predicted, t[i])
        rho = solve_system([*r, 1.0], hh, b_h)
        d = [*d, new - model[-1]]
        x = base - a[i] * b_h * sum(p * q for p, q in zip(rho, d, strict=True))
        model.append(new)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-10)


def test_deis_is_adams_bashforth_in_the_ratio() -> None:
    a, s, ours = deterministic(deis(3), TIMES, X)
    rho = [q / p for p, q in zip(a, s, strict=True)]
    y, eps, t = X / a[0], [], TIMES.tolist()
    for i in range(len(t) - 1):
        x = a[i] * y
        eps.insert(0, (x - a[i] * denoised(x, t[i])) / s[i])
        nodes = rho[max(0, i - 2) : i + 1][::-1]
        for e, node in zip(eps, nodes, strict=False):
            others = [n for n in nodes if n != node]
            poly = np.poly1d(np.poly(others)) if others else np.poly1d([1.0])
            integral = (poly / poly(node)).integ()
            y = y + float(integral(rho[i + 1]) - integral(rho[i])) * e
    torch.testing.assert_close(ours, a[-1] * y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_eta_is_the_published_update(eta: float) -> None:
    # Song, Meng & Ermon 2021, equations 12 and 16, with their alpha = alpha^2.
    sde = sg.VP()
    score = sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)
    noise = sg.Streams(3)
    ours = sg.solve(sde.reverse(score, eta), X, TIMES, ddim(eta), noise)
    a2 = (sde.alpha(TIMES) ** 2).tolist()
    x = X
    for (t, s), (a_t, a_s) in zip(pairwise(TIMES.tolist()), pairwise(a2), strict=True):
        x_0 = denoised(x, t)
        eps = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        std = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
        x = math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s - std**2) * eps
        x = x + std * noise(x, t, s)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("solver", "process"), [(0.7, 0.0), (0.0, 1.0), (0.3, 1.0), (1.0, 0.0)])
def test_ddim_is_refused_on_a_process_of_another_eta(solver: float, process: float) -> None:
    """Else a flow would be random, or a reversal deterministic."""
    score = sg.Gaussian(sg.VP(), torch.zeros(2), 0.5)
    message = rf"ddim\({solver:g}\) steps a reversal with the same eta.*got Rev.* eta = {process}"
    with pytest.raises(ValueError, match=message):
        sg.solve(sg.VP().reverse(score, process), X, TIMES, ddim(solver), 0)
    with pytest.raises(ValueError, match=message):
        sg.sample(score, 3, 5, eta=process, solver=ddim(solver))
    assert sg.sample(score, 3, 5, seed=0, eta=solver, solver=ddim(solver)).shape == (3, 2)


# --- moments, and the call that uses them --------------------------------------------------


def test_moments_apply_is_a_function_of_the_matrix() -> None:
    c = random_covariance(5, 3)
    values, basis = torch.linalg.eigh(c)
    low = Moments(torch.cat([torch.full((1,), 0.1, dtype=F64), values[2:]]), None, basis[:, 2:])
    dense = 0.1 * basis[:, :2] @ basis[:, :2].T + basis[:, 2:] @ values[2:].diag() @ basis[:, 2:].T
    values, u = torch.linalg.eigh(dense)
    x, y = torch.randn(2, 7, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    f = low.coefficient(np.exp(low.values.numpy()))
    g = low.coefficient(1 / (1 + low.values.numpy()))
    expected = x @ (u * torch.exp(values)) @ u.T + y @ (u / (1 + values)) @ u.T
    torch.testing.assert_close(low.apply((f, g), (x, y)), expected)


def test_data_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, 3, dtype=F64, generator=generator) @ random_covariance(3)
    y = x.flatten(1)
    full = data_moments(x)
    covariance = torch.from_numpy(np.cov(y.numpy().T, bias=True))
    rebuilt = full.apply((full.coefficient(full.values.numpy()),), (torch.eye(6, dtype=F64),))
    torch.testing.assert_close(rebuilt, covariance)
    torch.testing.assert_close(full.mean, y.mean(0))
    two = data_moments(x, rank=2)
    assert len(two.values) == 3
    torch.testing.assert_close(two.values[0] * 4 + two.values[1:].sum(), covariance.trace())
    torch.testing.assert_close(data_moments(x, diagonal=True).values, covariance.diag())
    with pytest.raises(ValueError, match="at least 2"):
        data_moments(x[:1])
    with pytest.raises(ValueError, match="rank"):
        data_moments(x, rank=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sample_of_a_gaussian_model_has_the_exact_law(eta: float) -> None:
    covariance = random_covariance(4, 2)
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=F64)
    model = sg.Gaussian(sg.VP(), mean, covariance=covariance)
    n = 20_000
    x = sg.sample(model, n, steps=3, seed=0, eta=eta, dtype=F64)
    error = x.mean(0) - mean
    assert (error.abs() < 5 * torch.sqrt(covariance.diag() / n)).all()
    second = torch.cov(x.T)
    d = covariance.diag()
    spread = torch.sqrt((covariance**2 + d[:, None] * d) / n)
    assert ((second - covariance).abs() < 5 * spread).all()


def test_moments_are_not_those_of_a_sum_or_of_a_class() -> None:
    sde = sg.VP()
    p = sg.Gaussian(sde, torch.zeros(2, dtype=F64), 0.5)
    q = sg.Gaussian(sde, torch.ones(2, dtype=F64), 0.3)
    assert p.facts.moments is not None
    assert (p + q).facts.moments is None
    assert (2.0 * p).facts.moments is None
    assert p.given(y=1).facts.moments is None


def test_a_misshapen_score_is_refused() -> None:
    sde = sg.VP()
    flow = sde.probability_flow(lambda x, t: -x[:, :1])
    with pytest.raises(ValueError, match="shape"):
        sg.solve(flow, torch.zeros(3, 2), [1.0, 0.5], Exponential(2))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="order"):
        Exponential(5)
    with pytest.raises(ValueError, match="reference"):
        Exponential(2, -1.0)
    with pytest.raises(ValueError, match="eta"):
        ddim(1.5)
    with pytest.raises(ValueError, match="variance"):
        Spectral(0.0, 2)
    with pytest.raises(ValueError, match="dimensions"):
        Spectral(0.4, 0)
    with pytest.raises(ValueError, match="floor"):
        Moments(torch.ones(2), None, torch.eye(3)[:, :2])
    sde = sg.VP()
    flow = sde.probability_flow(sg.Gaussian(sde, torch.zeros(2)))
    with pytest.raises(ValueError, match="noise prediction"):
        sg.solve(flow, torch.zeros(1, 2), [1.0, 0.5, 0.0], dpm_solver(2))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_the_last_step_does_to_the_law(eta: float) -> None:
    """N(0, 1) seen at noise 0.3: stopping there keeps its noise, denoising takes twice too much.

    Variances: 1 + 0.09 where the grid stops; 1 / 1.09 after D = x / 1.09 (Tweedie, C = 0); 1 after
    the Gaussian end with C = 1, at every eta.
    """
    sde = sg.EDM()
    process = sde.reverse(sg.Gaussian(sde, torch.zeros(1, dtype=F64), 1.0), eta)
    # Two unit impulses: the state at 0.3, and the normal of the step.
    x = torch.tensor([[0.0], [math.sqrt(1.09)]], dtype=F64)
    for reference, variance in ((0.0, 1 / 1.09), (1.0, 1.0)):
        y = sg.solve(process, x, [0.3, 0.0], Exponential(1, reference), sg.Impulses())
        assert float((y**2).sum()) == pytest.approx(variance, rel=1e-12)
