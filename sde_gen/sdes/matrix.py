"""Linear processes whose coefficients are matrices: dX = A(t) X dt + G(t) dW.

A state is (B, k, *rest): the matrices act on axis 1, and everything behind it are independent
copies. The kernel is Gaussian, with a transition matrix and a covariance that obey

    Phi' = A Phi,      Sigma' = A Sigma + Sigma A^T + G G^T,      Phi_0 = 1.

Data may be the whole of the state, or its first component, to which others were added
(velocities) that start from a Gaussian of their own. Then the state is a noisy measurement of the
data, x_t = alpha x_0 + L z with L L^T = Sigma, and all that it says of them is one statistic,

    y = W alpha^T Sigma^-1 x_t = x_0 + noise of covariance W,      W = (alpha^T Sigma^-1 alpha)^-1.

So 1 / W is the signal-to-noise ratio of a matrix process, and the score of the state follows from
the score s_y of y, which is that of a scalar process (``Channel``):

    s(x_t) = -(Sigma^-1 - Sigma^-1 alpha W alpha^T Sigma^-1) x_t + Sigma^-1 alpha W s_y(y).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise import Source, normal_like
from ..ops import Time, act, as_real, as_time, cholesky, lasting, sum_rest
from ..schedules import Power, Schedule
from .base import Clocked, KernelSDE, Perturbed, check_input

Rows = Sequence[Sequence[float]]

_LEAST = 1e-300
"""Signal-to-noise ratio below which there is no signal."""


class Correlated(Perturbed):
    """A noised state x = mean + L z with the lower triangle L as ``std``, (k, k) or (B, k, k).

    >>> sg.CriticallyDamped().perturb(torch.zeros(8, 2), torch.full((8,), 0.5)).std.shape
    torch.Size([8, 2, 2])
    """

    @property
    def score(self) -> Tensor:
        """grad log N(x; mean, L L^T) = -L^-T noise."""
        return act(-torch.linalg.inv(self.std).mT, self.noise)

    def residual(self, score: Tensor) -> Tensor:
        """L^T score + noise; its last r components need the last r of the score alone."""
        return act(self.std.mT, score) + self.noise


class Channel(NamedTuple):
    """What a state says of the data, at times of shape S: y = pick x = x_0 + noise.

    s(x) = pick^T s_y(y) - rest x.

    Attributes:
        pick: (*S, m, k), the statistic from the state.
        noise: W (*S, m, m), the covariance of its noise.
        rest: (*S, k, k), the precision of what the state says beside it.

    >>> sg.CriticallyDamped().channel(torch.tensor([0.5])).pick.shape
    torch.Size([1, 1, 2])
    """

    pick: Tensor
    noise: Tensor
    rest: Tensor


class MatrixSDE(KernelSDE):
    """dX = A(t) X dt + G(t) dW for matrices A and G that act on axis 1 of the state (B, k, *rest).

        x_t = alpha_t x_0 + sigma_t z,    alpha = Phi_t (its first column where x_0 is the first
        component alone),    sigma = the lower Cholesky factor of Sigma_t.

    A subclass gives ``rate`` (A), ``diffusion`` (G) and ``T``; the moments follow from their
    equations by scipy's DOP853, once, to 1e-11 of their size (a covariance below 1e-13 is lost).

    >>> sg.CriticallyDamped().alpha(0.5).shape
    torch.Size([2, 1])
    """

    added: tuple[float, ...] = ()
    """Variances at t = 0 of the components behind the first, which is then the data; () where
    all components are data."""
    driven: slice = slice(None)
    """The components that noise enters, a last part of them: where the score is read."""

    @abstractmethod
    def rate(self, t: Time) -> Tensor:
        """A(t), (*S, k, k) for t of shape S, in 1 / time."""

    @property
    def size(self) -> int:
        """k, the number of components."""
        return self.rate(0.0).shape[-1]

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """A(t) x."""
        return act(self.rate(as_time(t)), x)

    @cached_property
    def _path(self) -> Any:
        """Phi and the covariance that the noise added, flat, as functions of time."""
        import numpy as np
        from scipy.integrate import solve_ivp

        k, one = self.size, np.eye(self.size)

        def slope(t: float, y: Any) -> Any:
            phi, v = y.reshape(2, k, k)
            a, g = self.rate(t).numpy(), self.diffusion(t).numpy()
            return np.stack([a @ phi, a @ v + v @ a.T + g @ g.T]).ravel()

        start = np.stack([one, 0 * one]).ravel()
        run = solve_ivp(
            slope, (0, self.T), start, "DOP853", dense_output=True, rtol=1e-11, atol=1e-14
        )
        if not run.success:
            raise RuntimeError(f"the moments of {type(self).__name__}: {run.message}")
        return run.sol

    def _moments(self, t: Time) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        flat = torch.from_numpy(self._path(t.detach().cpu().numpy().ravel())).to(t.device)
        phi, v = flat.reshape(2, self.size, self.size, -1).movedim(-1, 1)
        shape = (*t.shape, self.size, self.size)
        return phi.reshape(shape), ((v + v.mT) / 2).reshape(shape)

    def transition(self, t: Time) -> Tensor:
        """Phi_t, (*S, k, k): the mean of x_t given the whole of x_0."""
        return self._moments(t)[0]

    def spread(self, t: Time) -> Tensor:
        """The covariance (*S, k, k) that noise added since t = 0."""
        return self._moments(t)[1]

    def covariance(self, t: Time) -> Tensor:
        """Sigma_t, (*S, k, k): the covariance of x_t given the data."""
        v = self.spread(t)
        if not self.added:
            return v
        free = self.transition(t)[..., 1:]
        start = torch.tensor(self.added, dtype=v.dtype, device=v.device)
        return v + (free * start) @ free.mT

    def alpha(self, t: Time) -> Tensor:
        """What the data are multiplied by: (*S, k, k), or (*S, k, 1) for a first component."""
        phi = self.transition(t)
        return phi[..., :1] if self.added else phi

    def sigma(self, t: Time) -> Tensor:
        """The lower Cholesky factor of Sigma_t, (*S, k, k)."""
        return cholesky(self.covariance(t))

    def channel(self, t: Time) -> Channel:
        """What the state says of the data at time t."""
        t = as_time(t)
        at = t[..., None, None]
        alpha, low = self.alpha(t), self.sigma(t)
        one = torch.eye(self.size, dtype=low.dtype, device=low.device)
        # At t = 0 the covariance is singular and the limit is known: y is the data's own part.
        low = torch.where(at > 0, low, one)
        white = torch.linalg.solve_triangular(low, alpha, upper=False)
        # Where nothing is left of the data this is 0: the least that it is given changes no digit.
        least = _LEAST * torch.eye(alpha.shape[-1], dtype=low.dtype, device=low.device)
        noise = torch.linalg.inv(white.mT @ white + least)
        root = torch.linalg.inv(low)
        pick = noise @ white.mT @ root
        left = root - white @ pick
        rest = left.mT @ left
        m = alpha.shape[-1]
        start = torch.tensor([math.inf] * m + list(self.added), dtype=t.dtype, device=t.device)
        return Channel(
            torch.where(at > 0, pick, one[:m]),
            torch.where(at > 0, noise, 0.0),
            torch.where(at > 0, rest, torch.diag(1 / start)),
        )

    def log_snr(self, t: Time) -> Tensor:
        """-log W, where W is a matrix the mean of -log of its eigenvalues; infinite at 0."""
        noise = self.channel(t).noise
        return -torch.logdet(noise) / noise.shape[-1]

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        """log-SNR, rising, and the times of it, for ``time_at`` to start from."""
        with lasting():
            t = self.T * torch.logspace(0, -8, 2000, dtype=torch.float64)
            return self.log_snr(t), t

    def time_at(self, log_snr: Time) -> Tensor:
        """By secants in the logarithm of time, from a table."""
        level = as_time(log_snr)
        known, times = (v.to(level.device) for v in self._levels)
        i = torch.searchsorted(known, level.contiguous()).clamp(1, len(known) - 1)
        # A secant from a bracket of 1 % in the logarithm of time, in which it is nearly a line.
        u, v = times[i - 1].log(), times[i].log()
        f, g = known[i - 1] - level, known[i] - level
        for _ in range(3):
            step = torch.where(g == f, 0.0, g * (v - u) / torch.where(g == f, 1.0, g - f))
            u, f, v = v, g, v - step
            g = self.log_snr(v.exp().clamp_max(self.T)) - level
        return v.exp().clamp_max(self.T)

    def lift(self, x: Tensor) -> Tensor:
        """Data as components: (B, *D) -> (B, 1, *D) where they are the first of several."""
        return x.unsqueeze(1) if self.added else x

    def data(self, x: Tensor) -> Tensor:
        """The first component where others were added, else all."""
        return x[:, 0] if self.added else x

    def state_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(k, *D) where components were added, else *D."""
        return (self.size, *shape) if self.added else shape

    def statistic(self, x: Tensor, c: Channel) -> Tensor:
        """y = x_0 + noise, all that the state says of the data: (B, k, *rest) -> (B, *D)."""
        return self.data(act(c.pick, x))

    def state_score(self, x: Tensor, s_y: Tensor, c: Channel) -> Tensor:
        """The score of the state from that of its statistic, (B, *D) -> (B, k, *rest)."""
        return act(c.pick.mT, self.lift(s_y)) - act(c.rest, x)

    def visibility(self, t: Time) -> Tensor:
        """The share of the driven score's variance, given the data, that comes from them: (*S).

        1 where noise enters all that is data (then nothing else is in the score).
        """
        c = self.channel(t)
        lift, rest = c.pick.mT[..., self.driven, :], c.rest[..., self.driven, self.driven]
        seen = lift @ torch.linalg.solve(c.noise, lift.mT)
        share = torch.linalg.solve(rest + seen, seen)
        return share.diagonal(dim1=-2, dim2=-1).mean(-1)

    def begin(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        normals: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The state at t = 0 of data x (B, *D), what is added drawn from its own law.

        Args:
            x: data.
            generator: source of the normals that it is made of, on the device of x.
            normals: these normals, shaped like x, one for each variance in ``added``.

        Returns:
            (B, k, *rest), and the log density (B,) in nats of what was drawn, 0 if nothing:
            log p(state) less it is an unbiased estimate of log p(x) from below.
        """
        parts, log_q = [self.lift(x)], x.new_zeros(len(x))
        if normals is None:
            normals = [normal_like(x, generator, "added") for _ in self.added]
        for variance, z in zip(self.added, normals, strict=True):
            parts.append(math.sqrt(variance) * z.unsqueeze(1))
            log_q = log_q - 0.5 * sum_rest(z**2 + math.log(2 * math.pi * variance))
        return torch.cat(parts, 1), log_q

    def perturb(self, x: Tensor, t: Time, noise: Source = None) -> Correlated:
        """Draw the state x_t = alpha_t x + L_t z exactly, for data x (B, *D) and t () or (B,)."""
        t = check_input(self, x, t)
        mean, low = act(self.alpha(t), self.lift(x)), self.sigma(t)
        z = normal_like(mean, noise, "perturb")
        return Correlated(mean + act(low, z), mean, low, z)

    def tweedie(self, x: Tensor, t: Time, s: Tensor, mean: Tensor | None = None) -> Tensor:
        """Tweedie: E[x_0 | x_t] = y + W s_y, (B, k, *rest) -> (B, *D).

        s_y is found from the driven components of the score, the only ones that are ever read.

        Raises:
            TypeError: there are not as many driven components as there are of the data.
        """
        t = check_input(self, x, t)
        c = self.channel(t)
        lift = c.pick.mT[..., self.driven, :]
        if lift.shape[-1] != lift.shape[-2]:
            raise TypeError(
                f"{type(self).__name__} has {lift.shape[-2]} driven components for data of"
                f" {lift.shape[-1]}: their score does not say what the data are"
            )
        s_y = (s + act(c.rest, x))[:, self.driven]
        y = act(c.pick, x) + act(c.noise @ torch.linalg.inv(lift), s_y)
        return self.data(y)

    def prior(
        self,
        *shape: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw states (B, k, *rest) at t = T from N(0, Sigma_T): the law that p_T tends to."""
        z = torch.randn(*shape, generator=generator, dtype=dtype, device=device)
        return act(self.sigma(self.T), z)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, Sigma_T) in nats, (B, k, *rest) -> (B,)."""
        low = self.sigma(self.T)
        z, n = act(torch.linalg.inv(low), x), x[0].numel()
        volume = n / self.size * float(low.diagonal().log().sum())
        return -0.5 * sum_rest(z**2) - volume - 0.5 * n * math.log(2 * math.pi)


@dataclass(frozen=True)
class MatrixOrnsteinUhlenbeck(Clocked, MatrixSDE):
    """dX = beta a X dt + sqrt(beta) g dW for constant matrices a and g, on a clock.

    Phi = exp(a B). The covariance comes from its Taylor series at B / 2^j, doubled j times by
    V(2 B) = V(B) + Phi V(B) Phi^T: sums of covariances, so that all digits stay. (Van Loan's
    block exponential holds exp(-a B), which grows: after a long time little is left beside it.)
    At rest a V + V a^T + g g^T = 0.

    Args:
        a: drift (k, k), the real parts of whose eigenvalues are negative.
        g: noise (k, k).
        schedule: the clock; ``Power(1, T)`` is the one on the wall.

    Raises:
        ValueError: matrices that are not square or of different sizes, an ``a`` that is not
            stable, a singular ``g`` whose noise ``a`` does not carry to all components.

    >>> sde = sg.MatrixOrnsteinUhlenbeck([[-1.0, 1.0], [-1.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]])
    >>> sde.sigma(0.5).shape
    torch.Size([2, 2])
    """

    a: Rows
    g: Rows
    schedule: Schedule = field(default_factory=lambda: Power(1.0, T=5.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        # Tuples: a process is a value, compared, hashed and written to JSON.
        for name in ("a", "g"):
            m = as_real(getattr(self, name), name)
            if m.ndim != 2 or m.shape[0] != m.shape[1]:
                raise ValueError(f"{name} must be a square matrix, got shape {tuple(m.shape)}")
            object.__setattr__(self, name, tuple(map(tuple, m.tolist())))
        if len(self.a) != len(self.g):
            raise ValueError(f"a is of size {len(self.a)}, g of size {len(self.g)}")
        if not bool((torch.linalg.eigvals(self._constants[0]).real < 0).all()):
            raise ValueError("a must be stable: the real parts of its eigenvalues negative")
        if not _reaches_all(*self._constants):
            raise ValueError(
                f"g is singular, and a does not carry its noise to every component: x_t would have"
                f" no density; got g = {self.g}, a = {self.a}"
            )

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor]:
        with lasting():
            a, g = (torch.tensor(m, dtype=torch.float64) for m in (self.a, self.g))
            return a, g

    def _at(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """beta or B, to be multiplied by matrices, where they are needed."""
        t = as_time(t)
        a, g = (m.to(t.device) for m in self._constants)
        return t, a, g

    @property
    def size(self) -> int:
        """k."""
        return len(self.a)

    def rate(self, t: Time) -> Tensor:
        """A, for every time."""
        t, a, _ = self._at(t)
        return self.schedule.beta(t)[..., None, None] * a

    def diffusion(self, t: Time) -> Tensor:
        """G, for every time."""
        t, _, g = self._at(t)
        return torch.sqrt(self.schedule.beta(t))[..., None, None] * g

    def transition(self, t: Time) -> Tensor:
        """exp(A t)."""
        t, a, _ = self._at(t)
        return torch.linalg.matrix_exp(a * self.schedule.integral(t)[..., None, None])

    def spread(self, t: Time) -> Tensor:
        """int exp(A u) G G^T exp(A^T u) du over [0, t], by doubling."""
        t, a, g = self._at(t)
        b = self.schedule.integral(t)[..., None, None]
        size = 2 * float(torch.linalg.matrix_norm(a, 1)) * float(b.max())
        doublings = max(0, math.ceil(math.log2(max(size, 1e-300))) + 1)
        h = b / 2**doublings
        term = total = h * (g @ g.T)
        for n in range(2, 16):
            term = h / n * (a @ term + term @ a.T)
            total = total + term
        phi = torch.linalg.matrix_exp(a * h)
        for _ in range(doublings):
            total, phi = total + phi @ total @ phi.mT, phi @ phi
        return (total + total.mT) / 2


def _reaches_all(a: Tensor, g: Tensor) -> bool:
    """Kalman's condition that the covariance is regular: [g, a g, a^2 g, ...] has full rank."""
    blocks = [g / g.abs().max().clamp_min(1e-300)]
    for _ in range(len(a) - 1):
        blocks.append(a @ blocks[-1] / torch.linalg.matrix_norm(a, 1))
    return int(torch.linalg.matrix_rank(torch.cat(blocks, 1), rtol=1e-9)) == len(a)
