"""Formulas as MathML, which browsers draw themselves: no script and no network.

A Sphinx extension. LaTeX goes in, as MyST's dollars and the `math` directive give it; latex2mathml
makes the tree, and `mend` puts right what browsers and the converter leave behind of TeX's rules.
"""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from docutils import nodes
from latex2mathml.converter import convert

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
FUNCTIONS = {
    "log", "exp", "sin", "cos", "tan", "det", "min", "max", "inf", "sup", "tr", "KL", "TV",
}  # fmt: skip
GREEK = set("ΓΔΘΛΞΠΣΥΦΨΩ")
ROWS = {"mrow", "math", "mtd", "mstyle"}
CLOSING = set(")]}⌋⌉")
FENCES = set("⌊⌋⌈⌉")
# Alphabets that browsers take from the letter itself: of `mathvariant` they know `normal` alone.
ALPHABETS = {"script": "SCRIPT", "double-struck": "DOUBLE-STRUCK", "bold": "BOLD"}


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as MathML."""
    # Braces around one letter make the converter forget that it is upright.
    latex = re.sub(r"\\mathrm\{(\w)\}", r"\\mathrm \1 ", latex)
    ElementTree.register_namespace("", NAMESPACE)
    tree = ElementTree.fromstring(convert(latex, display=display))
    for node in list(tree.iter()):
        mend(node)
    for node in list(tree.iter()):
        space(node)
    return ElementTree.tostring(tree, encoding="unicode")


def tag(node: Element) -> str:
    """The name of an element without its namespace."""
    return node.tag.partition("}")[2]


def letter(alphabet: str, character: str) -> str:
    """A letter of a mathematical alphabet; some stood in Unicode before the alphabets did."""
    case = "CAPITAL" if character.isupper() else "SMALL"
    for name in ("MATHEMATICAL ", ""):
        with suppress(KeyError):
            return unicodedata.lookup(f"{name}{alphabet} {case} {character.upper()}")
    return character


def mend(node: Element) -> None:
    """Letters of other alphabets, names in one piece, fences that are operators."""
    text, variant = node.text or "", node.get("mathvariant", "")
    if variant in ALPHABETS and len(text) == 1:
        node.text = letter(ALPHABETS[variant], text)
        node.set("mathvariant", "normal")
    if tag(node) == "mi" and text in GREEK:
        node.set("mathvariant", "normal")
    if tag(node) == "mo" and text in FUNCTIONS:
        node.tag = f"{{{NAMESPACE}}}mi"
    if tag(node) == "mi" and text in FENCES:
        node.tag = f"{{{NAMESPACE}}}mo"
    upright = [tag(c) == "mi" and c.get("mathvariant") == "normal" for c in node]
    if len(upright) > 1 and all(upright):
        name = Element(f"{{{NAMESPACE}}}mi")
        name.text = "".join(c.text or "" for c in node)
        node[:] = [name]


def is_function(node: Element) -> bool:
    """Whether a node is the name of a function, perhaps with an index or a power."""
    while tag(node) in {"msub", "msup", "msubsup", "munder", "mrow"} and len(node):
        if tag(node) == "mrow" and len(node) > 1:
            return False
        node = node[0]
    return tag(node) == "mi" and node.text in FUNCTIONS


def space(row: Element) -> None:
    """A thin space around the name of a function, as TeX has it: 2 log p, but log(p)."""
    for node in [child for child in row if is_function(child)] if tag(row) in ROWS else ():
        place = list(row).index(node)
        if place + 1 < len(row) and is_symbol(row[place + 1]):
            row.insert(place + 1, Element(f"{{{NAMESPACE}}}mspace", width="0.167em"))
        if place and (is_symbol(row[place - 1]) or row[place - 1].text in CLOSING):
            row.insert(place, Element(f"{{{NAMESPACE}}}mspace", width="0.167em"))


def is_symbol(node: Element) -> bool:
    """Whether a node is a symbol or a number, and no operator, space or pair of fences."""
    fenced = tag(node) == "mrow" and len(node) and node[0].get("fence") == "true"
    return tag(node) not in {"mo", "mspace"} and not fenced


def inline(self: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def block(self: Any, node: nodes.math_block) -> None:
    """Write a formula of its own, in a box that scrolls where a screen is narrow."""
    self.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
