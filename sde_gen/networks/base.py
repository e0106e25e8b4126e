"""What every network of this library takes, gives and refuses.

A network is a function ``F = net(x, c, y, **context)`` of a state, of how noisy that state is, of
a label and of conditions by name (``networks.context``). It knows nothing of the SDE: the noise
level enters as ``c = 1/4 log(sigma / alpha)`` (Karras et al. 2022, table 1), which is about -2.5
to 1.2 for the usual processes. Thus one trained network serves every linear SDE.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moments import handed
from ..ops import as_labels, check_count, check_tensor, shown
from .context import Sizes, nothing, rows_of, shapes_of


def sizes(values: Sequence[int], name: str) -> list[int]:
    """Whole numbers >= 1 as a list; raises TypeError for one number, (2,) meant as 2."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"{name} must be sizes, such as (2,) or (1, 8, 8); got {shown(values)}")
    return [check_count(size, f"each of {name}") for size in values]


class Network(nn.Module, ABC):
    """A function (x, c, y, **context) -> F of a state (B, *shape): a tensor of the same shape.

    Attributes:
        shape: the shape of one sample, without the batch.
        classes: how many labels there are, or None where it takes none.
        context: the shapes of the conditions that it takes, by name.
        config: the arguments that rebuild it, ``type(net)(**net.config)``; JSON can hold them.

    A subclass defines ``compute(x, c, y)``, with ``**context`` where it takes conditions, which
    sees checked input.

    >>> isinstance(sg.networks.MLP((2,)), sg.networks.Network)
    True
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int | None,
        config: Mapping[str, Any],
        context: Sizes | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(sizes(shape, "shape"))
        if not self.shape:
            raise ValueError("shape must hold one or more sizes, such as (1, 8, 8); got none")
        self.classes = None if classes is None else check_count(classes, "classes")
        self.context = shapes_of(context)
        self.config = dict(config)

    @abstractmethod
    def compute(self, x: Tensor, c: Tensor, y: Tensor | None, **context: Tensor) -> Tensor:
        """F of checked input, in the dtype of the parameters.

        Args:
            x: (B, *shape), in the dtype of the parameters.
            c: (1,) or (B,), in float32 or finer.
            y: (B,) int64 in [-1, classes), or None.
            context: (B, *shape) of each condition, in the dtype of the parameters; NaN where it
                is not there.
        """

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        y: Tensor | Sequence[int] | int | None = None,
        **context: Tensor | None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: states (B, *shape), of any floating dtype; the result has the same.
            c: the noise level, 1/4 log(sigma / alpha): () for the whole batch, or (B,).
            y: labels in [0, classes), an integer for the whole batch or (B,): a tensor, array or
                list; -1 means 'no label', as does None.
            context: each condition by its name, (B, *shape) or (*shape) for the whole batch; NaN
                means that it is not there, as does None.

        Raises:
            ValueError: x is not (B, *shape), c is neither () nor (B,), y is not (B,) or is given
                to a network without classes, or a label lies outside [-1, classes); a condition
                that the network does not take, or of another shape.
            TypeError: x or a condition is not floating, or y are no integers.
        """
        self._check_state(x, c)
        labels = None if y is None else self._labels(y, x)
        dtype = next(self.parameters()).dtype
        c = handed(c.to(torch.promote_types(dtype, torch.float32)), x.device).reshape(-1)
        rows = self._conditions(context, x, dtype)
        return self.compute(x.to(dtype), c, labels, **rows).to(x.dtype)

    def _conditions(
        self, given: Mapping[str, Tensor | None], x: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Every condition that the network takes, one row a sample."""
        if unknown := sorted(given.keys() - self.context.keys()):
            takes = f"takes {', '.join(self.context)}" if self.context else "has no context="
            raise ValueError(f"{unknown[0]!r} was given to a network that {takes}")
        rows = {}
        for name, shape in self.context.items():
            value = given.get(name)
            row = (
                nothing(len(x), shape, x) if value is None else rows_of(name, value, shape, len(x))
            )
            rows[name] = handed(row, x.device).to(dtype)
        return rows

    def _check_state(self, x: Tensor, c: Tensor) -> None:
        check_tensor(x, "x")
        check_tensor(c, "c")
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating, got {x.dtype}: scale integer data to [-1, 1] first"
            )
        if tuple(x.shape[1:]) != self.shape:
            expected = ", ".join(str(size) for size in ("B", *self.shape))
            raise ValueError(f"x must be ({expected}), got {tuple(x.shape)}")
        if c.ndim > 1 or (c.ndim == 1 and c.shape[0] != x.shape[0]):  # len() ends an export
            raise ValueError(
                f"c must be () or ({len(x)},), got {tuple(c.shape)} for x {tuple(x.shape)}"
            )

    def _labels(self, given: Tensor | Sequence[int] | int, x: Tensor) -> Tensor:
        if self.classes is None:
            raise ValueError("labels y were given to a network without classes: pass classes=...")
        y = as_labels(given)
        if y.ndim and len(y) != len(x):
            raise ValueError(f"labels y must be ({len(x)},), got {tuple(y.shape)}")
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range(y)
        return y.to(x.device).expand(len(x))

    def _check_range(self, y: Tensor) -> None:
        assert self.classes is not None
        try:
            wrong = bool(((y < -1) | (y >= self.classes)).any())
        except RuntimeError:  # vmap hides the values of what it maps over
            return
        if wrong:
            low, high = y.aminmax()
            raise ValueError(
                f"labels y must lie in [0, {self.classes}), or be -1 for 'no label'; "
                f"got {low.item()} to {high.item()}"
            )
