"""A trained network on digits: what comes from the steps, the score and the prior.

1. *Steps*: the endpoint error of every sampler on the flow of the trained network itself, against
   a reference solution of that flow, as in ``error_vs_calls.py``.
2. *Budget*: the distance between generated and real digits, as its causes are taken away one after
   the other. From noised real images along a converged flow only the score's error is left; from
   the prior the mismatch of the prior joins it, and with few calls the error of the steps. The
   energy distance is unbiased (0 for equal laws); real test images in place of samples give the
   floor of both.

The network is the one of ``sde-gen demo``, trained here for ``--minutes`` and kept.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from typing import Any

import _peers
import _report
import torch
from _problems import CACHE, F64, HERE, Case, Model
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

from sde_gen import ScoreNetwork, Streams, data, grids, solve
from sde_gen.demo.models import train_models
from sde_gen.metrics import energy_distance, sliced_wasserstein
from sde_gen.sampling import default_solver
from sde_gen.training import load, save

FAMILIES = {
    "azula": ("xEAB-2", "xEAB-3", "zEAB-3", "zEAB-4", "vAB-3"),
    "diffusers": ("DDIM", "DPM++2M", "DPM++3M", "UniPC-2", "UniPC-3", "iPNDM"),
    "k-diffusion": ("Heun", "DPM++2M"),
    "smalldiffusion": ("gam-2",),
}
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
            return self.sde.denoise(x, t, self.score).double()


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
    ours: dict[str, _peers.Run] = {
        "sde_gen default (std)": flow,
        "sde_gen covariance": lambda c, n: flow(c, n, covariance=True),
    }
    return {
        "peers": rounded({k: run_fixed(case, calls, r) for k, r in tqdm(peers.items(), "peers")}),
        "sde_gen": rounded({k: run_fixed(case, calls, r) for k, r in ours.items()}),
    }


def generated(case: Trained, x: Tensor, calls: int, covariance: bool = False) -> Tensor:
    """From states at T to images, along the default flow."""
    model = Model(case, covariance)
    times = grids.default(case.sde, calls, end=case.end, data_std=model.data_std)
    process = case.sde.probability_flow(model)
    with torch.no_grad():
        return solve(process, x, times, default_solver(model)) / case.sde.alpha(case.end)


def budget(net: ScoreNetwork, n: int, converged: int, seeds: int) -> list[dict[str, Any]]:
    """Distance of n images to the real training images, cause by cause."""
    train, test = (data.digits(split).x.double() for split in ("train", "test"))
    test = test[:n]
    labels = data.digits("train").y
    rows = [row("real test images: the floor", "", [test], train)]
    images: dict[tuple[str, int], list[Tensor]] = {}
    for seed in tqdm(range(seeds), "budget"):
        case = Trained(net, len(test), seed)
        chosen = torch.cat([(labels == c).nonzero()[: len(test) // 10] for c in range(10)])[:, 0]
        chosen = chosen.reshape(10, -1).T.flatten()
        generator = torch.Generator().manual_seed(seed)
        noised = case.sde.perturb(train[chosen], case.sde.T, generator).x
        starts = {"noised real images": noised, "the prior": case.x}
        for start, x in starts.items():
            for k in (converged, 20, 10, 5) if start == "the prior" else (converged,):
                images.setdefault((start, k), []).append(generated(case, x, k))
    causes = {("noised real images", converged): "score", ("the prior", converged): "score, prior"}
    for key, found in images.items():
        rows.append(row(f"{key[0]}, {key[1]} calls", causes.get(key, "all three"), found, train))
    return rows


def row(name: str, causes: str, found: list[Tensor], train: Tensor) -> dict[str, Any]:
    """Mean and standard deviation over seeds of both distances."""
    pairs = [(energy_distance(x, train), sliced_wasserstein(x, train)) for x in found]
    values = torch.tensor(pairs, dtype=F64)
    std = values.std(0) if len(found) > 1 else torch.full((2,), float("nan"), dtype=F64)
    return {
        "from": name,
        "errors of": causes,
        "energy": [float(values[:, 0].mean()), float(std[0])],
        "sliced W2": [float(values[:, 1].mean()), float(std[1])],
    }


def print_budget(rows: list[dict[str, Any]]) -> None:
    """Distance after distance."""

    def cell(pair: list[float], scale: float = 1) -> str:
        spread = "" if pair[1] != pair[1] else f" +- {scale * pair[1]:.3f}"
        return f"{scale * pair[0]:.3f}{spread}"

    print("\nGenerated against real digits")
    _report.table(
        ["start", "errors of", "energy distance x 100", "sliced W2"],
        [[r["from"], r["errors of"], cell(r["energy"], 100), cell(r["sliced W2"])] for r in rows],
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
    rows = budget(net, *((100, 40, 2) if args.quick else (400, 100, 3)))
    print_budget(rows)
    stem = HERE / "results" / f"trained_digits{'_quick' if args.quick else ''}"
    draw({"digits, trained network": known}, calls, rank, stem.with_suffix(".png"))
    content = {"steps": known, "ranking": rank, "budget": rows, "versions": _report.versions()}
    _report.write_json(stem.with_suffix(".json"), content)


if __name__ == "__main__":
    main()
