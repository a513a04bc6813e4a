"""BNSD: heads outside the sequence, the form torch's own attention takes."""

from __future__ import annotations

from attnkit.layouts.base import Layout, register

BNSD = register(Layout("BNSD", "b n s d"))
