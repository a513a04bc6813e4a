"""The pages about other libraries' calls: their code runs, and prints what it promises."""

from __future__ import annotations

import re

import pytest
import torch

from tests.test_readme import ROOT, run_blocks

FOLDER = ROOT / "docs" / "coming-from"
PAGES = (
    "README",
    "flash-attn",
    "flex-attention",
    "mindspore",
    "npu-fusion-attention",
    "sparse-attention",
    "xformers",
)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_does_what_it_says(name: str) -> None:
    if name == "xformers":
        pytest.importorskip("xformers")
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    with torch.enable_grad():
        pairs = run_blocks(text)
    assert pairs
    for promised, printed in pairs:
        assert printed.splitlines() == promised.splitlines()


def test_the_index_lists_every_page() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\S+?\.md)\)", text))
    assert {page.name for page in FOLDER.glob("*.md")} <= linked | {"README.md"}


def test_links_lead_somewhere() -> None:
    for name in PAGES[1:]:
        page = FOLDER / f"{name}.md"
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (FOLDER / target).exists(), target
