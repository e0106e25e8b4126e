"""How far is each posterior sampler from the exact posterior, and is it calibrated?

Laws are mixtures with shared power-law spreads and exact scores, observations random projections
with noise. The exact posterior is a mixture in closed form, so distances are known: sliced
Wasserstein-2 (128 directions) to 4,000 exact draws, in units of the *floor*, the same distance of
as many fresh exact draws as there are particles. Four tables:

1. distance in floors, 16 dimensions, four rows of (measurements, noise), several mixtures each, at
   100 steps; 64 dimensions with 32 measurements; the evidence's error in nats;
2. calibration (ranks, TARP, coverage, chi-square) over many observations, and planted faults;
3. deflated Gibbs from exact draws: it stays at the floor;
4. what a particle step costs beside an unconditional step, for the digits' network.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _report
import torch
from torch import Tensor

from sde_gen import VP, Exponential, Facts, GaussianMixture, Moments, Score, ScoreNetwork, sample
from sde_gen.inverse import (
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
    exact_posterior,
    gibbs,
    log_evidence,
    particles,
)
from sde_gen.metrics import sliced_wasserstein
from sde_gen.networks import UNet

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


class Bed(NamedTuple):
    """A mixture with its moments, and what was observed of some of its draws."""

    law: GaussianMixture
    prior: Score
    truths: Tensor
    seen: Observation


def bed(seed: int, n: int, k: int, m: int, noise: float, observations: int) -> Bed:
    """k modes in n dimensions; axes need no rotation, as A is random."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, n + 1, dtype=F64) ** -0.7
    means = torch.randn(k, n, generator=g, dtype=F64) * scale
    weights = 0.5 + torch.rand(k, generator=g, dtype=F64)
    law = GaussianMixture(SDE, weights, means, (0.3 * scale).expand(k, n))
    pi = weights / weights.sum()
    away = means - pi @ means
    covariance = torch.diag((0.3 * scale) ** 2) + (away.T * pi) @ away
    prior = law.with_facts(Facts((n,), law.facts.std, Moments.of(covariance, pi @ means)))
    a = torch.randn(m, n, generator=g, dtype=F64) / n**0.5
    truths = law.sample(observations, g)
    y = truths @ a.T + noise * torch.randn(observations, m, generator=g, dtype=F64)
    return Bed(law, prior, truths, Observation(Matrix(a), y, noise))


def by_term(b: Bed, rule: Covariance, count: int, eta: float, steps: int = STEPS) -> Tensor:
    """Draws (R, count, n) of a posterior score."""
    r = len(b.truths)
    rows = b.seen.rows(torch.arange(r).repeat_interleave(count))
    posterior = Posterior(b.prior, rows, rule)
    x = sample(posterior, r * count, steps, seed=1, eta=eta, dtype=F64, chunk=20_000)
    return x.reshape(r, count, -1)


# --- 1: distances ------------------------------------------------------------------------------


def distances(b: Bed, draws: Callable[[int], Tensor], floor: list[float], refs: list) -> float:
    """Mean over the observations of the distance in floors."""
    pairs = zip(refs, floor, strict=True)
    found = [sliced_wasserstein(draws(i), ref, 128) / f for i, (ref, f) in enumerate(pairs)]
    return sum(found) / len(found)


def table_of_distances(quick: bool) -> dict[str, Any]:
    """Print and return the mean distance of each method in each row."""
    seeds, observations = (1, 2) if quick else (3, 5)
    cases = [(16, 8, m, s) for m, s in ROWS] + [(64, 20, 32, 0.1), (64, 20, 32, 0.3)]
    result: dict[str, Any] = {}
    for n, k, m, s in cases:
        cells: dict[str, list[float]] = {}
        for seed in range(seeds):
            b = bed(100 * n + 10 * m + seed, n, k, m, s, observations)
            g = torch.Generator().manual_seed(seed)
            exact = [exact_posterior(b.law, b.seen.rows(i)) for i in range(observations)]
            refs = [e.sample(4000, g) for e in exact]
            floor = [
                sum(sliced_wasserstein(e.sample(600, g), ref, 128) for _ in range(3)) / 3
                for e, ref in zip(exact, refs, strict=True)
            ]
            z = log_evidence(b.law, b.seen)
            for name, rule in RULES.items():
                for eta in (0.0, 1.0):
                    if eta == 0 and (quick or name not in ("MMPS, 3 passes", "data covariance")):
                        continue
                    x = by_term(b, rule, 600, eta)
                    d = distances(b, lambda i, x=x: x[i], floor, refs)
                    cells.setdefault(f"{name}, eta {eta:g}", []).append(d)
            for count in (600, 2400):
                if quick and count > 600:
                    continue
                found = particles(b.prior, b.seen, count, STEPS, seed=1, dtype=F64)
                x = found.draw(count)
                name = f"particles, N = {count}"
                cells.setdefault(name, []).append(distances(b, lambda i, x=x: x[i], floor, refs))
                error = (found.log_evidence - z).square().mean().sqrt()
                cells.setdefault(f"log evidence rms, N = {count}", []).append(float(error))
                told = found.standard_error.square().mean().sqrt()
                cells.setdefault(f"its standard error, N = {count}", []).append(float(told))
        result[f"{n}-d, {m} of noise {s:g}"] = {k: sum(v) / len(v) for k, v in cells.items()}
    names = list(next(iter(result.values())))
    rows = [
        [name, *(f"{result[c].get(name, float('nan')):.2f}" for c in result)] for name in names
    ]
    print("\nDistance to the exact posterior in floors, and errors of the evidence in nats\n")
    _report.table(["method", *result], rows)
    return result


