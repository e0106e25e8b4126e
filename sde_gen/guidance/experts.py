"""Powers, products and mixtures of the laws that scores stand for.

Let p_i,t be noised laws and S = sum_i a_i s_i. At t = 0 this is the score of prod_i p_i^a_i, at
t > 0 that of no noised law. Three things can be done about it that cost nothing:

- ``Tempered``: a power p^a, by scaling the Langevin part of a reversal alone: exact for any
  Gaussian, for every eta > 0.
- ``Product``: any powers, by weights that depend on the noise level: exact for Gaussians of known
  covariances, for every eta, the flow included.
- ``Mixture``: sums of densities, exact for all laws whose densities are known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..moments import Moments, alike, isotropic
from ..ops import Time, as_time, check_kind, check_number, full_precision, match, on_host
from ..scores import Score, Sum
from ..scores.base import Around, inherit
from ..scores.bound import check_batch
from ..scores.weights import Weight, as_weight
from ..sdes import Evaluation, LinearSDE, evaluate
from .conditions import check_pairs
from .levels import level


class Tempered(Around):
    """p^a / Z, of a score s of p: colder for a > 1, hotter for a < 1.

    A reversal is a flow, drift b - g^2 s / 2, and Langevin dynamics, drift -eta^2 g^2 s / 2 with
    noise eta g. If the latter is scaled by a, Gaussian data N(m, C) stay at N(m, (C + w) / a) in
    x / alpha, w = (sigma / alpha)^2, from a start that is as much colder: the end is N(m, C / a)
    for every C and every eta > 0. In a reversal this score is therefore

        (1 + a eta^2) / (1 + eta^2) s(x, t),

    and ``sample`` starts at 1 / sqrt(a) of the width (``temperature``). On other data the modes
    are as narrow as they should be, and their weights lie between those of p and of p^a:
    ``inverse.corrected`` has them right. The naive a s(x, t) has as variance, for N(0, v) and
    large sigma_T, eta^2 v / ((1 + eta^2) a - 1) with noise, and (v / w_T)^(a - 1) v by the flow,
    which depends on where the process ends.

    Read by itself, outside a reversal, it is that of eta = 1, which ``sample`` takes too.

    Args:
        score: the score of p.
        a: the power, > 0.

    Raises:
        ValueError: a <= 0; a classifier, whose power is a number times it; when reversed at
            eta = 0, where there is no Langevin part to scale.

    >>> from sde_gen import VP, Gaussian, sample
    >>> cold = Tempered(Gaussian(VP(), torch.zeros(1), 1.0), 4.0)
    >>> x = sample(cold, 4000, 50, seed=0)
    >>> bool(abs(x.std() - 0.5) < 0.02)
    True
    """

    def __init__(self, score: Score, a: float) -> None:
        _check_law(score, "score")
        a = check_number(a, "a", above=0)
        inner, p = score.power_of  # that of a power
        self.score, self.a = p, a * inner
        inherit(self, [score])
        self.eta, self.temperature = score.eta or 1.0, score.temperature / a

    @property
    def power_of(self) -> tuple[float, Score]:
        """(a, the score of p): ``solve`` steps the same equation by it, and exactly so."""
        return self.a, self.score

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """(1 + a eta^2) / (1 + eta^2) s(x, t), (B, *D)."""
        return self.evaluate(x, t).score

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """One evaluation of the score; the denoised state by Tweedie's formula."""
        t, e = as_time(t), self.score.evaluate(x, t, **context)
        s = (1 + self.a * self.eta**2) / (1 + self.eta**2) * e.score
        return Evaluation(s, lambda: self._tweedie(x, t, s), e.head)

    def factors(self, x: Tensor, t: Time) -> list[tuple[float, Tensor]]:
        """Those of the score, to the power a."""
        return [(self.a * w, s) for w, s in self.score.factors(x, t)]

    def at_eta(self, eta: float) -> Tempered:
        """As a reversal of this noise level reads it."""
        if eta == 0:
            raise ValueError(
                "Tempered acts through the noise of a reversal: eta must be positive; for the"
                " flow (a likelihood, eta = 0) take Product([(score, a)])"
            )
        other = copy.copy(self)
        other.eta = float(eta)
        return other

    def given(self, **context: Any) -> Tempered:
        """Of the score given the context."""
        return self._of(self.score.given(**context))

    def rows(self, index: slice | Tensor) -> Tempered:
        """Of the score for these rows."""
        return self._of(self.score.rows(index))

    def _of(self, score: Score) -> Tempered:
        other = Tempered(score, self.a)
        other.eta = self.eta
        return other


