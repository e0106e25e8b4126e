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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..scores import ScoreNetwork
from .checkpoints import CONFIG, WEIGHTS, CheckpointError, write
from .history import HISTORY
from .layout import Layout
from .recipe import Recipe

STATE, BEFORE, LOCK = "training.pt", "training.before.pt", "training.lock"
MAY_CHANGE = ("steps", "minutes", "every", "save_every", "accumulate", "layout")
"""What a run that is resumed may have otherwise in its recipe: how long, how often, in how many
parts. (A layout that is asked for is compared with the one that was taken.)"""


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
    try:
        _sweep(folder)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed while they wrote have left half written."""
    for name in (STATE, WEIGHTS, CONFIG, HISTORY):
        for part in folder.glob(f".{name}.*"):
            part.unlink(missing_ok=True)


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def check_free(folder: Path) -> None:
    """Raise ``FileExistsError`` where the folder holds a run or a model."""
    held = [name for name in (STATE, BEFORE, WEIGHTS, CONFIG) if (folder / name).exists()]
    if held:
        choice = "resume to go on with that run, or " if holds_run(folder) else ""
        raise FileExistsError(
            f"{folder} already holds {', '.join(held)}: say {choice}overwrite to begin anew"
        )


def holds_run(folder: Path) -> bool:
    """Whether there is something to resume."""
    return any((folder / name).exists() for name in (STATE, BEFORE))


@contextmanager
def as_os_error(folder: Path) -> Iterator[None]:
    """Whatever the libraries that write raise for a full disk is an ``OSError``."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot write to {folder}: {error}") from error


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what ``read_state`` reads; the state that was there is kept as the one before."""
    write(folder / STATE, lambda file: torch.save(dict(state), file), folder / BEFORE)


def read_state(folder: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the run in the folder, if it is that of the run that is ``here``.

    Args:
        here: the state of this run, with whatever entries the other may have.

    Where the last state cannot be read, the one before it is taken, with a warning.

    Raises:
        CheckpointError: no state, a damaged one, or one of another run; the field is named.
    """
    file, state = _load_last(folder)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} must hold a dict, got {type(state).__name__}")
    for name in ("run", *here):
        if name not in state:
            raise CheckpointError(f"{file} lacks the field {name!r}")
        if name == "run":
            _check_run(state["run"], here["run"], file)
    for name, kind in (("step", int), ("elapsed", float)):
        value = state[name]
        if type(value) is not kind or not 0 <= value < math.inf:
            raise CheckpointError(f"{file}: {name} must be a number >= 0, got {value!r}")
    for name in here.keys() & {"model", "average", "narrow"}:
        _check_tensors(state[name], here[name], name, file)
    if not isinstance(state["optimizer"], dict):
        raise CheckpointError(f"{file}: optimizer must hold tensors, got {state['optimizer']!r}")
    for i, moments in state["optimizer"].items():
        if i not in here["optimizer"]:
            raise CheckpointError(f"{file}: optimizer has an unknown entry {i!r}")
        _check_tensors(moments, here["optimizer"][i], f"optimizer[{i}]", file)
    _check_layout(state["layout"], here["layout"], file)
    length = state["length"]
    if not (isinstance(length, list) and len(length) == 2):
        raise CheckpointError(f"{file}: length must be [steps, minutes], got {length!r}")
    return state


def _check_layout(there: Any, here: Mapping[str, bool] | None, file: Path) -> None:
    """Raise unless it is one, and the one that is asked for here, if one is."""
    names = set(asdict(Layout()))
    if there is not None and not (
        isinstance(there, dict)
        and set(there) == names
        and all(type(taken) is bool for taken in there.values())
    ):
        raise CheckpointError(f"{file}: layout must be three times true or false, got {there!r}")
    if here is not None and there is not None and here != there:
        raise CheckpointError(
            f"{file} is not of this recipe: layout is {Layout(**there)} there and"
            f" {Layout(**here)} here. Leave it away, or overwrite the run"
        )


def _load_last(folder: Path) -> tuple[Path, Any]:
    """The last state that can be read, and its file."""
    file, before = folder / STATE, folder / BEFORE
    try:
        return file, _load(file)
    except CheckpointError as error:
        if not before.is_file():
            raise
        state = _load(before)
        warnings.warn(f"{error}; the run goes on from {before}, the state before", stacklevel=5)
        return before, state


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


def about(
    model: nn.Module,
    data: Tensor,
    labels: Tensor | None,
    recipe: Recipe,
    objective: object,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
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
        "optimizer": _optimizer(optimizer),
        # An objective that is a function of one's own says nothing of what it computes.
        "objective": _plain(objective) if dataclasses.is_dataclass(objective) else None,
        "data": fingerprint(data),
        "labels": None if labels is None else fingerprint(labels),
    }


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Its class and numbers, but for those that follow the device or the run."""
    skipped = {"params", "fused", "foreach", "capturable", "differentiable", "initial_lr"}
    groups = [
        {k: v for k, v in group.items() if k not in skipped} for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups[0] if len(groups) == 1 else groups}"


def _plain(value: object) -> str:
    """What a dataclass shows of itself; functions in it are named, wherever they lie."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def fingerprint(x: Tensor) -> str:
    """Dtype, shape and a checksum of the values.

    >>> fingerprint(torch.zeros(2, 3))
    'float32 (2, 3), checksum 2bb6ae06ad472028'
    """
    values = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{_kind(x)}, checksum {hashlib.blake2b(values.data, digest_size=8).hexdigest()}"
