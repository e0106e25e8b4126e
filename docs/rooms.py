"""A page of the API for each room of the house, written when the documentation is built.

A Sphinx extension. A new room is a line of `ROOMS`; what it shows is the room's `__all__`, or what
is defined there. A name of several rooms stands on the first page that has it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import sde_gen

API = Path(__file__).parent / "api"
INTRODUCTION = """API
===

States are ``(B, *D)``: a batch of B samples of any shape. Times are numbers, ``()`` or ``(B,)``;
a grid is ``(N,)``, float64. The nouns and the verbs are at the top, ``sde_gen.VP``; each room has
the rest, ``sde_gen.schedules.Cosine``. Examples begin with ``import torch`` and
``import sde_gen as sg``. What papers call a thing: :doc:`the field's words </words>`.
"""
ROOMS = {
    "sampling": ("Sampling", "From a score to samples."),
    "sdes": ("Processes", "What turns data into noise, and its reversals."),
    "schedules": ("Schedules", "Clocks: a rate beta(t) and its integral."),
    "scores": ("Scores", "Exact, learned, summed, and taken from other libraries."),
    "networks": ("Networks", "What a learned score is made of."),
    "guidance": ("Guidance", "Classifiers, conditions, weights, experts: scores that are added."),
    "solvers": ("Solvers", "Steps of a process, and published samplers by name."),
    "grids": ("Grids", "The times at which a solver stops."),
    "tuning": ("Tuning", "Grids and solvers fitted to a score."),
    "noise": ("Noise", "Numbered increments: a function of seed, sample and interval."),
    "training": ("Training", "Losses, weights, the loop, checkpoints."),
    "data": ("Data", "Sets, files, tables, images; levels of quantised data."),
    "facts": ("Facts", "What is known of the data, kept with the model."),
    "moments": ("Moments", "Mean and covariance of the data."),
    "likelihood": ("Likelihood", "Densities, bits, encoding and editing."),
    "latent": ("Latents", "A score in the latents of an autoencoder: drawing, training, bounds."),
    "contrast": ("The rivals", "VAE, hierarchical VAE and GAN, to be compared with."),
    "chain": ("The discrete chain", "A process seen at N times, and the bound of its likelihood."),
    "inverse": ("Inverse problems", "What was observed, y = A(x) + noise, and posteriors of x."),
    "mcmc": ("Langevin dynamics", "Chains that settle at a law, and ascent to its modes."),
    "metrics": ("Distances", "How far samples are from samples."),
    "budget": ("Budget", "The error of a sampler, by its causes."),
    "plots": ("Pictures", "Paths, fields, images and movies."),
    "many": ("Several processes", "Work cut by the numbers of samples."),
    "gaussians": ("Closed forms", "Densities and divergences of Gaussians."),
}


def public(room: ModuleType) -> list[str]:
    """The names that a room offers."""
    here = [n for n, o in vars(room).items() if getattr(o, "__module__", "") == room.__name__]
    return [n for n in getattr(room, "__all__", here) if not n.startswith("_")]


def homes() -> dict[str, dict[str, Any]]:
    """For each room its names as a user writes them, `sde_gen.VP` or `sde_gen.sdes.Channel`."""
    seen: set[int] = set()
    found: dict[str, dict[str, Any]] = {}
    for room in ROOMS:
        module = importlib.import_module(f"sde_gen.{room}")
        found[room] = {}
        for name in public(module):
            thing = getattr(module, name)
            if inspect.ismodule(thing) or (is_documented(thing) and id(thing) in seen):
                continue
            seen.add(id(thing))
            top = getattr(sde_gen, name, None) is thing and name in sde_gen.__all__
            found[room][f"sde_gen.{name}" if top else f"sde_gen.{room}.{name}"] = thing
    return found


def is_documented(thing: Any) -> bool:
    """Whether a thing has a docstring of its own: a class or a function, not a type."""
    return inspect.isclass(thing) or inspect.isfunction(thing)


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(inspect.getdoc(thing).split("\n\n")[0].split())
    return re.split(r"(?<=[^.A-Z0-9]\.) (?=[A-Z`])", paragraph)[0].split("::")[0].rstrip(".:")


def value(thing: Any) -> str:
    """What a type or a number is."""
    noise = r"<function (\w+) at \w+>|\b(?:typing|collections\.abc|torch|numpy)\."
    said = re.sub(noise, lambda found: found[1] or "", repr(thing))
    return f"``{said}``"


def escape(match: re.Match[str]) -> str:
    """Emphasis stays, a lone star or bar is text."""
    return match[0] if len(match[0]) > 1 else "\\" + match[0]


def escape_formulas(lines: list[str]) -> None:
    """Docstrings write shapes and moduli, (B, *D) and |x|, which are markup to Sphinx.

    Tables in them are shown as they stand.
    """
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("|"):
            first = i == 0 or not lines[i - 1].startswith("|")
            lines[i : i + 1] = (["::", ""] if first else []) + ["    " + lines[i]]
    lines[:] = [line if line.startswith("    |") else escape_line(line) for line in lines]


def escape_line(line: str) -> str:
    """A line in which stars and bars are themselves, but for code and emphasis."""
    parts = line.split("``")
    parts[::2] = [re.sub(r"\*[a-z]+\*|[*|](?=\S)", escape, part) for part in parts[::2]]
    return "``".join(parts)


def link(name: str) -> str:
    """The last part of a name, which leads to its entry."""
    return f":py:obj:`{name.rpartition('.')[2]} <{name}>`"


def summary(names: dict[str, Any]) -> Iterator[str]:
    """The table at the top of a page."""
    yield from (".. list-table::", "   :widths: 30 70", "   :class: summary", "")
    for name, thing in sorted(names.items(), key=lambda item: item[0].rpartition(".")[2].lower()):
        said = escape_line(first_sentence(thing)) if is_documented(thing) else value(thing)
        yield f"   * - {link(name)}"
        yield f"     - {said}"
    yield ""


def entry(name: str, thing: Any) -> Iterator[str]:
    """What autodoc is asked to show of a name."""
    if not is_documented(thing):
        yield from ("", f".. py:data:: {name}", "", f"   {value(thing)}")
        return
    yield from ("", f".. auto{'class' if inspect.isclass(thing) else 'function'}:: {name}")
    if inspect.isclass(thing):
        yield from ("   :members:", "   :special-members: __call__", "   :show-inheritance:")


def page(room: str, names: dict[str, Any]) -> str:
    """The page of a room: what it is, its names, its theory, and each name."""
    title, sentence = ROOMS[room]
    lines = [title, "=" * len(title), "", f"``sde_gen.{room}``: {sentence}", ""]
    lines += summary(names)
    lines += [f".. automodule:: sde_gen.{room}", ""]
    for name, thing in names.items():
        lines += entry(name, thing)
    return "\n".join(lines) + "\n"


def index(found: dict[str, dict[str, Any]]) -> str:
    """The page of all rooms and all names."""
    lines = [INTRODUCTION, ".. list-table::", "   :widths: 30 70", ""]
    for room, names in found.items():
        title, sentence = ROOMS[room]
        lines += [f"   * - :doc:`{title} <{room}>`, ``sde_gen.{room}``"]
        lines += [f"     - {sentence}", "", f"       {', '.join(map(link, names))}"]
    lines += ["", ".. toctree::", "   :hidden:", "", *(f"   {room}" for room in ROOMS)]
    return "\n".join(lines) + "\n"


def write(app: Any) -> None:
    """Write what has changed, so that a second build is short."""
    API.mkdir(exist_ok=True)
    found = homes()
    pages = {room: page(room, names) for room, names in found.items()}
    pages["index"] = index(found)
    for stale in API.glob("*.rst"):
        if stale.stem not in pages:
            stale.unlink()
    for name, text in pages.items():
        file = API / f"{name}.rst"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def mend_docstring(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Formulas are text; a class says what it has from other classes of the house."""
    escape_formulas(lines)
    if what == "class":
        lines += inherited(thing)


@lru_cache
def classes() -> dict[type, str]:
    """The names of all classes that have a page."""
    names = (item for room in homes().values() for item in room.items())
    return {thing: name for name, thing in names if inspect.isclass(thing)}


def inherited(thing: type) -> Iterator[str]:
    """A line for each base that is documented here; what torch or Python give stays away."""
    seen = set(vars(thing))
    for base in thing.__mro__[1:]:
        if base in classes():
            own = [n for n, o in vars(base).items() if n not in seen and is_verb(n, o)]
            if own:
                links = (f":py:obj:`{n} <{classes()[base]}.{n}>`" for n in own)
                yield from ("", f"From {link(classes()[base])}: {', '.join(links)}.")
        seen |= set(vars(base))


def is_verb(name: str, thing: Any) -> bool:
    """Whether a member of a class is a public method or property."""
    kinds = (property, classmethod, staticmethod, cached_property)
    return not name.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, kinds))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write)
    app.connect("autodoc-process-docstring", mend_docstring, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
