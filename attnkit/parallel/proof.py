"""The proof of a parallel plan: what all ranks compute in all stages is the mask, each cell once.

A rank's rows times the keys of its stages are rectangles that share no cell, if rows are with one
rank and keys in one stage. So what they have of the mask is all of it if every key that a row sees
is in a stage of the row's rank. That is shown for all ranks. That a share is what the mask allows
of its rectangle, and that its kernel calls compute it, is shown for all ranks of small plans and
for those with the most cells and keys of large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from attnkit.backends import BACKENDS
from attnkit.errors import BackendRefused, KernelContractError, Refusal
from attnkit.geometry import Region
from attnkit.parallel.choices import DROPOUTS
from attnkit.parallel.heads import coarse
from attnkit.parallel.local import local_request, terms_of
from attnkit.parallel.plan import ParallelPlan, StagePiece
from attnkit.parallel.plane import layers, seen_by
from attnkit.parallel.price import slowest
from attnkit.parallel.stages import RankStage
from attnkit.planner.plan import inconsistent
from attnkit.planner.request import check_fits
from attnkit.planner.sequences import Block
from attnkit.progress import progress, pulse
from attnkit.ranges import Ranges, are_distinct, joined, places, total, without

__all__ = ["disprove", "ranks_in_full", "verify"]

_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_MOST_SHARES = 64  # of which each is planned and looked at
_MOST_STAGES = 4  # of a rank of a larger plan


def verify(plan: ParallelPlan) -> None:
    """Raise `KernelContractError` unless a plan is proven; see `disprove`."""
    wrong = disprove(plan)
    if wrong is not None:
        mask = repr(getattr(plan.request, "mask", plan.request))[:300]
        raise KernelContractError(
            f"this plan does not compute {mask} on its ranks: {wrong.reason}; this is a bug in "
            "attnkit, please report it with the plan's explain()",
            [wrong.code],
        )


def disprove(plan: ParallelPlan) -> Refusal | None:
    """Return why a plan does not compute its request on its ranks; None if it does."""
    try:
        with progress("proving what ranks compute"):
            return _disproof(replace(plan))  # with nothing kept that somebody may have changed
    except BackendRefused as error:
        return Refusal("refused", f"a share is refused: {error.refusals[0].reason}"[:400])
    except _UNREADABLE as error:
        return Refusal("unreadable", f"it is not a plan ({type(error).__name__}: {error})"[:400])


def ranks_in_full(plan: ParallelPlan) -> tuple[int, ...]:
    """Return the ranks of which every kernel call is proven; of the others, what they exchange."""
    if plan.size * len(plan.exchange.numbers) <= _MOST_SHARES:
        return tuple(range(plan.size))
    return tuple(sorted({0, *slowest(plan), plan.size - 1}))


def _disproof(plan: ParallelPlan) -> Refusal | None:
    return (
        _other_whole(plan)
        or _other_tokens(plan)
        or _other_heads(plan)
        or _other_tables(plan)
        or next(filter(None, (_other_share(plan, at) for at in _looked_at(plan))), None)
        or _not_covered(plan)
    )


# -- the whole -------------------------------------------------------------------------------


def _other_whole(plan: ParallelPlan) -> Refusal | None:
    request, ways = plan.request, plan.heads_ways
    if request.share is not None or request.mask.comes_with_call:
        return Refusal("other-request", "it is for a whole attention whose mask is known")
    wrong = inconsistent(request)
    if wrong is not None:
        return wrong
    check_fits(request, request.mask, plan.bias)  # raises what `disprove` answers
    plain = type(ways) is int and type(plan.keep) is bool and type(plan.exchange.count) is int
    if not plain or ways < 1 or plan.size % ways:
        return Refusal("heads-ways", "its ranks are no neighbourhoods of as many ranks")
    if terms_of(request, plan.bias) != request.bias:
        return Refusal("other-bias", "the bias is not the one of the request")
    if plan.dropout not in DROPOUTS:
        return Refusal("other-dropout", f"dropout={str(plan.dropout)[:80]!r} is none that there is")
    if plan.backend != "auto" and plan.backend not in BACKENDS:
        return Refusal("other-backend", f"no backend has the name {str(plan.backend)[:80]!r}")
    return None


def _other_tokens(plan: ParallelPlan) -> Refusal | None:
    """Check that each token is with one rank, and that neighbourhoods are what they are called."""
    request, ways = plan.request, plan.heads_ways
    sides = ((plan.queries, request.q_len, "queries"), (plan.keys, request.kv_len, "keys"))
    for sharding, length, name in sides:
        every = [one for own in sharding.ranks for one in own]
        if sharding.length != length or total(tuple(every)) != length:
            return Refusal("other-tokens", f"the ranks have not all of the {length:,} {name}")
        if not are_distinct(tuple(every), length) or not all(map(_in_order, sharding.ranks)):
            return Refusal("other-tokens", f"some of the {name} are with two ranks")
    if plan.queries.size != plan.keys.size:
        return Refusal("other-tokens", "there are other ranks of queries than of keys")
    if plan.exchange.keys != coarse(plan.keys, ways):
        return Refusal("other-tokens", "what is exchanged are other keys than those of the ranks")
    rows = coarse(plan.queries, ways).ranks
    if any(plan.rows(rank) != rows[rank // ways] for rank in range(plan.size)):
        return Refusal("other-tokens", "a rank computes other rows than its neighbourhood has")
    return None


def _in_order(ranges: Ranges) -> bool:
    return ranges == joined((one.start, one.stop) for one in ranges)


def _other_heads(plan: ParallelPlan) -> Refusal | None:
    """Check that neighbours have each head once, and the key heads that it reads."""
    request, ways = plan.request, plan.heads_ways
    group = request.num_heads // request.num_kv_heads
    for first in range(0, plan.size, ways):
        ranks = range(first, first + ways)
        every = sorted(head for rank in ranks for head in plan.heads(rank))
        if every != [*range(request.num_heads)]:
            return Refusal("other-heads", f"ranks {first} to {ranks[-1]} have not each head once")
        for heads, keys in ((plan.heads(rank), plan.kv_heads(rank)) for rank in ranks):
            meant = range(heads.start // group, -(-heads.stop // group)) if heads else range(0)
            if len(keys) != len(meant) or (meant and keys != meant):
                return Refusal("other-heads", f"heads {heads} do not read the key heads {keys}")
            if len(meant) > 1 and len(heads) != group * len(meant):
                return Refusal("other-heads", f"heads {heads} read a part of several key heads")
    return None


# -- what is exchanged -----------------------------------------------------------------------


def _other_tables(plan: ParallelPlan) -> Refusal | None:
    """Check the stages of all ranks, and that what each receives is what another sends."""
    alone: tuple[dict[int, Ranges], dict[int, Ranges]] = ({}, {})  # of sends, of receives
    counts: set[int] = set()
    needed: dict[tuple[int, range], tuple[Ranges, Ranges]] = {}
    for rank in range(plan.size):
        pulse()
        stages = plan.stages(rank)
        counts.add(len(stages))
        along = (rank // plan.heads_ways, plan.heads(rank))
        if along not in needed:
            needed[along] = _needed(plan, rank)
        wrong = _other_stages(plan, rank, stages, *needed[along])
        if wrong is not None:
            return wrong
        wrong = _unpaired(rank, plan.size, stages, *alone)
        if wrong is not None:
            return wrong
    if len(counts) > 1:
        return Refusal("other-stages", "ranks have different numbers of stages")
    sends, receives = alone
    if sends or receives:
        pair = next(iter(sends or receives))
        return _no_pair(pair, plan.size)
    return None


def _unpaired(
    rank: int,
    size: int,
    stages: tuple[RankStage, ...],
    sent: dict[int, Ranges],
    received: dict[int, Ranges],
) -> Refusal | None:
    """Match the messages of a rank with what ranks before it left without its other side.

    Each pair of ranks in a stage has a number: there may be a quarter of a million of them.
    """
    for number, _, receives, sends in stages:
        at = number * size**2
        for to, keys in sends:
            pair = at + rank * size + to
            if to > rank:
                sent[pair] = keys
            elif received.pop(pair, None) != keys:
                return _no_pair(pair, size)
        for source, keys in receives:
            pair = at + source * size + rank
            if source > rank:
                received[pair] = keys
            elif sent.pop(pair, None) != keys:
                return _no_pair(pair, size)
    return None


def _no_pair(pair: int, size: int) -> Refusal:
    stage, ranks = divmod(pair, size**2)
    source, to = divmod(ranks, size)
    reason = f"rank {source} sends rank {to} in stage {stage} other keys than it receives"
    return Refusal("unpaired", reason)


def _needed(plan: ParallelPlan, rank: int) -> tuple[Ranges, Ranges]:
    """Return the keys that the heads of a rank see, and those that any head does."""
    heads, rows = plan.heads(rank), plan.rows(rank)
    every = seen_by(plan.regions(range(plan.request.num_heads)), rows)
    if not plan.request.matrices.per_head:
        return every if heads else (), every
    return seen_by(plan.regions(heads), rows) if heads else (), every


def _other_stages(
    plan: ParallelPlan,
    rank: int,
    stages: tuple[RankStage, ...],
    needed: Ranges,
    of_any_head: Ranges,
) -> Refusal | None:
    own = plan.exchange.keys.ranks[rank // plan.heads_ways]
    if stages[0] != (0, own, (), ()):
        return Refusal("other-stages", f"stage 0 of rank {rank} is not of its own keys alone")
    for number, stage in enumerate(stages):
        if stage.number != number:
            return Refusal("other-stages", f"rank {rank} has a stage {stage.number} as {number}")
        wrong = _other_messages(plan, rank, stage, of_any_head)
        if wrong is not None:
            return wrong
    used = stages if plan.heads(rank) else stages[:1]
    spans = [(one.start, one.stop) for stage in used for one in stage.keys]
    every = joined(spans)
    if total(every) != sum(stop - start for start, stop in spans):
        return Refusal("key-twice", f"rank {rank} computes over a key in two stages")
    missing = without(needed, every)
    if missing:
        reason = f"rows of rank {rank} see key {missing[0].start}, which none of its stages has"
        return Refusal("key-missing", reason)
    return None


def _other_messages(
    plan: ParallelPlan, rank: int, stage: RankStage, needed: Ranges
) -> Refusal | None:
    """Check that the keys of a stage are those that arrive for it, each once, from its owner."""
    ways, owned = plan.heads_ways, plan.exchange.keys.ranks
    own_heads = rank % ways
    for messages in (stage.receives, stage.sends):
        last = -1
        for other, keys in messages:
            if other <= last or not keys:
                reason = f"messages of rank {rank} in stage {stage.number} are not one per rank"
                return Refusal("other-messages", reason)
            if other == rank or other % ways != own_heads or other >= plan.size:
                return Refusal("other-messages", f"rank {rank} exchanges keys of other heads")
            last = other
    for source, keys in stage.receives:
        own = owned[source // ways]
        if keys != own and not _lie_in(keys, own):
            reason = f"rank {rank} receives keys from rank {source}, which has not got them"
            return Refusal("other-owner", reason)
    if not stage.number:
        return None
    arrived = joined((one.start, one.stop) for _, keys in stage.receives for one in keys)
    if plan.heads(rank) and stage.keys != arrived:
        reason = f"the keys of stage {stage.number} of rank {rank} are not those that arrive"
        return Refusal("other-keys", reason)
    if plan.exchange.method == "needed" and without(arrived, needed):
        reason = f"rank {rank} receives keys in stage {stage.number} that no row of it sees"
        return Refusal("unneeded", reason)
    return None


def _lie_in(keys: Ranges, own: Ranges) -> bool:
    """Whether keys are in order, and each run of them in a run of others: as a message's are."""
    last = -1
    for one in keys:
        start, stop = one.start, one.stop
        if one.step != 1 or not last < start < stop:
            return False
        if not any(some.start <= start and stop <= some.stop for some in own):
            return False
        last = stop
    return True


