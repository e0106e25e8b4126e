"""The folder of a run: one run at a time, and a state that is whole, of this run, or refused.

The state is a file of ``torch.save`` that holds tensors, numbers and names alone. Its records
carry checksums, which are compared before anything in it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import lzma
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.sources import Memory, Source, glance
from ..scores import ScoreNetwork
from .checkpoints import CONFIG, WEIGHTS, CheckpointError, write
from .recipe import Recipe

STATE, LOCK = "training.pt", "training.lock"
LOOKED_AT = 64
"""Items of a source beyond memory that tell it from others."""
MAY_CHANGE = ("steps", "minutes", "epochs", "every", "save_every", "patience")
"""What a run that is resumed may have otherwise in its recipe: how long, and how often."""


_HELD: set[int] = set()
"""Open locks. A child process must not keep its parent's: a lock lasts until the last of those
that hold it is gone."""


def _let_go() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other runs; the system lets it go however the process ends.

    Raises:
        BlockingIOError: another run is in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    file, handle = folder / LOCK, -1
    while handle < 0:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise BlockingIOError(f"another run is writing to {folder}: wait or stop it") from None
        except OSError:  # a file system without locks
            break
        if not _is(handle, file):  # the run before removed it in between
            os.close(handle)
            handle = -1
    _HELD.add(handle)
    try:
        _sweep(folder)
        yield
    finally:
        _HELD.discard(handle)
        file.unlink(missing_ok=True)
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed while they wrote have left half written."""
    for name in (STATE, WEIGHTS, CONFIG):
        for part in folder.glob(f".{name}.*"):
            part.unlink(missing_ok=True)


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def check_free(folder: Path) -> None:
    """Raise ``FileExistsError`` where the folder holds a run or a model."""
    held = [name for name in (STATE, WEIGHTS, CONFIG) if (folder / name).exists()]
    if held:
        choice = "resume to go on with that run, or " if STATE in held else ""
        raise FileExistsError(
            f"{folder} already holds {', '.join(held)}: say {choice}overwrite to begin anew"
        )


@contextmanager
def as_os_error(folder: Path) -> Iterator[None]:
    """Whatever the libraries that write raise for a full disk is an ``OSError``."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot write to {folder}: {error}") from error


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what ``read_state`` reads."""
    write(folder / STATE, lambda file: torch.save(dict(state), file))


