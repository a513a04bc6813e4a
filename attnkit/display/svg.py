"""A `Drawing` as SVG: `inline` for a page, which has its colours, and `document` as a file.

Fields that look alike are merged into rectangles, those of one look are one path, and a picture
that would still be long is drawn coarser: no picture is longer than `MOST_RECTANGLES` times a few
characters. Colours are laid over the background, so that one picture does for light and dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from attnkit.display.drawing import Drawing, Shares

__all__ = ["LEVELS", "MOST_RECTANGLES", "document", "file", "inline", "rectangles"]

LEVELS = 16
"""How many opacities are told apart; the first is a field of which next to nothing is coloured."""

MOST_RECTANGLES = 5_000
"""Rectangles of a picture, at most; of a finer one the fields are merged until there are fewer."""

_LONGEST_SIDE = 288
_LARGEST_FIELD = 18
_LEAST_SIDE = 14
_MOST_LINED = 32  # fields along a side between which lines are drawn

# A file is shown on a page that it knows nothing of: it brings its own background.
_STYLE = (
    "svg{color:#1f2933;font:12px system-ui,sans-serif}.plate{fill:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e4e7eb}.plate{fill:#171b21}}"
)

Rectangle = tuple[int, int, int, int]
"""Column, row, width and height, in fields."""


def inline(drawing: Drawing, side: int = _LONGEST_SIDE, most: int = MOST_RECTANGLES) -> str:
    """Return a picture as an element of a page, `side` pixels at its longer side at most.

    `most` are its rectangles.

    Its lines and its background have the colour of the text around it.

    >>> from attnkit.display import Drawing, Layer
    >>> inline(Drawing(1, 2, (Layer([[1, 0]], "#2f7ed8"),), "a <mask>"))[:64]
    '<svg xmlns="http://www.w3.org/2000/svg" width="36" height="18" v'
    """
    drawing = _small(drawing, most)
    width, height = _pixels(drawing, side)
    return _picture(drawing, f'width="{width}" height="{height}"')


def document(drawing: Drawing, side: int = 2 * _LONGEST_SIDE) -> str:
    """Return a picture as a file of its own, with its title, axes and legend.

    It is light or dark as the reader's system is, and has a background of its own.

    >>> from attnkit.display import Drawing, Layer
    >>> text = document(Drawing(1, 2, (Layer([[1, 0]], "#2f7ed8", "allowed"),), "a mask"))
    >>> "prefers-color-scheme" in text, "allowed" in text
    (True, True)
    """
    drawing = _small(drawing, MOST_RECTANGLES)
    width, height = _pixels(drawing, side)
    legend = drawing.legend
    words = [drawing.title, drawing.note, *(f"   {label}" for _, label in legend)]
    whole = max(width + 48, 40 + 7 * max(map(len, words)), 200)
    head = [text for text in (drawing.title, drawing.note) if text]
    top = 20 + 18 * len(head)
    parts = [_line(20, 24 + 18 * k, text, k == 0) for k, text in enumerate(head)]
    q_name, kv_name = drawing.axes
    parts.append(_line(36, top + 8, f"{kv_name} →"))
    turned = f'transform="translate(26 {top + 18}) rotate(90)"'
    parts.append(f'<text {turned} fill="currentColor">{escape(q_name)} →</text>')
    place = f'x="36" y="{top + 16}" width="{width}" height="{height}"'
    parts.append(_picture(drawing, place))
    below = top + height + 36
    for k, (tint, label) in enumerate(legend):
        y = below + 18 * k
        parts.append(f'<rect x="36" y="{y - 10}" width="12" height="12" fill="{tint}"/>')
        parts.append(_line(54, y, label))
    tall = below + 18 * len(legend)
    return file(whole, tall, "".join(parts))


def file(width: int, height: int, inside: str) -> str:
    """Return elements as a file of its own, light or dark, in which text has `currentColor`.

    >>> file(40, 20, "<circle r='9'/>").endswith("<circle r='9'/></svg>\\n")
    True
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{_STYLE}</style>'
        f'<rect class="plate" width="{width}" height="{height}" rx="6"/>{inside}</svg>\n'
    )


