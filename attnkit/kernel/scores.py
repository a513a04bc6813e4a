"""One tile of scores, built as the kernel builds it: product, scale and bias, mask.

The mask *tensor* is read, with the addressing of the kernel, so a wrong tensor gives wrong
scores here as it does on the device. Sources: CANN flash_attention_score kernels
(s1s2_bn2gs1, var_len), pse.h, and the tiling's sparse types.
"""

from __future__ import annotations

import torch

from attnkit.errors import KernelContractError
from attnkit.kernel.atten_mask import COMPRESSED_SIDE, PREFIX_SIDE
from attnkit.kernel.call import KernelCall
from attnkit.kernel.call_tensors import CallTensors, CellRange, MatrixGroup
from attnkit.kernel.dropout import dropout_bits, read_bits
from attnkit.kernel.modes import COMPRESSED_MODES, diagonals

__all__ = ["MASKED", "kept", "masked", "score_tile", "visited_columns"]

MASKED = -torch.finfo(torch.float32).max
"""What a masked score is replaced by (not -inf, and not added), in every dtype."""

# Templates that split the key axis, and so can skip tiles, start beyond this many keys; the
# ends of mode 0's window are rounded up to this multiple first.
_SPLIT_KEYS = 1024
_WINDOW_ROUNDING = 128

# Distances beyond are the same number in float32; this one leaves room to add indices in int64.
_FARTHEST = 2**62


def _diagonals(call: KernelCall, group: MatrixGroup) -> tuple[int | None, int]:
    """The diagonals ``low <= j - i <= high`` that the mode itself applies."""
    ends, shift = (call.pre_tokens, call.next_tokens), group.kv_len - group.q_len
    return diagonals(call.sparse_mode, ends, shift, cut=group.sequence == call.band_index)


def _entries(call: KernelCall, group: MatrixGroup) -> slice:
    """Which entries of what is given per batch element, or per packed sequence."""
    return slice(group.sequence, group.sequence + 1) if call.is_packed else group.batch


def _prefix_lengths(call: KernelCall, group: MatrixGroup) -> tuple[int, ...]:
    return (call.prefix or ())[_entries(call, group)]


def visited_columns(call: KernelCall, group: MatrixGroup, rows: tuple[int, int]) -> tuple[int, int]:
    """Return the keys that the kernel visits for some rows; the mode excludes the others."""
    mode, kv_len = call.effective_mode, group.kv_len
    if mode in (None, 1, 5) or (mode == 0 and kv_len <= _SPLIT_KEYS):
        return 0, kv_len
    low: int | None
    if mode == 0:
        low, high = -_round_up(call.pre_tokens), _round_up(call.next_tokens)
    else:
        low, high = _diagonals(call, group)
    start = 0 if low is None else max(0, rows[0] + low)
    stop = min(kv_len, rows[1] + high)
    if mode == 6:
        start, stop = 0, max(stop, *_prefix_lengths(call, group), 0)
    return start, max(start, min(stop, kv_len))


