"""The package as its user meets it: imported, run from the shell, read about."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

# Slow to import, or of an extra: for who calls what needs them.
LAZY = [
    "accelerate",
    "diffusers",
    "matplotlib",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "torchsde",
]


def python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(*args: str, cwd: Path = ROOT, timeout: float = 120) -> str:
    """Output of a command; its error is the test's message."""
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        args, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(args)[:200]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    return set(run(sys.executable, "-c", code).split())


def test_import_is_light() -> None:
    extra = modules_after("import sde_gen") - modules_after("import torch")
    assert any(module.startswith("sde_gen.") for module in extra)
    heavy = {lazy for lazy in LAZY for m in extra if m == lazy or m.startswith(lazy + ".")}
    assert not heavy, f"`import sde_gen` also imports {sorted(heavy)}: import inside the function"


def test_version_is_one() -> None:
    import sde_gen

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, flags=re.MULTILINE)
    assert newest is not None, "CHANGELOG.md names no version"
    assert config["metadata"]["version"] == "attr: sde_gen.__version__"  # the one place
    assert sde_gen.__version__ == newest[1]
    for file in ("CITATION.cff", "docs/conf.py"):
        assert newest[1] not in (ROOT / file).read_text(encoding="utf-8"), file


def test_what_is_exported_exists() -> None:
    import sde_gen

    missing = [name for name in sde_gen.__all__ if not hasattr(sde_gen, name)]
    assert not missing
    assert (Path(sde_gen.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("command", [("-m", "sde_gen"), ("-m", "sde_gen", "demo")])
def test_help(command: tuple[str, ...]) -> None:
    assert "usage: sde-gen" in run(sys.executable, *command, "--help")


def test_console_script() -> None:
    script = Path(sys.executable).with_name("sde-gen")
    assert "demo" in run(str(script), "--help")


def test_unknown_command_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sde_gen", "dream"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "dream" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=lambda page: page.stem)
def test_every_example_runs_alone(page: Path, tmp_path: Path) -> None:
    blocks = python_blocks(page)
    assert blocks, f"{page.name} shows no Python"
    for code in blocks:
        run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path, timeout=60)


def test_readme_names_what_exists() -> None:
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    broken = [link for link in links if not (ROOT / link).exists()]
    assert not broken, f"README.md points at {broken}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"no `make {target}`"
