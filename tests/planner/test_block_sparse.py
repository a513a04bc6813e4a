"""Full blocks by the block-sparse op, the rest by fused calls: right, priced, or refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import Ascend, Operands, run_plan
from attnkit.backends.emulated import Emulated
from attnkit.geometry import Region
from attnkit.kernel import BlockSparseCall
from attnkit.kernel.block_sparse import OP
from attnkit.planner import Plan, Request
from attnkit.planner.block_sparse import by_blocks
from attnkit.planner.calls import Solution
from attnkit.planner.lower import _merged, lower
from attnkit.planner.orders import restated
from attnkit.planner.search import Search
from tests.agreement import distance
from tests.npu.releases.recorded import RecordedOps

DIM, HEADS = 128, 2
CAUSAL = masks.Causal()
TABLE = masks.Slices([(0, 128, 0, 128, -127, 127), (128, 300, 128, 384, -171, 255)], 300, 384)
MASKS: dict[str, tuple[masks.Mask, int, int]] = {
    "blocks": (masks.BlockCausal(128), 384, 384),
    "a short last block": (masks.BlockCausal(128), 300, 300),
    "an edge": (CAUSAL, 384, 384),
    "first keys and a window": (
        CAUSAL & (masks.Columns(0, 128) | masks.SlidingWindow(200)),
        400,
        400,
    ),
    "rows without a full block between others": (masks.Full() - masks.Rows(140, 150), 384, 256),
    "fewer keys": (CAUSAL, 384, 260),
    "more keys": (CAUSAL, 200, 384),
    "rows that see nothing": (masks.Rows(128, 256), 384, 256),
    "slices": (TABLE, 300, 384),
}


def tensors(
    q_len: int,
    kv_len: int,
    batch: int = 1,
    kv_heads: int = HEADS,
    dim: int = DIM,
    heads: int = HEADS,
) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    sizes = ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    return [
        torch.randn(batch, s, n, dim, generator=made, dtype=torch.float64, requires_grad=True)
        for s, n in sizes
    ]


def request_of(mask: masks.Mask, given: list[Tensor], **how: Any) -> Request:
    return ak.plan(*given, mask=mask, backend="reference", **how).request


def planned(request: Request) -> Plan:
    """The plan with the block-sparse op, whatever it costs, and whatever one call could do."""
    way = by_blocks(request, lambda rest: _merged(rest, Search())[0])
    assert isinstance(way, Solution), way
    plan = Plan("emulated", request, way.launches)
    plan.verify()
    assert plan.calls[0].op == OP
    return plan


def results(plan: Plan, given: list[Tensor], sink: Tensor | None = None) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients through both."""
    found = run_plan(plan, Operands(*given, sink=sink))
    seen = found.stats.lse.masked_fill(found.stats.lse == -torch.inf, 0.0)
    if not found.output.requires_grad:
        return [found.output, seen]
    loss = (
        found.output.sin().sum()
        + (seen.cos() * torch.linspace(0, 1, seen.numel()).view_as(seen)).sum()
    )
    leaves = [*given, *([] if sink is None else [sink])]
    return [found.output, seen, *torch.autograd.grad(loss, leaves)]


def same(plan: Plan, given: list[Tensor], mask: masks.Mask, **more: Any) -> None:
    exact = ak.plan(*given, mask=mask, backend="reference", **more)
    for one, other in zip(results(plan, given, **more), results(exact, given, **more), strict=True):
        assert distance(one, other) < 1e-12


@pytest.mark.parametrize("name", MASKS)
def test_forward_and_backward_are_exact(name: str) -> None:
    mask, *lengths = MASKS[name]
    given = tensors(*lengths)
    same(planned(request_of(mask, given)), given, mask)


@pytest.mark.parametrize("name", ["an edge", "rows that see nothing"])
@pytest.mark.parametrize("dim", [64, 128])
def test_grouped_heads_in_inference(name: str, dim: int) -> None:
    mask, *lengths = MASKS[name]
    with torch.no_grad():
        given = tensors(*lengths, batch=2, heads=4, dim=dim)
        plan = planned(request_of(mask, given))
        assert plan.calls[0].is_packed
        same(plan, given, mask)


def test_grouped_heads_in_training_are_rows_below_each_other() -> None:
    mask, *lengths = MASKS["an edge"]
    given = tensors(*lengths, batch=2, heads=6)
    plan = planned(request_of(mask, given))
    assert "int8[2, 2, 6, 3]" in plan.explain()  # three query heads for each of two key heads
    same(plan, given, mask)


