"""What ``sde-gen restore`` found: how well it fits, and the files that it is written to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import data, plots
from ..inverse import Observation, Particles
from ..training.checkpoints import write

SHOWN = 20
"""Observations of which a line is printed."""
DRAWS = 8
"""Draws of each observation on a sheet."""


class Restored(NamedTuple):
    """What is known of x given y, on the CPU; of R observations each tensor begins with an axis R.

    Attributes:
        mean, std: (*D), in the units of the data that the model draws.
        draws: (S, *D).
        chi_square: |W (y - A x)|^2 / m, the mean over the draws, ().
        particles: where they were drawn by these.
    """

    mean: Tensor
    std: Tensor
    draws: Tensor
    chi_square: Tensor
    particles: Particles | None = None

    def arrays(self) -> dict[str, Any]:
        """What a .npz holds: the tensors, and of particles the evidence and their number."""
        found = {name: getattr(self, name) for name in ("mean", "std", "draws", "chi_square")}
        if self.particles is not None:
            for name in ("log_evidence", "standard_error", "ess"):
                found[name] = getattr(self.particles, name)
        return {name: x.cpu().numpy() for name, x in found.items()}

    def tell(self, m: int) -> None:
        """Print the fit to m measurements; warn where right draws would hardly ever be as far."""
        from scipy.stats import chi2

        low, high = (float(v) / m for v in chi2.ppf([0.001, 0.999], m))
        chi = self.chi_square.reshape(-1).tolist()
        said = [] if self.particles is None else str(self.particles).splitlines()
        for i, value in enumerate(chi[:SHOWN]):
            number = f"observation {i}: " if self.chi_square.ndim else ""
            print(f"{number}chi-square {value:.3g}" + "".join(f", {s}" for s in said[i : i + 1]))
        if len(chi) > SHOWN:
            print(f"... and {len(chi) - SHOWN} observations more")
        print(
            "chi-square is (residual / noise)^2, the mean over measurements and draws: 1 is"
            f" expected, {low:.2f} .. {high:.2f} likely"
        )
        for wrong, why in (
            ([c for c in chi if c > high], "the noise is larger, A another, or x unlike the data"),
            ([c for c in chi if c < low], "the noise is smaller than --noise"),
        ):
            if wrong:
                warnings.warn(
                    f"{len(wrong)} of {len(chi)} observations do not fit, chi-square"
                    f" {max(wrong, key=lambda c: abs(math.log(max(c, 1e-300)))):.3g}: {why}",
                    stacklevel=2,
                )


def check_out(out: Path, shape: tuple[int, ...]) -> None:
    """Raise unless what is drawn can be written to ``out``: a .npz; of images also a .png or a
    new or empty folder."""
    if out.suffix not in ("", ".npz", ".png"):
        raise ValueError(f"--out must end in .npz or .png, or be a folder, got {out}")
    if out.suffix != ".npz" and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(f"samples of shape {shape} are no images: use --out FILE.npz")
    if out.suffix:
        return data.check_writable(out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files: name a new or an empty folder")
    return data.check_writable(out / "mean.png")


def save(out: Path, found: Restored, seen: Observation) -> None:
    """Write what was found: arrays, a sheet of images, or a folder of them."""
    files: dict[Path, Callable[[Path], object]]
    if out.suffix == ".npz":
        files = {out: lambda file: _arrays(file, found)}
    elif out.suffix == ".png":
        files = {out: lambda file: _sheet(file, found, seen)}
    else:
        files = {out / name: _pixels(x) for name, x in _images(found, seen).items()}
    for path, fill in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, fill)


def _arrays(file: Path, found: Restored) -> None:
    with file.open("wb") as opened:
        np.savez_compressed(opened, **found.arrays())


def _sheet(file: Path, found: Restored, seen: Observation) -> None:
    """A row an observation: what was observed, mean, std, draws."""
    rows = [
        torch.cat([torch.stack([y, mean, _grey(std)]), draws[:DRAWS]])
        for y, mean, std, draws in _each(found, seen)
    ]
    shown = min(DRAWS, len(rows[0]) - 3)
    figure = plots.image_grid(
        torch.cat(rows), len(rows), title=f"observed, mean, std, {shown} draws"
    )
    with file.open("wb") as opened:
        figure.savefig(opened, format="png", dpi=200)


def _images(found: Restored, seen: Observation) -> dict[str, Tensor]:
    """Names of files and images (C, H, W) in [-1, 1]."""
    named: dict[str, Tensor] = {}
    rows = _each(found, seen)
    for i, (y, mean, std, draws) in enumerate(rows):
        begin = f"{i:0{len(str(len(rows) - 1))}d}_" if len(rows) > 1 else ""
        named |= {f"{begin}observed.png": y, f"{begin}mean.png": mean}
        named |= {f"{begin}std.png": _grey(std)}
        digits = len(str(len(draws) - 1))
        named |= {f"{begin}draw_{j:0{digits}d}.png": x for j, x in enumerate(draws)}
    return named


def _each(found: Restored, seen: Observation) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each observation what was observed, mean, std and draws."""
    y = seen.y.unsqueeze(0) if seen.batch is None else seen.y
    parts = [found.mean, found.std, found.draws]
    if seen.batch is None:
        parts = [x.unsqueeze(0) for x in parts]
    return list(zip(_observed(seen, y), *parts, strict=True))


def _observed(seen: Observation, y: Tensor) -> Tensor:
    """A^T y / A^T A 1, which of a mask, blocks and blur is what was seen; 0 where nothing was."""
    a = seen.operator
    one = a.adjoint(a.forward(torch.ones(1, *a.shape, dtype=y.dtype)))
    clear = one.abs() > 1e-6 * one.abs().max()
    return torch.where(clear, a.adjoint(y) / torch.where(clear, one, 1.0), 0.0).float()


def _grey(std: Tensor) -> Tensor:
    """Black where nothing is left open, white where most is."""
    return 2 * std / std.max().clamp_min(1e-30) - 1


def _pixels(x: Tensor) -> Callable[[Path], object]:
    """Writes an image (C, H, W) in [-1, 1], a pixel an entry."""
    from PIL import Image

    pixels = data.quantise(x, 256).to(torch.uint8).movedim(0, -1).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return lambda file: image.save(file, format="PNG")
