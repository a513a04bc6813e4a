"""How a bias that trains reaches the fused kernel, which writes no gradient for its bias input.

As *channels*: a bias of low rank is a product of additional query and key channels,
``scale*q'.k' = scale*q.k + bias`` with ``q' = [q, u / scale]`` and ``k' = [k, w]``, and its
gradient comes out of those of query and key. ALiBi is ``slope * (j - i')`` where no query sees
keys on both sides of it: the channels of u are slopes, those of w positions. A bias per key is
a channel of w. A bias that is a table's entry for each distance is of low rank inside a band
of m distances: w is one-hot in ``j mod m``, u the entries of the m distances.

As *levels*: outside of the band such a bias is constant on each step of distances. The calls
of a step add nothing, and its constant is added to their log-sum-exp where parts merge.

float16 and bfloat16 hold neither positions beyond 2,048 (256) nor slopes to the precision of
the kernel's float32 scores. So positions are split into digits of base 256, which both hold
exactly, and values into a sum of two or three numbers of the dtype; the products are exact.

Sources: for ALiBi as two channels, Press et al., "Train Short, Test Long" (ICLR 2022), whose
bias is linear; for merging partial softmaxes, Milakov and Gimelshein, "Online normalizer
calculation for softmax" (2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.kernel import KernelCall
from attnkit.planner.candidates import Form
from attnkit.planner.matrices import matrices
from attnkit.planner.request import BiasTerm, Request
from attnkit.pse import Align, Linear, PerKey, Stepped

__all__ = ["BASE", "Channels", "Route", "disprove_groups", "disprove_route", "routes"]

BASE = 256
"""Digits below it are exact in bfloat16, which has 8 significant bits, and in float16."""

_MOST_DIMS = 768
_MOST_LEVELS = 20
# The kernel sums channels in float32, so a score is rounded to 2**-24 of the largest product,
# slope * position, where a distance of its own would be exact. For slopes up to 1/2 that is
# 0.0001 at 4,096 positions, and here, 0.002, half a unit of a bfloat16 weight.
_MOST_POSITIONS = 2**16


@dataclass(frozen=True)
class Channels:
    """One addend of the bias as channels of query and key.

    `part` is its index among the addends. `pieces` numbers stand for each value and `digits`
    for each position. `sign` is 1 where keys do not follow their query, -1 where they do not
    precede it. `span` are the first and last distance ``j - i'`` that the channels of a
    stepped bias serve; None where they serve none.
    """

    part: int
    structure: Linear | PerKey | Stepped
    pieces: int = 1
    digits: int = 1
    sign: int = 1
    group: int = 1
    span: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """The number of channels."""
        if isinstance(self.structure, Linear):
            return self.pieces * (self.digits + 1)
        if isinstance(self.structure, PerKey):
            return self.pieces * self.group
        return self.pieces * (self.span[1] - self.span[0] + 1) if self.span else 0


@dataclass(frozen=True)
class Route:
    """Addends of the bias as channels, and the request that the calls compute with them.

    Stepped biases come last, so that the calls of their levels can leave those channels out.
    `levels` are the (first distance, last distance, row of the table) that merge instead.
    """

    request: Request
    channels: tuple[Channels, ...]
    levels: tuple[tuple[int, int, int], ...] = ()

    @property
    def plain_dim(self) -> int:
        """The head size of calls without the channels of a stepped bias."""
        stepped = sum(c.width for c in self.channels if isinstance(c.structure, Stepped))
        return self.request.head_dim - stepped

    @property
    def stepped(self) -> Channels:
        """The stepped bias that has levels."""
        return self.channels[-1]

    @property
    def align(self) -> Align:
        """Where distances are counted from, in a route that has levels."""
        structure = self.stepped.structure
        return structure.align if isinstance(structure, Stepped) else "bottom_right"

    def __str__(self) -> str:
        width = sum(channels.width for channels in self.channels)
        told = [f"bias as {width} channel{'s' * (width != 1)}"] if width else []
        count = len(self.levels)
        told += [f"bias as {count} logit{'s' * (count != 1)} at the merge"] if count else []
        return ", ".join(told)


def routes(request: Request, sloped: bool = False) -> Iterator[Route | Refusal]:
    """Yield the ways around the kernel's bias input, or why there is none; a pure function.

    Every addend that trains must take one. Constant slopes need not, and stay a bias unless
    `sloped` says otherwise: one call adds them for nothing, pieces of odd sizes cannot.
    """
    found: list[Channels] = []
    stepped: list[Channels] = []
    for k, term in enumerate(request.bias):
        if term.structure is None or (term.sloped and not sloped):
            continue
        one = _channels(request, k, term)
        if isinstance(one, Refusal):
            yield one
            return
        (stepped if isinstance(term.structure, Stepped) else found).append(one)
    if len(stepped) > 1:
        reason = "two biases by steps of distance do not fit into one head; add their tables"
        yield Refusal("steps-twice", reason, "channels")
        return
    if not (found or stepped):
        return
    if not stepped:
        yield from _fitting(request, tuple(found), ())
        return
    (one,) = stepped
    hull = _distances(request, one.structure.align)  # type: ignore[union-attr]
    for span, levels in _splits(one.structure, hull):  # type: ignore[arg-type]
        channels = (*found, replace(one, span=span))
        yield from _fitting(request, channels, levels)


def _fitting(
    request: Request, channels: tuple[Channels, ...], levels: tuple[tuple[int, int, int], ...]
) -> Iterator[Route | Refusal]:
    width = sum(one.width for one in channels)
    taken = {one.part for one in channels}
    rest = tuple(term for k, term in enumerate(request.bias) if k not in taken)
    dims = request.head_dim + width
    if dims > _MOST_DIMS:
        reason = (
            f"{width} channels beside the {request.head_dim} of a head are more than the "
            f"{_MOST_DIMS} that the kernel takes"
        )
        yield Refusal("channels-too-many", reason, f"{width} channels")
        return
    yield Route(replace(request, bias=rest, head_dim=dims), channels, levels)


def _channels(request: Request, part: int, term: BiasTerm) -> Channels | Refusal:
    """Return an addend as channels (a stepped one without its span yet), or why it is none."""
    if not request.scale:
        reason = "scale=0 leaves nothing of a channel"
        return Refusal("channels-scale", reason, "channels")
    low = request.dtype.itemsize == 2
    structure = term.structure
    if isinstance(structure, PerKey):
        group = request.num_heads // request.num_kv_heads if structure.per_head else 1
        return Channels(part, structure, pieces=3 if low else 1, group=group)
    if isinstance(structure, Stepped):
        return Channels(part, structure, pieces=2 if low else 1)
    if not isinstance(structure, Linear):
        return Refusal("pse-gradient", f"{term.text} has no known structure", "channels")
    longest = max((max(sizes) for sizes in request.sequences), default=0)
    if longest > _MOST_POSITIONS and request.dtype != torch.float64:
        reason = (
            f"{longest:,} positions times slopes lose more in float32 sums than a bfloat16 weight "
            f"resolves; up to {_MOST_POSITIONS:,} they do not"
        )
        return Refusal("channels-positions", reason, "channels")
    lo, hi = _distances(request, structure.align)
    if lo < 0 < hi:
        reason = (
            f"the mask lets queries see keys before and after them, where {term.text} bends; it is "
            "linear, and so a channel, on one side (masks.Causal())"
        )
        return Refusal("alibi-two-sided", reason, "channels")
    digits = 2 if low and longest > BASE else 1
    return Channels(part, structure, 3 if low else 1, digits, sign=1 if hi <= 0 else -1)


def _distances(request: Request, align: Align) -> tuple[int, int]:
    """Return the smallest and largest distance ``j - i'`` of an allowed cell; (0, 0) for none."""
    known, ends = matrices(request), []
    for plane in known.planes:
        pairs = {(e.outer, sizes) for e, sizes in zip(plane, request.sequences, strict=True)}
        for region, sizes in pairs:
            bounds, at = region.bounds, _anchor(sizes, align)
            if bounds is not None:
                ends += [bounds.lo - at, bounds.hi - at]
    return (min(ends), max(ends)) if ends else (0, 0)


