"""A mask as FlexAttention takes it: a function per cell that reads small tables, and a `BlockMask`.

The tables say where the runs of allowed keys of each row start and stop. The function is the
same for all masks with equally many runs, so that they share one compiled kernel. Anything else
(a dense mask, a function, a row of many runs) is read from bits: one per cell is what a kernel
needs of a set that no formula gives.

`create_block_mask` evaluates a function on every cell and reduces. Here the tables say which
tiles a mask touches and which it fills; a run of keys costs its row two additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks import Mask, Rectangle
from attnkit.masks.trace import RowReader, mask_rows, region_rows
from attnkit.planner import Request

__all__ = ["BLOCK", "MaskMod", "Tables", "block_mask", "mask_mod", "request_tables", "tables_of"]

BLOCK = (128, 128)
"""Rows and keys of a tile: FlexAttention's own default."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Ints = NDArray[np.integer[Any]]
Tiles = NDArray[np.bool_]
Matrix = Region | RowReader
"""One score matrix: its region, or else what reads its rows."""

# Every number of runs is another kernel, so there are only these; rows of more are bits.
_RUNS = (1, 2, 4, 8)
_CELLS_AT_ONCE = 1 << 22


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
    tables = tables_of(mask, q_len, kv_len)
    return tables.block_mask(device, block, batch or mask.batches, heads)


