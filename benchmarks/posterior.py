"""How far is each posterior sampler from the exact posterior, and is it calibrated?

Laws are mixtures with shared power-law spreads and exact scores, observations random projections
with noise. The exact posterior is a mixture in closed form, so distances are known: sliced
Wasserstein-2 (128 directions) to 4,000 exact draws, in units of the *floor*, the same distance of
600 other exact draws. Seven tables:

1. ``distances`` of the terms in floors, 16 dimensions, four rows of (measurements, noise), several
   mixtures each, at 100 steps; 64 dimensions with 32 measurements; the same of ``particles``, and
   the errors of their evidence in nats;
2. ``calibration`` (ranks, TARP, coverage, chi-square) over 2,000 observations with exact scores,
   of every rule, of particles, and of particles with a fault planted in each;
3. ``peers``: the same observations, steps and draws for the samplers of azula and deepinv;
4. ``trained``: calibration over 200 observations with the digits' network, where the truths are
   draws of the network itself, as it is their law whose posterior is drawn from;
5. ``gibbs``: deflated Gibbs from exact draws stays at the floor;
6. ``cost`` of a particle step beside an unconditional step, for the digits' network.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import _posterior_peers
import _report
import torch
from torch import Tensor

from sde_gen import (
    VP,
    Exponential,
    Facts,
    GaussianMixture,
    Moments,
    Score,
    ScoreNetwork,
    data,
    grids,
    sample,
)
from sde_gen.demo.models import train_models
from sde_gen.inverse import (
    Calibration,
    Covariance,
    DataCovariance,
    Isotropic,
    Matrix,
    Observation,
    Point,
    Posterior,
    Tweedie,
    TweedieDiagonal,
    calibrate,
    dps,
    exact_posterior,
    gibbs,
    log_evidence,
    particles,
)
from sde_gen.inverse.cloud import Cloud, Draws
from sde_gen.metrics import sliced_wasserstein
from sde_gen.networks import UNet
from sde_gen.solvers import ddpm
from sde_gen.training import load

F64 = torch.float64
SDE = VP()
HERE = Path(__file__).parent
ROWS = ((1, 0.05), (4, 0.05), (4, 0.3), (8, 0.1))
STEPS = 100
RULES: dict[str, Covariance] = {
    "DPS (likelihood scale)": Point(),
    "PiGDM": Isotropic(1.0),
    "isotropic, V of the data": Isotropic(),
    "TMPD": TweedieDiagonal(),
    "data covariance, no Jacobian": DataCovariance(),
    "data covariance": DataCovariance(jacobian=True),
    "MMPS, 1 pass": Tweedie(1),
    "MMPS, 3 passes": Tweedie(3),
}


TWISTS: tuple[tuple[int, int, Covariance], ...] = (
    (600, STEPS, DataCovariance()),
    (1200, STEPS // 2, DataCovariance()),
    (2400, STEPS, DataCovariance()),
    (600, STEPS, Tweedie()),
)
"""Particles, steps and the rule of their twist; as many draws as particles, or 600 of 1,200."""


class Plan(NamedTuple):
    """How much is run, and where."""

    quick: bool
    device: torch.device
    observations: int | None
    model: Path | None
    minutes: float

    def batch(self, cpu: int) -> int:
        """States at once: what fits a cache here, and what fills a GPU there."""
        return cpu if self.device.type == "cpu" else 30 * cpu


class Bed(NamedTuple):
    """A law with its moments, and what was observed of some of its draws."""

    law: Score
    prior: Score
    truths: Tensor
    seen: Observation


def bed(
    seed: int,
    n: int,
    k: int,
    m: int,
    noise: float,
    observations: int,
    device: torch.device | str = "cpu",
) -> Bed:
    """k modes in n dimensions; axes need no rotation, as A is random."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, n + 1, dtype=F64) ** -0.7
    means = torch.randn(k, n, generator=g, dtype=F64) * scale
    weights = 0.5 + torch.rand(k, generator=g, dtype=F64)
    std = (0.3 * scale).expand(k, n)
    law = GaussianMixture(SDE, weights, means, std)
    pi = weights / weights.sum()
    away = means - pi @ means
    covariance = torch.diag((0.3 * scale) ** 2) + (away.T * pi) @ away
    facts = Facts((n,), law.facts.std, Moments.of(covariance, pi @ means))
    a = torch.randn(m, n, generator=g, dtype=F64) / n**0.5
    truths = law.sample(observations, g)
    y = truths @ a.T + noise * torch.randn(observations, m, generator=g, dtype=F64)
    law = GaussianMixture(SDE, *(x.to(device) for x in (weights, means, std)))
    seen = Observation(Matrix(a.to(device)), y.to(device), noise)
    return Bed(law, law.with_facts(facts), truths.to(device), seen)


