"""The pictures of "How it works" are those that the code gives."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from docs.make import diagrams


@pytest.mark.parametrize("name", diagrams.PICTURES)
def test_a_picture_is_current(name: str) -> None:
    """Draw it again with `python docs/make/diagrams.py` when this fails."""
    drawn = diagrams.PICTURES[name]()
    ElementTree.fromstring(drawn)
    assert (diagrams.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn
