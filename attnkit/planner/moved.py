"""What it costs to move tokens around the calls of a restated request (`orders`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnkit.planner.calls import Launch, Solution
from attnkit.planner.orders import moves
from attnkit.planner.parted import Parted, as_they_stand
from attnkit.planner.plan import Plan
from attnkit.planner.price import chip
from attnkit.planner.request import Request

__all__ = ["least_moved", "with_moves"]


def least_moved(request: Request, other: Request, known: Sequence[Plan]) -> float:
    """Return what a restated request costs at least, in nanoseconds: its cells and its copies."""
    prices = [plan.price for plan in known if plan.price is not None and request.matrices.exact]
    cells = max((price.cells for price in prices), default=0)
    moved, launches = moves(request, other)
    flops = 2 * cells * (request.head_dim + request.value_dim)
    return chip().nanoseconds(flops, moved, 1, launches)


def with_moves(request: Request, other: Request, found: Plan) -> Plan:
    """Return the plan of a request from one of a restated one, with what moving tokens costs."""
    if not found.steps:
        return replace(found, request=request)
    ways = [
        Solution(_with_moves(request, other, way.launches), way.bias_pass)
        for way in (Solution(found.steps), *found.alternatives)
    ]
    ways.sort(key=lambda way: way.price.nanoseconds)
    steps, others = ways[0].launches, tuple(ways[1:])
    return replace(found, request=request, steps=steps, alternatives=others, in_order=other)


def _with_moves(
    request: Request, other: Request, launches: tuple[Launch, ...]
) -> tuple[Launch, ...]:
    """Return calls with what is moved around them, by all of them or by each."""
    if isinstance(other.mask, Parted):  # each gathers by itself, from tokens as they stand
        placed = as_they_stand(request, other, launches)
        return tuple(
            replace(one, copied_bytes=own.copied_bytes, small_launches=own.small_launches)
            for one, own in zip(launches, placed, strict=True)
        )
    first, *rest = launches
    copied, small = moves(request, other)
    first = replace(
        first,
        copied_bytes=first.copied_bytes + copied,
        small_launches=first.small_launches + small,
    )
    return (first, *rest)
