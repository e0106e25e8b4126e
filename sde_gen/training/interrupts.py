"""Ctrl-C, SIGTERM and a queue's SIGUSR1, held back until a step is done and saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

_ENDS = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)}
"""Signals that end a program, which queues send before they kill it."""


class Interrupts:
    """A context in which these signals are noted, not obeyed; a second Ctrl-C is, at once.

    Only those that would end the program: one that it handles or ignores stays its own, and
    outside the main thread, where Python may not, nothing is held back.

    Args:
        hold: whether to hold anything back.

    Attributes:
        pending: the number of the signal that came, if one did.
    """

    def __init__(self, hold: bool) -> None:
        self.hold = hold and threading.current_thread() is threading.main_thread()
        self.pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
        defaults |= dict.fromkeys(_ENDS, signal.SIG_DFL)
        for number, default in defaults.items() if self.hold else ():
            if signal.getsignal(number) == default:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = number

    def obey(self, message: str) -> NoReturn:
        """Do what the signal asks for: KeyboardInterrupt, or the exit status of the signal (143
        of SIGTERM), with the message on the standard error."""
        if self.pending is not None and self.pending in _ENDS:
            print(message, file=sys.stderr)
            raise SystemExit(128 + self.pending)
        raise KeyboardInterrupt(message)
