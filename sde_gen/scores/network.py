"""Learned scores: one class, one table.

A network F sees the state scaled to unit variance and the noise level, and its output is read as

    noise           z
    data            x_0
    velocity        (alpha z - sigma x_0) / hypot(alpha, sigma)  (Salimans & Ho 2022)
    flow            u = z - x_0                                  (Lipman et al. 2023)
    score           s
    preconditioned  (x_0 - c_skip y) / c_out, y = x / alpha      (Karras et al. 2022)

Each reading is a pair of coefficients in score = a x + b F; they are written without cancellation,
computed in float64, and meet the network's output only after it has left half precision. u is
dx_t / dt on the straight path x_t = (1 - t) x_0 + t z (``RectifiedFlow``). At the same ratio of
noise to signal x / (alpha + sigma) lies on that path, so u is read on every process.

Of a state that holds more than the data (``CriticallyDamped``) the network sees the one statistic
y = x_0 + sqrt(W) z that speaks of them: it is the network of a scalar process with alpha = 1 and
sigma = sqrt(W), and its score becomes that of the state (``sdes.Channel``).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..facts import Facts
from ..ops import (
    Time,
    as_time,
    batch_of,
    check_callable,
    check_choice,
    check_kind,
    check_state,
    check_time,
    match,
    on_host,
)
from ..sdes import (
    Channel,
    Evaluation,
    KernelSDE,
    LinearSDE,
    MatrixSDE,
    at_rest,
    evaluating,
    resting,
)
from .base import Score

Prediction = Literal["noise", "data", "velocity", "flow", "score", "preconditioned"]
Alias = Literal["epsilon", "v", "x0"]
"""Other names of the first three."""
Levels = tuple[Tensor, Tensor, Tensor]
"""alpha, sigma and log(sigma / alpha), which is finite where alpha is not."""


class Reading(NamedTuple):
    """What an output F says: score = score_x x + score_f F and D = data_x x + data_f F."""

    score_x: Tensor
    score_f: Tensor
    data_x: Tensor
    data_f: Tensor


def _noise(alpha: Tensor, sigma: Tensor, c: float) -> Reading:
    return Reading(torch.zeros_like(sigma), -1 / sigma, 1 / alpha, -sigma / alpha)


def _data(alpha: Tensor, sigma: Tensor, c: float) -> Reading:
    one = torch.ones_like(sigma)
    return Reading(-1 / sigma**2, alpha / sigma**2, 0 * one, one)


def _velocity(alpha: Tensor, sigma: Tensor, c: float) -> Reading:
    # v = cos(phi) z - sin(phi) x_0, tan(phi) = sigma / alpha (Salimans & Ho 2022): by the angle,
    # which is the same under every process; with alpha and sigma in place of its cosine and sine
    # it would be another number where alpha^2 + sigma^2 is not 1, and a large one under EDM.
    n = alpha**2 + sigma**2
    root = torch.sqrt(n)
    return Reading(-1 / n, -alpha / (sigma * root), alpha / n, -sigma / root)


def _flow(alpha: Tensor, sigma: Tensor, c: float) -> Reading:
    n = alpha + sigma
    return Reading(-1 / (sigma * n), -alpha / (sigma * n), 1 / n, -sigma / n)


def _score(alpha: Tensor, sigma: Tensor, c: float) -> Reading:
    return Reading(torch.zeros_like(sigma), torch.ones_like(sigma), 1 / alpha, sigma**2 / alpha)


def _preconditioned(alpha: Tensor, sigma: Tensor, c: float) -> Reading:
    # Karras et al. 2022, table 1, in alpha and sigma: the score of N(0, c^2) plus a residual.
    v = (alpha * c) ** 2 + sigma**2
    root = torch.sqrt(v)
    return Reading(-1 / v, alpha * c / (sigma * root), alpha * c**2 / v, sigma * c / root)


_TABLE: dict[str, Callable[[Tensor, Tensor, float], Reading]] = {
    "noise": _noise,
    "data": _data,
    "velocity": _velocity,
    "flow": _flow,
    "score": _score,
    "preconditioned": _preconditioned,
}
_ALIASES: dict[str, Prediction] = {"epsilon": "noise", "x0": "data", "v": "velocity"}
_MOST_NOISE = math.log(1e4)
"""The largest log(sigma / alpha) that a network is told: no signal is seen beyond it."""


class Learned(nn.Module, Score):
    """A score with weights: what is trained, saved and loaded.

    >>> isinstance(sg.ScoreNetwork(sg.networks.MLP((2,)), sg.VP()), sg.scores.Score)
    True
    """

    sde: KernelSDE

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters(), torch.empty(0)).device

    def fingerprint(self) -> str | None:
        """A name for the weights: the sums of their bits, which no order of summation changes."""
        total = hashlib.blake2b(digest_size=8)
        sums = [t.detach().contiguous().view(torch.uint8).sum() for t in self.parameters()]
        total.update(torch.stack(sums).cpu().numpy().tobytes() if sums else b"")
        return total.hexdigest()


class ScoreNetwork(Learned):
    """A network read as a score: s(x, t) = a(t) x + b(t) F(c_in x, c_noise, **context).

    c_in = 1 / sqrt(alpha^2 c^2 + sigma^2) and c_noise = 1/4 log(sigma / alpha), with c the
    standard deviation of the data: what the network sees depends on the noise level and not on
    the clock, so a network trained under one process serves under another (``under``). (On a
    matrix process x, alpha and sigma are y, 1 and sqrt(W).)

    Args:
        net: ``net(x, c_noise, **context)`` -> F of the shape of x, or of twice its first axis: the
            second half is then the ``head`` of an ``Evaluation`` (a learned variance).
        sde: a linear process, or a matrix one whose data are one component.
        prediction: what the output of the network stands for; "epsilon", "x0" and "v" are read as
            "noise", "data" and "velocity".
        facts: what is known of the data, ``Facts.of(x)``; c is their standard deviation. A shape
            that they do not tell is taken from ``net.shape``, where there is one.

    The network gets states in the dtype of its weights, whatever that of x, and the noise level in
    float32 or finer; the score comes in the dtype of x.

    In training mode the network has its dropout where it is called, as a loss does it, and not
    where a process, a solver or a likelihood reads it (``sdes.evaluate``).

    Raises:
        ValueError: unknown prediction; facts and network of different shapes; when called: t = 0
            or outside [0, T], a state or an output of the wrong shape.
        TypeError: a process without a kernel, or a matrix that mixes components of the data; when
            called: an integer or complex state, a network that returns no tensor.

    >>> model = sg.ScoreNetwork(sg.networks.MLP((2,)), sg.VP(), facts=sg.Facts((2,), std=0.5))
    >>> model(torch.zeros(8, 2), 0.5).shape
    torch.Size([8, 2])
    """

    singular = True

    def __init__(
        self,
        net: nn.Module,
        sde: KernelSDE,
        prediction: Prediction | Alias = "preconditioned",
        facts: Facts | None = None,
    ) -> None:
        super().__init__()
        check_callable(net, "net", "net(x, c_noise)")
        read: Prediction = _ALIASES.get(str(prediction), cast("Prediction", prediction))
        check_choice(read, _TABLE, "prediction")
        check_kind(facts, (Facts, type(None)), "facts", "Facts")
        check_one_component(sde)
        self.net, self.sde, self.prediction = net, sde, read
        self.facts = shaped(Facts() if facts is None else facts, getattr(net, "shape", None))

    def under(self, sde: KernelSDE) -> ScoreNetwork:
        """The same network under another process: the schedule of a trained denoiser changed.

        Its times are matched by the ratio of noise to signal, w = (sigma / alpha)^2: at
        ``sde.time_at(self.sde.log_snr(t))`` the denoised state of y = x / alpha is what it is here
        at t. The network, its facts and what it was tuned to are shared, not copied. It was
        trained on the ratios of its own process; of larger ones it can only guess.

        Raises:
            TypeError: as the constructor.
            ValueError: a network that predicts the score, which has the scale of its states.

        >>> from sde_gen import EDM, VP
        >>> from sde_gen.networks import MLP
        >>> model = ScoreNetwork(MLP((2,)), VP())
        >>> t, y = 0.3, torch.ones(1, 2)
        >>> s = EDM().time_at(VP().log_snr(t))
        >>> here = model.denoise(VP().alpha(t).float() * y, t)
        >>> torch.allclose(model.under(EDM()).denoise(y, s), here)
        True
        """
        check_one_component(sde)
        if self.prediction == "score" and not sde.agrees(self.sde):
            raise ValueError(
                f"a network that predicts the score of the states of {self.sde!r} says nothing of"
                f" those of {sde!r}: train one that predicts noise, data or velocity"
            )
        other = copy.copy(self)
        other.sde = sde
        return other

    @property
    def classes(self) -> int | None:
        """Number of classes of a conditional network, None otherwise."""
        return getattr(self.net, "classes", None)

    @property
    def takes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The conditions that the network declares, ``net.context``: shapes by name."""
        context = getattr(self.net, "context", None)
        return context if isinstance(context, Mapping) else {}

    def forward(self, x: Tensor, t: Time, whole: bool = False, **context: Any) -> Any:
        """s(x, t), (B, *state); with dropout in training mode, as a loss wants it.

        With ``whole`` the ``Evaluation`` (score, denoised state, head), for losses that read more
        than the score: whatever wraps the module (several processes) sees this one call.
        """
        e = self._evaluate(x, t, context)
        return e if whole else e.score

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """Score, denoised state and head from one call of the network, without dropout."""
        with resting():
            return self._evaluate(x, t, context)

    def _evaluate(self, x: Tensor, t: Time, context: dict[str, Any]) -> Evaluation:
        self._check(x)
        levels, c = _levels(self.sde, t)
        if c is None:
            return self._read(x, levels, context)
        assert isinstance(self.sde, MatrixSDE)
        e = self._read(self.sde.statistic(x, c), levels, context)
        return Evaluation(self.sde.state_score(x, e.score, c), lambda: e.denoised, e.head)

    def _check(self, x: Tensor) -> None:
        check_state(x)
        shape = self.facts.shape
        if shape is not None and x.shape[1:] != (wanted := self.sde.state_shape(shape)):
            raise ValueError(f"x must have shape {batch_of(wanted)}, got {tuple(x.shape)}")

    def _read(self, x: Tensor, levels: Levels, context: dict[str, Any]) -> Evaluation:
        scaled, level = _scaled(x, levels, self.facts.std)
        return self._ask(x, scaled, level, levels, context)

    def _ask(
        self, x: Tensor, scaled: Tensor, level: Tensor, levels: Levels, context: dict[str, Any]
    ) -> Evaluation:
        """One call of the network, net(scaled, level), read at the state x and its levels."""
        with at_rest(self.net) if evaluating() else nullcontext():
            f = self.net(*fitted(self.net, scaled, level), **context)
        f, head = _split(f, x)
        alpha, sigma, _ = levels
        r = _TABLE[self.prediction](alpha, sigma, self.facts.std)

        def denoised() -> Tensor:
            blind = self.prediction in ("noise", "score") and on_host(alpha.device)
            if blind and bool((alpha == 0).any()):
                raise ValueError(
                    f"a network that predicts the {self.prediction} says nothing of the data where"
                    " alpha = 0: start the grid a little before"
                )
            return match(r.data_x, x) * x + match(r.data_f, x) * f

        return Evaluation(match(r.score_x, x) * x + match(r.score_f, x) * f, denoised, head)


