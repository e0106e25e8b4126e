"""The shape of the code, read from its syntax: what imports what, and how long things are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "sde_gen"
FILES = sorted(HOUSE.rglob("*.py"))

# The floors of the house, ground floor first. A room imports from lower floors and from itself.
FLOORS = [
    {"ops"},
    {"schedules", "moments", "noise", "many"},
    {"levels"},
    {"facts", "gaussians"},
    {"data", "plots"},
    {"sdes"},
    {"networks"},
    {"scores"},
    {"solvers", "grids"},
    {"sampling"},
    {"guidance", "mcmc", "tuning"},
    {"training"},
    {"likelihood"},
    {"inverse"},
    {"chain"},
    {"latent"},
    {"metrics"},
    {"budget"},
    {"contrast"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# These serve anybody's tensors, so they know nothing of SDEs and scores.
SERVE_ANYBODY = {"plots", "data", "metrics", "levels", "gaussians", "facts", "moments"}
THEY_USE = {"ops", "levels", "moments", "noise"}

MAX_FILE = 450
MAX_FUNCTION = 50
MAX_NAMES = 75
# Context (a label, an observation) passes through a score to whichever term knows it.
MAY_PASS_CONTEXT = {"given", "__call__", "forward", "compute", "evaluate", "read"}


def room_of(file: Path) -> str:
    return file.relative_to(HOUSE).with_suffix("").parts[0]


ROOMS = {room_of(file) for file in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node`, but for what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
        else:
            yield child
            yield from runtime_nodes(child)


def imported_rooms(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, room) for each import of the house in a module of `package`, such as ("sde_gen",)."""
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "sde_gen":
                inside = len(target) > 1 and (target[1] in FLOOR or target[1] in ROOMS)
                yield node.lineno, target[1] if inside else "__init__"


def arrows_up(source: str, room: str, package: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the imports of one module that stands in `room`."""
    for line, target in imported_rooms(source, package):
        if target == room:
            continue
        if target not in FLOOR:
            yield f"line {line}: imports {target}, which has no floor in FLOORS"
        elif FLOOR[target] >= FLOOR[room]:
            yield f"line {line}: {room} imports {target}, which does not stand below it"
        elif room in SERVE_ANYBODY and target not in THEY_USE:
            yield f"line {line}: {room} imports {target}; it may use {sorted(THEY_USE)} alone"


def private_imports(source: str, room: str, package: tuple[str, ...]) -> Iterator[str]:
    """What a module takes from another room although its name begins with an underscore."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        base += tuple(node.module.split(".")) if node.module else ()
        if base[:1] == ("sde_gen",) and base[1:2] != (room,):
            yield from (a.name for a in node.names if a.name.startswith("_"))


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def swallows_typos(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a public function takes keywords that it does not name."""
    name, kwarg = function.name, function.args.kwarg
    if kwarg is None or (name.startswith("_") and not name.startswith("__")):
        return False
    # A typed dictionary names its keywords, and what they are passed on to refuses others.
    named = kwarg.annotation is not None and ast.unparse(kwarg.annotation).startswith("Unpack[")
    return not named and not (kwarg.arg == "context" and name in MAY_PASS_CONTEXT)


def undocumented(node: ast.Module | ast.ClassDef, where: str = "") -> Iterator[str]:
    """Public classes, functions, methods and properties without a docstring, ``__call__`` too."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_overload = any(ast.unparse(d).endswith("overload") for d in child.decorator_list)
        if is_overload or (child.name.startswith("_") and child.name != "__call__"):
            continue
        if not ast.get_docstring(child):
            yield f"line {child.lineno}: {where}{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{where}{child.name}.")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(HOUSE)))
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    assert room in FLOOR, (
        f"sde_gen/{room} is new: say in tests/test_architecture.py (FLOORS) and in docs/design.md "
        "above which rooms it stands"
    )
    package = ("sde_gen", *file.relative_to(HOUSE).parts[:-1])
    wrong = list(arrows_up(file.read_text(encoding="utf-8"), room, package))
    assert not wrong, f"{file.relative_to(HOUSE.parent)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(HOUSE)))
def test_nothing_private_crosses_a_wall(file: Path) -> None:
    package = ("sde_gen", *file.relative_to(HOUSE).parts[:-1])
    assert not list(private_imports(file.read_text(encoding="utf-8"), room_of(file), package))


def test_a_private_import_is_seen() -> None:
    source = "from ..sampling import _bar\nfrom .run import _own\nfrom .. import _hidden"
    assert list(private_imports(source, "mcmc", ("sde_gen", "mcmc"))) == ["_bar", "_hidden"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(HOUSE)))
