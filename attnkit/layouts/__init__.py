"""Layouts: how the axes of query, key and value lie in memory, one einops pattern each.

>>> from attnkit import layouts
>>> layouts.get("BSH").pattern
'b s (n d)'
>>> [name for name in layouts.LAYOUTS if layouts.get(name).packed]
['TND']
"""

from __future__ import annotations

from attnkit.layouts.base import LAYOUTS, Layout, Sizes, get, register
from attnkit.layouts.bnsd import BNSD
from attnkit.layouts.bsh import BSH
from attnkit.layouts.bsnd import BSND
from attnkit.layouts.sbh import SBH
from attnkit.layouts.seqlens import SeqLens, check_lengths
from attnkit.layouts.tnd import TND

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
    "check_lengths",
    "get",
    "register",
]
