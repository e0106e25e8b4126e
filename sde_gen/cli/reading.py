"""The data that a command line names: read, described in a line, and split for an evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Images, Table
    from ..data.sources import Source

IN_MEMORY = 2 * 10**9
"""Bytes up to which an array, or the pixels of a folder, are read at once."""
KNOWN_BY = 2000
"""Items that tell the facts of data which are too many to be read at once."""
REFERENCE = 10_000
"""The most real samples that others are compared with."""


class Data(NamedTuple):
    """Samples (N, *D), floats or levels, their labels (N,), the number of grey levels of quantised
    data, the names of the classes; of data that stay on disk a few samples, and where they are;
    the columns of a table."""

    x: Tensor
    y: Tensor | None = None
    levels: int | None = None
    classes: tuple[str, ...] | None = None
    source: Source | None = None
    table: Table | None = None

    @property
    def items(self) -> Source:
        """What a run is trained on."""
        from ..data import Memory

        return Memory(self.x, self.y) if self.source is None else self.source

    def take(self, items: Tensor) -> Data:
        """Some of them, as floats in memory."""
        from ..data import Memory, centre
        from ..data.sources import read

        source = self.items
        if isinstance(source, Memory):
            rows = source.rows(items)
        else:
            rows = read(source, items.tolist(), items.tolist(), 0)
        x = rows["x"]
        if self.levels is not None and not x.is_floating_point():
            x = centre(x, self.levels)
        return Data(x, rows.get("y"), self.levels, self.classes, table=self.table)


def read_data(options: argparse.Namespace, seed: int, split: Literal["train", "test"]) -> Data:
    """The data that the command line names; the seed is that of a toy's points.

    Args:
        options: ``data``, and how to read it. seed: of a toy.
        split: which part, of data that come in two.
    """
    from .. import data

    name, path = options.data, Path(options.data)
    if name == "digits":
        return Data(*data.digits(split), 17)
    if name in data.TOYS:
        return Data(data.toy(name, 20_000, torch.Generator().manual_seed(seed)))
    if path.is_dir():
        if data.is_cifar10(path):
            return Data(*data.cifar10(path, split), 256, data.cifar10_classes(path))
        if data.is_idx(path):
            return Data(*data.idx_images(path, split), 256)
        return _read_images(options, path)
    if path.suffix == ".npy" and path.is_file() and path.stat().st_size > IN_MEMORY:
        return _map_array(options, path)
    if path.suffix == ".csv":
        from .tables import read_table

        table, x = read_table(options)
        return Data(x, table=table)
    if path.suffix in (".npy", ".npz"):
        x = data.load_array(path, options.key, options.levels)
        if x.ndim == 1:
            raise ValueError(f"{path} holds {tuple(x.shape)}: expected (N, D), as x[:, None] is")
        y = None if options.labels is None else data.load_labels(path, options.labels)
        if y is not None and len(y) != len(x):
            raise ValueError(f"{path}: {options.labels} has {len(y)} labels for {len(x)} data")
        return Data(x, y, options.levels)
    known = ", ".join(["digits", *data.TOYS])
    raise ValueError(f"{name} is no data: expected {known}, a folder, a .npy, .npz or .csv file")


def has_test_images(name: str) -> bool:
    """Whether the data come with images of their own to test on."""
    from .. import data

    path = Path(name)
    return name == "digits" or (path.is_dir() and (data.is_cifar10(path) or data.is_idx(path)))


def _read_images(options: argparse.Namespace, path: Path) -> Data:
    from .. import data

    channels: Literal[1] | None = 1 if options.grey else None
    images = data.Images(path, size_of(options.size), options.crop, channels)
    in_memory = images.nbytes <= IN_MEMORY and images.crop == "centre"
    say(_told(images, in_memory))
    if in_memory:
        return Data(images.load(), images.labels, 256, images.classes)
    x = data.glance(images, KNOWN_BY)["x"]
    return Data(x, images.labels, 256, images.classes, images)


def say(line: str) -> None:
    """Print a line, once, however many processes there are."""
    from ..many import place

    if place()[0] == 0:
        print(line, flush=True)


def size_of(text: str | None) -> tuple[int, int] | None:
    """``64`` is 64 x 64, ``48x64`` a height and a width."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise ValueError(f"--size must be N or HxW, got {text}") from None


