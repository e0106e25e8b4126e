"""Does a velocity help? Critically damped Langevin diffusion beside VP: one network, one budget.

On a swiss roll and on digits a network is trained under VP and another, of the same
kind, for the same number of steps, by the loss on (x, v). Both are sampled with the solvers that
``sample`` takes by itself, at equal numbers of calls, and with Euler-Maruyama and Heun as Dockhorn
et al. (2022) compare them. Distances are to real data that no network saw, beside the distance of
other real data (the floor); digits are also judged by a classifier, as in ``sde-gen demo``.

*CLD's network under VP* is the second network, as it is, asked for the score of VP: both see
x_0 + noise and the noise level, since that is all that (x, v) says of the data.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _report
import torch
from torch import Tensor
from tqdm.auto import tqdm

import sde_gen as sg
from sde_gen import data, grids
from sde_gen.data import Dequantise, Labelled
from sde_gen.demo import Judge
from sde_gen.metrics import energy_distance
from sde_gen.networks import MLP, UNet
from sde_gen.training import Denoising

HERE = Path(__file__).parent
PROCESSES: dict[str, sg.SDE] = {"VP": sg.VP(), "CLD": sg.CriticallyDamped()}
CALLS = (5, 10, 20, 40, 80)
LABEL_DROPOUT = 0.2


def calls_to_times(
    sde: Any, solver: sg.Solver | None, calls: int, data_std: float
) -> Tensor | None:
    """A grid that spends ``calls``; None for the default, which counts by itself."""
    if solver is None:
        return None
    return grids.default(sde, max(1, calls // solver.calls), data_std=data_std)


SAMPLERS: dict[str, tuple[float, sg.Solver | None]] = {
    "flow, default": (0.0, None),
    "flow, Heun": (0.0, sg.Heun()),
    "SDE, default": (1.0, None),
    "SDE, Euler-Maruyama": (1.0, sg.EulerMaruyama()),
}


def trained(net: Any, sde: Any, x: Tensor, y: Tensor | None, steps: int, seed: int) -> Any:
    """A score network after ``steps`` steps, and its seconds."""
    torch.manual_seed(seed)
    model = sg.ScoreNetwork(net(), sde, facts=sg.Facts.of(x))
    images = x.ndim > 2
    start = time.perf_counter()
    model = sg.train(
        model,
        x,
        y,
        sg.Recipe(steps=steps, lr=4e-3, seed=seed),
        objective=Denoising(dropout=LABEL_DROPOUT),
        transform=Dequantise(17) if images else None,
        device="cpu",
    )
    return model, time.perf_counter() - start


def models(net: Any, x: Tensor, y: Tensor | None, steps: int) -> tuple[dict[str, Any], dict]:
    """VP's network, CLD's, and CLD's read under VP; and the seconds of training."""
    found, seconds = {}, {}
    for name, sde in PROCESSES.items():
        found[name], seconds[name] = trained(net, sde, x, y, steps, 0)
    net_of_cld = found["CLD"].net
    found["CLD's network under VP"] = sg.ScoreNetwork(
        net_of_cld, PROCESSES["VP"], facts=sg.Facts(std=found["CLD"].facts.std)
    ).eval()
    return found, seconds


def sweep(found: dict[str, Any], y: Tensor | None, n: int, calls: tuple[int, ...], grade: Any):
    """One record for each model, sampler and number of calls."""
    records = []
    jobs = [(m, s, c) for m in found for s in SAMPLERS for c in calls]
    for name, sampler, count in tqdm(jobs, desc="sampling"):
        eta, solver = SAMPLERS[sampler]
        model = found[name] if y is None else found[name].given(y=y)
        times = calls_to_times(found[name].sde, solver, count, found[name].facts.std)
        x = sg.sample(model, n, count, seed=1, eta=eta, solver=solver, times=times)
        records.append({"model": name, "sampler": sampler, "calls": count, **grade(x)})
    return records


