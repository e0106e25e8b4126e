"""Guidance against Bayes' rule, with classifiers and conditional scores that are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import F64, start
from torch import Tensor, nn

from sde_gen import (
    EDM,
    VE,
    VP,
    Classifier,
    ClassifierFree,
    Facts,
    Gaussian,
    GaussianMixture,
    LinearSDE,
    Score,
    SubVP,
    grids,
    solve,
)
from sde_gen.guidance import classifier_loss
from sde_gen.ops import Time, as_time
from sde_gen.schedules import Geometric
from sde_gen.solvers import Heun, RungeKutta

PROCESSES = [VP(), SubVP(), VE(Geometric(0.01, 5.0)), EDM(8.0)]
LABELS = torch.tensor([0, 0, 1, 1, 1, 2])
"""Class of each component: three classes that are themselves mixtures."""


def parts(sde: LinearSDE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    means = 1.5 * torch.randn(6, 2, generator=generator, dtype=F64)
    weights = torch.arange(1.0, 7.0, dtype=F64)
    return weights, means, torch.linspace(0.2, 0.6, 6, dtype=F64)


def everything(sde: LinearSDE) -> GaussianMixture:
    return GaussianMixture(sde, *parts(sde))


def of_class(sde: LinearSDE, y: int) -> GaussianMixture:
    return GaussianMixture(sde, *(p[y == LABELS] for p in parts(sde)))


class ExactClassifier(nn.Module):
    """log p(y | x_t) of the mixture, as a network: what it sees is undone."""

    def __init__(self, sde: LinearSDE, data_std: float) -> None:
        super().__init__()
        self.sde, self.data_std = sde, data_std
        self.scores = [of_class(sde, y) for y in range(3)]
        self.share = torch.stack([parts(sde)[0][y == LABELS].sum() for y in range(3)])

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        t = self.sde.time_at(-8 * c_noise)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        x = x * torch.sqrt((alpha * self.data_std) ** 2 + sigma**2).reshape(-1, 1)
        joint = [score.log_prob(x, t) for score in self.scores]
        return torch.stack(joint, 1) + self.share.log()


class ExactConditional(Score):
    """Scores of the classes by label, -1 for all data; counts its calls."""

    classes = 3

    def __init__(self, sde: LinearSDE) -> None:
        self.sde, self.facts, self.calls = sde, Facts((2,)), 0
        self.table = {y: of_class(sde, y) for y in range(3)} | {-1: everything(sde)}

    def __call__(self, x: Tensor, t: Time, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        assert y is not None
        t = as_time(t).expand(len(x))
        rows = [self.table[int(k)](x[i : i + 1], t[i]) for i, k in enumerate(y)]
        return torch.cat(rows)


def states(sde: LinearSDE, n: int) -> tuple[Tensor, Tensor]:
    t = sde.T * torch.linspace(0.05, 0.9, n, dtype=F64)
    return start(everything(sde), n, t), t


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_posterior_gradient_and_score_are_the_class_score(sde: LinearSDE) -> None:
    """Bayes' rule with the library's own posterior, by autograd."""
    score = everything(sde)
    x, t = states(sde, 8)
    for y in range(3):
        x.requires_grad_()
        log_p = torch.log(score.posterior(x, t)[:, y == LABELS].sum(1))
        (gradient,) = torch.autograd.grad(log_p.sum(), x)
        x = x.detach()
        torch.testing.assert_close(score(x, t) + gradient, of_class(sde, y)(x, t))


@pytest.mark.parametrize("data_std", [1.0, 0.7])
@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_an_exact_classifier_makes_the_class_score(sde: LinearSDE, data_std: float) -> None:
    net, score = ExactClassifier(sde, data_std), everything(sde)
    x, t = states(sde, 6)
    for y in (1, torch.tensor([0, 1, 2, 2, 1, 0])):
        guided = score + Classifier(net, y, sde, Facts(std=data_std))
        labels = torch.as_tensor(y).expand(6)
        expected = ExactConditional(sde)(x, t, labels)
        torch.testing.assert_close(guided(x, t), expected, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(
            guided(x[:2], t[0]) if isinstance(y, int) else guided.rows(slice(0, 2))(x[:2], t[0]),
            ExactConditional(sde)(x[:2], t[0], labels[:2]),
            rtol=1e-7,
            atol=1e-7,
        )


def test_a_scaled_classifier_is_the_formula() -> None:
    """s + (1 + gamma) grad log p(y | x): with the classifier exact, (1 + gamma) s_y - gamma s."""
    sde, gamma = VP(), 2.5
    score, (x, t) = everything(sde), states(sde, 5)
    guided = score + (1 + gamma) * Classifier(ExactClassifier(sde, 1.0), 2, sde)
    expected = (1 + gamma) * of_class(sde, 2)(x, t) - gamma * score(x, t)
    torch.testing.assert_close(guided(x, t), expected, rtol=1e-7, atol=1e-7)


def test_classifier_log_prob_is_a_probability() -> None:
    sde = VP()
    x, t = states(sde, 5)
    net = ExactClassifier(sde, 1.0)
    total = sum(Classifier(net, y, sde).log_prob(x, t).exp() for y in range(3))
    torch.testing.assert_close(total, torch.ones(5, dtype=F64))
    exact = everything(sde).posterior(x, t)[:, LABELS == 1].sum(1)
    got = Classifier(net, 1, sde).log_prob(x, t)
    torch.testing.assert_close(got.exp(), exact, rtol=1e-8, atol=1e-10)


def test_a_classifier_works_without_autograd_and_inside_it() -> None:
    sde = VP()
    x, t = states(sde, 3)
    term = Classifier(ExactClassifier(sde, 1.0), 1, sde)
    plain = term(x, t)
    with torch.no_grad():
        assert torch.equal(term(x, t), plain)
    # Differentiated again: its divergence, by forward differences of itself.
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: term(v.unsqueeze(0), 0.4)[0]))(x)
    h = 1e-5
    for i in range(2):
        e = torch.zeros_like(x)
        e[:, i] = h
        difference = (term(x + e, 0.4) - term(x - e, 0.4)) / (2 * h)
        torch.testing.assert_close(jacobian[:, :, i], difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.5, 3.0])
def test_classifier_free_is_the_formula_in_one_call(sde: LinearSDE, weight: float) -> None:
    score, (x, t) = ExactConditional(sde), states(sde, 6)
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    given, free = score(x, t, y), everything(sde)(x, t)
    score.calls = 0
    guided = ClassifierFree(score, weight, y=y)
    torch.testing.assert_close(guided(x, t), (1 + weight) * given - weight * free)
    assert score.calls == 1
    one = ClassifierFree(score, weight, y=1)(x, 0.3 * sde.T)
    ones = torch.ones(6, dtype=torch.int64)
    given, free = score(x, 0.3 * sde.T, ones), everything(sde)(x, 0.3 * sde.T)
    torch.testing.assert_close(one, (1 + weight) * given - weight * free)


def test_both_guidances_agree_where_both_are_exact() -> None:
    """By Bayes' rule they are the same function, weight for weight."""
    sde, y = VP(), torch.tensor([2, 1, 0, 0])
    x, t = states(sde, 4)
    by_classifier = everything(sde) + 3.0 * Classifier(ExactClassifier(sde, 1.0), y, sde)
    free = ClassifierFree(ExactConditional(sde), 2.0, y=y)
    torch.testing.assert_close(by_classifier(x, t), free(x, t), rtol=1e-7, atol=1e-7)


