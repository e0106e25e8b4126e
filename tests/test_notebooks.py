"""The notebooks: their scripts run and their claims hold, and each .ipynb is its script, run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
# What runs in some seconds is tested each time; the others with `-m slow`.
FAST = {"01_processes", "02_langevin", "10_one_process"}
LARGEST = 4_000_000
BY_NAME = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells(script: Path) -> list[dict[str, Any]]:
    return json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]


def test_they_are_numbered() -> None:
    assert len(SCRIPTS) >= 10
    assert [script.stem[:2] for script in SCRIPTS] == [
        f"{i:02d}" for i in range(1, len(SCRIPTS) + 1)
    ]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=script.stem, marks=() if script.stem in FAST else pytest.mark.slow)
        for script in SCRIPTS
    ],
)
def test_claims_hold(script: Path) -> None:
    pytest.importorskip("sklearn")
    run = subprocess.run(
        [sys.executable, script.name],
        cwd=FOLDER,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@BY_NAME
def test_notebook_is_its_script(script: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    text = jupytext.read(script).cells
    assert [(c.cell_type, c.source) for c in text] == [
        (c["cell_type"], "".join(c["source"])) for c in cells(script)
    ], f"python notebooks/execute.py {script.stem}"


@BY_NAME
def test_outputs_are_committed(script: Path) -> None:
    code = [c for c in cells(script) if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert script.with_suffix(".ipynb").stat().st_size < LARGEST


@BY_NAME
def test_begins_with_what_it_needs(script: Path) -> None:
    title, needs, *rest = cells(script)
    assert re.search(r"^\*Needs `.+`.*; runs in .+\*$", "".join(title["source"]), re.MULTILINE)
    assert 'find_spec("sde_gen") is None' in "".join(needs["source"])
    assert not needs["outputs"]
    folded = [c for c in rest if "hide-input" in c["metadata"].get("tags", [])]
    assert folded
    assert all(c["metadata"]["jupyter"]["source_hidden"] for c in folded)
    claims = re.compile(r"^\s*(assert|print)\b", re.MULTILINE)
    assert not [c for c in folded if claims.search("".join(c["source"]))]


@BY_NAME
def test_has_a_question_and_three_exercises_with_hidden_solutions(script: Path) -> None:
    all_cells = cells(script)
    first = "".join(all_cells[0]["source"])
    assert first.startswith(f"# {int(script.stem[:2])}. ")
    assert "?**" in first
    hidden = [c for c in all_cells if "hide-cell" in c["metadata"].get("tags", [])]
    assert len(hidden) >= 3
    assert all(c["metadata"]["jupyter"]["source_hidden"] for c in hidden)
    assert all("assert" in "".join(c["source"]) for c in hidden)
