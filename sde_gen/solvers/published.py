"""Published samplers by name: each is a configuration of ``Exponential``.

The name fixes the solver; eta lives in the process. ``solve(sde.reverse(score), x, times,
ddpm())`` is DDPM's ancestral sampler, ``solve(sde.probability_flow(score), ..., unipc(3))`` is
UniPC-3.
"""

from __future__ import annotations

import math
import re

import numpy as np

from ..ops import as_integer, check_number
from ..sdes import SDE
from .base import describe, reversal
from .exponential import Exponential
from .weights import Midpoint, Polynomial, Weights


class _DDIM(Exponential):
    """First order, with the noise of Song et al. 2021a (equation 16) in place of the process's."""

    def __init__(self, eta: float) -> None:
        super().__init__(1)
        self.eta = eta

    def check(self, process: SDE) -> None:
        """The reversal of a ``LinearSDE`` with the same eta."""
        reverse, _ = reversal(self, process)
        if reverse.eta != self.eta:
            raise ValueError(
                f"ddim({self.eta:g}) steps a reversal with the same eta, sde.reverse(score,"
                f" {self.eta:g}) or sample(..., eta={self.eta:g}); got {describe(process)}"
            )

    def noise_level(self, eta: float, h: float) -> float:
        """Theirs, as the eta of the continuous process."""
        # Their variance eta^2 (1 - e^(-2h)) of the new noise is 1 - e^(-2 h ours^2).
        if self.eta == 0 or math.isinf(h):
            return self.eta
        return math.sqrt(-math.log1p(self.eta**2 * math.expm1(-2 * h)) / (2 * h))


class _UniPCWeights(Weights):
    """Two values: half the difference (the published shortcut); otherwise the polynomial."""

    def __call__(
        self, nodes: np.ndarray, start: float, end: float, c: np.ndarray, kappa: float
    ) -> np.ndarray:
        rule = Midpoint() if len(nodes) == 2 else Polynomial()
        return rule(nodes, start, end, c, kappa)


def ddpm() -> Exponential:
    """Ancestral sampling with the small variance (Ho et al. 2020, equations 6 and 7); eta = 1.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 100, seed=0, eta=1, solver=sg.solvers.ddpm()).shape
    torch.Size([8, 2])
    """
    return Exponential(1)


def ddim(eta: float = 0.0) -> Exponential:
    """DDIM (Song, Meng & Ermon 2021, equations 12 and 16), eta in [0, 1] as in the paper.

    eta = 0 on a probability flow is deterministic and eta = 1 is ``ddpm``. In between, their eta
    scales the standard deviation of a step's noise, ours the noise of the continuous process:
    the solver converts, step by step. Solve ``sde.reverse(score, eta)`` with the same number.

    Raises:
        ValueError: eta outside [0, 1]; when solved: another eta than the process has.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, seed=0, solver=sg.solvers.ddim()).shape
    torch.Size([8, 2])
    """
    return _DDIM(check_number(eta, "eta", least=0, most=1))


def dpm_solver(order: int = 3) -> Exponential:
    """Multistep DPM-Solver: noise prediction, interpolated in lambda (Lu et al. 2022a).

    >>> flow = sg.VP().probability_flow(sg.Gaussian(sg.VP(), torch.zeros(2)))
    >>> times = sg.grids.log_snr(flow.sde, 20)
    >>> sg.solve(flow, torch.ones(8, 2), times, sg.solvers.dpm_solver(3)).shape
    torch.Size([8, 2])
    """
    return Exponential(order, math.inf)


def dpm_solver_pp(order: int = 2) -> Exponential:
    """DPM-Solver++ multistep: 2M as published; for eta = 1, SDE-DPM-Solver++(2M).

    Order 3 integrates the quadratic through three values exactly: the (3M) that libraries ship
    scales its second difference by a half and is of order 2.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, seed=0, solver=sg.solvers.dpm_solver_pp(2)).shape
    torch.Size([8, 2])
    """
    return Exponential(order, weights=Midpoint() if as_integer(order) == 2 else None)


def deis(order: int = 3) -> Exponential:
    """DEIS rho-AB: noise prediction, interpolated in sigma / alpha (Zhang & Chen 2023).

    >>> flow = sg.VP().probability_flow(sg.Gaussian(sg.VP(), torch.zeros(2)))
    >>> times = sg.grids.log_snr(flow.sde, 20)
    >>> sg.solve(flow, torch.ones(8, 2), times, sg.solvers.deis(3)).shape
    torch.Size([8, 2])
    """
    return Exponential(order, math.inf, weights=Polynomial(_ratio))


def unipc(order: int = 3) -> Exponential:
    """UniPC-p with B(h) = e^h - 1 (bh2), data prediction (Zhao et al. 2023).

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, seed=0, solver=sg.solvers.unipc(3)).shape
    torch.Size([8, 2])
    """
    return Exponential(order, corrector=True, weights=_UniPCWeights())


def sa_solver(order: int = 2, corrector: bool = False) -> Exponential:
    """SA-Solver: stochastic Adams with exact weights, any eta (Xue et al. 2023).

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, seed=0, eta=1, solver=sg.solvers.sa_solver(2)).shape
    torch.Size([8, 2])
    """
    return Exponential(order, corrector=corrector)


_CALLS = {
    "ddpm": "ddpm(), eta=1",
    "ddim": "ddim()",
    "dpmsolver": "dpm_solver(3)",
    "dpmsolver++": "dpm_solver_pp(2)",
    "deis": "deis(3)",
    "unipc": "unipc(3)",
    "sasolver": "sa_solver(2)",
    "euler": "EulerMaruyama()",
    "heun": "Heun()",
    "rk": "RungeKutta(4)",
    "rk45": "SciPy('RK45')",
}
_ALSO = {"ancestral": "ddpm", "dpm": "dpmsolver", "dpm++": "dpmsolver++", "eulermaruyama": "euler"}


def call_for(name: str) -> str:
    """What to write for the name of a sampler; all that are known, where it is none of them.

    >>> call_for("DPM-Solver++(3M)")
    'write solver=sde_gen.solvers.dpm_solver_pp(3)'
    """
    whole = re.sub(r"[^a-z0-9+]", "", name.lower().replace("pp", "++"))
    short, order = re.fullmatch(r"(.*?)([1-5]?)[ms]*", whole).groups()  # type: ignore[union-attr]
    call = _CALLS.get(whole) or _CALLS.get(_ALSO.get(short, short))
    if call is None:
        return f"in sde_gen.solvers there are {', '.join(_CALLS.values())}"
    return f"write solver=sde_gen.solvers.{re.sub('[1-5](?=[)])', order, call) if order else call}"


def _ratio(lam: np.ndarray) -> np.ndarray:
    return np.exp(-lam)
