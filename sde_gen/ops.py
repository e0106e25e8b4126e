"""Shapes, precision and quadrature: the few numerical tools that every other room stands on.

Times and coefficients are float64 tensors; the state keeps its own dtype and device. ``match`` and
``act`` are the only places where the shape of a coefficient meets the shape of a state. A
coefficient is a number, () or (B,), or a matrix, (k, k) or (B, k, k), that acts on axis 1.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

Time = float | Tensor
"""A time: a number, a tensor () for the whole batch, or a tensor (B,), one for each sample."""


def as_time(t: Time, name: str = "t") -> Tensor:
    """Return ``t`` as a float64 tensor; a number becomes a tensor on the CPU.

    Raises:
        TypeError: no real numbers.

    >>> as_time(0.5)
    tensor(0.5000, dtype=torch.float64)
    """
    if isinstance(t, Tensor):
        if t.dtype == torch.float64:
            return t
        if t.is_complex():
            raise TypeError(f"{name} must be real, got {t.dtype}")
        # MPS has no float64: there the clock runs on the host.
        return (t.cpu() if t.device.type == "mps" else t).to(torch.float64)
    return torch.tensor(t, dtype=torch.float64) if type(t) is float else as_real(t, name)


def match(c: Tensor, x: Tensor) -> Tensor:
    """Give a coefficient () or (B,) the rank, dtype and device of the state x (B, *D).

    >>> match(torch.ones(2, dtype=torch.float64), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    _check_real(x)
    if c.ndim == 0:
        return c.to(x.dtype)
    if c.shape != x.shape[:1]:
        raise ValueError(
            f"a time or coefficient must be a number or have shape {tuple(x.shape[:1])}, one for"
            f" each sample of the state {tuple(x.shape)}; got {tuple(c.shape)}"
        )
    return c.to(device=x.device, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """What shelters arithmetic on states from the caller's ``torch.autocast``.

    Only a network may run in half precision: whatever multiplies matrices with states (autocast
    changes nothing else) does it in here.

    >>> with torch.autocast("cpu", torch.bfloat16), full_precision("cpu"):
    ...     (torch.eye(2) @ torch.eye(2)).dtype
    torch.float32
    """
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def user_precision(device_type: str) -> AbstractContextManager[object]:
    """The caller's ``torch.autocast`` as it is now, for a network inside ``full_precision``:
    take it before, enter it there."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, torch.get_autocast_dtype(device_type))
    return nullcontext()


@contextmanager
def lasting() -> Iterator[None]:
    """For what is computed once and kept: neither a graph, nor tensors of inference mode, which
    autograd refuses ever after."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def act(c: Tensor, x: Tensor) -> Tensor:
    """c x for a coefficient c: a number scales the state, a matrix acts on its axis 1.

    Args:
        c: () or (B,), or a matrix (j, k) or (B, j, k).
        x: (B, *D), or (B, k, *rest) under a matrix.

    Returns:
        (B, *D), or (B, j, *rest), in the dtype and on the device of x.

    >>> act(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0, 5.0]]))
    tensor([[10.,  3.]])
    """
    if c.ndim < 2:
        return match(c, x) * x
    _check_real(x)
    if x.ndim < 2 or c.shape[-1] != x.shape[1] or c.shape[:-2] not in ((), x.shape[:1]):
        raise ValueError(
            f"a matrix must be (j, k) or ({len(x)}, j, k) for a state (B, k, *rest), here"
            f" {tuple(x.shape)}, and t () or ({len(x)},); got {tuple(c.shape)}"
        )
    c = c.to(device=x.device, dtype=x.dtype)
    with full_precision(x.device.type):
        if x.ndim == 2:
            return x @ c.mT if c.ndim == 2 else torch.linalg.vecdot(c, x.unsqueeze(1))
        return (c @ x.flatten(2)).reshape(len(x), -1, *x.shape[2:])


def as_real(value: object, name: str, device: torch.device | None = None) -> Tensor:
    """A number, or a tensor, array or list of them, as float64 (float32 on MPS).

    Raises:
        TypeError: no numbers, or complex ones, whose imaginary part torch would drop.
    """
    try:
        c = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be real numbers, got {shown(value)}") from error
    if c.is_complex():
        raise TypeError(f"{name} must be real, got {c.dtype}")
    device = c.device if device is None else device
    return c.to(torch.float32 if device.type == "mps" else torch.float64).to(device)


def _check_real(x: Tensor, name: str = "x") -> None:
    # A coefficient takes the dtype of the state: cast to an integer it would be 0.
    check_tensor(x, name)
    if not x.is_floating_point():
        cure = (
            "split it into real and imaginary parts, two channels"
            if x.is_complex()
            else "scale integer images first, for example 2 * image / 255 - 1"
        )
        raise TypeError(f"{name} must be floating point, got {x.dtype}: {cure}")


def square(c: Tensor) -> Tensor:
    """c^2 of a number, c c^T of a matrix."""
    return c**2 if c.ndim < 2 else c @ c.mT


def cholesky(covariance: Tensor) -> Tensor:
    """Lower L with L L^T = covariance (*S, k, k), which may be singular: its columns are 0 there.

    >>> cholesky(torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    tensor([[0., 0.],
            [0., 2.]])
    """
    rest, columns = covariance, []
    for j in range(covariance.shape[-1]):
        pivot = rest[..., j, j].clamp_min(0).sqrt()
        column = rest[..., j] / torch.where(pivot > 0, pivot, 1.0).unsqueeze(-1)
        column = torch.where((pivot > 0).unsqueeze(-1), column, 0.0)
        column = torch.cat([torch.zeros_like(column[..., :j]), column[..., j:]], -1)
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
        columns.append(column)
    return torch.stack(columns, -1)


def sum_rest(x: Tensor) -> Tensor:
    """Sum over everything but the batch: (B, *D) -> (B,)."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def as_integer(value: object) -> int | None:
    """The number that Python's, numpy's and PyTorch's integers stand for, None for all else."""
    if isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def shown(value: object) -> str:
    """A value as messages show it: tensors and arrays by their shape, anything long cut short.

    >>> shown(torch.zeros(3, 2)), shown("abc")
    ('a Tensor of shape (3, 2)', "'abc'")
    """
    shape: tuple[int, ...] = tuple(getattr(value, "shape", None) or ())
    if shape:
        return f"a {type(value).__name__} of shape {shape}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_count(value: object, name: str, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int; raise ``ValueError`` unless it is an integer in ``least .. most``."""
    n = as_integer(value)
    if n is None or n < least or (most is not None and n > most):
        wanted = f">= {least}" if most is None else f"in {least} .. {most}"
        raise ValueError(f"{name} must be an integer {wanted}, got {shown(value)}")
    return n


def check_number(
    value: object,
    name: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """``value`` as a float: a real number of Python, numpy, or a tensor or array () of one.

    Args:
        least, above, most, below: value >= least, > above, <= most and < below.
        infinite: whether infinity will do.

    Raises:
        TypeError: no real number. ValueError: out of the range, NaN, infinite.

    >>> check_number(np.float32(0.5), "eta", least=0)
    0.5
    """
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        x = float(value)  # type: ignore[arg-type]
    except OverflowError:  # of Python's integers
        x = math.inf
    inside = least <= x <= most and not (x <= above or x >= below)
    if (inside and math.isfinite(x)) or (infinite and x == math.inf):
        return x
    raise ValueError(f"{name} must be {_range(least, above, most, below)}, got {x:g}")


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iuf"
    return isinstance(value, Real) and not isinstance(value, bool)


class Range(TypedDict, total=False):
    """The keywords of ``check_number``."""

    least: float
    above: float
    most: float
    below: float
    infinite: bool


def set_number(frozen: object, name: str, **within: Unpack[Range]) -> None:
    """Check a field of a frozen dataclass by ``check_number``, and keep it as a float."""
    object.__setattr__(frozen, name, check_number(getattr(frozen, name), name, **within))


def _range(least: float, above: float, most: float, below: float) -> str:
    """What a number must be, in words."""
    low = f">= {least:g}" if least > -math.inf else f"> {above:g}" if above > -math.inf else ""
    high = f"<= {most:g}" if most < math.inf else f"< {below:g}" if below < math.inf else ""
    return f"a number {' and '.join(filter(None, (low, high)))}" if low or high else "finite"


def check_callable(f: object, name: str, call: str) -> None:
    """Raise ``TypeError`` unless ``f`` can be called, as ``call`` shows."""
    if not callable(f):
        raise TypeError(f"{name} must be callable as {call}, got {shown(f)}")


def check_kind(value: object, kind: type | tuple[type, ...], name: str, wanted: str) -> None:
    """Raise ``TypeError`` unless ``value`` is of a kind; ``wanted`` says of which."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")


def check_choice(value: object, choices: Collection[str], name: str) -> None:
    """Raise ``ValueError`` unless ``value`` is one of the names."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {shown(value)}")


def as_device(device: object, name: str = "device") -> torch.device:
    """The device of a name; raises ``ValueError`` for what names none."""
    try:
        return torch.device(device)  # type: ignore[call-overload]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} {shown(device)} is no device: take cpu, cuda, cuda:1 or mps"
        ) from error


def as_path(path: object, name: str = "path") -> Path:
    """A path; raises ``TypeError`` for what is none."""
    check_kind(path, (str, os.PathLike), name, "a path")
    return Path(path)  # type: ignore[arg-type]


def as_labels(y: object, name: str = "labels") -> Tensor:
    """Labels, an integer or (B,) of them, as an int64 tensor: of tensors, arrays and lists alike.

    Raises:
        TypeError: what are no integers. ValueError: more than one dimension.

    >>> as_labels([2, 0])
    tensor([2, 0])
    """
    try:
        labels = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, got {y!r}") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.ndim > 1:
        raise ValueError(f"{name} must be a number or (B,), got shape {tuple(labels.shape)}")
    return labels.to(torch.int64)


def as_numbers(x: object, name: str) -> Tensor:
    """Real numbers as a tensor: a tensor as it is, an array or a list copied.

    Raises:
        TypeError: anything else, complex numbers among it.

    >>> as_numbers([[1, 2], [3, 4]], "x").shape
    torch.Size([2, 2])
    """
    if isinstance(x, Tensor):
        if x.is_complex():
            raise TypeError(f"{name} must be real, got {x.dtype}")
        return x
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor, an array or a list: {error}") from error
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name} must be real numbers, got {type(x).__name__} of {array.dtype}")
    single = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    return torch.from_numpy(array.astype(np.float32 if single else kinds[array.dtype.kind]))


