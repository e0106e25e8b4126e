"""The folder of a run: what stops a run, what takes it up again, and what may not be mixed."""

from __future__ import annotations

import copy
import errno
import io
import math
import os
import random
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from trained import at, weights

from sde_gen import VE, VP, Exponential, Facts, ScoreNetwork
from sde_gen.facts import Units
from sde_gen.networks import MLP
from sde_gen.schedules import Linear
from sde_gen.training import (
    CheckpointError,
    Denoising,
    Recipe,
    Trainer,
    TrainingError,
    likelihood_weight,
    load,
    save,
    train,
    uniform_weight,
)
from sde_gen.tuning import Tuned
from sde_gen.tuning.tuned import Choice

STATE, BEFORE, LOCK = "training.pt", "training.before.pt", "training.lock"
DATA = torch.randn(500, 2, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(500) % 3
OPTIONS = {"progress": False, "device": "cpu"}


UNITS = Units(torch.zeros(2), torch.ones(2))


def small(sde=None, width: int = 16, prediction="preconditioned", **facts):
    torch.manual_seed(0)
    net = MLP((2,), width=width, depth=1, dropout=0.2, classes=3)
    return ScoreNetwork(
        net, sde or VP(), prediction, Facts(**({"std": 0.6, "units": UNITS} | facts))
    )


RECIPE = Recipe(steps=45, batch=32)


@pytest.fixture(autouse=True)
def ordinary_signals():
    """As in a program at a terminal: in the background Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def straight() -> torch.Tensor:
    """The weights that 45 steps end with."""
    return weights(train(small(), DATA, LABELS, RECIPE, **OPTIONS))


# --- stopped and taken up -------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 8, 9, 10, 26, 44])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_after_the_step_and_loses_nothing(number, step, straight, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = at(step, lambda: signal.raise_signal(number))
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected) as info:
        train(small(), DATA, LABELS, RECIPE, transform=stop, folder=tmp_path, **OPTIONS)
    if number == signal.SIGTERM:
        assert info.value.code == 128 + 15
    else:
        assert f"after step {step + 1}" in str(info.value)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == step + 1
    other = small()
    for p in other.parameters():
        nn.init.zeros_(p)
    resumed = train(other, DATA, LABELS, RECIPE, folder=tmp_path, resume=True, **OPTIONS)
    assert torch.equal(weights(resumed), straight)
    assert torch.equal(weights(load(tmp_path)), straight)


def test_what_is_on_disk_after_a_signal_is_the_average_so_far(tmp_path):
    recipe = Recipe(steps=1000, batch=32)
    trainer = Trainer(
        small(),
        DATA,
        LABELS,
        recipe,
        transform=at(4, lambda: signal.raise_signal(signal.SIGINT)),
        folder=tmp_path,
        device="cpu",
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    assert torch.equal(weights(load(tmp_path)), weights(trainer.average))
    assert not torch.equal(weights(load(tmp_path)), weights(small()))
    # and the same trainer can go on
    trainer.recipe = Recipe(steps=8, batch=32)
    trainer.run(progress=False)
    assert trainer.step == 8


def test_a_second_ctrl_c_is_obeyed_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second was held back")

    with pytest.raises(KeyboardInterrupt):
        train(small(), DATA, LABELS, RECIPE, transform=at(3, twice), folder=tmp_path, **OPTIONS)
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_folder_a_signal_is_not_held_back():
    def interrupt():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it was held back")

    with pytest.raises(KeyboardInterrupt):
        train(small(), DATA, LABELS, RECIPE, transform=at(3, interrupt), **OPTIONS)


def test_a_program_keeps_its_own_handlers(straight, tmp_path):
    seen = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        tell = at(3, lambda: signal.raise_signal(signal.SIGTERM))
        found = train(small(), DATA, LABELS, RECIPE, transform=tell, folder=tmp_path, **OPTIONS)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert seen == [signal.SIGTERM]
    assert torch.equal(weights(found), straight)


def test_outside_the_main_thread_a_run_goes_on_without_signals(straight, tmp_path):
    found = []

    def work():
        found.append(train(small(), DATA, LABELS, RECIPE, folder=tmp_path, **OPTIONS))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(weights(found[0]), straight)


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from test_runs import DATA, LABELS, OPTIONS, Recipe, at, small, train, weights
recipe = Recipe(steps=45, batch=32, save_every=1e-9)
kill = at(int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))
end = train(small(), DATA, LABELS, recipe, transform=kill, folder=sys.argv[2], resume=True,
            **OPTIONS)
torch.save(weights(end), sys.argv[2] + "/end")
"""


def run_killed(folder: Path, step: int) -> subprocess.CompletedProcess[bytes]:
    torch.set_num_threads(1)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder), str(step)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)