def test_guidance_intervals() -> None:
    """A weight that is a function of time; where it is the number 0, one half is not computed."""
    sde, y = VP(), torch.tensor([0, 1, 2])
    widths: list[int] = []

    class Width(ExactConditional):
        def __call__(self, x: Tensor, t: Time, y: Tensor | None = None) -> Tensor:
            widths.append(len(x))
            return super().__call__(x, t, y)

    score, (x, _) = Width(sde), states(sde, 3)
    guided = ClassifierFree(score, lambda t: 2.0 if float(t) > 0.3 else 0.0, y=y)
    torch.testing.assert_close(guided(x, 0.2), score(x, 0.2, y))
    expected = 3 * score(x, 0.5, y) - 2 * everything(sde)(x, 0.5)
    torch.testing.assert_close(guided(x, 0.5), expected)
    assert widths == [3, 3, 3, 6]
    t = torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    each = ClassifierFree(score, lambda t: 2.0 * (t > 0.3), y=y)
    w = torch.tensor([[0.0], [2.0], [2.0]], dtype=F64)
    expected = (1 + w) * score(x, t, y) - w * everything(sde)(x, t)
    torch.testing.assert_close(each(x, t), expected)


def test_guidance_follows_the_rows_of_a_batch() -> None:
    sde, y = VP(), torch.tensor([0, 1, 2, 1])
    x = start(everything(sde), 4, 1.0)
    for score in (
        everything(sde) + Classifier(ExactClassifier(sde, 1.0), y, sde),
        ClassifierFree(ExactConditional(sde), 1.5, y=y),
    ):
        times = grids.uniform(sde, 5, end=0.1)
        flow = sde.probability_flow(score)
        whole = solve(flow, x, times, Heun())
        assert torch.allclose(solve(flow, x, times, Heun(), chunk=3), whole, rtol=0, atol=1e-10)


