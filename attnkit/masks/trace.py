"""Cells of one score matrix: a region as a tensor, and from rows of cells to a `Region`.

Every cell is read once, in chunks of at most `CHUNK_CELLS`; what is kept of a chunk are the runs
of its rows, as a region. So the result holds exactly the cells that were read, and the memory
needed follows the slices found, not the score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from attnkit.geometry import Region, Slice
from attnkit.masks.runs import Runs, read_cells

if TYPE_CHECKING:
    from attnkit.masks.base import Mask

__all__ = [
    "CHUNK_CELLS",
    "MOST_RUNS",
    "Enclosure",
    "Progress",
    "Rectangle",
    "RowReader",
    "blocks_around",
    "cells_of",
    "count_slices",
    "enclosed",
    "mask_rows",
    "paint",
    "region_rows",
    "row_blocks",
    "trace",
]

CHUNK_CELLS = 1 << 20
"""Cells that are read at a time, so that memory does not follow the score matrix."""

MOST_RUNS = 1 << 17
"""Runs of a region that a family still builds; a mask with more is known by its cells."""

# The cells of rows i0 <= i < i1, as a bool tensor [i1 - i0, kv_len].
RowReader = Callable[[int, int], torch.Tensor]

# Is told after each chunk how many rows have been read, and of how many.
Progress = Callable[[int, int], None]


class Rectangle(NamedTuple):
    """Rows ``[start, stop)`` and keys ``[start, stop)`` of one score matrix.

    >>> Rectangle((2, 4), (0, 3), 8, 8).shape
    (2, 3)
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    q_len: int
    kv_len: int
    batch: int = 0
    head: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and keys it has."""
        return self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]


class Enclosure(NamedTuple):
    """What is known of a mask as a region: ``inner <= mask <= outer``.

    For a mask that is a region the two are equal, and are the mask.

    >>> from attnkit import masks
    >>> known = (masks.Dilated(2) & masks.SlidingWindow(3)).enclosure(6, 6)
    >>> known.inner.area, known.outer.area, known.exact
    (0, 15, False)
    """

    inner: Region
    outer: Region

    @property
    def exact(self) -> bool:
        """Whether the two bounds meet, so that the mask is a region."""
        return self.inner == self.outer


def paint(
    region: Region, q_len: int, kv_len: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return a region as a bool tensor [Sq, Skv], True inside."""
    cells = torch.zeros(q_len, kv_len, dtype=torch.bool, device=device)
    for s in region.slices:
        block = cells[s.i0 : s.i1, s.j0 : s.j1]
        if s.is_rectangle:
            block.fill_(True)
        elif 8 * (s.hi - s.lo) < s.j1 - s.j0:  # a narrow band: its diagonals, not its square
            for offset in range(s.lo + s.i0 - s.j0, s.hi + s.i0 - s.j0 + 1):
                block.diagonal(offset).fill_(True)
        else:
            shift = s.i0 - s.j0
            block |= torch.ones_like(block).tril(s.hi + shift).triu(s.lo + shift)
    return cells


