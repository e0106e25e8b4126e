"""Damaged files of every kind that is read: an answer, or an error that names the file.

Files of each format are damaged by a seeded hand: bits, cuts, gaps, repetitions, numbers in
headers. What is read all the same is data; anything but a ``ValueError``, ``TypeError`` or
``FileNotFoundError`` with the name of the file is a fault.
"""

from __future__ import annotations

import io
import random
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from outcomes import outcome
from PIL import Image

from sde_gen.data import class_folders, image_folder, load_array, load_labels

REFUSALS = (ValueError, TypeError, FileNotFoundError)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
EXIF = Image.Exif()
EXIF[274], EXIF[270] = 6, "some words"


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def npz(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, x=RNG.normal(size=(4, 3)), y=np.arange(4))
    return file.getvalue()


def picture(mode: str, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, form, **options)
    return file.getvalue()


WHOLE = {
    "npy": [
        npy(RNG.normal(size=(4, 3))),
        npy(RNG.integers(0, 200, (5, 2))),
        npy(RNG.normal(size=(2, 2)), (3, 0)),
        npy(RNG.normal(size=(2, 2)).astype(">f4")),
        npy(np.zeros(3, [("a", "f4"), ("b", "i4")])),
    ],
    "npz": [npz(np.savez), npz(np.savez_compressed)],
    "csv": [b"a, b\n1, 2\n3, 4\n"],
    "png": [picture(mode, "PNG", exif=EXIF) for mode in ("RGB", "L", "P", "RGBA", "1")],
    "jpg": [picture(mode, "JPEG", exif=EXIF) for mode in ("RGB", "L", "CMYK")],
    "gif": [picture("P", "GIF")],
    "bmp": [picture("RGB", "BMP"), picture("P", "BMP")],
    "webp": [picture("RGB", "WEBP", exif=EXIF), picture("RGBA", "WEBP", lossless=True)],
    "tif": [
        picture("RGB", "TIFF"),
        picture("RGB", "TIFF", compression="tiff_lzw"),
        picture("RGB", "TIFF", compression="jpeg"),
        picture("L", "TIFF", compression="tiff_deflate"),
    ],
    "ppm": [picture("RGB", "PPM"), b"P3\n3 2\n255\n" + b" 1 2 3" * 6, b"P2 2 2 15 1 2 3 4"],
}

# What may stand in the header of a .npy file in place of what should.
WORDS = r"""
-1 0 10**9 99999999999999999999 (2,) 'a' None True [1] {} 1j 2.0 (2,2) (3,True) ((1,),) (-1,2)
(2**40,) (1099511627776,) (4294967296,4294967296) 1L (2L,2L) '\x00' [[[[[ (((( \ # '
'<f8' 'O' '|V0' '<M8[D]' '<U3' '<f16' '<c8' '|S0' 'f8,f8' b'<f8' ('<f4',(2,)) ('O',{})
[('a','<f4')] [('a',)] [()] [('a','<f4',(-1,))] {'names':['a'],'formats':['f4']}
"""
LITERALS = [*WORDS.split(), "-" * 3000 + "1", "(" * 300 + "1" + ")" * 300, "\n  x\n y", "\0"]


def header(rng: random.Random) -> bytes:
    """A .npy file whose header is a dictionary of odd things."""
    usual = {"descr": "'<f8'", "fortran_order": "False", "shape": "(2, 2)"}
    values = {k: rng.choice(LITERALS) if rng.random() < 0.5 else v for k, v in usual.items()}
    text = "{" + ", ".join(f"'{k}': {v}" for k, v in values.items()) + ", }"
    text += rng.choice(["\n", "", "\\", "\n  x\n y", "#", "'", "\0"])
    version = rng.choice([1, 2, 3])
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode("latin1") + bytes(32)


