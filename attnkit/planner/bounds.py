"""What pieces whose keys lie side by side cost at least, before anybody cuts or proves them.

Such a piece is a slice, so it has one run of a row at most, and one run of a column of keys. A
region whose rows have several runs is answered by as many pieces, whose outputs are merged; one
whose keys come and go from row to row reads them as often. A call may have a row, and a key, in its
place once. So few numbers of a region bound every way to cut it, and those of a cut every way to
group its pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.planner.calls import MERGE_LAUNCHES
from attnkit.planner.price import chip
from attnkit.planner.request import Request

__all__ = ["Work", "dearer"]


class Work(NamedTuple):
    """What some pieces take at least: cells of tiles, rows that they answer, keys that they read.

    >>> causal_blocks = Region.of(Slice(0, 4, 0, 2), Slice(2, 4, 4, 6))
    >>> Work.of_region(causal_blocks)
    Work(cells=768, rows=6, keys=4)
    """

    cells: int = 0
    rows: int = 0
    keys: int = 0

    @classmethod
    def total(cls, works: Iterable[Work]) -> Work:
        """Return the work of all."""
        return cls(*map(sum, zip(*works, strict=True)))

    @classmethod
    def of_region(cls, region: Region, with_keys: bool = True) -> Work:
        """Return the work of any slices that make up a region.

        A tile has cells in each row that a run of the row needs it for. A run of a column begins
        at each cell that the row above does not have.
        """
        cells = rows = 0
        _, tile_kv = _tile()
        for i0, i1, runs in region.strips:
            rows += (i1 - i0) * len(runs)
            for a, da, b, db in runs:
                shortest = b - a if db >= da else b - a - (i1 - i0 - 1)
                cells += (i1 - i0) * _whole(shortest, tile_kv)
        keys = (region - region.shift(1, 0)).area if with_keys else 0
        return cls(cells, rows, keys)

    @classmethod
    def of_slices(cls, slices: Iterable[Slice]) -> Work:
        """Return the work of some slices, rectangles in whole tiles."""
        cells = rows = keys = 0
        tile_q, tile_kv = _tile()
        for part in slices:
            q_len, kv_len = part.i1 - part.i0, part.j1 - part.j0
            rows, keys = rows + q_len, keys + kv_len
            whole = _whole(q_len, tile_q) * _whole(kv_len, tile_kv)
            cells += whole if part.is_rectangle else part.area
        return cls(cells, rows, keys)

    def nanoseconds(self, request: Request, heads: int, kv_heads: int, rows: int) -> float:
        """Return what this work costs at least on some heads of a request, by estimate.

        Outputs merge where there are more rows than those of the request with a key, `rows`.
        """
        weights, size = chip(), request.dtype.itemsize
        both = request.head_dim + request.value_dim
        each_row, each_key = (2 * size * n for n in (heads * request.head_dim, kv_heads * both))
        rows, keys = max(rows, 1), max(sum(kv for _, kv in request.sequences), 1)
        merged = self.rows > rows
        moved = (size + 2 * 4) * heads * request.value_dim * self.rows if merged else 0

        def around(calls: float) -> float:
            """Of more calls, fewer rows and keys are gathered: each has some in their places."""
            copied = max(0.0, self.rows - calls * rows) * each_row
            copied += max(0.0, self.keys - calls * keys) * each_key
            small = MERGE_LAUNCHES * merged * weights.small_launch_ns
            return copied / weights.bytes_per_ns + calls * (weights.launch_ns + small)

        # It is convex and piecewise linear: least at one of its corners.
        corners = (1.0, self.rows / rows, self.keys / keys)
        least = min(around(max(calls, 1.0)) for calls in corners)
        return weights.nanoseconds(2 * self.cells * heads * both, moved, 0) + least


def dearer(
    request: Request,
    groups: Sequence[tuple[int, int]],
    planes: Sequence[Sequence[Region]],
    works: Sequence[Work],
    bound: float,
) -> Refusal | None:
    """Return why some pieces are not looked at: they cost no less than a bound, in nanoseconds.

    There are a group of ``(heads, kv_heads)``, its regions and the work on them for each plane.
    """
    least = 0.0
    for (heads, kv_heads), plane, work in zip(groups, planes, works, strict=True):
        rows = sum(strip.i1 - strip.i0 for region in plane for strip in region.strips)
        least += work.nanoseconds(request, heads, kv_heads, rows) if rows else 0.0
    if least < bound:
        return None
    reason = (
        f"they answer {sum(work.rows for work in works):,} rows and would cost {least / 1e3:,.1f} "
        f"us or more; where keys are gathered it is {bound / 1e3:,.1f} us"
    )
    return Refusal("pieces-dearer", reason, "pieces whose keys lie side by side")


def _tile() -> tuple[int, int]:
    return chip().tile_q, chip().tile_kv


def _whole(size: int, tile: int) -> int:
    """Return a size in whole tiles."""
    return -(-size // tile) * tile