def test_a_killed_run_blocks_nobody_and_is_resumed_bit_for_bit(straight, tmp_path):
    assert run_killed(tmp_path, 33).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    resumed = train(small(), DATA, LABELS, RECIPE, folder=tmp_path, resume=True, **OPTIONS)
    assert torch.equal(weights(resumed), straight)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.slow
def test_many_kills_change_nothing(straight, tmp_path):
    r = random.Random(0)
    for _ in range(12):
        assert run_killed(tmp_path, r.randrange(4)).returncode == -signal.SIGKILL
    assert run_killed(tmp_path, 1000).returncode == 0
    assert torch.equal(torch.load(tmp_path / "end"), straight)


# --- another run ----------------------------------------------------------------------------

OTHERS = {
    "model.sde": ({"sde": VE()}, {}, {}),
    "model.sde: its clock": ({"sde": VP(Linear(0.2, 20.0))}, {}, {}),
    "model.prediction": ({"prediction": "data"}, {}, {}),
    "model.std": ({"std": 0.7}, {}, {}),
    "model.units": ({"units": Units(torch.zeros(2), torch.tensor([1.0, 1.00001]))}, {}, {}),
    "model.units: of all": ({"units": Units(torch.zeros(1), torch.ones(1))}, {}, {}),
    "model.levels": ({"levels": 16}, {}, {}),
    "model.net": ({"width": 24}, {}, {}),
    "recipe.batch": ({}, {"batch": 16}, {}),
    "recipe.lr": ({}, {"lr": 1e-3}, {}),
    "recipe.warmup": ({}, {"warmup": 0.1}, {}),
    "recipe.clip": ({}, {"clip": 2.0}, {}),
    "recipe.ema": ({}, {"ema": 0.2}, {}),
    "recipe.snapshots": ({}, {"snapshots": 2}, {}),
    "optimizer": ({}, {}, {"optimizer": torch.optim.SGD}),
    "optimizer: its numbers": ({}, {}, {"optimizer": lambda p: torch.optim.Adam(p, 2e-3)}),
    "recipe.seed": ({}, {"seed": 1}, {}),
    "objective": ({}, {}, {"objective": Denoising(dropout=0.2)}),
    "objective: its weight": ({}, {}, {"objective": Denoising(weighting=uniform_weight)}),
    "data": ({}, {}, {"data": DATA + 1e-7}),
    "data: one more": ({}, {}, {"data": torch.cat([DATA, DATA[:1]])}),
    "data: their precision": ({}, {}, {"data": DATA.double()}),
    "labels": ({}, {}, {"labels": (LABELS + 1) % 3}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_not_taken_up(other, tmp_path):
    train(small(), DATA, LABELS, Recipe(steps=2, batch=32), folder=tmp_path, **OPTIONS)
    model, recipe, options = OTHERS[other]
    options = {"data": DATA, "labels": LABELS} | options
    if len(options["data"]) > len(LABELS):
        options["labels"] = torch.cat([LABELS, LABELS[:1]])
    recipe = Recipe(**({"steps": 4, "batch": 32} | recipe))
    trainer = Trainer(small(**model), recipe=recipe, folder=tmp_path, device="cpu", **options)
    before = weights(trainer.model)
    files = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=other.split(":")[0] + " is .* there and .* here"):
        trainer.resume()
    assert trainer.step == 0
    assert torch.equal(weights(trainer.model), before)
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == files


def test_what_was_begun_with_functions_is_known_again_elsewhere(tmp_path):
    # In another process they lie at other addresses.
    recipe, loss = Recipe(steps=2, batch=32), Denoising(weighting=likelihood_weight)
    train(small(), DATA, LABELS, recipe, objective=loss, folder=tmp_path, **OPTIONS)
    assert " at 0x" not in str(torch.load(tmp_path / STATE, weights_only=True)["run"])


def test_the_last_digit_of_a_deviation_may_differ(tmp_path):
    # A sum of the data depends on the number of threads.
    recipe = Recipe(steps=2, batch=32)
    scale = torch.tensor([0.9, 1.1], dtype=torch.float64)
    first, later = (
        small(std=0.6 * k, units=Units(0.3 * k * scale, k * scale)) for k in (1, 1 + 1e-7)
    )
    train(first, DATA, LABELS, recipe, folder=tmp_path, **OPTIONS)
    train(later, DATA, LABELS, recipe, folder=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    "changed", [{"steps": 60}, {"minutes": 1.0}, {"every": 3}, {"save_every": 1.0}], ids=str
)
def test_length_and_frequency_may_change(changed, tmp_path):
    train(small(), DATA, LABELS, RECIPE, folder=tmp_path, **OPTIONS)
    recipe = Recipe(**({"steps": 50, "batch": 32} | changed))
    trainer = Trainer(small(), DATA, LABELS, recipe, folder=tmp_path, device="cpu")
    trainer.resume()
    assert trainer.step == 45
    trainer.run(progress=False)
    assert trainer.step == recipe.steps
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == recipe.steps


def test_looks_at_the_loss_do_not_change_the_run(straight):
    found = train(small(), DATA, LABELS, Recipe(steps=45, batch=32, every=1), **OPTIONS)
    assert torch.equal(weights(found), straight)


def test_a_run_is_not_overwritten_unasked(straight, tmp_path):
    short = Recipe(steps=2, batch=32)
    train(small(), DATA, LABELS, short, folder=tmp_path, **OPTIONS)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"training\.pt.*resume.*overwrite"):
        train(small(), DATA, LABELS, RECIPE, folder=tmp_path, **OPTIONS)
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before
    new = train(small(), DATA, LABELS, RECIPE, folder=tmp_path, overwrite=True, **OPTIONS)
    assert torch.equal(weights(new), straight)
    assert torch.equal(weights(load(tmp_path)), straight)


