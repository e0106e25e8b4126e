"""Learned scores: one class, one table.

A network F sees the state scaled to unit variance and the noise level, and its output is read as
the noise, the data, the velocity, the score, or EDM's preconditioned residual. Each reading is
a pair of coefficients in score = a x + b F; they are written without cancellation, computed in
float64, and meet the network's output only after it has left half precision.

Of a state that holds more than the data (``CriticallyDamped``) the network sees the one statistic
y = x_0 + sqrt(W) z that speaks of them: it is the network of a scalar process with alpha = 1 and
sigma = sqrt(W), and its score becomes that of the state (``sdes.Channel``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..ops import Time, as_time, batch_of, check_state, check_time, match
from ..sdes import Channel, KernelSDE, LinearSDE, MatrixSDE
from ..sdes.evaluation import at_rest, evaluating
from .base import Score

Prediction = Literal["noise", "data", "velocity", "score", "preconditioned"]
Coefficients = tuple[Tensor, Tensor]
Levels = tuple[Tensor, Tensor, Tensor]
"""alpha, sigma and log(sigma / alpha), which is finite where alpha is not."""


def _noise(alpha: Tensor, sigma: Tensor, c: float) -> Coefficients:
    return torch.zeros_like(sigma), -1 / sigma


def _data(alpha: Tensor, sigma: Tensor, c: float) -> Coefficients:
    return -1 / sigma**2, alpha / sigma**2


def _velocity(alpha: Tensor, sigma: Tensor, c: float) -> Coefficients:
    # v = alpha z - sigma x_0 (Salimans & Ho 2022)
    n = alpha**2 + sigma**2
    return -1 / n, -alpha / (sigma * n)


def _score(alpha: Tensor, sigma: Tensor, c: float) -> Coefficients:
    return torch.zeros_like(sigma), torch.ones_like(sigma)


def _preconditioned(alpha: Tensor, sigma: Tensor, c: float) -> Coefficients:
    # Karras et al. 2022, table 1, in alpha and sigma: the score of N(0, c^2) plus a residual.
    v = (alpha * c) ** 2 + sigma**2
    return -1 / v, alpha * c / (sigma * torch.sqrt(v))


_TABLE: dict[str, Callable[[Tensor, Tensor, float], Coefficients]] = {
    "noise": _noise,
    "data": _data,
    "velocity": _velocity,
    "score": _score,
    "preconditioned": _preconditioned,
}


class ScoreNetwork(nn.Module, Score):
    """A network read as a score: s(x, t) = a(t) x + b(t) F(c_in x, c_noise, **context).

    c_in = 1 / sqrt(alpha^2 c^2 + sigma^2) and c_noise = 1/4 log(sigma / alpha), with c the
    standard deviation of the data: what the network sees depends on the noise level and not on
    the clock, so a network trained under one clock can serve under another. (On a matrix process
    x, alpha and sigma are y, 1 and sqrt(W).)

    Args:
        net: ``net(x, c_noise, **context)`` -> tensor of the shape of x.
        sde: a linear process, or a matrix one whose data are one component.
        prediction: what the output of the network stands for.
        data_std: standard deviation c of the data, over all coordinates.
        shape: *D; taken from ``net.shape`` where the network has one.

    In training mode the network has its dropout where it is called, as a loss does it, and not
    where a process, a solver or a likelihood reads it (``sdes.evaluate``).

    Raises:
        ValueError: unknown prediction, ``data_std`` not positive; when called: t = 0 or outside
            [0, T], a state or an output of the wrong shape.
        TypeError: a process without a kernel, or a matrix that mixes components of the data; when
            called: an integer or complex state, a network that returns no tensor.
    """

    singular = True
    sde: KernelSDE

    def __init__(
        self,
        net: nn.Module,
        sde: KernelSDE,
        prediction: Prediction = "preconditioned",
        data_std: float = 1.0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if prediction not in _TABLE:
            raise ValueError(f"prediction must be one of {get_args(Prediction)}: {prediction!r}")
        if not data_std > 0:
            raise ValueError(f"data_std must be positive, got {data_std}")
        check_one_component(sde)
        known = shape if shape is not None else getattr(net, "shape", None)
        self.net, self.sde, self.prediction = net, sde, prediction
        self.data_std = float(data_std)
        self.shape = None if known is None else tuple(known)

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.empty(0)).device

    @property
    def classes(self) -> int | None:
        """Number of classes of a conditional network, None otherwise."""
        return getattr(self.net, "classes", None)

    def forward(self, x: Tensor, t: Time, **context: Any) -> Tensor:
        check_state(x)
        if self.shape is not None and x.shape[1:] != (wanted := self.sde.state_shape(self.shape)):
            raise ValueError(f"x must have shape {batch_of(wanted)}, got {tuple(x.shape)}")
        levels, c = _levels(self.sde, t)
        if c is None:
            return self._read(x, levels, context)
        assert isinstance(self.sde, MatrixSDE)
        return self.sde.state_score(x, self._read(self.sde.statistic(x, c), levels, context), c)

    def _read(self, x: Tensor, levels: Levels, context: dict[str, Any]) -> Tensor:
        with at_rest(self.net) if evaluating() else nullcontext():
            f = self.net(*_scaled(x, levels, self.data_std), **context)
        if not isinstance(f, Tensor) or f.shape != x.shape:
            got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"the network returned {got} for a state {tuple(x.shape)}")
        a, b = _TABLE[self.prediction](*levels[:2], self.data_std)
        return match(a, x) * x + match(b, x) * f.to(x.dtype)


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


def _levels(sde: KernelSDE, t: Time) -> tuple[Levels, Channel | None]:
    """The noise levels that a network sees; of a matrix process those of its statistic."""
    t = as_time(t)
    check_time(t, sde.T)
    if t.device.type == "cpu" and bool((t == 0).any()):
        raise ValueError(
            "a learned score is singular at t = 0: end the grid at a small positive time"
        )
    if isinstance(sde, MatrixSDE):
        c = sde.channel(t)
        sigma = c.noise[..., 0, 0].sqrt()
        return (torch.ones_like(sigma), sigma, sigma.log()), c
    assert isinstance(sde, LinearSDE)
    log_alpha, sigma = sde.log_alpha(t), sde.sigma(t)
    return (log_alpha.exp(), sigma, sigma.log() - log_alpha), None


def _scaled(x: Tensor, levels: Levels, data_std: float) -> tuple[Tensor, Tensor]:
    alpha, sigma, level = levels
    c_in = torch.rsqrt((alpha * data_std) ** 2 + sigma**2)
    c_noise = match(0.25 * level, x)
    return match(c_in, x) * x, c_noise.flatten() if sigma.ndim else c_noise
