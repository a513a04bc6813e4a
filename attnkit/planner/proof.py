"""The proof that kernel calls compute a request: set equality, block by block.

Every argument of a call is of one of three kinds. What the request and the call's form say
already (shapes, heads, lengths, scale) is written down again from them, and must be equal. A
bias is given in one of the ways that there are for these blocks. What is left, the mask and how
it is read, is judged by the cells that it stands for and by the contract's rules. So no argument
is left out, and one that is added to the op belongs to the first kind until it is said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import UNBOUNDED, KernelCall, TensorSpec, expressing_versions
from attnkit.kernel.modes import MASK_DECIDES
from attnkit.planner.biases import bias_arguments, disprove_bias, part_arguments
from attnkit.planner.blocks import Block, tile_whole
from attnkit.planner.candidates import Form, opaque_shape
from attnkit.planner.matrices import Matrices, matrices
from attnkit.planner.request import Request
from attnkit.planner.routes import Route

__all__ = [
    "broken_rules",
    "disprove",
    "disprove_calls",
    "disprove_cover",
    "disprove_opaque",
    "disprove_places",
    "heads_of",
    "is_opaque",
]

Piece = tuple[KernelCall, Form]
Arguments = dict[str, Any]

_NO_BIAS: Arguments = {"pse": None, "pse_type": 1, "q_start_idx": None, "kv_start_idx": None}
_OF_MASK = ("atten_mask", "sparse_mode", "pre_tokens", "next_tokens", "prefix", "inner_precise")


@lru_cache(maxsize=32)
def _computed(call: KernelCall, head: int | None) -> tuple[Region, ...]:
    """Return what a call computes; kept, since a plan is proven twice (found, then verified)."""
    regions = call.regions(head)
    inside = call.visited()
    if inside is None:
        return regions
    return tuple(region & box for region, box in zip(regions, inside, strict=True))


def heads_of(call: KernelCall) -> Sequence[int | None]:
    """Return the heads to prove one by one, or a single None where they are all alike."""
    mask = call.atten_mask
    if mask is not None and len(mask.shape) == 4 and mask.shape[1] > 1:
        return range(call.num_heads)
    return (None,)


def disprove(
    call: KernelCall, targets: Sequence[Region], head: int | None = None
) -> Refusal | None:
    """Return why a call does not compute `targets`, one region per sequence; None if it does.

    Rows without an allowed key count: where the kernel would answer the mean of the values,
    the call does not compute the request, whose answer there is 0.
    """
    extra = missing = 0
    if call.atten_mask is None:  # everything is computed: counting is enough
        sizes = zip(call.sequences, targets, strict=True)
        extra = sum(q_len * kv_len - target.area for (q_len, kv_len), target in sizes)
    else:
        for computed, target in set(zip(_computed(call, head), targets, strict=True)):
            if computed != target:
                common = (computed & target).area
                extra += computed.area - common
                missing += target.area - common
    if extra or missing:
        parts = [f"{n:,} cells too {word}" for n, word in ((extra, "many"), (missing, "few")) if n]
        return Refusal("wrong-cells", f"it would compute {' and '.join(parts)}")
    return _averaged(call, targets)


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
    request: Request, pieces: Sequence[Piece], route: Route | None = None
) -> Refusal | None:
    """Check that each call is about the request, and its sequences where the blocks say.

    A call in the request's own layout sees whole score matrices. One that packs a dense layout
    sees its tokens in order, so its blocks must follow each other without a gap. The tokens of
    a partial call are gathered by its blocks, which may lie anywhere.
    """
    for call, form in pieces:
        dim = request.head_dim if route is None else route.dim_of(form.zone)
        wrong = _other_arguments(request, call, form, dim) or _other_bias(request, call, form)
        if wrong is not None:
            return wrong
        if [block.sizes for block in form.blocks] != list(call.sequences):
            return Refusal("other-sequences", "the blocks are not the sequences of the call")
        if not _placed(request, form):
            return Refusal("misplaced", "the blocks are not where the call finds their tokens")
    return None


def _placed(request: Request, form: Form) -> bool:
    if not all(_within(request, block) for block in form.blocks):
        return False
    if form.partial:
        return not form.packs and _gathers(request, form)
    if (form.heads, form.kv_heads, form.zone) != (None, None, None):
        return False
    if form.packs:
        return form.packed and request.layout != form.layout and _follow(request, form)
    whole = tile_whole(request.batch, request.sequences)
    return form.layout == request.layout and form.blocks == whole


def _within(request: Request, block: Block) -> bool:
    """Whether a block lies in its score matrix."""
    if block.batch not in range(request.batch):
        return False
    q_len, kv_len = request.sequences[block.batch]
    return 0 <= block.i0 <= block.i1 <= q_len and 0 <= block.j0 <= block.j1 <= kv_len


def _follow(request: Request, form: Form) -> bool:
    """Whether blocks follow each other in the order of the packed tokens."""
    q_starts, kv_starts = request.token_starts
    row = key = 0
    for k in form.blocks:
        if (q_starts[k.batch] + k.i0, kv_starts[k.batch] + k.j0) != (row, key):
            return False
        row, key = row + k.sizes[0], key + k.sizes[1]
    return True


def _gathers(request: Request, form: Form) -> bool:
    """Whether the heads of a partial call exist, and read the key heads that they belong to."""
    heads, kv_heads = _heads(request, form)
    if form.heads is None and kv_heads != tuple(range(request.num_kv_heads)):
        return False
    if form.heads is not None and form.kv_heads is None:
        return False
    if not set(heads) <= set(range(request.num_heads)) or len(set(heads)) < len(heads):
        return False
    if not kv_heads or len(heads) % len(kv_heads):
        return False
    each, group = len(heads) // len(kv_heads), request.num_heads // request.num_kv_heads
    return all(kv_heads[n // each] == head // group for n, head in enumerate(heads))


def _heads(request: Request, form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heads = tuple(range(request.num_heads)) if form.heads is None else form.heads
    kv_heads = tuple(range(request.num_kv_heads)) if form.kv_heads is None else form.kv_heads
    return heads, kv_heads


def _other_arguments(request: Request, call: KernelCall, form: Form, dim: int) -> Refusal | None:
    """Compare a call with the one that its form and the request describe, bias and mask apart."""
    heads, kv_heads = _heads(request, form)
    shapes = request.shapes(form.layout)
    if form.partial:
        rows, keys = _gathered(form)
        shapes = (
            (*rows, len(heads), dim),
            (*keys, len(kv_heads), dim),
            (*keys, len(kv_heads), request.value_dim),
        )
    query, key, value = (TensorSpec(shape, request.dtype) for shape in shapes)
    rest: Arguments = {name: getattr(call, name) for name in (*_OF_MASK, *_NO_BIAS)}
    if form.packed:
        q_lens, kv_lens = zip(*(block.sizes for block in form.blocks), strict=True)
        rest["actual_seq_qlen"] = tuple(accumulate(q_lens))
        rest["actual_seq_kvlen"] = tuple(accumulate(kv_lens))
    if request.sink and not form.partial:
        wide = torch.float64 if request.dtype == torch.float64 else torch.float32
        rest["sink"] = TensorSpec((request.num_heads,), wide)
    described = KernelCall(
        query,
        key,
        value,
        head_num=len(heads),
        input_layout=form.layout,
        scale=request.scale,
        keep_prob=1.0 - request.dropout,
        **rest,
    )
    names = [f.name for f in fields(call) if getattr(call, f.name) != getattr(described, f.name)]
    if not names:
        return None
    code = "other-numbers" if set(names) <= {"scale", "keep_prob"} else "misplaced"
    told = ", ".join(
        f"{name}={getattr(call, name)} instead of {getattr(described, name)}" for name in names[:3]
    )
    return Refusal(code, f"the call is not the one that was asked for: {told[:300]}")


def _gathered(form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token axes of a part's queries and keys: packed, or one size for all pieces."""
    if form.packed:
        rows, keys = zip(*(block.sizes for block in form.blocks), strict=True)
        return (sum(rows),), (sum(keys),)
    row, key = form.blocks[0].sizes
    return (len(form.blocks), row), (len(form.blocks), key)


