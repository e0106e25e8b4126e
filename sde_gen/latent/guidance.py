"""Guidance through a decoder: what is asked of the data, and felt by the latent.

Guidance *in the latent* is algebra on the score of latents, ``model.over(model.score + term)``,
or of models, ``ClassifierFree(model, 1.0, y=y)``. What is asked of the data (a classifier of
images, a misfit) is a function of E[x | z], and its gradient goes through the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..moments import isotropic
from ..ops import Time, as_time, check_callable, check_kind, match
from ..scores import Score
from ..scores.base import Around, inherit
from ..scores.weights import Weight, as_weight, scale
from ..sdes import Evaluation, LinearSDE


class Through(Around):
    """s(z, t) + weight grad_z log f(xhat), xhat = E[x | zhat], zhat = E[z_0 | z_t = z].

    One call of the prior and one backward pass through it and the decoder. log f of the mean is
    not the mean of f given z_t: guidance of this kind pulls too hard where z_t leaves much open
    (Chung et al. 2023; Bansal et al. 2023, "Universal guidance"). Of a model without an
    autoencoder xhat is the denoised state in the units of the data.

    Args:
        prior: a ``LatentModel``, or any score that knows its ``LinearSDE``.
        log_f: of data, (B, *D) -> (B,) nats: a log-likelihood, a log-probability of a class.
        weight: a number, one for each sample (B,), or a function of t.

    Raises:
        TypeError: no score, no function. ValueError: when called: log_f returns another shape.

    >>> from sde_gen import latent
    >>> half = sg.networks.Pair(lambda x: x[:, :1], lambda z: z.repeat(1, 2), (2,), (1,), std=0.1)
    >>> model = latent.LatentModel(half, sg.Gaussian(sg.VP(), torch.zeros(1)))
    >>> bright = latent.Through(model, lambda x: x.sum(1), 2.0)
    """

    sde: LinearSDE

    def __init__(
        self, prior: Score, log_f: Callable[[Tensor], Tensor], weight: Weight = 1.0
    ) -> None:
        check_kind(prior, Score, "prior", "a Score, such as a LatentModel")
        check_kind(prior.sde, LinearSDE, "prior.sde", "a LinearSDE")
        check_callable(log_f, "log_f", "log_f(x)")
        self.prior, self.log_f, self.weight = prior, log_f, as_weight(weight)
        inherit(self, [prior], {"weight": self.weight})

    @property
    def around(self) -> Score:
        """The prior."""
        return self.prior

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """The guided score, (B, *latent)."""
        return self.evaluate(x, t).score

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """One call of the prior; the denoised state is moved as the score is."""
        prior = self.prior.given(**context) if context else self.prior
        t, e = as_time(t), prior.linearise(x, t)
        assert e.pull is not None
        w = self.weight(t) if callable(self.weight) else self.weight
        wish = scale(w, torch.func.grad(self._asked)(e.denoised))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        if alpha.device.type == "cpu" and bool((alpha == 0).any()):
            # The pull is 0 and sigma^2 / alpha infinite; their product tends to Cov[z_0].
            known = prior.facts.moments or isotropic(prior.facts.std**2)
            c = known.coefficient(known.values.numpy())
            return Evaluation(e.score, e.denoised + known.apply([c], [wish]), e.head)
        pulled = e.pull(wish)
        step = match(sigma**2 / alpha, x)
        return Evaluation(e.score + pulled, lambda: e.denoised + step * pulled, e.head)

    def _asked(self, denoised: Tensor) -> Tensor:
        found = self.log_f(self.prior.facts.decode(denoised))
        if not isinstance(found, Tensor) or found.shape != denoised.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"log_f must return ({len(denoised)},), got {got}")
        return found.sum()

    def at_eta(self, eta: float) -> Through:
        """Of the prior at that noise level."""
        prior = self.prior.at_eta(eta)
        return self if prior is self.prior else Through(prior, self.log_f, self.weight)

    def given(self, **context: Any) -> Through:
        """With context bound to the prior."""
        return Through(self.prior.given(**context), self.log_f, self.weight)

    def rows(self, index: slice | Tensor) -> Through:
        """The prior and the weights of these rows; log_f must serve any."""
        weight = self.weight
        if isinstance(weight, Tensor) and weight.ndim:
            weight = weight[index]
        return Through(self.prior.rows(index), self.log_f, weight)
