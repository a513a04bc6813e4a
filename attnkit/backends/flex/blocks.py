"""FlexAttention's `BlockMask` from a mask's rows and runs, without looking at cells.

`create_block_mask` evaluates a function on every cell and reduces. A region knows where each
run of allowed keys starts and stops, so which tiles it touches and which it fills follows from
the runs; what a mask costs here is what its block lists cost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnkit.backends.flex.planes import Bits, Plane, Planes, planes_of_mask
from attnkit.backends.flex.tables import Tables, mask_mod_of, tables_of
from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks import Mask

__all__ = ["BLOCK", "block_mask", "block_mask_of", "tile_states"]

BLOCK = (128, 128)
"""Rows and keys of a tile: FlexAttention's own default."""

Tiles = NDArray[np.bool_]


def block_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
    block: tuple[int, int] = BLOCK,
) -> BlockMask:
    """Return what ``create_block_mask(mask_mod, batch, heads, q_len, kv_len)`` returns.

    Equal in every tensor, for any mask of attnkit: all index lists ``[b, h, rows, columns]``
    with their tails, both ways round. `batch` and `heads` may be left out where the mask does
    not tell them apart; then the lists broadcast. The result's `mask_mod` is exact for any cell.

    Raises `CompositionError` for lengths, batch or heads that the mask does not fit.

    >>> from attnkit import masks
    >>> found = block_mask(masks.Causal() & masks.SlidingWindow(256), 1024, 1024)
    >>> found.kv_num_blocks[0, 0].tolist(), found.full_kv_num_blocks[0, 0].tolist()
    ([1, 1, 2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1])
    """
    mask.check(q_len, kv_len, batch or mask.batches, heads or mask.heads)
    if min(q_len, kv_len, *block) < 1:
        raise CompositionError(
            f"block_mask got {q_len} queries, {kv_len} keys and blocks of {block[0]} x {block[1]}; "
            "each is at least 1"
        )
    planes = planes_of_mask(mask, q_len, kv_len)
    tables = tables_of(planes).to(device)
    return block_mask_of(planes, tables, block, batch or mask.batches, heads)


def block_mask_of(
    planes: Planes,
    tables: Tables,
    block: tuple[int, int] = BLOCK,
    batch: int | None = None,
    heads: int | None = None,
) -> BlockMask:
    """Return the block mask of planes where their tables are, for `batch` and `heads` if given."""
    lists = [_lists(plane, planes.q_len, planes.kv_len, block) for plane in planes.each]
    group = torch.tensor(planes.group)
    group = group.expand(batch or group.shape[0], heads or group.shape[1])
    joined = (torch.stack(each)[group].to(tables.group.device) for each in zip(*lists, strict=True))
    lengths = (planes.q_len, planes.kv_len)
    return BlockMask(lengths, *_Lists._make(joined), BLOCK_SIZE=block, mask_mod=mask_mod_of(tables))


class _Lists(NamedTuple):
    """Tiles in each row and in each column, in the order in which `BlockMask` takes them."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def _lists(plane: Plane, q_len: int, kv_len: int, block: tuple[int, int]) -> _Lists:
    """Return the block lists of one score matrix."""
    touched, full = tile_states(plane, q_len, kv_len, block)
    part, whole = torch.from_numpy(touched & ~full), torch.from_numpy(full)
    return _Lists(*_ordered(part), *_ordered(whole), *_ordered(part.T), *_ordered(whole.T))


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row how many tiles are set, and all columns, those of set tiles first.

    The order is that of a stable descending sort, which is `create_block_mask`'s.
    """
    counts = tiles.sum(-1, keepdim=True)
    ahead = tiles.cumsum(-1)
    columns = torch.arange(tiles.shape[-1])
    places = torch.where(tiles, ahead - 1, counts + columns - ahead)
    indices = torch.empty_like(places, dtype=torch.int32)
    indices.scatter_(-1, places, columns.to(torch.int32).expand_as(places))
    return counts[:, 0].to(torch.int32), indices


