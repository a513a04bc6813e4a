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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import UNBOUNDED, AttenMask, KernelCall, TensorSpec
from attnkit.kernel.sizes import LAYOUTS
from attnkit.planner.blocks import Block, diagonal_blocks, tile_whole
from attnkit.planner.matrices import Matrices, matrices
from attnkit.planner.request import BiasTerm, Request

__all__ = ["Candidate", "Form", "candidates", "forms"]

Arguments = dict[str, Any]


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
    level: int | None = None
    """The row of a bias's table that every cell of the call adds, at the merge (see `routes`)."""

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
    if len(chain) > request.batch:
        targets = tuple(known.regions()[k.batch].cut((k.i0, k.i1), (k.j0, k.j1)) for k in chain)
        yield Form("TND", tuple(chain), targets, packs=True)


def candidates(request: Request, form: Form, full_masks: bool) -> Iterator[Candidate | Refusal]:
    """Yield the candidates of one form, the cheapest first; refusals for what cannot apply.

    With `full_masks`, those that read a mask of one entry per cell; without, all others.
    """
    if request.sink and any(q and not kv for q, kv in (k.sizes for k in form.blocks)):
        reason = "the kernel leaves the sink out where a packed sequence has no keys"
        yield Refusal("sink-no-keys", reason, f"{_where(form)}any mode")
        return
    masks = _full_mask_arguments if full_masks else _compressed_arguments
    for how, bias in _bias_arguments(request, form):
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
    pre, next_ = _window(form, bottom_right=True)
    yield "mode 4", {**compressed, "sparse_mode": 4, "pre_tokens": pre, "next_tokens": next_}
    prefix = {"atten_mask": AttenMask.prefix(), "prefix": _prefix(form)}
    yield "mode 6", {**prefix, "sparse_mode": 6, **rows}


def _full_mask_arguments(request: Request, form: Form) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield (label, arguments) for the modes that read a mask of one entry per cell."""
    known = matrices(request)
    if not known.exact:
        yield from _opaque_arguments(request, form)
        return
    if known.per_head:
        yield from _per_head_arguments(request, form, known)
        return
    full = _full_mask(form)
    if full is None:
        reason = "one [max q_len, max kv_len] mask serves all sequences, and theirs differ"
        yield "modes 0 and 1", Refusal("mask-shared", reason)
        return
    rows = {"inner_precise": 2} if form.has_empty_rows else {}
    pre, next_ = _window(form, bottom_right=False)
    yield "mode 0", {"atten_mask": full, "pre_tokens": pre, "next_tokens": next_, **rows}
    yield "mode 1", {"atten_mask": full, "sparse_mode": 1, **rows}


def _window(form: Form, bottom_right: bool) -> tuple[int, int]:
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
        at = kv_len - q_len if bottom_right else 0
        (pre if bounds.lo > 1 - q_len else wide_pre).append(at - bounds.lo)
        (next_ if bounds.hi < kv_len - 1 else wide_next).append(bounds.hi - at)
    return (
        max(pre) if pre and max(pre) >= max(wide_pre) else UNBOUNDED,
        max(next_) if next_ and max(next_) >= max(wide_next) else UNBOUNDED,
    )


def _prefix(form: Form) -> tuple[int, ...]:
    """Read the prefix of each target off its first row."""
    lengths = []
    for block, target in zip(form.blocks, form.targets, strict=True):
        first = target.row(0)
        starts = first and first[0][0] == 0
        shortest = max(0, block.sizes[1] - block.sizes[0])
        lengths.append(max(first[0][1] if starts else 0, shortest))
    return tuple(lengths)


def _full_mask(form: Form) -> AttenMask | None:
    """Return the smallest full mask that holds every target; None where one cannot."""
    if not form.packed:
        sizes = form.blocks[0].sizes
        if len(set(form.targets)) == 1:
            return AttenMask.full(sizes, form.targets[:1])
        return AttenMask.full((len(form.blocks), 1, *sizes), form.targets)
    q_len = max(block.sizes[0] for block in form.blocks)
    kv_len = max(block.sizes[1] for block in form.blocks)
    union = Region.union(set(form.targets))
    for (rows, keys), target in form.distinct:
        if union.cut((0, rows), (0, keys)) != target:
            return None
    return AttenMask.full((q_len, kv_len), (union,))


def _per_head_arguments(
    request: Request, form: Form, known: Matrices
) -> Iterator[tuple[str, Arguments | Refusal]]:
    if form.packed:
        reason = "heads have masks of their own; a packed call has one mask for all heads"
        yield "any mode", Refusal("mask-per-head", reason)
        return
    batch = request.batch if any(len(set(p)) > 1 for p in known.planes) else 1
    regions = [known.regions(h)[b] for b in range(batch) for h in range(request.num_heads)]
    shape = (batch, request.num_heads, request.q_len, request.kv_len)
    empty = any(region.empty_rows(request.q_len) for region in set(regions))
    rows = {"inner_precise": 2} if empty else {}
    full = AttenMask.full(shape, regions)
    yield "mode 1, a mask per head", {"atten_mask": full, "sparse_mode": 1, **rows}


def _opaque_arguments(request: Request, form: Form) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield the full mask built from the mask's own cells when the plan runs."""
    if form.packed and (len(form.blocks) > 1 or request.mask.heads is not None):
        reason = (
            f"{request.mask!r} is no union of slices, and a packed call reads one mask for all "
            "sequences and heads; use a dense layout"
        )
        yield "mode 1", Refusal("mask-opaque-packed", reason)
        return
    lengths = form.blocks[0].sizes
    batch, heads = request.mask.batches or 1, request.mask.heads or 1
    shape = lengths if batch == heads == 1 else (batch, heads, *lengths)
    # Which rows are empty is not known without looking: make the kernel handle any.
    yield (
        "mode 1, a mask of unknown cells",
        {"atten_mask": AttenMask.full(shape), "sparse_mode": 1, "inner_precise": 2},
    )