def _map_array(options: argparse.Namespace, path: Path) -> Data:
    from .. import data

    source = data.Mapped(path)
    x, levels = data.glance(source, KNOWN_BY)["x"], options.levels
    if x.ndim == 1:
        raise ValueError(f"{path} holds {source.array.shape}: expected (N, D), as x[:, None] is")
    if not x.is_floating_point() and levels is None:
        raise TypeError(f"{path} holds integers: give their number of levels, --levels 256")
    say(f"{path}: {len(source)} rows of {tuple(x.shape[1:])}, read where they lie")
    return Data(x, None, levels, None, source)


def _told(images: Images, in_memory: bool) -> str:
    """What is there, and what was made of it."""
    sizes = sorted(images.sizes)
    by = [f"{h} x {w}" for h, w in (sizes[0], sizes[-1])]
    found = f"of {by[0]}" if len(sizes) == 1 else f"of {len(sizes)} sizes, {by[0]} to {by[1]}"
    parts = [f"{images.path}: {len(images)} images {found}"]
    if images.size is not None:
        parts.append(f"resized and cropped ({images.crop}) to {images.size[0]} x {images.size[1]}")
        small = sum(
            n for (h, w), n in images.sizes.items() if h < images.size[0] or w < images.size[1]
        )
        parts += [f"{small} of them enlarged"] if small else []
    parts.append("grey" if images.channels == 1 else "colour")
    if images.classes is not None:
        parts.append(f"{len(images.classes)} classes")
    where = "in memory" if in_memory else "read while it trains"
    return f"{', '.join(parts)}; {where} ({images.nbytes / 1e6:.0f} MB)"


def split_data(options: argparse.Namespace, run: dict | None) -> tuple[Data, Data, str]:
    """Real data to compare with, at most n others, and what these are to the run of the model.

    Test images and new points where there are such; what the run held out, where it held
    something out of these very data; else a half.

    Args:
        options: of the command. run: what the folder of the model says of its run, if it does.
    """
    from ..data import TOYS, Order
    from ..training.fingerprint import fingerprints

    # Of a toy, training with the same seed has these points; torch reads 32 bits of a seed.
    other_points = 2**31 if options.data in TOYS else 0
    data = read_data(options, options.seed + other_points, "train")
    n, generator = len(data.items), torch.Generator().manual_seed(options.seed)
    said = ""
    if has_test_images(options.data):
        reference, other = torch.arange(n), read_data(options, 0, "test")
        held = torch.arange(len(other.x))
    else:
        other = data
        reference, held = torch.randperm(n, generator=generator).tensor_split(2)
        if run is not None and run.get("data") == fingerprints(data.items)["data"]:
            order = Order(n, run["recipe.seed"], run["recipe.holdout"])
            if order.holdout:
                reference, held, said = order.kept, order.held, HELD
            else:
                said = TRAINED
    held = held[torch.randperm(len(held), generator=generator)[: options.n]]
    if len(held) < 2:
        raise ValueError("evaluate needs two samples or more (--n), and four or more data")
    if len(reference) > REFERENCE:
        reference = reference[Order(len(reference), options.seed)(torch.arange(REFERENCE))]
    return data.take(reference), other.take(held), said


HELD = "the run of this model held these {n} real ones out"
TRAINED = "these {n} real ones are training data: the run held none out (sde-gen train --holdout)"


def tell_seen(said: str, known: int | None, n: int) -> str:
    """What a reader must know of the n real data that the samples stand beside.

    Args:
        said: by ``split_data``. known: how many of them equal one that was trained on.
    """
    if said:
        copies = f"; {known} of them equal others that it was trained on" if known else ""
        return said.format(n=n) + (copies if said == HELD else "")
    if known is None:
        return f"no record tells whether the model was trained on any of these {n} real ones"
    if known == 0:
        return f"the model was trained on none of these {n} real ones"
    return f"the model was trained on {known} of these {n} real ones: they are not held out"
