"""All code on all pages runs, and prints what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import (
    COMMANDS,
    DOCS,
    ELSEWHERE,
    ROOT,
    blocks,
    dead_links,
    differences,
    name,
    pages,
    unrun,
)
from tests.interop.transformers import models  # noqa: F401  -- transformers says less


@pytest.mark.filterwarnings("ignore:.*nested.*")
@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_example_prints_what_it_promises(page: Path) -> None:
    if page.stem == "xformers":
        pytest.importorskip("xformers")
    assert not differences(page)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_no_block_goes_unrun(page: Path) -> None:
    assert not unrun(page)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [`b`](no.md) `c[0](x)`\n```python\nd[0](x)\n```\n")
    assert dead_links(page) == ["no.md"]


def test_the_index_of_other_libraries_lists_every_page() -> None:
    text = (DOCS / "coming-from" / "README.md").read_text(encoding="utf-8")
    for page in (DOCS / "coming-from").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in text


@pytest.mark.parametrize("page", ELSEWHERE)
def test_what_is_tested_elsewhere_is_there(page: str) -> None:
    languages, test = ELSEWHERE[page]
    found = {block.language for block in blocks((ROOT / page).read_text(encoding="utf-8"))}
    assert found >= set(languages.split())
    assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_what_runs_other_commands_is_there() -> None:
    assert all((ROOT / runs).exists() for runs in COMMANDS.values())
    text = "".join(page.read_text(encoding="utf-8") for page in pages())
    assert not [start for start in COMMANDS if start not in text]


FAULTS = {
    "```python\nprint(1)\n```\n```text\n2\n```\n": "prints",
    "```python\nprint(1)\n```\n": "does not show",
    "```python\nprint(1)\n```\n```python\n2\n```\n": "stands where the page shows",
    "```text\n1\n```\n": "prints",
    "```console\n$ attnkit --version\nattnkit 0\n```\n": "prints",
}


@pytest.mark.parametrize("text", FAULTS, ids=FAULTS.values())
def test_a_page_that_shows_something_else_is_seen(text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text)
    (found,) = differences(page)
    assert FAULTS[text] in found


UNREAD = {
    "```\n1 + 1\n```\n": "of no language",
    "```py\n1 + 1\n```\n": "'py'",
    "````python\n1 + 1\n````\n": "of no language",
    "~~~python\n1 + 1\n~~~\n": "other fences",
    "```bash\nrm -rf build\n```\n": "rm -rf build",
    "```console\n$ attnkit plan\n$ python one.py\n```\n": "python one.py",
    "```yaml\na: [1\n```\n": "does not parse",
    "```json\n{'a': 1}\n```\n": "does not parse",
}


@pytest.mark.parametrize("text", UNREAD, ids=range(len(UNREAD)))
def test_a_block_that_nothing_runs_is_seen(text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text)
    assert UNREAD[text] in "".join(unrun(page))
