"""The demo: its parts against closed forms, and the whole in small."""

from __future__ import annotations

import json

import pytest
import torch

import sde_gen as sg
from sde_gen.data import Dequantise, digits
from sde_gen.demo import Judge, demo
from sde_gen.demo.models import NoisyClassifier, Trained
from sde_gen.demo.rows import SAMPLERS, WEIGHT, guided
from sde_gen.networks import UNet
from sde_gen.training import load
from sde_gen.training.rows import count_known

TEST = digits("test")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(digits("train"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of one second, ten samples a row."""
    folder = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    return (
        demo(folder, minutes=1 / 60, progress=False, say=lines.append, samples=10),
        folder,
        lines,
    )


def test_judge_knows_real_digits(judge):
    floor = judge.grade(TEST.x, TEST.y)
    assert floor["accuracy"] > 0.98
    wrong = judge.grade(TEST.x, (TEST.y + 1) % 10)
    assert wrong["accuracy"] < 0.02
    assert wrong["frechet"] == floor["frechet"]
    # within a level nothing changes: the judge sees grey levels
    assert judge.grade(Dequantise(17)(TEST.x), TEST.y) == floor
    own = judge.grade(judge.train.x, judge.train.y)
    assert own["frechet"] == pytest.approx(0, abs=1e-6)
    assert judge.nearest(judge.train.x[:20]) == {"least": 0, "median": 0}


def test_gaussian_fit_has_the_moments_of_the_data(judge):
    x, y = judge.train.x.flatten(1).double(), judge.train.y
    n = 20_000
    drawn = judge.gaussian_fit(torch.full((n,), 3), per_class=True).flatten(1).double()
    data = x[y == 3]
    spread = data.std(0) / n**0.5
    assert ((drawn.mean(0) - data.mean(0)).abs() <= 5 * spread + 1e-6).all()
    scale = data.T.cov().diagonal().max()
    assert (drawn.T.cov() - data.T.cov()).abs().max() < 5 * scale * (2 / n) ** 0.5
    one = judge.gaussian_fit(torch.arange(n) % 10, per_class=False).flatten(1).double()
    assert (one.T.cov() - x.T.cov()).abs().max() < 5 * x.T.cov().max() * (2 / n) ** 0.5


def test_guidance_adds_what_it_says():
    torch.manual_seed(0)
    net = UNet.digits()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    score, classifier = sg.ScoreNetwork(net, sg.VP()).eval(), NoisyClassifier().eval()
    x, y, t = torch.randn(6, 1, 8, 8), torch.arange(6), torch.tensor(0.4)
    ways = {k: s(x, t) for k, s in guided(Trained(score, classifier, {}), y).items()}
    given, free = score(x, t, y=y), score(x, t)
    assert torch.equal(ways["none"], given)
    torch.testing.assert_close(ways["classifier-free"], given + WEIGHT * (given - free))
    z = x.clone().requires_grad_()
    c = 0.25 * torch.log(score.sde.sigma(t) / score.sde.alpha(t)).float()
    c_in = 1 / torch.sqrt(score.sde.alpha(t) ** 2 + score.sde.sigma(t) ** 2).float()
    log_p = torch.log_softmax(classifier(c_in * z, c), 1)[torch.arange(6), y].sum()
    (gradient,) = torch.autograd.grad(log_p, z)
    torch.testing.assert_close(ways["classifier"], given + WEIGHT * gradient)


def test_results_hold_every_row(small):
    results, folder, _ = small
    assert json.loads((folder / "results.json").read_text()) == results
    rows = results["rows"]
    assert [(r["sampler"], r["guidance"]) for r in rows] == [
        (s.name, g) for s in SAMPLERS for g in ("none", "classifier", "classifier-free")
    ]
    for row in rows:
        assert set(row) == {
            "sampler",
            "guidance",
            "calls",
            "seconds",
            "accuracy",
            "frechet",
            "energy",
        }
        assert 0 <= row["accuracy"] <= 1
        assert row["frechet"] > 0
        assert row["seconds"] > 0
    for sampler, row in zip(SAMPLERS, rows[::3], strict=True):
        if not isinstance(sampler.solver, sg.SciPy):
            steps = len(sampler.times(sg.VP())) - 1
            assert row["calls"] == sampler.solver.calls * steps
    assert results["floor"]["accuracy"] > 0.98
    assert results["floor"]["frechet"] < results["baselines"]["one Gaussian"]["frechet"]
    assert results["bits_per_dim"]["with_class"] > 1
    assert results["nearest_neighbour"]["real test images"]["median"] > 0.5


def test_report_shows_every_row(small):
    results, _, lines = small
    text = "\n".join(lines)
    for row in results["rows"]:
        start = f"{row['sampler']:34} {row['guidance']} "
        assert sum(line.startswith(start) for line in lines) == 1
    assert "floor: real test images" in text
    assert "a Gaussian for each class" in text
    assert "bits a pixel" in text


def test_figure_and_model_are_there(small):
    from matplotlib.image import imread

    _, folder, _ = small
    height, width, _ = imread(folder / "digits.png").shape
    assert width > height > 400
    assert sg.sample(load(folder).given(y=torch.tensor([3])), 1, 4, seed=0).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "word"), [({"minutes": 0}, "minutes"), ({"samples": 5}, "10")]
)
def test_demo_refuses_before_work(options, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        demo(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_demo_remembers_its_data(small):
    _, folder, _ = small
    assert count_known(digits("train").x, folder) == 1397
    assert count_known(TEST.x, folder) == 0


@pytest.mark.slow
def test_demo_reaches_its_goals(tmp_path):
    results = demo(tmp_path, progress=False)
    plain = [r for r in results["rows"] if r["guidance"] == "none"]
    assert all(r["accuracy"] >= 0.97 for r in plain)
    assert all(r["frechet"] <= 1.0 and r["energy"] <= 0.012 for r in plain)
    assert results["bits_per_dim"]["with_class"] <= 2.06
