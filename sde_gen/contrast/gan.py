"""A GAN: a generator whose samples a discriminator cannot tell from the data.

With l the logit of the discriminator, D = sigmoid(l), and softplus(u) = log(1 + e^u), the
discriminator makes small

    E softplus(-l(x)) + E softplus(l(G(z))) + gamma / 2 E |grad_x l(x)|^2,

the last being R1 (Mescheder et al. 2018), and the generator E softplus(-l(G(z))) = -E log D(G(z)):
the non-saturating game (Goodfellow et al. 2014, section 3).

Both players take a step of Adam at the same time. How strong the discriminator is, is the ratio of
its learning rate to the generator's (Heusel et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import softplus

from ..networks.base import sizes
from ..noise import Streams
from ..ops import check_count, check_number
from ..training import register
from ..training.trainer import OptimizerOf
from .base import Rival
from .players import Discriminator, Generator, is_image


@register
class GAN(Rival):
    """A conditional GAN: non-saturating loss, R1, and an average of the generator over the run.

    Convolutional for images (C, H, W), dense for all else. Labels enter the generator beside the
    noise, and the discriminator as v(y) . features (Miyato & Koyama 2018).

    Args:
        shape, classes: of the data, as in ``Rival``.
        latent: numbers of noise, N(0, I).
        width: hidden features; of images, channels at half the size, twice as many at a quarter.
        depth: hidden layers, where the data are no images.
        gamma: weight of R1, 0 for none; None is 10 for images and 0.1 for all else.
        ratio: the discriminator's learning rate over the generator's; 0 holds it.

    Raises:
        TypeError, ValueError: sizes that are no counts; gamma or ratio below 0.

    >>> from sde_gen import contrast
    >>> contrast.GAN((2,), latent=4, width=8).sample(3, seed=0).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 32,
        width: int = 32,
        depth: int = 3,
        classes: int | None = None,
        gamma: float | None = None,
        ratio: float = 1.0,
    ) -> None:
        if gamma is None:
            gamma = 10.0 if is_image(sizes(shape, "shape")) else 0.1
        config = {
            "shape": sizes(shape, "shape"),
            "latent": check_count(latent, "latent"),
            "width": check_count(width, "width"),
            "depth": check_count(depth, "depth", 0),
            "classes": classes,
            "gamma": check_number(gamma, "gamma", least=0),
            "ratio": check_number(ratio, "ratio", least=0),
        }
        super().__init__(shape, classes, config)
        self.latent, self.gamma, self.ratio = latent, gamma, ratio
        told = self.classes or 0
        self.generator = Generator(latent + told, self.shape, width, depth)
        self.discriminator = Discriminator(self.shape, told, width, depth)

    def draw(self, told: Tensor, noise: Streams) -> Tensor:
        """G(z) for z ~ N(0, I)."""
        z = noise.normal(told.new_empty(len(told), self.latent), "latent")
        x: Tensor = self.generator(z, told)
        return x

    def loss(self, x: Tensor, told: Tensor, noise: Streams) -> Tensor:
        """What the discriminator and what the generator makes small, added up: neither has a
        gradient in the other's."""
        fake, real = self.draw(told, noise), x
        with torch.enable_grad():
            real = x.detach().requires_grad_(self.gamma > 0)
            logit = self.discriminator(real, told)
            judged = softplus(-logit) + softplus(self.discriminator(fake.detach(), told))
            if self.gamma:
                (slope,) = torch.autograd.grad(logit.sum(), real, create_graph=True)
                judged = judged + self.gamma / 2 * slope.flatten(1).square().sum(1)
        held = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return judged + self.wish(functional_call(self.discriminator, held, (fake, told)))

    def wish(self, logit: Tensor) -> Tensor:
        """What the generator makes small, of the logits of its samples: -log D."""
        return softplus(-logit)

    def optimizer(self, lr: float) -> OptimizerOf:
        """Adam with betas (0, 0.99), the discriminator at ``ratio`` times the rate."""
        n = len(list(self.generator.parameters()))

        def both(parameters: list[Tensor]) -> torch.optim.Optimizer:
            parts = (parameters[:n], lr), (parameters[n:], self.ratio * lr)
            return torch.optim.Adam([{"params": p, "lr": r} for p, r in parts], betas=(0.0, 0.99))

        return both
