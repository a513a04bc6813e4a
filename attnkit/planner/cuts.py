"""Cutting a region into slices that the kernel's modes compute, in several ways.

Every closed slice is a band of its bounding rectangle, so every slice is one sequence of
a packed call in mode 4, and the finest cut always exists. Better cuts peel a whole band off
first (a window, a causal triangle), so that what remains is a few rectangles and corners.
"""

from __future__ import annotations

from collections.abc import Iterator

from attnkit.geometry import Region, Slice, Strip

__all__ = ["cuts"]

_MOST_BANDS = 12
_FEW_RUNS = 64
_SHARE = 8  # a band below an eighth of the region is not worth another call


def cuts(region: Region) -> Iterator[tuple[Slice, ...]]:
    """Yield ways to partition a region into slices; the first is always there.

    >>> sink_and_window = Region.of(
    ...     Slice(0, 64, 0, 64, -7, 0), Slice(0, 64, 0, 2, hi=0))
    >>> sorted(len(cut) for cut in cuts(sink_and_window))[0]
    2
    """
    seen: set[tuple[Slice, ...]] = set()
    for cut in _every_cut(region):
        if cut not in seen:
            seen.add(cut)
            yield cut


def _every_cut(region: Region) -> Iterator[tuple[Slice, ...]]:
    hull = region.bounds
    alone = hull is not None and Region.of(hull) == region
    yield (hull,) if hull is not None and alone else _stacked(region.slices)
    yield from _box_cuts(region)
    if alone:  # no cut of one slice asks for fewer windows
        return
    yield tuple(part.transpose() for part in _stacked(region.transpose().slices))
    yield tuple(part for chain in _chains(region) for part in _peeled(chain))
    for band in _bands(region):
        rest = region - Region.of(band)
        yield (band, *_stacked(rest.slices))
        for second in _bands(rest):
            yield (band, second, *_stacked((rest - Region.of(second)).slices))


def _chains(region: Region) -> list[Region]:
    """Split a region into staircases: runs that overlap the one above and never step back."""
    chains: list[list[Slice]] = []
    ends: dict[int, tuple[int, int, int]] = {}  # chain -> (next row, start, stop) of its last row
    for i0, i1, runs in region.rows():
        n = i1 - i0 - 1
        for run in runs:
            start, stop = run[0], run[2]
            lo = start - i0 if run[1] else None
            hi = stop - 1 - i0 if run[3] else None
            part = Slice(i0, i1, start, stop + run[3] * n, lo, hi)
            home = next(
                (
                    k
                    for k, (row, a, b) in ends.items()
                    if row == i0 and a <= start <= b and b <= stop
                ),
                len(chains),
            )
            if home == len(chains):
                chains.append([])
            chains[home].append(part)
            ends[home] = (i1, start + run[1] * n, stop + run[3] * n)
        ends = {k: end for k, end in ends.items() if end[0] == i1}
    return [Region.of(*parts) for parts in chains]


def _peeled(chain: Region) -> tuple[Slice, ...]:
    """Return the largest band inside a staircase, and what it leaves, if that is fewer windows."""
    if len(chain.slices) > 1:
        for band in _bands(chain)[:1]:
            return (band, *_stacked((chain - Region.of(band)).slices))
    return _stacked(chain.slices)


def _box_cuts(region: Region) -> Iterator[tuple[Slice, ...]]:
    """Yield a region of a few rows as rectangles, by rows and by keys.

    One call without a mask computes them all. By keys, each key may occur just once, so that
    keys and values need no copy.
    """
    if sum((i1 - i0) * len(runs) for i0, i1, runs in region.rows()) <= _FEW_RUNS:
        yield _boxes(region)
        yield tuple(box.transpose() for box in _boxes(region.transpose()))


def _boxes(region: Region) -> tuple[Slice, ...]:
    """Return the runs of every row as rectangles, equal ones of consecutive rows joined."""
    boxes: list[Slice] = []
    grows: dict[tuple[int, int], tuple[int, int]] = {}  # run -> the rows that have it, so far
    rows = [i for i0, i1, _ in region.rows() for i in range(i0, i1)]
    for i, run in [(row, run) for row in rows for run in region.row(row)]:
        first, end = grows.get(run, (i, i))
        if end < i:
            boxes.append(Slice(first, end, *run))
            first = i
        grows[run] = (first, i + 1)
    boxes += (Slice(*rows_of, *run) for run, rows_of in grows.items())
    return tuple(sorted(boxes, key=lambda box: (box.i0, box.j0)))


def _stacked(slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
    """Join slices that lie on each other while their union is one slice.

    They are the runs of rows, from the top. From one row to the next no end of a slice moves by
    more than one key, so only two that end right above a slice could go on in it.
    """
    ending: dict[tuple[int, int], tuple[int, Slice]] = {}  # row, start -> stop, of the last row
    for part in slices:
        grown, row = part, part.i0
        start, stop = max(part.j0, part.lo + row), min(part.j1, part.hi + row + 1)
        for before in (start, start - 1):
            end, above = ending.get((row, before), (0, None))
            if above is None or stop - end not in (0, 1):
                continue
            if (hull := _hull(above, part)) is not None:
                grown = hull
                del ending[row, before]
        last = grown.i1 - 1
        start, stop = max(grown.j0, grown.lo + last), min(grown.j1, grown.hi + last + 1)
        ending[last + 1, start] = stop, grown
    return tuple(sorted((part for _, part in ending.values()), key=lambda s: (s.i0, s.j0)))


def _hull(above: Slice, below: Slice) -> Slice | None:
    """Return the union of two slices if it is a slice."""
    hull = Slice(
        above.i0,
        below.i1,
        min(above.j0, below.j0),
        max(above.j1, below.j1),
        min(above.lo, below.lo),
        max(above.hi, below.hi),
    )
    return hull if hull.area == above.area + below.area else None


def _bands(region: Region) -> list[Slice]:
    """Return the largest bands that lie inside the region, over all of its rows and keys.

    Their ends are diagonals that occur as edges of the region, the tightest that its corners
    leave room for, or none.
    """
    hull = region.bounds
    if hull is None:
        return []
    ends = [(row, strip) for strip in region.rows() for row in (strip.i0, strip.i1 - 1)]
    rows = [(row, *_outer_ends(strip, row)) for row, strip in ends]
    lows = {hull.lo, max(start - row for row, start, _ in rows)}
    highs = {hull.hi, min(stop - 1 - row for row, _, stop in rows)}
    for i0, _, runs in region.rows():
        for start, start_slope, stop, stop_slope in runs:
            if start_slope and len(lows) < _MOST_BANDS:
                lows.add(start - i0)
            if stop_slope and len(highs) < _MOST_BANDS:
                highs.add(stop - 1 - i0)
    found, area = [], region.area
    for lo in lows:
        for hi in highs:
            band = Slice(hull.i0, hull.i1, hull.j0, hull.j1, lo, hi)
            if _SHARE * band.area >= area and Region.of(band) <= region:
                found.append(band)
    largest = [b for b in found if not any(b != c and b <= c for c in found)]
    return sorted(largest, key=lambda band: -band.area)[:3]


def _outer_ends(strip: Strip, row: int) -> tuple[int, int]:
    """Return where the first run starts and the last run stops, in one row of a strip."""
    n = row - strip.i0
    first, last = strip.runs[0], strip.runs[-1]
    return first[0] + first[1] * n, last[2] + last[3] * n
