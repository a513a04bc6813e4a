"""Tests that cannot fail, as far as their text tells: none of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
ALWAYS_TRUE = (ast.Constant, ast.JoinedStr, ast.Lambda, ast.GeneratorExp, ast.Tuple)
NEVER_EMPTY = {"shape", "explain", "repr", "eval"}  # what these give is true whatever it holds


def own_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a function, but not those of functions inside of it."""
    for statement in body:
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            for name in ("body", "orelse", "finalbody"):
                yield from own_statements(getattr(statement, name, []))


def is_void(test: ast.expr) -> bool:
    """Whether what is asserted holds whatever the code under test does."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(is_void(value) for value in test.values)
    if isinstance(test, ast.Compare) and not isinstance(test.ops[0], ast.Is | ast.IsNot):
        return any(ast.dump(test.left) == ast.dump(other) for other in test.comparators) and (
            not any(isinstance(part, ast.Call) for part in ast.walk(test))
        )
    named = test.func if isinstance(test, ast.Call) else test
    name = getattr(named, "attr", getattr(named, "id", ""))
    return isinstance(test, ALWAYS_TRUE) or name in NEVER_EMPTY


def found(text: str) -> list[str]:
    """What is wrong with the tests of a file: the line, and why."""
    wrong = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert) and is_void(node.test):
            wrong.append(f"{node.lineno}: always holds")
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            wrong += [
                f"{part.lineno}: a return, by which it passes"
                for part in own_statements(node.body)
                if isinstance(part, ast.Return)
            ]
    return wrong


def test_none_returns_early_and_none_asserts_what_always_holds() -> None:
    files = sorted(ROOT.rglob("test_*.py"))
    wrong = {str(path.relative_to(ROOT)): found(path.read_text("utf-8")) for path in files}
    assert len(files) > 80
    assert {name: lines for name, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize(
    "body",
    [
        "assert True",
        "assert x or 1",
        "assert (x, 'a message')",
        "assert x == x",
        "assert f(x).shape",
        "assert plan.explain()",
        "if x:\n        return",
        "for x in y:\n        if x:\n            return",
    ],
)
def test_what_cannot_fail_is_found(body: str) -> None:
    assert found(f"def test():\n    {body}\n")


@pytest.mark.parametrize(
    "body",
    ["assert x", "assert f(x) == f(x)", "assert x.shape == y", "def inner():\n        return 1"],
)
def test_what_can_fail_is_not(body: str) -> None:
    assert found(f"def test():\n    {body}\n") == []
