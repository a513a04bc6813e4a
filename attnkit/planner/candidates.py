"""Every single kernel call that might compute a request: the search space, walked in full.

There are a few ways to hand the score matrices to the kernel: in the request's own layout, or
with the diagonal blocks of a dense layout packed into one TND call. Each is a launch whose call has
no mask yet. For each and each sparse mode the arguments follow from the target regions by
inspection (a window's ends from its bounds, a prefix from the first row). They are guesses:
proving them is not done here.

The candidates of one way come from the cheapest on, so that once one is proven the rest need
not be looked at. Masks of one entry per cell are apart: they are for requests that nothing
else computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.kernel import UNBOUNDED, AttenMask
from attnkit.kernel.modes import mode_region
from attnkit.kernel.sizes import LAYOUTS
from attnkit.planner.biases import Arguments, bias_arguments
from attnkit.planner.calls import Launch, bare_call, diagonal_blocks, tile_whole
from attnkit.planner.request import Request
from attnkit.planner.sequences import Block

__all__ = ["candidates", "is_in_order", "opaque_shape", "whole_calls"]

_MOST_CELLS = 1024


def whole_calls(request: Request) -> Iterator[Launch]:
    """Yield a bare call in the request's own layout, and of its diagonal blocks, packed.

    A layout that the kernel has never heard of is packed, too.
    """
    known = request.matrices
    whole = tile_whole(request.batch, request.sequences)
    layout = request.layout if request.layout in LAYOUTS else "TND"
    yield _bare(request, layout, whole, known.regions())
    if request.layout_of.packed or known.per_head or not known.exact:
        return
    chain: list[Block] = []
    inside: list[Region] = []
    for b, region in enumerate(known.regions()):
        own = diagonal_blocks(region, request.q_len, request.kv_len, b)
        chain += own
        inside += (_inside(region, block) for block in own)
    targets = tuple(inside)
    if len(chain) > request.batch:
        yield _bare(request, "TND", tuple(chain), targets)
    cells = tuple(cell for pair in zip(chain, targets, strict=True) for cell in _cells(*pair))
    if len(cells) > len(chain):
        yield _bare(request, "TND", *zip(*cells, strict=True))


def _inside(region: Region, block: Block) -> Region:
    """Return the cells of a region in a block, counted from its corner."""
    return region.cut(block.ends[:2], block.ends[2:]) if all(block.sizes) else Region.empty()


def _bare(
    request: Request, layout: str, blocks: tuple[Block, ...], targets: tuple[Region, ...]
) -> Launch:
    call, copied = bare_call(request, layout, blocks), 0
    if layout != request.layout and not is_in_order(request):  # moved there, and back
        cells = sum(prod(shape) for shape in request.shapes()) + prod(call.output.shape)
        copied = 2 * request.dtype.itemsize * cells
    return Launch("", call, blocks, targets, request.token_starts, copied_bytes=copied)


def is_in_order(request: Request) -> bool:
    """Whether the tokens of a dense layout lie in packed order already."""
    alone = request.batch == 1 and request.layout_of.pattern.startswith("s ")
    return request.layout in ("BSH", "BSND") or alone


def _cells(block: Block, target: Region) -> Iterator[tuple[Block, Region]]:
    """Yield a block, or if it is a band of width 1 its cells, which fit any window."""
    rows = block.sizes[0]
    few = target.area == rows and rows in range(2, _MOST_CELLS)
    if not few or target != Region.of(Slice(0, rows, 0, rows, 0, 0)):
        yield block, target
        return
    i0, _, j0, _ = block.ends
    for n in range(rows):
        at = (i0 + n, i0 + n + 1, j0 + n, j0 + n + 1)
        yield Block.at(block.batch, *at), Region.full(1, 1)


def candidates(request: Request, bare: Launch, full_masks: bool) -> Iterator[Launch | Refusal]:
    """Yield a bare call with every mask and bias, the cheapest first; refusals of what cannot be.

    With `full_masks`, those that read a mask of one entry per cell; without, all others.
    """
    where = "packed as TND, " if bare.packs(request) else ""
    if request.sink and any(q and not kv for q, kv in (k.sizes for k in bare.blocks)):
        reason = "the kernel leaves the sink out where a packed sequence has no keys"
        yield Refusal("sink-no-keys", reason, f"{where}any mode")
        return
    masks = _full_mask_arguments if full_masks else _compressed_arguments
    for how, bias in bias_arguments(request, bare.blocks, bare.call.is_packed):
        if isinstance(bias, Refusal):
            yield replace(bias, subject=f"{where}any mode{how}")
            continue
        for mode, arguments in masks(request, bare):
            label = f"{where}{mode}{how}"
            if isinstance(arguments, Refusal):
                yield replace(arguments, subject=label)
            else:
                yield replace(bare, label=label, call=replace(bare.call, **bias, **arguments))


# -- masks ---------------------------------------------------------------------------------


def _compressed_arguments(
    request: Request, bare: Launch
) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield (label, arguments) for no mask and each mode with a compressed one, by price."""
    known = request.matrices
    if known.per_head or not known.exact:
        return
    rows = {"inner_precise": 2} if bare.has_empty_rows else {}
    yield "no mask", rows
    compressed = {"atten_mask": AttenMask.causal(), **rows}
    yield "mode 3", {**compressed, "sparse_mode": 3}
    yield "mode 2", {**compressed, "sparse_mode": 2}
    pre, next_ = _window(bare)
    yield "mode 4", {**compressed, "sparse_mode": 4, "pre_tokens": pre, "next_tokens": next_}
    prefix = {"atten_mask": AttenMask.prefix(), "prefix": _prefix(bare)}
    yield "mode 6", {**prefix, "sparse_mode": 6, **rows}
    if bare.call.is_packed:
        for mode in (7, 8):
            yield f"mode {mode}", {**compressed, "sparse_mode": mode, **_cut_window(bare, mode)}


