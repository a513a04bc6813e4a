"""Plans for ranks changed by hand: whatever is changed, they do not verify, or nothing is wrong.

First what could go wrong between ranks, one by one; then every field of every record, by values of
other plans and of other kinds. Nothing in that part knows what a field means: a mutant that passes
has each cell of its mask in one stage of one rank, and only keys that have arrived there.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks, parallel, pse
from attnkit.parallel import ParallelPlan, Sharding
from attnkit.parallel.plan import StagePiece
from attnkit.parallel.stages import Message, RankStage, Stages
from attnkit.ranges import Ranges, joined
from tests.parallel.test_stages import dealt, positions
from tests.planner.test_tampering import Pool, mutants

LENGTH, RANKS = 24, 4
MASK = masks.Causal() & (masks.SlidingWindow(9) | masks.Columns(0, 2))
Tables = list[list[RankStage]]


def planned(mask: masks.Mask = MASK, **rest: Any) -> ParallelPlan:
    x = torch.empty(1, LENGTH, 4, 8)
    given = {"ranks": RANKS, "method": "needed", "balance": "zigzag", "stages": 2} | rest
    return parallel.plan(x, x[:, :, :2], x[:, :, :2], mask=mask, backend="reference", **given)


def caught(plan: ParallelPlan) -> str:
    with pytest.raises(ak.KernelContractError, match="does not compute") as error:
        plan.verify()
    return error.value.codes[0]


# -- what is exchanged -----------------------------------------------------------------------


@dataclass(frozen=True)
class Written(Stages):
    """Stages whose tables are given."""

    tables: tuple[tuple[RankStage, ...], ...] = ()

    def of(self, rank: int) -> tuple[RankStage, ...]:
        return self.tables[rank]


def written(plan: ParallelPlan, change: Callable[[Tables], None]) -> ParallelPlan:
    """The plan with its tables written down, and changed."""
    tables = [[*plan.exchange.of(rank)] for rank in range(plan.exchange.keys.size)]
    change(tables)
    kept = {f.name: getattr(plan.exchange, f.name) for f in fields(Stages)}
    return replace(plan, exchange=Written(**kept, tables=tuple(map(tuple, tables))))


def move(tables: Tables, stage: int, source: int, to: int, keys: Ranges) -> None:
    """Let a rank send another these keys in a stage, in place of what it sends; none: nothing."""
    for rank, other, way in ((source, to, "sends"), (to, source, "receives")):
        old = tables[rank][stage]
        kept = [one for one in getattr(old, way) if one.rank != other]
        every = sorted([*kept, *([Message(other, keys)] if keys else [])])
        tables[rank][stage] = old._replace(**{way: tuple(every)})
    arrived = tables[to][stage].receives
    spans = ((one.start, one.stop) for message in arrived for one in message.keys)
    tables[to][stage] = tables[to][stage]._replace(keys=joined(spans))


def first(tables: Tables, rank: int, stage: int = 1) -> Message:
    return tables[rank][stage].receives[0]


def test_tables_that_are_written_down_are_proven_like_others() -> None:
    plan = written(planned(), lambda tables: None)
    assert plan.disprove() is None
    assert torch.equal(plan.transfers.forward, planned().transfers.forward)


def test_a_key_comes_from_its_owner() -> None:
    def change(tables: Tables) -> None:
        source, keys = first(tables, 0)
        move(tables, 1, source, 0, ())
        move(tables, 1, next(r for r in (1, 2, 3) if r != source), 0, keys)

    assert caught(written(planned(), change)) == "other-owner"


def test_every_key_that_is_seen_arrives() -> None:
    def none(tables: Tables) -> None:
        move(tables, 1, first(tables, 0).rank, 0, ())

    def one_less(tables: Tables) -> None:
        source, (run, *rest) = first(tables, 0)
        move(tables, 1, source, 0, (run[1:], *rest) if len(run) > 1 else tuple(rest))

    def no_last_stage(tables: Tables) -> None:
        for stages in tables:
            stages.pop()

    for change in (none, one_less, no_last_stage):
        assert caught(written(planned(), change)) == "key-missing"


def test_a_key_is_in_one_stage() -> None:
    def twice(tables: Tables) -> None:
        source, keys = first(tables, 0)
        move(tables, 2, source, 0, keys)

    def own_again(tables: Tables) -> None:
        own, again = tables[0][0].keys, tables[0][1].keys
        spans = ((one.start, one.stop) for one in (*own, *again))
        tables[0][1] = tables[0][1]._replace(keys=joined(spans))

    assert caught(written(planned(), twice)) == "key-twice"
    assert caught(written(planned(), own_again)) == "other-keys"


def test_what_is_received_is_what_is_sent() -> None:
    def not_sent(tables: Tables) -> None:
        source = first(tables, 0).rank
        old = tables[source][1]
        sends = tuple(one for one in old.sends if one.rank != 0)
        tables[source][1] = old._replace(sends=sends)

    def not_received(tables: Tables) -> None:
        old = tables[0][2]
        other = next(r for r in (1, 2, 3) if r not in [one.rank for one in old.sends])
        sends = tuple(sorted([*old.sends, Message(other, tables[0][0].keys)]))
        tables[0][2] = old._replace(sends=sends)

    def later(tables: Tables) -> None:
        source = first(tables, 0).rank
        one, two = tables[source][1:]
        moved = [message for message in one.sends if message.rank == 0]
        kept = tuple(message for message in one.sends if message.rank != 0)
        tables[source][1:] = [one._replace(sends=kept), two._replace(sends=(*moved, *two.sends))]

    for change in (not_sent, not_received, later):
        assert caught(written(planned(), change)) in ("unpaired", "other-messages")


def test_messages_are_one_per_pair_and_hold_keys() -> None:
    def empty(tables: Tables) -> None:
        old = tables[0][1]
        tables[0][1] = old._replace(sends=(*old.sends, Message(3, ())))

    def in_parts(tables: Tables) -> None:
        old = tables[0][1]
        tables[0][1] = old._replace(receives=(*old.receives, old.receives[-1]))

    def to_itself(tables: Tables) -> None:
        move(tables, 1, 0, 0, tables[0][0].keys)

    def in_stage_0(tables: Tables) -> None:
        tables[0][0] = tables[0][0]._replace(sends=tables[0][1].sends)

    for change, code in (
        (empty, "other-messages"),
        (in_parts, "other-messages"),
        (to_itself, "other-messages"),
        (in_stage_0, "other-stages"),
    ):
        assert caught(written(planned(), change)) == code


def test_stages_of_all_ranks_are_the_same_ones() -> None:
    def one_more(tables: Tables) -> None:
        tables[0].append(RankStage(3, (), (), ()))

    def swapped(tables: Tables) -> None:
        tables[0][1:] = tables[0][:0:-1]

    assert caught(written(planned(), one_more)) == "other-stages"
    assert caught(written(planned(), swapped)) == "other-stages"


def test_all_keys_under_the_name_of_needed_are_seen_through() -> None:
    plan = planned()
    whole = ((range(LENGTH),),) * RANKS
    assert caught(replace(plan, exchange=replace(plan.exchange, seen=whole))) == "unneeded"
    assert planned(method="ring").disprove() is None


# -- who has what ----------------------------------------------------------------------------


def forged(length: int, ranks: tuple[Ranges, ...]) -> Sharding:
    """A sharding that its constructor would refuse."""
    found = Sharding.of(length, [[(0, length)]])
    object.__setattr__(found, "ranks", ranks)
    return found


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_a_token_is_with_one_rank(side: str) -> None:
    plan = planned()
    own = plan.queries.ranks
    for ranks in (
        ((*own[0], own[1][0]), *own[1:]),  # with two
        (own[0][1:], *own[1:]),  # with none
        (own[0][::-1], *own[1:]),  # not in order
        ((range(-1, 2), *own[0][1:]), *own[1:]),
        ((own[1][0], *own[0][1:]), *own[1:]),
        own[:-1],
    ):
        wrong = replace(plan, **{side: forged(LENGTH, ranks)})
        assert caught(wrong) in ("other-tokens", "unreadable")
    other = Sharding.contiguous(LENGTH, RANKS)
    assert caught(replace(plan, **{side: other})) in ("other-tokens", "key-missing", "unneeded")


class Twisted(ParallelPlan):
    """A plan whose ranks compute other heads or pieces than it says."""

    def heads(self, rank: int) -> range:
        return TWISTS.get("heads", super().heads)(rank)

    def kv_heads(self, rank: int) -> range:
        return TWISTS.get("kv_heads", super().kv_heads)(rank)

    def rows(self, rank: int) -> Ranges:
        return TWISTS.get("rows", super().rows)(rank)

    def pieces(self, rank: int, stage: int) -> tuple[StagePiece, ...]:
        found = super().pieces(rank, stage)
        return TWISTS.get("pieces", lambda rank, stage, found: found)(rank, stage, found)


TWISTS: dict[str, Any] = {}


def twisted(plan: ParallelPlan, monkeypatch: pytest.MonkeyPatch, **twists: Any) -> ParallelPlan:
    for name, twist in twists.items():
        monkeypatch.setitem(TWISTS, name, twist)
    return Twisted(**{f.name: getattr(plan, f.name) for f in fields(ParallelPlan)})


def test_neighbours_have_each_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(method="hybrid", heads_ways=2)
    assert twisted(plan, monkeypatch).disprove() is None
    for heads in (range(2), range(0), range(4)):
        wrong = twisted(plan, monkeypatch, heads=lambda rank, heads=heads: heads)
        assert caught(wrong) == "other-heads"
    monkeypatch.delitem(TWISTS, "heads")
    wrong = twisted(plan, monkeypatch, kv_heads=lambda rank: range(1, 2))
    assert caught(wrong) == "other-heads"


def test_keys_go_between_ranks_of_the_same_heads() -> None:
    plan = planned(method="hybrid", heads_ways=2, stages=1)

    class Crossed(ParallelPlan):
        def stages(self, rank: int) -> tuple[RankStage, ...]:
            every = (stage._asdict() for stage in super().stages(rank))
            return tuple(
                RankStage(
                    **stage
                    | {
                        way: tuple(Message(to ^ 1, keys) for to, keys in stage[way])
                        for way in ("receives", "sends")
                    }
                )
                for stage in every
            )

    crossed = Crossed(**{f.name: getattr(plan, f.name) for f in fields(ParallelPlan)})
    assert caught(crossed) == "other-messages"


def test_neighbours_compute_the_rows_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(method="ulysses")
    assert plan.disprove() is None
    wrong = twisted(plan, monkeypatch, rows=lambda rank: plan.queries.ranks[rank])
    assert caught(wrong) == "other-tokens"
    assert caught(replace(plan, heads_ways=2)) == "other-tokens"
    assert caught(replace(plan, heads_ways=3)) == "heads-ways"
    assert caught(replace(planned(), heads_ways=RANKS)) == "other-tokens"


# -- what is computed ------------------------------------------------------------------------


def test_a_stage_computes_its_cells_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    whole = plan.pieces(3, 0)[0]
    fewer = whole._replace(rows=(whole.rows[0][1:], *whole.rows[1:]))
    others = plan.piece(plan.rows(0), plan.keys.ranks[0], range(4))
    half = plan.piece((whole.rows[0][:2],), whole.keys, range(4))
    of_others = planned(masks.Causal()).pieces(3, 0)[0]
    of_heads = plan.piece(whole.rows, whole.keys, range(2))
    for pieces, code in (
        ((), "other-cells"),
        ((whole, whole), "other-cells"),
        ((whole, half), "other-cells"),
        ((half,), "other-cells"),
        ((fewer,), "other-share"),
        ((others,), "other-share"),
        ((of_others,), "other-share"),
        ((of_heads,), "other-share"),
        ((whole._replace(rows=()),), "other-share"),
        ((whole._replace(bias=pse.ALiBi(4)),), "other-bias"),
        ((whole._replace(plan=replace(whole.plan, backend="tiled")),), "other-backend"),
        ((whole._replace(plan=None),), "unreadable"),
    ):

        def instead(
            rank: int, stage: int, found: tuple[StagePiece, ...], pieces: Any = pieces
        ) -> Any:
            return pieces if (rank, stage) == (3, 0) else found

        assert caught(twisted(plan, monkeypatch, pieces=instead)) == code, code


def test_every_piece_of_a_stage_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused calls take a bias of distances one range of rows and of keys at a time."""
    x = torch.empty(1, LENGTH, 4, 8)
    plan = parallel.plan(
        *(x, x, x),
        ranks=2,
        mask=masks.Causal(),
        pse=pse.ALiBi(4),
        method="needed",
        balance="zigzag",
        backend="emulated",
    )
    assert len(plan.pieces(0, 0)) == 3
    assert plan.disprove() is None
    for at in range(3):

        def without(rank: int, stage: int, found: tuple[StagePiece, ...], at: int = at) -> Any:
            return found[:at] + found[at + 1 :]

        assert caught(twisted(plan, monkeypatch, pieces=without)) == "other-cells"


