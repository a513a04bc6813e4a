"""What of a stage is computed together: all of it, or one range of rows and of keys at a time.

A bias that counts distances is a few numbers for the fused kernel: slopes, channels, a logit at
the merge. Rows and keys from several places are not as far apart as they lie in a call, and such a
bias would be a matrix. Of one range each they are, but for an offset. So a stage is taken in
pieces, whose partial answers are merged like those of stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attnkit.backends.base import BACKENDS
from attnkit.geometry import Region
from attnkit.planner import Request
from attnkit.pse.structure import Root
from attnkit.ranges import Ranges

__all__ = ["counts_distances", "pieces"]

_MOST_SQUARES = 16


def counts_distances(request: Request, backend: str) -> bool:
    """Whether fused calls add a bias by distances: that runs them, and such a bias is there.

    "auto" takes a backend of calls where the tensors are on its device.
    """
    names = (name for name, one in BACKENDS.items() if one.by_calls)
    runs = backend in names or (backend == "auto" and request.device == "npu")
    return runs and any(term.by_distance for term in request.bias)


def pieces(
    request: Request, regions: Collection[Region], rows: Ranges, keys: Ranges, backend: str
) -> Iterator[tuple[Ranges, Ranges]]:
    """Yield the rows and the keys of each piece of a stage; no cell of the mask is in two.

    `request` is of all tokens, `regions` are what it allows, and `rows` and `keys` positions in it.

    >>> import torch
    >>> from attnkit import masks, pse
    >>> from attnkit.planner import Composition, read_request
    >>> x = torch.empty(1, 8, 2, 16, device="meta")
    >>> slopes = read_request(Composition(masks.Causal(), pse.ALiBi(2)), x, x, x)
    >>> ends = (range(0, 2), range(6, 8))
    >>> causal = [masks.Causal().region(8, 8)]
    >>> len(list(pieces(slopes, causal, ends, ends, "tiled")))
    1
    >>> for own, others in pieces(slopes, causal, ends, ends, "emulated"):
    ...     print(own, others)
    (range(0, 2),) (range(0, 2),)
    (range(6, 8),) (range(0, 2),)
    (range(6, 8),) (range(6, 8),)
    """
    if not counts_distances(request, backend):
        yield rows, keys
        return
    squares = any(isinstance(term.structure, Root) for term in request.bias)
    for own in rows:
        for others in keys:
            places = _squares(own, others) if squares else [(own, others)]
            yield from (((some,), (more,)) for some, more in places if _meet(regions, some, more))


def _meet(regions: Collection[Region], rows: range, keys: range) -> bool:
    ends = (rows.start, rows.stop), (keys.start, keys.stop)
    return any(region.cut(*ends) for region in regions)


def _squares(rows: range, keys: range) -> list[tuple[range, range]]:
    """Return a rectangle as squares, if few do: the kernel takes roots of distances in no other.

    >>> _squares(range(4), range(2, 12))
    [(range(0, 4), range(2, 6)), (range(0, 4), range(6, 10)), (range(0, 2), range(10, 12)), \
(range(2, 4), range(10, 12))]
    >>> _squares(range(64), range(65))
    [(range(0, 64), range(0, 65))]
    """
    found: list[tuple[range, range]] = []
    left, above = rows, keys
    while left and above and len(found) <= _MOST_SQUARES:
        side = min(len(left), len(above))
        if len(left) <= len(above):
            found.append((left, above[:side]))
            above = above[side:]
        else:
            found.append((left[:side], above))
            left = left[side:]
    return found if len(found) <= _MOST_SQUARES else [(rows, keys)]
