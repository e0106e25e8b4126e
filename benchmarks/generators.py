"""VAE, hierarchical VAE, GAN, latent and pixel-space diffusion: one judge, equal CPU time.

On digits (8 x 8, 17 levels) and MNIST (4,000 images to learn from, 1,000 to judge by) each model
learns for the same CPU time of one thread, the machine's other work left out; a latent score model
divides it between its autoencoder and its score. The rows:

*VAE, N(0, I)*: all numbers of its bound learned, none weighted; sampled from its prior. *VAE,
mixture*: the same network, a Gaussian mixture fitted to the codes of each class. *hierarchical
VAE*: three levels, told the class. *GAN*: convolutional, non-saturating with R1, averaged, told
the class. *latent score*: a VAE for two thirds of the time, which is also judged with N(0, I)
(*its VAE*), and the score of its codes, told the class. *unified*: the same with a deterministic
encoder whose noise is one number. *reconstruction*: decode(encode(x)) of test images, the floor
of what goes through these latents. *pixel score*: a U-Net. No autoencoder is told a class.
Samples of the VAEs are E[x | z].

The judge is that of ``mnist.py``. *Frechet*: in the judge's decision values, over that of real
test images; *accuracy*: samples that are taken for the digit asked for; *coverage* of the classes
as they are taken; *nearest*: median distance to a training image; *sharpness*: power of the finer
waves over that of the data. *rate* and *distortion*: bits a dimension of test images, the
distortion minus the log of probabilities over the levels, the rate of a latent score model the
bound in bits that its path gives; of the pixel score model the bits by its flow, of the first
100 images alone.

The *curve* trains the unified form for several levels of the encoder's noise: rate and distortion.

Three stages, each of which needs the files of the one before: ``pack`` (the data), ``train`` (all
that a model gives, written as soon as it is known), ``judge`` (table, picture).

A fourth, ``keep``, copies the models of digits that the notebooks load to ``notebooks``.

    python benchmarks/generators.py [--quick] [--minutes M] [--tasks digits mnist] [--work DIR]
                                    [--data FILE] [--stage pack train judge keep]
                                    [--only MODEL ...]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _report
import mnist
import numpy as np
import torch
from mnist import CLASSES, HERE, Judge, LowTimes
from torch import Tensor

import sde_gen as sg
from sde_gen import contrast, data, latent, plots
from sde_gen.contrast import GAN, HVAE, VAE
from sde_gen.data import Dequantise, Labelled, centre, quantise
from sde_gen.latent import Elbo, LatentModel
from sde_gen.networks import MLP, Autoencoder, UNet
from sde_gen.training import Denoising, Layout, save

STDS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""The encoder's noise in the curve; latents are of order one."""
STD = 0.1
"""That of the unified form in the table."""
CALLS = 25
KEPT = ("gan", "unified")
"""Models of digits that the notebooks load."""


class Task(NamedTuple):
    """Data, levels (N, 1, H, W) as uint8, and the sizes of the networks for them."""

    train: Labelled
    test: Labelled
    levels: int
    seconds: float
    """CPU time of each model."""
    samples: int
    latent: int
    width: int
    """Of the autoencoder at full resolution."""
    channels: int
    """Of the U-Net."""
    score: int
    """Width of the network of latents."""
    rival: int
    """Width of the GAN."""
    batch: int = 64

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
        options = {"levels": self.levels, "components": 3, "std": std}
        return Autoencoder(self.shape, (self.latent,), self.width, **options)


class Row(NamedTuple):
    """What is to be found out about a model."""

    draw: Callable[[Tensor], Tensor]
    """labels (n,) -> images (n, 1, H, W)."""
    calls: int
    cost: Callable[[Labelled], tuple[float | None, float]] | None = None
    """Test data -> bits a dimension of rate and distortion; no rate where there is the sum."""
    told: bool = True
    """Whether it knows the classes."""
    model: Any = None
    """What is kept."""


# --- train ---------------------------------------------------------------------------------------


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
    lr = options.pop("lr", 3e-3)
    recipe = sg.Recipe(
        minutes=budget.seconds / 60,
        steps=10**7,
        batch=task.batch,
        lr=lr,
        layout=Layout(channels_last=x.ndim == 4),
    )
    learn: Any = contrast.train if isinstance(model, contrast.Rival) else sg.train
    common = {"callbacks": [budget], "device": "cpu", "progress": False}
    model = learn(model, x, y, recipe, **common, **options)
    spent = time.process_time() - budget.start
    print(f"  {type(model).__name__}: {budget.steps} steps, {spent:.0f} s", flush=True)
    return model


