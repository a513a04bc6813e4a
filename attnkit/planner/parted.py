"""A union of which one part is a region as tokens stand, and another one once they are sorted.

A band and every step-th key: no order of positions makes a region of both. So the parts become
disjoint masks of batch elements of their own: near ones of tokens as they stand, far ones of
sorted tokens. Their calls gather from the same tokens, and merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from attnkit.geometry import Region
from attnkit.layouts import SeqLens
from attnkit.masks import And, Enclosure, Mask, Or
from attnkit.planner.calls import Launch
from attnkit.planner.request import Request
from attnkit.planner.sequences import Block
from attnkit.planner.sorting import Sorted
from attnkit.ranges import Ranges
from attnkit.strips import gaps, seen_spans

__all__ = ["Parted", "as_they_stand", "parted"]


@dataclass(frozen=True, repr=False, eq=False)
class Parted(Mask):
    """Disjoint masks as batch elements: the near one for each of `count`, then the far one.

    >>> from attnkit import masks
    >>> far = Sorted(masks.Dilated(2) - masks.SlidingWindow(2))
    >>> both = Parted(masks.SlidingWindow(2), far, 1)
    >>> [both.region(4, 4, batch=n).area for n in (0, 1)]
    [7, 4]
    """

    near: Mask
    far: Sorted
    count: int

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the part that the element is of."""
        part, own = divmod(batch, self.count)
        mask = self.far if part else self.near
        return mask.enclosure(q_len, kv_len, own if mask.batches is not None else 0, head)

    @property
    def batches(self) -> int | None:
        """Two for each."""
        return 2 * self.count

    @property
    def heads(self) -> int | None:
        """As the parts: the far one is made of all."""
        return self.far.heads

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """As the parts."""
        return self.far.extent

    def __repr__(self) -> str:
        return f"{self.near!r} as tokens stand, and {self.far!r}"


def parted(request: Request) -> Request | None:
    """Return the request whose batch elements are the parts of a union, or None.

    The near ones are regions; the far ones, which are without their cells, are regions in an
    order of their own. Every key is seen.
    """
    if request.bias or not request.batch or request.matrices.exact:
        return None
    found = _near_and_far(request)
    if found is None:
        return None
    lens, times = request.seqlens, 1 if request.seqlens is None else 2
    other = replace(
        request,
        mask=Parted(*found, request.batch),
        layout="BSND" if lens is None else "TND",
        batch=2 * request.batch,
        q_len=times * request.q_len,
        kv_len=times * request.kv_len,
        seqlens=None if lens is None else SeqLens(lens.q * 2, lens.kv * 2),
    )
    return other if other.matrices.exact and _sees_all_keys(request, other) else None


def _sees_all_keys(request: Request, other: Request) -> bool:
    """Whether every key is seen in one of the parts, so that none is to be kept from the calls."""
    count = request.batch
    mask = cast(Parted, other.mask)
    for head, plane in enumerate(other.matrices.planes):
        for b, (known, sizes) in enumerate(zip(plane[:count], request.sequences, strict=True)):
            order = mask.far.order(*sizes, b, head)
            unseen = order.unmatched()[1] if order is not None else ((0, sizes[1]),)
            free = gaps(seen_spans(known.outer.strips), 0, sizes[1])
            if Region.columns(1, free) & Region.columns(1, unseen):
                return False
    return True


def _near_and_far(request: Request) -> tuple[Mask, Sorted] | None:
    """Split a union, or one that is cut by other masks: near parts, and far ones without them."""
    mask = request.mask
    around = mask.parts if isinstance(mask, And) else ()
    unions = [one for one in around or (mask,) if isinstance(one, Or)]
    if len(unions) != 1:
        return None
    (union,) = unions
    sizes = set(request.sequences)
    near = [part for part in union.parts if all(part.is_region(*one) for one in sizes)]
    far = [part for part in union.parts if part not in near]
    if not near or not far:
        return None
    rest = [part for part in around if part is not union]
    inside = Or.of(*near)
    outside = Sorted(And.of(*rest, Or.of(*far), ~inside))
    batch, heads = range(outside.batches or 1), range(outside.heads or 1)
    orders = (outside.order(*one, b, h) for one in sizes for b in batch for h in heads)
    return (And.of(*rest, inside), outside) if None not in orders else None


def as_they_stand(request: Request, other: Request, launches: Sequence[Launch]) -> list[Launch]:
    """Return calls of both parts as parts of one request, whose tokens stand in their order."""
    mask = other.mask
    return [
        replace(
            launch,
            blocks=tuple(_as_it_stands(mask, request, block) for block in launch.blocks),
            starts=request.token_starts,
        ).as_part()
        for launch in launches
        if isinstance(mask, Parted)
    ]


def _as_it_stands(mask: Parted, request: Request, block: Block) -> Block:
    part, batch = divmod(block.batch, mask.count)
    order = mask.far.order(*request.sequences[batch], batch) if part else None
    if order is None:
        return replace(block, batch=batch)
    return Block(batch, _places(order.rows, block.rows), _places(order.keys, block.keys))


def _places(order: Ranges, places: Ranges) -> Ranges:
    """Return the positions that stand at some places of an order."""
    found: list[range] = []
    start = 0
    starts = []
    for one in order:
        starts.append(start)
        start += len(one)
    for place in places:
        a, b = (place.start, place.stop) if place.step > 0 else (place.stop + 1, place.start + 1)
        own = [
            one[max(a - first, 0) : b - first]
            for one, first in zip(order, starts, strict=True)
            if first < b and a < first + len(one)
        ]
        found += own if place.step > 0 else [one[::-1] for one in reversed(own)]
    return tuple(found)
