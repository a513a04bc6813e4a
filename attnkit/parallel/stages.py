"""Which keys each rank receives from whom, and when: the table that the methods differ in.

A rank computes in stages, each over some keys: in stage 0 over its own, in each later one over
keys that have arrived. Every key that its rows see is in one of its stages. What a rank sends is
what the others receive: both sides read the same table.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from attnkit.arguments import check_int
from attnkit.errors import CompositionError, shown
from attnkit.parallel.sharding import Sharding
from attnkit.planner.request import state_of
from attnkit.ranges import Ranges, joined, shared, span, without

__all__ = ["EXCHANGED", "Exchanged", "Message", "RankStage", "Stages"]

Exchanged = Literal["needed", "ring", "gather"]
"""What is exchanged: keys that rows see; all keys, a rank's at a time; all keys at once."""

EXCHANGED: tuple[Exchanged, ...] = get_args(Exchanged)


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

    >>> from attnkit.parallel import Sharding
    >>> halves = Sharding.of(4, [[(0, 2)], [(2, 4)]])
    >>> causal = Stages("needed", halves, ((range(2),), (range(4),)))
    >>> causal.of(1)[1].receives, causal.of(0)[1].sends, causal.of(0)[1].receives
    ((Message(rank=0, keys=(range(0, 2),)),), (Message(rank=1, keys=(range(0, 2),)),), ())

    Raises `CompositionError` for another method, or for keys of other ranks than there are.
    """

    method: Exchanged
    keys: Sharding
    seen: tuple[Ranges, ...]
    count: int = 1

    __getstate__ = state_of

    def __post_init__(self) -> None:
        if self.method not in EXCHANGED:
            raise CompositionError(
                f"Stages got method={shown(self.method)}; what is exchanged is one of "
                f"{', '.join(EXCHANGED)}"
            )
        check_int("stages", self.count, 1)
        if not isinstance(self.keys, Sharding) or len(self.seen) != self.keys.size:
            raise CompositionError(
                f"Stages got the keys that {len(self.seen)} ranks see, of {shown(self.keys)}; give "
                "them for each rank of a Sharding"
            )

    @cached_property
    def distances(self) -> tuple[range, ...]:
        """Which distances ``(to - from) % ranks`` each remote stage has."""
        away = range(1, self.keys.size)
        if self.method == "ring":
            return tuple(range(d, d + 1) for d in away)
        count = 1 if self.method == "gather" else min(self.count, len(away))
        return tuple(away[k::count] for k in range(count))

    @property
    def numbers(self) -> range:
        """The numbers of the stages: of the first, and of those that others' keys are for."""
        return range(1 + len(self.distances))

    @cached_property
    def wanted(self) -> tuple[Ranges, ...]:
        """The keys of others that each rank receives, in order."""
        whole = (range(self.keys.length),) if self.keys.length else ()
        seen = self.seen if self.method == "needed" else (whole,) * self.keys.size
        return tuple(without(some, own) for some, own in zip(seen, self.keys.ranks, strict=True))

    def moved(self, source: int, to: int) -> Ranges:
        """Return the keys that go from a rank to another."""
        own = self.keys.ranks[source]
        if self.method != "needed":
            return own
        wanted = self.wanted[to]
        if not (own and wanted) or own[-1].stop <= wanted[0].start:
            return ()
        if len(wanted) == 1 and wanted[0].start <= own[0].start and own[-1].stop <= wanted[0].stop:
            return own
        return () if wanted[-1].stop <= own[0].start else shared(own, wanted)

    def of(self, rank: int) -> tuple[RankStage, ...]:
        """Return the stages of a rank; a stage without keys and messages is among them."""
        return (RankStage(0, self.keys.ranks[rank], (), ()), *self._remote(rank))

    def _remote(self, rank: int) -> Iterator[RankStage]:
        size = self.keys.size
        arriving = dict(self._arriving(rank))
        for number, distances in enumerate(self.distances, 1):
            sources = sorted((rank - d) % size for d in distances)
            receives = tuple(
                Message(other, arriving[other]) for other in sources if other in arriving
            )
            keys = joined(span(one) for _, keys in receives for one in keys)
            others = sorted((rank + d) % size for d in distances)
            sends = (Message(other, self.moved(rank, other)) for other in others)
            yield RankStage(number, keys, receives, tuple(one for one in sends if one.keys))

    @cached_property
    def _owned(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Where the ranges of all ranks end, and these with their ranks, in order."""
        every = sorted(
            (one.start, one.stop, rank) for rank, own in enumerate(self.keys.ranks) for one in own
        )
        return [stop for _, stop, _ in every], every

    def _arriving(self, rank: int) -> Iterable[tuple[int, Ranges]]:
        """Return what a rank receives by its sources: one walk, as there may be many of them."""
        stops, owned = self._owned
        found: dict[int, list[range]] = {}
        for one in self.wanted[rank]:
            k, at = bisect_right(stops, one.start), one.start
            while at < one.stop:
                end = min(one.stop, stops[k])
                found.setdefault(owned[k][2], []).append(range(at, end))
                at, k = end, k + 1
        return ((source, tuple(ranges)) for source, ranges in found.items())
