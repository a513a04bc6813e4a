"""Requests restated for tokens that are moved: positions sorted, heads folded into the batch.

Where a mask knows an order of positions in which it is a region (`Mask.in_order`), tokens are
sorted around the calls, which then have the cells of that region. Heads that have masks of their
own become batch elements (`folded`). Each restated request is a function of the one asked for,
so a proof makes it again; calls are proven to compute the restated one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from attnkit.errors import Refusal
from attnkit.masks import Mask
from attnkit.planner.folded import Folded, folded
from attnkit.planner.parted import Parted, parted
from attnkit.planner.request import Request
from attnkit.planner.sorting import Sorted

__all__ = [
    "Positions",
    "Sorted",
    "how_moved",
    "moves",
    "only_merges",
    "placed",
    "restated",
    "sorted_alike",
    "sorted_positions",
    "sorting",
]


def restated(request: Request) -> Iterator[Request | Refusal]:
    """Yield the requests whose calls compute this one once its tokens are moved around them.

    Positions are sorted, heads folded, or both: first sorted, then folded. Or parts of a union
    are apart, each in its own order.
    """
    in_order = sorted_positions(request)
    for way in (in_order, folded(request), in_order and folded(in_order), parted(request)):
        if way is not None:
            yield _beside(request, way)


def _beside(request: Request, way: Request | Refusal) -> Request | Refusal:
    """Leave a restated request the memory that its moved tokens do not take."""
    limit = request.memory_limit
    if limit is None or isinstance(way, Refusal):
        return way
    # What is moved is read and written, and only the copy is more memory.
    taken = moves(request, way)[0] // 2
    if taken < limit:
        return replace(way, memory_limit=limit - taken)
    reason = f"moved tokens take {taken:,} bytes, and memory_limit is {limit:,}"
    return Refusal("memory-limit", reason, f"{way.mask!r}")


def sorting(other: Request) -> Sorted | None:
    """Return the mask that sorts the positions of a restated request, if they are sorted."""
    mask = other.mask.mask if isinstance(other.mask, Folded) else other.mask
    return mask if isinstance(mask, Sorted) else None


def only_merges(request: Request) -> bool:
    """Whether no call answers whole rows of a restated request, though one might by its cells.

    Parts of a union share rows; and where heads are folded, each element has sinks of its own.
    """
    if isinstance(request.mask, Parted):
        return True
    return request.sink and isinstance(request.mask, Folded)


def placed(other: Request, batch: int, head: int) -> tuple[int, int]:
    """Return which batch element and head of a restated request a score matrix is."""
    if isinstance(other.mask, Parted):  # drawn is the part of tokens as they stand
        return batch, head
    if not isinstance(other.mask, Folded):
        return batch, head
    first = head - head % other.num_heads
    return other.mask.places.index((batch, first)), head - first


def sorted_alike(request: Request, mask: Mask) -> Mask:
    """Return what a mask of positions as they stand is in a restated request, within its cells."""
    own = sorting(request)
    if own is None:
        return mask
    both = Sorted(own.mask & mask)
    return replace(request.mask, mask=both) if isinstance(request.mask, Folded) else both


def sorted_positions(request: Request) -> Request | None:
    """Return the request on sorted positions, for a mask that knows of an order; else None.

    Biases speak of positions, so a request with one is left alone. All heads have one order, and
    all rows of a dense batch.
    """
    if request.bias or not request.batch:
        return None
    mask = Sorted(request.mask)
    batch, heads = range(request.mask.batches or 1), range(request.mask.heads or 1)
    sizes = request.sequences if request.seqlens is not None else request.sequences[:1]
    for n, (q_len, kv_len) in enumerate(sizes):
        own = (n,) if request.seqlens is not None and len(batch) > 1 else batch
        first = mask.order(q_len, kv_len, own[0])
        for place in product(own, heads):
            order = mask.order(q_len, kv_len, *place)
            if order is None or first is None or not first.alike(order):
                return None
    return replace(request, mask=mask)


def moves(request: Request, other: Request) -> tuple[int, int]:
    """Return the bytes that are moved around the calls of a restated request, by how many kernels.

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.empty(1, 8192, 2, 16, device="meta")
    >>> plan = ak.plan(x, x, x, mask=ak.masks.Dilated(2), backend="emulated")
    >>> moves(plan.request, plan.in_order)
    (8388608, 6)
    """
    size, moved = 2 * request.dtype.itemsize, 0
    query, key, value = (prod(shape) for shape in request.shapes())
    out = query // request.head_dim * request.value_dim
    launches = 0
    if sorting(other) is not None:  # these tensors, and two of statistics
        moved, launches = query + key + value + out, 6
    if isinstance(other.mask, Folded):
        moved += query + out + sum(prod(shape) for shape in other.shapes()[1:])
        launches += 4
    return size * moved, launches


def how_moved(request: Request, other: Request) -> str:
    """Say in a few words how the tokens of a restated request are moved."""
    if isinstance(other.mask, Parted):
        return f"nothing: {other.mask!r} gather from the same tokens"
    said = []
    positions = Positions.of(request, other)
    if positions is not None:
        ranges = len(positions.ranges[0]) + len(positions.ranges[1])
        said.append(f"positions sorted, in {ranges:,} ranges of queries and keys")
    if isinstance(other.mask, Folded):
        each = f"{other.num_heads} query heads" if other.num_heads > 1 else "one head"
        said.append(f"heads as batch elements, {other.batch:,} of {each}")
    return " and ".join(said)


@dataclass(frozen=True, eq=False)
class Positions:
    """Where the tokens of a sorted request come from, as ranges of each token axis.

    A dense layout sorts every batch row alike; a packed one sorts inside each sequence.
    """

    ranges: tuple[tuple[range, ...], tuple[range, ...]]

    @classmethod
    def of(cls, request: Request, other: Request | None) -> Positions | None:
        """Return the order in which a restated request has the tokens; None for their own."""
        mask = None if other is None else sorting(other)
        if mask is None:
            return None
        queries: list[range] = []
        keys: list[range] = []
        row = key = 0
        sizes = request.sequences if request.seqlens is not None else request.sequences[:1]
        for n, (q_len, kv_len) in enumerate(sizes):
            order = mask.order(q_len, kv_len, n)
            if order is not None:
                queries += (range(r.start + row, r.stop + row, r.step) for r in order.rows)
                keys += (range(r.start + key, r.stop + key, r.step) for r in order.keys)
            row, key = row + q_len, key + kv_len
        return cls((tuple(queries), tuple(keys)))
