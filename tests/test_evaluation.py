"""Reading a score: what it must give, and networks that rest from training meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import F64, gaussian, mixture
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import grids, ops
from sde_gen.networks import MLP, UNet
from sde_gen.sdes import KernelSDE, MatrixSDE, evaluate
from sde_gen.sdes.evaluation import at_rest, evaluating

SDE = sg.VP()
CLD = sg.CriticallyDamped()
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor(0.5, dtype=F64)


def value(score: Any, x: Tensor, t: Tensor) -> Tensor:
    """What an evaluation of any score function tells of its value."""
    return evaluate(score, x, t, SDE.tweedie).score


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], Any], type[Exception], str]] = {
    "nothing": (lambda x, t: None, TypeError, "score returned NoneType for a state"),
    "a number": (lambda x, t: 1.0, TypeError, "score returned float for a state"),
    "complex": (lambda x, t: x * 1j, TypeError, "score returned torch.complex64 for a state"),
    "a column": (lambda x, t: x[:, :1], ValueError, r"returned shape \(\d, 1.*for a state"),
    "one row": (lambda x, t: x[0], ValueError, r"returned shape \(2.*for a state"),
}


class Own(sg.Score):
    """A score that knows its process and is the function it was given, whatever the label."""

    sde = SDE
    facts = sg.Facts((2,))

    def __init__(self, f: Callable[[Tensor, Tensor], Any]) -> None:
        self.f = f

    def __call__(self, x: Tensor, t: Any, y: Tensor | None = None) -> Any:
        return self.f(x, t)


class Broad(Own):
    sde = sg.EDM(1000.0)


READERS: dict[str, Callable[[Callable[[Tensor, Tensor], Any]], Tensor]] = {
    "reversal": lambda f: SDE.reverse(f).drift(X, T),
    "langevin": lambda f: sg.Langevin(f).drift(X, T),
    "denoise": lambda f: SDE.reverse(f).evaluate(X, T).denoised,
    "denoise a pair": lambda f: CLD.reverse(f).evaluate(X.reshape(2, 2, 2), T).denoised,
    "sum": lambda f: (sg.Gaussian(SDE, torch.zeros(2)) + f)(X, T),
    "classifier-free": lambda f: sg.ClassifierFree(Own(f), y=0)(X, T),
    "lifted": lambda f: sg.Lifted(Broad(f), CLD)(X.reshape(2, 2, 2), T),
    **{
        type(solver).__name__: lambda f, solver=solver: sg.solve(
            SDE.probability_flow(f), X, [1.0, 0.5], solver, 0
        )
        for solver in (sg.EulerMaruyama(), sg.Exponential(), sg.Adaptive(), sg.Churn(), sg.SciPy())
    },
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize(("score", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_score_is_refused(
    read: Callable[[Any], Tensor], score: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(score)


def test_a_score_is_read_in_the_dtype_of_the_state() -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        return x.bfloat16()

    for dtype in (torch.float32, F64):
        assert value(half, X.to(dtype), T).dtype == dtype
        total = (half + sg.Gaussian(SDE, torch.zeros(2)))(X.to(dtype), T)  # type: ignore[operator]
        assert total.dtype == SDE.reverse(half).drift(X.to(dtype), T).dtype == dtype


# Dropout.


def alive(net: nn.Module) -> nn.Module:
    """Random weights where there are zeros, so that dropout is seen."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        if not p.any():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    return net


def dropping(sde: KernelSDE = SDE) -> sg.ScoreNetwork:
    return sg.ScoreNetwork(alive(MLP((2,), 16, 2, classes=3, dropout=0.5)), sde)


LOGITS = alive(MLP((2,), 16, 1, dropout=0.5, outputs=3))
TIMES = grids.quadratic(SDE, 4, end=0.1)

