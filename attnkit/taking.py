"""Rows and keys that are taken out of strips: `Region.take`, `Region.seen`.

In a row, a run of keys is two ends. Of keys that rise, as many are taken below each end as there
are, whatever lies between: so a run becomes one run, and each end stands still or moves as long
as it meets no border of a range. Costs follow the strips and the borders that ends meet, and
never the positions.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise

from attnkit.ranges import Ranges, span
from attnkit.strips import Canonical, Run, Strip, advance

__all__ = ["rows_of", "taken"]

_MANY = 8  # runs of a row, of which those among the keys are looked up


def rows_of(strips: tuple[Strip, ...], rows: range) -> Iterator[Strip]:
    """Yield what strips have of a range of rows, from the top.

    >>> list(rows_of((Strip(0, 9, ((0, 0, 1, 1),)),), range(4, 6)))
    [Strip(i0=4, i1=6, runs=((0, 0, 5, 1),))]
    """
    first, stop = span(rows)
    for k in range(bisect_right(strips, first, key=_bottom), len(strips)):
        i0, i1, runs = strips[k]
        if i0 >= stop:
            return
        top = max(i0, first)
        yield Strip(top, min(i1, stop), advance(runs, top - i0))


def taken(strips: tuple[Strip, ...], rows: Ranges, keys: Ranges) -> tuple[Strip, ...]:
    """Return the strips of ``{(u, v): (rows[u], keys[v]) is in them}``; all ranges have step 1.

    >>> causal = (Strip(0, 8, ((0, 0, 1, 1),)),)
    >>> taken(causal, (range(2), range(6, 8)), (range(1, 3), range(7, 8)))
    (Strip(i0=1, i1=4, runs=((0, 0, 1, 1),)),)
    """
    out, columns, first = Canonical(), _TakenKeys(keys), 0
    for one in rows:
        for strip in rows_of(strips, one):
            for i0, i1, runs in columns.of(strip):
                out.add(first + i0 - one.start, first + i1 - one.start, runs)
        first += len(one)
    return tuple(out.strips)


class _Rising:
    """Keys that rise, and where the first of them is among all that are taken."""

    def __init__(self, keys: list[range], first: int) -> None:
        self.starts = [one.start for one in keys]
        self.stops = [one.stop for one in keys]
        self.places = [first]
        for one in keys:
            self.places.append(self.places[-1] + len(one))

    def place(self, x: int, moves: int) -> tuple[int, int]:
        """Return where an end is among the keys that are taken, and whether it moves there."""
        k = bisect_right(self.starts, x) - 1
        if k < 0:
            return self.places[0], 0
        if x >= self.stops[k]:
            return self.places[k + 1], 0
        return self.places[k] + x - self.starts[k], moves


class _TakenKeys:
    """The keys that are taken, as groups of keys that rise."""

    def __init__(self, keys: Ranges) -> None:
        self.starts = sorted(one.start for one in keys)
        self.stops = sorted(one.stop for one in keys)
        self.groups: list[_Rising] = []
        first = k = 0
        while k < len(keys):
            n = k + 1
            while n < len(keys) and keys[n].start >= keys[n - 1].stop:
                n += 1
            self.groups.append(_Rising(list(keys[k:n]), first))
            first, k = self.groups[-1].places[-1], n

    def of(self, strip: Strip) -> Iterator[Strip]:
        """Yield the rows of a strip, as they are among these keys; without empty ones."""
        if not self.groups:
            return
        i0, i1, runs = strip
        if len(runs) > _MANY:
            low = bisect_right(runs, self.starts[0] - (i1 - i0), key=_stop)
            runs = runs[low : bisect_left(runs, self.stops[-1], key=_start)]
        for a, b in pairwise(self._cuts(runs, i1 - i0)):
            if found := self._placed(advance(runs, a)):
                yield Strip(i0 + a, i0 + b, found)

    def _cuts(self, runs: tuple[Run, ...], rows: int) -> list[int]:
        """Return the rows between which no end meets a border of a range.

        An end that enters a range is cut behind it, too: it may be where another one stands, and
        a row further on it is not.
        """
        found = {0, rows}
        ends = [x for a, da, b, db in runs for x in [a] * da + [b] * db] if rows > 1 else []
        for x in ends:
            entered = self.starts[bisect_left(self.starts, x) : bisect_left(self.starts, x + rows)]
            left = self.stops[bisect_left(self.stops, x) : bisect_left(self.stops, x + rows)]
            found.update(border - x for border in (*entered, *left))
            found.update(border - x + 1 for border in entered)
        return sorted(found)

    def _placed(self, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        """Return runs as they are among these keys; those without a key between them join."""
        out: list[Run] = []
        for group in self.groups:
            for a, da, b, db in runs:
                start, moves = group.place(a, da)
                stop, follows = group.place(b, db)
                if start >= stop:
                    continue
                if out and out[-1][2] == start:
                    start, moves = out.pop()[:2]
                out.append((start, moves, stop, follows))
        return tuple(out)


def _bottom(strip: Strip) -> int:
    return strip.i1


def _start(run: Run) -> int:
    return run[0]


def _stop(run: Run) -> int:
    return run[2]
