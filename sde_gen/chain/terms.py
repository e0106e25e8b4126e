"""The bound of the chain, term by term.

    -log p(x_0) <= L_T + sum_t L_(t-1) + L_0,
    L_T     = KL(q(x_N | x_0) || p(x_N)),
    L_(t-1) = E KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)),      t = 2 .. N,
    L_0     = E -log p(x_0 | x_1),

by Jensen's inequality and by conditioning on x_0 (Ho et al. 2020, equation 5). L_T is exact; the
others are means over x_t, drawn from streams numbered by the sample, so that what a sample gets
does not depend on its batch. The bound of many steps can be had from a few of them: draw t with
the probability p_t and count L_(t-1) / p_t, which has the right mean whatever p_t is and little
variance where p_t is what the term would be for Gaussian data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import gaussians
from ..facts import Facts
from ..levels import check_levels, place
from ..likelihood import Estimate
from ..likelihood.watch import Watch
from ..moments import Moments, isotropic
from ..noise import Streams
from ..ops import (
    as_numbers,
    check_choice,
    check_count,
    check_finite,
    check_kind,
    check_state,
    sum_rest,
)
from ..scores import Score
from ..sdes import Evaluation
from .normal import Normal
from .steps import Chain, Variance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Decoder = Literal["gaussian", "discretised", "bayes"]
"""p(x_0 | x_1): a density; that density read on the cells of the levels; or the exact posterior
of the levels under a uniform law of them, which needs no model (Kingma et al. 2021, VDM)."""

_UNIFORM = 0.05
"""Part of the draws of t that is uniform, lest a term that the moments think small be missed."""


@dataclass(frozen=True, eq=False)
class Bound:
    """The terms of -log p(x) <= L_T + sum L_(t-1) + L_0, in nats, each with its standard error.

    Attributes:
        prior: L_T, (B,), exact.
        steps: L_1 .. L_(N-1), (B, N - 1).
        reconstruction: L_0, (B,).
        total: the bound, (B,). Its error counts the draws of x_t (and of t); that of ``mean`` the
            spread of the data too.
        dimensions: n, of one sample.
        calls: how often the model was called, on the whole batch.

    >>> sde, law = sg.VP(), sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> found = sg.bound(law, torch.zeros(8, 2), sg.Chain(sde, sg.grids.uniform(sde, 10)))
    >>> found.mean().total.value.shape
    torch.Size([])
    """

    prior: Estimate
    steps: Estimate
    reconstruction: Estimate
    total: Estimate
    dimensions: int
    calls: int

    @property
    def bits_per_dim(self) -> Estimate:
        """total / (n log 2)."""
        return self.total / (self.dimensions * math.log(2))

    @classmethod
    def joined(cls, parts: Sequence[Bound]) -> Bound:
        """The bounds of several batches as that of one."""

        def cat(name: str) -> Estimate:
            each = [getattr(part, name) for part in parts]
            value, spread, bias = (
                torch.cat([getattr(e, of) for e in each]) for of in ("value", "spread", "bias")
            )
            return replace(each[0], value=value, spread=spread, bias=bias)

        found: dict[str, Any] = {n: cat(n) for n in ("prior", "steps", "reconstruction", "total")}
        return replace(parts[0], **found)

    def mean(self) -> Bound:
        """The mean over the samples, its standard errors from their spread; one keeps its own."""
        prior, steps, reconstruction, total = (
            v[0] if len(v) == 1 else Estimate.of(v.value, v.calls, v.method)
            for v in (self.prior, self.steps, self.reconstruction, self.total)
        )
        return Bound(prior, steps, reconstruction, total, self.dimensions, self.calls)


@dataclass(frozen=True, eq=False)
class _Terms:
    """What the terms of some samples are made of; z, the data in the units of the process, float64
    in what is compared."""

    model: Score
    chain: Chain
    z: Tensor
    variance: Variance
    streams: Streams
    decode: Callable[[Tensor, Normal], Tensor]
    watch: Watch

    def noisy(self, t: int | Tensor, name: str) -> Tensor:
        return self.chain.forward(self.z, t).sample(self.streams.normal(self.z, name))

    def evaluate(self, x: Tensor, t: int | Tensor) -> Evaluation:
        """What the model says of x_t."""
        at = self.chain.times[t]
        e = self.model.evaluate(x, at.to(x.device) if at.ndim else at)
        self.watch.tick()
        return e

    def step(self, t: int | Tensor, name: str) -> Tensor:
        """L_(t-1) at one draw of x_t, (B,)."""
        x = self.noisy(t, name)
        return self.chain.divergence(self.evaluate(x, t), self.z, x, t, self.variance)

    def reconstruction(self, name: str) -> Tensor:
        """L_0 at one draw of x_1, (B,)."""
        x = self.noisy(1, name)
        p = self.chain.read(self.evaluate(x, 1), x.double(), 1, 0, self.variance)
        return self.decode(x, p)

    def bound(self, moments: Moments | None, draws: int, terms: int, p: Tensor | None) -> Bound:
        """All terms, or so many drawn with the probabilities p."""
        first = _prior(self.chain, self.z, moments)
        last = torch.stack([self.reconstruction(f"term 1 {k}") for k in range(draws)])
        if p is None:
            steps = Estimate.of(torch.stack([_all(self, k) for k in range(draws)]))
            value, square = steps.value.sum(1), steps.standard_error.square().sum(1)
            calls = draws * len(self.chain)
        else:
            steps, sums = _drawn(self, p, terms)
            value, square = sums.value, sums.standard_error.square()
            calls = draws + terms
        rec, exact = Estimate.of(last), Estimate.exact(first)
        error = torch.sqrt(square + rec.standard_error.square())
        total = Estimate(first + value + rec.value, error, torch.zeros_like(error), calls, "chain")
        return Bound(exact, steps, rec, total, self.z[0].numel(), calls)


def bound(
    model: Score,
    x: Tensor | ArrayLike,
    chain: Chain,
    *,
    variance: Variance = "small",
    decoder: Decoder | None = None,
    n_levels: int | None = None,
    prior: Moments | None = None,
    draws: int = 2,
    terms: int | None = None,
    importance: Moments | Tensor | None = None,
    seed: int = 0,
    first: int = 0,
    progress: bool = False,
    chunk: int | None = None,
) -> Bound:
    """A bound on -log p(x), sample by sample and term by term, with standard errors.

    Args:
        model: a score that knows its process, conditioned already where it takes labels.
        x: data (B, *D) in their own units, of which -log p(x) is a density; or levels, integers
            0 .. L - 1, of which it is a probability, on [-1, 1] as ``levels.centre`` puts them.
        chain: the model's process at N times.
        variance: of the model's steps.
        decoder: by default "gaussian" for floating data, "discretised" for levels.
        n_levels: L; by default what the model knows (``facts.levels``), or 256.
        prior: p(x_N) is that of Gaussian data of these moments; by default of the moments that
            the model knows, and N(0, sigma_N^2) where it knows none: where sampling starts.
        draws: of x_t in each term. The error bar of a sample needs two.
        terms: None for all N - 1 steps; else how many are drawn for each sample, in proportion to
            what they are expected to be.
        importance: what is expected of them: moments of the data, by default those that the model
            knows, or the denoiser's mean squared errors (N,).
        seed, first: what is drawn for row i is a function of the seed and of first + i.
        progress, chunk: as in ``log_prob``; a value does not depend on them.

    Raises:
        TypeError: the model knows no process; floating data with a decoder for levels.
        ValueError: the chain of another process, levels out of range, shapes that do not fit, a
            score bound for another number of samples.

    >>> from sde_gen import VP, Gaussian, grids
    >>> law = Gaussian(VP(), torch.zeros(3).double(), 0.5)
    >>> chain = Chain(VP(), grids.information(VP(), 50, reference=0.25))
    >>> x = law.sample(400, torch.Generator().manual_seed(0))
    >>> found = bound(law, x, chain, variance=isotropic(0.25))  # right for this law: no gap
    >>> off = (found.total + law.log_prob(x, 0.0)).mean()
    >>> abs(float(off)) < 4 * float(off.standard_error)
    True
    """
    check_kind(model, Score, "model", "a Score, such as a ScoreNetwork")
    check_kind(chain, Chain, "chain", "a Chain, such as Chain(VP(), times)")
    draws = check_count(draws, "draws")
    x = x if isinstance(x, Tensor) else as_numbers(x, "x").to(model.device)
    data, _ = decoder_of(model.facts, chain, x, decoder, n_levels)
    chain.check(model, data)
    for known in (variance, prior):
        if isinstance(known, Moments):
            known.check(data[0].numel())
    p, number = None, 0
    if terms is not None:
        known = model.facts.moments or isotropic(model.facts.variance)
        p = _probabilities(chain, known if importance is None else importance, variance)
        number = check_count(terms, "terms")
    numbers = Streams(seed, check_count(first, "first", 0))
    size = len(data) if chunk is None else check_count(chunk, "chunk")
    parts = [slice(i, min(i + size, len(data))) for i in range(0, len(data), size)]
    calls = draws + number if terms is not None else draws * len(chain)
    watch, found = Watch(calls * len(parts), progress), []
    moments = model.facts.moments if prior is None else prior
    for part in parts:
        own = model.rows(part) if len(parts) > 1 else model
        some, decode = decoder_of(model.facts, chain, x[part], decoder, n_levels)
        z, streams = model.facts.encode(some), numbers.rows(part)
        with torch.no_grad():
            made_of = _Terms(own, chain, z, variance, streams, decode, watch)
            found.append(made_of.bound(moments, draws, number, p))
    watch.close()
    return found[0] if len(found) == 1 else Bound.joined(found)


def _all(parts: _Terms, k: int) -> Tensor:
    """L_1 .. L_(N-1) at one draw each, (B, N - 1)."""
    n = len(parts.chain)
    if n == 1:
        return parts.z.new_zeros(len(parts.z), 0, dtype=torch.float64)
    return torch.stack([parts.step(t, f"term {t} {k}") for t in range(2, n + 1)], 1)


def _probabilities(chain: Chain, known: Moments | Tensor, variance: Variance) -> Tensor:
    """Of t = 2 .. N: in proportion to the expected terms, a small part uniform."""
    if len(chain) == 1:
        raise ValueError("a chain of one step has no steps to draw: leave terms out")
    if isinstance(variance, Moments) and variance is not known:
        variance = "learned"
    expected = chain.expected(known, variance).clamp_min(0)
    if not float(expected.sum()) > 0:
        return torch.full_like(expected, 1 / len(expected))
    return (1 - _UNIFORM) * expected / expected.sum() + _UNIFORM / len(expected)


def _drawn(parts: _Terms, p: Tensor, terms: int) -> tuple[Estimate, Estimate]:
    """Each step's term (B, N - 1), and their sum, from so many draws of t for each sample."""
    cdf, singles, sums = p.cumsum(0), [], []
    for k in range(terms):
        u = parts.streams.uniform(parts.z.new_zeros(len(parts.z), dtype=torch.float64), f"t {k}")
        at = torch.searchsorted(cdf, u.cpu() * cdf[-1], right=True).clamp_max(len(p) - 1)
        counted = parts.step(at + 2, f"drawn {k}") / p[at].to(parts.z.device)
        one = torch.zeros(len(u), len(p), dtype=counted.dtype, device=counted.device)
        singles.append(one.scatter(1, at.to(counted.device)[:, None], counted[:, None]))
        sums.append(counted)
    return Estimate.of(torch.stack(singles)), Estimate.of(torch.stack(sums))


