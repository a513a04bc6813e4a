"""Draw the first example's picture, write its explorer, and fill in what the README's prints.

``python docs/make/pictures.py``
"""

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


def drawn() -> dict[Path, str]:
    """Return the files that show the plan of the first example, each with its text."""
    mask = masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4))
    x = torch.empty(1, 8192, 8, 64, device="meta")
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "first.html"
        plan.to_html(page)
        text = page.read_text(encoding="utf-8")
    return {
        DOCS / "images" / "first.svg": svg.document(drawing(plan)),
        DOCS / "images" / "first.html": text,
    }


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
    for file, text in drawn().items():
        file.write_text(text, encoding="utf-8")
    fill_in()
