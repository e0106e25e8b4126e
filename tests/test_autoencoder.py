"""Autoencoders: likelihoods that are ones, costs in closed form, pairs from elsewhere."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import gaussians
from sde_gen.latent import Elbo
from sde_gen.networks import Autoencoder, Codec, Pair
from sde_gen.training import load, save


def shaken(net: Codec) -> Codec:
    """With weights that are nowhere zero."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
    return net.double().requires_grad_(False)


CASES: list[dict[str, Any]] = [
    {"shape": (5,), "latent": (2,)},
    {"shape": (5,), "latent": (2,), "std": 0.1, "levels": 8},
    {"shape": (2, 9), "latent": (3, 5), "components": 2, "levels": 4},
    {"shape": (1, 9, 6), "latent": (4,), "levels": 5, "components": 3},
    {"shape": (2, 9, 6), "latent": (4, 3, 2), "std": 0.1, "components": 2},
    {"shape": (2, 8, 12), "latent": (3, 2, 3), "components": 2, "patch": 4},
    {"shape": (1, 20, 12), "latent": (4,), "levels": 5, "components": 3, "patch": 2},
    {"shape": (3, 9), "latent": (2, 3), "patch": 3},
]


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_rows(case: dict[str, Any]) -> None:
    net = shaken(Autoencoder(width=8, **case))
    x = torch.rand(4, *net.shape).double() * 1.8 - 0.9
    c, s = net.posterior(x)
    assert c.shape == s.shape == (4, *net.latent)
    assert bool((s > 0).all())
    assert net.decode(c).shape == x.shape
    cost = net.cost(x, sg.Streams(3))
    alone = net.cost(x[2:3], sg.Streams(3, 2))
    torch.testing.assert_close(cost.total[2:3], alone.total)
    wanted = gaussians.kl(c, s**2, torch.zeros_like(c), torch.ones_like(c))
    torch.testing.assert_close(cost.rate, wanted)
    n = math.prod(net.shape) * math.log(2)
    torch.testing.assert_close(cost.bits_per_dim.total, cost.total / n)


@pytest.mark.parametrize("components", [None, 1, 3])
def test_probabilities_of_the_levels_sum_to_one(components: int | None) -> None:
    net = shaken(Autoencoder((1,), (2,), 8, levels=256, components=components))
    k, z = torch.arange(256)[:, None], 3 * torch.randn(1, 2).double()
    logs = net.log_likelihood(k, z.expand(256, 2))
    assert abs(float(logs.exp().sum()) - 1) < 1e-12
    # Floats at the centres of their cells are these levels, and the mean is that of the law
    # that is cut off at the ends of the range: within half a cell.
    same = net.log_likelihood(sg.levels.centre(k, 256).double(), z.expand(256, 2))
    torch.testing.assert_close(same, logs)
    mean = (logs.exp() * sg.levels.centre(k, 256)[:, 0]).sum()
    assert abs(float(net.decode(z)) - float(mean)) < 1.01 / 256


def test_a_density_integrates_to_one() -> None:
    net = shaken(Autoencoder((1,), (2,), 8, components=3))
    x = torch.linspace(-30, 30, 200_001).double()[:, None]
    z = torch.randn(1, 2).double()
    density = net.log_likelihood(x, z.expand(len(x), 2)).exp()
    assert abs(float(torch.trapezoid(density, x[:, 0])) - 1) < 1e-6
    mean = float(torch.trapezoid(density * x[:, 0], x[:, 0]))
    assert abs(mean - float(net.decode(z))) < 1e-5


def test_a_patch_is_a_place() -> None:
    net = shaken(Autoencoder((2, 8, 4), (3, 4, 2), 8, patch=2))
    x, first, last = torch.randn(3, 2, 8, 4).double(), net.encoder[0], net.decoder[-1]
    parts = torch.nn.functional.unfold(x, 2, stride=2)
    wanted = torch.einsum("oi,bip->bop", first.weight.flatten(1), parts)
    wanted = wanted.unflatten(2, (4, 2)) + first.bias[:, None, None]
    torch.testing.assert_close(first(x), wanted)
    h = torch.zeros(1, 8, 4, 2).double()
    h[0, 5, 3, 1] = 1
    felt = (last(h) - last(0 * h))[0, 0]
    assert bool((felt[6:8, 2:4] != 0).all())
    felt[6:8, 2:4] = 0
    assert not bool(felt.any())


