"""Options from a TOML file: the command line wins, and what is no option is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from sde_gen.cli import config, main
from sde_gen.cli.options import parser

if config.tomllib.__name__ == "tomllib":
    import tomllib
else:  # Python 3.10
    import tomli as tomllib


def parsed(tmp_path: Path, text: str, *words: str) -> dict[str, object]:
    """The options that a command gets, with the text as its file."""
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    command, *rest = words
    words = (command, "--config", str(file), *rest)
    top = parser()
    config.read_config(top, words)
    return vars(top.parse_args(words))


def test_the_file_fills_in_and_the_command_line_wins(tmp_path) -> None:
    text = (
        'data = "digits"\nout = "m"\nsteps = 7\nlr = 1e-3\nsde = "ve"\ngrey = true\nminutes = 2\n'
    )
    found = parsed(tmp_path, text, "train", "--steps", "9", "--sde", "edm")
    assert (found["data"], found["out"], found["steps"]) == ("digits", "m", 9)
    assert (found["lr"], found["sde"], found["grey"]) == (1e-3, "edm", True)
    assert found["minutes"] == 2.0
    assert isinstance(found["minutes"], float)
    assert found["seed"] == 0
    assert parsed(tmp_path, text, "train", "two_moons", "--out", "n")["data"] == "two_moons"
    assert parsed(tmp_path, text, "train", "two_moons", "--out", "n")["out"] == "n"


def test_lists_and_lists_of_several_options(tmp_path) -> None:
    assert parsed(tmp_path, 'model = "m"\nsteps = [3, 4]', "tune")["steps"] == [3, 4]
    assert parsed(tmp_path, 'model = "m"\nsteps = [3, 4]', "tune", "--steps", "5")["steps"] == [5]
    text = 'model = "m"\ndata = "y.npz"\nnoise = 0.1\nout = "x.npz"\nblur = 2\ndownsample = [2, 4]'
    found = parsed(tmp_path, text, "restore")
    assert found["operators"] == [("blur", "2"), ("downsample", "2"), ("downsample", "4")]
    found = parsed(tmp_path, text, "restore", "--mask", "m.npy")
    assert found["operators"][-1] == ("mask", "m.npy")
    assert len(found["operators"]) == 4


def test_the_file_of_one_command_leaves_the_others(tmp_path) -> None:
    parsed(tmp_path, "minutes = 3", "demo")
    assert vars(parser().parse_args(["demo"]))["minutes"] == 1.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step = 5", "step is no option of train: did you mean steps?"),
        ("label-s = 'y'", "label-s is no option of train: did you mean labels?"),
        ("zzz = 1", "zzz is no option of train: there are data, levels, key,"),
        ("resume = true", "resume is no option of train"),
        ("config = 'other.toml'", "config is no option of train"),
        ("steps = 2.5", "steps cannot be 2.5: invalid literal for int"),
        ("steps = 'many'", "steps cannot be 'many': invalid literal for int"),
        ("steps = true", "steps cannot be True: expected a number, a text"),
        ("steps = [1, 2]", "steps cannot be [1, 2]: expected one value"),
        ("grey = 1", "grey cannot be 1: expected true or false"),
        ("sde = 'vpp'", "sde cannot be 'vpp': expected one of vp, subvp, ve, edm"),
        ("[train]\nsteps = 1", "train is no option of train: there are"),
        ("steps = ", "is no TOML file"),
        ("\xff", "is no TOML file"),
    ],
)
def test_what_is_no_option_is_named(text: str, words: str, tmp_path, capsys) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="latin-1")
    arguments = ["train", "two_moons", "--out", str(tmp_path / "m"), "--config", str(file)]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sde-gen train: error: ")
    assert words in line
    assert "run.toml" in line
    assert not (tmp_path / "m").exists()


def test_a_file_that_is_not_there_and_an_argument_that_is_missing(tmp_path, capsys) -> None:
    assert main(["demo", f"--config={tmp_path / 'none.toml'}"]) == 2
    assert "none.toml" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        parsed(tmp_path, "steps = 1", "train", "two_moons")
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_a_run_keeps_its_options_and_can_be_had_again(tmp_path, capsys) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    words = ["train", "two_moons", "--steps", "4", "--batch", "8", "--lr", "1e-05", "--seed", "3"]
    assert main([*words, "--out", str(first), "--device", "cpu"]) == 0
    kept = tomllib.loads((first / "train.toml").read_text(encoding="utf-8"))
    assert kept["data"] == "two_moons"
    assert (kept["steps"], kept["batch"], kept["lr"], kept["seed"]) == (4, 8, 1e-5, 3)
    assert kept["sde"] == "vp"
    assert not {"resume", "overwrite", "config", "command", "name"} & set(kept)
    assert main(["train", "--config", str(first / "train.toml"), "--out", str(second)]) == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(a[k].equal(b[k]) for k in a)
    # A run that is refused keeps what it was; one that goes on has what it went on with.
    before = (first / "train.toml").read_bytes()
    assert main([*words, "--out", str(first), "--device", "cpu", "--batch", "9"]) == 2
    assert (first / "train.toml").read_bytes() == before
    again = ["train", "--config", str(first / "train.toml"), "--resume"]
    assert main([*again, "--batch", "9"]) == 2
    assert (first / "train.toml").read_bytes() == before
    assert main([*again, "--steps", "6"]) == 0
    assert tomllib.loads((first / "train.toml").read_text())["steps"] == 6


def test_texts_survive_the_way_there_and_back(tmp_path) -> None:
    import argparse

    odd = {"data": 'a "b" \\ c\té 😀', "lr": 1e-300, "steps": 5, "grey": False}
    assert tomllib.loads(config.text_of(argparse.Namespace(**odd, key=None))) == odd
