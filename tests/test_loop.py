"""The loop: parts of a batch, optimisers, averages, layouts, callbacks, and what a run leaves."""

from __future__ import annotations

import copy
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trained import at, weights

from sde_gen import VP, Facts, ScoreNetwork
from sde_gen.networks import MLP, UNet
from sde_gen.ops import check_state
from sde_gen.training import (
    CheckpointError,
    Denoising,
    Drawings,
    Layout,
    Logged,
    LossPlot,
    Recipe,
    Trainer,
    average_of,
    layout,
    learning_rate_test,
    load,
    read_history,
    snapshots,
    train,
)
from sde_gen.training.recipe import power_of_width

STATE, BEFORE = "training.pt", "training.before.pt"
DATA = torch.randn(300, 2, generator=torch.Generator().manual_seed(7)).double()
LABELS = torch.arange(300) % 3
QUIET = {"progress": False, "device": "cpu"}
RECIPE = Recipe(steps=40, batch=64)


def small(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> ScoreNetwork:
    torch.manual_seed(0)
    net = MLP((2,), width=16, depth=1, dropout=dropout, classes=3).to(dtype)
    return ScoreNetwork(net, VP())


def image_model() -> ScoreNetwork:
    torch.manual_seed(0)
    return ScoreNetwork(UNet((1, 8, 8), 8, (1, 1), blocks=0, width=16), VP())


IMAGES = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in parts of the largest weight."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def straight() -> torch.Tensor:
    return weights(train(small(), DATA, LABELS, RECIPE, **QUIET))


# --- parts of a batch -----------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_same_step(parts, straight):
    found = train(small(), DATA, LABELS, replace(RECIPE, accumulate=parts), **QUIET)
    assert off(weights(found), straight) < 1e-12
    assert not torch.equal(weights(found), straight)


def test_the_parts_hold_the_samples_of_the_batch():
    def drawn(parts: int) -> list[torch.Tensor]:
        seen = []

        def watch(model, x, y, noise):
            more = noise.normal(x, "mine"), noise.spread(len(x))[:, None], y[:, None]
            seen.append(torch.cat([x, *more], 1))
            return Denoising()(model, x, y, noise)

        recipe = Recipe(steps=3, batch=24, accumulate=parts)
        train(small(), DATA, LABELS, recipe, objective=watch, **QUIET)
        assert {len(part) for part in seen} == {24 // parts}
        return torch.cat(seen)

    assert torch.equal(drawn(3), drawn(1))


def test_parts_may_change_when_a_run_is_taken_up(straight, tmp_path):
    def stop():
        raise KeyboardInterrupt

    often = replace(RECIPE, save_every=1e-9)
    options = {"folder": tmp_path, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        train(small(), DATA, LABELS, often, transform=at(23, stop), **options)
    parts = replace(RECIPE, accumulate=4)
    found = train(small(), DATA, LABELS, parts, resume=True, **options)
    assert off(weights(found), straight) < 1e-12


def test_dropout_of_a_part_is_that_of_its_first_sample():
    seen = []

    def watch(model, x, y, noise):
        seen.append(torch.rand(3))
        return Denoising()(model, x, y, noise)

    train(small(), DATA, LABELS, Recipe(steps=2, batch=8, accumulate=2), objective=watch, **QUIET)
    trainer = Trainer(small(), DATA, LABELS, Recipe(batch=8), device="cpu")
    with torch.random.fork_rng(devices=[]):
        for first, found in zip((0, 4, 8, 12), seen, strict=True):
            trainer._seed_dropout(first)
            assert torch.equal(torch.rand(3), found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 3}, "64 does not divide by 1 processes times 3 parts"),
        ({"snapshots": 2}, "snapshots need a folder"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Trainer(small(), DATA, LABELS, replace(RECIPE, **options), device="cpu")


# --- optimisers -----------------------------------------------------------------------------


def two_groups(parameters):
    biases = [p for p in parameters if p.ndim == 1]
    others = [p for p in parameters if p.ndim > 1]
    groups = [{"params": others}, {"params": biases, "lr": 1e-3, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, 4e-3, weight_decay=0.1)


def momentum(parameters):
    return torch.optim.SGD(parameters, 0.02, momentum=0.9, nesterov=True)


OPTIMIZERS = {
    "AdamW in groups": two_groups,
    "momentum": momentum,
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_is_taken_up_bit_for_bit(name, tmp_path):
    options = {"optimizer": OPTIMIZERS[name], **QUIET}
    whole = weights(train(small(dropout=0.1), DATA, LABELS, RECIPE, **options))

    def stop():
        raise KeyboardInterrupt

    often = replace(RECIPE, save_every=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train(
            small(dropout=0.1),
            DATA,
            LABELS,
            often,
            transform=at(23, stop),
            folder=tmp_path,
            **options,
        )
    found = train(
        small(dropout=0.1), DATA, LABELS, RECIPE, folder=tmp_path, resume=True, **options
    )
    assert torch.equal(weights(found), whole)


def test_each_group_follows_the_curve_from_its_own_peak():
    seen = []

    def watch(trainer, step, loss):
        seen.append([group["lr"] for group in trainer.optimizer.param_groups])

    recipe = Recipe(steps=8, batch=16, every=1, warmup=0.25)
    options = {"optimizer": two_groups, "callbacks": [watch], **QUIET}
    train(small(), DATA, LABELS, recipe, **options)
    middles = [(k + 0.5) / 8 for k in range(8)]
    curve = [
        p / 0.25 if p < 0.25 else (1 + math.cos(math.pi * (p - 0.25) / 0.75)) / 2 for p in middles
    ]
    assert seen == [pytest.approx([4e-3 * c, 1e-3 * c]) for c in curve]


# --- averages of another width --------------------------------------------------------------


def exact_weights(width: float, steps: int) -> torch.Tensor:
    """(steps,): what the average holds of each step's weights, from its recursion."""
    power, held = power_of_width(width) + 1, torch.zeros(steps, dtype=torch.float64)
    for k in range(1, steps + 1):
        w = 1 - (1 - 1 / k) ** power
        held *= 1 - w
        held[k - 1] = w
    return held


@pytest.mark.parametrize("width", [0.03, 0.1, 0.25])
def test_a_profile_is_what_the_recursion_holds(width):
    found = snapshots.profile(width, 50, torch.arange(51.0))
    torch.testing.assert_close(found, exact_weights(width, 50), rtol=1e-10, atol=1e-13)
    coarse = snapshots.profile(width, 50, torch.tensor([0.0, 7, 20, 50, 60]))
    sums = [part.sum() for part in exact_weights(width, 50).split([7, 13, 30])]
    torch.testing.assert_close(coarse, torch.stack([*sums, torch.tensor(0.0).double()]))


@pytest.fixture(scope="module")
def snapped(tmp_path_factory):
    """A run with snapshots, and the weights after each of its steps."""
    folder, path = tmp_path_factory.mktemp("snapped"), []
    recipe = Recipe(steps=200, batch=16, every=1, snapshots=20, lr=1e-2)
    options = {"folder": folder, "callbacks": [lambda t, k, loss: path.append(weights(t.model))]}
    train(small(), DATA, LABELS, recipe, **options, **QUIET)
    return folder, torch.stack(path)


@pytest.mark.parametrize("width", [0.05, 0.06, 0.08, 0.1, 0.15, 0.2])
def test_an_average_of_any_width_is_made_afterwards(width, snapped):
    folder, path = snapped
    found = average_of(folder, width)
    direct = exact_weights(width, 200) @ path
    # The profiles differ by so much in sum, and the weights of two steps by at most `travel`.
    stored = [(k, w) for k in range(10, 201, 10) for w in (0.1, 0.05)]
    parts, rest = snapshots.coefficients(stored, width, 200)
    held = sum(
        c * nn.functional.pad(exact_weights(w, k), (0, 200 - k))
        for c, (k, w) in zip(parts.tolist(), stored, strict=True)
    )
    left = (held - exact_weights(width, 200)).abs().sum()
    torch.testing.assert_close(rest, left, rtol=1e-6, atol=1e-9)
    travel = (path - path[-1]).abs().max()
    assert (weights(found) - direct).abs().max() <= 1.0001 * left * travel + 1e-9
    assert left < (1e-6 if width in (0.05, 0.1) else 0.03)
    assert not found.training
    assert found.tuned is None


def test_an_average_of_constant_weights_is_these_weights():
    parts, _ = snapshots.coefficients([(50, 0.1), (50, 0.05), (100, 0.1)], 0.2, 100)
    assert float(parts.sum()) == pytest.approx(1, abs=1e-12)


def test_snapshots_after_the_checkpoint_are_dropped(snapped, tmp_path):
    recipe = Recipe(steps=40, batch=16, every=1, snapshots=4)

    def stop():
        raise KeyboardInterrupt

    def names():
        return [int(f.stem) for f in sorted((tmp_path / "averages").iterdir())]

    options = {"folder": tmp_path, **QUIET}
    train(small(), DATA, LABELS, replace(recipe, steps=80), **options)
    assert names() == [20, 40, 60, 80]
    often = replace(recipe, save_every=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train(small(), DATA, LABELS, often, transform=at(15, stop), overwrite=True, **options)
    assert names() == [10]
    (tmp_path / "averages" / "000000017.safetensors").write_bytes(b"of a run that was killed")
    found = train(small(), DATA, LABELS, recipe, resume=True, **options)
    assert names() == [10, 20, 30, 40]
    torch.testing.assert_close(
        weights(average_of(tmp_path, 0.1)), weights(found), rtol=0, atol=1e-9
    )


def test_averages_that_are_missing_or_damaged_are_named(snapped, tmp_path):
    folder, _ = snapped
    train(small(), DATA, LABELS, Recipe(steps=2, batch=8), folder=tmp_path, **QUIET)
    with pytest.raises(CheckpointError, match=r"holds no averages: train with Recipe\(snapshots"):
        average_of(tmp_path, 0.1)
    with pytest.raises(ValueError, match="must lie in"):
        average_of(folder, 0.5)
    (tmp_path / "averages").mkdir()
    (tmp_path / "averages" / "000000002.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is damaged"):
        average_of(tmp_path, 0.1)


# --- layouts --------------------------------------------------------------------------------


class Recording(nn.Module):
    """A linear network that remembers in which dtype it was multiplied."""

    shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen: list[torch.dtype] = []

    def forward(self, x, c, y=None):
        out = self.linear(x)
        self.seen.append(out.dtype)
        return out


def test_half_precision_is_around_the_network_alone():
    net, outside = Recording(), []

    def watch(model, x, y, noise):
        outside.append((x @ x.T).dtype)
        losses = Denoising()(model, x, y, noise)
        assert losses.dtype == torch.float32
        return losses

    recipe = Recipe(steps=3, batch=8, layout=Layout(half=True))
    model = ScoreNetwork(net, VP())
    average = train(model, DATA.float(), recipe=recipe, objective=watch, **QUIET)
    assert set(net.seen) == {torch.bfloat16}
    assert set(outside) == {torch.float32}
    assert {p.dtype for p in average.parameters()} == {torch.float32}
    net.seen.clear()
    model(DATA[:2].float(), 0.5)
    assert net.seen == [torch.float32]


def test_a_copy_made_while_it_trains_computes_with_its_own_weights():
    seen = []

    def watch(trainer, step, loss):
        twin = copy.deepcopy(trainer.model)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        seen.append(float(twin.net(DATA[:4].float(), torch.zeros(4)).detach().abs().max()))

    recipe = Recipe(steps=2, batch=8, layout=Layout(half=True))
    train(ScoreNetwork(Recording(), VP()), DATA.float(), recipe=recipe, callbacks=[watch], **QUIET)
    assert seen == [0, 0]


@pytest.mark.parametrize("chosen", [Layout(channels_last=True), Layout(True, True)], ids=str)
def test_a_layout_is_kept_by_the_run_and_nothing_is_left_of_it(chosen, tmp_path):
    recipe = Recipe(steps=6, batch=8, layout=chosen, save_every=1e-9, every=1)

    def stop():
        raise KeyboardInterrupt

    seen = []

    def watch(model, x, y, noise):
        seen.append(model.net.input.weight.is_contiguous(memory_format=torch.channels_last))
        return Denoising()(model, x, y, noise)

    straight = weights(train(image_model(), IMAGES, recipe=recipe, objective=watch, **QUIET))
    assert seen == [True] * 6
    options = {"folder": tmp_path, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        train(image_model(), IMAGES, recipe=recipe, transform=at(3, stop), **options)
    # Taken up without a word of it, it computes as it did.
    model, again = image_model(), replace(recipe, layout=None)
    found = train(model, IMAGES, recipe=again, resume=True, **options)
    assert torch.equal(weights(found), straight)
    assert list(load(tmp_path).state_dict()) == list(image_model().state_dict())
    for module in (model, found):
        assert all(p.is_contiguous() for p in module.parameters())
        assert "forward" not in vars(module.net)
    other = replace(recipe, layout=Layout())
    with pytest.raises(CheckpointError, match=f"layout is {chosen} there and plain here"):
        train(image_model(), IMAGES, recipe=other, resume=True, **options)


def trial(times: dict[Layout, float], monkeypatch) -> list[Layout]:
    """Steps of the trial take the given seconds, by layout."""
    tried = []

    def seconds(self, chosen, repeats):
        tried.append(chosen)
        return times[chosen]

    monkeypatch.setattr(layout._Trial, "seconds", seconds)
    return tried


PLAIN, HALF, LAST = Layout(), Layout(half=True), Layout(channels_last=True)
BOTH, ALL = Layout(True, True), Layout(True, True, True)


@pytest.mark.parametrize(
    ("times", "steps", "taken", "tries"),
    [
        ({PLAIN: 0.5, HALF: 0.3, BOTH: 0.2}, 1000, BOTH, 4),
        ({PLAIN: 0.5, HALF: 0.49, LAST: 0.4}, 1000, LAST, 4),
        ({PLAIN: 0.5, HALF: math.inf, LAST: 0.49}, 1000, PLAIN, 4),
        ({PLAIN: math.inf, HALF: 0.3, BOTH: 0.4}, 1000, HALF, 4),
        # an hour: the compiler is asked too
        ({PLAIN: 0.5, HALF: 0.3, BOTH: 0.2, ALL: 0.1}, 7200, ALL, 5),
        # a short step, a short run
        ({PLAIN: 0.019}, 10**6, PLAIN, 2),
        ({PLAIN: 0.004}, 10**6, PLAIN, 1),
        ({PLAIN: 0.5}, 100, PLAIN, 2),
    ],
)
def test_what_pays_is_taken(times, steps, taken, tries, monkeypatch):
    tried = trial(times, monkeypatch)
    found, note = layout.choose(image_model(), 8, lambda seconds: steps, lambda value: value)
    assert found == taken
    assert len(tried) == tries
    assert bool(note) == (tries > 2)
    assert str(taken) in note or not note


def test_channels_last_is_for_convolutions_on_images(monkeypatch):
    tried = trial({PLAIN: 0.5, HALF: 0.49}, monkeypatch)
    model = small(torch.float32)
    assert layout.choose(model, 8, lambda seconds: 1000, lambda value: value)[0] == PLAIN
    assert tried == [PLAIN, PLAIN, HALF]


def test_a_trial_leaves_the_run_as_it_is(monkeypatch, tmp_path, capsys):
    recipe = Recipe(steps=4, batch=8)
    straight = train(image_model(), IMAGES, recipe=recipe, **QUIET)
    monkeypatch.setattr(layout, "SHORT", {"cpu": 0.0})
    monkeypatch.setattr(layout, "FEW", 1)
    monkeypatch.setattr(layout, "GAIN", 0.0)
    found = train(image_model(), IMAGES, recipe=recipe, folder=tmp_path, device="cpu")
    assert torch.equal(weights(found), weights(straight))
    shown = capsys.readouterr().err
    assert "the network computes plain; a step of it takes" in shown
    assert "s (bfloat16)" in shown
    assert "Recipe(layout=" in shown
    plain = {"half": False, "channels_last": False, "compiled": False}
    assert torch.load(tmp_path / STATE, weights_only=True)["layout"] == plain


def test_a_network_that_cannot_be_tried_stays_as_it_is():
    class Broken(nn.Module):
        shape = (2,)

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, c):
            raise IndexError("no")

    agree = lambda value: value  # noqa: E731
    for model in (
        ScoreNetwork(Broken(), VP()),
        ScoreNetwork(nn.Linear(2, 2), VP()),
        nn.Linear(2, 2),
        small(),
    ):
        assert layout.choose(model, 8, lambda seconds: 10**6, agree) == (Layout(), "")


def test_half_precision_learns_as_well():
    """Of the same draws, so that the means of the last losses differ by rounding alone: by 2^-9
    of what the network says, at most, against a loss of order one."""

    def last(chosen: Layout) -> float:
        torch.manual_seed(0)
        model = ScoreNetwork(MLP((2,), width=32, depth=1), VP())
        recipe = Recipe(steps=200, batch=64, every=1, layout=chosen)
        trainer = Trainer(model, DATA.float(), recipe=recipe, device="cpu")
        trainer.run(progress=False)
        losses = [loss for _, loss in trainer.history]
        return sum(losses[-50:]) / 50

    plain, half = last(PLAIN), last(HALF)
    assert half != plain
    assert half == pytest.approx(plain, rel=0.02)


@pytest.mark.slow
def test_a_compiled_run_is_taken_up_bit_for_bit(tmp_path):
    recipe = Recipe(steps=6, batch=8, layout=Layout(compiled=True), save_every=1e-9, every=1)

    def stop():
        raise KeyboardInterrupt

    straight = weights(train(image_model(), IMAGES, recipe=recipe, **QUIET))
    options = {"folder": tmp_path, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        train(image_model(), IMAGES, recipe=recipe, transform=at(3, stop), **options)
    found = train(image_model(), IMAGES, recipe=recipe, resume=True, **options)
    assert torch.equal(weights(found), straight)
    assert list(load(tmp_path).state_dict()) == list(image_model().state_dict())
    plain = train(image_model(), IMAGES, recipe=replace(recipe, layout=Layout()), **QUIET)
    assert off(straight, weights(plain)) < 1e-3


@pytest.mark.parametrize("value", ["auto", True, {"half": True}])
def test_a_layout_is_a_layout(value):
    with pytest.raises(TypeError, match="layout must be a Layout or None"):
        Recipe(layout=value)
    with pytest.raises(TypeError, match="half must be True or False"):
        Layout(half="yes")


# --- what is told ---------------------------------------------------------------------------


def test_callbacks_and_loggers_hear_every_look(tmp_path):
    heard, logged = [], []

    def log(values, step):
        logged.append((step, values))

    recipe = Recipe(steps=25, batch=16, every=10)
    callbacks = [lambda t, step, loss: heard.append((t.step, step, loss)), Logged(log)]
    trainer = Trainer(small(), DATA, LABELS, recipe, callbacks=callbacks, device="cpu")
    trainer.run(progress=False)
    assert [step for step, *_ in heard] == [1, 10, 20, 25]
    assert [(step, loss) for _, step, loss in heard] == trainer.history
    assert [step for step, _ in logged] == [1, 10, 20, 25]
    for (_, values), (_, loss) in zip(logged, trainer.history, strict=True):
        assert set(values) == {"loss", "norm", "rate", "samples"}
        assert values["loss"] == loss
        assert min(values["norm"], values["samples"]) > 0
    assert logged[-1][1]["rate"] == 0
    assert trainer.done


def test_the_norm_is_that_of_the_gradient_before_it_is_clipped():
    def steep(model, x, y, noise):
        return 3 * sum(p.sum() for p in model.parameters()) * torch.ones(len(x))

    seen = []
    recipe = Recipe(steps=1, batch=8)
    options = {"objective": steep, "callbacks": [lambda t, k, loss: seen.append(t.look.norm)]}
    train(small(), DATA, LABELS, recipe, **options, **QUIET)
    assert seen == pytest.approx([3 * math.sqrt(len(weights(small())))])


@pytest.mark.parametrize("bad", [3, [3], ["x"]])
def test_callbacks_are_functions(bad):
    with pytest.raises(TypeError, match="callbacks"):
        Trainer(small(), DATA, LABELS, RECIPE, callbacks=bad, device="cpu")
    with pytest.raises(TypeError, match="optimizer"):
        Trainer(small(), DATA, LABELS, RECIPE, optimizer="adam", device="cpu")


def test_the_history_is_a_table_beside_the_checkpoint(tmp_path):
    def stop():
        raise KeyboardInterrupt

    recipe = Recipe(steps=30, batch=16, save_every=1e-9)
    options = {"folder": tmp_path, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        train(small(), DATA, LABELS, recipe, transform=at(24, stop), **options)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0] == "step,loss,norm,rate,samples,validation"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "10", "20"]
    assert all(line.endswith(",") for line in lines[1:])
    with (tmp_path / "history.csv").open("a") as file:
        file.write("27,0.5,1,1,100,\n28,half a li")  # of steps that are lost
    trainer = Trainer(small(), DATA, LABELS, recipe, folder=tmp_path, device="cpu")
    trainer.resume()
    trainer.run(progress=False)
    found = read_history(tmp_path)
    assert [look.step for look in found] == [1, 10, 20, 21, 30]
    assert [step for step, _ in trainer.history] == [1, 10, 20, 21, 30]
    assert [look.loss for look in found] == pytest.approx(
        [x for _, x in trainer.history], rel=1e-5
    )
    train(small(), DATA, LABELS, Recipe(steps=1), folder=tmp_path, overwrite=True, **QUIET)
    assert [look.step for look in read_history(tmp_path)] == [1]
    assert read_history(tmp_path / "nowhere") == []


def test_a_history_that_cannot_be_written_ends_no_run(straight, tmp_path):
    def lock():
        (tmp_path / "history.csv").unlink()
        (tmp_path / "history.csv").mkdir()

    options = {"transform": at(12, lock), "folder": tmp_path, **QUIET}
    with pytest.warns(UserWarning, match=r"history\.csv cannot be written") as seen:
        found = train(small(), DATA, LABELS, replace(RECIPE, save_every=1e-9), **options)
    assert len(seen) == 1
    assert torch.equal(weights(found), straight)


def test_pictures_of_loss_and_samples(tmp_path):
    recipe = Recipe(steps=12, batch=8, every=1)
    callbacks = [LossPlot(), Drawings(every=5, n=4, steps=3)]
    options = {"recipe": recipe, "callbacks": callbacks, "folder": tmp_path, **QUIET}
    train(image_model(), IMAGES, **options)
    names = sorted(f.name for f in tmp_path.glob("*.png"))
    assert names == ["loss.png", *(f"samples-{k:07d}.png" for k in (5, 10, 12))]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_samples_are_drawn_with_labels_by_a_figure_of_ones_own(tmp_path):
    seen = []

    def figure(x):
        check_state(x)
        seen.append(x)
        return SimpleNamespace(savefig=lambda file, format: file.write_text("drawn"))

    recipe, drawn = Recipe(steps=4, batch=8), Drawings(2, 6, 3, tmp_path / "here", figure)
    train(small(), DATA, LABELS, recipe, callbacks=[drawn], **QUIET)
    assert [x.shape for x in seen] == [(6, 2)]
    assert [f.name for f in (tmp_path / "here").iterdir()] == ["samples-0000004.png"]
    with pytest.raises(TypeError, match="needs a ScoreNetwork of known shape"):
        Drawings(folder=tmp_path)._figure(nn.Linear(2, 2))


def test_the_bar_tells_the_seconds_a_step_and_how_many_fit(capsys):
    train(small(), DATA, LABELS, Recipe(steps=20, batch=16), device="cpu")
    assert "step 20 of 20, " in (shown := capsys.readouterr().err)
    assert "s each" in shown
    train(small(), DATA, LABELS, Recipe(minutes=0.002, batch=16), device="cpu")
    assert " of about " in capsys.readouterr().err


# --- what a run leaves ----------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_the_checkpoint_before_the_last_is_kept_and_taken(harm, straight, tmp_path):
    def stop():
        raise KeyboardInterrupt

    options = {"folder": tmp_path, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        train(
            small(),
            DATA,
            LABELS,
            replace(RECIPE, save_every=1e-9),
            transform=at(34, stop),
            **options,
        )
    steps = [torch.load(tmp_path / f, weights_only=True)["step"] for f in (BEFORE, STATE)]
    assert steps == [20, 30]
    if harm == "cut":
        (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:500])
    else:
        (tmp_path / STATE).unlink()
    with pytest.warns(UserWarning, match=r"training\.pt.*goes on from .*training\.before\.pt"):
        found = train(small(), DATA, LABELS, RECIPE, resume=True, **options)
    assert torch.equal(weights(found), straight)


def test_the_checkpoint_of_an_overwritten_run_is_gone(tmp_path):
    train(small(), DATA, LABELS, RECIPE, folder=tmp_path, **QUIET)

    def die():
        raise KeyboardInterrupt

    options = {"transform": at(0, die), "folder": tmp_path, "overwrite": True, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        train(small(), DATA, LABELS, RECIPE, **options)
    assert not (tmp_path / BEFORE).exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_of_a_queue_saves_and_says_how_to_go_on(name, straight, tmp_path, capsys):
    number = getattr(signal, name)
    options = {"folder": tmp_path, **QUIET}
    stop = at(8, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as info:
        train(small(), DATA, LABELS, RECIPE, transform=stop, **options)
    assert info.value.code == 128 + number
    assert f"stopped after step 9; {tmp_path} holds the run: resume it" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL
    found = train(small(), DATA, LABELS, RECIPE, resume=True, **options)
    assert torch.equal(weights(found), straight)


def test_a_longer_run_says_that_its_rate_follows(tmp_path, capsys):
    options = {"folder": tmp_path, "device": "cpu"}
    train(small(), DATA, LABELS, replace(RECIPE, steps=20), progress=False, **options)
    assert "learning rate" not in capsys.readouterr().err
    rates = []
    watch = [lambda t, k, loss: rates.append(t.look.rate)]
    train(small(), DATA, LABELS, RECIPE, resume=True, callbacks=watch, **options)
    words = "was to end at 20 steps and ends at 40 steps: the learning rate follows the new length"
    assert words in capsys.readouterr().err
    # at step 21 of 40: (21/40 - 0.05) / 0.95 = 1/2 of the cosine
    assert rates[0] == pytest.approx(0.5)


# --- the range of rates ---------------------------------------------------------------------


class Bowl(nn.Module):
    """One number w; the objective is h w^2 / 2, whose descent diverges at rates above 2 / h."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))


@pytest.mark.parametrize("h", [0.5, 50.0])
def test_the_range_test_finds_where_descent_diverges(h):
    def bowl(model, x, y, noise):
        return (0.5 * h * model.w.square()).expand(len(x))

    model = Bowl()
    found = learning_rate_test(
        model,
        DATA.float(),
        recipe=Recipe(batch=4, clip=1e9),
        low=1e-4 / h,
        high=1e3 / h,
        steps=140,
        objective=bowl,
        optimizer=lambda p: torch.optim.SGD(p, 1.0),
        device="cpu",
    )
    assert model.w.item() == 1
    ratio = found.rates[1:] / found.rates[:-1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1e7 ** (1 / 139)))
    assert float(found.rates[0]) == pytest.approx(1e-4 / h)
    # w is multiplied by |1 - rate h| at each rate: exactly so.
    w = (1 - found.rates * h).cumprod(0)
    torch.testing.assert_close(found.losses, 0.5 * h * w**2, rtol=1e-3, atol=1e-30)
    assert len(found.losses) < 139
    # The smooth loss is least where a rate first makes w grow, a step or two of the sequence late
    assert 0.3 / h < found.largest < 4 / h
    assert found.best < found.largest


def test_the_range_test_refuses():
    for low, high, words in ((1.0, 0.1, "low must be below high"), (-1.0, 1.0, "low")):
        with pytest.raises(ValueError, match=words):
            learning_rate_test(small(), DATA, LABELS, low=low, high=high, device="cpu")

    def burst(model, x, y, noise):
        return next(model.parameters()).sum() * torch.full((len(x),), math.inf)

    with pytest.raises(ValueError, match="diverges at once"):
        learning_rate_test(small(), DATA, LABELS, objective=burst, device="cpu")


def test_facts_and_recipe_of_the_range_test_are_those_of_training():
    model = ScoreNetwork(MLP((2,), width=16, depth=1), VP(), facts=Facts.of(DATA))
    found = learning_rate_test(model, DATA, recipe=Recipe(batch=32), steps=60, device="cpu")
    assert found.rates.shape == found.losses.shape
    assert 1e-6 <= found.best <= found.largest <= 1
