"""Gradients may come from other calls than the answer: where each key is in one sequence."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends import BACKENDS
from attnkit.backends.base import Operands
from attnkit.planner import Plan
from attnkit.planner.backward import backward_time
from attnkit.planner.calls import Launch
from attnkit.planner.decompose import partings

CHANCE = torch.Generator().manual_seed(0)
TABLE = (torch.rand(32, 32, generator=CHANCE) < 0.15) | torch.eye(32).bool()
TABLE[:, 5] = True
MASKS = {
    "blocks": masks.Blocks(TABLE, 128, 256),
    "causal blocks": masks.Blocks(TABLE, 128, 256, causal=False) & masks.Causal(),
}


def planned(mask: masks.Mask, dropout: float = 0.0, kv_heads: int = 8) -> Plan:
    """Return the plan of a long training step."""
    query = torch.empty(1, 4096, 8, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key = torch.empty(1, 8192, kv_heads, 64, dtype=torch.bfloat16, device="meta")
    return ak.plan(query, key, key, mask=mask, backend="emulated", dropout=dropout)


def by_keys(plan: Plan) -> tuple[Launch, ...]:
    """Return calls that have every key of a plan's request once."""
    return next(way for way in partings(plan.request, by_keys=True) if isinstance(way, tuple))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_keys_that_many_rows_share_stay_where_they_are_in_the_backward(mask: masks.Mask) -> None:
    plan = planned(mask)
    assert plan.back
    plan.verify()
    assert backward_time(plan.back) < backward_time(plan.steps)
    assert sum(len(one.keys) for one in plan.back) <= plan.request.kv_len
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_dropout_draws_the_same_in_both_passes() -> None:
    assert not planned(MASKS["blocks"], dropout=0.1).back


def test_other_calls_that_do_not_make_the_gradients_are_refused() -> None:
    plan = planned(MASKS["blocks"])
    found = replace(plan, back=plan.back[:-1])
    if len(plan.back) > 1:
        assert found.disprove().code == "cover"  # type: ignore[union-attr]
    (one, *rest) = plan.back
    fewer = one.blocks[:-1]
    short = replace(one, blocks=fewer, targets=one.targets[:-1])
    wrong = replace(plan, back=(short, *rest)).disprove()
    assert wrong is not None
    twice = replace(one.blocks[0], rows=one.blocks[0].rows * 2)
    wrong = replace(plan, back=(replace(one, blocks=(twice, *one.blocks[1:])), *rest)).disprove()
    assert wrong is not None
    wrong = replace(plan, request=replace(plan.request, dropout=0.5)).disprove()
    assert wrong is not None


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients_equal_the_references(kv_heads: int) -> None:
    chance = torch.Generator().manual_seed(1)
    table = torch.rand(6, 5, generator=chance) < 0.5
    mask = masks.Blocks(table, 7, 11)
    q, k, v = (
        torch.randn(1, rows, heads, 8, dtype=torch.float64, generator=chance, requires_grad=True)
        for rows, heads in ((42, 2), (55, kv_heads), (55, kv_heads))
    )
    plan = ak.plan(q, k, v, mask=mask, backend="emulated")
    gathered = [plan.solution, *plan.alternatives]
    forth = next(one for one in gathered if one.launches[0].partial)
    back = by_keys(plan)
    own = replace(plan, steps=forth.launches, back=back)
    own.verify()
    out, stats = BACKENDS["emulated"].run(own, Operands(q, k, v))
    right, lse = ak.attention(q, k, v, mask=mask, backend="reference", return_stats=True)
    torch.testing.assert_close(out, right, rtol=0, atol=1e-10)
    seen = lse.lse.isfinite()
    slopes = [torch.cos(right.detach()), torch.sin(lse.lse.detach()).masked_fill(~seen, 0.0)]
    mine, theirs = (
        torch.autograd.grad([a, b], (q, k, v), slopes)
        for a, b in ((out, stats.lse), (right, lse.lse))
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
