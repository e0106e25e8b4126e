"""The command line: ``sde-gen demo | train | tune | sample | restore | evaluate``.

Bad input ends with one line on the standard error and the exit status 2, Ctrl-C with one line and
130; a warning is one line too. Each command imports what it needs when it runs, so that
``--help`` costs no more than the import of the package.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from safetensors import SafetensorError

from .config import read_config
from .options import check, parser

__all__ = ["ERRORS", "main", "parser"]

ERRORS = (
    *(ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
    SafetensorError,
)
"""What bad input and a full machine lead to; anything else is a fault of the library, and its
traceback is wanted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    top = parser()

    def say(kind: str, text: object) -> None:
        said, *_ = str(text).split("Exception raised from")  # torch appends its own frames
        _say(f"sde-gen {words[0]}: {kind}{' '.join(said.split())}")

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say("warning: ", message)
        try:
            read_config(top, words)
            options = top.parse_args(words)
            check(options)
            options.command(options)
            sys.stdout.flush()
        except ERRORS as error:
            say("error: ", str(error) or type(error).__name__)
            _forget_output()
            return 2
        except KeyboardInterrupt as stop:
            say("", str(stop) or "interrupted")
            return 130
    return 0


def _say(line: str) -> None:
    """One line on the standard error, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _forget_output() -> None:
    """Where output cannot be written, Python would complain once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