def _other_bias(request: Request, call: KernelCall, form: Form) -> Refusal | None:
    """Check that a call adds the bias in one of the ways that there are for its blocks."""
    trained = [term.text for term in request.bias if term.requires_grad]
    if trained and call.pse is not None:
        reason = f"{' and '.join(trained)} trains, and the kernel never writes that gradient"
        return Refusal("pse-gradient", reason)
    wrong = disprove_bias(request, call, form.blocks) if request.bias else None
    if wrong is not None:
        return wrong
    if form.partial:
        ways = [part_arguments(request, form.blocks, call.head_num, form.packed)]
    else:
        ways = [how for _, how in bias_arguments(request, form.blocks, form.packed)]
    given = {name: getattr(call, name) for name in _NO_BIAS}
    if any(given == {**_NO_BIAS, **way} for way in ways if not isinstance(way, Refusal)):
        return None
    return Refusal("other-bias", "the call does not add the bias that was asked for")


def disprove_calls(request: Request, pieces: Sequence[Piece]) -> Refusal | None:
    """Check what is left of calls that cover a request: that they are legal and say no more.

    An argument that a mode does not read is at its default, a form's targets are what its call
    computes, and no part of several leaves a row without a key: the merge would count it.
    """
    for call, form in pieces:
        reads = call.sparse_mode if call.atten_mask is not None else None
        window = (call.pre_tokens, call.next_tokens)
        if (call.prefix is not None and reads not in (5, 6)) or (
            window != (UNBOUNDED, UNBOUNDED) and reads not in (0, 4, 7, 8)
        ):
            return Refusal("unread", "the call has a window or prefix that its mode does not read")
        if not is_opaque(call) and heads_of(call) == (None,):
            computed = _computed(call, None)
            if computed != form.targets:
                return Refusal("wrong-cells", "the form speaks of other cells than the call's")
            if form.partial and (call.inner_precise or _has_empty_rows(computed, call)):
                return Refusal("mean-of-values", "a part has rows that allow no key")
        elif form.partial:
            return Refusal("misplaced", "a part reads a mask of one entry per cell")
        illegal = broken_rules(request, call)
        if illegal:
            return illegal[0]
    return None