def points(quick: bool) -> dict[str, Any]:
    """The swiss roll."""
    n = 500 if quick else 4000
    make = [
        data.swiss_roll(k, torch.Generator().manual_seed(i)) for i, k in enumerate((20_000, n, n))
    ]
    train, real, other = (2 * x for x in make)
    found, seconds = models(lambda: MLP((2,), 128, 3), train, None, 100 if quick else 4000)
    calls = CALLS[1:3] if quick else CALLS
    records = sweep(found, None, n, calls, lambda x: {"energy": energy_distance(x, real)})
    return {
        "records": records,
        "floor": {"energy": energy_distance(other, real)},
        "seconds": seconds,
    }


def images(quick: bool) -> dict[str, Any]:
    """Digits, class by class."""
    train, test = data.digits("train"), data.digits("test")
    judge, y = Judge(train), torch.arange(100 if quick else 400) % 10
    found, seconds = models(lambda: UNet.digits(), *train, 20 if quick else 1500)
    calls = CALLS[1:3] if quick else CALLS
    records = sweep(found, y, len(y), calls, lambda x: judge.grade(x, y))
    return {
        "records": records,
        "floor": judge.grade(*Labelled(*test)),
        "seconds": seconds,
    }


def show(title: str, result: dict[str, Any]) -> None:
    """A table: models and samplers down, calls across."""
    measures = list(result["floor"])
    calls = sorted({r["calls"] for r in result["records"]})
    print(f"\n{title}; seconds of training:", {k: round(v) for k, v in result["seconds"].items()})
    for measure in measures:
        print(f"\n{measure} (floor {result['floor'][measure]:.4f})\n")
        rows = []
        for name in dict.fromkeys(r["model"] for r in result["records"]):
            for sampler in SAMPLERS:
                values = {
                    r["calls"]: r[measure]
                    for r in result["records"]
                    if r["model"] == name and r["sampler"] == sampler
                }
                rows.append([name, sampler, *(f"{values[c]:.4f}" for c in calls)])
        _report.table(["network", "sampler", *map(str, calls)], rows)


def draw(roll: dict[str, Any], digits: dict[str, Any], path: Path) -> None:
    """Distances against calls, a colour a network and a line style a sampler."""
    jobs = [
        ("swiss roll: energy distance", roll, "energy"),
        ("digits: Frechet distance of the judge's features", digits, "frechet"),
        ("digits: accuracy", digits, "accuracy"),
    ]
    fig, axes = _report.panels(3, 3, (4.4, 3.6))
    for ax, (title, result, measure) in zip(axes, jobs, strict=True):
        curves(ax, result, measure)
        ax.set_title(title, fontsize=10)
    _report.finish(fig, axes, "calls of the network", "", path)


def curves(ax: Any, result: dict[str, Any], measure: str) -> None:
    """One measure; an energy distance below its own resolution is drawn there."""
    least = 1e-4 if measure == "energy" else 0.0
    styles = dict(zip(SAMPLERS, ("-o", "--s", "-^", ":v"), strict=True))
    names = dict.fromkeys(r["model"] for r in result["records"])
    for color, name in zip(_report.COLORS, names, strict=False):
        for sampler, style in styles.items():
            if name not in PROCESSES and sampler != "flow, default":
                continue
            rows = [r for r in result["records"] if (r["model"], r["sampler"]) == (name, sampler)]
            x, y = [r["calls"] for r in rows], [max(r[measure], least) for r in rows]
            ax.plot(x, y, style, color=color, ms=4, lw=1.2, label=f"{name}: {sampler}")
    ax.axhline(max(result["floor"][measure], least), color="0.4", lw=1, ls=(0, (1, 2)))
    ax.set(xscale="log", yscale="linear" if measure == "accuracy" else "log")
    _report.call_ticks(ax, sorted({r["calls"] for r in result["records"]}))


def main() -> None:
    """Train, sample, judge; print tables, draw the figure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="hardly any training: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    roll, digits = points(args.quick), images(args.quick)
    show("Swiss roll", roll)
    show("Digits", digits)
    name = "critically_damped" + ("_quick" if args.quick else "")
    kept = {
        title: {k: v for k, v in result.items() if k != "shown"}
        for title, result in (("swiss roll", roll), ("digits", digits))
    }
    _report.write_json(HERE / "results" / f"{name}.json", {"versions": _report.versions(), **kept})
    draw(roll, digits, HERE / "results" / f"{name}.png")


if __name__ == "__main__":
    main()