def _anchor(sizes: tuple[int, int], align: Align) -> int:
    return sizes[1] - sizes[0] if align == "bottom_right" else 0


def _splits(
    structure: Stepped, hull: tuple[int, int]
) -> Iterator[tuple[tuple[int, int] | None, tuple[tuple[int, int, int], ...]]]:
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


# -- proof ---------------------------------------------------------------------------------


def disprove_route(
    request: Request, route: Route, pieces: Sequence[tuple[KernelCall, Form]]
) -> Refusal | None:
    """Return why channels and levels do not add the bias to every cell of the calls; or None.

    What the calls compute is proven elsewhere: here, that each addend is added once, and that
    every cell has a distance that its channels, or its level, are for.
    """
    taken = {one.part for one in route.channels}
    rest = tuple(term for k, term in enumerate(request.bias) if k not in taken)
    dims = request.head_dim + sum(one.width for one in route.channels)
    if replace(request, bias=rest, head_dim=dims) != route.request:
        return Refusal("other-request", "the calls are for another request than asked for")
    for call, form in pieces:
        if call.head_dim != (dims if form.level is None else route.plain_dim):
            return Refusal("other-dims", f"{call} has not the channels of its bias")
    for one in route.channels:
        term = request.bias[one.part]
        if term.structure != one.structure:
            return Refusal("other-bias", f"{term.text} is not the bias of the channels")
        if isinstance(one.structure, Linear):
            lo, hi = _distances(request, one.structure.align)
            if (hi if one.sign > 0 else -lo) > 0:
                return Refusal("alibi-two-sided", f"{term.text} is not linear on the mask")
        if isinstance(one.structure, Stepped):
            wrong = _outside_steps(request, route, one, one.structure, pieces)
            if wrong is not None:
                return wrong
    return None


