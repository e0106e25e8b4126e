"""In which order a run sees its data: permutations with random access, from a seed alone.

Sample m of a run that trains on n items belongs to epoch e = m // n and is item pi_e(m mod n) of
them, pi_e a keyed permutation of 0 .. n - 1. Few items are sorted by random words. Of many, pi_e
is a Feistel network on pairs (u, v), u < a, v < b, with a b >= n,

    u <- (u + F_r(v)) mod a,    v <- (v + F_r(u)) mod b,    in turn,

each step of which can be undone, whatever F_r is; a pair that names no item (u b + v >= n) goes
through it again until it does ("cycle walking"), which keeps it a permutation. With a and b next
to sqrt(n) a share of at most 1 / sqrt(n) goes twice. Black & Rogaway 2002, "Ciphers with
arbitrary finite domains", sections 3 and 5.

So any place of any epoch is known at once, in no memory: where a run stopped, how many processes
share it and how many workers read for it do not enter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..noise.philox import hashed, philox_words, signed
from ..ops import as_integer, check_count, set_number

SORTED = 4096
"""The most items that are sorted: there it is the faster way, and every order is as likely."""
ROUNDS = 12
_LOW = 0xFFFFFFFF


def permuted(i: Tensor, n: int, seed: int, epoch: Tensor | None = None, name: str = "") -> Tensor:
    """pi(i) for places i in 0 .. n - 1, (B,) int64 -> (B,): integers alone, on any device.

    Args:
        i: places. n: how many there are.
        seed, epoch, name: the key: an integer, (B,) int64 (0 by default), and text.

    >>> permuted(torch.arange(5), 5, seed=0).sort().values
    tensor([0, 1, 2, 3, 4])
    """
    if len(i) == 0:
        return i
    epochs, which = [0], torch.zeros_like(i)
    if epoch is not None:
        found, which = epoch.unique_consecutive(return_inverse=True)
        epochs = found.tolist()
    stream = hashed(f"order {name}".encode())
    if n <= SORTED:
        return torch.stack([_sorted(seed, stream, e, n) for e in epochs]).to(i.device)[which, i]
    words = [philox_words(seed, range(e, e + 1), stream, ROUNDS) for e in epochs]
    return _walk(i, n, torch.cat(words).T.contiguous().to(i.device), which)


@lru_cache(maxsize=8)
def _sorted(seed: int, stream: int, epoch: int, n: int) -> Tensor:
    """The order of n random words."""
    return philox_words(seed, range(epoch, epoch + 1), stream, n)[0].argsort(stable=True)


def _walk(i: Tensor, n: int, keys: Tensor, which: Tensor) -> Tensor:
    """The network until it names an item: column ``which`` of the keys (rounds, E) for each."""
    found = _once(i, n, keys, which)
    while len(left := (found >= n).nonzero().flatten()):
        found[left] = _once(found[left], n, keys, which[left])
    return found


def _once(x: Tensor, n: int, keys: Tensor, which: Tensor) -> Tensor:
    """One pass of the network over numbers x < a b."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    u, v = x // b, x % b
    for r in range(0, len(keys), 2):
        one, other = (k if len(k) == 1 else k[which] for k in keys[r : r + 2])
        u = _add(u, _mixed(v, one), a)
        v = _add(v, _mixed(u, other), b)
    return u * b + v


def _add(u: Tensor, word: Tensor, a: int) -> Tensor:
    """(u + a word / 2^32) mod a for 32-bit words."""
    u = u + ((word * a) >> 32)
    return u - a * (u >= a)


def _mixed(x: Tensor, key: Tensor) -> Tensor:
    """32 bits of a number under a key: two products modulo 2^64, and a shift between them."""
    z = x * signed(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> 32)) * signed(0xD6E8FEB86659FD93)
    return (z >> 32) & _LOW


@dataclass(frozen=True)
class Order:
    """Which of N items each sample of a run is, and which items are held out of it.

    Which items are held out is a function of (seed, N), of how many of them alone their share
    decides: those of a smaller share are among those of a larger.

    Args:
        items: N.
        seed: of the run.
        holdout: the share that is held out, in [0, 1); at least one item where it is not 0.

    Raises:
        ValueError: no items, a share out of range, or one that leaves nothing to train on.

    >>> order = Order(10, seed=1, holdout=0.2)
    >>> train, held = order(torch.arange(8)), order.held
    >>> sorted([*train.tolist(), *held.tolist()]) == list(range(10))
    True
    """

    items: int
    seed: int = 0
    holdout: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.items, "items")
        if as_integer(self.seed) is None:
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        set_number(self, "holdout", least=0, below=1)
        if self.trained < 1:
            raise ValueError(
                f"holdout={self.holdout} of {self.items} items leaves none to train on"
            )

    @property
    def trained(self) -> int:
        """n, the number of items that the run trains on."""
        held = math.floor(self.holdout * self.items + 0.5)
        return self.items - (max(1, held) if self.holdout else 0)

    @property
    def held(self) -> Tensor:
        """The items that are held out, (N - n,) int64, in an order of their own."""
        return self._split(torch.arange(self.trained, self.items))

    @property
    def kept(self) -> Tensor:
        """The items that are trained on, (n,) int64, from the first to the last."""
        return self._split(torch.arange(self.trained)).sort().values

    def __call__(self, m: Tensor) -> Tensor:
        """The items (B,) of the samples m (B,) int64 >= 0, in 0 .. N - 1."""
        n = self.trained
        return self._split(permuted(m % n, n, self.seed, m // n))

    def _split(self, i: Tensor) -> Tensor:
        return permuted(i, self.items, self.seed, name="held out") if self.holdout else i
