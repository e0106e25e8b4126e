"""Numbered samples: any part of the sequence, cut in any way among processes, is the same."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import sde_gen as sg
from sde_gen import inverse, likelihood, many
from sde_gen.cli import main
from sde_gen.networks import UNet
from sde_gen.training import save

# --- the sequence --------------------------------------------------------------------------------

SOLVERS: list[tuple[sg.Solver | None, float]] = [
    *((None, eta) for eta in (0.0, 0.5, 1.0)),
    *((sg.EulerMaruyama(), eta) for eta in (0.0, 1.0)),
    *((sg.Heun(), eta) for eta in (0.0, 1.0)),
    *((sg.SRA(), eta) for eta in (0.0, 1.0)),
    (sg.RungeKutta(4), 0.0),
    *((sg.Adaptive(0.1, 0.1), eta) for eta in (0.0, 1.0)),
]
LINEAR: list[tuple[sg.Solver | None, float]] = [
    *((sg.Exponential(1), eta) for eta in (0.0, 1.0)),
    (sg.Exponential(3, 0.25, corrector=True), 1.0),
    (sg.Churn(), 0.0),
    (sg.PredictorCorrector(), 1.0),
    (sg.TorchSDE("euler"), 1.0),
]
PROCESSES = {"VP": sg.VP(), "VE": sg.VE(), "CLD": sg.CriticallyDamped()}


class Labelled(nn.Module):
    """A network whose every number is its own: no sum whose order a batch could change."""

    shape, classes = (3,), 4

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        at = torch.zeros(len(x), dtype=torch.long) if y is None else y
        return self.table[at] * c.reshape(-1, 1) - 0.3 * x


def named(value: object) -> str:
    return type(value).__name__ if isinstance(value, sg.Solver) else str(value)


@pytest.mark.filterwarnings("ignore:.*too long")
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("solver", "eta"), [*SOLVERS, *LINEAR], ids=named)
def test_a_part_of_the_sequence_is_a_part(name: str, solver: sg.Solver | None, eta: float) -> None:
    if name == "CLD" and (solver, eta) in LINEAR:
        pytest.skip("a solver of scalar processes")
    if name == "CLD" and isinstance(solver, sg.Adaptive) and eta:
        pytest.skip("its many small steps take long; VP and VE have the same code")
    y = torch.arange(10) % 4
    model = sg.ScoreNetwork(Labelled(), PROCESSES[name], facts=sg.Facts((3,), 0.5))
    times = None if solver is None else sg.grids.default(PROCESSES[name], 8)

    def draw(rows: slice) -> Tensor:
        n, given = rows.stop - rows.start, model.given(y=y[rows])
        return sg.sample(given, n, 8, 5, eta=eta, solver=solver, times=times, first=rows.start)

    whole = draw(slice(0, 10))
    assert torch.equal(torch.cat([draw(slice(0, 4)), draw(slice(4, 10))]), whole)
    assert len(whole.unique(dim=0)) == 10


def test_likelihoods_number_their_rows() -> None:
    law = sg.Gaussian(sg.VP(), torch.linspace(-1, 1, 6), 0.3)
    k = torch.arange(60).reshape(10, 6) % 4
    x = law.sample(10, torch.Generator().manual_seed(0))
    chain = sg.Chain(sg.VP(), sg.grids.information(sg.VP(), 10, reference=0.1))

    def parts(of) -> None:
        whole = of(slice(0, 10), 0)
        cut = torch.cat([of(slice(0, 4), 0), of(slice(4, 10), 4)])
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
        unnumbered = torch.cat([of(slice(0, 4), 0), of(slice(4, 10), 0)])
        assert (unnumbered - whole).abs().max() > 1e-3

    # Two probes of six coordinates: of a rough score, whose trace they do not see exactly.
    rough = sg.GaussianMixture(sg.VP(), [0.5, 0.5], torch.eye(6)[:2], 0.2)
    parts(lambda rows, i: sg.log_prob(rough, x[rows], probes=2, first=i).value)
    parts(lambda rows, i: sg.bits_per_dim(law, k[rows], 4, first=i).value)
    parts(lambda rows, i: sg.bound(law, x[rows], chain, first=i).total.value)
    parts(lambda rows, i: likelihood.redraw(law, x[rows], 1.0, steps=5, first=i))
    parts(lambda rows, i: chain.sample(law, len(x[rows]), 0, first=i))
    seen = inverse.Observation(inverse.Matrix(torch.eye(6)[:2]), torch.zeros(2), 0.2)
    parts(lambda rows, i: inverse.gibbs(law, seen, x[rows], 2, 3, 0, first=i))
    found = likelihood.importance_bounds(law, k[4:], 4, draws=2, first=4)
    assert float(found[1]) != float(likelihood.importance_bounds(law, k[4:], 4, draws=2)[1])


def test_bits_start_where_they_are_told_to() -> None:
    """Of a Gaussian blurred by sigma / alpha = r the density is that of variance v + r^2."""
    law = sg.Gaussian(sg.VP(), torch.zeros(4).double(), 0.3)
    r = 0.4
    start = float(law.sde.time_at(-2 * np.log(r)))
    k = torch.arange(40).reshape(10, 4) % 8
    found = sg.bits_per_dim(law, k, 8, times=[start, 1.0]).mean()
    u = torch.special.ndtr(sg.Streams(0)(torch.empty(10, 4), 1.0, 0.0, 0))
    x = (2 * (k + u) / 8 - 1).double()
    v = 0.3**2 + r**2
    logs = -0.5 * (x**2 / v + np.log(2 * np.pi * v)).sum(1)
    wanted = -logs.mean() / (4 * np.log(2)) + 2  # a cell is 2 / 8: 2 bits
    assert float(found) == pytest.approx(float(wanted), abs=1e-3)


# --- the cut -------------------------------------------------------------------------------------


def test_chunks_are_cut_alike_for_any_number_of_processes(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = {}
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert many.place() == (rank, 3)
        found[rank] = list(many.chunks(21, 4))
    assert found == {0: [(0, 4), (12, 4)], 1: [(4, 4), (16, 4)], 2: [(8, 4), (20, 1)]}


@pytest.mark.parametrize(("rank", "size"), [(None, "2"), ("2", "2"), ("-1", "2"), ("x", "1")])
def test_a_place_that_is_none_is_refused(rank, size, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(RuntimeError, match=r"the launcher says .* expected 0 <= rank < size"):
        many.place()


def test_a_gpu_for_each_process(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert many.own_device(torch.device("cuda")) == torch.device("cuda")
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert many.own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert many.own_device(torch.device("cuda:0")) == torch.device("cuda:0")
    assert many.own_device(torch.device("cpu")) == torch.device("cpu")


def test_work_gives_the_rows_that_it_was_asked_for() -> None:
    assert many.shared(lambda i, k: torch.arange(i, i + k), 7, 3).tolist() == [*range(7)]
    with pytest.raises(ValueError, match="must return 3 rows"):
        many.shared(lambda i, k: torch.zeros(2), 7, 3)
    with pytest.raises(ValueError, match="chunk"):
        many.shared(lambda i, k: torch.zeros(k), 7, 0)


def test_what_does_not_share_its_work_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["demo"]) == 2
    assert "demo runs in one process, the launcher started 2" in capsys.readouterr().err


# --- the files of several processes --------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    net = UNet((1, 8, 8), 8, (1, 2), blocks=0, width=16, classes=10)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    save(sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts((1, 8, 8), 0.5, levels=17)), folder)
    levels = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8))
    np.savez(folder / "real.npz", x=levels, y=np.arange(20) % 10)
    return folder


COMMANDS = """
import sys
from sde_gen.cli import main
model, out = sys.argv[1:]
options = ["--steps", "3", "--chunk", "4", "--device", "cpu"]
sample = ["sample", model, "--n", "10", "--eta", "1", *options, "--out"]
codes = [main([*sample, f"{out}/x.npz"]), main([*sample, f"{out}/shards"])]
codes += [main([*sample, f"{out}/images", "--format", "png"])]
real = [f"{model}/real.npz", "--key", "x", "--labels", "y", "--levels", "17"]
codes += [main(["evaluate", model, *real, "--n", "10", "--bits", *options])]
sys.exit(max(codes))
"""


def launched(model: Path, out: Path, processes: int) -> tuple[str, dict[str, str]]:
    """What the commands print, without the folder, and the checksums of what they write."""
    out.mkdir()
    told = together([sys.executable, "-c", COMMANDS, str(model), str(out)], processes)
    assert not any(text for text, _ in told[1:])
    return outcome(told[0][0], out)


def together(command: list[str], processes: int) -> list[tuple[str, str]]:
    """What each of several processes of a launcher says, and complains of."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    house = str(Path(sg.__file__).parents[1])
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": house}
    base |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    try:
        told = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), told
    return told


