"""Is a conditional score the score of the posterior? Two simulators whose posteriors are known.

A network is trained on pairs of parameters and what a simulator made of them; given an
observation it is sampled, and the draws are held against exact ones:

- *linear Gaussian*: seen = A theta + noise. The posterior is Gaussian, its mean and covariance in
  closed form.
- *two moons* (Greenberg et al. 2019; Lueckmann et al. 2021, task T.8): the posterior is two thin
  crescents, whose exact draws come from inverting the simulator. A classifier is trained to tell
  draws from exact ones (C2ST): 0.5 is chance.

Both are then tested by ranks (``inverse.calibrate``) over observations that the prior made.
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

import sde_gen as sg
from sde_gen.inverse import calibrate
from sde_gen.networks import MLP
from sde_gen.training import Denoising, Layout, LogNormalTimes

HERE = Path(__file__).parent
A = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [1.0, 1.0]])
NOISE = 0.7
PAIRS = 500_000
Simulator = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def linear(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """theta ~ N(0, I) (n, 2) and A theta + noise (n, 3)."""
    theta = torch.randn(n, 2, generator=generator)
    return theta, theta @ A.T + NOISE * torch.randn(n, 3, generator=generator)


def linear_posterior(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Its mean and covariance given one observation (3,)."""
    c = torch.linalg.inv(torch.eye(2) + A.T @ A / NOISE**2)
    return c @ A.T @ seen / NOISE**2, c


def _crescent(n: int, generator: torch.Generator) -> Tensor:
    a = math.pi * (torch.rand(n, generator=generator) - 0.5)
    r = 0.1 + 0.01 * torch.randn(n, generator=generator)
    return torch.stack([r * a.cos() + 0.25, r * a.sin()], 1)


