"""What of a stage is computed together: all of it, or one range of rows and of keys at a time.

A bias that counts distances is a few numbers for the fused kernel: slopes, channels, a logit at
the merge. Rows and keys from several places are not as far apart as they lie in a call, and such a
bias would be a matrix. Of one range each they are, but for an offset. So a stage is taken in
pieces, whose partial answers are merged like those of stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attnkit.arguments import anchor
from attnkit.backends.base import BACKENDS
from attnkit.geometry import Region
from attnkit.planner import Request
from attnkit.planner.request import BiasTerm
from attnkit.planner.routes import MOST_POSITIONS
from attnkit.pse.structure import Linear, Root
from attnkit.ranges import Ranges

__all__ = ["pieces"]

_MOST_SQUARES = 1024
"""A strip that would be more squares is left as it is."""


def _counts_distances(request: Request, backend: str) -> bool:
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
    if not _counts_distances(request, backend):
        yield rows, keys
        return
    for own in rows:
        for others in keys:
            squares = any(_in_squares(request, term, own, others) for term in request.bias)
            places = _squares(own, others) if squares else [(own, others)]
            yield from (((some,), (more,)) for some, more in places if _meet(regions, some, more))


def _in_squares(request: Request, term: BiasTerm, rows: range, keys: range) -> bool:
    """Whether the kernel alone can add a bias: from slopes, which it takes in squares only.

    That is roots of distances, and distances between positions that channels would round.
    """
    if isinstance(term.structure, Root):
        return True
    first = rows.start + anchor(term.align, request.q_len, request.kv_len) - keys.start
    longest = max(len(keys), abs(first), abs(first + len(rows)))
    return isinstance(term.structure, Linear) and longest > MOST_POSITIONS


def _meet(regions: Collection[Region], rows: range, keys: range) -> bool:
    ends = (rows.start, rows.stop), (keys.start, keys.stop)
    return any(region.cut(*ends) for region in regions)


def _squares(rows: range, keys: range) -> list[tuple[range, range]]:
    """Return a rectangle as squares, and a strip that is left where it would be many small ones.

    >>> _squares(range(4), range(2, 12))
    [(range(0, 4), range(2, 6)), (range(0, 4), range(6, 10)), (range(0, 2), range(10, 12)), \
(range(2, 4), range(10, 12))]
    >>> _squares(range(4096), range(4097))
    [(range(0, 4096), range(0, 4096)), (range(0, 4096), range(4096, 4097))]
    """
    found: list[tuple[range, range]] = []
    while rows and keys:
        side = min(len(rows), len(keys))
        if max(len(rows), len(keys)) > _MOST_SQUARES * side:
            return [*found, (rows, keys)]
        if len(rows) <= len(keys):
            found.append((rows, keys[:side]))
            keys = keys[side:]
        else:
            found.append((rows[:side], keys))
            rows = rows[side:]
    return found
