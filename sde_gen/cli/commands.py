"""What each command does. It imports what it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from .config import KEPT, text_of

if TYPE_CHECKING:
    from ..networks import Network
    from ..scores import ScoreNetwork
    from ..sdes import LinearSDE


class Data(NamedTuple):
    """Samples (N, *D), their labels (N,), and the number of grey levels of quantised data."""

    x: Tensor
    y: Tensor | None = None
    levels: int | None = None


def _demo(options: argparse.Namespace) -> None:
    from ..demo import demo

    demo(options.out, options.minutes, options.seed)


def _train(options: argparse.Namespace) -> None:
    from ..data import Dequantise, check_writable
    from ..facts import Facts
    from ..scores import ScoreNetwork
    from ..training import Recipe, train
    from ..training.folder import check_free

    check_writable(Path(options.out) / "config.json")
    data = _read(options, options.seed)
    if bool((data.x == data.x[0]).all()):
        raise ValueError(f"{options.data} holds one value alone: there is nothing to learn")
    # The columns of a table have units of their own.
    table = data.x.ndim == 2 and data.levels is None
    facts = Facts.of(data.x, "column" if table else None, levels=data.levels)
    recipe = Recipe(
        steps=options.steps,
        minutes=options.minutes,
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = _network(data, options.channels)
    folder = Path(options.out)
    if not options.resume:
        if not options.overwrite:
            check_free(folder)
        _keep(options, folder)
    train(
        ScoreNetwork(net, _process(options.sde), facts=facts),
        data.x,
        data.y,
        recipe,
        transform=None if data.levels is None else Dequantise(data.levels),
        device=options.device,
        folder=options.out,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    if options.resume:
        _keep(options, folder)
    print(f"{options.out}: the model; draw from it with sde-gen sample {options.out} --out x.npz")


def _keep(options: argparse.Namespace, folder: Path) -> None:
    """Write the options into the folder of the run, as a file that ``--config`` reads."""
    from ..many import place
    from ..training.checkpoints import write

    if place()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        text = text_of(options)
        write(folder / KEPT, lambda file: file.write_text(text, encoding="utf-8"))


def _tune(options: argparse.Namespace) -> None:
    from ..data import check_writable
    from ..training import load, save
    from ..tuning import tune_solver

    model = load(options.model, options.device)
    check_writable(Path(options.model) / "config.json")
    y = _labels(model, 3 * options.n, None)
    score = model if y is None else model.given(y=y.to(model.device))
    model.tuned = tune_solver(score, steps=options.steps, n=options.n, seed=options.seed)
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
    from ..training.rows import count_known
    from .samples import draws, read_model

    model = read_model(options)
    reference, held = _split(options)
    for part in (reference, held):
        _check_comparable(model, part, options.bits)
    seen = _seen(count_known(held.x, Path(options.model)), len(held.x))
    y = held.y if model.classes and held.y is not None else _labels(model, len(held.x), None)
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


def _bits(model: ScoreNetwork, held: Data, y: Tensor | None, chunk: int) -> str:
    """Bits a dimension of quantised data, with the error bar."""
    from ..data import quantise
    from ..likelihood import Estimate, bits_per_dim
    from ..many import shared

    assert held.levels is not None
    levels = quantise(held.x, held.levels)

    def work(first: int, count: int) -> Tensor:
        rows = slice(first, first + count)
        score = model if y is None else model.given(y=y[rows].to(model.device))
        found = bits_per_dim(score, levels[rows].to(model.device), held.levels, first=first)
        return torch.stack([found.value, found.spread, found.bias], 1)

    value, spread, bias = shared(work, len(levels), chunk).unbind(1)
    found = Estimate(value, spread, bias).mean()
    return f"{float(found):10.4f} +- {float(found.standard_error):.4f}"


def _check_comparable(model: ScoreNetwork, data: Data, bits: bool) -> None:
    if model.shape != data.x.shape[1:]:
        raise ValueError(f"the model draws {model.shape}, the data are {(*data.x.shape[1:],)}")
    if bits and data.levels is None:
        raise ValueError("--bits needs quantised data: digits, images, or --levels")
    if model.classes and data.y is not None and int(data.y.max()) >= model.classes:
        raise ValueError(
            f"the model has the classes 0 .. {model.classes - 1}, the data {int(data.y.max())}"
        )


def _seen(known: int | None, n: int) -> str:
    """What a reader must know of the n real data that the samples stand beside."""
    if known is None:
        return f"no record tells whether the model was trained on any of these {n} real ones"
    if known == 0:
        return f"the model was trained on none of these {n} real ones"
    return f"the model was trained on {known} of these {n} real ones: they are not held out"


def _split(options: argparse.Namespace) -> tuple[Data, Data]:
    """Real data to compare with, and at most n others: test images, new points, or a half."""
    from ..data import TOYS, digits

    # Of a toy, training with the same seed has these points; torch reads 32 bits of a seed.
    other_points = 2**31 if options.data in TOYS else 0
    data = _read(options, options.seed + other_points)
    generator = torch.Generator().manual_seed(options.seed)
    if options.data == "digits":
        other = Data(*digits("test"), data.levels)
    else:
        order = torch.randperm(len(data.x), generator=generator)
        data, other = (_take(data, half) for half in order.tensor_split(2))
    order = torch.randperm(len(other.x), generator=generator)
    held = _take(other, order[: options.n])
    if len(held.x) < 2:
        raise ValueError("evaluate needs two samples or more (--n), and four or more data")
    return data, held


def _take(data: Data, index: Tensor) -> Data:
    return Data(data.x[index], None if data.y is None else data.y[index], data.levels)


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


def _labels(model: ScoreNetwork, n: int, label: int | None) -> Tensor | None:
    """n labels for a conditional model: the one asked for, or all classes in turn."""
    if model.classes is None:
        if label is not None:
            raise ValueError("the model has no classes: leave --label away")
        return None
    if label is not None and not 0 <= label < model.classes:
        raise ValueError(f"--label must lie in 0 .. {model.classes - 1}, got {label}")
    return torch.arange(n) % model.classes if label is None else torch.full((n,), label)


def _read(options: argparse.Namespace, seed: int) -> Data:
    """The data that the command line names; the seed is that of a toy's points."""
    from .. import data

    name, path = options.data, Path(options.data)
    if name == "digits":
        return Data(*data.digits("train"), 17)
    if name in data.TOYS:
        return Data(data.toy(name, 20_000, torch.Generator().manual_seed(seed)))
    if path.is_dir():
        channels: Literal[1, 3] = 1 if options.grey else 3
        if any(f.is_dir() for f in data.visible(path)):
            return Data(*data.class_folders(path, channels), 256)
        return Data(data.image_folder(path, channels), None, 256)
    if path.suffix in (".npy", ".npz"):
        x = data.load_array(path, options.key, options.levels)
        if x.ndim == 1:
            raise ValueError(f"{path} holds {tuple(x.shape)}: expected (N, D), as x[:, None] is")
        y = None if options.labels is None else data.load_labels(path, options.labels)
        if y is not None and len(y) != len(x):
            raise ValueError(f"{path}: {options.labels} has {len(y)} labels for {len(x)} data")
        return Data(x, y, options.levels)
    known = ", ".join(["digits", *data.TOYS])
    raise ValueError(f"{name} is no data: expected {known}, a folder, a .npy or a .npz file")


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

    kinds = {"vp": sdes.VP, "subvp": sdes.SubVP, "ve": sdes.VE, "edm": sdes.EDM}
    process: LinearSDE = kinds[name]()
    return process


def _network(data: Data, channels: int | None) -> Network:
    """A network for the data: a U-Net for what has channels and places, else a perceptron."""
    from ..networks import MLP, UNet

    shape = tuple(data.x.shape[1:])
    classes = None if data.y is None else _classes(data.y)
    if len(shape) == 1:
        return MLP(shape, channels or 128, 3, classes)
    if shape == (1, 8, 8) and channels is None:
        return UNet.digits(classes)
    largest = max(shape[1:])
    halvings = max(1, min(3, (largest - 1).bit_length() - 2))
    return UNet(shape, channels or 64, (1, *[2] * halvings), blocks=2, classes=classes)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "train": _train,
    "tune": _tune,
    "sample": _sample,
    "restore": _restore,
    "evaluate": _evaluate,
}
