"""What a call led to, for tests that make many and look at all."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any


class TooLong(BaseException):
    """A call that did not come back in time."""


def outcome(call: Callable[[], Any], seconds: float = 0) -> BaseException | None:
    """The exception that a call ends with, if any; warnings do not count."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop) if seconds else None
    try:
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (Exception, TooLong) as error:  # noqa: BLE001 (which ones come is the question)
        return error
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    return None
