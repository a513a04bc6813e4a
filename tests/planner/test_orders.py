"""Masks that are regions once positions are sorted, by residue or by tiles."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends.base import BACKENDS, Operands
from attnkit.errors import KernelContractError
from attnkit.geometry import Region
from attnkit.masks import Dilated, Mask
from attnkit.masks.grid import GridMask, grid_order
from attnkit.planner import Plan, Request, read_request
from attnkit.planner.lower import in_other_order, lower
from attnkit.planner.orders import how_moved, restated, sorted_positions
from attnkit.planner.request import Composition
from attnkit.planner.search import Search
from attnkit.planner.sorting import Sorted

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
        in_order = Sorted(dilated & rest)
        order = (dilated & rest).in_order(q_len, kv_len) if step > 1 else None
        if order is None:
            assert step == 1
            continue
        queries, keys = ([i for part in side for i in part] for side in (order.rows, order.keys))
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
    shapes = (q_shape, kv_shape, kv_shape, (4,))
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    asked = {"num_heads": 4, "num_kv_heads": 2, "seqlens": lens, "sink": leaves[3]}
    composition = Composition(mask=Dilated(2) & rest, layout=layout)
    request = read_request(composition, *leaves[:3], **asked)
    dy = torch.randn(q_shape, dtype=torch.float64)
    for plan in (Plan("reference", request), plan_on(request, 0)):
        operands = Operands(*leaves[:3], sink=leaves[3])
        out = BACKENDS[plan.backend].run(plan, operands)
        found.append([out.output, out.stats.lse, *torch.autograd.grad(out.output, leaves, dy)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_a_dilated_window_is_one_call_without_a_full_mask() -> None:
    x = torch.empty(1, 8192, 8, 64, device="meta")
    plan = ak.plan(x, x, x, mask=masks.SlidingWindow(256) & Dilated(2), backend="emulated")
    assert [call.sparse_mode for call in plan.calls] == [4]
    assert plan.calls[0].pre_tokens == 127
    assert plan.calls[0].atten_mask == ak.kernel.AttenMask.causal()
    plan.verify()


def test_a_wrong_order_would_be_caught() -> None:
    """Planted fault: the residue classes of queries taken in another order than those of keys."""
    in_order = Sorted(Dilated(3) & masks.Causal())
    order = in_order.order(6, 6)
    assert order is not None
    wrong = [i for part in reversed(order.rows) for i in part]
    right = [j for part in order.keys for j in part]
    cells = (Dilated(3) & masks.Causal()).materialize(6, 6)[0, 0]
    assert not torch.equal(cells[wrong][:, right], in_order.materialize(6, 6)[0, 0])


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("step", [1, 3, 6, 7, 12, 13, 10**6, 2**63 - 1])
def test_the_size_of_a_step_costs_nothing(step: int, align: Any) -> None:
    """The classes that have a position are walked, not those that the step would allow."""
    q, k = torch.randn(1, 4, 2, 4, dtype=torch.float64), torch.randn(1, 6, 2, 4).double()
    mask = Dilated(step, align) & masks.Band(9, 9)
    order = mask.in_order(4, 6)
    assert (order is None) == (step == 1)
    for side, length in zip((order.rows, order.keys) if order else (), (4, 6), strict=False):
        assert len(side) <= 10
        assert sorted(i for part in side for i in part) == list(range(length))
    meant = [
        [(i + 2 * (align == "bottom_right") - j) % step == 0 for j in range(6)] for i in range(4)
    ]
    assert mask.materialize(4, 6)[0, 0].tolist() == meant
    found = [ak.attention(q, k, k, mask=mask, backend=name) for name in ("emulated", "reference")]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    ak.attention(q, k, k, mask=mask)


# -- any order ---------------------------------------------------------------------------------


def drawn_order(draw: random.Random, length: int) -> tuple[range, ...]:
    """Return every position once, in ranges of steps up to 3, some of them backwards."""
    left, found = list(range(length)), []
    while left:
        step, first = draw.choice([1, 2, 3]), left[0]
        own = [i for i in range(first, length, step) if i in left]
        own = own[: next((k for k, i in enumerate(own) if i != first + k * step), len(own))]
        left = [i for i in left if i not in own]
        ranges = range(first, own[-1] + 1, step)
        found.append(ranges[::-1] if draw.random() < 0.3 else ranges)
    draw.shuffle(found)
    return tuple(found)


def test_a_region_is_carried_into_any_order_or_refused() -> None:
    draw, seen = random.Random(0), {"meet": 0, "join": 0}
    for _ in range(400):
        sizes = draw.randrange(1, 7), draw.randrange(1, 7)
        rows, keys = (drawn_order(draw, n) for n in sizes)
        order = [[i for part in side for i in part] for side in (rows, keys)]
        own = draw.choice(RESTS)
        there = masks.Order(rows, keys, own.region(*sizes))
        assert there.fits(*sizes)
        other = draw.choice([*RESTS, masks.Columns(0, 1), masks.Rows(1, None), masks.Band(0, 3)])
        cells = other.materialize(*sizes)[0, 0][order[0]][:, order[1]]
        inside = own.materialize(*sizes)[0, 0]
        for way, meant in (("meet", cells & inside), ("join", cells | inside)):
            found = getattr(there, way)(other.region(*sizes))
            if found is not None:
                seen[way] += 1
                painted = masks.Slices.of(found.region, *sizes).materialize(*sizes)[0, 0]
                assert torch.equal(painted, meant)
    assert min(seen.values()) > 100


@pytest.mark.parametrize(
    ("rows", "region"),
    [
        ((range(3), range(2, 4)), Region.full(4, 4)),
        ((range(3),), Region.full(4, 4)),
        ((range(5),), Region.full(4, 4)),
        ((range(1, 5), range(1)), Region.full(4, 4)),
        ((range(2, -2, -1),), Region.full(4, 4)),
        ((range(4),), Region.full(5, 4)),
    ],
)
def test_an_order_that_is_none_is_not_followed(rows: Any, region: Region) -> None:
    """A position twice or never, or cells beyond: such a hook of a family is as good as none."""

    class Wrong(Mask):
        def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Any:
            return Dilated(2).enclosure(q_len, kv_len)

        def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Any:
            return masks.Order(rows, (range(4),), region)

        def _value(self) -> Any:
            return ()

    x = torch.empty(1, 4, 1, 8)
    request = read_request(Composition(mask=Wrong()), x, x, x)
    assert sorted_positions(request) is None


# -- tiles of a grid ---------------------------------------------------------------------------


SMALL = masks.SlidingTiles((4, 6, 4), tile=2, window=(1, 3, 1))
WIDER = masks.SlidingTiles((4, 6, 4), tile=2, window=(2, 1, 1))
GRIDS = [
    SMALL,
    masks.SlidingTiles(12, tile=2, window=3),
    masks.SlidingTiles((6, 4), tile=(3, 1), window=(1, 3)),
    masks.ShiftedWindows((8, 12), window=4, shift=2),
    masks.ShiftedWindows((4, 6), window=(4, 2), shift=(0, 1)),
    *(
        masks.Neighborhood((7, 9), kernel, dilation, causal)
        for kernel in (1, 2, 3)
        for dilation in (2, (1, 2), (2, 1))
        for causal in (False, (False, True))
    ),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_parts_of_a_grid_after_each_other(grid: masks.Mask) -> None:
    """Tiles, windows and residues; with other tokens beside the grid, too."""
    count = grid.extent[0]
    assert count is not None
    text = masks.Columns(0, 3) | masks.Columns(count + 3, None) | masks.Rows(count + 3, None)
    for mask, length in ((grid, count), (masks.Placed(grid, 3, 2) | text, count + 5)):
        cells = mask.materialize(length, length)[0, 0]
        torch.testing.assert_close(*cells_in_order(mask, cells))


def test_parts_that_see_a_part_of_another_have_no_order() -> None:
    assert masks.Neighborhood((4, 6), 3).in_order(24, 24) is None
    halves = (range(3), range(3, 6))
    assert grid_order([masks.Causal().region(6, 6)], [halves], (6,)) is not None
    assert grid_order([masks.SlidingWindow(3).region(6, 6)], [halves], (6,)) is None


def of(mask: masks.Mask) -> torch.Tensor:
    """Return the cells of a mask of 96 tokens."""
    return mask.materialize(96, 96)[0, 0]


def cells_in_order(mask: masks.Mask, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cells in the order of a mask, and what it says that they are there."""
    order = mask.in_order(*cells.shape)
    assert order is not None
    assert order.fits(*cells.shape)
    rows, keys = ([i for part in side for i in part] for side in (order.rows, order.keys))
    painted = masks.Slices.of(order.region, *cells.shape).materialize(*cells.shape)
    return cells[rows][:, keys], painted[0, 0]


