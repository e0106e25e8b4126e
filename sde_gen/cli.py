"""The command line: ``sde-gen demo | train | tune | sample | evaluate``.

Bad input ends with one line on the standard error and the exit status 2. Each command imports
what it needs when it runs, so that ``--help`` costs no more than the import of the package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .networks import Network
    from .scores import Score, ScoreNetwork
    from .sdes import LinearSDE

DATA_HELP = """\
DATA is one of
  digits             scikit-learn's 8 x 8 handwritten digits, with their classes
  eight_gaussians    (or grid_25, two_moons, swiss_roll, checkerboard) a toy in the plane
  FOLDER             of images of one size; folders inside it are classes
  FILE.npy FILE.npz  vectors (N, D), signals (N, C, L), images (N, C, H, W) or volumes;
                     integers need --levels"""

DEMO_HELP = """\
Trains a class-conditional score network on handwritten digits, draws new ones with five samplers,
each without guidance, with a classifier and classifier-free, judges them, and writes
results.json, digits.png and the model into DIR. With the default time it is done in about three
minutes on two CPU cores."""


TUNE_HELP = """\
Fits time grids and solvers to the model and stores them with it, where they beat the default on
trajectories that nothing was fitted to; `sample` and `evaluate` then use them. Takes two minutes
for the model of the demo on one CPU core. Other numbers of --steps, --guidance and --eta still
work, and gain less or nothing."""


EXAMPLE = """\
for example:
  sde-gen train two_moons --steps 1000 --out moons
  sde-gen sample moons --n 1000 --out moons.npz
  sde-gen evaluate moons two_moons"""


class Data(NamedTuple):
    """Samples (N, *D), their labels (N,), and the number of grey levels of quantised data."""

    x: Tensor
    y: Tensor | None = None
    levels: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"sde-gen {options.name}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sde-gen {options.name}: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="sde-gen",
        description="Score-based generative modelling with stochastic differential equations.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_train, _add_tune, _add_sample, _add_evaluate):
        add(commands)
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], None],
    summary: str,
    details: str = "",
) -> argparse.ArgumentParser:
    name = run.__name__.lstrip("_")
    made = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(command=run, name=name)
    return made


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, _demo, "train on digits, draw new ones, judge them", DEMO_HELP)
    add.add_argument("--minutes", type=float, default=1.25, help="of training (default: 1.25)")
    add.add_argument("--out", metavar="DIR", default="demo", help="where to write (default: demo)")
    add.add_argument("--seed", type=int, default=0, help="of training and sampling (default: 0)")


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, _train, "train a score network", DATA_HELP)
    _add_data(add)
    add.add_argument("--out", metavar="DIR", required=True, help="where the model goes")
    add.add_argument("--steps", type=int, help="most steps (default: 10000 without --minutes)")
    add.add_argument("--minutes", type=float, help="most minutes")
    add.add_argument("--batch", type=int, default=256, help="samples in a step (default: 256)")
    add.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    add.add_argument("--sde", choices=("vp", "subvp", "ve", "edm"), default="vp", help="process")
    add.add_argument("--channels", type=int, help="width of the network (default: by the data)")
    add.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    _add_common(add)


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, _tune, "fit the sampler to a trained model", TUNE_HELP)
    add.add_argument("model", metavar="MODEL", help="a folder that `train` or `demo` wrote")
    add.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[5, 10, 20],
        help="the numbers of network calls that samples will cost (default: 5 10 20)",
    )
    add.add_argument("--n", type=int, default=256, help="trajectories in a set (default: 256)")
    _add_common(add)


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, _sample, "draw samples from a trained model")
    add.add_argument("model", metavar="MODEL", help="a folder that `train` or `demo` wrote")
    add.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help=".png of images, .npz of x and y (-1: no class)",
    )
    add.add_argument("--n", type=int, default=100, help="how many (default: 100)")
    add.add_argument("--label", type=int, help="the class (default: all classes in turn)")
    add.add_argument(
        "--guidance", type=float, default=0.0, help="classifier-free weight (default: 0, none)"
    )
    add.add_argument(
        "--eta", type=float, default=0.0, help="0: probability flow; 1: reverse-time SDE"
    )
    _add_sampling(add)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(
        commands,
        _evaluate,
        "compare samples of a model with real data",
        DATA_HELP + "\n\nEvery number stands beside that of held-out real data, the floor.",
    )
    add.add_argument("model", metavar="MODEL", help="a folder that `train` or `demo` wrote")
    _add_data(add)
    add.add_argument("--n", type=int, default=1000, help="most samples (default: 1000)")
    add.add_argument("--bits", action="store_true", help="bits per dimension of quantised data")
    _add_sampling(add)


def _add_data(add: argparse.ArgumentParser) -> None:
    add.add_argument("data", metavar="DATA")
    add.add_argument("--levels", type=int, help="grey levels of integer arrays, 256 for 8 bits")
    add.add_argument("--key", help="which array of a .npz")
    add.add_argument("--labels", metavar="KEY", help="which array of a .npz holds the classes")
    add.add_argument("--grey", action="store_true", help="read images of a folder as grey")


def _add_sampling(add: argparse.ArgumentParser) -> None:
    add.add_argument("--steps", type=int, default=25, help="network calls (default: 25)")
    add.add_argument("--chunk", type=int, default=500, help="samples at once (default: 500)")
    _add_common(add)


def _add_common(add: argparse.ArgumentParser) -> None:
    add.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add.add_argument("--seed", type=int, default=0, help="(default: 0)")


def _demo(options: argparse.Namespace) -> None:
    from .demo import demo

    demo(options.out, options.minutes, options.seed)


def _train(options: argparse.Namespace) -> None:
    from .data import Dequantise
    from .scores import ScoreNetwork
    from .training import Recipe, train

    data = _read(options)
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
    train(
        ScoreNetwork(net, _process(options.sde), data_std=float(data.x.std())),
        data.x,
        data.y,
        recipe,
        transform=None if data.levels is None else Dequantise(data.levels),
        device=options.device,
        folder=options.out,
        resume=options.resume,
    )
    print(f"{options.out}: the model; draw from it with sde-gen sample {options.out} --out x.npz")


def _tune(options: argparse.Namespace) -> None:
    from .training import load, save
    from .tuning import tune_solver

    model = load(options.model, options.device)
    y = _labels(model, 3 * options.n, None)
    score = model if y is None else model.given(y=y.to(model.device))
    model.tuned = tune_solver(score, steps=options.steps, n=options.n, seed=options.seed)
    save(model, options.model)
    print(f"{options.model}: sde-gen sample takes from now on\n{model.tuned}")


def _sample(options: argparse.Namespace) -> None:
    import numpy as np

    from . import plots
    from .training import load

    out = Path(options.out)
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {out}")
    model = load(options.model, options.device)
    if out.suffix == ".png" and (model.shape is None or len(model.shape) != 3):
        raise ValueError(f"samples of shape {model.shape} are no images: use --out FILE.npz")
    y = _labels(model, options.n, options.label)
    if model.tuned is not None and options.eta == 0 and options.guidance == 0:
        print("the sampler is tuned to this model (sde-gen tune)")
    x = _draw(model, options.n, y, options, options.guidance, options.eta)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        plots.image_grid(x).savefig(out)
    else:
        labels = np.full(len(x), -1) if y is None else y.numpy()
        np.savez_compressed(out, x=x.numpy(), y=labels)
    print(f"{out}: {len(x)} samples of shape {tuple(x.shape[1:])}")


def _evaluate(options: argparse.Namespace) -> None:
    from .data import centre, quantise
    from .likelihood import bits_per_dim
    from .training import load

    model = load(options.model, options.device)
    reference, held = _split(_read(options), options)
    if model.shape != held.x.shape[1:]:
        raise ValueError(f"the model draws {model.shape}, the data are {(*held.x.shape[1:],)}")
    if options.bits and held.levels is None:
        raise ValueError("--bits needs quantised data: digits, images, or --levels")
    y = held.y if model.classes and held.y is not None else _labels(model, len(held.x), None)
    x = _draw(model, len(held.x), y, options)
    if held.levels is not None:
        x = centre(quantise(x, held.levels), held.levels)
    drawn, real = (_grades(z, y, reference, options.data) for z in (x, held.x))
    print(f"{len(x)} samples, beside as many real ones, against {len(reference.x)} real ones")
    print(f"{'':20} {'samples':>10} {'real':>10}")
    for name, value in drawn.items():
        print(f"{name:20} {value:10.4f} {real[name]:10.4f}")
    if options.bits and held.levels is not None:
        score = model if y is None else model.given(y=y.to(model.device))
        levels = quantise(held.x, held.levels).to(model.device)
        bits = bits_per_dim(score, levels, held.levels, chunk=options.chunk)
        print(f"{'bits per dimension':20} {float(bits.mean()):10.4f}   (held-out real data)")


def _split(data: Data, options: argparse.Namespace) -> tuple[Data, Data]:
    """Real data to compare with, and at most n others that were held out."""
    from .data import digits

    generator = torch.Generator().manual_seed(options.seed)
    if options.data == "digits":
        other = Data(*digits("test"), data.levels)
    else:
        order = torch.randperm(len(data.x), generator=generator)
        data, other = (_take(data, half) for half in order.tensor_split(2))
    order = torch.randperm(len(other.x), generator=generator)
    return data, _take(other, order[: options.n])


def _take(data: Data, index: Tensor) -> Data:
    return Data(data.x[index], None if data.y is None else data.y[index], data.levels)


def _grades(x: Tensor, y: Tensor | None, reference: Data, name: str) -> dict[str, float]:
    from . import metrics

    grades = {
        "energy distance": metrics.energy_distance(x, reference.x),
        "sliced Wasserstein": metrics.sliced_wasserstein(x, reference.x),
        "nearest neighbour": float(metrics.nearest_neighbour_distance(x, reference.x).median()),
    }
    if name == "digits" and y is not None and reference.y is not None:
        from .data import Labelled
        from .demo import Judge

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


def _draw(
    model: ScoreNetwork,
    n: int,
    y: Tensor | None,
    options: argparse.Namespace,
    weight: float = 0.0,
    eta: float = 0.0,
) -> Tensor:
    """Samples on the CPU, with the labels y and the classifier-free weight."""
    from .guidance import ClassifierFree
    from .sampling import sample

    score: Score = model
    if y is not None:
        y = y.to(model.device)
        score = ClassifierFree(model, y, weight) if weight else model.given(y=y)
    elif weight:
        raise ValueError("the model has no classes: leave --guidance away")
    steps, seed, chunk = options.steps, options.seed, options.chunk
    return sample(score, n, steps, seed, eta=eta, progress=True, chunk=chunk).cpu()


def _read(options: argparse.Namespace) -> Data:
    """The data that the command line names."""
    from . import data

    name, path = options.data, Path(options.data)
    if name == "digits":
        return Data(*data.digits("train"), 17)
    if name in data.TOYS:
        return Data(data.toy(name, 20_000, torch.Generator().manual_seed(options.seed)))
    if path.is_dir():
        channels: Literal[1, 3] = 1 if options.grey else 3
        if any(f.is_dir() for f in path.iterdir()):
            return Data(*data.class_folders(path, channels), 256)
        return Data(data.image_folder(path, channels), None, 256)
    if path.suffix in (".npy", ".npz"):
        x = data.load_array(path, options.key, options.levels)
        y = None if options.labels is None else _array_labels(path, options.labels)
        return Data(x, y, options.levels)
    known = ", ".join(["digits", *data.TOYS])
    raise ValueError(f"{name} is no data: expected {known}, a folder, a .npy or a .npz file")


def _array_labels(path: Path, key: str) -> Tensor:
    import numpy as np

    if path.suffix != ".npz":
        raise ValueError(f"{path} holds no labels: --labels names an array of a .npz file")
    with np.load(path, allow_pickle=False) as arrays:
        if key not in arrays or arrays[key].dtype.kind not in "iu":
            raise ValueError(f"{path} has no array of integers {key!r}, but {sorted(arrays)}")
        return torch.from_numpy(arrays[key].astype(np.int64))


def _process(name: str) -> LinearSDE:
    from . import sdes

    kinds = {"vp": sdes.VP, "subvp": sdes.SubVP, "ve": sdes.VE, "edm": sdes.EDM}
    process: LinearSDE = kinds[name]()
    return process


def _network(data: Data, channels: int | None) -> Network:
    """A network for the data: a U-Net for what has channels and places, else a perceptron."""
    from .networks import MLP, UNet

    shape = tuple(data.x.shape[1:])
    classes = None if data.y is None else int(data.y.max()) + 1
    if len(shape) == 1:
        return MLP(shape, channels or 128, 3, classes)
    if shape == (1, 8, 8) and channels is None:
        return UNet.digits(classes)
    largest = max(shape[1:])
    halvings = max(1, min(3, (largest - 1).bit_length() - 2))
    return UNet(shape, channels or 64, (1, *[2] * halvings), blocks=2, classes=classes)
