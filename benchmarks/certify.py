"""Which solver is of which order? Measures every solver and writes docs/solvers.md.

Every number is deterministic: exact scores, seeded noise, and for the law no Monte Carlo at all
(a sampler of Gaussian data is an affine map of its draws, so unit impulses give its law exactly).

    python benchmarks/certify.py            measure, write docs/solvers.md
    python benchmarks/certify.py --check    measure, fail if the page says otherwise
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import sde_gen as sg
from sde_gen import grids, solvers
from sde_gen.solvers import Exponential, Leap, Spectral

PAGE = Path(__file__).parents[1] / "docs" / "solvers.md"
F64 = torch.float64
VP = sg.VP()
MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]], dtype=F64)
MIXTURE = sg.GaussianMixture(VP, torch.tensor([0.2, 0.3, 0.5]), MEANS, 0.2)
START, END = 1.0, 0.01


@dataclass(frozen=True)
class Entry:
    """A solver, how it is written, where it comes from, and where its asymptote is measured.

    ``ode``, ``weak`` and ``strong`` are the steps of the finest of two grids. With ``matrix`` VP
    is written with matrices -1/2 beta 1 and sqrt(beta) 1, for solvers of such processes alone.
    """

    name: str
    solver: sg.Solver
    source: str
    ode: int = 640
    weak: int = 320
    strong: int = 512
    matrix: bool = False

    def sde(self, k: int) -> sg.SDE:
        """VP on states (B, k)."""
        return matrix_vp(k) if self.matrix else VP


@lru_cache
def matrix_vp(k: int) -> sg.SDE:
    """VP with coefficients that are matrices (k, k)."""
    one = torch.eye(k, dtype=F64)
    return sg.MatrixOrnsteinUhlenbeck((-one / 2).tolist(), one.tolist(), sg.schedules.Linear())


DESIGN = "[design](design.md)"
ENTRIES = [
    Entry("EulerMaruyama()", sg.EulerMaruyama(), "Maruyama 1955"),
    Entry("Heun()", sg.Heun(), "Kloeden & Platen 1992"),
    Entry("RungeKutta()", sg.RungeKutta(), "Kutta 1901", ode=320),
    Entry("RungeKutta(5)", sg.RungeKutta(5), "Dormand & Prince 1980", ode=640),
    Entry("SRA()", sg.SRA(), "Roessler 2010, SRA1"),
    Entry("Exponential(1), ddim(), ddpm()", Exponential(1), "Song et al. 2021; Ho et al. 2020"),
    Entry("Exponential(2)", Exponential(2), "Lu et al. 2022; Xue et al. 2023"),
    Entry("Exponential(3)", Exponential(3), "Xue et al. 2023"),
    Entry("dpm_solver_pp(2)", solvers.dpm_solver_pp(2), "Lu et al. 2022, algorithm 2"),
    Entry("dpm_solver(3)", solvers.dpm_solver(3), "Lu et al. 2022a, multistep"),
    Entry("deis(3)", solvers.deis(3), "Zhang & Chen 2023, rho-AB"),
    Entry("unipc(2)", solvers.unipc(2), "Zhao et al. 2023"),
    Entry("unipc(3)", solvers.unipc(3), "Zhao et al. 2023", ode=1280),
    Entry(
        "Exponential(1, C, corrector=True)",
        Exponential(1, 0.4, corrector=True),
        DESIGN,
    ),
    Entry(
        "Exponential(2, C, corrector=True)",
        Exponential(2, 0.4, corrector=True),
        DESIGN,
        weak=640,  # the error changes its sign at 80 steps
    ),
    Entry(
        "Exponential(3, C, corrector=True, weights=Spectral(v, n))",
        Exponential(3, 0.4, corrector=True, weights=Spectral(0.4, 2)),
        DESIGN,
        ode=1280,
    ),
    Entry("Leap(2, C, corrector=True)", Leap(2, 0.4, corrector=True), DESIGN, weak=640),
    Entry(
        "Propagator(2, C)",
        sg.Propagator(2, 0.4),
        DESIGN,
        ode=320,
        strong=128,
        matrix=True,
    ),
    Entry("Churn()", sg.Churn(), "Karras et al. 2022, algorithm 2"),
    Entry(
        "Churn(RungeKutta())", sg.Churn(sg.RungeKutta()), "Karras et al. 2022", ode=320, weak=160
    ),
    Entry(
        "PredictorCorrector(reference=C)",
        sg.PredictorCorrector(reference=0.4),
        "Song et al. 2021, algorithm 4",
        weak=640,
    ),
    Entry("Adaptive()", sg.Adaptive(), "Dormand & Prince 1980; Gustafsson 1991"),
    Entry('TorchSDE("euler")', sg.TorchSDE("euler"), "torchsde"),
    Entry('TorchSDE("heun")', sg.TorchSDE("heun"), "torchsde"),
    Entry('TorchSDE("midpoint")', sg.TorchSDE("midpoint"), "torchsde"),
    Entry('TorchSDE("srk")', sg.TorchSDE("srk"), "torchsde; Roessler 2010"),
]


class Counted(sg.Score):
    """A score that counts its calls, and the samples in them."""

    def __init__(self, score: sg.Score) -> None:
        self.score, self.sde, self.calls, self.samples = score, score.sde, 0, 0

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        self.calls += 1
        self.samples += len(x)
        return self.score(x, t)


@lru_cache
def flow_problem() -> tuple[sg.Reverse, Tensor, Tensor]:
    """The flow, 48 starting points, and where it takes them."""
    flow = VP.probability_flow(MIXTURE)
    x = torch.randn(48, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    return flow, x, sg.solve(flow, x, [START, END], sg.SciPy("DOP853", 1e-12, 1e-13))


def ode_order(entry: Entry) -> float:
    """Slope of the endpoint error on the probability flow of a 2-D mixture of three modes."""
    if entry.solver.own_steps:
        return adaptive_order(type(entry.solver))
    _, x, exact = flow_problem()
    flow = entry.sde(2).probability_flow(MIXTURE)

    def error(n: int) -> float:
        return float(
            (sg.solve(flow, x, grids.log_snr(VP, n, START, END), entry.solver) - exact).norm()
        )

    return math.log2(error(entry.ode // 2) / error(entry.ode))


def adaptive_order(kind: Callable[[float, float], sg.Solver]) -> float:
    """Slope of the endpoint error over the mean calls of a sample, tolerances 1e-7 and 1e-10."""
    _, x, exact = flow_problem()
    found = []
    for tolerance in (1e-7, 1e-10):
        score = Counted(MIXTURE)
        y = sg.solve(VP.probability_flow(score), x, [START, END], kind(tolerance, tolerance))
        found.append((score.samples, float((y - exact).norm())))
    (few, coarse), (many, fine) = found
    return math.log(coarse / fine) / math.log(many / few)


def affine_variance(entry: Entry, n: int, v: float) -> float:
    """Variance of the output at eta = 1 for data N(0, v), exactly, by unit impulses."""
    score = sg.Gaussian(VP, torch.zeros(1, dtype=F64), math.sqrt(v))
    start = math.sqrt(float(VP.alpha(START)) ** 2 * v + float(VP.sigma(START)) ** 2)

    class Impulses(sg.Impulses):
        def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
            self.draws = max(self.draws, 2)
            return super().__call__(x, t, s, k)

    x = torch.zeros(3 * n + 3, 1, dtype=F64)
    x[1] = start
    process = entry.sde(1).reverse(score)
    y = sg.solve(process, x, grids.log_snr(VP, n, START, END), entry.solver, Impulses())
    return float((y[1:] - y[0]).square().sum())


def weak_order(entry: Entry) -> tuple[float, float]:
    """Slope of the error of the variance at eta = 1, and its relative size at 40 steps."""
    v = 0.25
    exact = float(VP.alpha(END)) ** 2 * v + float(VP.sigma(END)) ** 2
    errors = {
        n: abs(affine_variance(entry, n, v) / exact - 1) for n in (40, entry.weak // 2, entry.weak)
    }
    slope = math.log2(errors[entry.weak // 2] / errors[entry.weak])
    return slope, errors[40]


class Nested(sg.Noise):
    """One path for every grid: increments and areas of coarse steps are sums of fine ones."""

    def __init__(self, times: Tensor, seed: int = 0) -> None:
        self.index = {round(float(t), 14): i for i, t in enumerate(times)}
        self.times, self.seed, self.cache = times, seed, {}

    def _fine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = tuple(x.shape)
        if key not in self.cache:
            generator = torch.Generator().manual_seed(self.seed)
            h = self.times.diff().abs().reshape(-1, *(1,) * x.ndim)
            z = torch.randn(2, len(h), *x.shape, dtype=F64, generator=generator)
            w = h.sqrt() * z[0]
            # int (W - W_start) du over a fine step: its mean given w, plus an independent part.
            self.cache[key] = w, h * w / 2 + h * (h / 12).sqrt() * z[1]
        return self.cache[key]

    def __call__(self, x: Tensor, t: float, s: float, k: int = 0) -> Tensor:
        a, b = self.index[round(t, 14)], self.index[round(s, 14)]
        w, area = self._fine(x)
        h = abs(s - t)
        total = w[a:b].sum(0)
        if k == 0:
            return total / math.sqrt(h)
        fine = self.times.diff().abs()[a:b].reshape(-1, *(1,) * x.ndim)
        integral = (area[a:b] + (w[a:b].cumsum(0) - w[a:b]) * fine).sum(0)
        # What of the area the increment does not say, as a standard normal.
        return (integral / h - total / 2) / math.sqrt(h / 12)

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def rows(self, index: slice | Tensor) -> Nested:
        raise TypeError("one batch only")


@lru_cache
def path_problem(n: int) -> tuple[sg.Reverse, Tensor, Tensor, Nested, Tensor]:
    """A process, 64 starting points, the finest grid, its noise, and the ends of the paths."""
    fine = grids.log_snr(VP, n, START, 0.05)
    noise = Nested(fine)
    score = sg.GaussianMixture(VP, torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [0.7]]), 0.4)
    process = VP.reverse(score)
    x = torch.randn(64, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    return process, x, fine, noise, sg.solve(process, x, fine, solvers.TorchSDE("srk"), noise)


def strong_order(entry: Entry) -> float:
    """Slope of the root mean square distance of paths at eta = 1 from a path 8 times finer."""
    n = entry.strong
    reverse, x, fine, noise, exact = path_problem(8 * n)
    process = entry.sde(1).reverse(reverse.score)

    def error(m: int) -> float:
        y = sg.solve(process, x, fine[:: 8 * n // m], entry.solver, noise)
        return float((y - exact).square().mean().sqrt())

    return math.log2(error(n // 4) / error(n)) / 2


def takes(entry: Entry) -> str:
    """Which kinds of process the solver accepts."""
    target = sg.Gaussian(VP, torch.zeros(2, dtype=F64))
    kinds: dict[str, sg.SDE] = {
        "SDE": VP,
        "reversal": VP.reverse(MIXTURE),
        "flow": VP.probability_flow(MIXTURE),
        "Langevin": sg.Langevin(target),
        "matrix reversal": matrix_vp(2).reverse(MIXTURE),
        "matrix flow": matrix_vp(2).probability_flow(MIXTURE),
    }
    accepted = []
    for name, process in kinds.items():
        with suppress(TypeError):
            entry.solver.check(process)
            accepted.append(name)
    return "everything" if len(accepted) == len(kinds) else ", ".join(accepted)


def calls_a_step(entry: Entry) -> float:
    """Score evaluations over 10 steps of the flow, divided by 10."""
    score = Counted(MIXTURE)
    x = torch.zeros(1, 2, dtype=F64)
    sg.solve(entry.sde(2).probability_flow(score), x, grids.log_snr(VP, 10), entry.solver)
    return score.calls / 10


def depends_on_the_batch(entry: Entry) -> float:
    """Largest change of a sample when it is computed alone, over the size of the batch."""
    eta = 0.0 if entry.solver.weak is None else 1.0
    process = entry.sde(2).reverse(MIXTURE, eta)
    x = torch.randn(16, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    times = grids.log_snr(VP, 12)
    together = sg.solve(process, x, times, entry.solver, sg.Streams(5))
    alone = sg.solve(process, x[7:8], times, entry.solver, sg.Streams(5, samples=7))
    return float((together[7:8] - alone).abs().max())


def ode_cell(entry: Entry) -> str:
    """Declared and measured order on a probability flow."""
    if isinstance(entry.solver, sg.PredictorCorrector):  # it adds noise there
        return ""
    return f"{entry.solver.order} ({ode_order(entry):.1f})"


def weak_cells(entry: Entry) -> list[str]:
    """Declared and measured weak order, and the law at 40 steps."""
    if entry.solver.weak is None:
        return ["", ""]
    if entry.solver.own_steps:  # its path is not made of one impulse a step
        return [f"{entry.solver.weak}", ""]
    slope, error = weak_order(entry)
    return [f"{entry.solver.weak} ({slope:.1f})", f"{error:.1e}"]


def strong_cell(entry: Entry) -> str:
    """Declared and measured strong order."""
    if entry.solver.strong is None:
        return ""
    declared = f"{entry.solver.strong:g}"
    return declared if entry.solver.own_steps else f"{declared} ({strong_order(entry):.1f})"


def measure(entry: Entry) -> list[str]:
    """The cells of a solver, of all tables."""
    # Matrix products of another shape may round differently: exact to rounding is what is asked.
    if not depends_on_the_batch(entry) < 1e-12:
        raise AssertionError(f"{entry.name}: a sample depends on its batch")
    orders = [ode_cell(entry), *weak_cells(entry), strong_cell(entry)]
    return [f"`{entry.name}`", f"{calls_a_step(entry):g}", takes(entry), entry.source, *orders]


HEADER = [
    "solver",
    "calls a step",
    "takes",
    "source",
    "ODE order",
    "weak order",
    "law at 40 steps",
    "strong order",
]
USES, ORDERS = [0, 1, 2, 3], [0, 4, 5, 6, 7]
"""The columns of the two tables: so each fits on a telephone."""

TEXT = """# Solvers

