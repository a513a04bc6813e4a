"""The generated reference page is the one in the tree."""

from __future__ import annotations

from pathlib import Path

from attnkit.kernel import RULES
from attnkit.kernel.docs import render

PAGE = Path(__file__).parents[2] / "docs" / "kernel.md"


def test_the_page_is_current():
    """Regenerate it with `python -m attnkit.kernel.docs` when this fails."""
    assert PAGE.read_text(encoding="utf-8") == render()


def test_the_page_holds_every_rule_and_output():
    text = render()
    for rule in RULES:
        assert f"| `{rule.code}` | {rule.layer} |" in text
    assert "| TND | float16 | float16 [10, 4, 6] | float32 [10, 4, 8] |" in text
