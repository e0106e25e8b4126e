"""Split Gibbs: what it keeps, deflated and not, and what a flow in its place would do."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from problems import F64, correlated, draw, mixture
from torch import Tensor

from sde_gen import EDM, VP, Exponential, Facts, Gaussian, LinearSDE, Reverse, Score
from sde_gen.facts import Units
from sde_gen.inverse import (
    Matrix,
    Nonlinear,
    Observation,
    exact_posterior,
    gibbs,
)

SDE = VP()


def assert_law(x: Tensor, exact: Gaussian) -> None:
    """Mean and covariance of n independent draws, to 4.5 standard errors."""
    root = torch.linalg.cholesky(matrix(exact))
    z = torch.linalg.solve_triangular(root, (x - exact.mean).T, upper=False)
    n = len(x)
    assert float(z.mean(1).abs().max()) < 4.5 / math.sqrt(n)
    off = z @ z.T / n - torch.eye(len(z), dtype=F64)
    assert float(off.abs().max()) < 4.5 * math.sqrt(2 / n), off


def matrix(g: Gaussian) -> Tensor:
    m = g.facts.moments
    return m.apply((m.coefficient(m.values.numpy()),), (torch.eye(len(g.mean), dtype=F64),))


SEEN = Observation(Matrix(draw(1, 2, seed=4)), draw(1, seed=5), 0.3)


@pytest.mark.parametrize("sde", [VP(), EDM(20.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_deflated_sweeps_keep_the_exact_posterior(sde: LinearSDE, share: float) -> None:
    """For Gaussian data the prior's step is exact: no error but that of 20,000 draws."""
    prior = correlated(sde)
    exact = exact_posterior(prior, SEEN)
    assert isinstance(exact, Gaussian)
    x = exact.sample(20_000, torch.Generator().manual_seed(0))
    rho = share * 0.3 / float(SEEN.operator.matrix.norm())
    out = gibbs(prior, SEEN, x, 3, 2, seed=1, rho=rho, solver=Exponential(1, prior.facts.moments))
    assert float((out - x).abs().mean()) > rho / 10
    assert_law(out, exact)


def test_sweeps_forget_where_they_began() -> None:
    """From a point, by the rate of the chain, to the exact posterior."""
    prior = correlated(SDE)
    exact = exact_posterior(prior, SEEN)
    assert isinstance(exact, Gaussian)
    solver = Exponential(1, prior.facts.moments)
    out = gibbs(prior, SEEN, torch.zeros(5000, 2, dtype=F64), 60, 2, seed=1, solver=solver)
    assert_law(out, exact)


def test_undeflated_sweeps_have_the_law_under_the_larger_noise() -> None:
    prior, rho, a = correlated(SDE), 0.4, SEEN.operator.matrix
    larger = Observation(SEEN.operator, SEEN.y, covariance=0.09 * torch.eye(1) + rho**2 * a @ a.T)
    exact = exact_posterior(prior, larger)
    assert isinstance(exact, Gaussian)
    x = exact.sample(20_000, torch.Generator().manual_seed(0))
    options = {"seed": 1, "rho": rho, "solver": Exponential(1, prior.facts.moments)}
    out = gibbs(prior, SEEN, x, 3, 2, deflate=False, **options)
    assert_law(out, exact)
    with pytest.raises(AssertionError):
        assert_law(out, exact_posterior(prior, SEEN))  # type: ignore[arg-type]


def test_correlated_noise_and_several_observations() -> None:
    root = draw(2, 2, seed=8) / 5 + 0.3 * torch.eye(2, dtype=F64)
    seen = [SEEN, Observation(Matrix(draw(2, 2, seed=9)), draw(2), covariance=root @ root.T)]
    prior = correlated(SDE)
    exact = exact_posterior(prior, seen)
    assert isinstance(exact, Gaussian)
    x = exact.sample(20_000, torch.Generator().manual_seed(0))
    assert_law(gibbs(prior, seen, x, 3, 2, 1, solver=Exponential(1, prior.facts.moments)), exact)


