"""What the rivals share: how they are drawn from, how they are trained, how they are saved.

A rival is a map from noise and, where it knows classes, a label to a sample. Its loss is what
calling it gives, ``rival(x, y, noise)``, so the library's trainer serves it: the clock, the
average over the run, seeds, devices, folders, a run that is taken up again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..guidance.classifier import check_range
from ..networks.base import sizes
from ..noise import Streams
from ..ops import as_labels, check_count, check_kind
from ..sampling import as_noise
from ..training.recipe import adam
from ..training.trainer import OptimizerOf


class Rival(nn.Module, ABC):
    """A generative model that is drawn from in a few calls of its networks.

    Args:
        shape: of one sample, without the batch.
        classes: how many labels there are, or None.
        config: the arguments that rebuild it.

    Attributes:
        calls: calls of a network that a sample takes.

    A subclass defines ``draw`` and ``loss``. Data are of order one: images in [-1, 1].

    >>> from sde_gen import contrast
    >>> rival: contrast.Rival = contrast.GAN((2,), width=8)
    """

    calls = 1

    def __init__(
        self, shape: Sequence[int], classes: int | None, config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.shape = tuple(sizes(shape, "shape"))
        if not self.shape:
            raise ValueError("shape must hold one or more sizes, such as (2,); got none")
        self.classes = None if classes is None else check_count(classes, "classes")
        self.config = dict(config)

    @abstractmethod
    def draw(self, told: Tensor, noise: Streams) -> Tensor:
        """Samples (n, *shape), each a function of its number.

        Args:
            told: (n, classes), the label of each as a row of 0 and 1; (n, 0) without classes.
            noise: of the n samples.
        """

    @abstractmethod
    def loss(self, x: Tensor, told: Tensor, noise: Streams) -> Tensor:
        """What training makes small, for each of the data x (B, *shape): (B,)."""

    def optimizer(self, lr: float) -> OptimizerOf:
        """parameters -> the optimiser that suits it, at this peak rate."""
        return partial(adam, lr)

    def forward(self, x: Tensor, y: Tensor | None, noise: Streams) -> Tensor:
        """``loss`` of a batch with its labels, (B,)."""
        return self.loss(x, self.told(y, len(x)), noise)

    def told(self, y: Tensor | None, n: int) -> Tensor:
        """Labels (n,) as rows of 0 and 1, (n, classes): (n, 0) where there are none.

        Raises:
            ValueError: labels missing, not wanted, of another number or out of range.
        """
        parameter = next(self.parameters())
        if (y is None) != (self.classes is None):
            wrong = "no classes; labels given" if y is not None else "classes; labels missing"
            raise ValueError(f"the model has {wrong}")
        if y is None:
            return parameter.new_zeros(n, 0)
        if y.shape != (n,):
            raise ValueError(f"labels y must be ({n},), got {tuple(y.shape)}")
        check_range(y, self.classes)
        each = torch.arange(self.classes or 0, device=parameter.device)
        return (y.to(each)[:, None] == each).to(parameter.dtype)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int | None = None,
        *,
        y: Tensor | Sequence[int] | int | None = None,
        first: int = 0,
    ) -> Tensor:
        """Draw n samples (n, *shape).

        Args:
            n: how many.
            seed: sample i is a function of the seed and i alone; None draws a seed from torch.
            y: labels (n,), or one for all; None draws each class as often as the others.
            first: draw the samples first .. first + n - 1 of the sequence of the seed.

        Raises:
            TypeError, ValueError: no numbers, or out of range; labels that are not wanted.
        """
        n, first = check_count(n, "n"), check_count(first, "first", 0)
        noise = as_noise(seed, "seed", first)
        check_kind(noise, Streams, "seed", "an integer or None")
        assert isinstance(noise, Streams)
        blank = torch.empty(n, device=next(self.parameters()).device)
        labels = None if y is None else self._labels(y, n)
        if y is None and self.classes is not None:
            labels = (self.classes * noise.uniform(blank[:, None], "class")).long().flatten()
        was = self.training
        try:
            return self.eval().draw(self.told(labels, n), noise)
        finally:
            self.train(was)

    def _labels(self, y: Tensor | Sequence[int] | int, n: int) -> Tensor:
        labels = as_labels(y)
        if labels.shape not in ((), (n,)):
            raise ValueError(f"labels y must be () or ({n},), got {tuple(labels.shape)}")
        return labels.expand(n)


def perceptron(n_in: int, n_out: int, width: int, depth: int) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` with SiLU between them: none is an affine map."""
    places = [n_in, *[width] * depth]
    layers: list[nn.Module] = []
    for a, b in pairwise(places):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(places[-1], n_out))