def _full_mask_arguments(
    request: Request, bare: Launch
) -> Iterator[tuple[str, Arguments | Refusal]]:
    """Yield (label, arguments) for the modes that read a mask of one entry per cell.

    The mask decides; a window (mode 0) or a prefix (mode 5) around it lets tiles be skipped.
    """
    full = _full_mask(request, bare)
    if isinstance(full, Refusal):
        yield "modes 0, 1 and 5", full
        return
    given = {"atten_mask": full.mask, **({"inner_precise": 2} if full.may_be_empty else {})}
    bounds = [box for target in full.targets if (box := target.bounds) is not None]
    pre = max((-box.lo for box in bounds), default=0)
    next_ = max((box.hi for box in bounds), default=0)
    window = {"pre_tokens": max(pre, 0), "next_tokens": max(next_, 0)}
    whole = all(pre >= q - 1 and next_ >= kv - 1 for q, kv in (k.sizes for k in bare.blocks))
    if whole:
        yield f"mode 1{full.told}", {**given, "sparse_mode": 1}
    yield f"mode 0{full.told}", {**given, **window}
    if not bare.call.is_packed:
        prefix = _prefix_around(bare, full.targets)
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


def _window(bare: Launch) -> tuple[int, int]:
    """Return the (pre, next) that would make every target a band, were it one.

    A target whose bound is that of its whole rectangle does not care, as long as the window
    is wide enough; the others must agree, which the proof finds out.
    """
    pre: list[int] = []
    next_: list[int] = []
    wide_pre, wide_next = [0], [0]
    for (q_len, kv_len), target in bare.distinct:
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


def _cut_window(bare: Launch, mode: int) -> Arguments:
    """Return the window of the sequence that modes 7 (the last) and 8 (the first) treat apart."""
    order = range(len(bare.blocks))[:: -1 if mode == 7 else 1]
    own = next((k for k in order if bare.blocks[k].sizes[0]), None)
    bounds = bare.targets[own].bounds if own is not None else None
    if own is None or bounds is None:
        return {}
    q_len, kv_len = bare.blocks[own].sizes
    return {"next_tokens": bounds.hi - (kv_len - q_len)}


