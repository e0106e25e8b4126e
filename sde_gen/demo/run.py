"""The demo: what it does, in order, and what it prints and writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import data
from ..data import Labelled, quantise
from ..likelihood import bits_per_dim
from ..training import Recipe, save
from ..training.checkpoints import write
from ..training.folder import STATE
from ..training.rows import remember
from .figure import digits_figure
from .judge import Judge
from .models import LEVELS, Trained, train_models
from .rows import FLOW, WEIGHT, rows

RESULTS, FIGURE = "results.json", "digits.png"
TITLES = {
    "none": "samples, no guidance",
    "classifier": "samples, classifier guidance",
    "classifier-free": "samples, classifier-free guidance",
}
COLUMNS = ("calls", "seconds", "accuracy", "frechet", "energy")
Say = Callable[[str], None]
_LINE = "{:34} {:16} {:>5} {:>8} {:>9} {:>8} {:>8}"


def demo(
    out: str | Path = "demo",
    minutes: float = 1.25,
    seed: int = 0,
    progress: bool = True,
    say: Say = print,
    samples: int = 400,
) -> dict[str, Any]:
    """Train for ``minutes``, sample in every way, judge; write ``results.json`` and the figure.

    Args:
        out: the folder for results, figure and model.
        minutes: of training; the rest takes about one more.
        seed: of training and sampling. The length of training is measured in time, so numbers
            differ a little from machine to machine.
        progress: show bars.
        say: where the report goes.
        samples: a row, of all classes in turn; at least 10.

    Returns:
        What ``results.json`` holds.

    Raises:
        ImportError: scikit-learn is missing.
        OSError: the folder cannot be written, or holds a run of training (``FileExistsError``).
        ValueError: ``minutes`` is not positive, or too few samples.
    """
    if samples < 10:
        raise ValueError(f"need at least 10 samples, one of each class, got {samples}")
    Recipe(minutes=minutes)
    clock = time.perf_counter()
    folder = Path(out)
    data.check_writable(folder / RESULTS)
    if (folder / STATE).exists():
        raise FileExistsError(f"{folder} holds a run of training: choose another folder")
    train, test = data.digits("train"), data.digits("test")
    folder.mkdir(parents=True, exist_ok=True)
    judge = Judge(train)
    say(f"Training on {len(train.x)} digits of 8 x 8 pixels for {60 * minutes:.0f} seconds.")
    trained = train_models(train, minutes, seed, progress)
    save(trained.score, folder)
    remember(train.x, folder)
    info = trained.info
    say(f"{info['parameters']:,} parameters, {info['steps']} steps. {samples} samples a row:")
    y = torch.arange(samples) % 10
    table, drawn = _table(trained, judge, y, seed, say)
    results = {
        "rows": table,
        **_references(judge, test, y, say),
        "nearest_neighbour": {
            "samples": judge.nearest(drawn["none"]),
            "real test images": judge.nearest(test.x),
        },
        "bits_per_dim": _likelihood(trained, Labelled(test.x[:samples], test.y[:samples])),
        "training": info,
    }
    _report(results, say)
    panels = {TITLES[guidance]: x for guidance, x in drawn.items()}
    figure = digits_figure(trained.score, train, panels, y, seed)
    write(folder / FIGURE, lambda file: figure.savefig(file, format="png"))
    results["seconds"] = time.perf_counter() - clock
    text = json.dumps(results, indent=2) + "\n"
    write(folder / RESULTS, lambda file: file.write_text(text, encoding="utf-8"))
    say(f"\n{folder / FIGURE} and {folder / RESULTS} after {results['seconds']:.0f} s in all.")
    return results


def _table(
    trained: Trained, judge: Judge, y: Tensor, seed: int, say: Say
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rows, printed as they come, and the samples of the probability flow for the figure."""
    table, samples = [], {}
    say("\n" + _LINE.format("sampler", "guidance", *COLUMNS))
    for record, x in rows(trained, judge, y, seed):
        table.append(record)
        _say_row(record, say)
        if record["sampler"] == FLOW.name:
            samples[record["guidance"]] = x
    return table, samples


def _references(judge: Judge, test: Labelled, y: Tensor, say: Say) -> dict[str, Any]:
    """The floor and what to beat, graded as samples are."""
    floor = judge.grade(test.x, test.y)
    _say_row({"sampler": "floor: real test images", **floor}, say)
    baselines = {
        name: judge.grade(judge.gaussian_fit(y, per_class), y)
        for name, per_class in (("one Gaussian", False), ("a Gaussian for each class", True))
    }
    for name, grades in baselines.items():
        _say_row({"sampler": f"baseline: {name}", **grades}, say)
    return {"floor": floor, "baselines": baselines}


def _say_row(record: dict[str, Any], say: Say) -> None:
    seconds = f"{record['seconds']:.1f}" if "seconds" in record else ""
    numbers = [f"{100 * record['accuracy']:.1f} %"]
    numbers += [f"{record[key]:.3f}" for key in ("frechet", "energy")]
    calls = record.get("calls", "")
    say(_LINE.format(record["sampler"], record.get("guidance", ""), calls, seconds, *numbers))


def _likelihood(trained: Trained, test: Labelled) -> dict[str, float]:
    """Bits a pixel of held-out digits: given the class, and with the class to be told as well.

    p(x) >= p(y) p(x | y) for every class y: the second is what an unconditional model may need
    at most, and compares with one.
    """
    model = trained.score.given(y=test.y)
    bits = bits_per_dim(model, quantise(test.x, LEVELS), LEVELS).mean()
    return {
        "given_class": float(bits),
        "with_class": float(bits) + log2(10) / 64,
        "standard_error": float(bits.standard_error),
    }


def _report(results: dict[str, Any], say: Say) -> None:
    near, bits = results["nearest_neighbour"], results["bits_per_dim"]
    mine, real = near["samples"], near["real test images"]
    say(
        f"\nguidance  of the class-conditional score, with weight {WEIGHT}"
        "\ncalls     evaluations of the score, guidance included"
        "\naccuracy  samples that a support vector machine takes for the digit asked for"
        "\nfrechet   distance in its decision values; like the energy distance, to real images"
        "\n\nDistance to the nearest training image, median (least):"
        f" samples {mine['median']:.2f} ({mine['least']:.2f}),"
        f" real test images {real['median']:.2f} ({real['least']:.2f})"
        "\nHeld-out digits, bits a pixel:"
        f" {bits['given_class']:.3f} +- {bits['standard_error']:.3f} given the class,"
        f" {bits['with_class']:.3f} with it (uniform: {log2(LEVELS):.2f})"
    )
