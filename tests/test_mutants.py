"""The mutants that `benchmarks/mutants.py` tries the tests on."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mutants():
    pytest.importorskip("resource", reason="processes are not forked on this system")
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_kind_of_change_is_made_one_at_a_time(mutants):
    source = "def f(a, b=1):\n    if a and b:\n        print(a)\n    return a < b + 2.5\n"
    assert [mutant.name for mutant in mutants.mutants(ast.parse(source))] == [
        "f: a, b=1 -> a, b=2",
        "f: a, b=1 -> a, b=0",
        "f: a and b -> not (a and b)",
        "f: a and b -> a or b",
        "f: print(a) ->",
        "f: return a < b + 2.5 -> return None",
        "f: a < b + 2.5 -> a <= b + 2.5",
        "f: a < b + 2.5 -> a >= b + 2.5",
        "f: b + 2.5 -> b - 2.5",
        "f: b + 2.5 -> b + 3.5",
        "f: b + 2.5 -> b + 1.5",
    ]


def test_messages_annotations_and_docstrings_are_left_alone(mutants):
    assert mutants.mutants(ast.parse('def f(a: int | None) -> list[1]:\n    """Text."""\n    pass\n')) == []


def test_every_mutant_is_another_module_that_compiles(mutants):
    for module in mutants.MODULES:
        source = (ROOT / module).read_text(encoding="utf-8")
        tree = ast.parse(source)
        found = mutants.mutants(tree)
        assert ast.dump(tree) == ast.dump(ast.parse(source)), "finding them changes nothing"
        assert len({mutant.name for mutant in found}) == len(found)
        for mutant in found[::50]:
            changed = ast.parse(source)
            next(m for m in mutants.mutants(changed) if m.name == mutant.name).apply()
            assert ast.dump(changed) != ast.dump(tree)
            compile(changed, module, "exec")


def test_a_marked_module_tells_the_lines_that_run(mutants):
    source = "def f(a):\n    if a:\n        def g():\n            return 1\n        return g()\n    return [0\n    ][0]\n"
    lines: list[int] = []
    scope = {"__reached__": lines.append}
    exec(compile(mutants.marked(ast.parse(source)), "f", "exec"), scope)
    assert scope["f"](0) == 0 and lines == [1, 2, 6]
    lines.clear()
    assert scope["f"](1) == 1 and lines == [1, 2, 3, 5, 3, 4]


def test_every_mutant_that_is_told_to_be_equivalent_is_one(mutants):
    for module in mutants.MODULES:
        names = {mutant.name for mutant in mutants.mutants(ast.parse((ROOT / module).read_text(encoding="utf-8")))}
        assert set(mutants._equivalent(module)) <= names
