"""How good are samples of digits? An independent judge, the floor, and what to beat.

The judge is a support vector machine trained on the real training images. It says whether a
sample is the digit that was asked for (accuracy), and its ten decision values are the features of
a Frechet distance. The energy distance needs no judge. Samples are rounded to the 17 grey levels
of the data and compared with the real training images; 400 real test images in place of samples
give the floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..data import Labelled, centre, quantise
from .models import LEVELS


def to_levels(x: Tensor) -> Tensor:
    """Round to the grey levels of the data."""
    return centre(quantise(x, LEVELS), LEVELS)


class Judge:
    """Grades samples of digits against real training images.

    Args:
        train: the real training images.
    """

    def __init__(self, train: Labelled) -> None:
        from sklearn.svm import SVC

        self.train = train
        self.svc: Any = SVC(C=10).fit(train.x.flatten(1).numpy(), train.y.numpy())

    def features(self, x: Tensor) -> Tensor:
        """The ten decision values, (N, 1, 8, 8) -> (N, 10)."""
        return torch.from_numpy(self.svc.decision_function(x.flatten(1).numpy()))

    def grade(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Accuracy, Frechet and energy distance of samples x that should be the digits y."""
        x = to_levels(x)
        right = torch.from_numpy(self.svc.predict(x.flatten(1).numpy())) == y
        return {
            "accuracy": float(right.double().mean()),
            "frechet": metrics.frechet_distance(x, self.train.x, self.features),
            "energy": metrics.energy_distance(x, self.train.x),
        }

    def nearest(self, x: Tensor) -> dict[str, float]:
        """Distances from samples to the nearest training image: the least, and the median."""
        d = metrics.nearest_neighbour_distance(to_levels(x), self.train.x)
        return {"least": float(d.min()), "median": float(d.median())}

    def gaussian_fit(self, y: Tensor, per_class: bool, seed: int = 0) -> Tensor:
        """Draws of Gaussians fitted to the training images: one to all, or one to each class."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(len(y), 64, dtype=torch.float64, generator=generator)
        x, labels = self.train.x.flatten(1).double(), self.train.y
        for c in y.unique():
            data = x[labels == c] if per_class else x
            values, vectors = torch.linalg.eigh(data.T.cov())
            root = values.clamp_min(0).sqrt() * vectors
            z[y == c] = z[y == c] @ root.T + data.mean(0)
        return z.float().reshape(-1, 1, 8, 8)
