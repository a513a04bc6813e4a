"""Ways to part a region into gathered sequences such that every row is in one of them."""

from __future__ import annotations

from collections.abc import Iterator

from attnkit.geometry import Region
from attnkit.planner.grouping import Segment
from attnkit.planner.sequences import Block

__all__ = ["partitions"]


def partitions(region: Region, batch: int = 0) -> Iterator[tuple[Segment, ...]]:
    """Yield ways to part the rows of a region into sequences that have all of their keys."""
    classes: dict[tuple[range, ...], list[range]] = {}
    for i0, i1, runs in region.strips:
        if any(da or db for _, da, _, db in runs):
            return
        classes.setdefault(tuple(range(a, b) for a, _, b, _ in runs), []).append(range(i0, i1))
    yield tuple(Segment(Block(batch, tuple(rows), keys)) for keys, rows in classes.items())
