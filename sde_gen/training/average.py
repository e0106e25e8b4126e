"""The average of the weights over a run.

It has a power-law profile (Karras et al. 2024, section 3.1): after step k it keeps
(1 - 1/k)^(gamma + 1) of itself, so it always spans the same part of the run, whatever its length.
"""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from .recipe import power_of_width
from .shards import is_part, like, local, whole

M = TypeVar("M", bound=nn.Module)
HALVES = (torch.float16, torch.bfloat16)


class Average(nn.Module, Generic[M]):
    """``module`` is a copy of the model with the average of its weights, in float32 or finer.

    In half precision an average of k terms stands still once 1/k of a step is below rounding.

    Args:
        model: what is averaged.
        width: relative standard deviation of the profile (``Recipe.ema``).

    Attributes:
        steps: k, how many weights were taken in.
    """

    def __init__(self, model: M, width: float) -> None:
        super().__init__()
        self.module: M = copy.deepcopy(model)
        self._mean: list[Tensor] = list(self.module.parameters())
        self._copied = list(self.module.buffers())
        for value in (*self._mean, *self._copied):
            if value.dtype in HALVES:
                value.data = value.data.float()
        self.steps = 0
        self._power = power_of_width(width) + 1

    def spread(self, model: nn.Module) -> None:
        """Average the parts of a model that was spread over processes; ``module`` waits for
        ``gathered`` on the host."""
        wide = [m.dtype for m in self._mean]
        pairs = zip(model.parameters(), wide, strict=True)
        self._mean = [p.detach().clone().to(dtype) for p, dtype in pairs]
        self.module.to("cpu")

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights after one more step; buffers are copied."""
        self.steps += 1
        weight = 1 - (1 - 1 / self.steps) ** self._power
        pairs = zip(map(local, self._mean), map(local, model.parameters()), strict=True)
        mean, new = zip(*((m, p.to(m.dtype)) for m, p in pairs), strict=True)
        torch._foreach_lerp_(mean, new, weight)
        for kept, value in zip(self._copied, model.buffers(), strict=True):
            kept.copy_(value)

    @torch.no_grad()
    def gathered(self) -> M:
        """``module``, up to date; where the model is spread over processes all must call it."""
        if any(map(is_part, self._mean)):
            for p, mean in zip(self.module.parameters(), self._mean, strict=True):
                p.copy_(whole(mean))
        return self.module

    @torch.no_grad()
    def fill(self) -> None:
        """Take the weights of ``module``, which were set, for the average so far."""
        for p, mean in zip(self.module.parameters(), self._mean, strict=True):
            if is_part(mean):
                mean.copy_(like(p.detach(), mean))

    @torch.no_grad()
    def parts(self) -> list[Tensor]:
        """What is averaged or copied, as far as it lies here, in its own memory."""
        return [*map(local, self._mean), *map(local, self._copied)]
