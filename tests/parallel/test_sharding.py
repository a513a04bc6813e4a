"""`Sharding` as a value: who has which positions, for every length and number of ranks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnkit as ak
from attnkit.parallel import Sharding
from attnkit.parallel.sharding import even_sizes

MAKERS = {"contiguous": Sharding.contiguous, "zigzag": Sharding.zigzag}
SMALL = list(product(range(14), range(1, 9)))


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """Any partition: each position is dealt to some rank."""
    dealt = draw(st.lists(st.integers(0, 4), max_size=40))
    ranks = draw(st.integers(5, 7))
    spans = [[(p, p + 1) for p, r in enumerate(dealt) if r == rank] for rank in range(ranks)]
    return Sharding.of(len(dealt), spans)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_position_is_with_one_rank_and_ranks_have_as_many_to_one(
    make: Callable[[int, int], Sharding],
) -> None:
    for length, ranks in SMALL:
        found = make(length, ranks)
        every = torch.cat([found.positions(rank) for rank in range(ranks)])
        assert sorted(every.tolist()) == list(range(length))
        assert found.sizes == tuple(even_sizes(length, ranks))
        assert max(found.sizes) - min(found.sizes) <= 1


def test_zigzag_is_two_chunks_of_twice_as_many_where_they_divide() -> None:
    for ranks, chunk in product(range(1, 6), range(1, 4)):
        last = 2 * ranks - 1
        spans = [[(k * chunk, (k + 1) * chunk) for k in (r, last - r)] for r in range(ranks)]
        assert Sharding.zigzag(2 * ranks * chunk, ranks) == Sharding.of(2 * ranks * chunk, spans)


@given(shardings())
@settings(max_examples=60, deadline=None)
def test_a_sharding_is_a_value(found: Sharding) -> None:
    again = pickle.loads(pickle.dumps(found))
    assert again == found == copy.deepcopy(found) == Sharding.parse(str(found))
    assert hash(again) == hash(found)
    assert len({found, again}) == 1
    if found.length > 1 and found.ranks[0]:
        moved = (found.ranks[-1], *found.ranks[1:-1], found.ranks[0])
        assert (Sharding(found.length, moved) == found) == (found.ranks[0] == found.ranks[-1])
    owners = [found.owner(position) for position in range(found.length)]
    for rank in range(found.size):
        own = [p for p, owner in enumerate(owners) if owner == rank]
        assert found.positions(rank).tolist() == own
        assert found.show(found.length or 1).split("\n")[rank].count("#") == len(own)


@given(shardings(), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_parts_of_all_ranks_are_the_whole_again(found: Sharding, dim: int) -> None:
    shape = [2, 2, 2]
    shape[dim] = found.length
    whole = torch.randn(shape)
    parts = [found.take(whole, rank, dim) for rank in range(found.size)]
    assert torch.equal(found.restore(parts, dim), whole)
    assert torch.equal(found.restore([p.clone() for p in parts], dim - 3), whole)


def test_what_is_kept_stays_in_the_process() -> None:
    found = Sharding.zigzag(64, 4)
    fresh = pickle.dumps(found)
    assert (hash(found), found.sizes, found.owner(3)) != (None, None, None)
    assert pickle.dumps(found) == fresh


def test_a_repr_is_short_however_many_ranges_there_are() -> None:
    spans = [[(p, p + 1) for p in range(rank, 65536, 512)] for rank in range(512)]
    found = Sharding.of(65536, spans)
    assert repr(found) == "<Sharding of 65,536 tokens on 512 ranks: 128 each, in 128 ranges>"
    assert len(found.show().split("\n")) == 17
    assert Sharding.parse(str(found)) == found
    assert repr(Sharding.zigzag(9, 2)) == "Sharding.parse('9 = 0:3 7:9 | 3:7')"
    assert repr(Sharding.of(1, [[], [(0, 1)]])) == "Sharding.parse('1 = | 0:1')"
    assert Sharding.parse("1 = | 0:1").sizes == (0, 1)


WRONG = {
    "a position with no rank": (
        lambda: Sharding.of(4, [[(0, 2)], [(3, 4)]]),
        "position 2 is with no rank",
    ),
    "a position with two": (
        lambda: Sharding.of(4, [[(0, 2)], [(1, 4)]]),
        "position 1 is with ranks 0 and 1",
    ),
    "one of a rank twice": (lambda: Sharding(4, ((range(3), range(2, 4)),)), "some position twice"),
    "a position too many": (lambda: Sharding.of(4, [[(0, 5)]]), "no position 4"),
    "a negative one": (lambda: Sharding(2, ((range(-1, 1),), (range(1, 2),))), "no position -1"),
    "no rank": (lambda: Sharding(4, ()), "0 ranks"),
    "no ranks at all": (lambda: Sharding.contiguous(4, 0), "ranks=0 is too small"),
    "ranks that are a number": (lambda: Sharding(4, 2), "give the positions of each rank"),  # type: ignore[arg-type]
    "a text for ranks": (lambda: Sharding(4, "ab"), "give the positions of each rank"),  # type: ignore[arg-type]
    "positions one by one": (lambda: Sharding(2, ((0, 1),)), "range(0, 2)"),  # type: ignore[arg-type]
    "a range with steps": (lambda: Sharding(4, ((range(0, 4, 2),), (range(1, 4, 2),))), "step 1"),
    "a span that falls": (lambda: Sharding.of(4, [[(0, 4), (4, 2)]]), "(4, 2)"),
    "a span of one": (lambda: Sharding.of(4, [[(0,)]]), "spans (start, stop)"),  # type: ignore[list-item]
    "a negative length": (lambda: Sharding.zigzag(-1, 2), "length=-1"),
    "a length that is none": (lambda: Sharding.zigzag(2.0, 2), "length=2.0"),  # type: ignore[arg-type]
    "a text that is none": (lambda: Sharding.parse("8: 0-2"), "write the length"),
    "ranges that run into each other": (lambda: Sharding.parse("14 = 0:14:4"), "no sharding"),
    "many such ranges": (lambda: Sharding.parse("8 = 1" + ":11111" * 30), "no sharding"),
    "a length of thousands of digits": (
        lambda: Sharding.parse("9" * 5000 + " = 0:1"),
        "no sharding",
    ),
    "a rank that is not": (lambda: Sharding.zigzag(8, 2).positions(2), "rank=2"),
    "a position that is not": (lambda: Sharding.zigzag(8, 2).owner(8), "position 8"),
    "a tensor of another length": (
        lambda: Sharding.zigzag(8, 2).take(torch.zeros(1, 9), 0),
        "9 positions along dim 1; this sharding is of 8",
    ),
    "a part for the whole": (
        lambda: Sharding.zigzag(8, 2).take(torch.zeros(1, 4), 0),
        "looks like a part of one rank",
    ),
    "an axis that is not": (lambda: Sharding.zigzag(8, 2).take(torch.zeros(8), 0), "dim=1"),
    "a part too few": (lambda: Sharding.zigzag(8, 2).restore([torch.zeros(1, 4)]), "(4,)"),
    "a list for a tensor": (lambda: Sharding.zigzag(8, 2).take([0] * 8, 0, 0), "a tensor"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "told"), WRONG.values(), ids=WRONG)
def test_wrong_input_teaches(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ak.CompositionError) as caught:
        call()
    assert told in str(caught.value)
    assert len(str(caught.value)) < 1000
