"""Rows in tiles, each with the union of its keys: its cells in numbers of its own, as arrays.

A tile is some rows in some order. Its keys are those that any of its rows sees; counted in
order, they are the columns of its cells. Everything is counted by run, never by cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnkit.geometry import Region, Strip

__all__ = [
    "Array",
    "ColumnRuns",
    "RowRuns",
    "Tiles",
    "counted",
    "ranges_of",
    "row_runs",
    "runs_in_rows",
    "starts_of",
]

Array = NDArray[np.int64]


class RowRuns(NamedTuple):
    """The runs of allowed keys of all rows, row by row: run k is ``start[k] <= j < stop[k]``.

    Row i has the runs ``first[i] <= k < first[i + 1]``.
    """

    first: Array
    start: Array
    stop: Array

    def parted(self, times: int) -> tuple[Array, Array]:
        """Return the rows that have a run, those apart that see many `times` the median's keys."""
        rows = np.flatnonzero(np.diff(self.first))
        if not len(rows):
            return rows, rows
        seen = np.add.reduceat(self.stop - self.start, self.first[rows])
        many = seen > times * np.median(seen)
        return rows[~many], rows[many]


def runs_in_rows(region: Region) -> int:
    """Return the number of runs of all rows, without looking at the rows."""
    return sum((i1 - i0) * len(runs) for i0, i1, runs in region.strips)


def row_runs(region: Region, q_len: int) -> RowRuns:
    """Return the runs of every row of a region.

    >>> from attnkit.masks import Causal
    >>> row_runs(Causal().region(2, 3), 2)[1:]
    (array([0, 0]), array([2, 3]))
    """
    strips = region.strips
    runs = np.array([run for one in strips for run in one.runs], np.int64).reshape(-1, 4)
    sizes = [(i0, i1 - i0, len(found)) for i0, i1, found in strips]
    top, height, count = np.array(sizes, np.int64).reshape(-1, 3).T
    strip, place = counted(height * count)
    down, across = np.divmod(place, count[strip])
    start, step, stop, more = runs[(np.cumsum(count) - count)[strip] + across].T
    own = np.bincount(top[strip] + down, minlength=q_len)
    return RowRuns(starts_of(own), start + step * down, stop + more * down)


def starts_of(counts: Array) -> Array:
    """Return where each of some groups starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)])


def counted(counts: Array) -> tuple[Array, Array]:
    """Return the members of groups of some sizes: the group of each, and its number in it."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - starts_of(counts)[group]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Rows in tiles of `height`, the last one perhaps lower, and what their rows see.

    `rows` are in the order of the tiles. Range r of keys ``key[r] <= j < key[r] + size[r]`` is of
    a tile, whose ranges follow each other: it has ``range_first[t] <= r < range_first[t + 1]``.
    The keys that no row of it sees are left out of its columns.
    """

    rows: Array
    height: int
    range_first: Array
    key: Array
    size: Array
    columns: ColumnRuns

    @classmethod
    def of(cls, runs: RowRuns, rows: Array, height: int) -> Tiles:
        """Put rows, each of which has a run, into tiles of `height` in their order."""
        row, place = counted(runs.first[rows + 1] - runs.first[rows])
        taken = runs.first[rows][row] + place
        start, stop = runs.start[taken], runs.stop[taken]
        tile, far = row // height, int(runs.stop.max(initial=0)) + 1
        low = start + tile * far  # so that the keys of one tile lie before those of the next
        order = np.argsort(low, kind="stable")
        ends = np.maximum.accumulate((stop + tile * far)[order])
        opens = np.concatenate([[True], low[order][1:] > ends[:-1]])
        first = low[order][opens]
        size = ends[np.concatenate([opens[1:], [True]])] - first
        of, key = np.divmod(first, far)
        columns = np.cumsum(size) - size
        range_first = np.searchsorted(of, np.arange(-(-len(rows) // height) + 1))
        columns -= columns[range_first[of]]
        at = np.searchsorted(first, low, side="right") - 1
        column = columns[at] + low - first[at]
        # What lay between two runs may be seen by no row of the tile: then they are one.
        cells = _joined(row, column, column + stop - start, len(rows))
        return cls(rows, height, range_first, key, size, cells)

    def __len__(self) -> int:
        return len(self.range_first) - 1

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The rows and the keys of each tile."""
        heights = np.diff(np.minimum(np.arange(len(self) + 1) * self.height, len(self.rows)))
        widths = np.diff(starts_of(self.size)[self.range_first])
        return list(zip(heights.tolist(), widths.tolist(), strict=True))

    def rows_of(self, tile: int) -> Array:
        """Return the rows of a tile, in its order."""
        return self.rows[tile * self.height : (tile + 1) * self.height]

    def keys_of(self, tile: int) -> Array:
        """Return the key of each column of a tile."""
        own = slice(*self.range_first[tile : tile + 2])
        at, place = counted(self.size[own])
        return self.key[own][at] + place

    def cells(self, tile: int) -> ColumnRuns:
        """Return the runs of columns of the rows of a tile."""
        top, every = tile * self.height, self.columns
        first = every.first[top : top + self.height + 1]
        own = slice(first[0], first[-1])
        return ColumnRuns(first - first[0], every.start[own], every.stop[own])


