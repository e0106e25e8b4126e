"""Guidance: which law is drawn from, and what it takes to draw from the one that is meant.

1. ``exact``: bias against cost on three laws in the plane that are known by quadrature: a mixture
   to the third power, a product of two mixtures, and a class that overlaps with another, guided
   with weight 2. Sliced Wasserstein-2 distance of 2,000 draws from exact ones, against the
   evaluations of the guided score a draw: the sum by its flow and with noise, with Langevin steps
   at each noise level, by what is exact for Gaussians (``Tempered``, ``Product``), and by
   ``inverse.corrected``.
2. ``gaussian``: the overshoot of a guided flow in closed form, weight by weight.
3. ``digits`` and ``mnist``: accuracy, Frechet distance (a support vector machine trained on
   real images) and coverage of a trained network's draws, against the weight, with intervals of
   the noise level, with a weaker model, with ``Product`` and with particles. Coverage (Naeem et
   al. 2020): the part of the real test images that have a draw nearer than their fifth
   neighbour among real ones.

    python benchmarks/guidance.py [--only exact gaussian digits mnist] [--digits FOLDER]
                                  [--mnist FOLDER] [--samples N] [--draw]

Without a folder the digits' network is trained as in the demo. ``--draw`` makes the figure from
the file of results alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import _report
import torch
from torch import Tensor

import sde_gen as sg
from sde_gen import data, metrics
from sde_gen.demo.judge import Judge, to_levels
from sde_gen.demo.models import train_models
from sde_gen.guidance import Interval, Product, Tempered, autoguidance
from sde_gen.inverse import corrected
from sde_gen.solvers import PredictorCorrector

HERE = Path(__file__).parent
RESULTS, FIGURE = (
    HERE / "results" / "guidance.json",
    HERE.parent / "docs" / "images" / "guidance.png",
)
F64 = torch.float64
DRAWS = 2000
STEPS = (12, 25, 50, 100, 200)
CORRECTIONS = (1, 3, 9)
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
INTERVALS = ((0.0, 1.0), (0.2, 2.0), (0.5, 5.0), (1.0, math.inf))
NETWORK_STEPS = 15


# --- exact ---------------------------------------------------------------------------------------


class Meant(NamedTuple):
    """A law that is meant: the sum of scores, what is exact for Gaussians, log density."""

    total: sg.Score
    gaussian: sg.Score
    log_density: Callable[[Tensor], Tensor]
    experts: int


def meant(sde: sg.LinearSDE) -> dict[str, Meant]:
    """The three problems."""

    def mixture(weights: list[float], means: list[list[float]], stds: list[float]) -> Any:
        law = sg.GaussianMixture(
            sde, torch.tensor(weights), torch.tensor(means, dtype=F64), torch.tensor(stds)
        )
        x = law.sample(20_000, torch.Generator().manual_seed(0))
        return law.with_facts(sg.Facts((2,), law.facts.std, sg.Facts.of(x, rank=2).moments))

    p = mixture([0.5, 0.3, 0.2], [[-1.2, 0.3], [0.9, 1.0], [0.6, -1.1]], [0.5, 0.25, 0.35])
    q = mixture([0.6, 0.4], [[-0.6, 0.8], [0.9, -0.4]], [0.4, 0.6])
    c = mixture([0.7, 0.3], [[0.0, 0.9], [0.5, 0.1]], [0.35, 0.25])
    others = mixture([0.35, 0.15, 0.5], [[0.0, 0.9], [0.5, 0.1], [-0.7, -0.5]], [0.35, 0.25, 0.6])
    tempered = Meant(3.0 * p, Tempered(p, 3.0), lambda x: 3 * p.log_prob(x), 1)
    product = Product([(p, 1.0), (q, 1.0)])
    guided = Product([(c, 3.0), (others, -2.0)])
    return {
        "a mixture to the third power": tempered,
        "a product of two mixtures": Meant(
            p + q, product, lambda x: p.log_prob(x) + q.log_prob(x), 2
        ),
        "a class, guided with weight 2": Meant(
            3.0 * c - 2.0 * others,
            guided,
            lambda x: 3 * c.log_prob(x) - 2 * others.log_prob(x),
            2,
        ),
    }


def exactly(law: Meant, n: int, seed: int) -> Tensor:
    """Draws by quadrature: cells of a fine grid, and a place in each."""
    axis = torch.linspace(-4, 4, 801, dtype=F64)
    plane, h = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0])
    mass = torch.softmax(torch.cat([law.log_density(x) for x in plane.split(100_000)]), 0)
    generator = torch.Generator().manual_seed(seed)
    cell = torch.multinomial(mass, n, True, generator=generator)
    return plane[cell] + h * (torch.rand(n, 2, generator=generator, dtype=F64) - 0.5)


def ways(law: Meant, seed: int) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Name, evaluations of the guided score a draw, and how to draw."""
    how: dict[str, Any] = {"seed": seed, "dtype": F64}
    sde: Any = law.total.sde
    for steps in STEPS:
        yield "sum, flow", steps, lambda k=steps: sg.sample(law.total, DRAWS, k, **how)
        yield "sum, eta = 1", steps, lambda k=steps: sg.sample(law.total, DRAWS, k, eta=1.0, **how)
        yield (
            "exact for Gaussians",
            steps,
            lambda k=steps: sg.sample(law.gaussian, DRAWS, k, eta=1.0, **how),
        )
        yield (
            "corrected",
            steps,
            lambda k=steps: corrected(law.total, DRAWS, k, **how).draw(DRAWS),
        )
    variance = law.total.facts.variance
    for k in CORRECTIONS:
        solver = PredictorCorrector(
            sg.Exponential(1, variance), eta=3.0, corrections=k, reference=variance
        )
        times = sg.grids.default(sde, 25, data_std=law.total.facts.std)
        yield (
            "sum, Langevin steps",
            25 * (1 + k),
            lambda s=solver, t=times: sg.sample(law.total, DRAWS, solver=s, times=t, **how),
        )


