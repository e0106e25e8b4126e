"""Latent models against linear-Gaussian ones, of which everything is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import gaussians, inverse, latent, likelihood
from sde_gen.guidance import Tempered
from sde_gen.latent import Joint, LatentModel, Through
from sde_gen.networks import MLP, Autoencoder, Pair

R = 0.3
"""The deviation of the noise in x = W z + R e."""


class Linear(nn.Module):
    """Probabilistic PCA with its exact posterior, W^T W diagonal; z in units of ``scale``."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        q = torch.linalg.qr(torch.randn(5, 2, generator=g).double()).Q
        self.w, self.scale = q * torch.tensor([2.0, 0.7]).double(), scale
        m = torch.linalg.inv(self.w.T @ self.w + R**2 * torch.eye(2).double())
        self.gain, self.std = self.w @ m, R * m.diagonal().sqrt()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.scale * (x @ self.gain.to(x))
        return c, self.scale * self.std.to(x).expand_as(c)

    def decode(self, z: Tensor) -> Tensor:
        return z / self.scale @ self.w.to(z).T


def pca(std: float | None = None, scale: float = 1.0) -> Pair:
    pair = Pair(Linear(scale), shape=(5,), latent=(2,), std=std).double()
    with torch.no_grad():
        pair.log_std.fill_(math.log(R))
    return pair.requires_grad_(False)


def law() -> torch.distributions.MultivariateNormal:
    w = Linear().w
    cov = w @ w.T + R**2 * torch.eye(5).double()
    return torch.distributions.MultivariateNormal(torch.zeros(5).double(), cov)