def outcome(text: str, out: Path) -> tuple[str, dict[str, str]]:
    files = [f for f in sorted(out.rglob("*")) if f.is_file()]
    sums = {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return text.replace(str(out), ""), sums


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> tuple[str, dict[str, str]]:
    """One process: this one."""
    out, told = tmp_path_factory.mktemp("alone"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.setattr(sys, "argv", ["-c", str(model), str(out)])
        with pytest.raises(SystemExit) as stop:
            exec(COMMANDS, {})
    assert stop.value.code == 0
    return outcome(told.getvalue(), out)


def check_same(model: Path, out: Path, alone: tuple[str, dict[str, str]], processes: int) -> None:
    text, sums = launched(model, out, processes)
    assert text == alone[0]
    assert "bits per dimension" in text
    assert sums == alone[1]
    assert len(sums) == 1 + (3 + 1) + (10 + 1)


def test_what_the_first_finds_wrong_is_wrong_for_all(tmp_path) -> None:
    """Nobody waits for one that has ended."""
    script = """
from sde_gen import many
def check():
    assert many.place()[0] == 0
    raise FileExistsError("there already")
many.agree(lambda: None if many.place()[0] == 0 else 1 / 0)
try:
    many.agree(check)
except FileExistsError as error:
    print(error)
"""
    told = together([sys.executable, "-c", script], 3)
    assert [text for text, _ in told] == ["there already\n"] * 3


def test_the_end_waits_for_threads_that_still_hold_tensors() -> None:
    """Left to themselves they abort a process at its end: in about two runs of three."""
    script = """
import torch
from sde_gen import many
many.agree(lambda: None)
for _ in range(9):
    torch.distributed.all_reduce(torch.zeros(300_000), group=many.hosts(), async_op=True)
"""
    assert together([sys.executable, "-c", script], 3) == [("", "")] * 3


def test_many_may_ask_at_once_whether_they_can_write(tmp_path) -> None:
    """Of folders that are not there yet, and are not there afterwards."""

    def ask(i: int) -> None:
        for k in range(50):
            sg.data.check_writable(tmp_path / f"a{k}" / "b" / "x.npz")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        sg.data.check_writable(tmp_path / "file" / "x.npz")


def test_files_of_two_processes_are_those_of_one(model, alone, tmp_path) -> None:
    check_same(model, tmp_path / "two", alone, 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 5])
def test_files_of_more_processes_are_those_of_one(processes, model, alone, tmp_path) -> None:
    check_same(model, tmp_path / "more", alone, processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(launcher, model, alone, tmp_path) -> None:
    (tmp_path / "run.py").write_text(COMMANDS)
    command = [sys.executable, *launcher, tmp_path / "run.py", model, tmp_path / "out"]
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(sg.__file__).parents[1])
    done = subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, wanted in alone[1].items():
        found = hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
        assert found == wanted, name


# --- a folder of samples -------------------------------------------------------------------------


def sampled(model: Path, out: Path, *options: object) -> int:
    words = ["sample", model, "--out", out, "--steps", 2, "--chunk", 4, "--device", "cpu"]
    return main([str(w) for w in [*words, *options]])


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """(first, count) of each call of ``sample``."""
    seen, honest = [], sg.sample

    def counted(model: sg.Score, n: int, *arguments: object, first: int = 0, **more: object):
        seen.append((first, n))
        return honest(model, n, *arguments, first=first, **more)

    monkeypatch.setattr("sde_gen.sampling.sample", counted)
    return seen


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_folder_is_taken_up_where_it_stopped(kind, model, tmp_path, calls, capsys) -> None:
    out, options = tmp_path / "new" / "s", ("--n", 10, "--format", kind)
    assert sampled(model, out, *options) == 0
    assert calls == [(0, 4), (4, 4), (8, 2)]
    before = contents(out)
    assert sampled(model, out, *options) == 0
    assert len(calls) == 3
    assert "10 of them were there" in capsys.readouterr().out
    first, *_, last = sorted(f for f in out.iterdir() if f.suffix == f".{kind}")
    first.write_bytes(b"" if kind == "png" else first.read_bytes()[:-40])
    last.unlink()
    assert sampled(model, out, *options) == 0
    assert calls[3:] == [(0, 4), (8, 2)]
    assert contents(out) == before
    # More of them: what was a part of a chunk is drawn again, as a whole.
    assert sampled(model, out, "--n", 13, "--format", kind) == 0
    assert calls[5:] == [(8, 4), (12, 1)]
    assert sampled(model, tmp_path / "at_once", "--n", 13, "--format", kind) == 0
    assert contents(tmp_path / "at_once") == contents(out)


def test_shards_hold_what_one_file_holds(model, tmp_path) -> None:
    assert sampled(model, tmp_path / "x.npz", "--n", 10) == 0
    assert sampled(model, tmp_path / "s", "--n", 10) == 0
    assert sampled(model, tmp_path / "i", "--n", 10, "--format", "png") == 0
    whole = np.load(tmp_path / "x.npz")
    shards = [np.load(f) for f in sorted((tmp_path / "s").glob("*.npz"))]
    for key in ("x", "y"):
        assert np.array_equal(np.concatenate([s[key] for s in shards]), whole[key])
    for i, (x, y) in enumerate(zip(whole["x"], whole["y"], strict=True)):
        image = Image.open(tmp_path / "i" / f"{i:08d}-{y}.png")
        levels = np.clip(np.floor((x[0].astype(float) + 1) * 128), 0, 255)
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), levels)