@dataclass(frozen=True, eq=False)
class ColumnRuns:
    """The cells of a tile as runs of columns, row by row, as in `RowRuns`; no row is empty."""

    first: Array
    start: Array
    stop: Array

    @cached_property
    def key(self) -> bytes:
        """What is equal for equal cells."""
        return b"".join(part.tobytes() for part in (self.first, self.start, self.stop))

    @cached_property
    def partial(self) -> NDArray[np.bool_]:
        """Which columns some row does not see."""
        end = int(self.stop.max()) + 1
        changes = np.bincount(self.start, minlength=end) - np.bincount(self.stop, minlength=end)
        return np.cumsum(changes)[:-1] < len(self.first) - 1

    @cached_property
    def pattern(self) -> ColumnRuns:
        """The partial columns alone, in their order; a row may have none of them."""
        to = starts_of(self.partial.astype(np.int64))
        start, stop = to[self.start], to[self.stop]
        kept = start < stop
        row = counted(np.diff(self.first))[0][kept]
        return _joined(row, start[kept], stop[kept], len(self.first) - 1)

    def widened(self, low: int, high: int) -> ColumnRuns:
        """Return the cells with some more columns, after all of theirs, that every row sees."""
        if low == high:
            return self
        rows = len(self.first) - 1
        row = np.concatenate([counted(np.diff(self.first))[0], np.arange(rows)])
        start = np.concatenate([self.start, np.full(rows, low)])
        stop = np.concatenate([self.stop, np.full(rows, high)])
        order = np.argsort(row, kind="stable")
        return _joined(row[order], start[order], stop[order], rows)

    @property
    def region(self) -> Region:
        """The cells as a region: strips of rows whose runs move by 0 or by 1 per row."""
        counts = np.diff(self.first)
        row, place = counted(counts)
        above = np.where((row > 0) & (place < counts[row - 1]), self.first[row - 1] + place, 0)
        steps = self.start - self.start[above], self.stop - self.stop[above]
        moved = (steps[0] >> 1 == 0) & (steps[1] >> 1 == 0)
        same = steps[0] + 2 * steps[1]
        tops = self.first[:-1]
        joins = np.logical_and.reduceat(moved, tops)
        joins[1:] &= counts[1:] == counts[:-1]
        joins[0] = False
        keeps = np.logical_and.reduceat(same == same[above], tops) & joins
        runs = np.stack([self.start, steps[0], self.stop, steps[1]], axis=1)
        return Region(tuple(_strips(runs, self.first.tolist(), joins.tolist(), keeps.tolist())))


def _joined(row: Array, start: Array, stop: Array, rows: int) -> ColumnRuns:
    """Return runs in order as cells: those of a row that touch are one."""
    apart = np.ones(len(row) + 1, dtype=np.bool_)
    apart[1:-1] = (start[1:] != stop[:-1]) | (row[1:] != row[:-1])
    first, last = apart[:-1], apart[1:]
    counts = np.bincount(row[first], minlength=rows)
    return ColumnRuns(starts_of(counts), start[first], stop[last])


def _strips(runs: Array, first: list[int], joins: list[bool], keeps: list[bool]) -> list[Strip]:
    """Return the strips of rows whose runs are ``(start, step, stop, step)`` from the row above.

    `joins` says of a row whether it may be the second of a strip, `keeps` whether it moves as the
    row above did.
    """
    out, top, end = [], 0, len(joins)
    while top < end:
        below = top + 1
        own = runs[first[top] : first[top + 1]].copy()
        own[:, 1::2] = 0
        if below < end and joins[below]:
            own[:, 1::2] = runs[first[below] : first[below + 1], 1::2]
            below += 1
            while below < end and keeps[below]:
                below += 1
        out.append(Strip(top, below, tuple(map(tuple, own.tolist()))))
        top = below
    return out


def ranges_of(positions: Array) -> tuple[range, ...]:
    """Return positions in their order, as ranges of step 1.

    >>> ranges_of(np.array([4, 5, 6, 2, 3]))
    (range(4, 7), range(2, 4))
    """
    if not len(positions):
        return ()
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    first = positions[np.concatenate([[0], cuts])].tolist()
    last = positions[np.concatenate([cuts - 1, [len(positions) - 1]])].tolist()
    return tuple(range(a, b + 1) for a, b in zip(first, last, strict=True))
