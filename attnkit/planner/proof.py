"""The proof that kernel calls compute a request: set equality, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import KernelCall
from attnkit.kernel.modes import MASK_DECIDES
from attnkit.planner.biases import disprove_bias
from attnkit.planner.candidates import Form
from attnkit.planner.matrices import Matrices, matrices
from attnkit.planner.request import Request

__all__ = [
    "disprove",
    "disprove_cover",
    "disprove_opaque",
    "disprove_places",
    "heads_of",
    "is_opaque",
]

Piece = tuple[KernelCall, Form]


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


def disprove_places(request: Request, pieces: Sequence[Piece]) -> Refusal | None:
    """Check that each call is about the request, and its sequences where the blocks say.

    A call in the request's own layout sees whole score matrices. One that packs a dense layout
    sees its tokens in order, so its blocks must follow each other without a gap. The tokens of
    a partial call are gathered by its blocks, which may lie anywhere.
    """
    for call, form in pieces:
        if [block.sizes for block in form.blocks] != list(call.sequences):
            return Refusal("other-sequences", "the blocks are not the sequences of the call")
        if (call.scale, call.keep_prob) != (request.scale, 1.0 - request.dropout):
            return Refusal("other-numbers", f"{call} has another scale or dropout than asked for")
        if (call.pse is None) != (not request.bias):
            return Refusal("other-bias", f"{call} does not add the bias that was asked for")
        wrong = disprove_bias(request, call, form.blocks)
        if wrong is not None:
            return wrong
        if form.partial:
            placed = call.sink is None and _gathers(request, call, form)
        else:
            shapes = tuple(spec.shape for spec in (call.query, call.key, call.value))
            placed = (shapes, call.head_num) == (request.shapes(call.layout), request.num_heads)
            placed &= (call.sink is not None) == request.sink
            placed &= _follow(request, form) if form.packs else _are_whole(request, form)
        if not placed:
            return Refusal("misplaced", "the blocks are not where the call finds their tokens")
    return None


def _are_whole(request: Request, form: Form) -> bool:
    whole = [(b, 0, 0) for b in range(request.batch)]
    return [(block.batch, block.i0, block.j0) for block in form.blocks] == whole


def _follow(request: Request, form: Form) -> bool:
    """Whether blocks follow each other in the order of the packed tokens."""
    q_starts, kv_starts = request.token_starts
    row = key = 0
    for k in form.blocks:
        if (q_starts[k.batch] + k.i0, kv_starts[k.batch] + k.j0) != (row, key):
            return False
        row, key = row + k.sizes[0], key + k.sizes[1]
    return True


def _gathers(request: Request, call: KernelCall, form: Form) -> bool:
    """Whether the heads of a partial call read the key heads that they belong to."""
    heads = range(request.num_heads) if form.heads is None else form.heads
    kv_heads = range(request.num_kv_heads) if form.kv_heads is None else form.kv_heads
    if (call.num_heads, call.num_kv_heads) != (len(heads), len(kv_heads)):
        return False
    each, group = len(heads) // len(kv_heads), request.num_heads // request.num_kv_heads
    return all(kv_heads[n // each] == head // group for n, head in enumerate(heads))


def disprove_cover(request: Request, pieces: Sequence[Piece]) -> Refusal | None:
    """Check a whole plan: the pieces are disjoint, their union is the request, no row averages.

    Every score matrix of every head group is checked. A mask of unknown cells is built from
    the request's own mask when the plan runs, so it counts as that mask within its blocks.
    """
    known = matrices(request)
    for call, form in pieces:
        if is_opaque(call):
            outer = known.over_heads()
            boxes = [outer[k.batch].cut((k.i0, k.i1), (k.j0, k.j1)) for k in form.blocks]
            wrong = disprove_opaque(call, boxes)
            if wrong is not None:
                return wrong
    for head in range(len(known.planes)):
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
