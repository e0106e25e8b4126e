"""Arrays on disk, and what may lie in a folder."""

from __future__ import annotations

import struct
import zlib
from lzma import LZMAError
from pathlib import Path
from tempfile import TemporaryFile
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..levels import centre
from ..ops import as_path

# What the decoders let through of a damaged file, Pillow's and numpy's: a .npy header is read by
# Python's own parser, a .npz is a zip archive of any method, or encrypted (RuntimeError).
DAMAGE = (
    *(OSError, ValueError, TypeError, SyntaxError, LookupError, EOFError, RuntimeError),
    *(OverflowError, MemoryError, TokenError, BadZipFile, LZMAError, struct.error, zlib.error),
)


def visible(folder: Path) -> list[Path]:
    """What a folder holds, in the order of names, but for what is hidden by a leading dot.

    >>> from pathlib import Path
    >>> isinstance(sg.data.visible(Path(".")), list)
    True
    """
    return sorted(f for f in folder.iterdir() if not f.name.startswith("."))


def load_array(path: str | Path, key: str | None = None, n_levels: int | None = None) -> Tensor:
    """The array (N, *D) of a ``.npy`` or ``.npz`` file, as float32. Nothing is unpickled.

    Args:
        path: the file.
        key: which array of a ``.npz``; may be left out where there is just one.
        n_levels: for an array of integers 0 .. L - 1, its number of levels L: it is scaled to
            [-1, 1] as in ``centre``. Floats are taken as they are; with ``n_levels`` they must
            lie in [-1, 1] already.

    Raises:
        FileNotFoundError: no such file.
        TypeError: integers without ``n_levels``, or neither integers nor floats.
        ValueError: an unreadable file, an unknown key, an array without samples, NaN, numbers
            beyond float32, or levels out of range.

    >>> import numpy as np
    >>> np.savez("x.npz", x=np.zeros((10, 2)))
    >>> sg.data.load_array("x.npz", "x").shape
    torch.Size([10, 2])
    """
    array = read_array(path := as_path(path), key)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{path} holds an array {array.shape}, expected (N, *D) with N >= 1")
    if array.dtype.kind in "iu":
        if n_levels is None:
            raise TypeError(
                f"{path} holds integers ({array.dtype}): give their number of levels,"
                " n_levels=256 for 8-bit images, to scale them to [-1, 1]"
            )
        try:
            return centre(array, n_levels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if array.dtype.kind != "f":
        raise TypeError(f"{path} holds {array.dtype}, expected floats or integers")
    with np.errstate(over="ignore"):
        x = torch.from_numpy(array.astype(np.float32))
    if not bool(x.isfinite().all()):
        first = tuple(int(i) for i in (~x.isfinite()).nonzero()[0])
        raise ValueError(f"{path} has NaN or infinity in float32, the first at index {first}")
    if n_levels is not None and float(x.abs().max()) > 1:
        raise ValueError(f"{path} holds floats beyond [-1, 1]: n_levels is for integers")
    return x


def load_labels(path: str | Path, key: str) -> Tensor:
    """The labels (N,) int64 that a ``.npz`` file holds under ``key``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, an unknown key, or anything but integers >= 0, (N,).

    >>> import numpy as np
    >>> np.savez("x.npz", y=np.array([2, 0]))
    >>> sg.data.load_labels("x.npz", "y")
    tensor([2, 0])
    """
    path = as_path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} holds no labels: they are an array of a .npz file")
    y = read_array(path, key)
    if y.dtype.kind not in "iu" or y.ndim != 1 or y.size == 0 or y.min() < 0:
        raise ValueError(f"{path}: {key} must be integers >= 0, (N,), got {y.dtype} {y.shape}")
    return torch.from_numpy(y.astype(np.int64))


def check_writable(path: Path) -> None:
    """Raise ``OSError`` unless a file can be written at ``path``: it is tried in the nearest
    folder that is there. Nothing is made, so any number of processes may ask at once.

    >>> from pathlib import Path
    >>> sg.data.check_writable(Path("x.npz"))
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    try:
        near = next(folder for folder in path.absolute().parents if folder.exists())
        with TemporaryFile(dir=near) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_array(path: str | Path, key: str | None = None) -> np.ndarray:
    """The array of a ``.npy`` or ``.npz`` file as it is stored, of any kind, shape and units.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, an unknown key, or several arrays and no key.

    >>> import numpy as np
    >>> np.save("x.npy", np.zeros((10, 2)))
    >>> sg.data.read_array("x.npy").shape
    (10, 2)
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no array file at {path}")
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: expected a .npy or .npz file")
    if not isinstance(key, str | None):
        raise TypeError(f"key must be a str or None, got {key!r}")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            names = loaded.files
            if key is None and len(names) == 1:
                key = names[0]
            if key in names:
                return np.asarray(loaded[key])
    except DAMAGE as error:
        raise ValueError(f"cannot read {path} as a numeric array: {error}") from error
    raise ValueError(f"{path} holds the arrays {names}: choose one with key=..., got {key!r}")
