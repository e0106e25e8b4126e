"""How many trajectories end in another mode, and does anything but steps help?

A trajectory of the probability flow of a mixture ends at one of its components. Near the border
between two of them a small error decides for the wrong one; the trajectory then misses by the
distance of the two, and a few like it decide a root mean square. Counted is, by problem, number of
calls and configuration of sde_gen (as in ``error_vs_calls``), the share of trajectories whose end
has its largest posterior weight at another component than the exact end has; and the part of the
summed squared error that they carry.

    python benchmarks/strays.py            two minutes, and what tuning costs
    python benchmarks/strays.py --quick    without what is tuned, small problems
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import _report
import torch
from _problems import HERE, PROBLEMS, RANGES, Case, Model
from error_vs_calls import OURS, flow
from torch import Tensor
from tqdm.auto import tqdm

from sde_gen import GaussianMixture, tune_solver
from sde_gen.tuning import Tuned

CALLS = (5, 10, 20, 50, 100)
TUNED = tuple(n for n in CALLS if n <= 20)
NAMES = ("DPM-Solver++", "default (std)", "covariance", "tuned solver (std)")


@cache
def tuned(name: str) -> Tuned:
    """Fitted to trajectories that are not those counted."""
    case = Case(*name.split("-"))
    return tune_solver(Model(case), steps=TUNED, end=case.end, seed=1000)


def ends(case: Case, calls: int, name: str) -> Tensor:
    """The ends x / alpha of one configuration."""
    if not name.startswith("tuned"):
        return OURS[name](case, calls)
    solver = tuned(case.name)
    return flow(case, calls, solver, solver.grid)


def strays(case: Case, calls: int, name: str) -> tuple[int, float]:
    """How many end elsewhere, and their part of the summed squared error."""
    assert isinstance(case.score, GaussianMixture)
    alpha = float(case.sde.alpha(case.end))
    y = ends(case, calls, name)
    home, there = (
        case.score.posterior(alpha * v, case.end).argmax(1) for v in (case.reference, y)
    )
    lost, square = home != there, (y - case.reference).square().flatten(1).sum(1)
    return int(lost.sum()), float(square[lost].sum() / square.sum())


def measure(problem: str, names: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """name -> calls -> share of all trajectories, and of the error, over both ranges."""
    cases = [Case(problem, kind) for kind in RANGES]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in names:
        row = found.setdefault(name, {})
        for calls in TUNED if name.startswith("tuned") else CALLS:
            counts, parts = zip(*(strays(case, calls, name) for case in cases), strict=True)
            n = sum(len(case.y) for case in cases)
            row[str(calls)] = sum(counts) / n, sum(parts) / len(parts)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two problems, nothing tuned")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    held = [name for name, problem in PROBLEMS.items() if problem.group in ("held out", "new")]
    problems = args.problems or (["rough", "tree"] if args.quick else held)
    names = [name for name in NAMES if not (args.quick and "tuned" in name)]
    results: dict[str, Any] = {p: measure(p, names) for p in tqdm(problems, desc="problems")}
    for problem, found in results.items():
        print(
            f"\n{problem}: trajectories that end in another mode (their part of the squared error)"
        )
        shown = [str(n) for n in CALLS]
        rows = [
            [name, *("{:.1%} ({:.2f})".format(*row[n]) if n in row else "" for n in shown)]
            for name, row in found.items()
        ]
        _report.table(["configuration", *(f"{n} calls" for n in CALLS)], rows)
    content = {"share of trajectories, part of the squared error": results, "calls": CALLS}
    stem = HERE / "results" / f"strays{'_quick' if args.quick else ''}"
    _report.write_json(stem.with_suffix(".json"), {**content, "versions": _report.versions()})


if __name__ == "__main__":
    main()
