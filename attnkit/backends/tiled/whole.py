"""Pieces that torch's own fused CPU kernel computes: rectangles, causal squares, small masks.

The raw operator has traps, all of which the schedule keeps away from: it divides by zero on
empty tensors, reads a last axis whose stride is not 1 wrongly, answers 0 for the statistics
of a row without keys, and masks a causal square before it scales it, which turns -inf into inf
or NaN unless the scale is above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.backends.base import Kept
from attnkit.backends.tiled.bias import Bias
from attnkit.backends.tiled.schedule import Lane, Pattern, RowBlock, Schedule, Whole
from attnkit.backends.tiled.tiles import Step, head_tiles
from attnkit.constants import constant

__all__ = [
    "LARGE",
    "WholeCall",
    "calls_of",
    "fits_torch",
    "in_a_row",
    "is_sound",
    "pattern_mask",
    "run_whole",
    "run_whole_backward",
    "sole_call",
]

# Beside a maximum of this size the log of a sum loses digits that weights need.
LARGE = 512.0

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@constant
def pattern_mask(
    pattern: Pattern, dtype: torch.dtype, device: torch.device, allowed: float
) -> Tensor:
    """Return a pattern as ``[rows, width]``, or ``[b, 1, rows, width]``: `allowed`, or -inf.

    Where a cell is allowed it holds 0, for a sum, or inf, for a minimum.
    """
    if pattern.others:
        each = (pattern._replace(others=()), *pattern.others)
        known = {one: _cells(one, dtype, device, allowed) for one in set(each)}
        return torch.stack([known[one] for one in each])[:, None]
    return _cells(pattern, dtype, device, allowed)


def _cells(pattern: Pattern, dtype: torch.dtype, device: torch.device, allowed: float) -> Tensor:
    out = torch.full((pattern.rows, pattern.width), -torch.inf, dtype=dtype, device=device)
    column = torch.arange(pattern.width, device=device)
    for row, rows, runs in pattern.pieces:
        below = torch.arange(rows, device=device)[:, None]
        for a, da, b, db in runs:
            inside = (column >= a + da * below) & (column < b + db * below)
            out[row : row + rows].masked_fill_(inside, allowed)
    return out


class WholeCall(NamedTuple):
    """One call of the kernel on a piece: for which batch elements (or repetitions) and heads."""

    lane: Lane
    piece: Whole
    batches: slice
    heads: slice
    key_heads: slice
    row: int
    key: int
    times: int = 1
    all_rows: bool = False
    all_keys: bool = False

    @property
    def calls(self) -> tuple[WholeCall, ...]:
        """One call, or two: over the keys before the piece, and over those of the piece."""
        piece, before = self.piece._replace(before=0), self.piece.before
        own = self._replace(piece=piece)
        if not before:
            return (own,)
        left = piece._replace(keys=before, causal=False)
        return self._replace(piece=left, key=self.key - before), own

    def mask(self, bias: Bias | None, query: Tensor) -> Tensor | None:
        """Return what the call adds to its scores: 0 and -inf of its pattern, and its bias."""
        piece, pattern, mask = self.piece, self.piece.pattern, None
        if bias is not None:
            block = RowBlock(self.row - self.lane.origin[0], piece.rows, 1, 0, ())
            batch, batches = self.batches.start, self.batches.stop - self.batches.start
            head, heads = self.heads.start, self.heads.stop - self.heads.start
            step = Step(self.lane, block, batch, batches, 0, 1, head, heads, 0, 1, 1)
            mask = bias.mask(step, self.key - self.lane.origin[1], piece.keys)
        if pattern is None:
            return mask
        dtype = query.dtype if mask is None else mask.dtype
        cells = pattern_mask(pattern, dtype, query.device, 0.0)
        if bias is None or mask is None:
            return cells
        return bias.joined(mask, cells) if pattern.others else mask + cells

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the call's rows of a ``[b n s d]`` tensor, a view."""
        if self.all_rows and self.times == 1:
            return tensor
        rows = slice(self.row, self.row + self.piece.rows)
        return self._at(tensor[self.batches, self.heads, rows])

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the call's keys of a ``[b n s d]`` tensor, a view."""
        if self.all_keys and self.times == 1:
            return tensor
        keys = slice(self.key, self.key + self.piece.keys)
        return self._at(tensor[self.batches, self.key_heads, keys])

    def _at(self, first: Tensor) -> Tensor:
        """Put the repetitions, `step` positions apart, in the place of the batch."""
        if self.times == 1:
            return first
        _, head, row, dim = first.stride()
        sizes, strides = (self.times, *first.shape[1:]), (self.piece.step * row, head, row, dim)
        return first.as_strided(sizes, strides, first.storage_offset())


def calls_of(lane: Lane, piece: Whole, group: int) -> Iterator[WholeCall]:
    """Yield the calls that a piece takes: repetitions share one where there is one batch row."""
    together = lane.batches[1] - lane.batches[0] == 1
    row, key = lane.origin[0] + piece.row, lane.origin[1] + piece.key
    times, apart = (piece.times, 1) if together else (1, piece.times)
    for key_head, key_heads, member, members in head_tiles(*lane.heads, group, lane.heads[1]):
        head = key_head * group + member
        heads = slice(head, head + key_heads * members)
        shared = slice(key_head, key_head + key_heads)
        for repeat in range(apart):
            move, batches = repeat * piece.step, slice(*lane.batches)
            yield WholeCall(lane, piece, batches, heads, shared, row + move, key + move, times)


