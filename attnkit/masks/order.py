"""`Order`: a mask in another order of its positions, where it is a region, or a smaller one.

Every step-th key, the tiles of a grid, windows of an image: in the order in which tokens stand,
such sets are thousands of runs. With the tokens sorted by residue, or tile by tile, they are a
few blocks. A mask that knows such an order says it in `Mask.in_order`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from attnkit.geometry import Region, Slice
from attnkit.ranges import Ranges, joined, span
from attnkit.strips import gaps

__all__ = ["Order", "carried"]

Spans = tuple[tuple[int, int], ...]

_MOST_PIECES = 1 << 17
"""Pieces that an order may cut another region into: with more, it is none there."""


@dataclass(frozen=True)
class Order:
    """Positions of a score matrix in another order, and the region that a mask is there.

    `rows` and `keys` have every position once. In the `region`, row u is the u-th of `rows`, and
    key v the v-th of `keys`.

    >>> even_first = (range(0, 4, 2), range(1, 4, 2))
    >>> blocks = Region.of(Slice(0, 2, 0, 2), Slice(2, 4, 2, 4))
    >>> Order(even_first, even_first, blocks).meet(Region.of(Slice(0, 4, 0, 4, hi=0))).region.area
    6
    """

    rows: tuple[range, ...]
    keys: tuple[range, ...]
    region: Region

    def fits(self, q_len: int, kv_len: int) -> bool:
        """Whether these are orders of so many rows and keys, and the region lies within.

        >>> Order((range(2),), (range(2),), Region.full(2, 2)).fits(2, 3)
        False
        """
        orders = (self.rows, q_len), (self.keys, kv_len)
        return self.region.fits(q_len, kv_len) and all(_is_order(*one) for one in orders)

    def alike(self, other: Order) -> bool:
        """Whether another order has the positions where this one has them.

        >>> one = Order((range(2),), (range(2),), Region.full(2, 2))
        >>> one.alike(Order((range(1, -1, -1),), (range(2),), Region.full(2, 2)))
        False
        """
        return (self.rows, self.keys) == (other.rows, other.keys)

    def unmatched(self) -> tuple[Spans, Spans]:
        """Return the rows without keys and the keys without rows, where they stand.

        >>> halves = (range(2, 4), range(0, 2))
        >>> Order(halves, (range(4),), Region.of(Slice(0, 2, 0, 3))).unmatched()
        (((0, 2),), ((3, 4),))
        """
        rows, keys = (sum(map(len, side)) for side in (self.rows, self.keys))
        seen = ((part.j0, part.j1) for part in self.region.slices)
        return (
            _standing(self.rows, self._starts[0], self.region.empty_rows(rows)),
            _standing(self.keys, self._starts[1], gaps(seen, 0, keys)),
        )

    def meet(self, region: Region) -> Order | None:
        """Return the cells that are also in a region of positions as they stand.

        None where that has a diagonal end between ranges of different steps, or is cut into more
        pieces than is worth it.
        """
        diagonal = [part for part in region.slices if not part.is_rectangle]
        found, bands = self._rectangles(region), self._bands(diagonal)
        if found is None or bands is None:
            return None
        return Order(self.rows, self.keys, (self.region & found) | bands)

    def join(self, region: Region) -> Order | None:
        """Return these cells, and those of rectangles of positions as they stand.

        None where there are others, and where the rectangles are cut into too many pieces.
        """
        found = self._rectangles(region)
        if found is None or not all(part.is_rectangle for part in region.slices):
            return None
        return Order(self.rows, self.keys, self.region | found)

    def take(self, rows: Ranges, keys: Ranges) -> Order:
        """Return these cells as an order of the rows and keys that are taken of it.

        >>> even_first = (range(0, 4, 2), range(1, 4, 2))
        >>> whole = Order(even_first, (range(4),), Region.of(Slice(0, 2, 0, 4)))
        >>> own = whole.take((range(1, 4),), (range(2),))
        >>> [list(one) for one in own.rows], own.region.area
        ([[1], [0, 2]], 2)
        """
        own, at = _taken(self.rows, self._starts[0], rows)
        others, there = _taken(self.keys, self._starts[1], keys)
        return Order(own, others, self.region.take(at, there))

    def _rectangles(self, region: Region) -> Region | None:
        """Return the rectangles of a region in this order; None where they are too many."""
        pieces: list[Slice] = []
        for part in region.slices:
            if part.is_rectangle:
                rows = _runs(self.rows, self._starts[0], part.i0, part.i1)
                keys = _runs(self.keys, self._starts[1], part.j0, part.j1)
                if len(pieces) + len(rows) * len(keys) > _MOST_PIECES:
                    return None
                pieces += (Slice(*u, *v) for u in rows for v in keys)
        return Region.of(*pieces)

    def _bands(self, parts: Sequence[Slice]) -> Region | None:
        """Return what of some slices lies in the region, in this order; None if it is none."""
        pieces: list[Slice] = []
        for inside in self.region.slices if parts else ():
            for rows, u in _met(self.rows, self._starts[0], inside.i0, inside.i1):
                for keys, v in _met(self.keys, self._starts[1], inside.j0, inside.j1):
                    if len(pieces) > _MOST_PIECES:
                        return None
                    for part in parts:
                        there = _every(part, rows, keys)
                        if there is None:
                            return None
                        if there:
                            pieces.append(there.shift(u, v) & inside)
        return Region.of(*pieces)

    @cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        rows, keys = (
            list(accumulate(map(len, side), initial=0)) for side in (self.rows, self.keys)
        )
        return rows, keys


def carried(region: Region, rows: range, keys: range) -> Region | None:
    """Return the (u, v) whose ``(rows[u], keys[v])`` lie in a region; None if they are no region.

    >>> carried(Region.of(Slice(0, 9, 0, 9, hi=0)), range(0, 9, 3), range(1, 9, 3)).row_counts()
    (RowCount(i0=1, i1=3, first=1, step=1),)
    """
    parts = [_every(part, rows, keys) for part in region.slices]
    return Region.of(*(part for part in parts if part)) if None not in parts else None


def _taken(
    side: Sequence[range], starts: Sequence[int], chosen: Ranges
) -> tuple[tuple[range, ...], Ranges]:
    """Return an order of what is chosen of a side, numbered from 0, and where that is in the order.

    What is chosen keeps the order that it has.
    """
    found: list[tuple[int, int, range]] = []
    first = 0
    for some in chosen:
        for one, start in zip(side, starts, strict=False):
            a, b = _places(one, *span(some))
            if a < b:
                begin, last = (first + some.index(one[k]) for k in (a, b - 1))
                step = one.step * some.step
                found.append((start + a, start + b, range(begin, last + (1, -1)[step < 0], step)))
        first += len(some)
    found.sort(key=lambda hit: hit[0])
    return tuple(own for _, _, own in found), joined((a, b) for a, b, _ in found)


def _is_order(ranges: Sequence[range], length: int) -> bool:
    """Whether some ranges have every position below a length once."""
    seen = bytearray(length)
    if sum(map(len, ranges)) != length:
        return False
    for one in ranges:
        if one and not (min(one[0], one[-1]) >= 0 and max(one[0], one[-1]) < length):
            return False
        own = one if one.step > 0 else one[::-1]
        seen[own.start : own.stop : own.step] = bytes([1]) * len(own)
    return all(seen)


def _met(
    ranges: Sequence[range], starts: Sequence[int], first: int, stop: int
) -> Iterator[tuple[range, int]]:
    """Yield the ranges with a place in ``[first, stop)``, and where each starts."""
    for k in range(bisect_right(starts, first) - 1, len(ranges)):
        if starts[k] >= stop:
            return
        if starts[k + 1] > first:
            yield ranges[k], starts[k]


def _standing(
    ranges: Sequence[range], starts: Sequence[int], spans: Iterable[tuple[int, int]]
) -> Spans:
    """Return the positions at some places, as ranges in order."""
    found: list[int] = []
    for first, stop in spans:
        for one, start in _met(ranges, starts, first, stop):
            found += one[max(first - start, 0) : max(stop - start, 0)]
    found.sort()
    cuts = [k for k in range(1, len(found)) if found[k] > found[k - 1] + 1]
    ends = pairwise([0, *cuts, len(found)]) if found else ()
    return tuple((found[a], found[b - 1] + 1) for a, b in ends)


def _runs(
    ranges: Sequence[range], starts: Sequence[int], first: int, stop: int
) -> list[tuple[int, int]]:
    """Return the places of the positions in ``[first, stop)``, as ranges in order."""
    found: list[tuple[int, int]] = []
    for one, start in zip(ranges, starts, strict=False):
        a, b = _places(one, first, stop)
        if found and found[-1][1] == start + a:
            found[-1] = (found[-1][0], start + b)
        elif a < b:
            found.append((start + a, start + b))
    return found


def _every(part: Slice, rows: range, keys: range) -> Slice | None:
    """Return the (u, v) whose ``(rows[u], keys[v])`` lie in a slice: a slice, or None if not."""
    u0, u1 = _places(rows, part.i0, part.i1)
    v0, v1 = _places(keys, part.j0, part.j1)
    if u0 >= u1 or v0 >= v1:
        return Slice(0, 0, 0, 0)
    rows_met, keys_met = rows[u0:u1], keys[v0:v1]
    distances = [j - i for i in (rows_met[0], rows_met[-1]) for j in (keys_met[0], keys_met[-1])]
    if part.lo <= min(distances) and max(distances) <= part.hi:
        return Slice(u0, u1, v0, v1)
    step = rows.step if u1 - u0 > 1 else keys.step
    if v1 - v0 > 1 and keys.step != step:
        return None
    # The distance of (u, v) is that of the first cell, and a step more for each key ahead.
    at = keys.start - rows.start + (keys.step - step) * v0 + (step - rows.step) * u0
    lo, hi = part.lo - at, part.hi - at
    ends = (-(-lo // step), hi // step) if step > 0 else (-(hi // -step), -lo // -step)
    return Slice(u0, u1, v0, v1, *ends)


def _places(positions: range, first: int, stop: int) -> tuple[int, int]:
    """Return where the positions in ``[first, stop)`` are in a range: a start and a stop."""
    start, step, count = positions.start, positions.step, len(positions)
    if step > 0:
        a, b = -((start - first) // step), -((start - stop) // step)
    else:
        a, b = (start - stop) // -step + 1, (start - first) // -step + 1
    return min(max(a, 0), count), min(max(b, 0), count)
