"""`Search`: what one search for calls finds on its way, and which ways it tries."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.planner.cuts import cuts
from attnkit.planner.grouping import Segment
from attnkit.planner.in_place import in_place
from attnkit.planner.staircases import partitions
from attnkit.progress import pulse

__all__ = ["Search"]

_MOST_CUTS = 8
_MOST_PARTITIONS = 4
_NOTHING = Region.empty()


@dataclass(eq=False)
class Search:
    """What one search finds on its way: its zones share it, and those for requests close by.

    `covers` are the sets of calls that are merged, by request and groups of heads. Keys are
    gathered from several places unless `gathers` says otherwise.
    """

    gathers: bool = True
    block_sparse: bool | Refusal = False
    """Whether calls of the block-sparse op are among the rivals, or why they are not."""

    cuts: dict[Region, tuple[tuple[Slice, ...], ...]] = field(default_factory=dict)
    partitions: dict[Region, tuple[tuple[Segment, ...], ...]] = field(default_factory=dict)
    covers: dict[Any, Any] = field(default_factory=dict)
    regions: dict[Any, Region] = field(default_factory=dict)

    def region(self, one: Segment | None) -> Region:
        """Return what a segment is to compute: those of a packed batch are alike."""
        if one is None:
            return _NOTHING
        shape = (one.block.sizes, one.lo, one.hi)
        if shape not in self.regions:
            self.regions[shape] = Region.of(one.target)
        return self.regions[shape]

    def all_partitions(
        self, region: Region, by_keys: bool = False
    ) -> tuple[tuple[Segment, ...], ...]:
        """Return the ways to part a region by rows, or by keys, the first few."""
        if by_keys:
            turned = self.all_partitions(region.transpose())
            return tuple(tuple(one.transposed for one in way) for way in turned)
        pulse()
        if region not in self.partitions:
            ways = list(islice(partitions(region), _MOST_PARTITIONS))
            ways = list(dict.fromkeys([*ways, *map(in_place, ways)]))
            # In the order of their rows, which may then be where the call has them.
            found = tuple(tuple(sorted(way, key=lambda one: one.block.ends)) for way in ways)
            self.partitions[region] = found if region else ((),)
        return self.partitions[region]

    def all_cuts(self, region: Region) -> tuple[tuple[Slice, ...], ...]:
        """Return the ways to cut a region, the first few."""
        pulse()
        if region not in self.cuts:
            self.cuts[region] = tuple(islice(cuts(region), _MOST_CUTS))
        return self.cuts[region]

    def cut(self, region: Region, depth: int) -> tuple[Slice, ...]:
        """Return a region cut in the `depth`-th way, or the last one, where it has fewer."""
        return self.all_cuts(region)[: depth + 1][-1]