USES: dict[str, Callable[[sg.ScoreNetwork], Tensor]] = {
    "sample": lambda m: sg.sample(m, 4, 3, seed=0),
    "sample with noise": lambda m: sg.sample(m, 4, 3, seed=0, eta=1.0),
    "sample with a label": lambda m: sg.sample(m.given(y=[0, 1, 2, 0]), 4, 3, seed=0, chunk=2),
    "guided": lambda m: sg.sample(sg.ClassifierFree(m, y=1), 4, 3, seed=0),
    "classified": lambda m: sg.sample(m + sg.Classifier(LOGITS, 1, SDE), 4, 3, seed=0),
    "a sum": lambda m: sg.sample(m + sg.Gaussian(SDE, torch.zeros(2)), 4, 3, seed=0),
    "a function": lambda m: sg.solve(
        SDE.probability_flow(lambda x, t: m(x, t)), X, TIMES, sg.Heun(), 0
    ),
    "likelihood": lambda m: sg.log_prob(m, X, solver=sg.Heun(), times=TIMES.flip(0)).value,
    "denoise": lambda m: m.denoise(X, T),
    "langevin": lambda m: sg.Langevin(m, at=0.1).drift(X, T),
    "classifier": lambda m: sg.Classifier(LOGITS, 1, SDE)(X, T),
    "tuning": lambda m: torch.tensor([sg.tune_grid(m, steps=3, n=8).ratio]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_dropout_rests_where_a_score_is_evaluated(use: Callable[[Any], Tensor]) -> None:
    model = dropping()
    wanted = use(model.eval())
    for net in (model, LOGITS):
        net.train()
    before = torch.get_rng_state()
    assert torch.equal(use(model), wanted)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for net in (model, LOGITS) for part in net.modules())


def test_damped_and_lifted_networks_rest_as_well() -> None:
    x = torch.randn(4, 2, 2)
    for model, score in (
        (m := dropping(CLD), m),
        (m := dropping(sg.EDM(1000.0)), sg.Lifted(m, CLD)),
    ):
        wanted = model.eval() and score.denoise(x, T)
        model.train()
        assert torch.equal(score.denoise(x, T), wanted)


def test_losses_keep_their_dropout() -> None:
    model, t = dropping().train(), torch.rand(4, dtype=F64) * 0.9 + 0.1

    def loss() -> Tensor:
        return sg.dsm_loss(model, SDE, X, t, noise=torch.Generator().manual_seed(0))

    assert not torch.equal(loss(), loss())
    assert not torch.equal(model(X, T), model(X, T))
    model.eval()
    assert torch.equal(loss(), loss())


def test_a_bare_or_compiled_network_rests() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -self.dropout(x)

    assert torch.equal(value(Bare().train(), X, T), -X)
    model = dropping()
    wanted = value(model.eval(), X, T)
    compiled = torch.compile(model.train(), backend="eager")
    torch.testing.assert_close(value(compiled, X, T), wanted)


def test_what_was_in_training_is_so_again_after_an_error() -> None:
    class Failing(MLP):
        def compute(self, x: Tensor, c: Tensor, y: Tensor | None) -> Tensor:
            assert not self.training
            raise ArithmeticError("no")

    model = sg.ScoreNetwork(Failing((2,), 8, 1), SDE).train()
    with pytest.raises(ArithmeticError):
        value(model, X, T)
    assert model.net.training
    assert not evaluating()


def test_a_part_that_was_set_by_hand_stays_so() -> None:
    """Dropout left on in a model in evaluation mode is somebody's choice."""
    model = dropping().eval()
    part = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    part.train()
    assert not torch.equal(value(model, X, T), value(model, X, T))
    assert part.training
    model.train()
    part.eval()
    assert torch.equal(value(model, X, T), value(model, X, T))
    assert not part.training


def test_a_network_rests_until_the_last_is_done() -> None:
    """Calls that overlap, as those of threads do, of a network and of a part of it."""
    net = UNet.digits().train()
    part = net.middle
    for first, second in ((net, part), (part, net), (net, net)):
        one, two = ExitStack(), ExitStack()
        one.enter_context(at_rest(first))
        two.enter_context(at_rest(second))
        one.close()
        assert not any(m.training for m in second.modules())
        two.close()
        assert all(m.training for m in net.modules())


def test_another_thread_is_not_evaluating() -> None:
    seen: list[bool] = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: seen.append(evaluating()))
        thread.start()
        thread.join()
        seen.append(evaluating())
        return x

    value(score, X, T)
    assert seen == [False, True]


def test_threads_sample_the_same_from_a_model_in_training() -> None:
    model = dropping()
    wanted = sg.sample(model.eval(), 8, 20, seed=0)
    model.train()
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(sg.sample(model, 8, 20, seed=0)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for x in found:
        torch.testing.assert_close(x, wanted)
    assert all(part.training for part in model.modules())


# Inference mode.


def through(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).sum(), x)
    return gradient


