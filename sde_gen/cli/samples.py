"""``sde-gen sample``: draws from a model, into one file or a folder of shards.

The samples are drawn in chunks that do not depend on the number of processes (``many``), so
neither do the files. A folder gets each chunk as it is drawn: one ``.npz``, or one ``.png`` a
sample. ``samples.json`` in it says what was asked for. A chunk that is there and whole is not
drawn again, and whoever asks for something else is refused, with the name of the difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data import check_writable, quantise
from ..many import Work, agree, chunks, own_device, place, shared
from ..sampling import Pace, settled
from ..sampling.pace import network_in
from ..training import load, pick_device
from ..training.checkpoints import save_pace, write
from .commands import _labels
from .tables import table_of, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..scores import Learned, Score

ABOUT = "samples.json"


def sample(options: argparse.Namespace) -> None:
    """The command."""
    out, n = Path(options.out), options.n
    if out.suffix not in ("", ".png", ".npz", ".csv"):
        raise ValueError(f"--out must end in .png, .npz or .csv, or be a folder, got {out}")
    if out.suffix and options.format not in (None, out.suffix[1:]):
        raise ValueError(f"--format {options.format} is for a folder, --out is {out}")
    model = read_model(options)
    kind = out.suffix[1:] or options.format or "npz"
    _check_drawable(model, kind, out.suffix == "")
    table = table_of(options.model)
    if kind == "csv" and table is None:
        raise ValueError(f"{options.model} was not trained on a table: use --out FILE.npz")
    y = _labels(model, options.first + n, options.label)
    y = None if y is None else y[options.first :]
    work = draws(model, y, options, options.guidance, options.eta, options.first)
    labels = torch.full((n,), -1) if y is None else y
    if not out.suffix:
        settle(model, options, n)
        asked = {**identity(model, options), "format": kind, "n": n}
        agree(lambda: check_folder(out, asked))
        known = write_folder(out, asked, work, labels)
        tell(f"{out}: {n} samples of shape {model.shape}, {known} of them were there")
        return
    check_writable(out)
    settle(model, options, n)
    x = shared(work, n, options.chunk)
    if place()[0] == 0 and table is not None and kind == "csv":
        write_table(table, x, out)
    elif place()[0] == 0:
        write_file(out, x, labels, model.facts.classes)
    tell(f"{out}: {n} samples of shape {tuple(x.shape[1:])}")


def _check_drawable(model: Learned, kind: str, each: bool) -> None:
    shape = model.shape or ()
    image, signal = len(shape) == 3 and shape[0] in (1, 3), len(shape) == 2
    if kind == "png" and not (image or (signal and not each)):
        what = "images" if each else "images or signals"
        raise ValueError(f"samples of shape {model.shape} are no {what}: use --out FILE.npz")


def read_model(options: argparse.Namespace) -> Learned:
    """The model, on this process's device."""
    return load(options.model, own_device(pick_device(options.device)))


def settle(model: Learned, options: argparse.Namespace, n: int) -> None:
    """Let all processes, now and later, draw at one pace: that which lies beside the model. Where
    none does it is found and written, if that pays; where it cannot be written, none is taken."""

    network = network_in(model)
    if network is None:
        return

    def keep(pace: Pace) -> None:
        network.pace = pace
        save_pace(model, Path(options.model))
        tell(f"the network is fastest with {pace}: {options.model} keeps that")

    network.pace = settled(network, n, options.steps, keep)


def tell(text: str) -> None:
    """Print it, in one of the processes."""
    if place()[0] == 0:
        print(text, flush=True)


def draws(
    model: Learned,
    y: Tensor | None,
    options: argparse.Namespace,
    weight: float = 0.0,
    eta: float = 0.0,
    offset: int = 0,
) -> Work:
    """What draws the samples offset + first .. of the seed, with their labels of y (n,) and the
    classifier-free weight."""
    from ..guidance import ClassifierFree
    from ..sampling import sample

    if y is None and weight:
        raise ValueError("the model has no classes: leave --guidance away")
    if model.tuned is not None and eta == 0 and weight == 0:
        tell("the sampler is tuned to this model (sde-gen tune)")

    def work(first: int, count: int) -> Tensor:
        score: Score = model
        if y is not None:
            some = y[first : first + count].to(model.device)
            score = ClassifierFree(model, weight, y=some) if weight else model.given(y=some)
        return sample(
            score,
            count,
            options.steps,
            options.seed,
            eta=eta,
            first=offset + first,
            progress=place()[0] == 0,
        )

    return work


# --- one file ------------------------------------------------------------------------------------


def write_file(out: Path, x: Tensor, y: Tensor, names: Sequence[str] | None = None) -> None:
    """A ``.png`` of images or signals, a ``.npz`` of x and y; whole, or as it was."""

    def fill(file: Path) -> None:
        with file.open("wb") as opened:
            if out.suffix == ".png":
                picture(x, y, names).savefig(opened, format="png")
            else:
                np.savez_compressed(opened, x=x.numpy(), y=y.numpy())

    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, fill)


