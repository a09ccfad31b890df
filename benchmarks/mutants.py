"""Whether the tests bite: small changes of the project's own modules, each of which some test should refuse.

    python benchmarks/mutants.py --sample 40                        # of each module, the same ones for one seed
    python benchmarks/mutants.py --only flexi_core/run/plan.py          # every mutant of one module

A mutant is one change of a module's syntax tree: another comparison or operator, `and` for `or`, a condition turned round, a
number one off, None for what is returned, a statement left out. Nothing is written into the tree: a process with the packages
already imported is forked, an import hook gives it the changed module, and pytest runs the tests that reach the changed lines,
the fastest first, to the first that fails; one that takes far too long counts as failed. Tests that start processes of their
own are left out, for these would import the module as it is, and so is one of wall time. What each test reaches is found
once for each module, whose statements then tell when they run.

Verdicts are kept in docs/results/mutants.jsonl, and an interrupted run goes on. One that was refused stays so while the module
and the test that refused it do; a survivor is tried again when any of its tests has changed. Mutants that change nothing that
anyone could see are listed by hand, with the reason, in equivalent_mutants.json. The table is written to
docs/results/mutants.md.
"""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
VERDICTS, PAGE = ROOT / "docs/results/mutants.jsonl", ROOT / "docs/results/mutants.md"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
# By module, the tests that concern it.
MODULES = {
    "flexi_core/schedule/schedule.py": "grammar schedule_file plan guard",
    "flexi_core/schedule/segment.py": "grammar schedule_file plan guard",
    "flexi_core/schedule/levels.py": "plan guard basis words",
    "flexi_core/schedule/grammar.py": "grammar bounds fuzz",
    "flexi_core/run/plan.py": "plan guard guidance run basis words cache",
    "flexi_core/run/run.py": "run cache guidance guard basis replay run_report unet_steps transformer_steps",
    "flexi_core/run/cache.py": "cache unet_steps transformer_steps",
    "search_tools/study/study.py": "search study moving",
    "search_tools/study/storage.py": "storage damaged fuzz",
}
LEFT_OUT = "ten_kills or two_workers or second_search or takes_long"
QUICK = ["-x", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({LEFT_OUT})"]
SECONDS, TIMES = 8.0, 3.0  # what a test may take: so long, and so many times what it took at first
MOST_BYTES = 8 << 30  # of memory that one mutant may fill
SURVIVED, TIMEOUT, IMPORT = "", "a time limit", "its import"

_COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of a module.

    Args:
        name: where, and what for what; unique in the module.
        line: of the change.
        reach: lines, of which the statement that must run for it to matter begins at one; None for what runs at the import.
        apply: changes the tree that the mutant was found in.
    """

    name: str
    line: int
    reach: range | None
    apply: Callable[[], None]


def mutants(tree: ast.Module) -> list[Mutant]:
    """Return every mutant of a module."""
    found, names = [], Counter()
    for parent, where, statement, scope, inside in _places(tree):
        old = _get(parent, where)
        for new in _instead(old):
            shown = parent if isinstance(old, ast.Constant) else old
            before = _text(shown)
            _put(parent, where, new)
            after = _text(parent if shown is parent else new)
            _put(parent, where, old)
            name = " ".join(f"{scope}: {before} -> {'' if after == 'pass' else after}".split())
            names[name] += 1
            name += f" #{names[name]}" if names[name] > 1 else ""
            found.append(Mutant(name, old.lineno, _header(statement) if inside else None, partial(_put, parent, where, new)))
    return found


def _text(node: ast.AST) -> str:
    """Return the source of a node; of a statement with a condition, of that alone."""
    return ast.unparse(node.test if isinstance(node, ast.If | ast.While) else node)


def _places(node: ast.AST, statement: ast.stmt | None = None, scope: str = "", inside: bool = False) -> Iterator[tuple]:
    """Yield what may be changed in a tree: the parent, the place in it, the statement, the function, and whether in one."""
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if field in ("annotation", "returns") or not isinstance(child, ast.AST):
                continue
            own = child if isinstance(child, ast.stmt) else statement
            function = isinstance(child, ast.FunctionDef)
            named = f"{scope}.{child.name}".lstrip(".") if function or isinstance(child, ast.ClassDef) else scope
            if hasattr(child, "lineno"):
                yield node, (field, index), own, named or "module", inside or function
            yield from _places(child, own, named, inside or function)


def _get(parent: ast.AST, where: tuple[str, int | None]) -> ast.AST:
    field, index = where
    return getattr(parent, field) if index is None else getattr(parent, field)[index]


def _put(parent: ast.AST, where: tuple[str, int | None], node: ast.AST) -> None:
    field, index = where
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _header(statement: ast.stmt) -> range:
    """Return the lines of a statement, of a compound one without its body."""
    body = getattr(statement, "body", None)
    first = min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", ()))])
    return range(first, max(body[0].lineno, first + 1) if body else statement.end_lineno + 1)


def _instead(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place."""
    for new in _changed(node):
        yield ast.fix_missing_locations(ast.copy_location(new, node))


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                for other in _COMPARISONS[type(op)]:
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators)
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            yield ast.BinOp(left, _OPERATORS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(_OPERATORS[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Return(value) if value is not None and not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.AugAssign(target, op, value):
            yield ast.AugAssign(target, _OPERATORS[type(op)](), value)
            yield ast.Pass()
        case ast.Expr(ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript(), *_]):
            yield ast.Pass()
    match node:  # a comparison that is turned round is another comparison
        case ast.If(test) | ast.IfExp(test) | ast.While(test) if not isinstance(test, ast.Compare | ast.UnaryOp | ast.Constant):
            fields = dict(ast.iter_fields(node))
            yield type(node)(**{**fields, "test": ast.UnaryOp(ast.Not(), test)})


class Changed(SourceFileLoader):
    """An import hook: one module of the project comes from a syntax tree."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        super().__init__(module.removesuffix(".py").replace("/", "."), str(ROOT / module))
        self._tree = tree

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> Any:
        return compile(self._tree, self.path, "exec")


def marked(tree: ast.Module) -> ast.Module:
    """Return a module in which every statement of a function, and the function itself, tells its line when it runs."""
    tree, done = copy.deepcopy(tree), set()
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for node in list(ast.walk(function)):
            for field in ("body", "orelse", "finalbody"):
                statements = getattr(node, field, None)
                if isinstance(statements, list) and id(statements) not in done:
                    told = [each for statement in statements for each in (_mark(statement.lineno), statement)]
                    setattr(node, field, told)
                    done.add(id(told))
        function.body.insert(0, _mark(function.lineno))
    return ast.fix_missing_locations(tree)


def _mark(line: int) -> ast.stmt:
    return ast.parse(f"__reached__({line})").body[0]


class Tracer:
    """A pytest plugin: the seconds of each test, and the lines of a marked module that it reaches."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, set[int]] = {}
        self.failed: list[str] = []
        self._seen: set[int] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        began, self._seen = time.perf_counter(), self.lines.setdefault(item.nodeid, set())
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """Count what fixtures reach for every test of the file, which may share them."""
        own, self._seen = self._seen, self.lines.setdefault(item.nodeid.split("::")[0], set())
        try:
            return (yield)
        finally:
            self._seen = own

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] * report.failed

    def reached(self, line: int) -> None:
        self._seen.add(line)


class Chosen:
    """A pytest plugin: these tests alone, in this order, each within its time."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._order = seconds, {test: i for i, test in enumerate(seconds)}
        self.killer = SURVIVED

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS + TIMES * self._seconds[nodeid])  # ends the process

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.killer:
            self.killer = report.nodeid


def _pytest(files: Iterable[str], plugin: object) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return pytest.main([*files, *QUICK, f"--basetemp={folder}/tests"], [plugin])


def _baseline(module: str, tree: ast.Module, files: list[str], pipe: Connection) -> None:
    """Send what each test takes and reaches, the tests that fail as things are, and every module that was imported."""
    tracer = Tracer()
    builtins.__reached__ = tracer.reached
    sys.meta_path.insert(0, Changed(module, marked(tree)))
    _pytest(files, tracer)
    pipe.send((tracer.seconds, tracer.lines, tracer.failed, list(sys.modules)))


def _trial(module: str, tree: ast.Module, mutant: Mutant, seconds: dict[str, float], pipe: Connection) -> None:
    """Send the test that refuses a mutant."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    mutant.apply()
    sys.meta_path.insert(0, Changed(module, tree))
    chosen = Chosen(seconds)
    code = _pytest(dict.fromkeys(test.split("::")[0] for test in seconds), chosen)
    pipe.send(chosen.killer or (IMPORT if code else SURVIVED))


class Fork:
    """A call in a forked process, silent and with a group of its own."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.answers, theirs = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(function, args, theirs))
        self._process.start()
        theirs.close()

    @staticmethod
    def _run(function: Callable, args: tuple, pipe: Connection) -> None:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        function(*args, pipe)
        os._exit(0)  # whatever threads are left

    def result(self, otherwise: Any = None) -> Any:
        """Return what the call sent; something else where it ended without."""
        try:
            return self.answers.recv()
        except EOFError:
            return otherwise
        finally:
            self.end()

    def end(self) -> None:
        """End the process, and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # before it had a group
        self._process.join()


def verdicts(module: str) -> dict[str, str]:
    """Return what refused each mutant of a module, of those tried whose verdict still holds."""
    return {line["mutant"]: line["by"] for line in _lines() if line["module"] == module and _holds(line)}


def _holds(line: dict) -> bool:
    return line["of"] == _digest(line["module"], line["by"])


def _lines() -> list[dict]:
    return [json.loads(line) for line in VERDICTS.read_text(encoding="utf-8").splitlines()] if VERDICTS.exists() else []


def _tests_of(module: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in MODULES[module].split()]


@cache
def _digest(module: str, by: str) -> str:
    """Return what tells apart on what a verdict rests: the module, and the test that refused; of a survivor, every test."""
    parts = [(ROOT / module).read_bytes()]
    if by == SURVIVED:
        parts += [(ROOT / file).read_bytes() for file in ("tests/conftest.py", *_tests_of(module))]
    elif "::" in by:
        file, name = by.split("[")[0].split("::")
        tests = ast.parse((ROOT / file).read_bytes()).body
        parts += [ast.dump(test).encode() for test in tests if getattr(test, "name", "") == name]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:8]


