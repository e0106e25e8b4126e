"""Which noise levels to train at, and what each is worth: recipes at equal training cost.

On digits and MNIST the same network takes the same number of steps under each of ``RECIPES``, from
three seeds. Held-out images given their class cost so many bits a pixel, by the flow; samples are
so far from the real training images, by Frechet distance in the ten decision values of a support
vector machine trained on those.

Three stages, so that training can run on a machine that has a GPU and nothing else: torch, numpy,
scipy, tqdm, safetensors and torchsde do.

    python benchmarks/weightings.py pack --data weightings.npz
    python benchmarks/weightings.py train --data weightings.npz --out OUT --minutes 6 --jobs 12
    python benchmarks/weightings.py judge --data weightings.npz --out OUT

``train`` runs ``--jobs`` trainings at once, because one small network does not fill a GPU. First
all take a few steps together; from what that takes follow the numbers of steps, at most
``--steps``, with which everything is done in ``--minutes``. A training writes what it found as
soon as it is done; one that would not be done in time is left out, and named. ``--quick`` does
all three stages, small.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np
import torch
from torch import Tensor

import sde_gen as sg
from sde_gen.chain import NodeTimes
from sde_gen.data import Dequantise, Labelled, centre, digits, mnist, quantise
from sde_gen.networks import UNet
from sde_gen.training import (
    Denoising,
    InformationTimes,
    Layout,
    LogNormalTimes,
    MinSNRWeight,
    Objective,
    Trainer,
    Uncertainty,
    uniform_times,
    uniform_weight,
)

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
NODES = 1000


def at_nodes(sde: sg.VP) -> NodeTimes:
    """DDPM's integer t."""
    return NodeTimes(tuple(sde.T * i / NODES for i in range(1, NODES + 1)))


RECIPES: dict[str, Callable[[sg.Facts], Objective]] = {
    "EDM": lambda _: Denoising(),
    "uniform": lambda _: Denoising(uniform_weight, uniform_times),
    "min-SNR": lambda _: Denoising(MinSNRWeight(), uniform_times),
    # The likelihood's weight over this density of times is the default weight, up to a factor.
    "likelihood": lambda facts: Denoising(times=InformationTimes(facts.variance)),
    "uncertainty": lambda _: Uncertainty(times=LogNormalTimes()),
    "integer t": lambda _: Denoising(uniform_weight, at_nodes(sg.VP())),
}
"""Name, and the objective for data of which so much is known. ``EDM`` is the default."""


class Task(NamedTuple):
    """A data set, and the network and recipe for it."""

    load: Callable[..., Labelled]
    levels: int
    net: Callable[[int | None, bool], UNet]
    batch: int
    lr: float
    steps: int
    samples: int
    layout: Layout


def small_mnist(classes: int | None, head: bool) -> UNet:
    """For (1, 28, 28) images, small enough that a CPU can train three dozen of them."""
    return UNet((1, 28, 28), 16, (1, 2, 2), 1, dropout=0.1, classes=classes, head=head)


TASKS = {
    "digits": Task(digits, 17, UNet.digits, 256, 4e-3, 1500, 2000, Layout()),
    "mnist": Task(mnist, 256, small_mnist, 64, 2e-3, 2000, 2000, Layout()),
}


class Job(NamedTuple):
    """One training."""

    task: str
    recipe: str
    seed: int

    @property
    def stem(self) -> str:
        """Of its files."""
        return f"{self.task}-{self.recipe.replace(' ', '-')}-{self.seed}"


class Plan(NamedTuple):
    """What all trainings share."""

    data: str
    out: str
    device: str
    end: float
    """When all must be done, on the clock of ``time.time``."""
    steps: dict[str, int]
    """The most of each data set."""
    rows: int
    samples: int
    """The most of each, which a dry run makes few."""


# --- pack ----------------------------------------------------------------------------------------


