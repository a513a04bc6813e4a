"""Tokens moved around the calls of a plan: positions sorted, or heads folded into the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from attnkit.backends.base import AttentionOutput, Operands, Stats
from attnkit.constants import constant
from attnkit.planner import Plan, Request
from attnkit.planner.folded import Folded
from attnkit.planner.orders import residue_order

__all__ = ["Run", "arranged"]

Run = Callable[[Plan, Operands], AttentionOutput]


def arranged(run: Run, plan: Plan, inner: Request, operands: Operands) -> AttentionOutput:
    """Move the tokens, run the plan of the restated request there, and put its rows back."""
    if isinstance(inner.mask, Folded):
        return _back(plan.request, inner, run(plan.inner, _apart(plan.request, inner, operands)))
    return _sorted(run, plan, inner, operands)


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


def _sorted(run: Run, plan: Plan, inner: Request, operands: Operands) -> AttentionOutput:
    """Sort the tokens, run the plan there, and put its rows back."""
    axis = inner.layout_of.length_axis
    queries, keys = (_positions(order, operands.query.device) for order in residue_order(inner))
    query = operands.query.index_select(axis, queries)
    key, value = (t.index_select(axis, keys) for t in (operands.key, operands.value))
    out, stats = run(plan.inner, replace(operands, query=query, key=key, value=value))
    back = queries.argsort()
    rows = 0 if inner.seqlens is not None else 2
    lse, peak = (stat.index_select(rows, back) for stat in (stats.lse, stats.max))
    return AttentionOutput(out.index_select(axis, back), Stats(lse, peak))


@constant
def _positions(order: tuple[range, ...], device: torch.device) -> Tensor:
    return torch.tensor([i for part in order for i in part], device=device)