def data(n: int, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return law().sample((n,))


def normal(std: float = 1.0, units: Any = None) -> sg.Gaussian:
    score = sg.Gaussian(sg.VP(), torch.zeros(2).double(), std)
    known = score.facts
    facts = sg.Facts(known.shape, known.std, known.moments, units)
    return score if units is None else score.with_facts(facts)


def fitted(pair: Pair, seed: int = 0) -> LatentModel:
    """A model with a network that says nothing, but whose latents are normalised."""
    torch.manual_seed(seed)
    net = MLP(pair.latent, 16, 1)
    with torch.no_grad():
        net.output.weight.normal_(0, 0.1)
    return LatentModel.of(pair, net, sg.VP(), data(500).to(next(pair.parameters())))


def test_rate_and_distortion_of_probabilistic_pca_are_its_log_density() -> None:
    # Of the exact posterior every draw of z says log p(x), whatever z is.
    x = data(8)
    model = LatentModel(pca(), normal())
    found = latent.log_prob(model, x, draws=2)
    assert float((found.value - law().log_prob(x)).abs().max()) < 1e-10
    assert float(found.standard_error.max()) < 1e-10
    # In other units of the latents, with the normaliser inside, the same.
    units = sg.facts.Units(torch.zeros(2), torch.tensor([7.0, 7.0]))
    scaled = LatentModel(pca(scale=7.0), normal(units=units))
    again = latent.log_prob(scaled, x)
    assert float((again.value - law().log_prob(x)).abs().max()) < 1e-10


@pytest.mark.parametrize("std", [None, 0.2])
def test_the_rate_is_the_divergence_from_the_prior(std: float | None) -> None:
    # Latents normalised unevenly, so that the noise is w_0 in one channel and more in the other.
    units = sg.facts.Units(torch.zeros(2), torch.tensor([1.0, 0.5]))
    score = normal(units=units)
    model = LatentModel(pca(std), score)
    x = data(3)
    each = latent.bound(model, x.repeat(1000, 1), draws=1)
    found = each.map(lambda e: likelihood.Estimate.of(e.value.reshape(1000, 3)))
    c, s = pca(std).posterior(x)
    scale = units.scale
    # p(z) at the end of the process: the law of zeta and the noise that belongs to the process.
    var = (1 + model.level) * scale**2
    wanted = gaussians.kl(c, s**2, torch.zeros_like(c), var.expand_as(c))
    off = (found.rate.value - wanted) / found.rate.standard_error
    assert float(off.abs().max()) < 4.5
    # One draw has a relative deviation of order one, sqrt(2 / n) for n = 2; of 1000 a 32nd of it.
    assert float((found.rate.standard_error / wanted).max()) < 0.05
    # The distortion of a linear decoder in closed form.
    w = Linear().w
    spread = (s**2 * (w**2).sum(0)).sum(1)
    misfit = (x - c @ w.T).square().sum(1) + spread
    wanted = 0.5 * misfit / R**2 + 5 * math.log(R) + 2.5 * math.log(2 * math.pi)
    off = (found.distortion.value - wanted) / found.distortion.standard_error
    assert float(off.abs().max()) < 4.5
    torch.testing.assert_close(found.total.value, found.rate.value + found.distortion.value)


def test_the_rate_is_spread_evenly_over_the_noise_levels() -> None:
    # Normalised Gaussian latents: one draw has a relative deviation of order one, sqrt(2 / n).
    wide = Pair(nn.Identity(), nn.Identity(), (200,), (200,), std=0.1)
    model = LatentModel(wide, sg.Gaussian(sg.VP(), torch.zeros(200), 1.0))
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    rate = latent.bound(model, x, draws=2).rate.value
    # Of two draws sqrt(1 / n), which 50 rows tell to a tenth: four of these tenths.
    assert float(rate.std() / rate.mean()) < math.sqrt(1 / 200) * (1 + 4 / math.sqrt(2 * 49))


def test_more_noise_on_the_latent_costs_less_and_tells_less() -> None:
    x = data(200)
    costs = []
    for std in (0.03, 0.1, 0.3, 1.0):
        model = LatentModel(pca(std), normal())
        costs.append(latent.bound(model, x, draws=16).mean())
    rates = [float(cost.rate) for cost in costs]
    distortions = [float(cost.distortion) for cost in costs]
    assert rates == sorted(rates, reverse=True)
    assert distortions == sorted(distortions)
    # And none of them is below the entropy.
    assert min(float(c.total) for c in costs) > float(-law().log_prob(x).mean())


def test_latents_ten_times_as_large_change_no_sample() -> None:
    # In float64, which leaves rounding alone; the normalisers differ by the factor.
    one, ten = fitted(pca()), fitted(pca(scale=10.0))
    assert one.normaliser is not None
    assert ten.normaliser is not None
    torch.testing.assert_close(10 * one.normaliser.scale, ten.normaliser.scale)
    a, b = (sg.sample(m, 50, seed=3, dtype=torch.float64) for m in (one, ten))
    assert float((a - b).abs().max()) < 1e-12 * float(a.abs().max())
    x = data(5)
    torch.testing.assert_close(one.clean(x, sg.Streams(0)), ten.clean(x, sg.Streams(0)))
    torch.testing.assert_close(10 * one.codes(x), ten.codes(x))
    a, b = (latent.bound(m, x).rate.value for m in (one, ten))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_samples_are_of_the_decoded_law() -> None:
    model = LatentModel(pca(), normal())
    x = sg.sample(model, 20_000, seed=0, dtype=torch.float64)
    w = Linear().w
    cov = w @ w.T
    error = ((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / len(x)).sqrt()
    assert float(((x.T @ x / len(x) - cov) / error).abs().max()) < 4.5
    start = torch.ones(4, 2).double()  # normalised latents: what is noised has no picture
    shown = sg.sample(model, 4, start=start, steps=5, trajectory=True, dtype=torch.float64)
    assert shown.shape == (6, 4, 5)


def test_verbs_speak_of_data() -> None:
    model = LatentModel(pca(), normal())
    x = data(3)
    z = likelihood.encode(model, x)
    assert z.shape == (3, 2)
    known = pca()
    torch.testing.assert_close(
        likelihood.decode(model, z), known.decode(known.encode(x)), atol=1e-6, rtol=0
    )
    path = likelihood.interpolate(model, x, x.flip(0), [0.0, 0.5, 1.0], steps=20)
    assert path.shape == (3, 3, 5)
    assert likelihood.redraw(model, x, 0.5, steps=5).shape == (3, 5)
    assert model.shape == (5,)
    assert model.inside == (2,)
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        likelihood.decode(model, x)


def test_densities_have_no_change_of_variables() -> None:
    model, x = LatentModel(pca(), normal()), data(2)
    with pytest.raises(TypeError, match=r"latent\.log_prob"):
        sg.log_prob(model, x)
    with pytest.raises(TypeError, match=r"latent\.bound"):
        sg.bound(model, x, sg.Chain(sg.VP(), sg.grids.information(sg.VP(), 5)))
    units: Any = model.facts.units
    with pytest.raises(TypeError, match="no shift and scale"):
        _ = units.scale


# ---- inverse problems and guidance ----


def observed() -> tuple[LatentModel, inverse.Observation, inverse.Observation]:
    """What is seen of x, and the same of z: A x = A W z."""
    a = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, -1.0]]).double()
    y = torch.tensor([0.4, -1.1]).double()
    seen = inverse.Observation(inverse.Matrix(a), y, 0.3)
    inner = inverse.Observation(inverse.Matrix(a @ Linear().w), y, 0.3)
    return LatentModel(pca(), normal()), seen, inner


