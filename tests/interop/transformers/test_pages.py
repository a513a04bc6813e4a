"""A new user's first hour, and the page for who comes from transformers, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.interop.transformers import models  # noqa: F401  -- transformers says less
from tests.test_readme import ROOT, run_blocks

PAGES = (ROOT / "docs" / "first-hour.md", ROOT / "docs" / "coming-from" / "transformers.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page: Path) -> None:
    with torch.enable_grad():
        pairs = run_blocks(page.read_text(encoding="utf-8"))
    assert pairs
    for promised, printed in pairs:
        assert printed.splitlines() == promised.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
