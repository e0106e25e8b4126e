"""Training on the chain's nodes: the lectures' loss, the published hybrid, and what it learns."""

from __future__ import annotations

import math

import pytest
import torch
from problems import F64, draw, line
from torch import Tensor, nn

from sde_gen import (
    VE,
    VP,
    Chain,
    CriticallyDamped,
    Facts,
    LinearSDE,
    MatrixOrnsteinUhlenbeck,
    Recipe,
    ScoreNetwork,
    Streams,
    bound,
    gaussians,
    grids,
    load,
    train,
)
from sde_gen.chain import Hybrid, NodeTimes
from sde_gen.networks import MLP
from sde_gen.schedules import Tabulated
from sde_gen.training import (
    Denoising,
    InformationTimes,
    KarrasWeight,
    LogNormalTimes,
    Uncertainty,
    likelihood_weight,
    uniform_weight,
)

BETAS = torch.linspace(1e-3, 0.3, 10, dtype=F64)
SDE = VP(Tabulated(BETAS))
CHAIN = Chain(SDE)


def awake(head: bool = True) -> ScoreNetwork:
    """A network of two coordinates with parameters that are not 0."""
    torch.manual_seed(1)
    model = ScoreNetwork(MLP((2,), 16, 1, head=head), SDE, "noise", Facts((2,))).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


# ---- times ----


def test_times_are_those_of_the_nodes_each_as_often() -> None:
    times = NodeTimes.of(CHAIN)
    u = torch.arange(1000, dtype=F64) / 1000
    t = times(SDE, u)
    found, counts = t.unique(return_counts=True)
    torch.testing.assert_close(found, CHAIN.times[1:])
    assert counts.tolist() == [100] * 10
    assert torch.equal(CHAIN.times[times.numbers(u)], t)


def test_algorithm_1_is_denoising_on_the_nodes() -> None:
    """|z - eps(sqrt(abar) x_0 + sqrt(1 - abar) z, t)|^2 at integer t (Ho et al. 2020)."""
    model, x, noise = awake(), draw(64, 2), Streams(3)
    found = Denoising(uniform_weight, NodeTimes.of(CHAIN))(model, x, None, noise)
    t = 1 + (noise.spread(64) * 10).long()
    abar = torch.cumprod(1 - BETAS, 0)[t - 1].unsqueeze(1)
    z = noise.normal(x, "perturb")
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * z
    eps = -(1 - abar).sqrt() * model(x_t, t.double() / 10)
    torch.testing.assert_close(found, (z - eps).square().mean(1))


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_information_times_are_even_in_information(sde: LinearSDE) -> None:
    t = InformationTimes(0.3)(sde, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=F64))
    bits = torch.log1p(0.3 * sde.log_snr(t).exp())
    torch.testing.assert_close(bits.diff(), bits.diff().mean().expand(4), rtol=1e-6, atol=0)
    assert float(t[0]) == pytest.approx(grids.default_end(sde))
    assert float(t[-1]) == pytest.approx(sde.T)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_the_default_weight_at_information_times_is_the_likelihood(sde: LinearSDE) -> None:
    """g^2 / sigma^2 over dI/dt = v / (v + w) dlog w / dt is 1 + w / v, up to a factor."""
    std = 0.55
    times, u, step = InformationTimes(std**2), torch.linspace(0.05, 0.95, 19, dtype=F64), 1e-4
    t = times(sde, u)
    per_u = (times(sde, u + step) - times(sde, u - step)) / (2 * step)
    ratio = likelihood_weight(sde, t) * per_u / KarrasWeight(std)(sde, t)
    torch.testing.assert_close(ratio, ratio.mean().expand(19), rtol=1e-5, atol=0)


# ---- the uncertainty of a loss ----


