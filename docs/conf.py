"""Settings of the documentation: `make docs`."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path

from docutils import nodes

import sde_gen

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

# Which of its pictures stands for a notebook in the gallery.
PICTURES = {
    "01_processes": 3,
    "02_langevin": 2,
    "03_reversal": 0,
    "04_learning": 1,
    "05_samplers": 3,
    "06_guidance": 0,
    "07_posterior": 2,
    "08_chain": 2,
    "09_likelihood": 7,
    "10_one_process": 1,
    "11_generators": 3,
    "12_latents": 3,
}


def picture(notebook: Path, number: int) -> bytes:
    """One of the pictures that a notebook drew."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    data = [o.get("data", {}) for cell in cells for o in cell.get("outputs", [])]
    return base64.b64decode([d["image/png"] for d in data if "image/png" in d][number])


# Sphinx wants its sources under one roof; links in the pages point at the originals.
(DOCS / "notebooks").mkdir(exist_ok=True)
for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(notebook, DOCS / "notebooks" / notebook.name)
    image = picture(notebook, PICTURES[notebook.stem])
    (DOCS / "notebooks" / notebook.with_suffix(".png").name).write_bytes(image)

project = "sde_gen"
author = copyright = "sde_gen contributors"
release = version = sde_gen.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",  # .nojekyll: the folder can be served as it is
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
    "rooms",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# "seed, first: ..." in a docstring is taken for a type and a name, and the type for a link.
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]

# Pages with code run when the documentation is built; notebooks keep the outputs they came with.
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_execution_excludepatterns = ["notebooks/*"]

napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "sde_gen"
html_static_path = ["_static"]
html_css_files = ["style.css"]
exclude_patterns = ["_build", "slides", "README.md", "**/.ipynb_checkpoints"]


def point_at_copies(app, name: str, source: list[str]) -> None:
    """Let links to the notebooks lead to their pages."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def name_pictures(app, doctree: nodes.document) -> None:
    """A picture that a cell drew and did not describe is called by the title of its section."""
    for image in doctree.findall(nodes.image):
        if "alt" not in image and (section := section_of(image)) is not None:
            image["alt"] = f"Picture: {section.next_node(nodes.title).astext()}"


def section_of(node: nodes.Node) -> nodes.section | None:
    """The innermost section around a node."""
    while node.parent is not None and not isinstance(node, nodes.section):
        node = node.parent
    return node if isinstance(node, nodes.section) else None


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", name_pictures)
    app.connect("source-read", point_at_copies)