class _Experts(Score):
    """Scores with a number each."""

    def __init__(self, terms: Sequence[tuple[Score, float]]) -> None:
        check_pairs(terms, f"{type(self).__name__} needs [(score, number), ...]")
        for score, _ in terms:
            _check_law(score, "a term")
        self.terms = [(score, check_number(a, "a number of a term")) for score, a in terms]
        self.scores = [score for score, _ in self.terms]
        inherit(self, self.scores)
        if self.sde is None:
            raise TypeError(f"{type(self).__name__} needs scores that know their process (.sde)")

    @property
    def device(self) -> torch.device:
        """That of the first term."""
        return self.scores[0].device

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """The combination of the scores, (B, *D)."""
        return self.evaluate(x, t).score

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """One evaluation of each term."""
        check_batch(self, x, "a term")
        experts = self.given(**context) if context else self
        t = as_time(t)
        each = [evaluate(score, x, t, self._tweedie) for score in experts.scores]
        return experts._combined(x, t, each)

    def _combined(self, x: Tensor, t: Tensor, each: list[Evaluation]) -> Evaluation:
        raise NotImplementedError

    def _map(self, change: Callable[[Score], Score]) -> Any:
        return type(self)([(change(score), a) for score, a in self.terms])

    def given(self, **context: Any) -> Any:
        """The context bound to each term, whose facts stay: moments too are told by them."""
        return self._map(lambda score: score.given(**context).with_facts(score.facts))

    def rows(self, index: slice | Tensor) -> Any:
        """Each term for these rows."""
        return self._map(lambda score: score.rows(index).with_facts(score.facts))

    def at_eta(self, eta: float) -> Any:
        """Of each term."""
        changed = [score.at_eta(eta) for score in self.scores]
        same = all(a is b for a, b in zip(changed, self.scores, strict=True))
        return self if same else self._map(lambda score: score.at_eta(eta))


