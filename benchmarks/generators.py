"""VAE, hierarchical VAE, GAN, latent and pixel-space diffusion: one judge, equal CPU time.

On digits (8 x 8, 17 levels) and MNIST (4,000 images to learn from, 1,000 to judge by) each model
learns for the same CPU time of one thread, the machine's other work left out; a latent score model
divides it between its autoencoder and its score. The rows:

*VAE, N(0, I)*: all numbers of its bound learned, none weighted; sampled from its prior. *VAE,
mixture*: the same network, a Gaussian mixture fitted to the codes of each class. *hierarchical
VAE*: three levels, told the class. *GAN*: convolutional, non-saturating with R1, averaged, told
the class. *latent score*: a VAE for two thirds of the time, which is also judged with N(0, I)
(*its VAE*), and the score of its codes, told the class, which are encoded once. *unified*: the
same with a deterministic encoder whose noise is one number. *joint*: the same network as that, but
encoder, decoder and score learn together, by one bound. *reconstruction*: decode(encode(x)) of
test images, the floor of what goes through these latents. *pixel score*: a U-Net. No autoencoder
is told a class, but for that of the hierarchy. Samples of the VAEs are E[x | z].

On MNIST each model has the best of a few settings, all of which stand in the results: each learned
for a twelfth of the time from three quarters of the training images, and is judged by the rest,
the Frechet distance of its samples in the decision values of a judge of those three quarters.

The judge is that of ``mnist.py``. *Frechet*: in the judge's decision values, over that of real
test images; *accuracy*: samples that are taken for the digit asked for; *coverage* of the classes
as they are taken; *nearest*: median distance to a training image; *sharpness*: power of the finer
waves over that of the data. *rate* and *distortion*: bits a dimension of test images, the
distortion minus the log of probabilities over the levels, the rate of a latent score model the
bound in bits that its path gives; of the pixel score model the bits by its flow, of the first
100 images alone.

The *curve* is rate and distortion over the noise of one encoder, trained for the least of it. More
noise on the same latents is a worse channel, so with the best decoder and the best prior of each
the rate falls and the distortion rises with the noise. Each has a decoder and a score of its own,
all decoders learned on from the same weights, by the same draws.

Four stages, each of which needs the files of the one before: ``pack`` (the data), ``sweep``
(settings, on MNIST), ``train`` (all that a model gives, written as soon as it is known), ``judge``
(table, picture). A fifth, ``keep``, copies the models of digits that the notebooks load.

    python benchmarks/generators.py [--quick] [--minutes M] [--tasks digits mnist] [--work DIR]
                                    [--data FILE] [--stage pack sweep train judge keep]
                                    [--only MODEL ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import _report
import mnist
import numpy as np
import torch
from _rivals import MODELS, SETTINGS, Change, Task, bits, fit, setting, with_score
from mnist import CLASSES, HERE, Judge
from torch import Tensor

from sde_gen import data, latent, metrics, plots
from sde_gen.data import Labelled, centre, quantise
from sde_gen.latent import Elbo
from sde_gen.training import save

STDS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""The encoder's noise in the curve; latents are of order one."""
SWEEP = 1 / 12
"""Of a model's time, for each of its settings."""
HELD_BACK = 4
"""One in so many training images judges the settings and is not learned from."""
KEPT = ("gan", "unified")
"""Models of digits that the notebooks load."""


# --- sweep ---------------------------------------------------------------------------------------


