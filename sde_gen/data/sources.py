"""Where a run takes its items from: memory, any ``torch.utils.data.Dataset``, a mapped array.

A *source* has a length and items by their number: ``len(source)``, ``source[i]``. An item is x, a
pair (x, y) or a dictionary with x and whatever else the network is given (y, an observation). All
that an item draws at random while it is read, from the generators of Python, numpy or PyTorch, is
seeded by (seed, number of the sample): augmentations are then the same on every worker, in every
process and after every interruption.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from ..ops import as_path, check_count, check_tensor, shown
from .order import Order

Rows = dict[str, Tensor]
"""Rows of x (B, *D) under "x", and of what else the items hold, each under its name."""


class Source(Protocol):
    """Anything with a length and items by their number."""

    def __len__(self) -> int:
        """How many items there are."""
        ...

    def __getitem__(self, i: int, /) -> Any:
        """Item i: x, (x, y) or a dictionary with x."""
        ...


class Memory:
    """Tensors in memory as a source: x (N, *D), and what else there is of each, by name.

    >>> source = Memory(torch.zeros(5, 2), torch.arange(5), {"theta": torch.ones(5, 3)})
    >>> len(source), source[3]["y"], source[3]["theta"]
    (5, tensor(3), tensor([1., 1., 1.]))
    """

    def __init__(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] | None = None
    ) -> None:
        self.x, self.context = x, {} if y is None else {"y": y}
        self.context |= context or {}

    def to(self, device: torch.device) -> Memory:
        """The same on a device."""
        return Memory(self.x.to(device), None, {k: v.to(device) for k, v in self.context.items()})

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Rows:
        return {"x": self.x[i], **{name: rows[i] for name, rows in self.context.items()}}

    def rows(self, items: Tensor | slice) -> Rows:
        """Several items at once."""
        return {"x": self.x[items], **{name: rows[items] for name, rows in self.context.items()}}


class Mapped:
    """The array (N, *D) of a ``.npy`` file, which is read where it lies, item by item.

    Args:
        path: the file. labels: (N,) integers, if there are any.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read or mapped, or holds no rows.

    >>> import numpy as np
    >>> np.save("x.npy", np.zeros((10, 2), np.float32))
    >>> len(sg.data.Mapped("x.npy"))
    10
    """

    def __init__(self, path: str | Path, labels: Tensor | None = None) -> None:
        self.path, self.labels = as_path(path), labels
        if not self.path.is_file():
            raise FileNotFoundError(f"no array file at {self.path}")
        try:
            self.array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, TypeError, SyntaxError, EOFError) as error:
            raise ValueError(f"cannot map {self.path} as an array: {error}") from error
        if not isinstance(self.array, np.ndarray) or self.array.ndim == 0 or not len(self.array):
            raise ValueError(f"{self.path}: expected one array (N, *D) with N >= 1")
        if self.array.dtype.kind not in "iuf":
            raise ValueError(f"{self.path} holds {self.array.dtype}, expected numbers")
        if labels is not None and len(labels) != len(self.array):
            raise ValueError(f"{self.path}: {len(labels)} labels for {len(self.array)} rows")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Any:
        row = self.array[i]
        # Half and double precision become single, as everywhere in this room.
        x = row.astype(np.float32) if row.dtype.kind == "f" else np.array(row)
        return x if self.labels is None else (x, self.labels[i])


def as_source(
    data: object, labels: Tensor | None = None, context: Mapping[str, Any] | None = None
) -> Source:
    """What a run can be trained on, as a source.

    Args:
        data: a tensor (N, *D), a pair (x, y) of tensors, a map-style ``Dataset`` or whatever has
            a length and items, a ``numpy.memmap``, or the path of a ``.npy`` file or of a folder
            of images.
        labels: (N,) int64, beside a tensor alone.
        context: what else is known of each, by name: tensors or arrays (N, ...) beside a tensor
            in memory; items of other sources hold it themselves, as dictionaries.

    Raises:
        TypeError: none of these; an ``IterableDataset``, which has no item i.
        ValueError: labels or context beside data that hold their own, or of another number; no
            items.

    >>> len(sg.data.as_source(torch.zeros(10, 2)))
    10
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(v, Tensor) for v in data):
        _refuse(labels, "a pair (x, y)")
        data, labels = data
    if isinstance(data, Tensor):
        if data.ndim < 1 or len(data) == 0:
            raise ValueError(f"data must be (N, *D) with N >= 1, got {tuple(data.shape)}")
        single = not isinstance(labels, (Tensor, np.ndarray, list, tuple)) or np.ndim(labels) == 0
        if labels is not None and single:
            raise TypeError(f"labels must be a torch.Tensor of int64 (N,), got {shown(labels)}")
        return Memory(data, labels, _rows_of(context, len(data)))
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"data must have items by number, got the IterableDataset {type(data).__name__}: its"
            " order is its own, so that no run could be taken up where it stopped; give a Dataset"
            " with __len__ and __getitem__"
        )
    kind = type(data).__name__
    if isinstance(data, np.memmap):
        data = Mapped(str(data.filename))
    if isinstance(data, (str, os.PathLike)):
        data = _opened(Path(data))
    items = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if not items or isinstance(data, (np.ndarray, list, tuple, Mapping)):
        check_tensor(data, "data")
    _refuse(labels, f"data, a {kind}, whose items hold them: (x, y)")
    if context:
        raise ValueError(
            f"context was given beside a {kind}, whose items hold it: dictionaries"
            " {'x': ..., 'theta': ...}"
        )
    source: Source = data  # type: ignore[assignment]
    if len(source) == 0:
        raise ValueError(f"data must hold items, got {shown(data)} of length 0")
    return source