def check_tensor(x: object, name: str) -> None:
    """Raise TypeError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor (B, *D), got {type(x).__name__}:"
            " torch.as_tensor(...).float() makes one of arrays and lists"
        )


def batch_of(shape: Sequence[int], batch: str = "B") -> str:
    """``(B, 2)``: how messages write the shape of a batch of samples."""
    return f"({batch}, {', '.join(str(size) for size in shape)})"


def check_state(x: Tensor, name: str = "x") -> None:
    """Raise unless ``x`` is a floating-point batch (B, *D).

    Raises:
        TypeError: not a tensor, or an integer or complex one.
        ValueError: no batch dimension, or an empty batch.
    """
    _check_real(x, name)
    if x.ndim < 1:
        raise ValueError(f"{name} must have a batch dimension (B, *D), got a scalar")
    if x.numel() == 0:
        raise ValueError(f"{name} is an empty batch: its shape is {tuple(x.shape)}")


def check_finite(x: Tensor, name: str = "x") -> None:
    """Raise ``ValueError`` when ``x`` holds NaN or infinity, saying how many and where first."""
    if not all_finite(x):
        bad = ~torch.isfinite(x)
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} has {int(bad.sum())} NaN or infinite values of {x.numel()},"
            f" the first at index {first}"
        )


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite: in one pass, as a sum that is finite says it."""
    whole = x.is_floating_point() and math.isfinite(float(x.detach().sum()))
    return whole or bool(torch.isfinite(x).all())  # the sum may overflow