class Product(_Experts):
    """prod_i p_i^a_i / Z of experts p_i, exact where they are Gaussian, for every eta.

    Say that expert i has covariance C_i. Then Cov[x_0 | x_t] = (P_i + 1 / w)^-1 under it, with
    P_i = C_i^-1 and w = (sigma / alpha)^2, and Gaussians multiply to

        s = (P + 1 / w)^-1 sum_i a_i (P_i + 1 / w) s_i(x, t),      P = sum_i a_i P_i.

    At w = 0 this is the sum of a_i s_i, at large w the mean of the experts by what they know. One
    score with a power is tempered: the factor of s rises from 1 to a where w falls below C. Where
    all C_i are one and the powers sum to 1, as in classifier-free guidance, nothing is changed.

    Args:
        terms: pairs of a score and its power, negative where it is divided by. C_i is that of its
            ``facts.moments``, or its ``facts.std`` in every direction; ``with_facts`` tells it.
            Where one has principal directions, matrices (n, n) are kept for n numbers in a sample.

    Raises:
        TypeError: no terms; no process that is known, or one with matrices.
        ValueError: what two terms know differs; a C_i that is not invertible; powers of which
            Gaussians have no density, P <= 0.

    >>> from sde_gen import VP, Gaussian
    >>> sde = VP()
    >>> a, b = (Gaussian(sde, torch.tensor([m]).double(), s) for m, s in ((0.0, 1.0), (3.0, 0.5)))
    >>> exact = Gaussian(sde, torch.tensor([2.4]).double(), math.sqrt(0.2))
    >>> x = torch.tensor([[0.7]]).double()
    >>> torch.allclose(Product([(a, 1.0), (b, 1.0)])(x, 0.5), exact(x, 0.5))
    True
    """

    def __init__(self, terms: Sequence[tuple[Score, float]]) -> None:
        super().__init__(terms)
        check_kind(self.sde, LinearSDE, "the process of a product", "a LinearSDE, such as VP()")
        known = [s.facts.moments or isotropic(s.facts.std**2) for s in self.scores]
        powers = [a for _, a in self.terms]
        self._basis: Tensor | None = None
        if all(m.basis is None for m in known):
            self._parts = [1 / m.values for m in known]
        else:
            n = next(len(m.basis) for m in known if m.basis is not None)
            self._parts = [_precision(m, n) for m in known]
        whole = sum(a * p for a, p in zip(powers, self._parts, strict=True))
        assert isinstance(whole, Tensor)
        self._whole, values = whole, whole
        if whole.ndim > 1:
            values, self._basis = torch.linalg.eigh(whole)
            self._whole = values
        if not bool(torch.isfinite(values).all()):
            raise ValueError("a product needs covariances C_i that are invertible")
        if not bool((values > 0).all()):
            raise ValueError(
                f"powers {powers} make no density of Gaussians with these covariances: sum_i a_i"
                f" C_i^-1 has the eigenvalue {float(values.min()):.3g}"
            )

    def factors(self, x: Tensor, t: Time) -> list[tuple[float, Tensor]]:
        """Those of the experts, to their powers."""
        each = [(a, score.factors(x, t)) for score, a in self.terms]
        return [(a * w, s) for a, parts in each for w, s in parts]

    def _combined(self, x: Tensor, t: Tensor, each: list[Evaluation]) -> Evaluation:
        assert self.sde is not None
        w = level(self.sde, t) ** 2
        # Of (P + 1 / w)^-1 (P_i + 1 / w), both times w / (1 + w): finite at 0 and at infinity.
        one, c = 1 / (1 + w), torch.where(torch.isinf(w), 1.0, w / (1 + w))

        def combined(tensors: Sequence[Tensor]) -> Tensor:
            return self._weighed(one.reshape(-1, 1), c.reshape(-1, 1), tensors)

        s = combined([e.score for e in each])
        head = next((e.head for e in each if e.head is not None), None)
        if on_host(w.device) and bool(torch.isinf(w).any()):
            return Evaluation(s, lambda: combined([e.denoised for e in each]), head)
        return Evaluation(s, lambda: self._tweedie(x, t, s), head)

    def _weighed(self, one: Tensor, c: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """(one + c P)^-1 sum_i a_i (one + c P_i) v_i for v_i (B, *D) and numbers (1 or B, 1)."""
        like, powers = tensors[0], [a for _, a in self.terms]
        if self._basis is None:
            below, total = one + c * self._whole, torch.zeros_like(like)
            for a, p, v in zip(powers, self._parts, tensors, strict=True):
                gain = alike(a * (one + c * p) / below, like)
                shape = (
                    len(gain),
                    *(like.shape[1:] if gain.shape[1] > 1 else (1,) * (like.ndim - 1)),
                )
                total = total + gain.reshape(shape) * v
            return total
        with full_precision(like.device.type):
            basis, one, c = (alike(m, like) for m in (self._basis, one, c))
            total = torch.zeros_like(like.flatten(1))
            for a, p, v in zip(powers, self._parts, tensors, strict=True):
                flat = v.flatten(1)
                total = total + a * (one * flat + c * (flat @ alike(p, like)))
            inner = (total @ basis) / (one + c * alike(self._whole, like))
            return (inner @ basis.T).reshape(like.shape)


class Mixture(_Experts):
    """sum_i pi_i p_i of experts p_i whose densities are known.

        s = sum_i r_i s_i,      r_i proportional to pi_i p_i,t(x),

    exact at every t, as noising commutes with sums. (That of scores alone is not: r_i is asked of
    the densities.)

    Args:
        terms: pairs of a score with a ``log_prob(x, t)`` of its noised law, and a weight > 0;
            weights are normalised.

    Raises:
        TypeError: a score that has no ``log_prob``. ValueError: a weight that is not positive.

    >>> from sde_gen import VP, Gaussian
    >>> parts = [Gaussian(VP(), torch.tensor([m]), 0.3) for m in (-1.0, 1.0)]
    >>> Mixture([(parts[0], 3.0), (parts[1], 1.0)])(torch.zeros(1, 1), 0.9).shape
    torch.Size([1, 1])
    """

    def __init__(self, terms: Sequence[tuple[Score, float]]) -> None:
        super().__init__(terms)
        for score, weight in self.terms:
            if not callable(getattr(score, "log_prob", None)):
                raise TypeError(
                    f"a mixture weighs experts by their densities, log_prob(x, t), which"
                    f" {type(score).__name__} does not have"
                )
            check_number(weight, "the weight of an expert", above=0)
        total = sum(weight for _, weight in self.terms)
        self._log_weights = [math.log(weight / total) for _, weight in self.terms]

    def log_prob(self, x: Tensor, t: Time = 0.0) -> Tensor:
        """log p_t(x) in nats, (B, *D) -> (B,)."""
        return self._joint(x, as_time(t)).logsumexp(0)

    def _joint(self, x: Tensor, t: Tensor) -> Tensor:
        each: list[Any] = self.scores
        pairs = zip(self._log_weights, each, strict=True)
        return torch.stack([log_weight + score.log_prob(x, t) for log_weight, score in pairs])

    def _combined(self, x: Tensor, t: Tensor, each: list[Evaluation]) -> Evaluation:
        r = torch.softmax(self._joint(x, t), 0).to(x.dtype)

        def combined(tensors: list[Tensor]) -> Tensor:
            return torch.stack([match(q, v) * v for q, v in zip(r, tensors, strict=True)]).sum(0)

        return Evaluation(
            combined([e.score for e in each]), lambda: combined([e.denoised for e in each])
        )


def autoguidance(score: Score, weak: Score, weight: Weight = 1.0) -> Score:
    """s + weight (s - s_weak): away from where a weaker model of the same data errs.

    In denoised states D + weight (D - D_weak) (Karras et al. 2024, equation 4 with their w less
    1). The weaker model is smaller, less trained, or a snapshot of the same run; both get the
    same conditions, ``autoguidance(...).given(y=labels)``.

    Args:
        score, weak: the two models, under one process.
        weight: a number, one for each sample (B,), or a function of t: ``Interval``.

    Raises:
        TypeError, ValueError: as ``Sum``.

    >>> good, weak = (sg.Gaussian(sg.VP(), torch.zeros(2), std) for std in (0.5, 0.7))
    >>> sg.sample(autoguidance(good, weak, 0.5), 8, steps=3, seed=0).shape
    torch.Size([8, 2])
    """
    w = as_weight(weight)
    if callable(w):
        return Sum([(score, lambda t: 1 + w(t)), (weak, lambda t: -w(t))])
    return Sum([(score, 1 + w), (weak, -w)])


def _check_law(score: object, name: str) -> None:
    """Raise unless it is the score of a law: a classifier alone is of none."""
    check_kind(score, Score, name, "a Score")
    if getattr(score, "factor", False):
        raise ValueError(
            f"{name} must be the score of a law, not classifiers alone: add them to it"
        )


def _precision(moments: Moments, n: int) -> Tensor:
    """C^-1 as a matrix (n, n)."""
    values = moments.values
    if moments.basis is None:
        return torch.diag((1 / values).expand(n))
    u, r = moments.basis.cpu().to(values), moments.basis.shape[1]
    if r == n:
        return (u / values[1:]) @ u.T
    rest = torch.eye(n, dtype=values.dtype) - u @ u.T
    return rest / values[0] + (u / values[1:]) @ u.T
