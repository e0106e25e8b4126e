"""Every sampler of every peer, each on every grid it ships, ended exactly at the last noise level.

A configuration is ``run(case, calls) -> endpoint y``, or None where it cannot spend that number of
calls. The grids are the peers' own formulas with one point more in place of their final sigma = 0,
in float64, and the network is asked at exactly the noise level that the solver assumes: nobody is
charged here for rounded times.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from _problems import F64, Case
from torch import Tensor

Run = Callable[[Case, int], Tensor | None]


# --- grids ------------------------------------------------------------------------------------


def log_grid(case: Case, n: int) -> Tensor:
    """Even in log sigma: azula's VE, "exponential" elsewhere."""
    a, b = math.log(case.s_max), math.log(case.s_min)
    return torch.linspace(a, b, n + 1, dtype=F64).exp()


def karras_grid(case: Case, n: int) -> Tensor:
    """Even in sigma^(1/7)."""
    a, b = case.s_max ** (1 / 7), case.s_min ** (1 / 7)
    return torch.linspace(a, b, n + 1, dtype=F64) ** 7


def time_grid(case: Case, n: int) -> Tensor:
    """Even in the time of standard VP: the default of diffusers."""

    def time(s: float) -> float:
        b = math.log1p(s**2)
        return 2 * b / (0.1 + math.sqrt(0.01 + 2 * 19.9 * b))

    t = torch.linspace(time(case.s_max), time(case.s_min), n + 1, dtype=F64)
    return torch.expm1(0.1 * t + 9.95 * t**2).sqrt()


def beta_grid(case: Case, n: int) -> Tensor:
    """diffusers' beta sigmas: quantiles of Beta(0.6, 0.6)."""
    from scipy.stats import beta

    u = torch.from_numpy(beta.ppf(1 - np.linspace(0, 1, n + 1), 0.6, 0.6))
    return case.s_min + u * (case.s_max - case.s_min)


def flow_grid(case: Case, n: int) -> Tensor:
    """Even in sigma / (1 + sigma): the time of a rectified flow."""
    a, b = (s / (1 + s) for s in (case.s_max, case.s_min))
    u = torch.linspace(a, b, n + 1, dtype=F64)
    return u / (1 - u)


GRIDS = {
    "exp": log_grid,
    "K7": karras_grid,
    "t": time_grid,
    "beta": beta_grid,
    "Rect": flow_grid,
}


def grid_of(case: Case, name: str, n: int) -> Tensor:
    """A grid that starts and ends exactly where the case does."""
    s = GRIDS[name](case, n)
    s[0], s[-1] = case.s_max, case.s_min
    return s


# --- azula ------------------------------------------------------------------------------------


