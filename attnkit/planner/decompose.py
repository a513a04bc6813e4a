"""A region that no single call computes without a full mask, as a few calls that are merged.

Each score matrix is split into its diagonal blocks, each block is cut into pieces (see
`pieces`), pieces with a common window are packed into one TND call (see `grouping`), and the
partial outputs are merged by their softmax statistics. Several cuts are tried; the price
chooses. A learnable sink takes part in the merge, not in the calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from typing import NamedTuple

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.kernel import AttenMask, KernelCall, TensorSpec
from attnkit.planner.biases import Arguments, anchor, part_arguments
from attnkit.planner.blocks import Block, diagonal_blocks
from attnkit.planner.grouping import MOST_WINDOWS, Window, group
from attnkit.planner.matrices import matrices
from attnkit.planner.pieces import Piece, cuts
from attnkit.planner.request import Request

__all__ = ["Part", "decompositions", "head_groups"]

_MOST_CUTS = 8
_MOST_GROUPINGS = 4
_MOST_CELLS = 1024
_MOST_CALLS = 8
# What the contract takes (rules batch-limit and prefix-batch).
_MOST_SEQUENCES = 2048
_MOST_PREFIXES = 32


@dataclass(frozen=True)
class Part:
    """One call of a decomposition: its window in words, the call, and where its pieces lie."""

    label: str
    call: KernelCall
    blocks: tuple[Block, ...]
    targets: tuple[Region, ...]
    heads: tuple[int, ...] | None
    kv_heads: tuple[int, ...]


def decompositions(
    request: Request, groups: Sequence[tuple[int, ...]] | None = None
) -> Iterator[tuple[Part, ...] | Refusal]:
    """Yield sets of calls whose cells are disjoint and make up the request, or why there is none.

    Only requests whose score matrices are regions are cut; heads that differ get calls of
    their own. `groups` are heads that do not differ, where a caller knows which are to stay
    together.
    """
    known = matrices(request)
    if not known.exact:
        reason = f"{request.mask!r} is no region that could be cut into pieces"
        yield Refusal("cut-region", reason, "several calls")
        return
    groups = head_groups(request) if groups is None else groups
    inside = [_inside(request, heads[0]) for heads in groups]
    depths = max((len(_all_cuts(one.region)) for some in inside for one in some), default=0)
    seen = set()
    # The grad op takes no packed window of width 1, so such bands are single cells in training.
    for depth, cells in product(range(depths), (True,) if request.needs_grad else (False, True)):
        pieces = tuple(_pieces(some, depth, cells) for some in inside)
        if pieces in seen or not any(pieces):
            continue
        seen.add(pieces)
        choices = [group(some)[:_MOST_GROUPINGS] for some in pieces]
        if any(some and not options for some, options in zip(pieces, choices, strict=True)):
            reason = f"its pieces ask for more than {MOST_WINDOWS} windows, each a call of its own"
            yield Refusal("cut-windows", reason, "several calls")
            continue
        for n in range(max(map(len, choices))):
            parts = [
                part
                for heads, some, options in zip(groups, pieces, choices, strict=True)
                for window, chosen in (options[min(n, len(options) - 1)] if options else [])
                for part in _calls(request, heads, window, [some[k] for k in chosen])
            ]
            refused = [part for part in parts if isinstance(part, Refusal)]
            yield from refused
            if not refused:
                yield tuple(part for part in parts if isinstance(part, Part))


def head_groups(request: Request) -> list[tuple[int, ...]]:
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


class _Inside(NamedTuple):
    """A diagonal block of a score matrix, its region counted from its corner."""

    batch: int
    i0: int
    j0: int
    region: Region


def _inside(request: Request, head: int) -> tuple[_Inside, ...]:
    out: list[_Inside] = []
    for b, region in enumerate(matrices(request).regions(head)):
        for block in diagonal_blocks(region, *request.sequences[b], b):
            if block.sizes[0] and block.sizes[1]:
                own = region.cut((block.i0, block.i1), (block.j0, block.j1))
                out.append(_Inside(b, block.i0, block.j0, own))
    return tuple(out)


def _pieces(inside: tuple[_Inside, ...], depth: int, cells: bool) -> tuple[Piece, ...]:
    """Cut every block in its `depth`-th way (the last one, where it has fewer)."""
    return tuple(
        Piece(batch, cell)
        for batch, i0, j0, region in inside
        for part in _cut(region, depth)
        for cell in _split(part.shift(i0, j0), cells)
    )


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
) -> Iterator[Part | Refusal]:
    """Make the calls for pieces with one window: packed calls, unless a bias says otherwise.

    Slopes go with packed pieces that have as many queries as keys and one start. A matrix goes
    with pieces of equal sizes, as the batch elements of a dense call.
    """
    if not request.bias:
        if len(pieces) > _MOST_CALLS * _MOST_SEQUENCES:
            reason = f"{len(pieces):,} pieces are too small for calls of {_MOST_SEQUENCES:,}"
            yield Refusal("batch-limit", reason, f"several calls, {_label(window)}")
            return
        for start in range(0, len(pieces), _MOST_SEQUENCES):
            yield _packed_call(request, heads, window, pieces[start : start + _MOST_SEQUENCES])
        return
    term = request.bias[0]
    sloped: dict[int, list[Piece]] = {}
    tables: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        if len(request.bias) == 1 and term.sloped and piece.rows == piece.keys:
            sloped.setdefault(anchor(request, piece.block, term), []).append(piece)
        else:
            tables.setdefault((piece.rows, piece.keys), []).append(piece)
    for some in sloped.values():
        yield _packed_call(request, heads, window, some)
    for some in tables.values():
        yield _dense_call(request, heads, window, some)


def _packed_call(
    request: Request,
    heads: tuple[int, ...],
    window: Window,
    pieces: list[Piece],
) -> Part | Refusal:
    """Return the TND call whose sequences are the pieces; with a bias, they have one start.

    Where no key occurs twice, the pieces come in the order of their keys, with a sequence
    without queries for the keys between two of them: then keys and values need no copy.
    """
    # A bias does not go with an empty sequence.
    blocks = None if request.bias else _in_place(request, [piece.block for piece in pieces])
    if blocks is None or len(blocks) > (_MOST_PREFIXES if window.mode == 6 else _MOST_SEQUENCES):
        blocks = [piece.block for piece in pieces]
    known = {piece.block: piece for piece in pieces}
    found = [known.get(block) for block in blocks]
    rows = tuple(accumulate(block.sizes[0] for block in blocks))
    keys = tuple(accumulate(block.sizes[1] for block in blocks))
    lengths = {"actual_seq_qlen": rows, "actual_seq_kvlen": keys}
    prefix = [
        window.prefix(piece) if piece else block.sizes[1]
        for piece, block in zip(found, blocks, strict=True)
    ]
    bias = part_arguments(request, blocks, len(heads), packed=True)
    if isinstance(bias, Refusal):
        return bias
    arguments = {**lengths, **_mask_arguments(window, prefix), **bias}
    targets = tuple(piece.target if piece else Region.empty() for piece in found)
    sizes = ((rows[-1],), (keys[-1],))
    return _part(request, heads, window, tuple(blocks), targets, "TND", sizes, arguments)


def _in_place(request: Request, blocks: list[Block]) -> list[Block] | None:
    """Return blocks in the order of their keys, those between them filled in.

    None where a key occurs twice.
    """
    first, *rest = sorted(blocks, key=lambda block: (block.batch, block.j0, block.j1))
    out = [first]
    for block in rest:
        last = out[-1]
        if last.batch == block.batch and last.j1 > block.j0:
            return None
        for b in range(last.batch, block.batch + 1):
            start = last.j1 if b == last.batch else 0
            stop = block.j0 if b == block.batch else request.sequences[b][1]
            row = last.i1 if b == last.batch else 0
            if start < stop:
                out.append(Block(b, row, row, start, stop))
        out.append(block)
    return out


def _dense_call(
    request: Request, heads: tuple[int, ...], window: Window, pieces: list[Piece]
) -> Part | Refusal:
    """Return the call whose batch elements are the pieces, which have equal sizes."""
    (rows, keys), batch = pieces[0].block.sizes, len(pieces)
    blocks = tuple(piece.block for piece in pieces)
    bias = part_arguments(request, blocks, len(heads), packed=False)
    if isinstance(bias, Refusal):
        return bias
    arguments = {**_mask_arguments(window, [window.prefix(piece) for piece in pieces]), **bias}
    targets = tuple(piece.target for piece in pieces)
    sizes = ((batch, rows), (batch, keys))
    return _part(request, heads, window, blocks, targets, "BSND", sizes, arguments)


def _part(
    request: Request,
    heads: tuple[int, ...],
    window: Window,
    blocks: tuple[Block, ...],
    targets: tuple[Region, ...],
    layout: str,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    arguments: Arguments,
) -> Part:
    kv_heads, dtype = _kv_heads(request, heads), request.dtype
    queries, keys = sizes
    call = KernelCall(
        TensorSpec((*queries, len(heads), request.head_dim), dtype),
        TensorSpec((*keys, len(kv_heads), request.head_dim), dtype),
        TensorSpec((*keys, len(kv_heads), request.value_dim), dtype),
        head_num=len(heads),
        input_layout=layout,
        scale=request.scale,
        keep_prob=1.0 - request.dropout,
        **arguments,
    )
    some = heads if len(heads) < request.num_heads else None
    return Part(_label(window), call, blocks, targets, some, kv_heads)


def _mask_arguments(window: Window, prefix: list[int]) -> Arguments:
    if window.mode is None:
        return {}
    if window.mode == 6:
        return {"atten_mask": AttenMask.prefix(), "sparse_mode": 6, "prefix": tuple(prefix)}
    mask: Arguments = {"atten_mask": AttenMask.causal(), "sparse_mode": window.mode}
    if window.mode == 4:
        mask |= {"pre_tokens": window.pre, "next_tokens": window.next}
    return mask


def _label(window: Window) -> str:
    if window.mode is None:
        return "no mask"
    return f"mode {window.mode}"
