"""Strips: rows whose runs of keys have ends that move by 0 or 1 per row, and their algebra.

The machinery below `geometry.Region`. A set of cells is a tuple of strips from the top; taken
greedily (`Canonical`) they are a function of the set alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import NamedTuple

# A run of allowed keys in the first row of a strip, and how its ends move per row:
# (start, start_slope, stop, stop_slope), slopes 0 or 1.
Run = tuple[int, int, int, int]


class Strip(NamedTuple):
    """Rows ``i0 <= i < i1`` whose runs start at ``start + start_slope * (i - i0)``, and so on."""

    i0: int
    i1: int
    runs: tuple[Run, ...]


Span = tuple[int, int]
"""Keys ``start <= j < stop``."""

_FAR = 1 << 80  # further than any index
_MANY = 8  # runs of a row, of which those that one run meets are looked up


def advance(runs: tuple[Run, ...], rows: int) -> tuple[Run, ...]:
    """Return the runs `rows` rows further down."""
    if not rows:
        return runs
    return tuple((a + da * rows, da, b + db * rows, db) for a, da, b, db in runs)


def close_bounds(
    i0: int, i1: int, j0: int, j1: int, lo: int | None, hi: int | None
) -> tuple[int, int, int, int, int, int]:
    """Tighten every bound of a slice; an empty one becomes all zeros (with hi = -1)."""
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


def strip_area(strip: Strip) -> int:
    """Return the number of cells of a strip."""
    n = strip.i1 - strip.i0
    steps, area = n * (n - 1) // 2, 0
    for a, da, b, db in strip.runs:
        area += (b - a) * n + (db - da) * steps
    return area


class Canonical:
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
            self._start(i0 + 1, i1, advance(runs, 1))

    def _start(self, i0: int, i1: int, runs: tuple[Run, ...]) -> None:
        if i1 - i0 == 1:  # slopes of a single row mean nothing: keep them unique
            runs = tuple((a, 0, b, 0) for a, _, b, _ in runs)
        self.strips.append(Strip(i0, i1, runs))


def canonical(strips: tuple[Strip, ...]) -> tuple[Strip, ...] | None:
    """Return strips in their one form; None where runs overlap, touch, or do not move by 0 or 1."""
    out, row = Canonical(), 0
    for i0, i1, runs in strips:
        ends = [end for a, da, b, db in runs for end in ((a, da), (b, db))]
        whole = all(type(n) is int and type(step) is int for n, step in ends)
        if not whole or i0 < row or i1 <= i0 or any(step not in (0, 1) for _, step in ends):
            return None
        # Ends are lines: in order in the first and in the last row, they are in order between.
        for last in (0, i1 - i0 - 1):
            places = [n + step * last for n, step in ends]
            if any(x >= y for x, y in pairwise(places)):
                return None
        out.add(i0, i1, runs)
        row = i1
    return tuple(out.strips)


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
Table = tuple[bool, bool, bool, bool]
AND: Table = (False, False, False, True)
OR: Table = (False, True, True, True)
SUB: Table = (False, True, False, False)
XOR: Table = (False, True, True, False)


def combine(a: tuple[Strip, ...], b: tuple[Strip, ...], table: Table) -> tuple[Strip, ...]:
    """Apply a boolean operation by one sweep over the rows of both operands."""
    _, keep_a, keep_b, _ = table
    if not keep_a:
        a = _between(a, b)
    if not keep_b:
        b = _between(b, a)
    out = Canonical()
    if table is AND:
        if _holds(a, b):
            return b
        if _holds(b, a):
            return a
    if table is AND and _single(a) and _single(b):
        for one in a:
            for other in b:
                if other.i0 < one.i1 and one.i0 < other.i1:
                    _meet(out, one, other)
        return tuple(out.strips)
    for i0, i1, x, y in _overlay(a, b):
        if x and y:
            for r0, r1 in pairwise(_crossings(x, y, i0, i1)):
                runs = _combine_rows(advance(x, r0 - i0), advance(y, r0 - i0), table)
                out.add(r0, r1, runs)
        elif (x and keep_a) or (y and keep_b):
            out.add(i0, i1, x or y)
    return tuple(out.strips)


def _holds(a: tuple[Strip, ...], b: tuple[Strip, ...]) -> bool:
    """Whether the first is a rectangle that holds the second."""
    if len(a) != 1 or len(a[0].runs) != 1 or not b:
        return not b
    i0, i1, ((start, da, stop, db),) = a[0]
    if da or db or b[0].i0 < i0 or b[-1].i1 > i1:
        return False
    for top, bottom, runs in b:
        end, moves = runs[-1][2:]
        if runs[0][0] < start or end + moves * (bottom - top - 1) > stop:
            return False
    return True


def _single(strips: tuple[Strip, ...]) -> bool:
    """Whether these are a few strips of one run each."""
    return len(strips) <= 8 and all(len(strip.runs) == 1 for strip in strips)


def _meet(out: Canonical, one: Strip, other: Strip) -> None:
    """Append the cells of two strips of one run each: a slice, as either of them is one.

    Starts and stops stand still or move along a diagonal. The later start of each kind counts and
    the earlier stop; and of both kinds, one counts in the rows above some row, the other below.
    """
    top, bottom = max(one.i0, other.i0), min(one.i1, other.i1)
    start = low = -_FAR
    stop = high = _FAR
    for i0, _, ((a, da, b, db),) in (one, other):
        if da:
            low = max(low, a - i0)
        else:
            start = max(start, a)
        if db:
            high = min(high, b - i0)
        else:
            stop = min(stop, b)
    if start >= stop or low >= high:
        return
    top, bottom = max(top, start - high + 1), min(bottom, stop - low)
    if top >= bottom:
        return
    rows = {top, bottom}
    rows |= {row for row in (start - low, stop - high) if top < row < bottom}
    for i0, i1 in pairwise(sorted(rows)):
        a, da = (low + i0, 1) if low + i0 >= start else (start, 0)
        b, db = (high + i0, 1) if high + i0 < stop else (stop, 0)
        out.add(i0, i1, ((a, da, b, db),))


def inside(a: tuple[Strip, ...], b: tuple[Strip, ...]) -> bool:
    """Whether every cell of `a` is in `b`; known at the first row that has one outside.

    A run that lies in another of the same strip in its first and its last row does so in between,
    for their ends are lines. And it stays in the same one: to get into the next it would pass the
    gap between them.
    """
    b = _between(b, a)
    for i0, i1, x, y in _overlay(a, b):
        last = i1 - i0 - 1
        k = 0
        for p, dp, q, dq in x:
            while k < len(y) and y[k][2] <= p:
                k += 1
            if k == len(y):
                return False
            r, dr, s, ds = y[k]
            if r > p or s < q or r + dr * last > p + dp * last or s + ds * last < q + dq * last:
                return False
    return True


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
        x = advance(a[k].runs, i0 - a[k].i0) if k < len(a) and a[k].i0 <= i0 else ()
        y = advance(b[l].runs, i0 - b[l].i0) if l < len(b) and b[l].i0 <= i0 else ()
        yield i0, i1, x, y
        k += k < len(a) and a[k].i1 == i1
        l += l < len(b) and b[l].i1 == i1  # noqa: E741


def _crossings(a: tuple[Run, ...], b: tuple[Run, ...], i0: int, i1: int) -> list[int]:
    """Return the rows at which order changes: where a moving end meets a standing one, and after.

    Ends of one operand never meet each other, so only pairs across operands count.
    """
    rows = {i0, i1}
    for one, other in ((a, b), (b, a)):
        moving = [x for p, dp, q, dq in one if dp or dq for x, dx in ((p, dp), (q, dq)) if dx]
        for x in moving:
            far = x + i1 - i0
            for k in range(bisect_left(other, x, key=_stop), len(other)):
                p, dp, q, dq = other[k]
                if p >= far:
                    break
                for y in [p] * (not dp) + [q] * (not dq):
                    if x <= y < far:
                        rows |= {i0 + y - x, i0 + y - x + 1}
    return sorted(rows)


def _start(run: Run) -> int:
    return run[0]


def _stop(run: Run) -> int:
    return run[2]


def _combine_rows(a: tuple[Run, ...], b: tuple[Run, ...], table: Table) -> tuple[Run, ...]:
    """Combine two run lists whose ends keep their order over the rows in question."""
    if table is AND:
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
    if len(a) == 1 and len(b) > _MANY:
        first = bisect_right(b, a[0][0], key=_stop)
        some = b[first : bisect_left(b, a[0][2], key=_start)]
        return (*_intersect_rows(a, some[:1]), *some[1:-1], *_intersect_rows(a, some[1:][-1:]))
    if len(b) == 1 and len(a) > _MANY:
        first = bisect_right(a, b[0][0], key=_stop)
        some = a[first : bisect_left(a, b[0][2], key=_start)]
        return (*_intersect_rows(some[:1], b), *some[1:-1], *_intersect_rows(some[1:][-1:], b))
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


def union_all(parts: list[tuple[Strip, ...]]) -> tuple[Strip, ...]:
    """Return the union of many sets, pairwise, so that n of them cost n log n.

    Those that share no row lie between each other's strips, and need no sweep.
    """
    if len(parts) > 2 and (apart := _interleaved(parts)) is not None:
        return apart
    while len(parts) > 1:
        merged = [union(x, y) for x, y in zip(parts[::2], parts[1::2], strict=False)]
        parts = merged + parts[len(parts) - len(parts) % 2 :]
    return parts[0] if parts else ()


def _interleaved(parts: list[tuple[Strip, ...]]) -> tuple[Strip, ...] | None:
    """Return the union of sets that share no row; None where they do."""
    strips = sorted(chain.from_iterable(parts), key=lambda strip: strip.i0)
    if any(above.i1 > below.i0 for above, below in pairwise(strips)):
        return None
    out = Canonical()
    for strip in strips:
        out.add(*strip)
    return tuple(out.strips)


def union(a: tuple[Strip, ...], b: tuple[Strip, ...]) -> tuple[Strip, ...]:
    """Return the union of two sets that are not empty; one below the other needs no sweep."""
    if a[-1].i1 > b[0].i0:
        return combine(a, b, OR)
    out = Canonical()
    out.strips = list(a)
    for k, strip in enumerate(b):
        out.add(*strip)
        if out.strips[-1] == strip:  # the seam has no further effect
            return (*out.strips, *b[k + 1 :])
    return tuple(out.strips)


Ends = tuple[int, int, int, int]
"""A block ``(i0, i1, j0, j1)``: rows i0 <= i < i1 and keys j0 <= j < j1."""


def diagonal_chain(strips: tuple[Strip, ...], q_len: int, kv_len: int) -> list[Ends]:
    """Return the finest chain of blocks down the diagonal that holds all cells of some strips.

    Rows and keys are covered without gaps and in order: rows that hold nothing are a block
    without keys, keys that no row has a block without rows.
    """
    out: list[Ends] = []
    row = key = 0
    for i0, i1, j0, j1 in (*_components(strips), (q_len, q_len, kv_len, kv_len)):
        out += [(row, i0, key, key)] * (i0 > row) + [(i0, i0, key, j0)] * (j0 > key)
        out += [(i0, i1, j0, j1)] * (i1 > i0)
        row, key = i1, j1
    return out


def seen_spans(strips: Iterable[tuple[int, int, tuple[Run, ...]]], gap: int = 0) -> list[Span]:
    """Return the keys that some row sees, as maximal ranges in order; small gaps are closed.

    >>> seen_spans([Strip(0, 2, ((0, 0, 3, 1),)), Strip(4, 5, ((6, 0, 9, 0),))])
    [(0, 4), (6, 9)]
    """
    # The runs of a strip overlap from row to row: each leaves one range behind.
    runs = sorted((a, b + db * (i1 - i0 - 1)) for i0, i1, found in strips for a, _, b, db in found)
    spans: list[Span] = []
    for a, b in runs:
        if spans and a <= spans[-1][1] + gap:
            spans[-1] = (spans[-1][0], max(spans[-1][1], b))
        else:
            spans.append((a, b))
    return spans


def gaps(spans: Iterable[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Return the maximal ranges of ``start <= x < stop`` that no span ``[a, b)`` touches.

    >>> gaps([(4, 6), (1, 2)], 0, 9)
    [(0, 1), (2, 4), (6, 9)]
    """
    out = []
    for a, b in (*sorted(spans), (stop, stop)):
        if min(a, stop) > start:
            out.append((start, min(a, stop)))
        start = max(start, b)
    return out


