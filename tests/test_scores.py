"""Exact scores against autograd of a density, learned scores against exact ones, and sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import (
    F64,
    correlated,
    digits,
    gaussian,
    grid25,
    line,
    mixture,
    powerlaw,
    quantile_flow,
    ring,
    start,
)
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from sde_gen import (
    EDM,
    VE,
    VP,
    CorrelatedMixture,
    CriticallyDamped,
    Empirical,
    Exponential,
    Facts,
    Gaussian,
    GaussianMixture,
    Heun,
    Lifted,
    LinearSDE,
    MatrixOrnsteinUhlenbeck,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    Score,
    ScoreNetwork,
    SubVP,
    sample,
    solve,
)
from sde_gen.grids import from_table
from sde_gen.networks import MLP
from sde_gen.ops import Time, as_time
from sde_gen.schedules import Cosine, Geometric, Linear, Power
from sde_gen.scores import Given, exact
from sde_gen.scores.network import Alias, Prediction, network_input
from sde_gen.sdes import KernelSDE, MatrixSDE

PROCESSES = [
    *(VP(), SubVP(), VE(Geometric(0.01, 5.0)), EDM(8.0), OrnsteinUhlenbeck()),
    RectifiedFlow(),
]


def image_mixture(sde: LinearSDE) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 2, 3, 2, generator=generator, dtype=F64)
    return GaussianMixture(sde, torch.arange(1.0, 6.0), means, torch.rand(5, generator=generator))


def points(sde: LinearSDE) -> Empirical:
    return Empirical(sde, torch.randn(30, 2, generator=torch.Generator().manual_seed(1)))


EXACT: list[Callable[[LinearSDE], Gaussian | GaussianMixture]] = [
    gaussian,
    correlated,
    line,
    mixture,
    ring,
    grid25,
    image_mixture,
    points,
]


def times(sde: LinearSDE, n: int) -> list[Tensor]:
    """One time for all, and one for each of n samples."""
    each = sde.T * torch.linspace(0.05, 1.0, n, dtype=F64)
    return [torch.tensor(0.3 * sde.T, dtype=F64), each]


@pytest.mark.parametrize("make", EXACT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("chunk", [1 << 22, 9], ids=["whole", "chunked"])
def test_a_score_is_the_gradient_of_its_density(
    make: Callable[[LinearSDE], Gaussian | GaussianMixture],
    sde: LinearSDE,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make(sde)
    for t in times(sde, 6):
        x = start(whole, 6, t).requires_grad_()
        reference = whole.log_prob(x, t)
        monkeypatch.setattr(exact, "_BUDGET", chunk)
        score = make(sde)
        log_p = score.log_prob(x, t)
        (gradient,) = torch.autograd.grad(log_p.sum(), x)
        torch.testing.assert_close(score(x, t), gradient, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(log_p, reference, rtol=1e-12, atol=1e-12)
        assert score(x, t).shape == x.shape
        monkeypatch.undo()


def marginal(score: Gaussian | GaussianMixture, t: float) -> torch.distributions.Distribution:
    """p_t of a score with the distributions of torch."""
    alpha, sigma = score.sde.alpha(t), score.sde.sigma(t)
    if isinstance(score, Gaussian):
        basis = torch.eye(len(score.mean), dtype=F64) if score.basis is None else score.basis
        covariance = basis * (alpha**2 * score.variance + sigma**2) @ basis.T
        return MultivariateNormal(alpha * score.mean, covariance)
    means = score.means.double()
    spread = torch.sqrt(alpha**2 * score.variance + sigma**2).expand(means.shape)
    parts = Independent(Normal(alpha * means, spread), 1)
    return MixtureSameFamily(Categorical(logits=score.log_weights), parts)


@pytest.mark.parametrize("make", [*EXACT, powerlaw], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sde", [VP(), OrnsteinUhlenbeck()], ids=repr)
def test_densities_are_those_of_torch(
    make: Callable[[LinearSDE], Gaussian | GaussianMixture], sde: LinearSDE
) -> None:
    score = make(sde)
    for share in (0.05, 0.5, 1.0):
        x = start(score, 5, share * sde.T)
        expected = marginal(score, share * sde.T).log_prob(x.flatten(1))
        log_p = score.log_prob(x, share * sde.T)
        torch.testing.assert_close(log_p, expected, rtol=1e-9, atol=1e-9)
        assert log_p.dtype == F64


@pytest.mark.parametrize("make", EXACT, ids=lambda f: f.__name__)
def test_samples_have_the_law_of_the_data(
    make: Callable[[LinearSDE], Gaussian | GaussianMixture],
) -> None:
    score, n = make(VP()), 20_000
    x = score.sample(n, torch.Generator().manual_seed(3))
    assert x.shape == (n, *score.shape)
    if not score.singular:
        # E[score] = 0 and E[score x^T] = -I (Stein): 4 deviations of a mean each.
        s, y = score(x, 0.0).flatten(1), x.flatten(1).double()
        for value, target in ((s, 0.0), (s * y, -1.0)):
            error = (value.mean(0) - target) / (value.std(0) / math.sqrt(n))
            assert float(error.abs().max()) < 4
    else:
        chosen = torch.cdist(x.double(), score.means.double()).min(1)
        assert float(chosen.values.max()) < 1e-6
        counts = torch.bincount(chosen.indices, minlength=30) / n
        assert float((counts - 1 / 30).abs().max()) < 4.5 * math.sqrt(1 / 30 / n)


def test_shared_problems_are_as_described() -> None:
    sde = VP()
    spectrum = powerlaw(sde).variance.flip(0)
    assert float(spectrum.mean()) == pytest.approx(0.25)
    assert float(spectrum[0] / spectrum[9]) == pytest.approx(100)
    board = grid25(sde)
    assert board.means.unique(dim=0).shape == (25, 2)
    # The flow of the board is that of its coordinates: to t = T it is close to a normal draw.
    x = start(board, 3, 0.5)
    assert quantile_flow(board, x, 0.5, 0.1).shape == x.shape
    torch.testing.assert_close(quantile_flow(board, x, 0.5, 0.5), x, rtol=0, atol=1e-9)


def test_digits_are_a_mixture_around_images() -> None:
    pytest.importorskip("sklearn", reason="comes with the extra 'data'")
    score = digits(VP(), 50)
    assert score.shape == (64,)
    assert bool((score.means >= -1).all() and (score.means <= 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", EXACT, ids=lambda f: f.__name__)
def test_states_keep_their_dtype(
    make: Callable[[LinearSDE], Gaussian | GaussianMixture], dtype: torch.dtype
) -> None:
    score = make(VP())
    x = start(score, 4, 0.5).to(dtype)
    for t in times(VP(), 4):
        s = score(x, t)
        assert s.dtype == dtype
        # The state is rounded, the arithmetic is not.
        expected = score(x.double(), t)
        torch.testing.assert_close(s.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


# Precision of the posterior.


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_far_points_keep_their_posterior(dtype: torch.dtype) -> None:
    """|x|^2 - 2 x.m + |m|^2 in float32 gives 0.18 / 0.82 where 0.41 / 0.59 is right.

    Two points at distance 0.02 from each other, 3072 coordinates of size 1: the squares are
    3072, and the difference that decides is of the order of 1e-4.
    """
    sde, n = EDM(1.0), 3072
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=generator)
    step = torch.randn(n, generator=generator) * 0.02 / math.sqrt(n)
    data = torch.stack([base, base + step]).to(dtype)
    sigma = 0.02
    direction = (data[1] - data[0]).double()
    # log r_1 / r_0 = (|x - m_0|^2 - |x - m_1|^2) / (2 sigma^2), with x on the line through both.
    log_odds = math.log(0.59 / 0.41)
    u = 0.5 + log_odds * sigma**2 / float(direction @ direction)
    x = (data[0].double() + u * direction).to(dtype)
    d_0, d_1 = ((x.double() - m.double()).square().sum() for m in data)
    odds = torch.exp((d_0 - d_1) / (2 * sigma**2))
    score = Empirical(sde, data)
    posterior = score.posterior(x.unsqueeze(0), sigma)
    assert float(posterior[0, 1] / posterior[0, 0]) == pytest.approx(float(odds), rel=1e-6)
    if dtype == F64:
        assert posterior[0].tolist() == pytest.approx([0.41, 0.59], rel=1e-7)
    mean = posterior[0] @ data.double()
    expected = ((mean - x.double()) / sigma**2).to(dtype)
    scale = float(expected.abs().max())
    got = score(x.unsqueeze(0), sigma)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=scale * 1e-6)


def test_many_points_cost_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunked pass over 5,000 images: right, and no piece larger than the budget."""
    sde, n, d = VP(), 5000, 192
    data = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    score, x = Empirical(sde, data), torch.randn(4, 3, 8, 8, dtype=F64)
    t = torch.tensor(0.2, dtype=F64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    difference = x.flatten(1).unsqueeze(1) - alpha * data.flatten(1).double()
    logits = -difference.square().sum(-1) / (2 * sigma**2)
    expected = -(logits.softmax(1).unsqueeze(-1) * difference).sum(1) / sigma**2
    monkeypatch.setattr(exact, "_BUDGET", 10 * d)
    sizes = [len(m) for _, m, _ in score._chunks(4)]
    assert sum(sizes) == n
    assert max(sizes) * (d + 4) <= 10 * d
    torch.testing.assert_close(score(x, t).flatten(1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make", [gaussian, correlated, line, mixture, ring, points], ids=lambda f: f.__name__
)
def test_tweedie_is_the_posterior_mean(
    make: Callable[[LinearSDE], Gaussian | GaussianMixture],
) -> None:
    """E[x_0 | x_t] against importance sampling from the data themselves."""
    sde, n, t = VP(), 100_000, 0.45
    score = make(sde)
    x = start(score, 4, t, seed=5)
    x_0 = score.sample(n, torch.Generator().manual_seed(6)).double()
    logits = -((x.unsqueeze(1) - sde.alpha(t) * x_0) ** 2).sum(-1) / (2 * sde.sigma(t) ** 2)
    weights = logits.softmax(1)
    estimate = weights @ x_0
    square = (weights.unsqueeze(-1) ** 2 * (x_0 - estimate.unsqueeze(1)) ** 2).sum(1)
    error = (score.denoise(x, t) - estimate) / square.sqrt()
    assert float(error.abs().max()) < 4.5


# Far from 0, squares of the data are large and their differences are not.


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_the_spread_of_points_does_not_depend_on_where_they_are(offset: float) -> None:
    x = offset + torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for dtype in (torch.float32, F64) if offset < 1e8 else (F64,):
        data = x.to(dtype)
        exact = np.sqrt(data.numpy().astype(np.longdouble).var(0).mean())
        assert Empirical(EDM(), data).facts.std == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_the_spread_of_a_mixture_weighs_its_components(offset: float) -> None:
    """Var = sum pi c^2 + pi_1 pi_2 d^2 of two components at distance d, by coordinate."""
    pi, d, c = [0.9, 0.1], torch.tensor([3.0, -1.0], dtype=F64), torch.tensor([0.2, 0.7])
    means = offset + torch.stack([0 * d, d])
    between = 0.9 * 0.1 * d.square()
    each = torch.tensor([[0.2, 0.5], [0.7, 0.1]])
    for std, within in (
        (0.3, 0.09),
        (c, 0.9 * 0.2**2 + 0.1 * 0.7**2),
        (each, 0.9 * each[0] ** 2 + 0.1 * each[1] ** 2),
    ):
        exact = math.sqrt(float((between + within).mean()))
        assert GaussianMixture(VP(), pi, means, std).facts.std == pytest.approx(exact, rel=1e-7)
    covariances = torch.diag_embed(each**2)
    full = CorrelatedMixture(VP(), pi, means, covariances)
    assert full.facts.std == pytest.approx(exact, rel=1e-7)


def test_chunks_of_components_have_one_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    means, weights = torch.randn(50, 4, dtype=F64), torch.rand(50, dtype=F64)
    std = torch.rand(50, 4, dtype=F64)
    whole = GaussianMixture(VP(), weights, means, std)
    monkeypatch.setattr(exact, "_BUDGET", 35)
    parts = GaussianMixture(VP(), weights, means, std)
    assert parts.facts.std == pytest.approx(whole.facts.std, rel=1e-13)


@pytest.mark.parametrize("each", [False, True])
def test_posteriors_do_not_depend_on_where_the_data_are(each: bool) -> None:
    """Moved by 1e6, |x|^2 is 1e12 and float64 leaves 1e-4 of it: the exponents are of order 1.

    Positions are kept to 1e-10, so scores of size 1 / sigma = 100 to 1e-10 / sigma^2 = 1e-6.
    """
    generator, sde, sigma = torch.Generator().manual_seed(0), EDM(), 0.01
    means = 0.02 * torch.randn(40, 3, generator=generator, dtype=F64)
    std = 0.005 * torch.rand(40, 3, generator=generator, dtype=F64) if each else 0.005
    x = means[:5] + sigma * torch.randn(5, 3, generator=generator, dtype=F64)
    here, there = (GaussianMixture(sde, torch.ones(40), m, std) for m in (means, means + 1e6))
    for t in (sigma, torch.full((5,), sigma, dtype=F64)):
        torch.testing.assert_close(there(x + 1e6, t), here(x, t), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            there.log_prob(x + 1e6, t), here.log_prob(x, t), rtol=1e-6, atol=1e-5
        )


# Learned scores.


class Oracle(nn.Module):
    """A network that returns, for Gaussian data N(m, c^2), the exact value of what it predicts.

    It sees what every network sees, c_in x and c_noise, and undoes it.
    """

    def __init__(self, sde: LinearSDE, prediction: str, m: float, c: float, data_std: float):
        super().__init__()
        self.sde, self.prediction, self.m, self.c, self.data_std = sde, prediction, m, c, data_std

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        ratio = torch.exp(4 * c_noise)
        t = self.sde.time_at(-2 * torch.log(ratio))
        alpha, sigma = (f(t).reshape(-1, 1) for f in (self.sde.alpha, self.sde.sigma))
        v = (alpha * self.data_std) ** 2 + sigma**2
        x = x * torch.sqrt(v)
        spread = (alpha * self.c) ** 2 + sigma**2
        x_0 = self.m + alpha * self.c**2 / spread * (x - alpha * self.m)
        z = (x - alpha * x_0) / sigma
        skip = alpha * self.data_std**2 / v
        out = sigma * self.data_std / torch.sqrt(v)
        return {
            "noise": z,
            "data": x_0,
            "velocity": (alpha * z - sigma * x_0) / torch.hypot(alpha, sigma),
            "flow": z - x_0,
            "score": -z / sigma,
            "preconditioned": (x_0 - skip * x) / out,
        }[self.prediction]


@pytest.mark.parametrize(
    "prediction", ["noise", "data", "velocity", "flow", "score", "preconditioned"]
)
@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("data_std", [1.0, 0.4])
def test_every_prediction_is_the_same_score(
    sde: LinearSDE, prediction: str, data_std: float
) -> None:
    m, c = 0.7, 0.5
    score = Gaussian(sde, torch.full((3,), m, dtype=F64), c)
    oracle = Oracle(sde, prediction, m, c, data_std)
    learned = ScoreNetwork(oracle, sde, prediction, Facts(std=data_std))  # type: ignore[arg-type]
    for t in times(sde, 5):
        # A network is told of no more noise than 10,000 times the signal.
        t = t.clamp_max(float(sde.time_at(-2 * math.log(1e4))))
        x = start(score, 5, t)
        torch.testing.assert_close(learned(x, t), score(x, t), rtol=1e-8, atol=1e-8)


def test_a_network_sees_unit_variance_and_the_noise_level() -> None:
    """The input depends on the ratio sigma / alpha alone: clocks and processes agree."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            seen.append((x, c_noise))
            return x

    c, ratio = 0.6, 0.8
    for sde in PROCESSES:
        data = Gaussian(sde, torch.zeros(1, dtype=F64), c)
        t = sde.time_at(-2 * math.log(ratio))
        x = start(data, 4000, float(t))
        ScoreNetwork(Spy(), sde, facts=Facts(std=c))(x, t)
        level = seen[-1][1]
        assert float(seen[-1][0].var()) == pytest.approx(1, abs=4 * math.sqrt(2 / 4000))
        assert level.shape == ()
        assert float(level) == pytest.approx(math.log(ratio) / 4, rel=1e-9)
        ScoreNetwork(Spy(), sde, facts=Facts(std=c))(x[:3], t.expand(3))
        assert seen[-1][1].shape == (3,)


OTHERS = [
    VP(Cosine()),
    SubVP(),
    VE(Geometric(0.01, 50.0)),
    EDM(),
    RectifiedFlow(),
    CriticallyDamped(),
]


@pytest.mark.parametrize("prediction", ["noise", "data", "velocity", "flow", "preconditioned"])
@pytest.mark.parametrize("other", OTHERS, ids=lambda sde: type(sde).__name__)
def test_the_schedule_of_a_trained_denoiser_can_be_changed(
    other: KernelSDE, prediction: Prediction
) -> None:
    """D(y, w) is one function under every process; times are matched by noise to signal."""
    torch.manual_seed(0)
    net = MLP((3,), 16, 1).double()
    nn.init.normal_(net.output.weight, std=0.5)
    sde = VP()
    model = ScoreNetwork(net, sde, prediction, Facts(std=0.6))
    moved = model.under(other)
    assert moved.net is net
    assert moved.facts is model.facts
    assert (model.sde, moved.sde) == (sde, other)
    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for log_snr in torch.linspace(4.0, -6.0, 5, dtype=F64):
        t, s = (p.time_at(log_snr) for p in (sde, other))
        alpha = other.alpha(s) if isinstance(other, LinearSDE) else 1.0
        state = alpha * y
        if isinstance(other, MatrixSDE):  # a state with y for its statistic
            state = torch.stack([y, torch.zeros_like(y)], 1)
            seen = other.statistic(state, other.channel(s))
            state[:, 0] *= y / seen
        found, wanted = moved.denoise(state, s), model.denoise(sde.alpha(t) * y, t)
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    back = moved.under(sde)
    torch.testing.assert_close(back(y, 0.3), model(y, 0.3), rtol=0, atol=0)


@pytest.mark.parametrize("other", OTHERS, ids=lambda sde: type(sde).__name__)
def test_what_was_learned_under_one_process_samples_the_same_law_under_another(
    other: KernelSDE,
) -> None:
    """The network that is right for Gaussian data under VP draws them under all."""
    m, c, n = 0.7, 0.5, 4000
    oracle = Oracle(VP(), "velocity", m, c, 0.5)
    model = ScoreNetwork(oracle, VP(), "velocity", Facts(shape=(1,), std=0.5))
    for score in (model, model.under(other)):
        x = sample(score, n, steps=30, seed=0, dtype=F64)
        assert float(x.mean()) == pytest.approx(m, abs=4 * c / math.sqrt(n))
        assert float(x.std()) == pytest.approx(c, abs=4 * c / math.sqrt(2 * n))


def test_one_path_serves_all_processes() -> None:
    """On grids of the same ratios the states over alpha are the same, step by step."""
    model = ScoreNetwork(Oracle(VP(), "data", 0.7, 0.5, 0.5), VP(), "data", Facts((2,), 0.5))
    ratios = torch.tensor([20.0, 5.0, 1.0, 0.3, 0.05], dtype=F64)
    z, paths = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64), []
    for sde in (VP(), VP(Cosine()), SubVP(), VE(), EDM()):
        grid = from_table(sde, ratios)
        flow = sde.probability_flow(model.under(sde))
        path = solve(flow, sde.sigma(grid[0]) * z, grid, Exponential(2), trajectory=True)
        paths.append(path / sde.alpha(grid)[:, None, None])
    for path in paths[1:]:
        torch.testing.assert_close(path, paths[0], rtol=1e-7, atol=1e-8)


def test_a_network_that_predicts_the_score_stays_where_it_is() -> None:
    model = ScoreNetwork(MLP((2,), 8, 1), VP(), "score")
    assert model.under(VP()).sde == VP()
    with pytest.raises(ValueError, match="predicts the score of the states of VP"):
        model.under(EDM())
    with pytest.raises(TypeError, match="sde must be a LinearSDE, got str"):
        model.under("EDM")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("alias", "name"), [("epsilon", "noise"), ("x0", "data"), ("v", "velocity")]
)
def test_predictions_go_by_the_names_of_papers_too(alias: Alias, name: Prediction) -> None:
    net, x = MLP((2,)), torch.randn(3, 2)
    model = ScoreNetwork(net, VP(), alias)
    assert model.prediction == name
    assert torch.equal(model(x, 0.3), ScoreNetwork(net, VP(), name)(x, 0.3))


def test_small_noise_does_not_lose_the_prediction() -> None:
    """Half precision out of the network: the coefficients 1 / sigma still act in float32."""

    class Half(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return torch.full_like(x, 0.5, dtype=torch.float16)

    sde, t = EDM(), 1e-6
    x = torch.zeros(2, 3)
    score = ScoreNetwork(Half(), sde, "noise")(x, t)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.full_like(x, -0.5e6), rtol=1e-6, atol=0)


def test_a_network_knows_its_shape_and_device() -> None:
    net = nn.Linear(2, 2)
    net.shape, net.classes = (3, 2), 10  # type: ignore[assignment]
    score = ScoreNetwork(net, VP())
    assert score.shape == (3, 2)
    assert score.classes == 10
    assert score.device == torch.device("cpu")
    assert score.singular
    assert isinstance(score, Score)
    assert {name for name, _ in score.named_parameters()} == {"net.weight", "net.bias"}


@pytest.mark.parametrize("sde", [VP(), EDM(), CriticallyDamped()], ids=lambda s: type(s).__name__)
def test_a_network_is_asked_within_its_times_only(sde: KernelSDE) -> None:
    score = ScoreNetwork(MLP((2,), 8, 1), sde)
    x = torch.zeros(2, *sde.state_shape((2,)))
    for t in (-0.1, 1.01 * sde.T, math.nan, torch.tensor([0.5 * sde.T, 2 * sde.T])):
        with pytest.raises(ValueError, match=rf"times must lie in \[0, T\] = \[0, {sde.T}\]"):
            score(x, t)
        with pytest.raises(ValueError, match="times must lie in"):
            network_input(sde, 1.0, x, t)
    assert bool(score(x, sde.T).isfinite().all())


# Sums.


def test_processes_of_one_law_may_be_added() -> None:
    mean, x = torch.ones(2), torch.randn(3, 2)
    for one, other in (
        (VP(), VP()),
        (EDM(), VE(Power(2.0, T=80.0))),
        (OrnsteinUhlenbeck(), VP(Linear(2.0, 2.0, T=5.0))),
        (VP(), Copy(VP())),
        (CriticallyDamped(), CriticallyDamped()),
        (
            VP(),
            MatrixOrnsteinUhlenbeck((-torch.eye(2) / 2).tolist(), torch.eye(2).tolist(), Linear()),
        ),
    ):
        if isinstance(one, LinearSDE) and isinstance(other, LinearSDE):
            a, b = Gaussian(one, mean), Gaussian(other, mean)
            torch.testing.assert_close((a + b)(x, 0.3), 2 * a(x, 0.3))
        assert one.agrees(other)
        assert other.agrees(one)


class Copy(LinearSDE):
    """A process of somebody's own, with all but its two functions by quadrature."""

    def __init__(self, sde: LinearSDE) -> None:
        self.of, self.T = sde, sde.T

    def __repr__(self) -> str:
        return f"Copy({self.of!r})"

    def rate(self, t: Time) -> Tensor:
        return self.of.rate(t)

    def diffusion(self, t: Time) -> Tensor:
        return self.of.diffusion(t)


@pytest.mark.parametrize(
    "other",
    [
        VE(),
        SubVP(),
        VP(Linear(0.1, 20.01)),
        VP(Linear(0.1, 20.0, T=2.0)),
        VP(Cosine()),
        Copy(SubVP()),
        CriticallyDamped(),
        MatrixOrnsteinUhlenbeck(((-0.5, 0.1), (0.0, -0.5)), ((1.0, 0.0), (0.0, 1.0)), Linear()),
    ],
    ids=repr,
)
def test_scores_of_different_processes_are_not_added(other: KernelSDE) -> None:
    sde, mean = VP(), torch.ones(2)
    second = (
        CorrelatedMixture(other, torch.ones(1), mean[None], torch.eye(2))
        if isinstance(other, MatrixSDE)
        else Gaussian(other, mean)  # type: ignore[arg-type]
    )
    first = Gaussian(sde, mean)
    assert not (sde.agrees(other) and other.agrees(sde))
    for add in (
        lambda: first + second,
        lambda: second - first,
        lambda: 2 * first + 3 * second,
        lambda: first + second.given(y=1),
        lambda: (first + (lambda x, t: -x)) + second,
    ):
        with pytest.raises(ValueError, match=r"must have one process: .* has .*VP"):
            add()
    with pytest.raises(ValueError, match="process to reverse is"):
        sde.reverse(second)


def test_a_score_of_a_longer_process_serves_a_shorter_one() -> None:
    """Up to their ends they are one process: the flow is that of the short one."""
    short, long = OrnsteinUhlenbeck(end=2.0), OrnsteinUhlenbeck(end=5.0)
    score, x = Gaussian(long, torch.ones(2)), torch.randn(3, 2)
    own = Gaussian(short, torch.ones(2))
    flow = short.probability_flow(score)
    torch.testing.assert_close(flow.drift(x, 2.0), short.probability_flow(own).drift(x, 2.0))
    with pytest.raises(ValueError, match="process to reverse is"):
        long.probability_flow(own)
    for one, other in ((score, own), (own, score)):
        with pytest.raises(ValueError, match="one process"):
            one + other


def test_scores_of_different_shapes_or_devices_are_not_added() -> None:
    sde = VP()
    pair, triple = Gaussian(sde, torch.ones(2)), Gaussian(sde, torch.ones(3))
    with pytest.raises(ValueError, match=r"one shape: Gaussian has \(2,\), Gaussian has \(3,\)"):
        pair + triple
    with pytest.raises(ValueError, match=r"one shape"):
        pair + ScoreNetwork(MLP((1, 2), 8, 1), sde)
    away = ScoreNetwork(MLP((2,), 8, 1), sde).to("meta")
    for score in (away, away.given(y=1), 2 * away):
        with pytest.raises(ValueError, match=r"one device: .*cpu.*meta"):
            pair + score
    # A score that brings no tensors lives wherever the others do.
    assert (Labelled() + away).device == (away + Labelled().given(y=1.0)).device == away.device


def test_a_term_that_would_be_broadcast_is_refused() -> None:
    total = 2 * Gaussian(VP(), torch.zeros(2)) + (lambda x, t: x[:, :1])
    with pytest.raises(ValueError, match=r"returned shape \(3, 1\) for a state \(3, 2\)"):
        total(torch.zeros(3, 2), 0.5)


def test_weights_of_one_row_a_sample_follow_the_rows() -> None:
    sde, x = VP(), torch.randn(6, 2, dtype=F64)
    a, b = mixture(sde), ring(sde)
    w = torch.arange(6.0)
    expected = w.unsqueeze(1) * a(x, 0.4) + 2 * b(x, 0.4)
    for weight in (w, w.numpy(), w.tolist(), w.numpy().astype(np.int32)):
        total = weight * a + b * np.float32(2.0)
        assert isinstance(total, Score)
        assert total.batch == 6
        torch.testing.assert_close(total(x, 0.4), expected)
        for index in (slice(2, 5), torch.tensor([4, 0]), w > 2):
            part = total.rows(index)
            torch.testing.assert_close(part(x[index], 0.4), expected[index])
    chunked, whole = (
        solve(sde.probability_flow(total), x, [1.0, 0.6, 0.3], Heun(), 0, chunk=chunk)
        for chunk in (4, None)
    )
    torch.testing.assert_close(chunked, whole)
    with pytest.raises(ValueError, match=r"weight must be a number or \(B,\), got shape \(2, 1\)"):
        a * torch.ones(2, 1)
    with pytest.raises(TypeError, match=r"a weight must be real, got torch\.complex64"):
        a * torch.tensor(1j)


def test_what_is_bound_is_bound_for_one_batch() -> None:
    sde, y = VP(), torch.arange(4)
    model = ScoreNetwork(MLP((2,), 8, 1, classes=5), sde)
    assert model.batch is mixture(sde).batch is (model + mixture(sde)).batch is None
    assert model.given(y=2).batch is model.given(y=torch.tensor(2)).batch is None
    for four in (
        model.given(y=y),
        model.given(y=2).given(y=y),
        mixture(sde) + 2 * model.given(y=y),
        Lifted(ScoreNetwork(MLP((2,), 8, 1, classes=5), EDM(1e3)), CriticallyDamped()).given(y=y),
    ):
        assert four.batch == 4
        assert four.rows(slice(1, 3)).batch == 2
        for index in (slice(2, 6), slice(4, 8), torch.tensor([1, 4]), torch.ones(5) > 0):
            with pytest.raises(ValueError, match=r"rows .* of what was given for 4 samples"):
                four.rows(index)
        with pytest.raises(ValueError, match="given for 4 samples, the state has 3"):
            four(torch.zeros(3, *four.sde.state_shape((2,))), 0.5)  # type: ignore[union-attr]
    for wrong in (
        lambda: model.given(y=y, mask=torch.ones(5)),
        lambda: model.given(y=y).given(mask=torch.ones(5)),
        lambda: model.given(y=y) + model.given(y=torch.arange(3)),
        lambda: model.given(y=y) * torch.ones(3),
    ):
        with pytest.raises(ValueError, match=r"one batch size: .* has 4, .* has (5|3)"):
            wrong()


def test_context_may_be_arrays_lists_and_numbers() -> None:
    model = ScoreNetwork(MLP((2,), 8, 1, classes=5), VP()).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    x, y = torch.randn(4, 2), torch.tensor([3, 0, 1, 4])
    expected = model(x, 0.5, y=y)
    for labels in (y, y.int(), y.tolist(), tuple(y.tolist()), y.numpy(), y.numpy().astype("u1")):
        bound = model.given(y=labels)
        torch.testing.assert_close(bound(x, 0.5), expected, rtol=0, atol=0)
        torch.testing.assert_close(bound.rows(slice(1, 3))(x[1:3], 0.5), expected[1:3])
    ones = model(x, 0.5, y=torch.ones(4, dtype=torch.int64))
    for label in (1, np.int64(1), np.array(1), torch.tensor(1)):
        torch.testing.assert_close(model.given(y=label)(x, 0.5), ones, rtol=0, atol=0)
    away = ScoreNetwork(MLP((2,), 8, 1, classes=5), VP()).to("meta").given(y=y.tolist())
    assert isinstance(away, Given)
    assert away.context["y"].device == away.device == torch.device("meta")
    words = Labelled().given(names=["a", "b"], ragged=[[1], [1, 2]], y=np.float32(2))
    assert isinstance(words, Given)
    assert words.batch is None
    assert words.context["names"] == ["a", "b"]


class Counting(Score):
    def __init__(self, score: Score) -> None:
        self.score, self.calls = score, 0
        self.sde, self.facts = score.sde, score.facts

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        self.calls += 1
        return self.score(x, t)


def test_scores_form_a_vector_space() -> None:
    sde, x = VP(), torch.randn(5, 2, dtype=F64)
    a, b, t = mixture(sde), ring(sde), 0.4
    for total, expected in [
        (a + b, a(x, t) + b(x, t)),
        (a - b, a(x, t) - b(x, t)),
        (2.5 * a, 2.5 * a(x, t)),
        (a * 2.5, 2.5 * a(x, t)),
        (-a, -a(x, t)),
        (2 * (a + 3 * b) - a, a(x, t) + 6 * b(x, t)),
        (a + (lambda x, t: -x), a(x, t) - x),
        ((lambda x, t: -x) + a, a(x, t) - x),
        (0 * a, torch.zeros_like(x)),
    ]:
        torch.testing.assert_close(total(x, t), expected)
        assert total.sde is sde
        assert total.shape == (2,)
        assert not total.singular
    assert (a + points(sde)).singular


def test_weights_may_be_functions_of_time() -> None:
    sde, x = VP(), torch.randn(3, 2, dtype=F64)
    a, b = mixture(sde), ring(sde)
    t = torch.tensor([0.1, 0.4, 0.8], dtype=F64)

    def interval(t: Tensor) -> Tensor:
        return ((t > 0.2) & (t < 0.6)) * 1.5

    total = a + b * interval
    expected = a(x, t) + torch.tensor([[0.0], [1.5], [0.0]], dtype=F64) * b(x, t)
    torch.testing.assert_close(total(x, t), expected)
    torch.testing.assert_close(total(x, 0.4), a(x, 0.4) + 1.5 * b(x, 0.4))
    single = total(x.float(), t)
    assert single.dtype == torch.float32


def test_a_term_of_weight_0_is_not_evaluated() -> None:
    sde, x = VP(), torch.randn(3, 2, dtype=F64)
    a, b = Counting(mixture(sde)), Counting(ring(sde))
    total = a + b * (lambda t: 2.0 if 0.2 < float(t) < 0.6 else 0.0) + 0 * b + 0.0 * a
    for t in (0.1, 0.4, 0.7):
        total(x, t)
    assert (a.calls, b.calls) == (3, 1)


def test_products_of_gaussians_are_exact_at_the_data() -> None:
    """Densities multiply, scores add: precisions add at t = 0; tempering divides the variance."""
    sde, x = VP(), torch.randn(4, 3, dtype=F64)
    m_1, m_2 = torch.randn(2, 3, dtype=F64)
    p, q = Gaussian(sde, m_1, 0.5), Gaussian(sde, m_2, 2.0)
    precision = 1 / 0.25 + 1 / 4
    mean = (m_1 / 0.25 + m_2 / 4) / precision
    product = Gaussian(sde, mean, 1 / math.sqrt(precision))
    torch.testing.assert_close((p + q)(x, 0.0), product(x, 0.0))
    tempered = Gaussian(sde, m_1, 0.5 / math.sqrt(3))
    torch.testing.assert_close((3 * p)(x, 0.0), tempered(x, 0.0))
    # At t > 0 neither is exact: noising does not commute with the product.
    assert float(((3 * p)(x, 0.5) - tempered(x, 0.5)).abs().max()) > 0.1


class Labelled(Score):
    """A score that shifts by its labels."""

    def __call__(self, x: Tensor, t: Time, y: Tensor | float = 0.0) -> Tensor:
        return as_time(t) * x + torch.as_tensor(y, dtype=x.dtype).reshape(-1, 1)


def test_context_follows_the_rows() -> None:
    x, y = torch.randn(6, 2, dtype=F64), torch.arange(6.0)
    bound = Labelled().given(y=y)
    whole = bound(x, 0.5)
    for index in (slice(2, 5), torch.tensor([4, 0])):
        torch.testing.assert_close(bound.rows(index)(x[index], 0.5), whole[index])
        both = (2 * bound + mixture(VP())).rows(index)
        expected = 2 * whole[index] + mixture(VP())(x[index], 0.5)
        torch.testing.assert_close(both(x[index], 0.5), expected)
    torch.testing.assert_close(bound.given(y=1.0)(x, 0.5), Labelled()(x, 0.5, y=1.0))
    torch.testing.assert_close((bound + bound).given(y=1.0)(x, 0.5), 2 * (0.5 * x + 1))
    assert bound.rows(slice(0, 2)).given(y=3.0)(x, 0.5).shape == x.shape


def test_a_bare_score_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="Score must define __call__"):
        Score()(torch.zeros(1), 0.5)
