"""A model as what JSON holds and its tensors, and back, with a look at every field.

``pack`` writes an object as its class and the arguments of its constructor, and a tensor as the
name that it has in the file of weights,

    {"class": "VP", "schedule": {"class": "Linear", "beta_min": 0.1, "beta_max": 20.0, "T": 1.0}}
    {"class": "Moments", "values": {"tensor": "moments.values"}, "mean": null, "basis": null}.

``Reader`` builds it again if each argument is what its annotation asks for. Networks are built
without memory first (on PyTorch's meta device) and compared with what the file holds: nothing
that is larger is ever allocated.
"""

from __future__ import annotations

import reprlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from ..scores import ScoreNetwork
from .registry import TABLE, Entry, known, place

M = TypeVar("M", bound=nn.Module)

DEEPEST, LONGEST = 16, 1000
"""The most levels of objects in objects, and entries of a list that a network is built from."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, truncated, unreadable, or not of the model it should be.

    >>> from contextlib import suppress
    >>> with suppress(sg.training.CheckpointError):
    ...     sg.load("nowhere")
    """


def bare(module: nn.Module) -> nn.Module:
    """The module itself, without ``torch.compile``, ``DataParallel`` or an average around it."""
    while inner := "module" if isinstance(module, AveragedModel) else _inner(module):
        module = getattr(module, inner)
    return module


def _inner(module: nn.Module) -> str | None:
    """The name under which a wrapper of PyTorch keeps what it wraps; None where this is none."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if hasattr(module, "_orig_mod") else None


def own_network(model: nn.Module) -> nn.Module | None:
    """The network of a score, where it is not of a class in the table."""
    net = bare(model.net) if isinstance(model, ScoreNetwork) else None
    return None if net is None or known(net) else net


def tensors_of(model: nn.Module, every: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers, by their names without wrappers.

    Args:
        every: also the buffers that ``state_dict`` leaves out, so that none is computed anew.

    Raises:
        TypeError: ``state_dict`` holds something else.
    """
    found: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    if every:
        found |= dict(model.named_buffers(remove_duplicate=False))
    inside = [(f"{name}." if name else "", _inner(m)) for name, m in model.named_modules()]
    for start, inner in reversed([(s, f"{s}{i}.") for s, i in inside if i]):
        found = {
            start + k.removeprefix(inner) if k.startswith(inner) else k: t
            for k, t in found.items()
        }
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is no tensor but a {type(value).__name__}")
    return found


def pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON holds of a value; tensors are put aside, one that many share as one.

    Raises:
        TypeError: an object of a class that is not in the table; it names the field.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [pack(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {name: pack(v, f"{where}[{name!r}]", tensors) for name, v in value.items()}
    if isinstance(value, Tensor):
        name = next((name for name, t in tensors.items() if t is value), where)
        tensors[name] = value
        return {"tensor": name}
    value = bare(value) if isinstance(value, nn.Module) else value
    if (entry := known(value)) is not None:
        items = entry.arguments(value).items()
        arguments = {name: pack(v, _join(where, name), tensors) for name, v in items}
        return {"class": entry.kind.__name__, **arguments}
    if isinstance(value, nn.Module):
        return {"class": place(type(value))}
    raise TypeError(
        f"{where}: a {type(value).__qualname__} cannot be saved; numbers, text, tensors can, and"
        " objects of the classes in the table, to which register adds your own"
    )


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


_CHECKS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    NoneType: ("null", lambda v: v is None),
    bool: ("true or false", lambda v: type(v) is bool),
    int: ("an integer", lambda v: type(v) is int and abs(v) < 2**63),
    float: ("a finite number", lambda v: type(v) in (int, float) and abs(v) <= sys.float_info.max),
    str: ("text", lambda v: type(v) is str),
    tuple: ("a list", lambda v: type(v) is list),
    Sequence: ("a list", lambda v: type(v) is list),
    Mapping: ("values by name", lambda v: type(v) is dict and all(type(k) is str for k in v)),
    Tensor: ("the name of a tensor", lambda v: type(v) is dict and list(v) == ["tensor"]),
}
"""What an annotation asks for, and whether a value of JSON is that; classes are in the table."""

_brief = reprlib.Repr()
_brief.maxstring = 80
short = _brief.repr


@dataclass(frozen=True)
class Reader:
    """Builds what ``pack`` described, after a look at each field.

    Args:
        tensors: those of the file. Before ``fill`` only those are read that are arguments.
        net: takes the place of the network that the file describes.
        config, weights: how messages call the files.

    Raises:
        CheckpointError: from each method; it names file and field.
    """

    tensors: Mapping[str, Tensor]
    net: nn.Module | None = None
    config: str = "config.json"
    weights: str = "model.safetensors"
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def model(self, node: dict[str, Any], kind: type[M]) -> M:
        """The whole, its weights still to come, if they and no others are in the file."""
        model: M = self._read({k: v for k, v in node.items() if k != "format"}, kind, "")
        misfit = f"{self.weights} does not fit {self.config}:"
        for name, module in model.named_modules():
            for n, v in vars(module).items():
                if isinstance(v, Tensor) and v.is_meta:
                    raise self._wrong(_join(name, n), "is a tensor, but no parameter or buffer")
        wanted, needed = tensors_of(model), tensors_of(model, every=False)
        for name, t in wanted.items():
            held = self.tensors.get(name)
            if held is None and (name in needed or t.is_meta):
                raise CheckpointError(f"{misfit} {name} is missing")
            if held is not None and _form(held) != _form(t):
                raise CheckpointError(f"{misfit} {name} is {_form(held)}, not {_form(t)}")
        if extra := self.tensors.keys() - wanted.keys() - self._kept.keys():
            raise CheckpointError(f"{misfit} nothing is called {short(min(extra))} there")
        return model

    def fill(self, model: nn.Module) -> None:
        """Give the model its weights, each in the dtype that it was saved in."""
        floating = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        if self.net is not None and len(floating) == 1:
            self.net.to(floating.pop())  # with it the buffers that the file does not hold
        for name, t in tensors_of(model).items():
            if name not in self.tensors:
                continue
            value = self._copy(name)
            if t.is_meta:
                new = (
                    nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value
                )
                torch.utils.swap_tensors(t, new)
            else:
                t.data = value.to(t.device)

    def _copy(self, name: str) -> Tensor:
        """In memory: the file is only mapped, and may be changed behind the model's back."""
        try:
            return self.tensors[name].clone()
        except RuntimeError as error:
            raise CheckpointError(f"{self.weights}: no memory for {name}: {error}") from error

    def _read(self, value: Any, hint: Any, where: str) -> Any:
        """The value, if it is what the annotation asks for."""
        if hint is nn.Module and type(value) is dict and self.net is not None:
            return self.net
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for option in options:
            kind, inner = get_origin(option) or option, get_args(option)
            if kind is Literal and value in inner:
                return value
            if kind in _CHECKS and _CHECKS[kind][1](value):
                return self._plain(value, kind, inner, where)
            if (entry := _entry(value, option)) is not None:
                return self._build(entry, value, where)
        wanted = " or ".join(_wanted(option) for option in options)
        raise self._wrong(where, f"must be {wanted}, got {short(value)}")

    def _plain(self, value: Any, kind: Any, inner: tuple[Any, ...], where: str) -> Any:
        if kind in (tuple, Sequence):
            of = inner[0] if inner else None
            return tuple(self._read(v, of, f"{where}[{i}]") for i, v in enumerate(value))
        if kind is Mapping:
            of = inner[1] if inner else None
            return {k: self._read(v, of, f"{where}[{short(k)}]") for k, v in value.items()}
        if kind is not Tensor:
            return float(value) if kind is float else value
        name = value["tensor"]
        if type(name) is not str or name not in self.tensors:
            raise self._wrong(where, f"names {short(name)}, which {self.weights} lacks")
        if name not in self._kept:
            self._kept[name] = self._copy(name)
        return self._kept[name]

    def _build(self, entry: Entry, node: dict[str, Any], where: str) -> Any:
        if where.count(".") > DEEPEST:
            raise self._wrong(where, "is nested too deep")
        name, given = entry.kind.__name__, node.keys() - {"class"}
        if unknown := given - entry.fields.keys():
            at = _join(where, short(min(unknown)))
            raise self._wrong(at, f"is unknown: {name} takes {', '.join(entry.fields)}")
        if missing := entry.required - given:
            raise self._wrong(_join(where, min(missing)), f"is missing: {name} needs it")
        # A score is only put together here; what it is made of has been built.
        frugal = entry.build is entry.kind and issubclass(entry.kind, nn.Module)
        for n in given if frugal else ():
            if type(node[n]) in (list, dict) and len(node[n]) > LONGEST:
                raise self._wrong(_join(where, n), f"has {len(node[n])} entries, over {LONGEST}")
        hints = entry.fields.items()
        arguments = {n: self._read(node[n], h, _join(where, n)) for n, h in hints if n in given}
        try:
            with _without_memory(4 * len(self.tensors)) if frugal else nullcontext():
                return entry.build(**arguments)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise self._wrong(where, f"is no {name}: {reason}") from error

    def _wrong(self, where: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self.config}: {where or 'the model'} {text}")


def _entry(value: Any, kind: Any) -> Entry | None:
    """The class of the table that a value names, if it is of that kind."""
    name = value.get("class") if type(value) is dict else None
    entry = TABLE.get(name) if type(name) is str else None
    fits = entry is not None and isinstance(kind, type) and issubclass(entry.kind, kind)
    return entry if fits else None


def _wanted(option: Any) -> str:
    """What an annotation asks for, in words."""
    kind = get_origin(option) or option
    if kind in _CHECKS:
        return _CHECKS[kind][0]
    if kind is Literal:
        return f"one of {', '.join(map(repr, get_args(option)))}"
    names = [n for n, e in TABLE.items() if isinstance(kind, type) and issubclass(e.kind, kind)]
    if kind is nn.Module:
        names.append("your own, given by load(path, net=...), or registered")
    return " or ".join(names) if names else f"{option}, which no file holds"


def _form(t: Tensor) -> str:
    """What must agree: of the dtypes that networks compute in, that of the file is taken."""
    floating = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return f"{'floating' if t.dtype in floating else t.dtype} {tuple(t.shape)}"


class _Shapes(TorchFunctionMode):
    """On the meta device PyTorch loads its compiler, for over a second, to fill a tensor in these
    ways with nothing: they are left out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.exp2_):
            return args[0]
        if func is nn.init.normal_:
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_memory(most: int) -> Iterator[None]:
    """What is built in here has shapes alone, and at most so many parameters."""
    left, me = most, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal left
        left -= threading.get_ident() == me
        if left < 0:
            raise ValueError("it has more tensors than the file")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), _Shapes():
            yield
    finally:
        hook.remove()
