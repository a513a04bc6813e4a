"""What pieces cost at least is no more than what they cost, and nothing cheaper is missed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.geometry import Region, Slice
from attnkit.planner import decompose
from attnkit.planner import search as searching
from attnkit.planner.bounds import Work
from attnkit.planner.calls import Solution, by_heads
from attnkit.planner.decompose import decompositions, partings
from attnkit.planner.lower import search_for
from attnkit.planner.request import Request
from attnkit.planner.search import Search


def requests(count: int) -> Iterator[Request]:
    """Masks of blocks, some with a causal edge or a window, up to a few tiles wide."""
    for seed in range(count):
        chance = random.Random(seed)
        block = chance.choice([1, 8, 40, 64])
        side = chance.randint(2, 9)
        share = chance.choice([0.2, 0.5])
        table = torch.tensor([[chance.random() < share for _ in range(side)] for _ in range(side)])
        cells = table.repeat_interleave(block, 0).repeat_interleave(block, 1)
        mask: masks.Mask = masks.Dense.keep(cells)
        if seed % 3 == 0:
            mask = mask & masks.Causal()
        elif seed % 3 == 1:
            mask = mask | masks.SlidingWindow(chance.randint(1, side * block))
        query = torch.empty(1, side * block, 8, 64, device="meta", dtype=torch.bfloat16)
        key = torch.empty(1, side * block, 2, 64, device="meta", dtype=torch.bfloat16)
        query.requires_grad_(seed % 2 == 0)
        yield ak.plan(query, key, key, mask=mask, backend="reference").request


class OneWay(Search):
    """A search that cuts every region in one of the ways that there are."""

    way = 0

    def all_cuts(self, region: Region) -> tuple[tuple[Slice, ...], ...]:
        every = super().all_cuts(region)
        return (every[min(self.way, len(every) - 1)],)


def test_pieces_cost_no_less_than_is_said_of_the_region_and_of_the_cut() -> None:
    close = 0
    for k, request in enumerate(requests(90)):
        (region,) = request.matrices.regions()
        rows = sum(strip.i1 - strip.i0 for strip in region.strips)
        search = OneWay(gathers=False)
        search.way = k % 4
        (inside,) = (decompose._diagonal(request, 0),)
        slices = [part for _, own in inside for part in search.cut(own, 0)]
        works = Work.of_region(region, False), Work.of_region(region), Work.of_slices(slices)
        least = [work.nanoseconds(request, 8, 2, rows) for work in works]
        assert least[0] <= least[1]
        for found in decompositions(request, search=search):
            if isinstance(found, tuple):
                once = all(some.once for some in by_heads(found))
                parts = [one.as_part(request.q_len) if once else one for one in found]
                price = Solution(tuple(parts)).price.nanoseconds
                assert price >= max(least)
                close += price < 1.3 * max(least)
    assert close > 40


def test_nothing_cheaper_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = [search_for(request, Search()) for request in requests(16)]
    monkeypatch.setattr(decompose, "dearer", lambda *given: None)
    every = [search_for(request, Search()) for request in requests(16)]
    assert [one.price for one in bounded] == [one.price for one in every]
    left_out = [one for one in bounded if "pieces-dearer" in {r.code for r in one.refusals}]
    assert len(left_out) in range(4, 16)


def test_a_region_of_many_runs_is_not_even_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.2
    mask = masks.Dense.keep(table.repeat_interleave(64, 0).repeat_interleave(64, 1))
    x = torch.empty(1, 4096, 8, 64, device="meta", dtype=torch.bfloat16)
    request = ak.plan(x, x, x, mask=mask, backend="reference").request
    monkeypatch.setattr(searching, "cuts", lambda region: pytest.fail("it was cut"))
    plan = search_for(request, Search())
    (refusal,) = (one for one in plan.refusals if one.code == "pieces-dearer")
    assert "would cost" in refusal.reason
    assert len(plan.steps) == 1
    assert list(partings(request, search=Search(gathers=False))) == []
