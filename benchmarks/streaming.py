"""What it costs to read a run's data while it trains, and a folder of photographs in one command.

Two measurements. *Throughput*: the U-Net for 28 x 28 images trains on the same 4,096 images, once
from memory and once from as many files on disk (JPEG, of several sizes, decoded, resized and
cropped by workers, or lying in one mapped file), in turns of a few steps each; the median over the
turns of the ratio of times is printed, each turn beside its own in memory. *One command*: 3,000
JPEG files of several sizes, cut at random from the two photographs that scikit-learn ships, are
trained on by ``sde-gen train FOLDER --size 32``, for a few steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import _report
import numpy as np
import torch
from _problems import HERE
from PIL import Image
from sklearn.datasets import load_sample_images

import sde_gen as sg
from sde_gen.cli import main as command
from sde_gen.data import Images, Mapped
from sde_gen.networks import UNet
from sde_gen.training import Recipe, Trainer

SIZES = [(40, 60), (60, 40), (48, 48), (64, 36), (33, 80)]


def write_photographs(folder: Path, n: int) -> None:
    """n parts of the two photographs, of several sizes, one folder for each of them."""
    rng = np.random.default_rng(0)
    names, pictures = ("china", "flower"), load_sample_images().images
    for i in range(n):
        which, (h, w) = i % 2, SIZES[int(rng.integers(len(SIZES)))]
        scale = int(rng.integers(1, 4))
        pixels = pictures[which][::scale, ::scale]
        top = int(rng.integers(pixels.shape[0] - h))
        left = int(rng.integers(pixels.shape[1] - w))
        (folder / names[which]).mkdir(parents=True, exist_ok=True)
        part = Image.fromarray(pixels[top : top + h, left : left + w])
        part.save(folder / names[which] / f"{i:05}.jpg", quality=90)


def trainers(folder: Path, batch: int, workers: int) -> dict[str, Trainer]:
    """The same run from memory, from a mapped file and from a folder."""
    images = Images(folder, size=28, channels=1)
    levels = images.load()
    np.save(folder.parent / "levels.npy", levels.numpy())
    facts = sg.Facts.of(levels, levels=256)
    assert images.labels is not None
    sources = {
        "memory": (levels, images.labels),
        "mapped": Mapped(folder.parent / "levels.npy", images.labels),
        "folder": images,
    }
    found = {}
    for name, source in sources.items():
        torch.manual_seed(0)
        net = UNet((1, 28, 28), 32, (1, 2, 2), blocks=1, classes=2)
        score = sg.ScoreNetwork(net, sg.VP(), facts=facts)
        recipe = Recipe(steps=10_000, batch=batch)
        found[name] = Trainer(score, source, recipe=recipe, workers=workers * (name == "folder"))
    return found


def throughput(folder: Path, turns: int, steps: int, batch: int, workers: int) -> dict[str, float]:
    """Time in memory over time from disk, the median over the turns, for each source."""
    runs = trainers(folder, batch, workers)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    losses = {}
    for turn in range(turns + 1):
        seconds = {}
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(steps):
                report = run._step(run.model)
                run.step += 1
            losses[name] = float(report[0])
            seconds[name] = time.perf_counter() - start
        if turn:  # the first one starts the workers
            for name in runs:
                ratios[name].append(seconds["memory"] / seconds[name])
    for run in runs.values():
        run.reader.close()
    assert len(set(losses.values())) == 1, f"the runs are not one run: {losses}"
    return {name: statistics.median(values) for name, values in ratios.items()}


def one_command(folder: Path, steps: int) -> float:
    """Seconds of training on 3,000 files, from the command line."""
    start = time.perf_counter()
    options = ["--size", "32", "--flip", "--steps", str(steps), "--batch", "32"]
    out = str(folder.parent / "model")
    assert command(["train", str(folder), "--out", out, *options, "--channels", "32"]) == 0
    picture = str(folder.parent / "x.png")
    drawn = ["--n", "4", "--steps", "5", "--label", "flower"]
    assert command(["sample", out, "--out", picture, *drawn]) == 0
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="in a turn")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="a look whether it runs")
    options = parser.parse_args()
    if options.quick:
        options.turns, options.steps, options.batch = 1, 1, 16
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photographs"
        write_photographs(folder, 3000)
        turns = (options.turns, options.steps, options.batch, options.workers)
        found = throughput(folder, *turns)
        rows = [[name, f"{ratio:.3f}"] for name, ratio in found.items()]
        _report.table(["images in", "throughput, of that in memory"], rows)
        seconds = one_command(folder, 2 if options.quick else 20)
        print(f"3,000 files of {len(SIZES)} sizes by one command, samples drawn: {seconds:.0f} s")
    if not options.quick:
        result = {"throughput": found, "options": vars(options), "cores": os.cpu_count()}
        _report.write_json(HERE / "results" / "streaming.json", result)


if __name__ == "__main__":
    main()
