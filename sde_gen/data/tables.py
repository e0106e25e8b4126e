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
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..noise import Streams
from ..ops import as_path

Kind = Literal["continuous", "positive", "skewed", "integer", "category"]
Texts = Mapping[str, Any]
"""Columns by their names, each a sequence of texts or of what ``str`` turns into them."""

CLOUD = 0.2
"""Deviation of the noise around the vertex of a category."""
MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
FINITE = float(np.finfo(np.float32).max)
LARGEST = 2**20
"""The largest integers that float32 holds with three binary digits for the place in a cell."""


@dataclass(frozen=True)
class Column:
    """One column: its name and kind, the values of a category, the range of integers, a and s of a
    skewed one (a is ``low`` where s > 0, else ``high``)."""

    name: str
    kind: Kind
    values: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or not self.width:
            raise ValueError(f"column {self.name!r} has the kind {self.kind!r}, or no values")
        numbers = (self._anchor, self.scale) if self.kind == "skewed" else (self.scale,)
        if not (all(map(math.isfinite, numbers)) and self.scale):
            raise ValueError(f"column {self.name!r} is skewed, with a and s {numbers}")

    @property
    def width(self) -> int:
        """How many coordinates it has."""
        return len(self.values) if self.kind == "category" else 1

    def encode(self, texts: Sequence[Any]) -> np.ndarray:
        """Its coordinates, float64 (N, width).

        Raises:
            ValueError: a missing value, a word among numbers, infinity, a part of an integer, or a
                category that was not there; row and column are named.
        """
        if self.kind == "category":
            found = [self._check(str(v).strip(), i) for i, v in enumerate(texts)]
            place = {value: k for k, value in enumerate(self.values)}
            for i, text in enumerate(found):
                if text not in place:
                    known = ", ".join(self.values[:10]) + (", ..." if self.width > 10 else "")
                    raise _at(i, self.name, f"{text!r} is none of the categories {known}")
            return np.eye(self.width)[[place[text] for text in found]]
        numbers = np.array([self._number(str(v).strip(), i) for i, v in enumerate(texts)])
        if self.kind == "positive":
            numbers = np.log(numbers)
        if self.kind == "skewed":
            numbers = np.arcsinh((numbers - self._anchor) / self.scale)
        return numbers.reshape(-1, 1)

    @property
    def _anchor(self) -> float:
        return self.low if self.scale > 0 else self.high

    def numbers(self, x: np.ndarray) -> np.ndarray:
        """Coordinates in the units of the column, (N, width): logarithms and the like undone."""
        if self.kind == "positive":
            return np.exp(x)
        return self._anchor + self.scale * np.sinh(x) if self.kind == "skewed" else x

    def log_volume(self, x: np.ndarray) -> np.ndarray:
        """log |d numbers / d x| of coordinates (N, width), (N,)."""
        if self.kind == "positive":
            return x[:, 0]
        size = np.abs(x[:, 0])
        log_cosh = size + np.log1p(np.exp(-2 * size)) - math.log(2)
        return math.log(abs(self.scale)) + log_cosh if self.kind == "skewed" else 0 * size

    def _check(self, text: str, i: int) -> str:
        if text.lower() in MISSING:
            raise _at(i, self.name, f"the value is missing ({text!r}): fill it or drop the row")
        return text

    def _number(self, text: str, i: int) -> float:
        try:
            number = float(self._check(text, i))
        except OverflowError:
            number = math.inf
        except ValueError as error:
            if str(error).startswith("row"):
                raise
            raise _at(i, self.name, f"{text!r} is no number, as a category need not be") from None
        if not math.isfinite(number) or abs(number) > FINITE:
            raise _at(i, self.name, f"{text!r} is not finite in float32")
        if self.kind == "positive" and number <= 0:
            raise _at(i, self.name, f"{text!r} is not positive: declare the column continuous")
        if self.kind == "integer" and (number != int(number) or abs(number) > LARGEST):
            what = "is no integer" if number != int(number) else f"is beyond {LARGEST}"
            raise _at(i, self.name, f"{text!r} {what}: declare the column continuous")
        return number

    def decode(self, x: np.ndarray) -> np.ndarray:
        """Its values (N,) of coordinates (N, width): floats, int64 or texts."""
        if self.kind == "category":
            return np.array(self.values)[x.argmax(1)]
        if self.kind == "integer":
            return np.rint(x[:, 0]).clip(self.low, self.high).astype(np.int64)
        return self.numbers(x)[:, 0].clip(self.low, self.high)


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
        return cls(tuple(_column(n, list(c), kinds.get(n)) for n, c in texts.items()))

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
        return {c.name: c.decode(p.numpy()) for c, p in zip(self.columns, parts, strict=True)}

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

    def log_volume(self, x: Tensor) -> Tensor:
        """log |det d numbers / d x| at vectors x (N, D), float64 (N,): what the log density of x
        is above that of the numbers."""
        return self._each(x, lambda c, part: c.log_volume(part)[:, None]).sum(1)

    def _each(self, x: Tensor, f: Callable[[Column, np.ndarray], np.ndarray]) -> Tensor:
        parts = x.detach().cpu().double().split([column.width for column in self.columns], 1)
        found = [f(c, p.numpy()) for c, p in zip(self.columns, parts, strict=True)]
        return torch.from_numpy(np.concatenate(found, 1))

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
    """
    texts = read_columns(path, delimiter)
    table = _named(path, Table.of, texts, kinds)
    return table, _named(path, table.encode, texts)


def write_csv(path: str | Path, columns: Texts) -> None:
    """Write columns of one length, as ``Table.decode`` gives them, under their names."""
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
    if all(_is_number(name) for name in names):
        raise ValueError(f"{path} has no header: its first line must name the columns")


def _column(name: str, texts: Sequence[Any], kind: str | None) -> Column:
    """The column that these texts make, of the kind or of a guessed one."""
    found = [str(text).strip() for text in texts]
    values = sorted(
        set(found), key=lambda v: (not _is_number(v), float(v) if _is_number(v) else v)
    )
    kind = kind or _guess(values, found)
    if kind == "category":
        column = Column(name, "category", tuple(values))
    else:
        plain = "continuous" if kind == "skewed" else kind
        column = Column(name, plain)  # type: ignore[arg-type]
    x = column.encode(found)
    if (x == x[0]).all():
        raise ValueError(f"column {name!r} is {found[0]!r} in every row: leave it out")
    if kind == "integer":
        return Column(name, "integer", (), int(x.min()), int(x.max()))
    return _unskewed(name, x[:, 0]) if kind == "skewed" else column


def _unskewed(name: str, x: np.ndarray) -> Column:
    """The column of these numbers with the scale s at which asinh((x - a) / s) has no skewness."""
    left = _skew(x) < 0
    size = x.max() - x if left else x - x.min()
    # The skewness rises with s, since the map of one s is a convex function of that of a smaller.
    low, high = math.log(1e-9 * size.max()), math.log(1e3 * size.max())
    for _ in range(50):
        middle = (low + high) / 2
        above = _skew(np.arcsinh(size / math.exp(middle))) > 0
        low, high = (low, middle) if above else (middle, high)
    s = math.exp(low)
    if left:
        return Column(name, "skewed", high=float(x.max()), scale=-s)
    return Column(name, "skewed", low=float(x.min()), scale=s)


def _guess(values: Iterable[str], texts: Sequence[str]) -> Kind:
    """From the values that there are, and all of them."""
    present = [v for v in values if v.lower() not in MISSING]
    numbers = [v for v in present if _is_number(v)]
    if not numbers:
        return "category"
    # One word among many numbers is a fault of the file, and named as such.
    if len(numbers) < len(present) and len(numbers) < 10:
        return "category"
    integers = len(numbers) == len(present) and all(_is_integer(v) for v in numbers)
    if integers and len(present) == 2:
        return "category"
    if integers or len(numbers) < len(present):
        return "integer" if integers else "continuous"
    x = np.array([float(v) for v in texts if _is_number(v)])
    if not np.isfinite(x).all():
        return "continuous"
    return "skewed" if abs(_skew(x)) > max(1.0, 2 * math.sqrt(6 / len(x))) else "continuous"


def _skew(x: np.ndarray) -> float:
    """Mean cube of (x - mean) / deviation."""
    z = (x - x.mean()) / max(x.std(), 1e-300)
    return float((z**3).mean())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(text: str) -> bool:
    try:
        return abs(int(text)) <= LARGEST
    except ValueError:
        return False


def _named(path: str | Path, f: Any, *arguments: Any) -> Any:
    """f of the arguments; what it refuses is said of the file."""
    try:
        return f(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _at(i: int, name: str, text: str) -> ValueError:
    return ValueError(f"row {i + 1}, column {name!r}: {text}")


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")
