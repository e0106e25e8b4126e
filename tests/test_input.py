"""What cannot work raises early, and says what was wrong and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import F64, gaussian, mixture
from torch import Tensor, nn

from sde_gen import (
    EDM,
    SDE,
    VE,
    VP,
    BrownianPath,
    Classifier,
    ClassifierFree,
    Empirical,
    EulerMaruyama,
    Exponential,
    Facts,
    Gaussian,
    GaussianMixture,
    Impulses,
    Langevin,
    OrnsteinUhlenbeck,
    Propagator,
    Recipe,
    Reverse,
    RungeKutta,
    SciPy,
    Score,
    ScoreNetwork,
    Streams,
    SubVP,
    TorchSDE,
    error_budget,
    grids,
    log_prob,
    sample,
    save,
    solve,
    train,
    tune_grid,
)
from sde_gen.guidance import classifier_loss
from sde_gen.networks import MLP
from sde_gen.schedules import Cosine, Geometric, Linear, Power, Quadratic, Sigmoid, Tabulated
from sde_gen.solvers import Spectral

SDE_ = VP()
SCORE = gaussian(SDE_)
X = torch.zeros(4, 3, dtype=F64)
POINTS = Empirical(SDE_, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
INTEGERS = torch.ones(4, 3, dtype=torch.uint8)
BAD = X.clone()
BAD[1, 2] = math.nan
LABELS = torch.zeros(3, dtype=torch.int64)
EULER = EulerMaruyama()

Case = tuple[Callable[[], Any], type[Exception], str]


class Net(nn.Module):
    """A network that returns what it is told, and takes labels."""

    classes = 10

    def __init__(self, f: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        return self.f(x)


NET = ScoreNetwork(Net(), SDE_)
LOGITS = Net(lambda x: torch.zeros(len(x), 10))


class ForEach(Score):
    """A score that knows how many samples it was bound for."""

    def __init__(self, batch: int) -> None:
        self.batch, self.sde, self.facts = batch, SDE_, Facts((3,))

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        return -x

    def rows(self, index: slice | Tensor) -> ForEach:
        return ForEach(len(torch.arange(self.batch)[index]))


def run(process: Any = SDE_, x: Any = X, times: Any = (0.0, 1.0), solver: Any = EULER) -> Tensor:
    return solve(process, x, times, solver, 0)


CLOCKS: dict[str, Case] = {
    "rates fall": (lambda: Linear(2.0, 1.0), ValueError, "beta_max must be a number >= 2, got 1"),
    "rate 0": (lambda: Quadratic(0.0, 1.0), ValueError, "beta_min must be a number > 0, got 0"),
    "steepness": (
        lambda: Sigmoid(steepness=-1.0),
        ValueError,
        "steepness must be a number > 0, got -1",
    ),
    "horizon": (lambda: Linear(T=0.0), ValueError, "T must be a number > 0, got 0"),
    "offset": (
        lambda: Cosine(offset=1.0),
        ValueError,
        "offset must be a number >= 0 and < 1, got 1",
    ),
    "sigmas fall": (
        lambda: Geometric(2.0, 1.0),
        ValueError,
        "sigma_max must be a number > 2, got 1",
    ),
    "power": (lambda: Power(0.5), ValueError, "p must be a number >= 1, got 0.5"),
    "a beta of 1": (lambda: Tabulated([1.0, 0.1]), ValueError, r"betas must be .* in \(0, 1\)"),
    "no betas": (lambda: Tabulated([]), ValueError, "one or more numbers"),
    "NaN beta": (lambda: Tabulated([math.nan]), ValueError, "betas must be one or more numbers"),
}
PROCESSES: dict[str, Case] = {
    **{
        f"clock of {kind.__name__}": (lambda kind=kind: kind(0.1), TypeError, "must be a Schedule")
        for kind in (VP, SubVP, VE)
    },
    "clock of Langevin": (lambda: Langevin(SCORE, 1.0), TypeError, "must be a Schedule"),  # type: ignore[arg-type]
    "explosive": (lambda: OrnsteinUhlenbeck(a=1.0), ValueError, "a must be a number < 0, got 1"),
    "sigma_max": (lambda: EDM(-1.0), ValueError, "sigma_max must be a number > 0, got -1"),
    "reverse twice": (lambda: SDE_.reverse(SCORE).reverse(SCORE), TypeError, "already a Reverse"),
    "no score": (lambda: SDE_.reverse(None), TypeError, "score must be callable"),  # type: ignore[arg-type]
    "eta < 0": (lambda: SDE_.reverse(SCORE, -0.1), ValueError, "eta must be .* >= 0, got -0.1"),
    "eta NaN": (
        lambda: Reverse(SDE_, SCORE, math.nan),
        ValueError,
        "eta must be a number >= 0, got nan",
    ),
    "Langevin at 0": (lambda: Langevin(POINTS), ValueError, r"singular at t = 0.*at=\.\.\."),
    "perturb integers": (lambda: SDE_.perturb(INTEGERS, 0.5), TypeError, "scale integer images"),
    "perturb a list": (lambda: SDE_.perturb([1.0], 0.5), TypeError, "must be a torch.Tensor"),  # type: ignore[arg-type]
    "perturb before 0": (lambda: SDE_.perturb(X, -0.1), ValueError, r"\[0, 1.0\], got -0.1"),
    "perturb after T": (lambda: SDE_.perturb(X, 1.5), ValueError, r"\[0, 1.0\], got 1.5"),
    "perturb at NaN": (lambda: SDE_.perturb(X, math.nan), ValueError, "got nan"),
    "perturb at 3 times": (lambda: SDE_.perturb(X, torch.rand(3)), ValueError, r"shape \(4,\)"),
    "simulate integers": (lambda: Langevin(SCORE).perturb(INTEGERS, 0.5), TypeError, "floating"),
    "simulate after T": (lambda: Langevin(SCORE).perturb(X, 9.0), ValueError, "got 9.0"),
}
EXACT: dict[str, Case] = {
    "not linear": (lambda: Gaussian(Langevin(SCORE), X[0]), TypeError, "must be a LinearSDE"),  # type: ignore[arg-type]
    "NaN mean": (lambda: Gaussian(SDE_, BAD[1]), ValueError, r"first at index \(2,\)"),
    "integer mean": (lambda: Gaussian(SDE_, INTEGERS[0]), TypeError, "floating point"),
    "std < 0": (lambda: Gaussian(SDE_, X[0], -1.0), ValueError, "std must not be negative"),
    "std NaN": (lambda: Gaussian(SDE_, X[0], math.nan), ValueError, "NaN"),
    "std of 2": (lambda: Gaussian(SDE_, X[0], torch.ones(2)), ValueError, r"number or \(3,\)"),
    "covariance of 2": (
        lambda: Gaussian(SDE_, X[0], covariance=torch.eye(2)),
        ValueError,
        r"\(3, 3\), got \(2, 2\)",
    ),
    "indefinite": (
        lambda: Gaussian(SDE_, X[0, :2], covariance=torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
        ValueError,
        "negative eigenvalue",
    ),
    "weight < 0": (
        lambda: GaussianMixture(SDE_, torch.tensor([1.0, -1.0]), X[:2]),
        ValueError,
        "2 positive numbers",
    ),
    "weights of 3": (
        lambda: GaussianMixture(SDE_, torch.ones(3), X[:2]),
        ValueError,
        "2 positive numbers",
    ),
    "stds of 3": (
        lambda: GaussianMixture(SDE_, torch.ones(2), X[:2], torch.ones(3)),
        ValueError,
        r"std must be a number, \(2,\) or \(2, 3\)",
    ),
    "means on no axis": (
        lambda: GaussianMixture(SDE_, torch.ones(2), torch.zeros(2)),
        ValueError,
        r"means must be \(K, \*D\)",
    ),
    "integer data": (lambda: Empirical(SDE_, INTEGERS), TypeError, "scale integer images"),
    "NaN data": (lambda: Empirical(SDE_, BAD), ValueError, r"1 NaN .* of 12.* index \(1, 2\)"),
    "no data": (lambda: Empirical(SDE_, X[:0]), ValueError, "empty batch"),
    "points at 0": (lambda: POINTS(X, 0.0), ValueError, "t = 0 their score is singular"),
    "density at 0": (lambda: POINTS.log_prob(X), ValueError, "at t = 0"),
    "one of them at 0": (
        lambda: POINTS(X, torch.tensor([0.5, 0.0, 0.5, 0.5])),
        ValueError,
        "at t = 0",
    ),
    "wrong width": (
        lambda: SCORE(X[:, :2], 0.5),
        ValueError,
        r"shape \(B, 3\), got \(4, 2\)",
    ),
    "3 times": (lambda: SCORE(X, torch.rand(3)), ValueError, r"number or \(4,\), got \(3,\)"),
    "after T": (lambda: SCORE(X, 1.5), ValueError, r"\[0, 1.0\], got 1.5"),
    "integer state": (lambda: SCORE(INTEGERS, 0.5), TypeError, "floating point"),
}
LEARNED: dict[str, Case] = {
    "prediction": (lambda: ScoreNetwork(Net(), SDE_, "eps"), ValueError, "one of .*'eps'"),  # type: ignore[arg-type]
    "data_std": (
        lambda: ScoreNetwork(Net(), SDE_, facts=Facts(std=0.0)),
        ValueError,
        "std must be a number > 0, got 0",
    ),
    "not linear": (lambda: ScoreNetwork(Net(), Langevin(SCORE)), TypeError, "got Langevin"),  # type: ignore[arg-type]
    "at 0": (lambda: NET(X, 0.0), ValueError, "singular at t = 0"),
    "wrong output": (
        lambda: ScoreNetwork(Net(lambda x: x[:, :1]), SDE_)(X, 0.5),
        ValueError,
        r"returned shape \(4, 1\) for a state \(4, 3\)",
    ),
    "wrong state": (
        lambda: ScoreNetwork(Net(), SDE_, facts=Facts((2,)))(X, 0.5),
        ValueError,
        r"shape \(B, 2\), got \(4, 3\)",
    ),
    "integer state": (lambda: NET(INTEGERS, 0.5), TypeError, "floating point"),
    "unknown context": (lambda: NET.given(label=1)(X, 0.5), TypeError, "label"),
    "labels of 3": (lambda: NET.given(y=LABELS)(X, 0.5), ValueError, "given for 3 samples"),
    "term": (lambda: SCORE + 3, TypeError, "a term must be callable"),  # type: ignore[operator]
    "weight": (lambda: SCORE * "a", TypeError, "a weight must be a number or a function"),  # type: ignore[operator]
    "weights of 3": (lambda: (SCORE * torch.ones(3))(X, 0.5), ValueError, "weight .* 3 samples"),
}
GUIDANCE: dict[str, Case] = {
    "class 10 of 10": (lambda: Classifier(LOGITS, 10, SDE_)(X, 0.5), ValueError, "0 .. 9, got 10"),
    "class -1": (lambda: Classifier(LOGITS, -1, SDE_), ValueError, ">= 0, got -1"),
    "class 1.5": (lambda: Classifier(LOGITS, 1.5, SDE_), TypeError, "must be integers"),  # type: ignore[arg-type]
    "3 labels": (
        lambda: Classifier(LOGITS, LABELS, SDE_)(X, 0.5),
        ValueError,
        r"\(4,\), got \(3,\)",
    ),
    "classifier at 0": (lambda: Classifier(LOGITS, 1, SDE_)(X, 0.0), ValueError, "t = 0"),
    "free: class 10": (lambda: ClassifierFree(NET, y=10), ValueError, "0 .. 9, got 10"),
    "free: class -1": (lambda: ClassifierFree(NET, y=-1), ValueError, "0 .. 9, got -1"),
    "free: class 1.5": (lambda: ClassifierFree(NET, y=torch.ones(4)), TypeError, "integers"),
    "free: 3 labels": (lambda: ClassifierFree(NET, y=LABELS)(X, 0.5), ValueError, "for 3 samples"),
    "loss: class 12": (
        lambda: classifier_loss(LOGITS, SDE_, X, torch.full((4,), 12), torch.rand(4)),
        ValueError,
        "0 .. 9, got 12",
    ),
    "loss: 3 times": (
        lambda: classifier_loss(LOGITS, SDE_, X, torch.full((4,), 1), torch.rand(3)),
        ValueError,
        r"shape \(4,\)",
    ),
}
GRIDS: dict[str, Case] = {
    "no step": (lambda: grids.uniform(SDE_, 0), ValueError, "integer >= 1, got 0"),
    "one step to 0": (lambda: grids.log_snr(SDE_, 1, to_zero=True), ValueError, ">= 2, got 1"),
    "2.5 steps": (lambda: grids.karras(SDE_, 2.5), ValueError, "got 2.5"),  # type: ignore[arg-type]
    "start after T": (
        lambda: grids.quadratic(SDE_, 5, start=2.0),
        ValueError,
        "start must be a number > 0 and <= 1, got 2",
    ),
    "end after start": (
        lambda: grids.uniform(SDE_, 5, 0.1, 0.5),
        ValueError,
        "end must be a number >= 0 and < 0.1, got 0.5",
    ),
    "log of 0": (lambda: grids.karras(SDE_, 5, end=0.0), ValueError, "cannot end at t = 0"),
    "rho": (lambda: grids.karras(SDE_, 5, rho=0.0), ValueError, "rho must be a number > 0, got 0"),
    "power": (
        lambda: grids.uniform(SDE_, 5, power=-1.0),
        ValueError,
        "power must be a number > 0, got -1",
    ),
    "data_std": (
        lambda: grids.default(SDE_, 5, data_std=0.0),
        ValueError,
        "data_std must be a number > 0, got 0",
    ),
    "no noise level": (lambda: grids.log_snr(Langevin(SCORE), 5), TypeError, "a LinearSDE"),  # type: ignore[arg-type]
    "rising table": (lambda: grids.from_table(SDE_, [1.0, 2.0]), ValueError, "fall strictly"),
    "NaN table": (lambda: grids.from_table(SDE_, [1.0, math.nan]), ValueError, "fall strictly"),
    "table above T": (lambda: grids.from_table(SDE_, [1e5, 1.0]), ValueError, "reaches .* 152"),
    "too few": (
        lambda: grids.from_table(SDE_, [3.0, 0.0], steps=1),
        ValueError,
        "integer >= 2, got 1",
    ),
}
SOLVERS: dict[str, Case] = {
    "scipy method": (lambda: SciPy("rk4"), ValueError, "one of .*RK45.* got 'rk4'"),
    "rtol": (lambda: SciPy(rtol=-1.0), ValueError, "rtol must be a number > 0, got -1"),
    "torchsde method": (lambda: TorchSDE("milstein"), ValueError, "one of .*srk.* got 'milstein'"),
    "substeps": (lambda: TorchSDE("euler", 0), ValueError, "substeps must be an integer >= 1"),
    "1.5 substeps": (lambda: TorchSDE("euler", 1.5), ValueError, "got 1.5"),  # type: ignore[arg-type]
    "order": (lambda: Exponential(5), ValueError, "order must be an integer in 1 .. 4, got 5"),
    "order True": (
        lambda: Exponential(True),
        ValueError,
        "order must be an integer in 1 .. 4, got True",
    ),
    "order 2.0": (
        lambda: Propagator(2.0),
        ValueError,
        "order must be an integer in 1 .. 4, got 2.0",
    ),  # type: ignore[arg-type]
    "order 3": (lambda: RungeKutta(3), ValueError, "order must be an integer in 4 .. 5, got 3"),
    "half a dimension": (lambda: Spectral(1.0, 0.5), ValueError, "dimensions must be an int"),  # type: ignore[arg-type]
    "reference": (lambda: Exponential(2, -1.0), ValueError, "reference must be"),
    **{
        f"{type(solver).__name__} on an SDE": (
            lambda solver=solver: run(SDE_.reverse(SCORE), times=(1.0, 0.1), solver=solver),
            TypeError,
            f"{type(solver).__name__} solves ODEs.* got Reverse of VP with eta = 1.0",
        )
        for solver in (RungeKutta(), SciPy())
    },
    "Exponential on Langevin": (
        lambda: run(Langevin(SCORE), solver=Exponential()),
        TypeError,
        "needs the reversal of a LinearSDE.* got Langevin",
    ),
    "Exponential on its reversal": (
        lambda: run(Langevin(SCORE).reverse(SCORE), times=(1.0, 0.1), solver=Exponential()),
        TypeError,
        "got Reverse of Langevin",
    ),
    "Exponential forward": (lambda: run(solver=Exponential()), TypeError, "got VP"),
    "srk on a path": (
        lambda: solve(SDE_, X, [0.0, 1.0], TorchSDE("srk"), BrownianPath()),
        ValueError,
        "one increment an interval",
    ),
}
RUNS: dict[str, Case] = {
    "integers": (lambda: run(x=INTEGERS), TypeError, "scale integer images"),
    "numpy": (lambda: run(x=np.zeros((4, 3))), TypeError, "torch.Tensor .* got ndarray"),
    "a scalar": (lambda: run(x=X[0, 0]), ValueError, "batch dimension"),
    "nobody": (lambda: run(x=X[:0]), ValueError, r"empty batch.*\(0, 3\)"),
    "NaN": (lambda: run(x=BAD), ValueError, r"1 NaN or infinite .* of 12.* index \(1, 2\)"),
    "a class of solver": (lambda: run(solver=EulerMaruyama), TypeError, r"EulerMaruyama\(\)"),
    "a name of a solver": (lambda: run(solver="euler"), TypeError, "must be a Solver.* 'euler'"),
    "a score": (lambda: run(SCORE), TypeError, "process must be an SDE"),
    "one time": (lambda: run(times=[0.5]), ValueError, r"two or more, got shape \(1,\)"),
    "a matrix": (lambda: run(times=[[0.0, 1.0]]), ValueError, "1-D grid"),
    "a turn": (lambda: run(times=[0.0, 1.0, 0.5]), ValueError, "rise or fall strictly"),
    "a stop": (lambda: run(times=[0.0, 0.5, 0.5]), ValueError, "strictly"),
    "a NaN time": (lambda: run(times=[0.0, math.nan]), ValueError, "times has 1 NaN"),
    "after T": (lambda: run(times=[0.0, 1.5]), ValueError, r"in \[0, T\] = \[0, 1.0\]"),
    "before 0": (lambda: run(times=[-0.1, 1.0]), ValueError, r"in \[0, T\]"),
    "forward in falling time": (lambda: run(times=[1.0, 0.0]), ValueError, "must rise for VP"),
    "back in rising time": (lambda: run(SDE_.reverse(SCORE)), ValueError, "must fall for Reverse"),
    "points, ending at 0": (
        lambda: run(SDE_.reverse(POINTS), times=[1.0, 0.0], solver=RungeKutta()),
        ValueError,
        "RungeKutta .* score at t = 0, where it is singular",
    ),
    "points, starting at 0": (
        lambda: run(SDE_.probability_flow(NET)),
        ValueError,
        "score at t = 0",
    ),
    "a narrow score": (
        lambda: run(SDE_.probability_flow(lambda x, t: x[:, :1]), times=[1.0, 0.5]),
        ValueError,
        r"score returned shape \(4, 1\) for a state \(4, 3\)",
    ),
    "a NaN score": (
        lambda: run(SDE_.probability_flow(lambda x, t: x * math.nan), times=[1.0, 0.5]),
        FloatingPointError,
        "the score is not finite at t = 1, first in row 0 of the state",
    ),
    "a seed of 0.5": (lambda: solve(SDE_, X, [0, 1], EULER, 0.5), TypeError, "integer seed"),  # type: ignore[arg-type]
    "chunks of 0": (lambda: solve(SDE_, X, [0, 1], EULER, 0, chunk=0), ValueError, ">= 1, got 0"),
    "chunks of impulses": (
        lambda: solve(SDE_, X, [0, 1], EULER, Impulses(), chunk=2),
        TypeError,
        "do not chunk",
    ),
    "3 numbers for 4": (
        lambda: solve(SDE_, X, [0, 1], EULER, Streams(0, LABELS)),
        ValueError,
        "noise is for 3 samples, the state has 4",
    ),
    # Chunks of 2 would each find their 2 rows.
    "6 labels for 4": (
        lambda: solve(SDE_.reverse(ForEach(6)), X, [1, 0.1], EULER, 0, chunk=2),
        ValueError,
        "bound to the process is for 6 samples, the state has 4",
    ),
    "6 labels for 4, forth": (
        lambda: solve(Langevin(ForEach(6)), X, [0.1, 1], EULER, 0, chunk=2),
        ValueError,
        "bound to the process is for 6 samples, the state has 4",
    ),
    "6 numbers for 4": (
        lambda: solve(SDE_, X, [0, 1], EULER, Streams(0, torch.arange(6)), chunk=2),
        ValueError,
        "noise is for 6 samples, the state has 4",
    ),
}
SAMPLES: dict[str, Case] = {
    "a function": (lambda: sample(lambda x, t: x, 4), TypeError, r"knows its .*\(.sde\)"),  # type: ignore[arg-type]
    "no shape": (lambda: sample(NET, 4), TypeError, "shape = None"),
    "nobody": (lambda: sample(SCORE, 0), ValueError, "n must be an integer >= 1, got 0"),
    "steps": (lambda: sample(SCORE, 4, steps=0), ValueError, "steps must be"),
    "eta": (lambda: sample(SCORE, 4, eta=-1.0), ValueError, "eta must be"),
    "rising": (
        lambda: sample(SCORE, 4, times=torch.tensor([0.1, 1.0])),
        ValueError,
        "must fall from the noise",
    ),
    "seed": (lambda: sample(SCORE, 4, seed="a"), TypeError, "^seed must be .*integer.* got 'a'"),  # type: ignore[arg-type]
    "half a seed": (lambda: sample(SCORE, 4, seed=0.5), TypeError, "^seed must be"),  # type: ignore[arg-type]
    "half a chunk": (lambda: sample(SCORE, 4, chunk=0.5), ValueError, "^chunk must be"),  # type: ignore[arg-type]
    **{
        f"in {dtype}": (
            lambda dtype=dtype: sample(SCORE, 4, dtype=dtype),
            TypeError,
            f"dtype must be floating point, .* got .?{dtype}",
        )
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2, "float32")
    },
    "6 labels for 4": (
        lambda: sample(ForEach(6), 4, steps=2, chunk=2),
        ValueError,
        "bound to the process is for 6 samples, the state has 4",
    ),
}


class Constant(SDE):
    """dX = dW, whose diffusion forgets the shape of t."""

    T = 1.0

    def drift(self, x: Tensor, t: Any) -> Tensor:
        return torch.zeros_like(x)

    def diffusion(self, t: Any) -> Tensor:
        return torch.ones(())


MOONS = ScoreNetwork(MLP((2,)), SDE_)
ARRAY: Any = np.zeros((4, 2))
SLIPS: dict[str, Case] = {
    "solver by name": (lambda: sample(SCORE, 4, solver="heun"), TypeError, "must be a Solver"),  # type: ignore[arg-type]
    "an array to train on": (lambda: train(MOONS, ARRAY), TypeError, "torch.as_tensor"),
    "data of another shape": (
        lambda: train(MOONS, torch.zeros(4)),
        ValueError,
        r"data must be \(N, 2\), got \(4,\)",
    ),
    "score times score": (lambda: SCORE * SCORE, TypeError, "scores add"),  # type: ignore[operator]
    "log_prob(sde, x)": (lambda: log_prob(SDE_, X), TypeError, "needs a score that knows"),  # type: ignore[arg-type]
    "save(path, model)": (lambda: save("path", MOONS), TypeError, "must be a score"),  # type: ignore[arg-type]
    "tune a process": (lambda: tune_grid(SDE_), TypeError, "model must be a score that knows"),  # type: ignore[arg-type]
    "budget of a process": (lambda: error_budget(SDE_, SCORE), TypeError, "needs a score"),  # type: ignore[arg-type]
    "budget of a name": (lambda: error_budget(MOONS, "moons"), TypeError, "law .* must be real"),
    "one diffusion for all times": (lambda: run(Constant()), TypeError, r"shape of t, \(2,\)"),
    "a shape that is a number": (lambda: MLP(2), TypeError, "shape must be sizes"),  # type: ignore[arg-type]
    "no kernel": (lambda: ScoreNetwork(MLP((3,)), Langevin(SCORE)), TypeError, "dsm_loss"),  # type: ignore[arg-type]
}
TABLE = {
    f"{room}: {name}": case
    for room, cases in {
        "clocks": CLOCKS,
        "processes": PROCESSES,
        "exact": EXACT,
        "learned": LEARNED,
        "guidance": GUIDANCE,
        "grids": GRIDS,
        "solvers": SOLVERS,
        "solve": RUNS,
        "sample": SAMPLES,
        "slips": SLIPS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("call", "error", "message"), TABLE.values(), ids=TABLE.keys())
def test_what_cannot_work_says_so(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_absent() -> None:
    with pytest.raises(ValueError, match="'cuda' was asked for, but torch sees no CUDA device"):
        sample(SCORE, 2, device="cuda")


@pytest.mark.filterwarnings("ignore:the steps are too long")
def test_rows_that_are_bound_may_be_chunked() -> None:
    whole = solve(SDE_.reverse(ForEach(4)), X, [1, 0.1], EULER, 0)
    torch.testing.assert_close(
        solve(SDE_.reverse(ForEach(4)), X, [1, 0.1], EULER, 0, chunk=3), whole
    )
    assert sample(ForEach(4), 4, steps=2, seed=0).shape == (4, 3)


@pytest.mark.parametrize(
    "kind", [np.int64, np.uint8, torch.tensor], ids=["numpy", "small", "torch"]
)
def test_integers_of_every_kind_count(kind: Any) -> None:
    """n, steps, seed and chunk: numpy's and PyTorch's integers give what Python's give."""
    wanted = sample(SCORE, 5, 3, 7, eta=1.0, chunk=2)
    given = sample(SCORE, kind(5), kind(3), kind(7), eta=1.0, chunk=kind(2))
    assert torch.equal(given, wanted)
    times = grids.uniform(SDE_, kind(4))
    assert torch.equal(
        solve(SDE_, X, times.flip(0), EULER, kind(7)), solve(SDE_, X, times.flip(0), EULER, 7)
    )
    assert TorchSDE("euler", kind(3)).calls == 3
    assert type(Exponential(kind(3)).nodes) is type(RungeKutta(kind(5)).order) is int
    assert len(grids.from_table(SDE_, [3.0, 0.1], steps=kind(5))) == 6
    assert torch.equal(Streams(kind(7))(X, 0.5, 0.1), Streams(7)(X, 0.5, 0.1))