def _outside_steps(
    request: Request,
    route: Route,
    one: Channels,
    structure: Stepped,
    pieces: Sequence[tuple[KernelCall, Form]],
) -> Refusal | None:
    mixed = disprove_groups([form for _, form in pieces if form.partial])
    if mixed is not None:
        return mixed
    hull = _distances(request, structure.align)
    spans: dict[int | None, list[tuple[int, int]]] = {None: [one.span] if one.span else []}
    for lo, hi, row in structure.steps(*hull):
        spans.setdefault(row, []).append((lo, hi))
    for call, form in pieces:
        if form.level is None and one.span is not None and _within(hull, one.span):
            continue
        mask = call.atten_mask
        if mask is not None and mask.is_opaque:
            return Refusal("cover", "the distances in a mask of unknown cells are unknown")
        for block, region in zip(form.blocks, call.regions(None), strict=True):
            at = _anchor(request.sequences[block.batch], structure.align)
            cells = region.shift(block.i0, block.j0)
            rows, keys = request.sequences[block.batch]
            bands = (Slice(0, rows, 0, keys, lo + at, hi + at) for lo, hi in spans[form.level])
            if not cells <= Region.of(*bands):
                return Refusal("other-level", f"{call} has cells at distances of another step")
    return None


def disprove_groups(forms: Sequence[Form]) -> Refusal | None:
    """Return why the calls of levels cannot merge: each group of heads is merged by itself."""
    groups = {form.heads for form in forms}
    heads = [head for group in groups for head in group or ()]
    if (None in groups and len(groups) > 1) or len(set(heads)) < len(heads):
        reason = "heads have masks of their own, which differ at some distances and not at others"
        return Refusal("levels-per-head", reason)
    return None


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
