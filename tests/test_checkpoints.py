"""Models on disk: what is saved is what is loaded, and what is broken says so."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickletools
import random
import subprocess
import sys
import time
import tracemalloc
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load_fuzz import Largest, forge
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sde_gen as sg
from sde_gen import networks, schedules, sdes
from sde_gen.facts import Units
from sde_gen.networks import MLP, Network, UNet
from sde_gen.sampling import tuned_to
from sde_gen.training import CheckpointError, Classification, load, register, save
from sde_gen.training.checkpoints import CONFIG, WEIGHTS, describe, write
from sde_gen.training.registry import TABLE
from sde_gen.tuning import Tuned
from sde_gen.tuning.tuned import Choice

SDES = [
    sg.VP(),
    sg.VP(sg.schedules.Cosine(0.01, 10.0)),
    sg.VP(sg.schedules.Quadratic(0.2, 15.0, 2.0)),
    sg.VP(sg.schedules.Sigmoid(0.1, 12.0, 5.0)),
    sg.VP(sg.schedules.Tabulated(torch.linspace(1e-4, 0.02, 50), T=3.0)),
    sg.SubVP(sg.schedules.Linear(0.1, 18.0)),
    sg.VE(sg.schedules.Geometric(0.02, 30.0)),
    sg.EDM(60.0),
    sg.Wiener(2.0),
    sg.OrnsteinUhlenbeck(-0.8, 1.1, 4.0),
    sg.CriticallyDamped(sg.schedules.Linear(3.0, 5.0), 0.3, 0.05),
    sg.MatrixOrnsteinUhlenbeck([[-0.7]], [[1.3]], sg.schedules.Power(2.0, T=3.0)),
]


def drawn(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def model(sde: sg.KernelSDE | None = None, **options) -> sg.ScoreNetwork:
    return sg.ScoreNetwork(
        drawn(MLP((3,), width=16, depth=1, classes=4)), sde or sg.VP(), **options
    )


def same(a: nn.Module, b: nn.Module) -> None:
    """Equal scores, bit for bit, of float64 states: half the digits of a weight would show."""
    x = torch.randn(5, 3, dtype=torch.float64)
    for t in (0.01, 0.5):
        assert torch.equal(a.eval()(x, t), b(x, t))


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_process_comes_back(sde, tmp_path):
    save(model(sde, prediction="velocity", facts=sg.Facts(std=0.1 + 0.2)), tmp_path)
    found = load(tmp_path)
    assert found.sde == sde
    assert type(found.sde) is type(sde)
    assert (found.prediction, found.facts.std, found.shape) == ("velocity", 0.1 + 0.2, (3,))


@pytest.mark.parametrize("sde", [sg.VP(), sg.EDM(20.0)], ids=repr)
def test_loaded_model_samples_the_same(sde, tmp_path):
    before = model(sde, facts=sg.Facts(std=0.4))
    save(before, tmp_path / "deep" / "folder")
    after = load(tmp_path / "deep" / "folder")
    y = torch.tensor([0, 1, 2, 3])
    a, b = (sg.sample(m.given(y=y), 4, 5, seed=0) for m in (before.eval(), after))
    assert torch.equal(a, b)
    assert not after.training


def test_unet_comes_back(tmp_path):
    torch.manual_seed(0)
    net = UNet((1, 4, 4), 8, (1, 2), blocks=1, width=16, classes=3)
    save(sg.ScoreNetwork(net.to(memory_format=torch.channels_last), sg.VP()), tmp_path)
    found = load(tmp_path)
    for a, b in zip(net.state_dict().values(), found.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("embedding", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_comes_back(dtype, embedding, tmp_path):
    before = sg.ScoreNetwork(drawn(MLP((3,), 16, 1, embedding=embedding)).to(dtype), sg.VP())
    save(before, tmp_path)
    after = load(tmp_path)
    assert {t.dtype for t in (*after.parameters(), *after.buffers())} == {dtype}
    same(before, after)


def test_what_was_built_in_double_precision_is_not_built_anew(tmp_path):
    # The waves of the embedding are a buffer that state_dict leaves out.
    torch.set_default_dtype(torch.float64)
    try:
        before = sg.ScoreNetwork(drawn(MLP((3,), 16, 1)), sg.VP())
    finally:
        torch.set_default_dtype(torch.float32)
    save(before, tmp_path)
    same(before, load(tmp_path))


def test_each_tensor_has_its_own_dtype(tmp_path):
    before = model()
    before.net.layers[0].double()
    before.net.output.requires_grad_(False)
    save(before, tmp_path)
    after = load(tmp_path)
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype, name


MOMENTS = {
    "one": sg.Moments(torch.tensor([0.3], dtype=torch.float64)),
    "diagonal": sg.data_moments(torch.randn(50, 3), diagonal=True),
    "directions": sg.data_moments(torch.randn(50, 3), rank=1),
    "single": sg.data_moments(torch.randn(50, 3)).__class__(
        torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float32)
    ),
}


@pytest.mark.parametrize("kind", MOMENTS)
def test_moments_come_back(kind, tmp_path):
    facts = sg.Facts(moments=MOMENTS[kind])
    before = sg.ScoreNetwork(drawn(MLP((3,), 16, 1)), sg.VP(), facts=facts)
    save(before, tmp_path)
    after = load(tmp_path)
    assert after.facts.moments is not None
    for name in ("values", "mean", "basis"):
        a, b = getattr(before.facts.moments, name), getattr(after.facts.moments, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
    a, b = (sg.sample(m, 4, 5, seed=0) for m in (before.eval(), after))
    assert torch.equal(a, b)
    after.facts = replace(after.facts, moments=None)
    assert not torch.equal(a, sg.sample(after, 4, 5, seed=0))


UNITS = {
    "one": Units(torch.tensor(3.0), torch.tensor(0.1 + 0.2, dtype=torch.float64)),
    "columns": Units.of(torch.randn(50, 3, dtype=torch.float64) * 1e6 + 7e8, "column"),
    "a shift": Units(torch.tensor([1.0, 2.0, 1 / 3], dtype=torch.float64), torch.tensor(2.0)),
}


@pytest.mark.parametrize("kind", UNITS)
def test_units_come_back(kind, tmp_path):
    before = model(facts=sg.Facts((3,), units=UNITS[kind]))
    save(before, tmp_path)
    after = load(tmp_path)
    assert after.facts.units is not None
    for name in ("shift", "scale"):
        a, b = getattr(UNITS[kind], name), getattr(after.facts.units, name)
        assert a.dtype == b.dtype == torch.float64
        assert torch.equal(a, b)
        assert a.shape == b.shape
    y = torch.tensor([0, 1, 2, 3])
    a, b = (sg.sample(m.given(y=y), 4, 5, seed=0) for m in (before.eval(), after))
    assert torch.equal(a, b)
    after.facts = replace(after.facts, units=None)
    assert not torch.equal(a, sg.sample(after.given(y=y), 4, 5, seed=0))


@pytest.mark.parametrize("classes", [None, ("cat", "dog", "", "été")])
@pytest.mark.parametrize("levels", [None, 2, 256])
def test_names_and_levels_come_back(classes, levels, tmp_path):
    save(model(facts=sg.Facts(classes=classes, levels=levels)), tmp_path)
    facts = load(tmp_path).facts
    assert (facts.classes, facts.levels) == (classes, levels)
    assert facts.units is facts.moments is None


def all_known() -> sg.Facts:
    """Every field told, none at its default."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(3)) * 4 + 1
    return replace(sg.Facts.of(x, "column", 1, ["a", "b", "c", "d"], 16), std=0.5)


