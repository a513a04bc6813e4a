"""The README's examples run, and print what it says they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.S)


def run_blocks(text: str) -> list[tuple[str, str]]:
    """Run the python blocks in one namespace; return (promised, printed) per text block."""
    namespace: dict[str, object] = {"__name__": "readme"}
    pairs, printed = [], ""
    for kind, body in BLOCK.findall(text):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, str(README), "exec"), namespace)
            printed = out.getvalue()
        else:
            pairs.append((body, printed))
    return pairs


def test_every_example_prints_what_the_readme_says() -> None:
    pairs = run_blocks(README.read_text(encoding="utf-8"))
    assert pairs
    for promised, printed in pairs:
        assert printed.splitlines() == promised.splitlines()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
