"""`Text`: lines for people, as `explain()`, `show()` and reports return them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from attnkit.display import html

if TYPE_CHECKING:
    from rich.text import Text as RichText

__all__ = ["Text", "Told"]

_FOLDED = ("refused", "passed over")
_CODE = re.compile(r"\[[a-z0-9]+(?:-[a-z0-9]+)*\]$")


class Text(str):
    """Lines that show themselves: at a prompt, in a notebook, in a terminal with rich.

    It is a string in every other way: it compares, hashes, prints, slices and pickles as one. Its
    repr is the text itself, so that what stands alone at a prompt is read as it is printed.

    >>> Text("mask  Causal()\\ncells 6")
    mask  Causal()
    cells 6
    >>> Text("a") == "a", type(Text("ab")[:1]).__name__
    (True, 'str')
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return the lines for a notebook: labels in bold, refusals folded away."""
        return html.safely(self._page, lambda: str(self)[:2000])

    def _page(self) -> str:
        lines = str(self).split("\n")
        parts = []
        for label, some in groupby(_labelled(lines), key=lambda one: _fold(one[0])):
            own = [line for _, line in some]
            text = "\n".join(map(_bold, own))
            shown = html.lines(text)
            count = sum(1 for line in own if _CODE.search(line))
            parts.append(html.folded(f"{label} ({count})", shown) if label else shown)
        return html.block(*parts)

    def __rich__(self) -> RichText:
        """Return the lines for rich, which asks for it: labels in bold, refusals dimmed."""
        from rich.text import Text as RichText

        styled = RichText(str(self))
        at = 0
        for label, line in _labelled(str(self).split("\n")):
            styled.stylize("bold cyan", at + 2, at + 2 + len(_entry(line)))
            if _fold(label):
                styled.stylize("dim", at, at + len(line))
            at += len(line) + 1
        return styled


def _labelled(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each line with the label of the entry that it is in."""
    label = ""
    for line in lines:
        if _entry(line) or not line.startswith("    "):
            label = _entry(line)
        yield label, line


def _entry(line: str) -> str:
    """Return the label with which a report's entry begins: after two blanks, in twelve columns."""
    label = line[2:14].rstrip()
    begins = line[:2] == "  " and line[2:3].strip() and line[13:14] == " " and line[14:15].strip()
    return label if begins and "  " not in label else ""


def _fold(label: str) -> str:
    return label if label in _FOLDED else ""


def _bold(line: str) -> str:
    label = _entry(line)
    if not label:
        return escape(line)
    return f"  <b>{escape(label)}</b>{escape(line[2 + len(label) :])}"


class Told:
    """What shows its `str` in a notebook.

    >>> class Report(Told):
    ...     def __str__(self):
    ...         return "2 modules\\n  refused     mode 0: too long [mask-size]"
    >>> "<summary>refused (1)</summary>" in Report()._repr_html_()
    True
    """

    __slots__ = ()

    def _repr_html_(self) -> str:
        """Return its text for a notebook."""
        return html.safely(lambda: Text(self)._repr_html_(), lambda: repr(self))
