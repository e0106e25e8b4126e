"""The command line on data of one's own: images of many sizes, what is held out, names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_wine

import sde_gen as sg
from sde_gen.cli import main, reading
from sde_gen.data.order import Order
from sde_gen.training import load, validation

SHORT = ("--steps", 3, "--batch", 8, "--channels", 8, "--device", "cpu")


@pytest.fixture(autouse=True, scope="module")
def few_samples():
    """A look at what is held out takes 1,024 samples; here it is not the loss that matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "SAMPLES", 64)
        yield


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def said(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k, name in enumerate(["coffee", "tea"]):
        (root / name).mkdir()
        for i in range(12):
            h, w = [(20, 30), (30, 20), (10, 24)][i % 3]
            pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8) // (k + 1)
            Image.fromarray(pixels).save(root / name / f"{i:02}.jpg")
    return root


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    assert run("train", photos, "--size", 16, "--flip", "--out", folder, *SHORT) == 0
    return folder


def test_images_of_many_sizes_are_one_command(photos, tmp_path, capsys):
    out = said(capsys, "train", photos, "--size", "16x12", "--out", tmp_path / "m", *SHORT)
    first, _, second, _ = out.splitlines()
    assert first == (
        f"{photos}: 24 images of 3 sizes, 10 x 24 to 30 x 20, resized and cropped (centre) to"
        " 16 x 12, 8 of them enlarged, colour, 2 classes; in memory (0 MB)"
    )
    assert second == (
        "2 of 24 data are held out (--holdout 0: none) and their loss is watched; it ends the run"
        " when it no longer falls (--patience 0: never)"
    )
    found = load(tmp_path / "m")
    assert found.shape == (3, 16, 12)
    assert found.facts.classes == ("coffee", "tea")
    assert found.facts.levels == 256
    options = ("--size", 16, "--crop", "random", "--grey", "--holdout", 0, "--workers", 1)
    out = said(capsys, "train", photos, *options, "--out", tmp_path / "n", *SHORT)
    assert "(random) to 16 x 16, 8 of them enlarged, grey, 2 classes; read while it trains" in out
    assert "held out" not in out
    assert load(tmp_path / "n").shape == (1, 16, 16)


def test_several_sizes_need_a_size(photos, tmp_path, capsys):
    out = ("--out", tmp_path / "m", *SHORT)
    assert "all images must have one size, or be given one" in refused(
        capsys, "train", photos, *out
    )
    assert "--flip mirrors images" in refused(capsys, "train", "two_moons", "--flip", *out)
    for name in ("a", "b"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / f"{name}.png").write_bytes(b"no")
    text = refused(capsys, "train", tmp_path / "bad", *out)
    assert "2 of 2 files will not do" in text
    assert "a.png" in text
    assert "b.png" in text
    assert "--size must be N or HxW, got big" in refused(
        capsys, "train", photos, "--size", "big", *out
    )
    never = ("--size", 8, "--holdout", 0, "--patience", 1)
    assert "give holdout too" in refused(capsys, "train", photos, *never, *out)
    assert not (tmp_path / "m").exists()


def test_a_class_goes_by_its_name(model, tmp_path, capsys):
    file = tmp_path / "x.npz"
    options = ("--n", 3, "--steps", 2, "--device", "cpu", "--out", file)
    drawn = []
    for label in ("tea", 1):
        assert run("sample", model, "--label", label, *options) == 0
        with np.load(file) as arrays:
            assert (arrays["y"] == 1).all()
            drawn.append(arrays["x"])
    assert np.array_equal(*drawn)
    text = refused(capsys, "sample", model, "--label", "milk", *options)
    assert "--label milk is no class of the model, which has coffee, tea" in text
    assert "must lie in 0 .. 1, got 2" in refused(capsys, "sample", model, "--label", 2, *options)


def test_evaluate_takes_what_was_held_out(model, photos, tmp_path, capsys):
    options = ("--size", 16, "--steps", 2, "--device", "cpu")
    out = said(capsys, "evaluate", model, photos, *options)
    assert out.splitlines()[1] == ("2 samples, beside as many real ones, against 22 real ones")
    assert out.splitlines()[-1] == "the run of this model held these 2 real ones out"
    assert said(capsys, "evaluate", model, photos, *options[2:]) == out  # the size is the model's
    assert run("train", photos, "--size", 16, "--holdout", 0, "--out", tmp_path, *SHORT) == 0
    out = said(capsys, "evaluate", tmp_path, photos, *options)
    assert out.splitlines()[-1] == (
        "these 12 real ones are training data: the run held none out (sde-gen train --holdout)"
    )


