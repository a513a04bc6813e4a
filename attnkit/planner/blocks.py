"""Where the sequences of a kernel call lie in the request; block-diagonal structure found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from attnkit.geometry import Region

__all__ = ["Block", "diagonal_blocks", "span", "tile_whole"]


@dataclass(frozen=True)
class Block:
    """A rectangle of the score matrix of batch element (or packed sequence) `batch`."""

    batch: int
    i0: int
    i1: int
    j0: int
    j1: int

    @property
    def sizes(self) -> tuple[int, int]:
        """``(q_len, kv_len)`` of the rectangle."""
        return self.i1 - self.i0, self.j1 - self.j0


def span(ranges: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the one range that ranges make up in order, so that a view will do; or None.

    >>> span([(2, 5), (5, 5), (5, 7)]), span([(2, 5), (6, 7)])
    ((2, 7), None)
    """
    filled = [one for one in ranges if one[0] < one[1]]
    if any(a[1] != b[0] for a, b in pairwise(filled)):
        return None
    return (filled[0][0], filled[-1][1]) if filled else (0, 0)


def tile_whole(batch: int, sequences: Sequence[tuple[int, int]]) -> tuple[Block, ...]:
    """Return one block per score matrix, each covering all of it."""
    return tuple(Block(b, 0, q, 0, kv) for b, (q, kv) in zip(range(batch), sequences, strict=True))


def diagonal_blocks(region: Region, q_len: int, kv_len: int, batch: int) -> tuple[Block, ...]:
    """Split a region into the finest chain of blocks down the diagonal that holds all of it.

    Rows and keys are covered without gaps and in order, as one packed call needs: rows that
    allow nothing get a block without keys, keys that nobody sees one without rows.

    >>> from attnkit import masks
    >>> packed = masks.Documents([2, 3]).region(5, 5)
    >>> [block.sizes for block in diagonal_blocks(packed, 5, 5, 0)]
    [(2, 2), (3, 3)]
    """
    out = []
    row = key = 0
    for i0, i1, j0, j1 in _components(region):
        if i0 > row:
            out.append(Block(batch, row, i0, key, key))
        if j0 > key:
            out.append(Block(batch, i0, i0, key, j0))
        out.append(Block(batch, i0, i1, j0, j1))
        row, key = i1, j1
    if row < q_len:
        out.append(Block(batch, row, q_len, key, key))
    if key < kv_len:
        out.append(Block(batch, q_len, q_len, key, kv_len))
    return tuple(out)


def _components(region: Region) -> list[tuple[int, int, int, int]]:
    """Return bounding rectangles of strips, joined until no two share a key or fall back.

    A strip one key wide down the diagonal may have taken in the first row of the block below
    it (a document of one token above a causal one), so its last row is tried apart.
    """
    chain: list[tuple[int, int, int, int]] = []
    apart: set[tuple[int, int, int, int]] = set()
    for i0, i1, runs in region.rows():
        diagonal = len(runs) == 1 and runs[0] == (runs[0][0], 1, runs[0][0] + 1, 1)
        cut = i1 - 1 if diagonal and i1 - i0 > 1 else i0
        if cut > i0:
            _append(chain, (i0, cut, runs[0][0], runs[0][0] + cut - i0))
            key = runs[0][0] + cut - i0
            tail = (cut, i1, key, key + 1)
            _append(chain, tail)
            if chain[-1] == tail:
                apart.add(tail)
            continue
        ends = (runs[0][0], runs[-1][2] + runs[-1][3] * (i1 - i0 - 1))
        _append(chain, (i0, i1, *ends))
    for k in range(len(chain) - 1, 0, -1):
        if chain[k] in apart:
            tail, before = chain.pop(k), chain[k - 1]
            chain[k - 1] = (before[0], tail[1], before[2], tail[3])
    return chain


def _append(chain: list[tuple[int, int, int, int]], one: tuple[int, int, int, int]) -> None:
    i0, i1, j0, j1 = one
    while chain and chain[-1][3] > j0:
        before = chain.pop()
        i0, j0, j1 = before[0], min(before[2], j0), max(before[3], j1)
    chain.append((i0, i1, j0, j1))
