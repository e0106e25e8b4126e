"""The documentation: its code runs, its links lead somewhere, and browsers show it."""

from __future__ import annotations

import html
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
WIDEST = 100  # characters of code that a page shows at 1280 pixels
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def code(page: Path) -> str:
    """The cells of a page as one program, magics and options left out."""
    cells = CELL.findall(page.read_text(encoding="utf-8"))
    lines = [line for cell in cells for line in cell.splitlines()]
    return "\n".join(line for line in lines if not re.match(r":\w+:|%", line))


@pytest.mark.parametrize(
    "name",
    [
        "chain",
        "coming",
        "conditions",
        "course",
        "contrast",
        "devices",
        "extending",
        "guidance",
        "index",
        "inverse",
        "latent",
        "networks",
        "training",
    ],
)
def test_code_runs(name: str) -> None:
    source = code(DOCS / f"{name}.md")
    assert len(source) > 200
    exec(compile(source, f"{name}.md", "exec"), {"__name__": name})


@pytest.mark.slow
def test_tour_runs() -> None:
    exec(compile(code(DOCS / "tour.md"), "tour.md", "exec"), {"__name__": "tour"})


def test_each_extension_is_short() -> None:
    for cell in CELL.findall((DOCS / "extending.md").read_text(encoding="utf-8")):
        assert len(cell.splitlines()) < 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_of_code_is_cut(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?!\{toctree|\{glossary)[^\n]*\n(.*?)^```", text, re.M | re.S):
        for line in block.splitlines():
            assert len(line) <= WIDEST or line.startswith((":", "|")), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, anchor in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        target = (page.parent / path).resolve() if path else page
        if target.parent == DOCS / "notebooks":  # pictures that the build takes from notebooks
            target = ROOT / "notebooks" / target.with_suffix(".ipynb").name
        assert target.exists(), f"{page.name} points at {path}"
        if anchor and target.suffix == ".md":
            other = target.read_text(encoding="utf-8")
            titles = [
                re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-")
                for t in re.findall(r"^#+ (.*)$", other, re.MULTILINE)
            ]
            assert anchor[1:] in titles or f"({anchor[1:]})=" in other, f"{page.name}: {anchor}"


def test_choosing_page_repeats_what_the_notebook_measured() -> None:
    notebook = (ROOT / "notebooks" / "05_samplers.ipynb").read_text(encoding="utf-8")
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|((?: [0-9.]+e-[0-9]+ \|){4})$", page, re.MULTILINE)
    assert len(rows) == 7
    for name, numbers in rows:
        printed = re.search(re.escape(name) + r" +((?: *[0-9.]+e-[0-9]+){4})\\n", notebook)
        assert printed, name
        measured = [float(v) for v in printed[1].split()]
        assert measured == [float(v) for v in numbers.replace("|", " ").split()], name


# ---- the API, by rooms ----

HOUSE = ROOT / "sde_gen"
# Rooms that are no user's: they serve others, or are called from the shell.
INNER = {"ops", "levels", "demo", "cli", "conftest"}


def beside(name: str) -> ModuleType:
    """A module that stands among the pages."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def homes() -> dict[str, dict[str, Any]]:
    return beside("rooms").homes()


def test_every_room_has_its_page(homes: dict[str, dict[str, Any]]) -> None:
    there = {p.stem for p in HOUSE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    there = {name for name in there if not name.startswith("_")}
    assert there - INNER == set(homes), "a new room is a line of ROOMS in docs/rooms.py"
    assert all(homes.values())


def test_every_public_name_is_on_one_page(homes: dict[str, dict[str, Any]]) -> None:
    import sde_gen

    shown = [name for names in homes.values() for name in names]
    assert len(shown) == len(set(shown))
    modules = {n for n in sde_gen.__all__ if inspect.ismodule(getattr(sde_gen, n))}
    assert {f"sde_gen.{n}" for n in sde_gen.__all__ if n not in modules} <= set(shown)
    for room in homes:
        module = importlib.import_module(f"sde_gen.{room}")
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            assert any(thing is other for names in homes.values() for other in names.values()), (
                name
            )


def test_every_public_name_has_an_example(homes: dict[str, dict[str, Any]]) -> None:
    rooms = beside("rooms")
    things = {n: o for names in homes.values() for n, o in names.items() if rooms.is_documented(o)}
    assert len(things) > 200
    missing = [n for n, o in things.items() if ">>>" not in (inspect.getdoc(o) or "")]
    assert not missing, f"no example (>>>) in the docstrings of {missing}"


def test_pages_show_calls_and_hide_torch(homes: dict[str, dict[str, Any]]) -> None:
    rooms = beside("rooms")
    text = rooms.page("scores", homes["scores"])
    table, _, entries = text.partition(".. automodule::")
    for name in homes["scores"]:
        assert f"<{name}>`" in table
        assert re.search(
            rf"(autoclass|autofunction|py:data):: {re.escape(name)}$", entries, re.MULTILINE
        )
    assert ":special-members: __call__" in entries
    assert ":inherited-members:" not in entries
    said = " ".join(rooms.inherited(homes["sdes"]["sde_gen.VP"]))
    assert "sde_gen.LinearSDE.alpha" in said
    assert "sde_gen.SDE.reverse" in said
    said = " ".join(rooms.inherited(homes["scores"]["sde_gen.ScoreNetwork"]))
    assert "sde_gen.Score.denoise" in said
    assert "state_dict" not in said


def test_words_lead_to_what_exists(homes: dict[str, dict[str, Any]]) -> None:
    text = (DOCS / "words.md").read_text(encoding="utf-8")
    names = {name: thing for room in homes.values() for name, thing in room.items()}
    linked = re.findall(r"\{py:obj\}`[^`]*<([\w.]+)>`", text)
    assert len(linked) > 50
    assert not [name for name in linked if name not in names]
    for word in ("DDPM", "DDIM", "epsilon", "inpainting", "classifier-free guidance"):
        assert re.search(rf"^{word}$", text, re.MULTILINE), word


# ---- slides ----


def cell(source: str, tags: str = "", **outputs: str) -> Any:
    """A cell of code that printed or drew something."""
    nbformat = pytest.importorskip("nbformat")
    made = nbformat.v4.new_code_cell(source)
    made.metadata["tags"] = [tags] if tags else []
    for kind, data in outputs.items():
        mime = {"png": "image/png", "html": "text/html"}
        made.outputs.append(
            nbformat.v4.new_output("stream", text=data)
            if kind == "text"
            else nbformat.v4.new_output("display_data", {mime[kind]: data})
        )
    return made


def test_slides_show_what_a_lecture_needs() -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("latex2mathml")
    text = nbformat.v4.new_markdown_cell("# 1. A\n\n*Needs `x`; runs.*\n\n## B\n\n$a$ and `$b`")
    film, drawing = cell("movie()", html="film"), cell("plot()", "hide-input", html="film")
    claim, solution = cell("print(1)", text="1"), cell("assert 1", "hide-cell", text="no")
    long, needs = cell("\n".join(["x = 1"] * 40), text="2"), cell("install()", "hide-input")
    cells = [text, needs, claim, drawing, film, long, solution]
    shown = beside("slides").slides(nbformat.v4.new_notebook(cells=cells)).cells
    kinds = [(c.metadata["slideshow"]["slide_type"], c.source.split("\n")[0]) for c in shown]
    assert kinds == [
        ("slide", "# 1. A"),
        ("slide", "## B"),
        ("-", "print(1)"),
        ("-", "plot()"),
        ("subslide", "movie()"),  # the code keeps together with what it drew
        ("-", "movie()"),
        ("-", "x = 1"),
    ]
    assert "Needs" not in shown[0].source
    assert "<mi>a</mi>" in shown[1].source
    assert "`$b`" in shown[1].source
    hidden = [c.metadata.get("transient", {}).get("remove_source", False) for c in shown[2:]]
    assert hidden == [False, True, False, True, True]


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda path: path.stem
)
def test_every_slide_has_room(notebook: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("latex2mathml")
    slides = beside("slides")
    cells = filter(slides.shown, nbformat.read(notebook, as_version=4).cells)
    for part in (part for whole in cells for part in slides.parts(whole)):
        assert slides.height(part) < slides.ROOM * 1.1, part.source


# ---- formulas ----


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\mathrm{d}x", '<mi mathvariant="normal">d</mi><mi>x</mi>'),
        (r"\mathrm E", '<mi mathvariant="normal">E</mi>'),
        (r"\mathrm{KL}(p)", '<mi>KL</mi></mrow><mo stretchy="false">('),
        (r"\mathcal N", '<mi mathvariant="normal">\U0001d4a9</mi>'),
        (r"\mathcal L", '<mi mathvariant="normal">ℒ</mi>'),
        (r"\mathbb R", '<mi mathvariant="normal">ℝ</mi>'),
        (r"\log p", '<mi>log</mi><mspace width="0.167em" /><mi>p</mi>'),
        (r"2\log p", '<mn>2</mn><mspace width="0.167em" /><mi>log</mi>'),
        (r"-\log(p)", '<mo>−</mo><mi>log</mi><mo stretchy="false">('),
        (r"(1)\max(a)", ')</mo><mspace width="0.167em" /><mi>max</mi><mo'),
        (r"\Phi", '<mi mathvariant="normal">Φ</mi>'),
        (r"\lfloor a\rfloor", "<mo>⌊</mo><mi>a</mi><mo>⌋</mo>"),
    ],
)
def test_formulas_follow_tex(latex: str, expected: str) -> None:
    pytest.importorskip("latex2mathml")
    pytest.importorskip("docutils")
    assert expected in beside("mathml").mathml(latex)


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--allow-file-access-from-files", "--virtual-time-budget=3000",
]  # fmt: skip
HEADINGS = 8  # pixels by which the theme lets headings stand out of their column
WIDTHS = (390, 1280)  # a telephone, a small screen
# What a reader would see go wrong, asked of a page in a frame.
PROBE = """<iframe id=f width={width} height=844 src="{url}"></iframe><pre id=result></pre><script>
f.onload = () => {{
  const d = f.contentDocument, w = d.documentElement;
  const broken = [...d.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src);
  const flat = [...d.querySelectorAll("math")].filter(m => m.getClientRects().length &&
    m.getBoundingClientRect().height < 4).length;
  const cut = [...d.querySelectorAll("article pre")]
    .filter(p => p.scrollWidth > p.clientWidth + 1).map(p => p.innerText.slice(0, 60));
  const strips = [...d.querySelectorAll("article table.docutils")].filter(t =>
    t.getClientRects().length &&
    t.getBoundingClientRect().width > t.rows[0].getBoundingClientRect().width + 3).length;
  const font = [...d.fonts].filter(f => f.family.includes("Formulas")).map(f => f.status);
  const boxes = [w, ...d.querySelectorAll(".main, .content, .article-container, article")];
  const wide = Math.max(...boxes.map(e => e.scrollWidth - e.clientWidth));
  result.textContent = JSON.stringify({{
    title: d.title, broken, flat, wide, cut, strips, font,
    nameless: [...d.images].filter(i => !i.alt || i.alt.endsWith(".png")).length,
    math: d.querySelectorAll("math").length,
    images: d.images.length, raw: d.body.innerText.includes("$$"),
    errors: d.querySelectorAll(".problematic, .system-message").length,
    remote: [...d.querySelectorAll("script[src], link[rel=stylesheet], img")]
      .map(e => e.src || e.href).filter(u => u.startsWith("http")) }});
}};</script>"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built with warnings as errors."""
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "--fail-on-warning", "--keep-going", DOCS, out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr[-3000:]
    return out


