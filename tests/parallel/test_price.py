"""What plans for ranks cost: bytes as they are moved, and stages that overlap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attnkit import masks, parallel
from attnkit.parallel.choose import label
from attnkit.parallel.price import link, price_of
from attnkit.planner.price import chip


def planned(mask: masks.Mask, ranks: int = 8, **rest: Any) -> parallel.ParallelPlan:
    given = {"balance": "zigzag", "method": "needed"} | rest
    train = given.pop("train", True)
    x, y = (
        torch.empty(1, 2**15, n, 64, device="meta", dtype=torch.half, requires_grad=train)
        for n in (16, 4)
    )
    return parallel.plan(x, y, y, ranks=ranks, mask=mask, **given)


@pytest.mark.parametrize("method", ["needed", "ring", "gather", "hybrid"])
@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(512)], ids=str)
def test_bytes_of_a_price_are_those_that_are_moved(mask: masks.Mask, method: str) -> None:
    plan = planned(mask, method=method, heads_ways=2 if method == "hybrid" else "auto")
    found = price_of(plan)
    moved = plan.received(found.rank).forward
    turned = plan.turn.transfers[0][:, found.rank].sum() if plan.heads_ways > 1 else 0
    assert found.received >= moved - turned  # a rank that sends more waits for that
    assert found.held <= found.received
    assert max(found.compute, found.exchange) <= found.total * (1 + 1e-9)
    assert found.total <= (found.compute + found.exchange) * (1 + 1e-9)


def test_stages_overlap() -> None:
    """While a stage is computed, the keys of the next one arrive."""
    plan = planned(masks.Causal(), train=False, stages=1)
    slow = replace(link(), bytes_per_ns=link().bytes_per_ns / 10)
    fast = replace(link(), bytes_per_ns=1e9, message_ns=0.0)
    found = price_of(plan, wire=fast)
    assert found.total == pytest.approx(found.compute, rel=1e-3)
    found = price_of(plan, wire=slow)
    last = found.total - found.exchange  # the last stage waits for its keys
    assert 0 < last < found.compute
    staged = planned(masks.Causal(), train=False, stages=4)
    assert price_of(staged, wire=slow).total < found.total


def test_a_backward_pass_costs_what_it_fetches() -> None:
    mask = masks.SlidingWindow(512)
    kept, again = (planned(mask, keep=keep) for keep in (True, False))
    only = planned(mask, train=False)
    assert price_of(kept).exchange < price_of(again).exchange
    assert price_of(only).compute == pytest.approx(price_of(kept).compute / 3.5)
    assert planned(mask).keep
    assert not planned(masks.Causal()).keep
    assert not only.keep


def test_weights_decide() -> None:
    """A window needs few keys; where every row sees every key, a chip that waits takes heads."""
    window = planned(masks.SlidingWindow(512), method="auto", balance="contiguous")
    assert label(window) == "needed, 1 stage, kept"
    rows = masks.SlidingWindow(512) | masks.Rows(0, 8)
    assert planned(rows, method="auto", balance="contiguous").method in ("ulysses", "hybrid")


def test_the_most_loaded_ranks_are_looked_at() -> None:
    plan = planned(masks.Causal(), balance="contiguous")
    found = price_of(plan)
    assert found.rank == 7
    assert found.ranks == (7,)
    whole = price_of(plan, weights=replace(chip(), tile_q=1, tile_kv=1, launch_ns=0.0))
    assert whole.compute < found.compute
