"""Corrected guidance against the exact laws of powers and products."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import F64, correlated, draw, line, mixture
from test_experts import Labelled, normal
from test_guidance import ExactClassifier, ExactConditional, everything, of_class
from torch import Tensor

import sde_gen as sg
from sde_gen import EDM, VP, Classifier, ClassifierFree, Gaussian, GaussianMixture, Score
from sde_gen.facts import Units
from sde_gen.guidance import Interval, Product, Tempered
from sde_gen.inverse import Particles, corrected
from sde_gen.inverse.cloud import Cloud

SDE = VP()


def below(found: Particles, points: Tensor) -> Tensor:
    """The distribution function of weighted draws on the line."""
    w = found.log_weights.exp()
    return ((found.x.flatten() <= points.unsqueeze(1)) * w).sum(1)


def on_a_grid(log_density: Tensor, grid: Tensor, points: Tensor) -> tuple[Tensor, float]:
    """Distribution function and log of the integral of exp(log_density), by quadrature."""
    h = float(grid[1] - grid[0])
    log_z = float(log_density.logsumexp(0)) + math.log(h)
    mass = (log_density - log_z).exp() * h
    return torch.stack([mass[grid <= p].sum() for p in points]), log_z


GRID = torch.linspace(-8, 8, 16_001, dtype=F64)
POINTS = torch.tensor([-1.1, -0.5, 0.0, 0.4, 0.8, 1.1], dtype=F64)


def agrees(found: Particles, log_density: Tensor, slack: float = 0.01) -> None:
    """Within 4.5 standard errors of the effective particles, and of the evidence; beside them
    what the steps leave."""
    exact, log_z = on_a_grid(log_density, GRID, POINTS)
    sharp = math.sqrt(float(found.ess.min()))
    error = (below(found, POINTS) - exact).abs().max()
    assert float(error) < 4.5 * 0.5 / sharp + slack
    assert abs(float(found.log_evidence) - log_z) < 4.5 * float(found.standard_error) + 0.03


def other(sde: Any = SDE) -> GaussianMixture:
    means = torch.tensor([[-0.9], [1.2]], dtype=F64)
    return GaussianMixture(sde, torch.tensor([0.6, 0.4]), means, torch.tensor([0.5, 0.3]))


@pytest.mark.parametrize("a", [0.5, 3.0])
def test_powers_of_gaussians_have_equal_weights_and_their_integral(a: float) -> None:
    p = Gaussian(SDE, draw(3), 0.6)
    found = corrected(Tempered(p, a), 50, 60, seed=0, probes=4, dtype=F64)
    torch.testing.assert_close(found.ess, torch.full_like(found.ess, 50.0), rtol=1e-5, atol=0)
    # log of the integral of N(m, v)^a in n = 3 coordinates; the steps' rule is of order 2.
    exact = 1.5 * ((1 - a) * math.log(2 * math.pi * 0.36) - math.log(a))
    assert float(found.log_evidence) == pytest.approx(exact, abs=0.03)


def test_a_tempered_mixture_has_the_weights_of_its_modes() -> None:
    """Components of unequal widths: the power moves mass to the narrow ones, which the tempered
    reversal alone does not follow."""
    p, a = other(), 3.0
    found = corrected(Tempered(p, a), 2000, 80, seed=1, dtype=F64)
    agrees(found, a * p.log_prob(GRID.unsqueeze(1)))
    alone = sg.sample(Tempered(p, a), 4000, 80, seed=0, dtype=F64)
    exact, _ = on_a_grid(a * p.log_prob(GRID.unsqueeze(1)), GRID, POINTS[2:3])
    off = abs(float((alone <= 0).double().mean()) - float(exact))
    assert off > 4.5 * 0.5 / math.sqrt(4000) + 0.01


@pytest.mark.parametrize("sde", [SDE, EDM(80.0), sg.RectifiedFlow()], ids=repr)
def test_a_product_of_mixtures_is_exact(sde: Any) -> None:
    p, q = line(sde), other(sde)
    joint = p.log_prob(GRID.unsqueeze(1)) + q.log_prob(GRID.unsqueeze(1))
    agrees(corrected(p + q, 2000, 80, seed=0, dtype=F64), joint)


def test_guidance_samples_what_it_says() -> None:
    """p_c^(1 + g) / p^g on Gaussians, where the guided flow ends in 1.53 and 0.049."""
    sde, g = EDM(80.0), 1.5
    c, u = normal(sde, 1.0, 0.3), normal(sde, 0.0, 1.0)
    precision = (1 + g) / 0.3 - g
    mean, variance = (1 + g) / 0.3 / precision, 1 / precision
    for meant in ((1 + g) * c - g * u, Product([(c, 1 + g), (u, -g)])):
        found = corrected(meant, 2000, 80, seed=0, dtype=F64)
        sharp = math.sqrt(float(found.ess.min()))
        assert abs(float(found.mean) - mean) < 4.5 * math.sqrt(variance) / sharp + 0.005
        assert abs(float(found.std) ** 2 / variance - 1) < 4.5 * math.sqrt(2) / sharp + 0.02


def test_classifiers_and_labels_mean_the_same_product() -> None:
    """p p(y | x)^3 is p^-2 p_y^3, term for term."""
    x, y = draw(4, 2), torch.tensor([2, 1, 0, 0])
    p, free = everything(SDE), ClassifierFree(ExactConditional(SDE), 2.0, y=y)
    by_classifier = p + 3.0 * Classifier(ExactClassifier(SDE, 1.0), y, SDE)
    found, wanted = by_classifier.factors(x, 0.4), free.factors(x, 0.4)
    assert [w for w, _ in found] == [-2.0, 3.0]
    assert sorted(w for w, _ in wanted) == [-2.0, 3.0]
    by_power = dict(wanted)
    for w, s in found:
        torch.testing.assert_close(s, by_power[w], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(by_power[3.0][:1], of_class(SDE, 2)(x[:1], 0.4))
    nested = 2.0 * (p - 0.5 * correlated(SDE)) + Tempered(mixture(SDE), 1.5)
    assert [w for w, _ in nested.factors(x, 0.4)] == [2.0, -1.0, 1.5]


def test_each_label_has_particles_of_its_own() -> None:
    score, g = Labelled(SDE), 0.5
    found = corrected(ClassifierFree(score, g, y=[0, 2]), 400, 30, seed=0, dtype=F64)
    assert found.x.shape == (2, 400, 2)
    axis = torch.linspace(-4, 4, 201, dtype=F64)
    plane = torch.cartesian_prod(axis, axis)
    for i, y in enumerate((0, 2)):
        given: Any = score.table[y]
        whole: Any = score.table[-1]
        log_p = (1 + g) * given.log_prob(plane) - g * whole.log_prob(plane)
        w = torch.softmax(log_p, 0)
        mean = w @ plane
        std = (w @ (plane - mean) ** 2).sqrt()
        sharp = math.sqrt(float(found.ess[i].min()))
        assert float(((found.mean[i] - mean) / std).abs().max()) < 4.5 / sharp + 0.05


def test_weights_are_kept_where_nothing_is_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published fault: weights that are overwritten at each step (mean .125 for .625)."""
    monkeypatch.setattr(Cloud, "resample", lambda self, noise, t: None)
    p, a = other(), 2.0
    found = corrected(Tempered(p, a), 4000, 80, seed=0, dtype=F64)
    exact, _ = on_a_grid(a * p.log_prob(GRID.unsqueeze(1)), GRID, POINTS)
    n = float(1 / found.log_weights.exp().square().sum())
    error = float((below(found, POINTS) - exact).abs().max())
    assert error < 4.5 * 0.5 / math.sqrt(n) + 0.01
    assert float(found.log_weights.exp().max()) > 1.2 / 4000


