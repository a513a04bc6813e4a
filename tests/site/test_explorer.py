"""The page of a plan in a browser: what it answers for each cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page

from attnkit import masks, parallel
from attnkit.errors import Refusal
from attnkit.planner import Plan
from attnkit.planner.calls import Launch
from attnkit.planner.lower import in_other_order, lower
from attnkit.planner.orders import restated
from attnkit.planner.search import Search
from tests.site.plans import CAUSAL, packed, planned, shown

pytestmark = pytest.mark.browser

HALF = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
# The hits of all cells, and the facts of the mask, of one score matrix.
CELLS = """([view, batch, head]) => {
    const matrix = explorer.matrixOf({view, batch, head}), [rows, keys] = matrix.sizes;
    const found = [];
    for (let i = 0; i < rows; i++) for (let j = 0; j < keys; j++) {
        const cell = matrix.at(i, j);
        const hits = (cell.hits || []).map(({call, sequence, u, v}) => [call, sequence, u, v]);
        found.push([cell.allowed, cell.keys, hits, cell.rank, cell.stage, cell.from, cell.owner]);
    }
    return found;
}"""


PLANS: dict[str, Callable[[], Plan]] = {
    "one call": lambda: planned(CAUSAL),
    "several calls": lambda: planned(CAUSAL | masks.Columns(3, 5)),
    "gathered": lambda: planned(CAUSAL & (masks.Columns(0, 2) | masks.SlidingWindow(5))),
    "heads": lambda: planned(masks.PerHead([CAUSAL, masks.SlidingWindow(4), CAUSAL, CAUSAL])),
    "batch elements": lambda: planned(masks.Padding([15, 20, 15]), 3),
    "documents": lambda: planned(masks.Documents([7, 2, 11]) & CAUSAL),
    "read": lambda: planned(masks.Dense.keep(HALF)),
    "nothing": lambda: planned(masks.Columns(0, 4) & masks.Columns(8, 9)),
    "without calls": lambda: planned(CAUSAL, backend="reference"),
    "one query": lambda: planned(masks.SlidingWindow(4), length=1),
    "packed": packed,
}


def truth(
    plan: Plan, launches: tuple[Launch, ...], batch: int, head: int
) -> dict[tuple[int, int], list[list[int]]]:
    """Return the calls, sequences and places that compute each cell, cell by cell."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    opaque = plan.request.mask
    for n, launch in enumerate(launches):
        if launch.heads is not None and head not in launch.heads:
            continue
        for k, block in enumerate(launch.blocks):
            if block.batch != batch:
                continue
            rows, keys = ([i for one in side for i in one] for side in (block.rows, block.keys))
            if launch.is_opaque:
                q_len, kv_len = plan.request.sequences[batch]
                cells = opaque.materialize(q_len, kv_len, plan.request.batch, 4)[batch, head]
            else:
                region = launch.regions(head)[k]
                cells = torch.zeros(len(rows), len(keys), dtype=torch.bool)
                for part in region.slices:
                    for u, v in product(range(part.i0, part.i1), range(part.j0, part.j1)):
                        cells[u, v] |= (u, v) in part
            for u, v in cells.nonzero().tolist():
                found.setdefault((rows[u], keys[v]), []).append([n, k, u, v])
    return found


# -- what it answers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_every_cell_is_answered_as_the_plan_has_it(name: str, page: Page, tmp_path: Path) -> None:
    plan = PLANS[name]()
    shown(page, plan, tmp_path)
    calls = plan if plan.steps else lower(plan.request)
    views = [calls.steps, *(other.launches for other in calls.alternatives)]
    if calls.back:
        views.insert(1, calls.back)
    assert page.locator("#tabs [role=tab]").count() == len(views)
    data = page.evaluate("explorer.data")
    for view, (batch, _), (head, _) in product(range(len(views)), data["batches"], data["heads"]):
        q_len, kv_len = plan.request.sequences[batch]
        mask = plan.request.mask.materialize(q_len, kv_len, plan.request.batch, 4)[batch, head]
        meant = truth(plan, views[view], batch, head)
        answers = iter(page.evaluate(CELLS, [view, batch, head]))
        for i, j in product(range(q_len), range(kv_len)):
            allowed, keys, hits, *_ = next(answers)
            assert (allowed, keys) == (bool(mask[i, j]), int(mask[i].sum())), (i, j)
            assert sorted(hits) == sorted(meant.get((i, j), [])), (i, j)


