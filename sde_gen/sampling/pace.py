"""At what size and in which layout a network is fastest: a few timed calls, made once.

A batch that no longer fits into the caches, or whose tensors the allocator fetches anew from the
system at each call, is slower a sample than a part of it; convolutions may be faster with
channels last; and a compiler may help. Which of it pays is a matter of the machine. It is the
same mathematics, but for rounding: so what was found is kept with the model, is saved with it,
and is found by one process for all.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..many import cutting, place, shared
from ..moments import fused
from ..ops import check_count, check_kind
from ..scores import Score, ScoreNetwork, Sum

FIRST, LARGEST = 4, 2**14
"""Samples of the smallest and of the largest call that is timed."""
LONG = {"cpu": 0.2}
"""Seconds of a call that is no longer doubled; elsewhere 0.05."""
SLOWER, NEAR, GAIN, TURNS = 1.3, 1.15, 0.95, 2
"""Nor is one that is so much slower a sample than the best. What is at most so much slower is
timed again, in so many turns; a layout must need at most so much of the time of the plain one."""
CALLS, WORK = 1000, {"cpu": 3e12}
"""``sample`` tries nothing for fewer evaluations of one sample, nor for fewer products of weights
and places: some ten seconds of a CPU core. Elsewhere the latter is 1e14."""
FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a call, or a compiler, may fail with."""


