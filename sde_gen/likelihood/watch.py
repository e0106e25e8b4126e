"""Progress of a run of known length, and a word where it will take minutes."""

from __future__ import annotations

import logging
import time

_log = logging.getLogger("sde_gen.likelihood")
_PATIENCE = 120.0
"""Seconds from which on a run says beforehand how long it will take."""


class Watch:
    """Counts calls: a bar if asked for; after the second call, whose time is no warm-up, a
    message by ``logging`` where all of them will take more than two minutes.

    Args:
        calls: how many there will be.
        progress: show a bar.
    """

    def __init__(self, calls: int, progress: bool = False) -> None:
        self.calls, self.done, self._bar, self._last = calls, 0, None, time.perf_counter()
        if progress:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=calls, desc="likelihood", unit="call", leave=False)

    def tick(self) -> None:
        """One more call is made."""
        self.done += 1
        if self.done == 1:
            self._last = time.perf_counter()
        if self.done == 2:
            spent = (time.perf_counter() - self._last) * self.calls
            if spent > _PATIENCE:
                _log.warning(
                    "%d calls will take about %.0f minutes: fewer steps, probes or terms take"
                    " less, and only a part of the data",
                    self.calls,
                    spent / 60,
                )
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
