"""Grids of tokens: masks that say, axis by axis, which positions see each other.

The tokens of an image or a video stand row by row: position ``(y, x)`` of an H x W grid is token
``y * W + x``, the last axis fastest, as ``flatten`` and ``rearrange(x, "h w -> (h w)")`` have it.
A query sees a key where it sees it along every axis. So the mask of a grid is a product of small
masks, one for each axis, and its region is made of theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate, pairwise, product
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from attnkit.arguments import LARGEST, check_int
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, Strip
from attnkit.masks.base import Enclosure, Mask, Rectangle
from attnkit.masks.order import Order, carried
from attnkit.masks.trace import MOST_RUNS, paint
from attnkit.strips import Canonical, Run, advance

__all__ = ["GridMask", "check_per_axis", "check_shape", "grid_product", "per_axis"]

T = TypeVar("T", bool, int)

_MOST_AXES = 3

_Table = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, repr=False, eq=False)
class GridMask(Mask):
    """What masks of a grid share: tokens in row-major order, and a region for each axis.

    A family says `_axes`; the set is ``all((i[a], j[a]) in axes[a] for a in axes)``, i and j the
    coordinates of query and key.
    """

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def _axes(self) -> tuple[Region, ...]:
        """The square region of each axis alone."""

    @property
    def _parts(self) -> tuple[tuple[range, ...], ...]:
        """For each axis, positions that belong together: tiles, windows, residues; or nothing."""
        return ()

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """Part after part of the grid: what sees each other is in blocks then."""
        return self._order if (q_len, kv_len) == self.extent else None

    @cached_property
    def _order(self) -> Order | None:
        return grid_order(self._axes, self._parts, self.shape) if self._parts else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The tokens of the grid."""
        return prod(self.shape), prod(self.shape)

    @cached_property
    def _known(self) -> Enclosure:
        """The region; or, where it would be too large, what the first axes leave of everything."""
        axes = self._axes
        kept = next(n for n in range(len(axes), -1, -1) if _runs_of(axes[:n]) <= MOST_RUNS)
        region = grid_product(axes[:kept], self.shape[:kept])
        if kept == len(axes):
            return Enclosure(region, region)
        rest = prod(self.shape[kept:])
        return Enclosure(Region.empty(), _product(region, Region.full(rest, rest), rest))

    @cached_property
    def _inner_tables(self) -> tuple[_Table, ...]:
        """The cells of each axis alone, but for the first one, which may be long.

        Arrays, for a mask outlives the mode in which its first tensor is made.
        """
        return tuple(map(_drawn, self._axes[1:], self.shape[1:]))

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """The product of the axes, or a bound around it."""
        known = self._known
        if known.outer.fits(q_len, kv_len):
            return known
        whole = Region.full(q_len, kv_len)  # a cut may ask for fewer rows or keys than there are
        return Enclosure(known.inner & whole, known.outer & whole)

    def _read(self, at: Rectangle, device: torch.device | str | None = None) -> torch.Tensor:
        # The formula itself: a region of thousands of runs takes longer to paint.
        return self._cells(at, device)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        device = torch.get_default_device() if device is None else device
        (i0, i1), (j0, j1) = at.rows, at.keys
        rows, stride = torch.arange(i0, i1, device=device), prod(self.shape[1:])
        # Of the first axis, only what the rows and the keys lie in.
        (top, below), (first, stop) = (
            (a // stride, -(-b // stride)) for a, b in (at.rows, at.keys)
        )
        own = self._axes[0].cut((top, below), (first, stop))
        cells = paint(own, below - top, stop - first, "cpu").to(device)[rows // stride - top]
        for size, table in zip(self.shape[1:], self._inner_tables, strict=True):
            stride //= size
            seen = torch.from_numpy(table).to(device)[rows // stride % size]
            cells = (cells[:, :, None] & seen[:, None, :]).flatten(1)
        start = first * prod(self.shape[1:])
        return cells[:, j0 - start : j1 - start]


def _drawn(region: Region, size: int) -> _Table:
    cells = np.zeros((size, size), np.bool_)
    for i in range(size):
        for a, b in region.row(i):
            cells[i, a:b] = True
    return cells


# -- products ------------------------------------------------------------------------------


def grid_product(axes: Sequence[Region], shape: Sequence[int]) -> Region:
    """Return the region of a grid from the square region of each axis.

    >>> diagonal, all_of_2 = Region.from_rows([[(0, 1)], [(1, 2)]]), Region.full(2, 2)
    >>> grid_product([diagonal, all_of_2], (2, 2)).slices[0]
    Slice(i0=0, i1=2, j0=0, j1=2, lo=-1, hi=1)
    """
    if not axes:
        return Region.full(1, 1)
    whole, size = axes[-1], shape[-1]
    for region, own in zip(axes[-2::-1], shape[-2::-1], strict=True):
        whole, size = _product(region, whole, size), size * own
    return whole


def _product(outer: Region, inner: Region, size: int) -> Region:
    """Return the cells ``(i * size + u, j * size + v)``: (i, j) of `outer`, (u, v) of `inner`."""
    pieces = list(_pieces(inner, size))
    out = Canonical()
    for i0, i1, runs in outer.strips:
        for i in range(i0, i1):
            keys = advance(runs, i - i0)
            for u0, u1, own, joins in pieces:
                out.add(i * size + u0, i * size + u1, _spread(keys, own, joins, size))
    return Region(tuple(out.strips))


def _pieces(inner: Region, size: int) -> Iterator[tuple[int, int, tuple[Run, ...], bool]]:
    """Cut strips where rows have both the first and the last key: their runs in two blocks join."""
    for i0, i1, runs in inner.strips:
        both = _both_ends(i1 - i0, runs, size)
        cuts = (0, both.start, both.stop, i1 - i0) if both else (0, i1 - i0)
        for u0, u1 in pairwise(cuts):
            if u0 < u1:
                yield i0 + u0, i0 + u1, advance(runs, u0), u0 in both


def _both_ends(rows: int, runs: tuple[Run, ...], size: int) -> range:
    """Return the rows of a strip, counted from its first one, that have both ends of the keys."""
    (a, da, _, _), (_, _, b, db) = runs[0], runs[-1]
    if a > 0 or (b < size and not db):
        return range(0)
    # Ends only move to the right: a moving start is at key 0 in the first row only.
    first = range(1 if da else rows)
    last = range(size - b, size - b + 1) if db else range(rows)
    return range(max(first.start, last.start), min(first.stop, last.stop))


def _spread(keys: tuple[Run, ...], own: tuple[Run, ...], joins: bool, size: int) -> tuple[Run, ...]:
    """Return the runs of one row in each of the blocks of keys that the row of the outer sees."""
    if joins and len(own) == 1:  # all keys of each block
        return tuple((a * size, 0, b * size, 0) for a, _, b, _ in keys)
    out: list[Run] = []
    for first, _, stop, _ in keys:
        for j in range(first, stop):
            at = j * size
            moved = [(a + at, da, b + at, db) for a, da, b, db in own]
            if joins and j > first:
                out[-1] = (*out[-1][:2], *moved.pop(0)[2:])
            out += moved
    return tuple(out)


def _runs_of(axes: Sequence[Region]) -> int:
    """Return how many runs a product has, or a few more."""
    *outer, inner = axes or [Region.full(1, 1)]
    return reduce(lambda runs, axis: runs * axis.area, outer, _count(inner))


def _count(region: Region) -> int:
    return sum(len(runs) for _, _, runs in region.strips)


# -- parts after each other ----------------------------------------------------------------


def grid_order(
    axes: Sequence[Region], parts: Sequence[Sequence[range]], shape: Sequence[int]
) -> Order | None:
    """Return the order that has the tokens of a grid part after part, each in row-major order.

    A part has positions of each axis. It may see any cells of itself, and all or none of another
    one; else there is no such order.

    >>> from attnkit.geometry import Slice
    >>> tiles = (range(0, 2), range(2, 4))
    >>> near = Region.stacked([Strip(0, 2, ((0, 0, 2, 0),)), Strip(2, 4, ((2, 0, 4, 0),))])
    >>> order = grid_order([Region.full(2, 2), near], [[range(0, 2)], tiles], (2, 4))
    >>> order.rows, order.region.area
    ((range(0, 2), range(4, 6), range(2, 4), range(6, 8)), 32)
    """
    groups = list(product(*parts))
    ends = list(accumulate((prod(map(len, group)) for group in groups), initial=0))
    lines = tuple(line for group in groups for line in _lines_of(group, shape))
    pairs = [list(_pairs(region, own)) for region, own in zip(axes, parts, strict=True)]
    known: dict[tuple[Region, ...], Region] = {}
    blocks: dict[int, list[tuple[int, int]]] = {}
    inside: list[Region] = []
    for chosen in product(*pairs):
        g = _number((one.rows for one in chosen), parts)
        h = _number((one.keys for one in chosen), parts)
        own = tuple(one.cells for one in chosen if one.cells is not None)
        if all(one.full for one in chosen):
            blocks.setdefault(g, []).append((ends[h], ends[h + 1]))
        elif g == h and len(own) == len(chosen):
            if own not in known:
                known[own] = grid_product(own, [len(one) for one in groups[g]])
            inside.append(known[own].shift(ends[g], ends[g]))
        else:
            return None
    strips = (Strip(ends[g], ends[g + 1], _joined(blocks[g])) for g in sorted(blocks))
    return Order(lines, lines, Region.stacked(strips) | Region.union(inside))


def _joined(blocks: list[tuple[int, int]]) -> tuple[Run, ...]:
    """Return blocks of keys as runs: those that touch are one."""
    found: list[tuple[int, int]] = []
    for a, b in sorted(blocks):
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return tuple((a, 0, b, 0) for a, b in found)


def _lines_of(group: Sequence[range], shape: Sequence[int]) -> Iterator[range]:
    """Yield the tokens of a part of a grid in order, as ranges along the last axis."""
    *lead, last = group
    for at in product(*lead):
        row = reduce(lambda n, step: n * step[1] + step[0], zip(at, shape, strict=False), 0)
        start = row * shape[-1]
        yield range(start + last.start, start + last.stop, last.step)


class _Near(NamedTuple):
    """Parts of an axis that see each other, by number: which cells, if a region, and if all."""

    rows: int
    keys: int
    cells: Region | None
    full: bool


def _pairs(axis: Region, parts: Sequence[range]) -> Iterator[_Near]:
    """Yield the parts of an axis that see each other."""
    for (a, rows), (b, keys) in product(enumerate(parts), repeat=2):
        cells = carried(axis, rows, keys)
        if cells is None or cells:
            full = cells is not None and cells.area == len(rows) * len(keys)
            yield _Near(a, b, cells, full)


def _number(at: Iterable[int], parts: Sequence[Sequence[range]]) -> int:
    """Return the number of a part of the grid from those of its axes."""
    return reduce(lambda n, step: n * len(step[1]) + step[0], zip(at, parts, strict=True), 0)


# -- arguments -----------------------------------------------------------------------------


def check_shape(owner: str, shape: object) -> tuple[int, ...]:
    """Return the sizes of a grid, one to three of them; an int is a grid of one axis.

    >>> check_shape("Neighborhood", 8), check_shape("Neighborhood", [4, 8])
    ((8,), (4, 8))
    """
    given = (shape,) if isinstance(shape, int) and not isinstance(shape, bool) else shape
    if not isinstance(given, tuple | list):
        raise CompositionTypeError(
            f"{owner} shape={shown(shape)} is of type {type(shape).__name__}; it is the sizes of "
            "the grid: (height, width), (frames, height, width), or the length of a line"
        )
    if not 1 <= len(given) <= _MOST_AXES:
        raise CompositionError(
            f"{owner} shape={shown(shape)} has {len(given)} axes; a grid has 1, 2 or 3: (height, "
            "width), (frames, height, width), or the length of a line"
        )
    sizes = tuple(check_int(f"{owner} shape[{k}]", size, 1) for k, size in enumerate(given))
    if prod(sizes) > LARGEST:
        raise CompositionError(f"{owner} shape={shown(shape)} has more tokens than int64 counts")
    return sizes


def check_per_axis(
    name: str, given: object, shape: tuple[int, ...], check: Callable[[str, object], T]
) -> T | tuple[T, ...]:
    """Return what is said once for all axes or once for each; one value where all are alike.

    >>> check_per_axis("kernel", [3, 3], (8, 8), lambda name, value: check_int(name, value, 1))
    3
    """
    if not isinstance(given, tuple | list):
        return check(name, given)
    if len(given) != len(shape):
        raise CompositionError(
            f"{name}={shown(given)} has {len(given)} entries, and the grid {shown(shape)} has "
            f"{len(shape)} axes; give one value for all of them, or one for each"
        )
    each = tuple(check(f"{name}[{k}]", one) for k, one in enumerate(given))
    return each[0] if len(set(each)) == 1 else each


def per_axis(value: T | tuple[T, ...], shape: tuple[int, ...]) -> tuple[T, ...]:
    """Return the value of each axis.

    >>> per_axis(3, (8, 8)), per_axis((1, 3), (8, 8))
    ((3, 3), (1, 3))
    """
    return value if isinstance(value, tuple) else (value,) * len(shape)
