"""Packing segments into as few kernel calls as their windows allow.

Segments share one TND call when one (sparse mode, pre, next) computes each of them. In its own
rectangle of h rows and w keys, anchored bottom-right, a segment ``lo <= j - i <= hi`` asks for
``pre = w - h - lo`` and ``next = hi - (w - h)``; an end that it does not feel asks only for
"at least", so such segments join others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from attnkit.geometry import Slice
from attnkit.kernel import UNBOUNDED
from attnkit.planner.sequences import Block

__all__ = ["MOST_WINDOWS", "Segment", "Window", "group"]

MOST_WINDOWS = 32
"""More calls than that are never the cheapest: each gathers, launches and merges by itself."""

_MOST_WINDOWS = 10  # of which all combinations are tried
_MOST_ASKED = 128
_MOST_PREFIXES = 32


@dataclass(frozen=True)
class Segment:
    """A sequence of a packed call, and the band of its own numbers that it is to compute.

    With rows u and keys v counted in the order of its block, that is ``lo <= v - u <= hi``; None
    for an end that no cell of the sequence feels.
    """

    block: Block
    lo: int | None = None
    hi: int | None = None

    @classmethod
    def of(cls, batch: int, part: Slice) -> Segment:
        """Return a slice of the score matrix of a batch element, whose keys lie side by side."""
        block = Block.at(batch, part.i0, part.i1, part.j0, part.j1)
        lo, hi = (end + part.i0 - part.j0 for end in (part.lo, part.hi))
        rows, keys = part.i1 - part.i0, part.j1 - part.j0
        return cls(block, lo if lo > 1 - rows else None, hi if hi < keys - 1 else None)

    @property
    def rows(self) -> int:
        """The number of queries."""
        return self.block.sizes[0]

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.block.sizes[1]

    @property
    def transposed(self) -> Segment:
        """Its rows as keys, and its keys as rows."""
        block = Block(self.block.batch, self.block.keys, self.block.rows)
        lo, hi = (None if end is None else -end for end in (self.hi, self.lo))
        return Segment(block, lo, hi)

    @property
    def target(self) -> Slice:
        """The cells that it is to compute, in its own numbers."""
        return Slice(0, self.rows, 0, self.keys, self.lo, self.hi)


@dataclass(frozen=True)
class Window:
    """What one call's arguments are to be: a mode, its window, or a prefix per sequence."""

    mode: int | None
    pre: int = UNBOUNDED
    next: int = UNBOUNDED

    def computes(self, segment: Segment) -> bool:
        """Whether a call with this window computes the segment, cell for cell."""
        full = segment.lo is None and segment.hi is None
        shift = segment.keys - segment.rows
        if self.mode is None:
            return full
        if self.mode == 2:
            return (
                segment.lo is None and (segment.hi if segment.hi is not None else segment.keys) == 0
            )
        if self.mode == 6:
            return full or (segment.lo is None and segment.hi == shift and shift >= 0)
        pre_fits = (
            self.pre >= segment.keys - 1 if segment.lo is None else self.pre == shift - segment.lo
        )
        next_fits = (
            self.next >= segment.rows - 1 if segment.hi is None else self.next == segment.hi - shift
        )
        return pre_fits and next_fits and (self.mode == 4 or shift >= 0)

    def prefix(self, segment: Segment) -> int:
        """Return the prefix that mode 6 needs for a segment."""
        full = segment.lo is None and segment.hi is None
        return segment.keys if full else max(0, segment.keys - segment.rows)


