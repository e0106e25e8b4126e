"""Conditions: what a network is told beside the state, its noise level and its label.

A condition has a name and a shape, and the shape says what it is,

    (n,)          a vector: n parameters
    (C, *S)       an image of the state's own places S, with any number of channels
    (None, n)     a sequence of any length of vectors (n,): the encoding of a text

A condition that is not there is NaN, as a label that is not there is -1: each kind has a learned
'nothing' in its place, which dropout trains and classifier-free guidance asks for (Ho & Salimans
2022). A vector or image with a NaN anywhere is not there; of a sequence each vector by itself, so
that sequences of different lengths stand in one tensor, filled up with NaN.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_count, check_tensor, shown

Sizes = Mapping[str, Sequence[int | None]]
"""The shape of each condition, by its name."""
Shapes = dict[str, tuple[int | None, ...]]
TAKEN = ("x", "c", "t", "y", "whole", "weight", "nothing")
"""Names that a score or a network already has a use for."""


def shapes_of(context: Sizes | None) -> Shapes:
    """The shapes of conditions, sorted by name.

    Raises:
        TypeError: no mapping of names to sizes. ValueError: a name that cannot be that of a
            keyword argument or is taken; a size below 1, or None anywhere but first of two.
    """
    if context is None:
        return {}
    if not isinstance(context, Mapping):
        raise TypeError(f"context must be shapes by name, {{'theta': (3,)}}, got {shown(context)}")
    for name in context:
        word = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        if not word or name in TAKEN:
            raise ValueError(f"a condition cannot be called {name!r}: take another word")
    return {name: _shape(name, context[name]) for name in sorted(context)}


def listed(context: Sizes | None) -> dict[str, list[int | None]] | None:
    """The shapes as JSON holds them; None where there are none."""
    return {name: [*shape] for name, shape in shapes_of(context).items()} or None


def _shape(name: str, shape: Sequence[int | None]) -> tuple[int | None, ...]:
    wanted = "sizes: (3,), (1, 8, 8), or (None, 64) for a sequence"
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes) or not shape:
        raise TypeError(f"context {name!r} must be {wanted}; got {shown(shape)}")
    start: list[int | None] = [None] if shape[0] is None and len(shape) == 2 else []
    return (*start, *(check_count(n, f"each of context {name!r}") for n in shape[len(start) :]))


def is_sequence(shape: Sequence[int | None]) -> bool:
    """Whether this is the shape of a sequence of vectors."""
    return shape[0] is None


def is_of(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    """Whether these are the sizes of one condition, without a batch."""
    return len(sizes) == len(shape) and all(
        n in (None, m) for n, m in zip(shape, sizes, strict=True)
    )


def nothing(n: int, shape: Sequence[int | None], like: Tensor) -> Tensor:
    """The condition that is not there, for n samples."""
    return like.new_full((n, *(1 if size is None else size for size in shape)), torch.nan)


def rows_of(name: str, value: Tensor, shape: Sequence[int | None], n: int) -> Tensor:
    """A condition as one row a sample, (n, *shape): rows as they are, or one row for all; of one
    number each (n,) will do.

    Raises:
        TypeError: no floating tensor. ValueError: another shape.
    """
    check_tensor(value, f"context {name!r}")
    if not value.is_floating_point():
        raise TypeError(f"context {name!r} must be floating, got {value.dtype}: scale it first")
    if tuple(shape) == (1,) and value.shape == (n,):
        return value[:, None]
    if is_of(value.shape, shape):
        return value.expand(n, *value.shape)
    if value.ndim and len(value) == n and is_of(value.shape[1:], shape):
        return value
    sizes = ", ".join("L" if size is None else str(size) for size in (n, *shape))
    raise ValueError(f"context {name!r} must be ({sizes}), got {tuple(value.shape)}")


def present(v: Tensor) -> tuple[Tensor, Tensor]:
    """A condition (B, *shape) with zeros where it is not there, and whether it is, (B, 1, ...)."""
    there = ~v.isnan().flatten(1).any(1).reshape(-1, *(1,) * (v.ndim - 1))
    return torch.where(there, v, 0), there


class Vector(nn.Module):
    """W_2 silu(W_1 v) of a condition of n numbers, or a learned vector: (B, ...) -> (B, width)."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(n, width)
        self.linear_2 = nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.zeros(width))

    def forward(self, v: Tensor) -> Tensor:
        """(B, n) -> (B, width)."""
        v, there = present(v.flatten(1))
        return torch.where(there, self.linear_2(F.silu(self.linear_1(v))), self.nothing)


