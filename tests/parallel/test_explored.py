"""The data of a parallel plan's page: who has what, and what is sent, as the plan says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from attnkit import SeqLens, masks
from attnkit.masks import Mask
from attnkit.parallel import ParallelPlan, plan
from attnkit.parallel.explored import as_page
from attnkit.ranges import Ranges

CAUSAL = masks.Causal()


def planned(ranks: int = 4, mask: Mask = CAUSAL, length: int = 48, **chosen: Any) -> ParallelPlan:
    x = torch.empty(1, length, 4, 16, device="meta")
    return plan(x, x, x, ranks=ranks, mask=mask, **chosen)


def ranges(ends: list[int]) -> Ranges:
    each = zip(ends[::3], ends[1::3], ends[2::3], strict=True)
    return tuple(range(*one) for one in each)


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "needed", "stages": 2},
        {"method": "ring", "balance": "zigzag"},
        {"method": "gather"},
        {"method": "ulysses"},
        {"method": "hybrid", "heads_ways": 2},
    ],
    ids=lambda chosen: chosen["method"],
)
def test_owners_stages_and_bytes_are_those_of_the_plan(chosen: dict[str, Any]) -> None:
    found = planned(**chosen)
    data = json.loads(json.dumps(as_page(found)))
    told = data["ranks"]
    assert (told["size"], told["ways"]) == (4, found.heads_ways)
    assert [*map(ranges, told["rows"])] == [*found.queries.ranks]
    assert [*map(ranges, told["keys"])] == [*found.keys.ranks]
    assert [range(*own) for own in told["heads"]] == [*map(found.heads, range(found.heads_ways))]
    assert [ranges(own)[0] for own in told["distances"]] == [*found.exchange.distances]
    assert [*map(ranges, told["wanted"])] == [*found.exchange.wanted]
    assert told["forward"] == found.transfers.forward.tolist()
    assert told["backward"] == found.transfers.backward.tolist()
    for rank in range(4):
        for stage, (number, keys, receives, sends) in zip(
            found.stages(rank), told["stages"][rank], strict=True
        ):
            assert (number, keys) == (stage.number, sum(map(len, stage.keys)))
            for own, messages in ((receives, stage.receives), (sends, stage.sends)):
                assert own == [[m.rank, sum(map(len, m.keys))] for m in messages]


def test_tabs_are_the_rivals_and_their_prices() -> None:
    found = planned()
    first, *others = as_page(found)["views"]
    assert [view["label"] for view in others] == [one.label for one in found.alternatives]
    assert all("%" in view["price"] or "same" in view["price"] for view in others)
    assert "%" not in first["price"]


def test_the_masks_of_a_packed_batch_stand_down_the_diagonal() -> None:
    x = torch.empty(30, 4, 16, device="meta")
    found = plan(x, x, x, ranks=2, mask=CAUSAL, layout="TND", seqlens=SeqLens([10, 20]))
    data = as_page(found)
    assert data["starts"] == [[0, 10, 30]] * 2
    assert [patch[1] for patch in data["allowed"]] == [0, 1]


def test_many_ranks_and_tokens_are_a_small_page() -> None:
    found = planned(512, length=2**20)
    data = as_page(found)
    assert len(json.dumps(data)) < 1_500_000
    assert data["ranks"]["names"][:2] == ["0 to 15", "16 to 31"]
    whole = int(found.transfers.forward.sum())
    assert sum(map(sum, data["ranks"]["forward"])) == whole


def test_the_command_plans_the_same() -> None:
    found = planned(method="hybrid", heads_ways=2, balance="zigzag")
    command = " ".join(as_page(found)["command"])
    assert command.endswith("--ranks 4 --method hybrid --heads-ways 2 --balance zigzag")
