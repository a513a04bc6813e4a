"""SBH: sequence first, heads merged into the last axis (Megatron's form)."""

from __future__ import annotations

from attnkit.layouts.base import Layout, register

SBH = register(Layout("SBH", "s b (n d)"))
