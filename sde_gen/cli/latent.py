"""``sde-gen train --latent``: an autoencoder, then a score of its latents, into one model.

Both runs keep their folders, ``autoencoder`` and ``score`` inside that of the model, so that
``--resume`` goes on with whichever was stopped; a score whose autoencoder went on begins anew.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .chosen import chosen
from .commands import LATENT, _network, _process
from .reading import Data, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..networks import Autoencoder
    from ..scores import Score
    from ..training import Recipe

AUTO = "auto"
"""The shape of latents that is chosen: a quarter of the places, in 4 channels."""
COMPONENTS = 3


def latent_shape(text: str, shape: Sequence[int]) -> tuple[int, ...]:
    """``16`` is a vector, ``4x7x7`` channels and places; ``auto`` goes by the data.

    >>> latent_shape("4x7x7", (1, 28, 28)), latent_shape("auto", (1, 28, 28))
    ((4, 7, 7), (4, 7, 7))
    """
    if text == AUTO:
        _, *places = shape
        small = tuple((n + 3) // 4 for n in places)  # halved twice, rounding up
        return (4, *small) if places else (min(16, *shape),)
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--latent must be D or CxHxW, got {text}") from None


def train_latent(options: argparse.Namespace, data: Data, recipe: Recipe) -> None:
    """Both stages, each of them half of the steps, minutes or epochs."""
    from ..data import Flip
    from ..latent import Elbo, LatentModel
    from ..training import LossPlot, Trainer, pick_device, save, train
    from ..training.folder import holds_run

    if data.table is not None:
        raise ValueError("--latent is for vectors, signals and images, not for tables")
    folder, half = Path(options.out), _half(recipe)
    both: Any = {"recipe": half, "device": options.device, "callbacks": [LossPlot()]}
    both |= {"workers": options.workers}
    # What is mirrored at random, or read while it trains, is not encoded ahead.
    moves, transforms = options.flip or data.source is not None, [Flip()] if options.flip else []
    codec = _autoencoder(options, data)
    size = sum(p.numel() for p in codec.parameters())
    say(f"an autoencoder {codec.shape} -> {codec.latent} of {size:,} parameters (--latent)")
    first = Trainer(
        codec,
        data.items if moves else data.x,
        objective=Elbo(),
        transform=transforms,
        folder=folder / LATENT,
        overwrite=options.overwrite,
        **both,
    )
    if options.resume and holds_run(folder / LATENT):
        first.resume()
    before, codec = first.step, first.run()
    blank = Data(torch.zeros(1, *codec.latent), data.y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = _network(blank, options.channels)
    model = LatentModel.of(codec, net, _process(options.sde), data.x, classes=data.classes)
    say(chosen(net, options.batch, pick_device(options.device).type))
    both["folder"] = folder / "score"
    # Of an autoencoder that was trained further the latents are others.
    both["resume"] = options.resume and first.step == before
    both["overwrite"] = not both["resume"]
    if moves:
        model = train(model, data.items, transform=transforms, **both)
    else:
        codes = model.codes(data.x.to(model.device)).cpu()
        model = model.over(cast("Score", train(cast(Any, model.score), codes, data.y, **both)))
    save(model, folder)


def _half(recipe: Recipe) -> Recipe:
    """Half of the steps, minutes and epochs."""
    steps = None if recipe.steps is None else max(1, recipe.steps // 2)
    halves = {n: v and v / 2 for n in ("minutes", "epochs") if (v := getattr(recipe, n))}
    return replace(recipe, steps=steps, **halves)


def _autoencoder(options: argparse.Namespace, data: Data) -> Autoencoder:
    from ..networks import Autoencoder

    shape = tuple(data.x.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return Autoencoder(
            shape,
            latent_shape(options.latent, shape),
            options.channels or (128 if len(shape) == 1 else 32),
            levels=data.levels,
            components=None if data.levels is None else COMPONENTS,
        )
