"""The two networks of the demo: a score of noisy digits, and a classifier of noisy digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Dequantise, Labelled
from ..networks import UNet
from ..networks.embeddings import Sinusoidal
from ..scores import ScoreNetwork
from ..sdes import VP
from ..training import Classification, LogNormalTimes, Recipe, Trainer

LEVELS = 17
SHARE = 0.1
"""The part of the time that the classifier gets: it is small and learns fast."""


class NoisyClassifier(nn.Module):
    """Logits of the ten digits from a noisy image and its noise level: (B, 1, 8, 8) -> (B, 10).

    A perceptron of one hidden layer on the pixels, with the noise level scaling and shifting the
    hidden units.
    """

    shape = (1, 8, 8)

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.pixels = nn.Linear(64, width)
        self.level = nn.Sequential(Sinusoidal(32), nn.Linear(32, 2 * width))
        self.hidden = nn.Sequential(nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.SiLU())
        self.logits = nn.Linear(width, 10)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, 1, 8, 8), c () or (B,) -> (B, 10)."""
        scale, shift = self.level(c.reshape(-1)).chunk(2, 1)
        h: Tensor = self.hidden(self.pixels(x.flatten(1)) * (1 + scale) + shift)
        logits: Tensor = self.logits(h)
        return logits


@dataclass(frozen=True)
class Trained:
    """What training leaves: the models, ready to sample, and how it went."""

    score: ScoreNetwork
    classifier: nn.Module
    info: dict[str, float]


def train_models(data: Labelled, minutes: float, seed: int = 0, progress: bool = True) -> Trained:
    """Train both within ``minutes``, on the CPU."""
    sde, data_std = VP(), float(data.x.std())
    times, dequantise = LogNormalTimes(), Dequantise(LEVELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet.digits()
        classifier = NoisyClassifier()
    scorer = Trainer(
        ScoreNetwork(unet, sde, data_std=data_std),
        *data,
        Recipe(steps=None, minutes=(1 - SHARE) * minutes, lr=4e-3, seed=seed),
        transform=dequantise,
        device="cpu",
    )
    guide = Trainer(
        classifier,
        *data,
        Recipe(steps=None, minutes=SHARE * minutes, lr=2e-3, every=50, seed=seed),
        objective=Classification(sde, data_std, times),
        transform=dequantise,
        device="cpu",
    )
    score, net = scorer.run(progress), guide.run(progress)
    info = {
        "minutes": minutes,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "steps": scorer.step,
        "seconds": scorer.elapsed,
        "classifier_steps": guide.step,
        "classifier_seconds": guide.elapsed,
    }
    return Trained(score, net, info)