def sole_call(schedule: Schedule, sizes: tuple[int, int, int, int], group: int) -> WholeCall | None:
    """Return the one call that computes everything, if there is one.

    `sizes` are those of the request: batch elements, query heads, rows and keys.
    """
    batch, heads, rows, keys = sizes
    if len(schedule.lanes) != 1 or schedule.strays or schedule.mixes:
        return None
    lane = schedule.lanes[0]
    if (lane.batches, lane.heads, len(lane.items)) != ((0, batch), (0, heads), 1):
        return None
    item = lane.items[0]
    if not isinstance(item, Whole) or item.rows * item.times != rows:
        return None
    if item.times > 1 and (batch > 1 or item.step != item.rows):
        return None
    (call,) = calls_of(lane, item, group)
    closed = item.times == 1 or item.step == item.keys
    return call._replace(all_rows=True, all_keys=closed and item.keys * item.times == keys)


def run_whole(
    call: WholeCall, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Bias | None
) -> tuple[Tensor, Tensor]:
    """Return the output and the log denominators of a call's rows, as new tensors."""
    if call.piece.before:
        left, right = (run_whole(one, query, key, value, scale, bias) for one in call.calls)
        return _merged(left, right)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = _forward(
            q, k, v, 0.0, call.piece.causal, attn_mask=mask, scale=scale
        )
        return made

    out, lse = _in_periods(run, _given_to_torch(call, query, key, value), call.mask(bias, query))
    return out, lse


def run_whole_backward(
    call: WholeCall,
    operands: tuple[Tensor, Tensor, Tensor],
    kept: Kept,
    scale: float,
    bias: Bias | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for one call, as new tensors."""
    out, slope = (_dense_last(call.rows(t)) for t in (kept.output, kept.arrived))
    stats = call.rows(kept.lse[..., None])[..., 0]

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        *given, mask = tensors
        made: tuple[Tensor, ...] = _backward(
            *given, 0.0, call.piece.causal, attn_mask=mask, scale=scale
        )
        return made

    tensors = (slope, *_given_to_torch(call, *operands), out, stats)
    dq, dk, dv = _in_periods(run, tensors, call.mask(bias, operands[0]))
    return dq, dk, dv


def _in_periods(
    run: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Run on ``[b n ...]`` tensors; where `mask` has fewer batch elements, it repeats.

    What repeats is then a batch of many heads, if strides allow, which torch takes as one call.
    """
    batch, period = len(tensors[0]), 1 if mask is None or mask.ndim < 4 else len(mask)
    if mask is None or period in (1, batch):
        return run(*tensors, mask)
    folded = [one for one in (_as_heads(tensor, period) for tensor in tensors) if one is not None]
    if len(folded) < len(tensors):
        starts = range(0, batch, period)
        parts = [run(*(t[k : k + period] for t in tensors), mask) for k in starts]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    heads = tensors[0].shape[1]
    mask = mask.expand(-1, heads, -1, -1).reshape(1, -1, *mask.shape[2:])
    return tuple(made.reshape(batch, -1, *made.shape[2:]) for made in run(*folded, mask))


def _as_heads(tensor: Tensor, period: int) -> Tensor | None:
    """Return ``[(t p) n ...]`` as ``[t (p n) ...]``, p being the period: a view, or None."""
    (batch, heads, *rest), (step, head, *strides) = tensor.shape, tensor.stride()
    if heads == 1:
        head = step
    if step != heads * head:
        return None
    sizes, strides = (batch // period, period * heads, *rest), [period * step, head, *strides]
    return tensor.as_strided(sizes, strides, tensor.storage_offset())


def in_a_row(tensor: Tensor) -> Tensor:
    """Return ``[t n r ...]`` of repetitions as ``[1 n (t r) ...]``: a view of what torch made."""
    turned = tensor.transpose(1, 2)
    return turned.reshape(1, -1, *turned.shape[2:]).transpose(1, 2)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two softmaxes of the same rows over different keys; overwrites the outputs."""
    lse = torch.logaddexp(one[1], other[1])
    left, right = (out.mul_(torch.exp(stats - lse)[..., None]) for out, stats in (one, other))
    return left.add_(right), lse


def is_sound(lse: Tensor) -> bool:
    """Whether the statistics of torch's kernel, where it was given a bias, tell of sound results.

    A bias is not cut off there. Wherever that matters, as where a row's numbers are all -inf
    (whose statistics are 0), infinite or NaN, or so large that they swallow the log of the row's
    sum, the statistics show it.
    """
    low, high = lse.abs().aminmax()
    return bool((low > 0.0) & (high < LARGE))


def fits_torch(kept: Kept, made: Sequence[Tensor | None], biased: bool) -> bool:
    """Whether torch's kernel makes the gradients that are asked for, and well.

    `made` are the tensors of a bias that gradients are asked for.
    """
    if made or kept.grad_lse is not None:  # it knows none of biases, none through the statistics
        return False
    return not biased or is_sound(kept.lse.masked_fill(kept.lse == -torch.inf, 1.0))


def _given_to_torch(
    call: WholeCall, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a call's rows, keys and values."""
    rows, keys, values = call.rows(query), call.keys(key), call.keys(value)
    return _dense_last(rows), _dense_last(keys), _dense_last(values)


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
