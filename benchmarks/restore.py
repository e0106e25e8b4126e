"""Real images from few measurements, with a trained prior: what comes back, and is it calibrated?

Held-out digits (8 x 8) or MNIST (28 x 28) are observed in eight ways, with noise a tenth as large
as what the measurement varies by from image to image. A score network trained on the training
images alone is the prior. Three methods draw from the posterior: ``particles``; the cheap term
``Posterior(prior, seen)`` at eta = 1; and, of no network, the exact posterior under the Gaussian
with the mean and covariance of the training images, which is what linear methods can do. Of each:

- *PSNR* of the mean of the draws, in decibels, the range of grey being 2;
- *spread / error*: rms spread of K draws over the rms error of their mean, times sqrt((K + 1) / K)
  for the mean's own spread: 1 is calibrated, below 1 too sure;
- *misfit*: |o - A x|^2 in units of the noise, per measurement, over the draws. The expectation is
  1 for draws from the posterior, as for the truth itself, whose own is printed beside it;
- the smallest effective number of particles, and the seconds of all images (processor time on a
  CPU).

The figure shows a different image in each row. A network is trained for ``--minutes`` and saved,
or read from ``--model``.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _report
import torch
from torch import Tensor

import sde_gen as sg
from sde_gen import data
from sde_gen.data import Dequantise
from sde_gen.inverse import (
    Blur,
    Downsample,
    Fourier,
    Mask,
    Matrix,
    Observation,
    Operator,
    Posterior,
    Radon,
    exact_posterior,
    particles,
)
from sde_gen.networks import UNet
from sde_gen.training import Trainer, load, save

HERE = Path(__file__).parent
NOISE = 0.1
"""Of a measurement, in units of its standard deviation from image to image."""
SHOWN = {"particles": 4, "cheap term": 2}
"""Draws in the figure."""


class Images(NamedTuple):
    """A data set, and the network and recipe for it."""

    load: Callable[..., data.Labelled]
    levels: int
    rank: int
    lr: float
    net: Callable[[int], UNet]
    """Of a number of channels."""


SETS = {
    "digits": Images(data.digits, 17, 63, 4e-3, lambda _: UNet.digits(classes=None)),
    "mnist": Images(
        data.mnist,
        256,
        256,
        1e-3,
        lambda n: UNet((1, 28, 28), n, (1, 2, 2), blocks=1, attention=(7,), dropout=0.1),
    ),
}


# --- the prior -----------------------------------------------------------------------------------


def trained(
    images: Images, x: Tensor, minutes: float, device: str, channels: int, batch: int
) -> sg.ScoreNetwork:
    """A score network of dequantised images, after ``minutes``; bfloat16 on a GPU."""
    spread = Dequantise(images.levels)(x, sg.Streams(0))
    facts = sg.Facts.of(spread, rank=images.rank, levels=images.levels)
    torch.manual_seed(0)
    model = sg.ScoreNetwork(images.net(channels), sg.VP(), facts=facts)
    recipe = sg.Recipe(minutes=minutes, lr=images.lr, batch=batch)
    trainer = Trainer(model, x, recipe=recipe, transform=Dequantise(images.levels), device=device)
    model = trainer.run()
    print(f"{trainer.step} steps in {trainer.elapsed:.0f} s")
    return model


def losses(model: sg.ScoreNetwork, images: Images, parts: dict[str, Tensor]) -> dict[str, float]:
    """Mean error of the denoised state at eight noise levels."""
    found = {}
    for name, x in parts.items():
        x = Dequantise(images.levels)(x, sg.Streams(1)).to(model.device)
        total = torch.zeros((), device=model.device)
        for i, level in enumerate(torch.logspace(-1, 1, 8).tolist()):
            t = model.sde.time_at(-2 * math.log(level))
            noisy = model.sde.perturb(x, t, sg.Streams(2 + i))[0]
            with torch.no_grad():
                total += (model.denoise(noisy, t) - x).square().mean() / 8
        found[name] = float(total)
    return found


# --- the problems --------------------------------------------------------------------------------


def operators(shape: tuple[int, ...], device: str) -> dict[str, Operator]:
    """Eight ways to observe an image (1, H, W)."""
    g = torch.Generator().manual_seed(0)
    h, w = shape[-2:]
    side, angles = max(5, h // 3 // 2 * 2 + 1), max(3, h // 5)
    hole = torch.ones(shape, dtype=torch.bool)
    hole[:, h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2] = False
    bell = torch.exp(-0.5 * (torch.linspace(-2, 2, side)) ** 2)
    kernel = torch.outer(bell, bell) / bell.sum() ** 2
    few = torch.rand(shape, generator=g) < 0.3
    kept = torch.rand((h, w), generator=g) < 0.3
    kept[0, 0] = True
    sums = torch.randn(10, h * w, generator=g) / math.sqrt(h * w)
    turns = torch.linspace(0, math.pi, angles + 1)[:-1]
    return {
        "2x smaller": Downsample(2, shape),
        "4x smaller": Downsample(4, shape),
        "a block missing": Mask(hole.to(device)),
        "30 % of the pixels": Mask(few.to(device)),
        "blurred": Blur(kernel.to(device), shape),
        "10 random sums": Matrix(sums.to(device), shape),
        "30 % of frequencies": Fourier(kept.to(device), shape),
        f"{angles} X-ray views": Radon(turns.to(device), shape),
    }


def observe(a: Operator, truths: Tensor, train: Tensor) -> Observation:
    """What is measured of the truths, with noise."""
    noise = NOISE * float(a.forward(train).std(0).square().mean().sqrt())
    clean = a.forward(truths)
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    return Observation(a, clean + noise * z.to(clean), noise)


# --- the methods ---------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Draws (R, K, *D) on the CPU, float64."""

    x: Tensor
    least: float = float("nan")
    """The smallest effective number of particles."""


