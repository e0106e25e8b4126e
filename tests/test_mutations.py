"""The tool that draws faults: what it changes, what it leaves alone, and what it calls caught."""

from __future__ import annotations

from pathlib import Path

import mutations
import pytest
from mutations import Faults, choose, draw, judge, trace

SOURCE = '''
"""A module of 1 + 1 lines."""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    size = 3 + 4
def f(x: float | None, n: "int" = 2) -> "-1":
    """Twice 2 * x, or not 3."""
    assert n > 5
    if n < 1:
        raise ValueError(f"n must be {n + 1}" + str(n - 1))
    print(n + 1)
    warn("µ", stacklevel=2 + 2)
    μ = isinstance(x, int | str)
    y = 1e-9
    return min(x, -n) ** g(x, n, key=3.5)
def __repr__(self):
    return 1 + 1
'''
FAULTS = {
    'def f(x: float | None, n: "int" = 3) -> "-1":',
    "if n <= 1:",
    "if n >= 1:",
    "if n < 2:",
    "return min(x, -n) * g(x, n, key=3.5)",
    "return min(x, -n)",
    "return g(x, n, key=3.5)",
    "return max(x, -n) ** g(x, n, key=3.5)",
    "return min(x, n) ** g(x, n, key=3.5)",
    "return min(x, -n) ** g(n, x, key=3.5)",
    "return min(x, -n) ** g(x, n)",
    "return min(x, -n) ** g(x, n, key=7.0)",
}


def changed(source: str) -> list[str]:
    """The line that each fault of a source makes."""
    found = Faults("sde_gen/f.py", source.encode()).found
    return [m.apply(source.encode()).decode().splitlines()[m.line - 1].strip() for m in found]


def test_every_fault_is_drawn_once_and_nothing_that_is_left_out() -> None:
    assert sorted(changed(SOURCE)) == sorted(FAULTS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a @ b - c", ["a @ b + c"]),
        ("a < b <= c", ["a <= b <= c", "a < b < c", "a < b > c", "a >= b <= c"]),
        ("a is not b and c", ["a is b and c", "a is not b or c"]),
        ("not a", ["a"]),
        ("a if b else c", ["a if not b else c"]),
        ("x.sqrt()", ["x"]),
        ("torch.log(x)", ["torch.log1p(x)", "x"]),
        ("f(*a, b)", []),
        ("f(a, b=True)", ["f(a)", "f(a, b=False)"]),
        ("max(a, b)", ["min(a, b)"]),
        ("'a' + b", []),
        ("a |= b", ["a &= b", "pass"]),
        ("f(a)", ["pass"]),
    ],
)
def test_faults_of_one_expression(old: str, new: list[str]) -> None:
    statement = old in ("a |= b", "f(a)")
    source = old if statement else f"y = {old}"
    assert sorted(changed(source)) == sorted(n if statement else f"y = {n}" for n in new)


def test_the_seed_fixes_the_draw_and_every_file_has_its_turn() -> None:
    root = Path(mutations.ROOT)
    drawn = draw(root, 3, 48, ["sde_gen/mcmc", "sde_gen/ops.py"])
    assert drawn == draw(root, 3, 48, ["sde_gen/mcmc", "sde_gen/ops.py"])
    assert drawn != draw(root, 4, 48, ["sde_gen/mcmc", "sde_gen/ops.py"])
    assert {m.file for m in drawn[:6]} == {
        f"sde_gen/{name}.py" for name in ("ops", "mcmc/chains", "mcmc/methods", "mcmc/modes",
        "mcmc/run", "mcmc/targets")
    }  # fmt: skip
    alone = draw(root, 3, 8, ["sde_gen/ops.py"])
    assert alone == [m for m in drawn if m.file == "sde_gen/ops.py"]


LIBRARY = """
def double(x):
    return 2 * x

def loop(n):
    while n > 0:
        n -= 1
    return n

def idle(x):
    return x + 1
"""
TESTS = """
import pytest
from sde_gen import double, idle, loop

@pytest.mark.parametrize("thing", [object()], ids=repr)
def test_double(thing):
    assert double(3) == 6

def test_loop():
    assert loop(2) == 0

def test_idle():
    assert idle(1) > 0
"""


def test_mutants_are_caught_or_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    for folder, text in (("sde_gen", LIBRARY), ("tests", TESTS)):
        (tmp_path / folder).mkdir()
        name = "__init__.py" if folder == "sde_gen" else "test_it.py"
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "tests" / "mutations.py").write_text(Path(mutations.__file__).read_text())
    tests = trace(tmp_path, "tests/test_it.py")
    assert trace(tmp_path, "tests/test_it.py") == tests
    faults = {
        m.apply(LIBRARY.encode()).decode().splitlines()[m.line - 1].strip(): m
        for m in draw(tmp_path, 0, 99)
    }
    for line, reach, patience, verdict in (
        ("return 2 / x", "test_double", 60.0, "caught by tests/test_it.py::test_double"),
        ("n += 1", "test_loop", 2.0, "caught by the time limit"),
        ("return x + 2", "test_idle", 60.0, "SURVIVED"),
    ):
        monkeypatch.setattr(mutations, "PATIENCE", patience)
        direct, rest = choose(tmp_path, faults[line], tests)
        assert [name.split("[")[0] for name in direct] == [f"tests/test_it.py::{reach}"]
        assert len(rest) == 2
        assert judge(tmp_path, faults[line], tests).split("[")[0] == verdict
    assert (tmp_path / "sde_gen" / "__init__.py").read_text() == LIBRARY
