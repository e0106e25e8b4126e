"""What tests of training share: the weights of a model, and something that happens at a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sde_gen import Streams


def weights(module: nn.Module) -> Tensor:
    """All parameters, in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def at(step: int, act: Callable[[], object]) -> Callable[[Tensor, Streams], Tensor]:
    """A transform that does something in the given step (0, 1, ...), once."""
    left = [step + 1]  # the check of the data makes one call

    def transform(x: Tensor, noise: Streams) -> Tensor:
        left[0] -= 1
        if left[0] == -1:
            act()
        return x

    return transform
