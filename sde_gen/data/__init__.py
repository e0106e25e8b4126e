"""Data: handwritten digits, toys in the plane, folders of images, arrays, tables, data sets.

Functions that load a set give float32 in [-1, 1]. Those that read the original files of a large
one, and *sources* (``Images``, ``Mapped``), which a run reads from, give what is there: bytes, of
images. Quantised data of L levels sit at the centres of L equal cells of [-1, 1]: level k is
x = 2 (k + 1/2) / L - 1. A density over such points is unbounded; *dequantisation* spreads each
over its cell, x = 2 (k + u) / L - 1 with u uniform on [0, 1) (Theis et al. 2016), and
``quantise`` takes both back to k. Hand ``Dequantise(L)`` to the training loop, and every batch
draws its own u:

>>> import torch
>>> x, y = digits("train")
>>> dequantise = Dequantise(17)
>>> batch = dequantise(x[:64], torch.Generator().manual_seed(0))
>>> bool((quantise(batch, 17) == quantise(x[:64], 17)).all())
True
"""

from __future__ import annotations

from ..levels import Dequantise, centre, dequantise, quantise
from .augment import Flip
from .columns import Column
from .files import (
    check_writable,
    load_array,
    load_labels,
    read_array,
    visible,
)
from .images import Images, class_folders, image_folder, load_image
from .order import Order
from .originals import cifar10, cifar10_classes, idx_images, is_cifar10, is_idx, load_idx
from .sets import (
    TOYS,
    Labelled,
    checkerboard,
    digits,
    eight_gaussians,
    grid_25,
    mnist,
    swiss_roll,
    toy,
    two_moons,
)
from .sources import Mapped, Memory, as_source, glance
from .tables import Table, read_csv, write_csv

__all__ = [
    "TOYS",
    "Column",
    "Dequantise",
    "Flip",
    "Images",
    "Labelled",
    "Mapped",
    "Memory",
    "Order",
    "Table",
    "as_source",
    "centre",
    "check_writable",
    "checkerboard",
    "cifar10",
    "cifar10_classes",
    "class_folders",
    "dequantise",
    "digits",
    "eight_gaussians",
    "glance",
    "grid_25",
    "idx_images",
    "image_folder",
    "is_cifar10",
    "is_idx",
    "load_array",
    "load_idx",
    "load_image",
    "load_labels",
    "mnist",
    "quantise",
    "read_array",
    "read_csv",
    "swiss_roll",
    "toy",
    "two_moons",
    "visible",
    "write_csv",
]
