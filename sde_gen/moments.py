"""Mean and covariance of the data: what a solver may know about them beside the score.

A covariance is kept as the variances of a few kinds of directions: one for all, one for each
coordinate, or a floor for all and one for each of r principal directions. A function f(C) of it
is then just f of those variances, and ``apply`` sums f_j(C) x_j without ever forming a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from .ops import (
    as_real,
    check_count,
    check_finite,
    check_state,
    check_tensor,
    full_precision,
    lasting,
)

__all__ = ["Moments", "data_moments"]

Coefficient = float | Tensor
"""f(C) as numbers: a float where there is one variance, else a tensor (m,) on the CPU."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean m and covariance C of data (*D), n = prod(D).

    Args:
        values: variances, float64 (m,). One: C = values[0] I. With a ``basis`` (n, r) of
            orthonormal columns m = r + 1: C = values[0] (I - U U^T) + U diag(values[1:]) U^T.
            Otherwise m = n: C = diag(values).
        mean: (n,), or None for 0.
        basis: U (n, r), or None.

    Raises:
        ValueError: negative or infinite variances, or as many as fit neither form.

    >>> sg.data_moments(torch.randn(100, 2)).mean.shape
    torch.Size([2])
    """

    values: Tensor
    mean: Tensor | None = None
    basis: Tensor | None = None
    _cast: dict[tuple[torch.dtype, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        check_tensor(self.values, "values")
        if self.basis is not None:
            check_tensor(self.basis, "basis")
        real = self.values.is_floating_point()
        shaped = real and self.values.ndim == 1 and len(self.values) > 0
        if not shaped or not bool((self.values >= 0).all()):
            raise ValueError(f"values must be variances >= 0 of shape (m,), got {self.values}")
        if self.basis is None:
            return
        if self.basis.ndim != 2 or len(self.values) != self.basis.shape[1] + 1:
            raise ValueError(
                f"a basis (n, r) needs r values and a floor, got {tuple(self.basis.shape)} and"
                f" {len(self.values)}"
            )

    def check(self, n: int) -> None:
        """Raise ``ValueError`` unless these may be moments of n coordinates."""
        m = len(self.values) if self.basis is None else len(self.basis)
        sizes = {m if self.basis is not None or m > 1 else n}
        sizes |= set() if self.mean is None else {self.mean.numel()}
        if sizes != {n}:
            raise ValueError(f"moments of {max(sizes - {n})} coordinates, the data have {n}")

    @classmethod
    def of(cls, covariance: Tensor, mean: Tensor | None = None) -> Moments:
        """From a covariance matrix (n, n): all its directions and a floor of 0.

        Raises:
            ValueError: not square, not symmetric, or with a negative eigenvalue.
        """
        c = as_real(covariance, "covariance")
        if c.ndim != 2 or c.shape != c.T.shape or not torch.allclose(c, c.T):
            raise ValueError(f"covariance must be symmetric (n, n), got {tuple(c.shape)}")
        values, basis = torch.linalg.eigh(c)
        if values[0] < -1e-9 * values[-1]:
            raise ValueError(f"covariance has a negative eigenvalue {float(values[0]):.3g}")
        values = torch.cat([values.new_zeros(1), values.clamp_min(0)]).cpu()
        return cls(values, None if mean is None else mean.flatten(), basis)

    @property
    def variance(self) -> float:
        """Mean variance over the coordinates: trace(C) / n (for one value, that value)."""
        if self.basis is None:
            return float(self.values.mean())
        n, r = self.basis.shape
        return float((n - r) * self.values[0] + self.values[1:].sum()) / n

    @property
    def shares(self) -> Tensor:
        """What part of the coordinates each of the values stands for, (m,); they sum to 1."""
        m = len(self.values)
        if self.basis is None:
            return torch.full_like(self.values, 1 / m)
        n = len(self.basis)
        return (
            torch.cat([self.values.new_tensor([n - m + 1.0]), torch.ones_like(self.values[1:])])
            / n
        )

    def information(self, w: Tensor) -> Tensor:
        """1/2 log det(I + C / w) / n: what y = x + sqrt(w) z tells of Gaussian data, in nats a
        dimension, for noise variances w > 0 of any shape."""
        log = torch.log1p(self.values.to(w) / w.unsqueeze(-1))
        return 0.5 * (log * self.shares.to(w)).sum(-1)

    def coefficient(self, f: np.ndarray) -> Coefficient:
        """Numbers f (m,) in the form that ``apply`` takes."""
        return float(f[0]) if len(f) == 1 else torch.from_numpy(np.array(f, dtype=np.float64))

    def _basis_like(self, x: Tensor) -> Tensor:
        """The basis in the dtype and on the device of x, converted once."""
        assert self.basis is not None
        key = (x.dtype, x.device)
        if key not in self._cast:
            with lasting():
                self._cast[key] = self.basis.to(x, copy=self.basis.is_inference())
        return self._cast[key]

    def apply(self, numbers: Sequence[Coefficient], tensors: Sequence[Tensor]) -> Tensor:
        """sum_j f_j(C) x_j for tensors x_j (B, *D)."""
        if self.basis is None:
            return _combine([_spread(f, tensors[0]) for f in numbers], tensors)
        floor = [float(f if isinstance(f, float) else f[0]) for f in numbers]
        x = _combine(floor, tensors)
        basis = self._basis_like(x)
        with full_precision(x.device.type):
            inner = [
                (y.flatten(1) @ basis) * alike(f[1:] - f[0], x)
                for f, y in zip(numbers, tensors, strict=True)
                if isinstance(f, Tensor)
            ]
            if not inner:
                return x
            return x + (torch.stack(inner).sum(0) @ basis.T).reshape(x.shape)

    def both(
        self,
        first: Sequence[Coefficient],
        second: Sequence[Coefficient],
        tensors: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Two such sums of the same tensors; in ``fused`` by one kernel where C is one number."""
        # Inside somebody's own torch.compile, which cannot read a context, the sums fuse anyway.
        asked = not torch.compiler.is_compiling() and _fused.get()
        if asked and self.basis is None and len(self.values) == 1:
            # As many tensors for every step, and none twice: one kernel serves all.
            x, terms = tensors[0], max(TERMS, len(tensors))
            padded = [*tensors, *(torch.zeros_like(x) for _ in range(terms - len(tensors)))]
            rows = _rows(tuple(first), tuple(second), terms, x.dtype, x.device)
            return _kernel()(rows, padded)
        return self.apply(first, tensors), self.apply(second, tensors)


