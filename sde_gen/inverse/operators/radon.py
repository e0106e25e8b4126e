"""The Radon transform: sums of an image along parallel rays, as in computed tomography.

Geometry. Pixels are squares of side 1, the image constant on each. Its centre is the origin, u
points right (columns) and v points up (against the rows): pixel (i, j) of (H, W) has its centre at
u = j - (W - 1) / 2, v = (H - 1) / 2 - i. The ray (theta, s) is the line u cos theta + v sin theta
= s; bin k of K collects the rays with |s - s_k| < 1/2, s_k = k - (K - 1) / 2, and is their mean

    y[theta, k] = integral over the bin ds integral along the ray x(u, v).

A pixel's shadow at theta is the convolution of two boxes of widths |cos theta| and |sin theta|, a
trapezoid of area 1; its integral over a bin has a closed form, so the matrix is exact for images
that are constant on pixels, and every angle keeps the total: sum_k y[theta, k] = sum_ij x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import check_finite, check_tensor
from .base import Operator, apply_pair, sizes


class Radon(Operator):
    """Line integrals of an image: (B, *rest, H, W) -> (B, *rest, A, K), A angles and K bins.

    Units: those of x times one pixel side: with pixels of 0.5 mm, y in units of x mm is
    0.5 * forward(x). The geometry is that of the module, with an exact sparse matrix of at most
    3 A H W entries (16 bytes each, kept twice).

    Args:
        angles: (A,) theta in radians, within [-2 pi, 2 pi].
        shape: *D, the image its last two axes.
        detectors: K; None for all that the image can reach, ceil(sqrt(H^2 + W^2)).

    >>> Radon(torch.tensor([0.0]), (2, 2)).forward(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[[2., 5., 3.]]])
    """

    def __init__(self, angles: Tensor, shape: Sequence[int], detectors: int | None = None) -> None:
        _check_angles(angles)
        shape = sizes(shape, "shape")
        if len(shape) < 2:
            raise ValueError(f"shape must end in an image (H, W), got {shape}")
        size = shape[-2:]
        k = math.ceil(math.hypot(*size)) if detectors is None else detectors
        super().__init__(shape, sizes((*shape[:-2], len(angles), k), "detectors"))
        self.angles, self.device = angles, angles.device
        matrix = _matrix(angles.double(), size, k)
        self._matrix, self._transpose = _by_rows(matrix), _by_rows(matrix.T)

    def _forward(self, x: Tensor) -> Tensor:
        return apply_pair(x, self._project, self._back)

    def _adjoint(self, y: Tensor) -> Tensor:
        return apply_pair(y, self._back, self._project)

    def _project(self, x: Tensor) -> Tensor:
        return self._times("_matrix", x).reshape(-1, *self.measured)

    def _back(self, y: Tensor) -> Tensor:
        return self._times("_transpose", y).reshape(-1, *self.shape)

    def _times(self, name: str, x: Tensor) -> Tensor:
        flat = x.flatten(-2).flatten(0, -2)
        return (self._like(name, x) @ flat.T).T


def _matrix(angles: Tensor, size: Sequence[int], k: int) -> Tensor:
    """(A K, H W), sparse: what each pixel adds to each bin."""
    h, w = size
    options = {"dtype": torch.float64, "device": angles.device}
    u = torch.arange(w, **options) - (w - 1) / 2  # type: ignore[call-overload]
    v = (h - 1) / 2 - torch.arange(h, **options)  # type: ignore[call-overload]
    cos, sin = angles.cos(), angles.sin()
    centre = (cos.reshape(-1, 1, 1) * u + sin.reshape(-1, 1, 1) * v.unsqueeze(1)).flatten(1)
    half = ((cos.abs() + sin.abs()) / 2).unsqueeze(1)
    # A shadow is at most sqrt(2) wide: it meets three bins, of which this is the first.
    first = torch.floor(centre - half + k / 2).to(torch.int64)
    bins = first.unsqueeze(-1) + torch.arange(3, device=angles.device)
    edge = bins - k / 2 - centre.unsqueeze(-1)
    a, b = (c.reshape(-1, 1, 1) for c in (cos.abs(), sin.abs()))
    weight = _shadow(edge + 1, a, b) - _shadow(edge, a, b)
    row = bins + k * torch.arange(len(angles), device=angles.device).reshape(-1, 1, 1)
    column = torch.arange(h * w, device=angles.device).unsqueeze(-1).expand_as(row)
    seen = (weight > 1e-15) & (bins >= 0) & (bins < k)
    index = torch.stack([row[seen], column[seen]])
    with warnings.catch_warnings():
        # Some versions say that they do not check, when they are told to.
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        return torch.sparse_coo_tensor(
            index, weight[seen], (len(angles) * k, h * w), check_invariants=True
        )


def _by_rows(matrix: Tensor) -> Tensor:
    """In rows: ten times as fast to multiply by as a list of entries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        return matrix.coalesce().to_sparse_csr()


def _shadow(s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Integral from -infinity to s of the convolution of unit-area boxes of widths a and b.

    With the wider box first it is the mean of a ramp from 0 to 1 over an interval, and free of
    cancellation where the other width vanishes.
    """
    a, b = torch.maximum(a, b), torch.minimum(a, b)
    u, half = s / a + 0.5, b / (2 * a)
    return _mean_ramp(u, half) - _mean_ramp(u - 1, half)


def _mean_ramp(u: Tensor, half: Tensor) -> Tensor:
    """Mean of max(z, 0) over z in [u - half, u + half]."""
    high = u + half
    inside = high * (high / (2 * half).clamp_min(1e-300)) / 2
    return torch.where(u >= half, u, torch.where(high <= 0, 0.0, inside))


def _check_angles(angles: Tensor) -> None:
    check_tensor(angles, "angles")
    if angles.ndim != 1 or len(angles) == 0 or not angles.is_floating_point():
        raise ValueError(
            f"angles must be (A,) in radians, floating point, got {tuple(angles.shape)}"
            f" {angles.dtype}"
        )
    check_finite(angles, "angles")
    if float(angles.abs().max()) > 2 * math.pi + 1e-6:
        raise ValueError(
            f"angles are in radians, within [-2 pi, 2 pi]; got {float(angles.abs().max()):.4g}:"
            " torch.deg2rad(angles) makes them of degrees"
        )
