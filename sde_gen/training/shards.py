"""Weights that are spread over processes (FSDP2): each holds a part of every tensor.

What acts entry by entry (an average, a copy) works on the part that lies here, ``local``, and so
costs no word with the others; ``whole`` gathers, and every process must then call it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread the parameters over all processes, gathered block by block where they are used.

    A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    for block in dict.fromkeys(block for blocks in lists for block in blocks):
        if next(block.parameters(), None) is not None:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def asks_for_shards() -> bool:
    """Whether ``accelerate launch --use_fsdp`` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def unsynchronised(model: nn.Module) -> AbstractContextManager[object]:
    """Gradients stay with this process in here, where there is something to be saved by that."""
    wait = getattr(model, "no_sync", None)
    return nullcontext() if wait is None else wait()


def is_part(t: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(t, "full_tensor")


def local(t: Tensor) -> Tensor:
    """The part that lies here, in the same memory."""
    here: Any = t
    return here.to_local() if is_part(t) else t


def whole(t: Any) -> Any:
    """The tensor itself, gathered if need be; what is no tensor as it is."""
    return t.detach().full_tensor() if is_part(t) else t


def like(value: Tensor, t: Tensor) -> Tensor:
    """A whole value, spread as t is; no process asks another."""
    if not is_part(t):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(t, DTensor)
    value = value.detach().to(t.device)
    return distribute_tensor(value, t.device_mesh, t.placements, src_data_rank=None)
