"""Known sets of images, read from the files that their makers publish, where the user has them.

Images are bytes (N, C, H, W), levels 0 .. 255; ``centre(x, 256)`` and ``Dequantise(256)`` scale
them to [-1, 1], and a run does it batch by batch.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..ops import as_path, check_choice
from .sets import Labelled

Split = Literal["train", "test"]
RECORD = 1 + 3 * 32 * 32
"""Bytes of an image of CIFAR-10: its label, then its planes red, green and blue, row by row."""
BATCHES = {
    "train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
    "test": ("test_batch.bin",),
}
FILES = {"train": "train", "test": "t10k"}
KINDS = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def cifar10(path: str | Path, split: Split = "train") -> Labelled:
    """CIFAR-10, "binary version": bytes x (N, 3, 32, 32), y 0 to 9 (Krizhevsky 2009).

    Args:
        path: the folder with ``data_batch_1.bin`` .. ``data_batch_5.bin`` and ``test_batch.bin``.
        split: "train" or "test".

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file that is cut short or of something
            else; any other split.

    >>> x, y = sg.data.cifar10("cifar-10-batches-bin", "test")  # doctest: +SKIP
    """
    check_choice(split, BATCHES, "split")
    parts = []
    for name in BATCHES[split]:
        file = as_path(path) / name
        content = _content(file)
        if not content or len(content) % RECORD:
            raise ValueError(
                f"{file} holds {len(content)} bytes, expected images of {RECORD} each"
            )
        parts.append(np.frombuffer(content, np.uint8).reshape(-1, RECORD))
    records = torch.from_numpy(np.concatenate(parts))
    y = records[:, 0].long()
    if int(y.max()) > 9:
        raise ValueError(f"{as_path(path)} is no CIFAR-10: it has the label {int(y.max())}")
    return Labelled(records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), y)


def cifar10_classes(path: str | Path) -> tuple[str, ...] | None:
    """The names of the classes, of ``batches.meta.txt`` in that folder, if it is there.

    >>> names = sg.data.cifar10_classes("cifar-10-batches-bin")  # doctest: +SKIP
    """
    file = as_path(path) / "batches.meta.txt"
    names = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return tuple(names) if len(names) == 10 else None


def idx_images(path: str | Path, split: Split = "train") -> Labelled:
    """MNIST, Fashion-MNIST and whatever has their files: bytes x (N, 1, H, W), and y.

    Args:
        path: the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and those
            of ``t10k``, each with ``.gz`` or without.
        split: "train" or "test".

    Raises:
        FileNotFoundError: a file is missing. ValueError: one is damaged, or images and labels do
            not fit; any other split.

    >>> x, y = sg.data.idx_images("MNIST/raw", "test")  # doctest: +SKIP
    """
    check_choice(split, FILES, "split")
    folder = as_path(path)
    images, labels = (
        _either(folder / f"{FILES[split]}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
    )
    x, y = load_idx(images), load_idx(labels)
    if x.ndim != 3 or x.dtype != torch.uint8:
        raise ValueError(f"{images} holds {x.dtype} {tuple(x.shape)}, expected bytes (N, H, W)")
    if y.shape != x.shape[:1] or y.dtype != torch.uint8:
        raise ValueError(f"{labels} holds {tuple(y.shape)} labels for {len(x)} images")
    return Labelled(x[:, None], y.long())


def load_idx(path: str | Path) -> Tensor:
    """The array of an IDX file, which may be compressed (``.gz``), in its own kind of numbers.

    Two bytes 0, the kind of numbers, the number of axes, their lengths in four bytes each, most
    significant first, and the numbers.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no IDX file, or damaged.

    >>> from pathlib import Path
    >>> n = Path("x").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
    >>> sg.data.load_idx("x")
    tensor([5, 7], dtype=torch.uint8)
    """
    file = as_path(path)
    content = _content(file)
    kind = KINDS.get(content[2]) if content[:2] == bytes(2) and len(content) >= 4 else None
    if kind is None:
        raise ValueError(f"{file} is no IDX file: it begins with {content[:4].hex(' ')}")
    head = 4 + 4 * content[3]
    if len(content) < head:
        raise ValueError(f"{file} holds {len(content)} bytes, and says that its head has {head}")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", content[3], 4))
    if len(content) - head != math.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError(f"{file} holds {len(content) - head} bytes for {shape} of {kind}")
    array = np.frombuffer(content, kind, offset=head).reshape(shape)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def is_cifar10(folder: Path) -> bool:
    """Whether a folder holds the files of CIFAR-10.

    >>> from pathlib import Path
    >>> sg.data.is_cifar10(Path("."))
    False
    """
    return (folder / BATCHES["train"][0]).is_file()


def is_idx(folder: Path) -> bool:
    """Whether a folder holds the files of MNIST, or of a set that is laid out as it is.

    >>> from pathlib import Path
    >>> sg.data.is_idx(Path("."))
    False
    """
    return any((folder / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz"))


def _either(file: Path) -> Path:
    packed = file.with_name(file.name + ".gz")
    return packed if packed.is_file() and not file.is_file() else file


def _content(file: Path) -> bytes:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        return gzip.decompress(raw) if (raw := file.read_bytes())[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
