"""What the library costs on a GPU: sampling beside the bare network, training, and who waits.

Under eight minutes, each figure written as it comes; what no time is left for is named.

- *Agreement*: the largest difference between samples drawn on the GPU and on the CPU, in units of
  the data's deviation, without TF32: same seed, same noise.
- *Loop*: time of a step where the network costs nothing, microseconds.
- *Training*: images a second of ``train`` with the CIFAR-10 network of Ho et al. (2020, 35.7 M
  parameters), beside a loop of plain PyTorch with the same network, batch and optimiser, and
  beside the same loop with diffusers' ``UNet2DModel`` of the same size, where diffusers is there.
- *Sampling*: a U-Net of 64 channels on 256 images of 32 x 32. Time of a call of the sampler in
  units of a call of the bare network, rounds interleaved, median of the ratios, by events of the
  device; from it the steps a second and the share of the time outside the network.
- *Waits*: how often the host waits for the device in 20 steps, counted by PyTorch's own check.
- *Two GPUs*: images a second of ``train`` on two over that on one, where there are two.

The precisions are float32 (as PyTorch sets it up), bfloat16 (autocast, in which only the network
may be), bfloat16 compiled and, in sampling, bfloat16 in CUDA graphs (``reduce-overhead``).

    python benchmarks/gpu.py [--quick] [--minutes 7.5] [--only agreement loop ...] [--dry]

``--dry`` runs everything on the CPU, tiny, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import _report
import torch
from torch import Tensor, nn

import sde_gen
from sde_gen import VP, Exponential, Facts, Recipe, Score, ScoreNetwork, sample, train
from sde_gen.inverse import Matrix, Observation, particles
from sde_gen.networks import UNet
from sde_gen.training import Layout

HERE = Path(__file__).parent
SHAPE = (3, 32, 32)
Run = Callable[[], object]


class Size(NamedTuple):
    """How much is done, and where."""

    device: torch.device
    batch: int
    width: int
    steps: int
    rounds: int
    train_batch: int
    train_steps: int
    tiny: bool = False

    @property
    def cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def half(self, precision: str) -> AbstractContextManager[object]:
        """What the network runs in."""
        if "bfloat16" not in precision:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class Graphed(nn.Module):
    """A network compiled into CUDA graphs, whose output is copied out of their memory."""

    def __init__(self, net: nn.Module, size: Size) -> None:
        super().__init__()
        self.shape = SHAPE
        how = {"mode": "reduce-overhead"} if size.cuda else {"backend": "eager"}
        self.net = torch.compile(net, **how)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """The network."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.net(x, c).clone()


def prepared(net: nn.Module, precision: str, size: Size) -> nn.Module:
    """The network as the precision asks for it."""
    if "graphs" in precision:
        return Graphed(net, size)
    if "compiled" in precision:
        return torch.compile(net) if size.cuda else torch.compile(net, backend="eager")
    return net


def model_of(size: Size, precision: str = "float32") -> ScoreNetwork:
    """A fresh score network on the device, with facts of rank 32."""
    torch.manual_seed(0)
    net = UNet(SHAPE, size.width, (1, 2) if size.tiny else (1, 2, 2, 2)).to(size.device).eval()
    for p in net.parameters():  # which starts as nothing: its last convolution is 0
        p.data.add_(0.02 * torch.randn_like(p))
    data = torch.randn(256, *SHAPE).cumsum(-1) / 8
    facts = Facts.of(data, rank=32)
    return ScoreNetwork(prepared(net, precision, size), VP(), facts=facts).to(size.device)


