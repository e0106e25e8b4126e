"""How many calls until a stochastic sampler's output cannot be told from the exact law?

Every sampler starts from the exact law at the first noise level and ends at the last one, where
the exact law is known: a problem's own marginal. The distance is sliced Wasserstein-2 (512
directions) between n outputs and n exact samples, and the energy distance on a part of them. The
*floor* is the same between fresh exact samples and those. Each cell is repeated over seeds
(starting points, noise, exact set), so mean and standard deviation over seeds are given: a sampler
is at the floor when its mean lies within two standard errors of the floor's, or below it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _peers
import _report
import torch
from _problems import F64, HERE, PROBLEMS, RANGES, Case, Model, Problem, problems
from matplotlib.ticker import LogFormatterSciNotation, LogLocator
from torch import Tensor
from tqdm.auto import tqdm

from sde_gen import Exponential, Gaussian, LinearSDE, Solver, Streams, grids, solve
from sde_gen.metrics import energy_distance
from sde_gen.sampling import default_solver

CALLS = (10, 20, 50)
SAMPLES = {"digits": 5000, "patches": 4000}
ENERGY = 2000
RAW = HERE / "results" / "law_vs_calls"
Run = Callable[[Case, int, int], Tensor]


# --- sde_gen: a name, and a function of the case, the calls and the seed -----------------------


def ours(
    case: Case, calls: int, seed: int, solver: Solver | None = None, covariance: bool = False
) -> Tensor:
    """``solve`` on the reversal with eta = 1; by default with the library's defaults."""
    model = Model(case, covariance)
    times = grids.default(case.sde, calls, end=case.end, data_std=model.facts.std)
    solver = solver or default_solver(model, eta=1.0)
    process = case.sde.reverse(model, eta=1.0)
    return solve(process, case.x, times, solver, Streams(20_000 + seed)) / case.sde.alpha(case.end)


OURS: dict[str, Run] = {
    "DDPM": lambda c, n, s: ours(c, n, s, Exponential(1)),
    "SDE-DPM-Solver++": lambda c, n, s: ours(c, n, s, Exponential(2)),
    "std, no corrector": lambda c, n, s: ours(c, n, s, Exponential(2, c.variance)),
    "default (std)": ours,
    "covariance": lambda c, n, s: ours(c, n, s, covariance=True),
}


# --- peers ------------------------------------------------------------------------------------


def _azula(case: Case, calls: int, seed: int, name: str, grid: str, **more: Any) -> Tensor:
    from azula import sample

    denoiser = _peers._azula_denoiser(case, grid)
    sampler = getattr(sample, name + "Sampler")(
        denoiser, steps=calls, silent=True, dtype=F64, **more
    )
    alpha = denoiser.schedule(torch.ones((), dtype=F64))[0]
    return sampler(case.y * alpha) / denoiser.schedule(torch.zeros((), dtype=F64))[0]


def _diffusers(case: Case, calls: int, seed: int, **config: Any) -> Tensor:
    return _peers.diffusers(case, calls, **config)


