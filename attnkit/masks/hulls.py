"""Parameters of named masks, read off a region.

For a set of cells R each family has at most a few members worth trying: the tightest one that
holds R (`outer`), and the largest one that R, together with cells that do not matter, holds
(`inner`). Both only propose: `masks.naming` decides by comparing regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import pairwise
from operator import and_, or_, sub
from typing import NamedTuple

from attnkit.geometry import Region, Slice
from attnkit.masks.base import Align, Mask, anchor
from attnkit.masks.blocks import BlockCausal, Chunked
from attnkit.masks.causal import Band, Causal, SlidingWindow
from attnkit.masks.documents import Documents
from attnkit.masks.padding import Padding
from attnkit.masks.rectangles import Columns, Prefix, Rows
from attnkit.strips import diagonal_chain, gaps

__all__ = [
    "Cells",
    "bands",
    "chunks",
    "documents",
    "full_bands",
    "key_ranges",
    "lines",
    "rectangles",
    "row_ranges",
]

_FEW = 4  # how many of a kind are worth proposing


class Cells(NamedTuple):
    """A set of cells for each batch element, in score matrices of one size."""

    regions: tuple[Region, ...]
    q_len: int
    kv_len: int

    def of(self, mask: Mask) -> Cells:
        """Return the cells of a mask, for the same batch and size."""
        batch = len(self.regions)
        apart = 1 if mask.batches is None else batch
        found = (mask.enclosure(self.q_len, self.kv_len, b).inner for b in range(apart))
        return self._replace(regions=tuple(found) * (batch // apart))

    def meet(self, other: Cells) -> Cells:
        """Return the cells in both."""
        return self._replace(regions=tuple(map(and_, self.regions, other.regions)))

    def join(self, other: Cells) -> Cells:
        """Return the cells in either."""
        return self._replace(regions=tuple(map(or_, self.regions, other.regions)))

    def without(self, other: Cells) -> Cells:
        """Return the cells that are not in the other."""
        return self._replace(regions=tuple(map(sub, self.regions, other.regions)))

    def inside(self, other: Cells) -> bool:
        """Whether every cell is in the other."""
        return all(a <= b for a, b in zip(self.regions, other.regions, strict=True))

    @property
    def anywhere(self) -> Region:
        """The cells that some batch element has."""
        return Region.union(dict.fromkeys(self.regions))

    @property
    def missing(self) -> tuple[Slice, ...]:
        """The cells that some batch element has not."""
        everywhere = reduce(and_, dict.fromkeys(self.regions))
        return everywhere.complement(self.q_len, self.kv_len).slices

    @property
    def aligns(self) -> tuple[Align, ...]:
        """The anchors that differ at this size."""
        both: tuple[Align, ...] = ("bottom_right", "top_left")
        return both[:1] if self.q_len == self.kv_len else both

    def __bool__(self) -> bool:
        return any(self.regions)


# -- bands ---------------------------------------------------------------------------------


def _named(ends: Iterable[tuple[int | None, int | None]], align: Align) -> Iterator[Mask]:
    """Return the bands with these ends by their best names; none that holds all or nothing."""
    for left, right in ends:
        if left is right is None:
            continue
        if right == 0 and (left is None or left >= 0):
            yield Causal(align) if left is None else SlidingWindow(left + 1, align)
        elif left is None or right is None or left >= -right:
            yield Band(left, right, align)


def bands(cells: Cells) -> Iterator[Mask]:
    """Propose bands that hold all cells: the tightest, and each of its sides alone."""
    hull = cells.anywhere.bounds
    if hull is None:
        return
    for align in cells.aligns:
        at = anchor(align, cells.q_len, cells.kv_len)
        left = at - hull.lo if hull.lo > 1 - cells.q_len else None
        right = hull.hi - at if hull.hi < cells.kv_len - 1 else None
        ends = [(left, right), (left, None), (None, right)]
        if right is not None and right < 0:
            ends += [(left, 0), (None, 0)]
        yield from _named(ends, align)


def full_bands(cells: Cells, frame: Cells) -> Iterator[Mask]:
    """Propose the maximal bands that lie inside: every cell of every diagonal."""
    first, last = 1 - cells.q_len, cells.kv_len - 1
    for lo, hi in gaps(((s.lo, s.hi + 1) for s in cells.missing), first, last + 1):
        for align in cells.aligns:
            at = anchor(align, cells.q_len, cells.kv_len)
            left = at - lo if lo > first else None
            right = hi - 1 - at if hi - 1 < last else None
            ends = [(left, right)]
            if right != 0 and hi > at >= lo and frame.inside(cells.of(Causal(align))):
                ends.append((left, 0))  # the frame ends there anyway
            yield from _named(ends, align)


# -- rectangles ----------------------------------------------------------------------------


def key_ranges(cells: Cells) -> Iterator[Mask]:
    """Propose the range of keys that holds all cells, and where each batch element ends."""
    hull = cells.anywhere.bounds
    if hull is None:
        return
    whole = hull.j0 == 0 and hull.j1 == cells.kv_len
    if not whole:
        yield _columns(hull.j0, hull.j1, cells.kv_len)
    if len(cells.regions) > 1:
        ends = [region.bounds for region in cells.regions]
        stops = [end.j1 if end else 0 for end in ends]
        if len(set(stops)) > 1:
            yield Padding(stops)
        sizes = [cells.kv_len - end.j0 if end else 0 for end in ends]
        if len(set(sizes)) > 1:
            yield Padding(sizes, side="left")


def row_ranges(cells: Cells) -> Iterator[Mask]:
    """Propose the range of rows that holds all cells."""
    hull = cells.anywhere.bounds
    if hull is not None and (hull.i0 > 0 or hull.i1 < cells.q_len):
        yield Rows(hull.i0, None if hull.i1 == cells.q_len else hull.i1)


def _columns(start: int, stop: int, kv_len: int) -> Mask:
    if start == 0:
        return Prefix(stop)
    return Columns(start, None if stop == kv_len else stop)


def lines(cells: Cells) -> Iterator[Mask]:
    """Propose the columns and the rows that lie inside, whole."""
    missing = cells.missing
    columns = gaps(((s.j0, s.j1) for s in missing), 0, cells.kv_len)
    for start, stop in columns[:_FEW]:
        yield _columns(start, stop, cells.kv_len)
    for start, stop in gaps(((s.i0, s.i1) for s in missing), 0, cells.q_len)[:_FEW]:
        yield Rows(start, None if stop == cells.q_len else stop)
    absent = [region.complement(cells.q_len, cells.kv_len).slices for region in cells.regions]
    lengths = [min((s.j0 for s in parts), default=cells.kv_len) for parts in absent]
    if len(set(lengths)) > 1:
        yield Prefix(lengths)


def rectangles(cells: Cells) -> Iterator[Mask]:
    """Propose the rectangles around the groups of rows that hold cells, if these are few."""
    groups: list[Slice] = []
    for part in cells.anywhere.slices:
        last = groups[-1] if groups else None
        if last is not None and part.i0 < last.i1 + (part.j0 < last.j1):
            low, high = min(last.j0, part.j0), max(last.j1, part.j1)
            groups[-1] = Slice(last.i0, max(last.i1, part.i1), low, high)
        else:
            groups.append(Slice(part.i0, part.i1, part.j0, part.j1))
        if len(groups) > _FEW:
            return
    for group in groups:
        # The corner of a triangle that is not there may still belong to the square.
        square = Slice(*(2 * (min(group.i0, group.j0), max(group.i1, group.j1))))
        for s in dict.fromkeys((group, square)):
            if s.i1 <= cells.q_len and s.j1 <= cells.kv_len:
                yield Rows(s.i0, s.i1) & Columns(s.j0, s.j1)


# -- blocks --------------------------------------------------------------------------------


def chunks(cells: Cells) -> Iterator[Mask]:
    """Propose chunks and causal blocks, of the distances between borders that occur most."""
    region = cells.regions[0]
    borders = sorted(
        {e for _, _, runs in region.strips for a, da, b, db in runs for e in (a, b)[da : 2 - db]}
    )
    rows = sorted({row for i0, i1, _ in region.strips for row in (i0, i1)})
    distances = Counter(b - a for ends in (borders, rows) for a, b in pairwise(ends))
    longest = max(cells.q_len, cells.kv_len)
    sizes = [size for size, _ in distances.most_common(_FEW)] + borders[1:2] + rows[1:2]
    # More chunks than strips would show as borders; they would also be slow to compare.
    smallest = max(2, longest // (2 * len(region.strips) + 8))
    for size in dict.fromkeys(size for size in sizes if smallest <= size < longest):
        for align in cells.aligns:
            if 2 * size <= longest:  # two unequal blocks are documents to everyone
                yield Chunked(size, align)
            yield BlockCausal(size, align)


def documents(cells: Cells, *, square: bool = False) -> Iterator[Documents]:
    """Propose the finest block diagonals that hold all cells; `square`: of square blocks only."""
    if cells.q_len == cells.kv_len:
        each = [_square_lengths(region, cells.q_len) for region in cells.regions]
        for lengths in zip(*each, strict=True):
            yield from _documents(list(lengths), None)
    if square:
        return
    chains = [diagonal_chain(r.strips, cells.q_len, cells.kv_len) for r in cells.regions]
    rows = [tuple(i1 - i0 for i0, i1, _, _ in chain) for chain in chains]
    yield from _documents(rows, [tuple(j1 - j0 for _, _, j0, j1 in chain) for chain in chains])


def _documents(
    rows: list[tuple[int, ...]], keys: list[tuple[int, ...]] | None
) -> Iterator[Documents]:
    same = len(set(rows)) == 1 and (keys is None or len(set(keys)) == 1)
    if max(map(len, rows)) > 1 and keys != rows:
        yield Documents(rows[0] if same else rows, keys if keys is None or not same else keys[0])


def _square_lengths(region: Region, length: int) -> Iterator[tuple[int, ...]]:
    """Return the lengths of the finest documents; then with neighbours without a cell as one.

    A border at p is impossible where a cell has one index below p and the other not. In one
    slice, the cells to the right of the diagonal forbid one range of p, those to its left another.
    """
    parts = region.slices
    spans: list[tuple[int, int]] = []
    for s in parts:
        right, left = s & _RIGHT, s & _LEFT
        spans += [(right.i0 + 1, right.j1)] if right else []
        spans += [(left.j0 + 1, left.i1)] if left else []
    borders = [p for a, b in gaps(spans, 1, length) for p in range(a, b)]
    # The positions that neither ask nor are asked.
    unused = gaps([(s.i0, s.i1) for s in parts] + [(s.j0, s.j1) for s in parts], 0, length)
    needed = [p for p in borders if not any(a < p < b for a, b in unused)]
    for ends in ([0, *borders, length], [0, *needed, length]):
        yield tuple(b - a for a, b in pairwise(ends))


_WIDE = 1 << 62
_RIGHT = Slice(0, _WIDE, 0, _WIDE, lo=1)
_LEFT = Slice(0, _WIDE, 0, _WIDE, hi=-1)