def pack(path: str, tasks: list[str]) -> None:
    """Levels and labels of all splits, in one file."""
    arrays = {}
    for name in tasks:
        for split in ("train", "test"):
            x, y = TASKS[name].load(split)
            arrays[f"{name}_{split}_x"] = quantise(x, TASKS[name].levels).numpy().astype(np.uint8)
            arrays[f"{name}_{split}_y"] = y.numpy()
    np.savez_compressed(path, **arrays)
    print(f"wrote {path}")


def unpack(path: str, name: str, split: str) -> Labelled:
    """A split as ``data`` gives it."""
    with np.load(path) as file:
        x, y = (torch.from_numpy(file[f"{name}_{split}_{part}"]) for part in "xy")
    return Labelled(centre(x.long(), TASKS[name].levels), y.long())


# --- train ---------------------------------------------------------------------------------------


def trained(job: Job, plan: Plan, steps: int) -> tuple[sg.ScoreNetwork, float]:
    """The averaged network, and seconds."""
    task, (x, y) = TASKS[job.task], unpack(plan.data, job.task, "train")
    facts = sg.Facts.of(x, levels=task.levels)
    torch.manual_seed(job.seed)
    objective = RECIPES[job.recipe](facts)
    net = task.net(10, isinstance(objective, Uncertainty))
    model = sg.ScoreNetwork(net, sg.VP(), facts=facts)
    recipe = sg.Recipe(
        steps=steps,
        batch=task.batch,
        lr=task.lr,
        seed=job.seed,
        every=100,
        layout=task.layout,
    )
    trainer = Trainer(
        model,
        x,
        y,
        recipe,
        objective=objective,
        transform=Dequantise(task.levels),
        device=plan.device,
    )
    return trainer.run(progress=False), trainer.elapsed


def measured(job: Job, plan: Plan, model: sg.ScoreNetwork) -> tuple[dict[str, float], Tensor]:
    """Bits a pixel of the held-out images, and samples of all classes in turn."""
    task, (x, y) = TASKS[job.task], unpack(plan.data, job.task, "test")
    device, n = plan.device, min(plan.samples, task.samples)
    x, y = x[: plan.rows].to(device), y[: plan.rows].to(device)
    found = sg.bits_per_dim(model.given(y=y), quantise(x, task.levels), chunk=500)
    bits, labels = found.mean(), (torch.arange(n) % 10).to(device)
    drawn = sg.sample(model.given(y=labels), n, seed=1000 + job.seed, chunk=1000)
    return {"bits": float(bits), "error": float(bits.standard_error)}, drawn.cpu()


def warm_up(names: list[str], plan: Plan, steps: int) -> dict[str, tuple[float, float]]:
    """Of each data set: seconds a step, and seconds of all that comes after training."""
    torch.set_num_threads(1)
    found = {}
    for name in names:
        job = Job(name, "EDM", 0)
        trained(job, plan, 3)
        model, seconds = trained(job, plan, steps)
        start = time.perf_counter()
        measured(job, plan, model)
        found[name] = (seconds / steps, time.perf_counter() - start)
    return found


def run(job: Job, plan: Plan, steps: int, expected: float) -> str:
    """Train, measure, write; what happened, in words."""
    torch.set_num_threads(1)
    start, path = time.time(), Path(plan.out) / job.stem
    if path.with_suffix(".npz").exists():
        return f"{job.stem}: there already"
    if start + expected > plan.end:
        return f"{job.stem}: SKIPPED, {expected:.0f} s are not left"
    model, seconds = trained(job, plan, steps)
    bits, drawn = measured(job, plan, model)
    levels = quantise(drawn.clamp(-1, 1), TASKS[job.task].levels).numpy().astype(np.uint8)
    whole, part = path.with_suffix(".npz"), path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(
            file, samples=levels, steps=steps, seconds=seconds, **bits, **job._asdict()
        )
    part.rename(whole)
    spent = time.time() - start
    return f"{job.stem}: {bits['bits']:.4f} bits, {steps} steps, {seconds:.0f} of {spent:.0f} s"


