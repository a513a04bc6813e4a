"""Where the cells of calls and masks stand: as patches of the score matrices that were asked for.

Calls may have their tokens in another order, heads as batch elements, or parts of a union as
batch elements (`orders`): here they are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby

import numpy as np

from attnkit.explorer import CellPatch
from attnkit.geometry import Region
from attnkit.masks import Order
from attnkit.masks.trace import Rectangle
from attnkit.planner.calls import Launch
from attnkit.planner.folded import Folded
from attnkit.planner.orders import sorting
from attnkit.planner.parted import Parted, as_they_stand
from attnkit.planner.request import Request
from attnkit.planner.sequences import Block
from attnkit.ranges import Ranges, picked

__all__ = ["Places"]

_MOST_CELLS = 2**20  # of one score matrix whose cells are read one by one
_MOST_READ = 2**22  # of all of them
_MOST_RUNS = 50_000


class Places:
    """The patches of a request's mask, and of the calls that compute it, perhaps `in_order`."""

    def __init__(self, request: Request, in_order: Request | None) -> None:
        self.request, self.in_order = request, in_order
        self._left = _MOST_READ
        self._read: dict[tuple[int, int, int, int], Region | None] = {}
        self._orders: dict[tuple[int, int, int, int], Order | None] = {}

    # -- the mask ------------------------------------------------------------------------

    @cached_property
    def head_planes(self) -> list[range]:
        """Ranges of heads, each with one mask."""
        known, heads = self.request.matrices, range(self.request.num_heads)
        if not known.exact and self.request.mask.heads is not None:
            return [range(head, head + 1) for head in heads]  # alike around, if not inside
        return list(_alike(heads, known.planes.__getitem__)) if known.per_head else [heads]

    def mask(self, batch: int) -> Iterator[CellPatch]:
        """Yield what the mask allows of a batch element."""
        sizes = self.request.sequences[batch]
        every = _whole(sizes)
        for heads in self.head_planes:
            known = self.request.matrices.planes[heads[0] if self.request.matrices.per_head else 0]
            if known[batch].exact:
                yield CellPatch(0, batch, heads, *every, known[batch].outer)
                continue
            order = self._order(batch, heads[0])
            if order is not None:
                yield CellPatch(0, batch, heads, order.rows, order.keys, order.region)
            elif self.in_order is not None and isinstance(self.in_order.mask, Parted):
                yield from self._parts(self.in_order, self.in_order.mask, batch, heads)
            else:
                read = self._cells(batch, heads[0])
                region = known[batch].outer if read is None else read
                yield CellPatch(0, batch, heads, *every, region, read is not None)

    def _order(self, batch: int, head: int) -> Order | None:
        """Return the order of tokens in which the mask is a region, if it knows one."""
        mask, sizes = self.request.mask, self.request.sequences[batch]
        places = (0 if mask.batches is None else batch, 0 if mask.heads is None else head)
        key = (*sizes, *places)
        if key not in self._orders:
            found = mask.in_order(*key)
            self._orders[key] = found if found is not None and found.fits(*sizes) else None
        return self._orders[key]

    def _parts(self, other: Request, mask: Parted, batch: int, heads: range) -> Iterator[CellPatch]:
        """Yield the parts of a union, of which one is a region of sorted tokens."""
        for part in (0, 1):
            element = part * mask.count + batch
            region = other.matrices.regions(heads[0])[element]
            sides = _whole(other.sequences[element])
            order = mask.far.order(*other.sequences[element], batch, heads[0]) if part else None
            if order is not None:
                sides = order.rows, order.keys
            yield CellPatch(0, batch, heads, *sides, region)

    def _cells(self, batch: int, head: int) -> Region | None:
        """Return the cells of a mask that is no region, or None where nobody can tell them."""
        mask, (q_len, kv_len) = self.request.mask, self.request.sequences[batch]
        if mask.comes_with_call or any(tensor.is_meta for tensor in mask.tensors):
            return None
        key = (
            q_len,
            kv_len,
            0 if mask.batches is None else batch,
            0 if mask.heads is None else head,
        )
        if key not in self._read:
            count = q_len * kv_len
            self._read[key] = None
            if count <= min(_MOST_CELLS, self._left):
                self._left -= count
                at = Rectangle((0, q_len), (0, kv_len), *key)
                self._read[key] = _region_of(mask._read(at, "cpu").numpy())
        return self._read[key]

    # -- calls ---------------------------------------------------------------------------

    def call(self, launch: Launch) -> Iterator[CellPatch]:
        """Yield what a call computes: its sequences, of all batch elements."""
        request, other = self.request, self.in_order
        if other is not None and isinstance(other.mask, Parted):
            (launch,) = as_they_stand(request, other, [launch])
            other = None
        if launch.is_opaque:
            yield from self._opaque(launch)
            return
        own = range((other or request).num_heads) if launch.heads is None else launch.heads
        # Few calls tell heads apart; the others have one set of cells for all of theirs.
        alike = list(_alike(own, lambda head: head if len(launch.computed) > 1 else None))
        for number, block in enumerate(launch.blocks):
            for some in alike:
                region = launch.regions(some[0])[number]
                if region:
                    batch, first = _where(other, block.batch)
                    heads = range(first + some.start, first + some.stop)
                    sides = self._standing(other, batch, first, block)
                    yield CellPatch(number, batch, heads, *sides, region)

    def _opaque(self, launch: Launch) -> Iterator[CellPatch]:
        """Yield the patches of a call that reads the mask's own cells, of whole score matrices."""
        for number, block in enumerate(launch.blocks):
            for patch in self.mask(block.batch):
                yield patch._replace(number=number)

    def _standing(
        self, other: Request | None, batch: int, head: int, block: Block
    ) -> tuple[Ranges, Ranges]:
        """Return where rows and keys of a block stand, which may be one of sorted tokens."""
        own = None if other is None else sorting(other)
        sizes = self.request.sequences[batch]
        order = None if own is None else own.order(*sizes, batch, head)
        if order is None:
            return block.rows, block.keys
        return picked(order.rows, block.rows), picked(order.keys, block.keys)


def _whole(sizes: tuple[int, int]) -> tuple[Ranges, Ranges]:
    rows, keys = ((range(length),) if length else () for length in sizes)
    return rows, keys


def _where(other: Request | None, element: int) -> tuple[int, int]:
    """Return the batch element and the first head of an element of a moved request."""
    folded = other is not None and isinstance(other.mask, Folded)
    return other.mask.places[element] if folded else (element, 0)  # type: ignore[union-attr]


def _alike(numbers: Sequence[int], told: Callable[[int], object]) -> Iterator[range]:
    """Yield ranges of numbers that follow each other and are told alike."""
    every = groupby(enumerate(numbers), key=lambda pair: (pair[1] - pair[0], told(pair[1])))
    for _, pairs in every:
        own = [number for _, number in pairs]
        yield range(own[0], own[-1] + 1)


def _region_of(cells: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Region | None:
    """Return cells as a region; None where it has too many runs."""
    edges = np.diff(np.pad(cells, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    if len(rows) > _MOST_RUNS:
        return None
    runs: list[list[tuple[int, int]]] = [[] for _ in range(len(cells))]
    for row, start, stop in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True):
        runs[row].append((start, stop))
    return Region.from_rows(runs)