def test_uncertainty_divides_a_loss_by_what_the_head_expects_of_it() -> None:
    """exp(-u) l + u, with l written out: least where u = log l."""
    model, x, noise = awake(), draw(64, 2), Streams(3)
    found = Uncertainty()(model, x, None, noise)
    t = LogNormalTimes()(SDE, noise.spread(64))
    z, (alpha, sigma) = noise.normal(x, "perturb"), (SDE.alpha(t), SDE.sigma(t))
    e = model(alpha[:, None] * x + sigma[:, None] * z, t, whole=True)
    weight = 1 + (sigma / alpha / model.facts.std) ** 2
    loss = weight * (sigma[:, None] * e.score + z).square().mean(1)
    u = e.head.mean(1)
    torch.testing.assert_close(found, loss / u.exp() + u)


def test_uncertainty_learns_the_logarithm_of_the_loss() -> None:
    """A head that is one number learns log E l, and the score does not know that it is there."""
    law = line(VP())
    chain = Chain(VP(), torch.tensor([0.3], dtype=F64))
    model = ScoreNetwork(Known(law, chain), VP(), "data", law.facts)
    data = law.sample(40_000, torch.Generator().manual_seed(0))
    at = NodeTimes.of(chain)
    loss = Denoising(times=at)(model, data, None, Streams(0)).detach()
    model.net.f.data.fill_(float(loss.mean().log()))
    Uncertainty(times=at)(model, data, None, Streams(0)).mean().backward()
    # d/du (e^-u l + u) = 1 - e^-u l, which is 0 in the mean.
    assert float(model.net.f.grad.abs().max()) < 1e-9
    model.net.f.data.add_(0.1)
    model.zero_grad()
    Uncertainty(times=at)(model, data, None, Streams(0)).mean().backward()
    assert float(model.net.f.grad) == pytest.approx(1 - math.exp(-0.1), rel=1e-9)


# ---- the hybrid loss ----


def by_hand(model: ScoreNetwork, x: Tensor, noise: Streams, weight: float) -> Tensor:
    """L_simple + weight N L_t in bits a dimension, written with betas alone."""
    abar = torch.cat([torch.ones(1), torch.cumprod(1 - BETAS, 0)]).double()
    t, z = 1 + (noise.spread(len(x)) * 10).long(), noise.normal(x, "perturb")
    losses = []
    for i in range(len(x)):
        j = int(t[i])
        a, b = abar[j], abar[j - 1]
        x_t = a.sqrt() * x[i] + (1 - a).sqrt() * z[i]
        e = model(x_t[None], torch.tensor(j / 10, dtype=F64), whole=True)
        eps, f = -(1 - a).sqrt() * e.score[0], (e.head[0] + 1) / 2
        beta, low = BETAS[j - 1], BETAS[j - 1] * (1 - b) / (1 - a)
        if j == 1:
            low = BETAS[1] * (1 - abar[1]) / (1 - abar[2])
        v = torch.exp(f * beta.log() + (1 - f) * low.log())
        d = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        if j == 1:
            term = 0.5 * ((x[i] - d) ** 2 / v + torch.log(2 * math.pi * v)).sum()
        else:
            at = 1 - beta

            def mean(x_0, at=at, a=a, b=b, beta=beta, x_t=x_t):
                return (at.sqrt() * (1 - b) * x_t + b.sqrt() * beta * x_0) / (1 - a)

            term = gaussians.kl(mean(x[i])[None], low, mean(d)[None], v[None])[0]
        simple = (z[i] - eps).square().mean()
        losses.append(simple + weight * 10 * term / (2 * math.log(2)))
    return torch.stack(losses)


def test_the_hybrid_loss_is_the_published_one() -> None:
    """The sum over N steps and not their mean, which public code took: N times too little."""
    model, x, noise = awake(), draw(40, 2), Streams(5)
    found = Hybrid(NodeTimes.of(CHAIN))(model, x, None, noise)
    torch.testing.assert_close(found, by_hand(model, x, noise, 0.001), rtol=1e-9, atol=1e-12)
    more = Hybrid(NodeTimes.of(CHAIN), weight=1.0)(model, x, None, noise)
    torch.testing.assert_close(more, by_hand(model, x, noise, 1.0), rtol=1e-9, atol=1e-12)


