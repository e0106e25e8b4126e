"""What a run says of itself at each look at the loss, and the file that keeps it."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .checkpoints import write

HISTORY = "history.csv"


class Look(NamedTuple):
    """What was seen at a look, after ``step`` steps.

    Attributes:
        step: steps so far.
        loss, norm: means over the steps since the look before; norm is that of the gradient
            before it is clipped.
        rate: the learning rate, in parts of its peak.
        samples: samples a second.
        validation: the loss on held-out data, where there are any and it was taken.

    >>> sg.training.Look(10, 0.5).loss
    0.5
    """

    step: int
    loss: float
    norm: float = math.nan
    rate: float = math.nan
    samples: float = math.nan
    validation: float = math.nan


def write_history(looks: Iterable[Look], folder: Path) -> None:
    """Write all looks, one a line; what is not known is left empty."""

    def fill(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8") as opened:
            lines = csv.writer(opened)
            lines.writerow(Look._fields)
            lines.writerows(_line(look) for look in looks)

    write(folder / HISTORY, fill)


class History:
    """The file while a run writes it: a line a second at most, the mean of the looks since the
    one before, so that whoever reads along sees it grow and a long run leaves a small file."""

    def __init__(self) -> None:
        self.waiting: list[Look] = []
        self.written = -math.inf
        self.failed = False

    def add(self, look: Look, folder: Path, now: float) -> None:
        """Take in a look at ``now`` seconds of the run."""
        self.waiting.append(look)
        if now - self.written >= 1:
            self.flush(folder)
            self.written = now

    def flush(self, folder: Path) -> None:
        """Write what waits; that it fails is said once, and ends no run."""
        if not self.waiting:
            return
        try:
            with (folder / HISTORY).open("a", newline="", encoding="utf-8") as opened:
                csv.writer(opened).writerow(_line(_mean(self.waiting)))
        except OSError as error:
            if not self.failed:
                warnings.warn(f"{folder / HISTORY} cannot be written: {error}", stacklevel=5)
            self.failed = True
        self.waiting = []


def read_history(folder: str | Path, steps: int | None = None) -> list[Look]:
    """The looks of a run, those of its first ``steps`` steps; none where there is no such file.

    Lines that are cut short or no numbers are left out: it is a report, and no part of the run.

    >>> sg.training.read_history(".")
    []
    """
    try:
        with (Path(folder) / HISTORY).open(newline="", encoding="utf-8") as opened:
            found = [look for line in csv.DictReader(opened) if (look := _look(line))]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    return [look for look in found if steps is None or look.step <= steps]


def _mean(looks: Sequence[Look]) -> Look:
    """One for all: means of what is known, the last step and rate."""
    columns = [[v for v in values if not math.isnan(v)] for values in zip(*looks, strict=True)]
    means = [sum(known) / len(known) if known else math.nan for known in columns]
    last = looks[-1]
    return last._replace(loss=means[1], norm=means[2], samples=means[4], validation=means[5])


def _line(look: Look) -> list[str]:
    step, *values = look
    return [str(step), *("" if math.isnan(v) else f"{v:.6g}" for v in values)]


def _look(line: dict[str, str | None]) -> Look | None:
    try:
        step = int(line["step"] or "")
        values = [float(line[name] or "nan") for name in Look._fields[1:]]
    except (KeyError, ValueError):
        return None
    return Look(step, *values)
