"""What ranks post: alike on both sides, and in an order in which nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import pytest

from attnkit.parallel import Sharding
from attnkit.parallel.posting import Post, by_turns, disagreement, posts_of, turn
from attnkit.parallel.stages import EXCHANGED, Exchanged, Stages

MOST = 8


def posted(size: int, messages: Iterator[tuple[int, int]]) -> list[list[Post]]:
    """What every rank posts for messages from one rank to another, each of a size of its own."""
    every: list[list[Post]] = [[] for _ in range(size)]
    for source, to in messages:
        every[source].append(Post("send", to, 10 * source + to + 1))
        every[to].append(Post("receive", source, 10 * source + to + 1))
    return every


def in_turns(every: list[list[Post]]) -> list[tuple[Post, ...]]:
    return [by_turns(rank, len(every), some) for rank, some in enumerate(every)]


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_messages_of_one_turn_have_no_rank_in_common(size: int) -> None:
    """And there are two or three turns for each distance: half of the ranks send at once."""
    turns: dict[tuple[int, int], list[int]] = {}
    for pair in permutations(range(size), 2):
        turns.setdefault(turn(*pair, size), []).extend(pair)
    assert all(len(set(ranks)) == len(ranks) for ranks in turns.values())
    assert len(turns) <= 3 * max(0, size - 1)


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_every_set_of_distances_ends_in_order(size: int) -> None:
    """All ranks exchange with those at some distances: rings, gathers, and stages of both."""
    for count in range(size):
        for distances in combinations(range(1, size), count):
            messages = ((r, (r + d) % size) for d in distances for r in range(size))
            assert disagreement(in_turns(posted(size, messages)), in_order=True) is None


@pytest.mark.parametrize("size", range(1, 5))
def test_every_set_of_messages_ends_in_order(size: int) -> None:
    """Whichever pairs have nothing to exchange, and are left out."""
    pairs = list(permutations(range(size), 2))
    for chosen in range(2 ** len(pairs)):
        some = (pair for k, pair in enumerate(pairs) if chosen >> k & 1)
        assert disagreement(in_turns(posted(size, some)), in_order=True) is None


def causal(size: int, method: Exchanged, count: int = 1) -> Stages:
    """Zigzag halves of a causal mask, 3 tokens in each."""
    length = 6 * size
    spans = [[(3 * r, 3 * r + 3), (length - 3 * r - 3, length - 3 * r)] for r in range(size)]
    return Stages(
        method,
        Sharding.of(length, spans),
        tuple((range(max(stop for _, stop in own)),) for own in spans),
        count,
    )


@pytest.mark.parametrize("method", EXCHANGED)
@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_stages_are_posted_alike_on_both_sides(size: int, method: Exchanged) -> None:
    for count in (1, 2, 3):
        stages = causal(size, method, count)
        for number in stages.numbers:
            for back in (False, True):
                group = posts_of(stages, number, back=back)
                assert disagreement(group) is None
                ordered = posts_of(stages, number, in_turns=True, back=back)
                assert disagreement(ordered, in_order=True) is None
                assert [sorted(some) for some in ordered] == [sorted(some) for some in group]


@pytest.mark.parametrize("size", range(2, MOST + 1))
def test_a_ring_that_sends_first_is_seen_to_hang(size: int) -> None:
    ring = posted(size, ((rank, (rank + 1) % size) for rank in range(size)))
    first = [sorted(some, key=lambda one: one.way != "send") for some in ring]
    told = disagreement(first, in_order=True)
    assert told is not None
    assert told.endswith("for ever")
    assert disagreement(first) is None  # as a group it is no matter


def test_even_ranks_first_hang_where_distances_are_even() -> None:
    """What a ring of distance 1 is ordered by does not hold for others."""
    size = 4
    ring = posted(size, ((rank, (rank + 2) % size) for rank in range(size)))
    parity = [
        sorted(some, key=lambda one: (one.way == "send") == bool(rank % 2))
        for rank, some in enumerate(ring)
    ]
    assert disagreement(parity, in_order=True) is not None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda every: every[1].pop(), "no"),
        (lambda every: every[0].append(Post("send", 1, 1)), "no receive"),
        (lambda every: every[2].append(Post("receive", 0, 0)), "no send"),
        (lambda every: every.__setitem__(0, [p._replace(keys=p.keys + 1) for p in every[0]]), "no"),
        (lambda every: [some.extend(some) for some in every], "2 messages"),
    ],
)
def test_sides_that_differ_are_told(change, told: str) -> None:  # type: ignore[no-untyped-def]
    every = posted(3, ((rank, (rank + 1) % 3) for rank in range(3)))
    assert disagreement(every) is None
    change(every)
    found = disagreement(every)
    assert found is not None
    assert told in found
