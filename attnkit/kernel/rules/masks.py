"""Rules about sparse modes and mask tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attnkit.geometry import Region
from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.call import KernelCall
from attnkit.kernel.legality import Found, Target, rule
from attnkit.kernel.modes import MASK_DECIDES, window

__all__: list[str] = []


@rule(
    layer="torch",
    remedy="Choose another mode; the band of a cut sequence is modes 7 and 8 of TND.",
    structural=True,
)
def sparse_mode_range(call: KernelCall, on: Target) -> Found:
    """Sparse modes are 0 to 6 in dense layouts, 0 to 4 or 6 to 8 in TND (spelled in capitals)."""
    # The range is checked before the layout is put into capitals, so "tnd" counts as dense.
    spelled = call.input_layout == "TND"
    allowed = (0, 1, 2, 3, 4, 6, 7, 8) if spelled else range(7)
    if call.sparse_mode not in allowed or (call.is_packed and call.sparse_mode == 5):
        yield f"sparse_mode={call.sparse_mode} in layout {call.input_layout}"


@rule(
    layer="silent",
    source="tiling",
    remedy="Pass the 2048 x 2048 mask (3072 x 2048 in mode 6), or say sparse_mode=0.",
)
def mode_without_mask(call: KernelCall, on: Target) -> Found:
    """Without atten_mask every mode computes full attention."""
    if call.atten_mask is None and call.sparse_mode >= 2:
        yield f"sparse_mode={call.sparse_mode} without atten_mask"


@rule(
    layer="silent",
    source="tiling",
    remedy="Use sparse_mode=4 and the 2048 x 2048 mask, or leave the window at its defaults.",
)
def window_without_mask(call: KernelCall, on: Target) -> Found:
    """Without atten_mask pre_tokens and next_tokens are ignored."""
    if call.atten_mask is not None or call.sparse_mode != 0:
        return
    pre, next_ = call.pre_tokens, call.next_tokens
    if any(q and kv and (pre < q - 1 or next_ < kv - 1) for q, kv in call.sequences):
        yield f"pre_tokens={pre}, next_tokens={next_} without atten_mask"


@rule(
    layer="tiling", remedy="Pass a boolean mask; additive terms belong into pse.", type_error=True
)
def mask_dtype(call: KernelCall, on: Target) -> Found:
    """A mask is bool or uint8, 1 = masked; there are no additive masks."""
    mask = call.atten_mask
    if mask is not None and mask.dtype not in (torch.bool, torch.uint8):
        yield f"atten_mask has dtype {str(mask.dtype).removeprefix('torch.')}"


def _drawn(call: KernelCall) -> AttenMask | None:
    """The mask with an entry per cell, in the modes in which it decides."""
    return call.atten_mask if call.sparse_mode in MASK_DECIDES else None


def _leads(call: KernelCall) -> list[tuple[int, ...]]:
    """The leading axes that a mask may have."""
    return [(call.batch, call.num_heads), (call.batch, 1), (1, 1), ()]


@rule(layer="tiling", remedy="Expand the mask to one of these shapes.")
def mask_shape(call: KernelCall, on: Target) -> Found:
    """In modes 0, 1 and 5 a mask has one entry per cell.

    Only [B, 1, Sq, Skv], [1, 1, Sq, Skv] and [Sq, Skv] are broadcast; TND: [max Sq, max Skv].
    """
    mask, cells = _drawn(call), (call.q_len, call.kv_len)
    if mask is None:
        return
    shapes = [(*lead, *cells) for lead in _leads(call)]
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    if call.is_packed:
        # Four axes and total lengths pass the tiling; silent rules tell them.
        shapes.append(call.total_lengths)
        wanted = f"{list(cells)}, the longest lengths"
    if mask.shape not in shapes:
        yield f"atten_mask has shape {list(mask.shape)}, wanted {wanted}"


@rule(layer="tiling", remedy="Pass AttenMask.causal().build() or AttenMask.prefix().build().")
def mask_compressed_shape(call: KernelCall, on: Target) -> Found:
    """Modes 2, 3, 4, 7 and 8 read a [2048, 2048] mask, mode 6 a [3072, 2048] one.

    It has leading axes only where Sq and Skv are these sizes.
    """
    mask, compressed = call.atten_mask, call.compressed_mask
    if mask is None or compressed is None:
        return
    # A mask of four axes has one entry per cell, so it fits where the sizes happen to be these.
    leads = _leads(call) if (call.q_len, call.kv_len) == compressed.shape else [()]
    if mask.shape not in [(*lead, *compressed.shape) for lead in leads]:
        yield f"atten_mask has shape {list(mask.shape)} in sparse_mode={call.sparse_mode}"


@rule(
    layer="silent",
    remedy="Pass the mask that attnkit builds: True above the diagonal, True = masked.",
)
def mask_content(call: KernelCall, on: Target) -> Found:
    """Modes 2, 3, 4, 7 and 8 read triu(ones(2048, 2048), 1), and mode 6 its extension.

    Other content gives another set of cells.
    """
    mask, compressed = call.atten_mask, call.compressed_mask
    if mask is None or compressed is None:
        return
    good = on.mask.is_canonical
    if good is None and not mask.is_opaque and mask.shape[-2:] == compressed.shape:
        good = mask.kind == compressed.kind or mask.allowed() == compressed.allowed()
    if good is False:
        yield f"atten_mask does not hold what sparse_mode={call.sparse_mode} reads"


@rule(layer="documented", remedy="Compare it to make it boolean: True where masked.")
def mask_values(call: KernelCall, on: Target) -> Found:
    """A mask holds 0 (takes part) and 1 (masked)."""
    if on.mask.is_binary is False:
        yield "atten_mask holds values other than 0 and 1"


def _known_content(call: KernelCall) -> Iterator[tuple[Region, tuple[int, int]]]:
    """The cells that a full mask allows, where they are known, per head and score matrix."""
    mask = _drawn(call)
    if mask is None or mask.is_opaque:
        return
    heads = mask.shape[1] if len(mask.shape) == 4 and mask.shape[1] == call.num_heads else 1
    for head in range(heads):
        yield from zip(call.regions(head), call.sequences, strict=True)


@rule(
    layer="silent",
    remedy="Leave pre_tokens and next_tokens at their defaults, or mask those cells.",
)
def mask_outside_window(call: KernelCall, on: Target) -> Found:
    """In mode 0 the mask must lie inside the window: the mask decides, the window skips tiles."""
    if call.sparse_mode != 0 or call.atten_mask is None:
        return
    outside, ends = on.mask.cells_outside_window, (call.pre_tokens, call.next_tokens)
    if outside is None:
        content = set(_known_content(call))
        outside = sum((region - window(*sizes, *ends)).area for region, sizes in content)
    if outside:
        told = "pre_tokens={}, next_tokens={}".format(*ends)
        yield f"atten_mask allows {outside} cells outside the window {told}"


def _rows_without_a_key(call: KernelCall, on: Target) -> Found:
    """How many query rows a full mask leaves without a key, if it does."""
    count = on.mask.empty_rows
    if _drawn(call) is None:
        return
    if count is None:
        pairs = ((region.empty_rows(s[0]), s) for region, s in _known_content(call))
        count = sum(stop - start for rows, s in pairs if s[1] for start, stop in rows)
    if count:
        yield f"atten_mask leaves {count} query rows without a key"


@rule(
    layer="silent",
    source="reference",
    remedy="Let every row see a key, or drop those rows from the packed batch.",
)
def rows_masked_packed(call: KernelCall, on: Target) -> Found:
    """Rows without a key are not supported in TND."""
    if call.is_packed:
        yield from _rows_without_a_key(call, on)


@rule(layer="silent", remedy="Pass inner_precise=2.")
def rows_averaged(call: KernelCall, on: Target) -> Found:
    """A row without a key returns the mean of V unless inner_precise=2 makes it 0."""
    if not call.is_packed and call.empty_row_output == "mean":
        yield from _rows_without_a_key(call, on)


@rule(layer="silent", source="tiling", remedy="Cut the mask to the longest sequence.")
def mask_total_lengths(call: KernelCall, on: Target) -> Found:
    """A TND mask has the longest lengths, [max Sq, max Skv].

    One of the total lengths is accepted, read elsewhere, and has made gradients overflow.
    """
    mask, longest = _drawn(call), (call.q_len, call.kv_len)
    if call.is_packed and mask is not None and mask.shape == call.total_lengths != longest:
        yield f"atten_mask has shape {list(mask.shape)}, the total lengths"


@rule(layer="silent", source="tiling", remedy="Pass [max Sq, max Skv].")
def mask_4d_packed(call: KernelCall, on: Target) -> Found:
    """A TND mask has two axes.

    One with four, [1|B, 1|N, max Sq, max Skv], is accepted and read as if it were packed.
    """
    mask = _drawn(call)
    if call.is_packed and mask is not None and len(mask.shape) == 4:
        yield f"atten_mask has shape {list(mask.shape)} in layout TND"


@rule(
    layer="tiling",
    remedy="Expand the mask over the batch, or use mode 6, which needs no full mask.",
)
def mode_5_mask(call: KernelCall, on: Target) -> Found:
    """Mode 5 wants a mask per batch element, [B, N, Sq, Skv] or [B, 1, Sq, Skv].

    Not where B = 1 or its prefix is out of order.
    """
    mask = call.atten_mask
    if mask is None or call.sparse_mode != 5 or call.batch == 1 or call.prefix_fault:
        return
    if len(mask.shape) != 4 or mask.shape[0] != call.batch:
        yield f"atten_mask has shape {list(mask.shape)} in a batch of {call.batch}"
