"""Tokens laid end to end in stretches, of which each rank takes some from both ends.

The machinery below `parallel.balance`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from attnkit.geometry import RowCount
from attnkit.parallel.load import Load
from attnkit.ranges import Ranges, total

__all__ = ["Chain", "Stretch", "Untaken", "stretches"]

Spans = list[tuple[int, int]]

_GRAIN = 16  # blocks and lines of fewer tokens than such a part of a rank's are laid together


class Stretch(NamedTuple):
    """Tokens ``start ... stop - 1``, in order or folded: from both ends by turns.

    Those of a `level` one count as its mean: no row has much more.
    """

    start: int
    stop: int
    folded: bool = False
    level: bool = False

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self.stop - self.start

    def cells(self, load: Load, count: int | None = None) -> int:
        """Return the cells of the first tokens."""
        count = self.size if count is None else count
        if self.level:
            whole = load.before(self.stop) - load.before(self.start)
            return whole * count // self.size
        back = count // 2 if self.folded else 0
        front = load.before(self.start + count - back) - load.before(self.start)
        return front + (load.before(self.stop) - load.before(self.stop - back) if back else 0)

    def spans(self, first: int, last: int) -> Spans:
        """Return where the tokens lie from a first to before a last one."""
        if not self.folded:
            return [(self.start + first, self.start + last)]
        front = self.start + (first + 1) // 2, self.start + (last + 1) // 2
        return [front, (self.stop - last // 2, self.stop - first // 2)]


def stretches(load: Load, own: int, within: float) -> Iterator[Stretch]:
    """Yield all tokens in stretches, from the top, for ranks that have `own` tokens each.

    Blocks of few tokens are laid together, and blocks of less than a rank has stay whole: what is
    in one stretch mostly comes to one rank.
    """
    grain = max(1, own // _GRAIN)
    borders = (*load.borders, range(load.length, load.length + 1))
    stops = [one.stop for one in borders]
    start = 0
    while start < load.length:
        stop = _last_border(borders, stops, start + grain)
        if stop > start:
            yield Stretch(start, stop)
        else:
            after = start + grain + 1
            stop = max(after, borders[bisect_right(stops, after)].start)
            yield from _parts(load, start, stop, own, within)
        start = stop


def _last_border(borders: Ranges, stops: list[int], until: int) -> int:
    """Return the last border up to a row; 0 where there is none."""
    k = bisect_right(stops, until)
    if k < len(borders) and borders[k].start <= until:
        return until
    return stops[k - 1] - 1 if k else 0


def _parts(load: Load, start: int, stop: int, own: int, within: float) -> Iterator[Stretch]:
    """Yield a block as stretches whose tokens have as many cells each, or pairs of them have."""
    lines = list(load.between(start, stop))
    mean = (1 + within) * load.cells((range(start, stop),)) / (stop - start)
    if max(max(one.first, load.at(one.i1 - 1)) for one in lines) <= mean:
        yield Stretch(start, stop, level=True)
        return
    ends = {place for one in lines for place in (one.i0, one.i1 - 1)}
    if all(load.at(row) + load.at(start + stop - 1 - row) <= 2 * mean for row in ends):
        yield Stretch(start, stop, folded=True)
        return
    if stop - start <= own:
        yield Stretch(start, stop)
    else:
        yield from _apart(lines, max(1, own // _GRAIN))


def _apart(lines: Sequence[RowCount], grain: int) -> Iterator[Stretch]:
    """Yield each line for itself, short neighbouring ones together."""
    few, stop = lines[0].i0, lines[-1].i1  # few: where the short ones began
    for i0, i1, _, step in lines:
        if i1 - i0 >= grain:
            if few < i0:
                yield Stretch(few, i0)
            yield Stretch(i0, i1, folded=step != 0)
            few = i1
        elif i1 - few >= grain:
            yield Stretch(few, i1)
            few = i1
    if few < stop:
        yield Stretch(few, stop)


class Chain:
    """Stretches laid end to end: places ``0 ... length - 1`` of it are tokens."""

    def __init__(self, load: Load, stretches: Sequence[Stretch]) -> None:
        self.load, self.stretches = load, stretches
        self.starts = list(accumulate((one.size for one in stretches), initial=0))
        self.sums = list(accumulate((one.cells(load) for one in stretches), initial=0))

    def before(self, place: int) -> int:
        """Return the cells of all tokens before a place."""
        k = bisect_right(self.starts, place) - 1
        if k == len(self.stretches):
            return self.sums[k]
        return self.sums[k] + self.stretches[k].cells(self.load, place - self.starts[k])

    def spans(self, first: int, last: int) -> Spans:
        """Return the tokens of some places."""
        found: Spans = []
        k = bisect_right(self.starts, first) - 1
        while first < last:
            at, end = self.starts[k], min(last, self.starts[k + 1])
            found += self.stretches[k].spans(first - at, end - at)
            first, k = end, k + 1
        return found


class Untaken:
    """The places of a line that are not taken yet, as a ring: behind the last comes the first."""

    def __init__(self, line: Chain, places: Ranges) -> None:
        self.line, self.places = line, places
        self.count = total(places)
        self.starts = list(accumulate(map(len, places), initial=0))
        parts = (line.before(one.stop) - line.before(one.start) for one in places)
        self.sums = list(accumulate(parts, initial=0))

    def before(self, number: int) -> int:
        """Return the cells of the first places."""
        k = bisect_right(self.starts, number) - 1
        if k == len(self.places):
            return self.sums[k]
        start = self.places[k].start
        return (
            self.sums[k]
            + self.line.before(start + number - self.starts[k])
            - self.line.before(start)
        )

    def cells(self, first: int, size: int) -> int:
        """Return the cells of `size` places from the first on, counted around the ring."""
        first %= self.count
        last = first + size
        if last <= self.count:
            return self.before(last) - self.before(first)
        return self.sums[-1] - self.before(first) + self.before(last - self.count)

    def window(self, first: int, size: int) -> Ranges:
        """Return these places in the line."""
        first = first % self.count if self.count else 0
        last = first + size
        return (*self._slice(first, min(last, self.count)), *self._slice(0, last - self.count))

    def _slice(self, first: int, last: int) -> Ranges:
        each = zip(self.places, self.starts, strict=False)
        cut = (one[max(first - at, 0) : max(last - at, 0)] for one, at in each)
        return tuple(one for one in cut if one)

    def fair(self, size: int, within: float, most: float) -> Ranges:
        """Return `size` places of the line that have their share of the cells.

        Those of the beginning, or of the end, if they have it `within` some part of it, and the
        others then no more than `most` per token. Else some of both: one place further the cells
        change by what two rows differ in, so that the nearest of two neighbours is within half of
        that; and the one with more is better for the others, if it has no more than `most`.
        Should both ends be too dense, or both too light, then the ring is walked around: the mean
        over it is what is wanted, so that it is met somewhere.
        """
        others, wanted = self.count - size, self.sums[-1] * size
        if not others or not size:
            return self.window(0, size)
        for first in (0, others):
            cells = self.cells(first, size)
            even = abs(cells * self.count - wanted) <= within * wanted
            if even and cells <= most * size and self.sums[-1] - cells <= most * others:
                return self.window(first, size)

        def over(first: int) -> int:
            return self.cells(first, size) * self.count - wanted

        low = others
        while (over(low) > 0) == (over(low + size) > 0) and over(low):
            low += size
        less, more = _crossing(over, low, low + size)
        if self.cells(more, size) <= most * size:  # the better for the others
            return self.window(more, size)
        finer = self._finer(less, size, over(less), over(more)) if low == others else None
        if finer is not None:
            return finer
        return self.window(more if abs(over(more)) < abs(over(less)) else less, size)

    def _finer(self, first: int, size: int, under: int, over: int) -> Ranges | None:
        """Return some places less far from the end for those of the end, where that is nearer.

        These have alike rows, so that cells change by little from place to place.
        """
        front, back = first + size - self.count, self.count - first
        nearest = min(-under, over)

        def off(first: int) -> int:
            return (
                under + (self.cells(first, back) - self.cells(self.count - back, back)) * self.count
            )

        step = 1
        while first - step >= front and off(first - step) < 0:
            step *= 2
        if first - step < front:
            return None
        less, more = _crossing(off, first - step, first - step // 2)
        best = min((less, more), key=lambda at: abs(off(at)))
        if abs(off(best)) >= nearest:
            return None
        return (*self.window(0, front), *self.window(best, back))


def _crossing(over: Callable[[int], int], low: int, high: int) -> tuple[int, int]:
    """Return two neighbours between two places: at the first it is at most 0, at the other not."""
    rises = over(low) <= 0
    while high - low > 1:
        middle = (low + high) // 2
        if (over(middle) <= 0) == rises:
            low = middle
        else:
            high = middle
    return (low, high) if rises else (high, low)
