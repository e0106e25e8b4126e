"""The U-Net of score-based models, for signals, images and volumes.

Residual blocks on a ladder of resolutions, with skip connections from the way down to the way up
(Ronneberger et al. 2015; Ho et al. 2020, appendix B). The rank of the data chooses every
convolution, and the way up enlarges each map to the size of the skip that it meets, so that any
spatial size works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ops import check_count, check_kind, check_number
from .base import Network, sizes
from .blocks import Block, Enlarge, Gate, Space, convolution, cut, group_norm, joined, zeroed
from .context import Conditions, Sizes, listed
from .embeddings import Embedding


class UNet(Network):
    """A U-Net: x (B, C, *S), c () or (B,), y (B,) or None -> (B, C, *S).

    Each level but the first halves the size, rounding up. On the way down it has ``blocks``
    blocks and on the way up one more; between them stand two blocks with attention in the first.
    The last convolution starts at zero, hence so does the network.

    Of its conditions, vectors (n,) join the embedding, images (C', *S) the channels of the input,
    and sequences (None, n) are read by cross-attention wherever there is attention.

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
        context: the shapes of the conditions that it takes by name.
        gates: let attention gates weigh each skip (Oktay et al. 2018).
        periodic: let the convolutions wrap around: of data without borders, that repeat.
        patch: side p of the squares of pixels that are channels to the ladder (Luhman & Luhman
            2022), which then starts at S / p, at a fraction of the cost; ``attention`` counts from
            there. At full resolution stands one block of channels / p^d on either side, without
            which fine noise is not told from the data. p divides each S, and p^d the channels.
        recompute: in training keep no activations inside a block but compute them again for the
            gradient (gradient checkpointing): a third more time, a fraction of the memory.

    Raises:
        ValueError: arguments that do not fit together, saying which.

    >>> sg.networks.UNet((1, 8, 8), 8, (1, 2), 1)(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape
    torch.Size([2, 1, 8, 8])
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
        context: Sizes | None = None,
        gates: bool = False,
        periodic: bool = False,
        patch: int = 1,
        recompute: bool = False,
    ) -> None:
        flags = {"head": head, "gates": gates, "periodic": periodic, "recompute": recompute}
        for name, flag in flags.items():
            check_kind(flag, bool, name, "True or False")
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
            "patch": (patch := check_count(patch, "patch")),
            "scale_shift": scale_shift,
            "context": listed(context),
            **flags,
        }
        super().__init__(shape, classes, config, context)
        attends = _check(self.config)
        space, width = (
            Space(len(self.shape) - 1, periodic),
            4 * channels if width is None else check_count(width, "width"),
        )
        self.recompute, self.patch = recompute, patch
        self.conditions = Conditions(self.context, width, self.shape[1:])
        tokens = width if self.conditions.sequences else 0

        def block(n_in: int, n_out: int, attention: bool) -> Block:
            n = heads if attention else 0
            return Block(space, n_in, n_out, dropout, scale_shift, n, tokens)

        widths = [channels * m for m in multipliers]
        square = patch**space.rank
        edge = channels // square
        self.input = convolution(space, self.shape[0] + self.conditions.channels, edge)
        self.stem = nn.ModuleList([block(edge, edge, False)] if patch > 1 else [])
        self.crown = nn.ModuleList([block(2 * edge, edge, False)] if patch > 1 else [])
        self._build_ladder(space, [channels, *widths], blocks, attends, block)
        n_out = edge if patch > 1 else widths[0]
        self.norm = group_norm(n_out)
        self.output = zeroed(convolution(space, n_out, self.shape[0] * (1 + head)))
        ladder = (*self.stem, *self.down, *self.middle, *self.up, *self.crown)
        self.splits = [m.n_embedding for m in ladder if isinstance(m, Block)]
        self.embedding = Embedding(embedding, channels, width, classes)
        self.project = nn.Linear(width, sum(self.splits))

    def _build_ladder(
        self,
        space: Space,
        widths: Sequence[int],
        blocks: int,
        attends: Sequence[bool],
        block: Callable[[int, int, bool], Block],
    ) -> None:
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.gates = nn.ModuleList()
        n, *widths = widths
        skips = [n]
        for level, n_out in enumerate(widths):
            if level:
                self.down.append(convolution(space, n, n, stride=2))
                skips.append(n)
            for _ in range(blocks):
                self.down.append(block(n, n_out, attends[level]))
                skips.append(n := n_out)
        self.middle = nn.ModuleList([block(n, n, True), block(n, n, False)])
        for level, n_out in reversed([*enumerate(widths)]):
            for _ in range(blocks + 1):
                if self.config["gates"]:
                    self.gates.append(Gate(space, skips[-1], n))
                self.up.append(block(n + skips.pop(), n_out, attends[level]))
                n = n_out
            if level:
                self.up.append(Enlarge(space, n))

    def compute(self, x: Tensor, c: Tensor, y: Tensor | None, **context: Tensor) -> Tensor:
        """(B, *shape) -> (B, *shape), or with a head (B, 2 C, *S)."""
        # One matrix product embeds for all blocks, in the order in which they run.
        e = F.silu(self.conditions.embedded(self.embedding(c, y), context))
        parts = iter(self.project(e).split(self.splits, dim=1))
        tokens = self.conditions.sequence(context)

        def run(m: nn.Module, h: Tensor) -> Tensor:
            if self.recompute and self.training and torch.is_grad_enabled():
                return cast(Tensor, checkpoint(m, h, next(parts), tokens, use_reentrant=False))
            return cast(Tensor, m(h, next(parts), tokens))

        h = edge = self.input(self.conditions.beside(x, context))
        for m in self.stem:
            h = edge = run(m, h)
        h = cut(h, self.patch)
        skips, gates = [h], iter(self.gates)
        for m in self.down:
            h = run(m, h) if isinstance(m, Block) else m(h)
            skips.append(h)
        for m in self.middle:
            h = run(m, h)
        for m in self.up:
            if isinstance(m, Block):
                skip, gate = skips.pop(), next(gates, None)
                h = run(m, torch.cat([h, skip if gate is None else gate(skip, h)], dim=1))
            else:
                h = m(h, skips[-1].shape[2:])
        h = joined(h, self.patch)
        for m in self.crown:
            h = run(m, torch.cat([h, edge], 1))
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

    @classmethod
    def adm(
        cls,
        size: Literal[64, 128, 256],
        classes: int | None = None,
        context: Sizes | None = None,
        recompute: bool = False,
    ) -> UNet:
        """For (3, size, size) images: the widths, depths and attention of Dhariwal & Nichol 2021,
        table 4 and appendix I, with a head of 64 channels or more.

        Of 64, 128 and 256 pixels they have about 290, 420 and 550 M parameters; ``recompute`` lets
        them train in less memory.
        """
        if size not in ADM:
            raise ValueError(f"size must be one of {', '.join(map(str, ADM))}, got {size!r}")
        channels, multipliers, blocks, heads, dropout = ADM[size]
        return cls(
            (3, size, size),
            channels,
            multipliers,
            blocks=blocks,
            attention=(32, 16, 8),
            heads=heads,
            dropout=dropout,
            classes=classes,
            context=context,
            recompute=recompute,
        )


