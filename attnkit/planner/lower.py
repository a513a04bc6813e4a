"""From a request to fused kernel calls: enumerate, prove, price, choose; keep every refusal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import islice
from math import inf, prod
from operator import and_

from attnkit.errors import Refusal
from attnkit.kernel import KernelCall
from attnkit.masks import Band
from attnkit.planner.biases import disprove_bias, lacking
from attnkit.planner.blocks import span
from attnkit.planner.candidates import Candidate, Form, Zone, candidates, forms
from attnkit.planner.decompose import Part, decompositions, head_groups
from attnkit.planner.matrices import matrices
from attnkit.planner.plan import Launch, Solution
from attnkit.planner.price import Price, least_with_full_mask, price_call
from attnkit.planner.proof import broken_rules, disprove, disprove_opaque, heads_of, is_opaque
from attnkit.planner.request import Request
from attnkit.planner.residues import resort
from attnkit.planner.routes import Route, in_parts, routes

__all__ = ["MOST_MASK_CELLS", "Lowering", "lacking", "lower", "on_route"]

MOST_MASK_CELLS = 2**24
"""Entries up to which a mask of one entry per cell is weighed like any other plan.

Such masks are built once and kept (4,096 x 4,096 is one of 16.8 MB). A larger one would be built
in every step, and is taken only where nothing else computes the request.
"""

# The elementwise kernels that merge the rows of one part.
_MERGE_LAUNCHES = 6
# Those that make the channels of one bias: positions, pieces, two concatenations.
_CHANNEL_LAUNCHES = 8


@dataclass(frozen=True)
class Lowering:
    """The cheapest proven calls, the dearer ones, and why the others were dropped."""

    best: Solution | None
    alternatives: tuple[Solution, ...]
    refusals: tuple[Refusal, ...]
    request: Request | None = None
    """What the calls compute, where positions are sorted before them and put back after."""
    route: Route | None = None
    """How biases reach the calls that cannot reach them as biases."""


@lru_cache(maxsize=64)  # a packed batch is large, and in training each one is new
def lower(request: Request) -> Lowering:
    """Return how the fused kernel computes a request; a pure function, cached on the record.

    One call without a mask of one entry per cell is looked for first, then several such calls
    that are merged. One with such a mask is weighed beside them, up to `MOST_MASK_CELLS`; a
    larger one is for requests that nothing else computes.
    """
    lacks = lacking(request.softcap, request.bias)
    if lacks:
        return Lowering(None, (), tuple(lacks))
    if not request.batch:
        reason = "the kernel needs at least one batch element"
        return Lowering(None, (), (Refusal("empty-batch", reason, "any mode"),))
    if any(term.low_rank for term in request.bias):
        return _cheapest_way(request)
    return _as_given(request)


def _as_given(request: Request) -> Lowering:
    """Return how the kernel computes a request whose biases reach it as biases."""
    if not matrices(request).exact:
        in_order = resort(request)
        if in_order is not None:
            return replace(lower(in_order), request=in_order)
    refusals: list[Refusal] = []
    shapes = tuple(forms(request))
    found: list[Solution] = []
    for form in shapes:
        ordered = candidates(request, form, full_masks=False)
        found += islice(_proven(request, ordered, refusals), 1)  # they come by price
    if not found:
        found = _merged(request, refusals)
    if any(_nothing_beats(solution) for solution in found):
        reason = "calls without a mask of one entry per cell compute the same"
        refusals.append(Refusal("full-mask-not-needed", reason, "modes 0 and 1"))
    else:
        prices = [solution.price for solution in found]
        best = min(prices, key=lambda price: price.nanoseconds, default=None)
        for form in shapes:
            found += _with_full_mask(request, form, refusals, best)
    if len(found) > 1:  # a sort asks for the price of a single one, too
        found.sort(key=lambda solution: solution.price.nanoseconds)
    return Lowering(found[0] if found else None, tuple(found[1:]), tuple(refusals))


def _nothing_beats(solution: Solution) -> bool:
    """Whether a solution is one call on whole matrices: it visits no tile that a mask could spare.

    Packed blocks may: each starts a tile of its own, and tokens may be copied around the call.
    """
    (first, *rest) = solution.launches
    return not rest and not first.form.packs and not first.form.partial


def _with_full_mask(
    request: Request, form: Form, refusals: list[Refusal], rival: Price | None
) -> list[Solution]:
    """Return the cheapest call that reads a mask of one entry per cell, if there is one.

    Beside a rival it is looked at only where it might be cheaper.
    """
    ordered: Iterable[Candidate | Refusal] = candidates(request, form, full_masks=True)
    if rival is not None:
        longest = (max(side) for side in zip(*(k.sizes for k in form.blocks), strict=True))
        least = least_with_full_mask(request, prod(longest), rival.cells)
        if least >= rival.nanoseconds:
            refusals.append(_dearer(least, rival, "modes 0 and 1"))
            return []
        ordered = (_worth_proving(request, candidate, rival) for candidate in ordered)
    found = _proven(request, ordered, refusals)
    best = min(found, key=lambda solution: solution.price.nanoseconds, default=None)
    return [] if best is None else [best]


def _worth_proving(
    request: Request, candidate: Candidate | Refusal, rival: Price
) -> Candidate | Refusal:
    """Return a candidate with a full mask, or that the mask is too large, or the price too high."""
    if isinstance(candidate, Refusal):
        return candidate
    entries = _mask_cells(candidate.call)
    if entries > MOST_MASK_CELLS:
        reason = (
            f"a mask of {entries:,} entries would be built in every step; up to "
            f"{MOST_MASK_CELLS:,} one is kept, and weighed"
        )
        return Refusal("full-mask-size", reason, candidate.label)
    price = price_call(candidate.call, _copied_bytes(request, candidate)).nanoseconds
    return candidate if price < rival.nanoseconds else _dearer(price, rival, candidate.label)


def _dearer(price: float, rival: Price, subject: str) -> Refusal:
    reason = (
        f"with a mask of one entry per cell it would cost {price / 1e3:,.1f} us or more, and "
        f"without one {rival.nanoseconds / 1e3:,.1f} us"
    )
    return Refusal("full-mask-dearer", reason, subject)


def _merged(
    request: Request,
    refusals: list[Refusal],
    groups: tuple[tuple[int, ...], ...] | None = None,
) -> list[Solution]:
    """Return the sets of calls that compute the request together, each for a group of heads."""
    found: list[Solution] = []
    seen: set[frozenset[object]] = set()
    for parts in decompositions(request, groups):
        if isinstance(parts, Refusal):
            refusals.append(parts)
            continue
        same = frozenset((part.call, part.blocks) for part in parts)
        if same in seen:  # the same calls, in another order
            continue
        seen.add(same)
        reasons = [
            replace(reason, subject=f"{len(parts)} calls, {part.label}")
            for part in parts
            for reason in _part_reasons(request, part)
        ]
        refusals += reasons
        if parts and not reasons:
            found.append(Solution(tuple(_launch(request, part) for part in parts)))
    return found


def _part_reasons(request: Request, part: Part) -> list[Refusal]:
    wrong = disprove(part.call, part.targets)
    return [wrong] if wrong is not None else broken_rules(request, part.call)


def _launch(request: Request, part: Part) -> Launch:
    form = Form(
        part.call.layout,
        part.blocks,
        part.targets,
        packs=False,
        partial=True,
        heads=part.heads,
        kv_heads=part.kv_heads,
    )
    call = part.call
    q_starts, kv_starts = request.token_starts
    queries = [(q_starts[k.batch] + k.i0, q_starts[k.batch] + k.i1) for k in part.blocks]
    keys = [(kv_starts[k.batch] + k.j0, kv_starts[k.batch] + k.j1) for k in part.blocks]
    gathered = [] if span(queries) else [call.query]
    gathered += [] if span(keys) else [call.key, call.value]
    # Gathered tokens are read and written; every part's rows are merged in float32.
    copied = 2 * sum(prod(spec.shape) * spec.dtype.itemsize for spec in gathered)
    copied += (request.dtype.itemsize + 2 * 4) * prod(call.output.shape)
    around = len(gathered) + _MERGE_LAUNCHES
    return Launch(part.label, call, form, copied, small_launches=around)


def _proven(
    request: Request, ordered: Iterable[Candidate | Refusal], refusals: list[Refusal]
) -> Iterator[Solution]:
    """Yield the candidates that are proven; those that fall are refused."""
    for candidate in ordered:
        if isinstance(candidate, Refusal):
            refusals.append(candidate)
            continue
        reasons = _reasons_against(request, candidate)
        refusals += [replace(reason, subject=candidate.label) for reason in reasons]
        if not reasons:
            copied = _copied_bytes(request, candidate)
            yield Solution((Launch(candidate.label, candidate.call, candidate.form, copied),))


def _cheapest_way(request: Request) -> Lowering:
    """Return the cheapest of the kernel's bias input, for what does not train, and the routes."""
    learnable = [term.text for term in request.bias if term.requires_grad]
    options = [] if learnable else [_as_given(request)]
    if options and _is_plain(options[0].best):
        return options[0]
    refusals: list[Refusal] = []
    if learnable:
        told = " and ".join(learnable)
        reason = f"{told} asks for a gradient, which the kernel never writes for its bias input"
        refusals.append(Refusal("pse-gradient", reason, "the bias input"))
    ways = dict.fromkeys((*routes(request), *routes(request, sloped=True)))
    refusals += (way for way in ways if isinstance(way, Refusal))
    # Few zones are few calls: what they cost bounds the others.
    some = (way for way in ways if isinstance(way, Route))
    for route in sorted(some, key=lambda route: len(route.zones)):
        rivals = (o.best for o in options if o.best is not None and not _last_resort(o.best))
        bound = min((best.price.nanoseconds for best in rivals), default=inf)
        options.append(on_route(request, route, bound))
    refusals += dict.fromkeys(reason for option in options for reason in option.refusals)
    known = [(option.best, option) for option in options if option.best is not None]
    if not known:
        return Lowering(None, (), tuple(refusals))
    known.sort(key=lambda pair: (_last_resort(pair[0]), pair[0].price.nanoseconds))
    best, option = known[0]
    others = [other for other, _ in known[1:]]
    others += [other for _, some in known for other in some.alternatives]
    others.sort(key=lambda solution: solution.price.nanoseconds)
    return replace(option, best=best, alternatives=tuple(others), refusals=tuple(refusals))


