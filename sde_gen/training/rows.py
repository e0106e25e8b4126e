"""Which samples a model was trained on: a hash of each of them, in a file beside the model."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from torch import Tensor

from .checkpoints import CheckpointError, write

ROWS = "trained_on.bin"


def hashes(x: Tensor) -> np.ndarray:
    """64 bits of BLAKE2b of each sample in float32, (N, *D) -> (N,) uint64.

    Equal samples have equal hashes; of M pairs of others M / 2^64 are expected to.
    """
    rows = x.detach().cpu().float().reshape(len(x), -1) + 0.0  # -0 becomes 0
    bits = (blake2b(row, digest_size=8).digest() for row in rows.numpy())
    return np.frombuffer(b"".join(bits), dtype="<u8")


def remember(x: Tensor | Iterable[Tensor], folder: Path) -> None:
    """Write the hashes of the samples, or of parts of them, into the folder, after a checksum;
    where there are none, no file stays there."""
    parts = [hashes(part) for part in ([x] if isinstance(x, Tensor) else x)]
    if not parts:
        (folder / ROWS).unlink(missing_ok=True)
        return
    found = np.unique(np.concatenate(parts)).tobytes()
    write(folder / ROWS, lambda file: file.write_bytes(_checksum(found) + found))


def count_known(x: Tensor, folder: Path) -> int | None:
    """How many of the samples equal one that was remembered; None where the folder has no file.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = folder / ROWS
    if not file.exists():
        return None
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    found = content[8:]
    if len(content) % 8 or content[:8] != _checksum(found):
        raise CheckpointError(f"{file} is damaged: delete it, or train the model again")
    return int(np.isin(hashes(x), np.frombuffer(found, dtype="<u8")).sum())


def _checksum(content: bytes) -> bytes:
    return blake2b(content, digest_size=8).digest()
