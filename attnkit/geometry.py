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

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import gcd
from typing import NamedTuple

from attnkit.errors import CompositionError, CompositionTypeError

__all__ = ["Region", "RowCount", "Slice", "Strip", "TileCount"]

_BOUNDS = ("i0", "i1", "j0", "j1", "lo", "hi")

# A run of allowed keys in the first row of a strip, and how its ends move per row:
# (start, start_slope, stop, stop_slope), slopes 0 or 1.
Run = tuple[int, int, int, int]


class Strip(NamedTuple):
    """Rows ``i0 <= i < i1`` whose runs start at ``start + start_slope * (i - i0)``, and so on."""

    i0: int
    i1: int
    runs: tuple[Run, ...]


class RowCount(NamedTuple):
    """Rows ``i0 <= i < i1`` hold ``first + step * (i - i0)`` allowed keys each."""

    i0: int
    i1: int
    first: int
    step: int


class TileCount(NamedTuple):
    """How many tiles hold only allowed, some allowed, and no allowed cells."""

    full: int
    partial: int
    empty: int


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
        given = (i0, i1, j0, j1, lo, hi)
        for bound, name in zip(given, _BOUNDS, strict=True):
            if type(bound) is not int and not (bound is None and name in ("lo", "hi")):
                raise CompositionTypeError(
                    f"Slice got {name}={bound!r} ({type(bound).__name__}); bounds are Python ints"
                    + (", or None for no bound" if name in ("lo", "hi") else "")
                )
        # A frozen instance takes its values through its dict.
        self.__dict__.update(zip(_BOUNDS, _close(*given), strict=True))

    def __bool__(self) -> bool:
        return self.i1 > self.i0

    def __contains__(self, cell: tuple[int, int]) -> bool:
        i, j = cell
        return self.i0 <= i < self.i1 and self.j0 <= j < self.j1 and self.lo <= j - i <= self.hi

    def __and__(self, other: Slice) -> Slice:
        if not isinstance(other, Slice):
            return NotImplemented
        if not self or not other:
            return _EMPTY_SLICE
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
        return sum(_strip_area(strip) for strip in _strips_of(self))

    @property
    def is_rectangle(self) -> bool:
        """Whether neither diagonal takes a corner off the rectangle."""
        return self.lo == self.j0 - self.i1 + 1 and self.hi == self.j1 - 1 - self.i0


def _close(
    i0: int, i1: int, j0: int, j1: int, lo: int | None, hi: int | None
) -> tuple[int, int, int, int, int, int]:
    """Tighten every bound; an empty set becomes all zeros (with hi = -1)."""
    if i0 >= i1 or j0 >= j1:
        return (0, 0, 0, 0, 0, -1)
    lo = j0 - i1 + 1 if lo is None else max(lo, j0 - i1 + 1)
    hi = j1 - 1 - i0 if hi is None else min(hi, j1 - 1 - i0)
    if lo > hi:
        return (0, 0, 0, 0, 0, -1)
    i0, i1 = max(i0, j0 - hi), min(i1, j1 - lo)
    j0, j1 = max(j0, i0 + lo), min(j1, i1 + hi)
    # With both diagonals met by the rectangle, one more pass over them closes the system.
    return (i0, i1, j0, j1, max(lo, j0 - i1 + 1), min(hi, j1 - 1 - i0))


_EMPTY_SLICE = Slice(0, 0, 0, 0)


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


def _advance(runs: tuple[Run, ...], rows: int) -> tuple[Run, ...]:
    """Return the runs `rows` rows further down."""
    if not rows:
        return runs
    return tuple((a + da * rows, da, b + db * rows, db) for a, da, b, db in runs)


def _strip_area(strip: Strip) -> int:
    n = strip.i1 - strip.i0
    steps = n * (n - 1) // 2
    return sum((b - a) * n + (db - da) * steps for a, da, b, db in strip.runs)