# -- biases --------------------------------------------------------------------------------


def _bias_arguments(request: Request, form: Form) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield the ways in which the kernel might add the bias: by slopes, and as a matrix."""
    if not request.bias:
        yield "", {}
        return
    if len(request.bias) == 1 and request.bias[0].sloped:
        yield ", slopes", _slope_arguments(request, form, request.bias[0])
    yield ", bias matrix", _matrix_arguments(request, form)


def _slope_arguments(request: Request, form: Form, term: BiasTerm) -> Arguments | Refusal:
    """Types 2 and 3: the kernel computes the distance itself, from each block's upper left."""
    shifts = set()
    for block in form.blocks:
        q_len, kv_len = request.sequences[block.batch]
        at = kv_len - q_len if term.align == "bottom_right" else 0
        if block.sizes[0] and block.sizes[1]:
            shifts.add(block.i0 + at - block.j0)
    if len(shifts) > 1:
        return Refusal(
            "alibi-anchor",
            f"{term.text} needs start indices that differ between sequences ({sorted(shifts)}); "
            "the kernel takes one pair",
        )
    shift = shifts.pop() if shifts else 0
    start = {"q_start_idx": (max(shift, 0),), "kv_start_idx": (max(-shift, 0),)} if shift else {}
    spec = TensorSpec((request.num_heads,), torch.float32)
    if request.dtype == torch.float64:
        spec = TensorSpec((request.num_heads,), torch.float64)
    return {"pse": spec, "pse_type": 2 if term.power == 1.0 else 3, **start}


def _matrix_arguments(request: Request, form: Form) -> Arguments | Refusal:
    """Types 0 and 1: a matrix in the query's dtype."""
    wide = request.dtype in (torch.float32, torch.float64)
    exact = len(request.bias) == 1 and request.bias[0].dtype == request.dtype
    if not (wide or exact):
        return Refusal(
            "pse-precision",
            f"the kernel reads a bias matrix in the query's dtype, {request.dtype}, which would "
            f"round {' + '.join(term.text for term in request.bias)}; give one bias of that dtype",
        )
    if form.packed:
        reason = "a packed call takes slopes or a compressed bias, no full matrix"
        return Refusal("pse-packed", reason)
    sides = {term.before_scale for term in request.bias}
    shape = (_bias_batch(request), request.num_heads, request.q_len, request.kv_len)
    before = sides == {True}
    return {"pse": TensorSpec(shape, request.dtype), "pse_type": 1 if before else 0}


def _bias_batch(request: Request) -> int:
    batches = [term.batch for term in request.bias if term.batch is not None]
    return batches[0] if batches else 1