def test_its_mean_over_t_is_the_bound() -> None:
    """It estimates the bound without L_T, in bits a dimension."""
    model = awake()
    x = draw(1, 2).expand(20_000, 2).contiguous()
    both, simple = (
        Hybrid(NodeTimes.of(CHAIN), weight=w)(model, x, None, Streams(1)).detach()
        for w in (1.0, 0.0)
    )
    vlb = both - simple
    b = bound(model, x[:4000], CHAIN, variance="learned", draws=1).mean()
    rest = (b.total.value - b.prior.value) / (2 * math.log(2))
    error = math.hypot(
        float(b.total.standard_error) / (2 * math.log(2)), float(vlb.std()) / math.sqrt(len(x))
    )
    assert float(vlb.mean()) == pytest.approx(float(rest), abs=4.5 * error)


def test_the_bound_does_not_move_the_mean() -> None:
    model, x = awake(), draw(64, 2)
    grads = []
    for weight in (0.0, 100.0):
        model.zero_grad()
        Hybrid(NodeTimes.of(CHAIN), weight=weight)(model, x, None, Streams(0)).sum().backward()
        grads.append(model.net.output.weight.grad.clone())
    assert torch.equal(grads[0][:2], grads[1][:2])  # the rows that say the noise
    assert float(grads[0][2:].abs().max()) == 0  # those of the head
    assert float(grads[1][2:].abs().max()) > 1


def test_levels_are_read_on_their_cells() -> None:
    model = awake()
    k = torch.randint(0, 8, (400, 2), generator=torch.Generator().manual_seed(0))
    x = ((2 * k + 1) / 8 - 1).double()
    both, simple = (
        Hybrid(NodeTimes.of(CHAIN), weight=w, n_levels=8)(model, x, None, Streams(1)).detach()
        for w in (1.0, 0.0)
    )
    t = 1 + (Streams(1).spread(400) * 10).long()
    x_1 = (1 - BETAS[0]).sqrt() * x + BETAS[0].sqrt() * Streams(1).normal(x, "perturb")
    p = CHAIN.step(model, x_1, 1, 0, "learned")
    exact = -gaussians.discretised(k, p.mean, p.std, 8).sum(1) * 10 / (2 * math.log(2))
    torch.testing.assert_close(
        (both - simple)[t == 1], exact[t == 1].detach(), rtol=1e-9, atol=1e-9
    )


class Known(nn.Module):
    """The exact denoiser of a law, with a head that is one number a node: what is learned."""

    shape = (1,)

    def __init__(self, law, chain: Chain) -> None:
        super().__init__()
        self.law, self.chain = law, chain
        self.f = nn.Parameter(torch.zeros(len(chain), dtype=F64))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        sde, std = self.chain.sde, self.law.facts.std
        t = sde.time_at(-8 * c).clamp_max(sde.T).reshape(-1).expand(len(x))
        x_t = x * torch.sqrt((sde.alpha(t) * std) ** 2 + sde.sigma(t) ** 2).unsqueeze(1)
        at = (self.chain.times[1:] - t.unsqueeze(1)).abs().argmin(1)
        return torch.cat([self.law.denoise(x_t, t), self.f[at].unsqueeze(1)], 1)


