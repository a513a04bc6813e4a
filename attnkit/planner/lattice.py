"""Orders of rows in which neighbours see nearly the same keys, read off the cells themselves.

Where positions are counted over a grid, rows that are near each other on any axis see much the
same keys: those of a 8 x 16 patch of an image have far fewer in all than 128 in reading order. The
grid is not told: it shows in the runs of a row. With a row of neighbours on each of seven lines of
an image of width W, six of the seven runs start W after the one before; one volume further, the
same once more; and runs of single keys that lie d apart tell of a dilation by d.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from attnkit.planner.tiled_rows import Array, RowRuns

__all__ = ["GridAxis", "axes_of", "in_patches", "patches"]

_SAMPLES, _AGREE = 9, 3  # rows that are looked at, of which a third must tell the same
_MOST_AXES = 4
_LEAST_ROWS, _MOST_ROWS = 48, 512


class GridAxis(NamedTuple):
    """An axis of a grid: how far apart neighbours are, how many there are, how many a row sees."""

    step: int
    length: int
    seen: int


def axes_of(runs: RowRuns, rows: Array) -> tuple[GridAxis, ...]:
    """Return the axes of the grid that rows with keys are on, the innermost first, if there is one.

    >>> from attnkit.geometry import Region, Slice
    >>> from attnkit.planner.tiled_rows import row_runs
    >>> lines = [Slice(0, 64, k, k + 3) for k in (0, 8, 16)]
    >>> axes_of(row_runs(Region.of(*lines), 64), np.arange(64))
    (GridAxis(step=1, length=8, seen=3), GridAxis(step=8, length=8, seen=3))
    """
    found: Counter[tuple[int, ...]] = Counter()
    seen: dict[tuple[int, ...], list[int]] = {}
    for n in range(_SAMPLES):
        row = rows[(2 * n + 1) * len(rows) // (2 * _SAMPLES)]
        steps, counts = _levels(runs, slice(*runs.first[row : row + 2]))
        found[steps] += 1
        seen[steps] = [max(pair) for pair in zip(seen.get(steps, counts), counts, strict=True)]
    steps = max(found, key=lambda steps: (found[steps], len(steps)))
    if len(steps) < 2 or _AGREE * found[steps] < _SAMPLES:
        return ()
    ends = (*steps[1:], int(rows[-1] - rows[0]) + 1)
    pairs = zip(steps, ends, seen[steps], strict=True)
    return tuple(GridAxis(step, -(-end // step), count) for step, end, count in pairs)


def _levels(runs: RowRuns, own: slice) -> tuple[tuple[int, ...], list[int]]:
    """Return the distances between the runs of a row, level by level, and how many each has."""
    starts, lengths = runs.start[own], runs.stop[own] - runs.start[own]
    steps, counts = [], []
    if lengths.max() > 1:
        steps.append(1)
        counts.append(int(np.median(lengths)))
    while len(starts) > 1 and len(steps) < _MOST_AXES:
        gaps = np.diff(starts)
        values, often = np.unique(gaps, return_counts=True)
        step = int(values[often.argmax()])
        opens = np.concatenate([[True], gaps != step])
        rare = often.max() < max(2, len(gaps) / 2)
        if rare or (steps and step <= steps[-1]):
            break
        sizes = np.diff(np.append(np.flatnonzero(opens), len(starts)))
        steps.append(step)
        counts.append(int(sizes.max()))
        starts = starts[opens]
    return tuple(steps), counts


def patches(axes: Sequence[GridAxis], kv_len: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield patches of a grid: the sizes, how many there are, and the keys that one sees, about."""
    for sizes in product(*(_sizes(axis.length) for axis in axes)):
        if _LEAST_ROWS <= prod(sizes) <= _MOST_ROWS:
            count = prod(-(-axis.length // n) for axis, n in zip(axes, sizes, strict=True))
            count *= axes[0].step
            wide = (min(n + a.seen - 1, a.length) for a, n in zip(axes, sizes, strict=True))
            yield sizes, count, min(prod(wide), kv_len)


def _sizes(length: int) -> list[int]:
    """Return sides for patches: powers of two, and what divides the length."""
    few = range(1, min(length, 64) + 1)
    return [n for n in few if n & (n - 1) == 0 or length % n == 0]


def in_patches(rows: Array, axes: Sequence[GridAxis], sizes: Sequence[int]) -> Array:
    """Return rows patch after patch, those in whole patches first.

    >>> grid = (GridAxis(1, 4, 3), GridAxis(4, 2, 3))
    >>> in_patches(np.arange(8), grid, (2, 2))
    array([0, 1, 4, 5, 2, 3, 6, 7])
    """
    left, places = rows - rows[0], []
    for axis in reversed(axes):
        place, left = np.divmod(left, axis.step)
        places.append(place)
    places.reverse()
    # What is left is the residue, where neighbours are several positions apart.
    patch, radix = left, axes[0].step
    for place, axis, size in zip(places, axes, sizes, strict=True):
        patch = patch + radix * (place // size)
        radix *= -(-axis.length // size)
    ragged = np.bincount(patch)[patch] < prod(sizes)
    return rows[np.lexsort((*places, patch, ragged))]
