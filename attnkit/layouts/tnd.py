"""TND: sequences packed along one token axis; `SeqLens` says where each one ends."""

from __future__ import annotations

from attnkit.layouts.base import Layout, register

TND = register(Layout("TND", "t n d"))