def _is_plain(best: Solution | None) -> bool:
    """Whether a solution is one call without a full mask or a matrix: nothing beats that."""
    if best is None or len(best.launches) > 1 or _has_full_mask(best):
        return False
    pse = best.launches[0].call.pse
    return pse is None or len(pse.shape) < 4


def _has_full_mask(solution: Solution) -> bool:
    return any(_mask_cells(launch.call) for launch in solution.launches)


def _last_resort(solution: Solution) -> bool:
    """Whether a solution reads a full mask that is too large to be weighed."""
    return any(_mask_cells(launch.call) > MOST_MASK_CELLS for launch in solution.launches)


def _mask_cells(call: KernelCall) -> int:
    """Return the entries of a full mask; 0 for a compressed one, or none."""
    mask = call.atten_mask
    return mask.cells if mask is not None and mask.kind == "full" else 0


def on_route(request: Request, route: Route, bound: float = inf) -> Lowering:
    """Return the calls that compute a request whose biases became channels and levels.

    Or none, where their zones cost more than `bound`, in nanoseconds.
    """
    # What a route leaves of the bias reaches the calls as a bias: another route would hide this.
    option = _by_zone(request, route, bound) if route.zones else _as_given(route.request)
    if option.best is None:
        return option
    if not option.best.launches:  # no distance is allowed at all, so zones differ in nothing
        return on_route(request, replace(route, zones=()), bound)
    if len(option.best.launches) > 1:
        parted = in_parts(request, route)
        if isinstance(parted, Refusal):
            return replace(option, best=None, refusals=(*option.refusals, parted))
        if parted != route:
            return on_route(request, parted, bound)
    first, *rest = option.best.launches
    # Query and key are copied beside their channels, by a handful of elementwise kernels.
    cells = sum(prod(shape) for shape in route.request.shapes()[:2])
    first = replace(
        first,
        label=f"{first.label}, {route}",
        copied_bytes=first.copied_bytes + 2 * request.dtype.itemsize * cells,
        small_launches=first.small_launches + _CHANNEL_LAUNCHES * len(route.channels),
    )
    return replace(option, best=Solution((first, *rest)), route=route)


