"""Forward processes dX = b(X, t) dt + g(t) dW on [0, T], and their time reversal.

Data sit at t = 0 and noise at t = T, for every process. With the score s(x, t) of the marginal
law p_t, each process has a whole family of partners with the *same* marginals, one for every
noise level eta >= 0 (Anderson 1982; Song et al. 2021, section 4; Huang et al. 2021):

    dX = [b - (1 + eta^2) / 2 g^2 s] dt + eta g dW,      time running from T to 0.

eta = 1 is Anderson's reverse-time SDE, eta = 0 the probability-flow ODE. That family is itself an
``SDE`` (``Reverse``), so whatever steps a process steps its reversal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import Time, as_time, bisect, check_state, check_time, integrate, match, sum_rest
from .schedules import Geometric, Linear, Power, Schedule

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> grad_x log p_t(x): x (B, *D), t () or (B,), result (B, *D)."""


class Perturbed(NamedTuple):
    """A noised state and the Gaussian N(mean, std^2) that it was drawn from: x = mean + std z.

    For a linear process this is the law of x_t given x_0; for any other, the law of the last
    simulated step. Either way ``score`` is an unbiased target for denoising score matching
    (Vincent 2011).
    """

    x: Tensor
    mean: Tensor
    std: Tensor
    noise: Tensor

    @property
    def score(self) -> Tensor:
        """grad log N(x; mean, std^2) = -noise / std."""
        return -self.noise / self.std


class SDE(ABC):
    """A diffusion dX = b(X, t) dt + g(t) dW on [0, T] with noise g that does not depend on X."""

    T: float
    direction: int = 1
    """+1: only makes sense with time rising; -1: only falling; 0: an ODE, both ways."""
    singular: bool = False
    """Whether the drift cannot be read at t = 0."""
    steps: int = 100
    """Euler-Maruyama steps from 0 to t that ``perturb`` takes where no kernel is known."""

    @abstractmethod
    def drift(self, x: Tensor, t: Time) -> Tensor:
        """b(x, t), (B, *D) -> (B, *D)."""

    @abstractmethod
    def diffusion(self, t: Time) -> Tensor:
        """g(t), of the shape of t, float64."""

    def perturb(self, x: Tensor, t: Time, generator: torch.Generator | None = None) -> Perturbed:
        """Draw x_t given x_0 = x by Euler-Maruyama; the law returned is that of the last step.

        Args:
            x: clean data (B, *D).
            t: time () or (B,), positive.
            generator: source of the noise, on the device of x.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: a time outside [0, T], or neither one nor B of them.
        """
        t = _check(self, x, t)
        h = t / self.steps
        g_h = torch.sqrt(h)
        for k in range(self.steps):
            mean = x + match(h, x) * self.drift(x, k * h)
            std = match(self.diffusion(k * h) * g_h, x)
            z = _randn_like(x, generator)
            x = mean + std * z
        return Perturbed(x, mean, std, z)

    def reverse(self, score: ScoreFunction, eta: float = 1.0) -> Reverse:
        """The process with the same marginals that runs from T to 0 with noise level eta."""
        return Reverse(self, score, eta)

    def probability_flow(self, score: ScoreFunction) -> Reverse:
        """The ODE with the same marginals (eta = 0): runs both ways."""
        return Reverse(self, score, 0.0)

    def rows(self, index: slice | Tensor) -> SDE:
        """The same process for a selection of the batch: what is bound per sample follows."""
        return self


@dataclass(frozen=True)
class Reverse(SDE):
    """b - (1 + eta^2) / 2 g^2 s as drift, eta g as diffusion; the marginals of ``sde``.

    Time still runs in the units of ``sde`` and a solver steps it from T to 0. For eta > 0 the
    drift is the one of falling time, so a rising grid is refused (encode with eta = 0).

    Raises:
        ValueError: eta is negative or not finite.
        TypeError: ``sde`` is already a reversal, or ``score`` cannot be called.
    """

    sde: SDE
    score: ScoreFunction
    eta: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.sde, Reverse):
            raise TypeError("the process is already a Reverse; reverse its .sde instead")
        if not callable(self.score):
            raise TypeError(f"score must be callable as score(x, t), got {self.score!r}")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta must be a finite number >= 0, got {self.eta}")

    @property
    def T(self) -> float:  # type: ignore[override]
        return self.sde.T

    @property
    def direction(self) -> int:  # type: ignore[override]
        return -1 if self.eta > 0 else 0

    @property
    def singular(self) -> bool:  # type: ignore[override]
        return getattr(self.score, "singular", False)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        t = as_time(t)
        c = (1 + self.eta**2) / 2 * self.sde.diffusion(t) ** 2
        s = self.score(x, t)
        if s.shape != x.shape:
            raise ValueError(
                f"the score returned shape {tuple(s.shape)} for a state {tuple(x.shape)}"
            )
        return self.sde.drift(x, t) - match(c, x) * s

    def diffusion(self, t: Time) -> Tensor:
        return self.eta * self.sde.diffusion(t)

    def rows(self, index: slice | Tensor) -> Reverse:
        return Reverse(self.sde.rows(index), _rows(self.score, index), self.eta)