def test_batch_elements_with_masks_of_their_own() -> None:
    mask = masks.PerBatch([CAUSAL, masks.SlidingWindow(300), masks.Columns(0, 100)])
    with torch.no_grad():
        given = tensors(384, 384, batch=3)
        plan = planned(request_of(mask, given))
        assert len(plan.steps[0].blocks) == 2  # the last one has no full block
        same(plan, given, mask)
    rows = masks.PerBatch([masks.Rows(0, 256), masks.Rows(128, 384)])
    given = tensors(384, 256, batch=2)
    same(planned(request_of(rows, given)), given, rows)


def test_a_sink_joins_at_the_merge() -> None:
    mask, *lengths = MASKS["an edge"]
    given, sink = tensors(*lengths), torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    same(planned(request_of(mask, given, sink=sink)), given, mask, sink=sink)


# -- what proves it ----------------------------------------------------------------------------


def with_call(plan: Plan, **changed: Any) -> Plan:
    first, *rest = plan.steps
    return replace(plan, steps=(replace(first, call=replace(first.call, **changed)), *rest))


def test_tampered_plans_are_disproven() -> None:
    mask, *lengths = MASKS["blocks"]
    plan = planned(request_of(mask, tensors(*lengths)))
    call, first = plan.calls[0], plan.steps[0]
    assert isinstance(call, BlockSparseCall)
    (table,) = call.tables
    assert plan.disprove() is None
    more = table | Region.from_rows([[(2, 3)]])
    wrong = {
        "another block": with_call(plan, tables=(more,)),
        "a block less": with_call(plan, tables=(table - Region.from_rows([[(0, 1)]]),)),
        "another scale": with_call(plan, scale=0.5),
        "shorter blocks": with_call(plan, block_shape=(64, 128)),
        "no rows": with_call(plan, tables=()),
        "dropout": with_call(plan, keep_prob=0.5),
        "a mask": with_call(plan, sparse_mode=3),
        "another order of statistics": with_call(plan, softmax_layout="TND"),
        "targets of another table": replace(
            plan, steps=(replace(first, targets=replace(call, tables=(more,)).regions()),)
        ),
    }
    for name, tampered in wrong.items():
        assert tampered.disprove() is not None, name
    full = with_call(plan, tables=(Region.full(*call.grid),))
    assert full.disprove().code == "cover"  # type: ignore[union-attr]


def test_a_plan_that_is_wrong_shows_on_the_emulator() -> None:
    """Planted: a block too many, and a row without a block, which a proof would not let pass."""
    mask, *lengths = MASKS["blocks"]
    given = tensors(*lengths)
    plan = planned(request_of(mask, given))
    (table,) = plan.calls[0].tables  # type: ignore[attr-defined]
    for wrong in (table | Region.from_rows([[(2, 3)]]), table - Region.from_rows([[(0, 1)]])):
        with pytest.raises(AssertionError):
            same(with_call(plan, tables=(wrong,)), given, mask)


# -- refused -----------------------------------------------------------------------------------


def refused(request: Request) -> str:
    way = by_blocks(request, lambda rest: _merged(rest, Search())[0])
    assert isinstance(way, list)
    assert all(one.subject == "full blocks" and one.reason for one in way)
    return way[0].code


def test_what_the_op_lacks_is_a_refusal() -> None:
    given = tensors(384, 384)
    asked = request_of(CAUSAL, given)
    half = [t.detach().half() for t in given]
    assert refused(request_of(CAUSAL, given, pse=pse.ALiBi(HEADS))) == "block-sparse"
    assert refused(replace(asked, dropout=0.1)) == "block-sparse"
    assert refused(request_of(masks.PerHead([CAUSAL, masks.Full()]), given)) == "block-sparse"
    assert refused(request_of(masks.Dilated(2), given)) == "block-sparse"
    assert refused(request_of(masks.SlidingWindow(100), given)) == "no-full-block"
    assert refused(request_of(CAUSAL, [t.float() for t in half])) == "block-sparse-dtype"
    assert refused(request_of(CAUSAL, tensors(300, 384, kv_heads=1))) == "block-sparse-heads"
    assert refused(request_of(CAUSAL, tensors(384, 384, dim=64))) == "block-sparse-head-dim"
    with torch.no_grad():
        assert refused(request_of(CAUSAL, tensors(384, 384, dim=32))) == "block-sparse-head-dim"
    unlike = masks.PerBatch([CAUSAL, masks.Rows(0, 128)])
    assert refused(request_of(unlike, tensors(384, 384, batch=2))) == "block-sparse"
    packed = [torch.zeros(640, HEADS, DIM, dtype=torch.half) for _ in range(3)]
    lengths: dict[str, Any] = {"layout": "TND", "seqlens": ak.SeqLens([256, 384])}
    assert refused(request_of(CAUSAL, packed, **lengths)) == "block-sparse"


