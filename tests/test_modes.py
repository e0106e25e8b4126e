"""Climbing by the score, against scipy's optimum of the density and closed forms."""

from __future__ import annotations

import pytest
import torch
from problems import F64
from scipy.optimize import minimize
from torch import Tensor

from sde_gen import EDM, VP, Empirical, Gaussian, GaussianMixture, Score, grids
from sde_gen.mcmc import modes
from sde_gen.ops import Time

MEANS = torch.tensor([[-1.0, 0.2], [0.1, -0.9], [0.8, 0.7], [0.35, -0.5]], dtype=F64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
GRID = torch.cartesian_prod(*[torch.linspace(-1.5, 1.5, 9, dtype=F64)] * 2)


def mixture() -> GaussianMixture:
    """Four components, two of which share a peak."""
    std = torch.tensor([0.3, 0.25, 0.1, 0.35], dtype=F64)
    return GaussianMixture(VP(), [0.4, 0.3, 0.2, 0.1], MEANS, std)


def peak(law: GaussianMixture, near: Tensor, t: float) -> Tensor:
    """The maximum of log p_t that scipy finds from a point."""

    def fall(x: object) -> tuple[float, object]:
        y = torch.as_tensor(x, dtype=F64)[None]
        return -float(law.log_prob(y, t)), -law(y, t)[0].numpy()

    found = minimize(fall, near.numpy(), jac=True, method="BFGS", options={"gtol": 1e-11})
    return torch.from_numpy(found.x)


def distinct(x: Tensor, digits: int = 6) -> Tensor:
    """Rows that differ, rounded."""
    return torch.unique(x.mul(10**digits).round() / 10**digits, dim=0)


@pytest.mark.parametrize("t", [1e-3, 0.02, 0.4])
def test_finds_the_modes_of_a_mixture(t: float) -> None:
    law = mixture()
    found = modes(law, GRID, [t], 150)
    wanted = torch.stack([peak(law, law.sde.alpha(t) * m, t) for m in MEANS])
    assert len(distinct(wanted, 4)) == {1e-3: 3, 0.02: 3, 0.4: 1}[t]
    off = torch.cdist(found, wanted)
    assert off.amin(1).max() < 1e-7  # BFGS stops there: every start ends at a mode
    assert off.amin(0).max() < 1e-7  # and every mode is found


def test_there_is_one_mode_at_much_noise_and_all_are_led_to_one() -> None:
    law = mixture()
    x = law.sde.prior(64, 2, generator=torch.Generator().manual_seed(0)).double()
    path = modes(law, x, grids.log_snr(law.sde, 25, end=0.01), 40, trajectory=True)
    assert len(distinct(path[0], 3)) == 1
    wanted = peak(law, law.sde.alpha(0.01) * MEANS[1], 0.01)
    torch.testing.assert_close(path[-1], wanted.expand(64, 2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sde", [VP(), EDM()], ids=["VP", "EDM"])
def test_one_peak_is_found_from_anywhere(sde: VP | EDM) -> None:
    std = torch.tensor([2.0, 0.5, 0.05], dtype=F64)
    law = Gaussian(sde, MEAN, std)
    x = 30 * torch.randn(16, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    t = float(sde.time_at(9.0))  # noise of 0.011: the first step is 1e-4, the widest peak 4
    found = modes(law, x, [t], 150) / sde.alpha(t)
    torch.testing.assert_close(found, MEAN.expand(16, 3), rtol=0, atol=1e-8)


def test_a_step_is_the_denoised_state_and_never_falls() -> None:
    law, t = mixture(), 0.1
    once = modes(law, GRID, [t], 1)
    torch.testing.assert_close(once, law.sde.alpha(t) * law.denoise(GRID, t))
    assert (law.log_prob(once, t) >= law.log_prob(GRID, t)).all()
    twice = modes(law, GRID, [t, t / 2], 1)
    alpha = law.sde.alpha(t / 2)
    again = alpha * law.denoise(once * alpha / law.sde.alpha(t), t / 2)
    torch.testing.assert_close(twice, again)


def test_peaks_of_a_finite_data_set_are_its_points() -> None:
    points = torch.randn(12, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    law, t = Empirical(VP(), points), 1e-5
    found = modes(law, points + 0.01, [t], 40) / law.sde.alpha(t)
    torch.testing.assert_close(found, points, rtol=0, atol=1e-10)


def test_each_start_climbs_for_itself() -> None:
    law, times = mixture(), grids.log_snr(VP(), 6, end=0.01)[3:]
    alone = torch.cat([modes(law, x[None], times, 9) for x in GRID[:5]])
    torch.testing.assert_close(alone, modes(law, GRID, times, 9)[:5], rtol=0, atol=1e-12)
    images = GRID[:8].reshape(8, 1, 2, 1)
    shaped = GaussianMixture(VP(), [0.5, 0.5], MEANS[:2].reshape(2, 1, 2, 1), 0.3)
    assert modes(shaped, images.float(), times, 2).shape == images.shape
    assert modes(shaped, images.float(), times, 2).dtype == torch.float32


class Broken(Score):
    """A score that has an end."""

    def __init__(self) -> None:
        self.sde = VP()

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        return x / 0


def test_refuses_what_cannot_be_climbed() -> None:
    law, x = mixture(), GRID
    with pytest.raises(TypeError, match="knows its linear process"):
        modes(lambda x: x, x, [0.1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must fall within"):
        modes(law, x, [0.1, 0.2])
    with pytest.raises(ValueError, match="must fall within"):
        modes(law, x, [0.1, 0.0])
    with pytest.raises(ValueError, match="steps"):
        modes(law, x, [0.1], 0)
    with pytest.raises(FloatingPointError, match=r"not finite at t = 0\.1"):
        modes(Broken(), x, [0.1], 2)