def archive(rng: random.Random) -> bytes:
    """A .npz of any zip method, with such headers in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice([0, 8, 12, 14])) as opened:
        opened.writestr("x.npy", rng.choice([header(rng), WHOLE["npy"][0]]))
        opened.writestr("y.npy", header(rng))
    return file.getvalue()


def damaged(whole: bytes, rng: random.Random) -> bytes:
    b = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 4])):
        n = len(b)
        i = rng.randrange(min(n, rng.choice([n, 60])) + 1)
        size, kind = rng.randrange(1, 9), rng.randrange(7)
        if kind == 0 and n:
            b[min(i, n - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del b[i:]
        elif kind == 2:
            b[i:i] = rng.randbytes(size)
        elif kind == 3:
            b[i : i + size] = rng.randbytes(size)
        elif kind == 4:
            b[i : i + size] = bytes([rng.choice([0, 255])]) * size
        elif kind == 5:
            del b[i : i + size]
        else:
            j = rng.randrange(n + 1)
            b[i:i] = b[j : j + 5 * size]
    return bytes(b)


def one_file(kind: str, rng: random.Random) -> bytes:
    odd = {"npy": header, "npz": archive}.get(kind)
    if odd is not None and rng.random() < 0.4:
        return odd(rng) if rng.random() < 0.7 else damaged(odd(rng), rng)
    return damaged(rng.choice(WHOLE[kind]), rng)


def read(file: Path, rng: random.Random) -> object:
    if file.suffix in (".npy", ".npz", ".csv"):
        if file.suffix == ".npz" and rng.random() < 0.5:
            return load_labels(file, "y")
        return load_array(file, rng.choice([None, "x"]), rng.choice([None, 256]))
    reader = image_folder if rng.random() < 0.8 else class_folders
    channels = rng.choice([1, 3])
    return reader(file.parent if reader is image_folder else file.parents[1], channels)


def faults(n: int, root: Path, seed: int) -> tuple[Counter[str], Counter[str]]:
    """What n damaged files lead to that they should not, and how often which kind is read."""
    rng = random.Random(seed)
    wrong: Counter[str] = Counter()
    fine: Counter[str] = Counter()
    for i in range(n):
        kind = rng.choice([*WHOLE])
        file = root / "data" / "kind" / f"damaged{i}.{kind}"
        file.parent.mkdir(parents=True)
        file.write_bytes(one_file(kind, rng))
        error = outcome(lambda file=file: read(file, rng))
        if error is None:
            fine[kind] += 1
        elif not isinstance(error, REFUSALS) or file.name not in str(error):
            wrong[f"{kind}: {type(error).__name__}: {error}"[:150]] += 1
        shutil.rmtree(root / "data")
    return wrong, fine


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged size of 36 megapixels is no fault, but takes seconds."""
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100_000)


def run(n: int, root: Path, seed: int) -> None:
    wrong, fine = faults(n, root, seed)
    assert not wrong, "\n".join(f"{count} times {what}" for what, count in wrong.most_common())
    # Neither everything is refused nor is everything whole
    assert 0.03 * n < fine.total() < 0.5 * n


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    run(400, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_damaged_files_are_refused_by_name(tmp_path: Path, seed: int) -> None:
    run(1500, tmp_path, seed)


def test_whole_files_are_read(tmp_path: Path) -> None:
    """Else the fuzz would prove nothing."""
    rng = random.Random(0)
    for kind, files in WHOLE.items():
        for i, whole in enumerate(files):
            if kind == "csv" or (kind, i) == ("npy", 4):
                continue
            file = tmp_path / f"{kind}{i}" / "kind" / f"x.{kind}"
            file.parent.mkdir(parents=True)
            file.write_bytes(whole)
            if kind in ("npy", "npz"):
                assert len(load_array(file, "x", 256 if (kind, i) == ("npy", 1) else None))
            else:
                assert read(file, rng) is not None


def test_folders_that_are_none(tmp_path: Path) -> None:
    """Trees of folders, files, links to nowhere and to themselves: by name again."""
    rng = random.Random(0)
    for i in range(200):
        root = tmp_path / str(i)
        root.mkdir()
        places = [root]
        for k in range(rng.randrange(6)):
            place, name = rng.choice(places), rng.choice([f"{k}", f".{k}", f"{k}.png", f"{k}.txt"])
            what = rng.randrange(4)
            if what == 0:
                (place / name).mkdir()
                places.append(place / name)
            elif what == 1:
                (place / name).write_bytes(rng.choice(WHOLE["png"]))
            elif what == 2:
                (place / name).symlink_to(rng.choice([place / "gone", place / name]))
            else:
                (place / name).write_bytes(b"")
        for reader in (image_folder, class_folders):
            error = outcome(lambda reader=reader, root=root: reader(root))
            refused = isinstance(error, REFUSALS) and str(root) in str(error)
            assert error is None or refused, error
