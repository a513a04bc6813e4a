"""Biases as channels of query and key, and as logits at the merge: the tensors of a `Route`.

Everything here is differentiable, so the gradients of query and key that the kernel writes
become those of the bias. Where a value is split into pieces of the query's dtype, its gradient
comes through the first: all pieces meet the same positions, and it is the first's to move. Or
it comes through separate channels (anchors), of ``value - value.detach()``, which is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from einops import rearrange, repeat
from torch import Tensor

from attnkit.arguments import Anchor, anchor
from attnkit.backends.base import AttentionOutput, Operands, stats_dtype
from attnkit.backends.biases import numbers_of
from attnkit.constants import constant
from attnkit.planner import Plan, Request
from attnkit.planner.routes import BASE, Channels, Route
from attnkit.pse import Linear, PerKey, Pse, Stepped, Sum
from attnkit.pse.structure import sum_of_steps

__all__ = ["Leveled", "run_on_route"]

# float16 ends at 65,504, so a channel that holds positions times slopes has a factor apart.
_UNIT = 256.0


@dataclass(frozen=True, eq=False)
class Leveled(Operands):
    """Operands with the logits ``[row n]`` that the calls of a level add at the merge."""

    logits: Tensor | None = None


def run_on_route(
    run: Callable[[Plan, Operands], AttentionOutput], plan: Plan, route: Route, operands: Operands
) -> AttentionOutput:
    """Run the calls of a plan on query and key with the channels of its biases."""
    request, layout = plan.request, plan.request.layout_of
    parts = operands.pse.parts if operands.pse is not None else ()
    wide = stats_dtype(request.dtype)
    query = [layout.to_tnd(operands.query, request.num_heads)]
    key = [layout.to_tnd(operands.key, request.num_kv_heads)]
    for one in route.channels:
        if one.width:
            values = _values(parts, one, wide, operands.query.device)
            u, w = _channels(request, one, values / request.scale)
            query.append(u.to(operands.query.dtype))  # a share's is wider, and calls round
            key.append(w.to(operands.key.dtype))
    logits = None
    if route.levels:  # nothing that is added at the merge must be -inf
        logits = _finite(_values(parts, route.stepped, wide, operands.query.device), math.inf)
    batch = 1 if layout.packed else request.batch
    widened = Leveled(
        layout.from_tnd(torch.cat(query, -1), batch),
        layout.from_tnd(torch.cat(key, -1), batch),
        operands.value,
        _rest(parts, route),
        operands.sink,
        logits=logits,
    )
    return run(plan.inner, widened)


def _values(
    parts: tuple[Pse, ...], one: Channels, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the small tensor that a bias follows from: several tables as their sum, by step."""
    summed = [parts[part] for part in one.parts]
    tables = [numbers_of(part, dtype, device) for part in summed]
    if len(tables) == 1:
        return tables[0]
    known = tuple(part.structure for part in summed if isinstance(part.structure, Stepped))
    return reduce(add, map(torch.Tensor.__getitem__, tables, _rows_of_each(known, device)))