class _Canonical:
    """Collects strips from the top and keeps them maximal, as if row by row."""

    def __init__(self) -> None:
        self.strips: list[Strip] = []

    def add(self, i0: int, i1: int, runs: tuple[Run, ...]) -> None:
        """Append rows below all rows so far; runs are maximal and ordered in every row."""
        if i0 >= i1 or not runs:
            return
        last = self.strips[-1] if self.strips else None
        joined = _join(last, i0, runs) if last is not None and last.i1 == i0 else None
        if joined is None:
            self._start(i0, i1, runs)
        elif i1 - i0 == 1 or _slopes(joined.runs) == _slopes(runs):
            self.strips[-1] = Strip(joined.i0, i1, joined.runs)
        else:  # the first row belongs to the strip above, the others move another way
            self.strips[-1] = joined
            self._start(i0 + 1, i1, _advance(runs, 1))

    def _start(self, i0: int, i1: int, runs: tuple[Run, ...]) -> None:
        if i1 - i0 == 1:  # slopes of a single row mean nothing: keep them unique
            runs = tuple((a, 0, b, 0) for a, _, b, _ in runs)
        self.strips.append(Strip(i0, i1, runs))


def _slopes(runs: tuple[Run, ...]) -> list[tuple[int, int]]:
    return [(da, db) for _, da, _, db in runs]


def _join(last: Strip, i0: int, runs: tuple[Run, ...]) -> Strip | None:
    """Extend `last` by row `i0`, which holds `runs`, if its ends move as they must."""
    if len(last.runs) != len(runs):
        return None
    rows = i0 - last.i0
    if rows > 1:
        for (a, da, b, db), (c, _, d, _) in zip(last.runs, runs, strict=True):
            if a + da * rows != c or b + db * rows != d:
                return None
        return Strip(last.i0, i0 + 1, last.runs)
    moved = []
    for (a, _, b, _), (c, _, d, _) in zip(last.runs, runs, strict=True):
        if c - a not in (0, 1) or d - b not in (0, 1):
            return None
        moved.append((a, c - a, b, d - b))
    return Strip(last.i0, i0 + 1, tuple(moved))


# A boolean operation as its truth table: the result for a cell in neither operand, in the
# first only, in the second only, and in both.
_Table = tuple[bool, bool, bool, bool]
_AND: _Table = (False, False, False, True)
_OR: _Table = (False, True, True, True)
_SUB: _Table = (False, True, False, False)
_XOR: _Table = (False, True, True, False)


def _combine(a: tuple[Strip, ...], b: tuple[Strip, ...], table: _Table) -> tuple[Strip, ...]:
    """Apply a boolean operation by one sweep over the rows of both operands."""
    _, keep_a, keep_b, _ = table
    if not keep_a:
        a = _between(a, b)
    if not keep_b:
        b = _between(b, a)
    out = _Canonical()
    for i0, i1, x, y in _overlay(a, b):
        if x and y:
            for r0, r1 in pairwise(_crossings(x, y, i0, i1)):
                runs = _combine_rows(_advance(x, r0 - i0), _advance(y, r0 - i0), table)
                out.add(r0, r1, runs)
        elif (x and keep_a) or (y and keep_b):
            out.add(i0, i1, x or y)
    return tuple(out.strips)


def _between(strips: tuple[Strip, ...], others: tuple[Strip, ...]) -> tuple[Strip, ...]:
    """Return the strips that share a row with the span of the others; the rest cannot matter."""
    if not others:
        return ()
    first = bisect_right(strips, others[0].i0, key=lambda strip: strip.i1)
    return strips[first : bisect_left(strips, others[-1].i1, key=lambda strip: strip.i0)]


def _overlay(
    a: tuple[Strip, ...], b: tuple[Strip, ...]
) -> Iterator[tuple[int, int, tuple[Run, ...], tuple[Run, ...]]]:
    """Yield ``(i0, i1, runs of a, runs of b)`` for the row ranges that no strip border cuts."""
    rows = sorted({row for i0, i1, _ in a + b for row in (i0, i1)})
    k = l = 0  # noqa: E741
    for i0, i1 in pairwise(rows):
        x = _advance(a[k].runs, i0 - a[k].i0) if k < len(a) and a[k].i0 <= i0 else ()
        y = _advance(b[l].runs, i0 - b[l].i0) if l < len(b) and b[l].i0 <= i0 else ()
        yield i0, i1, x, y
        k += k < len(a) and a[k].i1 == i1
        l += l < len(b) and b[l].i1 == i1  # noqa: E741


