"""Counting the tiles of a set of strips, in time that follows the strips and not the tiles."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from math import gcd
from typing import NamedTuple

from attnkit.strips import Run, Strip, advance

__all__ = ["TileCount", "tile_rows"]


class TileCount(NamedTuple):
    """How many tiles hold only allowed, some allowed, and no allowed cells."""

    full: int
    partial: int
    empty: int


def tile_rows(
    strips: tuple[Strip, ...], bq: int, bkv: int, q_len: int, kv_len: int
) -> Iterator[tuple[int, int]]:
    """Yield (touched, full) for one row of tiles, or summed over several, from the top."""
    for _, group in groupby(_tile_pieces(strips, bq), key=lambda piece: piece.i0 // bq):
        pieces = list(group)
        rows = pieces[0].i1 - pieces[0].i0
        if rows > bq:  # several whole rows of tiles, so the only piece of its group
            yield _affine_rows(pieces[0].runs, rows // bq, bq, bkv, kv_len)
        else:
            yield _one_tile_row(pieces, bq, bkv, q_len, kv_len)


def _tile_pieces(strips: tuple[Strip, ...], bq: int) -> Iterator[Strip]:
    """Cut strips so that a piece stays in one row of tiles, or is several whole ones.

    The last whole row of tiles of a strip stays alone: see `_affine_rows`.
    """
    for i0, i1, runs in strips:
        first, last = -(-i0 // bq) * bq, (i1 // bq - 1) * bq
        cuts = sorted({i0, i1, *(row for row in (first, last, last + bq) if i0 < row < i1)})
        for a, b in pairwise(cuts):
            yield Strip(a, b, advance(runs, a - i0))


def _one_tile_row(
    pieces: list[Strip], bq: int, bkv: int, q_len: int, kv_len: int
) -> tuple[int, int]:
    """Count the touched and the full tiles of one row of tiles, given its strip pieces."""
    touched: list[tuple[int, int]] = []
    full: list[tuple[int, int]] | None = None
    for i0, i1, runs in pieces:
        n = i1 - i0 - 1
        here = []
        for a, da, b, db in runs:
            touched.append((a // bkv, -(-(b + db * n) // bkv)))
            stop = -(-b // bkv) if b >= kv_len else b // bkv
            here.append((-(-(a + da * n) // bkv), stop))
        met = [(max(p, r), min(q, s)) for p, q in full or () for r, s in here]
        full = here if full is None else [(p, q) for p, q in met if p < q]
    top = pieces[0].i0 // bq * bq
    whole = sum(p.i1 - p.i0 for p in pieces) == min(bq, q_len - top)
    covered, end = 0, -1
    for a, b in sorted(touched):
        covered += max(0, b - max(a, end))
        end = max(end, b)
    return covered, sum(max(0, b - a) for a, b in full or ()) if whole else 0


def _affine_rows(
    runs: tuple[Run, ...], count: int, bq: int, bkv: int, kv_len: int
) -> tuple[int, int]:
    """Count tiles over `count` whole rows of tiles inside one strip, in closed form.

    The first tile that run r touches is ``floor(start / bkv)`` in the block's first row, and
    so on; a moving end advances by `bq` keys per tile row. Over tile rows k = p + period * m
    every such floor is affine in m, so every count is a sum of max(0, affine) terms.
    The caller leaves the strip's last whole tile row out: there alone can a moving end
    reach `kv_len`, where a ragged border tile counts as full.
    """
    period = min(bkv // gcd(bq, bkv), count)
    step = period * bq // bkv if period < count else 0
    touched = full = 0
    for p in range(period):
        terms = len(range(p, count, period))
        previous: tuple[int, int] | None = None
        for a, da, b, db in runs:
            a, b = a + da * bq * p, b + db * bq * p
            low = (a // bkv, da * step)
            high = (-(-(b + db * (bq - 1)) // bkv), db * step)
            touched += _sum_positive(high[0] - low[0], high[1] - low[1], terms)
            if previous is not None:  # runs are ordered, so neighbours alone can share tiles
                touched -= _sum_positive(previous[0] - low[0], previous[1] - low[1], terms)
            previous = high
            inner = -(-b // bkv) if b >= kv_len else b // bkv
            first = -(-(a + da * (bq - 1)) // bkv)
            full += _sum_positive(inner - first, (db - da) * step, terms)
    return touched, full


def _sum_positive(first: int, step: int, terms: int) -> int:
    """Return the sum of ``max(0, first + step * m)`` for m = 0 ... terms - 1."""
    last = first + step * (terms - 1)
    if first <= 0 and last <= 0:
        return 0
    if first < 0 or last < 0:  # keep the positive end of the progression
        if step > 0:
            skip = -(first // step)
            first, terms = first + step * skip, terms - skip
        else:
            terms = first // -step + 1
        last = first + step * (terms - 1)
    return (first + last) * terms // 2
