"""The seconds of a run, and whether to stop: answers on which all its processes agree."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Reads the time since it was read last.

    Args:
        group: the processes that agree, on their hosts; None where there is one.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.start()

    def start(self) -> None:
        """Begin to count here."""
        self._last = time.perf_counter()

    def agree(self, told: bool) -> tuple[float, bool]:
        """Seconds since the last call, the mean over the processes, and whether any was told."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self.group is not None:
            both = torch.tensor([seconds, told], dtype=torch.float64)
            torch.distributed.all_reduce(both, group=self.group)
            seconds = float(both[0]) / torch.distributed.get_world_size(self.group)
            told = bool(both[1] > 0)
        return seconds, told

    def mean(self, value: float) -> float:
        """The mean of a number over the processes; infinite where it is in one of them."""
        if self.group is None:
            return value
        one = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(one, group=self.group)
        return float(one) / torch.distributed.get_world_size(self.group)
