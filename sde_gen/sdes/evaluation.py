"""Reading a score: one call tells its value, the denoised state, and what else a network says.

An ``Evaluation`` is what one call of a score gives; whoever samples, weighs or denoises reads it,
and nothing is called twice. A loss calls the score itself. The difference is dropout: a network
in training mode has it, and what a sampler or a likelihood gets would depend on the global
generator and have the wrong marginals. So networks rest in evaluation mode while a score is
evaluated. That this is so stands in a variable of the thread, and reaches a network through sums,
guidance and functions of the user's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> grad_x log p_t(x): x (B, *D), t () or (B,), result (B, *D)."""

_thread = threading.local()
_lock = threading.Lock()
_resting: dict[nn.Module, int] = {}
"""How many calls hold a part of a network in evaluation mode that was in training."""


class Evaluation:
    """What one call of a score at (x, t) tells.

    Attributes:
        score: grad_x log p_t(x), (B, *state).
        head: what a network returned beside the reading of its score, or None.
        pull: u (B, *D) -> J^T u, J = dD / dx the Jacobian of the denoised state, by one backward
            pass each; None unless the score was asked for it (``Score.linearise``).

    >>> sg.Gaussian(sg.VP(), torch.zeros(2)).evaluate(torch.ones(8, 2), 0.5).denoised.shape
    torch.Size([8, 2])
    """

    __slots__ = ("_denoised", "head", "pull", "score")

    def __init__(
        self,
        score: Tensor,
        denoised: Tensor | Callable[[], Tensor],
        head: Tensor | None = None,
        pull: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.score, self.head, self.pull = score, head, pull
        self._denoised = denoised

    @property
    def denoised(self) -> Tensor:
        """D = E[x_0 | x_t], (B, *D); worked out when it is first asked for."""
        if not isinstance(self._denoised, Tensor):
            self._denoised = self._denoised()
        return self._denoised


def evaluate(
    score: ScoreFunction,
    x: Tensor,
    t: Tensor,
    tweedie: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Evaluation:
    """Evaluate any score function at (x, t), without dropout.

    Args:
        score: a ``Score``, or any function (x, t).
        x, t: state (B, *D) and time () or (B,).
        tweedie: (x, t, s) -> the denoised state, for a function that does not tell it.

    Raises:
        TypeError: a result that is no tensor of real numbers.
        ValueError: a result of another shape than the state.

    >>> score = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> x, t = torch.ones(8, 2), torch.full((8,), 0.5)
    >>> sg.sdes.evaluate(score, x, t, sg.VP().tweedie).score.shape
    torch.Size([8, 2])
    """
    # Of the class: what wraps a score (torch.compile) hands on its methods, but is to be called.
    own = getattr(type(score), "evaluate", None)
    if own is not None:
        found: Evaluation = own(score, x, t)
        check_result(found.score, x, score)
        return found
    with resting():
        s = read(score, x, t)
    return Evaluation(s, lambda: tweedie(x, t, s))


@contextmanager
def resting() -> Iterator[None]:
    """Networks that this thread calls are in evaluation mode meanwhile.

    >>> with sg.sdes.resting():
    ...     print(sg.sdes.evaluating())
    True
    """
    if torch.compiler.is_compiling():  # what is compiled is in the mode that it was traced in
        yield
        return
    before = evaluating()
    _thread.evaluating = True
    try:
        yield
    finally:
        _thread.evaluating = before


def read(score: ScoreFunction, x: Tensor, t: Tensor, **context: Any) -> Tensor:
    """s(x, t) in the shape and dtype of x.

    Raises:
        TypeError, ValueError: as ``check_result``.

    >>> sg.sdes.read(lambda x, t: -x, torch.ones(8, 2), torch.tensor(0.5)).shape
    torch.Size([8, 2])
    """
    with at_rest(score) if isinstance(score, nn.Module) and evaluating() else nullcontext():
        s = score(x, t, **context)
    check_result(s, x, score)
    return s.to(x.dtype)


def check_result(s: object, x: Tensor, score: object) -> None:
    """Raise unless ``s`` is what a score must return for the state x.

    Raises:
        TypeError: no tensor of real numbers.
        ValueError: another shape, which would be broadcast in silence.
    """
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


def evaluating() -> bool:
    """Whether this thread reads a score to evaluate it, and not to train it.

    >>> sg.sdes.evaluating()
    False
    """
    return not torch.compiler.is_compiling() and getattr(_thread, "evaluating", False)


@contextmanager
def at_rest(net: nn.Module) -> Iterator[None]:
    """A network in evaluation mode, until the last of the threads that want it so is done.

    One in evaluation mode is left as it is, a part of it that is in training included.

    >>> net = torch.nn.Dropout().train()
    >>> with sg.sdes.at_rest(net):
    ...     print(net.training)
    False
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
