"""Distances between two sets of samples, x (N, *D) and y (M, *D).

All take tensors, arrays or lists, flatten the samples, work in float64 and return a float. Sums
over pairs run in blocks, so that 20,000 against 20,000 samples need no more than some tens of
megabytes. Where an estimator is unbiased it can come out slightly negative for samples of one law;
the biased one is the distance between the two empirical measures, never negative, and larger by
O(1/N + 1/M).

| function | estimates | estimator |
|---|---|---|
| ``energy_distance`` | 2 E|X - Y| - E|X - X'| - E|Y - Y'| | U-statistic (V on request) |
| ``mmd`` | E k(X, X') + E k(Y, Y') - 2 E k(X, Y), a square | U-statistic (V on request) |
| ``sliced_wasserstein`` | (E_theta W_2^2)^(1/2), not a square | plug-in, biased upwards |
| ``frechet_distance`` | W_2^2 of fitted Gaussians, a square | plug-in, biased upwards |

Beside them stand what a distance does not tell apart: a part of the data that is never drawn
(``modes``, ``coverage``) and blur (``power_spectrum``, ``sharpness``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .levels import start_generator
from .ops import as_labels, as_numbers, check_callable, check_count, check_number

__all__ = [
    "energy_distance",
    "frechet_distance",
    "mmd",
    "nearest_neighbour_distance",
    "sliced_wasserstein",
]

BLOCK = 1 << 20  # pairs that a float64 block holds: 8 MiB

Samples = Tensor | ArrayLike
"""Real numbers (N, *D)."""


def energy_distance(x: Samples, y: Samples, unbiased: bool = True) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, in the units of the data (Szekely and Rizzo 2013).

    It vanishes only for equal laws. ``scipy.stats.energy_distance`` is the square root of it, in
    one dimension and with the biased estimator.

    Args:
        x, y: samples (N, *D) and (M, *D).
        unbiased: leave a sample's distance to itself out of the means (U-statistic); otherwise
            the V-statistic.

    Raises:
        TypeError: what are no real numbers.
        ValueError: shapes that differ, fewer than two samples, NaN or infinity.

    >>> sg.metrics.energy_distance(torch.zeros(2, 1), torch.full((2, 1), 3.0))
    6.0
    """
    return -_discrepancy(x, y, lambda squared: squared.sqrt_(), 0.0, unbiased)