def test_every_fact_comes_back(tmp_path):
    facts = all_known()
    default = sg.Facts()
    assert all(getattr(facts, f.name) != getattr(default, f.name) for f in fields(sg.Facts))
    save(model(facts=facts), tmp_path)
    found = load(tmp_path).facts
    for f in fields(sg.Facts):
        before, after = getattr(facts, f.name), getattr(found, f.name)
        parts = {"moments": ("values", "mean", "basis"), "units": ("shift", "scale")}
        if f.name in parts:
            for part in parts[f.name]:
                assert torch.equal(getattr(before, part), getattr(after, part)), part
        else:
            assert before == after, f.name


def tuned_model() -> sg.ScoreNetwork:
    found = sg.ScoreNetwork(drawn(MLP((3,), 16, 1)), sg.VP())
    choice = Choice(5, sg.Exponential(1), shares=(0.1, 0.3, 0.5, 0.8))
    found.tuned = Tuned([choice], weights=found.fingerprint())
    return found


def test_what_it_was_tuned_to_comes_back_with_the_weights(tmp_path):
    before = tuned_model()
    save(before, tmp_path)
    after = load(tmp_path)
    assert after.tuned.weights == before.tuned.weights == after.fingerprint()
    assert tuned_to(after) is after.tuned
    a, b = (sg.sample(m, 4, 5, seed=0) for m in (before, after))
    assert torch.equal(a, b)
    after.tuned = None
    assert not torch.equal(a, sg.sample(after, 4, 5, seed=0))


def nudge(found: sg.ScoreNetwork) -> None:
    """The smallest change that there is, of one number."""
    with torch.no_grad():
        bias = found.net.output.bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))


