"""Slides of the notebooks: `make slides`, or `python docs/slides.py [name] [--reveal PLACE]`.

A heading begins a slide, a picture is one of its own below it. Code that only draws and solutions
of exercises are left out, and so is code that no slide can hold; formulas are MathML, as on the
pages. reveal.js comes from the network, or from a folder: `npm pack reveal.js@4`, unpacked.
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
from mathml import mathml
from nbformat import NotebookNode

DOCS = Path(__file__).parent
OUT = DOCS / "_build" / "slides"
REVEAL = "https://unpkg.com/reveal.js@4.6.1"
MOST = 26  # lines of code on a slide
ROOM = 18.0  # lines of text on a slide
LEAST = 340  # pixels of height kept for a picture; in a browser it grows into what is left
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(?!\s)(.+?)(?<!\s)\$", re.DOTALL)


def drawn(match: re.Match[str]) -> str:
    """A formula as MathML."""
    if match[1]:
        return f'<div class="formula">{mathml(match[1], "block")}</div>'
    return mathml(match[2])


def written(source: str) -> str:
    """A text with its formulas drawn; code is left alone."""
    parts = re.split(r"(`[^`]*`)", source)
    return "".join(p if p.startswith("`") else FORMULA.sub(drawn, p) for p in parts)


def shown(cell: NotebookNode) -> bool:
    """Whether a cell is for the audience: no solutions, and nothing that sets up the machine."""
    tags = cell.metadata.get("tags", [])
    setup = cell.source.startswith("%") or ("hide-input" in tags and not cell.outputs)
    return "hide-cell" not in tags and not setup


def has_picture(cell: NotebookNode) -> bool:
    """Whether a cell drew something."""
    return any({"image/png", "text/html"} & o.get("data", {}).keys() for o in cell.outputs)


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """What was printed line by line, as one text."""
    texts = [o for o in outputs if o.output_type == "stream"]
    if not texts:
        return outputs
    whole = nbformat.v4.new_output("stream", text="".join(o.text for o in texts))
    return [whole, *(o for o in outputs if o.output_type != "stream")]


def parts(cell: NotebookNode) -> list[NotebookNode]:
    """What is shown of a cell: a text by its headings, code apart from a picture."""
    if cell.cell_type == "markdown":
        texts = re.split(r"(?m)^(?=##? )", re.sub(r"(?m)^\*Needs .*\n?", "", cell.source))
        return [nbformat.v4.new_markdown_cell(text) for text in texts if text.strip()]
    lines = len(cell.source.splitlines())
    hidden = "hide-input" in cell.metadata.get("tags", []) or lines > MOST
    output = nbformat.v4.new_code_cell(cell.source, outputs=merged(cell.outputs))
    output.metadata["transient"] = {"remove_source": hidden or has_picture(cell)}
    if hidden or not has_picture(cell):
        return [output]
    return [nbformat.v4.new_code_cell(cell.source), output]


def height(cell: NotebookNode) -> float:
    """Of a part, in lines of text, about."""
    if cell.cell_type == "markdown":
        text = re.sub(r"(?s)\$\$.+?\$\$", "", cell.source)
        blocks = len(re.findall(r"\n\n|\n[#*-] ", text)) + len(re.findall(r"(?m)^#", text))
        return len(text) / 95 + 0.6 * blocks + 1.1 * cell.source.count("$$")
    said = "".join(o.get("text", "") for o in cell.outputs)
    code = "" if cell.metadata.get("transient", {}).get("remove_source") else cell.source
    lines = len(code.splitlines()) + len(said.splitlines())
    return 0.62 * lines + 1 + sum(map(height_of_picture, cell.outputs))


def height_of_picture(output: NotebookNode) -> float:
    """Of what a cell drew, in lines of text, at least; a film counts as a large picture."""
    data = output.get("data", {})
    if "image/png" in data:
        head = base64.b64decode(data["image/png"][:64])
        wide, high = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
        return min(LEAST, high * min(1, 1045 / wide)) / 35
    return LEAST / 35 if "text/html" in data else 0.0


def slides(notebook: NotebookNode) -> NotebookNode:
    """The notebook as slides: what has no room on one begins the next, code with its picture."""
    cells, room = [], 0.0
    for whole in filter(shown, notebook.cells):
        rest = list(map(height, pieces := parts(whole)))
        for cell in pieces:
            text = cell.cell_type == "markdown"
            together = rest[0] if text or sum(rest) > ROOM else sum(rest)
            first = text and cell.source.startswith("#")
            kind = "slide" if first else "-" if together <= room else "subslide"
            room = (room if kind == "-" else ROOM) - rest.pop(0)
            cell.metadata["slideshow"] = {"slide_type": kind}
            cell.source = written(cell.source) if text else cell.source
            cells.append(cell)
    notebook.cells = cells
    return notebook


def export(notebook: Path, reveal: str) -> Path:
    """Write the slides of one notebook."""
    from nbconvert import SlidesExporter
    from pygments.formatters import HtmlFormatter

    exporter = SlidesExporter(
        template_name="slides", extra_template_basedirs=[str(DOCS)], reveal_url_prefix=reveal
    )
    css = HtmlFormatter(style="default").get_style_defs(".highlight")
    resources: dict[str, Any] = {"metadata": {"name": notebook.stem}, "slides": {"css": css}}
    node = slides(nbformat.read(notebook, as_version=4))
    text, _ = exporter.from_notebook_node(node, resources=resources)
    target = OUT / f"{notebook.stem}.html"
    target.write_text(text, encoding="utf-8")
    return target


def main() -> None:
    """Slides of all notebooks, or of those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of notebooks; all, by default")
    parser.add_argument("--reveal", default=REVEAL, help="address or folder of reveal.js")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    shutil.copy2(DOCS / "_static" / "fonts" / "stix-two-math.woff2", OUT)
    reveal = given.reveal
    if Path(reveal).is_dir():
        shutil.copytree(reveal, OUT / "reveal", dirs_exist_ok=True)
        reveal = "reveal"
    for notebook in sorted((DOCS.parent / "notebooks").glob("[0-9]*.ipynb")):
        if not given.names or notebook.stem in given.names:
            print(export(notebook, reveal))


if __name__ == "__main__":
    main()
