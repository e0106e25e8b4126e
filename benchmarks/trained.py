"""Trained networks: how far from the end of their own flow are samplers after 5, 10 and 20 calls?

``error_vs_calls.py`` on the flow of a network in place of an exact score: networks are rougher.
Every sampler starts at the same states at T, asks the network at exactly the levels that it
assumes, and ends at t = 0.001; the error of a trajectory is its RMS distance from a fine solution
of the same flow, and a cell says the root mean square over trajectories and their median. The
peers are the 18 configurations that were best on some problem of ``error_vs_calls.py``.

    python benchmarks/trained.py                       the network of the demo, trained now
    python benchmarks/trained.py digits=DIR mnist=DIR  networks in folders, trained on VP
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import _peers
import _report
import torch
from _problems import F64, HERE, Case
from torch import Tensor
from tqdm.auto import tqdm
from trained_digits import network

from sde_gen import Exponential, ScoreNetwork, Solver, Streams, grids, solve, tune_solver
from sde_gen.sampling import default_solver
from sde_gen.scores import Score
from sde_gen.training import load
from sde_gen.tuning import ROWS

CALLS = (5, 10, 20)
PEERS = [
    *(f"azula {f} {g}" for f in ("vAB-2", "vAB-3", "zEAB-3", "xEAB-3") for g in ("Rect", "VE")),
    *(f"diffusers {f} {g}" for f in ("UniPC-3", "DPM++2M") for g in ("Rect", "K7", "exp")),
    *(f"diffusers iPNDM {g}" for g in ("Rect", "exp")),
    *("diffusers UniPC-2 Rect", "diffusers DEIS-3 exp"),
]
FINE = 200


class Network(Case):
    """The case of a trained network on its own process, in the precision of its weights."""

    def __init__(self, name: str, net: ScoreNetwork, n: int, seed: int = 0) -> None:
        self.problem, self.range, self.seed, self.end = name, "vp", seed, 1e-3
        self.sde, self.calls, self.rows, self.net = net.sde, 0, 0, net
        classes = getattr(net.net, "classes", None)
        self.score: Any = net.given(y=torch.arange(n) % classes) if classes else net
        self.s_max, self.s_min = (self.level(t) for t in (self.sde.T, self.end))
        z = Streams(seed).start(torch.empty(n, *net.facts.shape or (), dtype=F64))
        self.x = float(self.sde.sigma(self.sde.T)) * z
        self.y = self.x / float(self.sde.alpha(self.sde.T))

    def denoise(self, y: Tensor, s: Tensor | float) -> Tensor:
        self.count(y)
        t = self.sde.time_at(-2 * torch.log(torch.as_tensor(s, dtype=F64)))
        t = t.clamp(self.end, self.sde.T)
        with torch.no_grad():
            x = (self.sde.alpha(t) * y.double()).to(next(self.net.parameters()).dtype)
            return self.score.denoise(x, t).double()

    def tuned(self, n: int, minutes: float) -> Solver:
        """What is tuned on other trajectories, in so many minutes."""
        classes = getattr(self.net.net, "classes", None)
        model = self.net.given(y=torch.arange(ROWS * n) % classes) if classes else self.net
        return tune_solver(model, steps=CALLS, n=n, end=self.end, seed=1000, minutes=minutes)


class Counted(Score):
    """What sde_gen is given: the network, and the standard deviation of its data."""

    def __init__(self, case: Network) -> None:
        self.case, self.sde, self.facts = case, case.sde, case.net.facts.of_another_law()

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        alpha, sigma = (float(f(t)) for f in (self.sde.alpha, self.sde.sigma))
        return (alpha * self.case.denoise(x / alpha, sigma / alpha) - x) / sigma**2


def ours(case: Network, calls: int, solver: Solver | None = None) -> Tensor:
    """sde_gen's default, or what was tuned, from x to x / alpha."""
    model = Counted(case)
    if solver is None or solver.grid is None:
        times = grids.default(case.sde, calls, end=case.end, data_std=model.facts.std)
    else:
        times = solver.grid(case.sde, calls, end=case.end)
    process = case.sde.probability_flow(model)
    return solve(process, case.x, times, solver or default_solver(model)) / case.sde.alpha(
        case.end
    )


def fine(case: Network, steps: int) -> Tensor:
    """The end of the flow, by many steps even in log(sigma / alpha)."""
    model = Counted(case)
    times = grids.log_snr(case.sde, steps, end=case.end)
    solver = Exponential(3, model.facts.std**2, corrector=True)
    return solve(case.sde.probability_flow(model), case.x, times, solver) / case.sde.alpha(
        case.end
    )


def errors(y: Tensor, exact: Tensor) -> list[float]:
    """Root mean square over trajectories, and the median of them."""
    e = (y - exact).flatten(1).square().mean(1).sqrt()
    return [float(f"{v:.3g}") for v in (float(e.square().mean().sqrt()), float(e.median()))]


