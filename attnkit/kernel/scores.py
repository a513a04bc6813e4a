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
from attnkit.kernel.dropout import dropout_bits, read_bits
from attnkit.kernel.modes import COMPRESSED_MODES
from attnkit.kernel.operands import Operands, Piece, Tile

__all__ = ["MASKED", "kept", "masked", "score_tile", "visited_columns"]

MASKED = -torch.finfo(torch.float32).max
"""What a masked score is replaced by (not -inf, and not added), in every dtype."""

# Templates that split the key axis, and so can skip tiles, start beyond this many keys; the
# ends of mode 0's window are rounded up to this multiple first.
_SPLIT_KEYS = 1024
_WINDOW_ROUNDING = 128

# Distances beyond are the same number in float32; this one leaves room to add indices in int64.
_FARTHEST = 2**62


def _causal_ends(call: KernelCall, piece: Piece) -> tuple[int | None, int | None]:
    """The diagonals ``low <= j - i <= high`` that the mode itself applies to a piece."""
    shift = piece.kv_len - piece.q_len
    mode = call.sparse_mode
    if mode == 4:
        return shift - call.pre_tokens, shift + call.next_tokens
    if mode in (7, 8) and piece.sequence == call.band_index:
        return None, shift + call.next_tokens
    if mode in (3, 6, 7):
        return None, shift
    return None, 0


def _prefix_lengths(call: KernelCall, piece: Piece) -> tuple[int, ...]:
    lengths = call.prefix or ()
    if call.is_packed:
        return lengths[piece.sequence : piece.sequence + 1]
    return lengths[piece.batch]


def visited_columns(call: KernelCall, piece: Piece, rows: tuple[int, int]) -> tuple[int, int]:
    """Return the keys that the kernel visits for some rows; the mode excludes the others."""
    if call.atten_mask is None or call.sparse_mode in (1, 5):
        return 0, piece.kv_len
    low: int | None
    high: int | None
    if call.sparse_mode == 0:
        if piece.kv_len <= _SPLIT_KEYS:
            return 0, piece.kv_len
        low = -_round_up(call.pre_tokens)
        high = _round_up(call.next_tokens)
    else:
        low, high = _causal_ends(call, piece)
    start = 0 if low is None else max(0, rows[0] + low)
    stop = piece.kv_len if high is None else min(piece.kv_len, rows[1] + high)
    if call.sparse_mode == 6:
        start, stop = 0, max(stop, *_prefix_lengths(call, piece), 0)
    return start, max(start, min(stop, piece.kv_len))