TERMS = 6
"""State, score and four values: what the default solver combines."""
_fused: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def fused() -> Iterator[None]:
    """``Moments.both`` runs through ``torch.compile`` in here: one pass over memory for twelve."""
    before = _fused.set(True)
    try:
        yield
    finally:
        _fused.reset(before)


@cache
def _kernel() -> Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]]:
    return torch.compile(_sums)


@lru_cache(maxsize=1024)
def _rows(
    first: tuple[Coefficient, ...],
    second: tuple[Coefficient, ...],
    terms: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Both rows of numbers, where the kernel wants them: made once for all runs of a plan."""
    with lasting():
        rows = torch.zeros(2, terms, dtype=torch.float64)
        for row, f in zip(rows, (first, second), strict=True):
            row[: len(f)] = torch.tensor([float(v) for v in f], dtype=torch.float64)
        return handed(rows.to(dtype), device)


def _sums(numbers: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    a, b = numbers[0, 0] * tensors[0], numbers[1, 0] * tensors[0]
    for j, x in enumerate(tensors[1:], 1):
        a, b = a + numbers[0, j] * x, b + numbers[1, j] * x
    return a, b


def handed(f: Tensor, device: torch.device) -> Tensor:
    """f on a device; the host does not wait until a GPU has its numbers."""
    given = f.device.type == "cpu" and device.type == "cuda"
    return f.to(device, non_blocking=given)


def alike(f: Tensor, x: Tensor) -> Tensor:
    """f in the dtype and on the device of x, handed over."""
    return handed(f.to(x.dtype), x.device)


def _spread(f: Coefficient, x: Tensor) -> Coefficient:
    return f if isinstance(f, float) else alike(f, x).reshape(x.shape[1:])


def _combine(numbers: Sequence[Coefficient], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j c_j x_j: one new tensor, the rest in place (unless a gradient is recorded)."""
    pairs = [(c, x) for c, x in zip(numbers, tensors, strict=True) if isinstance(c, Tensor) or c]
    if not pairs:
        return torch.zeros_like(tensors[0])
    (c, x), *rest = pairs
    d, y = rest[0] if rest else (None, x)
    if isinstance(c, float) and c == 1 and isinstance(d, float):
        total, rest = x.add(y, alpha=d), rest[1:]  # one pass for two
    else:
        total = x * c
    for c, x in rest:
        if isinstance(c, Tensor):
            total = total + c * x
        elif torch.is_grad_enabled():
            total = total.add(x, alpha=c)
        else:
            total.add_(x, alpha=c)
    return total


def isotropic(variance: float) -> Moments:
    """C = variance I, mean 0."""
    return Moments(torch.tensor([variance], dtype=torch.float64))


def data_moments(x: Tensor, rank: int | None = None, diagonal: bool = False) -> Moments:
    """Mean and covariance of a data set: principal directions plus a floor.

    Args:
        x: data (N, *D), N >= 2, finite.
        rank: number r of principal directions kept; the floor is the mean variance of the rest.
            None keeps all min(N - 1, n), at most 512.
        diagonal: keep a variance for each coordinate and no directions.

    Raises:
        TypeError, ValueError: not floating point, not finite, fewer than 2 samples, rank < 1.

    >>> sg.data_moments(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), rank=1).mean
    tensor([0., 0.], dtype=torch.float64)
    """
    check_state(x)
    check_finite(x)
    if len(x) < 2:
        raise ValueError(f"x must hold at least 2 samples, got {len(x)}")
    y = x.flatten(1).double()
    mean = y.mean(0)
    y = y - mean
    total = y.square().sum(0) / len(y)
    if diagonal:
        return Moments(total.cpu(), mean)
    n = y.shape[1]
    most = min(len(y) - 1, n, 512)
    r = most if rank is None else min(check_count(rank, "rank"), most)
    if n <= 4096:
        values, vectors = torch.linalg.eigh(y.T @ y / len(y))
        values, basis = values.flip(0)[:r].clamp_min(0), vectors.flip(1)[:, :r]
    else:
        s, basis = _leading(y, r)
        values = s.square() / len(y)
    floor = (total.sum() - values.sum()).clamp_min(0) / max(n - r, 1)
    return Moments(torch.cat([floor.reshape(1), values]).cpu(), mean, basis.contiguous())


def _leading(y: Tensor, r: int, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """The r largest singular values of y (N, n) and their right vectors (n, r).

    A randomised subspace iteration (Halko et al. 2011, algorithm 4.4) from a generator of its
    own, so that the same data have the same moments.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(y.shape[1], min(r + 8, *y.shape), generator=generator, dtype=y.dtype)
    v = start.to(y.device)
    for _ in range(rounds + 1):
        q = torch.linalg.qr(y @ v).Q
        v = torch.linalg.qr(y.T @ q).Q
    _, s, right = torch.linalg.svd(y @ v, full_matrices=False)
    return s[:r], (v @ right.mT)[:, :r]