def _crossings(a: tuple[Run, ...], b: tuple[Run, ...], i0: int, i1: int) -> list[int]:
    """Return the rows at which order changes: where a moving end meets a standing one, and after.

    Ends of one operand never meet each other, so only pairs across operands count.
    """
    rows = {i0, i1}
    for one, other in ((a, b), (b, a)):
        moving = [x for p, dp, q, dq in one for x, dx in ((p, dp), (q, dq)) if dx]
        if not moving:
            continue
        standing = [x for p, dp, q, dq in other for x, dx in ((p, dp), (q, dq)) if not dx]
        for x in moving:
            reach = bisect_left(standing, x), bisect_left(standing, x + i1 - i0)
            for y in standing[slice(*reach)]:
                rows |= {i0 + y - x, i0 + y - x + 1}
    return sorted(rows)


def _combine_rows(a: tuple[Run, ...], b: tuple[Run, ...], table: _Table) -> tuple[Run, ...]:
    """Combine two run lists whose ends keep their order over the rows in question."""
    if table is _AND:
        return _intersect_rows(a, b)
    events = [(x, dx, 1) for p, dp, q, dq in a for x, dx in ((p, dp), (q, dq))]
    events += [(x, dx, 2) for p, dp, q, dq in b for x, dx in ((p, dp), (q, dq))]
    events.sort()
    inside = 0  # which operands hold the keys between two events, as an index into the table
    opened: tuple[int, int] | None = None
    out: list[Run] = []
    for (pos, slope, which), following in zip(events, (*events[1:], None), strict=True):
        inside ^= which
        if following is not None and following[0] == pos:
            continue
        if table[inside] and opened is None:
            opened = (pos, slope)
        elif not table[inside] and opened is not None:
            out.append((*opened, pos, slope))
            opened = None
    return tuple(out)