def mmd(x: Samples, y: Samples, bandwidth: float, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy of the kernel k(x, y) = exp(-|x - y|^2 / 2 h^2).

    E k(X, X') + E k(Y, Y') - 2 E k(X, Y) (Gretton et al. 2012, lemma 6 and equations 3 and 5).

    Args:
        x, y: samples (N, *D) and (M, *D).
        bandwidth: h, in the units of the data.
        unbiased: U-statistic, otherwise V-statistic.

    Raises:
        TypeError, ValueError: as ``energy_distance``, or a bandwidth that is not positive.

    >>> x = torch.randn(100, 2)
    >>> sg.metrics.mmd(x, x, bandwidth=1.0, unbiased=False)
    0.0
    """
    bandwidth = check_number(bandwidth, "bandwidth", above=0)

    def kernel(squared: Tensor) -> Tensor:
        return squared.mul_(-0.5 / bandwidth**2).exp_()

    return _discrepancy(x, y, kernel, 1.0, unbiased)


def sliced_wasserstein(
    x: Samples, y: Samples, projections: int = 512, generator: torch.Generator | None = None
) -> float:
    """(mean over directions theta of W_2^2(theta.x, theta.y))^(1/2) (Bonneel et al. 2015).

    Each projected distance is the exact one between two empirical measures, also for N != M, in
    the units of the data. Between samples of one law it falls like N^(-1/2), up to logarithms,
    where projections have light tails and no gaps (a Gaussian), but like N^(-1/4) where the law
    has separated modes: their counts differ by N^(1/2), and that share of the mass has to cross.
    For N samples a side, half of them at each of two points a apart on the line, the mean of its
    square is a^2 / sqrt(pi N) (Bobkov and Ledoux 2019 have the general theory).

    Args:
        x, y: samples (N, *D) and (M, *D).
        projections: how many directions, uniform on the sphere.
        generator: CPU generator of the directions; None starts one from seed 0.

    Raises:
        TypeError, ValueError: as ``energy_distance`` (one sample will do), or fewer than one
            projection.

    >>> x = torch.randn(100, 2)
    >>> sg.metrics.sliced_wasserstein(x, x)
    0.0
    """
    x, y = _prepare(x, y, least=1)
    x, y = x - y.mean(0), y - y.mean(0)  # projections keep the digits of the differences
    projections = check_count(projections, "projections")
    generator = start_generator(generator)
    theta = torch.randn(projections, x.shape[1], generator=generator, dtype=torch.float64)
    theta = (theta / theta.norm(dim=1, keepdim=True)).to(x.device)
    i, j, weight = _couple(len(x), len(y), x.device)
    total = 0.0
    for directions in theta.split(max(1, BLOCK // (len(x) + len(y)))):
        u = (directions @ x.T).sort(dim=1).values
        v = (directions @ y.T).sort(dim=1).values
        total += float(((u[:, i] - v[:, j]).square() * weight).sum())
    return float((total / projections) ** 0.5)


def frechet_distance(
    x: Samples, y: Samples, features: Callable[[Tensor], Any] | None = None
) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), W_2^2 between fitted Gaussians.

    Dowson and Landau (1982); with Inception features it is the FID of Heusel et al. (2017). The
    covariances are unbiased, the distance is not: samples of one Gaussian law, N and M of them,
    many more than features, lie in the mean

        (1/N + 1/M) [5/4 sum_i v_i + 1/2 sum_ij v_i v_j / (v_i + v_j)]

    apart, v being the eigenvalues of its covariance: for k equal ones k (k + 5) / 4 of them, the
    square of the number of features. Compare equal N only. The trace of the root is the nuclear
    norm of C_x^(1/2) C_y^(1/2), which singular covariances do not trouble.

    Args:
        x, y: samples (N, *D) and (M, *D).
        features: maps (N, *D) to (N, k), a tensor or an array; None is the flattened sample.

    Raises:
        TypeError, ValueError: as ``energy_distance``, or features that are not (N, k).

    >>> x = torch.randn(100, 2)
    >>> round(sg.metrics.frechet_distance(x, x + torch.tensor([3.0, 4.0])), 3)
    25.0
    """
    if features is not None:
        x, y = (_features(features, as_numbers(z, name)) for name, z in (("x", x), ("y", y)))
    x, y = _prepare(x, y, least=2)
    mean = (x.mean(0) - y.mean(0)).square().sum()
    roots = [_root(torch.atleast_2d(z.T.cov())) for z in (x, y)]
    trace = sum(root.square().sum() for root in roots)
    return float(mean + trace - 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum())


def nearest_neighbour_distance(x: Samples, reference: Samples) -> Tensor:
    """Euclidean distance from each sample of x to the nearest of ``reference``: (N,) float64.

    Exactly zero for a copy. Beside the same for held-out data it says whether a model memorises.

    Raises:
        TypeError, ValueError: as ``energy_distance``; one sample will do.

    >>> data = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    >>> sg.metrics.nearest_neighbour_distance(torch.zeros(1, 2), data)
    tensor([5.], dtype=torch.float64)
    """
    x, reference = _prepare(x, reference, least=1, names=("x", "reference"))
    nearest = torch.cat([squared.argmin(1) for squared in _blocks(x, reference)])
    return (x - reference[nearest]).norm(dim=1)


class Modes(NamedTuple):
    """Samples told apart by the mode that they lie at.

    Attributes:
        covered: the number of modes at which a sample lies.
        share: the part of the samples that lie at a mode.
        counts: samples at each mode, (K,) int64.
    """

    covered: int
    share: float
    counts: Tensor


def modes(x: Samples, centres: Samples, radius: float) -> Modes:
    """Which of the modes of a law have samples, and how many samples have none.

    A sample lies at the nearest centre, if that is within ``radius``. For isotropic Gaussians of
    standard deviation s in d dimensions, far apart, a radius of 3 s is usual (Srivastava et al.
    2017); exact samples then have a share of P(chi^2_d <= 9), in the plane 1 - e^(-9/2) = 0.989,
    and leave one of K equally likely modes out with probability (1 - 0.989 / K)^N each.

    Args:
        x: samples (N, *D).
        centres: of the modes, (K, *D).
        radius: in the units of the data.

    Raises:
        TypeError, ValueError: as ``energy_distance`` (one sample will do), or a radius below 0.
    """
    x, centres = _prepare(x, centres, least=1, names=("x", "centres"))
    radius = check_number(radius, "radius", least=0)
    nearest = torch.cat([squared.argmin(1) for squared in _blocks(x, centres)])
    there = (x - centres[nearest]).norm(dim=1) <= radius
    counts = nearest[there].bincount(minlength=len(centres)).cpu()
    return Modes(int((counts > 0).sum()), float(there.double().mean()), counts)


def coverage(y: ArrayLike | Tensor, reference: ArrayLike | Tensor) -> float:
    """sum over classes of min(p, q), p and q how often each class is in y and in the reference.

    1 - (total variation): 1 where both have the same frequencies, k / K where k of K equally
    likely classes are there, and those in equal parts.

    Args:
        y, reference: labels (N,) and (M,), such as what a classifier takes samples for, and those
            of the data.

    Raises:
        TypeError: no integers. ValueError: no labels, or not one axis of them.
    """
    found = []
    for name, given in (("y", y), ("reference", reference)):
        labels = as_labels(given, name)
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"{name} must be labels (N,), got {tuple(labels.shape)}")
        found.append(labels.cpu())
    low = int(torch.cat(found).min())
    size = int(torch.cat(found).max()) - low + 1
    p, q = (((z - low).bincount(minlength=size) / len(z)).double() for z in found)
    return float(torch.minimum(p, q).sum())