# --- 2: calibration ----------------------------------------------------------------------------


def table_of_calibration(quick: bool) -> dict[str, Any]:
    """Print what ``calibrate`` finds of each method and each planted fault."""
    observations, count, steps, draws = (200, 200, 40, 15) if quick else (2000, 300, 60, 31)
    b = bed(7, 16, 8, 4, 0.1, observations)

    def by_particles(noise: float = 1.0) -> Tensor:
        parts = []
        for rows in torch.arange(observations).split(100):
            seen = b.seen.rows(rows)
            told = Observation(seen.operator, seen.y, 0.1 * noise)
            found = particles(b.prior, told, count, steps, seed=int(rows[0]), dtype=F64)
            parts.append(found.draw(draws))
        return torch.cat(parts)

    runs: dict[str, Callable[[], Tensor]] = {
        "particles": by_particles,
        "planted: noise told 20 % too large": lambda: by_particles(1.2),
        "planted: noise told 20 % too small": lambda: by_particles(0.8),
    }
    for name, rule in RULES.items():
        runs[f"{name}, eta 1"] = lambda rule=rule: by_term(b, rule, draws, 1.0, steps)
    result: dict[str, Any] = {}
    for name, run in runs.items():
        found = calibrate(b.truths, run(), b.seen)
        result[name] = {c.name: (c.value, c.low, c.high, c.p) for c in found.checks}
        result[name]["passed"] = found.passed
        print(f"\n{name}\n{found}")
    return result


# --- 3: Gibbs ----------------------------------------------------------------------------------


def table_of_gibbs(quick: bool) -> dict[str, Any]:
    """Print where sweeps from exact draws end."""
    sweeps, result = (5 if quick else 50), {}
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


# --- 4: cost -----------------------------------------------------------------------------------


def table_of_cost(quick: bool) -> dict[str, float]:
    """Print processor time beside an unconditional run."""
    from sklearn.datasets import load_digits

    x = (torch.from_numpy(load_digits().data).float() / 8 - 1).reshape(-1, 1, 8, 8)
    facts = Facts.of(x, rank=32)
    torch.manual_seed(0)
    model = ScoreNetwork(UNet((1, 8, 8)), SDE, facts=facts)
    seen = Observation(Matrix(torch.randn(10, 64) / 8, (1, 8, 8)), torch.randn(10), 0.1)
    n, steps = (64, 4) if quick else (256, 10)
    solver = Exponential(1, facts.moments)

    def term(rule: Covariance) -> Tensor:
        return sample(Posterior(model, seen, rule), n, steps, 0, eta=1.0, solver=solver)

    def plain() -> Tensor:
        return sample(model, n, steps, 0, eta=1.0, solver=solver)

    runs: dict[str, Callable[[], object]] = {
        "particles": lambda: particles(model, seen, n, steps, seed=0),
        **{name: (lambda rule=rule: term(rule)) for name, rule in RULES.items()},
    }
    base = _seconds(plain)
    result = {name: _seconds(run) / base for name, run in runs.items()}
    print("\nCost of a step in unconditional steps (digits' network, 10 projections)\n")
    _report.table(["method", "cost"], [[name, f"{v:.2f}"] for name, v in result.items()])
    return result


def _seconds(run: Callable[[], object]) -> float:
    """Least processor time of three."""
    run()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    """Run the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: few repeats")
    parser.add_argument("--only", choices=("distances", "calibration", "gibbs", "cost"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # collapse is in the tables
    tables = {
        "distances": table_of_distances,
        "calibration": table_of_calibration,
        "gibbs": table_of_gibbs,
        "cost": table_of_cost,
    }
    chosen = [options.only] if options.only else list(tables)
    result = {name: tables[name](options.quick) for name in chosen}
    if not options.quick:
        for name, part in result.items():
            content = {"versions": _report.versions(), name: part}
            _report.write_json(HERE / "results" / f"posterior_{name}.json", content)


if __name__ == "__main__":
    main()