def _prior(chain: Chain, z: Tensor, moments: Moments | None) -> Tensor:
    """L_T: KL(q(x_N | x_0) || N(alpha m, alpha^2 C + sigma^2)), (B,)."""
    q = chain.forward(z.double(), len(chain))
    known = isotropic(0.0) if moments is None else moments
    alpha, sigma = chain.nodes.alpha[-1], chain.nodes.sigma[-1]
    mean = torch.zeros_like(q.mean)
    if known.mean is not None:
        mean = mean + float(alpha) * known.mean.to(mean).reshape(mean.shape[1:])
    v = (alpha**2 * known.values + sigma**2).to(mean).unsqueeze(0)
    return q.kl(Normal(mean, v, None if known.basis is None else known.basis.to(mean)))


def decoder_of(
    facts: Facts,
    chain: Chain,
    x: Tensor | ArrayLike | Sequence[int],
    decoder: Decoder | None,
    n_levels: int | None,
) -> tuple[Tensor, Callable[[Tensor, Normal], Tensor]]:
    """The data as floats in their own units, and (x_1, p(x_0 | x_1)) -> L_0 (B,)."""
    if isinstance(x, Tensor) and x.is_floating_point():
        check_state(x)
        check_finite(x)
        if decoder not in (None, "gaussian"):
            raise TypeError(f"the decoder {decoder!r} is of levels, integers, got {x.dtype}")
        z, volume = facts.encode(x).double(), facts.log_volume(x.shape[1:])
        return x, lambda _, p: volume - p.log_density(z)
    k, levels = check_levels(x, n_levels or facts.levels or 256)
    if k.ndim < 2 or k.numel() == 0:
        raise ValueError(f"levels must be (B, *D), a row a sample, got shape {tuple(k.shape)}")
    check_choice(decoder or "discretised", ("discretised", "bayes"), "decoder")
    data = place(k, torch.full_like(k, 0.5, dtype=torch.float32), levels)
    if decoder == "bayes":
        return data, lambda x_1, _: -sum_rest(bayes(k, *_seen(facts, chain, x_1), levels))

    def discretised(_: Tensor, p: Normal) -> Tensor:
        mean, std = facts.decode(p.mean), p.std * _scale(facts, p.mean)
        return -sum_rest(gaussians.discretised(k, mean, std, levels))

    return data, discretised


