"""Planning: from a request's regions to blocks of query rows over key runs.

Rows are cut where the key runs jump (documents, chunks) and then into blocks of equal height;
a block's keys are the union of its rows' runs. Inside a strip whose runs all move alike, one
block stands for all its repetitions, so that a long window costs as little to plan as a short one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from attnkit.backends.numbers import masks_before_scale
from attnkit.backends.tiled.columns import Pieces, Span, chunks_of, pattern_of, span_around
from attnkit.backends.tiled.schedule import Block, Chunk, Lane, Schedule, Tile, Whole
from attnkit.backends.unseen import seen_spans
from attnkit.geometry import Region, Strip
from attnkit.masks import Enclosure
from attnkit.planner import Request

__all__ = ["schedule"]

# What the batch elements (or packed sequences) of a range of heads allow.
Plane = tuple[Enclosure, ...]

# Measured on two AVX-512 cores, see benchmarks/attention.py: a score tile is at most this large,
# with repetitions of a block, whose operands are copied, at most that; and a step costs as much as
# so many cells.
TILE_CELLS, REPEATED_CELLS = 1280 * 1024, 512 * 1024
STEP_CELLS = 24 * 1024
# Heights of blocks and what a cell costs in each: lower ones compute fewer masked cells, higher
# ones feed the products better.
HEIGHTS = {64: 1.19, 128: 1.04, 256: 1.0}
# Torch's fused kernel computes causal squares faster than blocks do where they are this small,
# as one call, or this large.
SMALL, LARGE = 256, 1024
# Its tiles are this low at least, and as high as can be from so many rows on.
LOWEST_TILE, FULL_TILES = 32, 768
# From this scale on torch's fused kernel is left alone.
HUGE_SCALE = 1024.0
# A run that jumps by more keys than this between two rows starts a new block, unless that is a
# small part of the keys that both rows see.
JUMP = 32


class Traits(NamedTuple):
    """What of a request, beside its regions, shapes the blocks.

    `matrices` counts the score matrices that share the blocks. Where `alike` is False, what is
    done to the scores differs from one repetition of a block to the next. `wholes` allows pieces
    on torch's fused kernel, `merges` the sum of two of its outputs, `causal` its causal squares.
    `seen` are the ranges of keys that some row sees.
    """

    q_len: int
    seen: tuple[Span, ...]
    matrices: int
    alike: bool
    wholes: bool
    merges: bool
    causal: bool


class Policy(NamedTuple):
    """What of a request shapes the blocks of every lane: see `Traits`."""

    alike: bool
    wholes: bool
    merges: bool
    causal: bool


@lru_cache(maxsize=256)
def schedule(request: Request, wholes: bool = True, apart: bool = False) -> Schedule:
    """Return the schedule of a request.

    `wholes=False` keeps torch's fused kernel out of it; `apart` gives every packed sequence a
    lane of its own, so that no tile holds keys of two.
    """
    policy = Policy(
        alike=not (request.bias or request.dropout),
        wholes=wholes and _fused_fits(request),
        merges=request.dtype in (torch.float32, torch.float64),
        causal=masks_before_scale(request.scale, torch.float32),
    )
    lanes: list[Lane] = []
    for heads, plane in _equal_heads(request.matrices.planes, request.num_heads):
        if request.seqlens is not None:
            lanes += _packed_lanes(request, plane, heads, policy, apart)
            continue
        for start, stop in _equal_stretches(plane):
            place = Lane((start, stop), heads, start, (0, 0), request.sequences[0], (), (), False)
            lanes.append(_lane(place, plane[start], policy))
    return Schedule(tuple(lanes))


def _fused_fits(request: Request) -> bool:
    """Whether torch's fused CPU kernel computes plain pieces of this request, and well."""
    plain = not (request.bias or request.dropout or request.softcap)
    # In bfloat16 a sink would round the kernel's output a second time.
    sink = request.sink and request.dtype not in (torch.float32, torch.float64)
    # Its float16 backward is many times slower than float32 blocks.
    half = request.dtype == torch.float16
    # Its backward makes weights from the statistics alone, which swallow the sum of a row there.
    huge = abs(request.scale) > HUGE_SCALE
    fits = plain and request.head_dim == request.value_dim
    return fits and not (sink or half or huge)


def _equal_stretches(plane: Plane) -> Iterator[tuple[int, int]]:
    """Yield the maximal ranges of neighbouring batch elements with one region."""
    starts = [b for b in range(len(plane)) if b == 0 or plane[b] != plane[b - 1]]
    yield from pairwise([*starts, len(plane)])


