"""Masks: exact sets of allowed (query, key) cells, as values."""

from attnkit.masks.algebra import And, Not, Or
from attnkit.masks.base import MASKS, Align, Enclosure, Full, Mask, Rectangle
from attnkit.masks.block_table import Blocks
from attnkit.masks.blocks import BlockCausal, Chunked
from attnkit.masks.causal import Band, Causal, SlidingWindow
from attnkit.masks.cut import Cut
from attnkit.masks.dense import Dense
from attnkit.masks.diff import Difference, diff
from attnkit.masks.dilated import Dilated
from attnkit.masks.documents import Documents
from attnkit.masks.finding import Finding
from attnkit.masks.foreign import (
    Lifted,
    from_cu_seqlens,
    from_flashmask,
    from_flex,
    from_magi,
    from_torch,
    from_transformers,
    from_xformers,
)
from attnkit.masks.keys import Keys
from attnkit.masks.neighborhood import Neighborhood
from attnkit.masks.of_heads import OfHeads
from attnkit.masks.order import Order
from attnkit.masks.padding import Padding
from attnkit.masks.parse import parse
from attnkit.masks.per_head import PerBatch, PerHead
from attnkit.masks.placed import Placed
from attnkit.masks.predicate import Predicate
from attnkit.masks.recover import Recovered, recover
from attnkit.masks.rectangles import Columns, Prefix, PrefixLM, Rows
from attnkit.masks.same_id import SameId
from attnkit.masks.selected import SelectedBlocks
from attnkit.masks.slices import Slices
from attnkit.masks.spans import Spans, from_token_types
from attnkit.masks.stack import StackReport, lint_stack
from attnkit.masks.taken import Taken
from attnkit.masks.tiles import ShiftedWindows, SlidingTiles
from attnkit.masks.tree import Tree

register = MASKS.register

__all__ = [
    "MASKS",
    "Align",
    "And",
    "Band",
    "BlockCausal",
    "Blocks",
    "Causal",
    "Chunked",
    "Columns",
    "Cut",
    "Dense",
    "Difference",
    "Dilated",
    "Documents",
    "Enclosure",
    "Finding",
    "Full",
    "Keys",
    "Lifted",
    "Mask",
    "Neighborhood",
    "Not",
    "OfHeads",
    "Or",
    "Order",
    "Padding",
    "PerBatch",
    "PerHead",
    "Placed",
    "Predicate",
    "Prefix",
    "PrefixLM",
    "Recovered",
    "Rectangle",
    "Rows",
    "SameId",
    "SelectedBlocks",
    "ShiftedWindows",
    "Slices",
    "SlidingTiles",
    "SlidingWindow",
    "Spans",
    "StackReport",
    "Taken",
    "Tree",
    "diff",
    "from_cu_seqlens",
    "from_flashmask",
    "from_flex",
    "from_magi",
    "from_token_types",
    "from_torch",
    "from_transformers",
    "from_xformers",
    "lint_stack",
    "parse",
    "recover",
    "register",
]
