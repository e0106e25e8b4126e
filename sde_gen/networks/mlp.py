"""A residual network of dense layers, for points, spectra and small images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_count, check_kind, check_number
from .base import Network, sizes
from .context import Conditions, Sizes, listed
from .embeddings import Embedding


class Layer(nn.Module):
    """h + W_2 silu(W_1 (scale * norm(h) + shift)), scale and shift linear in the embedding."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear_1 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """(B, width), (B, width) -> (B, width)."""
        scale, shift = self.modulation(e).chunk(2, dim=1)
        u = torch.addcmul(shift, self.norm(h), 1 + scale)
        return h + cast(Tensor, self.linear_2(self.dropout(F.silu(self.linear_1(u)))))


class MLP(Network):
    """A residual MLP: x (B, *shape), c () or (B,), y (B,) or None -> (B, *shape).

    It flattens any shape, of the state and of its conditions. The last layer starts at zero, hence
    so does the network.

    Args:
        shape: the shape of one sample.
        width: hidden features.
        depth: residual layers, each of two dense layers.
        classes: number of labels that condition it, or None.
        dropout: probability of dropout inside each residual layer.
        embedding: "sinusoidal" or "fourier".
        outputs: None, or the length of the vector (B, outputs) to return in place of a state:
            the logits of a classifier of noisy data, for instance.
        head: return a second output behind the first, (B, 2 C, ...) for a shape (C, ...): what
            the variances of a chain are learned by.
        context: the shapes of the conditions that it takes by name, ``{"theta": (3,)}``.

    Raises:
        ValueError: ``outputs`` with a ``head``; a width, depth or output length below 1, or an
            unknown embedding.

    >>> sg.networks.MLP((2,), 32, 2, classes=3)(torch.zeros(8, 2), torch.zeros(8)).shape
    torch.Size([8, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        depth: int = 3,
        classes: int | None = None,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        outputs: int | None = None,
        head: bool = False,
        context: Sizes | None = None,
    ) -> None:
        width, depth = check_count(width, "width"), check_count(depth, "depth")
        outputs = None if outputs is None else check_count(outputs, "outputs")
        dropout = check_number(dropout, "dropout", least=0, most=1)
        check_kind(head, bool, "head", "True or False")
        config = {
            "shape": sizes(shape, "shape"),
            "width": width,
            "depth": depth,
            "classes": classes,
            "dropout": dropout,
            "embedding": embedding,
            "outputs": outputs,
            "head": head,
            "context": listed(context),
        }
        if head and outputs is not None:
            raise ValueError("a head goes with a state, not with a vector of outputs")
        super().__init__(shape, classes, config, context)
        size = math.prod(self.shape)
        self.embedding = Embedding(embedding, width, width, self.classes)
        self.conditions = Conditions(self.context, width)
        self.input = nn.Linear(size, width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        first, *rest = self.shape
        self.result = (first * (1 + head), *rest) if outputs is None else (outputs,)
        self.output = nn.Linear(width, math.prod(self.result))
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def compute(self, x: Tensor, c: Tensor, y: Tensor | None, **context: Tensor) -> Tensor:
        """(B, *shape) -> (B, *shape), or (B, outputs)."""
        e = F.silu(self.conditions.embedded(self.embedding(c, y), context))
        h = self.input(x.flatten(1))
        for layer in self.layers:
            h = layer(h, e)
        h = self.output(F.silu(self.norm(h)))
        return cast(Tensor, h).unflatten(1, self.result)
