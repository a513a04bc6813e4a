"""Every single kernel call that might compute a request: the search space, walked in full.

A *form* is a way to hand the score matrices to the kernel: in the request's own layout, or
with the diagonal blocks of a dense layout packed into one TND call. For each form and each
sparse mode the arguments follow from the target regions by inspection (a window's ends from
its bounds, a prefix from the first row). They are guesses: proving them is not done here.

The candidates of a form come from the cheapest on, so that once one is proven the rest need
not be looked at. Masks of one entry per cell are apart: they are for requests that nothing
else computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.kernel import UNBOUNDED, AttenMask, KernelCall, TensorSpec
from attnkit.kernel.modes import right_down_causal
from attnkit.kernel.sizes import LAYOUTS
from attnkit.planner.biases import bias_arguments
from attnkit.planner.blocks import Block, diagonal_blocks, tile_whole
from attnkit.planner.matrices import Matrices, matrices
from attnkit.planner.request import Request
from attnkit.pse import Align

__all__ = ["Candidate", "Form", "Zone", "candidates", "forms", "opaque_shape"]

Arguments = dict[str, Any]

_MOST_CELLS = 1024


@dataclass(frozen=True)
class Zone:
    """Cells at some distances ``j - i'``, whose calls are given the same of a bias (`routes`).

    `spans` are ``(align, first, last)``, and a cell's distance lies in each of them. In the
    calls of a zone the query's dimensions in `turned`, ranges ``[start, stop)``, change sign,
    and every score adds the row `row` of the bias's table, at the merge.
    """

    spans: tuple[tuple[Align, int, int], ...]
    turned: tuple[tuple[int, int], ...] = ()
    row: int | None = None


@dataclass(frozen=True)
class Form:
    """One way to hand the request's score matrices to the kernel, and what each must be."""

    layout: str
    blocks: tuple[Block, ...]
    targets: tuple[Region, ...]
    packs: bool
    """Whether the call's layout is TND and the request's is not: tensors are packed around it."""
    partial: bool = False
    """Whether the call answers pieces of the rows, so that outputs are gathered and merged."""
    heads: tuple[int, ...] | None = None
    """The query heads of the call, where it does not have all of them, and its key heads."""
    kv_heads: tuple[int, ...] | None = None
    zone: Zone | None = None
    """What a bias that goes around the call asks of it, where calls differ in that."""

    @property
    def packed(self) -> bool:
        """Whether the call's layout is TND."""
        return self.layout == "TND"

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some row of a block with keys allows none of them."""
        return any(
            kv_len > 0 and target.empty_rows(q_len) for (q_len, kv_len), target in self.distinct
        )

    @cached_property
    def distinct(self) -> frozenset[tuple[tuple[int, int], Region]]:
        """The different ``((q_len, kv_len), target)`` pairs of the blocks."""
        sizes = (block.sizes for block in self.blocks)
        return frozenset(zip(sizes, self.targets, strict=True))


@dataclass(frozen=True)
class Candidate:
    """A call that might do, where its sequences lie, and a name to report it by."""

    label: str
    call: KernelCall
    form: Form


def forms(request: Request) -> Iterator[Form]:
    """Yield the request's own layout, and its diagonal blocks packed where that differs.

    A layout that the kernel has never heard of is packed, too.
    """
    known = matrices(request)
    whole = tile_whole(request.batch, request.sequences)
    foreign = request.layout not in LAYOUTS
    yield Form("TND" if foreign else request.layout, whole, known.regions(), packs=foreign)
    if request.layout_of.packed or known.per_head or not known.exact:
        return
    chain: list[Block] = []
    for b, region in enumerate(known.regions()):
        chain += diagonal_blocks(region, request.q_len, request.kv_len, b)
    targets = tuple(known.regions()[k.batch].cut((k.i0, k.i1), (k.j0, k.j1)) for k in chain)
    if len(chain) > request.batch:
        yield Form("TND", tuple(chain), targets, packs=True)
    cells = tuple(cell for pair in zip(chain, targets, strict=True) for cell in _cells(*pair))
    if len(cells) > len(chain):
        blocks, parts = zip(*cells, strict=True)
        yield Form("TND", blocks, parts, packs=True)


def _cells(block: Block, target: Region) -> Iterator[tuple[Block, Region]]:
    """Yield a block, or if it is a band of width 1 its cells, which fit any window."""
    rows = block.sizes[0]
    if target.area != rows or rows not in range(2, _MOST_CELLS) or target != _diagonal(rows):
        yield block, target
        return
    for n in range(rows):
        at = (block.i0 + n, block.i0 + n + 1, block.j0 + n, block.j0 + n + 1)
        yield Block(block.batch, *at), Region.full(1, 1)


def _diagonal(rows: int) -> Region:
    return Region.of(Slice(0, rows, 0, rows, 0, 0))


def candidates(request: Request, form: Form, full_masks: bool) -> Iterator[Candidate | Refusal]:
    """Yield the candidates of one form, the cheapest first; refusals for what cannot apply.

    With `full_masks`, those that read a mask of one entry per cell; without, all others.
    """
    if request.sink and any(q and not kv for q, kv in (k.sizes for k in form.blocks)):
        reason = "the kernel leaves the sink out where a packed sequence has no keys"
        yield Refusal("sink-no-keys", reason, f"{_where(form)}any mode")
        return
    masks = _full_mask_arguments if full_masks else _compressed_arguments
    for how, bias in bias_arguments(request, form.blocks, form.packed):
        if isinstance(bias, Refusal):
            yield replace(bias, subject=f"{_where(form)}any mode{how}")
            continue
        base = _base_call(request, form, bias)
        for mode, arguments in masks(request, form):
            label = f"{_where(form)}{mode}{how}"
            if isinstance(arguments, Refusal):
                yield replace(arguments, subject=label)
            else:
                yield Candidate(label, replace(base, **arguments), form)


def _where(form: Form) -> str:
    return "packed as TND, " if form.packs else ""


def _base_call(request: Request, form: Form, bias: Arguments) -> KernelCall:
    query, key, value = (TensorSpec(s, request.dtype) for s in request.shapes(form.layout))
    cu: Arguments = {}
    if form.packed:
        cu = {
            "actual_seq_qlen": tuple(accumulate(block.sizes[0] for block in form.blocks)),
            "actual_seq_kvlen": tuple(accumulate(block.sizes[1] for block in form.blocks)),
        }
    stats_dtype = torch.float64 if request.dtype == torch.float64 else torch.float32
    return KernelCall(
        query,
        key,
        value,
        head_num=request.num_heads,
        input_layout=form.layout,
        scale=request.scale,
        keep_prob=1.0 - request.dropout,
        sink=TensorSpec((request.num_heads,), stats_dtype) if request.sink else None,
        **cu,
        **bias,
    )


# -- masks ---------------------------------------------------------------------------------


def _compressed_arguments(
    request: Request, form: Form
) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield (label, arguments) for no mask and each mode with a compressed one, by price."""
    known = matrices(request)
    if known.per_head or not known.exact:
        return
    rows = {"inner_precise": 2} if form.has_empty_rows else {}
    yield "no mask", rows
    compressed = {"atten_mask": AttenMask.causal(), **rows}
    yield "mode 3", {**compressed, "sparse_mode": 3}
    yield "mode 2", {**compressed, "sparse_mode": 2}
    pre, next_ = _window(form)
    yield "mode 4", {**compressed, "sparse_mode": 4, "pre_tokens": pre, "next_tokens": next_}
    prefix = {"atten_mask": AttenMask.prefix(), "prefix": _prefix(form.blocks, form.targets)}
    yield "mode 6", {**prefix, "sparse_mode": 6, **rows}
    if form.packed:
        for mode in (7, 8):
            yield f"mode {mode}", {**compressed, "sparse_mode": mode, **_cut_window(form, mode)}


