"""What do many steps of many chains cost, beside a plain loop and BlackJAX?

Unadjusted Langevin, 1,000 chains of 10,000 steps on 25 components in the plane, float32, every
state kept, one CPU thread. The plain loops are written as one would: *broadcast* takes all
differences of states and means, *matmul* knows that the score of equal components is two matrix
products and a softmax. BlackJAX (``sgld`` with the full gradient, which is ULA) gets the same
two products, all chains as one array, one compiled ``scan``; compiling is not counted. Rounds are
interleaved and the unit is the CPU time of the process, which neighbours do not lengthen by
taking turns. At the end every candidate must agree with the law.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import _report
import numpy as np
import torch
from _problems import HERE
from torch import Tensor

from sde_gen import EDM, GaussianMixture, langevin

CHAINS, STD, H = 1000, 0.2, 2e-3
Run = Callable[[Tensor, int], Any]


def law() -> GaussianMixture:
    """25 equal components on a 5 x 5 grid in [-1, 1]^2, of a spread that chains can cross."""
    a = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return GaussianMixture(EDM(1.0), torch.ones(25), torch.cartesian_prod(a, a), STD)


def ours(x: Tensor, steps: int) -> Tensor:
    """The library, as a user calls it."""
    return langevin(law(), x, steps, H, noise=0).samples


def plain(score: Callable[[Tensor], Tensor]) -> Run:
    """The loop that one writes."""

    def run(x: Tensor, steps: int) -> Tensor:
        samples = torch.empty(steps, *x.shape)
        for k in range(steps):
            x = x + H * score(x) + math.sqrt(2 * H) * torch.randn_like(x)
            samples[k] = x
        return samples

    return run


def broadcast() -> Run:
    """The score from all differences (chains, 25, 2)."""
    m, v = law().means.float(), STD**2

    def score(x: Tensor) -> Tensor:
        d = m - x.unsqueeze(1)
        r = torch.softmax(-0.5 * (d * d).sum(-1) / v, 1)
        return (r.unsqueeze(-1) * d).sum(1) / v

    return plain(score)


def matmul() -> Run:
    """The score from two matrix products."""
    m, v = law().means.float(), STD**2
    a, b = m / v, -0.5 * (m * m).sum(1) / v
    return plain(lambda x: torch.softmax(torch.addmm(b, x, a.T), 1) @ a - x / v)


def blackjax() -> Run | None:
    """Its stochastic-gradient Langevin with the full gradient, compiled; None where absent."""
    try:
        import blackjax as library
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    m, v = jnp.asarray(law().means.float().numpy()), STD**2
    a, b = m / v, -0.5 * (m * m).sum(1) / v
    kernel = library.sgld(lambda x, _: jax.nn.softmax(x @ a.T + b, axis=1) @ a - x / v)

    def walk(x: Any, keys: Any) -> Any:
        def step(x: Any, key: Any) -> tuple[Any, Any]:
            x = kernel.step(key, x, 0, H)
            return x, x

        return jax.lax.scan(step, x, keys)[1]

    compiled = jax.jit(walk)

    def run(x: Tensor, steps: int) -> Any:
        keys = jax.random.split(jax.random.key(0), steps)
        return compiled(jnp.asarray(x.numpy()), keys).block_until_ready()

    return run


CANDIDATES: dict[str, Callable[[], Run | None]] = {
    "sde_gen": lambda: ours,
    "plain loop, matmul": matmul,
    "plain loop, broadcast": broadcast,
    "BlackJAX": blackjax,
}


def deviation(samples: Any) -> float:
    """Mean square over the second half against the law's own, in standard errors of one chain
    in a thousand."""
    x = np.asarray(samples)[len(samples) // 2 :]
    each = (x**2).mean((0, 2))
    exact = STD**2 + 0.5
    return float((each.mean() - exact) / (each.std() / math.sqrt(len(each))))


def measure(steps: int, rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds: microseconds a step of all chains, and the ratio to ours."""
    runs = {name: run for name, make in CANDIDATES.items() if (run := make()) is not None}
    x = law().sample(CHAINS, torch.Generator().manual_seed(0)).float()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    off = {name: deviation(run(x, steps)) for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            start, clock = time.process_time(), time.perf_counter()
            run(x, steps)
            seconds[name].append(time.process_time() - start)
            wall[name].append(time.perf_counter() - clock)
    mine = np.array(seconds["sde_gen"])
    return [
        {
            "name": name,
            "us_a_step": float(np.median(s)) / steps * 1e6,
            "us_a_step_least": min(s) / steps * 1e6,
            "wall_seconds_least": min(wall[name]),
            "ratio": float(np.median(np.array(s) / mine)),
            "deviation": off[name],
        }
        for name, s in seconds.items()
    ]


def draw(rows: list[dict[str, Any]], path: Any) -> None:
    """Bars."""
    fig, (ax,) = _report.panels(1, 1, (6.5, 0.34 * len(rows) + 0.3))
    rows = rows[::-1]
    colors = [_report.COLORS[0] if r["name"] == "sde_gen" else "0.7" for r in rows]
    ax.barh([r["name"] for r in rows], [r["us_a_step"] for r in rows], color=colors, height=0.7)
    for i, r in enumerate(rows):
        text = f" {r['us_a_step']:.0f}  ({r['ratio']:.1f}x)"
        ax.text(r["us_a_step"], i, text, va="center", fontsize=8)
    ax.set_xlim(0, max(r["us_a_step"] for r in rows) * 1.2)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", labelsize=8, length=0)
    _report.finish(fig, [], f"microseconds a step of {CHAINS} chains", "", path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1,000 steps in place of 10,000")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = 1000 if args.quick else 10_000
    rows = measure(steps, 5)
    _report.table(
        [
            "",
            "us a step",
            "least",
            "wall seconds, least",
            "ratio to sde_gen",
            "law, in std errors",
        ],
        [
            [
                r["name"],
                f"{r['us_a_step']:.1f}",
                f"{r['us_a_step_least']:.1f}",
                f"{r['wall_seconds_least']:.2f}",
                f"{r['ratio']:.2f}",
                f"{r['deviation']:+.1f}",
            ]
            for r in rows
        ],
    )
    stem = f"langevin_speed{'_quick' if args.quick else ''}"
    draw(rows, HERE / "results" / f"{stem}.png")
    versions = {**_report.versions(), **{n: _report._version(n) for n in ("jax", "blackjax")}}
    content = {"chains": CHAINS, "steps": steps, "h": H, "rows": rows, "versions": versions}
    _report.write_json(HERE / "results" / f"{stem}.json", content)


if __name__ == "__main__":
    main()
