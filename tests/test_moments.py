"""Means and covariances of data, and functions of them, against the matrices written out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import F64
from torch import Tensor

import sde_gen as sg
from sde_gen import data_moments
from sde_gen.moments import Moments, fused, isotropic


def test_moments_of_many_dimensions_are_those_of_the_data() -> None:
    """5,000 dimensions, by a randomised method: the leading directions against the exact ones.

    Singular values fall by a third each, and 16 directions are kept: one round leaves
    1.5^-(9 * 3) = 2e-5 of the eighth wrong, five leave 1.5^-(9 * 11) = 4e-18.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(5000, 40, generator=generator, dtype=F64)).Q
    x = u * 1.5 ** -torch.arange(40, dtype=F64) @ v.T
    before = torch.get_rng_state()
    found, again = data_moments(100 + x, rank=8), data_moments(100 + x, rank=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.basis is not None
    assert again.basis is not None
    assert torch.equal(found.basis, again.basis)
    assert torch.equal(found.values, again.values)
    y = x - x.mean(0)
    _, s, right = torch.linalg.svd(y, full_matrices=False)
    torch.testing.assert_close(found.values[1:], s[:8].square() / 60, rtol=1e-9, atol=0)
    alignment = (right[:8] * found.basis.T).sum(1).abs()
    torch.testing.assert_close(alignment, torch.ones(8, dtype=F64), rtol=0, atol=1e-9)
    floor = s[8:].square().sum() / 60 / (5000 - 8)
    torch.testing.assert_close(found.values[0], floor, rtol=1e-6, atol=0)


def three_forms() -> dict[str, tuple[Moments, Tensor]]:
    """Moments in each form, and the covariance that they stand for."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=g, dtype=F64)).Q
    values = torch.tensor([0.2, 3.0, 0.7], dtype=F64)
    floor = values[0] * (torch.eye(6, dtype=F64) - basis @ basis.T)
    each = torch.tensor([0.1, 0.9, 2.0, 0.0, 4.0, 0.3], dtype=F64)
    return {
        "one number": (isotropic(0.3), 0.3 * torch.eye(6, dtype=F64)),
        "a number each": (Moments(each), each.diag()),
        "directions": (
            Moments(values, None, basis),
            floor + basis * values[1:] @ basis.T,
        ),
    }


def function_of(c: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of a symmetric matrix, by its eigenvalues."""
    values, vectors = torch.linalg.eigh(c)
    return vectors * f(values) @ vectors.T


@pytest.mark.parametrize("form", three_forms())
def test_a_function_of_the_covariance_is_that_of_its_eigenvalues(form: str) -> None:
    moments, c = three_forms()[form]
    x, y = torch.randn(5, 2, 3, dtype=F64), torch.randn(5, 2, 3, dtype=F64, requires_grad=True)
    values = moments.values.numpy()
    numbers = [moments.coefficient(np.exp(-values)), -0.5, moments.coefficient(values**2)]
    kept = x.clone()
    result = moments.apply(numbers, (x, x, y))
    exp, square = function_of(c, lambda v: torch.exp(-v)), c @ c
    exact = (x.flatten(1) @ (exp - 0.5 * torch.eye(6, dtype=F64)) + y.flatten(1) @ square).reshape(
        x.shape
    )
    torch.testing.assert_close(result, exact)
    assert torch.equal(x, kept)
    # It is linear and symmetric: the gradient of z . f(C) y is f(C) z.
    (gradient,) = torch.autograd.grad((result * x).sum(), y)
    torch.testing.assert_close(gradient, (x.flatten(1) @ square).reshape(x.shape))
    with torch.no_grad():
        torch.testing.assert_close(moments.apply(numbers, (x, x, y)), exact)
    assert torch.equal(x, kept)
    assert float(moments.variance) == pytest.approx(
        float(c.trace()) / 6 if form != "one number" else 0.3, rel=1e-14
    )


def test_functions_that_are_zero_give_zero() -> None:
    x = torch.randn(2, 6)
    for moments, _ in three_forms().values():
        zero = moments.coefficient(np.zeros(len(moments.values)))
        assert torch.equal(moments.apply((zero, 0.0), (x, x)), torch.zeros(2, 6))


def test_moments_serve_several_precisions() -> None:
    moments, c = three_forms()["directions"]
    f = moments.coefficient(moments.values.numpy())
    x = torch.randn(4, 6, dtype=F64)
    single = moments.apply((f,), (x.float(),))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, (x @ c).float())
    torch.testing.assert_close(moments.apply((f,), (x,)), x @ c, rtol=1e-13, atol=1e-13)


