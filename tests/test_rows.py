"""What a model was trained on is remembered by hashes, and counted exactly."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import sde_gen as sg
from sde_gen.networks import MLP
from sde_gen.training import CheckpointError
from sde_gen.training.rows import ROWS, count_known, hashes, remember


def draw(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def test_hashes_are_those_of_the_bytes() -> None:
    x = draw(3, 2, 4)
    for row, found in zip(x.numpy(), hashes(x), strict=True):
        digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
        assert int(found) == int.from_bytes(digest, "little")
    assert (hashes(x) == hashes(x.double())).all()
    assert (hashes(x.mT.contiguous().mT) == hashes(x)).all()
    assert (hashes(-torch.zeros(1, 2)) == hashes(torch.zeros(1, 2))).all()
    near = torch.from_numpy(np.nextafter(x.numpy(), np.float32(9)))
    assert len(np.unique(np.r_[hashes(x), hashes(near)])) == 6


@pytest.mark.parametrize("shape", [(), (2,), (1, 8, 8)])
def test_copies_are_counted_exactly(shape: tuple[int, ...], tmp_path: Path) -> None:
    train, other = draw(1000, *shape), draw(1000, *shape, seed=1)
    assert count_known(train, tmp_path) is None
    remember(train, tmp_path)
    assert count_known(train, tmp_path) == 1000
    assert count_known(other, tmp_path) == 0
    mixed = torch.cat([other, train[:37], train[:5]])[torch.randperm(1042)]
    assert count_known(mixed, tmp_path) == 42
    assert (tmp_path / ROWS).stat().st_size == 8 * 1001
    remember(other, tmp_path)
    assert count_known(mixed, tmp_path) == 1000


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    x = draw(5, 2)
    remember(x, tmp_path)
    whole = (tmp_path / ROWS).read_bytes()
    for n in range(len(whole)):
        (tmp_path / ROWS).write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match=r"trained_on\.bin is damaged"):
            count_known(x, tmp_path)
        (tmp_path / ROWS).write_bytes(whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :])
        with pytest.raises(CheckpointError, match=r"trained_on\.bin is damaged"):
            count_known(x, tmp_path)
    (tmp_path / ROWS).unlink()
    (tmp_path / ROWS).mkdir()
    with pytest.raises(CheckpointError, match=r"trained_on\.bin cannot be read"):
        count_known(x, tmp_path)


def test_training_remembers_its_data(tmp_path: Path) -> None:
    x = draw(64, 2)
    recipe = sg.Recipe(steps=1, batch=8)
    model = sg.ScoreNetwork(MLP((2,), 8, 1), sg.VP())
    sg.train(model, x, recipe=recipe, folder=tmp_path, progress=False)
    assert count_known(torch.cat([x[:9], -x]), tmp_path) == 9
