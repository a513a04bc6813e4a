"""`Slices`: a region held literally, as the value of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from attnkit.arguments import check_int, describe
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Mask

__all__ = ["Slices", "is_list"]

Bounds = tuple[int, int, int, int, int, int]
BoundsLists = tuple[Bounds, ...] | tuple[tuple[Bounds, ...], ...]

if TYPE_CHECKING:
    BoundsLike = Sequence[int | None]
    BoundsListsLike = Sequence[BoundsLike] | Sequence[Sequence[BoundsLike]]


@MASKS.register("slices")
@dataclass(frozen=True, repr=False, eq=False)
class Slices(Mask):
    """The union of slices ``(i0, i1, j0, j1, lo, hi)``, for one pair of lengths.

    A slice is ``{(i, j): i0 <= i < i1, j0 <= j < j1, lo <= j - i <= hi}``; slices may overlap and
    come in any order, and are kept in one canonical form, so that two `Slices` with the same
    cells are equal. One tuple of slices serves every batch element, a tuple of such tuples
    gives each its own. This is what `masks.recover` answers for a region that has no name.

    >>> mask = Slices([(0, 4, 0, 4, -3, 0), (0, 1, 3, 4, 3, 3)], 4, 4)
    >>> print(mask.show(4, 4))
    #..#
    ##..
    ###.
    ####
    >>> Slices.of(Region.full(2, 2), 2, 2)
    Slices(((0, 2, 0, 2, -1, 1),), 2, 2)
    """

    slices: BoundsLists
    q_len: int
    kv_len: int

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, slices: BoundsListsLike, q_len: int, kv_len: int) -> None: ...

    def __post_init__(self) -> None:
        check_int("Slices q_len", self.q_len, 0)
        check_int("Slices kv_len", self.kv_len, 0)
        if not isinstance(self.slices, tuple | list):
            raise CompositionTypeError(
                f"Slices takes a list of slices (i0, i1, j0, j1, lo, hi), got "
                f"{describe(self.slices)}"
            )
        many = any(is_list(entry) for entry in self.slices)
        lists = self.slices if many else [self.slices]
        regions = [_union(one, self.q_len, self.kv_len) for one in lists]
        kept = tuple(_bounds_of(region) for region in regions)
        object.__setattr__(self, "slices", kept if many else kept[0])

    @classmethod
    def of(cls, region: Region | Sequence[Region], q_len: int, kv_len: int) -> Slices:
        """Hold a region, or one region for each batch element."""
        if isinstance(region, Region):
            return cls(_bounds_of(region), q_len, kv_len)
        if not isinstance(region, Sequence) or not all(isinstance(r, Region) for r in region):
            raise CompositionTypeError(
                f"Slices.of takes a Region, or a list of one for each batch element, got "
                f"{describe(region)}"
            )
        return cls(tuple(_bounds_of(one) for one in region), q_len, kv_len)

    @cached_property
    def _regions(self) -> tuple[Region, ...]:
        lists = self.slices if self.batches is not None else (self.slices,)
        return tuple(_union(one, self.q_len, self.kv_len) for one in lists)

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        region = self._regions[batch if self.batches is not None else 0]
        # A cut may ask for fewer rows or keys than there are.
        return region if region.fits(q_len, kv_len) else region & Region.full(q_len, kv_len)

    @property
    def batches(self) -> int | None:
        """One list of slices per batch element, where they differ."""
        many = bool(self.slices) and is_list(self.slices[0])
        return len(self.slices) if many else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths that were said."""
        return self.q_len, self.kv_len


def is_list(entry: object) -> bool:
    """Whether an entry of a list of slices, or of spans, is such a list for a batch element."""
    return isinstance(entry, tuple | list) and (
        not entry or isinstance(entry[0], tuple | list | Slice)
    )


def _union(slices: object, q_len: int, kv_len: int) -> Region:
    if not isinstance(slices, tuple | list):
        raise CompositionTypeError(
            f"Slices got {describe(slices)} beside lists of slices; give every batch element its "
            "list of slices (i0, i1, j0, j1, lo, hi), or one list for all"
        )
    parts = []
    for bounds in slices:
        if not isinstance(bounds, tuple | list) or len(bounds) != 6:
            raise CompositionTypeError(
                f"Slices got {describe(bounds)}; a slice is (i0, i1, j0, j1, lo, hi): rows, keys, "
                "and the least and greatest j - i"
            )
        if any(type(end) is int and end < 0 for end in bounds[:4]):
            raise CompositionError(
                f"Slices got {shown(tuple(bounds))}; rows and keys count from the first one, so "
                "i0, i1, j0 and j1 are 0 or more (from the end: q_len - 2 for -2)"
            )
        parts.append(Slice(*bounds))
    region = Region.of(*parts)
    if not region.fits(q_len, kv_len):
        raise CompositionError(
            f"Slices got cells outside of the {q_len} x {kv_len} score matrix: {shown(region)}; "
            "bound the slices by q_len and kv_len"
        )
    return region


def _bounds_of(region: Region) -> tuple[Bounds, ...]:
    return tuple((s.i0, s.i1, s.j0, s.j1, s.lo, s.hi) for s in region.slices)
