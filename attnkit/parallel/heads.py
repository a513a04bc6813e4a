"""Heads in place of tokens: neighbouring ranks exchange their tokens for a range of the heads.

Of ``ways`` neighbouring ranks, each has some tokens and all heads. Turned, each has the tokens of
all of them, in order, and some of the heads: attention of whole rows needs no exchange between
them any more (Jacobs et al., "DeepSpeed Ulysses", 2023). Output and log-sum-exp are turned back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.backends.base import stats_dtype
from attnkit.layouts import Layout, Sizes
from attnkit.parallel.messages import Shape, message, packed, room, spread, taken
from attnkit.parallel.sharding import Sharding
from attnkit.parallel.wires import Wires
from attnkit.planner import Request
from attnkit.planner.request import state_of
from attnkit.ranges import Ranges, in_order, places

__all__ = ["Item", "RankTurn", "Turn", "coarse", "heads_of"]

HeadRanges = tuple[range, range]
"""Heads of the query, and the key heads that these read."""


def heads_of(num_heads: int, num_kv_heads: int, ways: int) -> tuple[HeadRanges, ...]:
    """Return the heads of each of `ways` ranks: query heads, and the key heads that they read.

    Key heads are dealt whole while there are enough of them. Else several ranks have one key
    head, and its query heads are dealt. A rank may have none.

    >>> heads_of(4, 2, 2)
    ((range(0, 2), range(0, 1)), (range(2, 4), range(1, 2)))
    >>> heads_of(3, 1, 2)
    ((range(0, 2), range(0, 1)), (range(2, 3), range(0, 1)))
    """
    group = num_heads // num_kv_heads
    if num_kv_heads >= ways:
        keys = _dealt(num_kv_heads, ways)
        return tuple((range(k.start * group, k.stop * group), k) for k in keys)
    found: list[HeadRanges] = []
    for head, ranks in enumerate(_dealt(ways, num_kv_heads)):
        for own in _dealt(group, len(ranks)):
            queries = range(head * group + own.start, head * group + own.stop)
            found.append((queries, range(head, head + 1) if queries else range(head, head)))
    return tuple(found)


def _dealt(count: int, ranks: int) -> list[range]:
    """Return consecutive ranges, each as long as the others or one longer."""
    ends = [-(-count * k // ranks) for k in range(ranks + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def coarse(sharding: Sharding, ways: int) -> Sharding:
    """Return the sharding whose ranks are `ways` neighbours each, with the positions of all.

    >>> four = Sharding.of(8, [[(0, 1), (7, 8)], [(1, 2), (6, 7)], [(2, 4)], [(4, 6)]])
    >>> coarse(four, 2).ranks
    ((range(0, 2), range(6, 8)), (range(2, 6),))
    """
    if ways == 1:
        return sharding
    firsts = range(0, sharding.size, ways)
    joined = (in_order(one for own in sharding.ranks[k : k + ways] for one in own) for k in firsts)
    return Sharding(sharding.length, tuple(joined))


class Item(NamedTuple):
    """A tensor ``[b n s d]`` that is turned: of keys, or of queries."""

    tensor: Tensor
    of_keys: bool


class Neighbour(NamedTuple):
    """One of the ranks that split heads: where its tokens lie among theirs, and its heads."""

    rank: int
    rows: Ranges
    keys: Ranges
    heads: range
    kv_heads: range

    def side(self, of_keys: bool) -> tuple[Ranges, range]:
        """Return its tokens' places and its heads, of keys or of queries."""
        return (self.keys, self.kv_heads) if of_keys else (self.rows, self.heads)


@dataclass(frozen=True)
class Turn:
    """Who exchanges which tokens for which heads: ``rank // ways`` is a neighbourhood.

    Gradients of key heads that several ranks have are turned back in the dtype of the
    statistics, and added by their owners in the order of ranks.
    """

    request: Request
    queries: Sharding
    keys: Sharding
    ways: int

    __getstate__ = state_of

    @cached_property
    def heads(self) -> tuple[HeadRanges, ...]:
        """The heads of each rank of a neighbourhood."""
        return heads_of(self.request.num_heads, self.request.num_kv_heads, self.ways)

    @property
    def shares_keys(self) -> bool:
        """Whether several ranks have the same key head."""
        return self.request.num_kv_heads < self.ways

    def neighbours(self, rank: int) -> tuple[Neighbour, ...]:
        """Return the neighbourhood of a rank, itself among them."""
        first = rank - rank % self.ways
        ranks = range(first, first + self.ways)
        rows, keys = (
            in_order(one for r in ranks for one in sharding.ranks[r])
            for sharding in (self.queries, self.keys)
        )
        return tuple(
            Neighbour(
                r,
                places(self.queries.ranks[r], rows),
                places(self.keys.ranks[r], keys),
                *self.heads[r - first],
            )
            for r in ranks
        )

    @cached_property
    def transfers(self) -> tuple[Tensor, Tensor]:
        """The bytes from each rank to each other ``[from, to]``, forward and backward, in int64.

        Forward: query, key and value there; output and log-sum-exp back. Backward: the gradients
        of these there, those of query, key and value back.
        """
        size, request = self.queries.size, self.request
        narrow, wide = request.dtype.itemsize, stats_dtype(request.dtype).itemsize
        dim, value_dim = request.head_dim, request.value_dim
        summed = wide if self.shares_keys else narrow
        forward, backward = torch.zeros(2, size, size, dtype=torch.int64, device="cpu")
        for a in range(size):
            for b in range(a - a % self.ways, a - a % self.ways + self.ways):
                if a == b:
                    continue
                there, back = self._tokens(a, b), self._tokens(b, a)
                answers = value_dim * narrow + wide
                forward[a, b] = narrow * (there[0] * dim + there[1] * (dim + value_dim))
                forward[a, b] += back[0] * answers
                backward[a, b] = there[0] * answers + back[0] * dim * narrow
                backward[a, b] += back[1] * (dim + value_dim) * summed
        batch = 1 if request.seqlens is not None else request.batch
        return forward * batch, backward * batch

    def _tokens(self, owner: int, other: int) -> tuple[int, int]:
        """Return how many queries and keys of a rank there are, times the heads of another."""
        heads, kv_heads = map(len, self.heads[other % self.ways])
        return self.queries.sizes[owner] * heads, self.keys.sizes[owner] * kv_heads


