"""Rows that see the same keys, brought together: sparse masks whose classes lie apart.

The rows of a window of tiles, or of one document of many that take turns, see the same keys and lie
apart, and so do the keys. Sorted by what they see, and keys by who sees them, the mask is a few
rectangles, and tiles hold little else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from attnkit.geometry import Region, Slice
from attnkit.masks import Enclosure, Mask, Order
from attnkit.planner import Request
from attnkit.planner.orders import Sorted
from attnkit.strips import Run, advance

__all__ = ["in_classes"]

_FEWEST_ROWS = 32
"""Rows that a class has on average, at least: tiles of fewer are slow."""

_FEWEST_CELLS = 2**20
_SHARE = 1.3

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False, eq=False)
class Classes(Mask):
    """A mask that knows an order: rows by the keys that they see, keys by the rows that see them.

    >>> from attnkit.masks import SameId
    >>> two = Classes(SameId([(0, 64), (1, 64), (0, 64)]))
    >>> two.in_order(192, 192).rows, len(two.in_order(192, 192).region.slices)
    ((range(0, 64), range(128, 192), range(64, 128)), 2)
    """

    mask: Mask

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the mask."""
        return self.mask.enclosure(q_len, kv_len, batch, head)

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """Return the order; None where the classes of rows are too many."""
        known = self.enclosure(q_len, kv_len, batch, head)
        classes = _classes(known.outer, q_len) if known.exact else None
        if classes is None:
            return None
        keys, places = _keys_of(list(classes), kv_len)
        starts = accumulate((sum(map(len, rows)) for rows in classes.values()), initial=0)
        parts = [
            Slice(i0, i1, j0, j1)
            for (i0, i1), runs in zip(pairwise(starts), places, strict=True)
            for j0, j1 in runs
        ]
        rows = tuple(one for some in classes.values() for one in some)
        return Order(rows, keys, Region.of(*parts))

    def __repr__(self) -> str:
        return repr(self.mask)


def _classes(region: Region, q_len: int) -> dict[Runs, list[range]] | None:
    """Return the rows that see each set of keys; None where these are too many."""
    found: dict[Runs, list[range]] = {}
    for i0, i1 in region.empty_rows(q_len):
        found.setdefault((), []).append(range(i0, i1))
    for rows, runs in _alike(region):
        found.setdefault(tuple((a, b) for a, _, b, _ in runs), []).append(rows)
        if len(found) * _FEWEST_ROWS > q_len:
            return None
    return found


def _alike(region: Region) -> Iterator[tuple[range, tuple[Run, ...]]]:
    """Yield rows that follow each other and see the same keys, and their runs."""
    for i0, i1, runs in region.strips:
        if any(a or b for _, a, _, b in runs):
            yield from ((range(i, i + 1), advance(runs, i - i0)) for i in range(i0, i1))
        else:
            yield range(i0, i1), runs


def _keys_of(classes: list[Runs], kv_len: int) -> tuple[tuple[range, ...], list[Runs]]:
    """Return the keys in groups that the same classes see, and the runs of each class there."""
    ends = sorted({0, kv_len, *(end for runs in classes for run in runs for end in run)})
    seen = np.zeros((len(ends) - 1, len(classes)), dtype=bool)
    at = {end: n for n, end in enumerate(ends)}
    for k, runs in enumerate(classes):
        for a, b in runs:
            seen[at[a] : at[b], k] = True
    order = np.lexsort(np.packbits(seen, axis=1).T)
    spans = [range(ends[n], ends[n + 1]) for n in order]
    starts = list(accumulate(map(len, spans), initial=0))
    return tuple(spans), [_joined(seen[order, k], starts) for k in range(len(classes))]


def _joined(seen: np.ndarray, starts: list[int]) -> Runs:
    """Return where a class sees consecutive spans."""
    steps = np.flatnonzero(np.diff(np.concatenate(([0], seen.view(np.int8), [0]))))
    return tuple((starts[a], starts[b]) for a, b in steps.reshape(-1, 2).tolist())


def in_classes(request: Request, computed: int) -> Request | None:
    """Return the request with its rows in classes, if so few cells may be worth the move.

    `computed` are the cells of its tiles as tokens stand. None for what speaks of positions.
    """
    alike = request.seqlens is None and request.mask.batches is request.mask.heads is None
    plain = not (request.bias or request.score_fn is not None or request.dropout)
    if not (alike and plain and request.matrices.exact) or computed < _FEWEST_CELLS:
        return None
    allowed = request.num_heads * sum(region.area for region in request.matrices.regions())
    mask = Sorted(Classes(request.mask))
    known = saves(allowed, computed) and mask.order(request.q_len, request.kv_len) is not None
    return replace(request, mask=mask) if known else None


def saves(fewer: int, computed: int) -> bool:
    """Whether so many cells fewer are worth moving all tokens, there and back."""
    return _SHARE * fewer <= computed
