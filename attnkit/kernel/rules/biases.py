"""Rules about pse, the additive bias, and the start indices of its slopes."""

from __future__ import annotations

import torch

from attnkit.errors import shown
from attnkit.kernel.call import KernelCall
from attnkit.kernel.legality import Found, Target, rule

__all__: list[str] = []

_COMPRESSED_ROWS = 1024
_SLOPES = (2, 3)


@rule(layer="torch", remedy="Choose one of them.")
def pse_type_range(call: KernelCall, on: Target) -> Found:
    """A pse_type is 0 (after scale), 1 (before scale), 2 (ALiBi slopes) or 3 (slopes, sqrt)."""
    if call.pse_type not in range(4):
        yield f"pse_type={call.pse_type}"


@rule(layer="tiling", remedy="Pass pse, or leave pse_type at 1.")
def pse_missing(call: KernelCall, on: Target) -> Found:
    """The types 0, 2 and 3 need pse."""
    if call.pse is None and call.pse_type in (0, *_SLOPES):
        yield f"pse_type={call.pse_type} without pse"


@rule(layer="aclnn", remedy="Cast it.", type_error=True)
def pse_dtype(call: KernelCall, on: Target) -> Found:
    """A pse has the query's dtype in types 0 and 1, and is float32 in types 2 and 3."""
    # Off the device float64 calls may also carry float64 slopes.
    wanted = {torch.float32 if call.pse_type in _SLOPES else call.dtype}
    wanted |= {call.dtype} & {torch.float64}
    if call.pse is not None and call.pse.dtype not in wanted:
        yield f"pse {call.pse} with pse_type={call.pse_type}, query {call.query}"


@rule(layer="tiling", remedy="Pass one slope per query head.")
def slopes_shape(call: KernelCall, on: Target) -> Found:
    """Slopes are [N] or [B, N]."""
    heads = call.num_heads
    if call.pse is None or call.pse_type not in _SLOPES:
        return
    if call.pse.shape not in ((heads,), (call.batch, heads)):
        yield f"slopes of shape {list(call.pse.shape)} for {heads} heads"


@rule(layer="tiling", remedy="Expand it over the heads; in TND only the compressed form is read.")
def pse_shape(call: KernelCall, on: Target) -> Found:
    """A bias is [1|B, N, Sq, Skv], [1|B, N, 1, Skv], or compressed [1|B, N, 1024, Skv].

    Compressed from 1024 queries on, and always in TND: [1|B, N, 1024, max Skv].
    """
    if call.pse is None or call.pse_type not in (0, 1):
        return
    rows = [] if call.is_packed else [call.q_len, 1]
    if call.is_packed or call.q_len >= _COMPRESSED_ROWS:
        rows.append(_COMPRESSED_ROWS)
    shapes = [(b, call.num_heads, r, call.kv_len) for b in (1, call.batch) for r in rows]
    if call.pse.shape not in shapes:
        yield f"pse of shape {list(call.pse.shape)}"


@rule(layer="tiling", remedy="Pass all rows, or slopes with pse_type 2 or 3.")
def pse_compressed(call: KernelCall, on: Target) -> Found:
    """The compressed bias needs Sq = Skv and a causal mode.

    That is 2, 3, or 0 with a mask, pre_tokens >= Sq and next_tokens = 0; TND: also 4 with
    pre_tokens >= max Skv, next_tokens = 0.
    """
    if call.pse is None or call.pse_type not in (0, 1) or len(call.pse.shape) != 4:
        return
    if call.pse.shape[2] != _COMPRESSED_ROWS or not (call.is_packed or call.q_len > 1024):
        return
    mode, causal = call.effective_mode, call.next_tokens == 0
    if mode == 0:
        causal &= call.pre_tokens >= call.q_len
    else:
        # The dense tiling takes the same window of mode 4 for a band.
        causal &= mode == 4 and call.is_packed and call.pre_tokens >= call.kv_len
    if not (causal or mode in (2, 3)) or any(q != kv for q, kv in call.sequences):
        yield f"a compressed pse in sparse_mode={call.sparse_mode} at {call.q_len} x {call.kv_len}"


@rule(layer="tiling", remedy="Pass the bias as a matrix with pse_type 0.")
def slopes_square(call: KernelCall, on: Target) -> Found:
    """Slopes in a dense layout need Sq = Skv."""
    if call.pse is None or call.pse_type not in _SLOPES or call.is_packed:
        return
    if call.q_len != call.kv_len:
        yield f"slopes at {call.q_len} x {call.kv_len}"