def test_labels_guide_beside_other_context() -> None:
    """What else is bound to the score follows into both halves, bound before or after."""

    class Shifted(ExactConditional):
        def __call__(
            self, x: Tensor, t: Time, y: Tensor | None = None, shift: Tensor | None = None
        ) -> Tensor:
            assert shift is not None
            return super().__call__(x, t, y) + shift

    sde, y, shift = VP(), torch.tensor([0, 1, 2, 1]), torch.randn(4, 2, dtype=F64)
    x, t = states(sde, 4)
    plain = ClassifierFree(ExactConditional(sde), 1.5, y=y)(x, t)
    before = ClassifierFree(Shifted(sde).given(shift=shift), 1.5, y=y)
    after = ClassifierFree(Shifted(sde), 1.5, y=y).given(shift=shift)
    for guided in (before, after):
        torch.testing.assert_close(guided(x, t), plain + shift)
        torch.testing.assert_close(guided.rows(slice(1, 3))(x[1:3], t[1:3]), (plain + shift)[1:3])
    unguided = ClassifierFree(Shifted(sde).given(shift=shift), 0.0, y=y)
    torch.testing.assert_close(unguided(x, t), ExactConditional(sde)(x, t, y) + shift)


def test_a_label_given_later_takes_the_place_of_the_first() -> None:
    sde, (x, t) = VP(), states(VP(), 4)
    y = torch.tensor([2, 1, 0, 2])
    net = ExactClassifier(sde, 1.0)
    for make in (
        lambda y: ClassifierFree(ExactConditional(sde), 0.0, y=y),
        lambda y: ClassifierFree(ExactConditional(sde), 1.5, y=y),
        lambda y: ClassifierFree(ExactConditional(sde).given(y=0), 1.5, y=y),
        lambda y: Classifier(net, y, sde),
        lambda y: everything(sde) + 2.0 * Classifier(net, y, sde),
    ):
        wanted = make(y)(x, t)
        if isinstance(make(0), ClassifierFree | Classifier):
            torch.testing.assert_close(make(0).given(y=y)(x, t), wanted)
            ones = make(torch.tensor([0, 0, 1, 1])).given(y=1)
            torch.testing.assert_close(ones(x, t), make(1)(x, t))
        for labels in (y.tolist(), tuple(y.tolist()), y.numpy(), y.numpy().astype("u1"), y.int()):
            torch.testing.assert_close(make(labels)(x, t), wanted, rtol=0, atol=0)
        one = make(1)(x, t)
        for label in (np.int64(1), np.array(1), torch.tensor(1)):
            torch.testing.assert_close(make(label)(x, t), one, rtol=0, atol=0)


def test_labels_and_weights_are_for_one_batch() -> None:
    """Six labels for four samples are refused before chunks of two can find their two rows."""
    sde, net = VP(), ExactClassifier(VP(), 1.0)
    x = start(everything(sde), 4, 1.0)
    six, w = torch.arange(6) % 3, torch.rand(4)
    for score in (
        ClassifierFree(ExactConditional(sde), y=six),
        ClassifierFree(ExactConditional(sde), 0.0, y=six),
        ClassifierFree(ExactConditional(sde), torch.ones(6), y=1),
        ClassifierFree(ExactConditional(sde).given(shift=torch.zeros(6, 2)), y=1),
        everything(sde) + Classifier(net, six, sde),
    ):
        assert score.batch == 6
        for chunk in (None, 2):
            with pytest.raises(ValueError, match="6 samples, the state has 4"):
                solve(sde.probability_flow(score), x, [1.0, 0.5], Heun(), chunk=chunk)
        with pytest.raises(ValueError, match="given for 6 samples, the state has 4"):
            score(x, 0.5)
        with pytest.raises(ValueError, match=r"rows slice\(4, 8.* given for 6 samples"):
            score.rows(slice(4, 8))
    for wrong in (
        lambda: ClassifierFree(ExactConditional(sde), w, y=six),
        lambda: ClassifierFree(ExactConditional(sde).given(shift=w), y=six),
        lambda: Classifier(net, six, sde) + ClassifierFree(ExactConditional(sde), y=[0, 1, 2, 1]),
    ):
        with pytest.raises(ValueError, match="one batch size"):
            wrong()
    each = ClassifierFree(ExactConditional(sde), w, y=six[:4])
    given, free = ExactConditional(sde)(x, 0.5, six[:4]), everything(sde)(x, 0.5)
    wanted = given + w.unsqueeze(1) * (given - free)
    torch.testing.assert_close(each(x, 0.5), wanted)
    torch.testing.assert_close(each.rows(slice(1, 3))(x[1:3], 0.5), wanted[1:3])


