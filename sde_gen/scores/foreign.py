"""Networks in other people's conventions as scores, and ours in theirs.

A network that was trained elsewhere differs from ``ScoreNetwork`` in what it sees, and in nothing
else: the state in another scale, the noise level as a step number, a time or a sigma, and an
output that is read as one of the table's. ``Foreign`` holds these three; four functions know who
does what:

    from_diffusers   eps, x_0, v or u of a step number k                diffusers' models
    from_denoiser    D(x / alpha, sigma / alpha)                        EDM, k-diffusion's wrappers
    from_noise       eps(x, index of t)                                 DDPM and score-SDE code
    from_velocity    u(x, time), with the data at time 0 or 1           flow matching

What a network is bound to keeps its own names: ``score.given(class_labels=3)``.

A network knows the noise levels that it was trained on, and nothing beside them. Asked for
another, it is asked at the nearest of them, once with a warning: nearer to the data the score is
held, s_t(x) = (alpha_c / alpha) s_c((alpha_c / alpha) x), farther from them the denoised state,
D_t(x) = D_c((sigma_c / sigma) x). Either changes little there: the score of smooth data has a
limit at t = 0, the denoised state one where no signal is left.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..facts import Facts
from ..moments import handed
from ..ops import Time, as_time, check_callable, check_kind, check_number, lasting, match, on_host
from ..schedules import Tabulated
from ..sdes import EDM, VP, Evaluation, KernelSDE, LinearSDE, RectifiedFlow
from .network import Levels, Prediction, ScoreNetwork, check_positive, fitted

_MOST = 1e4
"""The largest sigma / alpha that a denoiser is asked for, where it does not tell its own."""

Index = Callable[[Tensor], Tensor]
"""t float64, () or (B,) -> what a network takes in its place, of the same shape."""


@dataclass(frozen=True)
class Steps:
    """The step number k = 0 .. N - 1 of a chain at any time: node k + 1 of its clock is step k.

    Between two nodes k is linear in log SNR (where the last node has no signal, in alpha^2), or
    the nearer node's.

    Args:
        sde: variance preserving, on a ``Tabulated`` clock.
        rounded: whole numbers, int64, for a network that takes no others.

    Raises:
        TypeError: another process.

    >>> steps = Steps(VP(Tabulated([0.1, 0.2, 0.3], T=3.0)))
    >>> steps(torch.tensor([1.0, 2.0, 3.0]))
    tensor([0., 1., 2.], dtype=torch.float64)
    """

    sde: VP
    rounded: bool = False
    _nodes: Tensor = field(init=False, repr=False, compare=False)
    """log SNR at the nodes, falling."""

    def __post_init__(self) -> None:
        if not (isinstance(self.sde, VP) and isinstance(self.sde.schedule, Tabulated)):
            raise TypeError(f"steps are those of VP(Tabulated(betas)), got {self.sde!r}")
        n = len(self.sde.schedule.betas)
        with lasting():  # now, and not in a graph that is traced
            t = torch.arange(1, n + 1, dtype=torch.float64, device="cpu") * (self.sde.T / n)
            object.__setattr__(self, "_nodes", self.sde.log_snr(t))

    def __call__(self, t: Time) -> Tensor:
        """k at times t, clamped to 0 .. N - 1."""
        level, nodes = self.sde.log_snr(t), self._nodes
        nodes = nodes.to(level.device)
        last = max(len(nodes) - 2, 0)
        k = (torch.searchsorted(-nodes, -level.contiguous(), right=True) - 1).clamp(0, last)
        low, high = nodes[k], nodes[(k + 1).clamp_max(len(nodes) - 1)]
        # Of a node without signal: alpha^2 = 1 / (1 + exp(-log SNR)) falls to 0.
        share = torch.where(
            high.isinf(),
            1 - torch.sigmoid(level) / torch.sigmoid(low),
            (level - low) / torch.where(high < low, high - low, -1.0),
        )
        step = k + share.clamp(0, 1)
        return step.round().long() if self.rounded else step


class Foreign(ScoreNetwork):
    """A network in conventions of its own as a score.

    Args:
        net: ``net(x, index, **context)`` -> F, the index one number a sample (B,); of twice the
            channels, the second half is the ``head`` of an ``Evaluation``.
        sde: the linear process whose states it was trained on.
        prediction, facts: as in ``ScoreNetwork``; a shape or deviation that a network of images
            tells (``config``, ``img_resolution``, ``sigma_data``) need not be in the facts.
        index: what it takes for the time t; t itself by default.
        span: the first and last time that it was trained on; all of (0, T] by default.
        relative: whether it takes x / alpha, and not x.

    Raises:
        TypeError: a process that is not linear. ValueError: a span that does not lie in [0, T].

    >>> type(sg.scores.from_noise(lambda x, t: x, sg.VP())).__name__
    'Foreign'
    """

    sde: LinearSDE

    def __init__(
        self,
        net: Callable[..., Any],
        sde: LinearSDE,
        prediction: Prediction,
        facts: Facts | None = None,
        index: Index | None = None,
        span: tuple[float, float] | None = None,
        relative: bool = False,
    ) -> None:
        check_callable(net, "net", "net(x, index)")
        check_kind(sde, LinearSDE, "sde", "a LinearSDE, such as VP()")
        if index is not None:
            check_callable(index, "index", "index(t)")
        near, far = (0.0, sde.T) if span is None else span
        near = check_number(near, "the first time of span", least=0, below=sde.T)
        far = check_number(far, "the last time of span", above=near, most=sde.T * (1 + 1e-9))
        module = net if isinstance(net, nn.Module) else _Function(net)
        super().__init__(module, sde, prediction, told(net, facts))
        self.index, self.span, self.relative = index, (near, min(far, sde.T)), relative
        self.end = near or None
        self._native, self._warned = sde, False

    def under(self, sde: KernelSDE) -> Foreign:
        """The same network under another linear process, as ``ScoreNetwork.under``."""
        check_kind(sde, LinearSDE, "sde", "a LinearSDE, such as VP()")
        other = super().under(sde)
        assert isinstance(other, Foreign)
        near, far = (matched(self.sde, t, other.sde) for t in torch.tensor(self.span).double())
        other.span = (float(near) if self.span[0] else 0.0), float(far)
        other.end = other.span[0] or None
        return other

    def _evaluate(self, x: Tensor, t: Time, context: dict[str, Any]) -> Evaluation:
        self._check(x)
        t = as_time(t)
        check_positive(t, self.sde)
        near, far = self.span
        if on_host(t.device):
            if bool(((near <= t) & (t <= far)).all()):
                return self._trained(x, t, context)
            self._warn(t)
        u = t.clamp(near, far)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        up, down = self.sde.alpha(u) / alpha, self.sde.sigma(u) / sigma
        scale = torch.where(t > far, down, torch.where(t < near, up, 1.0))
        e = self._trained(match(scale, x) * x, u, context)
        early, late = (match(v.to(t), x).to(x.device).bool() for v in (t < near, t > far))
        pull = (match(alpha, x) * e.denoised - x) / match(sigma, x) ** 2
        score = torch.where(late, pull, match(scale, x) * e.score)

        def denoised() -> Tensor:
            held = self.sde.tweedie(x, torch.where(t > far, near, t), score)
            return torch.where(early, held, e.denoised)

        return Evaluation(score, denoised, e.head)

    def _trained(self, x: Tensor, t: Tensor, context: dict[str, Any]) -> Evaluation:
        """At a level that the network was trained on."""
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        native, scale = self._native, None
        if native is not self.sde:
            t = matched(self.sde, t, native)
            scale = native.sigma(t) / sigma
        if self.relative:
            scale = 1 / alpha
        scaled = x if scale is None else match(scale, x) * x
        scaled, index = fitted(self.net, scaled, t if self.index is None else self.index(t))
        rows = handed(index.reshape(-1), x.device).expand(x.shape[0])
        levels: Levels = (alpha, sigma, sigma)
        return self._ask(x, scaled, rows, levels, context)

    def _warn(self, t: Tensor) -> None:
        if self._warned:
            return
        self._warned = True
        near, far = self.span
        warnings.warn(
            f"the network was trained for times {near:.6g} .. {far:.6g} of its process and is"
            f" asked at {float(t.min()):.6g} .. {float(t.max()):.6g}: beyond, the score (nearer to"
            " the data) or the denoised state is held. Grids with start=, end= of .span stay"
            " inside. This is said once",
            stacklevel=2,
        )


def matched(sde: LinearSDE, t: Tensor, other: LinearSDE) -> Tensor:
    """The time of another process with the noise to signal of this one at t, or the nearest."""
    level = sde.log_snr(t).clamp_min(float(other.log_snr(other.T)))
    return other.time_at(level).clamp_max(other.T)


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, index: Tensor, **context: Any) -> Any:
        return self.function(x, index, **context)


def told(net: Any, facts: Facts | None) -> Facts:
    """The facts, with what a network of images tells of shape and deviation where they do not."""
    if facts is None:
        std = getattr(net, "sigma_data", None)
        facts = Facts() if std is None else Facts(std=float(std))
    if facts.shape is not None:
        return facts
    size, channels = getattr(net, "img_resolution", None), getattr(net, "img_channels", None)
    config = getattr(net, "config", None)
    if config is not None and size is None:
        size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if size is None or channels is None:
        return facts
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    return replace(facts, shape=(channels, *sides))


def from_denoiser(
    denoiser: Callable[..., Any],
    sde: LinearSDE | None = None,
    *,
    facts: Facts | None = None,
    span: tuple[float, float] | None = None,
) -> Foreign:
    """A denoiser D(y, sigma, **context) of y = x_0 + sigma z as a score: EDM's networks (Karras et
    al. 2022), and the wrappers of k-diffusion.

    On any linear process y = x / alpha and sigma stands for sigma / alpha.

    Args:
        denoiser: (y (B, *D), sigma (B,)) -> (B, *D). Labels go by name, as in EDM's
            ``score.given(class_labels=one_hot)``.
        sde: ``EDM`` up to the network's ``sigma_max`` by default, or to 80.
        facts: shape and deviation are read off ``img_channels``, ``img_resolution`` and
            ``sigma_data`` where the network has them.
        span: the times that it was trained on; by default those of the network's ``sigma_min``
            and ``sigma_max`` where it has them.

    >>> model = sg.scores.from_denoiser(lambda x, sigma: 0 * x, facts=sg.Facts((2,)))
    >>> model(torch.ones(1, 2), 2.0)
    tensor([[-0.2500, -0.2500]])
    """
    low, high = (_finite(denoiser, name) for name in ("sigma_min", "sigma_max"))
    if sde is None:
        sde = EDM() if high is None else EDM(high)
    check_kind(sde, LinearSDE, "sde", "a LinearSDE, such as EDM()")
    if span is None:
        span = 0.0 if low is None else _time_of(sde, low), _time_of(sde, high or _MOST)
    return Foreign(denoiser, sde, "data", facts, _Ratio(sde), span, relative=True)


def _finite(net: object, name: str) -> float | None:
    value = getattr(net, name, None)
    value = None if value is None else float(value)
    return value if value and math.isfinite(value) else None


def _time_of(sde: LinearSDE, ratio: float) -> float:
    return min(float(sde.time_at(-2 * math.log(ratio))), sde.T)


@dataclass(frozen=True)
class _Ratio:
    """sigma / alpha at t."""

    sde: LinearSDE

    def __call__(self, t: Tensor) -> Tensor:
        return self.sde.sigma(t) / self.sde.alpha(t)


def from_noise(
    eps: Callable[..., Any],
    sde: LinearSDE,
    *,
    index: Index | None = None,
    facts: Facts | None = None,
    span: tuple[float, float] | None = None,
) -> Foreign:
    """A network eps(x, index, **context) that predicts the noise in x = alpha x_0 + sigma z.

    Args:
        index: what the network takes for the time t of the process; t itself by default,
            ``lambda t: 999 * t`` in score-SDE code, ``Steps(sde)`` for the step numbers of a chain
            (``VP(Tabulated(betas, T=N))``).
        facts: what is known of the data: at least their shape, for ``sample``.
        span: the times that it was trained on: with ``Steps``, from the first node on; all by
            default.

    >>> model = sg.scores.from_noise(lambda x, t: x, sg.VP(), facts=sg.Facts((2,)))
    >>> model(torch.ones(1, 2), 1.0).shape
    torch.Size([1, 2])
    """
    if span is None and isinstance(index, Steps):
        span = index.sde.T / len(index._nodes), index.sde.T
    return Foreign(eps, sde, "noise", facts, index, span)


def from_velocity(
    u: Callable[..., Any],
    *,
    data_at: Literal[0, 1],
    facts: Facts | None = None,
    span: tuple[float, float] | None = None,
) -> Foreign:
    """A velocity u(x, time, **context) of straight paths between data and noise as a score.

    Args:
        u: (x (B, *D), time (B,)) -> dx / dtime, (B, *D).
        data_at: the time at which the data are: 1 in Lipman et al. (2023), Liu et al. (2023) and
            torchcfm, x_t = (1 - t) z + t x_0; 0 in Esser et al. (2024) and diffusers.
        facts: what is known of the data: at least their shape, for ``sample``.
        span: the times of ``RectifiedFlow`` (0 at the data) that it was trained on.

    Raises:
        ValueError: data at another time than 0 or 1.

    >>> sg.scores.from_velocity(lambda x, t: x, data_at=1, facts=sg.Facts((2,))).sde
    RectifiedFlow()
    """
    check_callable(u, "u", "u(x, time)")
    facts = told(u, facts)
    if data_at not in (0, 1):
        raise ValueError(f"data_at must be 0 or 1, the time of the data, got {data_at!r}")
    if data_at == 1:
        return Foreign(_Backward(u), RectifiedFlow(), "flow", facts, _from_noise, span)
    return Foreign(u, RectifiedFlow(), "flow", facts, None, span)


def _from_noise(t: Tensor) -> Tensor:
    return 1 - t


class _Backward(nn.Module):
    """The velocity of time that runs from the data to the noise."""

    def __init__(self, u: Callable[..., Any]) -> None:
        super().__init__()
        self.u = u

    def forward(self, x: Tensor, time: Tensor, **context: Any) -> Tensor:
        return -self.u(x, time, **context)
