"""How far from the exact endpoint is a sampler after N calls of the network?

Everyone integrates the same probability flow, with the exact score, from the same starting points
to the same last noise level. The error is the RMSE over samples and coordinates of x / alpha
against a reference flow (tolerance 1e-12), and the same without the worst 5 % of samples. A cell
is a problem, a range and a number of calls; *best* is the peer with the lowest error in that cell
among all of ``_peers.table()``, so a ratio of 1 is what picking the best peer by hand would give.

    python benchmarks/error_vs_calls.py                 everything (about half an hour)
    python benchmarks/error_vs_calls.py --only sde_gen  sde_gen again, beside the stored peers
    python benchmarks/error_vs_calls.py --ours covariance  ... one configuration, the others stored
    python benchmarks/error_vs_calls.py --quick         a minute: three call counts, small problems
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import _peers
import _report
import numpy as np
import torch
from _problems import HERE, PROBLEMS, RANGES, Case, Model, errors
from torch import Tensor
from tqdm.auto import tqdm

from sde_gen import Exponential, Solver, grids, solve, tune_grid, tune_solver
from sde_gen.sampling import default_solver
from sde_gen.tuning import Tuned

CALLS = (5, 6, 8, 10, 15, 20, 30, 50)
LEAST = 0.01
"""A cell counts for no less in a mean: a solver that is exact would decide it alone."""
GROUPS = {
    "problems": "main",
    "held-out problems": "held out",
    "new problems": "new",
    "unseen problems": "unseen",
    "fresh problems": "fresh",
}
RAW = HERE / "results" / "error_vs_calls"
Cell = tuple[float, float]
Row = dict[str, Cell]


def flow(
    case: Case,
    calls: int,
    solver: Solver | None = None,
    grid: Callable[..., Tensor] | None = None,
    covariance: bool = False,
) -> Tensor:
    """sde_gen's own loop on the probability flow, from x to x / alpha; by default its defaults."""
    model = Model(case, covariance)
    grid = grid or partial(grids.default, data_std=model.facts.std)
    times = grid(case.sde, calls, end=case.end)
    process = case.sde.probability_flow(model)
    return solve(process, case.x, times, solver or default_solver(model)) / case.sde.alpha(
        case.end
    )


@cache
def _tuned(name: str, seed: int, covariance: bool, tune: Callable[..., Tuned]) -> Tuned:
    case = Case(*name.split("-"), seed)
    return tune(Model(case, covariance), steps=CALLS, end=case.end, seed=1000 + seed)


def tuned(case: Case, calls: int, covariance: bool, tune: Callable[..., Tuned]) -> Tensor:
    """What ``tune_grid`` or ``tune_solver`` fit once to the problem, for all of ``CALLS``; the
    trajectories that they fit, choose and judge by are none of those measured here."""
    solver = _tuned(case.name, case.seed, covariance, tune)
    return flow(case, calls, solver, solver.grid, covariance)


OURS: dict[str, _peers.Run] = {
    "DDIM": lambda c, n: flow(c, n, Exponential(1), grids.quadratic),
    "DPM-Solver++": lambda c, n: flow(c, n, Exponential(2), grids.quadratic),
    "std, order 3": lambda c, n: flow(c, n, Exponential(3, c.variance), grids.quadratic),
    "std, order 3c": lambda c, n: flow(c, n, Exponential(3, c.variance, True), grids.quadratic),
    "default (std)": flow,
    "tuned grid (std)": lambda c, n: tuned(c, n, False, tune_grid),
    "tuned solver (std)": lambda c, n: tuned(c, n, False, tune_solver),
    "covariance": lambda c, n: flow(c, n, covariance=True),
    "tuned grid (covariance)": lambda c, n: tuned(c, n, True, tune_grid),
    "tuned solver (covariance)": lambda c, n: tuned(c, n, True, tune_solver),
}
"""The configurations of sde_gen: a name, and a function of the case and the number of calls."""
DRAWN = ("DPM-Solver++", "default (std)", "tuned solver (std)", "covariance")
"""Those in the figure."""


