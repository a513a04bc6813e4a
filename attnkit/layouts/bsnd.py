"""BSND: batch first, heads and their dimension as two axes."""

from __future__ import annotations

from attnkit.layouts.base import Layout, register

BSND = register(Layout("BSND", "b s n d"))
