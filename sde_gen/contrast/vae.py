"""The plain VAE, sampled from N(0, I) and from a mixture fitted to its codes.

It is an ``Autoencoder`` trained for its bound under p(z) = N(0, I), and sampled as x = E[x | z].
Two things make its samples what they are. E[x | z] is a mean over all that z may stand for, hence
the blur. And the codes of the data, the mean over x of q(z | x), are not N(0, I): where the prior
has mass and the codes have none, the decoder was never told what to do. A Gaussian mixture fitted
to the codes afterwards mends the second and not the first (Ghosh et al. 2020, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..networks import Codec
from ..noise import Streams
from ..ops import as_labels, check_count, check_finite, check_kind
from ..training import register
from .base import Rival


@register
class VAE(Rival):
    """A codec as a generative model.

    Args:
        codec: an ``Autoencoder`` whose encoder learns its deviation (``std=None``), or a ``Pair``.
        components: normal laws in the mixture of each class, which ``with_mixture`` fits; 0 is
            N(0, I).
        classes: of the mixture; a VAE by itself knows none.

    Raises:
        TypeError: no codec. ValueError: classes without a mixture.

    >>> from sde_gen.networks import Autoencoder
    >>> vae = VAE(Autoencoder((2,), (4,), width=16))
    >>> vae.sample(3, seed=0).shape
    torch.Size([3, 2])
    """

    weights: Tensor
    means: Tensor
    roots: Tensor

    def __init__(self, codec: Codec, components: int = 0, classes: int | None = None) -> None:
        check_kind(codec, Codec, "codec", "a Codec, such as Autoencoder((1, 8, 8), (16,))")
        components = check_count(components, "components", 0)
        if classes is not None and not components:
            raise ValueError("classes need components > 0: a VAE knows them by its mixture alone")
        config = {"codec": codec, "components": components, "classes": classes}
        super().__init__(codec.shape, classes, config)
        self.codec, self.components = codec, components
        each, d = self.classes or 1, torch.Size(codec.latent).numel()
        self.register_buffer("weights", torch.full((each, components), 1 / max(1, components)))
        self.register_buffer("means", torch.zeros(each, components, d))
        self.register_buffer("roots", torch.eye(d).repeat(each, components, 1, 1))

    def loss(self, x: Tensor, told: Tensor, noise: Streams) -> Tensor:
        """Rate + distortion under N(0, I), nats a dimension."""
        cost = self.codec.cost(x, noise)
        return cost.total / cost.dimensions

    def draw(self, told: Tensor, noise: Streams) -> Tensor:
        """E[x | z], z from N(0, I) or from the mixture of the class."""
        d = self.means.shape[2]
        z = noise.normal(told.new_empty(len(told), d), "latent")
        if self.components:
            of = told.argmax(1) if self.classes else torch.zeros(len(told)).long().to(z.device)
            u = noise.uniform(z[:, :1], "component")
            k = (self.weights[of].cumsum(1) < u).sum(1).clamp(max=self.components - 1)
            z = self.means[of, k] + (self.roots[of, k] @ z[:, :, None]).squeeze(2)
        return self.codec.decode(z.reshape(-1, *self.codec.latent))

    def with_mixture(
        self,
        x: Tensor,
        y: Tensor | Sequence[int] | None = None,
        components: int = 10,
        seed: int = 0,
    ) -> VAE:
        """The same codec under a mixture fitted to draws of q(z | x): one, or one for each class.

        The draws are one for each datum, so the mixture is that of the codes with their noise.

        Args:
            x: data (N, *shape), on the device of the model.
            y: labels (N,); with them the result is conditional.
            components: normal laws, with full covariances, fitted by scikit-learn.
            seed: of the draws and of the fit.

        Raises:
            ImportError: scikit-learn is missing. ValueError: labels that are not (N,) from 0 on,
                or a class with fewer data than components.
        """
        self.codec.check(x)
        check_finite(x)
        components, seed = check_count(components, "components"), check_count(seed, "seed", 0)
        labels = None if y is None else as_labels(y)
        if labels is not None and (labels.shape != (len(x),) or int(labels.min()) < 0):
            raise ValueError(f"labels y must be ({len(x)},) and not below 0")
        with torch.no_grad():
            z = self.codec.draw(x, Streams(seed)).flatten(1).double().cpu()
        classes = None if labels is None else int(labels.max()) + 1
        fitted = VAE(self.codec, components, classes)
        for c in range(classes or 1):
            part = z if labels is None else z[labels.cpu() == c]
            if len(part) < max(2, components):
                raise ValueError(f"{len(part)} data of class {c} for {components} components")
            found = _fit(part, components, seed)
            for name, value in zip(("weights", "means", "roots"), found, strict=True):
                getattr(fitted, name)[c] = value
        like = next(self.parameters())
        return fitted.to(like.device, like.dtype).train(self.training)


def _fit(z: Tensor, components: int, seed: int) -> tuple[Tensor, Tensor, Any]:
    """Weights (K,), means (K, d) and Cholesky roots (K, d, d) of a mixture."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            "a mixture is fitted by scikit-learn: pip install 'sde-gen[data]'"
        ) from error
    found = GaussianMixture(components, random_state=seed, reg_covar=1e-4).fit(z.numpy())
    roots = torch.linalg.cholesky(torch.from_numpy(found.covariances_))
    return torch.from_numpy(found.weights_), torch.from_numpy(found.means_), roots
