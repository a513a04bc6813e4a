"""Where the reference has the entry of a name: what its pages list, found by how people say it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

__all__ = ["entries", "entry_of"]

REFERENCE = Path(__file__).parents[1] / "reference"

_ENTRY = re.compile(r"^(?:::: ([\w.]+)|\[\]\(\)\{ #([\w.]+) \})$", re.M)


@cache
def entries() -> tuple[str, ...]:
    """Return the names that the pages of the reference have, in full.

    >>> "attnkit.masks.Causal" in entries()
    True
    """
    pages = sorted(REFERENCE.glob("*.md"))
    found = [_ENTRY.findall(page.read_text(encoding="utf-8")) for page in pages]
    return tuple(dict.fromkeys(one or other for page in found for one, other in page))


def entry_of(name: str, near: str = "attnkit") -> str | None:
    """Return the full name of what a page or the docstring of `near` calls `name`, if it is one.

    A class is found by its name alone; a function or a constant by a name with its package, or
    from within that. What could be two is none, but for the one of the own package.

    >>> entry_of("masks.Causal"), entry_of("Causal"), entry_of("ak.plan")
    ('attnkit.masks.Causal', 'attnkit.masks.Causal', 'attnkit.plan')
    >>> entry_of("Dense"), entry_of("Dense", near="attnkit.pse.table")
    (None, 'attnkit.pse.Dense')
    >>> entry_of("parse"), entry_of("parse", near="attnkit.masks.base")
    (None, 'attnkit.masks.parse')
    """
    name = re.sub(r"\(\)$", "", re.sub(r"^ak\.", "attnkit.", name))
    found = [entry for entry in entries() if f".{entry}".endswith(f".{name}")]
    packages = {entry: entry.removesuffix(f".{name}") for entry in found}
    beside = [
        entry for entry in found if "." in packages[entry] and near.startswith(packages[entry])
    ]
    if beside:
        return max(beside, key=len)
    if "." not in name and not name[:1].isupper():
        return None
    exact = [entry for entry in found if entry in (name, f"attnkit.{name}")]
    return exact[0] if exact else found[0] if len(found) == 1 else None
