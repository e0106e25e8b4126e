"""``sde-gen restore``: against linear Gaussian algebra, and what it refuses.

A network whose output is zero, read as EDM's preconditioned residual, is the exact score of
N(shift, (std scale)^2): so a saved model has an exact posterior and an exact evidence, which
particles hit whatever their number. The matrices of the operators are written out in numpy.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal

import sde_gen as sg
from sde_gen.cli import main
from sde_gen.facts import Units
from sde_gen.networks import MLP, UNet

# What is measured here need not be likely.
pytestmark = pytest.mark.filterwarnings("always:.*observations do not fit:UserWarning")

RNG = np.random.default_rng(0)
SHIFT, SCALE = np.array([1.0, -2.0, 10.0]), np.array([2.0, 0.5, 3.0])
STD = 0.5
MATRIX = np.array([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]])
SHORT = ("--steps", 4, "--particles", 20, "--device", "cpu")


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def saved(folder: Path, net: torch.nn.Module, facts: sg.Facts) -> Path:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    sg.save(sg.ScoreNetwork(net, sg.VP(), facts=facts), folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    units = Units(torch.from_numpy(SHIFT), torch.from_numpy(SCALE))
    facts = sg.Facts(shape=(3,), std=1.0, units=units)
    return saved(tmp_path_factory.mktemp("table"), MLP((3,), 8, 1), facts)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    facts = sg.Facts(shape=(1, 4, 4), std=STD, levels=17)
    net = UNet((1, 4, 4), 8, (1,), blocks=1, classes=3)
    return saved(tmp_path_factory.mktemp("images"), net, facts)


def restored(out: Path, model: Path, *options: object) -> dict[str, np.ndarray]:
    assert run("restore", model, *options, "--out", out) == 0
    with np.load(out) as arrays:
        return dict(arrays)


def evidence(y: np.ndarray, a: np.ndarray, mean: np.ndarray, c: np.ndarray, noise: float) -> float:
    s = a @ c @ a.T + noise**2 * np.eye(len(a))
    return float(multivariate_normal(a @ mean, s).logpdf(y.ravel()))


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run("restore", *arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("sde-gen restore: error: ")
    return error


# ---- exact answers ----


@pytest.mark.parametrize("method", ["particles", "term"])
def test_a_table_is_restored_in_its_units(method, table, tmp_path, capsys):
    y, noise, c = np.array([[1.0, 9.0], [-6.0, 14.0]]), 0.7, np.diag(SCALE**2)
    np.save(tmp_path / "a.npy", MATRIX)
    np.savez(tmp_path / "y.npz", y=y, other=y)
    options = ("--matrix", tmp_path / "a.npy", "--data", tmp_path / "y.npz", "--key", "y")
    options += ("--noise", noise, "--method", method, "--draws", 1000, "--device", "cpu")
    options += ("--particles", 1000, "--steps", 10 if method == "particles" else 40)
    found = restored(tmp_path / "x.npz", table, *options)
    gain = c @ MATRIX.T @ np.linalg.inv(MATRIX @ c @ MATRIX.T + noise**2 * np.eye(2))
    std = np.sqrt(np.diag(c - gain @ MATRIX @ c))
    means = SHIFT + (y - MATRIX @ SHIFT) @ gain.T
    draws = found["draws"]
    assert draws.shape == (2, 1000, 3)
    # Five deviations of the mean of 1,000 draws; the term is biased by its steps
    rough = 5 / math.sqrt(1000) + (0.03 if method == "term" else 0)
    for mean, deviation in ((found["mean"], found["std"]), (draws.mean(1), draws.std(1))):
        assert (np.abs(mean - means) < rough * std).all()
        assert (np.abs(deviation / std - 1) < rough).all()
    chi = (((y[:, None] - draws @ MATRIX.T) / noise) ** 2).mean((1, 2))
    np.testing.assert_allclose(found["chi_square"], chi, rtol=1e-4)
    said = capsys.readouterr().out
    assert "observations: 2, noise 0.7\n" in said
    assert f"observation 1: chi-square {chi[1]:.3g}" in said
    if method == "particles":
        exact = [evidence(row, MATRIX, SHIFT, c, noise) for row in y]
        np.testing.assert_allclose(found["log_evidence"], exact, atol=1e-3)
        assert found["ess"].shape == (2, 11)
    else:
        assert "log_evidence" not in found


def blocks() -> np.ndarray:
    """Means of 2 x 2 of 4 x 4."""
    half = np.kron(np.eye(2), [0.5, 0.5])
    return np.kron(half, half)


def circulant(line: np.ndarray) -> np.ndarray:
    """Convolution of 4 entries on a circle, the kernel's centre at its middle."""
    a = np.zeros((4, 4))
    for i in range(4):
        for j, k in enumerate(line):
            a[i, (i + len(line) // 2 - j) % 4] += k
    return a


def gauss(width: float) -> np.ndarray:
    line = np.exp(-0.5 * (np.arange(-1, 2) / width) ** 2)
    return circulant(line / line.sum())


HIDDEN = np.array([[1, 0], [1, 1]])
KERNEL = np.array([0.25, 0.0, 0.125])
FREQUENCIES = np.zeros((4, 4), bool)
FREQUENCIES[0, 1] = FREQUENCIES[2, 3] = True


def fourier() -> np.ndarray:
    w = np.fft.fft(np.eye(4), norm="ortho")
    rows = np.kron(w, w)[FREQUENCIES.ravel()]
    return np.stack([rows.real, rows.imag], 1).reshape(4, 16)


CASES = {
    "downsample": (("--downsample", 2), blocks(), (1, 2, 2)),
    "blur": (("--blur", 0.5), np.kron(gauss(0.5), gauss(0.5)), (1, 4, 4)),
    "kernel": (("--blur", "line.npy"), np.kron(np.eye(4), circulant(KERNEL)), (1, 4, 4)),
    "then": (
        ("--blur", 0.5, "--downsample", 2),
        blocks() @ np.kron(gauss(0.5), gauss(0.5)),
        (1, 2, 2),
    ),
    "masked": (
        ("--downsample", 2, "--mask", "hidden.npy"),
        blocks()[HIDDEN.ravel() > 0],
        (3,),
    ),
    "fourier": (("--fourier", "frequencies.npy"), fourier(), (1, 2, 2)),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("line.npy", KERNEL)
    np.save("hidden.npy", HIDDEN)
    np.save("frequencies.npy", FREQUENCIES)


@pytest.mark.parametrize("case", CASES)
def test_operators_are_those_of_numpy(case, images, files):
    options, a, measured = CASES[case]
    y = RNG.normal(size=measured)
    np.save("y.npy", y)
    found = restored(
        Path("x.npz"), images, *options, "--data", "y.npy", "--noise", 0.3, *SHORT, "--seed", 1
    )
    exact = evidence(y, a, np.zeros(16), STD**2 * np.eye(16), 0.3)
    assert float(found["log_evidence"]) == pytest.approx(exact, abs=2e-3)
    assert found["draws"].shape == (16, 1, 4, 4)


def test_projections_are_counted_over_half_a_turn(images, files):
    """The projection at 0 is the sums of the columns, that at 90 degrees of the rows."""
    columns = np.kron(np.ones((1, 4)), np.eye(4))
    rows = np.kron(np.eye(4), np.ones((1, 4)))[::-1]
    # Six bins of width 1 about the centre: one without a pixel on each side
    a = np.concatenate([np.pad(m, ((1, 1), (0, 0))) for m in (columns, rows)])
    y = RNG.normal(size=(1, 2, 6))
    np.save("y.npy", y)
    options = ("--radon", 2, "--data", "y.npy", "--noise", 0.3, *SHORT)
    found = restored(Path("x.npz"), images, *options)
    exact = evidence(y, a, np.zeros(16), STD**2 * np.eye(16), 0.3)
    assert float(found["log_evidence"]) == pytest.approx(exact, abs=2e-3)


def test_what_a_mask_hides_may_be_anything(images, files):
    whole = RNG.normal(size=(2, 1, 2, 2))
    whole[:, 0, 0, 1] = np.nan
    options = ("--downsample", 2, "--mask", "hidden.npy", "--noise", 0.3, *SHORT)
    np.save("whole.npy", whole)
    np.save("rows.npy", whole[:, 0, HIDDEN > 0])
    one, two = (
        restored(Path("x.npz"), images, *options, "--data", name)
        for name in ("whole.npy", "rows.npy")
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    complex_y = RNG.normal(size=(1, 2)) + 1j * RNG.normal(size=(1, 2))
    np.save("complex.npy", complex_y)
    np.save("pairs.npy", np.stack([complex_y.real, complex_y.imag], -1))
    options = ("--fourier", "frequencies.npy", "--noise", 0.3, *SHORT)
    one, two = (
        restored(Path("x.npz"), images, *options, "--data", name)
        for name in ("complex.npy", "pairs.npy")
    )
    assert np.array_equal(one["draws"], two["draws"])


@pytest.mark.parametrize("kind", ["image", "folder", "integers"])
def test_grey_levels_have_noise_in_grey_levels(kind, images, files, capsys):
    """Levels k = (L (x + 1) - 1) / 2 measured by any A, also one that keeps no constants."""
    n, levels = (2, 256) if kind == "folder" else (1, 17 if kind == "integers" else 256)
    y = RNG.integers(0, 17, (n, 4, 4)).astype(np.uint8)
    Path("seen").mkdir()
    for i, pixels in enumerate(y):
        Image.fromarray(pixels).save(f"seen/{i}.png")
    np.save("y.npy", y)
    name = {"image": "seen/0.png", "folder": "seen", "integers": "y.npy"}[kind]
    options = ("--blur", "line.npy", "--data", name, "--noise", 3, *SHORT)
    found = restored(Path("x.npz"), images, *options)
    a, half = np.kron(np.eye(4), circulant(KERNEL)), levels / 2
    exact = [evidence(k, a, np.full(16, half - 0.5), (half * STD) ** 2 * np.eye(16), 3) for k in y]
    # The density is that in the units of x
    np.testing.assert_allclose(
        found["log_evidence"].ravel(), np.array(exact) + 16 * math.log(half), atol=2e-2
    )
    assert f"noise 3 of {levels} grey levels, {3 / half:.4g} on [-1, 1]" in capsys.readouterr().out


def test_a_mask_may_be_an_image(images, files):
    mask = np.tile([0, 100, 200, 255], (4, 1)).astype(np.uint8)
    Image.fromarray(mask).save("mask.png")
    np.save("mask.npy", mask > 127)
    np.save("y.npy", RNG.normal(size=(1, 4, 4)))
    one, two = (
        restored(Path("x.npz"), images, "--mask", m, "--data", "y.npy", "--noise", 1, *SHORT)
        for m in ("mask.png", "mask.npy")
    )
    assert np.array_equal(one["draws"], two["draws"])


# ---- what is written and said ----


def test_pictures_hold_what_arrays_hold(images, files):
    np.save("y.npy", RNG.normal(size=(2, 1, 2, 2)) / 4)
    options = ("--downsample", 2, "--data", "y.npy", "--noise", 0.2, *SHORT, "--label", 1)
    found = restored(Path("x.npz"), images, *options, "--draws", 2)
    assert run("restore", images, *options, "--draws", 2, "--out", "pictures/new") == 0
    names = [f"{i}_{name}.png" for i in range(2) for name in ("draw_0", "draw_1", "mean")]
    names += [f"{i}_{name}.png" for i in range(2) for name in ("observed", "std")]
    assert sorted(p.name for p in Path("pictures/new").iterdir()) == sorted(names)

    def pixels(name: str) -> np.ndarray:
        return np.asarray(Image.open(f"pictures/new/{name}.png"))

    def levels(x: np.ndarray) -> np.ndarray:
        return np.floor(128 * (x.astype(np.float64) + 1)).clip(0, 255)

    y = np.load("y.npy")
    for i in range(2):
        assert np.array_equal(pixels(f"{i}_mean"), levels(found["mean"][i, 0]))
        assert np.array_equal(pixels(f"{i}_draw_1"), levels(found["draws"][i, 1, 0]))
        seen = np.kron(y[i, 0], np.ones((2, 2)))
        assert np.array_equal(pixels(f"{i}_observed"), levels(seen.astype(np.float32)))
        assert pixels(f"{i}_std").max() == 255
    assert run("restore", images, *options, "--out", "sheet.png") == 0
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_draws_the_same(table, files):
    np.save("mask.npy", [1, 0, 1])
    np.save("y.npy", [1.0, 11.0])
    options = ("--mask", "mask.npy", "--data", "y.npy", "--noise", 0.1, *SHORT)
    one, two, other = (
        restored(Path("x.npz"), table, *options, "--chunk", chunk, "--seed", seed)["draws"]
        for chunk, seed in ((500, 0), (7, 0), (500, 1))
    )
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert not np.allclose(one, other)


@pytest.mark.parametrize(("at", "noise", "words"), [(40, 1, "A another"), (0, 80, "is smaller")])
def test_what_does_not_fit_is_said(at, noise, words, table, files, capsys):
    np.save("mask.npy", np.ones(3))
    np.save("y.npy", np.stack([SHIFT + at * SCALE]))
    options = ("--mask", "mask.npy", "--data", "y.npy", "--noise", noise, "--out", "x.npz")
    assert run("restore", table, *options, *SHORT) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sde-gen restore: warning: 1 of 1 observations do not fit")
    assert words in line


@pytest.mark.parametrize(
    ("at", "noise", "method", "words"),
    [
        (1e300, 1, "particles", "the weights of the particles are not finite"),
        (0, 1e-300, "particles", "the weights of the particles are not finite"),
        (1e300, 1, "term", "the score is not finite"),
    ],
)
def test_what_is_not_finite_is_not_written(at, noise, method, words, table, files, capsys):
    np.save("mask.npy", np.ones(3))
    np.save("y.npy", np.stack([SHIFT + at * SCALE]))
    options = ("--mask", "mask.npy", "--data", "y.npy", "--noise", noise, "--out", "x.npz")
    capsys.readouterr()
    assert run("restore", table, *options, "--method", method, *SHORT) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not Path("x.npz").exists()


# ---- what is refused ----

GOOD = {"--downsample": 2, "--data": "y.npy", "--noise": 0.1, "--out": "x.npz"}
REFUSED = {
    "no operator": ({"--downsample": None}, "say what was measured of x: --mask, --downsample"),
    "noise 0": ({"--noise": 0}, "--noise must be a standard deviation above 0"),
    "noise < 0": ({"--noise": -1}, "--noise must be a standard deviation above 0"),
    "noise NaN": ({"--noise": "nan"}, "--noise must be a standard deviation above 0"),
    "noise infinite": ({"--noise": "inf"}, "--noise must be a standard deviation above 0"),
    "factor 3": ({"--downsample": 3}, "--downsample 3: factor (3, 3) does not divide"),
    "factor text": ({"--downsample": "two"}, "--downsample two: is no whole number"),
    "factor 0": ({"--downsample": 0}, "--downsample 0: is no whole number above 0"),
    "no mask": ({"--mask": "none.npy"}, "no array file at none.npy"),
    "a mask before": ({"--mask": "whole.npy"}, "--mask whole.npy: is (1, 4, 4), expected (1, 2"),
    "a mask of 2": ({"--mask": "two.npy"}, "must hold 0 (hidden) and 1 (observed) alone"),
    "an image beside a mask": (
        {"--mask": "large.npy", "--downsample": None, "--data": "small.png"},
        "--data small.png: is (1, 3, 4), the mask (1, 4, 4): cut or resize it to that first",
    ),
    "a mask of none": ({"--mask": "blind.npy"}, "observes nothing"),
    "a width below 0": ({"--blur": -1}, "--blur -1: is no width of a Gaussian above 0"),
    "a large kernel": ({"--blur": "whole.npy"}, "--blur whole.npy: a circular kernel must fit"),
    "a NaN kernel": ({"--blur": "nan.npy"}, "--blur nan.npy: kernel"),
    "columns": ({"--matrix": "a.npy"}, "--matrix a.npy: matrix (2, 3) has 3 columns"),
    "a complex matrix": ({"--matrix": "complex.npy"}, "holds complex128, expected real"),
    "a frequency": ({"--fourier": "whole.npy"}, "--fourier whole.npy: mask (1, 4, 4) must have"),
    "no angle": ({"--radon": 0}, "--radon 0: is no number of angles above 0"),
    "no data": ({"--data": "none.npy"}, "no array file at none.npy"),
    "text": ({"--data": "y.txt"}, "--data y.txt: y.txt: expected a .npy or .npz file"),
    "another y": (
        {"--data": "whole.npy"},
        "--data whole.npy: y must be what Downsample",
    ),
    "NaN": ({"--data": "nan.npy"}, "--data nan.npy: y has 4 NaN or infinite values"),
    "empty": ({"--data": "empty.npy"}, "--data empty.npy: holds float64 (0, 1, 2, 2)"),
    "bool": ({"--data": "blind.npy"}, "--data blind.npy: holds bool"),
    "high levels": ({"--data": "two.npy"}, "--data two.npy: levels must lie in 0 .. 16"),
    "two arrays": ({"--data": "y.npz"}, "--data y.npz: y.npz holds the arrays ['a', 'b']"),
    "an image": ({"--data": "y.png"}, "--data y.png: y must be what Downsample"),
    "no image": ({"--data": "bad.png"}, "--data bad.png: cannot read bad.png as an image"),
    "no images": ({"--data": "."}, "folder pictures, whose images would be left out"),
    "images of rows": (
        {"--matrix": "b.npy", "--downsample": None, "--data": "y.png"},
        "--data y.png: holds images, but what is measured is (2,)",
    ),
    "a gif": ({"--out": "x.gif"}, "--out must end in .npz or .png, or be a folder"),
    "a folder in the way": ({"--out": "way.npz"}, "way.npz is a folder"),
    "files in the way": ({"--out": "pictures"}, "pictures holds files"),
    "a file in the way": ({"--out": "y.npy/x.npz"}, "y.npy/x.npz cannot be written"),
    "no class": ({"--label": 3}, "--label must lie in 0 .. 2, got 3"),
    "no draws": ({"--draws": 0}, "--draws must be at least 1, got 0"),
    "one draw": ({"--draws": 1, "--method": "term"}, "needs 2 or more --draws"),
    "no steps": ({"--steps": 0}, "--steps must be at least 1, got 0"),
    "one particle": ({"--particles": 1}, "--particles must be at least 2, got 1"),
    "no device": ({"--device": "abacus"}, "device"),
}


@pytest.fixture
def wrong(files):
    np.save("y.npy", np.zeros((1, 2, 2)))
    np.save("whole.npy", np.ones((1, 4, 4)))
    np.save("two.npy", np.full((1, 2, 2), 20))
    np.save("blind.npy", np.zeros((1, 2, 2), bool))
    np.save("nan.npy", np.full((1, 2, 2), np.nan))
    np.save("empty.npy", np.zeros((0, 1, 2, 2)))
    np.save("a.npy", MATRIX)
    np.save("b.npy", np.ones((2, 16)))
    np.save("complex.npy", np.ones((2, 4)) * 1j)
    np.savez("y.npz", a=np.zeros((1, 2, 2)), b=np.zeros((1, 2, 2)))
    Path("y.txt").write_text("1 2 3")
    Path("bad.png").write_text("1 2 3")
    Image.new("L", (4, 4)).save("y.png")
    Image.new("L", (4, 3)).save("small.png")
    np.save("large.npy", np.eye(4)[None])
    Path("way.npz").mkdir()
    Path("pictures").mkdir()
    Image.new("L", (4, 4)).save("pictures/y.png")
    return sorted(Path().rglob("*"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_the_work(name, images, wrong, capsys, monkeypatch):
    changed, words = REFUSED[name]
    monkeypatch.setattr(UNet, "compute", None)
    options = [a for k, v in (GOOD | changed).items() if v is not None for a in (k, v)]
    if "--device" not in changed:
        options += ["--device", "cpu"]
    assert words in refused(capsys, images, *options)
    assert sorted(Path().rglob("*")) == wrong


def test_tables_are_no_images(table, wrong, capsys, monkeypatch):
    monkeypatch.setattr(MLP, "compute", None)
    np.save("integers.npy", np.ones(2, int))
    options = ("--matrix", "a.npy", "--noise", 1, "--device", "cpu")
    y = ("--data", "integers.npy")
    assert "knows of no grey levels" in refused(capsys, table, *options, *y, "--out", "x.npz")
    assert "are no images: use --out FILE.npz" in refused(
        capsys, table, *options, *y, "--out", "x.png"
    )
    np.save("floats.npy", np.ones(2))
    y = ("--data", "floats.npy", "--out", "x.npz")
    assert "the model has no classes" in refused(capsys, table, *options, *y, "--label", 0)


def test_rows_that_may_be_a_whole_array_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    facts = sg.Facts(shape=(2, 4), std=1.0)
    model = saved(tmp_path / "model", MLP((2, 4), 2, 1), facts)
    np.save("mask.npy", [[1, 1, 0, 0], [0, 0, 1, 1]])
    options = ("--mask", "mask.npy", "--data", "y.npy", "--noise", 1, "--out", "x.npz", *SHORT)
    np.save("y.npy", np.ones((2, 4)))
    assert "(2, 4) is one whole array, or 2 rows" in refused(capsys, model, *options)
    np.save("y.npy", np.ones((1, 2, 4)))
    assert run("restore", model, *options) == 0


def test_too_many_measurements_are_for_the_term(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    facts = sg.Facts(shape=(2100,), std=1.0)
    model = saved(tmp_path / "model", MLP((2100,), 2, 1), facts)
    np.save("ones.npy", np.ones(2100))
    options = ("--mask", "ones.npy", "--data", "ones.npy", "--noise", 1, "--out", "x.npz")
    assert "take --method term" in refused(capsys, model, *options, "--device", "cpu")
    short = ("--method", "term", "--steps", 3, "--draws", 2, "--device", "cpu")
    assert restored(Path("x.npz"), model, *options, *short)["draws"].shape == (2, 2100)


@pytest.mark.parametrize("missing", ["--noise", "--data", "--out"])
def test_what_is_missing_is_named(missing, capsys):
    options = {k: str(v) for k, v in GOOD.items() if k != missing}
    with pytest.raises(SystemExit) as stop:
        run("restore", "model", *[a for pair in options.items() for a in pair])
    assert stop.value.code == 2
    assert f"required: {missing}" in capsys.readouterr().err