class RankTurn:
    """What a rank exchanges with its neighbours."""

    def __init__(self, turn: Turn, rank: int) -> None:
        self.layout: Layout = turn.request.layout_of
        self.every = turn.neighbours(rank)
        self.own = self.every[rank % turn.ways]
        self.adds = turn.shares_keys

    def to_heads(self, wires: Wires, items: Sequence[Item], what: str) -> list[Tensor]:
        """Return the tokens of all neighbours in order, of the heads of this rank."""

        def sent(item: Item, to: Neighbour) -> Tensor:
            return _of_heads(item.tensor, to.side(item.of_keys)[1])

        def received(item: Item, other: Neighbour) -> Shape:
            heads = self.own.side(item.of_keys)[1]
            return _shape(item.tensor, other.side(item.of_keys)[0], heads)

        found = [self._empty(item) for item in items]
        for other, parts in self._exchanged(wires, items, sent, received, what):
            for item, whole, part in zip(items, found, parts, strict=True):
                spread(whole, other.side(item.of_keys)[0], part, 2)
        return found

    def to_tokens(
        self, wires: Wires, items: Sequence[Item], counts: Sequence[int], what: str
    ) -> list[Tensor]:
        """Return the own tokens of all heads, of tensors that have all tokens of the own heads.

        `counts` are the numbers of heads. Heads that several ranks have are added up.
        """

        def sent(item: Item, to: Neighbour) -> Tensor:
            return taken(item.tensor, to.side(item.of_keys)[0], 2)

        def received(item: Item, other: Neighbour) -> Shape:
            tokens = self.own.side(item.of_keys)[0]
            return _shape(item.tensor, tokens, other.side(item.of_keys)[1])

        found = [
            i.tensor.new_zeros(_shape(i.tensor, self.own.side(i.of_keys)[0], range(count)))
            for i, count in zip(items, counts, strict=True)
        ]
        for other, parts in self._exchanged(wires, items, sent, received, what):
            for item, whole, part in zip(items, found, parts, strict=True):
                own = _of_heads(whole, other.side(item.of_keys)[1])
                if item.of_keys and self.adds:
                    own += part
                else:
                    own.copy_(part)
        return found

    def _exchanged(
        self,
        wires: Wires,
        items: Sequence[Item],
        sent: Callable[[Item, Neighbour], Tensor],
        received: Callable[[Item, Neighbour], Shape],
        what: str,
    ) -> list[tuple[Neighbour, list[Tensor]]]:
        """Return what each neighbour has for this rank, in the order of ranks."""
        sends, receives, found = [], [], []
        for other in self.every:
            parts = [sent(item, other) for item in items]
            if other.rank != self.own.rank:
                sends.append((other.rank, packed(parts)))
                into = [(received(item, other), item.tensor.dtype) for item in items]
                buffer, parts = message(into, items[0].tensor.device)
                receives.append((other.rank, buffer))
            found.append((other, parts))
        wires.post(sends, receives, what).wait()
        return found

    def _empty(self, item: Item) -> Tensor:
        """Return room for all tokens of the own heads, in memory as the layout has it."""
        batch, _, _, dim = item.tensor.shape
        length = sum(len(one) for n in self.every for one in n.side(item.of_keys)[0])
        heads = len(self.own.side(item.of_keys)[1])
        return room(self.layout, Sizes(batch, length, heads, dim), item.tensor)


def _of_heads(tensor: Tensor, heads: range) -> Tensor:
    return tensor.narrow(1, heads.start, len(heads))


def _shape(tensor: Tensor, tokens: Ranges, heads: range) -> Shape:
    batch, _, _, dim = tensor.shape
    return batch, len(heads), sum(map(len, tokens)), dim
