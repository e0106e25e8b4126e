"""Random words and normals as functions of numbers: Philox4x64 in counter mode."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import torch
from torch import Tensor

from ..ops import on_host

_LOW = 0xFFFFFFFF
_WORD = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of the unsigned product of int64 tensors a and a constant m."""
    a_low, a_high = a & _LOW, (a >> 32) & _LOW
    m_low, m_high = m & _LOW, m >> 32
    low, mid, cross = a_low * m_low, a_high * m_low, a_low * m_high
    carry = ((low >> 32) & _LOW) + (mid & _LOW) + (cross & _LOW)
    high = a_high * m_high + ((mid >> 32) & _LOW) + ((cross >> 32) & _LOW) + (carry >> 32)
    return high, a * signed(m)


def philox(
    counter: Tensor, key: tuple[int, int], rounds: int = 10, second: Tensor | None = None
) -> Tensor:
    """Philox4x64 on counters (n,) int64 -> words (n, 4) int64.

    ``counter`` is the low word of the counter, ``second`` (n,) the next; the others are 0.

    Integer tensor operations only: the same bits on every device, and one kernel under
    ``torch.compile``. Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as
    easy as 1, 2, 3".

    >>> sg.noise.philox(torch.arange(3), (0, 0)).shape
    torch.Size([3, 4])
    """
    c_0, c_2 = counter, torch.zeros_like(counter)
    c_1, c_3 = c_2 if second is None else second, c_2
    for r in range(rounds):
        k_0, k_1 = (signed(k + r * w) for k, w in zip(key, _WEYL, strict=True))
        high_0, low_0 = _multiply(c_0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(c_2, _MULTIPLIERS[1])
        c_0, c_1, c_2, c_3 = high_1 ^ c_1 ^ k_0, low_1, high_0 ^ c_3 ^ k_1, low_0
    return torch.stack([c_0, c_1, c_2, c_3], -1)


def _philox_host(start: int, count: int, key: tuple[int, int], second: int = 0) -> Tensor:
    """The same words for the counters start .. start + count - 1, by numpy's C implementation."""
    # numpy advances the counter before it draws.
    before = (start - 1 + ((second & _WORD) << 64)) % (1 << 256)
    words = np.random.Philox(counter=before, key=key[0] | key[1] << 64).random_raw(4 * count)
    return torch.from_numpy(words.view(np.int64)).reshape(count, 4)


def philox_normal(
    seed: int, samples: Tensor | range, stream: int, size: int, name: int | Tensor = 0
) -> Tensor:
    """Standard normals (len(samples), size), float32, a function of (seed, sample, stream, name).

    Box-Muller on 31-bit uniforms: no value lies beyond 6.7 standard deviations. On a CPU a run of
    consecutive samples is one call of numpy's Philox; elsewhere tensors make the same bits.

    Args:
        seed, stream: the two 64-bit words of the key.
        samples: the samples' numbers, a range (CPU) or int64 (B,).
        size: how many numbers for each sample.
        name: the second word of the counter, for all samples or int64 (B,), one for each.
    """
    key = (seed & _WORD, stream & _WORD)
    blocks = -(-size // 8)
    if isinstance(name, int) and isinstance(samples, range):
        words = _philox_host(samples.start * blocks, len(samples) * blocks, key, name)
    elif isinstance(samples, range):
        raise TypeError("a name for each sample needs the samples as a tensor")
    elif isinstance(name, int) and on_host(samples.device):
        runs = [_philox_host(i * blocks, blocks, key, name) for i in samples.tolist()]
        words = torch.cat(runs) if runs else torch.empty(0, 4, dtype=torch.int64)
    else:
        counter = _counters(samples, blocks)
        if isinstance(name, int):
            second = torch.full_like(counter, signed(name))
        else:
            second = name.to(samples.device).expand(len(samples)).repeat_interleave(blocks)
        words = philox(counter, key, second=second)
    halves = words.view(torch.int32).reshape(len(samples), 2, 4 * blocks)
    return _box_muller(halves[:, 0], halves[:, 1]).flatten(1)[:, :size]


def philox_words(seed: int, samples: Tensor | range, stream: int, size: int) -> Tensor:
    """Random 64-bit words (len(samples), size), int64, a function of (seed, sample, stream)."""
    key, blocks = (seed & _WORD, stream & _WORD), -(-size // 4)
    if isinstance(samples, range):
        words = _philox_host(samples.start * blocks, len(samples) * blocks, key)
    else:
        words = philox(_counters(samples, blocks), key)
    return words.reshape(len(samples), 4 * blocks)[:, :size]


@torch.library.custom_op("sde_gen::counters", mutates_args=())
def _counters(samples: Tensor, blocks: int) -> Tensor:
    """The counters of the samples' blocks, (B,) -> (B * blocks,), as numbers in memory.

    Compilers keep such counts as a formula, which every round of Philox would write out twice
    again, 2^10 times in all. They do not look into this.
    """
    return (samples[:, None] * blocks + torch.arange(blocks, device=samples.device)).flatten()


@_counters.register_fake
def _(samples: Tensor, blocks: int) -> Tensor:
    return samples.new_empty(len(samples) * blocks)


def _box_muller(radius: Tensor, angle: Tensor) -> Tensor:
    """Two normals for each pair of 32-bit words: (B, n), (B, n) -> (B, 2, n)."""
    # Centred in their cells, the 31-bit uniforms stay positive: the logarithm is finite.
    u = (radius & 0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32)
    r = u.log_().mul_(-2.0).sqrt_()
    a = angle.float().mul_(2 * math.pi * 2.0**-32)
    return torch.stack([a.cos(), a.sin_()], 1).mul_(r.unsqueeze(1))


def size_of(x: Tensor) -> int:
    """Numbers in one sample of x (B, *D)."""
    return math.prod(x.shape[1:])


def hashed(name: bytes) -> int:
    """A 64-bit name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def name_of(*parts: float) -> int:
    """A 64-bit name for a tuple of numbers."""
    try:
        return hashed(struct.pack(f"<{len(parts)}d", *parts))
    except struct.error as error:
        raise TypeError(f"t, s and k must be numbers, got {parts}") from error


# What torch.compiler.assume_constant_result sets; the decorator itself would import the compiler.
name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