def test_sequences_of_a_packed_batch_stand_down_the_diagonal(page: Page, tmp_path: Path) -> None:
    shown(page, packed(), tmp_path)
    assert page.evaluate("explorer.state.batch") == "all"
    answers = iter(page.evaluate(CELLS, [0, "all", 0]))
    ends = [(0, 9), (9, 10), (10, 10), (10, 22)]
    for i, j in product(range(22), range(22)):
        allowed, _, hits, *_ = next(answers)
        (own,) = (k for k, (a, b) in enumerate(ends) if a <= i < b)
        start, stop = ends[own]
        assert allowed == (start <= j < stop and j <= i)
        assert hits == ([[0, own, i - start, j - start]] if allowed else [])


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "needed", "stages": 2},
        {"method": "ring", "balance": "zigzag"},
        {"method": "ulysses"},
        {"method": "hybrid", "heads_ways": 2},
    ],
    ids=lambda chosen: chosen["method"],
)
def test_ranks_stages_and_sources_are_those_of_the_plan(
    chosen: dict[str, Any], page: Page, tmp_path: Path
) -> None:
    x = torch.empty(1, 32, 4, 16, device="meta")
    plan = parallel.plan(x, x, x, ranks=4, mask=CAUSAL, **chosen)
    shown(page, plan, tmp_path)
    for head in range(4):
        answers = iter(page.evaluate(CELLS, [0, 0, head]))
        for i, j in product(range(32), range(32)):
            allowed, _, _, rank, number, source, owner = next(answers)
            assert allowed == (j <= i)
            assert any(i in one for one in plan.rows(rank))
            assert head in plan.heads(rank)
            assert any(j in one for one in plan.keys.ranks[owner])
            if not allowed:
                continue
            stage = plan.stages(rank)[number]
            assert any(j in one for one in stage.keys)
            senders = [m.rank for m in stage.receives if any(j in one for one in m.keys)]
            assert senders == ([source] if number else [])


def test_a_row_that_several_calls_answer_says_so(page: Page, tmp_path: Path) -> None:
    mask = masks.Dilated(4) | masks.SlidingWindow(3)
    request = planned(mask, length=24).request
    (way,) = (way for way in restated(request) if not isinstance(way, Refusal))
    plan = replace(in_other_order(request, way, Search()), backend="emulated")
    shown(page, plan, tmp_path)
    meant = truth(plan, plan.inner.steps, 0, 0)
    answers = iter(page.evaluate(CELLS, [0, 0, 0]))
    allowed = mask.materialize(24, 24)[0, 0]
    for i, j in product(range(24), range(24)):
        sure, _, hits, *_ = next(answers)
        assert (sure, sorted(hits)) == (bool(allowed[i, j]), sorted(meant.get((i, j), [])))
    parts = {tuple(hit[:2]) for (i, _), hits in meant.items() if i == 20 for hit in hits}
    assert len(parts) > 1
    page.evaluate("explorer.plot.choose(20, 3)")
    assert f"is answered {len(parts)} times and merged" in page.inner_text("#cell-facts")


def test_a_plan_that_is_wrong_is_not_made_up_for(page: Page, tmp_path: Path) -> None:
    plan = planned(CAUSAL)
    (launch,) = plan.steps
    call = replace(launch.call, sparse_mode=4, pre_tokens=3, next_tokens=1)
    wrong = replace(plan, steps=(replace(launch, call=call),))
    shown(page, wrong, tmp_path)
    answers = page.evaluate(CELLS, [0, 0, 0])
    assert answers[9 * 20 + 2][0] is True
    assert answers[9 * 20 + 2][2] == []
    page.evaluate("explorer.plot.choose(9, 2)")
    assert "the plan is wrong" in page.inner_text("#cell-facts")
    page.evaluate("explorer.plot.choose(9, 10)")
    assert "the plan is wrong" in page.inner_text("#cell-facts")


def test_cells_that_nobody_knows_are_said_to_be_unsure(page: Page, tmp_path: Path) -> None:
    chosen = masks.SelectedBlocks(torch.zeros(1, 4, 3, 1).long(), 8, 8, causal=True)
    shown(page, planned(chosen, length=24), tmp_path)
    page.evaluate("explorer.plot.choose(20, 3)")
    assert "known only when the call is made" in page.inner_text("#cell-facts")
    assert "comes with each call" in page.inner_text("#note")