# -- what is computed ------------------------------------------------------------------------


class _At(NamedTuple):
    """A stage of a rank, and what is computed in it."""

    rank: int
    stage: RankStage
    pieces: tuple[StagePiece, ...]


def _looked_at(plan: ParallelPlan) -> Iterator[_At]:
    for rank in ranks_in_full(plan):
        stages = plan.stages(rank)
        if plan.size * len(stages) > _MOST_SHARES:
            stages = stages[:_MOST_STAGES]
        for stage in stages:
            pulse()
            yield _At(rank, stage, plan.pieces(rank, stage.number))


def _other_share(plan: ParallelPlan, at: _At) -> Refusal | None:
    """Check that the pieces of a stage are what the mask has of its rows and keys, cell by cell."""
    rows, keys, heads = plan.rows(at.rank), at.stage.keys, plan.heads(at.rank)
    told = f"stage {at.stage.number} of rank {at.rank}"
    for piece in at.pieces:
        if not (piece.rows and piece.keys) or not (_in_order(piece.rows) and _in_order(piece.keys)):
            return Refusal("other-share", f"a piece of {told} has no rows or keys, or twice")
        if without(piece.rows, rows) or without(piece.keys, keys):
            return Refusal("other-share", f"a piece of {told} has others' rows or keys")
        wrong = _other_piece(plan, piece, heads)
        if wrong is not None:
            return replace(wrong, subject=told)
    first = heads.start
    for head in heads if plan.request.matrices.per_head else heads[:1]:
        for batch, region in enumerate(layers(plan.request, head)):
            meant = region.take(rows, keys)
            parts = [
                Block(0, places(piece.rows, rows), places(piece.keys, keys)).image(
                    layers(piece.plan.request, head - first)[batch]
                )
                for piece in at.pieces
            ]
            if Region.union(parts) != meant or sum(one.area for one in parts) != meant.area:
                reason = f"{told} computes other cells than the mask's, or some of them twice"
                return Refusal("other-cells", reason)
    return None


