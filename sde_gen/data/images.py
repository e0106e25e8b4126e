"""Folders of images: read whole, or image by image while a run goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..levels import centre
from ..ops import as_integer, as_path, check_choice, check_count
from .files import DAMAGE, visible
from .sets import Labelled

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
Crop = Literal["centre", "random"]
NAMED = 20
"""Files of one kind of fault that are named; more are counted."""


class Images:
    """The images of a folder, or of one folder for each class, as a source: bytes (C, H, W).

    Files are in the order of their names, labels in that of the folders'. Names that start with a
    dot are hidden, and passed over. Of each file the head is read at once, its pixels when they
    are asked for. An image that says how it is to be turned (EXIF) is turned, transparency is
    dropped, and of an animation the first frame is taken.

    Args:
        path: the folder.
        size: (height, width), or a number for both, that each image is resized to so that it
            covers them, and then cropped to; None leaves images, of one size, as they are.
        crop: which part stays: the middle, or one drawn anew whenever the image is read (from
            PyTorch's own generator).
        channels: 1 (grey) or 3 (colour); None is 1 where all files are grey.

    Attributes:
        files, labels, classes: the paths; their labels (N,) and the names of these, or None.
        sizes: how many images there are of each (height, width).
        shape: (C, H, W) of every item.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: files that are no images, or have more than eight bits a channel, all of which
            are named; images of several sizes and no ``size``; images beside folders, or folders
            in a class.

    >>> from sde_gen import plots
    >>> plots.image_grid(torch.zeros(1, 1, 8, 8)).savefig("one.png")
    >>> len(sg.data.Images(".", size=64))
    1
    """

    def __init__(
        self,
        path: str | Path,
        size: int | tuple[int, int] | None = None,
        crop: Crop = "centre",
        channels: Literal[1, 3] | None = None,
    ) -> None:
        if channels is not None:
            check_channels(channels)
        check_choice(crop, ("centre", "random"), "crop")
        self.path, self.crop = as_path(path), crop
        self.labels: Tensor | None = None
        self.classes: tuple[str, ...] | None = None
        is_classes = self.path.is_dir() and any(f.is_dir() for f in visible(self.path))
        if is_classes:
            folders = class_names(self.path)
            parts = [_listed(folder) for folder in folders]
            counts = torch.tensor([len(part) for part in parts])
            self.labels = torch.arange(len(parts)).repeat_interleave(counts)
            self.classes = tuple(f.name for f in folders)
            self.files = [file for part in parts for file in part]
        else:
            self.files = _listed(self.path)
        heads = _each(_head, self.files)
        self.sizes = Counter(head.size for head in heads)
        deepest: Literal[1, 3] = 1 if all(head.grey for head in heads) else 3
        self.channels = deepest if channels is None else channels
        self.size = None if size is None else _as_size(size)
        if self.size is None and len(self.sizes) > 1:
            odd = next(i for i, head in enumerate(heads) if head.size != heads[0].size)
            raise ValueError(
                f"{self.files[odd]} is {_by(heads[odd].size)} but {self.files[0].name} is"
                f" {_by(heads[0].size)}: all images must have one size, or be given one (size=)"
            )
        self.shape = (self.channels, *(self.size or heads[0].size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor | tuple[Tensor, Tensor]:
        place = (0.5, 0.5) if self.crop == "centre" else tuple(torch.rand(2).tolist())
        x = torch.from_numpy(read_image(self.files[i], self.channels, self.size, place))
        if x.shape != self.shape:
            raise ValueError(
                f"{self.files[i]} is {_by(x.shape[1:])}, and was {_by(self.shape[1:])}"
            )
        return x if self.labels is None else (x, self.labels[i])

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels together."""
        return len(self) * int(np.prod(self.shape))

    def load(self) -> Tensor:
        """All images, bytes (N, C, H, W). ValueError: some cannot be read; they are named."""
        place = (0.5, 0.5)
        one = lambda file: read_image(file, self.channels, self.size, place)  # noqa: E731
        return torch.from_numpy(np.stack(_each(one, self.files)))


def image_folder(path: str | Path, channels: Literal[1, 3] = 3) -> Tensor:
    """The images of a folder, in the order of their names: (N, channels, H, W) in [-1, 1].

    Eight-bit levels go to the centres of 256 cells, so ``Dequantise(256)`` applies. They are read
    as ``Images`` reads them.

    Raises:
        FileNotFoundError, ValueError: as ``Images``, and where there is a folder in it.

    >>> from sde_gen import plots
    >>> plots.image_grid(torch.zeros(1, 1, 8, 8)).savefig("one.png")
    >>> sg.data.image_folder(".", channels=1).shape[:2]
    torch.Size([1, 1])
    """
    check_channels(channels)
    _listed(as_path(path))
    return centre(Images(path, channels=channels).load(), 256)


def load_image(path: str | Path, channels: Literal[1, 3] = 3) -> Tensor:
    """One image (channels, H, W) in [-1, 1], read as ``image_folder`` reads each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as an image, or has more than eight bits a channel.

    >>> from sde_gen import plots
    >>> plots.image_grid(torch.zeros(1, 1, 8, 8)).savefig("one.png")
    >>> sg.data.load_image("one.png", channels=1).shape[0]
    1
    """
    check_channels(channels)
    file = as_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no image at the path {file}")
    return centre(torch.from_numpy(read_image(file, channels)), 256)


def class_folders(path: str | Path, channels: Literal[1, 3] = 3) -> Labelled:
    """One folder of images for each class; the label is the folder's place in the order of names.

    Raises:
        FileNotFoundError: no such folder, or no folder in it.
        ValueError: as ``Images``.

    >>> x, y = sg.data.class_folders("photographs")  # doctest: +SKIP
    """
    check_channels(channels)
    class_names(as_path(path))
    images = Images(path, channels=channels)
    assert images.labels is not None
    return Labelled(centre(images.load(), 256), images.labels)


def class_names(root: Path) -> list[Path]:
    """The folders of the classes in a folder that holds nothing else."""
    found = visible(root) if root.is_dir() else []
    folders = [f for f in found if f.is_dir()]
    if not folders:
        raise FileNotFoundError(f"no class folders at {root}: expected {root}/<class>/<image>")
    if beside := [f for f in found if _is_image(f)]:
        raise ValueError(
            f"{root} holds {len(beside)} images beside its class folders, the first"
            f" {beside[0].name}: move each into the folder of its class, or away"
        )
    return folders


def check_channels(channels: object) -> None:
    """Raise ``ValueError`` unless it is 1 or 3."""
    if as_integer(channels) not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}")


