"""Training as the lectures write it: at integer t, drawn uniformly; and learned variances.

``Denoising(uniform_weight, NodeTimes(chain))`` is algorithm 1 of Ho et al. (2020). ``Hybrid`` adds
what teaches a second output of the network the variance of the steps (Nichol & Dhariwal 2021,
section 3.1),

    L_hybrid = L_simple + 0.001 L_vlb,

where L_vlb is the *sum* of the N terms in bits a dimension, of which one draw of t estimates N
times its own, and where the mean of the step is held fixed: it is learned by L_simple alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..levels import quantise
from ..noise import Streams
from ..ops import (
    as_time,
    check_kind,
    full_precision,
    set_number,
    shown,
    user_precision,
)
from ..scores import ScoreNetwork
from ..sdes import SDE, Evaluation
from ..training.losses import Context, Weighting, context_of, uniform_weight
from .steps import Chain
from .terms import decoder_of

_chain = lru_cache(maxsize=8)(Chain)


@dataclass(frozen=True)
class NodeTimes:
    """The times of a chain, each as often as the others: a ``TimeSampler``.

    Args:
        times: those of the nodes 1 .. N; ``NodeTimes.of(chain)`` reads them.

    >>> chain = sg.Chain(sg.VP(), sg.grids.uniform(sg.VP(), 10))
    >>> len(sg.chain.NodeTimes.of(chain).times)
    11
    """

    times: tuple[float, ...]

    @classmethod
    def of(cls, chain: Chain) -> NodeTimes:
        """The nodes of a chain."""
        check_kind(chain, Chain, "chain", "a Chain, such as Chain(VP(), times)")
        return cls(tuple(chain.times[1:].tolist()))

    def numbers(self, u: Tensor) -> Tensor:
        """t = 1 .. N, int64 (B,), for uniform numbers u (B,) in [0, 1)."""
        n = len(self.times)
        return 1 + (as_time(u, "u") * n).long().clamp(0, n - 1)

    def __call__(self, sde: SDE, u: Tensor) -> Tensor:
        """Times (B,) for uniform numbers u (B,)."""
        t = torch.tensor(self.times, dtype=torch.float64, device=u.device)
        return t[self.numbers(u) - 1]


@dataclass(frozen=True)
class Hybrid:
    """L_simple + 0.001 L_vlb: score and log variance of the steps, in one call of the network.

    The variance is v_large^f v_small^(1 - f), f = (head + 1) / 2, for a network with a head
    (``MLP(..., head=True)``); ``bound(..., variance="learned")`` and
    ``chain.sample(..., variance="learned")`` then read it.

    Args:
        times: the nodes of the chain, ``NodeTimes.of(chain)``.
        weight: of L_vlb, in bits a dimension.
        weighting: of the noise residual in L_simple.
        dropout: the probability of training without a condition.
        n_levels: read L_0 on so many cells of [-1, 1] (quantised data); None is a density.

    >>> chain = sg.Chain(sg.VP(), sg.grids.uniform(sg.VP(), 10))
    >>> sg.chain.Hybrid(sg.chain.NodeTimes.of(chain)).weight
    0.001
    """

    times: NodeTimes
    weight: float = 0.001
    weighting: Weighting = field(default=uniform_weight)
    dropout: float = 0.1
    n_levels: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.times, NodeTimes, "times", "NodeTimes.of(chain)")
        set_number(self, "weight", least=0)
        set_number(self, "dropout", least=0, most=1)

    def __call__(self, model: Any, x: Tensor, y: Context, noise: Streams) -> Tensor:
        """Losses (B,) of data x (B, *D) in their own units."""
        inner = getattr(model, "module", model)
        if not isinstance(inner, ScoreNetwork):
            raise TypeError(f"model must be a ScoreNetwork, got {shown(model)}")
        context = context_of(y, len(x), self.dropout, noise, inner.takes)
        chain, u = _chain(inner.sde, self.times.times), noise.spread(len(x), x.device)
        t, at = self.times.numbers(u), self.times(inner.sde, u)
        half = user_precision(x.device.type)
        with full_precision(x.device.type):
            z = inner.facts.encode(x)
            p = inner.sde.perturb(z, at, noise)
            with half:
                e = model(p.x, at, whole=True, **context)
            if e.head is None:
                raise TypeError("the network has no head to learn variances by: head=True")
            simple = p.residual(e.score.to(x.dtype)).square().flatten(1).mean(1)
            fixed = Evaluation(e.score.detach(), e.denoised.detach(), e.head.to(x.dtype))
            bits = self._term(inner, chain, fixed, x, p.x, t) / (z[0].numel() * math.log(2))
            return self.weighting(inner.sde, at).to(simple) * simple + (
                self.weight * len(chain) * bits.to(simple)
            )

    def _term(
        self, model: ScoreNetwork, chain: Chain, e: Evaluation, data: Tensor, x: Tensor, t: Tensor
    ) -> Tensor:
        """The term of the bound at each sample's t, (B,): L_0 where t is 1."""
        z, term = model.facts.encode(data), x.new_zeros(len(x), dtype=torch.float64)
        is_step = t > 1
        if bool(is_step.any()):
            rows = is_step.nonzero().flatten()
            kl = chain.divergence(_cut(e, rows), z[rows], x[rows], t[rows], "learned")
            term = term.index_put((rows,), kl)
        if bool((~is_step).any()):
            rows = (~is_step).nonzero().flatten()
            seen = data[rows] if self.n_levels is None else quantise(data[rows], self.n_levels)
            _, decode = decoder_of(model.facts, chain, seen, None, self.n_levels)
            p = chain.read(_cut(e, rows), x[rows].double(), 1, 0, "learned")
            term = term.index_put((rows,), decode(x[rows], p))
        return term


def _cut(e: Evaluation, rows: Tensor) -> Evaluation:
    assert e.head is not None
    return Evaluation(e.score[rows], e.denoised[rows], e.head[rows])