def fitted(net: nn.Module, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """State and noise level in the dtype of a network's weights (of x where it has none), the
    level in float32 at least: half precision cannot hold it."""
    weights = net.parameters() if isinstance(net, nn.Module) else ()
    dtype = next((p.dtype for p in weights if p.is_floating_point()), x.dtype)
    if level.is_floating_point():
        level = level.to(torch.promote_types(dtype, torch.float32))
    return x.to(dtype), level


def shaped(facts: Facts, shape: Sequence[int] | None) -> Facts:
    """The facts with the network's shape, which must be theirs."""
    if shape is None or facts.shape == tuple(shape):
        return facts
    if facts.shape is not None:
        raise ValueError(f"the data of facts have shape {facts.shape}, the network {tuple(shape)}")
    return replace(facts, shape=tuple(shape))


def _split(f: object, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A network's output in the dtype of x: the part that is read, and the rest."""
    if isinstance(f, Tensor) and f.shape == x.shape:
        return f.to(x.dtype), None
    if isinstance(f, Tensor) and x.ndim > 1:
        twice = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if f.shape == twice:
            first, second = f.to(x.dtype).chunk(2, 1)
            return first, second
    got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
    raise ValueError(f"the network returned {got} for a state {tuple(x.shape)}")


def check_one_component(sde: object) -> None:
    """Raise TypeError unless x_t, or a statistic of it, is alpha x_0 + sigma z with numbers."""
    if not isinstance(sde, LinearSDE | MatrixSDE):
        raise TypeError(
            f"sde must be a LinearSDE, got {type(sde).__name__}: for other processes train a"
            " score (x, t) of your own with dsm_loss"
        )
    if isinstance(sde, MatrixSDE) and not sde.added and sde.size > 1:
        raise TypeError(
            f"{type(sde).__name__} mixes {sde.size} components of the data, which have no common"
            " noise level: give dsm_loss a score (x, t) of your own"
        )


def network_input(sde: KernelSDE, data_std: float, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """What a network sees: c_in x, of unit variance, and c_noise = 1/4 log(sigma / alpha).

    c_noise is () or (B,) like t, in the dtype of x.

    Raises:
        TypeError: an integer state. ValueError: t = 0, where c_noise is infinite, or outside
            [0, T].
    """
    check_state(x)
    check_one_component(sde)
    levels, c = _levels(sde, t)
    if isinstance(sde, MatrixSDE) and c is not None:
        x = sde.statistic(x, c)
    return _scaled(x, levels, data_std)


def check_positive(t: Tensor, sde: KernelSDE) -> None:
    """Raise ``ValueError`` unless a learned score can be read at these times."""
    check_time(t, sde.T)
    if on_host(t.device) and bool((t == 0).any()):
        raise ValueError(
            "a learned score is singular at t = 0: end the grid at a small positive time"
        )


def _levels(sde: KernelSDE, t: Time) -> tuple[Levels, Channel | None]:
    """The noise levels that a network sees; of a matrix process those of its statistic."""
    t = as_time(t)
    check_positive(t, sde)
    if isinstance(sde, MatrixSDE):
        c = sde.channel(t)
        sigma = c.noise[..., 0, 0].sqrt()
        return (torch.ones_like(sigma), sigma, sigma.log()), c
    assert isinstance(sde, LinearSDE)
    log_alpha, sigma = sde.log_alpha(t), sde.sigma(t)
    level = (sigma.log() - log_alpha).clamp_max(_MOST_NOISE)
    return (log_alpha.exp(), sigma, level), None


def _scaled(x: Tensor, levels: Levels, data_std: float) -> tuple[Tensor, Tensor]:
    alpha, sigma, level = levels
    c_in = torch.rsqrt((alpha * data_std) ** 2 + sigma**2)
    c_noise = match(0.25 * level, x)
    return match(c_in, x) * x, c_noise.flatten() if sigma.ndim else c_noise