def _intersect_rows(a: tuple[Run, ...], b: tuple[Run, ...]) -> tuple[Run, ...]:
    """Return what `_combine_rows` does for "and", the commonest case, at a third of the time."""
    out: list[Run] = []
    k = l = 0  # noqa: E741
    while k < len(a) and l < len(b):
        p, dp, q, dq = a[k]
        r, dr, s, ds = b[l]
        start = (p, dp) if p >= r else (r, dr)
        stop = (q, dq) if q <= s else (s, ds)
        if start[0] < stop[0]:
            out.append((*start, *stop))
        k, l = (k + 1, l) if q <= s else (k, l + 1)  # noqa: E741
    return tuple(out)


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
        chains = [_Canonical()]
        for part in sorted(slices, key=lambda s: s.i0):
            strips = chains[-1].strips
            if strips and part.i0 < strips[-1].i1:
                chains.append(_Canonical())
            for strip in _strips_of(part) if part else ():
                chains[-1].add(*strip)
        return cls(_merge_all([tuple(chain.strips) for chain in chains if chain.strips]))

    @classmethod
    def union(cls, regions: Iterable[Region]) -> Region:
        """Return the union of many regions, merged pairwise so that n of them cost n log n."""
        return cls(_merge_all([r.strips for r in regions if r.strips]))

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[tuple[int, int]]]) -> Region:
        """Return the region with the given runs ``(start, stop)`` in rows 0, 1, 2, ...

        Runs of a row are ordered, not empty, and do not touch; anything else is an error.

        >>> Region.from_rows([[(0, 1)], [(0, 2)], [(0, 3)]]) == Region.of(Slice(0, 3, 0, 3, hi=0))
        True
        """
        out = _Canonical()
        for i, runs in enumerate(rows):
            row = tuple((a, 0, b, 0) for a, b in runs)
            ends = [end for a, _, b, _ in row for end in (a, b)]
            if any(x >= y for x, y in pairwise(ends)):
                raise CompositionError(
                    f"from_rows got the runs {[(a, b) for a, _, b, _ in row]} in row {i}; runs are "
                    "(start, stop) with start < stop, from left to right, with a gap between them"
                )
            out.add(i, i + 1, row)
        return cls(tuple(out.strips))

    # -- algebra -------------------------------------------------------------------------

    def __and__(self, other: Region) -> Region:
        if not isinstance(other, Region):
            return NotImplemented
        return Region(_combine(self.strips, other.strips, _AND))

    def __or__(self, other: Region) -> Region:
        if not isinstance(other, Region):
            return NotImplemented
        return Region(_combine(self.strips, other.strips, _OR))

    def __sub__(self, other: Region) -> Region:
        if not isinstance(other, Region):
            return NotImplemented
        return Region(_combine(self.strips, other.strips, _SUB))

    def __xor__(self, other: Region) -> Region:
        if not isinstance(other, Region):
            return NotImplemented
        return Region(_combine(self.strips, other.strips, _XOR))

    def complement(self, q_len: int, kv_len: int) -> Region:
        """Return the cells of a `q_len` x `kv_len` score matrix that are not in this region."""
        return Region.full(q_len, kv_len) - self

    def __le__(self, other: Region) -> bool:
        """Whether every cell of this region lies in `other`."""
        if not isinstance(other, Region):
            return NotImplemented
        return not (self - other)

    def isdisjoint(self, other: Region) -> bool:
        """Whether the two regions share no cell."""
        return not (self & other)

    def shift(self, di: int, dj: int) -> Region:
        """Return the region moved down by `di` rows and right by `dj` keys."""
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

    # -- questions -----------------------------------------------------------------------

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
        return tuple((a, b) for a, _, b, _ in _advance(strip.runs, i - strip.i0))

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
        return sum(_strip_area(strip) for strip in self.strips)

    @property
    def bounds(self) -> Slice | None:
        """The smallest slice that holds the region; None when it is empty."""
        parts = self.slices
        if not parts:
            return None
        return Slice(
            min(s.i0 for s in parts),
            max(s.i1 for s in parts),
            min(s.j0 for s in parts),
            max(s.j1 for s in parts),
            min(s.lo for s in parts),
            max(s.hi for s in parts),
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
            if min(i0, q_len) > row:
                out.append((row, min(i0, q_len)))
            row = max(row, i1)
        if row < q_len:
            out.append((row, q_len))
        return tuple(out)

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
        for t, f in _tile_rows(inside.strips, block_q, block_kv, q_len, kv_len):
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

    def __repr__(self) -> str:
        parts = self.slices
        if len(parts) <= 4:
            return f"Region.of({', '.join(map(repr, parts))})" if parts else "Region.empty()"
        hull = self.bounds
        where = f", rows {hull.i0}:{hull.i1}, keys {hull.j0}:{hull.j1}" if hull else ""
        return f"<Region of {len(parts)} slices, {self.area} cells{where}>"


def _merge_all(parts: list[tuple[Strip, ...]]) -> tuple[Strip, ...]:
    while len(parts) > 1:
        merged = [_union(x, y) for x, y in zip(parts[::2], parts[1::2], strict=False)]
        parts = merged + parts[len(parts) - len(parts) % 2 :]
    return parts[0] if parts else ()


def _union(a: tuple[Strip, ...], b: tuple[Strip, ...]) -> tuple[Strip, ...]:
    if a[-1].i1 > b[0].i0:
        return _combine(a, b, _OR)
    out = _Canonical()
    out.strips = list(a)
    for k, strip in enumerate(b):
        out.add(*strip)
        if out.strips[-1] == strip:  # the seam has no further effect
            return (*out.strips, *b[k + 1 :])
    return tuple(out.strips)


# -- tiles -------------------------------------------------------------------------------------


def _tile_rows(
    strips: tuple[Strip, ...], bq: int, bkv: int, q_len: int, kv_len: int
) -> Iterator[tuple[int, int]]:
    """Yield (touched, full) for one row of tiles, or summed over several, from the top."""
    for _, group in groupby(_tile_pieces(strips, bq), key=lambda piece: piece.i0 // bq):
        pieces = list(group)
        rows = pieces[0].i1 - pieces[0].i0
        if rows > bq:  # several whole rows of tiles, so the only piece of its group
            yield _affine_rows(pieces[0].runs, rows // bq, bq, bkv, kv_len)
        else:
            yield _one_tile_row(pieces, bq, bkv, q_len, kv_len)


def _tile_pieces(strips: tuple[Strip, ...], bq: int) -> Iterator[Strip]:
    """Cut strips so that a piece stays in one row of tiles, or is several whole ones.

    The last whole row of tiles of a strip stays alone: see `_affine_rows`.
    """
    for i0, i1, runs in strips:
        first, last = -(-i0 // bq) * bq, (i1 // bq - 1) * bq
        cuts = sorted({i0, i1, *(row for row in (first, last, last + bq) if i0 < row < i1)})
        for a, b in pairwise(cuts):
            yield Strip(a, b, _advance(runs, a - i0))


def _one_tile_row(
    pieces: list[Strip], bq: int, bkv: int, q_len: int, kv_len: int
) -> tuple[int, int]:
    """Count the touched and the full tiles of one row of tiles, given its strip pieces."""
    touched: list[tuple[int, int]] = []
    full: list[tuple[int, int]] | None = None
    for i0, i1, runs in pieces:
        n = i1 - i0 - 1
        here = []
        for a, da, b, db in runs:
            touched.append((a // bkv, -(-(b + db * n) // bkv)))
            stop = -(-b // bkv) if b >= kv_len else b // bkv
            here.append((-(-(a + da * n) // bkv), stop))
        full = here if full is None else _intersect_intervals(full, here)
    top = pieces[0].i0 // bq * bq
    whole = sum(p.i1 - p.i0 for p in pieces) == min(bq, q_len - top)
    covered, end = 0, -1
    for a, b in sorted(touched):
        covered += max(0, b - max(a, end))
        end = max(end, b)
    return covered, sum(max(0, b - a) for a, b in full or ()) if whole else 0


def _intersect_intervals(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    out = [(max(p, r), min(q, s)) for p, q in a for r, s in b]
    return [(p, q) for p, q in out if p < q]


def _affine_rows(
    runs: tuple[Run, ...], count: int, bq: int, bkv: int, kv_len: int
) -> tuple[int, int]:
    """Count tiles over `count` whole rows of tiles inside one strip, in closed form.

    The first tile that run r touches is ``floor(start / bkv)`` in the block's first row, and
    so on; a moving end advances by `bq` keys per tile row. Over tile rows k = p + period * m
    every such floor is affine in m, so every count is a sum of max(0, affine) terms.
    The caller leaves the strip's last whole tile row out: there alone can a moving end
    reach `kv_len`, where a ragged border tile counts as full.
    """
    period = min(bkv // gcd(bq, bkv), count)
    step = period * bq // bkv if period < count else 0
    touched = full = 0
    for p in range(period):
        terms = len(range(p, count, period))
        previous: tuple[int, int] | None = None
        for a, da, b, db in runs:
            a, b = a + da * bq * p, b + db * bq * p
            low = (a // bkv, da * step)
            high = (-(-(b + db * (bq - 1)) // bkv), db * step)
            touched += _sum_positive(high[0] - low[0], high[1] - low[1], terms)
            if previous is not None:  # runs are ordered, so neighbours alone can share tiles
                touched -= _sum_positive(previous[0] - low[0], previous[1] - low[1], terms)
            previous = high
            inner = -(-b // bkv) if b >= kv_len else b // bkv
            first = -(-(a + da * (bq - 1)) // bkv)
            full += _sum_positive(inner - first, (db - da) * step, terms)
    return touched, full


def _sum_positive(first: int, step: int, terms: int) -> int:
    """Return the sum of ``max(0, first + step * m)`` for m = 0 ... terms - 1."""
    last = first + step * (terms - 1)
    if first <= 0 and last <= 0:
        return 0
    if first < 0 or last < 0:  # keep the positive end of the progression
        if step > 0:
            skip = -(first // step)
            first, terms = first + step * skip, terms - skip
        else:
            terms = first // -step + 1
        last = first + step * (terms - 1)
    return (first + last) * terms // 2
