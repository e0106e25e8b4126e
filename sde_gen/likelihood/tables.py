"""Densities of the rows of a table, whose columns may be integers and categories."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from ..data.tables import CLOUD, Table
from ..noise import Streams
from ..ops import check_kind
from ..scores import Score
from .density import log_prob

MOST = 64
"""The most combinations of categories that are summed over."""


def log_prob_of_rows(
    model: Score,
    table: Table,
    x: Tensor,
    *,
    numbers: bool = False,
    seed: int = 0,
    first: int = 0,
    steps: int = 56,
) -> Tensor:
    """log P of rows x (N, D), as ``table.encode`` gives them, in nats: (N,).

    With v = spread(x) ~ q it is log p(v) - log q(v | x), whose mean is at most log P
    (``data.tables``): the density of the continuous columns in their units, and the probability
    of integers and categories. Tables of continuous columns alone have no noise and no gap.

    Args:
        model: a score of the vectors. table: how rows became vectors.
        numbers: leave out the categories: the density of the other columns alone, log of the sum
            of P over all combinations of categories.
        seed, first: of the noise, and the number of the first row.
        steps: fixed steps of ``log_prob``; the noise is the larger error.

    Raises:
        TypeError: no table. ValueError: rows of another width, too many combinations.

    >>> sg.data.write_csv("x.csv", {"height": [170.5, 181.0, 165.0]})
    >>> table, rows = sg.data.read_csv("x.csv")
    >>> law = sg.Gaussian(sg.VP(), torch.tensor([170.0]), 10.0)
    >>> sg.likelihood.log_prob_of_rows(law, table, rows).shape
    torch.Size([3])
    """
    check_kind(table, Table, "table", "a Table")
    if x.ndim != 2 or x.shape[1] != table.width:
        raise ValueError(f"x must be (N, {table.width}), got {tuple(x.shape)}")
    at = table.places("category").to(x.device)
    noise = Streams(seed, first)

    def of(rows: Tensor) -> Tensor:
        v = table.spread(rows, noise)
        z = (v[:, at] - rows[:, at]) / CLOUD
        log_q = -(0.5 * z**2 + 0.5 * math.log(2 * math.pi) + math.log(CLOUD)).sum(1)
        volume = table.log_volume(rows).to(rows)
        return log_prob(model, v, steps=steps).value - log_q - volume

    if not (numbers and len(at)):
        return of(x)
    return torch.stack([of(_with(x, at, c)) for c in _vertices(table)]).logsumexp(0)


def _vertices(table: Table) -> Tensor:
    """All combinations of categories, as the coordinates of the categories: (K, n)."""
    widths = [c.width for c in table.columns if c.kind == "category"]
    if (k := math.prod(widths)) > MOST:
        raise ValueError(f"there are {k} combinations of categories, over {MOST}")
    eyes = [torch.eye(width) for width in widths]
    return torch.stack([torch.cat(rows) for rows in product(*eyes)])


def _with(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    x = x.clone()
    x[:, at] = values.to(x)
    return x
