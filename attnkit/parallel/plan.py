"""`ParallelPlan`: how attention over tokens that are spread over ranks runs on each of them.

Nothing here needs a process group: a plan of 512 ranks is made, proven and shown on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnkit.arguments import check_choice, check_int
from attnkit.backends import make_plan
from attnkit.backends.graph import stand_in
from attnkit.display import Text
from attnkit.errors import CompositionError, Refusal
from attnkit.explorer import save
from attnkit.geometry import Region
from attnkit.parallel.choices import DROPOUTS, Choices
from attnkit.parallel.heads import Turn, coarse
from attnkit.parallel.local import local_bias, local_request
from attnkit.parallel.pieces import pieces
from attnkit.parallel.plane import planes, seeing, seen_by, worth_leaving_out
from attnkit.parallel.price import ParallelPrice
from attnkit.parallel.sharding import Sharding, check_fits
from attnkit.parallel.stages import Message, RankStage, Stages
from attnkit.parallel.transfers import Received, Transfers, received_by, transfers_of
from attnkit.planner import Plan, Request
from attnkit.planner.request import state_of
from attnkit.pse import Pse
from attnkit.pse.base import rebound
from attnkit.ranges import Ranges, shared

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from attnkit.display.figure import Figure

__all__ = ["Alternative", "ParallelPlan", "StagePiece"]

_KEPT_RANKS = 8  # a process is one rank; a test or a report looks at several


class StagePiece(NamedTuple):
    """Some rows and keys of a stage, as they lie on the whole's axes, and the plan of their share.

    `bias` is that of the share, on stand-ins for the tensors of the whole's.
    """

    rows: Ranges
    keys: Ranges
    plan: Plan
    bias: Pse | None


class Alternative(NamedTuple):
    """Another way that would do, and what it costs."""

    label: str
    price: ParallelPrice


@dataclass(frozen=True)
class ParallelPlan:
    """How a request runs whose tokens are spread over ranks: who sends what to whom, and when.

    `queries` and `keys` say which tokens each rank has. Neighbouring `heads_ways` ranks exchange
    tokens for heads first: each has all of their tokens then, and a range of the heads. Between
    those that have the same heads goes what `exchange` says, whose ranks are such neighbourhoods.
    With `keep`, keys that were received stay for the backward pass, which would fetch them again.
    `dropout` is "global" where weights are dropped that one process would drop, or "local".

    `bias` is that of the request on tensors without memory.

    >>> import torch
    >>> from attnkit import masks, parallel
    >>> x, mask = torch.empty(1, 64, 4, 16, device="meta"), masks.SlidingWindow(4)
    >>> plan = parallel.plan(x, x, x, ranks=4, mask=mask, method="needed", balance="contiguous")
    >>> plan.stages(2)[1].receives
    (Message(rank=1, keys=(range(29, 32),)),)
    >>> plan.pieces(2, 1)[0].rows, plan.received(2).forward
    ((range(32, 35),), 1536)
    >>> plan.rows(2), plan.heads(2), plan.kv_heads(2), plan.table(2) == plan.stages(2)
    ((range(32, 48),), range(0, 4), range(0, 4), True)
    >>> share = plan.piece((range(32, 35),), (range(29, 32),), plan.heads(2))
    >>> share.plan.request.q_len, share.plan.request.kv_len, plan.numbers(2)
    (3, 3, 128)
    >>> gathered = ParallelPlan.bare(plan.request, None, plan.queries, plan.keys)
    >>> gathered.check_backend()  # it takes such a composition, or this raises
    >>> gathered.method, gathered.received(2).keys
    ('gather', 48)
    """

    request: Request
    bias: Pse | None = field(compare=False)
    queries: Sharding
    keys: Sharding
    exchange: Stages
    heads_ways: int = 1
    keep: bool = False
    backend: str = "auto"
    dropout: str = "global"
    balance: str = "given"
    price: ParallelPrice | None = None
    alternatives: tuple[Alternative, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    __getstate__ = state_of

    @classmethod
    def of(
        cls,
        request: Request,
        bias: Pse | None,
        queries: Sharding,
        keys: Sharding,
        choices: Choices = Choices(),  # noqa: B008 -- a frozen value
        backend: str = "auto",
    ) -> ParallelPlan:
        """Return the plan of a request of all tokens, for these shardings.

        What is "auto" is chosen by price, see `attnkit.parallel.plan`. Nothing is run and no share
        is planned but one, which tells whether the backend takes such a composition.

        Raises `CompositionError` for what does not fit, and `BackendRefused`; both are the same on
        every rank.
        """
        from attnkit.parallel.choose import choose

        bare = cls.bare(request, bias, queries, keys, backend, choices.dropout)
        found = choose(bare, choices)
        found.check_backend()
        return found

    @classmethod
    def bare(
        cls,
        request: Request,
        bias: Pse | None,
        queries: Sharding,
        keys: Sharding,
        backend: str = "auto",
        dropout: str = "global",
    ) -> ParallelPlan:
        """Return a plan that gathers all keys; nothing has been chosen and no share planned."""
        check_fits(request, queries, keys)
        check_choice("dropout", dropout, DROPOUTS)
        exchange = Stages("gather", keys, ((),) * keys.size)
        bias = _without_memory(bias)
        return cls(request, bias, queries, keys, exchange, backend=backend, dropout=dropout)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.queries.size

    @property
    def method(self) -> str:
        """What is exchanged: "needed", "ring", "gather", "ulysses" or "hybrid"."""
        if self.heads_ways == 1:
            return self.exchange.method
        return "ulysses" if self.heads_ways == self.size else "hybrid"

    @cached_property
    def turn(self) -> Turn:
        """The exchange of tokens for heads among neighbours."""
        return Turn(self.request, self.queries, self.keys, self.heads_ways)

    @cached_property
    def coarse(self) -> Sharding:
        """The rows of each neighbourhood."""
        return coarse(self.queries, self.heads_ways)

    def rows(self, rank: int) -> Ranges:
        """Return the rows that a rank computes, in order."""
        return self.coarse.ranks[self._place(rank)[0]]

    def heads(self, rank: int) -> range:
        """Return the query heads that a rank computes; there may be none."""
        return self.turn.heads[self._place(rank)[1]][0]

    def kv_heads(self, rank: int) -> range:
        """Return the key heads that these read."""
        return self.turn.heads[self._place(rank)[1]][1]

    def _place(self, rank: int) -> tuple[int, int]:
        """Return the neighbourhood of a rank, and which of its ranks it is."""
        return divmod(check_int("rank", rank, 0, self.size - 1), self.heads_ways)

    def stages(self, rank: int) -> tuple[RankStage, ...]:
        """Return the stages of a rank: the keys of each, and who sends what to whom."""
        return self._kept(rank).stages

    def table(self, rank: int) -> tuple[RankStage, ...]:
        """Return the same, made anew: of all ranks they are many."""
        along, across = self._place(rank)
        found = self.exchange.of(along)
        if self.heads_ways == 1:
            return found
        used = bool(self.heads(rank))

        def true(messages: tuple[Message, ...]) -> tuple[Message, ...]:
            every = (Message(other * self.heads_ways + across, keys) for other, keys in messages)
            return tuple(every) if used else ()

        return tuple(
            RankStage(number, keys, true(receives), true(sends))
            for number, keys, receives, sends in found
        )

    def pieces(self, rank: int, stage: int) -> tuple[StagePiece, ...]:
        """Return what a rank computes in a stage; nothing where its rows see none of the keys.

        Rows that see none of the keys, and keys that none of the rows sees, are left out where
        many of them lie together.
        """
        known = self._kept(rank)
        if stage not in known.pieces:
            keys = known.stages[check_int("stage", stage, 0, len(known.stages) - 1)].keys
            known.pieces[stage] = tuple(self._pieces(rank, keys))
        return known.pieces[stage]

    def _pieces(self, rank: int, keys: Ranges) -> Iterator[StagePiece]:
        heads, rows = self.heads(rank), self.rows(rank)
        regions = self.regions(heads)
        keys = worth_leaving_out(keys, shared(keys, seen_by(regions, rows)))
        rows = worth_leaving_out(rows, seeing(regions, rows, keys))
        if rows and keys:
            for place in pieces(self.request, regions, rows, keys, self.backend):
                yield self.piece(*place, heads)

    def piece(self, rows: Ranges, keys: Ranges, heads: range) -> StagePiece:
        """Return what is computed of some rows, keys and heads."""
        local = self.dropout == "local"
        request = local_request(self.request, self.bias, rows, keys, heads, local)
        if request.share is None:
            raise CompositionError("a share has lost its positions")
        rows, keys = request.share.rows, request.share.keys
        bias = local_bias(self.request, self.bias, rows, keys, heads)
        return StagePiece(rows, keys, make_plan(request, self.backend), bias)

    def regions(self, heads: range) -> dict[Region, int]:
        """Return what the mask allows of some heads, and how many score matrices are alike."""
        return planes(self.request, heads)

    def _kept(self, rank: int) -> _RankTable:
        every: dict[int, _RankTable] = self.__dict__.setdefault("_ranks", {})
        known = every.get(rank)
        if known is None:  # other ranks may be threads that look here, too
            known = _RankTable(self.table(rank), {})
            for oldest in tuple(every)[: max(0, len(every) - _KEPT_RANKS + 1)]:
                every.pop(oldest, None)
            every[rank] = known
        return known

    @property
    def copies(self) -> int:
        """How many tokens a position stands for: one of each batch element."""
        return 1 if self.request.seqlens is not None else self.request.batch

    def numbers(self, rank: int) -> int:
        """Return how many numbers a key and its value are: of all of a rank's key heads."""
        request = self.request
        return len(self.kv_heads(rank)) * (request.head_dim + request.value_dim) * self.copies

    @cached_property
    def transfers(self) -> Transfers:
        """The bytes that go from each rank to each other, in the forward and the backward pass.

        Keys and values go in their dtype. The backward pass fetches them again, unless they are
        kept, and their gradients, if they are asked for, go back in the dtype of the statistics.
        Where heads are split, what is turned among neighbours is counted, too.
        """
        return transfers_of(self)

    def received(self, rank: int) -> Received:
        """Return what a rank receives, in keys of others and in bytes."""
        return received_by(self, rank)

    def check_backend(self) -> None:
        """Raise `BackendRefused` unless the backend runs a share: that of the first with cells.

        What a backend refuses of a composition it refuses of every share of it, so that all ranks
        find the same by planning one, and none has to plan those of others.
        """
        any(self.pieces(rank, 0) for rank in range(self.size))

    def disprove(self) -> Refusal | None:
        """Return why the plan does not compute its request on its ranks; None if it does.

        Tokens are with one rank, heads with one of its neighbours; every key that a row sees is in
        one stage of the row's rank, where it arrives once, from its owner, who sends it then; and
        every share is what the mask allows of its rows and keys, on a plan that is proven itself.
        Shares are looked at one by one, of all ranks up to 64 stages in all, of more those of the
        ranks with the most cells and keys.

        >>> from dataclasses import replace
        >>> import torch
        >>> from attnkit import masks, parallel
        >>> x = torch.empty(1, 8, 2, 16, device="meta")
        >>> found = parallel.plan(x, x, x, ranks=2, mask=masks.Causal(), method="needed")
        >>> found.disprove() is None
        True
        >>> replace(found, exchange=replace(found.exchange, seen=((), ()))).disprove().code
        'key-missing'
        """
        from attnkit.parallel.proof import disprove

        return disprove(self)

    def verify(self) -> None:
        """Check the proof; see `disprove` for what is proven.

        Raises `KernelContractError` that says what is wrong, and for no plan anything else.
        """
        from attnkit.parallel.proof import verify

        verify(self)

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """How many cells each rank computes, over all score matrices of its heads."""
        every = [self.regions(self.heads(rank)) for rank in range(self.size)]
        return tuple(
            sum(region.cells(self.rows(rank)) * count for region, count in regions.items())
            for rank, regions in enumerate(every)
        )

    def explain(self) -> Text:
        """Return a short report: what each rank has, computes and receives, what it costs, why."""
        from attnkit.parallel.explain import explain

        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what `explain` tells as plain data, with the numbers of all ranks.

        >>> import torch
        >>> from attnkit import masks, parallel
        >>> x = torch.empty(1, 8, 2, 16, device="meta")
        >>> parallel.plan(x, x, x, ranks=2, mask=masks.Causal()).to_dict()["tokens"]
        [4, 4]
        """
        from attnkit.parallel.explain import as_data

        return as_data(self)

    def plot(self, batch: int = 0, head: int = 0) -> Figure:
        """Return a matplotlib figure of one score matrix: a colour per rank, paler by stages."""
        from attnkit.parallel.picture import plot

        return plot(self, batch, head)

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write one HTML page that shows who computes each cell, and what is sent; return its path.

        Raises as `Plan.to_html`.

        >>> from tempfile import mkdtemp
        >>> import torch
        >>> from attnkit import masks, parallel
        >>> x = torch.empty(1, 8, 2, 16, device="meta")
        >>> found = parallel.plan(x, x, x, ranks=2, mask=masks.Causal())
        >>> found.to_html(mkdtemp() + "/ranks.html").name
        'ranks.html'
        """
        from attnkit.parallel.explored import as_page

        return save(as_page(self), path)

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        """Return the ranks for a notebook: a colour for each, a table, refusals folded away."""
        from attnkit.parallel.shown import page

        return page(self)


class _RankTable(NamedTuple):
    """What is known of a rank: its stages, and the pieces of those that somebody asked for."""

    stages: tuple[RankStage, ...]
    pieces: dict[int, tuple[StagePiece, ...]]


def _without_memory(bias: Pse | None) -> Pse | None:
    if bias is None:
        return None
    here = torch.device("cpu")  # a plan is read on other machines, too
    facts = ((t.shape, t.dtype, here, t.requires_grad) for t in bias.tensors)
    return rebound(bias, [stand_in(*known) for known in facts])
