"""The cases that the benchmarks run on: a data law with an exact score, and a range of noise.

Three laws are those of ``tests/problems.py``. Three more were *held out*: they differ in scale,
mean, dimension and smoothness; the first step and the grid of few steps were later chosen on all
six, the weights and the grid of now on all nine with ``new``. The three of ``unseen`` are younger
than all of that; the tuner of now was made with them in view, and before the three of ``fresh``,
on which nothing was chosen. All states here are y = x / alpha, and the noise level is
s = sigma / alpha, so that solvers written for any process start and end at the same points.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sde_gen import EDM, VP, Facts, Gaussian, GaussianMixture, LinearSDE, Moments, Score

HERE = Path(__file__).parent
CACHE = HERE / "results" / "cache"
sys.path.insert(0, str(HERE.parent / "tests"))

import problems  # noqa: E402 (lives beside the tests, which share it)

F64 = torch.float64
BLOCK = 1 << 18
"""Posterior weights computed at once: they stay in the cache."""
Law: TypeAlias = Gaussian | GaussianMixture


def spiral(sde: LinearSDE) -> GaussianMixture:
    """Hold-out, 2-D: 60 unequal components along a spiral, spreads 0.03 to 0.3, off centre."""
    u = torch.linspace(0.1, 1, 60, dtype=F64)
    angle = 4 * math.pi * u
    means = 3 * u.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(sde, 0.2 + u, means + torch.tensor([1.5, -1.0]), 0.03 + 0.27 * u**3)


def rough(sde: LinearSDE) -> GaussianMixture:
    """Hold-out, 24-D: 6 components whose spread falls as a power law, on one common subspace."""
    generator = torch.Generator().manual_seed(2718)
    k = torch.arange(1, 25, dtype=F64)
    means = torch.randn(6, 24, generator=generator, dtype=F64) * 0.8 * k**-0.5
    factor = 0.5 + torch.rand(6, 1, generator=generator, dtype=F64)
    weights = 0.5 + torch.rand(6, generator=generator, dtype=F64)
    return GaussianMixture(sde, weights, means, 0.6 * factor * k**-1)


def tiles(name: str, side: int, n: int, seed: int, grey: bool = False) -> Tensor:
    """n squares of pixels of a photograph that scikit-learn ships, in -1 .. 1: (n, side^2 C)."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image(name).astype(np.float64))
    image = (image.mean(2, keepdim=True) if grey else image) / 127.5 - 1
    height, width = (size // side * side for size in image.shape[:2])
    squares = image[:height, :width].unfold(0, side, side).unfold(1, side, side)
    squares = squares.reshape(-1, side**2 * image.shape[2])
    return squares[torch.randperm(len(squares), generator=torch.Generator().manual_seed(seed))[:n]]


def patches(sde: LinearSDE) -> GaussianMixture:
    """Hold-out, 64-D real data: spread 0.08 around 1000 grey 8 x 8 patches of a photograph."""
    return GaussianMixture(sde, torch.ones(1000), tiles("china.jpg", 8, 1000, 31, grey=True), 0.08)


def wine(sde: LinearSDE) -> GaussianMixture:
    """New hold-out, 13-D real table: spread 0.25 around the standardised rows of wine."""
    from sklearn.datasets import load_wine

    x = torch.from_numpy(load_wine().data)
    x = (x - x.mean(0)) / x.std(0)
    return GaussianMixture(sde, torch.ones(len(x)), x, 0.25)


def tree(sde: LinearSDE) -> GaussianMixture:
    """New hold-out, 8-D: clusters of clusters, spreads 1.5, 0.3 and 0.04, weights unequal."""
    generator = torch.Generator().manual_seed(1414)
    trunk = 1.5 * torch.randn(8, 1, 8, generator=generator, dtype=F64)
    leaves = trunk + 0.3 * torch.randn(8, 8, 8, generator=generator, dtype=F64)
    weights = 0.2 + torch.rand(64, generator=generator, dtype=F64)
    return GaussianMixture(sde, weights, leaves.reshape(64, 8), 0.04)


def flower(sde: LinearSDE) -> GaussianMixture:
    """New hold-out, 27-D real data: spread 0.06 around 400 patches of 3 x 3 pixels in colour."""
    return GaussianMixture(sde, torch.ones(400), tiles("flower.jpg", 3, 400, 59), 0.06)


def helix(sde: LinearSDE) -> GaussianMixture:
    """Unseen, 6-D: 90 components along a closed curve of three waves, spreads 0.04 to 0.2."""
    u = 2 * math.pi * torch.arange(90, dtype=F64) / 90
    waves = [f(k * u) / k for k in (1, 2, 5) for f in (torch.cos, torch.sin)]
    std = 0.12 + 0.08 * torch.sin(3 * u)
    return GaussianMixture(sde, torch.ones(90), 1.5 * torch.stack(waves, 1), std)


def texture(sde: LinearSDE) -> GaussianMixture:
    """Unseen, 48-D real data: spread 0.07 around 500 patches of 4 x 4 pixels in colour."""
    return GaussianMixture(sde, torch.ones(500), tiles("china.jpg", 4, 500, 83), 0.07)


def crumbs(sde: LinearSDE) -> GaussianMixture:
    """Unseen, 12-D: 40 components with weights 1 / k, spreads from 0.03 to 1."""
    generator = torch.Generator().manual_seed(577)
    k = torch.arange(1, 41, dtype=F64)
    means = 0.7 * torch.randn(40, 12, generator=generator, dtype=F64)
    std = 0.03 * (1 / 0.03) ** torch.rand(40, generator=generator, dtype=F64)
    return GaussianMixture(sde, 1 / k, means, std)


def shells(sde: LinearSDE) -> GaussianMixture:
    """Fresh, 5-D: 80 components of spread 0.07 on two spheres."""
    generator = torch.Generator().manual_seed(4242)
    u = torch.randn(80, 5, generator=generator, dtype=F64)
    radii = torch.tensor([1.0, 2.0], dtype=F64).repeat(40)
    means = u * (radii / u.norm(dim=1)).unsqueeze(1)
    return GaussianMixture(sde, torch.ones(80), means, 0.07)


def cross(sde: LinearSDE) -> GaussianMixture:
    """Fresh, 10-D: 20 unequal components at +-2 on the axes, a spread for each coordinate."""
    generator = torch.Generator().manual_seed(9)
    means = 2 * torch.cat([torch.eye(10, dtype=F64), -torch.eye(10, dtype=F64)])
    std = 0.05 + 0.5 * torch.rand(20, 10, generator=generator, dtype=F64)
    return GaussianMixture(sde, torch.arange(1, 21).double(), means, std)


def cancer(sde: LinearSDE) -> GaussianMixture:
    """Fresh, 30-D real table: spread 0.2 around the standardised rows of breast cancer."""
    from sklearn.datasets import load_breast_cancer

    x = torch.from_numpy(load_breast_cancer().data)
    x = (x - x.mean(0)) / x.std(0)
    return GaussianMixture(sde, torch.ones(len(x)), x, 0.2)


Group = Literal["main", "held out", "new", "unseen", "fresh"]


@dataclass(frozen=True)
class Problem:
    """A law, how many trajectories are judged, and what it was used for."""

    law: Callable[[LinearSDE], Law]
    n: int
    group: Group = "main"


PROBLEMS = {
    "grid25": Problem(problems.grid25, 1024),
    "digits": Problem(problems.digits, 128),
    "powerlaw": Problem(problems.powerlaw, 256),
    "spiral": Problem(spiral, 1024, "held out"),
    "rough": Problem(rough, 512, "held out"),
    "patches": Problem(patches, 128, "held out"),
    "wine": Problem(wine, 128, "new"),
    "tree": Problem(tree, 256, "new"),
    "flower": Problem(flower, 128, "new"),
    "helix": Problem(helix, 256, "unseen"),
    "texture": Problem(texture, 128, "unseen"),
    "crumbs": Problem(crumbs, 256, "unseen"),
    "shells": Problem(shells, 192, "fresh"),
    "cross": Problem(cross, 192, "fresh"),
    "cancer": Problem(cancer, 192, "fresh"),
}

RANGES: dict[str, tuple[LinearSDE, float]] = {"edm": (EDM(80.0), 0.002), "vp": (VP(), 1e-3)}
"""The process, and the time at which everyone ends."""


@dataclass
class Case:
    """One problem on one range: the score, the starting points and the exact endpoints."""

    problem: str
    range: str
    seed: int = 0
    n: int | None = None
    calls: int = field(default=0, init=False)
    rows: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.sde, self.end = RANGES[self.range]
        self.score = PROBLEMS[self.problem].law(self.sde)
        self._sigma_score = PROBLEMS[self.problem].law(EDM(1e3))
        self.s_max, self.s_min = (self.level(t) for t in (self.sde.T, self.end))
        n = self.n or PROBLEMS[self.problem].n
        self.x = problems.start(self.score, n, self.sde.T, self.seed)
        self.y = self.x / float(self.sde.alpha(self.sde.T))

    @property
    def name(self) -> str:
        return f"{self.problem}-{self.range}"

    def level(self, t: float) -> float:
        """sigma / alpha at time t."""
        return float(self.sde.sigma(t) / self.sde.alpha(t))

    def count(self, y: Tensor) -> None:
        """One call of the network, on the rows of y."""
        self.calls += 1
        self.rows += len(y)

    def denoise(self, y: Tensor, s: Tensor | float) -> Tensor:
        """E[x_0 | y] in float64 at the noise level s; counts the call."""
        self.count(y)
        y, w, law = y.double(), float(s) ** 2, self.score
        if isinstance(law, GaussianMixture) and law.variance.numel() == 1:
            # One matrix product each way: the sweep makes a hundred thousand calls.
            c = float(law.variance)
            scaled = law.means / (c + w)
            bias = law.log_weights - 0.5 * (law.means * scaled).sum(1)
            parts = [
                torch.softmax(torch.addmm(bias, rows, scaled.T), 1) @ law.means
                for rows in y.split(max(1, BLOCK // len(law.means)))
            ]
            return (c / (c + w)) * y + (w / (c + w)) * torch.cat(parts)
        if isinstance(law, Gaussian):
            shrink, z = law.variance / (law.variance + w), y - law.mean
            z = z * shrink if law.basis is None else (z @ law.basis * shrink) @ law.basis.T
            return law.mean + z
        return y + w * self._sigma_score(y, float(s))

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Exact mean (D,) and covariance (D, D) of the data."""
        law = self.score
        if isinstance(law, Gaussian):
            basis = torch.eye(law.mean.numel(), dtype=F64) if law.basis is None else law.basis
            return law.mean, basis * law.variance @ basis.T
        p = law.log_weights.exp()
        mean = p @ law.means
        v = law.variance.expand(len(p), mean.numel()) if law.variance.ndim > 1 else law.variance
        centred = law.means - mean
        return mean, (centred.T * p) @ centred + torch.diag(p @ v)

    @property
    def variance(self) -> float:
        """Mean variance of the data over the coordinates."""
        return float(self.moments[1].diagonal().mean())

    @property
    def key(self) -> str:
        """A fingerprint of the starting points."""
        return hashlib.blake2b(self.y.numpy().tobytes(), digest_size=6).hexdigest()

    @cached_property
    def reference(self) -> Tensor:
        """Endpoints of the exact probability flow, kept on disk."""
        path = CACHE / f"{self.name}-{self.seed}-{self.key}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        CACHE.mkdir(parents=True, exist_ok=True)
        y = self.flow()
        np.save(path, y.numpy())
        return y

    def flow(self, rtol: float = 1e-12, score_calls: list[int] | None = None) -> Tensor:
        """Probability flow: closed form for a Gaussian, otherwise DOP853 in lambda = -log s.

        On z = (y - m) / sqrt(V + s^2) the flow is dz/dlambda = s^2 / (V + s^2) z + ..., which is
        of order one everywhere.
        """
        if isinstance(self.score, Gaussian):
            end = problems.gaussian_flow(self.score, self.x, self.sde.T, self.end)
            return end / float(self.sde.alpha(self.end))
        from scipy.integrate import solve_ivp

        shape, v = self.y.shape, self.variance
        mean = self.moments[0].reshape(shape[1:])

        def rate(lam: float, z: np.ndarray) -> np.ndarray:
            w = math.exp(-2 * lam)
            r = math.sqrt(v + w)
            y = mean + r * torch.from_numpy(z).view(shape)
            drift = (self.denoise(y, math.exp(-lam)) - y) / r + w / r**3 * (y - mean)
            return drift.flatten().numpy()

        a, b = (math.sqrt(v + s**2) for s in (self.s_max, self.s_min))
        z = ((self.y - mean) / a).flatten().numpy()
        run = solve_ivp(
            rate,
            (-math.log(self.s_max), -math.log(self.s_min)),
            z,
            method="DOP853",
            rtol=rtol,
            atol=rtol,
        )
        if score_calls is not None:
            score_calls.append(run.nfev)
        return mean + b * torch.from_numpy(run.y[:, -1]).view(shape)


class Model(Score):
    """What sde_gen is given: the exact score, and of the data only the standard deviation, or
    (``covariance``) mean and covariance. Counts its calls on the case."""

    def __init__(self, case: Case, covariance: bool = False) -> None:
        self.case, self.sde = case, case.sde
        mean, matrix = case.moments
        moments = Moments.of(matrix, mean) if covariance else None
        self.facts = Facts(case.score.shape, math.sqrt(case.variance), moments)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        if isinstance(t, Tensor) and t.ndim:
            self.case.count(x)
            return self.case.score(x, t)
        alpha, sigma = (float(f(t)) for f in (self.sde.alpha, self.sde.sigma))
        return (alpha * self.case.denoise(x / alpha, sigma / alpha) - x) / sigma**2


def errors(y: Tensor, reference: Tensor) -> tuple[float, float]:
    """RMSE over samples and coordinates, and the same without the worst 5 % of samples."""
    if not bool(torch.isfinite(y).all()):
        return math.inf, math.inf
    e = ((y - reference) ** 2).flatten(1).mean(1).sort().values
    return float(e.mean().sqrt()), float(e[: math.ceil(0.95 * len(e))].mean().sqrt())
