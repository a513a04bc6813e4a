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
from typing import NamedTuple

from attnkit.geometry import Region, Slice
from attnkit.masks.base import Align, Mask, anchor
from attnkit.masks.blocks import BlockCausal, Chunked
from attnkit.masks.causal import Band, Causal, SlidingWindow
from attnkit.masks.documents import Documents
from attnkit.masks.padding import Padding
from attnkit.masks.rectangles import Columns, Prefix, Rows

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
        if mask.batches is None:
            region = mask.enclosure(self.q_len, self.kv_len).inner
            return self._replace(regions=(region,) * len(self.regions))
        planes = range(len(self.regions))
        return self._replace(
            regions=tuple(mask.enclosure(self.q_len, self.kv_len, b).inner for b in planes)
        )

    def meet(self, other: Cells) -> Cells:
        """Return the cells in both."""
        pairs = zip(self.regions, other.regions, strict=True)
        return self._replace(regions=tuple(a & b for a, b in pairs))

    def join(self, other: Cells) -> Cells:
        """Return the cells in either."""
        pairs = zip(self.regions, other.regions, strict=True)
        return self._replace(regions=tuple(a | b for a, b in pairs))

    def without(self, other: Cells) -> Cells:
        """Return the cells that are not in the other."""
        pairs = zip(self.regions, other.regions, strict=True)
        return self._replace(regions=tuple(a - b for a, b in pairs))

    def inside(self, other: Cells) -> bool:
        """Whether every cell is in the other."""
        return all(a <= b for a, b in zip(self.regions, other.regions, strict=True))

    @property
    def flipped(self) -> Cells:
        """The cells that are not in the set."""
        return self._replace(
            regions=tuple(r.complement(self.q_len, self.kv_len) for r in self.regions)
        )

    @property
    def anywhere(self) -> Region:
        """The cells that some batch element has."""
        return Region.union(dict.fromkeys(self.regions))

    @property
    def everywhere(self) -> Region:
        """The cells that every batch element has."""
        return reduce(Region.__and__, dict.fromkeys(self.regions))

    @property
    def aligns(self) -> tuple[Align, ...]:
        """The anchors that differ at this size."""
        both: tuple[Align, ...] = ("bottom_right", "top_left")
        return both[:1] if self.q_len == self.kv_len else both

    def __bool__(self) -> bool:
        return any(self.regions)


# -- bands ---------------------------------------------------------------------------------


def _best_band(left: int | None, right: int | None, align: Align) -> Mask | None:
    """Return the band by its best name."""
    if (left is None and right is None) or (
        left is not None and right is not None and left < -right
    ):
        return None
    if right == 0:
        return Causal(align) if left is None else SlidingWindow(left + 1, align)
    return Band(left, right, align)


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
        yield from _found(_best_band(*pair, align) for pair in ends)


def full_bands(cells: Cells, frame: Cells) -> Iterator[Mask]:
    """Propose the maximal bands that lie inside: every cell of every diagonal."""
    missing = Cells((cells.everywhere,), cells.q_len, cells.kv_len).flipped.regions[0]
    first, last = 1 - cells.q_len, cells.kv_len - 1
    for lo, hi in _gaps(((s.lo, s.hi + 1) for s in missing.slices), first, last + 1):
        for align in cells.aligns:
            at = anchor(align, cells.q_len, cells.kv_len)
            left = at - lo if lo > first else None
            right = hi - 1 - at if hi - 1 < last else None
            ends = [(left, right)]
            if right != 0 and hi > at >= lo and frame.inside(cells.of(Causal(align))):
                ends.append((left, 0))  # the frame ends there anyway
            yield from _found(_best_band(*pair, align) for pair in ends)


def _found(masks: Iterable[Mask | None]) -> Iterator[Mask]:
    return (mask for mask in masks if mask is not None)


