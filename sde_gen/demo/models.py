"""The two networks of the demo: a score of noisy digits, and a classifier of noisy digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Dequantise, Labelled
from ..facts import Facts
from ..networks import UNet
from ..networks.embeddings import Sinusoidal
from ..scores import ScoreNetwork
from ..sdes import VP
from ..training import Classification, Denoising, LogNormalTimes, Recipe, Trainer

LEVELS = 17
SHARE = 0.1
"""The part of the time that the classifier gets: it is small and learns fast."""


class NoisyClassifier(nn.Module):
    """Logits of the ten digits from a noisy image and its noise level: (B, 1, 8, 8) -> (B, 10).

    Two convolutions, the noise level scaling and shifting the first one's features, and a
    perceptron.
    """

    shape = (1, 8, 8)

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, channels, 3, padding=1)
        self.level = nn.Sequential(Sinusoidal(32), nn.Linear(32, 2 * channels))
        self.far = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * channels, 128),
            nn.SiLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, 1, 8, 8), c () or (B,) -> (B, 10)."""
        scale, shift = self.level(c.reshape(-1))[..., None, None].chunk(2, 1)
        logits: Tensor = self.far(self.near(x) * (1 + scale) + shift)
        return logits


@dataclass(frozen=True)
class Trained:
    """What training leaves: the models, ready to sample, and how it went."""

    score: ScoreNetwork
    classifier: nn.Module
    info: dict[str, float]


def train_models(data: Labelled, minutes: float, seed: int = 0, progress: bool = True) -> Trained:
    """Train both within ``minutes``, on the CPU."""
    sde, facts = VP(), Facts.of(data.x, levels=LEVELS)
    times, dequantise = LogNormalTimes(), Dequantise(LEVELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet.digits()
        classifier = NoisyClassifier()
    scorer = Trainer(
        ScoreNetwork(unet, sde, facts=facts),
        *data,
        Recipe(minutes=(1 - SHARE) * minutes, lr=4e-3, seed=seed),
        objective=Denoising(times=times, dropout=0.2),
        transform=dequantise,
        device="cpu",
    )
    guide = Trainer(
        classifier,
        *data,
        Recipe(minutes=SHARE * minutes, lr=2e-3, every=50, seed=seed),
        objective=Classification(sde, facts, times),
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
