"""The command line, run as a function: what it writes, what it says, what it refuses."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tqdm import tqdm

import sde_gen as sg
from sde_gen import data
from sde_gen.cli import commands, main, parser
from sde_gen.networks import MLP, UNet
from sde_gen.training import load

F64 = torch.float64


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert run("train", "two_moons", "--out", folder, "--steps", 5, "--device", "cpu") == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    options = ("--steps", 2, "--batch", 16, "--device", "cpu")
    assert run("train", "digits", "--out", folder, *options) == 0
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in load_file(folder / "model.safetensors").items()}


def drawn(folder, *options: object) -> dict[str, np.ndarray]:
    file = folder / "out" / "drawn.npz"
    assert run("sample", folder, "--out", file, "--device", "cpu", "--steps", 3, *options) == 0
    with np.load(file) as arrays:
        return dict(arrays)


def test_samples_of_a_toy(toy):
    found = drawn(toy, "--n", 7)
    assert found["x"].shape == (7, 2)
    assert found["x"].dtype == np.float32
    assert (found["y"] == -1).all()
    np.testing.assert_allclose(drawn(toy, "--n", 7, "--chunk", 3)["x"], found["x"], atol=1e-5)
    np.testing.assert_allclose(drawn(toy, "--n", 4)["x"], found["x"][:4], atol=1e-5)
    assert not np.array_equal(drawn(toy, "--n", 7, "--seed", 1)["x"], found["x"])
    assert not np.array_equal(drawn(toy, "--n", 7, "--eta", 1)["x"], found["x"])


def test_samples_of_digits(digits, tmp_path):
    found = drawn(digits, "--n", 12)
    assert found["x"].shape == (12, 1, 8, 8)
    assert found["y"].tolist() == [*range(10), 0, 1]
    assert (drawn(digits, "--n", 3, "--label", 4)["y"] == 4).all()
    assert not np.array_equal(drawn(digits, "--n", 12, "--guidance", 2)["x"], found["x"])
    picture = tmp_path / "x.png"
    options = ("--n", 4, "--steps", 2, "--device", "cpu")
    assert run("sample", digits, "--out", picture, *options) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_row_for_each_class() -> None:
    from sde_gen.cli.samples import picture

    def rows(x, y, names=None):
        (ax,) = picture(x, torch.tensor(y), names).axes
        tile = np.asarray(ax.images[0].get_array())[..., 0]
        return [label.get_text() for label in ax.get_yticklabels()], tile, ax

    x = torch.linspace(-1, 1, 7).reshape(7, 1, 1, 1).expand(7, 1, 4, 4)
    names, tile, _ = rows(x, [0, 1, 2, 0, 1, 2, 0], ("a", "b", "c"))
    assert names == ["a", "b", "c"]
    values = [[0, 3, 6], [1, 4, 6], [2, 5, 6]]  # number of the image in its place; none is white
    found = tile[1::5, 1::5]
    np.testing.assert_allclose(found, np.array(values) / 6, atol=1e-6)
    assert rows(x, [4] * 7)[2].get_title() == "4"
    assert rows(x, [-1] * 7)[0] == []
    assert [t.get_text() for t in rows(x, range(7))[2].texts] == list("0123456")
    many = torch.zeros(100, 1, 4, 4)
    assert rows(many, [0] * 60 + [1] * 40)[0] == ["0", "", "1"]
    panels = picture(torch.zeros(4, 2, 9), torch.tensor([1, 0, 1, 0]), None).axes
    assert [ax.get_title() for ax in panels] == ["0", "0", "1", "1"]


def test_same_seed_same_model(toy, tmp_path):
    again = ("train", "two_moons", "--out", tmp_path, "--steps", 5, "--device", "cpu")
    assert run(*again) == 0
    assert weights(tmp_path) == weights(toy)


def test_resume_goes_on(tmp_path, capsys):
    options = ("--out", tmp_path, "--batch", 8, "--device", "cpu")
    assert run("train", "swiss_roll", *options, "--steps", 10) == 0
    assert run("train", "swiss_roll", *options, "--steps", 20, "--resume") == 0
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["step"] == 20
    assert "step 20" in capsys.readouterr().err


def evaluated(capsys, *arguments: object) -> tuple[dict[str, list[float]], str, str]:
    """The table that ``evaluate`` prints, the line above and the line below it."""
    capsys.readouterr()
    assert run("evaluate", *arguments, "--device", "cpu") == 0
    first, head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["samples", "real"]
    return (
        {row[:20].strip(): [float(v) for v in row[20:].replace("+-", "").split()] for row in rows},
        first,
        last,
    )


def sliced(x: np.ndarray, y: np.ndarray) -> float:
    """The square root of the mean squared W_2 of 512 projections, by quantile functions."""
    theta = torch.randn(512, x.shape[1], generator=torch.Generator().manual_seed(0), dtype=F64)
    theta = (theta / theta.norm(dim=1, keepdim=True)).numpy()
    ends = np.unique(np.r_[np.arange(len(x) + 1) / len(x), np.arange(len(y) + 1) / len(y)])
    middle, mass = (ends[1:] + ends[:-1]) / 2, np.diff(ends)
    u, v = np.sort(x @ theta.T, 0), np.sort(y @ theta.T, 0)
    gap = u[(middle * len(x)).astype(int)] - v[(middle * len(y)).astype(int)]
    return float(np.sqrt((mass[:, None] * gap**2).sum(0).mean()))


def distances(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """What ``evaluate`` prints of samples x against real y, from the definitions."""
    n, m, across = len(x), len(y), cdist(x, y)
    within = cdist(x, x).sum() / (n * (n - 1)) + cdist(y, y).sum() / (m * (m - 1))
    return {
        "energy distance": 2 * across.mean() - within,
        "sliced Wasserstein": sliced(x, y),
        "nearest neighbour": np.sort(across.min(1))[(n - 1) // 2],
    }


def judged(x: np.ndarray, labels: np.ndarray, y: np.ndarray, classes: np.ndarray) -> dict:
    """Accuracy and Frechet distance under a support vector machine fitted to (y, classes)."""
    svc = SVC(C=10).fit(y.astype(np.float32), classes)
    u, v = (svc.decision_function(z.astype(np.float32)) for z in (x, y))
    c, d = np.cov(u.T), np.cov(v.T)
    trace = np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    return {
        "accuracy": (svc.predict(x.astype(np.float32)) == labels).mean(),
        "Frechet distance": ((u.mean(0) - v.mean(0)) ** 2).sum() + trace,
    }


def test_evaluate_prints_samples_beside_real(digits, capsys):
    """Every number from its definition, of the sets that it should be of."""
    table, first, last = evaluated(capsys, digits, "digits", "--n", 400, "--steps", 2)
    assert first == "400 samples, beside as many real ones, against 1397 real ones"
    assert last == "the model was trained on none of these 400 real ones"
    train, test = data.digits("train"), data.digits("test")
    # Of 400 test images the order alone is drawn, and with it the order of the labels
    labels = test.y[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    drawn = sg.sample(load(digits).given(y=labels), 400, 2, seed=0).flatten(1).numpy()
    cells = np.floor((drawn.astype(np.float64) + 1) * 8.5).clip(0, 16)
    pixels = load_digits().data
    assert {float(v) for v in np.unique(pixels)} == set(range(17))
    y, real = (z.x.flatten(1).double().numpy() for z in (train, test))
    x = 2 * (cells + 0.5) / 17 - 1
    mine, floor = (
        {**distances(z, y), **judged(z, k.numpy(), y, train.y.numpy())}
        for z, k in ((x, labels), (real, test.y))
    )
    assert floor["accuracy"] > 0.98
    assert set(table) == set(mine)
    for name, printed in table.items():
        # Four digits are printed; sqrtm and float32 features leave six
        expected = pytest.approx([mine[name], floor[name]], rel=1e-5, abs=6e-5)
        assert printed == expected, name


def test_evaluate_prints_bits_of_real_data(digits, capsys):
    table, *_ = evaluated(capsys, digits, "digits", "--n", 3, "--steps", 2, "--bits")
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:3]
    x, y = (z[order] for z in data.digits("test"))
    levels = ((x + 1) * 8.5).floor().long()
    bits = sg.bits_per_dim(load(digits).given(y=y), levels, 17, chunk=500).mean()
    wanted = [float(bits), float(bits.standard_error)]
    assert table["bits per dimension"] == pytest.approx(wanted, abs=6e-5)


def test_evaluate_says_what_was_trained_on(toy, tmp_path, capsys):
    options = ("--n", 30, "--steps", 2)
    table, first, last = evaluated(capsys, toy, "two_moons", *options)
    assert list(table) == ["energy distance", "sliced Wasserstein", "nearest neighbour"]
    assert first.startswith("30 samples")
    assert last == "the model was trained on none of these 30 real ones"
    trained_on = data.toy("two_moons", 20_000, torch.Generator().manual_seed(0))
    np.save(tmp_path / "same.npy", trained_on[500:600].double().numpy())
    *_, last = evaluated(capsys, toy, tmp_path / "same.npy", *options)
    assert last == "the model was trained on 30 of these 30 real ones: they are not held out"
    # Of 60 points 31 are new, of 30 held out at least one: and one copy is found among 29 others
    other = np.random.default_rng(0).normal(size=(100, 2))
    np.save(tmp_path / "mixed.npy", np.r_[trained_on[:29].numpy(), other[:31]])
    *_, last = evaluated(capsys, toy, tmp_path / "mixed.npy", *options)
    held = torch.randperm(60, generator=torch.Generator().manual_seed(0))[30:]
    known = int((held < 29).sum())
    assert 0 < known < 30
    assert last.startswith(f"the model was trained on {known} of these 30 real ones")
    sg.save(load(toy), tmp_path / "copy")
    *_, last = evaluated(capsys, tmp_path / "copy", "two_moons", *options)
    assert last.startswith("no record tells")


def test_evaluate_says_what_does_not_fit(digits, toy, tmp_path, capsys):
    x = np.zeros((8, 1, 8, 8))
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(8) + 3, short=np.arange(7))
    array = (tmp_path / "x.npz", "--key", "x", "--labels")
    assert "classes 0 .. 9, the data 10" in refused(capsys, "evaluate", digits, *array, "y")
    text = refused(capsys, "evaluate", digits, *array, "short")
    assert "short has 7 labels for 8 data" in text
    np.save(tmp_path / "three.npy", np.zeros((3, 2)))
    assert "four or more data" in refused(capsys, "evaluate", toy, tmp_path / "three.npy")
    assert "two samples or more" in refused(capsys, "evaluate", toy, "two_moons", "--n", 1)
    (tmp_path / "m").mkdir()
    for file in toy.iterdir():
        if file.is_file():
            (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    rows = tmp_path / "m" / "trained_on.bin"
    rows.write_bytes(rows.read_bytes()[:-8])
    assert "trained_on.bin is damaged" in refused(capsys, "evaluate", tmp_path / "m", "two_moons")


def test_arrays_and_folders_of_images(tmp_path):
    short = ("--steps", 1, "--batch", 4, "--channels", 8, "--device", "cpu")
    levels = np.random.default_rng(0).integers(0, 4, (20, 1, 8, 8))
    np.savez(tmp_path / "a.npz", images=levels, kinds=np.arange(20) % 3)
    array = ("--key", "images", "--labels", "kinds", "--levels", 4)
    assert run("train", tmp_path / "a.npz", *array, "--out", tmp_path / "m1", *short) == 0
    assert (load(tmp_path / "m1").classes, load(tmp_path / "m1").shape) == (3, (1, 8, 8))
    for kind in ("cat", "dog"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((16, 12, 3), 40 * i, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{i}.png")
    folder = tmp_path / "images"
    for hidden in (folder / ".ipynb_checkpoints", folder / "cat" / ".ipynb_checkpoints"):
        hidden.mkdir()
        Image.new("RGB", (9, 9)).save(hidden / "0-checkpoint.png")
    assert run("train", folder, "--grey", "--out", tmp_path / "m2", *short) == 0
    assert (load(tmp_path / "m2").classes, load(tmp_path / "m2").shape) == (2, (1, 16, 12))
    assert run("train", folder / "cat", "--sde", "edm", "--out", tmp_path / "m3", *short) == 0
    assert (load(tmp_path / "m3").classes, load(tmp_path / "m3").shape) == (None, (3, 16, 12))


def test_straight_paths_are_trained_and_sampled(tmp_path):
    short = ("--steps", 1, "--batch", 4, "--channels", 8, "--device", "cpu")
    assert run("train", "two_moons", "--sde", "flow", "--out", tmp_path / "m", *short) == 0
    assert load(tmp_path / "m").sde == sg.RectifiedFlow()
    assert np.isfinite(drawn(tmp_path / "m", "--n", 5)["x"]).all()


@pytest.mark.parametrize(
    ("shape", "channels", "wanted"),
    [
        ((7,), None, MLP((7,), 128, 3)),
        ((7,), 16, MLP((7,), 16, 3)),
        ((1, 8, 8), None, UNet.digits(None)),
        ((1, 8, 8), 16, UNet((1, 8, 8), 16, (1, 2), blocks=1)),
        ((3, 8, 8), None, UNet((3, 8, 8), 64, (1, 2), blocks=2)),
        ((1, 16, 12), None, UNet((1, 16, 12), 64, (1, 2, 2), blocks=2)),
        ((3, 64, 64), 32, UNet((3, 64, 64), 32, (1, 2, 2, 2), blocks=1)),
    ],
    ids=str,
)
def test_the_network_that_the_data_ask_for(shape, channels, wanted):
    net = commands._network(commands.Data(torch.zeros(2, *shape)), channels)
    assert type(net) is type(wanted)
    assert net.config == wanted.config


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    (error,) = lines_of(capsys.readouterr().err)
    assert error.startswith(f"sde-gen {arguments[0]}: error: ")
    return error


def lines_of(text: str) -> list[str]:
    """What a terminal shows in the end: a carriage return starts a line anew."""
    shown = [line.split("\r")[-1].rstrip() for line in text.split("\n")]
    return [line for line in shown if line]


def test_bad_data_are_one_line(tmp_path, capsys):
    np.save(tmp_path / "int.npy", np.zeros((5, 1, 8, 8), dtype=np.uint8))
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    (tmp_path / "bad.npy").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "m", "--steps", 1, "--device", "cpu")
    np.save(tmp_path / "row.npy", np.arange(5.0))
    np.save(tmp_path / "same.npy", np.ones((5, 2)))
    np.save(tmp_path / "one.npy", np.ones((1, 1)))
    np.save(tmp_path / "complex.npy", np.ones((5, 2)) * 1j)
    (tmp_path / "flat").mkdir()
    (tmp_path / "mixed" / "cat").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "mixed" / "0.png")
    for name, words in {
        "row.npy": "holds (5,): expected (N, D)",
        "same.npy": "holds one value alone",
        "one.npy": "holds one value alone",
        "complex.npy": "holds complex128",
        "mixed": "1 images beside its class folders",
        "flat": "no image",
        "int.npy": "levels",
        "nan.npy": "NaN",
        "bad.npy": "cannot read",
        "none.npy": "no array file",
        "empty": "no image",
        "three_moons": "is no data",
    }.items():
        target = tmp_path / name if name != "three_moons" else name
        assert words in refused(capsys, "train", target, *out), name
    assert not (tmp_path / "m").exists()


def test_bad_options_are_one_line(toy, digits, tmp_path, capsys):
    out = ("--out", tmp_path / "x.npz", "--device", "cpu")
    assert "holds no model" in refused(capsys, "sample", tmp_path, *out)
    assert "0 .. 9, got 10" in refused(capsys, "sample", digits, *out, "--label", 10)
    assert "no classes" in refused(capsys, "sample", toy, *out, "--label", 1)
    assert "no classes" in refused(capsys, "sample", toy, *out, "--guidance", 1)
    for name in ("--steps", "--n", "--chunk"):
        text = refused(capsys, "sample", toy, *out, name, 0)
        assert f"{name} must be at least 1, got 0" in text
    for name in ("--batch", "--channels", "--levels", "--steps"):
        text = refused(capsys, "train", "digits", *out, name, -1)
        assert f"{name} must be at least 1, got -1" in text
    assert "--steps must be at least 1" in refused(capsys, "tune", toy, "--steps", 5, 0)
    assert "--seed must lie" in refused(capsys, "sample", toy, *out, "--seed", 10**30)
    assert "end in .png, .npz or .csv, or be a folder" in refused(
        capsys, "sample", toy, "--out", tmp_path / "x.gif"
    )
    assert "no images" in refused(capsys, "sample", toy, "--out", tmp_path / "x.png")
    assert "no device" in refused(capsys, "sample", toy, *out[:2], "--device", "gpu")
    assert "the model draws (2,)" in refused(capsys, "evaluate", toy, "digits")
    assert "quantised" in refused(capsys, "evaluate", toy, "two_moons", "--bits")
    assert "minutes" in refused(capsys, "demo", "--minutes", -1, "--out", tmp_path / "d")
    if not torch.cuda.is_available():
        assert "CUDA" in refused(capsys, "train", "digits", *out[:2], "--device", "cuda")


LABELS = {
    "from one": ([1, 2, 3], "0 .. 2 for 3 classes, each with samples, got 1, 2, 3:"),
    "huge": ([0, 1, 10**9], "0 .. 2 for 3 classes, each with samples, got 0, 1, 1000000000:"),
    "a gap": ([0, 2, 2], "0 .. 1 for 2 classes, each with samples, got 0, 2:"),
    "negative": ([0, 1, -1], "kinds must be integers >= 0"),
    "floats": ([0.0, 1.0, 2.0], "kinds must be integers >= 0, (N,), got float64"),
    "too few": ([0, 1], "kinds has 2 labels for 3 data"),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_class_that_would_not_be_trained_is_refused(name, tmp_path, capsys):
    labels, words = LABELS[name]
    np.savez(tmp_path / "x.npz", x=np.eye(3), kinds=labels)
    options = ("--key", "x", "--labels", "kinds", "--out", tmp_path / "m", "--steps", 1)
    assert words in refused(capsys, "train", tmp_path / "x.npz", *options)
    assert not (tmp_path / "m").exists()


def test_a_run_is_not_overwritten_unasked(tmp_path, capsys, monkeypatch):
    options = ("train", "two_moons", "--out", tmp_path, "--batch", 8, "--device", "cpu")
    assert run(*options, "--steps", 3) == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    first = weights(tmp_path)
    assert "already holds" in refused(capsys, *options, "--steps", 4, "--seed", 1)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert run(*options, "--steps", 3, "--seed", 1, "--overwrite") == 0
    assert weights(tmp_path) != first
    assert run(*options, "--steps", 3, "--overwrite") == 0
    assert weights(tmp_path) == first
    with pytest.raises(SystemExit) as stop:
        run(*options, "--overwrite", "--resume")
    assert stop.value.code == 2
    monkeypatch.setattr("sde_gen.demo.run.train_models", too_late)
    assert "holds a run of training" in refused(capsys, "demo", "--out", tmp_path)


def too_late(*_: object, **__: object) -> None:
    raise AssertionError("the work was begun")


@pytest.mark.parametrize("command", ["sample", "train", "demo"])
@pytest.mark.parametrize("place", ["file/x", "folder", "/proc/none/x"])
def test_output_is_tried_before_the_work(command, place, toy, tmp_path, capsys, monkeypatch):
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc, which refuses even the root user")
    monkeypatch.setattr("sde_gen.sampling.sample", too_late)
    monkeypatch.setattr("sde_gen.training.train", too_late)
    monkeypatch.setattr("sde_gen.demo.run.train_models", too_late)
    (tmp_path / "file").write_text("in the way")
    suffix = ".npz" if command == "sample" else ""
    (tmp_path / "folder.npz" / "config.json").mkdir(parents=True)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "folder" / "results.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    model = {"sample": [toy], "train": ["two_moons"], "demo": []}[command]
    out = tmp_path / (place + suffix)
    text = refused(capsys, command, *model, "--out", out)
    assert str(out) in text
    assert sorted(tmp_path.rglob("*")) == before


def test_tuning_is_tried_before_the_work(toy, tmp_path, capsys, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(f"no space left for {path}")

    monkeypatch.setattr("sde_gen.tuning.tune_solver", too_late)
    monkeypatch.setattr("sde_gen.data.check_writable", full)
    assert "no space left" in refused(capsys, "tune", toy)


def test_output_that_fails_leaves_what_was_there(toy, tmp_path, capsys, monkeypatch):
    def full(file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    out = tmp_path / "x.npz"
    out.write_bytes(b"old")
    monkeypatch.setattr("numpy.savez_compressed", full)
    assert "no space left" in refused(capsys, "sample", toy, "--out", out, "--steps", 2, "--n", 2)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.npz", b"old")]


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("a score of NaN"),
        OverflowError("math range error"),
        ZeroDivisionError("by zero"),
        SafetensorError("header too large"),
        MemoryError(),
        RecursionError("too deep"),
        sg.training.CheckpointError("two\nlines"),
        torch.OutOfMemoryError("no memory\nException raised from here:\nframe #0"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_one_line(error, toy, tmp_path, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        for _i in tqdm(range(3), leave=False):
            raise error

    monkeypatch.setattr("sde_gen.sampling.sample", fail)
    text = refused(capsys, "sample", toy, "--out", tmp_path / "x.npz")
    said = " ".join(str(error).split("\nException")[0].split()) or "MemoryError"
    assert text == f"sde-gen sample: error: {said}"


def damaged_header() -> bytes:
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), "
    return b"\x93NUMPY\x01\x00" + bytes([len(text), 0]) + text + bytes(32)


def damaged_zip() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.random.default_rng(0).normal(size=(50, 2)))
    content = bytearray(file.getvalue())
    content[80:120] = bytes(40)
    return bytes(content)


def encrypted_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", bytes(90))
    content = bytearray(file.getvalue())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.npy", damaged_header()),
        ("zlib.npz", damaged_zip()),
        ("encrypted.npz", encrypted_zip()),
        ("table.csv", b"a, b\n1, 2\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_one_line(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    options = ("--out", tmp_path / "m", "--steps", 1)
    assert name in refused(capsys, "train", tmp_path / name, *options)


def test_a_picture_that_is_a_bomb_is_one_line(tmp_path, capsys, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    text = refused(capsys, "train", tmp_path, "--out", tmp_path / "m", "--steps", 1)
    assert "x.png as an image" in text
    assert "bomb" in text


def test_warnings_are_one_line(toy, tmp_path, capsys, monkeypatch):
    true = sg.sample

    def warn(*arguments: object, **options: object) -> torch.Tensor:
        for _ in tqdm(range(2), leave=False):
            warnings.warn("the steps are too long:\n  take more", stacklevel=1)
        return true(*arguments, **options)

    monkeypatch.setattr("sde_gen.sampling.sample", warn)
    options = ("--out", tmp_path / "x.npz", "--steps", 2, "--n", 2, "--eta", 1)
    show = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("sample", toy, *options) == 0
    assert warnings.showwarning is show
    line = "sde-gen sample: warning: the steps are too long: take more"
    assert lines_of(capsys.readouterr().err) == [line, line]


def test_interruption_is_no_error(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt("stopped after step 7")

    monkeypatch.setattr("sde_gen.demo.demo", interrupted)
    assert run("demo") == 130
    assert lines_of(capsys.readouterr().err) == ["sde-gen demo: stopped after step 7"]


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & takes away
import sde_gen.sampling
from sde_gen.cli import main

def sample(*_, **__):
    from tqdm import tqdm
    for _ in tqdm(range(9), leave=False):
        print("ready", flush=True)
        time.sleep(60)

sde_gen.sampling.sample = sample
sys.exit(main(sys.argv[1:]))
"""


def child(*arguments: object, **options: object) -> subprocess.Popen:
    words = [sys.executable, "-c", CHILD, *map(str, arguments)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(words, stderr=subprocess.PIPE, env=buffered, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a child")
def test_ctrl_c_is_one_line(toy, tmp_path):
    with child("sample", toy, "--out", tmp_path / "x.npz", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert lines_of(error.decode()) == ["sde-gen sample: interrupted"]
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_output_that_nobody_takes_is_one_line(toy, tmp_path):
    with (
        open("/dev/full", "w") as full,
        child("train", "two_moons", "--out", tmp_path / "m", "--steps", 1, stdout=full) as process,
    ):
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    *bar, last = lines_of(error.decode())
    assert "error: [Errno 28]" in last
    assert all(line.startswith("training") for line in bar)


def test_help_explains_every_option(capsys):
    for command in ("demo", "train", "tune", "sample", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0
        assert f"usage: sde-gen {command}" in capsys.readouterr().out
    for action in parser()._subparsers._group_actions[0].choices.values():
        for option in action._actions:
            assert option.help or option.metavar == "DATA", option
