"""What a plan for ranks tells: in words, as data, as a picture."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks, parallel


def planned(length: int = 2**16, ranks: int = 8, **rest: Any) -> parallel.ParallelPlan:
    query = torch.empty(1, length, 16, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    key = torch.empty(1, length, 4, 64, device="meta", dtype=torch.bfloat16)
    mask = rest.pop("mask", masks.SlidingWindow(1024))
    return parallel.plan(query, key, key, ranks=ranks, **{"mask": mask} | rest)


def test_the_report_of_a_window() -> None:
    told = planned(method="needed", balance="contiguous", backend="emulated").explain()
    assert max(map(len, told.splitlines())) <= 80
    for text in (
        "attention over 8 ranks: needed, 1 stage, kept",
        "SlidingWindow(1024)",
        "8,192 per rank, in 1 range, contiguous",
        "0.79 % more",
        "1,023; all keys would be 57,344",
        "1,023 keys of rank 0; 1,023 rows x 1,023 keys on 'emulated' by 1 fused call",
        "all ranks and stages together compute the mask, each cell once",
        "nobody has measured these weights",
        "needed, 2 stages",
    ):
        assert text in " ".join(told.split()), text


def test_the_report_says_what_is_posted_and_what_no_buffer_holds() -> None:
    told = " ".join(planned(ranks=2, method="ring", balance="contiguous").explain().split())
    assert "posted: receive 32,768 keys from 0, send 32,768 keys to 0; 33.6 MB sent, more" in told
    assert "more than P2P_HCCL_BUFFSIZE has by default (20,971,520)" in told
    assert "P2P_HCCL_BUFFSIZE" not in planned(ranks=8, method="needed").explain()


def test_what_was_not_taken_is_told_with_its_price() -> None:
    plan = planned(ranks=32, mask=masks.Causal())
    told = " ".join(plan.explain().split())
    assert plan.price is not None
    assert plan.alternatives
    assert plan.price.total <= min(other.price.total for other in plan.alternatives)
    assert "ulysses: 32 ranks split 16 heads, so that some of them would have none" in told
    assert {other.label.split(",")[0] for other in plan.alternatives} > {"gather", "ring"}


@pytest.mark.parametrize(
    ("length", "ranks", "mask", "told"),
    [
        (16, 1, masks.Causal(), "no keys of others"),
        (0, 3, masks.Causal(), "0 per rank"),
        (2, 5, masks.Causal(), "0 to 1 per rank"),
        (16, 4, ~masks.Full(), "cells none"),
        (16, 4, masks.Dilated(2) & masks.Causal(), "all cells that the mask may allow"),
        (16, 4, masks.Dense.keep(torch.eye(16).bool()), "the mask, each cell once"),
    ],
)
def test_every_plan_can_be_told_and_drawn(
    length: int, ranks: int, mask: masks.Mask, told: str
) -> None:
    plan = planned(length, ranks, mask=mask)
    assert told in " ".join(plan.explain().split())
    assert len(plan.to_dict()["cells"]) == ranks
    assert plan.plot(head=3)


def test_a_plan_that_leaves_nothing_open_has_a_price_too() -> None:
    plan = planned(method="ring", balance="zigzag", keep=False)
    assert plan.price is not None
    assert not plan.alternatives
    assert "about" in plan.explain()


def test_ranks_without_heads_are_told() -> None:
    plan = planned(ranks=32, method="ulysses")
    assert plan.disprove() is None
    assert "16 ranks have none" in " ".join(plan.explain().split())
    assert plan.received(1) == (0, plan.received(1).forward, plan.received(1).backward)


def test_a_plan_as_data() -> None:
    plan = planned(ranks=4)
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["tokens"] == [2**14] * 4
    assert sum(told["cells"]) == 16 * masks.SlidingWindow(1024).region(2**16, 2**16).area
    assert told["bytes_received"]["forward"] == plan.transfers.forward.sum(0).tolist()
    assert told["price"]["total"] > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_that_each_share_chooses_is_told(dropout: float) -> None:
    plan = planned(ranks=2, dropout=dropout, drops="local", backend="emulated")
    assert plan.disprove() is None
    assert ("each share's own choice" in " ".join(plan.explain().split())) == bool(dropout)


def test_a_picture_has_a_colour_per_rank() -> None:
    plan = planned(length=512, ranks=3, mask=masks.Causal(), method="needed")
    figure = plan.plot()
    (axes,) = figure.axes
    image = axes.get_images()[0].get_array()
    assert image is not None
    seen = {tuple(colour) for colour in torch.tensor(image).flatten(0, 1).tolist()}
    assert len(seen) > 6  # two shades of each, and white
    with pytest.raises(ak.CompositionError, match="head=16"):
        plan.plot(head=16)


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ({"ranks": 0}, "ranks=0"),
        ({"ranks": 2.0}, "ranks"),
        ({"method": "all"}, "method"),
        ({"balance": "best"}, "balance"),
        ({"stages": 0}, "stages"),
        ({"keep": 1}, "keep"),
        ({"drops": "all"}, "drops='all'"),
        ({"heads_ways": 3}, "does not divide 8 ranks"),
        ({"heads_ways": 2, "method": "ring"}, "'hybrid' over some neighbours"),
        ({"heads_ways": 4, "method": "ulysses"}, "over all ranks"),
        ({"method": "hybrid", "ranks": 7}, "method='needed' runs on any number"),
        ({"balance": parallel.Sharding.of(4, [[(0, 4)]])}, "make one for these"),
        ({"mask": masks.SelectedBlocks(torch.zeros(1, 4, 2**10, 1).long(), 64, 64)}, "each call"),
    ],
)
def test_what_is_no_plan_is_one_clear_error(rest: dict[str, Any], told: str) -> None:
    with pytest.raises((ak.CompositionError, TypeError), match=told):
        planned(**rest)


def test_a_backend_by_name_refuses_on_every_rank_alike() -> None:
    for method in ("needed", "ring"):
        with pytest.raises(ak.BackendRefused, match="softcap"):
            planned(method=method, backend="emulated", softcap=2.0)
