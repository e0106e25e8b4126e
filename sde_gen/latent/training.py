"""What autoencoders, and latent models as a whole, are trained by.

In two stages: the autoencoder by ``Elbo``, as a VAE, then the score on its latents by score
matching, the autoencoder held fixed. Or jointly, by ``Joint``: the prior of the VAE is then what
is learned. In the lectures' words a hierarchical VAE has as many latents as levels,

    log p(x) >= E_q[log p(x | z_1)] - E_q sum_t KL(q(z_(t-1) | z_t, x) || p(z_(t-1) | z_t)) - ...,

and a diffusion model is one whose encoder is fixed beyond z_1. ``latent.bound`` is this sum in the
limit of many levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..networks import Codec
from ..noise import Streams
from ..ops import set_number, shown
from ..training.losses import Context, context_of
from .bound import sampled_cost
from .model import LatentModel


@dataclass(frozen=True)
class Elbo:
    """Rate under N(0, I) and distortion of a ``Codec``, in nats a dimension: the VAE's loss.

    For the trainer: ``train(net, x, objective=Elbo())``. Nothing is weighted: both are parts of
    one bound on -log p(x). Data of a net with levels may be floats at the centres of their cells.

    >>> from sde_gen import latent
    >>> objective = latent.Elbo()
    """

    def __call__(self, model: Any, x: Tensor, y: Any, noise: Streams) -> Tensor:
        """Losses (B,) of data x (B, *D)."""
        inner = getattr(model, "module", model)
        if not isinstance(inner, Codec):
            raise TypeError(f"model must be an Autoencoder or Pair, got {shown(model)}")
        cost = inner.cost(x, noise)
        return cost.total / cost.dimensions


@dataclass(frozen=True)
class Joint:
    """Rate under the score and distortion of a ``LatentModel``, in nats a dimension: encoder,
    decoder and prior learn together, each by the one bound (``latent.bound``).

    ``train(model, x, objective=Joint())``. Score matching alone would let the encoder make latents
    that are easy to denoise and say nothing; here the decoder asks for what they say.

    Args:
        dropout: the probability of training the score without a condition, as in ``Denoising``.

    >>> from sde_gen import latent
    >>> latent.Joint(dropout=0.0)
    Joint(dropout=0.0)
    """

    dropout: float = 0.1

    def __post_init__(self) -> None:
        set_number(self, "dropout", least=0, most=1)

    def __call__(self, model: Any, x: Tensor, y: Context, noise: Streams) -> Tensor:
        """Losses (B,) of data x (B, *D)."""
        inner = getattr(model, "module", model)
        if not isinstance(inner, LatentModel):
            raise TypeError(f"model must be a LatentModel, got {shown(model)}")
        context = context_of(y, len(x), self.dropout, noise, inner.takes)
        u = noise.spread(len(x), x.device)
        cost = sampled_cost(inner, x, u, noise, lambda z, t: model(z, t, whole=True, **context))
        return (cost.total / cost.dimensions).to(torch.float32)
