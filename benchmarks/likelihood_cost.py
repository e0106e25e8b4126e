"""What does a log-likelihood cost, in calls and in seconds, for a given accuracy?

log p_0(x) by the probability flow of an exact score, against the exact density. The error is the
root mean square over samples, in bits per dimension. The trace of the Jacobian is exact (n
backward passes a call) or an estimate with 1 or 16 orthogonal probes; the ODE is solved by fixed
steps around Gaussian data (the default with probes), whose error bar costs no call, by
``Adaptive`` (the default with the exact trace, 1e-5) and SciPy's RK45 over tolerances
(1e-5 and one probe are the settings of score_sde), or by the classical Runge-Kutta method. A call
is one evaluation of the score for the whole batch, with whatever backward passes it takes.
Seconds are CPU seconds of one thread for the batch. (grid25 is absent: its Jacobian is
diagonal, on which random signs make no error.)

With ``--mnist FOLDER``, a model that ``mnist.py`` trained, it is asked of a network: four test
images given their class, dequantised, from sigma / alpha = 0.001 on. What is exact is not known
there: the error is that to 128 steps with 64 probes, whose own bar the table says.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import _report
import torch
from _problems import HERE, PROBLEMS
from torch import Tensor
from tqdm.auto import tqdm

from sde_gen import VP, Adaptive, RungeKutta, SciPy, Score, Streams, data, grids, log_prob
from sde_gen.training import load

PROBES = {"exact trace": 1 << 20, "16 probes": 16, "1 probe": 1}
BATCH = {"spiral": 64, "digits": 16, "powerlaw": 16, "mnist": 4}
LEAST = 0.001
"""The least sigma / alpha of the network."""


class Counted(Score):
    """An exact score that counts its calls."""

    def __init__(self, law: Any) -> None:
        self.law, self.sde, self.facts, self.calls = law, law.sde, law.facts, 0
        self.log_prob = law.log_prob

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        self.calls += 1
        return self.law(x, t)


def runs(quick: bool) -> list[tuple[str, dict[str, Any]]]:
    """Name, and how ``log_prob`` follows the flow."""
    powers = (3, 5) if quick else (2, 3, 4, 5, 6, 7)
    steps = (10, 20) if quick else (5, 10, 20, 40, 80)
    found: list[tuple[str, dict[str, Any]]] = [
        (f"fixed {n} steps", {"steps": n}) for n in ((16, 32) if quick else (16, 24, 32, 48, 64))
    ]
    found += [
        (f"Adaptive 1e-{k}", {"solver": Adaptive(10.0**-k, 10.0**-k)}) for k in powers if k < 7
    ]
    found += [(f"RK45 1e-{k}", {"solver": SciPy("RK45", 10.0**-k, 10.0**-k)}) for k in powers]
    for n in steps:
        times = grids.uniform(VP(), n, end=0.0, power=2.0).flip(0)
        found.append((f"RK4 {n} steps", {"solver": RungeKutta(), "times": times}))
    return found


def measure(problem: str, quick: bool) -> list[dict[str, Any]]:
    """Every solver with every kind of trace on one problem."""
    sde = VP()
    law = PROBLEMS[problem].law(sde)
    x = law.sample(BATCH[problem], torch.Generator().manual_seed(0))
    exact = law.log_prob(x)
    unit = math.log(2) * x[0].numel()
    log_prob(law, x[:2], solver=SciPy("RK45", 0.1, 0.1))  # imports and first traces
    rows = []
    table = [(k, p, *run) for k, p in PROBES.items() for run in runs(quick)]
    for kind, probes, name, options in tqdm(table, desc=problem, leave=False):
        score = Counted(law)
        start = time.thread_time()
        found = log_prob(score, x, probes=probes, **options)
        spent = time.thread_time() - start
        rows.append(row_of(kind, name, score.calls, spent, found.value - exact, found, unit))
    return rows


def measure_network(folder: str, quick: bool) -> list[dict[str, Any]]:
    """The same on test images under a trained network, against many steps and probes."""
    model: Any = load(folder)
    model.net.requires_grad_(False)
    test = data.mnist("test")
    rank = torch.arange(0, len(test.x), len(test.x) // 4)[:4]
    x = data.Dequantise(256)(test.x[rank], Streams(0))
    given, unit = model.given(y=test.y[rank]), math.log(2) * x[0].numel()
    ends = [float(model.sde.time_at(-2 * math.log(LEAST))), model.sde.T]
    most = 32 if quick else 128
    table: list[tuple[int, str, dict[str, Any]]] = [(64, f"fixed {most} steps", {"steps": most})]
    for probes in (1, 4):
        table += [(probes, f"fixed {n} steps", {"steps": n}) for n in (16, 32, 64)]
        for k in (3, 5):
            table += [
                (probes, f"Adaptive 1e-{k}", {"solver": Adaptive(10.0**-k, 10.0**-k)}),
                (probes, f"RK45 1e-{k}", {"solver": SciPy("RK45", 10.0**-k, 10.0**-k)}),
            ]
    calls, rows, true = [0], [], None
    model.net.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for probes, name, options in tqdm(table, desc="mnist", leave=False):
        calls[0], start = 0, time.thread_time()
        found = log_prob(given, x, probes=probes, times=ends, **options)
        spent = time.thread_time() - start
        true = found.value if true is None else true  # the first is what the others are held to
        away = found.value - true
        rows.append(row_of(f"{probes} probes", name, calls[0], spent, away, found, unit))
    return rows


def row_of(
    kind: str, name: str, calls: int, spent: float, away: Tensor, found: Any, unit: float
) -> dict[str, Any]:
    """A line of a table; errors and bars root mean squares over samples."""
    return {
        "trace": kind,
        "solver": name,
        "calls": calls,
        "seconds": spent,
        "bits/dim": float(away.square().mean().sqrt()) / unit,
        "bar": float(found.standard_error.square().mean().sqrt()) / unit,
        "inside": float((away.abs() <= found.standard_error).double().mean()),
    }


def draw(results: dict[str, list[dict[str, Any]]], path: Any) -> None:
    """Error against seconds: one line a kind of trace and of solver."""
    fig, axes = _report.panels(len(results), 3, (3.9, 3.3))
    for ax, (name, rows) in zip(axes, results.items(), strict=True):
        for color, kind in zip(_report.COLORS, PROBES, strict=False):
            for dash, solver in (
                ("D:", "fixed"),
                ("*-.", "Adaptive"),
                ("o-", "RK45"),
                ("s--", "RK4 "),
            ):
                part = [r for r in rows if r["trace"] == kind and r["solver"].startswith(solver)]
                seconds, error = ([r[k] for r in part] for k in ("seconds", "bits/dim"))
                label = f"{kind}, {solver.strip()}"
                ax.plot(seconds, error, dash, color=color, ms=3.5, lw=1.3, label=label)
        ax.set(xscale="log", yscale="log", title=name)
        low, high = (f(r["seconds"] for r in rows) for f in (min, max))
        ticks = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
        _report.call_ticks(ax, [s for s in ticks if low / 2 < s < high * 2])
    _report.finish(fig, axes, "CPU seconds for the batch", "RMS error, bits / dimension", path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one problem, four solves a trace")
    parser.add_argument("--problems", nargs="+", choices=list(BATCH)[:3])
    parser.add_argument("--mnist", help="the folder of a network that mnist.py trained: it alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stem = HERE / "results" / f"likelihood_cost{'_quick' if args.quick else ''}"
    file = stem.with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, list[dict[str, Any]]]
    if args.mnist:
        results = {"mnist": measure_network(args.mnist, args.quick)}
    else:
        names = ["spiral"] if args.quick else args.problems or list(BATCH)[:3]
        results = {name: measure(name, args.quick) for name in tqdm(names, desc="problems")}
        draw(results, stem.with_suffix(".png"))
    for name, rows in results.items():
        print(f"\n{name}, {BATCH[name]} samples")
        cells = [
            [
                r["trace"],
                r["solver"],
                str(r["calls"]),
                f"{r['seconds']:.2f}",
                f"{r['bits/dim']:.1e}",
                f"{r['bar']:.1e}",
                f"{r['inside']:.2f}",
            ]
            for r in rows
        ]
        heads = ["trace", "solver", "calls", "seconds", "RMS error, bits/dim", "bar", "inside"]
        _report.table(heads, cells)
    content = {**known, "batch": BATCH, **results, "versions": _report.versions()}
    _report.write_json(file, content)


if __name__ == "__main__":
    main()
