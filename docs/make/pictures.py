"""Draw the README's picture and fill in its output: ``python docs/make/pictures.py``."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

import attnkit as ak
from attnkit import masks

DOCS = Path(__file__).parents[1]
README = DOCS.parent / "README.md"


def draw() -> None:
    """Write docs/images/first.png: the plan of the README's first example."""
    mask = masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4))
    x = torch.empty(1, 8192, 8, 64, device="meta")
    figure = ak.plan(x, x, x, mask=mask).plot()
    figure.savefig(DOCS / "images" / "first.png", dpi=80, metadata={"Software": None})


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
    draw()
    fill_in()
