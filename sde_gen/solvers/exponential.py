"""Exponential integrators for reversed linear processes: one class for the whole family.

In y = x / alpha, w = (sigma / alpha)^2 and lambda = -1/2 log w, every reversal of every linear
process is one equation (kappa = 1 + eta^2, D = E[x_0 | x] the denoised state):

    dy = -kappa (y - D) dlambda + sqrt(2) eta sqrt(w) dW.

Suppose the data were Gaussian with covariance C. Then Q = D + C (D - y) / w would be constant
(the data's mean), so the linear part is solved exactly and only Q is interpolated:

    dy = -kappa w / (C + w) (y - Q) dlambda + sqrt(2) eta sqrt(w) dW.

The *predictor* takes the step from t to s with the last p values of Q,

    y_s = rho^(kappa/2) y_t + sum_j W_j Q_j + sqrt((C + w_s) (1 - rho^(eta^2))) z,
    rho = (C + w_s) / (C + w_t),
    W_j = kappa int w / (C + w) ((C + w_s) / (C + w))^(kappa/2) l_j(lambda) dlambda,

with l_j the Lagrange basis through them (or another rule: ``weights``). The *corrector* takes the
step that led here once more, with the value of Q here among those that it interpolates: it moves
y by d = sum_j (W'_j - W_j) Q_j, and costs no call (Zhao et al. 2023). It moves Q too, by
(dD/dy (1 + C / w) - C / w) d: by nothing where dD/dy = C / (C + w), as for Gaussian data and far
from any data, and by -C / w d where D stays. ``_slope`` says what is taken between the two; after
a short step of a flow Q is left, and there is less to add up. With C = 0 (data prediction) order 1
is DDIM (eta = 0; Song et al. 2021) and DDPM's ancestral sampler (eta = 1; Ho et al. 2020), higher
orders are the multistep DPM-Solver++ and SDE-DPM-Solver++ (Lu et al. 2022) and SA-Solver (Xue et
al. 2023). With C the variance of the data every step is exact for Gaussian data, at every eta.

Above eta = 1 a step may be too long for its noise: it would throw a state beyond its denoised
state, and the next one farther back. In a step of length h in lambda eta^2 is therefore at most
coth(h) >= 1, where a step of order 1 is y_s = a y_t + (1 - a) D + noise with 0 <= a <= 1 for every
C. All eta have the same marginals and steps of any eta are exact for Gaussian data, so only the
path is calmer than was asked for, and on fine grids it is not. Order 1 with C = 0 is stable as is.

DPM-Solver++(2M), algorithm 2 of Lu et al. 2022, written out beside its configuration here:

>>> import torch
>>> from math import exp
>>> from sde_gen import VP, GaussianMixture, grids, solve
>>> from sde_gen.solvers import dpm_solver_pp
>>> sde = VP()
>>> score = GaussianMixture(sde, torch.ones(2), torch.tensor([[-1.0], [1.0]]).double(), 0.2)
>>> times = grids.log_snr(sde, 8)
>>> x_T = torch.tensor([[0.7], [-1.9]]).double()
>>> alpha, sigma = sde.alpha(times).tolist(), sde.sigma(times).tolist()
>>> h = (sde.log_snr(times).diff() / 2).tolist()
>>> x, before = x_T, None
>>> for i, t in enumerate(times[:-1]):
...     D = now = score.denoise(x, t)
...     if before is not None:
...         D = now + h[i] / h[i - 1] / 2 * (now - before)
...     x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (exp(-h[i]) - 1) * D
...     before = now
>>> torch.allclose(x, solve(sde.probability_flow(score), x_T, times, dpm_solver_pp()))
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..facts import facts_of
from ..moments import Coefficient, Moments, isotropic
from ..noise import Noise
from ..ops import check_count, check_kind, check_number
from ..sdes import SDE
from .base import Memory, Step, reversal
from .multistep import Multistep, Spread, bounded
from .weights import Polynomial, Weights

_STILL, _SHORT = 1e-3, 0.2
"""min(C / w, w / C), the rate at which Q changes in lambda, that counts as none; the longest first
step that is made in parts."""
_MOVES = (0.3, 0.6)
"""Lengths in lambda of a step of a flow up to which its correction leaves Q, and from which it
moves it."""
_STARTS = {
    (3, False): (3 / 2,),
    (4, False): (7 / 3, 4 / 3),
    (3, True): (2.0,),
    (4, True): (2.0, 1.0),
}
"""Lengths of the parts of a first step of length h, but the last, as powers of h, by the number of
values and the corrector. They are such that neither the state nor the values of Q that later steps
read there miss more than the order of the run, or 4, allows: a step that has k values is of local
order k + 1 (k + 2 with corrector), and a value read off a state that is e off makes the steps over
nodes (d apart) h^2 e / d wrong."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One step as what it is: linear in what is known, (x, s, q_1, q_2 ...), latest first.

    x, q: the next state, and q = alpha Q here, of which x has weight 1 where it is only read (Q
    where alpha = 0); std: of the normal z; all are functions of C.
    kept: how many values of Q the next step reads.
    reads_data: whether s stands for the denoised state: where alpha = 0 the score tells nothing.
    """

    reference: Moments
    x: tuple[Coefficient, ...]
    q: tuple[Coefficient, ...]
    std: Coefficient | None
    kept: int
    reads_data: bool

    @property
    def noisy(self) -> bool:
        """Whether a normal is drawn."""
        return self.std is not None

    def __call__(
        self, x: Tensor, s: Tensor, past: tuple[Tensor, ...], z: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """Both rows of the map, applied."""
        known = (x, s, *past)
        if self.kept and self.std is None:
            x, q = self.reference.both(self.x, self.q, known)
            return x, (q, *past[: self.kept - 1])
        if self.kept:
            past = (self.reference.apply(self.q, known), *past[: self.kept - 1])
        if self.std is None or z is None:
            return self.reference.apply(self.x, known), past
        return self.reference.apply((*self.x, self.std), (*known, z)), past


class Start(NamedTuple):
    """A first step that is made in parts, for a multistep method that has no past values yet."""

    parts: tuple[Step[Combination], ...]


class Levels(NamedTuple):
    """The nodes of a grid: alpha, sigma and lambda, (N + 1,) each."""

    alpha: np.ndarray
    sigma: np.ndarray
    lam: np.ndarray

    def w(self, i: int) -> float:
        """(sigma / alpha)^2 at node i; infinite where no signal is left."""
        return float((self.sigma[i] / self.alpha[i]) ** 2) if self.alpha[i] else math.inf


class Prediction(NamedTuple):
    """The predictor's step in y: the factor of y, the weights of Q (p, m), the spread of z; w at
    its end, and kappa."""

    decay: np.ndarray
    weights: np.ndarray
    spread: np.ndarray
    w: float
    kappa: float


class Correction(NamedTuple):
    """How y moves at a node once Q is known there: the weights of Q (p + 1, m); and dQ/dy (m,)."""

    weights: np.ndarray
    slope: np.ndarray


class Exponential(Multistep):
    """Multistep exponential integrator for the reversal of a linear process, at any eta.

    Args:
        order: how many values of Q the step interpolates, 1 to 4.
        reference: covariance C of the data that every step is exact for: a variance, or
            ``Moments``. 0 is data prediction, infinity noise prediction (Q is then the noise).
        corrector: correct each state with the score at it, at no extra call; one order more.
        weights: the rule of interpolation; ``Polynomial()`` by default.
        spread: what the normals of a step are multiplied by, where that depends on the state, for
            eta > 0; the right spread of Gaussian data by default.

    ``order`` (the attribute) is the measured order of convergence for eta = 0: that of the
    interpolation, and one more with the corrector. The first steps of a run have fewer past
    values. Where Q changes there already, in a flow that starts inside (0, T), the first step is
    therefore made in ``start_calls`` + 1 = p - 1 parts for p > 2 values, the first the shortest,
    if it is shorter than 0.2 in lambda: for few steps more steps are the better use of calls. The
    order is then kept up to 4.
    Weak order min(order, 2) for eta > 0, strong order 1; one call a step but for that start.

    A grid may end at t = 0. The last step then takes order 1: for C = 0 Tweedie's denoising, for
    C > 0 the exact end of Gaussian data (about half of Tweedie's correction on smooth data). It
    may start where alpha = 0, and a flow may end there: that step too takes order 1.

    Raises:
        ValueError: an order that is not 1 .. 4, or a negative reference.

    >>> law = sg.Gaussian(sg.VP(), torch.zeros(2))
    >>> sg.sample(law, 8, 10, seed=0, solver=sg.Exponential(2, 1.0, corrector=True)).shape
    torch.Size([8, 2])
    """

    takes_infinite = True

    def __init__(
        self,
        order: int = 3,
        reference: float | Moments = 0.0,
        corrector: bool = False,
        weights: Weights | None = None,
        spread: Spread | None = None,
    ) -> None:
        order = check_count(order, "order", 1, 4)
        check_kind(corrector, (bool, np.bool_), "corrector", "True or False")
        if weights is not None:
            check_kind(weights, Weights, "weights", "Weights, such as Polynomial()")
        if not isinstance(reference, Moments):
            reference = check_number(reference, "reference", least=0, infinite=True)
        self.nodes, self.corrector = order, corrector
        self.kept = order if corrector else order - 1
        self.reference = reference if isinstance(reference, Moments) else isotropic(reference)
        self.weights = Polynomial() if weights is None else weights
        self.spread = spread
        self.order = order + corrector
        self.weak = min(self.order, 2)
        self.multistep = order > 1 or corrector
        self.start_calls = max(order - 2, 0)

    def check(self, process: SDE) -> None:
        """The reversal of a ``LinearSDE``."""
        reversal(self, process)

    def noise_level(self, eta: float, h: float) -> float:
        """The eta of a step of length h in lambda under a process of noise level eta."""
        stable = not self.multistep and not bool(self.reference.values.any())
        return eta if stable else bounded(eta, h)

    def plan(self, process: SDE, times: Tensor) -> list[Step[Combination | Start]]:
        """The map of each step, in float64; the first may be several."""
        fine = self._started(process, times)
        steps = self.maps(process, fine)
        first = 1 + len(fine) - len(times)
        if first == 1:
            return [*steps]
        t, s = times[:2].tolist()
        return [Step(t, s, Start(tuple(steps[:first]))), *steps[first:]]

    def _started(self, process: SDE, times: Tensor) -> Tensor:
        """The grid, with ``start_calls`` more nodes in a short first step where Q changes."""
        reverse, sde = reversal(self, process)
        lam = (sde.log_snr(times[:2]) / 2).tolist()
        inside = float(times.max()) < sde.T and all(map(math.isfinite, lam))
        h, m = lam[1] - lam[0], self.start_calls
        if reverse.eta or not (m and inside and abs(h) < _SHORT):
            return times
        log_ratio = 2 * lam[0] + 2 * math.log(facts_of(reverse.score).std or 1.0)
        if math.exp(-abs(log_ratio)) < _STILL:
            return times
        powers = _STARTS[self.nodes, self.corrector]
        shares = [2.0 ** (k - m) * abs(h) ** (power - 1) for k, power in enumerate(powers)]
        inner = sde.time_at(2 * (lam[0] + h * torch.tensor(shares).to(times).cumsum(0)))
        return torch.cat([times[:1], inner, times[1:]])

    def maps(self, process: SDE, times: Tensor) -> list[Step[Combination]]:
        """The map of each step of exactly this grid."""
        reverse, sde = reversal(self, process)
        alpha, sigma = sde.alpha(times).numpy(), sde.sigma(times).numpy()
        if sigma[0] == 0:
            raise ValueError("Exponential cannot start at t = 0, where the noise level is 0")
        with np.errstate(divide="ignore"):
            levels = Levels(alpha, sigma, np.log(alpha) - np.log(sigma))
        if -math.inf < levels.lam[0] < -300 or levels.lam[0] == levels.lam[1] == -math.inf:
            raise ValueError(
                f"at t = {float(times[0]):.6g} nothing is left of the data (signal / noise <"
                " 1e-130): start at grids.default_start(sde)"
            )
        steps, change = list[Step[Combination]](), None
        for i, (t, s) in enumerate(pairwise(times.tolist())):
            step = self._predictor(levels, i, reverse.eta)
            steps.append(Step(t, s, self._combine(levels, i, step, change)))
            if self.corrector:
                change = self._corrector(levels, i, step)
        return steps

    def step(
        self, process: SDE, x: Tensor, step: Step[Any], noise: Noise, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """One evaluation of the score, then the map; or as many as a start has parts."""
        parts = step.numbers.parts if isinstance(step.numbers, Start) else (step,)
        for part in parts:
            x, memory = super().step(process, x, part, noise, memory)
        return x, memory

    def _predictor(self, levels: Levels, i: int, eta: float) -> Prediction:
        """From node i to the next."""
        c: np.ndarray = self.reference.values.numpy()
        start, end = levels.lam[i : i + 2]
        w_t, w_s = levels.w(i), levels.w(i + 1)
        eta = self.noise_level(eta, end - start)
        kappa = 1 + eta**2
        if np.isinf(c).any():
            if w_s == 0 or math.isinf(w_t + w_s):
                raise ValueError(
                    "noise prediction (reference = infinity) can neither end at t = 0 nor start or"
                    " end where alpha = 0: the noise says nothing of the data there"
                )
            decay, spread = np.ones(1), np.array([eta * math.sqrt(abs(w_t - w_s))])
        elif math.isinf(w_s):
            # x_s = sigma_s (y_t - Q) / sqrt(C + w_t): of order 1, and in units of sigma_s.
            decay = 1 / np.sqrt(c + w_t)
            return Prediction(decay, -decay[None], np.zeros_like(c), w_s, kappa)
        else:
            with np.errstate(divide="ignore"):
                log_rho = np.log((c + w_s) / (c + w_t))
            decay = np.exp(kappa / 2 * log_rho)
            fade = -np.expm1(eta**2 * log_rho) if eta else np.zeros_like(c)
            spread = np.sqrt((c + w_s) * fade)
        if w_s == 0:
            return Prediction(decay, (1 - decay)[None], spread, w_s, kappa)
        nodes = levels.lam[max(0, i + 1 - self.nodes) : i + 1][::-1]
        return Prediction(decay, self._weigh(nodes, start, end, kappa), spread, w_s, kappa)

    def _corrector(self, levels: Levels, i: int, step: Prediction) -> Correction | None:
        """What knowing Q at the end of step i changes there."""
        if levels.sigma[i + 1] == 0 or levels.alpha[i + 1] == 0:
            return None
        nodes = levels.lam[i + 1 - len(step.weights) : i + 2][::-1]
        new = self._weigh(nodes, levels.lam[i], levels.lam[i + 1], step.kappa)
        new[1:] -= step.weights
        h = abs(nodes[0] - nodes[1]) if step.kappa == 1 else math.inf
        return Correction(new, self._slope(step.w, h))

    def _slope(self, w: float, h: float) -> np.ndarray:
        """dQ/dy (m,) with which a correction at w moves Q, after a step of length h.

        That of dD/dy = C w / (C + w)^2, which is the Gaussian's far from the data and nearly 0
        among them, where D is that of the mode at hand; 0 after a short step of a flow.
        """
        c: np.ndarray = self.reference.values.numpy()
        if np.isinf(c).any():
            return np.zeros_like(c)
        short, long = _MOVES
        share = min(max((h - short) / (long - short), 0.0), 1.0)
        return -c / w * c / (c + w) * share

    def _weigh(self, nodes: np.ndarray, start: float, end: float, kappa: float) -> np.ndarray:
        """The rule's weights. Where alpha = 0 lambda is -infinity: no polynomial goes through a
        value there, and a step from there sees nothing but its latest value."""
        c: np.ndarray = self.reference.values.numpy()
        weights = np.zeros((len(nodes), len(c)))
        if math.isinf(start):
            weights[0] = 1.0
        else:
            finite = np.isfinite(nodes)
            weights[finite] = self.weights(nodes[finite], start, end, c, kappa)
        return weights

    def _combine(
        self, levels: Levels, i: int, step: Prediction, change: Correction | None
    ) -> Combination:
        """What is done at node i: read Q, correct, predict, as three matrices in a product."""
        c: np.ndarray = self.reference.values.numpy()
        alpha, sigma = levels.alpha[i], levels.sigma[i]
        alpha_s = levels.alpha[i + 1] or levels.sigma[i + 1]
        size = 2 + min(i, self.kept)
        # What is known is x, alpha_i Q_i, alpha_{i-1} Q_{i-1}, ...; the weights are those of Q.
        unit = 1 / np.array([levels.alpha[j] or 1.0 for j in range(i, i + 1 - size, -1)])
        one = np.tile(np.eye(size), (len(c), 1, 1))
        read = one.copy()
        read[:, 1, :2] = _reading(alpha, sigma, c)
        correct = one
        if change is not None:
            known = slice(1, 1 + len(change.weights))
            moves = alpha * change.weights.T * unit[: len(change.weights)]
            correct[:, 0, known] += moves
            correct[:, 1, known] += change.slope[:, None] * moves
        predict = np.zeros((len(c), 2, size))
        predict[:, 0, 0] = _decay(alpha, sigma, alpha_s, c, step)
        predict[:, 0, 1 : 1 + len(step.weights)] = (
            alpha_s * step.weights.T * unit[: len(step.weights)]
        )
        predict[:, 1, 1] = 1.0
        x, q = (predict @ correct @ read).transpose(1, 2, 0)
        f = self.reference.coefficient
        return Combination(
            self.reference,
            x=tuple(f(row) for row in x),
            q=tuple(f(row) for row in q),
            std=f(alpha_s * step.spread) if step.spread.any() else None,
            kept=self.kept,
            reads_data=bool(alpha == 0),
        )


def _reading(alpha: float, sigma: float, c: np.ndarray) -> np.ndarray:
    """alpha Q (Q where alpha = 0) at (x, s) as coefficients (m, 2)."""
    if np.isinf(c).any():
        return np.array([[0.0, -sigma * (alpha or 1.0)]])
    if alpha == 0:
        return np.tile([0.0, 1.0], (len(c), 1))
    # Q = D + C (D - y) / w = y + (C + w) alpha s: nothing cancels.
    return np.stack([np.ones(len(c)), c * alpha**2 + sigma**2], 1)


def _decay(
    alpha: float, sigma: float, alpha_s: float, c: np.ndarray, step: Prediction
) -> np.ndarray:
    """The factor of x in the next x, alpha_s / alpha rho^(kappa/2)."""
    if alpha:
        return alpha_s / alpha * step.decay
    # Its limit as alpha falls to 0; rho alpha^-2 stays.
    return alpha_s * np.sqrt(c + step.w) / sigma if step.kappa == 1 else np.zeros_like(c)
