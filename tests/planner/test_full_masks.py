"""A mask of one entry per cell is a plan like any other, up to a size: by price, and no earlier."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.planner import Solution
from attnkit.planner.lower import MOST_MASK_CELLS

Planned = Callable[..., ak.Plan]


def neighbourhood(*sides: int) -> masks.Mask:
    """Tokens of a grid see those at most one step away on every axis."""
    places = torch.tensor(list(product(*map(range, sides))))
    return masks.Dense.keep((places[:, None] - places).abs().amax(-1) <= 1)


def windows(side: int, window: int) -> masks.Mask:
    """Swin: tokens of a square image, row by row, see those of their own square window."""
    row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
    own = row // window * side + column // window
    return masks.Dense.keep(own[:, None] == own)


def block_diffusion(half: int, size: int) -> masks.Mask:
    """BD3-LM: a noisy half sees its own blocks and clean ones before, a clean half is causal."""
    block = torch.arange(half) // size
    before, own = block[:, None] > block, block[:, None] == block
    above = torch.cat([own, before], 1)
    return masks.Dense.keep(torch.cat([above, torch.cat([own & False, before | own], 1)]))


def big_bird(length: int, size: int) -> masks.Mask:
    """BigBird: blocks see their neighbours, the first and last, which see all, and three others."""
    count = length // size
    block = torch.arange(count)
    seen = (block[:, None] - block).abs() <= 1
    seen[[0, -1]] = True
    seen[:, [0, -1]] = True
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        seen[k, torch.randperm(count, generator=generator)[:3]] = True
    return masks.Dense.keep(seen.repeat_interleave(size, 0).repeat_interleave(size, 1))


GRIDS = {
    "neighbourhood 4 x 8 x 8": (neighbourhood(4, 8, 8), 256),
    "Swin on 32 x 32": (windows(32, 8), 1024),
    "BD3-LM 2 x 512": (block_diffusion(512, 16), 1024),
    "BigBird 2,048": (big_bird(2048, 64), 2048),
}


def kinds(solution: Solution) -> set[str | None]:
    found = [launch.call.atten_mask for launch in solution.launches]
    return {None if mask is None else mask.kind for mask in found}


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_no_band_takes_a_full_mask_where_that_is_cheaper(
    planned: Planned, name: str, request: pytest.FixtureRequest
) -> None:
    mask, length = GRIDS[name]
    plan = planned(mask, length, heads=8)
    plan.verify()
    (call,) = plan.calls
    assert call.atten_mask.kind == "full"
    assert plan.price.mask_bytes == call.atten_mask.cells  # it is written, and read tile by tile
    assert plan.price.mask_traffic == call.atten_mask.cells + plan.price.tile_cells
    request.getfixturevalue("no_full_masks")
    pieces = planned(mask, length, heads=8)
    assert "full" not in kinds(Solution(pieces.steps))
    assert pieces.price.nanoseconds > plan.price.nanoseconds


@pytest.mark.parametrize("length", [200, 1000, 2048])
def test_the_cheapest_is_taken_by_the_planners_own_price(planned: Planned, length: int) -> None:
    for mask in (
        masks.Causal() & (masks.SlidingWindow(64) | masks.Columns(0, 4)),
        masks.Band(64, 64) | masks.Columns(0, 16) | masks.Rows(0, 16),
        masks.PerHead([masks.Causal(), masks.SlidingWindow(8)] * 2),
    ):
        plan = planned(mask, length)
        others = [other.price.nanoseconds for other in plan.alternatives]
        assert plan.price.nanoseconds <= min(others)
        solutions = (Solution(plan.steps), *plan.alternatives)
        full = {"full" in kinds(solution) for solution in solutions}
        dearer = "full-mask-dearer" in {refusal.code for refusal in plan.refusals}
        assert False in full
        assert dearer if length > 1000 and True not in full else True in full


@pytest.mark.usefixtures("side_by_side")
def test_above_the_size_a_full_mask_is_the_last_resort(planned: Planned) -> None:
    mask = masks.Causal() & (masks.SlidingWindow(64) | masks.Columns(0, 4))
    side = int(MOST_MASK_CELLS**0.5)
    for length, weighed in ((side, True), (side + 1, False)):
        plan = planned(mask, length, heads=1)
        solutions = (Solution(plan.steps), *plan.alternatives)
        assert any("full" in kinds(solution) for solution in solutions) == weighed
        assert ("full-mask-size" in {r.code for r in plan.refusals}) != weighed
        assert ("up to which one is weighed" in " ".join(plan.explain().split())) != weighed
    odd = masks.Predicate(lambda b, h, i, j: (i + j) % 3 != 0)
    (call,) = planned(odd, side + 1, heads=1).calls  # nothing else computes it
    assert call.atten_mask.kind == "full"


def test_no_full_mask_is_looked_at_beside_one_plain_call(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowering = sys.modules["attnkit.planner.lower"]
    asked: list[bool] = []
    real = lowering.candidates

    def counted(request: object, form: object, full_masks: bool) -> object:
        asked.append(full_masks)
        return real(request, form, full_masks)

    monkeypatch.setattr(lowering, "candidates", counted)
    for mask in (masks.Causal(), masks.SlidingWindow(77), masks.PrefixLM(77), masks.Full()):
        planned(mask, 777, layout="BNSD", heads=3)
    assert asked
    assert not any(asked)
