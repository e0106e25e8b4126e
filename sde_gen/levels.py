"""Quantised data: levels, the cells of [-1, 1] that they stand for, and points in these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .noise import Source, Streams
from .ops import as_numbers, check_count, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def centre(levels: Tensor | ArrayLike, n_levels: int) -> Tensor:
    """Scale integer levels k in 0 .. L - 1 to float32 in [-1, 1]: x = 2 (k + 1/2) / L - 1.

    Raises:
        TypeError: levels are not integers.
        ValueError: a level out of range, or fewer than two levels.

    >>> sg.data.centre([0, 1], 2)
    tensor([-0.5000,  0.5000])
    """
    k, n_levels = check_levels(levels, n_levels)
    return place(k, torch.full_like(k, 0.5, dtype=torch.float32), n_levels)


def dequantise(
    levels: Tensor | ArrayLike, n_levels: int, generator: torch.Generator | None = None
) -> Tensor:
    """Spread integer levels k over their cells: x = 2 (k + u) / L - 1, u ~ U[0, 1), float32.

    u keeps 2^-16 away from the ends, so that rounding to float32 cannot change a level (L <= 256).

    Args:
        levels: integers in 0 .. L - 1, any shape.
        n_levels: L.
        generator: on the device of ``levels``; None starts one from seed 0.

    Raises:
        TypeError, ValueError: as ``centre``.

    >>> sg.data.dequantise([0, 1], 2).abs().max() <= 1
    tensor(True)
    """
    k, n_levels = check_levels(levels, n_levels)
    return place(k, _inside_cell(k, generator, "generator"), n_levels)


def quantise(x: Tensor | ArrayLike, n_levels: int) -> Tensor:
    """The level of the cell that holds x, int64: k = floor(L (x + 1) / 2), clamped to 0 .. L - 1.

    Raises:
        TypeError: x is not floating.
        ValueError: x has NaN, or fewer than two levels.

    >>> sg.data.quantise([-0.9, 0.9], 2)
    tensor([0, 1])
    """
    x, n_levels = _floats(x), check_count(n_levels, "n_levels", 2)
    if bool(x.isnan().any()):
        raise ValueError("quantise: x has NaN")
    return _cell(x, n_levels).long()


@dataclass(frozen=True)
class Dequantise:
    """Redraw where in its cell of [-1, 1] each value lies: (x, noise) -> x, float32.

    The result has the law of ``dequantise(levels, n_levels)`` whether x holds the levels
    themselves (integers), the centres of the cells or an earlier dequantisation.

    >>> sg.data.Dequantise(256)(sg.data.centre([0, 255], 256)[:, None], sg.Streams(0)).shape
    torch.Size([2, 1])
    """

    n_levels: int

    def __post_init__(self) -> None:
        check_count(self.n_levels, "n_levels", 2)

    def __call__(self, x: Tensor | ArrayLike, noise: Source = None) -> Tensor:
        """x (B, *D) with each value redrawn in its cell, or levels put into theirs, float32."""
        x = as_numbers(x, "x")
        if x.is_floating_point() or x.dtype == torch.bool:
            k = _cell(_floats(x), self.n_levels).float()
        else:  # a look at the values would wait for a device
            k = (check_levels(x, self.n_levels)[0] if x.device.type == "cpu" else x).float()
        return place(k, _inside_cell(k, noise, "noise"), self.n_levels)


def start_generator(
    generator: torch.Generator | None,
    device: torch.device | None = None,
    name: str = "generator",
) -> torch.Generator:
    """The generator itself; where it is None, one from seed 0.

    Raises:
        TypeError: anything else.
    """
    if generator is None:
        return torch.Generator(device or "cpu").manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None, got {shown(generator)}")
    return generator


def _floats(x: object) -> Tensor:
    x = as_numbers(x, "x")
    if not x.is_floating_point():
        raise TypeError(f"x must be floats in [-1, 1], got {x.dtype}: are these levels?")
    return x


def _cell(x: Tensor, n_levels: int) -> Tensor:
    return ((x + 1) * (n_levels / 2)).floor().clamp(0, n_levels - 1)


def _inside_cell(like: Tensor, source: Source, name: str) -> Tensor:
    if isinstance(source, Streams):
        u = source.uniform(like.float(), "dequantise")
    else:
        generator = start_generator(source, like.device, name)
        u = torch.rand(like.shape, generator=generator, device=like.device)
    return 2**-16 + (1 - 2**-15) * u


def place(k: Tensor, u: Tensor, n_levels: int) -> Tensor:
    """x = 2 (k + u) / L - 1: where in its cell of [-1, 1] level k lies, for u in [0, 1)."""
    return (k + u) * (2 / n_levels) - 1


def check_levels(levels: object, n_levels: int) -> tuple[Tensor, int]:
    """Levels as a tensor, and their number as an int.

    Raises:
        TypeError: levels that are no integers. ValueError: levels that are not in 0 .. L - 1.
    """
    k, n_levels = as_numbers(levels, "levels"), check_count(n_levels, "n_levels", 2)
    if k.is_floating_point() or k.dtype == torch.bool:
        raise TypeError(f"levels must be integers 0 .. {n_levels - 1}, got {k.dtype}")
    if k.numel() and not 0 <= int(k.min()) <= int(k.max()) < n_levels:
        raise ValueError(
            f"levels must lie in 0 .. {n_levels - 1}, got {int(k.min())} .. {int(k.max())}"
        )
    return k, n_levels
