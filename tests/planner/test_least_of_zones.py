"""Zones of distances are left out by what they cost at least: the plan is the one without that."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import inf

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.planner import Plan, Request
from attnkit.planner.routes import Route, routes
from attnkit.planner.search import Search
from attnkit.planner.zones import cost_of_channels, least_of_zones

lower = import_module("attnkit.planner.lower")  # the package has its function by this name

CAUSAL = masks.Causal()
SHORT, LONG = (64, 1, 130), (300, 1200, 5)
REQUESTS: dict[str, tuple[masks.Mask, tuple[pse.Pse, ...], tuple[int, ...] | int]] = {
    "packed, causal": (CAUSAL, (pse.T5Relative(8, bidirectional=False),), SHORT),
    "packed, long": (CAUSAL, (pse.T5Relative(8, bidirectional=False),), LONG),
    "packed, both sides": (masks.Full(), (pse.T5Relative(8),), SHORT),
    "packed, few buckets": (CAUSAL, (pse.T5Relative(8, 4, 16, False),), LONG),
    "window": (masks.Band(30, 20), (pse.T5Relative(8),), SHORT),
    "slopes": (masks.Full(), (pse.ALiBi(8, learnable=True),), LONG),
    "padding": (CAUSAL & masks.Padding([600, 31]), (pse.T5Relative(8, bidirectional=False),), 600),
    "dilated": (CAUSAL & masks.Dilated(4), (pse.T5Relative(8, bidirectional=False),), 300),
    "heads": (
        masks.PerHead([CAUSAL] * 4 + [masks.SlidingWindow(64)] * 4),
        (pse.T5Relative(8, bidirectional=False),),
        300,
    ),
    "a hole": (CAUSAL - masks.Band(200, -3), (pse.T5Relative(8, 8, 64, False),), 700),
    "two anchors": (
        masks.Full(),
        (pse.ALiBi(8, align="top_left", learnable=True), pse.T5Relative(8)),
        300,
    ),
}


@pytest.fixture(params=REQUESTS)
def request_of(request: pytest.FixtureRequest, planned: Callable[..., Plan]) -> Request:
    """One of the requests, in training."""
    mask, biases, lengths = REQUESTS[request.param]
    bias = biases[0] if len(biases) == 1 else biases[0] + biases[1]
    wide = {"heads": 8, "pse": bias, "dtype": torch.float32}
    if isinstance(lengths, int):
        more = 40 if request.param == "two anchors" else 0
        batch = mask.batches or 1
        return planned(mask, lengths, lengths + more, batch=batch, **wide).request
    lens = ak.SeqLens(lengths)
    return planned(mask, sum(lengths), layout="TND", seqlens=lens, **wide).request


def test_the_plan_is_the_one_that_looks_at_every_zone(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = lower.search_for(request_of, Search())
    monkeypatch.setattr(lower, "least_of_zones", lambda route, bound: {})
    monkeypatch.setattr(lower, "cost_of_channels", lambda route: -inf)
    whole = lower.search_for(request_of, Search())
    assert bounded.steps == whole.steps
    assert (bounded.route, bounded.in_order, bounded.bias_pass) == (
        whole.route,
        whole.in_order,
        whole.bias_pass,
    )
    assert len(whole.alternatives) >= len(bounded.alternatives)


def test_no_route_is_cheaper_than_it_is_said_to_be_at_least(request_of: Request) -> None:
    search = Search()
    for route in (*routes(request_of), *routes(request_of, sloped=True)):
        if isinstance(route, Route) and route.zones:
            for bound in (inf, 1.0):  # rows are counted, or launches alone
                least = sum(least_of_zones(route, bound).values())
                found = lower.on_route(request_of, route, search)
                if found.price is not None:
                    assert 0 <= least + cost_of_channels(route) <= found.price.nanoseconds


def test_zones_that_are_too_many_are_not_planned(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Request] = []
    merged = lower._merged
    monkeypatch.setattr(lower, "_merged", lambda r, *rest: looked.append(r) or merged(r, *rest))
    lengths = [128 + (i * 7) % 31 for i in range(16)]
    bias = pse.T5Relative(8, bidirectional=False)
    given = {"layout": "TND", "seqlens": ak.SeqLens(lengths), "pse": bias, "heads": 8}
    plan = planned(CAUSAL, sum(lengths), dtype=torch.float32, **given)
    assert len(plan.steps) == 1
    assert not looked
    assert sum(reason.code == "dearer" for reason in plan.refusals) == 2
