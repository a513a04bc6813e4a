"""What rows see of keys, over whole axes of tokens: the plane that a sharding cuts.

The score matrices of a packed batch stand down the diagonal of its plane, those of batch elements
and heads lie on top of each other. Costs follow strips and ranges, never cells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from attnkit.geometry import Region
from attnkit.planner import Request
from attnkit.ranges import Ranges, in_order, joined, total, without
from attnkit.taking import rows_of

__all__ = ["diagonal", "layers", "planes", "seeing", "seen_by", "worth_leaving_out"]

_PARTS = 64


def planes(request: Request, heads: range | None = None) -> dict[Region, int]:
    """Return the regions that some score matrices may allow, and how many matrices each has.

    Positions are those of the request's axes of tokens. A mask that is no region counts with the
    region around it.

    >>> import torch
    >>> from attnkit import masks
    >>> from attnkit.planner import Composition, read_request
    >>> x = torch.empty(2, 8, 4, 16, device="meta")
    >>> planes(read_request(Composition(masks.Causal()), x, x, x)) == {
    ...     masks.Causal().region(8, 8): 8
    ... }
    True
    """
    heads = range(request.num_heads) if heads is None else heads
    kept: dict[range, dict[Region, int]] = request.__dict__.setdefault("_planes", {})
    if heads not in kept:  # a packed batch has thousands of strips, and is asked for again
        kept[heads] = _planes(request, heads)
    return kept[heads]


def _planes(request: Request, heads: range) -> dict[Region, int]:
    found: Counter[Region] = Counter()
    per_head = request.matrices.per_head
    for head in heads if per_head else heads[:1]:
        for region in layers(request, head):
            found[region] += 1 if per_head else len(heads)
    return dict(found)


def layers(request: Request, head: int) -> tuple[Region, ...]:
    """Return what a head may see, over whole axes of tokens: of each batch element, or packed."""
    regions = request.matrices.regions(head)
    return regions if request.seqlens is None else (diagonal(regions, request.token_starts),)


def diagonal(regions: Iterable[Region], starts: tuple[Sequence[int], Sequence[int]]) -> Region:
    """Return the score matrices of packed sequences where they lie among all tokens.

    `starts` says where the queries and the keys of each begin; behind the last it may say the end.
    """
    each = zip(regions, *starts, strict=False)
    return Region.stacked(
        strip for region, row, key in each for strip in region.shift(row, key).strips
    )


def seen_by(regions: Collection[Region], rows: Ranges) -> Ranges:
    """Return the keys that some rows see in any of some regions, in order.

    >>> causal = Region.from_rows([[(0, 1)], [(0, 2)], [(0, 3)]])
    >>> seen_by([causal], (range(2),))
    (range(0, 2),)
    """
    if len(regions) == 1:
        return next(iter(regions)).seen(rows)
    return in_order(one for region in regions for one in region.seen(rows))


def seeing(regions: Iterable[Region], rows: Ranges, keys: Ranges) -> Ranges:
    """Return those of some rows that see one of some keys; all three are in order.

    >>> causal = Region.from_rows([[(0, 1)], [(0, 2)], [(0, 3)]])
    >>> seeing([causal], (range(3),), (range(1, 2),))
    (range(1, 3),)
    """
    stops = [one.stop for one in keys]
    spans: list[tuple[int, int]] = []
    for i0, i1, runs in (
        s for region in regions for own in rows for s in rows_of(region.strips, own)
    ):
        for a, da, b, db in runs:
            for k in range(bisect_right(stops, a), len(keys)):
                start, stop = keys[k].start, keys[k].stop
                if start >= b + db * (i1 - i0 - 1):
                    break
                # The run ends behind the range's start from some row on, and starts before its
                # end up to some row.
                first = max(0, start - b + 1) if db else 0
                last = min(i1 - i0, stop - a) if da else i1 - i0
                spans.append((i0 + first, i0 + last))
    return joined(spans)


def worth_leaving_out(some: Ranges, used: Ranges) -> Ranges:
    """Return some positions without those that are not used, where many of them lie together.

    Each gap is a cut in the tensors, so one of less than 1/64 of the positions stays.

    >>> worth_leaving_out((range(128),), (range(2, 60), range(64, 100)))
    (range(2, 60), range(64, 100))
    >>> worth_leaving_out((range(1280),), (range(10, 600), range(640, 1000)))
    (range(0, 600), range(640, 1000))
    """
    gaps = without(some, used)
    least = max(1, total(some) // _PARTS)
    return without(some, tuple(one for one in gaps if len(one) >= least))