def test_a_model_without_a_run_is_not_overwritten_either(tmp_path):
    save(small(), tmp_path)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"model\.safetensors.*say overwrite"):
            train(small(), DATA, LABELS, RECIPE, folder=tmp_path, resume=resume, **OPTIONS)


def test_saving_by_hand_overwrites_nothing_unasked_either(tmp_path):
    recipe = Recipe(steps=2, batch=32)
    options = {"recipe": recipe, "folder": tmp_path / "run", "device": "cpu"}
    first = Trainer(small(), DATA, LABELS, **options)
    first.save()
    first.save()
    first.run(progress=False)
    with pytest.raises(FileExistsError, match=r"training\.pt"):
        Trainer(small(), DATA, LABELS, **options).save()
    assert torch.equal(weights(load(tmp_path / "run")), weights(first.average))


def test_a_run_may_be_saved_by_hand_while_it_runs(straight, tmp_path):
    trainer = Trainer(
        small(),
        DATA,
        LABELS,
        RECIPE,
        transform=at(7, lambda: trainer.save()),
        folder=tmp_path,
        device="cpu",
    )
    assert torch.equal(weights(trainer.run(progress=False)), straight)


def test_an_overwritten_run_is_gone_from_the_first_step(tmp_path):
    train(small(), DATA, LABELS, Recipe(steps=9, batch=32), folder=tmp_path, **OPTIONS)

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            small(),
            DATA,
            LABELS,
            RECIPE,
            transform=at(0, die),
            folder=tmp_path,
            overwrite=True,
            **OPTIONS,
        )
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 0
    assert torch.equal(weights(load(tmp_path)), weights(small()))


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    for options in ({"folder": tmp_path, "overwrite": True}, {}):
        with pytest.raises(ValueError, match="resume"):
            train(small(), DATA, LABELS, RECIPE, resume=True, **options, **OPTIONS)


