"""Notebooks as pages: their Markdown as it is, their code as blocks, their outputs as stored."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["as_page", "with_outputs"]

_HERE = re.compile(r'<div data-output="(\d+)"></div>')


def as_page(notebook: str, name: str) -> str:
    """Return a notebook as Markdown; pictures are left out until it is HTML (`with_outputs`).

    >>> cells = [{"cell_type": "markdown", "source": ["# Sets"]}]
    >>> print(as_page(json.dumps({"cells": cells}), "1-masks.ipynb"))
    # Sets
    <BLANKLINE>
    [This page as a notebook](1-masks.ipynb){ .notebook download }
    """
    parts = [text for number, cell in enumerate(_cells(notebook)) for text in _shown(cell, number)]
    link = f"[This page as a notebook]({posixpath.basename(name)}){{ .notebook download }}"
    return "\n\n".join([*parts[:1], link, *parts[1:]])


def with_outputs(page: str, notebook: str) -> str:
    """Return the HTML of a page with the pictures of its notebook in their places."""
    cells = list(_cells(notebook))

    def html(found: re.Match[str]) -> str:
        rich = [_rich(output) for output in cells[int(found[1])]["outputs"]]
        return "".join(f'<div class="output">{one}</div>' for one in rich if one)

    return _HERE.sub(html, page)


def _cells(notebook: str) -> Iterator[dict[str, Any]]:
    yield from json.loads(notebook)["cells"]


def _shown(cell: dict[str, Any], number: int) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
    if cell["cell_type"] != "code" or not source:
        return
    yield f"````python\n{source}\n````"
    outputs = cell["outputs"]
    text = "".join(_plain(output) for output in outputs if not _rich(output))
    if text.strip():
        yield f"````{{ .text .output }}\n{text.rstrip()}\n````"
    if any(_rich(output) for output in outputs):
        yield f'<div data-output="{number}"></div>'


def _rich(output: dict[str, Any]) -> str:
    """Return an output as HTML, empty if it is text."""
    data = output.get("data", {})
    for kind in ("text/html", "image/svg+xml"):
        if kind in data:
            return "".join(data[kind])
    if "image/png" in data:
        return f'<img src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return ""


def _plain(output: dict[str, Any]) -> str:
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}\n"
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "".join(text).rstrip("\n") + "\n"
