"""The columns of a block: which key runs it reads, in which chunks, and where it masks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from operator import itemgetter

from attnkit.backends.tiled.schedule import KeyChunk, Patch, Pattern, Piece
from attnkit.strips import Run, seen_spans

__all__ = ["Known", "RunsOfRows", "Span", "chunks_of", "pattern_of", "span_around"]

Span = tuple[int, int]
Spans = list[Span]
# Strip pieces of a block: (first row from the block's top, rows, runs at that row).
RunsOfRows = Sequence[tuple[int, int, tuple[Run, ...]]]
Known = dict[Hashable, tuple[KeyChunk, ...]]
"""Chunks by what they follow from, their keys counted from a key of theirs; of one schedule."""

# Score tiles are at most this wide, so that memory does not grow with the number of keys.
WIDEST = 2048
# A run this wide is a chunk by itself, read where it is: to gather it beside others takes longer
# than one more step of the softmax.
ALONE = 1024
# Runs closer than this are one run: masked columns cost less than gathering keys.
GAP = 64
# Unmasked stretches narrower than this join the masked ones beside them.
NARROW = 32
# Runs grow by less than this, so that tiles are aligned.
REACH = 64


def chunks_of(
    pieces: RunsOfRows, rows: int, seen: Sequence[Span], known: Known
) -> tuple[KeyChunk, ...]:
    """Return the chunks of key runs that hold every allowed cell of the pieces.

    `seen` are the ranges of keys that some row of the lane sees: runs grow inside of them only.
    What differs by a shift of all keys is made once, and kept in `known`.
    """
    base = pieces[0][2][0][0]
    last = max(runs[-1][2] + runs[-1][3] * (n - 1) for _, n, runs in pieces)
    first = min(runs[0][0] for _, _, runs in pieces)
    moved = tuple(
        (row, n, tuple((a - base, da, b - base, db) for a, da, b, db in runs))
        for row, n, runs in pieces
    )
    # Runs grow by less than `REACH`, so that nothing further away counts.
    low, high = first - REACH, last + REACH
    near = tuple((max(a, low) - base, min(b, high) - base) for a, b in seen if b > low and a < high)
    key = (moved, rows, near)
    chunks = known.get(key)
    if chunks is None:
        chunks = known[key] = _one_run(*key) or _chunks_of(*key)
    if not base:
        return chunks
    return tuple(
        KeyChunk(tuple((a + base, b + base, 0) for a, b, _ in runs), width, patches, bare)
        for runs, width, patches, bare in chunks
    )


def _one_run(pieces: RunsOfRows, rows: int, seen: Sequence[Span]) -> tuple[KeyChunk, ...] | None:
    """Return the one chunk of rows with one run each, which are next to each other, if it is so."""
    start = stop = least = 0
    most, covered = -REACH, 0
    for k, (_, n, runs) in enumerate(pieces):
        if len(runs) > 1:
            return None
        ((a, da, b, db),) = runs
        end = b + db * (n - 1)
        if not k:
            start, stop, least, most = a, end, a + da * (n - 1), b
        elif a > stop + GAP or end + GAP < start:
            return None
        start, stop = min(start, a), max(stop, end)
        least, most = max(least, a + da * (n - 1)), min(most, b)
        covered += n
    full = [(least, most)] if covered == rows and most - least >= NARROW else []
    ((start, stop),) = _widened([(start, stop)], full, seen)
    if stop - start > WIDEST:
        return None
    patches = tuple(
        Patch(a - start, pattern_of(pieces, rows, a, b)) for a, b in _edges(start, stop, full)
    )
    return (KeyChunk(((start, stop, 0),), stop - start, patches, covered != rows),)


def _chunks_of(pieces: RunsOfRows, rows: int, seen: Sequence[Span]) -> tuple[KeyChunk, ...]:
    full = _full(pieces, rows)
    touched = seen_spans(((0, n, runs) for _, n, runs in pieces), GAP)
    runs = _widened(touched, full, seen)
    chunks = []
    for spans in _chunked(runs):
        patches, column = [], 0
        for start, stop in spans:
            for a, b in _edges(start, stop, full):
                patches.append(Patch(column + a - start, pattern_of(pieces, rows, a, b)))
            column += stop - start
        moving = tuple((a, b, 0) for a, b in spans)
        chunks.append(KeyChunk(moving, column, tuple(patches), _is_bare(pieces, spans, rows)))
    return tuple(chunks)


def pattern_of(pieces: RunsOfRows, rows: int, start: int, stop: int) -> Pattern:
    """Return the pattern of the pieces in key columns ``[start, stop)``."""
    return Pattern(rows, stop - start, _clipped(pieces, start, stop))


def _full(pieces: RunsOfRows, rows: int) -> Spans:
    """Return the keys that every row of the block sees."""
    if sum(piece[1] for piece in pieces) != rows:
        return []
    common: Spans | None = None
    for _, n, runs in pieces:
        here = [(a + da * (n - 1), b) for a, da, b, _ in runs]
        if common is None:
            common = here
        else:
            common = [(max(p, r), min(q, s)) for p, q in common for r, s in here]
        common = [(a, b) for a, b in common if b > a]
    return [(a, b) for a, b in common or () if b - a >= NARROW]


def span_around(seen: Sequence[Span], key: int) -> Span:
    """Return the range of `seen` that holds a key."""
    return seen[bisect_right(seen, key, key=itemgetter(0)) - 1]


def _widened(spans: Spans, full: Spans, seen: Sequence[Span]) -> Spans:
    """Round the widths of runs up, on a side that is masked anyway, so that tiles are aligned."""
    starts, stops = {a for a, _ in full}, {b for _, b in full}
    out: Spans = []
    for k, (start, stop) in enumerate(spans):
        unit = 64 if stop - start > 192 else 16
        lack = -(stop - start) % unit
        low = span_around(seen, start)[0]
        low = max(out[-1][1], low) if out else low
        high = span_around(seen, stop - 1)[1]
        high = min(high, spans[k + 1][0]) if k + 1 < len(spans) else high
        if start not in starts and start - lack >= low:
            start -= lack
        elif stop not in stops and stop + lack <= high:
            stop += lack
        out.append((start, stop))
    return out


def _chunked(spans: Spans) -> list[Spans]:
    """Cut runs into chunks of at most `WIDEST` columns; narrow runs that fit stay together."""
    wide: list[Spans] = []
    chunks: list[Spans] = [[]]
    room = WIDEST
    for start, stop in spans:
        if stop - start >= ALONE or len(spans) == 1:
            wide += ([(a, min(a + WIDEST, stop))] for a in range(start, stop, WIDEST))
            continue
        while stop - start > room:
            if room:
                chunks[-1].append((start, start + room))
            start, room = start + room, WIDEST
            chunks.append([])
        chunks[-1].append((start, stop))
        room -= stop - start
    return [*wide, *(chunk for chunk in chunks if chunk)]


def _edges(start: int, stop: int, full: Spans) -> Spans:
    """Return the stretches of ``[start, stop)`` that not every row sees."""
    out: Spans = []
    for a, b in full:
        if b <= start or a >= stop:
            continue
        if a > start:
            out.append((start, a))
        start = max(start, b)
    if start < stop:
        out.append((start, stop))
    return out


def _clipped(pieces: RunsOfRows, start: int, stop: int) -> tuple[Piece, ...]:
    """Return the pieces inside key columns ``[start, stop)``, counted from `start`.

    Ends outside are brought to the border and made to stand still, so that equal cells have
    equal pieces in the cases that repeat.
    """
    width = stop - start
    out = []
    for row, rows, runs in pieces:
        inside = []
        for a, da, b, db in runs:
            a, b = a - start, b - start
            if b + db * (rows - 1) <= 0 or a >= width:
                continue
            if a + da * (rows - 1) <= 0:
                a, da = 0, 0
            if b >= width:
                b, db = width, 0
            inside.append((a, da, b, db))
        out.append(Piece(row, rows, tuple(inside)))
    return tuple(out)


def _is_bare(pieces: RunsOfRows, spans: Iterable[tuple[int, int]], rows: int) -> bool:
    """Whether some row may see none of the keys; never False when one does not."""
    if sum(piece[1] for piece in pieces) != rows:
        return True
    reach = list(spans)
    return not all(
        any(_always_meets(run, n, span) for run in runs for span in reach) for _, n, runs in pieces
    )


def _always_meets(run: Run, rows: int, span: tuple[int, int]) -> bool:
    """Whether the run holds a key of the span in its first and last row, hence in all."""
    a, da, b, db = run
    last = rows - 1
    return all(
        max(x, span[0]) < min(y, span[1]) for x, y in ((a, b), (a + da * last, b + db * last))
    )
