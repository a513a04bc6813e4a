"""Ways to part a region into gathered sequences such that every row is in one of them.

A sequence may take its keys in any order, so what counts is which rows see which keys:

* Rows with equal keys are a *class*: one sequence without a mask.
* Rows each of which has the keys of the one before and one more are a *chain*: the keys of its
  first row and then those it gains, in order, are a triangle at the end (mode 3). The fewest
  chains are a minimum path cover of the graph of such steps, by a maximum matching.
* Rows each of which loses a key and gains one are a *slide*. Its keys are those that leave, those
  that stay, and those that enter: a band (mode 4). A sink stands in the middle, where no row's
  band ends.

The work follows the strips of a region: one whose runs stand still is of a class, one with a single
end that moves is a chain (rows that lose a key gain one from the bottom up), and one with a start
and a stop that move is a slide. Nothing relies on this file: the proof looks at what it returns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from random import Random
from typing import NamedTuple

from attnkit.geometry import Region, Strip
from attnkit.planner.grouping import Segment
from attnkit.planner.sequences import Block
from attnkit.ranges import Ranges
from attnkit.strips import Run, advance

__all__ = ["partitions"]

Keys = tuple[tuple[int, int], ...]
"""The keys of a row, as maximal runs ``(start, stop)`` in order."""

_MOST_SEGMENTS = 8192  # four calls of as many sequences as the contract takes
_MOST_RUNS = 2**15  # of rows whose ends move in no way that is named above
# Rows of strips that are of a kind are looked at one by one where they are few and strips short.
_FEW_ROWS, _SHORT = 256, 4
# Whether there are slides; whether there are chains; whether, beside these, rows are in classes.
_WAYS = ((True, True, True), (False, True, True), (False, False, True), (False, True, False))


def partitions(region: Region, batch: int = 0) -> Iterator[tuple[Segment, ...]]:
    """Yield ways to part the rows of a region into sequences that have all of their keys.

    Slides, chains and classes; chains and classes; classes alone, as few as there are different
    rows; chains alone, as few as there can be. A way that takes too many sequences is left out.

    >>> from attnkit.geometry import Slice
    >>> sink_and_window = Region.of(Slice(0, 64, 0, 64, -7, 0), Slice(0, 64, 0, 2, hi=0))
    >>> slides, *_ = partitions(sink_and_window)
    >>> len(slides), slides[1].block
    (7, Block(batch=0, rows=(range(10, 19),), keys=(range(3, 11), range(0, 2), range(11, 19))))
    """
    seen: set[tuple[Segment, ...]] = set()
    if (whole := _Kinds.of(region.strips)) is None:
        return
    few = _are_short(region.strips)
    for slides, chains, classes in _WAYS if whole.slides else _WAYS[1:]:
        parts = whole.by_row(slides=not slides, stairs=few or not chains)
        pieces = [piece for strip in parts.slides for piece in _pieces(strip)] if parts else []
        if parts is None or len(pieces) > _MOST_SEGMENTS:
            continue
        found = [_slide(batch, piece) for piece in pieces]
        found += parts.in_chains(batch, classes) if chains else parts.in_classes(batch)
        own = tuple(sorted(found, key=lambda one: one.block.ends))
        if 0 < len(own) <= _MOST_SEGMENTS and own not in seen:
            seen.add(own)
            yield own


# -- strips --------------------------------------------------------------------------------


class _Stair(NamedTuple):
    """Rows in order, the keys of the first and of the last, and those gained in between."""

    rows: range
    first: Keys
    last: Keys
    gained: range

    @classmethod
    def of_row(cls, row: int, keys: Keys) -> _Stair:
        return cls(range(row, row + 1), keys, keys, range(0))

    @classmethod
    def of_strip(cls, strip: Strip) -> _Stair:
        """Return a strip of which one end moves."""
        steps = strip.i1 - strip.i0 - 1
        top, bottom = _keys(strip.runs), _keys(advance(strip.runs, steps))
        a, _, b, grows = next(run for run in strip.runs if run[1] or run[3])
        if grows:
            return cls(range(strip.i0, strip.i1), top, bottom, range(b, b + steps))
        gained = range(a + steps - 1, a - 1, -1)
        return cls(range(strip.i1 - 1, strip.i0 - 1, -1), bottom, top, gained)


class _Kinds(NamedTuple):
    """The strips of a region by what moves in them; rows that stand still by their runs."""

    slides: list[Strip]
    stairs: list[Strip]
    classes: dict[tuple[Run, ...], list[range]]

    @classmethod
    def of(cls, strips: Sequence[Strip]) -> _Kinds | None:
        """Tell strips apart; None where too many rows are of no kind."""
        parts, most = cls([], [], {}), _MOST_RUNS
        for strip in strips:
            starts, stops = (sum(run[end] for run in strip.runs) for end in (1, 3))
            if starts == stops == 0:
                parts.classes.setdefault(strip.runs, []).append(range(strip.i0, strip.i1))
            elif starts == stops == 1:
                parts.slides.append(strip)
            elif starts + stops == 1:
                parts.stairs.append(strip)
            else:
                most -= (strip.i1 - strip.i0) * len(strip.runs)
                if most < 0:
                    return None
                parts.add_rows([strip])
        return parts

    def by_row(self, slides: bool, stairs: bool) -> _Kinds | None:
        """Return the parts with rows for strips of some kinds; None if they are too many."""
        strips = self.slides * slides + self.stairs * stairs
        if not strips:
            return self
        if not _are_short(strips):
            return None
        rows = {keys: list(ranges) for keys, ranges in self.classes.items()}
        parts = _Kinds([] if slides else self.slides, [] if stairs else self.stairs, rows)
        parts.add_rows(strips)
        return parts

    def add_rows(self, strips: Iterable[Strip]) -> None:
        """Add the rows of some strips one by one."""
        for strip in strips:
            for k in range(strip.i1 - strip.i0):
                runs = tuple((a, 0, b, 0) for a, _, b, _ in advance(strip.runs, k))
                self.classes.setdefault(runs, []).append(range(strip.i0 + k, strip.i0 + k + 1))

    def in_classes(self, batch: int) -> Iterator[Segment]:
        """Yield a sequence for each set of keys."""
        return (_class(batch, rows, _keys(runs)) for runs, rows in self.classes.items())

    def in_chains(self, batch: int, classes: bool) -> Iterator[Segment]:
        """Yield the fewest chains, beside `classes` of the rows that are in none.

        A class of several rows lends one to the chains. Where it joins two of them it stays there,
        and costs nothing: a chain gathers the keys of its last row. It comes back otherwise.
        """
        sizes = [sum(map(len, ranges)) for ranges in self.classes.values()]
        if not classes and sum(sizes) - len(sizes) > _FEW_ROWS:
            return
        stairs = [_Stair.of_strip(strip) for strip in self.stairs]
        rest: dict[Keys, list[range]] = {}
        for (runs, ranges), size in zip(self.classes.items(), sizes, strict=True):
            keys = _keys(runs)
            lent = [ranges[-1][-1]] if classes else chain.from_iterable(ranges)
            stairs += (_Stair.of_row(row, keys) for row in lent)
            if classes and size > 1:
                rest[keys] = ranges
        for path in _paths(stairs):
            while path and path[0].first in rest and len(path[0].rows) == 1:
                path.pop(0)
            while path and path[-1].first in rest and len(path[-1].rows) == 1:
                path.pop()
            for one in path:
                if one.first in rest and len(one.rows) == 1:
                    *others, last = rest[one.first]
                    rest[one.first] = [*others, last[:-1]]
            if path:
                yield _chain(batch, path)
        for keys, ranges in rest.items():
            yield _class(batch, ranges, keys)


def _are_short(strips: Sequence[Strip]) -> bool:
    """Whether strips have few rows each, and in all: then chains may part at every row."""
    rows = sum(strip.i1 - strip.i0 for strip in strips)
    return rows <= min(_FEW_ROWS, _SHORT * (len(strips) + _SHORT))


def _keys(runs: tuple[Run, ...]) -> Keys:
    return tuple((a, b) for a, _, b, _ in runs)


def _pieces(strip: Strip) -> Iterator[Strip]:
    """Cut a strip that slides so that no key both enters and leaves, but in a band by itself."""
    rows = most = strip.i1 - strip.i0
    if len(strip.runs) > 1:
        wide = (b - a + 1 for a, da, b, db in strip.runs if da and db)
        between = (c - b + 1 for (_, _, b, db), (c, dc, _, _) in pairwise(strip.runs) if db and dc)
        most = min([rows, *wide, *between])
    each = -(-rows // -(-rows // most))
    for start in range(0, rows, each):
        stop = min(start + each, rows)
        yield Strip(strip.i0 + start, strip.i0 + stop, advance(strip.runs, start))


# -- sequences -----------------------------------------------------------------------------


def _class(batch: int, rows: Iterable[range], keys: Keys) -> Segment:
    """Return the sequence of rows with equal keys."""
    return Segment(Block(batch, _joined(rows), tuple(range(a, b) for a, b in keys)))


def _slide(batch: int, strip: Strip) -> Segment:
    """Return the sequence of rows that lose a key and gain one: leaving, staying, entering."""
    steps, width = strip.i1 - strip.i0 - 1, sum(b - a for a, _, b, _ in strip.runs)
    first: list[range] = []
    staying: list[range] = []
    last: list[range] = []
    for a, da, b, db in strip.runs:
        if da and db and len(strip.runs) == 1:  # a band, however many rows there are
            first = [range(a, b + steps)]
            continue
        own = range(a + steps if da else a, b)
        (first if da else last if db else staying).append(own)
        if da:
            first.insert(0, range(a, a + steps))
        if db:
            last.append(range(b, b + steps))
    block = Block(batch, (range(strip.i0, strip.i1),), _joined((*first, *staying, *last)))
    return Segment(block, 0, width - 1) if steps else Segment(block)


def _chain(batch: int, path: Sequence[_Stair]) -> Segment:
    """Return the sequence of stairs each of which has a key more than the one before ends with."""
    gained = [path[0].gained]
    for above, below in pairwise(path):
        # Their ends differ in those of one key.
        key = min({*chain(*above.last)} ^ {*chain(*below.first)})
        gained += [range(key, key + 1), below.gained]
    new = _joined(gained)
    keys = _joined((*_towards(path[0].first, new), *new))
    block = Block(batch, _joined(one.rows for one in path), keys)
    q_len, kv_len = block.sizes
    return Segment(block, None, kv_len - q_len if q_len > 1 else None)


def _towards(keys: Keys, new: Ranges) -> list[range]:
    """Return keys as ranges, that which the new ones go on from as the last of them."""
    own = [range(a, b) for a, b in keys]
    for k, (a, b) in enumerate(keys if new else ()):
        if new[0][0] == b and (new[0].step == 1 or len(new[0]) == 1):
            return [*own[:k], *own[k + 1 :], own[k]]
        if new[0][0] == a - 1 and (new[0].step == -1 or len(new[0]) == 1):
            return [*own[:k], *own[k + 1 :], range(b - 1, a - 1, -1)]
    return own


def _joined(ranges: Iterable[range]) -> Ranges:
    """Return positions as few ranges, in the same order."""
    out: list[range] = []
    for one in filter(None, ranges):
        step = one[0] - out[-1][-1] if out else 0
        if step in (1, -1) and all(len(x) == 1 or x.step == step for x in (out[-1], one)):
            out[-1] = range(out[-1][0], one[-1] + step, step)
        else:
            out.append(one if len(one) > 1 else range(one[0], one[0] + 1))
    return tuple(out)


# -- the fewest chains -----------------------------------------------------------------------


def _paths(stairs: Sequence[_Stair]) -> list[list[_Stair]]:
    """Return the stairs as the fewest paths along which each follows the one before.

    As many paths as stairs, less the pairs of a maximum matching of stairs and followers. It
    begins with rows that lie side by side, so that a path leaves these only where it must.
    """
    steps = _followers(stairs)
    after: list[int | None] = [None] * len(stairs)
    before: list[int | None] = [None] * len(stairs)
    for beside in (True, False):
        for k, found in enumerate(steps):
            for n in found if after[k] is None else ():
                near = abs(stairs[n].rows[0] - stairs[k].rows[-1]) == 1
                if before[n] is None and (near or not beside):
                    after[k], before[n] = n, k
                    break
    settled: set[int] = set()
    for k, found in enumerate(steps):
        if found and after[k] is None:
            _augment(steps, after, before, k, settled)
    paths = []
    for k, stair in enumerate(stairs):
        if before[k] is None:
            path, at = [stair], after[k]
            while at is not None:
                path.append(stairs[at])
                at = after[at]
            paths.append(path)
    return paths


def _augment(
    steps: Sequence[Sequence[int]],
    after: list[int | None],
    before: list[int | None],
    start: int,
    settled: set[int],
) -> None:
    """Find a stair a follower, by moving the pairs on the way to one that is free.

    What is reached in vain is `settled`: no later search gets further from there.
    """
    reached: dict[int, int] = {}
    waiting = [start]
    for k in waiting:
        for n in steps[k]:
            if n in reached or n in settled:
                continue
            reached[n] = k
            owner = before[n]
            if owner is not None:
                waiting.append(owner)
                continue
            at: int | None = n
            while at is not None:
                giver = reached[at]
                before[at], after[giver], at = giver, at, after[giver]
            return
    settled |= reached.keys()


def _followers(stairs: Sequence[_Stair]) -> list[list[int]]:
    """Return for each stair those whose first row has a key more than its last.

    Rows are compared by fingerprints: a row's is the exclusive or of random words, one for each
    place where a run of it starts or stops, so that another key changes two of them. The key that
    is new lies beside a run of the row above, or else is a run by itself in the row below.
    """
    words, random = {}, Random(0)

    def word(place: int) -> int:
        if place not in words:
            words[place] = random.getrandbits(128)
        return words[place]

    def mark(keys: Keys) -> int:
        found = 0
        for a, b in keys:
            found ^= word(a) ^ word(b)
        return found

    lasts, firsts = [mark(one.last) for one in stairs], [mark(one.first) for one in stairs]
    ending, beginning = defaultdict(list), defaultdict(list)
    for k, (last, first) in enumerate(zip(lasts, firsts, strict=True)):
        ending[last].append(k)
        beginning[first].append(k)
    found: list[set[int]] = [set() for _ in stairs]
    for k, one in enumerate(stairs):
        for key in {key for a, b in one.last for key in (a - 1, b)}:
            found[k].update(beginning.get(lasts[k] ^ word(key) ^ word(key + 1), ()))
        for key in [a for a, b in one.first if b - a == 1]:
            for n in ending.get(firsts[k] ^ word(key) ^ word(key + 1), ()):
                found[n].add(k)
    return [sorted(some) for some in found]