@pytest.mark.parametrize("way", ["in place", "on disk"])
def test_what_was_tuned_to_other_weights_is_not_used(way, tmp_path):
    found = tuned_model()
    if way == "in place":
        nudge(found)
    else:
        old = found.tuned
        nudge(found)
        found.tuned = old
        save(found, tmp_path)
        found = load(tmp_path)
    with pytest.warns(UserWarning, match="tuned with other weights.*tune it again"):
        assert tuned_to(found) is None
    with pytest.warns(UserWarning, match="tuned with other weights"):
        x = sg.sample(found, 4, 5, seed=0)
    with pytest.warns(UserWarning, match="tuned with other weights"):
        assert tuned_to(found.given()) is None
    found.tuned = None
    assert torch.equal(x, sg.sample(found, 4, 5, seed=0))


def test_a_fingerprint_is_of_the_weights_alone():
    a = model().fingerprint()
    assert a == model(sg.EDM(), facts=sg.Facts(std=0.3)).fingerprint()
    other = model()
    nudge(other)
    assert other.fingerprint() != a
    assert model().given(y=1).fingerprint() == a
    assert (model() + model()).fingerprint() is None  # nothing was tuned to a sum


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def part_compiled(net: MLP) -> MLP:
    net.layers[0] = compiled(nn.DataParallel(net.layers[0]))
    return net


def averaged(module: nn.Module) -> nn.Module:
    average = AveragedModel(module)
    average.update_parameters(module)
    return average


