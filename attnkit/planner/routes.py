"""How a bias that trains reaches the fused kernel, which writes no gradient for its bias input.

As *channels*: a bias of low rank is a product of additional query and key channels,
``scale*q'.k' = scale*q.k + bias`` with ``q' = [q, u / scale]`` and ``k' = [k, w]``, and its
gradient comes out of those of query and key. ALiBi is ``slope * (j - i')`` for keys that do not
follow their query: the channels of u are slopes, those of w positions. A bias per key is a
channel of w. A bias that is a table's entry for each distance is of low rank inside a band of
m distances: w is one-hot in ``j mod m``, u the entries of the m distances.

As *levels*: outside of the band such a bias is constant on each step of distances. The calls
of a step add nothing, and its constant is added to their log-sum-exp where parts merge.

Both may differ from distance to distance, so a request is cut into *zones*: distances whose
calls are given the same. Each level is a zone. ALiBi is ``-slope * (j - i')`` for keys
after their query, so where a mask allows keys on both sides there is a zone on each, and in
the calls of one of them the channels of the query have the opposite sign.

float16 and bfloat16 hold neither positions beyond 2,048 (256) nor slopes to the precision of
the kernel's float32 scores. So positions are split into digits of base 256, which both hold
exactly, and values into a sum of two or three numbers of the dtype; the products are exact.

The gradient that the kernel writes for a channel is rounded to the dtype, too. Where it sums
over all keys of a query, these sums are 0 for a channel of ones, and only distances are left of
positions. Over some of the keys (beside a sink, in each of several calls) they are not 0, and
positions would be rounded to 8 bits. There slopes get their gradient through channels of their
own, for keys counted from *anchors* spread over the sequence: each query reads the nearest. In
the forward these channels are 0.

Sources: for ALiBi as two channels, Press et al., "Train Short, Test Long" (ICLR 2022), whose
bias is linear; for merging partial softmaxes, Milakov and Gimelshein, "Online normalizer
calculation for softmax" (2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, pairwise, product
from operator import and_

import torch

from attnkit.arguments import Anchor
from attnkit.errors import Refusal
from attnkit.masks import Band
from attnkit.planner.calls import Launch, Zone
from attnkit.planner.request import Request
from attnkit.pse import Linear, PerKey, Stepped, Structure
from attnkit.pse.structure import sum_of_steps

__all__ = [
    "BASE",
    "MOST_POSITIONS",
    "Channels",
    "Route",
    "Span",
    "band_of",
    "channel_dims",
    "in_parts",
    "routes",
    "structure_of",
]

BASE = 256
"""Digits below it are exact in bfloat16, which has 8 significant bits, and in float16."""

Span = tuple[int, int]
Steps = tuple[tuple[int, int, int | None], ...]
"""(first distance, last distance, row of the table that they merge with, if any)."""

# The elementwise kernels that make the channels of one bias: positions, pieces, concatenations.
_CHANNEL_LAUNCHES = 8
_MOST_DIMS = 768
_MOST_LEVELS = 20
_MOST_ANCHORS = 16
_ANCHORED = 128  # positions that share an anchor, where these are not too many
# The scales by which biases in the thousands (float16: in the hundreds) can be divided, and times
# which gradients of channels come back, and stay numbers of the dtype.
_SCALES = {
    torch.float16: (2.0**-10, 4.0),
    torch.bfloat16: (1e-30, 1e30),
    torch.float32: (1e-30, 1e30),
    torch.float64: (1e-290, 1e290),
}
# The kernel sums channels in float32, so a score is rounded to 2**-24 of the largest product,
# slope * position, where the distance itself would be exact. For slopes up to 1/2 that is
# 0.0001 at 4,096 positions, and here, 0.002, half a unit of a bfloat16 weight.
MOST_POSITIONS = 2**16


@dataclass(frozen=True)
class Channels:
    """One addend of the bias as channels of query and key, or several stepped ones together.

    `parts` are their indexes among the addends. `pieces` numbers stand for each value and
    `digits` for each position. `sign` is 1 where the channels are for keys that do not follow their
    query, -1 where for keys that do not precede it; zones may turn it. `span` are the first and
    last distance ``j - i'`` that the channels of a stepped bias serve; None where they serve
    none. `anchors` are the positions that the gradient of slopes counts from, if any.
    """

    parts: tuple[int, ...]
    structure: Linear | PerKey | Stepped
    pieces: int = 1
    digits: int = 1
    sign: int = 1
    group: int = 1
    span: tuple[int, int] | None = None
    anchors: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """The number of channels."""
        if isinstance(self.structure, Linear):
            counted = len(self.anchors) + 1 if self.anchors else 0
            return self.pieces * (self.digits + 1) + counted
        if isinstance(self.structure, PerKey):
            return self.pieces * self.group
        return self.pieces * (self.span[1] - self.span[0] + 1) if self.span else 0


@dataclass(frozen=True)
class Route:
    """Addends of the bias as channels, and the request that the calls compute with them.

    Stepped biases come last, so that the calls of their levels can leave those channels out.
    `zones` are there where calls differ in what they are given.
    """

    request: Request
    channels: tuple[Channels, ...]
    zones: tuple[Zone, ...] = ()

    @property
    def stepped(self) -> Channels:
        """The stepped bias that has levels."""
        return self.channels[-1]

    @property
    def levels(self) -> tuple[int, ...]:
        """The rows of the stepped bias's table that are added at the merge."""
        return tuple(dict.fromkeys(zone.row for zone in self.zones if zone.row is not None))

    def dim_of(self, zone: Zone | None) -> int:
        """Return the head size of the calls of a zone: levels need no channels of steps."""
        if zone is None or zone.row is None:
            return self.request.head_dim
        stepped = (c.width for c in self.channels if isinstance(c.structure, Stepped))
        return self.request.head_dim - sum(stepped)

    def within(self, zone: Zone) -> Request:
        """Return what the calls of a zone compute together."""
        inside = reduce(and_, (band_of(*one) for one in zone.spans), self.request.mask)
        return replace(self.request, mask=inside, head_dim=self.dim_of(zone))

    @property
    def launches(self) -> int:
        """The elementwise kernels that copy query and key beside their channels."""
        return _CHANNEL_LAUNCHES * len(self.channels)

    def around(self, step: Launch) -> Launch:
        """Return a call before which query and key are copied beside their channels."""
        return step.after_copies(self.request, str(self), self.launches)

    def __str__(self) -> str:
        width = sum(channels.width for channels in self.channels)
        told = [f"bias as {width} channel{'s' * (width != 1)}"] if width else []
        told += ["signs by side"] if any(zone.turned for zone in self.zones) else []
        count = len(self.levels)
        told += [f"bias as {count} logit{'s' * (count != 1)} at the merge"] if count else []
        return ", ".join(told)


