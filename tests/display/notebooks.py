"""Notebooks that are executed, as a reader would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def shown(cells: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Run cells in one kernel; return the data that each displays: a bundle for each output."""
    notebook = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]  # type: ignore[no-untyped-call]
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    kinds = ("display_data", "execute_result")
    return [
        [dict(one["data"]) for one in cell["outputs"] if one["output_type"] in kinds]
        for cell in notebook.cells
    ]