def exact(seeds: int = 3) -> dict[str, Any]:
    """Distances: the mean over seeds, with the floor of exact draws."""
    found: dict[str, Any] = {}
    for name, law in meant(sg.VP()).items():
        target = exactly(law, 10_000, seed=100)
        floor = [distance(exactly(law, DRAWS, 200 + s), target) for s in range(seeds)]
        rows: dict[str, dict[str, list[float]]] = {}
        for seed in range(seeds):
            for way, calls, draw in ways(law, seed):
                try:
                    value = distance(draw(), target)
                except FloatingPointError:
                    value = math.inf
                rows.setdefault(way, {}).setdefault(str(calls), []).append(value)
        found[name] = {
            "floor": mean(floor),
            "distance": {w: {c: mean(v) for c, v in r.items()} for w, r in rows.items()},
        }
        print(f"\n{name}: sliced Wasserstein-2, floor {mean(floor):.3f}\n")
        heads = ["", *(str(c) for c in sorted({int(c) for r in rows.values() for c in r}))]
        lines = [
            [way, *(f"{mean(r[c]):.3f}" if c in r else "" for c in heads[1:])]
            for way, r in rows.items()
        ]
        _report.table(heads, lines)
    return found


def distance(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein-2, 256 directions."""
    return metrics.sliced_wasserstein(x, y, 256, torch.Generator().manual_seed(0))


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


# --- gaussian ------------------------------------------------------------------------------------


def gaussian() -> list[dict[str, float]]:
    """Class N(1, 0.3), all data N(0, 1): mean and deviation that are meant and that come out.

    In w = (sigma / alpha)^2 the flow of (1 + g) s_c - g s_u is linear, with the gain
    G(w) = (v_c / (v_c + w))^((1 + g) / 2) ((v_u + w) / v_u)^(g / 2) from w to 0.
    """
    mu, v_c, v_u, w_T = 1.0, 0.3, 1.0, 80.0**2
    log_w = torch.linspace(math.log(1e-9), math.log(w_T), 200_001, dtype=F64)
    w, rows = log_w.exp(), []
    for g in [0.25 * k for k in range(17)]:
        gain = (v_c / (v_c + w)) ** ((1 + g) / 2) * (v_u / (v_u + w)) ** (-g / 2)
        push = 0.5 * (1 + g) * mu / (v_c + w) * gain * w
        precision = (1 + g) / v_c - g / v_u
        rows.append(
            {
                "weight": g,
                "mean meant": (1 + g) * mu / v_c / precision,
                "std meant": precision**-0.5,
                "mean of the flow": float(torch.trapezoid(push, log_w)),
                "std of the flow": float(gain[-1]) * w_T**0.5,
            }
        )
    _report.table(list(rows[0]), [[f"{v:.3f}" for v in row.values()] for row in rows[::2]])
    return rows


# --- networks ------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """A trained network, and what judges its draws."""

    model: sg.ScoreNetwork
    weak: sg.ScoreNetwork | None
    grade: Callable[[Tensor, Tensor], dict[str, float]]
    real: Tensor
    label: Tensor
    train: Tensor
    within: float
    """Mean variance of a number within a class, in the units of the process."""


def coverage(x: Tensor, real: Tensor, k: int = 5) -> float:
    """The part of the real images whose ball to their k-th neighbour holds a draw."""
    x, real = x.flatten(1).double(), real.flatten(1).double()
    radius = torch.cdist(real, real).topk(k + 1, largest=False).values[:, -1]
    return float((torch.cdist(real, x).amin(1) < radius).double().mean())


def variance_within(x: Tensor, y: Tensor) -> float:
    """Mean variance of a number about the mean of its class."""
    parts = [x[y == c].double() for c in y.unique()]
    return sum(float((p - p.mean(0)).square().mean()) * len(p) for p in parts) / len(x)


def digits(folder: str | None) -> Judged:
    """The digits' network of the demo, and one that trained a tenth as long."""
    train, test = data.digits("train"), data.digits("test")
    judge = Judge(train)
    model: Any
    model = sg.training.load(folder) if folder else train_models(train, 1.25).score
    weak = train_models(train, 0.15, seed=1, progress=False).score
    real = to_levels(test.x)
    within = variance_within(train.x, train.y) / model.facts.variance * model.facts.std**2
    return Judged(model, weak, judge.grade, real, test.y, to_levels(train.x), within)


def mnist(folder: str) -> Judged:
    """The network of ``mnist.py``, and its judge."""
    import mnist as bench

    parts = [data.mnist(split) for split in ("train", "test")]
    levels = [data.Labelled(data.quantise(x, bench.LEVELS), y) for x, y, *_ in parts]
    judge = bench.Judge(levels[0])
    model: Any = sg.training.load(folder)

    def grade(x: Tensor, y: Tensor) -> dict[str, float]:
        return judge.grade(data.quantise(x, bench.LEVELS), y)

    x, y = parts[0][0], parts[0][1]
    return Judged(model, None, grade, parts[1][0], parts[1][1], x, variance_within(x, y))


def settings(on: Judged, y: Tensor, few: bool) -> Iterator[tuple[str, float, sg.Score]]:
    """Kind of guidance, weight, score."""
    net, sde = on.model, on.model.sde
    free: Any = sg.ClassifierFree
    for w in (0.0, 0.5, 1.0, 2.0) if few else WEIGHTS:
        yield "everywhere", w, free(net, w, y=y)
    for w in (1.0, 2.0) if few else (1.0, 2.0, 4.0):
        for low, high in INTERVALS:
            yield f"({low:g}, {high:g}]", w, free(net, Interval(sde, low, high, w), y=y)
        narrow = net.given(y=y).with_facts(replace(net.facts, std=on.within**0.5))
        yield "Product", w, Product([(narrow, 1 + w), (net, -w)])
    if on.weak is not None:
        for w in (0.5, 1.0, 2.0):
            yield "weaker model", w, autoguidance(net, on.weak, w).given(y=y)


def trained(on: Judged, n: int, few: bool) -> dict[str, Any]:
    """One row a setting, and the floor of as many real images."""
    y = torch.arange(n) % 10
    rows = []

    def row(kind: str, w: float, x: Tensor, y: Tensor) -> None:
        made = on.grade(x, y)
        found = {k: made[k] for k in ("accuracy", "frechet")} | {"coverage": coverage(x, on.real)}
        rows.append({"guidance": kind, "weight": w, **found})
        print(rows[-1], flush=True)

    for kind, w, score in settings(on, y, few):
        row(kind, w, sg.sample(score, n, NETWORK_STEPS, seed=0, chunk=100), y)
    if not few:
        for w in (0.5, 1.0, 2.0):
            score = sg.ClassifierFree(on.model, w, y=list(range(10)))
            made = corrected(score, n // 10, 50, seed=0)
            row("corrected", w, made.x.flatten(0, 1), torch.arange(10).repeat_interleave(n // 10))
            rows[-1]["effective"] = float(made.ess[..., -1].mean())
    # Each class as often as in what was drawn: the distance tells that too.
    rank = torch.stack([(on.label == c).cumsum(0) for c in range(10)])
    order = rank[on.label, torch.arange(len(on.label))].argsort(stable=True)
    row("real images", 0.0, on.real[order[:n]], on.label[order[:n]])
    # Of test images by themselves that would be all.
    order = torch.randperm(len(on.train), generator=torch.Generator().manual_seed(0))
    rows[-1]["coverage"] = coverage(on.train[order[:n]], on.real)
    heads = ["guidance", "weight", "accuracy", "Fréchet", "coverage"]
    _report.table(
        heads,
        [
            [
                r["guidance"],
                f"{r['weight']:g}",
                *(f"{r[k]:.3f}" for k in ("accuracy", "frechet", "coverage")),
            ]
            for r in rows
        ],
    )
    return {"samples": n, "steps": NETWORK_STEPS, "rows": rows}


# --- figure --------------------------------------------------------------------------------------


def draw(found: dict[str, Any], path: Path) -> None:
    """Bias against cost, three panels; the overshoot; the trained network, two panels."""
    fig, axes = _report.panels(6, 3, (4.3, 3.1))
    for ax, (name, law) in zip(axes, found["exact"].items(), strict=False):
        for color, (way, row) in zip(_report.COLORS, law["distance"].items(), strict=False):
            calls = [int(c) for c in row]
            ax.plot(calls, list(row.values()), "o-", ms=3.5, lw=1.4, color=color, label=way)
        ax.axhline(law["floor"], color="0.6", ls=":", lw=1.2, label="exact draws")
        # Long steps of a sum with noise explode, far above the panel.
        top = 2 * max(row[max(row, key=int)] for row in law["distance"].values())
        ax.set(xscale="log", yscale="log", title=name, ylim=(law["floor"] / 2, top))
        _report.call_ticks(ax, (12, 25, 50, 100, 250))
        ax.set_xlabel("evaluations of the guided score a draw")
    axes[0].set_ylabel("sliced Wasserstein-2")
    ax, rows = axes[3], found["gaussian"]
    w = [r["weight"] for r in rows]
    for color, what in zip(_report.COLORS[1:], ("of the flow", "meant"), strict=False):
        m, s = ([r[f"{k} {what}"] for r in rows] for k in ("mean", "std"))
        low, high = zip(*((a - b, a + b) for a, b in zip(m, s, strict=True)), strict=True)
        ax.plot(w, m, color=color, lw=1.6)
        ax.fill_between(w, low, high, color=color, alpha=0.18, lw=0)
        ax.annotate(what, (w[-1], m[-1]), color=color, fontsize=9, ha="right", va="bottom")
    ax.set(title="a Gaussian class N(1, 0.3) of N(0, 1)")
    ax.set_ylabel("mean, one deviation each way")
    network(axes[4:], found["digits"])
    _report.finish(fig, axes[:1], "weight", "", path)


def network(axes: Any, found: dict[str, Any]) -> None:
    """Frechet distance and coverage against accuracy or weight."""
    kinds = ("everywhere", "(0, 1]", "Product", "weaker model", "corrected")
    real, plain = found["rows"][-1], found["rows"][0]
    for ax, what in zip(axes, ("frechet", "coverage"), strict=True):
        for color, kind in zip(_report.COLORS, kinds, strict=False):
            rows = [plain] + [r for r in found["rows"] if r["guidance"] == kind and r["weight"]]
            x, v = [r["weight"] for r in rows], [r[what] for r in rows]
            ax.plot(x, v, "o-", ms=3.5, lw=1.4, color=color, label=kind)
        ax.axhline(real[what], color="0.6", ls=":", lw=1.2, label="real images")
        name = {"frechet": "Fréchet distance", "coverage": "coverage"}[what]
        ax.set(title=f"digits, trained network: {name}")
    axes[0].set(yscale="log", yticks=[0.3, 1, 3, 10], yticklabels=["0.3", "1", "3", "10"])
    axes[0].minorticks_off()
    axes[1].legend(frameon=False, fontsize=8)


def results() -> dict[str, Any]:
    """What is known so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Run what is asked for; the figure where all its parts are there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("exact", "gaussian", "digits", "mnist"))
    parser.add_argument("--digits", help="a folder with the demo's model")
    parser.add_argument("--mnist", help="a folder with the model of mnist.py")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--draw", action="store_true", help="the figure alone")
    args = parser.parse_args()
    only = [] if args.draw else args.only or ["exact", "gaussian", "digits"]
    sys.path.insert(0, str(HERE))
    for part in only:
        if part == "exact":
            made: Any = exact()
        elif part == "gaussian":
            made = gaussian()
        elif part == "digits":
            made = trained(digits(args.digits), args.samples, few=False)
        else:
            made = trained(mnist(args.mnist), args.samples, few=True)
        # Read anew: parts may run side by side.
        _report.write_json(RESULTS, {**results(), part: made, "versions": _report.versions()})
    found = results()
    if {"exact", "gaussian", "digits"} <= found.keys():
        draw(found, FIGURE)


if __name__ == "__main__":
    main()
