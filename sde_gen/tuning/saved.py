"""A tuned solver as what JSON holds and a few tensors, and back: nothing but numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..moments import Moments
from ..solvers import Exponential, Midpoint, Polynomial, Spectral, Weights
from .tuned import Choice, Tuned


def pack(tuned: Tuned) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything but the covariances, and these: a mean and a basis that many share are one.

    Raises:
        TypeError: a solver that is not exactly an ``Exponential``, or weights that are neither
            ``Spectral``, ``Midpoint`` nor ``Polynomial()``.
    """
    tensors: dict[str, Tensor] = {}
    kept: dict[int, str] = {}
    choices = []
    for i, choice in enumerate(tuned.choices):
        solver, known = choice.solver, choice.solver.reference
        if type(solver) is not Exponential:
            raise TypeError(f"only an Exponential can be saved, got {type(solver).__name__}")
        names = {"values": f"values.{i}"}
        tensors[names["values"]] = known.values.clone()
        for part in ("mean", "basis"):
            value = getattr(known, part)
            if value is not None:
                names[part] = kept.setdefault(id(value), f"{part}.{i}")
                tensors.setdefault(names[part], value.detach().cpu().contiguous().clone())
        choices.append(
            {
                "steps": choice.steps,
                "order": solver.nodes,
                "corrector": solver.corrector,
                "weights": _pack_weights(solver.weights),
                "reference": names,
                "bend": choice.bend,
                "levels": choice.levels,
                "numbers": choice.numbers,
                "ratio": choice.ratio,
                "p_value": choice.p_value,
            }
        )
    return {"data_std": tuned.data_std, "end": tuned.end, "choices": choices}, tensors


def unpack(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tuned:
    """What ``pack`` took apart.

    Raises:
        KeyError, TypeError, ValueError: this is not what ``pack`` made.
    """
    choices = [
        Choice(
            steps=int(c["steps"]),
            solver=Exponential(
                c["order"],
                Moments(**{part: tensors[name] for part, name in c["reference"].items()}),
                bool(c["corrector"]),
                _unpack_weights(c["weights"]),
            ),
            bend=None if c["bend"] is None else tuple(map(float, c["bend"])),
            levels=tuple(map(float, c["levels"])),
            numbers=None
            if c["numbers"] is None
            else tuple(tuple(map(float, row)) for row in c["numbers"]),
            ratio=float(c["ratio"]),
            p_value=float(c["p_value"]),
        )
        for c in config["choices"]
    ]
    end = config["end"]
    return Tuned(choices, float(config["data_std"]), None if end is None else float(end))


def _pack_weights(weights: Weights) -> dict[str, Any]:
    if type(weights) is Spectral:
        known = {"variance": weights.variance, "dimensions": weights.dimensions}
        return {"class": "Spectral", **known}
    if type(weights) is Midpoint:
        return {"class": "Midpoint"}
    if type(weights) is Polynomial and weights.variable is None:
        return {"class": "Polynomial"}
    raise TypeError(f"weights of kind {type(weights).__name__} cannot be saved")


def _unpack_weights(config: Mapping[str, Any]) -> Weights:
    kinds = {"Spectral": Spectral, "Midpoint": Midpoint, "Polynomial": Polynomial}
    arguments = {k: v for k, v in config.items() if k != "class"}
    weights: Weights = kinds[config["class"]](**arguments)
    return weights
