"""What a run reads: samples m .. m + n - 1 of it, whoever asks, wherever the items lie.

A reader knows nothing of steps. It answers for any range of samples, and guesses that the next
one asked for follows on: workers then read ahead, and a wrong guess costs time alone.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.images import Images
from ..data.order import Order
from ..data.sources import Memory, Rows, Source, read
from ..levels import place
from ..noise import Streams
from ..noise.philox import hashed
from ..ops import check_count
from .inputs import Transform
from .losses import Context

KEPT = 2**28
"""Bytes of what is held out that are read once and kept."""
AHEAD = 4096
"""Samples whose items are worked out at once."""


class Batch(NamedTuple):
    """x (B, *D) on the device, what the items hold beside it, and the numbered noise."""

    x: Tensor
    y: Context
    noise: Streams


@dataclass(frozen=True)
class Share:
    """Which samples one process computes: the part ``rank`` of ``processes`` of every batch."""

    batch: int
    rank: int = 0
    processes: int = 1

    def after(self, part: range) -> range:
        """The range that follows on a range of samples, as long as it."""
        size = self.batch // self.processes
        step, slot = divmod(part.stop - 1, self.batch)
        is_last = slot + 1 == (self.rank + 1) * size
        first = (step + 1) * self.batch + self.rank * size if is_last else part.stop
        return range(first, first + len(part))


class Reader:
    """Reads the samples of a run.

    Args:
        source: where the items are; tensors in memory are moved to the device.
        order: which item a sample is.
        transforms: applied to x on the device in turn, each may change it in place.
        levels: of integers that no transform scales: they are put to the centres of the cells.
        device: where batches go.
        workers: processes that read ahead, of a source that is not in memory; None for
            ``default_workers``.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        transforms: Sequence[Transform] = (),
        levels: int | None = None,
        device: torch.device | str = "cpu",
        workers: int | None = 0,
    ) -> None:
        if workers is None:
            workers = default_workers(source)
        workers = check_count(workers, "workers", 0)
        self.device = torch.device(device)
        self.source, self.order = source, order
        if isinstance(source, Memory):
            self.source = source.to(self.device)
        self.transforms, self.levels, self.workers = tuple(transforms), levels, workers
        self._held = order.held
        self._other_seed = hashed(f"held out {order.seed}".encode())
        self._read: dict[tuple[int, int], Rows] = {}
        self._known = (range(0), torch.empty(0, dtype=torch.int64))
        self._stream: Iterator[tuple[range, Rows | str]] = iter(())
        self._next = range(0)

    def __call__(self, first: int, n: int, share: Share | None = None) -> Batch:
        """Samples first .. first + n - 1.

        Args:
            first, n: which.
            share: which samples this process will ask for: workers read these ahead.

        Raises:
            ValueError: an item that cannot be read, or unlike others; it is named.
        """
        part = range(first, first + n)
        if isinstance(self.source, Memory):
            rows = self.source.rows(self._items(part).to(self.device, non_blocking=True))
        elif self.workers == 0 or share is None:
            rows = _read(self.source, self.order, part)
        else:
            rows = self._read_ahead(part, share)
        return self._ready(rows, Streams(self.order.seed, first))

    def held(self, first: int, n: int, device: torch.device | None = None) -> Batch:
        """Samples first .. first + n - 1 of those that are held out, in turn and over again: the
        same items with the same noise whenever they are asked for, on the device of the reader
        or on another."""
        v = torch.arange(first, first + n)
        items = self._held[v % len(self._held)]
        if isinstance(self.source, Memory):
            rows = self.source.rows(items.to(self.device))
        elif (rows := self._read.get((first, n), {})) == {}:
            rows = read(self.source, items.tolist(), v.tolist(), self._other_seed)
            size = sum(value.nbytes for value in rows.values())
            if size * (len(self._read) + 1) <= KEPT:
                self._read[first, n] = rows
        return self._ready(rows, Streams(self._other_seed, first), device)

    def trained(self, size: int = 4096) -> Iterator[Tensor]:
        """What is trained on and lies in memory, in the units of the data and some rows at a time;
        nothing of other sources, which are too large to be read for this."""
        if isinstance(self.source, Memory):
            for items in self.order.kept.split(size):
                yield self._centred(self.source.x[items.to(self.device)])

    def close(self) -> None:
        """Let the workers go; the next batch starts new ones."""
        self._stream, self._next = iter(()), range(0)

    def _ready(self, rows: Rows, noise: Streams, device: torch.device | None = None) -> Batch:
        place = device or self.device
        rows = {name: value.to(place, non_blocking=True) for name, value in rows.items()}
        x = rows.pop("x")
        x = x if self.transforms else self._centred(x)
        for transform in self.transforms:
            x = transform(x, noise)
        if set(rows) == {"y"}:
            return Batch(x, rows["y"], noise)
        return Batch(x, rows or None, noise)

    def _centred(self, x: Tensor) -> Tensor:
        """Levels at the centres of their cells, where it is known how many there are."""
        if self.levels is None or x.is_floating_point():
            return x
        return place(x.float(), torch.tensor(0.5, device=x.device), self.levels)

    def _items(self, part: range) -> Tensor:
        """The items of a range of samples, many ranges at once: it is the cheaper way."""
        known, items = self._known
        if part.start < known.start or part.stop > known.stop:
            known = range(part.start, part.start + max(AHEAD, len(part)))
            items = self.order(torch.arange(known.start, known.stop))
            self._known = known, items
        return items[part.start - known.start : part.stop - known.start]

    def _read_ahead(self, part: range, share: Share) -> Rows:
        if part != self._next:
            self._stream = self._reading(part, share)
        found, rows = next(self._stream)
        assert found == part
        self._next = share.after(part)
        if not isinstance(rows, dict):
            raise ValueError(rows)
        return rows

    def _reading(self, part: range, share: Share) -> Iterator[tuple[range, Rows | str]]:
        with warnings.catch_warnings():
            # Of more workers than cores, which were asked for, and of forks beside other threads.
            warnings.filterwarnings("ignore", "This (DataLoader|process)")
            loader: DataLoader = DataLoader(
                _Parts(self.source, self.order),
                batch_size=None,
                sampler=_Following(part, share),
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                prefetch_factor=4,
                worker_init_fn=_unheard,
                generator=torch.Generator(),  # it would draw a seed from the global one
                collate_fn=_as_it_is,
            )
            return iter(loader)


def default_workers(source: Source) -> int:
    """For images on disk a process for each core, up to four; none for anything else."""
    return min(4, os.cpu_count() or 1) if isinstance(source, Images) else 0


def _read(source: Source, order: Order, part: range) -> Rows:
    return read(source, order(torch.arange(part.start, part.stop)).tolist(), part, order.seed)


class _Parts(Dataset):
    """Ranges of samples as the items of a data set, which workers are asked for."""

    def __init__(self, source: Source, order: Order) -> None:
        self.source, self.order = source, order

    def __getitem__(self, part: range) -> tuple[range, Rows | str]:
        try:
            return part, _read(self.source, self.order, part)
        except ValueError as error:
            return part, str(error)


@dataclass(frozen=True)
class _Following:
    """The ranges of samples from one on, without end."""

    part: range
    share: Share

    def __iter__(self) -> Iterator[range]:
        part = self.part
        while True:
            yield part
            part = self.share.after(part)


def _as_it_is(value: object) -> object:
    return value


def _unheard(worker: int) -> None:
    """A signal for the group of processes is for the one that trains: it ends its step first, for
    which it needs what the workers read."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)
