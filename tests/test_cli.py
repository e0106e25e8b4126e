"""The command line, run as a function: what it writes, what it says, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sde_gen.cli import main, parser
from sde_gen.training import load


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


def test_same_seed_same_model(toy, tmp_path):
    again = ("train", "two_moons", "--out", tmp_path, "--steps", 5, "--device", "cpu")
    assert run(*again) == 0
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (toy / name).read_bytes()


def test_resume_goes_on(tmp_path, capsys):
    options = ("--out", tmp_path, "--batch", 8, "--device", "cpu")
    assert run("train", "swiss_roll", *options, "--steps", 10) == 0
    assert run("train", "swiss_roll", *options, "--steps", 20, "--resume") == 0
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert state["step"] == 20
    assert "step 20" in capsys.readouterr().err


def test_evaluate_prints_samples_beside_real(digits, toy, capsys):
    options = ("--n", 20, "--steps", 2, "--device", "cpu")
    assert run("evaluate", digits, "digits", *options, "--bits") == 0
    text = capsys.readouterr().out
    lines = dict(line.rsplit(maxsplit=2)[::2] for line in text.splitlines()[2:-1])
    assert {"energy distance", "sliced Wasserstein", "nearest neighbour"} < set(lines)
    assert float(lines["accuracy"]) >= 0.9
    assert "bits per dimension" in text
    assert run("evaluate", toy, "two_moons", *options) == 0
    assert "accuracy" not in capsys.readouterr().out


def test_arrays_and_folders_of_images(tmp_path):
    from PIL import Image

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
    assert run("train", folder, "--grey", "--out", tmp_path / "m2", *short) == 0
    assert (load(tmp_path / "m2").classes, load(tmp_path / "m2").shape) == (2, (1, 16, 12))
    assert run("train", folder / "cat", "--sde", "edm", "--out", tmp_path / "m3", *short) == 0
    assert (load(tmp_path / "m3").classes, load(tmp_path / "m3").shape) == (None, (3, 16, 12))


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error
    return error


def test_bad_data_are_one_line(tmp_path, capsys):
    np.save(tmp_path / "int.npy", np.zeros((5, 1, 8, 8), dtype=np.uint8))
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    (tmp_path / "bad.npy").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "m", "--steps", 1, "--device", "cpu")
    for name, words in {
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
    assert "steps" in refused(capsys, "sample", toy, *out, "--steps", 0)
    assert ".png or .npz" in refused(capsys, "sample", toy, "--out", tmp_path / "x.gif")
    assert "no images" in refused(capsys, "sample", toy, "--out", tmp_path / "x.png")
    assert "no device" in refused(capsys, "sample", toy, *out[:2], "--device", "gpu")
    assert "the model draws (2,)" in refused(capsys, "evaluate", toy, "digits")
    assert "quantised" in refused(capsys, "evaluate", toy, "two_moons", "--bits")
    assert "batch" in refused(capsys, "train", "digits", *out, "--batch", 0)
    assert "minutes" in refused(capsys, "demo", "--minutes", -1, "--out", tmp_path / "d")
    if not torch.cuda.is_available():
        assert "CUDA" in refused(capsys, "train", "digits", *out[:2], "--device", "cuda")


def test_interruption_is_no_error(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sde_gen.demo.demo", interrupted)
    assert run("demo") == 130
    assert "interrupted" in capsys.readouterr().err


def test_help_explains_every_option(capsys):
    for command in ("demo", "train", "sample", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code == 0
        assert f"usage: sde-gen {command}" in capsys.readouterr().out
    for action in parser()._subparsers._group_actions[0].choices.values():
        for option in action._actions:
            assert option.help or option.metavar == "DATA", option