def test_what_is_composed_of_tiles_keeps_their_order() -> None:
    inside, columns = of(SMALL), masks.Columns(90, 96).materialize(96, 96)[0, 0]
    causal = masks.Causal().materialize(96, 96)[0, 0]
    for mask, cells in (
        (SMALL, inside),
        (SMALL & masks.Columns(90, 96), inside & columns),
        (SMALL | masks.Columns(90, 96), inside | columns),
        (SMALL & masks.Causal(), inside & causal),
        (SMALL & WIDER, inside & of(WIDER)),
        (SMALL | WIDER, inside | of(WIDER)),
    ):
        torch.testing.assert_close(*cells_in_order(mask, cells))
    assert (SMALL | masks.Causal()).in_order(96, 96) is None  # a band is one in its order only
    other = masks.SlidingTiles((4, 6, 4), tile=(4, 2, 2), window=1)
    assert (SMALL & other).in_order(96, 96) is None
    assert (SMALL & Dilated(2)).in_order(96, 96) is None
    assert masks.PerHead([SMALL, WIDER]).in_order(96, 96, head=1) == WIDER.in_order(96, 96)


def plan_on(request: Request, number: int) -> Plan:
    """Return the plan of a request restated in one of the ways there are, whatever it costs."""
    others = [way for way in restated(request) if isinstance(way, Request)]
    plan = replace(in_other_order(request, others[number], Search()), backend="emulated")
    plan.verify()
    return plan