def _scale(facts: Facts, like: Tensor) -> Tensor:
    if facts.units is None:
        return like.new_ones(())
    if facts.units.mix is not None:
        raise ValueError("levels of coordinates that the units mix have no cells of their own")
    return facts.units.scale.to(like)


def _seen(facts: Facts, chain: Chain, x_1: Tensor) -> tuple[Tensor, Tensor]:
    """y = x_1 / alpha and the deviation of its noise, in the units of the data."""
    alpha, sigma = float(chain.nodes.alpha[1]), float(chain.nodes.sigma[1])
    y = facts.decode(x_1.double() / alpha)
    return y, sigma / alpha * _scale(facts, y)


def bayes(k: Tensor, y: Tensor, std: Tensor, levels: int) -> Tensor:
    """log P(k | y) for y = x_k + std z and L levels x_k that are equally likely, elementwise.

    The softmax of -(y - x_k)^2 / (2 std^2) (Kingma et al. 2021, equation 17).

    >>> y = torch.tensor([-0.5])
    >>> sg.chain.bayes(torch.tensor([0]), y, torch.tensor(0.01), 2).exp()
    tensor([1.])
    """
    centres = place(torch.arange(levels, device=y.device).to(y), y.new_tensor(0.5), levels)
    std = torch.as_tensor(std).to(y).expand_as(y).unsqueeze(-1)
    logits = -0.5 * ((y.unsqueeze(-1) - centres) / std) ** 2
    return torch.log_softmax(logits, -1).gather(-1, k.long().unsqueeze(-1)).squeeze(-1)
