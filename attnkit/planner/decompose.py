"""A region that no single call computes without a full mask, as a few calls that are merged.

Each score matrix is parted by rows into segments that gather all of their keys (see
`staircases`); or it is split into its diagonal blocks, each of which is cut into segments whose
keys lie side by side (see `cuts`). Segments with a common window are packed into one TND call (see
`grouping`). Where a row is in several segments the partial outputs are merged by their softmax
statistics. Several ways are tried; the price chooses. A learnable sink takes part in the merge,
not in the calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.planner.bounds import Work, dearer
from attnkit.planner.calls import Launch, diagonal_blocks
from attnkit.planner.grouping import Segment
from attnkit.planner.packing import Pieces, head_groups, kv_heads_of, packings
from attnkit.planner.request import Request
from attnkit.planner.search import Search
from attnkit.planner.sequences import Block

__all__ = ["decompositions", "first_decomposition", "partings"]

_MOST_CELLS = 1024


def partings(
    request: Request,
    groups: Sequence[tuple[int, ...]] | None = None,
    search: Search | None = None,
    by_keys: bool = False,
) -> Iterator[tuple[Launch, ...] | Refusal]:
    """Yield sets of calls that have every row once, with all of its keys, or why there is none.

    Or every key once, with all of its rows, where that is asked. Not where the calls have a bias:
    its positions are those of the call. Otherwise as `decompositions`.
    """
    search = search or Search()
    if request.bias or not search.gathers or not request.matrices.exact:
        return
    # Zones of distances are many, and mostly one slice each: gathered, these save next to nothing.
    if groups is not None and _in_slices(request, groups):
        return
    groups = head_groups(request) if groups is None else groups
    planes = [request.matrices.regions(heads[0]) for heads in groups]
    known = {region: search.all_partitions(region, by_keys) for own in planes for region in own}
    for depth in range(max(map(len, known.values()), default=0) if all(known.values()) else 0):
        pieces = tuple(
            tuple(
                replace(one, block=replace(one.block, batch=b)) if b else one
                for b, region in enumerate(regions)
                for one in known[region][: depth + 1][-1]
            )
            for regions in planes
        )
        yield from packings(request, groups, pieces, search)


def decompositions(
    request: Request,
    groups: Sequence[tuple[int, ...]] | None = None,
    search: Search | None = None,
    least: float = inf,
) -> Iterator[tuple[Launch, ...] | Refusal]:
    """Yield sets of calls whose cells are disjoint and make up the request, or why there is none.

    The keys of a sequence lie side by side. Only requests whose score matrices are regions are
    cut; heads that differ get calls of their own. `groups` are heads that do not differ, where a
    caller knows which are to stay together. `least` is what is known to be possible, in
    nanoseconds: cuts that cannot be cheaper are not tried.
    """
    if not request.matrices.exact:
        reason = f"{request.mask!r} is not a region that could be cut into pieces"
        yield Refusal("cut-region", reason, "several calls")
        return
    groups = head_groups(request) if groups is None else groups
    search = search or Search()
    seen = set()
    for pieces in _cut(request, groups, search, least):
        if isinstance(pieces, Refusal):
            yield pieces
        elif pieces not in seen and any(pieces):
            seen.add(pieces)
            yield from packings(request, groups, pieces, search)


def _in_slices(request: Request, groups: Sequence[tuple[int, ...]]) -> bool:
    """Whether each diagonal block is one slice, and so one sequence as it is."""
    inside = {own for heads in groups for _, own in _diagonal(request, heads[0])}
    hulls = [(own, own.bounds) for own in inside]
    return all(hull is None or Region.of(hull) == own for own, hull in hulls)


def first_decomposition(
    request: Request, groups: Sequence[tuple[int, ...]], search: Search
) -> tuple[Launch, ...] | None:
    """Return the calls of the first cut, in as few windows as there can be; None if it has none."""
    inside = [_diagonal(request, heads[0]) for heads in groups]
    pieces = tuple(_segments(search, some, 0, request.needs_grad) for some in inside)
    found = next(packings(request, groups, pieces, search), None)
    return found if isinstance(found, tuple) else None


def _cut(
    request: Request,
    groups: Sequence[tuple[int, ...]],
    search: Search,
    least: float,
) -> Iterator[Pieces | Refusal]:
    """Yield the ways to cut every score matrix into pieces whose keys lie side by side.

    Those that a few numbers of theirs show to be too dear are refused.
    """
    counts = [(len(heads), len(kv_heads_of(request, heads))) for heads in groups]
    planes = [request.matrices.regions(heads[0]) for heads in groups]
    for with_keys in (False, True) if least < inf else ():
        works = [Work.total(Work.of_region(one, with_keys) for one in plane) for plane in planes]
        if (refusal := dearer(request, counts, planes, works, least)) is not None:
            yield refusal
            return
    inside = [_diagonal(request, heads[0]) for heads in groups]
    depths = max((len(search.all_cuts(own)) for some in inside for _, own in some), default=0)
    for depth in range(depths):
        if least < inf:
            works = [
                Work.of_slices(part for _, own in some for part in search.cut(own, depth))
                for some in inside
            ]
            if (refusal := dearer(request, counts, planes, works, least)) is not None:
                yield refusal
                continue
        # The grad op takes no packed window of width 1: such bands are single cells in training.
        for cells in (True,) if request.needs_grad else (False, True):
            yield tuple(_segments(search, some, depth, cells) for some in inside)


def _diagonal(request: Request, head: int) -> tuple[tuple[Block, Region], ...]:
    """Return the diagonal blocks with rows and keys, and the region of each from its corner."""
    return tuple(
        (block, region.cut(block.ends[:2], block.ends[2:]))
        for b, region in enumerate(request.matrices.regions(head))
        for block in diagonal_blocks(region, *request.sequences[b], b)
        if all(block.sizes)
    )


def _segments(
    search: Search, inside: tuple[tuple[Block, Region], ...], depth: int, cells: bool
) -> tuple[Segment, ...]:
    """Cut every block in its `depth`-th way."""
    return tuple(
        Segment.of(block.batch, cell)
        for block, region in inside
        for part in search.cut(region, depth)
        for cell in _split(part.shift(block.ends[0], block.ends[2]), cells)
    )


def _split(part: Slice, cells: bool) -> Iterator[Slice]:
    """Split a band of width 1 into its cells, where that is wanted and they are not too many."""
    rows = part.i1 - part.i0
    if part.lo < part.hi or rows == 1 or rows > _MOST_CELLS or not cells:
        yield part
        return
    for i in range(part.i0, part.i1):
        yield Slice(i, i + 1, i + part.lo, i + part.lo + 1)
