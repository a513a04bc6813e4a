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
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from attnkit.arguments import check_int
from attnkit.errors import CompositionError, shown
from attnkit.parallel.sharding import Sharding, owned
from attnkit.planner.request import state_of
from attnkit.ranges import Ranges, in_order, without

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

    def of(self, rank: int) -> tuple[RankStage, ...]:
        """Return the stages of a rank; a stage without keys and messages is among them."""
        return (RankStage(0, self.keys.ranks[rank], (), ()), *self._remote(rank))

    def _remote(self, rank: int) -> Iterator[RankStage]:
        size = self.keys.size
        arriving, leaving = dict(self._arriving(rank)), dict(self._leaving(rank))
        for number, distances in enumerate(self.distances, 1):
            sources = sorted((rank - d) % size for d in distances)
            receives = tuple(
                Message(other, arriving[other]) for other in sources if other in arriving
            )
            keys = in_order(one for _, keys in receives for one in keys)
            others = sorted((rank + d) % size for d in distances)
            sends = tuple(Message(other, leaving[other]) for other in others if other in leaving)
            yield RankStage(number, keys, receives, sends)

    @cached_property
    def _owned(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Where the ranges of all ranks end, and these with their ranks, in order."""
        every = owned(self.keys.ranks)
        return [stop for _, stop, _ in every], every

    def _arriving(self, rank: int) -> Iterable[tuple[int, Ranges]]:
        """Return what a rank receives by its sources: one walk, as there may be many of them."""
        stops, every = self._owned
        found: dict[int, list[range]] = {}
        for one in self.wanted[rank]:
            k, at = bisect_right(stops, one.start), one.start
            while at < one.stop:
                end = min(one.stop, stops[k])
                found.setdefault(every[k][2], []).append(range(at, end))
                at, k = end, k + 1
        return ((source, tuple(ranges)) for source, ranges in found.items())

    @cached_property
    def _wanting(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The ranges that ranks receive, ``[start | stop | rank, range]``, by rank and in order."""
        every = ((k.start, k.stop, rank) for rank, some in enumerate(self.wanted) for k in some)
        found = np.array([*every], dtype=np.int64)
        return np.ascontiguousarray(found.reshape(-1, 3).T)

    def _leaving(self, rank: int) -> Iterable[tuple[int, Ranges]]:
        """Return what a rank sends by its receivers, of which there may be as many."""
        starts, stops, ranks = self._wanting
        found: dict[int, list[range]] = {}
        for one in self.keys.ranks[rank]:
            low, high = np.maximum(starts, one.start), np.minimum(stops, one.stop)
            (at,) = np.nonzero(low < high)
            columns = (ranks[at].tolist(), low[at].tolist(), high[at].tolist())
            for to, start, stop in zip(*columns, strict=True):
                found.setdefault(to, []).append(range(start, stop))
        return ((to, tuple(ranges)) for to, ranges in found.items())
