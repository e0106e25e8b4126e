"""Tables, figures and JSON files: what every benchmark prints and writes, in one style."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COLORS = ("#0b6e99", "#d1495b", "#2a9d4f", "#8f4fbf", "#e08e0b", "#3c3c3c")
GREYS = ("0.25", "0.45", "0.6")
PEERS = (
    "torch",
    "azula",
    "deepinv",
    "diffusers",
    "k-diffusion",
    "smalldiffusion",
    "torchdiffeq",
    "scipy",
    "sde-gen",
)


def versions(stored: Path | None = None) -> dict[str, str]:
    """What was measured, by version; of what is absent, that of the results that are stored."""
    known = json.loads(stored.read_text())["versions"] if stored and stored.exists() else {}
    found = {"python": platform.python_version(), **{name: _version(name) for name in PEERS}}
    return {k: known.get(k, v) if v == "absent" else v for k, v in found.items()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, columns aligned."""
    width = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, width, strict=True)) + " |"

    print(line(heads))
    print("|" + "|".join("-" * (w + 2) for w in width) + "|")
    for row in rows:
        print(line(row))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def panels(n: int, columns: int = 2, size: tuple[float, float] = (4.6, 3.3)) -> tuple[Any, Any]:
    """A figure of n equal panels, and the list of their axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, n)
    lines = -(-n // columns)
    shape = (size[0] * columns, size[1] * lines + 1.2)
    fig, axes = plt.subplots(lines, columns, figsize=shape, squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for ax in flat[n:]:
        ax.remove()
    for ax in flat[:n]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.92", lw=0.6)
        ax.set_axisbelow(True)
    return fig, flat[:n]


def call_ticks(ax: Any, calls: Sequence[float]) -> None:
    """Label a logarithmic axis at the numbers that were measured."""
    ax.set_xticks(calls, [f"{c:g}" for c in calls])
    ax.minorticks_off()
    ax.set_xlim(min(calls) * 0.93, max(calls) * 1.07)


def finish(fig: Any, axes: Any, x: str, y: str, path: Path) -> None:
    """Common labels, one legend under the panels, and the file."""
    import matplotlib.pyplot as plt

    handles, labels = axes[0].get_legend_handles_labels() if len(axes) else ([], [])
    for ax in fig.axes:
        if ax.get_subplotspec().is_last_row():
            ax.set_xlabel(x)
    fig.supylabel(y, fontsize=10)
    if labels:
        place = "outside lower center"
        columns = min(3, len(labels))
        fig.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=140)
    plt.close(fig)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
