"""The diffusion transformer (Peebles & Xie 2023): patches as tokens, AdaLN-Zero.

The state is cut into patches, each a token; blocks of attention and dense layers follow, whose
norms are shifted, scaled and gated by the embedding of noise level, label and vectors. All gates
start at zero: every block starts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_count, check_kind, check_number
from .base import Network, sizes
from .blocks import attend, cut, joined, zeroed
from .context import Conditions, Sizes, listed
from .embeddings import Embedding


class Layer(nn.Module):
    """h + g_1 attention(norm(h)), then + g_2 dense(norm(h)), norms and gates by the embedding."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.linear_1 = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, e: Tensor, there: Tensor | None) -> Tensor:
        """Tokens (B, N, width), embedding (B or 1, 1, width), keys there (B, 1, 1, N) or None."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(e).chunk(6, 2)
        u = torch.addcmul(shift_1, self.norm(h), 1 + scale_1)
        q, k, v = self.qkv(u).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + gate_1 * self.out(attend(q, k, v, there).transpose(1, 2).flatten(2))
        u = torch.addcmul(shift_2, self.norm(h), 1 + scale_2)
        u = self.dropout(F.gelu(self.linear_1(u), approximate="tanh"))
        return h + gate_2 * cast(Tensor, self.linear_2(u))


class DiT(Network):
    """A transformer of patches: x (B, C, *S), c () or (B,), y (B,) or None -> (B, C, *S).

    Of its conditions, vectors (n,) join the embedding, images (C', *S) the channels of the input,
    and vectors of sequences (None, n) are further tokens (the paper's in-context conditioning).
    The last layer starts at zero, hence so does the network.

    Args:
        shape: (C, *S) with any number of spatial sizes, each a multiple of ``patch``.
        patch: the side of a patch.
        width: features of a token. depth: layers. heads: attention heads; they divide the width.
        classes: number of labels, or None.
        dropout: probability of dropout inside the dense part of each layer.
        embedding: "sinusoidal" or "fourier".
        head: return a second output behind the first, (B, 2 C, *S).
        context: the shapes of the conditions that it takes by name.

    Raises:
        ValueError: sizes that do not fit together, saying which.

    >>> sg.networks.DiT((1, 8, 8), 2, 32, 1, 4)(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        classes: int | None = None,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        head: bool = False,
        context: Sizes | None = None,
    ) -> None:
        check_kind(head, bool, "head", "True or False")
        config = {
            "shape": sizes(shape, "shape"),
            "patch": (patch := check_count(patch, "patch")),
            "width": (width := check_count(width, "width")),
            "depth": (depth := check_count(depth, "depth")),
            "heads": (heads := check_count(heads, "heads")),
            "classes": classes,
            "dropout": (dropout := check_number(dropout, "dropout", least=0, most=1)),
            "embedding": embedding,
            "head": head,
            "context": listed(context),
        }
        super().__init__(shape, classes, config, context)
        channels, *places = self.shape
        if not places or any(size % patch for size in places):
            raise ValueError(f"each of {self.shape[1:]} must be a multiple of the patch, {patch}")
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.patch, self.grid = patch, [size // patch for size in places]
        size, out = patch ** len(places), channels * (1 + head)
        self.embedding = Embedding(embedding, width, width, self.classes)
        self.conditions = Conditions(self.context, width, places)
        self.input = nn.Linear((channels + self.conditions.channels) * size, width)
        self.position = nn.Parameter(torch.empty(math.prod(self.grid), width))
        nn.init.normal_(tensor=self.position, std=0.02)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.output = zeroed(nn.Linear(width, out * size))

    def compute(self, x: Tensor, c: Tensor, y: Tensor | None, **context: Tensor) -> Tensor:
        """(B, *shape) -> (B, *shape), or with a head (B, 2 C, *S)."""
        e = F.silu(self.conditions.embedded(self.embedding(c, y), context)).unsqueeze(1)
        h = cut(self.conditions.beside(x, context), self.patch)
        h = self.input(h.flatten(2).mT) + self.position
        n, there = h.shape[1], None
        if (sequence := self.conditions.sequence(context)) is not None:
            tokens, known = sequence
            h = torch.cat([h, tokens], 1)
            there = torch.cat([known.new_ones(len(x), n), known], 1)[:, None, None]
        for layer in self.layers:
            h = layer(h, e, there)
        shift, scale = self.modulation(e).chunk(2, 2)
        h = self.output(torch.addcmul(shift, self.norm(h[:, :n]), 1 + scale))
        return joined(h.mT.unflatten(2, self.grid), self.patch)