def test_a_run_of_few_steps_says_so(tmp_path, capsys):
    given = ("train", "two_moons", "--batch", 8, "--device", "cpu", "--overwrite")
    words = "too few to draw well: give more --minutes"
    assert words in said(capsys, *given, "--minutes", 1e-9, "--out", tmp_path)
    assert words not in said(capsys, *given, "--steps", 3, "--out", tmp_path)


def test_images_on_disk_are_held_out_too(photos, tmp_path, capsys):
    options = ("--size", 16, "--crop", "random")
    held = ("--holdout", 0.25, "--seed", 3, "--workers", 0)
    assert run("train", photos, *options, *held, "--out", tmp_path, *SHORT) == 0
    assert not (tmp_path / "trained_on.bin").exists()
    assert run("train", photos, *options, *held, "--out", tmp_path, *SHORT, "--resume") == 0
    out = said(capsys, "evaluate", tmp_path, photos, *options, "--steps", 2, "--device", "cpu")
    assert out.splitlines()[-1] == "the run of this model held these 6 real ones out"
    assert "against 18 real ones" in out


def test_an_array_that_is_too_large_is_read_where_it_lies(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8))
    array = (tmp_path / "x.npy", "--levels", 256, "--holdout", 0.2)
    assert run("train", *array, "--out", tmp_path / "small", *SHORT) == 0
    monkeypatch.setattr(reading, "IN_MEMORY", 1)
    out = said(capsys, "train", *array, "--out", tmp_path / "large", *SHORT)
    assert (
        out.splitlines()[0] == f"{tmp_path / 'x.npy'}: 30 rows of (1, 8, 8), read where they lie"
    )
    small, large = (load(tmp_path / name).state_dict() for name in ("small", "large"))
    assert all(torch.equal(small[name], large[name]) for name in small)
    without = ("train", tmp_path / "x.npy", "--out", tmp_path / "m", *SHORT)
    assert "holds integers: give their number of levels" in refused(capsys, *without)


def test_copies_of_what_was_held_out_are_counted(tmp_path, capsys):
    n, seed = 40, 0
    x = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    held = Order(n, seed, 0.2).held
    x[held[0]] = x[Order(n, seed, 0.2).kept[0]]
    np.save(tmp_path / "x.npy", x)
    short = ("--steps", 3, "--device", "cpu")
    assert run("train", tmp_path / "x.npy", "--holdout", 0.2, "--out", tmp_path / "m", *short) == 0
    out = said(capsys, "evaluate", tmp_path / "m", tmp_path / "x.npy", *short)
    assert out.splitlines()[-1] == (
        "the run of this model held these 8 real ones out; 1 of them equal others that it was"
        " trained on"
    )


@pytest.mark.slow
def test_few_data_are_not_learned_by_heart(tmp_path, monkeypatch):
    """133 rows of wine: 10,000 steps would give +37 nats on them and -97 on the others."""
    monkeypatch.setattr(validation, "SAMPLES", 1024)
    x = torch.from_numpy(load_wine().data).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = x[order[:133]], x[order[133:]]
    np.save(tmp_path / "wine.npy", train.numpy())
    options = ("--out", tmp_path / "m", "--steps", 10_000, "--batch", 128, "--device", "cpu")
    assert run("train", tmp_path / "wine.npy", *options) == 0
    state = torch.load(tmp_path / "m" / "training.pt", weights_only=True)
    assert state["step"] < 1500
    z = train.double()
    law = torch.distributions.MultivariateNormal(z.mean(0), torch.cov(z.T))
    gaussian = law.log_prob(test.double()).mean()
    found = sg.log_prob(load(tmp_path / "m"), test).value.double().mean()
    assert float(found) > float(gaussian) - 1


def test_sets_from_their_own_files_are_found(tmp_path, capsys):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (40, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(40) % 10
    for k in range(5):
        (tmp_path / f"data_batch_{k + 1}.bin").write_bytes(records[6 * k : 6 * k + 6].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[30:].tobytes())
    names = [*"abcdefghij"]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names))
    short = ("--steps", 1, "--batch", 4, "--channels", 8, "--device", "cpu")
    assert run("train", tmp_path, "--out", tmp_path / "m", *short) == 0
    found = load(tmp_path / "m")
    assert (found.shape, found.classes, found.facts.classes) == ((3, 32, 32), 10, tuple(names))
    levels = records[:30, 1:].astype(np.float64)
    assert found.facts.std == pytest.approx((2 / 256) * levels.std(), rel=1e-12)
    out = said(capsys, "evaluate", tmp_path / "m", tmp_path, "--steps", 2, "--device", "cpu")
    assert "10 samples, beside as many real ones, against 30 real ones" in out
    assert out.splitlines()[-1] == "the model was trained on none of these 10 real ones"
