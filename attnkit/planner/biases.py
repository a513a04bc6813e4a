"""The arguments with which a kernel call adds a bias, and the proof that it is the one asked for.

By *slopes* (types 2 and 3) the kernel computes distances itself, from the corner of each of its
sequences: start indices move that corner. By a *matrix* (types 0 and 1) it reads an entry per
cell, in the query's dtype; of a bias that depends on the distance alone, the last 1,024 rows
will do, where masks are causal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from attnkit.errors import Refusal
from attnkit.kernel import KernelCall, TensorSpec
from attnkit.masks.base import anchor
from attnkit.masks.predicate import function_name
from attnkit.planner.request import BiasTerm, Composition, Request
from attnkit.planner.sequences import Block
from attnkit.pse import Linear

__all__ = [
    "COMPRESSED_ROWS",
    "Arguments",
    "anchor_in",
    "bias_arguments",
    "disprove_bias",
    "is_compressed",
    "lacking",
    "part_arguments",
]

Arguments = dict[str, Any]

COMPRESSED_ROWS = 1024
"""So many rows of a bias by distance hold all of it, for the kernel."""


def bias_arguments(
    request: Request, blocks: Sequence[Block], packed: bool
) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield the ways in which one call on some blocks might add the bias, the cheapest first."""
    terms = request.bias
    inside = [block for block in blocks if all(block.sizes)]
    if not terms or not inside:  # where there is no cell, nothing is added to one
        yield "", {}
        return
    if len(terms) == 1 and terms[0].sloped:
        shift = anchor_in(request, inside[0], terms[0]) if inside else 0
        yield ", slopes", slope_arguments(request, request.num_heads, shift)
    long = packed or request.q_len > COMPRESSED_ROWS
    if long and inside and all(term.by_distance for term in terms):
        kv_len = max(block.sizes[1] for block in inside)
        shape = (1, request.num_heads, COMPRESSED_ROWS, kv_len)
        yield ", compressed bias", matrix_arguments(request, shape)
    if packed:
        reason = "a packed call takes slopes or a compressed bias, no full matrix"
        yield ", bias matrix", Refusal("pse-packed", reason)
        return
    batch = next((term.batch for term in terms if term.batch is not None), 1)
    shape = (batch, request.num_heads, request.q_len, request.kv_len)
    yield ", bias matrix", matrix_arguments(request, shape)


def part_arguments(
    request: Request, blocks: Sequence[Block], heads: int, packed: bool
) -> Arguments | Refusal:
    """Return the arguments with which a call on pieces adds the bias to some of the heads.

    Slopes go with packed pieces that have one start, a matrix with the pieces of a dense call,
    which have one size.
    """
    terms = request.bias
    if not terms:
        return {}
    if not all(block.is_rectangle for block in blocks):
        reason = "the kernel counts a bias's positions in the call, where gathered keys have others"
        return Refusal("pse-gathered", reason)
    if packed:
        if len(terms) > 1 or not terms[0].sloped:
            return Refusal("pse-packed", "packed pieces take slopes, and one bias of them")
        return slope_arguments(request, heads, anchor_in(request, blocks[0], terms[0]))
    sizes = {request.sequences[block.batch] for block in blocks}
    places = {block.ends for block in blocks}
    alike = len(sizes) == len(places) == 1 and all(term.batch in (None, 1) for term in terms)
    batch = 1 if alike else len(blocks)
    return matrix_arguments(request, (batch, heads, *blocks[0].sizes))


def lacking(composed: Request | Composition) -> list[Refusal]:
    """Return the terms of a composition that no call of the fused kernel computes."""
    reasons = []
    if composed.softcap is not None:
        reason = f"softcap={composed.softcap} is a term the fused kernel does not have"
        reasons.append(Refusal("softcap", reason))
    if composed.score_fn is not None:
        reason = (
            f"score_fn={function_name(composed.score_fn)} is a function of yours, and the fused "
            "kernel runs no code but its own; a bias (pse=) that says the same can be planned"
        )
        reasons.append(Refusal("score-function", reason))
    return reasons


def slope_arguments(request: Request, heads: int, shift: int) -> Arguments:
    """Return the arguments of a bias by slopes, whose query 0 is at key `shift`."""
    start = {"q_start_idx": (max(shift, 0),), "kv_start_idx": (max(-shift, 0),)} if shift else {}
    dtype = torch.float64 if request.dtype == torch.float64 else torch.float32
    kind = 2 if isinstance(request.bias[0].structure, Linear) else 3
    return {"pse": TensorSpec((heads,), dtype), "pse_type": kind, **start}


def matrix_arguments(request: Request, shape: tuple[int, ...]) -> Arguments | Refusal:
    """Return the arguments of a bias by entries, or why the query's dtype cannot hold them."""
    terms = request.bias
    wide = request.dtype in (torch.float32, torch.float64)
    if not wide and not (len(terms) == 1 and terms[0].dtype == request.dtype):
        return Refusal(
            "pse-precision",
            f"the kernel reads a bias matrix in the query's dtype, {request.dtype}, which would "
            f"round {' + '.join(term.text for term in terms)}; give one bias of that dtype",
        )
    before = {term.before_scale for term in terms} == {True}
    return {"pse": TensorSpec(shape, request.dtype), "pse_type": 1 if before else 0}


def anchor_in(request: Request, block: Block, term: BiasTerm) -> int:
    """Return the key, in a block's own numbering, that its query 0 is at."""
    q_len, kv_len = request.sequences[block.batch]
    i0, _, j0, _ = block.ends
    return i0 + anchor(term.align, q_len, kv_len) - j0


def is_compressed(call: KernelCall) -> bool:
    """Whether a call reads the last rows of its bias alone."""
    if call.pse is None or call.pse_type not in (0, 1) or len(call.pse.shape) != 4:
        return False
    rows: int = call.pse.shape[2]
    return rows == COMPRESSED_ROWS and (call.is_packed or call.q_len > rows)


def disprove_bias(request: Request, call: KernelCall, blocks: Sequence[Block]) -> Refusal | None:
    """Return why a call adds another bias than the one asked for; None if it does not.

    The entries of a matrix are bound to its blocks when the plan runs; slopes and compressed
    rows must mean the same distances in every block.
    """
    if call.pse is None:
        return None
    inside = [(k, block) for k, block in enumerate(blocks) if all(block.sizes)]
    if call.pse_type in (2, 3):
        starts = (call.q_start_idx or (0,))[0] - (call.kv_start_idx or (0,))[0]
        for k, block in inside:
            # Mode 8 knows start indices in its first sequence only.
            given = starts if call.sparse_mode != 8 or k == 0 else 0
            wanted = anchor_in(request, block, request.bias[0])
            if given != wanted:
                reason = (
                    f"{request.bias[0].text} is at key {wanted} of sequence {k} in its first "
                    f"row, and the kernel would count from key {given}"
                )
                return Refusal("alibi-anchor", reason)
        return None
    # Compressed rows are read by distance: sequences may differ in length, but not in anchor.
    anchors = {anchor_in(request, block, term) for _, block in inside for term in request.bias}
    if is_compressed(call) and len(anchors) > 1:
        return Refusal("pse-anchor", "the distances in the blocks of the call differ")
    return None
