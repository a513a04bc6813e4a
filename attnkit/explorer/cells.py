"""Cells as numbers: strips of a region, and ranges of the rows and keys that these are of.

A page has no cell by itself. It has *patches*: some rows and keys of a score matrix, each in
ranges, and the region of those that are meant, counted in these rows and keys. Rows of strips are
found by bisection, so a page answers for any cell at once, and draws the rows that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from attnkit.geometry import Region
from attnkit.ranges import Ranges

__all__ = ["CellPatch", "Ends", "RegionTable", "cost", "plain"]

Ends = list[int]
"""Ranges one after the other: start, stop and step of each."""


class CellPatch(NamedTuple):
    """Cells of one score matrix: ``(rows[u], keys[v])`` for ``(u, v)`` of a region.

    `number` is that of the sequence of its call; `heads` are the query heads that have it. Of a
    mask whose cells nobody knows, it is not `sure`: these are the cells that it may allow.
    """

    number: int
    batch: int
    heads: range
    rows: Ranges
    keys: Ranges
    region: Region
    sure: bool = True


class RegionTable:
    """Regions by number, those with the same cells once.

    >>> known = RegionTable()
    >>> known.number(Region.full(2, 3)), known.number(Region.full(2, 3)), known.strips
    (0, 0, [[[0, 2, 0, 0, 3, 0]]])
    """

    def __init__(self) -> None:
        self.strips: list[list[list[int]]] = []
        self._numbers: dict[Region, int] = {}

    def number(self, region: Region) -> int:
        """Return the number of a region; one that is new gets the next."""
        if region not in self._numbers:
            self._numbers[region] = len(self.strips)
            self.strips.append([[i0, i1, *sum(runs, ())] for i0, i1, runs in region.strips])
        return self._numbers[region]

    def plain(self, patch: CellPatch) -> list[object]:
        """Return a patch as data: number, batch, heads, rows, keys, region, whether it is sure."""
        return [
            patch.number,
            patch.batch,
            patch.heads.start,
            patch.heads.stop,
            plain(patch.rows),
            plain(patch.keys),
            self.number(patch.region),
            int(patch.sure),
        ]


def plain(ranges: Iterable[range]) -> Ends:
    """Return ranges as data.

    >>> plain([range(4), range(9, 6, -1)])
    [0, 4, 1, 9, 6, -1]
    """
    return [end for one in ranges for end in (one.start, one.stop, one.step)]


def cost(patches: Iterable[CellPatch], seen: set[Region]) -> int:
    """Return how many numbers patches are, and add their regions to those `seen`, which are there.

    >>> patch = CellPatch(0, 0, range(1), (range(2),), (range(3),), Region.full(2, 3))
    >>> seen = set()
    >>> cost([patch], seen), cost([patch], seen)
    (18, 12)
    """
    count = 0
    for patch in patches:
        count += 6 + 3 * (len(patch.rows) + len(patch.keys))
        if patch.region not in seen:
            seen.add(patch.region)
            count += sum(2 + 4 * len(runs) for _, _, runs in patch.region.strips)
    return count