class Absence(nn.Module):
    """A learned vector where an image is not there, zeros where it is: (B, ...) -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(width))

    def forward(self, v: Tensor) -> Tensor:
        """(B, C, *S) -> (B, width)."""
        there = present(v)[1].flatten(1)
        return torch.where(there, torch.zeros_like(self.nothing), self.nothing)


class Tokens(nn.Module):
    """W v + b of each vector of a sequence, after a learned token that stands for nothing.

    (B, L, n) -> (B, 1 + L, width), and which of them are there, (B, 1 + L): the first always is,
    so that an empty sequence is one token to attend to. Attention knows no order: encodings hold
    the places of their vectors, as those of texts do.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, width)
        self.nothing = nn.Parameter(torch.zeros(width))

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, n) -> (B, 1 + L, width), (B, 1 + L)."""
        there = ~v.isnan().any(2)
        tokens = self.linear(torch.where(there[:, :, None], v, 0))
        first = self.nothing.expand(len(v), 1, -1)
        return torch.cat([first, tokens], 1), torch.cat([there.new_ones(len(v), 1), there], 1)


class Conditions(nn.Module):
    """All conditions of a network: what each adds to the embedding, images, and tokens.

    Args:
        context: the shapes; those of ``places`` sizes after the channels are images.
        width: that of the embedding, and of tokens.
        places: the spatial sizes of the state; None where images are embedded as vectors.
    """

    def __init__(self, context: Shapes, width: int, places: Sequence[int] | None = None) -> None:
        super().__init__()
        self.vectors, self.images, self.sequences = _sorted(context, places)
        # Lists: a dictionary of modules cannot hold one that is called like its own methods.
        self.embed = nn.ModuleList(
            [Vector(_product(context[name]), width) for name in self.vectors]
            + [Absence(width) for _ in self.images]
        )
        self.tokens = nn.ModuleList(
            Tokens(_product(context[n][1:]), width) for n in self.sequences
        )
        self.channels = sum(context[name][0] or 0 for name in self.images)

    def embedded(self, e: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """The embedding (1 or B, width) with what vectors, and images that are missing, add."""
        for name, module in zip((*self.vectors, *self.images), self.embed, strict=True):
            e = e + module(context[name])
        return e

    def beside(self, x: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """The state with the images as further channels."""
        images = [present(context[name])[0] for name in self.images]
        return torch.cat([x, *images], 1) if images else x

    def sequence(self, context: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """The tokens of all sequences, (B, L, width), and which are there, (B, L)."""
        parts = [m(context[n]) for n, m in zip(self.sequences, self.tokens, strict=True)]
        if not parts:
            return None
        tokens, there = zip(*parts, strict=True)
        return torch.cat(tokens, 1), torch.cat(there, 1)


def _sorted(
    context: Shapes, places: Sequence[int] | None
) -> tuple[list[str], list[str], list[str]]:
    """The names of vectors, images and sequences.

    Raises:
        ValueError: a shape that is none of those that the network takes.
    """
    vectors: list[str] = []
    images: list[str] = []
    sequences: list[str] = []
    for name, shape in context.items():
        if places is None and not is_sequence(shape):
            vectors.append(name)
        elif places is None:
            raise ValueError(f"context {name!r} is a sequence {shape}: for these take UNet or DiT")
        elif is_sequence(shape):
            sequences.append(name)
        elif len(shape) == 1:
            vectors.append(name)
        elif shape[1:] == tuple(places):
            images.append(name)
        else:
            sizes = ", ".join(map(str, ("C", *places)))
            raise ValueError(f"context {name!r} must be (n,), ({sizes}) or (None, n), got {shape}")
    return vectors, images, sequences


def _product(shape: Sequence[int | None]) -> int:
    n = 1
    for size in shape:
        n *= size or 1
    return n