def test_one_run_at_a_time(straight, tmp_path):
    other = small()

    def second():
        for options in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(BlockingIOError, match="another run"):
                train(other, DATA, LABELS, RECIPE, folder=tmp_path, **options, **OPTIONS)

    found = train(
        small(), DATA, LABELS, RECIPE, transform=at(20, second), folder=tmp_path, **OPTIONS
    )
    assert torch.equal(weights(found), straight)
    assert torch.equal(weights(load(tmp_path)), straight)
    assert not (tmp_path / LOCK).exists()


def test_a_stale_lock_blocks_nobody(tmp_path):
    (tmp_path / LOCK).write_text("of a run that was killed")
    train(small(), DATA, LABELS, Recipe(steps=1, batch=32), folder=tmp_path, **OPTIONS)
    assert not (tmp_path / LOCK).exists()


def test_what_a_killed_run_left_half_written_is_swept(tmp_path):
    (tmp_path / ".training.pt.0a1b2c3d").write_text("half")
    (tmp_path / ".model.safetensors.0a1b2c3d").write_text("half")
    (tmp_path / ".mine").write_text("whole")
    train(small(), DATA, LABELS, Recipe(steps=1, batch=32), folder=tmp_path, **OPTIONS)
    assert [f.name for f in tmp_path.glob(".*")] == [".mine"]


# --- what was tuned -------------------------------------------------------------------------


def tuned() -> Tuned:
    return Tuned([Choice(4, Exponential(2))])


def test_a_finished_run_keeps_its_tuning(tmp_path):
    recipe = Recipe(steps=3, batch=32)
    model = train(small(), DATA, LABELS, recipe, folder=tmp_path, **OPTIONS)
    model.tuned = tuned()
    save(model, tmp_path)
    again = train(small(), DATA, LABELS, recipe, folder=tmp_path, resume=True, **OPTIONS)
    assert repr(again.tuned) == repr(load(tmp_path).tuned) == repr(tuned())
    assert torch.equal(weights(load(tmp_path)), weights(model))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_model_beside_a_finished_run_is_written_anew(name, tmp_path):
    recipe = Recipe(steps=3, batch=32)
    model = train(small(), DATA, LABELS, recipe, folder=tmp_path, **OPTIONS)
    (tmp_path / name).write_bytes(b"nonsense")
    train(small(), DATA, LABELS, recipe, folder=tmp_path, resume=True, **OPTIONS)
    assert torch.equal(weights(load(tmp_path)), weights(model))


def test_further_training_drops_the_tuning(tmp_path):
    model = small()
    model.tuned = tuned()
    recipe = Recipe(steps=3, batch=32)
    average = train(model, DATA, LABELS, recipe, folder=tmp_path, **OPTIONS)
    assert model.tuned is average.tuned is load(tmp_path).tuned is None
    average.tuned = tuned()
    save(average, tmp_path)
    longer = Recipe(steps=5, batch=32)
    average = train(small(), DATA, LABELS, longer, folder=tmp_path, resume=True, **OPTIONS)
    assert average.tuned is load(tmp_path).tuned is None


# --- places that cannot be written ----------------------------------------------------------


