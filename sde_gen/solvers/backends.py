"""Whole libraries behind the same step: scipy for ODEs, torchsde for SDEs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise
from ..ops import check_choice, check_count, check_number, full_precision, user_precision
from ..sdes import SDE
from .base import Memory, Solver, Step, check_drift, require_ode

_SCIPY_ORDERS = {"RK45": 5, "RK23": 3, "DOP853": 8, "Radau": 5, "BDF": 1, "LSODA": 1}


@dataclass(frozen=True)
class _Method:
    """What torchsde's method is, and what it does on noise that does not depend on the state."""

    sde_type: str
    order: int
    weak: int
    strong: float
    calls: int


# For additive noise Ito and Stratonovich are the same equation, so both kinds are offered. srk is
# run in torchsde's additive form (SRA1), which takes two calls and is affine in its noise; its
# diagonal form would take ten and draw terms that additive noise does not have.
_TORCHSDE = {
    "euler": _Method("ito", 1, 1, 1.0, 1),
    "euler_heun": _Method("stratonovich", 1, 1, 1.0, 1),
    "midpoint": _Method("stratonovich", 2, 1, 1.0, 2),
    "heun": _Method("stratonovich", 2, 2, 1.0, 2),
    "srk": _Method("ito", 2, 2, 1.5, 2),
}


class SciPy(Solver):
    """scipy.integrate.solve_ivp on the whole batch, from t to s in one step.

    The step size is scipy's, one for the batch, from the tolerances: give it a grid of two
    times. So a sample depends, within the tolerance, on its batch; a run of its own for each
    would cost as many times the calls. ``Adaptive`` has steps of its own for each. The state is
    float64 on the CPU inside scipy; the score sees the caller's dtype.

    Args:
        method: a method of solve_ivp (``order`` is that of its local extrapolation).
        rtol, atol: relative and absolute tolerance of a step.

    Raises:
        ValueError: unknown method. TypeError: not an ODE, or a state that requires gradients.
        RuntimeError: scipy gave up. FloatingPointError: the drift is not finite.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, seed=0, solver=sg.SciPy("DOP853", 1e-6, 1e-6)).shape
    torch.Size([8, 2])
    """

    evaluates_end = True
    own_steps = True

    def __init__(self, method: str = "RK45", rtol: float = 1e-5, atol: float = 1e-6) -> None:
        check_choice(method, _SCIPY_ORDERS, "method")
        self.method, self.rtol = method, check_number(rtol, "rtol", above=0)
        self.atol = check_number(atol, "atol", least=0)
        self.order = _SCIPY_ORDERS[method]

    def check(self, process: SDE) -> None:
        """ODEs."""
        require_ode(self, process)

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """From t to s by ``scipy.integrate.solve_ivp``, one step size for the batch."""
        from scipy.integrate import solve_ivp

        if torch.is_grad_enabled() and x.requires_grad:
            raise TypeError("SciPy does not record gradients: detach x, or take another solver")

        def state(y: Any) -> Tensor:
            return torch.from_numpy(y).to(device=x.device, dtype=x.dtype).reshape(x.shape)

        # scipy takes its first step in seconds: it sees the share u of the way, which has none.
        def time(u: float) -> float:
            return step.s if u == 1 else step.t + u * step.h

        def f(u: float, y: Any) -> Any:
            t = time(u)
            with torch.no_grad():
                b = process.drift(state(y), t).double().cpu()
            # scipy halves its step for ever where it sees NaN.
            check_drift(process, b, torch.from_numpy(y).reshape(x.shape), t)
            return step.h * b.numpy().ravel()

        y = x.detach().double().cpu().numpy().ravel()
        run = solve_ivp(f, (0.0, 1.0), y, self.method, rtol=self.rtol, atol=self.atol)
        if not run.success:
            t = time(float(run.t[-1]))
            raise RuntimeError(f"scipy's {self.method} stopped at t = {t}: {run.message}")
        return state(run.y[:, -1].copy()), ()


