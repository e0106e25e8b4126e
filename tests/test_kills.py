"""Killed again and again, a run that reads a data set with workers is the run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sde_gen.training import load

SCRIPT = """
import random, sys, torch, sde_gen as sg
from sde_gen.networks import MLP
from sde_gen.training import Recipe, train

torch.set_num_threads(1)
folder, seen, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Items:
    def __len__(self):
        return 101

    def __getitem__(self, i):
        return torch.randn(2, generator=torch.Generator().manual_seed(i)) + random.random()

def log(x, noise):
    if noise.seed == 5:  # and not the look at the data before the run
        with open(seen, "a") as file:
            file.write(f"{noise.samples // 16}\\n")
    return x

torch.manual_seed(0)
model = sg.ScoreNetwork(MLP((2,), 16, 1, None, 0.2), sg.VP())
recipe = Recipe(steps=int(sys.argv[4]), batch=16, save_every=1e-3, seed=5, every=5)
train(model, Items(), recipe=recipe, transform=log, folder=folder, resume=True,
      progress=False, device="cpu", workers=workers)
"""


def start(folder: Path, seen: Path, workers: int, steps: int) -> subprocess.Popen:
    words = [sys.executable, "-c", SCRIPT, str(folder), str(seen), str(workers), str(steps)]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})


def lines(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def check_kills(folder: Path, kills: int, steps: int) -> None:
    whole = start(folder / "whole", folder / "all.txt", 0, steps)
    assert whole.wait(timeout=600) == 0
    assert lines(folder / "all.txt") == list(range(steps))
    rng, run, seen = random.Random(0), folder / "run", folder / "seen.txt"
    for k in range(kills):
        before = lines(seen)
        saved = 0
        if (run / "training.pt").exists():
            saved = torch.load(run / "training.pt", weights_only=True)["step"]
        child = start(run, seen, 2 * (k % 2), steps)
        while len(lines(seen)) <= len(before) and child.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        new = lines(seen)[len(before) :]
        # It went on with the step after the last checkpoint, and left out none.
        assert new == list(range(saved, saved + len(new)))
    assert start(run, seen, 0, steps).wait(timeout=600) == 0
    assert set(lines(seen)) == set(range(steps))
    found, wanted = (load(f).state_dict() for f in (run, folder / "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.slow
def test_twenty_kills_lose_what_was_not_saved_and_nothing_else(tmp_path):
    check_kills(tmp_path, 20, 3000)
