"""The models that ``generators.py`` compares: how each is made, trained, drawn from and priced.

What may be chosen of a model are fields of its ``Task``; a setting is what it changes of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mnist
import torch
from mnist import CLASSES, LowTimes
from torch import Tensor

import sde_gen as sg
from sde_gen import contrast, latent
from sde_gen.contrast import GAN, HVAE, VAE
from sde_gen.data import Dequantise, Labelled, centre
from sde_gen.latent import Elbo, Joint, LatentModel
from sde_gen.networks import MLP, Autoencoder, UNet
from sde_gen.training import Denoising, Layout

CALLS, LATENT_CALLS = 25, 100
"""Of the U-Net, by the probability flow; of the network of latents, which costs little, by the
reverse SDE."""


class Task(NamedTuple):
    """Data, levels (N, 1, H, W) as uint8, and what may be chosen."""

    train: Labelled
    test: Labelled
    levels: int
    seconds: float
    """CPU time of each model."""
    samples: int
    latent: int
    width: int
    """Of the autoencoder at its finest level."""
    patch: int = 1
    """Side of what is a place of that level."""
    std: float = 0.1
    """The encoder's noise of the unified form."""
    share: float = 2 / 3
    """Of the time, for the autoencoder; the rest is for its score."""
    score: int = 128
    """Width of the network of latents."""
    channels: int = 16
    """Of the U-Net."""
    rival: int = 32
    """Width of the GAN."""
    gamma: float = 10.0
    """Its R1."""
    free: float = 0.5
    """Nats of each level of the hierarchical VAE that cost nothing."""
    batch: int = 64
    lr: float = 3e-3

    @property
    def x(self) -> Tensor:
        """What is learned from, the centres of its levels."""
        return centre(self.train.x.long(), self.levels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, H, W)."""
        return tuple(self.train.x.shape[1:])

    def codec(self, std: float | None = None) -> Autoencoder:
        """An autoencoder that is not trained."""
        options = {"levels": self.levels, "components": 3, "std": std, "patch": self.patch}
        return Autoencoder(self.shape, (self.latent,), self.width, **options)


Change = dict[str, Any]
"""Fields of a task that a setting changes."""


class Row(NamedTuple):
    """What is to be found out about a model."""

    draw: Callable[[Tensor], Tensor]
    """labels (n,) -> images (n, 1, H, W)."""
    calls: int
    cost: Callable[[Labelled], dict[str, Any]] | None = None
    """Test data -> bits a dimension: rate and distortion, or their sum alone."""
    told: bool = True
    """Whether it knows the classes."""
    model: Any = None
    """What is kept."""


class Budget:
    """A run that ends after so many CPU seconds: a callback sets the clock of the trainer."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds, self.steps = time.process_time(), seconds, 0

    def __call__(self, trainer: Any, step: int, loss: float) -> None:
        """At every look at the loss."""
        trainer.elapsed, self.steps = time.process_time() - self.start, step


def fit(model: Any, x: Tensor, y: Tensor | None, task: Task, part: float, **options: Any) -> Any:
    """The model after this part of its CPU time."""
    torch.manual_seed(0)
    budget = Budget(part * task.seconds)
    recipe = sg.Recipe(
        minutes=budget.seconds / 60,
        steps=10**7,
        batch=options.pop("batch", task.batch),
        lr=options.pop("lr", task.lr),
        layout=Layout(channels_last=x.ndim == 4),
    )
    learn: Any = contrast.train if isinstance(model, contrast.Rival) else sg.train
    common = {"callbacks": [budget], "device": "cpu", "progress": False}
    model = learn(model, x, y, recipe, **common, **options)
    spent = time.process_time() - budget.start
    print(f"  {type(model).__name__}: {budget.steps} steps, {spent:.0f} s", flush=True)
    return model


def bits(cost: Any) -> dict[str, float]:
    """Rate and distortion of a ``Cost`` in nats: means, bits a dimension."""
    mean = cost.bits_per_dim
    return {"rate": float(mean.rate.mean()), "distortion": float(mean.distortion.mean())}