def test_chunks_units_and_seeds() -> None:
    p, q = line(SDE), other()
    units = Units(torch.tensor(2.0), torch.tensor(3.0))
    told = [s.with_facts(sg.Facts((1,), s.facts.std, units=units)) for s in (p, q)]
    whole = corrected(p + q, 40, 12, seed=3, dtype=F64)
    parts = corrected(p + q, 40, 12, seed=3, dtype=F64, chunk=16)
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-8, atol=1e-8)
    scaled = corrected(told[0] + told[1], 40, 12, seed=3, dtype=F64)
    torch.testing.assert_close(scaled.x, 2 + 3 * whole.x)
    # Densities in other units: each is divided by 3, and dx is 3 times as long.
    assert float(scaled.log_evidence - whole.log_evidence) == pytest.approx(-math.log(3.0))
    assert not torch.equal(corrected(p + q, 40, 12, seed=4, dtype=F64).x, whole.x)


@pytest.mark.parametrize(
    ("meant", "error", "message"),
    [
        (lambda p: Interval(SDE, 0.1, 1.0) * p, TypeError, "a power of a density is one number"),
        (lambda p: p * torch.ones(4), TypeError, "a power of a density is one number"),
        (lambda p: p - 2 * p, ValueError, "powers sum to -1"),
        (
            lambda p: 2.0 * Classifier(ExactClassifier(SDE, 1.0), 1, SDE),
            ValueError,
            "classifiers alone",
        ),
        (lambda p: Score(), TypeError, "LinearSDE"),
    ],
)
def test_what_means_no_law_is_refused(meant: Any, error: type[Exception], message: str) -> None:
    score = meant(mixture(SDE))
    if isinstance(score, Score) and score.shape is None and score.sde is not None:
        score = score.with_facts(sg.Facts((2,)))
    with pytest.raises(error, match=message):
        corrected(score, 4, 3, seed=0)
    with pytest.raises(ValueError, match="eta"):
        corrected(mixture(SDE), 4, 3, seed=0, eta=0.0)