def _unequal(sequences: tuple[tuple[int, int], ...]) -> Found:
    for q_len, kv_len in sequences:
        if q_len != kv_len:
            yield f"pse with a sequence of {q_len} x {kv_len}"


@rule(layer="documented", remedy="Run the other sequences in a dense layout.")
def pse_packed_square(call: KernelCall, on: Target) -> Found:
    """A pse in TND needs as many queries as keys in every sequence."""
    if call.pse is not None and call.is_packed and call.effective_mode not in (7, 8):
        yield from _unequal(call.sequences)


@rule(layer="documented", remedy="Drop the empty sequences from both lists.")
def pse_empty_sequence(call: KernelCall, on: Target) -> Found:
    """A pse cannot be combined with empty sequences."""
    if call.pse is not None and call.is_packed and not all(map(all, call.sequences)):
        yield "pse with an empty sequence"


@rule(layer="tiling", remedy="Use mode 3 or 8.")
def pse_mode_7(call: KernelCall, on: Target) -> Found:
    """Mode 7 takes no pse."""
    if call.pse is not None and call.effective_mode == 7:
        yield "pse in sparse_mode=7"


@rule(layer="tiling", remedy="Set q_start_idx to what was cut off in front of the first sequence.")
def pse_mode_8(call: KernelCall, on: Target) -> Found:
    """A pse in mode 8 needs Sq - Skv + q_start - kv_start = 0 in the first sequence.

    The others need Sq = Skv.
    """
    if call.pse is None or call.effective_mode != 8 or not call.is_packed:
        return
    (q_len, kv_len), *others = call.sequences
    q_start, kv_start = call.start_indices
    if q_len - kv_len + q_start - kv_start != 0:
        yield f"first sequence {q_len} x {kv_len} with starts {q_start}, {kv_start}"
    yield from _unequal(tuple(others))


def _starts(call: KernelCall) -> str:
    return f"q_start_idx={shown(call.q_start_idx)}, kv_start_idx={shown(call.kv_start_idx)}"


@rule(layer="silent", source="tiling", remedy="Pass both, (0,) for none.")
def start_pair(call: KernelCall, on: Target) -> Found:
    """The two of q_start_idx and kv_start_idx take effect together only; one alone is ignored."""
    if bool(call.q_start_idx) != bool(call.kv_start_idx):
        yield _starts(call)


@rule(layer="documented", remedy="Pass (start,).")
def start_length(call: KernelCall, on: Target) -> Found:
    """Both q_start_idx and kv_start_idx hold one integer."""
    given = [starts for starts in (call.q_start_idx, call.kv_start_idx) if starts is not None]
    if any(len(starts) != 1 for starts in given):
        yield _starts(call)


@rule(layer="silent", remedy="Leave them out, or shift the bias matrix itself.")
def start_unused(call: KernelCall, on: Target) -> Found:
    """Start indices are read for pse_type 2 and 3 only."""
    if call.pse_type not in _SLOPES and (call.q_start_idx or call.kv_start_idx):
        yield f"{_starts(call)} with pse_type={call.pse_type}"


@rule(layer="silent", remedy="Drop the empty sequences in front.")
def start_empty_first(call: KernelCall, on: Target) -> Found:
    """Mode 8 applies start indices to sequence 0 only, even when it is empty."""
    if call.effective_mode != 8 or not (call.q_start_idx and call.kv_start_idx):
        return
    if call.is_packed and call.band_index:
        yield f"start indices while sequence 0 is empty and {call.band_index} is the cut one"


@rule(layer="backward", remedy="Expand it over the batch.")
def pse_backward_shape(call: KernelCall, on: Target) -> Found:
    """The grad op takes a [B, N, 1, Skv] bias, but not [1, N, 1, Skv] in a larger batch."""
    if call.pse is None or call.pse_type not in (0, 1) or not on.training or call.is_packed:
        return
    shape = call.pse.shape
    if len(shape) == 4 and shape[0] == shape[2] == 1 and 1 not in (call.batch, call.q_len):
        yield f"pse of shape {list(shape)} in a batch of {call.batch}"


@rule(layer="silent", remedy="Detach the bias, or compute this attention without the fused kernel.")
def pse_learnable(call: KernelCall, on: Target) -> Found:
    """The kernel never writes the gradient of pse: it returns uninitialised memory."""
    if call.pse is not None and on.learnable_bias:
        yield "pse requires a gradient"