def run_ours(case: Case, calls: tuple[int, ...], names: list[str]) -> dict[str, Row]:
    """The named configurations of sde_gen."""
    return {f"sde_gen {name}": run_fixed(case, calls, OURS[name]) for name in names}


def run_fixed(case: Case, calls: tuple[int, ...], run: _peers.Run) -> Row:
    """Errors of one configuration, for each number of calls that it can spend."""
    row: Row = {}
    for n in calls:
        case.calls = 0
        y = run(case, n)
        if case.calls > n:
            raise AssertionError(f"{case.calls} calls where {n} were allowed")
        if y is not None:
            row[str(n)] = errors(y, case.reference)
    return row


def run_adaptive(case: Case, calls: tuple[int, ...], run: Any, tolerances: list[float]) -> Row:
    """For each number of calls, the tightest tolerance that keeps within it."""
    row: Row = {}
    for rtol in tolerances:
        case.calls = 0
        error = errors(run(case, 0, rtol=rtol), case.reference)
        if case.calls > max(calls):
            break
        row |= {str(n): error for n in calls if case.calls <= n}
    return row


def run_peers(case: Case, calls: tuple[int, ...]) -> dict[str, Row]:
    """Every configuration of every peer."""
    fixed, adaptive = _peers.table(), _peers.adaptive_table()
    rows: dict[str, Row] = {}
    with tqdm(total=len(fixed) + len(adaptive), desc=case.name, leave=False) as bar:
        for name, run in fixed.items():
            rows[name] = run_fixed(case, calls, run)
            bar.update()
        for name, (run, tolerances) in adaptive.items():
            rows[name] = run_adaptive(case, calls, run, tolerances)
            bar.update()
    return rows


def rounded(rows: dict[str, Row]) -> dict[str, dict[str, list[float]]]:
    """Three digits: what a file keeps."""
    return {
        k: {n: [float(f"{e:.3g}") for e in v] for n, v in row.items()} for k, row in rows.items()
    }


def stored(case: Case, folder: Path) -> dict[str, Any]:
    """What an earlier run left for the same starting points."""
    path = folder / f"{case.name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return known if known.get("key") == case.key else {"key": case.key, "peers": {}, "sde_gen": {}}