# -- chosen by price, where it is installed ------------------------------------------------------


def scattered(count: int) -> Request:
    """Blocks at random: gathering the keys of each row of blocks costs as much as attending."""
    made = torch.Generator().manual_seed(0)
    chosen = torch.rand(count, count, generator=made) < 0.2
    chosen |= torch.eye(count, dtype=torch.bool)
    slices = [
        (128 * i, 128 * i + 128, 128 * j, 128 * j + 128, -128 * count, 128 * count)
        for i, j in chosen.nonzero().tolist()
    ]
    length = 128 * count
    x = torch.empty(1, length, 8, DIM, dtype=torch.bfloat16, device="meta")
    return replace(request_of(masks.Slices(slices, length, length), [x] * 3), device="cpu")


def test_it_is_chosen_by_price_where_it_is_installed_and_told_elsewhere() -> None:
    asked = scattered(16)
    found = Ascend(RecordedOps("26.1.0"), device="cpu").plan(asked)
    assert [call.op for call in found.calls] == [OP]
    assert found.price is not None
    without = Ascend(RecordedOps("7.3.0"), device="cpu").plan(asked)
    assert all(call.op != OP for call in without.calls)
    assert without.price is not None
    assert found.price.nanoseconds < without.price.nanoseconds
    (told,) = (one for one in without.refusals if one.subject == OP)
    assert told.code == "op-version"
    assert "26.0.0" in told.reason
    # The emulator plans for every torch_npu, unless it is told of the op.
    assert lower(asked).steps == without.steps
    assert Emulated(block_sparse=True).plan(asked).steps == found.steps


def test_edges_are_not_looked_into_where_they_cost_too_much() -> None:
    request, asked = request_of(CAUSAL, tensors(384, 384)), []

    def others(rest: Request) -> list[Solution]:
        asked.append(rest)
        return _merged(rest, Search())[0]

    cost = planned(request).price.nanoseconds  # type: ignore[union-attr]
    (told,) = by_blocks(request, others, bound=cost / 2)  # type: ignore[misc]
    assert (told.code, asked) == ("dearer", [])
    assert isinstance(by_blocks(request, others, bound=cost), Solution)  # never too strict
    assert len(asked) == 1


def test_the_backend_runs_it_on_the_recorded_ops() -> None:
    ops = RecordedOps("26.1.0")
    backend = Ascend(ops, device="cpu")
    given = [t.detach().to(torch.bfloat16).requires_grad_() for t in tensors(384, 384)]
    plan = planned(request_of(MASKS["an edge"][0], given))
    output = backend.run(plan, Operands(*given)).output
    output.sum().backward()
    assert ops.calls[0] == OP
    assert ops.calls[-1] == "npu_fusion_attention_grad"
    assert f"{OP}_backward" in ops.calls
    exact = ak.attention(*(t.detach().double() for t in given), mask=CAUSAL, backend="reference")
    assert distance(output, exact) < 0.02


def test_heads_with_tables_of_their_own_are_one_call() -> None:
    """Heads folded into the batch, each with its own table there."""
    tables = [
        [(i, j) for i in range(4) for j in range(4) if (3 * i + j + h) % 5 < 2] for h in (0, 1)
    ]
    each = [
        masks.Slices(
            [(128 * i, 128 * i + 128, 128 * j, 128 * j + 128, -511, 511) for i, j in some], 512, 512
        )
        for some in tables
    ]
    mask, given = masks.PerHead(each), tensors(512, 512)
    request = request_of(mask, given)
    (folded,) = (way for way in restated(request) if isinstance(way, Request))
    plan = replace(planned(folded), request=request, in_order=folded)
    plan.verify()
    assert [call.op for call in plan.calls] == [OP]
    assert len(plan.steps[0].blocks) == HEADS
    same(plan, given, mask)


def test_it_is_told_as_any_other_plan() -> None:
    plan = planned(request_of(CAUSAL, tensors(384, 384)))
    text = plan.explain()
    assert "npu_block_sparse_attention, full blocks" in text
    assert "int8[1, 2, 2, 3], 3 blocks for each head" in text
    arguments = plan.to_dict()["plan"]["calls"][0]["arguments"]
    assert arguments["block_shape"] == [128, 128]
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.disprove() is None