def measure(case: Network, args: argparse.Namespace) -> dict[str, Any]:
    """Errors of everyone for each number of calls, and what tuning cost."""
    exact, began = fine(case, FINE), time.process_time()
    tuned = case.tuned(args.n_tune, args.minutes)
    seconds = time.process_time() - began
    print(f"{case.problem}: tuned in {seconds:.0f} s of CPU time\n{tuned}", flush=True)
    table = _peers.table()
    runs: dict[str, _peers.Run] = {
        "sde_gen default": ours,
        "sde_gen tuned": lambda c, n: ours(c, n, tuned),  # type: ignore[arg-type]
        **{name: table[name] for name in PEERS},
    }
    rows: dict[str, dict[str, list[float]]] = {}
    for name, run in tqdm(runs.items(), case.problem):
        rows[name] = {}
        for n in CALLS:
            case.calls = 0
            y = run(case, n)
            assert y is not None
            assert case.calls == n, f"{name} made {case.calls} calls of {n}"
            rows[name][str(n)] = errors(y, exact)
    counted = {"trajectories": len(case.x), "threads": torch.get_num_threads()}
    return {**counted, "tuning, CPU seconds": round(seconds), "errors": rows}


def best(rows: dict[str, Any], n: int, kind: int) -> tuple[float, str]:
    """The lowest error of a peer, and whose it is."""
    return min((rows[name][str(n)][kind], name) for name in PEERS)


def show(name: str, found: dict[str, Any]) -> None:
    """A line a number of calls: the best of 18, and sde_gen in its units."""
    rows = found["errors"]
    lines = []
    for n in CALLS:
        for kind, what in enumerate(("RMSE", "median")):
            e, who = best(rows, n, kind)
            mine = (rows[f"sde_gen {k}"][str(n)][kind] for k in ("default", "tuned"))
            lines.append(
                [str(n), what, f"{e:.3g}", who, *(f"{m:.3g} ({m / e:.2f})" for m in mine)]
            )
    print(f"\n{name}, {found['trajectories']} trajectories: error (/ best of {len(PEERS)} peers)")
    _report.table(["calls", "", "best peer", "which", "default", "tuned"], lines)


def draw(results: dict[str, Any]) -> None:
    """Error against calls, a panel a network and kind."""
    fig, axes = _report.panels(2 * len(results), columns=2)
    for i, (name, found) in enumerate(results.items()):
        rows = found["errors"]
        for kind, what in enumerate(("root mean square", "median")):
            ax = axes[2 * i + kind]
            for peer in PEERS:
                values = [rows[peer][str(n)][kind] for n in CALLS]
                ax.plot(CALLS, values, color="0.8", lw=0.8)
            values = [best(rows, n, kind)[0] for n in CALLS]
            ax.plot(CALLS, values, color="0.35", lw=1.5, label=f"best of {len(PEERS)} peers")
            for color, key in zip(_report.COLORS, ("default", "tuned"), strict=False):
                values = [rows[f"sde_gen {key}"][str(n)][kind] for n in CALLS]
                ax.plot(CALLS, values, "o-", ms=3, color=color, lw=1.5, label=f"sde_gen {key}")
            top = math.log10(max(rows["azula vAB-2 Rect"]["5"][kind] * 3, 1e-3))
            ax.set(xscale="log", yscale="log", title=f"{name}, {what}")
            ax.set_ylim(top=10**top)
            _report.call_ticks(ax, CALLS)
    path = HERE / "results" / "trained.png"
    _report.finish(fig, axes, "network calls", "error of a trajectory", path)


def main() -> None:
    """Measure, print, write; of named networks those measured before are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", help="NAME=DIR of trained networks")
    parser.add_argument("--n", type=int, default=48, help="trajectories that are judged")
    parser.add_argument("--n-tune", type=int, default=128, help="in each set of the tuning")
    parser.add_argument("--minutes", type=float, default=1.0, help="of tuning")
    parser.add_argument("--quick", action="store_true", help="6 seconds of training, few states")
    args = parser.parse_args()
    if args.quick:
        args.n, args.n_tune, args.minutes = 8, 8, 0.1
    pairs = [item.split("=", 1) for item in args.models]
    nets = {name: load(folder) for name, folder in pairs}
    nets = nets or {"digits": network(0.1 if args.quick else 1.25)}
    path = HERE / "results" / "trained.json"
    known = json.loads(path.read_text())["networks"] if path.exists() and args.models else {}
    results: dict[str, Any] = known
    for name, net in nets.items():
        results[name] = measure(Network(name, net, args.n), args)
        show(name, results[name])
    draw(results)
    content = {"networks": results, "versions": _report.versions()}
    _report.write_json(path, content)


if __name__ == "__main__":
    main()
