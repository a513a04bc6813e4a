"""The distinct score matrices of a mask: regions where they are some, bits where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from attnkit.geometry import Region
from attnkit.masks import Mask
from attnkit.masks.trace import RowReader, mask_rows, region_rows
from attnkit.planner import Request

__all__ = ["Bits", "Plane", "Planes", "bits_of", "planes_of_mask", "planes_of_request"]

Bits = NDArray[np.int32]
"""Cells ``[q_len, words]``: bit ``j % 32`` of word ``j // 32`` of row i is cell (i, j)."""

Plane = Region | Bits

_CHUNK_CELLS = 1 << 22


@dataclass(frozen=True, eq=False)
class Planes:
    """Score matrices of ``q_len x kv_len``; batch element b and head h have ``group[b][h]``.

    `group` has one row where batch elements are alike, and one column where heads are.
    """

    q_len: int
    kv_len: int
    each: tuple[Plane, ...]
    group: tuple[tuple[int, ...], ...]

    @property
    def per_batch(self) -> bool:
        """Whether batch elements differ."""
        return len(self.group) > 1

    @property
    def per_head(self) -> bool:
        """Whether heads differ."""
        return len(self.group[0]) > 1

    @cached_property
    def most_runs(self) -> int | None:
        """The most runs of allowed keys that a row has; None where some plane is no region."""
        if any(not isinstance(plane, Region) for plane in self.each):
            return None
        strips = (s for plane in self.each if isinstance(plane, Region) for s in plane.strips)
        return max((len(strip.runs) for strip in strips), default=0)


def planes_of_mask(mask: Mask, q_len: int, kv_len: int) -> Planes:
    """Return the planes of a mask at these lengths."""

    def plane(b: int, h: int) -> Plane:
        known = mask.enclosure(q_len, kv_len, b, h)
        if known.exact:
            return known.inner
        return _bits(mask_rows(mask, q_len, kv_len, b, h), q_len, kv_len)

    return _collect(plane, q_len, kv_len, mask.batches or 1, mask.heads or 1)


def planes_of_request(request: Request) -> Planes:
    """Return the planes of a request; a packed batch is one block-diagonal sequence."""
    if request.seqlens is None:
        return planes_of_mask(request.mask, request.q_len, request.kv_len)

    def plane(b: int, h: int) -> Plane:
        return _packed(request, h)

    return _collect(plane, request.q_len, request.kv_len, 1, request.mask.heads or 1)


def bits_of(plane: Plane, q_len: int, kv_len: int) -> Bits:
    """Return a plane as bits."""
    return _bits(region_rows(plane, kv_len), q_len, kv_len) if isinstance(plane, Region) else plane


def _collect(
    plane: Callable[[int, int], Plane], q_len: int, kv_len: int, batches: int, heads: int
) -> Planes:
    each: list[Plane] = []
    places: dict[Region, int] = {}
    group = []
    for b in range(batches):
        row = []
        for h in range(heads):
            found = plane(b, h)
            place = places.setdefault(found, len(each)) if isinstance(found, Region) else len(each)
            if place == len(each):
                each.append(found)
            row.append(place)
        group.append(tuple(row))
    if len(set(group)) == 1:
        group = group[:1]
    if all(len(set(row)) == 1 for row in group):
        group = [row[:1] for row in group]
    return Planes(q_len, kv_len, tuple(each), tuple(group))


def _packed(request: Request, head: int) -> Plane:
    """Return the block-diagonal plane of a packed batch."""
    mask = request.mask
    starts = list(zip(*request.token_starts, strict=True))
    regions: dict[tuple[int, int, int], Region | None] = {}
    shifted: list[Region] = []
    for s, (q_len, kv_len) in enumerate(request.sequences):
        key = (q_len, kv_len, s if mask.batches else 0)
        if key not in regions:
            known = mask.enclosure(q_len, kv_len, key[2], head)
            regions[key] = known.inner if known.exact else None
        region = regions[key]
        if region is None:
            return _packed_bits(request, head, starts)
        shifted.append(region.shift(*starts[s]))
    return Region.union(shifted)


def _packed_bits(request: Request, head: int, starts: Sequence[tuple[int, int]]) -> Bits:
    cells: list[Bits] = []
    for s, (q_len, kv_len) in enumerate(request.sequences):
        read = mask_rows(request.mask, q_len, kv_len, s if request.mask.batches else 0, head)
        cells.append(_bits(_placed(read, starts[s][1], request.kv_len), q_len, request.kv_len))
    return np.concatenate(cells)


def _placed(read: RowReader, first: int, width: int) -> RowReader:
    """Return a reader of the same rows inside a wider matrix, from key `first` on."""

    def rows(i0: int, i1: int) -> torch.Tensor:
        inside = read(i0, i1)
        out = torch.zeros(i1 - i0, width, dtype=torch.bool)
        out[:, first : first + inside.shape[1]] = inside
        return out

    return rows


def _bits(read: RowReader, q_len: int, kv_len: int) -> Bits:
    """Read every row once, a few at a time."""
    words = -(-kv_len // 32)
    out = np.zeros((q_len, words), np.int32)
    height = max(1, _CHUNK_CELLS // max(1, kv_len))
    for i0 in range(0, q_len, height):
        i1 = min(i0 + height, q_len)
        cells = np.zeros((i1 - i0, words * 32), np.bool_)
        cells[:, :kv_len] = read(i0, i1).cpu().numpy()
        out[i0:i1] = np.packbits(cells, axis=1, bitorder="little").view("<i4")
    return out
