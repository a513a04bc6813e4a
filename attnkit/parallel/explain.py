"""The report of a parallel plan: who has what, computes what, receives what, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attnkit.display import Text
from attnkit.parallel.choices import DROPOUTS
from attnkit.parallel.choose import label
from attnkit.parallel.plan import ParallelPlan, StagePiece
from attnkit.parallel.posting import BUFFER, posts
from attnkit.parallel.price import slowest
from attnkit.parallel.proof import disprove, ranks_in_full
from attnkit.parallel.sharding import between
from attnkit.parallel.stages import RankStage
from attnkit.planner.explain import bytes_told, entry, listed, request_lines
from attnkit.planner.price import chip, dearer
from attnkit.ranges import total

__all__ = ["as_data", "explain"]

_MOST_STAGES = 4
_MOST_OTHERS = 6
_MOST_POSTS = 4


def explain(plan: ParallelPlan) -> Text:
    """Return the report that `ParallelPlan.explain` documents, 80 columns wide."""
    ranks = f"{plan.size} rank" + "s" * (plan.size > 1)
    lines = [f"attention over {ranks}: {label(plan)}"]
    for name, text in request_lines(plan.request):
        lines += entry(name, text)
    for name, text in (
        ("tokens", _tokens(plan)),
        ("heads", _heads(plan)),
        ("cells", _cells(plan)),
        ("receives", _receives(plan)),
        ("bytes", _bytes(plan)),
        ("kept", _kept(plan)),
        ("dropout", _dropout(plan)),
        *_of_rank(plan, slowest(plan)[-1]),
        ("price", _price(plan)),
        ("proof", _proof(plan)),
        ("also right", _others(plan)),
    ):
        lines += entry(name, text)
    return Text("\n".join(lines + listed("refused", plan.refusals)))


def as_data(plan: ParallelPlan) -> dict[str, Any]:
    """Return the dictionary that `ParallelPlan.to_dict` documents."""
    ranks = range(plan.size)
    received = [plan.received(rank) for rank in ranks]
    return {
        "ranks": plan.size,
        "method": plan.method,
        "heads_ways": plan.heads_ways,
        "stages": len(plan.exchange.distances),
        "keep": plan.keep,
        "balance": plan.balance,
        "backend": plan.backend,
        "dropout": plan.dropout,
        "request": dict(request_lines(plan.request)),
        "tokens": list(plan.queries.sizes),
        "cells": list(plan.cells),
        "keys_received": [one.keys for one in received],
        "bytes_received": {
            "forward": [one.forward for one in received],
            "backward": [one.backward for one in received],
        },
        "price": None if plan.price is None else plan.price.to_dict(),
        "alternatives": [
            {"label": other.label, "price": other.price.to_dict()} for other in plan.alternatives
        ],
        "refusals": [
            {"subject": r.subject, "code": r.code, "reason": r.reason} for r in plan.refusals
        ],
    }


def _tokens(plan: ParallelPlan) -> str:
    sides = [("", plan.queries)]
    if plan.keys != plan.queries:
        sides = [(" queries", plan.queries), (" keys", plan.keys)]
    told = []
    for name, sharding in sides:
        ranges = [len(own) for own in sharding.ranks]
        told.append(
            f"{between(sharding.sizes)}{name} per rank, in {between(ranges)} range"
            + "s" * (max(ranges) != 1)
        )
    how = "" if plan.balance == "given" else f", {plan.balance}"
    return "; ".join(told) + how


def _heads(plan: ParallelPlan) -> str:
    if plan.heads_ways == 1:
        return ""
    heads = [len(plan.heads(rank)) for rank in range(plan.heads_ways)]
    idle = heads.count(0) * (plan.size // plan.heads_ways)
    told = f"{plan.heads_ways} neighbours exchange tokens for {between(heads)} heads each"
    return told + (f"; {idle} ranks have none, and compute nothing" if idle else "")


def _cells(plan: ParallelPlan) -> str:
    cells = plan.cells
    mean = sum(cells) / plan.size
    if not mean:
        return "none"
    most = max(cells)
    return (
        f"{mean:,.0f} per rank on average; rank {cells.index(most)} has the most, "
        f"{100 * (most / mean - 1):.2f} % more"
    )


def _receives(plan: ParallelPlan) -> str:
    if not plan.exchange.distances:
        return "no keys of others"
    keys = [total(some) for some in plan.exchange.wanted]
    whole = [plan.exchange.keys.length - own for own in plan.exchange.keys.sizes]
    share = 100 * sum(keys) / max(1, sum(whole))
    most = max(keys)
    return (
        f"{sum(keys) / len(keys):,.0f} keys of others on average, rank "
        f"{keys.index(most) * plan.heads_ways} the most, {most:,}; all keys would be "
        f"{max(whole):,} ({share:.3g} % of them are moved)"
    )


def _bytes(plan: ParallelPlan) -> str:
    told = []
    for name, moved in zip(("forward", "backward"), plan.transfers, strict=True):
        received = moved.sum(0).tolist()
        told.append(
            f"{name} {bytes_told(sum(received) / plan.size)} received per rank on average, "
            f"{bytes_told(max(received))} at most"
        )
    pairs = int((plan.transfers.forward > 0).sum())
    return "; ".join(told) + f"; {pairs:,} of {plan.size * (plan.size - 1):,} pairs exchange keys"


def _kept(plan: ParallelPlan) -> str:
    if not plan.exchange.distances or not plan.request.needs_grad:
        return ""
    if plan.keep:
        return "keys that were received stay for the backward pass"
    return "the backward pass fetches keys again"


def _dropout(plan: ParallelPlan) -> str:
    return DROPOUTS[plan.dropout] if plan.request.dropout else ""


def _of_rank(plan: ParallelPlan, rank: int) -> Iterator[tuple[str, str]]:
    """Yield what a rank does in its stages."""
    stages = plan.stages(rank)
    for stage in stages[:_MOST_STAGES]:
        name = f"rank {rank}" if not stage.number else ""
        yield name, _stage(plan, stage, plan.pieces(rank, stage.number))
        if stage.receives or stage.sends:
            yield "", _posted(plan, rank, stage)
    if len(stages) > _MOST_STAGES:
        yield "", f"and {len(stages) - _MOST_STAGES} more stages"


def _stage(plan: ParallelPlan, stage: RankStage, pieces: Sequence[StagePiece]) -> str:
    whence = "its own"
    if stage.number:
        count = len(stage.receives)
        whence = f"{count} rank{'s' * (count != 1)}"
        if 0 < count <= 3:
            whence = "rank " + ", ".join(str(message.rank) for message in stage.receives)
    told = f"stage {stage.number}: {total(stage.keys):,} keys of {whence}"
    parts = []
    for piece in pieces:
        calls = len(piece.plan.calls)
        how = f" by {calls} fused call" + "s" * (calls > 1) if calls else ""
        parts.append(
            f"{total(piece.rows):,} rows x {total(piece.keys):,} keys on "
            f"{piece.plan.backend!r}{how}"
        )
    return f"{told}; {' and '.join(parts) or 'no row sees one'}"


def _posted(plan: ParallelPlan, rank: int, stage: RankStage) -> str:
    """Say what is posted for the keys of a stage, while the stage before is computed."""
    every = posts(stage)
    told = ", ".join(map(str, every[:_MOST_POSTS]))
    more = f" and {len(every) - _MOST_POSTS} more" if len(every) > _MOST_POSTS else ""
    one = plan.numbers(rank) * plan.request.dtype.itemsize
    sent = sum(total(message.keys) for message in stage.sends) * one
    over = f", more than P2P_HCCL_BUFFSIZE has by default ({BUFFER:,})" if sent > BUFFER else ""
    return f"posted: {told}{more}; {bytes_told(sent)} sent{over}"


def _price(plan: ParallelPlan) -> str:
    found = plan.price
    if found is None:
        return ""
    weights = chip()
    doubt = "" if weights.calibrated else " (nobody has measured these weights)"
    return (
        f"about {_time(found.total)} for rank {found.rank}, the slowest of "
        f"{len(found.ranks)} looked at: {_time(found.compute)} of computing and "
        f"{_time(found.exchange)} of exchange that overlap, by the weights of {weights.name}{doubt}"
    )


def _time(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:,.3g} ms" if nanoseconds >= 1e6 else f"{nanoseconds / 1e3:,.3g} us"


def _proof(plan: ParallelPlan) -> str:
    wrong = disprove(plan)
    if wrong is not None:
        return f"NONE: {wrong}"
    full = ranks_in_full(plan)
    if len(full) == plan.size:
        what = "the mask" if plan.request.matrices.exact else "all cells that the mask may allow"
        return f"all ranks and stages together compute {what}, each cell once"
    return (
        "every key that a row sees is in one stage of its rank, arrives once, from its owner; "
        f"shares looked at cell by cell: those of ranks {', '.join(map(str, full))}"
    )


def _others(plan: ParallelPlan) -> str:
    best = plan.price.total if plan.price is not None else 0.0
    told = [f"{o.label} ({dearer(o.price.total, best)})" for o in plan.alternatives[:_MOST_OTHERS]]
    more = len(plan.alternatives) - _MOST_OTHERS
    return ", ".join(told) + (f", and {more} more" if more > 0 else "")
