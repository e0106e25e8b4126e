"""What was observed: y = A(x) + n with Gaussian noise n ~ N(0, S), and its likelihood.

S is that of the numbers in y, in their units: a standard deviation 0.1 on images in [-1, 1] is one
of 0.05 on images in [0, 1].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import check_finite, check_state
from .operators import Operator, Stack


class Observation:
    """y = A(x) + n, n ~ N(0, S): what was measured of x (*D), and how well.

    Args:
        operator: A, from (B, *D) to (B, *M).
        y: the measurement, (*M) or (1, *M) of every sample, or (R, *M), a row for each of R.
        noise: standard deviation of the noise in y, **in the units of y**: a number, (*M), or like
            y, (R, *M). Positive.
        covariance: S instead, (m, m) or (R, m, m) with m = prod(M), in those units squared;
            positive definite.

    Raises:
        TypeError: not an ``Operator``, or y not a floating-point tensor.
        ValueError: y or noise of another shape, NaN, noise that is zero or negative, a covariance
            that is not symmetric and positive definite, both or neither of the two.

    >>> from sde_gen.inverse import Downsample
    >>> Observation(Downsample(2, (4,)), torch.tensor([1.0, -1.0]), 0.1)
    Observation(Downsample((4,) -> (2,)), y (2,) for all samples, rms 1; noise std 0.1 in the
    units of y)
    """

    std: Tensor | None = None
    _root: Tensor | None = None

    def __init__(
        self,
        operator: Operator,
        y: Tensor,
        noise: float | Tensor | None = None,
        *,
        covariance: Tensor | None = None,
    ) -> None:
        if not isinstance(operator, Operator):
            raise TypeError(
                f"operator must be an Operator, got {type(operator).__name__}: Matrix(a) takes a"
                " matrix, Callables(forward, adjoint, shape) two functions"
            )
        _check_y(y, operator)
        if (noise is None) == (covariance is None):
            raise ValueError(
                "an observation needs its noise: a standard deviation, or covariance=, not both"
            )
        self.operator, self.y = operator, y
        if noise is not None:
            self.std = _standard_deviation(noise, y, operator.measured)
        elif covariance is not None:
            self._root = _root(covariance, y, operator.measured)
        if self.batch == 1:
            only = self.rows(0)
            self.y, self.std, self._root = only.y, only.std, only._root

    @property
    def batch(self) -> int | None:
        """R, the number of samples that y has a row for; None where y is that of every sample."""
        return len(self.y) if self.y.ndim > len(self.operator.measured) else None

    def __repr__(self) -> str:
        rms = float(self.y.double().square().mean().sqrt())
        whose = "for all samples" if self.batch is None else f"for {self.batch} samples"
        law = "std" if self._root is None else "correlated, std"
        return (
            f"Observation({self.operator}, y {tuple(self.y.shape)} {whose}, rms {rms:.4g};"
            f" noise {law} {_range(self._spread())} in the units of y)"
        )

    def residual(self, x: Tensor) -> Tensor:
        """y - A(x): (B, *D) -> (B, *M), in the dtype and on the device of x."""
        ax = self.operator.forward(x)
        if self.batch not in (None, len(x)):
            raise ValueError(f"y has a row for each of {self.batch} samples, x has {len(x)}")
        return self.y.to(ax) - ax

    def whiten(self, r: Tensor) -> Tensor:
        """W r with W^T W = S^-1, so that the noise becomes N(0, I): (B, *M) -> (B, *M).

        W = 1 / std, or the inverse of the lower Cholesky factor of S.
        """
        if self._root is None:
            return r / self._std(r)
        z = torch.linalg.solve_triangular(self._root.to(r), _column(r), upper=False)
        return z.reshape(z.shape[0], *r.shape[1:])

    def whiten_adjoint(self, v: Tensor) -> Tensor:
        """W^T v: (B, *M) -> (B, *M)."""
        if self._root is None:
            return v / self._std(v)
        z = torch.linalg.solve_triangular(self._root.to(v).mT, _column(v), upper=True)
        return z.reshape(z.shape[0], *v.shape[1:])

    def whitened(self, a: Tensor) -> Tensor:
        """W a for the matrix a (m, n) of A, float64: (1, m, n), or (R, m, n) where each row has
        its own noise."""
        if self._root is None:
            std = _lines(self._std(a), self.operator.measured, None)
            return a / std.expand(*std.shape[:-1], len(a)).reshape(-1, len(a), 1)
        return torch.linalg.solve_triangular(self._root.to(a), a.unsqueeze(0), upper=False)

    def precision(self, r: Tensor) -> Tensor:
        """S^-1 r: (B, *M) -> (B, *M). The likelihood's gradient is J^T S^-1 (y - A(x))."""
        if self._root is None:
            return r / self._std(r) ** 2
        z = torch.cholesky_solve(_column(r), self._root.to(r))
        return z.reshape(z.shape[0], *r.shape[1:])

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log N(y; A(x0), S) in nats, with its constant: (B, *D) -> (B,), float64.

        -1/2 |W (y - A x0)|^2 - 1/2 log det S - m/2 log 2 pi.
        """
        r = self.residual(x0)
        z = self.whiten(r if r.device.type == "mps" else r.double()).flatten(1)
        return -0.5 * z.square().sum(1) - self.log_volume.to(z)

    @property
    def log_volume(self) -> Tensor:
        """1/2 log det(2 pi S), float64: () or, where each row has its own noise, (R,)."""
        m = math.prod(self.operator.measured)
        constant = 0.5 * m * math.log(2 * math.pi)
        if self._root is not None:
            return constant + self._root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        lines = _lines(self._spread().log(), self.operator.measured, None)
        return constant + lines.sum(-1)

    def rows(self, index: int | slice | Tensor) -> Observation:
        """The observation of a selection of the samples: what there is a row of follows.

        A number takes that of one sample, which then is one of all samples.
        """
        if self.batch is None:
            return self
        chosen = copy.copy(self)
        chosen.y = self.y[index]
        if self.std is not None and self.std.ndim == self.y.ndim:
            chosen.std = self.std[index]
        if self._root is not None and self._root.ndim == 3:
            chosen._root = self._root[index]
        return chosen

    def to(self, device: torch.device) -> Observation:
        """The same observation with its numbers on a device."""
        if self.y.device == device:
            return self
        moved = copy.copy(self)
        moved.y = self.y.to(device)
        moved.std = None if self.std is None else self.std.to(device)
        moved._root = None if self._root is None else self._root.to(device)
        return moved

    def _std(self, r: Tensor) -> Tensor:
        assert self.std is not None
        return self.std.to(r)

    def _spread(self) -> Tensor:
        """Standard deviations of the entries of y, float64."""
        if self._root is not None:
            return self._root.square().sum(-1).sqrt()
        assert self.std is not None
        return self.std

    def _covariance(self) -> Tensor:
        """S as (m, m) or (R, m, m), float64."""
        if self._root is not None:
            return self._root @ self._root.mT
        measured = self.operator.measured
        std = self._spread()
        std = std if std.ndim > len(measured) else std.expand(measured).unsqueeze(0)
        return torch.diag_embed(std.flatten(1).square()).squeeze(0)


def joint(observations: Observation | Sequence[Observation]) -> Observation:
    """Several observations of one x, with independent noise, as one: their likelihoods multiply.

    Its y is a vector, each part flattened, in the order given. Where one has a row for each sample
    and another is that of all samples, the latter is repeated.

    Raises:
        TypeError, ValueError: none at all, or of another x or another number of samples.

    >>> from sde_gen.inverse import Mask
    >>> left, right = Mask(torch.tensor([True, False])), Mask(torch.tensor([False, True]))
    >>> joint([Observation(left, torch.ones(1), 0.1), Observation(right, torch.ones(1), 0.2)])
    Observation(Stack((2,) -> (2,)), y (2,) for all samples, rms 1; noise std 0.1 .. 0.2 in the
    units of y)
    """
    parts = [observations] if isinstance(observations, Observation) else list(observations)
    if not parts or not all(isinstance(o, Observation) for o in parts):
        raise TypeError(f"observations must be one Observation or a list of them, got {parts}")
    if len(parts) == 1:
        return parts[0]
    operator = Stack([o.operator for o in parts])
    counts = {o.batch for o in parts} - {None}
    if len(counts) > 1:
        raise ValueError(f"the observations have rows for {sorted(map(str, counts))} samples")
    rows = (*counts, None)[0]
    y = torch.cat([_lines(o.y, o.operator.measured, rows).double() for o in parts], -1)
    if all(o._root is None for o in parts):
        each = rows if any(o._spread().ndim > len(o.operator.measured) for o in parts) else None
        std = [_lines(o._spread(), o.operator.measured, each) for o in parts]
        return Observation(operator, y, torch.cat(std, -1))
    return Observation(operator, y, covariance=_diagonal_blocks([o._covariance() for o in parts]))


def _lines(x: Tensor, measured: tuple[int, ...], rows: int | None) -> Tensor:
    """x, () or (*M) or (R, *M), as a vector (m,), or as (rows, m)."""
    lead = () if x.ndim <= len(measured) else x.shape[:1]
    flat = x.expand(*lead, *measured).reshape(*lead, -1)
    return flat if rows is None else flat.expand(rows, -1)


def _diagonal_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """Matrices (m_i, m_i) or (R, m_i, m_i) along the diagonal of one."""
    lead = torch.broadcast_shapes(*(b.shape[:-2] for b in blocks))
    size = sum(b.shape[-1] for b in blocks)
    whole, i = blocks[0].new_zeros(*lead, size, size), 0
    for block in blocks:
        j = i + block.shape[-1]
        whole[..., i:j, i:j], i = block, j
    return whole


def _column(r: Tensor) -> Tensor:
    return r.flatten(1).unsqueeze(-1)


def _range(x: Tensor) -> str:
    low, high = float(x.min()), float(x.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"


def _check_y(y: Any, operator: Operator) -> None:
    measured = operator.measured
    check_state(y.unsqueeze(0) if isinstance(y, Tensor) and y.ndim == 0 else y, "y")
    if y.shape != measured and y.shape[1:] != measured:
        raise ValueError(
            f"y must be what {operator} measures, {measured}, or a row of it for each sample,"
            f" got {tuple(y.shape)}"
        )
    check_finite(y, "y")


def _standard_deviation(noise: float | Tensor, y: Tensor, measured: tuple[int, ...]) -> Tensor:
    std = torch.as_tensor(noise, dtype=torch.float64, device=y.device)
    if std.shape not in ((), measured, tuple(y.shape)):
        raise ValueError(
            f"noise must be a standard deviation: a number, {measured} or like y"
            f" {tuple(y.shape)}, got {tuple(std.shape)}; a covariance matrix goes to covariance="
        )
    check_finite(std, "noise")
    if not bool((std > 0).all()):
        raise ValueError(
            f"noise must be positive, a standard deviation in the units of y, got"
            f" {float(std.min()):.4g}: for exact data say how exact they are"
        )
    return std


def _root(covariance: Tensor, y: Tensor, measured: tuple[int, ...]) -> Tensor:
    """Lower Cholesky factor of the noise, float64."""
    m = math.prod(measured)
    check_state(covariance, "covariance")
    rows = y.shape[: y.ndim - len(measured)]
    if covariance.shape not in ((m, m), (*rows, m, m)):
        raise ValueError(f"covariance must be {(m, m)}, got {tuple(covariance.shape)}")
    check_finite(covariance, "covariance")
    s = covariance.to(y.device).double()
    if not torch.allclose(s, s.mT):
        raise ValueError("covariance must be symmetric")
    root, failed = torch.linalg.cholesky_ex(s)
    if bool(failed.any()):
        low = float(torch.linalg.eigvalsh(s).min())
        raise ValueError(f"covariance must be positive definite, an eigenvalue is {low:.4g}")
    return root