def test_the_kernel_calls_of_a_share_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, LENGTH, 4, 8)
    plan = parallel.plan(x, x, x, ranks=2, mask=masks.Causal(), backend="emulated", method="needed")

    def no_calls(rank: int, stage: int, found: tuple[StagePiece, ...]) -> Any:
        return tuple(one._replace(plan=replace(one.plan, steps=())) for one in found)

    assert caught(twisted(plan, monkeypatch, pieces=no_calls)) == "no-calls"


def test_the_rest_of_a_plan_is_what_its_request_says() -> None:
    plan = planned()
    for other, code in (
        (masks.Causal(), "key-missing"),
        (masks.SlidingWindow(2), "unneeded"),
        (masks.Full(), "key-missing"),
    ):
        assert caught(replace(plan, request=replace(plan.request, mask=other))) == code
    assert caught(replace(plan, bias=pse.ALiBi(4))) == "other-bias"
    assert caught(replace(plan, backend="none")) == "other-backend"
    assert caught(replace(plan, dropout="none")) == "other-dropout"
    share = plan.pieces(0, 0)[0].plan.request.share
    assert caught(replace(plan, request=replace(plan.request, share=share))) == "other-request"
    assert caught(replace(plan, request=replace(plan.request, q_len=23))) == "other-tokens"
    for name in ("request", "queries", "keys", "exchange", "heads_ways", "keep"):
        assert caught(replace(plan, **{name: None})) in ("unreadable", "heads-ways")


