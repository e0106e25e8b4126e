"""Means and covariances of data, in many dimensions."""

from __future__ import annotations

import torch
from problems import F64

from sde_gen import data_moments


def test_moments_of_many_dimensions_are_those_of_the_data() -> None:
    """5,000 dimensions, by a randomised method: the leading directions against the exact ones.

    Singular values fall by a third each: after five rounds what is missed of the eighth is below
    3^-(2 * 8 * 5), far below rounding.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(5000, 40, generator=generator, dtype=F64)).Q
    x = u * 3.0 ** -torch.arange(40, dtype=F64) @ v.T
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