def _equivalent(module: str) -> dict[str, str]:
    return json.loads(EQUIVALENT.read_text(encoding="utf-8")).get(module, {})


def attempt(module: str, sample: int, seed: int, workers: int) -> None:
    """Try the mutants of a module that were not tried yet."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    wanted = mutants(tree)
    random.Random(f"{seed} {module}").shuffle(wanted)
    known = verdicts(module)
    wanted = [mutant for mutant in wanted[: sample or None] if mutant.name not in {*known, *_equivalent(module)}]
    if not wanted:
        return
    killers = {line["mutant"]: line["by"] for line in _lines() if line["module"] == module}
    seconds, lines, failed, imported = Fork(_baseline, module, tree, _tests_of(module)).result(({}, {}, [], []))
    if failed or not any(lines.values()):
        raise SystemExit(f"the tests of {module} fail, or none reaches it: {failed}; mend them first")
    for name in imported:  # once for all mutants
        if name.split(".")[0] not in ("flexi_core", "search_tools", "tests") and "conftest" not in name:
            with suppress(Exception):
                importlib.import_module(name)
    running: dict[Connection, tuple[Mutant, Fork]] = {}
    try:
        while wanted or running:
            while wanted and len(running) < workers:
                mutant = wanted.pop(0)
                reached = [test for test in seconds if _reaches(mutant, lines[test] | lines.get(test.split("::")[0], set()))]
                reached.sort(key=lambda test: (test != killers.get(mutant.name), seconds[test]))
                if reached:
                    fork = Fork(_trial, module, tree, mutant, {test: seconds[test] for test in reached})
                    running[fork.answers] = mutant, fork
                else:
                    _note(module, mutant, SURVIVED)
            for done in wait(list(running)):
                mutant, fork = running.pop(done)
                _note(module, mutant, fork.result(TIMEOUT))
    finally:
        for _, fork in running.values():
            fork.end()


def _reaches(mutant: Mutant, lines: set[int]) -> bool:
    return mutant.reach is None or not lines.isdisjoint(mutant.reach)


def _note(module: str, mutant: Mutant, by: str) -> None:
    with VERDICTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"module": module, "of": _digest(module, by), "mutant": mutant.name, "by": by}) + "\n")
    typer.echo(f"{module}:{mutant.line} {mutant.name}: {f'refused by {by}' if by else 'SURVIVED'}", err=True)


def page(command: str) -> str:
    """Return the page of all verdicts that hold."""
    head = [
        "| module | mutants | tried | refused | equivalent | survived | refused of those not equivalent |",
        "|-|-:|-:|-:|-:|-:|-:|",
    ]
    rows, survivors, equivalents = [], [], []
    for module in MODULES:
        every = mutants(ast.parse((ROOT / module).read_text(encoding="utf-8")))
        known, reasons = verdicts(module), _equivalent(module)
        tried = [mutant for mutant in every if mutant.name in {*known, *reasons}]
        alive = [m for m in tried if m.name not in reasons and not known[m.name]]
        counted = len([m for m in tried if m.name not in reasons])
        killed = counted - len(alive)
        share = f"{killed / counted:.0%}" if counted else ""
        rows.append(f"| {module} | {len(every)} | {len(tried)} | {killed} | {len(tried) - counted} | {len(alive)} | {share} |")
        survivors += [f"| {module}:{m.line} | {_code(m.name)} |" for m in alive]
        equivalents += [f"| {module}:{m.line} | {_code(m.name)} | {reasons[m.name]} |" for m in tried if m.name in reasons]
    parts = [
        "# Whether the tests bite",
        f"Made by `{command}`. A mutant is one small change of a module: another comparison or operator, `and` for `or`, a "
        "condition turned round, a number one off, None for what is returned, a statement left out. It is refused where one of "
        "the module's tests in `tests/*.py` fails on it; tests in the host are not asked. Equivalent mutants change nothing "
        "that anyone could see, and are told by hand.",
        "\n".join([*head, *rows]),
        "## Survivors",
        "\n".join(["| line | change |", "|-|-|", *survivors]) if survivors else "None.",
        "## Equivalent",
        "\n".join(["| line | change | why |", "|-|-|-|", *equivalents]) if equivalents else "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def main(
    only: Annotated[list[str] | None, typer.Option(help="A module; several times for several.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Mutants of each module; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sample; a larger one holds the smaller.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Mutants at a time.")] = 1,
) -> None:
    """Try mutants, and write the table."""
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # threads would not survive a fork
    if unknown := set(only or ()) - set(MODULES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; modules: {', '.join(MODULES)}")
    for module in only or MODULES:
        attempt(module, sample, seed, workers)
    last = {(line["module"], line["mutant"]): line for line in _lines() if line["module"] in MODULES and _holds(line)}
    VERDICTS.write_text("".join(json.dumps(line) + "\n" for line in last.values()), encoding="utf-8")
    options = "".join(f" --{name} {value}" for name, value in (("sample", sample), ("seed", seed)) if value)
    PAGE.write_text(page(f"python benchmarks/mutants.py{options}"), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
