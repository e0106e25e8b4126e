"""The command line with ``--latent``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sde_gen as sg
from sde_gen.cli import main
from sde_gen.cli.latent import latent_shape
from sde_gen.latent import LatentModel

TRAIN = ["train", "digits", "--batch", "32", "--channels", "8", "--device", "cpu"]


@pytest.mark.filterwarnings("ignore")  # of a model of six steps, which nothing fits
def test_train_sample_evaluate_restore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    train = [*TRAIN, "--latent", "2x4x4", "--out", str(out)]
    assert main([*train, "--steps", "6"]) == 0
    assert "an autoencoder (1, 8, 8) -> (2, 4, 4)" in capsys.readouterr().out
    model = sg.load(out)
    assert isinstance(model, LatentModel)
    assert model.classes == 10
    assert model.facts.levels == 17
    # Both runs go on where they stopped; a new one is refused.
    assert main([*train, "--steps", "8"]) == 2
    assert main([*train, "--steps", "8", "--resume"]) == 0
    again = sg.load(out)
    assert again.fingerprint() != model.fingerprint()
    draw = ["--steps", "3", "--device", "cpu"]
    assert main(["sample", str(out), "--n", "4", "--out", str(tmp_path / "x.npz"), *draw]) == 0
    x = torch.from_numpy(np.load(tmp_path / "x.npz")["x"])
    labels = torch.arange(4)
    torch.testing.assert_close(x, sg.sample(again.given(y=labels), 4, 3, seed=0))
    capsys.readouterr()
    assert main(["evaluate", str(out), "digits", "--n", "8", "--bits", *draw]) == 0
    said = capsys.readouterr().out
    assert "bits per dimension" in said
    assert "none of these 8" in said
    mask = (np.arange(64).reshape(1, 8, 8) % 2).astype(np.float32)
    np.save(tmp_path / "mask.npy", mask)
    np.savez(tmp_path / "y.npz", y=np.zeros(32, np.float32))
    seen = ["--mask", str(tmp_path / "mask.npy"), "--data", str(tmp_path / "y.npz")]
    how = ["--noise", "1", "--particles", "20", "--draws", "2", *draw]
    assert main(["restore", str(out), *seen, *how, "--out", str(tmp_path / "r.npz")]) == 0
    assert np.load(tmp_path / "r.npz")["mean"].shape[-3:] == (1, 8, 8)


def test_shapes_of_latents() -> None:
    assert latent_shape("auto", (3, 30, 17)) == (4, 8, 5)
    assert latent_shape("auto", (7,)) == (7,)
    assert latent_shape("auto", (70,)) == (16,)
    assert latent_shape("12", (1, 8, 8)) == (12,)
    with pytest.raises(ValueError, match="--latent"):
        latent_shape("4,4", (1, 8, 8))


def test_what_it_is_not_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("a,b\n" + "\n".join(f"{i},{i * i}" for i in range(20)))
    out = ["--out", str(tmp_path / "m"), "--steps", "2", "--device", "cpu"]
    assert main(["train", str(tmp_path / "t.csv"), "--latent", "2", *out]) == 2
    assert "not for tables" in capsys.readouterr().err
    assert main([*TRAIN, "--latent", "2x3x3", *out[:4]]) == 2
    assert "halved" in capsys.readouterr().err
