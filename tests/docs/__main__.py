"""What the pages of the site hold, in numbers: ``python -m tests.docs``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from docs.make.names import entries
from tests.docs.pages import ROOT, blocks, commands, name, notebooks, pages


def of_pages() -> Counter[str]:
    """Count the blocks of all pages by what is done with them."""
    counted: Counter[str] = Counter()
    for page in pages():
        counted["pages"] += name(page) != "README.md"
        for block in blocks(page.read_text(encoding="utf-8")):
            counted["programs"] += block.language in ("python", "py")
            counted["commands"] += len(commands(block)) if block.language == "console" else 0
            counted["outputs"] += block.language in ("text", "log")
            counted["outputs"] += block.language == "console" and bool(commands(block))
            counted["data"] += block.language in ("yaml", "json", "toml")
    return counted


def of_notebooks() -> Counter[str]:
    """Count the cells of all notebooks, and what they show."""
    counted: Counter[str] = Counter()
    for notebook in notebooks():
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        counted["pages"] += 1
        counted["programs"] += len(code)
        counted["outputs"] += sum(bool(cell["outputs"]) for cell in code)
    return counted


def examples() -> int:
    """Return the number of docstrings with an example: the doctests."""
    files = Path(ROOT / "attnkit").rglob("*.py")
    paragraphs = (part for file in files for part in file.read_text(encoding="utf-8").split('"""'))
    return sum(
        "\n    >>> " in part or part.startswith(">>> ") or "\n>>> " in part for part in paragraphs
    )


def main() -> None:
    """Print the numbers."""
    written, cells = of_pages(), of_notebooks()
    cell_count = cells["programs"]
    every = written["pages"] + cells["pages"]
    rows = {
        "pages": f"{every}, {cells['pages']} of them notebooks",
        "blocks of Python run": f"{written['programs']}, and {cell_count} cells of notebooks",
        "commands run": f"{written['commands']}",
        "outputs compared": f"{written['outputs']}, and {cells['outputs']} of cells",
        "files read": f"{written['data']} (YAML, JSON, TOML)",
        "reference": f"{len(entries())} entries; {examples()} docstrings with examples that run",
    }
    for what, number in rows.items():
        print(f"{what:22} {number}")


if __name__ == "__main__":
    main()
