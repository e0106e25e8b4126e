"""How a network computes while it trains: what is the same mathematics at another speed.

bfloat16 by autocast around the network alone (weights, loss, optimiser and averages stay in
float32), convolutions with channels last, and ``torch.compile``. Which of them pays depends on
the machine and the network, so a new run tries them for a few steps on a copy, and keeps what it
chose to its end: a run that is taken up again computes as it began.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..ops import check_kind
from ..sampling.pace import FAULTS, clock, stand_in
from ..scores import ScoreNetwork

SHORT = {"cpu": 0.02}
"""Seconds of a step below which nothing is tried; elsewhere 0.005."""
FEW, LONG = 200, 900.0
"""Nor is it for a run of fewer steps; and nothing is compiled for one of fewer seconds."""
GAIN = 0.95
"""What is taken needs at most this part of the time."""


@dataclass(frozen=True)
class Layout:
    """How the network computes; by default as it was built.

    Args:
        half: in bfloat16, under ``torch.autocast``, where it pays off to (matrix products).
        channels_last: images with their channels last in memory.
        compiled: by ``torch.compile``, which takes a minute and a C++ compiler.

    >>> sg.Recipe(steps=100, layout=sg.training.Layout(half=True)).layout
    Layout(half=True, channels_last=False, compiled=False)
    """

    half: bool = False
    channels_last: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_kind(value, bool, name, "True or False")

    def __str__(self) -> str:
        names = {"half": "bfloat16", "channels_last": "channels last", "compiled": "compiled"}
        return ", ".join(names[n] for n, taken in asdict(self).items() if taken) or "plain"


def network_of(model: nn.Module) -> nn.Module:
    """What is laid out: the network of a score, another model itself."""
    return model.net if isinstance(model, ScoreNetwork) else model


def _halved(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    device = next(self.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        return type(self).forward(self, *args, **kwargs)


@contextmanager
def laid_out(layout: Layout, model: nn.Module, *averages: nn.Module) -> Iterator[None]:
    """The network computes in this layout in here, and is as it was afterwards.

    Names of weights stay the same, and copies compute like the original.
    """
    net, formats = network_of(model), torch.channels_last if layout.channels_last else None
    if layout.half:
        net.forward = MethodType(_halved, net)
    if layout.compiled:
        net.compile()
    try:
        for module in (model, *averages) if formats else ():
            module.to(memory_format=formats)  # type: ignore[call-overload]
        yield
    finally:
        for module in (model, *averages) if formats else ():
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if layout.half:
            del net.forward
        if layout.compiled:
            net._compiled_call_impl = None


def for_parts(layout: Layout) -> Layout:
    """What of a layout serves a model that is spread over processes: its precision."""
    return Layout(half=layout.half)


def choose(
    model: nn.Module,
    batch: int,
    steps_for: Callable[[float], float],
    agree: Callable[[float], float],
) -> tuple[Layout, str]:
    """The fastest layout for a run, and what to say of it (nothing where nothing was tried).

    Args:
        model: a ``ScoreNetwork`` of known shape; a copy of it is tried. Others stay plain.
        batch: samples that the network gets at once.
        steps_for: seconds a step -> how many steps the run has.
        agree: a number of each process -> their mean.
    """
    if not (isinstance(model, ScoreNetwork) and model.shape and _is_single(model)):
        return Layout(), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _try_all(_Trial(model, batch, agree), steps_for)


def _try_all(trial: _Trial, steps_for: Callable[[float], float]) -> tuple[Layout, str]:
    taken = Layout()
    short = SHORT.get(trial.device.type, 0.005)
    if trial.seconds(taken, 1) < short / 4:  # it also warms up
        return taken, ""
    least = plain = trial.seconds(taken, 2)
    steps = steps_for(plain) if plain < math.inf else FEW
    if plain < short or steps < FEW:
        return taken, ""
    tried = [_told(taken, plain)]
    options = [{"half": True}]
    if trial.has_images:
        options.append({"channels_last": True})
    if LONG < steps * plain < math.inf:
        options.append({"compiled": True})
    for option in options:
        layout = replace(taken, **option)
        seconds = trial.seconds(layout, 3)
        tried.append(_told(layout, seconds))
        if seconds < GAIN * least:
            taken, least = layout, seconds
    note = f"the network computes {taken}; a step of it takes {', '.join(tried)}"
    return taken, note if least < math.inf else ""


def _told(layout: Layout, seconds: float) -> str:
    return f"{seconds:.2g} s ({layout})" if seconds < math.inf else f"no time ({layout} fails)"


class _Trial:
    """Times steps of a copy of a model, on noise."""

    def __init__(self, model: ScoreNetwork, batch: int, agree: Callable[[float], float]) -> None:
        self.model, self.agree, self.device = copy.deepcopy(model).train(), agree, model.device
        self.has_images = any(p.ndim == 4 for p in self.model.parameters())
        self.x, t, self.context = stand_in(self.model, batch)
        self.t = t.expand(batch)

    def seconds(self, layout: Layout, repeats: int) -> float:
        """The least time of a step, the mean over the processes; infinity where it fails."""
        spent = [math.inf]
        try:
            with laid_out(layout, self.model):
                if layout != Layout():
                    self._step()
                spent += [self._step() for _ in range(repeats)]
        except FAULTS:
            spent = [math.inf]
        return self.agree(min(spent))

    def _step(self) -> float:
        start = clock(self.device)
        s = self.model(self.x, self.t, **self.context)
        s.float().square().mean().backward()
        end = clock(self.device)
        for p in self.model.parameters():
            p.grad = None
        return end - start


def _is_single(model: nn.Module) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters())
