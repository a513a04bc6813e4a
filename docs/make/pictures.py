"""Draw the first example's plan and fill in its output: ``python docs/make/pictures.py``."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from pathlib import Path

import torch

import attnkit as ak
from attnkit import masks
from attnkit.display import svg
from attnkit.planner.picture import drawing

DOCS = Path(__file__).parents[1]
README = DOCS.parent / "README.md"
PICTURE = DOCS / "images" / "first.svg"


def first_plan() -> ak.Plan:
    """Return the plan of the first example."""
    mask = masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4))
    x = torch.empty(1, 8192, 8, 64, device="meta")
    return ak.plan(x, x, x, mask=mask, backend="emulated")


def explorer() -> str:
    """Return the page to explore the first plan; the site makes it anew in each build."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "first.html"
        first_plan().to_html(page)
        return page.read_text(encoding="utf-8")


def fill_in() -> None:
    """Run the README's first example and put what it prints below it."""
    text = README.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)
    if code is None:
        raise SystemExit("README.md has no python block")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.group(1), {"__name__": "readme"})
    README.write_text(
        re.sub(
            r"```text\n.*?```",
            lambda _: f"```text\n{out.getvalue()}```",
            text,
            count=1,
            flags=re.S,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    PICTURE.write_text(svg.document(drawing(first_plan())), encoding="utf-8")
    fill_in()