def _round_up(tokens: int) -> int:
    return -(-tokens // _WINDOW_ROUNDING) * _WINDOW_ROUNDING


# -- mask --------------------------------------------------------------------------------


def masked(given: CallTensors, group: MatrixGroup, cells: CellRange) -> torch.Tensor | None:
    """Return which cells are masked, broadcastable to [b, n, h, w]; None = none."""
    call, mask = given.call, given.atten_mask
    if mask is None:
        return None
    if call.sparse_mode not in COMPRESSED_MODES:
        return _full_mask(call, mask, group, cells)
    if mask.dim() != 2:
        mask = mask.reshape(-1, *mask.shape[-2:])[0]
    low, high = _diagonals(call, group)
    out = _above_diagonal(mask, cells, high)
    if call.sparse_mode == 6 and out is not None:
        out = out & _beyond_prefix(mask, cells, _prefix_lengths(call, group))
    if low is not None:
        below = _below_diagonal(mask, cells, low)
        out = below if out is None else out if below is None else out | below
    return out


def _full_mask(
    call: KernelCall, mask: torch.Tensor, group: MatrixGroup, cells: CellRange
) -> torch.Tensor:
    i0, j0 = call.mask_origin(group.sequence)
    block = mask[..., i0 + cells.i0 : i0 + cells.i1, j0 + cells.j0 : j0 + cells.j1]
    if block.shape[-2:] != (cells.height, cells.width):
        raise KernelContractError(
            f"atten_mask of shape {tuple(mask.shape)} ends before the {call.q_len} x "
            f"{call.kv_len} score matrix does; sparse_mode={call.sparse_mode} reads one entry "
            "per cell",
            ["mask-shape"],
        )
    if block.dim() == 4:
        block = block[group.batch] if block.shape[0] > 1 else block
        block = block[:, group.heads] if block.shape[1] > 1 else block
    return block.bool()


def _diagonal_block(mask: torch.Tensor, cells: CellRange, delta: int) -> torch.Tensor:
    """Read the causal mask so that cell (r, c) of the range is masked iff c > r + delta."""
    down = min(max(delta, 0), cells.width)
    right = min(max(-delta, 0), cells.height)
    return mask[down : down + cells.height, right : right + cells.width].bool()


def _above_diagonal(mask: torch.Tensor, cells: CellRange, high: int) -> torch.Tensor | None:
    """Masked iff ``j - i > high``; None when all cells are visible and nothing is read."""
    delta = cells.i0 - cells.j0 + high
    return None if delta >= cells.width - 1 else _diagonal_block(mask, cells, delta)


def _below_diagonal(mask: torch.Tensor, cells: CellRange, low: int) -> torch.Tensor | None:
    """Masked iff ``j - i < low``: the same mask one diagonal lower, selected where it is 0."""
    delta = cells.i0 - cells.j0 + low - 1
    return None if delta <= -cells.height else ~_diagonal_block(mask, cells, delta)


def _beyond_prefix(mask: torch.Tensor, cells: CellRange, lengths: tuple[int, ...]) -> torch.Tensor:
    """Masked iff ``j >= prefix``: the lower part of the prefix mask, shifted to the cells."""
    rows = mask[COMPRESSED_SIDE : COMPRESSED_SIDE + cells.height]
    starts = [PREFIX_SIDE - min(max(n - cells.j0, 0), PREFIX_SIDE) for n in lengths]
    blocks = [rows[:, start : start + cells.width].bool() for start in starts]
    return torch.stack(blocks).unsqueeze(1)


# -- bias --------------------------------------------------------------------------------


def _indices(cells: CellRange, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as a column, and the keys as a row."""
    i = torch.arange(cells.i0, cells.i1, device=device).unsqueeze(1)
    return i, torch.arange(cells.j0, cells.j1, device=device)


def _slope_bias(
    given: CallTensors, slopes: torch.Tensor, group: MatrixGroup, cells: CellRange
) -> torch.Tensor:
    """Types 2 and 3: ``-slope * |j + kv_start - i - q_start|``, or its square root."""
    call, dtype = given.call, given.accumulate
    # Mode 8 applies the starts to its first sequence only.
    applied = call.effective_mode != 8 or group.sequence == 0
    q_start, kv_start = call.start_indices if applied else (0, 0)
    i, j = _indices(cells, slopes.device)
    shift = max(-_FARTHEST, min(_FARTHEST, kv_start - q_start))
    distance = (j - i + shift).abs().to(dtype)
    if call.pse_type == 3:
        distance = distance.sqrt()
    chosen = slopes[_entries(call, group)] if slopes.dim() == 2 else slopes.unsqueeze(0)
    return -chosen[:, group.heads].to(dtype)[..., None, None] * distance


def _matrix_bias(
    given: CallTensors, pse: torch.Tensor, group: MatrixGroup, cells: CellRange
) -> torch.Tensor:
    """Types 0 and 1: one entry per cell, one per key, or the last 1024 rows of one by distance."""
    call, dtype = given.call, given.accumulate
    if pse.shape[0] > 1:
        pse = pse[_entries(call, group)]
    pse = pse[:, group.heads]
    stored = pse.shape[2]
    if not call.is_packed and stored in (1, group.q_len):
        rows = slice(0, 1) if stored == 1 else slice(cells.i0, cells.i1)
        return pse[:, :, rows, cells.j0 : cells.j1].to(dtype)
    row, column = _last_rows(call, group, cells, pse)
    return pse[:, :, row, column.clamp(0, pse.shape[3] - 1)].to(dtype)


def _last_rows(
    call: KernelCall, group: MatrixGroup, cells: CellRange, pse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where cells read the last rows of a bias: rows and columns, for the cells i >= j."""
    height, width = pse.shape[2:]
    i, j = _indices(cells, pse.device)
    if call.is_packed:
        # By distance, row - column = (i - j) - (max Skv - 1024), whatever the sequence's length:
        # a tile starts in the first row or in the first column, and goes on side by side.
        start = cells.i0 - cells.j0 - (width - height)
        down, right = (start, 0) if start >= 0 or width < height else (0, -start)
        return (i - cells.i0 + down).clamp(0, height - 1), (j - cells.j0 + right).unsqueeze(0)
    # Rows of the last 1024 have their own entry. Earlier ones read an entry of equal i - j.
    first = group.q_len - height
    own = i >= first
    row = torch.where(own, i - first, i % height)
    return row, torch.where(own, j, width - (i - j) - (height - row))


# -- the tile ----------------------------------------------------------------------------


def score_tile(
    given: CallTensors,
    group: MatrixGroup,
    cells: CellRange,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """Return the masked scores [b, n, h, w] of some cells.

    `query` is [b, n_kv, queries_per_key_head * h, d], the rows with the heads that share a key
    head stacked; `key` is [b, n_kv, w, d]. Both are already in the accumulating dtype.
    """
    call, pse = given.call, given.pse
    scores = query @ key.transpose(-1, -2)
    scores = scores.view(scores.shape[0], -1, cells.height, cells.width)
    if pse is not None and call.pse_type == 1:
        scores = scores.add_(_matrix_bias(given, pse, group, cells))
    if call.scale != 1.0:
        scores = scores.mul_(call.scale)
    if pse is not None and call.pse_type in (0, 2, 3):
        bias = _slope_bias if call.pse_type else _matrix_bias
        scores = scores.add_(bias(given, pse, group, cells))
    hidden = masked(given, group, cells)
    return scores if hidden is None else scores.masked_fill_(hidden, MASKED)


def kept(given: CallTensors, group: MatrixGroup, cells: CellRange) -> torch.Tensor | None:
    """Return which cells [b, n, h, w] survive dropout; None when there is no dropout."""
    call, device = given.call, given.query.device
    if call.keep_prob >= 1.0:
        return None
    b, n = (
        torch.arange(some.start, some.stop, device=device) for some in (group.batch, group.heads)
    )
    i, j = _indices(cells, device)
    matrix = (b[:, None] * call.num_heads + n)[..., None, None]
    index = (matrix * group.q_len + i) * group.kv_len + j + group.first_decision
    if given.dropout_mask is not None:
        return read_bits(given.dropout_mask, index)
    return dropout_bits(index, call.seed, call.offset, call.keep_prob)
