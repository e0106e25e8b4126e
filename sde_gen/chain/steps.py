"""A process seen at N times: the chain of the lectures, step by step.

With s the cleaner and t the noisier of two nodes, w = (sigma / alpha)^2 and r = w_s / w_t,

    q(x_t | x_s)      = N(alpha_t / alpha_s x_s, beta),            beta = sigma_t^2 (1 - r),
    q(x_s | x_t, x_0) = N(a x_t + b x_0, v~),                      v~ = sigma_s^2 (1 - r),
    a = r alpha_s / alpha_t,      b = alpha_s (1 - r),
    p(x_s | x_t)      = N(a x_t + b D(x_t), v_p),                  D the model's E[x_0 | x_t].

For v_p = v~ that is DDPM's ancestral step, ``Exponential(1)`` at eta = 1, and for data of
covariance C the right covariance is v~ + b^2 C / (1 + C / w_t), that of ``Exponential(1, C)``:
the reference changes the spread of a step and not its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import gaussians
from ..moments import Moments
from ..noise import Streams
from ..ops import (
    as_real,
    as_time,
    batch_of,
    check_choice,
    check_count,
    check_finite,
    check_kind,
    check_state,
    lasting,
    match,
    shown,
)
from ..sampling import sample, solve
from ..schedules import Tabulated
from ..scores import Score
from ..sdes import Evaluation, LinearSDE
from ..solvers import Exponential
from ..solvers.published import ddim
from .normal import Normal

Index = int | Tensor
"""The number of a node, 0 .. N, or (B,) of them, int64."""

Variance = Literal["small", "large", "learned"] | Moments | Tensor
"""The variance of the model's step: that of the posterior (``small``), of the forward step
(``large``), between the two in the logarithm by the model's head (``learned``); the right one for
Gaussian data (``Moments``), or the best that is one number, from the denoiser's mean squared
errors at the nodes (N,) (``Chain.errors``)."""

_NAMES = get_args(get_args(Variance)[0])


class Nodes(NamedTuple):
    """alpha, sigma and log SNR at the nodes 0 .. N, float64 (N + 1,) each."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor


