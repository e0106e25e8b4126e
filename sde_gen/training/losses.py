"""Denoising score matching: which noise levels are drawn, and what each is worth.

The score of a noised law is the conditional mean of the score of its noising kernel, so the
minimiser of

    E_t E_{x_0, z} w(t) |std s(x_t, t) + z|^2,      x_t = mean + std z,

is the exact score, whatever the weight w > 0 and the density of t (Vincent 2011). Both decide
where a network of finite size and a run of finite length spend their effort. A ``Weighting`` is
the weight w of the *noise residual* std s + z, which stays of order one at every noise level; in
terms of the score error |s - target|^2 the weight is w std^2, and with r = sigma / alpha and
D = E[x_0 | x_t] the error of the denoiser is |D - x_0|^2 = r^2 |sigma s + z|^2.

A ``TimeSampler`` maps uniform numbers to times by an inverse distribution function, so that
numbers spread evenly over [0, 1) give times spread evenly over the density. All that is random
comes from numbered streams (``Streams``): the time, the noise and the dropped conditions of sample
m of a run are functions of its seed and m, whoever computes them and beside whom.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..facts import Facts
from ..grids import as_moments, default_end, noise_of
from ..guidance import classifier_loss
from ..moments import Moments
from ..noise import Source, Streams
from ..ops import (
    as_labels,
    as_time,
    check_callable,
    check_kind,
    check_state,
    check_tensor,
    full_precision,
    match,
    set_number,
    shown,
    square,
    user_precision,
)
from ..sdes import SDE, KernelSDE, LinearSDE, MatrixSDE, ScoreFunction

Weighting = Callable[[SDE, Tensor], Tensor]
"""(sde, t (B,)) -> weights (B,) of the noise residual."""

TimeSampler = Callable[[SDE, Tensor], Tensor]
"""(sde, u (B,) in [0, 1)) -> times (B,) in (0, T], float64."""


Context = Tensor | dict[str, Tensor] | None
"""What a batch has beside x: labels (B,), or rows of several things by name, or nothing."""


class Objective(Protocol):
    """What a trainer minimises: (model, x (B, *D), y (B,) or None, noise) -> losses (B,).

    x is in the units of the data; ``noise`` numbers the samples of the batch. Where the items of
    the data are dictionaries of more than x and y, y is what they hold beside x, by name.

    >>> objective: sg.training.Objective = sg.training.Denoising(dropout=0.0)
    """

    def __call__(self, model: Any, x: Tensor, y: Any, noise: Streams) -> Tensor:
        """Losses (B,), one a sample."""


def uniform_weight(sde: SDE, t: Tensor) -> Tensor:
    """w = 1: every noise level counts alike (Ho et al. 2020, L_simple). Serves every SDE.

    >>> sg.training.uniform_weight(sg.VP(), torch.tensor([0.5]))
    tensor([1.], dtype=torch.float64)
    """
    return torch.ones_like(as_time(t))


def likelihood_weight(sde: SDE, t: Tensor) -> Tensor:
    """w = g^2 / sigma^2, which is g^2 on the score error: a bound on the negative log-likelihood.

    Under times uniform on [0, T] the loss, summed over coordinates, times T / 2 bounds it up to
    a constant (Song et al. 2021, "Maximum likelihood training", theorem 1). Of a matrix process,
    where noise enters one component v: G_vv^2 / L_vv^2, and the sum runs over that component.

    >>> sg.training.likelihood_weight(sg.EDM(), torch.tensor([2.0]))
    tensor([1.], dtype=torch.float64)
    """
    if isinstance(sde, LinearSDE):
        return (sde.diffusion(t) / sde.sigma(t)) ** 2
    if not isinstance(sde, MatrixSDE):
        raise TypeError(
            f"likelihood_weight needs a LinearSDE or MatrixSDE, got {type(sde).__name__}"
        )
    g, low = sde.diffusion(t), sde.sigma(t)
    if g[..., sde.driven, :].shape[-2] != 1:
        raise TypeError(
            f"{type(sde).__name__} drives several components: their errors weigh in the bound by"
            " a matrix, not by a number"
        )
    # G^T (s - target) = G^T L^-T (L^T s + z); L^-T is upper, so of the last row one entry is left.
    return square(g)[..., -1, -1] / low[..., -1, -1] ** 2


@dataclass(frozen=True)
class KarrasWeight:
    """w = 1 + (r / c)^2, which is (r^2 + c^2) / (r c)^2 on the denoiser's error.

    That is 1 / c_out^2 of Karras et al. (2022, table 1): a preconditioned network has its raw
    output weighted 1 at every level, and the score of N(0, c^2 I) on such data has loss 1.

    Args:
        data_std: the standard deviation c of the data.

    >>> sg.training.KarrasWeight(0.5)(sg.EDM(), torch.tensor([0.5]))
    tensor([2.], dtype=torch.float64)
    """

    data_std: float = 1.0

    def __post_init__(self) -> None:
        set_number(self, "data_std", above=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """1 + (r / c)^2 at times t, (B,)."""
        r2 = torch.exp(-_kernel(sde, "KarrasWeight").log_snr(t))
        return (1 + r2 / self.data_std**2) / _visibility(sde, t)


@dataclass(frozen=True)
class MinSNRWeight:
    """w = min(1, gamma r^2), which is min(SNR, gamma) on the denoiser's error, SNR = 1 / r^2.

    Source: Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", section 3.4.

    >>> sg.training.MinSNRWeight(5.0)(sg.EDM(), torch.tensor([0.1, 1.0]))
    tensor([0.0500, 1.0000], dtype=torch.float64)
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        set_number(self, "gamma", above=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """min(1, gamma r^2) at times t, (B,)."""
        r2 = torch.exp(-_kernel(sde, "MinSNRWeight").log_snr(t))
        return (self.gamma * r2).clamp_max(1) / _visibility(sde, t)


def flow_weight(sde: SDE, t: Tensor) -> Tensor:
    """w = (1 + r)^2, which is 1 on the error of the flow u = z - x_0 (Lipman et al. 2023).

    With ``LogNormalTimes(0, 1)`` the objective of Esser et al. (2024), on any process: on straight
    paths sigma / alpha is t / (1 - t), so t is logit-normal where that is log-normal.

    >>> sg.training.flow_weight(sg.EDM(), torch.tensor([1.0]))
    tensor([4.], dtype=torch.float64)
    """
    r = torch.exp(-0.5 * _kernel(sde, "flow_weight").log_snr(t))
    return (1 + r) ** 2 / _visibility(sde, t)


def _visibility(sde: SDE, t: Tensor) -> Tensor | float:
    """The part of the noise residual that is the residual of the data's statistic."""
    return sde.visibility(t) if isinstance(sde, MatrixSDE) else 1.0


def _kernel(sde: SDE, name: str) -> KernelSDE:
    if not isinstance(sde, KernelSDE):
        raise TypeError(
            f"{name} needs a LinearSDE, which has a signal-to-noise ratio; for"
            f" {type(sde).__name__} use uniform_weight"
        )
    return sde


def uniform_times(sde: SDE, u: Tensor) -> Tensor:
    """Times uniform from where grids end (sigma / alpha = 0.005) to T.

    >>> sg.training.uniform_times(sg.VP(), torch.tensor([1.0]))
    tensor([1.], dtype=torch.float64)
    """
    start, u = default_end(sde), as_time(u, "u")
    return start + (sde.T - start) * u


@dataclass(frozen=True)
class LogNormalTimes:
    """log(sigma / alpha) ~ N(log_mean, log_std^2), cut to what the process reaches.

    Karras et al. (2022) draw sigma with (-1.2, 1.2) for data of spread 0.5, that is (-0.5, 1.2)
    for data of unit spread; the wider default also covers the finest and the coarsest levels.
    The lower cut is where grids end.

    >>> sg.training.LogNormalTimes()(sg.EDM(), torch.tensor([0.5])).log()
    tensor([-1.1765], dtype=torch.float64)
    """

    log_mean: float = -1.2
    log_std: float = 1.8

    def __post_init__(self) -> None:
        set_number(self, "log_mean")
        set_number(self, "log_std", above=0)

    def __call__(self, sde: SDE, u: Tensor) -> Tensor:
        """Times (B,) for uniform numbers u (B,)."""
        linear = _kernel(sde, "LogNormalTimes")
        low, high = (
            torch.special.ndtr((-0.5 * linear.log_snr(t) - self.log_mean) / self.log_std)
            for t in (default_end(linear), linear.T)
        )
        z = torch.special.ndtri(float(low) + (float(high) - float(low)) * u)
        t = linear.time_at(-2 * (self.log_mean + self.log_std * z))
        return t.clamp(default_end(linear), linear.T)


@dataclass(frozen=True)
class InformationTimes:
    """Times uniform in information, log det(I + C / w) with w = (sigma / alpha)^2.

    Under it the likelihood's integrand is constant on Gaussian data of covariance C: its density
    is as the denoiser's error over w, by which one draw of a time estimates the whole bound
    (``chain.bound``) with the least variance. For C = v I the time is that of
    w = v / (exp(2 I) - 1).

    Args:
        reference: C: a variance, or ``Moments``.
        end: the earliest time; where grids end, by default.

    >>> sg.training.InformationTimes(0.25)(sg.VP(), torch.rand(8)).shape
    torch.Size([8])
    """

    reference: float | Moments = 1.0
    end: float | None = None

    def __post_init__(self) -> None:
        as_moments(self.reference)
        if self.end is not None:
            set_number(self, "end", above=0)

    def __call__(self, sde: SDE, u: Tensor) -> Tensor:
        """Times (B,) for uniform numbers u (B,)."""
        kernel, known = _kernel(sde, "InformationTimes"), as_moments(self.reference)
        end = default_end(kernel) if self.end is None else self.end
        ends = torch.tensor([end, kernel.T], dtype=torch.float64)
        low, high = known.information(torch.exp(-kernel.log_snr(ends)).clamp_max(1e200))
        i = low + (high - low) * as_time(u, "u")
        return kernel.time_at(-torch.log(noise_of(known, i))).clamp(end, kernel.T)


def dsm_loss(
    score: ScoreFunction,
    sde: SDE,
    x: Tensor,
    t: Tensor,
    weighting: Weighting = uniform_weight,
    noise: Source = None,
) -> Tensor:
    """w(t) mean |std s(x_t, t) + z|^2, one loss a sample: (B, *D) -> (B,).

    The mean runs over the coordinates; of a matrix process, whose std is the lower triangle L of
    its covariance and whose residual is L^T s + z, over the components that noise enters: only
    there is a score ever read, and only there it need be right. Both terms are of order one, so
    nothing is lost where std is small: the score's target -z / std is never formed. For a process
    without a kernel std and z are those of the last simulated step. Under ``torch.autocast`` the
    score alone is read in half precision.

    Args:
        score: (x, t) -> the shape of x.
        sde: any forward process.
        x: clean data (B, *D).
        t: times (B,) or (), positive.
        weighting: (sde, t) -> the weight of the noise residual.
        noise: of the noisy data, as in ``sde.perturb``.

    Raises:
        TypeError: integer data; a weighting that needs a LinearSDE.
        ValueError: the score's shape is not that of the state.

    >>> law, x = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.randn(8, 2)
    >>> sg.dsm_loss(law, sg.VP(), x, torch.full((8,), 0.5)).shape
    torch.Size([8])
    """
    check_callable(score, "score", "score(x, t)")
    check_kind(sde, SDE, "sde", "an SDE, such as VP()")
    check_state(x)
    t, half = as_time(t), user_precision(x.device.type)
    with full_precision(x.device.type):
        p = sde.perturb(x, t, noise)
        with half:
            s = score(p.x, t)
        check_tensor(s, "the score's result")
        if s.shape != p.x.shape:
            raise ValueError(
                f"the score has shape {tuple(s.shape)} for a state {tuple(p.x.shape)}"
            )
        residual = p.residual(s.to(x.dtype)).square()
        if isinstance(sde, MatrixSDE):
            residual = residual[:, sde.driven]
        loss = residual.flatten(1).mean(1) if residual.ndim > 1 else residual
        return match(weighting(sde, t), loss) * loss


def drop(context: dict[str, Tensor], probability: float, noise: Streams) -> dict[str, Tensor]:
    """Conditions, each replaced by "nothing" (labels by -1, the rest by NaN) with a probability.

    Of several conditions half of this is of all at once, as guidance asks for the score without
    any, and half of each by itself, so that every one can be left away alone.
    """
    if not context:
        return context
    first, *_ = context.values()
    u = noise.uniform(first.flatten(1)[:, 0] if first.ndim > 1 else first, "label dropout")
    if len(context) == 1:
        return {name: _without(v, u < probability) for name, v in context.items()}
    half = probability / 2
    dropped = {}
    for name, v in context.items():
        alone = noise.uniform(u, f"dropout of {name}") * (1 - half) < half
        dropped[name] = _without(v, (u < half) | alone)
    return dropped


def _without(v: Tensor, absent: Tensor) -> Tensor:
    nothing = torch.nan if v.is_floating_point() else -1
    return torch.where(absent.reshape(-1, *(1,) * (v.ndim - 1)), nothing, v)


def context_of(
    y: Context, n: int, dropout: float, noise: Streams, declared: Container[str] = ()
) -> dict[str, Tensor]:
    """What a network of n samples is given beside x, by name, with labels and what the network
    declares (``score.takes``) dropped now and then."""
    context = dict(y) if isinstance(y, dict) else {} if y is None else {"y": y}
    if "y" in context:
        labels = as_labels(context["y"])
        if labels.shape != (n,):
            raise ValueError(
                f"labels y must be ({n},), as many as rows of x, got {tuple(labels.shape)}"
            )
        context["y"] = labels
    droppable = {k: v for k, v in context.items() if k == "y" or k in declared}
    return {**context, **drop(droppable, dropout, noise)}


@dataclass(frozen=True)
class Denoising:
    """Score matching of a ``ScoreNetwork``, with evenly spread times and dropout of conditions.

    Args:
        weighting: None is ``KarrasWeight`` of the std that the model knows.
        times: the density of noise levels.
        dropout: the probability with which each condition (a label, a vector, an image, a
            sequence) is left away, which classifier-free guidance needs (Ho & Salimans 2022: 0.1
            to 0.2); 0 where no guidance is meant.

    >>> sg.training.Denoising(sg.training.MinSNRWeight(), dropout=0.0).dropout
    0.0
    """

    weighting: Weighting | None = None
    times: TimeSampler = field(default_factory=LogNormalTimes)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        set_number(self, "dropout", least=0, most=1)

    def __call__(self, model: Any, x: Tensor, y: Context, noise: Streams) -> Tensor:
        """``dsm_loss`` of the batch in the units of the process, (B,)."""
        return self._loss(model, model, x, y, noise)

    def _loss(
        self, model: Any, read: Callable[..., Tensor], x: Tensor, y: Context, noise: Streams
    ) -> Tensor:
        """The loss of ``read(x, t, **context)``, the score that the model gives."""
        inner = getattr(model, "module", model)
        if not isinstance(getattr(inner, "facts", None), Facts):
            raise TypeError(f"model must be a ScoreNetwork, got {shown(model)}")
        check_state(x)
        check_kind(noise, Streams, "noise", "Streams")
        x, t = inner.clean(x, noise), self.times(inner.sde, noise.spread(len(x), x.device))
        weighting = self.weighting or KarrasWeight(inner.facts.std)
        context = context_of(y, len(x), self.dropout, noise, inner.takes)
        return dsm_loss(lambda x, t: read(x, t, **context), inner.sde, x, t, weighting, noise)


@dataclass(frozen=True)
class Uncertainty(Denoising):
    """exp(-u) l + u, l the loss of ``Denoising``: each noise level weighs as it can be told.

    u is the mean of what the network's head says (``UNet(..., head=True)``). Its best value is
    log E[l | x_t], so that every level, and every state, counts by how far above its least its
    loss is and not by how large that is; the best score stays what it is, since u depends on the
    noisy state alone.

    Source: Kendall & Gal 2017, equation 8; Karras et al. 2024 (EDM2), equation 21, where u
    depends on the noise level alone.

    >>> sg.training.Uncertainty(dropout=0.0).dropout
    0.0
    """

    def __call__(self, model: Any, x: Tensor, y: Context, noise: Streams) -> Tensor:
        """exp(-u) l + u of the batch, (B,)."""
        heads: list[Tensor | None] = []

        def read(x: Tensor, t: Tensor, **context: Tensor) -> Tensor:
            e = model(x, t, whole=True, **context)
            heads.append(e.head)
            score: Tensor = e.score
            return score

        loss = self._loss(model, read, x, y, noise)
        if heads[0] is None:
            raise TypeError("the network has no head to tell its uncertainty by: head=True")
        u = heads[0].to(loss).flatten(1).mean(1)
        return torch.exp(-u) * loss + u


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a classifier of noisy data: what ``Classifier`` guides by.

    Args:
        sde: the process that noises the data; facts: what is known of them, as in ``Classifier``.
        times: the density of noise levels.

    >>> sg.training.Classification(sg.VP()).times(sg.VP(), torch.tensor([0.5])).shape
    torch.Size([1])
    """

    sde: LinearSDE
    facts: Facts = field(default_factory=Facts)
    times: TimeSampler = field(default_factory=LogNormalTimes)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None, noise: Streams) -> Tensor:
        """``classifier_loss`` of the batch, (B,)."""
        if y is None:
            raise ValueError("a classifier needs labels")
        x, t = self.facts.encode(x), self.times(self.sde, noise.spread(len(x), x.device))
        return classifier_loss(model, self.sde, x, y, t, self.facts.std, noise)