@contextmanager
def no_file_above(size: int):
    """As on a full disk: the system refuses to write more than so many bytes into a file."""
    resource = pytest.importorskip("resource")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def never(model, x, y, noise):
    raise AssertionError("a step was taken")


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("way", ["folder", "above", STATE, "model.safetensors", "config.json"])
def test_a_file_in_the_way_is_found_before_the_first_step(way, tmp_path):
    folder = tmp_path / "a" / "run"
    if way in ("folder", "above"):
        folder = tmp_path / "a" if way == "folder" else folder
        (tmp_path / "a").write_text("a file")
    else:
        (folder / way).mkdir(parents=True)
    options = {"objective": never, "folder": folder, "overwrite": True, **OPTIONS}
    with pytest.raises(OSError, match=r"a file|Not a directory|[Ii]s a directory"):
        train(small(), DATA, LABELS, RECIPE, **options)


@pytest.mark.parametrize("fits", [False, True], ids=["nothing fits", "the model fits"])
def test_a_full_disk_is_found_before_the_first_step(fits, tmp_path):
    model = train(small(), DATA, LABELS, Recipe(steps=2), folder=tmp_path / "old", **OPTIONS)
    before = files(tmp_path / "old")
    size = len(before["model.safetensors"]) + 100 if fits else 300
    for folder in (tmp_path / "old", tmp_path / "new"):
        options = {"objective": never, "folder": folder, "overwrite": True, **OPTIONS}
        with no_file_above(size), pytest.raises(OSError, match=r"cannot write|File too large"):
            train(small(), DATA, LABELS, RECIPE, **options)
    assert files(tmp_path / "new") == {}
    assert files(tmp_path / "old") == before
    assert torch.equal(weights(load(tmp_path / "old")), weights(model))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=os.strerror)
