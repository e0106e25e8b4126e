"""What a plot is given, looked at: numbers of a shape, and which of them can be drawn."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..ops import as_numbers


def array(x: object, name: str = "x") -> np.ndarray:
    """A tensor, array or list of real numbers as a float64 array."""
    return as_numbers(x, name).detach().double().cpu().numpy()


def as_times(times: object) -> np.ndarray:
    """Two or more finite times, (N,)."""
    t = array(times, "times")
    if t.ndim != 1 or len(t) < 2 or not np.isfinite(t).all():
        raise ValueError(f"times must be (N,), finite, two or more, got {t.tolist()!r:.60}")
    return t


def plane_paths(paths: object) -> tuple[np.ndarray, str]:
    """Finite paths (N, B, 2), and a note of how many others there were."""
    x = array(paths, "paths")
    if x.ndim != 3 or x.shape[2] != 2 or x.size == 0:
        raise ValueError(f"paths must be (N, B, 2), got {x.shape}")
    return finite(x, 1, "paths")


def finite(x: np.ndarray, axis: int, name: str) -> tuple[np.ndarray, str]:
    """What of x is finite, along the axis, and a note of how many others there were."""
    bad = ~np.isfinite(x).all(tuple(i for i in range(x.ndim) if i != axis))
    if bad.all():
        raise ValueError(f"{name}: all {bad.size} have NaN or infinity, none can be drawn")
    return np.compress(~bad, x, axis), left_out(bad, name)


def left_out(bad: np.ndarray, name: str) -> str:
    """The note under a title that a picture lacks some of what it was given."""
    return f"{bad.sum()} of {bad.size} {name} left out: NaN or infinity" if bad.any() else ""


def values(f: object, name: str, shape: tuple[int, ...], *arguments: Tensor) -> np.ndarray:
    """f(*arguments), of the shape that is wanted."""
    if not callable(f):
        raise TypeError(f"{name} must be callable, got {f!r}")
    with torch.no_grad():
        found = array(f(*arguments), f"the result of {name}")
    if found.shape != shape:
        raise ValueError(f"{name} must return {shape}, got {found.shape}")
    return found


def density(logs: np.ndarray) -> np.ndarray:
    """exp(logs), NaN where that is not finite: a blank in the picture."""
    with np.errstate(over="ignore"):
        p = np.exp(logs)
    if not np.isfinite(p).any():
        raise ValueError("log_density has NaN or infinity everywhere: nothing can be drawn")
    return np.where(np.isfinite(p), p, np.nan)


def heading(title: object, note: str = "") -> str:
    """What stands above a picture: its title, and under it what must be said."""
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, got {title!r}")
    return "\n".join(filter(None, (title, note)))


def listed(given: object, name: str) -> list[str]:
    """Words, however many."""
    if not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a sequence, got {given!r}")
    return [str(word) for word in given]


def words(given: object, name: str, n: int, what: str) -> list[str]:
    """One word for each of n things."""
    found = listed(given, name)
    if len(found) != n:
        raise ValueError(f"{name} must be one for each of {n} {what}, got {len(found)}")
    return found


def limits(extent: object, form: str) -> tuple[float, ...]:
    """Pairs of finite rising limits; ``form`` names them."""
    found = array(extent, "extent")
    if found.shape != (form.count(",") + 1,) or not np.isfinite(found).all():
        raise ValueError(f"extent must be {form}, finite, got {extent!r}")
    if not (found[::2] < found[1::2]).all():
        raise ValueError(f"extent must be {form}, rising, got {extent!r}")
    return tuple(found.tolist())
