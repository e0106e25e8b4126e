"""The seconds of a run, and whether to stop: answers on which all its processes agree."""

from __future__ import annotations

import time

import torch
from torch import distributed as dist

from .. import many


class Clock:
    """Reads the time since it was read last.

    Args:
        processes: how many agree.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self.start()

    def start(self) -> None:
        """Begin to count here."""
        self._last = time.perf_counter()

    def agree(self, told: bool) -> tuple[float, bool]:
        """Seconds since the last call, the mean over the processes, and whether any was told."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self.processes > 1:
            both = torch.tensor([seconds, told], dtype=torch.float64)
            dist.all_reduce(both, group=many.hosts())
            seconds = float(both[0]) / self.processes
            told = bool(both[1] > 0)
        return seconds, told

    def mean(self, value: float) -> float:
        """The mean of a number over the processes; infinite where it is in one of them."""
        if self.processes == 1:
            return value
        one = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(one, group=many.hosts())
        return float(one) / self.processes
