"""Forward processes dX = b(X, t) dt + g(t) dW on [0, T], and their time reversal.

Data sit at t = 0 and noise at t = T, for every process. With the score s(x, t) of the marginal
law p_t, each process has a whole family of partners with the *same* marginals, one for every
noise level eta >= 0 (Anderson 1982; Song et al. 2021, section 4; Huang et al. 2021):

    dX = [b - (1 + eta^2) / 2 g^2 s] dt + eta g dW,      time running from T to 0.

eta = 1 is Anderson's reverse-time SDE, eta = 0 the probability-flow ODE. That family is itself an
``SDE`` (``Reverse``), so whatever steps a process steps its reversal. Where g is a matrix, g^2
reads g g^T.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import Noise, Scaled, Source, normal_like
from ..ops import (
    Time,
    act,
    as_time,
    bisect,
    check_callable,
    check_state,
    check_time,
    match,
    set_number,
    square,
)
from ..schedules import Schedule
from .evaluation import Evaluation, ScoreFunction, evaluate


class Perturbed(NamedTuple):
    """A noised state and the Gaussian N(mean, std^2) that it was drawn from: x = mean + std z.

    For a linear process this is the law of x_t given x_0; for any other, the law of the last
    simulated step. Either way ``score`` is an unbiased target for denoising score matching
    (Vincent 2011).

    >>> x = sg.VP().perturb(torch.zeros(8, 2), 0.5)
    >>> torch.equal(x.x, x.mean + x.std * x.noise)
    True
    """

    x: Tensor
    mean: Tensor
    std: Tensor
    noise: Tensor

    @property
    def score(self) -> Tensor:
        """grad log N(x; mean, std^2) = -noise / std."""
        return -self.noise / self.std

    def residual(self, score: Tensor) -> Tensor:
        """std score + noise: of order one, and nothing is lost where std is small."""
        return self.std * score + self.noise


class SDE(ABC):
    """A diffusion dX = b(X, t) dt + g(t) dW on [0, T] with noise g that does not depend on X.

    >>> sg.VP().reverse(sg.Gaussian(sg.VP(), torch.zeros(2)), eta=1).diffusion(1.0)
    tensor(4.4721, dtype=torch.float64)
    """

    T: float
    direction: int = 1
    """+1: only makes sense with time rising; -1: only falling; 0: an ODE, both ways."""
    singular: bool = False
    """Whether the drift cannot be read at t = 0."""
    steps: int = 100
    """Euler-Maruyama steps from 0 to t that ``perturb`` takes where no kernel is known."""
    batch: int | None = None
    """How many samples what is bound per sample was given for; None: any number will do."""

    @abstractmethod
    def drift(self, x: Tensor, t: Time) -> Tensor:
        """b(x, t), (B, *D) -> (B, *D)."""

    @abstractmethod
    def diffusion(self, t: Time) -> Tensor:
        """g(t), of the shape of t, or matrices (*S, k, k) for t of shape S; float64."""

    def perturb(self, x: Tensor, t: Time, noise: Source = None) -> Perturbed:
        """Draw x_t given x_0 = x by Euler-Maruyama; the law returned is that of the last step.

        Args:
            x: clean data (B, *D).
            t: time () or (B,), positive.
            noise: a generator on the device of x, or ``Streams``: sample by sample.

        Raises:
            TypeError: x is not a floating-point tensor, or the noise is a matrix.
            ValueError: a time outside [0, T], or neither one nor B of them.
        """
        t = check_input(self, x, t)
        if self.diffusion(t).ndim > t.ndim:
            raise TypeError(
                f"{type(self).__name__} has a matrix for noise: derive it from MatrixSDE, or"
                " define its perturb"
            )
        h = t / self.steps
        g_h = torch.sqrt(h)
        for k in range(self.steps):
            mean = x + match(h, x) * self.drift(x, k * h)
            std = match(self.diffusion(k * h) * g_h, x)
            z = normal_like(x, noise, f"perturb {k}")
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
        ValueError: eta is negative or not finite; a score that says that it is of another linear
            process.
        TypeError: ``sde`` is already a reversal, or ``score`` cannot be called.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.Reverse(sg.VP(), law, eta=0.0).drift(torch.ones(8, 2), 0.5)[0]
    tensor([0., 0.])
    """

    sde: SDE
    score: ScoreFunction
    eta: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.sde, Reverse):
            raise TypeError("the process is already a Reverse; reverse its .sde instead")
        check_callable(self.score, "score", "score(x, t)")
        set_number(self, "eta", least=0)
        # Of the class: what wraps a score (torch.compile) hands on its methods.
        if getattr(type(self.score), "at_eta", None) is not None:
            object.__setattr__(self, "score", self.score.at_eta(self.eta))  # type: ignore[attr-defined]
        sde, of = self.sde, getattr(self.score, "sde", None)
        if isinstance(sde, KernelSDE) and isinstance(of, KernelSDE) and not sde.agrees(of):
            raise ValueError(
                f"the score is one of {of!r}, the process to reverse is {sde!r}: at the same"
                " time they have different marginals"
            )

    @property
    def T(self) -> float:  # type: ignore[override]
        """That of the process."""
        return self.sde.T

    @property
    def direction(self) -> int:  # type: ignore[override]
        """-1 with noise, 0 for the probability flow."""
        return -1 if self.eta > 0 else 0

    @property
    def singular(self) -> bool:  # type: ignore[override]
        """Whether the score is singular at t = 0."""
        return getattr(self.score, "singular", False)

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        """What the score is bound for."""
        bound: int | None = getattr(self.score, "batch", None)
        return self.sde.batch if bound is None else bound

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """b - (1 + eta^2) / 2 g^2 s, by one call of the score."""
        t = as_time(t)
        c = (1 + self.eta**2) / 2 * square(self.sde.diffusion(t))
        return self.sde.drift(x, t) - act(c, self.evaluate(x, t).score)

    def evaluate(self, x: Tensor, t: Time) -> Evaluation:
        """What one call of the score tells at (x, t): score, denoised state, and more."""
        return evaluate(self.score, x, as_time(t), self._tweedie)

    def _tweedie(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if not isinstance(self.sde, KernelSDE):
            raise TypeError(f"{type(self.sde).__name__} has no kernel to denoise by")
        return self.sde.tweedie(x, t, s)

    def diffusion(self, t: Time) -> Tensor:
        """eta g(t)."""
        return self.eta * self.sde.diffusion(t)

    def warmed(self, noise: Noise) -> tuple[Reverse, Noise]:
        """The same equation by the score of p, and its noise, where that of p^a is reversed.

        Langevin dynamics of p^a at noise level eta are those of p at sqrt(a) eta whose normals are
        divided by sqrt(a). In this form every solver knows how stiff they are.
        """
        a, score = getattr(self.score, "power_of", (1.0, self.score))
        if a == 1:
            return self, noise
        root = math.sqrt(a)
        return Reverse(self.sde, score, root * self.eta), Scaled(noise, 1 / root)

    def rows(self, index: slice | Tensor) -> Reverse:
        """Process and score for these rows."""
        return Reverse(self.sde.rows(index), rows_of(self.score, index), self.eta)


class KernelSDE(SDE):
    """A process with a Gaussian kernel: x_t = alpha_t x_0 + sigma_t z.

    The coefficients are numbers (``LinearSDE``) or matrices (``MatrixSDE``); in either case the
    log signal-to-noise ratio is one number that falls with time.

    >>> isinstance(sg.VP(), sg.sdes.KernelSDE)
    True
    """

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """What x_0 is multiplied by."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """What the normal z is multiplied by: the root of the covariance of x_t given x_0."""

    @abstractmethod
    def log_snr(self, t: Time) -> Tensor:
        """log of the signal-to-noise ratio, of the shape of t; falls, infinite at 0."""

    def time_at(self, log_snr: Time) -> Tensor:
        """The time at which the log signal-to-noise ratio has the given value."""
        return bisect(lambda t: -self.log_snr(t), -as_time(log_snr, "log_snr"), 0.0, self.T)

    @abstractmethod
    def tweedie(self, x: Tensor, t: Time, s: Tensor, mean: Tensor | None = None) -> Tensor:
        """Tweedie's formula: E[x_0 | x_t = x] from the score s there, in the shape of the data.

        Where alpha = 0 a score says nothing of the data: there it is their ``mean``, if given.
        """

    @abstractmethod
    def prior(
        self,
        *shape: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw states of the given shape (B, ...) at t = T from N(0, sigma_T sigma_T^T)."""

    @abstractmethod
    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log density in nats of what ``prior`` draws, (B, ...) -> (B,)."""

    def agrees(self, other: KernelSDE) -> bool:
        """Whether ``other`` noises data as this process does, up to the end of this one.

        Told from the kernels alone (to 1e-6): two objects, classes or clocks may be one process.
        """
        if self is other:
            return True
        if self.T > other.T * (1 + 1e-9):
            return False
        # Powers, so that no two clocks agree because their nodes are those of a table.
        t = min(self.T, other.T) * torch.linspace(0.02, 1, 17, dtype=torch.float64) ** 1.7
        kernels = [(p.alpha(t), p.sigma(t)) for p in (self, other)]
        pairs = [(_as(a, b), _as(b, a)) for a, b in zip(*kernels, strict=True)]
        return all(
            a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-6, atol=1e-12))
            for a, b in pairs
        )

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one state for data of shape *D."""
        return shape

    def data(self, x: Tensor) -> Tensor:
        """The part of a state that is data."""
        return x


def _as(c: Tensor, other: Tensor) -> Tensor:
    """Numbers as multiples of 1 beside matrices."""
    if c.ndim >= other.ndim:
        return c
    return c[..., None, None] * torch.eye(other.shape[-1], dtype=c.dtype)


class Clocked(SDE):
    """A process that runs on a clock, up to the clock's end."""

    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule such as Linear(), got {self.schedule!r}")

    @property
    def T(self) -> float:  # type: ignore[override]
        """Where the clock ends."""
        return self.schedule.T


def rows_of(score: ScoreFunction, index: slice | Tensor) -> ScoreFunction:
    """The score for a selection of the batch, whatever kind of function it is."""
    rows = getattr(score, "rows", None)
    return score if rows is None else rows(index)


def check_input(sde: SDE, x: Tensor, t: Time) -> Tensor:
    """The time as a tensor, after a look at state and time."""
    check_state(x)
    t = as_time(t)
    check_time(t, sde.T)
    return t
