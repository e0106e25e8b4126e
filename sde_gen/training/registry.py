"""What may be built from a file: one table of classes.

The signature of a class is the table of checks of its fields: what an argument may be stands in
its annotation. Only what is in the table is ever built.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import nn

from .. import networks, schedules, sdes
from ..facts import Facts, Units
from ..moments import Moments
from ..scores import ScoreNetwork
from ..scores.network import Prediction
from ..sdes import KernelSDE
from ..solvers import Exponential, Leap, Midpoint, Polynomial, Spectral
from ..tuning import Tuned
from ..tuning.tuned import Choice

C = TypeVar("C")
Arguments = Callable[[Any], Mapping[str, Any]]
"""Gives the arguments that an object was built with."""


class Entry(NamedTuple):
    """A class of the table: what builds it, the annotations of its fields, and their values."""

    kind: type
    build: Callable[..., Any]
    fields: dict[str, Any]
    required: frozenset[str]
    arguments: Arguments


TABLE: dict[str, Entry] = {}


def register(kind: type[C], arguments: Arguments | None = None) -> type[C]:
    """Let ``save`` and ``load`` know a class of your own; serves as a decorator.

    The annotations of its constructor say what each argument may be: a number, text, a tensor,
    None, a sequence of these, an object of a class in the table. The constructor of a network
    must run on the meta device, and the tensors that it keeps be parameters or buffers.

    Args:
        kind: the class: a network, a process, a clock, or a part of one.
        arguments: gives the arguments that rebuild an object; by default the fields of a
            dataclass, or else ``config``, which every ``Network`` has.

    Raises:
        ValueError: another class of this name is in the table.
        NameError: an annotation that is not defined in the module of the class.

    >>> from sde_gen.schedules import Schedule
    >>> @register
    ... @dataclasses.dataclass(frozen=True)
    ... class Doubling(Schedule):
    ...     T: float = 1.0
    ...
    ...     def beta(self, t):
    ...         return 2.0**t
    >>> TABLE["Doubling"].fields
    {'T': <class 'float'>}
    """
    entry = TABLE.get(kind.__name__)
    # A cell of a notebook that is run again defines its class again.
    if entry is not None and place(entry.kind) != place(kind):
        raise ValueError(f"{kind.__name__} is in the table already: {place(entry.kind)}")
    _add(kind, arguments or _given)
    return kind


def _add(
    kind: type, arguments: Arguments, build: Callable[..., Any] | None = None, all_of: bool = False
) -> None:
    """``all_of``: none of the arguments may be missing, whatever its default."""
    hints = get_type_hints(build or kind.__init__)  # type: ignore[misc]
    parameters = inspect.signature(build or kind).parameters
    fields = {name: hints.get(name) for name in parameters}
    required = frozenset(n for n, p in parameters.items() if all_of or p.default is p.empty)
    TABLE[kind.__name__] = Entry(kind, build or kind, fields, required, arguments)


def known(value: object) -> Entry | None:
    """The entry of exactly the class of a value."""
    entry = TABLE.get(type(value).__name__)
    return entry if entry is not None and entry.kind is type(value) else None


def place(kind: type) -> str:
    """Where a class is defined, as one writes it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _given(value: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    found: Mapping[str, Any] | None = getattr(value, "config", None)
    if found is None:
        raise TypeError(f"a {type(value).__name__} has no config: register it with arguments=...")
    return found


def _named(*names: str) -> Arguments:
    return lambda value: {name: getattr(value, name) for name in names}


def _score_network(
    net: nn.Module,
    sde: KernelSDE,
    prediction: Prediction,
    facts: Facts,
    tuned: Tuned | None,
) -> ScoreNetwork:
    """A ``ScoreNetwork`` and what it knows, all of one shape."""
    if facts.shape is not None and min(facts.shape, default=0) < 1:
        raise ValueError(f"facts.shape is {facts.shape}")
    model = ScoreNetwork(net, sde, prediction, facts)
    model.tuned = tuned
    n = None if model.shape is None else math.prod(model.shape)
    if facts.moments is not None:
        _check_moments(facts.moments, n, "facts.moments")
    for i, choice in enumerate(() if tuned is None else tuned.choices):
        _check_moments(choice.solver.reference, n, f"tuned.choices[{i}].solver.reference")
    return model


def _check_moments(known: Moments, n: int | None, name: str) -> None:
    """Raise ValueError unless these are numbers, and of data of n coordinates."""
    values, mean, basis = known.values, known.mean, known.basis
    parts = [t for t in (values, mean, basis) if t is not None]
    if any(t.dtype not in (torch.float32, torch.float64) for t in parts):
        raise ValueError(f"{name} must be float32 or float64")
    sizes = {n} if mean is None else {n, mean.numel()}
    if basis is not None or len(values) != 1:
        sizes.add(len(values if basis is None else basis))
    if len(sizes - {None}) > 1:
        raise ValueError(f"the parts of {name} are of {sizes - {None}} coordinates")


for _kind in (
    *(networks.MLP, networks.PrincipalMLP, networks.UNet, networks.DiT),
    networks.Autoencoder,
    *(sdes.EDM, sdes.VE, sdes.VP, sdes.SubVP, sdes.Wiener, sdes.OrnsteinUhlenbeck),
    *(sdes.RectifiedFlow, sdes.CriticallyDamped, sdes.MatrixOrnsteinUhlenbeck),
    *(schedules.Cosine, schedules.Geometric, schedules.Linear, schedules.Power),
    *(schedules.Quadratic, schedules.Sigmoid, schedules.Tabulated),
    *(Units, Moments, Choice),
):
    _add(_kind, _given)
_add(networks.Pair, _named("encoder", "decoder", "shape", "latent", "std", "levels"))
_add(Facts, _given, all_of=True)
_add(Tuned, _named("choices", "data_std", "end", "weights"))
for _solver in (Exponential, Leap):
    _add(_solver, lambda s: {"order": s.nodes, **_named("reference", "corrector", "weights")(s)})
_add(Polynomial, _named("variable"))
_add(Midpoint, _named())
_add(Spectral, _named("variance", "dimensions", "ridge", "power"))
_add(ScoreNetwork, _named(*inspect.signature(_score_network).parameters), _score_network)
