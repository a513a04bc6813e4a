"""`Block`: which rows and keys of a score matrix a sequence of a call has, and in what order.

A packed sequence may take its rows and its keys from several places. With rows R and keys K, a
window of the call computes the image of its cells: ``{(R[u], K[v]) : (u, v) in window}``. The
kernel's softmax counts a key as often as the sequence has it, so rows and keys are distinct.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from attnkit.geometry import Region, Slice, Strip
from attnkit.ranges import Ranges, span, total
from attnkit.strips import Run, advance

__all__ = ["Block"]


@dataclass(frozen=True)
class Block:
    """Rows and keys of the score matrix of batch element (or packed sequence) `batch`.

    >>> twice = Block(0, (range(0, 2), range(6, 8)), (range(4),))
    >>> twice.sizes, twice.ends, twice.image(Region.full(4, 4)).area
    ((4, 4), (0, 8, 0, 4), 16)
    """

    batch: int
    rows: Ranges
    keys: Ranges

    @classmethod
    def at(cls, batch: int, i0: int, i1: int, j0: int, j1: int) -> Block:
        """Return a rectangle of the score matrix.

        >>> Block.at(0, 2, 4, 0, 3).rows
        (range(2, 4),)
        """
        rows, keys = (i0, i1) if i0 < i1 else (0, 0), (j0, j1) if j0 < j1 else (0, 0)
        found = cls(batch, (range(*rows),) if i0 < i1 else (), (range(*keys),) if j0 < j1 else ())
        # A packed batch has thousands of them, and what is known need not be found out.
        sizes = (rows[1] - rows[0], keys[1] - keys[0])
        vars(found).update(sizes=sizes, ends=(*rows, *keys), is_rectangle=True)
        return found

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """``(q_len, kv_len)`` of the sequence."""
        return total(self.rows), total(self.keys)

    @cached_property
    def ends(self) -> tuple[int, int, int, int]:
        """``(i0, i1, j0, j1)``: the smallest rectangle that holds it; at 0 where there is none."""
        return (*_hull(self.rows), *_hull(self.keys))

    @cached_property
    def is_rectangle(self) -> bool:
        """Whether rows and keys lie side by side, in order."""
        both = (self.rows, self.keys)
        return all(len(some) < 2 and all(one.step == 1 for one in some) for some in both)

    def image(self, region: Region) -> Region:
        """Return the cells ``(rows[u], keys[v])`` for the cells ``(u, v)`` of a region.

        Rows and keys are distinct, which the proof looks at first.
        """
        if self.is_rectangle:
            i0, _, j0, _ = self.ends
            return region.shift(i0, j0) if i0 or j0 else region
        standing: list[Strip] = []
        moving: list[Slice] = []
        known: dict[tuple[tuple[int, int], ...], tuple[Run, ...]] = {}  # most rows see the same
        for rows, runs in _by_range(region, self.rows):
            static, wedges = _parted(runs, len(rows))
            spans = tuple(static)
            if spans not in known:
                known[spans] = _moved(static, self.keys)
            if kept := known[spans]:
                standing.append(Strip(*span(rows), kept))
            moving += (part for wedge in wedges for part in _moved_wedge(wedge, rows, self.keys))
        still = Region.stacked(standing)
        return still | Region.of(*moving) if moving else still


def _hull(ranges: Ranges) -> tuple[int, int]:
    spans = [span(one) for one in ranges]
    return min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)


# -- images --------------------------------------------------------------------------------


def _by_range(region: Region, ranges: Ranges) -> Iterator[tuple[range, tuple[Run, ...]]]:
    """Yield the rows of a region that a strip and a range have in common, and its runs there."""
    ends = pairwise(accumulate(map(len, ranges), initial=0))
    strips = iter(region.strips)
    strip = next(strips, None)
    for rows, (first, last) in zip(ranges, ends, strict=True):
        while strip is not None and strip.i0 < last:
            start, stop = max(first, strip.i0), min(last, strip.i1)
            if start < stop:
                yield rows[start - first : stop - first], advance(strip.runs, start - strip.i0)
            if strip.i1 > last:
                break
            strip = next(strips, None)


def _parted(runs: tuple[Run, ...], rows: int) -> tuple[list[tuple[int, int]], list[Slice]]:
    """Split the runs of a strip into the keys that all its rows have, and the wedges beside them.

    Rows of the wedges are counted from the strip's first.
    """
    static: list[tuple[int, int]] = []
    wedges: list[Slice] = []
    for a, da, b, db in runs:
        start = a + da * (rows - 1)
        if start >= b:
            lo, hi = a if da else None, b - 1 if db else None
            wedges.append(Slice(0, rows, a, b + db * (rows - 1), lo, hi))
            continue
        static.append((start, b))
        if da and start > a:
            wedges.append(Slice(0, rows, a, start, lo=a))
        if db and rows > 1:
            wedges.append(Slice(0, rows, b, b + rows - 1, hi=b - 1))
    return static, wedges


def _moved(spans: list[tuple[int, int]], keys: Ranges) -> tuple[Run, ...]:
    """Return where the keys of some spans of a sequence lie, as maximal runs in order."""
    found: list[tuple[int, int]] = []
    at, k = 0, 0
    for one in keys:
        while k < len(spans) and spans[k][0] < at + len(one):
            start, stop = max(spans[k][0], at) - at, min(spans[k][1], at + len(one)) - at
            found.append(span(one[start:stop]))
            if spans[k][1] > at + len(one):
                break
            k += 1
        at += len(one)
    runs: list[tuple[int, int]] = []
    for a, b in sorted(found):
        if runs and runs[-1][1] == a:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
    return tuple((a, 0, b, 0) for a, b in runs)


def _moved_wedge(wedge: Slice, rows: range, keys: Ranges) -> Iterator[Slice]:
    """Yield where the cells of a wedge lie: a band again, or, turned round, row by row."""
    at = 0
    for one in keys:
        part = wedge & Slice(wedge.i0, wedge.i1, at, at + len(one)) if wedge else wedge
        own = part.shift(0, -at) if part else part
        at += len(one)
        if not own:
            continue
        if one.step == rows.step > 0:
            yield own.shift(rows.start, one.start)
        elif one.step == rows.step:
            yield _turned(own, rows.start, one.start)
        else:
            for u in range(own.i0, own.i1):
                row = own & Slice(u, u + 1, own.j0, own.j1)
                yield Slice(rows[u], rows[u] + 1, *span(one[row.j0 : row.j1]))


def _turned(part: Slice, row: int, key: int) -> Slice:
    """Return the cells ``(row - u, key - v)`` of a slice."""
    apart = key - row
    return Slice(
        row - part.i1 + 1,
        row - part.i0 + 1,
        key - part.j1 + 1,
        key - part.j0 + 1,
        apart - part.hi,
        apart - part.lo,
    )