def test_a_posterior_through_the_decoder_is_that_of_the_latent() -> None:
    model, seen, inner = observed()
    z = torch.randn(7, 2).double()
    outside, inside = inverse.Posterior(model, seen), inverse.Posterior(model.score, inner)
    torch.testing.assert_close(outside(z, 0.3), inside(z, 0.3), rtol=1e-9, atol=1e-9)
    exact = inverse.exact_posterior(model.score, inner)
    torch.testing.assert_close(outside(z, 0.3), exact(z, 0.3), rtol=1e-7, atol=1e-7)
    x = sg.sample(outside, 20, seed=0, dtype=torch.float64)
    decoded = model.autoencoder.decode(sg.sample(inside, 20, seed=0, dtype=torch.float64))
    torch.testing.assert_close(x, decoded, rtol=1e-6, atol=1e-6)


def test_particles_through_the_decoder() -> None:
    model, seen, inner = observed()
    cloud = inverse.particles(model, seen, count=300, steps=20, seed=0)
    inside = inverse.particles(model.score, inner, count=300, steps=20, seed=0)
    assert cloud.x.shape == (300, 5)
    torch.testing.assert_close(cloud.log_evidence, inside.log_evidence, rtol=1e-4, atol=1e-4)

    def misfit(x: Tensor) -> Tensor:
        return -0.5 * ((x[:, 0] - 0.4) / 0.3) ** 2

    assert inverse.steer(model, misfit, count=50, steps=10, seed=0).x.shape == (50, 5)


def test_guidance_through_the_decoder_is_dps_of_its_likelihood() -> None:
    model, seen, inner = observed()

    def log_f(x: Tensor) -> Tensor:
        return -0.5 * seen.whiten(seen.y - seen.operator(x)).square().sum(1)

    z = torch.randn(4, 2).double()
    guided = Through(model, log_f, weight=0.7)
    term = inverse.Posterior(model.score, inner, inverse.Point())(z, 0.4) - model.score(z, 0.4)
    torch.testing.assert_close(guided(z, 0.4), model.score(z, 0.4) + 0.7 * term)
    assert sg.sample(guided, 3, steps=5, seed=0).shape == (3, 5)
    assert guided.rows(slice(2)).prior.shape == (5,)
    with pytest.raises(ValueError, match="log_f must return"):
        Through(model, lambda x: x)(z, 0.4)


def test_guidance_through_the_decoder_starts_where_alpha_is_0() -> None:
    """Of z ~ N(0, C) and log f = a z it is exact at every t: what is drawn is N(C a, C)."""
    c, n, a = torch.tensor([4.0, 0.25]).double(), 4000, torch.tensor([0.5, 2.0]).double()
    pair = Pair(lambda x: x, lambda z: z, (2,), (2,), std=0.01).double()
    law = sg.Gaussian(sg.RectifiedFlow(), torch.zeros(2).double(), c.sqrt())
    guided = Through(LatentModel(pair, law), lambda x: x @ a)
    z = torch.randn(3, 2).double()
    at, near = (guided.evaluate(z, t).denoised for t in (1.0, 1 - 1e-4))
    torch.testing.assert_close(at, (c * a).expand(3, 2))
    torch.testing.assert_close(near, at, rtol=3e-3, atol=3e-3)
    x = sg.sample(guided, n, 30, seed=0, eta=1, dtype=torch.float64)
    error = (c / n).sqrt()
    assert bool(((x.mean(0) - c * a).abs() < 4 * error + 0.01).all())
    assert bool((x.var(0) / c - 1).abs().max() < 4 * math.sqrt(2 / n) + 0.02)


def test_guidance_in_the_latent_is_a_sum_of_scores() -> None:
    model = LatentModel(pca(), normal())
    other = sg.Gaussian(sg.VP(), torch.ones(2).double(), 0.5)
    guided = model.over(model.score + 0.5 * other)
    z = torch.randn(3, 2).double()
    torch.testing.assert_close(guided(z, 0.2), normal()(z, 0.2) + 0.5 * other(z, 0.2))
    assert sg.sample(guided, 3, steps=5, seed=0).shape == (3, 5)


def doubled() -> LatentModel:
    """x = (z, z) for z ~ N(1, 1)."""
    pair = Pair(lambda x: (x[:, :1], torch.full_like(x[:, :1], 0.01)), lambda z: z.repeat(1, 2),
                (2,), (1,)).double()  # fmt: skip
    return LatentModel(pair, sg.Gaussian(sg.VP(), torch.ones(1).double(), 1.0))


