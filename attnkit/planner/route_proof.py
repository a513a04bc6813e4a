"""Proof that the channels and levels of a route add the bias to every cell of the calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnkit.arguments import Anchor, anchor
from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.masks import Or
from attnkit.planner.calls import Launch, Zone
from attnkit.planner.orders import sorted_alike, sorting
from attnkit.planner.request import Request
from attnkit.planner.routes import (
    Channels,
    Route,
    Span,
    band_of,
    channel_dims,
    structure_of,
)
from attnkit.planner.sequences import Block
from attnkit.pse import Linear, PerKey, Stepped

__all__ = ["disprove_route"]


def disprove_route(
    request: Request,
    route: Route,
    launches: Sequence[Launch],
    in_order: Request | None = None,
) -> Refusal | None:
    """Return why channels and levels do not add the bias to every cell of the calls; or None.

    What the calls compute is proven elsewhere: here, that each addend is added once, and that
    every cell has a distance that its channels, or its level, are for. Where positions are
    sorted around the calls, they are those of `in_order`, and distances those from before.
    """
    taken = [part for one in route.channels for part in one.parts]
    rest = tuple(term for k, term in enumerate(request.bias) if k not in taken)
    dims = request.head_dim + sum(one.width for one in route.channels)
    inner = replace(request, bias=rest, head_dim=dims)
    if inner != route.request or len(set(taken)) < len(taken):
        return Refusal("other-request", "the calls are for another request than asked for")
    for one in route.channels:
        if structure_of(request, one.parts) != one.structure:
            text = " + ".join(request.bias[part].text for part in one.parts)
            return Refusal("other-bias", f"{text} is not the bias of the channels")
    for launch in launches:
        wrong = _other_channels(request, route, launch)
        for one, dims_of in channel_dims(request, route.channels):
            if wrong is None and not isinstance(one.structure, PerKey):
                hull = request.distances[one.structure.align]
                bands = _served(one, dims_of, launch.zone, hull)
                # Most requests lie in one of these as a whole, and cells need not be looked at.
                if not any(_within(hull, band) for band in bands):
                    wrong = _other_distances(in_order or request, one, bands, launch)
        if wrong is not None:
            return wrong
    return None


def _other_channels(request: Request, route: Route, launch: Launch) -> Refusal | None:
    """Check that a call has the channels of its zone, and turns whole addends of slopes only."""
    call, zone = launch.call, launch.zone
    if call.head_dim != route.dim_of(zone):
        return Refusal("other-dims", f"{call} has not the channels of its bias")
    if zone is None:
        return None
    slopes = [
        d for c, d in channel_dims(request, route.channels) if isinstance(c.structure, Linear)
    ]
    stepped = isinstance(route.channels[-1].structure, Stepped)
    if not launch.partial or not set(zone.turned) <= set(slopes):
        return Refusal("other-sign", f"{call} turns what has no sign")
    if zone.row is not None and not stepped:
        return Refusal("other-level", f"{call} adds a row of no table")
    return None


def _other_distances(
    request: Request, one: Channels, bands: list[Span], launch: Launch
) -> Refusal | None:
    """Check that the distances of a call's cells are among those that an addend serves in it."""
    call = launch.call
    if launch.is_opaque:
        return Refusal("cover", "the distances in a mask of unknown cells are unknown")
    align = one.structure.align if not isinstance(one.structure, PerKey) else "bottom_right"
    head = launch.heads[0] if launch.heads else 0
    for block, region in zip(launch.blocks, call.regions(None), strict=True):
        if not _at_distances(request, align, bands, head, block, region):
            if isinstance(one.structure, Linear):
                reason = f"{call} has cells on the side that its channels have the wrong sign for"
                return Refusal("other-sign", reason)
            return Refusal("other-level", f"{call} has cells at distances of another step")
    return None


def _at_distances(
    request: Request, align: Anchor, bands: list[Span], head: int, block: Block, region: Region
) -> bool:
    """Whether a block's cells have distances in some bands; its bounds alone mostly tell."""
    sizes, box = request.sequences[block.batch], region.bounds
    if box is None:
        return True
    if sorting(request) is not None or not block.is_rectangle:
        near = sorted_alike(request, Or.of(*(band_of(align, lo, hi) for lo, hi in bands)))
        return block.image(region) <= near.region(*sizes, block.batch, head)
    i0, _, j0, _ = block.ends
    shift = j0 - i0 - anchor(align, *sizes)
    if any(_within((box.lo + shift, box.hi + shift), band) for band in bands):
        return True
    inside = (Slice(box.i0, box.i1, box.j0, box.j1, lo - shift, hi - shift) for lo, hi in bands)
    return region <= Region.of(*inside)


def _served(one: Channels, dims: Span, zone: Zone | None, hull: Span) -> list[Span]:
    """Return the distances that an addend is right for in a zone, within those of the request."""
    lo, hi = hull
    if isinstance(one.structure, Linear):
        turned = zone is not None and dims in zone.turned
        past = (one.sign > 0) != turned
        return [(min(lo, 0), 0)] if past else [(0, max(hi, 0))]
    if zone is None or zone.row is None:
        return [one.span] if one.span is not None else []
    steps = one.structure.steps(lo, hi) if isinstance(one.structure, Stepped) else ()
    return [(a, b) for a, b, row in steps if row == zone.row]


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
