"""Tables: columns of numbers, integers and categories as vectors, and back; CSV files in and out.

A *continuous* column is a coordinate as it is, of a *positive* one its logarithm is, of a *skewed*
one

    z = asinh((x - a) / s),

a its smallest value and s such that z has no skewness: a line near a and a logarithm far from it,
which tames a long tail and takes any number (with s < 0 and a the largest value, a tail to the
left). With normal z that is Johnson's (1949) unbounded law with one parameter fixed. Samples are
not let beyond a. An *integer* k is a coordinate that ``spread`` puts into the cell around it,
k + u - 1/2 with u uniform on [0, 1) (Theis et al. 2016). A *category* of K values is a coordinate
for each, 1 for the one that it is and 0 for the others, to which ``spread`` adds normal noise of
deviation 0.2: a vertex of a simplex, with a cloud around it.
The density p of such points bounds the probability P of a row, by Jensen's inequality,

    log P(row) >= E[log p(v) - log q(v | row)],    v = spread(row) ~ q,

with q = 1 for integers. ``decode`` rounds integers and takes the largest coordinate of a category:
it undoes ``spread`` exactly for integers; of a category one in 5,000 is taken for another.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..noise import Streams
from ..ops import as_path
from .columns import Column, Kind, column_of, is_number

Texts = Mapping[str, Any]
"""Columns by their names, each a sequence of texts or of what ``str`` turns into them."""

CLOUD = 0.2
"""Deviation of the noise around the vertex of a category."""


@dataclass(frozen=True)
class Table:
    """The columns of a table, and the map from its rows to vectors (N, D) and back.

    >>> rows = {"height": [1.7, 1.8, 1.6], "children": [0, 2, 1], "city": ["Rome", "Oslo", "Rome"]}
    >>> table = Table.of(rows, {"children": "integer"})
    >>> x = table.encode(rows)
    >>> x.shape, table.decode(x)["city"].tolist()
    (torch.Size([3, 4]), ['Rome', 'Oslo', 'Rome'])
    """

    columns: tuple[Column, ...]

    @classmethod
    def of(cls, texts: Texts, kinds: Mapping[str, str] | None = None) -> Table:
        """The columns that the rows have.

        Args:
            texts: the columns. kinds: of some of them; the others are guessed: words and integers
                of two values are categories, other integers integers, other numbers continuous, or
                skewed where their skewness is beyond 1 and beyond two standard errors of it,
                (6 / N)^(1/2). A number that is written with a point, 3.0, is no integer.

        Raises:
            ValueError: no rows or columns, columns of several lengths, an unknown column or kind,
                a column of one value, or what ``Column.encode`` refuses.
        """
        kinds = dict(kinds or {})
        for name, kind in kinds.items():
            if name not in texts:
                raise ValueError(f"kinds: there is no column {name!r}, only {_listed(texts)}")
            if kind not in get_args(Kind):
                raise ValueError(f"kinds: {name} must be one of {get_args(Kind)}, got {kind!r}")
        lengths = {name: len(column) for name, column in texts.items()}
        if not lengths or 0 in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(f"a table needs columns of one length, and rows; got {lengths}")
        return cls(tuple(column_of(n, list(c), kinds.get(n)) for n, c in texts.items()))

    @property
    def width(self) -> int:
        """D, how many coordinates a row has."""
        return sum(column.width for column in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)

    def places(self, *kinds: Kind) -> Tensor:
        """The coordinates (n,) of the columns of some kinds, int64."""
        each = [column.kind in kinds for column in self.columns for _ in range(column.width)]
        return torch.tensor(each).nonzero().flatten()

    def encode(self, texts: Texts) -> Tensor:
        """Rows as vectors (N, D), float32.

        Raises:
            ValueError: a column is missing or not known, and what ``Column.encode`` refuses.
        """
        if missing := [n for n in self.names if n not in texts]:
            raise ValueError(f"the column {missing[0]!r} is missing: there are {_listed(texts)}")
        if extra := [n for n in texts if n not in self.names]:
            raise ValueError(f"the column {extra[0]!r} is unknown: wanted {_listed(self.names)}")
        parts = [column.encode(texts[column.name]) for column in self.columns]
        return torch.from_numpy(np.concatenate(parts, 1)).float()

    def decode(self, x: Tensor) -> dict[str, np.ndarray]:
        """The columns of vectors (N, D), each in its own type; integers stay in the range seen.

        Raises:
            ValueError: vectors of another length.
        """
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"rows of this table are (N, {self.width}), got {tuple(x.shape)}")
        parts = x.detach().cpu().split([column.width for column in self.columns], 1)
        return {c.name: c.decode(p) for c, p in zip(self.columns, parts, strict=True)}

    def spread(self, x: Tensor, noise: Streams | None = None) -> Tensor:
        """Integers somewhere in their cells, categories somewhere in their clouds: (N, D) ->
        (N, D). A transform of the training loop: every batch draws anew."""
        noise = Streams(0) if noise is None else noise
        x = x.clone()
        for kind in ("integer", "category"):
            at = self.places(kind).to(x.device)
            if len(at):
                blank = x[:, at]
                cell = kind == "integer"
                drawn = noise.uniform(blank, kind) - 0.5 if cell else noise.normal(blank, kind)
                x[:, at] = blank + (drawn if cell else CLOUD * drawn)
        return x

    def read(self, path: str | Path, delimiter: str = ",") -> Tensor:
        """The rows (N, D) of a CSV file that has these columns, in any order.

        Raises:
            FileNotFoundError, ValueError: as ``read_csv``.
        """
        return _named(path, self.encode, read_columns(path, delimiter))

    def numbers(self, x: Tensor) -> Tensor:
        """Vectors (N, D) in the units of the columns, float64: the coordinates of categories and
        integers as they are, logarithms and the like undone."""
        return self._each(x, Column.numbers)

    def whole(self, x: Tensor) -> Tensor:
        """Vectors (N, D) in the units of the columns as ``decode`` gives them, float64: integers
        whole, numbers in the range seen, of a category 1 for the largest coordinate, 0 for others.
        The gradient passes by the rounding of integers; categories have none."""
        return self._each(x, Column.whole)

    def log_volume(self, x: Tensor) -> Tensor:
        """log |det d numbers / d x| at vectors x (N, D), float64 (N,): what the log density of x
        is above that of the numbers."""
        return self._each(x, lambda c, part: c.log_volume(part)[:, None]).sum(1)

    def _each(self, x: Tensor, f: Callable[[Column, Tensor], Tensor]) -> Tensor:
        parts = x.cpu().double().split([column.width for column in self.columns], 1)
        return torch.cat([f(c, p) for c, p in zip(self.columns, parts, strict=True)], 1)

    def save(self, path: str | Path) -> None:
        """Write the columns as JSON."""
        left_out = ((), math.inf, -math.inf)
        columns = [
            {k: v for k, v in asdict(c).items() if v not in left_out and (k, v) != ("scale", 1.0)}
            for c in self.columns
        ]
        as_path(path).write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """The columns that ``save`` wrote. ValueError: they are none; OSError: no such file."""
        text = as_path(path).read_text(encoding="utf-8")
        try:
            found = [{**c, "values": tuple(c.get("values", ()))} for c in json.loads(text)]
            table = cls(tuple(Column(**c) for c in found))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no columns of a table: {error}") from error
        return table

    def __str__(self) -> str:
        """What the columns are, in words."""
        said = []
        for kind, many in zip(
            get_args(Kind),
            ("continuous", "positive", "skewed", "integers", "categories"),
            strict=True,
        ):
            names = [
                c.name + (f" ({c.width})" if kind == "category" else "")
                for c in self.columns
                if c.kind == kind
            ]
            said += [f"{len(names)} {many}: {_listed(names)}"] if names else []
        return "; ".join(said)


def read_csv(
    path: str | Path, kinds: Mapping[str, str] | None = None, delimiter: str = ","
) -> tuple[Table, Tensor]:
    """A table and its rows (N, D), float32, from a CSV file whose first line names the columns.

    Args:
        path: the file, in UTF-8. kinds: as in ``Table.of``. delimiter: between two columns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such table (rows of another length, names twice, another delimiter),
            or what ``Table.of`` refuses; row and column are named.

    >>> sg.data.write_csv("x.csv", {"height": [170.5, 181.0], "city": ["Bern", "Oslo"]})
    >>> table, rows = sg.data.read_csv("x.csv")
    >>> tuple(rows.shape)
    (2, 3)
    """
    texts = read_columns(path, delimiter)
    table = _named(path, Table.of, texts, kinds)
    return table, _named(path, table.encode, texts)


def write_csv(path: str | Path, columns: Texts) -> None:
    """Write columns of one length, as ``Table.decode`` gives them, under their names.

    >>> sg.data.write_csv("x.csv", {"height": [170.5, 181.0], "city": ["Bern", "Oslo"]})
    """
    with as_path(path).open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(columns)
        lines.writerows(zip(*columns.values(), strict=True))


def read_columns(path: str | Path, delimiter: str = ",") -> dict[str, list[str]]:
    """The columns of a CSV file as they are written, by the names in its first line."""
    if len(delimiter) != 1:
        raise ValueError(f"delimiter must be one character, got {delimiter!r}")
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Empty lines hold no row.
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} holds {len(rows)} lines, expected names and one row or more")
    names, *rows = [[text.strip() for text in row] for row in rows]
    _check_names(path, names, delimiter)
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"{path}: row {i + 1} has {len(row)} values, expected {len(names)}, one a column"
            )
    return {
        name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def _check_names(path: Path, names: Sequence[str], delimiter: str) -> None:
    others = [d for d in ",;\t|" if d != delimiter and d in names[0]]
    if len(names) == 1 and others:
        raise ValueError(
            f"{path} has one column, {names[0]!r}, between {delimiter!r}: is the delimiter"
            f" {others[0]!r}?"
        )
    if "" in names:
        raise ValueError(f"{path}: column {names.index('') + 1} has no name")
    if twice := [n for i, n in enumerate(names) if n in names[:i]]:
        raise ValueError(f"{path}: two columns have the name {twice[0]!r}")
    if all(is_number(name) for name in names):
        raise ValueError(f"{path} has no header: its first line must name the columns")


def _named(path: str | Path, f: Any, *arguments: Any) -> Any:
    """f of the arguments; what it refuses is said of the file."""
    try:
        return f(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")
