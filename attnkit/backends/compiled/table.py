"""Which keys the rows of a request read, as the kernel reads it: tables of int32.

A table holds the strips of some score matrices, and their rows in tiles. Heads and batch elements
with equal regions share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attnkit.masks import Enclosure
from attnkit.planner import Request
from attnkit.strips import Run, Strip

__all__ = ["TileTable", "table_of"]


@dataclass(frozen=True, eq=False)
class TileTable:
    """Tiles, strips and runs; positions are those of the tensors, and of the tables here.

    The score matrix of batch element b and head h is ``matrix[b * heads + h]``, and its tiles are
    those from ``first`` of it to that of the next. A tile is ``(row, rows, strip, end of strips)``,
    a strip ``(row, end of rows, run, end of runs)``, a run ``(start, slope, stop, slope)``.
    """

    matrix: Tensor
    first: Tensor
    tiles: Tensor
    strips: Tensor
    runs: Tensor


def table_of(request: Request, height: int) -> TileTable:
    """Return the table of a request, in tiles of at most `height` rows."""
    planes = request.matrices.planes
    parts: list[tuple[list[int], list[Strip]]] = []
    if request.seqlens is not None:
        queries, keys = request.token_starts
        origins = list(zip(queries, keys, strict=True))
        parts = [(list(queries), _placed(plane, origins)) for plane in planes]
        matrix = list(range(len(planes)))
    else:
        known = {mask.outer.strips: None for plane in planes for mask in plane}
        places = {strips: k for k, strips in enumerate(known)}
        parts = [([0, request.q_len], list(strips)) for strips in known]
        # [batch, plane], as heads lie inside of batch elements
        matrix = [places[mask.outer.strips] for row in zip(*planes, strict=True) for mask in row]
    heads = request.num_heads // len(planes)
    return _table([one for one in matrix for _ in range(heads)], parts, height)


def _placed(plane: Iterable[Enclosure], origins: list[tuple[int, int]]) -> list[Strip]:
    """Return the strips of packed sequences, where their tokens are."""
    strips = []
    for mask, (row, key) in zip(plane, origins, strict=False):
        for i0, i1, runs in mask.outer.strips:
            moved = tuple((a + key, da, b + key, db) for a, da, b, db in runs)
            strips.append(Strip(i0 + row, i1 + row, moved))
    return strips


def _table(matrix: list[int], parts: list[tuple[list[int], list[Strip]]], height: int) -> TileTable:
    tiles, first = [torch.empty(0, 4, dtype=torch.int64)], [0]
    strips: list[tuple[int, int, int, int]] = []
    runs: list[Run] = []
    for cuts, own in parts:
        # No tile holds rows of two sequences: what is not finite in one must not reach the other.
        row = torch.cat([torch.arange(a, b, height) for a, b in pairwise([0, *cuts])])
        bounds = torch.tensor([0, *cuts])
        end = torch.minimum(row + height, bounds[torch.searchsorted(bounds, row, right=True)])
        above = torch.tensor([strip.i1 for strip in own], dtype=torch.int64)
        below = torch.tensor([strip.i0 for strip in own], dtype=torch.int64)
        from_strip = torch.searchsorted(above, row, right=True) + len(strips)
        to_strip = torch.searchsorted(below, end) + len(strips)
        tiles.append(torch.stack([row, end - row, from_strip, to_strip], 1))
        first.append(first[-1] + len(row))
        for i0, i1, found in own:
            strips.append((i0, i1, len(runs), len(runs) + len(found)))
            runs += found
    return TileTable(
        torch.tensor(matrix, dtype=torch.int32),
        torch.tensor(first, dtype=torch.int32),
        torch.cat(tiles).int().contiguous(),
        torch.tensor(strips, dtype=torch.int32).view(-1, 4),
        torch.tensor(runs, dtype=torch.int32).view(-1, 4),
    )
