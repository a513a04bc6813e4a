"""What stands on a page: its blocks of code, who runs each, and its links."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from ruamel.yaml import YAML

from attnkit.__main__ import main
from docs.make.hooks import MADE, PAGES

__all__ = [
    "COMMANDS",
    "DOCS",
    "ELSEWHERE",
    "ROOT",
    "Block",
    "blocks",
    "commands",
    "dead_links",
    "differences",
    "name",
    "notebooks",
    "pages",
    "unrun",
]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

ELSEWHERE = {
    "CONTRIBUTING.md": ("python", "tests/test_contributing.py"),
    "docs/guides/ascend.md": ("python", "tests/npu/test_migration.py"),
    "docs/guides/configuration.md": ("console", "tests/test_omegaconf.py"),
    "docs/guides/parallel.md": ("py console log", "tests/parallel/test_page.py"),
    "docs/reference/commands.md": ("python console", "tests/doctor/test_documentation.py"),
    "docs/reference/kernel.md": ("text", "tests/kernel/test_docs.py"),
    "docs/variants.md": ("text", "tests/planner/test_variants.py"),
}
"""Pages of which a test of their own runs or writes the blocks of some languages."""

COMMANDS = {
    "pip install": "tests/release.py",
    "make demo": "tests/examples/test_train_lm.py",
    "make test": ".ci/run",
    "make lint": ".ci/run",
    "make format": "Makefile",
    "make docs": ".ci/run",
    "make dist": "tests/release.py",
    "make bench-gpu": "Makefile",
    "python -m tests.zoo": ".ci/run",
    ".venv/bin/python examples/": "tests/examples/test_train_lm.py",
    "python -m torch.distributed.run --nproc-per-node 4 examples/train_lm.py": "tests/examples",
}
"""How other commands on pages begin, and what runs them: they install, or take minutes."""

_FENCE = re.compile(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```", re.S | re.M)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text without the fence's indent, the line it begins in."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """Return the README and every page of the site that is a file of Markdown."""
    outside = [path for pattern in PAGES for path in ROOT.glob(pattern) if path.suffix == ".md"]
    return [ROOT / "README.md", *sorted(outside), *sorted(DOCS.rglob("*.md"))]


def notebooks() -> list[Path]:
    """Return the pages that are notebooks; tests/docs/test_notebooks.py runs them."""
    return sorted(DOCS.rglob("*.ipynb"))


def name(page: Path) -> str:
    """Return what a page is called in the tree."""
    return page.relative_to(ROOT).as_posix()


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
            if block.language in _languages_elsewhere(page):
                continue
            if block.language == "python":
                title = f"{name(page)}, line {block.line}"
                if printed:
                    found.append(f"{page.name}:{block.line} stands where the page shows\n{printed}")
                printed = _printed(lambda b=block, t=title: _execute(b, t, namespace))
                continue
            if block.language == "console" and _of_attnkit(block):
                printed = "".join(map(_answer, commands(block)))
            elif block.language != "text":
                continue
            if printed.splitlines() != block.text.splitlines():
                found.append(f"{page.name}:{block.line} prints\n{printed}\nand shows\n{block.text}")
            printed = ""
    return found + ([f"{page.name} does not show\n{printed}"] if printed else [])


def unrun(page: Path) -> list[str]:
    """Return the blocks of a page that nothing runs, reads or compares, and why."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *(?:```|~~~)", text, re.M)
    found = [] if len(fences) == 2 * len([*blocks(text)]) else [f"{page.name} has other fences"]
    for block in blocks(text):
        if block.language not in _languages_elsewhere(page):
            wrong = _CHECKS.get(block.language, _unknown)(block)
            found += [f"{page.name}:{block.line} {wrong}"] if wrong else []
    return found


def _unknown(block: Block) -> str:
    return f"is {block.language or 'of no language'!r}, which no test reads"


def _runs(block: Block) -> str:
    return ""  # `differences` runs or compares it


def _shell(block: Block) -> str:
    if _of_attnkit(block):
        return ""
    lines = block.text.replace("\\\n", " ").splitlines()
    given = commands(block) or [line.split("  #")[0] for line in lines if line.strip()]
    unknown = [one for one in given if not one.startswith((*COMMANDS, "#"))]
    return f"has commands that nothing runs: {unknown}" if unknown else ""


def _yaml(block: Block) -> str:
    return _reads(lambda: list(YAML(typ="safe").load_all(block.text)))


def _json(block: Block) -> str:
    return _reads(lambda: json.loads(block.text))


def _toml(block: Block) -> str:
    if sys.version_info < (3, 11):  # which has no tomllib; CI runs a newer one
        return ""
    import tomllib

    return _reads(lambda: tomllib.loads(block.text))


def _reads(read: Callable[[], object]) -> str:
    try:
        read()
    except Exception as error:
        return f"does not parse: {error}"
    return ""


_CHECKS: dict[str, Callable[[Block], str]] = {
    "python": _runs,
    "text": _runs,
    "console": _shell,
    "bash": _shell,
    "yaml": _yaml,
    "json": _json,
    "toml": _toml,
}


def _languages_elsewhere(page: Path) -> list[str]:
    return ELSEWHERE.get(name(page), ("", ""))[0].split()


def commands(block: Block) -> list[str]:
    """Return the commands of a block, those behind ``$``."""
    return re.findall(r"^\$ (.*(?:\\\n.*)*)\n", block.text, re.M)


def _of_attnkit(block: Block) -> bool:
    given = commands(block)
    return bool(given) and all(command.startswith("attnkit ") for command in given)


def dead_links(page: Path) -> list[str]:
    """Return the targets of links that are neither on the web nor in the tree."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = _LINK.findall(prose)
    return [
        target
        for target in targets
        if not target.startswith("https://")
        and target not in MADE
        and not (page.parent / target).exists()
    ]


def _execute(block: Block, title: str, namespace: dict[str, object]) -> None:
    exec(compile("\n" * block.line + block.text, title, "exec", dont_inherit=True), namespace)


def _printed(run: Callable[[], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()
    return out.getvalue()


def _answer(command: str) -> str:
    """Return a command of attnkit as a terminal shows it: the command, then what it prints."""
    _, *arguments = shlex.split(command.replace("\\\n", " "))
    with mock.patch.dict("os.environ", {"COLUMNS": "80"}):
        return f"$ {command}\n{_printed(lambda: main(arguments))}"
