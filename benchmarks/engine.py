"""What the training engine costs beside a loop of plain PyTorch, and what a layout gains.

Three networks on noise of their shape: that of MNIST (1.1 M parameters, batch 64), that of the
digits (0.2 M, batch 256) and a perceptron for the plane (batch 256). *Engine*: the time of a step
of a bare loop (noise prediction, clipped gradients, fused Adam, no average) over that of a step
of ``Trainer`` (which also averages the weights, keeps good ones, names its draws and watches for
NaN). *Layouts*: the time of a plain step of the MNIST network over that in each layout, and the
mean loss of the last of some steps of the digits network, from one start on the same draws. Turns
of a few steps are taken in alternation, each beside its own base, and the median of the ratios is
printed, of the processor's time of one thread, so that a busy machine does not spoil it.

    python benchmarks/engine.py [--quick] [--compiled]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import _report
import torch
from _problems import HERE
from torch import Tensor, nn

from sde_gen import VP, Facts, Recipe, ScoreNetwork, Trainer
from sde_gen.networks import MLP, UNet
from sde_gen.training import Layout

NETWORKS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "MNIST": (lambda: UNet((1, 28, 28), 32, (1, 2, 2), blocks=1, classes=10), 64, 2),
    "digits": (UNet.digits, 256, 10),
    "plane": (lambda: MLP((2,), 128, 3, classes=10), 256, 100),
}
"""Network, batch, and steps of a turn."""


def seconds(run: Callable[[], object]) -> float:
    """Of the processor, for this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def data_of(net: Any) -> tuple[Tensor, Tensor]:
    """Noise with labels, as many as are drawn anew in a few epochs."""
    x = torch.randn(2048, *net.shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    return x, torch.arange(2048) % 10


def engine(name: str, layout: Layout, steps: int) -> Callable[[], object]:
    """So many steps more of a run, whenever it is called."""
    make, batch, _ = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    x, y = data_of(net)
    recipe = Recipe(steps=100_000, batch=batch, layout=layout)
    trainer = Trainer(
        ScoreNetwork(net, VP(), facts=Facts(net.shape, 1.0)), x, y, recipe, device="cpu"
    )

    def run() -> list[tuple[int, float]]:
        trainer.recipe = replace(recipe, steps=trainer.step + steps)
        trainer.run(progress=False)
        return trainer.history

    return run


def bare(name: str, steps: int) -> Callable[[], object]:
    """Denoising score matching as anybody writes it."""
    make, batch, _ = NETWORKS[name]
    torch.manual_seed(0)
    net: nn.Module = make().train()
    x, y = data_of(net)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.9, 0.99), fused=True)
    shape = (batch, *[1] * (x.ndim - 1))

    def run() -> None:
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,))
            log_snr = torch.randn(shape) * 2
            alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
            z = torch.randn_like(x[rows])
            f = net(alpha * x[rows] + sigma * z, log_snr.flatten(), y[rows])
            loss = (f - z).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

    return run


def ratio(base: Callable[[], object], other: Callable[[], object], turns: int) -> dict[str, Any]:
    """Time of the base over that of the other: median and quartiles over the turns."""
    base(), other()
    found = []
    for _ in range(turns):
        before, spent, after = seconds(base), seconds(other), seconds(base)
        found.append(0.5 * (before + after) / spent)
    low, _, high = torch.tensor(found).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"ratio": median(found), "quartiles": [low, high]}


def final_loss(layout: Layout, steps: int) -> float:
    """Mean loss of the last half of the steps."""
    make, batch, _ = NETWORKS["digits"]
    torch.manual_seed(0)
    net = make()
    x, y = data_of(net)
    model = ScoreNetwork(net, VP(), facts=Facts(net.shape, 1.0))
    recipe = Recipe(steps=steps, batch=batch, layout=layout, every=1)
    trainer = Trainer(model, x.cumsum(-1) / 4, y, recipe, device="cpu")
    trainer.run(progress=False)
    losses = [loss for _, loss in trainer.history][steps // 2 :]
    return sum(losses) / len(losses)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: minutes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    turns, steps = (3, 20) if args.quick else (9, 200)
    result: dict[str, Any] = {"engine": {}, "layouts": {}}
    for name, (_, _, each) in NETWORKS.items():
        found = ratio(bare(name, each), engine(name, Layout(), each), turns)
        result["engine"][name] = found
        print(name, found, flush=True)
    layouts = [Layout(half=True), Layout(channels_last=True), Layout(True, True)]
    layouts += [Layout(compiled=True)] if args.compiled else []
    for layout in layouts:
        base = engine("MNIST", Layout(), 1)
        result["layouts"][str(layout)] = ratio(base, engine("MNIST", layout, 1), turns)
        print(layout, result["layouts"][str(layout)], flush=True)
    result["loss of the digits network"] = {
        str(layout): final_loss(layout, steps) for layout in (Layout(), *layouts[:3])
    }
    print(result["loss of the digits network"])
    _report.table(
        ["network", "bare loop / engine", "quartiles"],
        [
            [n, f"{r['ratio']:.3f}", "{:.3f} .. {:.3f}".format(*r["quartiles"])]
            for n, r in result["engine"].items()
        ],
    )
    _report.table(
        ["layout of the MNIST network", "plain / it", "quartiles"],
        [
            [n, f"{r['ratio']:.2f}", "{:.2f} .. {:.2f}".format(*r["quartiles"])]
            for n, r in result["layouts"].items()
        ],
    )
    content = {"versions": _report.versions(), "quick": args.quick, **result}
    _report.write_json(HERE / "results" / "engine.json", content)


if __name__ == "__main__":
    main()
