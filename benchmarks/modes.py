"""25 modes in the plane: what do a VAE, a hierarchical VAE, GANs and a score model leave out?

The data are 4,000 draws of 25 equally likely Gaussians of deviation 0.03 on a grid (``grid_25``).
Every model is trained for the same CPU time of one thread (``--seconds``), whatever its step
costs, with each of a few settings, from which the one with the least energy distance is taken.
All settings stand in the results. Of 10,000 samples:

*modes*: at how many of the 25 a sample lies; *share*: of the samples, how many lie at a mode,
within 3 deviations of its centre (98.9 % of exact samples do, and 13 % of a uniform density on the
square of the centres, which covers all modes as well); *evenness*: how even the counts of the
modes are, the exponential of their entropy over 25; *energy* distance to other data; and the
microseconds and calls of a sample. Of the VAEs also what other data cost, in nats, level by level.

A VAE's sample is E[x | z]. The minimax GAN is looked at as it trains (its weights as they are, no
average), with a discriminator of the generator's learning rate, of thirty times, and of a
thirtieth. What a discriminator that is too strong does is hidden there by Adam, whose steps do not
shrink with the gradient; so the gradient itself is measured: a generator that lies between the
modes is held while the discriminator learns, and the norms of the slopes of log(1 - D) and of
-log D in its weights are written down.

    python benchmarks/modes.py [--quick] [--seconds S] [--only NAME ...]

What was measured before stays, so that the rows can be had in parts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _report
import torch
from torch import Tensor
from torch.nn.functional import softplus

import sde_gen as sg
from sde_gen import contrast, data, metrics, plots
from sde_gen.contrast import GAN, HVAE, VAE, MinimaxGAN
from sde_gen.networks import MLP, Autoencoder

HERE = Path(__file__).parent
STD, N, SAMPLES, BATCH = 0.03, 4000, 10_000, 128
AXIS = torch.linspace(-1, 1, 5)
CENTRES = torch.cartesian_prod(AXIS, AXIS)
SHARE = 1 - math.exp(-4.5)
LOOKS = (0.02, 0.1, 0.3, 0.6, 1.0)
"""Parts of the run of the minimax GAN that are drawn."""
DISCRIMINATOR_STEPS = (0, 10, 30, 100, 200, 300, 500, 700, 1000)
SHOWN = 2000
"""Points that are drawn of each."""


def draws(seed: int) -> Tensor:
    """Data of this seed."""
    return data.grid_25(N, torch.Generator().manual_seed(seed))


def codec(latent: int, width: int) -> Autoencoder:
    """A dense autoencoder of the plane."""
    return Autoencoder((2,), (latent,), width=width, blocks=2)


def score() -> sg.ScoreNetwork:
    """The diffusion model."""
    facts = sg.Facts.of(draws(0))
    return sg.ScoreNetwork(MLP((2,), 64, 3), sg.VP(), facts=facts)


Setting = tuple[str, Callable[[], Any], float]
"""Its words, what makes the model, the learning rate."""

SETTINGS: dict[str, list[Setting]] = {
    "VAE": [
        ("2 latents", lambda: VAE(codec(2, 64)), 2e-3),
        ("8 latents", lambda: VAE(codec(8, 64)), 2e-3),
        ("2 latents, rate 5e-3", lambda: VAE(codec(2, 64)), 5e-3),
    ],
    "hierarchical VAE": [
        ("2 levels, 2 + 2", lambda: HVAE(codec(2, 64), (2,), 64), 2e-3),
        ("2 levels, free bits 0.5", lambda: HVAE(codec(2, 64), (2,), 64, free=0.5), 2e-3),
        ("3 levels, free bits 0.5", lambda: HVAE(codec(2, 64), (2, 2), 64, free=0.5), 2e-3),
        ("4 levels, free bits 0.5", lambda: HVAE(codec(2, 64), (2, 2, 2), 64, free=0.5), 2e-3),
    ],
    "GAN": [
        ("R1 0.01", lambda: GAN((2,), 2, 64, gamma=0.01), 1e-3),
        ("R1 0.1", lambda: GAN((2,), 2, 64, gamma=0.1), 1e-3),
        ("R1 1", lambda: GAN((2,), 2, 64, gamma=1.0), 1e-3),
        ("R1 0.1, ratio 3", lambda: GAN((2,), 2, 64, gamma=0.1, ratio=3), 1e-3),
    ],
    "minimax GAN": [
        ("equal rates", lambda: MinimaxGAN((2,), 2, 64, ratio=1.0), 1e-3),
        ("discriminator 30 times faster", lambda: MinimaxGAN((2,), 2, 64, ratio=30.0), 1e-3),
        ("discriminator 30 times slower", lambda: MinimaxGAN((2,), 2, 64, ratio=1 / 30), 1e-3),
    ],
    "score": [
        ("rate 2e-3", score, 2e-3),
        ("rate 5e-3", score, 5e-3),
    ],
}


def fit(make: Callable[[], Any], lr: float, steps: int, looks: list[Any] | None = None) -> Any:
    """A model after so many steps; ``looks`` gets (part of the run, samples) of its weights."""
    torch.manual_seed(0)
    model = make()
    recipe = sg.Recipe(steps=steps, batch=BATCH, lr=lr, every=20)
    todo = list(LOOKS)

    def look(trainer: Any, step: int, loss: float) -> None:
        if looks is not None and todo and step >= todo[0] * steps:
            todo.pop(0)
            looks.append((step / steps, trainer.model.sample(SHOWN, seed=1)))

    kind = sg.train if isinstance(model, sg.ScoreNetwork) else contrast.train
    call: Any = kind
    options = {"callbacks": [look], "device": "cpu", "progress": False}
    return call(model, draws(0), recipe=recipe, **options)


def seconds_of_step(make: Callable[[], Any], lr: float) -> float:
    """CPU time of a step, all that a run does in it counted."""
    spent = []
    for steps in (5, 10, 70):  # the first warms up
        start = time.thread_time()
        fit(make, lr, steps)
        spent.append(time.thread_time() - start)
    return (spent[2] - spent[1]) / 60


def draw(model: Any, seed: int = 1) -> tuple[Tensor, float, float]:
    """Samples, CPU seconds a sample, calls of a network a sample."""
    start = time.thread_time()
    if isinstance(model, sg.ScoreNetwork):
        x, calls = sg.sample(model, SAMPLES, steps=20, seed=seed), 20.0
    else:
        x, calls = model.sample(SAMPLES, seed=seed), float(model.calls)
    return x, (time.thread_time() - start) / SAMPLES, calls


def graded(x: Tensor) -> dict[str, float]:
    """What the table has of samples."""
    found = metrics.modes(x, CENTRES, 3 * STD)
    p = found.counts.double() / max(1, int(found.counts.sum()))
    entropy = -float(torch.xlogy(p, p).sum())
    return {
        "modes": found.covered,
        "share": found.share,
        "evenness": math.exp(entropy) / len(CENTRES) if found.covered else 0.0,
        "energy": metrics.energy_distance(x[:N], draws(2)),
    }


def record(model: Any, about: dict[str, Any]) -> dict[str, Any]:
    """A row of the sweep, with some of the samples for the picture."""
    x, seconds, calls = draw(model)
    row = {**about, **graded(x), "microseconds": 1e6 * seconds, "calls": calls}
    if isinstance(model, HVAE):
        with torch.no_grad():
            rates, distortion = model.terms(draws(2), noise=sg.Streams(0))
        row |= {"rates": rates.mean(0).tolist(), "distortion": float(distortion.mean())}
    elif isinstance(model, VAE) and not model.components:
        with torch.no_grad():
            cost = model.codec.cost(draws(2), sg.Streams(0)).mean()
        row |= {"rates": [float(cost.rate)], "distortion": float(cost.distortion)}
    return {**row, "points": rounded(x)}


def rounded(x: Tensor) -> list[list[float]]:
    """Points for the picture, as JSON holds them."""
    return [[round(v, 3) for v in row] for row in x[:SHOWN].tolist()]


def sweep(name: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each setting, and for a VAE one more: its mixture."""
    rows = []
    for words, make, lr in SETTINGS[name]:
        each = seconds_of_step(make, lr)
        steps = max(50, int(seconds / each))
        about = {"model": name, "setting": words, "steps": steps, "ms": 1e3 * each}
        looks: list[Any] = []
        start = time.thread_time()
        model = fit(make, lr, steps, looks if name == "minimax GAN" else None)
        about["cpu_seconds"] = time.thread_time() - start
        rows.append(record(model, about))
        rows[-1]["looks"] = [(part, rounded(x)) for part, x in looks]
        if name == "VAE":
            rows.append(record(model.with_mixture(draws(0), components=25), about))
            rows[-1]["model"] = "VAE, mixture of 25"
        for row in rows[-2 if name == "VAE" else -1 :]:
            print({k: v for k, v in row.items() if k not in ("points", "looks")}, flush=True)
    return rows


