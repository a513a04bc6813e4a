"""Full blocks by the genuine ``npu_block_sparse_attention``, the rest by fused calls, merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends import BACKENDS, Operands
from attnkit.kernel.block_sparse_op import BACKWARD, lacks_block_sparse
from attnkit.planner import Plan
from attnkit.planner.block_sparse import by_blocks
from attnkit.planner.calls import Solution
from attnkit.planner.lower import _merged
from attnkit.planner.search import Search
from tests.agreement import Results, agree
from tests.npu.device import DEVICE

MASKS = {
    "blocks": masks.BlockCausal(128),
    "window and first keys": masks.SlidingWindow(200) | (masks.Causal() & masks.Columns(0, 128)),
    "rows without a full block": masks.Rows(130, 400) & masks.Causal() - masks.Columns(200, 210),
}
LENGTH, HEADS, DIM = 400, 2, 128


def tensors(kv_heads: int = HEADS, dim: int = DIM, length: int = LENGTH) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, n, dim, generator=made) for n in (HEADS, kv_heads, kv_heads)]


def plan_of(mask: masks.Mask, given: list[torch.Tensor], training: bool = True) -> Plan:
    """The plan of the ascend backend that calls the op, whatever it costs."""
    with torch.set_grad_enabled(training):
        request = ak.plan(*given, mask=mask, backend="ascend").request
    way = by_blocks(request, lambda rest: _merged(rest, Search())[0])
    assert isinstance(way, Solution), way
    return Plan("ascend", request, way.launches)


def attended(plan: Plan, given: list[torch.Tensor], training: bool = True) -> Results:
    with torch.set_grad_enabled(training):
        output, stats = BACKENDS[plan.backend].run(plan, Operands(*given))
    found = {"out": output.detach().cpu(), "lse": stats.lse.detach().cpu()}
    if training:
        grads = torch.autograd.grad(output, given, output.detach())
        found |= {f"d{name}": g.cpu() for name, g in zip("qkv", grads, strict=True)}
    return found


def compared(
    mask: masks.Mask, given: list[torch.Tensor], dtype: torch.dtype, training: bool
) -> None:
    def leaves(device: str, kind: torch.dtype) -> list[torch.Tensor]:
        # Low-precision numbers in every case, so that the definition sees what the device sees.
        return [t.to(dtype).to(kind).to(device).requires_grad_(training) for t in given]

    inputs = leaves("npu", dtype)
    plan = plan_of(mask, inputs, training)
    plan.verify()
    exact, low = (
        attended(ak.plan(*some, mask=mask, backend="reference"), some, training)
        for some in (leaves("cpu", torch.float64), leaves("cpu", dtype))
    )
    with DEVICE.recording() as calls:
        found = attended(plan, inputs, training)
    ops = [call["op"] for call in calls]
    assert ops[0] == "aclnnBlockSparseAttention"
    assert ("aclnnBlockSparseAttentionGrad" in ops) == training
    agree(found, exact, low)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_forward_and_backward_through_torch_npu(name: str, dtype: torch.dtype) -> None:
    compared(MASKS[name], tensors(), dtype, training=True)


@pytest.mark.parametrize("name", MASKS)
def test_grouped_heads_in_inference(name: str) -> None:
    compared(MASKS[name], tensors(kv_heads=1, dim=64), torch.float16, training=False)


def test_grouped_heads_in_training() -> None:
    """CANN 9.0's backward takes none: query heads of a key head are rows below each other."""
    compared(masks.BlockCausal(128), tensors(1, length=384), torch.float16, training=True)


def test_the_genuine_ops_are_what_the_backend_asks_for() -> None:
    assert lacks_block_sparse(torch.ops.npu, training=True) is None
    known = {one.name for one in getattr(torch.ops.npu, BACKWARD).default._schema.arguments}
    assert {"d_out", "attention_out", "softmax_lse", "block_shape", "scale_value"} <= known


def test_a_block_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the table that is sent has a block which the plan does not have."""
    from attnkit.kernel import block_sparse_op

    genuine = block_sparse_op._table

    def wrong(*args: Any) -> torch.Tensor:
        found = genuine(*args).clone()
        found[:, :, 0, -1] = 1
        return found

    monkeypatch.setattr(block_sparse_op, "_table", wrong)
    with pytest.raises(AssertionError, match="is off by"):
        compared(MASKS["blocks"], tensors(), torch.float16, training=True)
