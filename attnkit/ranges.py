"""Positions as lists of ranges: which tokens, and in what order. Knows nothing of torch.

A sequence of a kernel call, a rank's share of a batch, a message between two ranks: each has some
positions of an axis, in ranges. Costs follow the ranges, never the positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = [
    "Excerpt",
    "Ranges",
    "are_distinct",
    "ends_of",
    "extent_of",
    "in_order",
    "joined",
    "met",
    "picked",
    "places",
    "read_ranges",
    "shared",
    "sizes_of",
    "span",
    "total",
    "without",
]

Ranges = tuple[range, ...]
"""Positions in the order in which something has them: ranges of step 1 or -1, none of them empty.

Those that are "in order" rise, have step 1, and do not touch: they are a set, written in one way.
"""


@dataclass(frozen=True)
class Excerpt:
    """Rows and keys that are taken of one score matrix ``q_len x kv_len``, in this order.

    `batch` is the matrix's batch element (or packed sequence); None where all are alike.
    """

    q_len: int
    kv_len: int
    rows: Ranges
    keys: Ranges
    batch: int | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """How many rows and keys there are."""
        return total(self.rows), total(self.keys)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its score matrix, in order."""
        sides = ((self.rows, self.q_len), (self.keys, self.kv_len))
        return all(own == ((range(length),) if length else ()) for own, length in sides)


def sizes_of(excerpts: Iterable[Excerpt]) -> frozenset[tuple[int, int]]:
    """Return how many rows and keys excerpts have."""
    return frozenset(one.sizes for one in excerpts)


def extent_of(sizes: Iterable[tuple[int, int]]) -> tuple[int | None, int | None]:
    """Return the rows and the keys that all of some sizes have; None where they differ.

    >>> extent_of([(2, 4), (3, 4)])
    (None, 4)
    """
    q_lens, kv_lens = (set(lengths) for lengths in zip(*sizes, strict=True))
    return (
        q_lens.pop() if len(q_lens) == 1 else None,
        kv_lens.pop() if len(kv_lens) == 1 else None,
    )


def total(ranges: Ranges) -> int:
    """Return how many positions there are.

    >>> total((range(2), range(5, 8)))
    5
    """
    return sum(map(len, ranges))


def span(some: range) -> tuple[int, int]:
    """Return the first position of a range of step 1 or -1, and where it ends.

    >>> span(range(4, 1, -1))
    (2, 5)
    """
    return (some.start, some.stop) if some.step > 0 else (some[-1], some[0] + 1)


def are_distinct(ranges: Ranges, length: int) -> bool:
    """Whether ranges are of positions below a length, none of which occurs twice.

    >>> are_distinct((range(4, 6), range(3, 1, -1)), 6), are_distinct((range(3), range(2, 4)), 6)
    (True, False)
    """
    if len(ranges) == 1 and ranges[0].step == 1:  # as most are, and packed batches are long
        return 0 <= ranges[0].start < ranges[0].stop <= length
    if any(abs(one.step) != 1 or not one for one in ranges):
        return False
    spans = sorted(map(span, ranges))
    apart = all(a[1] <= b[0] for a, b in pairwise(spans))
    return apart and (not spans or (spans[0][0] >= 0 and spans[-1][1] <= length))


def joined(spans: Iterable[tuple[int, int]]) -> Ranges:
    """Return the positions in any of some spans ``(start, stop)``, in order.

    >>> joined([(4, 6), (0, 2), (2, 3), (5, 5)])
    (range(0, 3), range(4, 6))
    """
    out: list[range] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if out and start <= out[-1].stop:
            out[-1] = range(out[-1].start, max(stop, out[-1].stop))
        else:
            out.append(range(start, stop))
    return tuple(out)


def in_order(ranges: Iterable[range]) -> Ranges:
    """Return the same positions as a set.

    >>> in_order((range(5, 3, -1), range(4)))
    (range(0, 6),)
    """
    return joined(span(one) for one in ranges if one)


def shared(some: Ranges, others: Ranges) -> Ranges:
    """Return the positions that two lists in order have in common.

    >>> shared((range(4), range(6, 9)), (range(2, 7),))
    (range(2, 4), range(6, 7))
    """
    return tuple(_met(some, others))


def _met(some: Ranges, others: Ranges) -> Iterator[range]:
    a = b = 0
    while a < len(some) and b < len(others):
        start = max(some[a].start, others[b].start)
        stop = min(some[a].stop, others[b].stop)
        if start < stop:
            yield range(start, stop)
        if some[a].stop < others[b].stop:
            a += 1
        else:
            b += 1