def plain(task: Task) -> dict[str, Row]:
    """VAE with N(0, I) and with a mixture of each class on its codes."""
    vae = fit(VAE(task.codec()), task.x, None, task, 1)
    mixed = vae.with_mixture(task.x, task.train.y, components=3)

    def cost(test: Labelled) -> dict[str, float]:
        with torch.no_grad():
            return bits(vae.codec.cost(test.x.long(), sg.Streams(1)))

    return {
        "VAE, mixture": Row(lambda y: mixed.sample(len(y), 0, y=y), 1),
        "VAE, N(0, I)": Row(lambda y: vae.sample(len(y), 0), 1, cost, False, vae),
        "VAE, reconstruction": Row(rebuilt(vae.codec, task), 2),
    }


def rebuilt(codec: Autoencoder, task: Task) -> Callable[[Tensor], Tensor]:
    """decode(encode(x)) of the test images of the labels asked for: the floor of its latents."""
    order = torch.argsort(task.test.y, stable=True)

    def draw(y: Tensor) -> Tensor:
        found = torch.empty(len(y), *task.shape)
        for c in range(CLASSES):
            ours = order[task.test.y[order] == c]
            there = torch.nonzero(y == c).flatten()
            x = task.test.x[ours[torch.arange(len(there)) % len(ours)]]
            with torch.no_grad():
                found[there] = codec.decode(codec.encode(centre(x.long(), task.levels)))
        return found

    return draw