def test_guided_gaussians_have_their_closed_form() -> None:
    """The guided flow of Gaussians is linear: its gain is known, and is not that of a product.

    With s_c of N(0, v_c) and s_u of N(0, v_u) under VE, dx / dw = -x / 2 [(1 + g) / (v_c + w)
    - g / (v_u + w)], so the gain from w_T to 0 is
    (v_c / (v_c + w_T))^((1 + g) / 2) ((v_u + w_T) / v_u)^(g / 2).
    """
    sde, g, v_c, v_u = EDM(10.0), 1.5, 0.3, 1.0
    zero = torch.zeros(1, dtype=F64)

    class Both(Score):
        def __call__(self, x: Tensor, t: Time, y: Tensor | None = None) -> Tensor:
            assert y is not None
            c, u = (Gaussian(sde, zero, math.sqrt(v))(x, t) for v in (v_c, v_u))
            return torch.where((y < 0).unsqueeze(1), u, c)

    x, w_T = torch.ones(1, 1, dtype=F64), 100.0
    flow = sde.probability_flow(ClassifierFree(Both(), g, y=0))
    y = solve(flow, x, grids.karras(sde, 400, end=1e-3), RungeKutta())
    exact = (v_c / (v_c + w_T)) ** ((1 + g) / 2) * ((v_u + w_T) / v_u) ** (g / 2)
    # The flow from t = 0.001 to 0 changes x by 3e-6 of itself.
    assert float(y) == pytest.approx(exact, rel=1e-5)


def test_classifier_loss_is_the_cross_entropy_of_noised_data() -> None:
    sde, net = VP(), ExactClassifier(VP(), 1.0)
    x = everything(sde).sample(50, torch.Generator().manual_seed(0))
    y, t = torch.randint(3, (50,)), torch.linspace(0.05, 1, 50, dtype=F64)
    before = torch.get_rng_state()
    loss = classifier_loss(net, sde, x, y, t, noise=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    x_t = sde.perturb(x, t, torch.Generator().manual_seed(7)).x
    exact = torch.stack(
        [everything(sde).posterior(x_t, t)[:, y_k == LABELS].sum(1) for y_k in range(3)], 1
    )
    expected = -torch.log(exact[torch.arange(50), y])
    assert loss.shape == (50,)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)


def test_the_exact_posterior_minimises_the_classifier_loss() -> None:
    """Cross-entropy is proper: any other temperature of the exact logits does worse."""
    sde, n = VP(), 20_000
    exact = ExactClassifier(sde, 1.0)
    score, generator = everything(sde), torch.Generator().manual_seed(1)
    component = torch.multinomial(score.log_weights.exp(), n, True, generator=generator)
    _, means, std = parts(sde)
    noise = torch.randn(n, 2, generator=generator, dtype=F64)
    x = means[component] + std[component].unsqueeze(1) * noise
    t = torch.linspace(0.05, 0.6, n, dtype=F64)

    class Tempered(nn.Module):
        def __init__(self, a: float) -> None:
            super().__init__()
            self.a = a

        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return self.a * torch.log_softmax(exact(x, c_noise), 1)

    losses = {
        a: classifier_loss(
            Tempered(a), sde, x, LABELS[component], t, noise=torch.Generator().manual_seed(2)
        )
        for a in (0.8, 1.0, 1.25)
    }
    for a in (0.8, 1.25):
        gain = losses[a] - losses[1.0]
        assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(n)


def test_guidance_knows_where_it_lives() -> None:
    sde = VP()
    net = nn.Linear(2, 3)
    net.shape = (2,)  # type: ignore[assignment]
    assert Classifier(net, 1, sde).device == net.weight.device
    assert Classifier(net, 1, sde).shape == (2,)
    free = ClassifierFree(ExactConditional(sde), y=1)
    assert free.sde is sde
    assert free.shape == (2,)
    assert not free.singular
