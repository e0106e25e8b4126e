"""Where a model runs: this process's device, its generators, its place among processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..ops import as_device


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or the fastest kind that is there: CUDA, then MPS, then the CPU.

    Raises:
        ValueError: the name of no device.
        RuntimeError: a device that this machine, or this build of PyTorch, does not have.

    >>> sg.training.pick_device("cpu")
    device(type='cpu')
    """
    if device is None or (isinstance(device, str) and device == "auto"):
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((kind for kind, there in kinds.items() if there), "cpu"))
    found = as_device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device {device} was asked for, but PyTorch {torch.__version__} sees"
            f" {torch.cuda.device_count()} CUDA devices here: use cpu, or install a CUDA build"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError("device mps was asked for, but there is no Metal device here: use cpu")
    return found


def accelerator(device: torch.device | str | None = None) -> Any:
    """An ``accelerate.Accelerator`` where a launcher started several processes, else None.

    Args:
        device: its kind is taken; of several GPUs each process takes its own.

    Raises:
        ImportError: several processes without accelerate.
        RuntimeError: accelerate does not see them: each would train the whole by itself.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched < 2:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            "training in several processes needs accelerate: pip install 'sde-gen[train]'"
        ) from error
    # Without GPUs it sees no other processes unless it is told that CPUs are meant.
    made = Accelerator(cpu=pick_device(device).type == "cpu")
    if made.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate joins {made.num_processes} on"
            f" {made.device}: start one, or take device='cpu'"
        )
    return made


def seed_globally(device: torch.device, seed: int) -> None:
    """Seed the generators that layers draw from (dropout), of the host and of the device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def globals_kept(device: torch.device) -> Iterator[None]:
    """Give the global generators back as they were."""
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[_index(device)] if device.type == "cuda" else []):
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