def group(segments: Sequence[Segment]) -> list[list[tuple[Window, list[int]]]]:
    """Return assignments of segments (by index) to calls, each with the fewest calls possible.

    Several are returned where several windows do; which is cheapest is for the price to say.
    Segments that ask for many windows are given to the one that computes most of those left, and
    so on; none is returned where that takes more than `MOST_WINDOWS`.

    >>> from attnkit.geometry import Slice
    >>> squares = [Segment.of(0, Slice(k, k + 2, k, k + 2)) for k in (0, 2, 4)]
    >>> [window.mode for window, _ in group(squares)[0]]
    [None]
    """
    alike: dict[tuple[int, int, int | None, int | None], list[int]] = {}
    for k, segment in enumerate(segments):
        alike.setdefault((segment.rows, segment.keys, segment.lo, segment.hi), []).append(k)
    shapes = [segments[members[0]] for members in alike.values()]
    windows = _windows(shapes, len(segments))
    members = list(alike.values())
    fits = [
        frozenset(
            k for shape, ks in zip(shapes, members, strict=True) if w.computes(shape) for k in ks
        )
        for w in windows
    ]
    everything = frozenset(range(len(segments)))
    for count in range(1, len(windows) + 1):
        found = []
        for chosen in combinations(range(len(windows)), count):
            if frozenset().union(*(fits[w] for w in chosen)) == everything:
                found.append(_assign([(windows[w], fits[w]) for w in chosen]))
        if found:
            return found
    return _greedily(shapes, members, windows)


def _greedily(
    shapes: Sequence[Segment], members: Sequence[list[int]], windows: Sequence[Window]
) -> list[list[tuple[Window, list[int]]]]:
    """Give segments to the window that computes most of them, until none is left."""
    left = dict(enumerate(shapes))
    windows = list(dict.fromkeys((*windows, *(Window(4, *_wanted(one)) for one in shapes))))
    if not left or len(windows) > _MOST_ASKED:
        return []
    chosen: list[tuple[Window, frozenset[int]]] = []
    while left and len(chosen) < MOST_WINDOWS:
        fits = {window: [k for k in left if window.computes(shapes[k])] for window in windows}
        window = max(windows, key=lambda w: sum(len(members[k]) for k in fits[w]))
        chosen.append((window, frozenset(n for k in fits[window] for n in members[k])))
        left = {k: segment for k, segment in left.items() if k not in fits[window]}
    return [] if left else [_assign(chosen)]


def _assign(
    chosen: list[tuple[Window, frozenset[int]]],
) -> list[tuple[Window, list[int]]]:
    """Give every segment to the first window that computes it; calls keep the segments' order."""
    taken: set[int] = set()
    out = []
    for window, fits in chosen:
        mine = sorted(fits - taken)
        taken |= fits
        if mine:
            out.append((window, mine))
    return out


def _windows(segments: Sequence[Segment], count: int) -> list[Window]:
    """Return the windows worth considering: those that some segment asks for, commonest first."""
    tried = [Window(None), Window(3, UNBOUNDED, 0), Window(2)]
    pairs = {_wanted(segment) for segment in segments} - {(UNBOUNDED, UNBOUNDED)}
    pres = _commonest(pre for pre, _ in pairs) | {UNBOUNDED}
    nexts = _commonest(next_ for _, next_ in pairs) | {UNBOUNDED}
    ends = product(pres, nexts)
    tried += (Window(4, *pair) for pair in ends if pair != (UNBOUNDED, UNBOUNDED))
    tried += [Window(6)] if count <= _MOST_PREFIXES else []
    asked = Counter({window: sum(map(window.computes, segments)) for window in tried})
    best = [window for window, fitting in asked.most_common() if fitting]
    must = [w for w in best if w.mode in (None, 2, 3, 6)]
    return must + [w for w in best if w.mode == 4][: max(_MOST_WINDOWS - len(must), 0)]


def _commonest(ends: Iterable[int]) -> set[int]:
    counts = Counter(end for end in ends if end != UNBOUNDED)
    return {end for end, _ in counts.most_common(_MOST_WINDOWS)}


def _wanted(segment: Segment) -> tuple[int, int]:
    """Return the (pre, next) that a segment itself asks for."""
    shift = segment.keys - segment.rows
    return (
        UNBOUNDED if segment.lo is None else shift - segment.lo,
        UNBOUNDED if segment.hi is None else segment.hi - shift,
    )
