"""The proof of a whole plan: its calls, how they merge, and what was moved around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from attnkit.errors import Refusal
from attnkit.planner.biases import lacking
from attnkit.planner.proof import Piece, disprove_calls, disprove_cover, disprove_places
from attnkit.planner.request import Request
from attnkit.planner.residues import resort
from attnkit.planner.route_proof import disprove_route
from attnkit.planner.routes import Route, in_parts, routes

if TYPE_CHECKING:
    from attnkit.planner.plan import Launch

__all__ = ["disprove_plan", "readable"]

# What reading a record that was changed by hand may raise. All of attnkit's errors are among them.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


_MOST = 2_000_001  # the kernel's largest number of anything is two million batch elements


def disprove_plan(
    request: Request,
    steps: Sequence[Launch],
    in_order: Request | None = None,
    route: Route | None = None,
) -> Refusal | None:
    """Return why calls do not compute a request; None if they do.

    A plan that cannot even be read, such as one with a sequence fewer in one of two lists, is not
    proven either, so that is an answer as well and no exception.
    """

    def check() -> Refusal | None:
        pieces = [(step.call, step.form) for step in steps]
        inner = route.request if route else request
        computed = in_order or inner
        return (
            next(filter(None, map(_inconsistent, dict.fromkeys((request, inner, computed)))), None)
            or _other_request(request, in_order, route)
            or _unmergeable(pieces)
            or disprove_places(computed, pieces, route)
            or disprove_cover(computed, pieces)
            or _other_route(request, route, pieces, in_order)
            or disprove_calls(computed, pieces)
        )

    return readable(check)


def readable(check: Callable[[], Refusal | None]) -> Refusal | None:
    """Return what a check of a record finds, or that the record cannot be read."""
    try:
        return check()
    except _UNREADABLE as error:
        return Refusal("unreadable", f"it is no plan ({type(error).__name__}: {error})"[:400])


def _inconsistent(request: Request) -> Refusal | None:
    """Check that tensors of such sizes exist: nobody could ask for others."""
    heads, kv_heads = request.num_heads, request.num_kv_heads
    lengths = (request.batch, request.q_len, request.kv_len)
    counts = (*lengths, heads, kv_heads, request.head_dim, request.value_dim)
    plain = all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
    if not plain or not all(n in range(_MOST) for n in counts) or not kv_heads or heads % kv_heads:
        return Refusal("other-request", f"no tensors have the sizes {counts}"[:200])
    lens = request.seqlens
    fits = request.layout_of.packed == (lens is not None)
    fits &= lens is None or lengths == (len(lens), lens.total_q, lens.total_kv)
    return None if fits else Refusal("other-request", "the lengths are not those of its layout")


def _other_request(
    request: Request, in_order: Request | None, route: Route | None
) -> Refusal | None:
    """Check that no term is lost, and that sorted positions are those of this request."""
    for sizes in set(request.sequences):
        request.mask.check(*sizes, request.batch, request.num_heads)  # raises what is caught above
        for term in request.bias:
            if any(n not in (None, size) for n, size in zip(term.extent, sizes, strict=True)):
                return Refusal("other-request", f"{term.text} is not for score matrices of {sizes}")
    lacks = lacking(request.softcap, request.bias)
    if lacks:
        return lacks[0]
    if in_order is not None and in_order != resort(route.request if route else request):
        return Refusal("other-request", "the calls are for other positions than asked for")
    return None


def _unmergeable(pieces: Sequence[Piece]) -> Refusal | None:
    """Check that there is one call, or that all are parts, in groups of heads that are disjoint."""
    forms = [form for _, form in pieces]
    if not forms:
        return Refusal("no-calls", "it has no calls")
    if len(forms) == 1 and not forms[0].partial:
        return None
    if not all(form.partial for form in forms):
        return Refusal("misplaced", "a call that answers whole rows stands among several")
    groups = {form.heads: form.kv_heads for form in forms}
    heads = [head for group in groups for head in group or ()]
    if (None in groups and len(groups) > 1) or len(set(heads)) < len(heads):
        reason = "a head is in calls of several groups of heads, each of which merges by itself"
        return Refusal("levels-per-head", reason)
    if any(form.kv_heads != groups[form.heads] for form in forms):
        return Refusal("misplaced", "calls of the same heads read other key heads")
    return None


def _other_route(
    request: Request, route: Route | None, pieces: Sequence[Piece], in_order: Request | None
) -> Refusal | None:
    """Check what goes around the calls: that it adds the bias, in a way that the planner knows."""
    if route is None:
        zones = [form.zone for _, form in pieces if form.zone is not None]
        return Refusal("other-sign", "a call is for a zone of no route") if zones else None
    wrong = disprove_route(request, route, pieces, in_order)
    if wrong is not None:
        return wrong
    known = list(_routes(request, len(pieces) > 1))
    if route not in known:
        return Refusal("other-route", f"{route} is no way around the calls of this request")
    if any((form.zone in route.zones) != bool(route.zones) for _, form in pieces):
        return Refusal("other-zone", "the zones of the calls are not those of the route")
    return None


def _routes(request: Request, in_several: bool) -> Iterator[Route]:
    """Yield the routes of a request, as they are where one call or several have the keys."""
    for way in (*routes(request), *routes(request, sloped=True)):
        found = in_parts(request, way) if isinstance(way, Route) and in_several else way
        if isinstance(found, Route):
            yield found
            if not in_several:
                yield from _without_zones(found)


def _without_zones(route: Route) -> Iterator[Route]:
    """Yield the form of a route for a mask that allows nothing: zones differ in nothing then."""
    if route.zones:
        yield Route(route.request, route.channels)
