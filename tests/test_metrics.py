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


SETS = {
    "an outlier": torch.cat([normal(200, 3), torch.full((1, 3), 1e9, dtype=torch.float64)]),
    "two sets far apart": torch.cat([normal(100, 3), 1e9 + 1e3 * normal(100, 3, seed=1)]),
    "far from the origin": 1e6 + normal(200, 3),
    "fine beside coarse": torch.cat([1e-6 * normal(100, 3), normal(100, 3, seed=1)]),
}


def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distances from the differences."""
    return (x[:, None] - y).norm(dim=-1)


@pytest.mark.parametrize("name", SETS)
def test_distances_keep_their_digits(name, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 3000)
    y = SETS[name]
    x = torch.cat([y[: len(y) // 2], y[::2] + 1e-3 * normal(len(y[::2]), 3, seed=2)])
    near = apart(x, y).min(1).values
    torch.testing.assert_close(nearest_neighbour_distance(x, y), near, rtol=1e-9, atol=0)
    pairs = [apart(a, b) for a, b in ((x, x), (y, y), (x, y))]
    # Means of up to 1e9, whose difference may be small: to 1e-10 of the largest.
    largest = max(float(d.mean()) for d in pairs)
    for unbiased in (True, False):
        n, m = (len(z) * (len(z) - 1 if unbiased else len(z)) for z in (x, y))
        energy = 2 * pairs[2].mean() - pairs[0].sum() / n - pairs[1].sum() / m
        found = energy_distance(x, y, unbiased)
        assert found == pytest.approx(float(energy), abs=1e-10 * largest)
        k = [d.square().mul(-0.5 / 1.3**2).exp() for d in pairs]
        own = len(x) / n + len(y) / m if unbiased else 0.0
        expected = float(k[0].sum() / n + k[1].sum() / m - 2 * k[2].mean()) - own
        assert mmd(x, y, 1.3, unbiased) == pytest.approx(expected, abs=1e-10)


def test_every_copy_is_found_beside_an_outlier():
    for far in (1e3, 1e9, 1e15):
        x = normal(999, 3)
        reference = torch.cat([x, torch.full((1, 3), far, dtype=torch.float64)])
        assert int((nearest_neighbour_distance(x, reference) == 0).sum()) == 999


@pytest.mark.parametrize("v", [[1.0] * 6, [2.0, 1.0, 0.5, 0.3]], ids=["equal", "falling"])
def test_frechet_bias_is_quadratic_in_the_features(v):
    """(1/N + 1/M) [5/4 tr C + 1/2 sum v_i v_j / (v_i + v_j)] to first order in 1/N.

    For a small difference E of the covariances the trace is sum E_ij^2 / 2 (v_i + v_j), and
    E_ij has variance v_i v_j (1 + [i = j]) (1/N + 1/M); the means add v_i (1/N + 1/M) each.
    """
    variance = torch.tensor(v, dtype=torch.float64)
    n, m, sets = 1500, 1000, 400
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        z = torch.randn(count, len(v), generator=generator, dtype=torch.float64)
        return z * variance.sqrt()

    found = np.array([frechet_distance(draw(n), draw(m)) for _ in range(sets)])
    pairs = variance[:, None] * variance / (variance[:, None] + variance)
    bias = (1 / n + 1 / m) * float(1.25 * variance.sum() + 0.5 * pairs.sum())
    if len(set(v)) == 1:
        assert bias == pytest.approx(len(v) * (len(v) + 5) / 4 * (1 / n + 1 / m))
    # The next order is k / N of it, 1 %; four standard errors are 15 % or less.
    error = 4 * found.std() / math.sqrt(sets)
    assert error < 0.15 * bias
    assert abs(found.mean() - bias) < error + 0.01 * bias


def test_sliced_wasserstein_between_modes_falls_like_the_fourth_root():
    """Two points: the counts of N samples differ, and that share of the mass crosses the gap."""
    gap, sets, roots = 3.0, 400, []
    generator = torch.Generator().manual_seed(0)
    for n in (64, 1024):
        x = gap * torch.randint(2, (2, sets, n, 1), generator=generator).double()
        squares = [sliced_wasserstein(a, b, 1) ** 2 for a, b in zip(x[0], x[1], strict=True)]
        counts = np.arange(n + 1)
        law = stats.binom(n, 0.5).pmf(counts)
        mean = gap**2 * law @ np.abs(counts[:, None] - counts) @ law / n
        assert mean == pytest.approx(gap**2 / math.sqrt(math.pi * n), rel=1 / n)
        assert abs(np.mean(squares) - mean) < 4 * np.std(squares) / math.sqrt(sets)
        roots.append(math.sqrt(mean))
    assert roots[0] / roots[1] == pytest.approx(16**0.25, rel=0.02)


ALL = {
    "energy": energy_distance,
    "frechet": frechet_distance,
    "sliced": sliced_wasserstein,
    "nearest": nearest_neighbour_distance,
    "mmd": lambda x, y: mmd(x, y, 1.0),
}


@pytest.mark.parametrize("name", ALL)
def test_arrays_and_lists_are_samples(name):
    distance = ALL[name]
    x, y = normal(12, 3), (4 * normal(9, 3, seed=1)).round()
    expected = distance(x, y)
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    for a, b in (
        (read_only, y.numpy().astype(np.int16)),
        (x.tolist(), y.long().tolist()),
        (x.numpy().astype(">f8"), y.long()),
    ):
        assert torch.equal(torch.as_tensor(distance(a, b)), torch.as_tensor(expected))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [1j * np.ones((5, 3)), torch.ones(5, 3) * 1j, "ab", None])
def test_what_are_no_real_numbers_is_refused(name, bad):
    second = "reference" if name == "nearest" else "y"
    with pytest.raises(TypeError, match="x must be real"):
        ALL[name](bad, normal(5, 3))
    with pytest.raises(TypeError, match=f"{second} must be real"):
        ALL[name](normal(5, 3), bad)


def test_no_global_generator_is_read():
    before = torch.get_rng_state()
    for distance in ALL.values():
        distance(normal(5, 3), normal(6, 3, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_device_and_precision_do_not_leak():
    x = normal(100, 3).float()
    assert energy_distance(x, x + 1) == energy_distance(x.double(), (x + 1).double())
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", ALL)
def test_bad_input(name):
    distance, x = ALL[name], normal(10, 3)
    second = "reference" if name == "nearest" else "y"
    with pytest.raises(
        ValueError, match=r"\(N, \*D\) and \(M, \*D\), got \(10, 3\) and \(10, 2\)"
    ):
        distance(x, x[:, :2])
    with pytest.raises(ValueError, match=f"{second} has NaN or infinity in 10 places"):
        distance(x, x * torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="at least"):
        distance(x, x[:0])


def test_bad_arguments():
    x = normal(10, 3)
    for bandwidth in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="bandwidth must be a number > 0, got"):
            mmd(x, x, bandwidth)
    for bandwidth in ("wide", 1j):
        with pytest.raises(TypeError, match="bandwidth must be a number, got"):
            mmd(x, x, bandwidth)
    assert mmd(x, x + 1, np.float32(2)) == mmd(x, x + 1, 2)
    for projections in (0, 1.5, True):
        with pytest.raises(ValueError, match="projections must be an integer >= 1, got"):
            sliced_wasserstein(x, x, projections)
    assert sliced_wasserstein(x, x + 1, np.int64(4)) == sliced_wasserstein(x, x + 1, 4)
    with pytest.raises(TypeError, match=r"features\(x\) must be real, got torch"):
        frechet_distance(x, x, lambda z: z * 1j)
    with pytest.raises(TypeError, match=r"features must be callable as features\(x\), got 3"):
        frechet_distance(x, x, 3)
    with pytest.raises(TypeError, match="generator"):
        sliced_wasserstein(x, x, 8, np.zeros(3))


# ---- what a distance does not tell apart ----


def test_modes_of_points_at_known_places():
    centres = [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]
    x = [[0.1, 0.0], [0.0, -0.5], [4.0, 0.5], [2.0, 0.0], [0.0, 3.4], [9.0, 9.0]]
    found = metrics.modes(x, centres, 0.5)
    assert found.counts.tolist() == [2, 1, 0]
    assert found.covered == 2
    assert found.share == 0.5
    assert metrics.modes(x, centres, 0.7).counts.tolist() == [2, 1, 1]


def test_modes_of_exact_samples():
    from sde_gen.data import grid_25

    n, axis = 20_000, torch.linspace(-1, 1, 5)
    centres = torch.cartesian_prod(axis, axis)
    found = metrics.modes(grid_25(n, torch.Generator().manual_seed(0)), centres, 3 * 0.03)
    share = 1 - math.exp(-4.5)
    assert found.covered == 25
    assert found.share == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))
    expected = n * share / 25
    assert (found.counts - expected).abs().max() < 4.5 * math.sqrt(expected)
    assert int(found.counts.sum()) == round(found.share * n)


def test_coverage_is_one_minus_the_total_variation():
    reference = [0, 0, 1, 1, 2, 2, 3, 3]
    assert metrics.coverage([3, 2, 1, 0], reference) == 1
    assert metrics.coverage([1, 1, 1], reference) == 0.25
    assert metrics.coverage([0, 1, 0, 1], reference) == 0.5
    assert metrics.coverage([0, 0, 0, 1], reference) == 0.5
    assert metrics.coverage([0, 1, 2, 2], reference) == 0.75
    assert metrics.coverage([7, -2], reference) == 0


def images(n: int, seed: int = 0, side: int = 12) -> torch.Tensor:
    return normal(n, side * side, seed).reshape(n, 1, side, side)


def test_white_noise_has_its_variance_at_every_wave():
    n = 2000
    found = metrics.power_spectrum(0.7 * images(n))
    # The ring of least waves has one, a chi-square of one degree for each image.
    torch.testing.assert_close(found, found * 0 + 0.49, rtol=5 * math.sqrt(2 / n), atol=0)


@pytest.mark.parametrize(("wave", "ring"), [((0, 0), 0), ((3, 0), 3), ((0, 6), 6), ((3, 4), 5)])
def test_a_wave_lies_at_its_ring(wave, ring):
    at = torch.arange(12).double() / 12
    x = torch.cos(2 * math.pi * (wave[0] * at[:, None] + wave[1] * at))[None, None]
    found = metrics.power_spectrum(x)
    others = torch.arange(7) != ring
    assert found[others].abs().max() < 1e-20
    f = torch.fft.fftfreq(12) * 12
    waves = int(((f[:, None] ** 2 + f**2).sqrt().round() == ring).sum())
    # Parseval: the power at all waves adds up to the sum of squares.
    assert float(found[ring]) == pytest.approx(float(x.square().sum()) / waves)


def test_sharpness_of_a_filtered_image_is_the_filter_s():
    x = images(5).double()
    blurred = 0.5 * x + 0.25 * (x.roll(1, 3) + x.roll(-1, 3))
    f = torch.fft.fftfreq(12, dtype=torch.float64)
    transfer = (0.5 + 0.5 * torch.cos(2 * math.pi * f)).square().expand(12, 12)
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    ring = 12 * (f[:, None] ** 2 + f**2).sqrt()
    fine = (ring.round() > 3) & (ring.round() <= 6)
    expected = float((transfer * power)[fine].sum() / power[fine].sum())
    assert metrics.sharpness(blurred, x) == pytest.approx(expected, rel=1e-12)
    assert metrics.sharpness(2 * x, x) == pytest.approx(4)
    assert metrics.sharpness(x[:, :, :, :11], x[:, :, :, :11]) == 1


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (lambda: metrics.modes([[0.0]], [[0.0, 1.0]], 1), ValueError, "x and centres must be"),
        (lambda: metrics.modes([[0.0]], [[0.0]], -1), ValueError, "radius"),
        (lambda: metrics.coverage([0.5], [0]), TypeError, "integers"),
        (lambda: metrics.coverage(torch.tensor([1])[:0], [0]), ValueError, "y must be labels"),
        (lambda: metrics.coverage([0], 0), ValueError, "reference must be labels"),
        (lambda: metrics.power_spectrum(normal(3, 4)), ValueError, "must be images"),
        (lambda: metrics.power_spectrum(images(1) * math.nan), ValueError, "NaN or infinity"),
        (lambda: metrics.sharpness(images(1), images(1, side=8)), ValueError, "one size"),
        (lambda: metrics.sharpness(images(1), images(1) * 0), ValueError, "no fine waves"),
    ],
)
def test_measures_refuse_what_they_cannot_read(act, error, match):
    with pytest.raises(error, match=match):
        act()