def _gaps(spans: Iterable[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Return the maximal ranges of ``start <= x < stop`` that no span ``[a, b)`` touches."""
    out = []
    for a, b in sorted(spans):
        if a > start:
            out.append((start, a))
        start = max(start, b)
    return [*out, (start, stop)] if start < stop else out


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
    missing = Cells((cells.everywhere,), cells.q_len, cells.kv_len).flipped.regions[0].slices
    columns = _gaps(((s.j0, s.j1) for s in missing), 0, cells.kv_len)
    for start, stop in columns[:_FEW]:
        yield _columns(start, stop, cells.kv_len)
    for start, stop in _gaps(((s.i0, s.i1) for s in missing), 0, cells.q_len)[:_FEW]:
        yield Rows(start, None if stop == cells.q_len else stop)
    if len(cells.regions) > 1:
        yield from _prefixes(cells)


def _prefixes(cells: Cells) -> Iterator[Mask]:
    lengths = [
        min((s.j0 for s in missing.slices), default=cells.kv_len)
        for missing in cells.flipped.regions
    ]
    if len(set(lengths)) > 1:
        yield Prefix(lengths)


def rectangles(cells: Cells) -> Iterator[Mask]:
    """Propose the rectangles around the groups of rows that hold cells, if these are few."""
    parts = cells.anywhere.slices
    groups: list[Slice] = []
    for part in parts:
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
        finest = [_square_lengths(region, cells.q_len) for region in cells.regions]
        for lengths in (finest, [_without_empty(*one) for one in finest]):
            yield from _documents([one for one, _ in lengths], None)
    if square:
        return
    chains = [_chain(region, cells.q_len, cells.kv_len) for region in cells.regions]
    yield from _documents([rows for rows, _ in chains], [keys for _, keys in chains])


def _documents(
    rows: list[tuple[int, ...]], keys: list[tuple[int, ...]] | None
) -> Iterator[Documents]:
    same = len(set(rows)) == 1 and (keys is None or len(set(keys)) == 1)
    if max(map(len, rows)) > 1 and keys != rows:
        yield Documents(rows[0] if same else rows, keys if keys is None or not same else keys[0])


def _square_lengths(region: Region, length: int) -> tuple[tuple[int, ...], frozenset[int]]:
    """Return the lengths of the finest documents, and which of them hold no cell at all.

    A border at p is impossible where a cell has one index below p and the other not. In one
    slice, the cells to the right of the diagonal forbid one range of p, those to its left another.
    """
    spans: list[tuple[int, int]] = []
    for s in region.slices:
        right, left = s & _RIGHT, s & _LEFT
        spans += [(right.i0 + 1, right.j1)] if right else []
        spans += [(left.j0 + 1, left.i1)] if left else []
    borders = [p for a, b in _gaps(spans, 1, length) for p in range(a, b)]
    ends = [0, *borders, length]
    used = _used(region, length)
    empty = frozenset(
        k for k, (a, b) in enumerate(pairwise(ends)) if any(u <= a and b <= v for u, v in used)
    )
    return tuple(b - a for a, b in pairwise(ends)), empty


_WIDE = 1 << 62
_RIGHT = Slice(0, _WIDE, 0, _WIDE, lo=1)
_LEFT = Slice(0, _WIDE, 0, _WIDE, hi=-1)


def _used(region: Region, length: int) -> list[tuple[int, int]]:
    """Return the ranges of positions that neither ask nor are asked."""
    parts = region.slices
    touched = [(s.i0, s.i1) for s in parts] + [(s.j0, s.j1) for s in parts]
    return _gaps(touched, 0, length)


def _without_empty(
    lengths: tuple[int, ...], empty: frozenset[int]
) -> tuple[tuple[int, ...], frozenset[int]]:
    """Put neighbours that hold no cell into one document."""
    out: list[int] = []
    for k, length in enumerate(lengths):
        if k in empty and k - 1 in empty:
            out[-1] += length
        else:
            out.append(length)
    return tuple(out), frozenset()


def _chain(region: Region, q_len: int, kv_len: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the finest blocks along a falling chain, as lengths of rows and of keys."""
    highest, reach = [], 0
    for i0, i1, runs in region.strips:
        reach = max(reach, runs[-1][2] + runs[-1][3] * (i1 - i0 - 1))
        highest.append(reach)
    lowest, least = [], kv_len
    for strip in reversed(region.strips):
        least = min(least, strip.runs[0][0])
        lowest.append(least)
    lowest.reverse()
    rows, keys = [0], [0]
    for k, (i0, i1, _) in enumerate(region.strips):
        if i0 > rows[-1] and (k == 0 or highest[k - 1] <= lowest[k]):
            _pad(rows, keys, i0, keys[-1])  # rows that see nothing
        if k == 0 or highest[k - 1] <= lowest[k]:
            _pad(rows, keys, rows[-1], lowest[k])  # keys that nobody sees
        if k + 1 == len(region.strips) or highest[k] <= lowest[k + 1]:
            _pad(rows, keys, i1, highest[k])
    _pad(rows, keys, q_len, keys[-1])
    _pad(rows, keys, q_len, kv_len)
    return (
        tuple(b - a for a, b in pairwise(rows)) or (0,),
        tuple(b - a for a, b in pairwise(keys)) or (0,),
    )


def _pad(rows: list[int], keys: list[int], row: int, key: int) -> None:
    """Append a block up to this row and key, unless it is nothing."""
    if row > rows[-1] or key > keys[-1]:
        rows.append(row)
        keys.append(key)
