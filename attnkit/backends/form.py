"""A layout by its name, seen as ``[b n s d]``: its `view`, and back by `restore`."""

from __future__ import annotations

from attnkit.layouts import Layout as Form
from attnkit.layouts import get as form

__all__ = ["Form", "form"]
