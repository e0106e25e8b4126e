"""A score of latents in the units of an autoencoder.

The data of a latent model are those of its autoencoder, x; its process and score live where the
latents have mean 0 and deviation 1. Between the two lies one map, as between any data and a
process, except that it is no affine one:

    x -> c(x) -> (c - shift) / scale,      x <- E[x | z] <- shift + scale z.

So it is kept where units are kept, in the facts of the model, and every verb that takes a model
gives and takes data: nobody meets a scale factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..facts import Facts, Units
from ..grids import default_end
from ..networks import Codec
from ..noise import Source, Streams, normal_like
from ..ops import Time, check_count, check_kind
from ..scores import Learned, Score, ScoreNetwork
from ..sdes import Evaluation, LinearSDE, at_rest
from ..training import register
from ..tuning import Tuned

CHUNK = 256
"""Rows that an encoder or decoder gets at once, where no gradient asks for all."""


class Latents(Units):
    """The map between data and the normalised latents of an autoencoder: a ``Units`` that is not
    affine, so that no density can be carried through it (``latent.log_prob`` bounds it).

    Gradients go through ``encode`` and ``decode`` where, and only where, their argument asks for
    them: not into the weights.

    >>> half = sg.networks.Pair(lambda x: x[:, :1], lambda z: z.repeat(1, 2), (2,), (1,), std=0.1)
    >>> from sde_gen import latent
    >>> latent.Latents(half, None).decode(torch.ones(3, 1)).shape
    torch.Size([3, 2])
    """

    affine = False

    def __init__(self, codec: Codec, inner: Units | None) -> None:
        object.__setattr__(self, "codec", codec)
        object.__setattr__(self, "inner", inner)

    codec: Codec
    inner: Units | None

    def __repr__(self) -> str:
        return f"Latents({type(self.codec).__name__}: {self.codec.shape} -> {self.codec.latent})"

    def __getattr__(self, name: str) -> Any:
        if name in ("shift", "scale"):
            raise TypeError("a decoder is no shift and scale: latent.bound has what you ask for")
        raise AttributeError(name)

    def check(self, shape: Any) -> None:
        """Raise ``ValueError`` unless data have this shape."""
        if tuple(shape) != self.codec.shape:
            raise ValueError(f"the autoencoder is of {self.codec.shape}, data are {tuple(shape)}")

    def inside(self, shape: Any) -> tuple[int, ...]:
        """The shape of a latent."""
        return self.codec.latent

    def encode(self, x: Tensor) -> Tensor:
        """The normalised mean of q(z | x), (B, *D) -> (B, *latent)."""
        self.codec.check(x)
        c = self._run(self.codec.encode, x)
        return c if self.inner is None else self.inner.encode(c)

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z] of normalised latents, (B, *latent) -> (B, *D)."""
        return self._run(self.codec.decode, z if self.inner is None else self.inner.decode(z))

    def _run(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        weight = next(self.codec.parameters(), x)
        kind = x.dtype if x.is_floating_point() else weight.dtype
        y = x.to(weight.dtype) if x.is_floating_point() else x
        with at_rest(self.codec):
            if x.requires_grad and torch.is_grad_enabled():
                return f(y).to(kind)
            with torch.no_grad():
                return torch.cat([f(part) for part in y.split(CHUNK)]).to(kind)

    def agrees(self, other: Units) -> bool:
        """Whether both are of one autoencoder, with one normaliser."""
        if not isinstance(other, Latents) or other.codec is not self.codec:
            return False
        a, b = self.inner, other.inner
        return a is b or (a is not None and b is not None and a.agrees(b))

    def log_volume(self, shape: Any) -> float:
        """Refused: TypeError."""
        raise TypeError(
            "a decoder is no bijection, so the density of its data has no change of variables:"
            " latent.log_prob(model, x) and latent.bound(model, x) bound it"
        )


class LatentModel(Learned):
    """A score of latents that draws, encodes and judges data (B, *D).

    It is a ``Score``: of states (B, *latent), at t = 0 the normalised latents. ``sample``,
    ``encode``, ``decode``, ``redraw``, ``interpolate``, ``ClassifierFree``, ``Posterior``,
    ``particles`` and ``tune_solver`` take it as any other, and speak of data.

    Where the noise of the encoder is one number (``std``), the latent is noise on the path of the
    process: z = c + std e is x_t / alpha at ``end``, where (sigma / alpha)^2 is that noise in
    normalised units, and sampling ends there with a denoising step. Else z is drawn, and the score
    is that of the law of z.

    Args:
        autoencoder: a ``Codec``: an ``Autoencoder``, or a ``Pair`` from elsewhere.
        score: of latents in their own units, exact, learned, guided; its ``facts.units`` normalise
            them. ``LatentModel.of`` fits these.

    Raises:
        TypeError: neither of these; a score without a ``LinearSDE``.
        ValueError: a score of another shape than that of the latents.

    >>> from sde_gen import VP, Gaussian, sample
    >>> from sde_gen.networks import Pair
    >>> half = Pair(lambda x: x[:, :1], lambda z: z.repeat(1, 2), (2,), (1,), std=0.1)
    >>> model = LatentModel(half, Gaussian(VP(), torch.zeros(1), 1.0))
    >>> sample(model, 3, seed=0).shape
    torch.Size([3, 2])
    """

    sde: LinearSDE

    def __init__(self, autoencoder: Codec, score: Score) -> None:
        super().__init__()
        check_kind(autoencoder, Codec, "autoencoder", "an Autoencoder or a Pair")
        check_kind(score, Score, "score", "a Score of latents")
        if not isinstance(score.sde, LinearSDE):
            raise TypeError(f"score must know its LinearSDE, got sde = {score.sde!r}")
        if score.shape not in (None, autoencoder.latent):
            raise ValueError(f"the score is of {score.shape}, latents are {autoencoder.latent}")
        self.autoencoder, self.score = autoencoder, score
        self.sde, self.singular = score.sde, score.singular
        self.batch, self.eta, self.temperature = score.batch, score.eta, score.temperature
        known = score.facts
        self.facts = Facts(
            autoencoder.shape,
            known.std,
            known.moments,
            Latents(autoencoder, known.units),
            known.classes,
            autoencoder.levels,
        )

    @classmethod
    def of(
        cls,
        autoencoder: Codec,
        net: nn.Module,
        sde: LinearSDE,
        x: Tensor,
        rank: int | None = None,
        classes: Any = None,
    ) -> LatentModel:
        """A model whose normaliser is fitted to data x: mean and deviation of each channel of the
        latents that the score is trained on, so of draws where the encoder learned its noise.

        Args:
            autoencoder: trained.
            net: the network of the score, (B, *latent) -> the same; to be trained.
            x: data (N, *D), of which the latents are taken.
            rank, classes: as in ``Facts.of``.
        """
        check_kind(autoencoder, Codec, "autoencoder", "an Autoencoder or a Pair")
        autoencoder.check(x)
        x = x.to(next(autoencoder.parameters(), x).device)
        if autoencoder.std is None:
            # A channel that says nothing has means of no spread, and latents of that of the prior.
            with torch.no_grad(), at_rest(autoencoder):
                starts = range(0, len(x), CHUNK)
                z = torch.cat([autoencoder.draw(x[i : i + CHUNK], Streams(0, i)) for i in starts])
        else:
            z = Latents(autoencoder, None).encode(x)
        facts = Facts.of(z, "channel", rank, classes)
        return cls(autoencoder, ScoreNetwork(net, sde, facts=facts))

    def over(self, score: Score) -> LatentModel:
        """The same autoencoder with another score of its latents: trained, guided, conditioned."""
        return LatentModel(self.autoencoder, score)

    @property
    def normaliser(self) -> Units | None:
        """Shift and scale of the latents, those of the score."""
        return self.score.facts.units

    @property
    def end(self) -> float | None:  # type: ignore[override]
        """The time at which the latents lie; None where grids end by default."""
        std = self.autoencoder.std
        if std is None:
            return None
        scale = 1.0 if self.normaliser is None else float(self.normaliser.scale.max())
        ratio = torch.tensor(std / scale).double()
        t = float(self.sde.time_at(-2 * torch.log(ratio)))
        if not t < self.sde.T:
            raise ValueError(
                f"noise {float(ratio):.3g} on latents is more than the process reaches"
            )
        return t

    @property
    def level(self) -> float:
        """(sigma / alpha)^2 where the latents lie, in normalised units."""
        return float(torch.exp(-self.sde.log_snr(self.end or default_end(self.sde))))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the normalised latent of x, less the noise of ``level``; gradients
        go into the encoder. (B, *D) -> (B, *latent) each."""
        c, s = self.autoencoder.posterior(x)
        if self.normaliser is not None:
            c, s = self.normaliser.encode(c), s / self.normaliser.scale.to(s)
        return c, (s**2 - self.level).clamp_min(0)

    def clean(self, x: Tensor, noise: Source = None) -> Tensor:
        """Normalised latents (B, *latent) of data x, without the noise of ``level``: what the
        score is trained on. Nothing of it teaches the encoder."""
        parts = []
        with torch.no_grad(), at_rest(self.autoencoder):
            for i in range(0, len(x), CHUNK):
                c, v = self.posterior(x[i : i + CHUNK])
                rows = noise.rows(slice(i, i + len(c))) if isinstance(noise, Streams) else noise
                parts.append(c + v.sqrt() * normal_like(c, rows, "latent"))
        return torch.cat(parts)

    def codes(self, x: Tensor, draws: int = 1, seed: int = 0) -> Tensor:
        """The latents of data x, (N, *D) -> (draws N, *latent), in the autoencoder's units: the
        data of ``score``, encoded once.

        ``model.over(train(model.score, model.codes(x)))`` is ``train(model, x)`` without an
        encoder in every step. Draws differ where the encoder learned its noise.
        """
        self.autoencoder.check(x)
        n = check_count(draws, "draws")
        z = torch.cat([self.clean(x, Streams(seed, i * len(x))) for i in range(n)])
        return z if self.normaliser is None else self.normaliser.decode(z)

    def forward(self, z: Tensor, t: Time, whole: bool = False, **context: Any) -> Any:
        """The score of normalised latents z, (B, *latent); ``whole``: all that it tells."""
        score = cast(Any, self.score)
        if whole and isinstance(score, Learned):
            return score(z, t, whole=True, **context)
        return score.evaluate(z, t, **context) if whole else score(z, t, **context)

    def evaluate(self, x: Tensor, t: Time, **context: Any) -> Evaluation:
        """What one call of the score tells."""
        return self.score.evaluate(x, t, **context)

    def linearise(self, x: Tensor, t: Time) -> Evaluation:
        """As the score's."""
        return self.score.linearise(x, t)

    def factors(self, x: Tensor, t: Time) -> list[tuple[float, Tensor]]:
        """Those of the score."""
        return self.score.factors(x, t)

    def at_eta(self, eta: float) -> LatentModel:
        """Of the score at that noise level."""
        score = self.score.at_eta(eta)
        return self if score is self.score else self.over(score)

    @property
    def power_of(self) -> tuple[float, Score]:
        """As the score's."""
        a, score = self.score.power_of
        return a, self if score is self.score else self.over(score)

    def given(self, **context: Any) -> LatentModel:
        """With labels or conditions of the score bound."""
        return self.over(self.score.given(**context))

    def rows(self, index: slice | Tensor) -> LatentModel:
        """The same with what is bound for these rows."""
        score = self.score.rows(index)
        return self if score is self.score else self.over(score)

    @property
    def classes(self) -> int | None:
        """Those of the score."""
        return self.score.classes

    @property
    def takes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The conditions of the score."""
        return self.score.takes

    def fingerprint(self) -> str | None:
        """That of the score."""
        return self.score.fingerprint()

    @property
    def tuned(self) -> Tuned | None:
        """What the score was tuned to."""
        return self.score.tuned

    @tuned.setter
    def tuned(self, tuned: Tuned | None) -> None:
        """Tell the score."""
        self.score.tuned = tuned


register(LatentModel, lambda model: {"autoencoder": model.autoencoder, "score": model.score})
