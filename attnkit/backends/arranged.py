"""Tokens moved around the calls of a plan: positions sorted, or heads folded into the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from attnkit.backends.base import AttentionOutput, Operands, Stats
from attnkit.constants import constant
from attnkit.planner import Plan, Request
from attnkit.planner.folded import Folded
from attnkit.planner.orders import Positions

__all__ = ["Run", "arranged"]

Run = Callable[[Plan, Operands], AttentionOutput]


def arranged(run: Run, plan: Plan, inner: Request, operands: Operands) -> AttentionOutput:
    """Move the tokens, run the plan of the restated request there, and put its rows back."""
    request, folds = plan.request, isinstance(inner.mask, Folded)
    if plan.positions is not None:
        operands = _sorted(request, plan.positions, operands)
    answer = run(plan.inner, _apart(request, inner, operands) if folds else operands)
    answer = _back(request, inner, answer) if folds else answer
    return answer if plan.positions is None else _unsorted(request, plan.positions, answer)


# -- heads as batch elements -----------------------------------------------------------------


def _apart(request: Request, inner: Request, operands: Operands) -> Operands:
    """Return operands with heads in the batch; sinks become one per row of the packed tokens.

    Key heads are repeated where the query heads of one have masks of their own.
    """
    query, key, value = operands.by_head(request)
    each, (query_to, key_to) = inner.num_heads, _PATTERNS[inner.layout_of.packed]
    times = request.num_heads // (each * request.num_kv_heads)
    sink = operands.sink
    if sink is not None:
        batch, rows = query.shape[0], query.shape[2]
        sink = repeat(sink, "(n e) -> (b n t) e", e=each, b=batch, t=rows)
    return replace(
        operands,
        query=rearrange(query, f"b (n e) t d -> {query_to}", e=each),
        key=repeat(key, f"b n t d -> {key_to}", e=1, m=times),
        value=repeat(value, f"b n t d -> {key_to}", e=1, m=times),
        sink=sink,
    )


# Where a query and a key of ``b n t d`` go; packed tokens have b = 1.
_PATTERNS = {
    False: ("(b n) t e d", "(b n m) t e d"),
    True: ("(b n t) e d", "(b n m t) e d"),
}


def _back(request: Request, inner: Request, answer: AttentionOutput) -> AttentionOutput:
    """Return an answer with its heads beside each other again."""
    layout, stats = request.layout_of, answer.stats
    packed, count = layout.packed, request.num_heads // inner.num_heads
    whole = rearrange(
        answer.output, f"{_PATTERNS[packed][0]} -> b (n e) t d", n=count, t=request.q_len
    )
    rows = "(n t) e -> t (n e)" if packed else "(b n) e t -> b (n e) t"
    lse, peak = (rearrange(t, rows, n=count) for t in (stats.lse, stats.max))
    return AttentionOutput(layout.restore(whole), Stats(lse, peak))


# -- positions in another order --------------------------------------------------------------


def _sorted(request: Request, positions: Positions, operands: Operands) -> Operands:
    """Return operands with their tokens in another order."""
    axis = request.layout_of.length_axis
    queries, keys = _orders(positions, operands.query.device)
    key, value = (_moved(t, axis, *keys) for t in (operands.key, operands.value))
    return replace(operands, query=_moved(operands.query, axis, *queries), key=key, value=value)


def _unsorted(request: Request, positions: Positions, answer: AttentionOutput) -> AttentionOutput:
    """Return an answer with its rows where they were."""
    order, back = _orders(positions, answer.output.device)[0]
    axis, rows = request.layout_of.length_axis, 0 if request.seqlens is not None else 2
    lse, peak = (_moved(t, rows, back, order) for t in (answer.stats.lse, answer.stats.max))
    return AttentionOutput(_moved(answer.output, axis, back, order), Stats(lse, peak))


def _moved(tensor: Tensor, axis: int, order: Tensor, back: Tensor) -> Tensor:
    """Take the places of an axis in `order`, whose inverse is `back`."""
    found: Tensor = _Moved.apply(tensor, axis, order, back)  # type: ignore[no-untyped-call]
    return found


class _Moved(torch.autograd.Function):
    """Every place of an axis in another order; the gradient is taken in the order back.

    Nothing is summed there, as it would be for indices that may occur twice.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: int, order: Tensor, back: Tensor) -> Tensor:
        """Take the places."""
        ctx.way = axis, back, order
        return tensor.index_select(axis, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Take them back."""
        return _moved(grad, *ctx.way), None, None, None


@constant
def _orders(positions: Positions, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return where the queries and the keys come from, each with the way back."""
    found = []
    for ranges in positions.ranges:
        order = torch.tensor([i for part in ranges for i in part], dtype=torch.int64)
        found.append((order.to(device), order.argsort().to(device)))
    return tuple(found)