def bits(cost: Any) -> tuple[float, float]:
    """Rate and distortion of a ``Cost`` in nats: means, bits a dimension."""
    mean = cost.bits_per_dim
    return float(mean.rate.mean()), float(mean.distortion.mean())


def plain(task: Task) -> dict[str, Row]:
    """VAE with N(0, I) and with a mixture of each class on its codes."""
    vae = fit(VAE(task.codec()), task.x, None, task, 1)
    mixed = vae.with_mixture(task.x, task.train.y, components=3)

    def cost(test: Labelled) -> tuple[float, float]:
        with torch.no_grad():
            return bits(vae.codec.cost(test.x.long(), sg.Streams(1)))

    return {
        "VAE, N(0, I)": Row(lambda y: vae.sample(len(y), 0), 1, cost, False, vae),
        "VAE, mixture": Row(lambda y: mixed.sample(len(y), 0, y=y), 1),
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
    model = fit(HVAE(task.codec(), above, classes=CLASSES), task.x, task.train.y, task, 1)

    def cost(test: Labelled) -> tuple[float, float]:
        with torch.no_grad():
            rates, distortion = model.terms(test.x.long(), test.y, noise=sg.Streams(1))
        unit = math.prod(task.shape) * math.log(2)
        return float(rates.sum(1).mean()) / unit, float(distortion.mean()) / unit

    row = Row(lambda y: model.sample(len(y), 0, y=y), model.calls, cost, model=model)
    return {"hierarchical VAE": row}


def gan(task: Task) -> dict[str, Row]:
    """Conditional, with R1."""
    model = GAN(task.shape, 32, task.rival, classes=CLASSES)
    model = fit(model, task.x, task.train.y, task, 1, lr=1e-3)
    return {"GAN": Row(lambda y: model.sample(len(y), 0, y=y), 1, model=model)}


def with_score(codec: Autoencoder, task: Task, part: float) -> LatentModel:
    """A score of the latents of a trained autoencoder."""
    net = MLP((task.latent,), task.score, 3, classes=CLASSES, dropout=0.1)
    model = LatentModel.of(codec, net, sg.VP(), task.x)
    draws = 1 if codec.std else 4
    score = fit(model.score, model.codes(task.x, draws), task.train.y.repeat(draws), task, part)
    return model.over(score)


def latent_row(model: LatentModel) -> Row:
    """The samples and the bound of a latent model."""

    def draw(y: Tensor) -> Tensor:
        return sg.sample(model.given(y=y), len(y), CALLS, 0)

    def cost(test: Labelled) -> tuple[float, float]:
        return bits(latent.bound(model.given(y=test.y), test.x.long(), draws=8))

    return Row(draw, CALLS + 1, cost, model=model)


def latent_score(task: Task) -> dict[str, Row]:
    """On a VAE, which is also sampled from N(0, I)."""
    codec = fit(task.codec(), task.x, None, task, 2 / 3, objective=Elbo())
    model, same = with_score(codec, task, 1 / 3), VAE(codec)
    return {
        "latent score": latent_row(model),
        "its VAE, N(0, I)": Row(lambda y: same.sample(len(y), 0), 1, told=False),
        "its reconstruction": Row(rebuilt(codec, task), 2),
    }


def unified(task: Task) -> dict[str, Row]:
    """On an encoder of one noise."""
    codec = fit(task.codec(STD), task.x, None, task, 2 / 3, objective=Elbo())
    same = VAE(codec)
    return {
        "latent score, unified": latent_row(with_score(codec, task, 1 / 3)),
        "unified, reconstruction": Row(rebuilt(codec, task), 2),
        "unified, N(0, I)": Row(lambda y: same.sample(len(y), 0), 1, told=False),
    }


def pixel(task: Task) -> dict[str, Row]:
    """A score in pixel space."""
    x, levels = task.train.x.long(), task.levels
    facts = sg.Facts.of(Dequantise(levels)(centre(x, levels), sg.Streams(0)), levels=levels)
    multipliers = (1, 2, 2) if task.shape[1] > 8 else (1, 2)
    net = UNet(task.shape, task.channels, multipliers, blocks=1, classes=CLASSES)
    objective = Denoising(times=LowTimes())
    options = {"objective": objective, "transform": Dequantise(levels)}
    score = sg.ScoreNetwork(net, sg.VP(), facts=facts)
    model = fit(score, task.x, task.train.y, task, 1, **options)
    start = float(model.sde.time_at(-2 * math.log(mnist.LEAST)))

    def cost(test: Labelled) -> tuple[None, float]:
        given, some = model.given(y=test.y[:100]), test.x[:100].long()
        times = [start, model.sde.T]
        found = sg.bits_per_dim(given, some, levels, steps=32, times=times, chunk=100)
        return None, float(found.mean().value)

    def draw(y: Tensor) -> Tensor:
        return sg.sample(model.given(y=y), len(y), CALLS, 0, chunk=250)

    return {"pixel score": Row(draw, CALLS, cost, model=model)}


MODELS: dict[str, Callable[[Task], dict[str, Row]]] = {
    "vae": plain,
    "gan": gan,
    "latent": latent_score,
    "unified": unified,
    "hvae": hierarchical,
    "pixel": pixel,
}


def learn(name: str, task: Task, folder: Path) -> None:
    """Train a model and write all that is found out about it."""
    print(f"{folder.name} {name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    rows = MODELS[name](task)
    record: dict[str, Any] = {"cpu_seconds": time.process_time() - start, "rows": {}}
    y = torch.arange(task.samples) % CLASSES
    for i, (row, about) in enumerate(rows.items()):
        if about.model is not None:
            save(about.model, folder / name)
        began = time.process_time()
        x = quantise(about.draw(y), task.levels).to(torch.uint8)
        each = (time.process_time() - began) / len(y)
        file = f"{name}-{i}.npz"
        np.savez_compressed(folder / file, x=x.numpy())
        found = {"file": file, "calls": about.calls, "seconds": each, "told": about.told}
        record["rows"][row] = found
        note(folder / f"{name}.json", record)
        if about.cost is not None:
            found["rate"], found["distortion"] = about.cost(task.test)
            note(folder / f"{name}.json", record)
        print(f"  {row}: {found}", flush=True)


def curve(task: Task, folder: Path) -> None:
    """Rate and distortion over the encoder's noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for std in STDS:
        codec = fit(task.codec(std), task.x, None, task, 2 / 3, objective=Elbo())
        model = with_score(codec, task, 1 / 3)
        cost = latent.bound(model.given(y=task.test.y), task.test.x.long(), draws=8)
        rate, distortion = bits(cost)
        about = {"std": std, "cpu_seconds": task.seconds}
        rows.append({**about, "rate": rate, "distortion": distortion})
        print(f"  {rows[-1]}", flush=True)
        note(folder / "curve.json", {"rows": rows})


def note(file: Path, content: dict[str, Any]) -> None:
    """Write what is known."""
    file.write_text(json.dumps(content, indent=1) + "\n")


# --- judge ---------------------------------------------------------------------------------------


def judged(task: Task, folder: Path) -> dict[str, Any]:
    """Every row that is there, and the real test images."""
    judge, y = Judge(task.train, task.levels), torch.arange(task.samples) % CLASSES
    rank = torch.stack([(task.test.y == c).cumsum(0) for c in range(CLASSES)])
    order = rank[task.test.y, torch.arange(len(task.test.y))].argsort(stable=True)
    real = Labelled(task.test.x[order][: len(y)], task.test.y[order][: len(y)])
    rows = {"real test images": {"told": True, **judge.grade(*real)}}
    spent = {}
    for name in MODELS:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        spent[name] = record["cpu_seconds"]
        for row, about in record["rows"].items():
            rows[row] = {**about, **judge.grade(images(folder / about["file"]), y)}
    found = {"cpu_seconds": spent, "floor": rows["real test images"]["frechet"], "rows": rows}
    if (folder / "curve.json").exists():
        found["curve"] = json.loads((folder / "curve.json").read_text())["rows"]
    return {**found, "independent pixels": independent(task)}


def images(file: Path) -> Tensor:
    """Levels that were written."""
    with np.load(file) as found:
        return torch.from_numpy(found["x"])


def independent(task: Task) -> float:
    """Bits a dimension of the test images under independent pixels."""
    return mnist.independent(mnist.Split(task.train, task.test), task.levels)


def cells(row: dict[str, Any], floor: float) -> list[str]:
    """A line of the table, without its name."""
    rate, distortion = row.get("rate"), row.get("distortion")
    total = "" if distortion is None else f"{distortion + (rate or 0):.3f}"
    return [
        f"{row['frechet'] / floor:.1f}",
        f"{100 * row['accuracy']:.0f} %" if row["told"] else "",
        f"{row['coverage']:.2f}",
        f"{row['nearest']:.2f}",
        f"{row['sharpness']:.2f}",
        f"{1e3 * row['seconds']:.2f}" if "seconds" in row else "",
        str(row.get("calls", "")),
        total if rate is None else f"{rate:.3f} + {distortion:.3f} = {total}",
    ]


HEADS = (
    "",
    "Fréchet / floor",
    "accuracy",
    "coverage",
    "nearest",
    "sharpness",
    "ms a sample",
    "calls",
    "rate + distortion, bits/dim",
)


def tell(name: str, found: dict[str, Any]) -> None:
    """The table of a task, and its curve."""
    print(f"\n{name}: floor {found['floor']:.4f}, CPU seconds {found['cpu_seconds']}\n")
    rows = found["rows"].items()
    _report.table(HEADS, [[row, *cells(about, found["floor"])] for row, about in rows])
    print(f"\nindependent pixels: {found['independent pixels']:.3f} bits a dimension\n")
    if "curve" in found:
        lines = [[f"{v:.3f}" for v in row.values()] for row in found["curve"]]
        _report.table(["encoder's noise", "CPU seconds", "rate", "distortion"], lines)


def draw(tasks: dict[str, Task], work: Path, found: dict[str, Any], path: Path) -> None:
    """A line for each task: real images and samples of each model, a class a row."""
    from matplotlib.figure import Figure

    skipped = ("reconstruction", "its", "unified, N")
    names = list(
        dict.fromkeys(
            row for part in found.values() for row in part["rows"] if not _any(skipped, row)
        )
    )
    figure = Figure(figsize=(1.6 * len(names), 2.8 * len(found)), layout="constrained", dpi=150)
    axes = figure.subplots(len(found), len(names), squeeze=False)
    for i, (name, part) in enumerate(found.items()):
        task = tasks[name]
        y = torch.arange(task.samples) % CLASSES
        for ax, row in zip(axes[i], names, strict=True):
            if row == "real test images":
                x, labels = task.test
            elif row in part["rows"]:
                x, labels = images(work / name / part["rows"][row]["file"]), y
            else:
                ax.axis("off")
                continue
            shown = torch.cat([x[labels == c][:6] for c in range(CLASSES)])
            plots.image_grid(centre(shown.long(), task.levels), CLASSES, None, "", ax)
            ax.set_title(f"{name}:\n{row}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def _any(words: tuple[str, ...], name: str) -> bool:
    return any(word in name for word in words)


# --- the command ---------------------------------------------------------------------------------


def task_of(name: str, minutes: float, samples: int, file: Path) -> Task:
    """The data and what suits them."""
    if name == "mnist":
        return Task(*mnist.unpack(file), 256, 60 * minutes, samples, 32, 8, 16, 256, 32)
    parts = [data.digits(split) for split in ("train", "test")]
    levels = [Labelled(quantise(x, 17).to(torch.uint8), y) for x, y in parts]
    return Task(levels[0], levels[1], 17, 20 * minutes, min(samples, 500), 16, 16, 16, 64, 16)


def main() -> None:
    """The stages asked for, in their order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds for each model")
    parser.add_argument(
        "--minutes", type=float, help="CPU time of each model (default 3); digits get a third"
    )
    parser.add_argument("--tasks", nargs="+", choices=("digits", "mnist"))
    parser.add_argument("--stage", nargs="+", choices=("pack", "train", "judge", "keep"))
    parser.add_argument("--only", nargs="*", choices=[*MODELS, "curve"], help="train these")
    parser.add_argument("--work", type=Path, help="where data, samples and figures go")
    parser.add_argument("--data", type=Path, help="MNIST as `pack` wrote it (default: in WORK)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quick = "_quick" if args.quick else ""
    minutes = args.minutes or (0.1 if args.quick else 3.0)
    work = args.work or HERE / "results" / "cache" / f"generators{quick}"
    file, stages = args.data or work / "mnist.npz", args.stage or ("pack", "train", "judge")
    names = args.tasks or ("digits", "mnist")
    if "pack" in stages and "mnist" in names:
        mnist.pack(file)
    tasks = {name: task_of(name, minutes, 50 if args.quick else 1000, file) for name in names}
    for name, task in tasks.items() if "train" in stages else ():
        for model in args.only or [*MODELS, *(("curve",) if name == "digits" else ())]:
            if model == "curve":
                curve(task, work / name)
            else:
                learn(model, task, work / name)
    for model in KEPT if "keep" in stages else ():
        folder = HERE.parent / "notebooks" / "checkpoints" / model
        shutil.copytree(work / "digits" / model, folder, dirs_exist_ok=True)
    if "judge" in stages:
        found = {name: judged(task, work / name) for name, task in tasks.items()}
        for name, part in found.items():
            tell(name, part)
        picture = (
            HERE / "results" / "generators_quick.png"
            if quick
            else HERE.parent / "docs/images/generators.png"
        )
        draw(tasks, work, found, picture)
        content = {"versions": _report.versions(), "minutes": minutes, **found}
        _report.write_json(HERE / "results" / f"generators{quick}.json", content)


if __name__ == "__main__":
    main()
