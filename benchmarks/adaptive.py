"""Adaptive steps: calls against error, and does a sample depend on its neighbours?

Each solver runs over a ladder of tolerances on the exact probability flow. *Calls* are network
evaluations a sample: where samples leave the batch as they arrive, the rows evaluated over the
batch size, beside *rounds*, the number of batched calls. Errors are endpoint RMSEs against the
reference flow. Then the first samples of the batch are solved again beside other neighbours, at
rtol 1e-3, and the largest change is printed, in units of the data.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import _peers
import _report
import torch
from _problems import HERE, PROBLEMS, RANGES, Case, Model, errors
from torch import Tensor
from tqdm.auto import tqdm

from sde_gen import SciPy, Solver, solve
from sde_gen.solvers.adaptive import Adaptive

TARGETS = (1e-2, 1e-3, 1e-4, 1e-5)
KEPT = 32
"""Samples that are solved again beside other neighbours."""


def ours(case: Case, rtol: float, make: Callable[[float], Solver]) -> Tensor:
    """sde_gen's loop from the first noise level to the last."""
    times = torch.tensor([case.sde.T, case.end], dtype=torch.float64)
    process = case.sde.probability_flow(Model(case))
    return solve(process, case.x, times, make(rtol)) / case.sde.alpha(case.end)


def k_adaptive(case: Case, rtol: float) -> Tensor:
    """k-diffusion's DPM-Solver-12/23 with one step size for the batch."""
    sampler = _peers.k_sampling().sample_dpm_adaptive

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return case.denoise(x, sigma[0])

    return sampler(model, case.y, case.s_min, case.s_max, rtol=rtol, atol=rtol / 6, disable=True)


def dopri5(case: Case, rtol: float) -> Tensor:
    """torchdiffeq's dopri5 in log sigma."""
    from torchdiffeq import odeint

    def rate(t: Tensor, y: Tensor) -> Tensor:
        return y - case.denoise(y, float(t.exp()))

    ends = torch.tensor([case.s_max, case.s_min], dtype=torch.float64).log()
    return odeint(rate, case.y, ends, rtol=rtol, atol=rtol, method="dopri5")[-1]


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "sde_gen Adaptive": partial(ours, make=lambda rtol: Adaptive(rtol, rtol)),
    "scipy RK45 (sde_gen's back end)": partial(ours, make=lambda r: SciPy("RK45", r, r)),
    "scipy RK45 in sigma": lambda case, rtol: _peers.scipy(case, 0, "RK45", "plain", rtol),
    "scipy RK45 in log sigma": lambda case, rtol: _peers.scipy(case, 0, "RK45", "log", rtol),
    "torchdiffeq dopri5": dopri5,
    "k-diffusion DPM-adaptive": k_adaptive,
}


def ladder(case: Case, run: Callable[..., Tensor], powers: list[float]) -> list[dict[str, float]]:
    """Calls, rounds and error over tolerances."""
    rows = []
    for power in powers:
        case.calls = case.rows = 0
        rmse, trimmed = errors(run(case, 10**-power), case.reference)
        rows.append(
            {
                "rtol": 10**-power,
                "calls": case.rows / len(case.y),
                "rounds": case.calls,
                "rmse": rmse,
                "best 95 %": trimmed,
            }
        )
    return rows


def moved(case: Case, run: Callable[..., Tensor]) -> float:
    """Largest change of the first samples when they are solved among others."""
    whole = run(case, 1e-3)[:KEPT]
    part = Case(case.problem, case.range, case.seed)
    part.x, part.y = part.x[:KEPT], part.y[:KEPT]
    return float((run(part, 1e-3) - whole).abs().max())


def calls_for(rows: list[dict[str, float]], target: float, which: str) -> float:
    """Calls at which the error falls to a target: log-log interpolation, nan outside."""
    points = sorted((math.log(r[which]), math.log(r["calls"])) for r in rows)
    t = math.log(target)
    for (e_0, c_0), (e_1, c_1) in pairwise(points):
        if e_0 <= t <= e_1:
            return math.exp(c_0 + (c_1 - c_0) * (t - e_0) / max(e_1 - e_0, 1e-12))
    return math.nan


def redraw(path: Any) -> None:
    """The figure again, from the JSON file."""
    known = json.loads(path.with_suffix(".json").read_text())
    draw({k: v for k, v in known.items() if k != "versions"}, path)


def draw(results: dict[str, Any], path: Any) -> None:
    """Error against calls, a panel a case."""
    fig, axes = _report.panels(len(results))
    for ax, (name, known) in zip(axes, results.items(), strict=True):
        for color, (key, rows) in zip(_report.COLORS, known["ladders"].items(), strict=False):
            calls, rmse = ([r[k] for r in rows] for k in ("calls", "best 95 %"))
            width = 2 if key.startswith("sde_gen") else 1.2
            ax.plot(calls, rmse, "o-", ms=3, lw=width, color=color, label=key)
        ax.set(xscale="log", yscale="log", title=name)
        _report.call_ticks(ax, (10, 20, 50, 100, 200, 500))
        ax.set_ylim(1e-7, 1)
    _report.finish(fig, axes, "network calls a sample", "endpoint RMSE, best 95 %", path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one case, four tolerances")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS))
    parser.add_argument("--ranges", nargs="+", choices=list(RANGES), default=list(RANGES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.problems or (["rough"] if args.quick else ["grid25", "digits", "spiral"])
    powers = [1.0, 2.0, 3.0, 4.0] if args.quick else [0.5 * k for k in range(1, 13)]
    results: dict[str, Any] = {}
    pairs = [(p, r) for p in names for r in (args.ranges[:1] if args.quick else args.ranges)]
    for problem, kind in pairs:
        case = Case(problem, kind)
        bar = tqdm(SOLVERS.items(), desc=case.name)
        results[case.name] = {
            "ladders": {key: ladder(case, run, powers) for key, run in bar},
            "moved": {key: moved(case, run) for key, run in SOLVERS.items()},
        }
    for name, known in results.items():
        print(f"\n{name}: calls a sample for an endpoint RMSE of the best 95 %")
        _report.table(
            ["solver", *(f"{t:.0e}" for t in TARGETS), "moved by its neighbours"],
            [
                [
                    key,
                    *(f"{calls_for(rows, t, 'best 95 %'):.0f}" for t in TARGETS),
                    f"{known['moved'][key]:.0e}",
                ]
                for key, rows in known["ladders"].items()
            ],
        )
    stem = HERE / "results" / f"adaptive{'_quick' if args.quick else ''}"
    draw(results, stem.with_suffix(".png"))
    _report.write_json(stem.with_suffix(".json"), {**results, "versions": _report.versions()})


if __name__ == "__main__":
    main()
