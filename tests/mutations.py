"""Do the tests notice a fault? Draw one-line faults over the whole library and see.

    python tests/mutations.py --seed 0 --count 60
    python tests/mutations.py --only sde_gen/grids.py --count 10 --list

A mutant is the library with one operator, comparison, constant, argument or call changed. The
files take turns, so that every room has its share. Each mutant runs in a copy of the tree: first
the tests that enter the changed function, the most specific file first, up to the first failure;
a survivor then meets the other tests of those files, which may have found the function's result
in a cache, and those that run the package in another process. Which test enters which function
is traced once, file by file, and kept in .pytest_cache until a source or that test changes.

Left out is what no test should fix: docstrings, messages, annotations, assertions for the type
checker, progress bars, tolerances (constants below TOLERANCE) and the looks of plots.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SKIP = (".git", ".venv", "build", "dist", "_build", "*.egg-info", "*_cache")
SURVIVED = "SURVIVED"
PATIENCE = 60.0
"""Seconds that a run of tests may take beyond four times what it took unchanged."""

# --- faults -----------------------------------------------------------------------------------

OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
PAIRS = (
    "min max", "amin amax", "any all", "sin cos", "floor ceil", "zeros ones",
    "zeros_like ones_like", "clamp_min clamp_max", "minimum maximum", "sum mean", "exp expm1",
    "log log1p",
)  # fmt: skip
SWAPS = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
UNWRAPPED = {"sqrt", "square", "exp", "log", "abs", "flip", "cumsum", "clamp_min", "detach"}
UNTOUCHED_CALLS = {
    "isinstance", "warn", "tqdm", "TypeVar", "getattr", "hasattr", "print", "super", "update",
    "add_argument", "manual_seed",
}  # fmt: skip
COMMUTATIVE = {"min", "max", "minimum", "maximum", "isclose", "allclose", "equal"}
UNTOUCHED_KEYWORDS = {
    "device", "strict", "encoding", "help", "metavar", "description", "desc", "unit", "leave",
    "stacklevel", "progress", "repr", "init", "mutates_args", "memory_format", "errors",
    "exist_ok",
}  # fmt: skip
UNTOUCHED_FUNCTIONS = {"__repr__", "describe", "_bar", "describe_device"}
LOOKS = ("sde_gen/plots/", "sde_gen/demo/figure.py")
TOLERANCE = 1e-5
TYPES = {"int", "float", "str", "bool", "bytes", "Tensor", "ndarray", "None"}


Fault = tuple[str, int, int, bytes]
"""Its kind, and the bytes start .. end of the source that become others."""


@dataclass(frozen=True)
class Mutant:
    """Bytes start .. end of a file replaced by ``new``; ``function`` holds the change, or ""."""

    file: str
    line: int
    function: str
    kind: str
    start: int
    end: int
    new: bytes

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new + source[self.end :]

    def show(self, tree: Path) -> str:
        source = (tree / self.file).read_bytes()
        old, new = (text.decode().splitlines() for text in (source, self.apply(source)))
        lines = list(difflib.unified_diff(old, new, lineterm="", n=0))[3:]
        changed = [f"    {line[0]} {line[1:].strip()}" for line in lines]
        return "\n".join([f"{self.file}:{self.line} {self.kind}", *changed])


def is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    return isinstance(node, ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def is_type(node: ast.AST) -> bool:
    """Whether it is a union of types, such as float | Tensor."""
    if isinstance(node, ast.BinOp):
        return is_type(node.left) or is_type(node.right)
    if isinstance(node, ast.Subscript):
        return is_type(node.value)
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name in TYPES or (name[:1].isupper() and not name.isupper())


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


class Faults:
    """All mutants of a file."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.looks = file.startswith(LOOKS)
        self.found: list[Mutant] = []
        self.visit(ast.parse(source), "")

    def at(self, node: ast.expr | ast.stmt | ast.keyword, end: bool = False) -> int:
        if end:
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            return self.starts[node.end_lineno - 1] + node.end_col_offset
        return self.starts[node.lineno - 1] + node.col_offset

    def text(self, node: ast.expr | ast.keyword) -> bytes:
        return self.source[self.at(node) : self.at(node, True)]

    def visit(self, node: ast.AST, function: str) -> None:
        """Collect the faults of a node and of what stands below it, but for what is left out."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name in UNTOUCHED_FUNCTIONS:
                return
            function = node.name
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        call = node.value if isinstance(node, ast.Expr) else node
        if isinstance(call, ast.Call) and name_of(call) in UNTOUCHED_CALLS:
            return
        for kind, start, end, new in self.faults(node):
            line = self.source.count(b"\n", 0, start) + 1
            old = self.source[start:end]
            if b"\n" not in old and old != new:
                self.found.append(Mutant(self.file, line, function, kind, start, end, new))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.keyword) and child.arg in UNTOUCHED_KEYWORDS:
                    continue
                if isinstance(child, ast.AST):
                    self.visit(child, function)

    def whole(self, kind: str, node: ast.expr | ast.stmt, new: bytes) -> Fault:
        return kind, self.at(node), self.at(node, True), new

    def faults(self, node: ast.AST) -> Iterator[Fault]:
        if isinstance(node, ast.BinOp) and not (is_text(node) or is_type(node)):
            yield from self.between(node.left, node.right, OPERATORS.get(type(node.op)))
        elif isinstance(node, ast.AugAssign):
            yield from self.between(node.target, node.value, OPERATORS.get(type(node.op)))
            yield self.whole("statement dropped", node, b"pass")
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
                yield from self.between(left, right, COMPARISONS[type(op)])
        elif isinstance(node, ast.BoolOp):
            words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from self.between(left, right, words)
        elif isinstance(node, ast.UnaryOp):
            yield self.whole("sign or not dropped", node, self.text(node.operand))
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.BinOp):
            for side in (node.value.left, node.value.right):
                yield self.whole("operand returned", node.value, self.text(side))
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            if isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
                yield self.whole("condition negated", node.test, b"not " + self.text(node.test))
        elif not self.looks:
            yield from self.details(node)

    def details(self, node: ast.AST) -> Iterator[Fault]:
        """What in a plot is its looks."""
        if isinstance(node, ast.Constant):
            yield from self.constant(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield self.whole("statement dropped", node, b"pass")
        elif isinstance(node, ast.Call):
            yield from self.name(node)
            yield from self.arguments(node)

    def between(
        self, left: ast.expr, right: ast.expr, words: tuple[str, ...] | None
    ) -> Iterator[Fault]:
        """The operator between two nodes, the first of ``words``, as each of the others."""
        if words is None:
            return
        old, *others = words
        start = self.source.find(old.encode(), self.at(left, True), self.at(right))
        for new in others if start >= 0 else ():
            yield f"{old} -> {new}", start, start + len(old), new.encode()

    def constant(self, node: ast.Constant) -> Iterator[Fault]:
        c = node.value
        if isinstance(c, bool):
            yield self.whole(f"{c} -> {not c}", node, repr(not c).encode())
        elif isinstance(c, int):
            yield self.whole(f"{c} -> {c + 1}", node, repr(c + 1).encode())
        elif isinstance(c, float) and (c == 0 or abs(c) >= TOLERANCE):
            yield self.whole(f"{c} -> {2 * c or 1.0}", node, repr(2 * c or 1.0).encode())

    def name(self, node: ast.Call) -> Iterator[Fault]:
        """Another function in its place, or none."""
        name, end = name_of(node), self.at(node.func, True)
        if name in SWAPS:
            yield f"{name} -> {SWAPS[name]}", end - len(name), end, SWAPS[name].encode()
        if name in UNWRAPPED and isinstance(node.func, ast.Attribute):
            module = ast.unparse(node.func.value) in ("torch", "math", "np")
            inner = node.args[0] if module else node.func.value
            yield self.whole(f"{name} dropped", node, self.text(inner))

    def arguments(self, node: ast.Call) -> Iterator[Fault]:
        """Two neighbours swapped, or a keyword dropped."""
        swapped = [] if name_of(node) in COMMUTATIVE else node.args
        for a, b in pairwise(swapped):
            if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
                new = self.text(b) + self.source[self.at(a, True) : self.at(b)] + self.text(a)
                yield "arguments swapped", self.at(a), self.at(b, True), new
        given = [*node.args, *node.keywords]
        for before, k in zip([None, *given], given, strict=False):
            if isinstance(k, ast.keyword) and k.arg and k.arg not in UNTOUCHED_KEYWORDS:
                start = self.at(k) if before is None else self.at(before, True)
                yield f"{k.arg}= dropped", start, self.at(k, True), b""


def is_python(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def draw(tree: Path, seed: int, count: int, only: Sequence[str] = ()) -> list[Mutant]:
    """``count`` mutants, file after file in a random order, and again from the first."""
    sources, faults = {}, {}
    for path in (tree / "sde_gen").rglob("*.py"):
        file = path.relative_to(tree).as_posix()
        if file.startswith(tuple(only) or "sde_gen"):
            sources[file] = path.read_bytes()
            faults[file] = Faults(file, sources[file]).found
            # A change of one file leaves what is drawn of the others.
            random.Random(f"{seed} {file}").shuffle(faults[file])
    order = sorted(faults, key=lambda file: random.Random(f"{seed} {file}").random())
    rounds = range(max(map(len, faults.values()), default=0))
    turns = (faults[f][i] for i in rounds for f in order if i < len(faults[f]))
    return list(islice((m for m in turns if is_python(m.apply(sources[m.file]))), count))


# --- which test enters which function ---------------------------------------------------------


def steady(nodeid: str) -> str:
    """The id of a test without the addresses that pytest takes from a repr."""
    return re.sub(r" at 0x[0-9a-f]+", "", nodeid)


class Tracer:
    """A pytest plugin: the functions of the library that each passing test enters."""

    def __init__(self, out: Path) -> None:
        self.out, self.house = out, str(Path.cwd() / "sde_gen") + os.sep
        self.tests: dict[str, dict[str, Any]] = {}
        self.entered: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(self.house):
            self.entered.add((code.co_filename, code.co_name))

    def of(self, nodeid: str) -> dict[str, Any]:
        return self.tests.setdefault(steady(nodeid), {"time": 0.0, "passed": True})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.entered = set()
        threading.settrace(self)
        sys.settrace(self)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            root = len(self.house) - len("sde_gen/")
            calls = sorted(f"{file[root:]}:{name}" for file, name in self.entered)
            self.of(item.nodeid)["calls"] = calls

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.of(report.nodeid)
        test["time"] += report.duration
        test["passed"] &= report.passed

    def pytest_sessionfinish(self) -> None:
        self.out.write_text(json.dumps(self.tests))


class Chooser:
    """A pytest plugin: some of the collected tests, in an order of our own."""

    def __init__(self, chosen: Sequence[str]) -> None:
        self.order = {name: i for i, name in enumerate(chosen)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = [item for item in items if steady(item.nodeid) in self.order]
        items[:] = sorted(known, key=lambda item: self.order[steady(item.nodeid)])


def pytest_configure(config: pytest.Config) -> None:
    """Loaded by ``-p mutations``."""
    if "MUTATIONS_TRACE" in os.environ:
        config.pluginmanager.register(Tracer(Path(os.environ["MUTATIONS_TRACE"])))
    if "MUTATIONS_CHOSEN" in os.environ:
        names = Path(os.environ["MUTATIONS_CHOSEN"]).read_text().splitlines()
        config.pluginmanager.register(Chooser(names))


def run_pytest(
    tree: Path, *arguments: str, limit: float | None = None, **more: str
) -> tuple[int, str]:
    """Exit code and output of pytest in a tree; -1 past the time limit."""
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}", **more}
    # Bytecode is known by the time and size of its source, which a mutant may share.
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "mutations"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=tree,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -1, ""
    return process.returncode, output


Tests = dict[str, dict[str, Any]]
"""Node id -> its time, whether it passed, and the functions that it enters."""


def fingerprint(tree: Path, unit: str) -> str:
    shared = [tree / "tests" / name for name in ("conftest.py", "problems.py", "mutations.py")]
    hashed = hashlib.sha256()
    for file in (*sorted((tree / "sde_gen").rglob("*.py")), *shared, tree / unit):
        hashed.update(file.read_bytes() if file.is_file() else b"")
    return hashed.hexdigest()


def trace(tree: Path, unit: str) -> Tests:
    """The tests of one file (or the doctests), traced in ``tree`` unless that is known."""
    cache = ROOT / ".pytest_cache" / "mutations" / f"{Path(unit).stem}.json"
    key = fingerprint(tree, unit)
    if cache.exists():
        known = json.loads(cache.read_text())
        if known["key"] == key:
            return known["tests"]
    out = tree / "trace.json"
    out.unlink(missing_ok=True)
    _, output = run_pytest(tree, unit, MUTATIONS_TRACE=str(out))
    tests: Tests = json.loads(out.read_text())
    failed = [name for name, test in tests.items() if not test["passed"]]
    print(f"traced {unit}: {output.splitlines()[-1]}", *failed, sep="\n  not used: ", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"key": key, "tests": tests}))
    return tests


# --- the runs ---------------------------------------------------------------------------------


def file_of(test: str) -> str:
    return test.split("::")[0]


def choose(tree: Path, mutant: Mutant, tests: Tests) -> tuple[list[str], list[str]]:
    """The tests that enter the changed function, and those that may see it otherwise."""
    passed = {name: set(test["calls"]) for name, test in tests.items() if test["passed"]}
    # What stands outside of functions is run by whoever imports the file.
    inside = f"{mutant.file}:{mutant.function}"
    direct = [
        name
        for name, calls in passed.items()
        if (inside in calls if mutant.function else any(c.startswith(inside) for c in calls))
    ]
    files: dict[str, int] = {}
    for name in direct:
        file, calls = file_of(name), len(passed[name])
        files[file] = min(calls, files.get(file, calls))
    direct.sort(key=lambda name: files[file_of(name)])
    outside = {f for f in map(file_of, passed) if "subprocess" in (tree / f).read_text()}
    first = set(direct)
    rest = [n for n in passed if n not in first and file_of(n) in files.keys() | outside]
    return direct, rest


def judge(tree: Path, mutant: Mutant, tests: Tests, direct: bool = False) -> str:
    """The first test that fails on the mutant, or that it survives."""
    path, chosen = tree / mutant.file, tree / "chosen.txt"
    source = path.read_bytes()
    path.write_bytes(mutant.apply(source))
    try:
        for names in filter(None, choose(tree, mutant, tests)[: 1 if direct else 2]):
            chosen.write_text("\n".join(names))
            files = dict.fromkeys(map(file_of, names))
            limit = PATIENCE + 4 * sum(tests[name]["time"] for name in names)
            code, output = run_pytest(
                tree, "-x", *files, limit=limit, MUTATIONS_CHOSEN=str(chosen)
            )
            if code == -1:
                return "caught by the time limit"
            if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
                found = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.M)
                return f"caught by {found[0] if found else output[-300:]}"
        return SURVIVED
    finally:
        path.write_bytes(source)


class Trees:
    """Copies of the tree, each lent to one piece of work at a time."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.free: SimpleQueue[Path] = SimpleQueue()
        self.first = folder / "0"
        for i in range(jobs):
            skip = shutil.ignore_patterns(*SKIP, "__pycache__")
            shutil.copytree(ROOT if i == 0 else self.first, folder / str(i), ignore=skip)
            self.free.put(folder / str(i))
        self.threads = ThreadPoolExecutor(jobs)

    def map(self, work: Callable[[Path, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        def lent(item: Any) -> Any:
            tree = self.free.get()
            try:
                return work(tree, item)
            finally:
                self.free.put(tree)

        return self.threads.map(lent, items)


def run(trees: Trees, drawn: Sequence[Mutant], units: Sequence[str], direct: bool) -> None:
    """Trace the tests, run the mutants and print what becomes of each."""
    tests: Tests = {}
    for found in trees.map(trace, units):
        tests |= found
    texts = [mutant.show(trees.first) for mutant in drawn]

    def timed(tree: Path, mutant: Mutant) -> tuple[str, float]:
        start = time.perf_counter()
        return judge(tree, mutant, tests, direct), time.perf_counter() - start

    caught = 0
    for text, (result, seconds) in zip(texts, trees.map(timed, drawn), strict=True):
        caught += result != SURVIVED
        print(f"{text}\n    {result} ({seconds:.0f} s)", flush=True)
    print(f"{caught} of {len(drawn)} caught")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=[], help="files or folders, sde_gen/...")
    parser.add_argument("--tests", nargs="*", default=[], help="these test files alone")
    parser.add_argument("--jobs", type=int, default=1, help="trees that run side by side")
    parser.add_argument("--direct", action="store_true", help="only tests that enter the function")
    parser.add_argument("--list", action="store_true", help="draw, but run nothing")
    args = parser.parse_args()
    drawn = draw(ROOT, args.seed, args.count, args.only)
    if args.list:
        print(*(mutant.show(ROOT) for mutant in drawn), sep="\n")
        return
    units = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/test_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        run(Trees(Path(folder), args.jobs), drawn, args.tests or ["sde_gen", *units], args.direct)


if __name__ == "__main__":
    main()