def moons(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """theta ~ U[-1, 1]^2 (n, 2) and what the simulator makes of it (n, 2)."""
    theta = 2 * torch.rand(n, 2, generator=generator) - 1
    shift = torch.stack([-theta.sum(1).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return theta, _crescent(n, generator) + shift


def moons_posterior(seen: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Exact draws given one observation (2,). theta -> crescent is a rotation on either side of
    theta_1 + theta_2 = 0, so that each place of the crescent is as likely as it is there."""
    found: list[Tensor] = []
    while sum(map(len, found)) < n:
        u = math.sqrt(2) * (_crescent(4 * n, generator) - seen)
        sign = torch.where(torch.rand(len(u), generator=generator) < 0.5, -1.0, 1.0)
        total, difference = sign * u[:, 0], -u[:, 1]
        theta = torch.stack([total - difference, total + difference], 1) / 2
        found.append(theta[(u[:, 0] >= 0) & (theta.abs() <= 1).all(1)])
    return torch.cat(found)[:n]


def c2st(x: Tensor, y: Tensor, seed: int = 0) -> float:
    """The share of x and y that a perceptron tells apart in five folds (Lueckmann et al. 2021)."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, std = x.mean(0), x.std(0)
    data = ((torch.cat([x, y]) - mean) / std).double().numpy()
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(x), len(y)])).numpy()
    width = 10 * x.shape[1]
    judge = MLPClassifier((width, width), max_iter=1000, solver="adam", random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(judge, data, labels, cv=folds).mean())


def trained(
    simulate: Simulator, steps: int, batch: int, seed: int, lr: float, times: Any
) -> tuple[sg.ScoreNetwork, float]:
    """p(theta | seen) learned from pairs, and the seconds of one thread."""
    theta, seen = simulate(PAIRS, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    net = MLP((2,), 128, 4, context={"seen": seen.shape[1:]})
    model = sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts.of(theta))
    start = time.process_time()
    model = sg.train(
        model,
        theta,
        context={"seen": seen},
        recipe=sg.Recipe(steps=steps, batch=batch, lr=lr, seed=seed, layout=Layout()),
        progress=False,
        device="cpu",
        objective=Denoising(times=times, dropout=0.0),
    )
    return model, time.process_time() - start


def ranks(model: sg.ScoreNetwork, simulate: Simulator, calls: int) -> dict[str, Any]:
    """Ranks of 300 truths among 100 draws each."""
    truths, seen = simulate(300, torch.Generator().manual_seed(77))
    given = model.given(seen=seen.repeat_interleave(100, 0))
    draws = sg.sample(given, 30_000, calls, seed=3).reshape(300, 100, 2)
    found = calibrate(truths, draws, projections=8)
    print(found)
    return {"passed": found.passed, "failed": list(found.failed)} | {
        check.name: check.value for check in found.checks
    }


def gaussian(steps: int, seed: int) -> dict[str, Any]:
    """Means and variances given ten observations, beside the exact ones; the same of the exact
    score, whose errors are those of the draws and of the solver."""
    model, seconds = trained(linear, steps, 256, seed, 3e-3, LogNormalTimes())
    _, seen = linear(10, torch.Generator().manual_seed(5))
    exact: list[sg.Score] = []
    for m, c in map(linear_posterior, seen):
        exact.append(sg.Gaussian(model.sde, m, covariance=c))
        exact[-1].facts = model.facts  # it solves as the network does, who knows the prior alone
    return {
        "seconds": seconds,
        **moments_beside([model.given(seen=row) for row in seen], seen),
        "exact score": moments_beside(exact, seen),
        "ranks": ranks(model, linear, 20),
    }


def moments_beside(scores: list[sg.Score], seen: Tensor) -> dict[str, float]:
    """How far the moments of 2^14 draws from each are from those of the posterior of each row.

    The draws start at scrambled Sobol points made normal: a variance of 20,000 independent ones
    would be off by 1 %, a third of what is to be seen.
    """
    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=1).draw(2**14, dtype=torch.float64)
    start = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).float()  # at T: N(0, I), as theta is
    means, variances = [], []
    for score, row in zip(scores, seen, strict=True):
        x = sg.sample(score, len(start), 20, start=start)
        m, c = linear_posterior(row)
        means.append((x.mean(0) - m).abs() / c.diagonal().sqrt())
        variances.append((x.var(0) / c.diagonal() - 1).abs())
    mean, variance = torch.stack(means), torch.stack(variances)
    return {
        "mean, largest error in deviations": float(mean.max()),
        "mean, root mean square error in deviations": float(mean.square().mean().sqrt()),
        "variance, mean relative error": float(variance.mean()),
        "variance, largest relative error": float(variance.max()),
    }


def two_moons(steps: int, seed: int) -> dict[str, Any]:
    """C2ST given three observations, 2,000 draws of either kind."""
    model, seconds = trained(moons, steps, 512, seed, 2e-3, LogNormalTimes(-2.0, 2.0))
    _, seen = moons(2, torch.Generator().manual_seed(5))
    told = []
    for row in [torch.zeros(2), *seen]:
        x = sg.sample(model.given(seen=row), 2_000, 40, seed=1)
        told.append(c2st(x, moons_posterior(row, 2_000, torch.Generator().manual_seed(6))))
        print(told[-1])
    return {
        "seconds": seconds,
        "C2ST": told,
        "C2ST, mean": sum(told) / len(told),
        "ranks": ranks(model, moons, 40),
    }


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="of the linear Gaussian model")
    parser.add_argument("--moon-steps", type=int, default=8000, help="of the two moons")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the training")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "conditions.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, measure, steps in (
        ("linear Gaussian", gaussian, options.steps),
        ("two moons", two_moons, options.moon_steps),
    ):
        for seed in options.seeds if steps else ():
            found = {"steps": steps, **measure(steps, seed)}
            print(name, seed, found, flush=True)
            known = json.loads(options.out.read_text()) if options.out.exists() else {}
            known |= {"versions": _report.versions(), "device": "cpu"}
            known[name] = {**known.get(name, {}), f"seed {seed}": found}
            _report.write_json(options.out, known)


if __name__ == "__main__":
    main()
