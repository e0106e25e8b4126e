"""Encoding, decoding and what is edited in between, against maps known in closed form."""

from __future__ import annotations

import math

import problems
import pytest
import torch

import sde_gen as sg
from sde_gen.likelihood import between, decode, encode, interpolate, redraw, relabel

F64 = torch.float64
VP = sg.VP()
TURNING = sg.MatrixOrnsteinUhlenbeck(((-0.8, 1.5), (-0.6, -0.5)), ((0.9, 0.2), (0.0, 0.7)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sde", [sg.VP(), sg.EDM(80.0)], ids=lambda s: type(s).__name__)
def test_encode_then_decode_returns_the_data(sde: sg.LinearSDE) -> None:
    for law in (problems.gaussian(sde), problems.line(sde), problems.mixture(sde)):
        x = law.sample(50, seeded())
        z = encode(law, x)
        torch.testing.assert_close(decode(law, z), x, rtol=0, atol=1e-4)


def test_latents_of_gaussian_data_are_the_whitened_data() -> None:
    law = problems.gaussian(VP)
    x = law.sample(20, seeded())
    z = encode(law, x, steps=4)
    t = VP.T
    exact = problems.gaussian_flow(law, x, 0.0, t) / float(VP.sigma(t))
    # The first node lies at w = 1e-8 of the variance, where x has moved by as much.
    torch.testing.assert_close(z, exact, rtol=0, atol=1e-6)


def test_units_go_in_and_out() -> None:
    law = problems.gaussian(VP)
    units = sg.facts.Units(torch.tensor(3.0), torch.tensor(10.0))
    facts = sg.Facts((3,), law.facts.std, law.facts.moments, units)
    x = law.sample(5, seeded())
    model = law.with_facts(facts)
    torch.testing.assert_close(encode(model, 3 + 10 * x), encode(law, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decode(model, encode(law, x)), 3 + 10 * x, rtol=1e-6, atol=1e-6)


def test_paths_on_the_sphere_and_in_the_gaussian_metric() -> None:
    a = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=F64)
    b = torch.tensor([[0.0, 3.0, 0.0], [1.0, 1.0, 0.0]], dtype=F64)
    shares = [0.0, 0.25, 0.5, 1.0]
    sphere, gaussian = (between(a, b, shares, m) for m in ("sphere", "gaussian"))
    for path in (sphere, gaussian):
        torch.testing.assert_close(path[0], a)
        torch.testing.assert_close(path[-1], b)
        assert path.shape == (4, 2, 3)
    angle = torch.atan2(sphere[:, 0, 1], sphere[:, 0, 0])
    torch.testing.assert_close(angle, math.pi / 2 * torch.tensor(shares, dtype=F64))
    torch.testing.assert_close(sphere[:, 0].norm(dim=1), torch.full((4,), 3.0, dtype=F64))
    # Where both are one point the sphere stays there.
    torch.testing.assert_close(sphere[:, 1], a[1].expand(4, 3))
    z = torch.randn(2, 20_000, 2, generator=seeded(), dtype=F64)
    middle = between(z[0], z[1], [0.3], "gaussian")[0]
    assert float(middle.var()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 40_000))
    torch.testing.assert_close(
        gaussian[2, 0], torch.tensor([3.0, 3.0, 0.0]).double() / math.sqrt(2)
    )
    for bad, error in (((a, b[:1], shares), ValueError), ((a, b, shares, "flat"), ValueError)):
        with pytest.raises(error):
            between(*bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="list of numbers"):
        between(a, b, torch.tensor(0.5))
    with pytest.raises(ValueError, match="NaN"):
        between(a, b, [math.nan])
    with pytest.raises(ValueError, match=r"one shape \(B, \*D\)"):
        between(a[0], b[0], shares)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("angle", [1e-3, 1.0, 3.0, math.pi - 1e-4])
def test_lengths_and_angles_change_evenly_on_the_sphere(dtype: torch.dtype, angle: float) -> None:
    a = torch.tensor([[2.0, 0.0]], dtype=dtype)
    b = 5 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=dtype)
    c = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=F64)
    path = between(a, b, c)
    assert path.dtype == dtype
    turned = torch.atan2(path[:, 0, 1], path[:, 0, 0]).double()
    tolerance = {"rtol": 0, "atol": 3e-3 * angle if dtype == torch.float32 else 1e-9}
    torch.testing.assert_close(turned, c * angle, **tolerance)
    torch.testing.assert_close(path[:, 0].norm(dim=1).double(), 2 + 3 * c, rtol=1e-6, atol=0)
    opposite = -b / 5 * 2 if angle == 1.0 else -a * 1.5
    with pytest.raises(ValueError, match="opposite"):
        between(b if angle == 1.0 else a, opposite, c)


