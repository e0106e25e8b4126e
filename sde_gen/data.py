"""Data: handwritten digits, toys in the plane, folders of images, arrays on disk.

Everything comes as float32 in [-1, 1]. Quantised data of L levels sit at the centres of L equal
cells of [-1, 1]: level k is x = 2 (k + 1/2) / L - 1. A density over such points is unbounded;
*dequantisation* spreads each over its cell, x = 2 (k + u) / L - 1 with u uniform on [0, 1)
(Theis et al. 2016), and ``quantise`` takes both back to k. Hand ``Dequantise(L)`` to the training
loop, and every batch draws its own u:

>>> x, y = digits("train")
>>> dequantise = Dequantise(17)
>>> batch = dequantise(x[:64], torch.Generator().manual_seed(0))
>>> bool((quantise(batch, 17) == quantise(x[:64], 17)).all())
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Labelled(NamedTuple):
    """Samples x (N, *D) float32 and their labels y (N,) int64."""

    x: Tensor
    y: Tensor


def digits(split: Literal["train", "test"] = "train") -> Labelled:
    """scikit-learn's handwritten digits: x (N, 1, 8, 8) in [-1, 1] with 17 grey levels, y 0 to 9.

    A fixed split, stratified by class, keeps 400 of the 1797 images for "test".

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: any other split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'sde-gen[data]'"
        ) from error
    images, y = load_digits(return_X_y=True)
    pair = train_test_split(np.arange(len(y)), test_size=400, stratify=y, random_state=0)
    index = np.sort(pair[0] if split == "train" else pair[1])
    levels = torch.from_numpy(images[index]).long().reshape(-1, 1, 8, 8)
    return Labelled(centre(levels, 17), torch.from_numpy(y[index]).long())


def centre(levels: Tensor, n_levels: int) -> Tensor:
    """Scale integer levels k in 0 .. L - 1 to float32 in [-1, 1]: x = 2 (k + 1/2) / L - 1.

    Raises:
        TypeError: levels are not integers.
        ValueError: a level out of range, or fewer than two levels.
    """
    _check_levels(levels, n_levels)
    return _place(levels, torch.full_like(levels, 0.5, dtype=torch.float32), n_levels)


