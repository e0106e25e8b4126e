"""All commands and their options."""

from __future__ import annotations

import argparse
from functools import partial

from ..many import place
from .commands import COMMANDS

DATA_HELP = """\
DATA is one of
  digits             scikit-learn's 8 x 8 handwritten digits, with their classes
  eight_gaussians    (or grid_25, two_moons, swiss_roll, checkerboard) a toy in the plane
  FOLDER             of images; folders inside it are classes, and name them
  FOLDER             with the files of CIFAR-10 (binary version), MNIST or Fashion-MNIST
  FILE.npy FILE.npz  vectors (N, D), signals (N, C, L), images (N, C, H, W) or volumes;
                     integers need --levels
  FILE.csv           a table with names in its first line: numbers, integers, categories"""

DEMO_HELP = """\
Trains a class-conditional score network on handwritten digits, draws new ones with five samplers,
each without guidance, with a classifier and classifier-free, judges them, and writes
results.json, digits.png and the model into DIR. With the default time it is done in about three
minutes on two CPU cores."""


TUNE_HELP = """\
Fits time grids and solvers to the model and stores them with it, where they beat the default on
trajectories that nothing was fitted to; `sample` and `evaluate` then use them. Takes some four
minutes for the model of the demo on one CPU core; --minutes 1 fits fewer trajectories. Other
numbers of --steps, --guidance and --eta still work, and gain less or nothing."""


SAMPLE_HELP = """\
Sample i is a function of the model, the seed and i. Samples are drawn in chunks (--chunk); under
torchrun or accelerate launch the chunks are cut among the processes, and the files are those of
one process. --out FOLDER writes each chunk as it is drawn: said again, the command goes on where
it was stopped, and with a larger --n it adds to what is there."""


EVALUATE_HELP = """\
Every number of the samples stands beside that of as many real data, against other real data: the
floor. Of digits, CIFAR-10 and MNIST these are the test images, of a toy new points, of other DATA
what the run of the model held out of them, else a half. It is said what they are to the model."""


RESTORE_HELP = """\
Draws from p(x | y), y = A(x) + noise: A are the operators below, in the order given (--blur 1
--downsample 2 first blurs), y is read from --data, x is what the model draws.

--data is one of
  FILE.npy FILE.npz  y, or one row for each of R observations; floats in the units of the model's
                     data, or integers, which are grey levels where the model has these. With
                     --mask last, whole arrays do too: what is hidden may be anything, or NaN
  IMAGE FOLDER       one image, or one observation an image; 256 grey levels

--noise is the standard deviation of the numbers as the file holds them: 10 is ten grey levels of
an image, 0.1 is a twentieth of the range of an array on [-1, 1]. Blurs and Fourier transforms
take x to go on periodically.

Written are mean, std, draws and chi_square, in the units of the model's data; by particles also
log_evidence with its standard_error, and ess, the effective number of particles at each step.
Particles are exact as their number and --steps grow; --method term is for many measurements, and
exact for Gaussian data alone."""


EXAMPLE = """\
for example:
  sde-gen train two_moons --steps 1000 --out moons
  sde-gen sample moons --n 1000 --out moons.npz
  sde-gen evaluate moons two_moons"""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="sde-gen",
        description="Score-based generative modelling with stochastic differential equations.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_train, _add_tune, _add_sample, _add_restore, _add_evaluate):
        add(commands)
    return top


def check(options: argparse.Namespace) -> None:
    """Raise ``ValueError`` where a number of things is none, a seed too long for torch, or a
    launcher has started what does not share its work."""
    if abs(options.seed) >= 2**62:
        raise ValueError(f"--seed must lie between -2^62 and 2^62, got {options.seed}")
    for name in ("batch", "channels", "chunk", "draws", "levels", "n", "particles", "steps"):
        given = getattr(options, name, None)
        for value in given if isinstance(given, list) else [given]:
            least = 2 if name == "particles" else 1
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
    if options.name in ("demo", "tune", "restore") and (n := place()[1]) > 1:
        raise ValueError(f"{options.name} runs in one process, the launcher started {n}")
    if getattr(options, "first", 0) < 0:
        raise ValueError(f"--first must be at least 0, got {options.first}")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    details: str = "",
) -> argparse.ArgumentParser:
    made = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(command=COMMANDS[name], name=name)
    made.add_argument("--config", metavar="FILE", help="options from a TOML file, by their names")
    return made


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, "demo", "train on digits, draw new ones, judge them", DEMO_HELP)
    add.add_argument("--minutes", type=float, default=1.25, help="of training (default: 1.25)")
    add.add_argument("--out", metavar="DIR", default="demo", help="where to write (default: demo)")
    add.add_argument("--seed", type=int, default=0, help="of training and sampling (default: 0)")


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, "train", "train a score network", DATA_HELP)
    _add_data(add)
    add.add_argument(
        "--kinds",
        metavar="NAME=KIND",
        nargs="+",
        default=[],
        help="what columns of a table are: continuous, positive, skewed, integer or category"
        " (default: said)",
    )
    add.add_argument("--out", metavar="DIR", required=True, help="where the model goes")
    add.add_argument("--steps", type=int, help="most steps (default: 10000 without --minutes)")
    add.add_argument("--minutes", type=float, help="most minutes")
    add.add_argument("--epochs", type=float, help="most times that each of the data is seen")
    add.add_argument("--batch", type=int, help="samples in a step (default: by data and device)")
    add.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    processes = ("vp", "subvp", "ve", "edm", "flow")
    add.add_argument("--sde", choices=processes, default="vp", help="process")
    add.add_argument("--channels", type=int, help="width of the network (default: by the data)")
    add.add_argument(
        "--latent",
        metavar="SHAPE",
        nargs="?",
        const="auto",
        help="train an autoencoder first, then the score of its latents: D or CxHxW (default: a"
        " quarter of the places, in 4 channels), each in half of the time",
    )
    add.add_argument("--flip", action="store_true", help="mirror images at random")
    _add_holdout(add)
    add.add_argument("--workers", type=int, help="processes that read images (default: by them)")
    held = add.add_mutually_exclusive_group()
    held.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    held.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    _add_common(add)


