"""The notebooks answer what is stored in them, cell by cell, and can be read by everyone."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from nbformat import NotebookNode

from attnkit import masks, pse
from docs.make import notebooks
from tests.docs.pages import ROOT, dead_links

ALL = notebooks.notebooks()


def answers(book: NotebookNode) -> Iterator[tuple[NotebookNode, list[dict[str, Any]]]]:
    """Yield each cell of code with what it answers here, as a kernel would store it.

    A kernel for each notebook takes longer than the notebooks; `make test-sweeps` has them.
    """
    module = ModuleType("a_notebook")  # where classes of a cell look for their module
    sys.modules[module.__name__] = module
    try:
        with torch.enable_grad():
            for cell in book.cells:
                if cell.cell_type == "code":
                    yield cell, _answer(cell.source, cell.id, vars(module))
    finally:
        del sys.modules[module.__name__]


def _answer(source: str, name: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    value, out = None, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(ast.Module(body, []), name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    shown = [{"text": out.getvalue()}] if out.getvalue() else []
    return shown if value is None else [*shown, DisplayFormatter().format(value)[0]]


def differences(book: NotebookNode) -> list[str]:
    """Return the cells that answer something else than is stored in them."""
    return [
        f"{cell.id} answers\n{found}\nand shows\n{stored}"
        for cell, found in answers(book)
        if found != (stored := notebooks.bundle(cell))
    ]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Leave torch's generator, its threads and the registries as they were."""
    threads, before = torch.get_num_threads(), {kind: set(kind) for kind in (masks.MASKS, pse.PSE)}
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    for registry, names in before.items():
        for name in set(registry) - names:
            registry.remove(name)


def test_the_tutorial_has_six_steps() -> None:
    assert [path.stem[0] for path in ALL] == list("123456")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_cells_answer_what_is_stored(path: Path) -> None:
    assert not differences(notebooks.read(path))


@pytest.mark.sweep
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_kernel_answers_what_is_stored(path: Path) -> None:
    assert nbformat.writes(notebooks.answered(path)) == nbformat.writes(notebooks.read(path))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_what_is_stored_is_of_no_machine(path: Path) -> None:
    book = notebooks.read(path)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert book.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in book.cells)
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|home|work|usr)/| at 0x[0-9a-f]+|image/png", text)
    assert json.loads(text) == json.loads(nbformat.writes(book))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_cells_are_few_and_short(path: Path) -> None:
    """A cell is one idea: it fits on a screen, and a sentence stands before it."""
    book = notebooks.read(path)
    assert book.cells[0].cell_type == "markdown"
    for cell in book.cells:
        assert cell.source.strip()
        assert cell.source.count("\n") < 45
        assert cell.cell_type == "markdown" or len(max(cell.source.split("\n"), key=len)) <= 100


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    assert not dead_links(path)


def test_an_answer_that_changed_is_seen() -> None:
    book = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("print('one')\n[1, 2]")
    told = [
        nbformat.v4.new_output("stream", text="one\n"),
        nbformat.v4.new_output("execute_result", data={"text/plain": "[1, 2]"}),
    ]
    book.cells, cell.outputs = [cell], told
    assert not differences(book)
    told[1].data["text/plain"] = "[1, 3]"
    assert "answers" in differences(book)[0]
    told[1].data["text/plain"] = "[1, 2]"
    told[0].text = "two\n"
    assert differences(book)


def test_the_root_of_the_tree_is_where_pages_say() -> None:
    assert notebooks.NOTEBOOKS.is_relative_to(ROOT / "docs")
