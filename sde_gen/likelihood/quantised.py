"""Bits per dimension of quantised data: densities on cells bound probabilities of levels.

Level k of L owns the cell [2 k / L - 1, 2 (k + 1) / L - 1]. With u ~ q(u | k) filling the cell,

    log P(k) = log int_cell p(x) dx >= E_q [log p(x(u)) - log q(u | k)]

(Theis et al. 2016 with q uniform; Ho et al. 2019 with q learned), and with K draws the bound is
the tighter E log mean_K p / q (Burda et al. 2016), which rises to log P(k) as K grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..levels import check_levels, place
from ..noise import Streams
from ..ops import check_callable, check_count, check_finite, shown
from ..scores import Score
from ..sdes import KernelSDE, MatrixSDE
from ..solvers import Solver
from .density import log_prob
from .estimate import Estimate

_EXACT, _PROBES = 16, 2
"""Up to so many coordinates the trace is exact by default; beyond it has so many probes."""

Dequantiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(levels k, uniform noise, both (B, *D)) -> u in [0, 1] like them, and log q(u | k), (B,)."""


def bits_per_dim(
    model: Score,
    levels: Tensor | ArrayLike,
    n_levels: int | None = None,
    *,
    draws: int = 1,
    dequantiser: Dequantiser | None = None,
    probes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    first: int = 0,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> Estimate:
    """Bits per dimension of quantised data, (B, *D) -> (B,): an upper bound on -log2 P(k) / n.

    The bound is one in the mean over dequantisations and probes. Its ``mean()`` is the figure
    that is reported: there the error bar counts the data, the dequantisation and the probes. That
    of one sample counts its probes and, from two draws on, its dequantisations.

    Args:
        model: a score that knows its ``sde``, of data scaled to [-1, 1].
        levels: integers 0 .. n_levels - 1, a tensor, an array or lists.
        n_levels: L; by default what the model knows (``facts.levels``), or 256.
        draws: dequantisations K a sample, of which the mean is taken inside the logarithm.
        dequantiser: what turns uniform noise into u ~ q(u | k) in the cell [0, 1], with log q: a
            flow trained to tighten the bound. Uniform by default.
        probes: as in ``log_prob``; by default the exact trace up to 16 coordinates and for
            several draws, and otherwise two, whose spread that of the data covers.
        steps, solver, progress, chunk: as in ``log_prob``.
        seed: the noise of a sample is a function of the seed and the sample's number.
        first: the number of the first sample: a part of the data gets what it has in the whole.
        times: as in ``log_prob``. The flow of a network starts where sigma / alpha = 0.005 by
            default; that is more than half of a cell of 256 levels, and blurs what fills it: a
            network that was trained on smaller noise should start there.

    Raises:
        TypeError: levels are not integers, or the model does not know its process.
        ValueError: levels out of range; several draws with fewer probes than coordinates, whose
            spread inside the mean over draws would make its logarithm too large, so that nothing
            is bounded.

    >>> from sde_gen import VP, Gaussian
    >>> model = Gaussian(VP(), torch.zeros(4), 0.3)
    >>> bits_per_dim(model, torch.zeros(50, 4, dtype=torch.int64), 2).mean().shape
    torch.Size([])
    """
    draws = check_count(draws, "draws")
    cells = _cells(model, levels, n_levels, dequantiser)
    assert model.sde is not None
    n = _exact(cells, model.sde)
    if draws > 1 and probes is not None and check_count(probes, "probes") < n:
        raise ValueError(
            f"draws = {draws} with probes = {probes} is no bound: the spread of the probes would"
            " pass for likelihood; take draws=1, or leave probes out for the exact divergence"
        )
    if probes is None:
        probes = n if draws > 1 or n <= _EXACT else _PROBES
    options = _Options(probes, steps, seed, first, solver, times, progress, chunk)
    return cells.bits(_mean_inside(_logs(model, cells, draws, options)))


def importance_bounds(
    model: Score,
    levels: Tensor | ArrayLike,
    n_levels: int | None = None,
    *,
    draws: int = 16,
    dequantiser: Dequantiser | None = None,
    steps: int | None = None,
    seed: int = 0,
    first: int = 0,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
    progress: bool = False,
    chunk: int | None = None,
) -> dict[int, Estimate]:
    """The bound in bits per dimension with 1, 2, 4, ... K draws, the mean over samples of each.

    All are of the same draws, in disjoint groups, so that they fall with K but for chance. The
    last difference is the slope: where it is small beside what matters, more draws change little.
    No unbiased estimate of log P(k) is made of them.

    Args:
        draws: the largest K, a power of two.
        the others: as in ``bits_per_dim``, with the exact trace.

    Raises:
        TypeError, ValueError: as ``bits_per_dim``; draws that are no power of two.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2), 0.5)
    >>> bounds = sg.likelihood.importance_bounds(law, torch.zeros(4, 2).long(), 2, draws=2)
    >>> list(bounds)
    [1, 2]
    """
    draws = check_count(draws, "draws")
    if draws & (draws - 1):
        raise ValueError(f"draws must be a power of two, got {draws}")
    cells = _cells(model, levels, n_levels, dequantiser)
    assert model.sde is not None
    exact = _exact(cells, model.sde)
    options = _Options(exact, steps, seed, first, solver, times, progress, chunk)
    logs = _logs(model, cells, draws, options)
    bounds = {}
    for k in (2**i for i in range(draws.bit_length())):
        groups = [_mean_inside(logs[i : i + k]) for i in range(0, draws, k)]
        value, bias = (
            torch.stack(v).mean(0) for v in zip(*((g.value, g.bias) for g in groups), strict=True)
        )
        found = replace(groups[0], value=value, bias=bias, calls=sum(g.calls for g in groups))
        bounds[k] = cells.bits(found).mean()
    return bounds


class _Options(NamedTuple):
    """How the flow is followed, as ``log_prob`` takes it."""

    probes: int | None
    steps: int | None
    seed: int
    first: int
    solver: Solver | None
    times: Tensor | Sequence[float] | None
    progress: bool
    chunk: int | None


class _Cells(NamedTuple):
    """Levels and how many there are, and what turns noise into points of their cells."""

    k: Tensor
    n_levels: int
    dequantiser: Dequantiser | None

    def draw(self, streams: Streams, draw: int) -> tuple[Tensor, Tensor]:
        """A point of each cell, and log q of where in the unit cube it lies, (B,)."""
        k = self.k
        u = torch.special.ndtr(streams(torch.empty(k.shape, device=k.device), 1.0, 0.0, draw))
        log_q = u.new_zeros(len(u))
        if self.dequantiser is not None:
            u, log_q = self.dequantiser(k, u)
            if u.shape != k.shape or log_q.shape != k.shape[:1]:
                raise ValueError(
                    f"dequantiser(k, u) must return u {tuple(k.shape)} and log q ({len(k)},), got"
                    f" {tuple(u.shape)} and {tuple(log_q.shape)}"
                )
            if not bool(((u >= 0) & (u <= 1)).all()):
                raise ValueError("dequantiser(k, u) must return u in [0, 1], the cell")
            check_finite(log_q.detach(), "log q of the dequantiser")
        return place(k, u, self.n_levels), log_q

    def bits(self, found: Estimate) -> Estimate:
        """Nats of log P in bits a dimension."""
        cell = math.log2(self.n_levels / 2)
        return -found / (self.k[0].numel() * math.log(2)) + cell


def _cells(
    model: Score,
    levels: Tensor | ArrayLike,
    n_levels: int | None,
    dequantiser: Dequantiser | None,
) -> _Cells:
    sde = getattr(model, "sde", None)
    if not isinstance(sde, KernelSDE):
        raise TypeError(f"model must be a score that knows its process (.sde), got {shown(model)}")
    if dequantiser is not None:
        check_callable(dequantiser, "dequantiser", "dequantiser(k, u)")
    known = model.facts.levels or 256
    k, n_levels = check_levels(levels, known if n_levels is None else n_levels)
    if k.ndim < 2 or k.numel() == 0:
        raise ValueError(f"levels must be (B, *D), a row a sample, got shape {tuple(k.shape)}")
    return _Cells(k if isinstance(levels, Tensor) else k.to(model.device), n_levels, dequantiser)


def _logs(model: Score, cells: _Cells, draws: int, options: _Options) -> list[Estimate]:
    """log p(x(u)) - log q of each draw, (B,) each; of velocities that a process adds, too."""
    streams, logs = Streams(options.seed, options.first), []
    assert model.sde is not None
    for draw in range(draws):
        x, log_q = cells.draw(streams, draw)
        state, log_v = _begin(model.sde, x, streams, draw)
        logs.append(log_prob(model, state, **options._asdict()) - (log_q + log_v))
    return logs


def _exact(cells: _Cells, sde: KernelSDE) -> int:
    """As many probes as a state has coordinates, and more: the exact trace."""
    return math.prod(sde.state_shape(tuple(cells.k.shape[1:])))


def _mean_inside(logs: list[Estimate]) -> Estimate:
    """log of the mean over K draws, its spread by the delta method: that of the K weights over
    sqrt(K) times their mean."""
    values = torch.stack([e.value for e in logs])
    k, calls = len(logs), sum(e.calls for e in logs)
    weights = torch.softmax(values.detach(), 0)
    bias = (weights * torch.stack([e.bias for e in logs])).sum(0)
    spread = logs[0].spread
    if k > 1:
        spread = (weights - 1 / k).square().sum(0).mul(k / (k - 1)).sqrt()
    method = f"{logs[0].method}, {k} draw{'s' * (k > 1)}"
    return Estimate(torch.logsumexp(values, 0) - math.log(k), spread, bias, calls, method)


def _begin(sde: KernelSDE, x: Tensor, streams: Streams, draw: int) -> tuple[Tensor, Tensor]:
    """The state at t = 0 of data x, and the log density of what was added to it."""
    if not isinstance(sde, MatrixSDE):
        return x, x.new_zeros(len(x))
    return sde.begin(x, normals=[streams(x, 2.0, float(j), draw) for j in range(len(sde.added))])
