"""A plan takes no more memory than is allowed: work is split over rows, then over heads."""

from __future__ import annotations

import pytest
import torch

import attnkit as ak
from attnkit import masks

TABLE = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
MASK = masks.Blocks(TABLE | torch.eye(8).bool(), 16, 16)


def operands() -> list[torch.Tensor]:
    """Return query, key and value with grouped heads."""
    chance = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, 128, heads, 16, dtype=torch.float64, generator=chance, requires_grad=True)
        for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("limit", [100_000, 70_000, 35_000])
def test_no_call_takes_more_than_is_allowed(limit: int) -> None:
    q, k, v = operands()
    free = ak.plan(q, k, v, mask=MASK, backend="emulated").price
    plan = ak.plan(q, k, v, mask=MASK, backend="emulated", memory_limit=limit)
    plan.verify()
    assert free is not None
    assert plan.price is not None
    assert plan.price.peak_bytes <= limit < free.peak_bytes
    assert len(plan.steps) > 1
    split = {step.heads for step in plan.steps} != {None}
    assert split == (limit < 100_000)
    found, right = (
        ak.attention(q, k, v, mask=MASK, backend=name, memory_limit=limit)
        for name in ("emulated", "reference")
    )
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)
    slope = torch.cos(right.detach())
    mine, theirs = (torch.autograd.grad(out, (q, k, v), slope) for out in (found, right))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_limit_that_nothing_meets_is_refused_with_what_each_way_takes() -> None:
    q, k, v = operands()
    with pytest.raises(ak.BackendRefused, match="bytes, and memory_limit is 1,000"):
        ak.plan(q, k, v, mask=MASK, backend="emulated", memory_limit=1000)
    with pytest.raises(ak.CompositionError, match="memory_limit"):
        ak.Attention(4, 16, memory_limit=0)


def test_a_limit_is_kept_by_modules_and_configurations() -> None:
    text = "{num_heads: 4, head_dim: 16, memory_limit: 40000, mask: Causal()}"
    layer = ak.AttentionConfig.from_yaml(text).build()
    assert layer.composition.memory_limit == 40_000
    assert "memory_limit=40000" in repr(layer)