def test_moments_of_a_matrix_are_all_its_directions() -> None:
    c = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 0.5], [1.0, 0.5, 0.5]])  # of rank 2
    moments = Moments.of(c, torch.ones(1, 3))
    assert moments.values.dtype == F64
    assert bool((moments.values >= 0).all())
    assert moments.mean is not None
    assert moments.mean.shape == (3,)
    f = moments.coefficient(moments.values.numpy())
    eye = torch.eye(3, dtype=F64)
    torch.testing.assert_close(moments.apply((f,), (eye,)), c.double(), rtol=0, atol=1e-14)
    for wrong, message in (
        (torch.ones(2, 3), "symmetric"),
        (torch.ones(3), "symmetric"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Moments.of(wrong)


@pytest.mark.parametrize(
    ("n", "samples", "rank", "kept"),
    [(6, 4, None, 3), (6, 4, 9, 3), (6, 40, None, 6), (520, 540, None, 512), (6, 40, 1, 1)],
)
def test_as_many_directions_as_the_data_have(
    n: int, samples: int, rank: int | None, kept: int
) -> None:
    x = torch.randn(samples, n, dtype=F64) * torch.linspace(1, 3, n, dtype=F64) + 5
    moments = data_moments(x, rank)
    c = torch.cov(x.T, correction=0)
    exact = torch.linalg.eigvalsh(c).flip(0)
    assert moments.basis is not None
    assert moments.basis.shape == (n, kept)
    torch.testing.assert_close(moments.values[1:], exact[:kept], rtol=1e-9, atol=1e-11)
    floor = float(exact[kept:].mean()) if kept < n else 0.0
    assert float(moments.values[0]) == pytest.approx(floor, rel=1e-9, abs=1e-11)
    assert moments.mean is not None
    torch.testing.assert_close(moments.mean, x.mean(0))


def test_diagonal_moments_are_the_variances() -> None:
    x = torch.randn(50, 2, 3, dtype=F64) * 2 + 1
    moments = data_moments(x, diagonal=True)
    assert moments.basis is None
    torch.testing.assert_close(moments.values, x.flatten(1).var(0, correction=0))
    assert moments.mean is not None
    torch.testing.assert_close(moments.mean, x.flatten(1).mean(0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Moments(torch.tensor([1.0, -0.1])), ValueError, "variances >= 0"),
        (lambda: Moments(torch.tensor([1.0, math.nan])), ValueError, "variances >= 0"),
        (lambda: Moments(torch.ones(1, 2)), ValueError, r"shape \(m,\)"),
        (lambda: Moments(torch.ones(2), None, torch.eye(3)[:, :2]), ValueError, "and a floor"),
        (lambda: data_moments(torch.ones(1, 3)), ValueError, "at least 2 samples, got 1"),
        (lambda: data_moments(torch.ones(5, 3).long()), TypeError, "floating point"),
        (lambda: data_moments(torch.full((5, 3), math.nan)), ValueError, "NaN"),
        (lambda: data_moments(torch.ones(5, 3), rank=0), ValueError, "rank must .* got 0"),
        (lambda: data_moments(torch.ones(5, 3), rank=-1), ValueError, "rank must .* got -1"),
    ],
)
def test_what_are_no_moments(
    make: Callable[[], Moments], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


# --- two sums in one kernel ---------------------------------------------------------------------


@pytest.mark.parametrize("known", [2, 4, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_sums_of_one_kernel(
    known: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of tensors, with shorter rows of numbers; here without the compiler."""
    moments = importlib.import_module("sde_gen.moments")
    asked = []

    def kernel(numbers: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        asked.append(len(tensors))
        found: tuple[torch.Tensor, ...] = moments._sums(numbers, tensors)
        return found

    monkeypatch.setattr(moments, "_kernel", lambda: kernel)
    tensors = list(torch.randn(known, 5, 3, dtype=dtype))
    first, second = torch.randn(2, known, dtype=torch.float64).tolist()
    law = moments.isotropic(0.5)
    with moments.fused():
        a, b = law.both(first, second[:2], tensors)
    assert asked == [max(known, moments.TERMS)]
    stacked = torch.stack(tensors).double()
    exact = torch.einsum("j,jbd->bd", torch.tensor(first, dtype=torch.float64), stacked)
    torch.testing.assert_close(a, exact.to(dtype))
    exact = torch.einsum("j,jbd->bd", torch.tensor(second[:2], dtype=torch.float64), stacked[:2])
    torch.testing.assert_close(b, exact.to(dtype))
    law.both(first, second, tensors)  # not outside
    wide = moments.Moments(torch.tensor([0.2, 0.4, 0.8]))
    with moments.fused():  # nor where every coordinate has a number of its own
        wide.both([torch.ones(3)] * known, [torch.ones(3)] * known, tensors)
    assert len(asked) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.slow
def test_the_compiled_kernel_is_the_same_sum() -> None:
    """For several batches and early steps, whose values are fewer."""
    sde = sg.VP()
    law = sg.GaussianMixture(sde, torch.ones(2), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3)
    law = law.with_facts(replace(law.facts, moments=None))
    for n in (64, 7):
        x = torch.randn(n, 2)
        times = sg.grids.default(sde, 9)
        flow = sde.probability_flow(law)
        solver = sg.default_solver(law)
        assert solver.reference.basis is None
        plain = sg.solve(flow, x, times, solver)
        with fused(), torch.no_grad():
            torch.testing.assert_close(sg.solve(flow, x, times, solver), plain, rtol=0, atol=1e-5)
