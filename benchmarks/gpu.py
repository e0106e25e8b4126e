"""What the library costs on a GPU: sampling beside the bare network, training, and who waits.

A U-Net on images of 32 x 32, in float32 (as PyTorch sets it up), bfloat16 (autocast, in which only
the network may be) and bfloat16 compiled. *Sampling*: time of a call of the sampler in units of a
call of the bare network, rounds interleaved, median of the ratios, by events of the device.
*Loop*: time of a step where the network costs nothing, microseconds. *Training*: images a second
of ``train`` beside a loop of plain PyTorch with the same network, batch and optimiser. *Waits*:
how often the host waits for the device in 20 steps, counted by PyTorch's own check.

    python benchmarks/gpu.py [--quick]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import _report
import torch
from _problems import HERE
from torch import Tensor

from sde_gen import VP, Exponential, Facts, Recipe, Score, ScoreNetwork, sample, train
from sde_gen.inverse import Matrix, Observation, particles
from sde_gen.networks import UNet

SHAPE, STEPS = (3, 32, 32), 20
CUDA = torch.device("cuda")
Run = Callable[[], object]


def model_of(width: int, compiled: bool = False) -> ScoreNetwork:
    """A fresh score network on the device, with facts of rank 32."""
    torch.manual_seed(0)
    net = UNet(SHAPE, width).to(CUDA).eval()
    data = torch.randn(256, *SHAPE).cumsum(-1) / 8
    facts = Facts.of(data, rank=32)
    run = torch.compile(net) if compiled else net
    return ScoreNetwork(run, VP(), facts=facts).to(CUDA)


def milliseconds(run: Run) -> float:
    """Of the device's clock."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def ratios(base: Run, runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median of time / time of ``base``, each beside its own base."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in (base, *runs.values()):
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            before, spent, after = milliseconds(base), milliseconds(run), milliseconds(base)
            found[name].append(2 * spent / (before + after))
    return {name: median(values) for name, values in found.items()}


def waits(run: Run) -> dict[str, int]:
    """How often the host waits for the device, and where."""
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


# --- sampling ----------------------------------------------------------------------------------


def sampling(precision: str, batch: int, width: int, rounds: int) -> dict[str, Any]:
    """Each sampler beside the network alone."""
    model = model_of(width, "compiled" in precision)
    half = torch.autocast("cuda", torch.bfloat16) if "bfloat16" in precision else nullcontext()
    x, c = torch.randn(batch, *SHAPE, device=CUDA), torch.zeros(batch, device=CUDA)
    seen = Observation(Matrix(torch.randn(10, x[0].numel()) / 8, SHAPE), torch.randn(10), 0.1)

    def network() -> None:
        with torch.no_grad(), half:
            for _ in range(STEPS):
                model.net(x, c)

    def ours(**more: Any) -> Run:
        def run() -> Tensor:
            with half:
                return sample(model, batch, STEPS, 0, device=CUDA, **more)

        return run

    def twisted() -> object:
        with half:
            return particles(model, seen, batch, STEPS, seed=0)

    runs: dict[str, Run] = {
        "Exponential(1)": ours(solver=Exponential(1, 0.25)),
        "default": ours(),
        "default, eta 1": ours(eta=1.0),
        "particles": twisted,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # collapsed: nothing is trained here
        found: dict[str, Any] = {"ratio": ratios(network, runs, rounds)}
        found["waits"] = {name: waits(run) for name, run in runs.items()}
    found["ms a call of the network"] = milliseconds(network) / STEPS
    return found


class Free(Score):
    """A score that costs nothing."""

    sde, facts = VP(), Facts(SHAPE, 0.5)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        return x


def loop(batch: int) -> dict[str, float]:
    """Microseconds a step of the loop alone, seen by the host."""
    found = {}
    for name, solver in (("Exponential(1)", Exponential(1, 0.25)), ("default", None)):
        spent = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            sample(Free(), batch, 100, 0, solver=solver, device=CUDA)
            torch.cuda.synchronize()
            spent.append((time.perf_counter() - start) / 100 * 1e6)
        found[name] = min(spent)
    return found


# --- training ----------------------------------------------------------------------------------


def plain(net: torch.nn.Module, x: Tensor, batch: int, steps: int, half: Any) -> None:
    """Denoising score matching as anybody writes it: noise prediction, Adam."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.9, 0.99))
    for _ in range(steps):
        x_0 = x[torch.randint(len(x), (batch,), device=CUDA)]
        log_snr = torch.randn(batch, 1, 1, 1, device=CUDA) * 2
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        z = torch.randn_like(x_0)
        with half:
            f = net(alpha * x_0 + sigma * z, log_snr.flatten())
        loss = (f.float() - z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def training(precision: str, batch: int, width: int, steps: int) -> dict[str, float]:
    """Images a second, ours and a plain loop."""
    x = torch.randn(4096, *SHAPE, device=CUDA).clamp(-1, 1)
    halved = "bfloat16" in precision
    half = torch.autocast("cuda", torch.bfloat16) if halved else nullcontext()
    model, other = (model_of(width, "compiled" in precision).train() for _ in range(2))

    def ours(n: int) -> object:
        recipe = Recipe(steps=n, batch=batch, autocast=halved)
        return train(model, x, recipe=recipe, device=CUDA, progress=False)

    def spent(run: Callable[[int], object], n: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(n)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def seconds(run: Callable[[int], object]) -> float:
        """Of ``steps`` steps, without what a run costs once."""
        run(5)
        return spent(run, steps + 10) - spent(run, 10)

    bare = seconds(lambda n: plain(other.net, x, batch, n, half))
    return {"images a second": batch * steps / seconds(ours), "plain loop": batch * steps / bare}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device: nothing is measured")
        return
    batch, width, rounds, steps = (64, 32, 3, 20) if args.quick else (256, 64, 5, 60)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "loop us": loop(batch)}
    for precision in ("float32", "bfloat16", "bfloat16 compiled"):
        result[precision] = sampling(precision, batch, width, rounds)
        result[precision]["training"] = training(precision, batch, width, steps)
        print(precision, result[precision], flush=True)
    names = list(result["float32"]["ratio"])
    _report.table(
        ["time of a call / bare network", *names, "waits", "training / plain loop"],
        [
            [
                key,
                *(f"{part['ratio'][n]:.2f}" for n in names),
                "/".join(str(sum(part["waits"][n].values())) for n in names),
                f"{part['training']['images a second'] / part['training']['plain loop']:.2f}",
            ]
            for key, part in result.items()
            if isinstance(part, dict) and "ratio" in part
        ],
    )
    content = {"versions": _report.versions(), "shape": SHAPE, "batch": batch, **result}
    _report.write_json(HERE / "results" / "gpu.json", content)


if __name__ == "__main__":
    main()