class TorchSDE(Solver):
    """One or more fixed steps of torchsde's sdeint between neighbours of the grid.

    The adapter flattens the state to (B, n), lets torchsde's clock rise where ours falls, gives
    it float64 times and broadcast noise, and drives it by *our* Noise: torchsde is then seeded,
    independent of the batch, and never builds a Brownian tree.

    Args:
        method: euler, euler_heun, midpoint, heun or srk (Roessler 2010, SRA1: strong order 1.5,
            two draws a step).
        substeps: equal torchsde steps for each interval of the grid.

    Raises:
        ValueError: unknown method, or substeps < 1.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 10, seed=0, eta=1, solver=sg.TorchSDE("midpoint")).shape
    torch.Size([8, 2])
    """

    def __init__(self, method: str = "euler", substeps: int = 1) -> None:
        check_choice(method, _TORCHSDE, "method")
        self.method, self.substeps = method, check_count(substeps, "substeps")
        known = _TORCHSDE[method]
        self.order, self.weak, self.strong = known.order, known.weak, known.strong
        self.calls = self.substeps * known.calls
        self.evaluates_end = method == "heun"

    def step(
        self, process: SDE, x: Tensor, step: Step, noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One step of torchsde from t to s, on the increments of ``noise``."""
        import torchsde

        h, srk = abs(step.h), self.method == "srk"
        ode = process.direction == 0
        matrix = not ode and process.diffusion(step.t).ndim == 2
        # Additive noise is a matrix in torchsde: rows of what it mixes keep it k x k, or 1 x 1.
        mixed = x.shape[1] if matrix else 1 if srk else None
        layout = _Layout(x, mixed)
        problem = _Problem(process, layout, step, _TORCHSDE[self.method].sde_type)
        with full_precision(x.device.type):
            end = torchsde.sdeint(
                problem,
                layout.flat(x),
                torch.tensor([0.0, h], dtype=torch.float64),
                bm=_Driver(None if ode else noise, x, layout, step, srk),
                method=self.method,
                # A hair more than the exact part: rounding must not leave a last step of 1e-17.
                dt=h / self.substeps * (1 + 1e-12),
            )[-1]
        return layout.back(end), ()


def _time(step: Step, u: float) -> float:
    """Our time at torchsde's rising time u, 0 <= u <= |h|: the ends exactly, not to rounding."""
    return step.s if u == abs(step.h) else step.t + math.copysign(u, step.h)


class _Layout:
    """The state flat, as torchsde wants it: (B, n), or rows (-1, k) of what noise mixes."""

    def __init__(self, x: Tensor, mixed: int | None) -> None:
        self.mixed, self.shape, self.device_type = mixed, x.shape, x.device.type
        self.inner = x.movedim(1, -1).shape if x.ndim > 1 else x.shape

    def flat(self, x: Tensor) -> Tensor:
        if self.mixed is None:
            return x.reshape(len(x), -1)
        return (x.movedim(1, -1) if x.ndim > 1 else x).reshape(-1, self.mixed)

    def back(self, y: Tensor) -> Tensor:
        if self.mixed is None or len(self.shape) < 2:
            return y.reshape(self.shape)
        return y.reshape(self.inner).movedim(-1, 1)


class _Problem:
    """A process in torchsde's terms: a flat state and a rising time."""

    def __init__(self, process: SDE, layout: _Layout, step: Step, sde_type: str) -> None:
        self.process, self.layout, self.at = process, layout, step
        self.sign = math.copysign(1.0, step.h)
        self.sde_type = sde_type
        self.noise_type = "diagonal" if layout.mixed is None else "additive"
        self.last: tuple[float, Tensor, Tensor] | None = None
        # torchsde multiplies matrices with states in full precision; the network is the user's.
        self.precision = user_precision(layout.device_type)

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        # torchsde asks for the same drift more than once: to see its shape, and in srk.
        if self.last is not None and self.last[0] == float(u) and self.last[1] is y:
            return self.last[2]
        with self.precision:
            drift = self.process.drift(self.layout.back(y), _time(self.at, float(u)))
        self.last = float(u), y, self.sign * self.layout.flat(drift)
        return self.last[2]

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        if self.process.direction == 0:
            g = y.new_zeros(())
        else:
            g = self.process.diffusion(_time(self.at, float(u))).to(y)
        return g.expand_as(y) if self.layout.mixed is None else g.expand(*y.shape, y.shape[1])


class _Driver:
    """Our Noise as torchsde's Brownian motion: W and, for srk, U = int W du over [u_a, u_b].

    Without a noise (an ODE) it stands still.
    """

    def __init__(
        self, noise: Noise | None, x: Tensor, layout: _Layout, step: Step, levy_area: bool
    ) -> None:
        self.noise, self.x, self.at, self.layout = noise, x, step, layout
        self.shape = layout.flat(x).shape
        self.levy_area_approximation = "space-time" if levy_area else "none"

    def __call__(self, u_a: Tensor, u_b: Tensor, return_U: bool = False) -> Any:
        h = float(u_b - u_a)
        w = math.sqrt(h) * self._draw(u_a, u_b, 0)
        if not return_U:
            return w
        return w, h * (w / 2 + math.sqrt(h / 12) * self._draw(u_a, u_b, 1))

    def _draw(self, u_a: Tensor, u_b: Tensor, k: int) -> Tensor:
        if self.noise is None:
            return self.x.new_zeros(self.shape)
        t, s = _time(self.at, float(u_a)), _time(self.at, float(u_b))
        return self.layout.flat(self.noise(self.x, t, s, k))
