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
from attnkit.planner.request import Request
from attnkit.planner.routes import Route, routes

if TYPE_CHECKING:
    from attnkit.planner.plan import Plan

__all__ = ["has_form", "in_same_form"]

# Beyond, another form may be the cheapest: then it is searched for again.
_MOST_GROWTH = 2


def has_form(plan: Plan) -> bool:
    """Whether a plan is one call on whole matrices that are regions, around it channels at most."""
    if len(plan.steps) != 1 or plan.in_order is not None or plan.bias_pass is not None:
        return False
    if plan.route is not None and plan.route.zones:
        return False
    return plan.request.matrices.exact and not plan.steps[0].partial


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
    for route, step in _like(plan, request):
        found = replace(
            plan, request=request, steps=(step,), alternatives=(), refusals=(told,), route=route
        )
        if found.disprove() is None:
            return found
    return None


def _sizes(request: Request) -> tuple[int, int, int]:
    longest = max((kv_len for _, kv_len in request.sequences), default=0)
    return request.kv_len, request.batch, longest


def _like(plan: Plan, request: Request) -> Iterator[tuple[Route | None, Launch]]:
    """Yield the calls for a request that have the layout, the mode and the masks of a plan's."""
    (step,) = plan.steps
    full = step.call.atten_mask is not None and step.call.atten_mask.kind == "full"
    for route in _routes_like(plan.route, request):
        inner = request if route is None else route.request
        for bare in whole_calls(inner):
            if bare.call.input_layout == step.call.input_layout:
                for one in candidates(inner, bare, full_masks=full):
                    if isinstance(one, Launch) and one.label == _own_label(plan):
                        yield route, one if route is None else route.around(one)


def _routes_like(route: Route | None, request: Request) -> Iterator[Route | None]:
    """Yield the routes of a request that take the same addends as another one: one call's."""
    if route is None:
        yield None
        return
    parts = [one.parts for one in route.channels]
    for way in chain(routes(request), routes(request, sloped=True)):
        if isinstance(way, Route) and not way.zones and parts == [c.parts for c in way.channels]:
            yield way


def _own_label(plan: Plan) -> str:
    """Return the name of a plan's call without what is done around it."""
    return plan.steps[0].label.removesuffix(f", {plan.route}")
