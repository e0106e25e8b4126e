"""An observation as samplers see it: in the units of the process, its noise made N(0, I).

With W^T W = S^-1 the observation o = A x_0 + n becomes W o = B x_0 + N(0, I), B = W A, and

    grad_x log N(o; A D, A C_t A^T + S) = J^T B^T K^-1 W (o - A D),    K = B C_t B^T + I >= I:

no small noise is ever inverted. Where C_t = f(C) for the variances c of ``Moments`` and B fits
into memory, K is a sum of matrices made once; otherwise its products are taken.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..facts import Facts, Units
from ..moments import Moments, alike
from ..scores import Score
from ..sdes import LinearSDE
from .observation import Observation, joint
from .operators import Callables, Composed, Linearization, Nonlinear, Operator

MOST = 2048
"""Measurements up to which K is a matrix."""
_ENTRIES = 1 << 26
"""Numbers that B may have as a matrix: 512 MiB."""


class Local:
    """A linear observation of x_0, or any linearised at D (B, *D), whitened.

    Attributes:
        residual: o - A(D), (B, *M), as it was measured.
        r: W (o - A(D)), (B, m).
    """

    def __init__(self, observation: Observation, denoised: Tensor) -> None:
        self.observation = observation
        self.map: Linearization = observation.operator.linearize(denoised)
        self.residual = observation.y.to(self.map.y) - self.map.y
        self.r = observation.whiten(self.residual).flatten(1)

    def push(self, u: Tensor) -> Tensor:
        """B u: (B, *D) -> (B, m)."""
        return self.observation.whiten(self.map.jvp(u)).flatten(1)

    def pull(self, v: Tensor) -> Tensor:
        """B^T v: (B, m) -> (B, *D)."""
        v = v.reshape(len(v), *self.observation.operator.measured)
        return self.map.vjp(self.observation.whiten_adjoint(v))


class Whitened:
    """One observation, or several that hold jointly, of what a prior is of.

    Args:
        prior: knows its ``LinearSDE``; its units are those of x in the observations.
        observations: one or a list.

    Raises:
        TypeError: no score of a linear process; no observations.
        ValueError: x of another shape than the prior's.
    """

    def __init__(
        self, prior: Score, observations: Observation | Sequence[Observation], name: str
    ) -> None:
        seen = of_state(_checked(prior, observations, name), prior.facts)
        # Where the states are; a device without float64 leaves it to the CPU.
        self.observation = seen if prior.device.type == "mps" else seen.to(prior.device)
        self._kept: dict[str, Any] = {}

    @property
    def batch(self) -> int | None:
        """The number of rows of y, None where it is one for all."""
        return self.observation.batch

    def rows(self, index: slice | Tensor) -> Whitened:
        """The observations of these rows."""
        chosen = copy.copy(self)
        chosen.observation = self.observation.rows(index)
        if self._copies > 1:
            chosen._kept = {}
        return chosen

    def at(self, denoised: Tensor) -> Local:
        """The residual and the linear map at the denoised states."""
        return Local(self.observation, denoised)

    @property
    def _copies(self) -> int:
        """How many B there are: as many as rows where each has its own noise."""
        observation = self.observation
        return 1 if observation.log_volume.ndim == 0 else observation.batch or 1

    @property
    def is_dense(self) -> bool:
        """Whether B is at hand as a matrix."""
        operator = self.observation.operator
        m, n = math.prod(operator.measured), math.prod(operator.shape)
        return operator.linear and m <= MOST and m * n * self._copies <= _ENTRIES

    @property
    def b(self) -> Tensor:
        """B (1, m, n), or (R, m, n) where each row has its own noise, float64."""
        if "b" not in self._kept:
            operator = self.observation.operator
            m = math.prod(operator.measured)
            one = torch.eye(m, dtype=torch.float64, device=self.observation.y.device)
            a = operator.adjoint(one.reshape(m, *operator.measured)).reshape(m, -1)
            self._kept["b"] = self.observation.whitened(a)
        return self._kept["b"]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (G, m) and vectors (G, m, m) of B B^T."""
        if "spectrum" not in self._kept:
            values, vectors = torch.linalg.eigh(self.b @ self.b.mT)
            self._kept["spectrum"] = values.clamp_min(0), vectors
        return self._kept["spectrum"]

    def gram(self, moments: Moments, c: Tensor) -> Tensor:
        """B f(C) B^T, (G, m, m), for values c of f, (G or 1, k) like ``moments.values``."""
        c = alike(c, self.b).unsqueeze(-2)
        if moments.basis is None:
            return (self.b * c) @ self.b.mT
        if self._kept.get("gram", (None,))[0] is not moments:
            seen = self.b @ moments.basis.to(self.b)
            self._kept["gram"] = moments, self.b @ self.b.mT, seen
        _, whole, seen = self._kept["gram"]
        floor = c[..., :1]
        return floor * whole + (seen * (c[..., 1:] - floor)) @ seen.mT

    def solve(self, moments: Moments, c: Tensor, r: Tensor) -> Tensor:
        """(B f(C) B^T + I)^-1 r, (B, m) -> (B, m), for values c (1 or B, k) of f."""
        r = r.to(self.b)
        if len(moments.values) == 1:
            values, vectors = self.spectrum()
            z = (vectors.mT @ r.unsqueeze(-1)).squeeze(-1) / (c.to(r) * values + 1)
            return (vectors @ z.unsqueeze(-1)).squeeze(-1)
        k = self.gram(moments, c)
        low = cholesky_plus_one(k)
        if len(low) == 1:
            return torch.cholesky_solve(r.mT, low[0]).mT
        return torch.cholesky_solve(r.unsqueeze(-1), low).squeeze(-1)


