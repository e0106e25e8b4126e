"""The solver table is true: what docs/solvers.md says is measured again and compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_solver_table_is_not_stale() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "certify.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
