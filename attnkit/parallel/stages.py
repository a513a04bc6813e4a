"""Which keys each rank receives from whom, and when: the table that the methods differ in.

A rank computes in stages, each over some keys: in stage 0 over its own, in each later one over
keys that have arrived. Every key that its rows see is in one of its stages. What a rank sends is
what the others receive: both sides read the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from attnkit.parallel.sharding import Sharding
from attnkit.ranges import Ranges, in_order, shared

__all__ = ["Exchanged", "Message", "RankStage", "Stages"]

Exchanged = Literal["needed", "ring", "gather"]
"""What is exchanged: keys that rows see; all keys, a rank's at a time; all keys at once."""


class Message(NamedTuple):
    """Keys that go from one rank to another in a stage: never none."""

    rank: int
    """Who is at the other side."""
    keys: Ranges


class RankStage(NamedTuple):
    """What a rank does in a stage: the keys that it computes over, in order, and its messages.

    Messages rise by `Message.rank`. Stage 0 has none: its keys are the rank's own.
    """

    number: int
    keys: Ranges
    receives: tuple[Message, ...]
    sends: tuple[Message, ...]


@dataclass(frozen=True)
class Stages:
    """The stages of every rank.

    `seen` has the keys that the rows of each rank see, in order; `count` is the number of remote
    stages of "needed". Ranks that lie as far from each other (``(to - from) % ranks``) exchange
    in one stage, so that both sides know it of themselves.
    """

    method: Exchanged
    keys: Sharding
    seen: tuple[Ranges, ...]
    count: int = 1

    @cached_property
    def distances(self) -> tuple[tuple[int, ...], ...]:
        """Which distances ``(to - from) % ranks`` each remote stage has."""
        away = range(1, self.keys.size)
        if self.method == "ring":
            return tuple((d,) for d in away)
        count = 1 if self.method == "gather" else min(self.count, len(away))
        return tuple(tuple(away[k::count]) for k in range(count)) if away else ()

    def moved(self, source: int, to: int) -> Ranges:
        """Return the keys that go from a rank to another."""
        own = self.keys.ranks[source]
        return shared(own, self.seen[to]) if self.method == "needed" else own

    def of(self, rank: int) -> tuple[RankStage, ...]:
        """Return the stages of a rank; a stage without keys and messages is among them."""
        return (RankStage(0, self.keys.ranks[rank], (), ()), *self._remote(rank))

    def _remote(self, rank: int) -> Iterator[RankStage]:
        size = self.keys.size
        for number, distances in enumerate(self.distances, 1):
            receives = self._messages(
                sorted((rank - d) % size for d in distances), lambda other: (other, rank)
            )
            sends = self._messages(
                sorted((rank + d) % size for d in distances), lambda other: (rank, other)
            )
            keys = in_order(one for message in receives for one in message.keys)
            yield RankStage(number, keys, receives, sends)

    def _messages(
        self, others: Sequence[int], way: Callable[[int], tuple[int, int]]
    ) -> tuple[Message, ...]:
        every = (Message(other, self.moved(*way(other))) for other in others)
        return tuple(message for message in every if message.keys)
