"""What a user waits for: a sample of a network, by `sample` left alone, by a sweep, by diffusers.

One network that costs what networks cost (1.1 M parameters on 28 x 28 images, or diffusers' own
`UNet2DModel` of about that size), weights at random: the time does not depend on them. For each:

*sweep*: `sample` at every size of a part and in every layout, `Pace(chunk, channels_last,
compiled)`. *sample*: at the pace that `timed` chose, and what that choice took. *network*: the
bare network, called as often at the best pace of the sweep. *diffusers*: its `DDIMPipeline` at all
at once, the same network, number of calls and samples, beside `sample` with `ddim()`.

Everything runs in turns, in one process; the least of the turns counts. Seconds are those of the
clock, or of this process (`--clock cpu`, on a machine that is not one's own).

    python benchmarks/wall_time.py [--quick] [--n N] [--calls N] [--turns N] [--device D]
                                   [--clock wall|cpu] [--compiled] [--only ours|diffusers]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _report
import torch
from torch import nn

import sde_gen as sg
from sde_gen.networks import UNet
from sde_gen.sampling import Pace, timed

HERE = Path(__file__).parent
SHAPE = (1, 28, 28)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def ours() -> sg.ScoreNetwork:
    """A network of the house."""
    torch.manual_seed(0)
    facts = sg.Facts(shape=SHAPE, std=0.6)
    return sg.ScoreNetwork(UNet(SHAPE, 32, (1, 2, 2), 1), sg.VP(), facts=facts).eval()


def theirs() -> tuple[sg.ScoreNetwork, Any]:
    """A network of diffusers as a score, and the pipeline that it is of."""
    import diffusers

    torch.manual_seed(0)
    blocks = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    net = diffusers.UNet2DModel(
        sample_size=SHAPE[1],
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        down_block_types=blocks,
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).eval()
    pipeline = diffusers.DDIMPipeline(net, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    facts = sg.Facts(shape=SHAPE, std=0.6)
    return sg.scores.from_diffusers(pipeline, facts=facts), pipeline


class Stopwatch:
    """The least time of each of several things, done in turns."""

    def __init__(self, clock: str, device: torch.device, turns: int) -> None:
        self.now, self.device, self.turns = CLOCKS[clock], device, turns

    def seconds(self, jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Of each job, by its name."""
        least: dict[str, float] = {}
        for _ in range(self.turns):
            for name, job in jobs.items():
                start = self._clock()
                job()
                spent = self._clock() - start
                least[name] = min(spent, least.get(name, spent))
        return least

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now()


def drawn(model: sg.ScoreNetwork, pace: Pace, n: int, calls: int, **options: Any) -> None:
    """n samples at a pace."""
    model.pace = pace
    sg.sample(model, n, calls, seed=0, device=model.device, **options)


@torch.no_grad()
def called(model: sg.ScoreNetwork, pace: Pace, n: int, calls: int) -> None:
    """The bare network, as often and in parts of the same size."""
    x = pace.lay(torch.zeros(n, *SHAPE, device=model.device))
    level = torch.zeros(n, device=model.device)
    net: nn.Module = model.net
    for part in range(0, n, pace.part(n)):
        rows = slice(part, part + pace.part(n))
        for _ in range(calls):
            net(x[rows], level[rows])


def measured(
    model: sg.ScoreNetwork, pipeline: Any, watch: Stopwatch, options: argparse.Namespace
) -> dict[str, Any]:
    """The times of one network, microseconds a sample and call."""
    n, calls, device = options.n, options.calls, model.device.type
    start = watch.now()
    chosen = timed(model, options.compiled)
    choice = watch.now() - start
    sizes = [c for c in (8, 16, 32, 64, 128, 256, 512) if c < n]
    sizes = sizes[-5::2] if options.quick else sizes
    layouts = [(last, built) for last in (False, True) for built in {False, options.compiled}]
    paces = [Pace(c, last, built, device) for last, built in layouts for c in [*sizes, n]]
    jobs: dict[str, Callable[[], object]] = {
        str(pace): partial(drawn, model, pace, n, calls) for pace in paces
    }
    jobs["sample"] = partial(drawn, model, chosen, n, calls)
    if pipeline is not None:
        ddim = sg.solvers.ddim()
        jobs["sample, ddim"] = partial(drawn, model, chosen, n, calls, solver=ddim)
        jobs["diffusers"] = partial(
            pipeline, batch_size=n, num_inference_steps=calls, output_type="np"
        )
    found = watch.seconds(jobs)
    best = min(paces, key=lambda pace: found[str(pace)])
    if pipeline is None:
        found |= watch.seconds({"network": partial(called, model, best, n, calls)})
    micro = {name: 1e6 * seconds / (n * calls) for name, seconds in found.items()}
    return {
        "times": micro,
        "chosen": str(chosen),
        "choice": choice,
        "best": str(best),
        "ratio": found["sample"] / found[str(best)],
    }


def main() -> None:
    """Measure, print, write."""
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--n", type=int)
    ask.add_argument("--calls", type=int)
    ask.add_argument("--turns", type=int)
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    ask.add_argument("--compiled", action="store_true")
    ask.add_argument("--only", choices=("ours", "diffusers"))
    ask.add_argument("--out", type=Path, default=HERE / "results" / "wall_time.json")
    options = ask.parse_args()
    options.n = options.n or (64 if options.quick else 256)
    options.calls = options.calls or (3 if options.quick else 10)
    options.turns = options.turns or (2 if options.quick else 3)
    watch = Stopwatch(options.clock, torch.device(options.device), options.turns)
    warnings.simplefilter("ignore")
    models: dict[str, tuple[sg.ScoreNetwork, Any]] = {}
    if options.only != "diffusers":
        models["ours"] = ours(), None
    if options.only != "ours":
        try:
            models["diffusers"] = theirs()
        except ImportError as error:
            print(f"diffusers is left out: {error}")
    results = {}
    for name, (model, pipeline) in models.items():
        found = results[name] = measured(model.to(options.device), pipeline, watch, options)
        print(f"\n{name}: {options.n} samples, {options.calls} calls, us a sample and call")
        rows = sorted(found["times"].items(), key=lambda item: item[1])
        _report.table(["", "us"], [[what, f"{us:.0f}"] for what, us in rows])
        print(
            f"chosen in {found['choice']:.1f} s: {found['chosen']}, {found['ratio']:.2f} times the"
            f" best of the sweep ({found['best']})"
        )
    settings = {k: getattr(options, k) for k in ("n", "calls", "turns", "device", "clock")}
    settings["threads"] = torch.get_num_threads()
    content = {"versions": _report.versions(), "settings": settings, "results": results}
    _report.write_json(options.out, content)


if __name__ == "__main__":
    main()
