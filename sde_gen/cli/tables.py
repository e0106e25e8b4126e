"""Tables on the command line: read and described, kept with the model, drawn and judged."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..data import Table
    from ..many import Work
    from ..scores import Learned, ScoreNetwork
    from ..training import Recipe

COLUMNS = "table.json"
"""The columns of a table, beside the model that was trained on it."""


def table_of(folder: str | Path) -> Table | None:
    """The table that a model was trained on; None where it was none."""
    from ..data import Table

    file = Path(folder) / COLUMNS
    return Table.load(file) if file.exists() else None


def keep_table(table: Table | None, folder: Path) -> None:
    """Write the table beside the model; where there is none, none stays there."""
    from ..many import place
    from ..training.checkpoints import write

    if place()[0] == 0 and table is None:
        (folder / COLUMNS).unlink(missing_ok=True)
    elif place()[0] == 0 and table is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / COLUMNS, table.save)


def read_table(options: argparse.Namespace) -> tuple[Table, Tensor]:
    """The table that is trained on, with its kinds; or rows of the one that a model knows."""
    from ..data import read_csv
    from .reading import say

    path = Path(options.data)
    for name in ("labels", "key", "levels"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} is of arrays: {path} is a table, whose columns are all learned"
            )
    if not hasattr(options, "model"):
        table, x = read_csv(path, kinds_of(options.kinds), options.delimiter)
        say(f"{path}: {len(x)} rows (--kinds NAME=KIND changes what a column is)\n{table}")
        return table, x
    known = table_of(options.model)
    if known is None:
        raise ValueError(f"{options.model} was not trained on a table: it cannot judge {path}")
    return known, known.read(path, options.delimiter)


def kinds_of(texts: Sequence[str]) -> dict[str, str]:
    """NAME=KIND ... as a dictionary."""
    found = {}
    for text in texts:
        name, equals, kind = text.rpartition("=")
        if not (name and equals):
            raise ValueError(f"--kinds takes NAME=KIND, such as age=integer, got {text}")
        found[name] = kind
    return found


def spread_rows(table: Table, x: Tensor, recipe: Recipe) -> Tensor:
    """The rows that are trained on, spread: what facts and principal directions are fitted to."""
    from ..noise import Streams

    return table.spread(_kept(x, recipe), Streams(recipe.seed))


def keep_matched(model: ScoreNetwork, table: Table, x: Tensor, recipe: Recipe, out: Path) -> None:
    """Save a trained model whose samples have the moments of the rows that it was trained on."""
    from ..many import place
    from ..training import match_columns, save

    if place()[0] == 0:
        save(match_columns(model, table, _kept(x, recipe), seed=recipe.seed), out)


def _kept(x: Tensor, recipe: Recipe) -> Tensor:
    from ..data import Order

    return x[Order(len(x), recipe.seed, recipe.holdout).kept]


def write_table(table: Table, x: Tensor, out: Path) -> None:
    """Samples as a CSV file, whole, or as it was."""
    from ..data import write_csv
    from ..training.checkpoints import write

    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, lambda file: write_csv(file, table.decode(x)))


def compare(table: Table, drawn: Tensor, real: Tensor) -> list[str]:
    """Lines that set the columns of samples beside those of real rows: mean and deviation, the
    difference of the means in deviations, the largest differences of all.

    >>> from ..data import Table
    >>> table = Table.of({"a": [0.0, 1.0, 2.0], "b": [1.5, 0.5, 1.0]})
    >>> x = table.encode({"a": [0.0, 1.0, 2.0], "b": [1.5, 0.5, 1.0]})
    >>> y = table.encode({"a": [0.0, 1.0, 2.0], "b": [0.5, 1.5, 1.0]})
    >>> print(compare(table, x, y)[-1])
    largest: 0.000 of a mean (a), 0.000 of a deviation (a), 1.000 of a correlation (a, b)
    """
    x, y = table.whole(drawn), table.numbers(real)
    names = [
        f"{c.name} = {v}" if c.kind == "category" else c.name
        for c in table.columns
        for v in (c.values or ("",))
    ]
    deviation = y.std(0, correction=0).clamp_min(1e-300)
    off = (x.mean(0) - y.mean(0)) / deviation
    ratio = x.std(0, correction=0) / deviation - 1
    size = max(20, *(len(name) for name in names))
    lines = [f"{'':{size}} {'mean':>11} {'real':>11} {'off':>7} {'deviation':>11} {'real':>11}"]
    for j, name in enumerate(names):
        m, d = x[:, j].mean(), x[:, j].std(correction=0)
        lines.append(
            f"{name:{size}} {m:11.5g} {y[:, j].mean():11.5g} {off[j]:7.3f} {d:11.5g}"
            f" {deviation[j]:11.5g}"
        )
    gap = (_correlation(x) - _correlation(y)).abs()
    i, j = divmod(int(gap.argmax()), len(names))
    worst = [int(v.abs().argmax()) for v in (off, ratio)]
    lines.append(
        f"largest: {off.abs().max():.3f} of a mean ({names[worst[0]]}),"
        f" {ratio.abs().max():.3f} of a deviation ({names[worst[1]]}),"
        f" {gap.max():.3f} of a correlation ({names[min(i, j)]}, {names[max(i, j)]})"
    )
    return lines


def _correlation(x: Tensor) -> Tensor:
    # A category that was never drawn has no deviation, and no correlation.
    return torch.nan_to_num(x.T.corrcoef()).reshape(x.shape[1], -1)


def evaluate_table(model: Learned, table: Table, options: argparse.Namespace) -> None:
    """Columns of samples beside those of the file, and the log density of rows held out."""
    from ..many import place, shared
    from ..training.fingerprint import run_of
    from ..training.rows import count_known
    from .reading import split_data, tell_seen
    from .samples import draws

    folder = Path(options.model)
    reference, held, said = split_data(options, run_of(folder))
    drawn = shared(draws(model, None, options), options.n, options.chunk)
    logs = shared(_densities(model, table, held.x), len(held.x), options.chunk)
    if place()[0] > 0:
        return
    real = torch.cat([reference.x, held.x])
    print(f"{len(drawn)} samples beside {len(real)} real rows; off is in deviations")
    print("\n".join(compare(table, drawn, real)))
    what = ("a row", "its numbers alone")[: logs.shape[1]]
    for name, value in zip(what, logs.T, strict=True):
        error = value.std() / len(value) ** 0.5
        print(f"log density of {name}, in nats: {value.mean():.3f} +- {error:.3f}")
    print(tell_seen(said, count_known(held.x, folder), len(held.x)))


def _densities(model: Learned, table: Table, x: Tensor) -> Work:
    """What gives the log densities of some rows: of all columns, and of the numbers where there
    are both numbers and categories in few combinations."""
    from ..likelihood.tables import MOST, log_prob_of_rows

    widths = [c.width for c in table.columns if c.kind == "category"]
    both = 0 < len(widths) < len(table.columns)
    parts = [False, True] if both and torch.tensor(widths).prod() <= MOST else [False]

    def work(first: int, count: int) -> Tensor:
        rows = x[first : first + count].to(model.device)
        found = [
            log_prob_of_rows(model, table, rows, numbers=numbers, first=first) for numbers in parts
        ]
        return torch.stack(found, 1)

    return work