Which solver to take is a question of its own: [choosing a sampler](choosing.md). Here stand all
of them, with what they take, and with the orders that were measured against exact answers.

## What they take

An SDE running forward, a reversal with $\\eta>0$, a flow ($\\eta=0$), a Langevin process, and the
reversals and flows of processes with matrices. Where a method has `C` it is the variance of the
data. `SciPy(method)` runs any flow with scipy's own error control, one step size for the batch;
with all others no sample depends on its batch. A flow that starts inside (0, T) in short
steps makes p - 2 calls more in its first step (`solver.start_calls`), where it interpolates p > 2
values.

{uses}

## Orders

Declared, and in brackets measured. Where a solver chooses its own steps the order is the slope
over its calls; its order on paths and in law is tested elsewhere. Orders above 4 end in rounding
before they settle. Here `C` is 0.4.

{orders}

- **ODE order**: on the probability flow of a mixture of three modes in two dimensions, VP, $t$
  from 1 to 0.01, on a log-SNR grid; the slope of the error over the last doubling of the steps.
- **weak order**: at $\\eta=1$ for data $\\mathcal N(0,\\tfrac14)$: the slope of the error of the
  variance of the output, exact by unit impulses. *Law at 40 steps* is that error relative to the
  variance. Runs start in the law of $t=1$; from any other start `Churn` has the law to order 1
  alone. The drift is linear here: on other data `TorchSDE("midpoint")` has the 1 that it
  declares.
