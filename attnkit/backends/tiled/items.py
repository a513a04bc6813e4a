"""What the rows of a lane do: from the strips of a region to blocks and whole pieces.

Rows are cut where the key runs jump (documents, chunks) and then into blocks of equal height;
a block's keys are the union of its rows' runs. Inside a strip whose runs all move alike, one
block serves for all its repetitions, so that a long window costs as little to plan as a short one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from attnkit.backends.tiled.columns import (
    Known,
    RunsOfRows,
    Span,
    chunks_of,
    pattern_of,
    span_around,
)
from attnkit.backends.tiled.schedule import KeyChunk, RowBlock, Whole
from attnkit.geometry import Strip
from attnkit.strips import advance, seen_spans

__all__ = ["Traits", "items_of"]

# Measured on two AVX-512 cores, see benchmarks/attention.py: a step costs as much as so many cells.
STEP_CELLS = 24 * 1024
# Heights of blocks and what a cell costs in each: lower ones compute fewer masked cells, higher
# ones feed the products better.
HEIGHTS = {64: 1.19, 128: 1.04, 256: 1.0}
# Torch's fused kernel computes causal squares faster than blocks do where they are this small,
# as one call, or have full tiles; and rows with keys before them, as two, from `LARGE` rows on.
SMALL, LARGE = 256, 1024
# Its tiles are this low at least, higher from `MIDDLE_TILES` rows on, and as high as can be from
# `FULL_TILES`.
LOWEST_TILE, MIDDLE_TILES, FULL_TILES = 32, 192, 768
# What a cell costs there under a pattern, which is made and added to the scores.
PATTERN = 1.15
# A run that jumps by more keys than this between two rows starts a new block, unless that is a
# small part of the keys that both rows see.
JUMP = 32


class Traits(NamedTuple):
    """What of a request and a lane, beside its region, shapes the blocks.

    Where `alike` is False, what is done to the scores differs from one repetition of a block to
    the next. `wholes` allows pieces on torch's fused kernel, `patterns` small masks there,
    `merges` the sum of two of its outputs, `causal` its causal squares. `seen` are the ranges of
    keys that some row sees; `matrices` counts the score matrices that share the blocks.
    """

    alike: bool
    wholes: bool = False
    patterns: bool = True
    merges: bool = False
    causal: bool = False
    q_len: int = 0
    seen: tuple[Span, ...] = ()
    matrices: int = 1


def items_of(
    strips: tuple[Strip, ...], traits: Traits, known: Known
) -> tuple[RowBlock | Whole, ...]:
    """Return the items of a lane whose region has these strips, in the order of their rows.

    `known` are chunks that lanes of one schedule share.
    """
    items: list[RowBlock | Whole] = []
    for segment in _segments(strips):
        items += _wholes(segment, traits) or _even_blocks(segment, traits, known)
    return tuple(_merge_small(_repeat(items, traits.alike), strips, traits, known))


def _segments(strips: Iterable[Strip]) -> Iterator[list[Strip]]:
    """Split strips where rows are missing or the span of keys jumps."""
    segment: list[Strip] = []
    for strip in strips:
        if segment and _jumps(segment[-1], strip):
            yield segment
            segment = []
        segment.append(strip)
    if segment:
        yield segment


def _jumps(above: Strip, below: Strip) -> bool:
    rows = above.i1 - above.i0
    first, last = above.runs[0], above.runs[-1]
    keys = min(
        sum(b - a + (db - da) * (rows - 1) for a, da, b, db in above.runs),
        sum(b - a for a, _, b, _ in below.runs),
    )
    reach = max(JUMP, keys // 8)
    # A tiny document beside a large one is a piece by itself; `_merge_small` joins what is dearer.
    last_key = last[2] + last[3] * (rows - 1)
    apart = last_key <= below.runs[0][0] and max(_wide(above), _wide(below)) > 2 * JUMP
    return (
        apart
        or above.i1 != below.i0
        or abs(first[0] + first[1] * rows - below.runs[0][0]) > reach
        or abs(last[2] + last[3] * rows - below.runs[-1][2]) > reach
    )


def _wide(strip: Strip) -> int:
    """Return how many keys some row of a strip reaches over."""
    a, _, b, db = strip.runs[-1]
    return b + db * (strip.i1 - strip.i0 - 1) - a


def _wholes(segment: Sequence[Strip], traits: Traits) -> list[Whole]:
    """Return a segment as calls of torch's fused kernel, where they compute it faster."""
    if not traits.wholes:
        return []
    first, last = segment[0].i0, segment[-1].i1
    wholes = [_whole(strip, traits) for strip in segment]
    plain = [whole for whole in wholes if whole is not None]
    if len(segment) > 1 or len(segment[0].runs) > 1 or not plain:
        small = _masked_whole(segment, first, last - first, traits)
        if small is not None:
            return [small]
    return [] if len(plain) < len(wholes) or _low(plain, last - first, traits) else plain


def _low(wholes: Sequence[Whole], rows: int, traits: Traits) -> bool:
    """Whether the kernel's tiles are low in most rows of a segment: blocks feed products better."""
    low = [w for w in wholes if not w.causal and w.rows < MIDDLE_TILES and w.keys > SMALL]
    return rows < traits.q_len and 2 * sum(w.rows for w in low) > rows


def _whole(strip: Strip, traits: Traits) -> Whole | None:
    i0, i1, ((a, da, b, db), *more) = strip
    rows = i1 - i0
    if more or _rounds_more(rows, traits) or _lonely(strip):
        return None
    if (da, db) == (0, 0):
        return Whole(i0, rows, a, b - a)
    if (da, db) != (0, 1) or not traits.causal:
        return None
    before = b - a - 1
    # In 16 bits the kernel is fast at every size, but its output is rounded: no sums of two.
    if before and not (traits.merges and rows >= LARGE):
        return None
    if rows <= SMALL or rows >= FULL_TILES or not traits.merges:
        return Whole(i0, rows, a + before, rows, True, before=before)
    return None


def _lonely(strip: Strip) -> bool:
    """Whether many rows see one and the same key, and nothing else.

    Their scores have no gradient. Torch's kernel leaves what rounding makes of it, and over
    many rows that adds up in the key's.
    """
    i0, i1, ((a, da, b, db), *more) = strip
    return i1 - i0 > 1 and not more and b - a == 1 and (da, db) == (0, 0)


def _rounds_more(rows: int, traits: Traits) -> bool:
    """Whether torch's kernel would round 16-bit gradients more often here than on all rows.

    It adds them up tile by tile in 16 bits, and its tiles are low where rows are few.
    """
    return not traits.merges and LOWEST_TILE < rows < FULL_TILES and rows != traits.q_len


def _masked_whole(strips: Sequence[Strip], row: int, rows: int, traits: Traits) -> Whole | None:
    """Return rows over all of their keys as one small masked call, if they are few."""
    if not (traits.wholes and traits.patterns) or rows > SMALL or _rounds_more(rows, traits):
        return None
    if any(map(_lonely, strips)):
        return None
    pieces = _runs_of_rows(strips, row, rows)
    start = min(runs[0][0] for _, _, runs in pieces)
    stop = max(runs[-1][2] + runs[-1][3] * (n - 1) for _, n, runs in pieces)
    if stop - start > SMALL or sum(n for _, n, _ in pieces) != rows:
        return None
    return Whole(row, rows, start, stop - start, pattern=pattern_of(pieces, rows, start, stop))


