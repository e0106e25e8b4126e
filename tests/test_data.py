"""The data are what they claim to be, and files that are not are refused."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sde_gen.data import (
    TOYS,
    Dequantise,
    centre,
    class_folders,
    dequantise,
    digits,
    image_folder,
    load_array,
    quantise,
    toy,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_digits_are_split_once_and_stratified():
    train, test = digits("train"), digits("test")
    assert (train.x.shape, test.x.shape) == ((1397, 1, 8, 8), (400, 1, 8, 8))
    assert (train.x.dtype, train.y.dtype) == (torch.float32, torch.int64)
    whole = np.bincount(load_digits().target)
    assert (train.y.bincount() + test.y.bincount()).tolist() == whole.tolist()
    assert np.abs(test.y.bincount().numpy() - whole * 400 / 1797).max() <= 1
    levels = torch.cat([quantise(train.x, 17), quantise(test.x, 17)]).reshape(1797, 64)
    rows = sorted(levels.tolist())
    assert rows == sorted(load_digits().data.astype(int).tolist())


def test_digits_keep_their_labels():
    x, y = digits("test")
    images, labels = load_digits(return_X_y=True)
    known = {tuple(k): label for k, label in zip(images.astype(int), labels, strict=True)}
    assert [known[tuple(row)] for row in quantise(x, 17).reshape(-1, 64).tolist()] == y.tolist()


def test_digits_need_a_known_split_and_scikit_learn(monkeypatch):
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'valid\''):
        digits("valid")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'sde-gen\[data\]'"):
        digits()


@pytest.mark.parametrize("n_levels", [2, 17, 256])
def test_quantise_undoes_centre_and_dequantise(n_levels):
    levels = torch.arange(n_levels).repeat(200_000 // n_levels)
    assert (quantise(centre(levels, n_levels), n_levels) == levels).all()
    x = dequantise(levels, n_levels, seeded())
    assert x.dtype == torch.float32
    assert -1 <= x.min() < x.max() < 1
    assert (quantise(x, n_levels) == levels).all()


def test_dequantised_levels_are_uniform_on_their_cells():
    n, n_levels = 50_000, 5
    levels = torch.arange(n_levels)[:, None].expand(-1, n)
    u = (dequantise(levels, n_levels, seeded()).double() + 1) / 2 * n_levels - levels
    # Mean 1/2, spread 12^-1/2; Kolmogorov-Smirnov passes 1.95 / sqrt(N) once in a thousand
    assert (u.mean(1) - 0.5).abs().max() < 4 / math.sqrt(12 * n)
    rank = (torch.arange(n) + 0.5) / n
    assert (u.sort(1).values - rank).abs().max() < 1.95 / math.sqrt(n)
    assert centre(levels, n_levels)[:, 0].tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8])


def test_dequantise_redraws_the_place_in_the_cell():
    x = digits("test").x
    redraw, generator = Dequantise(17), seeded()
    first, second = redraw(x, generator), redraw(x, generator)
    assert (first != second).float().mean() > 0.99
    assert (quantise(first, 17) == quantise(x, 17)).all()
    assert (redraw(first, seeded(1)) == redraw(x, seeded(1))).all()
    assert (redraw(x, seeded(1)) == dequantise(quantise(x, 17), 17, seeded(1))).all()


def test_levels_are_checked():
    with pytest.raises(TypeError, match=r"levels must be integers 0 .. 255, got torch.float32"):
        centre(torch.zeros(3), 256)
    with pytest.raises(ValueError, match=r"levels must lie in 0 .. 16, got -1 .. 17"):
        dequantise(torch.tensor([-1, 17]), 17)
    with pytest.raises(ValueError, match="n_levels must be at least 2, got 1"):
        centre(torch.zeros(3, dtype=torch.uint8), 1)
    with pytest.raises(TypeError, match=r"takes floats in \[-1, 1\], got torch.uint8"):
        quantise(torch.zeros(3, dtype=torch.uint8), 256)
    with pytest.raises(ValueError, match="x has NaN"):
        quantise(torch.tensor([math.nan]), 256)


# Mean and covariance of each toy, from its definition.
def moon_moments() -> tuple[float, float, float]:
    # (cos a - 1/2, sin a - 1/4) with a random sign: the second moments, a ~ U[0, pi)
    xx, yy = 1 / 2 + 1 / 4, 1 / 2 - 1 / math.pi + 1 / 16
    return xx + 0.05**2, yy + 0.05**2, -1 / math.pi + 1 / 8


def roll_moments() -> tuple[list[float], list[float]]:
    a = math.pi * (1.5 + 3 * (np.arange(100_000) + 0.5) / 100_000)
    points = np.stack([a * np.cos(a), a * np.sin(a)], 1) / (4.5 * math.pi)
    covariance = np.cov(points.T) + 0.02**2 * np.eye(2)
    return list(points.mean(0)), list(covariance[[0, 1, 0], [0, 1, 1]])


MOMENTS = {
    "eight_gaussians": ([0, 0], [0.51, 0.51, 0]),
    "grid_25": ([0, 0], [0.5 + 0.03**2, 0.5 + 0.03**2, 0]),
    "two_moons": ([0, 0], moon_moments()),
    "swiss_roll": roll_moments(),
    "checkerboard": ([0, 0], [1 / 3, 1 / 3, 1 / 16]),
}


@pytest.mark.parametrize("name", TOYS)
def test_toys_have_their_moments(name):
    n = 40_000
    x = toy(name, n, seeded()).double()
    assert x.shape == (n, 2)
    mean, (xx, yy, xy) = MOMENTS[name]
    # All toys lie within about 1.5: a product of coordinates has a spread below 1.
    assert x.mean(0).tolist() == pytest.approx(mean, abs=4 / math.sqrt(n))
    c = x.T.cov()
    assert [c[0, 0], c[1, 1], c[0, 1]] == pytest.approx([xx, yy, xy], abs=4 / math.sqrt(n))


def test_toys_have_their_shapes():
    ring = toy("eight_gaussians", 4000, seeded())
    assert (torch.atan2(ring[:, 1], ring[:, 0]) / (math.pi / 4)).round().unique().numel() in (8, 9)
    grid = toy("grid_25", 4000, seeded()) * 2
    assert (grid - grid.round()).std().item() == pytest.approx(0.06, rel=0.05)
    assert grid.round().unique(dim=0).shape == (25, 2)
    board = ((toy("checkerboard", 4000, seeded()) + 1) * 2).floor()
    assert ((board.sum(1) % 2) == 0).all()
    assert board.unique(dim=0).shape == (8, 2)
    roll = toy("swiss_roll", 4000, seeded())
    radius, angle = roll.norm(dim=1) * 4.5 * math.pi, torch.atan2(roll[:, 1], roll[:, 0])
    off = torch.remainder(radius - angle + math.pi, 2 * math.pi) - math.pi
    assert off.std() < 0.02 * 4.5 * math.pi * 1.2
    moons = toy("two_moons", 4000, seeded())
    upper = (moons + torch.tensor([0.5, 0.25])).norm(dim=1) - 1
    lower = (moons - torch.tensor([0.5, 0.25])).norm(dim=1) - 1
    assert torch.minimum(upper.abs(), lower.abs()).max() < 5 * 0.05


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_drawn_from_the_generator_alone(name):
    before = torch.get_rng_state()
    first = toy(name, 10)
    assert (first == toy(name, 10, seeded(0))).all()
    assert (first != toy(name, 10, seeded(1))).any()
    assert (torch.get_rng_state() == before).all()


def test_toys_are_checked():
    with pytest.raises(ValueError, match=r"toy must be one of \['checkerboard', .*, got 'moons'"):
        toy("moons", 3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        toy("grid_25", 0)


@pytest.fixture
def folder(tmp_path):
    pixels = np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3)
    for name, image in zip(["b.png", "a.PNG"], pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_image_folder(folder):
    x = image_folder(folder)
    assert (x.shape, x.dtype) == ((2, 3, 3, 5), torch.float32)
    expected = torch.arange(2 * 3 * 5 * 3).reshape(2, 3, 5, 3).permute(0, 3, 1, 2).flip(0)
    assert (quantise(x, 256) == expected).all()
    assert x[1, 0, 0, 0].item() == pytest.approx(1 / 256 - 1)
    grey = image_folder(str(folder), channels=1)
    assert grey.shape == (2, 1, 3, 5)
    assert grey.mean().item() == pytest.approx(x.mean().item(), abs=2 / 128)


def test_class_folders(folder, tmp_path):
    for i, name in enumerate(["zebra", "ape"]):
        (tmp_path / name).mkdir()
        for k in range(i + 1):
            Image.new("L", (4, 4), 100 * i).save(tmp_path / name / f"{k}.png")
    x, y = class_folders(tmp_path, channels=1)
    assert quantise(x, 256)[:, 0, 0, 0].tolist() == [100, 100, 0]
    assert y.tolist() == [0, 0, 1]
    Image.new("L", (5, 5)).save(tmp_path / "ape" / "0.png")
    with pytest.raises(ValueError, match=r"1.png is 4 x 4 but 0.png is 5 x 5: all images"):
        class_folders(tmp_path)
    (tmp_path / "ape" / "1.png").unlink()
    with pytest.raises(ValueError, match="classes have images of different sizes"):
        class_folders(tmp_path)


def test_image_folder_says_what_is_wrong(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of images at"):
        image_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(colour\), got 4"):
        image_folder(folder, channels=4)  # type: ignore[arg-type]
    content = (folder / "a.PNG").read_bytes()
    (folder / "b.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*b\.png as an image"):
        image_folder(folder)
    (folder / "b.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read .*b\.png as an image"):
        image_folder(folder)
    Image.fromarray(np.zeros((3, 5), dtype=np.uint16)).save(folder / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has more than 8 bits a channel"):
        image_folder(folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in"):
        image_folder(folder / "empty")
    with pytest.raises(FileNotFoundError, match="no class folders at"):
        class_folders(folder / "empty")


def test_load_array(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 3))
    np.save(tmp_path / "x.npy", values)
    x = load_array(tmp_path / "x.npy")
    assert x.dtype == torch.float32
    assert (x.numpy() == values.astype(np.float32)).all()
    np.savez(tmp_path / "one.npz", values)
    assert (load_array(str(tmp_path / "one.npz")) == x).all()
    np.savez(tmp_path / "two.npz", x=values, levels=np.array([[0, 255]], dtype=np.uint8))
    assert (load_array(tmp_path / "two.npz", key="x") == x).all()
    levels = load_array(tmp_path / "two.npz", key="levels", n_levels=256)
    assert levels.tolist() == [[1 / 256 - 1, 1 - 1 / 256]]


def test_load_array_says_what_is_wrong(tmp_path):
    file = tmp_path / "x.npy"
    with pytest.raises(FileNotFoundError, match="no array file at"):
        load_array(file)
    np.save(file, np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(TypeError, match=r"holds integers \(uint8\): give .* n_levels=256"):
        load_array(file)
    np.save(file, np.array([[0, 1], [math.inf, math.nan]]))
    with pytest.raises(ValueError, match=r"NaN or infinity, the first at index \(1, 0\)"):
        load_array(file)
    np.save(file, np.array([True]))
    with pytest.raises(TypeError, match="holds bool, expected floats or integers"):
        load_array(file)
    for empty in (np.zeros((0, 3)), np.zeros(())):
        np.save(file, empty)
        with pytest.raises(ValueError, match=r"expected \(N, \*D\) with N >= 1"):
            load_array(file)
    np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"as a numeric array: .*allow_pickle"):
        load_array(file)
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds the arrays \['a', 'b'\]: choose one .* got None"):
        load_array(tmp_path / "two.npz")
    content = (tmp_path / "two.npz").read_bytes()
    for name in ("cut.npz", "cut.npy"):
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"cannot read .*{name} as a numeric array"):
            load_array(tmp_path / name)
    (tmp_path / "x.csv").write_text("1, 2")
    with pytest.raises(ValueError, match=r"expected a .npy or .npz file"):
        load_array(tmp_path / "x.csv")
