"""From a request to fused kernel calls: enumerate, prove, price, choose; keep every refusal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import inf, prod

from attnkit.errors import Refusal
from attnkit.kernel import KernelCall
from attnkit.masks.selection import Selection
from attnkit.planner.backward import backward_calls
from attnkit.planner.bias_pass import BiasPass, frozen
from attnkit.planner.biases import lacking
from attnkit.planner.block_sparse import by_blocks
from attnkit.planner.calls import (
    Launch,
    Solution,
    by_heads,
    widened,
)
from attnkit.planner.candidates import candidates, whole_calls
from attnkit.planner.decompose import decompositions, partings
from attnkit.planner.moved import least_moved, with_moves
from attnkit.planner.orders import only_merges, restated, sorted_positions
from attnkit.planner.packing import head_groups
from attnkit.planner.plan import Plan
from attnkit.planner.price import Price, least_with_full_mask
from attnkit.planner.proof import reasons_against
from attnkit.planner.request import Request
from attnkit.planner.routes import Route, in_parts, routes
from attnkit.planner.search import Search
from attnkit.planner.selected import select
from attnkit.planner.tilings import tilings
from attnkit.planner.zones import cost_of_channels, least_of_zones
from attnkit.progress import progress

__all__ = ["MOST_MASK_CELLS", "lower", "on_route", "search_for"]

MOST_MASK_CELLS = 2**24
"""Entries up to which a mask of one entry per cell is weighed like any other plan.

Such masks are built once and kept (4,096 x 4,096 is one of 16.8 MB). A larger one would be built
in every step, and is taken only where nothing else computes the request.
"""


@lru_cache(maxsize=64)  # a packed batch is large, and in training each one is new
def lower(request: Request, block_sparse: bool | Refusal = False) -> Plan:
    """Return how the fused kernel computes a request, as a plan that no backend has taken yet.

    `block_sparse` says whether the block-sparse op is there as well, or why it is not. A pure
    function, cached on the record. Without steps, the refusals say why there are none.
    """
    with progress("planning"):
        return search_for(request, Search(block_sparse=block_sparse))


def search_for(request: Request, search: Search) -> Plan:
    """Return how the fused kernel computes a request, given what was found for others like it.

    One call without a mask of one entry per cell is looked for first, then several such calls
    that are merged. One with such a mask is weighed beside them, up to `MOST_MASK_CELLS`; a
    larger one is for requests that nothing else computes.
    """
    lacks = lacking(request)
    if lacks:
        return Plan("", request, refusals=tuple(lacks))
    if not request.batch:
        reason = "the kernel needs at least one batch element"
        return Plan("", request, refusals=(Refusal("empty-batch", reason, "any mode"),))
    if isinstance(request.mask, Selection):
        return select(request)
    wide = widened(request)
    if wide is not request:
        return _with_copies(
            replace(search_for(wide, search), request=request),
            f"query and key with zeros up to {wide.head_dim} dimensions",
            2,
        )
    trained = {k for k, term in enumerate(request.bias) if term.requires_grad}
    stuck = tuple(k for k in sorted(trained) if not request.bias[k].low_rank)
    if stuck:
        return _with_pass(request, stuck, search_for(frozen(request, stuck), search))
    if any(term.low_rank for term in request.bias):
        return _cheapest_way(request, search)
    return _as_given(request, search)


def _with_pass(request: Request, terms: tuple[int, ...], found: Plan) -> Plan:
    """Return the plan of a request from one where some addends are frozen, and another way apart.

    The pass that makes their gradients is a pass for those that the plan has one for already.
    """
    if not found.steps:
        return replace(found, request=request)
    more = () if found.bias_pass is None else found.bias_pass.terms
    made = BiasPass.of(request, tuple(sorted({*terms, *more})))
    others = tuple(replace(other, bias_pass=made) for other in found.alternatives)
    return replace(found, request=request, bias_pass=made, alternatives=others)


def _with_copies(found: Plan, told: str, launches: int) -> Plan:
    """Return a plan whose query and key are copied before the calls, and what that costs."""
    if not found.steps:
        return found
    first, *rest = found.steps
    return replace(found, steps=(first.after_copies(found.request, told, launches), *rest))


def _as_given(request: Request, search: Search, by_cells: bool = True) -> Plan:
    """Return how the kernel computes a request whose biases reach it as biases.

    Where tokens may be moved, the price chooses. What is a region on moved tokens alone has a call
    on those in place only with a mask of one entry per cell: `by_cells` says whether that may be,
    and it must not be too large for one.
    """
    ways = tuple(restated(request))
    others = [way for way in ways if isinstance(way, Request)]
    by_cells &= max(map(prod, request.sequences), default=0) <= MOST_MASK_CELLS
    stays = not others or request.matrices.exact or by_cells
    options = [_in_place(request, search)] if stays else []
    refused = [way for way in ways if isinstance(way, Refusal)]
    for way in others:
        bound, least = _least(options), least_moved(request, way, options)
        if least < bound:
            options.append(in_other_order(request, way, search))
        else:
            reason = (
                f"moving tokens and computing their cells would cost {least / 1e3:,.1f} us or "
                f"more, and calls on tokens where they are {bound / 1e3:,.1f} us"
            )
            refused.append(Refusal("dearer-order", reason, f"{way.mask!r}"))
    best = min(options, key=lambda plan: (_last_resort(plan.steps), _least([plan])))
    for other in options:
        if other is not best:
            refused += other.refusals if not other.steps else [_dearer_than(other, best)]
    return replace(best, refusals=(*best.refusals, *refused)) if refused else best


def in_other_order(request: Request, other: Request, search: Search) -> Plan:
    """Return how the kernel computes a request restated (`orders`), with the tokens' ways there."""
    return with_moves(request, other, _in_place(other, search))


