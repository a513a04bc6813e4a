"""Sequences whose rows stay in place: then no query is copied, and no row is written elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from attnkit.planner.grouping import Segment
from attnkit.planner.sequences import Block
from attnkit.ranges import Ranges

__all__ = ["in_place"]


def in_place(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Return segments cut where their rows leave off, so that these are side by side.

    Each of the pieces gathers its keys. Where that would be more keys than there are rows, it
    costs more than it spares, and the segments stay as they are.

    >>> both = Segment(Block(0, (range(0, 2), range(4, 6)), (range(3),)))
    >>> [one.block.rows for one in in_place([both])]
    [(range(0, 2),), (range(4, 6),)]
    """
    pieces = [piece for one in segments for piece in _pieces(one)]
    more = sum(one.keys for one in pieces) - sum(one.keys for one in segments)
    if more > sum(one.rows for one in segments):
        return tuple(segments)
    return tuple(sorted(pieces, key=lambda one: (one.block.batch, one.block.ends)))


def _pieces(one: Segment) -> list[Segment]:
    if len(one.block.rows) == 1:
        return [one]
    ends = accumulate(map(len, one.block.rows), initial=0)
    return [_cut(one, *rows) for rows in pairwise(ends)]


def _cut(one: Segment, start: int, stop: int) -> Segment:
    """Return some rows of a segment alone, with the keys that its band has for them."""
    first = 0 if one.lo is None else max(0, start + one.lo)
    last = one.keys if one.hi is None else min(one.keys, stop + one.hi)
    rows, keys = stop - start, last - first
    lo, hi = (None if end is None else end + start - first for end in (one.lo, one.hi))
    lo = None if lo is None or lo <= 1 - rows else lo
    hi = None if hi is None or hi >= keys - 1 else hi
    own = _part(one.block.rows, start, stop), _part(one.block.keys, first, last)
    return Segment(Block(one.block.batch, *own), lo, hi)


def _part(ranges: Ranges, start: int, stop: int) -> Ranges:
    """Return the positions from one place to another in the order of some ranges."""
    places = pairwise(accumulate(map(len, ranges), initial=0))
    own = (
        some[max(start - first, 0) : max(stop - first, 0)]
        for some, (first, _) in zip(ranges, places, strict=True)
    )
    return tuple(filter(None, own))
