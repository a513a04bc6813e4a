"""From data to one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

from attnkit.display import COLOURS
from attnkit.errors import CompositionTypeError, shown

__all__ = ["save", "write"]

# In one script, in this order: each uses what stands before it.
_SCRIPTS = ("cells.js", "model.js", "paint.js", "canvas.js", "page.js")

# What would end the data's element, or a line of a script.
_ESCAPED = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def write(data: Mapping[str, Any]) -> str:
    """Return the page of some data, whose `title` is text and whose rest the scripts read.

    Nothing of the data is HTML or code. The page's own script and style are named by their hashes,
    and a browser runs no others.

    >>> page = write({"title": "<b>", "views": []})
    >>> "<b>" in page, "&lt;b&gt;" in page, "://" in page
    (False, True, False)
    """
    style = _asset("page.css")
    script = "".join(map(_asset, _SCRIPTS)).replace("COLOURS_OF_ALL_PICTURES", json.dumps(COLOURS))
    return Template(_asset("page.html")).substitute(
        title=html.escape(str(data["title"])),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=json.dumps(data, separators=(",", ":")).translate(_ESCAPED),
    )


def save(data: Mapping[str, Any], path: str | PathLike[str]) -> Path:
    """Write the page of some data to a file, and return its path.

    Raises `CompositionTypeError` for what is no path, and `OSError` for a file that cannot be
    written.
    """
    if not isinstance(path, str | PathLike):
        raise CompositionTypeError(
            f"to_html() got path={shown(path)}; give the name of the file to write, "
            "such as 'plan.html'"
        )
    written = Path(path)
    written.write_text(write(data), encoding="utf-8")
    return written


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
