"""The compiled kernel on the CPU against the reference. Every kind takes seconds to compile."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, Operands
from attnkit.backends.flex.backend import FlexPlan, _compile
from attnkit.masks import Mask
from attnkit.planner import Request
from tests.agreement import agree, definition


def tensors(
    layout: str = "BSND",
    lengths: tuple[int, int] = (200, 200),
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((lengths[0], heads[0], dims[0]), (lengths[1], heads[1], dims[0]))
    made = []
    for length, count, dim in (*sizes, (lengths[1], heads[1], dims[1])):
        x = torch.randn(1 if layout == "TND" else 2, length, count, dim, generator=generator)
        x = x[0] if layout == "TND" else ak.layouts.get(layout).from_bnsd(x.transpose(1, 2))
        made.append(x.to(dtype))
    return made


def check(operands: list[Tensor], **how: Any) -> None:
    found = ak.attention(*operands, **how, backend="flex")
    assert found.dtype == operands[0].dtype
    agree({"out": found}, *definition(operands, **how))


ONE_KERNEL: dict[str, Mask] = {
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(30),
    "documents": masks.Documents((70, 1, 129)) & masks.Causal(),
    "nothing": masks.Full() - masks.Full(),
    "rows that see nothing": masks.Rows(130, 140) & masks.Causal(),
    "block rows that see nothing": masks.Causal() - masks.Rows(0, 128),
}


def test_masks_of_one_run_per_row_share_one_kernel() -> None:
    operands = tensors()
    check(operands, mask=masks.Full())
    before = counters["stats"]["unique_graphs"]
    for mask in ONE_KERNEL.values():
        check(operands, mask=mask)
    assert counters["stats"]["unique_graphs"] == before


KINDS: dict[str, dict[str, Any]] = {
    "two runs": {"mask": masks.Causal() & (masks.SlidingWindow(30) | masks.Prefix(4))},
    "heads and batch elements that differ": {
        "mask": masks.PerHead([masks.Causal(), masks.SlidingWindow(7)]) & masks.Padding([90, 150])
    },
    "bits": {"mask": masks.Dilated(3) & masks.Causal()},
    "bits per head": {"mask": masks.PerHead([masks.Dilated(3), masks.Dilated(4)])},
    "every bias and a soft-cap": {
        "mask": masks.Causal(),
        "pse": pse.ALiBi(2)
        + pse.SqrtALiBi(2)
        + pse.T5Relative(2, table=torch.linspace(-2, 2, 64).view(32, 2))
        + pse.KeyBias(torch.linspace(-1, 1, 200))
        + pse.Dense(torch.linspace(-1, 1, 80000).view(2, 200, 200).sin(), before_scale=True),
        "softcap": 3.0,
    },
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    check(tensors(), **KINDS[name])


SHAPES: dict[str, dict[str, Any]] = {
    "one query": {"lengths": (1, 300)},
    "more keys": {"lengths": (130, 300)},
    "tiny": {"lengths": (5, 7), "dims": (3, 2)},
    "grouped": {"heads": (4, 2), "dims": (16, 24)},
    "BNSD": {"layout": "BNSD"},
    "BSH": {"layout": "BSH"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    how = SHAPES[name]
    merged = {"num_heads": 2} if how.get("layout") == "BSH" else {}
    layout = how.get("layout", "BSND")
    check(tensors(**how), mask=masks.Causal(), layout=layout, **merged)


@pytest.mark.sweep
def test_packed() -> None:
    lens = ak.SeqLens([50, 100, 0, 50], [40, 120, 10, 50])
    operands = tensors("TND", (200, 220))
    check(operands, mask=masks.Causal(), pse=pse.ALiBi(2), layout="TND", seqlens=lens)


@pytest.mark.sweep
def test_a_compiled_model_keeps_it_as_an_island() -> None:
    x = tensors()[0]
    for mask in (masks.Causal(), masks.SlidingWindow(50), masks.Dilated(2)):
        layer = ak.Attention(2, 16, mask=mask, backend="flex")
        with torch.no_grad():
            layer(x, x, x)
            found = torch.compile(layer)(x, x, x)
        agree({"out": found}, *definition((x, x, x), mask=mask))


def test_a_form_too_many_is_an_error_and_not_an_uncompiled_call() -> None:
    one, other = (_compile(torch.neg, (name,), False) for name in "ab")
    with torch._dynamo.config.patch(recompile_limit=1):
        one(torch.ones(2)), other(torch.ones(3))  # each has its limit
        with pytest.raises(Exception, match="fullgraph"):
            one(torch.ones(3))


# -- what needs no kernel -------------------------------------------------------------------


def codes(*operands: Tensor, **how: Any) -> set[str]:
    with pytest.raises(ak.BackendRefused) as refused:
        ak.plan(*operands, **how, backend="flex")
    return {r.code for r in refused.value.refusals}


def test_refusals() -> None:
    q, k, v = tensors()
    assert codes(q.clone().requires_grad_(), k, v) == {"flex-backward-cpu"}
    assert codes(q, k, v, pse=pse.ALiBi(2, learnable=True)) == {"flex-backward-cpu"}
    assert codes(q, k, v, sink=torch.zeros(2)) == {"flex-sink-cpu"}
    assert codes(q, k, v, dropout=0.1) == {"flex-dropout"}
    assert codes(q.double(), k.double(), v.double()) == {"flex-dtype"}
    assert codes(q[:, :0], k, v) == {"flex-empty"}
    how = {"layout": "TND", "seqlens": ak.SeqLens([100, 100])}
    packed = tensors("TND")
    assert codes(*packed, pse=pse.KeyBias(torch.zeros(100)), **how) == {"flex-packed-bias"}
    everything = {"dropout": 0.1, "sink": torch.zeros(2, requires_grad=True)}
    assert codes(q, k, v, **everything) == {"flex-dropout", "flex-backward-cpu", "flex-sink-cpu"}


def on(device: str, head_dim: int) -> Request:
    x = torch.empty(1, 8, 2, head_dim, device="meta", requires_grad=True)
    return replace(ak.plan(x, x, x, backend="flex").request, device=device)


def test_refusals_on_other_devices() -> None:
    flex = BACKENDS["flex"]
    assert flex.refusals(on("cuda", 16)) == []
    assert [r.code for r in flex.refusals(on("cuda", 8))] == ["flex-head-dim"]
    assert [r.code for r in flex.refusals(on("npu", 16))] == ["flex-device"]


def test_the_log_sum_exp_is_refused_when_looked_at() -> None:
    x = tensors()[0]
    found = ak.attention(x, x, x, backend="flex", return_stats=True)
    for look in ("sum", "lse"):
        with pytest.raises(ak.BackendRefused, match=r"does not return the log-sum-exp.*'tiled'"):
            getattr(found.stats, look)
    meant = ak.attention(x, x, x, backend="reference", return_stats=True)
    torch.testing.assert_close(found.stats.max, meant.stats.max)


def test_tensors_that_could_train_are_taken_where_nothing_trains() -> None:
    x = tensors()[0].requires_grad_()
    with torch.no_grad():
        assert not ak.attention(x, x, x, backend="flex").requires_grad


def test_plans_travel_without_their_block_masks() -> None:
    x = tensors()[0]
    plan = ak.plan(x, x, x, mask=masks.Causal(), backend="flex")
    assert isinstance(plan, FlexPlan)
    assert "tables" in vars(plan)
    assert "backend 'flex'" in plan.explain()
    for twin in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert (twin, hash(twin)) == (plan, hash(plan))
        assert "tables" not in vars(twin)
        found = BACKENDS["flex"].run(twin, Operands(x, x, x)).output
        assert torch.equal(found, BACKENDS["flex"].run(plan, Operands(x, x, x)).output)


def test_a_shape_without_tensors_makes_no_block_mask() -> None:
    x = torch.empty(1, 1 << 20, 2, 64, device="meta")
    plan = ak.plan(x, x, x, mask=masks.SlidingWindow(4096), backend="flex")
    assert isinstance(plan, FlexPlan)
    assert "tables" not in vars(plan)
