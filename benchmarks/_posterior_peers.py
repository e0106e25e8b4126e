"""Posterior samplers of azula and deepinv, on the benchmark's mixtures.

Each is the peer's own code: its update and its term. What is given to all alike is the exact
denoiser, the process (VP), the levels of noise (sde_gen's default grid with its last step to 0)
and the noise of the observation, where a method can be told of it. A run takes the law, what was
observed in R rows, draws an observation and steps, and returns (R, draws, n).

azula's DPS takes one norm over its whole batch, so that a draw depends on the others beside it.
Here it is run as it is for a batch of one (``_norm_of_each``), which is what its paper says.
deepinv computes in single precision, whatever it is given.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sde_gen import LinearSDE, Score, grids
from sde_gen.inverse import Observation

F64 = torch.float64
PARTICLES = 300
Run = Callable[[Score, Observation, int, int], Tensor]


def table() -> tuple[dict[str, Run], dict[str, str]]:
    """The runs of the peers that can be imported, and why the others cannot."""
    found: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for library, runs in (("azula", azula_table), ("deepinv", deepinv_table)):
        if importlib.util.find_spec(library):
            found |= runs()
        else:
            missing[library] = f"not installed: pip install {library}"
    return found, missing


def _grid(law: Score, steps: int) -> Tensor:
    assert isinstance(law.sde, LinearSDE)
    return grids.default(law.sde, steps, to_zero=True, data_std=law.facts.std)


def _matrix(seen: Observation) -> Tensor:
    eye = torch.eye(seen.operator.shape[0], dtype=F64)
    return seen.operator.forward(eye).T


# --- azula ------------------------------------------------------------------------------------


def _azula_denoiser(law: Score, steps: int) -> Any:
    from azula import denoise, noise

    sde, grid = law.sde, _grid(law, steps)
    assert isinstance(sde, LinearSDE)

    def time(t: Tensor) -> Tensor:
        return grid[((1 - t) * steps).round().long()]

    class Levels(noise.Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return sde.alpha(time(t)), sde.sigma(time(t))

    class Exact(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = Levels()

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
            return denoise.DiracPosterior(law.evaluate(x_t, time(t)).denoised)

    return Exact()


def _norm_of_each() -> AbstractContextManager[Any]:
    """azula's DPS with |o - A D| of each row: the gradient of their sum is that of each."""
    from azula.guidance import dps

    linalg = types.SimpleNamespace(vector_norm=lambda e: e.norm(dim=-1).sum())
    names = {name: getattr(torch, name) for name in dir(torch)}
    return mock.patch.object(dps, "torch", types.SimpleNamespace(**{**names, "linalg": linalg}))


def azula(
    law: Score, seen: Observation, draws: int, steps: int, *, build: Callable[..., Any]
) -> Tensor:
    """A sampler, or azula's DDPM on a guided denoiser, over all rows at once."""
    from azula.sample import DDPMSampler, Sampler

    a, y = _matrix(seen), seen.y.repeat_interleave(draws, 0)
    assert seen.std is not None
    options = {"steps": steps, "silent": True, "dtype": F64}
    made = build(_azula_denoiser(law, steps), y, a, float(seen.std), options)
    sampler = made if isinstance(made, Sampler) else DDPMSampler(made, **options)
    with _norm_of_each() if build is _azula_dps else nullcontext():
        x = sampler(torch.randn(len(y), a.shape[1], dtype=F64))
    return x.reshape(-1, draws, a.shape[1])


def _azula_dps(denoiser: Any, y: Tensor, a: Tensor, _: float, options: dict[str, Any]) -> Any:
    from azula.guidance import DPSSampler

    return DPSSampler(denoiser, y, lambda x: x @ a.T, **options)


def _azula_pgdm(
    denoiser: Any, y: Tensor, a: Tensor, _: float, options: dict[str, Any], eta: float
) -> Any:
    from azula.guidance import PGDMSampler

    inverse = torch.linalg.pinv(a)
    return PGDMSampler(denoiser, y, lambda x: x @ a.T, lambda v: v @ inverse.T, eta=eta, **options)


def _azula_guided(
    denoiser: Any, y: Tensor, a: Tensor, std: float, _: dict[str, Any], name: str, **more: Any
) -> Any:
    from azula import guidance
    from azula.linalg.covariance import IsotropicCovariance

    variance = torch.tensor(std**2, dtype=F64)
    noise = {"cov_y": IsotropicCovariance(variance)} if name[0] in "JM" else {"var_y": variance}
    return getattr(guidance, name)(denoiser, y, lambda x: x @ a.T, **noise, **more)