WIDE = 40
"""Images in a row of a picture, at most; a class of more has several."""


def picture(x: Tensor, y: Tensor, names: Sequence[str] | None) -> Figure:
    """Images (n, C, H, W) or signals (n, C, L): a row for each class of y (n,), -1 for none."""
    from .. import plots

    draw = plots.image_grid if x.ndim == 4 else plots.signals
    classes = y.unique().tolist()
    if classes == [-1]:
        return draw(x)
    called = {k: f"{names[k]}" if names else f"{k}" for k in classes}
    if len(classes) == 1:
        return draw(x, title=called[classes[0]])
    if x.ndim == 3 or 2 * len(classes) > len(x):
        order = y.argsort(stable=True)
        return draw(x[order], labels=[called[k] for k in y[order].tolist()])
    rows = {k: x[y == k].split(WIDE) for k in classes}
    labels = [called[k] if i == 0 else "" for k in classes for i in range(len(rows[k]))]
    return plots.image_grid([part for k in classes for part in rows[k]], labels=labels)


# --- a folder ------------------------------------------------------------------------------------


def identity(model: Learned, options: argparse.Namespace) -> dict[str, Any]:
    """What two parts of one set of samples have in common."""
    tuned = "default"
    if model.tuned is not None and options.eta == 0 and options.guidance == 0:
        tuned = f"tuned {hashlib.blake2b(str(model.tuned).encode(), digest_size=4).hexdigest()}"
    names = ("steps", "seed", "eta", "guidance", "label", "first", "chunk")
    asked = {name: getattr(options, name) for name in names}
    network = network_in(model)
    known = None if network is None else network.pace
    plain = known is None or replace(known, device=None) == Pace()
    pace = None if plain else str(known)
    about = {"weights": model.fingerprint(), "process": repr(model.sde), "solver": tuned}
    return {**about, "pace": pace, **asked}


def check_folder(folder: Path, asked: dict[str, Any]) -> None:
    """Raise unless the folder is new, empty, or holds a part of what is asked for.

    Raises:
        FileExistsError: it holds something else; the difference is named.
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder")
    file = folder / ABOUT
    if not file.exists() and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files: choose another folder")
    if file.exists():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        for name, value in asked.items():
            found = there.get(name) if isinstance(there, dict) else None
            grows = name == "n" and isinstance(found, int) and found <= value
            if found != value and not grows:
                raise FileExistsError(
                    f"{folder} holds samples whose {name} is {found}, not {value}: choose another"
                    " folder"
                )
    check_writable(file)


def write_folder(folder: Path, asked: dict[str, Any], work: Work, y: Tensor) -> int:
    """Draw the chunks that are missing, each process its own; returns how many samples were
    there."""
    folder.mkdir(parents=True, exist_ok=True)
    if place()[0] == 0:
        text = json.dumps(asked, indent=1) + "\n"
        write(folder / ABOUT, lambda file: file.write_text(text, encoding="utf-8"))
    shard = _arrays if asked["format"] == "npz" else _images
    counts = []
    for first, count in chunks(len(y), asked["chunk"]):
        files, whole, save = shard(folder, asked["first"] + first, y[first : first + count])
        there = all(file.is_file() for file in files) and whole()
        counts.append(count * there)
        if not there:
            save(work(first, count).cpu())
    # A row of each process; so each also waits for all.
    return int(shared(lambda *_: torch.tensor([sum(counts)]), place()[1], 1).sum())


Shard = tuple[list[Path], Callable[[], bool], Callable[[Tensor], None]]
"""The files of a chunk, whether what is there is whole, and what writes them."""


def _arrays(folder: Path, first: int, y: Tensor) -> Shard:
    """One ``.npz`` of x and y, named by the number of its first sample."""
    file = folder / f"{first:08d}.npz"

    def whole() -> bool:
        try:
            with file.open("rb") as opened:
                found = np.load(opened)  # reading compares checksums
                return bool(len(found["x"]) == len(y) and np.array_equal(found["y"], y.numpy()))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return False

    return [file], whole, lambda x: write_file(file, x, y)


def _images(folder: Path, first: int, y: Tensor) -> Shard:
    """A ``.png`` a sample, 8 bits a channel, named by its number and, where it has one, its
    class."""
    names = [f"{first + i:08d}" + f"-{k}" * (k >= 0) for i, k in enumerate(y.tolist())]
    files = [folder / f"{name}.png" for name in names]

    def save(x: Tensor) -> None:
        from PIL import Image

        pixels = quantise(x, 256).to(torch.uint8).movedim(1, -1).numpy()
        for file, image in zip(files, pixels, strict=True):
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            write(file, lambda part, p=picture: p.save(part, format="png"))  # type: ignore[misc]

    return files, lambda: all(file.stat().st_size > 0 for file in files), save
