"""Sources: whatever the items lie in, a run sees the same ones, and is the same run."""

from __future__ import annotations

import contextlib
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from trained import weights

import sde_gen as sg
from sde_gen.data.order import Order
from sde_gen.data.sources import Mapped, Memory, as_source, glance, read
from sde_gen.networks import MLP
from sde_gen.training import CheckpointError, Recipe, Trainer, TrainingError, train
from sde_gen.training.batches import Reader, Share

N = 50
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
RECIPE = Recipe(steps=24, batch=16)  # an epoch is 50 / 16 steps: no step begins one
OPTIONS = {"progress": False, "device": "cpu"}


class Pairs(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Named(Pairs):
    def __getitem__(self, i):
        return {"x": X[i].numpy(), "y": Y[i]}


class Jittered(Pairs):
    """Draws from every generator there is while it is read."""

    def __getitem__(self, i):
        shift = random.random() + np.random.rand()  # noqa: NPY002
        shift += float(torch.rand(()))
        return X[i] + shift, int(Y[i])


class Broken(Pairs):
    def __getitem__(self, i):
        if i == 17:
            raise OSError("the disk is on fire")
        return super().__getitem__(i)


def small(dropout: float = 0.1) -> sg.ScoreNetwork:
    torch.manual_seed(0)
    return sg.ScoreNetwork(MLP((2,), 8, 1, 3, dropout), sg.VP())


@pytest.fixture(scope="module")
def straight() -> torch.Tensor:
    return weights(train(small(), X, Y, RECIPE, **OPTIONS))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["pair", "Pairs", "Named"])
def test_a_run_is_the_same_wherever_its_data_lie(kind, workers, straight):
    data = {"pair": (X, Y), "Pairs": Pairs(), "Named": Named()}[kind]
    found = train(small(), data, recipe=RECIPE, workers=workers, **OPTIONS)
    assert torch.equal(weights(found), straight)


def test_a_mapped_file_is_read_where_it_lies(tmp_path):
    np.save(tmp_path / "x.npy", X.double().numpy())
    free = sg.ScoreNetwork(MLP((2,), 8, 1), sg.VP())
    start = {k: v.clone() for k, v in free.state_dict().items()}
    recipe = Recipe(steps=5, batch=16)
    found = []
    for data in (X, tmp_path / "x.npy", str(tmp_path / "x.npy"), np.load(tmp_path / "x.npy", "r")):
        free.load_state_dict(start)
        found.append(weights(train(free, data, recipe=recipe, **OPTIONS)))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert isinstance(as_source(tmp_path / "x.npy").array, np.memmap)


def test_what_an_item_draws_is_a_function_of_the_sample(straight):
    runs = [
        weights(train(small(), Jittered(), recipe=RECIPE, workers=w, **OPTIONS)) for w in (0, 1, 3)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], straight)
    random.seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    rows = read(Jittered(), [4, 4, 5], [0, 1, 0], seed=1)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    shift = (rows["x"] - X[[4, 4, 5]])[:, 0]
    assert shift[0] == pytest.approx(float(shift[2]), abs=1e-6)
    assert abs(shift[0] - shift[1]) > 1e-3


def same(x, noise):
    return x


