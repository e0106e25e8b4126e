"""The game of the lectures, and the divergence that it is about.

With l the logit of the discriminator, D = sigmoid(l), and softplus(u) = log(1 + e^u), the two play

    min_G max_D  V = E log D(x) + E log(1 - D(G(z))) = -E softplus(-l(x)) - E softplus(l(G(z))).

Against a generator of density q the best discriminator of data of density p is D* = p / (p + q),
its logit log p - log q, and there V = 2 JS(p, q) - log 4 (Goodfellow et al. 2014, theorem 1).
Where the two laws hardly overlap JS is flat, and log(1 - D) has no slope where D is sure: a
generator that is far behind learns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import softplus

from ..ops import as_numbers
from ..training import register
from .gan import GAN


@register
class MinimaxGAN(GAN):
    """The GAN of the lectures: both play for V, log(1 - D(G(z))) and no R1.

    Args:
        shape, latent, width, depth, classes, ratio: as in ``GAN``.

    >>> from sde_gen import contrast
    >>> contrast.MinimaxGAN((2,), latent=4, width=8).sample(3, seed=0).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 32,
        width: int = 32,
        depth: int = 3,
        classes: int | None = None,
        ratio: float = 1.0,
    ) -> None:
        super().__init__(shape, latent, width, depth, classes, 0.0, ratio)
        del self.config["gamma"]

    def wish(self, logit: Tensor) -> Tensor:
        """log(1 - D)."""
        return -softplus(logit)


def game_value(real: Tensor, fake: Tensor) -> Tensor:
    """V = E log D(x) + E log(1 - D(G(z))) of logits at data and at generated samples, ().

    >>> from sde_gen import contrast
    >>> bool(contrast.game_value(torch.zeros(8), torch.zeros(8)) == -2 * torch.tensor(2.0).log())
    True
    """
    real, fake = (as_numbers(z, name) + 0.0 for z, name in ((real, "real"), (fake, "fake")))
    return -softplus(-real).mean() - softplus(fake).mean()


def jensen_shannon(real: Tensor, fake: Tensor) -> Tensor:
    """(V + log 4) / 2 of logits at data and at generated samples, (): nats, at most log 2.

    In the mean a lower bound of the Jensen-Shannon divergence, whoever discriminates; with the
    best logit, log p - log q, the divergence itself.

    >>> p, q = (torch.distributions.Normal(m, 1.0) for m in (0.0, 40.0))
    >>> at = torch.linspace(-2, 2, 5)
    >>> real, fake = (p.log_prob(x) - q.log_prob(x) for x in (at, at + 40))
    >>> bool(abs(jensen_shannon(real, fake) - math.log(2)) < 1e-6)
    True
    """
    return (game_value(real, fake) + math.log(4)) / 2