def _round_up(tokens: int) -> int:
    return -(-tokens // _WINDOW_ROUNDING) * _WINDOW_ROUNDING


# -- mask --------------------------------------------------------------------------------


def masked(call: KernelCall, operands: Operands, piece: Piece, tile: Tile) -> torch.Tensor | None:
    """Return which cells of a tile are masked, broadcastable to [b, n, h, w]; None = none."""
    mask = operands.atten_mask
    if mask is None:
        return None
    if call.sparse_mode not in COMPRESSED_MODES:
        return _full_mask_tile(call, mask, piece, tile)
    if mask.dim() != 2:
        mask = mask.reshape(-1, *mask.shape[-2:])[0]
    low, high = _causal_ends(call, piece)
    out = None if high is None else _above_diagonal(mask, tile, high)
    if call.sparse_mode == 6 and out is not None:
        out = out & _beyond_prefix(mask, tile, _prefix_lengths(call, piece))
    if low is not None:
        below = _below_diagonal(mask, tile, low)
        out = below if out is None else out if below is None else out | below
    return out


def _full_mask_tile(call: KernelCall, mask: torch.Tensor, piece: Piece, tile: Tile) -> torch.Tensor:
    i0, j0 = call.mask_origin(piece.sequence)
    block = mask[..., i0 + tile.i0 : i0 + tile.i1, j0 + tile.j0 : j0 + tile.j1]
    if block.shape[-2:] != (tile.height, tile.width):
        raise KernelContractError(
            f"atten_mask of shape {tuple(mask.shape)} ends before the {call.q_len} x "
            f"{call.kv_len} score matrix does; sparse_mode={call.sparse_mode} reads one entry "
            "per cell",
            ["mask-shape"],
        )
    if block.dim() == 4:
        block = block[piece.batch] if block.shape[0] > 1 else block
        block = block[:, piece.heads] if block.shape[1] > 1 else block
    return block.bool()


def _diagonal_block(mask: torch.Tensor, tile: Tile, delta: int) -> torch.Tensor:
    """Read the causal mask so that cell (r, c) of the tile is masked iff c > r + delta."""
    down = min(max(delta, 0), tile.width)
    right = min(max(-delta, 0), tile.height)
    return mask[down : down + tile.height, right : right + tile.width].bool()


def _above_diagonal(mask: torch.Tensor, tile: Tile, high: int) -> torch.Tensor | None:
    """Masked iff ``j - i > high``; None when the whole tile is visible and nothing is read."""
    delta = tile.i0 - tile.j0 + high
    return None if delta >= tile.width - 1 else _diagonal_block(mask, tile, delta)


def _below_diagonal(mask: torch.Tensor, tile: Tile, low: int) -> torch.Tensor | None:
    """Masked iff ``j - i < low``: the same mask one diagonal lower, selected where it is 0."""
    delta = tile.i0 - tile.j0 + low - 1
    return None if delta <= -tile.height else ~_diagonal_block(mask, tile, delta)


def _beyond_prefix(mask: torch.Tensor, tile: Tile, lengths: tuple[int, ...]) -> torch.Tensor:
    """Masked iff ``j >= prefix``: the lower part of the prefix mask, shifted to the tile."""
    rows = mask[COMPRESSED_SIDE : COMPRESSED_SIDE + tile.height]
    starts = [PREFIX_SIDE - min(max(n - tile.j0, 0), PREFIX_SIDE) for n in lengths]
    blocks = [rows[:, start : start + tile.width].bool() for start in starts]
    return torch.stack(blocks).unsqueeze(1)


# -- bias --------------------------------------------------------------------------------


def _start_indices(call: KernelCall, piece: Piece) -> tuple[int, int]:
    """The shifts of the ALiBi distance: effective together only; mode 8: first sequence."""
    if not call.q_start_idx or not call.kv_start_idx:
        return 0, 0
    if call.effective_mode == 8 and piece.sequence != 0:
        return 0, 0
    return call.q_start_idx[0], call.kv_start_idx[0]


def _slope_bias(
    call: KernelCall, slopes: torch.Tensor, piece: Piece, tile: Tile, dtype: torch.dtype
) -> torch.Tensor:
    """Types 2 and 3: ``-slope * |j + kv_start - i - q_start|``, or its square root."""
    q_start, kv_start = _start_indices(call, piece)
    i = torch.arange(tile.i0, tile.i1, device=slopes.device).unsqueeze(1)
    j = torch.arange(tile.j0, tile.j1, device=slopes.device)
    shift = max(-_FARTHEST, min(_FARTHEST, kv_start - q_start))
    distance = (j - i + shift).abs().to(dtype)
    if call.pse_type == 3:
        distance = distance.sqrt()
    if slopes.dim() == 2:
        rows = slice(piece.sequence, piece.sequence + 1) if call.is_packed else piece.batch
        chosen = slopes[rows, piece.heads]
    else:
        chosen = slopes[piece.heads].unsqueeze(0)
    return -chosen.to(dtype)[..., None, None] * distance


def _matrix_bias(
    call: KernelCall, pse: torch.Tensor, piece: Piece, tile: Tile, dtype: torch.dtype
) -> torch.Tensor:
    """Types 0 and 1: one entry per cell, one per key, or the last 1024 rows of one by distance."""
    if pse.shape[0] > 1:
        rows = slice(piece.sequence, piece.sequence + 1) if call.is_packed else piece.batch
        pse = pse[rows]
    pse = pse[:, piece.heads]
    stored = pse.shape[2]
    if not call.is_packed and stored in (1, piece.q_len):
        rows = slice(0, 1) if stored == 1 else slice(tile.i0, tile.i1)
        return pse[:, :, rows, tile.j0 : tile.j1].to(dtype)
    row, column = _last_rows(call, piece, tile, (stored, pse.shape[3]), pse.device)
    return pse[:, :, row, column.clamp(0, pse.shape[3] - 1)].to(dtype)


def _last_rows(
    call: KernelCall,
    piece: Piece,
    tile: Tile,
    stored: tuple[int, int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a tile reads the last rows of a bias: rows and columns, for the cells i >= j."""
    i = torch.arange(tile.i0, tile.i1, device=device).unsqueeze(1)
    j = torch.arange(tile.j0, tile.j1, device=device).unsqueeze(0)
    if call.is_packed:
        # By distance, row - column = (i - j) - (max Skv - 1024), whatever the sequence's length:
        # a tile starts in the first row or in the first column, and goes on side by side.
        start = tile.i0 - tile.j0 - (stored[1] - stored[0])
        down, right = (start, 0) if start >= 0 or stored[1] < stored[0] else (0, -start)
        return (i - tile.i0 + down).clamp(0, stored[0] - 1), j - tile.j0 + right
    # Rows of the last 1024 have their own entry. Earlier ones read an entry of equal i - j.
    first = piece.q_len - stored[0]
    own = i >= first
    row = torch.where(own, i - first, i % stored[0])
    return row, torch.where(own, j, stored[1] - (i - j) - (stored[0] - row))


# -- the tile ----------------------------------------------------------------------------


def score_tile(
    call: KernelCall,
    operands: Operands,
    piece: Piece,
    tile: Tile,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """Return the masked scores [b, n, h, w] of a tile.

    `query` is [b, n_kv, group * h, d], the rows of the tile with the heads that share a key
    head stacked; `key` is [b, n_kv, w, d]. Both are already in the accumulating dtype.
    """
    scores = query @ key.transpose(-1, -2)
    scores = scores.view(scores.shape[0], -1, tile.height, tile.width)
    pse = operands.pse
    if pse is not None and call.pse_type == 1:
        scores = scores.add_(_matrix_bias(call, pse, piece, tile, scores.dtype))
    if call.scale != 1.0:
        scores = scores.mul_(call.scale)
    if pse is not None and call.pse_type == 0:
        scores = scores.add_(_matrix_bias(call, pse, piece, tile, scores.dtype))
    elif pse is not None and call.pse_type in (2, 3):
        scores = scores.add_(_slope_bias(call, pse, piece, tile, scores.dtype))
    hidden = masked(call, operands, piece, tile)
    return scores if hidden is None else scores.masked_fill_(hidden, MASKED)


def kept(
    call: KernelCall, operands: Operands, piece: Piece, tile: Tile, device: torch.device
) -> torch.Tensor | None:
    """Return which cells [b, n, h, w] survive dropout; None when there is no dropout."""
    if call.keep_prob >= 1.0:
        return None
    packed = operands.dropout_mask
    b = torch.arange(piece.batch.start, piece.batch.stop, device=device)[:, None, None, None]
    n = torch.arange(piece.heads.start, piece.heads.stop, device=device)[:, None, None]
    i = torch.arange(tile.i0, tile.i1, device=device)[:, None]
    j = torch.arange(tile.j0, tile.j1, device=device)
    index = (((b * call.num_heads + n) * piece.q_len + i) * piece.kv_len + j) + piece.first_decision
    if packed is not None:
        return read_bits(packed, index)
    return dropout_bits(index, call.seed, call.offset, call.keep_prob)