def lengths(
    found: list[dict[str, tuple[float, float]]], jobs: list[Job], plan: Plan, workers: int
) -> dict[str, tuple[int, float]]:
    """Steps of each data set and expected seconds, so that all jobs are done in time: by the
    times of a warm-up in which all workers were busy."""
    left = plan.end - time.time()
    cost = {n: [sum(f[n][i] for f in found) / len(found) for i in (0, 1)] for n in found[0]}
    each = math.ceil(len(jobs) / workers)
    share = {n: sum(j.task == n for j in jobs) / len(jobs) for n in cost}
    full = sum(share[n] * cost[n][0] * plan.steps[n] for n in cost) * each
    after = sum(share[n] * cost[n][1] for n in cost) * each
    part = min(1.0, max(0.02, (0.9 * left - after) / full))
    plans = {}
    for n, (step, rest) in cost.items():
        steps = max(1, int(part * plan.steps[n]))
        plans[n] = (steps, steps * step + rest)
        print(f"{n}: {steps} steps of {1e3 * step:.0f} ms, then {rest:.1f} s, {workers} at once")
    return plans


def train(plan: Plan, jobs: list[Job], workers: int, warm: int) -> None:
    """All jobs, so many at once."""
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(job.task for job in jobs))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        # Half of them begin with the other data set.
        turns = [names[:: 1 - 2 * (i % 2)] for i in range(workers)]
        found = [pool.submit(warm_up, turn, plan, warm) for turn in turns]
        steps = lengths([f.result() for f in found], jobs, plan, workers)
        waiting = [pool.submit(run, job, plan, *steps[job.task]) for job in jobs]
        for job, future in zip(jobs, waiting, strict=True):
            try:
                said = future.result(max(1.0, plan.end + 60 - time.time()))
            except Exception as error:  # noqa: BLE001 (one is no reason to lose the others)
                said = f"{job.stem}: FAILED, {type(error).__name__}: {error}"
            print(said, flush=True)
        if not all(future.done() for future in waiting):  # late ones do not hold up the rest
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


def all_jobs(tasks: list[str], seeds: int) -> list[Job]:
    """Every recipe with the first seed before the second: what is cut off is a seed."""
    return [
        Job(task, recipe, seed) for seed in SEEDS[:seeds] for recipe in RECIPES for task in tasks
    ]


# --- judge ---------------------------------------------------------------------------------------


def grades(data: str, out: str) -> Iterator[dict[str, Any]]:
    """A record for each training: what it was, bits, accuracy, Frechet distance; and the floor,
    real test images in place of samples."""
    from sde_gen.demo import Judge
    from sde_gen.metrics import frechet_distance

    for name, task in TASKS.items():
        files = sorted(Path(out).glob(f"{name}-*.npz"))
        if not files:
            continue
        real, test = (unpack(data, name, split) for split in ("train", "test"))
        judge = Judge(real)

        def grade(x: Tensor, y: Tensor, judge: Judge = judge, real: Labelled = real) -> Any:
            right = torch.from_numpy(judge.svc.predict(x.flatten(1).numpy())) == y
            distance = frechet_distance(x, real.x, judge.features)
            return {"accuracy": float(right.double().mean()), "frechet": distance}

        yield {"task": name, "recipe": "real test images", **grade(*test)}
        for file in files:
            with np.load(file) as found:
                x = centre(torch.from_numpy(found["samples"]).long(), task.levels)
                record = {k: found[k].item() for k in found.files if k != "samples"}
            yield {**record, **grade(x, torch.arange(len(x)) % 10)}


