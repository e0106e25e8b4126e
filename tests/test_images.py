"""Folders of images as sources, known sets from their own files, and mirrored images."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sde_gen.data import Flip, Images, cifar10, cifar10_classes, idx_images, load_idx
from sde_gen.noise import Streams


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of smooth pictures of three sizes, one of them turned, one grey."""
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (30, 20), (24, 24)]
    for k, name in enumerate(["coffee", "tea"]):
        (tmp_path / name).mkdir()
        for i, (h, w) in enumerate(sizes):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            picture = coarse.resize((w, h), Image.Resampling.BICUBIC)
            exif = Image.Exif()
            exif[274] = 6 if (k, i) == (1, 0) else 1
            picture.save(tmp_path / name / f"{i}.jpg", quality=95, exif=exif)
    return tmp_path


def test_images_of_several_sizes_are_made_one(photos):
    images = Images(photos, size=(8, 12))
    assert len(images) == 6
    assert images.shape == (3, 8, 12)
    assert images.classes == ("coffee", "tea")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dict(images.sizes) == {(20, 30): 1, (30, 20): 3, (24, 24): 2}
    whole = images.load()
    assert (whole.shape, whole.dtype) == ((6, 3, 8, 12), torch.uint8)
    for i, file in enumerate(images.files):
        upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        fitted = ImageOps.fit(upright, (12, 8), Image.Resampling.LANCZOS)
        x, y = images[i]
        assert y == i // 3
        assert torch.equal(x, whole[i])
        # Decoding at a part of the size rounds otherwise
        far = x.permute(1, 2, 0).numpy().astype(int) - np.asarray(fitted).astype(int)
        assert np.abs(far).mean() < 3
    with pytest.raises(ValueError, match=r"1.jpg is 30 x 20 but 0.jpg is 20 x 30: all images"):
        Images(photos)


def test_a_random_crop_is_a_part_that_moves(tmp_path):
    ramp = np.arange(0, 240, 4, dtype=np.uint8)[None].repeat(10, 0)  # 10 x 60, brighter rightwards
    Image.fromarray(ramp).save(tmp_path / "x.png")
    images = Images(tmp_path, size=10, crop="random")
    assert images.channels == 1
    torch.manual_seed(0)
    starts = [int(images[0][0, 5, 0]) for _ in range(400)]
    assert min(starts) < 12
    assert max(starts) > 188
    # Of a uniform place: mean 100, and a standard error of 200 / sqrt(12 * 400) = 2.9
    assert np.mean(starts) == pytest.approx(100, abs=4.5 * 2.9)
    middle = Images(tmp_path, size=10)[0]
    assert int(middle[0, 5, 0]) == pytest.approx(100, abs=4)


def test_colour_and_grey_are_as_the_files_are(tmp_path):
    for i in range(2):
        Image.new("L", (4, 4), 100).save(tmp_path / f"{i}.png")
    assert Images(tmp_path).channels == 1
    assert Images(tmp_path, channels=3).channels == 3
    Image.new("RGB", (4, 4)).save(tmp_path / "2.png")
    assert Images(tmp_path).channels == 3
    assert Images(tmp_path).load().shape == (3, 3, 4, 4)


