"""What an autoencoder is trained by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..networks import Codec
from ..noise import Streams
from ..ops import shown


@dataclass(frozen=True)
class Elbo:
    """Rate under N(0, I) and distortion of a ``Codec``, in nats a dimension: the VAE's loss.

    For the trainer: ``train(net, x, objective=Elbo())``. Nothing is weighted: both are parts of
    one bound on -log p(x). Data of a net with levels may be floats at the centres of their cells.
    """

    def __call__(self, model: Any, x: Tensor, y: Any, noise: Streams) -> Tensor:
        """Losses (B,) of data x (B, *D)."""
        inner = getattr(model, "module", model)
        if not isinstance(inner, Codec):
            raise TypeError(f"model must be an Autoencoder or Pair, got {shown(model)}")
        cost = inner.cost(x, noise)
        return cost.total / cost.dimensions
