"""What every observation operator is, and how two of them become one.

A maps a batch (B, *D) to a batch (B, *M), each row by itself. What an algorithm needs of it is its
linearization at a point: the value, u -> J u and v -> J^T v. For a linear A that is A and its
adjoint, <A u, v> = <u, A^T v>; for any other map automatic differentiation supplies it. Inner
products are sums over all entries: a factor that an adjoint leaves out is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import batch_of, check_state, check_tensor

Map = Callable[[Tensor], Tensor]


class Linearization(NamedTuple):
    """A at x: y = A(x) (B, *M), jvp: u -> J u, (B, *D) -> (B, *M), and vjp: v -> J^T v, back.

    >>> from sde_gen import inverse
    >>> a = inverse.Matrix(torch.ones(1, 2))
    >>> a.linearize(torch.ones(8, 2)).y.shape
    torch.Size([8, 1])
    """

    y: Tensor
    jvp: Map
    vjp: Map


class Operator:
    """A map A from x (B, *D) to what is measured of it (B, *M).

    The result has the dtype and lives on the device of what is given. A new kind defines
    ``_forward`` and ``_adjoint``; ``Callables`` makes one of two functions without a class.

    Args:
        shape: *D, of x.
        measured: *M, of y.

    Raises:
        TypeError, ValueError: when called, for a batch that is not floating point or has another
            shape than (B, *D) or (B, *M).

    >>> from sde_gen import inverse
    >>> a = inverse.Matrix(torch.ones(1, 2))
    >>> a(torch.ones(8, 2)).shape, a.adjoint(torch.ones(8, 1)).shape
    (torch.Size([8, 1]), torch.Size([8, 2]))
    """

    linear = True
    dtype: torch.dtype | None = None
    """In which A computes; None: that of what it is given."""
    device = torch.device("cpu")

    def __init__(self, shape: Sequence[int], measured: Sequence[int]) -> None:
        self.shape, self.measured = sizes(shape, "shape"), sizes(measured, "measured")
        self._casts: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape} -> {self.measured})"

    def forward(self, x: Tensor) -> Tensor:
        """A(x): (B, *D) -> (B, *M)."""
        self._check(x, self.shape, "x")
        return self._forward(x)

    __call__ = forward

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: (B, *M) -> (B, *D). ``TypeError`` for a nonlinear A, which has none."""
        if not self.linear:
            raise TypeError(f"{self} is not linear and has no adjoint: linearize(x).vjp has J^T y")
        self._check(y, self.measured, "y")
        return self._adjoint(y)

    def linearize(self, x: Tensor) -> Linearization:
        """A(x) with the products by its Jacobian at x and by the transpose of that."""
        return Linearization(self.forward(x), self.forward, self.adjoint)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _forward(x)")

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _adjoint(y)")

    def __matmul__(self, other: Operator) -> Operator:
        """(A @ B)(x) = A(B(x))."""
        return Composed(self, other) if isinstance(other, Operator) else NotImplemented

    def dense(self) -> Tensor:
        """A as a matrix (m, n), float64, m = prod(M), n = prod(D); for small sizes.

        Raises:
            TypeError: A is not linear. ValueError: more than 2^28 entries (2 GiB).
        """
        if not self.linear:
            raise TypeError(f"{self} is not linear: it has no matrix")
        m, n = math.prod(self.measured), math.prod(self.shape)
        if m * n > 1 << 28:
            raise ValueError(f"the matrix of {self} would have {m} x {n} entries: too many")
        one = torch.eye(n, dtype=torch.float64, device=self.device)
        return self.forward(one.reshape(n, *self.shape)).reshape(n, m).T

    def check_adjoint(self, tolerance: float | None = None, seed: int = 0) -> None:
        """Raise unless <J u, v> = <u, J^T v> for random u and v, and A is linear if it says so.

        Args:
            tolerance: of the difference, in units of |J u| |v|; None: 1000 roundings of the dtype.
            seed: of the random pairs.

        Raises:
            ValueError: saying which of the two fails, and by how much.
        """
        dtype = self.dtype or torch.float64
        tolerance = 1e3 * torch.finfo(dtype).eps if tolerance is None else tolerance
        g = torch.Generator().manual_seed(seed)
        x, u = (torch.randn(3, *self.shape, generator=g, dtype=dtype) for _ in range(2))
        v = torch.randn(3, *self.measured, generator=g, dtype=dtype).to(self.device)
        x, u = x.to(self.device), u.to(self.device)
        y, jvp, vjp = self.linearize(x)
        ju, jv = jvp(u), vjp(v)
        if self.linear:
            self._check_linear(self.forward(x - 2 * u), y - 2 * ju, tolerance, dtype)
        left, right = ((a * b).flatten(1).double().sum(1) for a, b in ((ju, v), (u, jv)))
        scale = torch.maximum(_norm(ju) * _norm(v), _norm(u) * _norm(jv)).clamp_min(1e-300)
        gap = float(((left - right).abs() / scale).max())
        if not gap <= tolerance:
            raise ValueError(
                f"{self}: the adjoint is not that of forward: <A u, v> = {_some(left)} but"
                f" <u, A^T v> = {_some(right)} for three random pairs, a relative difference of"
                f" {gap:.2g}{_hint(left, right, gap, dtype)}"
            )

    def _check_linear(
        self, together: Tensor, apart: Tensor, tolerance: float, dtype: torch.dtype
    ) -> None:
        size = (_norm(together) + _norm(apart)).clamp_min(1e-300)
        gap = float((_norm(together - apart) / size).max())
        if not gap <= tolerance:
            raise ValueError(
                f"{self}: forward is not linear: A(x - 2 u) and A x - 2 A u differ by {gap:.2g} of"
                f" their size{_precision_hint(gap, dtype)}; Nonlinear(forward, shape) takes maps"
                " that are not"
            )

    def _check(self, x: Tensor, shape: tuple[int, ...], name: str) -> None:
        check_tensor(x, name)
        if x.shape[1:] != shape or x.ndim == 0:
            raise ValueError(f"{self} needs {name} {batch_of(shape)}, got {tuple(x.shape)}")
        check_state(x, name)

    def _like(self, name: str, x: Tensor) -> Tensor:
        """The tensor of that name, real or complex, in the precision and on the device of x."""
        key = (name, x.dtype, x.device)
        if key not in self._casts:
            c: Tensor = getattr(self, name)
            dtype = x.dtype.to_complex() if c.is_complex() else x.dtype
            self._casts[key] = c.to(x.device, c.dtype if c.dtype == torch.int64 else dtype)
        return self._casts[key]


