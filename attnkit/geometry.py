"""Exact sets of (query, key) cells: `Slice` and `Region`. Knows nothing of torch.

A `Slice` is a rectangle of the score matrix cut by a diagonal band:

    {(i, j) : i0 <= i < i1,  j0 <= j < j1,  lo <= j - i <= hi}

These are difference bounds on i, j and j - i over the integers, so tightening every bound
(shortest paths in a graph of three nodes) is exact: emptiness, equality and inclusion are
decidable without looking at cells.

A `Region` is a finite union of slices, kept in one canonical form. Sweep the rows from the
top: in each row the allowed keys form maximal runs ``[start, stop)``, and inside a *strip* of
consecutive rows every run end moves by 0 or by 1 per row. Strips are taken greedily, so the
list of strips is a function of the set alone: two regions with the same cells compare equal
however they were built. Costs follow the number of strips and runs, never the cells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.ranges import Ranges, span
from attnkit.strips import (
    AND,
    OR,
    SUB,
    XOR,
    Canonical,
    Strip,
    Table,
    advance,
    canonical,
    close_bounds,
    combine,
    gaps,
    inside,
    seen_spans,
    strip_area,
    union_all,
)
from attnkit.taking import rows_of, taken
from attnkit.tiles import TileCount, tile_rows

__all__ = ["Region", "RowCount", "Slice", "Strip", "TileCount"]

_BOUNDS = ("i0", "i1", "j0", "j1", "lo", "hi")
_END = (int, type(None))


class RowCount(NamedTuple):
    """Rows ``i0 <= i < i1`` hold ``first + step * (i - i0)`` allowed keys each."""

    i0: int
    i1: int
    first: int
    step: int


@dataclass(frozen=True, init=False)
class Slice:
    """A rectangle of the score matrix cut by a diagonal band, with every bound tight.

    ``Slice(i0, i1, j0, j1, lo, hi)`` is ``{(i, j): i0<=i<i1, j0<=j<j1, lo<=j-i<=hi}``; ``None``
    for `lo` or `hi` means unbounded. Two slices with the same cells are equal; every empty
    slice equals ``Slice(0, 0, 0, 0)``.

    Raises `CompositionTypeError` for a bound that is not an integer.

    >>> Slice(0, 4, 0, 4, hi=0)              # causal, 4 x 4; the closure finds lo
    Slice(i0=0, i1=4, j0=0, j1=4, lo=-3, hi=0)
    >>> Slice(0, 4, 0, 4, hi=0).area
    10
    >>> Slice(0, 100, 0, 4, lo=0) == Slice(0, 4, 0, 4, lo=0)     # rows below 3 hold nothing
    True
    """

    i0: int
    i1: int
    j0: int
    j1: int
    lo: int
    hi: int

    def __init__(
        self, i0: int, i1: int, j0: int, j1: int, lo: int | None = None, hi: int | None = None
    ) -> None:
        ints = type(i0) is type(i1) is type(j0) is type(j1) is int
        if not (ints and type(lo) in _END and type(hi) in _END):
            raise _not_a_bound(i0, i1, j0, j1, lo, hi)
        # A frozen instance takes its values through its dict.
        own = self.__dict__
        (
            own["i0"],
            own["i1"],
            own["j0"],
            own["j1"],
            own["lo"],
            own["hi"],
        ) = close_bounds(i0, i1, j0, j1, lo, hi)

    def __bool__(self) -> bool:
        return self.i1 > self.i0

    def __contains__(self, cell: tuple[int, int]) -> bool:
        i, j = cell
        return self.i0 <= i < self.i1 and self.j0 <= j < self.j1 and self.lo <= j - i <= self.hi

    def __and__(self, other: Slice) -> Slice:
        if not isinstance(other, Slice):
            return NotImplemented
        return Slice(
            max(self.i0, other.i0),
            min(self.i1, other.i1),
            max(self.j0, other.j0),
            min(self.j1, other.j1),
            max(self.lo, other.lo),
            min(self.hi, other.hi),
        )

    def __le__(self, other: Slice) -> bool:
        """Whether every cell of this slice lies in `other`."""
        if not isinstance(other, Slice):
            return NotImplemented
        return (self & other) == self

    def shift(self, di: int, dj: int) -> Slice:
        """Return the slice moved down by `di` rows and right by `dj` keys."""
        if not self:
            return self
        d = dj - di
        return Slice(
            self.i0 + di, self.i1 + di, self.j0 + dj, self.j1 + dj, self.lo + d, self.hi + d
        )

    def transpose(self) -> Slice:
        """Return ``{(j, i) : (i, j) in self}``."""
        return Slice(self.j0, self.j1, self.i0, self.i1, -self.hi, -self.lo)

    @property
    def area(self) -> int:
        """The number of cells."""
        return sum(strip_area(strip) for strip in _strips_of(self))

    @property
    def is_rectangle(self) -> bool:
        """Whether neither diagonal takes a corner off the rectangle."""
        return self.lo == self.j0 - self.i1 + 1 and self.hi == self.j1 - 1 - self.i0


def _not_a_bound(*given: object) -> CompositionTypeError:
    """Return the error for the first bound of a slice that is not what it should be."""
    for bound, name in zip(given, _BOUNDS, strict=True):
        if type(bound) not in (_END if name in ("lo", "hi") else (int,)):
            return CompositionTypeError(
                f"Slice got {name}={shown(bound)} ({type(bound).__name__}); bounds are Python "
                "ints" + (", or None for no bound" if name in ("lo", "hi") else "")
            )
    return CompositionTypeError(f"Slice got {shown(given)}")


def _strips_of(part: Slice) -> list[Strip]:
    """Cut a slice at the rows where a diagonal end meets a vertical one (at most 3 strips)."""
    i0, i1, j0, j1, lo, hi = part.i0, part.i1, part.j0, part.j1, part.lo, part.hi
    if part.is_rectangle:
        return [Strip(i0, i1, ((j0, 0, j1, 0),))]
    cuts = sorted({i0, i1, min(max(j0 - lo, i0), i1), min(max(j1 - 1 - hi, i0), i1)})
    strips = []
    for a, b in pairwise(cuts):
        start = (a + lo, 1) if a + lo >= j0 else (j0, 0)
        stop = (a + hi + 1, 1) if a + hi + 1 < j1 else (j1, 0)
        strips.append(Strip(a, b, ((*start, *stop),)))
    return strips


def _canonical(part: Slice) -> tuple[Strip, ...]:
    """Return a slice as maximal strips, as `Canonical` would make them, without trying rows."""
    i1, j0, j1, lo, hi = part.i1, part.j0, part.j1, part.lo, part.hi
    strips, row = [], part.i0
    while row < i1:
        start, stop, end = max(j0, row + lo), min(j1, row + hi + 1), i1
        if row + 1 == i1:  # slopes of a single row mean nothing: keep them unique
            strips.append(Strip(row, i1, ((start, 0, stop, 0),)))
            break
        moves, follows = row + lo >= j0, row + hi + 1 < j1
        if not moves:  # until the diagonal is met
            end = min(end, j0 - lo + 1)
        if follows:
            end = min(end, j1 - hi)
        strips.append(Strip(row, end, ((start, int(moves), stop, int(follows)),)))
        row = end
    return tuple(strips)


def _turned(region: Region, rows: int, keys: int) -> Region:
    """Return the cells ``(rows - 1 - i, keys - 1 - j)``."""
    apart = keys - rows
    return Region.of(
        *(
            Slice(
                rows - part.i1,
                rows - part.i0,
                keys - part.j1,
                keys - part.j0,
                apart - part.hi,
                apart - part.lo,
            )
            for part in region.slices
        )
    )


def _upside_down(region: Region, rows: int) -> Region:
    """Return the cells ``(rows - 1 - i, j)``: of ends that move, row by row."""
    found: list[Strip] = []
    for i0, i1, runs in region.strips:
        if all(da == db == 0 for _, da, _, db in runs):
            found.append(Strip(rows - i1, rows - i0, runs))
        else:
            each = ((rows - 1 - i0 - k, advance(runs, k)) for k in range(i1 - i0))
            found += (Strip(i, i + 1, own) for i, own in each)
    return Region.stacked(found)


def _operator(table: Table) -> Callable[[Region, Region], Region]:
    """Return the operator of regions with a truth table."""

    def combined(self: Region, other: Region) -> Region:
        if not isinstance(other, Region):
            return NotImplemented
        return Region(combine(self.strips, other.strips, table))

    return combined


@dataclass(frozen=True, repr=False)
class Region:
    """A finite union of slices: value-equal, hashable, closed under ``& | - ^``.

    Build one with `Region.of`, `Region.full` or `Region.empty` (the constructor takes strips
    that are canonical already).

    >>> causal = Region.of(Slice(0, 8, 0, 8, hi=0))
    >>> window = Region.of(Slice(0, 8, 0, 8, lo=-2, hi=0))
    >>> (causal & window).area, (causal - window).area
    (21, 15)
    >>> causal == Region.full(8, 8) - Region.of(Slice(0, 8, 0, 8, lo=1))
    True
    """

    strips: tuple[Strip, ...] = field(default=())

    # -- building ------------------------------------------------------------------------

    @classmethod
    def empty(cls) -> Region:
        """Return the region without cells."""
        return cls(())

    @classmethod
    def full(cls, q_len: int, kv_len: int) -> Region:
        """Return all cells of a `q_len` x `kv_len` score matrix."""
        return cls.of(Slice(0, q_len, 0, kv_len))

    @classmethod
    def of(cls, *slices: Slice) -> Region:
        """Return the union of slices; they may overlap, and come in any order."""
        if len(slices) == 1:
            return cls(_canonical(slices[0]))
        chains = [Canonical()]
        for part in sorted(slices, key=lambda s: s.i0):
            strips = chains[-1].strips
            if strips and part.i0 < strips[-1].i1:
                chains.append(Canonical())
            for strip in _strips_of(part) if part else ():
                chains[-1].add(*strip)
        return cls(union_all([tuple(chain.strips) for chain in chains if chain.strips]))

    @classmethod
    def union(cls, regions: Iterable[Region]) -> Region:
        """Return the union of many regions, merged pairwise so that n of them cost n log n."""
        return cls(union_all([r.strips for r in regions if r.strips]))

    @classmethod
    def stacked(cls, strips: Iterable[Strip]) -> Region:
        """Return the region of strips that share no row, in any order.

        >>> Region.stacked([Strip(2, 4, ((0, 0, 3, 0),)), Strip(0, 2, ((0, 0, 3, 0),))]).slices
        (Slice(i0=0, i1=4, j0=0, j1=3, lo=-3, hi=2),)
        """
        out = Canonical()
        for strip in sorted(strips, key=lambda strip: strip.i0):
            out.add(*strip)
        return cls(tuple(out.strips))

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[tuple[int, int]]]) -> Region:
        """Return the region with the given runs ``(start, stop)`` in rows 0, 1, 2, ...

        Runs of a row are ordered, not empty, and do not touch; anything else is an error.

        >>> Region.from_rows([[(0, 1)], [(0, 2)], [(0, 3)]]) == Region.of(Slice(0, 3, 0, 3, hi=0))
        True
        """
        out = Canonical()
        for i, runs in enumerate(rows):
            row = tuple((a, 0, b, 0) for a, b in runs)
            ends = [end for a, _, b, _ in row for end in (a, b)]
            if any(x >= y for x, y in pairwise(ends)):
                raise CompositionError(
                    f"from_rows got the runs {shown([(a, b) for a, _, b, _ in row])} in row {i}; "
                    "runs are (start, stop) with start < stop, from left to right, with a gap "
                    "between them"
                )
            out.add(i, i + 1, row)
        return cls(tuple(out.strips))

    # -- algebra -------------------------------------------------------------------------

    __and__ = _operator(AND)
    __or__ = _operator(OR)
    __sub__ = _operator(SUB)
    __xor__ = _operator(XOR)

    def complement(self, q_len: int, kv_len: int) -> Region:
        """Return the cells of a `q_len` x `kv_len` score matrix that are not in this region."""
        if len(self.strips) == 1 and self.strips[0][:2] == (0, q_len):
            runs = self.strips[0].runs
            if len(runs) == 1 and runs[0][1] == runs[0][3] == 0:
                return Region.columns(q_len, [(0, runs[0][0]), (runs[0][2], kv_len)])
            if all(da == db == 0 for _, da, _, db in runs):  # columns
                return Region.columns(q_len, gaps(((a, b) for a, _, b, _ in runs), 0, kv_len))
        return Region.full(q_len, kv_len) - self

    @classmethod
    def columns(cls, q_len: int, spans: Iterable[tuple[int, int]]) -> Region:
        """Return whole columns: every row has these keys, ranges in order with gaps between them.

        >>> Region.columns(2, [(1, 3)]) == Region.of(Slice(0, 2, 1, 3))
        True
        """
        runs = tuple((a, 0, b, 0) for a, b in spans if a < b)
        return cls((Strip(0, q_len, runs),)) if q_len > 0 and runs else cls(())

    def __le__(self, other: Region) -> bool:
        """Whether every cell of this region lies in `other`."""
        if not isinstance(other, Region):
            return NotImplemented
        return inside(self.strips, other.strips)

    def isdisjoint(self, other: Region) -> bool:
        """Whether the two regions share no cell."""
        return not (self & other)

    def shift(self, di: int, dj: int) -> Region:
        """Return the region moved down by `di` rows and right by `dj` keys."""
        if not di and not dj:
            return self
        return Region(
            tuple(
                Strip(i0 + di, i1 + di, tuple((a + dj, da, b + dj, db) for a, da, b, db in runs))
                for i0, i1, runs in self.strips
            )
        )

    def transpose(self) -> Region:
        """Return ``{(j, i) : (i, j) in self}``."""
        return Region.of(*(s.transpose() for s in self.slices))

    def cut(self, q_range: tuple[int, int], kv_range: tuple[int, int]) -> Region:
        """Return the cells inside a rectangle, renumbered from its upper left corner.

        >>> Region.of(Slice(0, 8, 0, 8, hi=0)).cut((4, 8), (0, 4)) == Region.full(4, 4)
        True
        """
        (i0, i1), (j0, j1) = q_range, kv_range
        return (self & Region.of(Slice(i0, i1, j0, j1))).shift(-i0, -j0)

    def take(self, rows: Ranges, keys: Ranges) -> Region:
        """Return ``{(u, v): (rows[u], keys[v]) in self}``: these rows and keys, in this order.

        No row and no key is taken twice. Costs follow the strips and the ranges that meet; where
        rows fall and keys rise (or the other way round), also the rows with a diagonal end.

        >>> causal = Region.of(Slice(0, 8, 0, 8, hi=0))
        >>> causal.take((range(0, 2), range(6, 8)), (range(0, 2), range(6, 8))).area
        10
        """
        if all(one.step == 1 for one in (*rows, *keys)):
            return Region(taken(self.strips, rows, keys))
        parts: list[Region] = []
        row = 0
        for some in rows:
            key = 0
            for others in keys:
                part = Region(taken(self.strips, (range(*span(some)),), (range(*span(others)),)))
                if others.step < 0:
                    part = _turned(part, len(some), len(others))
                if some.step * others.step < 0:
                    part = _upside_down(part, len(some))
                parts.append(part.shift(row, key))
                key += len(others)
            row += len(some)
        return Region.union(parts)

    # -- questions -----------------------------------------------------------------------

    def seen(self, rows: Ranges) -> Ranges:
        """Return the keys that some of these rows see, in order.

        >>> Region.of(Slice(0, 8, 0, 8, lo=-1, hi=0)).seen((range(2), range(5, 7)))
        (range(0, 2), range(4, 7))
        """
        strips = (strip for one in rows for strip in rows_of(self.strips, one))
        return tuple(range(*keys) for keys in seen_spans(strips))

    def cells(self, rows: Ranges) -> int:
        """Return how many cells these rows have.

        >>> Region.of(Slice(0, 8, 0, 8, hi=0)).cells((range(2), range(7, 8)))
        11
        """
        return sum(strip_area(strip) for one in rows for strip in rows_of(self.strips, one))

    def __bool__(self) -> bool:
        return bool(self.strips)

    def __contains__(self, cell: tuple[int, int]) -> bool:
        i, j = cell
        return any(a <= j < b for a, b in self.row(i))

    def row(self, i: int) -> tuple[tuple[int, int], ...]:
        """Return the maximal runs ``(start, stop)`` of allowed keys in row `i`."""
        k = bisect_right(self.strips, i, key=lambda strip: strip.i0) - 1
        if k < 0 or i >= self.strips[k].i1:
            return ()
        strip = self.strips[k]
        return tuple((a, b) for a, _, b, _ in advance(strip.runs, i - strip.i0))

    def rows(self) -> Iterator[Strip]:
        """Iterate over the strips ``(i0, i1, runs)`` from the top; empty rows have none."""
        return iter(self.strips)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The region as disjoint slices, one per run of each strip, from the top."""
        out = []
        for i0, i1, runs in self.strips:
            for a, da, b, db in runs:
                n = i1 - i0 - 1
                lo = a - i0 if da else None
                hi = b - 1 - i0 if db else None
                out.append(Slice(i0, i1, a, b + db * n, lo, hi))
        return tuple(out)

    @property
    def area(self) -> int:
        """The number of cells."""
        return sum(strip_area(strip) for strip in self.strips)

    @property
    def bounds(self) -> Slice | None:
        """The smallest slice that holds the region; None when it is empty."""
        if not self.strips:
            return None
        # Ends only ever move right, by a key per row, so the first and last row of a strip tell.
        return Slice(
            self.strips[0].i0,
            self.strips[-1].i1,
            min(strip.runs[0][0] for strip in self.strips),
            max(runs[-1][2] + runs[-1][3] * (i1 - i0 - 1) for i0, i1, runs in self.strips),
            min(r[0][0] - (i0 if r[0][1] else i1 - 1) for i0, i1, r in self.strips),
            max(strip.runs[-1][2] - 1 - strip.i0 for strip in self.strips),
        )

    def row_counts(self) -> tuple[RowCount, ...]:
        """Return how many keys each row allows, run-length coded; absent rows allow none.

        >>> Region.of(Slice(0, 4, 0, 4, hi=0)).row_counts()
        (RowCount(i0=0, i1=4, first=1, step=1),)
        """
        return tuple(
            RowCount(i0, i1, sum(r[2] - r[0] for r in runs), sum(r[3] - r[1] for r in runs))
            for i0, i1, runs in self.strips
        )

    def empty_rows(self, q_len: int) -> tuple[tuple[int, int], ...]:
        """Return the ranges ``(start, stop)`` of rows below `q_len` with no allowed key."""
        out, row = [], 0
        for i0, i1, _ in self.strips:
            if row < min(i0, q_len):
                out.append((row, min(i0, q_len)))
            row = i1
        return (*out, (row, q_len)) if row < q_len else tuple(out)

    def tiles(self, block_q: int, block_kv: int, q_len: int, kv_len: int) -> TileCount:
        """Count the tiles of a `q_len` x `kv_len` score matrix by what they hold.

        Tiles at the lower and right border may be ragged; such a tile is full when all of
        its existing cells are allowed. The cost follows the strips, not the tiles.

        >>> Region.of(Slice(0, 512, 0, 512, hi=0)).tiles(128, 128, 512, 512)
        TileCount(full=6, partial=4, empty=6)
        """
        if block_q < 1 or block_kv < 1:
            raise CompositionError(
                f"tiles got block_q={block_q}, block_kv={block_kv}; a tile has at least one cell"
            )
        inside = self if self.fits(q_len, kv_len) else self & Region.full(q_len, kv_len)
        touched = full = 0
        for t, f in tile_rows(inside.strips, block_q, block_kv, q_len, kv_len):
            touched, full = touched + t, full + f
        total = -(-q_len // block_q) * -(-kv_len // block_kv)
        return TileCount(full, touched - full, total - touched)

    def fits(self, q_len: int, kv_len: int) -> bool:
        """Whether every cell lies in a `q_len` x `kv_len` score matrix."""
        # Ends only ever move right, so the first and last row of a strip tell.
        return not self.strips or (
            self.strips[0].i0 >= 0
            and self.strips[-1].i1 <= q_len
            and all(
                runs[0][0] >= 0 and runs[-1][2] + runs[-1][3] * (i1 - i0 - 1) <= kv_len
                for i0, i1, runs in self.strips
            )
        )

    @property
    def is_canonical(self) -> bool:
        """Whether the strips are the one way to write these cells; given ones may be any.

        >>> column = Strip(0, 1, ((0, 0, 1, 0),)), Strip(1, 2, ((0, 0, 1, 0),))
        >>> Region(column).is_canonical, Region.full(2, 1).is_canonical
        (False, True)
        """
        return canonical(self.strips) == self.strips

    def __repr__(self) -> str:
        parts = self.slices
        if len(parts) <= 4:
            return f"Region.of({', '.join(map(repr, parts))})" if parts else "Region.empty()"
        hull = self.bounds
        where = f", rows {hull.i0}:{hull.i1}, keys {hull.j0}:{hull.j1}" if hull else ""
        return f"<Region of {len(parts)} slices, {self.area} cells{where}>"
