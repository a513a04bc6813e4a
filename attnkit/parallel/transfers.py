"""How many bytes a parallel plan moves between each two ranks, before anything is launched."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attnkit.backends.base import stats_dtype
from attnkit.ranges import total

if TYPE_CHECKING:
    from attnkit.parallel.plan import ParallelPlan

__all__ = ["Received", "Transfers", "received_by", "transfers_of"]


class Transfers(NamedTuple):
    """Bytes that go from one rank to another, ``[from, to]``, in int64."""

    forward: Tensor
    backward: Tensor


class Received(NamedTuple):
    """What a rank receives: keys of other ranks, and bytes."""

    keys: int
    forward: int
    backward: int


def transfers_of(plan: ParallelPlan) -> Transfers:
    """Return what `ParallelPlan.transfers` documents."""
    request, size = plan.request, plan.size
    counts = [[0] * size for _ in range(size)]
    for rank in range(size):
        numbers = plan.numbers(rank)
        for _, _, receives, _ in plan.table(rank):
            for source, keys in receives:
                counts[source][rank] += total(keys) * numbers
    moved = torch.tensor(counts, dtype=torch.int64, device="cpu")
    there = moved * request.dtype.itemsize
    back = moved.mT * stats_dtype(request.dtype).itemsize
    forward, backward = there, back if plan.keep else back + there
    if plan.heads_ways > 1:
        of_turn = plan.turn.transfers
        forward, backward = forward + of_turn[0], backward + of_turn[1]
    return Transfers(forward, backward)


def received_by(plan: ParallelPlan, rank: int) -> Received:
    """Return what a rank receives."""
    keys = plan.exchange.wanted[rank // plan.heads_ways] if plan.heads(rank) else ()
    forward, backward = (int(moved[:, rank].sum()) for moved in plan.transfers)
    return Received(total(keys), forward, backward)