@dataclass(frozen=True, eq=False)
class Chain:
    """x_0 -> x_1 -> ... -> x_N: a linear process at times 0 < t_1 < ... < t_N.

    States are in the units of the process, except where a method says otherwise.

    Args:
        sde: a linear process.
        times: the times of the nodes, a grid as ``grids`` makes it (falling) or rising; 0 is
            node 0 whether it is there or not. So a grid of N steps that ends above 0 makes N + 1
            of them, and one that ends ``to_zero`` N. None: the nodes of a ``Tabulated`` clock,
            which are DDPM's own.

    Attributes:
        times: (N + 1,), rising from 0: the time of each node by its number.

    Raises:
        TypeError: no linear process; no times, and no table to take them from.
        ValueError: times that are not monotone, or leave [0, T].

    >>> from sde_gen.sdes import VP
    >>> chain = Chain(VP(Tabulated([0.1, 0.2, 0.3])))
    >>> chain.times, chain.betas
    (tensor([0.0000, 0.3333, 0.6667, 1.0000], dtype=torch.float64),
     tensor([0.1000, 0.2000, 0.3000], dtype=torch.float64))
    """

    sde: LinearSDE
    times: Tensor = None  # type: ignore[assignment]

    def __init__(self, sde: LinearSDE, times: Tensor | Sequence[float] | None = None) -> None:
        check_kind(
            sde,
            LinearSDE,
            "sde",
            "a LinearSDE, such as VP() (of a matrix process log_prob and bits_per_dim tell bits)",
        )
        clock = getattr(sde, "schedule", None)
        if times is None:
            if not isinstance(clock, Tabulated):
                raise TypeError(
                    f"times must be given for {sde!r}: only a Tabulated clock has nodes of its own"
                )
            n = len(clock.betas)
            times = clock.T * torch.arange(1, n + 1, dtype=torch.float64) / n
        grid = as_real(times, "times").cpu().flatten()
        if len(grid) > 1 and grid[0] > grid[-1]:
            grid = grid.flip(0)
        grid = grid[1:] if len(grid) and float(grid[0]) == 0 else grid
        grid = torch.cat([grid.new_zeros(1), grid])
        if len(grid) < 2 or not bool((grid.diff() > 0).all()) or float(grid[-1]) > sde.T:
            raise ValueError(
                f"times must rise or fall strictly, positive and up to T = {sde.T:g}, got"
                f" {grid[1:].tolist()[:8]}"
            )
        object.__setattr__(self, "sde", sde)
        object.__setattr__(self, "times", grid)

    def __len__(self) -> int:
        """N, the number of steps."""
        return len(self.times) - 1

    @property
    def grid(self) -> Tensor:
        """The times as ``solve`` and ``sample`` take them: falling, to 0."""
        return self.times.flip(0)

    @cached_property
    def nodes(self) -> Nodes:
        """alpha, sigma and log SNR at the nodes."""
        with lasting():
            sde, t = self.sde, self.times
            log_snr = sde.log_snr(t)
            log_snr[0] = torch.inf
            return Nodes(sde.alpha(t), sde.sigma(t), log_snr)

    @property
    def betas(self) -> Tensor:
        """beta_i, the variance of q(x_i | x_(i-1)), (N,), of a subset of the steps its own.

        Of VP this is DDPM's, 1 - (alpha_i / alpha_(i-1))^2.
        """
        t = torch.arange(1, len(self) + 1)
        return self.nodes.sigma[t] ** 2 * self._gap(t, t - 1)

    def strided(self, steps: int) -> Chain:
        """The chain of ``steps`` of the nodes, evenly spaced, with the first and the last."""
        steps = check_count(steps, "steps", 1, len(self))
        if steps == 1:
            return Chain(self.sde, self.times[-1:])
        at = torch.linspace(1, len(self), steps, dtype=torch.float64).round().long()
        return Chain(self.sde, self.times[at])

    def _gap(self, t: Tensor, s: Tensor) -> Tensor:
        """1 - w_s / w_t."""
        log_snr = self.nodes.log_snr
        return -torch.expm1(log_snr[t] - log_snr[s])

    def check(self, model: Score, x: Tensor | None = None) -> None:
        """Raise ``ValueError`` unless the model is of this process, and x of its data."""
        sde = model.sde
        if not (isinstance(sde, LinearSDE) and self.sde.agrees(sde) and sde.agrees(self.sde)):
            raise ValueError(f"the chain is of {shown(self.sde)}, the score of {shown(sde)}")
        if x is None:
            return
        check_state(x)
        check_finite(x)
        if model.shape is not None and x.shape[1:] != model.shape:
            raise ValueError(f"x must have shape {batch_of(model.shape)}, got {tuple(x.shape)}")
        if model.batch not in (None, len(x)):
            raise ValueError(f"the score is bound for {model.batch} samples, x has {len(x)}")

    def _errors(self, errors: object) -> Tensor:
        """Mean squared errors at the nodes 1 .. N, float64 (N,)."""
        e = as_real(errors, "errors").cpu()
        if e.shape != (len(self),):
            raise ValueError(f"errors must be ({len(self)},), one a node, got {tuple(e.shape)}")
        if not bool(((e >= 0) & e.isfinite()).all()):
            raise ValueError("errors must be finite and >= 0: they are mean squares")
        return e

    def _ends(self, t: Index, s: Index | None) -> tuple[Tensor, Tensor]:
        """The numbers of two nodes, s < t, on the host; s is t - 1 where it is None."""
        t = torch.as_tensor(t).cpu()
        s = t - 1 if s is None else torch.as_tensor(s).cpu()
        if t.is_floating_point() or s.is_floating_point():
            raise TypeError("nodes are numbered by integers")
        if not bool(((s >= 0) & (s < t) & (t <= len(self))).all()):
            raise ValueError(f"nodes must be 0 <= s < t <= {len(self)}, got s = {s}, t = {t}")
        return torch.broadcast_tensors(t, s)

    def forward(self, x: Tensor, t: Index, s: Index = 0) -> Normal:
        """q(x_t | x_s = x): data to any node, or any node to a later one."""
        check_state(x)
        t, s = self._ends(t, s)
        mean = match(self.nodes.alpha[t] / self.nodes.alpha[s], x) * x
        return _normal(mean, self.nodes.sigma[t] ** 2 * self._gap(t, s))

    def posterior(
        self,
        x: Tensor,
        t: Index,
        s: Index | None = None,
        *,
        data: Tensor | None = None,
        noise: Tensor | None = None,
        score: Tensor | None = None,
    ) -> Normal:
        """q(x_s | x_t = x, x_0), s = t - 1 by default, with x_0 told in one of three ways:

            data:   a x_t + b x_0,
            noise:  alpha_s / alpha_t (x_t - (1 - r) sigma_t z),
            score:  alpha_s / alpha_t (x_t + (1 - r) sigma_t^2 s),

        s the score of the kernel, -z / sigma_t (the model's, for its mean). The last two say
        nothing where alpha_t = 0.

        Raises:
            ValueError: none of the three, or more than one.
        """
        check_state(x)
        if sum(v is not None for v in (data, noise, score)) != 1:
            raise ValueError("x_0 must be told by one of data, noise and score")
        t, s = self._ends(t, s)
        gap, sigma, alpha = self._gap(t, s), self.nodes.sigma, self.nodes.alpha
        if data is not None:
            a = sigma[s] ** 2 * alpha[t] / (alpha[s] * sigma[t] ** 2)
            mean = match(a, x) * x + match(alpha[s] * gap, x) * data
        else:
            out = -noise if noise is not None else score
            assert out is not None
            level = gap * (sigma[t] if noise is not None else sigma[t] ** 2)
            mean = match(alpha[s] / alpha[t], x) * (x + match(level, x) * out)
        return _normal(mean, sigma[s] ** 2 * gap)

    def step(
        self,
        model: Score,
        x: Tensor,
        t: Index,
        s: Index | None = None,
        variance: Variance = "small",
    ) -> Normal:
        """p(x_s | x_t = x), s = t - 1 by default, by one call of the model."""
        self.check(model)
        at = self.times[self._ends(t, s)[0]]
        return self.read(model.evaluate(x, at), x, t, s, variance)

    def read(
        self,
        e: Evaluation,
        x: Tensor,
        t: Index,
        s: Index | None = None,
        variance: Variance = "small",
    ) -> Normal:
        """p(x_s | x_t = x) from what the model said at x_t."""
        mean = self.posterior(x, t, s, data=e.denoised.to(x.dtype)).mean
        v = self.variance(t, s, variance, e.head)
        basis = variance.basis if isinstance(variance, Moments) else None
        return Normal(mean, v.to(x), None if basis is None else basis.to(x))

    def variance(
        self, t: Index, s: Index | None, variance: Variance, head: Tensor | None = None
    ) -> Tensor:
        """v_p of p(x_s | x_t), (1 or B, m), of as many directions as ``Normal`` has.

        To node 0 the posterior has no variance: there ``small`` is that of the step before it
        (Nichol & Dhariwal 2021, section 3.1), in a chain of one step the large one.

        Raises:
            ValueError: a name that there is not, a learned variance without a head, errors that
                are not (N,).
        """
        t, s = self._ends(t, s)
        sigma, alpha, gap = self.nodes.sigma, self.nodes.alpha, self._gap(t, s)
        exact = (sigma[s] ** 2 * gap).reshape(-1, 1)
        lift = ((alpha[s] * gap) ** 2).reshape(-1, 1)
        if isinstance(variance, Moments):
            snr = self.nodes.log_snr[t].exp().reshape(-1, 1)
            return exact + lift * variance.values / (1 + variance.values * snr)
        if not isinstance(variance, str):
            return exact + lift * self._errors(variance)[t - 1].reshape(-1, 1)
        check_choice(variance, _NAMES, "variance")
        large = (sigma[t] ** 2 * gap).reshape(-1, 1)
        first = (
            sigma[1] ** 2 * self._gap(torch.tensor(2), torch.tensor(1)) if len(self) > 1 else large
        )
        small = torch.where(s.reshape(-1, 1) == 0, first, exact)
        if variance != "learned":
            return small if variance == "small" else large
        if head is None:
            raise ValueError("a learned variance needs a network with a head: head=True")
        low, high = (torch.log(v).to(head) for v in (small, large))
        return torch.exp(torch.lerp(low, high, (head.flatten(1) + 1) / 2))

    def divergence(
        self,
        e: Evaluation,
        x_0: Tensor,
        x: Tensor,
        t: Index,
        variance: Variance = "small",
    ) -> Tensor:
        """L_(t-1) = KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)) at x_t = x, t >= 2: nats, (B,).

        n/2 [log k - 1 + 1/k] + b^2 |x_0 - D|^2 / (2 v_p), k = v_p / v~. In float64, because at
        small steps all of it is a difference.
        """
        wide = Evaluation(e.score.double(), e.denoised.double(), e.head)
        p = self.read(wide, x.double(), t, None, variance)
        return self.posterior(x.double(), t, data=x_0.double()).kl(p)

    def expected(self, data: Moments | Tensor, variance: Variance = "small") -> Tensor:
        """E L_1 .. E L_(N-1) in nats a dimension, (N - 1,): in closed form for Gaussian data.

        Args:
            data: their moments, whose denoiser errs by C / (1 + C / w) in each direction; or the
                mean squared errors of a denoiser at the nodes, (N,).
            variance: as in ``step``; a learned one is taken for the best.
        """
        if isinstance(variance, str) and variance == "learned":
            variance = data
        t = torch.arange(2, len(self) + 1)
        if isinstance(data, Moments):
            c, shares = data.values, data.shares
            error = c / (1 + c * self.nodes.log_snr[t].exp().unsqueeze(1))
        else:
            error, shares = self._errors(data)[1:].unsqueeze(1), torch.ones(1).double()
        if isinstance(variance, Moments) and variance is not data and len(variance.values) > 1:
            raise ValueError("the variance of other moments than the data's has other directions")
        v, gap = self.variance(t, t - 1, variance), self._gap(t, t - 1).unsqueeze(1)
        s = (t - 1).unsqueeze(1)
        exact = self.nodes.sigma[s] ** 2 * gap
        away = (self.nodes.alpha[s] * gap) ** 2 * error / v
        return (gaussians.divergence(exact / v, away) * shares).sum(1)

    def errors(self, model: Score, x: Tensor, draws: int = 1, seed: int = 0) -> Tensor:
        """E |x_0 - D(x_t)|^2 / n at the nodes 1 .. N, (N,), by N ``draws`` calls of the model.

        Given as ``variance`` it is the best that is one number a step, v~ + b^2 E|x_0 - D|^2 / n,
        without any training (Bao et al. 2022, Analytic-DPM, who take E|x_0 - D|^2 = tr Cov from
        E|s|^2, which is so for the exact score alone). x (B, *D) are data in their own units.
        """
        self.check(model, x)
        z, streams, found = model.facts.encode(x), Streams(seed), []
        with torch.no_grad():
            for t in range(1, len(self) + 1):
                total = 0.0
                for k in range(check_count(draws, "draws")):
                    x_t = self.forward(z, t).sample(streams.normal(z, f"errors {t} {k}"))
                    d = model.evaluate(x_t, as_time(self.times[t])).denoised
                    total += float((z.double() - d.double()).square().mean())
                found.append(total / draws)
        return torch.tensor(found, dtype=torch.float64)

    def solver(self, variance: Variance = "small") -> Exponential:
        """What makes the model's steps, for ``solve`` and ``sample`` at eta = 1 on ``grid``.

        The last step, to node 0, ends in the mean, unless the variance is that of Gaussian data.
        """
        if isinstance(variance, Moments):
            return Exponential(1, variance)
        if isinstance(variance, str) and variance == "small":
            return Exponential(1)

        def spread(e: Evaluation, t: float, s: float) -> Tensor:
            t_i, s_i = (int((self.times - u).abs().argmin()) for u in (t, s))
            v = self.variance(t_i, s_i, variance, e.head).sqrt()
            return v.reshape(()) if v.numel() == 1 else v.reshape(e.score.shape)

        return Exponential(1, spread=spread)

    def sample(
        self,
        model: Score,
        n: int,
        seed: int | None = None,
        variance: Variance = "small",
        first: int = 0,
    ) -> Tensor:
        """Ancestral sampling: the samples first .. first + n - 1 of the seed's sequence, (n, *D),
        in the units of the data."""
        self.check(model)
        solver, times = self.solver(variance), self.grid
        return sample(model, n, seed=seed, eta=1.0, solver=solver, times=times, first=first)

    def encode(self, model: Score, x: Tensor) -> Tensor:
        """DDIM forward, data (B, *D) in their own units -> x_N, without noise.

        From x_1 = alpha_1 x_0 on; ``decode`` leads back, up to an error of the first order in the
        steps (Song, Meng & Ermon 2021, section 4.3).
        """
        self.check(model, x)
        start = float(self.nodes.alpha[1]) * model.facts.encode(x)
        if len(self) == 1:
            return start
        return solve(self.sde.probability_flow(model), start, self.times[1:], ddim(), 0)

    def decode(self, model: Score, x: Tensor) -> Tensor:
        """DDIM: x_N (B, *D) -> data in their own units; the last step ends in D(x_1)."""
        self.check(model, x)
        end = solve(self.sde.probability_flow(model), x, self.grid, ddim(), 0)
        return model.facts.decode(end)


def _normal(mean: Tensor, variance: Tensor) -> Normal:
    return Normal(mean, variance.reshape(-1, 1).to(mean))
