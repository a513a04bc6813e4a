"""The proof that kernel calls compute a request: set equality, block by block.

Every argument of a call is of one of three kinds. What the request and the call's form say
already (shapes, heads, lengths, scale) is written down again from them, and must be equal. A
bias is given in one of the ways that there are for these blocks. What is left, the mask and how
it is read, is judged by the cells that it stands for and by the contract's rules. So no argument
is left out, and one that is added to the op belongs to the first kind until it is said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import UNBOUNDED, KernelCall, expressing_versions
from attnkit.kernel.modes import MASK_DECIDES
from attnkit.planner.biases import Arguments, bias_arguments, disprove_bias, part_arguments
from attnkit.planner.calls import Launch, bare_call, tile_whole
from attnkit.planner.candidates import opaque_shape
from attnkit.planner.images import are_many, uncovered
from attnkit.planner.price import heads_of
from attnkit.planner.request import Request
from attnkit.planner.routes import Route
from attnkit.planner.sequences import Block
from attnkit.progress import pulse
from attnkit.ranges import are_distinct

__all__ = [
    "disprove",
    "disprove_calls",
    "disprove_cover",
    "disprove_places",
    "reasons_against",
]

_NO_BIAS: Arguments = {"pse": None, "pse_type": 1, "q_start_idx": None, "kv_start_idx": None}
_OF_MASK = ("atten_mask", "sparse_mode", "pre_tokens", "next_tokens", "prefix", "inner_precise")


def reasons_against(request: Request, launch: Launch) -> list[Refusal]:
    """Return why a call falls that the search made: for what it computes, or what the op rejects.

    The rest of a call follows from the request, and is checked with the plan that it gets into.
    """
    pulse()
    if launch.is_opaque:
        wrong = _disprove_opaque(launch.call, request.matrices.over_heads())
    else:
        wrong = disprove(request, launch)
    wrong = wrong or disprove_bias(request, launch.call, launch.blocks)
    return [wrong] if wrong is not None else broken_rules(request, launch.call)


def disprove(request: Request, launch: Launch) -> Refusal | None:
    """Return why a call does not compute the cells that it is to compute; None if it does.

    Rows without an allowed key count: where the kernel would answer the mean of the values,
    the call does not compute the request, whose answer there is 0.
    """
    call, heads = launch.call, heads_of(launch.call)
    if call.allows_all:  # counting is enough
        extra = sum(q * kv for q, kv in call.sequences) - sum(t.area for t in launch.targets)
        return _wrong_cells(extra, 0) if extra else None
    for head, plane in zip(heads, launch.computed, strict=True):
        targets = launch.targets if head is None else request.matrices.regions(head)
        extra = missing = 0
        for computed, target in set(zip(plane, targets, strict=True)):
            if computed != target:
                common = (computed & target).area
                extra += computed.area - common
                missing += target.area - common
        if extra or missing:
            return _wrong_cells(extra, missing)
        averaged = _averaged(call, targets)
        if averaged is not None:
            return averaged
    return None


def _wrong_cells(extra: int, missing: int) -> Refusal:
    parts = [f"{n:,} cells too {word}" for n, word in ((extra, "many"), (missing, "few")) if n]
    return Refusal("wrong-cells", f"it would compute {' and '.join(parts)}")


def _averaged(call: KernelCall, computed: Sequence[Region]) -> Refusal | None:
    """Return a refusal where rows without a key would get the mean of the values, not 0."""
    if call.atten_mask is None or call.empty_row_output == "zero":
        return None
    pairs = set(zip(computed, call.sequences, strict=True))
    rows = [region.empty_rows(q_len) for region, (q_len, kv_len) in pairs if kv_len]
    count = sum(stop - start for ranges in rows for start, stop in ranges)
    if not count:
        return None
    reason = f"{count:,} rows allow no key, and the kernel would answer the mean of the values"
    return Refusal("mean-of-values", reason)


def disprove_places(
    request: Request, launches: Sequence[Launch], route: Route | None = None
) -> Refusal | None:
    """Check that each call is about the request, and its sequences where the blocks say.

    A call in the request's own layout sees whole score matrices. One that packs a dense layout
    sees its tokens in order, so its blocks must follow each other without a gap. The tokens of
    a partial call are gathered by its blocks, which may lie anywhere.
    """
    for launch in launches:
        dim = request.head_dim if route is None else route.dim_of(launch.zone)
        wrong = _other_arguments(request, launch, dim) or _other_bias(request, launch)
        if wrong is not None:
            return wrong
        if [block.sizes for block in launch.blocks] != list(launch.call.sequences):
            return Refusal("other-sequences", "the blocks are not the sequences of the call")
        if not _lies_in_place(request, launch):
            return Refusal("misplaced", "the blocks are not where the call finds their tokens")
    return None


def _lies_in_place(request: Request, launch: Launch) -> bool:
    if launch.starts != request.token_starts:
        return False
    if not all(_within(request, block) for block in launch.blocks):
        return False
    if launch.partial is True:
        return _gathers(request, launch)
    if (launch.partial, launch.heads, launch.kv_heads, launch.zone) != (False, None, None, None):
        return False
    if launch.packs(request):
        return launch.call.is_packed and _follow(launch)
    return launch.blocks == tile_whole(request.batch, request.sequences)


def _within(request: Request, block: Block) -> bool:
    """Whether a block lies in its score matrix, with no row and no key twice."""
    if block.batch not in range(request.batch):
        return False
    q_len, kv_len = request.sequences[block.batch]
    return are_distinct(block.rows, q_len) and are_distinct(block.keys, kv_len)


def _follow(launch: Launch) -> bool:
    """Whether blocks follow each other in the order of the packed tokens."""
    spans = (launch.queries.span, launch.keys.span)
    return all(span is not None and span.start == 0 for span in spans)


def _gathers(request: Request, launch: Launch) -> bool:
    """Whether the heads of a partial call exist, and read the key heads that they belong to."""
    heads, kv_heads = _heads(request, launch)
    if launch.call.input_layout not in ("BSND", "TND"):  # as tokens are gathered
        return False
    if launch.heads is None and kv_heads != tuple(range(request.num_kv_heads)):
        return False
    if not set(heads) <= set(range(request.num_heads)) or len(set(heads)) < len(heads):
        return False
    if not kv_heads or len(heads) % len(kv_heads):
        return False
    each, group = len(heads) // len(kv_heads), request.num_heads // request.num_kv_heads
    return all(kv_heads[n // each] == head // group for n, head in enumerate(heads))


def _heads(request: Request, launch: Launch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heads = tuple(range(request.num_heads)) if launch.heads is None else launch.heads
    return heads, () if launch.kv_heads is None else launch.kv_heads


def _other_arguments(request: Request, launch: Launch, dim: int) -> Refusal | None:
    """Compare a call with the one that its blocks and the request describe, bias and mask apart."""
    call, (heads, kv_heads) = launch.call, _heads(request, launch)
    part = (len(heads), len(kv_heads)) if launch.partial else None
    described = replace(
        call.around(bare_call(request, call.input_layout, launch.blocks, part, dim)),
        **{name: getattr(call, name) for name in (*_OF_MASK, *_NO_BIAS)},
    )
    names = [f.name for f in fields(call) if getattr(call, f.name) != getattr(described, f.name)]
    if not names:
        return None
    code = "other-numbers" if set(names) <= {"scale", "keep_prob"} else "misplaced"
    told = ", ".join(
        f"{name}={getattr(call, name)} instead of {getattr(described, name)}" for name in names[:3]
    )
    return Refusal(code, f"the call is not the one that was asked for: {told[:300]}")


def _other_bias(request: Request, launch: Launch) -> Refusal | None:
    """Check that a call adds the bias in one of the ways that there are for its blocks."""
    call, blocks = launch.call, launch.blocks
    wrong = disprove_bias(request, call, blocks) if request.bias else None
    if wrong is not None:
        return wrong
    if launch.partial:
        ways = [part_arguments(request, blocks, call.head_num, call.is_packed)]
    else:
        ways = [how for _, how in bias_arguments(request, blocks, call.is_packed)]
    given = {name: getattr(call, name) for name in _NO_BIAS}
    if any(given == {**_NO_BIAS, **way} for way in ways if not isinstance(way, Refusal)):
        return None
    return Refusal("other-bias", "the call does not add the bias that was asked for")


def disprove_calls(request: Request, launches: Sequence[Launch]) -> Refusal | None:
    """Check what is left of calls that cover a request: that they are legal and say no more.

    An argument that a mode does not read is at its default, the targets are what the call
    computes, and no part of several leaves a row without a key: the merge would count it.
    """
    for launch in launches:
        call = launch.call
        reads = call.sparse_mode if call.atten_mask is not None else None
        window = (call.pre_tokens, call.next_tokens)
        if (call.prefix is not None and reads not in (5, 6)) or (
            window != (UNBOUNDED, UNBOUNDED) and reads not in (0, 4, 7, 8)
        ):
            return Refusal("unread", "the call has a window or prefix that its mode does not read")
        if not launch.is_opaque and heads_of(call) == (None,):
            if launch.computed != (launch.targets,):
                return Refusal("wrong-cells", "the targets are other cells than the call's")
            empty = any(target.empty_rows(q_len) for (q_len, _), target in launch.distinct)
            if launch.partial and (call.inner_precise or empty):
                return Refusal("mean-of-values", "a part has rows that allow no key")
        elif launch.partial:
            return Refusal("misplaced", "a part reads a mask of one entry per cell")
        if not all(region.is_canonical for region in _drawn(call)):
            return Refusal("wrong-cells", "the mask's cells are not written in their one order")
        illegal = broken_rules(request, call)
        if illegal:
            return illegal[0]
    return None


def _drawn(call: KernelCall) -> tuple[Region, ...]:
    """Return the regions that a mask of one entry per cell is drawn from; tiles share theirs."""
    regions = (call.atten_mask.regions or ()) if call.atten_mask is not None else ()
    return tuple({id(region): region for region in regions}.values())


def broken_rules(request: Request, call: KernelCall) -> list[Refusal]:
    """Return the contract's rules that a call breaks, on the op version that can express it.

    float64 exists on the emulator alone; everything else is judged as for hardware.
    """
    versions = expressing_versions(call)
    broken = call.violations(
        version=versions[0] if versions else "v2",
        product="emulator" if request.dtype == torch.float64 else "A2",
        training=request.needs_grad,
    )
    return [Refusal(violation.code, violation.found) for violation in broken]


def disprove_cover(request: Request, launches: Sequence[Launch]) -> Refusal | None:
    """Check a whole plan: the parts are disjoint, their union is the request, no row averages.

    Every score matrix of every head group is checked. A mask of unknown cells is built from
    the request's own mask when the plan runs, so it counts as that mask within its blocks.
    """
    known = request.matrices
    wrongs = (_other_mask(request, launch) for launch in launches)
    wrong = next(filter(None, wrongs), None)
    if wrong is not None:
        return wrong
    alone = any(one.heads is not None or heads_of(one.call) != (None,) for one in launches)
    for head in range(request.num_heads if known.per_head or alone else 1):
        parts: list[list[tuple[Block, Region]]] = [[] for _ in range(request.batch)]
        for launch in launches:
            if launch.heads is not None and head not in launch.heads:
                continue
            if launch.is_opaque:
                regions = _bounds(launch, known.regions(head))
            else:
                regions = launch.regions(head)
            averaged = _averaged(launch.call, regions)
            if averaged is not None:
                return averaged
            for block, region in zip(launch.blocks, regions, strict=True):
                parts[block.batch].append((block, region))
        for b, (found, target) in enumerate(zip(parts, known.regions(head), strict=True)):
            if are_many(found, target):
                missed = uncovered(found, target)
            else:
                missed = _uncovered([block.image(region) for block, region in found], target)
            if missed:
                return Refusal("cover", f"batch element {b}, head {head}: {missed}")
    return None


def _other_mask(request: Request, launch: Launch) -> Refusal | None:
    """Check that a call reads a mask of unknown cells where the request has one, and its own."""
    call = launch.call
    if not launch.is_opaque:
        reason = "a mask of unknown cells is not what the call reads"
        return None if request.matrices.exact else Refusal("cover", reason)
    shape = opaque_shape(request, launch)
    if isinstance(shape, Refusal):
        return shape
    if call.atten_mask is None or call.atten_mask.shape != shape:
        return Refusal("mask-shape", f"the mask's own cells have the shape {shape}")
    if call.atten_mask.with_call != request.mask.comes_with_call:
        reason = "whether the mask comes with each call is for the mask to say"
        return Refusal("mask-given", reason)
    return _disprove_opaque(call, _bounds(launch, request.matrices.over_heads()))


def _uncovered(found: list[Region], target: Region) -> str:
    """Say how the union of disjoint regions misses a target; empty if it does not."""
    if len(found) == 1 and found[0] == target:
        return ""
    whole = Region.union(found)
    overlap = sum(part.area for part in found) - whole.area
    if whole == target and not overlap:
        return ""
    wrong = (whole ^ target).bounds
    return (
        f"the calls cover {whole.area:,} cells, {overlap:,} of them twice; the mask has "
        f"{target.area:,} (first difference near {(wrong.i0, wrong.j0) if wrong else 'nowhere'})"
    )


def _disprove_opaque(call: KernelCall, outer: Sequence[Region]) -> Refusal | None:
    """Return why a mask of unknown cells inside `outer` might be computed wrongly, or None."""
    if call.sparse_mode not in MASK_DECIDES or call.empty_row_output != "zero":
        reason = "a mask of unknown cells needs mode 0, 1 or 5, and inner_precise=2 for empty rows"
        return Refusal("mean-of-values", reason)
    boxes = call.visited()
    if boxes is not None and not all(a <= b for a, b in zip(outer, boxes, strict=True)):
        reason = "a mask of unknown cells may have some where tiles are skipped"
        return Refusal("wrong-cells", reason)
    return None


def _bounds(launch: Launch, outer: Sequence[Region]) -> tuple[Region, ...]:
    return tuple(outer[k.batch].cut(k.ends[:2], k.ends[2:]) for k in launch.blocks)