def _components(strips: tuple[Strip, ...]) -> list[Ends]:
    """Return bounding rectangles of strips, joined until no two share a key or fall back.

    A strip one key wide down the diagonal may have taken in the first row of the block below
    it (a document of one token above a causal one), so its last row is tried apart.
    """
    chain: list[Ends] = []
    apart: set[Ends] = set()
    for i0, i1, runs in strips:
        diagonal = len(runs) == 1 and runs[0] == (runs[0][0], 1, runs[0][0] + 1, 1)
        cut = i1 - 1 if diagonal and i1 - i0 > 1 else i0
        if cut > i0:
            _append(chain, (i0, cut, runs[0][0], runs[0][0] + cut - i0))
            key = runs[0][0] + cut - i0
            tail = (cut, i1, key, key + 1)
            _append(chain, tail)
            if chain[-1] == tail:
                apart.add(tail)
            continue
        ends = (runs[0][0], runs[-1][2] + runs[-1][3] * (i1 - i0 - 1))
        _append(chain, (i0, i1, *ends))
    for k in range(len(chain) - 1, 0, -1):
        if chain[k] in apart:
            tail, before = chain.pop(k), chain[k - 1]
            chain[k - 1] = (before[0], tail[1], before[2], tail[3])
    return chain


def _append(chain: list[Ends], one: Ends) -> None:
    i0, i1, j0, j1 = one
    while chain and chain[-1][3] > j0:
        before = chain.pop()
        i0, j0, j1 = before[0], min(before[2], j0), max(before[3], j1)
    chain.append((i0, i1, j0, j1))
