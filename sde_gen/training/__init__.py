"""Training score networks: the loss, the loop, and what it leaves on disk."""

from __future__ import annotations

from .checkpoints import CheckpointError, load, save
from .devices import pick_device
from .inputs import Transform
from .losses import (
    Classification,
    Denoising,
    InformationTimes,
    KarrasWeight,
    LogNormalTimes,
    MinSNRWeight,
    Objective,
    TimeSampler,
    Weighting,
    dsm_loss,
    flow_weight,
    likelihood_weight,
    uniform_times,
    uniform_weight,
)
from .recipe import Recipe
from .registry import register
from .trainer import Trainer, TrainingError, train

__all__ = [
    "CheckpointError",
    "Classification",
    "Denoising",
    "InformationTimes",
    "KarrasWeight",
    "LogNormalTimes",
    "MinSNRWeight",
    "Objective",
    "Recipe",
    "TimeSampler",
    "Trainer",
    "TrainingError",
    "Transform",
    "Weighting",
    "dsm_loss",
    "flow_weight",
    "likelihood_weight",
    "load",
    "pick_device",
    "register",
    "save",
    "train",
    "uniform_times",
    "uniform_weight",
]
