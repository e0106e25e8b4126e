"""Models on disk: ``model.safetensors`` and ``config.json`` in a folder, and no pickle.

What a model was tuned to (``model.tuned = tune_solver(model)``) lies beside them, in
``tuned.json`` and ``tuned.safetensors``.

The configuration names the classes of the process, its clock and the network, with the arguments
that rebuild them; the weights are those of the network. ``load`` gives the score back together
with its process, ready for ``sample``. Only classes of this library are ever built from a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import networks, schedules, sdes
from ..networks import Network
from ..schedules import Schedule
from ..scores import ScoreNetwork
from ..sdes import KernelSDE
from ..tuning import Tuned
from ..tuning.saved import pack, unpack
from .devices import pick_device

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TUNED, COVARIANCES = "tuned.json", "tuned.safetensors"
_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, truncated, unreadable, or not of the model it should be."""


def describe(model: ScoreNetwork) -> dict[str, Any]:
    """What ``config.json`` holds: enough to build the model again, but for its weights.

    Raises:
        TypeError: the process or its clock is not a dataclass of this library, or an argument of
            it is nothing that JSON can hold.
    """
    if not isinstance(model, ScoreNetwork):
        raise TypeError(f"model must be a ScoreNetwork, got {type(model).__name__}")
    config = {
        "format": _FORMAT,
        "sde": _pack(model.sde),
        "network": _pack_network(model.net),
        "prediction": model.prediction,
        "data_std": model.data_std,
        "shape": None if model.shape is None else list(model.shape),
    }
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the model cannot be described in JSON: {error}") from error
    return config


def save(model: ScoreNetwork, path: str | Path) -> None:
    """Write a model into the folder ``path``, which is made if need be.

    Each file is written beside its place and then renamed, so that one which is there is whole.

    Raises:
        TypeError: what ``describe`` raises, or ``tuned`` is not what ``tune_grid`` or
            ``tune_solver`` return by default; before anything is written.
    """
    from safetensors.torch import save_file

    config, tuned = describe(model), _pack_tuned(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().contiguous().clone() for k, v in model.net.state_dict().items()}
    write(folder / WEIGHTS, lambda file: save_file(weights, file))
    text = json.dumps(config, indent=2) + "\n"
    write(folder / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))
    _write_tuned(folder, tuned)


def load(
    path: str | Path, device: torch.device | str = "cpu", net: nn.Module | None = None
) -> ScoreNetwork:
    """Read a model from the folder ``path``: a score with its process, in evaluation mode, and
    what it was tuned to.

    Args:
        path: a folder that ``save`` or a training run wrote.
        device: where the model shall live.
        net: the network to fill, for one that is not of this library.

    Raises:
        CheckpointError: a file is missing, truncated or unreadable, names an unknown class, or
            does not fit the network.
        RuntimeError: a device that is not there.
    """
    place, folder = pick_device(device), Path(path)
    config = _read_config(folder / CONFIG)
    try:
        sde = _unpack(config["sde"])
        net = _unpack_network(config["network"]) if net is None else net
        shape = config["shape"] and tuple(config["shape"])
        model = ScoreNetwork(net, sde, config["prediction"], config["data_std"], shape)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not describe a model: {error}") from error
    _read_weights(folder / WEIGHTS, net)
    model.tuned = _read_tuned(folder)
    return model.to(place).eval()


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let ``writer`` fill a temporary file beside ``path``, then rename it to ``path``."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        writer(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _pack(value: Any) -> Any:
    """A process or a clock as {"class": name, argument: value, ...}; other values as they are."""
    if not isinstance(value, (KernelSDE, Schedule)):
        return list(value) if isinstance(value, tuple) else value
    module = sdes if isinstance(value, KernelSDE) else schedules
    name = type(value).__name__
    if getattr(module, name, None) is not type(value):
        raise TypeError(
            f"only processes and clocks of sde_gen can be saved, got {type(value).__qualname__}"
        )
    fields = dataclasses.fields(cast(Any, value))
    arguments = {f.name: _pack(getattr(value, f.name)) for f in fields if f.init}
    return {"class": name, **arguments}


def _unpack(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    arguments = {name: _unpack(v) for name, v in value.items() if name != "class"}
    for module, base in ((sdes, KernelSDE), (schedules, Schedule)):
        kind = _find(module, value.get("class"), base)
        if kind is not None:
            return kind(**arguments)
    raise CheckpointError(f"{CONFIG} names an unknown process or clock: {value.get('class')!r}")


def _pack_network(net: nn.Module) -> dict[str, Any]:
    known = _find(networks, type(net).__name__, Network) is type(net)
    config = dict(net.config) if known and isinstance(net, Network) else None
    return {"class": type(net).__name__, "config": config}


def _unpack_network(value: dict[str, Any]) -> nn.Module:
    kind = _find(networks, value["class"], Network)
    if kind is None or value["config"] is None:
        raise CheckpointError(
            f"the network of this checkpoint, {value['class']}, is not one of sde_gen: build it"
            " and pass it, load(path, net=...)"
        )
    return kind(**value["config"])


def _find(module: ModuleType, name: Any, base: type) -> Any:
    """The class of that name in the module, if it is a kind of ``base``."""
    kind = getattr(module, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, base) else None


def _pack_tuned(model: ScoreNetwork) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if model.tuned is None:
        return None
    if not isinstance(model.tuned, Tuned):
        raise TypeError(f"only a Tuned solver can be saved, got {type(model.tuned).__name__}")
    return pack(model.tuned)


def _write_tuned(folder: Path, packed: tuple[dict[str, Any], dict[str, Tensor]] | None) -> None:
    """Both files, or neither: a model that is not tuned must not find those of another."""
    from safetensors.torch import save_file

    if packed is None:
        for name in (TUNED, COVARIANCES):
            (folder / name).unlink(missing_ok=True)
        return
    config, tensors = packed
    text = json.dumps({"format": _FORMAT, **config}, allow_nan=False) + "\n"
    write(folder / COVARIANCES, lambda file: save_file(tensors, file))
    write(folder / TUNED, lambda file: file.write_text(text, encoding="utf-8"))


def _read_tuned(folder: Path) -> Tuned | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / TUNED).exists():
        return None
    config = _read_config(folder / TUNED)
    try:
        return unpack(config, load_file(folder / COVARIANCES))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / TUNED} or its tensors are damaged: {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: {file.parent} holds no model") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != _FORMAT:
        raise CheckpointError(f"{file} has format {found!r}, this version reads {_FORMAT}")
    return config


def _read_weights(file: Path, net: nn.Module) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or cannot be read: {error}") from error
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit {type(net).__name__}: {error}") from error
