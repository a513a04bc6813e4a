"""Dilated masks: regions once positions are sorted by residue, and equal to the reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.masks import Dilated
from attnkit.planner.orders import Resorted

RESTS = (
    masks.Full(),
    masks.Causal(),
    masks.Causal(align="top_left"),
    masks.SlidingWindow(3),
    masks.Band(2, 1),
    masks.PrefixLM(2),
    masks.Chunked(3) | masks.Columns(0, 1),
)


@pytest.mark.parametrize("rest", RESTS, ids=repr)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_sorted_region_is_the_sorted_mask(rest: masks.Mask, align: masks.Align) -> None:
    for q_len, kv_len, step in product(range(1, 7), range(1, 7), (1, 2, 3)):
        dilated = Dilated(step, align)
        in_order = Resorted(dilated, rest)
        queries, keys = (
            [i for part in order for i in part] for order in in_order.order(q_len, kv_len)
        )
        assert sorted(queries) == list(range(q_len))
        assert sorted(keys) == list(range(kv_len))
        cells = (dilated & rest).materialize(q_len, kv_len)[0, 0]
        assert torch.equal(cells[queries][:, keys], in_order.materialize(q_len, kv_len)[0, 0])


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "SBH", "TND"])
@pytest.mark.parametrize("rest", RESTS, ids=repr)
def test_emulated_equals_reference(layout: str, rest: masks.Mask) -> None:
    torch.manual_seed(0)
    lens = ak.SeqLens([7, 4], [9, 4]) if layout == "TND" else None
    q_shape, kv_shape = {
        "BSND": ((2, 7, 4, 3), (2, 9, 2, 3)),
        "BNSD": ((2, 4, 7, 3), (2, 2, 9, 3)),
        "BSH": ((2, 7, 12), (2, 9, 6)),
        "SBH": ((7, 2, 12), (9, 2, 6)),
        "TND": ((11, 4, 3), (13, 2, 3)),
    }[layout]
    found = []
    sink = torch.randn(4, dtype=torch.float64)
    shapes = (q_shape, kv_shape, kv_shape)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    dy = torch.randn(q.shape, dtype=torch.float64)
    for backend in ("reference", "emulated"):
        given = [t.clone().requires_grad_() for t in (q, k, v, sink)]
        out, stats = ak.attention(
            *given[:3],
            mask=Dilated(2) & rest,
            layout=layout,
            seqlens=lens,
            num_heads=4,
            num_kv_heads=2,
            sink=given[3],
            backend=backend,
            return_stats=True,
        )
        found.append([out, stats.lse, *torch.autograd.grad(out, given, dy)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_a_dilated_window_is_one_call_without_a_full_mask() -> None:
    x = torch.empty(1, 2048, 8, 64, device="meta")
    plan = ak.plan(x, x, x, mask=masks.SlidingWindow(256) & Dilated(2), backend="emulated")
    assert [call.sparse_mode for call in plan.calls] == [4]
    assert plan.calls[0].pre_tokens == 127
    assert plan.calls[0].atten_mask == ak.kernel.AttenMask.causal()
    plan.verify()


def test_a_wrong_order_would_be_caught() -> None:
    """Planted fault: the residue classes of queries taken in another order than those of keys."""
    in_order = Resorted(Dilated(3), masks.Causal())
    queries, keys = in_order.order(6, 6)
    wrong = [i for part in reversed(queries) for i in part]
    right = [j for part in keys for j in part]
    cells = (Dilated(3) & masks.Causal()).materialize(6, 6)[0, 0]
    assert not torch.equal(cells[wrong][:, right], in_order.materialize(6, 6)[0, 0])


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("step", [1, 3, 6, 7, 12, 13, 10**6, 2**63 - 1])
def test_the_size_of_a_step_costs_nothing(step: int, align: Any) -> None:
    """The classes that have a position are walked, not those that the step would allow."""
    q, k = torch.randn(1, 4, 2, 4, dtype=torch.float64), torch.randn(1, 6, 2, 4).double()
    mask = Dilated(step, align) & masks.Band(9, 9)
    order = Resorted(Dilated(step, align), masks.Band(9, 9)).order(4, 6)
    for side, length in zip(order, (4, 6), strict=True):
        assert len(side) <= 10
        assert sorted(i for part in side for i in part) == list(range(length))
    meant = [
        [(i + 2 * (align == "bottom_right") - j) % step == 0 for j in range(6)] for i in range(4)
    ]
    assert mask.materialize(4, 6)[0, 0].tolist() == meant
    found = [ak.attention(q, k, k, mask=mask, backend=name) for name in ("emulated", "reference")]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    ak.attention(q, k, k, mask=mask)
