"""What zones of distances cost at least: told before any of them is planned.

Each zone has calls of its own, and a bias by steps may have twenty. Most routes with so many are
dearer than another way by their launches alone.
"""

from __future__ import annotations

from collections import Counter

from attnkit.geometry import Slice
from attnkit.masks.base import anchor
from attnkit.planner.calls import MERGE_LAUNCHES, Zone, copied_before
from attnkit.planner.price import chip
from attnkit.planner.routes import Route

__all__ = ["cost_of_channels", "least_of_zones"]


def cost_of_channels(route: Route) -> float:
    """Return what it costs to copy query and key beside their channels, in nanoseconds."""
    return chip().nanoseconds(0, copied_before(route.request), 0, route.launches)


def least_of_zones(route: Route, bound: float) -> dict[Zone, float]:
    """Return what zones cost at least, in nanoseconds, before any of them is planned.

    Each that has cells is launched and merged by itself. Its rows, which are merged and lie in some
    tile each, are counted only where launches alone are cheaper than `bound`.
    """
    held, launched = _zones_with_cells(route), chip().nanoseconds(0, 0, 1, MERGE_LAUNCHES)
    if len(held) * launched >= bound:
        return dict.fromkeys(held, launched)
    return {zone: launched + _least_of_rows(route, zone) for zone in held}


def _least_of_rows(route: Route, zone: Zone) -> float:
    """Return what it costs at least to compute and merge the rows of a zone, in nanoseconds."""
    request, weights, rows = route.request, chip(), _rows_in(route, zone)
    tiles = sum(-(-count // weights.tile_q) * often for count, often in rows.items())
    flops = 2 * tiles * weights.tile_q * weights.tile_kv
    merged = sum(count * often for count, often in rows.items()) * request.value_dim
    moved = (request.dtype.itemsize + 2 * 4) * merged  # as `Launch.as_part` counts it
    return weights.nanoseconds(flops * (route.dim_of(zone) + request.value_dim), moved, 0)


def _zones_with_cells(route: Route) -> list[Zone]:
    """Return the zones that hold a cell of the request; none where its cells are not known."""
    matrices = route.request.matrices
    if not matrices.exact:
        return []
    each = {
        (part, sizes)
        for plane in matrices.planes
        for known, sizes in set(zip(plane, route.request.sequences, strict=True))
        for part in known.outer.slices
    }
    # The largest come first: what they have no cell in, the others seldom have.
    order = sorted(each, key=lambda pair: pair[0].i0 - pair[0].i1)
    return [zone for zone in route.zones if any(_rows(zone, *pair) for pair in order)]


def _rows_in(route: Route, zone: Zone) -> Counter[int]:
    """Return how many rows have a cell in a zone, or fewer, and in how many score matrices."""
    request, found = route.request, Counter[int]()
    share = request.num_heads // len(request.matrices.planes)
    for plane in request.matrices.planes:
        for (known, sizes), often in Counter(zip(plane, request.sequences, strict=True)).items():
            rows = max((_rows(zone, part, sizes) for part in known.outer.slices), default=0)
            found[rows] += often * share
    return found


def _rows(zone: Zone, part: Slice, sizes: tuple[int, int]) -> int:
    """Return how many rows of a slice have a cell in a zone."""
    lo, hi = part.lo, part.hi
    for align, first, last in zone.spans:
        at = anchor(align, *sizes)
        lo, hi = max(lo, first + at), min(hi, last + at)
    if lo > hi:
        return 0
    return max(0, min(part.i1, part.j1 - lo) - max(part.i0, part.j0 - hi))
