"""All code on all pages runs, and prints what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, dead_links, differences, pages
from tests.interop.transformers import models  # noqa: F401  -- transformers says less

ELSEWHERE = {
    "docs/guides/ascend.md": "tests/npu/test_migration.py",
    "docs/reference/commands.md": "tests/doctor/test_documentation.py",
    "docs/reference/kernel.md": "tests/kernel/test_docs.py",
    "docs/variants.md": "tests/planner/test_gallery.py",
}
"""Pages that a test of their own runs or writes."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore:.*nested.*")
@pytest.mark.parametrize("page", [p for p in pages() if name(p) not in ELSEWHERE], ids=name)
def test_every_example_prints_what_it_promises(page: Path) -> None:
    if page.stem == "xformers":
        pytest.importorskip("xformers")
    assert not differences(page)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


def test_the_index_of_other_libraries_lists_every_page() -> None:
    text = (DOCS / "coming-from" / "README.md").read_text(encoding="utf-8")
    for page in (DOCS / "coming-from").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in text


def test_pages_that_are_tested_elsewhere_are_there() -> None:
    for page, test in ELSEWHERE.items():
        assert (ROOT / page).exists()
        assert (ROOT / test).exists()