def test_clipped_mean_is_that_of_a_clipped_sample() -> None:
    mean, std = torch.tensor([-1.4, -0.2, 0.9]).double(), torch.tensor([0.5, 2.0, 0.3]).double()
    p = (torch.arange(200_000).double() + 0.5) / 200_000
    x = mean[:, None] + std[:, None] * torch.special.ndtri(p)
    wanted = x.clamp(-1, 1).mean(1)
    torch.testing.assert_close(gaussians.clipped_mean(mean, std), wanted, atol=1e-5, rtol=0)


class Linear(nn.Module):
    """Probabilistic PCA: x = W z + noise, and its exact posterior."""

    def __init__(self, w: Tensor, r: float) -> None:
        super().__init__()
        self.w, self.m = w, torch.linalg.inv(w.T @ w + r**2 * torch.eye(w.shape[1]).to(w))
        self.std = r * self.m.diagonal().sqrt()

    def encode(self, x: Tensor) -> Any:
        c = x @ self.w @ self.m
        dist = SimpleNamespace(mean=c, std=self.std.expand_as(c))
        return SimpleNamespace(latent_dist=dist)

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=z @ self.w.T)


def pca(r: float = 0.3) -> tuple[Pair, Tensor]:
    """A pair of the interface of diffusers, and the covariance of its data; W^T W is diagonal."""
    g = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(5, 2, generator=g).double()).Q
    w = q * torch.tensor([2.0, 0.7]).double()
    pair = Pair(Linear(w, r), shape=(5,), latent=(2,)).double()
    with torch.no_grad():
        pair.log_std.fill_(math.log(r))
    pair.requires_grad_(False)
    return pair, w @ w.T + r**2 * torch.eye(5).double()


def test_the_cost_of_probabilistic_pca_is_its_entropy() -> None:
    pair, covariance = pca()
    law = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance)
    torch.manual_seed(0)
    x = law.sample((20_000,))
    gap = pair.cost(x, torch.Generator().manual_seed(0)).total + law.log_prob(x)
    # In the mean over z the bound is the truth; the distortion of one draw of z spreads.
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(x) ** 0.5
    assert float(gap.std()) > 0.1


def test_the_elbo_finds_probabilistic_pca() -> None:
    # The optimum of a linear VAE is that of pPCA (Lucas et al. 2019), its loss the entropy.
    _, covariance = pca()
    law = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance)
    torch.manual_seed(0)
    x = law.sample((4000,)).float()
    pair = Pair(Encoder(), nn.Linear(2, 5), shape=(5,), latent=(2,))
    recipe = sg.Recipe(steps=300, batch=128, lr=5e-2, holdout=0)
    found = sg.train(pair, x, recipe=recipe, objective=Elbo(), device="cpu")
    with torch.no_grad():
        cost = found.cost(x, torch.Generator().manual_seed(0)).total
    gap = cost + law.log_prob(x.double())
    assert -0.02 < float(gap.mean()) < 0.05
    assert abs(float(found.log_std.detach().exp()) - 0.3) < 0.02


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.log_s = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c(x)
        return c, self.log_s.exp().expand_as(c)


def test_saved_and_loaded(tmp_path: Any) -> None:
    net = shaken(Autoencoder((1, 8, 8), (2, 4, 4), 8, levels=17, components=2)).float()
    save(net, tmp_path)
    back = load(tmp_path, kind=Autoencoder)
    x = torch.zeros(2, 1, 8, 8)
    assert torch.equal(net.encode(x), back.encode(x))
    assert back.config == net.config


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Autoencoder((1, 8, 8), (2, 3, 3)), "halved"),
        (lambda: Autoencoder((1, 8, 8), (2, 4)), "latent"),
        (lambda: Autoencoder((3,), (2, 1)), "must be .d,."),
        (lambda: Autoencoder((1, 8, 6), (2,), patch=4), "multiple of patch = 4"),
        (lambda: Autoencoder((4,), (2,), patch=2), "multiple of patch = 2"),
        (lambda: Autoencoder((1, 8, 8), (2, 4, 4), std=0.0), "std"),
        (lambda: Autoencoder((3,), (2,)).cost(torch.zeros(2, 4)), "must be"),
        (lambda: Pair(torch.tanh, torch.tanh, (2,), (2,)).encode(torch.zeros(1, 2)), "deviation"),
        (
            lambda: Pair(torch.sum, torch.tanh, (2,), (2,), 0.1).encode(torch.zeros(1, 2)),
            "must return",
        ),
    ],
)
def test_what_does_not_fit_is_named(build: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build()


def test_integers_need_levels() -> None:
    with pytest.raises(TypeError, match="levels"):
        Autoencoder((3,), (2,)).cost(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="encode"):
        Pair(3, 4, (2,), (2,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Autoencoder"):
        Elbo()(nn.Linear(1, 1), torch.zeros(1, 1), None, sg.Streams(0))
