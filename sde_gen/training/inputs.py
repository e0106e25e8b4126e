"""What a model is trained on, looked at before anything is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..noise import Streams
from ..ops import batch_of, check_callable, check_finite, check_kind, check_state, check_tensor
from ..scores import ScoreNetwork
from .devices import globals_kept
from .recipe import Recipe

Transform = Callable[[Tensor, Streams], Tensor]
"""(x (B, *D), noise) -> (B, *D): dequantisation, augmentation, drawn sample by sample."""


def check_kinds(model: object, recipe: object, objective: object, transform: object) -> None:
    """Raise ``TypeError`` unless these are a module, a recipe and functions."""
    check_kind(model, nn.Module, "model", "a torch.nn.Module, such as a ScoreNetwork")
    check_kind(recipe, Recipe, "recipe", "a Recipe")
    if objective is not None:
        check_callable(objective, "objective", "objective(model, x, y, noise)")
    if transform is not None:
        check_callable(transform, "transform", "transform(x, noise)")


def check_functions(optimizer: object, callbacks: object) -> None:
    """Raise ``TypeError`` unless these are a function and several."""
    if optimizer is not None:
        check_callable(optimizer, "optimizer", "optimizer(parameters)")
    check_kind(callbacks, Sequence, "callbacks", "a list of functions (trainer, step, loss)")
    for i, callback in enumerate(callbacks):  # type: ignore[arg-type, var-annotated]
        check_callable(callback, f"callbacks[{i}]", "callback(trainer, step, loss)")


def check_data(
    model: nn.Module, data: Tensor, labels: Tensor | None, transform: Transform | None = None
) -> None:
    """Raise unless data and labels are what the model can be trained on.

    Raises:
        TypeError: data that are no tensor or, without a transform, integers; labels not int64.
        ValueError: no data, NaN or infinity, a shape that is not the model's; labels missing, not
            wanted, of another number than the data, or out of range.
    """
    check_tensor(data, "data")
    if data.ndim < 1 or len(data) == 0:
        raise ValueError(f"data must be (N, *D) with N >= 1, got {tuple(data.shape)}")
    check_finite(data, "data")
    batch = data[:2]
    if transform is not None:  # which may write into what it is given, and draw as it likes
        with globals_kept(data.device):
            batch = transform(batch.clone(), Streams(0))
    check_state(batch, "data" if transform is None else "transform(data)")
    shape = getattr(model, "shape", None)
    if shape is not None and tuple(batch.shape[1:]) != tuple(shape):
        raise ValueError(f"data must be {batch_of(shape, 'N')}, got {tuple(data.shape)}")
    _check_labels(model, data, labels)
    if isinstance(model, ScoreNetwork) and transform is None:
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


def _check_labels(model: nn.Module, data: Tensor, labels: Tensor | None) -> None:
    classes = getattr(model, "classes", None)
    if labels is None:
        if classes is not None:
            raise ValueError(f"the model has {classes} classes: give labels, or build it without")
        return
    if isinstance(model, ScoreNetwork) and classes is None:
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
