"""What each command does. It imports what it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .chosen import choose_size, chosen
from .config import KEPT, text_of
from .reading import Data, read_data, say, split_data, tell_seen
from .refit import FIRST, again, is_refitted
from .tables import evaluate_table, keep_matched, keep_table, spread_rows, table_of

if TYPE_CHECKING:
    from ..data import Table
    from ..networks import Network
    from ..scores import Learned, ScoreNetwork
    from ..sdes import LinearSDE
    from ..training import Recipe, Transform
    from ..training.validation import Validation


def _demo(options: argparse.Namespace) -> None:
    from ..demo import demo

    demo(options.out, options.minutes, options.seed)


def _train(options: argparse.Namespace) -> None:
    from ..data import check_writable
    from ..training import pick_device
    from ..training.folder import check_free

    folder = Path(options.out)
    check_writable(folder / "config.json")
    data = read_data(options, options.seed, "train")
    if bool((data.x == data.x[0]).all()):
        raise ValueError(f"{options.data} holds one value alone: there is nothing to learn")
    choose_size(options, data.x.shape[1:], pick_device(options.device).type)
    recipe = _recipe(options, len(data.items))
    if options.latent is not None:
        from .latent import train_latent

        _begin(options, data, recipe, folder)
        train_latent(options, data, recipe)
        _end(options, data, folder)
    else:
        if not (options.resume or options.overwrite):
            check_free(folder)
        if is_refitted(options, recipe, data):
            found = _run(options, data, recipe, folder / FIRST)
            recipe = again(options, recipe, found, len(data.items))
        _run(options, data, recipe, folder)
    file = "x.npz" if data.table is None else "x.csv"
    print(f"{options.out}: the model; draw from it with sde-gen sample {options.out} --out {file}")


def _run(options: argparse.Namespace, data: Data, recipe: Recipe, folder: Path) -> Validation:
    """One run in a folder; returns its looks at the loss on what is held out."""
    from ..training import LossPlot, Trainer, pick_device
    from ..training.folder import holds_run

    transforms = _transforms(options, data)
    x = data.x if data.table is None else spread_rows(data.table, data.x, recipe)
    model = _untrained(options, data, x)
    say(chosen(model.net, options.batch, pick_device(options.device).type))
    _begin(options, data, recipe, folder)
    trainer = Trainer(
        model,
        data.items,
        recipe=recipe,
        transform=transforms,
        callbacks=[LossPlot()],
        device=options.device,
        folder=folder,
        overwrite=options.overwrite,
        workers=options.workers,
    )
    if options.resume and holds_run(folder):
        trainer.resume()
    model = trainer.run()
    if recipe.minutes and trainer.step < min(FEW, recipe.steps or FEW):
        said = f"only {trainer.step} steps fit into the time, too few to draw well"
        say(f"{said}: give more --minutes, or a smaller --batch or --channels")
    if data.table is not None:
        keep_matched(model, data.table, data.x, recipe, folder)
    _end(options, data, folder)
    return trainer.validation


def _begin(options: argparse.Namespace, data: Data, recipe: Recipe, folder: Path) -> None:
    """Say what is held out; keep the options of a new run."""
    from ..training.folder import check_free

    _tell_held(recipe, len(data.items))
    if not options.resume:
        if not options.overwrite:
            check_free(folder)
        _keep(options, folder, data.table)


def _end(options: argparse.Namespace, data: Data, folder: Path) -> None:
    """Keep the options of a run that was taken up."""
    if options.resume:
        _keep(options, folder, data.table)


def _untrained(options: argparse.Namespace, data: Data, x: Tensor) -> ScoreNetwork:
    """A network for the data, whose facts are those of x."""
    from ..facts import Facts
    from ..networks import PrincipalMLP
    from ..scores import ScoreNetwork

    # The columns of a table have units of their own.
    units: Literal["column"] | None = (
        "column" if data.x.ndim == 2 and data.levels is None else None
    )
    rank = None if data.table is None else data.table.width
    facts = Facts.of(x, units, rank, classes=data.classes, levels=data.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = _network(data, options.channels)
    if isinstance(net, PrincipalMLP) and data.table is not None:
        net.fit(facts.encode(x), data.table.places("category"))
    return ScoreNetwork(net, _process(options.sde), facts=facts)


LATENT = "autoencoder"
"""The folder of the first run of a latent model, inside that of the model."""
FEW = 100
"""Fewer steps than this teach a network little more than the spread of the data."""
SMALL = 10_000
"""Fewer data than this are learned by heart: a tenth is held out, and ends the run."""


def _recipe(options: argparse.Namespace, n: int) -> Recipe:
    """The recipe that the options say, and what they leave open for n data."""
    from ..training import Recipe

    few = 10 <= n < SMALL
    holdout = (0.1 if few else 0.0) if options.holdout is None else options.holdout
    patience = options.patience
    if patience is None:
        patience = 1.0 if few and holdout else 0.0
    return Recipe(
        steps=options.steps,
        minutes=options.minutes,
        epochs=options.epochs,
        batch=options.batch,
        lr=options.lr,
        holdout=holdout,
        patience=patience or None,
        seed=options.seed,
    )


def _tell_held(recipe: Recipe, n: int) -> None:
    """Say how many of n data are held out, and what for."""
    from ..data import Order

    if recipe.holdout:
        held = n - Order(n, recipe.seed, recipe.holdout).trained
        end = "it ends the run when it no longer falls (--patience 0: never)"
        said = f"{held} of {n} data are held out (--holdout 0: none) and their loss is watched"
        say(f"{said}; {end}" if recipe.patience else said)


def _transforms(options: argparse.Namespace, data: Data) -> list[Transform]:
    from ..data import Dequantise, Flip

    if options.flip and data.x.ndim != 4:
        raise ValueError(f"--flip mirrors images (N, C, H, W), not {tuple(data.x.shape)}")
    levels = [] if data.levels is None else [Dequantise(data.levels)]
    rows = [] if data.table is None else [data.table.spread]
    return [*([Flip()] if options.flip else []), *levels, *rows]


def _keep(options: argparse.Namespace, folder: Path, table: Table | None) -> None:
    """Write the options into the folder of the run, as a file that ``--config`` reads, and what
    the columns of a table are."""
    from ..many import place
    from ..training.checkpoints import write

    if place()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        text = text_of(options)
        write(folder / KEPT, lambda file: file.write_text(text, encoding="utf-8"))
    keep_table(table, folder)


def _tune(options: argparse.Namespace) -> None:
    from ..data import check_writable
    from ..training import load, save
    from ..tuning import ROWS, tune_solver

    model = load(options.model, options.device)
    check_writable(Path(options.model) / "config.json")
    y = _labels(model, ROWS * options.n, None)
    score = model if y is None else model.given(y=y.to(model.device))
    model.tuned = tune_solver(
        score, steps=options.steps, n=options.n, seed=options.seed, minutes=options.minutes
    )
    save(model, options.model)
    print(f"{options.model}: sde-gen sample takes from now on\n{model.tuned}")


def _sample(options: argparse.Namespace) -> None:
    from .samples import sample

    sample(options)


def _restore(options: argparse.Namespace) -> None:
    from .restore import restore

    restore(options)


def _evaluate(options: argparse.Namespace) -> None:
    from ..data import centre, quantise
    from ..many import place, shared
    from ..training.fingerprint import run_of
    from ..training.rows import count_known
    from .samples import draws, read_model, settle

    model, folder = read_model(options), Path(options.model)
    if (folder / LATENT).is_dir():  # what its data were, the first run knows
        folder = folder / LATENT
    if Path(options.data).suffix == ".csv" and (table := table_of(folder)) is not None:
        evaluate_table(model, table, options)
        return
    if options.size is None and model.shape and len(model.shape) == 3:  # as the model draws them
        options.size = f"{model.shape[1]}x{model.shape[2]}"
    reference, held, said = split_data(options, run_of(folder))
    for part in (reference, held):
        _check_comparable(model, part, options.bits)
    seen = tell_seen(said, count_known(held.x, folder), len(held.x))
    y = held.y if model.classes and held.y is not None else _labels(model, len(held.x), None)
    settle(model, options, len(held.x))
    x = shared(draws(model, y, options), len(held.x), options.chunk)
    bits = _bits(model, held, y, options.chunk) if options.bits else ""
    if place()[0] > 0:
        return
    if held.levels is not None:
        x = centre(quantise(x, held.levels), held.levels)
    drawn, real = (_grades(z, y, reference, options.data) for z in (x, held.x))
    print(f"{len(x)} samples, beside as many real ones, against {len(reference.x)} real ones")
    print(f"{'':20} {'samples':>10} {'real':>10}")
    for name, value in drawn.items():
        print(f"{name:20} {value:10.4f} {real[name]:10.4f}")
    if bits:
        print(f"{'bits per dimension':20} {'':10} {bits}")
    print(seen)


def _bits(model: Learned, held: Data, y: Tensor | None, chunk: int) -> str:
    """Bits a dimension of quantised data, with the error bar."""
    from .. import latent
    from ..data import quantise
    from ..likelihood import Estimate, bits_per_dim
    from ..many import shared

    assert held.levels is not None
    levels = quantise(held.x, held.levels)

    def work(first: int, count: int) -> Tensor:
        rows = slice(first, first + count)
        score = model if y is None else model.given(y=y[rows].to(model.device))
        some = levels[rows].to(model.device)
        if isinstance(score, latent.LatentModel):
            found = latent.bound(score, some, first=first).bits_per_dim.total
        else:
            found = bits_per_dim(score, some, held.levels, first=first)
        return torch.stack([found.value, found.spread, found.bias], 1)

    value, spread, bias = shared(work, len(levels), chunk).unbind(1)
    found = Estimate(value, spread, bias).mean()
    return f"{float(found):10.4f} +- {float(found.standard_error):.4f}"


def _check_comparable(model: Learned, data: Data, bits: bool) -> None:
    if model.shape != data.x.shape[1:]:
        raise ValueError(f"the model draws {model.shape}, the data are {(*data.x.shape[1:],)}")
    if bits and data.levels is None:
        raise ValueError("--bits needs quantised data: digits, images, or --levels")
    if model.classes and data.y is not None and int(data.y.max()) >= model.classes:
        raise ValueError(
            f"the model has the classes 0 .. {model.classes - 1}, the data {int(data.y.max())}"
        )


def _grades(x: Tensor, y: Tensor | None, reference: Data, name: str) -> dict[str, float]:
    from .. import metrics

    grades = {
        "energy distance": metrics.energy_distance(x, reference.x),
        "sliced Wasserstein": metrics.sliced_wasserstein(x, reference.x),
        "nearest neighbour": float(metrics.nearest_neighbour_distance(x, reference.x).median()),
    }
    if name == "digits" and y is not None and reference.y is not None:
        from ..data import Labelled
        from ..demo import Judge

        judged = Judge(Labelled(reference.x, reference.y)).grade(x, y)
        grades |= {"Frechet distance": judged["frechet"], "accuracy": judged["accuracy"]}
    return grades


def _labels(model: Learned, n: int, label: str | int | None) -> Tensor | None:
    """n labels for a conditional model: the one asked for, or all classes in turn."""
    if model.classes is None:
        if label is not None:
            raise ValueError("the model has no classes: leave --label away")
        return None
    if label is None:
        return torch.arange(n) % model.classes
    return torch.full((n,), class_of(model, label))


def class_of(model: Learned, label: str | int) -> int:
    """The number of the class that a label names, by its name or by its number."""
    names = model.facts.classes or ()
    if label in names:
        return names.index(str(label))
    try:
        number = int(label)
    except ValueError:
        known = ", ".join(names) if names else "no names, only numbers"
        raise ValueError(f"--label {label} is no class of the model, which has {known}") from None
    if not 0 <= number < (model.classes or 0):
        raise ValueError(f"--label must lie in 0 .. {(model.classes or 0) - 1}, got {number}")
    return number


def _classes(y: Tensor) -> int:
    """How many classes there are; each must have samples, or it would be drawn untrained."""
    found = y.unique()
    if found.tolist() != list(range(len(found))):
        shown = ", ".join(str(c) for c in found[:5].tolist()) + (", ..." if len(found) > 5 else "")
        raise ValueError(
            f"--labels must be 0 .. {len(found) - 1} for {len(found)} classes, each with samples,"
            f" got {shown}: np.unique(labels, return_inverse=True)[1] numbers them so"
        )
    return len(found)


def _process(name: str) -> LinearSDE:
    from .. import sdes

    kinds = {
        "vp": sdes.VP,
        "subvp": sdes.SubVP,
        "ve": sdes.VE,
        "edm": sdes.EDM,
        "flow": sdes.RectifiedFlow,
    }
    process: LinearSDE = kinds[name]()
    return process


def _network(data: Data, channels: int | None) -> Network:
    """A network for the data: a U-Net for what has channels and places, else a perceptron."""
    from ..networks import MLP, PrincipalMLP, UNet

    shape = tuple(data.x.shape[1:])
    classes = None if data.y is None else _classes(data.y)
    if data.table is not None:
        return PrincipalMLP(shape, channels or 128, 3, dropout=0.3)
    if len(shape) == 1:
        return MLP(shape, channels or 128, 3, classes)
    if shape == (1, 8, 8) and channels is None:
        return UNet.digits(classes)
    largest = max(shape[1:])
    halvings = max(1, min(3, (largest - 1).bit_length() - 2))
    channels = channels or 64
    blocks = 2 if channels >= 64 else 1
    return UNet(shape, channels, (1, *[2] * halvings), blocks, classes=classes)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "train": _train,
    "tune": _tune,
    "sample": _sample,
    "restore": _restore,
    "evaluate": _evaluate,
}
