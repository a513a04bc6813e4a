"""What a picture shows, read back from its SVG: the colour and opacity of each field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from attnkit.display.html import LONGEST

SVG = "{http://www.w3.org/2000/svg}"
RECTANGLE = re.compile(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z")

Field = tuple[int, int]
"""Row and column."""


def tree(markup: str) -> ElementTree.Element:
    """Parse a page; it is XML, and short."""
    assert len(markup) <= LONGEST < 200_000
    return ElementTree.fromstring(markup)


def svgs(markup: str) -> list[ElementTree.Element]:
    """Return the pictures of a page."""
    return list(tree(markup).iter(f"{SVG}svg"))


def size(svg: ElementTree.Element) -> Field:
    """Return how many rows and columns of fields a picture has."""
    _, _, columns, rows = map(int, svg.get("viewBox", "").split())
    return rows, columns


def painted(svg: ElementTree.Element) -> dict[Field, dict[str, float]]:
    """Return the colours of each field that has one, with their opacities."""
    found: dict[Field, dict[str, float]] = {}
    rows, columns = size(svg)
    for path in svg.findall(f"{SVG}path"):
        colour, opacity = path.get("fill", ""), float(path.get("fill-opacity", 1))
        for field in _fields(path.get("d", "")) if colour != "none" else ():
            assert 0 <= field[0] < rows
            assert 0 <= field[1] < columns
            assert colour not in found.setdefault(field, {}), f"{field} is painted twice"
            found[field][colour] = opacity
    return found


def _fields(path: str) -> Iterator[Field]:
    assert RECTANGLE.sub("", path) == ""
    for found in RECTANGLE.finditer(path):
        x, y, width, height, back = map(int, found.groups())
        assert width == back
        yield from ((row, column) for row in range(y, y + height) for column in range(x, x + width))