def summary(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each data set and recipe: means over seeds, their standard errors (``* over seeds``) and
    the error bar that the held-out images have in common."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for r in records:
        table.setdefault(r["task"], {}).setdefault(r["recipe"], {})
    for task, rows in table.items():
        for recipe, row in rows.items():
            own = [r for r in records if (r["task"], r["recipe"]) == (task, recipe)]
            row["seeds"] = len(own)
            for key in ("bits", "frechet", "accuracy", "error", "steps"):
                values = np.array([r[key] for r in own if key in r])
                if len(values):
                    row[key] = float(values.mean())
                if len(values) > 1 and key in ("bits", "frechet"):
                    row[f"{key} over seeds"] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return table


def show(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print, a table a data set."""
    for task, rows in table.items():
        steps = max(int(row.get("steps", 0)) for row in rows.values())
        print(f"\n{task}, {steps} steps of {TASKS[task].batch}: mean over seeds +- its error")
        cells = []
        for recipe, row in rows.items():
            cell = [recipe, str(int(row["seeds"])) if "bits" in row else ""]
            for key, places in (("bits", 4), ("frechet", 3)):
                over = row.get(f"{key} over seeds")
                text = f"{row[key]:.{places}f}" if key in row else ""
                cell.append(text + (f" +- {over:.{places}f}" if over is not None else ""))
            cells.append([*cell, f"{100 * row['accuracy']:.1f} %"])
        _report.table(["", "seeds", "bits/dim", "Frechet", "accuracy"], cells)
        error = max(row.get("error", 0.0) for row in rows.values())
        print(f"(the choice of test images, common to all, adds +- {error:.3f} bits)")


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Bits against Frechet distance, a point a training."""
    tasks = list(dict.fromkeys(r["task"] for r in records))
    fig, axes = _report.panels(len(tasks))
    for ax, task in zip(axes, tasks, strict=True):
        for color, recipe in zip(_report.COLORS, RECIPES, strict=True):
            own = [r for r in records if (r["task"], r["recipe"]) == (task, recipe)]
            x, y = ([r[key] for r in own] for key in ("bits", "frechet"))
            ax.plot(x, y, "o", color=color, ms=5, label=recipe, alpha=0.85)
        floor = [r["frechet"] for r in records if r["task"] == task and "bits" not in r]
        ax.axhline(floor[0], color="0.5", lw=1, ls="--")
        ax.annotate(
            "real test images", (0.98, floor[0]), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", fontsize=8, color="0.4",
        )  # fmt: skip
        ax.set(yscale="log", title=task)
    _report.finish(fig, axes, "bits / dimension, held-out images", "Frechet distance", path)


def judge(data: str, out: str, stem: Path) -> None:
    """Grade, print, draw, write."""
    records = list(grades(data, out))
    table = summary(records)
    show(table)
    draw(records, stem.with_suffix(".png"))
    content = {"trainings": records, "summary": table, "versions": _report.versions()}
    _report.write_json(stem.with_suffix(".json"), content)


def main() -> None:
    """The stage that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", nargs="?", choices=("pack", "train", "judge"), help="else all")
    parser.add_argument("--data", default=str(HERE / "results" / "cache" / "weightings.npz"))
    parser.add_argument("--out", default=str(HERE / "results" / "cache" / "weightings"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=60.0, help="for all trainings")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--rows", type=int, default=10_000, help="the most images to weigh")
    parser.add_argument("--samples", type=int, default=10_000, help="the most to draw")
    parser.add_argument("--steps", nargs=2, type=int, help="the most on digits, on MNIST")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="all stages, small")
    args = parser.parse_args()
    quick = args.quick
    out = f"{args.out}-quick" if quick else args.out
    Path(args.data).parent.mkdir(parents=True, exist_ok=True)
    stages = [args.stage] if args.stage else ["pack", "train", "judge"]
    if "pack" in stages:
        pack(args.data, args.tasks)
    if "train" in stages:
        end = time.time() + 60 * args.minutes
        most = [5, 5] if quick else args.steps or [task.steps for task in TASKS.values()]
        sizes = (20, 20) if quick else (args.rows, args.samples)
        plan = Plan(args.data, out, args.device, end, dict(zip(TASKS, most, strict=True)), *sizes)
        jobs = all_jobs(args.tasks, 2 if quick else args.seeds)
        train(plan, jobs, args.jobs, 3 if quick else 60)
    if "judge" in stages:
        judge(args.data, out, HERE / "results" / f"weightings{'_quick' if quick else ''}")


if __name__ == "__main__":
    main()
