"""What stands on a page: its blocks of code, run in order, and its links."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from attnkit.__main__ import main

__all__ = ["DOCS", "ROOT", "Block", "blocks", "dead_links", "differences", "pages"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```", re.S | re.M)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text without the fence's indent, the line it begins in."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """Return the README and every page of the site."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for found in _FENCE.finditer(text):
        body = re.sub(rf"^{found[1]}", "", found[3], flags=re.M)
        yield Block(found[2], body, text.count("\n", 0, found.start()) + 1)


def differences(page: Path) -> list[str]:
    """Run a page, blocks in one namespace, and return where it does not print what it shows.

    ``python`` runs. ``text`` is what the block before it printed. ``console`` is commands behind
    ``$`` and what they print; those of attnkit are run, in this process.
    """
    namespace: dict[str, object] = {"__name__": "a page"}
    printed, found = "", []
    with torch.enable_grad():  # which a page may turn off, for itself
        for block in blocks(page.read_text(encoding="utf-8")):
            shown = block.text
            if block.language == "python":
                name = f"{page.relative_to(ROOT)}, line {block.line}"
                printed = _printed(lambda b=block, n=name: _execute(b, n, namespace))
                continue
            if block.language == "console":
                commands = re.findall(r"^\$ (.*(?:\\\n.*)*)\n", block.text, re.M)
                if not commands or not all(command.startswith("attnkit ") for command in commands):
                    continue
                printed = "".join(map(_answer, commands))
            elif block.language != "text":
                continue
            if printed.splitlines() != shown.splitlines():
                found.append(f"{page.name}:{block.line} prints\n{printed}\nand shows\n{shown}")
    return found


def dead_links(page: Path) -> list[str]:
    """Return the targets of links that are not on the web, nor in the tree, nor in the nav."""
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace(".md", "")
    return [
        target
        for target in targets
        if not target.startswith("https://")
        and not (page.parent / target).exists()
        and target.rpartition(".")[0].lstrip("./") not in listed
    ]


def _execute(block: Block, name: str, namespace: dict[str, object]) -> None:
    exec(compile("\n" * block.line + block.text, name, "exec"), namespace)


def _printed(run: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()  # type: ignore[operator]
    return out.getvalue()


def _answer(command: str) -> str:
    """Return a command of attnkit as a terminal shows it: the command, then what it prints."""
    _, *arguments = shlex.split(command.replace("\\\n", " "))
    with mock.patch.dict("os.environ", {"COLUMNS": "80"}):
        return f"$ {command}\n{_printed(lambda: main(arguments))}"
