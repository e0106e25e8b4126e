"""The chain's steps, against Bayes' rule, the published formulas and the samplers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import F64, correlated, draw, gaussian, line, mixture
from torch import Tensor, nn

from sde_gen import (
    EDM,
    VE,
    VP,
    Chain,
    CriticallyDamped,
    Facts,
    Gaussian,
    Impulses,
    LinearSDE,
    Moments,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    ScoreNetwork,
    Streams,
    SubVP,
    grids,
    sample,
    solve,
)
from sde_gen.chain import Normal
from sde_gen.moments import isotropic
from sde_gen.schedules import Cosine, Tabulated
from sde_gen.scores import Score
from sde_gen.solvers.published import ddpm
from sde_gen.training import load, save

BETAS = torch.linspace(1e-3, 0.2, 40, dtype=F64)
DDPM = VP(Tabulated(BETAS))
PROCESSES = [VP(), SubVP(), VE(), EDM(), OrnsteinUhlenbeck(), RectifiedFlow(), DDPM, VP(Cosine())]


def chain_of(sde: LinearSDE, steps: int = 12) -> Chain:
    return Chain(sde, grids.log_snr(sde, steps)[1:])


def covariance(p: Normal) -> Tensor:
    """What a normal draws, from unit vectors."""
    n = p.mean[0].numel()
    root = p.sample(torch.eye(n, dtype=F64)) - p.mean
    return root.T @ root


# ---- the nodes ----


def test_a_table_has_its_own_nodes() -> None:
    chain = Chain(DDPM)
    assert len(chain) == 40
    torch.testing.assert_close(chain.betas, BETAS, rtol=1e-13, atol=0)
    abar = torch.cumprod(1 - BETAS, 0)
    torch.testing.assert_close(chain.nodes.alpha[1:] ** 2, abar, rtol=1e-13, atol=0)


def test_grids_fall_or_rise_and_may_name_node_0() -> None:
    falling = grids.log_snr(VP(), 5)
    for times in (
        falling,
        falling.flip(0),
        torch.cat([falling, torch.zeros(1)]),
        falling.tolist(),
    ):
        chain = Chain(VP(), times)
        assert torch.equal(chain.times[1:], falling.flip(0))
        assert torch.equal(chain.grid, chain.times.flip(0))
    assert len(Chain(VP(), [1.0])) == 1


def test_a_subset_has_betas_of_its_own() -> None:
    """Respacing by picking betas of the whole chain, as public code did, is another process."""
    chain = Chain(DDPM)
    few = chain.strided(8)
    at = torch.tensor([int((chain.times - t).abs().argmin()) for t in few.times])
    assert at[0] == 0
    assert at[1] == 1
    assert at[-1] == 40
    assert bool((at.diff() > 0).all())
    abar = torch.cat([torch.ones(1), torch.cumprod(1 - BETAS, 0)])
    torch.testing.assert_close(few.betas, 1 - abar[at[1:]] / abar[at[:-1]], rtol=1e-12, atol=0)
    picked = Chain(VP(Tabulated(BETAS[at[1:] - 1])))
    assert float(picked.nodes.alpha[-1]) > 5 * float(few.nodes.alpha[-1])
    # The table of these betas is the same chain on a clock of its own.
    again = Chain(VP(Tabulated(few.betas)))
    torch.testing.assert_close(again.nodes.alpha, few.nodes.alpha, rtol=1e-12, atol=0)
    assert len(chain.strided(1)) == 1
    assert torch.equal(chain.strided(40).times, chain.times)


# ---- kernels and posteriors ----


@pytest.mark.parametrize("sde", PROCESSES)
def test_the_forward_steps_compose_and_the_posterior_is_bayes_rule(sde: LinearSDE) -> None:
    chain, x_0, x_t = chain_of(sde), draw(1, 1), draw(1, 1, seed=1)
    for s, t in ((1, 2), (2, 9), (5, len(chain)), (0, 3)):
        prior, to = chain.forward(x_0, s) if s else None, chain.forward(x_0, t)
        step = chain.forward(torch.ones(1, 1).double(), t, s)
        a, beta = float(step.mean), float(step.variance)
        if prior is None:
            assert float(to.mean) == pytest.approx(a * float(x_0), rel=1e-12)
            assert float(to.variance) == pytest.approx(float(chain.nodes.sigma[t]) ** 2, rel=1e-12)
            continue
        m, v = float(prior.mean), float(prior.variance)
        assert float(to.mean) == pytest.approx(a * m, rel=1e-10, abs=1e-14)
        assert float(to.variance) == pytest.approx(a**2 * v + beta, rel=1e-10)
        # Conditioning a joint Gaussian.
        found = chain.posterior(x_t, t, s, data=x_0)
        gain = v * a / (a**2 * v + beta)
        assert float(found.mean) == pytest.approx(m + gain * (float(x_t) - a * m), rel=1e-8)
        assert float(found.variance) == pytest.approx(v - gain * a * v, rel=1e-7)


def test_the_posterior_is_the_lectures() -> None:
    chain, x_0, z = Chain(DDPM), draw(4, 3), draw(4, 3, seed=1)
    a, abar = 1 - BETAS, torch.cumprod(1 - BETAS, 0)
    for i in (2, 17, 40):
        at, ab, before = a[i - 1], abar[i - 1], abar[i - 2]
        x = ab.sqrt() * x_0 + (1 - ab).sqrt() * z
        mean = (at.sqrt() * (1 - before) * x + before.sqrt() * (1 - at) * x_0) / (1 - ab)
        p = chain.posterior(x, i, data=x_0)
        torch.testing.assert_close(p.mean, mean, rtol=1e-12, atol=1e-13)
        v = float((1 - at) * (1 - before) / (1 - ab))
        assert float(p.variance) == pytest.approx(v, rel=1e-12)
        noise = (x - (1 - at) / (1 - ab).sqrt() * z) / at.sqrt()
        torch.testing.assert_close(chain.posterior(x, i, noise=z).mean, noise, rtol=1e-12, atol=0)
        score = (x + (1 - at) * (-z / (1 - ab).sqrt())) / at.sqrt()
        told = chain.posterior(x, i, score=-z / (1 - ab).sqrt())
        torch.testing.assert_close(told.mean, score, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), OrnsteinUhlenbeck()])
def test_the_three_parametrisations_are_one(sde: LinearSDE) -> None:
    chain, x_0, z = chain_of(sde), draw(5, 2), draw(5, 2, seed=1)
    t = torch.tensor([2, 3, 7, 11, 12])
    x = chain.forward(x_0, t).sample(z)
    sigma = chain.nodes.sigma[t].unsqueeze(1)
    means = [
        chain.posterior(x, t, t - 2, **told).mean
        for told in ({"data": x_0}, {"noise": z}, {"score": -z / sigma})
    ]
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=1e-9, atol=1e-9)


def test_a_chain_may_end_where_nothing_is_left_of_the_data() -> None:
    chain = Chain(RectifiedFlow(), [1.0, 0.5, 0.2])
    p = chain.posterior(draw(2, 3), 3, data=torch.full((2, 3), 0.4, dtype=F64))
    torch.testing.assert_close(p.mean, torch.full((2, 3), 0.2, dtype=F64))
    assert float(p.variance) == pytest.approx(0.25)


# ---- the model's step ----


@pytest.mark.parametrize("sde", [DDPM, VP(), VE(), SubVP()])
def test_ancestral_sampling_is_ddpm_step_by_step(sde: LinearSDE) -> None:
    chain, law, noise = chain_of(sde, 30), mixture(sde), Streams(3)
    x = float(chain.nodes.sigma[-1]) * draw(6, 2)
    path = solve(sde.reverse(law), x, chain.grid, ddpm(), noise, trajectory=True)
    for i in range(len(chain), 0, -1):
        p, z = chain.step(law, x, i), noise(x, float(chain.times[i]), float(chain.times[i - 1]))
        x = p.mean if i == 1 else p.sample(z)
        torch.testing.assert_close(x, path[len(chain) + 1 - i], rtol=1e-9, atol=1e-9)


def test_the_verb_samples_so_too() -> None:
    chain, law = Chain(DDPM), mixture(DDPM)
    found = chain.sample(law, 5, seed=4)
    kept = sample(law, 5, seed=4, eta=1, solver=ddpm(), times=chain.grid)
    assert torch.equal(found, kept)
    assert torch.equal(chain.sample(law, 9, seed=4)[:5], found)


class WithHead(nn.Module):
    """Noise that is 0, and a head that the state and its noise level move."""

    shape = (2,)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([0.3 * x, torch.tanh(x + c.reshape(-1, 1))], 1)


@pytest.mark.parametrize("variance", ["large", "learned", "errors", "moments"])
def test_every_variance_samples_by_its_own_steps(variance: str) -> None:
    chain, noise = Chain(DDPM).strided(10), Streams(5)
    model = ScoreNetwork(WithHead(), DDPM, "noise", Facts((2,)))
    c = Moments.of(torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64))
    errors = torch.linspace(0.1, 0.7, 10).double()
    chosen = {"errors": errors, "moments": c}.get(variance, variance)
    x = draw(4, 2)
    path = solve(DDPM.reverse(model), x, chain.grid, chain.solver(chosen), noise, trajectory=True)  # type: ignore[arg-type]
    for i in range(10, 0, -1):
        p = chain.step(model, x, i, variance=chosen)  # type: ignore[arg-type]
        z = noise(x, float(chain.times[i]), float(chain.times[i - 1]))
        x = p.mean if i == 1 and variance != "moments" else p.sample(z)
        torch.testing.assert_close(x, path[11 - i], rtol=1e-9, atol=1e-9)


def test_the_variances_are_the_published_ones() -> None:
    chain, x = Chain(DDPM), draw(3, 2)
    abar = torch.cumprod(1 - BETAS, 0)
    for i in (2, 20, 40):
        small = float(BETAS[i - 1] * (1 - abar[i - 2]) / (1 - abar[i - 1]))
        large = float(BETAS[i - 1])
        assert float(chain.variance(i, None, "small")) == pytest.approx(small, rel=1e-12)
        assert float(chain.variance(i, None, "large")) == pytest.approx(large, rel=1e-12)
        # Between them in the logarithm: half way is the geometric mean, not the arithmetic one.
        for f, v in ((-1.0, small), (0.0, math.sqrt(small * large)), (1.0, large)):
            found = chain.variance(i, None, "learned", torch.full_like(x, f))
            torch.testing.assert_close(found, torch.full_like(x, v), rtol=1e-12, atol=0)
    # To node 0 the posterior is a point; its logarithm is clipped and not NaN.
    second = float(BETAS[1] * BETAS[0] / (1 - abar[1]))
    assert float(chain.variance(1, 0, "small")) == pytest.approx(second, rel=1e-12)
    assert float(chain.variance(1, 0, "large")) == pytest.approx(float(BETAS[0]), rel=1e-12)
    assert bool(torch.isfinite(chain.variance(1, 0, "learned", x).log()).all())
    assert float(Chain(VP(), [1.0]).variance(1, 0, "small")) > 0.99


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), RectifiedFlow()])
@pytest.mark.parametrize("law", [gaussian, correlated])
def test_the_right_variance_makes_the_exact_reversal_of_gaussian_data(sde, law) -> None:
    """p(x_s | x_t) by conditioning the joint law of (x_s, x_t), with full matrices."""
    score = law(sde)
    moments, chain = score.facts.moments, chain_of(sde, 7)
    n = score.mean.numel()
    u = moments.basis if moments.basis is not None else torch.eye(n, dtype=F64)
    c = u @ torch.diag(score.variance) @ u.T
    x = draw(1, n)
    for t, s in ((7, 6), (4, 1), (1, 0)):
        (at, st), (a_s, ss) = ((chain.nodes.alpha[i], chain.nodes.sigma[i]) for i in (t, s))
        one = torch.eye(n, dtype=F64)
        v_s, v_t = a_s**2 * c + ss**2 * one, at**2 * c + st**2 * one
        cross = at / a_s * v_s
        gain = cross @ torch.linalg.inv(v_t)
        mean = a_s * score.mean + (x - at * score.mean) @ gain.T
        p = chain.step(score, x, t, s, variance=moments)
        torch.testing.assert_close(p.mean, mean, rtol=1e-8, atol=1e-8)
        v = v_s - gain @ cross.T
        torch.testing.assert_close(covariance(p), v, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(p.std[0].square(), v.diagonal(), rtol=1e-7, atol=1e-9)
        y = draw(4, n, seed=2)
        truth = torch.distributions.MultivariateNormal(mean[0], (v + v.T) / 2).log_prob(y)
        torch.testing.assert_close(p.log_density(y), truth, rtol=1e-6, atol=1e-6)


# ---- the best variance, from data ----


def exact_error(law, t: float) -> float:
    """E Var[x_0 | x_t] of a mixture on the line: E x_0^2 - E D^2, by quadrature."""
    x = torch.linspace(-9, 9, 20001, dtype=F64).unsqueeze(1)
    p = law.log_prob(x, t).exp()
    square = float(law.log_weights.exp() @ (law.means[:, 0] ** 2 + law.variance[:, 0]))
    return square - float(torch.trapezoid(p * law.denoise(x, t)[:, 0] ** 2, x[:, 0]))


def test_the_estimated_variance_is_the_best_one() -> None:
    sde = VP()
    law, chain = line(sde), Chain(sde, grids.information(sde, 8, reference=0.5)[:-1])
    data = law.sample(60_000, torch.Generator().manual_seed(0))
    errors = chain.errors(law, data, seed=1)
    exact = torch.tensor([exact_error(law, float(t)) for t in chain.times[1:]])
    for i in range(1, 9):
        found = chain.variance(i, i - 1, errors)
        wanted = chain.variance(i, i - 1, exact)
        assert float(found / wanted) == pytest.approx(1, abs=0.02)
    # It is what k* = 1 + (1 / w_s - 1 / w_t) tr Cov / n says, and the least of the bound.
    snr = chain.nodes.log_snr.exp()
    for i in range(2, 9):
        ratio = (
            chain.variance(i, None, exact) / chain.posterior(data[:1], i, data=data[:1]).variance
        )
        assert float(ratio) == pytest.approx(
            1 + float((snr[i - 1] - snr[i]) * exact[i - 1]), rel=1e-9
        )
    best = chain.expected(exact, exact).sum()
    for factor in (0.9, 1.1):
        assert chain.expected(exact, factor * exact).sum() > best


# ---- the limit ----


def test_the_law_of_the_sampler_tends_to_the_reversals() -> None:
    """On Gaussian data the chain is affine in its normals: unit impulses give its variance."""
    sde, v = VP(), 0.25
    law, away = Gaussian(sde, torch.zeros(1, dtype=F64), math.sqrt(v)), []
    end = grids.default_end(sde)
    truth = v * float(sde.alpha(end)) ** 2 + float(sde.sigma(end)) ** 2
    for steps in (50, 100, 200, 400):
        grid = grids.log_snr(sde, steps)
        rows = torch.zeros(steps + 1, 1, dtype=F64)
        rows[-1] = 1.0
        out = solve(sde.reverse(law), rows, grid, ddpm(), Impulses())
        start = v * float(sde.alpha(1.0)) ** 2 + float(sde.sigma(1.0)) ** 2
        away.append(float(out[:-1].square().sum() + start * out[-1] ** 2) - truth)
    rates = [math.log2(a / b) for a, b in pairwise(away)]
    assert rates == pytest.approx([1, 1, 1], abs=0.12)


def test_ddim_leads_forward_and_back_at_first_order() -> None:
    sde = VP()
    law, x, away = mixture(sde), None, []
    x = law.sample(40, torch.Generator().manual_seed(1))
    for steps in (100, 200, 400):
        chain = Chain(sde, grids.log_snr(sde, steps))
        z = chain.encode(law, x)
        away.append(float((chain.decode(law, z) - x).square().mean().sqrt()))
    assert away[-1] < 0.05
    rates = [math.log2(a / b) for a, b in pairwise(away)]
    assert rates == pytest.approx([1, 1], abs=0.25)
    one = Chain(sde, [1.0])
    torch.testing.assert_close(one.encode(law, x), float(sde.alpha(1.0)) * x)


def test_ddim_is_the_published_step_both_ways() -> None:
    chain, law, x = Chain(DDPM), mixture(DDPM), draw(5, 2)
    alpha, sigma = chain.nodes.alpha, chain.nodes.sigma

    def move(x: Tensor, i: int, j: int) -> Tensor:
        eps = -sigma[i] * law(x, chain.times[i])
        return alpha[j] * (x - sigma[i] * eps) / alpha[i] + sigma[j] * eps

    y = alpha[1] * x
    for i in range(1, 40):
        y = move(y, i, i + 1)
    torch.testing.assert_close(chain.encode(law, x), y, rtol=1e-9, atol=1e-9)
    for i in range(40, 0, -1):
        y = move(y, i, i - 1)
    z = chain.encode(law, x)
    torch.testing.assert_close(chain.decode(law, z), y, rtol=1e-8, atol=1e-8)


# ---- information ----


def test_information_is_half_the_log_determinant() -> None:
    a = draw(4, 4)
    c = a @ a.T / 4
    moments = Moments.of(c)
    w = torch.tensor([0.01, 1.0, 30.0], dtype=F64)
    for i in range(3):
        whole = 0.5 * torch.logdet(torch.eye(4, dtype=F64) + c / w[i]) / 4
        assert float(moments.information(w)[i]) == pytest.approx(float(whole), rel=1e-12)
    few = Moments(torch.tensor([0.2, 1.5, 0.9], dtype=F64), None, torch.linalg.qr(a[:, :2]).Q)
    q = few.basis
    assert q is not None
    dense = 0.2 * torch.eye(4, dtype=F64) + q @ torch.diag(few.values[1:] - 0.2) @ q.T
    whole = 0.5 * torch.logdet(torch.eye(4, dtype=F64) + dense) / 4
    assert float(few.information(w[1])) == pytest.approx(float(whole), rel=1e-12)
    assert float(few.shares.sum()) == pytest.approx(1)
    assert float(isotropic(0.3).information(w[1])) == pytest.approx(0.5 * math.log(1.3))


@pytest.mark.parametrize("sde", [VP(), VE(), EDM(), OrnsteinUhlenbeck(), CriticallyDamped()])
@pytest.mark.parametrize("reference", [0.25, Moments(torch.tensor([0.01, 4.0, 0.3]).double())])
def test_the_information_grid_is_even_in_information(sde, reference) -> None:
    known = isotropic(reference) if isinstance(reference, float) else reference
    grid = grids.information(sde, 9, reference=reference, to_zero=True)
    assert len(grid) == 10
    assert float(grid[0]) == grids.default_start(sde)
    assert float(grid[-1]) == 0
    gained = known.information(torch.exp(-sde.log_snr(grid[:-1]))).diff().numpy()
    np.testing.assert_allclose(gained, gained.mean(), rtol=1e-6)


# ---- what cannot work ----


def test_what_cannot_work_says_so() -> None:
    chain, law, x = Chain(DDPM), mixture(DDPM), draw(3, 2)
    with pytest.raises(TypeError, match="only a Tabulated clock has nodes of its own"):
        Chain(VP())
    with pytest.raises(TypeError, match="sde must be a LinearSDE"):
        Chain(CriticallyDamped(), [0.5, 1.0])  # type: ignore[arg-type]
    for times in ([0.5, 0.2, 0.7], [0.5, 2.0], [-0.1, 0.5], [0.0], []):
        with pytest.raises(ValueError, match="times must rise or fall strictly"):
            Chain(VP(), times)
    with pytest.raises(ValueError, match="nodes must be 0 <= s < t <= 40"):
        chain.forward(x, 41)
    with pytest.raises(ValueError, match="nodes must be 0 <= s < t"):
        chain.posterior(x, 3, 3, data=x)
    with pytest.raises(TypeError, match="numbered by integers"):
        chain.step(law, x, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="told by one of data, noise and score"):
        chain.posterior(x, 3)
    with pytest.raises(ValueError, match="told by one of data, noise and score"):
        chain.posterior(x, 3, data=x, noise=x)
    with pytest.raises(ValueError, match="needs a network with a head"):
        chain.step(law, x, 3, variance="learned")
    with pytest.raises(ValueError, match="variance must be one of"):
        chain.step(law, x, 3, variance="tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"errors must be \(40,\)"):
        chain.step(law, x, 3, variance=torch.ones(3))
    for errors in (-torch.ones(40), torch.full((40,), torch.nan)):
        with pytest.raises(ValueError, match="errors must be finite and >= 0"):
            chain.step(law, x, 3, variance=errors)
        with pytest.raises(ValueError, match="errors must be finite and >= 0"):
            chain.expected(errors, "small")
    with pytest.raises(ValueError, match="other directions"):
        chain.expected(isotropic(1.0), Moments(torch.ones(2).double()))


@pytest.mark.parametrize("verb", ["step", "sample", "encode", "decode", "errors"])
def test_a_chain_serves_scores_and_data_of_its_process_alone(verb: str) -> None:
    chain, x = Chain(DDPM), draw(3, 2)

    def call(model: Score, x: Tensor) -> object:
        if verb == "sample":
            return chain.sample(model, 2, seed=0)
        return getattr(chain, verb)(model, x, *[3] * (verb == "step"))

    call(mixture(DDPM), x)
    for other in (mixture(VE()), Score()):
        with pytest.raises(ValueError, match=r"the chain is of .{1,70}, the score of "):
            call(other, x)
    if verb in ("step", "sample"):
        return
    for bad, error, message in (
        (x.long(), TypeError, "floating point"),
        (x * torch.nan, ValueError, "NaN"),
        (draw(3, 4), ValueError, r"shape \(B, 2\)"),
    ):
        with pytest.raises(error, match=message):
            call(mixture(DDPM), bad)


def test_a_head_is_saved_with_its_network(tmp_path) -> None:
    from sde_gen.networks import MLP, UNet

    for net in (MLP((3,), 8, 1, head=True), UNet((2, 4, 4), 8, (1,), 0, head=True)):
        model = ScoreNetwork(net, VP(), "noise")
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
        x = draw(2, *net.shape, dtype=torch.float32)
        e = model.evaluate(x, torch.tensor(0.5))
        assert e.head is not None
        assert e.head.shape == x.shape
        folder = tmp_path / type(net).__name__
        save(model, folder)
        again = load(folder).evaluate(x, torch.tensor(0.5))
        assert torch.equal(again.head, e.head)
        assert torch.equal(model(x, torch.tensor(0.5)), e.score)
    with pytest.raises(ValueError, match="a head goes with a state"):
        MLP((3,), outputs=2, head=True)
