"""Masks that are regions once positions are sorted, by residue or by tiles."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends.base import BACKENDS, Operands
from attnkit.errors import KernelContractError
from attnkit.geometry import Region, Slice
from attnkit.masks import Dilated, Enclosure, Mask
from attnkit.planner import Plan, Request, read_request
from attnkit.planner.decompose import Search
from attnkit.planner.lower import in_other_order, lower
from attnkit.planner.orders import Sorted, restated, sorted_positions
from attnkit.planner.request import Composition

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


@dataclass(frozen=True, repr=False, eq=False)
class Tiles(Mask):
    """Sliding tiles: a query sees the tiles around its own, shifted inside at borders.

    It has no cells in the order in which tokens stand: nothing may ask for them.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    window: tuple[int, ...]

    @property
    def extent(self) -> tuple[int | None, int | None]:
        return math.prod(self.shape), math.prod(self.shape)

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        return Enclosure(Region.empty(), Region.full(q_len, kv_len))

    def _counts(self) -> list[int]:
        return [size // own for size, own in zip(self.shape, self.tile, strict=True)]

    def meant(self) -> torch.Tensor:
        """Return the cells by the formula."""
        whole = torch.ones(1, 1, dtype=torch.bool)
        for n, tile, window in zip(self._counts(), self.tile, self.window, strict=True):
            first = (torch.arange(n) - window // 2).clamp(0, n - window)
            seen = torch.arange(n) - first[:, None]
            axis = ((seen >= 0) & (seen < window)).repeat_interleave(tile, 0)
            whole = torch.kron(whole.int(), axis.repeat_interleave(tile, 1).int()).bool()
        return whole

    def in_order(
        self, q_len: int, kv_len: int, batch: int = 0, head: int = 0
    ) -> masks.Order | None:
        counts, size = self._counts(), math.prod(self.tile)
        lines, blocks = [], []
        for k, tile in enumerate(product(*map(range, counts))):
            corner = [a * own for a, own in zip(tile, self.tile, strict=True)]
            inside = (range(a, a + own) for a, own in zip(corner, self.tile, strict=True))
            *lead, last = inside
            for at in product(*lead, last[:1]):
                start = _number(at, self.shape)
                lines.append(range(start, start + len(last)))
            around = [
                range(first, first + w)
                for a, n, w in zip(tile, counts, self.window, strict=True)
                for first in [min(max(a - w // 2, 0), n - w)]
            ]
            for near in product(*around[:-1], around[-1][:1]):
                j = _number(near, counts)
                span = (j * size, (j + self.window[-1]) * size)
                blocks.append(Slice(k * size, (k + 1) * size, *span))
        return masks.Order(tuple(lines), tuple(lines), Region.of(*blocks))


def _number(at: Sequence[int], shape: Sequence[int]) -> int:
    return functools.reduce(lambda n, step: n * step[1] + step[0], zip(at, shape, strict=True), 0)


SMALL = Tiles((4, 6, 4), (2, 2, 2), (1, 3, 1))
WIDER = Tiles((4, 6, 4), (2, 2, 2), (2, 1, 1))


def cells_in_order(mask: masks.Mask, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cells in the order of a mask, and what it says that they are there."""
    order = mask.in_order(*cells.shape)
    assert order is not None
    assert order.fits(*cells.shape)
    rows, keys = ([i for part in side for i in part] for side in (order.rows, order.keys))
    painted = masks.Slices.of(order.region, *cells.shape).materialize(*cells.shape)
    return cells[rows][:, keys], painted[0, 0]


def test_what_is_composed_of_tiles_keeps_their_order() -> None:
    inside, columns = SMALL.meant(), masks.Columns(90, 96).materialize(96, 96)[0, 0]
    causal = masks.Causal().materialize(96, 96)[0, 0]
    for mask, cells in (
        (SMALL, inside),
        (SMALL & masks.Columns(90, 96), inside & columns),
        (SMALL | masks.Columns(90, 96), inside | columns),
        (SMALL & masks.Causal(), inside & causal),
        (SMALL & WIDER, inside & WIDER.meant()),
        (SMALL | WIDER, inside | WIDER.meant()),
    ):
        torch.testing.assert_close(*cells_in_order(mask, cells))
    assert (SMALL | masks.Causal()).in_order(96, 96) is None  # a band is one in its order only
    assert (SMALL & Tiles((4, 6, 4), (4, 2, 2), (1, 1, 1))).in_order(96, 96) is None
    assert (SMALL & Dilated(2)).in_order(96, 96) is None
    assert masks.PerHead([SMALL, WIDER]).in_order(96, 96, head=1) == WIDER.in_order(96, 96)


def plan_on(request: Request, number: int) -> Plan:
    """Return the plan of a request restated in one of the ways there are, whatever it costs."""
    others = [way for way in restated(request) if isinstance(way, Request)]
    plan = replace(in_other_order(request, others[number], Search()), backend="emulated")
    plan.verify()
    return plan


@pytest.mark.parametrize("layout", ["BSND", "SBH", "TND"])
@pytest.mark.parametrize("number", [0, 1])
def test_tiles_equal_the_definition(layout: str, number: int) -> None:
    """One window for all heads, and one for each pair: sorted, then folded as well."""
    torch.manual_seed(0)
    lens = ak.SeqLens([96, 96]) if layout == "TND" else None
    mask = masks.PerHead([SMALL, SMALL, WIDER, WIDER]) if number else SMALL
    meant = [one.meant() for one in (SMALL, SMALL, WIDER if number else SMALL)]
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


def test_sliding_tiles_of_a_video_are_planned_in_their_order() -> None:
    """115,200 tokens: no cell is asked for in the order in which they stand."""
    mask, tokens = Tiles((30, 48, 80), (6, 8, 8), (3, 3, 3)), 30 * 48 * 80
    x = torch.empty(1, tokens, 24, 128, device="meta", dtype=torch.bfloat16)
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    assert plan.in_order is not None
    assert plan.in_order.matrices.exact
    assert plan.price is not None
    assert plan.price.copy_bytes >= 2 * 4 * x.nbytes
    assert "positions sorted, in 28,800 ranges" in " ".join(plan.explain().split())


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
