"""The U-Net of score-based models, for signals, images and volumes.

Residual blocks on a ladder of resolutions, with skip connections from the way down to the way up
(Ronneberger et al. 2015; Ho et al. 2020, appendix B). The rank of the data chooses every
convolution, and the way up enlarges each map to the size of the skip that it meets, so that any
spatial size works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import check_count, check_kind, check_number
from .base import Network, sizes
from .embeddings import Embedding


def convolution(rank: int, n_in: int, n_out: int, size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution over ``rank`` spatial dimensions that keeps the size, up to its stride."""
    kind: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return kind(n_in, n_out, size, stride, size // 2)


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels where the number of channels allows it."""
    most = min(32, max(1, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with its parameters at zero: a residual branch that starts as nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over positions: q, k, v (..., N, d) -> (..., N, d).

    The fused kernels, which win where N is large, can be neither mapped by ``vmap`` without a
    warning nor differentiated twice or forward; for small N this is the formula itself. Where a
    large network needs those, wrap the call in ``torch.nn.attention.sdpa_kernel(MATH)``.
    """
    if q.shape[-2] > 64:
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1) @ v


class Attention(nn.Module):
    """x + W attend(q, k, v) over all positions of x (B, C, *S), after a group norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over all places, (B, C, *places) -> the same."""
        h = self.qkv(self.norm(x).flatten(2).mT)
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).mT.reshape(x.shape)