def by_particles(prior: sg.ScoreNetwork, seen: Observation, count: int, steps: int) -> Drawn:
    """Weighted particles, resampled to equal weights."""
    found = particles(prior, seen, count, steps, seed=0, chunk=chunk(prior))
    return Drawn(found.draw(count).double().cpu(), float(found.ess.min()))


def by_term(prior: sg.ScoreNetwork, seen: Observation, count: int, steps: int) -> Drawn:
    """The posterior's score, at eta = 1."""
    r = len(seen.y)
    rows = seen.rows(torch.arange(r, device=seen.y.device).repeat_interleave(count))
    x = sg.sample(Posterior(prior, rows), r * count, steps, seed=0, eta=1.0, chunk=chunk(prior))
    return Drawn(x.reshape(r, count, *x.shape[1:]).double().cpu())


def chunk(prior: sg.ScoreNetwork) -> int | None:
    """States at once: what stays in a CPU's cache, or all that there are."""
    return 200 if prior.device.type == "cpu" else None


def by_gaussian(train: Tensor, seen: Observation, count: int) -> Drawn:
    """Exact draws under the Gaussian of the training images."""
    flat = train.double().cpu().flatten(1)
    law = sg.Gaussian(sg.VP(), flat.mean(0).reshape(train.shape[1:]), covariance=flat.T.cov())
    g = torch.Generator().manual_seed(0)
    each = range(len(seen.y))
    return Drawn(torch.stack([exact_posterior(law, seen.rows(i)).sample(count, g) for i in each]))


def judged(drawn: Drawn, truths: Tensor, seen: Observation) -> dict[str, float]:
    """The numbers of the table."""
    x, k = drawn.x, drawn.x.shape[1]
    error = (x.mean(1) - truths.double().cpu()).square().flatten(1).mean(1)
    spread = x.var(1).mean()
    rows = seen.rows(torch.arange(len(x), device=seen.y.device).repeat_interleave(k))
    many = x.flatten(0, 1).to(seen.y.device)
    return {
        "PSNR": float((10 * torch.log10(4 / error)).mean()),
        "spread / error": float(((k + 1) / k * spread / error.mean()).sqrt()),
        "misfit": misfit(rows, many),
        "misfit of the truth": misfit(seen, truths.double()),
        "least ESS": drawn.least,
    }


def misfit(seen: Observation, x: Tensor) -> float:
    """Chi-square per measurement."""
    return float(seen.whiten(seen.residual(x)).square().mean())


# --- the figure ----------------------------------------------------------------------------------