def _by_zone(request: Request, route: Route, bound: float) -> Lowering:
    """Return the cheapest calls of each zone, on sorted positions where those make it a region.

    Outputs merge for each group of heads, so heads are together in all zones or in none.
    """
    in_order = None if matrices(route.request).exact else resort(route.request)
    groups = tuple(head_groups(in_order or route.request))
    launches: list[Launch] = []
    refusals: list[Refusal] = []
    spent = 0.0
    for k, zone in enumerate(route.zones):
        if spent >= bound:
            reason = (
                f"the first {k} of {len(route.zones)} zones of distances cost {spent / 1e3:,.0f} "
                f"us, all of another way {bound / 1e3:,.0f} us"
            )
            return Lowering(None, (), (*refusals, Refusal("dearer", reason, str(route))))
        bands = (Band(-lo, hi, align) for align, lo, hi in zone.spans)
        inside = reduce(and_, bands, request.mask)
        part = replace(route.request, mask=inside, head_dim=route.dim_of(zone))
        part = part if in_order is None else resort(part) or part
        known = matrices(part)
        if not any(region for head in range(len(known.planes)) for region in known.regions(head)):
            continue
        best, reasons = _cheapest_parts(part, groups)
        refusals += reasons
        if best is None:
            return Lowering(None, (), tuple(refusals))
        spent += best.price.nanoseconds
        launches += (_in_zone(launch, zone) for launch in best.launches)
    return Lowering(Solution(tuple(launches)), (), tuple(refusals), in_order)


