"""Observations that are functions: a pair of them, one that torch can differentiate, or an object
of another library.

Of a pair no derivative is taken through the code of ``forward``: gradients, in every direction and
of every order, are computed by the two functions themselves. So they may be numpy, C or a GPU
library, and an adjoint that is not one is found before it steers anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops import batch_of
from .base import Linearization, Map, Operator, apply_pair, sizes


class Callables(Operator):
    """A linear A given by two functions, (B, *D) -> (B, *M) and back.

    Args:
        forward, adjoint: of batches of tensors; complex measurements as real pairs.
        shape: *D.
        measured: *M; None asks ``forward`` once, with zeros.
        dtype, device: what the functions compute in and on: all they are given is converted, and
            converted back. None: what they are given.
        check: test that both are linear and fit together, on three random pairs.

    Raises:
        TypeError, ValueError: an adjoint that is not that of ``forward``, a function that is not
            linear, does not take a batch or returns another shape, naming which.

    >>> Callables(lambda x: 2 * x, lambda y: 2 * y, (3,))
    Callables((3,) -> (3,))
    """

    def __init__(
        self,
        forward: Map,
        adjoint: Map,
        shape: Sequence[int],
        measured: Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        check: bool = True,
    ) -> None:
        self.dtype, self._where = dtype, device
        self.device = torch.device("cpu" if device is None else device)
        shape = sizes(shape, "shape")
        super().__init__(shape, _measured(self, forward, shape) if measured is None else measured)
        self._functions = forward, adjoint
        if check:
            self.check_adjoint()

    def _forward(self, x: Tensor) -> Tensor:
        return apply_pair(x, self._go, self._back)

    def _adjoint(self, y: Tensor) -> Tensor:
        return apply_pair(y, self._back, self._go)

    def _go(self, x: Tensor) -> Tensor:
        return self._call("forward", self._functions[0], x, self.measured)

    def _back(self, y: Tensor) -> Tensor:
        return self._call("adjoint", self._functions[1], y, self.shape)

    def _call(self, name: str, f: Map, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        out = f(x.to(device=self._where, dtype=self.dtype))
        _check_output(out, f"{self}: {name}", (len(x), *shape))
        return out.to(x)


class Nonlinear(Operator):
    """y = f(x) for any f that torch can differentiate: (B, *D) -> (B, *M), each row by itself.

    It has no adjoint. ``linearize(x)`` gives f(x), J u and J^T v, by ``torch.func``, at the cost
    of one call; J^T v is a backward pass and J u two.

    Args:
        f: of batches of tensors.
        shape: *D.
        measured: *M; None asks ``f`` once, with zeros.
        dtype, device: what f computes in and on, as in ``Callables``.

    Raises:
        TypeError, ValueError: ``f`` does not take a batch, or returns another shape.

    >>> y, jvp, vjp = Nonlinear(torch.square, (1,)).linearize(torch.tensor([[3.0]]))
    >>> y, vjp(torch.ones(1, 1))
    (tensor([[9.]]), tensor([[6.]]))
    """

    linear = False

    def __init__(
        self,
        f: Map,
        shape: Sequence[int],
        measured: Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.dtype, self._where = dtype, device
        self.device = torch.device("cpu" if device is None else device)
        shape = sizes(shape, "shape")
        super().__init__(shape, _measured(self, f, shape) if measured is None else measured)
        self.f = f

    def _forward(self, x: Tensor) -> Tensor:
        y = self.f(x.to(device=self._where, dtype=self.dtype))
        _check_output(y, f"{self}: f", (len(x), *self.measured))
        return y.to(x)

    def linearize(self, x: Tensor) -> Linearization:
        """f(x), J u as the transpose of J^T v, and J^T v by ``torch.func.vjp``."""
        y, pull, *_ = torch.func.vjp(self.forward, x)

        def vjp(v: Tensor) -> Tensor:
            return pull(v)[0]

        def jvp(u: Tensor) -> Tensor:
            # The transpose of v -> J^T v: not every operation has a forward derivative.
            return torch.func.vjp(vjp, torch.zeros_like(y))[1](u)[0]

        return Linearization(y, jvp, vjp)


def from_deepinv(physics: Any, shape: Sequence[int]) -> Operator:
    """The operator of a deepinv ``Physics``: its ``A`` and, if it is linear, ``A_adjoint``.

    A physics without ``A_adjoint`` becomes ``Nonlinear``. It computes in the dtype and on the
    device of its buffers and parameters, where it has any. Its own noise model is not read: say
    the standard deviation of the noise to the ``Observation``.

    Args:
        physics: any object with ``A(x)``, for batches (B, *D).
        shape: *D, as a rule (C, H, W).

    Raises:
        TypeError: no ``A``, or measurements that are not one tensor.
        ValueError: ``A_adjoint`` is not the adjoint of ``A``.

    >>> from sde_gen import inverse
    >>> operator = inverse.from_deepinv(physics, (3, 64, 64))  # doctest: +SKIP
    """
    if not callable(getattr(physics, "A", None)):
        raise TypeError(f"a deepinv physics has a method A, {type(physics).__name__} has none")
    tensors = [
        value
        for kind in ("buffers", "parameters")
        for value in getattr(physics, kind, tuple)()
        if value.is_floating_point()
    ]
    dtype, device = (tensors[0].dtype, tensors[0].device) if tensors else (None, None)
    if not callable(getattr(physics, "A_adjoint", None)):
        return Nonlinear(physics.A, shape, dtype=dtype, device=device)
    return Callables(physics.A, physics.A_adjoint, shape, dtype=dtype, device=device)


def from_linear_operator(operator: Any, shape: Sequence[int] | None = None) -> Callables:
    """The operator of a scipy ``LinearOperator`` (m, n), or anything like it: (B, *D) -> (B, m).

    Computed by its ``matmat`` and ``rmatmat`` on the CPU, in its own precision. PyLops' operators
    are some; ``aslinearoperator`` makes one of a sparse matrix.

    Args:
        operator: with ``shape``, ``matmat`` and ``rmatmat``, real.
        shape: *D, n = prod(D); None for (n,).

    Raises:
        TypeError: no such methods, no adjoint, or a complex operator.
        ValueError: another number of columns, or ``rmatvec`` is not the adjoint of ``matvec``.

    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from_linear_operator(aslinearoperator(np.ones((2, 4))), (2, 2))
    Callables((2, 2) -> (2,))
    """
    missing = [name for name in ("shape", "matmat", "rmatmat") if not hasattr(operator, name)]
    if missing:
        raise TypeError(
            f"a LinearOperator has shape, matmat and rmatmat; {type(operator).__name__} lacks"
            f" {', '.join(missing)}: scipy.sparse.linalg.aslinearoperator makes one of a matrix"
        )
    kind = np.dtype(getattr(operator, "dtype", None) or np.float64)
    if kind.kind == "c":
        raise TypeError(f"the operator is {kind}: give its real and imaginary parts as rows")
    m, n = operator.shape
    shape = (n,) if shape is None else sizes(shape, "shape")
    if int(np.prod(shape)) != n:
        raise ValueError(f"the operator has {n} columns, x of shape {shape} {np.prod(shape)}")

    def columns(product: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(product(x.flatten(1).numpy().T).T))

    try:
        return Callables(
            lambda x: columns(operator.matmat, x),
            lambda y: columns(operator.rmatmat, y).reshape(-1, *shape),
            shape,
            (m,),
            dtype=torch.float32 if kind == np.float32 else torch.float64,
            device="cpu",
        )
    except NotImplementedError as error:
        raise TypeError("the LinearOperator has no adjoint: define its rmatvec") from error


def _measured(operator: Operator, f: Map, shape: tuple[int, ...]) -> tuple[int, ...]:
    """*M, read off one call; two rows, so that a function of a single x is not taken for one."""
    zeros = torch.zeros(2, *shape, dtype=operator.dtype, device=operator.device)
    with torch.no_grad():
        y = f(zeros)
    name = f"{type(operator).__name__}: forward"
    if isinstance(y, Tensor) and (y.ndim == 0 or len(y) != 2):
        raise ValueError(
            f"{name} must take a batch {batch_of(shape)} and return a row for each, for 2 rows it"
            f" returned {tuple(y.shape)}"
        )
    _check_output(y, name, None)
    return tuple(y.shape[1:])


def _check_output(y: Any, name: str, shape: tuple[int, ...] | None) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"{name} must return one real floating-point tensor, got {kind}: complex numbers as"
            " real pairs (torch.view_as_real), several tensors as several observations"
        )
    if shape is not None and y.shape != shape:
        raise ValueError(f"{name} returned shape {tuple(y.shape)}, expected {shape}")
