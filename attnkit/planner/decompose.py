"""A region that no single call computes without a full mask, as a few calls that are merged.

Each score matrix is split into its diagonal blocks, each block is cut into pieces (see
`pieces`), pieces with a common window are packed into one TND call (see `grouping`), and the
partial outputs are merged by their softmax statistics. Several cuts are tried; the price
chooses. A learnable sink takes part in the merge, not in the calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, product
from typing import Any

import torch

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.kernel import AttenMask, KernelCall, TensorSpec
from attnkit.planner.blocks import Block, diagonal_blocks
from attnkit.planner.grouping import Window, group
from attnkit.planner.matrices import matrices
from attnkit.planner.pieces import Piece, cuts
from attnkit.planner.request import Request

__all__ = ["Part", "decompositions"]

_FLOAT32 = torch.float32

_MOST_CUTS = 6
_MOST_GROUPINGS = 4
_MOST_CELLS = 1024


@dataclass(frozen=True)
class Part:
    """One call of a decomposition: its window in words, the call, and where its pieces lie."""

    label: str
    call: KernelCall
    blocks: tuple[Block, ...]
    targets: tuple[Region, ...]
    heads: tuple[int, ...] | None
    kv_heads: tuple[int, ...]


def decompositions(request: Request) -> Iterator[tuple[Part, ...] | Refusal]:
    """Yield sets of calls whose cells are disjoint and make up the request, or why there is none.

    Only requests whose score matrices are regions are cut; heads that differ get calls of
    their own.
    """
    known = matrices(request)
    if not known.exact:
        reason = f"{request.mask!r} is no region that could be cut into pieces"
        yield Refusal("cut-region", reason, "several calls")
        return
    terms = request.bias
    if len(terms) > 1 or (terms and not terms[0].sloped):
        reason = "a bias matrix cannot go with the pieces of a packed call; slopes can"
        yield Refusal("cut-bias", reason, "several calls")
        return
    groups = _head_groups(request)
    seen = set()
    # The grad op takes no packed window of width 1, so such bands are single cells in training.
    for depth, cells in product(
        range(_MOST_CUTS), (True,) if request.needs_grad else (False, True)
    ):
        pieces = tuple(_pieces(request, heads[0], depth, cells) for heads in groups)
        if pieces in seen or not any(pieces):
            continue
        seen.add(pieces)
        choices = [group(some)[:_MOST_GROUPINGS] for some in pieces]
        for n in range(max(map(len, choices))):
            yield tuple(
                part
                for heads, some, options in zip(groups, pieces, choices, strict=True)
                for window, chosen in (options[min(n, len(options) - 1)] if options else [])
                for part in _calls(request, heads, window, [some[k] for k in chosen])
            )


def _head_groups(request: Request) -> list[tuple[int, ...]]:
    """Return the heads that have equal masks, together."""
    planes = matrices(request).planes
    if len(planes) == 1:
        return [tuple(range(request.num_heads))]
    alike: dict[object, list[int]] = {}
    for head, plane in enumerate(planes):
        alike.setdefault(plane, []).append(head)
    return [tuple(heads) for heads in alike.values()]


def _kv_heads(request: Request, heads: tuple[int, ...]) -> tuple[int, ...]:
    """Return the key heads that a call on some query heads reads, repeated only where it must."""
    size = request.num_heads // request.num_kv_heads
    wanted = tuple(head // size for head in heads)
    distinct = tuple(dict.fromkeys(wanted))
    each = len(wanted) // len(distinct)
    even = tuple(head for head in distinct for _ in range(each))
    return distinct if wanted == even else wanted


def _pieces(request: Request, head: int, depth: int, cells: bool) -> tuple[Piece, ...]:
    """Cut every score matrix in its `depth`-th way (the last one, where it has fewer)."""
    out: list[Piece] = []
    for b, region in enumerate(matrices(request).regions(head)):
        q_len, kv_len = request.sequences[b]
        for block in diagonal_blocks(region, q_len, kv_len, b):
            if block.sizes[0] and block.sizes[1]:
                inside = region.cut((block.i0, block.i1), (block.j0, block.j1))
                parts = (s.shift(block.i0, block.j0) for s in _cut(inside, depth))
                out += (Piece(b, cell) for part in parts for cell in _split(part, cells))
    return tuple(out)


def _split(part: Slice, cells: bool) -> Iterator[Slice]:
    """Split a band of width 1 into its cells, where that is wanted and they are not too many."""
    rows = part.i1 - part.i0
    if part.lo < part.hi or rows == 1 or rows > _MOST_CELLS or not cells:
        yield part
        return
    for i in range(part.i0, part.i1):
        yield Slice(i, i + 1, i + part.lo, i + part.lo + 1)


@lru_cache(maxsize=1024)
def _all_cuts(region: Region) -> tuple[tuple[Slice, ...], ...]:
    return tuple(cut for cut, _ in zip(cuts(region), range(_MOST_CUTS), strict=False))


def _cut(region: Region, depth: int) -> tuple[Slice, ...]:
    known = _all_cuts(region)
    return known[min(depth, len(known) - 1)]


def _calls(
    request: Request, heads: tuple[int, ...], window: Window, pieces: list[Piece]
) -> Iterator[Part]:
    """Pack pieces with one window into calls: one, unless a bias needs different start indices."""
    if not request.bias:
        yield _call(request, heads, window, pieces, None)
        return
    term = request.bias[0]
    shifts: dict[int, list[Piece]] = {}
    for piece in pieces:
        q_len, kv_len = request.sequences[piece.batch]
        at = kv_len - q_len if term.align == "bottom_right" else 0
        shifts.setdefault(piece.part.i0 + at - piece.part.j0, []).append(piece)
    for shift, some in shifts.items():
        yield _call(request, heads, window, some, shift)


def _call(
    request: Request,
    heads: tuple[int, ...],
    window: Window,
    pieces: list[Piece],
    shift: int | None,
) -> Part:
    rows = list(accumulate(piece.rows for piece in pieces))
    keys = list(accumulate(piece.keys for piece in pieces))
    kv_heads, dtype = _kv_heads(request, heads), request.dtype
    call = KernelCall(
        TensorSpec((rows[-1], len(heads), request.head_dim), dtype),
        TensorSpec((keys[-1], len(kv_heads), request.head_dim), dtype),
        TensorSpec((keys[-1], len(kv_heads), request.value_dim), dtype),
        head_num=len(heads),
        input_layout="TND",
        scale=request.scale,
        keep_prob=1.0 - request.dropout,
        actual_seq_qlen=tuple(rows),
        actual_seq_kvlen=tuple(keys),
    )
    call = replace(call, **_mask_arguments(window, pieces))
    if shift is not None:
        call = replace(call, **_slopes(request, len(heads), shift))
    blocks = tuple(piece.block for piece in pieces)
    some = heads if len(heads) < request.num_heads else None
    targets = tuple(piece.target for piece in pieces)
    return Part(_label(window), call, blocks, targets, some, kv_heads)


def _mask_arguments(window: Window, pieces: list[Piece]) -> dict[str, Any]:
    if window.mode is None:
        return {}
    if window.mode == 6:
        prefix = tuple(window.prefix(piece) for piece in pieces)
        return {"atten_mask": AttenMask.prefix(), "sparse_mode": 6, "prefix": prefix}
    mask: dict[str, Any] = {"atten_mask": AttenMask.causal(), "sparse_mode": window.mode}
    if window.mode == 4:
        mask |= {"pre_tokens": window.pre, "next_tokens": window.next}
    return mask


def _slopes(request: Request, heads: int, shift: int) -> dict[str, Any]:
    wide = request.dtype.itemsize == 8
    spec = TensorSpec((heads,), request.dtype if wide else _FLOAT32)
    start = {"q_start_idx": (shift,), "kv_start_idx": (0,)} if shift else {}
    return {"pse": spec, "pse_type": 2 if request.bias[0].power == 1.0 else 3, **start}


def _label(window: Window) -> str:
    if window.mode is None:
        return "no mask"
    return f"mode {window.mode}"