def picture(a: Operator, y: Tensor) -> tuple[Tensor, bool]:
    """A measurement (*M) as an image (h, w), and whether it is on the grey scale of the data."""
    if isinstance(a, Mask):
        back = a.adjoint(y.unsqueeze(0))[0, 0]
        return torch.where(a.mask[0], back, torch.nan).cpu(), True
    if isinstance(a, Radon):
        return y[0].cpu(), False
    if isinstance(a, Matrix):
        return y.reshape(2, -1).cpu(), False
    if isinstance(a, Fourier):
        return a.adjoint(y.unsqueeze(0))[0, 0].cpu(), False
    return y[0].cpu(), True


class Row(NamedTuple):
    """One task's image: what was observed, what is true, and draws (K, H, W) of each method."""

    name: str
    seen: tuple[Tensor, bool]
    numbers: int
    truth: Tensor
    draws: dict[str, Tensor]


def draw(rows: list[Row], path: Path) -> None:
    """A row a task; grey on one scale, the spread on another."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    grey, heat = colormaps["gray"].with_extremes(bad="#a8c6dd"), colormaps["magma"]
    top = max(float(row.draws[name].std(0).max()) for row in rows for name in SHOWN)
    columns = [("observed", 0.0), ("truth", 1.0)]
    at, starts = 2.0, {}
    for name, n in SHOWN.items():
        at, starts[name] = at + 0.25 + 2 + n, at + 0.25
        heads = ["mean", "spread", *["draw"] * n]
        columns += [(head, starts[name] + i) for i, head in enumerate(heads)]
    cell, left, above, below = 0.86, 1.75, 0.72, 0.75
    width, height = left + cell * at + 0.1, above + cell * len(rows) + below
    figure = Figure(figsize=(width, height), dpi=130)

    def box(x: float, y: float, w: float, h: float) -> Any:
        return figure.add_axes((x / width, y / height, w / width, h / height))

    for k, row in enumerate(rows):
        y = height - above - cell * (k + 1)
        images: list[tuple[Tensor, dict[str, Any]]] = [
            (row.seen[0], {} if row.seen[1] else {"vmin": None, "vmax": None}),
            (row.truth, {}),
        ]
        for name, n in SHOWN.items():
            x = row.draws[name]
            images += [(x.mean(0), {}), (x.std(0), {"cmap": heat, "vmin": 0, "vmax": top})]
            images += [(x[i], {}) for i in range(n)]
        for (head, place), (image, other) in zip(columns, images, strict=True):
            ax = box(left + cell * place, y, 0.95 * cell, 0.95 * cell)
            ax.imshow(image, **{"cmap": grey, "vmin": -1, "vmax": 1, **other}, aspect="auto")
            ax.axis("off")
            if k == 0:
                ax.set_title(head, fontsize=9, color="0.3", pad=4)
        words = {"ha": "right", "va": "center", "linespacing": 1.3}
        text = f"{row.name}\n{row.numbers} numbers"
        figure.text((left - 0.12) / width, (y + 0.47 * cell) / height, text, **words)
    for name, n in SHOWN.items():
        middle = left + cell * (starts[name] + (2 + n) / 2)
        figure.text(middle / width, 1 - 0.3 / height, name, ha="center", weight="bold")
    first = left + cell * starts["particles"]
    _bar(box(left, 0.45, 1.95 * cell, 0.12), grey, (-1, 1), "images")
    _bar(box(first + cell, 0.45, 2.95 * cell, 0.12), heat, (0, top), "spread (standard deviation)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")


def _bar(ax: Any, colours: Any, limits: tuple[float, float], name: str) -> None:
    """A scale of colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(*limits), colours)
    bar = ax.figure.colorbar(scale, cax=ax, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.set_label(name, fontsize=9, color="0.3")
    ax.tick_params(labelsize=8, length=2)


# --- the run -------------------------------------------------------------------------------------


def restore(
    prior: sg.ScoreNetwork, train: Tensor, truths: Tensor, count: int, steps: int, half: bool
) -> tuple[dict[str, Any], list[Row]]:
    """Every task by every method."""
    device = prior.device
    train, truths = train.to(device), truths.to(device)
    methods: dict[str, Callable[[Observation], Drawn]] = {
        "particles": lambda seen: by_particles(prior, seen, count, steps),
        "cheap term": lambda seen: by_term(prior, seen, count, steps),
        "Gaussian prior": lambda seen: by_gaussian(train, seen, count),
    }
    table: dict[str, Any] = {}
    rows = []
    # Draws end on the host, which waits for the device. On a CPU others may be busy beside us.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    precision = torch.autocast(device.type, torch.bfloat16, enabled=half)
    for i, (name, a) in enumerate(operators(truths.shape[1:], str(device)).items()):
        seen = observe(a, truths, train)
        table[name] = {}
        shown, draws = i % len(truths), {}
        for method, run in methods.items():
            start = clock()
            with precision:
                drawn = run(seen)
            seconds = clock() - start
            table[name][method] = {**judged(drawn, truths, seen), "seconds": seconds}
            draws[method] = drawn.x[shown, :, 0]
        numbers = seen.y[0].numel()
        look = picture(a, seen.y[shown])
        rows.append(Row(name, look, numbers, truths[shown, 0].cpu(), draws))
        print(f"{name}: " + ", ".join(f"{m} {r['seconds']:.1f} s" for m, r in table[name].items()))
    return table, rows


def print_table(table: dict[str, Any]) -> None:
    """A line a task, the methods side by side."""
    methods = list(next(iter(table.values())))
    heads = ["PSNR", "spread / error", "misfit"]
    lines = [
        [
            name,
            *(" / ".join(f"{row[m][h]:.{1 + (h != 'PSNR')}f}" for m in methods) for h in heads),
            f"{row[methods[0]]['misfit of the truth']:.2f}",
            f"{row[methods[0]]['least ESS']:.0f}",
            " / ".join(f"{row[m]['seconds']:.1f}" for m in methods[:2]),
        ]
        for name, row in table.items()
    ]
    print("\n" + " / ".join(methods) + "\n")
    _report.table(["observed", *heads, "of the truth", "least ESS", "seconds"], lines)


def main() -> None:
    """Train or load, restore, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", choices=list(SETS), default="digits")
    parser.add_argument("--model", type=Path, help="a folder with a trained prior")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--channels", type=int, default=64, help="of the network for MNIST")
    parser.add_argument("--batch", type=int, default=256, help="of training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where figure, table and model/ go")
    parser.add_argument("--images", type=int, default=8, help="a task")
    parser.add_argument("--count", type=int, default=200, help="draws an image")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--float32", action="store_true", help="sample so on a GPU too")
    parser.add_argument("--quick", action="store_true", help="seconds of training, few draws")
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # collapse is in the table
    if args.quick:
        args.minutes, args.images, args.count, args.steps = 0.1, 2, 20, 10
    quick = "_quick" if args.quick else ""
    out = HERE / "results" if args.out is None else args.out
    kept = out / ("model" if args.out else f"cache/restore-{args.data}-{args.minutes:g}{quick}")

    images = SETS[args.data]
    train, test = images.load("train"), images.load("test")
    folder = args.model or (kept if (kept / "config.json").exists() else None)
    if folder is None:
        prior = trained(images, train.x, args.minutes, args.device, args.channels, args.batch)
        save(prior, kept)
    else:
        prior = load(folder, args.device)
    known = Dequantise(images.levels)(train.x[:2000], sg.Streams(0))
    chosen = [int((test.y == i % 10).nonzero()[i // 10]) for i in range(args.images)]
    truths = Dequantise(images.levels)(test.x[chosen], sg.Streams(1))
    half = prior.device.type == "cuda" and not args.float32
    table, rows = restore(prior, known, truths, args.count, args.steps, half)
    print_table(table)
    n = 20 if args.quick else 400
    loss = losses(prior, images, {"train": train.x[:n], "held out": test.x[:n]})
    print("\nerror of the denoised state: " + ", ".join(f"{k} {v:.4f}" for k, v in loss.items()))
    stem = out / f"restore_{args.data}{quick}"
    draw(rows, stem.with_suffix(".png"))
    asked = {k: v for k, v in vars(args).items() if k not in ("model", "out", "quick")}
    content = {"versions": _report.versions(), "asked": asked, "loss": loss, "tasks": table}
    _report.write_json(stem.with_suffix(".json"), content)


if __name__ == "__main__":
    main()
