"""Whether the images of gathered sequences are disjoint and make up a score matrix, run by run.

A sequence with rows and keys from many places is many small slices of the score matrix, and a sum
of regions sweeps them one at a time. Here all runs of all rows are arrays: sorted by row and by
key, those that follow each other must not overlap, and joined they must be the runs of the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from attnkit.geometry import Region
from attnkit.planner.sequences import Block
from attnkit.planner.tiled_rows import Array, counted, row_runs, runs_in_rows, starts_of
from attnkit.ranges import Ranges

__all__ = ["are_many", "uncovered"]

Image = tuple[Block, Region]

# Runs of rows that are looked at in the time that a range of keys takes, and a slice.
_PER_PIECE, _PER_SLICE = 8, 300
_MOST_RUNS = 2**23


def _distinct(images: Sequence[Image]) -> list[tuple[tuple[int, int], Region]]:
    """Return the different regions with the sizes of their sequences; those of tiles are shared."""
    known = {(id(region), block.sizes): region for block, region in images}
    return [(sizes, region) for (_, sizes), region in known.items()]


def are_many(images: Sequence[Image], target: Region) -> bool:
    """Whether the images are looked at by runs of rows: that takes less time than by slices.

    Each strip of a sequence is one of the score matrix in every range of its rows. There it has the
    ranges of its keys, and a slice for every end that moves.
    """
    if all(block.is_rectangle for block, _ in images):
        return False
    distinct = {id(region): region for _, region in images}
    sizes = {name: _ends(region) for name, region in distinct.items()}
    pieces = slices = 0.0
    for block, region in images:
        strips, moving = sizes[id(region)]
        apart = strips + len(block.rows) - 1
        pieces += apart * len(block.keys)
        slices += apart * moving / max(strips, 1)
    runs = runs_in_rows(target)
    return runs <= min(_PER_PIECE * pieces + _PER_SLICE * slices, _MOST_RUNS)


def _ends(region: Region) -> tuple[int, int]:
    """Return the number of strips of a region, and that of the ends that move in them."""
    moving = sum(da + db for strip in region.strips for _, da, _, db in strip.runs)
    return len(region.strips), moving


def uncovered(images: Sequence[Image], target: Region) -> str:
    """Say how the images of sequences miss a target; empty if they are disjoint and make it up.

    >>> crossed = Block(0, (range(0, 2),), (range(2, 3), range(0, 1)))
    >>> uncovered([(crossed, Region.full(2, 2))], Region.columns(2, [(0, 1), (2, 3)]))
    ''
    """
    if not all(region.fits(*sizes) for sizes, region in _distinct(images)):
        return "the calls compute cells outside of their sequences"
    q_len = max(block.ends[1] for block, _ in images)
    q_len = max(q_len, target.strips[-1].i1 if target.strips else 0)
    row, start, stop = _runs_of(images)
    wanted = row_runs(target, q_len)
    far = int(max(stop.max(initial=0), wanted.stop.max(initial=0))) + 1
    low = start + row * far
    order = np.argsort(low, kind="stable")
    low, high = low[order], (stop + row * far)[order]
    there = counted(np.diff(wanted.first))[0] * far
    ends = _joined(low, high)
    target_ends = there + wanted.start, there + wanted.stop
    if all(np.array_equal(*pair) for pair in zip(ends, target_ends, strict=True)):
        twice = int((high - low).sum() - (ends[1] - ends[0]).sum())
        if not twice:
            return ""
    return _told(low, high, ends, target_ends, far)


def _joined(low: Array, high: Array) -> tuple[Array, Array]:
    """Return sorted runs as disjoint ones that do not touch."""
    reach = np.maximum.accumulate(high)
    opens = np.ones(len(low) + 1, dtype=np.bool_)
    opens[1:-1] = low[1:] > reach[:-1]
    return low[opens[:-1]], reach[opens[1:]]


def _told(
    low: Array, high: Array, ends: tuple[Array, Array], wanted: tuple[Array, Array], far: int
) -> str:
    """Say what differs, in the words of a sum of regions."""
    cells = int((ends[1] - ends[0]).sum())
    twice = int((high - low).sum()) - cells
    area = int((wanted[1] - wanted[0]).sum())
    edges = np.setxor1d(np.concatenate(ends), np.concatenate(wanted))
    near = tuple(map(int, np.divmod(edges[0], far))) if len(edges) else "nowhere"
    return (
        f"the calls cover {cells:,} cells, {twice:,} of them twice; the mask has {area:,} "
        f"(first difference near {near})"
    )


def _runs_of(images: Sequence[Image]) -> tuple[Array, Array, Array]:
    """Return the row, the start and the stop of all runs of all images."""
    known = {id(region): row_runs(region, block.sizes[0]) for block, region in images}
    runs = [known[id(region)] for _, region in images]
    sizes = np.array([block.sizes for block, _ in images], np.int64).reshape(-1, 2)
    counts = np.array([len(one.start) for one in runs], np.int64)
    # Where each sequence's rows and keys begin, were all of them one after the other.
    row_at, key_at = (np.repeat(starts_of(side)[:-1], counts) for side in sizes.T)
    row = row_at + np.concatenate([counted(np.diff(one.first))[0] for one in runs])
    start = key_at + np.concatenate([one.start for one in runs])
    stop = key_at + np.concatenate([one.stop for one in runs])
    size, first, step = _as_arrays(block.rows for block, _ in images)
    of, place = counted(size)
    rows = (first[of] + step[of] * place)[row]
    size, first, step = _as_arrays(block.keys for block, _ in images)
    at = starts_of(size)
    # A run of columns is one piece of each range of keys that it touches.
    low, high = (np.searchsorted(at, side, side="right") - 1 for side in (start, stop - 1))
    run, place = counted(high - low + 1)
    k = low[run] + place
    a, b = np.maximum(start[run], at[k]) - at[k], np.minimum(stop[run], at[k + 1]) - at[k]
    return (
        rows[run],
        np.where(step[k] > 0, first[k] + a, first[k] - b + 1),
        np.where(step[k] > 0, first[k] + b, first[k] - a + 1),
    )


def _as_arrays(every: Iterable[Ranges]) -> Array:
    """Return ranges one after the other: how long each is, its first position, its step."""
    found = [(len(one), one.start, one.step) for ranges in every for one in ranges]
    columns: Array = np.array(found, np.int64).reshape(-1, 3).T
    return columns