def by_term(
    b: Bed,
    rule: Covariance,
    count: int,
    eta: float,
    steps: int = STEPS,
    chunk: int = 20_000,
    **more: Any,
) -> Tensor:
    """Draws (R, count, *D) of a posterior score."""
    r = len(b.truths)
    rows = b.seen.rows(torch.arange(r).repeat_interleave(count))
    posterior = Posterior(b.prior, rows, rule)
    dtype = b.truths.dtype
    x = sample(posterior, r * count, steps, seed=1, eta=eta, dtype=dtype, chunk=chunk, **more)
    return x.reshape(r, count, *b.truths.shape[1:])


# --- 1: distances ------------------------------------------------------------------------------


def distances(b: Bed, draws: Callable[[int], Tensor], floor: list[float], refs: list) -> float:
    """Mean over the observations of the distance in floors."""
    pairs = zip(refs, floor, strict=True)
    found = [sliced_wasserstein(draws(i), ref, 128) / f for i, (ref, f) in enumerate(pairs)]
    return sum(found) / len(found)


Judge = Callable[[Tensor], float]
"""Draws (R, count, n) -> their distance to the exact posterior in floors."""


def judge_of(b: Bed, seed: int) -> Judge:
    """Against 4,000 exact draws for each observation, beside 600 others."""
    g = torch.Generator().manual_seed(seed)
    exact = [exact_posterior(b.law, b.seen.rows(i)) for i in range(len(b.truths))]
    refs = [e.sample(4000, g) for e in exact]
    floor = [
        sum(sliced_wasserstein(e.sample(600, g), ref, 128) for _ in range(3)) / 3
        for e, ref in zip(exact, refs, strict=True)
    ]
    return lambda x: distances(b, lambda i: x[i], floor, refs)


def of_terms(b: Bed, there: Bed, judge: Judge, quick: bool) -> dict[str, float]:
    """Every rule at eta = 1, the exact ones for Gaussian data at eta = 0 too."""
    found = {}
    for name, rule in RULES.items():
        for eta in (0.0, 1.0):
            if eta == 0 and (quick or name not in ("MMPS, 3 passes", "data covariance")):
                continue
            found[f"{name}, eta {eta:g}"] = judge(by_term(there, rule, 600, eta).cpu())
    return found


def of_particles(b: Bed, there: Bed, judge: Judge, quick: bool) -> dict[str, float]:
    """Particles, the error of their evidence, and the error that they tell."""
    z, result = log_evidence(b.law, b.seen), {}
    for count, steps, rule in TWISTS[:1] if quick else TWISTS:
        if isinstance(rule, Tweedie) and b.truths.shape[1] > 16 and not there.truths.is_cuda:
            continue  # half an hour on a CPU
        name = f"particles, {type(rule).__name__}, N = {count}, {steps} steps"
        found = particles(
            there.prior, there.seen, count, steps, seed=1, covariance=rule, dtype=F64
        )
        result[name] = judge(found.draw(600 if steps < STEPS else count).cpu())
        off = found.log_evidence.cpu() - z
        result[f"{name}: evidence"] = float(off.square().mean().sqrt())
        result[f"{name}: its bar"] = float(found.standard_error.square().mean().sqrt())
    return result


