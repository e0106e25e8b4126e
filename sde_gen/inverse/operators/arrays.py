"""Linear observations of arrays: weighted sums, missing entries, low resolution, blur, Fourier.

All are torch operations of any batch. Those of images act on the last axes of *D and treat every
axis before them (colours, channels) alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ...ops import check_finite, check_tensor
from .base import Operator, sizes


class Matrix(Operator):
    """y = A x for a matrix (m, n), n = prod(D): (B, *D) -> (B, m). Units: those of A times x.

    Args:
        matrix: (m, n), finite.
        shape: *D; None for (n,).

    >>> Matrix(torch.tensor([[1.0, 1.0, 0.0]])).forward(torch.tensor([[1.0, 2.0, 5.0]]))
    tensor([[3.]])
    """

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None) -> None:
        _check_values(matrix, "matrix")
        if matrix.ndim != 2:
            raise ValueError(f"matrix must be (m, n), got {tuple(matrix.shape)}")
        super().__init__(matrix.shape[1:] if shape is None else shape, matrix.shape[:1])
        if math.prod(self.shape) != matrix.shape[1]:
            raise ValueError(
                f"matrix {tuple(matrix.shape)} has {matrix.shape[1]} columns, x of shape"
                f" {self.shape} has {math.prod(self.shape)} entries"
            )
        self.matrix, self.device = matrix, matrix.device

    def _forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self._like("matrix", x).mT

    def _adjoint(self, y: Tensor) -> Tensor:
        return (y @ self._like("matrix", y)).reshape(-1, *self.shape)


class Mask(Operator):
    """The entries of x that were observed, in row-major order: (B, *D) -> (B, m).

    Units: those of x. An unobserved entry is not in y: it has no value and no noise. The adjoint
    puts 0 there.

    Args:
        mask: boolean (*D), True where x was observed, at least once.

    >>> Mask(torch.tensor([True, False, True])).forward(torch.tensor([[1.0, 2.0, 5.0]]))
    tensor([[1., 5.]])
    """

    def __init__(self, mask: Tensor) -> None:
        _check_mask(mask)
        self._observed = mask.flatten().nonzero().squeeze(1)
        super().__init__(mask.shape, self._observed.shape)
        self._place = _places(self._observed, mask.numel())
        self.mask, self.device = mask, mask.device

    def _forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).index_select(1, self._like("_observed", x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return _scatter(y, self._like("_place", y)).reshape(-1, *self.shape)


class Downsample(Operator):
    """Means over blocks of f entries an axis: (B, *rest, H, W) -> (B, *rest, H / f, W / f).

    Units: those of x. The adjoint spreads each value evenly over its block, divided by the size
    of the block.

    Args:
        factor: f, of the last two axes (of the only one where D has one), or a tuple of one number
            for each of the last axes.
        shape: *D, divisible by the factors.

    >>> Downsample(2, (4,)).forward(torch.tensor([[1.0, 3.0, 5.0, 5.0]]))
    tensor([[2., 5.]])
    """

    def __init__(self, factor: int | Sequence[int], shape: Sequence[int]) -> None:
        shape = sizes(shape, "shape")
        axes = min(2, len(shape))
        factors = sizes((factor,) * axes if isinstance(factor, int) else factor, "factor")
        self.factors = (1,) * (len(shape) - len(factors)) + factors
        if len(self.factors) > len(shape) or any(
            n % f for n, f in zip(shape, self.factors, strict=True)
        ):
            raise ValueError(f"factor {factor} does not divide the last axes of {shape}")
        super().__init__(shape, [n // f for n, f in zip(shape, self.factors, strict=True)])

    def _forward(self, x: Tensor) -> Tensor:
        for axis, f in enumerate(self.factors, 1):
            if f > 1:
                x = x.unflatten(axis, (-1, f)).mean(axis + 1)
        return x

    def _adjoint(self, y: Tensor) -> Tensor:
        for axis, f in enumerate(self.factors, 1):
            if f > 1:
                blocks = y.unsqueeze(axis + 1).expand(
                    *y.shape[: axis + 1], f, *y.shape[axis + 1 :]
                )
                y = blocks.flatten(axis, axis + 1) / f
        return y


Padding = Literal["circular", "zero"]


class Blur(Operator):
    """Convolution, y_i = sum_j k_j x_(i + c - j) with c = size // 2: (B, *D) -> (B, *D).

    An axis of the kernel for each of the last axes of *D. Units: those of x times the sum of the
    kernel, which is used as given. Computed by FFT, so a large kernel costs what a small one does.

    Args:
        kernel: one to three axes, finite, any sizes.
        shape: *D.
        padding: what lies outside of x: "circular", x itself, or "zero".

    >>> Blur(torch.tensor([0.5, 0.5]), (4,)).forward(torch.tensor([[0.0, 1.0, 0.0, 2.0]]))
    tensor([[0.5000, 0.5000, 1.0000, 1.0000]])
    """

    def __init__(
        self, kernel: Tensor, shape: Sequence[int], padding: Padding = "circular"
    ) -> None:
        super().__init__(shape, shape)
        _check_values(kernel, "kernel")
        if padding not in get_args(Padding):
            raise ValueError(f"padding must be one of {get_args(Padding)}, got {padding!r}")
        last = self.shape[len(self.shape) - kernel.ndim :]
        if not 0 < kernel.ndim <= len(self.shape):
            raise ValueError(
                f"kernel {tuple(kernel.shape)} needs an axis for each of the last axes of"
                f" {self.shape}"
            )
        if padding == "circular" and any(k > n for k, n in zip(kernel.shape, last, strict=True)):
            raise ValueError(
                f"a circular kernel must fit into x: {tuple(kernel.shape)} is larger than {last}"
            )
        self.padding, self.kernel, self.device = padding, kernel, kernel.device
        extra = [0 if padding == "circular" else k - 1 for k in kernel.shape]
        self._size = [n + e for n, e in zip(last, extra, strict=True)]
        self._axes = tuple(range(-kernel.ndim, 0))
        self._inside = (..., *(slice(n) for n in last))
        # The kernel's centre at index 0, its left half wrapped to the end.
        wide = kernel.new_zeros(self._size, dtype=torch.float64)
        wide[tuple(slice(k) for k in kernel.shape)] = kernel.double()
        wide = wide.roll([-(k // 2) for k in kernel.shape], self._axes)
        self._transfer = torch.fft.rfftn(wide)
        self._back = self._transfer.conj().resolve_conj()

    def _filter(self, x: Tensor, transfer: str) -> Tensor:
        z = torch.fft.rfftn(x, self._size, self._axes) * self._like(transfer, x)
        return torch.fft.irfftn(z, self._size, self._axes)[self._inside]

    def _forward(self, x: Tensor) -> Tensor:
        return self._filter(x, "_transfer")

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, "_back")


class Fourier(Operator):
    """Some coefficients of the orthonormal Fourier transform: (B, *rest, *S) -> (B, *rest, m, 2).

    y[..., 0] and y[..., 1] are the real and imaginary parts of the m coefficients where the mask
    is True, in row-major order. Units: those of x; white noise of standard deviation s in x is
    noise of s / sqrt(2) in each part (of s in the real part where the frequency is its own
    negative, as 0 is). The noise of an observation is that of each part.

    Args:
        mask: boolean (*S), the last axes of *D; frequencies in the order of
            ``torch.fft.fftfreq``, 0 first: one drawn with 0 in the middle needs
            ``torch.fft.ifftshift``.
        shape: *D; None for *S.

    >>> Fourier(torch.tensor([True, False])).forward(torch.tensor([[1.0, 1.0]]))
    tensor([[[1.4142, 0.0000]]])
    """

    def __init__(self, mask: Tensor, shape: Sequence[int] | None = None) -> None:
        _check_mask(mask)
        shape = tuple(mask.shape) if shape is None else sizes(shape, "shape")
        rest = shape[: len(shape) - mask.ndim]
        if rest + tuple(mask.shape) != shape:
            raise ValueError(f"mask {tuple(mask.shape)} must have the last axes of x, {shape}")
        self._observed = mask.flatten().nonzero().squeeze(1)
        super().__init__(shape, (*rest, len(self._observed), 2))
        self._place = _places(self._observed, mask.numel())
        self._axes = tuple(range(-mask.ndim, 0))
        self.mask, self.device = mask, mask.device

    def _forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fftn(x, dim=self._axes, norm="ortho").flatten(self._axes[0])
        return torch.view_as_real(z.index_select(-1, self._like("_observed", x)))

    def _adjoint(self, y: Tensor) -> Tensor:
        z = _scatter(torch.view_as_complex(y.contiguous()), self._like("_place", y))
        z = z.unflatten(-1, self.mask.shape)
        return torch.fft.ifftn(z, dim=self._axes, norm="ortho").real


def _places(observed: Tensor, n: int) -> Tensor:
    """For each of n entries its place among the observed; len(observed) for the others."""
    place = torch.full((n,), len(observed), device=observed.device)
    place[observed] = torch.arange(len(observed), device=observed.device)
    return place


def _scatter(y: Tensor, place: Tensor) -> Tensor:
    """(*, m) -> (*, n): y at its places, 0 elsewhere; no writing in place, for torch.func."""
    return torch.cat([y, torch.zeros_like(y[..., :1])], -1).index_select(-1, place)


def _check_values(x: Tensor, name: str) -> None:
    check_tensor(x, name)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be real floating point, got {x.dtype}")
    check_finite(x, name)
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(x.shape)}")


def _check_mask(mask: Tensor) -> None:
    check_tensor(mask, "mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True where observed (mask > 0), got {mask.dtype}")
    if mask.ndim == 0 or not bool(mask.any()):
        raise ValueError(f"mask {tuple(mask.shape)} observes nothing: it is True nowhere")
