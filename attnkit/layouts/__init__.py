"""Layouts: how the axes of query, key and value lie in memory, one einops pattern each.

>>> from attnkit import layouts
>>> layouts.get("BSH").pattern
'b s (n d)'
>>> [name for name in layouts.LAYOUTS if layouts.get(name).packed]
['TND']
"""

from __future__ import annotations

from attnkit.layouts.base import Layout, register
from attnkit.layouts.names import LAYOUTS, Sizes, get
from attnkit.layouts.seqlens import SeqLens, as_seqlens, check_lengths

__all__ = [
    "BNSD",
    "BSH",
    "BSND",
    "LAYOUTS",
    "SBH",
    "TND",
    "Layout",
    "SeqLens",
    "Sizes",
    "as_seqlens",
    "check_lengths",
    "get",
    "register",
]

BNSD = register(Layout("BNSD", "b n s d", ("BHSD", "BNTH")))
BSH = register(Layout("BSH", "b s (n d)"))
BSND = register(Layout("BSND", "b s n d", ("BSHD", "BTNH", "BMHK")))
SBH = register(Layout("SBH", "s b (n d)"))
TND = register(Layout("TND", "t n d", ("THD",)))