def rectangles(levels: Sequence[Sequence[int]]) -> Iterator[tuple[int, Rectangle]]:
    """Yield the rectangles that fields of one level form, with the level; those of 0 are left out.

    >>> list(rectangles([[1, 1, 0], [1, 1, 2]]))
    [(1, (0, 0, 2, 2)), (2, (2, 1, 1, 1))]
    """
    open_runs: dict[tuple[int, int, int], int] = {}  # (level, column, width): its first row
    for row in range(len(levels) + 1):
        runs = set(_runs(levels[row])) if row < len(levels) else set()
        for run in [run for run in open_runs if run not in runs]:
            level, column, width = run
            first = open_runs.pop(run)
            yield level, (column, first, width, row - first)
        for run in runs:
            open_runs.setdefault(run, row)


def _runs(row: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    column = 0
    for level, same in groupby(row):
        width = len(list(same))
        if level:
            yield level, column, width
        column += width


def _levels(shares: Shares) -> list[list[int]]:
    return [[_level(share) for share in row] for row in shares]


def _level(share: float) -> int:
    """Return how opaque a field is: all of it only where the whole field is coloured."""
    if not share > 0:
        return 0
    return LEVELS if share >= 1 else min(LEVELS - 1, max(1, round(LEVELS * share)))


def _small(drawing: Drawing, most: int) -> Drawing:
    """Return the drawing, or a coarser one that has few rectangles."""
    while sum(sum(1 for _ in rectangles(_levels(k.shares))) for k in drawing.layers) > most:
        drawing = drawing.coarser()
    return drawing


def _picture(drawing: Drawing, place: str) -> str:
    """Return the fields as an SVG element of a place and size."""
    rows, columns = drawing.fields
    told = escape(", ".join(filter(None, (drawing.title, drawing.note))))
    inside = [f'<rect width="{columns}" height="{rows}" fill="currentColor" fill-opacity=".07"/>']
    for layer in drawing.layers:
        inside += _paths(layer.shares, layer.colour)
    if 0 < max(rows, columns) <= _MOST_LINED:
        down = "".join(f"M{x} 0V{rows}" for x in range(columns + 1))
        right = "".join(f"M0 {y}H{columns}" for y in range(rows + 1))
        line = 'fill="none" stroke="currentColor" stroke-opacity=".2"'
        inside.append(f'<path class="grid" {line} stroke-width=".04" d="{down}{right}"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {place} viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none" role="img" aria-label="{told}">'
        f"<title>{told}</title>{''.join(inside)}</svg>"
    )


def _paths(shares: Shares, tint: str) -> Iterator[str]:
    """Yield a path for each opacity of a colour."""
    found: dict[int, list[Rectangle]] = {}
    for level, rectangle in rectangles(_levels(shares)):
        found.setdefault(level, []).append(rectangle)
    for level, each in sorted(found.items()):
        path = "".join(f"M{x} {y}h{w}v{h}h-{w}z" for x, y, w, h in sorted(each))
        opacity = "" if level == LEVELS else f' fill-opacity="{level / LEVELS:.3g}"'
        yield f'<path shape-rendering="crispEdges" fill="{tint}"{opacity} d="{path}"/>'


def _pixels(drawing: Drawing, side: int) -> tuple[int, int]:
    """Return width and height: fields as large as they may be, and as the matrix is shaped."""
    rows, columns = drawing.fields
    if not rows or not columns:
        return side // 3, side // 3
    longest = min(side, _LARGEST_FIELD * max(rows, columns))
    most = max(drawing.q_len, drawing.kv_len, 1)
    return tuple(  # type: ignore[return-value]
        max(_LEAST_SIDE, round(longest * size / most)) for size in (drawing.kv_len, drawing.q_len)
    )


def _line(x: int, y: int, text: str, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="currentColor"{weight}>{escape(text)}</text>'