- **strong order**: at $\\eta=1$ on a mixture in one dimension, one Brownian path for all grids.

*For maintainers:* this page is written by `benchmarks/certify.py`, which measures all of it; a
test fails where it says something else.
"""


def table(rows: list[list[str]], columns: list[int]) -> str:
    """Some columns of all rows."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line[k] for k in columns)} |" for line in lines)


def page(rows: list[list[str]]) -> str:
    """The whole page."""
    return TEXT.replace("{uses}", table(rows, USES)).replace("{orders}", table(rows, ORDERS))


def differences(old: str, rows: list[list[str]]) -> list[str]:
    """What the page says otherwise than the measurement; measured numbers may differ by 0.15."""
    found: dict[str, list[str]] = {}
    for row in filter(None, map(cells, old.splitlines())):
        found.setdefault(row[0], []).extend(row[len(found.get(row[0], [])) > 0 :])
    wrong = [f"{name}: no longer measured" for name in found.keys() - {r[0] for r in rows}]
    for row in rows:
        if len(found.get(row[0], [])) != len(row):
            wrong.append(f"{row[0]}: not on the page, or not in both tables")
            continue
        for title, a, b in zip(HEADER, found[row[0]], row, strict=True):
            if not same(title, a, b):
                wrong.append(f"{row[0]}, {title}: the page says {a}, measured {b}")
    return wrong


def cells(line: str) -> list[str]:
    """The cells of a row of a table, [] for any other line."""
    return [c.strip() for c in line[1:-1].split("|")] if line.startswith("| `") else []


def same(title: str, a: str, b: str) -> bool:
    """Whether two cells agree, numbers to what another machine's rounding may change."""
    if title.startswith("law") and a and b:
        return abs(float(a) / float(b) - 1) < 0.05
    if title.endswith("order") and "(" in a and "(" in b:
        (declared, measured), (now, then) = (c.rstrip(")").split(" (") for c in (a, b))
        return declared == now and abs(float(measured) - float(then)) < 0.15
    return a == b


def main() -> None:
    """Measure; write the page or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if docs/solvers.md is stale")
    parser.add_argument("--quick", action="store_true", help="the same: it takes half a minute")
    parser.add_argument("--only", default="", help="solvers whose name matches this expression")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [e for e in ENTRIES if re.search(args.only, e.name)]
    rows = [measure(entry) for entry in tqdm(chosen, desc="solvers")]
    print(page(rows))
    if args.check:
        wrong = differences(PAGE.read_text(encoding="utf-8"), rows)
        sys.exit("\n".join(["docs/solvers.md is stale:", *wrong]) if wrong else 0)
    if not args.only:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
