"""Exact sets of (query, key) cells: `Slice` and `Region`. Knows nothing of torch.

A `Region` is a finite union of slices (`attnkit.slices`), kept in one canonical form. Sweep the
rows from the top: in each row the allowed keys form maximal runs ``[start, stop)``, and inside a
*strip* of consecutive rows every run end moves by 0 or by 1 per row. Strips are taken greedily, so
the list of strips is a function of the set alone: two regions with the same cells compare equal
however they were built. Costs follow the number of strips and runs, never the cells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from attnkit.errors import CompositionError, shown
from attnkit.ranges import Ranges, span
from attnkit.slices import Slice, canonical_strips, strips_of
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


class RowCount(NamedTuple):
    """Rows ``i0 <= i < i1`` hold ``first + step * (i - i0)`` allowed keys each."""

    i0: int
    i1: int
    first: int
    step: int


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
            return cls(canonical_strips(slices[0]))
        chains = [Canonical()]
        for part in sorted(slices, key=lambda s: s.i0):
            strips = chains[-1].strips
            if strips and part.i0 < strips[-1].i1:
                chains.append(Canonical())
            for strip in strips_of(part) if part else ():
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

    def _repr_html_(self) -> str:
        """Return a picture for a notebook."""
        from attnkit.fields import page

        return page(self)
