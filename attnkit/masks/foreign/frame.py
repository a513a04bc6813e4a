"""Where a mask function is asked: indices of a call against positions of whole texts, as sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnkit.constants import constant
from attnkit.errors import CompositionError
from attnkit.masks.algebra import And, Or
from attnkit.masks.base import Align, Full, Mask
from attnkit.masks.causal import Band, Causal, SlidingWindow
from attnkit.masks.documents import Documents
from attnkit.masks.padding import told, written
from attnkit.masks.same_id import SameId, runs_of
from attnkit.masks.spans import Spans

__all__ = ["EVERY", "NOTHING", "Frame", "Meet", "Numbers", "both", "either"]

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Meet:
    """Keys by their distance from the query, that masks allow, too.

    ``least <= key - query <= most``, None is no end: what `Causal`, `SlidingWindow` and `Band` are
    before it is known where queries stand. `rest` are masks of the score matrix itself.
    """

    least: int | None = None
    most: int | None = None
    rest: tuple[Mask, ...] = ()

    def seen_from(self, more: int) -> Meet:
        """Return the same cells where each distance counts so much more."""
        least, most = (None if end is None else end + more for end in (self.least, self.most))
        return Meet(least, most, self.rest)


# Masks of so few rows are kept: each step of a cache finds that of the step before.
FEW_ROWS = 32
EVERY = Meet()
NOTHING = Meet(rest=(~Full(),))


@dataclass(frozen=True)
class Frame:
    """A score matrix in the coordinates of a mask function.

    Query i has the index ``i + q_offset`` and key j the index ``j + kv_offset``. `positions`
    [B, S] are what a remapped function is asked with in their place. `apart` [B, S] are numbers
    of tokens, and only cells of equal ones matter: a mask beside this one sees to the others.
    """

    q_len: int
    kv_len: int
    q_offset: int = 0
    kv_offset: int = 0
    batch: int | None = None
    positions: Numbers | None = None
    apart: Numbers | None = None

    @property
    def ahead(self) -> int:
        """How many keys before query 0 the first key is: ``key - query = j - i - ahead``."""
        return self.q_offset - self.kv_offset

    @property
    def is_steady(self) -> bool:
        """Whether two positions differ as much as their indices do, wherever it matters."""
        at, apart = self.positions, self.apart
        if at is None:
            return True
        if apart is None:
            return bool((at[:, 1:] - at[:, :-1] == 1).all())
        steps = apart[:, 1:] - apart[:, :-1]
        return bool((steps >= 0).all() and ((at[:, 1:] - at[:, :-1] == 1) | (steps > 0)).all())

    def moved(self, q_offset: int, kv_offset: int) -> Frame:
        """Return the frame of a function that is asked with more."""
        moved = self.q_offset + q_offset, self.kv_offset + kv_offset
        return replace(self, q_offset=moved[0], kv_offset=moved[1])

    def among(self, numbers: Numbers) -> Frame:
        """Return the frame where only cells of equal numbers matter."""
        return replace(self, apart=numbers)

    def at(self, positions: Numbers) -> Frame:
        """Return the frame of a function that is asked with positions."""
        return replace(self, positions=positions)

    # -- reading tensors -------------------------------------------------------------------

    def of_both(self, given: Numbers) -> tuple[Numbers, Numbers]:
        """Return the entries [B, S] that the queries and the keys have: one array, if alike."""
        return self._cut(self._looked_up(given))

    def of_keys(self, given: Numbers) -> Numbers:
        """Return the entries [B, S] -> [B, Skv] that the keys have."""
        return self._taken(self._looked_up(given), self.kv_offset, self.kv_len)

    def chunks(self, starts: Numbers, size: int) -> tuple[Numbers, Numbers]:
        """Return the numbers of chunks that the positions of queries and of keys lie in."""
        at = np.zeros((1, 0), np.int64) if self.positions is None else self.positions
        return self._cut((at - starts[:, None]) // size)

    def _cut(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        rows = self._taken(numbers, self.q_offset, self.q_len)
        if (self.q_offset, self.q_len) == (self.kv_offset, self.kv_len):
            return rows, rows
        return rows, self._taken(numbers, self.kv_offset, self.kv_len)

    def _looked_up(self, given: Numbers) -> Numbers:
        given = given if self.batch is None else given[: self.batch]
        at = self.positions
        if at is None:
            return given
        if at.size and not 0 <= at.min() <= at.max() < given.shape[1]:
            raise CompositionError(
                f"a mask function reads a tensor of {given.shape[1]} tokens at the positions "
                f"{at.min()} to {at.max()}; they do not belong to it"
            )
        return np.take_along_axis(np.broadcast_to(given, (len(at), given.shape[1])), at, 1)

    @staticmethod
    def _taken(given: Numbers, offset: int, length: int) -> Numbers:
        if offset < 0 or given.shape[1] < offset + length:
            raise CompositionError(
                f"a mask function reads a tensor of {given.shape[1]} tokens at {offset} to "
                f"{offset + length - 1}; the offsets and lengths do not belong to it"
            )
        return given[:, offset : offset + length]

    # -- sets ------------------------------------------------------------------------------

    def placed(self, make: Callable[[Align, int], Mask]) -> Mask:
        """Return a mask of positions: ``make(align, shift)``, where p is the index less `shift`.

        Where the last query stands at the last key, or the first at the first, an anchor says it;
        else it is cut from a score matrix that has the rows or keys before, too.
        """
        if self.ahead == self.kv_len - self.q_len:
            return make("bottom_right", self.kv_offset)
        if self.ahead >= 0:
            whole = make("top_left", self.kv_offset)
            return whole[self.ahead :, :] if self.ahead else whole
        return make("top_left", self.q_offset)[:, -self.ahead :]

    def mask(self, meet: Meet) -> Mask:
        """Return the cells as one mask."""
        off = self.ahead - (self.kv_len - self.q_len)
        align: Align = "bottom_right"
        if off and not self.ahead:
            align, off = "top_left", 0
        join = _kept if self.q_len <= FEW_ROWS and not off else _joined
        return join(meet.least, meet.most, off, align, meet.rest)

    def existing(self, cells: Numbers) -> Meet:
        """Return the keys that exist, of a bool array [B, Skv]."""
        if np.count_nonzero(cells) == cells.size:
            return EVERY
        write = _kept_padding if self.q_len <= FEW_ROWS else written
        return Meet(rest=(write(*told(cells), True),))

    def alike(self, queries: Numbers, keys: Numbers, none: bool) -> Meet:
        """Return the cells whose numbers are equal; with `none`, those below 0 have no number."""
        if none and not ((queries >= 0).any() and (keys >= 0).any()):
            return NOTHING
        rows = columns = runs_of(queries)
        if queries is not keys:
            columns = runs_of(keys)
        if all(each.count(each[0]) == len(each) for each in (rows, columns)):
            rows, columns = rows[:1], columns[:1]
        single = len(rows) == 1
        if rows == columns and _come_once(columns, none):
            if not none:
                return _documents(rows)
            if self.ahead == 0:
                spans = [_spans(runs) for runs in columns]
                return Meet(rest=(Spans(spans[0] if single else spans),))
        sides = [
            tuple(tuple((None if none and n < 0 else n, size) for n, size in runs) for runs in side)
            for side in (rows, columns)
        ]
        found = SameId(sides[0][0], sides[1][0]) if single else SameId(*sides)
        return Meet(rest=(found,))


def _joined(
    least: int | None, most: int | None, off: int, align: Align, rest: tuple[Mask, ...]
) -> Mask:
    """Return a stretch of distances, and what masks allow; `off` is where positions are 0."""
    if least is most is None:
        return And.of(*rest) if rest else Full()
    if most == 0 and not off:
        reach: Mask = Causal(align) if least is None else SlidingWindow(1 - least, align)
    else:
        left, right = None if least is None else -least - off, None if most is None else most + off
        reach = Band(left, right, align)
    return And.of(reach, *rest) if rest else reach


_kept = constant(_joined)
_kept_padding = constant(written)


def _come_once(each: list[list[tuple[int, int]]], none: bool) -> bool:
    """Whether no number comes back after another one."""
    for runs in each:
        numbers = [n for n, _ in runs if n >= 0 or not none]
        if len(set(numbers)) < len(numbers):
            return False
    return True


def _documents(each: list[list[tuple[int, int]]]) -> Meet:
    if all(len(runs) == 1 for runs in each):
        return EVERY
    lengths = tuple(tuple(size for _, size in runs) for runs in each)
    return Meet(rest=(Documents(lengths if len(lengths) > 1 else lengths[0]),))


def _spans(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found, start = [], 0
    for number, size in runs:
        if number >= 0:
            found.append((start, start + size))
        start += size
    return found


def both(one: Meet, two: Meet) -> Meet:
    """Return the intersection; stretches of distances become one."""
    least, most = _outer(max, one.least, two.least), _outer(min, one.most, two.most)
    empty = least is not None and most is not None and least > most
    if empty or NOTHING in (one, two):
        return NOTHING
    return Meet(least, most, one.rest + two.rest)


def _outer(choose: Callable[..., int], one: int | None, two: int | None) -> int | None:
    if one is None or two is None:
        return two if one is None else one
    return choose(one, two)


def either(frame: Frame, one: Meet, two: Meet) -> Meet:
    """Return the union; stretches of distances that meet become one."""
    if NOTHING in (one, two):
        return two if one == NOTHING else one
    if EVERY in (one, two):
        return EVERY
    if not one.rest and not two.rest:
        joined = _one_stretch(one, two)
        if joined is not None:
            return joined
    return Meet(rest=(Or.of(frame.mask(one), frame.mask(two)),))


def _one_stretch(one: Meet, two: Meet) -> Meet | None:
    """Return the distances of either, where they are one stretch."""
    for low, high in ((one, two), (two, one)):
        if low.most is not None and high.least is not None and low.most + 1 < high.least:
            return None
    least = None if None in (one.least, two.least) else _outer(min, one.least, two.least)
    most = None if None in (one.most, two.most) else _outer(max, one.most, two.most)
    return Meet(least, most)
