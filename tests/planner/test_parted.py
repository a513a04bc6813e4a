"""Unions with parts in orders of their own: a band and every step-th key, merged, and no more."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends.base import BACKENDS, Operands
from attnkit.errors import KernelContractError
from attnkit.masks import Dilated
from attnkit.planner import Plan, Request, read_request
from attnkit.planner.calls import Tokens
from attnkit.planner.lower import in_other_order
from attnkit.planner.parted import Parted, parted
from attnkit.planner.request import Composition
from attnkit.planner.search import Search
from attnkit.planner.sorting import Sorted

CAUSAL = masks.Causal()
UNIONS: list[masks.Mask] = [
    CAUSAL & (masks.SlidingWindow(4) | Dilated(4)),
    masks.Band(1, 1) | Dilated(3),
    CAUSAL & (masks.SlidingWindow(4) | Dilated(3, align="top_left")) & masks.Rows(1, None),
    masks.Band(2, 0) | (Dilated(2) & masks.Columns(0, 5)) | masks.Columns(3, 4),
    CAUSAL & (masks.SlidingWindow(5) | Dilated(4)) & masks.PerBatch([CAUSAL, masks.Band(9, 0)]),
]


def request_of(mask: masks.Mask, *tensors: torch.Tensor, **given: Any) -> Request:
    layout = given.pop("layout", "BSND")
    return read_request(Composition(mask=mask, layout=layout), *tensors[:3], **given)


@pytest.mark.parametrize("mask", UNIONS[:4], ids=str)
def test_the_parts_are_disjoint_and_their_union_is_the_mask(mask: masks.Mask) -> None:
    found = 0
    for q_len, kv_len in product(range(1, 9), range(1, 9)):
        q, k = torch.empty(1, q_len, 1, 8), torch.empty(1, kv_len, 1, 8)
        other = parted(request_of(mask, q, k, k))
        if other is None:
            continue
        found += 1
        own = other.mask
        assert isinstance(own, Parted)
        near, far = (one.materialize(q_len, kv_len)[0, 0] for one in (own.near, own.far.mask))
        assert not (near & far).any()
        assert torch.equal(near | far, mask.materialize(q_len, kv_len)[0, 0])
        order = own.far.order(q_len, kv_len)
        assert order is not None
        rows, keys = ([i for part in side for i in part] for side in (order.rows, order.keys))
        there = masks.Slices.of(order.region, q_len, kv_len).materialize(q_len, kv_len)[0, 0]
        assert torch.equal(far[rows][:, keys], there)
    assert found > 20


def parted_plan(request: Request) -> Plan:
    """Return the plan of the parts, whatever it costs."""
    other = parted(request)
    assert other is not None
    plan = replace(in_other_order(request, other, Search()), backend="emulated")
    plan.verify()
    assert plan.in_order is other
    return plan


@pytest.mark.parametrize("layout", ["BSND", "SBH", "TND"])
@pytest.mark.parametrize("mask", UNIONS, ids=str)
def test_parts_that_merge_equal_the_reference(layout: str, mask: masks.Mask) -> None:
    torch.manual_seed(0)
    lens = ak.SeqLens([17, 20], [20, 20]) if layout == "TND" else None
    shapes = {
        "BSND": ((2, 17, 4, 4), (2, 20, 2, 4)),
        "SBH": ((17, 2, 16), (20, 2, 8)),
        "TND": ((37, 4, 4), (40, 2, 4)),
    }[layout]
    sizes = (shapes[0], shapes[1], shapes[1], (4,))
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes]
    heads = {"num_heads": 4, "num_kv_heads": 2, "seqlens": lens, "sink": leaves[3]}
    request = request_of(mask, *leaves, layout=layout, **heads)
    plan = parted_plan(request)
    dy = torch.randn(shapes[0], dtype=torch.float64)
    answers = []
    for one in (plan, Plan("reference", request)):
        out = BACKENDS[one.backend].run(one, Operands(*leaves[:3], sink=leaves[3]))
        loss = (out.output * dy).sum() + out.stats.lse.square().sum()
        answers.append([out.output, out.stats.lse, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_strided_mask_of_sparse_transformers_needs_no_full_mask() -> None:
    """One call, a tenth of the price of a full mask, and rows are merged at most twice."""
    x = torch.empty(1, 16384, 8, 64, device="meta", dtype=torch.bfloat16)
    mask = CAUSAL & (masks.SlidingWindow(128) | Dilated(128))
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    assert plan.in_order is not None
    assert isinstance(plan.in_order.mask, Parted)
    assert [call.sparse_mode for call in plan.calls] == [4]
    assert plan.price is not None
    assert plan.price.nanoseconds < 600_000
    (parts,) = plan.by_heads
    assert not parts.once
    (launch,) = parts.launches
    assert len(launch.queries.layers) == 2
    report = " ".join(plan.explain().split())
    assert "two regions, of tokens as they stand and of sorted ones" in report
    assert "rows are answered up to 2 times" in report


def test_layers_of_steps_hold_every_token_once() -> None:
    tokens = Tokens((range(6), range(0, 6, 2), range(5, 0, -2), range(1, 3)))
    assert tokens.span is None
    assert Tokens((range(0, 8, 2),)).span is None
    places = [place for one in tokens.ranges for place in one]
    seen = []
    for there, own in tokens.layers:
        found = [place for one in there.ranges for place in one]
        assert len(set(found)) == len(found)
        assert found == [places[k] for one in own.ranges for k in one]
        seen += [k for one in own.ranges for k in one]
    assert sorted(seen) == list(range(len(places)))
    assert [len(there.ranges) for there, _ in tokens.layers] == [1, 2, 1]


def test_tampered_parts_are_refused() -> None:
    x = torch.empty(1, 16, 2, 8, dtype=torch.float64)
    plan = parted_plan(request_of(UNIONS[0], x, x, x))
    inner = plan.in_order
    assert inner is not None
    mask = inner.mask
    assert isinstance(mask, Parted)
    overlapping = replace(mask, far=Sorted(CAUSAL & Dilated(4)))
    for other in (
        replace(plan, in_order=None),
        replace(plan, in_order=replace(inner, mask=overlapping)),
        replace(plan, in_order=replace(inner, mask=replace(mask, near=CAUSAL))),
        replace(plan, request=replace(plan.request, mask=CAUSAL)),
        replace(plan, steps=tuple(replace(step, partial=False) for step in plan.steps)),
        replace(plan, steps=plan.steps[:-1]),
    ):
        with pytest.raises(KernelContractError):
            other.verify()


def test_what_is_no_union_of_two_orders_is_not_parted() -> None:
    x = torch.empty(1, 16, 2, 8)
    for mask in (
        CAUSAL,
        CAUSAL & Dilated(2),
        CAUSAL | masks.Columns(0, 2),
        Dilated(2) | Dilated(3),
        masks.SlidingWindow(2) | Dilated(2) | Dilated(3),
        (masks.Band(1, 1) | Dilated(2)) & (masks.Band(2, 2) | Dilated(3)),
        masks.Columns(4, 5) | (Dilated(4) & masks.Rows(0, 3)),  # keys that nobody sees
    ):
        assert parted(request_of(mask, x, x, x)) is None
    biased = Composition(mask=UNIONS[0], pse=ak.pse.ALiBi(2))
    assert parted(read_request(biased, x, x, x)) is None
