"""How docstrings become pages: doctests become blocks of code, names in backticks become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["Docstrings", "as_markdown"]


class Docstrings(griffe.Extension):
    """Rewrites each docstring of the package as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with each run of doctest paragraphs in a fence.

    >>> print(as_markdown("Adds.\\n\\n>>> 1 + 1\\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    parts: list[str] = []
    for paragraph in paragraphs:
        if not paragraph.lstrip().startswith(">>>"):
            parts.append(paragraph)
        elif parts and parts[-1].startswith("```pycon"):
            parts[-1] = f"{parts[-1][:-4]}\n\n{paragraph}\n```"
        else:
            parts.append(f"```pycon\n{paragraph}\n```")
    return "\n\n".join(parts)
