"""Small score matrices side by side whose masks differ: one lane, where each had its own.

The windows of an image are hundreds of small matrices, and those at its borders are masked. A
lane for every stretch of equal ones would be little work and many operators. So each batch
element gets its own pattern, until the masks begin again, which is the next image.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnkit.backends.tiled.columns import pattern_of
from attnkit.backends.tiled.items import SMALL, STEP_CELLS, Traits
from attnkit.backends.tiled.schedule import KeyChunk, Lane, Patch, Pattern, RowBlock, Whole
from attnkit.geometry import Region
from attnkit.planner import Request
from attnkit.strips import seen_spans

__all__ = ["stacks"]

# The patterns of a lane are kept as numbers: so many of them at most.
MOST_CELLS = 4 * 1024 * 1024


def stacks(lanes: Sequence[Lane], request: Request, traits: Traits) -> list[Lane]:
    """Return the lanes that take the place of these, if they are cheaper; else none."""
    q_len, kv_len = request.q_len, request.kv_len
    alone = request.seqlens is not None or request.score_fn is not None
    if alone or len(lanes) < 3 or len(request.matrices.planes) > 1:
        return []
    if any(lane.opaque or lane.strays or lane.blank for lane in lanes):
        return []
    if not 0 < q_len <= SMALL or not 0 < kv_len <= SMALL:
        return []
    regions = request.matrices.regions()
    period = _period(regions)
    cells = period * q_len * kv_len * (request.num_heads if request.bias else 1)
    spans = (seen_spans(region.strips) for region in set(regions))
    if cells > MOST_CELLS or any(found != [(0, kv_len)] for found in spans):
        return []
    if not _pays(lanes, request, period):
        return []
    pattern = _stack([_pattern(region, q_len, kv_len) for region in regions[:period]])
    heads, every = (0, request.num_heads), (0, request.batch)
    if traits.wholes and traits.patterns:  # torch's kernel takes all of them at once
        item = Whole(0, q_len, 0, kv_len, pattern=pattern)
        return [Lane(every, heads, 0, (0, 0), (q_len, kv_len), (item,))]
    chunk = KeyChunk(((0, kv_len, 0),), kv_len, (Patch(0, pattern),), False)
    block = RowBlock(0, q_len, 1, 0, (chunk,))
    return [
        Lane((first, first + period), heads, first, (0, 0), (q_len, kv_len), (block,))
        for first in range(*every, period)
    ]


def _period(regions: Sequence[Region]) -> int:
    """Return after how many batch elements the masks begin again: all of them at most."""
    count = len(regions)
    return next(
        n
        for n in range(1, count + 1)
        if count % n == 0 and all(regions[k] == regions[k - n] for k in range(n, count))
    )


def _pays(lanes: Sequence[Lane], request: Request, period: int) -> bool:
    """Whether fewer steps are worth more than the cells that some of the masks leave out."""
    steps = sum(len(lane.items) for lane in lanes) - request.batch // period
    cells = sum(
        (lane.batches[1] - lane.batches[0]) * item.cells * item.times
        for lane in lanes
        for item in lane.items
    )
    more = request.batch * request.q_len * request.kv_len - cells
    return more * request.num_heads < steps * STEP_CELLS


def _pattern(region: Region, q_len: int, kv_len: int) -> Pattern:
    pieces = [(i0, i1 - i0, runs) for i0, i1, runs in region.strips]
    return pattern_of(pieces, q_len, 0, kv_len)


def _stack(patterns: Sequence[Pattern]) -> Pattern:
    first, *others = patterns
    return first._replace(others=tuple(others))
