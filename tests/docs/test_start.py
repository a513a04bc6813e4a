"""The page about reports knows every label that a report may have."""

from __future__ import annotations

import re

from tests.docs.pages import DOCS, ROOT

_LABEL = re.compile(r'(?:entry|listed|yield)[\s(]*"([a-z][a-z ?]*)"')


def test_every_label_of_a_report_is_explained() -> None:
    code = (ROOT / "attnkit/planner/explain.py").read_text(encoding="utf-8")
    page = (DOCS / "start" / "explain.md").read_text(encoding="utf-8")
    told = {label for row in re.findall(r"^\| (`.*?) \|", page, re.M) for label in row.split("`")}
    labels = set(_LABEL.findall(code))
    assert {"mask", "shape", "merge", "passed over", "refused", "also right"} <= labels
    assert labels <= told, labels - told
