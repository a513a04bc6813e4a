"""From runs of keys, and from cells, to a `Region`: with arrays, strip by strip and not row by row.

A strip is found where the rows change in the same way from one to the next, so that Python sees
strips only. Two forms come in: `Runs`, the runs of all rows as arrays, and cells themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from attnkit.geometry import Region, Slice
from attnkit.strips import Canonical, Run, advance

__all__ = ["Runs", "read_cells"]

Ints = np.ndarray[Any, np.dtype[np.int64]]
Cells = np.ndarray[Any, np.dtype[np.bool_]]

_FEW_CELLS = 1 << 12  # so few are read at once, whatever they are
_SPARSE = 16  # rows are compared where at most one word in so many changes


class Runs(NamedTuple):
    """The runs of rows ``0 <= i < height``: the row of each, its first key, and the key after it.

    In order of rows, then keys; those of a row do not touch.

    >>> Runs(2, np.array([0, 1]), np.array([0, 0]), np.array([1, 2])).region().area
    3
    """

    height: int
    rows: Ints
    starts: Ints
    stops: Ints

    @classmethod
    def of_cells(cls, cells: Cells) -> Runs:
        """Read every cell."""
        height, width = cells.shape
        # A column of False on either side makes every run begin and end inside its own row.
        framed = np.zeros((height, width + 2), dtype=np.bool_)
        framed[:, 1:-1] = cells
        flat = framed.reshape(-1)
        at, keys = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), width + 2)
        return cls(height, at[::2], keys[::2], keys[1::2])

    def hull(self) -> Slice:
        """Return the smallest slice that holds all runs, of which there is one at least."""
        starts, stops = self.starts - self.rows, self.stops - self.rows
        return Slice(
            int(self.rows[0]), int(self.rows[-1]) + 1,
            int(self.starts.min()), int(self.stops.max()),
            int(starts.min()), int(stops.max()) - 1,
        )  # fmt: skip

    def region(self) -> Region:
        """Return the region of the runs."""
        counts = np.bincount(self.rows, minlength=self.height)
        first = np.concatenate(([0], np.cumsum(counts)))
        steps, heads = self._steps(counts)
        out = Canonical()
        for a, b in pairwise((*heads.tolist(), self.height)):
            one = slice(first[a], first[a + 1])
            if one.start == one.stop:
                continue
            starts, stops = self.starts[one].tolist(), self.stops[one].tolist()
            if b - a == 1:
                out.add(a, b, tuple((s, 0, e, 0) for s, e in zip(starts, stops, strict=True)))
                continue
            slopes = steps[first[a + 1] : first[a + 2]].tolist()
            ends = zip(starts, stops, slopes, strict=True)
            out.add(a, b, tuple((s, step & 1, e, step >> 1) for s, e, step in ends))
        return Region(tuple(out.strips))

    def _steps(self, counts: Ints) -> tuple[Ints, Ints]:
        """Return how the ends of each run moved, and the rows where something else begins.

        A step is 1 where the start moved plus 2 where the stop did, or -1 for any other change
        from the row above; rows go on while all their steps are those of the row above.
        """
        many = counts[self.rows]
        above = np.arange(len(self.rows)) - many  # the same run there, if there are as many
        alike = (self.rows > 0) & (many == counts[self.rows - 1])
        left = self.starts - self.starts[above]
        right = self.stops - self.stops[above]
        alike &= (left >= 0) & (left <= 1) & (right >= 0) & (right <= 1)
        steps = np.where(alike, left + 2 * right, -1)
        linked = counts > 0
        linked[self.rows[~alike]] = False
        other = np.zeros(self.height, dtype=np.bool_)
        other[self.rows[steps != steps[above]]] = True
        head = ~linked & (counts > 0)
        head[1:] |= linked[1:] & linked[:-1] & other[1:]
        head[1:] |= (counts[1:] == 0) & (counts[:-1] > 0)
        head[:1] = True
        return steps, np.flatnonzero(head)


def read_cells(cells: Cells) -> Region | Runs:
    """Return the region of some rows, or their runs where these are no few strips.

    >>> read_cells(np.tri(3, dtype=bool)).region().area
    6
    """
    quick = _compared(cells) if cells.size > _FEW_CELLS else None
    return Runs.of_cells(cells) if quick is None else quick


class _Flips(NamedTuple):
    """The cells that differ from the cell above, in order of rows, then keys."""

    rows: Ints
    keys: Ints
    on: Cells

    def heads(self, height: int) -> tuple[Ints, Ints]:
        """Return where the flips of each row begin, and the rows whose flips are not the same
        as those of the row above, one key further on."""
        counts = np.bincount(self.rows, minlength=height)
        many = counts[self.rows]
        above = np.arange(len(self.rows)) - many
        moved = (many == counts[self.rows - 1]) & (self.keys == self.keys[above] + 1)
        moved &= self.on == self.on[above]
        head = np.zeros(height, dtype=np.bool_)
        head[1:] = counts[1:] != counts[:-1]
        head[self.rows[~moved]] = True
        head[1:2] = True
        return np.concatenate(([0], np.cumsum(counts))), np.flatnonzero(head)


def _flips(cells: Cells) -> _Flips | None:
    """Compare each row with the one above, eight cells at once; None where much differs."""
    width = cells.shape[1]
    if width % 8 or not cells.flags.c_contiguous:
        return None
    words = cells.view(np.uint64)
    changed = words[1:] != words[:-1]
    at = np.flatnonzero(changed)
    if len(at) * _SPARSE > changed.size:
        return None
    row, word = np.divmod(at, width // 8)
    now, before = (words[row + k, word].view(np.uint8).reshape(-1, 8) for k in (1, 0))
    which, byte = np.nonzero((now != 0) != (before != 0))
    return _Flips(row[which] + 1, word[which] * 8 + byte, now[which, byte] != 0)


def _compared(cells: Cells) -> Region | None:
    """Return the region of rows that change little from one to the next; None for others."""
    height = len(cells)
    flips = _flips(cells)
    if flips is None:
        return None
    first, heads = flips.heads(height)
    if 2 * len(heads) > height + 8:
        return None
    out = Canonical()
    runs = _runs_of(cells[0])
    out.add(0, 1, runs)
    for a, b in pairwise((*heads.tolist(), height)):
        here = slice(first[a], first[a + 1])
        moving = _moving(runs, flips.keys[here].tolist(), flips.on[here].tolist())
        if moving is None:
            for row in range(a, b):
                runs = _runs_of(cells[row])
                out.add(row, row + 1, runs)
            continue
        # Ends may meet in the last row, where the way of moving ends: it is added by itself.
        out.add(a, b - 1, advance(moving, 1))
        runs = _apart(advance(moving, b - a))
        out.add(b - 1, b, runs)
    return Region(tuple(out.strips))


def _runs_of(row: Cells) -> tuple[Run, ...]:
    _, _, starts, stops = Runs.of_cells(row[None])
    return tuple((a, 0, b, 0) for a, b in zip(starts.tolist(), stops.tolist(), strict=True))


def _moving(runs: tuple[Run, ...], keys: list[int], on: list[bool]) -> tuple[Run, ...] | None:
    """Return the runs with the slopes that some flips give them; None if they do something else."""
    if len(keys) > 2 * len(runs):
        return None
    turned = set(zip(keys, on, strict=True))
    moving = tuple(
        (a, int((a, False) in turned), b, int((b, True) in turned)) for a, _, b, _ in runs
    )
    explained = sum(da + db for _, da, _, db in moving)
    return moving if explained == len(keys) else None


def _apart(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Return the runs of one row without empty ones, those that touch as one."""
    out: list[Run] = []
    for a, _, b, _ in runs:
        if a == b:
            continue
        if out and out[-1][2] == a:
            a = out.pop()[0]
        out.append((a, 0, b, 0))
    return tuple(out)
