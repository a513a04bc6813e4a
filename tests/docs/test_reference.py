"""The reference has every public name, docstrings become Markdown, notebooks become pages."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import griffe
import pytest

from attnkit.display import svg
from attnkit.planner.picture import drawing
from docs.make import cells, hooks, names, pictures
from docs.make.docstrings import Docstrings, as_markdown
from tests.docs.pages import DOCS, ROOT

PACKAGES = ["masks", "pse", "layouts", "kernel", "parallel", "backends", "planner", "errors"]
HELPERS = {"flash_cache", "flash_core", "flex_scores", "host", "npu_biases", "npu_reading"}


def adapters() -> list[str]:
    """Return the modules of attnkit.interop that users import."""
    folder = ROOT / "attnkit" / "interop"
    found = {path.stem if path.suffix else path.name for path in folder.iterdir()}
    return sorted(name for name in found - HELPERS if not name.startswith("_"))


def exported(module: str) -> list[str]:
    """Return what a module's ``__all__`` lists; it is not imported, for it may need a library."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


@pytest.mark.parametrize("package", ["attnkit", *(f"attnkit.{package}" for package in PACKAGES)])
def test_every_public_name_has_an_entry(package: str) -> None:
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}
    entries = [f"{package}.{name}" for name, one in values.items() if not inspect.ismodule(one)]
    assert not set(entries) - set(names.entries())


@pytest.mark.parametrize("adapter", adapters())
def test_every_name_of_an_adapter_has_an_entry(adapter: str) -> None:
    module = f"attnkit.interop.{adapter}"
    assert not {f"{module}.{name}" for name in exported(module)} - set(names.entries())


def test_entries_are_public() -> None:
    hidden = [name for name in names.entries() if any(part[0] == "_" for part in name.split("."))]
    assert not hidden


def test_doctests_become_blocks() -> None:
    text = "Adds.\n\n>>> 1 + 1\n2\n\n>>> 2 + 2\n4\n\nThat is all."
    block = "```pycon\n>>> 1 + 1\n2\n\n>>> 2 + 2\n4\n```"
    assert as_markdown(text) == f"Adds.\n\n{block}\n\nThat is all."


def test_names_in_docstrings_lead_to_their_entries() -> None:
    source = '''
"""`masks.Causal`, not ``Causal``, nor `nothing`; `Mask.show` and `Mask._region`.

>>> print("`Causal`")
`Causal`
"""
'''
    package = griffe.load("attnkit", search_paths=[str(ROOT)])
    package.members["own"] = griffe.visit("own", ROOT / "own.py", source, parent=package)
    Docstrings().on_package(pkg=package)
    text = package["own"].docstring.value
    assert text.startswith("[`masks.Causal`][attnkit.masks.Causal], not ``Causal``, nor `nothing`;")
    assert "[`Mask.show`][attnkit.masks.Mask.show] and `Mask._region`" in text
    assert '>>> print("`Causal`")\n`Causal`' in text
    raises = package["masks.causal.Causal"].docstring.value
    assert "```pycon\n>>> print(Causal().show(2, 4))\n###." in raises


def test_links_lead_to_pages_of_the_site() -> None:
    def moved(link: str, here: str = "docs/guides/decoding.md") -> str:
        return hooks._relinked(link, here)

    assert moved("[a](../../CONTRIBUTING.md#state)") == "[a](../project/CONTRIBUTING.md#state)"
    assert moved("[a](../../README.md)") == "[a](../index.md)"
    assert moved("[a](parallel.md) [b](https://a.b/c.md) [c](#d)").startswith("[a](parallel.md) [b")
    assert moved("[`errors`](../../attnkit/errors.py)") == "`errors`"
    assert moved("[errors](../../attnkit/errors.py)") == "`attnkit/errors.py`"
    assert moved("[no](nowhere.md)") == "[no](nowhere.md)"  # and strict mode tells
    assert moved("[a](docs/guides/decoding.md)", "README.md") == "[a](guides/decoding.md)"
    assert moved("![a](growth.png)", "benchmarks/results/planner.md") == "![a](growth.png)"
    notebook = hooks._repository_path(SimpleNamespace(src_uri="notebooks/2-biases.md"))
    assert moved("[a](1-masks.ipynb) [b](../faq.md)", notebook) == "[a](1-masks.md) [b](../faq.md)"
    source = "project/source/examples/train_lm.py.md"
    assert moved("[a](train_lm.py)", "examples/README.md") == f"[a](../{source[8:]})"


def test_the_site_is_built_strictly() -> None:
    """`--quiet` drops warnings before strict mode counts them."""
    for build in ("Makefile", "tests/site/conftest.py"):
        text = (ROOT / build).read_text(encoding="utf-8")
        assert re.search(r"mkdocs\W+build", text)
        assert not re.search(r"mkdocs\W+build\W+--quiet", text)
    assert "strict: true" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_notebooks_become_pages() -> None:
    notebook = """{"cells": [
        {"cell_type": "markdown", "source": ["# A\\n", "text"]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [
            {"output_type": "stream", "text": ["said\\n"]},
            {"output_type": "execute_result", "data": {"text/plain": ["2"]}}]},
        {"cell_type": "code", "source": ["draw()"], "outputs": [
            {"output_type": "display_data", "data": {
                "text/plain": ["<Figure>"], "image/svg+xml": ["<svg></svg>"]}}]}]}"""
    page = cells.as_page(notebook, "1-a.ipynb")
    assert page.startswith("# A\ntext\n\n[This page as a notebook](1-a.ipynb)")
    assert "````python\n1 + 1\n````\n\n````{ .text .output }\nsaid\n2\n````" in page
    assert "<Figure>" not in page
    html = cells.with_outputs('<p><div data-output="2"></div>', notebook)
    assert html == '<p><div class="output"><svg></svg></div>'


@pytest.mark.parametrize("module", [cells, hooks, names], ids=lambda module: module.__name__)
def test_what_makes_pages_does_what_its_examples_say(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_the_picture_of_the_first_example_is_current() -> None:
    """Draw it with `python docs/make/pictures.py` when this fails."""
    drawn = svg.document(drawing(pictures.first_plan()))
    assert pictures.PICTURE.read_text(encoding="utf-8") == drawn


def test_the_page_of_the_schema_is_current(tmp_path: Path) -> None:
    """Regenerate it with `python docs/make/schema.py` when this fails.

    In a process of its own: tests of backends register some that the page does not have.
    """
    subprocess.run([sys.executable, "docs/make/schema.py", tmp_path], cwd=ROOT, check=True)
    assert [*tmp_path.iterdir()]
    for made in tmp_path.iterdir():
        kept = (DOCS / "reference" / made.name).read_text(encoding="utf-8")
        assert made.read_text(encoding="utf-8") == kept