def table_of_distances(
    plan: Plan, methods: Callable[[Bed, Bed, Judge, bool], dict[str, float]]
) -> dict[str, Any]:
    """Print and return the mean distance of each method in each row."""
    seeds, observations = (1, 2) if plan.quick else (3, 5)
    cases = [(16, 8, m, s) for m, s in ROWS] + [(64, 20, 32, 0.1), (64, 20, 32, 0.3)]
    result: dict[str, Any] = {}
    for n, k, m, s in cases:
        cells: dict[str, list[float]] = {}
        for seed in range(seeds):
            key = 100 * n + 10 * m + seed
            b = bed(key, n, k, m, s, observations)
            there = bed(key, n, k, m, s, observations, plan.device)
            for name, value in methods(b, there, judge_of(b, seed), plan.quick).items():
                cells.setdefault(name, []).append(value)
        result[f"{n}-d, {m} of noise {s:g}"] = {k: sum(v) / len(v) for k, v in cells.items()}
        print(result, flush=True)
    names = list(next(iter(result.values())))
    rows = [
        [name, *(f"{result[c].get(name, float('nan')):.2f}" for c in result)] for name in names
    ]
    print("\nDistance to the exact posterior in floors, and errors of the evidence in nats\n")
    _report.table(["method", *result], rows)
    return result


# --- 2 to 4: calibration -----------------------------------------------------------------------


class Amount(NamedTuple):
    """Particles and steps of a run, draws kept of it, and states at once."""

    count: int
    steps: int
    draws: int
    batch: int


class LastDropped(Cloud):
    """Planted: the weights since the last resampling are not used, as in azula's TDS."""

    def finish(self) -> None:
        """All weigh the same."""
        super().finish()
        self.log_w = torch.full_like(self.log_w, -math.log(self.log_w.shape[1]))


class Forgetful(Cloud):
    """Planted: a weight is lost where nothing is resampled, as in FK steering's adaptive mode."""

    def resample(self, noise: Draws, t: float) -> Tensor | None:
        """Then all weigh the same, whoever was chosen."""
        chosen = super().resample(noise, t)
        self.log_w = torch.zeros_like(self.log_w)
        return chosen