def best(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each model the row with the least energy distance."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        held = found.get(row["model"])
        if held is None or row["energy"] < held["energy"]:
            found[row["model"]] = row
    return found


def slopes() -> list[dict[str, float]]:
    """Norms of the generator's gradients against a discriminator that goes on learning."""
    torch.manual_seed(0)
    gan, rows = MinimaxGAN((2,), 2, 64), []
    with torch.no_grad():
        gan.generator.body[-1].bias.fill_(0.25)
    real, told, noise = draws(0)[:1000], torch.zeros(1000, 0), sg.Streams(5)
    game = torch.optim.Adam(gan.discriminator.parameters(), 1e-3)
    for step in range(1001):
        fake = gan.draw(told, noise)
        logits = gan.discriminator(real, told), gan.discriminator(fake, told)
        if step in DISCRIMINATOR_STEPS:
            row = {"steps": step, "js": float(contrast.jensen_shannon(*logits).detach())}
            wishes = {"log(1 - D)": -softplus(logits[1]), "-log D": softplus(-logits[1])}
            for words, wish in wishes.items():
                parts = list(gan.generator.parameters())
                found = torch.autograd.grad(wish.mean(), parts, retain_graph=True)
                row[words] = float(torch.cat([g.flatten() for g in found]).norm())
            rows.append(row)
        game.zero_grad()
        (-contrast.game_value(*logits)).backward(inputs=list(gan.discriminator.parameters()))
        game.step()
    return rows


COLUMNS = {
    "modes": "{:d}",
    "share": "{:.3f}",
    "evenness": "{:.2f}",
    "energy": "{:.4f}",
    "microseconds": "{:.1f}",
    "calls": "{:.0f}",
    "steps": "{:d}",
}


def show(
    rows: list[dict[str, Any]], floor: dict[str, float], slope: list[dict[str, float]]
) -> None:
    """The table of the best, then those of the sweep and of the slopes."""
    heads = ["model", "setting", *COLUMNS]

    def line(row: dict[str, Any]) -> list[str]:
        cells = [f.format(row[c]) if c in row else "" for c, f in COLUMNS.items()]
        return [row["model"], row["setting"], *cells]

    print("\nThe best setting of each\n")
    exact = {"model": "other data", "setting": "", **floor}
    _report.table(heads, [line(row) for row in [*best(rows).values(), exact]])
    print("\nAll settings\n")
    _report.table(heads, [line(row) for row in rows])
    print("\nNats of other data by level, and of the distortion\n")
    for row in rows:
        if "rates" in row:
            costs = [*row["rates"], row["distortion"]]
            each = " + ".join(f"{v:.2f}" for v in costs)
            print(f"{row['model']}, {row['setting']}: {each} = {sum(costs):.2f}")
    print("\nThe generator's gradient against a discriminator that goes on learning\n")
    _report.table(list(slope[0]), [[f"{v:.3g}" for v in row.values()] for row in slope])


def picture(rows: list[dict[str, Any]], slope: list[dict[str, float]], path: Path) -> None:
    """The samples of the best of each above; the minimax GAN as it trains below."""
    from matplotlib.figure import Figure

    top = {"data": draws(2)[:SHOWN].tolist()}
    top |= {name: row["points"] for name, row in best(rows).items() if name != "minimax GAN"}
    games = [row for row in rows if row.get("looks")]
    columns = max(len(top), len(LOOKS) + 1)
    shape = (2.1 * columns, 2.4 * (1 + len(games)))
    figure = Figure(figsize=shape, layout="constrained", dpi=110)
    grid = figure.add_gridspec(1 + len(games), columns)
    lines = [("the best of each", list(top.items()))]
    for game in games:
        words = game["setting"].replace(" times", "\ntimes")
        looks = [(f"{100 * part:.0f} % of the run", x) for part, x in game["looks"]]
        lines.append((f"minimax GAN,\n{words}", looks))
    for i, (words, line) in enumerate(lines):
        for j, (title, points) in enumerate(line):
            ax = figure.add_subplot(grid[i, j])
            x = torch.tensor(points)
            ax.hist2d(x[:, 0], x[:, 1], 90, [[-1.35, 1.35]] * 2, cmap="magma", vmax=6)
            ax.set(xticks=[], yticks=[], aspect="equal")
            ax.set_title(title, fontsize=9)
            if j == 0:
                ax.set_ylabel(words, fontsize=9, color=plots.QUIET)
    ax = figure.add_subplot(grid[1:, len(LOOKS) :])
    steps = [row["steps"] for row in slope]
    for words, color in zip(("log(1 - D)", "-log D"), _report.COLORS, strict=False):
        ax.semilogy(steps, [row[words] for row in slope], "o-", ms=3, color=color, label=words)
    ax.set_title("slope for a generator\nthat is held", fontsize=9)
    ax.set_xlabel("steps of the discriminator", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(path)
    print(f"wrote {path.name}")


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU time, for each run")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), help="measure these anew")
    parser.add_argument("--quick", action="store_true", help="a second a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 1.0 if args.quick else args.seconds
    stem = HERE / "results" / f"modes{'_quick' if args.quick else ''}"
    file, cache = stem.with_suffix(".json"), HERE / "results" / "cache" / f"{stem.name}.json"
    kept = json.loads(cache.read_text()) if cache.exists() and args.only is not None else {}
    for name in SETTINGS if args.only is None else args.only:
        kept[name] = sweep(name, seconds)
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(kept))
    rows = [row for name in SETTINGS for row in kept.get(name, [])]
    floor = graded(data.grid_25(SAMPLES, torch.Generator().manual_seed(3)))
    slope = slopes()
    show(rows, floor, slope)
    picture(rows, slope, stem.with_suffix(".png"))
    plain = [{k: v for k, v in r.items() if k not in ("points", "looks")} for r in rows]
    taken = {name: row["setting"] for name, row in best(rows).items()}
    content = {"seconds": seconds, "floor": floor, "exact_share": SHARE, "best": taken}
    _report.write_json(
        file, {**content, "rows": plain, "slopes": slope, "versions": _report.versions()}
    )


if __name__ == "__main__":
    main()