def _full_mask_arguments(request: Request, form: Form) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield (label, arguments) for the modes that read a mask of one entry per cell.

    The mask decides; a window (mode 0) or a prefix (mode 5) around it lets tiles be skipped.
    """
    full = _full_mask(request, form)
    if isinstance(full, Refusal):
        yield "modes 0, 1 and 5", full
        return
    given = {"atten_mask": full.mask, **({"inner_precise": 2} if full.may_be_empty else {})}
    bounds = [box for target in full.targets if (box := target.bounds) is not None]
    pre = max((-box.lo for box in bounds), default=0)
    next_ = max((box.hi for box in bounds), default=0)
    window = {"pre_tokens": max(pre, 0), "next_tokens": max(next_, 0)}
    whole = all(pre >= q - 1 and next_ >= kv - 1 for q, kv in (k.sizes for k in form.blocks))
    if whole:
        yield f"mode 1{full.told}", {**given, "sparse_mode": 1}
    yield f"mode 0{full.told}", {**given, **window}
    if not form.packed:
        prefix = _prefix_around(form.blocks, full.targets)
        yield f"mode 5{full.told}", {**given, "sparse_mode": 5, "prefix": prefix}
    if not whole:
        yield f"mode 1{full.told}", {**given, "sparse_mode": 1}


@dataclass(frozen=True)
class _FullMask:
    """A mask of one entry per cell, and the region that all of it lies in, block by block."""

    mask: AttenMask
    targets: tuple[Region, ...]
    may_be_empty: bool
    told: str = ""


def _window(form: Form) -> tuple[int, int]:
    """Return the (pre, next) that would make every target a band, were it one.

    A target whose bound is that of its whole rectangle does not care, as long as the window
    is wide enough; the others must agree, which the proof finds out.
    """
    pre: list[int] = []
    next_: list[int] = []
    wide_pre, wide_next = [0], [0]
    for (q_len, kv_len), target in form.distinct:
        bounds = target.bounds
        if bounds is None:
            continue
        at = kv_len - q_len
        (pre if bounds.lo > 1 - q_len else wide_pre).append(at - bounds.lo)
        (next_ if bounds.hi < kv_len - 1 else wide_next).append(bounds.hi - at)
    return (
        max(pre) if pre and max(pre) >= max(wide_pre) else UNBOUNDED,
        max(next_) if next_ and max(next_) >= max(wide_next) else UNBOUNDED,
    )


def _cut_window(form: Form, mode: int) -> Arguments:
    """Return the window of the sequence that modes 7 (the last) and 8 (the first) treat apart."""
    order = range(len(form.blocks))[:: -1 if mode == 7 else 1]
    own = next((k for k in order if form.blocks[k].sizes[0]), None)
    bounds = form.targets[own].bounds if own is not None else None
    if own is None or bounds is None:
        return {}
    q_len, kv_len = form.blocks[own].sizes
    return {"next_tokens": bounds.hi - (kv_len - q_len)}


def _prefix(blocks: Sequence[Block], targets: Sequence[Region]) -> tuple[int, ...]:
    """Read the prefix of each target off its first row."""
    lengths = []
    for block, target in zip(blocks, targets, strict=True):
        first = target.row(0)
        starts = first and first[0][0] == 0
        shortest = max(0, block.sizes[1] - block.sizes[0])
        lengths.append(max(first[0][1] if starts else 0, shortest))
    return tuple(lengths)


def _prefix_around(blocks: Sequence[Block], targets: Sequence[Region]) -> tuple[int, ...]:
    """Return the shortest prefix that holds what lies above the diagonal of each target."""
    found: dict[tuple[tuple[int, int], Region], int] = {}
    for block, target in zip(blocks, targets, strict=True):
        key = (block.sizes, target)
        if key not in found:
            above = (target - right_down_causal(*block.sizes)).bounds
            shortest = max(0, block.sizes[1] - block.sizes[0])
            found[key] = max(above.j1 if above is not None else 0, shortest)
    return tuple(found[block.sizes, target] for block, target in zip(blocks, targets, strict=True))


def _full_mask(request: Request, form: Form) -> _FullMask | Refusal:
    """Return the smallest full mask that holds every target, or why none does."""
    known = matrices(request)
    if not known.exact:
        return _opaque_mask(request, form, known)
    if known.per_head:
        return _mask_per_head(request, form, known)
    if not form.packed:
        sizes = form.blocks[0].sizes
        alike = len(set(form.targets)) == 1
        shape = sizes if alike else (len(form.blocks), 1, *sizes)
        mask = AttenMask.full(shape, form.targets[:1] if alike else form.targets)
        return _FullMask(mask, form.targets, form.has_empty_rows)
    q_len = max(block.sizes[0] for block in form.blocks)
    kv_len = max(block.sizes[1] for block in form.blocks)
    union = Region.union(set(form.targets))
    if any(union.cut((0, q), (0, kv)) != target for (q, kv), target in form.distinct):
        reason = "one [max q_len, max kv_len] mask serves all sequences, and theirs differ"
        return Refusal("mask-shared", reason)
    mask = AttenMask.full((q_len, kv_len), (union,))
    return _FullMask(mask, form.targets, form.has_empty_rows)


def _mask_per_head(request: Request, form: Form, known: Matrices) -> _FullMask | Refusal:
    if form.packed:
        reason = "heads have masks of their own; a packed call has one mask for all heads"
        return Refusal("mask-per-head", reason)
    batch = request.batch if any(len(set(p)) > 1 for p in known.planes) else 1
    regions = [known.regions(h)[b] for b in range(batch) for h in range(request.num_heads)]
    mask = AttenMask.full((batch, request.num_heads, request.q_len, request.kv_len), regions)
    empty = any(region.empty_rows(request.q_len) for region in set(regions))
    return _FullMask(mask, known.over_heads(), empty, ", a mask per head")


def opaque_shape(request: Request, form: Form) -> tuple[int, ...] | Refusal:
    """Return the shape of a full mask that is built from the mask's own cells, or why none is."""
    if form.packed and (len(form.blocks) > 1 or request.mask.heads is not None):
        return Refusal(
            "mask-opaque-packed",
            f"{request.mask!r} is no union of slices, and a packed call reads one mask for all "
            "sequences and heads; use a dense layout",
        )
    lengths = form.blocks[0].sizes
    batch, heads = request.mask.batches or 1, request.mask.heads or 1
    return lengths if batch == heads == 1 else (batch, heads, *lengths)


def _opaque_mask(request: Request, form: Form, known: Matrices) -> _FullMask | Refusal:
    """Describe the full mask that is built from the mask's own cells when the plan runs."""
    shape = opaque_shape(request, form)
    if isinstance(shape, Refusal):
        return shape
    # Which rows are empty is not known without looking: make the kernel handle any.
    return _FullMask(AttenMask.full(shape), known.over_heads(), True, ", a mask of unknown cells")