def test_samples_from_any_number_on(model, tmp_path) -> None:
    assert sampled(model, tmp_path / "x.npz", "--n", 12) == 0
    assert sampled(model, tmp_path / "y.npz", "--n", 4, "--first", 8) == 0
    assert sampled(model, tmp_path / "s", "--n", 4, "--first", 8) == 0
    whole, part = np.load(tmp_path / "x.npz"), np.load(tmp_path / "y.npz")
    shard = np.load(tmp_path / "s" / "00000008.npz")
    for key in ("x", "y"):
        assert np.array_equal(part[key], whole[key][8:])
        assert np.array_equal(shard[key], whole[key][8:])


def test_another_set_is_refused_by_name(model, tmp_path, calls, capsys) -> None:
    out = tmp_path / "s"
    assert sampled(model, out, "--n", 4) == 0
    other = tmp_path / "other"
    torch.manual_seed(1)
    net = UNet((1, 8, 8), 8, (1, 2), blocks=0, width=16, classes=10)
    save(sg.ScoreNetwork(net, sg.VP(), facts=sg.Facts((1, 8, 8), 0.5)), other)
    before = contents(out)
    for who, options, words in [
        (model, ("--n", 4, "--seed", 1), "whose seed is 0, not 1"),
        (model, ("--n", 4, "--steps", 3), "whose steps is 2, not 3"),
        (model, ("--n", 4, "--label", 3), "whose label is None, not 3"),
        (model, ("--n", 4, "--guidance", 1), "whose guidance is 0.0, not 1.0"),
        (model, ("--n", 4, "--first", 1), "whose first is 0, not 1"),
        (model, ("--n", 4, "--chunk", 2), "whose chunk is 4, not 2"),
        (model, ("--n", 4, "--format", "png"), "whose format is npz, not png"),
        (model, ("--n", 3), "whose n is 4, not 3"),
        (other, ("--n", 4), "whose weights is"),
    ]:
        capsys.readouterr()
        assert sampled(who, out, *options) == 2
        assert words in capsys.readouterr().err
    assert contents(out) == before
    assert len(calls) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert sampled(model, tmp_path / "full", "--n", 4) == 2
    assert "holds other files" in capsys.readouterr().err
    (out / "samples.json").write_text("nonsense")
    assert sampled(model, out, "--n", 4) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert sampled(model, tmp_path / "x.npz", "--format", "png") == 2
    assert "is for a folder" in capsys.readouterr().err
    assert sampled(model, out, "--first", -1) == 2
    assert "--first must be at least 0" in capsys.readouterr().err


def test_what_is_asked_for_is_written_first(model, tmp_path, monkeypatch) -> None:
    """A run that is killed in its first chunk has told what it was."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sde_gen.sampling.sample", killed)
    assert sampled(model, tmp_path / "s", "--n", 4) == 130
    told = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert (told["n"], told["seed"], told["steps"]) == (4, 0, 2)