def test_what_the_system_says_is_passed_on(code, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("sde_gen.training.folder.write", refuse)
    options = {"objective": never, "folder": tmp_path, **OPTIONS}
    with pytest.raises(OSError, match=os.strerror(code)):
        train(small(), DATA, LABELS, RECIPE, **options)


class Full:
    """A disk that is full in steps first <= step < last."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.step, self.limit = first, last, -2, None

    def __call__(self, x, noise):
        self.step += 1  # the check of the data makes one call
        if self.step == self.first:
            self.limit = no_file_above(300)
            self.limit.__enter__()
        if self.step == self.last:
            self.free()
        return x

    def free(self) -> None:
        if self.limit is not None:
            self.limit.__exit__(None, None, None)
        self.limit = None


OFTEN = Recipe(steps=45, batch=32, save_every=1e-9)


def test_a_save_that_fails_on_the_way_does_not_end_the_run(straight, tmp_path):
    full = Full(12, 28)
    with pytest.warns(UserWarning, match="after step 20 the run could not be saved") as seen:
        found = train(small(), DATA, LABELS, OFTEN, transform=full, folder=tmp_path, **OPTIONS)
    assert len(seen) == 1
    assert torch.equal(weights(found), straight)
    assert torch.equal(weights(load(tmp_path)), straight)


def test_the_last_save_that_fails_is_an_error_and_the_one_before_is_whole(straight, tmp_path):
    full = Full(32, 1000)
    trainer = Trainer(small(), DATA, LABELS, OFTEN, transform=full, folder=tmp_path, device="cpu")
    try:
        with pytest.warns(UserWarning, match="after step 4"), pytest.raises(OSError):  # noqa: PT011
            trainer.run(progress=False)
    finally:
        full.free()
    assert torch.equal(weights(trainer.average), straight)
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 30
    whole = {STATE, BEFORE, "model.safetensors", "config.json", "trained_on.bin", "history.csv"}
    assert {f.name for f in tmp_path.iterdir()} == whole
    resumed = train(small(), DATA, LABELS, RECIPE, folder=tmp_path, resume=True, **OPTIONS)
    assert torch.equal(weights(resumed), straight)


def test_a_state_never_says_more_than_the_model_beside_it(tmp_path, monkeypatch):
    # Else a finished run would be taken up as finished, with the model of before.
    def refuse(*_):
        raise OSError("no more")

    def forbid():
        monkeypatch.setattr("sde_gen.training.saving.save", refuse)

    recipe = Recipe(steps=20, batch=32)
    with pytest.raises(OSError, match="no more"):
        train(small(), DATA, LABELS, recipe, transform=at(5, forbid), folder=tmp_path, **OPTIONS)
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 0


def test_a_full_disk_does_not_hide_what_went_wrong(tmp_path):
    def late(model, x, y, noise):
        late.calls = getattr(late, "calls", 0) + 1
        return Denoising()(model, x, y, noise) * (math.inf if late.calls > 15 else 1)

    full = Full(12, 1000)
    options = {"objective": late, "transform": full, "folder": tmp_path, **OPTIONS}
    try:
        with pytest.raises(TrainingError, match=r"step 15: the loss is inf.*nor could the model"):
            train(small(), DATA, LABELS, RECIPE, **options)
    finally:
        full.free()


def test_a_full_disk_does_not_hold_back_a_signal(tmp_path):
    full = Full(12, 1000)

    def stop(x, noise):
        full(x, noise)
        if full.step == 14:
            signal.raise_signal(signal.SIGINT)
        return x

    try:
        with pytest.warns(UserWarning, match="after step 15"), pytest.raises(KeyboardInterrupt):
            train(small(), DATA, LABELS, RECIPE, transform=stop, folder=tmp_path, **OPTIONS)
    finally:
        full.free()


# --- damaged states -------------------------------------------------------------------------


def damaged(good: bytes, r: random.Random) -> bytes:
    """Bytes lost, changed, moved or added."""
    data, i = bytearray(good), r.randrange(len(good))
    how = r.choice(["flip", "cut", "zero", "insert", "delete", "swap", "many"])
    if how == "flip":
        data[i] ^= 1 << r.randrange(8)
    elif how == "cut":
        del data[i:]
    elif how == "zero":
        n = min(r.randrange(1, 500), len(data) - i)
        data[i : i + n] = bytes(n)
    elif how == "insert":
        data[i:i] = r.randbytes(r.randrange(1, 50))
    elif how == "delete":
        del data[i : i + r.randrange(1, 50)]
    elif how == "swap":
        j = r.randrange(len(data))
        data[i : i + 16], data[j : j + 16] = data[j : j + 16], data[i : i + 16]
    else:
        for _ in range(20):
            data[r.randrange(len(data))] = r.randrange(256)
    return bytes(data)


def repickled(good: bytes, r: random.Random) -> bytes:
    """A changed pickle, with the checksum that belongs to it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            record = bytearray(old.read(name))
            if name.endswith("data.pkl"):
                for _ in range(r.choice([1, 1, 2, 5])):
                    record[r.randrange(len(record))] = r.randrange(256)
            new.writestr(name, bytes(record))
    return out.getvalue()


ODD = (None, True, -1, 1.5, math.nan, math.inf, 10**30, "x", [], {}, (), torch.zeros(3))


def tampered(good: bytes, r: random.Random) -> bytes:
    """One entry, anywhere in the state, is gone, new or another."""
    state = torch.load(io.BytesIO(good), weights_only=True)
    place = state
    while r.random() < 0.7:
        inner = [v for v in place.values() if isinstance(v, dict) and v]
        if not inner:
            break
        place = r.choice(inner)
    key, how = r.choice(list(place)), r.choice(["delete", "add", "replace", "replace"])
    if how == "delete":
        del place[key]
    else:
        place[r.choice(["x", 99, -1]) if how == "add" else key] = r.choice(ODD)
    out = io.BytesIO()
    torch.save(state if r.random() < 0.95 else r.choice(ODD), out)
    return out.getvalue()


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)