def band_of(align: Anchor, lo: int, hi: int) -> Band:
    """Return the cells at some distances ``j - i'``.

    >>> band_of("bottom_right", -3, 0), band_of(2, -3, 0)
    (Band(3, 0), Band(1, 2, align='top_left'))
    """
    if isinstance(align, int):
        return Band(-lo - align, hi + align, "top_left")
    return Band(-lo, hi, align)


def routes(request: Request, sloped: bool = False) -> Iterator[Route | Refusal]:
    """Yield the ways around the kernel's bias input, or why there is none; a pure function.

    Every addend that trains must take one. Constant slopes need not, and stay a bias unless
    `sloped` says otherwise: one call adds them for nothing, pieces of odd sizes cannot.
    """
    ways = [
        k for k, term in enumerate(request.bias) if term.low_rank and (sloped or not term.sloped)
    ]
    stepped = tuple(k for k in ways if isinstance(request.bias[k].structure, Stepped))
    found: list[Channels] = []
    for parts in (*((k,) for k in ways if k not in stepped), *([stepped] if stepped else [])):
        one = _channels(request, parts)
        if isinstance(one, Refusal):
            yield one
            return
        found.append(one)
    if found and not stepped:
        yield _fitting(request, tuple(found), {})
    if not stepped:
        return
    *others, last = found
    align = last.structure.align  # type: ignore[union-attr]
    for span, levels in _splits(last.structure, request.distances[align]):  # type: ignore[arg-type]
        near = [(*span, None)] if span is not None else []
        yield _fitting(request, (*others, replace(last, span=span)), {align: (*near, *levels)})