ADM: dict[int, tuple[int, tuple[int, ...], int, int, float]] = {
    64: (192, (1, 2, 3, 4), 3, 3, 0.1),
    128: (256, (1, 1, 2, 3, 4), 2, 4, 0.0),
    256: (256, (1, 1, 2, 2, 4, 4), 2, 4, 0.0),
}
"""Image size -> channels, multipliers, blocks, heads, dropout."""


def _check(config: Mapping[str, Any]) -> list[bool]:
    """Raise where the arguments do not fit together; return which levels have attention."""
    _, *size = config["shape"]
    multipliers, heads = config["multipliers"], config["heads"]
    if len(size) not in (1, 2, 3):
        raise ValueError(f"shape must be (C, *S) with 1 to 3 sizes S, got {config['shape']}")
    if not multipliers:
        raise ValueError("multipliers must be positive, one for each level, got none")
    patch = config["patch"]
    if any(s % patch for s in size) or config["channels"] % patch ** len(size):
        raise ValueError(
            f"patch={patch} must divide each of {tuple(size)}, and {patch}^{len(size)} the "
            f"{config['channels']} channels"
        )
    size = [s // patch for s in size]
    sizes = [max(-(-s // 2**level) for s in size) for level in range(len(multipliers))]
    if missing := [s for s in config["attention"] if s not in sizes]:
        raise ValueError(f"attention at {missing}: the levels have the sizes {sizes}")
    attends = [s in config["attention"] for s in sizes]
    middle = multipliers[-1] if config["blocks"] else 1
    for m, attention in [*zip(multipliers, attends, strict=True), (middle, True)]:
        if attention and config["channels"] * m % heads:
            raise ValueError(f"{config['channels'] * m} channels do not divide into {heads} heads")
    return attends