def browse(url: str, tmp_path: Path) -> str:
    """The document that a browser makes of a page."""
    run = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", url],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return run.stdout


def probe(page: Path, width: int, tmp_path: Path) -> dict[str, Any]:
    """What a browser finds on a page at that width."""
    frame = tmp_path / "probe.html"
    frame.write_text(PROBE.format(url=page.as_uri(), width=width), encoding="utf-8")
    found = re.search(r'<pre id="result">(.+?)</pre>', browse(frame.as_uri(), tmp_path), re.DOTALL)
    assert found, f"{page.name} did not load"
    report: dict[str, Any] = json.loads(html.unescape(found[1]))
    return report


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", WIDTHS)
def test_browser_shows_every_page(site: Path, tmp_path: Path, width: int) -> None:
    pages = [p for p in site.rglob("*.html") if "_modules" not in p.parts]
    assert len(pages) > 40
    seen: dict[str, Any] = {}
    for page in pages:
        seen[page.relative_to(site).as_posix()] = report = probe(page, width, tmp_path)
        assert not report["broken"], f"{page.name}: pictures that do not load"
        assert not report["nameless"], f"{page.name}: pictures without words"
        assert not report["remote"], f"{page.name} needs the network: {report['remote']}"
        assert report["wide"] <= HEADINGS, f"{page.name} scrolls sideways at {width}"
        assert not report["cut"], f"{page.name}: lines of code are cut: {report['cut']}"
        assert not report["strips"], f"{page.name}: tables with an empty strip"
        assert not report["flat"], f"{page.name}: formulas that do not show"
        assert not report["math"] or report["font"] == ["loaded"], f"{page.name}: font of formulas"
        assert not report["raw"], f"{page.name} shows raw LaTeX"
        assert not report["errors"], f"{page.name} shows markup errors"
    assert seen["theory.html"]["math"] > 100
    assert seen["index.html"]["images"] >= 1
    assert all(
        seen[f"notebooks/{p.stem}.html"]["images"] >= 3
        for p in (ROOT / "notebooks").glob("[0-9]*.py")
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("ddim", "api/solvers.html#sde_gen.solvers.ddim"),
        ("DDPM", "words.html#term-DDPM"),
        ("epsilon", "words.html#term-epsilon"),
        ("inpainting", "words.html#term-inpainting"),
    ],
)
def test_search_finds_the_words_of_the_field(
    site: Path, tmp_path: Path, word: str, page: str
) -> None:
    shown = browse(f"{(site / 'search.html').as_uri()}?q={word}", tmp_path)
    links = re.findall(r'<li[^>]*>\s*<a href="([^"]+)"', shown)
    assert any(re.sub(r"\?[^#]*", "", link) == page for link in links[:5]), links[:5]
