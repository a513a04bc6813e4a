"""Rivals for masks whose rows all differ: rows in tiles, each with the keys that any of them sees.

A tile is a sequence of a few hundred rows and of the union of their keys, gathered, and a small
mask says which of its cells are allowed. Two calls read such masks:

- a packed call in mode 1 has one mask for all its sequences, of which each reads the upper left
  corner. So keys that some row does not see come first and those that all see last: tiles that
  differ in the number of the latter share a mask;
- in a dense call the tiles are batch elements with a mask each. They are of one size: a tile with
  fewer keys than the widest is given others, which its mask forbids.

Every row is in one tile, so nothing is merged. A mask has as many entries as the tiles have cells,
not as many as the score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import inf, prod
from typing import NamedTuple

import numpy as np

from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.kernel import AttenMask
from attnkit.planner.calls import Launch, bare_call
from attnkit.planner.packing import head_groups, kv_heads_of, most_bytes
from attnkit.planner.request import Request
from attnkit.planner.row_groups import MOST_PATTERNS, RowGroup, TileCosts
from attnkit.planner.sequences import Block
from attnkit.planner.tiled_rows import (
    Array,
    ColumnRuns,
    Tiles,
    ranges_of,
    row_runs,
    runs_in_rows,
)
from attnkit.progress import pulse

__all__ = ["tilings"]

_MOST_RUNS = 2**22
_HEAVY = 4  # rows that see so many times what most rows see are in tiles of their own
_MOST_SIZES = 3
_MOST_WIDTHS = 16
# What the contract takes in one packed call.
_MOST_SEQUENCES, _MOST_TOKENS = 2048, 1_000_000


def tilings(
    request: Request,
    most_mask: int,
    bound: float = inf,
    groups: Sequence[tuple[int, ...]] | None = None,
) -> Iterator[tuple[Launch, ...] | Refusal]:
    """Yield calls on tiles of rows that make up a request: with shared masks, and with one each.

    No mask has more than `most_mask` entries: tiles go to several calls before that. What is
    estimated to cost more than `bound`, in nanoseconds, is left out.
    """
    if request.bias or not request.matrices.exact:
        return
    groups = head_groups(request) if groups is None else groups
    regions = {k for heads in groups for k in request.matrices.regions(heads[0])}
    if not any(regions):
        return
    count = sum(map(runs_in_rows, regions))
    if count > _MOST_RUNS:
        reason = f"its rows have {count:,} runs of keys, and {_MOST_RUNS:,} are looked at"
        yield Refusal("tile-runs", reason, "tiles of rows")
        return
    widest = max(map(_widest, regions))
    if widest > _MOST_TOKENS:  # known before millions of keys are counted for each tile
        yield Refusal("length-limit", f"a row sees {widest:,} keys", "tiles of rows")
        return
    sides = [_HeadGroup(request, heads, most_mask) for heads in groups]
    for shared in (True, False):
        least = sum(side.least(shared) for side in sides)
        if least < bound:
            found = [side.calls(shared) for side in sides]
            launches = tuple(launch for some in found for launch in some or ())
            if launches and None not in found and _spares(request, launches, regions):
                yield launches


def _widest(region: Region) -> int:
    """Return how many keys a row sees at most."""
    ends = ((k.first, k.first + k.step * (k.i1 - k.i0 - 1)) for k in region.row_counts())
    return max(map(max, ends), default=0)


def _spares(request: Request, launches: Sequence[Launch], regions: Collection[Region]) -> bool:
    """Whether the masks have fewer entries than one for each of the different score matrices."""
    masks = [launch.call.atten_mask for launch in launches]
    least = min(
        (q_len * kv_len for q_len, kv_len in request.sequences if q_len * kv_len), default=0
    )
    return sum(mask.cells for mask in masks if mask is not None) < least * len(regions)


class _RowTile(NamedTuple):
    """Rows and keys of a score matrix, and which of their cells are allowed."""

    batch: int
    rows: Array
    keys: Array
    cells: ColumnRuns

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.rows), len(self.keys)

    @property
    def block(self) -> Block:
        return Block(self.batch, ranges_of(self.rows), ranges_of(self.keys))


@dataclass(frozen=True, eq=False)
class _HeadGroup:
    """The score matrices of some heads that have equal masks."""

    request: Request
    heads: tuple[int, ...]
    most_mask: int

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """The key heads that a call on these heads reads."""
        return kv_heads_of(self.request, self.heads)

    @cached_property
    def costs(self) -> TileCosts:
        """What tiles cost."""
        return TileCosts.of(self.request, len(self.heads), len(self.kv_heads))

    @cached_property
    def parts(self) -> list[list[RowGroup]]:
        """The rows of every batch element, those that see much apart; equal matrices are shared."""
        known: dict[tuple[Region, int, int], list[RowGroup]] = {}
        pairs = zip(
            self.request.matrices.regions(self.heads[0]), self.request.sequences, strict=True
        )
        keys = [(region, *sizes) for region, sizes in pairs]
        for key in keys:
            if key not in known:
                region, q_len, kv_len = key
                runs = row_runs(region, q_len)
                parts = filter(len, runs.parted(_HEAVY))
                known[key] = [RowGroup(runs, rows, kv_len, self.costs) for rows in parts]
        return [known[key] for key in keys]

    def least(self, shared: bool) -> float:
        """Return what the cheapest tiles cost, by estimate."""
        return self.costs.call + sum(rows.least(shared) for some in self.parts for rows in some)

    def calls(self, shared: bool) -> list[Launch] | None:
        """Return the calls on the cheapest tiles; None where they would be too many."""
        made: dict[RowGroup, list[_RowTile]] = {}
        tiles: list[_RowTile] = []
        for batch, some in enumerate(self.parts):
            for rows in some:
                if rows not in made:
                    made[rows] = list(_each(rows.tiles(shared)))
                tiles += (tile._replace(batch=batch) for tile in made[rows])
        return self._shared(tiles) if shared else self._apart(tiles)

    # -- masks for many tiles ------------------------------------------------------------------

    def _shared(self, tiles: list[_RowTile]) -> list[Launch] | None:
        """Return a packed call for each pattern, if these are few and none is too large."""
        alike: dict[bytes, list[_RowTile]] = {}
        for tile in tiles:
            alike.setdefault(tile.cells.pattern.key, []).append(tile)
        largest = max((prod(tile.sizes) for tile in tiles), default=0)
        if len(alike) > MOST_PATTERNS or largest > self.most_mask:
            return None
        return [
            self._packed(some) for every in alike.values() for some in _chunks(every, self._fits)
        ]

    def _fits(self, count: int, rows: int, keys: int, largest: int) -> bool:
        """Whether a packed call may have so much, with a mask as large as its largest tile."""
        limit, most = self.request.memory_limit, max(rows, keys)
        taken = most_bytes(self.request, (rows, keys), self.heads) + largest
        fits = limit is None or taken <= limit
        return fits and count <= _MOST_SEQUENCES and most <= _MOST_TOKENS

    def _packed(self, tiles: list[_RowTile]) -> Launch:
        """Return the packed call whose sequences are tiles with one pattern."""
        first = max(tiles, key=lambda tile: len(tile.keys))
        height, width = first.sizes
        pattern = first.cells.pattern
        whole = pattern.widened(int(first.cells.partial.sum()), width).region
        cut = {w: whole.cut((0, height), (0, w)) for w in {len(tile.keys) for tile in tiles}}
        ordered = [tile._replace(keys=_partial_first(tile)) for tile in tiles]
        targets = tuple(cut[len(tile.keys)] for tile in tiles)
        mask = AttenMask.full((height, width), (whole,))
        told = "one mask for all tiles"
        return self._launch("TND", ordered, targets, None if _is_full(first) else mask, told)

    # -- a mask for each tile ------------------------------------------------------------------

    def _apart(self, tiles: list[_RowTile]) -> list[Launch] | None:
        """Return dense calls whose batch elements are tiles of about the same size."""
        heights: dict[int, list[_RowTile]] = {}
        for tile in tiles:
            heights.setdefault(len(tile.rows), []).append(tile)
        out: list[Launch] = []
        for height, some in heights.items():
            ends = self._widths(height, sorted(len(tile.keys) for tile in some))
            for low, high in zip((0, *ends), ends, strict=False):
                own = [tile for tile in some if low < len(tile.keys) <= high]
                width = max(len(tile.keys) for tile in own)
                most = self._most(height, width)
                if not most:
                    return None
                out += (self._dense(own[k : k + most], width) for k in range(0, len(own), most))
        return out

    def _most(self, height: int, width: int) -> int:
        """Return how many tiles a dense call may have."""
        limit, most = self.request.memory_limit, self.most_mask // (height * width)
        if limit is None:
            return most
        taken = most_bytes(self.request, (height, width), self.heads) + height * width
        return min(most, limit // taken)

    def _widths(self, height: int, widths: list[int]) -> tuple[int, ...]:
        """Return the widths up to which tiles go to the same calls, the cheapest few."""
        side, costs = self.costs.chip.tile_kv, self.costs
        every = sorted({-(-w // side) * side for w in widths}, reverse=True)
        ends = every[:: -(-len(every) // _MOST_WIDTHS)][::-1]
        counts = np.diff(np.searchsorted(widths, [0, *ends], side="right")).tolist()

        def cost(chosen: tuple[int, ...]) -> float:
            homes = [next(w for w in chosen if w >= end) for end in ends]
            total = 0.0
            for width in chosen:
                tiles = sum(n for n, home in zip(counts, homes, strict=True) if home == width)
                calls = -(-tiles // max(1, self._most(height, min(width, widths[-1]))))
                total += tiles * costs.tile(height, width) + calls * costs.another
            return total

        options = (
            (*some, ends[-1])
            for n in range(min(_MOST_SIZES, len(ends)))
            for some in combinations(ends[:-1], n)
        )
        return min(options, key=cost)

    def _dense(self, tiles: list[_RowTile], width: int) -> Launch:
        """Return the dense call whose batch elements are tiles, with keys up to a width."""
        height = len(tiles[0].rows)
        known: dict[bytes, Region] = {}
        for tile in tiles:
            if tile.cells.key not in known:
                known[tile.cells.key] = tile.cells.region
        targets = tuple(known[tile.cells.key] for tile in tiles)
        lengths = self.request.sequences
        filled = [
            tile._replace(keys=_filled(tile.keys, width, lengths[tile.batch][1])) for tile in tiles
        ]
        if len(known) == 1:
            mask = AttenMask.full((height, width), targets[:1])
        else:
            mask = AttenMask.full((len(tiles), 1, height, width), targets)
        full = targets[0] == Region.full(height, width) and len(known) == 1
        return self._launch("BSND", filled, targets, None if full else mask, "a mask for each tile")

    def _launch(
        self,
        layout: str,
        tiles: Iterable[_RowTile],
        targets: tuple[Region, ...],
        mask: AttenMask | None,
        told: str,
    ) -> Launch:
        """Return the call whose sequences are tiles."""
        request, heads, kv_heads = self.request, self.heads, self.kv_heads
        blocks = tuple(tile.block for tile in tiles)
        call = bare_call(request, layout, blocks, (len(heads), len(kv_heads)))
        if mask is not None:
            call = replace(call, atten_mask=mask, sparse_mode=1)
        return Launch(
            "no mask" if mask is None else f"mode 1, {told}",
            call,
            blocks,
            targets,
            request.token_starts,
            heads=heads if len(heads) < request.num_heads else None,
            kv_heads=kv_heads,
        ).as_part()


def _each(tiles: Tiles) -> Iterator[_RowTile]:
    """Yield tiles one by one, of batch element 0."""
    for k in range(len(tiles)):
        pulse()  # a tile of a long text has many keys
        yield _RowTile(0, tiles.rows_of(k), tiles.keys_of(k), tiles.cells(k))


def _partial_first(tile: _RowTile) -> Array:
    """Return the keys of a tile, those that some row does not see first."""
    partial = tile.cells.partial
    return np.concatenate([tile.keys[partial], tile.keys[~partial]])


def _is_full(tile: _RowTile) -> bool:
    return not tile.cells.partial.any()


def _filled(keys: Array, width: int, kv_len: int) -> Array:
    """Return keys with others after them, up to a width: those that follow the last one first."""
    if len(keys) == width:
        return keys
    free = np.ones(kv_len, dtype=np.bool_)
    free[keys] = False
    others = np.flatnonzero(free)
    after = int(np.searchsorted(others, keys[-1]))
    return np.concatenate([keys, others[after:], others[:after]])[:width]


def _chunks(
    tiles: list[_RowTile], fits: Callable[[int, int, int, int], bool]
) -> Iterator[list[_RowTile]]:
    """Yield tiles in groups, as long as ``(count, rows, keys, largest tile)`` of them fit."""
    first = rows = keys = largest = 0
    for k, tile in enumerate(tiles):
        h, w = tile.sizes
        if k > first and not fits(k - first + 1, rows + h, keys + w, max(largest, h * w)):
            yield tiles[first:k]
            first, rows, keys, largest = k, 0, 0, 0
        rows, keys, largest = rows + h, keys + w, max(largest, h * w)
    yield tiles[first:]