def dequantise(levels: Tensor, n_levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Spread integer levels k over their cells: x = 2 (k + u) / L - 1, u ~ U[0, 1), float32.

    u keeps 2^-16 away from the ends, so that rounding to float32 cannot change a level (L <= 256).

    Args:
        levels: integers in 0 .. L - 1, any shape.
        n_levels: L.
        generator: on the device of ``levels``; None starts one from seed 0.

    Raises:
        TypeError, ValueError: as ``centre``.
    """
    _check_levels(levels, n_levels)
    return _place(levels, _inside_cell(levels, generator), n_levels)


def quantise(x: Tensor, n_levels: int) -> Tensor:
    """The level of the cell that holds x, int64: k = floor(L (x + 1) / 2), clamped to 0 .. L - 1.

    Raises:
        TypeError: x is not floating.
        ValueError: x has NaN.
    """
    if not x.is_floating_point():
        raise TypeError(f"quantise takes floats in [-1, 1], got {x.dtype}: are these levels?")
    if bool(x.isnan().any()):
        raise ValueError("quantise: x has NaN")
    return _cell(x, n_levels).long()


@dataclass(frozen=True)
class Dequantise:
    """Redraw where in its cell of [-1, 1] each value lies: (x, generator) -> x, float32.

    The result has the law of ``dequantise(levels, n_levels)`` whether x holds the centres of the
    cells or an earlier dequantisation.
    """

    n_levels: int

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _place(_cell(x, self.n_levels), _inside_cell(x, generator), self.n_levels)


def eight_gaussians(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Eight equally likely Gaussians of std 0.1 on the unit circle: (n, 2)."""
    generator = _generator(generator)
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centres = torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres + 0.1 * torch.randn(n, 2, generator=generator)


def grid_25(n: int, generator: torch.Generator | None = None) -> Tensor:
    """25 equally likely Gaussians of std 0.03, means on the 5 x 5 grid over [-1, 1]^2: (n, 2)."""
    generator = _generator(generator)
    centres = torch.randint(5, (n, 2), generator=generator) / 2 - 1
    return centres + 0.03 * torch.randn(n, 2, generator=generator)


def two_moons(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Two interleaved half circles, centred on the origin, with noise of std 0.05: (n, 2).

    The upper is (cos a - 1/2, sin a - 1/4), a ~ U[0, pi); the lower is the upper's mirror image
    through the origin.
    """
    generator = _generator(generator)
    angle = math.pi * torch.rand(n, generator=generator)
    sign = 2 * torch.randint(2, (n, 1), generator=generator) - 1
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    return sign * upper + 0.05 * torch.randn(n, 2, generator=generator)


def swiss_roll(n: int, generator: torch.Generator | None = None) -> Tensor:
    """The spiral a (cos a, sin a) / 4.5 pi, a ~ U[1.5 pi, 4.5 pi), noise of std 0.02: (n, 2)."""
    generator = _generator(generator)
    turns = 1.5 + 3 * torch.rand(n, generator=generator)
    angle = math.pi * turns
    spiral = torch.stack([angle.cos(), angle.sin()], dim=1) * (turns / 4.5)[:, None]
    return spiral + 0.02 * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform on the squares (i, j) of a 4 x 4 board on [-1, 1]^2 with even i + j: (n, 2)."""
    generator = _generator(generator)
    i = torch.randint(4, (n,), generator=generator)
    j = 2 * torch.randint(2, (n,), generator=generator) + i % 2
    return (torch.stack([i, j], dim=1) + torch.rand(n, 2, generator=generator)) / 2 - 1


TOYS: dict[str, Callable[[int, torch.Generator | None], Tensor]] = {
    "eight_gaussians": eight_gaussians,
    "grid_25": grid_25,
    "two_moons": two_moons,
    "swiss_roll": swiss_roll,
    "checkerboard": checkerboard,
}


def toy(name: str, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw n points (n, 2) of one of ``TOYS``; None starts the generator from seed 0.

    Raises:
        ValueError: unknown name, or n below 1.
    """
    if name not in TOYS:
        raise ValueError(f"toy must be one of {sorted(TOYS)}, got {name!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return TOYS[name](n, generator)


def image_folder(path: str | Path, channels: Literal[1, 3] = 3) -> Tensor:
    """The images of a folder, in the order of their names: (N, channels, H, W) in [-1, 1].

    Eight-bit levels go to the centres of 256 cells, so ``Dequantise(256)`` applies. Colour
    becomes grey or grey colour, as ``channels`` says; transparency is dropped.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image that cannot be read, has more than eight bits, or has another size
            than the first; it is named.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
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


def class_folders(path: str | Path, channels: Literal[1, 3] = 3) -> Labelled:
    """One folder of images for each class; the label is the folder's place in the order of names.

    Raises:
        FileNotFoundError: no such folder, or no folder in it.
        ValueError: as ``image_folder``, or images of different sizes in two classes.
    """
    root = Path(path)
    folders = sorted(f for f in root.iterdir() if f.is_dir()) if root.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"no class folders at {root}: expected {root}/<class>/<image>")
    parts = [image_folder(folder, channels) for folder in folders]
    if len(sizes := {part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"{root}: the classes have images of different sizes, {sorted(sizes)}")
    counts = torch.tensor([len(part) for part in parts])
    return Labelled(torch.cat(parts), torch.arange(len(parts)).repeat_interleave(counts))


def load_array(path: str | Path, key: str | None = None, n_levels: int | None = None) -> Tensor:
    """The array (N, *D) of a ``.npy`` or ``.npz`` file, as float32. Nothing is unpickled.

    Args:
        path: the file.
        key: which array of a ``.npz``; may be left out where there is just one.
        n_levels: for an array of integers 0 .. L - 1, its number of levels L: it is scaled to
            [-1, 1] as in ``centre``. Floats are taken as they are.

    Raises:
        FileNotFoundError: no such file.
        TypeError: integers without ``n_levels``, or neither integers nor floats.
        ValueError: an unreadable file, an unknown key, an array without samples, NaN or infinity.
    """
    array = _read_array(Path(path), key)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{path} holds an array {array.shape}, expected (N, *D) with N >= 1")
    if array.dtype.kind in "iu":
        if n_levels is None:
            raise TypeError(
                f"{path} holds integers ({array.dtype}): give their number of levels,"
                " n_levels=256 for 8-bit images, to scale them to [-1, 1]"
            )
        return centre(torch.from_numpy(array.astype(np.int64)), n_levels)
    if array.dtype.kind != "f":
        raise TypeError(f"{path} holds {array.dtype}, expected floats or integers")
    x = torch.from_numpy(array.astype(np.float32))
    if not bool(x.isfinite().all()):
        first = tuple(int(i) for i in (~x.isfinite()).nonzero()[0])
        raise ValueError(f"{path} has NaN or infinity, the first at index {first}")
    return x


def _generator(
    generator: torch.Generator | None, device: torch.device | None = None
) -> torch.Generator:
    return generator or torch.Generator(device or "cpu").manual_seed(0)


def _cell(x: Tensor, n_levels: int) -> Tensor:
    return ((x + 1) * (n_levels / 2)).floor().clamp(0, n_levels - 1)


def _inside_cell(like: Tensor, generator: torch.Generator | None) -> Tensor:
    generator = _generator(generator, like.device)
    u = torch.rand(like.shape, generator=generator, device=like.device)
    return 2**-16 + (1 - 2**-15) * u


def _place(k: Tensor, u: Tensor, n_levels: int) -> Tensor:
    return (k + u) * (2 / n_levels) - 1


def _check_levels(levels: Tensor, n_levels: int) -> None:
    if levels.is_floating_point() or levels.dtype == torch.bool:
        raise TypeError(f"levels must be integers 0 .. {n_levels - 1}, got {levels.dtype}")
    if n_levels < 2:
        raise ValueError(f"n_levels must be at least 2, got {n_levels}")
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < n_levels:
        raise ValueError(
            f"levels must lie in 0 .. {n_levels - 1}, got {int(levels.min())} .."
            f" {int(levels.max())}"
        )


def _read_image(file: Path, channels: int) -> np.ndarray:
    """One image (channels, H, W), uint8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"{file} has more than 8 bits a channel (mode {image.mode}):"
                    " save it with 8 bits, or load the values with load_array"
                )
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"cannot read {file} as an image: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[2]}"


def _read_array(path: Path, key: str | None) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no array file at {path}")
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: expected a .npy or .npz file")
    from zipfile import BadZipFile

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
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"cannot read {path} as a numeric array: {error}") from error
    raise ValueError(f"{path} holds the arrays {names}: choose one with key=..., got {key!r}")