def row_blocks(start: int, stop: int, kv_len: int) -> Iterator[tuple[int, int]]:
    """Iterate over rows ``start <= i < stop``, so many at once as hold `CHUNK_CELLS` at most.

    >>> list(row_blocks(0, 5, CHUNK_CELLS // 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    height = max(1, CHUNK_CELLS // max(1, kv_len))
    return ((i, min(i + height, stop)) for i in range(start, stop, height))


def blocks_around(
    outers: Collection[Region], q_len: int, kv_len: int, cells: int = CHUNK_CELLS
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield blocks of rows, each with the range of keys that some region has in them.

    A block and its keys are `cells` at most, or one row: where few keys are seen, more rows go
    together, so that what is read of a mask follows its bounds and not the score matrix.

    >>> from attnkit.masks import SlidingWindow
    >>> list(blocks_around([SlidingWindow(2).region(8, 8)], 8, 8, cells=20))
    [((0, 4), (0, 4)), ((4, 8), (3, 8))]
    """

    def seen(rows: tuple[int, int]) -> tuple[int, int]:
        boxes = [box for o in outers if (box := o.cut(rows, (0, kv_len)).bounds) is not None]
        return min((k.j0 for k in boxes), default=0), max((k.j1 for k in boxes), default=0)

    start = 0
    while start < q_len:
        height = max(1, cells // max(1, kv_len))
        keys = seen((start, min(start + height, q_len)))
        while start + height < q_len:
            more = seen((start, min(start + 2 * height, q_len)))
            if 2 * height * (more[1] - more[0]) > cells:
                break
            height, keys = 2 * height, more
        stop = min(start + height, q_len)
        yield (start, stop), keys
        start = stop


def _chunks(rows: RowReader, q_len: int, kv_len: int) -> Iterator[tuple[int, int, Region | Runs]]:
    """Yield ranges of rows with what they hold, counted from the first of them."""
    for i0, i1 in row_blocks(0, q_len, kv_len):
        yield i0, i1, read_cells(np.ascontiguousarray(rows(i0, i1).cpu().numpy()))


def trace(
    rows: RowReader,
    q_len: int,
    kv_len: int,
    max_slices: int,
    progress: Progress | None = None,
) -> Region | str:
    """Read all rows and return the region they form; why not, if it has over `max_slices` slices.

    >>> cells = torch.ones(6, 6).tril().bool()
    >>> trace(lambda i0, i1: cells[i0:i1], 6, 6, max_slices=4)
    Region.of(Slice(i0=0, i1=6, j0=0, j1=6, lo=-5, hi=0))
    """
    pending: list[Region] = []
    found = 0
    for i0, i1, chunk in _chunks(rows, q_len, kv_len):
        region = chunk if isinstance(chunk, Region) else chunk.region()
        pending.append(region.shift(i0, 0))
        found += count_slices(region)
        if progress is not None:
            progress(i1, q_len)
        # A chunk's border cuts slices in two, so a sum is judged only after a merge; to merge
        # at twice the limit and not before it keeps the merges few.
        if found > 2 * max_slices or i1 == q_len:
            pending = [Region.union(pending)]
            found = count_slices(pending[0])
            if found > max_slices:
                return (
                    f"rows 0 to {i1 - 1} of {q_len} already need {found} slices, and "
                    f"max_slices={max_slices}"
                )
    return Region.union(pending)


def enclosed(rows: RowReader, q_len: int, kv_len: int, max_runs: int) -> Enclosure:
    """Read all rows and return their region; the slice around it where it has too many runs."""
    parts: list[Region] = []
    hulls: list[Slice] = []
    found = 0
    for i0, _, chunk in _chunks(rows, q_len, kv_len):
        size = _count_runs(chunk) if isinstance(chunk, Region) else len(chunk.rows)
        found += size
        if size:
            hull = chunk.bounds if isinstance(chunk, Region) else chunk.hull()
            hulls += [] if hull is None else [hull.shift(i0, 0)]
        if found <= max_runs:
            region = chunk if isinstance(chunk, Region) else chunk.region()
            parts.append(region.shift(i0, 0))
    if found <= max_runs:
        region = Region.union(parts)
        return Enclosure(region, region)
    around = Region.of(*hulls).bounds
    return Enclosure(Region.empty(), Region.of(*(() if around is None else (around,))))


def _count_runs(region: Region) -> int:
    return sum((i1 - i0) * len(runs) for i0, i1, runs in region.strips)


def count_slices(region: Region) -> int:
    """Return the number of slices that a region is written with."""
    return sum(len(runs) for _, _, runs in region.strips)


def cells_of(
    mask: Mask,
    q_len: int,
    kv_len: int,
    batch: int,
    head: int,
    device: torch.device | str | None = None,
) -> Region | RowReader:
    """Return a score matrix as its region, or where it is none as a reader of its rows.

    Only the cells inside the mask's bound are asked for.
    """
    known = mask.enclosure(q_len, kv_len, batch, head)
    if known.exact:
        return known.inner
    device = "cpu" if device is None else device

    def read(i0: int, i1: int) -> torch.Tensor:
        cells = torch.zeros(i1 - i0, kv_len, dtype=torch.bool, device=device)
        around = (known.outer & Region.of(Slice(i0, i1, 0, kv_len))).bounds
        if around is not None:
            keys = around.j0, around.j1
            at = Rectangle((i0, i1), keys, q_len, kv_len, batch, head)
            cells[:, slice(*keys)] = mask._cells(at, device)
        return cells

    return read


def mask_rows(mask: Mask, q_len: int, kv_len: int, batch: int, head: int) -> RowReader:
    """Return a reader of any mask."""
    cells = cells_of(mask, q_len, kv_len, batch, head)
    return region_rows(cells, kv_len) if isinstance(cells, Region) else cells


def region_rows(region: Region, kv_len: int) -> RowReader:
    """Return a reader of a region."""

    def read(i0: int, i1: int) -> torch.Tensor:
        return paint(region.cut((i0, i1), (0, kv_len)), i1 - i0, kv_len, "cpu")

    return read
