"""Plans for ranks: proven, and their bytes counted cell by cell."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import attnkit as ak
from attnkit import masks, parallel, pse
from attnkit.parallel import Sharding
from attnkit.parallel.choices import METHODS, Choices
from attnkit.parallel.plan import ParallelPlan
from attnkit.planner import Composition, Request, read_request
from attnkit.pse.base import rebound
from tests.parallel.cases import GALLERY, SHARDINGS, Case
from tests.parallel.test_stages import dealt, positions

LENGTH = 24
HEADS, KV_HEADS, DIM, VALUE_DIM, BATCH = 4, 2, 8, 4, 2
MASKS = [
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(5),
    masks.Documents([5, 1, 18]) & masks.Causal(),
    masks.SlidingWindow(2) | masks.Columns(0, 2) | masks.Rows(3, 4),
    masks.Padding([9, 24]) & masks.Causal(),
    masks.PerHead([masks.Causal(), masks.SlidingWindow(3), masks.Full(), masks.Causal()]),
    masks.Dilated(2) & masks.SlidingWindow(9),
    ~masks.Full(),
]


def request_of(
    mask: masks.Mask, q_len: int = LENGTH, kv_len: int = LENGTH, layout: str = "BSND"
) -> Request:
    form = ak.layouts.get(layout)
    shapes = ((q_len, HEADS, DIM), (kv_len, KV_HEADS, DIM), (kv_len, KV_HEADS, VALUE_DIM))
    tensors = [
        torch.empty(form.shape(ak.layouts.Sizes(BATCH, *shape)), requires_grad=True)
        for shape in shapes
    ]
    return read_request(
        Composition(mask, layout=layout), *tensors, num_heads=HEADS, num_kv_heads=KV_HEADS
    )


def planned(request: Request, ranks: int, method: str, chance: random.Random) -> ParallelPlan:
    queries = dealt(chance, request.q_len, ranks)
    keys = queries if request.q_len == request.kv_len else dealt(chance, request.kv_len, ranks)
    return ParallelPlan.of(
        request,
        None,
        queries,
        keys,
        Choices(
            method,
            stages="auto" if method != "needed" else chance.randint(1, 3),
            keep=chance.choice([True, False]),
        ),
        "reference",
    )


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_plan_is_proven(mask: masks.Mask) -> None:
    """Whatever is with whom, on more ranks than some have tokens, and on one."""
    chance = random.Random(0)
    for method, ranks in product(METHODS, (1, 2, 3, 4, 6)):
        if method == "hybrid" and ranks in (2, 3):
            continue
        plan = planned(request_of(mask), ranks, method, chance)
        assert plan.disprove() is None, (method, ranks)
        assert plan.method == method or method == "auto" or ranks == 1
        bytes_of_cells(plan)


def bytes_of_cells(plan: ParallelPlan) -> None:
    """The bytes of a plan, from the cells of its mask and the positions of its ranks."""
    if plan.heads_ways > 1:
        return
    request, ranks = plan.request, range(plan.size)
    cells = torch.zeros(request.q_len, request.kv_len, dtype=torch.bool)
    for region in plan.regions(range(HEADS)):
        for i in range(request.q_len):
            for a, b in region.row(i):
                cells[i, a:b] = True
    rows = [sorted(positions(own)) for own in plan.queries.ranks]
    keys = [sorted(positions(own)) for own in plan.keys.ranks]
    moved = torch.zeros(plan.size, plan.size, dtype=torch.int64)
    for source, to in product(ranks, ranks):
        seen = cells[rows[to]].any(0)[keys[source]] if plan.method == "needed" else None
        count = len(keys[source]) if seen is None else int(seen.sum())
        moved[source, to] = count * KV_HEADS * (DIM + VALUE_DIM) * plan.copies * 4 * (source != to)
    assert torch.equal(plan.transfers.forward, moved)
    assert torch.equal(plan.transfers.backward, moved.mT if plan.keep else moved + moved.mT)
    for rank in ranks:
        assert plan.received(rank).forward == moved[:, rank].sum()


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BNSD"])
def test_every_layout_is_planned(layout: str) -> None:
    plan = planned(request_of(masks.Causal(), layout=layout), 3, "needed", random.Random(1))
    assert plan.disprove() is None
    assert {piece.plan.request.layout for piece in plan.pieces(1, 0)} == {layout}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", [masks.Causal(), masks.Causal("top_left"), masks.Columns(3, 9)])
def test_queries_and_keys_of_two_texts_have_a_sharding_each(mask: masks.Mask, method: str) -> None:
    for q_len, kv_len in ((7, 24), (24, 7), (1, 12), (0, 5), (5, 0)):
        plan = planned(request_of(mask, q_len, kv_len), 4, method, random.Random(2))
        assert plan.disprove() is None
        bytes_of_cells(plan)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(2), masks.Full()])
def test_packed_sequences_are_cut_anywhere(mask: masks.Mask, method: str) -> None:
    lens = ak.SeqLens([5, 0, 9, 1, 7], [5, 2, 9, 4, 0])
    query, key = torch.empty(22, HEADS, DIM), torch.empty(20, KV_HEADS, DIM)
    request = read_request(Composition(mask, layout="TND"), query, key, key, seqlens=lens)
    for ranks in (1, 2, 4, 6):
        if method == "hybrid" and ranks == 2:
            continue
        plan = planned(request, ranks, method, random.Random(ranks))
        assert plan.disprove() is None
        for piece in (one for rank in range(ranks) for one in plan.pieces(rank, 0)):
            share = piece.plan.request
            assert share.seqlens is not None
            assert (share.q_len, share.kv_len) == (share.seqlens.total_q, share.seqlens.total_kv)


def test_rows_and_keys_without_cells_are_left_out() -> None:
    """A ring moves all keys, and computes over those that rows see."""
    halves = Sharding.of(LENGTH, [[(0, 12)], [(12, 24)]])
    request = request_of(masks.SlidingWindow(4))
    plan = ParallelPlan.of(request, None, halves, halves, Choices("ring"))
    assert plan.stages(1)[1].keys == (range(12),)
    (piece,) = plan.pieces(1, 1)
    assert (piece.rows, piece.keys) == ((range(12, 15),), (range(9, 12),))
    assert plan.pieces(0, 1) == ()


BIASES = [
    pse.ALiBi(HEADS),
    pse.ALiBi(HEADS, learnable=True),
    pse.T5Relative(HEADS, 8, 6, bidirectional=False, table=nn.Parameter(torch.randn(8, HEADS))),
    pse.Dense(torch.randn(HEADS, LENGTH, LENGTH, requires_grad=True)),
    pse.KeyBias(torch.randn(HEADS, LENGTH)) + pse.SqrtALiBi(HEADS),
]


@pytest.mark.parametrize("bias", BIASES, ids=repr)
def test_a_share_has_the_bias_of_its_rows_keys_and_heads(bias: pse.Pse) -> None:
    chance = random.Random(4)
    x, y = torch.empty(BATCH, LENGTH, HEADS, DIM), torch.empty(BATCH, LENGTH, KV_HEADS, DIM)
    request = read_request(Composition(masks.Causal(), bias), x, y, y)
    whole = bias.materialize(LENGTH, LENGTH, batch=BATCH, heads=HEADS)
    for method, backend in product(("needed", "ring", "hybrid"), ("reference", "auto")):
        sharding = dealt(chance, LENGTH, 4)
        with torch.no_grad():  # a backward pass plans as its forward did
            plan = ParallelPlan.of(request, bias, sharding, sharding, Choices(method), backend)
            assert plan.disprove() is None
        for rank, stage in product(range(4), plan.exchange.numbers):
            for piece in plan.pieces(rank, stage):
                assert piece.bias is not None
                local = rebound(piece.bias, bias.tensors)
                rows, keys = (sorted(positions(some)) for some in (piece.rows, piece.keys))
                heads = [*plan.heads(rank)]
                meant = whole[:, heads][:, :, rows][..., keys]
                found = local.materialize(len(rows), len(keys), batch=BATCH, heads=len(heads))
                assert torch.equal(found, meant)
    assert plan.bias is not None
    assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in plan.bias.tensors)


def test_a_bias_of_packed_sequences_is_cut_with_them() -> None:
    lens, bias = ak.SeqLens([5, 9, 8]), pse.ALiBi(HEADS)
    query = torch.empty(22, HEADS, DIM)
    request = read_request(
        Composition(masks.Causal(), bias, "TND"), query, query, query, seqlens=lens
    )
    sharding = dealt(random.Random(5), 22, 3)
    plan = ParallelPlan.of(request, bias, sharding, sharding, Choices("needed"))
    assert plan.disprove() is None
    whole = Sharding.of(22, [[(0, 22)]])
    alone = ParallelPlan.of(request, bias, whole, whole)
    assert [piece.bias for piece in alone.pieces(0, 0)] == [bias]


def far(score: torch.Tensor, b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return score + 100 * i + j


@pytest.mark.parametrize("packed", [False, True])
def test_a_score_function_is_told_positions_of_the_whole(packed: bool) -> None:
    x = torch.empty(LENGTH, HEADS, DIM)
    composition = Composition(masks.Causal(), layout="TND" if packed else "BSND", score_fn=far)
    lens = ak.SeqLens([10, 14]) if packed else None
    x = x if packed else x[None]
    request = read_request(composition, x, x, x, seqlens=lens)
    sharding = Sharding.zigzag(LENGTH, 2)
    plan = ParallelPlan.of(request, None, sharding, sharding, Choices("needed"))
    assert plan.disprove() is None
    (piece,) = plan.pieces(0, 0)  # tokens 0-5 and 18-23: of sequences, 8-13 of the second
    told = piece.plan.request.score_fn
    assert told is not None
    batch, row, meant = (1, 0, 810) if packed else (0, 6, 1802)
    where = (torch.tensor(n) for n in (batch, 0, row, 2))
    assert float(told(torch.tensor(0.0), *where)) == meant


def test_a_plan_is_a_value() -> None:
    plan = planned(request_of(masks.Causal()), 3, "needed", random.Random(3))
    plan.pieces(1, 0)
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert hash(again) == hash(plan)
    assert set(vars(again)) < set(vars(plan))
    assert again.disprove() is None


@pytest.mark.parametrize("method", ["needed", "ulysses", "hybrid"])
def test_there_are_as_many_ranks_and_stages(method: str) -> None:
    plan = planned(request_of(masks.Causal()), 4, method, random.Random(0))
    asked: list[Callable[[int], object]] = [
        plan.rows, plan.heads, plan.kv_heads, plan.stages, plan.table, plan.received,
        lambda rank: plan.pieces(rank, 0),
    ]  # fmt: skip
    for ask, rank in product(asked, (-1, plan.size)):
        with pytest.raises(ak.CompositionError, match=f"rank={rank}"):
            ask(rank)
    for stage in (-1, len(plan.stages(0))):
        with pytest.raises(ak.CompositionError, match=f"stage={stage}"):
            plan.pieces(0, stage)


def proven(case: Case) -> None:
    plan = case.plan
    assert plan.disprove() is None, case
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize("name", GALLERY)
def test_masks_of_the_gallery_are_proven(name: str) -> None:
    chance = random.Random(name)
    method = chance.choice(["needed", "ring", "gather", "ulysses"])
    sharding = chance.choice([*SHARDINGS])
    ways = 3 if method == "ulysses" else 1
    proven(Case(GALLERY[name], 3, sharding, method, ways))


@pytest.mark.sweep
@pytest.mark.parametrize("name", GALLERY)
def test_masks_of_the_gallery_are_proven_on_every_way_of_ranks(name: str) -> None:
    for ranks, sharding, method, backend in product(
        (3, 4), SHARDINGS, METHODS, ("tiled", "emulated")
    ):
        if method == "auto" or (method == "hybrid" and ranks < 4):
            continue
        ways = {"ulysses": ranks, "hybrid": 2}.get(method, 1)
        proven(Case(GALLERY[name], ranks, sharding, method, ways, backend=backend))


@pytest.mark.parametrize("ranks", [64, 512])
def test_a_million_tokens_on_many_ranks_are_proven(ranks: int) -> None:
    length, window = 2**20, 4096
    x, y = (torch.empty(1, length, n, 64, device="meta", dtype=torch.half) for n in (8, 2))
    docs = masks.Documents([length // 1000 + 1] * 576 + [length // 1000] * 424)
    for mask, most in ((masks.SlidingWindow(window), window - 1), (docs & masks.Causal(), 4200)):
        plan = parallel.plan(
            x, y, y, ranks=ranks, mask=mask, method="needed", balance="even", stages=1
        )
        assert plan.disprove() is None
        assert max(plan.queries.sizes) - min(plan.queries.sizes) <= 1
        assert max(plan.received(rank).keys for rank in range(ranks)) <= most
        assert int(plan.transfers.forward.sum(0).max()) <= most * 2 * 128 * 2
