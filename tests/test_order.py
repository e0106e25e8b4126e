"""The order of the data: permutations with random access."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import pytest
import torch
from scipy.stats import chi2

from sde_gen.data import order as order_module
from sde_gen.data.order import Order, permuted

SIZES = [1, 2, 3, 4, 5, 16, 97, 133, 1000, 4096, 4097, 5003, 60_000, 1_000_003]


@pytest.mark.parametrize("n", SIZES)
def test_every_epoch_holds_every_item_once(n):
    epochs = 1 if n > 10**6 else 2
    m = torch.arange(epochs * n) + 5 * n
    items = Order(n, seed=7)(m).reshape(epochs, n)
    every = torch.arange(n)
    for epoch in items:
        assert torch.equal(torch.bincount(epoch, minlength=n), torch.ones_like(every))
    if n > 4:
        # Two orders drawn at random agree at 1 place, give or take 1
        assert int((items[0] == items[-1]).sum()) < 8 or epochs == 1
        assert int((items[0] == every).sum()) < 8
    # Any place alone is the place in the whole, wherever an epoch begins.
    some = torch.randint(epochs * n, (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(Order(n, seed=7)(m[some]), items.flatten()[some])
    assert torch.equal(
        torch.cat([Order(n, seed=7)(part) for part in m[: 3 * (n // 4)].split(1 + n // 5)]),
        items.flatten()[: 3 * (n // 4)],
    )


def p_value(counts, expected, freedom, factor=1.0):
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()) * factor, freedom))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("sorts", [True, False])
def test_all_orders_of_a_few_items_are_as_likely(n, sorts, monkeypatch):
    if not sorts:  # the network, with the rounds that so small a one needs
        monkeypatch.setattr(order_module, "SORTED", 1)
        monkeypatch.setattr(order_module, "ROUNDS", 36)
    epochs = 3_000
    m = torch.arange(epochs * n)
    items = permuted(m % n, n, 11, m // n).reshape(epochs, n)
    places = torch.stack([(items == i).sum(0) for i in range(n)]).double()
    # The counts of a permutation matrix: their covariance is n / (n - 1) times a projection.
    assert p_value(places, epochs / n, (n - 1) ** 2, (n - 1) / n) > 1e-4
    first, second = items[:, 0], items[:, 1]
    pairs = torch.bincount(n * first + second, minlength=n * n).reshape(n, n).double()
    apart = pairs[~torch.eye(n, dtype=torch.bool)]
    assert p_value(apart, epochs / (n * (n - 1)), max(1, n * (n - 1) - 1)) > 1e-4
    if n <= 5:
        seen = Counter(map(tuple, items.tolist()))
        counts = torch.tensor([float(seen[p]) for p in permutations(range(n))])
        assert p_value(counts, epochs / len(counts), len(counts) - 1) > 1e-4


@pytest.mark.parametrize("n", [5003, 100_000])
def test_a_large_order_is_as_good_as_shuffled(n):
    cells, epochs = 16, 3
    counts = torch.zeros(cells, cells)
    near = torch.zeros(cells, cells)
    for epoch in range(epochs):
        i = torch.arange(n)
        items = permuted(i, n, 3, torch.full_like(i, epoch))
        cell = items * cells // n
        counts += torch.bincount(cells * (i * cells // n) + cell, minlength=256).reshape(16, 16)
        near += torch.bincount(cells * cell[:-1] + cell[1:], minlength=256).reshape(16, 16)
    # Places against items, and each item against the one that follows.
    expected = torch.outer(*[torch.bincount(torch.arange(n) * cells // n).double()] * 2) / n
    freedom = (cells - 1) ** 2
    assert 1e-4 < p_value(counts, epochs * expected, freedom) < 1 - 1e-4
    assert 1e-4 < p_value(near, epochs * expected * (n - 1) / n, freedom) < 1 - 1e-4


def test_orders_of_two_epochs_or_seeds_are_independent():
    n = 20_000
    i = torch.arange(n)
    keys = [(0, 0), (0, 1), (1, 0), (2**61, 0)]
    ranks = torch.stack([permuted(i, n, s, torch.full_like(i, e)) for s, e in keys]).double()
    r = torch.corrcoef(torch.cat([ranks, i[None].double()]))
    off = r[~torch.eye(5, dtype=torch.bool)].abs()
    assert float(off.max()) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize(("n", "share", "held"), [(10, 0.1, 1), (133, 0.1, 13), (3, 0.01, 1)])
def test_what_is_held_out_is_never_trained_on(n, share, held):
    order = Order(n, 5, share)
    assert order.trained == n - held
    assert len(order.held) == held
    m = torch.arange(3 * order.trained)
    seen = order(m).reshape(3, -1).sort(1).values
    assert torch.equal(seen, order.kept.expand(3, -1))
    assert sorted([*order.kept.tolist(), *order.held.tolist()]) == list(range(n))


def test_what_is_held_out_depends_on_seed_and_number_alone():
    held = set(Order(6000, 1, 0.1).held.tolist())
    assert held == set(Order(6000, 1, 0.1).held.tolist())
    assert held < set(Order(6000, 1, 0.2).held.tolist())
    # Of two seeds a tenth of a tenth: 60 items, give or take 7
    assert len(held & set(Order(6000, 2, 0.1).held.tolist())) < 60 + 5 * 7
    assert len(Order(6000, 1).held) == 0


def test_orders_refuse():
    with pytest.raises(ValueError, match="leaves none to train on"):
        Order(1, 0, 0.5)
    with pytest.raises(ValueError, match="holdout must be a number >= 0 and < 1"):
        Order(5, 0, 1.0)
    with pytest.raises(ValueError, match="items must be an integer >= 1"):
        Order(0)
