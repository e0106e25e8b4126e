"""What is held out: never trained on, looked at on fixed draws, and what ends a run."""

from __future__ import annotations

import signal
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import nn
from trained import weights

import sde_gen as sg
from sde_gen.data.order import Order
from sde_gen.networks import MLP
from sde_gen.training import Recipe, Trainer, load, train, validation

N = 40
X = torch.arange(float(N))[:, None].repeat(1, 2) / N
OPTIONS = {"progress": False, "device": "cpu"}


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))


def square(model, x, y, noise):
    return (model.p - x[:, 0]).square()


def test_the_loss_is_that_of_the_average_on_what_is_held_out():
    seen = []

    def watch(model, x, y, noise):
        if model.training:
            seen.append(x[:, 0] * N)
        return square(model, x, y, noise)

    recipe = Recipe(steps=35, batch=15, holdout=0.2, seed=3, lr=0.1)
    trainer = Trainer(Constant(), X, recipe=recipe, objective=watch, device="cpu")
    averages = {}
    take = trainer.validation.take

    def note(step, loss, average):
        averages[step] = float(average.p.detach())
        take(step, loss, average)

    trainer.validation.take = note
    trainer.run(progress=False)
    held = Order(N, 3, 0.2).held
    assert not torch.isin(torch.cat(seen).round().long(), held).any()
    assert [step for step, _ in trainer.validation.losses] == [10, 20, 30, 35]
    # 1,024 looks at 8 items in turn: each of them is looked at 128 times
    for step, loss in trainer.validation.losses:
        expected = (averages[step] - X[held, 0]).square().mean()
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_looks_are_as_far_apart_as_the_average_is_wide():
    trainer = Trainer(Constant(), X, recipe=Recipe(holdout=0.5), device="cpu", objective=square)
    due = [step for step in range(1, 1000) if trainer.validation.is_due(step)]
    assert due[:12] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 121]
    assert all(b - a == max(10, a // 10) for a, b in pairwise(due))
    never = Trainer(Constant(), X, recipe=Recipe(), device="cpu", objective=square)
    assert not any(never.validation.is_due(step) for step in range(200))


def test_the_draws_of_a_look_are_the_same_every_time():
    model = sg.ScoreNetwork(MLP((2,), 8, 1, None, 0.5), sg.VP())
    recipe = Recipe(steps=1, batch=100, holdout=0.2)
    jitter = lambda x, noise: x + noise.normal(x, "jitter")  # noqa: E731
    trainer = Trainer(model, X, recipe=recipe, transform=jitter, device="cpu")
    first = trainer.validation.loss(model)
    torch.rand(7)
    assert float(trainer.validation.loss(model)) == float(first)
    # Another batch cuts the same draws otherwise
    other = Trainer(model, X, recipe=Recipe(steps=1, batch=333, holdout=0.2), transform=jitter)
    assert float(other.validation.loss(model)) == pytest.approx(float(first), rel=1e-5)
    assert model.training


def test_what_is_held_out_is_read_once_wherever_it_lies():
    class Items:
        read: ClassVar = []

        def __len__(self):
            return N

        def __getitem__(self, i):
            self.read.append(i)
            return X[i]

    recipe = Recipe(steps=25, batch=8, holdout=0.2)
    options = {"recipe": recipe, "objective": square, "device": "cpu"}
    memory = Trainer(Constant(), X, **options)
    disk = Trainer(Constant(), Items(), **options)
    for trainer in (memory, disk):
        trainer.run(progress=False)
    assert memory.validation.losses == disk.validation.losses
    held = Order(N, 0, 0.2).held
    once = sum(i in held for i in Items.read[16:])  # 16 were looked at before the run
    assert once == 1024


def tempting(seed: int) -> torch.Tensor:
    """What is trained on lies at 1, what is held out at 0.3: the mean of both is never seen."""
    x = torch.ones(N, 2)
    x[Order(N, seed, 0.2).held] = 0.3
    return x


def test_patience_ends_a_run_with_its_best_weights():
    recipe = Recipe(steps=5000, batch=8, lr=0.01, warmup=0.0, holdout=0.2, patience=1.0)
    trainer = Trainer(Constant(), tempting(0), recipe=recipe, objective=square, device="cpu")
    found = trainer.run(progress=False)
    best, loss = min(trainer.validation.losses, key=lambda look: look[1])
    assert best + 100 <= trainer.step < 400
    # Two looks are a tenth apart, and so is the average
    assert float(found.p.detach()) == pytest.approx(0.3, abs=0.05)
    assert loss == pytest.approx((float(found.p.detach()) - 0.3) ** 2, abs=1e-6)
    patient = train(
        Constant(),
        tempting(0),
        recipe=Recipe(steps=800, batch=8, lr=0.01, holdout=0.2),
        objective=square,
        **OPTIONS,
    )
    assert float(patient.p.detach()) == pytest.approx(1.0, abs=0.05)


def small() -> sg.ScoreNetwork:
    torch.manual_seed(0)
    return sg.ScoreNetwork(MLP((2,), 16, 1), sg.VP(), facts=sg.Facts.of(X))


def test_a_stop_changes_neither_the_looks_nor_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "SAMPLES", 128)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=3000, batch=128, lr=1e-2, holdout=0.2, patience=0.5)
    whole = Trainer(small(), x, recipe=recipe, device="cpu")
    straight = weights(whole.run(progress=False))
    assert 120 < whole.step < 3000

    def stop(x, noise):
        if noise.seed == 0 and noise.samples == 128 * 104:
            signal.raise_signal(signal.SIGINT)
        return x

    with pytest.raises(KeyboardInterrupt, match="after step 105"):
        train(small(), x, recipe=recipe, transform=stop, folder=tmp_path, **OPTIONS)
    options = {"recipe": recipe, "transform": lambda x, noise: x, "folder": tmp_path}
    again = Trainer(small(), x, device="cpu", **options)
    again.resume()
    resumed = weights(again.run(progress=False))
    assert again.validation.losses == whole.validation.losses
    assert again.step == whole.step
    assert torch.equal(resumed, straight)
    assert torch.equal(weights(load(tmp_path)), straight)
    # It is over: taken up again it takes no step.
    over = train(small(), x, resume=True, progress=False, device="cpu", **options)
    assert torch.equal(weights(over), straight)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    running = torch.cat([v.flatten() for v in state["average"].values()])
    assert not torch.equal(running, straight)


def test_recipes_of_what_is_held_out_are_checked():
    with pytest.raises(ValueError, match=r"patience watches .* give holdout too"):
        Recipe(patience=1.0)
    with pytest.raises(ValueError, match="holdout must be a number >= 0 and < 1, got 1"):
        Recipe(holdout=1)
    with pytest.raises(ValueError, match="leaves none to train on"):
        Trainer(small(), X[:1], recipe=Recipe(holdout=0.5), device="cpu")
