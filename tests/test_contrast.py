"""The rivals, against closed forms: Gaussians, quadrature, losses written out."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.nn import functional as F

from sde_gen import Recipe, Streams, load, save
from sde_gen.contrast import (
    GAN,
    HVAE,
    VAE,
    MinimaxGAN,
    Rival,
    game_value,
    jensen_shannon,
    train,
)
from sde_gen.networks import Autoencoder, Pair


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec() -> Autoencoder:
    return Autoencoder((2,), (3,), width=8)


LABELS = torch.arange(40) % 2
RIVALS = {
    "GAN of vectors": lambda: GAN((2,), width=8, classes=2),
    "GAN of images": lambda: GAN((1, 9, 8), latent=4, width=4, classes=2),
    "minimax GAN": lambda: MinimaxGAN((2,), width=8),
    "VAE": lambda: VAE(codec()),
    "VAE, mixtures": lambda: VAE(codec()).with_mixture(normal(40, 2), LABELS, 3),
    "hierarchical VAE": lambda: HVAE(codec(), above=(4, 2), width=8, classes=2),
}


@pytest.fixture(params=RIVALS.values(), ids=RIVALS.keys())
def rival(request) -> Rival:
    made: Rival = request.param()
    for p in made.parameters():  # nothing at zero, where it starts
        p.data += 0.1 * torch.randn(p.shape)
    return made


# ---- what all share ----


def test_a_sample_is_a_function_of_seed_and_number(rival):
    y = None if rival.classes is None else torch.arange(6) % 2
    x = rival.sample(6, seed=3, y=y)
    assert x.shape == (6, *rival.shape)
    assert not x.requires_grad
    later = rival.sample(2, seed=3, first=4, y=None if y is None else y[4:])
    torch.testing.assert_close(x[4:], later)
    assert not torch.allclose(x, rival.sample(6, seed=4, y=y))
    assert (x[0] - x[2]).abs().max() > 1e-4


def test_labels_change_samples_and_are_one_or_many(rival):
    if rival.classes is None:
        with pytest.raises(ValueError, match="no classes; labels given"):
            rival.sample(3, y=1)
        return
    ones = rival.sample(3, seed=0, y=1)
    assert torch.equal(ones, rival.sample(3, seed=0, y=[1, 1, 1]))
    assert not torch.allclose(ones, rival.sample(3, seed=0, y=0))


def test_saved_and_loaded_it_draws_the_same(rival, tmp_path):
    save(rival, tmp_path)
    again = load(tmp_path, kind=type(rival))
    y = None if rival.classes is None else 1
    assert torch.equal(rival.sample(4, seed=0, y=y), again.sample(4, seed=0, y=y))


def test_sampling_leaves_the_mode_alone(rival):
    rival.sample(1, seed=0)
    assert rival.training
    rival.eval().sample(1, seed=0)
    assert not rival.training


class Echo(Rival):
    """Draws the label that it was told."""

    def __init__(self, classes: int) -> None:
        super().__init__((1,), classes, {})
        self.scale = nn.Parameter(torch.ones(()))

    def draw(self, told: Tensor, noise: Streams) -> Tensor:
        return told.argmax(1, keepdim=True) * self.scale

    def loss(self, x: Tensor, told: Tensor, noise: Streams) -> Tensor:
        return (x - told.argmax(1, keepdim=True) * self.scale).square().sum(1)


def test_without_labels_each_class_is_as_likely():
    drawn = Echo(5).sample(2000, seed=0).long().flatten().bincount(minlength=5)
    assert stats.chisquare(drawn.numpy()).pvalue > 1e-3
    assert Echo(5).sample(3, y=[4, 0, 2]).flatten().tolist() == [4, 0, 2]


def test_training_is_the_library_s():
    x = torch.tensor([[0.0], [2.0], [4.0]]).repeat(20, 1)
    y = torch.arange(60) % 3
    found = train(Echo(3), x, y, Recipe(steps=200, batch=60, lr=0.05), progress=False)
    assert found.scale.item() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("make", [RIVALS["GAN of vectors"], RIVALS["hierarchical VAE"]])
def test_training_is_seeded(make):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        recipe = Recipe(steps=3, batch=8, seed=seed)
        model = train(make(), normal(40, 2), LABELS, recipe, progress=False)
        found.append(model.sample(5, seed=0, y=1))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- GANs ----

P = stats.norm(-0.5, 0.6)
Q = stats.norm(0.7, 1.1)


def divergence() -> float:
    """JS of P and Q in nats, by quadrature."""

    def of(x: float) -> float:
        p, q = P.pdf(x), Q.pdf(x)
        m = (p + q) / 2
        return 0.5 * (p * math.log(p / m) + q * math.log(q / m))

    return integrate.quad(of, -7, 8, epsabs=1e-10)[0]


def test_the_best_discriminator_has_the_jensen_shannon_divergence():
    n = 100_000
    real, fake = -0.5 + 0.6 * normal(n, seed=1).double(), 0.7 + 1.1 * normal(n, seed=2).double()

    def logit(x: Tensor) -> Tensor:
        return torch.from_numpy(P.logpdf(x.numpy()) - Q.logpdf(x.numpy()))

    parts = [F.logsigmoid(logit(real)), F.logsigmoid(-logit(fake))]
    error = 0.5 * math.sqrt(sum(float(v.var()) for v in parts) / n)
    best = float(jensen_shannon(logit(real), logit(fake)))
    assert best == pytest.approx(divergence(), abs=4 * error)
    assert float(game_value(logit(real), logit(fake))) == pytest.approx(2 * best - math.log(4))
    for other in (lambda x: 0.5 * logit(x), lambda x: logit(x) + 0.5, lambda x: 0 * x):
        assert float(jensen_shannon(other(real), other(fake))) < best - 4 * error


def test_a_trained_discriminator_comes_near_it():
    torch.manual_seed(0)
    gan = MinimaxGAN((1,), latent=1, width=24, depth=2)
    held = nn.Linear(1, 1)  # the generator is N(0.7, 1.1^2), and stays so
    held.weight.data.fill_(1.1), held.bias.data.fill_(0.7)
    gan.generator.body = held
    x = -0.5 + 0.6 * normal(20_000, 1)

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters[2:], 1e-2)

    recipe = Recipe(steps=400, batch=256)
    gan = train(gan, x, recipe=recipe, optimizer=optimizer, progress=False)
    told = torch.zeros(20_000, 0)
    with torch.no_grad():
        logits = gan.discriminator(x, told), gan.discriminator(gan.sample(20_000, 1), told)
    # A bound from below, up to the spread of 20,000 draws: at most log 2 / sqrt(20,000) each.
    assert -0.02 < float(jensen_shannon(*logits)) - divergence() < 0.01


@pytest.mark.parametrize("gamma", [0.0, 0.7, None])
@pytest.mark.parametrize("shape", [(2,), (1, 5, 4)])
def test_each_player_has_the_gradient_of_its_own_loss(gamma, shape):
    torch.manual_seed(1)
    kind = {"latent": 3, "width": 4, "classes": 2}
    gan = MinimaxGAN(shape, **kind) if gamma is None else GAN(shape, **kind, gamma=gamma)
    for p in gan.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    x, y = normal(7, *shape).requires_grad_(), torch.arange(7) % 2
    told = F.one_hot(y, 2).float()
    gan(x.detach(), y, Streams(5)).mean().backward()

    z = Streams(5).normal(torch.empty(7, 3), "latent")
    fake, d = gan.generator(z, told), gan.discriminator
    ones, zeros = torch.ones(7), torch.zeros(7)
    bce = F.binary_cross_entropy_with_logits
    judged = bce(d(x, told), ones) + bce(d(fake.detach(), told), zeros)
    if gamma:
        slopes = [
            torch.autograd.grad(d(x[i : i + 1], told[i : i + 1])[0], x, create_graph=True)[0][i]
            for i in range(7)
        ]
        judged = judged + gamma / 2 * torch.stack([s.square().sum() for s in slopes]).mean()
    logit = d(fake, told)
    wish = -bce(logit, zeros) if gamma is None else bce(logit, ones)
    for loss, net in ((judged, d), (wish, gan.generator)):
        expected = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for p, g in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_r1_of_a_linear_discriminator():
    gan = GAN((3,), depth=0, gamma=2.0)
    plain = GAN((3,), depth=0, gamma=0.0)
    plain.load_state_dict(gan.state_dict())
    x = normal(4, 3)
    more = gan(x, None, Streams(0)) - plain(x, None, Streams(0))
    slope = gan.discriminator.last.weight.detach().square().sum()
    torch.testing.assert_close(more.detach(), slope.expand(4), rtol=1e-5, atol=1e-6)


def test_ratio_is_that_of_the_rates():
    torch.manual_seed(0)
    gan = GAN((2,), width=8, ratio=0.0)
    before = [p.detach().clone() for p in gan.parameters()]
    groups = gan.optimizer(1e-3)(list(gan.parameters())).param_groups
    assert [g["lr"] for g in groups] == [1e-3, 0.0]
    n = [len(g["params"]) for g in groups]
    assert n == [len(list(m.parameters())) for m in (gan.generator, gan.discriminator)]
    train(gan, normal(50, 2), recipe=Recipe(steps=3, batch=10), progress=False)
    same = [torch.equal(a, b) for a, b in zip(before, gan.parameters(), strict=True)]
    assert same == [False] * n[0] + [True] * n[1]


def test_a_gan_finds_a_gaussian():
    torch.manual_seed(0)
    x = torch.tensor([1.0, -0.5]) + 0.4 * normal(2000, 2)
    gan = GAN((2,), latent=2, width=24, depth=2, gamma=1.0)
    gan = train(gan, x, recipe=Recipe(steps=300, batch=128, lr=3e-3), progress=False)
    found = gan.sample(2000, seed=0)
    assert (found.mean(0) - x.mean(0)).abs().max() < 0.2
    assert (found.std(0) / x.std(0)).log().abs().max() < 0.4


# ---- VAE ----


def identity(d: int) -> Pair:
    """Latents are the data, but for noise of deviation 0.01."""
    return Pair(lambda x: x, lambda z: z, (d,), (d,), std=0.01)


def test_the_mixture_is_that_of_the_codes():
    n, root = 4000, torch.tensor([[0.3, 0.0], [0.2, 0.1]])
    is_left = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.2
    means = torch.where(is_left[:, None], torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0]))
    x = means + normal(n, 2) @ root.T
    found = VAE(identity(2)).with_mixture(x, components=2).sample(n, seed=1)
    left = found[:, 0] < 0
    assert float(left.double().mean()) == pytest.approx(0.2, abs=4 * math.sqrt(2 * 0.16 / n))
    for side, mean in ((left, (-2.0, 0.0)), (~left, (2.0, 1.0))):
        part = found[side]
        error = 4 * 0.3 * math.sqrt(2 / len(part))  # of both fits, 0.3 the largest deviation
        torch.testing.assert_close(part.mean(0), torch.tensor(mean), rtol=0, atol=error)
        torch.testing.assert_close(part.T.cov(), root @ root.T, rtol=0, atol=error)


def test_each_class_has_its_mixture():
    y = torch.arange(300) % 3
    x = 2.0 * y[:, None] + 0.1 * normal(300, 1)
    vae = VAE(identity(1)).with_mixture(x, y, components=2)
    found = vae.sample(300, seed=0, y=y)
    assert ((found - 2.0 * y[:, None]).abs() < 0.6).all()
    assert vae.classes == 3


def test_the_loss_of_a_vae_is_its_bound():
    net, x = codec(), normal(5, 2)
    cost = net.cost(x, Streams(3))
    expected = (cost.rate + cost.distortion) / 2
    torch.testing.assert_close(VAE(net)(x, None, Streams(3)), expected)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ImportError, match=r"pip install 'sde-gen\[data\]'"):
        VAE(codec()).with_mixture(normal(40, 2))


# ---- hierarchical VAE: a chain of scalars, whose posteriors are known ----

A, B, R, V = 1.7, 0.8, 0.5, 0.6  # x = A z_1 + R e, z_1 = B z_2 + V e, z_2 ~ N(0, 1)


def chain() -> HVAE:
    """With the exact posterior: z_1 is seen as x / A, with noise R / A, and given as the mean that
    this is under N(0, 1); z_2 through z_1."""
    shrunk = 1 / (1 + (R / A) ** 2)
    net = Pair(lambda x: shrunk * x / A, lambda z: A * z, (1,), (1,), std=R / A)
    net.log_std.data.fill_(math.log(R))
    hvae = HVAE(net, above=(1,), depth=0)
    noise = V**2 + (R / A) ** 2
    pull, spread = B / (B**2 + noise), math.sqrt(noise / (B**2 + noise))
    for net_, (m, s) in ((hvae.up[0], (pull / shrunk, spread)), (hvae.down[0], (B, V))):
        net_[0].weight.data = torch.tensor([[m], [0.0]])
        net_[0].bias.data = torch.tensor([0.0, math.log(s)])
    return hvae.double()


@pytest.mark.parametrize("value", [0.0, 1.3, -4.0])
def test_with_the_exact_posterior_the_bound_is_the_evidence(value):
    n = 20_000
    with torch.no_grad():
        rates, distortion = chain().terms(torch.full((n, 1), value).double(), noise=Streams(0))
    total = rates.sum(1) + distortion
    truth = -stats.norm(0, math.sqrt(A**2 * (B**2 + V**2) + R**2)).logpdf(value)
    error = float(total.std()) / math.sqrt(n)
    assert float(total.mean()) == pytest.approx(truth, abs=4 * error)
    assert error < 0.02
    assert rates.min() >= 0
    # The rate of z_2 is the KL of the exact posterior: no draw enters it.
    noise = V**2 + (R / A) ** 2
    m, v = B * value / A / (B**2 + noise), noise / (B**2 + noise)
    kl = 0.5 * (v + m**2 - 1 - math.log(v))
    torch.testing.assert_close(rates[:, 1], torch.full((n,), kl).double())


def test_another_posterior_costs_more():
    hvae, n = chain(), 20_000
    hvae.up[0][0].bias.data[0] += 0.5
    x = torch.full((n, 1), 1.3).double()
    with torch.no_grad():
        wrong, right = (
            torch.cat([r.sum(1, keepdim=True), d[:, None]], 1).sum(1)
            for r, d in (h.terms(x, noise=Streams(0)) for h in (hvae, chain()))
        )
    # KL(N(m + 1/2, v) || N(m, v)) = 1/(8 v): only z_2 is sought in the wrong place.
    noise = V**2 + (R / A) ** 2
    gap = (wrong - right).mean()
    error = float((wrong - right).std()) / math.sqrt(n)
    assert float(gap) == pytest.approx(0.125 * (B**2 + noise) / noise, abs=4 * error)


def test_the_loss_of_a_hierarchy_is_its_bound():
    hvae, x = RIVALS["hierarchical VAE"](), normal(9, 2)
    y = torch.arange(9) % 2
    rates, distortion = hvae.terms(x, y, noise=Streams(1))
    torch.testing.assert_close(hvae(x, y, Streams(1)), (rates.sum(1) + distortion) / 2)


def test_free_bits_are_not_paid():
    hvae, x = RIVALS["hierarchical VAE"](), normal(9, 2)
    y = torch.arange(9) % 2
    rates, distortion = hvae.terms(x, y, noise=Streams(1))
    mean = rates.mean(0)
    assert mean.min() < 0.1 < mean.max()  # so that one level is free, and one is not
    hvae.free = 0.1
    paid = torch.where(mean > 0.1, rates, 0.1).sum(1)
    torch.testing.assert_close(hvae(x, y, Streams(1)), (paid + distortion) / 2)


def test_a_silent_latent_can_be_taken_up():
    """Its mean answers to the encoder whatever its deviation is."""
    slopes = []
    for s in (0.1, 1.0, 7.0):
        net = Pair(lambda x: x, lambda z: z, (1,), (1,), std=s)
        hvae, x = HVAE(net, above=(1,), depth=0), torch.tensor([[0.5]], requires_grad=True)
        rates, _ = hvae.terms(x, noise=Streams(0))
        (slope,) = torch.autograd.grad(rates[:, 0].sum(), x)
        slopes.append(float(slope))  # of c^2 / 2 under N(0, 1)
    assert slopes == pytest.approx([0.5] * 3, rel=1e-5)


def test_samples_come_down_the_chain():
    n = 20_000
    x = chain().sample(n, seed=0).double()
    variance = A**2 * (B**2 + V**2)  # of E[x | z_1]
    assert float(x.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / n))
    assert abs(float(x.mean())) < 4 * math.sqrt(variance / n)


def test_a_new_hierarchy_starts_as_the_vae():
    x, net = normal(6, 2), codec()
    rates, _ = HVAE(net, above=(4, 2)).terms(x, noise=Streams(0))
    c, s = net.posterior(x)
    # Under N(0, I) for every level q(z_1 | z_2, x) has mean c and precision 1 + 1 / s^2.
    v = s**2 / (1 + s**2)
    kl = 0.5 * (v + c**2 - 1 - v.log()).sum(1)
    torch.testing.assert_close(rates[:, 0], kl, rtol=1e-4, atol=1e-5)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (lambda: GAN(2), TypeError, "shape must be sizes"),
        (lambda: GAN(()), ValueError, "shape must hold"),
        (lambda: GAN((2,), latent=0), ValueError, "latent"),
        (lambda: GAN((2,), gamma=-1), ValueError, "gamma"),
        (lambda: GAN((2,), ratio=math.inf), ValueError, "ratio"),
        (lambda: MinimaxGAN((2,), classes=0), ValueError, "classes"),
        (lambda: VAE(nn.Identity()), TypeError, "codec must be a Codec"),
        (lambda: VAE(codec(), classes=2), ValueError, "classes need components > 0"),
        (lambda: VAE(codec()).with_mixture(normal(5, 2)), ValueError, "5 data of class 0"),
        (lambda: VAE(codec()).with_mixture(normal(5, 2), [0]), ValueError, "labels y must be"),
        (lambda: HVAE(codec(), above=()), ValueError, "without it is a VAE"),
        (lambda: HVAE(codec(), above=(0,)), ValueError, "above"),
        (lambda: HVAE(nn.Identity()), TypeError, "codec must be a Codec"),
        (lambda: GAN((2,)).sample(0), ValueError, "n must be"),
        (lambda: GAN((2,)).sample(2, seed=0.5), TypeError, "seed must be"),
        (lambda: GAN((2,)).sample(2, first=-1), ValueError, "first"),
        (lambda: Echo(2).sample(2, y=[0, 2]), ValueError, "must lie in 0 .. 1"),
        (lambda: Echo(2).sample(2, y=[0, 1, 1]), ValueError, r"must be \(\) or \(2,\)"),
        (lambda: Echo(2)(normal(3, 1), None, Streams(0)), ValueError, "labels missing"),
        (
            lambda: Echo(2)(normal(2, 1), torch.tensor([0, 2]), Streams(0)),
            ValueError,
            "must lie in 0 .. 1",
        ),
        (lambda: train(nn.Linear(1, 1), normal(3, 1)), TypeError, "rival must be a rival"),
        (lambda: train(GAN((2,)), normal(30, 3)), ValueError, "data must be"),
        (lambda: train(GAN((2,), classes=2), normal(30, 2)), ValueError, "give labels"),
    ],
)
def test_what_cannot_work_is_refused(act, error, match):
    with pytest.raises(error, match=match):
        act()
