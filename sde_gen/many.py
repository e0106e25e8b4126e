"""Work on numbered samples, cut among processes so that nothing depends on their number.

Samples are numbered, and their noise is a function of their number. So whoever draws the samples
i .. j draws what one process would have drawn, but for rounding, which depends on the size of the
batch. Here the *chunks* are fixed: chunk c holds the samples c K .. (c + 1) K - 1, whoever takes
it, and process r of R takes those with c mod R = r. On one kind of device the result is the
same bit for bit.

A launcher (``torchrun``, ``accelerate launch``) tells each process its place in the environment;
without one there is one process, and nothing else changes.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch import distributed as dist

from .ops import check_count, shown

__all__ = ["agree", "chunks", "own_device", "place", "shared"]

Work = Callable[[int, int], Tensor]
"""(number of the first sample, how many) -> a tensor (how many, *D)."""


def place() -> tuple[int, int]:
    """The rank of this process and the number of processes, (0, 1) without a launcher.

    Raises:
        RuntimeError: the environment says something that is no rank.

    >>> from sde_gen import many
    >>> many.place()
    (0, 1)
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if size == "1" else "")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise RuntimeError(
            f"the launcher says RANK = {rank!r}, WORLD_SIZE = {size!r}: expected 0 <= rank < size"
        )
    return int(rank), int(size)


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs each takes the one of its LOCAL_RANK.

    >>> from sde_gen import many
    >>> many.own_device(torch.device("cpu"))
    device(type='cpu')
    """
    if device != torch.device("cuda") or place()[1] == 1:  # with an index it is somebody's choice
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def chunks(n: int, size: int) -> Iterator[tuple[int, int]]:
    """The chunks of this process, each as (first, count), in their order.

    >>> list(chunks(10, 4))
    [(0, 4), (4, 4), (8, 2)]
    """
    n, size = check_count(n, "n"), check_count(size, "chunk")
    rank, processes = place()
    for first in range(rank * size, n, processes * size):
        yield first, min(size, n - first)


def shared(work: Work, n: int, chunk: int) -> Tensor:
    """work(0, K), work(K, K), ... of n samples in chunks of K, as one tensor (n, *D) on the CPU.

    Every process gets the whole, and computes its own chunks alone.

    Args:
        work: what is done with the samples first .. first + count - 1; called in every process.
        n: how many samples.
        chunk: K, the samples at once: the rounding of a result depends on it, and on nothing else.

    Raises:
        ValueError: n or K below 1; ``work`` returned another number of rows than it was asked for.
        RuntimeError: another process has failed.

    >>> from sde_gen import VP, Gaussian, sample
    >>> law = Gaussian(VP(), torch.zeros(2), 0.5)
    >>> x = shared(lambda i, k: sample(law, k, 5, seed=0, first=i), n=10, chunk=4)
    >>> x.shape
    torch.Size([10, 2])
    """
    before = _cut.set(True)
    try:
        own = [_checked(work(i, k), k).cpu() for i, k in chunks(n, chunk)]
    finally:
        _cut.reset(before)
    processes = place()[1]
    if processes == 1:
        return torch.cat(own)
    parts = _gathered(own)
    count = -(-n // chunk)
    return torch.cat([parts[c % processes][c // processes] for c in range(count)])


_cut: ContextVar[bool] = ContextVar("cut", default=False)


def cutting() -> bool:
    """Whether this is asked inside the work of ``shared``: what is timed there, and depends on the
    clock, would differ among processes."""
    return _cut.get()


def agree(check: Callable[[], object]) -> None:
    """Let the first process check something that the others may change; all wait for it, and what
    it raises, an OSError or a ValueError, is raised in all: none goes on alone, and none waits for
    one that has ended.

    >>> from sde_gen import many
    >>> many.agree(lambda: None)
    """
    rank, processes = place()
    if processes == 1:
        check()
        return
    found: list[Exception | None] = [None]
    try:
        if rank == 0:
            check()
    except (OSError, ValueError) as error:
        found = [error]
    dist.broadcast_object_list(found, src=0, group=hosts())
    if found[0] is not None:
        raise found[0]


def _checked(x: Tensor, count: int) -> Tensor:
    if tuple(getattr(x, "shape", ())[:1]) != (count,):
        raise ValueError(f"work must return {count} rows, as it was asked for, got {shown(x)}")
    return x


def _gathered(own: list[Tensor]) -> list[list[Tensor]]:
    """What each process has."""
    parts: list[list[Tensor]] = [[] for _ in range(place()[1])]
    dist.all_gather_object(parts, own, hosts())
    return parts


_groups: list[dist.ProcessGroup] = []


def hosts() -> dist.ProcessGroup:
    """All processes, talking from host to host; joined by the first call, left at exit."""
    if not dist.is_initialized():
        _groups.clear()
        dist.init_process_group("gloo")
    if not _groups:
        _groups.append(dist.new_group(backend="gloo"))
        atexit.register(_leave)
    return _groups[0]


def _leave() -> None:
    """End gloo's threads while the interpreter lives: one that lets go of a tensor as it is torn
    down aborts the process, whose work was done (pytorch/pytorch, pull request 179291). Not after
    an error, nor NCCL's: the others may be elsewhere, and to leave may wait for them."""
    own = _groups.pop() if _groups else None
    if own is not None and dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group(None if dist.get_backend() == "gloo" else own)
