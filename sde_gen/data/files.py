"""Data on disk: folders of images, and arrays."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from lzma import LZMAError
from pathlib import Path
from tempfile import TemporaryFile
from tokenize import TokenError
from typing import TYPE_CHECKING, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..levels import centre
from ..ops import as_integer, as_path
from .sets import Labelled

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# What the decoders let through of a damaged file, Pillow's and numpy's: a .npy header is read by
# Python's own parser, a .npz is a zip archive of any method, or encrypted (RuntimeError).
_DAMAGE = (
    *(OSError, ValueError, TypeError, SyntaxError, LookupError, EOFError, RuntimeError),
    *(OverflowError, MemoryError, TokenError, BadZipFile, LZMAError, struct.error, zlib.error),
)


def image_folder(path: str | Path, channels: Literal[1, 3] = 3) -> Tensor:
    """The images of a folder, in the order of their names: (N, channels, H, W) in [-1, 1].

    Eight-bit levels go to the centres of 256 cells, so ``Dequantise(256)`` applies. Colour
    becomes grey or grey colour, as ``channels`` says; transparency is dropped, an image that says
    how it is to be turned (EXIF) is turned, and of an animation the first frame is taken. Names
    that start with a dot are hidden, and passed over.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: a folder in it, or an image that cannot be read, has more than eight bits, or
            has another size than the first; it is named.
    """
    if as_integer(channels) not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}")
    folder = as_path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    found = visible(folder)
    if inner := [f for f in found if f.is_dir()]:
        raise ValueError(
            f"{folder} holds the folder {inner[0].name}, whose images would be left out:"
            " move it away, or read folders as classes, class_folders(...)"
        )
    files = [f for f in found if _is_image(f)]
    if not files:
        raise FileNotFoundError(f"no image in {folder}: expected one of {sorted(SUFFIXES)}")
    images = [_read_image(files[0], channels)]
    for file in files[1:]:
        images.append(_read_image(file, channels))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file} is {_size(images[-1])} but {files[0].name} is {_size(images[0])}:"
                " all images must have one size"
            )
    return centre(torch.from_numpy(np.stack(images)), 256)


def load_image(path: str | Path, channels: Literal[1, 3] = 3) -> Tensor:
    """One image (channels, H, W) in [-1, 1], read as ``image_folder`` reads each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as an image, or has more than eight bits a channel.
    """
    if as_integer(channels) not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}")
    file = as_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no image at the path {file}")
    return centre(torch.from_numpy(_read_image(file, channels).copy()), 256)


def class_folders(path: str | Path, channels: Literal[1, 3] = 3) -> Labelled:
    """One folder of images for each class; the label is the folder's place in the order of names.

    Raises:
        FileNotFoundError: no such folder, or no folder in it.
        ValueError: as ``image_folder``, images beside the folders, or of different sizes in two
            classes.
    """
    root = as_path(path)
    found = visible(root) if root.is_dir() else []
    folders = [f for f in found if f.is_dir()]
    if not folders:
        raise FileNotFoundError(f"no class folders at {root}: expected {root}/<class>/<image>")
    if beside := [f for f in found if _is_image(f)]:
        raise ValueError(
            f"{root} holds {len(beside)} images beside its class folders, the first"
            f" {beside[0].name}: move each into the folder of its class, or away"
        )
    parts = [image_folder(folder, channels) for folder in folders]
    if len(sizes := {part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"{root}: the classes have images of different sizes, {sorted(sizes)}")
    counts = torch.tensor([len(part) for part in parts])
    return Labelled(torch.cat(parts), torch.arange(len(parts)).repeat_interleave(counts))


def visible(folder: Path) -> list[Path]:
    """What a folder holds, in the order of names, but for what is hidden by a leading dot."""
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
    """
    path = as_path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} holds no labels: they are an array of a .npz file")
    y = read_array(path, key)
    if y.dtype.kind not in "iu" or y.ndim != 1 or y.size == 0 or y.min() < 0:
        raise ValueError(f"{path}: {key} must be integers >= 0, (N,), got {y.dtype} {y.shape}")
    return torch.from_numpy(y.astype(np.int64))


def check_writable(path: Path) -> None:
    """Raise ``OSError`` unless a file can be written at ``path``: it is tried beside it, with
    folders made as need be, and nothing is left."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.is_dir()


def _read_image(file: Path, channels: int) -> np.ndarray:
    """One image (channels, H, W), uint8."""
    from PIL.Image import DecompressionBombError, open
    from PIL.ImageOps import exif_transpose

    try:
        with open(file, formats=FORMATS) as image:
            deep = _is_deep(image)
            if not deep:
                exif_transpose(image, in_place=True)
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (*_DAMAGE, DecompressionBombError) as error:
        raise ValueError(f"cannot read {file} as an image: {error}") from error
    if deep:
        raise ValueError(
            f"{file} has more than 8 bits a channel: save it with 8 bits, or load the values with"
            " load_array"
        )
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _is_deep(image: ImageFile) -> bool:
    """Whether a channel has more than eight bits, which Pillow would cut away unasked."""
    known = image.tile[0][3] if image.tile else ()
    known = known if isinstance(known, tuple) else (known,)
    return (
        image.mode.startswith(("I", "F"))
        or (image.format == "PNG" and ";16" in str(known[0]))
        or (image.format == "PPM" and isinstance(known[-1], int) and known[-1] > 255)
        or max(getattr(image, "tag_v2", {}).get(258, (8,))) > 8  # TIFF: BitsPerSample
    )


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[2]}"


def read_array(path: str | Path, key: str | None = None) -> np.ndarray:
    """The array of a ``.npy`` or ``.npz`` file as it is stored, of any kind, shape and units.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, an unknown key, or several arrays and no key.
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
    except _DAMAGE as error:
        raise ValueError(f"cannot read {path} as a numeric array: {error}") from error
    raise ValueError(f"{path} holds the arrays {names}: choose one with key=..., got {key!r}")