# -- every field -----------------------------------------------------------------------------


def a_plan(seed: int) -> ParallelPlan:
    chance = random.Random(seed)
    some = [
        MASK,
        masks.Causal(),
        masks.Full(),
        masks.SlidingWindow(4) & masks.Causal(),
        masks.Documents([5, 19]) & masks.Causal(),
        masks.PerHead([masks.Causal(), masks.Full(), masks.Causal(), masks.SlidingWindow(3)]),
        masks.Dilated(2) & masks.Causal(),
    ]
    method = chance.choice(["needed", "needed", "ring", "gather", "ulysses", "hybrid"])
    return planned(
        chance.choice(some),
        method=method,
        balance=chance.choice(["zigzag", "even", dealt(chance, LENGTH, RANKS)]),
        stages=chance.randint(1, 3) if method == "needed" else "auto",
        pse=chance.choice([None, None, pse.ALiBi(4)]),
        dropout=chance.choice([0.0, 0.5]),
    )


@cache
def cells_of(mask: masks.Mask, q_len: int, kv_len: int) -> torch.Tensor:
    return mask.materialize(q_len, kv_len, heads=4).long()


def computes_its_mask(plan: ParallelPlan) -> None:
    """Each cell of the mask is in one stage of one rank; keys there are its own or arrived."""
    request = plan.request
    found = torch.zeros(1, 4, request.q_len, request.kv_len, dtype=torch.int64)
    mailbox: Counter[tuple[int, int, int, int]] = Counter()
    for rank in range(plan.size):
        for stage in plan.stages(rank):
            for to, keys in stage.sends:
                own = {key for n in positions_of(plan, rank) for key in n}
                assert positions(keys) <= own
                mailbox.update((stage.number, rank, to, key) for key in positions(keys))
    for rank in range(plan.size):
        arrived = {key for own in positions_of(plan, rank) for key in own}
        for stage in plan.stages(rank):
            for source, keys in stage.receives:
                mailbox.subtract((stage.number, source, rank, key) for key in positions(keys))
                arrived |= positions(keys)
            for piece in plan.pieces(rank, stage.number):
                rows, keys = sorted(positions(piece.rows)), sorted(positions(piece.keys))
                assert {*keys} <= arrived
                local = piece.plan.request.mask.materialize(
                    len(rows), len(keys), heads=len(plan.heads(rank))
                )
                heads = [*plan.heads(rank)]
                for (n, head), (u, row) in product(enumerate(heads), enumerate(rows)):
                    found[0, head, row, keys] += local[0, n, u].long()
    assert not any(mailbox.values())
    meant = cells_of(request.mask, request.q_len, request.kv_len)
    assert torch.equal(found, meant if request.batch else 0 * meant)


