"""The table of stages against sets of positions, one by one."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.parallel import Sharding
from attnkit.parallel.plane import planes, seeing, seen_by, worth_leaving_out
from attnkit.parallel.stages import EXCHANGED, Exchanged, Stages
from attnkit.planner import Composition, Request, read_request
from attnkit.ranges import Ranges, joined, shared

LENGTH = 12
MASKS = [
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(3),
    masks.BlockCausal(5) & masks.Causal(),
    masks.SlidingWindow(2) | masks.Columns(0, 2),
    masks.Rows(4, 6),
    masks.Dilated(2) & masks.Causal(),
]


def dealt(chance: random.Random, length: int, ranks: int) -> Sharding:
    """Positions dealt to ranks in runs, some of which may get none."""
    spans: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    at = 0
    while at < length:
        stop = min(length, at + chance.randint(1, 4))
        chance.choice(spans).append((at, stop))
        at = stop
    return Sharding.of(length, spans)


def positions(ranges: Ranges) -> set[int]:
    return {position for one in ranges for position in one}


def request_of(mask: masks.Mask, q_len: int = LENGTH, kv_len: int = LENGTH) -> Request:
    x, y = (torch.empty(2, n, 4, 16, device="meta") for n in (q_len, kv_len))
    return read_request(Composition(mask), x, y, y)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_key_that_is_needed_comes_once_from_its_owner(mask: masks.Mask) -> None:
    chance = random.Random(0)
    request = request_of(mask)
    regions = planes(request)
    for method, ranks in product(EXCHANGED, (1, 2, 3, 5, 14)):
        sharding = dealt(chance, LENGTH, ranks)
        seen = tuple(seen_by(regions, rows) for rows in sharding.ranks)
        check(Stages(method, sharding, seen, chance.randint(1, 3)), method)


def moved(stages: Stages, source: int, to: int) -> Ranges:
    """Return the keys that go from a rank to another."""
    own = stages.keys.ranks[source]
    return shared(own, stages.wanted[to]) if stages.method == "needed" else own


def check(stages: Stages, method: Exchanged) -> None:
    ranks = range(stages.keys.size)
    every = [stages.of(rank) for rank in ranks]
    owned = [positions(own) for own in stages.keys.ranks]
    sent = {
        (stage.number, rank, other): keys
        for rank in ranks
        for stage in every[rank]
        for other, keys in stage.sends
    }
    for rank in ranks:
        assert [stage.number for stage in every[rank]] == [*stages.numbers]
        assert every[rank][0] == (0, stages.keys.ranks[rank], (), ())
        arrived: list[int] = []
        for number, keys, receives, _ in every[rank][1:]:
            assert [*receives] == sorted(receives)
            assert positions(keys) == set().union(*(positions(one) for _, one in receives))
            assert keys == joined((one.start, one.stop) for one in keys)
            for source, one in receives:
                assert one
                assert positions(one) <= owned[source]
                assert sent.pop((number, source, rank)) == one == moved(stages, source, rank)
                arrived += sorted(positions(one))
        whole = set(range(stages.keys.length))
        needed = positions(stages.seen[rank]) if method == "needed" else whole
        assert sorted(arrived) == sorted(needed - owned[rank])
    assert not sent


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_rows_see_is_what_the_mask_allows(mask: masks.Mask) -> None:
    chance = random.Random(1)
    request = request_of(mask, 9, 12)
    regions = planes(request)
    cells = torch.zeros(9, 12, dtype=torch.bool)
    for region in regions:
        for i in range(9):
            for a, b in region.row(i):
                cells[i, a:b] = True
    assert bool((cells | ~mask.materialize(9, 12)[0, 0]).all())
    for _ in range(20):
        rows, keys = dealt(chance, 9, 2).ranks[0], dealt(chance, 12, 2).ranks[0]
        some, others = sorted(positions(rows)), sorted(positions(keys))
        assert positions(seen_by(regions, rows)) == {
            j for j in range(12) if bool(cells[some, j].any())
        }
        assert positions(seeing(regions, rows, keys)) == {
            i for i in some if bool(cells[i, others].any())
        }


def test_packed_sequences_stand_down_the_diagonal() -> None:
    x, y = torch.empty(6, 2, 16, device="meta"), torch.empty(8, 2, 16, device="meta")
    lens = ak.SeqLens([2, 0, 3, 1], [3, 1, 4, 0])
    packed = read_request(Composition(masks.Causal(), layout="TND"), x, y, y, seqlens=lens)
    ((region, count),) = planes(packed).items()
    assert count == 2
    assert [region.row(i) for i in range(6)] == [
        ((0, 2),),
        ((0, 3),),
        ((4, 6),),
        ((4, 7),),
        ((4, 8),),
        (),
    ]


def test_heads_and_batch_elements_that_differ_are_planes_of_their_own() -> None:
    heads = masks.PerHead([masks.Causal(), masks.Causal(), masks.Full(), masks.Causal()])
    assert sorted(planes(request_of(heads)).values()) == [2, 6]
    assert list(planes(request_of(heads), range(2, 3)).values()) == [2]
    assert planes(request_of(heads), range(0)) == {}
    rows = masks.Padding([3, 7])
    assert sorted(region.area for region in planes(request_of(rows))) == [36, 84]


def test_small_gaps_stay_and_large_ones_go() -> None:
    some = (range(640),)
    assert worth_leaving_out(some, ()) == ()
    assert worth_leaving_out(some, (range(9, 320), range(329, 600))) == (range(600),)
    assert worth_leaving_out(some, (range(10, 320), range(330, 640))) == (
        range(10, 320),
        range(330, 640),
    )


def test_stages_refuse_what_is_none() -> None:
    halves = Sharding.of(4, [[(0, 2)], [(2, 4)]])
    seen: tuple[Ranges, ...] = ((), ())
    for method, given, count in (("all", seen, 1), ("ring", seen[:1], 1), ("needed", seen, 0)):
        with pytest.raises(ak.CompositionError, match=r"Stages got|stages"):
            Stages(method, halves, given, count)  # type: ignore[arg-type]
