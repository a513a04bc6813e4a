"""What pieces cost at least is never more than what they cost, and no cheaper plan is missed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch

import attnkit as ak
from attnkit import masks
from attnkit.geometry import Region
from attnkit.planner.bounds import Work
from attnkit.planner.calls import Launch, Solution
from attnkit.planner.decompose import Search, decompositions
from attnkit.planner.request import Request


class Case(NamedTuple):
    request: Request
    region: Region


def cases(count: int) -> Iterator[Case]:
    """Masks of blocks, bands and both, up to a few tiles wide, in training and not."""
    for seed in range(count):
        chance = random.Random(seed)
        torch.manual_seed(seed)
        block = chance.choice([1, 8, 40, 64])
        size = block * chance.randint(2, 9)
        table = torch.rand(size // block, size // block) < chance.choice([0.2, 0.5])
        mask: masks.Mask = masks.Dense.keep(
            table.repeat_interleave(block, 0).repeat_interleave(block, 1)
        )
        if seed % 3 == 0:
            mask = mask & masks.Causal()
        elif seed % 3 == 1:
            mask = mask | masks.SlidingWindow(chance.randint(1, size))
        heads = chance.choice([2, 8])
        query = torch.empty(1, size, heads, 64, device="meta", dtype=torch.bfloat16)
        key = torch.empty(1, size, 2, 64, device="meta", dtype=torch.bfloat16)
        plan = ak.plan(
            query.requires_grad_(seed % 2 == 0), key, key, mask=mask, backend="reference"
        )
        yield Case(plan.request, plan.request.matrices.regions()[0])


def test_no_set_of_pieces_costs_less_than_the_bound() -> None:
    met = 0
    for request, region in cases(60):
        rows = sum(strip.i1 - strip.i0 for strip in region.strips)
        least = Work.of_region(region).nanoseconds(request, request.num_heads, 2, rows)
        for found in decompositions(request, search=Search(gathers=False)):
            if isinstance(found, tuple):
                assert price(request, found) >= least
                met += price(request, found) < 1.3 * least
    assert met > 20  # it is not far below


def price(request: Request, launches: tuple[Launch, ...]) -> float:
    once = ak.planner.lower  # noqa: F841
    return Solution(launches).price.nanoseconds