def read_image(
    file: Path,
    channels: int,
    size: tuple[int, int] | None = None,
    place: Sequence[float] = (0.5, 0.5),
) -> np.ndarray:
    """One image (channels, H, W), uint8.

    Args:
        file: the path. channels: 1 or 3.
        size: (height, width) that it is resized to cover, and cropped to.
        place: which part stays: the shares of what is too much that are cut away at the left and
            at the top.

    Raises:
        ValueError: it cannot be read as an image, or has more than eight bits a channel.
    """
    from PIL.Image import DecompressionBombError, Resampling, open
    from PIL.ImageOps import exif_transpose, fit

    mode = "L" if channels == 1 else "RGB"
    try:
        with open(file, formats=FORMATS) as image:
            deep = _is_deep(image)
            if not deep:
                if size is not None:  # a JPEG is then decoded at a part of its size
                    image.draft(mode, (2 * max(size), 2 * max(size)))
                exif_transpose(image, in_place=True)
            pixels = image.convert(mode)
            if size is not None:
                pixels = fit(pixels, size[::-1], Resampling.LANCZOS, centering=tuple(place))  # type: ignore[arg-type]
            values = np.array(pixels)
    except (*DAMAGE, DecompressionBombError) as error:
        raise ValueError(f"cannot read {file} as an image: {error}") from error
    if deep:
        raise ValueError(_too_deep(file))
    return values.reshape(*values.shape[:2], channels).transpose(2, 0, 1).copy()


class _Head(NamedTuple):
    size: tuple[int, int]
    grey: bool


def _head(file: Path) -> _Head:
    """What the head of a file says: in which size it is shown, and whether it is grey."""
    from PIL.Image import DecompressionBombError, Image, open

    try:
        with open(file, formats=FORMATS) as image:
            deep = _is_deep(image)
            # That of PNG would read all pixels, to see whether something follows on them.
            turned = Image.getexif(image).get(274) in (5, 6, 7, 8)
            size = image.size if turned else image.size[::-1]
            head = _Head(size, image.mode in ("1", "L", "LA"))
    except (*DAMAGE, DecompressionBombError) as error:
        raise ValueError(f"cannot read {file} as an image: {error}") from error
    if deep:
        raise ValueError(_too_deep(file))
    return head


def _too_deep(file: Path) -> str:
    return (
        f"{file} has more than 8 bits a channel: save it with 8 bits, or load the values with"
        " load_array"
    )


def _each(read: Callable[[Path], object], files: Sequence[Path]) -> list:
    """What is read of each file; ValueError with the names of all that could not be."""

    def tried(file: Path) -> object:
        try:
            return read(file)
        except ValueError as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(tried, files))
    wrong = [str(error) for error in found if isinstance(error, ValueError)]
    if len(wrong) > 1:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ValueError(
            f"{len(wrong)} of {len(files)} files will not do: {'; '.join(wrong[:NAMED])}{more}"
        )
    if wrong:
        raise ValueError(wrong[0])
    return found


def _listed(folder: Path) -> list[Path]:
    """The images of a folder that holds no other folder."""
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
        raise FileNotFoundError(
            f"no image in the folder {folder}: expected one of {sorted(SUFFIXES)}"
        )
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.is_dir()


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


def _as_size(size: object) -> tuple[int, int]:
    both = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    height, width = (check_count(n, "size") for n in both)
    return height, width


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