def test_bad_input_costs_no_work() -> None:
    """The grid and the solver are checked before the score is called once."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the score was called")

    process: SDE = SDE_.reverse(score)
    with pytest.raises(ValueError, match="strictly"):
        run(process, times=[1.0, 0.5, 0.7])
    with pytest.raises(TypeError, match="solves ODEs"):
        run(process, times=[1.0, 0.5], solver=RungeKutta())


def test_langevin_reads_a_singular_score_at_its_own_time() -> None:
    """A grid from 0 is right for Langevin of a singular score that is read at a later time."""
    times = [0.0, 0.5, 1.0]
    assert run(Langevin(POINTS, at=0.1), times=times).shape == X.shape


def test_chunks_of_langevin_keep_their_labels() -> None:
    score = ScoreNetwork(Labelled(), SDE_).given(y=torch.arange(4))
    process = Langevin(score, at=0.1)
    whole = solve(process, X, [0.0, 0.5, 1.0], EULER, 0)
    torch.testing.assert_close(solve(process, X, [0.0, 0.5, 1.0], EULER, 0, chunk=3), whole)
    back = process.reverse(score)
    whole = solve(back, X, [1.0, 0.5], EULER, 0)
    torch.testing.assert_close(solve(back, X, [1.0, 0.5], EULER, 0, chunk=3), whole)


class Labelled(nn.Module):
    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x + y.unsqueeze(1))


def test_mixture_is_at_home_at_0() -> None:
    score = mixture(SDE_)
    assert not score.singular
    assert bool(torch.isfinite(score(X[:, :2], 0.0)).all())


def test_training_warns_of_data_on_another_scale() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=1, batch=8)
    with pytest.warns(UserWarning, match="standard deviation 2.* expects 1: scale the data"):
        train(MOONS, 250 * x, recipe=recipe, progress=False)
    train(
        ScoreNetwork(MLP((2,)), SDE_, facts=Facts(std=250.0)),
        250 * x,
        recipe=recipe,
        progress=False,
    )
