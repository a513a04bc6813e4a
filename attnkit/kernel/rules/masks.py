"""Rules about sparse modes, windows, prefixes and mask tensors.

Sources: the sparse checks of CANN flash_attention_score's tiling (dense, varlen, grad),
op-plugin's checks, and the kernels' mask addressing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from attnkit.errors import shown
from attnkit.geometry import Region
from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.modes import COMPRESSED_MODES, MASK_DECIDES, window
from attnkit.kernel.rules.rule import Rule, Target

if TYPE_CHECKING:
    from attnkit.kernel.call import KernelCall

__all__ = ["MASK_RULES"]


def _mode_range(call: KernelCall, on: Target) -> str | None:
    # The range is checked before the layout is put into capitals, so "tnd" counts as dense.
    packed = call.input_layout == "TND"
    allowed = (0, 1, 2, 3, 4, 6, 7, 8) if packed else tuple(range(7))
    if call.is_packed and not packed:
        allowed = tuple(m for m in allowed if m != 5)
    if call.sparse_mode in allowed:
        return None
    return f"sparse_mode={call.sparse_mode} in layout {call.input_layout}"


def _mode_without_mask(call: KernelCall, on: Target) -> str | None:
    if call.atten_mask is not None or call.sparse_mode < 2:
        return None
    return f"sparse_mode={call.sparse_mode} without atten_mask"


def _window_without_mask(call: KernelCall, on: Target) -> str | None:
    if call.atten_mask is not None or call.sparse_mode != 0:
        return None
    pre, next_ = call.pre_tokens, call.next_tokens
    if all(window(*s, pre, next_) == Region.full(*s) for s in set(call.sequences)):
        return None
    return f"pre_tokens={pre}, next_tokens={next_} without atten_mask"


def _mask_dtype(call: KernelCall, on: Target) -> str | None:
    mask = call.atten_mask
    if mask is None or mask.dtype in (torch.bool, torch.uint8):
        return None
    return f"atten_mask has dtype {str(mask.dtype).removeprefix('torch.')}"


def _mask_shape(call: KernelCall, on: Target) -> str | None:
    mask = call.atten_mask
    if mask is None or call.sparse_mode not in MASK_DECIDES:
        return None
    q_len, kv_len = call.q_len, call.kv_len
    totals = tuple(map(sum, zip(*call.sequences, strict=True)))
    leads = [*_leads(call), ()]
    fits = mask.shape in [(*lead, q_len, kv_len) for lead in leads]
    wanted = " or ".join(str([*lead, q_len, kv_len]) for lead in leads)
    if call.is_packed:
        # Four axes and total lengths pass the tiling, and have silent rules of their own.
        fits |= mask.shape == totals
        wanted = f"[{q_len}, {kv_len}], the longest lengths"
    return None if fits else f"atten_mask has shape {list(mask.shape)}, wanted {wanted}"


def _leads(call: KernelCall) -> list[tuple[int, int]]:
    """The leading axes that a mask of four may have."""
    return [(call.batch, call.num_heads), (call.batch, 1), (1, 1)]


def _compressed_shape(call: KernelCall, on: Target) -> str | None:
    mask = call.atten_mask
    if mask is None or call.sparse_mode not in COMPRESSED_MODES:
        return None
    wanted = (AttenMask.prefix() if call.sparse_mode == 6 else AttenMask.causal()).shape
    # A mask of four axes has one entry per cell, so it fits where the sizes happen to be these.
    leads = [*_leads(call), ()] if (call.q_len, call.kv_len) == wanted else [()]
    if mask.shape in [(*lead, *wanted) for lead in leads]:
        return None
    return f"atten_mask has shape {list(mask.shape)} in sparse_mode={call.sparse_mode}"


def _is_canonical(call: KernelCall, on: Target) -> bool | None:
    mask = call.atten_mask
    if mask is None or call.sparse_mode not in COMPRESSED_MODES:
        return None
    if on.mask.is_canonical is not None or mask.is_opaque:
        return on.mask.is_canonical
    wanted = AttenMask.prefix() if call.sparse_mode == 6 else AttenMask.causal()
    if len(mask.shape) < 2 or mask.shape[-2:] != wanted.shape:
        return None
    return mask.allowed() == wanted.allowed()


def _mask_content(call: KernelCall, on: Target) -> str | None:
    if _is_canonical(call, on) is not False:
        return None
    return f"atten_mask does not hold what sparse_mode={call.sparse_mode} reads"


def _mask_values(call: KernelCall, on: Target) -> str | None:
    return "atten_mask holds values other than 0 and 1" if on.mask.is_binary is False else None


def _blocks(call: KernelCall) -> Iterator[tuple[Region, tuple[int, int]]]:
    """The known content of a full mask, per head and score matrix."""
    mask = call.atten_mask
    if mask is None or mask.is_opaque or call.sparse_mode not in MASK_DECIDES:
        return
    heads = mask.shape[1] if len(mask.shape) == 4 and mask.shape[1] == call.num_heads else 1
    for head in range(heads):
        yield from zip(call.regions(head), call.sequences, strict=True)


def _outside_window(call: KernelCall, on: Target) -> str | None:
    if call.sparse_mode != 0 or call.atten_mask is None:
        return None
    outside = on.mask.cells_outside_window
    pre, next_ = call.pre_tokens, call.next_tokens
    if outside is None:
        outside = sum((region - window(*s, pre, next_)).area for region, s in set(_blocks(call)))
    if not outside:
        return None
    return (
        f"atten_mask allows {outside} cells outside the window pre_tokens={pre}, "
        f"next_tokens={next_}"
    )


def _empty_rows(call: KernelCall, on: Target) -> int:
    if call.atten_mask is None or call.sparse_mode not in MASK_DECIDES:
        return 0
    if on.mask.empty_rows is not None:
        return on.mask.empty_rows
    pairs = ((region.empty_rows(s[0]), s) for region, s in _blocks(call))
    return sum(stop - start for rows, s in pairs if s[1] for start, stop in rows)


def _rows_packed(call: KernelCall, on: Target) -> str | None:
    count = _empty_rows(call, on) if call.is_packed else 0
    return f"atten_mask leaves {count} query rows without a key" if count else None


def _rows_averaged(call: KernelCall, on: Target) -> str | None:
    if call.is_packed or call.empty_row_output == "zero":
        return None
    count = _empty_rows(call, on)
    return f"atten_mask leaves {count} query rows without a key" if count else None


def _mask_total(call: KernelCall, on: Target) -> str | None:
    mask = call.atten_mask
    if mask is None or not call.is_packed or call.sparse_mode not in MASK_DECIDES:
        return None
    totals = tuple(map(sum, zip(*call.sequences, strict=True)))
    if mask.shape != totals or mask.shape == (call.q_len, call.kv_len):
        return None
    return f"atten_mask has shape {list(mask.shape)}, the total lengths"


def _mask_4d_packed(call: KernelCall, on: Target) -> str | None:
    mask = call.atten_mask
    if mask is None or not call.is_packed or len(mask.shape) != 4:
        return None
    if call.sparse_mode not in MASK_DECIDES:
        return None
    return f"atten_mask has shape {list(mask.shape)} in layout TND"


def _mode_5_mask(call: KernelCall, on: Target) -> str | None:
    mask = call.atten_mask
    if mask is None or call.sparse_mode != 5 or call.batch == 1 or call.prefix_fault:
        return None
    if len(mask.shape) == 4 and mask.shape[0] == call.batch:
        return None
    return f"atten_mask has shape {list(mask.shape)} in a batch of {call.batch}"


# -- windows -----------------------------------------------------------------------------


def _window_dense(call: KernelCall, on: Target) -> str | None:
    if call.is_packed or call.atten_mask is None or call.sparse_mode not in (0, 4):
        return None
    pre, next_ = call.top_left_tokens
    q_len, kv_len = call.q_len, call.kv_len
    bad = pre < 0 and (next_ < -pre or -pre >= kv_len)
    bad |= next_ < 0 and (-next_ > pre or -next_ >= q_len)
    if not bad:
        return None
    given = f"pre_tokens={call.pre_tokens}, next_tokens={call.next_tokens}"
    return f"{given} at {q_len} x {kv_len}, anchored top-left pre={pre}, next={next_}"


def _worst(call: KernelCall, pre: int, next_: int) -> tuple[int, int] | None:
    """The first packed sequence whose first or last row the window leaves without a key."""
    return next((s for s in call.sequences if all(s) and s[0] - next_ > s[1]), None)


def _window_packed(call: KernelCall, on: Target) -> str | None:
    if not call.is_packed or call.atten_mask is None or call.sparse_mode not in (0, 3, 4):
        return None
    pre, next_ = call.pre_tokens, call.next_tokens
    given = f"sparse_mode={call.sparse_mode}, pre_tokens={pre}, next_tokens={next_}"
    found = None
    if call.sparse_mode == 0:
        if next_ < 0 or (pre < 0 and next_ < -pre):
            return given
        found = next((s for s in call.sequences if all(s) and s[1] + pre < s[0]), None)
    elif call.sparse_mode == 3:
        found = next((s for s in call.sequences if s[0] > s[1]), None)
    else:
        if pre < 0 or (next_ < 0 and pre + next_ < 0):
            return given
        found = _worst(call, pre, next_)
    return f"{given} with a sequence of {found[0]} queries, {found[1]} keys" if found else None


def _window_cut(call: KernelCall, on: Target) -> str | None:
    mode, b = call.effective_mode, call.band_index
    if mode not in (7, 8) or not call.is_packed or b is None:
        return None
    pre, next_ = call.pre_tokens, call.next_tokens
    q_len, kv_len = call.sequences[b]
    given = f"pre_tokens={pre}, next_tokens={next_} for the cut sequence {q_len} x {kv_len}"
    if pre < kv_len or (mode == 7 and next_ > 0):
        return given
    # Mode 7 skips sequences without keys, the cut one as well.
    if q_len - next_ > kv_len and (mode == 8 or kv_len):
        return given
    others = [s for n, s in enumerate(call.sequences) if n != b and all(s)]
    longer = next((s for s in others if s[0] > s[1]), None)
    if mode == 7 and longer:
        return f"a sequence of {longer[0]} queries and {longer[1]} keys in sparse_mode=7"
    return None


def _window_backward(call: KernelCall, on: Target) -> str | None:
    if not on.training or call.atten_mask is None:
        return None
    mode, pre, next_ = call.sparse_mode, call.pre_tokens, call.next_tokens
    given = f"pre_tokens={pre}, next_tokens={next_} in a call that is trained"
    if call.is_packed:
        if mode in (0, 4, 7, 8) and pre + next_ <= 0:
            return given
        sequences = call.sequences if mode in (0, 4) else ()
        for q_len, kv_len in sequences:
            back, ahead = (kv_len, q_len) if mode == 0 else (q_len, kv_len)
            if -pre > back or -next_ > ahead:
                return f"{given}, with a sequence of {q_len} queries, {kv_len} keys"
    elif mode in (0, 4):
        back, ahead = call.top_left_tokens
        if -back > call.kv_len or -ahead > call.q_len or back + ahead < 0:
            return given
    return None


# -- prefixes ----------------------------------------------------------------------------


def _prefix_count(call: KernelCall, on: Target) -> str | None:
    return _wrong_count(call) if call.effective_mode == 6 else None


def _prefix_count_5(call: KernelCall, on: Target) -> str | None:
    return _wrong_count(call) if call.effective_mode == 5 else None


def _wrong_count(call: KernelCall) -> str | None:
    return call.prefix_fault if len(call.prefix or ()) != call.batch else None


def _prefix_range(call: KernelCall, on: Target) -> str | None:
    return _outside(call) if call.effective_mode == 6 else None


def _prefix_range_5(call: KernelCall, on: Target) -> str | None:
    return _outside(call) if call.effective_mode == 5 else None


def _outside(call: KernelCall) -> str | None:
    return None if _wrong_count(call) else call.prefix_fault


def _prefix_unused(call: KernelCall, on: Target) -> str | None:
    if not call.prefix or call.sparse_mode in (5, 6):
        return None
    return f"prefix={shown(call.prefix)} in sparse_mode={call.sparse_mode}"


def _prefix_batch(call: KernelCall, on: Target) -> str | None:
    if call.effective_mode not in (5, 6) or call.batch <= 32:
        return None
    return f"{call.batch} score matrices in sparse_mode={call.sparse_mode}"


MASK_RULES: tuple[Rule, ...] = (
    Rule(
        "sparse-mode-range",
        "torch",
        "sparse_mode is 0 to 6 in dense layouts, 0 to 4 or 6 to 8 in TND (spelled in capitals)",
        "Choose another mode; the band of a cut sequence is modes 7 and 8 of TND.",
        _mode_range,
        structural=True,
    ),
    Rule(
        "mode-without-mask",
        "silent",
        "without atten_mask every mode computes full attention",
        "Pass the 2048 x 2048 mask (3072 x 2048 in mode 6), or say sparse_mode=0.",
        _mode_without_mask,
    ),
    Rule(
        "window-without-mask",
        "silent",
        "without atten_mask pre_tokens and next_tokens are ignored",
        "Use sparse_mode=4 and the 2048 x 2048 mask, or leave the window at its defaults.",
        _window_without_mask,
    ),
    Rule(
        "mask-dtype",
        "tiling",
        "atten_mask is bool or uint8, 1 = masked; there are no additive masks",
        "Pass a boolean mask; additive terms belong into pse.",
        _mask_dtype,
        type_error=True,
    ),
    Rule(
        "mask-shape",
        "tiling",
        "in modes 0, 1 and 5 the mask has one entry per cell and is not broadcast but from "
        "[B, 1, Sq, Skv], [1, 1, Sq, Skv] and [Sq, Skv]; TND: [max Sq, max Skv]",
        "Expand the mask to one of these shapes.",
        _mask_shape,
    ),
    Rule(
        "mask-compressed-shape",
        "tiling",
        "modes 2, 3, 4, 7 and 8 read a [2048, 2048] mask, mode 6 a [3072, 2048] one; with leading "
        "axes only where Sq and Skv are these sizes",
        "Pass AttenMask.causal().build() or AttenMask.prefix().build().",
        _compressed_shape,
    ),
    Rule(
        "mask-content",
        "silent",
        "modes 2, 3, 4, 7 and 8 read triu(ones(2048, 2048), 1), and mode 6 its extension; other "
        "content gives another set of cells",
        "Pass the mask that attnkit builds: True above the diagonal, True = masked.",
        _mask_content,
    ),
    Rule(
        "mask-values",
        "documented",
        "atten_mask holds 0 (takes part) and 1 (masked)",
        "Compare it to make it boolean: True where masked.",
        _mask_values,
    ),
    Rule(
        "mask-outside-window",
        "silent",
        "in mode 0 the mask decides and the window only skips tiles, so the mask must lie inside "
        "the window",
        "Leave pre_tokens and next_tokens at their defaults, or mask those cells.",
        _outside_window,
    ),
    Rule(
        "rows-masked-packed",
        "silent",
        "rows without a key are not supported in TND",
        "Let every row see a key, or drop those rows from the packed batch.",
        _rows_packed,
    ),
    Rule(
        "rows-averaged",
        "silent",
        "a row without a key returns the mean of V unless inner_precise=2 makes it 0",
        "Pass inner_precise=2.",
        _rows_averaged,
    ),
    Rule(
        "mask-total-lengths",
        "silent",
        "a TND mask has the longest lengths, [max Sq, max Skv]; one of the total lengths is "
        "accepted, read elsewhere, and has made gradients overflow",
        "Cut the mask to the longest sequence.",
        _mask_total,
    ),
    Rule(
        "mask-4d-packed",
        "silent",
        "a TND mask has two axes; one with four, [1|B, 1|N, max Sq, max Skv], is accepted and read "
        "as if it were packed",
        "Pass [max Sq, max Skv].",
        _mask_4d_packed,
    ),
    Rule(
        "mode-5-mask",
        "tiling",
        "mode 5 wants a mask per batch element, [B, N, Sq, Skv] or [B, 1, Sq, Skv], unless B = 1 "
        "or its prefix is out of order",
        "Expand the mask over the batch, or use mode 6, which needs no full mask.",
        _mode_5_mask,
    ),
    Rule(
        "window-dense",
        "tiling",
        "a dense window must meet the score matrix: anchored top-left not (pre < 0 and next < 0), "
        "pre < 0 needs next >= |pre| and |pre| < Skv, next < 0 needs |next| <= pre and |next| < Sq",
        "Widen the window. Mode 4 is converted by pre + Sq - Skv, next + Skv - Sq.",
        _window_dense,
    ),
    Rule(
        "window-packed",
        "tiling",
        "TND: mode 0 needs next >= 0, Skv + pre >= Sq; mode 3 Sq <= Skv; mode 4 pre >= 0, "
        "pre + next >= 0, Sq - next <= Skv, for every sequence",
        "Widen the window, or take the short sequences into another call.",
        _window_packed,
    ),
    Rule(
        "window-cut",
        "tiling",
        "modes 7 and 8: the cut sequence needs pre >= Skv, Sq - next <= Skv (in mode 7 only if it "
        "has keys); mode 7 also next <= 0 and Sq <= Skv elsewhere",
        "Leave pre_tokens at its default; next_tokens counts from the bottom-right corner.",
        _window_cut,
    ),
    Rule(
        "window-backward",
        "backward",
        "the grad op needs, in dense modes 0 and 4 and anchored top-left, pre + next >= 0, "
        "-pre <= Skv, -next <= Sq; in TND modes 0, 4, 7 and 8 pre + next > 0, and for every "
        "sequence, empty ones too, in mode 0 -pre <= Skv, -next <= Sq, in mode 4 -pre <= Sq, "
        "-next <= Skv",
        "Say the same set with another mode, or widen the window to at least two keys.",
        _window_backward,
    ),
    Rule(
        "prefix-count",
        "tiling",
        "mode 6 needs one prefix length per score matrix",
        "Pass prefix=(...,), one integer for every batch element or sequence.",
        _prefix_count,
    ),
    Rule(
        "prefix-count-mode-5",
        "silent",
        "mode 5 takes one prefix length per score matrix; any other number silently turns tile "
        "skipping off",
        "Pass prefix=(...,), one integer for every batch element; the mask decides in any case.",
        _prefix_count_5,
    ),
    Rule(
        "prefix-range",
        "tiling",
        "a prefix lies in [max(0, Skv - Sq), Skv]",
        "A shorter prefix adds nothing to bottom-right causal: raise it to Skv - Sq.",
        _prefix_range,
    ),
    Rule(
        "prefix-range-mode-5",
        "silent",
        "in mode 5 a prefix outside [max(0, Skv - Sq), Skv] silently turns tile skipping off",
        "Raise it to Skv - Sq; the mask decides in any case.",
        _prefix_range_5,
    ),
    Rule(
        "prefix-unused",
        "silent",
        "prefix is read in modes 5 and 6 only",
        "Leave it out, or use mode 6 and the 3072 x 2048 mask.",
        _prefix_unused,
    ),
    Rule(
        "prefix-batch",
        "documented",
        "modes 5 and 6 take at most 32 batch elements",
        "Split the batch.",
        _prefix_batch,
    ),
)
