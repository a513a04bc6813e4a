"""Families that are a whole set by themselves: tables of blocks, trees, neighborhoods of a grid.

Their parameters are read off the runs of a few rows. As in `masks.hulls` these are proposals:
`masks.naming` takes none whose region is not equal to the target's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import gcd

import numpy as np

from attnkit.geometry import Region
from attnkit.masks.base import Mask
from attnkit.masks.block_table import Blocks
from attnkit.masks.hulls import Cells
from attnkit.masks.neighborhood import Neighborhood
from attnkit.masks.tree import Tree

__all__ = ["wholes"]

_LEAST_BLOCK = 4  # every set is one of blocks of one cell
_MOST_TOKENS = 1 << 13

Row = tuple[tuple[int, int], ...]


def wholes(cells: Cells) -> Iterator[Mask]:
    """Propose masks of one family that may be all cells, no more and no less."""
    yield from _blocks(cells)
    yield from _trees(cells)
    yield from _neighborhoods(cells)


def _blocks(cells: Cells) -> Iterator[Mask]:
    """Propose tables of the largest blocks that rows and keys are cut into."""
    strips = [strip for region in cells.regions for strip in region.strips]
    rows = {row for i0, i1, _ in strips for row in (i0, i1)}
    keys = {end for _, _, runs in strips for a, da, b, db in runs for end in (a, b)[da : 2 - db]}
    q_block = gcd(*(row for row in rows if row < cells.q_len)) or cells.q_len
    kv_block = gcd(*(key for key in keys if key < cells.kv_len)) or cells.kv_len
    if min(q_block, kv_block) < _LEAST_BLOCK:
        return
    moves = any(db for _, _, runs in strips for _, _, _, db in runs)
    tables = [_table(region, cells, q_block, kv_block) for region in cells.regions]
    table = np.stack(tables)[:, None]
    for align in cells.aligns if moves else cells.aligns[:1]:
        yield Blocks(table, q_block, kv_block, moves, align, q_len=cells.q_len, kv_len=cells.kv_len)


def _table(
    region: Region, cells: Cells, q_block: int, kv_block: int
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Return which blocks have a key in their last row: it is in all rows, or is so first there."""
    found = np.zeros((-(-cells.q_len // q_block), -(-cells.kv_len // kv_block)), np.bool_)
    for k, allowed in enumerate(found):
        for a, b in region.row(min((k + 1) * q_block, cells.q_len) - 1):
            allowed[a // kv_block : -(-b // kv_block)] = True
    return found


def _trees(cells: Cells) -> Iterator[Mask]:
    """Propose trees behind all keys that there are more of than rows."""
    if 0 < cells.q_len <= min(cells.kv_len, _MOST_TOKENS):
        each = [_parents(region, cells.q_len, cells.kv_len) for region in cells.regions]
        found = [parents for parents in each if parents is not None]
        if len(found) == len(each):
            yield Tree(found[0] if len(found) == 1 else found, cells.kv_len - cells.q_len)


def _parents(region: Region, q_len: int, kv_len: int) -> list[int] | None:
    """Return for each token the one that sees the same but it; None where there is none."""
    before = kv_len - q_len
    rows = [region.row(i) for i in range(q_len)]
    known = {row: token for token, row in enumerate(rows)}
    known[((0, before),) if before else ()] = -1
    parents = []
    for token, row in enumerate(rows):
        rest = _without(row, before + token)
        parent = None if rest is None else known.get(rest)
        if parent is None:
            return None
        parents.append(parent)
    return parents


def _without(row: Row, key: int) -> Row | None:
    """Return runs without one key; None if it is in none."""
    for k, (a, b) in enumerate(row):
        if a <= key < b:
            left = [one for one in ((a, key), (key + 1, b)) if one[0] < one[1]]
            return (*row[:k], *left, *row[k + 1 :])
    return None


def _neighborhoods(cells: Cells) -> Iterator[Mask]:
    """Propose neighborhoods whose last token, at all borders, sees what the cells say."""
    size = cells.q_len
    if size != cells.kv_len or len(cells.regions) > 1 or size < 2:
        return
    seen = cells.regions[0].row(size - 1)
    grid = _grid(seen, size)
    if grid is None:
        return
    first = cells.regions[0].row(0)
    for causal in product((False, True), repeat=len(grid)):
        mask = Neighborhood([n for n, _ in grid], [kernel for _, kernel in grid], 1, causal)
        rows = mask.enclosure(size, size).inner
        if rows.row(0) == first and rows.row(size - 1) == seen:
            yield mask


def _grid(row: Row, size: int) -> tuple[tuple[int, int], ...] | None:
    """Return the length and the kernel of each axis of a grid whose last token sees a row."""
    if not row or row[-1][1] != size or len({b - a for a, b in row}) > 1:
        return None
    starts, kernels, steps = [a for a, _ in row], [row[0][1] - row[0][0]], [1]
    while len(starts) > 1:
        step = starts[-1] - starts[-2]
        count = next((k for k, near in enumerate(_gaps(starts)) if near != step), len(starts) - 1)
        kernels, steps = [*kernels, count + 1], [*steps, step]
        starts = starts[:: -(count + 1)][::-1]
    ends = (*steps[1:], size)
    if any(end % step for step, end in zip(steps, ends, strict=True)):
        return None
    sizes = [end // step for step, end in zip(steps, ends, strict=True)]
    fits = all(kernel <= own for kernel, own in zip(kernels, sizes, strict=True))
    grid = tuple(zip(sizes, kernels, strict=True))[::-1]
    return grid if fits and len(grid) <= 3 else None


def _gaps(starts: Sequence[int]) -> list[int]:
    """Return the distances between starts, from the last one on."""
    return [b - a for a, b in pairwise(starts)][::-1]
