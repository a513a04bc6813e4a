"""Rules about pse, the additive bias.

Sources: the pse checks of CANN flash_attention_score (aclnn parameters, general and varlen
tiling, grad tiling) and pse.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnkit.errors import shown
from attnkit.kernel.rules.rule import Rule, Target

if TYPE_CHECKING:
    from attnkit.kernel.call import KernelCall

__all__ = ["BIAS_RULES"]

_COMPRESSED_ROWS = 1024


def _type_range(call: KernelCall, on: Target) -> str | None:
    return None if call.pse_type in range(4) else f"pse_type={call.pse_type}"


def _missing(call: KernelCall, on: Target) -> str | None:
    if call.pse is not None or call.pse_type not in (0, 2, 3):
        return None
    return f"pse_type={call.pse_type} without pse"


def _dtype(call: KernelCall, on: Target) -> str | None:
    if call.pse is None:
        return None
    # Off the device float64 calls may also carry float64 slopes.
    wanted = {call.dtype} if call.pse_type not in (2, 3) else {torch.float32}
    if call.dtype == torch.float64:
        wanted.add(call.dtype)
    if call.pse.dtype in wanted:
        return None
    return f"pse {call.pse} with pse_type={call.pse_type}, query {call.query}"


def _slopes_shape(call: KernelCall, on: Target) -> str | None:
    if call.pse is None or call.pse_type not in (2, 3):
        return None
    if call.pse.shape in ((call.num_heads,), (call.batch, call.num_heads)):
        return None
    return f"slopes of shape {list(call.pse.shape)} for {call.num_heads} heads"


def _is_matrix(call: KernelCall) -> bool:
    return call.pse is not None and call.pse_type in (0, 1)


def _is_compressed(call: KernelCall) -> bool:
    """Whether the bias holds the last 1024 rows only."""
    if call.pse is None or call.pse_type not in (0, 1) or len(call.pse.shape) != 4:
        return False
    return call.pse.shape[2] == _COMPRESSED_ROWS and (call.is_packed or call.q_len > 1024)


def _shape(call: KernelCall, on: Target) -> str | None:
    if call.pse is None or not _is_matrix(call):
        return None
    rows = [] if call.is_packed else [call.q_len, 1]
    if call.is_packed or call.q_len >= _COMPRESSED_ROWS:
        rows.append(_COMPRESSED_ROWS)
    batches = (1, call.batch)
    shapes = [(b, call.num_heads, r, call.kv_len) for b in batches for r in rows]
    return None if call.pse.shape in shapes else f"pse of shape {list(call.pse.shape)}"


def _compressed(call: KernelCall, on: Target) -> str | None:
    if not _is_compressed(call):
        return None
    mode = call.effective_mode
    causal = mode in (2, 3)
    causal |= mode == 0 and call.pre_tokens >= call.q_len and call.next_tokens == 0
    # The dense tiling takes the same window of mode 4 for a band.
    wide = call.is_packed and call.pre_tokens >= call.kv_len and call.next_tokens == 0
    causal |= mode == 4 and wide
    square = all(q == kv for q, kv in call.sequences)
    if causal and square:
        return None
    return f"a compressed pse in sparse_mode={call.sparse_mode} at {call.q_len} x {call.kv_len}"


def _slopes_square(call: KernelCall, on: Target) -> str | None:
    if call.pse is None or call.pse_type not in (2, 3) or call.is_packed:
        return None
    return None if call.q_len == call.kv_len else f"slopes at {call.q_len} x {call.kv_len}"


def _packed_square(call: KernelCall, on: Target) -> str | None:
    if call.pse is None or not call.is_packed or call.effective_mode in (7, 8):
        return None
    unequal = next((s for s in call.sequences if s[0] != s[1]), None)
    return f"pse with a sequence of {unequal[0]} x {unequal[1]}" if unequal else None


def _empty_sequence(call: KernelCall, on: Target) -> str | None:
    if call.pse is None or not call.is_packed or all(all(s) for s in call.sequences):
        return None
    return "pse with an empty sequence"


def _mode_7(call: KernelCall, on: Target) -> str | None:
    return "pse in sparse_mode=7" if call.pse is not None and call.effective_mode == 7 else None


def _mode_8(call: KernelCall, on: Target) -> str | None:
    if call.pse is None or call.effective_mode != 8 or not call.is_packed:
        return None
    starts = (call.q_start_idx, call.kv_start_idx)
    q_start, kv_start = (s[0] for s in starts) if all(starts) else (0, 0)  # type: ignore[index]
    q_len, kv_len = call.sequences[0]
    if q_len - kv_len + q_start - kv_start != 0:
        return f"first sequence {q_len} x {kv_len} with starts {q_start}, {kv_start}"
    unequal = next((s for s in call.sequences[1:] if s[0] != s[1]), None)
    return f"pse with a sequence of {unequal[0]} x {unequal[1]}" if unequal else None


def _starts(call: KernelCall) -> str:
    return f"q_start_idx={shown(call.q_start_idx)}, kv_start_idx={shown(call.kv_start_idx)}"


def _start_pair(call: KernelCall, on: Target) -> str | None:
    return None if bool(call.q_start_idx) == bool(call.kv_start_idx) else _starts(call)


def _start_length(call: KernelCall, on: Target) -> str | None:
    given = [x for x in (call.q_start_idx, call.kv_start_idx) if x is not None]
    return None if all(len(x) == 1 for x in given) else _starts(call)


def _start_unused(call: KernelCall, on: Target) -> str | None:
    if call.pse_type in (2, 3) or not (call.q_start_idx or call.kv_start_idx):
        return None
    return f"{_starts(call)} with pse_type={call.pse_type}"


def _start_empty_first(call: KernelCall, on: Target) -> str | None:
    if call.effective_mode != 8 or not (call.q_start_idx and call.kv_start_idx):
        return None
    if not call.is_packed or call.band_index in (None, 0):
        return None
    return f"start indices while sequence 0 is empty and {call.band_index} is the cut one"


def _backward_shape(call: KernelCall, on: Target) -> str | None:
    if call.pse is None or not _is_matrix(call) or not on.training or call.batch == 1:
        return None
    shape = call.pse.shape
    if call.is_packed or len(shape) != 4 or shape[0] != 1 or shape[2] != 1:
        return None
    return None if call.q_len == 1 else f"pse of shape {list(shape)} in a batch of {call.batch}"


def _learnable(call: KernelCall, on: Target) -> str | None:
    return "pse requires a gradient" if call.pse is not None and on.learnable_bias else None


BIAS_RULES: tuple[Rule, ...] = (
    Rule(
        "pse-type-range",
        "torch",
        "pse_type is 0 (after scale), 1 (before scale), 2 (ALiBi slopes) or 3 (slopes, sqrt)",
        "Choose one of them.",
        _type_range,
    ),
    Rule(
        "pse-missing",
        "tiling",
        "pse_type 0, 2 and 3 need pse",
        "Pass pse, or leave pse_type at 1.",
        _missing,
    ),
    Rule(
        "pse-dtype",
        "aclnn",
        "pse has the query's dtype in types 0 and 1, and is float32 in types 2 and 3",
        "Cast it.",
        _dtype,
        type_error=True,
    ),
    Rule(
        "slopes-shape",
        "tiling",
        "slopes are [N] or [B, N]",
        "Pass one slope per query head.",
        _slopes_shape,
    ),
    Rule(
        "pse-shape",
        "tiling",
        "a bias is [1|B, N, Sq, Skv], [1|B, N, 1, Skv], or compressed [1|B, N, 1024, Skv] from "
        "1024 queries on; TND: [1|B, N, 1024, max Skv]",
        "Expand it over the heads; in TND only the compressed form is read.",
        _shape,
    ),
    Rule(
        "pse-compressed",
        "tiling",
        "the compressed bias needs Sq = Skv and a causal mode: 2, 3, or 0 with a mask, "
        "pre_tokens >= Sq and next_tokens = 0; TND: also 4 with pre_tokens >= max Skv, "
        "next_tokens = 0",
        "Pass all rows, or slopes with pse_type 2 or 3.",
        _compressed,
    ),
    Rule(
        "slopes-square",
        "tiling",
        "slopes in a dense layout need Sq = Skv",
        "Pass the bias as a matrix with pse_type 0.",
        _slopes_square,
    ),
    Rule(
        "pse-packed-square",
        "documented",
        "pse in TND needs as many queries as keys in every sequence",
        "Run the other sequences in a dense layout.",
        _packed_square,
    ),
    Rule(
        "pse-empty-sequence",
        "documented",
        "pse cannot be combined with empty sequences",
        "Drop the empty sequences from both lists.",
        _empty_sequence,
    ),
    Rule("pse-mode-7", "tiling", "mode 7 takes no pse", "Use mode 3 or 8.", _mode_7),
    Rule(
        "pse-mode-8",
        "tiling",
        "pse in mode 8 needs Sq - Skv + q_start - kv_start = 0 in the first sequence and Sq = Skv "
        "in the others",
        "Set q_start_idx to what was cut off in front of the first sequence.",
        _mode_8,
    ),
    Rule(
        "start-pair",
        "silent",
        "q_start_idx and kv_start_idx take effect together only; one alone is ignored",
        "Pass both, (0,) for none.",
        _start_pair,
    ),
    Rule(
        "start-length",
        "documented",
        "q_start_idx and kv_start_idx hold one integer",
        "Pass (start,).",
        _start_length,
    ),
    Rule(
        "start-unused",
        "silent",
        "start indices are read for pse_type 2 and 3 only",
        "Leave them out, or shift the bias matrix itself.",
        _start_unused,
    ),
    Rule(
        "start-empty-first",
        "silent",
        "mode 8 applies start indices to sequence 0 only, even when it is empty",
        "Drop the empty sequences in front.",
        _start_empty_first,
    ),
    Rule(
        "pse-backward-shape",
        "backward",
        "the grad op takes a [B, N, 1, Skv] bias, but not [1, N, 1, Skv] in a larger batch",
        "Expand it over the batch.",
        _backward_shape,
    ),
    Rule(
        "pse-learnable",
        "silent",
        "the kernel never writes the gradient of pse: it returns uninitialised memory",
        "Detach the bias, or compute this attention without the fused kernel.",
        _learnable,
    ),
)
