"""The examples of the README and of some pages run, and print what they promise."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in ("backends.md", "decoding.md", "gathered.md", "parallel.md", "selected.md")
    ),
]
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.S)


def run_blocks(text: str) -> list[tuple[str, str]]:
    """Run the python blocks in one namespace; return (promised, printed) per text block."""
    namespace: dict[str, object] = {"__name__": "readme"}
    pairs, printed = [], ""
    for kind, body in BLOCK.findall(text):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, "an example", "exec"), namespace)
            printed = out.getvalue()
        else:
            pairs.append((body, printed))
    return pairs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_prints_what_it_promises(page: Path) -> None:
    with torch.enable_grad():  # which a page may turn off, for itself
        pairs = run_blocks(page.read_text(encoding="utf-8"))
    assert torch.is_grad_enabled()
    assert pairs
    for promised, printed in pairs:
        assert printed.splitlines() == promised.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