def test_a_mixture_is_kept() -> None:
    """Means of 20,000 draws after 5 sweeps, to 4.5 standard errors and the steps' 1 %."""
    prior = mixture(SDE)
    exact = exact_posterior(prior, SEEN)
    x = exact.sample(20_000, torch.Generator().manual_seed(0))
    out = gibbs(prior, SEEN, x, 5, 8, seed=1)
    pi, m = exact.log_weights.exp(), exact.means
    mean = pi @ m
    second = pi @ (exact.covariances.diagonal(dim1=1, dim2=2) + m**2)
    spread = x.std(0)
    assert bool(((out.mean(0) - mean).abs() < spread * (0.01 + 4.5 / math.sqrt(20_000))).all())
    squares = out.square()
    limit = squares.std(0) * (4.5 / math.sqrt(20_000)) + 0.01 * second
    assert bool(((squares.mean(0) - second).abs() < limit).all())


def test_a_flow_in_place_of_the_reversal_is_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of a public implementation, in whose sweeps x is a function of z."""
    prior = correlated(SDE)
    exact = exact_posterior(prior, SEEN)
    assert isinstance(exact, Gaussian)
    x = exact.sample(20_000, torch.Generator().manual_seed(0))
    module = sys.modules[gibbs.__module__]
    monkeypatch.setattr(module, "Reverse", lambda sde, score, eta: Reverse(sde, score, 0.0))
    out = gibbs(prior, SEEN, x, 20, 2, seed=1, solver=Exponential(1, prior.facts.moments))
    with pytest.raises(AssertionError):
        assert_law(out, exact)


def test_units_are_those_of_the_data() -> None:
    prior, shift, scale = correlated(SDE), draw(2, seed=30), draw(2, seed=31).abs() + 0.5
    units = Units(shift, scale)
    known = prior.with_facts(Facts((2,), prior.facts.std, prior.facts.moments, units))
    a, y, z = draw(1, 2, seed=4), draw(1, seed=5), draw(6, 2)
    found = gibbs(known, Observation(Matrix(a), y, 0.2), units.decode(z), 3, 4, seed=0)
    same = gibbs(prior, Observation(Matrix(a * scale), y - a @ shift, 0.2), z, 3, 4, seed=0)
    torch.testing.assert_close(found, units.decode(same), rtol=1e-9, atol=1e-9)


def test_rows_have_their_own_observation() -> None:
    prior, x = correlated(SDE), draw(3, 2)
    a, y, noise = (
        Matrix(draw(1, 2, seed=4)),
        draw(3, 1),
        torch.tensor([[0.1], [0.2], [0.3]], dtype=F64),
    )
    out = gibbs(prior, Observation(a, y, noise), x, 2, 4, seed=0, rho=0.05)
    alone = gibbs(prior, Observation(a, y[0], 0.1), x[:1], 2, 4, seed=0, rho=0.05)
    torch.testing.assert_close(alone, out[:1], rtol=1e-9, atol=1e-9)
    part = gibbs(prior, Observation(a, y, noise), x, 2, 4, seed=0, rho=0.05, chunk=2)
    torch.testing.assert_close(part, out, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    prior: Score = correlated(SDE)
    x = draw(3, 2)
    with pytest.raises(ValueError, match=r"rho = 5 cannot be deflated: .* rho <= "):
        gibbs(prior, SEEN, x, rho=5.0)
    with pytest.raises(ValueError, match="rho must be a positive number"):
        gibbs(prior, SEEN, x, rho=0.0)
    with pytest.raises(ValueError, match=r"x must be \(B, \*D\) with \*D = \(2,\)"):
        gibbs(prior, SEEN, draw(3, 4))
    with pytest.raises(TypeError, match="not linear: its noise cannot be deflated"):
        gibbs(prior, Observation(Nonlinear(torch.square, (2,)), torch.ones(2), 0.1), x)
    with pytest.raises(ValueError, match="sweeps must be an integer >= 1"):
        gibbs(prior, SEEN, x, 0)
