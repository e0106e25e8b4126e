"""Likelihoods against exact densities, at the solver's order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sde_gen as sg
from sde_gen import grids
from sde_gen.likelihood import bits_per_dim, log_prob

MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]], dtype=torch.float64)
SDES = [sg.VP(), sg.SubVP(), sg.VE(), sg.EDM(80.0), sg.OrnsteinUhlenbeck()]


def mixture(sde):
    return sg.GaussianMixture(sde, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)


def points(score, n):
    x = score.sample(n, torch.Generator().manual_seed(0)).clone()
    x[0] *= 5  # a point in the tail, where the density is about e^-200
    return x


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_equals_exact_density(sde):
    score = mixture(sde)
    x = points(score, 8)
    fine = log_prob(score, x, solver=sg.SciPy("DOP853", 1e-10, 1e-10))
    torch.testing.assert_close(fine, score.log_prob(x), atol=1e-6, rtol=0)


def test_error_falls_at_the_order_of_the_solver():
    sde = sg.VP()
    score = mixture(sde)
    x = points(score, 16)
    errors = []
    for n in (60, 120, 240):
        times = grids.uniform(sde, n, end=0.0, power=2).flip(0)
        l_n = log_prob(score, x, solver=sg.RungeKutta(), times=times)
        errors.append(float((l_n - score.log_prob(x)).abs().mean()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(s - 4) < 0.35 for s in slopes[:-1]), slopes
    assert abs(slopes[-1] - 4) < 0.2, slopes


def test_hutchinson_is_unbiased():
    sde = sg.VP()
    score = mixture(sde)
    x = points(score, 6)[1:]
    solver = sg.RungeKutta()
    times = grids.uniform(sde, 40, end=0.0, power=2).flip(0)
    draws = torch.stack(
        [log_prob(score, x, probes=2, seed=k, solver=solver, times=times) for k in range(40)]
    )
    error = draws.mean(0) - score.log_prob(x)
    spread = draws.std(0) / math.sqrt(len(draws))
    assert (error.abs() < 4.5 * spread).all(), (error, spread)


def test_probes_do_not_depend_on_the_batch_or_on_chunks():
    sde = sg.VP()
    score = mixture(sde)
    x = points(score, 6)
    solver = sg.Heun()
    times = grids.uniform(sde, 10, end=0.0, power=2).flip(0)

    def run(chunk):
        return log_prob(score, x, probes=1, solver=solver, times=times, chunk=chunk)

    torch.testing.assert_close(run(None), run(4), rtol=1e-12, atol=1e-12)


def test_encode_then_decode_returns_the_data():
    sde = sg.VP()
    score = mixture(sde)
    x = points(score, 32)[1:]
    flow = sde.probability_flow(score)
    solver = sg.SciPy("DOP853", 1e-10, 1e-10)
    latent = sg.solve(flow, x, [0.0, 1.0], solver)
    back = sg.solve(flow, latent, [1.0, 0.0], solver)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


def test_images_and_vectors_agree():
    sde = sg.VP()
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    flat = sg.Gaussian(sde, torch.zeros(12, dtype=torch.float64), 0.5)
    image = sg.Gaussian(sde, torch.zeros(3, 2, 2, dtype=torch.float64), 0.5)
    a = log_prob(flat, x)
    b = log_prob(image, x.reshape(3, 3, 2, 2))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a, flat.log_prob(x), atol=1e-2, rtol=0)


def test_guided_scores_have_a_likelihood():
    # Exact unconditional score + exact classifier = the class's own score, hence its density.
    sde = sg.VP()
    score = mixture(sde)

    class Posterior(torch.nn.Module):
        def forward(self, x, c):
            t = sde.time_at(-8 * c.double())
            return torch.log(score.posterior(x, t))

    guided = score + sg.Classifier(Posterior(), 1, sde)
    one = sg.Gaussian(sde, MEANS[1], 0.2)
    x = one.sample(4, torch.Generator().manual_seed(2))
    fast = sg.SciPy("DOP853", 1e-8, 1e-8)
    times = [1e-4, 1.0]
    a = log_prob(guided, x, solver=fast, times=torch.tensor(times, dtype=torch.float64))
    b = one.log_prob(x)
    # The prior N(0, 1) in place of p_T, and a start at t = 1e-4: both below 1e-2 here.
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


def test_bits_per_dim_bounds_the_entropy_of_the_cells():
    # Levels of a Gaussian: the bound is above the exact code length of the cells and near it.
    sde = sg.VP()
    n, levels = 8, 16
    model = sg.Gaussian(sde, torch.zeros(n), 0.4)
    generator = torch.Generator().manual_seed(3)
    x = 0.4 * torch.randn(200, n, generator=generator)
    k = ((x + 1) / 2 * levels).floor().clamp(0, levels - 1).long()
    edges = torch.linspace(-1, 1, levels + 1, dtype=torch.float64)
    cdf = 0.5 * (1 + torch.erf(edges / (0.4 * math.sqrt(2))))
    mass = cdf.diff()
    exact = -torch.log2(mass)[k].mean(1)
    one = bits_per_dim(model, k, levels, probes=None)
    many = bits_per_dim(model, k, levels, probes=None, draws=8)
    # -E log p <= -log E p: Jensen's gap per coordinate is Var_u(log p) / 2, about 0.01 bits.
    assert -0.01 < float((one - exact).mean()) < 0.05
    assert float((many - exact).mean()) < float((one - exact).mean()) + 0.005


def test_bad_input():
    sde = sg.VP()
    score = mixture(sde)
    with pytest.raises(TypeError, match="floating point"):
        log_prob(score, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        log_prob(score, torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="probes"):
        log_prob(score, torch.zeros(2, 2), probes=0)
    with pytest.raises(TypeError, match="integers"):
        bits_per_dim(score, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"0 \.\. 15"):
        bits_per_dim(score, torch.full((2, 2), 16), 16)