def _dearer_than(other: Plan, best: Plan) -> Refusal:
    where = f"{other.in_order.mask!r}" if other.in_order else "tokens where they are"
    reason = (
        f"{other.solution.label} would cost {_nanoseconds(other.solution) / 1e3:,.1f} us, and the "
        f"calls taken {_nanoseconds(best.solution) / 1e3:,.1f} us"
    )
    return Refusal("dearer-order", reason, where)


def _in_place(request: Request, search: Search) -> Plan:
    """Return how the kernel computes a request with its tokens where they are."""
    refusals: list[Refusal] = []
    bare_calls = () if only_merges(request) else tuple(whole_calls(request))
    found: list[Solution] = []
    for bare in bare_calls:
        ordered = candidates(request, bare, full_masks=False)
        found += islice(_proven(request, ordered, refusals), 1)  # they come by price
    if not found:
        found, reasons = _merged(request, search)
        refusals += reasons
        way = [] if only_merges(request) else _by_blocks(request, search, found)
        found += [way] if isinstance(way, Solution) else []
        refusals += [] if isinstance(way, Solution) else way
    if any(_nothing_beats(request, solution) for solution in found):
        reason = "calls without a mask of one entry per cell compute the same"
        refusals.append(Refusal("full-mask-not-needed", reason, "modes 0 and 1"))
    else:
        best = min(found, key=_nanoseconds, default=None)
        for bare in bare_calls:
            found += _with_full_mask(request, bare, refusals, best.price if best else None)
    found = _within_memory(request, found, refusals)
    if len(found) > 1:  # a sort asks for the price of a single one, too
        found.sort(key=_nanoseconds)
    steps = found[0].launches if found else ()
    back = backward_calls(request, steps, search)
    return Plan("", request, steps, tuple(found[1:]), tuple(refusals), back=back)


def _within_memory(
    request: Request, found: list[Solution], refusals: list[Refusal]
) -> list[Solution]:
    """Return what takes no more memory than is allowed."""
    limit = request.memory_limit
    if limit is None:
        return found
    for one in found:
        if one.price.peak_bytes > limit:
            reason = f"it takes {one.price.peak_bytes:,} bytes, and memory_limit is {limit:,}"
            refusals.append(Refusal("memory-limit", reason, one.label))
    return [one for one in found if one.price.peak_bytes <= limit]


