"""A trained network on digits: what comes from the steps, the score and the prior.

1. *Steps*: the endpoint error of every sampler on the flow of the trained network itself, against
   a reference solution of that flow, as in ``error_vs_calls.py``.
2. *Budget* (``error_budget``): the distance between generated and real digits, and what each cause
   adds to it. From noised test images along a converged flow only the score's error is there; from
   the prior the mismatch of the prior joins it, and with few calls the error of the steps. The
   energy distance is unbiased (0 for equal laws); test images in place of samples are the floor.

The network is the one of ``sde-gen demo``, trained here for ``--minutes`` and kept.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from dataclasses import fields
from typing import Any

import _peers
import _report
import torch
from _problems import CACHE, F64, HERE, Case
from error_vs_calls import (
    CALLS,
    draw,
    flow,
    print_case,
    print_ranking,
    ranking,
    rounded,
    run_fixed,
)
from torch import Tensor
from tqdm.auto import tqdm

from sde_gen import ScoreNetwork, Streams, data, error_budget, tune_solver
from sde_gen.demo.models import train_models
from sde_gen.metrics import energy_distance, sliced_wasserstein
from sde_gen.training import load, save
from sde_gen.tuning import ROWS

FAMILIES = {
    "azula": ("xEAB-2", "xEAB-3", "zEAB-3", "zEAB-4", "vAB-3"),
    "diffusers": ("DDIM", "DPM++2M", "DPM++3M", "UniPC-2", "UniPC-3", "iPNDM"),
    "k-diffusion": ("Heun", "DPM++2M"),
    "smalldiffusion": ("gam-2",),
}
TRIALS = 128
"""Trajectories in each set of the tuning."""
GRIDS = ("VE", "VP", "exp", "K7", "t", "Rect")


class Trained(Case):
    """The case of a trained, class-conditional network on VP, in the precision of its weights."""

    def __init__(self, network: ScoreNetwork, n: int, seed: int = 0) -> None:
        self.problem, self.range, self.seed, self.end = "trained", "vp", seed, 1e-3
        self.sde, self.network, self.calls, self.rows = network.sde, network, 0, 0
        self.score: Any = network.given(y=torch.arange(n) % 10)
        self.s_max, self.s_min = (self.level(t) for t in (self.sde.T, self.end))
        z = Streams(seed).start(torch.empty(n, 1, 8, 8, dtype=F64))
        self.x = float(self.sde.sigma(self.sde.T)) * z
        self.y = self.x / float(self.sde.alpha(self.sde.T))

    @property
    def key(self) -> str:
        weights = b"".join(p.detach().numpy().tobytes() for p in self.network.parameters())
        return hashlib.blake2b(weights, digest_size=6).hexdigest()

    @property
    def moments(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = data.digits("train").x.flatten(1).double()
        return x.mean(0), x.T.cov()

    def denoise(self, y: Tensor, s: Tensor | float) -> Tensor:
        self.count(y)
        t = self.sde.time_at(-2 * torch.log(torch.as_tensor(s, dtype=F64)))
        t = t.clamp(self.end, self.sde.T)
        with torch.no_grad():
            x = (self.sde.alpha(t) * y.double()).to(next(self.network.parameters()).dtype)
            return self.score.denoise(x, t).double()


def network(minutes: float, seed: int = 0) -> ScoreNetwork:
    """The demo's network: from the cache, or trained now."""
    folder = CACHE / f"digits-{minutes:g}-{seed}"
    if not (folder / "config.json").exists():
        save(train_models(data.digits("train"), minutes, seed).score, folder)
    return load(folder)


def steps(case: Trained, calls: tuple[int, ...]) -> dict[str, Any]:
    """Endpoint errors on the network's own flow: the peers' best known samplers, and ours."""
    wanted = {
        f"{library} {name} {grid}"
        for library, names in FAMILIES.items()
        for name in names
        for grid in GRIDS
    }
    peers = {k: run for k, run in _peers.table().items() if k in wanted}
    many = case.network.given(y=torch.arange(ROWS * TRIALS) % 10)
    # Three numbers of calls; the others take the nearest, which costs a fifth of fitting all.
    few = [k for k in calls if k in (5, 10, 20)]
    tuned = tune_solver(many, steps=few, n=TRIALS, end=case.end, seed=1000)
    print(tuned, flush=True)
    ours: dict[str, _peers.Run] = {
        "sde_gen default (std)": flow,
        "sde_gen tuned solver (std)": lambda c, n: flow(c, n, tuned, tuned.grid),
        "sde_gen covariance": lambda c, n: flow(c, n, covariance=True),
    }
    return {
        "peers": rounded({k: run_fixed(case, calls, r) for k, r in tqdm(peers.items(), "peers")}),
        "sde_gen": rounded({k: run_fixed(case, calls, r) for k, r in ours.items()}),
    }


def budget(net: ScoreNetwork, n: int, fine: int) -> list[dict[str, Any]]:
    """Distance of n images to the real training images, and what of it each cause adds."""
    train, test = (data.digits(split) for split in ("train", "test"))
    score = net.given(y=test.y[:n])
    rows = []
    for name, distance in (("energy", energy_distance), ("sliced W2", sliced_wasserstein)):
        for calls in tqdm((5, 10, 20), name):
            found = error_budget(
                score, test.x[:n], calls, fine=fine, real=train.x, distance=distance
            )
            parts = {f.name: getattr(found, f.name) for f in fields(found)}
            terms = {
                part: [float(term), float(term.standard_error)] for part, term in parts.items()
            }
            rows.append({"distance": name, "calls": calls, **terms})
    return rows


def print_budget(rows: list[dict[str, Any]]) -> None:
    """A line a number of calls: the floor and what is added to it."""
    heads = ["floor", "score", "prior", "discretisation", "total"]
    print("\nGenerated against real digits: distance, and what each cause adds to it")
    _report.table(
        ["distance", "calls", *heads],
        [
            [r["distance"], str(r["calls"]), *(f"{r[h][0]:.4f} +- {r[h][1]:.4f}" for h in heads)]
            for r in rows
        ],
    )


def main() -> None:
    """Train or load, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.25, help="of training")
    parser.add_argument("--quick", action="store_true", help="6 seconds of training, few calls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = network(0.1 if args.quick else args.minutes)
    calls = (5, 10) if args.quick else CALLS
    case = Trained(copy.deepcopy(net).double(), 32 if args.quick else 128)
    known = steps(case, calls)
    print_case("digits, trained network", known, calls)
    rank = ranking({"trained": known}, calls)
    print_ranking("the network's own flow", rank)
    rows = budget(net, *((100, 40) if args.quick else (len(data.digits("test").x), 100)))
    print_budget(rows)
    stem = HERE / "results" / f"trained_digits{'_quick' if args.quick else ''}"
    draw({"digits, trained network": known}, calls, rank, stem.with_suffix(".png"))
    content = {"steps": known, "ranking": rank, "budget": rows, "versions": _report.versions()}
    _report.write_json(stem.with_suffix(".json"), content)


if __name__ == "__main__":
    main()