def power_spectrum(x: Samples) -> Tensor:
    """Power of images at each distance from the zero frequency, (K,) float64: the mean over
    samples, channels and directions.

    The power of an image of n pixels at a wave is |sum_j x_j e^(-i k.j)|^2 / n, so white noise has
    its variance everywhere. Place r holds the waves whose wave vector, in cycles a pixel, has a
    length that rounds to r / m, for m = min(H, W) and r = 0 .. m // 2; the corners beyond are left
    out.

    Args:
        x: (N, C, H, W).

    Raises:
        TypeError: no real numbers. ValueError: another shape, NaN or infinity.
    """
    total, waves = _rings(x, "x")
    return total / waves


def sharpness(x: Samples, reference: Samples) -> float:
    """Power of the images x at the finer half of the waves, over that of the reference.

    1 for images that are as sharp, below for blurred ones, above for grainy ones. For the
    reference seen through a filter of transfer function H it is the mean of |H|^2 over these
    waves, each weighted by its power. They are the upper half of the places of
    ``power_spectrum``, above a quarter of a cycle a pixel.

    Args:
        x, reference: (N, C, H, W) and (M, C, H, W).

    Raises:
        TypeError, ValueError: as ``power_spectrum``, images of other sizes, or a reference that
            has no fine waves.
    """
    (mine, n), (theirs, m) = _rings(x, "x"), _rings(reference, "reference")
    if not torch.equal(n, m):
        raise ValueError("x and reference must be images of one size")
    fine = 2 * torch.arange(len(n)) > len(n) - 1
    if not float(theirs[fine].sum()) > 0:
        raise ValueError("the reference has no fine waves")
    return float(mine[fine].sum() / theirs[fine].sum())