def measure(case: Case, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The errors of one case, measured or remembered, and written down at once."""
    known = stored(case, folder)
    if args.only != "sde_gen" and (args.again or not known["peers"]):
        known["peers"] = rounded(run_peers(case, args.calls))
    if args.only != "peers":
        known["sde_gen"] |= rounded(run_ours(case, args.calls, args.ours))
    folder.mkdir(parents=True, exist_ok=True)
    compact = partial(json.dumps, separators=(",", ":"))
    lines = [f'"key": {json.dumps(known["key"])}']
    for part in ("peers", "sde_gen"):
        rows = ",\n".join(f"{json.dumps(k)}: {compact(v)}" for k, v in known[part].items())
        lines.append(f'"{part}": {{\n{rows}\n}}')
    (folder / f"{case.name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return known


# --- what the numbers say ---------------------------------------------------------------------


def without(known: dict[str, Any], pattern: str | None) -> dict[str, Any]:
    """The same results with the peers left out whose name matches."""
    peers = known["peers"].items()
    left = {k: row for k, row in peers if pattern is None or not re.search(pattern, k)}
    return {**known, "peers": left}


def best_peer(known: dict[str, Any], calls: int, kind: int) -> tuple[float, str]:
    """Lowest error of any peer in a cell; kind 0 is the RMSE, 1 the one without the worst 5 %."""
    n = str(calls)
    return min((row[n][kind], name) for name, row in known["peers"].items() if n in row)


def ratios(
    results: dict[str, Any], name: str, calls: tuple[int, ...], kind: int
) -> list[float] | None:
    """error / best peer error of one configuration in every cell, or None if one is missing."""
    part = "sde_gen" if name.startswith("sde_gen") else "peers"
    out = []
    for known in results.values():
        row = known[part].get(name, {})
        for n in calls:
            if str(n) not in row:
                return None
            out.append(max(row[str(n)][kind] / best_peer(known, n, kind)[0], LEAST))
    return out


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(v) for v in values) / len(values))


def ranking(results: dict[str, Any], calls: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every configuration by its geometric mean over the cells, best first."""
    first = next(iter(results.values()))
    rows = []
    for name in [*first["sde_gen"], *first["peers"]]:
        r, trimmed = (ratios(results, name, calls, kind) for kind in (0, 1))
        if r is None or trimmed is None or not all(map(math.isfinite, r)):
            continue
        rows.append(
            {
                "name": name,
                "ratio": geometric(r),
                "ratio, best 95 %": geometric(trimmed),
                "cells won": sum(v < 1 for v in r) / len(r),
            }
        )
    return sorted(rows, key=lambda row: row["ratio"])


PAIRS = (
    ("covariance", "default (std)"),
    ("tuned solver (std)", "tuned grid (std)"),
    ("tuned solver (covariance)", "tuned grid (covariance)"),
)


def paired(
    results: dict[str, Any], a: str, b: str, calls: tuple[int, ...], kind: int
) -> list[float] | None:
    """error of a / error of b, geometric mean over cells, and the ends of its 95 % interval: by
    drawing cells anew (bootstrap), 2,000 times."""
    first, second = (ratios(results, f"sde_gen {name}", calls, kind) for name in (a, b))
    if first is None or second is None:
        return None
    gain = np.log(first) - np.log(second)
    draws = np.random.default_rng(0).choice(gain, (2000, len(gain))).mean(1)
    return [float(np.exp(v)) for v in (gain.mean(), *np.quantile(draws, (0.025, 0.975)))]


def print_pairs(results: dict[str, Any], calls: tuple[int, ...]) -> dict[str, Any]:
    """Whether knowing or fitting more ever costs."""
    found = {}
    for a, b in PAIRS:
        for kind, what in enumerate(("all", "best 95 %")):
            if value := paired(results, a, b, calls, kind):
                found[f"{a} / {b}, {what}"] = value
    rows = [[name, "{:.2f} ({:.2f} to {:.2f})".format(*v)] for name, v in found.items()]
    if rows:
        _report.table(["pair", "ratio (95 % of bootstraps over cells)"], rows)
    return found


def print_case(name: str, known: dict[str, Any], calls: tuple[int, ...]) -> None:
    """One line a number of calls: the best peer, and sde_gen in its units."""
    ours = list(known["sde_gen"])
    rows = []
    for n in calls:
        (best, who), (trimmed, _) = (best_peer(known, n, kind) for kind in (0, 1))
        cells = [f"{known['sde_gen'][k][str(n)][0] / best:.2g}" for k in ours]
        rows.append([str(n), f"{best:.2e} ({trimmed:.1e})", who, *cells])
    heads = [
        "calls",
        "best peer (best 95 %)",
        "which",
        *(k.removeprefix("sde_gen ") for k in ours),
    ]
    print(f"\n{name}: RMSE of the best peer, and sde_gen's RMSE / that")
    _report.table(heads, rows)


def print_ranking(title: str, rows: list[dict[str, Any]], peers: int = 8) -> None:
    """sde_gen's configurations and the best fixed ones of the peers."""
    ours = [r for r in rows if r["name"].startswith("sde_gen")]
    theirs = [r for r in rows if not r["name"].startswith("sde_gen")][:peers]
    print(f"\n{title}: geometric mean of error / best peer error")
    _report.table(
        ["configuration", "ratio", "best 95 %", "cells won"],
        [
            [
                r["name"],
                f"{r['ratio']:.2f}",
                f"{r['ratio, best 95 %']:.2f}",
                f"{100 * r['cells won']:.0f} %",
            ]
            for r in ours + theirs
        ],
    )


def draw(results: dict[str, Any], calls: tuple[int, ...], rank: list[Any], path: Path) -> None:
    """Error against calls, a panel a case; shaded: worse than the best peer."""
    fig, axes = _report.panels(len(results), columns=len(RANGES))
    peer = next((r["name"] for r in rank if not r["name"].startswith("sde_gen")), None)
    popular = [n for n in (peer, "diffusers DPM++2M K7", "diffusers UniPC-3 exp") if n]
    for ax, (name, known) in zip(axes, results.items(), strict=True):
        envelope = [best_peer(known, n, 0)[0] for n in calls]
        ax.fill_between(calls, envelope, max(envelope) * 30, color="0.95", lw=0)
        ax.plot(calls, envelope, color="0.35", lw=1.5, label="best peer, picked per cell")
        for color, dash, key in zip(_report.GREYS, (":", "--", "-."), popular, strict=False):
            values = [known["peers"][key][str(n)][0] for n in calls]
            ax.plot(calls, values, dash, color=color, lw=1.2, label=key)
        for color, key in zip(_report.COLORS, DRAWN, strict=False):
            if row := known["sde_gen"].get(f"sde_gen {key}"):
                values = [row[str(n)][0] for n in calls]
                ax.plot(calls, values, "o-", ms=3, color=color, lw=1.5, label=f"sde_gen {key}")
        ax.set(xscale="log", yscale="log", title=name)
        ax.set_ylim(min(envelope) / 40, max(envelope) * 12)
        _report.call_ticks(ax, calls)
    _report.finish(fig, axes, "network calls", "endpoint RMSE", path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["sde_gen", "peers"], help="measure one side only")
    parser.add_argument("--again", action="store_true", help="measure stored peers again")
    parser.add_argument("--quick", action="store_true", help="three call counts, small problems")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--ranges", nargs="+", choices=list(RANGES), default=list(RANGES))
    parser.add_argument("--ours", nargs="*", choices=list(OURS), default=list(OURS))
    parser.add_argument("--exclude", help="leave out the peers whose name matches this pattern")
    parser.add_argument("--seed", type=int, default=0, help="of the starting points")
    args = parser.parse_args()
    args.calls = (5, 10, 20) if args.quick else CALLS
    if args.quick:
        args.problems = [p for p in args.problems if p in ("grid25", "rough")]
    return args


def main() -> None:
    """Measure what is not remembered, print, write."""
    args = parse()
    torch.set_num_threads(1)
    name = f"error_vs_calls{'_quick' if args.quick else ''}{f'_{args.seed}' if args.seed else ''}"
    folder = RAW.with_name(name)
    cases = [Case(p, r, args.seed) for p in args.problems for r in args.ranges]
    results = {c.name: measure(c, args, folder) for c in tqdm(cases, desc="cases")}
    if args.only == "peers" or not all(known["peers"] for known in results.values()):
        return
    results = {name: without(known, args.exclude) for name, known in results.items()}
    versions = _report.versions(folder.with_suffix(".json"))
    summary: dict[str, Any] = {"calls": args.calls, "versions": versions}
    for case, known in results.items():
        print_case(case, known, args.calls)
    for title, group in GROUPS.items():
        part = {c.name: results[c.name] for c in cases if PROBLEMS[c.problem].group == group}
        if part:
            rank = ranking(part, args.calls)
            print_ranking(title, rank)
            summary[f"pairs, {title}"] = print_pairs(part, args.calls)
            summary[title] = [r for r in rank if r["name"].startswith("sde_gen")] + [
                r for r in rank if not r["name"].startswith("sde_gen")
            ][:20]
            tag = "" if group == "main" else f"_{group.replace(' ', '_')}"
            draw(part, args.calls, rank, folder.with_name(f"{name}{tag}.png"))
    summary["best peers"] = {
        case: {n: best_peer(known, n, 0) for n in args.calls} for case, known in results.items()
    }
    summary["peers"] = len(next(iter(results.values()))["peers"])
    _report.write_json(folder.with_suffix(".json"), summary)


if __name__ == "__main__":
    main()
