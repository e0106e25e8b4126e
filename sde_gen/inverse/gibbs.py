"""Split Gibbs sampling: moves that keep the posterior exactly, with no gradient of the likelihood.

A second variable z = x + rho n is put between data and observation, and the two are drawn in turn
(Vono et al. 2019; with a diffusion prior Xu and Chi 2024, Wu et al. 2024):

    z | x, o:  N(x, rho^2 I) under the likelihood N(o; A z, S_d),
    x | z:     p(x_0 | x_0 + rho n = z), which is the reverse SDE of the prior from w = rho^2.

With S_d = S the draws of x are those under the larger noise S + rho^2 A A^T. Here the noise is
*deflated*, S_d = S - rho^2 A A^T, so that they have the posterior's own law for every rho with
rho^2 A A^T < S. Then z needs no system solved, because rho^2 A A^T + S_d = S:

    z = z_0 + rho^2 A^T S^-1 (o - A z_0 - n_d),    z_0 = x + rho n,    n_d ~ N(0, S_d).

A probability flow in place of the reverse SDE gives another law: x would be a function of z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import grids
from ..noise import Noise, Streams
from ..ops import as_integer, check_count, check_finite, check_state, full_precision
from ..sampling import solve
from ..scores import Score
from ..sdes import LinearSDE, Reverse
from ..solvers import Exponential, Solver
from .covariance import DataCovariance
from .observation import Observation
from .whitened import MOST, Whitened

SHARE = 0.9
"""rho in units of the largest that can be deflated."""


def gibbs(
    prior: Score,
    observations: Observation | Sequence[Observation],
    x: Tensor,
    sweeps: int = 10,
    steps: int = 8,
    seed: int | None = None,
    *,
    first: int = 0,
    rho: float | None = None,
    deflate: bool = True,
    solver: Solver | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Move draws by sweeps that leave the posterior as it is: it frees particles from each other.

    It moves x by about rho a sweep and does not leave a mode, so start it from draws that are
    nearly right (``particles``), not from nothing.

    Args:
        prior: a score that knows its ``LinearSDE``.
        observations: one or a list, linear.
        x: states (B, *D), in the units of the data.
        sweeps: how often z and x are drawn.
        steps: calls of the prior a sweep; the only error is theirs.
        seed, first: what is drawn for row i is a function of the seed and of first + i; None draws
            a seed from torch.
        rho: the coupling, in the units of the process; None takes 0.9 of the most that can be
            deflated, which is the least noise over the gain of A.
        deflate: take the coupling out of the noise.
        solver: of the prior's step, which must take eta = 1; by default ``Exponential(2, C)``.
        chunk: as in ``solve``.

    Returns:
        (B, *D), in the units of the data.

    Raises:
        TypeError: as ``Posterior``; an operator that is not linear.
        ValueError: a coupling too large to be deflated, x of another shape.

    >>> from sde_gen import inverse
    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> seen = inverse.Observation(inverse.Matrix(torch.ones(1, 2)), torch.ones(1), 0.5)
    >>> inverse.gibbs(law, seen, torch.zeros(8, 2), sweeps=2, seed=0).shape
    torch.Size([8, 2])
    """
    seen = Whitened(prior, observations, "gibbs")
    sde, facts = prior.sde, prior.facts
    assert isinstance(sde, LinearSDE)
    _check(seen, x)
    values, vectors = seen.spectrum()
    rho = _coupling(rho, values, deflate)
    moments = DataCovariance().moments(facts)
    solver = Exponential(2, moments, corrector=True) if solver is None else solver
    level = float(sde.time_at(-2 * math.log(rho)))
    times = grids.log_snr(sde, steps, start=level, end=level / 50, to_zero=steps > 1)
    number = int(torch.randint(1 << 62, ())) if seed is None else as_integer(seed)
    if number is None:
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    first = check_count(first, "first", 0)
    process, alpha = Reverse(sde, prior, 1.0), float(sde.alpha(level))
    # Eigenvalues of W S_d W^T: deflated noise is whitened by less.
    left = (1 - rho**2 * values if deflate else torch.ones_like(values)).clamp_min(0)
    state = facts.encode(x)
    for sweep in range(check_count(sweeps, "sweeps")):
        noise = Streams(number + (sweep << 32), first)
        z = _likelihood_step(seen, state, rho, left, vectors, noise)
        state = solve(process, alpha * z, times, solver, noise, chunk=chunk)
    return facts.decode(state)


def _likelihood_step(
    seen: Whitened, x: Tensor, rho: float, left: Tensor, vectors: Tensor, noise: Noise
) -> Tensor:
    """z given x and o; the noise of W o is U diag(left) U^T."""
    with full_precision(x.device.type):
        z = x + rho * noise(x, math.inf, 0.0, 0)
        local = seen.at(z.double())
        xi = noise(local.r, math.inf, 0.0, 1).to(left)
        # The symmetric root of the deflated noise: which eigenvectors span it does not matter.
        off = _rotate(vectors.mT, local.r) - left.sqrt() * _rotate(vectors.mT, xi)
        # rho^2 B B^T + S_d, which is I where the noise is deflated.
        k = rho**2 * seen.spectrum()[0] + left
        return z + (rho**2 * local.pull(_rotate(vectors, off / k))).to(x)


def _rotate(u: Tensor, v: Tensor) -> Tensor:
    """U v for U (1 or B, m, m) and v (B, m)."""
    return (u @ v.unsqueeze(-1)).squeeze(-1)


def _coupling(rho: float | None, values: Tensor, deflate: bool) -> float:
    most = float(values.max().clamp_min(1e-300) ** -0.5)
    if rho is None:
        # The noise of a step is named by its times. Devices find eigenvalues that differ in their
        # last bits: to six digits they agree.
        return float(f"{SHARE * most:.6g}")
    if not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"rho must be a positive number, got {rho}")
    if deflate and rho > most:
        raise ValueError(
            f"rho = {rho:.4g} cannot be deflated: rho^2 A A^T must stay below the noise, so"
            f" rho <= {most:.4g}"
        )
    return rho


def _check(seen: Whitened, x: Tensor) -> None:
    operator = seen.observation.operator
    check_state(x)
    check_finite(x)
    if not operator.linear:
        raise TypeError(f"{operator} is not linear: its noise cannot be deflated; take particles")
    if not seen.is_dense:
        raise ValueError(f"gibbs takes up to {MOST} measurements, got {operator}")
    if x.shape[1:] != operator.shape:
        raise ValueError(f"x must be (B, *D) with *D = {operator.shape}, got {tuple(x.shape)}")
    if seen.batch not in (None, len(x)):
        raise ValueError(f"y has rows for {seen.batch} samples, x has {len(x)}")