@dataclass(frozen=True)
class Pace:
    """How the network of a model is called when it samples; by default with all samples at once
    and as it was built.

    Args:
        chunk: samples at once at most, None for all; the parts of a batch are made equal.
        channels_last: images with their channels last in memory.
        compiled: by ``torch.compile``: the first call takes a minute, and a C++ compiler.
        device: the kind of device that this serves, "cpu" or "cuda", and not used on others;
            None serves any.

    >>> sg.sampling.Pace(chunk=256).chunk
    256
    """

    chunk: int | None = None
    channels_last: bool = False
    compiled: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            object.__setattr__(self, "chunk", check_count(self.chunk, "chunk"))
        check_kind(self.channels_last, bool, "channels_last", "True or False")
        check_kind(self.compiled, bool, "compiled", "True or False")
        check_kind(self.device, (str, type(None)), "device", "a kind of device, such as 'cpu'")

    def __str__(self) -> str:
        parts = [
            "all at once" if self.chunk is None else f"{self.chunk} at once",
            *(["channels last"] if self.channels_last else []),
            *(["compiled"] if self.compiled else []),
        ]
        return ", ".join(parts) + ("" if self.device is None else f" on {self.device}")

    def part(self, n: int) -> int:
        """The samples of each of the equal parts that n are cut into; the last may have fewer.

        >>> Pace(64).part(65), Pace(64).part(64), Pace().part(65)
        (33, 64, 65)
        """
        return n if self.chunk is None else -(-n // -(-n // self.chunk))

    def lay(self, x: Tensor) -> Tensor:
        """A state as the network gets it; what follows from it keeps its strides."""
        last = self.channels_last and x.ndim == 4
        return x.to(memory_format=torch.channels_last) if last else x


def timed(model: Score, compiled: bool = False) -> Pace:
    """The pace at which the network in a model is fastest on this machine, in a few seconds.

    ``model.pace = timed(model)`` is what ``sample`` does by itself where there is work enough. Of
    several processes of a launcher the first finds it for all: each must call this.

    Args:
        model: a ``ScoreNetwork``, or a score that holds one.
        compiled: try the compiler too, a minute more.

    Raises:
        TypeError: there is no network in the model, or its shape is not known.

    >>> model = sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1), sg.VP(), facts=sg.Facts((2,)))
    >>> model.pace = sg.sampling.timed(model)
    """
    check_kind(compiled, bool, "compiled", "True or False")
    network = network_in(model)
    if network is None or network.shape is None:
        raise TypeError(f"model must be a ScoreNetwork of known shape, got {type(model).__name__}")
    return _agreed(network, lambda: _fastest(Trial(network), compiled))


def settled(network: ScoreNetwork, n: int, steps: int, keep: Callable[[Pace], object]) -> Pace:
    """The pace of n samples for all processes of a launcher, each of which must call this: that
    which the network of the first one has, or what is found there where it pays.

    Args:
        keep: stores what is found where the next process will look for it, in the first process;
            if that fails with an OSError, nothing is changed.

    >>> model = sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1), sg.VP(), facts=sg.Facts((2,)))
    >>> pace = sg.sampling.settled(model, 8, 5, lambda pace: None)
    """

    def find() -> Pace:
        if network.pace is not None or not worth_it(network, n, steps):
            return network.pace or Pace()
        found = _fastest(Trial(network), False)
        try:
            keep(found)
        except OSError:
            return Pace()
        return found

    return _agreed(network, find)


def _agreed(network: ScoreNetwork, find: Callable[[], Pace]) -> Pace:
    """What the first process finds."""

    def work(first: int, count: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = find()
        return torch.tensor([[found.chunk or 0, found.channels_last, found.compiled]])

    chunk, last, compiled = shared(work, 1, 1)[0].tolist()
    return Pace(chunk or None, bool(last), bool(compiled), network.device.type)


def pace_for(model: Score, n: int, steps: int) -> Pace:
    """The pace of n samples: that of the network, which is found now where it pays.

    Not where work is cut among processes: each would find its own, and round by it.
    """
    network = network_in(model)
    if network is None:
        return Pace()
    known = network.pace
    if known is not None and known.device in (None, network.device.type):
        return known
    alone = place()[1] == 1 and not cutting()
    if not (alone and model.batch in (None, n) and worth_it(network, n, steps)):
        return Pace()
    network.pace = timed(network)
    return network.pace


def worth_it(network: ScoreNetwork, n: int, steps: int) -> bool:
    """Whether n samples of so many calls are worth the seconds that ``timed`` takes."""
    weights = sum(p.numel() for p in network.parameters())
    work = n * steps * weights * math.prod((network.shape or ())[1:])
    return n * steps >= CALLS and work >= WORK.get(network.device.type, 1e14)


def network_in(score: object) -> ScoreNetwork | None:
    """The first network in a score: itself, in what it wraps, or in a term of a sum."""
    if isinstance(score, ScoreNetwork):
        return score
    if not isinstance(score, Score):
        return None
    inner = [s for s, _ in score.terms] if isinstance(score, Sum) else [*vars(score).values()]
    if isinstance(score, nn.Module):
        inner += score.children()
    return next((found for s in inner if (found := network_in(s)) is not None), None)


@contextmanager
def kept(model: Score, pace: Pace) -> Iterator[None]:
    """The network in a model and a step's sums are compiled in here, where the pace says so."""
    network = network_in(model) if pace.compiled else None
    if network is None or not isinstance(network.net, nn.Module):
        yield
        return
    net = network.net
    before = net._compiled_call_impl
    if net not in _compiled:
        net.compile()
        _compiled[net] = net._compiled_call_impl
    net._compiled_call_impl = _compiled[net]
    try:
        with fused():
            yield
    finally:
        net._compiled_call_impl = before


_compiled: WeakKeyDictionary[nn.Module, Callable[..., object] | None] = WeakKeyDictionary()
"""The compiled call of each network, so that another run does not compile it again."""


def stand_in(model: ScoreNetwork, n: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a network can be timed on: a state of n samples, their time, and conditions."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)  # the user's own stays where it is
    shape = model.sde.state_shape(model.inside or ())
    x = torch.randn(n, *shape, device=device, generator=generator)
    conditions = model.takes.items()
    context = {name: x.new_zeros(n, *(k or 64 for k in sizes)) for name, sizes in conditions}
    if model.classes is not None:
        context["y"] = torch.arange(n, device=device) % model.classes
    return x, torch.tensor(0.5 * model.sde.T, dtype=torch.float64), context


def clock(device: torch.device) -> float:
    """Seconds, when all that the device was given is done. On a CPU the time of this thread: what
    others do to the machine is not the network's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.thread_time() if device.type == "cpu" else time.perf_counter()


class Trial:
    """Times calls of a network."""

    def __init__(self, model: ScoreNetwork) -> None:
        self.model, self.device = model, model.device
        self.has_images = any(p.ndim == 4 for p in model.parameters())

    @torch.no_grad()
    def seconds(self, pace: Pace, repeats: int) -> float:
        """The least seconds a sample; infinity where it fails."""
        n = pace.chunk or 1
        try:
            x, t, context = stand_in(self.model, n)
            x, spent = pace.lay(x), []
            with kept(self.model, pace):
                for _ in range(repeats):
                    start = clock(self.device)
                    self.model.evaluate(x, t, **context)
                    spent.append(clock(self.device) - start)
        except FAULTS:
            return math.inf
        return min(spent) / n


def _fastest(trial: Trial, compiled: bool) -> Pace:
    """The sizes that come near the best, by doubling; then these and their layouts in turns, so
    that what else the machine does meets all of them."""
    device = trial.device.type
    scanned: dict[Pace, float] = {}
    size, long = FIRST, LONG.get(device, 0.05)
    trial.seconds(Pace(size), 1)
    while size <= LARGEST:
        seconds = scanned[Pace(size, device=device)] = trial.seconds(Pace(size, device=device), 2)
        if seconds > SLOWER * min(scanned.values()) or seconds * size > long:
            break
        size *= 2
    least = min(scanned.values())
    if least == math.inf:
        return Pace(device=device)
    near = [pace for pace, seconds in scanned.items() if seconds <= NEAR * least][-3:]
    last = [replace(pace, channels_last=True) for pace in near if trial.has_images]
    found = dict.fromkeys([*near, *last], math.inf)
    for _ in range(TURNS):
        found = {pace: min(s, trial.seconds(pace, 1)) for pace, s in found.items()}
    best = min(near, key=found.__getitem__)
    other = min(last, key=found.__getitem__, default=best)
    best = other if found[other] < GAIN * found[best] else best
    if compiled:
        built = replace(best, compiled=True)
        best = built if trial.seconds(built, 1 + TURNS) < GAIN * found[best] else best
    return best