def tile_states(
    plane: Plane, q_len: int, kv_len: int, block: tuple[int, int]
) -> tuple[Tiles, Tiles]:
    """Return which tiles hold an allowed cell, and which hold nothing else: ``[rows, columns]``.

    A tile that reaches beyond the score matrix is never full, as in `create_block_mask`.

    >>> from attnkit.geometry import Slice
    >>> touched, full = tile_states(Region.of(Slice(0, 6, 0, 6, hi=0)), 6, 6, (2, 2))
    >>> touched.astype(int).tolist(), full.astype(int).tolist()
    ([[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0, 0, 0], [1, 0, 0], [1, 1, 0]])
    """
    if isinstance(plane, Region):
        return _region_tiles(plane, q_len, kv_len, block)
    return _bit_tiles(plane, q_len, kv_len, block)


def _region_tiles(
    region: Region, q_len: int, kv_len: int, block: tuple[int, int]
) -> tuple[Tiles, Tiles]:
    """Intersect every run with every row of tiles, all at once.

    In a row of tiles a run touches the tiles between its first start and its last stop (its
    ends move by at most 1 per row, so it leaves no gap), and covers in each of its rows those
    between its last start and its first stop. A tile is full when the rows that cover it add
    up to its height: runs of one row share no tile that both would cover.
    """
    bq, bkv = block
    grid = (-(-q_len // bq), -(-kv_len // bkv))
    pieces = _pieces(region, bq)
    if pieces is None:
        return np.zeros(grid, np.bool_), np.zeros(grid, np.bool_)
    tile_row, rows, start, start_slope, stop, stop_slope = pieces
    last = rows - 1
    touched = _painted(grid, tile_row, start // bkv, -(-(stop + stop_slope * last) // bkv), None)
    covered = _painted(grid, tile_row, -(-(start + start_slope * last) // bkv), stop // bkv, rows)
    return touched > 0, covered == bq


def _pieces(region: Region, bq: int) -> NDArray[np.int64] | None:
    """Cut every run at the rows of tiles: ``[tile row, rows, start, slope, stop, slope]`` each."""
    flat = [(i0, i1, *run) for i0, i1, runs in region.strips for run in runs]
    if not flat:
        return None
    i0, i1, start, start_slope, stop, stop_slope = np.array(flat, np.int64).T
    first, count = i0 // bq, (i1 - 1) // bq - i0 // bq + 1
    which = np.repeat(np.arange(len(flat)), count)
    tile_row = first[which] + np.arange(len(which)) - (np.cumsum(count) - count)[which]
    top = np.maximum(i0[which], tile_row * bq)
    rows = np.minimum(i1[which], (tile_row + 1) * bq) - top
    down = top - i0[which]
    a, da, b, db = (end[which] for end in (start, start_slope, stop, stop_slope))
    return np.stack([tile_row, rows, a + da * down, da, b + db * down, db])


def _painted(
    grid: tuple[int, int],
    tile_row: NDArray[np.int64],
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
    weight: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """Add a weight (1 where none is given) to columns ``first <= c < stop`` of tile rows."""
    steps = np.zeros((grid[0], grid[1] + 1), np.int64)
    some = first < stop
    amount = np.ones_like(first) if weight is None else weight
    np.add.at(steps, (tile_row[some], first[some]), amount[some])
    np.subtract.at(steps, (tile_row[some], stop[some]), amount[some])
    return np.cumsum(steps, axis=1)[:, :-1]


def _bit_tiles(bits: Bits, q_len: int, kv_len: int, block: tuple[int, int]) -> tuple[Tiles, Tiles]:
    """Read the cells of one row of tiles after the other."""
    bq, bkv = block
    columns = -(-kv_len // bkv)
    touched, full = [], []
    for i0 in range(0, q_len, bq):
        rows = bits[i0 : i0 + bq].view(np.uint8)
        cells = np.zeros((bq, columns * bkv), np.bool_)
        cells[: len(rows), :kv_len] = np.unpackbits(rows, axis=1, count=kv_len, bitorder="little")
        tiles = cells.reshape(bq, columns, bkv)
        touched.append(tiles.any((0, 2)))
        full.append(tiles.all((0, 2)))
    return np.stack(touched), np.stack(full)
