"""The parts that networks of signals, images and volumes are made of."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Space(NamedTuple):
    """The number of spatial dimensions, and whether they close on themselves."""

    rank: int
    periodic: bool = False


def convolution(space: Space, n_in: int, n_out: int, size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution over the spatial dimensions that keeps the size, up to its stride."""
    kind: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space.rank - 1]
    padding: Literal["circular", "zeros"] = "circular" if space.periodic else "zeros"
    return kind(n_in, n_out, size, stride, size // 2, padding_mode=padding)


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


def cut(x: Tensor, side: int) -> Tensor:
    """Patches of side p as channels: (B, C, *S) -> (B, C p^d, *(S / p))."""
    if side == 1:
        return x
    d = x.ndim - 2
    x = x.reshape(*x.shape[:2], *(n for size in x.shape[2:] for n in (size // side, side)))
    return x.permute(0, 1, *range(3, 3 + 2 * d, 2), *range(2, 2 + 2 * d, 2)).flatten(1, 1 + d)


def joined(h: Tensor, side: int) -> Tensor:
    """The way back of ``cut``: (B, C p^d, *S) -> (B, C, *(S p))."""
    if side == 1:
        return h
    d, places = h.ndim - 2, h.shape[2:]
    h = h.unflatten(1, (-1, *[side] * d))
    h = h.permute(0, 1, *(n for i in range(d) for n in (2 + d + i, 2 + i)))
    return h.reshape(len(h), h.shape[1], *(side * n for n in places))


def attend(q: Tensor, k: Tensor, v: Tensor, there: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over positions: q (..., N, d), k, v (..., M, d) -> (..., N, d).

    ``there`` (..., N or 1, M) says which of the keys may be looked at; one of them must.

    The fused kernels, which win where N is large, can be neither mapped by ``vmap`` without a
    warning nor differentiated twice or forward; for small N this is the formula itself. Where a
    large network needs those, wrap the call in ``torch.nn.attention.sdpa_kernel(MATH)``.
    """
    if max(q.shape[-2], k.shape[-2]) > 64:
        return F.scaled_dot_product_attention(q, k, v, there)
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    if there is not None:
        logits = logits.masked_fill(~there, -torch.inf)
    return torch.softmax(logits, dim=-1) @ v


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


class CrossAttention(nn.Module):
    """x + W attend(q(x), k(tokens), v(tokens)): each place of x (B, C, *S) reads the tokens."""

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """(B, C, *S), tokens (B, L, width), which of them are there (B, L) -> (B, C, *S)."""
        q = self.q(self.norm(x).flatten(2).mT).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = attend(q, k, v, there[:, None, None]).transpose(1, 2).flatten(2)
        return x + self.out(h).mT.reshape(x.shape)


class Gate(nn.Module):
    """A skip times alpha = sigmoid(psi(relu(W_s skip + W_h h))) in (0, 1), one a place.

    What comes up from the coarser levels, h, decides where a skip is looked at (Oktay et al. 2018,
    equations 1 and 2, with h at the size of the skip). It starts at alpha = 1/2.
    """

    def __init__(self, space: Space, n_skip: int, n_h: int) -> None:
        super().__init__()
        n = max(1, n_skip // 2)
        self.skip = convolution(space, n_skip, n, size=1)
        self.h = convolution(space, n_h, n, size=1)
        self.psi = zeroed(convolution(space, n, 1, size=1))

    def forward(self, skip: Tensor, h: Tensor) -> Tensor:
        """(B, n_skip, *S), (B, n_h, *S) -> (B, n_skip, *S)."""
        return skip * torch.sigmoid(self.psi(F.relu(self.skip(skip) + self.h(h))))


class Block(nn.Module):
    """Two convolutions, each after norm and SiLU, around a skip; then attention where asked.

    The embedding e enters before the second one: added to its input (Ho et al. 2020), or as scale
    and shift after the norm (Dhariwal and Nichol 2021, section 4.3), for which e has twice as
    many channels. x (B, n_in, *S), e (B or 1, n_out or 2 n_out) -> (B, n_out, *S). Where it
    attends, and there are sequences (``tokens``, their width), it reads these as well.
    """

    def __init__(
        self,
        space: Space,
        n_in: int,
        n_out: int,
        dropout: float,
        scale_shift: bool,
        heads: int,
        tokens: int = 0,
    ) -> None:
        super().__init__()
        self.n_embedding = 2 * n_out if scale_shift else n_out
        self.scale_shift = scale_shift
        self.norm_1, self.norm_2 = group_norm(n_in), group_norm(n_out)
        self.conv_1 = convolution(space, n_in, n_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(convolution(space, n_out, n_out))
        self.skip = nn.Identity() if n_in == n_out else convolution(space, n_in, n_out, size=1)
        self.attention = Attention(n_out, heads) if heads else nn.Identity()
        self.cross = CrossAttention(n_out, heads, tokens) if heads and tokens else None

    def forward(self, x: Tensor, e: Tensor, tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, C_in, *places), (B, features) -> (B, C_out, *places)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        e = e.reshape(*e.shape, *(1,) * (x.ndim - 2))
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_2(h), 1 + scale)
        else:
            h = self.norm_2(h + e)
        h = self.conv_2(self.dropout(F.silu(h)))
        h = self.attention(self.skip(x) + h)
        return cast(Tensor, h if self.cross is None or tokens is None else self.cross(h, *tokens))


class Enlarge(nn.Module):
    """Nearest-neighbour enlargement to the spatial size asked for, then a convolution."""

    def __init__(self, space: Space, channels: int) -> None:
        super().__init__()
        self.conv = convolution(space, channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """Twice as many places along each axis."""
        return cast(Tensor, self.conv(F.interpolate(x, size=size)))