def _by_blocks(
    request: Request, search: Search, rivals: Sequence[Solution]
) -> Solution | list[Refusal]:
    """Return the way that calls the block-sparse op, or why it is none, where that was asked."""
    if search.block_sparse is True:
        bound = min(map(_nanoseconds, rivals), default=inf)
        return by_blocks(request, lambda rest: _merged(rest, search)[0], bound)
    return [search.block_sparse] if isinstance(search.block_sparse, Refusal) else []


def _nanoseconds(solution: Solution) -> float:
    return solution.price.nanoseconds


def _nothing_beats(request: Request, solution: Solution) -> bool:
    """Whether a solution is one call on whole matrices: it visits no tile that a mask could spare.

    Packed blocks may: each starts another tile, and tokens may be copied around the call.
    """
    (first, *rest) = solution.launches
    return not rest and not first.packs(request) and not first.partial


def _with_full_mask(
    request: Request, bare: Launch, refusals: list[Refusal], rival: Price | None
) -> list[Solution]:
    """Return the cheapest call that reads a mask of one entry per cell, if there is one.

    Beside a rival it is looked at only where it might be cheaper.
    """
    ordered: Iterable[Launch | Refusal] = candidates(request, bare, full_masks=True)
    if rival is not None:
        entries = prod(max(side) for side in zip(*(k.sizes for k in bare.blocks), strict=True))
        if entries > MOST_MASK_CELLS:
            refusals.append(_too_large(entries, "modes 0 and 1"))
            return []
        least = least_with_full_mask(request, entries, rival.cells)
        if least >= rival.nanoseconds:
            refusals.append(_dearer(least, rival, "modes 0 and 1"))
            return []
        ordered = (_worth_proving(candidate, rival) for candidate in ordered)
    return sorted(_proven(request, ordered, refusals), key=_nanoseconds)[:1]


def _worth_proving(candidate: Launch | Refusal, rival: Price) -> Launch | Refusal:
    """Return a candidate with a full mask, or that the mask is too large, or the price too high."""
    if isinstance(candidate, Refusal):
        return candidate
    entries = _mask_cells(candidate.call)
    if entries > MOST_MASK_CELLS:
        return _too_large(entries, candidate.label)
    price = candidate.price.nanoseconds
    return candidate if price < rival.nanoseconds else _dearer(price, rival, candidate.label)


def _too_large(entries: int, subject: str) -> Refusal:
    reason = (
        f"a mask of {entries:,} entries would be built in every step; up to "
        f"{MOST_MASK_CELLS:,} one is kept, and weighed"
    )
    return Refusal("full-mask-size", reason, subject)


def _dearer(price: float, rival: Price, subject: str) -> Refusal:
    reason = (
        f"with a mask of one entry per cell it would cost {price / 1e3:,.1f} us or more, and "
        f"without one {rival.nanoseconds / 1e3:,.1f} us"
    )
    return Refusal("full-mask-dearer", reason, subject)


def _merged(
    request: Request, search: Search, groups: tuple[tuple[int, ...], ...] | None = None
) -> tuple[list[Solution], list[Refusal]]:
    """Return the sets of calls that compute the request together, each for a group of heads.

    Tokens are gathered in packed order, so requests in dense layouts share what is found.
    """
    key = (request if request.seqlens else replace(request, layout="BSND"), groups)
    if key not in search.covers:
        search.covers[key] = _covers(request, search, groups)
    found, refusals = search.covers[key]
    return list(found), list(refusals)


