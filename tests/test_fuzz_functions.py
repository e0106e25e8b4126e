"""Bad input to every public function: an answer, or an error that names the argument.

The table says how each function is called rightly; one argument at a time is then replaced by
something odd. What is taken all the same is taken; anything but a ``TypeError``, ``ValueError``,
``FloatingPointError`` or an error of the library that names the argument is a fault.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from outcomes import outcome

import sde_gen as sg
from sde_gen import contrast, data, grids, metrics, plots, training
from sde_gen.networks import MLP, Autoencoder, UNet
from sde_gen.sampling import Pace, timed
from sde_gen.solvers import Spectral, ddim, deis, dpm_solver, dpm_solver_pp, sa_solver, unipc

ERRORS = (TypeError, ValueError, FloatingPointError, FileNotFoundError)
ERRORS += (training.CheckpointError, training.TrainingError)

BAD: dict[str, Any] = {
    "None": None,
    "NaN": math.nan,
    "infinity": math.inf,
    "- infinity": -math.inf,
    "minus one": -1,
    "zero": 0,
    "a half": 0.5,
    "true": True,
    "numpy NaN": np.float64("nan"),
    "text": "abc",
    "no text": "",
    "bytes": b"abc",
    "object": object(),
    "class": sg.EulerMaruyama,
    "complex": 1j,
    "empty list": [],
    "ragged list": [[1.0], [1.0, 2.0]],
    "list of texts": ["a", "b"],
    "dictionary": {"a": 1},
    "array of objects": np.array([object(), None]),
    "complex array": np.ones((4, 2), complex),
    "array of texts": np.array(["a", "b"]),
    "empty tensor": torch.zeros(0),
    "empty batch": torch.zeros(0, 2),
    "integer tensor": torch.ones(4, 2, dtype=torch.int64),
    "bool tensor": torch.ones(4, 2, dtype=torch.bool),
    "complex tensor": torch.ones(4, 2, dtype=torch.complex64),
    "NaN tensor": torch.full((4, 2), math.nan),
    "infinite tensor": torch.full((4, 2), math.inf),
    "wrong shape": torch.ones(3, 5, 7),
}

# A class is callable; and what a function of the caller's raises is the caller's.
CALLABLE = {"score", "target", "log_density", "features", "distance", "net", "objective"}
CALLABLE |= {"transform", "weighting"}

# What is right, and long: the default of 10,000 steps.
RIGHT = {("recipe", "None")}

# By what else an argument may be called.
ALSO = {
    "t": "times?",
    "at": "times?",
    "y": "labels?|context",
    "x": "state|levels",
    "data": "folders?",
    "a": "drift",
    "model": "score|data",
    "process": "sde",
    "path": "folders?|files?",
    "law": "samples",
}


class Entry(NamedTuple):
    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]


def entry(call: Callable[..., Any], **good: Any) -> Entry:
    """A function and arguments that are right; one that is a ``Make`` is made for each call."""
    make = {k: v.make() for k, v in good.items() if isinstance(v, Make)}
    assert set(make) <= set(good)
    return Entry(
        call, lambda: {k: v.make() if isinstance(v, Make) else v for k, v in good.items()}
    )


class Make(NamedTuple):
    make: Callable[[], Any]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


VP, VE = sg.VP(), sg.VE()
CLD, LONG = sg.CriticallyDamped(), sg.VE(sg.schedules.Geometric(0.01, 500.0))
X, T4, TIMES = draw(4, 2), torch.full((4,), 0.5), [1.0, 0.5, 0.1]
GAUSS = sg.Gaussian(VP, torch.tensor([1.0, 0.0]), 0.5)
MIXTURE = sg.GaussianMixture(VP, torch.tensor([0.5, 0.5]), draw(2, 2), 0.3)
EULER = sg.EulerMaruyama()
LEVELS = torch.randint(4, (4, 2), generator=torch.Generator().manual_seed(0))
Y4 = torch.tensor([0, 1, 2, 0])
SEEDED = Make(lambda: torch.Generator().manual_seed(0))
NETWORK = Make(lambda: sg.ScoreNetwork(MLP((2,), 8, 1), VP))
CONDITIONAL = Make(lambda: sg.ScoreNetwork(MLP((2,), 8, 1, classes=3), VP))
CODEC = Autoencoder((2,), (2,), width=4)
LOGITS = MLP((2,), 8, 1, outputs=3)
SHORT = sg.Recipe(steps=1, batch=4)
TRAIN = partial(sg.train, progress=False)
SOLVE = partial(sg.solve, VP.reverse(GAUSS))


def log_density(x: torch.Tensor) -> torch.Tensor:
    return GAUSS.log_prob(x, 0.5)


def saved(path: Any, device: Any, net: Any) -> Any:
    sg.save(sg.ScoreNetwork(MLP((2,), 8, 1), VP), "model")
    return sg.load(path, device, net)


def lasting(start: Callable[..., sg.Noise], **arguments: Any) -> torch.Tensor:
    return start(**arguments).start(X)


ROOMS: dict[str, dict[str, Entry]] = {
    "data": {
        "centre": entry(data.centre, levels=LEVELS, n_levels=4),
        "dequantise": entry(data.dequantise, levels=LEVELS, n_levels=4, generator=SEEDED),
        "quantise": entry(data.quantise, x=X, n_levels=4),
        "Dequantise": entry(data.Dequantise, n_levels=4),
        "Dequantise()": entry(data.Dequantise(4), x=X, noise=SEEDED),
        "digits": entry(data.digits, split="test"),
        "toy": entry(data.toy, name="grid_25", n=3, generator=SEEDED),
        **{name: entry(f, n=3, generator=SEEDED) for name, f in data.TOYS.items()},
        "image_folder": entry(data.image_folder, path="images", channels=3),
        "class_folders": entry(data.class_folders, path="classes", channels=3),
        "load_array": entry(data.load_array, path="x.npz", key="x", n_levels=4),
        "load_labels": entry(data.load_labels, path="x.npz", key="y"),
        "load_image": entry(data.load_image, path="images/0.png", channels=1),
        "read_array": entry(data.read_array, path="x.npz", key="x"),
    },
    "plots": {
        "image_grid": entry(
            plots.image_grid, x=draw(4, 1, 3, 3), rows=2, labels=["a", "b"], title="", ax=None
        ),
        "signals": entry(
            plots.signals,
            x=draw(4, 2, 5),
            at=[0, 1, 2, 3, 4],
            rows=2,
            labels=["a", "b"],
            channels=["u", "v"],
            title="",
        ),
        "trajectories_1d": entry(
            plots.trajectories_1d, times=[1.0, 0.0], paths=draw(2, 5), title=""
        ),
        "trajectories_2d": entry(plots.trajectories_2d, paths=draw(2, 5, 2), shown=3, ax=None),
        "density_over_time": entry(
            plots.density_over_time,
            log_density=sg.Gaussian(VP, torch.zeros(1)).log_prob,
            times=[1.0, 0.1],
            paths=draw(2, 5),
            extent=(-1, 1),
            shown=3,
            ax=None,
        ),
        "density_2d": entry(
            plots.density_2d,
            log_density=log_density,
            extent=(-1, 1, -1, 1),
            points=X,
            resolution=9,
            ax=None,
        ),
        "score_field": entry(
            plots.score_field,
            score=lambda x: GAUSS(x, 0.5),
            extent=(-1, 1, -1, 1),
            log_density=log_density,
            arrows=5,
            ax=None,
        ),
        "noise_schedule": entry(plots.noise_schedule, sdes=VP, n=5),
        "rank_curves": entry(
            plots.rank_curves, ranks={"u": torch.linspace(0, 1, 9)}, size=0.01, title="", ax=None
        ),
        "movie_2d": entry(
            plots.movie_2d,
            paths=draw(2, 5, 2),
            extent=(-1, 1, -1, 1),
            captions=["a", "b"],
            groups=[0, 1, 0, 1, 0],
            fps=5,
        ),
    },
    "metrics": {
        "energy_distance": entry(metrics.energy_distance, x=X, y=draw(5, 2)),
        "mmd": entry(metrics.mmd, x=X, y=draw(5, 2), bandwidth=1.0),
        "sliced_wasserstein": entry(
            metrics.sliced_wasserstein, x=X, y=draw(5, 2), projections=3, generator=SEEDED
        ),
        "frechet_distance": entry(metrics.frechet_distance, x=X, y=draw(5, 2), features=None),
        "nearest": entry(metrics.nearest_neighbour_distance, x=X, reference=draw(5, 2)),
        "modes": entry(metrics.modes, x=X, centres=draw(5, 2), radius=1.0),
        "coverage": entry(metrics.coverage, y=[0, 1], reference=[1, 1, 0]),
        "power_spectrum": entry(metrics.power_spectrum, x=draw(2, 1, 4, 4)),
        "sharpness": entry(metrics.sharpness, x=draw(2, 1, 4, 4), reference=draw(3, 1, 4, 4)),
    },
    "contrast": {
        "GAN": entry(
            contrast.GAN, shape=(2,), latent=2, width=4, depth=1, classes=2, gamma=0.1, ratio=1.0
        ),
        "VAE": entry(contrast.VAE, codec=CODEC, components=2, classes=3),
        "with_mixture": entry(
            contrast.VAE(CODEC).with_mixture, x=X, y=[0, 0, 1, 1], components=1, seed=0
        ),
        "HVAE": entry(contrast.HVAE, codec=CODEC, above=(2,), width=4, depth=1, classes=2),
        "terms": entry(contrast.HVAE(CODEC, (2,), 4).terms, x=X, noise=sg.Streams(0)),
        "sample": entry(
            contrast.GAN((2,), 2, 4, classes=3).sample, n=4, seed=0, y=[0, 1, 2, 0], first=0
        ),
        "jensen_shannon": entry(contrast.jensen_shannon, real=X, fake=X),
    },
    "schedules": {
        "Linear": entry(sg.schedules.Linear, beta_min=0.1, beta_max=20.0, T=1.0),
        "Quadratic": entry(sg.schedules.Quadratic, beta_min=0.1, beta_max=20.0, T=1.0),
        "Sigmoid": entry(sg.schedules.Sigmoid, beta_min=0.1, beta_max=20.0, steepness=6.0, T=1.0),
        "Cosine": entry(sg.schedules.Cosine, offset=0.008, total=12.0, T=1.0),
        "Geometric": entry(sg.schedules.Geometric, sigma_min=0.01, sigma_max=50.0, T=1.0),
        "Power": entry(sg.schedules.Power, p=1.0, T=1.0),
        "Tabulated": entry(sg.schedules.Tabulated, betas=[0.1, 0.2], T=1.0),
    },
    "sdes": {
        "VP": entry(sg.VP, schedule=sg.schedules.Linear()),
        "VE": entry(sg.VE, schedule=sg.schedules.Geometric()),
        "SubVP": entry(sg.SubVP, schedule=sg.schedules.Linear()),
        "EDM": entry(sg.EDM, sigma_max=80.0),
        "Wiener": entry(sg.Wiener, end=1.0),
        "OrnsteinUhlenbeck": entry(sg.OrnsteinUhlenbeck, a=-1.0, g=1.0, end=5.0),
        "CriticallyDamped": entry(
            sg.CriticallyDamped, schedule=sg.schedules.Linear(), mass=0.25, start=0.04
        ),
        "MatrixOrnsteinUhlenbeck": entry(
            sg.MatrixOrnsteinUhlenbeck, a=[[-1.0]], g=[[1.0]], schedule=sg.schedules.Linear()
        ),
        "Langevin": entry(sg.Langevin, score=GAUSS, schedule=sg.schedules.Linear(), at=0.1),
        "perturb": entry(VP.perturb, x=X, t=T4, noise=SEEDED),
        "drift": entry(VP.drift, x=X, t=T4),
        "tweedie": entry(VP.tweedie, x=X, t=T4, s=X),
        "prior_log_prob": entry(VP.prior_log_prob, x=X),
        "alpha": entry(VP.alpha, t=T4),
        "sigma": entry(VE.sigma, t=T4),
        "time_at": entry(VP.time_at, log_snr=T4),
        "reverse": entry(VP.reverse, score=GAUSS, eta=1.0),
        "probability_flow": entry(VP.probability_flow, score=GAUSS),
        "damped.perturb": entry(CLD.perturb, x=draw(4, 2, 2), t=T4, noise=SEEDED),
        "damped.drift": entry(CLD.drift, x=draw(4, 2, 2), t=T4),
        "damped.transition": entry(CLD.transition, t=T4),
    },
    "noise and moments": {
        "Streams": entry(partial(lasting, sg.Streams), seed=0, samples=0),
        "BrownianPath": entry(partial(lasting, sg.BrownianPath), seed=0, samples=0),
        "Streams()": entry(sg.Streams(0), x=X, t=1.0, s=0.5, k=0),
        "spread": entry(sg.Streams(0).spread, n=4, device="cpu"),
        "Moments": entry(sg.Moments, values=torch.ones(2), mean=torch.zeros(2), basis=None),
        "data_moments": entry(sg.data_moments, x=draw(9, 3), rank=1),
    },
    "scores": {
        "Gaussian": entry(sg.Gaussian, sde=VP, mean=X[0], std=0.5, covariance=None),
        "GaussianMixture": entry(
            sg.GaussianMixture, sde=VP, weights=torch.ones(2), means=X[:2], std=0.5
        ),
        "Empirical": entry(sg.Empirical, sde=VP, data=X),
        "CorrelatedMixture": entry(
            sg.CorrelatedMixture,
            sde=VP,
            weights=torch.ones(1),
            means=X[:1],
            covariances=torch.eye(2)[None],
        ),
        "Lifted": entry(sg.Lifted, score=sg.Gaussian(LONG, X[0], 0.5), sde=CLD),
        "score()": entry(MIXTURE, x=X, t=T4),
        "log_prob": entry(MIXTURE.log_prob, x=X, t=T4),
        "ScoreNetwork": entry(
            sg.ScoreNetwork, net=MLP((2,), 8, 1), sde=VP, prediction="noise", facts=sg.Facts()
        ),
        "network()": entry(sg.ScoreNetwork(MLP((2,), 8, 1), VP).eval(), x=X, t=T4),
        "Classifier": entry(sg.Classifier, net=LOGITS, y=Y4, sde=VP, facts=sg.Facts()),
        "Classifier()": entry(sg.Classifier(LOGITS, 1, VP), x=X, t=T4),
        "ClassifierFree": entry(sg.ClassifierFree, score=CONDITIONAL, y=Y4, weight=1.0),
    },
    "networks": {
        "MLP": entry(
            MLP, shape=(2,), width=8, depth=1, classes=3, dropout=0.1, embedding="fourier"
        ),
        "UNet": entry(
            UNet,
            shape=(1, 4, 4),
            channels=4,
            multipliers=(1, 2),
            blocks=1,
            attention=(2,),
            heads=1,
            dropout=0.1,
            classes=3,
            embedding="fourier",
            width=8,
        ),
        "MLP()": entry(MLP((2,), 8, 1, classes=3), x=X, c=torch.zeros(4), y=Y4),
        "UNet()": entry(
            UNet((1, 4, 4), 4, (1,), classes=3), x=draw(4, 1, 4, 4), c=torch.zeros(4), y=Y4
        ),
    },
    "grids": {
        "uniform": entry(grids.uniform, sde=VP, steps=3, start=1.0, end=0.1, power=1.0),
        "quadratic": entry(grids.quadratic, sde=VP, steps=3, start=1.0, end=0.1),
        "karras": entry(grids.karras, sde=VP, steps=3, start=1.0, end=0.1, rho=7.0),
        "log_snr": entry(grids.log_snr, sde=VP, steps=3, start=1.0, end=0.1),
        "default": entry(grids.default, sde=VP, steps=3, start=1.0, end=0.1, data_std=1.0),
        "from_table": entry(grids.from_table, sde=VP, ratios=[3.0, 1.0, 0.1], steps=2),
        "default_end": entry(grids.default_end, sde=VP),
    },
    "solvers": {
        "Exponential": entry(
            sg.Exponential, order=2, reference=0.25, corrector=True, weights=None
        ),
        "Propagator": entry(sg.Propagator, order=2, reference=1.0),
        "RungeKutta": entry(sg.RungeKutta, order=4),
        "SciPy": entry(sg.SciPy, method="RK45", rtol=1e-3, atol=1e-3),
        "TorchSDE": entry(sg.TorchSDE, method="euler", substeps=1),
        "Adaptive": entry(sg.Adaptive, rtol=1e-3, atol=1e-3, max_steps=100),
        "Churn": entry(sg.Churn, solver=None, amount=0.1, low=0.0, high=1.0, inflate=1.0),
        "PredictorCorrector": entry(
            sg.PredictorCorrector, predictor=None, eta=1.0, corrections=1, reference=0.25
        ),
        "Spectral": entry(Spectral, variance=1.0, dimensions=2),
        "ddim": entry(ddim, eta=0.5),
        **{
            f.__name__: entry(f, order=2)
            for f in (deis, dpm_solver, dpm_solver_pp, sa_solver, unipc)
        },
    },
    "sampling": {
        "sample": entry(
            sg.sample,
            model=GAUSS,
            n=3,
            steps=2,
            seed=0,
            eta=0.0,
            solver=None,
            times=None,
            dtype=torch.float32,
            device="cpu",
            chunk=2,
        ),
        "sample a network": entry(sg.sample, model=NETWORK, n=3, steps=2, seed=0, eta=1.0),
        "solve": entry(
            sg.solve,
            process=VP.reverse(GAUSS),
            x=X,
            times=TIMES,
            solver=EULER,
            noise=0,
            chunk=2,
        ),
        **{
            f"solve by {type(solver).__name__}": entry(
                partial(sg.solve, VP.probability_flow(GAUSS), noise=0, solver=solver),
                x=X,
                times=TIMES,
            )
            for solver in (sg.Heun(), sg.SciPy(), sg.Adaptive(), sg.Exponential(2))
        },
        "Pace": entry(Pace, chunk=3, channels_last=False, compiled=False, device="cpu"),
        "timed": entry(timed, model=NETWORK, compiled=False),
        "default_solver": entry(sg.default_solver, model=GAUSS, eta=0.0),
    },
    "likelihood": {
        "log_prob": entry(sg.log_prob, model=GAUSS, x=X, probes=1, seed=0, solver=None, chunk=2),
        "bits_per_dim": entry(
            sg.bits_per_dim, model=GAUSS, levels=LEVELS, n_levels=4, draws=1, seed=0, chunk=2
        ),
        "error_budget": entry(
            sg.error_budget, model=GAUSS, law=GAUSS, steps=2, n=8, seed=0, fine=4, real=None
        ),
    },
    "mcmc": {
        "langevin": entry(
            sg.langevin,
            target=GAUSS,
            x=X,
            steps=4,
            h=0.1,
            method=sg.MALA(),
            at=0.1,
            warmup=2,
            thin=1,
            noise=0,
            preconditioner=None,
        ),
        "annealed_langevin": entry(
            sg.annealed_langevin, score=GAUSS, x=X, times=TIMES, steps=2, eps=0.1, noise=0
        ),
        "modes": entry(sg.mcmc.modes, score=GAUSS, x=X, times=TIMES, steps=2),
        "MALA": entry(sg.MALA, acceptance=0.5),
        "BAOAB": entry(sg.BAOAB, friction=1.0),
        "OBABO": entry(sg.OBABO, friction=1.0),
    },
    "training": {
        "Recipe": entry(
            sg.Recipe,
            steps=1,
            minutes=1.0,
            batch=4,
            lr=1e-3,
            warmup=0.1,
            clip=1.0,
            ema=0.1,
            every=1,
            save_every=1.0,
            seed=0,
        ),
        "train": entry(
            TRAIN,
            model=NETWORK,
            data=X,
            labels=None,
            recipe=SHORT,
            objective=None,
            transform=None,
            device="cpu",
            folder=None,
        ),
        "train with labels": entry(TRAIN, model=CONDITIONAL, data=X, labels=Y4, recipe=SHORT),
        "dsm_loss": entry(sg.dsm_loss, score=GAUSS, sde=VP, x=X, t=T4, noise=SEEDED),
        "classifier_loss": entry(
            sg.guidance.classifier_loss, net=LOGITS, sde=VP, x=X, y=Y4, t=T4, data_std=1.0
        ),
        "Denoising": entry(training.Denoising, dropout=0.1),
        "Denoising()": entry(
            training.Denoising(), model=CONDITIONAL, x=X, y=Y4, noise=sg.Streams(0)
        ),
        "Classification": entry(training.Classification, sde=VP, facts=sg.Facts()),
        "KarrasWeight": entry(training.KarrasWeight, data_std=1.0),
        "MinSNRWeight": entry(training.MinSNRWeight, gamma=5.0),
        "LogNormalTimes": entry(training.LogNormalTimes, log_mean=-1.2, log_std=1.8),
        "uniform_times": entry(training.uniform_times, sde=VP, u=T4),
        "pick_device": entry(training.pick_device, device="cpu"),
        "save": entry(sg.save, model=NETWORK, path="saved"),
        "load": entry(saved, path="model", device="cpu", net=None),
    },
    "tuning": {
        "tune_grid": entry(
            sg.tune_grid, model=GAUSS, solver=None, steps=5, n=8, end=None, data=None, seed=0
        ),
    },
}


def calls(rooms: list[str]) -> list[tuple[str, str, str, str]]:
    """(room, function, argument, bad value), all of them."""
    return [
        (room, name, argument, bad)
        for room in rooms
        for name, (_, good) in ROOMS[room].items()
        for argument in good()
        for bad in BAD
        if not (bad == "class" and argument in CALLABLE) and (argument, bad) not in RIGHT
    ]


def fault(room: str, name: str, argument: str, bad: str) -> str | None:
    """What is wrong with the answer to one bad call."""
    call, good = ROOMS[room][name]
    error = outcome(lambda: call(**{**good(), argument: BAD[bad]}), seconds=10)
    if error is None:
        return None
    words = rf"(?i)\b({argument}|{ALSO.get(argument, argument)})\b"
    if isinstance(error, ERRORS) and re.search(words, str(error)):
        return None
    text = " ".join(str(error).split())[:90]
    return f"{room}: {name}({argument}={bad}): {type(error).__name__}: {text}"


def compact(faults: list[str]) -> str:
    """A line for each argument, with the values that it does not stand."""
    found: dict[str, list[str]] = {}
    for text in faults:
        head, value, rest = re.match(r"(.*?\(\w+)=(.*?)\): (.*)", text).groups()  # type: ignore[union-attr]
        found.setdefault(head + ")", []).append(f"{value}: {rest}")
    lines = [f"{head} x {len(rest)}: {rest[0]}" for head, rest in found.items()]
    return "\n".join([f"{len(faults)} faults", *lines])


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the readers of the table read, in a folder that anything may be written to."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for folder in ("images", "classes/cat", "classes/dog"):
        Path(folder).mkdir(parents=True)
        Image.new("L", (3, 3)).save(f"{folder}/0.png")
    np.savez("x.npz", x=LEVELS.numpy(), y=Y4.numpy())


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_calls_rightly(room: str) -> None:
    for name, (call, good) in ROOMS[room].items():
        assert outcome(lambda call=call, good=good: call(**good()), seconds=60) is None, name


def found(listed: list[tuple[str, str, str, str]]) -> str:
    """The faults of these calls."""
    return compact([text for call in listed if (text := fault(*call))])


@pytest.mark.parametrize("room", ["data", "plots"])
def test_bad_arguments_are_refused_by_name(room: str) -> None:
    assert found(random.Random(0).sample(calls([room]), 250)) == "0 faults"


@pytest.mark.slow
def test_every_bad_call() -> None:
    faults = found(calls([*ROOMS]))
    assert faults == "0 faults", faults
