"""What tells one run from another, in words and checksums: model, recipe, objective and data."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.sources import Memory, Source, glance
from ..scores import ScoreNetwork
from .folder import DAMAGE, STATE, kind_of
from .recipe import Recipe

LOOKED_AT = 64
"""Items of a source beyond memory that tell it from others."""
MAY_CHANGE = (
    *("steps", "minutes", "epochs", "patience"),
    *("every", "save_every", "accumulate", "layout"),
)
"""What a run that is resumed may have otherwise in its recipe: how long, how often, in how many
parts. (A layout that is asked for is compared with the one that was taken.)"""


def about(
    model: nn.Module,
    source: Source,
    recipe: Recipe,
    objective: object,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """What a run must have in common with the one that it takes up."""
    known: dict[str, Any] = {"class": type(model).__name__}
    if (codec := getattr(model, "autoencoder", None)) is not None:
        known["autoencoder"] = f"{type(codec).__name__} {getattr(codec, 'config', '')}"
        model = getattr(model, "score", model)
    if isinstance(model, ScoreNetwork):
        known |= {"sde": _plain(model.sde), "prediction": model.prediction}
        facts, units = model.facts, model.facts.units
        known |= {"std": facts.std, "shape": facts.shape, "levels": facts.levels}
        parts = () if units is None else (units.shift, units.scale, units.mix)
        known["units"] = units and [part.tolist() for part in parts if part is not None]
        known |= {"net": f"{type(model.net).__name__} {getattr(model.net, 'config', '')}"}
    options = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in MAY_CHANGE}
    return {
        **{f"model.{name}": value for name, value in known.items()},
        **{f"recipe.{name}": value for name, value in options.items()},
        "optimizer": _optimizer(optimizer),
        # An objective that is a function of one's own says nothing of what it computes.
        "objective": _plain(objective) if dataclasses.is_dataclass(objective) else None,
        **fingerprints(source),
    }


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Its class and numbers, but for those that follow the device or the run."""
    skipped = {"params", "fused", "foreach", "capturable", "differentiable", "initial_lr"}
    groups = [
        {k: v for k, v in group.items() if k not in skipped} for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups[0] if len(groups) == 1 else groups}"


def _plain(value: object) -> str:
    """What a dataclass shows of itself; functions in it are named, wherever they lie."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def fingerprints(source: Source) -> dict[str, Any]:
    """What tells data from others: of tensors in memory all values, of other sources their
    length and a few items, which is all that can be had soon.

    >>> fingerprints(Memory(torch.zeros(2, 3)))
    {'labels': None, 'data': 'float32 (2, 3), checksum 2bb6ae06ad472028'}
    """
    if isinstance(source, Memory):
        rows, count = source.rows(slice(None)), ""
    else:
        rows, count = glance(source, LOOKED_AT), f"{len(source)} items, some of them "
    found = {name: count + _fingerprint(value) for name, value in rows.items()}
    names = {"x": "data", "y": "labels"}
    return {"labels": None} | {names.get(k, f"data.{k}"): v for k, v in found.items()}


def _fingerprint(x: Tensor) -> str:
    """Dtype, shape and a checksum of the values."""
    values = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{kind_of(x)}, checksum {hashlib.blake2b(values.data, digest_size=8).hexdigest()}"


def run_of(folder: Path) -> dict[str, Any] | None:
    """What the state in a folder says of its run, as ``about`` does; None where there is none."""
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGE:
        return None
    run = state.get("run") if isinstance(state, dict) else None
    known = isinstance(run, dict) and {"recipe.seed", "recipe.holdout", "data"} <= run.keys()
    return run if known else None
