"""Training score networks: the loss, the loop, and what it leaves on disk."""

from __future__ import annotations

from .callbacks import Drawings, Logged, LossPlot
from .checkpoints import CheckpointError, load, save
from .columns import match_columns
from .devices import pick_device
from .history import Look, read_history
from .inputs import Transform
from .layout import Layout
from .losses import (
    Classification,
    Denoising,
    InformationTimes,
    KarrasWeight,
    LogNormalTimes,
    MinSNRWeight,
    Objective,
    TimeSampler,
    Uncertainty,
    Weighting,
    dsm_loss,
    flow_weight,
    likelihood_weight,
    uniform_times,
    uniform_weight,
)
from .recipe import Recipe
from .registry import register
from .snapshots import average_of
from .sweep import RateTest, learning_rate_test
from .trainer import Trainer, TrainingError, train

__all__ = [
    "CheckpointError",
    "Classification",
    "Denoising",
    "Drawings",
    "InformationTimes",
    "KarrasWeight",
    "Layout",
    "LogNormalTimes",
    "Logged",
    "Look",
    "LossPlot",
    "MinSNRWeight",
    "Objective",
    "RateTest",
    "Recipe",
    "TimeSampler",
    "Trainer",
    "TrainingError",
    "Transform",
    "Uncertainty",
    "Weighting",
    "average_of",
    "dsm_loss",
    "flow_weight",
    "learning_rate_test",
    "likelihood_weight",
    "load",
    "match_columns",
    "pick_device",
    "read_history",
    "register",
    "save",
    "train",
    "uniform_times",
    "uniform_weight",
]