def read_state(folder: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the run in the folder, if it is that of the run that is ``here``.

    Args:
        here: the state of this run, with whatever entries the other may have.

    Raises:
        CheckpointError: no state, a damaged one, or one of another run; the field is named.
    """
    file = folder / STATE
    state = _load(file)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} must hold a dict, got {type(state).__name__}")
    for name in here:
        if name not in state:
            raise CheckpointError(f"{file} lacks the field {name!r}")
    _check_run(state["run"], here["run"], file)
    for name, kind in (("step", int), ("elapsed", float)):
        value = state[name]
        if type(value) is not kind or not 0 <= value < math.inf:
            raise CheckpointError(f"{file}: {name} must be a number >= 0, got {value!r}")
    for name in ("model", "average"):
        _check_tensors(state[name], here[name], name, file)
    if not isinstance(state["optimizer"], dict):
        raise CheckpointError(f"{file}: optimizer must hold tensors, got {state['optimizer']!r}")
    if state["best"] != {}:
        _check_tensors(state["best"], here["average"], "best", file)
    if not _are_looks(state["validation"]):
        raise CheckpointError(
            f"{file}: validation must hold pairs (step, loss), got {_short(state['validation'])}"
        )
    for i, moments in state["optimizer"].items():
        if i not in here["optimizer"]:
            raise CheckpointError(f"{file}: optimizer has an unknown entry {i!r}")
        _check_tensors(moments, here["optimizer"][i], f"optimizer[{i}]", file)
    return state


def run_of(folder: Path) -> dict[str, Any] | None:
    """What the state in a folder says of its run, as ``about`` does; None where there is none."""
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, *_DAMAGE):
        return None
    run = state.get("run") if isinstance(state, dict) else None
    known = isinstance(run, dict) and {"recipe.seed", "recipe.holdout", "data"} <= run.keys()
    return run if known else None


def _are_looks(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(look, list) and [type(part) for part in look] == [int, float] for look in value
    )


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"no run to resume: {file} is missing")
    try:
        with zipfile.ZipFile(file) as records:
            damaged = records.testzip()
        if damaged is None:
            with warnings.catch_warnings():  # it warns of what it refuses
                warnings.simplefilter("ignore")
                # The devices that the tensors were on may not be there.
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it advises to run whatever the file says
        raise CheckpointError(f"{file} holds more than tensors, numbers and names") from None
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is truncated or cannot be read: {error}") from error
    raise CheckpointError(f"{file} is damaged: {damaged} does not have its checksum")


# What zipfile and torch.load raise for records that are not what they say.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(OSError, EOFError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(MemoryError, RuntimeError, TypeError, ValueError),
)


def _check_run(there: Any, here: Mapping[str, Any], file: Path) -> None:
    if not isinstance(there, dict):
        raise CheckpointError(f"{file}: run must describe the run, got {there!r}")
    wrong = [
        f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
        for name in dict.fromkeys([*there, *here])
        if not _same(there.get(name), here.get(name))
        and not (name == "objective" and None in (there.get(name), here.get(name)))
    ]
    if wrong:
        raise CheckpointError(
            f"{file} is not of this model, data and recipe: {'; '.join(wrong)}."
            " Give what it was begun with, or overwrite it"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def _same(a: Any, b: Any) -> bool:
    # The last digit of a deviation computed from the data depends on the number of threads.
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return repr(a) == repr(b)


def _check_tensors(found: Any, wanted: Mapping[Any, Any], name: str, file: Path) -> None:
    """Raise unless ``found`` has tensors of the names, shapes and dtypes of those wanted."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {name} must hold tensors, got {type(found).__name__}")
    odd = [key for key in dict.fromkeys([*found, *wanted]) if (key in found) != (key in wanted)]
    if odd:
        verb = "has an unknown" if odd[0] in found else "lacks the"
        raise CheckpointError(f"{file} is not of this model: {name} {verb} entry {odd[0]!r}")
    for key, value in wanted.items():
        if isinstance(value, Tensor) and _kind(found[key]) != _kind(value):
            raise CheckpointError(
                f"{file} is not of this model: {name}[{key!r}] is {_kind(found[key])} there and"
                f" {_kind(value)} here"
            )


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def about(model: nn.Module, source: Source, recipe: Recipe, objective: object) -> dict[str, Any]:
    """What a run must have in common with the one that it takes up."""
    known: dict[str, Any] = {"class": type(model).__name__}
    if isinstance(model, ScoreNetwork):
        known |= {"sde": _plain(model.sde), "prediction": model.prediction}
        facts, units = model.facts, model.facts.units
        known |= {"std": facts.std, "shape": facts.shape, "levels": facts.levels}
        known["units"] = units and [units.shift.tolist(), units.scale.tolist()]
        known |= {"net": f"{type(model.net).__name__} {getattr(model.net, 'config', '')}"}
    options = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in MAY_CHANGE}
    return {
        **{f"model.{name}": value for name, value in known.items()},
        **{f"recipe.{name}": value for name, value in options.items()},
        # An objective that is a function of one's own says nothing of what it computes.
        "objective": _plain(objective) if dataclasses.is_dataclass(objective) else None,
        **fingerprints(source),
    }


def _plain(value: object) -> str:
    """What a dataclass shows of itself; functions in it are named, wherever they lie."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def fingerprints(source: Source) -> dict[str, Any]:
    """What tells data from others: of tensors in memory all values, of other sources their
    length and a few items, which is all that can be had soon.

    >>> fingerprints(Memory(torch.zeros(2, 3)))
    {'labels': None, 'data': 'float32 (2, 3), checksum 2bb6ae06ad472028'}
    """
    if isinstance(source, Memory):
        rows, count = source.rows(slice(None)), ""
    else:
        rows, count = glance(source, LOOKED_AT), f"{len(source)} items, some of them "
    found = {name: count + _fingerprint(value) for name, value in rows.items()}
    names = {"x": "data", "y": "labels"}
    return {"labels": None} | {names.get(k, f"data.{k}"): v for k, v in found.items()}


def _fingerprint(x: Tensor) -> str:
    """Dtype, shape and a checksum of the values."""
    values = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{_kind(x)}, checksum {hashlib.blake2b(values.data, digest_size=8).hexdigest()}"
