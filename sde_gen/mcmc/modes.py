"""Where the score of a law vanishes at a peak: ascent instead of sampling.

Langevin dynamics without its noise is gradient ascent of log p. Noise levels help it as they help
the chains: at much noise there is one peak, and as the noise falls each state is led into one of
those that the law keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import check_count, check_finite, check_state, full_precision, match, sum_rest
from ..scores import Score
from .run import check_levels, linear_process
from .targets import Target, as_target


def modes(
    score: Score,
    x: Tensor,
    times: Tensor | Sequence[float],
    steps: int = 20,
    *,
    trajectory: bool = False,
) -> Tensor:
    """Climb log p_t by the score, at falling noise levels: where each start ends.

    At the i-th of L times ``steps`` steps of gradient ascent,

        x <- x + h s(x, t_i),      h = sigma_i^2 at first.

    A step of sigma^2 is one to alpha D(x, t), the denoised state, and never falls: no direction
    of log p_t curves down by more than 1 / sigma^2 (for a finite data set it is mean shift;
    Comaniciu & Meer 2002). Later steps are those of the secant, h |s|^2 / (s . (s - s_new))
    (Barzilai & Borwein 1988), but no less than sigma^2 and at most four times the last: peaks
    that are much wider than the noise would be far away. Between levels x scales with the signal
    level, as in ``annealed_langevin``. Peaks are not samples: how many starts end in each is the
    size of its basin and not its mass. Started where there is one peak, all follow it to one.

    Args:
        score: any Score that knows its linear process, exact or learned.
        x: where to start (B, *D), for example ``sde.prior(...)``; near the data, with few times,
            each start finds the peak above it.
        times: L falling times in (0, T]; of the last one are the modes that are found.
        steps: steps at each level; one call of the score each, and one more a level.
        trajectory: return the states after each level, (L, B, *D), in place of the last.

    Returns:
        (B, *D), in the coordinates of x_t at the last time; divide by ``sde.alpha`` of it for
        those of the data.

    Raises:
        TypeError: a score that does not know its linear process.
        ValueError: times that do not fall or leave (0, T]; numbers out of range.
        FloatingPointError: a state left every bound, or the score was not finite.

    >>> law = sg.GaussianMixture(sg.VP(), [0.7, 0.3], torch.tensor([[-1.0], [1.0]]), 0.2)
    >>> times, starts = sg.grids.log_snr(law.sde, 20), torch.linspace(-2, 2, 5)[:, None]
    >>> sg.mcmc.modes(law, starts, times[-1:], 40).flatten()
    tensor([-1.0, -1.0, -1.0, 1.0, 1.0])
    """
    check_state(x)
    check_finite(x)
    sde = linear_process(score)
    steps = check_count(steps, "steps")
    levels = check_levels(times, sde.T)
    alpha, sigma = sde.alpha(levels), sde.sigma(levels)
    gains = torch.cat([alpha.new_ones(1), alpha[1:] / alpha[:-1]]).tolist()
    states = []
    with torch.no_grad(), full_precision(x.device.type):
        for t, v, gain in zip(levels, (sigma**2).tolist(), gains, strict=True):
            x = _climb(as_target(score, x, t), gain * x, v, steps)
            if not bool(torch.isfinite(x).all()):
                raise FloatingPointError(f"states are not finite at t = {float(t):.4g}")
            states.append(x)
    return torch.stack(states) if trajectory else x


def _climb(law: Target, x: Tensor, v: float, steps: int) -> Tensor:
    """Ascent by steps of the secant, the first and the least of them v."""
    x = law.enter(x)
    h = x.new_full((len(x),), v)
    s = law.score(x)
    for _ in range(steps):
        x = x + match(h, x) * s
        new = law.score(x)
        square = sum_rest(s * s)
        bend = sum_rest(s * (s - new)).maximum(square / 4)  # h grows at most fourfold
        h = torch.where(square > 0, h * square / bend, h).clamp(min=v)
        s = new
    return law.leave(x)