def cholesky_plus_one(k: Tensor) -> Tensor:
    """The lower factor of K + I, (G, m, m)."""
    one = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    # Not asked whether it failed: K + I >= I, and a GPU would be waited for.
    return torch.linalg.cholesky_ex(k + one).L


def apply(moments: Moments, f: Tensor, x: Tensor) -> Tensor:
    """f(C) x for values f (1 or B, k) of f: like ``moments.apply``, with a function a sample."""
    flat, f = x.flatten(1), alike(f, x)
    if moments.basis is None:
        return (f * flat).reshape(x.shape)
    basis = moments._basis_like(x)
    inner = ((flat @ basis) * (f[:, 1:] - f[:, :1])) @ basis.T
    return (f[:, :1] * flat + inner).reshape(x.shape)


def conjugate_gradients(
    product: Callable[[Tensor], tuple[Tensor, Tensor]],
    r: Tensor,
    tolerance: float,
    iterations: int,
) -> Tensor:
    """P K^-1 r for a symmetric K and any linear P, from products v -> (K v, P v) alone.

    Each row stops by itself, when its residual is ``tolerance`` times |r|, or when K is seen to
    be not positive (a network's Jacobian need not be).

    Args:
        product: (B, m) -> (B, m) and (B, *D).
        r: (B, m).
    """
    p, image = r, None
    size = r.square().sum(1)
    stop, going = tolerance**2 * size, size > 0
    for _ in range(iterations):
        q, seen = product(p)
        curved = (p * q).sum(1)
        going = going & (curved > 0) & (size > stop)
        if image is not None and not bool(going.any()):
            break
        step = torch.where(going, size / torch.where(curved > 0, curved, 1.0), 0.0)
        move = step.to(seen).reshape(-1, *(1,) * (seen.ndim - 1)) * seen
        image = move if image is None else image + move
        r = r - step.unsqueeze(1) * q
        before, size = size, r.square().sum(1)
        p = r + (size / torch.where(before > 0, before, 1.0)).unsqueeze(1) * p
    assert image is not None
    return image


class _Decode(Operator):
    """x = shift + scale z, from the units of the process to the data's."""

    linear = False

    def __init__(self, units: Units, shape: Sequence[int]) -> None:
        super().__init__(shape, shape)
        self.units = units

    def _forward(self, x: Tensor) -> Tensor:
        return self.units.decode(x)

    def linearize(self, x: Tensor) -> Linearization:
        return Linearization(self.forward(x), self.units.linear, self.units.adjoint)


def of_state(observation: Observation, facts: Facts) -> Observation:
    """The observation of the state z of x = shift + scale z; its y keeps its units."""
    if facts.units is None:
        return observation
    operator, units = observation.operator, facts.units
    seen = copy.copy(observation)
    if not units.affine:
        inside = units.inside(operator.shape)
        seen.operator = Composed(operator, Nonlinear(units.decode, inside, operator.shape))
        return seen
    if not operator.linear:
        seen.operator = Composed(operator, _Decode(units, operator.shape))
        return seen

    scale = Callables(units.linear, units.adjoint, operator.shape, operator.shape, check=False)
    seen.operator = Composed(operator, scale)
    shift = units.decode(torch.zeros(1, *operator.shape, dtype=torch.float64))
    y = observation.y.double() - operator.forward(shift.to(operator.device))
    seen.y = y if observation.batch is not None else y.reshape(observation.y.shape)
    return seen


def _checked(
    prior: Score, observations: Observation | Sequence[Observation], name: str
) -> Observation:
    check_prior(prior, name)
    observation = joint(observations)
    shape = prior.shape
    if shape is not None and observation.operator.shape != shape:
        raise ValueError(
            f"the prior is of x {shape}, {observation.operator} of x {observation.operator.shape}"
        )
    return observation


def check_prior(prior: object, name: str) -> None:
    """Raise TypeError unless ``prior`` is a score of a scalar linear process."""
    sde = getattr(prior, "sde", None)
    if not isinstance(prior, Score) or not isinstance(sde, LinearSDE):
        raise TypeError(
            f"{name} needs a prior score that knows its LinearSDE (.sde), got"
            f" {type(prior).__name__} with sde = {sde!r}; for a matrix process, Lifted takes a"
            " posterior under a scalar one"
        )
