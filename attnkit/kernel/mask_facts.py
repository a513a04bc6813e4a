"""Look at the content of a mask tensor, for the rules that shapes cannot decide.

The answers are kept per tensor and version of its content, so a mask that is passed again and
again is read once (on a device, reading means waiting for it).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.weak import WeakIdRef

from attnkit.constants import constant
from attnkit.kernel.call import KernelCall
from attnkit.kernel.legality import MaskFacts

__all__ = ["mask_facts"]

_ROWS = 1024


def mask_facts(call: KernelCall, mask: torch.Tensor | None) -> MaskFacts:
    """Return what the content of `mask` says about a call whose shapes are in order."""
    if mask is None or mask.dtype not in (torch.bool, torch.uint8) or mask.is_meta:
        return MaskFacts()
    if mask.is_inference():  # such tensors do not count their versions
        return _read(call, mask)
    return _kept(WeakIdRef(mask), mask._version, call)


@constant
def _kept(mask: WeakIdRef, version: int, call: KernelCall) -> MaskFacts:
    return _read(call, mask())


def _read(call: KernelCall, mask: torch.Tensor) -> MaskFacts:
    is_binary = mask.dtype == torch.bool or mask.numel() == 0 or int(mask.max()) <= 1
    return replace(_read_cells(call, mask), is_binary=is_binary)


def _read_cells(call: KernelCall, mask: torch.Tensor) -> MaskFacts:
    wanted = call.compressed_mask
    if wanted is not None:
        if mask.shape[-2:] != wanted.shape:
            return MaskFacts()
        good = wanted.build(mask.device)
        return MaskFacts(is_canonical=bool((mask.bool() == good).all()))
    elsewhere = call.mask_origin(len(call.sequences) - 1) != (0, 0)
    if call.is_packed and (mask.dim() != 2 or elsewhere):
        return MaskFacts()
    outside = empty = 0
    for q_len, kv_len in set(call.sequences):
        found = _count(mask[..., :q_len, :kv_len], call.pre_tokens, call.next_tokens)
        outside, empty = outside + found[0], empty + found[1]
    return MaskFacts(cells_outside_window=outside, empty_rows=empty)


def _count(mask: torch.Tensor, pre: int, next_: int) -> tuple[int, int]:
    """Count the allowed cells outside a top-left window, and the rows without any."""
    q_len, kv_len = mask.shape[-2:]
    outside = empty = 0
    if kv_len == 0:
        return 0, 0
    for i0 in range(0, q_len, _ROWS):
        allowed = mask[..., i0 : i0 + _ROWS, :].logical_not()
        empty += int((~allowed.any(-1)).sum())
        if pre >= q_len and next_ >= kv_len:
            continue
        # Ends beyond the matrix mean its edge; torch's own bounds are narrower than the op's.
        low = i0 - max(min(pre, q_len), -kv_len)
        high = i0 + max(min(next_, kv_len), -q_len)
        outside += int(allowed.tril(low - 1).sum()) + int(allowed.triu(high + 1).sum())
    return outside, empty
