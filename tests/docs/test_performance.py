"""The figures on the page about performance are rows of benchmarks/results."""

from __future__ import annotations

from tests.docs.pages import DOCS, ROOT

TABLES = {
    "| mask | pass | tiled, ms |": ("attention.md", ("8192", "64", "float32")),
    "| mask | dtype | tiled | compiled |": ("kernel_in_cpp.md", ()),
}
"""The head of a table, the file that its rows are from, and what else stands in those."""


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|") if cell.strip()]


def test_every_row_of_a_table_is_one_of_its_source() -> None:
    page = (DOCS / "guides" / "performance.md").read_text(encoding="utf-8")
    for head, (name, also) in TABLES.items():
        assert head in page
        source = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8").splitlines()
        known = [cells(row) for row in source if row.startswith("|")]
        rows = page.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
        assert len(rows) > 3
        for row in rows:
            told = (*cells(row), *also)
            assert any(all(told.count(c) <= one.count(c) for c in told) for one in known), row


def test_what_pages_say_of_the_compiled_kernel_is_in_the_table() -> None:
    page, backends = (
        (DOCS / "guides" / name).read_text(encoding="utf-8")
        for name in ("performance.md", "backends.md")
    )
    source = (ROOT / "benchmarks" / "results" / "kernel_in_cpp.md").read_text(encoding="utf-8")
    rows = source.partition("| mask | dtype | tiled | compiled |")[2].partition("\n\n")[0]
    told = [float(one) for row in rows.splitlines()[2:] for one in cells(row)[-1].split(" / ")]
    for text in (page, backends):
        assert f"{min(told):.1f} to {max(told):.1f} times as fast as `tiled`" in text


def test_what_the_text_says_of_sixteen_bits_is_in_the_table() -> None:
    page = " ".join((DOCS / "guides" / "performance.md").read_text(encoding="utf-8").split())
    source = (ROOT / "benchmarks" / "results" / "sixteen_bits.md").read_text(encoding="utf-8")
    rows = [cells(row) for row in source.splitlines() if row.startswith("| ")][1:]
    forward, both = zip(*((float(a), float(b)) for _, a, b in rows), strict=True)
    assert f"takes {min(forward)} to {max(forward)} times as long as float32 forward" in page
    assert f"{min(both)} to {max(both)} with the backward pass" in page
