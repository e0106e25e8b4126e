"""The documentation: its code runs, its links lead somewhere, and browsers show it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def code(page: Path) -> str:
    """The cells of a page as one program, magics and options left out."""
    cells = CELL.findall(page.read_text(encoding="utf-8"))
    lines = [line for cell in cells for line in cell.splitlines()]
    return "\n".join(line for line in lines if not re.match(r":\w+:|%", line))


@pytest.mark.parametrize(
    "name",
    [
        *("chain", "conditions", "contrast", "devices", "extending", "index", "inverse"),
        *("networks", "training"),
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


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--allow-file-access-from-files", "--virtual-time-budget=3000",
]  # fmt: skip
HEADINGS = 8  # pixels by which the theme lets headings stand out of their column
# What a reader would see go wrong, asked of a page in a frame as wide as a telephone.
PROBE = """<iframe id=f width=390 height=844 src="{url}"></iframe><pre id=result></pre><script>
f.onload = () => {{
  const d = f.contentDocument, w = d.documentElement;
  const broken = [...d.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src);
  const flat = [...d.querySelectorAll("math")].filter(m => m.getClientRects().length &&
    m.getBoundingClientRect().height < 4).length;
  const boxes = [w, ...d.querySelectorAll(".main, .content, .article-container, article")];
  const wide = Math.max(...boxes.map(e => e.scrollWidth - e.clientWidth));
  result.textContent = JSON.stringify({{
    title: d.title, broken, flat, wide,
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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_browser_shows_every_page(site: Path, tmp_path: Path) -> None:
    import html
    import json

    pages = [p for p in site.rglob("*.html") if "_modules" not in p.parts]
    assert len(pages) > 15
    seen: dict[str, Any] = {}
    for page in pages:
        probe = tmp_path / "probe.html"
        probe.write_text(PROBE.format(url=page.as_uri()), encoding="utf-8")
        run = subprocess.run(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             probe.as_uri()],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        found = re.search(r'<pre id="result">(.+?)</pre>', run.stdout, re.DOTALL)
        assert found, f"{page.name} did not load"
        seen[page.name] = report = json.loads(html.unescape(found[1]))
        assert not report["broken"], f"{page.name}: pictures that do not load"
        assert not report["nameless"], f"{page.name}: pictures without words"
        assert not report["remote"], f"{page.name} needs the network: {report['remote']}"
        assert report["wide"] <= HEADINGS, f"{page.name} scrolls sideways on a telephone"
        assert not report["flat"], f"{page.name}: formulas that do not show"
        assert not report["raw"], f"{page.name} shows raw LaTeX"
        assert not report["errors"], f"{page.name} shows markup errors"
    assert seen["theory.html"]["math"] > 100
    assert seen["index.html"]["images"] >= 1
    assert all(seen[f"{p.stem}.html"]["images"] >= 3 for p in (ROOT / "notebooks").glob("0*.py"))
