"""Encoding, decoding, and what can be edited in between.

The probability flow is a bijection: a picture has one latent, a point of the prior's law, and the
latent one picture. Between two latents every path that stays where the prior's mass is leads
through likely pictures; a latent that is decoded under another label keeps what the labels do not
tell. Editing from a noised picture keeps what the noise has left (Meng et al. 2022, SDEdit).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import grids
from ..noise import Streams
from ..ops import act, as_real, check_choice, check_count, check_finite, check_number, check_state
from ..sampling import default_solver, enter, solve
from ..scores import Score
from ..sdes import KernelSDE, LinearSDE, MatrixSDE
from ..solvers import Adaptive, Solver
from .flow import carry, check_model, flow_grid
from .whitened import Whitened, reference

Metric = Literal["sphere", "gaussian"]

_STEPS, _FINE = 400, Adaptive(1e-5, 1e-5)


def encode(model: Score, x: Tensor, steps: int = _STEPS) -> Tensor:
    """The latent z (B, *D) of data x (B, *D): where the probability flow takes it, over sigma_T.

    For a good model z is standard normal. The flow is followed in fixed multistep steps
    (``likelihood.whitened``), one call each; gradients are recorded if x requires them. Of a
    matrix process x is the whole state and so is z, L_T^-1 x_T with L_T L_T^T = Sigma_T, and the
    steps are ``Adaptive(1e-5, 1e-5)``, each sample's own.

    Args:
        model: a score that knows its process, labels bound.
        x: data in their own units; (B, k, *D) where the process adds to them, ``sde.begin``.
        steps: how many on a linear process; there and back, a network trained for a minute
            returns every pixel of [-1, 1] to 1e-4 with 400, and twice as many steps make the
            error 8 to 30 times smaller.

    Raises:
        TypeError, ValueError: bad input as in ``log_prob``.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.likelihood.encode(law, torch.ones(1, 2))
    tensor([[1.0000, 1.0000]])
    """
    sde, start = _start(model, x, steps, latent=False)
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        state = enter(model, x)
        if isinstance(sde, LinearSDE):
            path = _path(model, sde, state, start)
            return path.move(path.alpha * state, steps) / float(sde.sigma(sde.T))
        moved, _ = carry(sde, state, torch.tensor(start).double())
        end = solve(sde.probability_flow(model), moved, [start, sde.T], _FINE, 0)
        return act(torch.linalg.inv(sde.sigma(sde.T)), end)


def decode(model: Score, z: Tensor, steps: int = _STEPS) -> Tensor:
    """The data x (B, *D) of latents z (B, *D), in their own units: the inverse of ``encode``.

    Args and errors: as ``encode``. A model whose score is singular at t = 0 is followed to
    where sigma / alpha = 0.005, and x is the mean there, x_t / alpha.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.likelihood.decode(law, torch.ones(1, 2))
    tensor([[1.0000, 1.0000]])
    """
    sde, start = _start(model, z, steps, latent=True)
    with torch.set_grad_enabled(torch.is_grad_enabled() and z.requires_grad):
        if isinstance(sde, LinearSDE):
            path = _path(model, sde, z, start)
            x = path.move(float(sde.sigma(sde.T)) * z, steps, back=True)
            return model.facts.decode(x / path.alpha)
        assert isinstance(sde, MatrixSDE)
        end = act(sde.sigma(sde.T), z)
        x = solve(sde.probability_flow(model), end, [sde.T, start], _FINE, 0)
        x = act(torch.linalg.inv(sde.transition(torch.tensor(start).double())), x)
        if not sde.added:
            return model.facts.decode(x)
        return torch.cat([model.facts.decode(sde.data(x)).unsqueeze(1), x[:, 1:]], 1)


def _start(model: Score, x: Tensor, steps: int, latent: bool) -> tuple[KernelSDE, float]:
    sde = check_model(model, x, latent)
    check_count(steps, "steps")
    return sde, float(flow_grid(sde, model, None)[0])


def _path(model: Score, sde: LinearSDE, x: Tensor, start: float) -> Whitened:
    return Whitened(sde.probability_flow(model), reference(model), x[0].numel(), start)


def between(
    a: Tensor, b: Tensor, shares: Sequence[float] | Tensor, metric: Metric = "sphere"
) -> Tensor:
    """Points on the way from latents a to b, (B, *D) each: (len(shares), B, *D).

        sphere:     r [sin((1 - c) phi) a / |a| + sin(c phi) b / |b|] / sin(phi),
        gaussian:   [(1 - c) a + c b] / sqrt((1 - c)^2 + c^2),

    phi the angle between a and b, which turns evenly (Shoemake 1985), as does the length
    r = (1 - c) |a| + c |b|; and the straight line scaled so that of two independent standard
    normals every point is one. At right angles, as random latents in high dimension are, both
    have nearly the same image.

    Args:
        shares: c of each point, 0 is a, 1 is b; beyond, the path goes on.
        metric: "sphere" or "gaussian".

    Raises:
        TypeError, ValueError: states of two shapes, shares that are no list of numbers; on the
            sphere, a and b that lie opposite each other, between which no path is the shortest.

    >>> sg.likelihood.between(torch.zeros(1, 2), torch.ones(1, 2), [0.5], metric="sphere").shape
    torch.Size([1, 1, 2])
    """
    for name, state in (("a", a), ("b", b)):
        check_state(state, name)
        check_finite(state, name)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"a and b must have one shape (B, *D), got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    check_choice(metric, get_args(Metric), "metric")
    c = as_real(shares, "shares", a.device)
    if c.ndim != 1:
        raise ValueError(f"shares must be a list of numbers, got shape {tuple(c.shape)}")
    check_finite(c, "shares")
    if metric == "gaussian":
        c = c.to(a.dtype).reshape(-1, *(1,) * a.ndim)
        return ((1 - c) * a + c * b) / torch.sqrt((1 - c) ** 2 + c**2)
    path = _arc(a.flatten(1).to(c), b.flatten(1).to(c), c.reshape(-1, 1, 1))
    return path.to(a).reshape(-1, *a.shape)


def _arc(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The path on the sphere, (B, n) each and shares (k, 1, 1): (k, B, n)."""
    u, v = (torch.nn.functional.normalize(s, dim=1) for s in (a, b))
    p, q, near, far = (s.norm(dim=1, keepdim=True) for s in (a, b, u + v, u - v))
    if bool((near < 1e-6).any()):
        raise ValueError(
            "a and b lie opposite each other: no path on the sphere is the shortest, take"
            " metric='gaussian'"
        )
    # From the half angle: near 0 the arc cosine of u . v loses half of the digits.
    phi = 2 * torch.atan2(far, near).clamp_min(1e-9)
    turned = (torch.sin((1 - c) * phi) * u + torch.sin(c * phi) * v) / torch.sin(phi)
    return ((1 - c) * p + c * q) * turned


