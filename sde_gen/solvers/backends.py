"""Whole libraries behind the same step: scipy for ODEs, torchsde for SDEs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise
from ..ops import match
from ..sdes import SDE
from .base import Memory, Solver, Step, require_ode

_SCIPY_ORDERS = {"RK45": 5, "RK23": 3, "DOP853": 8, "Radau": 5, "BDF": 1, "LSODA": 1}


@dataclass(frozen=True)
class _Method:
    """What torchsde's method is, and what it does on noise that does not depend on the state."""

    sde_type: str
    order: int
    weak: int
    strong: float
    calls: int


# For additive noise Ito and Stratonovich are the same equation, so both kinds are offered.
_TORCHSDE = {
    "euler": _Method("ito", 1, 1, 1.0, 1),
    "euler_heun": _Method("stratonovich", 1, 1, 1.0, 1),
    "midpoint": _Method("stratonovich", 2, 2, 1.0, 2),
    "heun": _Method("stratonovich", 2, 2, 1.0, 2),
    "srk": _Method("ito", 2, 2, 1.5, 10),
}


class SciPy(Solver):
    """scipy.integrate.solve_ivp on the whole batch, from t to s in one step.

    The step size is scipy's, one for the batch, from the tolerances: give it a grid of two
    times. The state is float64 on the CPU inside scipy; the score sees the caller's dtype.

    Args:
        method: a method of solve_ivp (``order`` is that of its local extrapolation).
        rtol, atol: relative and absolute tolerance of a step.

    Raises:
        ValueError: unknown method. TypeError: not an ODE. RuntimeError: scipy gave up.
    """

    evaluates_end = True

    def __init__(self, method: str = "RK45", rtol: float = 1e-5, atol: float = 1e-6) -> None:
        if method not in _SCIPY_ORDERS:
            raise ValueError(f"method must be one of {sorted(_SCIPY_ORDERS)}, got {method!r}")
        self.method, self.rtol, self.atol = method, rtol, atol
        self.order = _SCIPY_ORDERS[method]

    def check(self, process: SDE) -> None:
        require_ode(self, process)

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        from scipy.integrate import solve_ivp

        def state(y: Any) -> Tensor:
            return torch.from_numpy(y).to(device=x.device, dtype=x.dtype).reshape(x.shape)

        def f(t: float, y: Any) -> Any:
            with torch.no_grad():
                return process.drift(state(y), t).double().cpu().numpy().ravel()

        y = x.detach().double().cpu().numpy().ravel()
        run = solve_ivp(f, (step.t, step.s), y, self.method, rtol=self.rtol, atol=self.atol)
        if not run.success:
            raise RuntimeError(f"scipy's {self.method} stopped at t = {run.t[-1]}: {run.message}")
        return state(run.y[:, -1].copy()), ()


class TorchSDE(Solver):
    """One or more fixed steps of torchsde's sdeint between neighbours of the grid.

    The adapter flattens the state to (B, n), lets torchsde's clock rise where ours falls, gives
    it float64 times and broadcast noise, and drives it by *our* Noise: torchsde is then seeded,
    independent of the batch, and never builds a Brownian tree.

    Args:
        method: euler, euler_heun, midpoint, heun or srk (Roessler 2010, strong order 1.5).
        substeps: equal torchsde steps for each interval of the grid.

    Raises:
        ValueError: unknown method, or substeps < 1.
    """

    def __init__(self, method: str = "euler", substeps: int = 1) -> None:
        if method not in _TORCHSDE:
            raise ValueError(f"method must be one of {sorted(_TORCHSDE)}, got {method!r}")
        if substeps < 1:
            raise ValueError(f"substeps must be at least 1, got {substeps}")
        self.method, self.substeps = method, substeps
        known = _TORCHSDE[method]
        self.order, self.weak, self.strong = known.order, known.weak, known.strong
        self.calls = substeps * known.calls
        self.evaluates_end = method in ("heun", "srk")

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        import torchsde

        h, sign = abs(step.h), math.copysign(1.0, step.h)
        y = x.flatten(1)
        end = torchsde.sdeint(
            _Problem(process, x, y, step.t, sign, _TORCHSDE[self.method].sde_type),
            y,
            torch.tensor([0.0, h], dtype=torch.float64, device=x.device),
            bm=_Driver(noise, x, step.t, sign, "space-time" if self.method == "srk" else "none"),
            method=self.method,
            # A hair more than the exact part: rounding must not leave a last step of 1e-17.
            dt=h / self.substeps * (1 + 1e-12),
        )[-1]
        return end.reshape(x.shape), ()


class _Problem:
    """A process in torchsde's terms: flat state, rising time u with t = start + sign u."""

    noise_type = "diagonal"

    def __init__(
        self, process: SDE, x: Tensor, y: Tensor, start: float, sign: float, sde_type: str
    ) -> None:
        self.process, self.shape, self.first = process, x.shape, y
        self.start, self.sign, self.sde_type = start, sign, sde_type
        self.known: Tensor | None = None

    def _time(self, u: Tensor) -> Tensor:
        return (self.start + self.sign * u.double().cpu()).clamp(0.0, self.process.T)

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        # torchsde asks once for the drift at the start to see its shape: not a call to waste.
        if y is self.first and self.known is not None:
            return self.known
        f = self.sign * self.process.drift(y.reshape(self.shape), self._time(u)).flatten(1)
        if y is self.first:
            self.known = f
        return f

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        return match(self.process.diffusion(self._time(u)), y).expand_as(y)


class _Driver:
    """Our Noise as torchsde's Brownian motion: W and, for srk, U = int W du over [u_a, u_b]."""

    def __init__(self, noise: Noise, x: Tensor, start: float, sign: float, levy: str) -> None:
        self.noise, self.x, self.start, self.sign = noise, x, start, sign
        self.levy_area_approximation = levy
        self.shape = x.flatten(1).shape

    def __call__(self, u_a: Tensor, u_b: Tensor, return_U: bool = False) -> Any:
        h = float(u_b - u_a)
        t, s = self.start + self.sign * float(u_a), self.start + self.sign * float(u_b)
        w = math.sqrt(h) * self.noise(self.x, t, s).flatten(1)
        if not return_U:
            return w
        levy = math.sqrt(h / 12) * self.noise(self.x, t, s, 1).flatten(1)
        return w, h * (w / 2 + levy)
