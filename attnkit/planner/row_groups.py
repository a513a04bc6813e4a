"""Which rows make a tile: some orders and heights, weighed by samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf, prod
from typing import NamedTuple

import numpy as np

from attnkit.planner.lattice import axes_of, in_patches, patches
from attnkit.planner.price import Chip, chip
from attnkit.planner.request import Request
from attnkit.planner.tiled_rows import Array, RowRuns, Tiles
from attnkit.progress import pulse

__all__ = ["MOST_PATTERNS", "RowGroup", "TileCosts"]

MOST_PATTERNS = 4
"""Masks that tiles share: each is a call of its own."""

_HEIGHTS = (64, 128, 256, 512)
_PATCHES = 3
_SAMPLES = 8
# The kernels that gather keys and values; and those that gather and write rows.
_OF_KEYS, _OF_ROWS = 2, 4


class TileCosts(NamedTuple):
    """What tiles cost in a call, by estimate; what is the same for all tilings is left out."""

    chip: Chip
    flops: int
    heads: int
    row_bytes: int
    key_bytes: int

    @classmethod
    def of(cls, request: Request, heads: int, kv_heads: int) -> TileCosts:
        """Return the costs of calls on so many heads."""
        both = request.head_dim + request.value_dim
        moved = 2 * both * request.dtype.itemsize
        return cls(chip(), 2 * heads * both, heads, heads * moved, kv_heads * moved)

    def tile(self, rows: int, keys: int) -> float:
        """Return the nanoseconds of one tile: its products, its mask, and the copy of its keys."""
        cells = -(-rows // self.chip.tile_q) * -(-keys // self.chip.tile_kv)
        cells *= self.chip.tile_q * self.chip.tile_kv
        moved = self.heads * cells + rows * keys + self.key_bytes * keys
        return self.chip.nanoseconds(self.flops * cells, moved, 0)

    def moved(self, rows: int) -> float:
        """Return what it costs to gather rows that are elsewhere, and to write them back."""
        return self.chip.nanoseconds(0, self.row_bytes * rows, 0, _OF_ROWS)

    @property
    def call(self) -> float:
        """What a call costs at least."""
        return self.chip.nanoseconds(0, 0, 1, _OF_KEYS)

    @property
    def another(self) -> float:
        """What one call more costs."""
        return self.chip.nanoseconds(0, 0, 1, _OF_KEYS + _OF_ROWS)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Some rows of a score matrix, and the ways to put them into tiles."""

    runs: RowRuns
    rows: Array
    kv_len: int
    costs: TileCosts

    @cached_property
    def choices(self) -> list[tuple[Array, int]]:
        """The rows in some orders, and how many make a tile."""
        found = [(self.rows, height) for height in _HEIGHTS if height < 2 * len(self.rows)]
        axes = axes_of(self.runs, self.rows)
        if axes:
            options = [
                (count * self.costs.tile(prod(sizes), keys), sizes)
                for sizes, count, keys in patches(axes, self.kv_len)
            ]
            found += (
                (in_patches(self.rows, axes, sizes), prod(sizes))
                for _, sizes in sorted(options)[:_PATCHES]
            )
        return found or [(self.rows, _HEIGHTS[0])]

    @cached_property
    def estimates(self) -> list[tuple[float, float]]:
        """What each choice costs with shared masks and with one for each tile, by samples."""
        return [self._estimate(*choice) for choice in self.choices]

    def _estimate(self, rows: Array, height: int) -> tuple[float, float]:
        pulse()
        whole, taken = len(rows) // height, rows
        if whole > _SAMPLES:
            tops = (2 * np.arange(_SAMPLES) + 1) * whole // (2 * _SAMPLES) * height
            taken = rows[(tops[:, None] + np.arange(height)).reshape(-1)]
        tiles = Tiles.of(self.runs, taken, height)
        cost = sum(self.costs.tile(*sizes) for sizes in tiles.sizes) * len(rows) / len(taken)
        if rows is not self.rows:  # these are where the call has them
            cost += self.costs.moved(len(rows))
        patterns = {tiles.cells(k).pattern.key for k in range(len(tiles))}
        return (cost if len(patterns) <= MOST_PATTERNS else inf), cost

    def least(self, shared: bool) -> float:
        """Return what the cheapest choice costs."""
        return min(pair[not shared] for pair in self.estimates)

    def tiles(self, shared: bool) -> Tiles:
        """Return the cheapest tiles."""
        costs = [pair[not shared] for pair in self.estimates]
        return Tiles.of(self.runs, *self.choices[costs.index(min(costs))])
