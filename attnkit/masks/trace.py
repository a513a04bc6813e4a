"""From rows of cells to a `Region`, a few rows at a time.

Every cell is read once, in chunks of at most `CHUNK_CELLS`; what is kept of a chunk are the runs
of its rows, as a region. So the result holds exactly the cells that were read, and the memory
needed follows the slices found, not the score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from attnkit.geometry import Region
from attnkit.masks.base import Mask
from attnkit.masks.cells import paint
from attnkit.masks.predicate import CHUNK_CELLS, evaluate

__all__ = [
    "CHUNK_CELLS",
    "RowReader",
    "Traced",
    "count_slices",
    "function_rows",
    "mask_rows",
    "region_rows",
    "trace",
]

# The cells of rows i0 <= i < i1, as a bool tensor [i1 - i0, kv_len].
RowReader = Callable[[int, int], torch.Tensor]


class Traced(NamedTuple):
    """The region that was read; where it grew too large, None and the reason."""

    region: Region | None
    reason: str = ""


def trace(
    rows: RowReader, q_len: int, kv_len: int, max_slices: int, chunk_cells: int = CHUNK_CELLS
) -> Traced:
    """Read all rows and return the region they form, if it has at most `max_slices` slices.

    >>> cells = torch.ones(6, 6).tril().bool()
    >>> trace(lambda i0, i1: cells[i0:i1], 6, 6, max_slices=4).region
    Region.of(Slice(i0=0, i1=6, j0=0, j1=6, lo=-5, hi=0))
    """
    pending: list[Region] = []
    height = max(1, chunk_cells // max(1, kv_len))
    found = 0
    for i0 in range(0, q_len, height):
        i1 = min(i0 + height, q_len)
        chunk = Region.from_rows(_runs(rows(i0, i1), kv_len)).shift(i0, 0)
        pending.append(chunk)
        found += count_slices(chunk)
        # A chunk's border cuts slices in two, so a sum is judged only after a merge; to merge
        # at twice the limit and not before it keeps the merges few.
        if found > 2 * max_slices or i1 == q_len:
            pending = [Region.union(pending)]
            found = count_slices(pending[0])
            if found > max_slices:
                return Traced(
                    None,
                    f"rows 0 to {i1 - 1} of {q_len} already need {found} slices, and "
                    f"max_slices={max_slices}",
                )
    return Traced(Region.union(pending))


def count_slices(region: Region) -> int:
    """Return the number of slices that a region is written with."""
    return sum(len(runs) for _, _, runs in region.strips)


def _runs(cells: torch.Tensor, kv_len: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield the runs (start, stop) of True of each row."""
    count = cells.shape[0]
    # A column of False on either side makes every run begin and end inside its own row.
    framed = np.zeros((count, kv_len + 2), dtype=np.bool_)
    framed[:, 1:-1] = cells.cpu().numpy()
    flat = framed.reshape(-1)
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    rows, keys = np.divmod(ends, kv_len + 2)
    borders = np.searchsorted(rows, np.arange(count + 1)).tolist()
    for r in range(count):
        row = keys[borders[r] : borders[r + 1]].tolist()
        yield tuple(zip(row[::2], row[1::2], strict=True))


def mask_rows(mask: Mask, q_len: int, kv_len: int, batch: int, head: int) -> RowReader:
    """Return a reader of any mask."""
    known = mask.enclosure(q_len, kv_len, batch, head)
    if known.exact:
        return region_rows(known.inner, kv_len)
    return mask._reader(q_len, kv_len, batch, head)


def region_rows(region: Region, kv_len: int) -> RowReader:
    """Return a reader of a region."""

    def read(i0: int, i1: int) -> torch.Tensor:
        return paint(region.cut((i0, i1), (0, kv_len)), i1 - i0, kv_len, "cpu")

    return read


def function_rows(
    fn: Callable[..., torch.Tensor],
    kv_len: int,
    batch: int,
    head: int,
    q_offset: int = 0,
    device: torch.device | str | None = None,
) -> RowReader:
    """Return a reader of ``fn(b, h, i + q_offset, j)``."""
    device = "cpu" if device is None else device
    keys = torch.arange(kv_len, device=device)
    b, h = (torch.tensor(value, device=device) for value in (batch, head))

    def read(i0: int, i1: int) -> torch.Tensor:
        rows = torch.arange(q_offset + i0, q_offset + i1, device=device)
        return evaluate(fn, b, h, rows, keys)

    return read
