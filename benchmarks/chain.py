"""The chain's bound on held-out digits given their class: where its bits are, and what t costs.

1. *Ends*: the bound of levels against the noise at which the chain ends, term by term. Below a
   third of a cell the steps pay for where in its cell a pixel lies, which nobody asked.
2. *Variances*: learned, estimated without training, small and large, with 100 steps even in
   information and with 1,000 even in t; beside them the flow. And of dequantised digits, a
   density on which the flow is exact, so that the difference is what the chain loses.
3. *Draws of t*: the variance of the bound from one draw of t a digit, for five densities of t.
   Draws for equal standard error are in proportion to it.

One network, that of ``sde-gen demo`` with a head, trained by ``Hybrid`` on the chain's nodes for
as many steps as take 75 seconds on two cores, and kept. Writes ``docs/images/chain.png``.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import _report
import torch
from _problems import CACHE, HERE
from torch import Tensor

import sde_gen as sg
from sde_gen import data, grids
from sde_gen.chain import Bound, Hybrid, NodeTimes
from sde_gen.data import Dequantise, Labelled, quantise
from sde_gen.networks import UNet
from sde_gen.training import KarrasWeight, LogNormalTimes, load

LEVELS, STEPS = 17, 100
FINEST, END = 0.01, 0.05
"""sigma / alpha where training and a density end, and where the chain of levels does."""
ENDS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.12)
BITS = 64 * math.log(2)


def chain_of(sde: sg.LinearSDE, variance: float, end: float = END, steps: int = STEPS) -> sg.Chain:
    """Steps even in information, down to this ratio of noise to signal."""
    stop = float(sde.time_at(-2 * math.log(end)))
    times = grids.information(sde, steps, end=stop, reference=variance, to_zero=True)
    return sg.Chain(sde, times)


def network(steps: int, seed: int = 0) -> sg.ScoreNetwork:
    """From the cache, or trained now."""
    folder = CACHE / f"chain-{steps}-{seed}"
    if not (folder / "config.json").exists():
        train, sde = data.digits("train"), sg.VP()
        facts = sg.Facts.of(train.x, levels=LEVELS)
        torch.manual_seed(seed)
        model = sg.ScoreNetwork(UNet.digits(head=True), sde, facts=facts)
        # The default weight, at these times, is that of the likelihood.
        objective = Hybrid(
            NodeTimes.of(chain_of(sde, facts.variance, FINEST)),
            weighting=KarrasWeight(facts.std),
            dropout=0.0,
            n_levels=LEVELS,
        )
        sg.train(
            model,
            *train,
            sg.Recipe(steps=steps, lr=4e-3, seed=seed),
            objective=objective,
            transform=Dequantise(LEVELS),
            device="cpu",
            folder=folder,
            overwrite=True,
        )
    return load(folder)


class Setting(NamedTuple):
    """A network, the held-out digits that it is asked of, and training digits for its errors."""

    model: sg.ScoreNetwork
    test: Labelled
    train: Labelled

    @property
    def score(self) -> sg.Score:
        return self.model.given(y=self.test.y)

    @property
    def levels(self) -> Tensor:
        return quantise(self.test.x, LEVELS)

    def chain(self, end: float, steps: int = STEPS) -> sg.Chain:
        return chain_of(self.model.sde, self.model.facts.variance, end, steps)

    def errors(self, chain: sg.Chain) -> Tensor:
        """Mean squared errors of the denoiser on training digits, with noise in their cells."""
        x = Dequantise(LEVELS)(self.train.x, sg.Streams(1))
        return chain.errors(self.model.given(y=self.train.y), x)


def told(b: Bound, offset: float = 0.0) -> dict[str, Any]:
    """The terms of the mean, bits a pixel."""
    m = b.mean()
    return {
        "prior": float(m.prior.value) / BITS,
        "steps": float(m.steps.value.sum()) / BITS,
        "reconstruction": float(m.reconstruction.value) / BITS + offset,
        "total": float(m.total.value) / BITS + offset,
        "error": float(m.total.standard_error) / BITS,
        "calls": b.calls,
    }


def ends(s: Setting) -> list[dict[str, Any]]:
    """The bound for each end of the chain, and its L_0 by the Bayes rule of levels alone."""
    rows = []
    for end in ENDS:
        chain = s.chain(end)
        b = sg.bound(s.score, s.levels, chain, variance="learned", draws=1)
        alone = sg.bound(s.score, s.levels, chain, decoder="bayes", terms=1)
        l_0 = float(alone.mean().reconstruction.value) / BITS
        rows.append({"end": end, **told(b), "reconstruction by Bayes": l_0})
        print(f"end {end}: {rows[-1]['total']:.4f} +- {rows[-1]['error']:.4f}", flush=True)
    return rows


def variances(s: Setting) -> list[dict[str, Any]]:
    """Levels and density, each with every variance, in 100 steps even in information; levels in
    1,000 steps even in t, of which 32 are drawn; and the flow."""
    x = Dequantise(LEVELS)(s.test.x, sg.Streams(2))
    sde, rows = s.model.sde, []
    last = float(s.chain(END).times[1])
    even = sg.Chain(sde, grids.uniform(sde, 1000, end=last, to_zero=True))
    for kind, y, chain, terms, offset in (
        ("levels", s.levels, s.chain(END), None, 0.0),
        ("levels, 1000 even in t", s.levels, even, 32, 0.0),
        ("density", x, s.chain(FINEST), None, math.log2(LEVELS / 2)),
    ):
        choices: dict[str, sg.chain.Variance] = {"learned": "learned", "small": "small"}
        choices["large"] = "large"
        if terms is None:
            choices["estimated"] = s.errors(chain)
        for name, variance in choices.items():
            b = sg.bound(s.score, y, chain, variance=variance, draws=2, terms=terms)
            row = {"of": kind, "variance": name, **told(b, offset)}
            if terms is None and name == "learned":
                row["each"] = [round(float(v) / BITS, 6) for v in b.steps.value.mean(0)]
            if terms is None and name in ("learned", "small"):
                row["draws of t"] = draws_of_t(s, b, chain, variance)
            rows.append(row)
            print(f"{kind}, {name}: {row['total']:.4f} +- {row['error']:.4f}", flush=True)
    return [*rows, flow(s, x)]


def flow(s: Setting, x: Tensor) -> dict[str, Any]:
    """Bits a pixel by the probability flow, from where training ended."""
    times = [float(s.chain(FINEST).times[1]), s.model.sde.T]
    found = sg.log_prob(s.score, x, probes=2, steps=96, times=times)
    bits = (-found / BITS + math.log2(LEVELS / 2)).mean()
    return {
        "of": "density",
        "variance": "flow",
        "total": float(bits),
        "error": float(bits.standard_error),
        "calls": found.calls,
    }


def draws_of_t(
    s: Setting, b: Bound, chain: sg.Chain, variance: sg.chain.Variance
) -> dict[str, list[float]]:
    """Variance, in nats^2 a digit, of sum L from one draw of t and of x_t, for densities of t;
    and the part of it that is there for known means over x_t.

    With p_t the probability of a step it is E [sum L_t^2 / p_t] - (sum E L_t)^2: squares of
    single draws for the first, products of two for what has no noise in it.
    """
    mean, half = b.steps.value.double(), b.steps.standard_error.double()
    # Of two draws a, b: mean = (a + b) / 2 and standard error |a - b| / 2.
    product, square = mean.square() - half.square(), mean.square() + half.square()
    total, spread = mean.sum(1), half.square().sum(1)
    whole = float((total.square() - spread).mean())
    found = {}
    for name, p in densities(s, chain, variance).items():
        drawn, alone = (float((v / p).sum(1).mean()) - whole for v in (square, product))
        found[name] = [drawn, alone]
    return found


def densities(s: Setting, chain: sg.Chain, variance: sg.chain.Variance) -> dict[str, Tensor]:
    """Probabilities of the steps t = 2 .. N."""
    t, log_snr = chain.times[1:], chain.nodes.log_snr[1:]
    known = sg.Moments(torch.tensor([s.model.facts.variance], dtype=torch.float64))
    normal, times = torch.distributions.Normal(0.0, 1.0), LogNormalTimes()
    cdf = normal.cdf((-0.5 * log_snr - times.log_mean) / times.log_std)
    measured = chain.expected(s.errors(chain), variance).clamp_min(0)
    weights = {
        "uniform t": t.diff(),
        "EDM's log-normal": cdf.diff(),
        "uniform log SNR": -log_snr.diff(),
        "information of one variance": known.information(torch.exp(-log_snr)).diff().abs(),
        "measured": measured,
    }
    # A small part uniform, as in ``bound``.
    return {n: 0.95 * w / w.sum() + 0.05 / len(w) for n, w in weights.items()}


def show(rows: list[dict[str, Any]], by_end: list[dict[str, Any]]) -> None:
    """Print the three tables."""
    print("\nBits a pixel against the ratio of noise to signal where the chain ends, learned")
    parts = ("prior", "steps", "reconstruction", "reconstruction by Bayes")
    _report.table(
        ["end", "L_T", "steps", "L_0", "L_0 by Bayes", "bound"],
        [[f"{r['end']:g}", *(f"{r[k]:.3f}" for k in parts), f"{r['total']:.3f}"] for r in by_end],
    )
    print("\nBits a pixel by variance")
    _report.table(
        ["of", "variance", "bits/dim", "calls"],
        [
            [r["of"], r["variance"], f"{r['total']:.3f} +- {r['error']:.3f}", str(r["calls"])]
            for r in rows
        ],
    )
    print("\nDraws of t for the standard error of one, in units of those of the measured density")
    cells = []
    for r in rows:
        if "draws of t" in r:
            least = r["draws of t"]["measured"]
            for name, v in r["draws of t"].items():
                ratio = [f"{a / b:.1f}" for a, b in zip(v, least, strict=True)]
                relative = math.sqrt(v[0]) / (r["steps"] * BITS)
                cells.append([r["of"], r["variance"], name, f"{relative:.3f}", *ratio])
    _report.table(["of", "variance", "density", "s.d. / mean", "draws", "of t alone"], cells)


def draw(rows: list[dict[str, Any]], by_end: list[dict[str, Any]], chain: Any, path: Any) -> None:
    """The bound by variance, the terms by the noise of their step, the parts by the end."""
    fig, axes = _report.panels(3, 3, (3.6, 3.0))
    steps, decoder, whole = _report.COLORS[0], _report.COLORS[1], _report.COLORS[5]
    names = ("small", "large", "estimated", "learned")
    own = {n: next(r for r in rows if (r["of"], r["variance"]) == ("levels", n)) for n in names}
    base = [own[n]["steps"] for n in names]
    axes[0].bar(names, base, 0.6, color=steps, label="steps")
    last = [own[n]["reconstruction"] for n in names]
    axes[0].bar(names, last, 0.6, base, color=decoder, label="$L_0$")
    axes[0].set(title=f"by variance, {len(chain)} steps", ylabel="bits / pixel")
    axes[0].tick_params(axis="x", labelsize=8)
    ratio = torch.exp(-0.5 * chain.nodes.log_snr[2:])
    axes[1].plot(ratio, own["learned"]["each"], ".-", color=steps, lw=1, ms=3)
    axes[1].set(xscale="log", ylim=(0, None), title="each step, learned")
    axes[1].set_xlabel(r"$\sigma/\alpha$ of its noisier node")
    x, shown = [r["end"] for r in by_end], {"steps": steps, "reconstruction": decoder}
    for key, color in {**shown, "total": whole}.items():
        label = {"reconstruction": "$L_0$", "total": "bound"}.get(key, key)
        y = [r[key] for r in by_end]
        axes[2].plot(x, y, "o-", color=color, ms=3.5, lw=1.4, label=label)
    axes[2].set(xscale="log", ylim=(0, None), title="by the end of the chain, learned")
    _report.call_ticks(axes[2], x)
    axes[2].tick_params(axis="x", labelsize=8)
    axes[2].set_xlabel(r"$\sigma/\alpha$ at the end")
    handles, labels = axes[2].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    fig.savefig(path, dpi=140)


def main() -> None:
    """Train or load, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=740, help="of training")
    parser.add_argument("--rows", type=int, default=400, help="held-out digits")
    parser.add_argument("--quick", action="store_true", help="20 steps of training, 10 digits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = 10 if args.quick else args.rows
    test, train = (Labelled(*(v[:rows] for v in data.digits(k))) for k in ("test", "train"))
    setting = Setting(network(20 if args.quick else args.steps), test, train)
    by_end = ends(setting)
    table = variances(setting)
    show(table, by_end)
    stem = HERE / "results" / f"chain{'_quick' if args.quick else ''}"
    picture = stem.with_suffix(".png") if args.quick else HERE.parent / "docs/images/chain.png"
    draw(table, by_end, setting.chain(END), picture)
    content = {"ends": by_end, "variances": table, "versions": _report.versions()}
    _report.write_json(stem.with_suffix(".json"), content)


if __name__ == "__main__":
    main()