def test_interpolation_starts_and_ends_at_the_data() -> None:
    law = problems.line(VP)
    x = law.sample(6, seeded()).sort(0).values
    path = interpolate(law, x[:3], x[3:], [0.0, 0.5, 1.0], metric="gaussian")
    torch.testing.assert_close(path[0], x[:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(path[2], x[3:], rtol=0, atol=1e-4)


def test_relabelling_keeps_the_quantile() -> None:
    """On the line the flow keeps quantiles: one Gaussian's are moved to the other's."""
    one, other = (
        sg.Gaussian(VP, torch.tensor([m], dtype=F64), s) for m, s in ((0.5, 0.3), (-1.0, 0.8))
    )
    x = one.sample(20, seeded())
    found = relabel(one, other, x, steps=4)
    # Both laws at T are N(0, 1) but for alpha_T = 0.0066.
    torch.testing.assert_close(found, -1.0 + 0.8 * (x - 0.5) / 0.3, rtol=0, atol=0.02)
    torch.testing.assert_close(relabel(one, one, x), x, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="one process"):
        relabel(one, problems.line(sg.EDM(80.0)), x)


def test_what_is_redrawn_has_the_law_of_the_model() -> None:
    law = problems.line(VP)
    x = law.sample(4000, seeded())
    kept, away = (redraw(law, x, level, seed=1) for level in (0.05, 3.0))
    for y in (kept, away):
        for power in (1, 2):
            u, v = x**power, y**power
            error = math.sqrt(float(u.var() + v.var()) / 4000)
            assert abs(float(u.mean() - v.mean())) < 4 * error
    # What is coarser than the noise stays.
    assert float((kept - x).abs().mean()) < 0.05
    assert abs(float(torch.corrcoef(torch.cat([away, x], 1).T)[0, 1])) < 0.5
    torch.testing.assert_close(redraw(law, x[:3], 0.3, seed=1), redraw(law, x, 0.3, seed=1)[:3])
    for level in (1e-4, 1e9):
        with pytest.raises(ValueError, match="level must lie between"):
            redraw(law, x, level)


def test_gradients_go_through_both() -> None:
    law = problems.gaussian(VP)
    x = law.sample(2, seeded()).requires_grad_()
    (gradient,) = torch.autograd.grad(decode(law, encode(law, x, 8), 8).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sde", [sg.CriticallyDamped(), TURNING], ids=["damped", "turning"])
def test_states_of_matrix_processes_have_latents(sde: sg.MatrixSDE) -> None:
    """Gaussian data keep P_t^(-1/2) (x - m_t) up to a rotation: its length, and the way back."""
    low = torch.tensor([[0.6, 0.0], [0.3, 0.4]], dtype=F64)
    mean = torch.tensor([[0.5, -0.2]], dtype=F64)
    score = sg.CorrelatedMixture(sde, torch.ones(1), mean, low @ low.mT)
    x = score.sample(6, seeded())
    if sde.added:
        x, _ = sde.begin(x, seeded(1))
    z = encode(score, x)
    torch.testing.assert_close(decode(score, z), x, rtol=0, atol=1e-4)

    def length(state: torch.Tensor, t: float) -> torch.Tensor:
        # (2, 2) for data in the plane with velocities, (2,) where the process mixes them.
        one = torch.eye(2 if sde.added else 1, dtype=F64)
        phi, a = torch.kron(sde.transition(t), one), torch.kron(sde.alpha(t), one)
        start = torch.eye(len(phi), dtype=F64) * sde.covariance(0.0)[-1, -1]
        start[:2, :2] = low @ low.mT
        law = phi @ start @ phi.mT + torch.kron(sde.spread(t), one)
        away = state.flatten(1) - a @ mean[0]
        return (away * torch.linalg.solve(law, away.mT).mT).sum(1)

    end = sg.ops.act(sde.sigma(sde.T), z)
    torch.testing.assert_close(length(end, sde.T), length(x, 0.0), rtol=1e-3, atol=1e-3)
    path = interpolate(score, x[:2], x[2:4], [0.0, 1.0])
    torch.testing.assert_close(path[1], x[2:4], rtol=0, atol=1e-4)


def test_units_of_states_go_in_and_out() -> None:
    sde = sg.CriticallyDamped()
    score = sg.CorrelatedMixture(sde, torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2))
    units = sg.facts.Units(torch.tensor(3.0), torch.tensor(10.0))
    model = score.with_facts(sg.Facts((2,), score.facts.std, None, units))
    x, _ = sde.begin(score.sample(3, seeded()), seeded(1))
    moved = torch.cat([3 + 10 * x[:, :1], x[:, 1:]], 1)
    torch.testing.assert_close(encode(model, moved), encode(score, x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(model, encode(model, moved)), moved, rtol=0, atol=1e-3)


def test_redrawing_states_is_refused() -> None:
    sde = sg.CriticallyDamped()
    score = sg.CorrelatedMixture(sde, torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2))
    with pytest.raises(TypeError, match=r"LinearSDE.*sde\.perturb"):
        redraw(score, torch.zeros(1, 2, 2), 0.5)