def _equal_heads(planes: Sequence[Plane], heads: int) -> Iterator[tuple[tuple[int, int], Plane]]:
    """Yield the maximal ranges of neighbouring heads with one plane; one plane serves all heads."""
    if len(planes) == 1:
        yield (0, heads), planes[0]
        return
    starts = [h for h in range(heads) if h == 0 or planes[h] != planes[h - 1]]
    for start, stop in pairwise([*starts, heads]):
        yield (start, stop), planes[start]


def _packed_lanes(
    request: Request,
    plane: Plane,
    heads: tuple[int, int],
    policy: Policy,
    apart: bool,
) -> list[Lane]:
    """Return one lane over all tokens; or one per sequence, where something is counted from it."""
    seqlens = request.seqlens
    if seqlens is None:
        return []
    origins = list(zip(seqlens.cu_q, seqlens.cu_kv, strict=True))[:-1]
    if not (apart or request.bias) and all(e.exact for e in set(plane)):
        regions = [
            known.outer.shift(q0, k0) for (q0, k0), known in zip(origins, plane, strict=True)
        ]
        place = Lane((0, 1), heads, 0, (0, 0), (request.q_len, request.kv_len), (), (), False)
        joined = Region(tuple(strip for region in regions for strip in region.strips))
        # Not joined where sequences meet: runs do not grow into the next one.
        seen = tuple(span for region in regions for span in seen_spans(region.strips))
        lane = _lane(place, Enclosure(joined, joined), policy, seen)
        return [lane._replace(mixes=_mixes(lane.items, request))]
    return [
        _lane(
            Lane((0, 1), heads, b, origin, lengths, (), (), False),
            plane[b],
            policy,
        )
        for b, (origin, lengths) in enumerate(zip(origins, request.sequences, strict=True))
    ]


def _lane(
    place: Lane, known: Enclosure, policy: Policy, seen: tuple[Span, ...] | None = None
) -> Lane:
    q_len, _ = place.lengths
    seen = tuple(seen_spans(known.outer.strips)) if seen is None else seen
    heads = place.heads[1] - place.heads[0]
    opaque = not known.exact
    batch = place.batches[1] - place.batches[0]
    if opaque:
        policy = Policy(alike=False, wholes=False, merges=False, causal=False)
    traits = Traits(q_len, seen, heads * batch, *policy)
    items = []
    for item in _items(known.outer.strips, traits):
        if isinstance(item, Block):
            if opaque:
                chunks = tuple(c._replace(patches=(), bare=True) for c in item.chunks)
                item = item._replace(chunks=chunks)
            tile = _tile(item, heads, 1 if opaque else batch)
            item = item._replace(tile=tile if traits.alike else tile._replace(repeats=1))
        items.append(item)
    blank = known.outer.empty_rows(q_len)
    strays = opaque or _strays(items, seen)
    return place._replace(items=tuple(items), blank=blank, opaque=opaque, strays=strays)


def _strays(items: Iterable[Block | Whole], seen: Sequence[Span]) -> bool:
    """Whether some item reads keys that no row sees."""
    spans: list[Span] = []
    for a, b in seen:  # those of neighbouring sequences are one range here
        if spans and spans[-1][1] == a:
            a = spans.pop()[0]
        spans.append((a, b))
    return any(
        not _inside(spans, a, b, step, item.times) for item in items for a, b, step in _reads(item)
    )


def _reads(item: Block | Whole) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of keys that an item reads, and how they move from repetition to the next."""
    if isinstance(item, Whole):
        yield item.key - item.before, item.key + item.keys, item.step
        return
    for chunk in item.chunks:
        yield from chunk.runs


def _inside(spans: Sequence[Span], a: int, b: int, step: int, times: int) -> bool:
    """Whether a run of keys lies in one of the ranges, in each of its repetitions."""
    last = (times - 1) * step
    if b + last <= span_around(spans, a)[1] and a >= span_around(spans, a)[0]:
        return True
    return times > 1 and all(
        _inside(spans, a + move, b + move, 0, 1) for move in range(0, last + 1, step or 1)
    )


def _mixes(items: Iterable[Block | Whole], request: Request) -> bool:
    """Whether some item of a packed batch reads keys of a sequence that is not its rows'."""
    rows, keys = request.token_starts
    for item in items:
        for repeat in range(item.times):
            row = item.row + repeat * item.step
            own = bisect_right(rows, row) - 1
            if row + item.rows > rows[own + 1]:
                return True
            for a, b, step in _reads(item):
                if a + repeat * step < keys[own] or b + repeat * step > keys[own + 1]:
                    return True
    return False