@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_a_power_in_the_latent_is_that_of_the_latent(eta: float) -> None:
    model = doubled()
    cold = Tempered(model.score, 4.0)
    x = sg.sample(model.over(cold), 5, 20, seed=0, eta=eta, dtype=torch.float64)
    z = sg.sample(cold, 5, 20, seed=0, eta=eta, dtype=torch.float64)
    torch.testing.assert_close(x, z.repeat(1, 2))
    assert Through(model.over(cold), lambda x: x.sum(1)).at_eta(eta).prior.score.eta == eta  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="eta must be positive"):
        sg.sample(model.over(cold), 5, eta=0.0)


def test_a_product_in_the_latent_is_corrected_as_one() -> None:
    model, other = doubled(), sg.Gaussian(sg.VP(), torch.zeros(1).double(), 0.5)
    meant = model.score + other
    found = inverse.corrected(model.over(meant), 100, 20, seed=0, dtype=torch.float64)
    inside = inverse.corrected(meant, 100, 20, seed=0, dtype=torch.float64)
    torch.testing.assert_close(found.log_weights, inside.log_weights)
    torch.testing.assert_close(found.x, inside.x.repeat(1, 2))


# ---- learned ----


def test_a_channel_that_says_nothing_is_normalised_as_it_is_drawn() -> None:
    """Its mean hardly varies and its deviation is 1, as the rate asks for."""
    quiet = Pair(lambda x: (x * torch.tensor([1.0, 1e-3]), torch.tensor([0.1, 1.0]).expand_as(x)),
                 lambda z: z, (2,), (2,))  # fmt: skip
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    model = LatentModel.of(quiet, MLP((2,), 8, 1), sg.VP(), x)
    assert model.normaliser is not None
    wanted = torch.tensor([math.sqrt(1.01), 1.0]).double()
    torch.testing.assert_close(model.normaliser.scale, wanted, rtol=0.05, atol=0)
    torch.testing.assert_close(model.clean(x).std(0), torch.ones(2), rtol=0.05, atol=0)


def test_data_of_another_precision_than_the_weights() -> None:
    x = data(6)
    for pair in (
        Pair(nn.Linear(5, 2), nn.Linear(2, 5), (5,), (2,), std=0.1),
        Autoencoder((5,), (2,), 8),
    ):
        model = LatentModel.of(pair, MLP((2,), 8, 1), sg.VP(), x)
        a, b = (latent.bound(model, v).total.value for v in (x, x.float()))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        double = LatentModel(pair.double(), model.score)
        torch.testing.assert_close(
            latent.bound(double, x.float()).total.value, a, rtol=1e-3, atol=1e-3
        )
        assert sg.sample(double, 2, 3, seed=0).dtype == torch.float32


def labelled() -> tuple[LatentModel, Tensor, Tensor]:
    x = data(200).float()
    pair = pca(std=0.05).float()
    model = LatentModel.of(pair, MLP((2,), 16, 1, classes=2), sg.VP(), x)
    return model, x, (x[:, 0] > 0).long()


def test_a_conditional_model() -> None:
    model, x, y = labelled()
    found = latent.bound(model.given(y=y[:4]), x[:4], seed=3)
    rows = latent.bound(model.given(y=y[2:4]), x[2:4], seed=3, first=2)
    torch.testing.assert_close(found.rate.value[2:], rows.rate.value, rtol=1e-5, atol=1e-5)
    guided = sg.ClassifierFree(model, 1.0, y=y[:4])
    assert guided.end == model.end is not None
    assert sg.sample(guided, 4, steps=5, seed=0).shape == (4, 5)
    with pytest.raises(ValueError, match="4 samples"):
        latent.bound(model.given(y=y[:4]), x[:3])


def test_the_encoder_learns_nothing_from_score_matching() -> None:
    model, x, y = labelled()
    model.autoencoder.requires_grad_(True)
    before = {k: v.clone() for k, v in model.autoencoder.state_dict().items()}
    inside = {k: v.clone() for k, v in model.score.state_dict().items()}
    recipe = sg.Recipe(steps=5, batch=16, holdout=0)
    found = sg.train(model, x, y, recipe=recipe, device="cpu")
    assert isinstance(found, LatentModel)
    for name, v in found.autoencoder.state_dict().items():
        assert torch.equal(v, before[name])
    assert any(not torch.equal(v, inside[k]) for k, v in model.score.state_dict().items())


