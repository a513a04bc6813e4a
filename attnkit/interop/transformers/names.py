"""The names under which transformers knows attnkit, and what the code of a class mentions."""

from __future__ import annotations

from inspect import unwrap

__all__ = ["NAME", "PACKED", "says"]

NAME = "attnkit"
"""The name to give as ``attn_implementation``."""

PACKED = "attnkit_flash"
"""The name inside of vision towers, which pass packed sequences only to names with "flash"."""


def says(kind: type, name: str) -> bool:
    """Whether the code of a class uses a name, or passes a keyword of that name.

    >>> class Model:
    ...     def forward(self, x):
    ...         return self.attend(x, window=3)
    >>> says(Model, "attend"), says(Model, "window"), says(Model, "other")
    (True, True, False)
    """
    return any(name in _words(base) for base in kind.__mro__)


def _words(kind: type) -> set[str]:
    """Return the names that the methods of a class use, those of keywords among them."""
    found: set[str] = set()
    for method in vars(kind).values():
        code = getattr(unwrap(method) if callable(method) else method, "__code__", None)
        if code is None:
            continue
        found.update(code.co_names)
        for each in code.co_consts:
            if isinstance(each, tuple):
                found.update(one for one in each if isinstance(one, str))
    return found