def test_sizes_and_signatures(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    assert lines <= MAX_FILE, f"{file.name} has {lines} lines: at {MAX_FILE} it becomes a folder"
    for function in functions(source):
        where = f"{file.name}:{function.lineno}: {function.name}"
        length = code_lines(function)
        assert length <= MAX_FUNCTION, (
            f"{where} has {length} lines of code: past {MAX_FUNCTION} it becomes two functions"
        )
        # ClassifierFree binds what guides it as ``given`` does, and refuses what is not known.
        binds = (file.name, function.name) == ("conditions.py", "__init__")
        assert binds or not swallows_typos(function), (
            f"{where} takes keywords that it does not name: a misspelt one would pass unseen"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(HOUSE)))
def test_all_that_is_public_says_what_it_is(file: Path) -> None:
    silent = list(undocumented(ast.parse(file.read_text(encoding="utf-8"))))
    assert not silent, f"{file.relative_to(HOUSE.parent)}: no docstring at {', '.join(silent)}"


def test_the_top_level_holds_at_most_75_names() -> None:
    import sde_gen

    assert len(sde_gen.__all__) <= MAX_NAMES
    assert len(set(sde_gen.__all__)) == len(sde_gen.__all__)
    # What else is there are the rooms.
    others = {n for n in vars(sde_gen) if not n.startswith("_")} - set(sde_gen.__all__)
    assert others <= ROOMS | {"annotations"}, sorted(others - ROOMS)


def test_every_room_is_there() -> None:
    wanted = {"ops", "schedules", "sdes", "noise", "scores", "networks", "solvers", "grids"}
    wanted |= {"sampling", "guidance", "training", "likelihood", "plots", "data", "metrics", "cli"}
    assert wanted <= ROOMS


@pytest.mark.parametrize(
    ("source", "room", "wrong"),
    [
        ("from .schedules import Linear", "sdes", 0),
        ("from sde_gen.sdes import VP", "sdes", 0),
        ("import torch\nfrom torch import ops", "ops", 0),
        ("if TYPE_CHECKING:\n    from .scores import Score", "sdes", 0),
        ("from .scores import Score", "sdes", 1),
        ("def f():\n    from sde_gen import sampling", "sdes", 1),
        ("import sde_gen.cli", "sdes", 1),
        ("import sde_gen", "sdes", 1),
        ("from . import scores, ops", "sdes", 1),
        ("from .sdes import VP", "metrics", 1),
        ("from .ops import match", "metrics", 0),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from .cli import main", "sdes", 1),
    ],
)
def test_an_arrow_up_is_seen(source: str, room: str, wrong: int) -> None:
    assert len(list(arrows_up(source, room, ("sde_gen",)))) == wrong


def test_an_arrow_up_from_a_folder_is_seen() -> None:
    package = ("sde_gen", "solvers")
    source = "from .base import Solver\nfrom ..sampling import solve\nfrom ..ops import match"
    assert len(list(arrows_up(source, "solvers", package))) == 1


@pytest.mark.parametrize(
    ("source", "swallows"),
    [
        ("def sample(model, **options): ...", True),
        ("def __init__(self, **context): ...", True),
        ("def given(self, **context): ...", False),
        ("def forward(self, x, t, **context): ...", False),
        ("def _scaled(**anything): ...", False),
        ("def sample(model, *, steps=20): ...", False),
        ("def train(model, **options: Unpack[Options]): ...", False),
    ],
)
def test_a_swallowed_typo_is_seen(source: str, swallows: bool) -> None:
    assert [swallows_typos(f) for f in functions(source)] == [swallows]


@pytest.mark.parametrize(
    ("source", "silent"),
    [
        ("def f(): ...", ["line 1: f"]),
        ('def f():\n    """Says."""', []),
        ("def _f(): ...\nclass _C:\n    def f(self): ...", []),
        ("class C:\n    'Says.'\n    def f(self): ...\n    def __call__(self): ...", [3, 4]),
        ("class C:\n    'Says.'\n    def __init__(self): ...\n    def _f(self): ...", []),
        ("class C:\n    'Says.'\n    @property\n    def f(self): ...", [4]),
        ("@overload\ndef f(x: int): ...\n@typing.overload\ndef f(x: str): ...", []),
    ],
)
def test_silence_is_heard(source: str, silent: list[object]) -> None:
    found = list(undocumented(ast.parse(source)))
    assert len(found) == len(silent)
    for line, wanted in zip(found, silent, strict=True):
        assert line == wanted or line.startswith(f"line {wanted}: C.")


def test_length_counts_code_alone() -> None:
    source = 'def f(x):\n    """One.\n\n    Two.\n    """\n    y = x\n\n    return y'
    assert [code_lines(f) for f in functions(source)] == [3]
