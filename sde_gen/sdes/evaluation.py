"""Reading a score: its output is checked, and networks are in evaluation mode meanwhile.

A network in training mode has dropout: what it is asked for by a sampler, a likelihood or a
denoiser would then depend on the global generator, and the marginals would be wrong. Whoever reads
a score for such a purpose calls ``evaluate``; a loss calls the score itself. Which of the two it
is stands in a variable of the thread, so that it reaches a network through sums, guidance and
functions of the user's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> grad_x log p_t(x): x (B, *D), t () or (B,), result (B, *D)."""

_thread = threading.local()
_lock = threading.Lock()
_resting: dict[nn.Module, int] = {}
"""How many calls hold a part of a network in evaluation mode that was in training."""


def evaluate(score: ScoreFunction, x: Tensor, t: Tensor) -> Tensor:
    """s(x, t) in the shape and dtype of x, without dropout.

    Raises:
        TypeError, ValueError: as ``read``.
    """
    if torch.compiler.is_compiling():  # what is compiled is in the mode that it was traced in
        return read(score, x, t)
    before = evaluating()
    _thread.evaluating = True
    try:
        return read(score, x, t)
    finally:
        _thread.evaluating = before


def read(score: ScoreFunction, x: Tensor, t: Tensor) -> Tensor:
    """s(x, t) in the shape and dtype of x.

    Raises:
        TypeError: a result that is no tensor of real numbers.
        ValueError: a result of another shape, which would be broadcast in silence.
    """
    with at_rest(score) if isinstance(score, nn.Module) and evaluating() else nullcontext():
        s = score(x, t)
    if not isinstance(s, Tensor) or s.is_complex():
        got = s.dtype if isinstance(s, Tensor) else type(s).__name__
        raise TypeError(
            f"the score returned {got} for a state {tuple(x.shape)}, not a real tensor of that"
            f" shape ({_name(score)})"
        )
    if s.shape != x.shape:
        raise ValueError(
            f"the score returned shape {tuple(s.shape)} for a state {tuple(x.shape)}"
            f" ({_name(score)})"
        )
    return s.to(x.dtype)


def evaluating() -> bool:
    """Whether this thread reads a score to evaluate it, and not to train it."""
    return not torch.compiler.is_compiling() and getattr(_thread, "evaluating", False)


@contextmanager
def at_rest(net: nn.Module) -> Iterator[None]:
    """A network in evaluation mode, until the last of the threads that want it so is done.

    One in evaluation mode is left as it is, a part of it that is in training included.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with _lock:
        asked = net.training or net in _resting
        parts = [p for p in net.modules() if p.training or p in _resting] if asked else []
        for part in parts:
            _resting[part] = _resting.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _lock:
            for part in parts:
                _resting[part] -= 1
                if not _resting[part]:
                    del _resting[part]
                    part.training = True


def _name(score: object) -> str:
    return getattr(score, "__name__", type(score).__name__)
