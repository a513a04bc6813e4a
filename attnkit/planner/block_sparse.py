"""A further lowering: full blocks by ``npu_block_sparse_attention``, what is left by fused calls.

The op reads keys in place, block by block, where a fused call would have them gathered. It takes
whole blocks only, so the cells of other blocks are left to the decompositions that there are, and
the outputs are merged by their log-sum-exp. Rows whose blocks are all cut by an edge, or empty,
are not in its call: what it answers there is not documented.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf, prod

from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import BlockSparseCall
from attnkit.kernel.block_sparse import full_blocks, grid_of
from attnkit.masks import Slices
from attnkit.planner.calls import MERGE_LAUNCHES, Launch, Solution, bare_call
from attnkit.planner.price import chip
from attnkit.planner.proof import reasons_against
from attnkit.planner.request import Request
from attnkit.planner.sequences import Block

__all__ = ["by_blocks"]

BLOCK = (128, 128)
"""The rows and keys of a block: the op's tile, and the fewest keys that it takes."""

_LABEL = "full blocks"


def by_blocks(
    request: Request, others: Callable[[Request], Sequence[Solution]], bound: float = inf
) -> Solution | list[Refusal]:
    """Return how a call on full blocks and others compute a request, or why they do not.

    `others` are the ways in which fused calls compute what is left. They are not looked for where
    that costs more than `bound`, in nanoseconds, however it is computed.
    """
    lacks = _lacking(request)
    if lacks is not None:
        return [lacks]
    sizes, regions = request.sequences[0], request.matrices.regions()
    known = {region: full_blocks(region, sizes, BLOCK) for region in set(regions)}
    tables = [known[region] for region in regions]
    if not any(tables):
        reason = f"no block of {BLOCK[0]} rows and {BLOCK[1]} keys is allowed in full"
        return [Refusal("no-full-block", reason, _LABEL)]
    launch = _launch(request, tables)
    if isinstance(launch, Refusal):
        return [launch]
    reasons = reasons_against(request, launch)
    if reasons:
        return [replace(reason, subject=_LABEL) for reason in reasons]
    found = [Region.empty()] * request.batch
    for block, target in zip(launch.blocks, launch.targets, strict=True):
        found[block.batch] = block.image(target)
    rest = [region - own for region, own in zip(regions, found, strict=True)]
    if not any(rest):
        return Solution((_as_part(launch, once=True),))
    part = _as_part(launch)
    least = part.price.nanoseconds + _least_of(request, rest)
    if least >= bound:
        told = f"with other calls {least / 1e3:,.1f} us or more, another way {bound / 1e3:,.1f} us"
        return [Refusal("dearer", f"they would cost {told}", _LABEL)]
    alike = rest[0] if len(set(rest)) == 1 else rest
    best = min(
        others(replace(request, mask=Slices.of(alike, *sizes))),
        key=lambda one: one.price.nanoseconds,
        default=None,
    )
    if best is None:
        reason = "no calls compute what full blocks leave of the mask"
        return [Refusal("no-edges", reason, _LABEL)]
    return Solution((part, *(one.as_part() for one in best.launches)))


def _least_of(request: Request, rest: Sequence[Region]) -> float:
    """Return what calls on some cells, and the merge of their rows, cost at least, in ns."""
    cells = sum(region.area for region in rest)
    rows = sum(strip.i1 - strip.i0 for region in rest for strip in region.strips)
    flops = 2 * cells * request.num_heads * (request.head_dim + request.value_dim)
    merged = (request.dtype.itemsize + 2 * 4) * rows * request.num_heads * request.value_dim
    return chip().nanoseconds(flops, merged, 1, MERGE_LAUNCHES)


def _lacking(request: Request) -> Refusal | None:
    """Return what the op, or its lowering, lacks for a request whatever its cells are."""
    reason = ""
    if request.bias or request.dropout:
        reason = f"the op has no {'bias' if request.bias else 'dropout'}"
    elif not request.matrices.exact or request.matrices.per_head:
        reason = "the mask is not one region for all heads"
    elif len(set(request.sequences)) > 1:
        reason = "its sequences differ in length"
    return Refusal("block-sparse", reason, _LABEL) if reason else None


def _launch(request: Request, tables: Sequence[Region]) -> Launch | Refusal:
    """Return the call on full blocks, of the rows that have some and of all keys."""
    (q_len, kv_len), rows = request.sequences[0], BLOCK[0]
    blocks, own, count = [], [], grid_of((q_len, kv_len), BLOCK)[0]
    for b, table in enumerate(tables):
        if table:
            kept = _filled(table, count)
            ranges = tuple(range(i0 * rows, min(i1 * rows, q_len)) for i0, i1 in kept)
            blocks.append(Block(b, ranges, (range(kv_len),)))
            own.append(_squeezed(table, kept))
    # The op's backward takes no packed tensors, so far as CANN 9.0 documents it.
    layout = "BSND" if request.needs_grad else "TND"
    if layout == "BSND" and len({block.sizes for block in blocks}) > 1:
        reason = "its backward takes as many rows of each batch element, and the blocks are of more"
        return Refusal("block-sparse", reason, _LABEL)
    heads = (request.num_heads, request.num_kv_heads)
    call = BlockSparseCall.of(bare_call(request, layout, blocks, heads), tuple(own), BLOCK)
    kv_heads = tuple(range(request.num_kv_heads))
    return Launch(
        _LABEL, call, tuple(blocks), call.regions(), request.token_starts, kv_heads=kv_heads
    )


def _as_part(launch: Launch, once: bool = False) -> Launch:
    """Return the launch with what is done around it: a dense call's heads come before its rows."""
    part, call = launch.as_part(once), launch.call
    turned = () if call.is_packed else (call.query, call.key, call.value, call.output)
    moved = 2 * sum(prod(spec.shape) * spec.dtype.itemsize for spec in turned)
    return replace(
        part,
        copied_bytes=part.copied_bytes + moved,
        small_launches=part.small_launches + len(turned),
    )


def _filled(table: Region, count: int) -> list[tuple[int, int]]:
    """Return the rows of a table that are not empty, as ranges."""
    empty = [(0, 0), *table.empty_rows(count), (count, count)]
    return [(a[1], b[0]) for a, b in pairwise(empty) if a[1] < b[0]]


def _squeezed(table: Region, kept: Sequence[tuple[int, int]]) -> Region:
    """Return some rows of a table, one below the other."""
    return Region.from_rows([table.row(i) for i0, i1 in kept for i in range(i0, i1)])
