"""Linear processes whose coefficients are numbers: dX = f(t) X dt + g(t) dW."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..noise import Source, normal_like
from ..ops import Time, as_time, check_state, check_tensor, integrate, match, set_number, sum_rest
from ..schedules import Geometric, Linear, Power, Schedule
from .base import Clocked, KernelSDE, Perturbed, check_input


class LinearSDE(KernelSDE):
    """dX = f(t) X dt + g(t) dW, with the Gaussian kernel x_t = alpha_t x_0 + sigma_t z.

        alpha_t = exp int_0^t f,      sigma_t^2 = int_0^t (alpha_t / alpha_u)^2 g_u^2 du.

    A subclass gives ``rate`` (f) and ``diffusion`` (g); all else follows by Gauss-Legendre
    quadrature in float64. Closed forms are overrides for speed, tested against this base. f and g
    are numbers: the fast special case of ``MatrixSDE``.

    >>> sg.VP().log_snr(torch.tensor([0.1, 0.9])).shape
    torch.Size([2])
    """

    @abstractmethod
    def rate(self, t: Time) -> Tensor:
        """f(t), in 1 / time."""

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f(t) x."""
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

    def perturb(self, x: Tensor, t: Time, noise: Source = None) -> Perturbed:
        """Draw x_t = alpha_t x + sigma_t z exactly, for t () or (B,)."""
        t = check_input(self, x, t)
        mean, std = match(self.alpha(t), x) * x, match(self.sigma(t), x)
        z = normal_like(x, noise, "perturb")
        return Perturbed(mean + std * z, mean, std, z)

    def tweedie(self, x: Tensor, t: Time, s: Tensor, mean: Tensor | None = None) -> Tensor:
        """Tweedie's formula E[x_0 | x_t] = (x_t + sigma_t^2 s(x_t, t)) / alpha_t.

        Raises:
            ValueError: alpha = 0 at t, and no ``mean`` of the data to answer with.
        """
        check_state(x)
        check_tensor(s, "s")
        if s.shape != x.shape:
            raise ValueError(f"s must have the shape of x, {tuple(x.shape)}, got {tuple(s.shape)}")
        t = as_time(t)
        alpha, up = self.alpha(t), x + match(self.sigma(t) ** 2, x) * s
        if mean is None:
            if alpha.device.type == "cpu" and bool((alpha == 0).any()):
                raise ValueError(
                    "at a time t where alpha = 0 a score says nothing of the data: ask one that"
                    " denoises by itself (a ScoreNetwork that predicts data or velocity, an"
                    " exact score)"
                )
            return up / match(alpha, x)
        alpha = match(alpha, x)
        return torch.where(alpha == 0, mean.to(x), up / torch.where(alpha == 0, 1.0, alpha))

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
        check_state(x)
        std = float(self.sigma(self.T))
        constant = math.log(std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * sum_rest((x / std) ** 2) - constant * x[0].numel()


@dataclass(frozen=True)
class VP(Clocked, LinearSDE):
    """Variance preserving: dX = -1/2 beta X dt + sqrt(beta) dW (Song et al. 2021, equation 11).

    alpha^2 = exp(-B), sigma^2 = 1 - exp(-B): an Ornstein-Uhlenbeck process on the clock B.

    >>> t = torch.tensor(0.5)
    >>> sg.VP().alpha(t) ** 2 + sg.VP().sigma(t) ** 2
    tensor(1.0000, dtype=torch.float64)
    """

    schedule: Schedule = field(default_factory=Linear)

    def rate(self, t: Time) -> Tensor:
        """-beta / 2."""
        return -0.5 * self.schedule.beta(t)

    def diffusion(self, t: Time) -> Tensor:
        """sqrt(beta)."""
        return torch.sqrt(self.schedule.beta(t))

    def log_alpha(self, t: Time) -> Tensor:
        """-B / 2."""
        return -0.5 * self.schedule.integral(t)

    def sigma(self, t: Time) -> Tensor:
        """sqrt(1 - exp(-B))."""
        return torch.sqrt(-torch.expm1(-self.schedule.integral(t)))

    def time_at(self, log_snr: Time) -> Tensor:
        """By exp(-log_snr) = exp(B) - 1."""
        # exp(-log_snr) = exp(B) - 1
        level = -as_time(log_snr, "log_snr")
        return self.schedule.time_at(torch.logaddexp(level, torch.zeros_like(level)))


@dataclass(frozen=True)
class SubVP(Clocked, LinearSDE):
    """Sub-VP: the drift of VP with g^2 = beta (1 - exp(-2 B)) (Song et al. 2021, equation 29).

    alpha^2 = exp(-B), sigma = 1 - exp(-B): at every time less noise than VP.

    >>> float(sg.SubVP().sigma(1.0)) < float(sg.VP().sigma(1.0))
    True
    """

    schedule: Schedule = field(default_factory=Linear)

    def rate(self, t: Time) -> Tensor:
        """-beta / 2."""
        return -0.5 * self.schedule.beta(t)

    def diffusion(self, t: Time) -> Tensor:
        """sqrt(beta (1 - exp(-2 B)))."""
        b = self.schedule.integral(t)
        return torch.sqrt(self.schedule.beta(t) * -torch.expm1(-2 * b))

    def log_alpha(self, t: Time) -> Tensor:
        """-B / 2."""
        return -0.5 * self.schedule.integral(t)

    def sigma(self, t: Time) -> Tensor:
        """1 - exp(-B)."""
        return -torch.expm1(-self.schedule.integral(t))

    def time_at(self, log_snr: Time) -> Tensor:
        """By exp(-log_snr / 2) = 2 sinh(B / 2)."""
        # exp(-log_snr / 2) = 2 sinh(B / 2), which for large B is exp(B / 2)
        level = -as_time(log_snr, "log_snr")
        root = 2 * torch.asinh(torch.exp(level.clamp_max(100.0) / 2) / 2)
        return self.schedule.time_at(root + (level - 100.0).clamp_min(0.0))


@dataclass(frozen=True)
class VE(Clocked, LinearSDE):
    """Variance exploding: dX = sqrt(beta) dW (Song et al. 2021, equation 9).

    alpha = 1, sigma^2 = B: Brownian motion on the clock B.

    >>> float(sg.VE().alpha(0.5))
    1.0
    """

    schedule: Schedule = field(default_factory=Geometric)

    def rate(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        """sqrt(beta)."""
        return torch.sqrt(self.schedule.beta(t))

    def log_alpha(self, t: Time) -> Tensor:
        """0."""
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """sqrt(B)."""
        return torch.sqrt(self.schedule.integral(t))

    def time_at(self, log_snr: Time) -> Tensor:
        """By exp(-log_snr) = B."""
        return self.schedule.time_at(torch.exp(-as_time(log_snr, "log_snr")))


@dataclass(frozen=True)
class EDM(VE):
    """VE on the clock sigma(t) = t, 0 <= t <= sigma_max (Karras et al. 2022).

    >>> float(sg.EDM().sigma(3.0))
    3.0
    """

    sigma_max: float = 80.0
    schedule: Schedule = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_number(self, "sigma_max", above=0)
        object.__setattr__(self, "schedule", Power(2.0, T=self.sigma_max))


@dataclass(frozen=True)
class Wiener(VE):
    """Brownian motion dX = dW on [0, end]: alpha = 1, sigma^2 = t.

    >>> float(sg.Wiener().sigma(0.25))
    0.5
    """

    end: float = 1.0
    schedule: Schedule = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_number(self, "end", above=0)
        object.__setattr__(self, "schedule", Power(1.0, T=self.end))


@dataclass(frozen=True)
class RectifiedFlow(LinearSDE):
    """x_t = (1 - t) x_0 + t z on [0, 1]: straight paths from the data to the noise.

    alpha = 1 - t, sigma = t: the process of flow matching (Lipman et al. 2023, with t running the
    other way), rectified flow (Liu et al. 2023) and the linear interpolant (Albergo &
    Vanden-Eijnden 2023). As a diffusion dX = -X / (1 - t) dt + sqrt(2 t / (1 - t)) dW. Its
    probability flow is u = E[z - x_0 | x_t] = (x_t - D) / t, finite on (0, 1].

    At t = 1 no signal is left and drift and diffusion are infinite, although u is not: the
    exponential family starts there (``Exponential(1)`` is Euler's method for u), other solvers
    refuse and start a little before.

    >>> float(sg.RectifiedFlow().alpha(0.25))
    0.75
    """

    T = 1.0

    def rate(self, t: Time) -> Tensor:
        """-1 / (1 - t)."""
        return -1 / (1 - as_time(t))

    def diffusion(self, t: Time) -> Tensor:
        """sqrt(2 t / (1 - t))."""
        t = as_time(t)
        return torch.sqrt(2 * t / (1 - t))

    def log_alpha(self, t: Time) -> Tensor:
        """log(1 - t)."""
        return torch.log1p(-as_time(t))

    def alpha(self, t: Time) -> Tensor:
        """1 - t."""
        return 1 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        """t."""
        return as_time(t) + 0.0

    def time_at(self, log_snr: Time) -> Tensor:
        """1 / (1 + exp(log_snr / 2))."""
        return torch.sigmoid(-as_time(log_snr, "log_snr") / 2)


@dataclass(frozen=True)
class OrnsteinUhlenbeck(LinearSDE):
    """dX = a X dt + g dW with constant a < 0 and g > 0 (Uhlenbeck & Ornstein 1930).

    alpha = exp(a t), sigma^2 = g^2 (1 - exp(2 a t)) / (-2 a); at rest N(0, -g^2 / (2 a)).

    >>> float(sg.OrnsteinUhlenbeck(a=-1.0).alpha(0.0))
    1.0
    """

    a: float = -1.0
    g: float = math.sqrt(2.0)
    end: float = 5.0

    def __post_init__(self) -> None:
        set_number(self, "a", below=0)
        set_number(self, "g", above=0)
        set_number(self, "end", above=0)

    @property
    def T(self) -> float:  # type: ignore[override]
        """``end``."""
        return self.end

    def rate(self, t: Time) -> Tensor:
        """a."""
        return torch.full_like(as_time(t), self.a)

    def diffusion(self, t: Time) -> Tensor:
        """g."""
        return torch.full_like(as_time(t), self.g)

    def log_alpha(self, t: Time) -> Tensor:
        """a t."""
        return self.a * as_time(t)

    def sigma(self, t: Time) -> Tensor:
        """g sqrt((exp(2 a t) - 1) / (2 a))."""
        return self.g * torch.sqrt(torch.expm1(2 * self.a * as_time(t)) / (2 * self.a))

    def time_at(self, log_snr: Time) -> Tensor:
        """By a logarithm."""
        # exp(-log_snr) = g^2 (exp(-2 a t) - 1) / (-2 a)
        level = math.log(-2 * self.a / self.g**2) - as_time(log_snr, "log_snr")
        return torch.logaddexp(level, torch.zeros_like(level)) / (-2 * self.a)
