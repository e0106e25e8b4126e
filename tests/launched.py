"""One of several processes of a run, started by a launcher; rank 0 leaves what came out."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace

import torch

from sde_gen import VP, ScoreNetwork
from sde_gen.networks import MLP, UNet
from sde_gen.training import Recipe, Trainer

DATA = torch.randn(300, 2, generator=torch.Generator().manual_seed(7))
IMAGES = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
LABELS = torch.arange(300) % 3
RECIPE = Recipe(steps=50, batch=64, snapshots=1, save_every=1e-9)


def model_of(kind: str, dtype: torch.dtype) -> ScoreNetwork:
    torch.manual_seed(0)
    if kind == "unet":
        net = UNet((1, 8, 8), 8, (1, 1), blocks=1, width=16)
    else:
        net = MLP((2,), width=16, depth=2, classes=3)
    return ScoreNetwork(net.to(dtype), VP())


def trainer_of(folder: str, options: dict) -> tuple[Trainer, list[torch.Tensor]]:
    """As the options say, and what each of its steps drew: item, label, own draw, time."""
    kind, dtype = options["kind"], getattr(torch, options["dtype"])
    recipe = replace(RECIPE, **options["recipe"])
    drawn: list[torch.Tensor] = []

    def watch(x, noise):
        u = noise.spread(len(x))[:, None].to(x.dtype)
        drawn.append(torch.cat([x.flatten(1), noise.normal(x, "mine").flatten(1), u], 1))
        return x

    data, labels = (IMAGES, None) if kind == "unet" else (DATA, LABELS)
    trainer = Trainer(
        model_of(kind, dtype),
        data.to(dtype),
        labels,
        recipe,
        transform=watch,
        folder=folder,
        device="cpu",
        shard=options["shard"],
    )
    if options["resume"]:
        trainer.resume()
    drawn.clear()

    def stop(trainer, step, loss):
        if step == options["stop"]:
            trainer.save()
            raise Stopped

    trainer.callbacks.append(stop)
    return trainer, drawn


class Stopped(Exception):
    pass


def run(trainer: Trainer) -> None:
    """To its end, or to where it is to be stopped."""
    with suppress(Stopped):
        trainer.run(progress=False)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, their averages and moments, gathered; all processes must call it."""
    state = trainer._state()
    moments = state["optimizer"].values()
    return {
        **{name: flat(state[name].values()) for name in ("model", "average", "narrow")},
        "moments": flat(m["exp_avg"] for m in moments),
    }


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def main() -> None:
    folder, out, *texts = sys.argv[1:]
    for i, text in enumerate(texts):
        trainer, drawn = trainer_of(folder, json.loads(text))
        run(trainer)
        found = state_of(trainer)
        gathered = trainer.accelerator.gather(torch.stack(drawn).unsqueeze(0)).clone()
        if trainer.is_main:
            # (ranks, steps x parts, part of a batch, ...) -> (steps, batch, ...)
            parts = gathered.unflatten(1, (-1, trainer.recipe.accumulate))
            found["drawn"] = parts.transpose(0, 1).flatten(1, 3)
            torch.save(found, f"{out}.{i}")


if __name__ == "__main__":
    main()