class Composed(Operator):
    """A(B(x)), written A @ B: first B, then A.

    >>> from sde_gen.inverse import Blur, Downsample
    >>> Downsample(2, (8, 8)) @ Blur(torch.ones(3, 3) / 9, (8, 8))
    Composed((8, 8) -> (4, 4))

    Raises:
        ValueError: A takes another shape than B gives.
    """

    def __init__(self, outer: Operator, inner: Operator) -> None:
        if outer.shape != inner.measured:
            raise ValueError(
                f"{outer} @ {inner}: the first takes {outer.shape}, the second gives"
                f" {inner.measured}"
            )
        super().__init__(inner.shape, outer.measured)
        self.outer, self.inner = outer, inner
        self.linear = outer.linear and inner.linear
        self.dtype, self.device = _coarsest([outer, inner]), inner.device

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def linearize(self, x: Tensor) -> Linearization:
        """A(B(x)) with both factors' derivatives in a chain."""
        z, inner, back = self.inner.linearize(x)
        y, outer, first = self.outer.linearize(z)
        return Linearization(y, lambda u: outer(inner(u)), lambda v: back(first(v)))


class Stack(Operator):
    """(A_1 x, ..., A_k x), each flattened, as one vector (B, m_1 + ... + m_k).

    >>> from sde_gen.inverse import Downsample, Mask
    >>> Stack([Downsample(2, (4, 4)), Mask(torch.eye(4) > 0)])
    Stack((4, 4) -> (8,))

    Raises:
        ValueError: none at all, or operators of different x.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        if len({a.shape for a in operators}) != 1:
            raise ValueError(f"a stack needs operators of one x, got {list(operators)}")
        self.operators = list(operators)
        self._parts = [math.prod(a.measured) for a in operators]
        super().__init__(operators[0].shape, (sum(self._parts),))
        self.linear = all(a.linear for a in operators)
        self.dtype, self.device = _coarsest(operators), operators[0].device

    def _forward(self, x: Tensor) -> Tensor:
        return self._join([a.forward(x) for a in self.operators])

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._pull([a.adjoint for a in self.operators], y)

    def linearize(self, x: Tensor) -> Linearization:
        """All parts at once; their derivatives side by side, or summed."""
        ys, jvps, vjps = zip(*(a.linearize(x) for a in self.operators), strict=True)
        return Linearization(
            self._join(ys),
            lambda u: self._join([jvp(u) for jvp in jvps]),
            lambda v: self._pull(vjps, v),
        )

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([y.flatten(1) for y in parts], 1)

    def _pull(self, maps: Sequence[Map], y: Tensor) -> Tensor:
        parts = zip(self.operators, maps, y.split(self._parts, 1), strict=True)
        pulled = [back(v.reshape(len(v), *a.measured)) for a, back, v in parts]
        return torch.stack(pulled).sum(0)


class Pair(torch.autograd.Function):
    """x -> f(x) for a linear f whose transpose is g: what computes them need not be torch.

    Differentiable any number of times, forward and backward, by f and g themselves; ``vmap`` joins
    the new dimension to the batch.
    """

    @staticmethod
    def forward(x: Tensor, f: Map, g: Map) -> Tensor:
        """f(x)."""
        return f(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps both maps."""
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The transpose of f, which is g."""
        f, g = ctx.maps
        return apply_pair(grad, g, f), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        """f is linear: its derivative is f."""
        return apply_pair(tangent, *ctx.maps)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], x: Tensor, f: Map, g: Map
    ) -> tuple[Tensor, int]:
        """One call for all: the axis joins the batch."""
        x = x.movedim(in_dims[0], 0)
        return apply_pair(x.flatten(0, 1), f, g).unflatten(0, x.shape[:2]), 0


def apply_pair(x: Tensor, f: Map, g: Map) -> Tensor:
    """f(x), with g for the transpose of f wherever a derivative is taken."""
    y: Tensor = Pair.apply(x, f, g)
    return y


def sizes(shape: Sequence[int], name: str) -> tuple[int, ...]:
    """A shape as a tuple of positive integers, or an error that says whose it is."""
    try:
        found = tuple(int(size) for size in shape)
    except TypeError:
        raise TypeError(
            f"{name} must be a tuple of sizes, (28, 28) or (16,), got {shape!r}"
        ) from None
    if any(size < 1 for size in found):
        raise ValueError(f"{name} must be positive sizes, got {found}")
    return found


def _coarsest(operators: Sequence[Operator]) -> torch.dtype | None:
    known = [a.dtype for a in operators if a.dtype is not None]
    return max(known, key=lambda d: torch.finfo(d).eps, default=None)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).double().norm(dim=1)


def _some(x: Tensor) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in x.tolist()) + ")"


def _hint(left: Tensor, right: Tensor, gap: float, dtype: torch.dtype) -> str:
    """What usually is behind it: a factor, or less precision than was thought."""
    ratio = right / left
    factor = float(ratio.mean())
    if bool(torch.isfinite(ratio).all()) and float((ratio / factor - 1).abs().max()) < 1e-3:
        return f"; it is {factor:.6g} times the true one: a factor is missing in one of the two"
    return _precision_hint(gap, dtype)


def _precision_hint(gap: float, dtype: torch.dtype) -> str:
    single = gap < 1e-5 and dtype == torch.float64
    return "; if they compute in single precision, say dtype=torch.float32" if single else ""