class LinearSDE(SDE):
    """dX = f(t) X dt + g(t) dW, with the Gaussian kernel x_t = alpha_t x_0 + sigma_t z.

        alpha_t = exp int_0^t f,      sigma_t^2 = int_0^t (alpha_t / alpha_u)^2 g_u^2 du.

    A subclass gives ``rate`` (f) and ``diffusion`` (g); all else follows by Gauss-Legendre
    quadrature in float64. Closed forms are overrides for speed, tested against this base.
    """

    @abstractmethod
    def rate(self, t: Time) -> Tensor:
        """f(t), in 1 / time."""

    def drift(self, x: Tensor, t: Time) -> Tensor:
        return match(self.rate(as_time(t)), x) * x

    def log_alpha(self, t: Time) -> Tensor:
        """log alpha_t = int_0^t f(u) du."""
        return integrate(self.rate, 0.0, t)

    def alpha(self, t: Time) -> Tensor:
        """Signal level alpha_t: the factor that x_0 has shrunk by at time t."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Time) -> Tensor:
        """Noise level sigma_t: the standard deviation of x_t given x_0."""
        t = as_time(t)

        def variance_rate(u: Tensor) -> Tensor:
            decay = 2 * (self.log_alpha(t).unsqueeze(-1) - self.log_alpha(u))
            return torch.exp(decay) * self.diffusion(u) ** 2

        return torch.sqrt(integrate(variance_rate, 0.0, t))

    def log_snr(self, t: Time) -> Tensor:
        """log of the signal-to-noise ratio alpha^2 / sigma^2; falls with t, infinite at 0."""
        return 2 * (self.log_alpha(t) - torch.log(self.sigma(t)))

    def time_at(self, log_snr: Time) -> Tensor:
        """The time at which the log signal-to-noise ratio has the given value."""
        return bisect(lambda t: -self.log_snr(t), -as_time(log_snr), 0.0, self.T)

    def perturb(self, x: Tensor, t: Time, generator: torch.Generator | None = None) -> Perturbed:
        """Draw x_t = alpha_t x + sigma_t z exactly, for t () or (B,)."""
        t = _check(self, x, t)
        mean, std = match(self.alpha(t), x) * x, match(self.sigma(t), x)
        z = _randn_like(x, generator)
        return Perturbed(mean + std * z, mean, std, z)

    def denoise(self, x: Tensor, t: Time, score: ScoreFunction) -> Tensor:
        """Tweedie's formula E[x_0 | x_t] = (x_t + sigma_t^2 s(x_t, t)) / alpha_t."""
        t = as_time(t)
        return (x + match(self.sigma(t) ** 2, x) * score(x, t)) / match(self.alpha(t), x)

    def prior(
        self,
        *shape: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a state at t = T from N(0, sigma_T^2): the law that p_T tends to."""
        z = torch.randn(*shape, generator=generator, dtype=dtype, device=device)
        return float(self.sigma(self.T)) * z

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, sigma_T^2 I) in nats, (B, *D) -> (B,)."""
        std = float(self.sigma(self.T))
        constant = math.log(std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * sum_rest((x / std) ** 2) - constant * x[0].numel()


class _Clocked(SDE):
    """A process that runs on a clock, up to the clock's end."""

    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule such as Linear(), got {self.schedule!r}")

    @property
    def T(self) -> float:  # type: ignore[override]
        return self.schedule.T


@dataclass(frozen=True)
class VP(_Clocked, LinearSDE):
    """Variance preserving: dX = -1/2 beta X dt + sqrt(beta) dW (Song et al. 2021, equation 11).

    alpha^2 = exp(-B), sigma^2 = 1 - exp(-B): an Ornstein-Uhlenbeck process on the clock B.
    """

    schedule: Schedule = field(default_factory=Linear)

    def rate(self, t: Time) -> Tensor:
        return -0.5 * self.schedule.beta(t)

    def diffusion(self, t: Time) -> Tensor:
        return torch.sqrt(self.schedule.beta(t))

    def log_alpha(self, t: Time) -> Tensor:
        return -0.5 * self.schedule.integral(t)

    def sigma(self, t: Time) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.schedule.integral(t)))

    def time_at(self, log_snr: Time) -> Tensor:
        # exp(-log_snr) = exp(B) - 1
        return self.schedule.time_at(torch.log1p(torch.exp(-as_time(log_snr))))


