"""`Load`: how many cells each row of an axis of queries has, which is what a sharding evens out."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import lcm

from attnkit.arguments import check_int
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, RowCount, Strip
from attnkit.layouts import SeqLens
from attnkit.masks import Full, Mask
from attnkit.parallel.plane import diagonal
from attnkit.parallel.sharding import Sharding
from attnkit.planner.matrices import Matrices
from attnkit.planner.request import state_of
from attnkit.ranges import Ranges, joined, shared

__all__ = ["Load", "load_of", "planes_of"]


@dataclass(frozen=True)
class Load:
    """How many cells each row has, and between which rows an axis falls into independent blocks.

    `lines` cover the rows ``0 ... length - 1`` in order, also those without cells. `borders` are
    the rows b whose keys, and those of all rows below, lie behind the keys of all rows above b:
    no two rows of different blocks see the same key. `exact` tells whether the cells are those of
    the mask; else they are those of the smallest region that is known to hold it.

    Costs follow the strips of the regions, never their cells.

    >>> from attnkit import masks
    >>> load = Load.of({masks.Documents([2, 3]).region(5, 5): 1}, 5)
    >>> load.lines
    (RowCount(i0=0, i1=2, first=2, step=0), RowCount(i0=2, i1=5, first=3, step=0))
    >>> load.borders, load.cells((range(1, 3),)), load.before(3), list(load.between(1, 3))[0]
    ((range(2, 3),), 5, 7, RowCount(i0=1, i1=2, first=2, step=0))
    >>> load.of_ranks(Sharding.contiguous(5, 2))
    (7, 6)
    """

    length: int
    lines: tuple[RowCount, ...]
    borders: Ranges
    exact: bool = True

    __getstate__ = state_of

    @classmethod
    def of(cls, planes: Mapping[Region, int], length: int, exact: bool = True) -> Load:
        """Return the load of regions over one axis of rows, and how often each counts.

        Layers, batch elements and heads lie on top of each other: their cells add up, and a block
        is one of all.

        >>> from attnkit import masks
        >>> Load.of({masks.Causal().region(4, 4): 2, masks.Full().region(4, 4): 1}, 4).lines
        (RowCount(i0=0, i1=4, first=6, step=2),)
        """
        check_int("length", length, 0)
        borders: Ranges = (range(1, length),) if length > 1 else ()
        for region, count in planes.items():
            check_int("how often a region counts", count, 0)
            if not region.fits(length, _kv_len(region)):
                raise CompositionError(f"{shown(region)} has rows that {length} tokens do not")
            if region and count:
                borders = shared(borders, joined(_borders(region.strips, length)))
        return cls(length, tuple(_summed(planes, length)), borders, exact)

    @property
    def total(self) -> int:
        """All cells."""
        return self.before(self.length)

    def before(self, row: int) -> int:
        """Return the cells of all rows above one."""
        k = bisect_right(self._starts, row) - 1
        if k < 0:
            return 0
        return self._sums[k] + _sum(self.lines[k], row - self.lines[k].i0)

    def at(self, row: int) -> int:
        """Return the cells of one row."""
        i0, _, first, step = self.lines[bisect_right(self._starts, row) - 1]
        return first + step * (row - i0)

    def cells(self, rows: Ranges) -> int:
        """Return the cells of some rows, in ranges of step 1."""
        return sum(self.before(one.stop) - self.before(one.start) for one in rows)

    def between(self, start: int, stop: int) -> Iterator[RowCount]:
        """Yield the lines of some rows."""
        k = bisect_right(self._starts, start) - 1
        while start < stop:
            i0, i1, first, step = self.lines[k]
            end = min(i1, stop)
            yield RowCount(start, end, first + step * (start - i0), step)
            start, k = end, k + 1

    def of_ranks(self, sharding: Sharding) -> tuple[int, ...]:
        """Return the cells of each rank."""
        if sharding.length != self.length:
            raise CompositionError(
                f"{sharding!r} is of {sharding.length} tokens, and the load of {self.length} rows"
            )
        return tuple(map(self.cells, sharding.ranks))

    def imbalance(self, sharding: Sharding) -> float:
        """Return how far the rank with the most cells is over the mean: 0 is even.

        >>> from attnkit import masks
        >>> load = load_of([masks.Causal()], 8, 8)
        >>> load.imbalance(Sharding.contiguous(8, 2)), load.imbalance(Sharding.zigzag(8, 2))
        (0.4444444444444444, 0.0)
        """
        most = max(self.of_ranks(sharding))
        return most * sharding.size / self.total - 1 if self.total else 0.0

    @cached_property
    def _starts(self) -> list[int]:
        return [line.i0 for line in self.lines]

    @cached_property
    def _sums(self) -> list[int]:
        counts = (_sum(line, line.i1 - line.i0) for line in self.lines)
        return list(accumulate(counts, initial=0))


def load_of(
    masks: Sequence[Mask],
    q_len: int | None,
    kv_len: int | None = None,
    seqlens: SeqLens | None = None,
) -> Load:
    """Return what the masks of some layers load on the rows of all tokens.

    A packed batch is one axis of tokens, and each sequence a score matrix of its own; otherwise
    all batch elements have the same axis. Each mask counts the same, whether it tells heads or
    batch elements apart or not. Without a mask every row sees every key.

    >>> from attnkit import SeqLens, masks
    >>> load_of([masks.Causal()], None, seqlens=SeqLens([2, 3])).borders
    (range(2, 3),)
    """
    planes, length, exact = planes_of(masks, q_len, kv_len, seqlens)
    return Load.of(planes, length, exact)


def planes_of(
    masks: Sequence[Mask],
    q_len: int | None,
    kv_len: int | None = None,
    seqlens: SeqLens | None = None,
) -> tuple[dict[Region, int], int, bool]:
    """Return regions over all tokens and how often each counts, the rows, whether all are exact.

    A mask that is no region counts with the region around it.
    """
    if not isinstance(masks, Sequence):
        raise CompositionTypeError(
            f"masks={shown(masks)}; give a list, the mask of each layer: [mask]"
        )
    for mask in masks:
        if not isinstance(mask, Mask):
            raise CompositionTypeError(f"{shown(mask)} is no mask")
    sequences = _sequences(q_len, kv_len, seqlens)
    each = [_planes(mask, sequences, seqlens) for mask in masks or [Full()]]
    counts = lcm(*(sum(found.values()) for found, _ in each))
    planes: Counter[Region] = Counter()
    for found, _ in each:
        for region, count in found.items():
            planes[region] += count * counts // sum(found.values())
    return dict(planes), sum(q for q, _ in sequences), all(exact for _, exact in each)


def _sequences(
    q_len: int | None, kv_len: int | None, seqlens: SeqLens | None
) -> list[tuple[int, int]]:
    if seqlens is not None:
        return list(zip(seqlens.q, seqlens.kv, strict=True))
    rows = check_int("tokens", q_len, 0)
    return [(rows, rows if kv_len is None else check_int("keys", kv_len, 0))]


def _planes(
    mask: Mask, sequences: list[tuple[int, int]], seqlens: SeqLens | None
) -> tuple[Counter[Region], bool]:
    """Return the regions of a mask over all tokens, one for each head and element told apart."""
    if seqlens is None:
        sequences = sequences * (mask.batches or 1)
    for size in sorted(set(sequences)):
        mask.check(*size, None if seqlens is None else len(sequences))
    known = Matrices.of(mask, sequences)
    found: Counter[Region] = Counter()
    for head in range(len(known.planes)):
        regions = known.regions(head)
        if seqlens is None:
            found.update(regions)
            continue
        found[diagonal(regions, (seqlens.cu_q, seqlens.cu_kv))] += 1
    return found, known.exact


def _kv_len(region: Region) -> int:
    return region.bounds.j1 if region.bounds is not None else 0


def _sum(line: RowCount, count: int) -> int:
    """Return the cells of the first rows of a line."""
    return count * line.first + line.step * (count * (count - 1) // 2)


def _summed(planes: Mapping[Region, int], length: int) -> Iterator[RowCount]:
    """Yield the cells of each row, added up: lines begin where some region's line does."""
    changes: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    for region, count in planes.items():
        for i0, i1, first, step in region.row_counts():
            for row, sign in ((i0, count), (i1, -count)):
                changes[row][0] += sign * (first - step * i0)
                changes[row][1] += sign * step
    base = slope = start = 0
    for row in sorted({*changes, length}):
        if row > start and (row == length or changes[row] != [0, 0]):
            yield RowCount(start, row, base + slope * start, slope)
            start = row
        base, slope = base + changes[row][0], slope + changes[row][1]


def _borders(strips: Sequence[Strip], length: int) -> Iterator[tuple[int, int]]:
    """Yield spans of rows above which no key is seen that they, or rows below them, see."""
    firsts = [strip.runs[0][0] for strip in strips]
    lowest = list(accumulate(reversed(firsts), min))[::-1]  # of this strip and all below
    seen = above = 0
    for k, (i0, i1, runs) in enumerate(strips):
        if seen <= lowest[k]:
            yield max(above, 1), min(i0 + 1, length)
        stop, slope = runs[-1][2:]
        if runs == ((stop - 1, 1, stop, 1),):  # a key for each row
            below = lowest[k + 1] if k + 1 < len(strips) else stop + i1
            yield i0 + max(1, seen - stop + 1), min(i1, i0 + 2 + below - stop)
        seen, above = max(seen, stop + slope * (i1 - i0 - 1)), i1
    yield max(above, 1), length