@pytest.mark.parametrize("layout", ["BSND", "SBH", "TND"])
@pytest.mark.parametrize("number", [0, -1])
def test_tiles_equal_the_definition(layout: str, number: int) -> None:
    """One window for all heads, and one for each pair: sorted, then folded as well."""
    torch.manual_seed(0)
    lens = ak.SeqLens([96, 96]) if layout == "TND" else None
    mask = masks.PerHead([SMALL, SMALL, WIDER, WIDER]) if number else SMALL
    meant = [of(one) for one in (SMALL, SMALL, WIDER if number else SMALL)]
    cells = torch.stack([meant[0], meant[1], meant[2], meant[2]])
    q, k, v = (torch.randn(2, 96, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    leaves = [t.requires_grad_() for t in (q, k, v, torch.randn(4, dtype=torch.float64))]
    shaped = {
        "BSND": lambda t: t,
        "SBH": lambda t: t.transpose(0, 1).flatten(2),
        "TND": lambda t: t.flatten(0, 1),
    }[layout]
    given = [shaped(t) for t in leaves[:3]]
    request = read_request(
        Composition(mask=mask, layout=layout),
        *given,
        num_heads=4,
        num_kv_heads=2,
        seqlens=lens,
        sink=leaves[3],
    )
    plan = plan_on(request, number)
    found = BACKENDS["emulated"].run(plan, Operands(*given, sink=leaves[3]))
    scores = torch.einsum("bsnd,btnd->bnst", q, k.repeat_interleave(2, 2)) / 2
    scores = scores.masked_fill(~cells, -torch.inf)
    whole = torch.cat([scores, leaves[3][None, :, None, None].expand(2, 4, 96, 1)], -1)
    out = torch.einsum("bnst,btnd->bsnd", whole.softmax(-1)[..., :-1], v.repeat_interleave(2, 2))
    lse = whole.logsumexp(-1)
    lse = lse.transpose(1, 2).flatten(0, 1) if layout == "TND" else lse
    dy, slope = torch.randn_like(out), torch.randn_like(lse)
    meant = [shaped(out), lse, *torch.autograd.grad([out, lse], leaves, [dy, slope])]
    ends = [found.output, found.stats.lse]
    ours = [*ends, *torch.autograd.grad(ends, leaves, [shaped(dy), slope])]
    for a, b in zip(ours, meant, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def no_cells(*_: Any) -> Any:
    raise AssertionError("cells of the order in which tokens stand")


def test_sliding_tiles_of_a_video_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """115,200 tokens: nothing is asked of the order in which they stand, and nothing is merged."""
    monkeypatch.setattr(GridMask, "_cells", no_cells)
    mask, tokens = masks.SlidingTiles((30, 48, 80), tile=(6, 8, 8), window=3), 30 * 48 * 80
    x = torch.empty(1, tokens, 24, 128, device="meta", dtype=torch.bfloat16)
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    (call,) = plan.calls
    assert call.atten_mask is None
    assert (call.query.shape, call.key.shape) == ((tokens, 24, 128), (995_328, 24, 128))
    assert plan.in_order is not None
    assert plan.price is not None
    calls = lower(plan.in_order).price
    assert calls is not None
    assert plan.price.copy_bytes == calls.copy_bytes + 2 * 4 * x.nbytes
    assert how_moved(plan.request, plan.in_order).startswith("positions sorted, in 28,800 ranges")
    assert {finding.code for finding in mask.lint(tokens, tokens)} == {"not-a-region"}


def test_a_video_and_its_text_are_split_where_the_op_or_memory_has_limits() -> None:
    """More than a million keys are two calls on other rows, and so are too many bytes."""
    video, tokens = masks.SlidingTiles((30, 48, 80), tile=(6, 8, 8), window=3), 30 * 48 * 80
    text = masks.Columns(tokens, None) | masks.Rows(tokens, None)
    x = torch.empty(1, tokens + 256, 8, 64, device="meta", dtype=torch.bfloat16)
    plan = ak.plan(x, x, x, mask=masks.Placed(video, after=256) | text, backend="emulated")
    assert [call.atten_mask for call in plan.calls] == [None, None]
    assert max(call.key.shape[0] for call in plan.calls) <= 1_000_000
    x, limit = x[:, :tokens], 2_000_000_000
    plan = ak.plan(x, x, x, mask=video, backend="emulated", memory_limit=limit)
    assert len(plan.calls) > 1
    assert plan.price is not None
    assert plan.in_order is not None
    assert plan.price.peak_bytes <= limit
    assert plan.in_order.memory_limit == limit - 4 * x.nbytes
    with pytest.raises(ak.BackendRefused, match="moved tokens take 471,859,200 bytes"):
        ak.plan(x, x, x, mask=video, backend="emulated", memory_limit=400_000_000)


def test_a_report_and_a_picture_are_of_the_sorted_positions() -> None:
    x = torch.empty(1, 96, 4, 8, dtype=torch.float64)
    per_head = masks.PerHead([SMALL, SMALL, WIDER, WIDER])
    request = read_request(Composition(mask=per_head), x, x, x)
    for number, moved in (
        (0, "positions sorted, in 96 ranges of queries and keys"),
        (1, "heads as batch elements, 4 of one head"),
        (-1, "positions sorted, in 96 ranges of queries and keys and heads as batch elements, "),
    ):
        plan = plan_on(request, number)
        assert plan.to_dict()["moved"].startswith(moved)
        assert pickle.loads(pickle.dumps(plan)) == plan
    (title,) = (one.get_text() for one in [plan.plot(head=3).axes[0].title])
    assert f"{100 * of(WIDER).float().mean():.1f} % of the cells" in title
    assert "moved       positions sorted" in plan.explain()


def test_rows_without_keys_are_found_where_positions_are_sorted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lint reads no cells of a mask that is a region in its order alone."""
    rest = masks.Keys([(3, 90)]) & masks.Rows(5, None)
    mask = masks.SlidingWindow(7) & Dilated(3) & rest
    order = mask.in_order(96, 96)
    assert order is not None
    cells = mask.materialize(96, 96)[0, 0]
    rows, keys = order.unmatched()
    assert [i for a, b in rows for i in range(a, b)] == (~cells.any(1)).nonzero().flatten().tolist()
    assert [j for a, b in keys for j in range(a, b)] == (~cells.any(0)).nonzero().flatten().tolist()
    monkeypatch.setattr(Dilated, "_cells", no_cells)
    found = (masks.Causal() & Dilated(3) & masks.Rows(5, None)).lint(8192, 8192)
    assert [finding.code for finding in found] == ["empty-rows", "not-a-region"]
    assert "rows 0 to 4" in found[0].message


def test_moved_tokens_are_in_the_price() -> None:
    x = torch.empty(1, 8192, 8, 64, device="meta", dtype=torch.bfloat16)
    plan = ak.plan(x, x, x, mask=masks.SlidingWindow(256) & Dilated(2), backend="emulated")
    assert plan.in_order is not None
    inner = lower(plan.in_order).price
    assert plan.price is not None
    assert inner is not None
    assert plan.price.copy_bytes - inner.copy_bytes == 2 * 4 * x.nbytes
    assert plan.price.small_launches - inner.small_launches == 6


def test_the_price_chooses_between_the_orders() -> None:
    """A small full mask is cheaper than moving all tokens; what the other would cost is told."""
    mask = masks.Causal() & Dilated(4)
    for length, sorts in ((512, False), (4096, True)):
        x = torch.empty(1, length, 8, 64, device="meta", dtype=torch.bfloat16)
        plan = ak.plan(x, x, x, mask=mask, backend="emulated")
        assert (plan.in_order is not None) == sorts
        assert "dearer-order" in {reason.code for reason in plan.refusals}


def test_tampered_orders_are_refused() -> None:
    x = torch.empty(1, 96, 2, 8, dtype=torch.float64)
    request = read_request(Composition(mask=SMALL), x, x, x)
    plan = plan_on(request, 0)
    assert plan.in_order is not None
    for other in (
        replace(plan, in_order=None),
        replace(plan, in_order=replace(plan.in_order, mask=Sorted(WIDER))),
        replace(plan, in_order=replace(plan.in_order, mask=SMALL)),
        replace(plan, in_order=replace(plan.in_order, scale=3.0)),
        replace(plan, request=replace(request, mask=WIDER)),
    ):
        with pytest.raises(KernelContractError):
            other.verify()