def _k_diffusion(case: Case, calls: int, seed: int, name: str, grid: str, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(20_000 + seed)

    def normal(*_: Any) -> Tensor:
        return torch.randn(case.y.shape, generator=generator, dtype=F64)

    run = _peers.k_diffusion(case, calls, name, grid, noise_sampler=normal, **more)
    assert run is not None
    return run


def peers() -> dict[str, Run]:
    """The stochastic samplers of the peers, each on the two grids that serve them best."""
    sde: dict[str, Any] = {
        "name": "DPMSolverMultistepScheduler",
        "prediction_type": "sample",
        "final_sigmas_type": "sigma_min",
        "algorithm_type": "sde-dpmsolver++",
    }
    sa: dict[str, Any] = {
        "name": "SASolverScheduler",
        "prediction_type": "sample",
        "tau_func": lambda t: 1.0,
    }
    table: dict[str, Run] = {}
    for grid, az in (("exp", "VE"), ("K7", "K7")):
        table[f"azula DDPM {az}"] = partial(_azula, name="DDPM", grid=az)
        table[f"diffusers SDE-DPM++2M {grid}"] = partial(
            _diffusers, grid=grid, solver_order=2, **sde
        )
        for p in (2, 3):
            table[f"diffusers SA-Solver-{p} {grid}"] = partial(
                _diffusers, grid=grid, predictor_order=p, corrector_order=p, **sa
            )
        table[f"k-diffusion DPM++3M-SDE {grid}"] = partial(
            _k_diffusion, name="dpmpp_3m_sde", grid=grid
        )
    return table


# --- measuring --------------------------------------------------------------------------------


def diagonal(sde: LinearSDE) -> Gaussian:
    """powerlaw in its eigenbasis: no sampler and no distance here can tell, and it is quick."""
    law = problems.powerlaw(sde)
    return Gaussian(sde, law.mean, law.variance.sqrt())


def exact(case: Case, n: int, seed: int) -> Tensor:
    """n exact samples at the last noise level, y = x / alpha."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    data = case.score.sample(n, generator)
    return data + case.s_min * torch.randn(data.shape, generator=generator, dtype=F64)


class Target:
    """Exact samples that outputs are compared with: sorted once in 512 directions.

    Same directions, and the same number, as ``sde_gen.metrics.sliced_wasserstein``, which would
    sort the exact samples again for each of some hundred outputs.
    """

    def __init__(self, z: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        theta = torch.randn(512, z.shape[1], generator=generator, dtype=F64)
        self.theta, self.z = theta / theta.norm(dim=1, keepdim=True), z
        self.quantiles = (self.theta @ z.T).sort(1).values

    def distances(self, y: Tensor) -> tuple[float, float]:
        """Sliced Wasserstein-2 over all samples, the energy distance over a part of them."""
        if not bool(torch.isfinite(y).all()):
            return math.inf, math.inf
        w2 = ((self.theta @ y.T).sort(1).values - self.quantiles).square().mean()
        return float(w2.sqrt()), energy_distance(y[:ENERGY], self.z[:ENERGY])


def run_case(
    problem: str, kind: str, table: dict[str, Run], calls: tuple[int, ...], seeds: int, n: int
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """name -> calls -> (sliced W2, energy distance) for each seed."""
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {k: {} for k in table}
    bar = tqdm(total=seeds * len(table), desc=f"{problem}-{kind}", leave=False)
    for seed in range(seeds):
        case = Case(problem, kind, seed, n=n)
        target = Target(exact(case, n, seed))
        for name, run in table.items():
            for k in calls:
                torch.manual_seed(1000 * seed + k)
                rows[name].setdefault(str(k), []).append(target.distances(run(case, k, seed)))
            bar.update()
    return rows


def floor(problem: str, kind: str, seeds: int, n: int) -> list[tuple[float, float]]:
    """Fresh exact sets against the sets that the samplers are compared with, 4 for each."""
    case, found = Case(problem, kind, n=2), []
    for seed in range(seeds):
        target = Target(exact(case, n, seed))
        found += [target.distances(exact(case, n, 1000 + 4 * seed + k)) for k in range(4)]
    return found


def measure(problem: str, kind: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The distances of one case, measured or remembered, and written down at once."""
    path = folder / f"{problem}-{kind}.json"
    n = args.samples or SAMPLES.get(problem, 10_000)
    known = json.loads(path.read_text()) if path.exists() else {}
    if (known.get("n"), known.get("seeds")) != (n, args.seeds):
        known = {"n": n, "seeds": args.seeds, "floor": []}
    if len(known["floor"]) != 4 * args.seeds:
        known["floor"] = floor(problem, kind, args.seeds, n)
    if args.only != "sde_gen" and (args.again or "peers" not in known):
        known["peers"] = run_case(problem, kind, peers(), args.calls, args.seeds, n)
    if args.only != "peers":
        mine = {f"sde_gen {k}": OURS[k] for k in args.ours}
        found = run_case(problem, kind, mine, args.calls, args.seeds, n)
        known["sde_gen"] = known.get("sde_gen", {}) | found
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known))
    return known


