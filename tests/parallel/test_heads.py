"""Heads are dealt to ranks, tokens are exchanged for them and back, and bytes are as told."""

from __future__ import annotations

import pickle
from itertools import product

import pytest
import torch

from attnkit.parallel.heads import Item, RankTurn, Turn, coarse, heads_of
from attnkit.planner import Composition, read_request
from tests.parallel.cases import at_random
from tests.parallel.threads import ThreadWires, run_ranks

BATCH, TOKENS, KEYS, DIM, VALUE_DIM = 2, 13, 11, 4, 6


def test_heads_are_dealt_once_and_read_their_own_key_heads() -> None:
    for kv_heads, group, ways in product(range(1, 7), range(1, 5), range(1, 9)):
        heads = kv_heads * group
        dealt = heads_of(heads, kv_heads, ways)
        assert len(dealt) == ways
        assert [h for own, _ in dealt for h in own] == list(range(heads))
        for own, keys in dealt:
            assert sorted({h // group for h in own}) == list(keys)
            # A share is grouped as an attention of its own: by blocks of equal size.
            assert not keys or len(own) % len(keys) == 0
            assert [h // group for h in own] == [
                keys[k // (len(own) // len(keys))] for k in range(len(own))
            ]
        most = max(len(own) for own, _ in dealt)
        if kv_heads % ways == 0 or (ways % kv_heads == 0 and group % (ways // kv_heads) == 0):
            assert most == heads / ways


def turn_of(
    heads: int, kv_heads: int, ranks: int, ways: int, dtype: torch.dtype = torch.float32
) -> Turn:
    request = read_request(
        Composition(layout="BSH"),
        torch.empty(BATCH, TOKENS, heads * DIM, dtype=dtype, device="meta"),
        torch.empty(BATCH, KEYS, kv_heads * DIM, dtype=dtype, device="meta"),
        torch.empty(BATCH, KEYS, kv_heads * VALUE_DIM, dtype=dtype, device="meta"),
        num_heads=heads,
        num_kv_heads=kv_heads,
    )
    return Turn(request, at_random(TOKENS, ranks, 1), at_random(KEYS, ranks, 2), ways)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1), (6, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize(("ranks", "ways"), [(2, 2), (4, 2), (4, 4), (3, 3)])
def test_tokens_come_with_heads_and_go_back(
    heads: int, kv_heads: int, ranks: int, ways: int
) -> None:
    turn = turn_of(heads, kv_heads, ranks, ways)
    rows, keys = coarse(turn.queries, ways), coarse(turn.keys, ways)
    whole = torch.randn(BATCH, heads, TOKENS, DIM), torch.randn(BATCH, kv_heads, KEYS, VALUE_DIM)

    def work(wires: ThreadWires) -> list[int]:
        rank, here = wires.rank, RankTurn(turn, wires.rank)
        own = turn.queries.take(whole[0], rank, 2), turn.keys.take(whole[1], rank, 2)
        items = [Item(own[0], False), Item(own[1], True)]
        query, key = here.to_heads(wires, items, "there")
        of_query, of_key = turn.heads[rank % ways]
        assert torch.equal(query, rows.take(whole[0], rank // ways, 2)[:, list(of_query)])
        assert torch.equal(key, keys.take(whole[1], rank // ways, 2)[:, list(of_key)])
        items = [Item(query, False), Item(key, True)]
        query, key = here.to_tokens(wires, items, (heads, kv_heads), "back")
        times = torch.tensor([sum(h in own for _, own in turn.heads) for h in range(kv_heads)])
        assert torch.equal(query, own[0])
        assert torch.equal(key, own[1] * times[:, None, None])
        return wires.received

    assert len(run_ranks(ranks, work)) == ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "ways"), [(4, 2, 2), (4, 1, 4), (3, 3, 4), (6, 2, 2)]
)
def test_bytes_are_as_told(heads: int, kv_heads: int, ways: int, dtype: torch.dtype) -> None:
    turn = turn_of(heads, kv_heads, 4, ways, dtype)
    summed = torch.float32 if turn.shares_keys else dtype

    def work(wires: ThreadWires) -> tuple[list[int], list[int]]:
        here, rank = RankTurn(turn, wires.rank), wires.rank
        sizes = turn.queries.sizes[rank], turn.keys.sizes[rank]
        given = [
            Item(torch.zeros(BATCH, n, s, d, dtype=dtype), of_keys)
            for n, s, d, of_keys in (
                (heads, sizes[0], DIM, False),
                (kv_heads, sizes[1], DIM, True),
                (kv_heads, sizes[1], VALUE_DIM, True),
            )
        ]
        q, k, v = here.to_heads(wires, given, "there")
        out = q.new_zeros(*q.shape[:3], VALUE_DIM)
        lse = q.new_zeros(*q.shape[:3], 1, dtype=torch.float32)
        answer = [Item(out, False), Item(lse, False)]
        back = here.to_tokens(wires, answer, (heads, heads), "back")
        forward = list(wires.sent)
        here.to_heads(wires, [Item(one, False) for one in back], "gradients")
        slopes = [Item(q, False), Item(k.to(summed), True), Item(v.to(summed), True)]
        here.to_tokens(wires, slopes, (heads, kv_heads, kv_heads), "gradients back")
        return forward, [a - b for a, b in zip(wires.sent, forward, strict=True)]

    found, told = run_ranks(4, work), turn.transfers
    assert "transfers" not in vars(pickle.loads(pickle.dumps(turn)))
    assert [one[0] for one in found] == told[0].tolist()
    assert [one[1] for one in found] == told[1].tolist()