def check_damaged_states(folder: Path, seeds: range) -> None:
    """Each is refused by name with nothing changed, or loads as what it was."""
    recipe = Recipe(steps=4, batch=8)
    train(small(), DATA, LABELS, recipe, folder=folder, **OPTIONS)
    (folder / BEFORE).unlink()
    good, refused = (folder / STATE).read_bytes(), 0
    state = torch.load(folder / STATE, weights_only=True)
    trainer = Trainer(small(), DATA, LABELS, recipe, folder=folder, device="cpu")
    untouched = copy.deepcopy(trainer._state())
    for seed in seeds:
        r = random.Random(seed)
        damage = (damaged, damaged, repickled, tampered)[seed % 4]
        (folder / STATE).write_bytes(damage(good, r))
        message = ""
        try:
            trainer.resume()
        except CheckpointError as error:
            message = str(error)
        if message:
            assert STATE in message, seed
            assert "weights_only" not in message, seed
            assert same(trainer._state(), untouched), seed
            refused += 1
        else:
            assert damage is not damaged or same(trainer._state(), state), seed
            trainer = Trainer(small(), DATA, LABELS, recipe, folder=folder, device="cpu")
    assert refused > 0.7 * len(seeds)


def test_damaged_states_are_refused_by_name(tmp_path):
    check_damaged_states(tmp_path, range(100))


@pytest.mark.slow
def test_thousands_of_damaged_states_are_refused_by_name(tmp_path):
    check_damaged_states(tmp_path, range(100, 3100))


def without(name: str):
    return lambda state: {k: v for k, v in state.items() if k != name}


def changed(name: str, value):
    return lambda state: state | {name: value}


TAMPERED = {
    "a list": (lambda state: [state], "must hold a dict, got list"),
    **{f"no {k}": (without(k), f"lacks the field '{k}'") for k in ("run", "step", "optimizer")},
    "half a layout": (changed("layout", {"half": True}), "layout must be three times true or"),
    "no length": (changed("length", 5), r"length must be \[steps, minutes\], got 5"),
    "a step of text": (changed("step", "7"), "step must be a number >= 0, got '7'"),
    "a step of truth": (changed("step", True), "step must be"),
    "a step below 0": (changed("step", -1), "step must be a number >= 0, got -1"),
    "no time": (changed("elapsed", math.nan), "elapsed must be a number >= 0, got nan"),
    "no run": (changed("run", 3), "run must describe the run, got 3"),
    "no tensors": (changed("model", [1]), "model must hold tensors, got list"),
    "no average": (changed("average", {}), "average lacks the entry"),
    "a number": (changed("optimizer", 1), "optimizer must hold tensors, got 1"),
    "a stranger": (changed("optimizer", {77: {}}), "optimizer has an unknown entry 77"),
    "no moments": (changed("optimizer", {0: {}}), r"optimizer\[0\] lacks the entry 'step'"),
    "another shape": (
        lambda s: s | {"model": {k: v[None] for k, v in s["model"].items()}},
        r"model\['net.* is float32 \(1, .* there and float32 \(",
    ),
    "another precision": (
        lambda s: s | {"average": {k: v.double() for k, v in s["average"].items()}},
        r"average\['net.* is float64 .* there and float32",
    ),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_field_that_is_wrong_is_named(how, tmp_path):
    recipe = Recipe(steps=2, batch=8)
    train(small(), DATA, LABELS, recipe, folder=tmp_path, **OPTIONS)
    change, words = TAMPERED[how]
    torch.save(change(torch.load(tmp_path / STATE, weights_only=True)), tmp_path / STATE)
    trainer = Trainer(small(), DATA, LABELS, recipe, folder=tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match=words):
        trainer.resume()


def test_a_state_that_runs_code_is_refused_without_advice(tmp_path):
    recipe = Recipe(steps=2, batch=8)
    train(small(), DATA, LABELS, recipe, folder=tmp_path, **OPTIONS)
    torch.save({"step": print}, tmp_path / STATE)
    (tmp_path / BEFORE).unlink()
    trainer = Trainer(small(), DATA, LABELS, recipe, folder=tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="holds more than tensors") as info:
        trainer.resume()
    assert info.value.__cause__ is None
    assert info.value.__suppress_context__
