"""What the loop costs where the network costs nothing.

A state of (64, 3, 32, 32) float32, one thread, a network that returns what it was given. The unit
is the bare work that any sampler must do on such a state: x * 0.9 and one lerp, for a stochastic
sampler with one torch.randn more. Rounds of all candidates are interleaved, each next to its own
unit, and the median over the rounds of the ratio is printed, with everything counted that a user
waits for: the plan of the grid, the loop, the checks. Times are CPU time of the one thread, which
other processes on the machine cannot lengthen by taking turns. *Tiny* is the time of a call on
one number: what is left when the arithmetic is free.
"""

from __future__ import annotations

import argparse
import time
import types
from collections.abc import Callable
from typing import Any

import _peers
import _report
import torch
from _problems import HERE
from torch import Tensor
from tqdm.auto import tqdm

from sde_gen import VP, Exponential, Facts, Heun, Score, Solver, default_solver, grids, solve
from sde_gen.moments import fused

SHAPE, CALLS = (64, 3, 32, 32), 50
Run = Callable[[Tensor], Tensor]


def base(x: Tensor) -> Tensor:
    """The bare work of a deterministic sampler, CALLS times."""
    y = torch.zeros_like(x)
    for _ in range(CALLS):
        y = torch.lerp(x * 0.9, y, 0.5)
    return y


def noisy_base(x: Tensor) -> Tensor:
    """The same with fresh normals."""
    for _ in range(CALLS):
        x = torch.lerp(x * 0.9, torch.randn_like(x), 0.5)
    return x


# --- sde_gen ----------------------------------------------------------------------------------


class Free(Score):
    """A score that costs nothing, of data of standard deviation 0.5."""

    sde, facts = VP(), Facts(SHAPE[1:], 0.5)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        return x


