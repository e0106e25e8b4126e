"""One column of a table as coordinates, and back; and what kind a column is taken for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Kind = Literal["continuous", "positive", "skewed", "integer", "category"]

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
FINITE = float(np.finfo(np.float32).max)
LARGEST = 2**20
"""The largest integers that float32 holds with three binary digits for the place in a cell."""


@dataclass(frozen=True)
class Column:
    """One column: its name and kind, the values of a category, the range of integers, a and s of a
    skewed one (a is ``low`` where s > 0, else ``high``).

    >>> sg.data.Column("city", "category", ("Bern", "Oslo")).kind
    'category'
    """

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

    def numbers(self, x: Tensor) -> Tensor:
        """Coordinates in the units of the column, (N, width): logarithms and the like undone."""
        if self.kind == "positive":
            return x.exp()
        return self._anchor + self.scale * x.sinh() if self.kind == "skewed" else x

    def log_volume(self, x: Tensor) -> Tensor:
        """log |d numbers / d x| of coordinates (N, width), (N,)."""
        if self.kind == "positive":
            return x[:, 0]
        size = x[:, 0].abs()
        log_cosh = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
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

    def whole(self, x: Tensor) -> Tensor:
        """Numbers (N, width) as ``decode`` lets them be: integers whole, in the range seen, of a
        category 1 for the largest coordinate, 0 for others. The gradient passes by the rounding
        of integers; categories have none."""
        if self.kind == "category":
            return torch.nn.functional.one_hot(x.argmax(1), self.width).to(x)
        y = self.numbers(x)
        if self.kind == "integer":
            y = y + (y.round() - y).detach()
        return y.clamp(self.low, self.high)

    def decode(self, x: Tensor) -> np.ndarray:
        """Its values (N,) of coordinates (N, width): floats, int64 or texts."""
        y = self.whole(x)
        if self.kind == "category":
            return np.array(self.values)[y.argmax(1).numpy()]
        found = y[:, 0].numpy()
        return found.astype(np.int64) if self.kind == "integer" else found


def column_of(name: str, texts: Sequence[Any], kind: str | None) -> Column:
    """The column that these texts make, of the kind or of a guessed one (``Table.of``)."""
    found = [str(text).strip() for text in texts]
    values = sorted(set(found), key=lambda v: (not is_number(v), float(v) if is_number(v) else v))
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
    numbers = [v for v in present if is_number(v)]
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
    x = np.array([float(v) for v in texts if is_number(v)])
    if not np.isfinite(x).all():
        return "continuous"
    return "skewed" if abs(_skew(x)) > max(1.0, 2 * math.sqrt(6 / len(x))) else "continuous"


def _skew(x: np.ndarray) -> float:
    """Mean cube of (x - mean) / deviation."""
    z = (x - x.mean()) / max(x.std(), 1e-300)
    return float((z**3).mean())


def is_number(text: str) -> bool:
    """Whether a text is read as a number."""
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


def _at(i: int, name: str, text: str) -> ValueError:
    return ValueError(f"row {i + 1}, column {name!r}: {text}")