def hierarchical(task: Task) -> dict[str, Row]:
    """Three levels."""
    above = (task.latent // 2, task.latent // 4)
    hvae = HVAE(task.codec(), above, classes=CLASSES, free=task.free)
    model = fit(hvae, task.x, task.train.y, task, 1)
    unit = math.prod(task.shape) * math.log(2)

    def cost(test: Labelled) -> dict[str, Any]:
        with torch.no_grad():
            rates, distortion = model.terms(test.x.long(), test.y, noise=sg.Streams(1))
        each = (rates.mean(0) / unit).tolist()
        found = {"rate": sum(each), "distortion": float(distortion.mean()) / unit}
        return {**found, "rates": each}

    row = Row(lambda y: model.sample(len(y), 0, y=y), model.calls, cost, model=model)
    return {"hierarchical VAE": row}


def gan(task: Task) -> dict[str, Row]:
    """Conditional, with R1."""
    model = GAN(task.shape, 32, task.rival, classes=CLASSES, gamma=task.gamma)
    model = fit(model, task.x, task.train.y, task, 1)
    return {"GAN": Row(lambda y: model.sample(len(y), 0, y=y), 1, model=model)}


def with_score(codec: Autoencoder, task: Task) -> LatentModel:
    """A score of the latents of a trained autoencoder, which encodes the data once."""
    model = LatentModel.of(codec, network(task), sg.VP(), task.x)
    draws = 1 if codec.std else 4
    z, y = model.codes(task.x, draws), task.train.y.repeat(draws)
    part = 1 - task.share
    score = fit(model.score, z, y, task, part, batch=256, lr=5e-3)
    return model.over(score)


def network(task: Task) -> MLP:
    """Of latents, told the class."""
    return MLP((task.latent,), task.score, 2, classes=CLASSES, dropout=0.05)


def latent_row(model: LatentModel) -> Row:
    """The samples and the bound of a latent model."""

    def draw(y: Tensor) -> Tensor:
        return sg.sample(model.given(y=y), len(y), LATENT_CALLS, 0, eta=1)

    def cost(test: Labelled) -> dict[str, float]:
        return bits(latent.bound(model.given(y=test.y), test.x.long(), draws=8))

    return Row(draw, LATENT_CALLS + 1, cost, model=model)


def latent_score(task: Task) -> dict[str, Row]:
    """On a VAE, which is also sampled from N(0, I)."""
    codec = fit(task.codec(), task.x, None, task, task.share, objective=Elbo())
    same = VAE(codec)
    return {
        "latent score": latent_row(with_score(codec, task)),
        "its VAE, N(0, I)": Row(lambda y: same.sample(len(y), 0), 1, told=False),
        "its reconstruction": Row(rebuilt(codec, task), 2),
    }


def unified(task: Task) -> dict[str, Row]:
    """On an encoder of one noise."""
    codec = fit(task.codec(task.std), task.x, None, task, task.share, objective=Elbo())
    same = VAE(codec)
    return {
        "latent score, unified": latent_row(with_score(codec, task)),
        "unified, reconstruction": Row(rebuilt(codec, task), 2),
        "unified, N(0, I)": Row(lambda y: same.sample(len(y), 0), 1, told=False),
    }


def joint(task: Task) -> dict[str, Row]:
    """The unified form, encoder, decoder and score by one bound from the start."""
    codec = task.codec(task.std)
    model = LatentModel(codec, sg.ScoreNetwork(network(task), sg.VP()))
    model = fit(model, task.x, task.train.y, task, 1, objective=Joint())
    return {
        "latent score, joint": latent_row(model),
        "joint, reconstruction": Row(rebuilt(model.autoencoder, task), 2),
    }


def pixel(task: Task) -> dict[str, Row]:
    """A score in pixel space."""
    x, levels = task.train.x.long(), task.levels
    facts = sg.Facts.of(Dequantise(levels)(centre(x, levels), sg.Streams(0)), levels=levels)
    blocks, patch = (0, 2) if task.shape[1] > 8 else (1, 1)
    net = UNet(task.shape, task.channels, (1, 2), blocks, classes=CLASSES, patch=patch)
    objective = Denoising(times=LowTimes())
    options = {"objective": objective, "transform": Dequantise(levels)}
    score = sg.ScoreNetwork(net, sg.VP(), facts=facts)
    model = fit(score, task.x, task.train.y, task, 1, **options)
    start = float(model.sde.time_at(-2 * math.log(mnist.LEAST)))

    def cost(test: Labelled) -> dict[str, float]:
        given, some = model.given(y=test.y[:100]), test.x[:100].long()
        times = [start, model.sde.T]
        found = sg.bits_per_dim(given, some, levels, steps=32, times=times, chunk=100)
        return {"distortion": float(found.mean().value)}

    def draw(y: Tensor) -> Tensor:
        return sg.sample(model.given(y=y), len(y), CALLS, 0, chunk=250)

    return {"pixel score": Row(draw, CALLS, cost, model=model)}


MODELS: dict[str, Callable[[Task], dict[str, Row]]] = {
    "vae": plain,
    "gan": gan,
    "latent": latent_score,
    "unified": unified,
    "joint": joint,
    "hvae": hierarchical,
    "pixel": pixel,
}
"""Of each the first row is what its setting is chosen by."""

ALWAYS: dict[str, Change] = {"gan": {"lr": 1e-3}}
"""What a model has with any setting."""

FULL, HALF = {"width": 8}, {"width": 16, "patch": 2}
SETTINGS: dict[str, dict[str, Change]] = {
    "vae": {"28 x 28": FULL, "14 x 14": HALF, "14 x 14, 64 latents": {**HALF, "latent": 64}},
    "gan": {"R1 10": {}, "R1 1": {"gamma": 1.0}, "R1 1, rate 2e-3": {"gamma": 1.0, "lr": 2e-3}},
    "latent": {
        "14 x 14": HALF,
        "14 x 14, 64 latents": {**HALF, "latent": 64},
        "14 x 14, half the time": {**HALF, "share": 1 / 2},
    },
    "unified": {
        "noise 0.1": HALF,
        "noise 0.05": {**HALF, "std": 0.05},
        "noise 0.05, 64 latents": {**HALF, "std": 0.05, "latent": 64},
        "noise 0.025": {**HALF, "std": 0.025},
    },
    "joint": {"noise 0.1": HALF, "noise 0.05": {**HALF, "std": 0.05}},
    "hvae": {
        "28 x 28, free bits 0.5": {**FULL, "free": 0.5},
        "14 x 14, free bits 0.5": {**HALF, "free": 0.5},
        "14 x 14": {**HALF, "free": 0.0},
    },
    "pixel": {"64 channels": {"channels": 64}, "32 channels": {"channels": 32}},
}
"""On MNIST. The places are those of the autoencoder's finest level."""


def setting(name: str, task: Task, change: Change) -> Task:
    """The task with a setting of this model."""
    return task._replace(**{**ALWAYS.get(name, {}), **change})
