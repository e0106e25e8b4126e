"""Averages of another width, after the run.

Two averages of power-law profile are stored now and then. Every profile is, to good accuracy, a
linear combination of those that were stored, and so is the average that belongs to it (Karras et
al. 2024, section 3.2). After step k of its run an average of exponent gamma holds the weights of
step j with the weight

    (j^(gamma + 1) - (j - 1)^(gamma + 1)) / k^(gamma + 1),     j = 1 .. k,

and the coefficients are those of least squares between such rows, made to sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .checkpoints import CheckpointError, load, write
from .folder import as_os_error
from .packing import tensors_of
from .recipe import power_of_width

M = TypeVar("M", bound=nn.Module)

FOLDER = "averages"
CELLS = 4096
"""Into so many stretches of steps the profiles are cut at most, for the least squares."""


def profile(width: float, step: int, edges: Tensor) -> Tensor:
    """What an average of this width holds, after ``step`` steps, of those between the edges.

    The weights of steps edges[i] + 1 .. edges[i + 1], summed; float64, one fewer than edges.

    >>> profile(0.1, 4, torch.arange(5.0)).sum()
    tensor(1., dtype=torch.float64)
    """
    u = (edges.double() / step).clamp_max(1) ** (power_of_width(width) + 1)
    return u.diff()


def coefficients(
    stored: Sequence[tuple[int, float]], width: float, step: int
) -> tuple[Tensor, Tensor]:
    """Of each stored average (step, width), its part in the one wanted; and what that leaves.

    Returns:
        The coefficients, float64 of sum 1, and the sum over steps of the absolute differences
        between the profile that they give and the one wanted.
    """
    cells = min(step, CELLS)
    edges = torch.linspace(0, step, cells + 1, dtype=torch.float64).round()
    rows = torch.stack([profile(w, k, edges) for k, w in stored])
    wanted = profile(width, step, edges)
    found = torch.linalg.lstsq(rows.T, wanted[:, None], driver="gelsd").solution[:, 0]
    found = found / found.sum()
    return found, (found @ rows - wanted).abs().sum()


def write_snapshot(folder: Path, step: int, width: float, modules: Sequence[nn.Module]) -> None:
    """Store averages of ``width``, of half of it, and so on."""
    from safetensors.torch import save_file

    tensors = {
        f"{i}.{name}": t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for i, module in enumerate(modules)
        for name, t in tensors_of(module, every=False).items()
    }
    about = {"step": str(step), "widths": " ".join(str(width / 2**i) for i in range(len(modules)))}
    (folder / FOLDER).mkdir(exist_ok=True)
    with as_os_error(folder):
        file = folder / FOLDER / f"{step:09d}.safetensors"
        write(file, lambda part: save_file(tensors, part, about))


def clear_snapshots(folder: Path, after: int) -> None:
    """Remove the averages that were stored after step ``after``."""
    for file in (folder / FOLDER).glob("*.safetensors"):
        if file.stem.isdecimal() and int(file.stem) > after:
            file.unlink(missing_ok=True)


def average_of(
    folder: str | Path,
    width: float,
    device: torch.device | str = "cpu",
    net: nn.Module | None = None,
) -> nn.Module:
    """The model of a run with the average of another width than the run's own ``ema``.

    The run has stored two averages at each of ``Recipe.snapshots`` marks; the result is their
    combination whose profile is nearest to the one wanted, at the last mark. With 20 marks or
    more, widths from half of ``ema`` to twice of it are met to about a per cent.

    Args:
        folder: that of a run with ``Recipe(snapshots=...)``.
        width: relative standard deviation of the profile, in (0, 0.28), as ``ema``.
        device, net: as in ``load``.

    Raises:
        CheckpointError: no snapshots there, damaged ones, or ones of another model.
        ValueError: a width out of its range.

    >>> x = torch.randn(64, 2)
    >>> model = sg.ScoreNetwork(sg.networks.MLP((2,), 8, 1), sg.VP(), facts=sg.Facts.of(x))
    >>> recipe = sg.Recipe(steps=20, batch=16, snapshots=5)
    >>> model = sg.train(model, x, recipe=recipe, folder="run", device="cpu", progress=False)
    >>> wider = sg.training.average_of("run", 0.15)
    """
    power_of_width(width)
    model = load(folder, device, net)
    files = sorted((Path(folder) / FOLDER).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no averages: train with Recipe(snapshots=20)")
    steps, widths, _ = zip(*map(_read, files), strict=True)
    stored = [(k, w) for k, ws in zip(steps, widths, strict=True) for w in ws]
    parts, _ = coefficients(stored, width, max(steps))
    total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in _floating(model)}
    parts_of = iter(parts.tolist())
    for file in files:
        _, own, tensors = _read(file)
        for i in range(len(own)):
            part = next(parts_of)
            for name, t in total.items():
                if (found := tensors.get(f"{i}.{name}")) is None or found.shape != t.shape:
                    raise CheckpointError(f"{file} is not of the model in {folder}: see {name}")
                t += part * found
    with torch.no_grad():
        for name, t in _floating(model):
            t.copy_(total[name])
    if hasattr(model, "tuned"):
        model.tuned = None
    return model


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in model.named_parameters() if t.is_floating_point()]


def _read(file: Path) -> tuple[int, list[float], dict[str, Tensor]]:
    """Step, widths and tensors, which are mapped and not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            step, widths = int(about["step"]), [float(w) for w in about["widths"].split()]
            return step, widths, {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