def seconds(run: Run, size: Size) -> float:
    """By the device's own clock where it has one."""
    if not size.cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def ratios(base: Run, runs: dict[str, Run], size: Size) -> dict[str, float]:
    """Median of time / time of ``base``, each beside its own base."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in (base, *runs.values()):
        run()
    for _ in range(size.rounds):
        for name, run in runs.items():
            before, spent, after = (seconds(r, size) for r in (base, run, base))
            found[name].append(2 * spent / (before + after))
    return {name: median(values) for name, values in found.items()}


def waits(run: Run, size: Size) -> dict[str, int]:
    """How often the host waits for the device, and where."""
    if not size.cuda:
        return {}
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seen = [w for w in caught if "synchronizing CUDA" in str(w.message)]
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen))


# --- agreement and loop --------------------------------------------------------------------------


def agreement(size: Size) -> dict[str, float]:
    """The largest difference between the two devices, over the deviation of the samples."""
    few = size._replace(batch=8, width=min(size.width, 32))
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    found = {}
    try:
        here, there = (
            model_of(few._replace(device=torch.device(d))) for d in ("cpu", size.device)
        )
        there.load_state_dict(here.state_dict())
        for dtype in (torch.float32, torch.float64):
            models = [m.to(dtype) for m in (here, there)]
            for eta in (0.0, 1.0):
                a, b = (
                    sample(m, few.batch, few.steps, 0, eta=eta, dtype=dtype).cpu().double()
                    for m in models
                )
                found[f"{str(dtype)[6:]}, eta {eta:g}"] = float((a - b).abs().max() / a.std())
    finally:
        torch.backends.cudnn.allow_tf32 = kept
    return found


class Free(Score):
    """A score that costs nothing."""

    sde, facts = VP(), Facts(SHAPE, 0.5)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        return x


def loop(size: Size) -> dict[str, float]:
    """Microseconds a step of the loop alone, seen by the host."""
    found = {}
    for name, solver in (("Exponential(1)", Exponential(1, 0.25)), ("default", None)):
        spent = []
        for _ in range(2 if size.tiny else 5):
            wait(size)
            start = time.perf_counter()
            sample(Free(), size.batch, 100, 0, solver=solver, device=size.device)
            wait(size)
            spent.append((time.perf_counter() - start) / 100 * 1e6)
        found[name] = min(spent)
    return found


def wait(size: Size) -> None:
    """Until the device is done."""
    if size.cuda:
        torch.cuda.synchronize()


# --- sampling ----------------------------------------------------------------------------------


def sampling(precision: str, size: Size) -> dict[str, Any]:
    """Each sampler beside the network alone."""
    model, device, batch, steps = model_of(size, precision), size.device, size.batch, size.steps
    x, c = torch.randn(batch, *SHAPE, device=device), torch.zeros((), device=device)
    g = torch.Generator().manual_seed(0)
    a = torch.randn(10, x[0].numel(), generator=g) / 8
    seen = Observation(Matrix(a, SHAPE), torch.randn(10, generator=g), 0.1)

    def network() -> None:
        with torch.no_grad(), size.half(precision):
            for _ in range(steps):
                model.net(x, c)

    def ours(**more: Any) -> Run:
        def run() -> Tensor:
            with size.half(precision):
                return sample(model, batch, steps, 0, device=device, **more)

        return run

    def twisted() -> object:
        with size.half(precision):
            return particles(model, seen, batch, steps, seed=0)

    runs: dict[str, Run] = {
        "Exponential(1)": ours(solver=Exponential(1, 0.25)),
        "default": ours(),
        "default, eta 1": ours(eta=1.0),
        "particles": twisted,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # collapsed: nothing is trained here
        ratio = ratios(network, runs, size)
        spent = median(seconds(network, size) for _ in range(3)) / steps
        return {
            "ratio": ratio,
            "ms a call of the network": 1000 * spent,
            "steps a second": {name: 1 / (r * spent) for name, r in ratio.items()},
            "share outside the network": {name: 1 - 1 / r for name, r in ratio.items()},
            "waits": {name: waits(run, size) for name, run in runs.items()},
        }


# --- training ----------------------------------------------------------------------------------


def network_of(size: Size) -> UNet:
    """The CIFAR-10 network, or something tiny."""
    torch.manual_seed(0)
    net = UNet(SHAPE, 16, (1, 2), blocks=1) if size.tiny else UNet.cifar10()
    return net.to(size.device).train()


def diffusers_of(size: Size) -> nn.Module | None:
    """diffusers' network of the same widths and places, called as ours are."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None
    widths = (32, 64) if size.tiny else (128, 256, 256, 256)
    attends = [False, *[True] * (not size.tiny), *[False] * (len(widths) - 1 - (not size.tiny))]
    net = UNet2DModel(
        sample_size=SHAPE[-1],
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=[f"{'Attn' * a}DownBlock2D" for a in attends],
        up_block_types=[f"{'Attn' * a}UpBlock2D" for a in reversed(attends)],
    )

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return net(x, c, return_dict=False)[0]

    return Called().to(size.device).train()


