"""Pieces that torch's own fused CPU kernel computes: rectangles, causal squares, small masks.

The raw operator has traps, all of which the schedule keeps away from: it divides by zero on
empty tensors, reads a last axis whose stride is not 1 wrongly, answers 0 for the statistics
of a row without keys, and masks a causal square before it scales it, which turns -inf into inf
or NaN unless the scale is above 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.backends.tiled.patches import patch
from attnkit.backends.tiled.schedule import Lane, Pattern, Schedule, Whole
from attnkit.backends.tiled.tiles import head_tiles

__all__ = ["Part", "in_a_row", "parts", "run_whole", "run_whole_backward", "sole_part"]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """One call of the kernel: batch elements (or repetitions), heads, rows and keys."""

    batches: slice
    heads: slice
    key_heads: slice
    row_range: slice
    key_range: slice
    causal: bool
    pattern: Pattern | None = None
    before: int = 0
    times: int = 1
    step: int = 0
    all_rows: bool = False
    all_keys: bool = False

    @property
    def calls(self) -> tuple[Part, ...]:
        """One call, or two: over the keys before the piece, and over those of the piece."""
        if not self.before:
            return (self,)
        start = self.key_range.start
        left = self._replace(key_range=slice(start - self.before, start), causal=False, before=0)
        return left, self._replace(before=0)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the part's rows of a ``[b n s d]`` tensor, a view."""
        if self.all_rows and self.times == 1:
            return tensor
        return self._at(tensor[self.batches, self.heads, self.row_range])

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the part's keys of a ``[b n s d]`` tensor, a view."""
        if self.all_keys and self.times == 1:
            return tensor
        return self._at(tensor[self.batches, self.key_heads, self.key_range])

    def _at(self, first: Tensor) -> Tensor:
        """Put the repetitions, `step` positions apart, in the place of the batch."""
        if self.times == 1:
            return first
        _, head, row, dim = first.stride()
        sizes = (self.times, *first.shape[1:])
        return first.as_strided(sizes, (self.step * row, head, row, dim), first.storage_offset())


def parts(lane: Lane, item: Whole, group: int) -> Iterator[Part]:
    """Yield the calls that a piece takes: repetitions share one where there is one batch row."""
    together = lane.batches[1] - lane.batches[0] == 1
    row, key = lane.origin[0] + item.row, lane.origin[1] + item.key
    for key_head, key_heads, member, members in head_tiles(*lane.heads, group, lane.heads[1]):
        head = key_head * group + member
        for repeat in range(1 if together else item.times):
            move = repeat * item.step
            yield Part(
                slice(*lane.batches),
                slice(head, head + key_heads * members),
                slice(key_head, key_head + key_heads),
                slice(row + move, row + move + item.rows),
                slice(key + move, key + move + item.keys),
                item.causal,
                item.pattern,
                item.before,
                item.times if together else 1,
                item.step,
            )


@lru_cache(maxsize=256)
def sole_part(schedule: Schedule, sizes: tuple[int, int, int, int], group: int) -> Part | None:
    """Return the one call that computes everything, if there is one.

    `sizes` are those of the request: batch elements, query heads, rows and keys.
    """
    batch, heads, rows, keys = sizes
    if len(schedule.lanes) != 1:
        return None
    lane = schedule.lanes[0]
    if lane.strays or lane.mixes:
        return None
    if lane.batches != (0, batch) or lane.heads != (0, heads) or len(lane.items) != 1:
        return None
    item = lane.items[0]
    if not isinstance(item, Whole) or item.rows * item.times != rows:
        return None
    if item.times > 1 and (batch > 1 or item.step != item.rows):
        return None
    (part,) = parts(lane, item, group)
    closed = item.times == 1 or item.step == item.keys
    return part._replace(all_rows=True, all_keys=closed and item.keys * item.times == keys)


def run_whole(
    part: Part, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the log denominators of a part's rows, as new tensors."""
    if not part.before:
        tensors = _operands(part, query, key, value)
        mask = None if part.pattern is None else _mask(part, query)
        out, lse = _forward(*tensors, 0.0, part.causal, attn_mask=mask, scale=scale)
        return out, lse
    made = [run_whole(call, query, key, value, scale) for call in part.calls]
    return _merged(*made)


def in_a_row(tensor: Tensor) -> Tensor:
    """Return ``[t n r ...]`` of repetitions as ``[1 n (t r) ...]``: a view of what torch made."""
    turned = tensor.transpose(1, 2)
    return turned.reshape(1, -1, *turned.shape[2:]).transpose(1, 2)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two softmaxes of the same rows over different keys; overwrites the outputs."""
    lse = torch.logaddexp(one[1], other[1])
    shares = (torch.exp(part[1] - lse)[..., None] for part in (one, other))
    left, right = (part[0].mul_(share) for part, share in zip((one, other), shares, strict=True))
    return left.add_(right), lse


def run_whole_backward(
    part: Part,
    grad: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for a part of one call, as new tensors."""
    out, slope = _dense_last(part.rows(output)), _dense_last(part.rows(grad))
    stats = part.rows(lse[..., None])[..., 0]
    tensors = _operands(part, *operands)
    mask = _mask(part, output)
    dq, dk, dv = _backward(
        slope, *tensors, out, stats, 0.0, part.causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def _mask(part: Part, like: Tensor) -> Tensor | None:
    return None if part.pattern is None else patch(part.pattern, like.dtype, like.device)


def _operands(part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    rows, keys, values = part.rows(query), part.keys(key), part.keys(value)
    return _dense_last(rows), _dense_last(keys), _dense_last(values)


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
