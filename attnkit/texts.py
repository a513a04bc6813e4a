"""`HeldText`: which tokens of a text a cache holds, in what order. Plain integers, no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

from attnkit.strips import gaps

__all__ = ["HeldText", "Runs", "alike", "meet", "paired"]

T = TypeVar("T")
Range = tuple[int, int]
Runs = tuple[Range, ...]
"""Positions ``[start, stop)`` in order, with gaps between them."""


class HeldText(NamedTuple):
    """Of `length` tokens so far those in `runs`, in the order in which they lie in memory.

    Queries before `since` may have seen tokens that are forgotten, and cannot come again.

    >>> HeldText().grown(3)
    HeldText(length=3, runs=((0, 3),), since=0)
    """

    length: int = 0
    runs: Runs = ()
    since: int = 0

    @property
    def held(self) -> int:
        """The number of tokens that are held.

        >>> HeldText(9, ((0, 2), (7, 9))).held
        4
        """
        return sum(stop - start for start, stop in self.runs)

    @property
    def forgotten(self) -> Runs:
        """The positions that are not held any more.

        >>> HeldText(9, ((0, 2), (7, 9))).forgotten
        ((2, 7),)
        """
        return tuple(gaps(self.runs, 0, self.length))

    def grown(self, count: int) -> HeldText:
        """Return it with `count` tokens more.

        >>> HeldText(9, ((0, 2), (7, 9))).grown(1)
        HeldText(length=10, runs=((0, 2), (7, 10)), since=0)
        """
        start, stop = self.length, self.length + count
        runs = self.runs
        if runs and runs[-1][1] == start:
            start, runs = runs[-1][0], runs[:-1]
        return self._replace(length=stop, runs=(*runs, (start, stop)) if count else self.runs)

    def shortened(self, length: int) -> HeldText:
        """Return its first `length` tokens.

        >>> HeldText(9, ((0, 2), (7, 9))).shortened(8)
        HeldText(length=8, runs=((0, 2), (7, 8)), since=0)
        """
        return self._replace(length=length, runs=meet(self.runs, ((0, length),)))

    def keeping(self, runs: Runs) -> HeldText:
        """Return it with the tokens of `runs` alone, as far as it holds them.

        >>> HeldText(9, ((0, 9),)).keeping(((0, 2), (7, 12)))
        HeldText(length=9, runs=((0, 2), (7, 9)), since=9)
        """
        return self._replace(runs=meet(self.runs, runs), since=self.length)

    @property
    def places(self) -> list[int]:
        """Where in memory each run begins.

        >>> HeldText(9, ((0, 2), (7, 9))).places
        [0, 2]
        """
        sizes = (stop - start for start, stop in self.runs)
        return list(accumulate(sizes, initial=0))[:-1]

    def spans(self, runs: Runs) -> list[Range]:
        """Return where in memory the tokens of `runs` lie, as far as it holds them.

        >>> HeldText(9, ((0, 2), (7, 9))).spans(((1, 8),))
        [(1, 2), (2, 3)]
        """
        found = []
        for first, (start, stop) in zip(self.places, self.runs, strict=True):
            shift = first - start
            found += [(a + shift, b + shift) for a, b in meet(((start, stop),), runs)]
        return found

    def positions(self, span: Range) -> list[Range]:
        """Return which tokens lie at a stretch of memory.

        >>> HeldText(9, ((0, 2), (7, 9))).positions((1, 9))
        [(1, 2), (7, 9)]
        """
        found = []
        for first, (start, stop) in zip(self.places, self.runs, strict=True):
            shift = start - first
            found += [(a + shift, b + shift) for a, b in meet(((first, stop - shift),), (span,))]
        return found


def meet(some: Iterable[Range], others: Sequence[Range]) -> Runs:
    """Return the positions that are in both.

    >>> meet([(0, 4), (6, 9)], [(2, 7)])
    ((2, 4), (6, 7))
    """
    pairs = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return tuple((start, stop) for start, stop in pairs if start < stop)


def alike(texts: Iterable[HeldText]) -> tuple[HeldText, ...]:
    """Return one text for all where they are equal.

    >>> alike([HeldText(3), HeldText(3)])
    (HeldText(length=3, runs=(), since=0),)
    """
    all_of = tuple(texts)
    return all_of[:1] if len(set(all_of)) == 1 else all_of


def paired(texts: Sequence[HeldText], values: Sequence[T]) -> list[tuple[HeldText, T]]:
    """Return texts with their values, where one of either may stand for all.

    >>> len(paired([HeldText(3)], [1, 2]))
    2
    """
    most = max(len(texts), len(values))
    return list(
        zip(list(texts) * (most // len(texts)), list(values) * (most // len(values)), strict=True)
    )
