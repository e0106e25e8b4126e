"""What a model is trained on, looked at before anything is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.sources import Memory, Source, glance
from ..levels import check_levels
from ..networks.context import is_sequence, rows_of
from ..noise import Streams
from ..ops import batch_of, check_callable, check_finite, check_kind, check_state
from ..scores import ScoreNetwork
from .devices import globals_kept
from .recipe import Recipe

Transform = Callable[[Tensor, Streams], Tensor]
"""(x (B, *D), noise) -> (B, *D): dequantisation, augmentation, drawn sample by sample."""
GLANCE = 16
"""Items of a source beyond memory that are read before anything is done."""


def check_kinds(model: object, recipe: object, objective: object, transform: object) -> None:
    """Raise ``TypeError`` unless these are a module, a recipe and functions."""
    check_kind(model, nn.Module, "model", "a torch.nn.Module, such as a ScoreNetwork")
    check_kind(recipe, Recipe, "recipe", "a Recipe")
    if objective is not None:
        check_callable(objective, "objective", "objective(model, x, y, noise)")
    for each in as_transforms(transform):
        check_callable(each, "transform", "transform(x, noise)")


def as_transforms(transform: object) -> tuple[Any, ...]:
    """Transforms in a row: none, one, or a list of them."""
    if transform is None:
        return ()
    return tuple(transform) if isinstance(transform, list | tuple) else (transform,)


def check_functions(optimizer: object, callbacks: object) -> None:
    """Raise ``TypeError`` unless these are a function and several."""
    if optimizer is not None:
        check_callable(optimizer, "optimizer", "optimizer(parameters)")
    check_kind(callbacks, Sequence, "callbacks", "a list of functions (trainer, step, loss)")
    for i, callback in enumerate(callbacks):  # type: ignore[arg-type, var-annotated]
        check_callable(callback, f"callbacks[{i}]", "callback(trainer, step, loss)")


def check_recipe(recipe: Recipe, processes: int, folder: object) -> None:
    """Raise ``ValueError`` unless so many processes can follow it."""
    if recipe.batch % (processes * recipe.accumulate):
        raise ValueError(
            f"batch {recipe.batch} does not divide by {processes} processes times"
            f" {recipe.accumulate} parts (accumulate)"
        )
    if recipe.snapshots and folder is None:
        raise ValueError("snapshots need a folder")


def check_data(
    model: nn.Module,
    source: Source,
    transforms: Sequence[Transform] = (),
    levels: int | None = None,
) -> None:
    """Raise unless the source holds what the model can be trained on. Tensors in memory are looked
    at whole, of others a few items.

    Raises:
        TypeError: x that are no tensors or, without a transform or levels, integers; labels that
            are not int64.
        ValueError: NaN or infinity, levels or a shape that are not the model's; labels
            missing, not wanted, of another number than the data, or out of range; conditions
            that the network declares missing, of another shape, infinite, or NaN in part.
    """
    rows = dict(source.rows(slice(None)) if isinstance(source, Memory) else glance(source, GLANCE))
    data = rows.pop("x")
    check_finite(data, "data")
    batch = data[:2]
    if transforms:  # which may write into what they are given, and draw as they like
        with globals_kept(data.device):
            for transform in transforms:
                batch = transform(batch.clone(), Streams(0))
    elif levels is not None and not batch.is_floating_point():
        check_levels(data, levels)
        batch = batch.float()
    elif not batch.is_floating_point() and not batch.is_complex():
        raise TypeError(
            f"data must be floating point, got {data.dtype}: integers are grey levels where the"
            " model knows how many there are, facts=Facts.of(x, levels=256)"
        )
    check_state(batch, "transform(data)" if transforms else "data")
    shape = getattr(model, "shape", None)
    if shape is not None and tuple(batch.shape[1:]) != tuple(shape):
        raise ValueError(f"data must be {batch_of(shape, 'N')}, got {tuple(data.shape)}")
    _check_labels(model, data, rows.get("y"), set(rows) - {"y"})
    _check_context(model, len(data), {name: v for name, v in rows.items() if name != "y"})
    if isinstance(model, ScoreNetwork) and not transforms and data.is_floating_point():
        encoded = model.facts.encode(data)
        _check_scale(model.facts.std, float(encoded.std(correction=0)))


def _check_scale(expected: float, std: float) -> None:
    """Warn where noise that is made for one scale meets data of another by a factor of ten."""
    if not 0.1 * expected <= std <= 10 * expected:
        warnings.warn(
            f"the data have standard deviation {std:.3g}, the model expects {expected:.3g}:"
            " scale the data, (x - x.mean(0)) / x.std(0), or build it with facts=Facts.of(x)",
            stacklevel=4,
        )


def _check_context(model: nn.Module, n: int, given: dict[str, Tensor]) -> None:
    """Raise unless the conditions are those that the network declares, where it does."""
    declares = isinstance(getattr(getattr(model, "net", None), "context", None), Mapping)
    if not isinstance(model, ScoreNetwork) or not declares:
        return
    if unknown := sorted(given.keys() - model.takes.keys()):
        takes = f"takes {', '.join(model.takes)}" if model.takes else "has no context="
        raise ValueError(f"{unknown[0]!r} was given to a network that {takes}")
    for name, shape in model.takes.items():
        if name not in given:
            raise ValueError(
                f"the network takes {name}: give context={{{name!r}: rows}}, or data whose items"
                " are dictionaries"
            )
        v = given[name]
        rows_of(name, v[:n], shape, n)
        there = ~v.isnan()
        if bool(v.isinf().any()):
            raise ValueError(f"context {name!r} holds infinite numbers")
        # Of a sequence each vector is there or not, of all else each row.
        part = there.flatten(0, 1) if is_sequence(shape) else there
        part = part.flatten(1) if part.ndim > 1 else part[:, None]
        if bool((part.any(1) != part.all(1)).any()):
            raise ValueError(f"context {name!r} is NaN in part of a row: a row is whole or absent")
        if len(shape) == 1 and bool(there.any()):
            std = float(v[there].float().std(correction=0))
            if std > 10 or float(v[there].abs().max()) > 100:
                warnings.warn(
                    f"context {name!r} has standard deviation {std:.3g}: networks read numbers of"
                    f" order one, so scale it, ({name} - {name}.mean(0)) / {name}.std(0)",
                    stacklevel=4,
                )


def _check_labels(model: nn.Module, data: Tensor, labels: Tensor | None, others: set[str]) -> None:
    classes = getattr(model, "classes", None)
    if labels is None:
        if classes is not None:
            raise ValueError(f"the model has {classes} classes: give labels, or build it without")
        return
    if isinstance(model, ScoreNetwork) and classes is None and (model.takes or not others):
        raise ValueError("labels were given, but the network has no classes: pass classes=...")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a torch.Tensor of int64, got {got}")
    if labels.shape != data.shape[:1]:
        raise ValueError(f"labels must be ({len(data)},), got {tuple(labels.shape)}")
    if classes is not None and bool(((labels < 0) | (labels >= classes)).any()):
        i = int(((labels < 0) | (labels >= classes)).nonzero()[0])
        raise ValueError(
            f"labels must lie in 0 .. {classes - 1}, got {int(labels[i])} at index {i}"
        )