def interpolate(
    model: Score,
    a: Tensor,
    b: Tensor,
    shares: Sequence[float] | Tensor,
    *,
    metric: Metric = "sphere",
    steps: int = _STEPS,
) -> Tensor:
    """Data on the way from a to b, (B, *D) each: encoded, ``between``, decoded;
    (len(shares), B, *D).

    Raises:
        TypeError, ValueError: as ``encode`` and ``between``.

    >>> law, a = sg.Gaussian(sg.VP(), torch.zeros(2)), torch.ones(1, 2)
    >>> sg.likelihood.interpolate(law, a, 2 * a, [0.0, 0.5, 1.0], steps=50).shape
    torch.Size([3, 1, 2])
    """
    path = between(encode(model, a, steps), encode(model, b, steps), shares, metric)
    return torch.stack([decode(model, z, steps) for z in path])


def relabel(source: Score, target: Score, x: Tensor, steps: int = _STEPS) -> Tensor:
    """Data x (B, *D) encoded under one score and decoded under another: the same model given
    two labels, or two models of one process (Su et al. 2023).

    Raises:
        TypeError, ValueError: as ``encode``; scores of two processes.

    >>> a, b = (sg.Gaussian(sg.EDM(), torch.full((2,), m)) for m in (0.0, 3.0))
    >>> sg.likelihood.relabel(a, b, torch.ones(1, 2), steps=50).shape
    torch.Size([1, 2])
    """
    z = encode(source, x, steps)
    one, other = source.sde, target.sde
    if not (isinstance(one, KernelSDE) and isinstance(other, KernelSDE) and one.agrees(other)):
        raise ValueError(f"relabel needs scores of one process, got {one!r} and {other!r}")
    return decode(target, z, steps)


def redraw(
    model: Score,
    x: Tensor,
    level: float,
    *,
    steps: int = 25,
    seed: int = 0,
    first: int = 0,
    eta: float = 0.0,
    solver: Solver | None = None,
) -> Tensor:
    """Data x (B, *D), noised to sigma / alpha = ``level`` and denoised from there: SDEdit.

    What is finer than the noise is drawn anew from the model; what is coarser stays. Of the
    model's own law, what comes out has that law at every level.

    Args:
        level: ratio of noise to signal, in the units of the process, below that at T.
        steps, eta, solver: as in ``sample``; where steps are many and eta = 0, the first makes
            ``solver.start_calls`` more calls.
        seed, first: row i is a function of the seed and of first + i.

    Raises:
        TypeError, ValueError: bad input as in ``log_prob``; a level out of range.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.likelihood.redraw(law, torch.ones(1, 2), level=0.5).shape
    torch.Size([1, 2])
    """
    sde = check_model(model, x)
    if not isinstance(sde, LinearSDE):
        raise TypeError(
            f"redraw needs a score of a LinearSDE, got one of {sde!r}: there, draw a state by"
            " sde.perturb and take it to 0 by solve(sde.reverse(model), ...)"
        )
    level = check_number(level, "level", above=0)
    start = float(
        sde.time_at(torch.as_tensor(-2.0).double() * torch.log(torch.tensor(level).double()))
    )
    end = model.end or grids.default_end(sde)
    if not end < start <= sde.T:
        low, high = (float(torch.exp(-sde.log_snr(t) / 2)) for t in (end, sde.T))
        raise ValueError(f"level must lie between {low:.3g} and {high:.3g}, got {level:g}")
    noise, z = Streams(seed, check_count(first, "first", 0)), enter(model, x)
    z = float(sde.alpha(start)) * z + float(sde.sigma(start)) * noise.start(z)
    solver = default_solver(model, eta) if solver is None else solver
    times = grids.default(
        sde, steps, start, model.end, model.facts.std, to_zero=not solver.evaluates_end
    )
    with torch.no_grad():
        return model.facts.decode(solve(sde.reverse(model, eta), z, times, solver, noise))
