"""How many samples a network gets at once, and in which layout: the same draws, chosen once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sde_gen as sg
from sde_gen.cli import main
from sde_gen.guidance import ClassifierFree
from sde_gen.many import shared
from sde_gen.networks import MLP, UNet
from sde_gen.sampling import Pace, pace, settled, timed
from sde_gen.training import CheckpointError, load, save

torch.manual_seed(0)
NET = UNet((1, 8, 8), 8, (1, 2), 1, classes=3)
for p in NET.parameters():  # the last convolution starts at zero
    nn.init.normal_(p, std=0.1)


def model(net: nn.Module = NET) -> sg.ScoreNetwork:
    return sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts(shape=(1, 8, 8), std=0.5)).eval()


def given(score: sg.Score, n: int) -> sg.Score:
    return score.given(y=torch.arange(n) % 3)


@pytest.fixture
def seen() -> list[tuple[int, bool]]:
    """(rows, whether its channels are last) of each call of the network."""
    calls: list[tuple[int, bool]] = []

    def watch(net: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        calls.append((len(arguments[0]), False))  # of one channel every layout is both

    handle = NET.register_forward_pre_hook(watch)
    yield calls
    handle.remove()


@pytest.fixture
def wide(seen) -> sg.ScoreNetwork:
    """A network of colour images, whose layout shows."""
    torch.manual_seed(1)
    net = UNet((3, 8, 8), 8, (1, 2), 1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    net.register_forward_pre_hook(
        lambda net, a: seen.append(
            (len(a[0]), a[0].is_contiguous(memory_format=torch.channels_last))
        )
    )
    return sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts(shape=(3, 8, 8), std=0.5)).eval()


# --- a pace changes how a network is called, not what is drawn -----------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_draws_are_the_same_at_every_pace(wide, seen, eta) -> None:
    plain = sg.sample(wide, 9, 6, seed=0, eta=eta)
    assert set(seen) == {(9, False)}
    calls = len(seen)
    seen.clear()
    wide.pace = Pace(4, channels_last=True)
    x = sg.sample(wide, 9, 6, seed=0, eta=eta)
    # Three equal parts, each with its channels last in every call.
    assert seen == [(3, True)] * (3 * calls)
    assert x.is_contiguous()
    torch.testing.assert_close(x, plain, rtol=0, atol=2e-5)
    seen.clear()
    assert torch.equal(sg.sample(wide, 9, 6, seed=0, eta=eta, chunk=9), plain)
    assert set(seen) == {(9, False)}


def test_parts_are_equal() -> None:
    for n in range(1, 60):
        for chunk in range(1, 20):
            part, parts = Pace(chunk).part(n), -(-n // chunk)
            assert part <= chunk
            assert -(-n // part) <= parts  # no more of them than there must be
            assert part == math.ceil(n / parts)
    assert Pace().part(7) == 7


def test_trajectories_and_matrix_processes_have_a_pace_too(wide) -> None:
    plain = sg.sample(wide, 5, 3, seed=0, trajectory=True)
    damped = sg.ScoreNetwork(wide.net, sg.CriticallyDamped(), facts=wide.facts).eval()
    lifted = sg.sample(damped, 5, 3, seed=0)
    wide.pace = damped.pace = Pace(2, channels_last=True)
    x = sg.sample(wide, 5, 3, seed=0, trajectory=True)
    torch.testing.assert_close(x, plain, rtol=0, atol=2e-5)
    torch.testing.assert_close(sg.sample(damped, 5, 3, seed=0), lifted, rtol=0, atol=1e-4)


def test_a_callback_and_a_solver_of_the_whole_see_all_at_once(wide, seen) -> None:
    wide.pace, shapes = Pace(2), []
    sg.sample(wide, 5, 3, seed=0, callback=lambda x, t: shapes.append(tuple(x.shape)))
    assert set(shapes) == {(5, 3, 8, 8)}
    seen.clear()
    sg.sample(wide, 5, seed=0, solver=sg.SciPy("RK23", 0.5, 0.5))
    assert {rows for rows, _ in seen} == {5}


def test_the_network_is_found_in_what_holds_it() -> None:
    m, law = model(), sg.Gaussian(sg.VP(), torch.zeros(1, 8, 8), 0.5)
    held = [m, given(m, 4), 0.5 * law + m, ClassifierFree(m, 1.0, y=torch.zeros(4).long()) * 2]
    assert all(pace.network_in(score) is m for score in held)
    assert pace.network_in(law) is None


@pytest.mark.parametrize(
    "wrong", [{"chunk": 0}, {"chunk": 2.5}, {"channels_last": 1}, {"compiled": 0}, {"device": 1}]
)
def test_what_is_no_pace_is_refused(wrong) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        Pace(**wrong)


# --- found by timed calls ------------------------------------------------------------------------


class Machine:
    """Seconds a sample by the law of a machine, in place of the clock."""

    def __init__(self, monkeypatch, law) -> None:
        self.calls: list[Pace] = []

        def seconds(trial: pace.Trial, p: Pace, repeats: int) -> float:
            self.calls.append(p)
            return law(p)

        monkeypatch.setattr(pace.Trial, "seconds", seconds)


def cache(best: int, last: float = 1.0, built: float = 1.0):
    """A call costs something, and a batch beyond a cache more: least at ``best``."""

    def law(p: Pace) -> float:
        n = p.chunk or 1
        factor = (last if p.channels_last else 1.0) * (built if p.compiled else 1.0)
        return 1e-4 * factor * (best / n + n / best)

    return law


@pytest.mark.parametrize("best", [4, 16, 128, 1024])
@pytest.mark.parametrize("last", [0.5, 0.97, 2.0])
@pytest.mark.parametrize("built", [0.5, 2.0])
def test_the_fastest_pace_is_found(monkeypatch, best, last, built) -> None:
    machine = Machine(monkeypatch, cache(best, last, built))
    monkeypatch.setattr(pace, "LONG", {"cpu": math.inf})
    found = timed(model(), compiled=True)
    assert found == Pace(best, last < 0.95, built < 0.95, "cpu")
    assert max(p.chunk for p in machine.calls) <= 4 * max(best, pace.FIRST)
    machine.calls.clear()
    assert timed(given(model(), 5)) == Pace(best, last < 0.95, device="cpu")
    assert not any(p.compiled for p in machine.calls)


def test_a_long_call_is_not_doubled_and_a_layout_that_fails_not_taken(monkeypatch) -> None:
    machine = Machine(monkeypatch, lambda p: math.inf if p.channels_last else 0.1 / p.chunk**0.1)
    assert timed(model()) == Pace(4, device="cpu")
    assert {p.chunk for p in machine.calls} == {4}
    Machine(monkeypatch, lambda p: math.inf)
    assert timed(model()) == Pace(device="cpu")


def test_vectors_have_no_channels(monkeypatch) -> None:
    machine = Machine(monkeypatch, cache(16, last=0.1))
    found = timed(sg.ScoreNetwork(MLP((2,)), sg.VP()))
    assert found == Pace(16, device="cpu")
    assert not any(p.channels_last for p in machine.calls)


def test_real_calls_are_timed_and_nothing_else_is_touched(seen, monkeypatch) -> None:
    monkeypatch.setattr(pace, "LARGEST", 16)
    before, m = torch.get_rng_state(), model()
    found = timed(m)
    assert found.device == "cpu"
    assert found.chunk in (2, 4, 8, 16, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert {rows for rows, _ in seen} >= {4}
    assert all(p.grad is None and p.is_contiguous() for p in m.parameters())
    assert m.pace is None


@pytest.mark.parametrize("what", [lambda: sg.Gaussian(sg.VP(), torch.zeros(2), 0.5), lambda: 3])
def test_only_networks_are_timed(what) -> None:
    with pytest.raises(TypeError, match="ScoreNetwork of known shape"):
        timed(what())


# --- once, where there is work, by one process ---------------------------------------------------


@pytest.fixture
def finds(monkeypatch) -> list[sg.Score]:
    """Each network that was timed."""
    found: list[sg.Score] = []

    def fastest(trial: pace.Trial, compiled: bool) -> Pace:
        found.append(trial.model)
        return Pace(2, device="cpu")

    monkeypatch.setattr(pace, "_fastest", fastest)
    return found


def test_much_work_finds_the_pace_once(finds, seen, monkeypatch) -> None:
    m = model()
    sg.sample(given(m, 6), 6, 3, seed=0)
    assert not finds  # it is little
    assert m.pace is None
    weights = sum(p.numel() for p in m.parameters())
    monkeypatch.setattr(pace, "CALLS", 18)
    monkeypatch.setattr(pace, "WORK", {"cpu": 18 * weights * 64})
    sg.sample(given(m, 5), 5, 3, seed=0)
    assert not finds
    sg.sample(given(m, 6), 6, 3, seed=0, chunk=6)  # which is said
    assert not finds
    with pytest.raises(ValueError, match="is for 6 samples"):
        sg.sample(given(m, 6), 7, 3, seed=0)  # which cannot be
    assert not finds
    for _ in range(2):
        seen.clear()
        sg.sample(given(m, 6), 6, 3, seed=0)
        assert finds == [m]
        assert {rows for rows, _ in seen} == {2}
    m.pace = Pace(3, device="cuda")  # of another machine
    sg.sample(given(m, 6), 6, 3, seed=0)
    assert m.pace == Pace(2, device="cpu")


def test_processes_do_not_find_one_each(finds, monkeypatch) -> None:
    monkeypatch.setattr(pace, "CALLS", 0)
    monkeypatch.setattr(pace, "WORK", {"cpu": 0})
    m = model()
    shared(lambda i, k: sg.sample(given(m, k), k, 2, seed=0, first=i), 4, 2)
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        launched.setenv("RANK", "1")
        sg.sample(given(m, 4), 4, 2, seed=0)
    assert not finds
    assert m.pace is None
    sg.sample(given(m, 4), 4, 2, seed=0)
    assert finds == [m]


# --- kept ----------------------------------------------------------------------------------------


def test_a_pace_is_saved_with_the_model(tmp_path: Path) -> None:
    m = model()
    save(m, tmp_path)
    assert load(tmp_path).pace is None
    m.pace = Pace(32, channels_last=True)
    save(m, tmp_path)
    assert load(tmp_path).pace == Pace(32, channels_last=True, device="cpu")
    # Of another kind of device it is another.
    m.pace = Pace(512, device="cuda")
    save(m, tmp_path)
    assert load(tmp_path).pace == Pace(32, channels_last=True, device="cpu")
    assert set(json.loads((tmp_path / "pace.json").read_text())) == {"cpu", "cuda"}
    for damage in ("{", "[]", '{"cpu": {"chunk": 0}}', '{"cpu": {"size": 3}}', '{"cpu": 3}'):
        (tmp_path / "pace.json").write_text(damage)
        with pytest.raises(CheckpointError, match=r"pace\.json cannot be read"):
            load(tmp_path)
    save(m, tmp_path)
    assert load(tmp_path).pace is None
    m.pace = None
    save(m, tmp_path)
    assert not (tmp_path / "pace.json").exists()


def test_one_process_settles_it_for_all_and_for_later(finds, monkeypatch) -> None:
    monkeypatch.setattr(pace, "CALLS", 0)
    monkeypatch.setattr(pace, "WORK", {"cpu": 0})
    kept: list[Pace] = []
    m = model()
    assert settled(m, 4, 2, kept.append) == Pace(2, device="cpu")
    assert kept == [Pace(2, device="cpu")]
    m.pace = Pace(7, device="cpu")
    assert settled(m, 4, 2, kept.append) == Pace(7, device="cpu")
    assert len(finds) == len(kept) == 1

    def full(pace: Pace) -> None:
        raise OSError("no space")

    m.pace = None  # what cannot be kept is not used: another run would find another
    assert settled(m, 4, 2, full) == Pace(device="cpu")


def test_the_command_keeps_it_beside_the_model(finds, tmp_path, capsys, monkeypatch) -> None:
    save(model(), tmp_path / "model")
    words = ["sample", tmp_path / "model", "--n", "5", "--steps", "2", "--device", "cpu"]

    def run(out: str, *more: str) -> int:
        return main([*map(str, words), "--out", str(tmp_path / out), *more])

    assert run("little") == 0
    assert json.loads((tmp_path / "little/samples.json").read_text())["pace"] is None
    assert not finds
    monkeypatch.setattr(pace, "CALLS", 0)
    monkeypatch.setattr(pace, "WORK", {"cpu": 0})
    assert run("a.npz") == 0
    assert "2 at once on cpu" in capsys.readouterr().out
    assert load(tmp_path / "model").pace == Pace(2, device="cpu")
    assert run("b.npz") == 0
    assert run("folder") == 0
    assert len(finds) == 1
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert json.loads((tmp_path / "folder/samples.json").read_text())["pace"] == "2 at once on cpu"
    # A part that was drawn at another pace is another to the last bit.
    (tmp_path / "model/pace.json").write_text('{"cpu": {"chunk": 3}}')
    capsys.readouterr()
    assert run("folder") != 0
    assert "pace is 2 at once on cpu, not 3 at once on cpu" in capsys.readouterr().err


# --- compiled where asked ------------------------------------------------------------------------


def test_it_is_compiled_once_and_not_for_others(monkeypatch) -> None:
    net = UNet((1, 8, 8), 8, (1, 2), 1, classes=3)
    calls: list[str] = []

    def compiled(self: nn.Module) -> None:
        calls.append("compiled")

        def call(*arguments: object, **context: object) -> object:
            calls.append("call")
            return nn.Module._call_impl(self, *arguments, **context)

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compiled)
    m = model(net)
    m.pace = Pace(compiled=True)
    for _ in range(2):
        sg.sample(given(m, 4), 4, 3, seed=0, solver=sg.EulerMaruyama())
    assert calls == ["compiled", *["call"] * 6]
    m(torch.zeros(1, 1, 8, 8), torch.tensor(0.5), y=torch.zeros(1).long())
    assert len(calls) == 7


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.slow
def test_the_compiler_draws_the_same(wide) -> None:
    plain = sg.sample(wide, 5, 4, seed=0)
    wide.pace = Pace(3, compiled=True)
    torch.testing.assert_close(sg.sample(wide, 5, 4, seed=0), plain, rtol=0, atol=1e-4)


SCRIPT = """
import os
import sde_gen as sg
from sde_gen.networks import MLP
from sde_gen.sampling import pace, timed
rank = int(os.environ["RANK"])
pace._fastest = lambda trial, compiled: pace.Pace(10 + rank, rank == 1)
found = timed(sg.ScoreNetwork(MLP((2,)), sg.VP()))
assert found == pace.Pace(10, False, device="cpu"), found
print("agreed")
"""


@pytest.mark.slow
def test_all_processes_take_that_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", str(tmp_path / "script.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(sg.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agreed") == 3