@pytest.mark.parametrize(("kind", "workers"), [("pair", 0), ("Jittered", 0), ("Jittered", 2)])
def test_a_run_that_was_stopped_in_an_epoch_is_the_run(kind, workers, tmp_path):
    data = (X, Y) if kind == "pair" else Jittered()
    recipe = Recipe(steps=200, batch=16, save_every=1e9)
    options = OPTIONS | {"workers": workers}
    whole = weights(train(small(), data, recipe=recipe, transform=same, **options))

    def stop(x, noise):
        if noise.samples == 100 * 16:
            signal.raise_signal(signal.SIGINT)
        return x

    with pytest.raises(KeyboardInterrupt, match="stopped after step 101"):
        train(small(), data, recipe=recipe, transform=stop, folder=tmp_path, **options)
    options |= {"workers": 1 - bool(workers)}
    resumed = train(
        small(), data, recipe=recipe, transform=same, folder=tmp_path, resume=True, **options
    )
    assert torch.equal(weights(resumed), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_cannot_be_read_is_named(workers):
    model = small()
    with pytest.raises(TrainingError, match=r"item 17 of the data: the disk is on fire"):
        train(model, Broken(), recipe=Recipe(steps=9, batch=16), workers=workers, **OPTIONS)


class Uneven(Pairs):
    def __getitem__(self, i):
        return X[i] if i < 40 else X[i].double()[:1]


def test_bad_sources_are_refused_before_work():
    class Stream(IterableDataset):
        def __iter__(self):
            yield X[0]

    class Empty(Pairs):
        def __len__(self):
            return 0

    def has(item):
        return type("Own", (Pairs,), {"__getitem__": lambda self, i: item})()

    for data, error, words in [
        (Stream(), TypeError, "items by number, got the IterableDataset Stream"),
        (Empty(), ValueError, "of length 0"),
        (has((1, 2, 3)), ValueError, "item .* of the data: it must be x, .* got 3 parts"),
        (has({"y": 1}), ValueError, "it has no 'x'"),
        (has("text"), ValueError, "item .* of the data: TypeError"),
        (has(X[0]), ValueError, "the model has 3 classes: give labels"),
        (has((X[0], 3)), ValueError, r"labels must lie in 0 .. 2, got 3"),
        (has((X[0], 0.5)), TypeError, r"labels must be a torch.Tensor of int64"),
        (has((X[0, :1], 0)), ValueError, r"data must be \(N, 2\), got \(16, 1\)"),
        (has((X[0] / 0, 0)), ValueError, "NaN or infinite"),
        (has((Y[:2], 0)), TypeError, "floating point"),
        (Uneven(), ValueError, r"unlike each other: item \d+ is .*float32 \(2,\).*float64 \(1,\)"),
        ([1.0, 2.0], TypeError, "data must be a torch.Tensor"),
        ("nowhere.npy", FileNotFoundError, "no array file at nowhere.npy"),
    ]:
        with pytest.raises(error, match=words):
            Trainer(small(), data, device="cpu")
    with pytest.raises(ValueError, match="labels were given beside data, a Pairs"):
        Trainer(small(), Pairs(), Y, device="cpu")
    with pytest.raises(ValueError, match=r"labels were given beside a pair \(x, y\)"):
        Trainer(small(), (X, Y), Y, device="cpu")
    with pytest.raises(ValueError, match="workers must be an integer >= 0"):
        Trainer(small(), Pairs(), device="cpu", workers=-1)


class Observed(nn.Module):
    """A network that is given an observation beside the labels."""

    shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.linear = nn.Linear(3, 2)

    def forward(self, x, c, obs, y):
        self.seen.append((obs, y))
        return self.linear(torch.cat([x, obs], 1))


def test_what_items_hold_beside_x_reaches_the_network():
    class Whole(Pairs):
        def __getitem__(self, i):
            return {"x": X[i], "y": Y[i], "obs": X[i].sum(0, keepdim=True)}

    net = Observed()
    recipe = Recipe(steps=2, batch=16)
    train(sg.ScoreNetwork(net, sg.VP()), Whole(), recipe=recipe, **OPTIONS)
    items = Order(N)(torch.arange(16))
    obs, y = net.seen[0]
    assert torch.equal(obs[:, 0], X[items].sum(1))
    kept = y >= 0
    assert 8 < int(kept.sum()) < 16
    assert torch.equal(y[kept], Y[items][kept])


def test_levels_stay_bytes_until_they_are_on_the_device():
    k = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    facts = sg.Facts.of(sg.data.centre(k, 256), levels=256)
    net = sg.networks.UNet((1, 4, 4), 8, (1,), 1)
    model = sg.ScoreNetwork(net, sg.VP(), facts=facts)
    trainer = Trainer(model, k, device="cpu", recipe=Recipe(steps=1, batch=8))
    assert trainer.reader.source.x.dtype == torch.uint8
    items = Order(40)(torch.arange(8))
    assert torch.equal(trainer._batch(0, 8).x, sg.data.centre(k[items], 256))
    spread = sg.data.Dequantise(256)
    trainer = Trainer(model, k, transform=spread, device="cpu", recipe=Recipe(steps=1, batch=8))
    x = trainer._batch(0, 8).x
    assert torch.equal(sg.data.quantise(x, 256), k[items].long())
    assert not torch.equal(x, sg.data.centre(k[items], 256))
    with pytest.raises(ValueError, match=r"levels must lie in 0 .. 16"):
        Trainer(sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts(levels=17)), k, device="cpu")
    with pytest.raises(TypeError, match="floating point"):
        Trainer(sg.ScoreNetwork(net, sg.VP()), k, device="cpu")


