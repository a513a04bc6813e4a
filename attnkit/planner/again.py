"""A request like one that was planned before: the same form of call, proven for what is new.

A training step has new lengths of texts, a decoding step one key more. What changes then is which
cells are asked for, and seldom which kind of call is the cheapest. So the kind that a search found
is filled in anew, alone, and proven like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from attnkit.errors import Refusal
from attnkit.planner.calls import Launch
from attnkit.planner.candidates import candidates, whole_calls
from attnkit.planner.decompose import first_decomposition
from attnkit.planner.packing import head_groups
from attnkit.planner.request import Request
from attnkit.planner.routes import Route, routes
from attnkit.planner.search import Search

if TYPE_CHECKING:
    from attnkit.planner.plan import Plan

__all__ = ["has_form", "in_same_form"]

# Beyond, another form may be the cheapest: then it is searched for again.
_MOST_GROWTH = 2


def has_form(plan: Plan) -> bool:
    """Whether a plan has calls on regions of one kind: one on whole matrices, or those of zones."""
    if plan.in_order is not None or plan.bias_pass is not None:
        return False
    if not plan.steps or not plan.request.matrices.exact:
        return False
    zoned = plan.route is not None and bool(plan.route.zones)
    return zoned or (len(plan.steps) == 1 and not plan.steps[0].partial)


def in_same_form(plan: Plan, request: Request) -> Plan | None:
    """Return the plan of another request by the kind of call that a plan has, or None.

    None where such a call would compute something else, where the op rejects it, and where the
    number of keys, of sequences or of the keys of the longest has doubled, or halved.
    """
    sizes = zip(_sizes(plan.request), _sizes(request), strict=True)
    if any(max(pair) > _MOST_GROWTH * min(pair) for pair in sizes):
        return None
    if not request.matrices.exact or not request.matrices.allow_any:
        return None
    reason = (
        f"another kind of call was not looked for: {plan.request.mask!r} of {plan.request.kv_len} "
        "keys, planned before, took this one"
    )
    told = Refusal("as-before", reason, "every other")
    like = _zones_like if plan.route is not None and plan.route.zones else _like
    for route, steps in like(plan, request):
        found = replace(
            plan, request=request, steps=steps, alternatives=(), refusals=(told,), route=route
        )
        if found.disprove() is None:
            return found
    return None


def _sizes(request: Request) -> tuple[int, int, int]:
    longest = max((kv_len for _, kv_len in request.sequences), default=0)
    return request.kv_len, request.batch, longest


def _like(plan: Plan, request: Request) -> Iterator[tuple[Route | None, tuple[Launch]]]:
    """Yield the calls for a request that have the layout, the mode and the masks of a plan's."""
    step = plan.steps[0]
    own = step.label.removesuffix(f", {plan.route}")  # without what is done around it
    full = step.call.atten_mask is not None and step.call.atten_mask.kind == "full"
    for route in (None,) if plan.route is None else _routes_like(plan.route, request):
        inner = request if route is None else route.request
        for bare in whole_calls(inner):
            if bare.call.input_layout == step.call.input_layout:
                for one in candidates(inner, bare, full_masks=full):
                    if isinstance(one, Launch) and one.label == own:
                        yield route, (one if route is None else route.around(one),)


def _zones_like(plan: Plan, request: Request) -> Iterator[tuple[Route, tuple[Launch, ...]]]:
    """Yield the calls of a request in zones like a plan's, where these are not many more."""
    for route in _routes_like(plan.route, request) if plan.route is not None else ():
        search, groups = Search(gathers=False), tuple(head_groups(route.request))
        found: list[Launch] = []
        for zone in route.zones:
            part = route.within(zone)
            if part.matrices.allow_any:
                calls = first_decomposition(part, groups, search) or ()
                found += (call.in_zone(zone) for call in calls)
        if 0 < len(found) <= _MOST_GROWTH * len(plan.steps):
            first, *rest = found
            yield route, (route.around(first), *rest)


def _routes_like(route: Route, request: Request) -> Iterator[Route]:
    """Yield the routes of a request with as many zones, in which the same addends are channels."""
    form = _form(route)
    for way in chain(routes(request), routes(request, sloped=True)):
        if isinstance(way, Route) and _form(way) == form:
            yield way


def _form(route: Route) -> tuple[object, ...]:
    """Return what routes of one form have in common: addends, levels, and turned channels."""
    parts = [one.parts for one in route.channels]
    return parts, [(zone.row is not None, bool(zone.turned)) for zone in route.zones]
