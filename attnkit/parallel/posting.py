"""What a rank posts in a stage, and in which order: for HCCL above all, which checks neither.

Keys and values of a message are one buffer, so that there is one message per pair and direction:
`HcclBatchSendRecv`, to which ``batch_isend_irecv`` maps, takes one buffer per peer and direction,
and hangs where the two sides differ. A peer without a message is left out by both.

Where sends and receives are taken one by one (plain ``HcclSend`` and ``HcclRecv`` on one stream, a
send returns when it was received), the order counts: if every rank of a ring sends first, all wait.
Here every message has a `turn`, which both sides know, and each rank takes its messages by their
turns; messages of one turn have no rank in common. So nobody waits for ever: of the messages that
are left, one with the least turn is next at both of its ends.

None of this was run on HCCL; `disagreement` plays it through, for these orders and any others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import gcd
from typing import Literal, NamedTuple

from attnkit.parallel.stages import RankStage, Stages
from attnkit.ranges import total

__all__ = ["BUFFER", "Post", "by_turns", "disagreement", "posts", "posts_of", "turn"]

BUFFER = 20 * 2**20
"""Bytes of the buffer through which torch_npu's point-to-point calls go, unless it is told another.

The variable P2P_HCCL_BUFFSIZE gives it in MB (20 from release 7.1.0 on); where that is 0, the
buffer is that of the group, HCCL_BUFFSIZE (200). A stage that sends more than the buffer holds is
slower, so a report says it, for a larger one may be given. Neither variable is read.
"""


class Post(NamedTuple):
    """A message as one of its ends posts it: which way it goes, with whom, and how many keys."""

    way: Literal["send", "receive"]
    rank: int
    keys: int

    def __str__(self) -> str:
        return f"{self.way} {self.keys:,} keys {'to' if self.way == 'send' else 'from'} {self.rank}"


def turn(source: int, to: int, size: int) -> tuple[int, int]:
    """Return when a message has its turn, among those of `size` ranks.

    Ranks that lie as far from each other (``(to - source) % size``) form rings. Along each, every
    second one sends while its neighbour receives, then the others do; in a ring of an odd length
    the last message is left, and comes third.

    >>> [turn(rank, (rank + 1) % 4, 4) for rank in range(4)]
    [(1, 0), (1, 1), (1, 0), (1, 1)]
    >>> [turn(rank, (rank + 2) % 3, 3) for rank in range(3)]
    [(2, 0), (2, 2), (2, 1)]
    """
    distance = (to - source) % size
    rings = gcd(distance, size)
    length = size // rings
    place = source // rings * pow(distance // rings, -1, length) % length
    return distance, 2 if length % 2 and place == length - 1 else place % 2


def by_turns(rank: int, size: int, every: Iterable[Post]) -> tuple[Post, ...]:
    """Return what a rank posts in the order of the turns."""

    def order(one: Post) -> tuple[int, int]:
        ends = (rank, one.rank) if one.way == "send" else (one.rank, rank)
        return turn(*ends, size)

    return tuple(sorted(every, key=order))


def posts(stage: RankStage) -> tuple[Post, ...]:
    """Return what a rank posts in a stage as one group: receives first, each by rising rank.

    >>> from attnkit.parallel import Sharding
    >>> halves = Sharding.of(4, [[(0, 2)], [(2, 4)]])
    >>> causal = Stages("needed", halves, ((range(2),), (range(4),)))
    >>> [list(map(str, posts(causal.of(rank)[1]))) for rank in range(2)]
    [['send 2 keys to 1'], ['receive 2 keys from 0']]
    """
    receives = (Post("receive", one.rank, total(one.keys)) for one in stage.receives)
    sends = (Post("send", one.rank, total(one.keys)) for one in stage.sends)
    return (*receives, *sends)


def posts_of(
    stages: Stages, number: int, in_turns: bool = False, back: bool = False
) -> tuple[tuple[Post, ...], ...]:
    """Return what each rank posts in a stage; gradients of keys and values go `back`."""
    size = stages.keys.size
    found: list[tuple[Post, ...]] = []
    for rank in range(size):
        every = posts(stages.of(rank)[number])
        if back:
            every = tuple(
                one._replace(way="receive" if one.way == "send" else "send") for one in every
            )
        found.append(by_turns(rank, size, every) if in_turns else every)
    return tuple(found)


# -- played through ----------------------------------------------------------------------------


def disagreement(every: Sequence[Sequence[Post]], in_order: bool = False) -> str | None:
    """Return why what the ranks post does not end, or is not alike on both sides; None if it does.

    As a group, each message needs its other side, of as many keys, and a pair has one at most in
    each direction. Taken strictly `in_order`, a send returns when it was received, and a receive
    when it was sent.

    >>> first = [Post("send", 1, 4), Post("receive", 1, 4)]
    >>> other = [Post("send", 0, 4), Post("receive", 0, 4)]
    >>> disagreement([first, other])
    >>> disagreement([first, other], in_order=True)
    'rank 0 waits to send 4 keys to 1, rank 1 waits to send 4 keys to 0: for ever'
    >>> disagreement([first, other[::-1]], in_order=True)
    """
    told = next(_unmatched(every), None)
    if told is not None or not in_order:
        return told
    left = [list(some) for some in every]
    while any(left):
        pair = next(_meeting(left), None)
        if pair is None:
            waits = (f"rank {k} waits to {some[0]}" for k, some in enumerate(left) if some)
            return f"{', '.join(waits)}: for ever"
        for rank in pair:
            left[rank].pop(0)
    return None


def _unmatched(every: Sequence[Sequence[Post]]) -> Iterator[str]:
    """Say which messages have one side only, differ between their sides, or are two of a pair."""
    sides: dict[str, Counter[tuple[int, int, int]]] = {"send": Counter(), "receive": Counter()}
    for rank, some in enumerate(every):
        for one in some:
            ends = (rank, one.rank) if one.way == "send" else (one.rank, rank)
            sides[one.way][ends[0], ends[1], one.keys] += 1
    for way, other in (("send", "receive"), ("receive", "send")):
        for source, to, keys in sides[way] - sides[other]:
            yield f"{keys:,} keys from rank {source} to rank {to} have a {way} and no {other}"
    pairs = Counter((source, to) for source, to, _ in sides["send"].elements())
    for (source, to), count in pairs.items():
        if count > 1:
            yield f"rank {source} sends {count} messages to rank {to} in one stage"


def _meeting(left: Sequence[Sequence[Post]]) -> Iterator[tuple[int, int]]:
    """Yield pairs of ranks that both have come to the message between them."""
    for rank, some in enumerate(left):
        if some and some[0].way == "send":
            there = left[some[0].rank]
            if there and there[0] == Post("receive", rank, some[0].keys):
                yield rank, some[0].rank