def _even_blocks(segment: Sequence[Strip], traits: Traits, known: Known) -> Iterator[RowBlock]:
    """Cut a segment into blocks of equal height."""
    first, last = segment[0].i0, segment[-1].i1
    height = _height(segment)
    parts = -(-(last - first) // height)
    if parts < 8:  # a short last block is a loss; among many it does not count
        height = min(height, -(-(last - first) // parts // 16) * 16)
    row, k = first, 0
    while row < last:
        while segment[k].i1 <= row:
            k += 1
        rows = min(height, last - row)
        count = _same_below(segment[k], row, rows, traits)
        block = _row_block(_runs_of_rows(segment[k:], row, rows), row, rows, traits, known)
        if count > 1:
            steps = segment[k].runs[0][1]
            chunks = tuple(
                c._replace(runs=tuple((a, b, steps * rows) for a, b, _ in c.runs))
                for c in block.chunks
            )
            block = block._replace(times=count, step=rows, chunks=chunks)
        yield block
        row += rows * count


def _height(segment: Sequence[Strip]) -> int:
    """Return the height of blocks at which a segment's cells cost least.

    A block of h rows computes on either side of a run what its end moves in h / 2 rows, on average.
    """
    cells = moves = 0.0
    ends: list[tuple[int, int]] = []
    for i0, i1, runs in segment:
        rows = i1 - i0
        for a, da, b, db in runs:
            cells += rows * (b - a + (db - da) * rows / 2)
            moves += rows * (da + db)
        moves += sum(
            abs(a - x) + abs(b - y) for (a, _, b, _), (x, y) in zip(runs, ends, strict=False)
        )
        ends = [(a + da * rows, b + db * rows) for a, da, b, db in runs]
    return min(HEIGHTS, key=lambda height: (cells + moves * height / 2) * HEIGHTS[height])


def _same_below(strip: Strip, row: int, rows: int, traits: Traits) -> int:
    """Return how many blocks from `row` on look alike, but for one shift of all their keys.

    Runs are widened by up to 64 keys, which must not meet the borders of what is seen.
    """
    runs = strip.runs
    if any(da != runs[0][1] or db != runs[0][1] for _, da, _, db in runs):
        return 1
    count = (strip.i1 - row) // rows
    if count > 1 and runs[0][1]:
        past = row - strip.i0
        first, last = runs[0][0] + past, runs[-1][2] + past
        if first < span_around(traits.seen, first)[0] + 64:
            return 1
        room = span_around(traits.seen, last - 1)[1] - 64 - last
        count = min(count, max(1, room // rows))
    return max(1, count)


def _row_block(pieces: RunsOfRows, row: int, rows: int, traits: Traits, known: Known) -> RowBlock:
    """Return the block of rows ``[row, row + rows)``, which have these runs."""
    return RowBlock(row, rows, 1, 0, chunks_of(pieces, rows, traits.seen, known))


def _runs_of_rows(strips: Sequence[Strip], row: int, rows: int) -> RunsOfRows:
    """Return the parts of the strips in rows ``[row, row + rows)``."""
    pieces = []
    for i0, i1, runs in strips:
        if i0 >= row + rows:
            break
        top = max(i0, row)
        if i1 > top:
            pieces.append((top - row, min(i1, row + rows) - top, advance(runs, top - i0)))
    return pieces


# -- sharing -----------------------------------------------------------------------------------


def _repeat(items: Iterable[RowBlock | Whole], alike: bool) -> list[RowBlock | Whole]:
    """Join neighbours that are equal but for a shift, such as documents of one length."""
    out: list[RowBlock | Whole] = []
    for item in items:
        apart = not out or (isinstance(item, Whole) and not alike)
        joined = None if apart else _as_one(out[-1], item)
        if joined is None:
            out.append(item)
        else:
            out[-1] = joined
    return out


def _as_one(above: RowBlock | Whole, below: RowBlock | Whole) -> RowBlock | Whole | None:
    """Return an item that repeats the one above once more, if the one below is that."""
    last = (above.times - 1) * above.step
    step = below.row - (above.row + last)
    if below.times > 1 or (above.times > 1 and step != above.step):
        return None
    if isinstance(above, Whole) and isinstance(below, Whole):
        alike = above._replace(row=0, key=0, times=1, step=0) == below._replace(row=0, key=0)
        moves = below.key - (above.key + last) == step
        return above._replace(times=above.times + 1, step=step) if alike and moves else None
    if not isinstance(above, RowBlock) or not isinstance(below, RowBlock):
        return None
    if below.rows != above.rows or len(above.chunks) != len(below.chunks):
        return None
    moved = [_moved(*pair, above.times) for pair in zip(above.chunks, below.chunks, strict=True)]
    chunks = tuple(chunk for chunk in moved if chunk is not None)
    if len(chunks) < len(moved):
        return None
    return above._replace(times=above.times + 1, step=step, chunks=chunks)


def _moved(above: KeyChunk, below: KeyChunk, count: int) -> KeyChunk | None:
    """Return the chunk with the steps that lead to `below`, if it is alike and moves evenly."""
    if above[1:] != below[1:] or len(above.runs) != len(below.runs):  # all but the runs
        return None
    runs = []
    for (a, b, step), (c, d, _) in zip(above.runs, below.runs, strict=True):
        move = c - (a + (count - 1) * step)
        if d - c != b - a or move < 0 or (count > 1 and move != step):
            return None
        runs.append((a, b, move))
    return above._replace(runs=tuple(runs))


def _merge_small(
    items: list[RowBlock | Whole], strips: tuple[Strip, ...], traits: Traits, known: Known
) -> Iterator[RowBlock | Whole]:
    """Put small neighbours into one piece where masked cells cost less than one more step."""
    held: RowBlock | Whole | None = None
    at = 0
    for item in items:
        if held is not None and held.times == item.times == 1:
            while strips[at].i1 <= held.row:
                at += 1
            joined = _union(strips, at, held, item, traits, known)
            if joined is not None:
                held = joined
                continue
        if held is not None:
            yield held
        held = item
    if held is not None:
        yield held


def _union(
    strips: tuple[Strip, ...],
    at: int,
    one: RowBlock | Whole,
    other: RowBlock | Whole,
    traits: Traits,
    known: Known,
) -> RowBlock | Whole | None:
    """Return two neighbours as one piece, if that is cheaper; their strips begin at `at`."""
    both = one.rows + other.rows
    if both > max(HEIGHTS) or one.row + one.rows != other.row:
        return None
    apart = _cost(one, traits) + _cost(other, traits)
    pieces = _runs_of_rows(strips[at : at + both], one.row, both)
    least = _least_cost(pieces, both, traits)
    if least >= apart:
        return None
    joined: RowBlock | Whole | None = None
    if least < STEP_CELLS:  # not known to be a block
        joined = _masked_whole(strips[at : at + both], one.row, both, traits)
    if joined is None:
        joined = _row_block(pieces, one.row, both, traits, known)
    return joined if _cost(joined, traits) < apart else None


def _least_cost(pieces: RunsOfRows, rows: int, traits: Traits) -> float:
    """Return what a block of these rows costs at least; 0 where that takes more than a look."""
    spans = seen_spans((0, n, runs) for _, n, runs in pieces)
    start, stop, keys = spans[0][0], spans[-1][1], sum(b - a for a, b in spans)
    wide = stop - start > SMALL or not (traits.wholes and traits.patterns)
    return rows * keys * traits.matrices + STEP_CELLS if wide else 0.0


def _cost(item: RowBlock | Whole, traits: Traits) -> float:
    """Return the time of an item, in score cells."""
    if isinstance(item, Whole):
        cells = item.rows * (item.keys + item.before) * traits.matrices
        return cells * (1.0 if item.pattern is None else PATTERN) + STEP_CELLS / 4
    cells = sum(chunk.width for chunk in item.chunks) * item.rows
    return cells * traits.matrices + STEP_CELLS * len(item.chunks)
