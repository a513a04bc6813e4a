"""Fragments of the small pages that notebooks show: headings, tables, what is folded away.

Text has the colour of the page around it. Everything that is given as text is escaped; what is
markup already is made here or in `display.svg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from attnkit.display.drawing import Drawing
from attnkit.display.svg import inline

__all__ = [
    "LONGEST",
    "block",
    "code",
    "folded",
    "heading",
    "lines",
    "note",
    "picture",
    "pictures",
    "preformatted",
    "safely",
    "swatch",
    "table",
]

LONGEST = 180_000
"""Characters of a page, at most; a longer one is replaced by words."""

_MOST_TEXT = 20_000
_MOST_OF_SEVERAL = 1_200  # rectangles of each of several pictures


def block(*parts: str) -> str:
    """Return parts below each other, as what a notebook shows of one object.

    >>> block(heading("Causal()"))
    '<div class="attnkit" style="max-width:60em"><p><b>Causal()</b></p></div>'
    """
    return f'<div class="attnkit" style="max-width:60em">{"".join(parts)}</div>'


def heading(name: str, told: str = "") -> str:
    """Return the first line: what it is in bold, and a word on it.

    >>> heading("a <mask>", "of 2 parts")
    '<p><b>a &lt;mask&gt;</b> of 2 parts</p>'
    """
    return f"<p><b>{escape(_short(name))}</b>{f' {escape(_short(told))}' if told else ''}</p>"


def note(told: str) -> str:
    """Return a line in small letters.

    >>> note("no picture")
    '<p style="font-size:smaller;opacity:.8;margin:.3em 0">no picture</p>'
    """
    return f'<p style="font-size:smaller;opacity:.8;margin:.3em 0">{escape(_short(told))}</p>'


def code(text: str) -> str:
    """Return text as code.

    >>> code("a < b")
    '<code>a &lt; b</code>'
    """
    return f"<code>{escape(_short(text))}</code>"


def preformatted(text: str) -> str:
    """Return lines as they are.

    >>> preformatted("a < b").endswith(">a &lt; b</pre>")
    True
    """
    return lines(escape(text))


def lines(markup: str) -> str:
    """Return lines that are markup already, blanks kept.

    >>> lines("<b>a</b>  b").endswith("><b>a</b>  b</pre>")
    True
    """
    font = "font-family:var(--jp-code-font-family,monospace);line-height:1.3"
    return f'<pre style="white-space:pre-wrap;margin:0;{font}">{markup}</pre>'


def folded(summary: str, body: str) -> str:
    """Return markup that is shown when somebody asks for it; nothing where there is none.

    >>> folded("2 refusals", "<p>why</p>")
    '<details><summary>2 refusals</summary><p>why</p></details>'
    """
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), most: int = 40) -> str:
    """Return a table of the first rows; without a head the first column names what follows.

    Nothing where there are no rows.

    Cells are markup: `code`, `picture`, or text that was escaped.

    >>> table([("mask", code("Causal()"))])
    '<table><tbody><tr><th style="text-align:left;vertical-align:top">mask</th>\
<td style="text-align:left"><code>Causal()</code></td></tr></tbody></table>'
    """
    left = 'style="text-align:left"'
    first = "td " if head else "th "
    top = 'style="text-align:left;vertical-align:top"'
    rows = list(rows)
    body = "".join(
        f"<tr><{first}{top}>{row[0]}</{first.strip()}>"
        + "".join(f"<td {left}>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[:most]
    )
    if not body:
        return ""
    titles = "".join(f"<th {left}>{escape(title)}</th>" for title in head)
    above = f"<thead><tr>{titles}</tr></thead>" if head else ""
    more = len(rows) - most
    return f"<table>{above}<tbody>{body}</tbody></table>" + note(f"and {more:,} more") * (more > 0)


def picture(drawing: Drawing, side: int = 288) -> str:
    """Return a picture with its legend and, in small letters, what it measures.

    >>> from attnkit.display import Layer
    >>> "8 cells" in picture(Drawing(1, 1, (Layer([[1]], "#2f7ed8"),), "a mask", "8 cells"))
    True
    """
    each = (
        f'<span style="white-space:nowrap;margin-right:1em">'
        f"{swatch(tint)}{escape(_short(label))}</span> "
        for tint, label in drawing.legend
    )
    legend = f'<p style="font-size:smaller;margin:.3em 0">{"".join(each)}</p>'
    words = note(drawing.note) if drawing.note else ""
    return f"{inline(drawing, side)}{legend if drawing.legend else ''}{words}"


def swatch(colour: str) -> str:
    """Return a small square of a colour.

    >>> "#2f7ed8" in swatch("#2f7ed8")
    True
    """
    square = "display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 0"
    return f'<span style="{square};background:{colour}"></span>'


def pictures(drawings: Iterable[Drawing], side: int = 160) -> str:
    """Return several pictures beside each other, each above its title.

    >>> from attnkit.display import Layer
    >>> pictures([Drawing(1, 1, (Layer([[1]], "#2f7ed8"),), "head 0")]).count("head 0")
    3
    """
    cells = (
        f'<div style="display:inline-block;vertical-align:top;margin:0 1em .5em 0;width:{side}px">'
        f"{inline(drawing, side, _MOST_OF_SEVERAL)}{note(drawing.title)}</div>"
        for drawing in drawings
    )
    return "".join(cells)


def safely(build: Callable[[], str], otherwise: Callable[[], str]) -> str:
    """Return a page; where it cannot be had, or is too long, what is there instead and why.

    Whatever an object's own code or a user's function raises, a notebook shows something.

    >>> found = safely(lambda: str(1 / 0), lambda: "SlidingWindow(4)")
    >>> "<code>SlidingWindow(4)</code>" in found, "ZeroDivisionError" in found
    (True, True)
    """
    try:
        found = build()
        if len(found) <= LONGEST:
            return found
        why = f"it would have {len(found):,} characters, and {LONGEST:,} are shown at most"
    except Exception as error:  # a display is the last place where an error helps
        why = f"{type(error).__name__}: {_said(error.__str__)}"
    return block(f"<p>{code(_said(otherwise))}</p>", note(f"no picture: {why}"))


def _said(say: Callable[[], str]) -> str:
    try:
        return say()
    except Exception as error:
        return f"(it cannot be told: {type(error).__name__})"


def _short(text: str) -> str:
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]} ... ({len(text):,} characters)"
