"""Several processes, one run: the same samples, the same weights, whoever computes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch

from sde_gen.training import average_of, load

PLAIN = {
    "kind": "mlp",
    "dtype": "float64",
    "recipe": {},
    "shard": False,
    "resume": False,
    "stop": None,
}


def launch(processes: int, folder: Path, *options: dict, command: tuple[str, ...] = ()) -> list:
    """What rank 0 of so many processes on the CPU leaves after each of these runs."""
    start = command or (
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nproc-per-node={processes}", "--standalone"),
    )
    texts = [json.dumps(PLAIN | more) for more in options]
    folder.mkdir(exist_ok=True)
    arguments = [launched.__file__, str(folder / "run"), str(folder / "out"), *texts]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    done = subprocess.run(
        [*start, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{folder / 'out'}.{i}") for i in range(len(options))]


def alone(folder: Path, **options: object) -> dict[str, torch.Tensor]:
    """The same in this process."""
    torch.set_num_threads(1)
    trainer, drawn = launched.trainer_of(str(folder), PLAIN | options)
    launched.run(trainer)
    parts = trainer.recipe.accumulate
    seen = torch.stack(drawn).unflatten(0, (-1, parts)).flatten(1, 2)
    return {**launched.state_of(trainer), "drawn": seen}


def check_same(found: dict, wanted: dict, most: float) -> None:
    assert torch.equal(found["drawn"], wanted["drawn"][-len(found["drawn"]) :])
    for name in ("model", "average", "narrow", "moments"):
        difference = (found[name] - wanted[name]).abs().max() / wanted[name].abs().max()
        assert difference < most, name


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, torch.Tensor]:
    return alone(tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_take_the_steps_of_one(shard, straight, tmp_path):
    """And so do two that compute their half in two parts."""
    parts = {"recipe": {"accumulate": 2}, "shard": shard}
    (found,) = launch(2, tmp_path, parts)
    check_same(found, straight, 1e-12)
    saved = launched.flat(load(tmp_path / "run").parameters())
    assert torch.equal(saved, found["average"])
    made = launched.flat(average_of(tmp_path / "run", 0.05).parameters())
    torch.testing.assert_close(made, found["narrow"], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_a_run_is_taken_up_by_other_numbers_of_processes(shard, straight, tmp_path):
    launch(2, tmp_path, {"shard": shard, "stop": 20})
    middle = alone(tmp_path / "run", resume=True, stop=30, recipe={"accumulate": 4})
    assert len(middle["drawn"]) == 10
    (found,) = launch(2, tmp_path, {"shard": shard, "resume": True})
    assert len(found["drawn"]) == 20
    check_same(found, straight, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_gradients_of_one_step_agree_in_single_precision(shard, tmp_path):
    one = {"kind": "unet", "dtype": "float32", "recipe": {"steps": 1, "batch": 32}}
    wanted = alone(tmp_path / "alone", **one)
    (found,) = launch(2, tmp_path, one | {"shard": shard})
    # After one step the first moment of Adam is the gradient, but for a factor.
    check_same(found, wanted, 1e-5)


@pytest.mark.slow
def test_the_launcher_of_accelerate_says_whether_to_spread(straight, tmp_path):
    command = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"),
        *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
        *("--use_fsdp", "--fsdp_version=2", "--main_process_port=0"),
    )
    (found,) = launch(2, tmp_path, {"shard": None}, command=command)
    check_same(found, straight, 1e-12)