WRAPPED = {
    "network compiled": lambda net: sg.ScoreNetwork(compiled(net), sg.VP()),
    "network parallel": lambda net: sg.ScoreNetwork(nn.DataParallel(net), sg.VP()),
    "both": lambda net: sg.ScoreNetwork(compiled(nn.DataParallel(net)), sg.VP()),
    "part compiled": lambda net: sg.ScoreNetwork(part_compiled(net), sg.VP()),
    "model compiled": lambda net: compiled(sg.ScoreNetwork(net, sg.VP())),
    "model parallel": lambda net: nn.DataParallel(sg.ScoreNetwork(net, sg.VP())),
    "model averaged": lambda net: averaged(sg.ScoreNetwork(net, sg.VP())),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_are_taken_off(how, tmp_path):
    plain = sg.ScoreNetwork(drawn(MLP((3,), 16, 1)), sg.VP())
    save(WRAPPED[how](drawn(MLP((3,), 16, 1))), tmp_path)
    after = load(tmp_path)
    assert type(after.net) is MLP
    assert after.state_dict().keys() == plain.state_dict().keys()
    assert after.shape == (3,)
    same(plain, after)


def test_the_wrapper_of_several_processes_is_taken_off(tmp_path):
    from torch import distributed

    plain = sg.ScoreNetwork(drawn(MLP((3,), 16, 1)), sg.VP())
    distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        for wrapped in (
            nn.parallel.DistributedDataParallel(plain),
            sg.ScoreNetwork(nn.parallel.DistributedDataParallel(plain.net), sg.VP()),
        ):
            save(wrapped, tmp_path / "model")
            same(plain, load(tmp_path / "model"))
    finally:
        distributed.destroy_process_group()


def test_a_classifier_comes_back(tmp_path):
    before = drawn(MLP((3,), 16, 1, outputs=10))
    save(before, tmp_path)
    after = load(tmp_path, kind=MLP)
    x = torch.randn(5, 3)
    assert torch.equal(after(x, torch.zeros(())), before(x, torch.zeros(())))
    with pytest.raises(CheckpointError, match=r"must be ScoreNetwork.*, got \{'class': 'MLP'"):
        load(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        save(model(), tmp_path / "model")
        write(tmp_path / "other", lambda f: f.write_text("text"))
        # Some writers make a file of their own and rename it.
        write(
            tmp_path / "private", lambda f: (f.unlink(), os.close(os.open(f, os.O_CREAT, 0o600)))
        )
    finally:
        os.umask(before)
    files = [tmp_path / "model" / CONFIG, tmp_path / "model" / WEIGHTS]
    for file in (*files, tmp_path / "other", tmp_path / "private"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file


def test_nothing_on_disk_is_a_pickle(tmp_path):
    save(model(), tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    assert json.loads((tmp_path / CONFIG).read_text())["sde"]["class"] == "VP"
    with pytest.raises(ValueError, match=r"opcode|exhausted|position"):
        list(pickletools.genops((tmp_path / WEIGHTS).read_bytes()))


class Own(nn.Module):
    shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x, c, y=None):
        return self.body(x)


def test_own_network_is_passed(tmp_path):
    before = sg.ScoreNetwork(Own(), sg.VP())
    save(before, tmp_path)
    with pytest.raises(CheckpointError, match=r"net=.*test_checkpoints.Own"):
        load(tmp_path)
    after = load(tmp_path, net=Own())
    x = torch.randn(5, 3)
    assert torch.equal(after(x, 0.5), before(x, 0.5))
    kept = nn.Linear(3, 3)
    other = Own()
    other.body = kept.double()
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path, net=nn.Sequential(other))
    assert kept.weight.dtype == torch.float64  # nothing was filled


class Shapeless(Own):
    shape = None


@pytest.mark.parametrize("shape", [[], [0], [-3]])
def test_a_shape_has_sizes(shape, tmp_path):
    save(sg.ScoreNetwork(Shapeless(), sg.VP(), facts=sg.Facts((3,))), tmp_path)
    assert load(tmp_path, net=Shapeless()).shape == (3,)
    change("facts", "shape", shape)(tmp_path)
    with pytest.raises(CheckpointError, match="shape is"):
        load(tmp_path, net=Shapeless())


class Waves(Own):
    """An own network with a buffer that the file does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((3,), 0.1), persistent=False)

    def forward(self, x, c, y=None):
        return self.body(self.scale.to(x) * x)


@pytest.mark.parametrize("wrap", [lambda n: n, nn.DataParallel, compiled])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_network_takes_the_dtype_of_the_file(dtype, wrap, tmp_path):
    x = torch.randn(5, 3, dtype=dtype)
    before = sg.ScoreNetwork(wrap(drawn(Waves())).to(dtype), sg.VP())
    save(before, tmp_path)
    after = load(tmp_path, net=wrap(Waves()))
    assert {t.dtype for t in (*after.parameters(), *after.buffers())} == {dtype}
    assert torch.equal(after(x, 0.5), before(x, 0.5))


@register
@dataclass(frozen=True)
class Steady(sg.schedules.Schedule):
    rate: float
    T: float = 1.0

    def beta(self, t):
        return self.rate + 0.0 * sg.ops.as_time(t)


@register
@dataclass(frozen=True)
class Slower(sg.schedules.Schedule):
    """A clock of a clock."""

    inner: sg.schedules.Schedule

    T = 1.0

    def beta(self, t):
        return self.inner.beta(t) / 2


@register
class Tied(Network):
    """Two layers of one weight, and a table that ``state_dict`` leaves out."""

    def __init__(self, shape: tuple[int, ...], kind: str = "a") -> None:
        super().__init__(shape, None, {"shape": list(shape), "kind": kind})
        self.first, self.last = nn.Linear(*shape, *shape), nn.Linear(*shape, *shape)
        self.last.weight = self.first.weight
        self.register_buffer("table", torch.rand(3), persistent=False)

    def compute(self, x, c, y):
        return self.last(self.table * torch.tanh(self.first(x)))


@register
class Scaled(nn.Module):
    """A network around another, with a number of its own."""

    def __init__(self, body: nn.Module, factor: float) -> None:
        super().__init__()
        self.config = {"body": body, "factor": factor}
        self.body, self.gain = body, nn.Parameter(torch.tensor(factor))

    def forward(self, x, c, y=None):
        return self.gain * self.body(x, c, y)


def test_own_classes_come_back_where_they_were_registered(tmp_path):
    before = sg.ScoreNetwork(drawn(Scaled(Tied((3,)), 2.0)), sg.VP(Steady(0.3)))
    save(before, tmp_path)
    after = load(tmp_path)
    assert after.sde == sg.VP(Steady(0.3))
    assert after.net.body.first.weight is after.net.body.last.weight
    assert torch.equal(after.net.gain, before.net.gain)
    x = torch.randn(5, 3)
    assert torch.equal(after(x, 0.5), before(x, 0.5))


def test_what_is_nested_too_deep_is_told(tmp_path):
    clock = sg.schedules.Linear()
    for _ in range(10):
        clock = Slower(clock)
    save(model(sg.VP(clock)), tmp_path)
    assert load(tmp_path).sde == sg.VP(clock)
    node = {"class": "Linear"}
    for _ in range(300):
        node = {"class": "Slower", "inner": node}
    change("sde", "schedule", node)(tmp_path)
    with pytest.raises(CheckpointError, match=r"sde.schedule(.inner)* is nested too deep"):
        load(tmp_path)


def test_a_name_means_one_class():
    again = type(
        "Steady", (sg.schedules.Schedule,), {"__module__": __name__, "__qualname__": "Steady"}
    )
    kept = TABLE["Steady"]
    try:
        assert TABLE[register(again).__name__].kind is again  # a cell that was run again
    finally:
        TABLE["Steady"] = kept
    with pytest.raises(ValueError, match=r"VP is in the table already: sde_gen\.sdes"):
        register(type("VP", (sg.VP,), {}))


def test_the_table_has_all_that_a_model_is_made_of():
    for room, base in (
        (sdes, sdes.KernelSDE),
        (schedules, sg.schedules.Schedule),
        (networks, Network),
    ):
        for kind in vars(room).values():
            if isinstance(kind, type) and issubclass(kind, base) and not kind.__abstractmethods__:
                assert TABLE[kind.__name__].kind is kind


class Fast(sg.VP):
    pass


class Twice(sg.schedules.Schedule):
    T = 1.0

    def beta(self, t):
        return 2 + 0 * t


@pytest.mark.parametrize("sde", [Fast(), sg.VP(Twice())], ids=["process", "clock"])
def test_own_process_is_refused_before_anything_is_written(sde, tmp_path):
    with pytest.raises(TypeError, match=r"Fast|Twice"):
        save(model(sde), tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Stray(Network):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, None, {"shape": list(shape)})
        self.body, self.table = nn.Linear(*shape, *shape), torch.ones(3)

    def compute(self, x, c, y):
        return self.body(x)


class Counts(Stray):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.table = float(torch.ones(3).sum())


def cut_off(found: sg.ScoreNetwork) -> sg.ScoreNetwork:
    found.net.output = nn.Linear(16, 2)
    return found


def knows(found: sg.ScoreNetwork, **facts: Any) -> sg.ScoreNetwork:
    found.facts = replace(found.facts, **facts)
    return found


def told(found: sg.ScoreNetwork, **facts: Any) -> sg.ScoreNetwork:
    """What no constructor would let pass."""
    for name, value in facts.items():
        object.__setattr__(found.facts, name, value)
    return found


def tuned(found: sg.ScoreNetwork, **choice: Any) -> sg.ScoreNetwork:
    found.tuned = Tuned([Choice(4, sg.Exponential(2), **choice)])
    return found


def tuned_on(moments: sg.Moments) -> sg.ScoreNetwork:
    found = model()
    found.tuned = Tuned([Choice(4, sg.Exponential(2, moments))])
    return found


LOST = {
    "another layer": (lambda: cut_off(model()), r"net.output.weight"),
    "reference of another size": (lambda: tuned_on(sg.data_moments(torch.randn(9, 2))), "refer"),
    "moments of another size": (
        lambda: knows(model(), moments=sg.data_moments(torch.randn(9, 2))),
        r"facts.moments are of",
    ),
    "half a mean": (
        lambda: knows(model(), moments=sg.Moments(torch.ones(3), torch.ones(3).half())),
        "facts.moments must be float32 or float64",
    ),
    "another shape": (lambda: knows(model(), shape=(4,)), r"shape \(4,\), the network \(3,\)"),
    "units of another shape": (
        lambda: told(model(), units=Units(torch.zeros(4), torch.ones(4))),
        r"units of shapes \(4,\) and \(4,\) are not those of samples \(3,\)",
    ),
    "names that are no text": (
        lambda: knows(model(), classes=(1, 2)),
        r"facts.classes\[0\] must be text, got 1",
    ),
    "an infinite scale": (lambda: told(model(), std=math.inf), "JSON"),
    "infinite": (lambda: tuned(model(), ratio=math.inf), "JSON"),
    "a tensor beside": (lambda: sg.ScoreNetwork(Stray((3,)), sg.VP()), "net.table is a tensor"),
    "reads numbers": (lambda: sg.ScoreNetwork(Counts((3,)), sg.VP()), "net is no Counts"),
    "not registered": (lambda: nn.Linear(3, 3), "must be a score.*Linear"),
}


@pytest.mark.parametrize("how", LOST)
def test_what_would_not_come_back_is_refused_before_anything_is_written(
    how, tmp_path, monkeypatch
):
    for kind in (Stray, Counts):
        monkeypatch.setitem(TABLE, kind.__name__, None)
        monkeypatch.delitem(TABLE, kind.__name__)
        register(kind)
    make, message = LOST[how]
    with pytest.raises(TypeError, match=message):
        save(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    write(file, lambda f: f.write_text("old"))

    def fails(f):
        f.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(file, fails)
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_device_is_checked(tmp_path):
    save(model(), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            load(tmp_path, "cuda")


def change(*path_and_value):
    """Put a value into the configuration, or take one out (...)."""
    *path, last, value = path_and_value

    def forgeable(folder):
        config = json.loads((folder / CONFIG).read_text())
        node = config
        for key in path:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return forgeable


def text(old, new):
    return lambda folder: (folder / CONFIG).write_text(
        (folder / CONFIG).read_text().replace(old, new)
    )


def cut(name, end):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def tensors(edit):
    """Change the tensors of the file."""

    def forgeable(folder):
        found = load_file(folder / WEIGHTS)
        edit(found)
        save_file(found, folder / WEIGHTS)

    return forgeable


def becomes_a_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def doubled(found):
    found["net.input.weight"] = torch.cat(2 * [found["net.input.weight"]])


NOTHING = dict.fromkeys(f.name for f in fields(sg.Facts)) | {"std": 1.0}

DAMAGES = {
    "truncated weights": (cut(WEIGHTS, -100), "truncated or cannot be read"),
    "header cut": (cut(WEIGHTS, 20), "truncated or cannot be read"),
    "empty weights": (cut(WEIGHTS, 0), "truncated or cannot be read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors is missing"),
    "a folder of weights": (becomes_a_folder(WEIGHTS), "safetensors is missing, or is no file"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "holds no model"),
    "a folder of config": (becomes_a_folder(CONFIG), "json is missing, or is no file"),
    "truncated config": (cut(CONFIG, 150), "json cannot be read"),
    "binary config": (text("{", "\xff\xfe\0"), "json cannot be read"),
    "deep config": (text("{", "[" * 10**5), "json cannot be read"),
    "long number": (text("20.0", "2" * 5000), "json cannot be read"),
    "not a number": (text("20.0", "NaN"), "NaN is no number"),
    "long config": (text("{", " " * 2**24 + "{"), "too long"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[1, 2]"), "format None"),
    "format 0": (change("format", 0), "format 0, this version reads format 2"),
    "format 1": (change("format", 1), "format 1 .*this version reads format 2"),
    "format 3": (change("format", 3), "format 3, this version reads format 2"),
    "format true": (change("format", True), "format True"),
    "unknown process": (change("sde", "class", "Popen"), "sde must be .*VP.*, got .*'Popen'"),
    "another class": (change("sde", "class", "Perturbed"), "sde must be .*'Perturbed'"),
    "abstract process": (change("sde", "class", "LinearSDE"), "sde must be .*'LinearSDE'"),
    "a clock for a process": (change("sde", {"class": "Power"}), "sde must be .*'Power'"),
    "no class": (change("net", "class", ...), "net must be MLP or"),
    "unknown argument": (change("sde", "schedule", "beta_top", 1.0), "sde.schedule.'beta_top'"),
    "text for a number": (change("sde", "schedule", "T", "1"), "sde.schedule.T must be a finite"),
    "infinite": (change("sde", "schedule", "T", 10**400), "sde.schedule.T must be a finite num"),
    "out of range": (
        change("sde", "schedule", "T", -1.0),
        "schedule is no Linear: T must be a number > 0",
    ),
    "truth for a count": (change("net", "depth", True), "net.depth must be an integer, got True"),
    "truth for a number": (
        change("facts", "std", True),
        "facts.std must be a finite number, got True",
    ),
    "half a layer": (change("net", "depth", 1.5), "net.depth must be an integer, got 1.5"),
    "wrong sizes": (
        change("net", "width", 24),
        r"does not fit.*net.embedding.*\(16, 16\), not flo",
    ),
    "more layers": (
        change("net", "depth", 2),
        "does not fit.*net.layers.1.modulation.weight is m",
    ),
    "fewer classes": (change("net", "classes", 3), "does not fit.*net.embedding.label.weight"),
    "bad prediction": (
        change("prediction", "guess"),
        "prediction must be one of 'noise'.*'guess'",
    ),
    "bad scale": (change("facts", "std", 0), "facts is no Facts: std must be a number > 0"),
    "no scale": (change("facts", "std", ...), "facts.std is missing"),
    "no facts": (change("facts", ...), "facts is missing: ScoreNetwork needs it"),
    "null facts": (change("facts", None), "facts must be Facts, got None"),
    "facts of another class": (change("facts", {"class": "Moments"}), "facts must be Facts, got"),
    "unknown fact": (change("facts", "mean", 1.0), "facts.'mean' is unknown: Facts takes shape"),
    "network is text": (change("net", "MLP"), "net must be MLP or"),
    "another shape": (
        change("facts", {"class": "Facts", **NOTHING, "shape": [4]}),
        r"the data of facts have shape \(4,\), the network \(3,\)",
    ),
    "no shape at all": (
        change("facts", {"class": "Facts", **NOTHING, "shape": [-3]}),
        r"facts.shape is \(-3,\)",
    ),
    "another shape than the units": (
        change("facts", "shape", [4]),
        r"facts is no Facts: units of shapes \(3,\) and \(3,\) .* not those of samples \(4,\)",
    ),
    "shapes": (
        change("facts", "shape", 0, -3),
        r"facts is no Facts: units .* not those of samples \(-3,\)",
    ),
    "no shape": (change("facts", "shape", "3"), "facts.shape must be a list or null, got '3'"),
    "both shapes": (change("net", "shape", [4]), "shape"),
    "tensor gone": (tensors(lambda t: t.pop("net.norm.bias")), "net.norm.bias is missing"),
    "tensor more": (tensors(lambda t: t.update(x=torch.ones(1))), "nothing is called 'x'"),
    "tensor longer": (tensors(doubled), "net.input.weight is"),
    "tensor of integers": (
        tensors(lambda t: t.update({k: v.int() for k, v in t.items() if k[:3] == "net"})),
        "int32 .*, not floating",
    ),
    "moments lost": (
        change("facts", "moments", "mean", "tensor", "mean"),
        "facts.moments.mean names 'mean'",
    ),
    "moments of text": (
        change("facts", "moments", "mean", "mean"),
        "facts.moments.mean must be the name of a",
    ),
    "weights for moments": (
        change("facts", "moments", "mean", "tensor", "net.output.weight"),
        "the parts of facts.moments are of",
    ),
    "units lost": (
        change("facts", "units", "scale", "tensor", "scale"),
        "facts.units.scale names 'scale', which .*safetensors lacks",
    ),
    "half of the units": (change("facts", "units", "shift", ...), "facts.units.shift is missing"),
    "units of numbers": (
        change("facts", "units", "scale", 2.0),
        "facts.units.scale must be the name of a tensor, got 2.0",
    ),
    "weights for units": (
        change("facts", "units", "shift", "tensor", "net.output.weight"),
        "not those of samples",
    ),
    "units for moments": (
        change("facts", "moments", {"class": "Units"}),
        "facts.moments must be Moments or null",
    ),
    "units of nothing": (
        tensors(lambda t: t.update({"facts.units.scale": torch.zeros(3).double()})),
        "facts.units is no Units: scale must be positive",
    ),
    "units without end": (
        tensors(lambda t: t["facts.units.shift"].fill_(math.nan)),
        "facts.units is no Units: shift",
    ),
    "names of text": (change("facts", "classes", "abcd"), "facts.classes must be a list or null"),
    "a number for a name": (
        change("facts", "classes", 2, 3),
        r"facts.classes\[2\] must be text, got 3",
    ),
    "one level": (
        change("facts", "levels", 1),
        "is no Facts: levels must be an integer >= 2",
    ),
    "truth for levels": (change("facts", "levels", True), "facts.levels must be an integer or"),
    "half a level": (change("facts", "levels", 2.5), "facts.levels must be an integer or null"),
    "weights of a number": (
        change("tuned", {"class": "Tuned", "choices": [], "weights": 3}),
        "tuned.weights must be text or null, got 3",
    ),
    "tuned to nothing": (change("tuned", {"class": "Tuned", "choices": []}), "tuned is no Tuned"),
}


def damaged(how, folder):
    save(model(facts=all_known()), folder)
    damage, message = DAMAGES[how]
    damage(folder)
    return message


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_named(how, tmp_path):
    refused(tmp_path, damaged(how, tmp_path))


FORGED = [how for how, (damage, _) in DAMAGES.items() if damage.__name__ == "forgeable"]


@pytest.mark.parametrize("how", FORGED)
def test_damage_is_named_by_its_field_alone(how, tmp_path):
    message = damaged(how, tmp_path)
    forge(tmp_path)
    refused(tmp_path, message)


BOMBS = {
    "wide": change("net", "width", 30_000),
    "wider": change("net", "width", 2**40),
    "widest": change("net", "width", 2**62),
    "deep": change("net", "depth", 10**9),
    "classes": change("net", "classes", 10**12),
    "outputs": change("net", "outputs", 10**12),
    "long shape": change("net", "shape", [2] * 10**5),
    "vast shape": change("net", "shape", [2**40] * 100),
    "channels": change("net", {"class": "UNet", "shape": [1, 8, 8], "channels": 2**30}),
    "blocks": change("net", {"class": "UNet", "shape": [1, 8, 8], "channels": 4, "blocks": 10**9}),
    "levels": change("net", {"class": "UNet", "shape": [1, 8, 8], "multipliers": [1] * 10**5}),
    "attention": change("net", {"class": "UNet", "shape": [1, 8], "attention": [8] * 10**5}),
}


@pytest.mark.parametrize("how", BOMBS)
def test_nothing_is_built_that_the_file_does_not_hold(how, tmp_path):
    save(sg.ScoreNetwork(MLP((3,), 8, 1), sg.VP()), tmp_path)
    BOMBS[how](tmp_path)
    size = (tmp_path / CONFIG).stat().st_size
    start = time.process_time()
    tracemalloc.start()
    try:
        with Largest() as largest, pytest.raises(CheckpointError, match=r"net|shape"):
            load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest.bytes <= (tmp_path / WEIGHTS).stat().st_size
    assert peak < 2**20 + 100 * size  # what Python itself makes of the text
    assert time.process_time() - start < 5


def test_a_flipped_byte_is_told(tmp_path):
    save(knows(model(), moments=MOMENTS["directions"]), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    start, chance = 8 + int.from_bytes(data[:8], "little"), random.Random(0)
    for i in [start, len(data) - 1, *(chance.randrange(start, len(data)) for _ in range(50))]:
        wrong = bytearray(data)
        wrong[i] ^= 1
        (tmp_path / WEIGHTS).write_bytes(wrong)
        with pytest.raises(CheckpointError, match="safetensors is damaged: its checksum differs"):
            load(tmp_path)


def test_a_file_that_changes_later_changes_no_model(tmp_path):
    before = knows(model(), moments=MOMENTS["directions"])
    save(before, tmp_path)
    after = load(tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(bytes((tmp_path / WEIGHTS).stat().st_size))
    assert torch.equal(after.facts.moments.basis, before.facts.moments.basis)
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_changed_number_is_told(tmp_path):
    save(model(facts=sg.Facts(std=0.5)), tmp_path)
    text('"std": 0.5', '"std": 0.6')(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config.json is not what was saved with model.safe"
    ):
        load(tmp_path)
    text('"std": 0.6', '"std":  0.5')(tmp_path)  # space is free
    assert load(tmp_path).facts.std == 0.5


def test_the_checksum_is_that_of_the_bytes(tmp_path):
    # Written out once more, from the bytes of the file.
    save(model(), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, body, total = json.loads(data[8 : 8 + size]), data[8 + size :], hashlib.sha256()
    sums = head.pop("__metadata__")
    for name, entry in sorted(head.items()):
        a, b = entry["data_offsets"]
        total.update(f"{name} torch.float32 {tuple(entry['shape'])}\n".encode() + body[a:b])
    assert sums["tensors"] == total.hexdigest()


def test_a_save_that_is_cut_short_leaves_a_model(tmp_path):
    """A run saves other weights under one configuration: either file may be the newer one."""
    first, second = model(), model()
    drawn(second).net.input.weight.data.add_(1)
    save(first, tmp_path / "a")
    save(second, tmp_path / "b")
    os.replace(tmp_path / "b" / WEIGHTS, tmp_path / "a" / WEIGHTS)
    assert torch.equal(load(tmp_path / "a").net.input.weight, second.net.input.weight)
    save(model(sg.EDM()), tmp_path / "b")
    os.replace(tmp_path / "b" / WEIGHTS, tmp_path / "a" / WEIGHTS)
    with pytest.raises(CheckpointError, match="is not what was saved with"):
        load(tmp_path / "a")


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    save(model(), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save(model(sg.EDM()), tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_the_compiler_is_not_loaded(tmp_path):
    # It takes as long as PyTorch itself.
    source = f"""if True:
        import sys, sde_gen as sg
        from sde_gen.networks import MLP, UNet
        nets = MLP((3,)), MLP((3,), classes=3, embedding="fourier"), UNet.digits()
        for net in nets:
            sg.save(sg.ScoreNetwork(net, sg.VP()), {str(tmp_path)!r})
            sg.load({str(tmp_path)!r})
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", source], check=True)


def test_what_describe_says_is_what_is_written(tmp_path):
    save(model(), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text()) == describe(model())


def test_a_run_saves_whatever_can_be_built_again(tmp_path):
    x, recipe = torch.randn(64, 3), sg.Recipe(steps=3, batch=16)
    options = {"recipe": recipe, "progress": False, "device": "cpu"}
    score = compiled(sg.ScoreNetwork(drawn(MLP((3,), 16, 1)), sg.VP()))
    kept = sg.train(score, x, folder=tmp_path / "score", **options)
    same(kept, load(tmp_path / "score"))
    labels = torch.arange(64) % 3
    net, objective = drawn(MLP((3,), 16, 1, outputs=3)), Classification(sg.VP())
    kept = sg.train(net, x, labels, objective=objective, folder=tmp_path / "classes", **options)
    found = load(tmp_path / "classes", kind=MLP)
    assert torch.equal(found(x, torch.zeros(())), kept(x, torch.zeros(())))