def _rings(x: Samples, name: str) -> tuple[Tensor, Tensor]:
    """The sum of the power of the waves at each distance, and their number."""
    x = as_numbers(x, name)
    if x.ndim != 4 or x.numel() == 0 or min(x.shape[2:]) < 2:
        raise ValueError(f"{name} must be images (N, C, H, W), got {tuple(x.shape)}")
    x = x.detach().cpu().double()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinity in {int((~x.isfinite()).sum())} places")
    height, width = x.shape[2:]
    least = min(height, width)
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    ring = (least * (fy[:, None].square() + fx.square()).sqrt()).round().long()
    power = torch.fft.fft2(x).abs().square().mean((0, 1)) / (height * width)
    inside = ring <= least // 2
    size = least // 2 + 1
    total = torch.zeros(size, dtype=torch.float64).index_add(0, ring[inside], power[inside])
    return total, ring[inside].bincount(minlength=size)


def _prepare(
    x: Samples, y: Samples, least: int, names: tuple[str, str] = ("x", "y")
) -> tuple[Tensor, Tensor]:
    """Both as finite float64 matrices."""
    x, y = (as_numbers(z, name) for name, z in zip(names, (x, y), strict=True))
    if x.shape[1:] != y.shape[1:] or min(x.ndim, y.ndim) < 1:
        raise ValueError(
            f"{names[0]} and {names[1]} must be (N, *D) and (M, *D), got {tuple(x.shape)} and"
            f" {tuple(y.shape)}"
        )
    size = math.prod(x.shape[1:])
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    x, y = (z.detach().to(device, torch.float64).reshape(len(z), size) for z in (x, y))
    for name, z in zip(names, (x, y), strict=True):
        if len(z) < least or z.shape[1] == 0:
            raise ValueError(f"{name} must hold at least {least} samples, got {tuple(z.shape)}")
        if not bool(z.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinity in {int((~z.isfinite()).sum())} places")
    return x, y


def _blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Squared distances, (rows, M) for a few rows of x at a time, to 10 digits or more.

    |x|^2 + |y|^2 - 2 x.y is one matrix product. It loses the digits of pairs that lie much closer
    to each other than to the origin, which is put amidst the samples (outliers do not move it);
    what is lost all the same comes from the differences.
    """
    middle, part = y.median(0).values, max(1, BLOCK // y.shape[1])
    v = y - middle
    size = v.square().sum(1)
    for rows in x.split(max(1, BLOCK // len(y))):
        u = rows - middle
        own = u.square().sum(1, keepdim=True)
        squared = torch.addmm(size, u, v.T, alpha=-2).add_(own)
        for near in (squared < 2e-6 * own).nonzero().split(part):
            i, j = near.T
            squared[i, j] = (rows[i] - y[j]).square().sum(1)
        yield squared


def _discrepancy(
    x: Samples, y: Samples, kernel: Callable[[Tensor], Tensor], diagonal: float, unbiased: bool
) -> float:
    """Mean kernel within x plus within y minus twice across, for a kernel of |x - y|^2."""
    x, y = _prepare(x, y, least=2)

    def within(z: Tensor) -> float:
        # A point's distance to itself is known: rounding must not enter through its root.
        pairs, n = 0.0, len(z)
        for start, squared in zip(range(0, n, max(1, BLOCK // n)), _blocks(z, z), strict=True):
            k = kernel(squared)
            pairs += float(k.sum() - k.diagonal(start).sum())
        return pairs / (n * (n - 1)) if unbiased else (pairs + n * diagonal) / n**2

    across = sum(float(kernel(squared).sum()) for squared in _blocks(x, y)) / (len(x) * len(y))
    return within(x) + within(y) - 2 * across


def _couple(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of n with m equal masses: indices i, j and the mass that they share.

    In units of 1/(n m) the masses of the two sides end at the multiples of m and of n.
    """
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    weight = (ends - starts).double() / (n * m)
    return (starts // m).to(device), (starts // n).to(device), weight.to(device)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root, taking eigenvalues that rounding made negative as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _features(features: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    check_callable(features, "features", "features(x)")
    f = as_numbers(features(x), "features(x)")
    if f.ndim != 2 or len(f) != len(x):
        raise ValueError(f"features must be ({len(x)}, k), got {tuple(f.shape)}")
    return f