def _add_holdout(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--holdout",
        metavar="SHARE",
        type=float,
        help="of the data that is not trained on (default: 0.1 of 10 to 9999 data, else 0)",
    )
    add.add_argument(
        "--patience",
        metavar="RATIO",
        type=float,
        help="end when the loss on these has not fallen for so many times the steps that it took"
        " to fall (default: 1 of 10 to 9999 data, else 0: never)",
    )
    add.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        help="train anew on all data, what was held out too, as far as had the least loss on it"
        " (default: a table whose run has no --steps, --minutes or --epochs)",
    )


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, "tune", "fit the sampler to a trained model", TUNE_HELP)
    add.add_argument("model", metavar="MODEL", help="a folder that `train` or `demo` wrote")
    add.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[5, 10, 20],
        help="the numbers of network calls that samples will cost (default: 5 10 20)",
    )
    add.add_argument("--n", type=int, default=256, help="trajectories to fit to (default: 256)")
    add.add_argument("--minutes", type=float, help="take fewer, as many as so much time pays for")
    _add_common(add)


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(commands, "sample", "draw samples from a trained model", SAMPLE_HELP)
    add.add_argument("model", metavar="MODEL", help="a folder that `train` or `demo` wrote")
    add.add_argument(
        "--out",
        metavar="PATH",
        required=True,
        help=".png of images (a row a class) or signals, .npz of x and y (-1: no class), .csv of a"
        " table, or a folder, in chunks",
    )
    add.add_argument(
        "--format",
        choices=("npz", "png"),
        help="of a folder: x and y of each chunk, or a .png a sample (default: npz)",
    )
    add.add_argument("--n", type=int, default=100, help="how many (default: 100)")
    add.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    add.add_argument("--label", help="the class, by name or number (default: all in turn)")
    add.add_argument(
        "--guidance", type=float, default=0.0, help="classifier-free weight (default: 0, none)"
    )
    add.add_argument(
        "--eta", type=float, default=0.0, help="0: probability flow; 1: reverse-time SDE"
    )
    _add_sampling(add)


def _add_restore(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(
        commands, "restore", "draw what was measured from a trained model", RESTORE_HELP
    )
    add.add_argument("model", metavar="MODEL", help="a folder that `train` or `demo` wrote")
    add.add_argument("--data", required=True, help="what was measured: y")
    add.add_argument("--key", help="which array of a .npz")
    add.add_argument(
        "--noise", metavar="SIGMA", type=float, required=True, help="of y, in the units of --data"
    )
    for name, (metavar, text) in OPERATORS_HELP.items():
        add.add_argument(
            f"--{name}",
            metavar=metavar,
            action="append",
            dest="operators",
            default=[],
            type=partial(_named, name),
            help=text,
        )
    add.add_argument(
        "--out",
        metavar="PATH",
        required=True,
        help=".npz; of images also a .png of all, or a new folder of one .png each",
    )
    add.add_argument("--draws", type=int, default=16, help="of each observation (default: 16)")
    add.add_argument("--label", help="the class, by name or number (default: not known)")
    add.add_argument(
        "--method", choices=("particles", "term"), default="particles", help="(default: particles)"
    )
    add.add_argument(
        "--particles", type=int, default=600, help="of each observation (default: 600)"
    )
    add.add_argument("--steps", type=int, default=100, help="network calls (default: 100)")
    add.add_argument("--chunk", type=int, default=500, help="samples at once (default: 500)")
    _add_common(add)


OPERATORS_HELP = {
    "mask": ("FILE", "entries observed: a .npy of 0 and 1, or the white of an image"),
    "downsample": ("K", "means over K entries of each axis"),
    "blur": ("KERNEL", "convolution with a .npy, or the width of a Gaussian in pixels"),
    "matrix": ("FILE", "weighted sums: a .npy (m, n)"),
    "fourier": ("MASK", "frequencies observed: as for --mask, 0 first; complex or pairs"),
    "radon": ("N", "projections at N even angles on [0, pi)"),
}


def _named(name: str, text: str) -> tuple[str, str]:
    return name, text


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _command(
        commands,
        "evaluate",
        "compare samples of a model with real data",
        DATA_HELP + "\n\n" + EVALUATE_HELP,
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
    add.add_argument("--delimiter", default=",", help="of a .csv (default: a comma)")
    add.add_argument(
        "--grey", action="store_true", help="read images as grey (default: if all files are)"
    )
    add.add_argument(
        "--size",
        metavar="N",
        help="resize and crop images to N x N, or to HxW (needed where they have several sizes)",
    )
    add.add_argument(
        "--crop",
        choices=("centre", "random"),
        default="centre",
        help="which part of an image stays; random: another one whenever it is read"
        " (default: centre)",
    )


def _add_sampling(add: argparse.ArgumentParser) -> None:
    add.add_argument("--steps", type=int, default=25, help="network calls (default: 25)")
    add.add_argument("--chunk", type=int, default=500, help="samples at once (default: 500)")
    _add_common(add)


def _add_common(add: argparse.ArgumentParser) -> None:
    add.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add.add_argument("--seed", type=int, default=0, help="(default: 0)")