def _azula_denoiser(case: Case, grid: str) -> Any:
    from azula import denoise, noise

    class KarrasSchedule(noise.Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            a, b = case.s_max ** (1 / 7), case.s_min ** (1 / 7)
            return torch.ones_like(t), (b + t * (a - b)) ** 7

    floor = math.sqrt((1 + case.s_min**2) / (1 + case.s_max**2))
    schedule = {
        "VE": lambda: noise.VESchedule(case.s_min, case.s_max),
        "VP": lambda: noise.VPSchedule(floor, case.s_min),
        "cos": lambda: noise.CosineSchedule(floor, case.s_min),
        "Rect": lambda: noise.RectifiedSchedule(1 / case.s_max, case.s_min),
        "decay": lambda: noise.DecaySchedule(1 / case.s_max, case.s_min),
        "K7": KarrasSchedule,
    }[grid]()

    class Exact(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
            alpha, sigma = self.schedule(t)
            return denoise.DiracPosterior(case.denoise(x_t / alpha, sigma / alpha))

    return Exact()


def azula(case: Case, calls: int, name: str, grid: str, order: int, per: int) -> Tensor | None:
    from azula import sample

    if calls < per:
        return None
    denoiser = _azula_denoiser(case, grid)
    more = {"order": order} if order else {}
    sampler = getattr(sample, name + "Sampler")(
        denoiser, steps=calls // per, silent=True, dtype=F64, **more
    )
    one = torch.ones((), dtype=F64)
    alpha, sigma = denoiser.schedule(one)
    assert abs(float(sigma / alpha) / case.s_max - 1) < 1e-9
    return sampler(case.y * alpha) / denoiser.schedule(0 * one)[0]


def azula_table() -> dict[str, Run]:
    table: dict[str, Run] = {}
    for grid in ("VE", "VP", "cos", "Rect", "decay", "K7"):
        table[f"azula Euler {grid}"] = partial(azula, name="Euler", grid=grid, order=0, per=1)
        table[f"azula Heun {grid}"] = partial(azula, name="Heun", grid=grid, order=0, per=2)
        for family in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
            # Order 1 of all but REAB is Euler.
            for order in range(1 if family == "REAB" else 2, 5):
                table[f"azula {family}-{order} {grid}"] = partial(
                    azula, name=family, grid=grid, order=order, per=1
                )
    return table


# --- diffusers --------------------------------------------------------------------------------


def diffusers(
    case: Case, calls: int, name: str, grid: str, prediction: str = "sample", **config: Any
) -> Tensor:
    """A scheduler's own loop over its VP state, with its sigmas put in place in float64."""
    import diffusers as library

    library.logging.set_verbosity_error()
    scheduler = getattr(library, name)(**config)
    scheduler.set_timesteps(calls)
    s = grid_of(case, grid, calls)
    alpha = torch.rsqrt(1 + s**2)
    scheduler.sigmas = s
    scheduler.timesteps = torch.arange(calls, 0, -1)
    if prediction == "velocity":
        scheduler.alphas, scheduler.betas = alpha, s * alpha
    scheduler.set_begin_index(0)
    x = case.y * alpha[0]
    for i, t in enumerate(scheduler.timesteps):
        y = x / alpha[i]
        d = case.denoise(y, s[i])
        if prediction == "velocity":
            d = alpha[i] * (y - d) / s[i] - s[i] * alpha[i] * d
        x = scheduler.step(d, t, x, return_dict=False)[0]
    return x.double() / alpha[-1]


def _diffusers_solvers() -> dict[str, dict[str, Any]]:
    dpm = {
        "name": "DPMSolverMultistepScheduler",
        "prediction_type": "sample",
        "final_sigmas_type": "sigma_min",
    }
    uni = {"name": "UniPCMultistepScheduler", "prediction_type": "sample"}
    deis = {"name": "DEISMultistepScheduler", "prediction_type": "sample"}
    single = {**dpm, "name": "DPMSolverSinglestepScheduler"}
    table: dict[str, dict[str, Any]] = {"DDIM": {**dpm, "solver_order": 1}}
    for tag, lower in (("", True), (" nolow", False)):
        low = {"lower_order_final": lower}
        table[f"DPM++2M{tag}"] = {**dpm, **low, "solver_order": 2}
        table[f"DPM++2M heun{tag}"] = {**dpm, **low, "solver_order": 2, "solver_type": "heun"}
        table[f"DPM++3M{tag}"] = {**dpm, **low, "solver_order": 3}
        for order in (2, 3):
            table[f"DPM(eps)-{order}{tag}"] = {
                **dpm,
                **low,
                "solver_order": order,
                "algorithm_type": "dpmsolver",
            }
            table[f"DEIS-{order}{tag}"] = {**deis, **low, "solver_order": order}
        for order in (1, 2, 3):
            table[f"UniPC-{order}{tag}"] = {**uni, **low, "solver_order": order}
    for order in (2, 3):
        table[f"UniPC-{order} bh1"] = {**uni, "solver_order": order, "solver_type": "bh1"}
        table[f"UniPC(eps)-{order}"] = {**uni, "solver_order": order, "predict_x0": False}
        table[f"DPM++{order}S"] = {**single, "solver_order": order}
    table["iPNDM"] = {"name": "IPNDMScheduler", "prediction": "velocity"}
    return table


def diffusers_table() -> dict[str, Run]:
    return {
        f"diffusers {name} {grid}": partial(diffusers, grid=grid, **config)
        for name, config in _diffusers_solvers().items()
        for grid in GRIDS
    }


# --- k-diffusion ------------------------------------------------------------------------------


def _part(package: str, module: str) -> Any:
    """One module of a package, without the rest of what the package imports.

    Both peers that need it import vision tools on sight (k-diffusion also CLIP and metrics), which
    their samplers do not use, and which need not be there.
    """
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ImportError(f"{package} is missing: see the extra 'bench' and `make bench`")
        shell = types.ModuleType(package)
        shell.__spec__ = spec
        shell.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[package] = shell
    return importlib.import_module(f"{package}.{module}")


@cache
def k_sampling() -> Any:
    """k_diffusion.sampling; its ``utils`` import torchvision for functions not used here."""
    names = ["torchvision", "torchvision.transforms", "torchvision.datasets", "torchvision.utils"]
    shells = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        setattr(shells["torchvision"], name.split(".")[1], shells[name])
    shells["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    kept = {name: sys.modules.get(name) for name in names}
    sys.modules.update(shells)
    try:
        return _part("k_diffusion", "sampling")
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def k_diffusion(
    case: Case, calls: int, name: str, grid: str, per: int = 1, **more: Any
) -> Tensor | None:
    if calls < per:
        return None

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return case.denoise(x, sigma[0])

    function = getattr(k_sampling(), "sample_" + name)
    if name == "dpm_fast":
        return function(model, case.y, case.s_min, case.s_max, calls, disable=True, **more)
    return function(model, case.y, grid_of(case, grid, calls // per), disable=True, **more)


def _silent(*_: Any) -> float:
    return 0.0


def k_table() -> dict[str, Run]:
    ode = {"eta": 0.0, "noise_sampler": _silent}
    kinds: dict[str, dict[str, Any]] = {
        "Euler": {"name": "euler"},
        "Heun": {"name": "heun", "per": 2},
        "DPM2": {"name": "dpm_2", "per": 2},
        "DPM++2S": {"name": "dpmpp_2s_ancestral", "per": 2, **ode},
        "DPM++2M": {"name": "dpmpp_2m"},
        "DPM++2M-SDE": {"name": "dpmpp_2m_sde", **ode},
        "DPM++2M-SDE heun": {"name": "dpmpp_2m_sde", "solver_type": "heun", **ode},
        "DPM++3M-SDE": {"name": "dpmpp_3m_sde", **ode},
    }
    kinds |= {f"LMS-{p}": {"name": "lms", "order": p} for p in (2, 3, 4)}
    table: dict[str, Run] = {
        f"k-diffusion {name} {grid}": partial(k_diffusion, grid=grid, **config)
        for name, config in kinds.items()
        for grid in ("exp", "K7", "t")
    }
    table["k-diffusion DPM-fast exp"] = partial(k_diffusion, name="dpm_fast", grid="exp")
    return table


# --- smalldiffusion ---------------------------------------------------------------------------


def smalldiffusion(case: Case, calls: int, grid: str, gam: float) -> Tensor:
    samples = _part("smalldiffusion", "diffusion").samples

    class Exact(torch.nn.Module):
        def predict_eps_cfg(self, x: Tensor, sigma: Tensor, *_: Any) -> Tensor:
            return (x - case.denoise(x, sigma)) / sigma

        def rand_input(self, n: int) -> Tensor:
            return torch.zeros(n, *case.y.shape[1:], dtype=F64)

    accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    run = samples(Exact(), grid_of(case, grid, calls), gam=gam, xt=case.y, accelerator=accelerator)
    return list(run)[-1]


def small_table() -> dict[str, Run]:
    return {
        f"smalldiffusion gam-{gam:g} {grid}": partial(smalldiffusion, grid=grid, gam=gam)
        for gam in (1.0, 1.5, 2.0)
        for grid in ("exp", "K7", "t", "Rect")
    }


# --- torchdiffeq and scipy --------------------------------------------------------------------


def _variable(case: Case, name: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """sigma itself or its logarithm as the time of an ODE: to the time, and back."""
    return (np.log, np.exp) if name == "log" else (lambda s: s, lambda t: t)


def torchdiffeq(
    case: Case, calls: int, method: str, grid: str, variable: str, per: int
) -> Tensor | None:
    from torchdiffeq import odeint

    steps = calls // per
    if steps < 1:
        return None
    log = variable == "log"

    def rate(t: Tensor, y: Tensor) -> Tensor:
        s = float(t.exp() if log else t)
        return (y - case.denoise(y, s)) * (1 if log else 1 / s)

    s = grid_of(case, grid, steps)
    return odeint(rate, case.y, s.log() if log else s, method=method)[-1]


def scipy(case: Case, calls: int, method: str, variable: str, rtol: float) -> Tensor:
    """One adaptive solve; ``calls`` is ignored: what it spent stands in ``case.calls``."""
    from scipy.integrate import solve_ivp

    shape, log = case.y.shape, variable == "log"

    def rate(t: float, z: np.ndarray) -> np.ndarray:
        s = math.exp(t) if log else t
        r = math.sqrt(1 + s * s) if log else 1.0
        y = r * torch.from_numpy(z).view(shape)
        slope = (y - case.denoise(y, s)) / (1 if log else s)
        if log:
            slope = slope / r - s * s / r**3 * y
        return slope.flatten().numpy()

    a, b = (math.sqrt(1 + s * s) if log else 1.0 for s in (case.s_max, case.s_min))
    span = (math.log(case.s_max), math.log(case.s_min)) if log else (case.s_max, case.s_min)
    run = solve_ivp(
        rate, span, (case.y / a).flatten().numpy(), method=method, rtol=rtol, atol=rtol
    )
    return b * torch.from_numpy(run.y[:, -1]).view(shape)


def ode_table() -> dict[str, Run]:
    per = {"euler": 1, "midpoint": 2, "rk4": 4}
    return {
        f"torchdiffeq {method} {grid} ({variable} sigma)": partial(
            torchdiffeq, method=method, grid=grid, variable=variable, per=per[method]
        )
        for method in per
        for grid, variable in (("exp", "log"), ("K7", "plain"), ("t", "plain"))
    }


def adaptive_table() -> dict[str, tuple[Callable[..., Tensor], list[float]]]:
    """Solvers that choose their own number of calls: a function of rtol, and the rtols to try."""
    tolerances = [10 ** (-k / 4) for k in range(21)]
    return {
        f"scipy {method} ({variable} sigma)": (
            partial(scipy, method=method, variable=variable),
            tolerances,
        )
        for method in ("RK23", "RK45", "DOP853")
        for variable in ("plain", "log")
    }


def table() -> dict[str, Run]:
    """All configurations with a given number of calls, by name."""
    warnings.simplefilter("ignore")
    return {
        **azula_table(),
        **diffusers_table(),
        **k_table(),
        **small_table(),
        **ode_table(),
    }