def _covers(
    request: Request, search: Search, groups: tuple[tuple[int, ...], ...] | None
) -> tuple[list[Solution], list[Refusal]]:
    found: list[Solution] = []
    refusals: list[Refusal] = []
    seen: set[frozenset[object]] = set()
    # Sets of calls have calls in common: each is proven and priced once.
    known: dict[Launch, tuple[Launch, list[Refusal]]] = {}
    for parts in _ways(request, search, groups, found):
        if isinstance(parts, Refusal):
            refusals.append(parts)
            continue
        same = frozenset((part.call, part.blocks) for part in parts)
        if same in seen:  # the same calls, in another order
            continue
        seen.add(same)
        for part in parts:
            if part not in known:
                known[part] = (part, reasons_against(request, part))
        judged = [known[part] for part in parts]
        reasons = [
            replace(reason, subject=f"{len(parts)} calls, {part.label}")
            for part, against in judged
            for reason in against
        ]
        refusals += reasons
        if parts and not reasons:
            calls = tuple(part for part, _ in judged)  # those of a zone always merge with others
            found.append(Solution(calls if groups else _without_merge(request, calls)))
    return found, refusals


def _ways(
    request: Request,
    search: Search,
    groups: tuple[tuple[int, ...], ...] | None,
    found: Sequence[Solution],
) -> Iterator[tuple[Launch, ...] | Refusal]:
    """Yield sets of calls: with every row once, in tiles of rows, and merged, the slowest to find.

    What cannot cost less than what was `found` so far is left out.
    """
    yield from partings(request, groups, search)
    if search.gathers and groups is None:
        yield from tilings(request, MOST_MASK_CELLS, min(map(_nanoseconds, found), default=inf))
    least = min(map(_nanoseconds, found), default=inf)
    yield from decompositions(request, groups, search, least)


def _without_merge(request: Request, launches: Sequence[Launch]) -> tuple[Launch, ...]:
    """Return calls with what is done around them where no row of theirs is merged."""
    rows = sum(q_len for q_len, _ in request.sequences)
    once = {some.heads for some in by_heads(launches) if some.once}
    return tuple(one.as_part(rows) if one.heads in once else one for one in launches)


def _proven(
    request: Request, ordered: Iterable[Launch | Refusal], refusals: list[Refusal]
) -> Iterator[Solution]:
    """Yield the candidates that are proven; those that fall are refused."""
    for candidate in ordered:
        if isinstance(candidate, Refusal):
            refusals.append(candidate)
            continue
        reasons = reasons_against(request, candidate)
        refusals += [replace(reason, subject=candidate.label) for reason in reasons]
        if not reasons:
            yield Solution((candidate,))


def _cheapest_way(request: Request, search: Search) -> Plan:
    """Return the cheapest of the kernel's bias input and the routes.

    What trains has its gradient from the calls on a route, and from a pass beside them elsewhere.
    """
    learnable = tuple(k for k, term in enumerate(request.bias) if term.requires_grad)
    options = [] if learnable else [_as_given(request, search)]
    if options and _is_plain(options[0].steps):
        return options[0]
    refusals: list[Refusal] = []
    ways = dict.fromkeys((*routes(request), *routes(request, sloped=True)))
    refusals += (way for way in ways if isinstance(way, Refusal))
    # Few zones are few calls: what they cost bounds the others.
    some = (way for way in ways if isinstance(way, Route))
    for route in sorted(some, key=lambda route: len(route.zones)):
        options.append(on_route(request, route, search, _least(options)))
    if learnable:
        made, bound = BiasPass.of(request, learnable), _least(options)
        if made.price.nanoseconds < bound:
            given = _as_given(frozen(request, learnable), search)
            options.append(_with_pass(request, learnable, given))
        else:
            reason = (
                f"{made} would take {made.price.nanoseconds / 1e3:,.0f} us beside the calls, and "
                f"all of another way {bound / 1e3:,.0f} us"
            )
            refusals.append(Refusal("pass-dearer", reason, "the bias input"))
    refusals += dict.fromkeys(reason for option in options for reason in option.refusals)
    options = [option for option in options if option.steps]
    if not options:
        return Plan("", request, refusals=tuple(refusals))
    options.sort(key=lambda option: (_last_resort(option.steps), _nanoseconds(option.solution)))
    others = [option.solution for option in options[1:]]
    others += [other for option in options for other in option.alternatives]
    others.sort(key=_nanoseconds)
    return replace(options[0], alternatives=tuple(others), refusals=tuple(refusals))