TIMED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "table": lambda: sg.VP(sg.schedules.Tabulated([0.1, 0.2, 0.4])).sigma,
    "table inverted": lambda: sg.schedules.Tabulated([0.1, 0.2, 0.4]).time_at,
    "quadrature": lambda: lambda t: ops.integrate(torch.sin, 0.0, t),
    "transition": lambda: (
        sg.MatrixOrnsteinUhlenbeck(((-1.0, 0.5), (0.0, -2.0)), ((1.0, 0.0), (0.3, 1.0))).transition
    ),
    "damped, inverted": lambda: (lambda sde: lambda t: sde.time_at(sde.log_snr(t)))(
        sg.CriticallyDamped()
    ),
}


@pytest.mark.parametrize("make", TIMED.values(), ids=TIMED.keys())
def test_what_inference_mode_computed_serves_gradients(
    make: Callable[[], Callable[[Tensor], Tensor]],
) -> None:
    t = torch.tensor([0.2, 0.6], dtype=F64)
    wanted = through(make(), t)
    ops._nodes.cache_clear()
    with torch.inference_mode():
        used = make()
        used(t)
    torch.testing.assert_close(through(used, t), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_model_sampled_in_inference_mode_serves_gradients(
    dtype: torch.dtype, eta: float
) -> None:
    """Moments are cast once, plans are kept: neither may be a tensor of inference mode."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)

    def make() -> Callable[[Tensor], Tensor]:
        law = sg.Gaussian(SDE, torch.zeros(2), covariance=covariance)
        solver = sg.Exponential(3, law.facts.moments, corrector=True)
        return lambda x: sg.solve(SDE.reverse(law, eta), x, TIMES, solver, 0)

    wanted, used = through(make(), X.to(dtype)), make()
    with torch.inference_mode():
        used(X.to(dtype))
    assert torch.equal(through(used, X.to(dtype)), wanted)


def kept(value: object) -> Iterator[Tensor]:
    """The tensors that an object holds, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for part in value.values() if isinstance(value, dict) else value:
            yield from kept(part)
    elif type(value).__module__.startswith("sde_gen"):
        slots = getattr(value, "__slots__", ())
        yield from kept(
            [getattr(value, name) for name in slots]
            + list(vars(value).values() if hasattr(value, "__dict__") else ())
        )


def test_nothing_that_is_kept_is_of_inference_mode() -> None:
    table, damped = sg.VP(sg.schedules.Tabulated([0.1, 0.2, 0.4] * 9)), sg.CriticallyDamped()
    law = sg.Gaussian(table, torch.zeros(2), covariance=torch.tensor([[0.5, 0.3], [0.3, 0.4]]))
    solver = sg.Exponential(3, law.facts.moments, corrector=True)
    with torch.inference_mode():
        sg.sample(law, 3, 4, solver=solver)
        damped.time_at(damped.log_snr(0.5))
    for user, least in ((law, 4), (solver, 4), (damped, 4)):
        found = list(kept(user))
        assert len(found) >= least
        assert not any(c.is_inference() for c in found)


def test_moments_found_in_inference_mode_serve_gradients() -> None:
    with torch.inference_mode():
        found = sg.data_moments(X.double())
        found.apply((found.values,), (X.double(),))
    covariance = X.double().T.cov(correction=0)
    gradient = through(lambda x: found.apply((found.values,), (x,)), X.double())
    torch.testing.assert_close(gradient, covariance.sum(1).expand(4, 2))


def test_learning_goes_on_after_inference_mode() -> None:
    """A whole model: sampled for a look in the middle of training."""
    law = mixture(SDE)
    model = sg.ScoreNetwork(alive(MLP((2,), 8, 1)), sg.VP(sg.schedules.Tabulated([0.01] * 500)))
    known = sg.data_moments(law.sample(200, torch.Generator().manual_seed(0)))
    model = model.with_facts(replace(model.facts, moments=known))
    with torch.inference_mode():
        sg.sample(model, 3, 4, seed=0)
    x = sg.solve(model.sde.probability_flow(model), X.requires_grad_(), TIMES[:3], sg.Heun())
    x.sum().backward()
    X.requires_grad_(False)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


# Autocast.


def same_bits(run: Callable[[], Tensor]) -> None:
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        half = run()
    assert half.dtype == plain.dtype
    assert torch.equal(half, plain)


MATRIX: list[MatrixSDE] = [
    CLD,
    sg.MatrixOrnsteinUhlenbeck(((-0.8, 1.5), (-0.6, -0.5)), ((0.9, 0.2), (0.0, 0.7))),
]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_exact_scores_compute_the_same_bits(dtype: torch.dtype) -> None:
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    each = torch.linspace(0.1, 1, 4, dtype=F64)
    for score in (
        sg.Gaussian(SDE, torch.tensor([1.0, 0.0]), covariance=covariance),
        mixture(SDE),
        sg.Empirical(SDE, X + 3),
        sg.CorrelatedMixture(SDE, torch.ones(2), X[:2], covariance),
        2 * mixture(SDE) - sg.Gaussian(SDE, torch.zeros(2)),
    ):
        for t in (T, each):
            same_bits(lambda t=t, s=score: s(X.to(dtype), t))
            same_bits(lambda t=t, s=score: s.denoise(X.to(dtype), t))
            same_bits(lambda t=t, s=score: SDE.reverse(s).drift(X.to(dtype), t))
            if hasattr(score, "log_prob"):
                same_bits(lambda t=t, s=score: s.log_prob(X.to(dtype), t))
    pairs = torch.randn(3, 2, 2, dtype=dtype)
    lifted = sg.Lifted(mixture(sg.EDM(1000.0)), CLD)
    same_bits(lambda: lifted(pairs, T))
    same_bits(lambda: lifted.denoise(pairs, T))


def test_exact_scores_do_so_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS: the mixture's own products in float32."""
    monkeypatch.setattr("sde_gen.scores.exact._precise", lambda x: x.float())
    law = sg.Empirical(SDE, X)
    for name in ("_centre", "variance", "log_weights"):
        setattr(law, name, getattr(law, name).float())
    same_bits(lambda: law(X, T))
    same_bits(lambda: law.posterior(X, T))


@pytest.mark.parametrize("sde", [SDE, sg.EDM(), *MATRIX], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_kernels_compute_the_same_bits(sde: KernelSDE, dtype: torch.dtype) -> None:
    x = torch.randn(3, *sde.state_shape((2,) if sde.state_shape((2,)) != (2,) else (2, 2)))
    x = x.to(dtype)
    data = sde.data(x)

    def draw(part: str, t: Any) -> Tensor:
        return getattr(sde.perturb(data, t, torch.Generator().manual_seed(0)), part)

    for t in (T, torch.rand(3, dtype=F64) * sde.T):
        for part in ("x", "mean", "score"):
            same_bits(lambda t=t, part=part: draw(part, t))
        same_bits(lambda t=t: sde.drift(x, t))
    generator = torch.Generator()
    same_bits(lambda: sde.prior(*x.shape, generator=generator.manual_seed(0), dtype=dtype))
    same_bits(lambda: sde.prior_log_prob(x))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_moments_compute_the_same_bits(dtype: torch.dtype) -> None:
    moments = sg.Gaussian(SDE, torch.zeros(2), covariance=torch.tensor([[0.5, 0.3], [0.3, 0.4]]))
    assert moments.facts.moments is not None
    same_bits(lambda: moments.facts.moments.apply((moments.facts.moments.values,), (X.to(dtype),)))


@pytest.mark.parametrize("sde", [SDE, CLD], ids=["scalar", "matrix"])
def test_a_learned_score_is_combined_in_the_dtype_of_the_state(sde: KernelSDE) -> None:
    """A network that gives bfloat16: c_skip x + c_out F with F the only thing rounded."""

    class Half(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            assert x.dtype == F64
            return torch.full_like(x, 0.37, dtype=torch.bfloat16)

    class Exact(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return torch.full_like(x, float(torch.tensor(0.37, dtype=torch.bfloat16)))

    x = torch.randn(3, *sde.state_shape((2,)), dtype=F64)
    wanted = sg.ScoreNetwork(Exact(), sde)(x, T)
    with torch.autocast("cpu", torch.bfloat16):
        found = sg.ScoreNetwork(Half(), sde)(x, T)
    assert found.dtype == F64
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


def test_perturbation_by_steps_computes_the_same_bits() -> None:
    process = sg.Langevin(gaussian(SDE), at=0.1)
    x = torch.randn(5, 3)
    same_bits(lambda: process.perturb(x, 0.5, torch.Generator().manual_seed(0)).x)