def in_parts(request: Request, route: Route) -> Route | Refusal:
    """Return a route whose gradients keep their precision where several calls have the keys."""
    return route if route.zones else _fitting(request, route.channels, {}, whole=False)


def _fitting(
    request: Request, channels: tuple[Channels, ...], steps: dict[Anchor, Steps], whole: bool = True
) -> Route | Refusal:
    if request.sink or not whole or _zones(request, channels, steps):
        channels = tuple(_anchored(request, one) for one in channels)
    width = sum(one.width for one in channels)
    taken = {part for one in channels for part in one.parts}
    rest = tuple(term for k, term in enumerate(request.bias) if k not in taken)
    dims = request.head_dim + width
    if dims > _MOST_DIMS:
        reason = (
            f"{width} channels beside the {request.head_dim} of a head are more than the "
            f"{_MOST_DIMS} that the kernel takes"
        )
        return Refusal("channels-too-many", reason, f"{width} channels")
    inner = request.like(replace(request, bias=rest, head_dim=dims))
    return Route(inner, channels, _zones(request, channels, steps))


def _zones(
    request: Request, channels: tuple[Channels, ...], steps: dict[Anchor, Steps]
) -> tuple[Zone, ...]:
    """Return the zones: a step that is a level, or one side of the queries, or both.

    Distances are counted from where each bias counts them, so there may be two cuts at 0.
    """
    sloped = {one.structure.align for one in channels if isinstance(one.structure, Linear)}
    cuts: list[list[tuple[Anchor, int, int, int | None]]] = []
    for align in sorted(sloped | set(steps), key=str):
        hull = request.distances[align]
        parts = steps.get(align, ((*hull, None),))
        if align in sloped:
            parts = tuple((*half, row) for lo, hi, row in parts for half in _halves(lo, hi))
        cuts.append([(align, *part) for part in parts])
    found = []
    for chosen in product(*cuts):
        spans = tuple((align, lo, hi) for align, lo, hi, _ in chosen)
        row = next((row for *_, row in chosen if row is not None), None)
        found.append(Zone(spans, _turned(request, channels, spans), row))
    return tuple(found) if len(found) > 1 or any(zone.row is not None for zone in found) else ()