@lru_cache(maxsize=64)  # routes share most of their zones
def _cheapest_parts(
    request: Request, groups: tuple[tuple[int, ...], ...]
) -> tuple[Solution | None, tuple[Refusal, ...]]:
    refusals: list[Refusal] = []
    found = _merged(request, refusals, groups)
    best = min(found, key=lambda solution: solution.price.nanoseconds, default=None)
    return best, tuple(refusals)


def _in_zone(launch: Launch, zone: Zone) -> Launch:
    launch = replace(launch, form=replace(launch.form, zone=zone))
    if not zone.turned:
        return launch
    query = launch.call.query
    return replace(
        launch,
        label=f"{launch.label}, signs turned",
        copied_bytes=launch.copied_bytes + 2 * prod(query.shape) * query.dtype.itemsize,
        small_launches=launch.small_launches + 1,
    )


def _reasons_against(request: Request, candidate: Candidate) -> list[Refusal]:
    """Return why a candidate falls: what it would compute first, then what the op rejects."""
    call, known = candidate.call, matrices(request)
    if is_opaque(call):
        wrong = disprove_opaque(call, known.over_heads())
    else:
        wrongs = (
            disprove(call, candidate.form.targets if h is None else known.regions(h), h)
            for h in heads_of(call)
        )
        wrong = next((one for one in wrongs if one is not None), None)
    if wrong is not None:
        return [wrong]
    wrong = disprove_bias(request, call, candidate.form.blocks)
    return [wrong] if wrong is not None else broken_rules(request, call)


def _copied_bytes(request: Request, candidate: Candidate) -> int:
    """Return the bytes moved to bring a dense layout into packed order and back."""
    if not candidate.form.packs or request.layout in ("BSH", "BSND"):
        return 0
    if request.batch == 1 and request.layout_of.pattern.startswith("s "):
        return 0
    cells = sum(prod(shape) for shape in request.shapes())
    return 2 * request.dtype.itemsize * (cells + prod(candidate.call.output.shape))
