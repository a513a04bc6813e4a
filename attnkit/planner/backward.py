"""Which calls make the gradients of a plan: its own, or others that have each key once.

The grad op is given the maximum, the sum and the output of whole rows, so forward and backward
may take a mask apart in two ways. Forward calls gather the keys of their rows; where these are
many, it is cheaper to gather rows in the backward, once for all the keys that they share: then
the gradients of keys and values are written where they lie. With dropout both passes must draw
alike, so there the calls are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnkit.errors import Refusal
from attnkit.kernel.stats import COPIES
from attnkit.planner.calls import Launch
from attnkit.planner.decompose import partings
from attnkit.planner.price import chip
from attnkit.planner.proof import disprove_calls, disprove_cover, disprove_places, reasons_against
from attnkit.planner.request import Request
from attnkit.planner.routes import Route
from attnkit.planner.search import Search

__all__ = ["backward_calls", "backward_time", "disprove_backward"]

# Runs of keys up to which a mask is looked at by its keys, too: turning it round takes time.
_MOST_RUNS = 4096
# Five products in place of two.
_PRODUCTS = 5 / 2


def backward_time(launches: Iterable[Launch]) -> float:
    """Return what the grad calls cost, in nanoseconds, with what is moved around them."""
    return sum(map(_time, launches))


def _time(launch: Launch) -> float:
    call, price = launch.call, launch.price
    item, rows, keys = call.dtype.itemsize, len(launch.queries), len(launch.keys)
    rows, keys = rows * call.num_heads, keys * call.num_kv_heads
    both = call.head_dim + call.value_dim
    # The statistics are written as the op takes them; gradients are read and added in float32.
    moved = 2 * COPIES * 4 * rows + (item + 2 * 4) * (rows * call.head_dim + keys * both)
    small = 5
    if launch.queries.span is None:  # query, output and its gradient
        moved, small = moved + 2 * item * rows * (both + call.value_dim), small + 3
    if launch.keys.span is None:
        moved, small = moved + 2 * item * keys * both, small + 2
    flops = int(_PRODUCTS * price.flops)
    return chip().nanoseconds(flops, moved + int(_PRODUCTS * price.mask_traffic), 1, small)


def backward_calls(request: Request, steps: Sequence[Launch], search: Search) -> tuple[Launch, ...]:
    """Return the calls by whose grad calls a plan's gradients come; none where they are its own."""
    runs = sum(
        len(strip.runs)
        for plane in request.matrices.planes
        for k in set(plane)
        for strip in k.outer.strips
    )
    if not _may_differ(request, steps) or runs > _MOST_RUNS:
        return ()
    best: tuple[Launch, ...] = ()
    least = backward_time(steps)
    groups = tuple(dict.fromkeys(step.heads or tuple(range(request.num_heads)) for step in steps))
    for parts in partings(request, groups, search, by_keys=True):
        if isinstance(parts, Refusal) or any(reasons_against(request, one) for one in parts):
            continue
        time = backward_time(parts)
        if time < least:
            best, least = parts, time
    return best


def _may_differ(request: Request, steps: Sequence[Launch]) -> bool:
    """Whether other calls than the steps may make the gradients of a request."""
    if not request.needs_grad or request.dropout or request.bias or not request.matrices.exact:
        return False
    return bool(steps) and all(step.partial and step.zone is None for step in steps)


def disprove_backward(
    request: Request, steps: Sequence[Launch], back: Sequence[Launch], route: Route | None
) -> Refusal | None:
    """Return why other calls than the steps do not make the gradients of a request."""
    if back == ():
        return None
    if not _may_differ(request, steps) or not all(one.partial for one in back):
        reason = "gradients of this plan come from its own calls"
        return Refusal("other-backward", reason)
    if {one.heads for one in back} != {one.heads for one in steps}:
        return Refusal("other-backward", "gradients are made for other heads than are answered")
    return (
        disprove_places(request, back, route)
        or disprove_cover(request, back)
        or disprove_calls(request, back)
    )