def _halves(lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Yield the distances on either side of 0, which belongs to both.

    It goes where it keeps a window from being one distance wide, which the grad op refuses.
    """
    if not lo < 0 < hi:
        yield lo, hi
        return
    last = 0 if hi > 1 else -1
    yield lo, last
    yield last + 1, hi


def _turned(
    request: Request, channels: tuple[Channels, ...], spans: tuple[tuple[Anchor, int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """Return the dimensions whose channels have the wrong sign at some distances."""
    side = {align: (1 if hi <= 0 else -1) for align, _, hi in spans}
    return tuple(
        dims
        for one, dims in channel_dims(request, channels)
        if isinstance(one.structure, Linear) and side[one.structure.align] != one.sign
    )


def channel_dims(
    request: Request, channels: tuple[Channels, ...]
) -> list[tuple[Channels, tuple[int, int]]]:
    """Return which dimensions of the query the channels of each addend are."""
    ends = list(accumulate((one.width for one in channels), initial=request.head_dim))
    return list(zip(channels, pairwise(ends), strict=True))


def structure_of(request: Request, parts: tuple[int, ...]) -> Structure | None:
    """Return the structure of an addend, or of several stepped ones that count distances alike."""
    terms = [request.bias[part].structure for part in parts]
    if len(terms) == 1:
        return terms[0]
    stepped = [term for term in terms if isinstance(term, Stepped)]
    alike = len({term.align for term in stepped}) == 1
    alike |= all(q_len == kv_len for q_len, kv_len in request.sequences)
    return sum_of_steps(stepped)[0] if alike and len(stepped) == len(terms) else None


def _channels(request: Request, parts: tuple[int, ...]) -> Channels | Refusal:
    """Return addends as channels (stepped ones without their span yet), or why they are none."""
    least, most = _SCALES[request.dtype]
    if not least <= abs(request.scale) <= most:
        reason = (
            f"channels hold the bias over the scale, and with scale={request.scale:g} it or its "
            f"gradient soon leaves {request.dtype}; from {least:g} to {most:g} it does not"
        )
        return Refusal("channels-scale", reason, "channels")
    low = request.dtype.itemsize == 2
    structure = structure_of(request, parts)
    if structure is None and len(parts) > 1:
        reason = "biases by steps of distance count it from different ends; give both one align"
        return Refusal("steps-twice", reason, "channels")
    if isinstance(structure, PerKey):
        group = request.num_heads // request.num_kv_heads if structure.per_head else 1
        return Channels(parts, structure, pieces=3 if low else 1, group=group)
    if isinstance(structure, Stepped):
        return Channels(parts, structure, pieces=2 if low else 1)
    if not isinstance(structure, Linear):
        text = request.bias[parts[0]].text
        return Refusal("pse-gradient", f"{text} has no known structure", "channels")
    longest = _longest(request, structure)
    if longest > MOST_POSITIONS and request.dtype != torch.float64:
        reason = (
            f"{longest:,} positions times slopes lose more in float32 sums than a bfloat16 weight "
            f"resolves; up to {MOST_POSITIONS:,} they do not"
        )
        return Refusal("channels-positions", reason, "channels")
    lo, hi = request.distances[structure.align]
    digits = 2 if low and longest > BASE else 1
    return Channels(parts, structure, 3 if low else 1, digits, sign=-1 if lo >= 0 < hi else 1)


def _longest(request: Request, structure: Linear) -> int:
    """Return the largest number of a position, of a key or of the place that a query stands at."""
    at = structure.align if isinstance(structure.align, int) else 0
    sizes = request.sequences
    return max((max(kv_len, abs(at), q_len + at) for q_len, kv_len in sizes), default=0)


def _anchored(request: Request, one: Channels) -> Channels:
    """Return the channels with anchors, where slopes train and are rounded."""
    trains = any(request.bias[part].requires_grad for part in one.parts)
    if not (trains and isinstance(one.structure, Linear) and one.pieces > 1):
        return one
    longest = max((max(sizes) for sizes in request.sequences), default=0)
    count = max(1, min(_MOST_ANCHORS, longest // _ANCHORED))
    return replace(one, anchors=tuple((2 * k + 1) * longest // (2 * count) for k in range(count)))


def _splits(
    structure: Stepped, hull: tuple[int, int]
) -> Iterator[tuple[tuple[int, int] | None, Steps]]:
    """Yield which distances are channels, and which steps are levels; the price decides.

    Steps of one distance are never levels: the kernel's grad takes no such window.
    """
    steps = tuple(structure.steps(*hull))
    first = {0, 1}
    stop = {len(steps), len(steps) - 1}
    single = [k for k, (lo, hi, _) in enumerate(steps) if lo == hi]
    first.add(min(single, default=0))
    stop.add(max(single, default=-1) + 1)
    pairs = [(a, b) for a in sorted(first) for b in sorted(stop, reverse=True) if a < b]
    for a, b in [*pairs, (0, 0)]:
        near, far = steps[a:b], steps[:a] + steps[b:]
        if len(far) <= _MOST_LEVELS and all(lo < hi for lo, hi, _ in far):
            yield (near[0][0], near[-1][1]) if near else None, far