def _other_piece(plan: ParallelPlan, piece: StagePiece, heads: range) -> Refusal | None:
    """Check that a piece's plan is proven, and of the share that its rows and keys are."""
    local = plan.dropout == "local"
    asked = local_request(plan.request, plan.bias, piece.rows, piece.keys, heads, local)
    if piece.plan.request != asked or asked.share is None:
        return Refusal("other-share", "its plan is of another share")
    if (asked.share.rows, asked.share.keys) != (piece.rows, piece.keys):
        return Refusal("other-share", "its plan leaves out rows or keys")
    if terms_of(plan.request, piece.bias) != asked.bias:
        return Refusal("other-bias", "its bias is not that of its rows and keys")
    if plan.backend not in ("auto", piece.plan.backend):
        return Refusal("other-backend", f"it runs on {piece.plan.backend!r}")
    return piece.plan.disprove()


def _not_covered(plan: ParallelPlan) -> Refusal | None:
    """Put back what all ranks compute in all stages: it is the mask, each cell once.

    Of small plans: of large ones the tables say it.
    """
    if len(ranks_in_full(plan)) < plan.size:
        return None
    for head in range(plan.request.num_heads):
        if head and not plan.request.matrices.per_head and plan.heads_ways == 1:
            break
        for batch, region in enumerate(layers(plan.request, head)):
            parts = list(_put_back(plan, head, batch))
            if Region.union(parts) != region or sum(one.area for one in parts) != region.area:
                reason = f"batch element {batch}, head {head}: some cells are computed twice or not"
                return Refusal("cover", reason)
    return None


def _put_back(plan: ParallelPlan, head: int, batch: int) -> Iterator[Region]:
    for rank in range(plan.size):
        heads = plan.heads(rank)
        if head not in heads:
            continue
        for piece in chain.from_iterable(
            plan.pieces(rank, stage.number) for stage in plan.stages(rank)
        ):
            local = layers(piece.plan.request, head - heads.start)[batch]
            yield Block(0, piece.rows, piece.keys).image(local)
