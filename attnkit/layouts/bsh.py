"""BSH: batch first, heads merged into the last axis, as a projection leaves them."""

from __future__ import annotations

from attnkit.layouts.base import Layout, register

BSH = register(Layout("BSH", "b s (n d)"))