def ours(solver: Solver | None = None, eta: float = 0.0) -> Run:
    """``solve`` on a free score, by default with the default solver."""
    solver = default_solver(Free(), eta) if solver is None else solver
    process = Free.sde.reverse(Free(), eta)
    times = grids.default(Free.sde, CALLS // solver.calls)
    return lambda x: solve(process, x, times, solver, noise=0)


def compiled() -> Run:
    """The default with its sums in one kernel, as ``Pace(compiled=True)`` makes them."""
    run = ours()

    def inside(x: Tensor) -> Tensor:
        with fused():
            return run(x)

    return inside


OURS: dict[str, Callable[[], Run]] = {
    "sde_gen Exponential(1)": lambda: ours(Exponential(1)),
    "sde_gen Exponential(2)": lambda: ours(Exponential(2)),
    "sde_gen Exponential(3, std)": lambda: ours(Exponential(3, 0.25)),
    "sde_gen default": ours,
    "sde_gen default, compiled": compiled,
    "sde_gen Heun": lambda: ours(Heun()),
    "sde_gen default, eta 1": lambda: ours(eta=1.0),
}


# --- peers ------------------------------------------------------------------------------------


def azula(name: str, per: int = 1, **more: Any) -> Run:
    """A sampler with its own schedule and a free denoiser."""
    from azula import denoise, noise, sample

    class Free(denoise.Denoiser):
        schedule = noise.VPSchedule()

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
            return denoise.DiracPosterior(x_t)

    kind = getattr(sample, name + "Sampler")
    return kind(Free(), steps=CALLS // per, silent=True, **more)


def diffusers(name: str, **config: Any) -> Run:
    """A scheduler with its own timesteps, set anew each time as a pipeline does."""
    import diffusers as library

    scheduler = getattr(library, name)(**config)
    steps = CALLS if name != "HeunDiscreteScheduler" else CALLS // 2

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(scheduler.scale_model_input(x, t), t, x, return_dict=False)[0]
        return x

    return run


def k_diffusion(name: str, per: int = 1, **more: Any) -> Run:
    """A sampling function with its own noise (a Brownian tree for the SDEs)."""
    s = _peers.k_sampling().get_sigmas_karras(CALLS // per, 0.02, 10.0)
    function = getattr(_peers.k_sampling(), "sample_" + name)
    return lambda x: function(lambda y, sigma: y, x, s, disable=True, **more)


def smalldiffusion(x: Tensor) -> Tensor:
    """Its one generator, with its own grid."""

    class Free(torch.nn.Module):
        def predict_eps_cfg(self, x: Tensor, *_: Any) -> Tensor:
            return x

        def rand_input(self, n: int) -> Tensor:
            return torch.randn(n, *x.shape[1:])

    accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    library = _peers._part("smalldiffusion", "diffusion")
    sigmas = library.ScheduleLogLinear(1000).sample_sigmas(CALLS)
    for x_t in library.samples(Free(), sigmas, gam=2.0, xt=x, accelerator=accelerator):  # noqa: B007
        pass
    return x_t


def torchdiffeq(x: Tensor) -> Tensor:
    """Its fixed-grid rk4: four calls a step."""
    from torchdiffeq import odeint

    return odeint(lambda t, y: y, x, torch.linspace(1, 0, CALLS // 4 + 1), method="rk4")[-1]


PEERS: dict[str, Callable[[], Run]] = {
    "azula Euler": lambda: azula("Euler"),
    "azula Heun": lambda: azula("Heun", per=2),
    "azula xEAB-3": lambda: azula("xEAB", order=3),
    "azula DDPM, eta 1": lambda: azula("DDPM"),
    "diffusers DDIM": lambda: diffusers("DDIMScheduler", clip_sample=False),
    "diffusers DPM++2M": lambda: diffusers("DPMSolverMultistepScheduler"),
    "diffusers Heun": lambda: diffusers("HeunDiscreteScheduler"),
    "diffusers UniPC-3": lambda: diffusers("UniPCMultistepScheduler", solver_order=3),
    "diffusers SDE-DPM++2M, eta 1": lambda: diffusers(
        "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"
    ),
    "k-diffusion Euler": lambda: k_diffusion("euler"),
    "k-diffusion Heun": lambda: k_diffusion("heun", per=2),
    "k-diffusion DPM++2M": lambda: k_diffusion("dpmpp_2m"),
    "k-diffusion SDE-DPM++2M, eta 1": lambda: k_diffusion("dpmpp_2m_sde"),
    "smalldiffusion": lambda: smalldiffusion,
    "torchdiffeq rk4": lambda: torchdiffeq,
}


def seconds(run: Run, x: Tensor) -> float:
    """CPU seconds of one run."""
    start = time.thread_time()
    with torch.no_grad():
        run(x)
    return time.thread_time() - start


def measure(table: dict[str, Callable[[], Run]], rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds of all candidates: ratio to the unit, and time on one number."""
    x, one = torch.randn(SHAPE), torch.randn(1, 1, 1, 1)
    runs = {name: make() for name, make in table.items()}
    ratio: dict[str, list[float]] = {name: [] for name in runs}
    tiny: dict[str, list[float]] = {name: [] for name in runs}
    unit: list[float] = []
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, run in runs.items():
            yard = noisy_base if name.endswith("eta 1") else base
            seconds(run, one)
            tiny[name].append(seconds(run, one))
            # The unit on both sides of the candidate: a neighbour's load meets all three alike.
            before, spent, after = seconds(yard, x), seconds(run, x), seconds(yard, x)
            ratio[name].append(2 * spent / (before + after))
            if yard is base:
                unit += [before, after]
    median = {name: sorted(r)[len(r) // 2] for name, r in ratio.items()}
    print(f"unit: {min(unit) / CALLS * 1e6:.0f} us a call at best")
    return [
        {
            "name": name,
            "ratio": median[name],
            "lowest": min(ratio[name]),
            "highest": max(ratio[name]),
            "tiny_us": min(tiny[name]) / CALLS * 1e6,
        }
        for name in runs
    ]


def draw(rows: list[dict[str, Any]], path: Any) -> None:
    """Bars, on a logarithmic axis."""
    fig, (ax,) = _report.panels(1, 1, (7.5, 0.26 * len(rows) + 0.4))
    rows = rows[::-1]
    colors = [_report.COLORS[0] if r["name"].startswith("sde_gen") else "0.7" for r in rows]
    ax.barh([r["name"] for r in rows], [r["ratio"] for r in rows], color=colors, height=0.7)
    for i, r in enumerate(rows):
        ax.text(r["ratio"] * 1.04, i, f"{r['ratio']:.1f}", va="center", fontsize=8)
    ax.axvline(1, color="0.3", lw=1)
    ax.set(xscale="log", xlim=(0.8, max(r["ratio"] for r in rows) * 1.6))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", labelsize=8, length=0)
    _report.finish(fig, [], "time of a call / bare work", "", path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds in place of 15")
    parser.add_argument("--only", choices=["sde_gen"], help="leave the peers out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = OURS if args.only else {**OURS, **PEERS}
    rows = measure(table, 3 if args.quick else 15)
    _report.table(
        ["sampler", "ratio to bare work", "range", "tiny: us a call"],
        [
            [
                r["name"],
                f"{r['ratio']:.2f}",
                f"{r['lowest']:.2f} .. {r['highest']:.2f}",
                f"{r['tiny_us']:.0f}",
            ]
            for r in rows
        ],
    )
    stem = f"overhead{'_quick' if args.quick else ''}{'_' + args.only if args.only else ''}"
    draw(rows, HERE / "results" / f"{stem}.png")
    content = {"shape": SHAPE, "calls": CALLS, "rows": rows, "versions": _report.versions()}
    _report.write_json(HERE / "results" / f"{stem}.json", content)


if __name__ == "__main__":
    main()