def without(some: Ranges, others: Ranges) -> Ranges:
    """Return the positions of a list in order that another such list lacks.

    >>> without((range(8),), (range(2, 3), range(5, 9)))
    (range(0, 2), range(3, 5))
    """
    out: list[range] = []
    k = 0
    for one in some:
        at = one.start
        while k < len(others) and others[k].stop <= at:
            k += 1
        j = k
        while j < len(others) and others[j].start < one.stop:
            if at < others[j].start:
                out.append(range(at, others[j].start))
            at = others[j].stop
            j += 1
        if at < one.stop:
            out.append(range(at, one.stop))
    return tuple(out)


def places(some: Ranges, among: Ranges) -> Ranges:
    """Return where the positions of a list lie in another list that has all of them.

    Both are in order.

    >>> places((range(4, 5), range(8, 9)), (range(2, 5), range(7, 9)))
    (range(2, 3), range(4, 5))
    """
    starts = list(accumulate(map(len, among), initial=0))
    spans: list[tuple[int, int]] = []
    k = 0
    for one in some:
        at = one.start
        while at < one.stop:
            while among[k].stop <= at:
                k += 1
            stop = min(one.stop, among[k].stop)
            first = starts[k] + at - among[k].start
            spans.append((first, first + stop - at))
            at = stop
    return joined(spans)


def met(ranges: Ranges, start: int, stop: int) -> Iterator[tuple[int, range]]:
    """Yield the positions at the places ``start <= place < stop`` of a list, and where they begin.

    Places are counted from `start`.

    >>> list(met((range(5, 9), range(2, -1, -1)), 3, 6))
    [(0, range(8, 9)), (1, range(2, 0, -1))]
    """
    at = 0
    for one in ranges:
        if at >= stop:
            return
        if at + len(one) > start:
            yield max(at - start, 0), one[max(start - at, 0) : stop - at]
        at += len(one)


def picked(ranges: Ranges, places: Ranges) -> Ranges:
    """Return the positions at some places of a list, in the order of these.

    >>> picked((range(4, 8), range(2)), (range(5, 2, -1),))
    (range(1, -1, -1), range(7, 8))
    """
    starts = list(accumulate(map(len, ranges), initial=0))
    found: list[range] = []
    for one in places:
        first, stop = span(one)
        k = bisect_right(starts, first) - 1
        parts = [part for _, part in met(ranges[k:], first - starts[k], stop - starts[k])]
        found += parts if one.step > 0 else [part[::-1] for part in reversed(parts)]
    return _tidy(found)


def _tidy(ranges: Iterable[range]) -> Ranges:
    """Return the same positions in the same order, in few ranges and written in one way."""
    out: list[range] = []
    for one in ranges:
        last = out[-1] if out else range(0)
        apart = one.start - last[-1] if last and one else 0
        steps = {own.step for own in (last, one) if len(own) > 1} | {apart}
        if len(steps) == 1 and apart in (1, -1):
            out[-1] = range(last.start, one[-1] + apart, apart)
        elif one:
            out.append(range(one.start, one.start + 1) if len(one) == 1 else one)
    return tuple(out)


def ends_of(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """Return the ``(start, stop)`` of each: those that fall stop below where they start.

    >>> ends_of((range(2, 4), range(2, -1, -1)))
    ((2, 4), (2, -1))
    """
    return tuple((one.start, one.stop) for one in ranges)


def read_ranges(name: str, given: object, length: int | None = None) -> Ranges:
    """Return the positions that an argument gives: ranges, or the ``(start, stop)`` of ranges.

    One that falls stops below its start: ``(2, -1)`` has 2, 1, 0. They are distinct, and below
    `length`, where there is one.

    >>> read_ranges("rows", [(0, 2), range(2, 4), (9, 7)])
    (range(0, 4), range(9, 7, -1))
    """
    if not isinstance(given, (tuple, list)):
        raise CompositionTypeError(
            f"{name}={shown(given)}; give a list of ranges, or of (start, stop)"
        )
    found = _tidy(_range(name, one) for one in given)
    most = max((span(one)[1] for one in found), default=0) if length is None else length
    if not are_distinct(found, most):
        within = "" if length is None else f" of 0 to {length - 1}"
        raise CompositionError(
            f"{name}={shown(given)}; each position{within} is taken once at most"
        )
    return found


def _range(name: str, given: object) -> range:
    if isinstance(given, range) and (abs(given.step) == 1 or len(given) < 2):
        return given
    start, stop = given if isinstance(given, (tuple, list)) and len(given) == 2 else (None, None)
    if type(start) is not int or type(stop) is not int:
        raise CompositionTypeError(
            f"{name} has {shown(given)}; each entry is a range of step 1 or -1, or the two ints "
            "(start, stop) of one"
        )
    return range(start, stop, 1 if start <= stop else -1)