def _refuse(labels: object, holder: str) -> None:
    if labels is not None:
        raise ValueError(f"labels were given beside {holder}: give one of them")


def _rows_of(context: Mapping[str, Any] | None, n: int) -> dict[str, Tensor]:
    """Context as tensors of n rows."""
    if not isinstance(context, (Mapping, type(None))):
        raise TypeError(f"context must be rows by name, {{'theta': theta}}, got {shown(context)}")
    rows = {}
    for name, value in (context or {}).items():
        row = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        check_tensor(row, f"context {name!r}")
        if row.ndim == 0 or len(row) != n:
            raise ValueError(
                f"context {name!r} must have a row for each of {n} samples, got {tuple(row.shape)}"
            )
        rows[str(name)] = row
    if clash := rows.keys() & {"x", "y"}:
        raise ValueError(f"context cannot be called {min(clash)!r}: labels y are labels=")
    return rows


def _opened(path: Path) -> Source:
    if path.suffix == ".npy":
        return Mapped(path)
    from .images import Images

    return Images(path)


def read(source: Source, items: Sequence[int], samples: Sequence[int], seed: int) -> Rows:
    """The rows of some items, each read for the sample of that number; the global generators are
    left as they were.

    Raises:
        ValueError: an item that cannot be read, or unlike the others; it is named.
    """
    found = []
    with _generators_kept():
        for i, m in zip(items, samples, strict=True):
            _seed_all(seed, m)
            try:
                found.append(_row(source[i]))
            except Exception as error:
                raise ValueError(f"item {i} of the data: {_told(error)}") from error
    try:
        return dict(default_collate(found))
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        kinds = {str(_kind(row)): i for i, row in zip(items, found, strict=True)}
        raise ValueError(
            "items of the data are unlike each other: "
            + ", ".join(f"item {i} is {kind}" for kind, i in list(kinds.items())[:3])
        ) from error


def glance(source: Source, n: int, seed: int = 0) -> Rows:
    """The rows of n items, or of all where they are fewer, chosen by the seed.

    >>> sg.data.glance(sg.data.Memory(torch.zeros(10, 2)), 4)["x"].shape
    torch.Size([4, 2])
    """
    n = min(check_count(n, "n"), len(source))
    items = Order(len(source), seed)(torch.arange(n)).tolist()
    if isinstance(source, Memory):
        return source.rows(torch.tensor(items))
    return read(source, items, items, seed)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, OSError | ValueError) else repr(error)


def _row(item: object) -> dict[str, Any]:
    """An item as a dictionary with x."""
    if isinstance(item, tuple | list):
        if len(item) not in (1, 2):
            raise ValueError(f"it must be x, (x, y) or a dictionary, got {len(item)} parts")
        item = dict(zip(("x", "y"), item, strict=False))
    row = dict(item) if isinstance(item, Mapping) else {"x": item}
    if "x" not in row:
        raise ValueError(f"it has no 'x', only {sorted(map(str, row))}")
    if hasattr(row["x"], "getbands"):  # an image of Pillow
        pixels = np.asarray(row["x"])
        row["x"] = np.moveaxis(pixels.reshape(*pixels.shape[:2], -1), -1, 0).copy()
    return {name: torch.as_tensor(value) for name, value in row.items()}


def _kind(row: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for name, v in row.items()
    }


def _seed_all(seed: int, m: int) -> None:
    word = int.from_bytes(blake2b(f"{seed}, {m}".encode(), digest_size=7).digest(), "little")
    torch.default_generator.manual_seed(word)
    random.seed(word)
    np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002 - what a data set may draw from


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Give Python's, numpy's and PyTorch's generators of the host back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])