def plain(net: nn.Module, x: Tensor, batch: int, steps: int, half: Any) -> None:
    """Denoising score matching as anybody writes it: noise prediction, Adam."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, betas=(0.9, 0.99), fused=True)
    for _ in range(steps):
        x_0 = x[torch.randint(len(x), (batch,), device=x.device)]
        log_snr = torch.randn(batch, 1, 1, 1, device=x.device) * 2
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        z = torch.randn_like(x_0)
        with half:
            f = net(alpha * x_0 + sigma * z, log_snr.flatten())
        loss = (f.float() - z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def training(precision: str, size: Size) -> dict[str, float]:
    """Images a second: ours, a plain loop, and that loop with diffusers' network."""
    x = torch.randn(4 * size.train_batch, *SHAPE, device=size.device).clamp(-1, 1)
    batch, steps = size.train_batch, size.train_steps
    layout = Layout("bfloat16" in precision, compiled="compiled" in precision and size.cuda)

    def ours(net: nn.Module) -> Callable[[int], object]:
        model = ScoreNetwork(net, VP(), facts=Facts(SHAPE, 0.5))

        def run(n: int) -> object:
            recipe = Recipe(steps=n, batch=batch, lr=2e-4, layout=layout)
            return train(model, x, recipe=recipe, device=size.device, progress=False)

        return run

    def bare(net: nn.Module) -> Callable[[int], object]:
        return lambda n: plain(net, x, batch, n, size.half(precision))

    def rate(run: Callable[[int], object]) -> float:
        """Of ``steps`` steps, without what a run costs once."""
        run(3)
        spent = []
        for n in (3, steps + 3):
            wait(size)
            start = time.perf_counter()
            run(n)
            wait(size)
            spent.append(time.perf_counter() - start)
        return batch * steps / (spent[1] - spent[0])

    found = {
        "ours": rate(ours(network_of(size))),
        "plain loop": rate(bare(prepared(network_of(size), precision, size))),
    }
    other = diffusers_of(size)
    if other is not None:
        found["diffusers"] = rate(bare(prepared(other, precision, size)))
    return found


_RANK = """
import json, os, sys, time, torch
from sde_gen import VP, Facts, Recipe, ScoreNetwork, train
from sde_gen.networks import UNet
from sde_gen.training import Layout
torch.manual_seed(0)
batch, steps, tiny = (int(v) for v in sys.argv[2:])
net = UNet((3, 32, 32), 16, (1, 2), blocks=1) if tiny else UNet.cifar10()
model = ScoreNetwork(net, VP(), facts=Facts((3, 32, 32), 0.5))
x, spent = torch.randn(512, 3, 32, 32), []
for n in (3, 3, steps + 3):
    start = time.perf_counter()
    whole, layout = batch * int(os.environ["WORLD_SIZE"]), Layout(half=not tiny)
    recipe = Recipe(steps=n, batch=whole, lr=2e-4, layout=layout)
    train(model, x, recipe=recipe, device="cpu" if tiny else "cuda", progress=False)
    spent.append(time.perf_counter() - start)
if os.environ["RANK"] == "0":
    json.dump(spent[2] - spent[1], open(sys.argv[1], "w"))
"""


def two(size: Size) -> dict[str, float] | str:
    """Images a second of two processes over one, each with its own device."""
    if size.cuda and torch.cuda.device_count() < 2:
        return "one device: not measured"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder) / "rank.py", Path(folder) / "seconds.json"
        script.write_text(_RANK)
        for n in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={n}", str(script), str(out)]
            command += [str(v) for v in (size.train_batch, size.train_steps, int(size.tiny))]
            house = str(Path(sde_gen.__file__).parents[1])
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": house})
            found[n] = n * size.train_batch * size.train_steps / json.loads(out.read_text())
    return {"one": found[1], "two": found[2], "two / one": found[2] / found[1]}


