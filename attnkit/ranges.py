"""Positions as lists of ranges: which tokens, and in what order. Knows nothing of torch.

A sequence of a kernel call, a rank's share of a batch, a message between two ranks: each has some
positions of an axis, in ranges. Costs follow the ranges, never the positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

__all__ = [
    "Excerpt",
    "Ranges",
    "are_distinct",
    "in_order",
    "joined",
    "places",
    "shared",
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
