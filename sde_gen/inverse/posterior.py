"""A posterior is a score: the prior's, and that of the likelihood of what was observed.

    grad log p_t(x | o) = grad log p_t(x) + grad log p(o | x_t = x),

of which the second is approximated by grad_x log N(o; A D, A C_t A^T + S), D = E[x_0 | x_t], with
a rule for C_t = Cov[x_0 | x_t] (``sde_gen.inverse.covariance``). Several observations are solved
for together: what they leave open of x_0 is correlated, so their terms do not add.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..moments import alike
from ..ops import Time, as_time, full_precision, match
from ..scores import Score
from ..scores.base import Around
from ..scores.bound import check_batch
from ..sdes import Evaluation, LinearSDE
from .covariance import Covariance, DataCovariance, Here
from .observation import Observation
from .whitened import Whitened, apply


class Posterior(Around):
    """The score of x given observations, for any solver at any eta: one call of the prior each.

    The law that is sampled is exact for Gaussian data (``DataCovariance`` with their moments, or
    ``Tweedie``) and biased for others; eta = 1, which ``sample`` takes by itself, forgives most.

    Args:
        prior: a score that knows its ``LinearSDE``, exact or learned, guided or not. Its
            ``facts.units`` are the units of x in the observations.
        observations: one ``Observation``, or a list of them that hold jointly.
        covariance: the rule for Cov[x_0 | x_t].

    Raises:
        TypeError: a prior without process, no observation, something else than a rule.
        ValueError: x of another shape than the prior's; y for another number of samples.

    >>> from sde_gen import VP, Gaussian
    >>> from sde_gen.inverse import Matrix, exact_posterior
    >>> prior = Gaussian(VP(), torch.zeros(2).double(), 0.5)
    >>> seen = Observation(Matrix(torch.tensor([[1.0, 1.0]])), torch.ones(1), 0.1)
    >>> x = torch.tensor([[0.3, -1.2]]).double()
    >>> torch.allclose(Posterior(prior, seen)(x, 0.4), exact_posterior(prior, seen)(x, 0.4))
    True
    """

    eta: float = 1.0
    sde: LinearSDE

    def __init__(
        self,
        prior: Score,
        observations: Observation | Sequence[Observation],
        covariance: Covariance | None = None,
    ) -> None:
        covariance = DataCovariance() if covariance is None else covariance
        if not isinstance(covariance, Covariance):
            raise TypeError(
                f"covariance must be a rule such as DataCovariance(), got {covariance!r}"
            )
        self.covariance = covariance
        self._know(prior, Whitened(prior, observations, "Posterior"))

    def _know(self, prior: Score, seen: Whitened) -> None:
        if None not in (prior.batch, seen.batch) and prior.batch != seen.batch:
            raise ValueError(
                f"the prior is bound for {prior.batch} samples, y has rows for {seen.batch}"
            )
        assert isinstance(prior.sde, LinearSDE)
        self.prior, self.seen, self.sde = prior, seen, prior.sde
        self.batch = prior.batch if seen.batch is None else seen.batch
        self.facts, self.singular = prior.facts.of_another_law(), prior.singular
        self.end, self.temperature = prior.end, prior.temperature

    def __repr__(self) -> str:
        return f"Posterior({type(self.prior).__name__}, {self.seen.observation})"

    @property
    def around(self) -> Score:
        """The prior."""
        return self.prior

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the prior, or of the operator's x."""
        return self.prior.shape or self.seen.observation.operator.shape

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """grad log p_t(x | o), (B, *D)."""
        return self.evaluate(x, t).score

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """One call of the prior, and as many backward passes as the rule says."""
        check_batch(self, x, "y")
        prior, t = self.prior.given(**context) if context else self.prior, as_time(t)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        is_blind = alpha.device.type == "cpu" and bool((alpha == 0).any())
        jacobian = self.covariance.jacobian and not is_blind
        e = prior.linearise(x, t) if jacobian else prior.evaluate(x, t)
        with full_precision(x.device.type):
            d = e.denoised if x.device.type == "mps" else e.denoised.double()
            w = alike((sigma / alpha) ** 2, d)
            here = Here(self.seen, self.seen.at(d), e.pull, self.sde, t, w, self.prior.facts, x)
            if is_blind:
                return Evaluation(e.score, (d + _from_nothing(here)).to(x), e.head)
            g = self.covariance.term(here)
            score = e.score + (g / match(alpha, g)).to(x)
            return Evaluation(score, lambda: (d + match(w, g) * g.to(d)).to(x), e.head)

    def rows(self, index: slice | Tensor) -> Posterior:
        """The prior and the observations of these rows."""
        return self._of(self.prior.rows(index), self.seen.rows(index))

    def at_eta(self, eta: float) -> Posterior:
        """Of the prior at that noise level."""
        prior = self.prior.at_eta(eta)
        return self if prior is self.prior else self._of(prior, self.seen)

    def given(self, **context: Any) -> Posterior:
        """Bind arguments of the prior: ``posterior.given(y=labels)``."""
        # A label makes another law, but the moments of all data are the best guess of its own.
        return self._of(self.prior.given(**context).with_facts(self.prior.facts), self.seen)

    def _of(self, prior: Score, seen: Whitened) -> Posterior:
        other = copy.copy(self)
        other._know(prior, seen)
        return other


def _from_nothing(here: Here) -> Tensor:
    """E[x_0 | o] - E[x_0] where alpha = 0 and a state says nothing of the data: C B^T K^-1 r."""
    rule = DataCovariance()
    moments = rule.moments(here.facts)
    c = alike(moments.values, here.w).reshape(1, -1)
    return apply(moments, c, rule.solved(here, moments, c))
