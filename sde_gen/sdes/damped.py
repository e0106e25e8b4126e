"""The critically damped Langevin diffusion: noise reaches the data by way of a velocity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import Time, set_number
from ..schedules import Linear, Schedule
from .matrix import MatrixOrnsteinUhlenbeck, Rows


@dataclass(frozen=True)
class CriticallyDamped(MatrixOrnsteinUhlenbeck):
    """A position, the data, and a velocity (Dockhorn, Vahdat & Kreis 2022), Gamma^2 = 4 M:

        dx = beta v / M dt,      dv = -beta x dt - beta Gamma v / M dt + sqrt(2 Gamma beta) dW.

    The state is (B, 2, *D): x, then v, which starts from N(0, start M) and is marginalised. At
    rest the law is N(0, 1) x N(0, M). With z = 4 B / Gamma and P the regularised lower incomplete
    gamma function, from rest at v = 0

        Phi = exp(-z / 2) [[1 + z / 2, z / Gamma], [-z Gamma / 4, 1 - z / 2]],
        Sigma_xx = P(3, z),   Sigma_xv = Gamma z^2 / 4 exp(-z),
        Sigma_vv = M [P(3, z) + 2 z exp(-z)].

    Noise enters v alone, so of a score only that half is read. It is finite at small times, where
    that of the data explodes.

    Args:
        mass: M.
        start: variance of the velocity at t = 0, as a part of M.
        schedule: the clock; the default is the published one, beta = 4 on [0, 1].

    Raises:
        ValueError: a mass or a start that is not positive.

    >>> sg.CriticallyDamped().state_shape((3,))
    (2, 3)
    """

    driven = slice(1, None)

    a: Rows = field(init=False, repr=False)
    g: Rows = field(init=False, repr=False)
    schedule: Schedule = field(default_factory=lambda: Linear(4.0, 4.0))
    mass: float = 0.25
    start: float = 0.04

    def __post_init__(self) -> None:
        set_number(self, "mass", above=0)
        set_number(self, "start", above=0)
        m, gamma = self.mass, self.friction
        object.__setattr__(self, "a", ((0.0, 1 / m), (-1.0, -gamma / m)))
        object.__setattr__(self, "g", ((0.0, 0.0), (0.0, math.sqrt(2 * gamma))))
        super().__post_init__()

    @property
    def friction(self) -> float:
        """Gamma = 2 sqrt(M): the least that does not oscillate."""
        return 2 * math.sqrt(self.mass)

    @property
    def added(self) -> tuple[float, ...]:  # type: ignore[override]
        """The variance of the velocity at t = 0, ``start`` times the mass."""
        return (self.start * self.mass,)

    def _z(self, t: Time) -> Tensor:
        return 4 / self.friction * self.schedule.integral(t)

    def transition(self, t: Time) -> Tensor:
        """Phi of the class, with z = 4 B / Gamma."""
        z, gamma = self._z(t), self.friction
        phi = torch.stack([1 + z / 2, z / gamma, -z * gamma / 4, 1 - z / 2], -1)
        return (torch.exp(-z / 2).unsqueeze(-1) * phi).unflatten(-1, (2, 2))

    def spread(self, t: Time) -> Tensor:
        """In closed form, by incomplete gamma functions of z = 4 B / Gamma."""
        z = self._z(t)
        low = torch.special.gammainc(torch.full_like(z, 3.0), z)
        fade = torch.exp(-z)
        cross = self.friction / 4 * z**2 * fade
        v = torch.stack([low, cross, cross, self.mass * (low + 2 * z * fade)], -1)
        return v.unflatten(-1, (2, 2))