def on_host(device: torch.device) -> bool:
    """Whether a question to a tensor costs no synchronisation, and breaks no graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def check_time(t: Tensor, T: float) -> None:
    """Raise ``ValueError`` unless every time lies in [0, T]; asked ``on_host`` only."""
    if on_host(t.device) and not bool(((t >= 0) & (t <= T * (1 + 1e-12))).all()):
        raise ValueError(f"times must lie in [0, T] = [0, {T}], got {t.tolist()}")


@lru_cache
def _nodes(n: int, panels: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the composite Gauss-Legendre rule on [0, 1]."""
    u, w = np.polynomial.legendre.leggauss(n)
    u = ((u + 1) / 2 + np.arange(panels)[:, None]) / panels
    w = np.broadcast_to(w / (2 * panels), u.shape)
    with lasting():
        return torch.from_numpy(u.ravel()), torch.from_numpy(w.ravel().copy())


def integrate(
    f: Callable[[Tensor], Tensor], a: Time, b: Time, n: int = 24, panels: int = 4
) -> Tensor:
    """Integrate f from a to b by the composite Gauss-Legendre rule, in float64.

    Args:
        f: maps times (*S, n * panels) to values of the same shape.
        a, b: limits of shape S (broadcast together).
        n: nodes in a panel; exact for polynomials of degree 2 n - 1.
        panels: equal parts that the interval is cut into.

    >>> round(float(integrate(torch.cos, 0.0, 1.0)), 12)
    0.841470984808
    """
    start, end = (v.unsqueeze(-1) for v in torch.broadcast_tensors(as_time(a), as_time(b)))
    u, w = (v.to(start.device) for v in _nodes(n, panels))
    h = end - start
    return (f(start + h * u) * w * h).sum(-1)


def bisect(f: Callable[[Tensor], Tensor], y: Tensor, low: float, high: float) -> Tensor:
    """Solve f(t) = y for an increasing f on [low, high], to rounding (60 halvings)."""
    a = torch.full_like(y, low)
    b = torch.full_like(y, high)
    for _ in range(60):
        m = (a + b) / 2
        below = f(m) < y
        a, b = torch.where(below, m, a), torch.where(below, b, m)
    return (a + b) / 2
