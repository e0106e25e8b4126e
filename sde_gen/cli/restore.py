"""``sde-gen restore``: draws of x given what was measured of it, from files to files.

Units. Of quantised data (an image file, or integers for a model that knows their levels) y and its
noise are those of the grey levels k = 0 .. L - 1, of which the model sees x = 2 (k + 1/2) / L - 1.
So for a linear A the measurement A k + n becomes

    2 / L (A k + n) + (1 / L - 1) A 1 = A x + 2 / L n.

Numbers with a point are taken as they are, in the units of the data that the model draws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import data, inverse
from ..data.images import SUFFIXES
from ..training import load
from .commands import _labels, class_of
from .restored import Restored, check_out, save

if TYPE_CHECKING:
    from ..scores import Learned, Score


class Measured(NamedTuple):
    """What there is to restore from.

    Attributes:
        seen: y and its noise in the units of the data that the model draws.
        levels: of what the file holds, None where it holds numbers as they are.
    """

    seen: inverse.Observation
    levels: int | None


def restore(options: argparse.Namespace) -> None:
    """Read model, operator and measurements, draw x given y, write it and say how well it fits."""
    if not 0 < options.noise < math.inf:
        raise ValueError(
            f"--noise must be a standard deviation above 0, in the units of --data, got"
            f" {options.noise}: of exact data say how exact they are"
        )
    if options.method == "term" and options.draws < 2:
        raise ValueError("--method term needs 2 or more --draws, for their std")
    model = load(options.model, options.device)
    shape = model.shape
    if shape is None:
        raise ValueError(f"{options.model} does not know the shape of its data")
    out = Path(options.out)
    check_out(out, shape)
    measured = _measured(options, operator_of(options.operators, shape), model)
    seen = measured.seen
    score = _prior(model, options.label)
    posterior = inverse.Posterior(score, seen)
    print(_told(options, measured), flush=True)
    if options.method == "term":
        found = _by_term(score, seen, options)
    else:
        # What a decoder makes of latents is linearised for each particle anew.
        if posterior.seen.observation.operator.linear and not posterior.seen.is_dense:
            raise ValueError(
                f"{math.prod(seen.operator.measured)} measurements are too many for particles:"
                " take --method term"
            )
        found = _by_particles(score, seen, options)
    found.tell(math.prod(seen.operator.measured))
    save(out, found, seen)
    print(f"{out}: mean, std and {options.draws} draws of shape {shape}")


def _told(options: argparse.Namespace, measured: Measured) -> str:
    """How operator, measurements and noise were read."""
    a, levels = measured.seen.operator, measured.levels
    given = " ".join(f"--{name} {text}" for name, text in options.operators)
    law = f"noise {options.noise:g}"
    if levels is not None:
        law += f" of {levels} grey levels, {2 * options.noise / levels:.4g} on [-1, 1]"
    return f"{given}: {a.shape} -> {a.measured}, observations: {measured.seen.batch or 1}, {law}"


def _prior(model: Learned, label: str | None) -> Score:
    """The model, of one class if it is said which; moments of all data serve for each class."""
    if label is None:
        return model
    _labels(model, 1, label)
    return model.given(y=class_of(model, label)).with_facts(model.facts)


def _by_particles(
    score: Score, seen: inverse.Observation, options: argparse.Namespace
) -> Restored:
    n, steps, seed = options.particles, options.steps, options.seed
    found = inverse.particles(score, seen, n, steps, seed, chunk=options.chunk)
    draws = found.draw(options.draws, seed)
    return _restored(seen, found.mean, found.std, draws, found)


def _by_term(score: Score, seen: inverse.Observation, options: argparse.Namespace) -> Restored:
    from ..sampling import sample

    rows, n = seen.batch, options.draws
    many = seen if rows is None else seen.rows(torch.arange(rows).repeat_interleave(n))
    x = sample(
        inverse.Posterior(score, many),
        n * (rows or 1),
        options.steps,
        options.seed,
        progress=True,
        chunk=options.chunk,
    )
    draws = x if rows is None else x.unflatten(0, (rows, n))
    axis = 0 if rows is None else 1
    return _restored(seen, draws.mean(axis), draws.std(axis), draws)


def _restored(
    seen: inverse.Observation,
    mean: Tensor,
    std: Tensor,
    draws: Tensor,
    particles: inverse.Particles | None = None,
) -> Restored:
    draws = draws.cpu()
    each = draws.unsqueeze(0) if seen.batch is None else draws
    if not bool(draws.isfinite().all()):
        raise FloatingPointError(
            "the draws are not finite: --data or --noise are far beyond the model's data"
        )
    z = [seen.whiten(seen.rows(i).residual(x.double())) for i, x in enumerate(each)]
    chi = torch.stack([r.square().mean() for r in z])
    return Restored(mean.cpu(), std.cpu(), draws, chi[0] if seen.batch is None else chi, particles)


# ---- what was measured ----


def operator_of(given: Sequence[tuple[str, str]], shape: tuple[int, ...]) -> inverse.Operator:
    """A: the operators in the order given, each of what the one before it measures.

    Args:
        given: names of options and what they were given.
        shape: *D, of x.

    Raises:
        ValueError, TypeError, OSError: none at all, or one that does not fit; it is named.
    """
    if not given:
        raise ValueError(
            f"say what was measured of x: {', '.join('--' + name for name in OPERATORS)};"
            " a --mask of ones is x itself"
        )
    whole: inverse.Operator | None = None
    for name, text in given:
        with _of(f"--{name} {text}"):
            part = OPERATORS[name](text, shape if whole is None else whole.measured)
        whole = part if whole is None else part @ whole
    assert whole is not None
    return whole


def _mask(text: str, shape: tuple[int, ...]) -> inverse.Operator:
    mask = _zeros_and_ones(text)
    if mask.ndim == 0 or mask.shape != shape[-mask.ndim :]:
        raise ValueError(f"is {tuple(mask.shape)}, expected {shape} or its last axes")
    return inverse.Mask(mask.expand(shape))


def _downsample(text: str, shape: tuple[int, ...]) -> inverse.Operator:
    axes = _places(shape)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("is no whole number above 0")
    return inverse.Downsample((int(text),) * axes, shape)


def _blur(text: str, shape: tuple[int, ...]) -> inverse.Operator:
    try:
        width = float(text)
    except ValueError:
        return inverse.Blur(_numbers(text), shape)
    if not 0 < width < math.inf:
        raise ValueError("is no width of a Gaussian above 0")
    kernel = torch.ones(())
    for size in shape[len(shape) - _places(shape) :]:
        reach = min(math.ceil(4 * width), (size - 1) // 2)
        line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / width) ** 2)
        kernel = kernel.unsqueeze(-1) * (line / line.sum())
    return inverse.Blur(kernel, shape)


def _matrix(text: str, shape: tuple[int, ...]) -> inverse.Operator:
    return inverse.Matrix(_numbers(text), shape)


def _fourier(text: str, shape: tuple[int, ...]) -> inverse.Operator:
    return inverse.Fourier(_zeros_and_ones(text), shape)


def _radon(text: str, shape: tuple[int, ...]) -> inverse.Operator:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("is no number of angles above 0")
    return inverse.Radon(math.pi * torch.arange(int(text)).double() / int(text), shape)


OPERATORS: dict[str, Callable[[str, tuple[int, ...]], inverse.Operator]] = {
    "mask": _mask,
    "downsample": _downsample,
    "blur": _blur,
    "matrix": _matrix,
    "fourier": _fourier,
    "radon": _radon,
}


def _places(shape: tuple[int, ...]) -> int:
    """How many of the last axes are places: all but the channels."""
    return max(1, len(shape) - 1)


def _measured(options: argparse.Namespace, operator: inverse.Operator, model: Learned) -> Measured:
    """y as the model sees it, (*M) or (R, *M), and its noise."""
    path = Path(options.data)
    with _of(f"--data {path}"):
        y, levels = _read(path, options.key, operator, model.facts.levels)
        y = _observed(y, operator)
        seen = inverse.Observation(operator, y, options.noise)
        if levels is not None:
            one = operator.forward(torch.ones(1, *operator.shape, dtype=torch.float64))
            y = seen.y + (1 - 1 / levels) * (1 - one[0])
            seen = inverse.Observation(operator, y, 2 / levels * options.noise)
        return Measured(seen, levels)


def _read(
    path: Path, key: str | None, operator: inverse.Operator, known: int | None
) -> tuple[Tensor, int | None]:
    """What the file holds, float64, and of how many levels it is; levels as in ``centre``."""
    if path.is_dir():
        return data.image_folder(path, _channels(operator)).double(), 256
    if path.suffix.lower() in SUFFIXES:
        return data.load_image(path, _channels(operator)).double(), 256
    array = data.read_array(path, key)
    if array.dtype.kind in "iu" and array.size:
        if known is None:
            raise TypeError(
                f"holds integers ({array.dtype}), and the model knows of no grey levels: give"
                " floats in the units of its data"
            )
        return data.centre(array, known).double(), known
    if array.dtype.kind == "c":
        return torch.view_as_real(torch.from_numpy(array.astype(np.complex128))), None
    if array.dtype.kind != "f" or array.size == 0:
        raise TypeError(f"holds {array.dtype} {array.shape}, expected numbers")
    return torch.from_numpy(array.astype(np.float64)), None


def _observed(y: Tensor, operator: inverse.Operator) -> Tensor:
    """Of a mask that comes last whole arrays too, whose hidden entries are left out."""
    last = _last(operator)
    if not isinstance(last, inverse.Mask) or y.ndim - len(last.shape) not in (0, 1):
        return y
    lead = y.shape[: y.ndim - len(last.shape)]
    if len(last.shape) > 2 and y.shape[len(lead) :] != last.shape:
        raise ValueError(
            f"is {(*y.shape[len(lead) :],)}, the mask {last.shape}: cut or resize it to that first"
        )
    if y.shape[len(lead) :] != last.shape or last.measured == y.shape:
        return y
    if not lead and y.shape[1:] == last.measured:
        raise ValueError(
            f"{tuple(y.shape)} is one whole array, or {len(y)} rows of what the mask leaves: give"
            " it with an axis more in front"
        )
    return y.reshape(*lead, -1)[..., last.mask.flatten()]


def _last(operator: inverse.Operator) -> inverse.Operator:
    outer = getattr(operator, "outer", operator)
    assert isinstance(outer, inverse.Operator)
    return outer


def _channels(operator: inverse.Operator) -> Literal[1, 3]:
    """Those of the images that are measured."""
    last = _last(operator)
    shape = last.shape if isinstance(last, inverse.Mask) else last.measured
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"holds images, but what is measured is {shape}: give an array")
    return 1 if shape[0] == 1 else 3


def _zeros_and_ones(text: str) -> Tensor:
    """An array of 0 and 1, or the white of an image (H, W)."""
    if Path(text).suffix.lower() in SUFFIXES:
        return data.load_image(text, 1)[0] > 0
    array = data.read_array(text)
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ValueError("must hold 0 (hidden) and 1 (observed) alone")
    return torch.from_numpy(array.astype(bool))


def _numbers(text: str) -> Tensor:
    array = data.read_array(text)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"holds {array.dtype}, expected real numbers")
    return torch.from_numpy(array.astype(np.float64))


@contextmanager
def _of(what: str) -> Iterator[None]:
    """Errors say of which option they are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