@dataclass(frozen=True)
class SubVP(_Clocked, LinearSDE):
    """Sub-VP: the drift of VP with g^2 = beta (1 - exp(-2 B)) (Song et al. 2021, equation 29).

    alpha^2 = exp(-B), sigma = 1 - exp(-B): at every time less noise than VP.
    """

    schedule: Schedule = field(default_factory=Linear)

    def rate(self, t: Time) -> Tensor:
        return -0.5 * self.schedule.beta(t)

    def diffusion(self, t: Time) -> Tensor:
        b = self.schedule.integral(t)
        return torch.sqrt(self.schedule.beta(t) * -torch.expm1(-2 * b))

    def log_alpha(self, t: Time) -> Tensor:
        return -0.5 * self.schedule.integral(t)

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(-self.schedule.integral(t))

    def time_at(self, log_snr: Time) -> Tensor:
        # exp(-log_snr / 2) = 2 sinh(B / 2)
        return self.schedule.time_at(2 * torch.asinh(torch.exp(-as_time(log_snr) / 2) / 2))


@dataclass(frozen=True)
class VE(_Clocked, LinearSDE):
    """Variance exploding: dX = sqrt(beta) dW (Song et al. 2021, equation 9).

    alpha = 1, sigma^2 = B: Brownian motion on the clock B.
    """

    schedule: Schedule = field(default_factory=Geometric)

    def rate(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        return torch.sqrt(self.schedule.beta(t))

    def log_alpha(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return torch.sqrt(self.schedule.integral(t))

    def time_at(self, log_snr: Time) -> Tensor:
        return self.schedule.time_at(torch.exp(-as_time(log_snr)))


@dataclass(frozen=True)
class EDM(VE):
    """VE on the clock sigma(t) = t, 0 <= t <= sigma_max (Karras et al. 2022)."""

    sigma_max: float = 80.0
    schedule: Schedule = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Power(2.0, T=self.sigma_max))


@dataclass(frozen=True)
class Wiener(VE):
    """Brownian motion dX = dW on [0, end]: alpha = 1, sigma^2 = t."""

    end: float = 1.0
    schedule: Schedule = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Power(1.0, T=self.end))


@dataclass(frozen=True)
class OrnsteinUhlenbeck(LinearSDE):
    """dX = a X dt + g dW with constant a < 0 and g > 0 (Uhlenbeck & Ornstein 1930).

    alpha = exp(a t), sigma^2 = g^2 (1 - exp(2 a t)) / (-2 a); at rest N(0, -g^2 / (2 a)).
    """

    a: float = -1.0
    g: float = math.sqrt(2.0)
    end: float = 5.0

    def __post_init__(self) -> None:
        if not (self.a < 0 < self.g and self.end > 0):
            raise ValueError(f"need a < 0, g > 0 and end > 0, got {self}")

    @property
    def T(self) -> float:  # type: ignore[override]
        return self.end

    def rate(self, t: Time) -> Tensor:
        return torch.full_like(as_time(t), self.a)

    def diffusion(self, t: Time) -> Tensor:
        return torch.full_like(as_time(t), self.g)

    def log_alpha(self, t: Time) -> Tensor:
        return self.a * as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return self.g * torch.sqrt(torch.expm1(2 * self.a * as_time(t)) / (2 * self.a))

    def time_at(self, log_snr: Time) -> Tensor:
        # exp(-log_snr) = g^2 (exp(-2 a t) - 1) / (-2 a)
        w = torch.exp(-as_time(log_snr))
        return torch.log1p(-2 * self.a / self.g**2 * w) / (-2 * self.a)


@dataclass(frozen=True)
class Langevin(_Clocked):
    """dX = 1/2 beta s(X) dt + sqrt(beta) dW for the score s of a target law.

    Started at its target it does not move in law: its reversal is itself and its probability
    flow stands still. VP is the Langevin process of N(0, I).

    Args:
        score: any score; it is read at the fixed time ``at`` (0: the data's own score; a small
            positive time for a network, whose score is singular at 0).
        schedule: the clock.

    Raises:
        ValueError: ``at`` is 0 where the score says that it is singular.
    """

    score: ScoreFunction
    schedule: Schedule = field(default_factory=Power)
    at: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at == 0 and getattr(self.score, "singular", False):
            raise ValueError(
                "the score is singular at t = 0: give Langevin a small positive time, at=..."
            )

    def drift(self, x: Tensor, t: Time) -> Tensor:
        return match(0.5 * self.schedule.beta(t), x) * self.score(x, as_time(self.at))

    def diffusion(self, t: Time) -> Tensor:
        return torch.sqrt(self.schedule.beta(t))

    def rows(self, index: slice | Tensor) -> Langevin:
        return replace(self, score=_rows(self.score, index))


def _rows(score: ScoreFunction, index: slice | Tensor) -> ScoreFunction:
    rows = getattr(score, "rows", None)
    return score if rows is None else rows(index)


def _check(sde: SDE, x: Tensor, t: Time) -> Tensor:
    check_state(x)
    t = as_time(t)
    check_time(t, sde.T)
    return t


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