def _prefix(bare: Launch) -> tuple[int, ...]:
    """Read the prefix of each target off its first row."""
    lengths = []
    for block, target in zip(bare.blocks, bare.targets, strict=True):
        first = target.row(0)
        starts = first and first[0][0] == 0
        shortest = max(0, block.sizes[1] - block.sizes[0])
        lengths.append(max(first[0][1] if starts else 0, shortest))
    return tuple(lengths)


def _prefix_around(bare: Launch, targets: tuple[Region, ...]) -> tuple[int, ...]:
    """Return the shortest prefix that holds what lies above the diagonal of each target."""
    found: dict[tuple[tuple[int, int], Region], int] = {}
    pairs = [(block.sizes, target) for block, target in zip(bare.blocks, targets, strict=True)]
    for sizes, target in set(pairs):
        above = (target - mode_region(3, (0, 0), *sizes)).bounds
        shortest = max(0, sizes[1] - sizes[0])
        found[sizes, target] = max(above.j1 if above is not None else 0, shortest)
    return tuple(found[pair] for pair in pairs)


def _full_mask(request: Request, bare: Launch) -> _FullMask | Refusal:
    """Return the smallest full mask that holds every target, or why none does."""
    known = request.matrices
    if not known.exact:
        unknown = opaque_shape(request, bare)
        if isinstance(unknown, Refusal):
            return unknown
        # Which rows are empty is not known without looking: make the kernel handle any.
        mask = replace(AttenMask.full(unknown), with_call=request.mask.comes_with_call)
        return _FullMask(mask, known.over_heads(), True, ", a mask of unknown cells")
    if known.per_head:
        return _mask_per_head(request, bare)
    if not bare.call.is_packed:
        sizes = bare.blocks[0].sizes
        alike = len(set(bare.targets)) == 1
        shape = sizes if alike else (len(bare.blocks), 1, *sizes)
        mask = AttenMask.full(shape, bare.targets[:1] if alike else bare.targets)
        return _FullMask(mask, bare.targets, bare.has_empty_rows)
    q_len = max(block.sizes[0] for block in bare.blocks)
    kv_len = max(block.sizes[1] for block in bare.blocks)
    union = Region.union(set(bare.targets))
    if any(union.cut((0, q), (0, kv)) != target for (q, kv), target in bare.distinct):
        reason = "one [max q_len, max kv_len] mask serves all sequences, and theirs differ"
        return Refusal("mask-shared", reason)
    mask = AttenMask.full((q_len, kv_len), (union,))
    return _FullMask(mask, bare.targets, bare.has_empty_rows)


def _mask_per_head(request: Request, bare: Launch) -> _FullMask | Refusal:
    if bare.call.is_packed:
        reason = "heads have different masks; a packed call has one mask for all heads"
        return Refusal("mask-per-head", reason)
    known = request.matrices
    batch = request.batch if any(len(set(p)) > 1 for p in known.planes) else 1
    regions = [known.regions(h)[b] for b in range(batch) for h in range(request.num_heads)]
    mask = AttenMask.full((batch, request.num_heads, request.q_len, request.kv_len), regions)
    empty = any(region.empty_rows(request.q_len) for region in set(regions))
    return _FullMask(mask, known.over_heads(), empty, ", a mask per head")


def opaque_shape(request: Request, bare: Launch) -> tuple[int, ...] | Refusal:
    """Return the shape of a full mask that is built from the mask's own cells, or why none is."""
    if bare.call.is_packed and (len(bare.blocks) > 1 or request.mask.heads is not None):
        return Refusal(
            "mask-opaque-packed",
            f"{request.mask!r} is not a union of slices, and a packed call reads one mask for all "
            "sequences and heads; use a dense layout",
        )
    lengths = bare.blocks[0].sizes
    batch, heads = request.mask.batches or 1, request.mask.heads or 1
    return lengths if batch == heads == 1 else (batch, heads, *lengths)
