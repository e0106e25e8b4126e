"""How many bits a latent is, and a bound on log p(x) that they and the decoder give.

    -log p(x) <= E_q[-log p(x | z)] + KL(q(z | x) || p(z)) = distortion + rate.

The prior p(z) is the law that a diffusion model draws, so the rate is the cost of its path. Let
zeta ~ N(c, v) be the latent of x without the noise w_0 that belongs to the process
(``LatentModel.level``; v = 0 where that is all the noise there is), and y = zeta + sqrt(w) e. Then

    rate = KL(q(x_T | x) || p_T) + 1/2 int_(w_0)^(w_T) E|m(y, x) - D(y)|^2 dw / w^2,
    m(y, x) = E[zeta | y, x] = c + v / (v + w) (y - c),

D the denoiser of the score. With scores in place of denoisers this is the identity of LSGM (Vahdat
et al. 2021, theorem 1: the score of q(z_t | x), which is known, against that of the model); with
v = 0 it is the bound of a diffusion model on c, begun at a noise level that is not zero (Heek et
al. 2026, Unified Latents). w is drawn as often as the integrand of normalised Gaussian latents is
large, so that a few draws do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import gaussians, likelihood
from ..grids import default_end
from ..likelihood import Estimate
from ..networks import Cost
from ..noise import Streams
from ..ops import check_count, check_finite, check_kind, sum_rest
from ..scores.bound import check_batch
from ..sdes import Evaluation, at_rest
from ..solvers import Solver
from .model import CHUNK, LatentModel

Read = Callable[[Tensor, Tensor], Evaluation]


def bound(
    model: LatentModel, x: Tensor, *, draws: int = 4, seed: int = 0, first: int = 0
) -> Cost[Estimate]:
    """Rate and distortion of data x, (B,) each, in nats, with standard errors.

    Args:
        model: conditioned already where it takes labels, ``model.given(y=y)``.
        x: data (B, *D): floats, of which ``total`` bounds the density; of an autoencoder with
            levels also these, of which it bounds the probability.
        draws: of the latent, and of the noise level; an error bar needs two.
        seed, first: what is drawn for row i is a function of the seed and of first + i.

    Returns:
        ``bound(model, x).bits_per_dim.mean()`` has the figures that are reported.

    Raises:
        TypeError, ValueError: no latent model, data of another shape or not finite, labels for
            another number of samples.

    >>> from sde_gen import latent
    >>> half = sg.networks.Pair(lambda x: x[:, :1], lambda z: z.repeat(1, 2), (2,), (1,), std=0.1)
    >>> model = latent.LatentModel(half, sg.Gaussian(sg.VP(), torch.zeros(1)))
    >>> latent.bound(model, torch.zeros(4, 2)).total.value.shape
    torch.Size([4])
    """
    draws = _checked(model, x, draws)
    streams = Streams(seed, check_count(first, "first", 0))
    found: list[list[Cost[Tensor]]] = [[] for _ in range(draws)]
    with torch.no_grad(), at_rest(model.autoencoder):
        for i in range(0, len(x), CHUNK):
            part = slice(i, min(i + CHUNK, len(x)))
            own, s = (model.rows(part) if model.batch else model), streams.rows(part)
            blank = torch.empty(len(x[part]), dtype=torch.float64, device=x.device)
            for k in range(draws):
                u = s.uniform(blank, f"level {k}")
                found[k].append(sampled_cost(own, x[part], u, s, own.evaluate, f"{k}"))

    def all_of(name: str) -> Estimate:
        each = [torch.cat([getattr(cost, name) for cost in draw]) for draw in found]
        return Estimate.of(torch.stack(each).double(), draws, "latent")

    n = math.prod(model.autoencoder.shape)
    return Cost(all_of("rate"), all_of("distortion"), n, all_of("total"))


def sampled_cost(
    model: LatentModel, x: Tensor, u: Tensor, noise: Streams, read: Read, name: str = ""
) -> Cost[Tensor]:
    """Rate and distortion at one draw of the latent, of the noise level and of the noisy latent,
    (B,): each has the right mean. Gradients go to the encoder, the decoder and the score.

    Args:
        u: uniform numbers (B,), which say the noise level.
        noise, name: what is drawn by, under names that end so.
        read: evaluates the score, (state, t) -> ``Evaluation``.
    """
    c, v = model.posterior(x)
    w_0 = model.level
    z = c + torch.sqrt(v + w_0) * noise.normal(c, f"latent {name}")
    z = z if model.normaliser is None else model.normaliser.decode(z)
    distortion = -model.autoencoder.log_likelihood(x, z)
    return Cost(
        _ends(model, c, v) + _path(model, c, v, u, noise.normal(c, f"noise {name}"), read),
        distortion,
        math.prod(model.autoencoder.shape),
    )


def _path(model: LatentModel, c: Tensor, v: Tensor, u: Tensor, e: Tensor, read: Read) -> Tensor:
    """The integral over w, from one draw."""
    sde = model.sde
    w, density = _level(v.detach(), u, model.level, float(torch.exp(-sde.log_snr(sde.T))))
    t = sde.time_at(-torch.log(w)).clamp(model.end or default_end(sde), sde.T)
    alpha, sigma, w = (_like(a, c) for a in (sde.alpha(t), sde.sigma(t), w))
    denoised = read(alpha * c + torch.sqrt(alpha**2 * v + sigma**2) * e, t).denoised
    wanted = c + v / torch.sqrt(v + w) * e
    return 0.5 * sum_rest((wanted - denoised).double() ** 2) / density


def _level(v: Tensor, u: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """w in [low, high] for uniform numbers u (B,), and w^2 times the density that it has, (B,).

    As often as normalised Gaussian latents lose bits there: sum_j [1 / (v_j + w) - 1 / (1 + w)],
    whose integral is sum_j log[(1 + w) / (v_j + w)]. u tells j and the place in its part.
    """
    v = v.flatten(1).double().clamp_max(0.9)
    ends = torch.tensor([low, min(high, 1e200)], dtype=torch.float64, device=v.device)
    top, bottom = (torch.log1p(w) - torch.log(v + w) for w in ends)
    whole = (top - bottom).cumsum(1)
    at = u.to(v).unsqueeze(1) * whole[:, -1:]
    j = torch.searchsorted(whole, at, right=True).clamp_max(v.shape[1] - 1)
    i = (bottom + at - whole + (top - bottom)).gather(1, j)
    w = ((1 - v.gather(1, j) * i.exp()) / torch.expm1(i)).clamp(ends[0], ends[1])
    density = ((1 - v) * (w / (1 + w)) * (w / (v + w))).sum(1) / whole[:, -1]
    return w.squeeze(1), density


def _like(a: Tensor, x: Tensor) -> Tensor:
    """Numbers (B,) in the dtype and rank of x (B, *D)."""
    return a.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def _ends(model: LatentModel, c: Tensor, v: Tensor) -> Tensor:
    """KL(q(x_T | x) || p_T), p_T that of Gaussian data of the moments that are known of each
    coordinate, or N(0, sigma_T^2)."""
    sde, known = model.sde, model.score.facts.moments
    alpha, sigma = float(sde.alpha(sde.T)), float(sde.sigma(sde.T))
    mean, var = torch.zeros_like(c), torch.full_like(c, sigma**2)
    if known is not None and known.basis is None:
        var = var + alpha**2 * known.values.to(c).expand(c[0].numel()).reshape(c.shape[1:])
        if known.mean is not None:
            mean = mean + alpha * known.mean.to(c).reshape(c.shape[1:])
    return gaussians.kl(*(a.double() for a in (alpha * c, alpha**2 * v + sigma**2, mean, var)))


def log_prob(
    model: LatentModel,
    x: Tensor,
    *,
    draws: int = 1,
    probes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    first: int = 0,
    solver: Solver | None = None,
    times: Tensor | Sequence[float] | None = None,
) -> Estimate:
    """A lower bound on log p(x) in nats, (B,), by the density that the probability flow gives z:

        log p(x) >= E_q[log p(x | z) + log p(z) - log q(z | x)].

    The mean over the draws of z, with its standard error; of one draw that of the flow alone. It
    is exact, for each draw, where q(z | x) is the posterior of the model.

    Args:
        draws: of z.
        probes, steps, solver, times: as in ``likelihood.log_prob``, of the score of latents.
        model, x, seed, first: as in ``bound``.

    Raises:
        TypeError, ValueError: as ``bound`` and ``likelihood.log_prob``.

    >>> from sde_gen import latent
    >>> half = sg.networks.Pair(lambda x: x[:, :1], lambda z: z.repeat(1, 2), (2,), (1,), std=0.1)
    >>> model = latent.LatentModel(half, sg.Gaussian(sg.VP(), torch.zeros(1)))
    >>> latent.log_prob(model, torch.zeros(4, 2)).value.shape
    torch.Size([4])
    """
    draws = _checked(model, x, draws)
    streams, found = Streams(seed, check_count(first, "first", 0)), []
    if times is None and (model.end is not None or model.singular):
        times = [model.end or default_end(model.sde), model.sde.T]
    options: dict[str, Any] = {"probes": probes, "steps": steps, "solver": solver, "times": times}
    least = 0.0 if times is None else model.level
    with torch.no_grad(), at_rest(model.autoencoder):
        c, s = model.autoencoder.posterior(x)
        scale = s.new_ones(()) if model.normaliser is None else model.normaliser.scale.to(s)
        s = torch.maximum(s, math.sqrt(least) * scale)
        for k in range(draws):
            z = c + s * streams.normal(c, f"latent {k}")
            p = likelihood.log_prob(model.score, z, seed=seed + k, first=first, **options)
            q = gaussians.log_density(z, c, s)
            found.append(p + (model.autoencoder.log_likelihood(x, z) - q))
    value, spread, bias = (
        torch.stack([getattr(e, name) for e in found]) for name in ("value", "spread", "bias")
    )
    drawn = Estimate.of(value, sum(e.calls for e in found), f"latent, {found[0].method}")
    return replace(drawn, spread=spread[0] if draws == 1 else drawn.spread, bias=bias.mean(0))


def _checked(model: LatentModel, x: Tensor, draws: int) -> int:
    check_kind(model, LatentModel, "model", "a LatentModel")
    model.autoencoder.check(x)
    if x.is_floating_point():
        check_finite(x, "x")
    check_batch(model, x, "what is bound to the score")
    return check_count(draws, "draws")
