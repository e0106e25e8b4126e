"""The options of a command from a TOML file, and those of a run into one.

A key is the long name of an option, or of a positional argument, of the command that reads the
file. What the file says becomes the default, so what the command line says wins (operators, which
are a list, add up). ``resume`` and ``overwrite`` are said each time, and are no keys.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEPT = "train.toml"
"""The options of a training run, beside its model."""
_NO_KEYS = ("help", "config", "command", "name", "resume", "overwrite")


def read_config(top: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Make what ``--config FILE`` says the defaults of the command that the words begin with.

    Raises:
        OSError, ValueError: the file cannot be read, is no TOML, has an unknown key, or a value
            that is none of its option's.
    """
    looking = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    looking.add_argument("--config", type=Path)
    file = looking.parse_known_args(list(words)[1:])[0].config
    subparsers = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    command = subparsers.choices.get(words[0]) if words else None
    if file is None or command is None:
        return
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no TOML file: {error}") from error
    actions = {_key(action): action for action in command._actions}
    actions = {key: action for key, action in actions.items() if key not in _NO_KEYS}
    for key, value in values.items():
        if (name := key.replace("-", "_")) not in actions:
            near = get_close_matches(name, actions, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(actions)}"
            raise ValueError(f"{file}: {key} is no option of {words[0]}: {hint}")
        action = actions[name]
        try:
            _set(command, action, value)
        except (TypeError, ValueError) as error:
            wanted = f": {error}" if str(error) else ""
            raise ValueError(f"{file}: {key} cannot be {value!r}{wanted}") from error


def _key(action: argparse.Action) -> str:
    """The long name of an option, or the name of an argument."""
    long = [text[2:] for text in action.option_strings if text.startswith("--")]
    return (long or [action.dest])[0].replace("-", "_")


def _set(command: argparse.ArgumentParser, action: argparse.Action, value: object) -> None:
    """Make a value the default of an action, which then need not be given."""
    read = action.type if callable(action.type) else str
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        found: Any = value
    elif isinstance(value, bool | dict):
        raise ValueError("expected a number, a text or a list of them")
    else:
        texts = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        several = action.nargs == "+" or isinstance(action.default, list)
        if len(texts) != 1 and not several:
            raise ValueError("expected one value")
        read_all = [read(text) for text in texts]
        if action.choices is not None and not set(read_all) <= set(action.choices):
            raise ValueError(f"expected one of {', '.join(action.choices)}")
        found = read_all if several else read_all[0]
    if isinstance(action, argparse._AppendAction):  # several options may append to one list
        found = [*(command.get_default(action.dest) or []), *found]
    command.set_defaults(**{action.dest: found})
    action.required = False
    if not action.option_strings:
        action.nargs = "?"


def text_of(options: argparse.Namespace) -> str:
    """The options as TOML, but for those that were left out.

    >>> print(text_of(argparse.Namespace(name="train", data="digits", lr=0.002, key=None)))
    data = "digits"
    lr = 0.002
    <BLANKLINE>
    """
    kept = {k: v for k, v in vars(options).items() if k not in _NO_KEYS and v is not None}
    # JSON's texts, numbers, booleans and lists are TOML's.
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in kept.items())
