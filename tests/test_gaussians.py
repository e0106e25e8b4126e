"""Closed forms of Gaussian laws, against scipy, mpmath-free series and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from sde_gen import gaussians

F64 = torch.float64


def test_kl_is_the_integral() -> None:
    m, v, n, w = 0.3, 0.2, -0.5, 1.7
    q, p = stats.norm(m, math.sqrt(v)), stats.norm(n, math.sqrt(w))
    exact, _ = integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -8, 8)
    one = torch.ones(1, 3, dtype=F64)
    found = gaussians.kl(m * one, v * one, n * one, w * one)
    assert float(found) == pytest.approx(3 * exact, rel=1e-9)
    # Broadcast variances count once for each coordinate.
    assert float(gaussians.kl(m * one, one[0, 0] * v, n * one, one[0, 0] * w)) == pytest.approx(
        3 * exact, rel=1e-9
    )


def test_kl_of_matrices_is_that_of_their_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 4, dtype=F64, generator=generator)
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=generator))
    v = torch.tensor([0.1, 0.5, 2.0, 3.0], dtype=F64)
    m = torch.randn(4, dtype=F64, generator=generator)
    turned = gaussians.kl_matrix(q @ m, q @ torch.diag(v) @ q.T, 0 * m, torch.eye(4, dtype=F64))
    plain = gaussians.kl(m[None], v, 0 * m[None], torch.ones(4, dtype=F64))
    assert float(turned) == pytest.approx(float(plain), rel=1e-12)
    cov = a @ a.T + torch.eye(4, dtype=F64)
    assert float(gaussians.kl_matrix(m, cov, m, cov)) == pytest.approx(0, abs=1e-12)


def test_log_density_is_scipys() -> None:
    x = torch.tensor([[0.2, -3.0], [1.0, 2.0]], dtype=F64)
    std = torch.tensor([0.5, 2.0], dtype=F64)
    found = gaussians.log_density(x, torch.tensor(0.1, dtype=F64), std)
    exact = stats.norm(0.1, std.numpy()).logpdf(x.numpy()).sum(1)
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-13)


@pytest.mark.parametrize("shift", [0.0, 5.0, 40.0, -40.0, 100.0])
@pytest.mark.parametrize("width", [1e-9, 1e-3, 1.0, 30.0])
def test_log_difference_keeps_its_digits_in_both_tails(shift: float, width: float) -> None:
    low = torch.tensor(shift, dtype=F64)
    high = low + width
    a, width = abs(float(low)), float(high - low)
    if shift < 0:
        a = -float(high)
    # int_a^(a + width) phi = phi(a) int_0^width exp(-a u - u^2 / 2) du, by quadrature.
    end = min(width, 50 / max(a, 1))
    inner, _ = integrate.quad(lambda u: math.exp(-a * u - u * u / 2), 0, end, epsabs=0)
    exact = -a * a / 2 - math.log(2 * math.pi) / 2 + math.log(inner)
    assert float(gaussians.log_difference(low, high)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 5.0, 40.0])
@pytest.mark.parametrize("width", [1e-3, 1.0, 30.0, math.inf])
def test_the_slopes_of_log_difference_are_phi_over_p(shift: float, width: float) -> None:
    ends = torch.tensor([shift, shift + width], dtype=F64, requires_grad=True)
    gaussians.log_difference(ends[0], ends[1]).backward()
    end = min(width, 50 / max(shift, 1))
    inner, _ = integrate.quad(lambda u: math.exp(-shift * u - u * u / 2), 0, end, epsabs=0)
    above = math.exp(-width * (shift + width / 2)) / inner
    assert ends.grad is not None
    np.testing.assert_allclose(ends.grad.numpy(), [-1 / inner, above], rtol=1e-9, atol=1e-300)


def test_log_difference_has_second_derivatives_and_those_of_functions() -> None:
    low = torch.tensor([-0.3, 0.2, 1.5], dtype=F64, requires_grad=True)
    high = (low.detach() + torch.tensor([0.004, 1.0, 3.0], dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(gaussians.log_difference, (low, high))
    assert torch.autograd.gradgradcheck(gaussians.log_difference, (low, high))
    whole = torch.func.grad(lambda a, b: gaussians.log_difference(a, b).sum())
    found = whole(low.detach(), high.detach())
    gaussians.log_difference(low, high).sum().backward()
    torch.testing.assert_close(found, low.grad)


@pytest.mark.parametrize("std", [1e-3, 0.05, 0.7, 1.0, 20.0])
@pytest.mark.parametrize("mean", [-3.0, -0.99, 0.123, 0.5, 1.5])
def test_a_discretised_gaussian_sums_to_one(mean: float, std: float) -> None:
    k = torch.arange(256)
    log_p = gaussians.discretised(
        k, torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64), 256
    )
    assert bool(torch.isfinite(log_p).all())
    assert float(torch.logsumexp(log_p, 0)) == pytest.approx(0, abs=1e-12)


def test_a_discretised_gaussian_is_finite_at_forty_deviations() -> None:
    std = torch.tensor(1 / 64, dtype=F64)
    log_p = gaussians.discretised(torch.tensor(10), torch.tensor(0.6, dtype=F64), std, 64)
    edge = (2 * 11 / 64 - 1 - 0.6) * 64
    assert edge < -40
    # The nearer edge of the cell is two deviations from the other: it decides, by Mills' ratio.
    x = -edge
    mills = 1 / x * (1 - 1 / x**2 + 3 / x**4 - 15 / x**6)
    near = -x * x / 2 - 0.5 * math.log(2 * math.pi) + math.log(mills)
    assert float(log_p) == pytest.approx(near, abs=1e-8)