def azula_tds(law: Score, seen: Observation, draws: int, steps: int) -> Tensor:
    """azula's particles, which take one observation a call, with the twist of PiGDM."""
    from azula.guidance import TDSSampler

    a, denoiser = _matrix(seen), _azula_denoiser(law, steps)
    assert seen.std is not None
    gram, noise = a @ a.T, float(seen.std) ** 2 * torch.eye(len(a), dtype=F64)
    found = []
    for y in seen.y:

        def twist(x: Tensor, s: Tensor, y: Tensor = y) -> Tensor:
            covariance = noise + s**2 / (1 + s**2) * gram
            normal = torch.distributions.MultivariateNormal(y, covariance, validate_args=False)
            return normal.log_prob(x @ a.T)

        sampler = TDSSampler(denoiser, twist, steps=steps, silent=True, dtype=F64)
        x = sampler(torch.randn(PARTICLES, a.shape[1], dtype=F64))
        found.append(x[torch.randperm(PARTICLES)[:draws]])
    return torch.stack(found)


def azula_table() -> dict[str, Run]:
    """DPS, PGDM, TMPD, MMPS, JFPS, DiffPIR and TDS."""
    builds: dict[str, Callable[..., Any]] = {
        "azula DPS": _azula_dps,
        "azula PGDM": partial(_azula_pgdm, eta=1.0),
        "azula TMPD": partial(_azula_guided, name="TMPDenoiser"),
        "azula MMPS, 1 iteration": partial(_azula_guided, name="MMPSDenoiser"),
        "azula MMPS, 3 iterations": partial(_azula_guided, name="MMPSDenoiser", iterations=3),
        "azula DiffPIR": partial(_azula_guided, name="DiffPIRDenoiser"),
    }
    return {
        **{name: partial(azula, build=build) for name, build in builds.items()},
        f"azula TDS, {PARTICLES}": azula_tds,
    }


# --- deepinv ----------------------------------------------------------------------------------


class _Shells(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of torchvision, of which deepinv's samplers use nothing.

    deepinv imports it on sight, and the package index has none that fits a CPU build of torch.
    """

    class Shell(types.ModuleType):
        __path__: tuple[str, ...] = ()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """A shell for torchvision and all inside it."""
        ours = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Empty."""
        return self.Shell(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


@cache
def _deepinv() -> Any:
    """The library, with shells of torchvision where the real one does not work."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        shells = _Shells()
        sys.meta_path.insert(0, shells)
        try:
            return importlib.import_module("deepinv")
        finally:
            sys.meta_path.remove(shells)
    return importlib.import_module("deepinv")


def deepinv(
    law: Score, seen: Observation, draws: int, steps: int, *, term: Callable[[Any], Any]
) -> Tensor:
    """Its ``PosteriorDiffusion`` with the ancestral solver: eta = 1."""
    library, a, sde = _deepinv(), _matrix(seen), law.sde
    assert isinstance(sde, LinearSDE)
    assert seen.std is not None
    single = a.float()

    class Exact(torch.nn.Module):
        def forward(self, y: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            t = sde.time_at(-2 * torch.log(sigma.double().flatten()[0])).clamp_max(sde.T)
            return law.evaluate(sde.alpha(t) * y.double(), t).denoised.to(y)

    sampling = library.sampling
    model = sampling.PosteriorDiffusion(
        term(sampling),
        Exact(),
        sampling.VariancePreservingDiffusion(alpha=1.0),
        sampling.DDPMSolver(timesteps=_grid(law, steps)),
        minus_one_one=False,
    )
    physics = library.physics.LinearPhysics(
        A=lambda x, **_: x @ single.to(x).T,
        A_adjoint=lambda v, **_: v @ single.to(v),
        noise_model=library.physics.GaussianNoise(float(seen.std)),
    )
    y = seen.y.repeat_interleave(draws, 0).float()
    x = model(y, physics, x_init=(len(y), a.shape[1]))
    return x.double().reshape(-1, draws, a.shape[1])


def deepinv_table() -> dict[str, Run]:
    """PosteriorDiffusion with each of its terms that is told the noise, and DPS."""
    terms: dict[str, Callable[[Any], Any]] = {
        "deepinv DPS, norm": lambda s: s.DPSDataFidelity(),
        "deepinv DPS, annealed": lambda s: s.DPSDataFidelity(guidance="annealed"),
        "deepinv PiGDM": lambda s: s.PiGDMDataFidelity(),
        "deepinv moment matching": lambda s: s.MomentMatchingDataFidelity(),
    }
    return {name: partial(deepinv, term=term) for name, term in terms.items()}