def _has_empty_rows(computed: Sequence[Region], call: KernelCall) -> bool:
    pairs = set(zip(computed, call.sequences, strict=True))
    return any(region.empty_rows(q_len) for region, (q_len, _) in pairs)


@lru_cache(maxsize=32)  # calls are judged when they are found, and once more with their plan
def _judged(call: KernelCall, dtype: torch.dtype, training: bool) -> tuple[Refusal, ...]:
    versions = expressing_versions(call)
    broken = call.violations(
        version=versions[0] if versions else "v2",
        product="emulator" if dtype == torch.float64 else "A2",
        training=training,
    )
    return tuple(Refusal(violation.code, violation.found) for violation in broken)


def broken_rules(request: Request, call: KernelCall) -> list[Refusal]:
    """Return the contract's rules that a call breaks, on the op version that can express it.

    float64 exists on the emulator alone; everything else is judged as for hardware.
    """
    return list(_judged(call, request.dtype, request.needs_grad))


def disprove_cover(request: Request, pieces: Sequence[Piece]) -> Refusal | None:
    """Check a whole plan: the pieces are disjoint, their union is the request, no row averages.

    Every score matrix of every head group is checked. A mask of unknown cells is built from
    the request's own mask when the plan runs, so it counts as that mask within its blocks.
    """
    known = matrices(request)
    for call, form in pieces:
        if is_opaque(call):
            shape = opaque_shape(request, form)
            if isinstance(shape, Refusal):
                return shape
            if call.atten_mask is None or call.atten_mask.shape != shape:
                return Refusal("mask-shape", f"the mask's own cells have the shape {shape}")
            outer = known.over_heads()
            boxes = [outer[k.batch].cut((k.i0, k.i1), (k.j0, k.j1)) for k in form.blocks]
            wrong = disprove_opaque(call, boxes)
            if wrong is not None:
                return wrong
        elif not known.exact:
            return Refusal("cover", "a mask of unknown cells is not what the call reads")
    alone = any(form.heads is not None or heads_of(call) != (None,) for call, form in pieces)
    for head in range(request.num_heads if known.per_head or alone else 1):
        parts: list[list[Region]] = [[] for _ in range(request.batch)]
        for call, form in pieces:
            if form.heads is not None and head not in form.heads:
                continue
            regions = _piece_regions(known, head, call, form)
            averaged = _averaged(call, regions)
            if averaged is not None:
                return averaged
            for block, region in zip(form.blocks, regions, strict=True):
                moved = region.shift(block.i0, block.j0) if block.i0 or block.j0 else region
                parts[block.batch].append(moved)
        for b, (found, target) in enumerate(zip(parts, known.regions(head), strict=True)):
            missed = _uncovered(found, target)
            if missed:
                return Refusal("cover", f"batch element {b}, head {head}: {missed}")
    return None


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


def disprove_opaque(call: KernelCall, outer: Sequence[Region]) -> Refusal | None:
    """Return why a mask of unknown cells inside `outer` might be computed wrongly, or None."""
    if call.sparse_mode not in MASK_DECIDES or call.empty_row_output != "zero":
        reason = "a mask of unknown cells needs mode 0, 1 or 5, and inner_precise=2 for empty rows"
        return Refusal("mean-of-values", reason)
    boxes = call.visited()
    if boxes is not None and not all(a <= b for a, b in zip(outer, boxes, strict=True)):
        reason = "a mask of unknown cells may have some where tiles are skipped"
        return Refusal("wrong-cells", reason)
    return None


def _piece_regions(known: Matrices, head: int, call: KernelCall, form: Form) -> tuple[Region, ...]:
    if is_opaque(call):
        outer = known.regions(head)
        return tuple(outer[k.batch].cut((k.i0, k.i1), (k.j0, k.j1)) for k in form.blocks)
    return _computed(call, None if heads_of(call) == (None,) else head)


def is_opaque(call: KernelCall) -> bool:
    """Whether the cells of a call's mask are known only when it runs."""
    return call.atten_mask is not None and call.atten_mask.is_opaque