def mask_mod(mask: Mask, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
    """Return a mask as FlexAttention's ``mask_mod(b, h, i, j)``, exact for every cell.

    >>> from attnkit import masks
    >>> fn = mask_mod(masks.SlidingWindow(2), 4, 4)
    >>> i, j = torch.arange(4)[:, None], torch.arange(4)[None, :]
    >>> fn(torch.tensor(0), torch.tensor(0), i, j).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    mask.check(q_len, kv_len)
    return tables_of(mask, q_len, kv_len).mask_mod(device)


@dataclass(frozen=True, eq=False)
class Tables:
    """The distinct score matrices of a mask: runs ``[m, runs, q_len]``, or else bits.

    Bit ``j % 32`` of word ``j // 32`` of row i is cell (i, j): ``[m, q_len, words]``. `group`
    ``[1 | b, 1 | h]`` says which matrix a batch element and head have.
    """

    q_len: int
    kv_len: int
    group: Ints
    start: Ints | None
    stop: Ints | None
    bits: Ints

    @property
    def shape(self) -> tuple[object, ...]:
        """What decides the code of the function: not the lengths, not the values."""
        runs = None if self.start is None else self.start.shape[1]
        return (runs, self.group.shape[0] > 1, self.group.shape[1] > 1)

    def mask_mod(self, device: torch.device | str) -> MaskMod:
        """Return the function that reads the tables, on a device."""
        _, per_batch, per_head = self.shape
        group, bits = (torch.from_numpy(table).to(device) for table in (self.group, self.bits))

        def matrix(b: Tensor, h: Tensor) -> Tensor | int:
            if not (per_batch or per_head):
                return 0
            return group[b if per_batch else 0, h if per_head else 0]

        if self.start is None or self.stop is None:

            def in_bits(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return ((bits[matrix(b, h), i, j >> 5] >> (j & 31)) & 1) != 0

            return in_bits
        start, stop = (torch.from_numpy(table).to(device) for table in (self.start, self.stop))
        count = start.shape[1]

        def in_runs(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            m = matrix(b, h)
            allowed = (start[m, 0, i] <= j) & (j < stop[m, 0, i])
            for k in range(1, count):
                allowed = allowed | ((start[m, k, i] <= j) & (j < stop[m, k, i]))
            return allowed

        return in_runs

    def block_mask(
        self,
        device: torch.device | str,
        block: tuple[int, int] = BLOCK,
        batch: int | None = None,
        heads: int | None = None,
    ) -> BlockMask:
        """Return the block mask on a device, for `batch` and `heads` if given."""
        numbers = range(int(self.group.max()) + 1)
        lists = [_lists(*self._tiles(number, block)) for number in numbers]
        group = torch.from_numpy(self.group).long()
        group = group.expand(batch or group.shape[0], heads or group.shape[1])
        joined: Any = (torch.stack(each)[group].to(device) for each in zip(*lists, strict=True))
        rest: Any = {"BLOCK_SIZE": block, "mask_mod": self.mask_mod(device)}
        return BlockMask((self.q_len, self.kv_len), *joined, **rest)

    def _tiles(self, number: int, block: tuple[int, int]) -> tuple[Tiles, Tiles]:
        """Return which tiles hold an allowed cell, and which nothing else: ``[rows, columns]``.

        A tile that reaches beyond the score matrix is never full, as in `create_block_mask`.
        """
        if self.start is None or self.stop is None:
            return self._tiles_of_bits(number, block)
        (bq, bkv), start, stop = block, self.start[number], self.stop[number]
        rows = np.broadcast_to(np.arange(self.q_len) // bq, start.shape)
        grid = (-(-self.q_len // bq), -(-self.kv_len // bkv))
        touched = _painted(grid, rows, start // bkv, -(-stop // bkv))
        # Runs of one row share no tile that both would cover.
        return touched > 0, _painted(grid, rows, -(-start // bkv), stop // bkv) == bq

    def _tiles_of_bits(self, number: int, block: tuple[int, int]) -> tuple[Tiles, Tiles]:
        """Read the cells of one row of tiles after the other."""
        (bq, bkv), columns = block, -(-self.kv_len // block[1])
        touched, full = [], []
        for i0 in range(0, self.q_len, bq):
            rows = self.bits[number, i0 : i0 + bq].view(np.uint8)
            cells = np.zeros((bq, columns * bkv), np.bool_)
            cells[: len(rows), : self.kv_len] = np.unpackbits(
                rows, axis=1, count=self.kv_len, bitorder="little"
            )
            tiles = cells.reshape(bq, columns, bkv)
            touched.append(tiles.any((0, 2)))
            full.append(tiles.all((0, 2)))
        return np.stack(touched), np.stack(full)


def _painted(grid: tuple[int, int], row: Ints, first: Ints, stop: Ints) -> NDArray[np.int64]:
    """Return how often each tile is in columns ``first <= c < stop`` of its row."""
    width, some = grid[1] + 1, first < stop
    begin, end = (
        np.bincount((row * width + column)[some], minlength=grid[0] * width)
        for column in (first, stop)
    )
    return np.cumsum((begin - end).reshape(grid[0], width), axis=1)[:, :-1]


def _lists(touched: Tiles, full: Tiles) -> tuple[Tensor, ...]:
    """Return the tiles in each row and in each column, in the order that `BlockMask` takes."""
    part, whole = torch.from_numpy(touched & ~full), torch.from_numpy(full)
    return (*_ordered(part), *_ordered(whole), *_ordered(part.T), *_ordered(whole.T))


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


# -- from masks to tables ----------------------------------------------------------------------


def tables_of(mask: Mask, q_len: int, kv_len: int) -> Tables:
    """Return the tables of a mask at these lengths."""

    def matrix(b: int, h: int) -> Matrix:
        known = mask.enclosure(q_len, kv_len, b, h)
        return known.inner if known.exact else mask_rows(mask, q_len, kv_len, b, h)

    heads = range(mask.heads or 1)
    every = [[matrix(b, h) for h in heads] for b in range(mask.batches or 1)]
    return _tables(every, q_len, kv_len)


def request_tables(request: Request) -> Tables:
    """Return the tables of a request; a packed batch is one block-diagonal sequence."""
    if request.seqlens is None:
        return tables_of(request.mask, request.q_len, request.kv_len)
    every = [_packed(request, h) for h in range(request.mask.heads or 1)]
    return _tables([every], request.q_len, request.kv_len)


def _packed(request: Request, head: int) -> Matrix:
    """Return the block-diagonal score matrix of a packed batch."""
    mask, planes = request.mask, request.matrices.planes
    plane = planes[head if len(planes) > 1 else 0]
    starts = list(zip(*request.token_starts, strict=True))[: request.batch]
    if all(known.exact for known in set(plane)):
        each = zip(plane, starts, strict=True)
        return Region.union([known.inner.shift(*start) for known, start in each])

    def read(i0: int, i1: int) -> Tensor:
        out = torch.zeros(i1 - i0, request.kv_len, dtype=torch.bool)
        for b, ((q0, k0), lengths) in enumerate(zip(starts, request.sequences, strict=True)):
            rows, keys = (max(i0, q0) - q0, min(i1 - q0, lengths[0])), (0, lengths[1])
            if rows[0] < rows[1]:
                at = Rectangle(rows, keys, *lengths, b if mask.batches else 0, head)
                place = slice(q0 + rows[0] - i0, q0 + rows[1] - i0)
                out[place, k0 : k0 + lengths[1]] = mask._read(at, "cpu")
        return out

    return read


def _tables(every: list[list[Matrix]], q_len: int, kv_len: int) -> Tables:
    """Return the tables of the matrices of each batch element and head, equal regions once."""
    places = {found: 0 for row in every for found in row}
    places = {found: number for number, found in enumerate(places)}
    group = np.array([[places[found] for found in row] for row in every], np.int32)
    if (group == group[:1]).all():
        group = group[:1]
    if (group == group[:, :1]).all():
        group = group[:, :1].copy()
    regions = [found for found in places if isinstance(found, Region)]
    most = max((len(strip.runs) for region in regions for strip in region.strips), default=0)
    if len(regions) < len(places) or most > _RUNS[-1]:
        readers = (region_rows(m, kv_len) if isinstance(m, Region) else m for m in places)
        bits = np.stack([_bits(read, q_len, kv_len) for read in readers])
        return Tables(q_len, kv_len, group, None, None, bits)
    count = next(n for n in _RUNS if n >= most)
    start, stop = np.stack([_ends(region, q_len, count) for region in regions], axis=1)
    return Tables(q_len, kv_len, group, start, stop, np.zeros((0, 0, 0), np.int32))


def _ends(region: Region, q_len: int, count: int) -> Ints:
    """Return where runs start and stop, ``[2, count, q_len]``; one that is not there is empty."""
    ends = np.zeros((2, count, q_len), np.int32)
    for i0, i1, runs in region.strips:
        down = np.arange(i1 - i0, dtype=np.int32)
        for k, (a, da, b, db) in enumerate(runs):
            ends[:, k, i0:i1] = a + da * down, b + db * down
    return ends


def _bits(read: RowReader, q_len: int, kv_len: int) -> Ints:
    """Read every row once, a few at a time."""
    words = -(-kv_len // 32)
    out = np.zeros((q_len, words), np.int32)
    height = max(1, _CELLS_AT_ONCE // max(1, kv_len))
    for i0 in range(0, q_len, height):
        i1 = min(i0 + height, q_len)
        cells = np.zeros((i1 - i0, words * 32), np.bool_)
        cells[:, :kv_len] = read(i0, i1).cpu().numpy()
        out[i0:i1] = np.packbits(cells, axis=1, bitorder="little").view("<i4")
    return out