def _tile(block: Block, heads: int, batch: int) -> Tile:
    """Share products between heads first, then batch elements, then repetitions of the block."""
    cells = block.rows * max(chunk.width for chunk in block.chunks)
    room = max(2, TILE_CELLS // cells)
    if room < heads:
        share = _even_share(heads, room)
        return Tile(1, 1, share + share % 2)  # matrices are dealt out to an even number of cores
    room //= heads
    if room < batch:
        return Tile(_even_share(batch, room), 1, heads)
    repeats = REPEATED_CELLS // (cells * heads * batch)
    return Tile(batch, min(block.times, max(1, repeats)), heads)


def _even_share(total: int, most: int) -> int:
    """Return the smallest size of equal shares that needs no more shares than `most` does."""
    return -(-total // -(-total // most))


@lru_cache(maxsize=256)
def _items(strips: tuple[Strip, ...], traits: Traits) -> tuple[Block | Whole, ...]:
    items: list[Block | Whole] = []
    for segment in _segments(strips):
        items += _wholes(segment, traits) or _blocks(segment, traits)
    return tuple(_merge_small(_repeat(items), strips, traits))


# -- rows --------------------------------------------------------------------------------------


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
    return (
        above.i1 != below.i0
        or abs(first[0] + first[1] * rows - below.runs[0][0]) > reach
        or abs(last[2] + last[3] * rows - below.runs[-1][2]) > reach
    )


def _wholes(segment: Sequence[Strip], traits: Traits) -> list[Whole]:
    """Return a segment as calls of torch's fused kernel, where they compute it faster."""
    if not traits.wholes:
        return []
    first, last = segment[0].i0, segment[-1].i1
    if len(segment) > 1 or len(segment[0].runs) > 1:
        small = _masked_whole(segment, first, last - first, traits)
        if small is not None:
            return [small]
    wholes = []
    for strip in segment:
        whole = _whole(strip, traits) if len(strip.runs) == 1 else None
        if whole is None:
            small = _masked_whole(segment, first, last - first, traits)
            return [small] if small is not None else []
        wholes.append(whole)
    return [] if _low(wholes, last - first, traits) else wholes


def _low(wholes: Sequence[Whole], rows: int, traits: Traits) -> bool:
    """Whether the kernel's tiles are low in most rows of a segment: blocks feed products better."""
    low = [w for w in wholes if not w.causal and w.rows < FULL_TILES and w.keys > SMALL]
    return rows < traits.q_len and 2 * sum(w.rows for w in low) > rows


def _whole(strip: Strip, traits: Traits) -> Whole | None:
    i0, i1, ((a, da, b, db),) = strip
    rows = i1 - i0
    if _rounds_more(rows, traits) or _lonely(strip):
        return None
    if (da, db) == (0, 0):
        return Whole(i0, rows, a, b - a)
    if (da, db) != (0, 1) or not traits.causal:
        return None
    before = b - a - 1
    # In 16 bits the kernel is fast at every size, but its output is rounded: no sums of two.
    if before and not (traits.merges and rows >= LARGE):
        return None
    if rows <= SMALL or rows >= LARGE or not traits.merges:
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
    if not traits.wholes or rows > SMALL or _rounds_more(rows, traits):
        return None
    if any(map(_lonely, strips)):
        return None
    pieces = _pieces(strips, row, rows)
    start = min(runs[0][0] for _, _, runs in pieces)
    stop = max(runs[-1][2] + runs[-1][3] * (n - 1) for _, n, runs in pieces)
    if stop - start > SMALL or sum(n for _, n, _ in pieces) != rows:
        return None
    return Whole(row, rows, start, stop - start, pattern=pattern_of(pieces, rows, start, stop))


def _blocks(segment: Sequence[Strip], traits: Traits) -> Iterator[Block]:
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
        block = _block(segment[k:], row, rows, traits)
        if count > 1:
            steps = _steps(segment[k])
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


def _steps(strip: Strip) -> int:
    return strip.runs[0][1]


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


def _block(strips: Sequence[Strip], row: int, rows: int, traits: Traits) -> Block:
    """Return the block of rows ``[row, row + rows)``; strips above them are left out already."""
    pieces = _pieces(strips, row, rows)
    return Block(row, rows, 1, 0, chunks_of(pieces, rows, traits.seen))


def _pieces(strips: Sequence[Strip], row: int, rows: int) -> Pieces:
    """Return the parts of the strips in rows ``[row, row + rows)``."""
    pieces = []
    for i0, i1, runs in strips:
        if i0 >= row + rows:
            break
        top = max(i0, row)
        shift = top - i0
        if shift:
            runs = tuple((a + da * shift, da, b + db * shift, db) for a, da, b, db in runs)
        if i1 > top:
            pieces.append((top - row, min(i1, row + rows) - top, runs))
    return pieces


# -- sharing -----------------------------------------------------------------------------------


def _repeat(items: Iterable[Block | Whole]) -> list[Block | Whole]:
    """Join neighbours that are equal but for a shift, such as documents of one length."""
    out: list[Block | Whole] = []
    for item in items:
        joined = _joined(out[-1], item) if out else None
        if joined is None:
            out.append(item)
        else:
            out[-1] = joined
    return out


def _joined(above: Block | Whole, below: Block | Whole) -> Block | Whole | None:
    if isinstance(above, Whole) and isinstance(below, Whole):
        return _joined_wholes(above, below)
    if not isinstance(above, Block) or not isinstance(below, Block) or below.times > 1:
        return None
    step = below.row - (above.row + (above.times - 1) * above.step)
    if below.rows != above.rows or (above.times > 1 and step != above.step):
        return None
    if len(above.chunks) != len(below.chunks):
        return None
    chunks = []
    for x, y in zip(above.chunks, below.chunks, strict=True):
        if x._replace(runs=()) != y._replace(runs=()) or len(x.runs) != len(y.runs):
            return None
        moved = _moved(x, y, above.times)
        if moved is None:
            return None
        chunks.append(moved)
    return above._replace(times=above.times + 1, step=step, chunks=tuple(chunks))


def _moved(above: Chunk, below: Chunk, count: int) -> Chunk | None:
    """Return the chunk with the steps that lead to `below`, if its runs move evenly."""
    runs = []
    for (a, b, step), (c, d, _) in zip(above.runs, below.runs, strict=True):
        move = c - (a + (count - 1) * step)
        if d - c != b - a or move < 0 or (count > 1 and move != step):
            return None
        runs.append((a, b, move))
    return above._replace(runs=tuple(runs))


def _joined_wholes(above: Whole, below: Whole) -> Whole | None:
    step = below.row - (above.row + (above.times - 1) * above.step)
    if above._replace(row=0, key=0, times=1, step=0) != below._replace(row=0, key=0):
        return None
    if below.key - (above.key + (above.times - 1) * above.step) != step:
        return None
    if above.times > 1 and step != above.step:
        return None
    return above._replace(times=above.times + 1, step=step)


def _merge_small(
    items: list[Block | Whole], strips: tuple[Strip, ...], traits: Traits
) -> Iterator[Block | Whole]:
    """Put small neighbours into one piece where masked cells cost less than one more step."""
    held: Block | Whole | None = None
    at = 0
    for item in items:
        if held is not None and held.times == item.times == 1:
            while strips[at].i1 <= held.row:
                at += 1
            joined = _union(strips, at, held, item, traits)
            if joined is not None:
                held = joined
                continue
        if held is not None:
            yield held
        held = item
    if held is not None:
        yield held


def _union(
    strips: tuple[Strip, ...], at: int, one: Block | Whole, other: Block | Whole, traits: Traits
) -> Block | Whole | None:
    """Return two neighbours as one piece, if that is cheaper; their strips begin at `at`."""
    both = one.rows + other.rows
    if both > max(HEIGHTS) or one.row + one.rows != other.row:
        return None
    here = strips[at : at + both]
    joined = _masked_whole(here, one.row, both, traits) or _block(here, one.row, both, traits)
    cheaper = _cost(joined, traits) < _cost(one, traits) + _cost(other, traits)
    return joined if cheaper else None


def _cost(item: Block | Whole, traits: Traits) -> float:
    """Return the time of an item, in score cells."""
    if isinstance(item, Whole):
        return item.rows * (item.keys + item.before) * traits.matrices + STEP_CELLS / 4
    cells = sum(chunk.width for chunk in item.chunks) * item.rows
    return cells * traits.matrices + STEP_CELLS * len(item.chunks)