def _least(options: Sequence[Plan]) -> float:
    """Return what the cheapest of some plans costs, in nanoseconds; infinity if none is one."""
    found = (o.solution for o in options if o.steps and not _last_resort(o.steps))
    return min(map(_nanoseconds, found), default=inf)


def _is_plain(steps: Sequence[Launch]) -> bool:
    """Whether there is one call without a full mask or a matrix: nothing beats that."""
    if len(steps) != 1 or _mask_cells(steps[0].call):
        return False
    pse = steps[0].call.pse
    return pse is None or len(pse.shape) < 4


def _last_resort(steps: Sequence[Launch]) -> bool:
    """Whether calls read a full mask that is too large to be weighed."""
    return any(_mask_cells(launch.call) > MOST_MASK_CELLS for launch in steps)


def _mask_cells(call: KernelCall) -> int:
    """Return the entries of a full mask; 0 for a compressed one, or none."""
    mask = call.atten_mask
    return mask.cells if mask is not None and mask.kind == "full" else 0


def on_route(request: Request, route: Route, search: Search, bound: float = inf) -> Plan:
    """Return the calls that compute a request whose biases became channels and levels.

    Or none, where their zones cost more than `bound`, in nanoseconds.
    """
    # What a route leaves of the bias reaches the calls as a bias: another route would hide this.
    if not route.zones:
        # The distances in a mask of unknown cells are unknown.
        found = _as_given(route.request, search, by_cells=False)
    else:
        in_order = None if route.request.matrices.exact else sorted_positions(route.request)
        if not (in_order or route.request).matrices.allow_any:  # so zones differ in nothing
            return on_route(request, replace(route, zones=()), search, bound)
        found = _by_zone(request, route, in_order, search, bound)
    if len(found.steps) > 1:
        parted = in_parts(request, route)
        if isinstance(parted, Refusal):
            return replace(found, steps=(), refusals=(*found.refusals, parted))
        if parted != route:
            return on_route(request, parted, search, bound)
    if not found.steps:
        return found
    first, *rest = found.steps
    return replace(found, request=request, steps=(route.around(first), *rest), route=route)


def _by_zone(
    request: Request, route: Route, in_order: Request | None, search: Search, bound: float
) -> Plan:
    """Return the cheapest calls of each zone, on sorted positions where those make it a region.

    Outputs merge for each group of heads, so heads are together in all zones or in none.
    """
    groups = tuple(head_groups(in_order or route.request))
    launches: list[Launch] = []
    refusals: list[Refusal] = []
    least = {} if in_order else least_of_zones(route, bound)
    spent = cost_of_channels(route)
    for k, zone in enumerate(route.zones):
        floor = spent + sum(least.get(later, 0.0) for later in route.zones[k:])
        if floor >= bound:
            reason = (
                f"{len(route.zones)} zones of distances cost {floor / 1e3:,.0f} us at least, all "
                f"of another way {bound / 1e3:,.0f} us"
            )
            refusals.append(Refusal("dearer", reason, str(route)))
            return Plan("", request, refusals=tuple(refusals))
        part = route.within(zone)
        part = part if in_order is None else sorted_positions(part) or part
        if not part.matrices.allow_any:
            continue
        found, reasons = _merged(part, search, groups)  # routes share most of their zones
        refusals += reasons
        best = min(found, key=_nanoseconds, default=None)
        if best is None:
            return Plan("", request, refusals=tuple(refusals))
        spent += best.price.nanoseconds
        launches += (launch.in_zone(zone) for launch in best.launches)
    return Plan("", request, tuple(launches), refusals=tuple(refusals), in_order=in_order)