def test_the_learned_variance_is_the_best_one() -> None:
    """One number a node, trained by the hybrid loss, comes within 2 % of k* on a mixture."""
    sde = VP()
    law = line(sde)
    chain = Chain(sde, grids.log_snr(sde, 7, end=0.02))
    model = ScoreNetwork(Known(law, chain), sde, "data", law.facts)
    data = law.sample(200_000, torch.Generator().manual_seed(0))
    loss = Hybrid(NodeTimes.of(chain), weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    average, steps = torch.zeros(8, dtype=F64), 300
    for k in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if k < 120 else 0.02
        rows = torch.arange(k * 500, (k + 1) * 500)
        optimizer.zero_grad()
        loss(model, data[rows], None, Streams(0, k * 500)).mean().backward()
        optimizer.step()
        if k >= steps - 150:
            average += model.net.f.detach() / 150
    errors = chain.errors(law, data[:100_000])
    for i in range(1, 9):
        head = average[i - 1].reshape(1, 1)
        found, best = (
            float(chain.variance(i, i - 1, v, h)) for v, h in (("learned", head), (errors, None))
        )
        assert found == pytest.approx(best, rel=0.02), i


# ---- a run ----


def test_a_run_trains_saves_samples_and_is_bounded(tmp_path) -> None:
    law = line(VP())
    data = law.sample(2000, torch.Generator().manual_seed(0)).float()
    chain = Chain(VP(), grids.information(VP(), 20, reference=0.6))
    model = ScoreNetwork(MLP((1,), 32, 2, head=True), VP(), facts=Facts.of(data, units="all"))
    objective = Hybrid(NodeTimes.of(chain), weighting=uniform_weight)
    recipe = Recipe(steps=300, batch=128)
    trained = train(
        model, data, recipe=recipe, objective=objective, folder=tmp_path, progress=False
    )
    again = load(tmp_path)
    x = chain.sample(again, 4000, seed=0, variance="learned")
    assert torch.equal(x, chain.sample(trained, 4000, seed=0, variance="learned"))
    assert float(x.mean()) == pytest.approx(float(data.mean()), abs=0.1)
    assert float(x.std()) == pytest.approx(float(data.std()), rel=0.1)
    test = law.sample(2000, torch.Generator().manual_seed(1)).float()
    learned = bound(again, test, chain, variance="learned").mean()
    small = bound(again, test, chain).mean()
    truth = -float(law.log_prob(test).mean())
    assert truth < float(learned.total.value) < float(small.total.value)
    assert float(learned.total.value) < truth + 0.25


def test_labels_reach_the_network() -> None:
    model = ScoreNetwork(MLP((2,), 16, 1, classes=3, head=True), SDE, "noise", Facts((2,)))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x, y = draw(8, 2, dtype=torch.float32), torch.arange(8) % 3
    loss = Hybrid(NodeTimes.of(CHAIN), dropout=0.0)
    a, b = (loss(model, x, labels, Streams(0)) for labels in (y, (y + 1) % 3))
    assert bool((a != b).all())
    dropped = Hybrid(NodeTimes.of(CHAIN), dropout=1.0)
    assert torch.equal(dropped(model, x, y, Streams(0)), dropped(model, x, 0 * y, Streams(0)))


def test_what_cannot_be_trained_says_so() -> None:
    x = draw(4, 2)
    with pytest.raises(TypeError, match="no head to learn variances by"):
        Hybrid(NodeTimes.of(CHAIN))(awake(head=False), x, None, Streams(0))
    with pytest.raises(TypeError, match="no head to tell its uncertainty by"):
        Uncertainty()(awake(head=False), x, None, Streams(0))
    with pytest.raises(TypeError, match="times must be NodeTimes"):
        Hybrid(CHAIN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a ScoreNetwork"):
        Hybrid(NodeTimes.of(CHAIN))(nn.Linear(2, 2), x, None, Streams(0))
    with pytest.raises(ValueError, match="reference must"):
        InformationTimes(-1.0)


# ---- the likelihood's weight of a process with velocities ----


def test_the_likelihood_weight_of_a_velocity_is_g_squared_on_its_score() -> None:
    sde = CriticallyDamped()
    t = torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    x = sde.perturb(draw(3, 4), t, torch.Generator().manual_seed(0))
    guess = draw(3, 2, 4, seed=1)
    error = (guess - x.score)[:, 1]
    exact = (sde.diffusion(t)[:, 1, 1] ** 2).unsqueeze(1) * error**2
    # Of the true score elsewhere: only the driven component is ever wrong.
    rows = torch.cat([x.score[:, :1], guess[:, 1:]], 1)
    found = likelihood_weight(sde, t).unsqueeze(1) * x.residual(rows)[:, 1] ** 2
    torch.testing.assert_close(found, exact)
    both = MatrixOrnsteinUhlenbeck([[-1.0, 0.5], [0.0, -2.0]], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(TypeError, match="by a matrix, not by a number"):
        likelihood_weight(both, t)