def positions_of(plan: ParallelPlan, rank: int) -> list[set[int]]:
    first = rank - rank % plan.heads_ways
    return [positions(plan.keys.ranks[r]) for r in range(first, first + plan.heads_ways)]


def pool_of(plans: list[ParallelPlan]) -> Pool:
    """What some plan has in a field, of the plan and of what it is made of."""
    found: Pool = defaultdict(list)
    for plan in plans:
        for record in (plan, plan.request, plan.queries, plan.keys, plan.exchange):
            for item in fields(record):
                found[type(record), item.name].append(getattr(record, item.name))
    return found


def campaign(seeds: range, share: float) -> Counter[str]:
    plans, chance = [*map(a_plan, seeds)], random.Random(seeds.start)
    told = ("price", "alternatives", "refusals", "balance")
    pool = pool_of(plans)
    tally = Counter({"plans": len(plans)})
    for plan in plans:
        assert plan.disprove() is None
        computes_its_mask(plan)
        for mutant in mutants(plan, pool, chance):
            changed = [
                f.name for f in fields(plan) if getattr(plan, f.name) != getattr(mutant, f.name)
            ]
            if not {*changed} - {*told} or chance.random() > share:
                continue
            if mutant.disprove() is None:
                computes_its_mask(mutant)
                tally["same"] += 1
            else:
                caught(mutant)
                tally["caught"] += 1
    return tally


def test_a_field_changed_by_hand_is_caught_or_changes_no_cell() -> None:
    tally = campaign(range(8), share=0.15)
    assert tally["caught"] > 100, tally


@pytest.mark.sweep
def test_every_field_of_many_plans_for_ranks() -> None:
    tally = campaign(range(100, 130), share=0.5)
    assert tally["caught"] > 500, tally