def test_several_transforms_go_in_turn(straight):
    add, double = (lambda x, noise: x.add_(1)), (lambda x, noise: x.mul_(2))
    found = train(small(), X, Y, RECIPE, transform=(add, double), **OPTIONS)
    one = train(small(), X, Y, RECIPE, transform=lambda x, noise: 2 * (x + 1), **OPTIONS)
    assert torch.equal(weights(found), weights(one))
    with pytest.raises(TypeError, match="transform must be callable"):
        train(small(), X, Y, RECIPE, transform=(add, 3), **OPTIONS)


def test_a_share_is_followed_step_by_step():
    share, part = Share(24, rank=1, processes=3), range(8, 12)
    found = []
    for _ in range(5):
        found.append((part.start, part.stop))
        part = share.after(part)
    assert found == [(8, 12), (12, 16), (32, 36), (36, 40), (56, 60)]


def test_workers_answer_whatever_is_asked_for():
    reader = Reader(Pairs(), Order(N, 2), workers=1)
    memory = Reader(Memory(X, y=Y), Order(N, 2))
    share = Share(8)
    with contextlib.closing(reader):
        for first in (0, 8, 16, 40, 48, 0, 8):
            one, other = reader(first, 8, share), memory(first, 8, share)
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)


def test_epochs_are_steps():
    recipe = Recipe(epochs=2, batch=16, holdout=0.1).for_items(45)
    assert (recipe.steps, recipe.epochs) == (6, None)
    assert Recipe(epochs=2, steps=3, batch=16).for_items(45).steps == 3
    trainer = Trainer(small(), X, Y, Recipe(epochs=2, batch=10), device="cpu")
    seen = torch.cat([trainer.reader._items(range(10 * k, 10 * k + 10)) for k in range(10)])
    assert trainer.recipe.steps == 10
    assert (torch.bincount(seen) == 2).all()
    with pytest.raises(ValueError, match="epochs must be a number > 0"):
        Recipe(epochs=0)


@pytest.mark.parametrize("how", ["an item", "the number", "the precision", "in memory", "holdout"])
def test_other_data_are_refused_by_name(how, tmp_path):
    recipe = Recipe(steps=2, batch=8)
    train(small(), Pairs(), recipe=recipe, folder=tmp_path, **OPTIONS)
    again = train(small(), Pairs(), recipe=recipe, folder=tmp_path, resume=True, **OPTIONS)
    assert again is not None
    data, words = Pairs(), "data is "
    if how == "an item":
        items = {"__getitem__": lambda self, i: (X[i] + (i == 7) * 1e-6, int(Y[i]))}
        data = type("Own", (Pairs,), items)()
        words = r"data is '50 items, some of them float32 \(50, 2\), checksum .* there and '50 it"
    elif how == "the number":
        data, words = type("Own", (Pairs,), {"__len__": lambda self: 49})(), "there and '49 items"
    elif how == "the precision":
        items = {"__getitem__": lambda self, i: (X[i].half(), int(Y[i]))}
        data, words = type("Own", (Pairs,), items)(), "float16"
    elif how == "in memory":
        data = (X, Y)
    else:
        recipe, words = (
            Recipe(steps=2, batch=8, holdout=0.1),
            "recipe.holdout is 0.0 there and 0.1",
        )
    with pytest.raises(CheckpointError, match=words):
        train(small(), data, recipe=recipe, folder=tmp_path, resume=True, **OPTIONS)


def test_a_glance_takes_items_from_all_over():
    rows = glance(Pairs(), 20, seed=3)
    where = (rows["x"][:, None] == X).all(-1).nonzero()[:, 1]
    assert torch.equal(where, Order(N, 3)(torch.arange(20)))
    assert len(glance(Memory(X), 1000)["x"]) == N


def test_a_mapped_file_says_what_is_wrong(tmp_path: Path):
    (tmp_path / "bad.npy").write_bytes(b"nonsense")
    np.save(tmp_path / "none.npy", np.zeros((0, 2)))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    for name, words in {
        "bad.npy": "cannot map .*bad.npy",
        "none.npy": r"N >= 1",
        "text.npy": "holds <U1, expected numbers",
    }.items():
        with pytest.raises(ValueError, match=words):
            Mapped(tmp_path / name)
    with pytest.raises(ValueError, match="2 labels for 3 rows"):
        Mapped(tmp_path / "x.npy", torch.zeros(2))
