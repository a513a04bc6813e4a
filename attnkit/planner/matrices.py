"""The score matrices of a request as regions, equal ones shared: `Request.matrices`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from attnkit.geometry import Region
from attnkit.masks import Enclosure, Mask

__all__ = ["Matrices"]


@dataclass(frozen=True)
class Matrices:
    """What the mask allows: one enclosure per batch element (or packed sequence) and head group.

    `planes[h][b]` belongs to head group h; there is one group unless heads differ.
    """

    planes: tuple[tuple[Enclosure, ...], ...]

    @cached_property
    def exact(self) -> bool:
        """Whether every score matrix is a region."""
        return all(e.exact for e in self._distinct)

    @property
    def per_head(self) -> bool:
        """Whether heads differ."""
        return len(self.planes) > 1

    @property
    def allow_any(self) -> bool:
        """Whether some cell may be allowed."""
        return any(known.outer for known in self._distinct)

    @property
    def _distinct(self) -> Iterator[Enclosure]:
        """The enclosures, those that are one object once: equal ones are shared."""
        return iter({id(e): e for plane in self.planes for e in plane}.values())

    def regions(self, head: int = 0) -> tuple[Region, ...]:
        """Return the outer bounds: the regions themselves where the matrices are exact."""
        plane = self.planes[head if self.per_head else 0]
        return tuple(e.outer for e in plane)

    def over_heads(self) -> tuple[Region, ...]:
        """Return regions that hold what any head allows."""
        columns = zip(*(self.regions(head) for head in range(len(self.planes))), strict=True)
        return tuple(Region.union(set(column)) for column in columns)

    @classmethod
    def of(cls, mask: Mask, sequences: Sequence[tuple[int, int]]) -> Matrices:
        """Return what a mask allows; matrices of equal size and mask are shared."""
        known: dict[tuple[int, int, int, int], Enclosure] = {}

        def one(b: int, head: int) -> Enclosure:
            key = (*sequences[b], b if mask.batches is not None else 0, head)
            if key not in known:
                known[key] = mask.enclosure(*key)
            return known[key]

        heads = range(mask.heads or 1)
        if mask.batches is not None and sequences and len(set(sequences)) == 1:
            each = [mask.enclosures(*sequences[0], len(sequences), head) for head in heads]
            planes = [tuple(found) for found in each]
        else:
            planes = [tuple(one(b, head) for b in range(len(sequences))) for head in heads]
        return cls(tuple(planes[:1] if all(plane == planes[0] for plane in planes) else planes))