def test_all_files_that_cannot_be_read_are_named_at_once(photos):
    (photos / "coffee" / "a.png").write_bytes(b"no image")
    (photos / "tea" / "b.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((3, 5), np.uint16)).save(photos / "tea" / "c.png")
    words = r"3 of 9 files will not do: cannot read .*a\.png .*; cannot read .*b\.jpg .*;"
    with pytest.raises(ValueError, match=words + r" .*c\.png has more than 8 bits"):
        Images(photos, size=8)
    for name in ("coffee/a.png", "tea/b.jpg", "tea/c.png"):
        (photos / name).unlink()
    images = Images(photos, size=8)
    for name in ("coffee/0.jpg", "tea/2.jpg"):  # cut after the head
        content = (photos / name).read_bytes()
        (photos / name).write_bytes(content[: len(content) // 2 + 200])
    with pytest.raises(ValueError, match=r"2 of 6 files will not do: .*0\.jpg.*2\.jpg"):
        images.load()
    for i in range(30):
        (photos / "tea" / f"bad{i}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"30 of 36 .*; and 10 more"):
        Images(photos, size=8)


def test_images_refuse(photos):
    with pytest.raises(ValueError, match="size must be an integer >= 1, got 0"):
        Images(photos, size=0)
    with pytest.raises(ValueError, match=r"crop must be one of \['centre', 'random'\]"):
        Images(photos, size=4, crop="left")
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        Images(photos / "nowhere")


def test_flips_are_functions_of_the_sample():
    x = torch.arange(400 * 6.0).reshape(400, 1, 2, 3)
    flipped = Flip()(x, Streams(0, 1000))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert (mirrored | (flipped == x).flatten(1).all(1)).all()
    assert abs(int(mirrored.sum()) - 200) < 4.5 * 10
    assert torch.equal(Flip()(x[100:110], Streams(0, 1100)), flipped[100:110])
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), got \(4, 2\)"):
        Flip()(torch.zeros(4, 2), Streams(0))


# --- sets from their own files ----------------------------------------------------------------


def test_cifar10_is_read_as_it_is_written(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    records = np.concatenate([labels[:, None], pixels.reshape(12, -1)], 1)
    for k in range(5):
        (tmp_path / f"data_batch_{k + 1}.bin").write_bytes(records[2 * k : 2 * k + 2].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[10:].tobytes())
    train, test = cifar10(tmp_path), cifar10(str(tmp_path), "test")
    assert torch.equal(train.x, torch.from_numpy(pixels[:10]))
    assert torch.equal(test.x, torch.from_numpy(pixels[10:]))
    assert train.y.tolist() == [*range(10)]
    assert test.y.tolist() == [0, 1]
    assert cifar10_classes(tmp_path) is None
    names = [*"abcdefghij"]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    assert cifar10_classes(tmp_path) == tuple(names)
    (tmp_path / "data_batch_3.bin").write_bytes(records[4:6].tobytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin holds 6145 bytes, .* of 3073 each"):
        cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin is missing"):
        cifar10(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" + bytes(3072))
    with pytest.raises(ValueError, match="it has the label 11"):
        cifar10(tmp_path, "test")
    with pytest.raises(ValueError, match="split must be one of"):
        cifar10(tmp_path, "valid")


def idx(array: np.ndarray, kind: int) -> bytes:
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_as_they_are_written(packed, tmp_path):
    rng = np.random.default_rng(0)
    wanted = {}
    for split, name, n in [("train", "train", 7), ("test", "t10k", 3)]:
        x = rng.integers(0, 256, (n, 5, 6), dtype=np.uint8)
        y = np.arange(n, dtype=np.uint8)
        wanted[split] = x
        for file, array in ((f"{name}-images-idx3-ubyte", x), (f"{name}-labels-idx1-ubyte", y)):
            content = idx(array, 8)
            path = tmp_path / (f"{file}.gz" if packed else file)
            path.write_bytes(gzip.compress(content) if packed else content)
    for split, x in wanted.items():
        found = idx_images(tmp_path, split)
        assert torch.equal(found.x, torch.from_numpy(x)[:, None])
        assert found.y.tolist() == [*range(len(x))]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(8, "u1"), (9, "i1"), (11, "i2"), (12, "i4"), (13, "f4"), (14, "f8")]
)
def test_idx_files_of_every_kind_of_numbers(kind, dtype, tmp_path):
    array = np.array([[1, 2, 3], [100, 0, 5]]).astype(dtype)
    (tmp_path / "x").write_bytes(idx(array, kind))
    found = load_idx(tmp_path / "x")
    assert found.numpy().dtype == np.dtype(dtype)
    assert (found.numpy() == array).all()


def test_idx_files_say_what_is_wrong(tmp_path):
    good = idx(np.zeros((2, 3), np.uint8), 8)
    for content, words in {
        b"": "is no IDX file",
        b"PK\x03\x04": "is no IDX file: it begins with 50 4b 03 04",
        bytes([0, 0, 7, 1]): "is no IDX file",
        good[:-1]: "holds 5 bytes for",
        good[:9]: "holds",
        good + b"0": "holds 7 bytes for",
        b"\x1f\x8b" + good: "cannot be read",
        gzip.compress(good)[:-9]: "cannot be read",
    }.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_idx(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_idx(tmp_path / "y")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(good)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(good)
    with pytest.raises(ValueError, match=r"expected bytes \(N, H, W\)"):
        idx_images(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((4, 2, 2), np.uint8), 8))
    with pytest.raises(ValueError, match="labels for 4 images"):
        idx_images(tmp_path)
