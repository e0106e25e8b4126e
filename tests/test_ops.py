from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sde_gen import ops


@pytest.mark.parametrize("t", [0.3, 1, torch.tensor(0.3), torch.rand(3), np.float32(0.5)])
def test_a_time_is_float64_and_keeps_its_shape(t: ops.Time) -> None:
    result = ops.as_time(t)
    assert result.dtype == torch.float64
    assert result.shape == torch.as_tensor(t).shape
    exact = torch.as_tensor(t, dtype=torch.float64)
    torch.testing.assert_close(result, exact, rtol=0, atol=0)


def test_a_float64_time_is_not_copied() -> None:
    t = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert ops.as_time(t) is t


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_match_scales_each_sample_in_the_dtype_of_the_state(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.ones(shape, dtype=dtype)
    c = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    scaled = ops.match(c, x) * x
    assert scaled.dtype == dtype
    assert scaled.shape == shape
    assert [float(row.double().mean()) for row in scaled] == [1, 2, 3, 4]
    assert (ops.match(c[1], x) * x).dtype == dtype
    assert bool((ops.match(c[1], x) * x == 2).all())


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 1), (4, 3)])
def test_match_refuses_what_is_not_one_number_a_sample(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\), one for each"):
        ops.match(torch.zeros(shape), torch.zeros(4, 3))


def test_sum_rest_keeps_the_batch() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert ops.sum_rest(x).tolist() == [66, 210]
    assert ops.sum_rest(torch.arange(3.0)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("n", "panels"), [(3, 1), (5, 4), (24, 4)])
def test_quadrature_is_exact_to_its_degree(n: int, panels: int) -> None:
    degree = 2 * n - 1
    value = ops.integrate(lambda u: u**degree, 0.5, 1.5, n, panels)
    exact = (1.5 ** (degree + 1) - 0.5 ** (degree + 1)) / (degree + 1)
    assert float(value) == pytest.approx(exact, rel=1e-13)
    low = ops.integrate(lambda u: (u - 1) ** (2 * n), 0.5, 1.5, n, 1)
    # The error at degree 2 n is known: (n!)^4 / ((2 n + 1) (2 n)!^2) on [0.5, 1.5].
    error = 2 * 0.5 ** (2 * n + 1) / (2 * n + 1) - float(low)
    known = math.factorial(n) ** 4 / ((2 * n + 1) * math.factorial(2 * n) ** 2)
    assert error == pytest.approx(known, rel=1e-6, abs=1e-16)


def test_quadrature_broadcasts_its_limits() -> None:
    b = torch.tensor([[1.0], [2.0]])
    value = ops.integrate(torch.exp, torch.tensor([0.0, 0.5, 1.0]), b)
    exact = torch.exp(b.double()) - torch.exp(torch.tensor([0.0, 0.5, 1.0]).double())
    torch.testing.assert_close(value, exact, rtol=1e-13, atol=1e-13)


def test_a_rule_first_used_in_inference_mode_still_passes_gradients() -> None:
    with torch.inference_mode():
        ops.integrate(torch.cos, 0.0, 1.0, n=23)
    t = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    ops.integrate(torch.cos, 0.0, t, n=23).sum().backward()
    torch.testing.assert_close(t.grad, t.detach().cos(), rtol=1e-13, atol=0)


def test_bisection_reaches_rounding() -> None:
    y = torch.linspace(0, 8, 33, dtype=torch.float64)
    root = ops.bisect(lambda t: t**3, y, 0.0, 2.0)
    torch.testing.assert_close(root, y ** (1 / 3), rtol=0, atol=2e-15)


def test_full_precision_shelters_states_and_user_precision_lets_a_network_out() -> None:
    x, net = torch.randn(4, 3), torch.nn.Linear(3, 3)

    def products() -> list[torch.dtype]:
        user = ops.user_precision("cpu")
        with ops.full_precision("cpu"):
            inside = x @ x.T
            with user:
                seen = net(x)
        return [(x @ x.T).dtype, inside.dtype, seen.dtype]

    half = torch.bfloat16
    assert products() == [torch.float32] * 3
    with torch.autocast("cpu", half):
        assert products() == [half, torch.float32, half]
        with torch.autocast("cpu", enabled=False):
            assert products() == [torch.float32] * 3
    # A device that knows no autocast is no error.
    with ops.full_precision("meta"), ops.user_precision("meta"):
        pass


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5)])
@pytest.mark.parametrize("many", [False, True])
def test_matrices_act_in_full_precision_under_autocast(shape: tuple[int, ...], many: bool) -> None:
    c = torch.randn(*((4,) if many else ()), 3, 3, dtype=torch.float64)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.act(c, x)
    assert torch.equal(inside, ops.act(c, x))


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=repr
)
def test_a_count_is_any_integer(value: object) -> None:
    assert ops.check_count(value, "n") == 3
    assert type(ops.check_count(value, "n")) is int


@pytest.mark.parametrize(
    "value", [0, -1, np.int64(0), True, np.True_, torch.tensor(True), 2.0, "2", None], ids=repr
)
def test_what_is_no_count_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got") as caught:
        ops.check_count(value, "steps")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_all_finite_sees_through_its_sum(dtype: torch.dtype) -> None:
    """A sum that overflows or cancels says nothing of the values; one bad value always shows."""
    largest = torch.finfo(dtype).max
    assert ops.all_finite(torch.full((8,), largest, dtype=dtype))
    assert ops.all_finite(torch.tensor([largest, largest, -largest], dtype=dtype))
    assert ops.all_finite(torch.arange(3))
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 4, 8):
            x = torch.ones(9, dtype=dtype)
            x[place] = bad
            assert not ops.all_finite(x)
    assert not ops.all_finite(torch.tensor([math.inf, -math.inf], dtype=dtype))
