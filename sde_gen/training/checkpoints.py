"""Models on disk: ``model.safetensors`` and ``config.json`` in a folder, and no pickle.

The configuration names the classes of the model, its network, its process and its clock, with
the arguments that rebuild them (``registry``); the other file holds all tensors: weights, moments
of the data, what the model was tuned to. It also carries two checksums, of its tensors and of the
configuration, so that neither file is read where it or the other has changed. ``pace.json``, where
it is there, says how the network samples fastest on each kind of device.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..ops import as_path
from ..sampling import Pace
from ..sampling.pace import network_in
from ..scores import Foreign, Learned
from .devices import pick_device
from .packing import CheckpointError as CheckpointError
from .packing import M, Reader, bare, own_network, pack, short, tensors_of
from .registry import known

WEIGHTS, CONFIG, PACE = "model.safetensors", "config.json", "pace.json"
FORMAT = 2
"""Format 1 had no checksums and no moments, and all weights came back in one precision."""
LARGEST = 2**24
"""Bytes of a configuration; most have a thousandth of that."""


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``config.json`` holds: enough to build the model again, but for its tensors.

    Raises:
        TypeError: a part of the model is of no class that can be built from a file, or is
            nothing that JSON can hold, or does not fit the rest; a ``Foreign`` score.
    """
    return _describe(model)[0]


def _describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors, after a look at whether ``load`` would take them."""
    model = bare(model)
    if isinstance(model, Foreign):
        raise TypeError(
            "a network from elsewhere is saved by the library that it is from: save it there"
            " (model.net holds it), load it there, and wrap it as it was wrapped"
        )
    if known(model) is None:
        raise TypeError(
            f"model must be a score, or of a class that register was told of,"
            f" got {type(model).__name__}"
        )
    own = own_network(model)
    tensors: dict[str, Tensor] = {}
    config = {"format": FORMAT, **pack(model, "", tensors)}
    tensors |= tensors_of(model, every=own is None)
    try:
        Reader(tensors, own).model(json.loads(json.dumps(config, allow_nan=False)), type(model))
    except (CheckpointError, TypeError, ValueError) as error:
        raise TypeError(f"the {type(model).__name__} cannot be saved: {error}") from error
    return config, tensors


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model into the folder ``path``, which is made if need be.

    Both files are written beside their places before either is renamed, so that what is there is
    whole.

    Args:
        model: a ``ScoreNetwork``, or a module of a class in the table; in ``torch.compile``,
            ``DataParallel`` or an ``AveragedModel`` or not.
        path: the folder.

    Raises:
        TypeError: what ``describe`` raises, before anything is written.

    >>> sg.save(sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1), sg.VP()), "model")
    """
    from safetensors.torch import save_file

    config, found = _describe(model)
    # Copies: the tensors of a file share no memory.
    tensors = {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in found.items()
    }
    sums = {"tensors": _sum_of_tensors(tensors), "config": _sum_of_config(config)}
    text = json.dumps(config, indent=2) + "\n"
    folder = as_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write_all(
        {
            folder / WEIGHTS: lambda file: save_file(tensors, file, sums),
            folder / CONFIG: lambda file: file.write_text(text, encoding="utf-8"),
        }
    )
    save_pace(bare(model), folder)


@overload
def load(
    path: str | Path, device: torch.device | str = "cpu", net: nn.Module | None = None
) -> Learned: ...
@overload
def load(path: str | Path, device: torch.device | str = "cpu", *, kind: type[M]) -> M: ...
def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    net: nn.Module | None = None,
    kind: type[nn.Module] = Learned,
) -> nn.Module:
    """Read a model from the folder ``path``: weights in their dtype, process, moments, what it was
    tuned to and its pace, in evaluation mode.

    Args:
        path: a folder that ``save`` or a training run wrote.
        device: where the model shall live.
        net: the network to fill, for a score whose network is of no class in the table.
        kind: what is expected there, ``MLP`` for a classifier for instance; by default a score,
            a ``ScoreNetwork`` or a ``LatentModel``.

    Raises:
        CheckpointError: a file is missing, truncated, changed, unreadable or of another format,
            names an unknown class, has a field of a wrong kind, or does not fit the other file.
        RuntimeError: a device that is not there.

    >>> sg.save(sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1), sg.VP()), "model")
    >>> sg.load("model").sde
    VP(schedule=Linear(beta_min=0.1, beta_max=20.0, T=1.0))
    """
    place, folder = pick_device(device), as_path(path)
    config = _read_config(folder / CONFIG)
    tensors, sums = _read_tensors(folder / WEIGHTS)
    reader = Reader(tensors, net, str(folder / CONFIG), str(folder / WEIGHTS))
    model = reader.model(config, kind)
    if sums.get("tensors") != _sum_of_tensors(tensors):
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: its checksum differs")
    if sums.get("config") != _sum_of_config(config):
        raise CheckpointError(
            f"{folder / CONFIG} is not what was saved with {WEIGHTS}: its checksum differs"
        )
    reader.fill(model)
    if (network := network_in(model)) is not None:
        network.pace = _read_paces(folder / PACE).get(place.type)
    return model.to(place).eval()


def save_pace(model: nn.Module, folder: Path) -> None:
    """Write the pace of a model beside it, and keep those of other devices; where the model has
    none, forget them.

    Raises:
        OSError: it cannot be written.
    """
    file, network = folder / PACE, network_in(model)
    pace = None if network is None else network.pace
    if network is None or pace is None:
        file.unlink(missing_ok=True)
        return
    device = pace.device or network.device.type
    try:
        others = _read_paces(file)
    except CheckpointError:
        others = {}
    known = {name: asdict(p) for name, p in {**others, device: pace}.items()}
    for entry in known.values():
        del entry["device"]
    text = json.dumps(known, indent=2) + "\n"
    write(file, lambda part: part.write_text(text, encoding="utf-8"))


def _read_paces(file: Path) -> dict[str, Pace]:
    """The paces in a file by device; none where there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
        return {name: Pace(**entry, device=name) for name, entry in found.items()}
    except (AttributeError, OSError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}; without this file the pace is found again"
        ) from error


def write(path: Path, writer: Callable[[Path], Any], before: Path | None = None) -> None:
    """Let ``writer`` fill a temporary file beside ``path``, then rename it to ``path``; what was
    there is kept as ``before``, where that is given."""

    def fill(part: Path) -> None:
        writer(part)
        if before is not None and path.is_file():
            os.replace(path, before)

    _write_all({path: fill})


def _write_all(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """All or none; the modes are those that the umask asks for."""
    parts = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in writers}
    try:
        for path, writer in writers.items():
            parts[path].touch(exist_ok=False)
            mode = parts[path].stat().st_mode
            writer(parts[path])
            parts[path].chmod(mode)
        for path, part in parts.items():
            os.replace(part, path)
    except BaseException:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise


def _sum_of_config(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _sum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        total.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        total.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read_config(file: Path) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no number")

    if not os.path.isfile(file):
        raise CheckpointError(f"{file} is missing, or is no file: {file.parent} holds no model")
    try:
        if file.stat().st_size > LARGEST:
            raise CheckpointError(f"{file} is too long: over {LARGEST} bytes")
        config = json.loads(file.read_bytes(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if type(found) is not int or found != FORMAT:
        old = " (without checksums and moments: train the model again)" if found == 1 else ""
        raise CheckpointError(
            f"{file} has format {short(found)}{old}, this version reads format {FORMAT}"
        )
    return config


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, mapped but not read, and their checksums."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(file):
        raise CheckpointError(f"{file} is missing, or is no file")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or cannot be read: {error}") from error
