"""Dilated masks as regions: after sorting positions by their residue, every class is one block.

``Dilated(step) & rest`` allows a cell only where query position and key are congruent modulo
`step`. Sort the queries and the keys by residue: the cells of one class form a block on the
diagonal, and in the class's own numbering (every step-th row, every step-th key) a slice of
`rest` is a slice again, its bounds divided by `step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from attnkit.errors import Refusal
from attnkit.geometry import Region, Slice
from attnkit.masks import And, Dilated, Full, Mask
from attnkit.masks.base import anchor
from attnkit.planner.folded import Folded, folded
from attnkit.planner.request import Request

__all__ = ["Resorted", "moves", "residue_order", "resort", "restated"]


@dataclass(frozen=True, repr=False)
class Resorted(Mask):
    """The mask ``Dilated(step, align) & rest`` on positions sorted by residue: a region.

    >>> from attnkit.masks import Band
    >>> window = Resorted(Dilated(2), Band(4, 0))
    >>> window.region(8, 8).area == int((Dilated(2) & Band(4, 0)).materialize(8, 8).sum())
    True
    """

    dilated: Dilated
    rest: Mask

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        rest = self.rest.region(q_len, kv_len, batch, head)
        step, parts, key = self.dilated.step, [], 0
        row = 0
        for i0, j0 in self._origins(q_len, kv_len):
            rows, keys = len(range(i0, q_len, step)), len(range(j0, kv_len, step))
            for part in rest.slices:
                own = _every(part, i0, j0, step)
                inside = own & Slice(0, rows, 0, keys) if own else own
                parts.append(inside.shift(row, key))
            row, key = row + rows, key + keys
        return Region.of(*parts)

    def _origins(self, q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
        """Yield the first row and the first key of every residue class that has either.

        There are no more of them than positions, however large the step is.
        """
        at, step = anchor(self.dilated.align, q_len, kv_len), self.dilated.step
        of_rows = {(i + at) % step for i in range(min(q_len, step))}
        for residue in sorted(of_rows.union(range(min(kv_len, step)))):
            yield (residue - at) % step, residue

    def order(self, q_len: int, kv_len: int) -> tuple[tuple[range, ...], tuple[range, ...]]:
        """Return the positions of queries and of keys, class after class."""
        step = self.dilated.step
        pairs = list(self._origins(q_len, kv_len))
        return (
            tuple(range(i0, q_len, step) for i0, _ in pairs),
            tuple(range(j0, kv_len, step) for _, j0 in pairs),
        )

    @property
    def batches(self) -> int | None:
        """As the rest."""
        return self.rest.batches

    @property
    def heads(self) -> int | None:
        """As the rest."""
        return self.rest.heads

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """As the rest."""
        return self.rest.extent

    def __repr__(self) -> str:
        return f"{self.dilated!r} & {self.rest!r}, positions sorted by residue"


def _every(part: Slice, i0: int, j0: int, step: int) -> Slice:
    """Return the cells (i0 + step * u, j0 + step * v) of a slice, as a slice of (u, v)."""
    return Slice(
        max(0, -((i0 - part.i0) // step)),
        -((i0 - part.i1) // step),
        max(0, -((j0 - part.j0) // step)),
        -((j0 - part.j1) // step),
        -((j0 - i0 - part.lo) // step),
        (part.hi - (j0 - i0)) // step,
    )


def resort(request: Request) -> Request | None:
    """Return the request on sorted positions, for a mask that is a region there; else None.

    Biases speak of positions, so a request with one is left alone.
    """
    mask = request.mask
    parts = mask.parts if isinstance(mask, And) else (mask,)
    dilated = [part for part in parts if isinstance(part, Dilated)]
    rest = [part for part in parts if not isinstance(part, Dilated)]
    if len(dilated) != 1 or request.bias:
        return None
    whole = And.of(*rest) if rest else Full()
    if not all(whole.is_region(q_len, kv_len) for q_len, kv_len in set(request.sequences)):
        return None
    return replace(request, mask=Resorted(dilated[0], whole))


def residue_order(request: Request) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """Return where the tokens of a sorted request come from, as ranges of each token axis.

    A dense layout sorts every batch row alike; a packed one sorts inside each sequence.
    """
    mask = request.mask
    if not isinstance(mask, Resorted):
        return (), ()
    sequences = request.sequences if request.seqlens is not None else request.sequences[:1]
    queries: list[range] = []
    keys: list[range] = []
    row = key = 0
    for q_len, kv_len in sequences:
        q_order, kv_order = mask.order(q_len, kv_len)
        queries += (range(r.start + row, r.stop + row, r.step) for r in q_order)
        keys += (range(r.start + key, r.stop + key, r.step) for r in kv_order)
        row, key = row + q_len, key + kv_len
    return tuple(queries), tuple(keys)


def restated(request: Request) -> Iterator[Request | Refusal]:
    """Yield the requests whose calls compute this one once its tokens are moved around them.

    Positions may be sorted, or heads folded into the batch. Each is a function of the request, so
    that a proof can make it again.
    """
    for way in (resort(request), folded(request)):
        if way is not None:
            yield way


def moves(request: Request, other: Request) -> tuple[int, int]:
    """Return the bytes that are moved around the calls of a restated request, by how many kernels.

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.empty(1, 64, 2, 16, device="meta")
    >>> plan = ak.plan(x, x, x, mask=Dilated(2), backend="emulated")
    >>> moves(plan.request, plan.in_order)
    (65536, 6)
    """
    query, key, value = (prod(shape) for shape in other.shapes())
    out = query // other.head_dim * other.value_dim
    if isinstance(other.mask, Folded):
        by_head = request.layout_of.pattern.startswith("b n ")
        tensors = [] if by_head and other.num_heads == 1 else [query, out]
        tensors += [] if by_head and key == prod(request.shapes()[1]) else [key, value]
        return 2 * request.dtype.itemsize * sum(tensors), len(tensors)
    # Beside these tensors, two of statistics.
    return 2 * request.dtype.itemsize * (query + key + value + out), 6
