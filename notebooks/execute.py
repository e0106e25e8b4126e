"""Write the notebooks from their scripts and run them: `python notebooks/execute.py [name ...]`.

The scripts (jupytext, percent format) are what is edited; each .ipynb is its script with outputs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(script: Path) -> float:
    """Run one script as a notebook and write it beside the script; returns seconds."""
    notebook = jupytext.read(script)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    start = time.perf_counter()
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(HERE))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    return time.perf_counter() - start


if __name__ == "__main__":
    for script in sorted(HERE.glob("[0-9]*.py")):
        if len(sys.argv) == 1 or script.stem in sys.argv[1:]:
            print(f"{script.stem}: {execute(script):.0f} s")