def by_particles(
    b: Bed,
    amount: Amount,
    told: float = 1.0,
    cloud: type = Cloud,
    rule: Covariance | None = None,
) -> Tensor:
    """Draws (R, draws, *D) of particles that are told ``told`` times the noise."""
    parts, each = [], max(1, amount.batch // amount.count)
    module = importlib.import_module("sde_gen.inverse.particles")
    std = b.seen.std
    assert std is not None
    with mock.patch.object(module, "Cloud", cloud):
        for rows in torch.arange(len(b.truths)).split(each):
            seen = b.seen.rows(rows)
            found = particles(
                b.prior,
                Observation(seen.operator, seen.y, told * std),
                amount.count,
                amount.steps,
                seed=int(rows[0]),
                covariance=rule,
                dtype=b.truths.dtype,
                chunk=amount.batch,
            )
            parts.append(found.draw(amount.draws))
    return torch.cat(parts)


def methods(b: Bed, amount: Amount) -> dict[str, Callable[[], Tensor]]:
    """Particles, with and without planted faults, and every rule at eta = 1."""
    runs: dict[str, Callable[[], Tensor]] = {
        "particles": partial(by_particles, b, amount),
        "planted: noise told 20 % too large": partial(by_particles, b, amount, 1.2),
        "planted: noise told 20 % too small": partial(by_particles, b, amount, 0.8),
        "planted: last weights dropped": partial(by_particles, b, amount, cloud=LastDropped),
        "planted: weights forgotten": partial(by_particles, b, amount, cloud=Forgetful),
    }
    if b.truths.is_cuda:  # minutes there, hours on a CPU
        runs["particles, Tweedie"] = partial(by_particles, b, amount, rule=Tweedie())
    term = partial(by_term, b, count=amount.draws, eta=1.0, steps=amount.steps, chunk=amount.batch)
    times = grids.default(SDE, amount.steps, to_zero=True, data_std=b.prior.facts.std)
    published = partial(term, dps(SDE, times), solver=ddpm(), times=times)
    return {
        **runs,
        "DPS (published)": published,
        **{name: partial(term, rule) for name, rule in RULES.items()},
    }


def tabulate(b: Bed, runs: dict[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Print and return what ``calibrate`` finds of each run, and how long it took."""
    result: dict[str, Any] = {}
    rows = []
    for name, run in runs.items():
        start = time.perf_counter()
        draws = run().cpu()
        seconds = time.perf_counter() - start
        # calibrate lives on the CPU, but its chi-square asks the operator.
        found = calibrate(b.truths, draws.to(b.truths), b.seen)
        result[name] = {c.name: (c.value, c.low, c.high, c.p) for c in found.checks}
        result[name] |= {"passed": found.passed, "seconds": round(seconds, 1)}
        rows.append(_line(name, found, seconds))
        print(f"{name}: {seconds:.0f} s\n{found}\n", flush=True)
    heads = ["method", "lines failed", "ranks, KS", "TARP", "90 % intervals", "chi-square, KS"]
    print()
    _report.table([*heads, "seconds"], rows)
    return result


def _line(name: str, found: Calibration, seconds: float) -> list[str]:
    value = {c.name: c.value for c in found.checks}
    return [
        name,
        f"{len(found.failed)} of {len(found.checks)}",
        f"{value['ranks, KS (Holm)']:.3f}",
        f"{value['TARP']:.3f}",
        f"{value['90% interval, least']:.3f} .. {value['90% interval, most']:.3f}",
        f"{value['chi-square, KS']:.3f}",
        f"{seconds:.0f}",
    ]


def _mixture(plan: Plan, device: torch.device | str) -> tuple[Bed, Amount]:
    observations = plan.observations or (200 if plan.quick else 2000)
    b = bed(7, 16, 8, 4, 0.1, observations, device)
    if plan.quick:
        return b, Amount(200, 40, 15, plan.batch(20_000))
    return b, Amount(300, 60, 31, plan.batch(20_000))


def table_of_calibration(plan: Plan) -> dict[str, Any]:
    """With exact scores: every method and each planted fault."""
    b, amount = _mixture(plan, plan.device)
    return tabulate(b, methods(b, amount))


def table_of_peers(plan: Plan) -> dict[str, Any]:
    """The same, of the peers' own samplers: on the CPU, where they can be imported."""
    b, amount = _mixture(plan, "cpu")
    runs, missing = _posterior_peers.table()
    for library, why in missing.items():
        print(f"left out: {library}: {why}")

    def by_peer(run: _posterior_peers.Run) -> Tensor:
        torch.manual_seed(1)
        parts = torch.arange(len(b.truths)).split(100)  # which fit the cache
        return torch.cat([run(b.law, b.seen.rows(i), amount.draws, amount.steps) for i in parts])

    found = tabulate(b, {name: partial(by_peer, run) for name, run in runs.items()})
    return {"left out": missing, **found}


def table_of_trained(plan: Plan) -> dict[str, Any]:
    """With the digits' network, of whose own draws 10 projections are seen."""
    train = data.digits("train")
    net = load(plan.model) if plan.model else train_models(train, plan.minutes).score
    net = net.to(plan.device)
    facts = replace(net.facts, moments=Facts.of(train.x, rank=32).moments)
    prior, g = net.with_facts(facts), torch.Generator().manual_seed(0)
    r = plan.observations or (40 if plan.quick else 200)
    fine = Exponential(1, facts.moments)
    truths = sample(prior, r, 50 if plan.quick else 500, 12345, eta=1.0, solver=fine)
    a = torch.randn(10, 64, generator=g) / 8
    y = truths.flatten(1).cpu() @ a.T + 0.1 * torch.randn(r, 10, generator=g)
    seen = Observation(Matrix(a.to(plan.device), (1, 8, 8)), y.to(plan.device), 0.1)
    fitting = (300, 60, 31) if plan.device.type == "cuda" else (100, 30, 15)
    size = (50, 15, 7) if plan.quick else fitting
    b = Bed(prior, prior, truths, seen)
    return tabulate(b, methods(b, Amount(*size, plan.batch(2_000))))


# --- 5: Gibbs ----------------------------------------------------------------------------------


def table_of_gibbs(plan: Plan) -> dict[str, Any]:
    """Print where sweeps from exact draws end."""
    sweeps, result = (5 if plan.quick else 50), {}
    for m, s in ROWS:
        b = bed(m, 16, 8, m, s, 1)
        exact, g = exact_posterior(b.law, b.seen.rows(0)), torch.Generator().manual_seed(0)
        reference = exact.sample(4000, g)
        start = exact.sample(600, g)
        moved = gibbs(b.prior, b.seen.rows(0), start, sweeps, seed=0)
        floor = sum(sliced_wasserstein(exact.sample(600, g), reference, 128) for _ in range(3)) / 3
        result[f"{m} of noise {s:g}"] = sliced_wasserstein(moved, reference, 128) / floor
    print(f"\nDeflated Gibbs, {sweeps} sweeps of 8 calls from exact draws, in floors\n")
    _report.table(list(result), [[f"{v:.2f}" for v in result.values()]])
    return result


# --- 6: cost -----------------------------------------------------------------------------------


def table_of_cost(plan: Plan) -> dict[str, Any]:
    """Print the time beside that of an unconditional run."""
    x = data.digits("train").x
    facts = Facts.of(x, rank=32)
    torch.manual_seed(0)
    model = ScoreNetwork(UNet((1, 8, 8)), SDE, facts=facts).to(plan.device)
    a = (torch.randn(10, 64) / 8).to(plan.device)
    seen = Observation(Matrix(a, (1, 8, 8)), torch.randn(10).to(plan.device), 0.1)
    result = {}
    for n in (64,) if plan.quick else (256,) if plan.device.type == "cpu" else (256, 4096):
        result[f"{n} states"] = _costs(plan, model, seen, n, 4 if plan.quick else 10)
    names = list(next(iter(result.values())))
    rows = [[name, *(f"{part[name]:.4g}" for part in result.values())] for name in names]
    print("\nCost of a step in unconditional steps (digits' network, 10 projections)\n")
    _report.table(["method", *result], rows)
    return result


def _costs(plan: Plan, model: Score, seen: Observation, n: int, steps: int) -> dict[str, float]:
    solver = Exponential(1, model.facts.moments)

    def term(rule: Covariance) -> Tensor:
        return sample(Posterior(model, seen, rule), n, steps, 0, eta=1.0, solver=solver)

    runs: dict[str, Callable[[], object]] = {
        "particles": lambda: particles(model, seen, n, steps, seed=0),
        "particles, Tweedie": lambda: particles(
            model, seen, n, steps, seed=0, covariance=Tweedie()
        ),
        **{name: partial(term, rule) for name, rule in RULES.items()},
    }
    base = _seconds(lambda: sample(model, n, steps, 0, eta=1.0, solver=solver), plan.device)
    costs = {name: _seconds(run, plan.device) / base for name, run in runs.items()}
    return {"an unconditional step, ms": 1000 * base / steps, **costs}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least of five: processor time on a CPU, elapsed time between two events on a GPU."""
    run()
    found = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            found.append(start.elapsed_time(end) / 1000)
        else:
            begun = time.process_time()
            run()
            found.append(time.process_time() - begun)
    return min(found)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


TABLES = {
    "distances": partial(table_of_distances, methods=of_terms),
    "particles": partial(table_of_distances, methods=of_particles),
    "calibration": table_of_calibration,
    "peers": table_of_peers,
    "trained": table_of_trained,
    "gibbs": table_of_gibbs,
    "cost": table_of_cost,
}
ON_CPU = ("peers", "gibbs")


def main() -> None:
    """Run the tables that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="some minutes: few repeats, no files")
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--device", default="cpu", help="of all but peers and gibbs")
    parser.add_argument("--observations", type=int, help="in place of 2,000 and 200")
    parser.add_argument("--model", type=Path, help="a folder with a trained network of digits")
    parser.add_argument("--minutes", type=float, default=1.25, help="of training without --model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # collapse is in the tables
    device = torch.device(args.device)
    plan = Plan(args.quick, device, args.observations, args.model, args.minutes)
    for name in args.only:
        where = _name(torch.device("cpu") if name in ON_CPU else device)
        print(f"\n== {name}, {where} ==\n", flush=True)
        start = time.perf_counter()
        part = TABLES[name](plan)
        seconds = round(time.perf_counter() - start, 1)
        print(f"\n{name}: {seconds:.0f} seconds on {where}")
        if not args.quick and args.observations is None:
            content = {"versions": _report.versions(), "device": where, "seconds": seconds}
            path = HERE / "results" / f"posterior_{name}.json"
            _report.write_json(path, {**content, name: part})


if __name__ == "__main__":
    main()
