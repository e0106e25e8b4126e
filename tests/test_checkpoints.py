"""Models on disk: what is written comes back, and what is broken says so."""

from __future__ import annotations

import json
import pickletools

import pytest
import torch
from torch import nn

import sde_gen as sg
from sde_gen.networks import MLP, UNet
from sde_gen.training import CheckpointError, load, save
from sde_gen.training.checkpoints import CONFIG, WEIGHTS, write

SDES = [
    sg.VP(),
    sg.VP(sg.Cosine(0.01, 10.0)),
    sg.VP(sg.Quadratic(0.2, 15.0, 2.0)),
    sg.VP(sg.Sigmoid(0.1, 12.0, 5.0)),
    sg.VP(sg.Tabulated(torch.linspace(1e-4, 0.02, 50), T=3.0)),
    sg.SubVP(sg.Linear(0.1, 18.0)),
    sg.VE(sg.Geometric(0.02, 30.0)),
    sg.EDM(60.0),
    sg.Wiener(2.0),
    sg.OrnsteinUhlenbeck(-0.8, 1.1, 4.0),
]


def model(sde: sg.LinearSDE | None = None, **options) -> sg.ScoreNetwork:
    torch.manual_seed(0)
    net = MLP((3,), width=16, depth=1, classes=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return sg.ScoreNetwork(net, sde or sg.VP(), **options)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_process_comes_back(sde, tmp_path):
    save(model(sde, prediction="velocity", data_std=0.1 + 0.2), tmp_path)
    found = load(tmp_path)
    assert found.sde == sde
    assert type(found.sde) is type(sde)
    assert (found.prediction, found.data_std, found.shape) == ("velocity", 0.1 + 0.2, (3,))


@pytest.mark.parametrize("sde", [sg.VP(), sg.EDM(20.0)], ids=repr)
def test_loaded_model_samples_the_same(sde, tmp_path):
    before = model(sde, data_std=0.4)
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
    with pytest.raises(CheckpointError, match=r"Own.*net="):
        load(tmp_path)
    after = load(tmp_path, net=Own())
    x = torch.randn(5, 3)
    assert torch.equal(after(x, 0.5), before(x, 0.5))


class Fast(sg.VP):
    pass


class Twice(sg.Schedule):
    T = 1.0

    def beta(self, t):
        return 2 + 0 * t


@pytest.mark.parametrize("sde", [Fast(), sg.VP(Twice())], ids=["process", "clock"])
def test_own_process_is_refused_before_anything_is_written(sde, tmp_path):
    with pytest.raises(TypeError, match=r"Fast|Twice"):
        save(model(sde), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def damage(folder, how):
    weights, config = folder / WEIGHTS, folder / CONFIG
    text = config.read_text()
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "header cut":
        weights.write_bytes(weights.read_bytes()[:20])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "truncated config":
        config.write_text(text[: len(text) // 2])
    elif how == "binary config":
        config.write_bytes(b"\xff\xfe\x00")
    elif how == "a list":
        config.write_text("[1, 2]")
    elif how == "old format":
        config.write_text(text.replace('"format": 1', '"format": 0'))
    elif how == "unknown process":
        config.write_text(text.replace('"VP"', '"Popen"'))
    elif how == "another class":
        config.write_text(text.replace('"VP"', '"Perturbed"'))
    elif how == "abstract process":
        config.write_text(text.replace('"VP"', '"LinearSDE"'))
    elif how == "unknown argument":
        config.write_text(text.replace('"beta_max"', '"beta_top"'))
    elif how == "bad argument":
        config.write_text(text.replace("20.0", '"20"'))
    elif how == "wrong sizes":
        config.write_text(text.replace('"width": 16', '"width": 24'))
    elif how == "bad prediction":
        config.write_text(text.replace('"preconditioned"', '"guess"'))
    elif how == "missing entry":
        config.write_text(text.replace('"data_std"', '"std_data"'))
    elif how == "network is text":
        found = json.loads(text)
        found["network"] = "MLP"
        config.write_text(json.dumps(found))


DAMAGES = {
    "truncated weights": "truncated or cannot be read",
    "header cut": "truncated or cannot be read",
    "empty weights": "truncated or cannot be read",
    "no weights": "missing",
    "no config": "holds no model",
    "truncated config": "cannot be read",
    "binary config": "cannot be read",
    "a list": "format None",
    "old format": "format 0",
    "unknown process": "unknown process or clock: 'Popen'",
    "another class": "unknown process or clock: 'Perturbed'",
    "abstract process": "does not describe a model",
    "unknown argument": "beta_top",
    "bad argument": "does not describe a model",
    "wrong sizes": "does not fit MLP",
    "bad prediction": "guess",
    "missing entry": "data_std",
    "network is text": "does not describe a model",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_named(how, tmp_path):
    save(model(), tmp_path)
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=DAMAGES[how]):
        load(tmp_path)


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