@constant
def _rows_of_each(structures: tuple[Stepped, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return the rows that each table has on the steps of a sum."""
    return tuple(torch.tensor(rows, device=device) for rows in sum_of_steps(structures)[1])


def _rest(parts: tuple[Pse, ...], route: Route) -> Pse | None:
    taken = {part for one in route.channels for part in one.parts}
    rest = tuple(part for k, part in enumerate(parts) if k not in taken)
    return None if not rest else rest[0] if len(rest) == 1 else Sum(rest)


def _channels(request: Request, one: Channels, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels ``[t n r]`` of the query tokens and of the key tokens.

    `values` are those of the bias, over the scale that the kernel multiplies with.
    """
    if isinstance(one.structure, Linear):
        return _linear(request, one, one.structure, values)
    if isinstance(one.structure, PerKey):
        return _per_key(request, one, values)
    return _stepped(request, one, one.structure, values)


def _linear(
    request: Request, one: Channels, structure: Linear, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Write ``slope * (j - i')`` as ``sum_d slope 256**d * digit_d(j)  -  slope i' * 1``.

    Two channels where the dtype holds positions; else one for each piece of the slope and
    digit of j, and one for each piece of ``slope i'``; and those that a gradient is read from.
    """
    rows, keys = _token_positions(request.sequences, structure.align, slopes.device)
    signed = one.sign * slopes
    if one.anchors:
        traced, signed = signed - signed.detach(), signed.detach()
    low = one.pieces > 1
    unit = _UNIT if low else 1.0
    per_row = rows.to(slopes.dtype)[:, None] * (signed / unit)
    u = [rearrange(piece, "t n -> t n 1") for piece in _summands(-per_row, one, request.dtype)]
    w = [torch.full_like(keys, unit, dtype=slopes.dtype) for _ in u]
    for digit in range(one.digits):
        place = BASE**digit
        counted = keys // place if digit == one.digits - 1 else keys // place % BASE
        # The place is the query's: where it was the key's, so would be the gradient of u.
        for piece in _summands(signed * place, one, request.dtype):
            u.append(repeat(piece, "n -> t n 1", t=len(rows)))
            w.append(counted.to(slopes.dtype))
    if one.anchors:
        own, offset = _nearest(request.sequences, structure.align, one.anchors, slopes.device)
        u.append(_UNIT * rearrange(traced, "n -> n 1") * rearrange(own, "t a -> t 1 a"))
        u.append(rearrange(traced * offset, "t n -> t n 1"))
        w += [((keys - anchor) / _UNIT).to(slopes.dtype) for anchor in one.anchors]
        w.append(torch.ones_like(w[0]))
    per_key = repeat(torch.stack(w, -1), "t r -> t n r", n=request.num_kv_heads)
    return torch.cat(u, -1), per_key


def _per_key(request: Request, one: Channels, values: Tensor) -> tuple[Tensor, Tensor]:
    """Write a number per key as a channel for each query head that shares the key's head."""
    full = values[(None,) * (3 - values.ndim)]
    lengths = request.sequences[0][1]
    tokens = rearrange(full.expand(request.batch, -1, lengths), "b n j -> (b j) n")
    if one.group == 1:
        tokens = tokens.expand(-1, request.num_kv_heads)
    pieces = torch.stack(_summands(tokens, one, request.dtype), -1)
    w = rearrange(pieces, "t (n g) p -> t n (g p)", n=request.num_kv_heads)
    own = torch.eye(one.group, dtype=values.dtype, device=values.device)
    rows = sum(q_len for q_len, _ in request.sequences)
    heads = request.num_heads // one.group
    return repeat(own, "h g -> t (n h) (g p)", t=rows, n=heads, p=one.pieces), w


def _stepped(
    request: Request, one: Channels, structure: Stepped, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Write ``f(j - i')`` for m distances as ``sum_b f(distance at which j = b mod m) [j = b]``."""
    lo, hi = one.span or (0, -1)
    count = hi - lo + 1
    rows, keys = _token_positions(request.sequences, structure.align, table.device)
    # Selected, not indexed: threads add up the gradient of an index in any order.
    entries = table.index_select(0, _rows_of(structure, lo, hi, table.device))
    residue = torch.arange(count, device=table.device)
    # Which distance, counted from lo, leads from a query in residue class a to keys in class b.
    turned = (residue - residue[:, None] - lo) % count
    summands = (p.index_select(0, turned.flatten()) for p in _summands(entries, one, request.dtype))
    classes = [rearrange(p, "(a b) n -> n a b", a=count) for p in summands]
    per_class = rearrange(classes, "p n a b -> a n (p b)")
    u = per_class.index_select(0, rows % count)
    hot = (keys[:, None] % count == residue).to(table.dtype)
    return u, repeat(hot, "t b -> t n (p b)", n=request.num_kv_heads, p=one.pieces)


@constant
def _nearest(
    sequences: tuple[tuple[int, int], ...],
    align: Anchor,
    anchors: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return which anchor is nearest to each query [t a], and how far it lies behind it [t 1]."""
    rows, _ = _token_positions(sequences, align, device)
    ahead = torch.tensor(anchors, device=device) - rows[:, None]
    which = ahead.abs().argmin(-1, keepdim=True)
    there = torch.arange(len(anchors), device=device) == which
    return there.float(), ahead.gather(-1, which).float()


def _summands(values: Tensor, one: Channels, dtype: torch.dtype) -> list[Tensor]:
    """Split values into numbers of a dtype that add up to them; the first has the gradient.

    Values that are too large for that are cut off: -inf says "never", and would be NaN where
    another channel multiplies it with 0.
    """
    top = torch.finfo(dtype).max
    values = _finite(values, one.pieces * top)
    if one.pieces == 1:
        return [values]
    # Exactly the rounded values, with the gradient of values that were not.
    first = values + (values.clamp(-top, top).to(dtype).to(values.dtype) - values).detach()
    pieces, left = [first], (values - first).detach()
    for _ in range(one.pieces - 1):
        pieces.append(left.clamp(-top, top).to(dtype).to(values.dtype))
        left = left - pieces[-1]
    return pieces


def _finite(values: Tensor, most: float) -> Tensor:
    """Cut values off where sums of a few of them, or they themselves, would not be finite."""
    most = min(most, torch.finfo(values.dtype).max / 8)
    return values.clamp(-most, most)


@constant
def _rows_of(structure: Stepped, lo: int, hi: int, device: torch.device) -> Tensor:
    """Return the row of the table for each distance."""
    steps = structure.steps(lo, hi)
    return torch.tensor([r for a, b, r in steps for _ in range(a, b + 1)], device=device)


@constant
def _token_positions(
    sequences: tuple[tuple[int, int], ...], align: Anchor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the position ``i'`` of each query token and that of each key token."""
    shifts = [anchor(align, *lengths) for lengths in sequences]
    rows = [
        torch.arange(at, at + q, device=device)
        for at, (q, _) in zip(shifts, sequences, strict=True)
    ]
    keys = [torch.arange(kv, device=device) for _, kv in sequences]
    return torch.cat(rows), torch.cat(keys)
