"""Each distance against its closed form for Gaussians, scipy, or a sum written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from sde_gen import metrics
from sde_gen.metrics import (
    energy_distance,
    frechet_distance,
    mmd,
    nearest_neighbour_distance,
    sliced_wasserstein,
)


def normal(n: int, d: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def mean_distance(mean: float, variance: float) -> float:
    """E|Z| of Z ~ N(mean, variance): the mean of the folded normal."""
    s = math.sqrt(variance)
    tail = math.erf(mean / (s * math.sqrt(2)))
    return s * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance)) + mean * tail


def test_energy_distance_is_scipy_in_one_dimension():
    x, y = normal(70), 0.5 + 2 * normal(51, seed=1)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y, unbiased=False) == pytest.approx(expected, rel=1e-10)


def test_energy_distance_of_gaussians():
    # 2 E|X - Y| - E|X - X'| - E|Y - Y'|; the first term has the largest spread, below 6 / sqrt(N)
    n = 8000
    expected = 2 * mean_distance(0.7, 5.0) - mean_distance(0, 2.0) - mean_distance(0, 8.0)
    found = energy_distance(normal(n), 0.7 + 2 * normal(n, seed=1))
    assert found == pytest.approx(expected, abs=6 / math.sqrt(n))


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_pair_sums_written_out(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x, y = normal(9, 6).reshape(9, 2, 3), 0.3 + normal(5, 6, seed=1).reshape(5, 2, 3)

    def mean(a: torch.Tensor, b: torch.Tensor, kernel, skip: bool) -> float:
        values = [
            kernel(float((u - v).square().sum()))
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not (skip and i == j)
        ]
        return sum(values) / len(values)

    def gauss(squared: float) -> float:
        return math.exp(-squared / (2 * 1.5**2))

    for unbiased in (True, False):
        within = [mean(z, z, math.sqrt, unbiased) for z in (x, y)]
        energy = 2 * mean(x, y, math.sqrt, False) - sum(within)
        assert energy_distance(x, y, unbiased) == pytest.approx(energy, rel=1e-10)
        within = [mean(z, z, gauss, unbiased) for z in (x, y)]
        squared = sum(within) - 2 * mean(x, y, gauss, False)
        assert mmd(x, y, 1.5, unbiased) == pytest.approx(squared, rel=1e-10)


@pytest.mark.parametrize("distance", [energy_distance, lambda x, y, u: mmd(x, y, 2.0, u)])
def test_unbiased_is_zero_in_the_mean_and_biased_is_never_negative(distance):
    found = [
        (distance(x, y, True), distance(x, y, False))
        for x, y in ((normal(20, 3, seed), normal(30, 3, 1000 + seed)) for seed in range(200))
    ]
    u, v = (np.array(values) for values in zip(*found, strict=True))
    assert abs(u.mean()) < 4 * u.std() / math.sqrt(len(u))
    assert v.min() > 0
    assert v.mean() > 10 * v.std() / math.sqrt(len(v))


def test_energy_distance_of_a_set_and_itself_is_zero_far_from_the_origin():
    x = 1e6 + normal(300, 5)
    assert abs(energy_distance(x, x, unbiased=False)) < 1e-9


def test_mmd_of_gaussians():
    # E k of N(m, s^2 I) is (h^2 / (h^2 + s^2))^(d/2) exp(-|m|^2 / 2 (h^2 + s^2))
    n, d, h, s, shift = 4000, 3, 1.3, 0.6, 0.4

    def mean(variance: float, squared: float) -> float:
        v = h**2 + variance
        return (h**2 / v) ** (d / 2) * math.exp(-squared / (2 * v))

    expected = mean(2, 0) + mean(2 * s**2, 0) - 2 * mean(1 + s**2, d * shift**2)
    found = mmd(normal(n, d), shift + s * normal(n, d, seed=1), h)
    assert found == pytest.approx(expected, abs=2 / math.sqrt(n))
    # The kernel lies in [0, 1]: each mean is within 1/2 / sqrt(N) of its value; the four add up.


@pytest.mark.parametrize("m", [100, 73])
def test_sliced_wasserstein_in_one_dimension_is_the_quantile_integral(m):
    x, y = normal(100), 1 + 2 * normal(m, seed=1)
    u = (np.arange(100 * m) + 0.5) / (100 * m)
    difference = np.quantile(x[:, 0], u, method="inverted_cdf") - np.quantile(
        y[:, 0], u, method="inverted_cdf"
    )
    expected = math.sqrt((difference**2).mean())
    assert sliced_wasserstein(x, y, projections=3) == pytest.approx(expected, rel=1e-10)


def test_sliced_wasserstein_of_gaussians():
    # E over theta of (theta.m)^2 + (s - 1)^2 = |m|^2 / d + (s - 1)^2
    n, d, s, projections = 5000, 4, 1.5, 1000
    mean = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    expected = math.sqrt(float(mean.square().sum()) / d + (s - 1) ** 2)
    found = sliced_wasserstein(normal(n, d), mean + s * normal(n, d, seed=1), projections)
    # (theta.m)^2 has a relative spread of at most sqrt(2) over directions; half in the root
    assert found == pytest.approx(expected, rel=4 * math.sqrt(2) / 2 / math.sqrt(projections))


def test_sliced_wasserstein_in_blocks_and_its_generator(monkeypatch):
    x, y = normal(50, 3), normal(40, 3, seed=1)
    generator = torch.Generator().manual_seed(5)
    whole = sliced_wasserstein(x, y, 64, generator)
    assert sliced_wasserstein(x, y, 64, generator) != whole
    monkeypatch.setattr(metrics, "BLOCK", 1)
    assert sliced_wasserstein(x, y, 64, generator.manual_seed(5)) == pytest.approx(
        whole, rel=1e-12
    )


def test_frechet_distance_is_the_formula_with_a_matrix_root():
    x, y = normal(60, 4), 0.5 + normal(80, 4, seed=1) @ normal(4, 4, seed=2)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    mean = float((x.mean(0) - y.mean(0)).square().sum())
    expected = mean + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_gaussians():
    n, d, s = 50_000, 5, 2.0
    found = frechet_distance(normal(n, d), 1 + s * normal(n, d, seed=1))
    # d (1 + (s - 1)^2); a standard error of mean and std is about sqrt(1 + s^2) / sqrt(N) each
    assert found == pytest.approx(d * 2, abs=d * 2 * 4 * math.sqrt(5 / n))


def test_frechet_distance_of_singular_covariances():
    x = normal(30, 50)
    assert abs(frechet_distance(x, x)) < 1e-6
    constant = torch.zeros(10, 3)
    assert frechet_distance(constant, constant + 2) == pytest.approx(12)


def test_frechet_distance_uses_the_features():
    x, y = normal(50, 6).reshape(50, 2, 3), normal(50, 6, seed=1).reshape(50, 2, 3)
    expected = frechet_distance(x[:, 0] ** 2, y[:, 0] ** 2)
    assert frechet_distance(x, y, lambda z: z[:, 0].numpy() ** 2) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"features must be \(50, k\)"):
        frechet_distance(x, y, lambda z: z.sum())


def test_nearest_neighbour_distance(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 30)
    reference = 100 + normal(20, 3)
    x = torch.cat([reference[[4]], 100 + normal(10, 3, seed=1)])
    found = nearest_neighbour_distance(x, reference)
    expected = [min(float((u - v).norm()) for v in reference) for u in x]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert found[0] == 0


def test_device_and_precision_do_not_leak():
    x = normal(100, 3).float()
    assert energy_distance(x, x + 1) == energy_distance(x.double(), (x + 1).double())
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    "distance",
    [
        energy_distance,
        frechet_distance,
        sliced_wasserstein,
        nearest_neighbour_distance,
        lambda x, y: mmd(x, y, 1.0),
    ],
)
def test_bad_input(distance):
    x = normal(10, 3)
    with pytest.raises(
        ValueError, match=r"\(N, \*D\) and \(M, \*D\), got \(10, 3\) and \(10, 2\)"
    ):
        distance(x, x[:, :2])
    with pytest.raises(ValueError, match="y has NaN or infinity in 10 places"):
        distance(x, x * torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="at least"):
        distance(x, x[:0])


def test_bad_arguments():
    x = normal(10, 3)
    with pytest.raises(ValueError, match="bandwidth must be a number > 0, got 0"):
        mmd(x, x, 0)
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        sliced_wasserstein(x, x, 0)