# --- the command ---------------------------------------------------------------------------------

EAGER = ("float32", "bfloat16")
COMPILED = ("bfloat16 compiled", "bfloat16 graphs")
PARTS: dict[str, Callable[[Size], object]] = {
    "agreement": agreement,
    "loop us": loop,
    **{f"training, {p}": partial(training, p) for p in EAGER},
    **{f"sampling, {p}": partial(sampling, p) for p in EAGER},
    "two devices": two,
    # Compilers take a minute each.
    **{f"sampling, {p}": partial(sampling, p) for p in COMPILED},
    "training, bfloat16 compiled": partial(training, "bfloat16 compiled"),
}
FAULTS = (
    *(ArithmeticError, AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError),
    subprocess.CalledProcessError,
)


def measure(size: Size, minutes: float, only: list[str] | None, path: Path) -> dict[str, Any]:
    """Every part that there is time for; a fault in one is its figure."""
    name = torch.cuda.get_device_name() if size.cuda else "CPU: a dry run, no figures"
    versions = _report.versions()
    found: dict[str, Any] = {"versions": versions, "device": name, **size._asdict()}
    found["device"] = name
    start = time.perf_counter()
    for part, run in PARTS.items():
        if only and not any(part.startswith(o) for o in only):
            continue
        began = time.perf_counter() - start
        if began > 60 * minutes:
            found[part] = "no time was left"
        else:
            try:
                found[part] = run(size)
            except FAULTS as error:
                found[part] = f"{type(error).__name__}: {str(error)[:300]}"
        spent = time.perf_counter() - start - began
        print(f"[{began + spent:.0f} s] {part}: {json.dumps(found[part])}", flush=True)
        found.setdefault("seconds", {})[part] = spent
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def tell(found: dict[str, Any]) -> None:
    """Two tables: sampling and training."""
    parts = {k[10:]: v for k, v in found.items() if k.startswith("sampling, ")}
    parts = {k: v for k, v in parts.items() if isinstance(v, dict)}
    if parts:
        names = list(next(iter(parts.values()))["ratio"])
        print("\ntime of a call / bare network (steps a second)\n")
        _report.table(
            ["", *names, "waits"],
            [
                [
                    key,
                    *(f"{p['ratio'][n]:.2f} ({p['steps a second'][n]:.0f})" for n in names),
                    "/".join(str(sum(p["waits"][n].values())) for n in names),
                ]
                for key, p in parts.items()
            ],
        )
    parts = {k[10:]: v for k, v in found.items() if k.startswith("training, ")}
    parts = {k: v for k, v in parts.items() if isinstance(v, dict)}
    if parts:
        print("\ntraining, images a second\n")
        _report.table(
            ["", "ours", "plain loop", "ours / plain", "diffusers"],
            [
                [
                    key,
                    f"{p['ours']:.0f}",
                    f"{p['plain loop']:.0f}",
                    f"{p['ours'] / p['plain loop']:.2f}",
                    f"{p['diffusers']:.0f}" if "diffusers" in p else "absent",
                ]
                for key, p in parts.items()
            ],
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, for no figures")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no part starts")
    parser.add_argument("--only", nargs="+", help="parts whose names begin so")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/gpu.json)")
    args = parser.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        print("gpu.py: torch sees no CUDA device: nothing is measured (--dry runs on the CPU)")
        return
    if args.dry:
        size = Size(torch.device("cpu"), 2, 8, 4, 1, 4, 3, tiny=True)
    else:
        n = (64, 32, 20, 3, 64, 15) if args.quick else (256, 64, 20, 3, 128, 40)
        size = Size(torch.device("cuda"), *n)
    default = HERE / "results" / ("cache/gpu_dry.json" if args.dry else "gpu.json")
    found = measure(size, args.minutes, args.only, args.out or default)
    tell(found)
    print(f"\nwrote {args.out or default}")


if __name__ == "__main__":
    main()