def test_two_stages_are_one_run() -> None:
    # Training on codes is training on data; what is drawn in a code is drawn by its number.
    model, x, y = labelled()
    with torch.no_grad():
        model.score.net.output.weight.normal_(0, 0.1)  # type: ignore[attr-defined]
    noise = sg.Streams(5)
    loss = sg.training.Denoising()
    direct = loss(model, x[:8], y[:8], noise)
    coded = loss(model.score, model.codes(x[:8], seed=5), y[:8], noise)
    torch.testing.assert_close(direct, coded, rtol=1e-4, atol=1e-5)


def test_joint_training_comes_to_the_entropy() -> None:
    # Everything is learned from nothing: a linear pair, and a network for a Gaussian prior.
    x = data(2000).float()
    torch.manual_seed(0)
    net = Autoencoder((5,), (2,), 32, std=0.1)
    model = LatentModel(net, sg.ScoreNetwork(MLP((2,), 32, 1), sg.VP()))
    recipe = sg.Recipe(steps=300, batch=64, lr=1e-2, holdout=0)
    found = sg.train(model, x, recipe=recipe, objective=Joint(), device="cpu")
    cost = latent.bound(found, x[:500], draws=8).mean()
    gap = float(cost.total) + float(law().log_prob(x[:500].double()).mean())
    assert -0.1 < gap < 0.6
    plain = 5 * 0.5 * math.log(2 * math.pi * math.e * float(x.var()))
    assert float(cost.total) < plain - 1


def test_saved_loaded_resumed(tmp_path: Path) -> None:
    x = data(100).float()
    net = Autoencoder((5,), (2,), 8, std=0.1)
    model = LatentModel.of(net, MLP((2,), 8, 1), sg.EDM(), x)
    recipe = sg.Recipe(steps=4, batch=16, holdout=0)
    kept = sg.train(model, x, recipe=recipe, objective=Joint(), folder=tmp_path, device="cpu")
    back = sg.load(tmp_path)
    assert isinstance(back, LatentModel)
    a, b = (sg.sample(m, 3, steps=4, seed=0) for m in (kept, back))
    assert torch.equal(a, b)
    assert back.end == kept.end
    assert back.facts.units is not None
    assert not back.facts.units.affine
    sg.save(back, tmp_path / "again")
    assert sg.load(tmp_path / "again", kind=LatentModel).sde == sg.EDM()


def test_levels_are_data(tmp_path: Path) -> None:
    k = torch.randint(0, 17, (32, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    net = Autoencoder((1, 8, 8), (2, 4, 4), 8, std=0.1, levels=17, components=2)
    model = LatentModel.of(net, MLP((2, 4, 4), 8, 1), sg.VP(), sg.levels.centre(k, 17))
    a = latent.bound(model, k[:3]).bits_per_dim
    b = latent.bound(model, sg.levels.centre(k[:3], 17)).bits_per_dim
    assert torch.equal(a.total.value, b.total.value)
    assert model.facts.levels == 17
    recipe = sg.Recipe(steps=2, batch=8, holdout=0)
    sg.train(model, k, recipe=recipe, objective=Joint(), device="cpu")


@pytest.mark.parametrize(
    ("build", "error", "told"),
    [
        (lambda: LatentModel(nn.Identity(), normal()), TypeError, "Autoencoder or a Pair"),  # type: ignore[arg-type]
        (lambda: LatentModel(pca(), nn.Identity()), TypeError, "Score of latents"),  # type: ignore[arg-type]
        (
            lambda: LatentModel(pca(), sg.Gaussian(sg.VP(), torch.zeros(3), 1.0)),
            ValueError,
            "latents are",
        ),
        (lambda: LatentModel(pca(1e9), normal()).end, ValueError, "more than the process"),
        (lambda: latent.bound(normal(), data(2)), TypeError, "LatentModel"),  # type: ignore[arg-type]
        (
            lambda: latent.bound(LatentModel(pca(), normal()), data(2)[:, :3]),
            ValueError,
            r"\(B, 5\)",
        ),
        (lambda: latent.bound(LatentModel(pca(), normal()), data(2) / 0), ValueError, "infinite"),
        (lambda: latent.bound(LatentModel(pca(), normal()), data(2)[:0]), ValueError, "empty"),
        (lambda: LatentModel(pca(), normal()).codes(data(2)[:0]), ValueError, "empty"),
        (lambda: Joint()(normal(), data(2), None, sg.Streams(0)), TypeError, "LatentModel"),
    ],
)
def test_what_does_not_fit_is_named(build: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        build()
