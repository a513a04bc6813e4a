"""Run the notebooks of the tutorial and store what their cells answer.

    python docs/make/notebooks.py            # all of them
    python docs/make/notebooks.py 1-masks    # one

Each runs in a kernel of its own, as it does for readers. What is stored is the same after every
run: no times, no paths, nothing of the machine. A cell that raises, or warns, stops the script.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from attnkit.progress import progress

__all__ = ["NOTEBOOKS", "answered", "bundle", "notebooks", "outputs", "read"]

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    """Return the notebooks in the order of the tutorial."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    """Return a notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def answered(path: Path) -> NotebookNode:
    """Return a notebook with what its cells answer in a new kernel."""
    found = read(path)
    for cell in found.cells:
        cell.metadata = NotebookNode()
    found.metadata = nbformat.from_dict(_METADATA)
    client = NotebookClient(
        found,
        kernel_name="python3",
        timeout=120,
        extra_arguments=["--IPKernelApp.log_level=40"],  # it listens to this machine only
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        record_timing=False,
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})  # this tree, installed or not
    found.metadata = nbformat.from_dict(_METADATA)  # the kernel adds its version
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs = outputs(cell)
    nbformat.validate(found)
    return found


def outputs(cell: NotebookNode) -> list[NotebookNode]:
    """Return what a cell answered, prints that came in pieces as one; raise for a warning."""
    kept: list[NotebookNode] = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            raise RuntimeError(f"cell {cell.id} writes to stderr:\n{output.text}")
        same = kept and kept[-1].output_type == output.output_type == "stream"
        if same:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def bundle(cell: NotebookNode) -> list[dict[str, Any]]:
    """Return the outputs of a cell as plain data: what was printed, and the forms of its value."""
    return [
        {"text": found.text} if found.output_type == "stream" else dict(found.data)
        for found in outputs(cell)
    ]


def main() -> None:
    """Run those that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 1-masks; all where none is named")
    names = parser.parse_args().names
    chosen = [path for path in notebooks() if not names or path.stem in names]
    with progress("running notebooks", len(chosen)) as bar:
        for path in chosen:
            nbformat.write(answered(path), path)
            bar.step(path.name)
            bar.line(path.name)


if __name__ == "__main__":
    main()