def sweep(names: list[str], task: Task, folder: Path) -> None:
    """Every setting for a short time: the Frechet distance of samples to training images that
    neither the model nor the judge has learned from."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    order = torch.randperm(len(task.train.x), generator=torch.Generator().manual_seed(0))
    parts = order[len(order) // HELD_BACK :], order[: len(order) // HELD_BACK]
    train, held = (Labelled(task.train.x[part], task.train.y[part]) for part in parts)
    judge, y = Judge(train, task.levels), torch.arange(task.samples) % CLASSES
    real = judge.features(centre(held.x.long(), task.levels))
    short = task._replace(train=train, test=held, seconds=SWEEP * task.seconds)
    for name in names:
        found[name] = {}
        for words, change in SETTINGS[name].items():
            print(f"{folder.name} {name}: {words}", flush=True)
            row = next(iter(MODELS[name](setting(name, short, change)).values()))
            x = centre(quantise(row.draw(y), task.levels), task.levels)
            distance = metrics.frechet_distance(judge.features(x), real)
            found[name][words] = {"seconds": short.seconds, "frechet": distance}
            print(f"  {found[name][words]}", flush=True)
            note(file, found)


def best(name: str, folder: Path) -> tuple[str, Change]:
    """The setting that was best in the sweep; without one what the task has."""
    file = folder / "sweep.json"
    rows = json.loads(file.read_text()).get(name) if file.exists() else None
    if not rows:
        return "", {}
    words = min(rows, key=lambda words: rows[words]["frechet"])
    return words, SETTINGS[name][words]


# --- train ---------------------------------------------------------------------------------------


def learn(name: str, task: Task, folder: Path) -> None:
    """Train a model and write all that is found out about it."""
    print(f"{folder.name} {name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    words, change = best(name, folder)
    start = time.process_time()
    rows = MODELS[name](setting(name, task, change))
    spent = time.process_time() - start
    record: dict[str, Any] = {"cpu_seconds": spent, "setting": words, "rows": {}}
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
            found |= about.cost(task.test)
            note(folder / f"{name}.json", record)
        print(f"  {row}: {found}", flush=True)


def curve(task: Task, folder: Path) -> None:
    """Rate and distortion over the noise of one encoder, with a decoder and a score for each."""
    folder.mkdir(parents=True, exist_ok=True)
    first = fit(task.codec(STDS[0]), task.x, None, task, task.share, objective=Elbo())
    first.encoder.requires_grad_(False)
    rows = []
    for std in STDS:
        codec = copy.deepcopy(first)
        codec.std = codec.config["std"] = std
        codec = fit(codec, task.x, None, task, 1 / 3, objective=Elbo(), lr=1e-3)
        model = with_score(codec, task).given(y=task.test.y)
        cost = bits(latent.bound(model, task.test.x.long(), draws=8))
        rows.append({"std": std, **cost})
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
    spent, chosen = {}, {}
    for name in MODELS:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        spent[name], chosen[name] = record["cpu_seconds"], record["setting"]
        for row, about in record["rows"].items():
            rows[row] = {**about, **judge.grade(images(folder / about["file"]), y)}
    floor = rows["real test images"]["frechet"]
    found: dict[str, Any] = {
        "cpu_seconds": spent,
        "settings": chosen,
        "floor": floor,
        "rows": rows,
    }
    if (folder / "sweep.json").exists():
        found["sweep"] = json.loads((folder / "sweep.json").read_text())
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
        _report.table(["encoder's noise", "rate", "distortion"], lines)
    for row, about in found["rows"].items():
        if "rates" in about:
            print(f"{row}, bits a dimension of each level: {about['rates']}")
    print(f"\nsettings: {found['settings']}\n")
    lines = [
        [model, words, f"{about['seconds']:.0f}", f"{about['frechet']:.3f}"]
        for model, part in found.get("sweep", {}).items()
        for words, about in part.items()
    ]
    if lines:
        _report.table(["model", "setting", "CPU seconds", "Fréchet, held back"], lines)


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
        return Task(*mnist.unpack(file), 256, 60 * minutes, samples, 32, 16, patch=2)
    parts = [data.digits(split) for split in ("train", "test")]
    levels = [Labelled(quantise(x, 17).to(torch.uint8), y) for x, y in parts]
    small = {"latent": 16, "width": 16, "score": 64, "rival": 16}
    return Task(levels[0], levels[1], 17, 20 * minutes, min(samples, 500), **small)


def main() -> None:
    """The stages asked for, in their order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds for each model")
    parser.add_argument(
        "--minutes", type=float, help="CPU time of each model (default 3); digits get a third"
    )
    parser.add_argument("--tasks", nargs="+", choices=("digits", "mnist"))
    parser.add_argument("--stage", nargs="+", choices=("pack", "sweep", "train", "judge", "keep"))
    parser.add_argument("--only", nargs="*", choices=[*MODELS, "curve"], help="train these")
    parser.add_argument("--work", type=Path, help="where data, samples and figures go")
    parser.add_argument("--data", type=Path, help="MNIST as `pack` wrote it (default: in WORK)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quick = "_quick" if args.quick else ""
    minutes = args.minutes or (0.1 if args.quick else 3.0)
    work = args.work or HERE / "results" / "cache" / f"generators{quick}"
    file = args.data or work / "mnist.npz"
    stages = args.stage or ("pack", "sweep", "train", "judge")
    names = args.tasks or ("digits", "mnist")
    if "pack" in stages and "mnist" in names:
        mnist.pack(file)
    tasks = {name: task_of(name, minutes, 50 if args.quick else 1000, file) for name in names}
    if "sweep" in stages and "mnist" in tasks:
        swept = [name for name in args.only or MODELS if name in MODELS]
        sweep(swept, tasks["mnist"], work / "mnist")
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