def spread(values: list[Any], which: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over seeds; 0 is sliced Wasserstein, 1 the energy distance."""
    v = torch.tensor([pair[which] for pair in values], dtype=F64)
    return float(v.mean()), float(v.std())


def at_floor(values: list[Any], ground: list[Any]) -> bool:
    """Whether the mean is within two standard errors of the floor, or below it."""
    (m, s), (m0, s0) = spread(values), spread(ground)
    return m <= m0 + 2 * math.sqrt(s**2 / len(values) + s0**2 / len(ground))


def print_case(name: str, known: dict[str, Any], calls: tuple[int, ...]) -> None:
    """sde_gen's samplers, and each peer that is the best somewhere."""
    ground = known["floor"]
    (m, s), e = spread(ground), spread(ground, 1)[0]
    print(f"\n{name}: sliced W2; * is at the floor, {m:.4f} +- {s:.4f}; energy floor {e:.1e}")
    theirs = known.get("peers", {})
    best = {k: min(theirs, key=lambda c: spread(theirs[c][str(k)])[0]) for k in calls if theirs}
    rows = []
    for key, row in [*known.get("sde_gen", {}).items(), *theirs.items()]:
        if key in theirs and key not in best.values():
            continue
        cells = []
        for k in calls:
            value, mark = spread(row[str(k)]), "*" if at_floor(row[str(k)], ground) else " "
            cells.append(f"{value[0]:.4f}{mark} ({spread(row[str(k)], 1)[0]:.0e})")
        rows.append([key, *cells])
    _report.table(["sampler (energy distance)", *(f"{k} calls" for k in calls)], rows)


def draw(results: dict[str, Any], calls: tuple[int, ...], path: Path) -> None:
    """Distance against calls over the band of the floor."""
    fig, axes = _report.panels(len(results))
    for ax, (name, known) in zip(axes, results.items(), strict=True):
        m, s = spread(known["floor"])
        ax.axhspan(m - 2 * s, m + 2 * s, color="0.88", lw=0, label="exact against exact (2 std)")
        theirs = known.get("peers", {})
        if theirs:
            best = [min(spread(row[str(k)])[0] for row in theirs.values()) for k in calls]
            ax.plot(calls, best, color="0.3", lw=1.5, label="best peer, picked per cell")
        mine = known.get("sde_gen", {}).items()
        for color, (key, row) in zip(_report.COLORS, mine, strict=False):
            mean, std = zip(*(spread(row[str(k)]) for k in calls), strict=True)
            ax.errorbar(
                calls, mean, std, fmt="o-", ms=3, lw=1.4, capsize=2, color=color, label=key
            )
        ax.set(xscale="log", yscale="log", title=name)
        _report.call_ticks(ax, calls)
        # Numbers also where no power of ten lies in the range.
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4)))
        ax.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.2, 0.5)))
    _report.finish(fig, axes, "network calls", "sliced Wasserstein-2", path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["sde_gen", "peers"], help="measure one side only")
    parser.add_argument("--again", action="store_true", help="measure stored peers again")
    parser.add_argument("--quick", action="store_true", help="one problem, 1000 samples, 2 seeds")
    problems = ["grid25", "digits", "powerlaw"]
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=problems)
    parser.add_argument("--ranges", nargs="+", choices=list(RANGES), default=list(RANGES))
    parser.add_argument("--ours", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.calls, args.samples = CALLS, None
    if args.quick:
        args.calls, args.samples, args.seeds, args.problems = (10, 20), 1000, 2, ["grid25"]
    return args


def main() -> None:
    """Measure what is not remembered, print, write."""
    args = parse()
    torch.set_num_threads(1)
    PROBLEMS["powerlaw"] = Problem(diagonal, PROBLEMS["powerlaw"].n)
    folder = RAW.with_name("law_vs_calls_quick") if args.quick else RAW
    pairs = [(p, r) for p in args.problems for r in args.ranges]
    results = {f"{p}-{r}": measure(p, r, args, folder) for p, r in tqdm(pairs, desc="cases")}
    for name, known in results.items():
        print_case(name, known, args.calls)
    draw(results, args.calls, folder.with_suffix(".png"))
    summary = {
        name: {
            "floor": spread(known["floor"]),
            **{
                key: {k: spread(v) for k, v in row.items()}
                for part in ("sde_gen", "peers")
                for key, row in known.get(part, {}).items()
            },
        }
        for name, known in results.items()
    }
    versions = _report.versions(folder.with_suffix(".json"))
    content = {"sliced W2, mean and std over seeds": summary, "versions": versions}
    _report.write_json(folder.with_suffix(".json"), content)


if __name__ == "__main__":
    main()