class Block(nn.Module):
    """Two convolutions, each after norm and SiLU, around a skip; then attention where asked.

    The embedding e enters before the second one: added to its input (Ho et al. 2020), or as scale
    and shift after the norm (Dhariwal and Nichol 2021, section 4.3), for which e has twice as
    many channels. x (B, n_in, *S), e (B or 1, n_out or 2 n_out) -> (B, n_out, *S).
    """

    def __init__(
        self, rank: int, n_in: int, n_out: int, dropout: float, scale_shift: bool, heads: int
    ) -> None:
        super().__init__()
        self.n_embedding = 2 * n_out if scale_shift else n_out
        self.scale_shift = scale_shift
        self.norm_1, self.norm_2 = group_norm(n_in), group_norm(n_out)
        self.conv_1 = convolution(rank, n_in, n_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(convolution(rank, n_out, n_out))
        self.skip = nn.Identity() if n_in == n_out else convolution(rank, n_in, n_out, size=1)
        self.attention = Attention(n_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """(B, C_in, *places), (B, features) -> (B, C_out, *places)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        e = e.reshape(*e.shape, *(1,) * (x.ndim - 2))
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_2(h), 1 + scale)
        else:
            h = self.norm_2(h + e)
        h = self.conv_2(self.dropout(F.silu(h)))
        return cast(Tensor, self.attention(self.skip(x) + h))


class Enlarge(nn.Module):
    """Nearest-neighbour enlargement to the spatial size asked for, then a convolution."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.conv = convolution(rank, channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """Twice as many places along each axis."""
        return cast(Tensor, self.conv(F.interpolate(x, size=size)))


class UNet(Network):
    """A U-Net: x (B, C, *S), c () or (B,), y (B,) or None -> (B, C, *S).

    Each level but the first halves the size, rounding up. On the way down it has ``blocks``
    blocks and on the way up one more; between them stand two blocks with attention in the first.
    The last convolution starts at zero, hence so does the network.

    Args:
        shape: (C, *S) with one, two or three spatial sizes.
        channels: width at full resolution; times ``multipliers`` it is that of each level.
        blocks: residual blocks on each level of the way down, 0 or more.
        attention: the sizes (largest side) at which every block is followed by self-attention.
        heads: attention heads; must divide the widths where there is attention.
        dropout: probability of dropout before the second convolution of each block.
        classes: number of labels, or None.
        embedding: "sinusoidal" or "fourier".
        width: width of the embedding; None is 4 channels.
        scale_shift: let the embedding scale and shift, instead of adding to, the features.
        head: return a second output behind the first, (B, 2 C, *S): what the variances of a
            chain are learned by.

    Raises:
        ValueError: arguments that do not fit together, saying which.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        dropout: float = 0.0,
        classes: int | None = None,
        embedding: str = "sinusoidal",
        width: int | None = None,
        scale_shift: bool = True,
        head: bool = False,
    ) -> None:
        check_kind(head, bool, "head", "True or False")
        config = {
            "shape": sizes(shape, "shape"),
            "channels": (channels := check_count(channels, "channels")),
            "multipliers": (multipliers := sizes(multipliers, "multipliers")),
            "blocks": (blocks := check_count(blocks, "blocks", 0)),
            "attention": sizes(attention, "attention"),
            "heads": (heads := check_count(heads, "heads")),
            "dropout": (dropout := check_number(dropout, "dropout", least=0, most=1)),
            "classes": classes,
            "embedding": embedding,
            "width": width,
            "scale_shift": scale_shift,
            "head": head,
        }
        super().__init__(shape, classes, config)
        attends = _check(self.config)
        rank, width = (
            len(self.shape) - 1,
            4 * channels if width is None else check_count(width, "width"),
        )

        def block(n_in: int, n_out: int, attention: bool) -> Block:
            return Block(rank, n_in, n_out, dropout, scale_shift, heads if attention else 0)

        widths = [channels * m for m in multipliers]
        self.input = convolution(rank, self.shape[0], channels)
        self._build_ladder(rank, [channels, *widths], blocks, attends, block)
        self.norm = group_norm(widths[0])
        self.output = zeroed(convolution(rank, widths[0], self.shape[0] * (1 + head)))
        ladder = (*self.down, *self.middle, *self.up)
        self.splits = [m.n_embedding for m in ladder if isinstance(m, Block)]
        self.embedding = Embedding(embedding, channels, width, classes)
        self.project = nn.Linear(width, sum(self.splits))

    def _build_ladder(
        self,
        rank: int,
        widths: Sequence[int],
        blocks: int,
        attends: Sequence[bool],
        block: Callable[[int, int, bool], Block],
    ) -> None:
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        n, *widths = widths
        skips = [n]
        for level, n_out in enumerate(widths):
            if level:
                self.down.append(convolution(rank, n, n, stride=2))
                skips.append(n)
            for _ in range(blocks):
                self.down.append(block(n, n_out, attends[level]))
                skips.append(n := n_out)
        self.middle = nn.ModuleList([block(n, n, True), block(n, n, False)])
        for level, n_out in reversed([*enumerate(widths)]):
            for _ in range(blocks + 1):
                self.up.append(block(n + skips.pop(), n_out, attends[level]))
                n = n_out
            if level:
                self.up.append(Enlarge(rank, n))

    def compute(self, x: Tensor, c: Tensor, y: Tensor | None) -> Tensor:
        """(B, *shape) -> (B, *shape), or with a head (B, 2 C, *S)."""
        # One matrix product embeds for all blocks, in the order in which they run.
        e = iter(self.project(F.silu(self.embedding(c, y))).split(self.splits, dim=1))
        h = self.input(x)
        skips = [h]
        for m in self.down:
            h = m(h, next(e)) if isinstance(m, Block) else m(h)
            skips.append(h)
        for m in self.middle:
            h = m(h, next(e))
        for m in self.up:
            if isinstance(m, Block):
                h = m(torch.cat([h, skips.pop()], dim=1), next(e))
            else:
                h = m(h, skips[-1].shape[2:])
        return cast(Tensor, self.output(F.silu(self.norm(h))))

    @classmethod
    def digits(cls, classes: int | None = 10, head: bool = False) -> UNet:
        """For (1, 8, 8) images, about 0.2 M parameters, made to be fast on a CPU."""
        return cls((1, 8, 8), 32, (1, 2), blocks=0, width=64, classes=classes, head=head)

    @classmethod
    def cifar10(cls, classes: int | None = None) -> UNet:
        """The CIFAR-10 network of Ho et al. (2020), appendix B: (3, 32, 32), 35.7 M parameters."""
        return cls(
            (3, 32, 32),
            128,
            (1, 2, 2, 2),
            blocks=2,
            attention=(16,),
            dropout=0.1,
            classes=classes,
            scale_shift=False,
        )


def _check(config: Mapping[str, Any]) -> list[bool]:
    """Raise where the arguments do not fit together; return which levels have attention."""
    _, *size = config["shape"]
    multipliers, heads = config["multipliers"], config["heads"]
    if len(size) not in (1, 2, 3):
        raise ValueError(f"shape must be (C, *S) with 1 to 3 sizes S, got {config['shape']}")
    if not multipliers:
        raise ValueError("multipliers must be positive, one for each level, got none")
    sizes = [max(-(-s // 2**level) for s in size) for level in range(len(multipliers))]
    if missing := [s for s in config["attention"] if s not in sizes]:
        raise ValueError(f"attention at {missing}: the levels have the sizes {sizes}")
    attends = [s in config["attention"] for s in sizes]
    middle = multipliers[-1] if config["blocks"] else 1
    for m, attention in [*zip(multipliers, attends, strict=True), (middle, True)]:
        if attention and config["channels"] * m % heads:
            raise ValueError(f"{config['channels'] * m} channels do not divide into {heads} heads")
    return attends
